"""Prediction of volumes under faults: killed at any step, two processes on one output, a full disk at any write."""
import os
import random
import re
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from medvol_nb.core import lock, rng_for

from .injectors import Zygote
from .rows import SilentlyWrong, sampled

# ---------------------------------------------------------------- what runs in children

class Model:
    "Answers depend on the place in the patch, so a patch that is added twice or not at all would show"
    def predict(self, x):
        import torch
        ramp = torch.linspace(0, 1, x.shape[-1])
        return {"sheet": (0.6*x + 0.4*ramp).clamp(0, 1),
                "normals": torch.nn.functional.normalize(torch.cat([x - 0.5, x*ramp + 0.1, 0.3 - x], 1), dim=1)}


class Full:
    "From the write with number `at` on, counted below `folder`, no file can grow"
    def __init__(self, folder: str, at: int):
        self.folder, self.at, self.count = folder, at, 0
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if event != "open" or not str(args[0]).startswith(self.folder): return
        if not (isinstance(args[1], str) and re.search("[wax+]", args[1])): return
        self.count += 1
        if self.count == self.at: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(1)[1]))


def predict(source: str, out: str, full_at: int = 0, **keys) -> list:
    "Predict a volume in four columns; returns what was written and the number of writes"
    import torch

    from medvol_nb.zarrnet import infer
    from medvol_nb.zarrnet.config import InferenceParams, Target
    from medvol_nb.zarrnet.io import open_volume
    torch.set_num_threads(1)
    infer._fit_columns = lambda *a: (8, 16)
    full = Full(out, full_at)
    targets = {"sheet": Target(channels=1, activation="sigmoid"), "normals": Target(channels=3, kind="normals")}
    settings = InferenceParams(**{"patch_size": (8, 8, 8), "chunks": (8, 8, 8), "overlap": 0.5, "skip_empty": False,
                                  "batch_size": 2} | keys)
    report = infer.predict_volume(Model(), open_volume(source), out, targets, settings)
    return [report["complete"], full.count]


def predict_with(source: str, out: str, keys: dict) -> list: return predict(source, out, **keys)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- fixtures

@pytest.fixture(scope="module")
def predictor():
    z = Zygote("torch", "zarr", "zarr.codecs", "zarr.storage", "tifffile", "medvol_nb.zarrnet.infer", __name__)
    yield z
    z.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    from medvol_nb.geometry import Volume, affine_from
    from medvol_nb.stores import write_zarr
    data = rng_for(42, "volume").random((12, 14, 20), dtype=np.float32)
    return str(write_zarr(Volume(data, affine_from(1.0, axes="zyx"), "zyx"), tmp_path_factory.mktemp("in")/"in.zarr",
                          chunks=8))


# ---------------------------------------------------------------- 42

@sampled(20, 4)
def test_row_42_killed_at_any_step(count, instances, tmp_path, predictor, source):
    "Died before a seeded file step, once or twice, then the same command: the same bytes, nothing else left"
    formats = ("zarr", "ome-zarr", "tif")
    want, steps = {}, {}
    for kind in formats:
        (tmp_path/kind).mkdir()
        keys = {"output_format": kind}
        end = predictor(f"{__name__}:predict_with", source, tmp_path/kind, keys, folder=tmp_path/kind)
        assert end.value and end.value[0], end
        want[kind], steps[kind] = files(tmp_path/kind), end.steps
        assert len(want[kind]) > 2
    draws = random.Random(42)
    for k in range(count):
        kind = formats[k % 3]
        out, at = tmp_path/f"{k}", 1 + (k*steps[kind] + draws.randrange(steps[kind]))//count
        out.mkdir()
        with instances(f"{kind}, step {at} of {steps[kind]}"):
            end = predictor(f"{__name__}:predict_with", source, out, {"output_format": kind}, folder=out, kill_at=at)
            assert end.killed, end
            if k % 2: predictor(f"{__name__}:predict_with", source, out, {"output_format": kind}, folder=out,
                                kill_at=draws.randrange(1, steps[kind]//2))
            end = predictor(f"{__name__}:predict_with", source, out, {"output_format": kind})
            assert end.value and end.value[0], end
            got = files(out)
            if got != want[kind]:
                differ = sorted(n for n in {*got, *want[kind]} if got.get(n) != want[kind].get(n))
                raise SilentlyWrong(f"{differ[:5]}")
    instances.check(count)


def test_row_42_two_processes(instances, tmp_path, predictor, source):
    "A second process is refused while the first lives, whatever part it is; the lock of a dead one is broken"
    out = tmp_path/"out"
    out.mkdir()
    progress = out/"predictions.zarr"/".progress"
    def second(**keys): return predictor(f"{__name__}:predict_with", source, out, keys)
    with instances("while it starts"), lock(out/"predictions.zarr"):
        end = second()
        if end.value: raise SilentlyWrong("both write")
        assert "Locked" in end.error and f"owner {lock_owner(out/'predictions.zarr.lock')}" in end.message, end
        assert not progress.exists()
    end = predictor(f"{__name__}:predict_with", source, out, {}, folder=out, kill_at=300)
    assert end.killed and (out/"predictions.zarr.lock").exists() and list(progress.glob("c*.lock"))
    left = next(progress.glob("c*.lock")).stem
    with instances("the dead one's lock"):
        os.unlink(progress/f"{left}.lock")
        with lock(progress/left):
            before = files(out)
            end = second()
            if end.value: raise SilentlyWrong("both write")
            assert "Locked" in end.error and left in end.message, end
            kept = {n: b for n, b in files(out).items() if not n.endswith(".lock")}
            assert {n: b for n, b in before.items() if not n.endswith(".lock")}.items() <= kept.items()
    with instances("two of the same part"), lock(progress/"part-1-of-2"):
        end = second(part_id=1, num_parts=2)
        if end.value: raise SilentlyWrong("both write")
        assert "Locked" in end.error and "part-1-of-2" in end.message, end
    with instances("both dead"):
        end = second()
        assert end.value and end.value[0] and not list(out.rglob("*.lock")), end
    instances.check(4)


def lock_owner(file: Path) -> str: return file.read_text()


# ---------------------------------------------------------------- 43

@sampled(0, 6)
def test_row_43_prediction_on_a_full_disk(count, instances, tmp_path, predictor, source):
    "Full at write 1, 2, ... N: one error with the bytes, nothing temporary, finished parts intact; then the same bytes"
    want_in = tmp_path/"want"
    want_in.mkdir()
    writes = predictor(f"{__name__}:predict_with", source, want_in, {}).value[1]
    want = files(want_in)
    assert writes > 60
    numbers = range(1, writes + 1) if not count else sorted(random.Random(43).sample(range(1, writes + 1), count))
    for at in numbers:
        out = tmp_path/f"{at}"
        out.mkdir()
        with instances(f"write {at} of {writes}"):
            end = predictor(f"{__name__}:predict_with", source, out, {"full_at": at})
            if end.value and end.value[0]: # only empty files were still to be written
                if files(out) != want: raise SilentlyWrong("complete, and different")
                continue
            assert "DiskFull" in end.error, f"signal {end.signal}, {end.error}: {end.message}"
            assert re.search(r"no room .*[\d.]+ \w+ free", end.message) and "run" in end.message, end.message
            kept = files(out)
            left = [n for n in kept if ".mvtmp-" in n or n.endswith((".partial", ".lock"))]
            assert not left, left
            wrong = [n for n, b in kept.items() if "carry" not in n and want.get(n) != b]
            if wrong: raise SilentlyWrong(f"{wrong[:5]}")
            end = predictor(f"{__name__}:predict_with", source, out, {})
            assert end.value and end.value[0], end
            if files(out) != want: raise SilentlyWrong("the result differs")
    with instances("old results"):
        end = predictor(f"{__name__}:predict_with", source, want_in, {"full_at": 1, "overwrite": True, "overlap": 0.25})
        assert "DiskFull" in end.error, end
        if files(want_in) != want: raise SilentlyWrong("the old result was changed")
    instances.check(len(numbers) + 1)
