# %% [markdown]
# # Devices, seeds and checkpoints
#
# > Where to compute, how to draw random numbers, and how to store a run so that it is never torn and runs no code.
#
# A PyTorch checkpoint is usually a pickle: loading one can run any program its author liked. And it is usually
# written in place, so that the night in which the disk fills up also destroys the last good state. Checkpoints here
# are [safetensors](https://huggingface.co/docs/safetensors) files. They hold numbers and plain JSON, nothing
# executable; every tensor has a checksum; and a file is either complete or not there.

# %%
#| default_exp checkpoints

# %%
#| export
import contextlib
import ctypes
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, atomic, check_output, log,
                            plain, seed_words)

# %%
import pickle
import resource

from medvol_nb.core import human_bytes, raises, tmpdir

# %% [markdown]
# ## Where to compute
# The only place that asks about accelerators. `"auto"` takes a GPU if there is one; a name that cannot be had is an
# error, not a silent fall back to the processor.

# %%
#| export
Precision = Literal["fp32", "bf16", "fp16"]

def device_for(
    name: str = "auto", # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
) -> torch.device: # device that exists
    "Device to compute on; under torchrun 'auto' and 'cuda' mean the GPU of this process"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto": name = "cuda" if torch.cuda.is_available() else "cpu"
    try: device = torch.device(name)
    except RuntimeError: raise ConfigError(f"device: {name!r} is not a device. Use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device: CUDA was asked for, but this PyTorch sees no GPU. Use --device cpu")
        index = local if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ConfigError(f"device: cuda:{index} was asked for, there are {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: this machine has no MPS device")
    return device

def precision_for(
    name: str, # 'auto', 'fp32', 'bf16' or 'fp16'
    device: torch.device, # where the model runs
) -> Precision: # 'auto' is bf16 on GPUs that have it, fp16 on others, fp32 elsewhere
    "Arithmetic that suits a device"
    if name != "auto": return name
    if device.type != "cuda": return "fp32"
    with torch.cuda.device(device): return "bf16" if torch.cuda.is_bf16_supported() else "fp16"

def autocast_for(
    device: torch.device, # where the model runs
    precision: Precision = "fp32", # arithmetic of matrix products
) -> contextlib.AbstractContextManager: # context for the forward pass
    "Mixed precision for inference; training gets its own from `fit`"
    if precision not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"precision: must be fp32, bf16 or fp16, got {precision!r}")
    if precision == "fp32": return contextlib.nullcontext()
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU, use bf16 or fp32 on the CPU")
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)

# %%
cpu = torch.device("cpu")
device_for("auto"), precision_for("auto", cpu), autocast_for(cpu, "bf16").fast_dtype

# %%
with raises(ConfigError, match="is not a device"): device_for("gpu")
with raises(ConfigError, match="fp16 needs a GPU"): autocast_for(torch.device("cpu"), "fp16")

# %% [markdown]
# ## How to draw random numbers
# `torch_rng_for` is the torch twin of `rng_for`: a generator named by seed and keys. Layers such as dropout, and the
# initialisation of weights, use the global generator of torch. `seeded` gives them a named stream for the length of a
# block and then puts the global state back.

# %%
#| export
def torch_rng_for(
    seed: int, # the run's seed, any integer >= 0
    *keys: int | str | float | bytes | tuple, # name of the stream
    device: str | torch.device = "cpu", # where the numbers are drawn
) -> torch.Generator: # independent of call order, worker and process
    "Torch generator of the stream named `(seed, *keys)`"
    w = seed_words(seed, *keys)
    return torch.Generator(device=device).manual_seed((w[0] | w[1] << 32) & (2**63 - 1))

@contextlib.contextmanager
def seeded(
    seed: int, # the run's seed, any integer >= 0
    *keys: int | str | float | bytes | tuple, # name of the stream
) -> Iterator[None]:
    "Run a block with torch's global generators on a named stream, and restore them afterwards"
    w = seed_words(seed, *keys)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed((w[0] | w[1] << 32) & (2**63 - 1))
        yield

# %%
before = torch.random.get_rng_state()
with seeded(0, "init"): first = nn.Linear(3, 2).weight.detach().clone()
with seeded(0, "init"): second = nn.Linear(3, 2).weight.detach().clone()
first, torch.rand(2, generator=torch_rng_for(0, "noise", 7))

# %%
assert torch.equal(first, second) and torch.equal(before, torch.random.get_rng_state())

# %% [markdown]
# ## Memory that is used again
# On a processor, every layer of a network asks for its output and gives it back a moment later. The GNU allocator
# returns such large blocks to the system at once, which has to fill them with zeros when they are asked for again: a
# fifth of the time of a small training. A process that goes on like this for hours does better to keep them.

# %%
#| export
@lru_cache(1)
def keep_freed_memory() -> bool: # False where the allocator is not GNU's
    "Let this process keep the memory it frees, for the next block of that size"
    if sys.platform != "linux": return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_mmap_max = -1, -4 # malloc.h
    return mallopt is not None and bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))

# %%
def new_pages(n: int = 20) -> int: # first touches of a page, each a visit to the system
    "What it costs to ask for 8 MB, n times"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n): torch.ones(2**21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
torch.ones(2**21)
kept, new_pages()

# %%
assert not kept or new_pages() < 2*2048 # less than for two blocks; 20 would be 40,960

# %% [markdown]
# ## Tensors in a tree
# The state of a training run is a nested dictionary with tensors at its leaves. For storage the tensors move into a
# flat table and the tree becomes JSON, with the tensors' names in their places. Dictionaries whose keys are not
# strings, as in optimisers, and tuples keep their type.

# %%
#| export
def _flatten(obj: Any, name: str, table: dict[str, torch.Tensor]) -> Any:
    "Move tensors of a tree into `table`; returns the JSON form of the tree"
    if isinstance(obj, torch.Tensor):
        while not name or name in table or name == "__metadata__": name += "_" # 'a/b' beside {'a': {'b': ...}}
        table[name] = obj.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return {"$tensor": name}
    if isinstance(obj, np.ndarray):
        native = np.array(obj, obj.dtype.newbyteorder("="), order="C")
        return {"$array": _flatten(torch.from_numpy(native), name, table)}
    if isinstance(obj, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in obj):
            return {k: _flatten(v, f"{name}/{k}" if name else k, table) for k, v in obj.items()}
        return {"$items": [[_flatten(k, name, table), _flatten(v, f"{name}/{k}", table)] for k, v in obj.items()]}
    if isinstance(obj, (list, tuple)):
        parts = [_flatten(v, f"{name}/{i}", table) for i, v in enumerate(obj)]
        return {"$tuple": parts} if isinstance(obj, tuple) else parts
    return plain(obj)

def _unflatten(obj: Any, table: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(obj, list): return [_unflatten(v, table) for v in obj]
    if not isinstance(obj, dict): return obj
    if "$tensor" in obj: return table[obj["$tensor"]]
    if "$array" in obj: return _unflatten(obj["$array"], table).numpy()
    if "$items" in obj: return {_unflatten(k, table): _unflatten(v, table) for k, v in obj["$items"]}
    if "$tuple" in obj: return tuple(_unflatten(v, table) for v in obj["$tuple"])
    return {k: _unflatten(v, table) for k, v in obj.items()}

def _crc(t: torch.Tensor) -> int:
    "Checksum of number type, shape and bytes"
    head = zlib.crc32(f"{t.dtype}{tuple(t.shape)}".encode())
    return zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, head) if t.numel() else head

# %%
#| export
CHECKPOINT_VERSION = 1

def save_checkpoint(
    path: str | os.PathLike, # file, by convention *.safetensors
    state: Mapping[str, Any], # nested dicts, lists, tuples, tensors, arrays and plain values
    on_exists: OnExists = "overwrite", # what to do when `path` is there already
) -> Path: # `path`
    "Write a state atomically, with a checksum for every tensor and nothing executable"
    from safetensors.torch import save_file
    if not check_output(path, on_exists): return Path(path)
    table: dict[str, torch.Tensor] = {}
    tree = _flatten(dict(state), "", table)
    table = {k: v.clone() if v.untyped_storage().nbytes() > v.nbytes else v for k, v in table.items()}
    seen: dict[int, str] = {}
    for k, v in table.items():
        if v.numel() and v.data_ptr() in seen: table[k] = v.clone()
        seen[table[k].data_ptr()] = k
    note = {"version": CHECKPOINT_VERSION, "tree": tree, "crc32": {k: _crc(v) for k, v in table.items()}}
    text = json.dumps(note, allow_nan=True)
    with atomic(path) as t: # a single entry of metadata: safetensors writes several in random order
        try: save_file(table, str(t), metadata={"medvol_nb": f"{zlib.crc32(text.encode()):08x} {text}"})
        except KeyError as e: raise DataError(f"{path}: tensors of type {e} cannot be stored") from None
    return Path(path)

def load_checkpoint(
    path: str | os.PathLike, # file written by `save_checkpoint`
) -> dict[str, Any]: # the state, tensors on the CPU
    "Read a state; a torn, truncated or altered file is an error"
    from safetensors import SafetensorError, safe_open
    path = Path(path)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as f:
            text = (f.metadata() or {}).get("medvol_nb")
            table = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError, ValueError) as e:
        raise FormatError(f"{path}: not a readable checkpoint ({e})") from None
    if text is None: raise FormatError(f"{path}: holds weights, not a checkpoint of this library. Use load_foreign")
    crc, _, text = text.partition(" ")
    if crc != f"{zlib.crc32(text.encode()):08x}": raise FormatError(f"{path}: damaged, its header was altered")
    note = json.loads(text)
    if note["version"] > CHECKPOINT_VERSION:
        raise FormatError(f"{path}: written by a newer version (format {note['version']}, this one reads "
                          f"{CHECKPOINT_VERSION})")
    bad = [k for k, crc in note["crc32"].items() if k not in table or _crc(table[k]) != crc]
    if bad: raise FormatError(f"{path}: damaged, checksum of {len(bad)} tensors differs, first {bad[0]!r}")
    return _unflatten(note["tree"], table)

# %%
model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.rand(5, 4)).sum().backward()
optimizer.step()
state = {"step": 7, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "shape": (3, 4), "best": np.inf}
with tmpdir() as d:
    save_checkpoint(d/"a.safetensors", state)
    back, size = load_checkpoint(d/"a.safetensors"), (d/"a.safetensors").stat().st_size
back["step"], back["shape"], back["best"], list(back["optimizer"]["state"]), human_bytes(size)

# %%
assert torch.equal(back["model"]["0.weight"], model[0].weight)
assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
optimizer.load_state_dict(back["optimizer"])

# %% [markdown]
# ## The newest one that is whole
# A run keeps its last few checkpoints. After a crash it goes on from the newest that can be read; a damaged one is
# reported and passed over.

# %%
#| export
def checkpoint_path(
    folder: str | os.PathLike, # of the checkpoints
    step: int, # optimiser steps done
) -> Path: # name that sorts by step
    "File of the checkpoint after `step` steps"
    return Path(folder)/f"step-{step:09d}.safetensors"

def _numbered(folder: str | os.PathLike) -> list[Path]:
    return sorted(p for p in Path(folder).glob("step-*.safetensors") if re.fullmatch(r"step-\d{9}", p.stem))

def latest_checkpoint(
    folder: str | os.PathLike, # of the checkpoints; need not exist
) -> tuple[Path, dict[str, Any]] | None: # file and state; None if there is no readable one
    "Newest checkpoint that is whole"
    for path in reversed(_numbered(folder)):
        try: return path, load_checkpoint(path)
        except FormatError as e: log.warning("checkpoint passed over: %s", e)
    return None

def prune_checkpoints(
    folder: str | os.PathLike, # of the checkpoints
    keep: int, # how many of the newest to keep; 0 keeps all
) -> list[str]: # names removed
    "Remove old numbered checkpoints"
    old = _numbered(folder)[:-keep] if keep > 0 else []
    for p in old: p.unlink()
    return [p.name for p in old]

# %%
with tmpdir() as d:
    for step in (10, 20, 30): save_checkpoint(checkpoint_path(d, step), {"step": step, "w": torch.ones(100)})
    raw = bytearray(checkpoint_path(d, 30).read_bytes())
    raw[-5] ^= 1
    checkpoint_path(d, 30).write_bytes(raw)
    with raises(FormatError, match="checksum of 1 tensors differs, first 'w'"): load_checkpoint(checkpoint_path(d, 30))
    found = latest_checkpoint(d)[1]["step"]
    pruned = prune_checkpoints(d, keep=2)
found, pruned

# %%
assert found == 20 and pruned == ["step-000000010.safetensors"]

# %% [markdown]
# ## Weights into a model
# When names or shapes do not fit, the three lists that matter are missing, unexpected and changed keys. `load_weights`
# puts them in the error; `strict=False` loads what fits and returns the lists.

# %%
#| export
@dataclass(frozen=True)
class WeightReport:
    "How a set of weights fits a model"
    loaded: tuple[str, ...] # names that fit
    missing: tuple[str, ...] # in the model, not in the file
    unexpected: tuple[str, ...] # in the file, not in the model
    changed: tuple[str, ...] # in both, with different shapes: 'name (2, 3) -> (2, 4)'

def load_weights(
    model: nn.Module, # takes the weights, in place
    weights: Mapping[str, torch.Tensor], # n-d arrays by name
    strict: bool = True, # every tensor must fit; False loads those that do
) -> WeightReport: # what happened
    "Load weights by name and say exactly what did not fit"
    own = model.state_dict()
    short = lambda names: ", ".join(list(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    changed = {k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape}
    fits = [k for k in own if k in weights and k not in changed]
    shapes = (f"{k} {tuple(weights[k].shape)} -> {tuple(own[k].shape)}" for k in own if k in changed)
    report = WeightReport(tuple(fits), tuple(k for k in own if k not in weights),
                          tuple(k for k in weights if k not in own), tuple(shapes))
    if strict and (report.missing or report.unexpected or report.changed):
        lists = (("missing", report.missing), ("unexpected", report.unexpected), ("changed in shape", report.changed))
        parts = [f"{len(names)} {what}: {short(names)}" for what, names in lists if names]
        raise DataError("weights do not fit the model: " + "; ".join(parts))
    model.load_state_dict({k: weights[k] for k in fits}, strict=False)
    return report

# %%
other = nn.Sequential(nn.Linear(5, 3), nn.Identity(), nn.Linear(3, 1))
with raises(DataError, match=r"2 missing: 2.weight, 2.bias; 5 unexpected: .*; 1 changed in shape: 0.weight \(3, 4\)"):
    load_weights(other, model.state_dict())
load_weights(other, model.state_dict(), strict=False).loaded

# %% [markdown]
# ## Weights of other tools
# Published weights come as `.pth` pickles or `.safetensors`. Pickles are opened with torch's restricted reader only,
# which builds tensors and plain containers and refuses the rest. Names are then translated by a registry of
# converters; each recognises its own layout.

# %%
#| export
@dataclass(frozen=True)
class Converter:
    "How to recognise and rename the weights of another tool"
    name: str # shown in messages
    fits: Callable[[Mapping[str, torch.Tensor]], bool] # looks at the names and shapes of n-d arrays
    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] # renames and reshapes n-d arrays

def load_foreign(
    path: str | os.PathLike, # .safetensors, .pth, .pt, .ckpt or .bin file with weights
    converters: tuple[Converter, ...] = (), # tried in order; none: names stay as they are
) -> dict[str, torch.Tensor]: # name -> tensor, on the CPU
    "Read weights written elsewhere without running any code from the file"
    path = Path(path)
    if not path.is_file(): raise MissingFile(f"{path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try: weights: Any = load_file(str(path))
        except (SafetensorError, OSError, ValueError) as e:
            raise FormatError(f"{path}: not a readable weight file ({e})") from None
    else:
        try: weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            why = (str(e) or type(e).__name__).splitlines()[0][:120]
            raise FormatError(f"{path}: refused or damaged. Only tensors and plain containers are read from pickles, "
                              f"nothing that runs code ({why})") from None
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping): weights = weights[key]
    tensors = isinstance(weights, Mapping) and all(isinstance(v, torch.Tensor) for v in weights.values())
    if not tensors or not weights:
        raise FormatError(f"{path}: holds no table of tensors")
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    if not converters: return weights
    for c in converters:
        if c.fits(weights): return c.convert(weights)
    known, first = ", ".join(c.name for c in converters), ", ".join(list(weights)[:4])
    raise FormatError(f"{path}: layout not recognised. Known: {known}; first names in the file: {first}")

# %%
class Canary:
    def __reduce__(self): return os.mkdir, (str(folder/"canary"),)

with tmpdir() as folder:
    torch.save({"state_dict": {"module.w": torch.ones(2)}}, folder/"good.pth")
    (folder/"bad.pth").write_bytes(pickle.dumps({"w": Canary()}))
    good = load_foreign(folder/"good.pth")
    with raises(FormatError, match="refused or damaged"): load_foreign(folder/"bad.pth")
    canary = (folder/"canary").exists()
good, canary

# %%
assert not canary and list(good) == ["w"]
