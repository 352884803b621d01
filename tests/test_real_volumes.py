"Real scans: every file against nibabel, places through all formats, and the traps the data description names"
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from medvol_nb.core import DataError, FormatError, rng_for
from medvol_nb.geometry import (
    Volume,
    corners,
    crop,
    locate_crop,
    reorient,
    resample,
    resample_to,
    same_grid,
    to_index,
    to_world,
)
from medvol_nb.volume import compare_grids, read_header, read_nifti, read_volume, write_volume

FOLDERS = ("datalists_supervoxels", "anatomical_embedding")
ROOT = Path(os.environ.get("MEDVOL_DATA", Path(__file__).resolve().parents[1]/"../shared/data"))
NAMES = sorted(p.relative_to(ROOT).as_posix() for f in FOLDERS for p in (ROOT/f).rglob("*.nii.gz")) or ["none"]


@pytest.fixture
def totalseg(data_dir): return data_dir/"datalists_supervoxels"/"totalseg"
@pytest.fixture
def thorax(data_dir): return data_dir/"anatomical_embedding"/"thorax_two_crops"


def codes(vol): return {code for code, _ in vol.meta["notes"]}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_what_nibabel_sees(data_dir, name):
    ours, theirs = read_volume(data_dir/name), nib.load(data_dir/name)
    want = np.asarray(theirs.dataobj)
    if theirs.dataobj.slope == 1 and theirs.dataobj.inter == 0:
        assert ours.dtype == theirs.get_data_dtype()
        assert_array_equal(ours.data, want)
    else:
        assert ours.dtype == np.float32
        assert_allclose(ours.data, want, rtol=1e-6, atol=1e-6*abs(theirs.dataobj.inter))
    assert ours.shape == theirs.shape[:3]
    assert_allclose(ours.affine, theirs.affine, atol=1e-6)
    assert ours.orientation == "".join(nib.aff2axcodes(theirs.affine))
    head = read_header(data_dir/name)
    assert head.shape == ours.shape and head.dtype == ours.dtype and head.meta["notes"] == ours.meta["notes"]


def marked(vol, name):
    "The eight corners and five random voxels"
    inner = rng_for(0, "voxel", name).integers(0, vol.shape, (5, 3))
    ends = np.array([[k >> b & 1 for b in range(3)] for k in range(8)])*(np.array(vol.shape) - 1)
    return np.concatenate([ends, inner])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["nii.gz", "zarr", "nrrd"])
def test_places_survive_reorienting_saving_and_loading(data_dir, tmp_path, name, suffix):
    if suffix == "nrrd": pytest.importorskip("SimpleITK")
    vol = read_volume(data_dir/name)
    pts = marked(vol, name)
    for target in ("RAS", "LPS") if suffix != "nrrd" else ("PIR",):
        moved = reorient(vol, target)
        options = {"chunks": 128} if suffix == "zarr" else {}
        back = read_volume(write_volume(moved, tmp_path/f"{target}.{suffix}", **options))
        assert back.orientation == target and back.dtype == vol.dtype
        world = to_world(vol.affine, pts)
        ijk = to_index(back.affine, world)
        assert np.abs(to_world(back.affine, np.round(ijk)) - world).max() < 1e-3
        at = tuple(np.round(ijk).astype(int).T)
        assert_array_equal(back.data[at], vol.data[tuple(pts.T)])
        again = reorient(back, vol.orientation)
        assert_array_equal(again.data, vol.data)
        assert np.abs(corners(again) - corners(vol)).max() < 1e-3


# ---- the traps

def test_image_and_label_with_opposite_y_are_one_grid_after_reorienting(totalseg):
    ct, seg = (read_volume(totalseg/f"abdomen_512_{n}.nii.gz") for n in ("ct", "seg"))
    assert (ct.orientation, seg.orientation) == ("LPS", "LAS") and ct.shape == seg.shape
    assert compare_grids(ct, seg) == "reoriented"
    ras = [reorient(v) for v in (ct, seg)]
    assert same_grid(*ras) and compare_grids(*ras) == "same"
    # Body, not air, lies under the labels; without reorienting the same voxels are partly air
    inside = ras[0].data[ras[1].data > 0]
    wrong = ct.data[seg.data > 0]
    assert np.mean(inside < -900) < np.mean(wrong < -900)


def test_a_wasteful_number_type_is_noted(totalseg):
    ct = read_volume(totalseg/"abdomen_3mm_ct.nii.gz")
    assert ct.dtype == np.int32 and "W209" in codes(ct)
    assert "W209" not in codes(read_volume(totalseg/"abdomen_3mm_crop30_ct.nii.gz"))


def test_a_crop_with_a_forgotten_affine_is_found(totalseg):
    whole, part = (read_volume(totalseg/f"abdomen_3mm_{n}ct.nii.gz") for n in ("", "crop30_"))
    assert compare_grids(whole, part) == compare_grids(part, whole) == "shifted crop"
    assert locate_crop(whole, part) == (0, 0, 82)
    fixed = crop(whole, (0, 0, 82), part.shape)
    assert_array_equal(fixed.data, part.data)
    assert_allclose(fixed.affine[:3, 3] - part.affine[:3, 3], (0, 0, 246), atol=.01)
    assert compare_grids(whole, fixed) == "different" and locate_crop(whole, fixed) == (0, 0, 82)
    for img, name in ((part, "crop30_"), (whole, "")):
        assert compare_grids(img, read_volume(totalseg/f"abdomen_3mm_{name}seg.nii.gz")) == "same"


def test_two_crops_of_one_chest_agree_over_their_overlap(thorax):
    a, b = (read_volume(thorax/f"crop_{n}_ct.nii.gz") for n in "ab")
    assert a.shape == (120, 126, 164) and b.shape == (122, 102, 112)
    over = a.data[:120, :102, 24:136].astype(int) - b.data[:120, :102, :112]
    assert np.abs(over).max() <= 2
    for ijk in ((0, 0, 0), (119, 101, 111), (60, 50, 56)):
        assert_allclose(to_world(b.affine, ijk), to_world(a.affine, np.add(ijk, (0, 0, 24))), atol=1e-3)
    assert compare_grids(a, b) == "different"
    onto = resample_to(b, a.affine, a.shape, order=0, fill=-1024)
    assert_array_equal(onto.data[:120, :102, 24:136], b.data[:120, :102])


def test_grids_that_agree_only_in_the_world(thorax):
    a, heart = read_volume(thorax/"crop_a_ct.nii.gz"), read_volume(thorax/"heart_full_fov.nii.gz")
    assert heart.shape == (233, 167, 191)
    for ijk in ((72, 13, 0), (150, 100, 90)):
        assert_allclose(to_world(heart.affine, ijk), to_world(a.affine, np.add(ijk, (-72, -13, 0))), atol=1e-3)
    cut = crop(heart, (72, 13, 0), a.shape)
    assert same_grid(cut, a, 1e-3)
    assert_array_equal(resample_to(heart, a.affine, a.shape, order=0).data, cut.data)
    assert heart.data.any() and np.mean(a.data[cut.data > 0] > -200) > .95 # muscle and blood, not lung


def test_masks_belong_to_their_crop(thorax):
    for ct, mask in (("crop_a_ct", "crop_a_aorta"), ("crop_b_ct", "crop_b_pulmonary_artery")):
        image, organ = (read_volume(thorax/f"{n}.nii.gz") for n in (ct, mask))
        assert compare_grids(image, organ) == "same"
        assert image.data[organ.data > 0].mean() > 100 # contrast


def test_both_time_points_of_the_lung_lie_on_one_another(data_dir):
    folder = data_dir/"anatomical_embedding"/"lung_two_timepoints"
    half, full = (read_volume(folder/f"{n}_ct.nii.gz") for n in ("baseline_half_res", "followup_warped_to_baseline"))
    onto = resample_to(full, half.affine, half.shape, fill=-1024)
    inner = (slice(4, -4),)*3
    assert np.corrcoef(onto.data[inner].ravel(), half.data[inner].ravel())[0, 1] > .97


def test_a_template_with_a_scale_factor(data_dir):
    path = data_dir/"anatomical_embedding"/"brain_ct_mr"/"mni_grey_prior.nii.gz"
    vol, img = read_volume(path), nib.load(path)
    assert img.get_data_dtype() == np.uint8 and vol.dtype == np.float32 and vol.orientation == "LAS"
    assert 0 <= vol.data.min() and vol.data.max() <= 1.01


def test_ct_and_mr_of_the_template_lie_on_one_another(data_dir):
    folder = data_dir/"anatomical_embedding"/"brain_ct_mr"
    ct, mr, native = (read_volume(folder/f"{n}.nii.gz") for n in ("mni_ct_template_stripped", "mni_t1_stripped",
                                                                   "native_ct_brain_stripped"))
    on = resample_to(mr, ct.affine, ct.shape).data > 1
    both = (on & (ct.data > 0)).sum()
    assert both > .999*on.sum() and 2*both/(on.sum() + (ct.data > 0).sum()) > .9 # the CT was stripped less tightly
    assert np.abs(corners(native)[:, 2].mean() - corners(mr)[:, 2].mean()) > 900 # more than a metre apart in z


def test_patients_in_odd_orientations(data_dir):
    for folder in ("imagesTr", "imagesTs"):
        for path in sorted((data_dir/"datalists_supervoxels"/"openkbp"/folder).glob("*.nii.gz")):
            img, lbl = read_volume(path), read_volume(path.parent.parent/folder.replace("images", "labels")/path.name)
            assert img.orientation == "PLI" and compare_grids(img, lbl) == "same"
            assert set(np.unique(lbl.data)) <= set(range(8)) and img.data.min() == -1000
            iso = resample(reorient(lbl), 3.0, order=0)
            assert set(np.unique(iso.data)) <= set(np.unique(lbl.data))
            volume = [np.bincount(v.data.ravel(), minlength=8)[1:]*np.prod(v.spacing) for v in (lbl, iso)]
            assert_allclose(volume[0], volume[1], rtol=.12)


# ---- damage

def test_a_hundred_cuts_and_a_hundred_flips_are_always_reported(totalseg, tmp_path):
    source = totalseg/"abdomen_mr.nii.gz"
    good, want, path = source.read_bytes(), read_nifti(source), tmp_path/"bad.nii.gz"
    for n in range(100):
        path.write_bytes(good[:int(rng_for(0, "cut", n).integers(0, len(good)))])
        with pytest.raises(FormatError, match="bad.nii.gz"): read_nifti(path)
    for n in range(100):
        bad, at = bytearray(good), int(rng_for(0, "flip", n).integers(80, 8*len(good))) # after the ten free bytes
        bad[at//8] ^= 1 << at % 8
        path.write_bytes(bad)
        try: got = read_nifti(path)
        except (FormatError, DataError): continue
        assert good[3] & 8 and at//8 < good.index(b"\0", 10) + 1 # the name inside the gzip header carries no data
        assert_array_equal(got.data, want.data)


def test_writing_real_scans_again_is_smaller_or_alike_and_equal(totalseg, tmp_path):
    for name in ("abdomen_3mm_ct", "abdomen_512_ct", "abdomen_mr", "abdomen_512_seg"):
        vol = read_volume(totalseg/f"{name}.nii.gz")
        paths = [write_volume(v, tmp_path/f"{k}_{name}.nii.gz") for k, v in enumerate(
            (vol, replace(vol, data=np.ascontiguousarray(vol.data))))]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        theirs = nib.load(paths[0])
        assert_array_equal(np.asarray(theirs.dataobj), vol.data)
        assert paths[0].stat().st_size < 1.35*(totalseg/f"{name}.nii.gz").stat().st_size
        assert isinstance(vol, Volume)
