"Volumes and grids for embeddings: indices and millimetres, orientation, brightness, headers as they come"
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medvol_nb.core import DataError, rng_for
from medvol_nb.embed.data import (
    NetGrid,
    limits_of,
    list_scans,
    net_grid,
    net_volume,
    network_volume,
    rescale_ct,
    rescale_mr,
)
from medvol_nb.geometry import Volume, affine_from, reorient, to_axes
from medvol_nb.volume import read_volume

ORIENTATIONS = ("RAS", "LPS", "PIL", "SAR", "IRP", "ALI")
STRIDES = {"fine": (2, 2, 2), "coarse": (4, 16, 16), "semantic": (2, 2, 2)}


def blob(shape=(40, 36, 28), spacing=(1.3, 1.3, 3.0), seed=0):
    img = ndimage.gaussian_filter(rng_for(seed, "blob").normal(0, 1, shape), 3)
    return Volume((img/img.std()*300).astype(np.int16), affine_from(spacing, (-31, 12, -200)))


def oblique(degrees=17):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 5], [s*c, c*c, -s, -9], [s*s, s*c, c, 40], [0, 0, 0, 1.0]])


# ------------------------------------------------------------------------------------------------------------- grids

@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("spacing", [2.0, 1.3])
def test_points_keep_their_millimetres_through_all_grids(codes, spacing):
    vol, pts = blob(), rng_for(1).uniform(-200, 200, (100, 3))
    for v in (reorient(vol, codes), to_axes(reorient(vol, codes), "zyx")):
        for affine in (v.affine, oblique() @ v.affine):
            grid = net_grid(Volume(v.data, affine, v.axes), spacing)
            for g in (grid, *(grid.feature(s) for s in STRIDES.values())):
                assert np.abs(g.to_world(g.to_index(pts)) - pts).max() < 1e-9


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_network_sees_the_same_whatever_the_storage(codes):
    vol = blob()
    expected, grid = network_volume(vol, intensity="ct")
    for v in (reorient(vol, codes), to_axes(reorient(vol, codes), "zyx"), to_axes(vol, "yxz")):
        img, other = network_volume(v, intensity="ct")
        assert np.abs(img - expected).max() < 1e-3 and np.abs(other.affine - grid.affine).max() < 1e-9
    assert nib.aff2axcodes(grid.affine[:, [2, 1, 0, 3]]) == ("L", "P", "S")


def test_R6_headers_of_all_kinds_round_trip_to_a_thousandth_of_a_millimetre(tmp_path):
    "s-form 0 with a q-form, neither, sheared axes, negative strides"
    data, place = blob().data, affine_from((1.1, 0.9, 2.4), (10, -20, 5))
    turned = oblique() @ place
    shear = place @ np.array([[1, 0.2, 0, 0], [0, 1, 0.1, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    mirror = place @ np.diag([-1, 1, -1, 1.0])
    for k, (affine, sform, qform) in enumerate([(turned, 0, 1), (place, 0, 0), (shear, 1, 0), (mirror, 1, 1)]):
        img = nib.Nifti1Image(data, affine)
        img.set_sform(affine, sform)
        if not np.allclose(affine, shear): img.set_qform(affine, qform)
        nib.save(img, tmp_path/f"{k}.nii.gz")
        vol = read_volume(tmp_path/f"{k}.nii.gz")
        ijk = rng_for(k).uniform(0, 25, (50, 3))
        world = nib.affines.apply_affine(nib.load(tmp_path/f"{k}.nii.gz").affine, ijk)
        grid = net_grid(vol)
        for g in (grid, *(grid.feature(s) for s in STRIDES.values())):
            back = g.to_world(g.to_index(world))
            assert np.abs(back - world).max() < 1e-3
            assert np.abs(np.linalg.solve(vol.affine, np.c_[back, np.ones(50)].T)[:3].T - ijk).max() < 1e-3


def test_D24_no_half_voxel_is_lost_between_the_grids():
    "A marked place is at the same millimetres in file, network and feature grid (the reference is up to 1 mm off)"
    vol = blob((60, 60, 60), (1.0, 1.0, 1.0))
    where = np.array([30.0, 21.5, 33.0])
    ijk = np.indices(vol.shape).reshape(3, -1).T
    img = np.exp(-((ijk - where)**2).sum(axis=1)/2/4**2).reshape(vol.shape)
    mm = vol.affine[:3, :3] @ where + vol.affine[:3, 3]
    seen, grid = network_volume(Volume((img*1000).astype(np.float32), vol.affine), intensity="ct")
    weight = seen - seen.min()
    centre = ndimage.center_of_mass(weight)
    assert np.linalg.norm(grid.to_world(centre) - mm) < 0.1
    pooled = weight[:30, :30, :30].reshape(15, 2, 15, 2, 15, 2).mean(axis=(1, 3, 5))
    assert np.linalg.norm(grid.feature((2, 2, 2)).to_world(ndimage.center_of_mass(pooled)) - mm) < 0.1


def test_feature_grids_cover_the_network_grid():
    grid = NetGrid((33, 50, 47), affine_from(2.0, axes="zyx"))
    for strides in STRIDES.values():
        g = grid.feature(strides)
        assert g.shape == tuple(-(-n//s) for n, s in zip(grid.shape, strides)) and g.strides == strides
        assert np.allclose(g.to_world((-0.5,)*3), grid.to_world((-0.5,)*3))
        assert np.allclose(np.array(g.spacing), np.array(strides)*2.0)
    assert NetGrid.from_dict(grid.to_dict()).to_dict() == grid.to_dict()


@pytest.mark.parametrize("bad, word", [(dict(shape=(0, 2, 2)), "sizes >= 1"), (dict(strides=(0, 1, 1)), "strides >= 1"),
                                       (dict(affine=np.zeros((4, 4))), "not invertible")])
def test_grids_refuse(bad, word):
    with pytest.raises(DataError, match=word):
        NetGrid(**{"shape": (2, 2, 2), "affine": np.eye(4), "strides": (1, 1, 1), **bad})


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 3), (5, 1, 200)])
def test_thin_volumes(shape):
    vol = Volume(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), affine_from((0.3, 0.3, 8)))
    if vol.data.size == 1:
        with pytest.raises(DataError, match="every voxel"): network_volume(vol, intensity="ct")
        return
    img, grid = network_volume(vol, intensity="ct")
    assert img.shape == grid.shape and np.isfinite(img).all()


# -------------------------------------------------------------------------------------------------------- brightness

def test_ct_scale_is_that_of_the_specification():
    assert np.allclose(rescale_ct(np.array([-1024, 3071, -3000, 5000])), [-50, 205, -50, 205])
    assert abs(float(rescale_ct(np.array([0.0]))[0]) - 13.8) < 0.05
    assert abs(float(rescale_ct(np.array([-622.0]))[0]) + 25) < 0.1


def test_mr_scale_by_percentiles_with_whole_bounds():
    img = np.linspace(3.7, 1003.7, 10001)
    low, high = limits_of(img, "mr")
    assert (low, high) == (5, 1001)
    assert rescale_mr(img)[0] == -50 and rescale_mr(img)[-1] == 205
    assert limits_of(np.linspace(0, 0.7, 100), "mr")[1] == 1
    narrow = limits_of(np.linspace(1.2, 1.8, 1000), "mr")
    assert 1.2 <= narrow[0] < narrow[1] <= 1.8


@pytest.mark.parametrize("data, word", [
    (np.full((4, 4, 4), np.nan), "NaN"), (np.zeros((4, 4, 4)), "every voxel is 0"), (np.zeros((0, 4, 4)), "no voxels"),
    (np.zeros((4, 4, 4), complex), "real numbers")])
def test_useless_scans_are_refused(data, word):
    with pytest.raises(DataError, match=word): network_volume(Volume(data, np.eye(4)))


def test_outside_of_the_body_is_air():
    vol = blob()
    mask = np.zeros(vol.shape, bool)
    mask[10:30, 10:30, 8:20] = True
    img, grid = network_volume(vol, intensity="ct", body=mask)
    far = ndimage.map_coordinates(mask.astype(float), net_index(vol, grid), order=0, cval=0).reshape(grid.shape)
    assert (img[~ndimage.binary_dilation(far > 0, iterations=3)] == -50).all()


def net_index(vol, grid):
    "Indices of `vol` at the voxels of the grid"
    world = grid.to_world(np.indices(grid.shape).reshape(3, -1).T)
    return np.linalg.solve(vol.affine, np.c_[world, np.ones(len(world))].T)[:3]


def test_only_scans_are_listed(tmp_path):
    for name in ("b.nii", "a.NRRD", ".c.nii", "t.txt"): (tmp_path/name).touch()
    assert [p.name for p in list_scans(tmp_path)] == ["a.NRRD", "b.nii"]


# --------------------------------------------------------------------------------------------------------- real scans

def test_two_crops_of_one_chest_show_the_same_at_the_same_millimetres(data_dir):
    folder = data_dir/"anatomical_embedding"/"thorax_two_crops"
    a, b = (read_volume(folder/f"crop_{k}_ct.nii.gz") for k in "ab")
    shared = np.array([[20, 30, 40], [60, 50, 70], [100, 90, 20.0]]) # of b; a is shifted by 24 slices
    mm_b = shared @ b.affine[:3, :3].T + b.affine[:3, 3]
    mm_a = (shared + [0, 0, 24]) @ a.affine[:3, :3].T + a.affine[:3, 3]
    (img_a, grid_a), (img_b, grid_b) = network_volume(a), network_volume(b)
    inner = grid_b.to_world(rng_for(0).uniform(8, np.array(grid_b.shape) - 9, (2000, 3)))
    shift = (mm_a - mm_b)[0] # the headers may or may not share a world
    values = [ndimage.map_coordinates(i, g.to_index(p).T, order=1) for i, g, p in
              ((img_a, grid_a, inner + shift), (img_b, grid_b, inner))]
    assert np.corrcoef(*values)[0, 1] > 0.99


@pytest.mark.parametrize("name, contrast", [
    ("thorax_two_crops/crop_a_ct", "ct"), ("lung_two_timepoints/baseline_half_res_ct", "ct"),
    ("brain_ct_mr/mni_t1_stripped", "mr")])
def test_real_scans_become_network_volumes(data_dir, name, contrast):
    vol = read_volume(data_dir/"anatomical_embedding"/f"{name}.nii.gz")
    img, grid = network_volume(vol)
    assert img.dtype == np.float32 and img.min() >= -50 and img.max() <= 205 and img.std() > 5
    assert limits_of(vol.data, contrast) and np.allclose(grid.spacing, 2, atol=1e-6)
    assert np.abs(img - network_volume(vol, intensity=contrast)[0]).max() == 0
    assert net_volume(vol).orientation == "SPL"
