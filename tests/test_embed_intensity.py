"Random contrast: laws of the curves, repeatability, and the two defects of the reference"
import numpy as np
import pytest
from scipy import ndimage

from medvol_nb.config import check_config
from medvol_nb.core import ConfigError, rng_for
from medvol_nb.embed.intensity import (
    AUGMENTS,
    Augment,
    add_noise,
    augment,
    bias_field,
    blur,
    crop_planes,
    elastic,
    from_unit,
    gamma,
    histogram_shift,
    histogram_shift_regions,
    shift_curve,
    to_unit,
)


@pytest.fixture(scope="module")
def img():
    out = ndimage.gaussian_filter(rng_for(0, "img").normal(0, 1, (18, 30, 26)), 2)
    return (to_range(out)*200 - 40).astype(np.float32)


def to_range(a): return (a - a.min())/np.ptp(a)


FUNCTIONS = {
    "noise": lambda a, r: add_noise(a, r), "blur": lambda a, r: blur(a, r, 2.0),
    "shift": lambda a, r: histogram_shift(to_unit(a), r), "gamma": lambda a, r: gamma(to_unit(a), r),
    "bias": lambda a, r: bias_field(to_unit(a), r), "elastic": lambda a, r: elastic(a, r)[0],
    "regions": lambda a, r: histogram_shift_regions(to_unit(a), (a > 60).astype(np.uint8) + 1, r)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_generator_same_bytes_and_the_input_stays(img, name):
    before = img.copy()
    one, two = (FUNCTIONS[name](img, rng_for(3, name)) for _ in range(2))
    assert np.array_equal(one, two) and one.dtype == np.float32 and np.array_equal(img, before)
    assert not np.array_equal(one, FUNCTIONS[name](img, rng_for(4, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_memory_layouts_change_nothing(img, name):
    strange = np.asfortranarray(img)[::1]
    assert np.array_equal(FUNCTIONS[name](strange, rng_for(5)), FUNCTIONS[name](img, rng_for(5)))


def test_curves_are_monotone_end_at_the_ends_and_have_5_to_15_points():
    counts = set()
    for k in range(400):
        x, y = shift_curve(rng_for(k))
        counts.add(len(x))
        assert (np.diff(y) >= 0).all() and (x[0], x[-1], y[0], y[-1]) == (0, 1, 0, 1)
    assert counts == set(range(5, 16))


def test_shift_inverts_and_stretches_as_often_as_it_should(img):
    unit = to_unit(img)
    inverted = [np.corrcoef(histogram_shift(unit, rng_for(k), p=1).ravel(), unit.ravel())[0, 1] < 0 for k in range(200)]
    assert 0.22 < np.mean(inverted) < 0.38
    same = [np.array_equal(histogram_shift(unit, rng_for(k)), unit) for k in range(300)]
    assert 0.05 < np.mean(same) < 0.16


def test_shift_keeps_the_order_of_tissues_without_inversion(img):
    unit, order = to_unit(img).ravel(), np.argsort(to_unit(img).ravel())
    for k in range(20):
        out = histogram_shift(unit, rng_for(k), p=1, p_invert=0)
        assert (np.diff(out[order]) >= -1e-6).all() and out.min() >= -1e-6 and out.max() <= 1 + 1e-6


def test_D17_the_noise_changes_something(img):
    "The reference's standard deviation of at most 0.001 on 255 steps does nothing"
    changed = [np.std(augment(img, rng_for(k), AUGMENTS["plain"]) - img) for k in range(20)]
    assert np.mean(changed) > 1
    assert max(np.std(add_noise(img, rng_for(k), (0, 0.001)) - img) for k in range(20)) < 0.0011


def test_D18_the_middle_of_a_curve_moves_and_its_ends_rest():
    "The reference perturbs the first points of the list, which are the ones that should be fixed"
    for k in range(100):
        low, high = rng_for(k, "window").uniform((0.1, 0.6), (0.5, 0.8))
        x, y = shift_curve(rng_for(k), window=(low, high))
        outside, inside = (x <= low) | (x >= high), (x > low) & (x < high)
        assert outside.sum() == 12 and 3 <= inside.sum() <= 13
        assert np.array_equal(x[outside], y[outside]) and (x[inside] != y[inside]).all()


def test_regions_change_by_themselves(img):
    unit = to_unit(img)
    regions = np.zeros(img.shape, int)
    regions[:, :10], regions[:, 20:] = 3, 7
    out = histogram_shift_regions(unit, regions, rng_for(1), "mr", p=1)
    assert np.array_equal(out[:, 10:20], unit[:, 10:20])
    assert not np.array_equal(out[:, :10], unit[:, :10]) and not np.array_equal(out[:, 20:], unit[:, 20:])


def test_elastic_keeps_the_border_and_moves_labels_along(img):
    lbl = (img > 60).astype(np.uint8)
    out, moved = elastic(img, rng_for(2), lbl, largest=3)
    for a, b in ((out, img), (moved, lbl)):
        assert np.allclose(a[0], b[0], atol=1e-3) and np.allclose(a[:, :, -1], b[:, :, -1], atol=1e-3)
    assert ((out > 60) == moved).mean() > 0.95 and moved.dtype == lbl.dtype


def test_a_slab_keeps_its_place(img):
    for k in range(30):
        slab, first = crop_planes(img, rng_for(k), (4, 8))
        assert 4 <= len(slab) < 8 and np.array_equal(slab, img[first : first + len(slab)])
    assert len(crop_planes(img, rng_for(0))[0]) == len(img)


def test_units_are_inverse(img): assert np.allclose(from_unit(to_unit(img)), img, atol=1e-4)


@pytest.mark.parametrize("name", AUGMENTS)
def test_presets(img, name):
    out = augment(img, rng_for(9), AUGMENTS[name], spacing=(2, 2, 2.4))
    assert out.shape == img.shape and out.dtype == np.float32 and np.isfinite(out).all()
    assert np.array_equal(out, img) == (name == "none")


def test_settings_are_checked():
    assert check_config(Augment, {"histogram_shift": 0.5}).histogram_shift == 0.5
    with pytest.raises(ConfigError, match="histogram_shift"): check_config(Augment, {"histogram_shift": 2})
    with pytest.raises(ConfigError, match="did you mean 'noise'"): check_config(Augment, {"noyse": [0, 1]})
