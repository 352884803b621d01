"""Page 14a: cases of many data sets become patches on one grid, with global labels, independent of who draws."""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, rng_for
from medvol_nb.datalists import DataList, write_datalist
from medvol_nb.geometry import Volume, affine_from, reorient, resample_to, to_world
from medvol_nb.labels import LabelSpace
from medvol_nb.loader import (
    VISTA_CT,
    LoaderSettings,
    balanced_starts,
    cast_roles,
    collate_patches,
    prepare_case,
    read_case,
    sampling_weights,
    target_classes,
    training_dataset,
)
from medvol_nb.loading import published_transform
from medvol_nb.torchcore import Batches
from medvol_nb.volume import read_volume, write_volume

SPACE = LabelSpace.shipped()
FAST = LoaderSettings(patch_size=(12, 12, 12), spacing=None, margin=2, augment=False)


@pytest.fixture(scope="session")
def monai():
    "MONAI, imported once (6 to 16 s)"
    return pytest.importorskip("monai.transforms")


def write(path: Path, data: np.ndarray, codes: str = "RAS", spacing=8.0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(reorient(Volume(data, affine_from(spacing, (-90, -70, 10))), codes), path)
    return str(path)


def case(root: Path, k: int, local: np.ndarray | None = None, codes: str = "LPS", **fields) -> dict:
    "A small case on disk; its item with relative paths"
    body = phantoms.abdomen((24, 20, 22), seed=k)
    local = body.lbl if local is None else local
    for sub, data, c in (("images", body.img, codes), ("labels", local.astype(np.uint8), "RAS"),
                         ("pseudo", np.where(body.lbl > 0, body.lbl + 20, 0).astype(np.uint8), "RAS"),
                         ("sv", (body.img.astype(np.int32) + 70_000), "RAS")):
        write(root/sub/f"{k}.nii.gz", data, c)
    return {"image": f"images/{k}.nii.gz", "label": f"labels/{k}.nii.gz", "pseudo_label": f"pseudo/{k}.nii.gz",
            "label_sv": f"sv/{k}.nii.gz", **fields}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[list[DataList], dict[str, Path]]:
    "CT-ORG with labels and pseudo labels, NLST with pseudo labels only"
    root = tmp_path_factory.mktemp("two")
    org = DataList("CT-ORG", tuple(case(root/"CT-ORG", k, fold=k % 2, pseudo_label_reliability=int(k != 1))
                                   for k in range(4)))
    bare = DataList("NLST", tuple({k: v for k, v in case(root/"NLST", s).items() if k != "label"} for s in (7, 8)))
    return [org, bare], {n: root/n for n in ("CT-ORG", "NLST")}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------------------------- roles

@pytest.mark.parametrize("fields, label, pseudo, use", [
    ({"label": "l"}, "l", None, False), ({"label": "l", "pseudo_label": "p"}, "l", "p", True),
    ({"label": "l", "pseudo_label": "p", "pseudo_label_reliability": 1}, "l", "p", True),
    ({"label": "l", "pseudo_label": "p", "pseudo_label_reliability": 0}, "l", "p", False),
    ({"pseudo_label": "p"}, "p", None, False), ({"pseudo_label": "p", "pseudo_label_reliability": 0}, "p", None, False),
    ({}, None, None, False), ({"label": "", "pseudo_label": "p"}, "p", None, False)])
def test_roles(fields, label, pseudo, use):
    item = {"image": "i", "dataset_name": "X", **fields}
    cast = cast_roles(item)
    assert (cast.get("label"), cast.get("pseudo_label"), cast["use_pseudo_label"]) == (label, pseudo, use)
    own = bool(fields.get("label")) or not fields
    assert cast["label_set"] == ("X" if own else "TotalSegmentatorV2")
    assert item == {"image": "i", "dataset_name": "X", **fields}


def test_target_classes():
    assert target_classes(SPACE, "CT-ORG") == (1, 15, 22)
    assert set(target_classes(SPACE, "CT-ORG", pseudo=True)) == \
        {25, 132, *SPACE.mapping("TotalSegmentatorV2").values()}


# ------------------------------------------------------------------------------------------- the deterministic half

@pytest.mark.parametrize("codes", ["RAS", "LPS", "PLI", "SAR"])
@pytest.mark.parametrize("margin", [0, 3, 100])
def test_same_as_monais_pipeline_without_resampling(monai, tmp_path, codes, margin):
    "Crop, clip, RAS and padding are voxel for voxel those of the published configuration"
    item = {k: str(tmp_path/v) for k, v in case(tmp_path, 3, codes=codes).items()} | {"dataset_name": "X"}
    for key in ("label", "pseudo_label", "label_sv"):  # MONAI needs equal orientations to crop by index
        vol = reorient(read_volume(item[key]), codes)
        write_volume(vol, item[key], "overwrite")
    keys, maps = ["image", "label", "pseudo_label", "sv"], ["nearest"]*3  # 1.6 takes label_sv for meta data of label
    a, b = (float(x) for x in VISTA_CT[3:].split(","))
    theirs = monai.Compose([
        monai.LoadImaged(keys, image_only=True, ensure_channel_first=True),
        monai.CropForegroundd(keys, "image", margin=margin, allow_smaller=True),
        monai.Spacingd(keys, pixdim=[8.0]*3, mode=["bilinear", *maps]),
        monai.ScaleIntensityRanged("image", a, b, 0, 1, clip=True),
        monai.Orientationd(keys, axcodes="RAS", labels=None),
        monai.SpatialPadd(keys, (21, 32, 9))])({"sv" if k == "label_sv" else k: v for k, v in item.items()})
    ours = prepare_case(read_case(item), LoaderSettings(patch_size=(21, 32, 9), margin=margin, spacing=8.0))
    ours["sv"] = ours.pop("label_sv")
    for k in keys:
        assert ours[k].data.shape == tuple(theirs[k].shape)
        np.testing.assert_allclose(ours[k].data, theirs[k].numpy(), atol=1e-5)
        np.testing.assert_allclose(ours[k].affine, theirs[k].affine.numpy(), atol=1e-3)


@pytest.mark.parametrize("spacing", [5.0, 12.0])
def test_same_places_as_monais_spacing(monai, tmp_path, spacing):
    "With resampling the grids differ by part of a voxel; looked up at the same places, values agree"
    x, y, z = np.meshgrid(*(np.linspace(0, 3, n) for n in (24, 20, 22)), indexing="ij")
    path = write(tmp_path/"smooth.nii.gz", (400 + 300*np.sin(x + y)*np.cos(z)).astype(np.float32))
    theirs = monai.Compose([monai.LoadImaged("image", image_only=True, ensure_channel_first=True),
                            monai.Spacingd("image", pixdim=[spacing]*3, mode="bilinear")])({"image": path})["image"]
    ours = prepare_case(read_case({"image": path, "dataset_name": "X"}), LoaderSettings(
        patch_size=(1, 1, 1), spacing=spacing, margin=0, intensity="identity"))["image"]
    grid = Volume(theirs.numpy(), theirs.affine.numpy(), "cxyz")
    looked_up = resample_to(grid, ours.affine, ours.shape, antialias=False)
    inner = (slice(None), *[slice(2, -2)]*3)
    assert np.abs(looked_up.data[inner] - ours.data[inner]).max() < 12  # of a range of 600; two linear interpolations


def test_places_do_not_move(tmp_path):
    item = {k: str(tmp_path/v) for k, v in case(tmp_path, 1).items()} | {"dataset_name": "X"}
    ready = prepare_case(read_case(item), LoaderSettings(patch_size=(60, 60, 60), spacing=3.0))
    for label in (1, 5):
        before = to_world(affine_from(8.0, (-90, -70, 10)),
                          np.argwhere(phantoms.abdomen((24, 20, 22), seed=1).lbl == label).mean(axis=0))
        after = to_world(ready["label"].affine, np.argwhere(ready["label"].data[0] == label).mean(axis=0))
        assert np.abs(before - after).max() < 1.0, "mm, of voxels of 8 mm"


def test_no_foreground_keeps_the_volume(tmp_path):
    item = {"image": write(tmp_path/"air.nii.gz", np.full((9, 8, 7), -1000, np.int16)), "dataset_name": "X"}
    assert prepare_case(read_case(item), replace_settings(patch_size=(4, 4, 4)))["image"].shape == (9, 8, 7)


def replace_settings(**more) -> LoaderSettings: return LoaderSettings(**FAST.model_dump() | more)


def test_flipped_label_is_the_same_grid(two):
    lists, roots = two
    item = {**lists[0].training[0], "dataset_name": "CT-ORG"}
    item = {k: str(roots["CT-ORG"]/v) if k in ("image", "label") else v for k, v in item.items()}
    found = read_case(item, ["label"])
    assert (found["image"].orientation, found["label"].orientation) == ("LPS", "LPS")
    body = phantoms.abdomen((24, 20, 22), seed=0)
    assert np.array_equal(found["label"].data[0], body.lbl[::-1, ::-1])


@pytest.mark.parametrize("bad, kind, said", [
    ("absent", MissingFile, "does not exist"), ("torn", FormatError, "bad"), ("html", FormatError, "bad"),
    ("shape", DataError, "shape"), ("moved", DataError, "displaced"), ("fraction", DataError, "not whole numbers"),
    ("channels", DataError, "no channels")])
def test_damaged_files_name_case_and_data_set(two, tmp_path, bad, kind, said):
    lists, roots = two
    lbl = phantoms.abdomen((24, 20, 22)).lbl
    path = tmp_path/"bad.nii.gz"
    if bad == "torn": path.write_bytes((roots["CT-ORG"]/"labels/0.nii.gz").read_bytes()[:300])
    elif bad == "html": path.write_text("<html>404</html>")
    elif bad == "shape": write(path, lbl[1:])
    elif bad == "moved": write_volume(Volume(lbl, affine_from(8.0, (-90, -70, 11))), path)
    elif bad == "fraction": write(path, lbl + np.float32(0.5))
    elif bad == "channels": write_volume(Volume(np.stack([lbl, lbl]), affine_from(8.0, (-90, -70, 10)), "cxyz"), path)
    dl = replace(lists[0], training=({**lists[0].training[0], "label": str(path)},))
    data = training_dataset(dl, roots["CT-ORG"], SPACE, settings=FAST)
    with pytest.raises(kind, match=rf"data set 'CT-ORG', case .*images/0.nii.gz, label: .*{said}"):
        data.draw(0, rng_for(0))


def test_errors_come_out_of_loading_processes(two):
    lists, roots = two
    dl = replace(lists[0], training=({**lists[0].training[0], "image": "images/gone.nii.gz"},))
    data = training_dataset(dl, roots["CT-ORG"], SPACE, settings=FAST)
    with pytest.raises(FileNotFoundError, match="data set 'CT-ORG', case .*gone.nii.gz, image"):
        list(Batches(data, workers=1).epoch(0))


def test_multichannel_images(tmp_path):
    img = phantoms.head((16, 18, 14)).img
    paths = [write(tmp_path/f"{c}.nii.gz", (k + 1)*img) for k, c in enumerate("ab")]
    settings = replace_settings(intensity="minmax", augment=False, require_labels=False)
    dl = DataList("Brain", ({"image": [os.path.basename(p) for p in paths]},))
    sample = training_dataset(dl, tmp_path, settings=settings).draw(0, rng_for(0))
    assert sample["image"].shape == (2, 2, 12, 12, 12) and not sample["has_label"]
    np.testing.assert_allclose(sample["image"][:, 0], sample["image"][:, 1], atol=1e-5)
    (tmp_path/"b.nii.gz").unlink()
    write(tmp_path/"b.nii.gz", img[1:])
    with pytest.raises(DataError, match="b.nii.gz: lies on another grid than .*a.nii.gz"):
        training_dataset(dl, tmp_path, settings=settings).draw(0, rng_for(0))


# --------------------------------------------------------------------------------------------------- balanced patches

def test_classes_are_drawn_as_monai_draws_them(monai):
    "Same odds of the class at the chosen voxel: equal for all present, whatever their size"
    import torch
    lbl = np.zeros((20, 20, 20), np.int32)
    lbl[:10], lbl[15, 3:6, 3], lbl[18, 18, 18] = 2, 5, 7
    crop = monai.RandCropByLabelClasses((1, 1, 1), num_classes=9, num_samples=3000, ratios=[1.0]*9, warn=False)
    crop.set_random_state(0)
    theirs = np.array([int(p[0, 0, 0, 0]) for p in crop(torch.from_numpy(lbl[None]), torch.from_numpy(lbl[None]))])
    starts = balanced_starts(lbl, (1, 1, 1), 3000, rng_for(0), [1.0]*9)
    ours = lbl[tuple(starts.T)]
    for found in (theirs, ours):
        share = np.bincount(found, minlength=9)/3000
        assert np.abs(share[[0, 2, 5, 7]] - 0.25).max() < 0.035, "four standard deviations"


def test_patches_are_placed_as_monai_places_them(monai):
    "A class of one voxel leaves nothing to chance: both cut the same window"
    import torch
    for at in ((0, 0, 0), (19, 3, 9), (10, 10, 10), (7, 17, 2)):
        for size in ((8, 8, 8), (7, 5, 9), (20, 20, 20)):
            lbl = np.zeros((20, 20, 20), np.int32)
            lbl[at] = 1
            index = np.arange(8000, dtype=np.float32).reshape(1, 20, 20, 20)
            crop = monai.RandCropByLabelClasses(size, num_classes=2, ratios=[0, 1], num_samples=1, warn=False)
            first = int(crop(torch.from_numpy(index), torch.from_numpy(lbl[None]))[0].flatten()[0])
            start, = balanced_starts(lbl, size, 1, rng_for(0), [0, 1])
            assert np.unravel_index(first, lbl.shape) == tuple(start)


@pytest.mark.parametrize("lbl", [np.full((6, 6, 6), -1), np.full((6, 6, 6), 255), np.zeros((6, 6, 6), np.uint8)])
def test_labels_without_a_class(lbl):
    starts = balanced_starts(lbl, (4, 4, 4), 50, rng_for(0), [0.0, 1.0])
    assert starts.min() >= 0 and starts.max() <= 2 and len(np.unique(starts)) > 1


def test_ignored_voxels_attract_no_patch(two):
    lbl = np.zeros((30, 30, 30), np.int32)
    lbl[20:] = 255
    starts = balanced_starts(lbl, (1, 1, 1), 300, rng_for(0), [1.0]*133)
    assert starts[:, 0].max() < 20


# ------------------------------------------------------------------------------------------------------------ draws

def test_D2_unmapped_lung_is_no_spleen(two):
    "CT-ORG 3 lung, 4 kidney, 5 bone have no global class: they are ignored, not spleen, pancreas and right kidney"
    lists, roots = two
    data = training_dataset(lists[0], roots["CT-ORG"], SPACE, settings=replace_settings(patches_per_image=8))
    seen = np.unique(np.concatenate([data.draw(i, rng_for(i))["label"] for i in range(4)]))
    assert 255 in seen and not {3, 4, 5} & set(seen.tolist()) and set(seen.tolist()) <= {0, 1, 15, 22, 255}
    strict = training_dataset(lists[0], roots["CT-ORG"], SPACE, settings=replace_settings(unmapped="error"))
    with pytest.raises(DataError, match="data set 'CT-ORG', case .*have no global class"): strict.draw(0, rng_for(0))


def test_pseudo_labels_are_global_already(two):
    lists, roots = two
    data = training_dataset(lists, roots, SPACE, settings=FAST)
    sample = data.draw(4, rng_for(0))
    assert set(np.unique(sample["label"])) <= {0, *range(21, 29)}
    assert not sample["has_pseudo_label"] and not sample["pseudo_label"].any() and sample["has_label"]
    assert sample["label_set"] == "TotalSegmentatorV2" and sample["dataset_name"] == "NLST"


def test_unreliable_pseudo_label_only_guides_the_cut(two):
    lists, roots = two
    data = training_dataset(lists[0], roots["CT-ORG"], SPACE, settings=FAST)
    reliable, doubtful = data.draw(0, rng_for(0)), data.draw(1, rng_for(0))
    assert reliable["has_pseudo_label"] and reliable["pseudo_label"].any()
    assert not doubtful["has_pseudo_label"] and not doubtful["pseudo_label"].any()
    items = [{**i, "pseudo_label_reliability": 1} for i in lists[0].training]
    trusted = training_dataset(replace(lists[0], training=tuple(items)), roots["CT-ORG"], SPACE, settings=FAST)
    assert np.array_equal(trusted.draw(1, rng_for(0))["affine"], doubtful["affine"]), "cut at the same places"


def test_supervoxels_are_kept_or_left_out(two):
    lists, roots = two
    sample = training_dataset(lists[0], roots["CT-ORG"], SPACE, settings=FAST).draw(0, rng_for(0))
    assert sample["has_label_sv"] and sample["label_sv"].max() > 32767 and sample["label_sv"].dtype == np.int32
    none = training_dataset(lists[0], roots["CT-ORG"], SPACE, settings=replace_settings(supervoxels=False))
    assert "label_sv" not in none.draw(0, rng_for(0)) and "has_label_sv" not in none.draw(0, rng_for(0))


def test_every_map_stays_on_its_voxel(two):
    "Supervoxels here encode the image, so patches can be checked against each other"
    lists, roots = two
    data = training_dataset(lists[0], roots["CT-ORG"], settings=replace_settings(intensity="identity"))
    sample = data.draw(0, rng_for(3))
    pads = sample["label_sv"] == 0
    assert np.array_equal(sample["image"][~pads], sample["label_sv"][~pads] - 70_000)
    assert np.array_equal(sample["pseudo_label"] > 0, sample["label"] > 0)


@pytest.mark.parametrize("augment", [False, True])
def test_draws_depend_on_seed_and_case_alone(two, augment, monai):
    lists, roots = two
    settings = replace_settings(augment=augment)
    data, other = (training_dataset(lists, roots, SPACE, settings=settings) for _ in range(2))
    straight = [data.draw(i, rng_for(1, i)) for i in range(6)]
    backwards = [other.draw(i, rng_for(1, i)) for i in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(straight, backwards))
    assert not same(data.draw(0, rng_for(2, 0)), straight[0])
    cached = training_dataset(lists, roots, SPACE, settings=replace_settings(augment=augment, cache_items=2))
    for _ in range(2): assert all(same(cached.draw(i, rng_for(1, i)), straight[i]) for i in range(6))
    assert len(cached._cache) == 2


def test_workers_change_nothing(two, monai):
    lists, roots = two
    data = training_dataset(lists, roots, SPACE, settings=replace_settings(augment=True))
    runs = [[b for e in (0, 1) for _, b in Batches(data, 2, seed=4, workers=w, collate=collate_patches).epoch(e)]
            for w in (0, 2)]
    assert len(runs[0]) == 6
    for a, b in zip(*runs, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] if isinstance(a[k], list) else bool((a[k] == b[k]).all()) for k in a)


def test_augmentation_changes_images_and_keeps_labels_whole(two, monai):
    lists, roots = two
    always = [{**t, "prob": 1.0} if "prob" in t else t for t in published_transform()]
    data = training_dataset(replace(lists[0], training_transform=always), roots["CT-ORG"], SPACE,
                            settings=replace_settings(augment=True))
    plain = training_dataset(lists[0], roots["CT-ORG"], SPACE, settings=FAST)
    a, b = data.draw(0, rng_for(0)), plain.draw(0, rng_for(0))
    assert a["image"].shape == b["image"].shape and not np.allclose(a["image"], b["image"])
    assert set(np.unique(a["label"])) <= {0, 1, 15, 22, 255} and a["label"].dtype == np.int32
    assert a["image"].dtype == np.float32 and np.isfinite(a["image"]).all()


def test_other_crops_go_through_monai(two, monai):
    lists, roots = two
    config = [{"_target_": "RandSpatialCropSamplesd", "keys": ["@image_key", "@label_key", "@pseudo_label_key",
                                                               "@label_sv_key"],
               "roi_size": "@patch_size", "num_samples": 3, "random_size": False, "allow_missing_keys": True},
              {"_target_": "RandFlipd", "keys": ["@image_key", "@label_key", "@label_sv_key"], "prob": 1.0,
               "spatial_axis": 0, "allow_missing_keys": True}]
    own = replace(lists[0], training_transform=config)
    data = training_dataset(own, roots["CT-ORG"], settings=replace_settings(augment=True, intensity="identity"))
    sample = data.draw(0, rng_for(0))
    assert sample["image"].shape == (3, 1, 12, 12, 12) and same(sample, data.draw(0, rng_for(0)))
    pads = sample["label_sv"] == 0
    assert np.array_equal(sample["image"][~pads], sample["label_sv"][~pads] - 70_000)
    with pytest.raises(ConfigError, match="augment=False needs a class-balanced crop"):
        training_dataset(own, roots["CT-ORG"], settings=FAST)
    wrong = replace(own, training_transform=[{**config[0], "roi_size": [8, 8, 8]}])
    with pytest.raises(DataError, match="case .*makes patches of .8, 8, 8., the settings say .12, 12, 12."):
        training_dataset(wrong, roots["CT-ORG"], settings=replace_settings(augment=True)).draw(0, rng_for(0))


def test_published_crop_works_without_pseudo_label(two, monai):
    "Upstream's transform needs a pseudo label in every case; here the label in global numbers stands in"
    lists, roots = two
    items = tuple({k: v for k, v in i.items() if "pseudo" not in k} for i in lists[0].training)
    for config in (published_transform(), [{**published_transform()[0], "image_key": "image"}]):
        dl = replace(lists[0], training=items, training_transform=config)
        data = training_dataset(dl, roots["CT-ORG"], SPACE, settings=replace_settings(augment=True))
        sample = data.draw(0, rng_for(0))
        assert sample["image"].shape == (2, 1, 12, 12, 12) and not sample["has_pseudo_label"]


def test_D12_lists_are_not_executed(two, tmp_path):
    lists, roots = two
    canary = tmp_path/"canary"
    evil = replace(lists[0], training_transform=[{"_target_": "RandZoomd", "keys": f"$open('{canary}', 'w')"}])
    with pytest.raises(ConfigError, match="data list 'CT-ORG'.*/training_transform/0/keys"):
        training_dataset(evil, roots["CT-ORG"], settings=replace_settings(augment=True))
    assert not canary.exists()


def test_trusted_lists(two, monai, caplog):
    lists, roots = two
    dl = replace(lists[0], training_transform=[{**published_transform()[0], "num_classes": "$100 + 33"}])
    data = training_dataset(dl, roots["CT-ORG"], SPACE, settings=replace_settings(augment=True), trust=True)
    assert data.draw(0, rng_for(0))["image"].shape == (2, 1, 12, 12, 12) and "trust=True" in caplog.text


# ----------------------------------------------------------------------------------------------- lists to data sets

def test_held_out_fold(two, tmp_path):
    lists, roots = two
    write_datalist(lists[0], tmp_path/"CT-ORG_5_folds.json")
    files = [tmp_path/"CT-ORG_5_folds.json", lists[1]]
    train = training_dataset(files, roots, SPACE, fold_idx=1, settings=FAST)
    held = training_dataset(files, roots, SPACE, fold_idx=1, held_out=True, settings=FAST)
    assert [i["fold"] for i in train.items if "fold" in i] == [0, 0] and len(train) == 4
    assert [i["fold"] for i in held.items] == [1, 1] and not set(train.keys) & set(held.keys)
    how = {"fold_idx": 1, "held_out": True, "settings": replace_settings(augment=True)}
    augmented = training_dataset(files, roots, SPACE, **how)
    assert not augmented.settings.augment
    with pytest.raises(DataError, match="no case is in fold 4"): training_dataset(files, roots, SPACE, fold_idx=4)
    with pytest.raises(DataError, match="is held out"): training_dataset(files, roots, SPACE, held_out=True)
    with pytest.raises(DataError, match="no case of .'NLST'. is in fold 0"):
        training_dataset(lists[1], roots, SPACE, fold_idx=0)


def test_roots_of_pseudo_labels(two, tmp_path):
    lists, roots = two
    os.symlink(roots["NLST"], tmp_path/"NLST")
    data = training_dataset(lists[1], roots, SPACE, roots={"pseudo_label": str(tmp_path/"{dataset}")}, settings=FAST)
    assert data.items[0]["label"] == str(tmp_path/"NLST"/"pseudo"/"7.nii.gz") and data.draw(0, rng_for(0))["has_label"]


def test_wrong_calls(two):
    lists, roots = two
    with pytest.raises(ConfigError, match="name the folder of each data set"):
        training_dataset(lists, roots["NLST"], SPACE, settings=FAST)
    with pytest.raises(ConfigError, match="no folder for .'CT-ORG'"): training_dataset(lists[0], {"A": "/a"}, SPACE)
    with pytest.raises(ConfigError, match="need a label space"): training_dataset(lists, roots)
    with pytest.raises(ConfigError, match="different names"): training_dataset([lists[0]]*2, roots, SPACE)
    with pytest.raises(ConfigError, match="different names"): training_dataset([], roots, SPACE)
    with pytest.raises(DataError, match="no data set 'CTORG', did you mean 'CT-ORG'"):
        training_dataset(replace(lists[0], name="CTORG"), roots["CT-ORG"], SPACE, settings=FAST)
    with pytest.raises(ValueError, match="patch_size"): training_dataset(lists[0], roots["CT-ORG"], SPACE, (8, 8))
    with pytest.raises(DataError, match="2 of 2 cases have neither"):
        bare = tuple({"image": i["image"]} for i in lists[1].training)
        training_dataset(replace(lists[1], training=bare), roots, SPACE, settings=FAST)


def test_weights_make_data_sets_equal(two):
    lists, roots = two
    data = training_dataset(lists, roots, SPACE, settings=FAST)
    assert data.weights() == [25]*4 + [50]*2
    own = data.weights([1, 2, 3, 4, 0, 8])
    assert sum(own[:4]) == pytest.approx(100) and own[4:] == [0, 100] and own[3] == pytest.approx(4*own[0])
    drawn = np.concatenate([Batches(data, 6, weights=data.weights()).order(e).ravel() for e in range(400)])
    assert abs((drawn < 4).mean() - 0.5) < 0.05
    for bad in ([1], [1]*5 + [-1], [np.nan]*6):
        with pytest.raises(DataError, match="sample_weights"): sampling_weights(data.items, bad)


def test_both_collations(two):
    lists, roots = two
    data = training_dataset(lists, roots, SPACE, settings=FAST)
    _, flat = next(iter(Batches(data, 3, collate=collate_patches).epoch(0)))
    _, deep = next(iter(Batches(data, 3).epoch(0)))
    assert flat["image"].shape == (6, 1, 12, 12, 12) and deep["image"].shape == (3, 2, 1, 12, 12, 12)
    assert bool((flat["label"].reshape(deep["label"].shape) == deep["label"]).all())
    assert len(flat["dataset_name"]) == 6 == len(flat["has_label"]) and len(deep["dataset_name"]) == 3
    assert flat["index"].tolist() == np.repeat(deep["index"].tolist(), 2).tolist()


def test_no_monai_without_augmentation(two):
    import subprocess
    import sys
    lists, roots = two
    write_datalist(lists[0], roots["CT-ORG"]/"CT-ORG_5_folds.json", "overwrite")
    code = ("import sys; from medvol_nb.loader import *; from medvol_nb.core import rng_for\n"
            "s = LoaderSettings(patch_size=(8, 8, 8), spacing=None, augment=False)\n"
            "training_dataset(sys.argv[1] + '/CT-ORG_5_folds.json', sys.argv[1], settings=s).draw(0, rng_for(0))\n"
            "print('monai' in sys.modules, 'torch' in sys.modules)")
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code, roots["CT-ORG"]], text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.stdout.split() == ["False", "False"], done.stderr


# -------------------------------------------------------------------------------------------------------- real volumes

def test_openkbp(data_dir, monai):
    "Head-and-neck CT of five patients (PLI, 3.9 to 4.2 x 2.5 mm), seven organs"
    root = data_dir/"datalists_supervoxels"/"openkbp"
    ids = ("017", "060", "083", "099", "112")
    names = {1: "brainstem", 2: "spinal cord", 3: "right parotid", 4: "left parotid", 5: "esophagus", 6: "larynx",
             7: "mandible"}
    dl = DataList("OpenKBP", tuple({"image": f"imagesTr/kbp_{k}.nii.gz", "label": f"labelsTr/kbp_{k}.nii.gz", "fold": f}
                                   for f, k in enumerate(ids)), label_dict=names)
    space = SPACE.extended("OpenKBP", names)
    data = training_dataset(dl, root, space, (48, 48, 48), fold_idx=4,
                            settings=LoaderSettings(spacing=4.0, patches_per_image=4))
    assert len(data) == 4
    ready = data.case(0)
    assert ready["image"].orientation == "RAS" and np.allclose(ready["image"].spacing, 4.0)
    right, left = (np.argwhere(ready["label"].data[0] == k).mean(axis=0) for k in (3, 4))
    assert right[0] > left[0], "the first axis runs to the patient's right"
    sample = data.draw(0, rng_for(0))
    known = {0, *space.mapping("OpenKBP").values()}
    assert sample["image"].shape == (4, 1, 48, 48, 48) and set(np.unique(sample["label"])) <= known | {255}
    assert len(np.unique(sample["label"])) > 1
