"Supervoxels: time, memory and quality against scikit-image's SLIC on the same 32 channels"
import functools
import itertools
import multiprocessing
import os
import statistics
import threading

import numpy as np

from benchmarks.common import Row, clock, compare, interleaved, median, threads
from medvol_nb.phantoms import organ_features, organs
from medvol_nb.slic import slic3d
from medvol_nb.sv_metrics import supervoxel_metrics

REFERENCE = "skimage.segmentation.slic(compactness=0.01, sigma=3)"
TABLE = ((96, 100), (96, 400), (160, 400)) # rows of the specification: cube [voxel], segments asked for


@functools.lru_cache(1)
def phantom(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    body = organs((n, n, n), seed)
    return organ_features(body.img, seed), body.lbl


def skimage(features: np.ndarray, n_segments: int, compactness: float = 0.01, sigma: float = 3) -> np.ndarray:
    from skimage.segmentation import slic
    return slic(features, channel_axis=0, compactness=compactness, n_segments=n_segments, sigma=sigma)


def gemm_floor(n_voxels: int, channels: int, rounds: int = 10) -> float:
    "Seconds of the two products of 27 candidates with every voxel, at the speed of a large matrix product"
    import torch
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    speed = 2*1024**3/median(interleaved({"mm": lambda: a @ b}, 9)["mm"])
    return rounds*2*2*27*n_voxels*(channels + 4)/speed


def speed(full: bool = False) -> list[Row]:
    "The whole call from 32 channels at full resolution, smoothing, reduction and repairs included"
    n = 160 if full else 96
    features, _ = phantom(n, 0)
    rows = []
    with threads():
        k = int(skimage(features, 400).max())
        half = features[:, ::2, ::2, ::2].copy()
        what = f"{n}^3 with 32 channels, {k} segments; reference: {REFERENCE}"
        calls = (("slic_full", f"{what}", 1, features, features, 5.0, n**3),
                 ("slic_default", f"half-resolution grid and merging, {what} at full resolution", 2, features, features,
                  40.0, (n//2)**3),
                 ("slic_same_grid", f"{n//2}^3 with 32 channels; reference on the same grid", 1, half, half, 2.0,
                  (n//2)**3))
        for row, text, stride, ours, theirs, bar, size in calls:
            rows.append(compare(f"supervoxels.{row}", text, functools.partial(slic3d, ours, k, stride=stride),
                                functools.partial(skimage, theirs, 400), gemm_floor(size, 12), unit="s", bar=bar,
                                cpu=True, runs=3, warm_up=0,
                                note="processor seconds; floor: matrix products of ten rounds"))
    return rows


def scaling(full: bool = False) -> list[Row]:
    "One and two threads in turns; the labels are the same"
    import torch
    features, _ = phantom(160, 0)
    n, before = features.shape[1], torch.get_num_threads()
    def on(k: int, stride: int) -> np.ndarray:
        torch.set_num_threads(k)
        try: return slic3d(features, 300, stride=stride)
        finally: torch.set_num_threads(before)
    def products(k: int) -> None:
        torch.set_num_threads(k)
        try:
            for _ in range(8): torch.mm(ones, ones)
        finally: torch.set_num_threads(before)
    ones, rows = torch.ones(1024, 1024), []
    both = interleaved({"one": lambda: products(1), "two": lambda: products(2)}, 9)
    most = median(both["one"])/median(both["two"])
    for stride, name in ((1, "threads"), (2, "threads_default")):
        assert (on(1, stride) == on(2, stride)).all()
        rows.append(compare(f"supervoxels.{name}", f"{n}^3, stride {stride}, two threads; reference: one thread",
                            functools.partial(on, 2, stride), functools.partial(on, 1, stride), unit="s", runs=5,
                            bar=1.6,
                            note=f"wall seconds; large matrix products by two threads: {most:.2f}; load of the "
                                 f"machine meanwhile {os.getloadavg()[0]:.1f}"))
    return rows


def _peak(f, step: float = 0.002) -> tuple[float, object]:
    "Bytes that a call adds to the memory of this process at its peak"
    import psutil
    process, high, done = psutil.Process(), [0], threading.Event()
    base = process.memory_info().rss
    def watch() -> None:
        while not done.wait(step): high[0] = max(high[0], process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try: out = f()
    finally:
        done.set()
        watcher.join()
    return high[0] - base, out


def _memory(which: str, shape: tuple[int, int, int], queue) -> None:
    small = organ_features(organs(tuple(n//4 for n in shape)).img).astype(np.float16)
    features = np.empty((32, *shape), np.float16)
    for c in range(32): features[c] = small[c].repeat(4, 0).repeat(4, 1).repeat(4, 2)
    with threads():
        if which == "ours": queue.put(_peak(lambda: slic3d(features, 400, stride=2))[0])
        else:
            part = features.astype(np.float32)
            queue.put(_peak(lambda: skimage(part, 400))[0])


def memory(full: bool = False) -> list[Row]:
    "Peak above the input, each side in a process of its own"
    shape, reference_shape = (512, 512, 300), (128, 128, 100)
    context, peaks = multiprocessing.get_context("spawn"), {}
    for which, size in (("ours", shape), ("reference", reference_shape)):
        queue = context.Queue()
        process = context.Process(target=_memory, args=(which, size, queue))
        process.start()
        peaks[which] = queue.get()/1e9
        process.join()
    scaled = peaks["reference"]*np.prod(shape)/np.prod(reference_shape)
    limit = 1.5
    what = "512x512x300, 32 channels of float16, half-resolution grid; reference: scikit-image on " \
        f"{reference_shape}, scaled by the number of voxels"
    return [Row("supervoxels.memory", what, peaks["ours"], float(scaled), "GB", float(scaled/peaks["ours"]),
                bar=float(scaled/limit), note=f"peak above the input, at most {limit} GB asked")]


def _scored(truth: np.ndarray, f) -> tuple[dict, float]:
    "Measures of the labels that a call returns, and its processor seconds"
    out: list = []
    seconds = clock(lambda: out.append(f()))[1]
    return supervoxel_metrics(out[0], truth), seconds


def _trio(n: int, asked: int, compactness: float, seed: int) -> dict[str, tuple[dict, float]]:
    features, truth = phantom(n, seed)
    with threads():
        theirs = _scored(truth, functools.partial(skimage, features, asked, compactness))
        k = theirs[0]["k"]
        ours = {name: _scored(truth, functools.partial(slic3d, features, k, stride=stride))
                for name, stride in (("full", 1), ("half", 2))}
    assert all(m["k"] == k and m["disconnected"] == 0 for m, _ in ours.values())
    return {"reference": theirs, **ours}


def quality(full: bool = False) -> list[Row]:
    "ASA, UE and BR(2) at equal count on every row of the table, five seeds; one row a measure and setting"
    rows = []
    for (n, asked), compactness in itertools.product(TABLE if full else TABLE[:2], (0.01, 0.1)):
        trios = [_trio(n, asked, compactness, seed) for seed in range(5)]
        counts = sorted(t["full"][0]["k"] for t in trios)
        for name, measure in itertools.product(("full", "half"), ("asa", "ue", "br")):
            a, b = ([t[which][0][measure] for t in trios] for which in (name, "reference"))
            sign, best = (-1, "lower") if measure == "ue" else (1, "higher")
            margin = -0.01 if measure == "ue" else -0.005
            gain = [sign*(x - y) for x, y in zip(a, b)]
            faster = statistics.median(t["reference"][1]/t[name][1] for t in trios)
            x, y = statistics.mean(a), statistics.mean(b)
            rows.append(Row(f"supervoxels.quality_{n}_{asked}_{name}_c{compactness}_{measure}",
                            f"{measure.upper()} at equal count ({counts[0]} to {counts[-1]}), mean of 5 phantoms",
                            x, y, f"{best} is better", (x/y)**sign, bar=1.0,
                            note=f"gain of each: {', '.join(f'{g:+.3f}' for g in gain)}; "
                                 f"{sum(g >= margin for g in gain)} of 5 within {margin}; {faster:.0f} x faster"))
    return rows


ROWS = {"slic": speed, "threads": scaling, "memory": memory, "quality": quality}
