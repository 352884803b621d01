"Volumes and their place: reorienting, cropping and resampling against nibabel and ITK"
import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import aff2axcodes, axcodes2ornt, io_orientation, ornt_transform
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medvol_nb.core import DataError, rng_for
from medvol_nb.geometry import (
    Volume,
    affine_from,
    corner_displacement,
    corners,
    crop,
    locate_crop,
    orientation_of,
    reorient,
    resample,
    resample_to,
    same_grid,
    to_axes,
    to_index,
    to_world,
)

CODES = ["".join(c) for p in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*p)]
ORDERS = ["".join(p) for p in itertools.permutations("xyz")]


def numbered(shape=(3, 4, 5), dtype=np.int16): return np.arange(np.prod(shape)).astype(dtype).reshape(shape)


def affine_of(codes, spacing=(1.5, 2.0, 3.5), origin=(-20, 7, 11), turn=(0, 0, 0), shear=0.0):
    "Affine whose axes run along `codes`, then turned as a whole [degree] and sheared"
    affine = np.eye(4)
    rzs = np.zeros((3, 3))
    for k, c in enumerate(codes):
        world, sign = next((w, (-1, 1)[pair.index(c)]) for w, pair in enumerate(("LR", "PA", "IS")) if c in pair)
        rzs[world, k] = sign*spacing[k]
    skew = np.eye(3)
    skew[0, 1] = shear
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ skew @ rzs
    affine[:3, 3] = origin
    return affine


def oblique(rng, spacing, origin, limit=25):
    return affine_of("RAS", spacing, origin, rng.uniform(-limit, limit, 3))


# ---- the noun

def test_volume_is_immutable_and_checks_its_border():
    vol = Volume(numbered(), np.eye(4))
    with pytest.raises(ValueError, match="read-only"): vol.affine[0, 0] = 2
    with pytest.raises(AttributeError): vol.axes = "zyx"
    mine = np.eye(4)
    held = Volume(numbered(), mine)
    mine[0, 0] = 9
    assert held.affine[0, 0] == 1
    for bad in (np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.inf), np.diag([1, 1, 0, 1]), np.diag([1, 1, 1, 2]),
                [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]):
        with pytest.raises(DataError, match="affine"): Volume(numbered(), bad)
    for axes in ("xy", "xyc", "xyzc", "xxz", "tzyx", "XYZ", ""):
        with pytest.raises(DataError, match="axes"): Volume(numbered(), np.eye(4), axes)
    for shape, axes in (((3, 4), "xyz"), ((3, 4, 5), "cxyz"), ((1, 2, 3, 4), "xyz")):
        with pytest.raises(DataError, match="axes"): Volume(np.zeros(shape), np.eye(4), axes)


def test_tiny_and_huge_voxels_are_invertible():
    for size in (4.6e-6, 1e-9, 1e6):
        vol = Volume(numbered(), affine_from(size))
        assert_allclose(vol.spacing, (size,)*3, rtol=1e-12)
        assert_allclose(to_index(vol.affine, to_world(vol.affine, (1, 2, 3))), (1, 2, 3), rtol=1e-9)


@pytest.mark.parametrize("axes", ORDERS)
def test_affine_from_puts_each_size_on_its_world_axis(axes):
    affine = affine_from((1, 2, 3), (10, 20, 30), axes)
    for k, a in enumerate(axes):
        step = to_world(affine, np.eye(3)[k]) - to_world(affine, (0, 0, 0))
        assert np.flatnonzero(step).tolist() == ["xyz".index(a)] and step.max() == k + 1
    assert to_world(affine, (0, 0, 0)).tolist() == [10, 20, 30]
    assert_array_equal(affine_from((1, 2, 3), (10, 20, 30), "c" + axes), affine)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_world_and_index_are_inverse(seed):
    rng = rng_for(seed, "inverse")
    affine = affine_of(CODES[seed % 48], rng.uniform(0.1, 8, 3), rng.uniform(-999, 999, 3), rng.uniform(-40, 40, 3),
                       rng.uniform(-.3, .3))
    pts = rng.uniform(-500, 500, (4, 2, 3))
    assert_allclose(to_index(affine, to_world(affine, pts)), pts, atol=1e-8)
    assert_allclose(to_world(affine, pts), nib.affines.apply_affine(affine, pts), atol=1e-9)
    assert to_index(affine, pts[0, 0]).shape == (3,) and to_world(affine, pts[0]).shape == (2, 3)


# ---- orientation

@pytest.mark.parametrize("codes", CODES)
def test_letters_are_those_of_nibabel(codes):
    for turn in ((0, 0, 0), (10, -20, 15), (30, 30, 30), (-44, 3, 40)):
        for shear in (0, .2):
            affine = affine_of(codes, turn=turn, shear=shear)
            assert orientation_of(affine) == "".join(aff2axcodes(affine))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_letters_of_any_rotation_are_those_of_nibabel(seed):
    rng = rng_for(seed, "any")
    rzs = Rotation.from_quat(rng.normal(size=4)).as_matrix()*rng.uniform(.2, 5, 3)*rng.choice([-1, 1], 3)
    rzs += rng.normal(size=(3, 3))*.05
    assert orientation_of(nib.affines.from_matvec(rzs)) == "".join(aff2axcodes(nib.affines.from_matvec(rzs)))


@pytest.mark.parametrize("codes", CODES)
def test_reorient_is_nibabels_for_all_orientations(codes):
    for turn, shear in (((0, 0, 0), 0), ((12, -9, 20), 0), ((12, -9, 20), .15)):
        affine = affine_of(codes, turn=turn, shear=shear)
        img = nib.Nifti1Image(numbered(), affine)
        ours, theirs = reorient(Volume(numbered(), affine)), nib.as_closest_canonical(img)
        assert_array_equal(ours.data, np.asarray(theirs.dataobj))
        assert_allclose(ours.affine, theirs.affine, atol=1e-9)
        assert ours.orientation == "RAS"
        back = reorient(ours, codes)
        assert_array_equal(back.data, numbered())
        assert_allclose(back.affine, affine, atol=1e-9)


@pytest.mark.parametrize("target", CODES[::5])
def test_reorient_to_any_letters_is_nibabels(target):
    for codes in CODES[::7]:
        affine = affine_of(codes, turn=(5, 8, -3))
        img = nib.Nifti1Image(numbered(), affine)
        theirs = img.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(target)))
        ours = reorient(Volume(numbered(), affine), target)
        assert_array_equal(ours.data, np.asarray(theirs.dataobj))
        assert_allclose(ours.affine, theirs.affine, atol=1e-9)


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("channels", [0, 2])
def test_reorient_keeps_each_voxel_in_its_place_in_any_storage_order(axes, channels):
    data = numbered((2, 3, 4, 5)) if channels else numbered()
    start = Volume(data, affine_of("PIR", turn=(4, -6, 9)), "cxyz" if channels else "xyz")
    stored = to_axes(start, axes)
    assert stored.spatial_axes == axes
    for target in CODES[::6]:
        vol = reorient(stored, target)
        assert vol.axes == stored.axes and vol.channels == start.channels
        assert dict(zip(axes, vol.orientation)) == dict(zip("xyz", target))
        for ijk in ((0, 0, 0), (1, 2, 0), tuple(n - 1 for n in vol.shape)):
            at = np.round(to_index(start.affine, to_world(vol.affine, ijk))).astype(int)
            assert_array_equal(vol.data[(..., *ijk)], start.data[(..., *at)])


def test_reorient_is_a_view_and_a_noop_when_nothing_is_to_do():
    vol = Volume(numbered(), affine_of("LPS"))
    assert np.shares_memory(reorient(vol).data, vol.data)
    assert reorient(vol, "LPS") is vol and reorient(vol, "lps") is vol and to_axes(vol, "xyz") is vol
    same = reorient(reorient(vol, "SAR"), "LPS")
    assert_array_equal(same.data, vol.data)
    for bad in ("RA", "RRS", "RLS", "XYZ", "", "RASX"):
        with pytest.raises(DataError, match="orientation"): reorient(vol, bad)
    for bad in ("xy", "xxz", "cxy", "abc"):
        with pytest.raises(DataError, match="axes"): to_axes(vol, bad)


def test_meta_and_number_type_survive_moving():
    vol = Volume(numbered(dtype=">i4"), affine_of("LPS"), meta={"path": "p"})
    for moved in (reorient(vol), to_axes(vol, "zyx"), crop(vol, (-1, 0, 0), (2, 2, 2))):
        assert moved.meta == {"path": "p"} and moved.dtype == np.dtype(">i4")


def test_volumes_need_not_be_numpy():
    class Lazy:
        "Something that can only be sliced, as a zarr array"
        shape, dtype, read = (3, 4, 5), np.dtype(np.int16), 0
        def __getitem__(self, key):
            out = numbered()[key]
            Lazy.read += out.size
            return out
    vol = Volume(Lazy(), affine_of("LPS"))
    part = crop(vol, (1, 1, 1), (2, 2, 2))
    assert Lazy.read == 8
    assert_array_equal(part.data, numbered()[1:3, 1:3, 1:3])
    assert_array_equal(reorient(vol).data, numbered()[::-1, ::-1])
    assert isinstance(vol.load().data, np.ndarray)


# ---- equal grids

def test_grids_are_compared_at_their_corners():
    a = Volume(np.zeros((100, 20, 30)), np.eye(4))
    b = replace(a, affine=np.array([[1, 0, 0, 0], [1e-4, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.]]))
    assert corner_displacement(a, b) == pytest.approx(99e-4) and not same_grid(a, b) and same_grid(a, b, 0.01)
    assert corners(a).shape == (8, 3) and corners(a).max(axis=0).tolist() == [99, 19, 29]
    assert not same_grid(a, Volume(np.zeros((100, 20, 31)), np.eye(4)))
    with pytest.raises(DataError, match="in shape"): corner_displacement(a, Volume(np.zeros((1, 1, 1)), np.eye(4)))


# ---- cropping

@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(-6, 8)]*3), st.tuples(*[st.integers(1, 12)]*3), st.booleans())
def test_crop_keeps_places_and_fills_outside(start, size, channels):
    data = numbered((2, 5, 6, 7)) if channels else numbered((5, 6, 7))
    vol = Volume(data, affine_of("LIP", turn=(3, 2, 1)), "cxyz" if channels else "xyz")
    touches = all(s < n and s + w > 0 for s, w, n in zip(start, size, vol.shape))
    if not touches:
        with pytest.raises(DataError, match="does not touch"): crop(vol, start, size)
        return
    part = crop(vol, start, size, fill=-5)
    assert part.shape == size and part.dtype == vol.dtype
    assert_allclose(to_world(part.affine, -np.array(start)), to_world(vol.affine, (0, 0, 0)), atol=1e-9)
    for ijk in itertools.product(*({0, n//2, n - 1} for n in size)):
        at = np.add(ijk, start)
        inside = (at >= 0).all() and (at < vol.shape).all()
        assert_array_equal(part.data[(..., *ijk)], vol.data[(..., *at)] if inside else np.full(data.shape[:-3], -5))


def test_crop_refuses_what_is_no_window():
    vol = Volume(numbered(), np.eye(4))
    for start, size in (((0, 0), (1, 1)), ((0, 0, 0), (1, 0, 1)), ((0, 0, 0), (1, -2, 1)), ((3, 0, 0), (1, 1, 1))):
        with pytest.raises(DataError, match="crop"): crop(vol, start, size)


def test_a_fill_the_number_type_cannot_hold_is_refused_not_wrapped():
    vol = Volume(numbered(dtype=np.uint8), np.eye(4))
    left = affine_from(1, (-5, 0, 0))
    for fill in (-1, -1000.0, 256, 0.5, float("nan")):
        with pytest.raises(DataError, match="fill"): crop(vol, (-1, 0, 0), (4, 4, 4), fill=fill)
        with pytest.raises(DataError, match="fill"): resample_to(vol, left, (9, 4, 4), 0, fill=fill)
    assert crop(vol, (-1, 0, 0), (4, 4, 4), fill=255.0).data[0, 0, 0] == 255
    assert np.isnan(resample_to(vol, left, (9, 4, 4), 1, fill=float("nan")).data[0, 0, 0])


def test_a_forgotten_crop_is_found_by_its_voxels():
    rng = rng_for(0, "crop")
    whole = Volume(rng.integers(0, 50, (20, 21, 22)).astype(np.int32), np.eye(4))
    for start in ((0, 0, 0), (3, 4, 5), (10, 11, 12)):
        part = Volume(whole.data[tuple(slice(s, s + 10) for s in start)].astype(np.int16), np.eye(4))
        assert locate_crop(whole, part) == start
    assert locate_crop(whole, whole) == (0, 0, 0) and locate_crop(part, whole) is None
    assert locate_crop(whole, replace(part, data=part.data + 100)) is None
    many = Volume(np.zeros((1, 2, 2, 2)), np.eye(4), "cxyz")
    with pytest.raises(DataError, match="channels"): locate_crop(whole, many)


def test_a_forgotten_crop_with_nan_voxels_is_found_too():
    whole = rng_for(0, "nan").random((9, 9, 9)).astype(np.float32)
    whole[4, 4, 4] = np.nan
    for start in ((2, 2, 2), (4, 4, 4)):
        part = whole[tuple(slice(s, s + 5) for s in start)]
        assert locate_crop(Volume(whole, np.eye(4)), Volume(part, np.eye(4))) == start
    lonely = Volume(np.full((2, 2, 2), np.nan, np.float32), np.eye(4))
    assert locate_crop(Volume(whole, np.eye(4)), lonely) is None


# ---- resampling

def faces(vol):
    "World positions of the outer faces' corners"
    ends = np.array(list(itertools.product(*((-.5, n - .5) for n in vol.shape))))
    return to_world(vol.affine, ends)


@pytest.mark.parametrize("shape", [(8, 9, 10), (7, 5, 3), (16, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (.7, 1.1, 3.3), (2, .5, 1)])
def test_the_centre_never_moves_and_outer_faces_stay_when_sizes_divide(shape, spacing):
    vol = Volume(rng_for(0, "faces").random(shape), affine_of("LAS", spacing, turn=(9, 8, 7)))
    def centre(v): return to_world(v.affine, (np.array(v.shape) - 1)/2)
    for wanted in (.6, 1, 1.9, (.9, 1.3, 2.1), 7):
        for order in (0, 1, 3):
            out = resample(vol, wanted, order)
            assert_allclose(centre(out), centre(vol), atol=1e-9)
            assert_allclose(out.spacing, np.broadcast_to(wanted, 3), rtol=1e-9)
            expected = np.maximum(1, np.floor(np.array(shape)*spacing/np.broadcast_to(wanted, 3) + .501))
            assert out.shape == tuple(expected)
    for factor in ((.5, .5, .5), (1, .25, .5)):
        out = resample(vol, np.array(spacing)*factor)
        assert_allclose(faces(out), faces(vol), atol=1e-9)
    if not any(n % 2 for n in shape): assert_allclose(faces(resample(vol, np.array(spacing)*2)), faces(vol), atol=1e-9)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_same_spacing_is_the_identity(order):
    for data, axes in ((rng_for(0, "id").random((6, 7, 5)).astype(np.float32), "xyz"),
                       (rng_for(1, "id").random((2, 6, 7, 5)).astype(np.float32), "czyx")):
        vol = Volume(data, affine_of("PSL", (.7, 1.3, 2), turn=(1, 2, 3)), axes)
        out = resample(vol, vol.spacing, order)
        assert out.axes == axes
        assert_allclose(out.data, data, atol=(0, 1e-6, 1e-5)[order - (order == 3)])
        assert_allclose(out.affine, vol.affine, atol=1e-12)


def test_a_linear_ramp_in_the_world_stays_a_ramp():
    affine = affine_of("LPS", (1.3, .8, 2.2), turn=(20, -10, 5))
    ijk = np.moveaxis(np.indices((20, 30, 15)), 0, -1)
    slope = np.array([.3, -.2, .5])
    vol = Volume((to_world(affine, ijk) @ slope).astype(np.float32), affine)
    for out in (resample(vol, 1), resample(vol, (.5, 2, 3), antialias=False), resample(vol, .9, order=3)):
        at = np.moveaxis(np.indices(out.shape), 0, -1)
        expected = to_world(out.affine, at) @ slope
        inner = ((to_index(affine, to_world(out.affine, at)) >= 3) &
                 (to_index(affine, to_world(out.affine, at)) <= np.array(vol.shape) - 4)).all(axis=-1)
        assert inner.sum() > 100
        assert_allclose(out.data[inner], expected[inner], atol=2e-3)


def test_labels_keep_their_set_and_type():
    rng = rng_for(0, "labels")
    for dtype in (np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.uint64, np.float32):
        lbl = rng.choice([0, 1] if dtype == np.bool_ else [0, 3, 17, 117], (9, 8, 7)).astype(dtype)
        for spacing in (.4, .9, 1.7, (1, 3, .2)):
            out = resample(Volume(lbl, np.eye(4)), spacing, order=0)
            assert out.dtype == lbl.dtype and np.isin(out.data, lbl).all()
    big = np.full((4, 4, 4), 2**63 - 1, np.int64)
    assert (resample(Volume(big, np.eye(4)), .7, order=0).data == 2**63 - 1).all()
    turned = resample_to(Volume(big, np.eye(4)), affine_of("RAS", (1, 1, 1), (0, 0, 0), (5, 5, 5)), (4, 4, 4), 0)
    assert np.isin(turned.data, [0, 2**63 - 1]).all() and (turned.data == 2**63 - 1).any()


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", ">i2", "i4", "u4", "i8", "u8", "f2", "f4", ">f4", "f8"])
def test_interpolation_is_float32_and_right_for_each_number_type(dtype):
    hi = 1 if dtype == "?" else min(1000, np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else 1000
    data = (rng_for(0, "types").random((6, 5, 4))*hi).round().astype(dtype)
    expected = resample(Volume(data.astype(np.float64), np.eye(4)), (.6, 1.2, .9)).data
    out = resample(Volume(data, np.eye(4)), (.6, 1.2, .9))
    assert out.dtype == np.float32
    assert_allclose(out.data, expected, atol=1e-3)
    oblique_affine = affine_of("RAS", (.9, .9, .9), (0, 0, 0), (8, 5, 3))
    expected = resample_to(Volume(data.astype(np.float64), np.eye(4)), oblique_affine, (5, 5, 5)).data
    assert_allclose(resample_to(Volume(data, np.eye(4)), oblique_affine, (5, 5, 5)).data, expected, atol=1e-3)


@pytest.mark.parametrize("lo, hi", [(0, 2**40), (-2**62, 2**62), (0.0, 1e30), (-32768, 32767)])
def test_large_ranges_neither_overflow_nor_wrap(lo, hi):
    kind = np.float64 if isinstance(hi, float) else np.int64 if hi > 2**20 else np.int16
    data = np.where(np.indices((6, 6, 6)).sum(axis=0) % 2, lo, hi).astype(kind)
    out = resample(Volume(data, np.eye(4)), .7).data
    assert np.isfinite(out).all() and out.min() >= lo - 1e-6*hi and out.max() <= hi*(1 + 1e-6)


def test_layout_of_memory_does_not_matter():
    data = rng_for(0, "layout").random((12, 10, 8)).astype(np.float32)
    place = affine_of("RAS", (1, 2, 1.5))
    tilted = affine_of("RAS", (.9, 1.4, 2), turn=(9, 3, -5))
    for order in (0, 1, 3):
        expected = resample(Volume(data, place), (.8, 1.1, 2), order).data
        leant = resample_to(Volume(data, place), tilted, (9, 9, 9), order).data
        wide = np.zeros((24, 20, 16), np.float32)
        wide[::2, ::2, ::2] = data
        for same in (np.asfortranarray(data), wide[::2, ::2, ::2], data[::-1].copy()[::-1]):
            assert_array_equal(resample(Volume(same, place), (.8, 1.1, 2), order).data, expected)
            assert_array_equal(resample_to(Volume(same, place), tilted, (9, 9, 9), order).data, leant)


def test_storage_order_and_channels_do_not_matter():
    data = rng_for(0, "order").random((2, 6, 7, 8)).astype(np.float32)
    vol = Volume(data, affine_of("LPS", (1, 1.5, 2), turn=(10, 0, 4)), "cxyz")
    for order in (0, 1, 3):
        both = resample(vol, (.8, 2, 1.1), order)
        for c in range(2):
            assert_array_equal(both.data[c], resample(replace(vol, data=data[c], axes="xyz"), (.8, 2, 1.1), order).data)
        stored = resample(to_axes(vol, "zyx"), (1.1, 2, .8), order)
        assert_allclose(to_axes(stored, "xyz").data, both.data, atol=1e-5)
        assert_allclose(to_axes(stored, "xyz").affine, both.affine, atol=1e-9)
        turned = resample(reorient(vol, "RAS"), (.8, 2, 1.1), order)
        back = reorient(turned, "LPS")
        if order: assert_allclose(back.data, both.data, atol=2e-5)


def to_itk(array, affine, vector=False, kind=np.float32):
    import SimpleITK as sitk
    flip, zooms = np.diag([-1.0, -1, 1]), np.sqrt((affine[:3, :3]**2).sum(axis=0))
    img = sitk.GetImageFromArray(np.ascontiguousarray(array.T, kind), isVector=vector)
    img.SetSpacing(zooms.tolist())
    img.SetOrigin((flip @ affine[:3, 3]).tolist())
    img.SetDirection((flip @ affine[:3, :3]/zooms).ravel().tolist())
    return img


def random_case(seed, channels=False, smallest=9):
    "An anisotropic oblique volume and an oblique grid that overlaps it partly"
    rng = rng_for(seed, "itk")
    shape = tuple(rng.integers(smallest, smallest + 11, 3))
    data = ndimage.gaussian_filter(rng.normal(0, 100, shape), 1).astype(np.float32)
    if channels: data = np.stack([data, 3*data[::-1] + 1])
    place = oblique(rng, rng.uniform(.6, 3, 3), rng.uniform(-30, 30, 3))
    middle = to_world(place, (np.array(shape) - 1)/2)
    target = oblique(rng, rng.uniform(.6, 3, 3), (0, 0, 0))
    size = tuple(rng.integers(8, 22, 3))
    target[:3, 3] += middle - to_world(target, (np.array(size) - 1)/2) + rng.uniform(-2, 2, 3)
    return Volume(data, place, "cxyz" if channels else "xyz"), target, size


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("order", [0, 1])
def test_oblique_resampling_agrees_with_itk_border_and_channels_included(seed, order):
    sitk = pytest.importorskip("SimpleITK")
    vol, target, size = random_case(seed, channels=seed % 2 == 1)
    ours = resample_to(vol, target, size, order, fill=-77, antialias=False).data
    kind = (sitk.sitkNearestNeighbor, sitk.sitkLinear)[order]
    reference = to_itk(np.zeros(size), target)
    parts = vol.data if vol.channels else vol.data[None]
    theirs = np.stack([sitk.GetArrayFromImage(sitk.Resample(to_itk(p, vol.affine), reference, sitk.Transform(), kind,
                                                            -77.0)).T for p in parts])
    theirs = theirs if vol.channels else theirs[0]
    assert ours.shape == theirs.shape
    assert (theirs != -77).any()
    assert_array_equal(ours == -77, theirs == -77)
    if order: assert np.abs(ours - theirs).max() <= 1e-4*np.ptp(vol.data) # weights are float32 here
    else: # halfway between two centres either may be right
        at = to_index(vol.affine, to_world(target, np.moveaxis(np.indices(size), 0, -1)))
        clear = (np.abs(at % 1 - .5) > 1e-4).all(axis=-1)
        assert clear.mean() > .99
        assert_array_equal(ours[..., clear], theirs[..., clear])


@pytest.mark.parametrize("seed", range(3))
def test_resampling_along_the_axes_agrees_with_itk(seed):
    sitk = pytest.importorskip("SimpleITK")
    rng = rng_for(seed, "axes")
    vol = Volume(rng.normal(0, 100, rng.integers(5, 20, 3)).astype(np.float32),
                 affine_of(CODES[11*seed], rng.uniform(.5, 3, 3)))
    for order, kind in ((0, sitk.sitkNearestNeighbor), (1, sitk.sitkLinear)):
        ours = resample(vol, tuple(rng.uniform(.4, 3, 3)), order, antialias=False)
        theirs = sitk.Resample(to_itk(vol.data, vol.affine), to_itk(np.zeros(ours.shape), ours.affine),
                               sitk.Transform(), kind, 0.0)
        assert_allclose(ours.data, sitk.GetArrayFromImage(theirs).T, atol=1e-4*np.ptp(vol.data))


@pytest.mark.parametrize("seed", range(5))
def test_cubic_agrees_with_itk_in_the_interior(seed):
    sitk = pytest.importorskip("SimpleITK")
    vol, target, size = random_case(seed, smallest=18)
    ours = resample_to(vol, target, size, 3, fill=0, antialias=False)
    theirs = sitk.Resample(to_itk(vol.data, vol.affine, kind=np.float64), to_itk(np.zeros(size), target),
                           sitk.Transform(), sitk.sitkBSpline, 0.0)
    at = to_index(vol.affine, to_world(target, np.moveaxis(np.indices(size), 0, -1)))
    inner = ((at > 4) & (at < np.array(vol.shape) - 5)).all(axis=-1)
    # The two continue the image differently past its border (nearest here, mirror there). A spline forgets the border
    # by a factor of 3.7 a voxel: after 4 voxels less than 1 % of the range is left of it.
    difference = np.abs(ours.data - sitk.GetArrayFromImage(theirs).T)[inner]
    assert inner.sum() >= 20 and difference.max() <= 0.01*np.ptp(vol.data)


def test_resample_is_scipys_affine_transform_with_half_voxel_rule():
    data = rng_for(0, "scipy").random((9, 11, 13)).astype(np.float32)
    out = resample(Volume(data, np.eye(4)), (.7, 1.3, .45), antialias=False)
    matrix = np.linalg.solve(np.eye(4), out.affine)
    theirs = ndimage.affine_transform(data, matrix[:3, :3], matrix[:3, 3], out.shape, order=1, mode="nearest")
    assert_allclose(out.data, theirs, atol=1e-6)


def test_antialiasing_turns_a_checkerboard_grey():
    board = np.where(np.indices((24, 24, 24)).sum(axis=0) % 2, 100, 0).astype(np.float32)
    vol = Volume(board, np.eye(4))
    for spacing in (2.2, 2.6, 3.4):
        smooth, raw = (resample(vol, spacing, antialias=a).data[1:-1, 1:-1, 1:-1] for a in (True, False))
        assert abs(smooth.mean() - 50) < 3 and smooth.std() < raw.std()/4
    assert resample(vol, 3, antialias=False).data.std() > 40 > 20 > resample(vol, 3).data.std()
    assert_array_equal(resample(vol, .5).data, resample(vol, .5, antialias=False).data)
    lbl = Volume((board > 0).astype(np.uint8), np.eye(4))
    assert_array_equal(resample(lbl, 3, 0).data, resample(lbl, 3, 0, antialias=False).data)


def test_antialiasing_smooths_only_the_axes_that_shrink():
    data = rng_for(0, "axis").random((12, 12, 12)).astype(np.float32)
    out = resample(Volume(data, np.eye(4)), (3, 1, 1)).data
    expected = resample(Volume(ndimage.gaussian_filter1d(data, 1, axis=0), np.eye(4)), (3, 1, 1), antialias=False).data
    assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (8, 1, 8), (8, 8, 1), (1, 8, 1)])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_axes_of_one_voxel(shape, order):
    data = np.full(shape, 7, np.float32)
    out = resample(Volume(data, np.eye(4)), (.5, .5, .5), order)
    assert out.shape == tuple(2*n for n in shape)
    assert_allclose(out.data, 7, atol=1e-4)
    leant = affine_of("RAS", (1, 1, 1), (0, 0, 0), (3, 0, 0))
    turned = resample_to(Volume(data, np.eye(4)), leant, shape, order, fill=7)
    assert_allclose(turned.data, 7, atol=1e-4)


def test_bad_requests_are_refused_in_words():
    vol = Volume(numbered(), np.eye(4))
    for spacing in (0, -1, (1, 1, float("nan")), float("inf")):
        with pytest.raises(DataError, match="spacing"): resample(vol, spacing)
    for order in (2, -1, 5, "linear"):
        with pytest.raises(DataError, match="order"): resample(vol, 1, order=order)
    for shape in ((1, 2), (0, 1, 1), (1, -1, 1)):
        with pytest.raises(DataError, match="shape"): resample_to(vol, np.eye(4), shape)
    with pytest.raises(DataError, match="affine"): resample_to(vol, np.zeros((4, 4)), (3, 3, 3))


def test_halfway_goes_up_whatever_the_rounding_of_the_header():
    lbl = rng_for(0, "half").integers(0, 9, (20, 24, 22)).astype(np.uint8)
    for spacing in (1, .1, 1/3, np.float32(.9765625), np.float32(.7)):
        for turn in ((0, 0, 0), (3, 4, 5)):
            for noise in (0, 1e-7, -1e-7): # a header holds float32
                vol = Volume(lbl, affine_of("LPS", (float(spacing)*(1 + noise),)*3, turn=turn))
                out = resample(vol, 2*float(spacing), order=0)
                assert out.shape == (10, 12, 11)
                assert_array_equal(out.data, lbl[1::2, 1::2, 1::2])


def test_a_spacing_that_would_take_terabytes_is_refused():
    with pytest.raises((DataError, MemoryError)): resample(Volume(np.zeros((300, 300, 300), np.uint8), np.eye(4)), 1e-3)
