"Supervoxel clustering: connected, exact count, same bits on any number of threads, quality of the reference and more"
import hashlib
import itertools
import subprocess
import sys

import cc3d
import numpy as np
import pytest
import torch

from medvol_nb import regions as rg
from medvol_nb import slic as sl
from medvol_nb.core import DataError
from medvol_nb.phantoms import organ_features, organs
from medvol_nb.regions import enforce_connectivity, merge_segments, refine_borders, upsample_labels
from medvol_nb.slic import reduce_grid, seed_grid, slic3d
from medvol_nb.sv_metrics import best_dice, segment_table, supervoxel_metrics


@pytest.fixture(scope="module")
def body(): return organs((40, 44, 36))


@pytest.fixture(scope="module")
def features(body): return organ_features(body.img)


def check(labels, mask=None, k=None):
    "Ids 1...k without gaps in raster order, one 6-connected piece each, 0 exactly outside the mask"
    ids, first = np.unique(labels, return_index=True)
    first = first[ids > 0]
    assert ids[ids > 0].tolist() == list(range(1, int(labels.max()) + 1))
    assert (np.diff(first) > 0).all()
    assert cc3d.connected_components(labels.astype(np.int32), connectivity=6).max() == labels.max()
    assert ((labels > 0) == (np.ones(labels.shape, bool) if mask is None else mask)).all()
    if k is not None: assert labels.max() == k


def same_parts(a, b):
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]).astype(np.int64), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


def noise(shape, c=3, seed=0): return np.random.default_rng(seed).standard_normal((c, *shape)).astype(np.float32)


# --------------------------------------------------------------------------------------------- B3 count and connection

@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("stride", [1, 2, (2, 1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_B3_exact_count_connected_ids_in_order(body, features, masked, stride, merge):
    "Also without merging the count is exact: the smallest segments join others, see `_down_to`"
    mask = body.lbl > 0 if masked else None
    for k in (50, 100):
        check(slic3d(features, k, spacing=body.spacing, mask=mask, stride=stride, merge=merge), mask, k)


@pytest.mark.parametrize("k", [1, 2, 7, 33, 60])
def test_B3_counts_the_reference_missed(features, k): check(slic3d(features, k, stride=2), k=k)


@pytest.mark.parametrize("seed", range(3))
def test_B3_features_of_pure_noise(seed):
    f = noise((18, 17, 16), 4, seed)
    for merge in (True, False): check(slic3d(f, 60, merge=merge), k=60)


def test_B3_ragged_mask_with_islands_and_holes():
    "A coarse block at the rim may hold voxels that touch only through voxels outside: they must not share an id"
    rng = np.random.default_rng(1)
    mask = rng.random((31, 30, 29)) < 0.6
    islands = int(cc3d.connected_components(mask, connectivity=6).max())
    for stride in (1, 2, 3):
        labels = slic3d(noise(mask.shape), 200, mask=mask, stride=stride)
        check(labels, mask)
        assert labels.max() == max(200, islands)


def test_B3_more_islands_than_segments():
    mask = np.zeros((20, 20, 20), bool)
    for at in itertools.product((0, 6, 12), repeat=3): mask[tuple(slice(a, a + 3) for a in at)] = True
    check(slic3d(noise(mask.shape), 5, mask=mask), mask, 27)


def test_largest_size_is_kept(features):
    free, bound = (slic3d(features, 60, stride=2, max_size_factor=f) for f in (None, 2.5))
    assert np.bincount(bound.ravel())[1:].max() <= 2.5*bound.size/60 < np.bincount(free.ravel())[1:].max()
    check(bound, k=60)


# ------------------------------------------------------------------------------------------------------ B4 quality

@pytest.mark.parametrize("c", [0.01, pytest.param(0.1, marks=pytest.mark.slow)])
def test_B4_not_below_scikit_image_at_equal_count(c):
    "One seed on a small volume; five seeds on every row of the table are in benchmarks/supervoxels.py"
    from skimage.segmentation import slic
    body = organs((64, 64, 64), 2)
    f = organ_features(body.img, 2)
    theirs = slic(f, channel_axis=0, compactness=c, n_segments=100, sigma=3)
    want = supervoxel_metrics(theirs, body.lbl)
    for stride in (1, 2):
        got = supervoxel_metrics(slic3d(f, want["k"], stride=stride), body.lbl)
        assert got["k"] == want["k"] and got["disconnected"] == 0
        assert got["asa"] >= want["asa"] - 0.005 and got["br"] >= want["br"] - 0.005
        assert got["ue"] <= want["ue"] + 0.01


# -------------------------------------------------------------------------------------------------- B7 determinism

@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"merge": False}, {"n_components": None}])
def test_B7_threads_do_not_change_a_voxel(features, options):
    before, out = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            out.append(slic3d(features, 80, **options))
            assert torch.get_num_threads() == n
    finally: torch.set_num_threads(before)
    for labels in out[1:]: assert labels.tobytes() == out[0].tobytes()


def test_B7_same_bytes_in_another_process_with_more_threads():
    code = ("import hashlib; from medvol_nb.phantoms import organs, organ_features as f; "
            "from medvol_nb.slic import slic3d; "
            "print(hashlib.sha1(slic3d(f(organs((24, 24, 24)).img), 40).tobytes()).hexdigest())")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={"PATH": "", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5"})
    here = slic3d(organ_features(organs((24, 24, 24)).img), 40)
    assert run.stdout.strip() == hashlib.sha1(here.tobytes()).hexdigest()


def test_tensor_array_and_every_memory_order_agree(features):
    want = slic3d(features, 50)
    for f in (torch.from_numpy(features), np.asfortranarray(features), torch.from_numpy(features).double(),
              np.ascontiguousarray(features[..., ::-1])[..., ::-1]):
        assert (slic3d(f, 50) == want).all()


# --------------------------------------------------------------------------------------------------- B8 geometry

def test_B8_extent_in_mm_is_that_of_the_body_not_of_the_voxels():
    extents = []
    for shape in ((48, 48, 48), (48, 48, 12)):
        body = organs(shape)
        f = organ_features(body.img) if shape[2] == 48 else organ_features(organs((48, 48, 48)).img)[..., 1::4]
        labels = slic3d(f, 60, spacing=body.spacing)
        extents.append(np.median(segment_table(labels, body.spacing)["extent"], 0))
    assert np.abs(extents[1]/extents[0] - 1).max() < 0.15
    flat = [segment_table(slic3d(0*f, 60, spacing=s), body.spacing)["extent"] for s in (body.spacing, (1, 1, 1))]
    ratio = [np.median(e[:, 2])/np.median(e[:, 0]) for e in flat]
    assert abs(ratio[0] - 1) < 0.35 < 2 < ratio[1]  # the reference ignores the voxel size


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_B8_flips_only_relabel(body, features, axes, stride, masked):
    "Odd sizes, so that neither cells nor blocks mirror by themselves"
    f, mask = features[:, :39, :41, :35], (body.lbl > 0)[:39, :41, :35] if masked else None
    want = slic3d(f, 70, mask=mask, stride=stride)
    got = slic3d(np.flip(f, [a + 1 for a in axes]), 70, mask=None if mask is None else np.flip(mask, axes),
                 stride=stride)
    assert same_parts(np.flip(got, axes), want)


def test_scale_and_offset_of_a_channel_do_not_matter(features):
    want = slic3d(features, 60)
    scaled = features*np.float32(2)**np.arange(-16, 16, dtype=np.float32)[:, None, None, None]
    assert same_parts(slic3d(scaled, 60), want)
    assert best_dice(slic3d(features + np.float32(100), 60), want) > 0.9  # float32 has lost digits of the features


# ------------------------------------------------------------------------------------------------- B9 robustness

@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 12, 13), (9, 1, 1), (2, 3, 30), (17, 16, 1), (3, 3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_B9_thin_and_tiny_volumes(shape, stride):
    n = int(np.prod(shape))
    for k in (1, 5, 400): check(slic3d(noise(shape), k, stride=stride), k=min(k, n))


def test_B9_one_constant_image_gives_compact_segments():
    labels = slic3d(np.full((1, 24, 24, 24), 7.0), 64)
    check(labels, k=64)
    assert np.bincount(labels.ravel())[1:].max() <= 4*labels.size/64


def test_B9_all_air(features):
    labels = slic3d(features, 50, mask=np.zeros(features.shape[1:], bool))
    assert labels.dtype == np.int16 and not labels.any() and labels.shape == features.shape[1:]


@pytest.mark.parametrize("stride", [1, 2])
def test_B9_values_that_are_not_finite(features, stride):
    bad = features.copy()
    bad[3, 7, 8, 9], bad[3, 9, 1, 1], bad[5, 0, 0, 0] = np.nan, np.inf, -np.inf
    with pytest.raises(DataError, match=r"3 values are not finite, first at \(c, x, y, z\) = \(3, 7, 8, 9\)"):
        slic3d(bad, 20, stride=stride)
    with pytest.raises(DataError, match="3 values are not finite"): slic3d(bad, 10**6, stride=stride)
    with pytest.raises(DataError, match="3 values"): slic3d(bad, 20, mask=np.zeros(bad.shape[1:], bool))


def test_B9_as_many_segments_as_voxels_and_nearly_so():
    f = noise((6, 5, 4))
    check(slic3d(f, 120), k=120)
    check(slic3d(f, 10**9, stride=2), k=120)
    for k in (100, 60, 30): check(slic3d(f, k), k=k)
    assert slic3d(f, 119).max() == 119


def test_label_maps_need_features(body):
    for f in (enforce_connectivity, merge_segments, refine_borders):
        options = {"min_size": 1} if f is enforce_connectivity else {"n_segments": 2} if f is merge_segments else {}
        with pytest.raises(DataError, match=r"features must be \(c, x, y, z\)"): f(body.lbl, None, **options)


@pytest.mark.parametrize("options", [{"merge": False, "max_iter": 1}, {"max_size_factor": 1.5},
                                     {"min_size_factor": 0, "over_seed": 4, "tol": 0}])
def test_all_options_count_where_the_coarse_grid_has_too_few_voxels(options):
    f = noise((24, 24, 24))
    assert (slic3d(f, 300, stride=4, **options) == slic3d(f, 300, **options)).all()


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8), (1, 2, 8, 8, 8), (2, 0, 8, 8)])
def test_B9_shapes_that_are_no_features(shape):
    with pytest.raises(DataError, match=r"features must be \(c, x, y, z\)"): slic3d(np.zeros(shape), 5)


@pytest.mark.parametrize("dtype", ["bool", "u1", "i1", ">i2", "<u2", ">f4", "f2", ">f8", "i8"])
def test_B9_number_types_and_byte_orders(dtype):
    f = (10*np.abs(noise((12, 13, 14)))).astype(dtype)
    assert (slic3d(f, 30) == slic3d(f.astype(np.float32), 30)).all()


def test_B9_wrong_arguments(features):
    for bad in ({"n_segments": 0}, {"n_segments": 2.5}, {"n_segments": True}, {"stride": 0}, {"stride": (1, 2)},
                {"spacing": (1, 1)}, {"spacing": (1, 1, 0)}, {"spacing": (1, 1, np.nan)}, {"compactness": -1},
                {"tol": np.nan}, {"over_seed": 0.5}, {"max_iter": 0}, {"n_components": 0}, {"max_size_factor": 0.5},
                {"mask": np.ones((3, 3, 3), bool)}):
        with pytest.raises(DataError): slic3d(features, **bad)
    for bad in (features.astype(complex), torch.zeros(1, 2, 2, 2, dtype=torch.complex64), features.astype(str)):
        with pytest.raises(DataError, match="real numbers"): slic3d(bad)


def test_input_is_not_written_to(features):
    f = features.copy()
    f.flags.writeable = False
    slic3d(f, 50, stride=2)
    slic3d(f, 50)
    assert (f == features).all()


# ------------------------------------------------------------------------------------------------ S8, S9 defects

def test_S8_sums_do_not_drift_in_large_clusters():
    """float32 running sums of 2e5 coordinates near 600 round by more than 1: the centre drifts.

    One cluster of 600 x 20 x 20 voxels: its mean position must be the middle, to float64 accuracy.
    """
    planes = sl._Planes(np.zeros((1, 600, 20, 20), np.float32), (1, 1, 1), (False,)*3, torch.device("cpu"))
    with sl._pieces(planes.device) as run:
        cells = sl._Cells(planes, None, (1, 1, 1), (1, 1, 1), 0.15, None, run)
        assert cells.seeds()[cells.own][0, -2].item() == pytest.approx(cells.middle[0, 2].item(), rel=1e-6)
        middle = cells.middle[0, 0].item()
        assert cells.seeds()[cells.own][0, 1].item() == pytest.approx(middle, rel=1e-6)


def test_S8_stops_when_little_changes(features, monkeypatch):
    rounds = []
    original = torch.bmm
    monkeypatch.setattr(sl.torch, "bmm", lambda *a, **k: rounds.append(1) or original(*a, **k))
    n = {}
    for tol in (0, 0.01, 0.2):
        rounds.clear()
        slic3d(features, 50, stride=2, tol=tol, max_iter=60)
        n[tol] = len(rounds)
    assert n[0.2] < n[0.01] < n[0]


def test_S8_candidates_are_27_not_64():
    planes = sl._Planes(noise((20, 20, 20)), (1, 1, 1), (False,)*3, torch.device("cpu"))
    with sl._pieces(planes.device) as run: cells = sl._Cells(planes, None, (1, 1, 1), (4, 4, 4), 0.15, None, run)
    assert cells.near.shape == (64, 27)


def test_S8_dead_clusters_keep_their_place_and_never_become_nan():
    "Two values only: most seeds lose all voxels at once if position counts for nothing"
    f = np.zeros((1, 24, 24, 24))
    f[0, 12:] = 1
    labels = slic3d(f, 30, compactness=0)
    check(labels, k=30)
    assert not ((labels[:12].max() >= labels[12:].min()) and np.intersect1d(labels[:12], labels[12:]).size)


def test_S8_no_segments_are_spent_on_air(body, features):
    mask = body.lbl > 0
    labels = slic3d(features, 100, mask=mask)
    check(labels, mask, 100)


def test_S8_a_crumb_joins_the_most_similar_neighbour():
    "The reference takes the last other label that a search happened to meet"
    labels = np.repeat([1, 2, 3], (6, 1, 6))[:, None, None]*np.ones((13, 3, 3), int)
    for similar in (1, 3):
        f = np.where(labels == 2, 1.0, np.where(labels == similar, 0.9, 5.0))[None]
        out = enforce_connectivity(labels, f, min_size=10)
        assert out.max() == 2 and out[6, 0, 0] == (out[0, 0, 0] if similar == 1 else out[-1, 0, 0])


def test_S8_equally_similar_neighbours_larger_contact_wins():
    labels = np.array([[1, 1, 1, 2], [1, 3, 2, 2], [1, 1, 1, 2]])[:, :, None]
    out = enforce_connectivity(labels, np.zeros((1, 3, 4, 1)), min_size=2)
    assert out[1, 1, 0] == out[0, 0, 0]


def test_S8_a_mask_never_leaves_one_id_in_two_places():
    "scikit-image #8295"
    mask = np.zeros((30, 12, 12), bool)
    mask[:12], mask[18:] = True, True
    for stride in (1, 2, 4): check(slic3d(np.zeros((1, 30, 12, 12)), 4, mask=mask, stride=stride), mask, 4)


@pytest.mark.parametrize("k, kind", [(32_767, np.int16), (32_768, np.uint16), (65_535, np.uint16), (65_536, np.int32)])
def test_S9_ids_never_overflow_their_type(k, kind):
    shape = (48, 48, 30)
    mask = np.zeros(shape, bool)
    mask.reshape(-1)[:k] = True
    labels = slic3d(np.zeros((1, *shape)), k, mask=mask)
    assert labels.dtype == kind and labels.max() == k and (np.unique(labels) == np.arange(k + 1)).all()


def test_S9_ids_are_consecutive_after_masking(body, features):
    mask = body.lbl > 1
    for stride in (1, 2): check(slic3d(features, 90, mask=mask, stride=stride), mask)


# ---------------------------------------------------------------------------------------------------- the pieces

@pytest.mark.parametrize("shape, spacing", [((96, 96, 96), (1, 1, 1)), ((512, 512, 60), (0.7, 0.7, 5)),
                                            ((40, 200, 90), (1, 2, 3)), ((300, 300, 1), (1, 1, 1))])
@pytest.mark.parametrize("n", [50, 100, 216, 400, 1000])
def test_seed_counts_are_not_quantised(shape, spacing, n):
    grid = seed_grid(shape, spacing, n)
    sides = np.array(shape)*spacing/grid
    assert abs(np.prod(grid) - n) <= 0.1*n
    wide = np.array(shape) > 1
    assert sides[wide].max()/sides[wide].min() < 2


def test_seeds_follow_the_mask():
    mask = np.zeros((80, 80, 80), bool)
    mask[10:40, 20:60, 30:70] = True
    grid = seed_grid(mask.shape, (1, 1, 1), 150, mask)
    assert abs(sl._n_seeded(sl._cell_sums(mask, grid)) - 150) <= 15


@pytest.mark.parametrize("factor", [1, 2, 3, (1, 2, 4), (5, 1, 1)])
def test_reduce_grid_is_the_mean_of_blocks(factor):
    f = noise((7, 8, 9))
    out, factors = reduce_grid(f, factor), np.broadcast_to(factor, 3)
    for at in np.ndindex(*out.shape[1:]):
        block = f[:, *(slice(a*s, (a + 1)*s) for a, s in zip(at, factors))]
        assert np.allclose(out[:, *at], block.mean((1, 2, 3)), atol=1e-5)


def test_grids_are_blocks_of_one_whole():
    labels = np.arange(1, 25).reshape(2, 3, 4)
    assert (upsample_labels(labels, (4, 6, 8)) == labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)).all()
    up = upsample_labels(labels, (3, 5, 11), (2, 2, 3))
    assert up.shape == (3, 5, 11) and (up == labels.repeat(2, 0).repeat(2, 1).repeat(3, 2)[:3, :5, :11]).all()
    with pytest.raises(DataError, match="coarse grid"): upsample_labels(labels, (3, 5, 11), 2)


def test_refined_borders_follow_the_fine_features_and_keep_every_id(body, features):
    labels = slic3d(features, 80, stride=2)
    fine = refine_borders(labels, features)
    check_ids = np.unique(fine)
    assert (check_ids == np.unique(labels)).all() and fine.dtype == labels.dtype
    assert cc3d.connected_components(fine.astype(np.int32), connectivity=6).max() == 80
    before, after = (supervoxel_metrics(v, features=features)["ev_features"] for v in (labels, fine))
    assert after > before


def test_refining_keeps_the_outside_and_ids_without_inner_voxels():
    labels = np.zeros((6, 6, 6), np.uint16)
    labels[1:5, 1:5, 1:5] = 1
    labels[2, 2, 2] = 2
    out = refine_borders(labels, np.zeros((1, 6, 6, 6)))
    assert (out == labels).all() and out.dtype == np.uint16


def slow_ward(labels, features, k):
    "All pairs tried again after every merge"
    labels = labels.copy()
    while len(ids := np.unique(labels[labels > 0])) > k:
        pairs = set()
        for axis in range(3):
            a, b = np.moveaxis(labels, axis, 0)[:-1], np.moveaxis(labels, axis, 0)[1:]
            pairs |= {(min(i, j), max(i, j)) for i, j in zip(a.ravel().tolist(), b.ravel().tolist()) if i != j and i*j}
        size = {i: (labels == i).sum() for i in ids}
        mean = {i: features[:, labels == i].mean(1) for i in ids}
        cost = {p: size[p[0]]*size[p[1]]/(size[p[0]] + size[p[1]])*((mean[p[0]] - mean[p[1]])**2).sum() for p in pairs}
        i, j = min(cost, key=lambda p: (cost[p], p))
        labels[labels == j] = i
    return labels


@pytest.mark.parametrize("seed", range(3))
def test_merging_is_wards(seed):
    f = noise((8, 8, 8), 2, seed).astype(np.float64)
    labels = np.arange(64).reshape(4, 4, 4).repeat(2, 0).repeat(2, 1).repeat(2, 2) + 1
    for k in (40, 10, 2): assert same_parts(merge_segments(labels, f, k), slow_ward(labels, f, k))


def slow_absorb(labels, features, min_size):
    "One piece at a time, smallest first"
    labels = cc3d.connected_components(labels.astype(np.int32), connectivity=6).astype(int)
    while True:
        sizes = np.bincount(labels.ravel())
        for i in sorted((i for i in range(1, len(sizes)) if 0 < sizes[i] < min_size), key=lambda i: (sizes[i], i)):
            own, contact = labels == i, {}
            for axis, step in itertools.product(range(3), (-1, 1)):
                near = np.roll(labels, step, axis)
                edge = np.take(np.arange(labels.shape[axis]), 0 if step == 1 else -1)
                keep = own & (np.arange(labels.shape[axis]) != edge).reshape([-1 if d == axis else 1 for d in range(3)])
                for j in near[keep].tolist(): contact[j] = contact.get(j, 0) + 1
            contact = {j: n for j, n in contact.items() if j not in (0, i)}
            if not contact: continue
            mean = features[:, own].mean(1)
            gap = {j: ((features[:, labels == j].mean(1) - mean)**2).sum() for j in contact}
            labels[own] = min(contact, key=lambda j: (gap[j], -contact[j], j))
            break
        else: return labels


@pytest.mark.parametrize("seed", range(4))
def test_absorbing_in_rounds_is_close_to_one_at_a_time(seed):
    "Merges far apart do not wait for each other, so means differ in the order of merging; the outcome hardly"
    rng = np.random.default_rng(seed)
    halves = 1 + (np.arange(12) > 5)[:, None, None]
    labels = np.where(rng.random((12, 12, 12)) < 0.1, rng.integers(1, 5, (12, 12, 12)), halves)
    f = labels[None] + 0.3*noise(labels.shape, 1, seed)
    got = enforce_connectivity(labels, f, min_size=20)
    assert np.bincount(got.ravel())[1:].min() >= 20
    assert best_dice(got, slow_absorb(labels, f, 20)) > 0.95


def test_islands_of_the_mask_are_not_merged_across():
    labels = np.ones((9, 3, 3), int)
    mask = np.ones_like(labels, bool)
    mask[4] = False
    mask[8, 1:], mask[8, :, 1:], mask[7] = False, False, False
    out = enforce_connectivity(labels, np.zeros((1, 9, 3, 3)), min_size=100, mask=mask)
    check(out, mask, 3)


def test_touching_pairs_against_a_loop():
    labels = np.random.default_rng(0).integers(0, 6, (7, 6, 5))
    want = {}
    for at in np.ndindex(labels.shape):
        for axis in range(3):
            to = tuple(a + (d == axis) for d, a in enumerate(at))
            if to[axis] == labels.shape[axis]: continue
            i, j = sorted((int(labels[at]), int(labels[to])))
            if i and i != j: want[i, j] = want.get((i, j), 0) + 1
    graph = rg._graph(labels.astype(np.int32), 5, np.zeros((6, 1)))
    assert dict(zip(map(tuple, graph.pairs.T.tolist()), graph.contact.tolist())) == want


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.zeros((3, 3, 3)), np.full((3, 3, 3), -1)])
def test_label_maps_are_checked(bad):
    for f in (enforce_connectivity, merge_segments):
        with pytest.raises(DataError):
            f(bad, np.zeros((1, 3, 3, 3)), **({"min_size": 3} if f is enforce_connectivity else {"n_segments": 3}))
