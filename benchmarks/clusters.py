"""Commands on Dask clusters of one and of two separate processes, and what that predicts for a hundred

Both clusters are up and warm; runs take turns. Two cores are shared by caller, scheduler and workers, so seconds are
those of processors: of caller and scheduler, plus of the busiest worker. Wall seconds and load are in the note.
"""
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Row, median, threads
from medvol_nb import phantoms
from medvol_nb.core import human_bytes, rng_for, write_json
from medvol_nb.distributed import fit_scaling, limit_of, predict_seconds, scaled, task_seconds
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.volume import write_volume

SHARED = 1e9 # of the storage in the predictions, for all workers together [byte/s]
LARGE = 100 # workers


@contextlib.contextmanager
def clusters() -> Iterator[dict[int, str]]:
    "Addresses of a scheduler with one worker and of one with two"
    from distributed import LocalCluster
    with contextlib.ExitStack() as stack:
        kind = {"processes": True, "threads_per_worker": 1, "dashboard_address": ":0"}
        yield {n: stack.enter_context(LocalCluster(n_workers=n, **kind)).scheduler_address for n in (1, 2)}


def spent(client: Any) -> tuple[float, dict[str, float]]:
    "Processor seconds so far of this process, in which caller and scheduler are, and of each worker"
    return time.process_time(), client.run(time.process_time)


def once(call: Callable[[], object], client: Any) -> tuple[float, float]:
    "Processor seconds of caller and busiest worker together, and wall seconds"
    before, start = spent(client), time.perf_counter()
    call()
    wall, after = time.perf_counter() - start, spent(client)
    return after[0] - before[0] + max(after[1][w] - before[1][w] for w in before[1]), wall


def task_cost(dask: str, n: int = 300) -> float:
    "Processor seconds of caller and scheduler for a task that does nothing"
    start = time.process_time()
    task_seconds(dask, n)
    return (time.process_time() - start)/(n + 8)


def row(name: str, what: str, items: int, large: int, stored: int, call: Callable[[Path, str], object], runs: int
        ) -> Row:
    "Time `call` with an output folder and an address on both clusters, and predict `large` items"
    from distributed import Client
    with tempfile.TemporaryDirectory() as d, clusters() as at, threads(), contextlib.ExitStack() as stack:
        clients = {n: stack.enter_context(Client(a)) for n, a in at.items()}
        times: dict[int, list] = {n: [] for n in at}
        for k in range(runs + 1): # the first is a warm-up
            for n in at:
                found = once(lambda n=n, k=k: call(Path(d)/f"{k}-{n}", at[n]), clients[n])
                if k: times[n].append(found)
        task = task_cost(at[2])
    seconds, wall = ({n: median(t, k) for n, t in times.items()} for k in (0, 1))
    job = fit_scaling(list(seconds), list(seconds.values()), items, task=task, stored=stored, bandwidth=SHARED)
    many = scaled(job, large)
    full = job.bandwidth*job.item*items/stored
    ratios = [a[0]/b[0] for a, b in zip(times[1], times[2])]
    note = (f"an item {job.item:.3g} s, serial {job.serial:.2g} s, a task {1e3*task:.1f} ms; predicted for {large} "
            f"items: 1 worker {predict_seconds(many, 1):.0f} s, {LARGE} workers {predict_seconds(many, LARGE):.0f} s, "
            f"bound by {limit_of(many, LARGE)}; {human_bytes(stored//items)} an item: 1 GB/s is full with {full:.0f} "
            f"workers; wall {wall[2]:.3g} and {wall[1]:.3g} s at a load of {os.getloadavg()[0]:.1f}")
    return Row(f"clusters.{name}", f"{what}; two workers, reference: one", seconds[2], seconds[1], "s",
               seconds[1]/seconds[2], note=note, runs=runs, spread=(min(ratios), max(ratios)))


def bodies(folder: Path, n: int, shape: tuple[int, int, int]) -> int:
    "Noisy CT scans with labels and a list of them; bytes of the scans"
    body = phantoms.abdomen(shape)
    for k in range(n):
        noise = rng_for(k, "noise").normal(0, 12, shape)
        write_volume(Volume((body.img + noise).astype(np.int16), affine_from(body.spacing)), folder/f"scan_{k}.nii.gz")
        write_volume(Volume(body.lbl, affine_from(body.spacing)), folder/f"label_{k}.nii.gz")
    items = [{"image": f"scan_{k}.nii.gz", "label": f"label_{k}.nii.gz", "fold": k % 5} for k in range(n)]
    names = {str(i): name for i, name in body.names.items()}
    write_json(folder/"list.json", {"name": "drawn", "label_dict": names, "training": items, "testing": []})
    return sum(p.stat().st_size for p in folder.glob("scan_*"))


def verification(full: bool = False) -> list[Row]:
    from medvol_nb.verify import verify
    n = 48 if full else 10
    with tempfile.TemporaryDirectory() as d:
        stored = bodies(Path(d), n, (320, 320, 160))
        return [row("verify", f"datalists verify --level full, {n} pairs of 320 x 320 x 160", n, 10_000, stored,
                    lambda _, dask: verify([Path(d)/"list.json"], level="full", dask=dask), 3 if full else 1)]


def supervoxels(full: bool = False) -> list[Row]:
    from medvol_nb.sv_batch import batch_infer
    n = 32 if full else 8
    with tempfile.TemporaryDirectory() as d:
        stored = bodies(Path(d), n, (128, 128, 64))
        def call(out: Path, dask: str) -> None:
            batch_infer(Path(d)/"list.json", d, output_dir=out, features="intensity", dask=dask)
        return [row("supervoxels", f"supervoxels batch-infer --features intensity, {n} scans of 128 x 128 x 64", n,
                    10_000, stored, call, 3 if full else 1)]


def pairs(full: bool = False) -> list[Row]:
    from medvol_nb.synth.generate import generate
    from medvol_nb.synth.stores import SHARD
    from medvol_nb.synth.templates import procedural_bank
    shards = 16 if full else 4
    n, sizes = shards*SHARD, []
    with tempfile.TemporaryDirectory() as d:
        procedural_bank(48, seed=0, size=(20, 60)).save(Path(d)/"bank")
        def call(out: Path, dask: str | None) -> None:
            generate(out, n_ensembles=n, templatedir=Path(d)/"bank", side_length=64, dask=dask)
            sizes.append(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()))
        call(Path(d)/"size", None)
        what = f"synth generate, {shards} shards of {SHARD} pairs of 64^3"
        return [row("synth", what, shards, 7500, sizes[0], call, 3 if full else 1)] # 120000 pairs, as published


def task(full: bool = False) -> list[Row]:
    "Its inverse is the largest number of items a second"
    with clusters() as at:
        one, two = (1e3*task_cost(a) for a in at.values())
    note = (f"processor time of caller and scheduler; at most {1e3/two:.0f} items a second, with however many workers; "
            f"load of the machine meanwhile {os.getloadavg()[0]:.1f}")
    what = "300 items that do nothing; two workers, reference: one"
    return [Row("clusters.task", what, two, one, "ms/item", one/two, note=note, runs=1)]


ROWS = {"task": task, "verify": verification, "supervoxels": supervoxels, "synth": pairs}
