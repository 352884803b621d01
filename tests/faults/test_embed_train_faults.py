"""Training of embeddings under faults: death while saving, losses that are not numbers, a dead rank."""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from medvol_nb import phantoms
from medvol_nb.checkpoints import latest_checkpoint
from medvol_nb.core import read_csv
from medvol_nb.embed import train as module
from medvol_nb.embed.train import train
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.torchcore import NonFiniteLoss
from medvol_nb.volume import write_volume

from .injectors import ROOT, forked
from .rows import sampled

QUICK = ["spacing=8", "views.patch=[8,16,16]", "model.width=8", "model.emb=8", "loss.queries=10", "loss.hard=100",
         "loss.negatives=20", "loss.coarse_global=0", "loss.positive_mm=8", "fit.tensorboard=false",
         "fit.checkpoint_every=1"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scans")
    for k in range(3):
        p = phantoms.abdomen((36, 30, 32), seed=k)
        write_volume(Volume(p.img.astype(np.int16), affine_from(p.spacing)), root/f"p{k}.nii.gz")
    return root


def run(scans: Path, out: Path, steps: int = 4) -> dict:
    return train([scans], out=out, tiny=True, steps=steps, device="cpu", overrides=QUICK)


def content(out: Path) -> list[bytes]: return [(out/n).read_bytes() for n in ("log.csv", "model.safetensors")]


# ---------------------------------------------------------------- 18

@sampled(30, 6)
def test_row_18_death_while_a_checkpoint_is_written(count, instances, scans, tmp_path):
    "Killed at one of 30 file steps of a run that saves after every step: the rest of the run is the same to the byte"
    run(scans, tmp_path/"whole")
    total = forked(lambda: run(scans, tmp_path/"count"), tmp_path/"count")
    assert total > 30
    for at in np.linspace(2, total - 1, count).astype(int).tolist():
        out = tmp_path/f"run{at}"
        with instances(f"step {at} of {total}"):
            assert forked(functools.partial(run, scans, out), out, at) == -signal.SIGKILL
            found = latest_checkpoint(out/"checkpoints")
            if found: assert all(torch.isfinite(v).all() for v in found[1]["model"].values())
            run(scans, out)
            assert content(out) == content(tmp_path/"whole")
    instances.check(count)


# ---------------------------------------------------------------- 21

def test_row_21_losses_that_are_not_numbers(instances, scans, tmp_path, monkeypatch):
    "From step k on: left out and logged three times, then the run stops with the weights from before the fault"
    real, calls = module.view_losses, []
    run(scans, tmp_path/"clean", 5)
    clean = read_csv(tmp_path/"clean"/"log.csv")
    for value in (math.nan, math.inf):
        for k in (1, 2, 3):
            calls.clear()

            def faulty(*args, value=value, k=k, **options):
                calls.append(1)
                parts = real(*args, **options)
                return {n: v*value for n, v in parts.items()} if len(calls) > k else parts

            out = tmp_path/f"{value}{k}"
            with instances(f"{value} from step {k}"):
                with monkeypatch.context() as m, pytest.raises(NonFiniteLoss, match=r"not finite for items p\d"):
                    m.setattr(module, "view_losses", faulty)
                    run(scans, out, 9)
                rows = read_csv(out/"log.csv")
                assert sum(r.get("skipped") == "1" for r in rows) <= 3
                assert len([r for r in rows if r.get("fine")]) == k
                state = latest_checkpoint(out/"checkpoints")[1]
                assert all(torch.isfinite(v).all() for v in state["model"].values())
                assert [r["loss"] for r in rows if r.get("fine")] == [r["loss"] for r in clean[:k]]
    instances.check(6)


# ---------------------------------------------------------------- 22

SCRIPT = """
import os, signal, sys
from medvol_nb.embed.config import settings
from medvol_nb.embed.train import Folders, make_batches, train_network
scans, out, victim, at, *overrides = sys.argv[1:]
cfg = settings(None, None, overrides, {"fit.steps": 4, "fit.device": "cpu"}, small=True)
def die(event, state):
    if event == "step" and state.step == int(at) and state.rank == int(victim): os.kill(os.getpid(), signal.SIGKILL)
train_network(make_batches(Folders((scans,)), cfg), cfg, out_dir=out, callbacks=[die])
"""


@pytest.mark.slow
def test_row_22_a_rank_dies(instances, scans, tmp_path):
    "One of two processes is killed: the other one ends within 30 s, and the same command completes the run exactly"
    (tmp_path/"train.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def launch(out: Path, victim: int, at: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29573",
                   tmp_path/"train.py", scans, out, victim, at, *QUICK, "model.norm=gn", "per_epoch=2"]
        return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=240)

    assert launch(tmp_path/"whole", -1, 0).returncode == 0
    for victim, at in ((0, 2), (1, 2), (1, 1)):
        out = tmp_path/f"run{victim}{at}"
        with instances(f"rank {victim} at step {at}"):
            done = launch(out, victim, at)
            ended = time.time()
            assert done.returncode != 0 and ("SIGKILL" in done.stderr or "-9" in done.stderr)
            assert ended - max(p.stat().st_mtime for p in out.rglob("*") if p.is_file()) < 35
            again = launch(out, -1, 0)
            assert again.returncode == 0, again.stderr[-1500:]
            assert content(out) == content(tmp_path/"whole")
    instances.check(3)
