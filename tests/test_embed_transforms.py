import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.core import DataError, FormatError, MissingFile, rng_for
from medvol_nb.embed.transforms import (
    Field,
    Transform,
    as_field,
    compose,
    estimate_transform,
    fit_points,
    invert,
    jacobian,
    jacobian_report,
    read_deeds_affine,
    read_deeds_field,
    read_transform,
    warp,
    write_transform,
)
from medvol_nb.geometry import Volume, affine_from, reorient, to_axes, to_index, to_world


def placed(angles=(0, 0, 0), shift=(0, 0, 0), scale=1.0):
    from scipy.spatial.transform import Rotation

    m = np.eye(4)
    m[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scale
    m[:3, 3] = shift
    return m


OBLIQUE = placed((20, -15, 33), (-40, 12, 700)) @ np.diag([0.8, 1.7, 2.5, 1])
SHEARED = OBLIQUE @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def wobble(shape, affine, size=3.0, scale=60, seed=0):
    axes = [np.arange(n) * s for n, s in zip(shape, np.linalg.norm(affine[:3, :3], axis=0))]
    return Field(size * np.stack([phantoms.smooth_noise(axes, scale, rng_for(seed, "w", c)) for c in range(3)]), affine)


def inside(shape, affine, n=100, margin=4):
    return to_world(affine, rng_for(0, "pts").uniform(margin, np.array(shape) - 1 - margin, (n, 3)))


def trial(wrong, seed, **options):
    "Error [mm] at the corners of the box of section 7.2, of least squares and of the robust fit"
    rng = rng_for(seed, "table", wrong)
    q = rng.uniform(-0.5, 0.5, (600, 3)) * (350, 300, 250)
    true = placed(np.rad2deg(rng.uniform(-0.15, 0.15, 3)), rng.uniform(-20, 20, 3))
    k = to_world(true, q) + rng.normal(0, 3, q.shape)
    bad = rng.random(600) < wrong
    k[bad] = rng.uniform(-0.5, 0.5, (bad.sum(), 3)) * (350, 300, 250)
    corners = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T * (350, 300, 250)
    fits = fit_points(q, k, np.ones(600), "rigid"), estimate_transform(q, k, **options).matrix
    return [np.linalg.norm(to_world(m, corners) - to_world(true, corners), axis=1).mean() for m in fits]


@pytest.mark.parametrize("wrong", (0, 0.05, 0.1, 0.2, 0.4, 0.6))
def test_A9_D15_robust_fit_survives_outliers(wrong):
    plain, robust = np.mean([trial(wrong, s, model="rigid", trials=400) for s in range(4)], axis=0)
    assert robust <= 1.0
    if wrong >= 0.2:
        assert plain > 5 * robust


def test_A9_affine_survives_outliers():
    assert np.mean([trial(0.4, s, trials=400)[1] for s in range(4)]) <= 1.5


def test_D15_scale_needs_more_than_a_rigid_fit():
    q = rng_for(0, "q").uniform(-150, 150, (200, 3))
    k = to_world(placed((3, 4, 5), (1, 2, 3), 1.08), q)
    for model in ("similarity", "affine"):
        assert estimate_transform(q, k, model=model).rms < 0.01
    assert estimate_transform(q, k, model="rigid", inlier_mm=40).rms > 5


def test_D02_no_threshold_on_scores_is_needed():
    "Weights are relative: a score scale of 1, 2 or 1000 gives the same transform"
    q = rng_for(0, "q").uniform(-150, 150, (200, 3))
    k = to_world(placed((3, 4, 5), (1, 2, 3)), q) + rng_for(0, "n").normal(0, 2, q.shape)
    w = rng_for(0, "w").random(200)
    a, b = (estimate_transform(q, k, w * s).matrix for s in (1, 1000))
    assert np.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("case", ("none", "one", "three", "same", "line", "plane", "nonsense", "nan", "weights"))
def test_degenerate_matches_give_a_status(case):
    q = rng_for(0, "d").uniform(-100, 100, (40, 3))
    t = placed((0, 0, 10), (5, 6, 7))
    q = {
        "none": q[:0],
        "one": q[:1],
        "three": q[:3],
        "same": np.repeat(q[:1], 40, 0),
        "line": q[:, :1] * (1.0, 2, 3),
        "plane": q * (1, 1, 0),
    }.get(case, q)
    k, w = to_world(t, q), None
    if case == "nonsense":
        k = k[::-1]
    if case == "nan":
        k[5:] = np.nan
    if case == "weights":
        w = np.zeros(40)
    found = estimate_transform(q, k, w)
    expected = {"same": "reduced", "line": "reduced", "plane": "reduced"}.get(case, "failed")
    assert found.status == expected and found.reason
    assert np.isfinite(found.matrix).all()
    if expected == "failed":
        assert np.array_equal(found.matrix, np.eye(4)) and found.inlier_fraction == 0
    elif case != "line":  # a shift is all that is left, which cannot follow a turn
        assert found.inlier_fraction == 1
    if case == "plane":
        assert np.allclose(to_world(found.matrix, q), k, atol=1e-3)


def test_wrong_shapes_and_words_are_errors():
    q = np.zeros((9, 3))
    with pytest.raises(DataError, match="same shape"):
        estimate_transform(q, q[:5])
    with pytest.raises(DataError, match="weights"):
        estimate_transform(q, q, np.ones(3))
    with pytest.raises(DataError, match="model"):
        estimate_transform(q, q, model="projective")
    with pytest.raises(DataError, match="inlier_mm"):
        estimate_transform(q, q, inlier_mm=0)


@pytest.mark.parametrize("affine", (np.diag([2.0, 2, 2, 1]), OBLIQUE, SHEARED, np.diag([-1.0, 1.5, -3, 1])))
def test_R6_fields_on_any_grid(affine):
    shape = (30, 26, 22)
    f = wobble(shape, affine)
    pts = inside(shape, affine)
    t = Transform((f, placed((2, 3, 4), (9, 8, 7))))
    assert np.abs(invert(t)(t(pts)) - pts).max() < 0.3
    assert np.allclose(compose(Transform((f,)), Transform((t.steps[1],)))(pts), t(pts))
    assert np.abs(as_field(t, affine, shape)(pts) - t(pts)).max() < 0.3
    assert jacobian_report(f)["fraction_folded"] == 0
    ijk = to_index(affine, f(pts)) - to_index(affine, pts)
    assert np.isfinite(ijk).all()


@pytest.mark.parametrize("affine", (OBLIQUE, SHEARED))
def test_jacobian_of_a_linear_map_is_its_determinant(affine):
    m = placed((5, 5, 5), (1, 2, 3)) @ np.array([[1.1, 0.1, 0, 0], [0, 0.9, 0, 0], [0, 0.2, 1.05, 0], [0, 0, 0, 1]])
    f = as_field(Transform((m,)), affine, (8, 9, 7))
    assert np.allclose(jacobian(f), np.linalg.det(m), atol=1e-3)
    mirrored = as_field(Transform((np.diag([-1.0, 1, 1, 1]),)), affine, (8, 9, 7))
    assert jacobian_report(mirrored)["fraction_folded"] == 1


def test_A9_D03_anisotropic_application_agrees_with_the_analytic_field():
    "A field of a 2 mm grid applied on an anisotropic one, within 0.25 mm"

    def analytic(p):
        return p + np.stack([4 * np.sin(p[:, 1] / 25), 3 * np.cos(p[:, 2] / 30), 2 * np.sin(p[:, 0] / 20)], 1)

    coarse, fine = np.diag([2.0, 2, 2, 1]), np.diag([0.8, 0.8, 3.0, 1])
    grid = np.indices((40, 40, 40)).reshape(3, -1).T
    d = analytic(to_world(coarse, grid)) - to_world(coarse, grid)
    f = Field(d.T.reshape(3, 40, 40, 40), coarse)
    shape = (90, 90, 24)
    pts = to_world(fine, np.argwhere(np.ones(shape, bool))[::7])
    assert np.abs(f(pts) - analytic(pts)).max() < 0.25
    ramp = Volume(to_world(fine, np.indices((120, 120, 40)).reshape(3, -1).T)[:, 0].reshape(120, 120, 40), fine)
    out = warp(ramp, Transform((f,)), fine, shape)
    inner = (slice(10, 80), slice(10, 80), slice(3, 20))
    want = analytic(to_world(fine, np.indices(shape).reshape(3, -1).T))[:, 0].reshape(shape)
    assert np.abs(out.data - want)[inner].max() < 0.25


def test_D14_warping_keeps_tissue_beyond_the_fixed_shape():
    "The moving image is larger than the fixed grid; what is moved in comes from beyond it"
    moving = Volume(np.arange(40, dtype=np.float32)[:, None, None] * np.ones((1, 5, 5), np.float32), np.eye(4))
    out = warp(moving, Transform((placed(shift=(25, 0, 0)),)), np.eye(4), (10, 5, 5))
    assert np.allclose(out.data[:, 2, 2], np.arange(25, 35))


@pytest.mark.parametrize("order", (0, 1, 3))
@pytest.mark.parametrize("axes", ("xyz", "zyx"))
def test_warp_by_nothing_changes_nothing(order, axes):
    data = rng_for(0, "v").integers(0, 50, (9, 8, 7)).astype(np.int16)
    vol = to_axes(Volume(data, OBLIQUE), axes)
    out = warp(vol, Transform(), OBLIQUE, data.shape, order)
    assert np.allclose(out.data, data, atol=1e-3) and (order or out.dtype == np.int16)
    flipped = warp(reorient(vol, "LPI"), Transform(), OBLIQUE, data.shape, order)
    assert np.allclose(flipped.data, data, atol=1e-3)


def test_files_round_trip_and_agree_with_itk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    shape = (20, 18, 16)
    t = Transform((wobble(shape, OBLIQUE), placed((2, 3, 4), (9, 8, 7))))
    pts = inside(shape, OBLIQUE)
    for name in ("t.h5", "t.tfm"):
        write_transform(t, tmp_path / name)
        assert np.abs(read_transform(tmp_path / name)(pts) - t(pts)).max() < 1e-3
        theirs = sitk.ReadTransform(str(tmp_path / name))
        there = np.array([theirs.TransformPoint(tuple(p * (-1, -1, 1))) for p in pts]) * (-1, -1, 1)
        assert np.abs(there - t(pts)).max() < 1e-3
    f = as_field(t, OBLIQUE, shape)
    write_transform(Transform((f,)), tmp_path / "f.nii.gz")
    img = sitk.ReadImage(str(tmp_path / "f.nii.gz"), sitk.sitkVectorFloat64)
    theirs = sitk.DisplacementFieldTransform(img)
    there = np.array([theirs.TransformPoint(tuple(p * (-1, -1, 1))) for p in pts]) * (-1, -1, 1)
    assert np.abs(there - f(pts)).max() < 1e-3
    assert np.abs(read_transform(tmp_path / "f.nii.gz")(pts) - f(pts)).max() < 1e-3


def test_nifti_field_has_the_vector_intent(tmp_path):
    import nibabel as nib

    write_transform(Transform((wobble((8, 8, 8), np.eye(4)),)), tmp_path / "f.nii.gz")
    first = (tmp_path / "f.nii.gz").read_bytes()
    head = nib.load(tmp_path / "f.nii.gz").header
    assert head["intent_code"] == 1007 and head.get_data_shape() == (8, 8, 8, 1, 3)
    write_transform(Transform((wobble((8, 8, 8), np.eye(4)),)), tmp_path / "f.nii.gz", "overwrite")
    assert (tmp_path / "f.nii.gz").read_bytes() == first


def test_hostile_files(tmp_path):
    pytest.importorskip("SimpleITK")
    with pytest.raises(MissingFile):
        read_transform(tmp_path / "gone.h5")
    for name, data in (
        ("a.h5", b"not hdf5" * 40),
        ("a.tfm", b"#Insight Transform File V1.0\nTransform: nonsense\n"),
        ("a.nii.gz", b"\x1f\x8b broken"),
        ("a.csv", b"1,2"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError):
            read_transform(tmp_path / name)
    from medvol_nb.volume import write_volume

    write_volume(Volume(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "scalar.nii.gz")
    with pytest.raises(FormatError, match="3 components"):
        read_transform(tmp_path / "scalar.nii.gz")


def test_A10_deeds_files(tmp_path):
    "Blocks: second, first, third axis; first axis fastest; control point c at voxel c n/m"
    n, m = (13, 15, 18), (4, 5, 6)
    u = rng_for(0, "deeds").normal(size=(3, *m)).astype("<f4")
    (tmp_path / "x.dat").write_bytes(b"".join(np.asfortranarray(u[a]).tobytes("F") for a in (1, 0, 2)))
    f = read_deeds_field(tmp_path / "x.dat", np.diag([2.0, 3, 4, 1]), n, 3)
    c = np.array([[2, 3, 4]])
    place = c * np.array(n) / np.array(m) * (2, 3, 4)
    assert np.allclose(f(place) - place, u[:, 2, 3, 4] * (2, 3, 4), atol=1e-4)
    with pytest.raises(FormatError, match="bytes"):
        read_deeds_field(tmp_path / "x.dat", np.eye(4), (18, 18, 18), 3)
    (tmp_path / "nan.dat").write_bytes(np.full(3 * 120, np.nan, "<f4").tobytes())
    with pytest.raises(FormatError, match="NaN"):
        read_deeds_field(tmp_path / "nan.dat", np.eye(4), n, 3)
    (tmp_path / "m.txt").write_text("nan 0 0 0\n0 1 0 0\n0 0 1 0\n1 2 3 1\n")
    with pytest.raises(FormatError, match="finite"):
        read_deeds_affine(tmp_path / "m.txt", np.eye(4), np.eye(4))


def test_real_landmarks(data_dir):
    "Identity and the supplied affine on the 51 landmarks of the lung: 35.27 and 5.87 mm"
    d = data_dir / "anatomical_embedding/lung_two_timepoints"
    read = lambda name: np.array(
        [[float(v) for v in line.split()] for line in (d / name).read_text().splitlines()[2:] if line.strip()]
    )
    base, follow = (read(f"{n}_landmarks_lps_mm.txt") * (-1, -1, 1) for n in ("baseline", "followup"))
    from medvol_nb.volume import read_volume

    mask = to_axes(read_volume(d / "baseline_lung_mask.nii.gz"), "xyz")
    idx = np.rint(to_index(mask.affine, base)).astype(int)
    ok = ((idx >= 0) & (idx < mask.shape)).all(1)
    assert ok.sum() == 51
    p = {}
    for line in (d / "affine_baseline_to_followup_elastix.txt").read_text().splitlines():
        words = line.strip("() \r").split()
        if len(words) > 1 and words[0] in ("TransformParameters", "CenterOfRotationPoint"):
            p[words[0]] = np.array([float(w) for w in words[1:]])
    a, t, c = p["TransformParameters"][:9].reshape(3, 3), p["TransformParameters"][9:], p["CenterOfRotationPoint"]
    m = np.eye(4)
    m[:3, :3], m[:3, 3] = a, c + t - a @ c
    flip = np.diag([-1.0, -1, 1, 1])
    affine = Transform((flip @ m @ flip,))
    error = lambda f: np.linalg.norm(f(base[ok]) - follow[ok], axis=1).mean()
    assert abs(error(Transform()) - 35.27) < 0.01 and abs(error(affine) - 5.87) < 0.01


def test_default_fill_and_edges():
    vol = Volume(np.full((4, 4, 4), 7.0, np.float32), affine_from(1.0))
    away = Transform((placed(shift=(100, 0, 0)),))
    assert (warp(vol, away, np.eye(4), (4, 4, 4), fill=-5).data == -5).all()
    assert (warp(vol, away, np.eye(4), (4, 4, 4), fill="edge").data == 7).all()


def test_a_field_that_folds_has_no_inverse():
    wave = 30 * np.sin(np.arange(20) * 1.3)[:, None, None] * np.ones((20, 12, 12))
    folded = Field(np.stack([wave, 0 * wave, 0 * wave]).astype(np.float32), affine_from(2.0))
    with pytest.raises(DataError, match="does it fold"):
        invert(Transform((folded,)))
