"""Rows 26, 27, 28, 32, 33 and 34: synthetic data sets and pair stores under death, damage and mismatched lists."""
import json
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from medvol_nb.core import DataError, FormatError, Locked, MedvolError, file_digest
from medvol_nb.geometry import Volume
from medvol_nb.parallel import BatchError
from medvol_nb.synth import generate as page
from medvol_nb.synth.generate import ensembles, generate, pack, views
from medvol_nb.synth.pairfile import PairFile, Sample, array_digest, beside
from medvol_nb.synth.stores import PairReader, finish_store, prepare_store, shard_range, write_shard
from medvol_nb.synth.templates import procedural_bank
from medvol_nb.volume import write_volume

from .injectors import ROOT, bit_flips, forked
from .rows import SilentlyWrong, sampled


def toy(k: int, n: int = 12) -> Sample:
    rng = np.random.Generator(np.random.Philox(k))
    return Sample(f"{k:06d}", rng.integers(0, 256, (2, n, n, n)).astype("u1"),
                  rng.integers(0, 9, (n, n, n)).astype("u1"), {"index": k})


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a: Path, b: Path) -> None:
    x, y = tree(a), tree(b)
    assert x.keys() == y.keys(), sorted(x.keys() ^ y.keys())
    if other := [k for k in x if x[k] != y[k]]: raise SilentlyWrong(f"other bytes in {other[:4]}")


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Path:
    return procedural_bank(6, seed=2, size=(6, 14)).save(tmp_path_factory.mktemp("bank")/"bank")


def options(bank: Path, n: int = 40, **more) -> dict:
    return {"n_ensembles": n, "min_templates": 3, "max_templates": 6, "side_length": 16, "templatedir": bank,
            "workers": 0, **more}


# ------------------------------------------------------------------------------------------------------------ row 26

FAULTS = [("SIGKILL", 9, 1), ("hang", 9, 2), ("SIGKILL", 1, 0), ("exit", 9, 2), ("exit", 2, 1), ("SIGSEGV", 9, 0),
          ("hang", 1, 1), ("abort", 9, 1), ("exit", 1, 2), ("hang", 9, 0), ("SIGSEGV", 2, 1), ("SIGKILL", 2, 2)]


class Fragile:
    "Makes shards like the library; shard `where` ends its process `deaths` times"
    def __init__(self, how: str, deaths: int, where: int, marks: Path):
        self.how, self.deaths, self.where, self.marks = how, deaths, where, marks

    def __call__(self, task: dict) -> str:
        if task["shard"] == self.where and len(list(self.marks.iterdir())) < self.deaths:
            (self.marks/str(len(list(self.marks.iterdir())))).touch()
            if self.how == "hang": signal.pause()
            if self.how == "exit": os._exit(3)
            if self.how == "abort": os.abort()
            os.kill(os.getpid(), getattr(signal, self.how))
        return page._fill_shard(task)


@sampled(12, quick=1)
def test_row_26_lost_workers(count, instances, tmp_path, bank, monkeypatch):
    "The shard is tried again alone, then set aside and named; the others are as without fault; a later run fills in"
    generate(tmp_path/"whole", **options(bank))
    real = page.pmap
    for k, (how, deaths, where) in enumerate(FAULTS[:count]):
        marks, out = tmp_path/f"marks{k}", tmp_path/f"out{k}"
        marks.mkdir()
        fragile = Fragile(how, deaths, where, marks)
        monkeypatch.setattr(page, "pmap", lambda f, *a, fragile=fragile, **kw: real(fragile, *a, **kw))
        given = options(bank, workers=2, timeout=4.0 if how == "hang" else None)
        with instances(f"{how} in shard {where}, {deaths} times"):
            if deaths > 2:
                with pytest.raises(BatchError) as e: generate(out, **given)
                assert [f.index for f in e.value.failures] == [where] and f"{where:06d}" in str(e.value)
                reader = PairReader(out)
                lost = {f"{i:06d}" for i in range(16*where, min(40, 16*where + 16))}
                assert lost.isdisjoint(reader.ids) and len(reader) + len(lost) == 40
                for part in ("img", "seg"):
                    for p in (tmp_path/"whole"/part/"c").iterdir():
                        if p.name != str(where) and tree(p) != tree(out/part/"c"/p.name): raise SilentlyWrong(str(p))
            else: generate(out, **given)
        monkeypatch.setattr(page, "pmap", real)
        generate(out, **options(bank))
        same(out, tmp_path/"whole")
    instances.check(count)


# ------------------------------------------------------------------------------------------------------------ row 27

@sampled(20, quick=5)
def test_row_27_the_whole_run_is_killed(count, instances, tmp_path, bank):
    "At any file step: the second run makes what is missing, touches nothing that is there, ends with the same bytes"
    def run(out: Path) -> None: generate(out, **options(bank), store="hdf5", val_count=5)
    run(tmp_path/"whole")
    steps = forked(lambda: run(tmp_path/"counted"), tmp_path/"counted")
    assert steps > 40
    rng = random.Random(27)
    for k in sorted(rng.sample(range(2, steps), count)):
        out = tmp_path/f"at{k}"
        with instances(f"killed at step {k} of {steps}"):
            assert forked(partial(run, out), out, at=k) == -signal.SIGKILL
            done = {p.stem for p in (out/"records").glob("[0-9]*.json")} if (out/"records").exists() else set()
            before = {n: t for n, t in times(out).items() if Path(n).stem in done and not n.endswith(".lock")}
            assert len(before) == 2*len(done)
            run(out)
            touched = [n for n, t in times(out).items() if before.get(n, t) != t]
            if touched: raise SilentlyWrong(f"made again: {touched}")
            same(out, tmp_path/"whole")
    instances.check(count)


# ------------------------------------------------------------------------------------------------------------ row 28

MACHINE = """
import json, multiprocessing, sys
from medvol_nb.synth.generate import generate
def work(out, given): generate(out, **given)
if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=work, args=(sys.argv[2], json.loads(sys.argv[3])))
    child.start()
    child.join(100)
    sys.exit(child.exitcode)
"""


@sampled(8, quick=3)
def test_row_28_workers_and_machines_do_not_matter(count, instances, tmp_path, bank):
    "1, 2, 3, 7 processes, below a spawned and a forked process, in other order, in two ranges: the same bytes"
    given = options(bank, 70)
    generate(tmp_path/"whole", **given)

    def with_workers(w: int) -> None: generate(tmp_path/f"{w} workers", **{**given, "workers": w})

    def below(how: str) -> None:
        (tmp_path/"machine.py").write_text(MACHINE)
        words = [sys.executable, str(tmp_path/"machine.py"), how, str(tmp_path/how),
                 json.dumps({**given, "templatedir": str(bank), "workers": 2})]
        end = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                             timeout=200)
        assert end.returncode == 0, end.stderr

    def parts() -> None:
        for part in ("3/3", "1/3", "2/3"): generate(tmp_path/"parts", **given, shard=part)

    def ranges() -> None:
        small = options(bank, 20)
        for out, some in (("once", [(0, 20)]), ("ranges", [(10, 20), (0, 10)])):
            for a, b in some: ensembles(savedir=tmp_path/f"{out} labels", **small, start_idx=a, end_idx=b)
            for a, b in some:
                views(ensembledir=tmp_path/f"{out} labels", savedir=tmp_path/f"{out} views", start_idx=a, end_idx=b,
                      workers=0)
        same(tmp_path/"once labels", tmp_path/"ranges labels")
        same(tmp_path/"once views", tmp_path/"ranges views")

    cases = {"2 workers": partial(with_workers, 2), "parts": parts, "two ranges": ranges,
             **{f"{w} workers": partial(with_workers, w) for w in (1, 3, 7)},
             **{how: partial(below, how) for how in ("spawn", "fork")}}
    for name, run in list(cases.items())[:count]:
        with instances(name):
            run()
            if name != "two ranges": same(tmp_path/name, tmp_path/"whole")
    instances.check(count)


# ------------------------------------------------------------------------------------------------------------ row 32

def write(path: Path, n: int = 6) -> None:
    with PairFile(path, (12, 12, 12)) as f:
        for k in range(len(f), n): f.append(toy(k))


class DieInside:
    "Ends the process before or in the middle of the n-th write of the appending itself (bytes, not file names)"
    def __init__(self, at: int, torn: bool):
        self.at, self.torn, self.count, self.real = at, torn, 0, os.pwrite

    def __call__(self, fd: int, data, start: int) -> int:
        self.count += 1
        if self.count == self.at:
            if self.torn: self.real(fd, bytes(data)[:len(data)//2], start)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.real(fd, data, start)


@sampled(20, quick=8)
def test_row_32_killed_while_writing(count, instances, tmp_path, monkeypatch):
    "Every sample that was added is there, the file is readable, and the second run ends with the same bytes"
    write(tmp_path/"whole.hdf5")
    whole = [(tmp_path/"whole.hdf5").read_bytes(), beside(tmp_path/"whole.hdf5", "index").read_bytes()]
    counter = DieInside(0, False)
    monkeypatch.setattr(os, "pwrite", counter)
    write(tmp_path/"counted.hdf5")
    monkeypatch.setattr(os, "pwrite", counter.real)
    (tmp_path/"count").mkdir()
    steps = forked(lambda: write(tmp_path/"count"/"a.hdf5"), tmp_path/"count")
    rng = random.Random(32)
    plans = [("file step", k, False) for k in rng.sample(range(2, steps), count//2)]
    plans += [("write", k, t) for t, k in enumerate(rng.sample(range(1, counter.count), count - count//2))]
    for what, k, torn in plans:
        d = tmp_path/f"{what} {k}"
        d.mkdir()
        said = d/"said"

        def work(d=d, what=what, k=k, torn=torn, said=said):
            if what == "write": os.pwrite = DieInside(k, bool(torn % 2))
            with PairFile(d/"a.hdf5", (12, 12, 12)) as f:
                for j in range(6):
                    f.append(toy(j))
                    fd = os.open(said, os.O_CREAT | os.O_WRONLY)
                    counter.real(fd, bytes([j + 1]), 0)
                    os.close(fd)

        with instances(f"killed at {what} {k}"):
            end = forked(work, d if what == "file step" else "/nowhere", at=k if what == "file step" else None)
            assert end == -signal.SIGKILL
            told = said.read_bytes()[0] if said.exists() and said.stat().st_size else 0
            if beside(d/"a.hdf5", "index").exists() and (d/"a.hdf5").exists():
                reader = PairReader(d/"a.hdf5")
                assert told <= len(reader) <= told + 1, (told, len(reader))
                for j in range(len(reader)):
                    if not np.array_equal(reader[j]["img"], toy(j).img): raise SilentlyWrong(f"sample {j}")
            else: assert told == 0
            write(d/"a.hdf5")
            if [(d/"a.hdf5").read_bytes(), beside(d/"a.hdf5", "index").read_bytes()] != whole:
                raise SilentlyWrong("other bytes after the second run")
            assert {p.name for p in d.iterdir()} <= {"a.hdf5", "a.hdf5.index", "said"}
            with h5py.File(d/"a.hdf5") as f: assert np.array_equal(f["000005"]["seg"][...], toy(5).seg)
    instances.check(count)


def test_row_32_second_writers_and_early_readers(instances, tmp_path):
    "The second writer is refused; a reader sees whole samples, also between two steps of an append"
    path = tmp_path/"a.hdf5"
    with PairFile(path, (12, 12, 12)) as f:
        f.append(toy(0))
        for name, on_exists in (("second writer", "skip"), ("second writer that would start anew", "overwrite")):
            with instances.refuses(name, Locked, "a.hdf5 is in use by another process"):
                with PairFile(path, (12, 12, 12), on_exists=on_exists): pass
        with instances("reader of a growing file"):
            reader = PairReader(path)
            f.append(toy(1))
            assert len(reader) == 1 and len(PairReader(path)) == 2
            if not np.array_equal(reader[0]["img"], toy(0).img): raise SilentlyWrong("other voxels")
        with instances("reader in the middle of an append"):
            seen, real = [], os.pwrite

            def looked(fd, data, start):
                r = PairReader(path)
                seen.append(len(r))
                for k in range(len(r)):
                    if not np.array_equal(r[k]["seg"], toy(k).seg): raise SilentlyWrong("other labels")
                return real(fd, data, start)

            os.pwrite = looked
            try: f.append(toy(2))
            finally: os.pwrite = real
            assert set(seen) == {2} and len(seen) > 4 and len(PairReader(path)) == 3
    instances.check(4)


# ------------------------------------------------------------------------------------------------------------ row 33

def readable(path: Path, damaged: set[int], n: int, plain: Path | None = None) -> None:
    "What can be read is right; `verify` lists the others; plain HDF5 never returns other voxels"
    reader = PairReader(path)
    assert len(reader) == n
    told = reader.verify()
    for k in range(n):
        try: found = reader[k]
        except (FormatError, MedvolError) as e:
            assert f"{k:06d}" in str(e)
            assert f"{k:06d}" in told["damaged"] and k in damaged, (k, told)
            continue
        if array_digest(found["img"]) != array_digest(toy(k).img): raise SilentlyWrong(f"sample {k}")
        if array_digest(found["seg"]) != array_digest(toy(k).seg): raise SilentlyWrong(f"labels {k}")
    if damaged: assert {int(i) for i in told["damaged"]} == damaged and not told["ok"], told
    if plain is None: return
    try:
        with h5py.File(plain) as f:
            for key in f:
                for name in ("img", "seg"):
                    try: found = f[key][name][...]
                    except (OSError, RuntimeError, KeyError): continue
                    if not np.array_equal(found, getattr(toy(int(key)), name)): raise SilentlyWrong(f"h5py, {key}")
    except (OSError, RuntimeError, KeyError): pass


def stores(folder: Path) -> dict[str, tuple[Path, Path]]:
    "A file, an HDF5 store and a Zarr store of the same 6 samples: (what is opened, what is damaged)"
    write(folder/"a.hdf5")
    out = {"file": (folder/"a.hdf5", folder/"a.hdf5")}
    for kind, data in (("hdf5", "parts/000000.hdf5"), ("zarr", "img/c/0/0/0/0/0")):
        head = prepare_store(folder/kind, kind, 6, (12, 12, 12))
        write_shard(folder/kind, 0, map(toy, shard_range(head, 0)))
        finish_store(folder/kind)
        out[kind] = folder/kind, folder/kind/data
    return out


def chunks(path: Path) -> list[tuple[int, int, int]]:
    "(first byte, length, sample) of all chunks in the damaged file"
    reader = PairReader(path)
    places = [reader._parts[0].place(k) for k in range(6)]
    names = [n for n in ("img", "seg") if path.suffix == ".hdf5" or (path/"parts").exists() or n == "img"]
    return sorted((a, n, k) for k, p in enumerate(places) for name in names for a, n, _ in p.row[name])


@sampled(200, quick=24)
def test_row_33_flipped_bits_in_data(count, instances, tmp_path):
    "An error that names the sample; all others are read"
    todo = stores(tmp_path)
    for j, (kind, (path, file)) in enumerate(todo.items()):
        good, where = file.read_bytes(), chunks(path)
        n = count//3 + (j < count % 3)
        rng = random.Random(33 + j)
        for _ in range(n):
            a, size, k = rng.choice(where)
            at = 8*a + rng.randrange(8*size)
            bad = bytearray(good)
            bad[at//8] ^= 1 << at % 8
            file.write_bytes(bad)
            with instances(f"{kind}, sample {k}, bit {at}"):
                readable(path, {k}, 6, None if kind == "zarr" else file)
        file.write_bytes(good)
        readable(path, set(), 6)
    instances.check(count)


@sampled(50, quick=15)
def test_row_33_flipped_bits_in_metadata(count, instances, tmp_path):
    "Directory of HDF5: every sample is still read. Records: the samples they describe are listed. Heads: an error"
    todo = stores(tmp_path)
    files = {"file": [todo["file"][1], beside(todo["file"][1], "index")],
             "hdf5": [todo["hdf5"][1], tmp_path/"hdf5"/"records"/"000000.json", tmp_path/"hdf5"/"store.json"],
             "zarr": [todo["zarr"][1], tmp_path/"zarr"/"records"/"000000.json", tmp_path/"zarr"/"store.json"]}
    plan = [(kind, f) for kind, some in files.items() for f in some]
    rng, done = random.Random(33), 0
    while done < count:
        kind, file = plan[done % len(plan)]
        path, good = todo[kind][0], file.read_bytes()
        at = rng.randrange(8*len(good))
        data = chunks(path) if file == todo[kind][1] else []
        if any(8*a <= at < 8*(a + n) for a, n, _ in data): continue
        bad = bytearray(good)
        bad[at//8] ^= 1 << at % 8
        file.write_bytes(bad)
        with instances(f"{kind}, {file.name}, bit {at}"):
            if file.name == "a.hdf5.index":
                line = good[:at//8].count(b"\n")
                if line == 0:
                    with pytest.raises(FormatError, match="line 1: damaged record"): PairReader(path)
                elif good[at//8:at//8 + 1] == b"\n": # two lines became one
                    assert all(k in range(6) for k in range(len(PairReader(path))))
                    for k in range(len(PairReader(path))):
                        try: assert np.array_equal(PairReader(path)[k]["img"], toy(k).img)
                        except FormatError: pass
                else: readable(path, {line - 1}, 6)
            elif file.parent.name == "records": readable(path, set(range(6)), 6)
            else: readable(path, set(), 6, file if file.suffix == ".hdf5" else None)
            if file.name != "store.json" and file.name != "a.hdf5.index":
                if PairReader(path).verify()["ok"]: # some bytes of HDF5 belong to nobody
                    assert kind == "file", "not noticed"
        file.write_bytes(good)
        done += 1
    for path, _ in todo.values(): assert PairReader(path).verify()["ok"]
    instances.check(count)


def test_damaged_shards_are_made_again(tmp_path, bank):
    "`verify` finds them all, only they are made, and the bytes are those of before"
    given = options(bank, 70, store="hdf5", val_count=5)
    generate(tmp_path/"a", **given)
    before, stamps = tree(tmp_path/"a"), times(tmp_path/"a")
    parts = sorted((tmp_path/"a"/"parts").iterdir())
    flipped = next(bad for _, bad in bit_flips(parts[1].read_bytes(), 1, seed=3))
    parts[1].write_bytes(flipped)
    parts[3].write_bytes(parts[3].read_bytes()[:-7])
    parts[4].unlink()
    assert generate(tmp_path/"a", **given)["done"] == 2, "without reading only sizes can be compared"
    told = generate(tmp_path/"a", **given, verify=True)
    assert (told["done"], told["skipped"]) == (1, 4) and tree(tmp_path/"a") == before
    kept = ["parts/000000.hdf5", "parts/000002.hdf5", "train_data.hdf5"]
    assert [times(tmp_path/"a")[k] for k in kept] == [stamps[k] for k in kept]



# ------------------------------------------------------------------------------------------------------------ row 34

def test_row_34_lists_that_do_not_match(instances, tmp_path):
    "Names without partner are listed; nothing is written. The reference pairs by place in the sorted lists"
    names = [f"unconstrained_shapes3{k}_{k:07d}" for k in range(6)]

    def folders(name: str) -> Path:
        d = tmp_path/name
        for k, stem in enumerate(names):
            arrays = (("v1", "view1_", toy(k).img[0]), ("v2", "view2_", toy(k).img[1]), ("s", "", toy(k).seg))
            for sub, prefix, a in arrays:
                (d/sub).mkdir(parents=True, exist_ok=True)
                write_volume(Volume(a, np.eye(4)), d/sub/f"{prefix}{stem}.nii.gz")
        return d

    def packed(d: Path) -> dict:
        return pack(view1_dir=d/"v1", view2_dir=d/"v2", seg_dir=d/"s", out_dir=d/"out", val_count=2)

    def move(d: Path, a: str, b: str) -> None: (d/a).rename(d/b)

    assert packed(folders("good"))["train"] == 4
    cases = {
        "one picture is missing": (lambda d: (d/"v1"/f"view1_{names[2]}.nii.gz").unlink(),
                                   f"1 without view1: {names[2]}"),
        "counts agree, names do not": (lambda d: ((d/"v1"/f"view1_{names[0]}.nii.gz").unlink(),
                                                  (d/"v2"/f"view2_{names[5]}.nii.gz").unlink()),
                                       f"1 without view1: {names[0]}; 1 without view2: {names[5]}"),
        "labels of something else": (lambda d: move(d, f"s/{names[1]}.nii.gz", "s/other_shapes20_0000009.nii.gz"),
                                     f"without view1: other_shapes20_0000009; .*1 without seg: {names[1]}"),
        "no second pictures": (lambda d: [p.unlink() for p in (d/"v2").iterdir()], "6 without view2: unconstrained"),
        "first pictures in the second folder": (lambda d: move(d, f"v2/view2_{names[0]}.nii.gz",
                                                               f"v2/view1_{names[0]}.nii.gz"),
                                                "must begin with 'view2_'"),
        "a picture twice": (lambda d: write_volume(Volume(toy(0).seg, np.eye(4)), d/"v1"/f"view1_{names[0]}.nii"),
                            "Keep one of them"),
    }
    for name, (damage, words) in cases.items():
        d = folders(name)
        damage(d)
        with instances.refuses(name, DataError, words): packed(d)
        assert not (d/"out").exists()
    instances.check(6)
