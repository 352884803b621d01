# %% [markdown]
# # Stable points
#
# > A single nearest neighbour may be wrong; the points around it that find their way home say where it should be.
#
# Go from a voxel to its nearest neighbour in the other scan, from there back, and again. After a few hops most chains
# stop moving: they have reached a *fixed point*, a pair of voxels that are each other's nearest neighbours. Such pairs
# are rarely wrong. SAM++ (Bai et al., *SAM++: Enhancing Anatomic Matching using Semantic Information and Structural
# Inference*, 2023) takes the voxels around a point, lets each of them hop, and fits an affine map to the fixed points;
# the match is where the map puts the point.
#
# The reference fails where there is nothing to fit: no survivors give NaN, fewer than four or coplanar points an
# exception. And its limits, 1.3 for a score that cannot exceed 1, keep nothing. Here every case has a result and a
# name.

# %%
#| default_exp embed.cycle

# %%
#| export
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medvol_nb.core import DataError
from medvol_nb.embed.search import Side, hop

# %%
import torch

from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises, rng_for
from medvol_nb.embed.search import make_side
from medvol_nb.embed.store import position_embedding
from medvol_nb.geometry import Volume, affine_from

# %% [markdown]
# ## A fit that ignores what does not fit
# Least squares would follow the wrong pairs. Weights $w = (1 - (r/4.7s)^2)^2$ of Tukey let pairs with large residual
# $r$ drop out; the scale $s$ is 1.48 times the median residual, never below a millimetre, since positions come from a
# 4 mm grid. The start is the median shift, which wrong pairs do not spoil while they are fewer than half. The nine
# numbers of a linear map need points that extend in all directions; where the thinnest extent is below a limit, only
# the shift is fitted.

# %%
#| export
def _tukey(residual: np.ndarray, floor: float) -> np.ndarray:
    "Weights (n) of residuals [mm]"
    scale = max(1.4826*float(np.median(residual)), floor)
    return np.clip(1 - (residual/(4.685*scale))**2, 0, None)**2

def robust_affine(
    q: np.ndarray, # (n, 3) points [mm]
    k: np.ndarray, # (n, 3) their partners [mm]
    *,
    floor_mm: float = 1.0, # residuals below it are noise [mm]
    least_extent_mm: float = 1.5, # standard deviation of the points in their thinnest direction, at least [mm]
    steps: int = 20, # of reweighting
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]: # (3, 3) and (3,) of k = A q + b, weights (n), condition number
    "Affine map through pairs of which many may be wrong; a shift where the points do not determine more"
    weights = _tukey(np.linalg.norm(k - q - np.median(k - q, axis=0), axis=1), floor_mm)
    extents = np.zeros(3)
    for _ in range(steps):
        total = weights.sum()
        if total < 1e-9: weights, total = np.ones(len(q)), float(len(q))
        mq, mk = weights @ q/total, weights @ k/total
        x, y, w = q - mq, k - mk, np.sqrt(weights)[:, None]
        extents = np.linalg.svd(w*x, compute_uv=False)/np.sqrt(total) if len(q) > 3 else np.zeros(3)
        full = (weights > 0.05).sum() > 4 and extents[-1] >= least_extent_mm
        a = np.linalg.lstsq(w*x, w*y, rcond=None)[0].T if full else np.eye(3)
        b = mk - a @ mq
        new = _tukey(np.linalg.norm(k - q @ a.T - b, axis=1), floor_mm)
        if np.abs(new - weights).max() < 1e-4: break
        weights = new
    return a, b, weights, float(extents[0]/extents[-1]) if full else np.inf

# %%
rng = rng_for(0, "pairs")
q = rng.uniform(-10, 10, (60, 3))
true_map = np.array([[1.1, 0.1, 0], [-0.1, 0.95, 0.05], [0, 0, 1.02]])
k = q @ true_map.T + [40, -5, 12] + rng.normal(0, 0.5, q.shape)
k[:18] += rng.normal(0, 60, (18, 3))
A, b, w, _ = robust_affine(q, k)
plain = np.linalg.lstsq(np.column_stack([q, np.ones(60)]), k, rcond=None)[0][-1]
errors = {"least squares": np.linalg.norm(plain - [40, -5, 12]), "robust": np.linalg.norm(b - [40, -5, 12])}
plot.bars(errors, "mm at the origin, 30 % of the pairs wrong")

# %%
assert errors["robust"] < 0.6 and close(A, true_map, 0.1) and w[:18].max() < 0.2
flat = q*[1, 1, 0]
A, b, _, condition = robust_affine(flat, flat + [3, 4, 5])
assert close(A, np.eye(3), 0) and close(b, [3, 4, 5], 1e-9) and condition == np.inf

# %% [markdown]
# ## From voxels around a point to its match
# For all points at once, voxels that several cubes share hop only once. The ends are taken between voxels, so that the
# 4 mm grid does not show in the result. A chain counts if its last hop led back to where it was a round ago, ends
# within reach of the point, and has the score that was asked for. Pairs with the same end count once.

# %%
#| export
@dataclass(eq=False)
class FixedPoints:
    "What the stable points around each point say"
    matched: np.ndarray # (n, 3) float64 in the other scan, RAS+ [mm]; meaningless where kind is 'nn_fallback'
    score: np.ndarray # (n) float64, mean score of the points that fit
    residual: np.ndarray # (n) float64, weighted misfit [mm]; -1 without
    used: np.ndarray # (n) int, pairs that were fitted
    condition: np.ndarray # (n) float64, longest extent of the points over the shortest; inf for a shift
    kind: np.ndarray # (n) str: 'ok', 'translation' or 'nn_fallback'

def _cubes(at: np.ndarray, size: tuple[int, ...], cube: int) -> tuple[np.ndarray, list[np.ndarray]]:
    "Distinct voxels (m, 3) of the cubes around positions, and which of them belong to each"
    step = np.stack(np.meshgrid(*[np.arange(-cube, cube + 1)]*3, indexing="ij"), -1).reshape(-1, 3)
    all_nodes = np.clip(np.rint(at).astype(np.int64)[:, None] + step, 0, np.array(size) - 1)
    flat = np.ravel_multi_index(tuple(np.moveaxis(all_nodes, -1, 0)), size)
    unique = np.unique(flat)
    return np.stack(np.unravel_index(unique, size), 1), [np.searchsorted(unique, np.unique(f)) for f in flat]

def fixed_points(
    q: Side, # scan the points are in
    k: Side, # scan they are looked for in
    points_mm: np.ndarray, # (n, 3) RAS+ [mm]
    *,
    cube: int = 1, # voxels around the point on each side: 1 gives 27, 2 gives 125
    reach_mm: float = 100.0, # farthest stable point that is used [mm]
    min_score: float | None = None, # mean cosine of pairs that are used, at least
    pairs: Literal["stable", "all"] = "stable", # 'all': also chains that still move, as in the reference
) -> FixedPoints: # one for each point
    "Match points through the stable pairs of voxels around them"
    if cube < 0 or cube > 5: raise DataError(f"cube: must be 0...5, got {cube}")
    if not reach_mm > 0: raise DataError(f"reach_mm: must be > 0, got {reach_mm}")
    if pairs not in ("stable", "all"): raise DataError(f"pairs: must be stable or all, got {pairs!r}")
    n = len(points_mm)
    out = FixedPoints(np.zeros((n, 3)), np.full(n, -1.0), np.full(n, -1.0), np.zeros(n, int), np.full(n, np.inf),
                      np.full(n, "nn_fallback", "U16"))
    if not n: return out
    nodes, members = _cubes(q.emb.fine.to_index(points_mm), q.shape, cube)
    first, score_1, _ = hop(q, k, nodes)
    home, score_2, _ = hop(k, q, first)
    last, score_3, place = hop(q, k, home)
    end, score, _ = hop(k, q, last)
    fine = np.minimum.reduce([score_1, score_2, score_3, score]) > -1
    if pairs == "stable": fine &= (end == home).all(1)
    if min_score is not None: fine &= score >= min_score
    q_mm, k_mm = q.emb.fine.to_world(end), k.emb.fine.to_world(place)
    corners = k.emb.fine.to_index
    for i, (p, own) in enumerate(zip(points_mm, members)):
        keep = own[fine[own] & (np.linalg.norm(q_mm[own] - p, axis=1) < reach_mm)]
        _, once = np.unique(last[keep], axis=0, return_index=True)
        keep = keep[once]
        if not len(keep): continue
        a, b, w, out.condition[i] = robust_affine(q_mm[keep], k_mm[keep])
        if w.sum() < 1e-6: w = np.ones(len(keep))
        misfit = np.linalg.norm(k_mm[keep] - q_mm[keep] @ a.T - b, axis=1)
        inside = np.clip(corners((a @ p + b)[None]), -0.5, np.array(k.shape) - 0.5)
        out.matched[i] = k.emb.fine.to_world(inside)[0]
        out.score[i], out.residual[i] = np.average(score[keep], weights=w), np.sqrt(np.average(misfit**2, weights=w))
        out.used[i], out.kind[i] = len(keep), "ok" if np.isfinite(out.condition[i]) else "translation"
    return out

# %% [markdown]
# A known pair, of which a fifth of the voxels have been made to look like voxels elsewhere. One nearest neighbour in
# five is far off; the stable points are not.

# %%
body = phantoms.abdomen((36, 28, 32), seed=1)
scan = Volume(body.img, affine_from((5.0, 5.0, 6.0)))
def there(p): return p*[1.08, 0.95, 1.0] + [10, 5, -4]
def back(p): return (p - [10, 5, -4])/[1.08, 0.95, 1.0]
first, second = position_embedding(scan), position_embedding(scan, back)
wrong = rng.random(first.fine.shape) < 0.2
vectors = first.maps["fine"].copy()
vectors[:, wrong] = vectors[:, wrong][:, rng.permutation(wrong.sum())]
spoiled = position_embedding(scan)
spoiled.maps["fine"][:] = vectors
a, b = (make_side(e, ("fine",), torch.device("cpu")) for e in (spoiled, second))
pts = first.fine.to_world(rng.uniform(0.3, 0.7, (25, 3))*(np.array(first.fine.shape) - 1))
found = fixed_points(a, b, pts)
single, *_ = hop(a, b, np.rint(first.fine.to_index(pts)).astype(int))
off = {"nearest neighbour": np.linalg.norm(second.fine.to_world(single) - there(pts), axis=1),
       "stable points": np.linalg.norm(found.matched - there(pts), axis=1)}
plot.bars({k: v.max() for k, v in off.items()}, "mm, largest error of 25 points", log=True)

# %%
assert off["stable points"].max() < 2 and off["nearest neighbour"].max() > 10 and (found.kind == "ok").all()
assert (found.residual >= 0).all() and (found.used > 4).all()

# %% [markdown]
# What cannot be fitted has a name: nothing within reach, and a single voxel, which gives a shift.

# %%
far = fixed_points(a, b, pts[:2], reach_mm=1e-3)
alone = fixed_points(a, b, pts[:2], cube=0)
far.kind.tolist(), alone.kind.tolist()

# %%
assert set(far.kind) == {"nn_fallback"} and np.isfinite(far.matched).all() and (far.residual == -1).all()
assert set(alone.kind) == {"translation"}
with raises(DataError, match="cube: must be 0...5, got 9"): fixed_points(a, b, pts, cube=9)
