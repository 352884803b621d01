"""Maps of images with vectors: all 48 cube symmetries, affine and elastic maps, stored normals, normals of walls."""
import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.core import ConfigError, DataError, rng_for
from medvol_nb.zarrnet.geometry import (
    FOLD_LIMIT,
    Symmetry,
    angle_between,
    boundary_normals,
    check_sample,
    control_shape,
    decode_normals,
    encode_normals,
    flip,
    gradient,
    make_warp,
    normals_rgb,
    rot90,
    rotation_matrix,
    swap_axes,
    symmetries,
    turn,
    turn_sample,
    unit_vectors,
    warp_sample,
    warp_vectors,
)

KINDS = {"sheet": "binary", "classes": "multiclass", "depth": "regression", "n": "normals"}


def grid(shape):
    return np.meshgrid(*(np.arange(n) - (n - 1)/2 for n in shape), indexing="ij")


def field(shape):
    "A function with a gradient that is known and nowhere zero"
    z, y, x = grid(shape)
    f = 0.8*x + 0.1*y + 0.5*np.sin(0.3*z + 0.2*y) + 0.01*x*y
    fz = 0.15*np.cos(0.3*z + 0.2*y)
    return f, np.stack([0.8 + 0.01*y, 0.1 + fz/1.5 + 0.01*x, fz])


def full_sample(shape, seed=0):
    rng = rng_for(seed, "sample")
    return {"image": rng.standard_normal((2, *shape)).astype(np.float32),
            "sheet": rng.integers(0, 2, (1, *shape)).astype(np.float32), "classes": rng.integers(0, 4, (1, *shape)),
            "depth": rng.standard_normal((2, *shape)).astype(np.float32),
            "n": unit_vectors(rng.standard_normal((3, *shape)))*rng.integers(0, 2, (1, *shape)),
            "sheet__mask": rng.integers(0, 2, (1, *shape)).astype(np.uint8), "meta": {"volume": "a"}}


# ------------------------------------------------------------------------------------------------ the 48 symmetries

def test_there_are_48_symmetries_that_form_a_group():
    every = symmetries()
    assert len(set(every)) == 48 and every[0] == Symmetry()
    assert {s.then(t) for s in every for t in every} == set(every)
    assert all(s.then(s.inverse()) == s.inverse().then(s) == Symmetry() for s in every)
    assert all((t.matrix @ s.matrix == s.then(t).matrix).all() for s in every for t in every)


@pytest.mark.parametrize("symmetry", symmetries(), ids=lambda s: f"{s.order}{s.flipped}".replace(" ", ""))
def test_B6_gradient_follows_every_cube_symmetry(symmetry):
    "T(grad f) == grad(T f) to 1e-6, for all 48; the gradient is analytic, so nothing depends on differences"
    f, g = field((9, 9, 9))
    assert np.abs(g[:, 1:-1, 1:-1, 1:-1] - gradient(f)[:, 1:-1, 1:-1, 1:-1]).max() < 0.02
    np.testing.assert_allclose(turn(gradient(f), symmetry, vectors=True), gradient(turn(f, symmetry)), atol=1e-6)
    place = np.stack(grid((9, 9, 9))[::-1])  # the position field (x, y, z) is its own image
    np.testing.assert_allclose(turn(place, symmetry, vectors=True), place, atol=1e-6)
    np.testing.assert_array_equal(turn(turn(f, symmetry), symmetry.inverse()), f)


def test_channel_table_of_flips_rotations_and_transposes():
    "Row by row as printed in the specification; v has components x=1, y=2, z=3"
    v = np.array([1, 2, 3]).reshape(3, 1, 1, 1)*np.ones((1, 4, 4, 4))
    table = {flip(2): (-1, 2, 3), flip(1): (1, -2, 3), flip(0): (1, 2, -3),
             rot90(1, (1, 2)): (2, -1, 3), rot90(2, (1, 2)): (-1, -2, 3), rot90(3, (1, 2)): (-2, 1, 3),
             rot90(1, (0, 2)): (3, 2, -1), rot90(2, (0, 2)): (-1, 2, -3), rot90(3, (0, 2)): (-3, 2, 1),
             rot90(1, (0, 1)): (1, 3, -2), rot90(2, (0, 1)): (1, -2, -3), rot90(3, (0, 1)): (1, -3, 2),
             swap_axes(0, 1): (1, 3, 2), swap_axes(0, 2): (3, 2, 1), swap_axes(1, 2): (2, 1, 3)}
    assert len(table) == 15
    for s, expected in table.items():
        assert turn(v, s, vectors=True)[:, 0, 0, 0].tolist() == list(expected), s


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 4, 5), (1, 6, 6), (5, 5, 5)])
def test_turn_agrees_with_numpy(shape):
    m = np.arange(np.prod(shape)).reshape(shape)
    for axes in ((0, 1), (0, 2), (1, 2), (2, 1)):
        for k in range(-1, 5): np.testing.assert_array_equal(turn(m, rot90(k, axes)), np.rot90(m, k, axes))
        np.testing.assert_array_equal(turn(m, swap_axes(*axes)), np.swapaxes(m, *axes))
    for axes in ((), (0,), (1, 2), (0, 1, 2)): np.testing.assert_array_equal(turn(m, flip(*axes)), np.flip(m, axes))
    out = turn(m[:, ::-1], flip(0))
    assert out.flags.c_contiguous and out.flags.owndata


@pytest.mark.parametrize("shape, n", [((6, 6, 6), 48), ((4, 6, 6), 16), ((4, 5, 6), 8), ((6, 5, 6), 16)])
def test_symmetries_of_a_box_and_refusal_of_others(shape, n):
    legal = symmetries(shape)
    assert len(legal) == n
    sample = full_sample(shape)
    for s in symmetries():
        if s in legal:
            out = turn_sample(sample, KINDS, s)
            assert {k: v.shape for k, v in out.items() if k != "meta"} == \
                {k: v.shape for k, v in sample.items() if k != "meta"} and out["meta"] is sample["meta"]
        else:
            with pytest.raises(DataError, match="axes of different length"): turn_sample(sample, KINDS, s)


def test_turn_sample_treats_targets_by_kind_and_not_by_name():
    sample = {"image": np.zeros((1, 4, 4, 4), np.float32), "normals": np.ones((3, 4, 4, 4), np.float32),
              "flow": np.ones((3, 4, 4, 4), np.float32)}
    out = turn_sample(sample, {"normals": "regression", "flow": "normals"}, flip(2))
    assert (out["normals"] == 1).all() and out["flow"][:, 0, 0, 0].tolist() == [-1, 1, 1]
    assert (sample["flow"] == 1).all(), "the input was written to"


@pytest.mark.parametrize("change, message", [
    ({"extra": np.zeros((1, 4, 4, 4))}, "array 'extra' is no target"),
    ({"sheet": np.zeros((1, 4, 4, 5))}, "'sheet' has shape"),
    ({"sheet": np.zeros((4, 4, 4))}, "'sheet' has shape"),
    ({"n": np.zeros((2, 4, 4, 4))}, "normals 'n' need 3 channels, got 2")])
def test_samples_that_would_be_torn_apart_are_refused(change, message):
    sample = full_sample((4, 4, 4)) | change
    for f in (lambda: check_sample(sample, KINDS), lambda: turn_sample(sample, KINDS, flip(0)),
              lambda: warp_sample(sample, KINDS, make_warp((4, 4, 4)))):
        with pytest.raises(DataError, match=message): f()
    with pytest.raises(DataError, match="no 'image'"): check_sample({}, {})
    with pytest.raises(ConfigError, match="kind must be one of"): check_sample(full_sample((4, 4, 4)), {"n": "vector"})


# ------------------------------------------------------------------------------------------------------------- warps

def random_warp(shape, seed, knots=12, elastic=0.3):
    rng = rng_for(seed, "warp")
    matrix = rotation_matrix(rng.uniform(-40, 40, 3)) @ np.diag(rng.uniform(0.75, 1.4, 3))
    control = rng.uniform(-1, 1, (3, *control_shape(shape, (knots,)*3)))*elastic*knots
    return make_warp(shape, matrix, control, (knots,)*3)


@pytest.mark.parametrize("seed", range(6))
def test_jacobian_is_the_derivative_of_the_map(seed):
    warp = random_warp((14, 17, 12), seed)
    for i in range(3):
        numeric = np.stack(np.gradient(warp.coords[i], axis=(0, 1, 2)))
        inner = (slice(None), *(slice(1, -1),)*3)
        # central differences of a cubic spline err by f'''/6 <= 3.6*4/12**3/6 voxel; 1e-2 is generous
        assert np.abs(numeric - np.broadcast_to(warp.jacobian[i], numeric.shape))[inner].max() < 1e-2
    assert np.linalg.det(np.moveaxis(warp.jacobian, (0, 1), (-2, -1))).min() > 0


@pytest.mark.parametrize("seed", range(4))
def test_elastic_maps_up_to_the_limit_do_not_fold(seed):
    "Random signs at the limit are the worst case of the theorem of Choi and Lee"
    shape, knots = (20, 20, 20), (5, 5, 5)
    control = FOLD_LIMIT*5*rng_for(seed).choice([-1.0, 1.0], (3, *control_shape(shape, knots)))
    assert np.linalg.det(np.moveaxis(make_warp(shape, None, control, knots).jacobian, (0, 1), (-2, -1))).min() > 0
    with pytest.raises(DataError, match="may fold"): make_warp(shape, None, 1.1*control, knots)


def sphere(shape, centre=(5, -4, 3)):
    offset = [g - c for g, c in zip(grid(shape), centre)]
    far = np.sqrt(sum(o**2 for o in offset))
    return far, unit_vectors(np.stack(offset[::-1])/np.maximum(far, 1e-9))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("what", ["rotation", "scaling", "elastic", "all"])
def test_B6_normals_follow_affine_and_elastic_maps(what, seed):
    "At most 1 degree on average on a sphere field; the truth is analytic: J^T of the direction from the centre"
    shape, rng = (24, 40, 32), rng_for(seed, what)
    matrix = {"rotation": rotation_matrix(rng.uniform(-90, 90, 3)), "scaling": np.diag(rng.uniform(0.6, 1.6, 3))}
    warp = random_warp(shape, seed) if what == "all" else make_warp(shape, matrix[what]) if what in matrix else \
        make_warp(shape, None, rng.uniform(-4, 4, (3, *control_shape(shape, (12,)*3))), (12,)*3)
    _, normals = sphere(shape)
    source = [c - (n - 1)/2 - o for c, n, o in zip(warp.coords, shape, (5, -4, 3))]
    length = np.sqrt(sum(s**2 for s in source))
    jacobian = np.broadcast_to(warp.jacobian.reshape(3, 3, *(warp.jacobian.shape[2:] or (1, 1, 1))), (3, 3, *shape))
    truth = np.einsum("ijzyx,izyx->jzyx", jacobian, np.stack(source)/length)[::-1]
    inside = np.logical_and.reduce([(c >= 1) & (c <= n - 2) for c, n in zip(warp.coords, shape)]) & (length > 3)
    angle = angle_between(warp_vectors(normals, warp), truth)[inside]
    assert inside.sum() > 2000 and angle.mean() <= 1.0 and angle.max() < 6


def test_a_warp_by_a_symmetry_equals_the_symmetry():
    sample = full_sample((6, 6, 6))
    for s in symmetries():
        if np.linalg.det(s.matrix) < 0: continue
        warped, turned = warp_sample(sample, KINDS, make_warp((6, 6, 6), s.matrix)), turn_sample(sample, KINDS, s)
        for k in turned:
            if k != "meta": np.testing.assert_allclose(warped[k], turned[k], atol=1e-5)


def test_labels_are_never_mixed_and_outside_has_no_label():
    shape = (10, 12, 14)
    sample = full_sample(shape)
    sample["classes"] = sample["classes"]*10 + 1
    out = warp_sample(sample, KINDS, random_warp(shape, 3))
    for t in ("sheet", "classes", "depth"):
        assert out[t].dtype == sample[t].dtype
        assert set(np.unique(out[t])) <= {0} | set(np.unique(sample[t]))
    assert {f"{t}__mask" for t in KINDS} <= set(out), "a target without a mask gets one"
    outside = out["classes"] == 0
    assert outside.any() and not any(out[f"{t}__mask"][outside].any() for t in KINDS)
    assert out["classes__mask"][~outside].all() and out["image"].dtype == np.float32
    assert np.isfinite(out["image"]).all()


def test_zero_vectors_stay_zero_and_sheets_do_not_grow():
    roll = phantoms.sheets((16, 40, 40))
    n, mask = roll.normals[::-1].copy(), roll.mask[None].astype(np.float32)
    warp = random_warp(roll.mask.shape, 1)
    out = warp_sample({"image": mask, "n": n, "sheet": mask}, {"n": "normals", "sheet": "binary"}, warp)
    np.testing.assert_array_equal((out["n"] != 0).any(0), out["sheet"][0] > 0)
    length = np.linalg.norm(out["n"], axis=0)
    np.testing.assert_allclose(length[length > 0], 1, atol=1e-5)
    assert not warp_vectors(np.zeros((3, 8, 8, 8), np.float32), random_warp((8, 8, 8), 0)).any()


def test_opposite_vectors_that_cancel_take_the_nearest_one():
    n = np.zeros((3, 1, 1, 4), np.float32)
    n[0, 0, 0] = (1, 1, -1, -1)
    half = make_warp((1, 1, 4))
    half = half._replace(coords=half.coords + np.array([0, 0, 0.5]).reshape(3, 1, 1, 1))
    np.testing.assert_array_equal(warp_vectors(n, half)[0, 0, 0], (1, -1, -1, 0))


@pytest.mark.parametrize("call, message", [
    (lambda: make_warp((8, 8, 8), np.diag([1, 1, -1])), "positive determinant"),
    (lambda: make_warp((8, 8, 8), np.full((3, 3), np.nan)), "positive determinant"),
    (lambda: make_warp((8, 8, 8), np.eye(2)), "3 x 3"),
    (lambda: make_warp((8, 8, 8), None, np.zeros((3, 4, 4, 4)), (2, 2, 2)), "control points need shape"),
    (lambda: make_warp((8, 8, 8), None, np.zeros((3, 4, 4, 4)), (1, 1, 1)), "at least 2 voxels apart"),
    (lambda: make_warp((8, 8, 8), None, np.full((3, 4, 4, 4), np.nan), (8, 8, 8)), "may fold"),
    (lambda: warp_sample(full_sample((8, 8, 8)), KINDS, make_warp((8, 8, 7))), "made for \\(8, 8, 7\\)")])
def test_impossible_maps_are_refused(call, message):
    with pytest.raises(DataError, match=message): call()


# ----------------------------------------------------------------------------------------------------- stored normals

def directions(n=4000):
    return unit_vectors(rng_for(0, "directions").standard_normal((3, n)))


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-3), ("uint16", 0.002), ("int16", 0.002), ("uint8", 0.4)])
def test_B7_normals_round_trip(dtype, limit):
    n = directions()
    n[:, ::7] = 0
    back = decode_normals(encode_normals(n, dtype))
    assert np.nanmax(angle_between(back, n)) <= limit and back.dtype == np.float32
    assert not back[:, ::7].any() and not encode_normals(n, dtype)[:, ::7].any()
    axes = np.concatenate([np.eye(3), -np.eye(3)], 1)  # the corners of the range must not wrap around
    np.testing.assert_allclose(decode_normals(encode_normals(axes, dtype)), axes, atol=5e-3)


def test_U02_uint16_normals_are_scaled_once():
    "Upstream turned (0.6, -0.8, 0) into (-0.99998, -1, -0.99998) by dividing by 65535 and again by 32767.5"
    raw = encode_normals(np.array([[0.6], [-0.8], [0.0]]), "uint16")
    np.testing.assert_allclose(decode_normals(raw)[:, 0], (0.6, -0.8, 0), atol=1e-4)


def test_U02_uint8_normals_are_scaled_by_their_own_range():
    "The second revision decoded uint8 to -1...509"
    raw = encode_normals(np.array([[0.6], [-0.8], [0.0]]), "uint8")
    np.testing.assert_allclose(decode_normals(raw)[:, 0], (0.6, -0.8, 0), atol=5e-3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_U03_background_normals_decode_to_zero(dtype):
    "Upstream's background was (-1, -1, -1), of length 1.73, so that the cosine mask was true everywhere"
    assert not decode_normals(np.zeros((3, 2, 2, 2), dtype)).any()


def test_U12_normals_are_rounded_not_truncated():
    exact = (directions() + 1)*32767.5
    error = encode_normals(directions(), "uint16") - exact
    assert np.abs(error).max() <= 0.51 and abs(error.mean()) < 0.02


def test_unknown_storage_is_refused():
    with pytest.raises(DataError, match="stored as int32"): decode_normals(np.zeros((3, 2), np.int32))
    with pytest.raises(DataError, match="3 channels in front"): decode_normals(np.zeros((2, 2), np.uint8))
    with pytest.raises(ConfigError, match="cannot be stored as uint32"): encode_normals(np.zeros((3, 2)), "uint32")


def test_angles():
    a, b = np.array([[1.0], [0], [0]]), np.array([[-1.0], [1e-9], [0]])
    assert angle_between(a, b)[0] == pytest.approx(180, abs=1e-6)
    assert angle_between(a, b, axial=True)[0] == pytest.approx(0, abs=1e-6)
    assert np.isnan(angle_between(a, 0*a))[0]
    rgb = normals_rgb(np.array([[1.0, 0], [0, 0], [0, 0]]))
    assert rgb.tolist() == [[1, 0.5, 0.5], [0, 0, 0]]


# ------------------------------------------------------------------------------------------------ normals of walls

def test_walls_of_a_ball_point_from_the_larger_label_to_the_smaller():
    ball = phantoms.ball(36, 12).astype(np.uint16)
    outward = np.stack(grid((36, 36, 36))[::-1])
    for labels, way in ((7*ball, 1), (7 - 6*ball, -1)):
        wall, n = boundary_normals(labels)
        angle = angle_between(n, way*outward)
        assert np.nanmean(angle) < 2 and np.nanmax(angle) < 6  # staircase of radius 12, smoothed over 1.5
        np.testing.assert_array_equal(wall > 0, (n != 0).any(0))
    assert wall.dtype == np.uint8 and n.dtype == np.float32


def test_a_thin_layer_has_one_direction():
    "Grey matter three voxels thick touches fluid and white matter; both of its walls point outwards"
    lbl = np.repeat([0, 1, 2, 3], (6, 3, 2, 6))[:, None, None]*np.ones((1, 6, 6), int)
    wall, n = boundary_normals(lbl)
    assert (wall > 0).all((1, 2)).nonzero()[0].tolist() == [5, 6, 8, 9, 10, 11] and not wall[[0, 7, 16]].any()
    np.testing.assert_allclose(n[2][wall > 0], -1, atol=1e-5)


def test_walls_are_the_voxels_near_another_label():
    rng = rng_for(0, "cells")
    seeds = rng.uniform(0, 20, (6, 3))
    place = np.stack(np.meshgrid(*[np.arange(20)]*3, indexing="ij"), -1)
    lbl = ((place[..., None, :] - seeds)**2).sum(-1).argmin(-1) + 1
    wall, _ = boundary_normals(lbl, sigma=1)
    near = np.zeros(lbl.shape, bool)
    for axis in range(3):
        differ = np.diff(lbl, axis=axis) != 0
        for side in (0, 1):
            near |= np.pad(differ, [(side, 1 - side) if a == axis else (0, 0) for a in range(3)])
    np.testing.assert_array_equal(wall > 0, near)


def test_walls_turn_with_the_volume_and_ignore_labels():
    lbl = phantoms.random_body(20, n_organs=5).lbl.astype(np.int64)
    wall, n = boundary_normals(lbl)
    for s in symmetries()[::3]:
        w, m = boundary_normals(turn(lbl, s))
        np.testing.assert_array_equal(w, turn(wall, s))
        angle = angle_between(m, turn(n, s, vectors=True))[w > 0]
        assert np.median(angle) < 0.01 and (angle < 0.5).mean() > 0.99, "only vectors that nearly cancel may differ"
    others = [int(k) for k in np.unique(lbl) if k > 1]
    rim = boundary_normals(lbl, ignore=others)[0]
    assert rim.any() and not rim[np.isin(lbl, others)].any()
    assert not boundary_normals(np.ones((4, 4, 4), int))[0].any()


@pytest.mark.parametrize("bad, message", [
    ({"lbl": np.zeros((4, 4, 4))}, "got float64"), ({"lbl": np.zeros((4, 4), int)}, "shape \\(4, 4\\)"),
    ({"radius": 0.5}, "radius >= 1"), ({"sigma": 0}, "sigma > 0")])
def test_boundary_normals_refuse(bad, message):
    with pytest.raises(DataError, match=message): boundary_normals(**{"lbl": np.zeros((4, 4, 4), int), **bad})


# ------------------------------------------------------------------------------------------------------------ real data

def test_cell_walls_of_a_real_ovule(data_dir):
    import zarr
    group = zarr.open(str(data_dir/"zarr_multitask"/"ovule.zarr"), mode="r")
    lbl, raw = group["label"][:], group["raw"][:]
    wall, n = boundary_normals(lbl, sigma=(1, 1.5, 1.5))
    assert 0.03 < wall.mean() < 0.3 and raw[wall > 0].mean() > 1.3*raw[wall == 0].mean()
    np.testing.assert_allclose(np.linalg.norm(n, axis=0)[wall > 0], 1, atol=1e-4)
    bright = raw.astype(np.float64)  # across a wall the image has its ridge: it varies along the normal most
    slope = gradient(bright)
    across = ((slope*n).sum(0)**2)[wall > 0].sum()/(slope**2).sum(0)[wall > 0].sum()
    assert across > 0.5, "a random direction would give a third"


def test_orientation_codes_of_real_membranes_turn_like_vectors(data_dir):
    "Codes: 0 |, 32 /, 64 -, 96 \\ as seen with y down; their axial normals must turn into the permuted codes"
    import zarr
    codes = zarr.open(str(data_dir/"zarr_multitask"/"vnc_a.zarr"), mode="r")["labels"][:4, :96, :96]
    d = 0.5**0.5
    table = {0: (1, 0, 0), 32: (d, d, 0), 64: (0, 1, 0), 96: (d, -d, 0)}  # (x, y, z) across the membrane
    def vectors(c): return sum(np.multiply.outer(np.array(v, np.float32), c == k) for k, v in table.items())
    after = {"flip": {0: 0, 32: 96, 64: 64, 96: 32}, "quarter": {0: 64, 32: 96, 64: 0, 96: 32}}
    for s, swap in ((flip(2), after["flip"]), (flip(1), after["flip"]), (rot90(1, (1, 2)), after["quarter"]),
                    (rot90(2, (1, 2)), {k: k for k in table})):
        turned = turn(codes, s)
        permuted = np.full_like(turned, 255)
        for a, b in swap.items(): permuted[turned == a] = b
        angle = angle_between(turn(vectors(codes), s, vectors=True), vectors(permuted), axial=True)
        assert (~np.isnan(angle)).sum() > 3000 and np.nanmax(angle) < 0.1
