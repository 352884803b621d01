# %% [markdown]
# # What many workers cost
#
# > How the time of a job falls with the number of workers, fitted from small runs, and what stops it from falling.
#
# Every command that goes through many items takes `--dask ADDRESS`: its [map](02_parallel.ipynb) then runs on the
# workers of a cluster. Trainings are started with `torchrun`. The manual's page *On a cluster* says how; this page
# answers the question before that one: is it worth it? A hundred workers are never a hundred times as fast, and the
# reasons can be measured on a machine with two cores. Some part of a job is done by one process alone (Amdahl 1967).
# The caller and the scheduler hand out tasks one by one. All workers read from the same disks. In a training all
# workers wait until the gradients of all have been added up.

# %%
#| default_exp distributed

# %%
#| export
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medvol_nb.core import DataError
from medvol_nb.parallel import on_cluster, pmap

# %%
import numpy as np

from medvol_nb import plot
from medvol_nb.core import close, raises

# %% [markdown]
# ## Four costs
# A job has $m$ items; one worker needs $t$ seconds for one of them. Before and after the items one process works for
# $s$ seconds: it reads the list, loads a model, closes a store. For each item the caller and the scheduler need $c$
# seconds: they pack, send, receive, and write a line of the ledger. All items together move $B$ bytes of a storage that
# gives all workers together $b$ bytes a second. Then $n$ workers need
#
# $$T(n) = s + \max\left(\lceil m/n \rceil\, t,\; m\,c,\; B/b\right).$$
#
# The three in the bracket happen at the same time, so the slowest counts, not their sum. Items are whole: with 100
# workers, 101 items take as long as 200. Amdahl's law is the case $c = 0$, $B = 0$ with many items: no number of
# workers makes a job faster than $s$.

# %%
#| export
@dataclass(frozen=True)
class Scaling:
    "What a job over many items costs, whoever does it"
    items: int # number of items; each is a task
    item: float # of one worker for one item [s]
    serial: float = 0.0 # of one process, before and after the items [s]
    task: float = 0.0 # of caller and scheduler for one item, one after the other [s]
    stored: float = 0.0 # what all items together read and write [byte]
    bandwidth: float = math.inf # of the storage, for all workers together [byte/s]

def costs(
    job: Scaling, # see `fit_scaling`
    workers: int, # that share the items
) -> dict[str, float]: # 'serial', and 'work', 'tasks', 'storage', which happen at the same time [s]
    "The four costs of a job"
    if workers < 1: raise DataError(f"workers: at least 1 is needed, got {workers}")
    return {"serial": job.serial, "work": math.ceil(job.items/workers)*job.item, "tasks": job.items*job.task,
            "storage": job.stored/job.bandwidth}

def predict_seconds(
    job: Scaling, # see `fit_scaling`
    workers: int, # that share the items
) -> float: # [s]
    "How long a job takes"
    serial, *together = costs(job, workers).values()
    return serial + max(together)

def limit_of(
    job: Scaling, # see `fit_scaling`
    workers: int, # that share the items
) -> str: # 'serial', 'work', 'tasks' or 'storage'
    "The largest cost of a job: what to improve first"
    found = costs(job, workers)
    return max(found, key=found.get)

# %%
scans = Scaling(items=10_000, item=12.0, serial=20.0, task=0.002, stored=10_000*60e6, bandwidth=1e9)
{n: (round(predict_seconds(scans, n)), limit_of(scans, n)) for n in (1, 10, 100, 1000, 10_000)}

# %% [markdown]
# Ten thousand scans of 12 s and 60 MB: a day and a half for one worker. A hundred need 20 minutes; beyond 200 the
# storage is at its limit, and more workers only wait.

# %%
amdahl = Scaling(items=10**6, item=1e-3, serial=10.0)
assert close(predict_seconds(amdahl, 1)/predict_seconds(amdahl, 10**6), 101, 0.02)
assert predict_seconds(Scaling(101, 1.0), 100) == predict_seconds(Scaling(200, 1.0), 100) == 2
assert limit_of(scans, 100) == "work" and limit_of(scans, 1000) == "storage"
assert limit_of(replace(scans, bandwidth=math.inf, serial=0), 10_000) == "tasks"
with raises(DataError, match="at least 1"): predict_seconds(scans, 0)

# %% [markdown]
# ## From runs to costs
# Two runs, with one and with two workers, give $s$ and $t$: two equations, two unknowns. More runs give a least-squares
# fit; neither cost can be negative. $c$, $B$ and $b$ are measured by themselves and given. If they would already
# decide the runs at hand, the runs say nothing about $t$, and that is an error.

# %%
#| export
def fit_scaling(
    workers: Sequence[int], # of each run
    seconds: Sequence[float], # that each run took [s]
    items: int, # that each run did
    *,
    task: float = 0.0, # see `task_seconds` [s]
    stored: float = 0.0, # what all items together read and write [byte]
    bandwidth: float = math.inf, # of the storage, for all workers together [byte/s]
) -> Scaling: # with the serial part and the time of an item
    "Find the costs of a job from small runs of it"
    from scipy.optimize import nnls
    if len(workers) != len(seconds) or len(set(workers)) < 2:
        raise DataError(f"scaling: runs with two different numbers of workers are needed, got {list(workers)} and "
                        f"{len(seconds)} times")
    if items < 1 or min(workers) < 1 or min(seconds) <= 0:
        raise DataError("scaling: items, workers and seconds must be positive")
    (serial, item), _ = nnls([[1.0, math.ceil(items/n)] for n in workers], list(seconds))
    job = Scaling(items, float(item), float(serial), task, stored, bandwidth)
    for n in workers:
        found = costs(job, n)
        if found["work"] < max(found["tasks"], found["storage"]):
            raise DataError(f"scaling: {n} workers are bound by {max(('tasks', 'storage'), key=found.get)}, so that "
                            "these runs do not tell what an item costs. Measure with larger items")
    return job

def scaled(
    job: Scaling, # see `fit_scaling`
    items: int, # that the large run has
) -> Scaling: # the same costs for each item
    "The same job with another number of items"
    return replace(job, items=items, stored=job.stored*items/job.items)

# %%
true = Scaling(items=24, item=0.5, serial=1.5)
fitted = fit_scaling([1, 2], [predict_seconds(true, n) for n in (1, 2)], 24)
fitted, round(predict_seconds(scaled(fitted, 10_000), 100), 1)

# %%
assert close(fitted.item, 0.5, 1e-9) and close(fitted.serial, 1.5, 1e-9)
assert fit_scaling([1, 2], [10.0, 4.8], 24).serial == 0 # faster than twice as fast: nothing is serial
with raises(DataError, match="two different numbers"): fit_scaling([2, 2], [1.0, 1.1], 24)
with raises(DataError, match="bound by tasks"): fit_scaling([1, 2], [1.0, 0.6], 1000, task=0.002)

# %% [markdown]
# Two runs carry far, and their errors do as well. With many items $s = 2\,T(2) - T(1)$: one per cent of error in $T(2)$
# is one per cent of $T(1)$ in $s$, which is as much as all items take with a hundred workers. So a prediction from such
# runs is a range, not a number. What narrows it is a longer run, or a third one with more workers.

# %%
few = Scaling(items=1000, item=1.0, serial=10.0)
exact = np.array([predict_seconds(few, n) for n in (1, 2)])
def off_by(percent): return predict_seconds(fit_scaling([1, 2], exact*[1, 1 + percent/100], 1000), 100)
spread = {percent: round(off_by(percent), 1) for percent in (-2, -1, 0, 1, 2)}
spread

# %%
assert close(spread[0], 20, 1e-6) and spread[1] - spread[0] > 9 # one per cent of T(2) is half of T(100)

# %% [markdown]
# ## What a task costs
# Items that do nothing show what remains: packing, two messages, the scheduler's book-keeping, and the caller's. It is
# paid for one task after the other, so its inverse is the largest number of items a second, with however many workers.

# %%
#| export
def _nothing(_: int) -> None: return None

def task_seconds(
    dask: str, # address of a Dask scheduler
    n: int = 400, # tasks
) -> float: # [s]
    "What a task costs the caller and the scheduler"
    with on_cluster(dask):
        pmap(_nothing, range(8)) # workers import what they need
        start = time.perf_counter()
        pmap(_nothing, range(n))
    return (time.perf_counter() - start)/n

# %% [markdown]
# ## Measured, fitted, predicted
# Clusters of one and of two processes, and items that wait for a tenth of a second, as those do that read from a slow
# storage: what else this machine does hardly matters then. What real commands take is in the
# benchmarks.

# %%
from distributed import LocalCluster

def wait(_): time.sleep(0.1)

measured = {}
for n in (1, 2):
    with LocalCluster(processes=True, n_workers=n, threads_per_worker=1, dashboard_address=None) as cluster:
        task = task_seconds(cluster.scheduler_address, 200)
        with on_cluster(cluster.scheduler_address):
            start = time.perf_counter()
            pmap(wait, range(16))
            measured[n] = time.perf_counter() - start
{"a task [ms]": round(1e3*task, 2), "seconds": {n: round(t, 3) for n, t in measured.items()}}

# %% [markdown]
# An item that takes a second hides a few milliseconds of scheduling up to a few hundred workers. Items of ten ms
# should be put together before they are sent; [the patch finder](52_zarrnet_finder.ipynb) sends eight blocks in one.
# Here the curve for 1000 items bends where the scheduler cannot hand out more.

# %%
job = fit_scaling(list(measured), list(measured.values()), 16, task=task)
many = scaled(job, 1000)
n = np.unique(np.geomspace(1, 1000, 60).astype(int))
def times_as_fast(job): return [predict_seconds(job, 1)/predict_seconds(job, int(k)) for k in n]
speed = {"ideal": (n, n.astype(float)), "items of 0.1 s": (n, times_as_fast(many)),
         "items of 1 s": (n, times_as_fast(replace(many, item=1.0)))}
fig = plot.curves(speed, xlabel="workers", ylabel="times as fast as one", title="1000 items, predicted from 16",
                  logx=True, logy=True)
fig.axes[0].plot(list(measured), [measured[1]/t for t in measured.values()], "ko", ms=5, label="measured")
fig.axes[0].legend(fontsize=8)
fig

# %%
{"item [s]": round(job.item, 3), "serial [s]": round(job.serial, 3), "limit": limit_of(many, 100),
 "100 workers [s]": round(predict_seconds(many, 100), 2)}

# %%
assert 1e-4 < task < 0.1 and 0.05 < job.item < 0.3
assert all(close(predict_seconds(job, k), t, 0.3*t) for k, t in measured.items())

# %% [markdown]
# ## A training
# In a training each worker computes the gradients of its part of a batch; then all need the mean. In a *ring* each
# worker sends to its neighbour alone: the gradients are cut into $n$ pieces, which go round once to be added up and
# once more to be known everywhere. Each worker sends $2(n-1)/n$ times the gradients, the least that is possible
# (Patarasuk and Yuan 2009), in $2(n-1)$ messages. Written out:

# %%
def ring(gradients):
    n, sent = len(gradients), 0
    pieces = [np.array_split(g.copy(), n) for g in gradients]
    for turn in range(2*(n - 1)):
        moved = [(k, (k - turn) % n if turn < n - 1 else (k + 1 - (turn - n + 1)) % n) for k in range(n)]
        messages = [pieces[k][p].copy() for k, p in moved]
        for (k, p), message in zip(moved, messages):
            to = pieces[(k + 1) % n]
            to[p] = to[p] + message if turn < n - 1 else message
        sent += messages[0].nbytes
    return [np.concatenate(p) for p in pieces], sent

gradients = [np.arange(12.0)*(k + 1) for k in range(4)]
summed, sent = ring(gradients)
assert all(np.array_equal(s, sum(gradients)) for s in summed) and sent == 2*3/4*gradients[0].nbytes
sent, gradients[0].nbytes

# %%
#| export
def allreduce_seconds(
    payload: float, # size of the gradients [byte]
    workers: int, # in the ring
    bandwidth: float, # of the slowest link, one way [byte/s]
    latency: float = 0.0, # of a message [s]
) -> float: # [s]
    """Time until all workers have the sum of all gradients

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009: 2 (n - 1)/n of the
    payload over each link, in 2 (n - 1) messages. Real trainings hide a part of it behind the backward pass.
    """
    if workers < 1 or bandwidth <= 0: raise DataError(f"all-reduce: {workers} workers, {bandwidth} byte/s")
    return 2*(workers - 1)/workers*payload/bandwidth + 2*(workers - 1)*latency

def step_seconds(
    compute: float, # forward and backward pass of one worker's part of the batch [s]
    payload: float, # size of the gradients [byte]
    workers: int, # processes, each with a part of the same size
    bandwidth: float, # of the slowest link, one way [byte/s]
    latency: float = 0.0, # of a message [s]
) -> float: # [s]
    "Longest time of a training step: nothing is sent before the backward pass is over"
    return compute + allreduce_seconds(payload, workers, bandwidth, latency)

# %% [markdown]
# A U-Net with 30 million parameters has gradients of 120 MB. If a step takes half a second to compute, a hundred
# workers in a ten-gigabit network do the work of 72, with a step that is 0.2 s longer. The term with the bandwidth
# hardly grows after the first few workers; the one with the number of messages does.

# %%
n = np.unique(np.geomspace(1, 1000, 60).astype(int))
def share(bandwidth, latency): return [k*0.5/step_seconds(0.5, 120e6, int(k), bandwidth, latency) for k in n]
curves = {"ideal": (n, n.astype(float)), "100 Gbit/s, 5 µs": (n, share(12.5e9, 5e-6)),
          "10 Gbit/s, 30 µs": (n, share(1.25e9, 3e-5)), "1 Gbit/s, 100 µs": (n, share(1.25e8, 1e-4))}
plot.curves(curves, xlabel="workers", ylabel="times the samples a second", title="training, 30 million parameters",
            logx=True, logy=True)

# %%
assert step_seconds(0.5, 120e6, 1, 1.25e9) == 0.5
assert close(allreduce_seconds(120e6, 2, 1.25e9), 120e6/1.25e9, 1e-9) # two workers swap halves twice
assert allreduce_seconds(120e6, 1000, 1.25e9) < 2*120e6/1.25e9 # never more than twice the gradients
round(100*0.5/step_seconds(0.5, 120e6, 100, 1.25e9, 3e-5), 1)

# %% [markdown]
# ## What follows
# * Items should take a second or more each, and be many more than workers: the last ones are waited for.
# * Load a model in the worker, never send it with each item; let workers read from the storage, not through the caller.
# * Past the storage's bandwidth more workers are waste. Copy to local disks, or store less: chunks, uint8, compression.
# * *On a cluster* has what the commands measured, and what that predicts for a hundred workers.
