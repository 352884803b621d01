# %% [markdown]
# # Finding patches
#
# > Which patches of a labelled volume are worth training on, with every stored chunk decoded once.
#
# Labels of large volumes are sparse: most of the volume was never annotated. So a training first looks for the patches
# that hold enough label: a patch is taken if the tight box around its labelled voxels fills most of it, and if enough
# of its voxels are labelled. The reference system reads every candidate. Candidates overlap by half, and a patch of
# $64 \times 192 \times 192$ touches nine chunks of $128^3$, so each chunk is decoded about 66 times:
#
# $$A = \prod_a \frac{(1 + (p_a - 1)/c_a)\, c_a}{s_a}$$
#
# with patch $p$, chunk $c$ and step $s$; with the search for the labelled box before it, 68 times. On this page a chunk
# is decoded once, and the rest is arithmetic on a coarse grid of cells. Chunks that the store does not hold are not
# even looked for.

# %%
#| default_exp zarrnet.finder

# %%
#| export
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from medvol_nb.core import DataError, human_bytes
from medvol_nb.grid import Box, _integers, _low_start
from medvol_nb.parallel import pmap
from medvol_nb.zarrnet.io import ChunkedVolume, open_volume

# %%
import matplotlib.pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import raises, tmpdir
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr

# %% [markdown]
# ## Cells
# Along one axis, candidates start at $o, o + s, o + 2s, \dots$ and end a patch later. Cut the axis at all these places:
# every candidate is then a whole number of *cells*, whatever the patch and the step are. With a step of half a patch
# there is one cell a step; for odd patches two; a last candidate that ends at the border adds two more.

# %%
#| export
@dataclass(frozen=True)
class _Axis:
    "Candidates along one axis, and the cells between their borders"
    starts: np.ndarray # (n) int64
    edges: np.ndarray # (m + 1) borders of cells, inside the volume
    spans: np.ndarray # (n, 2) cells of each candidate: first, and after the last

    @property
    def cells(self) -> int: return max(0, len(self.edges) - 1)

def _axis(size: int, low: int, high: int, patch: int, step: int, region: tuple[int, int], end_aligned: bool,
          pad_small: bool) -> _Axis:
    "Candidates from `low` on that end at `high` at the latest and lie inside `region`"
    starts = np.arange(low, high - patch + 1, step, dtype=np.int64)
    if end_aligned and len(starts) and starts[-1] < high - patch: starts = np.append(starts, high - patch)
    if pad_small and size < patch: starts = np.array([_low_start(size, patch)])
    first, last = np.maximum(starts, 0), np.minimum(starts + patch, size)
    keep = (first >= region[0]) & (last <= region[1])
    starts, first, last = starts[keep], first[keep], last[keep]
    edges = np.unique(np.concatenate([first, last]))
    return _Axis(starts, edges, np.stack([np.searchsorted(edges, first), np.searchsorted(edges, last)], axis=1))

# %%
for patch, end_aligned in ((8, False), (7, False), (8, True)):
    axis = _axis(30, 2, 29, patch, patch//2, (0, 30), end_aligned, False)
    plt.figure(figsize=(7, 1.2))
    for row, start in enumerate(axis.starts): plt.barh(row, patch, left=start, color=f"C{row}", alpha=0.6)
    for e in axis.edges: plt.axvline(e, color="k", lw=0.5)
    plt.yticks([])
    plt.title(f"patch {patch}, step {patch//2}: {len(axis.starts)} candidates, {axis.cells} cells")

# %%
axis = _axis(30, 2, 29, 7, 3, (0, 30), True, False)
assert axis.starts.tolist() == [2, 5, 8, 11, 14, 17, 20, 22]
assert all(axis.edges[a] == s and axis.edges[b] == s + 7 for s, (a, b) in zip(axis.starts, axis.spans))

# %% [markdown]
# ## One bit a voxel
# A block of voxels becomes a mask of *labelled* voxels, packed into words of 64 bits along $x$. The count and the
# extent of the labelled voxels in each cell then take a few operations on words: mask the bits of a column of cells,
# count them, and see in which rows any is set.

# %%
#| export
_FAR = np.iinfo(np.int32).max

def _pack(mask: np.ndarray) -> np.ndarray:
    "(z, y, x) bool -> (z, y, words) uint64, bit k of word w is voxel 64 w + k"
    n = mask.shape[2]
    if n % 64: mask = np.pad(mask, ((0, 0), (0, 0), (0, -n % 64)))
    bits = np.packbits(np.ascontiguousarray(mask).reshape(-1), bitorder="little")
    return bits.view("<u8").reshape(*mask.shape[:2], -1)

def _bits(low: int, high: int, words: int) -> np.ndarray:
    "Words in which the bits from `low` to before `high` are set"
    return _pack((np.arange(64*words) >= low)[None, None] & (np.arange(64*words) < high))[0, 0]

def _bounds(flags: np.ndarray, axis: int, cuts: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    "First and last index of a set flag in each segment of an axis; none: (_FAR, -1)"
    at = np.arange(offset, offset + flags.shape[axis], dtype=np.int32)
    at = at.reshape([-1 if k == axis else 1 for k in range(3)])
    return (np.minimum.reduceat(np.where(flags, at, _FAR), cuts, axis=axis),
            np.maximum.reduceat(np.where(flags, at, np.int32(-1)), cuts, axis=axis))

def _cell_statistics(words: np.ndarray, at: Sequence[int], width: int, axes: Sequence[_Axis]) -> tuple | None:
    "First cell, counts (z, y, x), lowest and highest labelled index (3, z, y, x) of the cells that a block touches"
    first, cuts = [], []
    for o, n, axis in zip(at, (*words.shape[:2], width), axes):
        a, b = max(o, int(axis.edges[0])), min(o + n, int(axis.edges[-1]))
        if a >= b: return None
        k = int(np.searchsorted(axis.edges, a, "right")) - 1
        inside = axis.edges[k + 1:np.searchsorted(axis.edges, b, "left")]
        first.append(k)
        cuts.append(np.concatenate([[a], inside, [b]]) - o)
    (z0, z1), (y0, y1) = ((int(c[0]), int(c[-1])) for c in cuts[:2])
    words, zcuts, ycuts = words[z0:z1, y0:y1], cuts[0][:-1] - z0, cuts[1][:-1] - y0
    shape = tuple(len(c) - 1 for c in cuts)
    counts = np.zeros(shape, np.int64)
    low, high = np.full((3, *shape), _FAR, np.int32), np.full((3, *shape), -1, np.int32)
    for k, (a, b) in enumerate(zip(cuts[2], cuts[2][1:])):
        w0, w1 = int(a)//64, -(-int(b)//64)
        column = words[:, :, w0:w1] & _bits(int(a) - 64*w0, int(b) - 64*w0, w1 - w0)
        here = np.bitwise_count(column).sum(axis=2, dtype=np.int64)
        if not here.any(): continue
        counts[:, :, k] = np.add.reduceat(np.add.reduceat(here, zcuts, axis=0), ycuts, axis=1)
        filled = (here > 0)[:, :, None]
        low[0, :, :, [k]], high[0, :, :, [k]] = (v.transpose(2, 0, 1) for v in _bounds(
            np.logical_or.reduceat(filled, ycuts, axis=1), 0, zcuts, at[0] + z0))
        low[1, :, :, [k]], high[1, :, :, [k]] = (v.transpose(2, 0, 1) for v in _bounds(
            np.logical_or.reduceat(filled, zcuts, axis=0), 1, ycuts, at[1] + y0))
        rows = np.bitwise_or.reduceat(np.bitwise_or.reduceat(column, zcuts, axis=0), ycuts, axis=1)
        flags = np.unpackbits(np.ascontiguousarray(rows).view(np.uint8), axis=2, bitorder="little").astype(bool)
        low[2, :, :, [k]], high[2, :, :, [k]] = (v.transpose(2, 0, 1) for v in _bounds(
            flags, 2, np.array([0]), at[2] + 64*w0))
    return tuple(first), counts, low, high

# %%
mask = phantoms.sheets((20, 40, 100)).mask > 0
axes = [_axis(n, 0, n, p, p//2, (0, n), False, False) for n, p in zip(mask.shape, (10, 20, 50))]
first, counts, low, high = _cell_statistics(_pack(mask), (0, 0, 0), 100, axes)
counts.sum(), counts[0], high[2, 0, 0] - low[2, 0, 0] + 1

# %%
cell = mask[5:10, 10:20, 25:50]
assert counts[1, 1, 1] == cell.sum()
assert [int(v[1, 1, 1]) for v in low] == (np.argwhere(cell).min(axis=0) + (5, 10, 25)).tolist()
assert [int(v[1, 1, 1]) for v in high] == (np.argwhere(cell).max(axis=0) + (5, 10, 25)).tolist()

# %% [markdown]
# ## From cells to patches
# The count of a patch is the sum over its cells, its extent the smallest and the largest index among them. Along each
# axis this is a reduction over consecutive cells, the same for all patches with that start.

# %%
#| export
def _over_windows(ufunc: np.ufunc, cells: np.ndarray, axes: Sequence[_Axis]) -> np.ndarray:
    "Reduce the cells (z, y, x) of each candidate, one axis after the other"
    for k, axis in enumerate(axes):
        padded = np.concatenate([cells, cells.take([-1], axis=k)], axis=k) # an end may be the number of cells
        pick = (slice(None),)*k + (slice(None, None, 2),)
        cells = ufunc.reduceat(padded, axis.spans.reshape(-1), axis=k)[pick]
    return cells

@dataclass(frozen=True)
class PatchTable:
    "Patches of one volume that hold enough label, in the order of candidates"
    patch_size: tuple[int, int, int] # (z, y, x) [voxel]
    starts: np.ndarray # (n, 3) int64, first voxel (z, y, x)
    counts: np.ndarray # (n) int64, labelled voxels
    bbox_frac: np.ndarray # (n) float64, tight box of the labelled voxels, as a fraction of the patch
    rejected: Mapping[str, Any] = field(default_factory=dict) # candidates, how many failed which test, best values

    def __len__(self) -> int: return len(self.starts)

    def select(
        self,
        min_bbox_percent: float, # fraction of the patch
        min_labeled_ratio: float, # fraction of the patch, or of the box
        labeled_ratio_of: Literal["patch", "bbox"] = "patch", # of what
    ) -> "PatchTable": # as if it had been searched with these thresholds
        "The patches that pass tighter thresholds"
        ok = self.bbox_frac >= min_bbox_percent
        ok &= _ratio(self.counts, self.bbox_frac, math.prod(self.patch_size), labeled_ratio_of) >= min_labeled_ratio
        return replace(self, starts=self.starts[ok], counts=self.counts[ok], bbox_frac=self.bbox_frac[ok])

    def summary(self) -> str: # such as 'candidates 147, without label 0, bbox 2, ratio 30, best bbox 1, ...'
        "What became of the candidates"
        return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.rejected.items())

def _ratio(counts: np.ndarray, bbox_frac: np.ndarray, volume: int, of: str) -> np.ndarray:
    return counts/(volume if of == "patch" else np.maximum(np.rint(bbox_frac*volume), 1))

def _table(counts: np.ndarray, low: np.ndarray, high: np.ndarray, axes: Sequence[_Axis], patch: tuple[int, int, int],
           b: float, r: float, floor: float, of: str) -> PatchTable:
    "Test every candidate; kept are those that reach `floor` of the thresholds, told is who fails them"
    volume = math.prod(patch)
    size = np.where(counts > 0, high.astype(np.int64) - low + 1, 0)
    frac = size[0]*size[1]*size[2]/volume
    ratio = _ratio(counts, frac, volume, of)
    ok = (counts > 0) & (frac >= b*floor) & (ratio >= r*floor)
    index = np.argwhere(ok)
    starts = np.stack([axis.starts[index[:, k]] for k, axis in enumerate(axes)], axis=1)
    rejected = {"candidates": int(ok.size), "without label": int((counts == 0).sum()),
                "bbox": int(((counts > 0) & (frac < b)).sum()), "ratio": int(((counts > 0) & (ratio < r)).sum()),
                "best bbox": float(frac.max(initial=0)), "best ratio": float(ratio.max(initial=0))}
    return PatchTable(patch, starts, counts[ok], frac[ok], rejected)

# %% [markdown]
# ## Which blocks to read
# A block is a whole number of stored chunks, about four million voxels. Blocks without a stored chunk are skipped if
# the fill value is not a label, and so are blocks that no candidate reaches.

# %%
#| export
_BLOCK, _MOST = 2**22, 10**7 # [voxel], blocks or candidates along an axis

def _blocks(label: ChunkedVolume, axes: Sequence[_Axis], empty_is_label: bool) -> list[Box]:
    "Boxes of voxels to read, in C order"
    size = list(label.chunks)
    while math.prod(size)*2*(label.channels or 1) <= _BLOCK and any(s < n for s, n in zip(size, label.shape)):
        k = min((k for k in range(3) if size[k] < label.shape[k]), key=lambda k: size[k])
        size[k] *= 2
    spans = [range(int(a.edges[0])//s, -(-int(a.edges[-1])//s)) for a, s in zip(axes, size)]
    stored = None if empty_is_label else label.stored_chunks()
    keys = itertools.product(*spans)
    if stored is None and (n := math.prod(map(len, spans))) > _MOST:
        raise DataError(f"{label.path}: {n} blocks of voxels would have to be read, and the store does not tell which "
                        "exist. Copy it to a disk, or give a region")
    if stored is not None:
        unit = label.shards or label.chunks
        touched = (itertools.product(*(range(k*u//s, -(-min((k + 1)*u, n)//s))
                                       for k, u, s, n in zip(key, unit, size, label.shape))) for key in stored)
        keys = sorted({b for group in touched for b in group if all(k in r for k, r in zip(b, spans))})
    return [tuple((k*s, min((k + 1)*s, n)) for k, s, n in zip(key, size, label.shape)) for key in keys]

def _is_label(data: np.ndarray, channels: int | None, ignore: Any) -> np.ndarray:
    "(z, y, x) bool: labelled voxels of an array that may have channels"
    found = data > 0 if channels is None else (data != 0).any(axis=0)
    if ignore is None: return found
    unknown = np.isnan(data) if math.isnan(ignore) else data == ignore
    return found & ~(unknown if channels is None else unknown.all(axis=0))

@dataclass(frozen=True)
class _Scan:
    "What to do with a block: a picklable function for `pmap`"
    label: ChunkedVolume
    ignore: Any
    mask: ChunkedVolume | None
    ignore_mask: ChunkedVolume | None
    axes: tuple[_Axis, ...] | None = None # None: only look for the labelled box
    keep: bool = False # return the packed bits, too

    def words(self, box: Box) -> np.ndarray | None:
        "Packed labelled voxels of a block; None if there are none"
        at = tuple(slice(a, b) for a, b in box)
        found = _is_label(self.label[at], self.label.channels, self.ignore)
        if not found.any(): return None
        if self.mask is not None: found &= self.mask[at] > 0
        if self.ignore_mask is not None: found &= ~(self.ignore_mask[at] > 0)
        return _pack(found) if found.any() else None

    def __call__(self, boxes: Sequence[tuple[Box, np.ndarray | None]]) -> list[tuple]:
        out = []
        for box, words in boxes:
            if words is None: words = self.words(box)
            if words is None: continue
            at, width = [a for a, _ in box], box[2][1] - box[2][0]
            if self.axes is not None: out.append(_cell_statistics(words, at, width, self.axes))
            else: out.append((box, _extent(words, at), words if self.keep else None))
        return [o for o in out if o is not None]

def _extent(words: np.ndarray, at: Sequence[int]) -> list[tuple[int, int]]:
    "Tight box of the set bits, as [from, to) along each axis"
    rows = words.any(axis=2)
    columns = np.unpackbits(np.bitwise_or.reduce(words, axis=(0, 1)).view(np.uint8), bitorder="little")
    found = (np.flatnonzero(v) for v in (rows.any(axis=1), rows.any(axis=0), columns))
    return [(o + int(f[0]), o + int(f[-1]) + 1) for o, f in zip(at, found)]

def _map(scan: _Scan, boxes: Sequence[tuple], workers: int, desc: str) -> Iterator[tuple]:
    groups = [boxes[k:k + 8] for k in range(0, len(boxes), 8)]
    names = [f"blocks from {g[0][0]}" for g in groups]
    for found in pmap(scan, groups, workers, keys=names, desc=desc): yield from found

# %% [markdown]
# ## The search
# The grid of candidates starts at the corner of the volume. The reference starts it at the corner of the labelled box
# (`grid_origin="label_bbox"`), which is known only after all labels were seen: the packed bits of the first pass are
# then kept in memory, or the blocks are read again if they do not fit. Blocks are independent and their results are
# merged with sums, minima and maxima, so the number of workers does not change the result.

# %%
#| export
_FOR_BITS = 0.5 # part of the memory that packed bits may take

def _search(scan: _Scan, blocks: Sequence[tuple], axes: tuple[_Axis, ...], max_bytes: float, workers: int) -> tuple:
    "Counts, lowest and highest labelled index of every candidate"
    cells = tuple(a.cells for a in axes)
    need = 32*(math.prod(cells) + math.prod(len(a.starts) for a in axes))
    if need > max_bytes:
        raise DataError(f"{scan.label.path}: {math.prod(cells)} cells need {human_bytes(need)}, more than "
                        "max_memory_gb allows. Use a larger step, a patch divisible by it, or more memory")
    counts = np.zeros(cells, np.int64)
    low, high = np.full((3, *cells), _FAR, np.int32), np.full((3, *cells), -1, np.int32)
    for first, n, a, b in _map(replace(scan, axes=axes), blocks, workers, "labels"):
        at = tuple(slice(k, k + m) for k, m in zip(first, n.shape))
        counts[at] += n
        for k in range(3):
            np.minimum(low[k][at], a[k], out=low[k][at])
            np.maximum(high[k][at], b[k], out=high[k][at])
    return (_over_windows(np.add, counts, axes), np.stack([_over_windows(np.minimum, v, axes) for v in low]),
            np.stack([_over_windows(np.maximum, v, axes) for v in high]))

def find_patches(
    label: ChunkedVolume | np.ndarray, # (z, y, x) or (c, z, y, x) labels, as a stored volume or an array
    patch_size: Sequence[int], # (z, y, x) [voxel]
    *,
    min_bbox_percent: float = 0.95, # tight box of the labelled voxels, as a fraction of the patch
    min_labeled_ratio: float = 0.1, # labelled voxels, as a fraction
    step: Sequence[int] | None = None, # distance of candidates (z, y, x) [voxel]; default: half a patch
    grid_origin: Literal["volume", "label_bbox"] = "volume", # where the grid of candidates starts
    labeled_ratio_of: Literal["patch", "bbox"] = "patch", # of what `min_labeled_ratio` is a fraction
    ignore_label: float | None = None, # value that is no label; with channels, if all of them have it
    end_aligned: bool = False, # also a candidate at the far end of each axis
    floor: float = 1.0, # keep candidates down to this part of the thresholds, for `PatchTable.select`
    region: Box | None = None, # candidates lie inside, [from, to) of z, y, x [voxel]
    mask: ChunkedVolume | None = None, # (z, y, x): only voxels > 0 count
    ignore_mask: ChunkedVolume | None = None, # (z, y, x): voxels > 0 do not count
    pad_small: bool = False, # accept an axis shorter than the patch: one candidate, half of the padding in front
    workers: int = 0, # processes; 0: in this process
    max_memory_gb: float = 2.0, # for the packed bits and the cells [GB]
) -> PatchTable: # in C order of the candidates
    "Patches of a volume with enough label in them"
    if isinstance(label, np.ndarray): label = open_volume(label)
    patch = _integers("patch_size", patch_size)
    step = tuple(max(1, p//2) for p in patch) if step is None else _integers("step", step)
    if len(patch) != 3 or len(step) != 3: raise DataError(f"patch_size, step: three numbers, got {patch} and {step}")
    fractions = {"min_bbox_percent": min_bbox_percent, "min_labeled_ratio": min_labeled_ratio, "floor": floor}
    for name, value in fractions.items():
        if not 0 <= value <= 1: raise DataError(f"{name}: a fraction from 0 to 1 is needed, got {value!r}")
    for other in (mask, ignore_mask):
        if other is not None and other.shape != label.shape:
            raise DataError(f"{other.path}: shape {other.shape}, but the labels {label.path} have {label.shape}")
    region = region or tuple((0, n) for n in label.shape)
    scan = _Scan(label, ignore_label, mask, ignore_mask)
    background = np.full((label.channels or 1, 1, 1, 1), label.fill_value, label.dtype)
    fill = bool(_is_label(background if label.channels else background[0], label.channels, ignore_label).any())
    whole = tuple((0, n) for n in label.shape)
    bits: dict[Box, np.ndarray] = {}
    thresholds = min_bbox_percent, min_labeled_ratio, floor, labeled_ratio_of
    if grid_origin == "label_bbox":
        everywhere = tuple(_Axis(np.array([0]), np.array([0, n]), np.array([[0, 1]])) for n in label.shape)
        blocks = _blocks(label, everywhere, fill)
        keep = sum(math.prod(b - a for a, b in box) for box in blocks)/8 <= max_memory_gb*1e9*_FOR_BITS
        found = list(_map(replace(scan, keep=keep), [(b, None) for b in blocks], workers, "labelled box"))
        extents = [e for _, e, _ in found]
        bits = {b: w for b, _, w in found if w is not None}
        whole = tuple((min(e[k][0] for e in extents), max(e[k][1] for e in extents)) if extents else (0, 0)
                      for k in range(3))
        blocks = [b for b, _, _ in found]
    elif grid_origin != "volume": raise DataError(f"grid_origin: must be 'volume' or 'label_bbox', got {grid_origin!r}")
    if any((hi - lo)//s > _MOST for (lo, hi), s in zip(whole, step)):
        raise DataError(f"{label.path}: {label.shape} voxels in steps of {step} are too many candidates")
    axes = tuple(_axis(n, lo, hi, p, s, r, end_aligned, pad_small)
                 for n, (lo, hi), p, s, r in zip(label.shape, whole, patch, step, region))
    if not all(len(a.starts) for a in axes):
        none = np.zeros((0, 3), np.int64), np.zeros(0, np.int64), np.zeros(0)
        counted = ("candidates", "without label", "bbox", "ratio", "best bbox", "best ratio")
        return PatchTable(patch, *none, dict.fromkeys(counted, 0))
    if grid_origin == "volume": blocks = _blocks(label, axes, fill)
    todo = [(b, bits.get(b)) for b in blocks]
    return _table(*_search(scan, todo, axes, max_memory_gb*1e9, workers), axes, patch, *thresholds)

# %% [markdown]
# Half of a roll was annotated. The picture shows what is taken and what is not, in one slice.

# %%
roll = phantoms.sheets((32, 128, 128), pitch=20)
label = roll.mask.copy()
label[:, 70:, 50:] = 0
table = find_patches(label, (16, 32, 32), min_labeled_ratio=0.15)
fig, ax = plt.subplots(figsize=(5, 5))
ax.imshow(roll.img[8], cmap="gray")
ax.imshow(np.ma.masked_equal(label[8], 0), cmap="autumn", alpha=0.4)
taken = {tuple(s[1:]) for s in table.starts if s[0] == 0}
for y, x in itertools.product(range(0, 97, 16), repeat=2):
    colour, width = ("lime", 1.5) if (y, x) in taken else ("red", 0.5)
    ax.add_patch(plt.Rectangle((x + 1, y + 1), 30, 30, fill=False, color=colour, lw=width))
ax.set_title("accepted (green) and rejected (red) patches")
ax.axis("off")
table.rejected

# %% [markdown]
# The rule, written as the reference does it, gives the same list. Stored in chunks, with chunks left out that hold no
# label, and searched by two processes, it is still the same.

# %%
def literal(label, patch, b, r, starts):
    out = []
    for s in starts:
        found = np.argwhere(label[tuple(slice(a, a + p) for a, p in zip(s, patch))])
        size = np.prod(np.ptp(found, axis=0) + 1) if len(found) else 0
        if len(found) and size/np.prod(patch) >= b and len(found)/np.prod(patch) >= r: out.append(s)
    return out

grid = list(itertools.product(range(0, 17, 8), range(0, 97, 16), range(0, 97, 16)))
assert table.starts.tolist() == [list(s) for s in literal(label, (16, 32, 32), 0.95, 0.15, grid)]
with tmpdir() as d:
    write_zarr(Volume(label, affine_from(1.0, axes="zyx"), "zyx"), d/"label.zarr", chunks=32)
    stored = open_volume(d/"label.zarr")
    again = find_patches(stored, (16, 32, 32), min_labeled_ratio=0.15)
    n_stored = len(stored.stored_chunks())
assert np.array_equal(again.starts, table.starts) and np.array_equal(again.bbox_frac, table.bbox_frac)
n_stored, math.prod((1, 4, 4))

# %% [markdown]
# Candidates kept down to half of the thresholds answer any tighter question without another search.

# %%
wide = find_patches(label, (16, 32, 32), min_labeled_ratio=0.15, floor=0.5)
assert np.array_equal(wide.select(0.95, 0.15).starts, table.starts)
len(wide), len(table), len(wide.select(0.99, 0.2))

# %%
with raises(DataError, match="a fraction from 0 to 1 is needed, got 95"):
    find_patches(label, (16, 32, 32), min_bbox_percent=95)
