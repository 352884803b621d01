"""Stable points: a fifth of the voxels corrupted, and every case that cannot be fitted has a name."""

import numpy as np
import pytest
import torch

from medvol_nb.core import DataError, rng_for
from medvol_nb.embed.cycle import fixed_points, robust_affine
from medvol_nb.embed.match import Matcher
from medvol_nb.embed.search import make_side
from medvol_nb.embed.store import position_embedding
from medvol_nb.geometry import Volume, affine_from

torch.set_num_threads(1)
SCAN = Volume(np.broadcast_to(np.uint8(0), (60, 50, 45)), affine_from((3.0, 3.0, 4.0), (-40, 10, 200)))


def there(p):
    return (p - 90) * [1.08, 0.95, 1.0] + [100, 95, 86]


def back(p):
    return (p - [100, 95, 86]) / [1.08, 0.95, 1.0] + 90


@pytest.fixture(scope="module")
def pair():
    return position_embedding(SCAN, c=64), position_embedding(SCAN, back, c=64)


def corrupted(emb, share, seed=0):
    "Embedding whose vectors are those of other voxels at a share of the voxels"
    rng = rng_for(seed, "wrong")
    wrong = rng.random(emb.fine.shape) < share
    maps = {h: m.copy() for h, m in emb.maps.items()}
    maps["fine"][:, wrong] = maps["fine"][:, wrong][:, rng.permutation(wrong.sum())]
    return type(emb)(maps, emb.grid, emb.native, emb.model)


@pytest.mark.parametrize("seed", [0, 1])
def test_A7_a_fifth_of_the_matches_corrupted(pair, seed):
    "Every point within 2 mm, where single nearest neighbours are up to tens of millimetres off"
    a, b = corrupted(pair[0], 0.2, seed), pair[1]
    nodes = rng_for(seed, "n").integers(8, np.array(a.fine.shape) - 8, (25, 3))
    pts = a.fine.to_world(nodes)
    m = Matcher(a, b, heads=("fine",)).match(pts, "fixed_point")
    plain = Matcher(a, b, heads=("fine",)).match(pts, "nn", between=False)
    inner = (np.abs(b.fine.to_index(there(pts)) / (np.array(b.fine.shape) - 1) - 0.5) < 0.45).all(1)
    error = np.linalg.norm(m.matched - there(pts), axis=1)[inner]
    assert inner.sum() > 12 and error.max() < 2
    assert np.linalg.norm(plain.matched - there(pts), axis=1)[inner].max() > 20
    assert (m.status[inner] == "ok").all() and (m.residual[inner] >= 0).all()


@pytest.mark.parametrize("cube", [1, 2])
def test_more_points_around_do_not_hurt(pair, cube):
    sides = [make_side(e, ("fine", "coarse"), torch.device("cpu")) for e in pair]
    pts = pair[0].fine.to_world(rng_for(0, "n").uniform(0.35, 0.65, (6, 3)) * pair[0].fine.shape)
    found = fixed_points(*sides, pts, cube=cube)
    assert np.linalg.norm(found.matched - there(pts), axis=1).max() < 1 and found.used.max() <= (2 * cube + 1) ** 3


@pytest.mark.parametrize("name", ["none within reach", "none above the score", "one", "plane", "line", "edge", "noise"])
def test_A7_degenerate_cases_have_a_status(pair, name):
    "A finite place, a finite score and a name, always"
    a, b = pair
    options, pts = {}, a.fine.to_world(np.array([[20.3, 20, 20], [30, 25.3, 22]]))
    if name == "none within reach":
        options["reach_mm"] = 1e-6
    elif name == "none above the score":
        options["min_score"] = 0.99999
        b = corrupted(b, 1.0)
    elif name == "one":
        options["cube"] = 0
    elif name == "edge":
        pts = a.fine.to_world(np.array([[0, 0, 0], np.array(a.fine.shape) - 1]))
    elif name == "noise":
        b = corrupted(b, 1.0)
    else:
        flat = Volume(np.broadcast_to(np.uint8(0), (60, 1 if name == "line" else 50, 1)), affine_from((3.0, 3.0, 3.0)))
        a, b = position_embedding(flat, c=64), position_embedding(flat, lambda p: p - [6, 0, 0], c=64)
        pts = a.fine.to_world((np.array(a.fine.shape)[None] - 1) / 2)
    m = Matcher(a, b).match(pts, "fixed_point", **options)
    assert np.isfinite(m.matched).all() and np.isfinite(m.score).all() and np.isfinite(m.residual).all()
    known = {"ok", "translation", "nn_fallback", "flat", "outside", "low_score"}
    assert set(m.status) <= known
    if name.startswith("none"):
        assert set(m.status) <= {"nn_fallback", "flat", "low_score"} and (m.residual == -1).all()
    if name in ("one", "plane", "line"):
        assert set(m.status) == {"translation"}
        if name != "one":
            np.testing.assert_allclose(m.matched - pts, np.tile([6.0, 0, 0], (len(pts), 1)), atol=1.0)


def test_reference_pairs_keep_chains_that_still_move(pair):
    a, b = corrupted(pair[0], 0.3), pair[1]
    sides = [make_side(e, ("fine",), torch.device("cpu")) for e in (a, b)]
    pts = a.fine.to_world(rng_for(0, "n").uniform(0.35, 0.65, (6, 3)) * a.fine.shape)
    stable, every = (fixed_points(*sides, pts, pairs=p).used for p in ("stable", "all"))
    assert (every >= stable).all()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_robust_affine_ignores_wrong_pairs(share):
    rng = rng_for(0, "pairs")
    q = rng.uniform(-20, 20, (80, 3))
    k = q @ np.diag([1.1, 0.9, 1.0]) + [30, 0, -9] + rng.normal(0, 0.3, q.shape)
    bad = rng.random(80) < share
    k[bad] += rng.normal(0, 80, (bad.sum(), 3))
    a, b, w, condition = robust_affine(q, k)
    assert np.linalg.norm(b - [30, 0, -9]) < 0.5 and np.abs(a - np.diag([1.1, 0.9, 1.0])).max() < 0.03
    assert condition < 2 and w[bad].max(initial=0) < 0.5


def test_wrong_options(pair):
    with pytest.raises(DataError, match="cube"):
        Matcher(*pair).match([[0, 0, 0]], "fixed_point", cube=9)
    with pytest.raises(DataError, match="reach_mm"):
        Matcher(*pair).match([[0, 0, 0]], "fixed_point", reach_mm=0)
    with pytest.raises(DataError, match="pairs: must be stable or all"):
        fixed_points(None, None, np.zeros((1, 3)), pairs="every")
