"""Matching: the literal answer, much faster; millimetres through any grid; scores on one scale."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.reference import embed_match as reference
from medvol_nb.core import DataError, rng_for
from medvol_nb.embed import match as page
from medvol_nb.embed.data import NetGrid, net_grid
from medvol_nb.embed.match import Calibration, Matcher, calibrate
from medvol_nb.embed.search import make_query, make_side, search, search_pruned
from medvol_nb.embed.store import STRIDES, Embedding, open_embedding, position_embedding, write_embedding
from medvol_nb.geometry import Volume, affine_from

torch.set_num_threads(1)
CPU = torch.device("cpu")


def header(shape, spacing, origin=(0, 0, 0), turn=0.0):
    affine = affine_from(spacing, origin)
    c, s = np.cos(turn), np.sin(turn)
    matrix = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return Volume(np.broadcast_to(np.uint8(0), shape), matrix @ affine)


def random_pair(shape=(43, 37, 29), spacing=(2.3, 1.9, 3.1), c=16, heads=("fine", "coarse")):
    "Random unit vectors, of which those of the second resemble the first"
    vol, out, first = header(shape, spacing), [], {}
    grid = net_grid(vol)
    native = NetGrid(shape[::-1], affine_from(spacing[::-1], axes="zyx"))
    for seed in (0, 1):
        maps = {}
        for h in heads:
            x = rng_for(seed, h).standard_normal((c, *grid.feature(STRIDES[h]).shape)).astype(np.float32)
            x = x / np.linalg.norm(x, axis=0) + first.get(h, 0)
            maps[h] = x / np.linalg.norm(x, axis=0)
        first = first or maps
        out.append(Embedding(maps, grid, native, "random", stretch=True))
    return out


def test_A5_the_literal_answer(tmp_path):
    "1000 points: scores within 1e-5, the same voxel of the scan for at least 99.9 % of them"
    a, b = random_pair()
    nodes = rng_for(2, "n").integers(0, a.fine.shape, (1000, 3))
    m = Matcher(a, b).match(a.fine.to_world(nodes), "nn", refine="native", between=False)
    maps = [{h: torch.from_numpy(v) for h, v in e.maps.items()} for e in (a, b)]
    wanted = [reference.transfer(*maps, tuple(n), b.native.shape) for n in nodes.tolist()]
    found = np.rint(b.native.to_index(m.matched)).astype(int)
    assert np.abs(m.score - [w for _, w in wanted]).max() < 1e-5
    assert np.mean([tuple(f) == w for f, (w, _) in zip(found.tolist(), wanted)]) >= 0.999


@pytest.mark.parametrize("turn, spacing", [(0.0, (2.0, 2.0, 2.0)), (0.0, (0.9, 0.9, 5.0)), (0.25, (1.2, 1.7, 3.0))])
@pytest.mark.parametrize("flip", [False, True])
def test_A6_known_affine_through_all_grids(turn, spacing, flip):
    "Vectors of position: less than half a network voxel, for anisotropic voxels, oblique axes and flips"
    from medvol_nb.geometry import reorient

    extent = np.array([170.0, 150.0, 140.0])
    shape = tuple(np.ceil(extent / spacing).astype(int))
    a = header(shape, spacing, (-60, 20, 300), turn)
    b = header(tuple(np.ceil(extent / 2.5).astype(int)), (2.5, 2.5, 2.5), (-40, 40, 330))
    if flip:
        a, b = reorient(a, "LAS"), reorient(b, "SRP")
    centre = np.array([20.0, 90.0, 370.0])
    t = np.deg2rad(8)
    matrix = 1.06 * np.array([[np.cos(t), 0, np.sin(t)], [0, 1, 0], [-np.sin(t), 0, np.cos(t)]])

    def there(p):
        return (p - centre) @ matrix.T + centre + [6, -4, 9]

    def back(p):
        return (p - centre - [6, -4, 9]) @ np.linalg.inv(matrix).T + centre

    ea, eb = position_embedding(a, c=96), position_embedding(b, back, c=96)
    pts = ea.fine.to_world(rng_for(0, "p").uniform(0.15, 0.85, (60, 3)) * (np.array(ea.fine.shape) - 1))
    pts = pts[eb.fine.contains(there(pts) * 1.0)]
    inner = np.abs(eb.fine.to_index(there(pts)) / (np.array(eb.fine.shape) - 1) - 0.5).max(1) < 0.45
    m = Matcher(ea, eb).match(pts[inner])
    assert inner.sum() > 20 and np.linalg.norm(m.matched - there(pts[inner]), axis=1).max() < 1.0
    assert m.ok.all()


def test_D02_scores_are_means_of_cosines():
    "One scale: a vector matched with itself scores 1, with any heads, and a threshold of 0.75 keeps it"
    emb = random_pair(heads=("fine", "coarse", "semantic"))[0]
    pts = emb.fine.to_world(rng_for(0, "n").integers(3, np.array(emb.fine.shape) - 3, (20, 3)))
    for heads in (("fine",), ("fine", "coarse"), ("fine", "semantic"), ("fine", "coarse", "semantic")):
        m = Matcher(emb, emb, heads=heads).match(pts, min_score=0.75, refine="voxel")
        np.testing.assert_allclose(m.score, 1, atol=1e-5)
        assert m.ok.all() and m.cycle_mm.max() < 1
    a, b = random_pair()
    m = Matcher(a, b).match(pts, min_score=0.999)
    assert np.abs(m.score).max() <= 1 and (m.status == "low_score").any()


def test_D23_points_have_one_order_of_axes():
    "A volume with three different sizes: x is x, on the way in and on the way out"
    a = position_embedding(header((90, 60, 40), (2.0, 2.0, 2.0)), c=64)
    b = position_embedding(header((90, 60, 40), (2.0, 2.0, 2.0)), lambda p: p - [24, 0, 0], c=64)
    p = np.array([[50.0, 60.0, 40.0]])
    np.testing.assert_allclose(Matcher(a, b).match(p).matched, p + [24, 0, 0], atol=0.7)


def test_D25_nothing_is_interpolated_for_each_point(monkeypatch):
    "The norm map is made once a scan, and no table has more elements than a tile times the batch"
    a, b = random_pair()
    matcher = Matcher(a, b)
    monkeypatch.setattr("medvol_nb.embed.search.norm_map", lambda *_: pytest.fail("norm map for a point"))
    sizes = []
    tile = page.search.__globals__["_tile_scores"]
    monkeypatch.setitem(page.search.__globals__, "_tile_scores", lambda *g: sizes.append((t := tile(*g)).numel()) or t)
    matcher.match(a.fine.to_world(rng_for(0, "n").integers(0, a.fine.shape, (50, 3))))
    assert max(sizes) <= 50 * 8 * b.fine.shape[2]


def test_D29_air_is_not_searched():
    "The best voxel lies in air: with the body known it is not found"
    a, b = random_pair()
    node = np.array([[5, 6, 7]])
    target = b.maps["fine"].copy()
    target[:, 2, 2, 2] = a.maps["fine"][:, 5, 6, 7]
    body = np.ones(b.fine.shape, bool)
    body[:4] = False
    pts = a.fine.to_world(node)
    b = replace(b, maps={**b.maps, "fine": target}, body=body)
    free, held = (Matcher(a, b, heads=("fine",), restrict_to_body=r).match(pts, "nn") for r in (False, True))
    assert np.rint(b.fine.to_index(free.matched))[0].tolist() == [2, 2, 2] and b.fine.to_index(held.matched)[0, 0] > 3.4


def test_E7_pruning_is_exact_and_says_how_much():
    "Exact, and most voxels are left out where vectors tell places apart, as trained ones do"
    a, b = random_pair()
    q, k = (make_side(e, ("fine", "coarse"), CPU) for e in (a, b))
    at = torch.from_numpy(rng_for(0, "n").integers(2, np.array(a.fine.shape) - 2, (30, 3)).astype(float))
    fine, coarse, _ = page.descriptors(q, at)
    query = make_query(k, fine, coarse)
    full, pruned = search(k, query), search_pruned(k, query)
    assert torch.equal(full[0], pruned[0]) and 0 <= pruned[2] < 1
    np.testing.assert_allclose(full[1], pruned[1], atol=1e-6)
    scan = header((60, 56, 48), (4.0, 4.0, 4.0))
    place = make_side(position_embedding(scan), ("fine", "coarse"), CPU)
    fine, coarse, _ = page.descriptors(place, at[:5])
    learned = make_query(place, fine, coarse)
    where, score, skipped = search_pruned(place, learned)
    assert torch.equal(where, search(place, learned)[0]) and skipped > 0.8


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_coarse_cosine_may_count_less_or_more(weight):
    "Scores are the weighted mean of both cosines, by each way to search"
    a, b = random_pair()
    q, k = (make_side(e, ("fine", "coarse"), CPU, coarse_weight=weight) for e in (a, b))
    at = rng_for(0, "n").integers(2, np.array(a.fine.shape) - 2, (6, 3))
    fine, coarse, _ = page.descriptors(q, torch.from_numpy(at.astype(float)))
    query = make_query(k, fine, coarse)
    (full, score), (pruned, same, _) = search(k, query), search_pruned(k, query)
    assert torch.equal(full, pruned)
    np.testing.assert_allclose(score, same, atol=1e-6)
    one, two = make_query(make_side(b, ("fine",), CPU), fine, None), make_query(k, fine, coarse)
    alone = make_side(b, ("fine",), CPU)
    of_fine, of_both = (page.voxel_scores(s, v, full).numpy() for s, v in ((alone, one), (k, two)))
    of_coarse = (of_both * (1 + weight) - of_fine) / weight
    assert np.abs(of_coarse).max() <= 1 + 1e-5 and np.ptp(of_coarse) > 0.01
    equal = page.voxel_scores(plain := make_side(b, ("fine", "coarse"), CPU), make_query(plain, fine, coarse), full)
    np.testing.assert_allclose(equal.numpy(), (of_fine + of_coarse) / 2, atol=1e-5)
    m, even = (Matcher(a, b, coarse_weight=w).match(a.fine.to_world(at), "nn") for w in (weight, 1.0))
    assert np.abs(m.score - even.score).max() > 1e-3


def test_pruning_is_exact_where_stored_vectors_are_longer_than_1():
    "Few levels of stored integers make some vectors longer, so one with a lower coarse share may win"
    emb = position_embedding(header((60, 56, 48), (4.0, 4.0, 4.0)))
    node = np.array([10, 12, 14])
    emb.maps["fine"][:, 10, 12, 24] = 1.2 * emb.maps["fine"][(slice(None), *node)]
    side = make_side(emb, ("fine", "coarse"), CPU)
    fine, coarse, _ = page.descriptors(side, torch.from_numpy(node[None].astype(float)))
    query = make_query(side, fine, coarse)
    full, pruned = search(side, query)[0], search_pruned(side, query)[0]
    assert full[0, 0].tolist() == pruned[0, 0].tolist() == [10, 12, 24]


def test_batches_order_and_storage_do_not_matter(tmp_path):
    a, b = random_pair(c=32)
    pts = a.fine.to_world(rng_for(0, "n").uniform(1, np.array(a.fine.shape) - 2, (300, 3)))
    m = Matcher(a, b).match(pts, "nn")
    order = rng_for(1, "o").permutation(300)
    np.testing.assert_allclose(Matcher(a, b).match(pts[order], "nn").matched, m.matched[order], atol=1e-3)
    one = Matcher(a, b).match(pts[7:8], "nn")
    np.testing.assert_allclose(one.matched[0], m.matched[7], atol=1e-3)
    for k, e in enumerate((a, b)):
        write_embedding(e, tmp_path / f"{k}.zarr")
    stored = Matcher(open_embedding(tmp_path / "0.zarr"), tmp_path / "1.zarr").match(pts, "nn")
    assert np.mean(np.linalg.norm(stored.matched - m.matched, axis=1) < 1) > 0.97
    assert np.abs(stored.score - m.score).max() < 0.02


def test_peaks_are_apart_and_ordered():
    a, b = random_pair(c=32)
    pts = a.fine.to_world(rng_for(0, "n").integers(2, np.array(a.fine.shape) - 2, (10, 3)))
    m = Matcher(a, b).match(pts, "nn", top_k=3, radius_mm=20, refine="voxel")
    assert (m.score >= m.second).all() and m.others.shape == (10, 2, 3)
    places = np.concatenate([m.matched[:, None], m.others], 1)
    gaps = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1)[:, *np.triu_indices(3, 1)]
    assert gaps.min() > 20
    heat = Matcher(a, b).similarity_map(pts[0])
    at = np.rint(b.fine.to_index(m.matched[0])).astype(int)
    np.testing.assert_allclose(heat.data.max(), m.score[0], atol=1e-5)
    assert heat.data[tuple(at)] == heat.data.max()


def test_mutual_matches_go_both_ways():
    "Where the other scan lacks the place, the nearest is not mutual"
    a = position_embedding(header((100, 60, 60), (2, 2, 2.0)), c=96)
    b = position_embedding(header((50, 60, 60), (2, 2, 2.0)), c=96)
    inside, outside = np.array([[40.0, 60, 60]]), np.array([[170.0, 60, 60]])
    m = Matcher(a, b).match(np.concatenate([inside, outside]))
    assert m.status.tolist() == ["ok", "not_mutual"] and m.cycle_mm[0] < 2 < 12 < m.cycle_mm[1]


def test_a_calibrated_score_is_a_probability(tmp_path):
    a, b = random_pair(c=18)
    pts = a.fine.to_world(rng_for(0, "n").integers(2, np.array(a.fine.shape) - 2, (300, 3)))
    m = Matcher(a, b, heads=("fine",)).match(pts, top_k=2)
    right = np.linalg.norm(m.matched - pts, axis=1) <= 6
    half = replace_rows(m, slice(0, 150))
    cal = calibrate(half, pts[:150], 6, model="random")
    said = cal(replace_rows(m, slice(150, None)))
    assert 0.05 < right.mean() < 0.95
    assert np.mean((said - right[150:]) ** 2) < 0.9 * np.mean((right[:150].mean() - right[150:]) ** 2)
    assert abs(said.mean() - right[150:].mean()) < 0.12
    cal.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    assert again == cal
    conf = Matcher(a, b, heads=("fine",), calibration=again).match(pts[150:]).confidence
    np.testing.assert_allclose(conf, said, atol=1e-5)
    for mode in ("nn", "fixed_point"):
        with pytest.raises(DataError, match="needs the way back"):
            Matcher(a, b, heads=("fine",), calibration=again).match(pts, mode)
    with pytest.raises(DataError, match="calibration: made by model"):
        Matcher(replace(a, model="x"), replace(b, model="x"), calibration=again)


def replace_rows(m, part):
    names = ("points", "matched", "score", "status", "second", "others", "cycle_mm")
    return replace(m, **{n: getattr(m, n)[part] for n in names})


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"mode": "best"}, "mode: must be"),
        ({"refine": "x"}, "refine"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_wrong_options(bad, words):
    a, b = random_pair()
    with pytest.raises(DataError, match=words):
        Matcher(a, b).match([[0, 0, 0]], **bad)
    with pytest.raises(DataError, match="heads"):
        Matcher(a, b, heads=("coarse",))
    with pytest.raises(DataError, match="coarse_weight: must be > 0, got 0"):
        Matcher(a, b, coarse_weight=0)


def test_no_points_is_no_error():
    a, b = random_pair()
    for mode in ("nn", "mutual", "fixed_point"):
        assert len(Matcher(a, b).match(np.zeros((0, 3)), mode)) == 0
