"""Seam ratio, self-consistency, border error: known answers, and what blending is measured by."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvol_nb import phantoms
from medvol_nb.core import DataError, rng_for
from medvol_nb.grid import Grid
from medvol_nb.zarrnet.config import InferenceParams, Target
from medvol_nb.zarrnet.infer import predict_array
from medvol_nb.zarrnet.seams import border_error, border_planes, seam_ratio, self_consistency

TARGET = {"sheet": Target(channels=1, activation="sigmoid")}


@given(st.integers(1, 40), st.integers(1, 15), st.floats(0, 0.8))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_border_planes_are_starts_and_ends_inside(size, patch, overlap):
    grid = Grid((size,), patch, overlap)
    (planes,) = border_planes(grid)
    labels = np.zeros((len(grid), size), int)
    for k, start in enumerate(grid):
        labels[(k, *grid.slices(start)[0])] = 1
    changes = np.flatnonzero(np.abs(np.diff(labels, axis=1)).any(axis=0)) + 1
    assert planes.tolist() == changes.tolist()


def test_seam_ratio_of_known_fields():
    grid = Grid((24, 12, 12), (6, 12, 12), 0)
    z = np.arange(24.0)[:, None, None] * np.ones((24, 12, 12))
    assert seam_ratio(z, grid)[0] == (1, 1, 3)
    steps = z + 3 * (np.arange(24) // 6)[:, None, None]
    assert seam_ratio(steps, grid)[0].ratio == pytest.approx(4)
    assert seam_ratio(steps, grid, steps)[0].relative == pytest.approx(1)
    assert np.isinf(seam_ratio(steps - z, grid)[0].ratio) and np.isnan(seam_ratio(z, grid)[1].ratio)


def test_seam_ratio_of_noise_is_one_and_channels_are_averaged():
    grid = Grid((64, 64, 64), 8, 0)
    noise = rng_for(0, "seams").random((2, 64, 64, 64))
    for r in seam_ratio(noise, grid):
        assert r.planes == 7 and abs(r.ratio - 1) < 0.02
    one, two = (seam_ratio(noise[k], grid)[2].ratio for k in (0, 1))
    assert min(one, two) <= seam_ratio(noise, grid)[2].ratio <= max(one, two)


def test_integers_do_not_wrap():
    grid = Grid((12, 4, 4), (6, 4, 4), 0)
    falling = np.broadcast_to(np.arange(12, 0, -1, dtype=np.uint8)[:, None, None] * 20, (12, 4, 4))
    assert seam_ratio(falling, grid)[0].ratio == 1
    assert border_error(np.uint8([[[3]]]), np.uint8([[[5]]]), (1, 1, 1)).interior == 2


def test_border_error_shell():
    error = np.zeros((3, 16, 20, 24))
    inside = (slice(None), slice(2, 14), slice(4, 16), slice(6, 18))
    error += 2
    error[inside] = 1
    assert border_error(error, error * 0, (8, 16, 24)) == (2, 1)
    valid = np.zeros((16, 20, 24), bool)
    valid[8, 10, 12] = True
    assert np.isnan(border_error(error, error * 0, (8, 16, 24), valid).border)


def test_shapes_are_checked():
    with pytest.raises(DataError, match="truth must end in the grid's"):
        seam_ratio(np.zeros((8, 8, 8)), Grid((8, 8, 8), 4), np.zeros((8, 8, 7)))
    with pytest.raises(DataError, match="differ in shape"):
        border_error(np.zeros((8, 8, 8)), np.zeros((8, 8, 7)), (4, 4, 4))


class Padded:
    "A stack of zero-padded means: right in the middle of a patch, wrong at its border, as a network is"

    def predict(self, x):
        for _ in range(4):
            x = torch.nn.functional.avg_pool3d(x, 3, 1, 1)
        return {"sheet": x}


def params(**keys):
    return InferenceParams(**{"patch_size": (16, 16, 16), "skip_empty": False, "batch_size": 4} | keys)


@pytest.fixture(scope="module")
def sheets():
    return phantoms.sheets((24, 80, 80)).img.astype(np.float32) / 255


def test_consistency_is_zero_for_a_model_without_borders(sheets):
    class Point:
        def predict(self, x):
            return {"sheet": x**2}

    assert self_consistency(Point(), sheets, TARGET, params(overlap=0.25))["sheet"] < 1e-6
    assert self_consistency(Padded(), sheets, TARGET, params(overlap=0.75))["sheet"] == 0


def test_gaussian_beats_constant_in_both_numbers(sheets):
    "The order that was measured on trained networks, here on a model whose error at the border is known"
    truth = predict_array(Padded(), sheets, TARGET, params(patch_size=sheets.shape))["sheet"]
    rows = {}
    for blend, overlap in (("gaussian", 0.5), ("constant", 0.5), ("gaussian", 0.25), ("constant", 0.25)):
        way = params(blend=blend, overlap=overlap)
        out = predict_array(Padded(), sheets, TARGET, way)["sheet"]
        ratio = seam_ratio(out, Grid(sheets.shape, 16, overlap), truth)[2]
        rows[blend, overlap] = ratio.relative, self_consistency(Padded(), sheets, TARGET, way)["sheet"], ratio.planes
    for overlap in (0.5, 0.25):
        for k in (0, 1):
            assert rows["gaussian", overlap][k] < rows["constant", overlap][k]
    assert rows["gaussian", 0.5][0] <= 1.08 and rows["gaussian", 0.5][2] >= 6
