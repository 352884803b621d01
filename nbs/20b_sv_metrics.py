# %% [markdown]
# # Measuring supervoxels
#
# > How well segments follow known organs, how compact, uniform, connected and stable they are.
#
# Any partition follows organs perfectly if its segments are small enough, so no single number says whether supervoxels
# are good, and numbers at different counts say nothing at all. This page computes the usual set: overlap with a known
# truth, recall of its borders, and properties that need no truth. Compare partitions **at equal count** (within 5 %).
# Definitions follow Stutz, Hermans and Leibe 2018 ("Superpixels: an evaluation of the state-of-the-art"), with faces
# and volumes in physical units.

# %%
#| default_exp sv_metrics

# %%
#| export
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medvol_nb.core import DataError, rng_for

# %%
import matplotlib.pyplot as plt

from medvol_nb.core import close, raises
from medvol_nb.phantoms import organ_features, organs
from medvol_nb.slic import slic3d

# %% [markdown]
# ## Overlap with a truth
# With $M_{ij}$ voxels shared by segment $i$ and true region $j$ (its background is a region, too), and $N$ the voxels
# of all segments: the *achievable segmentation accuracy* gives each segment to its best region,
# $\sum_i \max_j M_{ij}/N$.
# The *undersegmentation error* (Neubert and Protzel 2012) charges what leaks over a border, the smaller side each
# time: $\sum_i\sum_{j: M_{ij}>0}\min(M_{ij}, |S_i| - M_{ij})/N$. Id 0 is outside and does not count.

# %%
#| export
def _labels(values: Any, what: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 3 or values.dtype.kind not in "iub" or not values.size:
        raise DataError(f"{what} must be whole numbers (x, y, z), got {values.dtype} {values.shape}")
    if shape is not None and values.shape != shape:
        raise DataError(f"{what} and labels differ in their grid: {values.shape} and {shape}")
    if values.min() < 0: raise DataError(f"{what} must not be negative, got {values.min()}")
    return values.astype(np.int64)

def contingency(
    labels: np.ndarray, # (x, y, z) segment ids
    truth: np.ndarray, # (x, y, z) ids of true regions, 0 is one of them
) -> np.ndarray: # (segments + 1, regions + 1) int64 voxels shared
    "How many voxels each segment shares with each true region"
    labels = _labels(labels, "contingency: labels")
    truth = _labels(truth, "contingency: truth", labels.shape)
    rows, columns = int(labels.max()) + 1, int(truth.max()) + 1
    if rows*columns > 2**28: raise DataError(f"contingency: {rows} x {columns} ids are too many. Renumber them")
    return np.bincount((labels*columns + truth).ravel(), minlength=rows*columns).reshape(rows, columns)

def _overlap(shared: np.ndarray) -> tuple[float, float]:
    "ASA and UE of a contingency table"
    shared = shared[1:]
    size, n = shared.sum(1, keepdims=True), max(int(shared.sum()), 1)
    return float(shared.max(1).sum()/n), float(np.where(shared > 0, np.minimum(shared, size - shared), 0).sum()/n)

# %%
truth = np.repeat([0, 1], 8)[:, None, None]*np.ones((16, 4, 4), int)
halves, off_by_two = truth + 1, np.repeat([1, 2], (10, 6))[:, None, None]*np.ones((16, 4, 4), int)
[_overlap(contingency(s, truth)) for s in (halves, off_by_two)]

# %% [markdown]
# Two of ten layers of the first segment lie on the wrong side: 2/16 are lost, and charged twice, once for each region
# that the segment touches.

# %%
assert _overlap(contingency(halves, truth)) == (1, 0)
assert _overlap(contingency(off_by_two, truth)) == (14/16, 4/16)
with raises(DataError, match="differ in their grid"): contingency(halves, truth[1:])

# %% [markdown]
# ## Borders
# A border voxel has a 6-neighbour of another id. *Boundary recall* is the share of true border voxels with a segment
# border within a tolerance, in voxels or in mm; *precision* is the reverse.

# %%
#| export
def border_voxels(
    labels: np.ndarray, # (x, y, z) ids
) -> np.ndarray: # (x, y, z) bool
    "Voxels with a 6-neighbour of another id"
    out = np.zeros(labels.shape, bool)
    for axis in range(3):
        low, high = ((slice(None),)*axis + (s,) for s in (slice(None, -1), slice(1, None)))
        differ = labels[low] != labels[high]
        out[low] |= differ
        out[high] |= differ
    return out

def _near(of: np.ndarray, to: np.ndarray, tolerance: float, spacing: Sequence[float]) -> float:
    "Share of the voxels `of` that have a voxel of `to` within the tolerance; nothing to find is found"
    import edt
    if not of.any(): return 1.0
    if not to.any(): return 0.0
    distance = edt.edt(np.ascontiguousarray(~to, np.uint8), anisotropy=tuple(spacing), black_border=False)
    return float((distance[of] <= tolerance*(1 + 1e-6)).mean())

# %%
edges = border_voxels(truth), border_voxels(off_by_two)
[_near(*edges, t, (1, 1, 1)) for t in (0.5, 1, 2)], _near(*edges, 2, (3, 1, 1))

# %% [markdown]
# The border has two layers of voxels, 7 and 8; the other one, two voxels further, 9 and 10. Layer 8 is one voxel from
# it, layer 7 two.

# %%
assert [_near(*edges, t, (1, 1, 1)) for t in (0.5, 1, 2)] == [0, 0.5, 1] and _near(*edges, 2, (3, 1, 1)) == 0

# %% [markdown]
# ## Shape and size of each segment
# The table of segments needs no truth: size, centre and extent. Extent is the full width of a box with the same
# standard deviation along each axis, $\sqrt{12}\,\sigma$, which a few stray voxels do not change.

# %%
#| export
def segment_table(
    labels: np.ndarray, # (x, y, z) ids, 0 = outside
    spacing: Sequence[float] = (1.0, 1.0, 1.0), # voxel size (x, y, z) [mm]
) -> dict[str, np.ndarray]: # 'id', 'voxels', 'ml' (k); 'centre' (k, 3) [voxel]; 'extent' (k, 3) [mm]
    "Size, centre and extent of every segment"
    labels, spacing = _labels(labels, "segment_table: labels"), np.array(spacing, float)
    voxels = np.bincount(labels.ravel())
    ids = np.flatnonzero(voxels)
    ids = ids[ids > 0]
    k, centre, spread = len(voxels), [], []
    for axis, n in enumerate(labels.shape):
        along = np.moveaxis(labels, axis, 0).reshape(n, -1)
        at = np.broadcast_to(np.arange(n, dtype=float)[:, None], along.shape)
        mean = np.bincount(along.ravel(), at.ravel(), k)[ids]/voxels[ids]
        square = np.bincount(along.ravel(), (at**2).ravel(), k)[ids]/voxels[ids]
        centre.append(mean)
        spread.append(np.sqrt(12*np.maximum(square - mean**2, 0) + 1)) # + 1: a single voxel is one voxel wide
    return {"id": ids, "voxels": voxels[ids], "ml": voxels[ids]*spacing.prod()/1000,
            "centre": np.stack(centre, 1).reshape(-1, 3), "extent": np.stack(spread, 1).reshape(-1, 3)*spacing}

# %%
segment_table(off_by_two, (1, 2, 2))

# %%
assert close(segment_table(off_by_two, (1, 2, 2))["extent"], [[10, 8, 8], [6, 8, 8]])

# %% [markdown]
# Compactness compares the surface, counted in faces, with that of a ball of the same volume,
# $\sum_i \frac{|S_i|}{N}\,36\pi V_i^2/A_i^3$. A cube reaches $\pi/6$. Explained variation is the share of the variance
# of an image, or of features, that remains when each voxel is replaced by its segment's mean.

# %%
#| export
def _areas(labels: np.ndarray, k: int, spacing: np.ndarray) -> np.ndarray:
    "(k) surface of each id as the sum of its faces [mm^2]"
    out = np.zeros(k)
    for axis in range(3):
        low, high = ((slice(None),)*axis + (s,) for s in (slice(None, -1), slice(1, None)))
        differ = labels[low] != labels[high]
        ends = np.concatenate([labels.take(0, axis).ravel(), labels.take(-1, axis).ravel()])
        faces = sum(np.bincount(ids, minlength=k) for ids in (labels[low][differ], labels[high][differ], ends))
        out += faces*spacing.prod()/spacing[axis]
    return out

def _explained(labels: np.ndarray, voxels: np.ndarray, values: np.ndarray) -> float:
    "Share of the variance between segments"
    x, ids = values[labels > 0].astype(float), labels[labels > 0]
    if not len(x): return math.nan
    x -= x.mean()
    total = float((x**2).sum())
    sums = np.bincount(ids, x, len(voxels))
    return float((sums[voxels > 0]**2/voxels[voxels > 0]).sum()/total) if total > 0 else 1.0

# %%
cube = np.zeros((10, 10, 10), int)
cube[2:8, 2:8, 2:8] = 1
area = _areas(cube, 2, np.ones(3))[1]
area, 36*np.pi*cube.sum()**2/area**3, _explained(off_by_two, np.bincount(off_by_two.ravel()), truth)

# %%
assert area == 216 and close(36*np.pi*cube.sum()**2/area**3, np.pi/6)
assert _explained(halves, np.bincount(halves.ravel()), truth) == 1

# %% [markdown]
# ## All of them
# `disconnected` counts ids with more than one six-connected piece and should be 0.

# %%
#| export
def supervoxel_metrics(
    labels: np.ndarray, # (x, y, z) ids, 0 = outside
    truth: np.ndarray | None = None, # (x, y, z) ids of true regions, 0 is one of them; None: only what needs no truth
    spacing: Sequence[float] = (1.0, 1.0, 1.0), # voxel size (x, y, z) [mm]
    *,
    tolerance: float = 2.0, # of borders [voxel]
    tolerance_mm: float = 3.0, # of borders [mm]
    image: np.ndarray | None = None, # (x, y, z) intensities, for `ev_image`
    features: Any = None, # (c, x, y, z), for `ev_features`, the mean over channels
) -> dict[str, float | int]: # k, disconnected, size_ml_*, co; with a truth asa, ue, br, bp, br_mm, bp_mm; ev_*
    "Quality of a partition; compare only at equal `k`"
    import cc3d
    labels, spacing = _labels(labels, "supervoxel_metrics: labels"), np.array(spacing, float)
    if spacing.shape != (3,) or not (spacing > 0).all():
        raise DataError(f"supervoxel_metrics: spacing must be three positive numbers [mm], got {spacing.tolist()}")
    voxels = np.bincount(labels.ravel())
    voxels[0] = 0
    ids, n = np.flatnonzero(voxels), max(int(voxels.sum()), 1)
    ml = voxels[ids]*spacing.prod()/1000
    pieces, count = cc3d.connected_components(labels.astype(np.int32), connectivity=6, return_N=True)
    owner = np.zeros(count + 1, np.int64)
    owner[pieces.ravel()] = labels.ravel()
    volume, area = voxels[ids]*spacing.prod(), _areas(labels, len(voxels), spacing)[ids]
    out = {"k": len(ids), "disconnected": int((np.bincount(owner[1:], minlength=1)[1:] > 1).sum()),
           **{f"size_ml_{name}": float(f(ml)) if len(ml) else math.nan for name, f in
              (("min", np.min), ("median", np.median), ("max", np.max), ("cv", lambda v: v.std()/v.mean()))},
           "co": float((voxels[ids]/n*36*math.pi*volume**2/area**3).sum())}
    if truth is not None:
        truth = _labels(truth, "supervoxel_metrics: truth", labels.shape)
        out["asa"], out["ue"] = _overlap(contingency(labels, truth))
        true, found = border_voxels(truth), border_voxels(labels)
        for suffix, limit, size in (("", tolerance, (1, 1, 1)), ("_mm", tolerance_mm, spacing)):
            out["br" + suffix] = _near(true, found, limit, size)
            out["bp" + suffix] = _near(found, true, limit, size)
    if image is not None:
        if (image := np.asarray(image)).shape != labels.shape:
            raise DataError(f"supervoxel_metrics: image {image.shape} and labels {labels.shape} differ in their grid")
        out["ev_image"] = _explained(labels, voxels, image)
    if features is not None:
        if tuple(features.shape[1:]) != labels.shape:
            raise DataError(f"supervoxel_metrics: features {tuple(features.shape)} must be (c, *{labels.shape})")
        out["ev_features"] = float(np.mean([_explained(labels, voxels, np.asarray(f)) for f in features]))
    return out

# %%
body = organs((40, 40, 40))
features = organ_features(body.img)
parts = slic3d(features, 120, spacing=body.spacing)
measures = supervoxel_metrics(parts, body.lbl, body.spacing, image=body.img, features=features)
{k: round(v, 3) for k, v in measures.items()}

# %% [markdown]
# More segments always look better. The curve, not a point on it, describes a method.

# %%
counts = (25, 50, 100, 200, 400)
scores = [supervoxel_metrics(slic3d(features, k, spacing=body.spacing), body.lbl, body.spacing) for k in counts]
fig, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
for name in ("asa", "ue", "br"): ax.plot(counts, [s[name] for s in scores], "o-", label=name)
ax.set(xscale="log", xlabel="number of supervoxels", title="the same volume, from 25 to 400 supervoxels")
ax.legend(fontsize=8);

# %%
assert [s["k"] for s in scores] == list(counts) and all(s["disconnected"] == 0 for s in scores)
assert scores[-1]["asa"] > scores[0]["asa"] and scores[-1]["ue"] < scores[0]["ue"]
with raises(DataError, match="three positive numbers"): supervoxel_metrics(parts, spacing=(1, 1, 0))

# %% [markdown]
# ## Stability
# A partition that changes when the scan moves by a voxel says little about the anatomy. For each segment, the best
# Dice overlap with a segment of the other partition; the mean over segments.

# %%
#| export
def best_dice(
    a: np.ndarray, # (x, y, z) ids, 0 = outside
    b: np.ndarray, # (x, y, z) ids, 0 = outside
) -> float: # [0, 1]; 1: the same partition, whatever the numbers
    "Mean over the segments of `a` of the best Dice with a segment of `b`"
    a, b = (_labels(v, "best_dice: labels") for v in (a, b))
    if a.shape != b.shape: raise DataError(f"best_dice: the partitions differ in their grid: {a.shape} and {b.shape}")
    sizes, others, n = np.bincount(a.ravel()), np.bincount(b.ravel()), int(b.max()) + 1
    codes, shared = np.unique((a*n + b)[(a > 0) & (b > 0)], return_counts=True)
    i, j = np.divmod(codes, n)
    best = np.zeros(len(sizes))
    np.maximum.at(best, i, 2*shared/(sizes[i] + others[j]))
    real = sizes[1:] > 0
    return float(best[1:][real].mean()) if real.any() else 1.0

def stability(
    cluster: Callable[[np.ndarray], np.ndarray], # from features (c, x, y, z) to labels (x, y, z)
    features: np.ndarray, # (c, x, y, z)
    seed: int = 0, # of the noise
) -> dict[str, float]: # 'shift' and 'noise', in [0, 1]
    "How much of a partition survives a shift by one voxel, and noise of 1 % of each channel's standard deviation"
    features = np.asarray(features)
    if features.ndim != 4: raise DataError(f"stability: features must be (c, x, y, z), got shape {features.shape}")
    base, move = cluster(features), tuple(slice(1 if n > 1 else 0, None) for n in features.shape[1:])
    noise = rng_for(seed, "stability").standard_normal(features.shape, dtype=np.float32)
    noise *= np.float32(0.01)*features.std((1, 2, 3), keepdims=True)
    return {"shift": best_dice(base[move], cluster(features[:, *move])),
            "noise": best_dice(base, cluster(features + noise))}

# %%
stable = stability(lambda f: slic3d(f, 60), features)
assert best_dice(parts, parts.max() + 1 - parts) == 1 and 0.5 < min(stable.values()) <= 1
stable

# %%
with raises(DataError, match="differ in their grid"): best_dice(parts, parts[1:])
