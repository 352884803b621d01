# %% [markdown]
# # Regions of a label map
#
# > Connected pieces, who touches whom, and how to merge: what turns raw clusters into clean segments.
#
# Clusters of voxels come out ragged. Some ids own crumbs far away from their main piece, there are more or fewer
# segments than were asked for, numbers have gaps, and the grid may be coarser than the image. None of this needs the
# voxels once the *graph of touching regions* is known: a few thousand nodes with size and mean features, and the number
# of faces each pair shares. This page builds the graph once and does all repairs on it. It works on label maps from any
# program.

# %%
#| default_exp regions

# %%
#| export
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from medvol_nb.core import DataError

# %%
import time

import matplotlib.pyplot as plt
from scipy.ndimage import gaussian_filter

from medvol_nb.core import raises, rng_for
from medvol_nb.plot import overlay

# %% [markdown]
# ## What comes in
# Features are `(c, x, y, z)` arrays or tensors of any real type, perhaps larger than half the memory, so they are taken
# channel by channel. The example of this page is a plane of smooth noise with three levels, clustered badly on purpose.

# %%
#| export
def _checked(features: Any, what: str) -> Any:
    "The array itself, if it is a channel-first volume of real numbers"
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 4 or min(shape) < 1:
        hint = ". One channel? Pass features[None]" if len(shape) == 3 else ""
        raise DataError(f"{what}: features must be (c, x, y, z) with no empty axis, got shape {shape}{hint}")
    real = not features.is_complex() if isinstance(features, torch.Tensor) else np.dtype(features.dtype).kind in "biuf"
    if not real: raise DataError(f"{what}: features must be real numbers, got {features.dtype}")
    return features

def _tensor(part: Any, device: torch.device) -> torch.Tensor:
    "A piece of the features as float32 on the device; no copy if it is that already"
    if isinstance(part, torch.Tensor): return part.detach().to(device, torch.float32)
    part = np.asarray(part)
    if part.dtype != np.float32 or not part.dtype.isnative or min(part.strides) < 0: part = part.astype(np.float32)
    elif not part.flags.writeable: part = part.copy()
    return torch.from_numpy(part).to(device)

def _count(n: Any, what: str, lowest: int = 1) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < lowest:
        raise DataError(f"{what}: a whole number >= {lowest} is needed, got {n!r}")
    return int(n)

def _three(values: Any, what: str) -> tuple[int, int, int]:
    out = tuple(values) if isinstance(values, (Sequence, np.ndarray)) else (values,)*3
    if len(out) != 3: raise DataError(f"{what}: one or three values are needed, got {values!r}")
    return tuple(_count(v, what) for v in out)

def _checked_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    mask = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if mask.shape != tuple(shape): raise DataError(f"mask: must have the grid {tuple(shape)}, got {mask.shape}")
    return np.ascontiguousarray(mask != 0)

# %%
rng = rng_for(0, "regions")
smooth = np.stack([gaussian_filter(rng.standard_normal((48, 48, 1)), (3, 3, 0)) for _ in range(2)])
smooth /= smooth.std()
crumbs = (3*np.digitize(smooth[0] + 0.2*rng.standard_normal((48, 48, 1)), (-0.5, 0.5))
          + np.digitize(smooth[1], (-0.5, 0.5)) + 1)

def show(*panels):
    fig, axes = plt.subplots(1, len(panels), figsize=(7, 7/len(panels) + 0.3), layout="constrained")
    for ax, (title, lbl) in zip(axes, panels):
        ax.imshow(overlay(smooth[0, :, :, 0], lbl[:, :, 0]))
        ax.set_title(title, fontsize=8)
        ax.set_axis_off()

show(("feature with 9 clusters", crumbs), ("cluster 5 alone", 5*(crumbs == 5)))

# %% [markdown]
# ## Regions and their neighbours
# What follows needs no voxels, only the graph of touching regions: sizes, sums of features, and the number of faces
# that two regions share.

# %%
#| export
class _Graph:
    "Regions 1...n: size, feature sums, and pairs that touch with their contact"
    def __init__(self, size: np.ndarray, sums: np.ndarray, pairs: np.ndarray, contact: np.ndarray) -> None:
        self.size, self.sums, self.pairs, self.contact = size, sums, pairs, contact
        self.root = np.arange(len(size)) # region that each one has become

    @property
    def alive(self) -> np.ndarray: return self.size > 0

    def means(self, at: np.ndarray) -> np.ndarray: return self.sums[at]/self.size[at][:, None]

    def join(self, child: np.ndarray, parent: np.ndarray) -> None:
        "Merge regions into others that stay"
        new = np.arange(len(self.size))
        new[child] = parent
        np.add.at(self.size, parent, self.size[child])
        np.add.at(self.sums, parent, self.sums[child])
        self.size[child] = 0
        self.root = new[self.root]
        pairs = np.sort(new[self.pairs], 0)
        self.pairs, self.contact = _tally(pairs[0]*len(new) + pairs[1], len(new), self.contact)

def _tally(codes: np.ndarray, n: int, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    "Distinct pairs i < j from i*n + j, and how often or how heavy"
    if weights is None: codes = np.sort(codes)
    else:
        order = np.argsort(codes, kind="stable")
        codes, weights = codes[order], weights[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    contact = np.diff(starts, append=len(codes)) if weights is None else \
        np.add.reduceat(weights, starts) if len(starts) else weights
    pairs = np.stack(np.divmod(codes[starts], n))
    real = pairs[0] != pairs[1]
    return pairs[:, real], contact[real]

def _touching(regions: np.ndarray, n: int, run: Callable) -> tuple[np.ndarray, np.ndarray]:
    "Pairs of regions > 0 that share a face, and the number of such faces"
    step, whole = max(1, 2**18//regions[0].size), torch.from_numpy(regions)
    def part(x: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = [torch.empty(0, dtype=torch.int64)]
        for axis in range(3):
            block = whole[x:x + step + (axis == 0)]
            if block.shape[axis] < 2: continue
            a, b = (block.narrow(axis, k, block.shape[axis] - 1) for k in (0, 1))
            at = ((a != b) & (a > 0) & (b > 0)).nonzero(as_tuple=True)
            a, b = a[at].long(), b[at]
            codes.append(torch.minimum(a, b)*(n + 1) + torch.maximum(a, b))
        return torch.unique_consecutive(torch.cat(codes).sort()[0], return_counts=True)
    codes, faces = (torch.cat(c).numpy() for c in zip(*run(part, range(0, len(regions), step))))
    return _tally(codes, n + 1, faces)

def _components(labels: np.ndarray) -> tuple[np.ndarray, int]:
    "Six-connected pieces of equal labels > 0, numbered from 1"
    import cc3d
    regions, n = cc3d.connected_components(labels, connectivity=6, return_N=True)
    return np.ascontiguousarray(regions).astype(np.uint32, copy=False).view(np.int32), n

def _slabs(a: np.ndarray) -> list[slice]:
    "Pieces of the first axis: bincount and indexing copy what they get to 64 bits, which a whole scan has no room for"
    step = max(1, 2**22//max(a[0].size, 1))
    return [slice(x, x + step) for x in range(0, len(a), step)]

def _sizes(regions: np.ndarray, n: int) -> np.ndarray:
    "Voxels of the ids 0...n"
    return sum(np.bincount(regions[s].ravel(), minlength=n + 1) for s in _slabs(regions))

def _looked_up(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    "table[ids]"
    out = np.empty(ids.shape, table.dtype)
    for s in _slabs(ids): out[s] = table[ids[s]]
    return out

def _run_starts(flat: np.ndarray) -> np.ndarray:
    "Where a value differs from the one before"
    return np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])

def _feature_sums(features: Any, regions: np.ndarray, n: int) -> np.ndarray:
    "(n + 1, c) float64"
    out = np.zeros((n + 1, features.shape[0]))
    for s in _slabs(regions):
        flat = regions[s].ravel()
        for k in range(features.shape[0]):
            out[:, k] += np.bincount(flat, _tensor(features[k, s], torch.device("cpu")).numpy().ravel(), n + 1)
    return out

def _in_turn(f: Callable, items: Sequence) -> list: return [f(i) for i in items]

def _graph(regions: np.ndarray, n: int, sums: np.ndarray, run: Callable = _in_turn) -> _Graph:
    size = _sizes(regions, n)
    size[0] = 0
    return _Graph(size, sums, *_touching(regions, n, run))

# %%
pair = np.array([[1, 1, 2], [1, 3, 2]])[:, :, None]
graph = _graph(pair, 3, _feature_sums(pair[None], pair, 3))
graph.size, graph.pairs.T.tolist(), graph.contact

# %% [markdown]
# Region 1 touches 2 along one face and 3 along two, one below and one beside it.

# %%
assert graph.pairs.T.tolist() == [[1, 2], [1, 3], [2, 3]] and graph.contact.tolist() == [1, 2, 1]
assert _components(crumbs)[1] > 9 and graph.means(np.array([2])) == 2

# %% [markdown]
# ## One piece an id
# Clustering leaves crumbs: pieces of a cluster that are cut off from the rest. Every piece becomes a region, and
# regions that are too small join the *touching* region with the closest mean feature; the larger contact decides ties.
# Smallest first means that a region waits while a smaller one touches it. All that need not wait go in one round, so
# the loop runs over arrays. A region with no neighbour is an island of the mask and stays, however small.

# %%
#| export
def _absorb(graph: _Graph, wanted: Callable[[_Graph], np.ndarray]) -> None:
    "Merge regions for which `wanted` is true into their closest neighbours until none is left"
    while True:
        joins = _closest(graph, wanted(graph) & graph.alive)
        if not len(joins[0]): return
        graph.join(*joins)

def _closest(graph: _Graph, small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Small regions that no smaller small one touches, and the neighbour that each of them joins"
    rank = np.empty(len(small), np.int64)
    rank[np.argsort(graph.size, kind="stable")] = np.arange(len(small))
    s, t = np.concatenate([graph.pairs, graph.pairs[::-1]], 1)
    contact = np.concatenate([graph.contact, graph.contact])
    waits = np.zeros(len(small), bool)
    waits[s[small[s] & small[t] & (rank[t] < rank[s])]] = True
    keep = small[s] & ~waits[s]
    s, t, contact = s[keep], t[keep], contact[keep]
    distance = ((graph.means(s) - graph.means(t))**2).sum(1)
    order = np.lexsort((t, -contact, distance, s))
    s, t = s[order], t[order]
    first = np.flatnonzero(np.diff(s, prepend=-1))
    return s[first], t[first]

def _smaller_than(size: float) -> Callable[[_Graph], np.ndarray]: return lambda graph: graph.size < size

def _down_to(n: int) -> Callable[[_Graph], np.ndarray]:
    "The smallest regions with neighbours, as many as there are too many"
    def wanted(graph: _Graph) -> np.ndarray:
        out = np.zeros(len(graph.size), bool)
        near = np.unique(graph.pairs)
        excess = max(0, int(graph.alive.sum()) - n)
        out[near[np.argsort(graph.size[near], kind="stable")[:excess]]] = True
        return out
    return wanted

# %%
regions, n = _components(crumbs)
graph = _graph(regions, n, _feature_sums(smooth, regions, n))
before = int(graph.alive.sum())
_absorb(graph, _smaller_than(20))
before, int(graph.alive.sum()), int(graph.size[graph.alive].min())

# %%
assert graph.size.sum() == crumbs.size and graph.size[graph.alive].min() >= 20
_absorb(graph, _down_to(12))
assert graph.alive.sum() == 12

# %% [markdown]
# ## Exactly as many as asked for
# Starting from twice the number, the pair whose union costs least is merged again and again. The cost is the growth of
# the squared error inside segments (Ward 1963), $\frac{n_i n_j}{n_i + n_j}|\mu_i - \mu_j|^2$, and only pairs that
# touch are candidates. Where features are constant and all unions cost nothing, the smallest goes first. So segments
# grow where the features are flat and stay small where they are not, and the result has the requested count, unless
# the mask has more islands than that.

# %%
#| export
def _ward(graph: _Graph, n_segments: int, max_size: float) -> None:
    "Merge the cheapest touching pair until `n_segments` are left"
    size, sums = graph.size.astype(float), graph.sums
    near: list[set[int]] = [set() for _ in size]
    for i, j in graph.pairs.T.tolist():
        near[i].add(j)
        near[j].add(i)
    def costs(i: np.ndarray, j: np.ndarray) -> list[float]:
        gap = sums[i]/size[i][..., None] - sums[j]/size[j][..., None]
        return (size[i]*size[j]/(size[i] + size[j])*(gap**2).sum(-1)).tolist()
    age, into = [0]*len(size), np.arange(len(size))
    heap = [(c, size[i] + size[j], i, j, 0, 0) for c, i, j in zip(costs(*graph.pairs), *graph.pairs.tolist())]
    heapq.heapify(heap)
    count = int(graph.alive.sum())
    while heap and count > n_segments:
        _, _, i, j, age_i, age_j = heapq.heappop(heap)
        if age[i] != age_i or age[j] != age_j or size[i] + size[j] > max_size: continue
        into[j], count = i, count - 1
        size[i] += size[j]
        sums[i] += sums[j]
        age[i] += 1
        age[j] = -1
        near[i] = (near[i] | near[j]) - {i, j}
        others = np.array(sorted(near[i]), int)
        for k in near[j] - {i}: near[k].discard(j)
        for c, k in zip(costs(np.array([i]), others) if len(others) else (), others.tolist()):
            near[k].add(i)
            low, high, both = min(i, k), max(i, k), size[i] + size[k]
            heapq.heappush(heap, (c, both, low, high, age[low], age[high]))
    for j in range(len(into)): # a region is merged once, into one that may be merged later
        at = j
        while into[at] != at: at = into[at]
        into[j] = at
    graph.size = np.bincount(into, graph.size, len(into)).astype(np.int64)
    graph.root = into[graph.root]

# %% [markdown]
# Four cells in a row with the values 0, 1, 5, 6: the pairs (0, 1) and (5, 6) are equally cheap and go first.

# %%
row = np.arange(1, 5)[:, None, None]
values = np.array([0, 1, 5, 6.0])[None, :, None, None]
merged = {}
for k in (3, 2, 1):
    graph = _graph(row, 4, _feature_sums(values, row, 4))
    _ward(graph, k, math.inf)
    merged[k] = graph.root[1:].tolist()
merged

# %%
assert merged == {3: [1, 1, 3, 4], 2: [1, 1, 3, 3], 1: [1, 1, 1, 1]}

# %% [markdown]
# ## Numbers
# The final ids count from 1 in the order in which a raster scan meets them, in the smallest type that fits: int16 up
# to 32767, which other tools read everywhere, then uint16, then int32.

# %%
#| export
def _numbers(owners: np.ndarray, n: int) -> tuple[np.ndarray, int]:
    "For each of the ids 0...n its place in raster order, 0 for 0 and for those that do not occur"
    flat = owners.ravel()
    starts = _run_starts(flat)
    first = np.full(n + 1, flat.size)
    first[flat[starts[::-1]]] = starts[::-1] # the last assignment counts
    first[0] = flat.size
    k = int((first < flat.size).sum())
    number = np.zeros(n + 1, _id_type(k))
    number[np.argsort(first, kind="stable")[:k]] = np.arange(1, k + 1)
    return number, k

def _renumber(regions: np.ndarray, root: np.ndarray) -> np.ndarray:
    "Regions as ids 1...k in raster order"
    owners = _looked_up(root.astype(np.int32), regions)
    return _looked_up(_numbers(owners, len(root) - 1)[0], owners)

def _id_type(k: int) -> type: return np.int16 if k <= 32767 else np.uint16 if k <= 65535 else np.int32

# %%
assert _renumber(np.array([[7, 0, 3], [7, 3, 3]])[:, :, None], np.arange(8)).ravel().tolist() == [1, 0, 2, 1, 2, 2]
assert [_id_type(k) for k in (32767, 32768, 65536)] == [np.int16, np.uint16, np.int32]

# %% [markdown]
# ## The two repairs on any label map
# Both work on label maps from elsewhere as well, such as those of other programs.

# %%
#| export
def _checked_labels(labels: Any, features: Any, what: str) -> np.ndarray:
    "int32 labels on the grid of the features"
    labels = np.asarray(labels)
    if labels.ndim != 3 or labels.dtype.kind not in "iub" or labels.size == 0:
        raise DataError(f"{what}: labels must be integers (x, y, z), got {labels.dtype} {labels.shape}")
    if labels.shape != tuple(_checked(features, what).shape[1:]):
        raise DataError(f"{what}: labels {labels.shape} and features {tuple(features.shape)} differ in their grid")
    if labels.min() < 0: raise DataError(f"{what}: labels must not be negative, got {labels.min()}")
    if labels.max() > 2**31 - 1: raise DataError(f"{what}: labels must fit int32, got {labels.max()}")
    return labels.astype(np.int32)

def enforce_connectivity(
    labels: np.ndarray, # (x, y, z) integer labels, 0 = outside
    features: Any, # (c, x, y, z) array or tensor, decides which neighbour a small piece joins
    *,
    min_size: float, # pieces below this size join a neighbour [voxel]
    mask: np.ndarray | None = None, # (x, y, z) bool; labels outside become 0
) -> np.ndarray: # (x, y, z) ids 1...k in raster order, one connected piece each, 0 outside
    "Give every connected piece its own id, and let small ones join the most similar piece they touch"
    labels = _checked_labels(labels, features, "enforce_connectivity")
    if mask is not None: labels = np.where(_checked_mask(mask, labels.shape), labels, 0)
    regions, n = _components(labels)
    graph = _graph(regions, n, _feature_sums(features, regions, n))
    _absorb(graph, _smaller_than(min_size))
    return _renumber(regions, graph.root)

def merge_segments(
    labels: np.ndarray, # (x, y, z) integer labels, 0 = outside
    features: Any, # (c, x, y, z) array or tensor, what should be uniform inside a segment
    n_segments: int, # how many to keep
    *,
    max_size: float | None = None, # no union gets larger than this [voxel]
) -> np.ndarray: # (x, y, z) ids 1...k in raster order; k > n_segments only if touching pairs or `max_size` run out
    "Merge the touching pairs that cost least until `n_segments` are left"
    labels = _checked_labels(labels, features, "merge_segments")
    n_segments, n = _count(n_segments, "merge_segments: n_segments"), int(labels.max())
    graph = _graph(labels, n, _feature_sums(features, labels, n))
    _ward(graph, n_segments, math.inf if max_size is None else max_size)
    return _renumber(labels, graph.root)

# %%
whole = enforce_connectivity(crumbs, smooth, min_size=20)
ten = merge_segments(whole, smooth, 10)
show((f"{_components(crumbs)[1]} pieces of 9 ids", crumbs), (f"{whole.max()} connected ids of 20 and more", whole),
     ("10 after merging", ten))

# %% [markdown]
# Repairing twice changes nothing, and merging keeps borders: each new segment is a union of old ones.

# %%
assert (enforce_connectivity(whole, smooth, min_size=20) == whole).all() and whole.dtype == np.int16
assert ten.max() == 10 == _components(ten.astype(np.int32))[1]
assert len(np.unique(whole.astype(int)*100 + ten)) == whole.max()

# %%
with raises(DataError, match="differ in their grid"): merge_segments(whole[1:], smooth, 10)
with raises(DataError, match="whole number >= 1"): merge_segments(whole, smooth, 0)
with raises(DataError, match="labels must not be negative"): enforce_connectivity(-whole, smooth, min_size=5)

# %% [markdown]
# ## From a coarse grid to a fine one
# Clustering is often done on a grid coarser than the image. `upsample_labels` repeats labels; the borders are then
# stairs. `refine_borders` lets every voxel with a different neighbour choose again among the ids next to it, by the
# distance of its own features to their means. Inner voxels never change, so no id gets lost, and crumbs cut off by the
# new borders join a neighbour.

# %%
#| export
def upsample_labels(
    labels: np.ndarray, # (x, y, z) labels on the coarse grid
    shape: Sequence[int], # size of the fine grid [voxel]
    stride: int | Sequence[int] | None = None, # that made the coarse grid; None: both grids cover the same box
) -> np.ndarray: # (x, y, z) same type, nearest label
    "Repeat labels on a finer grid"
    labels, shape = np.asarray(labels), _three(shape, "upsample_labels: shape")
    if labels.ndim != 3: raise DataError(f"upsample_labels: labels must be (x, y, z), got shape {labels.shape}")
    if stride is None:
        at = [np.minimum((2*np.arange(n) + 1)*m//(2*n), m - 1) for n, m in zip(shape, labels.shape)]
    else:
        stride = _three(stride, "upsample_labels: stride")
        if (want := tuple(-(-n//s) for n, s in zip(shape, stride))) != labels.shape:
            raise DataError(f"upsample_labels: {shape} with stride {stride} has the coarse grid {want}, "
                            f"got labels {labels.shape}")
        at = [np.arange(n)//s for n, s in zip(shape, stride)]
    return labels.take(at[2], 2).take(at[1], 1).take(at[0], 0)

# %%
#| export
_STEPS = [(axis, sign) for axis in range(3) for sign in (-1, 1)]

def _neighbour_ids(block: np.ndarray, at: np.ndarray) -> Iterator[np.ndarray]:
    "Ids of the six neighbours of flat positions; 0 beyond the block"
    strides = (block.shape[1]*block.shape[2], block.shape[2], 1)
    flat = block.ravel()
    for axis, sign in _STEPS:
        where = at//strides[axis] % block.shape[axis]
        edge = where == (0 if sign < 0 else block.shape[axis] - 1)
        yield np.where(edge, 0, flat[np.where(edge, 0, at + sign*strides[axis])])

def _borders(block: np.ndarray) -> np.ndarray:
    "Voxels > 0 with a neighbour of another id > 0"
    out = np.zeros(block.shape, bool)
    for axis in range(3):
        low, high = ((slice(None),)*axis + (s,) for s in (slice(None, -1), slice(1, None)))
        differ = (block[low] != block[high]) & (block[low] > 0) & (block[high] > 0)
        out[low] |= differ
        out[high] |= differ
    return out

def _gap(values: np.ndarray, means: np.ndarray, ids: np.ndarray) -> np.ndarray:
    "Squared distance of each voxel's features to the means of an id"
    return sum((v - m[ids])**2 for v, m in zip(values, means.T))

def refine_borders(
    labels: np.ndarray, # (x, y, z) ids, one connected piece each, 0 = outside
    features: Any, # (c, x, y, z) features or intensities on the same grid
) -> np.ndarray: # (x, y, z) same ids and type, one connected piece each
    "Voxels at borders choose again among the ids they touch, by features at full resolution"
    old, kind = _checked_labels(labels, features, "refine_borders"), np.asarray(labels).dtype
    n = int(old.max())
    old = old.astype(_id_type(n))
    means = (_feature_sums(features, old, n)/np.maximum(_sizes(old, n), 1)[:, None]).astype(np.float32)
    new = old.copy()
    inner = np.zeros(n + 1, bool) # ids with a voxel that stays
    slabs = []
    for s in _slabs(old):
        low = max(s.start - 1, 0)
        block, own = old[low:s.stop + 1], slice(s.start - low, s.stop - low)
        rim = _borders(block)[own]
        inner |= np.bincount(block[own][~rim], minlength=n + 1) > 0
        slabs.append((s, low, np.flatnonzero(rim)))
    for s, low, rim in slabs:
        block, skip = old[low:s.stop + 1], (s.start - low)*old[0].size
        own = block.ravel()[rim + skip]
        values = np.stack([_tensor(features[k, s], torch.device("cpu")).numpy().ravel()[rim]
                           for k in range(features.shape[0])])
        best, least = own, _gap(values, means, own)
        for ids in _neighbour_ids(block, rim + skip):
            other = np.where(ids > 0, _gap(values, means, ids), np.inf)
            best, least = np.where(other < least, ids, best), np.minimum(other, least)
        new[s].reshape(-1)[rim] = np.where(inner[own], best, own)
    del features, labels, old, slabs, block, values, rim # a scan's size each
    regions, owner, graph = _whole(new, means)
    return _looked_up(owner[graph.root].astype(kind), regions)

def _whole(labels: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray, _Graph]:
    "Pieces, the id each had, and their graph, where all but the largest of an id joined the closest one they touch"
    regions, n = _components(labels)
    flat = regions.ravel()
    starts = _run_starts(flat)
    owner = np.zeros(n + 1, np.int64)
    owner[flat[starts]] = labels.ravel()[starts]
    graph = _graph(regions, n, np.zeros((n + 1, means.shape[1])))
    graph.sums += means[owner]*graph.size[:, None]
    order = np.lexsort((-np.arange(n + 1), graph.size, owner))
    largest = np.zeros(n + 1, bool)
    largest[order[np.diff(owner[order], append=-1) != 0]] = True
    _absorb(graph, lambda _: ~largest)
    return regions, owner, graph

# %%
low = merge_segments(enforce_connectivity(crumbs[::3, ::3], smooth[:, ::3, ::3], min_size=4), smooth[:, ::3, ::3], 10)
stairs = upsample_labels(low, (48, 48, 1))
refined = refine_borders(stairs, smooth)
show(("repeated", stairs), ("refined", refined))

# %%
def error(lbl): return sum(np.var(f[lbl == k])*(lbl == k).sum() for k in range(1, 11) for f in smooth)

assert error(refined) < error(stairs) and _components(refined.astype(np.int32))[1] == 10
assert (upsample_labels(low, (47, 46, 1), (3, 3, 1)) == stairs[:47, :46]).all()
error(stairs), error(refined)

# %%
with raises(DataError, match="has the coarse grid"): upsample_labels(low, (60, 48, 1), 3)

# %% [markdown]
# ## What it costs
# A million voxels with two thousand regions:

# %%
large = np.arange(2000).reshape(20, 10, 10).repeat(5, 0).repeat(10, 1).repeat(10, 2) + 1
noise = rng.standard_normal((2, *large.shape), dtype=np.float32)
start = time.perf_counter()
merged = merge_segments(large, noise, 400)
round(time.perf_counter() - start, 2)

# %%
assert merged.max() == 400 and _components(merged.astype(np.int32))[1] == 400
