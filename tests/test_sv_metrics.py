"Measures of supervoxels against loops and values derived by hand"
import numpy as np
import pytest

from medvol_nb.core import DataError
from medvol_nb.sv_metrics import (
    best_dice,
    border_voxels,
    contingency,
    segment_table,
    stability,
    supervoxel_metrics,
)


def random_pair(seed, shape=(7, 6, 5)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 5, shape), rng.integers(0, 4, shape)


@pytest.mark.parametrize("seed", range(5))
def test_overlap_by_its_definition(seed):
    labels, truth = random_pair(seed)
    n = (labels > 0).sum()
    asa = ue = 0
    for i in range(1, 5):
        shared = [int(((labels == i) & (truth == j)).sum()) for j in range(4)]
        asa += max(shared)
        ue += sum(min(m, sum(shared) - m) for m in shared if m)
    got = supervoxel_metrics(labels, truth)
    assert got["asa"] == pytest.approx(asa/n) and got["ue"] == pytest.approx(ue/n)
    assert contingency(labels, truth).sum() == labels.size


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1, 4)])
def test_borders_by_their_definition(seed, spacing):
    labels, truth = random_pair(seed)
    labels[2:5], truth[3:6] = 1, 2  # some room
    def border(a):
        out = np.zeros(a.shape, bool)
        for at in np.ndindex(a.shape):
            for axis in range(3):
                for step in (-1, 1):
                    to = list(at)
                    to[axis] += step
                    out[at] |= 0 <= to[axis] < a.shape[axis] and a[tuple(to)] != a[at]
        return out
    def share(of, to, limit, size):
        a, b = np.argwhere(of)*size, np.argwhere(to)*size
        return (np.linalg.norm(a[:, None] - b[None], axis=2).min(1) <= limit + 1e-9).mean()
    true, found = border(truth), border(labels)
    assert (border_voxels(truth) == true).all()
    got = supervoxel_metrics(labels, truth, spacing, tolerance=1, tolerance_mm=1.5)
    assert got["br"] == pytest.approx(share(true, found, 1, (1, 1, 1)))
    assert got["bp"] == pytest.approx(share(found, true, 1, (1, 1, 1)))
    assert got["br_mm"] == pytest.approx(share(true, found, 1.5, spacing))
    assert got["bp_mm"] == pytest.approx(share(found, true, 1.5, spacing))


def test_perfect_and_useless_partitions():
    truth = np.arange(4).repeat(4)[:, None, None]*np.ones((16, 8, 8), int)
    perfect, useless = supervoxel_metrics(truth + 1, truth), supervoxel_metrics(np.ones_like(truth), truth)
    assert (perfect["asa"], perfect["ue"], perfect["br"], perfect["bp"]) == (1, 0, 1, 1)
    # one segment: the best region has a quarter; each of four regions leaks a quarter
    assert (useless["asa"], useless["ue"], useless["br"], useless["bp"]) == (0.25, 1, 0, 1)


def test_outside_does_not_count():
    labels, truth = random_pair(0)
    wide, outer = np.zeros((9, 8, 7), int), np.zeros((9, 8, 7), int)
    wide[1:-1, 1:-1, 1:-1], outer[1:-1, 1:-1, 1:-1] = labels, truth
    a, b = supervoxel_metrics(labels, truth), supervoxel_metrics(wide, outer)
    assert a["asa"] == b["asa"] and a["ue"] == b["ue"] and a["k"] == b["k"]


@pytest.mark.parametrize("sides, spacing", [((6, 6, 6), (1, 1, 1)), ((8, 4, 2), (1, 2, 4)), ((2, 3, 5), (1, 1, 1))])
def test_compactness_is_physical(sides, spacing):
    labels = np.zeros((10, 10, 10), int)
    labels[1:1 + sides[0], 1:1 + sides[1], 1:1 + sides[2]] = 1
    a, b, c = np.array(sides)*spacing
    want = 36*np.pi*(a*b*c)**2/(2*(a*b + b*c + a*c))**3  # pi/6 for cubes in mm
    assert supervoxel_metrics(labels, spacing=spacing)["co"] == pytest.approx(want)


def test_sizes_count_and_pieces():
    labels = np.zeros((10, 10, 10), int)
    labels[:2], labels[4:5], labels[6:, :5] = 1, 1, 7  # id 1 in two pieces, a gap in the numbers
    got = supervoxel_metrics(labels, spacing=(1, 1, 5))
    assert got["k"] == 2 and got["disconnected"] == 1
    assert (got["size_ml_min"], got["size_ml_median"], got["size_ml_max"]) == (1, 1.25, 1.5)
    assert got["size_ml_cv"] == pytest.approx(0.25/1.25)
    corner = np.zeros((4, 4, 4), int)
    corner[0, 0, 0] = corner[1, 1, 1] = 1  # a shared corner is no connection
    assert supervoxel_metrics(corner)["disconnected"] == 1


def test_explained_variation():
    labels, _ = random_pair(1)
    image = np.random.default_rng(1).standard_normal(labels.shape)
    inside = labels > 0
    x = image[inside]
    between = sum((labels == i).sum()*(image[labels == i].mean() - x.mean())**2 for i in range(1, 5))
    got = supervoxel_metrics(labels, image=image + 100, features=np.stack([image, labels.astype(float)]))
    assert got["ev_image"] == pytest.approx(between/((x - x.mean())**2).sum())
    assert got["ev_features"] == pytest.approx((got["ev_image"] + 1)/2)
    assert supervoxel_metrics(labels, image=np.ones(labels.shape))["ev_image"] == 1


def test_table_of_segments():
    labels = np.zeros((20, 10, 10), np.uint16)
    labels[2:12, 1:9, 3:7], labels[15, 5, 5] = 4, 9
    got = segment_table(labels, (0.5, 1, 2))
    assert got["id"].tolist() == [4, 9] and got["voxels"].tolist() == [320, 1] and got["ml"].tolist() == [0.32, 0.001]
    assert got["centre"].tolist() == [[6.5, 4.5, 4.5], [15, 5, 5]]
    # variance of n whole numbers in a row: (n^2 - 1)/12, so sqrt(12 var + 1) = n
    assert got["extent"] == pytest.approx(np.array([[5, 8, 8], [0.5, 1, 2]]))
    empty = segment_table(np.zeros((2, 2, 2), int))
    assert empty["id"].size == 0 and empty["centre"].shape == (0, 3)


def test_best_dice():
    labels, _ = random_pair(2)
    assert best_dice(labels, np.where(labels, 50 - labels, 0)) == 1
    halves, quarters = np.arange(4).repeat(2)[:, None, None]//2 + 1, np.arange(4).repeat(2)[:, None, None] + 1
    assert best_dice(halves, quarters) == pytest.approx(2*2/(4 + 2))
    assert best_dice(np.ones((2, 2, 2), int), np.zeros((2, 2, 2), int)) == 0
    assert best_dice(np.zeros((2, 2, 2), int), np.ones((2, 2, 2), int)) == 1


def test_stability_of_what_follows_the_content_and_of_what_does_not():
    f = np.random.default_rng(0).standard_normal((1, 16, 16, 16)).astype(np.float32)
    f[:, :8] += 50
    by_content = stability(lambda v: (v[0] > 25).astype(int) + 1, f)
    by_place = stability(lambda v: np.arange(v.shape[1])[:, None, None]//4*np.ones(v.shape[1:], int) + 1, f)
    assert by_content == {"shift": 1, "noise": 1} and by_place["noise"] == 1 and by_place["shift"] < 0.9
    stability(lambda v: np.ones(v.shape[1:], int), f[..., :1])  # one slice cannot move along z


def test_all_air_has_numbers():
    got = supervoxel_metrics(np.zeros((4, 4, 4), int), np.zeros((4, 4, 4), int), image=np.zeros((4, 4, 4)))
    assert got["k"] == got["disconnected"] == 0 and got["asa"] == 0 and np.isnan(got["size_ml_min"])


@pytest.mark.parametrize("call", [
    lambda a: supervoxel_metrics(a.astype(float)), lambda a: supervoxel_metrics(a[0]), lambda a: supervoxel_metrics(-a),
    lambda a: supervoxel_metrics(a, a[1:]), lambda a: supervoxel_metrics(a, spacing=(1, 1)),
    lambda a: supervoxel_metrics(a, spacing=(1, 1, -1)), lambda a: supervoxel_metrics(a, image=np.zeros((2, 2, 2))),
    lambda a: supervoxel_metrics(a, features=np.zeros((1, 2, 2, 2))), lambda a: best_dice(a, a[1:]),
    lambda a: contingency(a*100_000, a*100_000), lambda a: stability(lambda f: f[0], a)])
def test_hostile_input_is_named(call):
    with pytest.raises(DataError): call(np.ones((3, 3, 3), int))
