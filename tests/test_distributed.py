"""The cost model: limits and known answers, fits that recover what made the times, runs that cannot be fitted."""

import math

import pytest

from medvol_nb.core import DataError, rng_for
from medvol_nb.distributed import (
    Scaling,
    allreduce_seconds,
    costs,
    fit_scaling,
    limit_of,
    predict_seconds,
    scaled,
    step_seconds,
)


def test_known_answers():
    "24 items of 0.5 s and 2 s of serial work: rounds of 24, 12, 5, 1 and 1 items"
    job = Scaling(24, 0.5, 2.0)
    assert [predict_seconds(job, n) for n in (1, 2, 5, 24, 1000)] == [14.0, 8.0, 4.5, 2.5, 2.5]
    assert costs(job, 5) == {"serial": 2.0, "work": 2.5, "tasks": 0.0, "storage": 0.0} and limit_of(job, 24) == "serial"


def test_the_slowest_of_three_counts():
    job = Scaling(1000, 1.0, 0.0, task=0.01, stored=1e11, bandwidth=1e9)
    assert [(predict_seconds(job, n), limit_of(job, n)) for n in (5, 50)] == [(200.0, "work"), (100.0, "storage")]
    fast = Scaling(1000, 1.0, 0.0, task=0.01, stored=1e9, bandwidth=1e9)
    assert (predict_seconds(fast, 500), limit_of(fast, 500)) == (10.0, "tasks")


@pytest.mark.parametrize("seed", range(20))
def test_more_workers_never_take_longer_and_nothing_beats_amdahl(seed):
    rng = rng_for(seed, "scaling")
    job = Scaling(int(rng.integers(1, 5000)), *rng.uniform(0, 3, 2), *rng.uniform(0, (0.02, 1e12)), 1e9)
    times = [predict_seconds(job, n) for n in range(1, 300)]
    assert times == sorted(times, reverse=True) and times[-1] >= job.serial
    for n, t in enumerate(times, 1):
        assert t >= job.serial + job.items * job.item / n - 1e-9


@pytest.mark.parametrize("workers", [(1, 2), (1, 2, 4), (2, 8), (1, 1, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_a_fit_finds_what_made_the_times(seed, workers):
    rng = rng_for(seed, "fit")
    true = Scaling(int(rng.integers(20, 400)), *rng.uniform(0.1, 3, 2), task=0.001, stored=1e6, bandwidth=1e9)
    found = fit_scaling(workers, [predict_seconds(true, n) for n in workers], true.items, task=0.001, stored=1e6,
                        bandwidth=1e9)  # fmt: skip
    assert found.item == pytest.approx(true.item) and found.serial == pytest.approx(true.serial)
    large, same = (scaled(job, 10 * true.items) for job in (found, true))
    assert large.stored == 1e7 and predict_seconds(large, 100) == pytest.approx(predict_seconds(same, 100))


@pytest.mark.parametrize(
    "workers, seconds, items, words",
    [
        ((1, 1), (1.0, 1.0), 9, "two different numbers"),
        ((1, 2), (1.0,), 9, "two different numbers"),
        ((1, 2), (1.0, 0.0), 9, "must be positive"),
        ((1, 2), (1.0, 0.6), 0, "must be positive"),
        ((0, 2), (1.0, 0.6), 9, "must be positive"),
        ((1, 2), (1.0, 1.0), 9, "bound by tasks"),  # no faster with two: the items cost nothing that can be seen
    ],
)
def test_runs_that_tell_nothing_are_refused(workers, seconds, items, words):
    with pytest.raises(DataError, match=words):
        fit_scaling(workers, seconds, items, task=0.001)


def test_runs_at_the_limit_of_the_storage_are_refused():
    with pytest.raises(DataError, match="2 workers are bound by storage"):
        fit_scaling([1, 2], [10.0, 6.0], 100, stored=5e9, bandwidth=1e9)


def test_ring():
    assert allreduce_seconds(1e9, 1, 1e9) == 0
    assert allreduce_seconds(1e9, 4, 1e9) == 1.5 and allreduce_seconds(1e9, 4, 1e9, 0.01) == pytest.approx(1.56)
    assert allreduce_seconds(1e9, 10**6, 1e9) == pytest.approx(2, rel=1e-5)
    assert step_seconds(0.5, 1e9, 4, 1e9) == 2.0 and math.isinf(Scaling(1, 1.0).bandwidth)
    for wrong in ((1e9, 0, 1e9), (1e9, 2, 0.0)):
        with pytest.raises(DataError, match="all-reduce"):
            allreduce_seconds(*wrong)
