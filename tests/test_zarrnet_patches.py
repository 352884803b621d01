"""Patches: the reference's list exactly, a cache that is never stale, and a split that shares no voxel."""

import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
import zarr

from benchmarks._unet_patches import ReadsCounted
from benchmarks.reference.patch_finder import literal_patches
from medvol_nb import phantoms
from medvol_nb.core import ConfigError, DataError, FormatError, rng_for
from medvol_nb.zarrnet import finder
from medvol_nb.zarrnet.config import ZarrConfig
from medvol_nb.zarrnet.finder import find_patches
from medvol_nb.zarrnet.io import open_volume
from medvol_nb.zarrnet.patches import (
    PatchList,
    find_patches_command,
    grouped_order,
    open_entries,
    patch_list,
    split_patches,
)
from tests.faults.injectors import forked, truncations
from tests.memory import PEAK

KINDS = ("empty", "voxel", "noise", "box", "clipped", "boxes", "full")


def random_labels(kind, shape, rng):
    lbl = np.zeros(shape, np.uint8)
    if kind == "voxel":
        lbl[tuple(rng.integers(0, n) for n in shape)] = 7
    if kind == "noise":
        lbl = (rng.random(shape) < rng.choice([0.02, 0.2, 0.6])).astype(np.uint8)
    if kind == "full":
        lbl[:] = 255
    for _ in range({"box": 1, "clipped": 1, "boxes": 3}.get(kind, 0)):
        low = [int(rng.integers(0, 1 + n // 3)) if kind != "clipped" else 0 for n in shape]
        lbl[tuple(slice(a, a + int(rng.integers(n // 2, n + 1))) for a, n in zip(low, shape))] = rng.integers(1, 255)
        if rng.random() < 0.5:
            lbl *= rng.random(shape) < 0.7
    return lbl


def write(path, array, chunks=16, **options):
    chunks = (chunks,) * array.ndim if isinstance(chunks, int) else chunks
    zarr.create_array(str(path), shape=array.shape, dtype=array.dtype, chunks=chunks, overwrite=True, **options)[
        ...
    ] = array
    return path


def places(found):
    return [p["start_pos"] for p in found]


# ---------------------------------------------------------------------------------------------------------- finder


def test_B3_identical_to_the_literal_algorithm(monkeypatch):
    "280 random volumes x patch x chunk x threshold, with empty, single voxel, edge-clipped labels and odd patches"
    rng, hits, odd = rng_for(0, "B3"), 0, 0
    for k, kind in itertools.product(range(40), KINDS):
        shape = tuple(rng.integers(4, 60, 3).tolist())
        lbl = random_labels(kind, shape, rng)
        patch = tuple(int(rng.integers(1, 2 + n * 3 // 5)) for n in shape)
        b, r = float(rng.choice([0, 0.4, 0.9, 0.95, 1])), float(rng.choice([0, 0.05, 0.1, 0.3, 1]))
        v = open_volume(lbl)
        v.chunks = tuple(rng.integers(3, 70, 3).tolist())
        monkeypatch.setattr(finder, "_BLOCK", int(rng.choice([2**9, 2**14, 2**20])))
        monkeypatch.setattr(finder, "_FOR_BITS", float(rng.choice([0, 0.5])))  # 0: labels are read a second time
        table = find_patches(v, patch, min_bbox_percent=b, min_labeled_ratio=r, grid_origin="label_bbox")
        found = table.starts.tolist()
        expected = places(literal_patches(lbl, patch, b, r))
        assert found == expected, (k, kind, shape, patch, v.chunks, b, r)
        hits, odd = hits + bool(expected), odd + any(p % 2 for p in patch)
    assert hits > 90 and odd > 100


@pytest.mark.parametrize("seed", range(12))
def test_B3_identical_from_stores_reading_each_chunk_once(tmp_path, seed):
    rng = rng_for(seed, "stores")
    lbl = random_labels(("boxes", "voxel", "empty", "clipped")[seed % 4], (60, 70, 50), rng)
    shards = (48, 32, 32) if seed % 3 == 2 else None
    write(tmp_path / "a.zarr", lbl, (24, 16, 16) if shards else 20, shards=shards)
    patch = ((16, 20, 24), (15, 31, 9), (40, 33, 50))[seed % 3]
    v = open_volume(tmp_path / "a.zarr", reader="zarr")
    with ReadsCounted() as reads:
        table = find_patches(v, patch, min_bbox_percent=0.6, min_labeled_ratio=0.1, grid_origin="label_bbox")
    assert table.starts.tolist() == places(literal_patches(lbl, patch, 0.6, 0.1))
    assert shards or reads.n == len(v.stored_chunks())


def brute(lbl, patch, step, low, high, b, r, of="patch", end_aligned=False):
    "Every candidate, tested one by one"
    axes = []
    for a, z, p, s in zip(low, high, patch, step):
        starts = list(range(a, z - p + 1, s))
        if end_aligned and starts and starts[-1] < z - p:
            starts.append(z - p)
        axes.append(starts)
    out = []
    for s in itertools.product(*axes):
        found = np.argwhere(lbl[tuple(slice(a, a + p) for a, p in zip(s, patch))])
        if not len(found):
            continue
        box = math.prod((np.ptp(found, axis=0) + 1).tolist())
        ratio = len(found) / (math.prod(patch) if of == "patch" else box)
        if box / math.prod(patch) >= b and ratio >= r:
            out.append((list(s), len(found), box / math.prod(patch)))
    return out


@pytest.mark.parametrize("seed", range(30))
def test_every_option_against_brute_force(seed):
    rng = rng_for(seed, "options")
    shape = tuple(rng.integers(20, 50, 3).tolist())
    lbl = random_labels(KINDS[2:][seed % 5], shape, rng)
    patch, step = (tuple(rng.integers(2, 20, 3).tolist()) for _ in range(2))
    region = tuple((int(rng.integers(0, 8)), int(n - rng.integers(0, 8))) for n in shape) if seed % 2 else None
    of, end = ("patch", "bbox")[seed % 3 == 0], seed % 4 == 1
    table = find_patches(
        lbl,
        patch,
        min_bbox_percent=0.5,
        min_labeled_ratio=0.2,
        step=step,
        labeled_ratio_of=of,
        end_aligned=end,
        region=region,
    )
    expected = brute(lbl, patch, step, (0, 0, 0), shape, 0.5, 0.2, of, end)
    if region:
        expected = [e for e in expected if all(a <= s and s + p <= b for s, p, (a, b) in zip(e[0], patch, region))]
    assert list(zip(table.starts.tolist(), table.counts.tolist(), table.bbox_frac.tolist())) == expected
    wide = find_patches(
        lbl,
        patch,
        min_bbox_percent=0.5,
        min_labeled_ratio=0.2,
        step=step,
        labeled_ratio_of=of,
        end_aligned=end,
        region=region,
        floor=0.3,
    )
    assert wide.select(0.5, 0.2, of).starts.tolist() == table.starts.tolist()


def test_masks_and_values_that_do_not_count(tmp_path):
    rng = rng_for(0, "masks")
    lbl = rng.integers(0, 3, (24, 24, 24)).astype(np.float32)
    mask, ignored = (rng.random(lbl.shape) < 0.8 for _ in range(2))
    options = {"min_bbox_percent": 0.1, "min_labeled_ratio": 0.01}

    def counts(array, **more):
        return find_patches(array, (8, 8, 8), **options, **more).counts.tolist()

    plain = counts((lbl > 0).astype(np.uint8))
    assert counts(lbl) == plain
    assert counts(lbl, ignore_label=2) == counts((lbl == 1).astype(np.uint8))
    holes = np.where(lbl == 2, np.nan, lbl)
    assert counts(holes, ignore_label=float("nan")) == counts((lbl == 1).astype(np.uint8))
    volumes = {k: open_volume(v.astype(np.uint8)) for k, v in (("mask", mask), ("ignore_mask", ignored))}
    assert counts(lbl, **volumes) == counts(((lbl > 0) & mask & ~ignored).astype(np.uint8))
    with pytest.raises(DataError, match="shape"):
        counts(lbl, mask=open_volume(mask[1:].astype(np.uint8)))


def test_chunks_that_are_not_stored_count_if_the_fill_value_is_a_label(tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(32, 32, 32), chunks=(16,) * 3, dtype="u1", fill_value=1)[:16] = 0
    assert find_patches(open_volume(tmp_path / "a.zarr"), (16, 16, 16)).starts[:, 0].tolist() == [16] * 9
    assert not len(find_patches(open_volume(tmp_path / "a.zarr"), (16, 16, 16), ignore_label=1))


def test_a_volume_smaller_than_the_patch():
    lbl = np.ones((6, 20, 20), np.uint8)
    assert not len(find_patches(lbl, (10, 8, 8), min_bbox_percent=0.1))
    table = find_patches(lbl, (10, 8, 8), min_bbox_percent=0.6, pad_small=True)
    assert set(table.starts[:, 0]) == {-2} and set(table.counts) == {6 * 64} and len(table) == 16


def test_memory_is_bounded_before_it_is_taken(tmp_path):
    zarr.create_array(str(tmp_path / "huge.zarr"), shape=(10**6,) * 3, chunks=(128,) * 3, dtype="u1")
    with pytest.raises(DataError, match="cells need .* more than max_memory_gb allows"):
        find_patches(open_volume(tmp_path / "huge.zarr"), (64, 64, 64))
    zarr.create_array(str(tmp_path / "vast.zarr"), shape=(10_000,) * 3, chunks=(128,) * 3, dtype="u1")[
        :64, :64, :64
    ] = 1
    with pytest.raises(DataError, match="blocks of voxels would have to be read"):
        zarr.create_array(str(tmp_path / "full.zarr"), shape=(10**6,) * 3, chunks=(128,) * 3, dtype="u1", fill_value=1)
        find_patches(open_volume(tmp_path / "full.zarr"), (64, 64, 64))
    zarr.create_array(str(tmp_path / "long.zarr"), shape=(10**13, 8, 8), chunks=(128, 8, 8), dtype="u1")
    with pytest.raises(DataError, match="too many candidates"):
        find_patches(open_volume(tmp_path / "long.zarr"), (64, 8, 8))
    table = find_patches(open_volume(tmp_path / "vast.zarr"), (256, 256, 256), min_bbox_percent=0, min_labeled_ratio=0)
    assert table.starts.tolist() == [[0, 0, 0]] and table.rejected["candidates"] == 77**3


@pytest.mark.slow
def test_B4_memory_of_the_search_at_1024(tmp_path):
    "Peak growth of at most 200 MB, chunks read exactly once"
    import subprocess
    import sys

    from benchmarks._unet_patches import sheet_labels

    sheet_labels(tmp_path / "a.zarr", 1024)
    code = PEAK + (
        "import sys, zarr\nfrom medvol_nb.zarrnet.finder import find_patches\n"
        "from medvol_nb.zarrnet.io import open_volume\nv = open_volume(sys.argv[1])\nv[:1, :1, :1]\n"
        "before = peak()\n"
        "find_patches(v, (64, 192, 192), min_labeled_ratio=0.07, grid_origin='label_bbox')\n"
        "print((peak() - before)/1024)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.zarr")], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) <= 200


# ----------------------------------------------------------------------------------------------- a small training


@pytest.fixture
def task(tmp_path):
    "Settings with two volumes; `task(section__key=value)` changes them"
    for name, seed in (("a", 0), ("b", 1)):
        roll = phantoms.sheets((32, 96, 96), seed=seed, pitch=20)
        write(tmp_path / f"{name}.zarr", roll.img, 32)
        write(tmp_path / f"{name}_sheet.zarr", roll.mask * (np.arange(96) < (96 if name == "a" else 70)), 32)

    def make(volumes=None, targets=None, **values):
        entry = [{"input": f"{n}.zarr", "sheet": f"{n}_sheet.zarr"} for n in "ab"]
        tree = {
            "tr_params": {"patch_size": [16, 32, 32], "tr_val_split": 0.8},
            "model_config": {"f_maps": [8, 16]},
            "dataset_config": {
                "min_labeled_ratio": 0.15,
                "cache_file": "patches.json",
                "volume_paths": entry if volumes is None else volumes,
                "targets": targets or {"sheet": {"channels": 1}},
            },
        }
        for dotted, v in values.items():
            section, key = dotted.split("__")
            tree[section][key] = v
        (tmp_path / "task.json").write_text(json.dumps(tree))
        return ZarrConfig.load(tmp_path / "task.json")

    make.folder = tmp_path
    return make


def test_volumes_that_do_not_fit_are_refused_together(task):
    d = task.folder
    write(d / "short.zarr", np.ones((32, 96, 90), np.uint8), 32)
    write(d / "three.zarr", np.ones((3, 32, 96, 96), np.uint8), 32)
    write(d / "small.zarr", np.ones((8, 96, 96), np.uint8), 32)
    bad = [
        {"input": "a.zarr", "sheet": "short.zarr"},
        {"input": "b.zarr", "sheet": "three.zarr"},
        {"input": "small.zarr", "sheet": "small.zarr"},
        {"input": "none.zarr", "sheet": "a_sheet.zarr"},
        {"input": "a.zarr", "sheet": "a_sheet.zarr", "mask": "short.zarr", "bbox": [[0, 32], [0, 96], [0, 97]]},
    ]
    with pytest.raises(ConfigError) as e:
        open_entries(task(bad))
    for words in (
        "6 problems",
        r"volume_paths.0.sheet \(line 1\): shape \(32, 96, 90\), but the input has \(32, 96, 96\)",
        r"volume_paths.1.sheet \(line 1\): .*can be the 1 channels",
        r"volume_paths.2.input \(line 1\): 8 x 96 x 96 is smaller than the patch 16 x 32 x 32",
        r"volume_paths.3.input \(line 1\): .*none.zarr does not exist",
        r"volume_paths.4.mask \(line 1\): shape",
        "volume_paths.4.bbox",
    ):
        assert __import__("re").search(words, str(e.value)), (words, str(e.value))
    with pytest.raises(ConfigError, match="is empty"):
        open_entries(task([]))


def test_padding_does_not_enlarge_a_box(task):
    "pad_small is for volumes that end; a box smaller than the patch holds no candidate, padded or not"
    small = {"input": "a.zarr", "sheet": "a_sheet.zarr", "bbox": [[0, 32], [0, 20], [0, 96]]}
    with pytest.raises(ConfigError, match=r"bbox .*: 32 x 20 x 96 is smaller .*\(axis y\).* or a larger bbox"):
        open_entries(task([small], tr_params__pad_small=True))
    with pytest.raises(ConfigError, match="or set tr_params.pad_small"):
        open_entries(task([{k: small[k] for k in ("input", "sheet")}], tr_params__patch_size=[16, 32, 128]))


def test_U02_thresholds_of_dataset_config_have_an_effect(task):
    lengths = [len(patch_list(task(dataset_config__min_labeled_ratio=r), cache=False)) for r in (0.1, 0.18, 0.21)]
    assert lengths[0] > lengths[1] > lengths[2] > 0
    assert len(patch_list(task(dataset_config__min_bbox_percent=0.999), cache=False)) < lengths[0]


def test_U11_labels_with_channels_can_be_the_reference(task):
    for name in "ab":
        mask = np.asarray(zarr.open(str(task.folder / f"{name}_sheet.zarr"))[...])
        write(task.folder / f"{name}_n.zarr", np.stack([mask * 0, mask * 9, mask * 0], axis=-1), (32, 32, 32, 3))
    volumes = [{"input": f"{n}.zarr", "normals": f"{n}_n.zarr"} for n in "ab"]
    cfg = task(volumes, {"normals": {"channels": 3}})
    assert patch_list(cfg, cache=False).starts.tolist() == patch_list(task(), cache=False).starts.tolist()


@pytest.mark.parametrize("unknown, dtype", [(255, np.uint8), (float("nan"), np.float32)])
def test_vectors_of_nothing_but_the_ignored_value_are_no_labels(unknown, dtype):
    vectors = np.zeros((3, 16, 16, 32), dtype)
    vectors[1, :, :, :16] = vectors[:, :, :, 16:] = 255
    known = find_patches(vectors, (16, 16, 16))
    assert known.starts[:, 2].tolist() == [0, 8, 16]
    vectors[:, :, :, 16:] = unknown
    table = find_patches(vectors, (16, 16, 16), ignore_label=unknown)
    assert table.starts[:, 2].tolist() == [0] and table.counts.tolist() == [16**3]


def test_U11_the_high_side_is_covered_on_request_and_empty_labels_do_not_crash():
    lbl = np.zeros((40, 40, 45), np.uint8)
    assert not len(find_patches(lbl, (16, 16, 16), grid_origin="label_bbox"))
    lbl[3:, 2:, 40:] = 1
    options = {"min_bbox_percent": 0.2, "min_labeled_ratio": 0}
    assert not len(find_patches(lbl, (16, 16, 16), **options))
    assert (find_patches(lbl, (16, 16, 16), end_aligned=True, **options).starts[:, 2] == 29).all()


def test_U29_without_a_cache_patches_are_still_tested(task):
    cfg = task(dataset_config__use_cache=False)
    assert cfg.cache_path is None and 0 < len(patch_list(cfg)) < 2 * 3 * 5 * 5
    assert not (task.folder / "valid_patches.json").exists()


def test_no_patch_is_an_error_with_numbers(task):
    cfg = task(dataset_config__min_labeled_ratio=0.9)
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"min_labeled_ratio 0.9. a: candidates 75, .* ratio 75, .*best ratio 0.\d+; b: "
        ):
            patch_list(cfg)
    assert not (task.folder / "patches.json").exists()
    patch_list(task())
    with pytest.raises(DataError, match="candidates 75, .*best ratio"):
        patch_list(task(dataset_config__min_labeled_ratio=0.6))


# ------------------------------------------------------------------------------------------------------------ cache


def test_B5_workers_give_the_same_bytes(task):
    found = []
    for workers in (0, 1, 2, 4):
        (task.folder / "patches.json").unlink(missing_ok=True)
        patch_list(task(), workers=workers)
        found.append((task.folder / "patches.json").read_bytes())
    assert len(set(found)) == 1
    assert [set(p) for p in json.loads(found[0])["patches"]] == [
        {"volume_idx", "volume", "start_pos", "count", "bbox_frac"}
    ] * len(json.loads(found[0])["patches"])


@pytest.fixture
def searches(monkeypatch):
    "Counts searches"
    from medvol_nb.zarrnet import patches

    count, real = [], patches.find_patches
    monkeypatch.setattr(patches, "find_patches", lambda *a, **k: count.append(1) or real(*a, **k))
    return count


def test_B5_touching_nothing_searches_nothing(task, searches):
    first = patch_list(task())
    assert len(searches) == 2
    for cfg in (
        task(),
        task(tr_params__batch_size=3, tr_params__seed=5),
        task(dataset_config__min_labeled_ratio=0.2),
        task(dataset_config__min_bbox_percent=0.99),
    ):
        again, fresh = patch_list(cfg), patch_list(cfg, cache=False)
        searches.clear()
        assert again.digest() == fresh.digest() and np.array_equal(again.bbox_frac, fresh.bbox_frac)
        assert (
            np.array_equal(again.counts, fresh.counts) and patch_list(cfg).digest() == again.digest() and not searches
        )
    assert patch_list(task()).digest() == first.digest()


CHANGES = {
    "patch_size": {"tr_params__patch_size": [16, 16, 32]},
    "step": {"dataset_config__patch_step": [4, 16, 16]},
    "grid_origin": {"dataset_config__grid_origin": "label_bbox"},
    "end_aligned": {"dataset_config__end_aligned": True},
    "min_labeled_ratio": {"dataset_config__min_labeled_ratio": 0.05},
    "pad_small": {"tr_params__pad_small": True},
    "min_bbox_percent": {"dataset_config__min_bbox_percent": 0.4},
    "labeled_ratio_of": {"dataset_config__labeled_ratio_of": "bbox"},
    "ignore_label": {"tr_params__ignore_label": 3},
}


@pytest.mark.parametrize("field", CHANGES)
def test_B5_any_setting_of_the_key_searches_again(task, searches, caplog, field):
    patch_list(task())
    searches.clear()
    cfg = task(**CHANGES[field])
    out = patch_list(cfg)
    assert len(searches) == 2 and field in caplog.text and "searched again" in caplog.text
    searches.clear()
    assert out.digest() == patch_list(cfg).digest() and not searches
    assert out.digest() == patch_list(cfg, cache=False).digest()


def entries(**more):
    return [{"input": f"{n}.zarr", "sheet": f"{n}_sheet.zarr", **more} for n in "ab"]


@pytest.mark.parametrize(
    "what, change",
    [
        ("order", lambda d: entries()[::-1]),
        ("one volume", lambda d: entries()[:1]),
        ("bbox", lambda d: entries(bbox=[[0, 32], [0, 64], [0, 96]])),
        ("name", lambda d: [entries()[0], {**entries()[1], "name": "z"}]),
        ("mask", lambda d: entries(mask="a_sheet.zarr")),
        ("other labels", lambda d: [{"input": "a.zarr", "sheet": "b_sheet.zarr"}, entries()[1]]),
        ("rewritten", lambda d: write(d / "a_sheet.zarr", np.ones((32, 96, 96), np.uint8), 32) and None),
        ("rechunked", lambda d: write(d / "a_sheet.zarr", zarr.open(str(d / "a_sheet.zarr"))[...], 16) and None),
        ("chunk gone", lambda d: shutil.rmtree(d / "a_sheet.zarr" / "c" / "0" / "1")),
    ],
)
def test_U11_B5_any_change_of_volumes_or_labels_searches_again(task, searches, what, change):
    "Upstream trusts whatever file is there: other volumes, their order, or other labels reuse stale positions"
    before = patch_list(task())
    searches.clear()
    cfg = task(change(task.folder))
    out = patch_list(cfg)
    assert len(searches) == len(cfg.volumes) and out.digest() == patch_list(cfg, cache=False).digest()
    assert what in ("name",) or out.digest() != before.digest() or what == "rechunked"


def test_damaged_caches_are_not_believed(task, searches):
    good = patch_list(task())
    file = task.folder / "patches.json"
    raw = file.read_bytes()
    for _, bad in truncations(raw, 21):
        file.write_bytes(bad)
        searches.clear()
        assert (
            patch_list(task()).digest() == good.digest()
            and (searches or bad == raw[:-1])
            and file.read_bytes() in (raw, bad)
        )
    for at in range(7, len(raw) - 2, len(raw) // 60):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        assert patch_list(task()).digest() == good.digest()
    for text in (
        "{}",
        "null",
        '"x"',
        '{"version": 2, "key": {}, "patches": []}',
        '{"version": 1, "patches": 3}',
        "\x00" * 9,
    ):
        file.write_text(text)
        assert patch_list(task()).digest() == good.digest() and file.read_bytes() == raw


def test_bare_lists_of_the_reference_are_bounded_and_warned_about(task, caplog):
    file = task.folder / "patches.json"
    bare = [{"volume_idx": k % 2, "start_pos": [k, 8 * k, 0]} for k in range(6)]
    file.write_text(json.dumps(bare))
    out = patch_list(task())
    assert out.starts.tolist() == [p["start_pos"] for p in bare] and out.volume_idx.tolist() == [0, 1] * 3
    assert "a bare list of the reference" in caplog.text and json.loads(file.read_text()) == bare
    for wrong, words in (
        ({"volume_idx": 2, "start_pos": [0, 0, 0]}, "volume_idx below 2"),
        ({"volume_idx": 0, "start_pos": [0, 65, 0]}, "leaves volume 'a'"),
        ({"volume_idx": 0, "start_pos": [-1, 0, 0]}, "leaves volume 'a'"),
        ({"volume_idx": 0, "start_pos": [0, 0]}, "three numbers"),
        ({"volume_idx": True}, "volume_idx"),
        ({"volume_idx": 0, "start_pos": [0, 0.5, 0]}, "three numbers"),
        (3, "volume_idx"),
    ):
        file.write_text(json.dumps([*bare, wrong]))
        with pytest.raises((DataError, FormatError), match=f"entry 6.*{words}"):
            patch_list(task())


def test_a_cache_is_old_or_new_wherever_its_writer_dies(task):
    patch_list(task())
    file, cfg = task.folder / "patches.json", task(dataset_config__min_labeled_ratio=0.05)
    old = file.read_bytes()
    steps = forked(lambda: patch_list(cfg), task.folder)
    new = file.read_bytes()
    assert steps > 3 and new != old
    last = [n for n in range(1, steps + 1)][-12:]
    for at in last:
        file.write_bytes(old)
        assert forked(lambda: patch_list(cfg), task.folder, at=at) == -9
        assert file.read_bytes() in (old, new)
    patch_list(cfg)
    assert file.read_bytes() == new and not [n for n in os.listdir(task.folder) if n.startswith(".mvtmp")]


# ------------------------------------------------------------------------------------------------------------ split


def dense(shape=(64, 192, 192), patch=(16, 32, 32), n_volumes=1):
    starts = np.array(list(itertools.product(*(range(0, n - p + 1, p // 2) for n, p in zip(shape, patch)))))
    idx = np.repeat(np.arange(n_volumes), len(starts))
    return PatchList(
        patch, tuple("ab"[:n_volumes]), idx, np.tile(starts, (n_volumes, 1)), np.ones(len(idx), int), np.ones(len(idx))
    )


def painted(patches, side, shape, n=2):
    out = np.zeros((n, *shape), bool)
    for k in side:
        out[(patches.volume_idx[k], *(slice(s, s + p) for s, p in zip(patches.starts[k], patches.patch_size)))] = True
    return out


@pytest.mark.parametrize("seed", range(6))
def test_U07_B8_no_voxel_is_shared_and_the_split_stays(task, seed):
    patches = dense(n_volumes=2)
    patches = patches.take(rng_for(seed, "thin").random(len(patches)) < 0.8)
    cfg = task(tr_params__seed=seed, tr_params__val_block=[32, 64, 64])
    split = split_patches(patches, cfg)
    train, val = (painted(patches, side, (64, 192, 192)) for side in (split.train, split.val))
    assert not (train & val).any() and len(split.val) and len(split.train) > len(split.val)
    assert len(split.train) + len(split.val) + split.dropped == len(patches)
    assert len(split.val) >= 0.2 * (len(split.val) + len(split.train))
    again = split_patches(patches, cfg)
    assert again.hash == split.hash and np.array_equal(again.val, split.val)
    assert (
        split_patches(patches, task(tr_params__seed=seed + 100, tr_params__val_block=[32, 64, 64])).hash != split.hash
    )


def test_U07_random_split_leaks(task, caplog):
    "What the block split is there for: with random patches nearly all validation voxels are training voxels"
    patches = dense()
    split = split_patches(patches, task(tr_params__val_split_mode="random"))
    train, val = (painted(patches, side, (64, 192, 192), 1) for side in (split.train, split.val))
    assert (train & val).sum() > 0.9 * val.sum() and "validates with voxels that are trained on" in caplog.text
    assert len(split.val) == round(0.2 * len(patches)) and split.dropped == 0


def test_volumes_of_one_input_share_their_blocks(task):
    patches = dense(n_volumes=2)
    twice = [{"input": "a.zarr", "sheet": "a_sheet.zarr", "name": n} for n in "ab"]
    split = split_patches(patches, task(twice, tr_params__val_block=[32, 64, 64]))
    train, val = (painted(patches, side, (64, 192, 192)).any(axis=0) for side in (split.train, split.val))
    assert not (train & val).any() and len(split.val)


def test_split_by_volume(task):
    patches, both = dense(n_volumes=2), entries()
    marked = [{**both[0], "split": "train"}, {**both[1], "split": "val"}]
    split = split_patches(patches, task(marked, tr_params__val_split_mode="volume"))
    assert (
        set(patches.volume_idx[split.train]) == {0} and set(patches.volume_idx[split.val]) == {1} and not split.dropped
    )
    twice = [{**both[0], "split": "train", "name": "x"}, {**both[0], "split": "val", "name": "y"}]
    with pytest.raises(ConfigError, match="is an input of train and of val"):
        split_patches(patches, task(twice, tr_params__val_split_mode="volume"))
    halves = [{**e, "bbox": [[0, 64], [0, 192], x]} for e, x in zip(twice, ([0, 96], [96, 192]), strict=True)]
    split = split_patches(patches, task(halves, tr_params__val_split_mode="volume"))
    assert len(split.train) and len(split.val)
    halves[1]["bbox"][2][0] = 95
    with pytest.raises(ConfigError, match="a bbox each that do not meet"):
        split_patches(patches, task(halves, tr_params__val_split_mode="volume"))


def test_no_validation_and_impossible_splits(task):
    patches = dense((16, 64, 64))
    split = split_patches(patches, task(tr_params__tr_val_split=1.0))
    assert len(split.train) == len(patches) and not len(split.val)
    with pytest.raises(DataError, match="smaller val_block"):
        split_patches(patches, task(tr_params__val_block=[64, 64, 64]))
    small = split_patches(patches, task())
    assert small.block == (16, 32, 32) and len(small.val) and len(small.train)


def test_grouped_order_is_a_seeded_permutation_of_neighbours():
    patches = dense()
    index = np.flatnonzero(rng_for(0, "some").random(len(patches)) < 0.5)
    order = grouped_order(patches, index, (32, 64, 64), rng_for(1, "order"))
    assert sorted(order) == index.tolist() and not np.array_equal(order, index)
    assert np.array_equal(order, grouped_order(patches, index, (32, 64, 64), rng_for(1, "order")))
    group = [tuple(g) for g in patches.starts[order] // np.array([32, 64, 64])]
    assert sum(a != b for a, b in zip(group, group[1:])) == len(set(group)) - 1


# ---------------------------------------------------------------------------------------------------------- command


def test_command_finds_divides_and_writes(task):
    cfg = task()
    dry = find_patches_command(task.folder / "task.json", dry_run=True)
    assert dry["volumes"]["a"]["stored_chunks"] and not (task.folder / "patches.json").exists()
    out = find_patches_command(task.folder / "task.json", workers=1)
    patches = patch_list(cfg)
    split, stored = split_patches(patches, cfg), json.loads((task.folder / "patches_split.json").read_text())
    assert (
        out["patches"] == len(patches) == sum(out["volumes"].values())
        and out["split_hash"] == split.hash == stored["hash"]
    )
    assert stored["val"] == [[patches.names[patches.volume_idx[k]], *patches.starts[k].tolist()] for k in split.val]
    assert len(stored["train"]) == out["train"] == len(split.train)
    changed = find_patches_command(task.folder / "task.json", overrides=["tr_params.tr_val_split=1"])
    assert changed["val"] == 0 and changed["patches"] == out["patches"]


def test_real_labels(data_dir):
    "Mitochondria of a fly's nerve cord: the reference's list"
    path = data_dir / "zarr_multitask" / "vnc_a.zarr" / "mitochondria"
    found = find_patches(
        open_volume(path), (16, 96, 96), min_bbox_percent=0.5, min_labeled_ratio=0.05, grid_origin="label_bbox"
    )
    assert found.starts.tolist() == places(
        literal_patches(np.asarray(zarr.open(str(path))[...]), (16, 96, 96), 0.5, 0.05)
    )
    assert len(found) > 5
