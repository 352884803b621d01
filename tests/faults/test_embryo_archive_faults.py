"""Rows 35 to 38: crafted and damaged archives, death while extracting, damaged frames and tables."""

import gzip
import io
import os
import shutil
import signal
import struct
import tarfile

import numpy as np
import pytest

from medvol_nb.core import DataError, FormatError
from medvol_nb.embryo.archives import BadArchive, SourceContentError, TargetNotEmpty, extract_dataset
from medvol_nb.embryo.dataset import EmbryoFrames, check_frames
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.members import ExtractionError, UnsafeMember
from medvol_nb.embryo.phantom import bad_members, jpeg_bytes, make_phantom_archives, make_phantom_dataset, pack
from medvol_nb.embryo.phases import FocalPlane

from .injectors import forked, truncations
from .jobs import content
from .rows import SilentlyWrong

STEM = "embryo_dataset"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A tree and its ten archives"
    root = tmp_path_factory.mktemp("embryo")
    make_phantom_dataset(root / "tree", 2, 4, size=16)
    make_phantom_archives(root / "tree", root / "archives")
    return root


def central(made):
    return {p.relative_to(made / "tree").as_posix(): p.read_bytes() for p in (made / "tree" / STEM).rglob("*.jpeg")}


def raw_member(name=f"{STEM}/evil/a.jpeg", size=0, kind=b"0", data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for k, v in fields.items():
        setattr(info, k, v)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = b"%011o\0" % size if size < 8**11 else bytes([0x80]) + bytes(3) + struct.pack(">Q", size)
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:]))
    return bytes(head) + data + bytes(-len(data) % 512)


def tiny_members(n=10**6):
    "A gzipped archive of so many members of one byte, as small as it can be"
    one = raw_member(size=1, data=b"x")
    block, out = one * 5000, io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as f:
        f.write(raw_member(f"{STEM}/", kind=b"5"))
        for _ in range(n // 5000):
            f.write(block)
    return out.getvalue()


def test_row_35_crafted_members(instances, made, tmp_path):
    "Refused, or extracted as plain files; nothing appears outside of the target, and the target only if it is whole"
    sound = central(made)
    crafted = {k: pack(sound, v) for k, v in bad_members(STEM, str(tmp_path / "outside")).items()}
    for name in ("contiguous", "no name", "unknown kind", "empty part", "dot part"):  # kept for the tests of the module
        del crafted[name]
    whole = gzip.decompress(pack(sound))
    end = whole.rstrip(b"\0")
    end += bytes(-len(end) % 512)
    crafted["4 GiB sparse"] = gzip.compress(end + raw_member(size=2**32, kind=b"S") + bytes(1024))
    crafted["huge declared size"] = gzip.compress(end + raw_member(size=2**40) + bytes(1024))
    crafted["10^6 tiny members"] = tiny_members()
    crafted["set-uid"] = gzip.compress(end + raw_member(mode=0o6755, uid=0, gid=0) + bytes(1024))
    case = {f"{STEM}/Evil/a.jpeg": b"1", f"{STEM}/evil/a.jpeg": b"2", f"{STEM}/evil/A.jpeg": b"3"}
    crafted["case clash"] = pack(sound | case)
    safe = {"set-uid": {f"{STEM}/evil/a.jpeg": b""}, "case clash": case}
    shutil.copytree(made / "archives", tmp_path / "archives")
    for name, data in crafted.items():
        (tmp_path / "archives" / f"{STEM}.tar.gz").write_bytes(data)
        before = content(tmp_path)
        with instances(name):
            try:
                extract_dataset(tmp_path / "archives", tmp_path / "out", n_proc=1)
            except UnsafeMember as e:
                assert name not in safe and f"{STEM}.tar.gz" in str(e)
                if content(tmp_path) != before or sorted(os.listdir(tmp_path)) != ["archives"]:
                    raise SilentlyWrong("something was left behind") from None
                continue
            wanted = content(made / "tree") | safe.get(name, {})
            if name not in safe or content(tmp_path / "out") != wanted:
                raise SilentlyWrong("other files than those of the archives")
            assert not any(p.stat().st_mode & 0o7022 for p in (tmp_path / "out").rglob("*"))
            shutil.rmtree(tmp_path / "out")
            assert content(tmp_path) == before
    instances.check(30)


def test_row_36_damaged_sets(instances, made, tmp_path):
    "Refused before anything is published; the target stays absent"
    shutil.copytree(made / "archives", tmp_path / "archives")
    victim = tmp_path / "archives" / "embryo_dataset_F-30.tar.gz"
    sound = victim.read_bytes()

    def refused(name, kind, *words, target="out"):
        before = content(tmp_path)
        with instances.refuses(name, kind, *words):
            extract_dataset(tmp_path / "archives", tmp_path / target, n_proc=2)
        assert content(tmp_path) == before and not (tmp_path / "out").exists(), name

    for length, data in truncations(sound, 20):
        victim.write_bytes(data)
        refused(f"truncated to {length}", BadArchive, "F-30.tar.gz", "ownload")
    victim.write_bytes(sound[:-8] + bytes([sound[-8] ^ 1]) + sound[-7:])
    refused("wrong checksum", BadArchive, "F-30.tar.gz is damaged", "Incorrect checksum")
    victim.write_bytes(sound[:-4] + bytes([sound[-4] ^ 1]) + sound[-3:])
    refused("wrong length", BadArchive, "F-30.tar.gz is damaged", "Incorrect checksum")
    victim.write_bytes(b"PK\x03\x04" + sound)
    refused("zip called tar.gz", BadArchive, "F-30.tar.gz is not a gzip file")
    victim.unlink()
    refused("missing plane", SourceContentError, "missing=.'embryo_dataset_F-30.tar.gz'.")
    victim.write_bytes(sound)
    (tmp_path / "archives" / "notes.txt").touch()
    refused("extra file", SourceContentError, "unexpected=.'notes.txt'.")
    (tmp_path / "archives" / "notes.txt").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    refused("target not empty", TargetNotEmpty, "holds mine", target="full")
    instances.check(26)


def test_row_37_killed_while_extracting(instances, made, tmp_path):
    "Death before a counted step: no target, or a whole one; the same command, with and without --resume, completes it"
    whole = content(made / "tree")
    job = lambda out, **how: extract_dataset(made / "archives", out, n_proc=1, **how)  # noqa: E731
    (tmp_path / "count").mkdir()
    steps = forked(lambda: job(tmp_path / "count" / "out"), tmp_path / "count")
    for k in range(10):
        folder = tmp_path / f"run{k}"
        folder.mkdir()
        at = 1 + k * (steps - 1) // 9
        with instances(f"step {at} of {steps}"):
            assert forked(lambda: job(folder / "out"), folder, at) == -signal.SIGKILL  # noqa: B023
            if (folder / "out").exists():
                if content(folder / "out") != whole:
                    raise SilentlyWrong("half a tree under its final name")
                with pytest.raises(TargetNotEmpty):
                    job(folder / "out")
            else:
                job(folder / "out", resume=bool(k % 2))
            if content(folder / "out") != whole:
                raise SilentlyWrong("the second run made another tree")
            left = set(os.listdir(folder)) - {"out"}
            assert all(n.startswith((".mvtmp", ".out.partial", "out.lock")) for n in left), left
            assert not left or (folder / "out").stat().st_mtime, "litter of a run that was complete already"
    instances.check(10)


# ------------------------------------------------------------------------------------------------- frames and tables


def oracle(text, frames):
    "Phase of every frame, one frame at a time: of the intervals that hold it, the one that starts last"
    rows = [line.split(",") for line in text.split("\n") if line]
    out = {}
    for n in frames:
        holds = [(int(a), k, p) for k, (p, a, b) in enumerate(rows) if int(a) <= n <= int(b)]
        out[n] = max(holds, key=lambda h: (h[0], h[1]))[2] if holds else None
    return out


def jpeg_header(width, height):
    "A JPEG that claims a size it does not have"
    data = bytearray(jpeg_bytes(np.zeros((16, 16), np.uint8)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def cmyk():
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


SOUND = jpeg_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
FRAMES = {  # file of frame 7 -> kind of damage
    **{f"cut to {n}": (SOUND[:n], "truncated") for n in (2, 20, 100, 200, len(SOUND) - 2)},
    "zero bytes": (b"", "empty_file"),
    "random bytes": (bytes(range(256)) * 4, "not_jpeg"),
    "web page": (b"<html>", "not_jpeg"),
    "PNG called jpeg": (b"\x89PNG\r\n\x1a\n" + bytes(99), "not_jpeg"),
    "one byte": (b"\xff", "not_jpeg"),
    "CMYK": (cmyk(), "unreadable"),
    "60,000 x 60,000": (jpeg_header(60000, 60000), "unreadable"),
    "20,000 x 20,000": (jpeg_header(20000, 20000), "unreadable"),
    "marks only": (b"\xff\xd8\xff\xd9", "unreadable"),
}
NAMES = {  # file added -> frame counted
    "p_RUN.jpeg": None,
    "p_RUNx9.jpeg": None,
    "p_9.jpeg": None,
    "p_RUN21.png": None,
    "p_RUN0.jpeg": None,
    "p_RUN40000.jpeg": None,
    "p_RUN-21.jpeg": None,
    "p_RUN07.jpeg": None,
    "p_RUN021.jpeg": 21,
    "p_RUN21.JPG": 21,
}
TABLES = {  # annotation -> kind of problem, or None for a sound one
    "overlap": ("t2,1,10\nt3,8,20\n", "interval"),
    "nested": ("t2,1,20\nt3,8,12\n", "interval"),
    "gap": ("t2,1,8\nt3,11,20\n", "interval"),
    "repeated": ("t2,1,8\nt3,9,12\nt2,13,20\n", "interval"),
    "order": ("tB,1,8\nt3,9,20\n", "interval"),
    "beyond": ("t2,1,8\nt3,9,120\n", "beyond"),
    "one frame each": ("tPNf,5,9\nt2,10,14\nt3,15,15\nt4,16,20\n", "unlabelled"),
    "unsorted": ("t3,11,20\nt2,1,10\n", None),
    "BOM and CRLF": ("\ufefft2,1,10\r\nt3,11,20\r\n", None),
    "blank lines": ("\n\nt2,1,10\n \nt3,11,20\n\n", None),
    "reversed": ("t2,10,1\nt3,11,20\n", "bad_annotation"),
    "unknown phase": ("t2,1,10\nt17,11,20\n", "bad_annotation"),
    "lower case": ("tpb2,1,10\n", "bad_annotation"),
    "not a number": ("t2,1,ten\n", "bad_annotation"),
    "two fields": ("t2,1\n", "bad_annotation"),
    "header": ("phase,first,last\nt2,1,10\n", "bad_annotation"),
}


def one_video(root):
    folder = root / STEM / "AA83-7"
    folder.mkdir(parents=True)
    for n in range(1, 21):
        (folder / f"p_RUN{n}.jpeg").write_bytes(SOUND)
    (root / "embryo_dataset_annotations").mkdir()
    (root / "embryo_dataset_annotations" / "AA83-7_phases.csv").write_text("t2,1,10\nt3,11,20\n")
    return folder


def counts_of(index):
    "Frames of every phase, through the data set that a training reads"
    try:
        frames = EmbryoFrames(index, ["AA83-7"], ["F+00"])
    except DataError:
        return {}
    found = [index.phase[frames._key(i)[3]] for i in range(len(frames))]
    return {str(p): found.count(p) for p in sorted(set(found))}


def test_row_38_damaged_frames_and_tables(instances, tmp_path):
    "Everything odd is listed with its video; the frames of every phase are those that a loop over frames counts"
    from medvol_nb.embryo.phases import Phase

    for k, (name, (data, kind)) in enumerate(FRAMES.items()):
        folder = one_video(tmp_path / f"f{k}")
        (folder / "p_RUN7.jpeg").write_bytes(data)
        with instances(name):
            index = build_index(tmp_path / f"f{k}", cache=False)
            (found,) = check_frames(index, decode=True)
            assert (found.video, found.kind) == ("AA83-7", kind) and "first 7" in found.text, found
            with pytest.raises(FormatError):
                EmbryoFrames(index, planes=["F+00"])[6]
            assert EmbryoFrames(index, planes=["F+00"])[7].frame_number == 8
    for k, (name, frame) in enumerate(NAMES.items()):
        folder = one_video(tmp_path / f"n{k}")
        (folder / name).write_bytes(SOUND)
        with instances(name):
            index = build_index(tmp_path / f"n{k}", cache=False)
            told = [p for p in index.problems if p.video == "AA83-7" and name in p.text]
            assert told and len(index) == 20 + (frame is not None), index.problems
            if frame:
                assert index.path(FocalPlane.F0, "AA83-7", frame).name == name
    for k, (name, (text, kind)) in enumerate(TABLES.items()):
        one_video(tmp_path / f"t{k}")
        (tmp_path / f"t{k}" / "embryo_dataset_annotations" / "AA83-7_phases.csv").write_bytes(text.encode())
        with instances(name):
            index = build_index(tmp_path / f"t{k}", cache=False)
            kinds = {p.kind for p in index.problems if p.video == "AA83-7"}
            assert kind in kinds if kind else not kinds, index.problems
            plain = text.removeprefix("\ufeff").replace("\r", "").replace(" ", "")
            labels = oracle(plain, range(1, 21)) if kind != "bad_annotation" else {}
            wanted = {str(p.idx()): n for p in Phase if (n := list(labels.values()).count(p.value))}
            if counts_of(index) != wanted:
                raise SilentlyWrong(f"frames {counts_of(index)}, a loop counts {wanted}")
    instances.check(len(FRAMES) + len(NAMES) + len(TABLES))
    assert len(FRAMES) + len(NAMES) + len(TABLES) == 40


def test_errors_of_archives_are_one_family():
    assert issubclass(UnsafeMember, ExtractionError) and issubclass(ExtractionError, ValueError)
