"""Pair files and stores: layout, bytes, growth, readers of three kinds, and everything that must be refused."""
import io
import json
import os
import pickle
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from medvol_nb.core import (
    DataError,
    DiskFull,
    FormatError,
    MissingFile,
    OutputExists,
    file_digest,
    read_csv,
    rng_for,
)
from medvol_nb.geometry import Volume
from medvol_nb.synth.pairfile import PairFile, Sample, _Stage, beside, sealed, unsealed
from medvol_nb.synth.stores import (
    PairReader,
    finish_store,
    index_of,
    is_whole,
    open_pairs,
    pair_by_name,
    prepare_store,
    read_pair,
    read_record,
    shard_range,
    write_shard,
)
from medvol_nb.torchcore import Batches
from medvol_nb.volume import write_volume
from tests.faults.injectors import disk_full

GRID = (10, 12, 14)


def toy(k: int, dtype="u1", grid=GRID) -> Sample:
    rng = rng_for(5, "toy", k)
    return Sample(f"{k:06d}", rng.integers(0, 256, (2, *grid)).astype("u1"),
                  rng.integers(0, 9 if dtype == "u1" else 900, grid).astype(dtype), {"index": k, "kind": "x"})


def same(found: dict, sample: Sample) -> bool:
    return all(np.array_equal(found[n], getattr(sample, n)) and found[n].dtype == getattr(sample, n).dtype
               for n in ("img", "seg"))


def store(path: Path, kind: str, n: int = 20, dtype="u1", **more) -> Path:
    head = prepare_store(path, kind, n, GRID, dtype, **more)
    for s in range(-(-n//head["shard_size"])):
        if not is_whole(path, s): write_shard(path, s, (toy(k, dtype) for k in shard_range(head, s)))
    assert finish_store(path)
    return path


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- layout

@pytest.mark.parametrize("compression", ["none", "gzip", "lzf"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_every_codec_and_type(tmp_path, compression, dtype, monkeypatch):
    "Noise, and also what can be compressed"
    noise = toy
    monkeypatch.setitem(globals(), "toy", lambda k, *a, **kw: (s := noise(k, *a, **kw))._replace(
        img=np.where(s.seg > 4, s.img, 7) if k else s.img))
    with PairFile(tmp_path/"a.hdf5", GRID, dtype, compression=compression) as f:
        for k in range(3): f.append(toy(k, dtype))
    store(tmp_path/"hdf5", "hdf5", 3, dtype, compression=compression)
    store(tmp_path/"zarr", "zarr", 3, dtype)
    for path in ("a.hdf5", "hdf5", "zarr"):
        reader = open_pairs(tmp_path/path)
        assert len(reader) == 3 and all(same(reader[k], toy(k, dtype)) for k in range(3)) and reader.verify()["ok"]
    with h5py.File(tmp_path/"a.hdf5") as f: assert same({n: f["000002"][n][...] for n in ("img", "seg")}, toy(2, dtype))


def test_A9_the_access_pattern_of_the_reference_reader(tmp_path):
    "Opened anew for each item, keys from the file, arrays with [()]; keys of validation go on"
    store(tmp_path/"parts", "hdf5", 20, val_count=5)
    for split, first, n in (("train", 0, 15), ("val", 15, 5)):
        with PairFile(tmp_path/f"{split}_data.hdf5", GRID, first=first) as f:
            for k in range(first, first + n): f.append(toy(k))
    for folder in (tmp_path, tmp_path/"parts"):
        for split, first, n in (("train", 0, 15), ("val", 15, 5)):
            with h5py.File(folder/f"{split}_data.hdf5", "r") as f: keys = list(f.keys())
            assert keys == [f"{k:06d}" for k in range(first, first + n)]
            for k, key in enumerate(keys, first):
                with h5py.File(folder/f"{split}_data.hdf5", "r") as f:
                    group = f[key]
                    assert sorted(group) == ["img", "seg"]
                    assert same({"img": group["img"][()], "seg": group["seg"][()]}, toy(k))


def test_D15_chunks_checksums_origin(tmp_path):
    with PairFile(tmp_path/"a.hdf5", GRID, params={"seed": 7, "bank": "abc"}) as f: f.append(toy(0))
    with h5py.File(tmp_path/"a.hdf5") as f:
        img, seg = f["000000/img"], f["000000/seg"]
        assert img.chunks == (1, *GRID) and seg.chunks == GRID and img.fletcher32 and seg.fletcher32
        assert json.loads(f.attrs["medvol"])["params"] == {"seed": 7, "bank": "abc"}
    group = zarr.open(store(tmp_path/"z", "zarr", 3, params={"seed": 7}), mode="r")
    assert group["img"].chunks == (1, 1, *GRID) and group["img"].shards == (16, 2, *GRID)
    assert group["seg"].shards == (16, *GRID) and group.attrs["medvol"]["params"] == {"seed": 7}
    assert read_csv(tmp_path/"z"/"table.csv")[2]["id"] == "000002"
    row = read_record(tmp_path/"z", 0)["samples"][1]
    assert row["labels"] == {str(v): int(n) for v, n in zip(*np.unique(toy(1).seg, return_counts=True))}


def test_D15_reading_leaves_nothing_open_and_works_in_forks(tmp_path):
    reader = open_pairs(store(tmp_path/"h", "hdf5", 12))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for k in range(12): reader[k]
    assert len(os.listdir("/proc/self/fd")) == before
    got = [b["img"].numpy() for _, b in Batches(reader, 4, workers=2).epoch(0)]
    assert np.array_equal(np.concatenate(got), np.concatenate([b["img"] for _, b in Batches(reader, 4).epoch(0)]))
    assert same(pickle.loads(pickle.dumps(reader))[-1], toy(11))


def test_zarr_reads_what_we_write_and_a_part_of_a_shard(tmp_path):
    "Our shards are read by Zarr itself, rows that are not there are fill value, and `verify` knows of every byte"
    group = zarr.open(store(tmp_path/"z", "zarr", 19), mode="r")
    assert group["img"].shape == (19, 2, *GRID)
    for k in (0, 15, 16, 18): assert same({"img": group["img"][k], "seg": group["seg"][k]}, toy(k))
    assert np.array_equal(group["img"][17, 1, 2:5, 3, 4:], toy(17).img[1, 2:5, 3, 4:])


def test_equal_data_are_equal_files(tmp_path):
    "No time stamps"
    for name in ("a", "b"):
        store(tmp_path/name, "hdf5", 3, val_count=1)
        with PairFile(tmp_path/f"{name}.hdf5", GRID) as f: f.append(toy(0))
        time.sleep(1.1)
    assert tree(tmp_path/"a") == tree(tmp_path/"b")
    assert (tmp_path/"a.hdf5").read_bytes() == (tmp_path/"b.hdf5").read_bytes()


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
def test_A6_extending_equals_making_it_at_once(tmp_path, kind):
    for n in (3, 16, 21, 33): store(tmp_path/"grown", kind, n, val_count=min(n, 4))
    store(tmp_path/"once", kind, 33, val_count=4)
    assert tree(tmp_path/"grown") == tree(tmp_path/"once")


def test_appending_in_many_sessions_equals_one(tmp_path):
    for name, step in (("one", 40), ("many", 3)):
        for first in range(0, 40, step):
            with PairFile(tmp_path/name, (6, 6, 6)) as f:
                for k in range(first, min(40, first + step)): f.append(toy(k, grid=(6, 6, 6)))
    assert (tmp_path/"one").read_bytes() == (tmp_path/"many").read_bytes()
    assert open_pairs(tmp_path/"one").verify()["ok"]


# ---------------------------------------------------------------- the stage

@pytest.mark.parametrize("seed", range(20))
def test_the_stage_is_a_file_that_leaves_old_bytes_alone(tmp_path, seed):
    "Random seeks, reads and writes against a buffer in memory"
    rng, path = rng_for(seed, "stage"), tmp_path/"f"
    size = int(rng.integers(0, 20000))
    old = rng.bytes(size)
    path.write_bytes(old)
    model = io.BytesIO(old)
    with open(path, "r+b", buffering=0) as f:
        stage = _Stage(f, size)
        for _ in range(200):
            at, n = int(rng.integers(0, 26000)), int(rng.integers(0, 9000))
            stage.seek(at), model.seek(at)
            if rng.random() < 0.5 or at > len(model.getvalue()):
                assert stage.read(n) == model.read(n)
            else:
                data = rng.bytes(n)
                assert stage.write(data) == model.write(data)
                assert stage.tell() == model.tell()
        assert path.read_bytes()[:size] == old
        for offset, (was, new) in stage.changed().items():
            assert old[offset:offset + len(was)] == was
            os.pwrite(f.fileno(), new, offset)
        assert path.read_bytes() == model.getvalue() and stage.end == len(model.getvalue())


def test_a_full_disk_keeps_what_was_there(tmp_path):
    "In a fork, because the limit holds for the process; then the rest is added and nothing differs"
    with PairFile(tmp_path/"whole.hdf5", GRID) as f:
        for k in range(4): f.append(toy(k))
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with disk_full((tmp_path/"whole.hdf5").stat().st_size//2), PairFile(tmp_path/"a.hdf5", GRID) as f:
                for k in range(4): f.append(toy(k))
        except DiskFull as e: code = 0 if "samples before it are intact" in str(e) else 2
        finally: os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    n = len(open_pairs(tmp_path/"a.hdf5"))
    assert 0 < n < 4 and open_pairs(tmp_path/"a.hdf5").verify()["ok"]
    with PairFile(tmp_path/"a.hdf5", GRID) as f:
        for k in range(n, 4): f.append(toy(k))
    assert (tmp_path/"a.hdf5").read_bytes() == (tmp_path/"whole.hdf5").read_bytes()


# ---------------------------------------------------------------- refusals

def test_files_of_the_reference_are_read_but_not_continued(tmp_path):
    "Contiguous, no attributes, no index"
    with h5py.File(tmp_path/"train_data.hdf5", "w") as f:
        for k in range(3):
            f.create_group(f"{k:06d}").create_dataset("img", data=toy(k).img)
            f[f"{k:06d}"].create_dataset("seg", data=toy(k).seg)
    reader = open_pairs(tmp_path)
    assert len(reader) == 3 and same(reader[1], toy(1)) and reader.facts(1) == {}
    assert reader.verify()["problems"] == ["no checksums"]
    with pytest.raises(OutputExists, match="has no index"):
        with PairFile(tmp_path/"train_data.hdf5", GRID): pass
    (tmp_path/"train_data.hdf5").write_bytes(b"<html>")
    with pytest.raises(FormatError, match="damaged HDF5 file"): open_pairs(tmp_path)


def test_samples_that_do_not_fit(tmp_path):
    with PairFile(tmp_path/"a.hdf5", GRID) as f:
        f.append(toy(0))
        for bad in (toy(0, grid=(4, 4, 4)), toy(0, "u2"), toy(0)._replace(img=toy(0).img.astype("f4"))):
            with pytest.raises(DataError, match="sample 000000: (img|seg) must be uint8"): f.append(bad)
        f.append(toy(1))
    assert open_pairs(tmp_path/"a.hdf5").verify() == {"samples": 2, "damaged": [], "problems": [], "ok": True}
    prepare_store(tmp_path/"s", "zarr", 20, GRID)
    with pytest.raises(DataError, match="shard 1: got 3 samples, it holds 4"):
        write_shard(tmp_path/"s", 1, (toy(k) for k in range(3)))
    with pytest.raises(DataError, match="has no shard 2"): write_shard(tmp_path/"s", 2, [])


def test_other_parameters_are_refused_by_name(tmp_path):
    store(tmp_path/"s", "zarr", 3, params={"seed": 0, "bank": "a"})
    for given, words in (({"params": {"seed": 1, "bank": "a"}}, "other seed"),
                         ({"params": {"seed": 0, "bank": "b"}}, "other bank"),
                         ({"dtype": "u2", "params": {"seed": 0, "bank": "a"}}, "other seg_dtype")):
        with pytest.raises(OutputExists, match=words):
            prepare_store(tmp_path/"s", "zarr", 3, GRID, **{"dtype": "u1", **given})
    (tmp_path/"full").mkdir()
    (tmp_path/"full"/"thesis.tex").touch()
    with pytest.raises(OutputExists, match="other content"): prepare_store(tmp_path/"full", "zarr", 3, GRID)


def test_records_are_untrusted(tmp_path):
    "A record that names files outside of its store, sizes beyond reason, or an unknown codec"
    path = store(tmp_path/"s", "zarr", 2)
    file = path/"records"/"000000.json"
    good = unsealed(file.read_bytes(), "x")
    row = good["samples"][0]
    for edit, words in (({"where": {"img": "../../etc/passwd", "seg": "/etc/passwd"}}, r"holds '\.\.'"),
                        ({"codec": "secret"}, "codec 'secret'"),
                        ({"samples": [{**row, "img": [[0, 2**40, 0]]*2}]*2}, "a chunk of"),
                        ({"samples": [{**row, "img": [[2**40, 90, 0]]*2}]*2}, "the file ends")):
        file.write_text(sealed({**good, **edit}))
        os.utime(file, ns=(1, time.time_ns()))
        with pytest.raises((DataError, FormatError), match=words): open_pairs(path)[0]


def test_nothing_is_trained_with_what_was_held_out_if_the_head_is_damaged(tmp_path):
    path = store(tmp_path/"s", "zarr", 20, val_count=4)
    (path/"store.json").write_bytes((path/"store.json").read_bytes().replace(b'"n": 20', b'"n": 21'))
    for split in ("train", "val"):
        with pytest.raises(FormatError, match="It alone says which samples are for validation"): open_pairs(path, split)
    assert len(open_pairs(path)) == 20 and same(open_pairs(path)[17], toy(17))


def test_absent_and_unfinished(tmp_path):
    with pytest.raises(MissingFile, match="does not exist"): open_pairs(tmp_path/"x")
    with pytest.raises(MissingFile, match="neither store.json"): open_pairs(tmp_path)
    head = prepare_store(tmp_path/"s", "hdf5", 40, GRID)
    write_shard(tmp_path/"s", 1, map(toy, shard_range(head, 1)))
    assert not finish_store(tmp_path/"s")
    reader = open_pairs(tmp_path/"s")
    assert reader.ids == [f"{k:06d}" for k in range(16, 32)] and reader.missing == 24 and same(reader[0], toy(16))
    with pytest.raises(IndexError): reader[16]
    with pytest.raises(DataError, match="split: must be"): open_pairs(tmp_path/"s", "test")


# ---------------------------------------------------------------- names

def write_all(folder: Path, names: list[str]) -> None:
    for k, name in enumerate(names):
        for sub, prefix, a in (("v1", "view1_", toy(k).img[0]), ("v2", "view2_", toy(k).img[1]), ("s", "", toy(k).seg)):
            (folder/sub).mkdir(parents=True, exist_ok=True)
            write_volume(Volume(a, np.eye(4)), folder/sub/f"{prefix}{name}.nii.gz")


def test_D4_validation_is_like_the_rest(tmp_path):
    "2000 names by the reference's rule: its last 100 are all unconstrained with 37...39 shapes; ours are a sample"
    rng = rng_for(0, "names")
    kinds = np.array(["unconstrained", "foreground_masked", "foreground_masked_enveloped"])[rng.integers(0, 3, 2000)]
    shapes, letters = rng.integers(20, 40, 2000), np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names = [f"{k}_shapes{n}_{''.join(rng.choice(letters, 7))}" for k, n in zip(kinds, shapes)]
    last = sorted(names)[-100:]
    assert all(n.startswith("unconstrained_shapes3") for n in last)
    for sub in ("v1", "v2", "s"): (tmp_path/sub).mkdir()
    for name in names:
        for place in ("v1/view1_", "v2/view2_", "s/"): (tmp_path/f"{place}{name}.nii.gz").touch()
    ours = [n for n, *_ in pair_by_name(tmp_path/"v1", tmp_path/"v2", tmp_path/"s")][-100:]
    share = np.mean([n.startswith("unconstrained") for n in ours])
    counts = [int(n.split("shapes")[1][:2]) for n in ours]
    assert abs(share - 1/3) < 0.2 and abs(np.mean(counts) - 29.5) < 2.5 and min(counts) < 24 and max(counts) > 36
    own = [f"{k}_shapes{n}_{i:07d}" for i, (k, n) in enumerate(zip(kinds[:30], shapes))]
    write_all(tmp_path/"own", own)
    assert [n for n, *_ in pair_by_name(*(tmp_path/"own"/s for s in ("v1", "v2", "s")))] == own


def test_D5_a_missing_file_does_not_shift_the_others(tmp_path):
    "The reference compares only counts: one file of each folder is gone, another one"
    write_all(tmp_path, ["A", "B", "C", "D"])
    (tmp_path/"v1"/"view1_B.nii.gz").unlink()
    (tmp_path/"v2"/"view2_C.nii.gz").unlink()
    with pytest.raises(DataError, match="1 without view1: B; 1 without view2: C"):
        pair_by_name(tmp_path/"v1", tmp_path/"v2", tmp_path/"s")


@pytest.mark.parametrize("name, number", [("a_shapes3_0000012", 12), ("a_shapes3_AB00012", None), ("0000001", 1),
                                          ("a_000012", None), ("a_00000012", None), ("a_１２３４５６７", None)])
def test_numbers_in_names(name, number): assert index_of(name) == number


def test_A8_pictures_that_are_none(tmp_path):
    "Truncated, all kinds of wrong content; the message names the file"
    write_all(tmp_path, ["A"])
    files = pair_by_name(tmp_path/"v1", tmp_path/"v2", tmp_path/"s")
    view, seg = files[0][1], files[0][3]
    good = {p: p.read_bytes() for p in (view, seg)}
    nan = toy(0).img[0].astype("f4")
    nan[0, 0, 0] = np.nan
    cases = [(view, good[view][:-20], view.name), (view, b"", view.name), (view, b"GIF89a", view.name),
             (view, nan, "NaN"), (view, toy(0).img[0].astype("f4") + 0.5, "fractions"),
             (view, toy(0).img[0].astype("i2")*9, "at most 255"), (view, toy(0).img[0][1:], "has the shape"),
             (seg, toy(0).seg.astype("i2") - 3, "negative"), (seg, np.full(GRID, 70000, "i4"), "at most 65535"),
             (seg, np.stack([toy(0).seg]*2), "channels")]
    for path, content, words in cases:
        if isinstance(content, bytes): path.write_bytes(content)
        else: write_volume(Volume(content, np.eye(4), "cxyz"[4 - content.ndim:]), path, "overwrite")
        with pytest.raises((DataError, FormatError), match=words) as e: read_pair(files[0])
        assert str(path.parent) in str(e.value)
        path.write_bytes(good[path])
    assert read_pair(files[0]).seg.dtype == np.uint8 and isinstance(PairReader, type)
    assert beside("a/b.hdf5", "index") == Path("a/b.hdf5.index")
