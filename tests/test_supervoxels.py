"""The pipeline: counts and connectivity, places and spacings, hostile scans, the published algorithm, real scans."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cc3d
import numpy as np
import pytest
from scipy.ndimage import find_objects

from benchmarks.reference import supervoxels as reference
from medvol_nb import phantoms
from medvol_nb.body import body_mask
from medvol_nb.core import ConfigError, DataError, MissingFile, rng_for
from medvol_nb.geometry import Volume, affine_from, reorient
from medvol_nb.samfeat import SamFeatureExtractor
from medvol_nb.supervoxels import (
    SupervoxelSettings,
    encoder_plan,
    explore,
    intensity_features,
    legacy_supervoxels,
    supervoxels,
    windowed,
    working_spacing,
)
from medvol_nb.sv_metrics import supervoxel_metrics
from medvol_nb.volume import read_volume, write_volume

ROOT = Path(__file__).resolve().parents[1]


def volume(img, spacing=1.0):
    return Volume(img, affine_from(spacing))


@pytest.fixture(scope="module")
def scan():
    "A CT of 48 x 40 x 32 voxels as int16"
    p = phantoms.abdomen((48, 40, 32), seed=1)
    return volume(p.img.astype(np.int16), p.spacing)


@pytest.fixture(scope="module")
def sam():
    return SamFeatureExtractor(None, allow_random=True, device="cpu")


def check(labels, n, mask=None):
    "B3: ids 1 to n, each one piece, 0 exactly outside the mask"
    ids = np.unique(labels)
    assert ids[ids > 0].tolist() == list(range(1, n + 1))
    assert cc3d.connected_components(labels.astype(np.int32), connectivity=6).max() == n
    if mask is not None:
        assert ((labels > 0) == mask).all()


# ---------------------------------------------------------------- counts, connectivity, masks


@pytest.mark.parametrize("n", [1, 2, 50, 100, 400])
@pytest.mark.parametrize("grid_mm", [1, 16])
@pytest.mark.parametrize("refine", [True, False])
def test_B3_count_connectivity_and_mask(scan, n, grid_mm, refine):
    found = supervoxels(scan, n, grid_mm=grid_mm, refine=refine)
    check(found.labels.data, n, body_mask(scan).mask)
    assert found.info["n"] == found.info["asked"] == n and found.labels.data.dtype == np.int16


def test_B3_a_mask_of_islands(scan):
    "As many as asked for, though the working grid joins what the mask parts; more where there are more islands"
    mask = np.zeros(scan.shape, bool)
    mask[4:15, 5:30, 5:25] = mask[16:40, 5:30, 5:25] = True
    for refine in (True, False):
        check(supervoxels(scan, 20, mask=mask, grid_mm=16, refine=refine).labels.data, 20, mask)
    sparse = rng_for(0, "sparse").random(scan.shape) > 0.7
    islands = cc3d.connected_components(sparse, connectivity=6).max()
    for refine in (True, False):
        check(supervoxels(scan, 20, mask=sparse, grid_mm=16, refine=refine).labels.data, islands, sparse)


def test_B3_no_mask_covers_everything(scan):
    check(
        supervoxels(scan, 60, mask=None, settings=SupervoxelSettings(n_segments=60, mask="none")).labels.data,
        60,
        np.ones(scan.shape, bool),
    )


def test_settings_that_ask_for_an_encoder_are_not_answered_with_intensities(scan):
    with pytest.raises(ConfigError, match="the settings say 'sam', the call 'intensity'"):
        supervoxels(scan, settings=SupervoxelSettings(features="sam", n_segments=20))
    assert supervoxels(scan, settings=SupervoxelSettings(n_segments=20)).info["encoder"] == "intensity"


def test_mean_volume_instead_of_a_number(scan):
    found = supervoxels(scan, target_volume_ml=500)
    assert found.info["n"] == round(found.info["volume_ml"] / 500) > 1
    check(found.labels.data, found.info["n"])


def test_sizes_follow_their_bounds(scan):
    sizes = np.bincount(supervoxels(scan, 60, max_size_factor=2).labels.data.ravel())[1:]
    assert sizes.max() < 3 * sizes.mean()  # 2 on the working grid; the border pass moves some
    assert sizes.min() > 0.05 * sizes.mean()


def test_figures_describe_the_labels(scan):
    found = supervoxels(scan, 80)
    lbl, info = found.labels.data, found.info
    ml = np.bincount(lbl.ravel())[1:] * np.prod(scan.spacing) / 1000
    np.testing.assert_allclose(
        [info["smallest_ml"], info["median_ml"], info["largest_ml"], info["volume_ml"]],
        [ml.min(), np.median(ml), ml.max(), ml.sum()],
    )
    ijk = np.array([np.argwhere(lbl == k).mean(axis=0) for k in range(1, 81)])
    np.testing.assert_allclose(found.centres, ijk @ scan.affine[:3, :3].T + scan.affine[:3, 3], atol=1e-6)
    assert info["encoder"] == "intensity" and info["modality"] == "ct"


def test_same_input_same_bytes_whatever_the_threads(scan, tmp_path):
    code = (
        "import torch, sys; torch.set_num_threads(int(sys.argv[1]))\n"
        "from medvol_nb.supervoxels import supervoxels; from medvol_nb.volume import read_volume\n"
        "from medvol_nb.core import fingerprint\n"
        "print(fingerprint(supervoxels(read_volume(sys.argv[2]), 90).labels.data))"
    )
    path = write_volume(scan, tmp_path / "scan.nii.gz")

    def run(threads):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", code, threads, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env).stdout

    out = {t: run(t) for t in ("1", "2")}
    assert out["1"] == out["2"] != ""


# ---------------------------------------------------------------- places and spacings


@pytest.mark.parametrize("seed", range(3))
def test_B8_spacing_does_not_stretch_supervoxels(seed):
    "Stored at 1 x 1 x 1 and at 1 x 1 x 4 mm: median extents differ by less than 15 % along every axis"
    fine = phantoms.organs((96, 96, 96), seed=seed).img
    thick = fine.reshape(96, 96, 24, 4).mean(axis=3)
    extents = []
    for img, spacing in ((fine, (1, 1, 1)), (thick, (1, 1, 4))):
        boxes = find_objects(supervoxels(volume(img, spacing), 120).labels.data)
        extents.append(np.median([[(s.stop - s.start) * d for s, d in zip(b, spacing)] for b in boxes], axis=0))
    assert (np.abs(extents[1] / extents[0] - 1) < 0.15).all()


def test_B8_the_place_in_the_world_does_not_matter(scan):
    expected = supervoxels(scan, 70)
    moved = replace(scan, affine=scan.affine + np.array([[0, 0, 0, 70.5], [0, 0, 0, -300], [0, 0, 0, 9], [0, 0, 0, 0]]))
    found = supervoxels(moved, 70)
    assert (found.labels.data == expected.labels.data).all()
    np.testing.assert_allclose(found.centres - expected.centres, [[70.5, -300, 9]] * 70, atol=1e-6)


@pytest.mark.parametrize("codes", ["LAS", "RPS", "RAI", "SLP"])
def test_B8_flipped_storage_only_relabels(scan, codes):
    expected = supervoxels(scan, 70)
    found = supervoxels(reorient(scan, codes), 70)
    assert found.labels.orientation == codes
    assert (reorient(found.labels, "RAS").data == expected.labels.data).all()
    np.testing.assert_allclose(found.centres, expected.centres, atol=1e-6)


@pytest.mark.parametrize("axis", range(3))
def test_B8_a_mirrored_patient_only_relabels(scan, axis):
    "On a grid of whole working voxels, so that a mirrored one has the same; then up to ties of single voxels"
    cfg = SupervoxelSettings(n_segments=60, mask="none", grid_mm=16)
    a = supervoxels(scan, settings=cfg).labels.data
    b = np.flip(supervoxels(replace(scan, data=np.flip(scan.data, axis)), settings=cfg).labels.data, axis)
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1, return_counts=True)[1]
    assert np.sort(pairs)[-60:].sum() > 0.999 * a.size


def test_working_grid():
    assert working_spacing((1, 1, 1), (100, 100, 100), 400, 2.0) == (2, 2, 2)
    assert working_spacing((0.7, 0.7, 5), (512, 512, 60), 400, 2.0) == (0.7 * 3, 0.7 * 3, 5)
    assert working_spacing((1, 1, 1), (40, 40, 40), 1000, 2.0) == (1, 1, 1)  # 64 voxels a segment
    assert working_spacing((1, 1, 1), (40, 40, 1), 2, 8.0) == (2, 2, 1)  # cube root of 1600/128; one slice stays one


def test_S3_spacing_decides_features_and_smoothing():
    "A wall across z and one across x, 4 mm slices: the same features in millimetres"
    fine = np.zeros((64, 64, 64), np.float32)
    fine[32:] = 1
    along_x = intensity_features(fine, (1, 1, 1))[:, 32:, 32, 32]
    thick = np.zeros((64, 64, 16), np.float32)
    thick[..., 8:] = 1
    along_z = intensity_features(thick, (1, 1, 4))[:, 32, 32, 8:]
    np.testing.assert_allclose(along_z[4], along_x[4].reshape(-1, 4).mean(axis=1)[:8], atol=0.12)


# ---------------------------------------------------------------- hostile scans


@pytest.mark.parametrize("value", [0, 5, -1000, 1e9])
def test_B9_constant(value):
    check(supervoxels(volume(np.full((12, 10, 9), value, np.float32)), 5).labels.data, 5, np.ones((12, 10, 9), bool))


def test_B9_all_air():
    air = volume(rng_for(0, "air").normal(-1000, 5, (20, 20, 20)).astype(np.int16))
    with pytest.raises(DataError, match="no body found"):
        supervoxels(air, 5)
    check(supervoxels(air, 5, settings=SupervoxelSettings(n_segments=5, mask="none")).labels.data, 5)


@pytest.mark.parametrize("cut", [np.s_[:, :, 16:17], np.s_[24:25], np.s_[:, 20:21], np.s_[20:23, 18:22, 14:19]])
def test_B9_one_slice_and_less_than_a_cell(scan, cut):
    thin = replace(scan, data=scan.data[cut])
    check(supervoxels(thin, 6).labels.data, 6)


@pytest.mark.parametrize("bad, first", [(np.nan, (3, 4, 5)), (np.inf, (0, 0, 0)), (-np.inf, (11, 9, 8))])
def test_B9_not_finite(bad, first):
    img = rng_for(0, "img").normal(size=(12, 10, 9)).astype(np.float32)
    img[first] = img[11, 9, 8] = bad
    n = int((~np.isfinite(img)).sum())
    with pytest.raises(DataError, match=f"{n} voxels are NaN or infinite, first at {re.escape(str(first))}"):
        supervoxels(volume(img), 5)


def test_B9_more_segments_than_voxels():
    img = volume(rng_for(0, "few").normal(100, 50, (6, 5, 4)).astype(np.float32))
    check(supervoxels(img, 1000, mask=np.ones((6, 5, 4))).labels.data, 120)
    check(supervoxels(img, 119, mask=np.ones((6, 5, 4))).labels.data, 119)


@pytest.mark.parametrize("shape, axes", [((2, 5, 5, 5), "cxyz"), ((1, 5, 5, 5), "cxyz")])
def test_B9_four_dimensions(shape, axes):
    with pytest.raises(DataError, match="one 3-D scan is needed, got shape"):
        supervoxels(Volume(np.zeros(shape), affine_from(1), axes), 3)


@pytest.mark.parametrize("kind", ["i2", ">i2", "i4", ">i4", "i8", "f4", ">f4", "f8", ">f8", "u2", "u8"])
def test_B9_number_types_do_not_matter(scan, kind):
    shift = 1100 if kind[0] == "u" else 0  # not Hounsfield units any more, but the same values
    cfg = SupervoxelSettings(n_segments=40, mask="none", window=f"{shift - 1000},{shift + 1000}")
    expected = supervoxels(replace(scan, data=scan.data + shift), settings=cfg).labels.data
    found = supervoxels(replace(scan, data=(scan.data + shift).astype(kind)), settings=cfg).labels.data
    assert (found == expected).all()


@pytest.mark.parametrize("kind", ["?", "u1", "i1", "f2"])
def test_B9_small_number_types(scan, kind):
    img = scan.data > -200 if kind == "?" else np.clip((scan.data + 1000) // 16, 0, 127)
    check(supervoxels(replace(scan, data=img.astype(kind)), 40).labels.data, 40)


def test_B9_complex_is_refused(scan):
    with pytest.raises(DataError, match="real numbers are needed, got complex"):
        supervoxels(replace(scan, data=scan.data.astype(complex)), 4)


def test_B9_big_endian_files(scan, tmp_path):
    import nibabel as nib

    header = nib.Nifti1Header(endianness=">")
    nib.save(nib.Nifti1Image(scan.data.astype(">i2"), scan.affine, header), tmp_path / "big.nii")
    nib.save(nib.Nifti1Image(scan.data, scan.affine), tmp_path / "little.nii")
    a, b = (supervoxels(read_volume(tmp_path / f"{n}.nii"), 40).labels.data for n in ("big", "little"))
    assert (a == b).all()


def test_masks_that_do_not_fit(scan):
    with pytest.raises(DataError, match="mask: is empty"):
        supervoxels(scan, 5, mask=np.zeros(scan.shape))
    with pytest.raises(DataError, match="must have the scan's grid"):
        supervoxels(scan, 5, mask=np.ones((3, 3, 3)))


def test_features_from_elsewhere(scan, sam):
    "An array, a function and an encoder; the wrong grid is an error"
    f = intensity_features(windowed(scan, "ct"), scan.spacing)
    a = supervoxels(scan, 50, features=f)
    b = supervoxels(scan, 50, features=lambda vol: intensity_features(vol.data, vol.spacing))
    c = supervoxels(scan, 50, features=sam, slice_stride=8)
    for found, name in ((a, "given"), (b, "given"), (c, "random")):
        check(found.labels.data, 50)
        assert found.info["encoder"] == name
    with pytest.raises(DataError, match=r"features: \(c, x, y, z\) on the grid"):
        supervoxels(scan, 50, features=f[:, 1:])
    with pytest.raises(MissingFile, match="need an encoder"):
        supervoxels(scan, 50, features="sam")


def test_settings_are_checked(scan):
    with pytest.raises(ConfigError, match="compactnes.*did you mean 'compactness'"):
        supervoxels(scan, 5, compactnes=1)
    with pytest.raises(ConfigError, match="low,high"):
        supervoxels(scan, 5, window="bone")


@pytest.mark.parametrize("stride", [1, 4])
def test_B11_the_plan_is_what_is_encoded(scan, sam, tmp_path, stride):
    cfg = SupervoxelSettings(n_segments=30, slice_stride=stride)
    plan, before = encoder_plan(scan, sam, cfg), sam.encoded
    supervoxels(scan, features=sam, settings=cfg, cache=tmp_path / "kept")
    assert sam.encoded - before == plan.calls > 0
    other = cfg.model_copy(update={"n_segments": 45, "compactness": 0.05})
    check(supervoxels(scan, features=sam, settings=other, cache=tmp_path / "kept").labels.data, 45)
    assert sam.encoded - before == plan.calls


def test_explore_computes_features_once(scan):
    calls = []

    def features(vol):
        calls.append(vol.shape)
        return intensity_features(vol.data, vol.spacing)

    box = explore(scan, features=features, settings=SupervoxelSettings(n_segments=40))
    shown = [box.picture.value]
    box.segments.value = 60
    shown.append(box.picture.value)
    box.compactness.value = 0.4
    assert len({*shown, box.picture.value}) == 3
    assert len(calls) == 1 and box.result.info["n"] == 60
    expected = supervoxels(scan, 60, features=features, compactness=0.4)
    assert (box.result.labels.data == expected.labels.data).all()


def test_explore_starts_where_the_settings_say(scan):
    cfg = SupervoxelSettings(target_volume_ml=40)
    assert explore(scan, settings=cfg).result.info["n"] == supervoxels(scan, settings=cfg).info["n"]


# ---------------------------------------------------------------- as it was published


def test_B1_legacy_is_the_reference_bit_for_bit(sam):
    ct = phantoms.abdomen((20, 16, 12), seed=4)
    vol = volume(ct.img.astype(np.int16), ct.spacing)
    found = legacy_supervoxels(vol, sam.slice_features, 15)
    expected = reference.supervoxels(vol.data, sam.slice_features, 15)
    assert found.data.dtype == expected.dtype == np.int16
    np.testing.assert_array_equal(found.data, expected)
    np.testing.assert_array_equal(found.affine, vol.affine)


@pytest.mark.parametrize("case", ["no air", "all air", "float"])
def test_B1_legacy_at_its_edges(case):
    def grey(images):
        return images[:, None]

    rng = rng_for(0, "legacy", case)
    img = {
        "no air": rng.normal(40, 99, (13, 11, 9)),
        "all air": rng.normal(-1000, 9, (9, 9, 9)),
        "float": rng.normal(-600, 300, (12, 9, 17)),
    }[case].astype(np.float32)
    np.testing.assert_array_equal(legacy_supervoxels(volume(img), grey, 12).data, reference.supervoxels(img, grey, 12))


def test_S2_other_modalities_do_not_saturate():
    "Magnetic resonance of 0 to 4000: the fixed window makes most of it one value, ours does not"
    p = phantoms.head((48, 52, 48), seed=1)
    vol = volume(np.clip(p.img, 0, None) * 40, p.spacing)
    fixed, ours = windowed(vol, "ct"), windowed(vol, "auto", body_mask(vol))
    brain = p.lbl > 0
    assert (fixed[brain] == 1).mean() > 0.5 and (ours[brain] == 1).mean() < 0.05
    figures = supervoxel_metrics(supervoxels(vol, 120).labels.data, p.lbl, p.spacing)
    assert figures["asa"] > 0.75 and figures["disconnected"] == 0


def test_S7_features_stay_on_the_working_grid(scan):
    "Nothing of 32 channels at full resolution: the grid is that of grid_mm, whatever the scan's"
    seen = []

    class Encoder:
        name = "spy"

        def volume_features(self, img, *, shape, **_):
            seen.append((img.shape, shape))
            return rng_for(0, "spy").random((8, *shape))

    found = supervoxels(scan, 20, features=Encoder(), grid_mm=20)
    ((image, shape),) = seen
    assert np.prod(shape) <= np.prod(image) / 4 and list(shape) == found.info["grid"]


def test_S9_ids_do_not_wrap_and_have_no_gaps():
    "More than 32,767: int32; the published script's int16 would be negative"
    shape = (33, 33, 33)
    found = supervoxels(volume(rng_for(0, "many").normal(size=shape).astype(np.float32)), 33**3, mask=np.ones(shape))
    assert found.labels.data.dtype == np.int32
    check(found.labels.data, 33**3)


# ---------------------------------------------------------------- memory


PEAK = """
import re, sys, time
from pathlib import Path
import numpy as np
from medvol_nb import phantoms
from medvol_nb.geometry import Volume, affine_from
import medvol_nb.slic
from medvol_nb.supervoxels import supervoxels
def kb(name): return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
small = phantoms.organs((128, 128, 100), seed=0).img.astype(np.int16)
img = np.ascontiguousarray(small.repeat(4, 0).repeat(4, 1).repeat(3, 2))
for plane in img: plane += np.random.default_rng(0).integers(-20, 20, plane.shape, dtype=np.int16)
vol = Volume(img, affine_from((0.8, 0.8, 1.0)))
Path("/proc/self/clear_refs").write_text("5")
before, start = kb("VmRSS"), time.process_time()
found = supervoxels(vol, 400)
print(found.info["n"], img.shape == (512, 512, 300), kb("VmHWM")*1024 - before*1024, time.process_time() - start)
"""


@pytest.mark.slow
def test_B6_peak_memory_of_a_large_scan():
    "512 x 512 x 300 int16, whole pipeline, above the input: at most 1.5 GB"
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process cannot be reset here")
    out = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        timeout=550,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout.split()
    print(f"peak {float(out[2]) / 1e9:.2f} GB above the input, {float(out[3]):.0f} CPU s")
    assert out[:2] == ["400", "True"] and float(out[2]) <= 1.5e9


# ---------------------------------------------------------------- real scans

TOTALSEG = [
    ("totalseg/abdomen_3mm_crop30_ct", "totalseg/abdomen_3mm_crop30_seg"),
    ("totalseg/abdomen_mr", "totalseg/abdomen_mr_seg"),
    ("totalseg/abdomen_3mm_ct", "totalseg/abdomen_3mm_seg"),
    ("totalseg/abdomen_512_ct", "totalseg/abdomen_512_seg"),
]
OPENKBP = [
    (f"openkbp/images{s}/kbp_{k}", f"openkbp/labels{s}/kbp_{k}")
    for s, k in (("Tr", "017"), ("Tr", "060"), ("Tr", "083"), ("Tr", "099"), ("Tr", "112"), ("Ts", "236"))
]
QUICK = 2


@pytest.mark.parametrize("compactness", [0.01, 0.1])
@pytest.mark.parametrize("n", [100, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "image, truth",
    [
        pytest.param(*p, marks=[pytest.mark.slow] if k >= QUICK else [], id=p[0])
        for k, p in enumerate(TOTALSEG + OPENKBP)
    ],
)
def test_B4_real_scans_against_scikit_image(data_dir, image, truth, n, compactness):
    """The same features, the same region, the same number of pieces: as many as scikit-image has in the body

    Tolerances of B4: 0.005 for ASA and BR(2), 0.01 for UE.
    """
    from skimage.segmentation import slic

    read = lambda name: reorient(read_volume(data_dir / "datalists_supervoxels" / f"{name}.nii.gz"), "RAS")
    vol, lbl = read(image), read(truth).data.astype(np.int64)
    body = body_mask(vol)
    features = intensity_features(windowed(vol, "auto", body), vol.spacing)
    theirs = slic(features, channel_axis=0, compactness=compactness, n_segments=n, sigma=3)
    theirs = np.where(body.mask, theirs, 0)
    k = len(np.unique(theirs)) - 1
    ours = supervoxels(vol, k, features=features).labels.data
    check(ours, k, body.mask)
    a, b = (supervoxel_metrics(x, lbl, vol.spacing) for x in (ours, theirs))
    assert a["k"] == b["k"] == k and a["disconnected"] == 0
    assert a["asa"] >= b["asa"] - 0.005 and a["br"] >= b["br"] - 0.005 and a["ue"] <= b["ue"] + 0.01, (a, b)


@pytest.mark.parametrize("image", ["totalseg/abdomen_3mm_ct", "openkbp/imagesTr/kbp_017"])
def test_real_scans_have_the_number_asked_for(data_dir, image):
    vol = read_volume(data_dir / "datalists_supervoxels" / f"{image}.nii.gz")
    found = supervoxels(vol, 200)
    check(found.labels.data, 200, body_mask(vol).mask)
    assert found.labels.orientation == vol.orientation
    np.testing.assert_array_equal(found.labels.affine, vol.affine)
