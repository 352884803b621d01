# %% [markdown]
# # Prediction of volumes larger than memory
#
# > Column by column, each voxel written once, and after an interruption on to the same bytes.
#
# Predictions of overlapping patches have to be averaged, and a volume of a terabyte does not fit in memory. The
# reference keeps sums and counts on disk and reads, adds and writes both for every patch: 466 MB of chunks for a patch
# of 38 MB, a hundred times the work of the network. Its successor stores every patch and blends later, which takes 64
# bytes for each voxel. Neither can be resumed.
#
# Here the plane is divided into *columns* whose sums fit in memory. A column is swept along z ([grid](06_grid.ipynb)):
# the sums reach as far as a patch is deep, finished rows of chunks leave for the store
# ([outputs](58_zarrnet_outputs.ipynb)) and are marked. Patches between two columns are predicted once
# ([columns](57b_zarrnet_columns.ipynb)). What comes out does not depend on the columns, the parts, or where a run was
# interrupted: every voxel adds the same numbers in the same order.

# %%
#| default_exp zarrnet.infer

# %%
#| export
import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medvol_nb.checkpoints import Precision, autocast_for, device_for
from medvol_nb.core import (ConfigError, DataError, Locked, check_output, fingerprint, human_bytes, lock,
                            remove_tree)
from medvol_nb.grid import Box, Grid, _Slab, _slab_bytes, sweep_bytes, sweep_rows
from medvol_nb.zarrnet.columns import Carry, Column, Writer, ahead, columns_of, piece_of, room_in
from medvol_nb.zarrnet.config import InferenceParams, Target
from medvol_nb.zarrnet.geometry import unit_vectors
from medvol_nb.zarrnet.io import ChunkedVolume, open_volume
from medvol_nb.zarrnet.model import activate
from medvol_nb.zarrnet.outputs import (PROGRESS, Encoding, Format, Predictions, axis_tensors, create_predictions,
                                       encoding_for, finish_predictions, principal_axes)

# %%
import matplotlib.pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import raises, tmpdir
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr

# %% [markdown]
# ## A model, seen from outside
# A model is anything with `predict`, from a batch `(b, c, z, y, x)` to a dict of activated values by target. Four
# things happen around it. The last batch of a run is filled up: with another batch size, libraries choose other
# algorithms, and a resumed run would differ in the last bit. With `tta: mirror` the eight mirror images are predicted
# and turned back, vectors with the sign of the component along each mirrored axis. If logits are to be averaged, or
# another activation is asked for, the model is called for its logits instead. And a value that is not finite stops the
# run, where otherwise it would spread over all voxels of its patch.

# %%
#| export
_SPATIAL = (-3, -2, -1)
_MIRRORS = [axes for n in range(4) for axes in itertools.combinations(_SPATIAL, n)]

class Forward:
    "A model as the sweep wants it: arrays in, arrays out, all targets side by side"
    def __init__(
        self,
        model: Any, # has `predict(x) -> {target: values}`; for logits it is called
        encodings: Sequence[Encoding], # targets in order
        *,
        batch: int = 1, # patches in a forward pass, the last one is filled up
        mirror: bool = False, # mean over the 8 mirror images
        logits: bool = False, # hand out logits, to be activated after averaging
        override: bool = False, # activations of the encodings instead of the model's own
        normalizer: Callable | None = None, # (c, z, y, x) -> (c, z, y, x) float32, for each patch
        device: str = "auto", # see `device_for`
        precision: Precision = "fp32", # see `autocast_for`
    ):
        self.model, self.encodings, self.batch, self.mirror = model, list(encodings), batch, mirror
        self.logits, self.override, self.normalizer = logits, override, normalizer
        self.device, self.precision = device_for(device), precision
        self.channels = sum(e.averaged for e in self.encodings)
        self.patches, self.seconds = 0, 0.0
        if isinstance(model, torch.nn.Module): model.to(self.device).eval()

    def prepare(
        self,
        patches: np.ndarray, # (b, c, z, y, x) as stored
    ) -> np.ndarray: # (b, c, z, y, x) float32
        "Normalise; may run in another thread than the model"
        if self.normalizer is None: return patches.astype(np.float32)
        return np.stack([np.asarray(self.normalizer(p), np.float32) for p in patches])

    def _values(self, x: torch.Tensor) -> torch.Tensor:
        raw = self.logits or self.override
        with autocast_for(self.device, self.precision): out = self.model(x) if raw else self.model.predict(x)
        parts = []
        for e in self.encodings:
            if e.target not in out:
                raise DataError(f"model: gives no target '{e.target}', but {', '.join(map(str, out)) or 'nothing'}")
            y, wanted = out[e.target].float(), (len(x), e.channels, *x.shape[2:])
            if tuple(y.shape) != wanted:
                raise DataError(f"model: target '{e.target}' must have shape {wanted}, got {tuple(y.shape)}")
            parts.append(activate(y, e.activation, e.kind) if raw and not self.logits else y)
        return torch.cat(parts, 1)

    def _signs(self, axes: Sequence[int]) -> torch.Tensor:
        "-1 for the component of a vector along a mirrored axis; components are (x, y, z), axes (z, y, x)"
        signs = [[-1.0 if -1 - c in axes else 1.0 for c in range(3)] if e.kind == "normals" else [1.0]*e.channels
                 for e in self.encodings]
        return torch.tensor(sum(signs, []), device=self.device).reshape(1, -1, 1, 1, 1)

    def _unsigned(self, y: torch.Tensor) -> torch.Tensor:
        "Lines as tensors that can be averaged"
        if not any(e.axial for e in self.encodings): return y
        parts = y.split([e.channels for e in self.encodings], 1)
        lift = lambda v: axis_tensors(v.transpose(0, 1)).transpose(0, 1)
        return torch.cat([lift(v) if e.axial else v for e, v in zip(self.encodings, parts)], 1)

    def __call__(
        self,
        patches: np.ndarray, # (b, c, z, y, x) float32
    ) -> np.ndarray: # (b, channels, z, y, x) float32
        "Predict a batch"
        began, n = time.perf_counter(), len(patches)
        x = torch.from_numpy(np.ascontiguousarray(patches)).to(self.device)
        if n < self.batch: x = torch.cat([x, x[-1:].expand(self.batch - n, *x.shape[1:])])
        with torch.inference_mode():
            total = None
            for axes in _MIRRORS if self.mirror else [()]:
                y = self._values(x.flip(axes) if axes else x)
                if axes: y = y.flip(axes)*self._signs(axes)
                y = self._unsigned(y)
                total = y if total is None else total + y
            y = (total/len(_MIRRORS) if self.mirror else total)[:n].cpu().numpy()
        if not np.isfinite(y).all(): raise DataError("model: predicted values that are not finite. Check the weights, "
                                                     "the normalisation, or use precision fp32")
        self.patches, self.seconds = self.patches + n, self.seconds + time.perf_counter() - began
        return y

# %% [markdown]
# The model of this page sees sheets by their brightness, and their normals by the gradient, as a first layer would. It
# is small, and wrong near the borders of its patch: what a convolution does with zeros there.

# %%
class Gradient(torch.nn.Module):
    "Sheet probability and normals from smoothed brightness, with zero padding as a network has it"
    def __init__(self, reach=3):
        super().__init__()
        self.reach = reach

    def forward(self, x):
        for _ in range(self.reach): x = torch.nn.functional.avg_pool3d(x, 3, 1, 1)
        along = [torch.nn.functional.pad(x.diff(dim=a), (0, 0)*(-1 - a) + (0, 1)) for a in (-1, -2, -3)]
        return {"sheet": 12*(x - 0.45), "normals": torch.cat(along, 1)}

    def predict(self, x):
        out = self(x)
        return {"sheet": out["sheet"].sigmoid(), "normals": activate(out["normals"], "none", "normals")}

model = Gradient()
targets = {"sheet": Target(channels=1, activation="sigmoid"), "normals": Target(channels=3)}
both = [encoding_for(n, t) for n, t in targets.items()]
roll = phantoms.sheets((40, 64, 72))
scaled = roll.img.astype(np.float32)/255
plain_run, mirrored = (Forward(model, both, mirror=m)(scaled[None, None]) for m in (False, True))
fig, axes = plt.subplots(1, 3, figsize=(7, 2.3))
for ax, a, title in zip(axes, (scaled[20], plain_run[0, 0, 20], plain_run[0, 1:, 20].transpose(1, 2, 0)/2 + 0.5),
                        ("input", "sheet", "normals as colours")):
    ax.imshow(a, cmap="Greys_r")
    ax.set(xticks=[], yticks=[], title=title)

# %% [markdown]
# Mirroring is a symmetry: the prediction of a mirrored volume is the mirrored prediction, with the component turned.

# %%
flipped = Forward(model, both, mirror=True)(scaled[None, None, :, :, ::-1])[0]
back = flipped[..., ::-1]*np.array([1, -1, 1, 1]).reshape(-1, 1, 1, 1)
assert np.abs(back - mirrored[0]).max() < 1e-6 and np.abs(plain_run - mirrored).max() > 1e-3
assert np.array_equal(Forward(model, both, batch=4)(scaled[None, None]), plain_run)
with raises(DataError, match="gives no target 'ink', but sheet, normals"):
    Forward(model, [encoding_for("ink", Target(channels=1, activation="sigmoid"))])(scaled[None, None])

# %% [markdown]
# ## What need not be predicted
# Most of a scanned scroll is air. A patch is left out if the store holds none of its chunks, if all its voxels are
# equal, or if the mask is zero in all of it. Such patches carry no weight: were they predicted as "no", they would
# pull their neighbours down. Voxels that no patch reaches, and voxels outside the mask, are background, which is not
# the same as a logit of 0.

# %%
#| export
class _Input:
    "A volume with its channels as a first axis, as the sweep wants it"
    def __init__(self, vol: ChunkedVolume):
        self.vol, self.dtype, self.chunks, self.shards = vol, vol.dtype, vol.chunks, vol.shards
        self.shape = (*([] if vol.channels is None else [vol.channels]), *vol.shape)
        self.ndim = len(self.shape)

    def __getitem__(self, key: tuple) -> np.ndarray: return self.vol[key[-3:]]

def is_constant(
    patch: np.ndarray, # (c, z, y, x)
) -> bool: # nothing to see
    "Whether all voxels of each channel are equal"
    first = patch[(slice(None), *(slice(0, 1),)*(patch.ndim - 1))]
    sparse = patch[(slice(None), *(slice(None, None, 7),)*(patch.ndim - 1))]
    return bool((sparse == first).all() and (patch == first).all())

def occupied(
    vol: ChunkedVolume, # in a store
    grid: Grid, # positions
) -> np.ndarray | None: # (positions along z, y, x) bool; None: the store cannot be listed
    "Positions whose patch touches a chunk that the store holds"
    stored = vol.stored_chunks()
    if stored is None: return None
    unit = vol.shards or vol.chunks
    counts = np.zeros([-(-n//u) + 1 for n, u in zip(grid.shape, unit)], np.int32)
    if stored: counts[tuple(np.array(stored).T + 1)] = 1
    for axis in range(3): np.cumsum(counts, axis=axis, out=counts)
    lows = [np.maximum(s, 0)//u for s, u in zip(grid.starts, unit)]
    highs = [(np.minimum(s + p, n) - 1)//u + 1 for s, p, n, u in zip(grid.starts, grid.patch_size, grid.shape, unit)]
    total = np.zeros([len(s) for s in grid.starts], np.int32)
    for corner in itertools.product((0, 1), repeat=3):
        at = np.ix_(*(h if k else lo for k, lo, h in zip(corner, lows, highs)))
        total += (-1)**(3 - sum(corner))*counts[at]
    return total > 0

# %%
with tmpdir() as d:
    sparse = np.zeros((40, 64, 72), np.uint8)
    sparse[16:30, 40:] = roll.img[16:30, 40:]
    write_zarr(Volume(sparse, affine_from(1.0, axes="zyx"), "zyx"), d/"sparse.zarr", chunks=16)
    vol = open_volume(d/"sparse.zarr")
    grid = Grid(vol.shape, 16, 0.5)
    there = occupied(vol, grid)
    brute = np.array([sparse[grid.slices(s)[0]].any() for s in grid]).reshape(there.shape)
int(there.sum()), int(brute.sum()), there.size

# %%
assert not (brute & ~there).any() and there.sum() < there.size/2
assert is_constant(np.full((2, 4, 4, 4), 3)) and not is_constant(scaled[None])

# %% [markdown]
# ## One job, two ways to run it
# `predict_array` and `predict_volume` share a description of the work: grid, weights, rules of skipping, and what
# happens to averaged values. The first blends in memory, and is what the second is compared with.

# %%
#| export
@dataclass
class _Job:
    "What is predicted, from what, and by which rules"
    source: ChunkedVolume
    encodings: list[Encoding]
    forward: Forward
    settings: InferenceParams
    mask: ChunkedVolume | None = None

    @cached_property
    def grid(self) -> Grid: return Grid(self.source.shape, self.settings.patch_size, self.settings.overlap)

    @cached_property
    def input(self) -> _Input: return _Input(self.source)

    @cached_property
    def _occupied(self) -> tuple[np.ndarray | None, list[dict]]:
        places = [{int(s): k for k, s in enumerate(starts)} for starts in self.grid.starts]
        return occupied(self.source, self.grid), places

    @property
    def holes(self) -> bool: return self.settings.skip_empty or self.mask is not None

    def _skip(self, box: Box) -> Callable:
        "Rule for positions, asked in the order of the grid"
        (there, places) = self._occupied if self.settings.skip_empty else (None, None)
        slab = None if self.mask is None else _Slab(_Input(self.mask), self.grid, box, 0)
        def skip(start: tuple) -> bool:
            if there is not None and not there[tuple(p[s] for p, s in zip(places, start))]: return True
            return slab is not None and not (slab.take(start) > self.settings.mask_threshold).any()
        return skip

    def sweep(self, region: Box | None = None, pipe: Callable | None = None, **options: Any) -> Iterator:
        "Averaged values of all targets, NaN where nothing is known"
        s, box = self.settings, region or [(0, n) for n in self.grid.shape]
        def prepared(groups: Iterator) -> Iterator:
            for group, patches in groups: yield group, None if patches is None else self.forward.prepare(patches)
        return sweep_rows(self.forward, self.input, self.grid, channels=self.forward.channels, kind=s.blend,
                          sigma_scale=s.sigma_scale, batch=self.forward.batch, region=region, empty=np.nan,
                          skip=self._skip(box) if self.holes else None, drop=is_constant if s.skip_empty else None,
                          pipe=lambda groups: (pipe or iter)(prepared(groups)), desc="predict", **options)

    def values(self, block: np.ndarray, corner: Sequence[int]) -> Iterator[tuple[Encoding, np.ndarray]]:
        "Final values of each target in a box, NaN outside the mask"
        if self.mask is not None:
            inside = self.mask[tuple(slice(a, a + n) for a, n in zip(corner, block.shape[1:]))]
            block = np.where(inside > self.settings.mask_threshold, block, np.nan)
        at = 0
        for e in self.encodings:
            part, at = block[at:at + e.averaged], at + e.averaged
            if e.axial: part = principal_axes(part)
            if self.forward.logits and e.kind != "normals":
                part = activate(torch.from_numpy(part)[None], e.activation)[0].numpy()
            yield e, part

def _job(model: Any, source: ChunkedVolume, targets: Mapping[str, Target], settings: InferenceParams, *, average: str,
         normalizer: Any, device: str, precision: Precision, mask: Any = None, argmax: Iterable[str] = ()) -> _Job:
    "Check what was asked for and put it together"
    if average not in ("values", "logits"): raise ConfigError(f"average: must be values or logits, got {average!r}")
    if settings.patch_size is None: raise ConfigError("inference_params.patch_size: is not set, nor does a checkpoint "
                                                      "give one")
    names = list(targets) if settings.output_targets == "all" else list(settings.output_targets)
    overrides, argmax = settings.activation_override or {}, set(argmax)
    for what, given in (("output_targets", names), ("activation_override", overrides), ("argmax", argmax)):
        if unknown := [n for n in given if n not in targets]:
            raise ConfigError(f"inference_params.{what}: {unknown[0]!r} is not a target, only {', '.join(targets)} are")
    encodings = [encoding_for(n, targets[n], settings.output_type, activation=overrides.get(n), argmax=n in argmax)
                 for n in names]
    if mask is not None and (mask.shape != source.shape or mask.channels is not None):
        raise DataError(f"mask {mask.path}: must have the shape {source.shape} of the input and no channels, "
                        f"got {mask.shape}" + (f" with {mask.channels} channels" if mask.channels else ""))
    grid = Grid(source.shape, settings.patch_size, settings.overlap)
    for (_, hi), n, axis in zip(settings.bbox or (), source.shape, "zyx"):
        if hi > n: raise ConfigError(f"inference_params.bbox: axis {axis} ends at {hi}, the volume at {n}")
    forward = Forward(model, encodings, batch=min(settings.batch_size, len(grid)), mirror=settings.tta == "mirror",
                      logits=average == "logits", override=bool(overrides), normalizer=normalizer, device=device,
                      precision=precision)
    return _Job(source, encodings, forward, settings, mask)

# %%
#| export
def predict_array(
    model: Any, # see `Forward`
    array: np.ndarray, # (z, y, x) or (c, z, y, x)
    targets: Mapping[str, Target], # name -> settings
    settings: InferenceParams, # grid, weights, rules; nothing is read or written
    *,
    mask: np.ndarray | None = None, # (z, y, x), background where it is not above `mask_threshold`
    normalizer: Callable | None = None, # (c, z, y, x) -> (c, z, y, x) float32, for each patch
    average: str = "values", # or "logits", to be activated afterwards
    device: str = "auto", # see `device_for`
    precision: Precision = "fp32", # see `autocast_for`
) -> dict[str, np.ndarray]: # name -> (c, z, y, x) float32
    "Predict a volume in memory: the reference for `predict_volume`"
    if array.ndim not in (3, 4): raise DataError(f"array: must be (z, y, x) or (c, z, y, x), got shape {array.shape}")
    source = open_volume(array, channel_axis=None if array.ndim == 3 else 0)
    job = _job(model, source, targets, settings, average=average, normalizer=normalizer, device=device,
               precision=precision, mask=None if mask is None else open_volume(mask))
    out = np.empty((job.forward.channels, *source.shape), np.float32)
    for low, rows in job.sweep(): out[:, low:low + rows.shape[1]] = rows
    return {e.target: unit_vectors(v) if e.kind == "normals" else np.nan_to_num(v)
            for e, v in job.values(out, (0, 0, 0))}

# %% [markdown]
# A patch sees less than the volume, and a convolution fills in zeros at its border. The seams that this leaves are the
# difference to one prediction of the whole volume at once. Without overlap they are as strong as the signal; overlap
# with equal weights spreads them; the bell-shaped window removes what patches cannot know.

# %%
def settings(**keys): return InferenceParams(**{"patch_size": (24, 24, 24), "skip_empty": False} | keys)

one_shot = predict_array(model, scaled, targets, settings(patch_size=scaled.shape))
ways = {"constant, overlap 0": ("constant", 0), "constant, 0.5": ("constant", 0.5), "gaussian, 0.5": ("gaussian", 0.5)}
fig, axes = plt.subplots(1, 4, figsize=(7, 2.2))
axes[0].imshow(one_shot["sheet"][0, 20], cmap="Greys_r", vmin=0, vmax=1)
axes[0].set_title("sheet, one shot", fontsize=9)
seams = {}
for ax, (name, (blend, overlap)) in zip(axes[1:], ways.items()):
    out = predict_array(model, scaled, targets, settings(blend=blend, overlap=overlap))
    off = np.abs(out["sheet"] - one_shot["sheet"])[0]
    seams[name] = float(off.mean())
    ax.imshow(off[20], cmap="magma", vmin=0, vmax=0.3)
    ax.set_title(f"{name}\nmean {off.mean():.4f}", fontsize=9)
for ax in axes: ax.set(xticks=[], yticks=[])

# %%
assert seams["gaussian, 0.5"] < 0.05*min(seams["constant, 0.5"], seams["constant, overlap 0"])

# %% [markdown]
# ## Columns
# A column of $T_y \times T_x$ voxels in the plane holds $4(\sum C + 1)(p_z + c_z)\,T_y T_x$ bytes of sums, with $C$
# channels for each target, patches $p_z$ and chunks $c_z$ deep; besides the input rows of its patches, and the pieces
# on their way out. The largest $T_y$ and $T_x$ are taken that `max_memory_gb` allows. Columns lie on the grid of output
# chunks, so that every chunk has one writer, and the grid of patches is that of the whole volume, so that columns agree
# with each other.

# %%
#| export
def _column_bytes(job: _Job, form: Format, box: Box) -> int:
    "Memory that a column takes: sums, input rows, batches on both sides of the model, pieces on their way out"
    tile, patch, c = piece_of(form.chunks, form.shape), math.prod(job.grid.patch_size), job.forward.channels
    held = sweep_bytes(job.grid, c, region=box, align=form.chunks[0], source=job.input, holes=job.holes, tile=tile)
    if job.mask is not None: held += _slab_bytes(_Input(job.mask), job.grid, box)
    lead = job.source.channels or 1
    batches = job.forward.batch*patch*(2*lead*(2*job.input.dtype.itemsize + 4) + 3*4*c)
    return held + batches + 5*4*c*form.chunks[0]*math.prod(tile)

def _fit_columns(job: _Job, form: Format, box: Box, parts: int, budget: int) -> tuple[int, int]:
    "Size of the largest columns that fit, and of which there are enough for all parts"
    units = [-(-hi//c) - lo//c for (lo, hi), c in zip(box[1:], form.chunks[1:])]
    best = None
    for most in range(max(units), 0, -1):
        counts = [-(-u//min(most, u)) for u in units]
        size = tuple(-(-u//n)*c for u, n, c in zip(units, counts, form.chunks[1:]))
        need = max(_column_bytes(job, form, c.box) for c in columns_of(box, form.chunks, size))
        if need <= budget: best = size
        if best and (math.prod(counts) >= parts or most == 1): return best
    if best: return best
    raise ConfigError(f"inference_params.max_memory_gb: {budget/1e9:.2f} is not enough, columns of one chunk need "
                      f"{need/1e9:.2f}. Raise it, or lower chunks {form.chunks}, batch_size or patch_size")

# %%
scan = _Job(open_volume(np.zeros((1, 1, 1), np.uint8)), both, Forward(model, both), settings(patch_size=(64, 192, 192)))
scan.grid = Grid((4096, 4096, 4096), (64, 192, 192), 0.25)
scan.input.shape, scan.input.chunks = scan.grid.shape, (128, 128, 128)
form = Format(scan.grid.shape)
whole = [(0, 4096)]*3
{f"{gb} GB": _fit_columns(scan, form, whole, 1, gb*10**9) for gb in (1, 2, 4, 8)}

# %%
with raises(ConfigError, match="0.05 is not enough, columns of one chunk need"):
    _fit_columns(scan, form, whole, 1, 5*10**7)

# %% [markdown]
# ## Predicting a volume
# A run makes the store, or opens it and compares keys. Then it goes through its columns, each from the first row that
# has no marker: patches that reach into that row are predicted again, at most one patch deep. Columns are locked while
# they are worked on, so that several parts work on one store, and a second run of the same part is refused. Who
# finishes last makes the pyramid or the TIFF files.

# %%
#| export
def _key(job: _Job, form: Format, checkpoint: str, average: str) -> dict[str, Any]:
    "All that the bytes of the output depend on"
    s, model, norm = job.settings, job.forward.model, job.forward.normalizer
    if not checkpoint:
        weights = model.state_dict() if hasattr(model, "state_dict") else {}
        checkpoint = f"{type(model).__name__}-{fingerprint(dict(weights))}"
    return {"checkpoint": checkpoint, "input": job.source.fingerprint(), "average": average, "tta": s.tta,
            "targets": {e.target: e.attributes() | {"dtype": e.dtype, "channels": e.channels} for e in job.encodings},
            "grid": {"shape": job.grid.shape, "patch_size": job.grid.patch_size, "overlap": job.grid.overlap},
            "blend": {"kind": s.blend, "sigma_scale": s.sigma_scale}, "bbox": s.bbox, "skip_empty": s.skip_empty,
            "mask": None if job.mask is None else {"threshold": s.mask_threshold, **job.mask.fingerprint()},
            "normalization": norm.to_dict() if hasattr(norm, "to_dict") else getattr(norm, "__qualname__", repr(norm)),
            "precision": job.forward.precision,
            "output": {"format": form.kind, "version": form.version, "chunks": form.chunks,
                       "compressor": form.compressor, "array_name": form.array_name}}

def _only_one(path: Path, wait: float = 0) -> contextlib.ExitStack:
    "The lock of `path`, for which others are waited for"
    until, stack = time.monotonic() + wait, contextlib.ExitStack()
    while True:
        try:
            with room_in(path): stack.enter_context(lock(path))
        except Locked:
            if time.monotonic() > until: raise
            time.sleep(0.05)
        else: return stack

def _open_output(job: _Job, form: Format, path: Path, key: Mapping, box: Box) -> Predictions:
    "The store of this run: a new one, or the one to go on with"
    s, budget = job.settings, int(job.settings.max_memory_gb*1e9)
    if s.load_all: budget -= job.source.dtype.itemsize*math.prod(job.input.shape)
    if path.exists() and s.resume and not s.overwrite:
        made = Predictions(path, job.encodings, form)
        made.check_key(key)
        need = max(_column_bytes(job, form, c.box) for c in columns_of(box, form.chunks, made.columns))
        if need > budget and not made.is_done("complete"):
            raise ConfigError(f"inference_params.max_memory_gb: {s.max_memory_gb:g} is not enough for the columns that "
                              f"{path} was begun with, they need {need/1e9:.2f}")
        return made
    for held in (path/PROGRESS).glob("*.lock") if s.overwrite else ():
        _only_one(held.with_suffix("")).close() # another run that lives is refused
    on_exists = "overwrite" if s.overwrite else "error"
    for e in job.encodings if form.kind == "tif" else ():
        check_output(path.with_name(f"{form.names(e.target)[0]}.tif"), on_exists)
    check_output(path, on_exists, inputs=[v.path for v in (job.source, job.mask) if v is not None])
    columns = _fit_columns(job, form, box, s.num_parts, budget)
    return create_predictions(path, job.encodings, form, key, columns, on_exists)

def _predict_column(job: _Job, made: Predictions, column: Column, later: Sequence[Column], carry: bool,
                    counts: Counter) -> None:
    "Predict what is missing of a column"
    form, ((z0, z1), *plane) = made.form, column.box
    left = made.path/PROGRESS/"carry"/column.group
    rows = [r for r in range(z0//form.chunks[0], -(-z1//form.chunks[0])) if not made.is_done(column.group, r)]
    memo = None
    def store(corner: Sequence[int], block: np.ndarray) -> None:
        if not any(block.strides): return # nothing reached these rows, and the store is background already
        for e, values in job.values(block, corner): counts["bytes"] += made.write(e.target, corner, e.encode(values))
    if rows:
        region = ((max(z0, rows[0]*form.chunks[0]), z1), *plane)
        if carry and (later or left.exists()):
            memo = Carry(left.parent, column, later, job.grid, job.forward.channels)
        pieces = job.sweep(region, align=form.chunks[0], tile=piece_of(form.chunks, form.shape), memo=memo,
                           pipe=(lambda g: ahead(g, counts)) if job.settings.num_dataloader_workers else None)
        try:
            with contextlib.closing(pieces), Writer(counts) as writer:
                for corner, block in pieces:
                    writer.submit(store, corner, block)
                    if all(a + n == hi for a, n, (_, hi) in zip(corner[1:], block.shape[2:], plane)):
                        writer.submit(made.mark, column.group, corner[0]//form.chunks[0])
                        counts["rows"] += 1
                    del block
        finally:
            if memo is not None: memo.close()
    if memo is not None: counts.update(carried=memo.known, scratch=memo.bytes)
    remove_tree(left)

# %%
#| export
def predict_volume(
    model: Any, # see `Forward`
    source: ChunkedVolume | np.ndarray, # volume of `open_volume`, or array (z, y, x) or (c, z, y, x)
    out_dir: Any, # folder that gets predictions.zarr, or the TIFF files; made if its parent is there
    targets: Mapping[str, Target], # name -> settings
    settings: InferenceParams, # everything else
    *,
    normalizer: Callable | None = None, # (c, z, y, x) -> (c, z, y, x) float32, for each patch; see `Normalizer`
    checkpoint: str = "", # digest of the weights' file; default: of the weights
    average: str = "values", # or "logits", to be activated afterwards
    argmax: Iterable[str] = (), # multiclass targets of which only the class is stored
    carry: bool = True, # keep what later columns need; False: predict it again
    begin_only: bool = False, # make the output and predict nothing, so that parts which share it may start
    version: int = 3, # of zarr, 2 or 3
    array_name: str = "{target}", # of the arrays
    device: str = "auto", # see `device_for`
    precision: Precision = "fp32", # see `autocast_for`
) -> dict[str, Any]: # what was done: outputs, complete, patches, rows, bytes, shares of time
    "Predict a volume of any size into a store; an interrupted run goes on to the same bytes"
    began, counts, s = time.perf_counter(), Counter(), settings
    if s.part_id >= s.num_parts:
        raise ConfigError(f"inference_params.part_id: must be below num_parts {s.num_parts}, got {s.part_id}")
    if s.overwrite and s.num_parts > 1 and not begin_only:
        raise ConfigError("inference_params.overwrite: several parts share one output, none of them may remove it. "
                          "Remove it before the first part starts")
    source = open_volume(source) if isinstance(source, np.ndarray) else source
    mask = None if s.mask_path is None else open_volume(s.mask_path)
    job = _job(model, source, targets, s, average=average, normalizer=normalizer, device=device, precision=precision,
               mask=mask, argmax=argmax)
    form = Format(source.shape, s.chunks, s.output_format, version, s.compressor, array_name,
                  source.spacing or (1.0, 1.0, 1.0))
    box = [tuple(b) for b in s.bbox] if s.bbox else [(0, n) for n in source.shape]
    key, folder = _key(job, form, checkpoint, average), Path(out_dir)
    if s.load_all: _load(job)
    if not folder.exists():
        check_output(folder)
        folder.mkdir(exist_ok=True)
    path = folder/"predictions.zarr"
    with contextlib.ExitStack() as held:
        with _only_one(path, 60 if s.num_parts > 1 else 0) as main:
            made = _open_output(job, form, path, key, box)
            if s.num_parts == 1: held.enter_context(main.pop_all())
            else: held.enter_context(_only_one(path/PROGRESS/f"part-{s.part_id}-of-{s.num_parts}"))
        columns = columns_of(box, form.chunks, made.columns)
        mine = columns[s.part_id*len(columns)//s.num_parts:(s.part_id + 1)*len(columns)//s.num_parts]
        if begin_only: mine = []
        for k, column in enumerate(mine):
            if made.is_done("complete"): break
            with _only_one(path/PROGRESS/column.group):
                _predict_column(job, made, column, mine[k + 1:], carry, counts)
        outputs = _finish(made, columns, form)
    seconds = time.perf_counter() - began
    return {"outputs": [str(p) for p in outputs], "complete": bool(outputs), "columns": len(mine), "of": len(columns),
            "patches": job.forward.patches, "carried": counts["carried"], "rows": counts["rows"],
            "bytes": counts["bytes"], "scratch_bytes": counts["scratch"], "seconds": seconds,
            "shares": {"model": job.forward.seconds/seconds, "wait_read": counts["read"]/seconds,
                       "wait_write": counts["write"]/seconds}}

def _load(job: _Job) -> None:
    "Hold the input in memory, if it fits"
    size, limit = job.source.dtype.itemsize*math.prod(job.input.shape), job.settings.max_memory_gb*1e9
    if size > limit:
        raise ConfigError(f"inference_params.load_all: the input takes {human_bytes(size)}, max_memory_gb allows "
                          f"{human_bytes(limit)}")
    _ = job._occupied
    job.input = job.source[...]

def _finish(made: Predictions, columns: Sequence[Column], form: Format) -> list[Path]:
    "Outputs, if all rows of all columns are there; whoever comes last makes what follows from them"
    rows = range(columns[0].box[0][0]//form.chunks[0], -(-columns[0].box[0][1]//form.chunks[0]))
    if not made.is_done("complete") and not all(made.is_done(c.group, r) for c in columns for r in rows): return []
    try:
        with _only_one(made.path/PROGRESS/"complete"):
            outputs = finish_predictions(made)
            remove_tree(made.path/PROGRESS/"carry")
    except Locked: return [] # another part is at it
    return outputs

# %% [markdown]
# The phantom again, from a store to a store. So that there is something to see, memory is scarce: four columns.

# %%
with tmpdir() as d:
    write_zarr(Volume(roll.img, affine_from(0.01, axes="zyx"), "zyx"), d/"roll.zarr", chunks=16)
    few = settings(overlap=0.5, chunks=(16, 16, 16), batch_size=2, max_memory_gb=0.0052)
    def by255(patch): return patch.astype(np.float32)/255
    report = predict_volume(model, open_volume(d/"roll.zarr"), d, targets, few, normalizer=by255)
    stored = {n: open_volume(d/"predictions.zarr"/n)[...] for n in targets}
    second = predict_volume(model, open_volume(d/"roll.zarr"), d, targets, few, normalizer=by255)
    with raises(DataError, match="grid.overlap.*0.5, 0.5.* there, .*0.25, 0.25.* now"):
        predict_volume(model, open_volume(d/"roll.zarr"), d, targets, settings(chunks=(16,)*3), normalizer=by255)
{k: report[k] for k in ("columns", "patches", "carried", "rows", "bytes", "scratch_bytes")}

# %%
wanted = predict_array(model, roll.img, targets, few, normalizer=by255)
assert report["complete"] and report["columns"] > 1 and report["patches"] == len(Grid(roll.img.shape, 24, 0.5))
for e in both: assert np.abs(stored[e.target].astype(int) - e.encode(wanted[e.target])).max() <= 1
assert second["patches"] == 0 and second["complete"]

# %% [markdown]
# ## Cut off, and gone on
# A model that fails stands for a machine that does. The second run predicts what is missing, and one patch depth more.

# %%
class Dies(Gradient):
    left = 60
    def predict(self, x):
        self.left -= len(x)
        if self.left < 0: raise RuntimeError("the machine is gone")
        return super().predict(x)

def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

with tmpdir() as d:
    write_zarr(Volume(roll.img, affine_from(0.01, axes="zyx"), "zyx"), d/"roll.zarr", chunks=16)
    for name in ("once", "twice"): (d/name).mkdir()
    def run(m, where): return predict_volume(m, open_volume(d/"roll.zarr"), d/where, targets, few, normalizer=by255,
                                             checkpoint="the same")
    whole = run(model, "once")
    with raises(RuntimeError, match="the machine is gone"): run(Dies(), "twice")
    done = sum(1 for _ in (d/"twice").glob("predictions.zarr/.progress/c*/r*"))
    rest = run(model, "twice")
    same = tree(d/"once") == tree(d/"twice")
assert same and done and rest["rows"] == whole["rows"] - done
{"rows": whole["rows"], "finished before": done, "patches": whole["patches"], "patches after": rest["patches"]}

# %% [markdown]
# ## For users of MONAI
# MONAI's evaluators and workflows take an *inferer*: a function of a batch and a network. This one has the grid and the
# weights of this page, whose window is symmetric and whose last patch is shifted back instead of padded.

# %%
#| export
def grid_inferer(
    patch_size: int | Sequence[int], # (z, y, x) [voxel]
    overlap: float = 0.25, # part of the patch shared with the next one
    *,
    batch_size: int = 1, # patches in one call of the network
    blend: str = "gaussian", # or "constant"
    sigma_scale: float = 0.125, # of the Gaussian, in patch edges
) -> Callable: # (inputs (b, c, z, y, x), network) -> (b, c_out, z, y, x) tensor
    "Sliding-window inferer with the signature of `monai.inferers`"
    def infer(inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        def predict(x: np.ndarray) -> np.ndarray:
            return network(torch.from_numpy(x).to(inputs), *args, **kwargs).float().cpu().numpy()
        whole = []
        with torch.no_grad():
            for image in inputs.float().cpu().numpy():
                rows = sweep_rows(predict, image, Grid(image.shape[1:], patch_size, overlap), kind=blend,
                                  sigma_scale=sigma_scale, batch=batch_size)
                whole.append(np.concatenate([r for _, r in rows], axis=1))
        return torch.from_numpy(np.stack(whole)).to(inputs)
    return infer

# %%
x = torch.from_numpy(scaled)[None, None]
inferred = grid_inferer(24, 0.5)(x, lambda p: model(p)["sheet"].sigmoid())
assert np.array_equal(inferred[0].numpy(), predict_array(model, scaled, targets, settings(overlap=0.5))["sheet"])
inferred.shape
