"""Body mask: known shapes, necks of air, backgrounds, grids and orientations, hostile scans, real scans."""

from dataclasses import replace

import cc3d
import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes

from medvol_nb import phantoms
from medvol_nb.body import body_mask, modality_of
from medvol_nb.core import ConfigError, DataError, rng_for
from medvol_nb.geometry import Volume, affine_from, reorient
from medvol_nb.volume import read_volume


def volume(img, spacing=2.0):
    return Volume(img, affine_from(spacing))


def one_piece(mask):
    return cc3d.connected_components(mask, connectivity=6).max() == 1


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(scope="module")
def ct():
    return phantoms.abdomen((56, 48, 40), seed=2)


@pytest.mark.parametrize("seed", range(4))
def test_a_bent_body_is_found(seed):
    "The phantom's own mask, up to the rim that half a voxel decides"
    p = phantoms.organs((64, 60, 56), seed=seed)
    body = body_mask(volume(p.img, p.spacing))
    assert body.modality == "ct" and one_piece(body.mask)
    assert dice(body.mask, p.lbl > 0) > 0.97


def test_cavities_belong_to_the_body(ct):
    body = body_mask(volume(ct.img, ct.spacing))
    assert body.mask[ct.lbl > 0].mean() > 0.999 and one_piece(body.mask)
    assert not body.mask[0].any() and not body.mask[:, 0].any()


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 1, 5), (5, 1, 1), (0.5, 0.5, 8)])
def test_spacing_does_not_move_the_body(spacing):
    "A box of tissue with air around it, at any voxel size: exact, because its walls are on voxel borders"
    shape = [max(12, round(120 / s)) for s in spacing]
    img = np.full(shape, -1000, np.int16)
    inside = tuple(slice(n // 4, n - n // 4) for n in shape)
    img[inside] = 40
    truth = img > 0
    found = body_mask(volume(img, spacing)).mask
    assert dice(found, truth) > 0.99 and one_piece(found)


@pytest.mark.parametrize("radius, is_cut", [(2, True), (14, False)])
def test_a_neck_of_air_is_cut_by_its_width(radius, is_cut):
    "Lung that opens to the room through a channel of `radius` mm: 4 mm is the limit"
    n, s = 60, 2.0
    img = np.full((n, n, n), -1000.0)
    img[6:54, 6:54, 6:54] = 40
    img[16:44, 16:44, 16:44] = -950
    x, y = np.indices((n, n)) * s - n * s / 2 + s / 2
    img[(x**2 + y**2 <= radius**2)[:, :, None] & (np.arange(n) < 20)] = -1000
    mask = body_mask(volume(img, s), "ct", grid_mm=s).mask
    assert mask[30, 30, 30] == is_cut and not mask[2, 2, 2] and mask[8, 8, 8]


def test_a_table_that_stands_apart_is_dropped(ct):
    img = ct.img.copy()
    img[:, -1:, :] = 300
    assert not body_mask(volume(img, ct.spacing)).mask[:, -1].any()


def test_a_crop_inside_the_chest_is_body():
    lung = (rng_for(0, "lung").normal(-850, 20, (20, 20, 20))).astype(np.int16)
    lung[:, :6] = 40
    assert body_mask(volume(lung), "ct").mask.all()


@pytest.mark.parametrize("background", [0.0, -3.0, 7.0])
def test_a_constant_background_is_outside(background):
    "Skull-stripped brains: everything above the constant, whatever it is"
    inner = phantoms.ball(30, radius=11)
    img = np.where(inner, background + 1 + rng_for(1, "brain").random((30, 30, 30)), background)
    assert (body_mask(volume(img)).mask == inner).all()


def test_magnetic_resonance_with_a_noisy_background():
    "The phantom is 0 around the head; with noise over it only a threshold can tell"
    p = phantoms.head((56, 60, 56), seed=1)
    noise = np.abs(rng_for(0, "coil").normal(0, 4, p.img.shape))
    body = body_mask(volume(p.img + noise, p.spacing))
    assert body.modality == "other" and body.threshold > 4
    assert body.mask[p.lbl > 0].all() and dice(body.mask, binary_fill_holes(p.img > 0)) > 0.95


@pytest.mark.parametrize("codes", ["LPS", "SRA", "AIL"])
def test_orientation_is_only_a_way_to_store(ct, codes):
    scan = volume(ct.img, ct.spacing)
    turned = body_mask(reorient(scan, codes)).mask
    back = reorient(replace(reorient(scan, codes), data=turned), "RAS").data
    assert dice(back, body_mask(scan).mask) > 0.99


@pytest.mark.parametrize("kind", ["i2", ">i2", "i4", ">f4", "f2", "f8"])
def test_number_types_do_not_matter(ct, kind):
    img = ct.img.astype(np.int16)
    expected = body_mask(volume(img, ct.spacing))
    found = body_mask(volume(img.astype(kind), ct.spacing))
    assert (found.mask == expected.mask).all() and found.modality == "ct"


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 40, 1), (1, 40, 40), (2, 3, 4), (300, 3, 3)])
def test_thin_volumes(shape):
    img = np.full(shape, 40, np.int16)
    assert body_mask(volume(img)).mask.all()
    img[: shape[0] // 2] = 0  # half of it, where there are two halves
    mask = body_mask(volume(img)).mask
    assert mask.shape == shape and mask[-1].all()


def test_no_body_is_an_error():
    air = rng_for(0, "air").normal(-1000, 5, (16, 16, 16))
    with pytest.raises(DataError, match="no body found: no voxel is above -500.*mask='none'"):
        body_mask(volume(air))
    with pytest.raises(DataError, match=r"one 3-D scan is needed, got shape \(2, 4, 4, 4\)"):
        body_mask(Volume(np.zeros((2, 4, 4, 4)), affine_from(1), "cxyz"))


def test_a_modality_that_is_none_is_an_error(ct):
    "CT in capitals was taken for 'other'"
    with pytest.raises(ConfigError, match="'auto', 'ct' or 'other', got 'CT'"):
        body_mask(volume(ct.img, ct.spacing), "CT")


def test_the_scan_is_not_changed(ct):
    img = ct.img.copy()
    img.setflags(write=False)
    body_mask(volume(img, ct.spacing))
    assert (img == ct.img).all()


def test_modality_needs_air():
    assert modality_of(np.full((5, 5, 5), 40.0)) == "other"
    assert modality_of(np.zeros((0, 3, 3))) == "other"
    few = np.zeros(10000)
    few[:50], few[50:] = -1000, 30
    assert modality_of(few) == "other"  # one voxel in two hundred
    few[:200] = -1000
    assert modality_of(few) == "ct"


def real(data_dir, name):
    folder = data_dir / "datalists_supervoxels"
    return read_volume(folder / name)


@pytest.mark.parametrize(
    "image, seg",
    [
        ("totalseg/abdomen_3mm_ct.nii.gz", "totalseg/abdomen_3mm_seg.nii.gz"),
        ("totalseg/abdomen_mr.nii.gz", "totalseg/abdomen_mr_seg.nii.gz"),
        ("openkbp/imagesTr/kbp_017.nii.gz", "openkbp/labelsTr/kbp_017.nii.gz"),
    ],
)
def test_organs_of_real_scans_lie_in_the_body(data_dir, image, seg):
    vol, lbl = real(data_dir, image), real(data_dir, seg)
    body = body_mask(vol)
    assert body.mask[lbl.data > 0].mean() > 0.99 and one_piece(body.mask) and 0.05 < body.mask.mean() < 0.9
    assert body.modality == ("other" if "mr" in image else "ct")


def test_the_brain_of_a_stripped_head(data_dir):
    vol = read_volume(data_dir / "anatomical_embedding/brain_ct_mr/mni_t1_stripped.nii.gz")
    body = body_mask(vol)
    assert body.modality == "other" and dice(body.mask, np.asarray(vol.data) > np.min(vol.data)) > 0.99
