"""Rows that the shared mechanisms decide: paths, JSON, NIfTI, checkpoints, maps, settings, disks, a state machine."""
import gzip
import json
import os
import random
import re
import shutil
import stat
import struct
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import Field

from medvol_nb.checkpoints import latest_checkpoint
from medvol_nb.config import Config, ConfigPath, load_config
from medvol_nb.core import ConfigError, DataError, FormatError, MedvolError, inside, read_json, rng_for
from medvol_nb.parallel import Ledger, pmap
from medvol_nb.volume import read_nifti, read_volume, write_nifti

from . import jobs
from .injectors import NOBODY, Canary, bit_flips, run_python, run_script, truncations
from .rows import SilentlyWrong, sampled

JOBS = "tests.faults.jobs"


# ---------------------------------------------------------------- 1, 2: lists from elsewhere

def test_row_01_paths_leave_the_root(instances, tmp_path):
    "Absolute names only with the flag, everything else that leads outside never"
    root = tmp_path/"data"
    root.mkdir()
    (tmp_path/"secret.nii").write_text("x")
    (root/"out").symlink_to(tmp_path)
    (root/"case.nii.gz").symlink_to(tmp_path/"secret.nii")
    bad = ["../secret.nii", "a/../../secret.nii", "/etc/passwd", "~/.ssh/id_rsa", "~root/x", "a\0b.nii", "http://h/x",
           "s3://bucket/x", "file:///etc/passwd", "C:/x", "C:\\x", "a\\..\\..\\b", "out/secret.nii", "case.nii.gz"]
    for name in bad:
        with instances.refuses(repr(name), DataError, "^path ", re.escape(repr(name))): inside(root, name)
    for name in set(bad) - {"/etc/passwd"}:
        with pytest.raises(DataError): inside(root, name, absolute=True)
    assert inside(root, "/etc/passwd", absolute=True) == Path("/etc/passwd")
    for name in ("imagesTr/a b.nii.gz", ".hidden/x", "a..b", "ö/ü.nii", "it's", "a;touch x"):
        assert inside(root, name) == root/name
    instances.check(14)


def test_row_02_malformed_json(instances, tmp_path):
    "Refused with the place, in bounded time and memory; a byte order mark alone changes nothing"
    items = [{"image": f"imagesTr/case_{k:03d}.nii.gz", "fold": k % 5, "weight": k/7} for k in range(50)]
    good = json.dumps({"name": "Prüfung", "training": items}, indent=1, ensure_ascii=False).encode()
    file = tmp_path/"list.json"
    for length, bad in truncations(good, 20):
        file.write_bytes(bad)
        with instances.refuses(f"cut at {length}", FormatError, "list.json", "line|not UTF-8"): read_json(file)
    with instances("byte order mark"):
        file.write_bytes(b"\xef\xbb\xbf" + good)
        if read_json(file) != json.loads(good): raise SilentlyWrong("content differs")
    wrong = {"UTF-16": good.decode().encode("utf-16"), "Latin-1": good.decode().encode("latin-1"),
             "duplicate key": good.replace(b'"fold": 3', b'"fold": 3, "fold": 4', 1), "NaN": b'{"a": [1, NaN]}',
             "-Infinity": b'{"a": -Infinity}', "overflow": b'{"a": 1e999}', "deep list": b"["*100_000 + b"]"*100_000,
             "deep object": b'{"a":'*100_000 + b"1" + b"}"*100_000}
    for name, bad in wrong.items():
        file.write_bytes(bad)
        start = time.perf_counter()
        with instances.refuses(name, FormatError, "list.json"): read_json(file)
        assert time.perf_counter() - start < 2
    with open(file, "wb") as f:
        f.write(b"[1")
        f.truncate(200 << 20)
    with instances.refuses("200 MB list", FormatError, "200.0 MiB", "max_bytes"): read_json(file, max_bytes=64 << 20)
    instances.check(30)


# ---------------------------------------------------------------- 8 to 12: NIfTI

def nifti_bytes(folder: Path, suffix: str = ".nii.gz", dtype=np.int16, shape=(11, 9, 7)) -> tuple[bytes, np.ndarray]:
    from medvol_nb.volume import Volume, affine_from
    data = (rng_for(3, "smooth").normal(size=shape).cumsum(0)*40).astype(dtype)
    path = write_nifti(Volume(data, affine_from((1, 2, 3), (4, 5, 6))), folder/f"good{suffix}")
    return path.read_bytes(), data


def patched(raw: bytes, *changes: tuple) -> bytes:
    "Header fields replaced: (format, offset, values...)"
    out = bytearray(raw)
    for fmt, at, *values in changes: struct.pack_into(f"<{fmt}", out, at, *values)
    return bytes(out)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_row_08_bit_flips(dtype, instances, tmp_path):
    "50 flips for each of four number types; the few harmless ones hit bytes that say nothing"
    good, data = nifti_bytes(tmp_path, dtype=dtype)
    affine, harmless = read_nifti(tmp_path/"good.nii.gz").affine, 0
    for at, bad in bit_flips(good, 50, seed=8):
        (tmp_path/"bad.nii.gz").write_bytes(bad)
        with instances(f"bit {at}"):
            try: vol = read_nifti(tmp_path/"bad.nii.gz")
            except (FormatError, DataError): continue
            if not np.array_equal(vol.data, data): raise SilentlyWrong("voxels differ")
            if not np.array_equal(vol.affine, affine): raise SilentlyWrong("affine differs")
            harmless += 1
    instances.check(50)
    assert harmless <= 5


def test_row_09_truncation(instances, tmp_path):
    "30 lengths of a .nii.gz and 30 of a .nii, with nothing, half a header, header only, and all but one byte"
    for suffix in (".nii.gz", ".nii"):
        good, _ = nifti_bytes(tmp_path, suffix)
        cuts = dict(truncations(good, 30 if suffix == ".nii.gz" else 27))
        if suffix == ".nii": cuts |= {n: good[:n] for n in (100, 348, 352)}
        for length, bad in cuts.items():
            path = tmp_path/f"cut{suffix}"
            path.write_bytes(bad)
            with instances.refuses(f"{suffix} of {length} bytes", FormatError, "cut.nii"): read_nifti(path)
    instances.check(60)


MEMORY = """
import json, re, sys
from pathlib import Path
from medvol_nb.core import DataError, FormatError
from medvol_nb.nifti import read_nifti
out = {}
for p in sorted(Path(sys.argv[1]).iterdir()):
    try: out[p.name] = "SILENT " + repr(read_nifti(p, max_bytes=2**28).data.shape)
    except (DataError, FormatError) as e: out[p.name] = f"{type(e).__name__}: {e}"
    except BaseException as e: out[p.name] = f"CRASH {type(e).__name__}: {e}"
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])/1024
print(json.dumps([out, peak])) # not ru_maxrss, which a child inherits from the process that started it
"""


def test_row_10_header_and_gzip_bombs(instances, tmp_path):
    "Refused before memory is taken: the peak of a process that opens all of them stays below 300 MiB"
    folder = tmp_path/"bombs"
    folder.mkdir()
    raw, _ = nifti_bytes(tmp_path, ".nii")
    head, zeros = raw[:352], bytes(1 << 20)
    huge = patched(raw, ("8h", 40, 3, 32767, 32767, 32767, 1, 1, 1, 1))
    def packed(*parts): # as other writers do, in one member
        with gzip.GzipFile(folder/"tmp", "wb", 1, mtime=0) as g:
            for p in parts: g.write(p)
        return (folder/"tmp").read_bytes()
    bombs = {
        "dims.nii": huge, "dims.nii.gz": gzip.compress(huge),
        "seven.nii.gz": gzip.compress(patched(raw, ("8h", 40, 7, *[3000]*7))),
        "negative.nii": patched(raw, ("h", 42, -11)), "none.nii": patched(raw, ("h", 44, 0)),
        "rank.nii": patched(raw, ("h", 40, 9)), "offset.nii": patched(raw, ("f", 108, 1e9)),
        "offset_far.nii.gz": gzip.compress(patched(raw, ("f", 108, 1e38))), "bitpix.nii": patched(raw, ("h", 72, 64)),
        "thousand.nii.gz": packed(raw, *[zeros]*500), "members.nii.gz": gzip.compress(raw) + gzip.compress(zeros)*500,
        "honest.nii.gz": packed(patched(head, ("8h", 40, 3, 1024, 1024, 300, 1, 1, 1, 1)), *[zeros]*600)}
    (folder/"tmp").unlink()
    for name, content in bombs.items(): (folder/name).write_bytes(content)
    assert (folder/"thousand.nii.gz").stat().st_size < 3e6
    answer = run_python(MEMORY, folder)
    assert answer.returncode == 0, answer.stderr
    told, peak = json.loads(answer.stdout)
    for name in bombs:
        with instances(name):
            if told[name].startswith("SILENT"): raise SilentlyWrong(told[name])
            assert told[name].startswith(("FormatError", "DataError")) and name in told[name], told[name]
            assert peak < 300, f"peak {peak:.0f} MiB"
    instances.check(12)


def test_row_11_odd_headers(instances, tmp_path):
    "Refused, or the same voxels at the same place as nibabel reads them: never a silently swapped axis"
    rng = rng_for(11, "data")
    data = rng.integers(-50, 50, (4, 5, 6)).astype(np.int16)
    oblique = np.array([[0, -2, 0, 1], [1.5, 0, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1.0]])
    def image(array=data, affine=oblique, q=1, s=1, **fields):
        img = nib.Nifti1Image(array, affine, dtype=array.dtype)
        img.set_qform(affine, q, strip_shears=True)
        img.set_sform(affine, s)
        for k, v in fields.items(): img.header[k] = v
        return img
    sheared, left = oblique.copy(), oblique.copy()
    sheared[0, 2], left[:, 0] = 0.7, -left[:, 0]
    conflict = image()
    conflict.set_sform(np.diag([2, 2, 2, 1.0]), 2)
    rgb = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    big = nib.Nifti1Image(data, oblique, nib.Nifti1Header(endianness=">"))
    refused = {"zero affine": (image(), ("12f", 280, *[0]*12)), "NaN affine": (image(), ("f", 284, np.nan)),
               "RGB": (image(rgb), None), "complex": (image(data.astype(np.complex64)), None),
               "slope without inter": (image(), ("2f", 112, 2.0, np.nan))}
    accepted = {"sheared": (image(affine=sheared), None), "left-handed": (image(affine=left), None),
                "q-form against s-form": (conflict, None), "slope 0": (image(), ("2f", 112, 0.0, 5.0)),
                "slope NaN": (image(), ("2f", 112, np.nan, np.nan)), "slope": (image(), ("2f", 112, 0.5, -3.0)),
                "int64": (image(data.astype(np.int64)), None), "one volume": (image(data[..., None]), None),
                "channels": (image(rng.integers(0, 9, (4, 5, 6, 3)).astype(np.int16)), None), "big-endian": (big, None),
                "q-form alone": (image(q=1, s=0), None)}
    for name, (img, change) in {**refused, **accepted}.items():
        path = tmp_path/"odd.nii"
        nib.save(img, path)
        if change: path.write_bytes(patched(path.read_bytes(), change))
        if name in refused:
            with instances.refuses(name, (FormatError, DataError), "odd.nii"): read_nifti(path)
            continue
        with instances(name):
            vol, peer = read_nifti(path), nib.load(path)
            want = np.asarray(peer.dataobj)
            if want.ndim == 4: want = np.moveaxis(want, -1, 0) if want.shape[-1] > 1 else want[..., 0]
            if vol.data.shape != want.shape or not np.allclose(vol.data, want, atol=1e-5): raise SilentlyWrong("voxels")
            if not np.allclose(vol.affine, peer.affine, atol=1e-5): raise SilentlyWrong(f"affine {vol.affine.tolist()}")
    instances.check(16)


HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>The file has moved</body></html>\n"*9


def test_row_12_random_bytes(instances, tmp_path):
    "500 files of noise, of valid headers with noise in them, and of those compressed"
    raw, _ = nifti_bytes(tmp_path, ".nii")
    noisy = st.builds(lambda at, junk, tail: raw[:at] + junk + raw[at + len(junk):at + len(junk) + tail],
                      st.integers(0, 347), st.binary(min_size=1, max_size=40), st.integers(0, 3000))
    packed = st.one_of(st.binary(max_size=600), noisy).map(lambda b: gzip.compress(b, 1))
    contents = st.one_of(st.binary(max_size=600), noisy, packed, st.binary(max_size=200).map(lambda b: raw[:352] + b),
                         st.binary(max_size=300).map(lambda b: b"\x1f\x8b\x08" + b))

    def attempt(content: bytes, suffix: str) -> None:
        path = tmp_path/f"x{suffix}"
        path.write_bytes(content)
        try: vol = read_volume(path)
        except MedvolError as e:
            assert path.name in str(e)
            return
        plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        if plain[344:347] != b"n+1" or struct.unpack_from("<h", plain, 42)[0] not in (vol.shape[0], vol.shape[0] << 8):
            raise SilentlyWrong(f"an image came out of {content[:20]!r}")

    @settings(max_examples=497, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(contents, st.sampled_from([".nii", ".nii.gz", ".nii.zst"]))
    def noise(content, suffix):
        if instances.data["total"] >= 497: return
        with instances(f"{suffix} {content[:16].hex()}"): attempt(content, suffix)

    noise()
    while instances.data["total"] < 497: # hypothesis stops early where it has seen all
        with instances("more noise"): attempt(rng_for(12, instances.data["total"]).bytes(500), ".nii.gz")
    for suffix in (".nii.gz", ".nii"):
        with instances.refuses(f"HTML page as {suffix}", FormatError, f"x{suffix}"):
            (tmp_path/f"x{suffix}").write_bytes(HTML)
            read_nifti(tmp_path/f"x{suffix}")
    (tmp_path/"folder.nii.gz").mkdir()
    with instances.refuses("folder", FormatError, "is a folder"): read_nifti(tmp_path/"folder.nii.gz")
    instances.check(500)


# ---------------------------------------------------------------- 18: checkpoints

@sampled(30, quick=6)
def test_row_18_checkpoint_kill(count, instances, tmp_path, zygote):
    "Kill -9 while checkpoints are saved, at random times and before every kind of step: the newest whole one loads"
    rng = random.Random(18)
    for k in range(count):
        folder = tmp_path/f"run{k}"
        folder.mkdir()
        with instances(f"kill {k}"):
            if k % 2: end = zygote(f"{JOBS}:save_forever", folder, folder=folder, kill_at=20 + rng.randrange(40))
            else: end = zygote(f"{JOBS}:save_forever", folder, kill_after=0.03 + rng.random()*0.1)
            assert end.killed, end
            for path in folder.glob("step-*"):
                if latest_checkpoint(folder) is None: raise SilentlyWrong(f"{path.name} is there but none loads")
            found = latest_checkpoint(folder)
            if found is None: continue # died before the first was complete
            step, weights = found[1]["step"], found[1]["w"]
            if int(found[0].stem[5:]) != step or not bool((weights == step).all()): raise SilentlyWrong(f"step {step}")
            whole = [p for p in folder.glob("step-*")]
            assert found[0] == max(whole), "the newest under a final name must be whole"
    instances.check(count)


def test_row_18_training_resumes(instances, tmp_path, zygote):
    "A training that is killed again and again has the loss trace of one that was not"
    (tmp_path/"straight").mkdir()
    straight = zygote(f"{JOBS}:train", tmp_path/"straight", folder=tmp_path/"straight")
    assert len(straight.value) == 12 and straight.value[-1] < straight.value[0]
    rng = random.Random(180)
    for k in range(5):
        folder, kills = tmp_path/f"run{k}", 0
        folder.mkdir()
        with instances(f"run {k}"):
            while True:
                end = zygote(f"{JOBS}:train", folder, folder=folder, kill_at=rng.randrange(20, straight.steps))
                if not end.killed: break
                kills += 1
                assert kills < 50
            if end.value != straight.value: raise SilentlyWrong("loss trace differs")
            assert kills, "it was never killed"
            assert jobs.content(max(folder.glob("step-*"))) == jobs.content(max((tmp_path/"straight").glob("step-*")))
    instances.check(5)


# ---------------------------------------------------------------- 26, 28: many items

@sampled(12, quick=4)
def test_row_26_lost_workers(count, instances, tmp_path):
    "The case is tried again alone, then set aside; one that dies twice is saved; the others are as without fault"
    kinds = [("SIGKILL", 9, 0), ("hang", 9, 3), ("SIGKILL", 1, 5), ("exit", 2, 2), ("exit", 9, 5), ("SIGSEGV", 9, 1),
             ("hang", 1, 0), ("abort", 9, 3), ("exit", 1, 4), ("hang", 9, 5), ("SIGSEGV", 2, 3), ("SIGKILL", 9, 4)]
    expected = [jobs.draw(k) for k in range(6)]
    for how, deaths, where in kinds[:count]:
        marks = tmp_path/f"{how}-{deaths}-{where}"
        marks.mkdir()
        work = partial(jobs.fragile, how=how, deaths=deaths, where=where, marks=str(marks))
        with instances(f"{how} at case {where}, {deaths} times"):
            values, failures = pmap(work, range(6), workers=2, errors="collect", timeout=1.0 if how == "hang" else None)
            if deaths < 3:
                assert not failures, failures
                if values != expected: raise SilentlyWrong("values differ")
                continue
            assert [(f.index, f.kind) for f in failures] == [(where, "timeout" if how == "hang" else "killed")]
            tries = len(list(marks.iterdir()))
            assert tries == 2 if how == "hang" else 3 <= tries <= 4, tries # in company, then alone: first try + 2
            if values != [None if k == where else v for k, v in enumerate(expected)]: raise SilentlyWrong("others")
    instances.check(count)


MACHINE = """
import json, multiprocessing, sys
from tests.faults.jobs import map_cases
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    child = context.Process(target=map_cases, args=(queue,))
    child.start()
    print(json.dumps(queue.get(timeout=40)))
    child.join(20)
    sys.exit(child.exitcode)
"""


def test_row_28_workers_do_not_matter(instances, tmp_path):
    "1, 2, 3, 7 processes, below a spawned and a forked process, in other order, in two ranges: the same bytes"
    work = jobs.case_28
    expected = json.dumps([work(k) for k in range(12)])
    def same(got: object) -> None:
        if json.dumps(got) != expected: raise SilentlyWrong(f"{json.dumps(got)[:100]} differs")
    for workers in (1, 2, 3, 7):
        with instances(f"{workers} workers"): same(pmap(work, range(12), workers=workers))
    (tmp_path/"machine.py").write_text(MACHINE)
    for how in ("spawn", "fork"):
        with instances(how):
            answer = run_script(tmp_path/"machine.py", how, timeout=60)
            assert answer.returncode == 0, answer.stderr
            same(json.loads(answer.stdout))
    with instances("other order"):
        order = random.Random(28).sample(range(12), 12)
        got = dict(zip(order, pmap(work, order, workers=2)))
        same([got[k] for k in range(12)])
    with instances("two ranges, one ledger"):
        for part in (range(6, 12), range(6)):
            with Ledger(tmp_path/"l.jsonl", 28) as led: pmap(work, part, workers=2, ledger=led)
        halves = (tmp_path/"l.jsonl").read_bytes()
        with Ledger(tmp_path/"m.jsonl", 28) as led: same(pmap(work, range(12), ledger=led))
        if halves != (tmp_path/"m.jsonl").read_bytes(): raise SilentlyWrong("the ledgers differ")
    instances.check(8)


# ---------------------------------------------------------------- 40: settings

class Optimizer(Config):
    aliases = {"learning_rate": "lr"}
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=1)


class Head(Config):
    name: str
    channels: int = Field(1, ge=1)


class Task(Config):
    volume: ConfigPath
    patch_size: tuple[int, int, int] = (64, 64, 64)
    batch_size: int = Field(2, ge=1)
    mixed_precision: bool = False
    optimizer: Optimizer = Optimizer()
    schedule: Optimizer | None = None
    heads: list[Head] = []
    by_name: dict[str, Head] = {}
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5


BASE = ("volume: brain.zarr\nbatch_size: 4\noptimizer:\n  name: sgd\n  lr: 0.01\n"
        "heads:\n- name: membrane\n  channels: 2\n")


def test_row_40_settings(instances, tmp_path):
    "Every problem at once, with its line; nothing in the file runs"
    file, canary = tmp_path/"task.yaml", Canary(tmp_path/"canary")
    file.write_text(BASE)
    assert load_config(Task, file).heads[0].channels == 2
    def edit(old, new): return BASE.replace(old, new)
    wrong = { # name: (text, words of the message)
        "unknown key": (BASE + "colour: red\n", r"colour \(line 9\): unknown key$"),
        "typo": (edit("batch_size", "batchsize"), r"batchsize \(line 2\): unknown key, did you mean 'batch_size'\?"),
        "typo below": (edit("  lr", "  lrr"), r"optimizer.lrr \(line 5\): unknown key, did you mean 'lr'\?"),
        "typo in a list": (edit("channels", "chanels"), r"heads.0.chanels \(line 8\): .*did you mean 'channels'\?"),
        "typo in optional": (BASE + "schedule:\n  nmae: sgd\n", r"schedule.nmae \(line 10\): .*mean 'name'\?"),
        "typo in a table": (BASE + "by_name:\n  a: {name: x, chanels: 1}\n", r"by_name.a.chanels .*mean 'channels'\?"),
        "text for int": (edit(": 4", ": four"), r"batch_size \(line 2\): must be a valid integer"),
        "fraction for int": (edit(": 4", ": 2.5"), r"batch_size \(line 2\): must be a valid integer"),
        "list for int": (edit(": 4", ": [4]"), r"batch_size \(line 2\): must be a valid integer"),
        "null for int": (edit("batch_size: 4", "batch_size:"), r"batch_size \(line 2\): must be a valid integer"),
        "text for bool": (BASE + "mixed_precision: perhaps\n", r"mixed_precision \(line 9\): must be a valid boolean"),
        "number for group": (BASE + "schedule: 3\n", r"schedule \(line 9\)"),
        "list for group": (BASE + "schedule: [sgd]\n", r"schedule \(line 9\)"),
        "text for list": (edit("- name: membrane\n  channels: 2\n", "  x\n"), r"heads \(line 6\): must be a valid"),
        "too small": (edit(": 4", ": 0"), r"batch_size \(line 2\): must be greater than or equal to 1"),
        "too large": (edit("0.01", "7"), r"optimizer.lr \(line 5\): must be less than or equal to 1, got 7"),
        "negative": (edit("0.01", "-1"), r"optimizer.lr \(line 5\): must be greater than 0, got -1"),
        "NaN": (edit("0.01", ".nan"), r"optimizer.lr \(line 5\): must be a finite number"),
        "infinity": (BASE + "threshold: .inf\n", r"threshold \(line 9\): must be"),
        "not a choice": (edit("sgd", "adam"), r"optimizer.name \(line 4\): must be 'adamw' or 'sgd', got 'adam'"),
        "too short": (BASE + "patch_size: [64, 64]\n", r"patch_size.*missing"),
        "too long": (BASE + "patch_size: [1, 2, 3, 4]\n", r"patch_size \(line 9\)"),
        "missing": (edit("volume: brain.zarr\n", ""), r"volume: missing, it has no default"),
        "missing in a list": (edit("- name: membrane\n  channels", "- channels"), r"heads.0.name \(line 7\): missing"),
        "old and new name": (BASE + "schedule: {lr: 0.1, learning_rate: 0.1}\n", "mean the same, give one of them"),
        "two at once": (edit(": 4", ": 0").replace("0.01", "x"), r"2 problems.*\(line 2\).*\(line 5\)"),
        "many at once": ("vol: x\nbatchsize: 1\nheads: [{}]\nthreshold: 2\n", r"^5 problems in .*task.yaml"),
        "duplicate key": (BASE + "batch_size: 5\n", "line 9: key 'batch_size' appears twice"),
        "duplicate below": (edit("  lr", "  name: adamw\n  lr"), "line 5: key 'name' appears twice"),
        "alias bomb": ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join(9*['*' + a])}]\n" for a, b in zip("abcdefgh", "bcdefghi")), "more than 200000"),
        "cycle": (BASE + "schedule: &s\n  name: *s\n", "contains itself"),
        "deep": ("["*100_000, "nested more than 100 levels"), "deep dashes": ("- "*100_000, "nested more than 100"),
        "list as key": ("? [a, b]\n: 1\n", "line 1: a key must be a plain word"),
        "impossible date": (BASE + "by_name: {2024-13-01: {name: x}}\n", "task.yaml"),
        "not closed": (BASE + "schedule: {name: sgd\n", "task.yaml, line 10"),
        "top level": ("- volume\n", "must be a group of keys, got list"),
        "tab": ("volume:\tx\n\tbatch_size: 1\n", "line 2"),
        "python object": (edit("sgd", canary.yaml()[0]), "line 4: tag .* is not a plain value"),
        "python call": (edit("membrane", canary.yaml()[2]), "line 7: tag .* is not a plain value")}
    for name, (text, *words) in wrong.items():
        file.write_text(text)
        with instances.refuses(name, (ConfigError, FormatError), *words): load_config(Task, file)
    for tag in canary.yaml() + [f"'{t}'" for t in canary.texts()]:
        file.write_text(f"volume: v\nbatch_size: {tag}\n")
        with pytest.raises((ConfigError, FormatError)): load_config(Task, file)
    assert not canary.sang
    instances.check(40)


# ---------------------------------------------------------------- 43, 45: places that cannot be written

KINDS = ["nii.gz", "nii", "zarr", "safetensors", "json", "csv", "npz", "npy", "h5"]


@pytest.mark.parametrize("kind", KINDS)
def test_row_43_disk_full(kind, instances, tmp_path, zygote):
    "Old results intact, nothing temporary left, a message with the bytes; when there is room again, the same result"
    path, free = tmp_path/f"out.{kind}", tmp_path/f"free.{kind}"
    jobs.write(kind, str(free), 2)
    jobs.write(kind, str(path), 1)
    old, want = jobs.content(path), jobs.content(free)
    largest = max(map(len, want.values()))
    rooms = [0, 1, largest//4, largest//2, largest - 1] if kind != "zarr" else [0, 1, 60, largest//2, largest - 1]
    for room in rooms:
        with instances(f"{kind}, room for {room} bytes"):
            end = zygote(f"{JOBS}:write", kind, path, 2, room=room)
            if end.value: raise SilentlyWrong("no error")
            assert "DiskFull" in end.error, f"signal {end.signal}, {end.error}: {end.message}"
            assert re.search(r"no room for .*out.* stopped after [\d.]+ \w+, [\d.]+ \w+ free", end.message), end.message
            assert jobs.content(path) == old and jobs.names(tmp_path) == [f"free.{kind}", f"out.{kind}"]
    with instances("room again"):
        assert zygote(f"{JOBS}:write", kind, path, 2).value
        if jobs.content(path) != want: raise SilentlyWrong("the result differs")
    instances.check(6)


def test_row_43_first_writing(instances, tmp_path, zygote):
    "Where there was nothing, there is nothing"
    for kind in ("nii.gz", "zarr", "safetensors", "json"):
        with instances(kind):
            assert "DiskFull" in zygote(f"{JOBS}:write", kind, tmp_path/f"x.{kind}", 1, room=9).error
            assert not jobs.names(tmp_path)
    with instances("journal"):
        end = zygote(f"{JOBS}:ledger_job", tmp_path, [["fail", f"case {k}", "x"*50] for k in range(40)], room=1000)
        assert "DiskFull" in end.error and "intact" in end.message, end
        with Ledger(tmp_path/"ledger.jsonl", 0) as led: kept = list(led.failures())
        if kept != sorted(f"case {k}" for k in range(len(kept))) or not kept: raise SilentlyWrong(str(kept))
        assert jobs.names(tmp_path) == ["ledger.jsonl"]
    instances.check(5)


@pytest.mark.parametrize("kind", ["nii.gz", "zarr", "h5", "safetensors", "json"])
def test_row_45_output_places(kind, instances, tmp_path, zygote):
    "Refused before any work, with the place and a way out; what is there stays as it is"
    file, parent = tmp_path/f"in.{kind}", tmp_path/"parent"
    jobs.write(kind, str(file), 0)
    parent.mkdir()
    before = jobs.content(file)
    def refuse(name, path, *words, job="write", args=(1,), **options):
        with instances(f"{kind}: {name}"):
            end = zygote(f"{JOBS}:{job}", kind, path, *args, **options)
            if end.value: raise SilentlyWrong("written")
            assert "MedvolError" in end.error, f"signal {end.signal}, {end.error}: {end.message}"
            lacking = [w for w in [re.escape(os.path.basename(path)), *words] if not re.search(w, end.message)]
            assert not lacking, f"{end.message!r} lacks {lacking}"
            if jobs.content(file) != before: raise SilentlyWrong("the input was changed")
            assert not any(n.startswith(".mvtmp") for n in jobs.names(tmp_path) + jobs.names(parent))
    wrong = tmp_path/f"taken.{kind}"
    if kind == "zarr": wrong.write_text("a file")
    else: wrong.mkdir()
    refuse("path is of the other kind", wrong, "was to be written there|must end")
    parent.chmod(0o555)
    for p in (tmp_path, *tmp_path.parents[:3]): p.chmod(p.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    refuse("read-only folder", parent/f"x.{kind}", "no permission to write", user=NOBODY if os.getuid() == 0 else None)
    parent.chmod(0o755)
    refuse("missing parent", tmp_path/"absent"/f"x.{kind}", "does not exist", "mkdir -p")
    refuse("parent is a file", tmp_path/f"in.{kind}"/"zarr.json"/f"x.{kind}" if kind == "zarr" else file/f"x.{kind}",
           "is a file, not a folder")
    (tmp_path/f"link.{kind}").symlink_to(file)
    refuse("symbolic link", tmp_path/f"link.{kind}", "is a symbolic link")
    refuse("same as input", file, "is also an input", job="check_then_write", args=([str(file)],))
    instances.check(6)


# ---------------------------------------------------------------- 46: anything, in any order

class Store(RuleBasedStateMachine):
    "A ledger with atomic files and folders beside it, against two dictionaries; real processes are really killed"
    spawn, tally = None, None
    keys = st.sampled_from(["a", "b", "c", "d é", "e.nii.gz"])
    texts = st.sampled_from(["x", "yy", "zzz", "ä\n"])
    folders = st.booleans()

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp(prefix="medvol-machine-"))
        self.files: dict[str, object] = {} # what is on disk
        self.records: dict[str, tuple] = {} # what the ledger says

    def teardown(self):
        if hasattr(self, "folder"): shutil.rmtree(self.folder)

    @staticmethod
    def shape(text, as_folder): return [text, text*2] if as_folder else text

    def on_disk(self, key):
        path = self.folder/key
        if not path.exists(): return None
        parts = [p.read_text() for p in sorted(path.iterdir())] if path.is_dir() else path.read_text()
        return [p[:len(p)//30] if p == p[:len(p)//30]*30 else f"TORN {p!r}" for p in parts] if path.is_dir() else \
            parts[:len(parts)//30] if parts == parts[:len(parts)//30]*30 else f"TORN {parts!r}"

    def operations(self, data, n):
        out = []
        for _ in range(n):
            key = data.draw(self.keys)
            as_folder = isinstance(self.files.get(key), list) if key in self.files else data.draw(self.folders)
            if any(o[1] == key and o[0] != "fail" for o in out): as_folder = [o for o in out if o[1] == key
                                                                              and o[0] != "fail"][-1][0] == "folder"
            kind = data.draw(st.sampled_from(["folder" if as_folder else "file"]*4 + ["fail"]))
            text = data.draw(self.texts)
            out.append([kind, key, self.shape(text, kind == "folder")])
        return out

    @rule(data=st.data(), n=st.integers(1, 3))
    def write(self, data, n):
        operations = self.operations(data, n)
        jobs.ledger_job(str(self.folder), operations)
        for kind, key, text in operations:
            if kind == "fail": self.records[key] = ("failed", text)
            else: self.files[key], self.records[key] = text, ("done", text)

    @rule(data=st.data(), n=st.integers(1, 3), at=st.integers(1, 40))
    def killed(self, data, n, at):
        operations = self.operations(data, n)
        end = self.spawn(f"{JOBS}:ledger_job", self.folder, operations, folder=self.folder, kill_at=at)
        assert end.killed or not end.error, end
        allowed_files = {k: [self.files.get(k)] for k in [o[1] for o in operations]}
        allowed_records = {k: [self.records.get(k)] for k in allowed_files}
        for kind, key, text in operations:
            if kind != "fail": allowed_files[key].append(text)
            allowed_records[key].append(("failed", text) if kind == "fail" else ("done", text))
        seen = self.read()
        for key in allowed_files:
            now = self.on_disk(key)
            assert now in allowed_files[key], f"{key}: {now!r} is neither old nor new {allowed_files[key]}"
            assert seen.get(key) in allowed_records[key], f"{key}: record {seen.get(key)} not in {allowed_records[key]}"
            if not end.killed: assert now == allowed_files[key][-1] and seen[key] == allowed_records[key][-1]
            self.files[key], self.records[key] = now, seen.get(key)
            if now is None: del self.files[key]
            if self.records[key] is None: del self.records[key]

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def delete(self, data):
        key = data.draw(st.sampled_from(sorted(self.files)))
        path = self.folder/key
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        del self.files[key]

    @precondition(lambda self: self.files)
    @rule(data=st.data(), same_size=st.booleans())
    def tamper(self, data, same_size):
        key = data.draw(st.sampled_from(sorted(self.files)))
        text = self.files[key]
        new = [("q"*len(text[0].encode()) if same_size else text[0] + "q"), *text[1:]] if isinstance(text, list) else \
            "q"*len(text.encode()) if same_size else text + "q"
        path = self.folder/key
        if isinstance(text, list): (path/"0.txt").write_text(new[0]*30)
        else: path.write_text(new*30)
        self.files[key] = new

    @precondition(lambda self: (self.folder/"ledger.jsonl").exists())
    @rule(junk=st.sampled_from([b'{"key": "torn', b"\xff\xfe", b'{"key": "a"}', b"[1, 2]\n", b"null"]))
    def torn(self, junk):
        with open(self.folder/"ledger.jsonl", "ab") as f: f.write(junk)

    @precondition(lambda self: (self.folder/"ledger.jsonl").exists())
    @rule()
    def other_parameters(self):
        before = (self.folder/"ledger.jsonl").read_bytes()
        with pytest.raises(DataError, match="other parameters"), Ledger(self.folder/"ledger.jsonl", 99): pass
        assert (self.folder/"ledger.jsonl").read_bytes() == before

    @rule()
    def resume(self): self.check(self.open())

    def open(self): return Ledger(self.folder/"ledger.jsonl", 0)

    def read(self) -> dict:
        with self.open() as led:
            return {k: ("done", r["value"]["text"]) if r["status"] == "done" else ("failed", r["error"])
                    for k, r in led._records.items()}

    def check(self, ledger):
        with ledger as led:
            for key in ["a", "b", "c", "d é", "e.nii.gz"]:
                record, file = self.records.get(key), self.files.get(key)
                whole = record is not None and record[0] == "done" and record[1] == file
                assert led.is_done(key, verify=True) == whole, (key, record, file)
                if whole: assert led.value(key)["text"] == file
            assert led.failures() == {k: e for k, (s, e) in self.records.items() if s == "failed"}

    @invariant()
    def nothing_torn(self):
        if not hasattr(self, "folder"): return
        self.tally["steps"] += 1
        seen = {p.name for p in self.folder.iterdir() if not p.name.startswith((".mvtmp-", "ledger.jsonl"))}
        assert seen == set(self.files)
        for key, want in self.files.items(): assert self.on_disk(key) == want


@pytest.mark.parametrize("examples, steps", [pytest.param(60, 20, id="sample"),
                                             pytest.param(500, 30, id="all", marks=pytest.mark.slow)])
def test_row_46_state_machine(examples, steps, instances, light_zygote):
    "No torn item, the index says what is there, digests match: whatever happens in whatever order"
    tally = {"steps": 0}
    machine = type("Machine", (Store,), {"spawn": staticmethod(light_zygote), "tally": tally})
    with instances(f"{examples} examples of up to {steps} steps"):
        run_state_machine_as_test(machine, settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck)))
    extra = max(0, tally["steps"] - 1) if not instances.problems else 0
    instances.data["total"] += extra
    instances.data["passed"] += extra
    instances.check(1 + extra)
