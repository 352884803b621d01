"Two views: exact correspondences without coordinate volumes, placement rules, and what happens at the limits"
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from medvol_nb.core import DataError, raises, rng_for
from medvol_nb.embed.data import net_volume, network_volume
from medvol_nb.embed.views import (
    ViewSampler,
    independent_corners,
    open_source,
    overlap_corners,
    sample_view,
    seeded_corners,
)
from medvol_nb.geometry import Volume, affine_from, reorient, to_axes
from medvol_nb.volume import read_volume, write_volume

SHAPE, SPACING = (90, 84, 70), (1.1, 1.3, 1.9)


def turned():
    a, b = np.radians(9), np.radians(-13)
    rz = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    rx = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = affine_from(SPACING, (-60, 40, -700))
    affine[:3, :3] = rz @ rx @ affine[:3, :3]
    return affine


def ramp(direction, affine=None):
    "A volume whose value is a world coordinate: its intensity tells where a voxel is"
    affine = turned() if affine is None else affine
    world = np.indices(SHAPE).reshape(3, -1).T @ affine[:3, :3].T + affine[:3, 3]
    centre = affine[:3, :3] @ ((np.array(SHAPE) - 1)/2) + affine[:3, 3]
    return Volume((((world - centre) @ direction)*8).reshape(SHAPE).astype(np.float32), affine), centre


def hu(img): return (img.astype(np.float64) + 50)*4095/255 - 1024


@pytest.mark.parametrize("rule, degrees", [("sample", 0), ("sample", 10), ("masksample", 5), ("overlap", 10)])
@pytest.mark.parametrize("seed", range(3))
def test_A2_view_1_at_q_is_view_2_at_its_key(rule, degrees, seed):
    "On ramps along three directions: the world position read from the intensity, in both views, to < 0.01 mm"
    found = []
    for direction in np.eye(3):
        vol, centre = ramp(direction)
        mask = Volume(np.ones(SHAPE, np.uint8), vol.affine)
        source = open_source(vol, mask, contrast="ct")
        pair = ViewSampler(rule, (16, 32, 32), degrees=degrees, tissue=0)(source, rng_for(seed, rule))
        q = rng_for(seed).integers(1, (15, 31, 31), (800, 3))
        at, inside = pair.keys(q)
        solid = [ndimage.binary_erosion(v.valid, np.ones((3, 3, 3)), border_value=1) for v in pair.views]
        inside &= solid[0][tuple(q.T)] & ((at >= 0) & (at <= [15, 31, 31])).all(axis=1)
        inside[inside] &= ndimage.map_coordinates(solid[1].astype(float), at[inside].T, order=1) > 0.999
        q, at = q[inside], at[inside]
        a = hu(pair.views[0].image[tuple(q.T)])/8
        b = hu(ndimage.map_coordinates(pair.views[1].image.astype(np.float64), at.T, order=1))/8
        truth = (pair.views[0].to_world(q) - centre) @ direction
        near_border = np.abs(np.linalg.solve(vol.affine[:3, :3], (pair.views[0].to_world(q) - centre).T).T) > \
            (np.array(SHAPE) - 1)/2 - 2
        keep = ~near_border.any(axis=1)
        found.append((keep.sum(), np.abs(a - b)[keep].max(initial=0), np.abs(a - truth)[keep].max(initial=0)))
    n, between, absolute = np.array(found).T
    assert between.max() < 0.01 and absolute.max() < 0.01, found
    assert n.min() > 0 or rule == "overlap" or seed, "the first pair overlaps"


def test_D12_correspondences_keep_double_precision():
    "The reference casts millimetres to float16: 0.25 mm wrong beyond 512 mm"
    vol, _ = ramp(np.array([0, 0, 1.0]))
    pair = ViewSampler(patch=(16, 32, 32), tissue=0)(open_source(vol, contrast="ct"), rng_for(1))
    assert pair.matrix.dtype == pair.offset.dtype == np.float64
    q = np.argwhere(np.ones((16, 32, 32)))
    for v in pair.views:
        p = v.to_world(q)
        assert np.abs(v.to_index(p) - q).max() < 1e-9 and np.abs(p).max() > 512
        assert np.abs(p.astype(np.float16) - p).max() > 0.1


def test_D27_D28_no_coordinate_volume_and_no_copy_of_the_scan(tmp_path):
    "Memory of a pair from a 256 x 256 x 240 scan: below a twentieth of the reference's four float64 volumes"
    rng = rng_for(0)
    img = np.repeat(np.repeat(rng.normal(0, 300, (24, 32, 32)).astype(np.int16), 10, 0), 8, 1).repeat(8, 2)
    write_volume(net_volume(Volume(img, affine_from(1.6, axes="zyx"), "zyx")), tmp_path/"ct.zarr")
    source = open_source(tmp_path/"ct.zarr", contrast="ct")
    source.box, source.limits
    sampler = ViewSampler(degrees=5)
    sampler(source, rng_for(1))
    tracemalloc.start()
    pair = sampler(source, rng_for(2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pair.images.shape == (2, 32, 96, 96) and peak < 4*8*img.size/20, peak/(4*8*img.size)


@pytest.mark.parametrize("codes", ["RAS", "PIL", "ASL"])
def test_storage_of_the_file_makes_no_difference(codes, tmp_path):
    img = (ndimage.gaussian_filter(rng_for(0).normal(0, 1, SHAPE), 2)*4000).astype(np.int16)
    vol = Volume(img, affine_from(SPACING, (-60, 40, -700)))
    expected = ViewSampler(patch=(16, 32, 32), degrees=8)(open_source(vol, contrast="ct"), rng_for(3))
    write_volume(reorient(vol, codes), tmp_path/"a.nii.gz")
    write_volume(net_volume(vol), tmp_path/"a.zarr")
    for scan in (reorient(vol, codes), to_axes(vol, "zyx"), tmp_path/"a.nii.gz", tmp_path/"a.zarr"):
        pair = ViewSampler(patch=(16, 32, 32), degrees=8)(open_source(scan, contrast="ct"), rng_for(3))
        assert np.abs(pair.images - expected.images).max() < 1e-3
        assert np.abs(pair.matrix - expected.matrix).max() < 1e-5 and np.abs(pair.offset - expected.offset).max() < 1e-3


def test_a_view_of_scale_one_is_the_network_volume():
    img = (ndimage.gaussian_filter(rng_for(0).normal(0, 1, SHAPE), 2)*4000).astype(np.int16)
    vol = Volume(img, affine_from(SPACING, (-60, 40, -700)))
    seen, grid = network_volume(vol, intensity="ct")
    view = sample_view(open_source(vol, contrast="ct"), grid.affine[:3, :3], grid.affine[:3, 3], grid.shape)
    inner = (slice(3, -3),)*3
    assert np.abs(view.image - seen)[inner].max() < 0.5 and view.valid[inner].all()


# --------------------------------------------------------------------------------------------------------- placement

@pytest.mark.parametrize("rule", [seeded_corners, independent_corners, overlap_corners])
def test_boxes_are_inside_and_repeatable(rule):
    for k in range(300):
        rng = rng_for(k)
        crops = rng.integers(20, 60, (2, 3))
        size = crops.max(axis=0) + rng.integers(4, 150, 3)
        corners = rule(size, crops, rng_for(k, "draw"))
        assert (corners >= 1).all() and (corners + crops <= size - 1).all()
        assert np.array_equal(corners, rule(size, crops, rng_for(k, "draw")))


def test_rules_differ_as_described():
    size, crops = np.array((120, 200, 200)), np.array([(34, 101, 101), (40, 110, 110)])
    def shared(c): return np.min(c + crops, axis=0) - c.max(axis=0)
    together = [(shared(seeded_corners(size, crops, rng_for(k))) > 0).all() for k in range(300)]
    apart = [(shared(independent_corners(size, crops, rng_for(k)))[0] <= 0) for k in range(300)]
    assert all(together) and 0.05 < np.mean(apart) < 0.6
    z = np.array([shared(overlap_corners(size, crops, rng_for(k)))[0] for k in range(600)])
    assert 0.74 < np.mean(z > 0) < 0.86 and z[z > 0].min() >= 5 and z.max() < 34 - 2


@pytest.mark.parametrize("n", [(6, 40, 40), (20, 20, 20), (200, 30, 30)])
def test_boxes_larger_than_the_volume_are_centred(n):
    crops = [(34, 101, 101), (40, 110, 110)]
    for rule in (seeded_corners, independent_corners, overlap_corners):
        corners = rule(n, crops, rng_for(0))
        for corner, crop in zip(corners, crops):
            for c, w, size in zip(corner, crop, n):
                if w > size - 2: assert abs((c + w/2) - size/2) <= 1, (rule, corner, n)


def test_masksample_looks_where_the_mask_is():
    img = (rng_for(0).normal(0, 1, SHAPE)*50).astype(np.int16)
    mask = np.zeros(SHAPE, np.uint8)
    mask[60:70, 20:30, 40:50] = 1
    source = open_source(Volume(img, affine_from(SPACING)), Volume(mask, affine_from(SPACING)), contrast="ct")
    sampler = ViewSampler("masksample", (12, 16, 16))
    hit = [all(v.mask.any() for v in sampler(source, rng_for(k)).views) for k in range(60)]
    other = ViewSampler("sample", (12, 16, 16))
    plain = [all(v.mask.any() for v in other(source, rng_for(k)).views) for k in range(60)]
    assert np.mean(hit) > 0.7 > 0.3 > np.mean(plain)


@pytest.mark.parametrize("scale, degrees", [((0.8, 1.2), 0), ((1, 1), 10), ((0.5, 0.6), 30)])
def test_scales_and_turns(scale, degrees):
    source = open_source(ramp(np.eye(3)[0])[0], contrast="ct")
    sampler = ViewSampler(patch=(8, 16, 16), scale=scale, degrees=degrees)
    for k in range(40):
        for m, _ in sampler.draw(source, rng_for(k)):
            gram = m.T @ m
            size = np.sqrt(np.diag(gram))
            assert np.ptp(size) < 1e-9 and scale[0] - 1e-9 <= size[0]/2 <= scale[1] + 1e-9
            assert np.abs(gram/size[0]**2 - np.eye(3)).max() < 1e-9
            assert np.linalg.det(m)*np.linalg.det(source.affine[:3, :3]) > 0
            turn = np.linalg.inv(source.affine[:3, :3]/source.spacing) @ m/size[0]
            angle = np.degrees(np.arccos(np.clip((np.trace(turn) - 1)/2, -1, 1)))
            assert angle <= np.sqrt(3)*degrees + 1e-5


# ------------------------------------------------------------------------------------------------------------ limits

def test_a_volume_smaller_than_the_view_is_filled_with_air():
    img = (rng_for(0).normal(0, 1, (60, 60, 12))*50).astype(np.int16)
    source = open_source(Volume(img, affine_from(2.0)), contrast="ct")
    pair = ViewSampler(patch=(20, 32, 32))(source, rng_for(0))
    for v in pair.views:
        assert 0.2 < v.valid.mean() < 0.95 and (v.image[~v.valid] == -50).all()
    with raises(DataError, match="too small"): ViewSampler(patch=(32, 32, 32))(source, rng_for(0))


def test_masks_of_another_shape_are_refused():
    vol = Volume(np.zeros((9, 9, 9), np.int16) - 1000, affine_from(2.0))
    with raises(DataError, match="is on another grid"): open_source(vol, Volume(np.zeros((9, 9, 8)), vol.affine))
    with raises(DataError, match="its regions is on another"): open_source(vol, None, Volume(vol.data, np.eye(4)))


def test_a_single_voxel_of_mask_is_found():
    mask = np.zeros((60, 50, 40), np.uint8)
    mask[31, 23, 17] = 1
    img = (rng_for(0).normal(0, 1, mask.shape)*50).astype(np.int16)
    source = open_source(Volume(img, affine_from(1.0)), Volume(mask, affine_from(1.0)), contrast="ct")
    assert len(source.inside) == 1
    ViewSampler("masksample", (8, 12, 12))(source, rng_for(0))


def test_regions_arrive_with_their_numbers():
    lbl = np.zeros((40, 40, 40), np.uint16)
    lbl[:20], lbl[20:] = 300, 65535
    img = (rng_for(0).normal(0, 1, lbl.shape)*50).astype(np.int16)
    source = open_source(Volume(img, affine_from(2.0)), None, Volume(lbl, affine_from(2.0)), contrast="ct")
    view = sample_view(source, source.affine[:3, :3], source.affine[:3, 3], source.shape)
    assert np.array_equal(view.regions, source.regions) and set(np.unique(view.regions)) == {300, 65535}


# ------------------------------------------------------------------------------------------------------------ reality

def test_views_of_a_real_chest_agree(data_dir):
    "Where two views of a real CT overlap, they correlate; a shift of 6 mm destroys more than half of what is left"
    vol = read_volume(data_dir/"anatomical_embedding"/"thorax_two_crops"/"crop_a_ct.nii.gz")
    source = open_source(vol)
    assert source.contrast == "ct"
    right, wrong = [], []
    for k in range(6):
        pair = ViewSampler(patch=(24, 48, 48), degrees=8)(source, rng_for(k, "chest"))
        q = np.argwhere(pair.views[0].valid)[::7]
        at, inside = pair.keys(q)
        inside &= ((at >= 0) & (at <= np.array([23, 47, 47]) - 4)).all(axis=1)
        if inside.sum() < 500: continue
        a = pair.views[0].image[tuple(q[inside].T)]
        for out, shift in ((right, 0), (wrong, 3)):
            b = ndimage.map_coordinates(pair.views[1].image, at[inside].T + shift, order=1)
            out.append(np.corrcoef(a, b)[0, 1])
    assert len(right) >= 3 and np.mean(right) > 0.95 and 1 - np.mean(wrong) > 3*(1 - np.mean(right))
