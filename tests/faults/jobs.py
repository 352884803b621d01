"""What runs in children that are killed, run out of room, or lack permissions. Imported by the zygote."""
import os
import signal
import time
from itertools import count
from pathlib import Path

import numpy as np

from medvol_nb.core import atomic, check_output, rng_for, write_csv, write_json
from medvol_nb.parallel import Ledger, pmap

# ---------------------------------------------------------------- one output of every kind

def volume(seed: int, axes: str = "xyz", n: int = 24):
    "Noise, which does not compress, so that sizes of files can be foreseen"
    from medvol_nb.volume import Volume, affine_from
    data = rng_for(seed, "volume").integers(0, 256, (n, n, n)).astype(np.uint8)
    return Volume(data, affine_from((1, 1, 2), (-3, 4, 5), axes), axes)


def write(kind: str, path: str, seed: int, on_exists: str = "overwrite") -> str:
    "Write the output `kind` with the content `seed`"
    if kind in ("nii", "nii.gz"):
        from medvol_nb.volume import write_nifti
        write_nifti(volume(seed), path, on_exists)
    elif kind == "zarr":
        from medvol_nb.volume import write_zarr
        write_zarr(volume(seed, "zyx"), path, on_exists, chunks=12)
    elif kind == "h5":
        from medvol_nb.volume import write_hdf5
        write_hdf5(volume(seed, "zyx"), path, on_exists, chunks=12)
    elif kind in ("npy", "npz"):
        from medvol_nb.volume import write_numpy
        write_numpy(volume(seed), path, on_exists)
    elif kind == "safetensors":
        import torch

        from medvol_nb.checkpoints import save_checkpoint
        save_checkpoint(path, {"seed": seed, "w": torch.from_numpy(volume(seed).data.copy())}, on_exists)
    elif kind == "json": write_json(path, {"seed": seed, "n": volume(seed, n=12).data.ravel().tolist()}, on_exists)
    elif kind == "csv":
        write_csv(path, [{"seed": seed, "n": int(v)} for v in volume(seed, n=12).data.ravel()], on_exists=on_exists)
    elif kind == "folder":
        with atomic(path, on_exists, folder=True) as t:
            for k in range(3): (t/f"{k}.txt").write_text(f"{seed} {k}"*50)
    else: raise NotImplementedError(kind)
    return path


def content(path: str | Path) -> dict[str, bytes] | None:
    "All bytes of a file or a folder; None if it is absent"
    path = Path(path)
    if not path.exists(): return None
    if path.is_file(): return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def names(folder: str | Path) -> list[str]: return sorted(p.name for p in Path(folder).iterdir())


def check_then_write(kind: str, path: str, inputs: list[str]) -> str:
    "What a command does: look first, then work"
    check_output(path, "overwrite", inputs=inputs)
    return write(kind, path, 1)


# ---------------------------------------------------------------- checkpoints

def save_forever(folder: str) -> None:
    "Save checkpoint after checkpoint, keeping the last two, as a training run does"
    import torch

    from medvol_nb.checkpoints import checkpoint_path, prune_checkpoints, save_checkpoint
    for step in count(1):
        save_checkpoint(checkpoint_path(folder, step), {"step": step, "w": torch.full((50_000,), float(step))})
        prune_checkpoints(folder, keep=2)


def train(folder: str, steps: int = 12) -> list[float]:
    "A tiny training with exact resume: a checkpoint after every step, all chance named by step; returns the losses"
    import torch

    from medvol_nb.checkpoints import (
        checkpoint_path,
        latest_checkpoint,
        prune_checkpoints,
        save_checkpoint,
        seeded,
        torch_rng_for,
    )
    with seeded(0, "init"): model = torch.nn.Linear(6, 1)
    optimizer, losses, start = torch.optim.AdamW(model.parameters(), lr=0.05), [], 0
    if found := latest_checkpoint(folder):
        state = found[1]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, start = list(state["losses"]), state["step"]
    for step in range(start, steps):
        x = torch.randn(16, 6, generator=torch_rng_for(0, "batch", step))
        loss = ((model(x) - x.sum(1, keepdim=True))**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        save_checkpoint(checkpoint_path(folder, step + 1), {"step": step + 1, "losses": losses, "pad": torch.ones(9999),
                                                            "model": model.state_dict(),
                                                            "optimizer": optimizer.state_dict()})
        prune_checkpoints(folder, keep=2)
    return losses


# ---------------------------------------------------------------- maps

def die(how: str) -> None:
    "End this process in one of the ways that processes end, or never"
    if how in ("SIGKILL", "SIGSEGV"): os.kill(os.getpid(), getattr(signal, how))
    if how == "exit": os._exit(1)
    if how == "abort": os.abort()
    time.sleep(600)


def draw(case: int) -> list[float]: return rng_for(26, "case", case).random(3).tolist()


def fragile(case: int, how: str, deaths: int, where: int, marks: str) -> list[float]:
    "Draw for a case; at case `where` die first, as long as there are fewer than `deaths` marks of that"
    if case == where and len(list(Path(marks).iterdir())) < deaths:
        (Path(marks)/str(time.monotonic_ns())).write_text("")
        die(how)
    return draw(case)


def case_28(case: int) -> list: return [case, rng_for(28, "case", case).random(4).tolist()]


def map_cases(queue) -> None:
    "Put the results of a parallel map into a queue, from inside a child process"
    queue.put(pmap(case_28, range(12), workers=2))


# ---------------------------------------------------------------- ledgers

def ledger_job(folder: str, operations: list, params: int = 0) -> None:
    "Open the ledger of `folder` and do the operations: ['file' | 'folder', key, text], ['fail', key, error]"
    root = Path(folder)
    with Ledger(root/"ledger.jsonl", params) as led:
        for kind, key, text in operations:
            if kind == "fail": led.failed(key, text); continue
            with atomic(root/key, folder=kind == "folder", sync=False) as t:
                if kind == "folder":
                    for k, part in enumerate(text): (t/f"{k}.txt").write_text(part*30)
                else: t.write_text(text*30)
            led.done(key, {"outputs": [key], "text": text})


def hold_lock(path: str, seconds: float) -> None:
    from medvol_nb.core import lock
    with lock(path): time.sleep(seconds)


def add_one(path: str, times: int) -> int:
    "Read, add, write, under the lock; returns how often the lock was had"
    from medvol_nb.core import Locked, lock
    had = 0
    while had < times:
        try:
            with lock(path):
                value = int(Path(path).read_text()) if Path(path).exists() else 0
                time.sleep(0.001)
                Path(path).write_text(str(value + 1))
                had += 1
        except Locked: time.sleep(0.001)
    return had
