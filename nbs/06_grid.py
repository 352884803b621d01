# %% [markdown]
# # Grid
#
# > Patch positions that cover a volume exactly, window weights, and sliding-window blending in bounded memory.
#
# A network sees patches, a volume is larger. Three things go wrong at that border. Positions leave a strip at the far
# edge uncovered, or run off it. Every patch is wrong near its own border, so hard tiling leaves seams. And the usual
# remedy, two volume-sized arrays of sums and weights, needs more memory than the volume itself: three output channels
# over a 2000³ scan are 96 GB of float32 sums. This page answers all three once, for any number of axes. Training crops,
# inference and supervoxels use the same `Grid`; blending is `sweep`, which holds a few rows of the volume and writes
# each result once.

# %%
#| default_exp grid

# %%
#| export
import functools
import itertools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from medvol_nb.core import ConfigError, DataError, progress

# %%
import time

import matplotlib.pyplot as plt

from medvol_nb.core import human_bytes, raises, rng_for

# %% [markdown]
# ## Positions along one axis
# `overlap` is the fraction of a patch that it shares with the next one, so the step is `patch*(1 - overlap)`, rounded
# half up and at least 1. The last position rarely falls on the edge. Padding would feed the network voxels that do not
# exist; here the last patch is *shifted back* until it ends exactly at `size`. Only an axis that is shorter than the
# patch needs padding: it gets a single position with a negative start that leaves the volume in the middle, the odd
# voxel of padding at the far end.

# %%
#| export
def _integers(name: str, values: Sequence, lowest: int = 1) -> tuple[int, ...]:
    "Whole numbers from `lowest` up, as plain ints"
    for v in values:
        if isinstance(v, (bool, np.bool_)) or not isinstance(v, numbers.Real) or v != v or v in (np.inf, -np.inf) \
                or int(v) != v or v < lowest:
            raise DataError(f"{name}: whole numbers >= {lowest} are needed, got {values!r}")
    return tuple(int(v) for v in values)

def _low_start(size: int, patch: int) -> int:
    "The smallest start: 0, or negative where the patch is larger than the axis"
    return -((patch - size)//2) if size < patch else 0

# %%
#| export
def axis_starts(
    size: int, # length of the axis [voxel]
    patch: int, # length of the patch [voxel]
    overlap: float = 0.25, # fraction of the patch shared with the next one, 0 <= overlap < 1
) -> np.ndarray: # (n) int64, strictly increasing starts
    "Starts of patches that cover one axis exactly"
    (size, patch), overlap = _integers("axis_starts: size, patch", (size, patch)), _fraction(overlap)
    if size <= patch: return np.array([_low_start(size, patch)])
    step = max(1, math.floor(round(patch*(1 - overlap), 9) + 0.5))
    return np.append(np.arange(0, size - patch, step), size - patch)

def _fraction(overlap: float) -> float:
    if isinstance(overlap, bool) or not isinstance(overlap, numbers.Real) or not 0 <= overlap < 1:
        raise DataError(f"overlap: a fraction of the patch is needed, 0 <= overlap < 1, got {overlap!r}")
    return float(overlap)

# %%
{"exact": axis_starts(64, 32, 0.5), "shifted back": axis_starts(70, 32, 0.5), "small": axis_starts(21, 32, 0.5)}

# %%
fig, ax = plt.subplots(figsize=(7, 1.8))
for row, start in enumerate(axis_starts(70, 32, 0.5)): ax.barh(row, 32, left=start, color=f"C{row}", alpha=0.6)
ax.axvspan(0, 70, color="0.9", zorder=0)
ax.set(yticks=[], xlabel="voxel", title="size 70, patch 32, overlap 0.5: the last patch is shifted back");

# %%
assert axis_starts(5, 2, 0).tolist() == [0, 2, 3] and axis_starts(7, 5, 0.5).tolist() == [0, 2]
assert axis_starts(3, 8).tolist() == [-2] and axis_starts(8, 8, 0.9).tolist() == [0]
with raises(DataError, match="0 <= overlap < 1, got 1"): axis_starts(10, 5, 1)
with raises(DataError, match="whole numbers >= 1"): axis_starts(10, 2.5)

# %% [markdown]
# ## Where a patch meets the volume
# A patch that sticks out has two sets of slices: where its inside lies in the volume, and where that part lies in the
# patch. `take_patch` cuts a full-size patch and fills the rest with a number, with the nearest voxel (`"edge"`), or
# with the mirror image (`"reflect"`, repeated as often as needed). The last axes of the array are spatial, whatever
# comes before (channels) is kept. It asks the source for one plain box only, so the source may be a zarr array, an HDF5
# data set or a memory map.

# %%
#| export
def patch_slices(
    start: Sequence[int], # (d) first voxel of the patch, may be negative
    patch_size: Sequence[int], # (d) [voxel]
    shape: Sequence[int], # (d) size of the volume [voxel]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]: # slices of the volume, slices of the patch
    "The part of a patch that lies inside the volume, in the volume's and in the patch's own voxels"
    start = tuple(int(s) for s in start)
    source = tuple(slice(max(s, 0), min(s + p, n)) for s, p, n in zip(start, patch_size, shape, strict=True))
    if any(a.stop <= a.start for a in source):
        raise DataError(f"patch at {start} of size {tuple(patch_size)} does not touch the volume of {tuple(shape)}")
    return source, tuple(slice(a.start - s, a.stop - s) for a, s in zip(source, start))

# %%
#| export
def _fold(index: np.ndarray, size: int, fill: str) -> np.ndarray:
    "Bring indices outside [0, size) back inside"
    if fill == "edge": return np.clip(index, 0, size - 1)
    period = max(2*(size - 1), 1)
    index = np.mod(index, period)
    return np.minimum(index, period - index) if size > 1 else np.zeros_like(index)

def take_patch(
    array: Any, # (..., *shape) NumPy array, or anything with `shape` and basic slicing
    start: Sequence[int], # (d) first voxel of the patch, may be negative
    patch_size: Sequence[int], # (d) [voxel]
    fill: float | str = 0, # value outside the volume, or "edge" or "reflect"
) -> np.ndarray: # (..., *patch_size) a new array of the same dtype
    "Cut a patch of full size out of `array`"
    if isinstance(fill, str) and fill not in ("edge", "reflect"):
        raise ConfigError(f"fill: a number, 'edge' or 'reflect' is needed, got {fill!r}")
    d = len(patch_size)
    lead, shape = tuple(array.shape[:-d]), tuple(array.shape[-d:])
    source, inside = patch_slices(start, patch_size, shape)
    everything = (slice(None),)*len(lead)
    whole = all(a.stop - a.start == p for a, p in zip(source, patch_size))
    if whole or not isinstance(fill, str):
        part = array[everything + source]
        if whole: return part.copy() if isinstance(array, np.ndarray) else np.asarray(part)
        try: patch = np.full((*lead, *patch_size), fill, dtype=array.dtype)
        except (OverflowError, ValueError) as e: raise DataError(f"fill: {fill!r} does not fit {array.dtype}") from e
        patch[everything + inside] = part
        return patch
    folded = [_fold(np.arange(int(s), int(s) + p), n, fill) for s, p, n in zip(start, patch_size, shape)]
    part = np.asarray(array[everything + tuple(slice(int(i.min()), int(i.max()) + 1) for i in folded)])
    for axis, i in enumerate(folded, start=len(lead)): part = np.take(part, i - i.min(), axis=axis)
    return part

# %%
patch_slices((-2, 3), (6, 4), (9, 5))

# %%
ramp = np.arange(4)
{str(fill): take_patch(ramp, (-3,), (10,), fill).tolist() for fill in (0, "edge", "reflect")}

# %%
assert take_patch(ramp, (-3,), (10,), "reflect").tolist() == np.pad(ramp, 3, mode="reflect").tolist()
with raises(DataError, match="does not touch"): take_patch(ramp, (4,), (3,))
with raises(DataError, match="does not fit uint8"): take_patch(ramp.astype(np.uint8), (-1,), (3,), fill=-1000)

# %% [markdown]
# ## The grid
# All positions are the product of the positions along each axis, walked in C order: the first axis changes slowest. So
# a `Grid` needs to store three numbers an axis, behaves like a sequence of starts, and compares by value.

# %%
#| export
def _per_axis(value: Any, d: int) -> tuple:
    "One value for every axis, or a sequence of `d`"
    values = tuple(value) if np.ndim(value) else (value,)*d
    if len(values) != d: raise DataError(f"grid: one number or {d} numbers are needed, got {value!r}")
    return values

class ChunkReads(NamedTuple):
    "Chunks decoded to cut every patch of a grid by itself"
    total: int # decodes, counting repetitions
    distinct: int # chunks that exist

@dataclass(frozen=True)
class Grid:
    "Positions of overlapping patches over a volume; a sequence of start tuples in C order"
    shape: tuple[int, ...] # (d) size of the volume [voxel]
    patch_size: tuple[int, ...] | int # (d) or one number for all axes [voxel]
    overlap: tuple[float, ...] | float = 0.25 # (d) or one number: fraction of a patch shared with the next, 0 <= o < 1

    def __post_init__(self):
        shape = _integers("grid: shape", tuple(self.shape) if np.ndim(self.shape) else (self.shape,))
        if not shape: raise DataError("grid: shape is empty, at least one axis is needed")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "patch_size", _integers("grid: patch_size", _per_axis(self.patch_size, len(shape))))
        object.__setattr__(self, "overlap", tuple(_fraction(o) for o in _per_axis(self.overlap, len(shape))))

    @cached_property
    def starts(self) -> tuple[np.ndarray, ...]: # d arrays of int64
        "Starts along each axis"
        return tuple(axis_starts(n, p, o) for n, p, o in zip(self.shape, self.patch_size, self.overlap))

    @property
    def ndim(self) -> int: return len(self.shape)

    def __len__(self) -> int: return math.prod(len(s) for s in self.starts)

    def __iter__(self) -> Iterator[tuple[int, ...]]: return itertools.product(*(s.tolist() for s in self.starts))

    def __getitem__(self, i: int) -> tuple[int, ...]:
        if not -len(self) <= i < len(self): raise IndexError(f"grid: position {i} of {len(self)}")
        index = np.unravel_index(i % len(self), [len(s) for s in self.starts])
        return tuple(int(s[k]) for s, k in zip(self.starts, index))

    def slices(
        self,
        start: Sequence[int], # (d) first voxel of the patch
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]]: # slices of the volume, slices of the patch
        "The part of a patch inside the volume, see `patch_slices`"
        return patch_slices(start, self.patch_size, self.shape)

    def take(
        self,
        array: Any, # (..., *shape)
        start: Sequence[int], # (d) first voxel of the patch
        fill: float | str = 0, # value outside the volume, or "edge" or "reflect"
    ) -> np.ndarray: # (..., *patch_size)
        "Cut one patch, see `take_patch`"
        return take_patch(_fits(array, self, "array"), start, self.patch_size, fill)

    def axis_weight_sums(
        self,
        kind: str = "gaussian", # see `window`
        sigma_scale: float = 0.125, # see `window`
    ) -> tuple[np.ndarray, ...]: # d arrays (size of the axis) float64, > 0
        "Sum of the window weights of all patches at each voxel of an axis; their product is the weight at a voxel"
        return _weight_sums(self, window(self.patch_size, kind, sigma_scale))

    def chunk_reads(
        self,
        chunks: Sequence[int], # (d) chunk size of the stored volume [voxel]
    ) -> ChunkReads: # (total, distinct)
        "Cost of reading each patch by itself from a chunked store"
        return _chunk_reads(self, _integers("chunk_reads: chunks", _per_axis(chunks, self.ndim)))

def _fits(array: Any, grid: Grid, name: str) -> Any:
    if tuple(array.shape[-grid.ndim:]) != grid.shape:
        raise DataError(f"{name}: the last axes must be the grid's {grid.shape}, got shape {tuple(array.shape)}")
    return array

# %%
grid = Grid(shape=(40, 52), patch_size=16, overlap=0.5)
len(grid), grid[0], grid[-1], [s.tolist() for s in grid.starts]

# %%
def outline(ax, starts, patch_size, **style):
    for y, x in starts: ax.add_patch(plt.Rectangle((x - .5, y - .5), patch_size[1], patch_size[0], fill=False, **style))

covered = np.zeros(grid.shape, int)
for start in grid: covered[grid.slices(start)[0]] += 1
fig, ax = plt.subplots(figsize=(4.5, 3.4))
shown = ax.imshow(covered, cmap="Greys", vmin=0)
outline(ax, grid, grid.patch_size, color="C0", lw=0.6)
outline(ax, [grid[8]], grid.patch_size, color="C3", lw=2)
ax.set(xticks=[], yticks=[], title="patches that see a voxel")
fig.colorbar(shown, shrink=0.8);

# %% [markdown]
# Every voxel is seen, no patch leaves a volume that is large enough, no position appears twice.

# %%
assert covered.min() >= 1 and len(set(grid)) == len(grid) and list(grid) == [grid[i] for i in range(len(grid))]
assert all(0 <= s and s + p <= n for start in grid for s, p, n in zip(start, grid.patch_size, grid.shape))
assert Grid(50, 16) == Grid((50,), (16,), (0.25,)) and hash(Grid(50, 16)) == hash(Grid((50,), 16))

# %%
with raises(DataError, match="one number or 3"): Grid((40, 40, 40), (16, 16))
with raises(DataError, match="shape: whole numbers >= 1"): Grid((40, 0), 16)
with raises(DataError, match=r"must be the grid's \(40, 52\)"): grid.take(np.zeros((52, 40)), (0, 0))

# %% [markdown]
# ## Window weights, and why no weight volume is needed
# A prediction is most reliable in the middle of its patch, so overlapping predictions are averaged with a bell-shaped
# weight. It is a product of one function per axis,
# $$w(i) = \exp\left(-\tfrac12\left(\frac{i-(p-1)/2}{\sigma p}\right)^2\right),\qquad \sigma = 1/8,$$
# scaled to a maximum of 1 and floored at `WINDOW_FLOOR` = 1/1000, so that in three dimensions the smallest weight is
# $10^{-9}$: far from underflow, and a voxel that only patch corners reach is still divided by what it truly received.
# Adding a small constant to the denominator instead, as is often done, would pull such voxels to zero.
#
# Positions are a product too. The total weight at voxel $(i,j,k)$ is
# $$\sum_{a,b,c} w_1(i-a)\,w_2(j-b)\,w_3(k-c)
# = \Big(\sum_a w_1(i-a)\Big)\Big(\sum_b w_2(j-b)\Big)\Big(\sum_c w_3(k-c)\Big),$$
# so three short vectors say it for the whole volume. Normalisation never needs a weight volume.

# %%
#| export
WINDOW_FLOOR = 1e-3

def window(
    patch_size: Sequence[int], # (d) [voxel]
    kind: str = "gaussian", # "gaussian" or "constant"
    sigma_scale: float = 0.125, # standard deviation of the Gaussian as a fraction of the patch
) -> list[np.ndarray]: # d arrays (patch) float32 in [WINDOW_FLOOR, 1], maximum 1
    "Weights of a patch along each axis; the weight of a voxel is their product"
    patch_size = _integers("window: patch_size", tuple(patch_size) if np.ndim(patch_size) else (patch_size,))
    if kind == "constant": return [np.ones(p, np.float32) for p in patch_size]
    if kind != "gaussian": raise ConfigError(f"window: kind must be 'gaussian' or 'constant', got {kind!r}")
    if not sigma_scale > 0: raise ConfigError(f"window: sigma_scale must be > 0, got {sigma_scale!r}")
    bells = [np.exp(-0.5*((np.arange(p) - (p - 1)/2)/(sigma_scale*p))**2) for p in patch_size]
    return [np.maximum(b/b.max(), WINDOW_FLOOR).astype(np.float32) for b in bells]

# %%
#| export
def _weight_sums(grid: Grid, bells: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    sums = tuple(np.zeros(n) for n in grid.shape)
    for total, starts, bell, n in zip(sums, grid.starts, bells, grid.shape):
        for s in starts.tolist(): total[max(s, 0):s + len(bell)] += bell[max(-s, 0):n - s]
    return sums

# %%
rows, columns = grid.axis_weight_sums()
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), gridspec_kw={"width_ratios": [1, 1.3]})
left.imshow(np.multiply.outer(*window(grid.patch_size)), cmap="Greys_r")
left.set(xticks=[], yticks=[], title="weight of one patch")
shown = right.imshow(np.multiply.outer(rows, columns), cmap="Greys_r")
outline(right, grid, grid.patch_size, color="C0", lw=0.4)
right.set(xticks=[], yticks=[], title="total: rows × columns")
fig.colorbar(shown, shrink=0.8);

# %%
total = np.zeros(grid.shape)
for start in grid:
    volume_part, patch_part = grid.slices(start)
    total[volume_part] += np.multiply.outer(*window(grid.patch_size))[patch_part]
np.testing.assert_allclose(np.multiply.outer(rows, columns), total, rtol=1e-6)
assert all(w.max() == 1 and w.min() >= WINDOW_FLOOR and (w == w[::-1]).all() for w in window((5, 16, 192)))
assert set(grid.axis_weight_sums("constant")[0]) <= {1, 2, 3}

# %%
with raises(ConfigError, match="'gaussian' or 'constant', got 'hann'"): window((8,), "hann")

# %% [markdown]
# ## A rolling buffer
# Positions come in C order. When the walk moves on to start $s$ along the first axis, rows below $s$ are finished:
# nothing that comes later touches them. So the sums need only the rows of one patch, not of the volume. `Blend` keeps
# that buffer: `add` puts a weighted prediction into it, `flush` hands out finished rows, divided by the weight sums,
# and moves the rest up. Rows leave in multiples of `align`, so that each chunk of a stored output is written once.
# `region` restricts the work to a box while keeping the positions of the whole grid: a part of the volume, computed
# alone, equals the same part of a full run bit by bit.
#
# If patches are left out (`holes`), the weight sums are no longer a product. Then one more channel of the buffer holds
# the weights, and voxels that nothing reached become 0, or what `empty` says. Rows that nothing reached at all are one
# number with the shape of the rows, all strides 0: large empty volumes cost nothing.

# %%
#| export
Box = Sequence[tuple[int, int]]

def _box(grid: Grid, region: Box | None) -> tuple[tuple[int, int], ...]:
    "`region` checked; None is the whole volume"
    if region is None: return tuple((0, n) for n in grid.shape)
    box = tuple((int(lo), int(hi)) for lo, hi in region)
    if len(box) != grid.ndim or any(not 0 <= lo < hi <= n for (lo, hi), n in zip(box, grid.shape)):
        raise DataError(f"region: {grid.ndim} pairs (lo, hi) inside {grid.shape} are needed, got {region!r}")
    return box

def _buffer_shape(grid: Grid, box: Box, align: int) -> tuple[int, ...]:
    (lo, hi), *plane = box
    return min(hi - lo, grid.patch_size[0] + align - 1), *(b - a for a, b in plane)

_BLOCK = 2**18

def _leaving(shape: tuple[int, ...], align: int, dtype: Any) -> int:
    "Rows handed out at a time: about 64 MiB, but whole multiples of `align`"
    rows = 2**26//(math.prod(shape[2:])*shape[0]*np.dtype(dtype).itemsize)
    return max(align, rows//align*align)

def _tiles(plane: Box, tile: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    "Pieces of the plane, cut at the multiples of `tile` counted from voxel 0 of the volume"
    return itertools.product(*([(max(a, lo), min(a + t, hi)) for a in range(lo//t*t, hi, t)]
                               for (lo, hi), t in zip(plane, tile)))

# %%
#| export
class Blend:
    "Weighted mean of overlapping predictions that come in grid order, in a buffer of a few rows"
    def __init__(
        self,
        grid: Grid, # positions
        channels: int, # channels of a prediction
        kind: str = "gaussian", # see `window`
        sigma_scale: float = 0.125, # see `window`
        *,
        region: Box | None = None, # (d) pairs (lo, hi): the part of the volume that is wanted
        align: int = 1, # rows leave in multiples of this, counted from row 0 of the volume
        holes: bool = False, # True: some positions will not be added
        empty: float = 0, # value of voxels that nothing reaches
        dtype: Any = np.float32, # of the sums
    ):
        self.grid, self.box, self.empty = grid, _box(grid, region), empty
        self.channels, self.align = _integers("blend: channels, align", (channels, align))
        bells = window(grid.patch_size, kind, sigma_scale)
        self.weight = functools.reduce(np.multiply.outer, [b.astype(dtype) for b in bells])
        totals = _weight_sums(grid, bells)
        self.totals = None if holes else [t[lo:hi].astype(dtype) for t, (lo, hi) in zip(totals, self.box)]
        self.sums = np.zeros((channels + holes, *_buffer_shape(grid, self.box, self.align)), dtype)
        self.low, self.used = self.box[0][0], np.zeros(self.sums.shape[1], bool)

    def add(
        self,
        start: Sequence[int], # (d) first voxel of the patch
        pred: np.ndarray, # (c, *patch_size) prediction
    ) -> None:
        "Add one weighted prediction; only the part inside the region counts"
        lows = [max(s, lo) for s, (lo, _) in zip(start, self.box)]
        highs = [min(s + p, hi) for s, p, (_, hi) in zip(start, self.grid.patch_size, self.box)]
        if any(a >= b for a, b in zip(lows, highs)): return
        if lows[0] < self.low:
            raise DataError(f"blend: rows below {self.low} were already handed out, got a patch at {tuple(start)}")
        if highs[0] - self.low > self.sums.shape[1]:
            raise DataError(f"blend: call flush({start[0]}) before adding a patch at {tuple(start)}")
        patch = tuple(slice(a - s, b - s) for a, b, s in zip(lows, highs, start))
        origin = self.low, *(lo for lo, _ in self.box[1:])
        target = self.sums[(slice(None), *(slice(a - o, b - o) for a, b, o in zip(lows, highs, origin)))]
        pred, weight = pred[(slice(None), *patch)], self.weight[patch]
        step = max(1, _BLOCK*len(weight)//max(pred.size, 1))
        for k in range(0, len(weight), step):
            target[:self.channels, k:k + step] += pred[:, k:k + step]*weight[k:k + step]
        if self.totals is None: target[-1] += weight
        self.used[lows[0] - self.low:highs[0] - self.low] = True

    def flush(
        self,
        upto: int, # no later patch starts below this row
        tile: Sequence[int] | None = None, # (d - 1) size of the pieces that leave, see `sweep_rows`
    ) -> Iterator[tuple[Any, np.ndarray]]: # (first row, or first voxel of a piece; (c, rows, ...) normalised)
        "Hand out the rows that are finished and make room"
        end, rows = self.box[0][1], self.sums.shape[1]
        while self.low < end:
            high = min(upto, end, self.low + rows)
            if high < end: high = high//self.align*self.align
            if high <= self.low: return
            first = self.low
            while first < high:
                step = self.align if tile else _leaving(self.sums.shape, self.align, self.sums.dtype)
                last = min(high, (first + step)//self.align*self.align)
                if tile is None: yield first, self._normalised(first, last, self.box[1:])
                else:
                    for plane in _tiles(self.box[1:], tile):
                        yield (first, *(lo for lo, _ in plane)), self._normalised(first, last, plane)
                first = last
            n = high - self.low
            for k in range(0, rows, n) if self.used.any() else ():
                kept = max(0, min(n, rows - n - k))
                self.sums[:, k:k + kept] = self.sums[:, k + n:k + n + kept]
                self.sums[:, k + kept:k + n] = 0
            self.used = np.append(self.used[n:], np.zeros(min(n, rows), bool))
            self.low = high

    def _normalised(self, first: int, last: int, plane: Box) -> np.ndarray:
        if self.totals is None and not self.used[first - self.low:last - self.low].any():
            shape = self.channels, last - first, *(hi - lo for lo, hi in plane)
            return np.broadcast_to(self.sums.dtype.type(self.empty), shape)
        inside = [slice(lo - a, hi - a) for (lo, hi), (a, _) in zip(((first, last), *plane), self.box)]
        shift = self.low - self.box[0][0]
        sums = self.sums[(slice(None), slice(inside[0].start - shift, inside[0].stop - shift), *inside[1:])]
        if self.totals is None:
            return np.divide(sums[:-1], sums[-1:], out=np.full_like(sums[:-1], self.empty), where=sums[-1:] > 0)
        totals = [t[part].reshape(-1, *(1,)*(self.grid.ndim - 1 - axis))
                  for axis, (t, part) in enumerate(zip(self.totals, inside))]
        block = sums/totals[0]
        for total in totals[1:]: block /= total
        return block

# %% [markdown]
# Two predictions, 0 from the first patch and 1 from the second: the mean moves smoothly from one to the other, and the
# first row leaves before the last patch has come.

# %%
line = Grid(48, 32, 0.5)
blend = Blend(line, channels=1)
blend.add((0,), np.zeros((1, 32)))
early = list(blend.flush(16))
blend.add((16,), np.ones((1, 32)))
late = list(blend.flush(48))
fig, ax = plt.subplots(figsize=(5, 2))
for low, block in early + late: ax.plot(np.arange(low, low + block.shape[1]), block[0], ".-", label=f"rows from {low}")
ax.set(xlabel="voxel", title="two patches that disagree")
ax.legend();

# %%
assert [low for low, _ in early + late] == [0, 16] and (early[0][1] == 0).all()
assert np.all(np.diff(late[0][1][0]) >= 0) and np.diff(late[0][1][0]).max() < 0.4
with raises(DataError, match="already handed out"): blend.add((0,), np.zeros((1, 32)))

# %%
#| export
def sweep_bytes(
    grid: Grid, # positions
    channels: int, # channels of a prediction
    dtype: Any = np.float32, # of the sums
    *,
    region: Box | None = None, # (d) pairs (lo, hi)
    align: int = 1, # rows of an output chunk
    source: Any = None, # the input, if its rows are kept (see `slab` in `sweep_rows`)
    holes: bool = False, # True if positions are skipped
    tile: Sequence[int] | None = None, # (d - 1) size of the pieces in which rows leave, see `sweep_rows`
) -> int: # [byte]
    "Largest memory that `sweep` holds beside its input patches and output: sums, rows leaving, weights, input rows"
    box = _box(grid, region)
    shape = channels + holes, *_buffer_shape(grid, box, align)
    leaving = min(shape[1], align if tile else _leaving(shape, align, dtype))*math.prod(
        shape[2:] if tile is None else (min(t, n) for t, n in zip(tile, shape[2:])))
    blend = (shape[0]*(math.prod(shape[1:]) + leaving) + math.prod(grid.patch_size))*np.dtype(dtype).itemsize
    return blend + (0 if source is None else _slab_bytes(source, grid, box))

# %% [markdown]
# Three output channels over a 2000³ scan with 192³ patches, in rows of 64-voxel chunks, against the two volumes that
# the usual way needs; and the same in columns of 512 × 512:

# %%
scan = Grid((2000,)*3, 192, 0.25)
[human_bytes(b) for b in (4*4*2000**3, sweep_bytes(scan, 3, align=64),
                          sweep_bytes(scan, 3, align=64, region=((0, 2000), (512, 1024), (512, 1024))))]

# %% [markdown]
# ## Reading each stored row once
# A stored volume is read in chunks, and a patch that touches a chunk decodes all of it. Cutting overlapping patches one
# by one decodes each chunk many times:

# %%
#| export
def chunks_touched(
    start: Sequence[int], # (d) first voxel of the patch, may be negative
    patch_size: Sequence[int], # (d) [voxel]
    chunks: Sequence[int], # (d) chunk size [voxel]
    shape: Sequence[int], # (d) size of the volume [voxel]
) -> Iterator[tuple[int, ...]]: # chunk indices in C order
    "Chunks that hold a voxel of the patch"
    source, _ = patch_slices(start, patch_size, shape)
    return itertools.product(*(range(a.start//c, (a.stop - 1)//c + 1) for a, c in zip(source, chunks, strict=True)))

def _chunk_reads(grid: Grid, chunks: tuple[int, ...]) -> ChunkReads:
    total = distinct = 1
    for starts, p, c, n in zip(grid.starts, grid.patch_size, chunks, grid.shape):
        total *= int(((np.minimum(starts + p, n) - 1)//c - np.maximum(starts, 0)//c + 1).sum())
        distinct *= -(-n//c)
    return ChunkReads(total, distinct)

# %%
list(chunks_touched((30, -2), (40, 16), chunks=(32, 32), shape=(100, 12)))

# %%
stored = Grid((256, 512, 512), (64, 192, 192), 0.5)
{chunk: stored.chunk_reads((chunk,)*3) for chunk in (32, 64, 128)}

# %%
brute = [c for start in grid for c in chunks_touched(start, grid.patch_size, (10, 7), grid.shape)]
assert grid.chunk_reads((10, 7)) == (len(brute), len(set(brute)))

# %% [markdown]
# The sweep therefore keeps the input rows of the current patch row in memory, up to the end of the chunk row, and reads
# only what is new.

# %%
#| export
def _spans(grid: Grid, box: Box) -> list[np.ndarray]:
    "Starts along each axis of the patches that touch `box`"
    return [s[(s < hi) & (s + p > lo)] for s, p, (lo, hi) in zip(grid.starts, grid.patch_size, box)]

def _slab_box(source: Any, grid: Grid, box: Box) -> tuple[int, list[slice]]:
    "Rows of a chunk, and the in-plane part of the volume that the patches need"
    plane = [slice(max(int(s[0]), 0), min(int(s[-1]) + p, n))
             for s, p, n in zip(_spans(grid, box), grid.patch_size, grid.shape)][1:]
    return row_chunk(source, grid.ndim), plane

def _slab_bytes(source: Any, grid: Grid, box: Box) -> int:
    rows, plane = _slab_box(source, grid, box)
    lead = source.shape[:-grid.ndim]
    held = min(grid.patch_size[0] + rows - 1, grid.shape[0]) + min(rows + grid.patch_size[0], grid.shape[0])
    return math.prod(lead)*held*math.prod(s.stop - s.start for s in plane)*np.dtype(source.dtype).itemsize

def row_chunk(
    array: Any, # (..., *shape) NumPy or zarr array
    ndim: int, # number of spatial axes
) -> int: # [voxel], 1 if the array is not chunked
    "Rows of a stored chunk (of a shard, if there are shards) along the first spatial axis"
    chunks = getattr(array, "shards", None) or getattr(array, "chunks", None)
    return int(chunks[-ndim]) if chunks else 1

class _Slab:
    "Patches in grid order from a stored source, each of whose chunk rows is decoded once"
    def __init__(self, source: Any, grid: Grid, box: Box, fill: float | str):
        self.source, self.grid, self.fill = source, grid, fill
        self.chunk, self.plane = _slab_box(source, grid, box)
        self.low = self.high = None

    def take(self, start: Sequence[int]) -> np.ndarray:
        first, last = max(start[0], 0), min(start[0] + self.grid.patch_size[0], self.grid.shape[0])
        if self.low is None or first >= self.high: self.low = self.high = first; self.rows = None
        if last > self.high:
            end = min(-(-last//self.chunk)*self.chunk, self.grid.shape[0])
            lead = (slice(None),)*(len(self.source.shape) - self.grid.ndim)
            new = np.asarray(self.source[(*lead, slice(self.high, end), *self.plane)])
            old = None if self.rows is None else self.rows[(*lead, slice(first - self.low, None))]
            self.rows = new if old is None else np.concatenate([old, new], axis=len(lead))
            self.low, self.high = first, end
        shift = self.low, *(s.start for s in self.plane)
        return take_patch(self.rows, [a - b if b else a for a, b in zip(start, shift)], self.grid.patch_size, self.fill)

# %% [markdown]
# ## The sweep
# `sweep_rows` joins the parts: positions in C order, patches in batches, the model, the buffer, finished rows out. It
# is a generator, so that a caller can write rows in his own format, mark them as done, and later resume with `region`
# at the first missing row. `predict` sees NumPy arrays and returns them; who uses torch wraps his model. A volume
# smaller than the patch is mirrored by default, and what was added is cut off again.
#
# Three hooks serve long runs. `memo` holds predictions: a position that it knows is not predicted again, and what was
# predicted is offered to it. Since each prediction is added on its own and always in the same order, it does not matter
# for a single bit whether it was made now or before. `pipe` sits between the cutting of patches and the model, where a
# thread can work ahead. And with `tile`, finished rows leave in pieces of the plane, so that neither the sums nor
# anything else is held a second time for a plane that is large.

# %%
#| export
def _groups(starts: Iterator, batch: int, take: Callable, drop: Callable | None, memo: Any) -> Iterator[tuple]:
    "Positions with their known predictions or None, and the patches of the latter; at most `batch` of both kinds"
    group, patches = [], []
    for start in starts:
        pred = None if memo is None else memo.get(start)
        if pred is None:
            patch = take(start)
            if drop is not None and drop(patch): continue
            patches.append(patch)
        group.append((start, pred))
        if batch in (len(patches), len(group) - len(patches)):
            yield group, np.stack(patches) if patches else None
            group, patches = [], []
    if group: yield group, np.stack(patches) if patches else None

def _predicted(predict: Callable, patches: np.ndarray, channels: int | None, grid: Grid) -> np.ndarray:
    "Predictions of one batch, of the shape that was asked for"
    preds = np.asarray(predict(patches))
    wanted = len(patches), (preds.shape + (0, 0))[1] if channels is None else channels, *grid.patch_size
    if preds.shape != wanted:
        raise DataError(f"predict: must return shape {wanted} for {patches.shape}, got {preds.shape}")
    return preds

# %%
#| export
def sweep_rows(
    predict: Callable, # (b, c, *patch_size) -> (b, c_out, *patch_size), NumPy arrays
    source: Any, # (*shape) or (c, *shape) NumPy or zarr array
    grid: Grid, # positions over the whole volume
    *,
    channels: int | None = None, # c_out; None: taken from the first prediction
    kind: str = "gaussian", # see `window`
    sigma_scale: float = 0.125, # see `window`
    batch: int = 1, # patches in one call of `predict`, the last call may have fewer
    dtype: Any = np.float32, # of the sums and of the rows handed out
    region: Box | None = None, # (d) pairs (lo, hi): the part of the volume that is wanted; None: all of it
    align: int = 1, # rows leave in multiples of this, counted from row 0 of the volume
    skip: Callable | None = None, # start -> True to leave a position out
    drop: Callable | None = None, # ((c,) *patch_size) -> True to leave a patch out that was read
    empty: float = 0, # value of voxels that nothing reaches, if positions may be left out
    memo: Any = None, # predictions by start: `get(start)` gives one or None, new ones are set like items of a dict
    tile: Sequence[int] | None = None, # (d - 1) cut rows into pieces at the multiples of this; None: whole rows
    pipe: Callable = iter, # what the stream of (positions, stack of patches) goes through before the model
    fill: float | str = "reflect", # padding of a volume smaller than the patch: a number, "edge" or "reflect"
    slab: bool = True, # keep rows of a source that is not a NumPy array, so that each chunk row is decoded once
    desc: str = "sweep", # shown with the progress
) -> Iterator[tuple[Any, np.ndarray]]: # (first row, or with `tile` first voxel; (c_out, rows, ...) part of the region)
    "Predict patch by patch and hand out blended rows as soon as they are finished"
    box, (batch,) = _box(grid, region), _integers("sweep: batch", (batch,))
    if _fits(source, grid, "source").ndim > grid.ndim + 1:
        raise DataError(f"source: at most one channel axis before {grid.shape}, got shape {tuple(source.shape)}")
    if tile is not None: tile = _integers("sweep: tile", _per_axis(tile, grid.ndim - 1))
    reader = _Slab(source, grid, box, fill) if slab and not isinstance(source, np.ndarray) else None
    def take(start):
        patch = reader.take(start) if reader else take_patch(source, start, grid.patch_size, fill)
        return patch if source.ndim > grid.ndim else patch[None]
    setup = dict(kind=kind, sigma_scale=sigma_scale, region=box, align=align, dtype=dtype, empty=empty,
                 holes=skip is not None or drop is not None)
    blend = None if channels is None else Blend(grid, channels, **setup)
    spans = _spans(grid, box)
    total = math.prod(len(s) for s in spans)
    starts = progress(itertools.product(*(s.tolist() for s in spans)), desc=desc, total=total, unit="patch")
    if skip is not None: starts = (s for s in starts if not skip(s))
    for group, patches in pipe(_groups(starts, batch, take, drop, memo)):
        fresh = iter(() if patches is None else _predicted(predict, patches, blend and blend.channels, grid))
        for start, pred in group:
            if pred is None:
                pred = next(fresh)
                if memo is not None: memo[start] = pred
            if blend is None: blend = Blend(grid, len(pred), **setup)
            yield from blend.flush(start[0], tile)
            blend.add(start, pred)
        del group, patches, fresh, pred
    if blend is None:
        raise DataError(f"sweep: all {total} positions were skipped, so the channels are unknown. Pass channels=")
    yield from blend.flush(box[0][1], tile)

# %% [markdown]
# `sweep` writes those rows into an array: a new one, or the caller's, which may be a zarr array far larger than memory.
# `finish` sees finished rows before they are written: the place for softmax, argmax, rounding to bytes. Nothing is
# rounded silently: floats go into an integer array only through a `finish` that makes integers.

# %%
#| export
def sweep(
    predict: Callable, # (b, c, *patch_size) -> (b, c_out, *patch_size), NumPy arrays
    source: Any, # (*shape) or (c, *shape) NumPy or zarr array
    grid: Grid, # positions over the whole volume
    *,
    out: Any = None, # (..., *shape) NumPy or zarr array to write to; None: a new array of the region's size
    finish: Callable | None = None, # (c_out, rows, ...) -> (..., rows, ...), applied to finished rows
    region: Box | None = None, # (d) pairs (lo, hi): the part of the volume that is wanted; None: all of it
    align: int | None = None, # rows leave in multiples of this; None: the rows of a chunk of `out`
    **options: Any, # all others of `sweep_rows` except `tile`
) -> Any: # `out`
    "Apply `predict` to overlapping patches of a volume of any size and blend the results"
    if "tile" in options: raise ConfigError("sweep: tile is an option of sweep_rows, whole rows are written here")
    box = _box(grid, region)
    corner = tuple(lo for lo, _ in box) if out is not None else None
    if out is not None: _fits(out, grid, "out")
    if align is None: align = 1 if out is None else row_chunk(out, grid.ndim)
    for low, rows in sweep_rows(predict, source, grid, region=box, align=align, **options):
        inner = rows.shape[1:]
        if finish is not None: rows = np.asarray(finish(rows))
        if rows.shape[-grid.ndim:] != inner:
            raise DataError(f"finish: must keep the last axes {inner}, got shape {rows.shape}")
        lead = rows.shape[:-grid.ndim]
        if out is None:
            out, corner = np.empty((*lead, *(hi - lo for lo, hi in box)), rows.dtype), (0,)*grid.ndim
        if tuple(out.shape[:-grid.ndim]) != lead:
            raise DataError(f"out: needs shape {(*lead, *grid.shape)}, got {tuple(out.shape)}")
        if not np.can_cast(rows.dtype, out.dtype, "same_kind"):
            raise DataError(f"out: is {out.dtype}, the rows are {rows.dtype}. Pass a `finish` that rounds and converts")
        at = low - box[0][0] + corner[0], *corner[1:]
        out[(slice(None),)*len(lead) + tuple(slice(a, a + n) for a, n in zip(at, inner))] = rows
        del rows
    return out

# %% [markdown]
# The law of blending: a model whose answer depends only on where a voxel *is*, not on which patch it is seen in, must
# come out unchanged, for every overlap, odd sizes, and volumes smaller than the patch. The identity is such a model.

# %%
rng = rng_for(0, "grid")
def identity(x): return x

cases = [((37,), 8), ((23, 31), (9, 40)), ((5, 19, 13), (8, 7, 6))]
errors = {}
for shape, patch in cases:
    volume = rng.random(shape, dtype=np.float32)
    for o in (0, 0.25, 0.5, 0.75, 0.9):
        blended = sweep(identity, volume, Grid(shape, patch, o), batch=3)[0]
        errors[f"{shape} {o}"] = float(np.abs(blended - volume).max())
max(errors.values())

# %%
assert max(errors.values()) < 2e-6
image = rng.random((2, 30, 20), dtype=np.float32)
grid = Grid((30, 20), (8, 8), 0.5)
full = sweep(identity, image, grid)
part = sweep(identity, image, grid, region=((11, 25), (3, 20)))
assert np.array_equal(part, full[:, 11:25, 3:20])

# %% [markdown]
# Not all models are that kind. Below, patches disagree in turn by ±1, the worst case. With constant weights a sharp
# step stays where a patch begins or ends, the Gaussian turns it into a slope.

# %%
class Alternating:
    sign = 1
    def __call__(self, x):
        self.sign = -self.sign
        return np.full_like(x, self.sign)

line = Grid(256, 64, 0.5)
seams = {kind: sweep(Alternating(), np.zeros(256, np.float32), line, kind=kind)[0] for kind in ("constant", "gaussian")}
fig, ax = plt.subplots(figsize=(6, 2))
for kind, y in seams.items(): ax.plot(y, label=kind)
ax.set(xlabel="voxel", title="patches that disagree by ±1, overlap 0.5")
ax.legend();

# %%
borders = line.starts[0][1:]
steps = {kind: float(np.abs(np.diff(y))[borders - 1].max()) for kind, y in seams.items()}
assert steps["constant"] == 1 and steps["gaussian"] <= 0.05 and np.abs(np.diff(seams["gaussian"])).max() <= 0.4
steps

# %% [markdown]
# Skipped positions carry no weight. What only they would have seen is 0.

# %%
disc = np.hypot(*(np.indices((64, 64)) - 32)) < 18
grid = Grid((64, 64), 16, 0.5)
def outside(start): return not disc[grid.slices(start)[0]].any()

seen = sweep(lambda x: x*0 + 1, disc.astype(np.float32), grid, skip=outside)[0]
fig, ax = plt.subplots(figsize=(2.6, 2.6))
ax.imshow(seen + disc, cmap="Greys_r")
outline(ax, [s for s in grid if not outside(s)], grid.patch_size, color="C0", lw=0.5)
ax.set(xticks=[], yticks=[], title="predicted, and the disc");

# %%
assert set(np.unique(seen)) == {0, 1} and (seen[disc] == 1).all() and seen[0, 0] == 0

# %% [markdown]
# A memo changes what is computed, not the result: the second run asks the model for nothing.

# %%
seen_by_model, memo = [], {}
def counted(x):
    seen_by_model.append(len(x))
    return x*2

runs = [sweep(counted, disc.astype(np.float32), grid, memo=memo, batch=8) for _ in range(2)]
pieces = list(sweep_rows(counted, disc.astype(np.float32), grid, memo=memo, align=32, tile=24))
{"predicted": sum(seen_by_model), "of two runs": 2*len(grid), "pieces": [(at, b.shape) for at, b in pieces[:3]]}

# %%
assert sum(seen_by_model) == len(grid) == len(memo) and np.array_equal(*runs)
assert all(np.array_equal(b[0], runs[0][0, z:z + 32, x:x + 24]) for (z, x), b in pieces) and len(pieces) == 6

# %%
with raises(DataError, match="must return shape"): sweep(lambda x: x[..., 1:], disc, grid)
with raises(DataError, match="Pass a `finish`"): sweep(identity, disc*1.0, grid, out=np.zeros((1, 64, 64), np.uint8))
with raises(DataError, match="Pass channels="): sweep(identity, disc, grid, skip=lambda start: True)

# %% [markdown]
# ## Crops for training
# Random crops are uniform over all places where the patch fits; along an axis that is too short the start follows the
# same rule as the grid. The first `k` of `n` drawn starts are the same for every `n`. `centred_start` puts a voxel of
# interest in the middle, as far as the edges allow.

# %%
#| export
def random_starts(
    shape: Sequence[int], # (d) size of the volume [voxel]
    patch_size: Sequence[int], # (d) [voxel]
    n: int, # number of crops
    rng: np.random.Generator, # see `rng_for`
) -> np.ndarray: # (n, d) int64
    "Starts of crops, uniform over all places inside the volume"
    shape, patch_size = _integers("shape", shape), _integers("patch_size", _per_axis(patch_size, len(shape)))
    room = np.maximum(np.array(shape) - patch_size, 0) + 1
    low = np.array([_low_start(s, p) for s, p in zip(shape, patch_size)])
    return low + np.minimum((rng.random((n, len(shape)))*room).astype(np.int64), room - 1)

def centred_start(
    shape: Sequence[int], # (d) size of the volume [voxel]
    patch_size: Sequence[int], # (d) [voxel]
    centre: Sequence[float], # (d) voxel that should be in the middle, rounded half up
) -> tuple[int, ...]: # (d) start; the centre lands on `patch_size//2` unless an edge is near
    "Start of the crop around a voxel, moved into the volume"
    shape, patch_size = _integers("shape", shape), _integers("patch_size", _per_axis(patch_size, len(shape)))
    return tuple(_low_start(n, p) if n < p else min(max(math.floor(c + 0.5) - p//2, 0), n - p)
                 for n, p, c in zip(shape, patch_size, centre, strict=True))

# %%
crops = random_starts((40, 60, 6), (16, 16, 9), n=2000, rng=rng_for(0, "crops"))
crops.min(axis=0), crops.max(axis=0), crops.mean(axis=0).round(1)

# %%
assert crops.min(axis=0).tolist() == [0, 0, -1] and crops.max(axis=0).tolist() == [24, 44, -1]
assert np.array_equal(random_starts((40, 60, 6), (16, 16, 9), 5, rng_for(0, "crops")), crops[:5])
assert centred_start((40, 60, 6), (16, 16, 9), (20, 1, 3)) == (12, 0, -1)

# %% [markdown]
# ## Putting it together
# A noisy volume is smoothed patch by patch into a byte array, rows leaving in multiples of 16. The "model" is a local
# mean whose answer is wrong within two voxels of a patch border, as a network's would be. The error against the same
# model applied to the whole volume at once shows what the weights are for: plain averaging of overlapping patches
# spreads the errors, the window removes them.

# %%
def local_mean(x):
    for axis in range(2, x.ndim): x = sum(np.roll(x, k, axis) for k in range(-2, 3))/5
    return x

def to_bytes(rows): return np.rint(255*np.clip(rows[0], 0, 1)).astype(np.uint8)

shape = (48, 96, 80)
ball = sum(((i - n/2)/(0.4*n))**2 for i, n in zip(np.indices(shape), shape)) < 1
volume = np.clip(ball + rng.normal(0, 0.6, shape), -1, 2).astype(np.float32)
one_shot = local_mean(volume[None, None])[0]
inside = (slice(4, -4),)*3
fig, axes = plt.subplots(1, 4, figsize=(7, 2.3))
axes[0].imshow(volume[24], cmap="Greys_r")
axes[0].set_title("input")
began, apart = time.perf_counter(), {}
for ax, (kind, overlap) in zip(axes[1:], [("constant", 0), ("constant", 0.5), ("gaussian", 0.5)]):
    result = sweep(local_mean, volume, Grid(shape, 32, overlap), kind=kind, align=16,
                   out=np.zeros(shape, np.uint8), finish=to_bytes)
    wrong = np.abs(result - to_bytes(one_shot).astype(float))[inside]
    apart[kind, overlap] = float(wrong.mean())
    ax.imshow(wrong[20], cmap="magma", vmin=0, vmax=60)
    ax.set_title(f"error, {kind} {overlap}\nmean {wrong.mean():.2f} of 255", fontsize=9)
for ax in axes: ax.set(xticks=[], yticks=[])
f"{time.perf_counter() - began:.1f} s"

# %%
assert apart["gaussian", 0.5] < 0.05*min(apart["constant", 0], apart["constant", 0.5])

# %% [markdown]
# ## Agreement with the reference
# The reference is what is usually done: two arrays of the volume's size, read, added to and written back for every
# patch, then divided. The sweep gives the same numbers; `tests/test_grid.py` also compares it with MONAI's
# `sliding_window_inference`.

# %%
def reference(predict, source, grid, kind="gaussian"):
    sums, counts = np.zeros((1, *grid.shape)), np.zeros(grid.shape)
    weight = functools.reduce(np.multiply.outer, window(grid.patch_size, kind))
    for start in grid:
        where, inside = grid.slices(start)
        pred = predict(grid.take(source, start, "reflect")[None, None])[0]
        sums[(slice(None), *where)] += (pred*weight)[(slice(None), *inside)]
        counts[where] += weight[inside]
    return sums/counts

grid = Grid((20, 33, 27), (8, 16, 30), 0.4)
volume = rng.random(grid.shape, dtype=np.float32)
ours, theirs = sweep(local_mean, volume, grid, batch=4), reference(local_mean, volume, grid)
np.testing.assert_allclose(ours, theirs, rtol=1e-5)
float(np.abs(ours - theirs).max())
