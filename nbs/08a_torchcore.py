# %% [markdown]
# # One training loop
#
# > `fit` trains every model of this library: on one device or many, interrupted or not, with the same result.
#
# Five research systems, five training loops, and each forgets something: the order of the data after a resume, to
# unscale gradients before clipping them, to say *which* scan made the loss infinite, to write a checkpoint that
# survives the moment it is written in. Here is one loop for all of them. Devices, processes and mixed precision are
# left to [accelerate](https://huggingface.co/docs/accelerate); ours are the order of samples, the schedule, the
# averages, exact resume and the log.

# %%
#| default_exp torchcore

# %%
#| export
import csv
import io
import itertools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from medvol_nb.checkpoints import (Precision, WeightReport, autocast_for, checkpoint_path, device_for, # noqa: F401
                                   keep_freed_memory, latest_checkpoint, load_checkpoint, load_foreign, load_weights,
                                   precision_for, prune_checkpoints, save_checkpoint, seeded, torch_rng_for)
from medvol_nb.config import Config, ConfigPath
from medvol_nb.core import (ConfigError, DataError, Journal, OnExists, OutputExists, atomic, check_output, fingerprint,
                            human_time, is_quiet, lock, log, plain, progress, read_csv, remove_tree, rng_for,
                            sweep_temporary, write_json)

_all_ = ["Precision", "WeightReport", "autocast_for", "checkpoint_path", "device_for", "latest_checkpoint",
         "load_checkpoint", "load_foreign", "load_weights", "precision_for", "prune_checkpoints", "save_checkpoint",
         "seeded", "torch_rng_for"]

# %%
import subprocess
import sys

from medvol_nb import plot
from medvol_nb.core import close, raises, tmpdir

# %% [markdown]
# ## Batches with a position
# A run can only go on exactly where it stopped if the batch at step 700 is a function of the number 700. So the order
# of an epoch is a permutation named by seed and epoch, and a dataset that draws at random is given a generator named
# by seed, epoch and index. Workers, processes and history play no part. With $W$ processes the global batch is $W$
# times as large and each process takes its slice, so two processes see together what one process with the doubled
# batch sees.

# %%
#| export
class _Keyed(torch.utils.data.Dataset):
    "A dataset addressed by (epoch, index); passes the item's own generator to `draw` if the dataset has it"
    def __init__(self, dataset: Any, seed: int): self.dataset, self.seed = dataset, seed
    def __len__(self) -> int: return len(self.dataset)
    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if hasattr(self.dataset, "draw"):
            return self.dataset.draw(index, rng_for(self.seed, "item", epoch, index))
        return self.dataset[index]

class Batches:
    "Batches of a dataset in an order that depends on seed, epoch and position alone"
    def __init__(
        self,
        dataset: Any, # has len() and either dataset[i] or dataset.draw(i, rng): arrays, tensors or dicts of them
        batch_size: int = 1, # items a step, in each process
        *,
        seed: int = 0, # names the order and the draws
        shuffle: bool = True, # a new permutation every epoch; False: always in order
        workers: int = 0, # loading processes; 0: in this process
        weights: Sequence[float] | None = None, # draw items with these odds, with replacement; None: a permutation
        collate: Callable | None = None, # list of items -> batch; default: torch's
        per_epoch: int | None = None, # steps in an epoch, whatever the size of the dataset; None: its full batches
        start_method: Literal["fork", "forkserver", "spawn"] | None = None, # of the workers; None: the system's
    ):
        if len(dataset) < 1: raise DataError("batches: the dataset is empty")
        if batch_size < 1: raise ConfigError(f"batch_size: must be >= 1, got {batch_size}")
        if weights is not None and (len(weights) != len(dataset) or min(weights) < 0 or not sum(weights) > 0):
            raise DataError(f"weights: need one number >= 0 for each of {len(dataset)} items, not all zero")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        if per_epoch is not None and per_epoch < 1: raise ConfigError(f"per_epoch: must be >= 1, got {per_epoch}")
        self.shuffle, self.workers, self.collate, self.per_epoch = shuffle, workers, collate, per_epoch
        self.start_method = start_method
        if workers and start_method == "forkserver": # workers are forks of a process that has imported it all
            multiprocessing.set_forkserver_preload(["torch", type(dataset).__module__])
        self.odds = None if weights is None else np.asarray(weights, np.float64)/np.sum(weights)

    def steps(
        self,
        world: int = 1, # processes that share the work
    ) -> int: # `per_epoch`, or the full global batches, at least one
        "Steps in an epoch; what does not fill a batch is left for another epoch's permutation"
        return self.per_epoch or max(1, len(self.dataset)//(self.batch_size*world))

    def order(
        self,
        epoch: int, # from 0
        world: int = 1, # processes that share the work
    ) -> np.ndarray: # (steps, world * batch_size) dataset indices
        "Which items are in which global batch"
        n, rng = self.steps(world)*self.batch_size*world, rng_for(self.seed, "order", epoch)
        if self.odds is not None: out = rng.choice(len(self.dataset), n, p=self.odds)
        else:
            rounds = -(-n//len(self.dataset)) # more than one if the dataset is smaller than a batch
            out = np.concatenate([rng.permutation(len(self.dataset)) if self.shuffle else np.arange(len(self.dataset))
                                  for _ in range(rounds)])[:n]
        return out.reshape(self.steps(world), -1)

    def epoch(
        self,
        epoch: int, # from 0
        start: int = 0, # first step
        rank: int = 0, # this process
        world: int = 1, # processes that share the work
    ) -> Iterator[tuple[list[int], Any]]: # (dataset indices, batch)
        "Batches of one process from step `start` to the end of the epoch"
        mine = self.order(epoch, world)[start:, rank*self.batch_size:(rank + 1)*self.batch_size]
        keys = [[(epoch, int(i)) for i in row] for row in mine]
        extra = {"prefetch_factor": 2, "multiprocessing_context": self.start_method} if self.workers else {}
        loader = torch.utils.data.DataLoader(
            _Keyed(self.dataset, self.seed), batch_sampler=keys, collate_fn=self.collate, num_workers=self.workers,
            generator=torch.Generator(), **extra)
        yield from zip(([i for _, i in row] for row in keys), loader)

# %%
class Points:
    "Points of a plane, labelled by the side of a circle they are on; a new point at every draw"
    def __len__(self): return 64
    def draw(self, index, rng):
        xy = rng.uniform(-1, 1, 2).astype(np.float32)
        return {"xy": xy, "y": np.float32(np.hypot(*xy) < 0.7), "index": index}

first = [keys for keys, _ in Batches(Points(), 16).epoch(0)]
again = [batch["xy"] for _, batch in Batches(Points(), 16, workers=2).epoch(3, start=2)]
[k[:4] for k in first]

# %% [markdown]
# Loading processes change nothing, and the two halves of a doubled batch are what two processes get:

# %%
for a, (_, b) in zip(again, Batches(Points(), 16).epoch(3, start=2)): assert torch.equal(a, b["xy"])
ranks = [[k for k, _ in Batches(Points(), 8).epoch(1, rank=r, world=2)] for r in (0, 1)]
assert [a + b for a, b in zip(*ranks)] == [k for k, _ in Batches(Points(), 16).epoch(1)]
assert sorted(sum(first, [])) == list(range(64)) and Batches(Points(), 100).order(0).shape == (1, 100)
with raises(DataError, match="one number >= 0 for each of 64"): Batches(Points(), weights=[1])

# %% [markdown]
# ## Settings of a run
# The usual ones, checked before anything starts. Names and defaults are shared by all trainings of the library.

# %%
#| export
class FitConfig(Config):
    "How to train: length, optimiser, precision, checkpoints"
    epochs: int = Field(1, ge=1) # passes over the data; ignored if `steps` is given
    steps: int | None = Field(None, ge=1) # optimiser steps in all
    lr: float = Field(1e-3, gt=0) # peak learning rate
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw" # update rule
    weight_decay: float = Field(1e-2, ge=0) # decay of weights, not of biases and norms
    momentum: float = Field(0.9, ge=0, lt=1) # of SGD (Nesterov), and the first beta of Adam
    beta2: float = Field(0.999, ge=0, lt=1) # the second beta of Adam; smaller forgets large gradients sooner
    schedule: Literal["constant", "cosine", "poly"] = "cosine" # of the learning rate after warm-up
    warmup_steps: int = Field(0, ge=0) # linear rise at the start
    min_lr: float = Field(0.0, ge=0) # floor of the schedule
    precision: Precision = "fp32" # of the forward pass
    device: str = "auto" # where to train
    accumulate: int = Field(1, ge=1) # batches whose gradients are summed into one step
    clip_norm: float | None = Field(None, gt=0) # largest gradient norm, after unscaling
    ema_decay: float | None = Field(None, gt=0, lt=1) # keep an exponential average of the weights and validate with it
    seed: int = Field(0, ge=0) # names every random stream of the run
    checkpoint_every: int | None = Field(None, ge=1) # steps between checkpoints; default: every epoch
    keep: int = Field(3, ge=0) # checkpoints kept, 0 keeps all
    validate_every: int | None = Field(None, ge=1) # steps between validations; default: every epoch
    monitor: str = "val_loss" # number that decides which weights are best
    mode: Literal["min", "max"] = "min" # direction in which `monitor` is better
    patience: int | None = Field(None, ge=1) # stop after so many validations without a better `monitor`
    max_skips: int = Field(3, ge=0) # steps with a non-finite loss that are left out before the run stops
    tensorboard: bool | ConfigPath = True # also write TensorBoard events, if it is installed; or the folder for them

# %% [markdown]
# ## A schedule without memory
# The learning rate is computed from the step number, so there is nothing to restore after an interruption. `poly` is
# $(1 - t)^{0.9}$, nnU-Net's choice; `cosine` is Loshchilov and Hutter (ICLR 2017) without restarts.

# %%
#| export
def lr_at(
    step: int, # optimiser steps done
    total: int, # optimiser steps of the run
    cfg: FitConfig, # schedule, warm-up and limits
) -> float: # learning rate of the next step
    "Learning rate as a function of the step number"
    if step < cfg.warmup_steps: return cfg.lr*(step + 1)/cfg.warmup_steps
    t = min(1.0, (step - cfg.warmup_steps)/max(1, total - cfg.warmup_steps))
    factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi*t))/2, "poly": (1 - t)**0.9}[cfg.schedule]
    return max(cfg.lr*factor, min(cfg.min_lr, cfg.lr))

# %%
plot.curves({s: [lr_at(k, 100, FitConfig(schedule=s, warmup_steps=10)) for k in range(100)]
             for s in ("constant", "cosine", "poly")}, xlabel="step", ylabel="learning rate", height=2)

# %%
assert lr_at(0, 100, FitConfig(warmup_steps=10)) == 1e-4 and lr_at(100, 100, FitConfig(min_lr=1e-5)) == 1e-5

# %% [markdown]
# ## The average of the weights
# $\bar w \leftarrow d\,\bar w + (1-d)\,w$ with $d$ rising to its final value, so that the start is forgotten soon
# (Polyak averaging in its exponential form). The average is what is validated and exported.

# %%
#| export
class Ema:
    "Exponential moving average of a model's parameters; buffers are copied"
    def __init__(
        self,
        model: nn.Module, # followed model
        decay: float, # final weight of the past, in (0, 1)
    ):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(
        self,
        model: nn.Module, # after an optimiser step
    ) -> None:
        "Move the average towards the model"
        self.updates += 1
        decay = min(self.decay, (1 + self.updates)/(10 + self.updates))
        moving = {k for k, _ in model.named_parameters(remove_duplicate=False)} # shared ones by each of their names
        state = model.state_dict()
        names = [k for k in state if k in moving and state[k].is_floating_point()]
        torch._foreach_lerp_([self.shadow[k] for k in names], [state[k].detach() for k in names], 1 - decay)
        for k in state.keys() - set(names): self.shadow[k].copy_(state[k])

    @contextmanager
    def swapped(
        self,
        model: nn.Module, # gets the averaged weights inside the block
    ) -> Iterator[None]:
        "Use the averaged weights for the length of a block"
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try: yield
        finally: model.load_state_dict(own)

# %%
one = nn.Linear(1, 1, bias=False)
ema = Ema(one, 0.9)
with torch.no_grad():
    one.weight.fill_(1.0)
    for _ in range(100): ema.update(one)
    with ema.swapped(one): inside_block = float(one.weight)
round(inside_block, 3), float(one.weight)

# %%
assert abs(inside_block - 1) < 1e-3 and float(one.weight) == 1

# %% [markdown]
# ## The log
# A CSV file is always written: any tool reads it, and it can be followed while it grows. After a resume, lines past the
# checkpoint are removed, so that no step appears twice.

# %%
#| export
class CsvLog:
    "Table of numbers that grows by a row at a time, cut back to a step when a run resumes"
    def __init__(
        self,
        path: str | os.PathLike, # .csv file
        upto: int = 0, # keep rows up to this step of an earlier part of the run
    ):
        self.path = Path(path)
        self.rows: list[dict[str, str]] = []
        self.columns: list[str] = []
        raw = self.path.read_bytes() if upto and self.path.exists() else b""
        whole = raw[:raw.rfind(b"\n") + 1] # the rest was torn by a crash
        if whole.strip():
            with atomic(self.path) as t: t.write_bytes(whole)
            table = read_csv(self.path, ["step"])
            self.columns = list(table[0]) if table else []
            self.rows = [{k: v for k, v in r.items() if v} for r in table if int(r["step"]) <= upto]
        self._write()
        self._journal = Journal(self.path)

    def _line(self, values: Sequence[Any]) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="").writerow(values)
        return out.getvalue()

    def _write(self) -> None:
        lines = [self._line(self.columns)] + [self._line([r.get(c, "") for c in self.columns]) for r in self.rows]
        with atomic(self.path) as t: t.write_text("\n".join(lines) + "\n" if self.columns else "", encoding="utf-8")

    def add(
        self,
        row: Mapping[str, Any], # numbers by column; new columns may appear at any time
    ) -> None:
        "Add a row"
        row = {k: f"{v:.9g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        self.rows.append(row)
        if row.keys() - set(self.columns):
            self.columns += [k for k in row if k not in self.columns]
            self._journal.close()
            self._write()
            self._journal = Journal(self.path)
        else: self._journal.append(self._line([row.get(c, "") for c in self.columns]))

    def close(self) -> None:
        "Bring all rows to disk"
        self._journal.close()

# %% [markdown]
# ## The loop
# One step: sum the gradients of `accumulate` batches, look whether the loss is finite in *all* processes, unscale,
# clip, update, average. Random layers such as dropout draw from the stream of their step, so nothing about chance has
# to be stored. A checkpoint holds weights, optimiser, average, scaler and position.
#
# A step whose loss or gradient is not finite is left out, running statistics included, and reported with the items
# that were in it. After `max_skips` of them the run stops with a checkpoint from before the fault: going on would only
# hide it.
#
# Ctrl-C and the SIGTERM of a cluster queue let the step finish, write a checkpoint and end the run; the second one ends
# it at once. Under `torchrun` the first one does: processes that stop after different steps would wait for each other.
# The run then goes on from its last checkpoint. In the middle of a step nothing is ever saved, so a resumed run is
# exact in all cases.

# %%
#| export
class NonFiniteLoss(DataError):
    "The loss became NaN or infinite; the message names the items of the batch"

@dataclass
class FitState:
    "Where a run is; passed to callbacks and validation"
    model: nn.Module # the bare model, not the wrapper for several processes
    out_dir: Path # of the run
    step: int = 0 # optimiser steps done
    epoch: int = 0 # of the current step, from 0
    total: int = 0 # optimiser steps of the run
    rank: int = 0 # this process
    world: int = 1 # processes
    device: torch.device = torch.device("cpu") # where the model is
    best: float | None = None # best monitored number so far
    stale: int = 0 # validations since then
    skips: int = 0 # steps left out for a non-finite loss
    metrics: dict[str, float] = field(default_factory=dict) # newest numbers

@dataclass(frozen=True)
class FitResult:
    "What a run left behind"
    steps: int # optimiser steps done
    finished: bool # all steps done, or patience ended
    best: float | None # best monitored number
    log: list[dict[str, str]] # rows of log.csv
    weights: Path # exported weights: the average if there is one
    seconds: float # of this part of the run [s]

def to_device(
    batch: Any, # tensors in nested dicts, lists and tuples; other values stay
    device: torch.device, # target
) -> Any: # same structure
    "Move the tensors of a batch"
    if isinstance(batch, torch.Tensor): return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping): return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)): return type(batch)(to_device(v, device) for v in batch)
    return batch

def make_optimizer(
    model: nn.Module, # to be trained; frozen parameters are left out
    cfg: FitConfig, # rule, decay and momentum
) -> torch.optim.Optimizer: # two parameter groups: with and without weight decay
    "Optimiser in which biases and norms do not decay"
    params = [p for p in model.parameters() if p.requires_grad]
    if not params: raise DataError("fit: the model has no parameters to train")
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if cfg.optimizer == "sgd": return torch.optim.SGD(groups, cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0)
    kind = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, cfg.lr, betas=(cfg.momentum, cfg.beta2))

# %%
#| export
def _accelerator(cfg: FitConfig) -> Any:
    "A fresh accelerator for this run; earlier runs in this process leave no trace"
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    AcceleratorState._reset_state(reset_partial_state=not several)
    GradientState._reset_state()
    device = device_for(cfg.device)
    autocast_for(device, cfg.precision) # refuses what the device cannot do
    if device.type == "cuda": torch.cuda.set_device(device)
    if device.type == "cpu": keep_freed_memory()
    mixed = "no" if cfg.precision == "fp32" else cfg.precision
    accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
    if not several and accelerator.device != device: PartialState().device = device
    return accelerator

class _Run:
    "Everything that one training run holds on to"
    def __init__(self, model, batches, loss, cfg, out_dir, validate, callbacks, optimizer, identity, config):
        self.batches, self.loss, self.cfg, self.validate, self.callbacks = batches, loss, cfg, validate, callbacks
        self.acc = _accelerator(cfg)
        self.bare, self.identity, self.config = model, identity, config
        model.to(self.acc.device)
        self.raw_optimizer = make_optimizer(model, cfg) if optimizer is None else optimizer(model)
        self.base_lrs = [g["lr"]/cfg.lr for g in self.raw_optimizer.param_groups]
        self.model, self.optimizer = self.acc.prepare(model, self.raw_optimizer)
        self.ema = Ema(model, cfg.ema_decay) if cfg.ema_decay else None
        world = self.acc.num_processes
        self.per_epoch = max(1, batches.steps(world)//cfg.accumulate)
        total = cfg.steps or cfg.epochs*self.per_epoch
        rank, device = self.acc.process_index, self.acc.device
        self.state = FitState(model, out_dir, total=total, rank=rank, world=world, device=device)
        self.folder = out_dir/"checkpoints"

    # ---- storage
    def snapshot(self) -> dict:
        s = self.state
        return {"identity": self.identity, "per_epoch": self.per_epoch, "config": self.config,
                "step": s.step, "best": s.best, "stale": s.stale, "skips": s.skips,
                "model": self.bare.state_dict(), "optimizer": self.raw_optimizer.state_dict(),
                "ema": None if self.ema is None else {"shadow": self.ema.shadow, "updates": self.ema.updates},
                "scaler": self.acc.scaler.state_dict() if self.acc.scaler is not None else None}

    def save(self) -> None:
        if self.acc.is_main_process:
            save_checkpoint(checkpoint_path(self.folder, self.state.step), self.snapshot())
            prune_checkpoints(self.folder, self.cfg.keep)
        self.acc.wait_for_everyone()

    def restore(self) -> None:
        found = latest_checkpoint(self.folder)
        if found is None: return
        path, saved = found
        if saved["identity"] != self.identity:
            raise DataError(f"{self.state.out_dir} holds a run with other settings (checkpoint {path.name}). Choose "
                            f"another folder, or start anew with on_exists='overwrite' (--on-exists overwrite)")
        if saved["per_epoch"] != self.per_epoch:
            raise DataError(f"{self.state.out_dir} holds a run with {saved['per_epoch']} steps an epoch, now there are "
                            f"{self.per_epoch}: the data or the batch size changed. Choose another folder, or start "
                            f"anew with on_exists='overwrite' (--on-exists overwrite)")
        load_weights(self.bare, saved["model"])
        self.raw_optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None:
            self.ema.shadow = {k: v.to(self.acc.device) for k, v in saved["ema"]["shadow"].items()}
            self.ema.updates = saved["ema"]["updates"]
        if self.acc.scaler is not None and saved["scaler"]: self.acc.scaler.load_state_dict(saved["scaler"])
        s = self.state
        s.step, s.best, s.stale, s.skips = saved["step"], saved["best"], saved["stale"], saved["skips"]
        log.info("resumed %s at step %d of %d", s.out_dir, s.step, s.total)

    # ---- one optimiser step
    def tell(self, event: str) -> None:
        for c in self.callbacks: c(event, self.state)

    def mean(self, values: Sequence[float]) -> list[float]:
        "Mean over processes"
        if self.acc.num_processes == 1: return [float(v) for v in values]
        t = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.acc.device)
        return (self.acc.reduce(t, "sum")/self.acc.num_processes).tolist()

    def step(self, parts: list[tuple[list[int], Any]]) -> dict[str, float] | None:
        "Gradients of all parts, one update; None if the loss was not finite and the step was left out"
        cfg, s = self.cfg, self.state
        lr = lr_at(s.step, s.total, cfg)
        for g, base in zip(self.raw_optimizer.param_groups, self.base_lrs): g["lr"] = lr*base
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        buffers = [(b, b.clone()) for b in self.bare.buffers()] # running statistics, in case the step is left out
        for n, (_, batch) in enumerate(parts):
            last = n == len(parts) - 1
            with nullcontext() if last else self.acc.no_sync(self.model), self.acc.autocast():
                out = self.loss(self.model, to_device(batch, s.device))
                numbers = dict(out) if isinstance(out, Mapping) else {"loss": out}
                value = numbers["loss"]
            if self.mean([float(torch.isfinite(value))])[0] < 1: return self.skip(parts, buffers)
            self.acc.backward(value/len(parts))
            for k, v in numbers.items():
                sums[k] = sums.get(k, 0.0) + float(v.detach() if isinstance(v, torch.Tensor) else v)/len(parts)
        norm = float(self.acc.clip_grad_norm_(self.model.parameters(), cfg.clip_norm or math.inf))
        if self.acc.scaler is None and not math.isfinite(norm): return self.skip(parts, buffers)
        self.optimizer.step()
        if self.ema is not None: self.ema.update(self.bare)
        s.step += 1
        names = list(sums)
        out = dict(zip(names, self.mean([sums[k] for k in names])))
        return {**out, "lr": lr, **({} if cfg.clip_norm is None else {"grad_norm": norm})}

    @torch.no_grad()
    def skip(self, parts: list[tuple[list[int], Any]], buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        s = self.state
        self.optimizer.zero_grad(set_to_none=True)
        for now, before in buffers: now.copy_(before)
        s.skips += 1
        names = getattr(self.batches.dataset, "keys", None)
        items = [str(names[i]) if isinstance(names, Sequence) else str(i) for indices, _ in parts for i in indices]
        shown = ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
        log.warning("step %d left out: the loss is not finite for items %s", s.step, shown)
        if s.skips > self.cfg.max_skips:
            self.save()
            raise NonFiniteLoss(f"the loss is not finite for items {shown} at step {s.step}; {self.cfg.max_skips} "
                                f"steps were left out for the same reason. The checkpoint from before is in "
                                f"{self.folder}. Look at these items, lower lr, or set clip_norm")

    # ---- validation
    def check(self) -> dict[str, float]:
        s, cfg = self.state, self.cfg
        if self.validate is None: return {}
        training = self.bare.training
        self.bare.eval()
        try:
            with torch.no_grad(), seeded(cfg.seed, "validate", s.step):
                with self.ema.swapped(self.bare) if self.ema is not None else nullcontext():
                    found = dict(self.validate(self.bare, s))
                    names = sorted(found)
                    found = dict(zip(names, self.mean([found[k] for k in names])))
                    if cfg.monitor not in found:
                        raise ConfigError(f"monitor: {cfg.monitor!r} is not among the validation's numbers {names}")
                    value = found[cfg.monitor]
                    sign = 1 if cfg.mode == "min" else -1
                    better = not math.isnan(value) and (s.best is None or sign*value < sign*s.best)
                    s.stale = 0 if better else s.stale + 1
                    if better:
                        s.best = value
                        if self.acc.is_main_process:
                            best = {"step": s.step, "model": self.bare.state_dict(), "metrics": found,
                                    "config": self.config}
                            save_checkpoint(s.out_dir/"best.safetensors", best)
        finally: self.bare.train(training)
        return found

# %%
#| export
def _tensorboard(folder: Path, wanted: bool | Path) -> Any:
    if wanted is False or is_quiet(): return None
    try: from torch.utils.tensorboard import SummaryWriter
    except ImportError: return None
    return SummaryWriter(str(folder/"tensorboard" if wanted is True else wanted))

@contextmanager
def _stop_politely() -> Iterator[list[int]]:
    "Collect Ctrl-C and SIGTERM, with which cluster queues end a job, for the end of the step; the second acts at once"
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    here, several = os.getpid(), int(os.environ.get("WORLD_SIZE", 1)) > 1
    def stop(number: int, _) -> None:
        if os.getpid() != here and number == signal.SIGINT: return # a loading process: its parent decides
        if os.getpid() != here or several or asked: raise KeyboardInterrupt
        asked.append(number)
    old = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try: yield asked
    finally:
        for n, handler in old.items(): signal.signal(n, handler or signal.SIG_DFL)

@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    "Take back the mixed-precision wrapper that accelerate leaves around `forward`"
    own = vars(model).get("forward")
    try: yield
    finally:
        for k in ("forward", "_original_forward"): vars(model).pop(k, None)
        if own is not None: model.forward = own

def _clear(out_dir: Path) -> None:
    "Remove what an earlier run left in its folder: checkpoints, logs and weights, nothing else"
    for p in [*out_dir.glob("checkpoints/step-*.safetensors"), *out_dir.glob("*.safetensors")]: p.unlink()
    for name in ("log.csv", "tensorboard"): remove_tree(out_dir/name)

# %%
#| export
def _loop(run: _Run, table: CsvLog | None, board: Any, until: int, begin: float, desc: str, asked: list) -> bool:
    "Steps from where the run is to `until`, or until a signal has asked to stop; True if the run is complete"
    cfg, s = run.cfg, run.state
    is_stale = lambda: cfg.patience is not None and s.stale >= cfg.patience
    if is_stale(): return True
    every = cfg.checkpoint_every or run.per_epoch
    check_every = cfg.validate_every or run.per_epoch
    run.model.train()
    bar = iter(progress(range(max(0, until - s.step)), desc, unit="step"))
    while s.step < until:
        s.epoch, position = divmod(s.step, run.per_epoch)
        stream = run.batches.epoch(s.epoch, position*cfg.accumulate, s.rank, s.world)
        while position < run.per_epoch and s.step < until:
            parts = list(itertools.islice(stream, cfg.accumulate))
            if not parts: raise DataError(f"batches: epoch {s.epoch} ended after {position} of {run.per_epoch} steps")
            with seeded(cfg.seed, "step", s.step, s.rank): numbers = run.step(parts)
            if numbers is None:
                s.step += 1 # the position moves on, or the same batch would come again for ever
                numbers = {"skipped": 1.0}
            position += 1
            next(bar, None)
            s.metrics.update(numbers)
            if s.step % check_every == 0 or s.step == s.total:
                found = run.check()
                numbers.update(found)
                s.metrics.update(found)
                if found: run.tell("validate")
            if table is not None: table.add({"step": s.step, "epoch": s.epoch, **numbers})
            if board is not None:
                for k, v in numbers.items(): board.add_scalar(k, v, s.step)
            run.tell("step")
            if s.step % every == 0 or s.step == until or is_stale() or asked: run.save()
            if asked: raise KeyboardInterrupt
            if is_stale():
                log.info("stopped at step %d: %s did not improve in %d validations", s.step, cfg.monitor, cfg.patience)
                return True
        if position == run.per_epoch: run.tell("epoch")
    if s.step >= s.total: log.info("%d steps in %s", s.total, human_time(time.monotonic() - begin))
    return s.step >= s.total

# %%
#| export
def at_start(
    write: Callable[[], Any], # leaves what belongs beside the checkpoints, such as settings
) -> Callable[[str, FitState], None]: # callback of `fit`
    "Call `write` once, in the first process, when `fit` has accepted the folder: a run that is refused changes nothing"
    def tell(event: str, state: FitState) -> None:
        if event == "start" and state.rank == 0: write()
    return tell

def fit(
    model: nn.Module, # trained in place
    batches: Batches, # or anything with .steps(world), .epoch(epoch, start, rank, world) and .dataset
    loss: Callable[[nn.Module, Any], Any], # (model, batch) -> scalar tensor, or dict with 'loss' and other scalars
    cfg: FitConfig = FitConfig(), # length, optimiser, precision, checkpoints
    *,
    out_dir: str | os.PathLike, # folder of the run: checkpoints, log.csv, weights; created
    validate: Callable[[nn.Module, FitState], Mapping[str, float]] | None = None, # numbers, among them cfg.monitor
    callbacks: Sequence[Callable[[str, FitState], None]] = (), # told 'start', 'step', 'epoch', 'validate', 'end'
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None, # instead of cfg.optimizer
    config: Any = None, # everything else that decides the result (data list, model settings); stored and compared
    on_exists: OnExists = "skip", # "skip": resume the run in `out_dir`, "overwrite": start anew, "error": refuse
    stop_at: int | None = None, # end this part of the run after so many steps in all (jobs with a time limit)
    desc: str = "training", # shown beside the progress bar
) -> FitResult: # what the run left behind
    """Train `model`; interrupted runs go on exactly where they stopped.

    Callbacks are told 'start' when the folder has been accepted and before the first step; see `at_start`.
    """
    if cfg.patience is not None and validate is None:
        raise ConfigError("patience: counts validations, and this training has none. Leave patience out, or keep cases "
                          "for validation")
    out_dir, begin = Path(out_dir), time.monotonic()
    main = int(os.environ.get("RANK", 0)) == 0
    if main: out_dir.parent.mkdir(parents=True, exist_ok=True)
    free = {"epochs", "steps"} if cfg.schedule == "constant" else set()
    free |= {"keep", "checkpoint_every", "device", "tensorboard"}
    identity = fingerprint([cfg.model_dump(mode="json", exclude=free), config])
    with (lock(out_dir) if main else nullcontext(), _stop_politely() as asked, _own_forward(model),
          seeded(cfg.seed, "fit")):
        if main:
            if on_exists != "skip": check_output(out_dir, on_exists)
            if out_dir.exists() and not out_dir.is_dir():
                raise OutputExists(f"output {out_dir} is a file, a folder is needed. Choose another name")
            (out_dir/"checkpoints").mkdir(parents=True, exist_ok=True)
            for folder in (out_dir, out_dir/"checkpoints"): sweep_temporary(folder)
            if on_exists == "overwrite": _clear(out_dir)
        run = _Run(model, batches, loss, cfg, out_dir, validate, callbacks, optimizer, identity, plain(config))
        run.acc.wait_for_everyone()
        run.restore()
        s, table, board = run.state, None, None
        if main:
            write_json(out_dir/"fit.json", {"identity": identity, "fit": cfg, "config": config})
            table = CsvLog(out_dir/"log.csv", upto=s.step)
            board = _tensorboard(out_dir, cfg.tensorboard)
        run.tell("start")
        until = s.total if stop_at is None else min(s.total, stop_at)
        try: done = _loop(run, table, board, until, begin, desc, asked)
        except KeyboardInterrupt:
            log.warning("interrupted at step %d; run the same command again to go on", s.step)
            raise
        finally:
            if table is not None: table.close()
            if board is not None: board.close()
        weights = out_dir/"model.safetensors"
        if main:
            final = model.state_dict() if run.ema is None else run.ema.shadow
            save_checkpoint(weights, {"step": s.step, "model": final, "config": config})
        run.acc.wait_for_everyone()
        run.tell("end")
        return FitResult(s.step, done, s.best, table.rows if table else [], weights, time.monotonic() - begin)

# %% [markdown]
# ## See it learn
# A small network learns on which side of a circle a point lies. Validation has its own points, drawn once.

# %%
def network(seed=0):
    with seeded(seed, "init"):
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1), nn.Flatten(0))

def bce(model, batch): return nn.functional.binary_cross_entropy_with_logits(model(batch["xy"]), batch["y"])

held = next(iter(Batches(Points(), 64, seed=99).epoch(0)))[1]
def score(model, state):
    right = (model(held["xy"]) > 0) == held["y"]
    return {"val_loss": float(bce(model, held)), "accuracy": float(right.float().mean())}

settings = FitConfig(epochs=100, lr=0.02, clip_norm=1.0, ema_decay=0.9, seed=1)
with tmpdir() as d:
    result = fit(network(), Batches(Points(), 16), bce, settings, out_dir=d/"run", validate=score)
    left = sorted(p.relative_to(d/"run").as_posix() for p in (d/"run").rglob("*") if p.is_file())
steps = [int(r["step"]) for r in result.log]
checked = [(int(r["step"]), float(r["val_loss"])) for r in result.log if r.get("val_loss")]
plot.curves({"training": (steps, [float(r["loss"]) for r in result.log]), "validation": tuple(zip(*checked))},
            xlabel="step", ylabel="loss")

# %%
left, f"accuracy {float(result.log[-1]['accuracy']):.2f}"

# %%
assert checked[-1][1] < 0.6*checked[0][1] and float(result.log[-1]["accuracy"]) > 0.85

# %% [markdown]
# ## Interrupted equals uninterrupted
# Two epochs, a stop, two more epochs in a new run with new objects: the same weights to the last bit, and the same log.

# %%
def weights_after(folder, stops):
    for stop in stops:
        net = network()
        done = fit(net, Batches(Points(), 16), bce, settings.model_copy(update={"epochs": 4}), out_dir=folder,
                   validate=score, stop_at=stop)
    return torch.cat([p.detach().ravel() for p in net.parameters()]), done.log

with tmpdir() as d:
    (straight, log_a), (resumed, log_b) = weights_after(d/"a", [None]), weights_after(d/"b", [8, 11, None])
torch.equal(straight, resumed), log_a == log_b

# %%
assert torch.equal(straight, resumed)
assert log_a == log_b and len(log_a) == 16, [log_a, log_b]

# %% [markdown]
# ## When the loss is not a number
# One bad scan among many: its steps are left out, then the run ends with its name.

# %%
class Poisoned(Points):
    keys = [f"scan_{i:02d}" for i in range(64)]
    def draw(self, index, rng):
        item = super().draw(index, rng)
        return {**item, "xy": item["xy"]*np.nan} if index == 5 else item

with tmpdir() as d:
    with raises(NonFiniteLoss, match="not finite for items .*scan_05"):
        fit(network(), Batches(Poisoned(), 4), bce, FitConfig(epochs=9, max_skips=2), out_dir=d/"run")
    kept = load_checkpoint(max((d/"run"/"checkpoints").iterdir()))
assert all(torch.isfinite(v).all() for v in kept["model"].values())
kept["step"], kept["skips"]

# %% [markdown]
# ## Two processes
# The same training under `torchrun` with two processes and half the batch each. Gradients are averaged between them, so
# the losses are those of one process with the whole batch.

# %%
script = """
import sys, numpy as np, torch
from torch import nn
from medvol_nb.torchcore import Batches, FitConfig, fit, seeded
class Points:
    def __len__(self): return 64
    def draw(self, index, rng):
        xy = rng.uniform(-1, 1, 2).astype(np.float32)
        return {"xy": xy, "y": np.float32(np.hypot(*xy) < 0.7)}
def bce(model, b): return nn.functional.binary_cross_entropy_with_logits(model(b["xy"]), b["y"])
with seeded(0, "init"): net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))
cfg = FitConfig(epochs=3, lr=0.02, clip_norm=1.0, device="cpu")
fit(net, Batches(Points(), int(sys.argv[2])), bce, cfg, out_dir=sys.argv[1])
"""
with tmpdir() as d:
    (d/"train.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = subprocess.run([*launch, d/"train.py", d/"two", "8"], env=env, capture_output=True, text=True)
    one = subprocess.run([sys.executable, d/"train.py", d/"one", "16"], env=env, capture_output=True, text=True)
    losses = [[float(r["loss"]) for r in read_csv(d/n/"log.csv")] for n in ("one", "two")]
f"largest difference {np.abs(np.subtract(*losses)).max():.1e} over {len(losses[0])} steps"

# %%
assert len(losses[0]) == 12 and close(*losses, 1e-5)
