"""Random changes of samples: reproducible, without clipping, and true to the vectors."""
import json

import numpy as np
import pytest
from pydantic import ValidationError

from medvol_nb import phantoms
from medvol_nb.config import check_config
from medvol_nb.core import ConfigError, DataError, rng_for
from medvol_nb.parallel import pmap
from medvol_nb.zarrnet import augment as page
from medvol_nb.zarrnet.augment import Augment, AugmentConfig
from medvol_nb.zarrnet.geometry import angle_between, gradient, symmetries, turn, unit_vectors

KINDS = {"sheet": "binary", "classes": "multiclass", "n": "normals"}
NAMES = list(AugmentConfig.model_fields)
GEOMETRIC = ("flip", "rot90", "transpose", "deform")
INTENSITY = [n for n in NAMES if n not in GEOMETRIC]


def make_sample(shape=(12, 20, 20), seed=0):
    rng = rng_for(seed, "sample")
    roll = phantoms.sheets(shape, seed, pitch=8, thickness=3)
    return {"image": np.stack([roll.img, 200 - roll.img]).astype(np.float32)/40 - 2,
            "sheet": roll.mask[None].astype(np.float32),
            "classes": rng.integers(0, 3, (1, *shape)), "n": roll.normals[::-1].copy(),
            "n__mask": roll.mask[None], "meta": {"volume": "a"}}


def always(name, **settings):
    return AugmentConfig.model_fields[name].annotation(p=1, **settings)


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype
                                    for k in a if isinstance(a[k], np.ndarray))


def test_U22_flips_and_turns_are_on_unless_they_are_switched_off():
    "The second revision dropped them and kept their code"
    augment, done = Augment(None, KINDS), set()
    for k in range(200): done |= {name for name, _ in augment.draw((1, 16, 16, 16), rng_for(k, "draws"))}
    assert {"flip", "rot90", "transpose"} <= done >= set(INTENSITY)
    sample, flips = make_sample((8, 12, 12)), Augment(AugmentConfig.only(flip=always("flip", axes=("x",))), KINDS)
    moved = flips(sample, rng_for(0))
    assert np.array_equal(moved["image"], sample["image"][..., ::-1])
    assert np.array_equal(moved["n"][0], -sample["n"][0, ..., ::-1])


@pytest.mark.parametrize("name", NAMES)
def test_apply_is_pure_and_draws_are_plain(name):
    sample, transform = make_sample(), always(name)
    before = {k: v.copy() for k, v in sample.items() if k != "meta"}
    for seed in range(5):
        params = transform.draw(sample["image"].shape, rng_for(seed))
        assert params == transform.draw(sample["image"].shape, rng_for(seed))
        if params is None: continue
        stored = json.loads(json.dumps(params))
        out = transform.apply(sample, params, KINDS)
        assert same(out, transform.apply(sample, stored, KINDS)), "parameters do not survive JSON"
        assert all(np.array_equal(sample[k], v) for k, v in before.items()), "the input was written to"
        assert out["image"].dtype == np.float32 and out["image"].shape == sample["image"].shape
        assert np.isfinite(out["image"]).all() and out["meta"] is sample["meta"]


@pytest.mark.parametrize("name", INTENSITY)
def test_U06_intensity_never_clips_and_touches_the_image_alone(name):
    "Upstream's 2-D library clipped to [0, 1]: half of a z-scored patch became 0"
    sample, transform = make_sample(), always(name)
    for seed in range(5):
        params = transform.draw(sample["image"].shape, rng_for(seed))
        out = transform.apply(sample, params, KINDS)
        assert all(out[k] is sample[k] for k in sample if k != "image")
        shifted = transform.change(sample["image"]*500 + 3000, params)  # other units, same picture
        np.testing.assert_allclose(shifted, out["image"]*500 + 3000, atol=1.0)
        assert np.unique(out["image"]).size > 0.2*np.unique(sample["image"]).size, "values were clipped together"


@pytest.mark.parametrize("name", [n for n in INTENSITY if n not in ("noise", "speckle")])  # noise has no axis
def test_U06_z_is_an_axis_and_not_a_colour(name):
    "A transposed patch under transposed parameters is the transposed result, for transforms that know an axis"
    image = make_sample((12, 12, 12))["image"]
    transform = always(name)
    params = transform.draw(image.shape, rng_for(3))
    swapped = dict(params)
    if "axis" in params: swapped["axis"] = {0: 2, 2: 0, 1: 1}[params["axis"]]
    if "boxes" in params: swapped["boxes"] = [[list(c[::-1]) for c in box] for box in params["boxes"]]
    np.testing.assert_allclose(transform.change(image.transpose(0, 3, 2, 1), swapped).transpose(0, 3, 2, 1),
                               transform.change(image, params), atol=2e-5)


@pytest.mark.parametrize("name", INTENSITY)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e4])
def test_constant_images_stay_constant(name, value):
    image = np.full((1, 6, 7, 8), value, np.float32)
    transform = always(name)
    out = transform.change(image, transform.draw(image.shape, rng_for(1)))
    np.testing.assert_allclose(out, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (1, 5, 1, 1), (3, 4, 6, 8), (1, 2, 2, 2)])
def test_any_shape(shape):
    sample = {"image": rng_for(0).standard_normal(shape).astype(np.float32),
              "n": unit_vectors(rng_for(1).standard_normal((3, *shape[1:])))}
    everything = Augment(AugmentConfig(**{n: {"p": 1} for n in NAMES}), {"n": "normals"})
    out = everything(sample, rng_for(2))
    assert out["image"].shape == shape and out["n"].shape == (3, *shape[1:]) and np.isfinite(out["image"]).all()


def test_B6_any_composition_of_geometric_transforms_keeps_gradient_and_image_together():
    "T(grad f) == grad(T f) through the public entry point: exact moves to 1e-5, deformations to 1 degree on average"
    z, y, x = np.meshgrid(*[np.arange(24.0) - 11.5]*3, indexing="ij")
    f = 0.7*x + 0.4*np.sin(0.2*y + 0.15*z) - 0.3*z
    sample = {"image": f[None].astype(np.float32), "n": unit_vectors(gradient(f))}
    inner = (slice(None), *(slice(6, -6),)*3)
    moves = Augment(AugmentConfig.only(flip=always("flip", axes=("x", "z")), rot90=always("rot90"),
                                       transpose=always("transpose")), {"n": "normals"})
    bends = Augment(AugmentConfig.only(flip=page.Flip(), deform=always("deform", rotate=(30, 30, 30), knots=16)),
                    {"n": "normals"})
    for augment, limit in ((moves, 0.05), (bends, 1.0)):
        for seed in range(6):
            out = augment(sample, rng_for(seed))
            angle = angle_between(out["n"][inner], gradient(out["image"][0].astype(np.float64))[inner])
            assert np.nanmean(angle) < limit and not np.isnan(angle).all()


def test_flips_turns_and_transpositions_reach_all_48_symmetries_and_none_else():
    cube = np.arange(27, dtype=np.float32).reshape(1, 3, 3, 3)
    augment = Augment(AugmentConfig.only(flip=page.Flip(), rot90=page.Rot90(), transpose=page.Transpose(p=0.5)), {})
    seen = {augment({"image": cube}, rng_for(k))["image"].tobytes() for k in range(1200)}
    assert seen == {turn(cube, s).tobytes() for s in symmetries()}


@pytest.mark.parametrize("kind", [page.Rot90, page.Transpose])
def test_planes_with_unequal_edges(kind):
    "Chosen by itself only where edges are equal; refused when named"
    assert {tuple(d["axes"]) for k in range(30) if (d := kind(p=1).draw((1, 8, 16, 16), rng_for(k)))} == {(1, 2)}
    assert kind(p=1).draw((1, 8, 16, 24), rng_for(0)) is None
    with pytest.raises(DataError, match="plane 'zy' has edges of different length in a patch of \\(8, 16, 16\\).*'yx'"):
        kind(p=1, planes=("zy",)).draw((1, 8, 16, 16), rng_for(0))
    assert {tuple(kind(p=1, planes=("zx",)).draw((1, 8, 8, 8), rng_for(k))["axes"]) for k in range(9)} == {(0, 2)}


def test_probabilities_are_kept():
    augment = Augment(None, KINDS)
    counts = {n: 0 for n in NAMES}
    for k in range(1000):
        for name, _ in augment.draw((1, 8, 8, 8), rng_for(k)): counts[name] += 1
    for n in NAMES:
        p = getattr(augment.settings, n).p
        p = 1 - (1 - p)**3 if n == "flip" else p  # per axis
        assert abs(counts[n]/1000 - p) < 4*(p*(1 - p)/1000)**0.5 + 1e-9, n
    assert counts["deform"] == 0


def test_draws_of_one_transform_do_not_depend_on_the_settings_of_others():
    a, b = Augment(None, KINDS), Augment({"noise": {"p": 0}, "flip": {"p": 0}, "gamma": {"p": 1}}, KINDS)
    for k in range(40):
        da, db = (dict(t.draw((1, 8, 8, 8), rng_for(k))) for t in (a, b))
        for n in set(NAMES) - {"noise", "flip", "gamma"}: assert da.get(n) == db.get(n)
        assert "noise" not in db and "gamma" in db


def _digest(seed):
    out = Augment(None, KINDS)(make_sample(), rng_for(0, "item", seed))
    return [float(out[k].astype(np.float64).sum()) for k in ("image", "sheet", "classes", "n")]


def test_same_seed_same_bytes_in_any_process():
    assert pmap(_digest, range(4), workers=2) == [_digest(k) for k in range(4)]


def test_amounts():
    "Mean and deviation of what noise, contrast and dropout add, in the patch's own units"
    image = rng_for(0).standard_normal((1, 40, 40, 40)).astype(np.float32)*7 + 100
    noisy = page.Noise().change(image, {"std": 0.3, "seed": 1})
    assert (noisy - image).std() == pytest.approx(0.3*image.std(), rel=0.02)
    other = page.Contrast().change(image, {"contrast": 1.2, "brightness": 0.5})
    assert other.std() == pytest.approx(1.2*image.std(), rel=1e-4)
    assert other.mean() == pytest.approx(image.mean() + 0.5*image.std(), rel=1e-5)
    hole = page.Dropout().change(image, {"boxes": [[[0, 0, 0], [10, 20, 40]]]})
    assert np.ptp(hole[0, :10, :20]) == 0 and hole[0, 0, 0, 0] == pytest.approx(image.mean(), rel=1e-5)
    np.testing.assert_array_equal(hole[0, 10:], image[0, 10:])
    for invert in (False, True):
        bent = page.Gamma().change(image, {"gamma": 1.7, "invert": invert})
        assert bent.min() == pytest.approx(image.min(), abs=1e-3) and bent.max() == pytest.approx(image.max(), abs=1e-3)
        assert (bent.mean() > image.mean()) == invert
    boxes = [b for k in range(40) for b in page.Dropout(p=1).draw((1, 20, 30, 40), rng_for(k))["boxes"]]
    edges = np.array([np.subtract(stop, start) for start, stop in boxes])/(20, 30, 40)
    assert edges.min() >= 0.08 and edges.max() <= 0.42 and all(np.greater_equal(b[0], 0).all() for b in boxes)


def test_low_resolution_keeps_the_place_of_things():
    "A ramp stays a ramp: sampling and interpolation have the same centre"
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None], (1, 40, 8, 8)).copy()
    low = page.LowRes().change(ramp, {"scale": 0.5})[0, :, 4, 4]
    assert np.abs(low[3:-3] - np.arange(40)[3:-3]).max() <= 0.5 + 1e-5
    np.testing.assert_array_equal(page.LowRes().change(ramp, {"scale": 1.0}), ramp)


@pytest.mark.parametrize("settings, message", [
    ({"flip": {"p": 1.5}}, "less than or equal to 1"), ({"deform": {"elastic": 0.5}}, "less than or equal to 0.403"),
    ({"blur": {"sigma": [2, 1]}}, "lower end first"), ({"blur": {"sigma": [0, 1]}}, "greater than 0"),
    ({"dropout": {"size": [0.4, 0.1]}}, "lower end first"),
    ({"smear": {"strength": [0.5, 2]}}, "less than or equal to 1"),
    ({"bluur": {}}, "bluur"), ({"rot90": {"planes": ["xy"]}}, "'zy', 'zx' or 'yx'"),
    ({"noise": {"std": [0, float("inf")]}}, "finite")])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message): Augment(settings, KINDS)
    with pytest.raises(ConfigError): check_config(AugmentConfig, settings)


def test_settings_round_trip_as_plain_values():
    cfg = AugmentConfig.only(deform=page.Deform(p=0.2), rot90=page.Rot90(planes=("yx",)))
    assert AugmentConfig(**json.loads(cfg.model_dump_json())) == cfg
    assert Augment(cfg.model_dump(), KINDS).settings == cfg
    assert [n for n in NAMES if getattr(cfg, n).p > 0] == ["rot90", "deform"]
