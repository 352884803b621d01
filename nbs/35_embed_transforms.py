# %% [markdown]
# # Transforms
#
# > A robust transform out of matched points, displacement fields in millimetres, and the files other tools read.
#
# Matching gives pairs of points, and some of them are wrong. A least-squares fit takes every pair at its word: with
# 20 % wrong pairs the reference's rigid fit is off by 14 mm at the corners of the body
# ([SAM embeddings](https://arxiv.org/abs/2012.02383) were registered with exactly that fit). It also allows no change
# of scale, which alone leaves 11 mm between people of different size. The fit of this page chooses by vote, weighs by
# residual, and says how much it can be trusted. Deformations follow: a field of displacements on a grid with its place
# in the world, so that points, inverse, folding report and other programs' files need no knowledge of voxels. All
# positions are world coordinates, RAS+, in mm. A transform maps a point of the *fixed* image to the place in the
# *moving* image where its value comes from, as in ITK.

# %%
#| default_exp embed.transforms

# %%
#| export
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import DataError, FormatError, MissingFile, OnExists, atomic, check_output, optional, rng_for
from medvol_nb.geometry import Volume, affine_from, to_axes, to_index, to_world
from medvol_nb.nifti import read_nifti

# %%
from scipy.spatial.transform import Rotation

from medvol_nb import phantoms
from medvol_nb.core import close, raises, tmpdir
from medvol_nb.plot import curves, montage

# %% [markdown]
# ## Least squares, three ways
# Rigid and similarity fits are the closed solution of Kabsch and Umeyama (1991): with centred points, $H = \sum w\,
# q\,k^\top = U S V^\top$ and $R = V\,\mathrm{diag}(1, 1, \det VU^\top)\,U^\top$; the scale is the ratio of
# $\mathrm{tr}(S)$ to the spread of $q$. The affine fit is linear. All take a stack of problems, which the vote below
# needs.

# %%
#| export
Model = Literal["translation", "rigid", "similarity", "affine"]
_NEEDED = {"translation": 1, "rigid": 3, "similarity": 3, "affine": 4} # points that determine a model

def fit_points(
    q_mm: np.ndarray, # (..., n, 3) points of the fixed image [mm]
    k_mm: np.ndarray, # (..., n, 3) their matches in the moving image [mm]
    weights: np.ndarray, # (..., n) >= 0
    model: Model = "affine", # how much may change
) -> np.ndarray: # (..., 4, 4) float64, q -> k [mm]
    "Weighted least-squares transform of point pairs, for one problem or a stack of them"
    w = (weights/weights.sum(axis=-1, keepdims=True))[..., None]
    qc, kc = (w*q_mm).sum(axis=-2), (w*k_mm).sum(axis=-2)
    q, k = q_mm - qc[..., None, :], k_mm - kc[..., None, :]
    wq = w*q
    cross = np.swapaxes(wq, -1, -2) @ k
    if model == "affine":
        spread = np.swapaxes(wq, -1, -2) @ q
        ridge = 1e-9*np.trace(spread, axis1=-2, axis2=-1)[..., None, None]*np.eye(3) + 1e-12*np.eye(3)
        linear = np.swapaxes(np.linalg.solve(spread + ridge, cross), -1, -2)
    elif model == "translation": linear = np.broadcast_to(np.eye(3), cross.shape)
    else:
        u, s, vt = np.linalg.svd(cross)
        flip = np.ones(s.shape)
        flip[..., 2] = np.sign(np.linalg.det(u)*np.linalg.det(vt))
        linear = np.swapaxes(vt, -1, -2)*flip[..., None, :] @ np.swapaxes(u, -1, -2)
        if model == "similarity":
            linear = linear*((s*flip).sum(axis=-1)/np.maximum((wq*q).sum(axis=(-1, -2)), 1e-12))[..., None, None]
    out = np.zeros((*cross.shape[:-2], 4, 4))
    out[..., :3, :3], out[..., 3, 3] = linear, 1
    out[..., :3, 3] = kc - (linear @ qc[..., None])[..., 0]
    return out

# %%
def placed(angles=(0, 0, 0), shift=(0, 0, 0), scale=1.0):
    m = np.eye(4)
    m[:3, :3], m[:3, 3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()*scale, shift
    return m

rng = rng_for(0, "lesson")
q = rng.uniform(-1, 1, (50, 3))*(150, 120, 200)
truth = placed((5, -8, 12), (10, -30, 25), 1.08)
fit_points(q, to_world(truth, q), np.ones(50), "similarity").round(3)

# %%
for model in ("similarity", "affine"): assert close(fit_points(q, to_world(truth, q), np.ones(50), model), truth, 1e-6)
mirrored = fit_points(q, q*(-1, 1, 1), np.ones(50), "rigid")
assert close(np.linalg.det(mirrored[:3, :3]), 1.0, 1e-9)

# %% [markdown]
# ## Robust estimation
# First a vote (RANSAC): the transform of three random pairs, many times over; the one under which most weight lies
# within the limit wins. Three pairs of a similarity are far likelier to be all correct than four of an affine, so the
# vote is always about a similarity (or a rigid transform) and at twice the limit, and the affine comes after. Then
# reweighting: each pair counts $\bigl(\sigma^2/(\sigma^2+r^2)\bigr)^2$ for its residual $r$ (Geman and McClure), with
# $\sigma$ shrinking from twice the limit to the limit. A wrong pair 100 mm away weighs a ten-thousandth.
#
# What can go wrong is part of the answer, not an exception: too few pairs that agree give `status="failed"` and the
# reason; pairs in one plane or on one line determine less than was asked for, so the model is reduced and the status
# says so. Pairs that agree on a mirror image fail too: no body is one, but a file with a wrong affine is.

# %%
#| export
@dataclass(frozen=True)
class Estimate:
    "A transform from matched points, and how far to trust it"
    status: str # 'ok', 'reduced' (a simpler model, see `reason`) or 'failed'
    matrix: np.ndarray # (4, 4) float64, fixed -> moving [mm]; identity if failed
    model: str # the model that was fitted
    inliers: np.ndarray # (n,) bool, residual within the limit
    residuals: np.ndarray # (n,) float64 [mm]
    inlier_fraction: float # [0, 1]
    rms: float # of the inliers' residuals [mm]; infinite if failed
    condition: float # longest by shortest extent of the inliers; infinite if they lie in a plane
    reason: str = "" # why it is not 'ok'

def _score(matrices: np.ndarray, q: np.ndarray, k: np.ndarray, w: np.ndarray, limit: float) -> np.ndarray:
    "Weight within the limit of each transform, (m,); residuals near 0 count a little more"
    moved = q @ np.swapaxes(matrices[:, :3, :3], 1, 2) + matrices[:, None, :3, 3]
    r2 = ((moved - k)**2).sum(axis=2)/limit**2
    return (w*np.maximum(1 - r2, 0)).sum(axis=1)

def _extent(q: np.ndarray) -> np.ndarray:
    "Root mean square extents of points along their principal axes, descending"
    return np.linalg.svd(q - q.mean(axis=0), compute_uv=False)/np.sqrt(len(q))

def _checked_pairs(q_mm: Any, k_mm: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k = np.asarray(q_mm, np.float64), np.asarray(k_mm, np.float64)
    if q.ndim != 2 or q.shape[1:] != (3,) or q.shape != k.shape:
        raise DataError(f"matched points: two arrays of the same shape (n, 3) are needed, got {q.shape} and {k.shape}")
    w = np.ones(len(q)) if weights is None else np.asarray(weights, np.float64)
    if w.shape != (len(q),): raise DataError(f"weights: one for each of the {len(q)} points is needed, got {w.shape}")
    return q, k, np.where(np.isfinite(q).all(1) & np.isfinite(k).all(1) & np.isfinite(w), np.maximum(w, 0), 0)

# %%
#| export
def estimate_transform(
    q_mm: np.ndarray, # (n, 3) points of the fixed image, RAS+ [mm]
    k_mm: np.ndarray, # (n, 3) their matches in the moving image, RAS+ [mm]; rows with NaN do not count
    weights: np.ndarray | None = None, # (n,) >= 0, such as score times mutual-match flag
    model: Model = "affine", # "translation", "rigid", "similarity" or "affine"
    inlier_mm: float = 10.0, # a pair farther off than this is wrong [mm]
    *,
    min_inliers: int = 8, # fewer agreeing pairs are a failure; pairs that determine the model are the least
    trials: int = 1000, # votes
    seed: int = 0, # of the votes
) -> Estimate: # status, matrix, residuals, inliers
    "Transform that most of the matched points agree on"
    q, k, w = _checked_pairs(q_mm, k_mm, weights)
    if model not in _NEEDED: raise DataError(f"model: must be one of {', '.join(_NEEDED)}, got {model!r}")
    if not inlier_mm > 0: raise DataError(f"inlier_mm: must be > 0, got {inlier_mm}")
    use, n = np.flatnonzero(w > 0), len(q)
    failed = lambda why: Estimate("failed", np.eye(4), model, np.zeros(n, bool), np.full(n, np.inf), 0.0, np.inf,
                                  np.inf, why)
    least = max(min_inliers, _NEEDED[model])
    if len(use) < least: return failed(f"{len(use)} usable pairs, at least {least} are needed")
    p, m, v = q[use], k[use], w[use]
    simple = {"affine": "similarity"}.get(model, model)
    drawn = rng_for(seed, "ransac").random((trials, len(use)))
    picks = np.argpartition(drawn, _NEEDED[simple] - 1, axis=1)[:, :_NEEDED[simple]]
    votes = fit_points(p[picks], m[picks], np.ones(picks.shape), simple)
    blocks = np.array_split(votes, max(1, trials*len(use)//2_000_000))
    matrix = votes[np.concatenate([_score(b, p, m, v, 2*inlier_mm) for b in blocks]).argmax()]
    used, note = simple, ""
    for step, limit in enumerate(np.geomspace(2*inlier_mm, inlier_mm, 12)):
        r = np.linalg.norm(to_world(matrix, p) - m, axis=1)
        good = r < 1.5*limit
        if good.sum() < least: return failed(f"{good.sum()} of {len(use)} pairs agree, at least {least} are needed")
        size = _extent(p[good])
        if step >= 3: # the affine only after the similarity has settled
            used = model if size[2] > 1e-2*size[0] or model in ("translation", "rigid", "similarity") else "similarity"
            note = "" if used == model else "the points lie in a plane"
        if used != "translation" and size[1] < 1e-2*max(size[0], 1e-9):
            used, note = "translation", "the points lie on a line"
        matrix = fit_points(p, m, v*(limit**2/(limit**2 + r**2))**2, used)
    if np.linalg.det(matrix[:3, :3]) <= 0:
        return failed("the pairs agree on a mirror image; look at left and right of both images")
    residuals = np.full(n, np.inf)
    seen = np.isfinite(q).all(axis=1) & np.isfinite(k).all(axis=1)
    residuals[seen] = np.linalg.norm(to_world(matrix, q[seen]) - k[seen], axis=1)
    inliers = (residuals <= inlier_mm) & (w > 0)
    if inliers.sum() < least: return failed(f"{inliers.sum()} of {len(use)} pairs agree, at least {least} are needed")
    size = _extent(q[inliers])
    return Estimate("reduced" if used != model else "ok", matrix, used, inliers, residuals,
                    float(inliers.sum()/len(use)), float(np.sqrt((residuals[inliers]**2).mean())),
                    float(size[0]/size[2]) if size[2] > 1e-6*size[0] else np.inf, note)

# %% [markdown]
# The experiment of the reference: 600 pairs with 3 mm of noise, a growing share of them wrong; what counts is the mean
# error at the corners of a box of 350 x 300 x 250 mm.

# %%
def trial(wrong, seed, fit):
    rng = rng_for(seed, "table", wrong)
    q = rng.uniform(-0.5, 0.5, (600, 3))*(350, 300, 250)
    true = placed(np.rad2deg(rng.uniform(-0.15, 0.15, 3)), rng.uniform(-20, 20, 3))
    k = to_world(true, q) + rng.normal(0, 3, q.shape)
    bad = rng.random(600) < wrong
    k[bad] = rng.uniform(-0.5, 0.5, (bad.sum(), 3))*(350, 300, 250)
    corners = np.array(np.meshgrid(*[(-.5, .5)]*3)).reshape(3, -1).T*(350, 300, 250)
    return np.linalg.norm(to_world(fit(q, k), corners) - to_world(true, corners), axis=1).mean()

shares = (0, 0.1, 0.2, 0.4, 0.6)
fits = {"least squares": lambda q, k: fit_points(q, k, np.ones(len(q)), "rigid"),
        "robust rigid": lambda q, k: estimate_transform(q, k, model="rigid", trials=300).matrix,
        "robust affine": lambda q, k: estimate_transform(q, k, trials=300).matrix}
errors = {name: [np.mean([trial(s, i, f) for i in range(3)]) for s in shares] for name, f in fits.items()}
curves({name: np.log10(e) for name, e in errors.items()}, xlabel="wrong pairs: 0, 10, 20, 40, 60 %",
       ylabel="log10 of error [mm]")

# %%
assert max(errors["robust rigid"]) < 1 and errors["robust affine"][3] < 1 and errors["least squares"][3] > 10
noisy = to_world(truth, q) + rng.normal(0, 1, q.shape)
similar, rigid = estimate_transform(q, noisy), estimate_transform(q, noisy, model="rigid", inlier_mm=30)
assert similar.rms < 2 < 5 < rigid.rms and similar.status == "ok"

# %% [markdown]
# Degenerate input gives an answer with a status:

# %%
flat, line = q*(1, 1, 0), q[:, :1]*(1.0, 2, 3)
cases = {"plane": (flat, to_world(truth, flat)), "line": (line, line + (3, 4, 5)), "nonsense": (q, q[::-1].copy()),
         "three pairs": (q[:3], q[:3]), "NaN": (q, np.where(np.arange(50)[:, None] < 20, np.nan, to_world(truth, q)))}
answers = {name: estimate_transform(*pair) for name, pair in cases.items()}
{name: (e.status, e.model, e.reason) for name, e in answers.items()}

# %%
assert [e.status for e in answers.values()] == ["reduced", "reduced", "failed", "failed", "ok"]
assert close(to_world(answers["plane"].matrix, flat), to_world(truth, flat), 1e-3)
with raises(DataError, match=r"same shape \(n, 3\)"): estimate_transform(q, q[:4])

# %% [markdown]
# ## Fields
# A field holds a displacement in mm at every voxel of a grid: $p \mapsto p + d(p)$, linear between voxels. Outside the
# grid the nearest value counts. Its array is `(3, x, y, z)`, the displacement along the world's x, y and z, RAS+.
# A `Transform` is a sequence of matrices and fields, applied from first to last; composing is writing one after the
# other, and nothing is resampled until an image is warped, once.

# %%
#| export
def _linear_at(grids: Sequence[np.ndarray], idx: np.ndarray) -> np.ndarray:
    "Values of several (x, y, z) arrays at fractional indices (3, n), linear, edge value outside: (len(grids), n)"
    from scipy.ndimage import map_coordinates
    return np.stack([map_coordinates(g, idx, order=1, mode="nearest") for g in grids])

@dataclass(frozen=True, eq=False)
class Field:
    "Displacements in the world on a grid"
    displacement: np.ndarray # (3, x, y, z) float32, RAS+ [mm]
    affine: np.ndarray # (4, 4) float64, index of the grid -> RAS+ [mm]

    def __post_init__(self):
        d = np.asarray(self.displacement, np.float32)
        if d.ndim != 4 or d.shape[0] != 3: raise DataError(f"field: shape (3, x, y, z) is needed, got {d.shape}")
        if not np.isfinite(d).all(): raise DataError("field: holds NaN or infinite displacements")
        object.__setattr__(self, "displacement", d)
        object.__setattr__(self, "affine", Volume(d[0], self.affine).affine)

    @property
    def shape(self) -> tuple[int, ...]: return self.displacement.shape[1:] # (x, y, z) of the grid

    def __call__(
        self,
        pts_xyz: np.ndarray, # (n, 3) RAS+ [mm]
    ) -> np.ndarray: # (n, 3) float64, RAS+ [mm]
        "Move points"
        pts = np.asarray(pts_xyz, np.float64)
        return pts + _linear_at(self.displacement, to_index(self.affine, pts).T).T

@dataclass(frozen=True, eq=False)
class Transform:
    "Matrices and fields, applied one after the other"
    steps: tuple[Any, ...] = field(default=()) # (4, 4) arrays [mm] and `Field`s; none: identity

    def __post_init__(self):
        steps = [s if isinstance(s, Field) else Volume(np.zeros((1, 1, 1)), s).affine for s in self.steps]
        object.__setattr__(self, "steps", tuple(steps))

    def __call__(
        self,
        pts_xyz: np.ndarray, # (n, 3) RAS+ [mm]
    ) -> np.ndarray: # (n, 3) float64, RAS+ [mm]
        "Move points"
        pts = np.asarray(pts_xyz, np.float64)
        if pts.ndim != 2 or pts.shape[1] != 3: raise DataError(f"points: shape (n, 3) is needed, got {pts.shape}")
        for s in self.steps: pts = s(pts) if isinstance(s, Field) else to_world(s, pts)
        return pts

def compose(
    *transforms: Transform, # from the first to be applied to the last
) -> Transform: # all of them as one
    "Apply transforms one after the other"
    return Transform(tuple(s for t in transforms for s in t.steps))

# %%
#| export
def _plane_points(affine: np.ndarray, shape: Sequence[int], i: int) -> np.ndarray:
    "World positions of the voxels of plane i of the first axis, (ny*nz, 3)"
    jk = np.indices(tuple(shape[1:])).reshape(2, -1)
    return to_world(affine, np.stack([np.full(jk.shape[1], i), *jk], axis=1))

def as_field(
    transform: Transform, # any
    affine: np.ndarray, # (4, 4) of the grid -> RAS+ [mm]
    shape: Sequence[int], # (x, y, z) of the grid [voxel]
) -> Field: # the same map, evaluated at the grid's voxels
    "Flatten a transform into one field"
    out = np.empty((3, *shape), np.float32)
    for i in range(shape[0]):
        pts = _plane_points(affine, shape, i)
        out[:, i] = (transform(pts) - pts).T.reshape(3, *shape[1:])
    return Field(out, affine)

def warp(
    moving: Volume, # image without channels, any axes
    transform: Transform, # fixed -> moving
    affine: np.ndarray, # (4, 4) of the wanted grid, x, y, z order -> RAS+ [mm]
    shape: Sequence[int], # (x, y, z) of the wanted grid [voxel]
    order: int = 1, # 0 nearest (labels), 1 linear, 3 cubic
    *,
    fill: float | Literal["edge"] | None = None, # value outside the moving image; default: its minimum
) -> Volume: # xyz on the wanted grid; float32 unless order is 0
    "Sample the moving image once, where the transform says"
    from scipy import ndimage
    if order not in (0, 1, 3): raise DataError(f"order: must be 0, 1 or 3, got {order}")
    if moving.channels is not None: raise DataError(f"warp: one channel at a time, got axes {moving.axes}")
    moving = to_axes(moving, "xyz")
    data = np.asarray(moving.data[...]) if order == 0 else np.asarray(moving.data[...], np.float32)
    fill = float(data.min()) if fill is None else fill
    source = ndimage.spline_filter(data, 3, output=np.float32, mode="nearest") if order == 3 else data
    out, limit = np.empty(tuple(shape), data.dtype), np.array(data.shape)[:, None]
    for i in range(shape[0]):
        at = to_index(moving.affine, transform(_plane_points(affine, shape, i))).T
        outside = ((at < -0.5 - 1e-6) | (at > limit - 0.5 + 1e-6)).any(axis=0)
        at = np.clip(at, 0, limit - 1)
        if order == 0: row = source[tuple(np.floor(at + 0.5).astype(np.intp))]
        else: row = ndimage.map_coordinates(source, at, order=order, prefilter=False, mode="nearest")
        if fill != "edge": row[outside] = fill
        out[i] = row.reshape(tuple(shape[1:]))
    return Volume(out, affine)

# %% [markdown]
# The inverse of a matrix is a matrix; the inverse $e$ of a field solves $e(q) = -d(q + e(q))$, which a few dozen
# substitutions find wherever the field does not fold.

# %%
#| export
def _inverse_field(f: Field, tolerance: float, most: int) -> Field:
    idx = np.indices(f.shape).reshape(3, -1)
    steps = np.linalg.inv(f.affine[:3, :3])
    d = f.displacement.reshape(3, -1)
    if not d.any(): return Field(-f.displacement, f.affine)
    e = -d.astype(np.float64)
    for _ in range(most):
        old = e
        e = 0.5*e - 0.5*_linear_at(f.displacement, idx + steps @ e) # half steps also settle where the field is steep
        if np.abs(e - old).max() < 0.5*tolerance: break
    else: raise DataError(f"invert: no inverse of the field within {tolerance:g} mm after {most} rounds; does it fold?")
    return Field(e.reshape(3, *f.shape), f.affine)

def invert(
    transform: Transform, # without folds
    *,
    tolerance: float = 0.01, # of the fields' inverses [mm]
    most: int = 60, # substitutions at most
) -> Transform: # moving -> fixed
    "Inverse of a transform"
    return Transform(tuple(_inverse_field(s, tolerance, most) if isinstance(s, Field) else np.linalg.inv(s)
                           for s in reversed(transform.steps)))

def jacobian(
    f: Field, # any
) -> np.ndarray: # (x, y, z) float32 determinant of the map's derivative: 1 keeps volume, <= 0 folds
    "Change of volume at every voxel"
    if min(f.shape) < 2: raise DataError(f"jacobian: two voxels along each axis are needed, got {f.shape}")
    steps = np.linalg.inv(f.affine[:3, :3])
    g = np.stack([np.stack(np.gradient(c)) for c in f.displacement]) # (3 out, 3 index, x, y, z)
    j = np.einsum("oixyz,iw->owxyz", g, steps.astype(np.float32)) + np.eye(3, dtype=np.float32)[..., None, None, None]
    return (j[0, 0]*(j[1, 1]*j[2, 2] - j[1, 2]*j[2, 1]) - j[0, 1]*(j[1, 0]*j[2, 2] - j[1, 2]*j[2, 0])
            + j[0, 2]*(j[1, 0]*j[2, 1] - j[1, 1]*j[2, 0]))

def jacobian_report(
    f: Field, # any
    mask: np.ndarray | None = None, # (x, y, z) bool, voxels that count
) -> dict[str, float]: # fraction_folded, sd_log, min, max, n
    "How smooth a field is: share of folded voxels, spread of the log of volume change"
    j = jacobian(f)
    if mask is not None:
        if np.shape(mask) != f.shape: raise DataError(f"mask: shape {np.shape(mask)} for a field on {f.shape}")
        j = j[np.asarray(mask, bool)]
    if not j.size: raise DataError("jacobian_report: the mask is empty")
    return {"fraction_folded": float((j <= 0).mean()), "sd_log": float(np.log(np.clip(j, 1e-3, 1e3)).std()),
            "min": float(j.min()), "max": float(j.max()), "n": int(j.size)}

# %%
def wobble(shape, affine, size, seed=0, scale=60):
    axes = [np.arange(n)*s for n, s in zip(shape, np.linalg.norm(affine[:3, :3], axis=0))]
    noise = [phantoms.smooth_noise(axes, scale, rng_for(seed, "field", c)) for c in range(3)]
    return Field(size*np.stack(noise), affine)

head = phantoms.head()
place = affine_from(head.spacing, (-90, -100, -95))
both = Transform((wobble(head.img.shape, place, 4), placed((3, 0, 8), (5, -4, 6))))
moved = warp(Volume(head.img, place), both, place, head.img.shape)
back = warp(moved, invert(both), place, head.img.shape)
mid = head.img.shape[2]//2
montage([v[:, :, mid].T[::-1] for v in (head.img, moved.data, back.data)], titles=["image", "warped", "and back"],
        width=5)

# %%
pts = to_world(place, rng_for(1, "p").uniform(8, 38, (200, 3)))
there = both(pts)
assert np.abs(invert(both)(there) - pts).max() < 0.25
assert close(compose(both, invert(both))(pts), pts, 0.25) and close(Transform()(pts), pts, 1e-12)
flat = as_field(both, place, head.img.shape)
assert np.abs(flat(pts) - there).max() < 0.5
stretch = as_field(Transform((np.diag([1.1, 1, 1, 1]),)), place, (8, 8, 8))
assert np.abs(jacobian(stretch) - 1.1).max() < 1e-4 and jacobian_report(flat)["fraction_folded"] == 0
assert jacobian_report(wobble(head.img.shape, place, 30, scale=25))["fraction_folded"] > 0.01
jacobian_report(flat, head.lbl > 0)

# %%
with raises(DataError, match="NaN"): Field(np.full((3, 2, 2, 2), np.nan), np.eye(4))
with raises(DataError, match=r"\(3, x, y, z\)"): Field(np.zeros((2, 2, 2, 2)), np.eye(4))
with raises(DataError, match="not invertible"): Transform((np.zeros((4, 4)),))

# %% [markdown]
# ## Files
# | file | holds | read by |
# |---|---|---|
# | `.nii`, `.nii.gz` | one field, 5-D with intent 1007, displacements in **LPS** | ITK, ANTs, SimpleITK, Slicer |
# | `.tfm`, `.h5` | the steps as they are, in LPS, ITK's order | ITK, ANTs, SimpleITK, Slicer |
#
# ITK applies a composite from its last entry to its first, so the steps are turned round. A text `.tfm` of a field is
# large; `.h5` is meant for that.

# %%
#| export
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0]) # RAS <-> LPS

def _itk_step(step: Any) -> Any:
    sitk = optional("SimpleITK", extra="io")
    if not isinstance(step, Field):
        m, t = _FLIP @ step @ _FLIP, sitk.AffineTransform(3)
        t.SetMatrix(m[:3, :3].ravel().tolist())
        t.SetTranslation(m[:3, 3].tolist())
        return t
    vectors = np.ascontiguousarray((step.displacement*np.float32([-1, -1, 1])[:, None, None, None]).T, np.float64)
    img, m = sitk.GetImageFromArray(vectors, isVector=True), _FLIP @ step.affine
    zooms = np.linalg.norm(m[:3, :3], axis=0)
    img.SetSpacing(zooms.tolist())
    img.SetOrigin(m[:3, 3].tolist())
    direction = m[:3, :3]/zooms
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-4:
        raise DataError("ITK fields need a grid with right angles, this one is sheared. Use as_field on another grid")
    img.SetDirection(direction.ravel().tolist())
    return sitk.DisplacementFieldTransform(img)

def _from_itk(t: Any, where: str) -> list[Any]:
    sitk = optional("SimpleITK", extra="io")
    t = t.Downcast()
    if t.GetDimension() != 3: raise FormatError(f"{where}: a transform of {t.GetDimension()} dimensions, 3 are needed")
    if isinstance(t, sitk.CompositeTransform):
        parts = [_from_itk(t.GetNthTransform(n), where) for n in range(t.GetNumberOfTransforms())]
        return [s for part in reversed(parts) for s in part]
    if isinstance(t, sitk.DisplacementFieldTransform):
        img = t.GetDisplacementField()
        m = np.eye(4)
        m[:3, :3] = np.reshape(img.GetDirection(), (3, 3))*np.array(img.GetSpacing())
        m[:3, 3] = img.GetOrigin()
        vectors = sitk.GetArrayFromImage(img).T*np.array([-1, -1, 1])[:, None, None, None]
        return [Field(vectors, _FLIP @ m)]
    if not t.IsLinear(): raise FormatError(f"{where}: {t.GetName()} is not supported, only linear ones and fields are")
    origin, m = np.array(t.TransformPoint((0.0, 0.0, 0.0))), np.eye(4)
    m[:3, :3] = np.stack([np.array(t.TransformPoint(tuple(e))) - origin for e in np.eye(3)], axis=1)
    m[:3, 3] = origin
    return [_FLIP @ m @ _FLIP]

# %%
#| export
def write_transform(
    transform: Transform, # any; for .nii exactly one field
    path: str | os.PathLike, # .nii, .nii.gz, .tfm or .h5
    on_exists: OnExists = "error", # what to do when `path` is there already
) -> Path: # `path`
    "Write a transform so that ITK's family reads it, atomically"
    path, kind = Path(path), _transform_kind(path)
    if not check_output(path, on_exists): return path
    if kind == "nifti":
        if len(transform.steps) != 1 or not isinstance(transform.steps[0], Field):
            raise DataError(f"{path}: NIfTI holds one field. Flatten the transform with as_field, or write .h5")
        import nibabel as nib
        f = transform.steps[0]
        data = np.moveaxis(f.displacement*np.float32([-1, -1, 1])[:, None, None, None], 0, -1)[:, :, :, None]
        img = nib.Nifti1Image(data, f.affine)
        img.header.set_intent("vector")
        img.header.set_xyzt_units("mm")
        with atomic(path) as t: nib.save(img, t)
        return path
    sitk = optional("SimpleITK", extra="io")
    parts = [_itk_step(s) for s in reversed(transform.steps)] or [sitk.AffineTransform(3)]
    with atomic(path) as t: sitk.WriteTransform(parts[0] if len(parts) == 1 else sitk.CompositeTransform(parts), str(t))
    return path

def _transform_kind(path: Path) -> str:
    name = path.name.lower()
    kind = next((k for k, ends in (("nifti", (".nii", ".nii.gz")), ("itk", (".tfm", ".h5", ".hdf5", ".txt")))
                 if name.endswith(ends)), None)
    if kind is None: raise FormatError(f"{path}: transforms are .nii, .nii.gz, .tfm or .h5 files")
    return kind

def read_transform(
    path: str | os.PathLike, # .nii, .nii.gz, .tfm, .txt or .h5, displacements in LPS as ITK and ANTs write them
) -> Transform: # fixed -> moving, RAS+ [mm]
    "Read a transform of ITK's family"
    path = Path(path)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    if _transform_kind(path) == "nifti":
        vol = read_nifti(path)
        if vol.channels != 3: raise FormatError(f"{path}: a field has 3 components, got {vol.channels or 1}")
        return Transform((Field(vol.data*np.float32([-1, -1, 1])[:, None, None, None], vol.affine),))
    sitk = optional("SimpleITK", extra="io")
    try: t = sitk.ReadTransform(str(path))
    except RuntimeError as e: raise FormatError(f"{path}: damaged ({str(e).strip().splitlines()[-1]})") from None
    try: return Transform(tuple(_from_itk(t, str(path))))
    except DataError as e: raise FormatError(f"{path}: {e}") from None

# %%
import SimpleITK as sitk

with tmpdir() as d:
    write_transform(both, d/"both.h5")
    write_transform(Transform((flat,)), d/"flat.nii.gz")
    again, field_again = read_transform(d/"both.h5"), read_transform(d/"flat.nii.gz")
    theirs = sitk.ReadTransform(str(d/"both.h5"))
    image = sitk.ReadImage(str(d/"flat.nii.gz"))
there_itk = np.array([theirs.TransformPoint(tuple(p*(-1, -1, 1))) for p in pts])*(-1, -1, 1)
image.GetNumberOfComponentsPerPixel(), np.abs(there_itk - there).max().round(5)

# %%
assert close(there_itk, there, 1e-3) and close(again(pts), there, 1e-3) and close(field_again(pts), flat(pts), 1e-3)
with tmpdir() as d, raises(DataError, match="Flatten"): write_transform(both, d/"both.nii")
with tmpdir() as d, raises(FormatError, match="transforms are"):
    (d/"field.csv").write_text("0,0,0")
    read_transform(d/"field.csv")

# %% [markdown]
# ## deeds
# [deeds](https://github.com/mattiaspaul/deedsBCV) writes its field as three blocks of float32 in voxels of its grid, in
# the order second, first, third axis, on $\lfloor n/G \rfloor$ control points: point $c$ sits at voxel $c\,n/m$. Its
# affine is four rows of text, the columns of the matrix, in voxels. `read_deeds_field` gives a `Field` on the control
# points, in mm, that needs no padding to multiples of anything and applies to any grid. The affine maps voxels of the
# fixed to voxels of the moving image. Voxels are those of the NIfTI arrays that deeds was given.

# %%
#| export
def read_deeds_field(
    path: str | os.PathLike, # '..._displacements.dat'
    affine: np.ndarray, # (4, 4) of the images that deeds saw, index -> RAS+ [mm]
    shape: Sequence[int], # (x, y, z) of the images that deeds saw [voxel]
    spacing: int, # last grid spacing, the final number of `-G` [voxel]
) -> Field: # on the control points
    "Read the displacements of deedsBCV"
    path, n = Path(path), np.array(shape)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    m = n//int(spacing)
    size = path.stat().st_size
    if size != 12*m.prod():
        raise FormatError(f"{path}: {size} bytes, a field for images of {tuple(shape)} with a last grid spacing of "
                          f"{spacing} has {12*m.prod()}")
    v, u, w = np.fromfile(path, "<f4").reshape(3, *m[::-1]).transpose(0, 3, 2, 1) # stored: second, first, third axis
    voxels = np.stack([u, v, w])
    if not np.isfinite(voxels).all(): raise FormatError(f"{path}: holds NaN or infinite displacements")
    grid = np.array(affine) @ np.diag([*(n/m), 1.0])
    return Field(np.einsum("ij,jxyz->ixyz", np.array(affine)[:3, :3], voxels), grid)

def read_deeds_affine(
    path: str | os.PathLike, # '..._matrix.txt' of linearBCV: four rows, the last one the translation
    fixed_affine: np.ndarray, # (4, 4) of the fixed image that deeds saw, index -> RAS+ [mm]
    moving_affine: np.ndarray, # (4, 4) of the moving image that deeds saw, index -> RAS+ [mm]
) -> np.ndarray: # (4, 4) fixed -> moving, RAS+ [mm]
    "Read the matrix of linearBCV"
    path = Path(path)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    try: rows = np.array([[float(x) for x in line.split()] for line in path.read_text().splitlines() if line.strip()])
    except ValueError: raise FormatError(f"{path}: is not a matrix of numbers") from None
    if rows.shape not in ((4, 3), (4, 4)) or not np.isfinite(rows).all():
        raise FormatError(f"{path}: four rows of three or four finite numbers are needed, got shape {rows.shape}")
    m = np.eye(4)
    m[:3] = rows[:, :3].T
    return np.array(moving_affine) @ m @ np.linalg.inv(fixed_affine)

# %%
voxels = np.zeros((3, 4, 5, 6), "<f4")
voxels[0] = 2.0
with tmpdir() as d:
    (d/"x_displacements.dat").write_bytes(voxels[[1, 0, 2]].transpose(0, 3, 2, 1).tobytes())
    f = read_deeds_field(d/"x_displacements.dat", np.diag([2.0, 2, 2, 1]), (12, 15, 18), 3)
    (d/"m.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n3 4 5 1\n")
    shift = read_deeds_affine(d/"m.txt", np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1]))
    with raises(FormatError, match="1440 bytes"): read_deeds_field(d/"x_displacements.dat", np.eye(4), (13, 18, 18), 3)
f(np.array([[5.0, 5, 5]])), shift[:3, 3]

# %%
assert close(f(np.array([[5.0, 5, 5]])), [[9, 5, 5]], 1e-5) and close(shift[:3, 3], [6, 8, 10], 1e-9)
