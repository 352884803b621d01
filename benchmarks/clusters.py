"""Commands on Dask clusters of one and of two separate processes, and what that predicts for a hundred

Both clusters are up and warm; runs take turns. The reference of each row is the cluster of one. The machine has two
cores, which caller and scheduler share with the workers.
"""
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import Row, interleaved, median, threads
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


def row(name: str, what: str, items: int, large: int, stored: int, call: Callable[[Path, str], object], runs: int = 3
        ) -> Row:
    "Time `call` with an output folder and an address on both clusters, and predict `large` items"
    with tempfile.TemporaryDirectory() as d, clusters() as at, threads():
        names = iter(range(1000))
        def run(n: int) -> None: call(Path(d)/f"out{next(names)}", at[n])
        times = interleaved({n: lambda n=n: run(n) for n in at}, runs)
        task = task_seconds(at[2])
    seconds = {n: median(t) for n, t in times.items()}
    job = fit_scaling(list(seconds), list(seconds.values()), items, task=task, stored=stored, bandwidth=SHARED)
    many = scaled(job, large)
    full = job.bandwidth*job.item*items/stored
    ratios = [a[0]/b[0] for a, b in zip(times[1], times[2])]
    note = (f"an item {job.item:.3g} s, serial {job.serial:.2g} s, a task {1e3*task:.1f} ms; predicted for {large} "
            f"items: 1 worker {predict_seconds(many, 1):.0f} s, {LARGE} workers {predict_seconds(many, LARGE):.0f} s, "
            f"bound by {limit_of(many, LARGE)}; {human_bytes(stored//items)} an item: 1 GB/s is full with {full:.0f} "
            f"workers; load of the machine meanwhile {os.getloadavg()[0]:.1f}")
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
    n = 48 if full else 16
    with tempfile.TemporaryDirectory() as d:
        stored = bodies(Path(d), n, (320, 320, 160))
        return [row("verify", f"datalists verify --level full, {n} pairs of 320 x 320 x 160", n, 10_000, stored,
                    lambda _, dask: verify([Path(d)/"list.json"], level="full", dask=dask))]


def supervoxels(full: bool = False) -> list[Row]:
    from medvol_nb.sv_batch import batch_infer
    n = 32 if full else 12
    with tempfile.TemporaryDirectory() as d:
        stored = bodies(Path(d), n, (160, 160, 96))
        def call(out: Path, dask: str) -> None:
            batch_infer(Path(d)/"list.json", d, output_dir=out, features="intensity", dask=dask)
        return [row("supervoxels", f"supervoxels batch-infer --features intensity, {n} scans of 160 x 160 x 96", n,
                    10_000, stored, call)]


def pairs(full: bool = False) -> list[Row]:
    from medvol_nb.synth.generate import generate
    from medvol_nb.synth.stores import SHARD
    from medvol_nb.synth.templates import procedural_bank
    shards = 16 if full else 8
    n, sizes = shards*SHARD, []
    with tempfile.TemporaryDirectory() as d:
        procedural_bank(48, seed=0, size=(20, 60)).save(Path(d)/"bank")
        def call(out: Path, dask: str | None) -> None:
            generate(out, n_ensembles=n, templatedir=Path(d)/"bank", side_length=64, dask=dask)
            sizes.append(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()))
        call(Path(d)/"size", None)
        what = f"synth generate, {shards} shards of {SHARD} pairs of 64^3"
        return [row("synth", what, shards, 7500, sizes[0], call)] # 120000 pairs, as published


def task(full: bool = False) -> list[Row]:
    "What nothing costs; its inverse is the largest number of items a second"
    with clusters() as at:
        times = {n: [task_seconds(a, 1000) for _ in range(3)] for n, a in at.items()}
    one, two = (sorted(t)[1]*1e3 for t in times.values())
    note = f"at most {1e3/two:.0f} items a second, with however many workers; load {os.getloadavg()[0]:.1f}"
    what = "1000 items that do nothing; two workers, reference: one"
    return [Row("clusters.task", what, two, one, "ms/item", one/two, note=note, runs=3)]


ROWS = {"task": task, "verify": verification, "supervoxels": supervoxels, "synth": pairs}
