"""Pairs: the vectorised header path against the careful one, every finding code, the one-pass statistics, the cache."""
import gzip
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.checks import (
    _check_headers,
    _heads,
    check_pairs,
    compare_pair,
    count_labels,
    flip_scores,
    intensity_facts,
    measure_pair,
)
from medvol_nb.core import rng_for
from medvol_nb.volume import Volume, affine_from, read_header, reorient, write_volume
from tests.memory import PEAK


def volume(k=0, shape=(24, 20, 22)):
    p = phantoms.abdomen(shape=shape, seed=k)
    place = affine_from(p.spacing, (3.0*k, -5, 7))
    return Volume(p.img, place), Volume(p.lbl, place)


@pytest.fixture
def pair(tmp_path):
    img, lbl = volume()
    write_volume(img, tmp_path/"img.nii.gz")
    write_volume(lbl, tmp_path/"lbl.nii.gz")
    return str(tmp_path/"img.nii.gz"), str(tmp_path/"lbl.nii.gz")


def codes(result): return sorted({r[0] for r in result["found"]})


def rewrite(path, **changes):
    "Change header fields of a .nii.gz with nibabel"
    img = nib.load(path)
    data, header = np.asanyarray(img.dataobj), img.header.copy()
    affine = changes.pop("affine", img.affine)
    dtype = changes.pop("dtype", data.dtype)
    out = nib.Nifti1Image(changes.pop("data", data).astype(dtype), affine, header)
    out.set_data_dtype(dtype)
    if "slope" in changes: out.header.set_slope_inter(changes.pop("slope"), changes.pop("inter", 0))
    if "qform" in changes: out.set_qform(changes.pop("qform"), 1)
    assert not changes
    nib.save(out, path)


# ------------------------------------------------------------------------------------------------- header level

def test_a_sound_pair_takes_the_quick_path_and_says_nothing(pair):
    assert all(h.plain[0] for h in (_heads([p]) for p in pair))
    assert check_pairs([pair])[0]["found"] == [] and check_pairs([pair])[0]["ids"][0] != 0


def damage(name, img, lbl):
    if name == "missing image": img.unlink()
    if name == "missing label": lbl.unlink()
    if name == "shape": rewrite(lbl, data=np.asanyarray(nib.load(lbl).dataobj)[:-1])
    if name == "shift": rewrite(lbl, affine=affine_from(nib.load(lbl).header.get_zooms(), (0, 0, 99)))
    if name == "tiny shift":
        a = nib.load(lbl).affine.copy()
        a[0, 3] += 0.05
        rewrite(lbl, affine=a)
    if name == "float label": rewrite(lbl, dtype=np.float32)
    if name == "scaled label": rewrite(lbl, slope=2.0)
    if name == "uint16 image": rewrite(img, dtype=np.uint16)
    if name == "int32 image": rewrite(img, dtype=np.int32)
    if name == "not nifti": img.write_bytes(b"<html>404</html>"*50)
    if name == "empty file": img.write_bytes(b"")
    if name == "4-D label": rewrite(lbl, data=np.stack([np.asanyarray(nib.load(lbl).dataobj)]*2, -1))
    if name == "cut off": img.write_bytes(img.read_bytes()[:-20])
    if name == "qform":
        q = nib.load(lbl).affine.copy()
        q[2, 3] += 40
        rewrite(lbl, qform=q)
    if name == "no codes":
        raw = bytearray(gzip.decompress(lbl.read_bytes()))
        raw[252:256] = bytes(4)
        lbl.write_bytes(gzip.compress(bytes(raw), 1))
    if name == "other orientation":
        v = volume()[1]
        write_volume(reorient(v, "LAS"), lbl, "overwrite")


@pytest.mark.parametrize("name, want", [
    ("missing image", ["E101"]), ("missing label", ["E102"]), ("shape", ["E202"]), ("shift", ["E203"]),
    ("tiny shift", ["W204"]), ("float label", ["W209"]), ("scaled label", ["W210"]), ("uint16 image", ["W209"]),
    ("int32 image", ["W209"]), ("not nifti", ["E201"]), ("empty file", ["E201"]), ("4-D label", ["E208"]),
    ("cut off", ["E301"]), ("qform", ["W205"]), ("other orientation", ["W211"]),
])
def test_each_fault_gets_its_code(pair, tmp_path, name, want):
    damage(name, tmp_path/"img.nii.gz", tmp_path/"lbl.nii.gz")
    assert codes(check_pairs([pair])[0]) == want


def test_an_uncompressed_file_that_is_cut_off_is_told_by_its_size(tmp_path):
    img, lbl = volume()
    for name, v in (("img", img), ("lbl", lbl)): write_volume(v, tmp_path/f"{name}.nii")
    pair = str(tmp_path/"img.nii"), str(tmp_path/"lbl.nii")
    assert codes(check_pairs([pair])[0]) == []
    (tmp_path/"img.nii").write_bytes((tmp_path/"img.nii").read_bytes()[:-20])
    assert [r[:2] for r in check_pairs([pair])[0]["found"]] == [("E301", "image")]


def test_a_header_without_orientation_is_told(pair, tmp_path):
    damage("no codes", tmp_path/"img.nii.gz", tmp_path/"lbl.nii.gz")
    assert "W207" in codes(check_pairs([pair])[0])


def test_D4_all_findings_are_reported_not_only_the_first(pair, tmp_path):
    "The reference stops at the first missing file"
    pairs = [(str(tmp_path/f"no{k}.nii.gz"), pair[1]) for k in range(7)]
    pairs += [pair, (pair[0], str(tmp_path/"none.nii.gz"))]
    found = [codes(r) for r in check_pairs(pairs)]
    assert found == [["E101"]]*7 + [[], ["E102"]]


def test_the_quick_path_agrees_with_the_careful_one_on_random_headers(tmp_path):
    "A header passes quickly only if the careful reader has nothing to say about it"
    img, _ = volume()
    write_volume(img, tmp_path/"a.nii.gz")
    raw = gzip.decompress((tmp_path/"a.nii.gz").read_bytes())
    checked = 0
    for k in range(300):
        rng, broken = rng_for(0, "header", k), bytearray(raw)
        for at in rng.integers(0, 352, rng.integers(1, 4)): broken[at] ^= 1 << rng.integers(0, 8)
        path = tmp_path/f"b{k}.nii.gz"
        path.write_bytes(gzip.compress(bytes(broken), 1))
        if not _heads([str(path)]).plain[0]: continue
        checked += 1
        head = read_header(path)
        assert head.meta["notes"] == () and head.shape == img.shape
    assert checked > 20


def test_quick_displacement_equals_the_careful_one(tmp_path):
    for k in range(20):
        rng = rng_for(1, "shift", k)
        img, lbl = volume()
        place = lbl.affine.copy()
        place[:3] += rng.normal(0, 10.0**rng.integers(-6, 1), (3, 4))*(1, 1, 1, 3)
        moved = replace(lbl, affine=place)
        write_volume(img, tmp_path/"i.nii.gz", "overwrite")
        write_volume(moved, tmp_path/"l.nii.gz", "overwrite")
        quick = _check_headers([(str(tmp_path/"i.nii.gz"), str(tmp_path/"l.nii.gz"))])["found"].get("0", [])
        grid = {c for c, *_ in quick} & {"E203", "W204", "E202"}
        assert grid == {c for c, *_ in compare_pair(read_header(tmp_path/"i.nii.gz"), read_header(tmp_path/"l.nii.gz"))}


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd", ".zarr", ".h5", ".npz"])
def test_A12_other_formats_are_checked_too(tmp_path, suffix):
    img, lbl = volume()
    write_volume(img, tmp_path/f"i{suffix}")
    write_volume(lbl, tmp_path/f"l{suffix}")
    write_volume(replace(lbl, affine=affine_from(lbl.spacing, (0, 0, 50))), tmp_path/f"m{suffix}")
    sound, moved = check_pairs([(str(tmp_path/f"i{suffix}"), str(tmp_path/f"{n}{suffix}")) for n in "lm"])
    assert (codes(sound), codes(moved)) == ([], ["E203"])


def test_unknown_suffix_is_reported_with_the_supported_ones(tmp_path, pair):
    (tmp_path/"x.jpg").write_bytes(b"0")
    found = check_pairs([(str(tmp_path/"x.jpg"), pair[1])])[0]["found"]
    assert found[0][0] == "E201" and ".nii.gz" in found[0][2]


# --------------------------------------------------------------------------------------------------- full level

def test_full_level_finds_what_headers_cannot_show(tmp_path):
    img, lbl = volume()
    holes = np.where(lbl.data == 1, np.nan, img.data.astype(np.float32))
    cases = {"fine": (img, lbl), "nan": (replace(img, data=holes), lbl),
             "constant": (replace(img, data=img.data*0 + 5), lbl), "empty": (img, replace(lbl, data=lbl.data*0)),
             "fraction": (img, replace(lbl, data=lbl.data.astype(np.float32) + 0.25))}
    pairs = []
    for name, vols in cases.items():
        pairs.append(tuple(str(write_volume(v, tmp_path/f"{name}{k}.nii.gz")) for k, v in enumerate(vols)))
    found = dict(zip(cases, (codes(r) for r in check_pairs(pairs, "full"))))
    assert found == {"fine": [], "nan": ["W306"], "constant": ["W307"], "empty": ["W305"], "fraction": ["E302", "W209"]}


def test_bit_flips_and_truncation_are_always_found_at_the_full_level(pair, tmp_path):
    raw = (tmp_path/"img.nii.gz").read_bytes()
    want = check_pairs([pair], "full")[0]
    for k in range(40):
        bad, at = bytearray(raw), int(rng_for(2, "flip", k).integers(0, len(raw)*8))
        bad[at//8] ^= 1 << at % 8
        (tmp_path/"img.nii.gz").write_bytes(bad if k % 2 else raw[:max(1, at//8)])
        got = measure_pair(*pair)
        assert codes(got) == ["E301"] or got == want


def test_a_flipped_label_is_suspected():
    body = np.zeros((48, 48, 48), np.float32)
    body[4:20, 8:40, 8:40] = 100
    lbl = np.zeros(body.shape, np.uint8)
    lbl[6:16, 12:30, 12:30] = 1
    scores = flip_scores(body, lbl[::-1].copy())
    assert scores[0, 0, 0] == 0 and max(scores, key=scores.get)[0] == 1 and scores[1, 0, 0] == 1


def test_flipped_label_gives_W308_with_the_axis(tmp_path):
    body = np.zeros((48, 48, 48), np.int16)
    body[4:20, 8:40, 8:40] = 100
    lbl = np.zeros(body.shape, np.uint8)
    lbl[6:16, 12:30, 12:30] = 1
    arrays, place = {"i": body, "l": lbl[::-1].copy()}, np.diag([2.0, 2, 2, 1])
    pair = [str(write_volume(Volume(a, place), tmp_path/f"{n}.nii.gz")) for n, a in arrays.items()]
    found = measure_pair(*pair)["found"]
    assert [r[0] for r in found] == ["W308"] and "flipped along x" in found[0][2]


@pytest.mark.parametrize("dtype", "bool uint8 int8 int16 uint16 int32 uint32 int64 float32".split())
@pytest.mark.parametrize("layout", ["C", "F", "strided"])
def test_counts_equal_unique(dtype, layout):
    rng = rng_for(3, "labels", dtype, layout)
    top = 2 if dtype == "bool" else 100
    lbl = (rng.integers(0, top, (9, 10, 13))*(rng.random((9, 10, 13)) < 0.2)).astype(dtype)
    if np.dtype(dtype).kind == "i": lbl[0, 0, 0] = -5
    lbl = {"C": lbl, "F": np.asfortranarray(lbl), "strided": np.repeat(lbl, 2, axis=2)[:, :, ::2]}[layout]
    ids, counts = np.unique(lbl, return_counts=True)
    assert count_labels(lbl) == {int(i): int(c) for i, c in zip(ids, counts)}


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32])
def test_intensity_facts_equal_numpy(dtype):
    x = (rng_for(4, "values", str(np.dtype(dtype))).normal(100, 30, 5000)).clip(0, 255).astype(dtype)
    f = intensity_facts(x)
    assert f["n"] == 5000 and f["min"] == x.min() and f["max"] == x.max()
    assert f["mean"] == pytest.approx(x.astype(float).mean(), rel=1e-9)
    assert f["std"] == pytest.approx(x.astype(float).std(), rel=1e-9)
    for q, name in ((0.5, "p0.5"), (50, "p50"), (99.5, "p99.5")):
        assert f[name] == pytest.approx(float(np.percentile(x, q, method="lower")), abs=1e-6)
    assert intensity_facts(x[:0]) == {"n": 0}


def test_foreground_is_the_same_for_any_storage_order(tmp_path):
    img, lbl = volume()
    facts = []
    for k, codes_ in enumerate(("RAS", "LPS", "PIR")):
        a = write_volume(reorient(img, codes_), tmp_path/f"i{k}.nii.gz")
        b = write_volume(reorient(lbl, "RAS" if k else "LAS"), tmp_path/f"l{k}.nii.gz")
        facts.append(measure_pair(str(a), str(b))["facts"])
    assert facts[0]["foreground"] == facts[1]["foreground"] == facts[2]["foreground"]
    assert facts[0]["label"] == facts[1]["label"] == facts[2]["label"]


# -------------------------------------------------------------------------------------------- cache and workers

def test_A8_A10_cache_workers_and_order_change_nothing(tmp_path):
    pairs = []
    for k in range(5):
        img, lbl = volume(k)
        if k == 3: lbl = replace(lbl, affine=affine_from(lbl.spacing))
        pairs.append(tuple(str(write_volume(v, tmp_path/f"{n}{k}.nii.gz")) for n, v in (("i", img), ("l", lbl))))
    for level in ("exists", "header", "full"):
        plain = check_pairs(pairs, level)
        assert plain == check_pairs(pairs, level, workers=2) == check_pairs(pairs, level, cache=tmp_path/"c")
        assert plain == check_pairs(pairs, level, cache=tmp_path/"c")
        assert check_pairs(pairs[::-1], level)[::-1] == plain


def test_cached_results_are_used_and_dropped_when_a_file_changes(pair, tmp_path, monkeypatch):
    import medvol_nb.checks as checks
    first = check_pairs([pair], "full", cache=tmp_path/"c")
    calls = []
    real = checks._look
    monkeypatch.setattr(checks, "_look", lambda *a: calls.append(1) or real(*a))
    assert check_pairs([pair], "full", cache=tmp_path/"c") == first and not calls
    shutil.copy(pair[1], tmp_path/"copy.nii.gz")
    damage("shift", tmp_path/"img.nii.gz", tmp_path/"lbl.nii.gz")
    assert codes(check_pairs([pair], "full", cache=tmp_path/"c")[0]) == ["E203"] and calls


def test_a_worker_that_dies_costs_one_finding_not_the_run(pair, tmp_path, monkeypatch):
    import os
    import signal

    import medvol_nb.checks as checks
    poison = str(tmp_path/"poison.nii.gz")
    shutil.copy(pair[0], poison)
    real = checks.measure_pair

    def deadly(image, label):
        if image == poison: os.kill(os.getpid(), signal.SIGKILL)
        return real(image, label)

    def look(chunk, level): # a function of this file travels to the worker by value, a patched module would not
        done = [deadly(*p) for p in chunk]
        ids = np.array([d["ids"] for d in done], "<u8").tobytes().hex()
        return {"found": {}, "ids": ids, "facts": [d["facts"] for d in done]}
    monkeypatch.setattr(checks, "_look", look)
    results = check_pairs([pair, (poison, pair[1]), pair], "full", workers=2)
    assert [codes(r) for r in results] == [[], ["E301"], []] and "could not be checked" in results[1]["found"][0][2]


def test_A7_memory_does_not_grow_with_the_number_of_cases(pair):
    "1,000 against 100,000 headers, each in a fresh process; what remains is the list of names and 16 bytes a pair"
    import subprocess
    import sys
    script = PEAK + """
import sys
from medvol_nb.checks import check_pairs
pairs = [(sys.argv[2], sys.argv[3])]*int(sys.argv[1])
check_pairs(pairs[:10])
before = peak()
done = check_pairs(pairs)
assert len(done) == len(pairs) and not done.found
print(peak() - before)
"""
    grown = [int(subprocess.run([sys.executable, "-c", script, str(n), *pair], capture_output=True, text=True,
                                check=True).stdout) for n in (1_000, 100_000)]
    assert grown[1] < 16*1024, f"{grown[1]} KiB more for 100,000 pairs, {grown[0]} KiB for 1,000"
