"""Stored labels to targets: values, validity, dilation, and patches that equal crops of the whole."""
import logging
import math

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from medvol_nb.core import DataError, rng_for
from medvol_nb.zarrnet.config import Target, TrainParams
from medvol_nb.zarrnet.decode import LabelRule, decode_label, dilate, label_mask, label_rule, target_patch, within
from medvol_nb.zarrnet.geometry import encode_normals, unit_vectors
from medvol_nb.zarrnet.io import open_volume

NONE = TrainParams(dilate_label=False)


def target(name="sheet", tr=NONE, **settings):
    return Target(**{"channels": 1} | settings).resolved(name, tr)


def decode(raw, sample=None, **settings):
    raw = np.asarray(raw)
    raw = raw.reshape(1, 1, 1, -1) if raw.ndim == 1 else raw
    return decode_label(raw, label_rule("t", target(**settings), raw.dtype, raw if sample is None else sample))


# --------------------------------------------------------------------------------------------------------- values

@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint16", "uint32", "float32", "float64"])
def test_U05_masks_of_zero_and_one_stay_zero_and_one(dtype):
    "Upstream divided uint8 by 255: the target was 0.0039"
    value, valid = decode(np.array([0, 1, 1, 0]).astype(dtype))
    assert value.ravel().tolist() == [0, 1, 1, 0] and valid.all() and value.dtype == np.float32


@pytest.mark.parametrize("raw, scale, expected", [
    (np.array([0, 255], np.uint8), "auto", [0, 1]), (np.array([0, 51, 255], np.uint8), "probability", [0, 0.2, 1]),
    (np.array([0, 65535], np.uint16), "probability", [0, 1]),
    (np.array([0, 0.25], np.float32), "probability", [0, 0.25]),
    (np.array([0, 50, 200], np.uint8), 0.01, [0, 0.5, 1]), (np.array([False, True]), "probability", [0, 1])])
def test_binary_scales(raw, scale, expected):
    np.testing.assert_allclose(decode(raw, label_scale=scale)[0].ravel(), expected, atol=1e-6)


def test_regression_is_as_stored_unless_a_factor_is_given():
    raw = np.array([-3, 0, 700], np.int16)
    assert decode(raw, kind="regression")[0].ravel().tolist() == [-3, 0, 700]
    np.testing.assert_allclose(decode(raw, kind="regression", label_scale=0.1)[0].ravel(), [-0.3, 0, 70], rtol=1e-6)


def test_classes_are_integers_below_channels():
    settings = {"channels": 4, "activation": "softmax"}
    value, _ = decode(np.array([0, 3, 1], np.uint16), **settings)
    assert value.dtype == np.int64 and value.shape == (1, 1, 1, 3) and value.ravel().tolist() == [0, 3, 1]
    assert decode(np.array([0.0, 3.0]), **settings)[0].ravel().tolist() == [0, 3]
    for raw, message in (([0, 4], "class 4, but channels is 4"), ([-1, 2], "class -1"), ([0.5, 1], "whole numbers")):
        with pytest.raises(DataError, match=message): decode(np.array(raw), **settings)
    with pytest.raises(DataError, match="class 255"):  # not in the sample, so it is found when it is read
        decode(np.array([0, 255], np.uint8), sample=np.zeros(1, np.uint8), **settings)


def test_U13_what_a_target_is_follows_from_its_kind_not_from_its_name():
    n = unit_vectors(rng_for(0).standard_normal((3, 2, 3, 4)))
    raw = encode_normals(n, "uint16")
    a, _ = decode(raw, channels=3, kind="normals", name="whatever")
    np.testing.assert_allclose(a, n, atol=1e-4)
    b, _ = decode(raw, channels=3, kind="regression", name="normals")
    np.testing.assert_array_equal(b, raw.astype(np.float32))


@pytest.mark.parametrize("raw, settings, message", [
    (np.full((3, 1, 1, 2), 200, np.uint16), {"channels": 3, "kind": "normals"}, "look like normals in uint8"),
    (np.full((3, 1, 1, 2), 127.0), {"channels": 3, "kind": "normals"}, "must lie in -1...1, got 127"),
    (np.array([0, 255.0]), {"label_scale": "probability"}, "probabilities lie in 0...1, got 255"),
    (np.array([0, np.inf]), {}, "NaN or infinite"), (np.array([0, np.nan]), {"ignore_label": 3}, "ignore_label: nan"),
    (np.array([0, 1j]), {}, "must be numbers"), (np.array([0, 1]), {"channels": 2, "activation": "softmax",
                                                                 "label_scale": 0.5}, "does not apply to multiclass"),
    (np.zeros((2, 1, 1, 4), np.uint8), {}, "need 1 channels")])
def test_labels_that_cannot_be_meant_are_refused(raw, settings, message):
    with pytest.raises(DataError, match=message): decode(raw, **settings)


def test_suspicion_and_decision_are_logged(caplog):
    with caplog.at_level(logging.INFO, "medvol_nb"):
        label_rule("volume 'a', target 'sheet'", target(), np.uint8, np.arange(200, dtype=np.uint8))
    assert "holds more than two values" in caplog.text and "label_scale: probability" in caplog.text
    assert "more than 0 is 1 (largest value of a sample: 199)" in caplog.text
    caplog.clear()
    label_rule("x", target(), np.uint8, np.array([0, 255], np.uint8))
    assert "two values" not in caplog.text


# ------------------------------------------------------------------------------------------------------- validity

@pytest.mark.parametrize("ignore, raw", [(255, np.array([0, 1, 255], np.uint8)), (-1, np.array([0, 1, -1], np.int16)),
                                         (math.nan, np.array([0, 1, np.nan], np.float32)),
                                         (0.5, np.array([0, 1, 0.5], np.float64))])
def test_U01_ignore_label_is_used_and_taken_before_anything_else(ignore, raw):
    "Upstream reads the key and never uses it; here the mask comes from the raw value, and the value is gone"
    for kind in ("binary", "regression"):
        value, valid = decode(raw, ignore_label=ignore, kind=kind)
        assert valid.ravel().tolist() == [True, True, False] and value.ravel().tolist() == [0, 1, 0]
    assert decode(raw, tr=TrainParams(ignore_label=ignore, dilate_label=False))[1].sum() == 2, "inherited"


def test_ignored_channels():
    raw = np.array([[255, 255, 0], [255, 0, 0], [255, 9, 0]], np.uint8).reshape(3, 1, 1, 3)
    assert label_mask(raw, target(channels=3, kind="normals", ignore_label=255)).ravel().tolist() == [False, True, True]
    assert label_mask(raw, target(channels=3, kind="regression", ignore_label=255)).ravel().tolist() == \
        [False, False, True]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_B7_background_normals_are_zero_with_mask_zero(dtype):
    n = unit_vectors(rng_for(1).standard_normal((3, 6, 6, 6)))
    n[:, :3] = 0
    rule = label_rule("n", target(channels=3, kind="normals"), dtype)
    value, mask = target_patch(open_volume(encode_normals(n, dtype), channels=3), rule, (0, 0, 0), (6, 6, 6))
    assert not value[:, :3].any() and not mask[:, :3].any() and mask[:, 3:].all() and mask.dtype == np.uint8


# ------------------------------------------------------------------------------------------------------- distance

@pytest.mark.parametrize("shape", [(9, 14, 11), (1, 20, 20), (3, 1, 40)])
@pytest.mark.parametrize("radius", [0, 0.5, 1, 2**0.5, 2, 3**0.5, 4.2, 5, 16, 200])
def test_within_equals_the_distance_transform(shape, radius):
    for density in (0.002, 0.05, 0.6):
        mask = rng_for(0, density).random(shape) < density
        expected = distance_transform_edt(~mask) <= radius + 1e-9 if mask.any() else mask
        np.testing.assert_array_equal(within(mask, radius), expected)


def test_within_equals_a_ball_in_the_interior():
    "radius 5 is the reference's ball(5)"
    point = np.zeros((13, 13, 13), bool)
    point[6, 6, 6] = True
    z, y, x = np.ogrid[-6:7, -6:7, -6:7]
    np.testing.assert_array_equal(within(point, 5), z*z + y*y + x*x <= 25)


@pytest.mark.parametrize("channels", [1, 3])
def test_dilation_takes_the_nearest_label_and_overwrites_nothing(channels):
    rng = rng_for(2, channels)
    label = np.zeros((channels, 12, 16, 14), np.int64)
    at = rng.random((12, 16, 14)) < 0.02
    label[:, at] = rng.integers(1, 9, (channels, at.sum()))
    valid = rng.random((1, 12, 16, 14)) < 0.9
    out, radius = dilate(label, 3.5, valid), 3.5
    distance = distance_transform_edt(~at)
    np.testing.assert_array_equal(out[:, at], label[:, at])
    assert not out[:, (distance > radius) | (~valid[0] & ~at)].any()
    places = np.argwhere(at)
    for k in np.argwhere((distance <= radius) & (distance > 0) & valid[0]):
        d = ((places - k)**2).sum(1)
        candidates = [tuple(label[:, *places[j]]) for j in np.flatnonzero(d == d.min())]
        assert tuple(out[:, *k]) in candidates
    assert dilate(label, 0) is label and not dilate(np.zeros_like(label), 5).any()


RULES = {"binary": {"dilate_label": 3.3}, "soft": {"label_scale": "probability", "dilate_label": 4},
         "ignored": {"ignore_label": 200, "dilate_label": 2, "loss_only_on_label": True, "label_region_radius": 6.5},
         "multiclass": {"channels": 9, "activation": "softmax", "dilate_label": 5, "ignore_label": 200},
         "normals": {"channels": 3, "kind": "normals", "dilate_label": 2.5},
         "regression": {"kind": "regression", "dilate_label": 1.5, "loss_only_on_label": True}}


@pytest.mark.parametrize("name", RULES)
def test_B11_dilation_with_halo_equals_whole_volume_dilation(name):
    "Values and masks of patches anywhere, also across the border, are crops of the whole volume's"
    rng, shape = rng_for(0, "whole", name), (20, 26, 24)
    raw = np.where(rng.random(shape) < 0.01, rng.integers(1, 9, shape), 0).astype(np.uint8)
    if name in ("ignored", "multiclass"): raw[rng.random(shape) < 0.05] = 200
    if name == "normals": raw = encode_normals(unit_vectors(rng.standard_normal((3, *shape)))*(raw > 0))
    t = target(**RULES[name])
    rule, volume = label_rule(name, t, raw.dtype), open_volume(raw)
    whole, mask = target_patch(volume, rule, (0, 0, 0), shape)
    stored = (raw.reshape(-1, *shape) != 0).any(0) & (raw != 200).reshape(-1, *shape).any(0)
    assert 0 < mask.sum() and (whole != 0).any(0).sum() > 2*stored.sum()
    for _ in range(12):
        start, size = rng.integers(-4, 20, 3), rng.integers(3, 12, 3)
        value, ok = target_patch(volume, rule, start, size)
        padded = [np.pad(a, [(0, 0)] + [(16, 16)]*3) for a in (whole, mask)]
        box = (slice(None), *(slice(16 + s, 16 + s + n) for s, n in zip(start, size)))
        inside = np.pad(np.ones((1, *shape), bool), [(0, 0)] + [(16, 16)]*3)[box]
        np.testing.assert_array_equal(ok, padded[1][box])
        np.testing.assert_array_equal(value*inside, padded[0][box])


def test_U01_dilate_label_and_loss_only_on_label_are_used():
    "Both were read and then ignored, or used for one name only"
    raw = np.zeros((21, 21, 21), np.uint8)
    raw[10, 10, 10] = 1
    volume, size = open_volume(raw), (21, 21, 21)
    rule = label_rule("ink", target("ink", TrainParams(dilate_label=True)), np.uint8)
    grown, _ = target_patch(volume, rule, (0, 0, 0), size)
    assert grown.sum() == within(raw > 0, 5).sum() == 515
    only = target("ink", TrainParams(loss_only_on_label=True, dilate_label=False), label_region_radius=4)
    value, mask = target_patch(volume, label_rule("ink", only, np.uint8), (0,)*3, size)
    assert value.sum() == 1 and mask.sum() == within(raw > 0, 4).sum()
    depth = target("depth", TrainParams(loss_only_on_label=True, dilate_label=False), kind="regression")
    assert target_patch(volume, label_rule("depth", depth, np.uint8), (0,)*3, size)[1].sum() == 1
    free = target("depth", kind="regression")
    assert target_patch(volume, label_rule("depth", free, np.uint8), (0,)*3, size)[1].all()


def test_halo_is_what_is_needed():
    assert LabelRule("x", target()).halo == 0 and LabelRule("x", target(dilate_label=2.2)).halo == 3
    assert LabelRule("x", target(dilate_label=2, loss_only_on_label=True)).halo == 16
    assert LabelRule("x", target(kind="regression", loss_only_on_label=True)).halo == 0


def test_a_patch_outside_the_volume_is_empty():
    rule = label_rule("x", target(dilate_label=2), np.uint8)
    value, mask = target_patch(open_volume(np.ones((5, 5, 5), np.uint8)), rule, (40, 0, 0), (4, 4, 4))
    assert value.shape == (1, 4, 4, 4) and not value.any() and not mask.any()
    value, mask = target_patch(open_volume(np.ones((5, 5, 5), np.uint8)), rule, (3, -2, 1), (4, 4, 4))
    assert mask.sum() == 2*2*4 and mask[0, :2, 2:].all()
