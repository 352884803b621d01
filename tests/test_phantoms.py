"Phantoms: same seed, same bytes; geometry that can be derived by hand; shapes and spacings of every kind"
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from medvol_nb import phantoms as ph
from medvol_nb.core import DataError, rng_for

MAKERS = {
    "head": lambda seed: ph.head((17, 20, 15), seed).img,
    "head_lbl": lambda seed: ph.head((17, 20, 15), seed).lbl,
    "abdomen": lambda seed: ph.abdomen((21, 16, 19), seed).img,
    "abdomen_lbl": lambda seed: ph.abdomen((21, 16, 19), seed).lbl,
    "random_body": lambda seed: ph.random_body(16, seed).img,
    "vessels": lambda seed: ph.vessels((20, 20, 24), seed).img,
    "sheets": lambda seed: ph.sheets((9, 33, 40), seed).img,
    "sheets_normals": lambda seed: ph.sheets((9, 33, 40), seed).normals,
    "embryo": lambda seed: ph.embryo_frame(5, 48, seed),
    "field": lambda seed: ph.smooth_field((9, 10, 11), seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_seed_decides_every_byte(name):
    a, b, c = MAKERS[name](3), MAKERS[name](3), MAKERS[name](4)
    assert a.tobytes() == b.tobytes() and a.dtype == b.dtype
    assert a.tobytes() != c.tobytes()


def test_same_bytes_in_another_process_with_more_threads():
    code = ("import hashlib; from medvol_nb import phantoms as p; "
            "content = p.head((17, 20, 15), 3).img.tobytes() + p.smooth_field((9, 10, 11), 3).tobytes(); "
            "print(hashlib.sha1(content).hexdigest())")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={"PATH": "", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5"})
    here = ph.head((17, 20, 15), 3).img.tobytes() + ph.smooth_field((9, 10, 11), 3).tobytes()
    assert run.stdout.strip() == hashlib.sha1(here).hexdigest()


def test_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for make in MAKERS.values(): make(0)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


# --- balls and ellipsoids

@pytest.mark.parametrize("radius", [6, 7.5, 10, 14])
@pytest.mark.parametrize("size", [32, 33, (32, 33, 35)])
def test_ball_volume(size, radius):
    # lattice points in a ball of radius r deviate from 4/3 pi r^3 by O(r^1.4): 3 % is ample from r = 6 on
    got, want = ph.ball(size, radius), 4/3*np.pi*radius**3
    assert got.dtype == bool and abs(got.sum() - want) < 0.03*want


def test_ball_known_counts():
    # radius 1 about a voxel centre: the voxel and its 6 neighbours; radius sqrt(2): also the 12 edge neighbours
    assert ph.ball(5, 1).sum() == 7 and ph.ball(5, 1.415).sum() == 19
    # about a voxel corner, nearest centres are sqrt(3)/2 = 0.866 away
    assert ph.ball(4, 0.87).sum() == 8 and ph.ball(4, 0.86).sum() == 0


def test_ball_centre_is_in_voxels():
    b = ph.ball((9, 8, 7), 1, centre=(6, 2, 3))
    assert b[6, 2, 3] and np.allclose(np.argwhere(b).mean(0), (6, 2, 3))


def test_ellipsoid_turn_is_from_x_to_y():
    e = ph.ellipsoid(33, 16, (14, 4, 4), turn=45)
    assert e[24, 24, 16] and not e[24, 8, 16]


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 0), 0, (8, 8, 8.5), (8, 8, -1), "abc", True])
def test_bad_sizes_are_refused(size):
    with pytest.raises(DataError, match="positive integers"): ph.ball(size, 2)


@pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf])
def test_bad_radius_is_refused(bad):
    with pytest.raises(DataError, match="radii"): ph.ball(8, bad)


# --- smooth noise

@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_smooth_noise_statistics(ndim):
    # one period of 32 knots at 4 samples a knot
    smooth = ph.smooth_noise([np.arange(0, 32, 0.25 if ndim < 3 else 0.5)]*ndim, 1, rng_for(1, "t"))
    assert smooth.dtype == np.float32 and smooth.ndim == ndim
    # variance is 1 in expectation; 32^d knots give a relative error of about sqrt(2/32^d)
    assert abs(smooth.var() - 1) < 5*np.sqrt(2/32**ndim)


def test_smooth_noise_is_smooth_and_does_not_depend_on_the_grid():
    fine, coarse = np.linspace(-9, 9, 181), np.linspace(-9, 9, 19)
    a, b = (ph.smooth_noise((p, p[:1]), 3, rng_for(0, "g")) for p in (fine, coarse))
    assert np.allclose(a[::10], b, atol=1e-6)
    assert np.abs(np.diff(a, 2, axis=0)).max() < 0.02  # second difference ~ step^2/scale^2 = 0.001 times a few


def test_smooth_noise_of_no_points_and_bad_scale():
    assert ph.smooth_noise((np.zeros(0), np.arange(3)), 1, rng_for(0)).shape == (0, 3)
    with pytest.raises(DataError, match="scale"): ph.smooth_noise((np.arange(3),), 0, rng_for(0))


# --- head and abdomen

SHAPES = [(48, 56, 48), (17, 21, 19), (32, 32, 1), (1, 24, 24), (64, 48, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [ph.head, ph.abdomen])
def test_shapes_and_dtypes(make, shape):
    p = make(shape)
    assert p.img.shape == p.lbl.shape == shape and p.lbl.dtype == np.uint8
    assert p.img.dtype == (np.float32 if make is ph.head else np.int16)
    assert np.isfinite(p.img).all() and (p.lbl > 0).any() and len(p.spacing) == 3
    assert set(np.unique(p.lbl)) <= {0, *p.names}


@pytest.mark.parametrize("make, view", [(ph.head, (192, 224, 192)), (ph.abdomen, (384, 288, 336))])
def test_default_spacing_keeps_the_whole_in_view(make, view):
    for shape in ((48, 56, 48), (20, 31, 7)): assert np.allclose(np.multiply(make(shape).spacing, shape), view)


@pytest.mark.parametrize("seed", range(8))
def test_head_layers_order_and_marker_on_the_left(seed):
    p = ph.head(seed=seed)
    outer = [np.abs(np.argwhere(p.lbl == k) - np.array(p.lbl.shape)/2).mean() for k in (3, 2)]
    assert outer[0] < outer[1]  # grey lies outside white
    assert p.img[p.lbl == 1].mean() < p.img[p.lbl == 2].mean() < p.img[p.lbl == 3].mean()
    x = np.argwhere(p.img > 0.95*p.img.max())[:, 0]
    assert x.max() < 10  # brightest voxels: the capsule at the low end of x, patient's left
    assert p.img.min() == 0 and (p.img[p.lbl > 0] > 0).mean() > 0.999


@pytest.mark.parametrize("axis", range(3))
def test_head_has_no_mirror_symmetry(axis):
    p = ph.head(noise=0)
    assert np.abs(p.img - np.flip(p.img, axis)).max() > 50


@pytest.mark.parametrize("seed", range(12))
def test_every_organ_is_there_and_on_its_side(seed):
    p = ph.abdomen(seed=seed)
    assert list(p.names.values()) == ["liver", "spleen", "right kidney", "left kidney", "aorta", "vertebrae",
                                      "urinary bladder", "ribs"]
    at = {name: np.argwhere(p.lbl == k) for k, name in p.names.items()}
    assert min(len(v) for v in at.values()) > 150
    middle = {k: v.mean(0) for k, v in at.items()}
    mid_x = (p.lbl.shape[0] - 1)/2
    for name in ("liver", "right kidney"): assert middle[name][0] > mid_x + 4
    for name in ("spleen", "left kidney"): assert middle[name][0] < mid_x - 4
    assert middle["vertebrae"][1] < middle["aorta"][1]
    assert middle["urinary bladder"][2] < middle["right kidney"][2] < middle["liver"][2]


def test_abdomen_hounsfield_values():
    p = ph.abdomen(noise=0)
    means = {name: p.img[p.lbl == k].mean() for k, name in p.names.items()}
    assert p.img.min() >= -1024 and abs(p.img[0, 0].mean() + 1000) < 1
    # blur mixes neighbours at the rims, so a loose 35 HU about the values painted
    for name, value in (("liver", 112), ("spleen", 125), ("right kidney", 180), ("urinary bladder", 8)):
        assert abs(means[name] - value) < 35, name
    assert means["ribs"] > 200 and means["vertebrae"] > 200


@pytest.mark.parametrize("make", [ph.head, ph.abdomen])
def test_same_patient_at_another_voxel_size(make):
    a, b = make((64, 64, 64)), make((32, 40, 36))
    for k in a.names:
        va, vb = ((p.lbl == k).sum()*np.prod(p.spacing) for p in (a, b))
        assert abs(va/vb - 1) < 0.15, a.names[k]


@pytest.mark.parametrize("make", [ph.head, ph.abdomen])
def test_given_spacing_zooms_in_on_the_middle(make):
    whole, part = make((48, 48, 48)), make((24, 24, 24), spacing=make((48, 48, 48)).spacing)
    assert (whole.lbl[12:-12, 12:-12, 12:-12] == part.lbl).mean() > 0.999  # same voxel centres
    assert part.spacing == whole.spacing


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, np.nan), "mm", -1])
def test_bad_spacing_is_refused(spacing):
    with pytest.raises(DataError, match="spacing"): ph.abdomen(spacing=spacing)


def test_bad_seed_is_refused():
    with pytest.raises(DataError, match="seed"): ph.head(seed=-1)


# --- random body and vessels

@pytest.mark.parametrize("n", [0, 1, 13, 40])
def test_random_body_labels_are_named(n):
    p = ph.random_body((20, 21, 22), seed=2, n_organs=n)
    assert set(np.unique(p.lbl)) - {0} == set(p.names) and p.names[1] == "body"
    assert max(p.names) <= n + 1
    # body half axes .92 .8 .98 of the cube's: pi/6*.72 of the volume, the warp (sd 4 %) moves the surface only
    assert abs((p.lbl > 0).mean() - np.pi/6*0.92*0.8*0.98) < 0.08


@pytest.mark.parametrize("shape, n", [((48, 48, 64), 15), ((24, 31, 40), 7), ((64, 64, 64), 63), ((16, 16, 16), 3)])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_vessels_hang_together(shape, n, seed):
    from scipy.ndimage import label
    p = ph.vessels(shape, seed, n)
    assert label(p.lbl > 0, np.ones((3, 3, 3)))[1] == 1
    assert set(np.unique(p.lbl)) - {0} == set(p.names) and max(p.names) <= n and 1 in p.names
    assert (p.lbl[:, :, 0] == 1).any()  # the trunk enters at the bottom


def test_vessel_branches_get_thinner():
    # mean radius from volume and length: trunk against the thinnest generation
    p = ph.vessels((64, 64, 96), 0, 15)
    counts = np.bincount(p.lbl.ravel())
    assert counts[1] > 2*counts[8:].mean()


@pytest.mark.parametrize("n", [0, 256, -3])
def test_vessel_count_is_bounded_by_uint8(n):
    with pytest.raises(DataError, match="1...255"): ph.vessels(n_branches=n)


# --- sheets

@pytest.mark.parametrize("shape", [(48, 64, 64), (5, 33, 47), (1, 64, 64), (20, 1, 64)])
@pytest.mark.parametrize("pitch, thickness", [(16, 5), (9, 3.5), (24, 12)])
def test_sheet_normals(shape, pitch, thickness):
    s = ph.sheets(shape, 1, pitch, thickness)
    on = s.mask == 1
    assert s.img.dtype == s.mask.dtype == np.uint8 and s.normals.dtype == np.float32
    assert s.img.shape == s.mask.shape == shape and s.normals.shape == (3, *shape)
    assert on.any() and set(np.unique(s.mask)) <= {0, 1}
    assert np.allclose(np.linalg.norm(s.normals, axis=0), on, atol=1e-5)
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1)/2 for n in shape), indexing="ij")
    outward = (s.normals[1]*y + s.normals[2]*x)[on]/np.hypot(y, x)[on]
    assert outward.min() > 0.2


def test_normals_follow_the_bright_side():
    s = ph.sheets((24, 64, 64), 3, noise=0)
    gradient = np.stack(np.gradient(s.img.astype(np.float32)))
    from scipy.ndimage import binary_erosion
    inner = binary_erosion(s.mask > 0)
    g = gradient[:, inner]
    cosine = (g*s.normals[:, inner]).sum(0)/np.maximum(np.linalg.norm(g, axis=0), 1e-6)
    assert np.median(cosine) > 0.95 and (cosine > 0).mean() > 0.98


def test_sheets_repeat_with_the_pitch():
    # along a ray the sheets of an unnoisy roll are one pitch apart, up to the wave (0.2 pitch times a few)
    s = ph.sheets((1, 129, 129), 0, pitch=16, thickness=5)
    ray = s.mask[0, 64, 64:]
    starts = np.flatnonzero(np.diff(ray.astype(int)) == 1)
    assert len(starts) >= 3 and np.abs(np.diff(starts) - 16).max() < 10 and abs(np.diff(starts).mean() - 16) < 4


@pytest.mark.parametrize("pitch, thickness", [(5, 5), (5, 0), (5, -1), (np.nan, 1)])
def test_bad_sheets_are_refused(pitch, thickness):
    with pytest.raises(DataError, match="thickness"): ph.sheets(pitch=pitch, thickness=thickness)


# --- embryos

def test_phase_table():
    assert len(ph.EMBRYO_PHASES) == 16 == len(set(ph.EMBRYO_PHASES))
    assert ph.EMBRYO_PHASES[0] == "tPB2" and ph.EMBRYO_PHASES[10] == "t9+" and ph.EMBRYO_PHASES[-1] == "tHB"


@pytest.mark.parametrize("size", [32, 64, 97, 128])
def test_embryo_frames_differ_by_phase_more_than_by_noise(size):
    frames = [ph.embryo_frame(p, size).astype(float) for p in range(16)]
    # noise has sd 3, differences 4.2: beyond 25 levels lies content; the smallest step, a pronucleus, covers 1 to 2 %
    def changed(a, b): return (np.abs(a - b) > 25).mean()
    assert frames[0].shape == (size, size) and changed(frames[3], ph.embryo_frame(3, size, frame=1)) == 0
    assert min(changed(frames[i], frames[j]) for i in range(16) for j in range(i)) > 0.008


def test_embryos_have_an_identity():
    # without a texture of its own, unrelated embryos of one phase correlate up to 0.99 and memorisation tests are void
    frames = [ph.embryo_frame(9, 64, seed=s).ravel() for s in range(20)]
    likeness = np.corrcoef(frames) - np.eye(20)
    assert likeness.max() < 0.93


def test_defocus_blurs_both_ways():
    def detail(f): return np.abs(np.diff(ph.embryo_frame(6, 128, focal=f).astype(float), 4, axis=0)).mean()
    def contrast(f): return ph.embryo_frame(6, 128, focal=f).std()
    assert detail(0) > detail(15) > 0.9*detail(45)
    assert contrast(0) > contrast(-15) > contrast(30) > contrast(-45)
    above, below = (ph.embryo_frame(6, focal=f).astype(float) for f in (15, -15))
    assert 0 < np.abs(above - below).mean() < 6  # the noise differs, nothing else


@pytest.mark.parametrize("phase", [-1, 16, 2.0, "t2"])
def test_bad_phase_is_refused(phase):
    with pytest.raises(DataError, match="0...15"): ph.embryo_frame(phase)


@pytest.mark.parametrize("focal", [np.nan, np.inf])
def test_bad_focal_is_refused(focal):
    with pytest.raises(DataError, match="finite"): ph.embryo_frame(0, focal=focal)


# --- displacements

@pytest.mark.parametrize("shape", [(24, 24, 24), (9, 17, 5), (16, 16, 1)])
@pytest.mark.parametrize("amplitude", [0, 0.5, 6])
def test_field_amplitude(shape, amplitude):
    f = ph.smooth_field(shape, 1, amplitude)
    assert f.shape == (3, *shape) and f.dtype == np.float32
    assert abs(np.linalg.norm(f, axis=0).max() - amplitude) < 1e-5*max(amplitude, 1)


def test_field_components_are_unrelated():
    f = ph.smooth_field((64, 64, 64), 2, 4, scale=4).reshape(3, -1)
    assert np.abs(np.corrcoef(f) - np.eye(3)).max() < 0.1


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_warp_identity_keeps_values_and_dtype(dtype, order):
    vol = rng_for(0, dtype).integers(0, 200, (7, 8, 9)).astype(dtype)
    out = ph.warp(vol, np.zeros((3, 7, 8, 9), np.float32), order)
    assert out.dtype == vol.dtype
    # order 3 goes through a spline fit and back: exact up to rounding of its recursive filter
    assert np.allclose(out.astype(float), vol.astype(float), atol=1e-6*200 if order == 3 else 0)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("step", [-3, 1, 2])
@pytest.mark.parametrize("order", [0, 1])
def test_constant_field_is_a_shift(axis, step, order):
    vol = rng_for(1).random((11, 12, 13))
    field = np.zeros((3, *vol.shape))
    field[axis] = step
    n = vol.shape[axis]
    idx = np.clip(np.arange(n) + step, 0, n - 1)  # beyond the border the nearest voxel
    assert np.allclose(ph.warp(vol, field, order), np.take(vol, idx, axis))


def test_half_a_voxel_is_the_mean_of_two():
    vol = rng_for(2).random((6, 5, 4))
    field = np.zeros((3, 6, 5, 4))
    field[0] = 0.5
    assert np.allclose(ph.warp(vol, field)[:-1], (vol[1:] + vol[:-1])/2)


def test_labels_stay_labels():
    p = ph.abdomen((24, 18, 21))
    out = ph.warp(p.lbl, ph.smooth_field(p.lbl.shape, 0, 3), order=0)
    assert out.dtype == np.uint8 and set(np.unique(out)) <= set(np.unique(p.lbl))
    mask = ph.warp(p.lbl == 1, ph.smooth_field(p.lbl.shape, 0, 3))
    assert mask.dtype == bool and 0.5 < mask.sum()/(p.lbl == 1).sum() < 2


def test_cubic_overshoot_does_not_wrap_around():
    vol = np.zeros((9, 9, 9), np.uint8)
    vol[4:] = 255
    field = np.full((3, 9, 9, 9), 0.3)
    out = ph.warp(vol, field, 3).astype(int)
    assert (np.diff(out[:, 4, 4]) >= -60).all() and out[0, 4, 4] < 60 and out[-1, 4, 4] > 195


@pytest.mark.parametrize("field_shape", [(3, 4, 4, 5), (2, 4, 4, 4), (4, 4, 4), (4, 4, 4, 3)])
def test_misfit_field_is_refused(field_shape):
    with pytest.raises(DataError, match="must have shape"): ph.warp(np.zeros((4, 4, 4)), np.zeros(field_shape))


def test_bad_order_is_refused():
    with pytest.raises(DataError, match="order"): ph.warp(np.zeros((4, 4, 4)), np.zeros((3, 4, 4, 4)), order=7)


def test_defaults_are_fast():
    # CPU seconds; the aim is 0.3 s, three times that is the alarm
    import time
    for make in (ph.head, ph.abdomen, ph.random_body, ph.vessels, ph.sheets, lambda: ph.embryo_frame(5)):
        start = time.process_time()
        make()
        assert time.process_time() - start < 0.9
