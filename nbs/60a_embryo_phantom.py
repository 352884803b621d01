# %% [markdown]
# # Embryo phantoms
#
# > The data set in miniature, generated: pictures, tables and archives, sound or with the damage of the real one.
#
# The real data set has 2.4 million pictures, a licence that forbids to ship it, and damage that code must survive: 52
# videos of truncated pictures, folders that are there twice, tables on another clock. `make_phantom_dataset` writes the
# same tree with drawn embryos of a few pixels, and puts damage where it is asked to. `make_phantom_archives` packs it
# like the downloads, and can also pack what an attacker would.

# %%
#| default_exp embryo.phantom

# %%
#| export
import gzip
import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from medvol_nb.core import DataError, OnExists, atomic, check_output, rng_for
from medvol_nb.embryo.phases import (ANNOTATIONS, GRADES, TIMES, FocalPlane, Interval, Phase, archive_names,
                                     parse_planes, read_phases)
from medvol_nb.phantoms import embryo_frame

# %%
from medvol_nb.core import raises, tmpdir
from medvol_nb.plot import montage

# %% [markdown]
# ## One picture
# Phase, plane and embryo go in, a picture comes out; `phantoms.embryo_frame` draws it. Focus matters, and siblings do
# not look alike: both were measured to be needed, or tests of classifiers and of memorisation mean nothing.

# %%
#| export
def phantom(
    phase: Phase, # what is shown
    plane: FocalPlane = FocalPlane.F0, # where it is focused
    size: int = 64, # width and height [pixel]
    *,
    seed: int = 0, # which embryo
    frame: int = 0, # which picture of it: other camera noise
) -> np.ndarray: # (row, column) uint8
    "Picture of a drawn embryo"
    return embryo_frame(phase.idx(), size, seed, plane.offset, frame=frame)

def jpeg_bytes(
    img: np.ndarray, # (row, column) or (row, column, 3) uint8
    quality: int = 95, # of the compression
) -> bytes: # a whole JPEG file
    "Compress a picture"
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(img).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()

# %%
montage([phantom(p, f) for p in (Phase.tPNa, Phase.t4, Phase.tB) for f in FocalPlane], 7,
        [f"{p.value} {f.pretty}" for p in (Phase.tPNa, Phase.t4, Phase.tB) for f in FocalPlane])

# %%
assert np.array_equal(phantom(Phase.t4), phantom(Phase.t4)) and jpeg_bytes(phantom(Phase.t4)).endswith(b"\xff\xd9")

# %% [markdown]
# ## The tree
# Couples have one to three children, some names carry a cycle, some an underscore. A video goes through the phases in
# order and leaves out a few. `defects` names what is wrong; the first one befalls the first video, and so on.

# %%
#| export
DEFECTS = ("truncated", "f0", "missing_frames", "no_annotation", "empty_annotation", "repeated", "overlap", "beyond",
           "grid", "stray")
_NAMES = ("AA83-7", "AA83-9", "BM016-5", "UL050-_9", "UL050-_10", "PMDPI029-1-10", "RV146N2-6", "MRA165-7T")

def phantom_videos(
    n: int, # how many
) -> list[str]: # names; couples of three after the first eight
    "Names of generated videos"
    return [*_NAMES, *(f"ZZ{100 + k//3}-{k % 3 + 1}" for k in range(n))][:n]

def _intervals(frames: int, rng: np.random.Generator) -> list[Interval]:
    "Phases in order over frames 2 to the last, some left out, some one frame long"
    keep = np.sort(rng.permutation(16)[:int(rng.integers(9, 15))])[:max(1, frames - 2)]
    ends = [*np.sort(rng.permutation(np.arange(2, frames))[:len(keep) - 1]).tolist(), frames]
    return [Interval(Phase.from_idx(int(p)), a + 1, b) for p, a, b in zip(keep, [1, *ends], ends)]

def _tables(frames: int, defects: Sequence[str], rng: np.random.Generator) -> tuple[list[Interval], np.ndarray]:
    rows, hours = _intervals(frames, rng), 16 + np.cumsum(rng.uniform(0.21, 0.34, frames))
    if "repeated" in defects: rows = [*rows[:-1], Interval(rows[0].phase, rows[-1].first, rows[-1].last)]
    if "overlap" in defects: rows[0] = rows[0]._replace(last=rows[1].first + 1)
    if "beyond" in defects: rows[-1] = rows[-1]._replace(last=frames + 120)
    if "grid" in defects: hours = 16 + 0.2*np.arange(frames)
    return rows, hours

@lru_cache(256)
def _picture(phase: int, offset: int, size: int, seed: int, frame: int) -> bytes:
    return jpeg_bytes(embryo_frame(phase, size, seed, offset, frame=frame))

def _video(name: str, k: int, frames: int, planes: Sequence[FocalPlane], size: int, seed: int, defects: Sequence[str]
           ) -> Iterator[tuple[str, bytes]]:
    "Names and contents of the files of one video"
    rows, hours = _tables(frames, defects, rng_for(seed, "embryo tables", name))
    for plane in planes:
        for n in range(1, frames + 1):
            if "missing_frames" in defects and plane is not FocalPlane.F0 and n % 5 == 0: continue
            phase = next((r.phase for r in reversed(rows) if r.first <= n <= r.last), rows[0].phase)
            data = _picture(phase.idx(), plane.offset, size, seed*1000 + k, n)
            if "truncated" in defects and plane is FocalPlane.F0: data = data[:(data.index(b"\xff\xda") + len(data))//2]
            file = f"D2013.01.{k % 28 + 1:02}_S{k:04}_I132_WELL{k % 12}_RUN{n}.jpeg"
            yield f"{plane.folder}/{name}/{file}", data
            if "f0" in defects and plane is FocalPlane.F0: yield f"{plane.folder}/{name}/F0/{file}", data
    if "stray" in defects: yield f"{planes[0].folder}/{name}/Thumbs.db", b"stray"
    text = "" if "empty_annotation" in defects else "".join(f"{r.phase.value},{r.first},{r.last}\n" for r in rows)
    if "no_annotation" not in defects: yield f"{ANNOTATIONS}/{name}_phases.csv", text.encode()
    lines = [f"{n},{t:.6f}\n" for n, t in enumerate([hours[0] - 0.3, *hours])]
    yield f"{TIMES}/{name}_timeElapsed.csv", ("frame_index,time\n" + "".join(lines)).encode()

def make_phantom_dataset(
    root: str | os.PathLike, # folder to make
    videos: int = 6, # how many
    frames: int = 40, # of each
    planes: Sequence[str | FocalPlane] = "all", # focal planes
    size: int = 96, # of a picture [pixel]
    *,
    seed: int = 0, # of pictures and tables
    defects: Sequence[str] = (), # what is wrong: names from `DEFECTS`, the k-th befalls the k-th video
    on_exists: OnExists = "error", # what to do when `root` is there already
) -> dict[str, list[str]]: # video -> its defects
    "Write the extracted data set in miniature"
    if wrong := sorted(set(defects) - set(DEFECTS)): raise DataError(f"defects: {wrong} are not among {DEFECTS}")
    if videos < 1 or frames < 4: raise DataError(f"phantom: 1 video of 4 frames at least, got {videos} of {frames}")
    chosen, names = parse_planes(planes), phantom_videos(videos)
    suffers = {name: [d for j, d in enumerate(defects) if j % videos == k] for k, name in enumerate(names)}
    if not check_output(root, on_exists): return suffers
    rng = rng_for(seed, "embryo grades")
    grades = [f"{n},{'ABC'[rng.integers(3)]},{'ABC'[rng.integers(3)]}" if rng.random() < 0.4 else f"{n},NA,NA"
              for n in names]
    with atomic(root, on_exists, folder=True, sync=False) as t:
        (t/GRADES).write_text("\n".join(["video_name,TE,ICM", *grades]) + "\n")
        for k, name in enumerate(names):
            for file, data in _video(name, k, frames, chosen, size, seed, suffers[name]):
                (t/file).parent.mkdir(parents=True, exist_ok=True)
                (t/file).write_bytes(data)
        for folder in (ANNOTATIONS, TIMES): (t/folder).mkdir(exist_ok=True)
    return suffers

# %%
with tmpdir() as d:
    told = make_phantom_dataset(d/"small", 3, 12, ["F+00", "F15"], 32, defects=["f0", "overlap"])
    entries = sorted(p.name for p in (d/"small").iterdir())
    rows = read_phases(d/"small"/ANNOTATIONS/"AA83-7_phases.csv")
    pictures = len(list((d/"small").rglob("*.jpeg")))
entries, told, rows[:3]

# %%
assert entries == ["embryo_dataset", "embryo_dataset_F15", ANNOTATIONS, GRADES, TIMES] and pictures == 3*12*2 + 12
assert rows[0].first == 2 and rows[-1].last == 12
with raises(DataError, match="are not among"): make_phantom_dataset("x", defects=["fire"])

# %% [markdown]
# ## Archives, and what an attacker would pack
# `make_phantom_archives` makes the ten downloads of a tree. `fault` spoils one of them: a member that would be written
# outside, a link, a device, the same name twice, a name no file system takes; or the file itself, flipped, cut, empty,
# or the page of an error in place of the download.

# %%
#| export
def pack(
    files: Mapping[str, bytes], # name inside the archive -> content
    extra: Sequence[tuple[tarfile.TarInfo, bytes]] = (), # members put after them as they are
    format: int = tarfile.GNU_FORMAT, # of the headers
    level: int = 1, # of the compression
) -> bytes: # .tar.gz, the same bytes for the same files
    "Pack files the way the downloads are packed"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        folders: set[str] = set()
        for name, data in files.items():
            for folder in reversed([str(p) for p in Path(name).parents if str(p) != "."]):
                if folder in folders: continue
                folders.add(folder)
                info = tarfile.TarInfo(folder + "/")
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info, data in extra: tar.addfile(info, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), level, mtime=0)

_PLAIN, _LINK, _HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE

def bad_members(
    stem: str, # name of the archive's top folder
    outside: str = "/tmp/medvol-outside", # absolute name that an attacker would write to
) -> dict[str, list[tuple[tarfile.TarInfo, bytes]]]: # what is wrong -> members
    "Members that must not be extracted"
    def one(name: str, kind: bytes = _PLAIN, link: str = "", data: bytes = b"evil", **more) -> tuple:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, len(data) if kind == _PLAIN else 0
        for k, v in more.items(): setattr(info, k, v)
        return info, data if kind == _PLAIN else b""
    v = f"{stem}/evil"
    return {
        "parent": [one("../evil.jpeg")], "parent inside": [one(f"{v}/../../../evil.jpeg")],
        "parent of a folder": [one(f"{stem}/..", tarfile.DIRTYPE)], "absolute": [one(f"{outside}/evil.jpeg")],
        "symlink out": [one(f"{v}/l.jpeg", _LINK, "/etc/passwd")],
        "symlink inside": [one(f"{v}/l.jpeg", _LINK, "x.jpeg")],
        "symlinked folder": [one(v, _LINK, ".."), one(f"{v}/evil.jpeg")],
        "hard link out": [one(f"{v}/l.jpeg", _HARD, "/etc/passwd")],
        "hard link inside": [one(f"{v}/a.jpeg"), one(f"{v}/b.jpeg", _HARD, f"{v}/a.jpeg")],
        "fifo": [one(f"{v}/p.jpeg", tarfile.FIFOTYPE)],
        "character device": [one(f"{v}/c.jpeg", tarfile.CHRTYPE, devmajor=1, devminor=3)],
        "block device": [one(f"{v}/b.jpeg", tarfile.BLKTYPE, devmajor=7)],
        "contiguous": [one(f"{v}/k.jpeg", tarfile.CONTTYPE)], "sparse": [one(f"{v}/s.jpeg", tarfile.GNUTYPE_SPARSE)],
        "unknown kind": [one(f"{v}/u.jpeg", b"Z")], "duplicate": [one(f"{v}/a.jpeg"), one(f"{v}/a.jpeg")],
        "duplicate with dot": [one(f"{v}/a.jpeg"), one(f"./{v}/a.jpeg")],
        "file then folder": [one(v), one(f"{v}/a.jpeg")], "backslash": [one(f"{v}/..\\..\\evil.jpeg")],
        "control character": [one(f"{v}/a\n.jpeg")], "escape": [one(f"{v}/\x1b[2J.jpeg")],
        "long name": [one(f"{v}/{'n'*300}.jpeg")], "other top folder": [one("elsewhere/evil/a.jpeg")],
        "too deep": [one(f"{v}/F0/deeper/a.jpeg")], "other folder": [one(f"{v}/F15/a.jpeg")],
        "empty part": [one(f"{stem}//a.jpeg")], "dot part": [one(f"{v}/./a.jpeg")], "no name": [one("")],
        "oversize": [one(f"{v}/a.jpeg", data=bytes(17*2**20))],
        "not UTF-8": [one(f"{v}/\udcff.jpeg")],
    }

def make_phantom_archives(
    tree: str | os.PathLike, # made by `make_phantom_dataset`
    out: str | os.PathLike, # folder to make
    *,
    fault: str = "", # what is wrong: a name of `bad_members`, or flipped, trailer, truncated, html, empty, missing, zip
    archive: str = "embryo_dataset.tar.gz", # the download that suffers
    on_exists: OnExists = "error", # what to do when `out` is there already
) -> Path: # `out`
    "Pack the ten downloads of a tree, sound or with one fault"
    tree, out, stem = Path(tree), Path(out), archive.removesuffix(".tar.gz")
    bad = bad_members(stem)
    if fault and fault not in (*bad, "flipped", "trailer", "truncated", "html", "empty", "missing", "zip"):
        raise DataError(f"fault: {fault!r} is not known")
    if not check_output(out, on_exists): return out
    with atomic(out, on_exists, folder=True, sync=False) as t:
        for name in archive_names():
            top = tree/name.removesuffix(".tar.gz")
            if not name.endswith(".tar.gz"): data = top.read_bytes()
            else:
                files = sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else []
                data = pack({p.relative_to(tree).as_posix(): p.read_bytes() for p in files},
                            bad.get(fault, ()) if name == archive else ())
            if name == archive: data = _spoiled(data, fault)
            if data is not None: (t/name).write_bytes(data)
    return out

def _spoiled(data: bytes, fault: str) -> bytes | None:
    half = len(data)//2
    return {"flipped": data[:half] + bytes([data[half] ^ 1]) + data[half + 1:],
            "trailer": data[:-8] + bytes([data[-8] ^ 1]) + data[-7:], "truncated": data[:half],
            "html": b"<!DOCTYPE html><title>404 Not Found</title>", "empty": b"", "missing": None,
            "zip": b"PK\x03\x04" + data}.get(fault, data)

# %%
with tmpdir() as d:
    make_phantom_dataset(d/"tree", 2, 6, size=24)
    sizes = {p.name: p.stat().st_size for p in sorted(make_phantom_archives(d/"tree", d/"archives").iterdir())}
    make_phantom_archives(d/"tree", d/"bad", fault="symlink out")
    with tarfile.open(d/"bad"/"embryo_dataset.tar.gz") as tar: last = tar.getmembers()[-1]
    again = {p.name: p.stat().st_size for p in sorted(make_phantom_archives(d/"tree", d/"again").iterdir())}
    with raises(DataError, match="is not known"): make_phantom_archives(d/"tree", d/"x", fault="fire")
sizes, (last.name, last.linkname)

# %%
assert sorted(sizes) == sorted(archive_names()) and sizes == again
assert last.issym() and last.linkname == "/etc/passwd" and len(bad_members("embryo_dataset")) == 30
