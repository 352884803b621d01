"""Samples from chunked stores: the same for every format, worker and start method; normalisation; order of patches."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from medvol_nb import phantoms
from medvol_nb.config import check_config
from medvol_nb.core import ConfigError, DataError, rng_for
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.intensity import Normalizer
from medvol_nb.stores import write_ome_zarr, write_zarr
from medvol_nb.torchcore import Batches
from medvol_nb.zarrnet import io as zarr_io
from medvol_nb.zarrnet.augment import Augment
from medvol_nb.zarrnet.config import ZarrConfig
from medvol_nb.zarrnet.data import GroupedBatches, ImageNormalizer, VolumeDataset, fit_normalizer, fit_volume
from medvol_nb.zarrnet.geometry import angle_between, boundary_normals, encode_normals, gradient
from medvol_nb.zarrnet.io import open_volume
from medvol_nb.zarrnet.patches import PatchList, patch_list, split_patches

ROOT = Path(__file__).resolve().parents[1]
AFFINE = affine_from(1.0, axes="zyx")
SHAPE, PATCH = (24, 48, 40), (8, 16, 16)


def save(path, array, **settings):
    write_zarr(Volume(array, AFFINE, "czyx" if array.ndim == 4 else "zyx"), path, **{"chunks": 16} | settings)
    return str(path)


def roll_entry(folder, name="a", seed=0, shape=SHAPE, **settings):
    roll = phantoms.sheets(shape, seed, pitch=12, thickness=4)
    folder = Path(folder)
    return {"input": save(folder/f"{name}.zarr", roll.img, **settings), "name": name,
            "sheet": save(folder/f"{name}_sheet.zarr", roll.mask, **settings),
            "normals": save(folder/f"{name}_normals.zarr", encode_normals(roll.normals[::-1]), **settings)}


def make_cfg(entries, tr=None, targets=None, **dataset):
    targets = targets or {"sheet": {"channels": 1}, "normals": {"channels": 3}}
    entries = [{k: v for k, v in e.items() if k not in ("sheet", "normals") or k in targets} for e in entries]
    return check_config(ZarrConfig, {
        "tr_params": {"patch_size": list(PATCH), "dilate_label": False, **(tr or {})},
        "model_config": {"f_maps": [8, 16]},
        "dataset_config": {"volume_paths": entries, "targets": targets, "use_cache": False, "min_bbox_percent": 0.2,
                           "min_labeled_ratio": 0.02, **dataset}})


def listing(cfg, starts, volume_idx=None, counts=None):
    starts = np.asarray(starts, np.int64).reshape(-1, 3)
    n = len(starts)
    idx = np.zeros(n, np.int64) if volume_idx is None else np.asarray(volume_idx)
    return PatchList(cfg.tr_params.patch_size, tuple(e.name for e in cfg.volumes), idx, starts,
                     np.full(n, -1) if counts is None else np.asarray(counts), np.full(n, np.nan))


def arrays(sample):
    return {k: np.asarray(v) for k, v in sample.items() if k != "meta"}


def same(a, b):
    a, b = arrays(a), arrays(b)
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rolls")
    cfg = make_cfg([roll_entry(folder, "a", 0), roll_entry(folder, "b", 1, (24, 40, 48))])
    return cfg, patch_list(cfg)


# -------------------------------------------------------------------------------------------------------- samples

def test_a_sample_is_the_stored_crop(two):
    cfg, patches = two
    data = VolumeDataset(cfg, patches)
    kinds = {"image": np.float32, "sheet": np.float32, "sheet__mask": np.uint8, "normals": np.float32,
             "normals__mask": np.uint8}
    for i in (0, len(data)//2, len(data) - 1):
        sample, (v, start) = data[i], (patches.volume_idx[i], patches.starts[i])
        roll = phantoms.sheets(*((SHAPE, 0), ((24, 40, 48), 1))[v], pitch=12, thickness=4)
        box = tuple(slice(s, s + n) for s, n in zip(start, PATCH))
        assert {k: a.dtype for k, a in arrays(sample).items()} == kinds
        np.testing.assert_array_equal(sample["sheet"][0], roll.mask[box])
        assert np.nanmax(angle_between(sample["normals"], roll.normals[::-1][(slice(None), *box)])) < 0.002
        np.testing.assert_array_equal(sample["normals__mask"][0], roll.mask[box])
        np.testing.assert_allclose(sample["image"][0], (roll.img[box] - roll.img.mean())/roll.img.std(), atol=1e-5)
        assert sample["meta"]["volume"] == "ab"[v] and sample["meta"]["start"].tolist() == start.tolist()
        assert data.keys[i] == f"{'ab'[v]} at {tuple(start.tolist())}"


def test_U06_validation_is_not_augmented_and_training_is(two):
    cfg, patches = two
    train = VolumeDataset(cfg, patches, augment=Augment(None, {"sheet": "binary", "normals": "normals"}))
    val = VolumeDataset(cfg, patches, normalizer=train.normalizer)
    for i in range(3):
        assert same(val.draw(i, rng_for(1)), val[i]) and same(val.draw(i, rng_for(2)), train[i])
        assert not same(train.draw(i, rng_for(1)), train.draw(i, rng_for(2)))


def test_a_sample_can_be_made_again_from_its_meta(two):
    cfg, patches = two
    data = VolumeDataset(cfg, patches, augment=Augment(None, {"sheet": "binary", "normals": "normals"}))
    first = data.draw(5, rng_for(0, "item", 3, 5))
    for _ in range(3): data.draw(2, rng_for(9))
    assert same(first, data.sample(5, first["meta"]["seed"])) and same(first, data.draw(5, rng_for(0, "item", 3, 5)))


def test_index_chooses_and_does_not_change_samples(two):
    cfg, patches = two
    whole, part = VolumeDataset(cfg, patches), VolumeDataset(cfg, patches, [7, 3, 3])
    assert len(part) == 3 and all(same(part[i], whole[k]) for i, k in enumerate((7, 3, 3)))
    assert part.keys == [whole.keys[k] for k in (7, 3, 3)]


def test_B8_training_and_validation_share_no_voxel(two):
    cfg, patches = two
    split = split_patches(patches, cfg)
    seen = []
    for index in (split.train, split.val):
        data, voxels = VolumeDataset(cfg, patches, index), set()
        for i in range(len(data)):
            meta = data[i]["meta"]
            z, y, x = meta["start"]
            voxels |= {(meta["volume"], *k) for k in np.ndindex(PATCH) for k in [(z + k[0], y + k[1], x + k[2])]}
        seen.append(voxels)
    assert seen[0] and seen[1] and not seen[0] & seen[1]
    again = split_patches(patch_list(cfg), cfg)
    assert again.hash == split.hash and again.train.tolist() == split.train.tolist()


@pytest.mark.parametrize("starts", [[(0, 0, 0)], [(0, -3, 5)], [(0, 3, 34)]])
def test_small_volumes_are_mirrored_with_mask_zero(tmp_path, starts):
    shape = (5, 12, 40)
    cfg = make_cfg([roll_entry(tmp_path, shape=shape)], {"pad_small": True})
    sample = VolumeDataset(cfg, listing(cfg, starts))[0]
    roll = phantoms.sheets(shape, 0, pitch=12, thickness=4)
    low = [max(0, -s) for s in starts[0]]
    high = [min(p, n - s) for p, n, s in zip(PATCH, shape, starts[0])]
    inside = np.zeros(PATCH, bool)
    inside[tuple(map(slice, low, high))] = True
    np.testing.assert_array_equal(sample["sheet__mask"][0], inside)
    pad = [(a, p - b) for a, b, p in zip(low, high, PATCH)]
    crop = roll.img[tuple(slice(s + a, s + b) for s, a, b in zip(starts[0], low, high))]
    expected = (np.pad(crop, pad, "reflect") - roll.img.mean())/roll.img.std()
    np.testing.assert_allclose(sample["image"][0], expected, atol=1e-5)
    assert not sample["normals__mask"][0][~inside].any()


def test_missing_targets_and_ignore_masks(tmp_path):
    a, b = roll_entry(tmp_path, "a"), roll_entry(tmp_path, "b", 1)
    unknown = np.zeros(SHAPE, np.uint8)
    unknown[:, 20:] = 3
    a["ignore_mask"], b["normals"] = save(tmp_path/"ignore.zarr", unknown), None
    targets = {"sheet": {"channels": 1}, "normals": {"channels": 3}}
    cfg = make_cfg([a, b], targets=targets, allow_missing_targets=True)
    data = VolumeDataset(cfg, listing(cfg, [(0, 12, 0), (0, 12, 0)], [0, 1]))
    np.testing.assert_array_equal(data[0]["sheet__mask"][0], np.broadcast_to(np.arange(16)[:, None] < 8, PATCH))
    assert not data[0]["normals__mask"][0, :, 8:].any() and data[0]["normals__mask"].any()
    assert data[1]["normals"].shape == (3, *PATCH) and not data[1]["normals"].any()
    assert not data[1]["normals__mask"].any() and data[1]["sheet__mask"].all()


def test_U13_several_input_channels_and_channels_last(tmp_path):
    entry = roll_entry(tmp_path)
    roll = phantoms.sheets(SHAPE, 0, pitch=12, thickness=4)
    image = np.stack([roll.img, 255 - roll.img//2, roll.img//3 + 7], -1)
    group = zarr.open_group(str(tmp_path/"last.zarr"), mode="w")
    for name, value in (("image", image), ("normals", np.moveaxis(encode_normals(roll.normals[::-1], "uint8"), 0, -1))):
        group.create_array(name, shape=value.shape, dtype=value.dtype, chunks=(8, 16, 16, 3))[...] = value
    entry |= {"input": str(tmp_path/"last.zarr"/"image"), "normals": str(tmp_path/"last.zarr"/"normals")}
    sample = VolumeDataset(c := make_cfg([entry], in_channels=3), listing(c, [(4, 8, 8)]))[0]
    box = (slice(4, 12), slice(8, 24), slice(8, 24))
    assert sample["image"].shape == (3, *PATCH)
    for c in range(3):
        expected = (image[..., c][box] - image[..., c].mean())/image[..., c].std()
        np.testing.assert_allclose(sample["image"][c], expected, atol=1e-5)
    assert np.nanmax(angle_between(sample["normals"], roll.normals[::-1][(slice(None), *box)])) < 0.4
    with pytest.raises(ConfigError, match="last axis of 24 x 48 x 40 x 3 can be the 2 channels"):
        VolumeDataset(c := make_cfg([entry], in_channels=2), listing(c, [(0, 0, 0)]))


@pytest.mark.parametrize("change, message", [
    (lambda c, p: ({}, p.take(np.zeros(0, int))), "no patches were chosen"),
    (lambda c, p: ({"index": [0, 10**6]}, p), "index must lie in 0"),
    (lambda c, p: ({}, listing(c, [(20, 0, 0)])), "1 patches do not fit their volumes, such as a at \\(20, 0, 0\\)"),
    (lambda c, p: ({}, listing(c, [(-1, 0, 0)])), "do not fit"),
    (lambda c, p: ({"augment": Augment(None, {"sheet": "binary"})}, p), "was made for targets"),
    (lambda c, p: ({}, PatchList((8, 16, 8), p.names, p.volume_idx, p.starts, p.counts, p.bbox_frac)),
     "the patches are \\(8, 16, 8\\)")])
def test_what_does_not_fit_is_refused_at_once(two, change, message):
    settings, patches = change(*two)
    with pytest.raises((DataError, ConfigError), match=message): VolumeDataset(two[0], patches, **settings)


def test_wrong_labels_name_volume_and_target(tmp_path):
    entry = roll_entry(tmp_path)
    lbl = np.zeros(SHAPE, np.uint8)
    lbl[:2] = 7
    cfg = make_cfg([{**entry, "tissue": save(tmp_path/"t.zarr", lbl)}],
                   targets={"tissue": {"channels": 3, "activation": "softmax"}})
    with pytest.raises(DataError, match="volume 'a', target 'tissue': class 7, but channels is 3"):
        VolumeDataset(cfg, listing(cfg, [(0, 0, 0)]))
    later = VolumeDataset(cfg, listing(cfg, [(8, 0, 0), (0, 0, 0)]))  # seen when it is read
    with pytest.raises(DataError, match="volume 'a', target 'tissue': class 7"): later[1]


def test_weights(tmp_path):
    entries = [roll_entry(tmp_path, "a") | {"weight": 3.0}, roll_entry(tmp_path, "b", 1)]
    cfg = make_cfg(entries)
    places = listing(cfg, [(0, 0, 0)]*3, [0, 1, 1], [10, 30, 0])
    np.testing.assert_allclose(VolumeDataset(cfg, places).weights, [0.6, 0.2, 0.2])
    half = make_cfg(entries, {"oversample_foreground": 0.5})
    np.testing.assert_allclose(VolumeDataset(half, places).weights, [0.3 + 0.25, 0.1 + 0.25, 0.1])
    equal = make_cfg([entries[1], {**entries[1], "name": "c"}])
    assert VolumeDataset(equal, places).weights is None
    none = make_cfg([{**e, "weight": 0} for e in entries])
    with pytest.raises(ConfigError, match="weights of all volumes"): _ = VolumeDataset(none, places).weights


# ------------------------------------------------------------------------------------- formats, workers, handles

def test_B10_every_format_gives_identical_samples(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    roll = phantoms.sheets((40, 72, 70), 3, pitch=14)  # more than one block of the statistics
    def write(name):
        paths = {}
        for key, array in (("image", roll.img), ("sheet", roll.mask)):
            vol, path = Volume(array, AFFINE, "zyx"), tmp_path/f"{name}_{key}"
            if name == "v2": write_zarr(vol, path, chunks=16, version=2)
            elif name == "v3": write_zarr(vol, path, chunks=(16, 24, 32))
            elif name == "shard": write_zarr(vol, path, chunks=8, shards=(16, 16, 16))
            elif name.startswith("ome"):
                write_ome_zarr(vol, path, version=f"0.{name[-1]}", chunks=16, labels=key == "sheet")
            elif name == "tif": tifffile.imwrite(path.with_suffix(".tif"), array)
            elif name == "packed": tifffile.imwrite(path.with_suffix(".tif"), array, compression="zlib")
            else:
                path.mkdir()
                for k, page in enumerate(array): tifffile.imwrite(path/f"{k:03}.tif", page)
            paths[key] = str(path.with_suffix(".tif") if name in ("tif", "packed") else path)
        return {"input": paths["image"], "sheet": paths["sheet"], "name": "roll"}
    samples = {}
    for name in ("v2", "v3", "shard", "ome4", "ome5", "tif", "packed", "slices"):
        cfg = make_cfg([write(name)], {"dilate_label": 2}, targets={"sheet": {"channels": 1}})
        data = VolumeDataset(cfg, listing(cfg, [(3, 5, 7), (32, 56, 54)]),
                             normalizer=fit_normalizer(cfg, min_voxels=50000),
                             augment=Augment(None, {"sheet": "binary"}))
        samples[name] = [data[0], data[1], data.draw(1, rng_for(4))]
    for name, got in samples.items():
        assert all(same(a, b) for a, b in zip(got, samples["v2"])), name


SCRIPT = """
import hashlib, sys
import numpy as np, torch
from medvol_nb.zarrnet.augment import Augment
from medvol_nb.zarrnet.config import ZarrConfig
from medvol_nb.zarrnet.data import GroupedBatches, VolumeDataset
from medvol_nb.zarrnet.patches import patch_list
from medvol_nb.torchcore import Batches, _Keyed

def digest(batches):
    h = hashlib.sha256()
    for b in batches:
        for k in sorted(b):
            if k != "meta": h.update(k.encode() + b[k].numpy().tobytes())
        h.update(repr((b["meta"]["volume"], b["meta"]["start"].tolist(), b["meta"]["seed"].tolist())).encode())
    return h.hexdigest()

if __name__ == "__main__":
    cfg = ZarrConfig.load(sys.argv[1])
    patches = patch_list(cfg)
    augment = Augment(None, {n: t.kind for n, t in cfg.targets.items()})
    for reader in ("zarr", "auto"):
        data = VolumeDataset(cfg, patches, augment=augment, reader=reader, cache_bytes=2**20)
        data[0]  # the parent reads before it starts children: event loops and thread pools are alive
        keys = [[(1, int(i)) for i in row] for row in Batches(data, 3, seed=7).order(1)[:4]]
        print(reader, "serial", digest(b for _, b in zip(range(4), (b for _, b in Batches(data, 3, seed=7).epoch(1)))))
        for method in ("fork", "spawn", "forkserver"):
            for workers in (1, 2):
                loader = torch.utils.data.DataLoader(_Keyed(data, 7), batch_sampler=keys, num_workers=workers,
                                                     multiprocessing_context=method)
                print(reader, method, workers, digest(loader))
"""


@pytest.mark.slow
def test_B9_epochs_are_bitwise_equal_for_all_workers_and_start_methods(tmp_path):
    "In a process of its own, which is ended if it hangs: fork after reading is the known deadlock"
    entries = [roll_entry(tmp_path, "a"), roll_entry(tmp_path, "b", 1)]
    (tmp_path/"task.json").write_text(json.dumps(make_cfg(entries).to_dict()))
    (tmp_path/"script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, str(tmp_path/"script.py"), str(tmp_path/"task.json")], env=env, text=True,
                         capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 14 and len({line[-1] for line in lines}) == 1, run.stdout


def test_B9_workers_do_not_change_batches(two):
    cfg, patches = two
    data = VolumeDataset(cfg, patches, augment=Augment(None, {"sheet": "binary", "normals": "normals"}))
    data[0]
    for kind in (Batches, GroupedBatches):
        serial, parallel = ([(i, b) for _, (i, b) in zip(range(3), kind(data, 2, seed=3, workers=w).epoch(2))]
                            for w in (0, 2))
        for (i, a), (j, b) in zip(serial, parallel):
            assert i == j and all((a[k] == b[k]).all() for k in a if k != "meta")


def test_U20_arrays_are_opened_once_and_not_for_every_sample(two, monkeypatch):
    cfg, patches = two
    opened, make = [], zarr_io._HANDLES["zarr"]
    def counting(**spec):
        opened.append(spec["where"])
        return make(**spec)
    monkeypatch.setitem(zarr_io._HANDLES, "zarr", counting)
    data = VolumeDataset(cfg, patches)
    for i in range(len(data)): data[i]
    assert len(opened) == len(set(opened)) == 6


def test_U28_B12_grouped_patches_hit_a_small_cache(tmp_path, monkeypatch):
    "Chunks decoded with a cache of a quarter of the volume: grouped order against random order and no cache"
    shape = (32, 96, 96)
    img = phantoms.sheets(shape, 0, pitch=12).img
    cfg = make_cfg([{"input": save(tmp_path/"a.zarr", img), "sheet": save(tmp_path/"s.zarr", img)}],
                   targets={"sheet": {"channels": 1}})
    starts = [(z, y, x) for z in range(0, 25, 4) for y in range(0, 81, 8) for x in range(0, 81, 8)]
    decoded, chunk = [0], zarr_io._Kept._chunk
    def counting(self, key, low):
        decoded[0] += key not in self.held
        return chunk(self, key, low)
    monkeypatch.setattr(zarr_io._Kept, "_chunk", counting)
    counts = {}
    for name, kind, cache in (("random", Batches, 2), ("grouped", GroupedBatches, 2*img.nbytes//4)):
        data = VolumeDataset(cfg, listing(cfg, starts), cache_bytes=cache, reader="zarr",
                             normalizer=ImageNormalizer("none"))
        batches = kind(data, 2)
        assert sorted(batches.order(0).ravel()) == sorted(set(batches.order(0).ravel()))
        decoded[0] = 0
        for row in batches.order(0):
            for i in row: data[int(i)]
        counts[name] = decoded[0]
    assert counts["random"] > 3*counts["grouped"], counts


@pytest.mark.parametrize("world", [1, 2])
def test_grouped_order_is_a_permutation_with_groups_apart_in_a_batch(two, world):
    cfg, patches = two
    data = VolumeDataset(cfg, patches)
    grouped, plain = GroupedBatches(data, 3, seed=5), Batches(data, 3, seed=5)
    a, b = grouped.order(4, world), plain.order(4, world)
    assert a.shape == b.shape and sorted(a.ravel()) == sorted(b.ravel())
    np.testing.assert_array_equal(a, GroupedBatches(data, 3, seed=5, workers=2).order(4, world))
    assert not np.array_equal(a, grouped.order(5, world))
    weighted = GroupedBatches(data, 2, weights=np.arange(len(data))).order(0)
    assert weighted.shape == (len(data)//2, 2) and 0 not in weighted
    with pytest.raises(ConfigError, match="block must be >= 1"): GroupedBatches(data, block=(0, 4, 4))


# --------------------------------------------------------------------------------------------------- normalisation

def test_schemes_on_a_volume_that_is_read_whole(two):
    cfg, _ = two
    roll = phantoms.sheets(SHAPE, 0, pitch=12, thickness=4)
    patch = roll.img[2:10, 5:20, 7:30]
    wide = roll.img.astype(np.float64)
    low, high = np.percentile(wide, [1, 99])
    on = np.concatenate([r.img[r.mask > 0] for r in (roll, phantoms.sheets((24, 40, 48), 1, pitch=12, thickness=4))])
    expected = {"none": patch, "scale": patch/255, "minmax": (patch - wide.min())/np.ptp(wide),
                "zscore": (patch - wide.mean())/wide.std(), "zscore_patch": (patch - patch.mean())/patch.std(),
                "robust": np.clip((patch - low)/(high - low), 0, 1),
                "ct_normalization": (np.clip(patch, *np.percentile(on, [0.5, 99.5])) - on.mean())/on.std()}
    for scheme, value in expected.items():
        n = fit_normalizer(cfg.model_copy(update={"dataset_config": cfg.dataset_config.model_copy(
            update={"normalization": scheme})}))
        out = n(patch, "a")
        assert out.shape == (1, *patch.shape) and out.dtype == np.float32
        np.testing.assert_allclose(out[0], value, atol=2e-5, err_msg=scheme)
        back = ImageNormalizer.from_dict(json.loads(json.dumps(n.to_dict())))
        assert back == n and np.array_equal(back(patch, "a"), out)


def test_U04_scaling_of_integers_happens():
    "Upstream cast to float before it looked at the type, so the branch that scales never ran"
    assert ImageNormalizer("scale")(np.full((1, 1, 1), 255, np.uint8)).item() == 1
    assert ImageNormalizer("scale")(np.full((1, 1, 1), 65535, np.uint16)).item() == 1


def test_U18_prediction_uses_the_statistics_of_training(two):
    cfg, patches = two
    data = VolumeDataset(cfg, patches)
    stored = ImageNormalizer.from_dict(json.loads(json.dumps(data.normalizer.to_dict())))
    v, start = patches.volume_idx[4], patches.starts[4]
    raw, _ = open_volume(cfg.volumes[v].input).read(start, PATCH)
    np.testing.assert_array_equal(stored(raw, cfg.volumes[v].name), data[4]["image"])
    with pytest.raises(DataError, match="no statistics of volume 'new'"): stored(raw, "new")
    more = stored.with_volume("new", open_volume(cfg.volumes[v].input))
    np.testing.assert_array_equal(more(raw, "new"), data[4]["image"])
    assert ImageNormalizer("scale").with_volume("new", None) == ImageNormalizer("scale")


def test_the_same_voxel_has_the_same_value_in_every_patch(two):
    "The reason why zscore_patch is for compatibility only"
    cfg, _ = two
    places = listing(cfg, [(0, 0, 0), (4, 8, 8)])
    shared = [(slice(None), slice(z, z + 4), slice(y, y + 8), slice(y, y + 8)) for z, y in ((4, 8), (0, 0))]
    a, b = (VolumeDataset(cfg, places)[i]["image"][s] for i, s in enumerate(shared))
    np.testing.assert_array_equal(a, b)
    old = make_cfg([{**e.paths, "input": e.input, "name": e.name} for e in cfg.volumes], normalization="zscore_patch")
    a, b = (VolumeDataset(old, places)[i]["image"][s] for i, s in enumerate(shared))
    assert np.abs(a - b).max() > 0.01


def test_statistics_of_a_huge_empty_volume_come_from_what_is_stored(tmp_path):
    array = zarr.create_array(str(tmp_path/"huge.zarr"), shape=(2048,)*3, chunks=(64,)*3, dtype="uint8")
    value = rng_for(0).integers(50, 200, (64, 64, 64), dtype=np.uint8)
    for k in range(3): array[64*k:64*k + 64, 640:704, 1280:1344] = value + k
    n, = fit_volume(open_volume(tmp_path/"huge.zarr"), "zscore")
    assert n.stats["n"] == 3*64**3 and n.stats["mean"] == pytest.approx(value.mean() + 1, abs=1e-6)
    empty = zarr.create_array(str(tmp_path/"empty.zarr"), shape=(512,)*3, chunks=(64,)*3, dtype="uint8", fill_value=9)
    assert fit_volume(open_volume(tmp_path/"empty.zarr"), "zscore", min_voxels=10**5)[0].stats["mean"] == 9
    assert not ImageNormalizer("zscore", {"a": (n,)})(np.full((4, 4, 4), round(n.stats["mean"])), "a").round().any()
    del empty


def test_statistics_depend_on_bbox_and_seed_and_not_on_workers(tmp_path):
    img = (np.indices((96, 96, 96)).sum(0)//2).astype(np.uint8)
    entry = {"input": save(tmp_path/"a.zarr", img), "sheet": save(tmp_path/"s.zarr", (img > 70).astype(np.uint8))}
    boxed = {**entry, "name": "boxed", "bbox": [[0, 32], [10, 60], [0, 96]]}
    cfg = make_cfg([{**entry, "name": "all"}, boxed], targets={"sheet": {"channels": 1}})
    n = fit_normalizer(cfg)
    assert n.volumes["all"][0].stats["mean"] == pytest.approx(img.mean())
    assert n.volumes["boxed"][0].stats["mean"] == pytest.approx(img[:32, 10:60].mean())
    assert fit_normalizer(cfg, workers=2) == n
    a, b = (fit_volume(open_volume(entry["input"]), "zscore", seed=s, min_voxels=10**5)[0].stats for s in (0, 1))
    assert 10**5 <= a["n"] < img.size and a != b
    assert a == fit_volume(open_volume(entry["input"]), "zscore", seed=0, min_voxels=10**5)[0].stats


def test_ct_statistics_come_from_training_foreground_without_ignored_voxels(tmp_path):
    img = rng_for(0).integers(0, 100, (3, 16, 16, 16)).astype(np.int16) + np.array([0, 1000, 5000]).reshape(3, 1, 1, 1)
    lbl = (img % 3 == 0).astype(np.uint8)
    lbl[:, :4] = 200
    entries = [{"input": save(tmp_path/f"{k}.zarr", img[k].astype(np.int16)), "name": str(k), "split": s,
                "sheet": save(tmp_path/f"{k}s.zarr", lbl[k])} for k, s in enumerate(("train", "train", "val"))]
    cfg = make_cfg(entries, {"patch_size": [8, 8, 8], "ignore_label": 200}, {"sheet": {"channels": 1}},
                   normalization="ct_normalization")
    chosen = [img[k][(lbl[k] == 1)] for k in range(3)]
    assert fit_normalizer(cfg).shared[0].stats["mean"] == pytest.approx(np.concatenate(chosen[:2]).mean())
    assert fit_normalizer(cfg, [2]).shared[0].stats["mean"] == pytest.approx(chosen[2].mean())
    data = VolumeDataset(cfg, listing(cfg, [(0, 0, 0)], [1]))
    assert data.normalizer.shared[0].stats["mean"] == pytest.approx(chosen[1].mean())
    save(tmp_path/"none.zarr", np.zeros((16, 16, 16), np.uint8))
    bare = make_cfg([{**entries[0], "sheet": str(tmp_path/"none.zarr")}], {"patch_size": [8, 8, 8]},
                    {"sheet": {"channels": 1}}, normalization="ct_normalization")
    with pytest.raises(DataError, match="no foreground in \\['0'\\]"): fit_normalizer(bare)


def test_normalizer_errors():
    with pytest.raises(ConfigError, match="must be one of none"): ImageNormalizer.from_dict({"scheme": "z"})
    with pytest.raises(ConfigError, match="only zscore, minmax and robust"):
        fit_volume(open_volume(np.zeros((4,)*3)), "scale")
    two_channels = ImageNormalizer("zscore", {"a": (Normalizer.parse("zscore"),)*2})
    with pytest.raises(DataError, match="fitted to 2 channels, got 1"): two_channels(np.zeros((4, 4, 4)), "a")


# -------------------------------------------------------------------------------------------------------- real data

def test_real_ovule_walls_and_their_normals(data_dir, tmp_path):
    "The demonstration's task: walls of cells and their axial normals, from instance labels"
    group = zarr.open(str(data_dir/"zarr_multitask"/"ovule.zarr"), mode="r")
    wall, normals = boundary_normals(group["label"][:], sigma=(1, 1.5, 1.5))
    entry = {"input": str(data_dir/"zarr_multitask"/"ovule.zarr"/"raw"), "sheet": save(tmp_path/"wall.zarr", wall),
             "normals": save(tmp_path/"n.zarr", encode_normals(normals)), "name": "ovule"}
    cfg = make_cfg([entry], {"patch_size": [16, 64, 64]})
    data = VolumeDataset(cfg, patch_list(cfg), augment=Augment(None, {"sheet": "binary", "normals": "normals"}))
    assert len(data) > 8
    for i in range(0, len(data), 3):
        plain, moved = data[i], data.draw(i, rng_for(i))
        for s in (plain, moved): np.testing.assert_array_equal(s["normals__mask"], s["sheet"].astype(np.uint8))
        slope = gradient(plain["image"][0].astype(np.float64))
        across = ((slope*plain["normals"]).sum(0)**2).sum()/((slope**2).sum(0)*plain["sheet"][0]).sum()
        assert across > 0.45, "the image varies along normals; a random direction would give a third"


def test_real_membranes_with_classes_and_unknown(data_dir):
    "Electron microscopy, zarr v2: membranes as a mask, structure codes as classes are refused by name"
    store = data_dir/"zarr_multitask"/"vnc_a.zarr"
    entry = {"input": str(store/"raw"), "membranes": str(store/"membranes"), "mitochondria": str(store/"mitochondria")}
    targets = {"membranes": {"channels": 1, "dilate_label": 2}, "mitochondria": {"channels": 1}}
    cfg = make_cfg([entry], {"patch_size": [16, 64, 64]}, targets)
    data = VolumeDataset(cfg, patch_list(cfg))
    sample = data[len(data)//2]
    stored = zarr.open(str(store), mode="r")
    box = tuple(slice(s, s + n) for s, n in zip(sample["meta"]["start"], (16, 64, 64)))
    assert set(np.unique(sample["mitochondria"])) <= {0, 1}
    assert sample["membranes"].mean() > stored["membranes"][box].mean()
    np.testing.assert_array_equal(sample["mitochondria"][0], stored["mitochondria"][box] > 0)
    assert abs(sample["image"].mean()) < 1.5 and math.isfinite(float(sample["image"].std()))
    codes = make_cfg([{"input": entry["input"], "codes": str(store/"labels")}], {"patch_size": [16, 64, 64]},
                     {"codes": {"channels": 9, "activation": "softmax"}})
    with pytest.raises(DataError, match="target 'codes': class 255, but channels is 9"):
        VolumeDataset(codes, listing(codes, [(0, 0, 0)]))
