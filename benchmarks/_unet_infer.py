"Prediction of large volumes: blending, the cost beside the network, memory. Joined into benchmarks/unet.py"
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import Row, compare, threads
from benchmarks.reference.unet import blend_r1, blend_r3, starts_of

TARGETS = {"sheet": 1, "normals": 3}


class Prepared:
    "Answers made in advance: smooth values with a little noise, another one for every call; costs nothing"
    def __init__(self, patch, batch: int = 1):
        import torch
        rng = np.random.default_rng(0)
        grid = np.stack(np.meshgrid(*(np.linspace(0, 6, p) for p in patch), indexing="ij"))
        self.arrays, self.calls, self.batch = [], 0, batch
        for k in range(3):
            wave = np.sin(grid.sum(0) + k) + 0.02*rng.normal(size=patch)
            n = np.stack([np.sin(grid[0] + k), np.cos(grid[1]), wave]) + 0.02*rng.normal(size=(3, *patch))
            self.arrays.append({"sheet": (wave[None]/4 + 0.5).clip(0, 1).astype(np.float32),
                                "normals": (n/np.linalg.norm(n, axis=0)).astype(np.float32)})
        self.tensors = [{t: torch.from_numpy(a)[None] for t, a in d.items()} for d in self.arrays]

    def __call__(self, start) -> dict:
        self.calls += 1
        return self.arrays[self.calls % 3]

    def predict(self, x) -> dict:
        self.calls += 1
        return self.tensors[self.calls % 3]


def _settings(patch, chunk: int, overlap: float, **keys):
    from medvol_nb.zarrnet.config import InferenceParams, Target
    targets = {"sheet": Target(channels=1, activation="sigmoid"), "normals": Target(channels=3, kind="normals")}
    return targets, InferenceParams(patch_size=patch, chunks=(chunk,)*3, overlap=overlap, skip_empty=False,
                                    batch_size=1, **keys)


def _blending(name: str, reference, overlap: float, bar: float, full: bool, runs: int) -> Row:
    from medvol_nb.zarrnet.infer import predict_volume
    shape, patch, chunk = ((128, 384, 384), (64, 192, 192), 128) if full else ((64, 192, 192), (32, 96, 96), 64)
    volume = np.random.default_rng(1).integers(0, 255, shape).astype(np.uint8)
    targets, settings = _settings(patch, chunk, overlap)
    model, count = Prepared(patch), iter(range(10**6))
    with tempfile.TemporaryDirectory() as d, threads():
        def ours():
            report = predict_volume(model, volume, Path(d)/f"{next(count)}", targets, settings, checkpoint="prepared")
            assert report["complete"] and report["patches"] == len(starts_of(shape, patch, overlap))
            sizes.append(report["bytes"])
        def theirs(): reference(model, shape, patch, overlap, TARGETS, Path(d)/f"{next(count)}.zarr", chunk)
        sizes: list[int] = []
        ours() # imports and first calls
        what = f"{'x'.join(map(str, shape))}, 1 + 3 channels, patch {'x'.join(map(str, patch))}, overlap {overlap}, " \
               f"processor time; reference: {reference.__name__} on disk"
        row = compare(name, what, ours, theirs, unit="s", runs=runs, warm_up=0, cpu=True, bar=bar)
        row.note = f"ours reads the input and flushes to disk, too; {sizes[0]/1e6:.0f} MB written, nothing temporary"
    return row


def blend_against_r1(full: bool = False) -> list[Row]: return [_blending("unet.blend_r1", blend_r1, 0.25, 10, full, 3)]


def blend_against_r3(full: bool = False) -> list[Row]:
    return [_blending("unet.blend_r3", blend_r3, 0.25, 3, full, 3),
            _blending("unet.blend_r3_half", blend_r3, 0.5, 3, full, 3)]


def overhead(full: bool = False) -> list[Row]:
    "A network with about the work a voxel of the shared 32-64-128-256 prototype, or a sixth of it"
    import torch
    from torch import nn

    from medvol_nb.grid import Grid, take_patch
    from medvol_nb.zarrnet.infer import predict_volume
    wide = 48 if full else 24
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            def conv(a, b): return nn.Sequential(nn.Conv3d(a, b, 3, padding=1), nn.InstanceNorm3d(b), nn.LeakyReLU())
            self.body = nn.Sequential(conv(1, wide), conv(wide, wide), conv(wide, wide))
            self.head = nn.Conv3d(wide, 4, 1)

        def predict(self, x):
            y = self.head(self.body(x))
            return {"sheet": y[:, :1].sigmoid(), "normals": nn.functional.normalize(y[:, 1:], dim=1)}
    shape, patch, overlap = (64, 128, 128), (32, 64, 64), 0.25
    volume = np.random.default_rng(1).random(shape, np.float32)
    targets, settings = _settings(patch, 64, overlap)
    net, grid, count = Net().eval(), Grid(shape, patch, overlap), iter(range(10**6))
    with tempfile.TemporaryDirectory() as d, threads():
        def ours(): predict_volume(net, volume, Path(d)/f"{next(count)}", targets, settings, checkpoint="net")
        def forward():
            with torch.inference_mode():
                for s in grid: net.predict(torch.from_numpy(take_patch(volume, s, patch))[None, None])
        row = compare("unet.predict_overhead", f"{'x'.join(map(str, shape))} in {len(grid)} patches, processor time; "
                      "reference: the forward passes alone", ours, forward, unit="s", runs=3, cpu=True, bar=1/1.15)
    row.note = f"the whole prediction takes {row.ours/row.reference:.3f} of the forward passes"
    return [row]


MEMORY = """
import json, re, sys, time
from pathlib import Path
import numpy as np, torch, zarr
torch.set_num_threads(1)
from medvol_nb.zarrnet.config import InferenceParams, Target
from medvol_nb.zarrnet.infer import predict_volume
from medvol_nb.zarrnet.io import open_volume
def status(key): return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])/1024
class Model:
    def predict(self, x): return {"sheet": x/255, "normals": x.expand(-1, 3, -1, -1, -1)}
targets = {"sheet": Target(channels=1, activation="sigmoid"), "normals": Target(channels=3, kind="normals")}
source, out, gb = sys.argv[1], sys.argv[2], float(sys.argv[3])
s = InferenceParams(patch_size=(64, 192, 192), overlap=0.25, max_memory_gb=gb, batch_size=1)
before, began = status("VmRSS"), time.perf_counter()
report = predict_volume(Model(), open_volume(source), out, targets, s, checkpoint="model")
print(json.dumps({"peak": status("VmHWM"), "before": before, "seconds": time.perf_counter() - began,
                  "columns": report["of"], "patches": report["patches"], "complete": report["complete"]}))
"""


def _memory(name: str, shape, stored, gb: float) -> Row:
    import zarr
    with tempfile.TemporaryDirectory() as d:
        group = zarr.create_group(f"{d}/in.zarr")
        array = group.create_array("a", shape=shape, chunks=(128,)*3, dtype="u1", fill_value=0)
        rng = np.random.default_rng(0)
        for index in stored:
            where = tuple(slice(128*k, 128*k + 128) for k in index)
            array[where] = rng.integers(1, 255, array[where].shape).astype(np.uint8)
        run = subprocess.run([sys.executable, "-c", MEMORY, f"{d}/in.zarr", f"{d}/out", str(gb)], text=True,
                             capture_output=True, cwd=Path(__file__).resolve().parents[1])
        assert run.returncode == 0, run.stderr[-2000:]
        r = json.loads(re.findall(r"(?m)^\{.*\}$", run.stdout)[-1])
    limit = gb*1e9/2**20 + 300
    what = f"peak of a process that predicts {'x'.join(map(str, shape))} with {len(stored)} stored chunks, " \
           f"max_memory_gb {gb:g}; reference: that and 300 MB"
    note = f"{r['before']:.0f} MB before it started; {r['columns']} columns, {r['patches']} patches, " \
           f"{r['seconds']:.0f} s"
    return Row(name, what, r["peak"], limit, "MB", limit/r["peak"], bar=1, runs=1, note=note)


def memory(full: bool = False) -> list[Row]:
    few = [(3, 4, 5), (3, 4, 6), (3, 5, 5), (16, 15, 17), (31, 31, 31), (0, 0, 0)]
    rows = [_memory("unet.predict_memory", (4096, 4096, 4096), few, 2)]
    if full:
        every = [tuple(i) for i in np.ndindex(2, 16, 16)]
        rows += [_memory("unet.predict_memory_real", (256, 2048, 2048), every, gb) for gb in (1, 2)]
    return rows


ROWS = {"blend_r1": blend_against_r1, "blend_r3": blend_against_r3, "predict_overhead": overhead,
        "predict_memory": memory}
