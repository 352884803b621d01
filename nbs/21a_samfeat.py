# %% [markdown]
# # Features of Segment Anything in three dimensions
#
# > A volume is cut into slices along three directions; what an image encoder says of them is put back on one grid.
#
# The encoder of *Segment Anything* was trained on a billion masks of photographs and draws the borders of things it has
# never seen. Fed with the slices of a scan it gives 32 numbers a place that change at the borders of organs; clustered,
# they become supervoxels. The recipe is that of VISTA3D (He et al., CVPR 2025, `slic_process_sam.py`). What differs:
# slices of thick-slice scans keep the shape of the body, no direction outshouts the others, the features stay on a grid
# of their own resolution instead of filling ten gigabytes, and no slice is encoded twice, in this run or the next.

# %%
#| default_exp samfeat

# %%
#| export
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from medvol_nb.checkpoints import autocast_for, device_for, load_checkpoint, precision_for, save_checkpoint
from medvol_nb.core import (ConfigError, DataError, FormatError, MedvolError, OutputExists, check_output, fingerprint,
                            human_bytes, log, progress)
from medvol_nb.geometry import Volume, _taps, to_axes
from medvol_nb.samweights import (SAM_MODELS, EncoderCost, Sam2Shape, SamShape, encoder_cost, model_name, random_sam,
                                  read_sam)

# %%
import time

from medvol_nb import phantoms, plot
from medvol_nb.core import raises, tmpdir
from medvol_nb.geometry import affine_from

# %% [markdown]
# ## A slice becomes an image
# The encoder takes square images of one size with three colours. A slice is padded with 0 (air) *at the end* to a
# square, stretched linearly, and its grey value is used for all three colours, normalised with the mean and deviation
# of photographs that SAM was trained with.

# %%
#| export
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

def encoder_input(
    images: torch.Tensor, # (n, h, w) float32 grey values in [0, 255]
    image_size: int, # side of the encoder's image [pixel]
) -> torch.Tensor: # (n, 3, image_size, image_size) float32, normalised
    "Pad slices to squares, stretch them and normalise them as SAM wants it"
    h, w = images.shape[1:]
    square = F.pad(images, (0, max(h - w, 0), 0, max(w - h, 0)))[:, None]
    grey = F.interpolate(square, (image_size, image_size), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v, device=grey.device).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (grey - mean)/std

# %%
ct = phantoms.abdomen((60, 48, 40))
slice_255 = torch.from_numpy(np.clip((ct.img[None, :, :, 20] + 1000.0)/2000, 0, 1)*255).float()
pixels = encoder_input(slice_255, 64)
plot.montage([slice_255[0].numpy(), pixels[0, 0].numpy()], titles=["slice 60 x 48", "encoder's image 64 x 64"])

# %%
assert pixels.shape == (1, 3, 64, 64) and torch.allclose(pixels[0, 2, 5, 60], torch.tensor(-103.53/57.375))

# %% [markdown]
# ## Which slices
# Neighbouring slices look alike, so they are encoded about every 3 mm and the features between them interpolated. The
# three directions are named after the planes of a patient in RAS order: `ax` slices lie along z, `cor` along y, `sag`
# along x. The plan is made from the shape alone, before anything is computed, and says what it will cost.

# %%
#| export
VIEWS = MappingProxyType({"ax": 2, "cor": 1, "sag": 0})
Stride = int | Literal["auto"] | Mapping[str, int]

@dataclass(frozen=True)
class EncoderPlan:
    "Which slices of a volume will be encoded, and what it costs"
    model: str # name of the encoder
    image_size: int # side of its image [pixel]
    slices: Mapping[str, tuple[int, ...]] # view -> indices along its axis
    cost: EncoderCost # of one slice

    @property
    def calls(self) -> int: return sum(map(len, self.slices.values())) # slices that go through the encoder
    @property
    def tflop(self) -> float: return self.calls*self.cost.tflop # [TFLOP] in all
    @property
    def cache_bytes(self) -> int: return self.calls*self.cost.cache_bytes # [byte] of the embeddings on disk

    def __str__(self) -> str:
        views = " + ".join(f"{len(s)} {v}" for v, s in self.slices.items())
        work = f"{self.tflop/1e3:.2f} PFLOP" if self.tflop >= 10 else f"{self.tflop:.3g} TFLOP"
        return (f"{self.calls} encoder calls ({views}) of {self.model} at {self.image_size} pixels: {work}, "
                f"embeddings {human_bytes(self.cache_bytes)}")

def _stride(stride: Stride, view: str, spacing: float) -> int:
    step = stride.get(view, "auto") if isinstance(stride, Mapping) else stride
    if step == "auto": return max(1, int(3/spacing + 1e-6))
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ConfigError(f"stride: must be 'auto' or an integer >= 1, got {step!r} for view {view}")
    return step

def plan_encoding(
    model: SamShape | Sam2Shape | str, # of an encoder, or the name of a known model
    shape: Sequence[int], # (x, y, z) of the volume [voxel]
    spacing: Sequence[float] = (1.0, 1.0, 1.0), # of its voxels [mm]
    *,
    views: Sequence[str] = tuple(VIEWS), # directions, of 'ax', 'cor' and 'sag'
    stride: Stride = "auto", # every how many slices, for all views or by view; 'auto': at most 3 mm apart
    image_size: int | None = None, # side of the encoder's image [pixel]; None: what the model was made for
) -> EncoderPlan: # printable
    "Choose the slices to encode and count the work, from the shape of a volume alone"
    views = tuple(views)
    if not views or len(set(views)) < len(views) or not set(views) <= set(VIEWS):
        raise ConfigError(f"views: some of {', '.join(VIEWS)} are needed, each once, got {views}")
    if isinstance(stride, Mapping) and (odd := set(stride) - set(views)):
        raise ConfigError(f"stride: {sorted(odd)} are not among the views {views}")
    if len(shape) != 3 or min(shape) < 1: raise DataError(f"shape: three sizes >= 1 are needed, got {tuple(shape)}")
    if len(spacing) != 3 or not min(spacing) > 0 or not np.isfinite(spacing).all():
        raise DataError(f"spacing: three sizes > 0 mm are needed, got {tuple(spacing)}")
    chosen = {}
    for v in views:
        n, step = shape[VIEWS[v]], _stride(stride, v, spacing[VIEWS[v]])
        chosen[v] = tuple(range((n - 1)%step//2, n, step))
    cost = encoder_cost(model, image_size)
    known = SAM_MODELS[model] if isinstance(model, str) else model
    return EncoderPlan(model_name(known), known.image_size if image_size is None else image_size, chosen, cost)

# %%
whole = plan_encoding("vit_h", (512, 512, 300), stride=1)
few = plan_encoding("vit_b", (512, 512, 300), (0.7, 0.7, 1))
print(whole, few, sep="\n")
{v: (s[:3], len(s)) for v, s in few.slices.items()}

# %%
assert whole.calls == 1324 and round(whole.tflop/1e3, 1) == 7.9
with raises(ConfigError, match="views"): plan_encoding("vit_b", (9, 9, 9), views=("ax", "axial"))
with raises(ConfigError, match="stride.*got 0 for view ax"): plan_encoding("vit_b", (9, 9, 9), stride=0)

# %% [markdown]
# ## Batches that shrink
# How many images fit into memory is not known beforehand. So a batch that does not fit is halved and tried again, down
# to a single image. On a processor images always go through the network one by one: it gains nothing from several, and
# so the result cannot depend on the size of the batch.

# %%
#| export
def _out_of_memory(e: Exception) -> bool:
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)

def in_batches(
    f: Callable[[Any], Sequence], # items -> as many results
    items: Sequence, # anything that can be sliced
    size: int, # largest batch
) -> Iterator: # one result an item
    "Go through items in batches; one that does not fit into memory is halved, and so are all after it"
    at = 0
    while at < len(items):
        part, results = items[at:at + size], None
        try: results = f(part)
        except Exception as e:
            if not _out_of_memory(e): raise
            if len(part) == 1:
                raise MedvolError("encoder: out of memory with a single slice. Use a smaller image_size or model, "
                                  "another device, or dtype='bf16'") from e
            size = len(part)//2
            log.warning("encoder: out of memory with %d slices, goes on with %d", len(part), size)
        if results is not None:
            at += len(part)
            yield from results

# %%
def squares(part):
    if len(part) > 3: raise MemoryError
    return [(len(part), x*x) for x in part]
list(in_batches(squares, range(7), 8))

# %%
assert [y for _, y in in_batches(squares, range(30), 8)] == [x*x for x in range(30)]

# %% [markdown]
# ## Embeddings are kept
# Encoding is nearly all of the work, so its results go to disk: one small file a slice in half precision, with a
# checksum, written all at once or not at all. The name is a fingerprint of everything the content depends on: weights,
# image size, precision, and the grey values of the slice. A run that was interrupted goes on where it was, a run with
# other clusters or another grid encodes nothing, and a damaged file is made again.

# %%
#| export
class EmbeddingCache:
    "Folder of encoded slices"
    def __init__(
        self,
        folder: str | os.PathLike, # created if absent; its parent must exist
    ):
        self.folder = Path(folder)
        check_output(self.folder, "overwrite")
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputExists(f"cache {folder} is a file, a folder is needed. Choose another name")
        self.folder.mkdir(exist_ok=True)

    def read(
        self,
        key: str, # fingerprint of what was encoded
    ) -> torch.Tensor | None: # (c, h, w) float16; None if there is nothing sound
        "Embedding of a slice"
        path = self.folder/f"{key}.safetensors"
        if not path.exists(): return None
        try:
            found = load_checkpoint(path)
            if found.get("key") == key: return found["embedding"]
            log.warning("%s: holds another slice, encoded again", path)
        except FormatError as e: log.warning("%s; encoded again", e)
        return None

    def write(
        self,
        key: str, # fingerprint of what was encoded
        embedding: torch.Tensor, # (c, h, w), rounded to half precision
    ) -> None:
        "Keep the embedding of a slice"
        half = embedding.half()
        if not half.isfinite().all(): raise DataError("encoder: values beyond 65504 do not fit half precision")
        save_checkpoint(self.folder/f"{key}.safetensors", {"key": key, "embedding": half})

@contextmanager
def _cache_or_scratch(folder: str | os.PathLike | None) -> Iterator[EmbeddingCache]:
    "The user's cache, or one that lasts for the block: embeddings are needed twice and too large for memory"
    if folder is not None: yield EmbeddingCache(folder)
    else:
        with tempfile.TemporaryDirectory(prefix="medvol-") as scratch: yield EmbeddingCache(scratch)

# %%
with tmpdir() as d:
    kept = EmbeddingCache(d/"case_1")
    kept.write("a1", torch.full((2, 3, 3), 1.5))
    sound, absent, raw = kept.read("a1"), kept.read("a2"), (d/"case_1"/"a1.safetensors").read_bytes()
    (d/"case_1"/"a3.safetensors").write_bytes(raw)
    (d/"case_1"/"a4.safetensors").write_bytes(raw[:-5])
    exchanged, torn = kept.read("a3"), kept.read("a4")
sound.dtype, sound.shape, absent, exchanged, torn

# %%
assert sound.eq(1.5).all() and absent is None and torn is None and exchanged is None

# %% [markdown]
# ## Slices of thick-slice scans
# In a scan with slices of 5 mm a coronal plane has few, tall pixels. Taken as it is stored, the body in it is squashed
# to a fifth of its height, and the encoder sees something that is not a body. `slice_image` gives square pixels first.

# %%
#| export
def _image_shape(shape: Sequence[int], spacing: Sequence[float], image_size: int) -> tuple[int, int]:
    "Size of a plane with square pixels; as it is where they are square already"
    if abs(spacing[0]/spacing[1] - 1) < 0.01: return int(shape[0]), int(shape[1])
    mm = np.multiply(shape, spacing)
    pixel = max(min(spacing), mm.max()/image_size)
    return max(1, round(mm[0]/pixel)), max(1, round(mm[1]/pixel))

def _others(values: Sequence, axis: int) -> tuple: return tuple(v for k, v in enumerate(values) if k != axis)

def slice_image(
    img: np.ndarray, # (x, y, z) values in [0, 1]
    spacing: Sequence[float], # of its voxels [mm]
    axis: int, # across the slice: 0, 1 or 2
    index: int, # of the slice
    image_size: int, # side of the encoder's image [pixel]; the slice does not become larger than this by stretching
) -> torch.Tensor: # (h, w) float32 grey values in [0, 255] in square pixels
    "Cut a slice out of a volume, with the proportions it has in the body"
    plane = torch.from_numpy(np.take(img, index, axis).astype(np.float32))*255
    wanted = _image_shape(plane.shape, _others(spacing, axis), image_size)
    if wanted == tuple(plane.shape): return plane
    return F.interpolate(plane[None, None], wanted, mode="bilinear", align_corners=False, antialias=True)[0, 0]

# %%
thick = np.clip((ct.img[:, :, ::4] + 1000.0)/2000, 0, 1)
across = slice_image(thick, (1, 1, 4), 1, 24, 1024)
plot.montage([thick[:, 24], across.numpy()], titles=["as stored", "square pixels"])

# %%
flat = slice_image(thick, (1, 1, 4), 2, 3, 1024).numpy()
assert across.shape == (60, 40) and np.allclose(flat, thick[:, :, 3]*255, atol=1e-3)

# %% [markdown]
# ## Back on one grid
# The features of a slice lie on a map of a quarter of the encoder's image; cell $i$ of a grid with $g$ cells looks at
# the place $(i+\tfrac12)\,\frac{n}{g}\,\frac{t}{s}-\tfrac12$ of it, if the slice has $n$ of the $s$ pixels of the
# square and the map $t$ cells. Between two slices features are interpolated, beyond the last they stay. Two slices at a
# time are in memory.

# %%
#| export
def _in_plane(features: torch.Tensor, taps: Sequence[tuple]) -> torch.Tensor:
    "(c, t, t) features at the places of the grid"
    (l0, h0, w0), (l1, h1, w1) = taps
    rows = torch.lerp(features[:, l0], features[:, h0], w0[:, None])
    return torch.lerp(rows[:, :, l1], rows[:, :, h1], w1)

def view_planes(
    load: Callable[[int], torch.Tensor], # index of a slice -> (c, t, t) features of its square
    slices: Sequence[int], # indices that `load` knows, ascending
    image: tuple[int, int], # pixels of a slice, without the padding to a square
    axis: int, # across the slices
    n: int, # voxels of the volume along `axis`
    grid: Sequence[int], # (x, y, z) cells over the same field of view
    wanted: Sequence[int] | None = None, # indices of planes along `axis`, ascending; None: all
) -> Iterator[torch.Tensor]: # one (c, *the two other axes) plane after the other along `axis`
    "Features of one view on a grid, plane by plane"
    taps, near = None, {}
    places = np.interp((np.arange(grid[axis]) + 0.5)*n/grid[axis] - 0.5, slices, np.arange(len(slices)))
    for place in places if wanted is None else places[wanted]:
        low, rest = int(place), float(place % 1)
        for k in (low, low + 1) if rest else (low,):
            if k in near: continue
            features = load(slices[k])
            if taps is None:
                t, device = features.shape[-1], features.device
                at = [(np.arange(g) + 0.5)*p*t/(g*max(image)) - 0.5 for g, p in zip(_others(grid, axis), image)]
                taps = [[torch.from_numpy(v).to(device) for v in _taps(a, t)] for a in at]
            near[k] = _in_plane(features, taps)
        near = {k: v for k, v in near.items() if k >= low}
        yield torch.lerp(near[low], near[low + 1], rest) if rest else near[low]

# %% [markdown]
# A map that grows linearly along its rows stays a straight line on any grid, and a view whose slices hold their own
# index gives the position along the axis.

# %%
ramp = torch.arange(8.0)[:, None].expand(8, 8)[None]
planes = list(view_planes(lambda k: ramp + 100*k, (1, 5, 9), (16, 12), 2, 11, (4, 3, 22)))
[round(float(p[0, 0, 0]), 1) for p in planes][:8], planes[0][0, :, 0].tolist()

# %%
assert planes[0].shape == (1, 4, 3) and planes[0][0, :, 0].tolist() == [100.5, 102.5, 104.5, 106.5]
assert float(planes[-1][0, 0, 0]) == 900.5 and abs(float(planes[11][0, 0, 0]) - (0.5 + 100*(11.5/2 - 0.5))) < 1e-3

# %% [markdown]
# ## Equal voices
# Summed as they are, the direction with the largest activations decides alone. So every channel of every view is
# shifted and scaled to mean 0 and deviation 1 before the views are added. The numbers come from some of the planes of
# each view, 24 to 47 of them, and from every cell of these: a coarse lattice would not do, because every token repeats
# the same pattern of 4 × 4 cells, and a lattice could see always the same part of it.
#
# A sum of three views keeps 32 channels. The alternative keeps what the views disagree on: their 96 channels, reduced
# to the directions in which they vary most. Both are linear, so shift, scale and reduction are applied to the map of a
# slice before it is spread over the grid, and the 96 channels never exist at full size.

# %%
#| export
def _lattice(n: int) -> np.ndarray:
    "Up to 47 indices evenly spread over an axis, all of them if there are no more"
    step = max(1, n//24)
    return np.arange((n - 1)%step//2, n, step)

@dataclass(frozen=True)
class _View:
    "Encoded slices of one direction"
    axis: int # across the slices
    n: int # voxels of the volume along it
    slices: tuple[int, ...] # indices of the encoded slices
    image: tuple[int, int] # pixels of a slice
    load: Callable[[int], torch.Tensor] # index of a slice -> (c, t, t) features of its square

    def survey(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        "Mean and deviation of each channel, and its values on a lattice (c, n)"
        across, (rows, columns) = _lattice(shape[self.axis]), map(_lattice, _others(shape, self.axis))
        total, square, n, parts = 0, 0, 0, []
        for plane in view_planes(self.load, self.slices, self.image, self.axis, self.n, shape, across):
            plane = plane.cpu()
            p = plane.double()
            total, square, n = total + p.sum((1, 2)), square + (p*p).sum((1, 2)), n + p[0].numel()
            parts.append(plane[:, rows][:, :, columns])
        mean = (total/n).numpy()
        std = np.sqrt(np.maximum((square/n).numpy() - mean**2, 0))
        return mean, std, torch.stack(parts, 1 + self.axis).flatten(1).numpy()

    def add_to(self, out: torch.Tensor, change: Callable, desc: str) -> None:
        "Add the features, changed slice by slice, to a (c, x, y, z) grid"
        load = lambda k: change(self.load(k))
        planes = view_planes(load, self.slices, self.image, self.axis, self.n, out.shape[1:])
        for j, plane in enumerate(progress(planes, desc, out.shape[1 + self.axis], "planes")):
            out.select(1 + self.axis, j).add_(plane.cpu())

def _reduction(z: np.ndarray, n_components: int) -> np.ndarray:
    "Of standardised (channel, n) samples: the (n_components, channel) directions of largest variance"
    basis = np.linalg.eigh(z @ z.T/z.shape[1])[1][:, ::-1][:, :n_components].T
    return basis*np.sign(np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], 1)) # they have no sign

def _merge(views: Sequence[_View], shape: tuple[int, ...], n_components: int | None) -> np.ndarray:
    "Sum or reduced stack of standardised views on a grid"
    mean, std, samples = map(np.stack, zip(*(view.survey(shape) for view in views)))
    varies = std > 1e-5*np.abs(samples).max() # a channel that does not vary says nothing
    scale = np.where(varies, 1/np.where(varies, std, 1), 0)
    bases = None
    if n_components is not None:
        z = (samples - mean[..., None])*scale[..., None]
        bases = np.split(_reduction(z.reshape(scale.size, -1), n_components), len(views), axis=1)

    def changed(i: int, f: torch.Tensor) -> torch.Tensor:
        shift, factor = (torch.from_numpy(a[i]).to(f)[:, None, None] for a in (mean, scale))
        f = (f - shift)*factor
        return f if bases is None else torch.einsum("kc,cij->kij", torch.from_numpy(bases[i]).to(f), f)
    out = torch.zeros((n_components or mean.shape[1], *shape), dtype=torch.float16)
    for i, view in enumerate(views): view.add_to(out, partial(changed, i), f"features {i + 1} of {len(views)}")
    return out.numpy()

def _check_components(n_components: int | None, most: int) -> None:
    if n_components is None: return
    if isinstance(n_components, bool) or not isinstance(n_components, int) or not 1 <= n_components <= most:
        raise ConfigError(f"n_components: must be an integer from 1 to {most}, or None, got {n_components!r}")

def _checked_volume(img: Volume | np.ndarray, spacing: Sequence[float] | None) -> tuple[np.ndarray, tuple[float, ...]]:
    "Array (x, y, z) in [0, 1] and its spacing"
    if isinstance(img, Volume):
        if spacing is not None: raise ConfigError("spacing: a Volume brings its own, leave it out")
        if img.channels is not None: raise DataError(f"volume: one channel is needed, got {img.channels}")
        img = to_axes(img, "xyz")
        img, spacing = img.data[...], img.spacing
    data = np.asarray(img)
    if data.ndim != 3 or 0 in data.shape or data.dtype.kind not in "buif":
        raise DataError(f"volume: three axes of real numbers are needed, got shape {data.shape}, dtype {data.dtype}")
    low, high = float(data.min()), float(data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = ~np.isfinite(data)
        raise DataError(f"volume: {int(bad.sum())} values are NaN or infinite, the first at "
                        f"{tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))}")
    if low < -1e-3 or high > 1.001:
        raise DataError(f"volume: values must be in [0, 1], got {low:.4g} to {high:.4g}. Apply a window first, such as "
                        "Normalizer('ct:-1000,1000')")
    return data, tuple(float(s) for s in (spacing if spacing is not None else (1, 1, 1)))

# %% [markdown]
# ## The extractor
# It holds a network and its settings. `slice_features` is the exact recipe for slices; `volume_features` does the rest.

# %%
#| export
class SamFeatureExtractor:
    "Image encoder of Segment Anything that turns slices and volumes into features"
    def __init__(
        self,
        checkpoint: str | os.PathLike | None, # .pth or .safetensors file, or a folder of Hugging Face
        *,
        model: str = "auto", # name the model must have, such as 'vit_h'; 'auto': whatever is in the file
        device: str = "auto", # where to compute
        dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto", # arithmetic of matrix products; 'auto': half on GPUs
        image_size: int | None = None, # side of the encoder's image [pixel]; None: of the weights, 1024 if published
        batch_size: int | Literal["auto"] = "auto", # slices at a time; 'auto': 8 on GPUs, 1 on processors
        allow_random: bool = False, # without a checkpoint, take an untrained tiny encoder (to test what is around it)
        sha256: str | None = None, # digest the file must have, at least 8 of its digits
    ):
        weights = random_sam() if checkpoint is None and allow_random else \
            read_sam(checkpoint, model=model, sha256=sha256)
        self.device = device_for(device)
        self.precision = precision_for(dtype, self.device)
        autocast_for(self.device, self.precision) # refuses what the device cannot do
        self.batch_size = (8 if self.device.type == "cuda" else 1) if batch_size == "auto" else batch_size
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ConfigError(f"batch_size: must be 'auto' or an integer >= 1, got {batch_size!r}")
        self.config, self.name, self.digest = weights.shape, weights.name, weights.digest
        self.image_size = self.config.image_size if image_size is None else image_size
        self.channels = self.config.neck//8
        self.network = weights.network(self.image_size).to(self.device)
        self.encoded = 0 # slices that went through the encoder so far

    def plan(
        self,
        shape: Sequence[int], # (x, y, z) of the volume [voxel]
        spacing: Sequence[float] = (1.0, 1.0, 1.0), # of its voxels [mm]
        *,
        views: Sequence[str] = tuple(VIEWS), # directions, of 'ax', 'cor' and 'sag'
        stride: Stride = "auto", # every how many slices, for all views or by view; 'auto': at most 3 mm apart
    ) -> EncoderPlan: # printable
        "Slices that `volume_features` will encode with an empty cache, and their cost"
        return plan_encoding(self.config, shape, spacing, views=views, stride=stride, image_size=self.image_size)

    @torch.no_grad()
    def embed(
        self,
        images: Sequence[torch.Tensor], # each (h, w) grey values in [0, 255]
    ) -> torch.Tensor: # (n, c, h, w) float32 on the device
        "Encode slices, which may differ in size"
        pixels = torch.cat([encoder_input(i[None].to(self.device), self.image_size) for i in images])
        parts = pixels.split(1) if self.device.type == "cpu" else (pixels,) # see the section on batches
        with autocast_for(self.device, self.precision): out = torch.cat([self.network.embed(p).float() for p in parts])
        if not out.isfinite().all():
            raise DataError(f"encoder: NaN or infinity in {self.precision}. Use dtype='fp32', or look at the weights")
        self.encoded += len(images)
        return out

    @torch.no_grad()
    def slice_features(
        self,
        images: np.ndarray | torch.Tensor, # (n, h, w) grey values in [0, 255]
        *,
        native: bool = False, # True: as the network gives them, (n, 32, 256, 256) without the cells of the padding
    ) -> torch.Tensor: # (n, 32, h, w) float32 on the CPU
        "Features of single slices"
        if not isinstance(images, torch.Tensor): images = torch.from_numpy(np.array(images, np.float32))
        images = images.float()
        if images.ndim != 3 or 0 in images.shape:
            raise DataError(f"images: (n, h, w) with n, h, w >= 1 is needed, got {tuple(images.shape)}")
        if not (images.min() >= -0.5 and images.max() <= 255.5):
            raise DataError(f"images: grey values in [0, 255] are needed, got {images.min():.4g} to {images.max():.4g}")
        h, w = images.shape[1:]
        side = max(h, w)

        def run(part: torch.Tensor) -> torch.Tensor:
            f = self.network.expand(self.embed(part))
            if native: return f[..., :-(-f.shape[2]*h//side), :-(-f.shape[3]*w//side)].cpu()
            return F.interpolate(f, (side, side), mode="bilinear", align_corners=False)[..., :h, :w].cpu()
        return torch.stack(list(in_batches(run, images, self.batch_size)))

    def _encode(self, img: np.ndarray, spacing: tuple, plan: EncoderPlan, store: EmbeddingCache) -> dict:
        "Make sure that all slices of the plan are in the store; returns their keys"
        image = lambda job: slice_image(img, spacing, VIEWS[job[0]], job[1], self.image_size)
        kind = (self.digest, self.image_size, self.precision)
        jobs = [(v, k) for v, slices in plan.slices.items() for k in slices]
        keys = {job: fingerprint([*kind, image(job)], 32) for job in jobs}
        todo = [job for job in jobs if store.read(keys[job]) is None]
        done = in_batches(lambda part: self.embed([image(job) for job in part]), todo, self.batch_size)
        for job, embedding in progress(zip(todo, done), "encoding", len(todo), "slices"):
            store.write(keys[job], embedding)
        return keys

    @torch.no_grad()
    def volume_features(
        self,
        img: Volume | np.ndarray, # volume, or (x, y, z) array, of values in [0, 1]
        *,
        shape: Sequence[int] | None = None, # (x, y, z) cells of the result over the same field of view; None: voxels
        spacing: Sequence[float] | None = None, # of the voxels [mm], for arrays; None: 1 mm
        views: Sequence[str] = tuple(VIEWS), # directions, of 'ax', 'cor' and 'sag'
        stride: Stride = "auto", # every how many slices, for all views or by view; 'auto': at most 3 mm apart
        n_components: int | None = None, # reduce the stacked views to so many channels; None: add them up
        cache: str | os.PathLike | None = None, # folder that keeps the encoded slices of this volume; None: not kept
    ) -> np.ndarray: # (c, x, y, z) float16
        "Features of a volume on a grid, every view with equal weight"
        data, spacing = _checked_volume(img, spacing)
        shape = data.shape if shape is None else tuple(int(n) for n in shape)
        if len(shape) != 3 or min(shape) < 1: raise DataError(f"shape: three sizes >= 1 are needed, got {shape}")
        plan = self.plan(data.shape, spacing, views=views, stride=stride)
        _check_components(n_components, len(plan.slices)*self.channels)
        with _cache_or_scratch(cache) as store:
            keys = self._encode(data, spacing, plan, store)

            def load(view: str, index: int) -> torch.Tensor:
                embedding = store.read(keys[view, index])
                if embedding is None: raise FormatError(f"cache {store.folder}: was changed while it was in use")
                return self.network.expand(embedding[None].to(self.device).float())[0]
            size = lambda axis: _image_shape(_others(data.shape, axis), _others(spacing, axis), self.image_size)
            found = [_View(VIEWS[v], data.shape[VIEWS[v]], slices, size(VIEWS[v]), partial(load, v))
                     for v, slices in plan.slices.items()]
            return _merge(found, shape, n_components)

# %% [markdown]
# The exact recipe for one slice, with a tiny encoder that was never trained. It has 16 × 16 tokens and so 64 × 64 cells
# of features, of which the part below the padding is left out.

# %%
sam = SamFeatureExtractor(None, allow_random=True, device="cpu")
at_size, native = sam.slice_features(slice_255), sam.slice_features(slice_255, native=True)
plot.montage([slice_255[0].numpy(), *native[0, :5].numpy()], titles=["slice", *(f"channel {k}" for k in range(5))])

# %%
assert at_size.shape == (1, 32, 60, 48) and native.shape == (1, 32, 64, 52)
with raises(FileNotFoundError, match="none was named. Files that work: sam_vit_b_01ec64.pth"):
    SamFeatureExtractor(None)
with raises(DataError, match=r"grey values in \[0, 255\]"): sam.slice_features(slice_255*10)

# %% [markdown]
# A volume of 60 × 48 × 40 voxels of 3 mm on a grid of half its size. Random weights do not know an organ, but borders
# show up even so, as they do in any random network.

# %%
body = Volume(np.clip((ct.img + 1000.0)/2000, 0, 1).astype(np.float32), affine_from((3, 3, 3)))
print(sam.plan(body.shape, body.spacing, stride=4))
with tmpdir() as d:
    start, before = time.perf_counter(), sam.encoded
    features = sam.volume_features(body, shape=(30, 24, 20), stride=4, cache=d/"case_1")
    first, calls = time.perf_counter() - start, sam.encoded
    start = time.perf_counter()
    again = sam.volume_features(body, shape=(30, 24, 20), stride=4, cache=d/"case_1")
    reduced = sam.volume_features(body, shape=(30, 24, 20), stride=4, n_components=3, cache=d/"case_1")
    second = (time.perf_counter() - start)/2
f"{first:.1f} s with the encoder, {second:.1f} s from the cache"

# %% [markdown]
# The first three components of the stacked views as colours, in three planes:

# %%
colours = (reduced - reduced.min((1, 2, 3), keepdims=True)).astype(np.float32)
colours = np.moveaxis(colours/colours.max((1, 2, 3), keepdims=True), 0, -1)
plot.montage([colours[:, :, 10], colours[:, 12], colours[15]], titles=["axial", "coronal", "sagittal"])

# %% [markdown]
# The plan was kept, nothing was encoded a second time, the result is the same to the last bit, and each of the three
# views has the same share in it.

# %%
assert calls == sam.encoded == before + sam.plan(body.shape, body.spacing, stride=4).calls
assert np.array_equal(features, again) and features.shape == (32, 30, 24, 20) and features.dtype == np.float16
assert np.abs(features.mean((1, 2, 3), dtype=np.float64)).max() < 0.001

# %%
with raises(DataError, match=r"values must be in \[0, 1\], got -1024"): sam.volume_features(ct.img)
with raises(ConfigError, match="n_components: must be an integer from 1 to 32"):
    sam.volume_features(body, views=("ax",), n_components=40)
holed = np.where(np.arange(40) == 7, np.nan, body.data)
with raises(DataError, match=r"2880 values are NaN or infinite, the first at \(0, 0, 7\)"): sam.volume_features(holed)

# %% [markdown]
# ## Agreement with the recipe
# Along one axis, with every slice encoded and a grid of the volume's own voxels, the volume's features are those of its
# slices, shifted and scaled by channel. What is left is the rounding to half precision.

# %%
slices = torch.stack([slice_image(body.data, body.spacing, 2, k, 256) for k in range(0, 40, 8)])
alone = sam.slice_features(slices).numpy()
stacked = sam.volume_features(body.data[:, :, ::8], views=("ax",), stride=1).astype(np.float64)
worst = []
for k in range(32):
    a, b = np.moveaxis(alone[:, k], 0, -1).ravel(), stacked[k].ravel()
    slope, offset = np.polyfit(a, b, 1)
    worst.append(np.abs(slope*a + offset - b).max()/b.std())
f"largest difference {max(worst):.4f} standard deviations"

# %%
assert max(worst) < 0.05
