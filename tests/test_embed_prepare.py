"Prepared folders: any orientation and contrast, sorted labels, failures listed, death at any step and the same bytes"
import shutil

import numpy as np
import pytest
from scipy import ndimage

from medvol_nb.core import ConfigError, DataError, MissingFile, file_digest, raises, read_csv, read_json, rng_for
from medvol_nb.embed.data import net_volume
from medvol_nb.embed.prepare import (
    RULES,
    clean_slices,
    make_slic_mask,
    merge_totalseg,
    organ_names,
    pair_files,
    prepare,
    prepare_pair,
    prepare_scan,
    slice_mask,
)
from medvol_nb.embed.sampler import ViewSet, read_cases
from medvol_nb.embed.views import ViewSampler
from medvol_nb.geometry import Volume, affine_from, reorient, same_grid
from medvol_nb.parallel import BatchError
from medvol_nb.phantoms import abdomen
from medvol_nb.volume import read_volume, write_volume

from .faults.injectors import forked

PLACE = affine_from((4, 4, 6), (-100, 30, -70))


def person(k=0): return abdomen((60, 50, 30), seed=k)


def save(img, path, affine=PLACE):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_volume(Volume(img, affine), path, "overwrite")


def mr_of(p): return np.where(p.img > -500, 400 - np.abs(p.img - 60), 0).astype(np.int16)


def pairs(root, n=2):
    for k in range(n):
        save(person(k).img, root/f"p{k}_0000.nii.gz")
        save(mr_of(person(k)), root/f"p{k}_0001.nii.gz")
    return root


def totalseg(root, n=2, organs=(("spleen", 3), ("aorta", 5), ("liver", 2))):
    for k in range(n):
        save(person(k).img, root/f"s{k}"/"ct.nii.gz")
        for name, value in organs: save((person(k).lbl == value).astype(np.uint8),
                                        root/f"s{k}"/"segmentations"/f"{name}.nii.gz")
    return root


def tree(folder):
    return {p.relative_to(folder).as_posix(): file_digest(p, 64) for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------- body masks

def test_slices_are_cleaned_like_the_published_rule():
    "The same as scikit-image slice by slice, but for holes at the edge"
    from skimage import morphology as sk
    mask = ndimage.gaussian_filter(rng_for(0).normal(0, 1, (6, 90, 80)), (0, 3, 3)) > 0.02
    ours = clean_slices(mask, 3, 120, 200)
    for k, plane in enumerate(mask):
        p = sk.opening(sk.closing(plane, sk.disk(3)), sk.disk(3))
        found, n = ndimage.label(p)
        p = p & (np.bincount(found.ravel(), minlength=n + 1) >= 120)[found]
        holes, n = ndimage.label(~p)
        size = np.bincount(holes.ravel(), minlength=n + 1)
        edge = np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))
        small = [i for i in range(1, n + 1) if size[i] < 200 and i not in edge]
        assert np.array_equal(ours[k], p | np.isin(holes, small)), k


def test_slices_do_not_know_each_other():
    mask = ndimage.gaussian_filter(rng_for(1).normal(0, 1, (5, 60, 60)), (0, 2, 2)) > 0
    whole = clean_slices(mask, 2, 50, 100)
    for k in range(5): assert np.array_equal(whole[k], clean_slices(mask[k:k + 1], 2, 50, 100)[0])


def test_a_small_picture_is_not_filled_with_body():
    "The published rule fills all of the air of slices below 200 x 200 pixels"
    img, _ = prepare_scan(Volume(person().img, PLACE), 4.0, crop=False)
    mask = slice_mask(img, "ct")
    air = np.asarray(img.data) < -950
    assert mask.mean() < 0.8 and not mask[:, 0].all() and air[~mask].mean() > 0.9


@pytest.mark.parametrize("scale", [1.0, 1/400])
def test_mr_of_any_scale_has_a_body(scale):
    p = person()
    img, lbl = prepare_scan(Volume((mr_of(p)*scale).astype(np.float32), PLACE), 4.0, rule=RULES["pairs"])
    body = net_volume(Volume((p.lbl > 0).astype(np.uint8), PLACE))
    assert 0.3 < lbl.data.mean() < 0.95 and img.dtype == np.float32 and body.data.any()


# --------------------------------------------------------------------------------------------------------- one scan

@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR", "IRP"])
def test_any_orientation_gives_the_same_files(codes):
    vol = Volume(person().img, PLACE)
    expected, got = prepare_scan(vol, 5.0), prepare_scan(reorient(vol, codes), 5.0)
    for a, b in zip(expected, got): assert np.array_equal(a.data, b.data) and same_grid(a, b)
    assert expected[0].dtype == np.int16 and expected[1].dtype == np.uint8 and expected[0].orientation == "SPL"


def test_crop_is_the_box_of_the_mask_and_keeps_the_place():
    vol = Volume(person().img, PLACE)
    whole, part = prepare_scan(vol, 5.0, crop=False), prepare_scan(vol, 5.0)
    box = [np.flatnonzero(whole[1].data.any(axis=tuple({0, 1, 2} - {a}))) for a in range(3)]
    picks = tuple(slice(b[0], b[-1] + 1) for b in box)
    assert np.array_equal(part[0].data, whole[0].data[picks]) and np.array_equal(part[1].data, whole[1].data[picks])
    first = np.array([p.start for p in picks])
    assert np.allclose(part[0].affine[:3, 3], whole[0].affine[:3, :3] @ first + whole[0].affine[:3, 3])


def test_exact_masks_are_close_to_those_of_the_coarse_grid():
    vol = Volume(abdomen((200, 160, 30), seed=2).img, affine_from((1.6, 1.6, 8)))
    exact, quick = (prepare_scan(vol, 3.2, exact=e, crop=False)[1].data for e in (True, False))
    assert 2*(exact & quick).sum()/(exact.sum() + quick.sum()) > 0.97


def test_D05_regions_with_the_library_as_it_is_now():
    "np.int and multichannel= are gone; labels 1...n fill the body and nothing else, the same each time"
    vol = Volume(person().img, PLACE)
    one, two = make_slic_mask(vol, grid_mm=6), make_slic_mask(vol, grid_mm=6)
    assert np.array_equal(one.data, two.data) and one.dtype == np.int32 and 5 <= one.data.max() <= 30
    body = net_volume(Volume(person().lbl, PLACE)).data > 0
    assert (one.data[body] > 0).mean() > 0.97 and (one.data > 0).mean() < 0.9
    fine = Volume(abdomen((200, 160, 10), seed=2).img, affine_from((1.6, 1.6, 24)))
    assert make_slic_mask(fine, grid_mm=6, exact=True).data.any()


# ----------------------------------------------------------------------------------------------------- organ masks

def test_D13_labels_do_not_depend_on_the_order_of_the_listing(tmp_path):
    organs = (("spleen", 3), ("aorta", 5), ("liver", 2))
    a, b = totalseg(tmp_path/"a", 1, organs), totalseg(tmp_path/"b", 1, organs[::-1])
    for root in (a, b): prepare(root, root/"out", kind="totalseg")
    assert read_json(a/"out"/"labels.json") == {"1": "aorta", "2": "liver", "3": "spleen"}
    assert organ_names(a) == organ_names(b) and tree(a/"out"/"masks") == tree(b/"out"/"masks")
    lbl = read_volume(a/"out"/"masks"/"s0.zarr").data
    expected = net_volume(Volume(person().lbl, PLACE)).data
    for k, value in ((1, 5), (2, 2), (3, 3)): assert np.array_equal(lbl == k, expected == value)


def test_later_organs_win_overlaps_are_counted_missing_ones_are_warnings(tmp_path, caplog):
    case = totalseg(tmp_path, 1)/"s0"
    save((person().lbl > 0).astype(np.uint8), case/"segmentations"/"zz_body.nii.gz")
    img, lbl, about = merge_totalseg(case, ["aorta", "liver", "spleen", "unknown", "zz_body"])
    assert about["missing"] == ["unknown"] and "unknown" in caplog.text
    assert about["overlap"] == np.isin(person().lbl, (5, 2, 3)).sum() and set(np.unique(lbl.data)) == {0, 5}
    assert same_grid(img, lbl) and merge_totalseg(case, [f"x{k}" for k in range(300)] + ["liver"])[1].dtype == np.uint16


def test_organ_masks_may_hold_255(tmp_path):
    case = totalseg(tmp_path, 1)/"s0"
    save(((person().lbl == 2)*255).astype(np.uint8), case/"segmentations"/"liver.nii.gz")
    lbl = merge_totalseg(case, ["liver", "spleen"])[1].data
    assert (lbl == 1).sum() == (person().lbl == 2).sum() > 0


def test_given_labels_are_used_and_checked(tmp_path):
    root = totalseg(tmp_path/"in", 1)
    told = prepare(root, tmp_path/"out", kind="totalseg", labels=["liver", "spleen"])
    assert told["overlap"] == 0 and read_json(tmp_path/"out"/"labels.json") == {"1": "liver", "2": "spleen"}
    for bad in ({"1": "a", "3": "b"}, ["a", "a"], 7):
        with raises(ConfigError, match="labels: must"): prepare(root, tmp_path/"o", kind="totalseg", labels=bad)


# ------------------------------------------------------------------------------------------------------------ pairs

def test_pairs_are_grouped_and_prepared_alike(tmp_path):
    pairs(tmp_path)
    save(mr_of(person()), tmp_path/"p0_0002.nii.gz")
    files = pair_files(tmp_path)
    assert {k: sorted(v) for k, v in files.items()} == {"p0": ["0000", "0001", "0002"], "p1": ["0000", "0001"]}
    made = prepare_pair(files["p0"], 5.0)
    assert same_grid(made["0000"][0], made["0002"][1]) and made["0000"][0].dtype == np.int16
    told = prepare(tmp_path, tmp_path/"out", kind="pairs", spacing=5)
    assert told == {"cases": 2, "failed": 0, "files": 5, "out": str(tmp_path/"out")}
    cases = read_cases(tmp_path/"out", ("_0000", "_0001"))
    assert [c.name for c in cases] == ["p0", "p1"] and all(len(c.masks) == 2 for c in cases)


def test_a_pair_without_its_ct_fails_and_the_others_are_made(tmp_path):
    pairs(tmp_path)
    (tmp_path/"p0_0000.nii.gz").unlink()
    with raises(BatchError, match="1 of 2 items failed"): prepare(tmp_path, tmp_path/"out", kind="pairs", spacing=5)
    assert [r["name"] for r in read_csv(tmp_path/"out"/"index.csv")] == ["p1_0000.zarr", "p1_0001.zarr"]


# ------------------------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("suffix", [".zarr", ".nii.gz"])
def test_outputs_can_be_trained_on(tmp_path, workers, suffix):
    for k in range(2): save(person(k).img, tmp_path/"in"/f"c{k}.nii.gz")
    told = prepare(tmp_path/"in", tmp_path/"out", spacing=5, suffix=suffix, workers=workers, regions=True)
    assert told["files"] == 2 and (tmp_path/"out"/"regions"/f"c1{suffix}").exists()
    views = ViewSet(read_cases(tmp_path/"out"), 5, sampler=ViewSampler("masksample", (12, 16, 16), 5))
    assert views.draw(0, rng_for(0))["images"].shape == (2, 12, 16, 16)


def test_regions_have_the_contrast_that_was_named(tmp_path):
    "A CT that shows nothing but tissue looks like an MR; its regions are found as those of a CT if it is called one"
    img = rng_for(0, "tissue").normal(40, 15, (60, 50, 30)).astype(np.int16)
    img[:30] += 80
    save(img, tmp_path/"in"/"c.nii.gz")
    for contrast in ("ct", "auto"):
        prepare(tmp_path/"in", tmp_path/contrast, spacing=5, contrast=contrast, crop=False, regions=True)
    found = {c: read_volume(tmp_path/c/"regions"/"c.zarr").data for c in ("ct", "auto")}
    assert (found["ct"] > 0).all() and not (found["auto"] > 0).all()


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path):
    "Dies at steps all over the run; then the same command finishes it"
    for k in range(3): save(person(k).img, tmp_path/"in"/f"c{k}.nii.gz")
    def job(): prepare(tmp_path/"in", tmp_path/"work"/"out", spacing=8)
    (tmp_path/"work").mkdir()
    steps = forked(job, tmp_path/"work")
    expected = tree(tmp_path/"work"/"out")
    for at in np.linspace(1, steps, 9).astype(int):
        shutil.rmtree(tmp_path/"work"/"out")
        assert forked(job, tmp_path/"work", int(at)) == -9
        job()
        assert tree(tmp_path/"work"/"out") == expected, at


def test_only_changed_or_missing_cases_are_made_again(tmp_path):
    for k in range(3): save(person(k).img, tmp_path/"in"/f"c{k}.nii.gz")
    out = tmp_path/"out"
    prepare(tmp_path/"in", out, spacing=8, suffix=".nii.gz")
    before = {p.name: p.stat().st_mtime_ns for p in (out/"images").iterdir()}
    save(person(7).img, tmp_path/"in"/"c1.nii.gz")
    (out/"images"/"c2.nii.gz").unlink()
    prepare(tmp_path/"in", out, spacing=8, suffix=".nii.gz")
    after = {p.name: p.stat().st_mtime_ns for p in (out/"images").iterdir()}
    assert {k for k in after if after[k] != before[k]} == {"c1.nii.gz", "c2.nii.gz"}
    with raises(DataError, match="other parameters"): prepare(tmp_path/"in", out, spacing=9)
    assert prepare(tmp_path/"in", out, spacing=9, on_exists="overwrite")["cases"] == 3


@pytest.mark.parametrize("call, kind, word", [
    (dict(kind="mri"), ConfigError, "kind: must be"), (dict(suffix=".mha"), ConfigError, "suffix: must be"),
    (dict(spacing=0), ConfigError, "spacing: must be"), (dict(kind="totalseg"), DataError, "holds no cases"),
    (dict(kind="pairs"), DataError, "holds no pairs")])
def test_wrong_calls_are_refused_and_write_nothing(tmp_path, call, kind, word):
    save(person().img, tmp_path/"in"/"c.nii.gz")
    with raises(kind, match=word): prepare(tmp_path/"in", tmp_path/"out", **call)
    with raises(MissingFile): prepare(tmp_path/"nowhere", tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_two_scans_of_one_name_are_refused(tmp_path):
    save(person().img, tmp_path/"c.nii.gz")
    save(person().img, tmp_path/"c.mha")
    with raises(DataError, match="several scans are called 'c'"): prepare(tmp_path, tmp_path/"out")


# ------------------------------------------------------------------------------------------------------------ reality

def test_real_chests_in_one_command(data_dir, tmp_path):
    folder = data_dir/"anatomical_embedding"/"thorax_two_crops"
    for k in "ab": shutil.copy(folder/f"crop_{k}_ct.nii.gz", tmp_path)
    told = prepare(tmp_path, tmp_path/"out", suffix=".nii.gz")
    assert told["cases"] == 2
    for case in read_cases(tmp_path/"out"):
        img, lbl = read_volume(case.images[0]), read_volume(case.masks[0])
        assert same_grid(img, lbl) and np.allclose(img.spacing, 1.6, atol=1e-5) and lbl.data.mean() > 0.5


def test_real_organs_in_one_command(data_dir, tmp_path):
    "The 61 organ files of a real case give the label map they were made from"
    src = data_dir/"synthetic_labels"/"totalseg_layout"/"s0001"
    (tmp_path/"in"/"s1").mkdir(parents=True)
    for p in src.iterdir():
        (shutil.copytree if p.is_dir() else shutil.copy)(p, tmp_path/"in"/"s1"/p.name)
    told = prepare(tmp_path/"in", tmp_path/"out", kind="totalseg")
    names = read_json(tmp_path/"out"/"labels.json")
    assert told["cases"] == 1 and list(names.values()) == sorted(names.values()) and len(names) == 61
    lbl = read_volume(tmp_path/"out"/"masks"/"s1.zarr")
    k = int(next(i for i, n in names.items() if n == "liver"))
    liver = net_volume(read_volume(src/"segmentations"/"liver.nii.gz")).data
    assert np.array_equal(lbl.data == k, liver == 1)
