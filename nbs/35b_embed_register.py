# %% [markdown]
# # Registration
#
# > Two scans in, one aligned pair out: no initial guess, any pair of contrasts, one call.
#
# "How do I get a *registered image*?" is what users of the reference ask most. Its flow needs trained vectors, fits
# without outlier rejection, cuts the moving image before it moves, interpolates three times and ends in a file format
# of its own. Here the steps are: a first guess out of [matches](34c_embed_match.ipynb), or, where there are none or
# they do not agree, a search over rotations and all translations; a robust affine out of block matches, from coarse to
# fine; the [deformation](35a_embed_deform.ipynb); and one interpolation of the original moving image on the fixed
# image's own grid. Self-similarity codes carry all steps, so contrast does not matter and nothing has to be trained.

# %%
#| default_exp embed.register

# %%
#| export
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import ConfigError, DataError, MissingFile, OnExists, log, write_csv, write_json
from medvol_nb.embed.codes import Backend, code_levels, cost_volume, coupled_convex, ssc_codes
from medvol_nb.embed.deform import _mask_on, _on_grid, _single, register_deformable, working_grid
from medvol_nb.embed.match import Matcher
from medvol_nb.embed.prepare import pair_files
from medvol_nb.embed.model import load_embedder
from medvol_nb.embed.store import embed_volume
from medvol_nb.embed.transforms import (Estimate, Field, Model, Transform, as_field, compose, estimate_transform,
                                        warp, write_transform)
from medvol_nb.geometry import Volume, corners, resample, to_world
from medvol_nb.parallel import BatchError, Ledger, digests, on_cluster, pmap
from medvol_nb.volume import read_volume, stem_of, write_volume

# %%
from scipy.spatial.transform import Rotation

from medvol_nb import phantoms
from medvol_nb.core import raises, rng_for, tmpdir
from medvol_nb.geometry import affine_from
from medvol_nb.embed.transforms import read_transform
from medvol_nb.plot import montage

# %% [markdown]
# ## Without any guess
# A rotation is tried by turning the moving image on a coarse grid of about 20,000 voxels; then *all* translations are
# tried at once, because correlation is a product in the Fourier domain. What is correlated are the twelve levels of
# the codes, minus their mean over the scan, zero where nothing is known: unrelated tissue adds up to nothing. So the
# sum needs no division by the overlap, and a moving image that shows only a part of the body finds its place, too. The
# codes are taken after turning, since they depend on directions.

# %%
#| export
def _levels(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    "Levels of the codes' 12 channels with mean 0, (12, x, y, z) float32, 0 where nothing is known"
    v = code_levels(codes).astype(np.float32)
    v -= v[:, known].mean(axis=1)[:, None, None, None]
    return v*known

def _centre(vol: Volume) -> np.ndarray:
    "World position of the middle of the content: voxels weighted by their distance from the darkest value"
    w = vol.data - vol.data.min()
    total = w.sum()
    ijk = [(w.sum(axis=tuple(a for a in range(3) if a != d))*np.arange(vol.shape[d])).sum()/total for d in range(3)]
    return to_world(vol.affine, ijk)

def _turn(angles: Sequence[float], about: np.ndarray, to: np.ndarray) -> np.ndarray:
    "Rotation [degree, about x, y, z] that brings the point `about` to `to`"
    from scipy.spatial.transform import Rotation
    m = np.eye(4)
    m[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    m[:3, 3] = to - m[:3, :3] @ about
    return m

def search_rigid(
    fixed: Volume, # image without channels, any axes and contrast
    moving: Volume, # image without channels, any axes and contrast
    *,
    max_angle: float = 30.0, # largest rotation about each axis [degree]
    angle_step: float = 15.0, # between rotations that are tried [degree]
    best: int = 6, # guesses to return
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> list[tuple[float, np.ndarray]]: # score and (4, 4) fixed -> moving [mm], best first
    "First guesses: every rotation of a grid, and for each the best of all translations"
    from scipy.fft import irfftn, next_fast_len, rfftn
    fix, mov = _single(fixed, "fixed image"), _single(moving, "moving image")
    volume = np.prod(fix.shape)*abs(np.linalg.det(fix.affine[:3, :3]))
    spacing = float(np.clip((volume/20_000)**(1/3), 3, 16))
    grid = resample(fix, spacing)
    small = resample(mov, np.maximum(mov.spacing, spacing))
    one = _levels(ssc_codes(grid.data, backend=backend), np.ones(grid.shape, bool))
    middle, room = _centre(fix), _centre(mov)
    ticks = np.arange(-max_angle, max_angle + 1e-6, angle_step) if max_angle > 0 else [0.0]
    turns = [_turn(angles, middle, room) for angles in itertools.product(ticks, repeat=3)]
    linear = grid.affine[:3, :3]
    spread = np.linalg.solve(linear, np.concatenate([(corners(small) - room) @ t[:3, :3] for t in turns]).T)
    reach = 2*np.ceil(np.abs(spread).max(axis=1)).astype(int) + 1 # a window that holds every rotation
    window = grid.affine.copy()
    window[:3, 3] = middle - linear @ ((reach - 1)/2)
    size = [next_fast_len(int(n), True) for n in np.array(grid.shape) + reach]
    spectrum = rfftn(one, size, axes=(1, 2, 3))
    found = []
    for turn in turns:
        image, known = _on_grid(small, Transform((turn,)), Volume(np.broadcast_to(np.float32(0), tuple(reach)), window))
        if not known.any() or np.ptp(image[known]) == 0: continue
        two = _levels(ssc_codes(image, backend=backend), known)
        score = irfftn((spectrum*np.conj(rfftn(two, size, axes=(1, 2, 3)))).sum(axis=0), size)
        at = np.array(np.unravel_index(score.argmax(), score.shape))
        at = np.where(at >= grid.shape, at - size, at) # window voxel 0 belongs at this voxel of the grid
        shift = np.eye(4)
        shift[:3, 3] = window[:3, 3] - to_world(grid.affine, at)
        found.append((float(score.max()), turn @ shift))
    if not found: raise DataError("moving image: shows nothing that could be registered")
    return sorted(found, key=lambda f: -f[0])[:best]

# %%
def knocked(vol, angles, shift):
    "The volume elsewhere in the world, and the transform from its old to its new place"
    m = np.eye(4)
    m[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    m[:3, 3] = shift
    return Volume(vol.data, m @ vol.affine), m

shape = (64, 72, 60)
here = affine_from(3.0, (-90, -105, -85))
mr = Volume(phantoms.head(shape, spacing=3.0).img, here)
bent = Volume((90*np.sin(mr.data/40) + rng_for(0, "n").normal(0, 2, shape)).astype(np.float32), here)
moving, truth = knocked(bent, (12, -9, 18), (30, -25, 40))
guesses = search_rigid(mr, moving, max_angle=20, angle_step=10)
pts = to_world(here, np.argwhere(mr.data > 30)[::200])
off = lambda m: float(np.linalg.norm(to_world(m, pts) - to_world(truth, pts), axis=1).mean())
{"before": round(off(np.eye(4)), 1), "guesses": [round(off(m), 1) for _, m in guesses]}

# %%
assert off(guesses[0][1]) < 15

# %% [markdown]
# ## An affine out of blocks
# From a guess that is 15 mm off, blocks of the fixed image look around themselves in the moving image, and the other
# way round. Each gives a pair of points and a weight: how much deeper the best displacement is than the average one.
# Pairs that do not find back count little. The [robust fit](35_embed_transforms.ipynb) makes an affine of them, and
# the blocks look again, at half the distance. The guess whose affine leaves the images most alike is kept.

# %%
#| export
def block_matches(
    fixed: np.ndarray, # (x, y, z) uint64 codes
    moving: np.ndarray, # (x, y, z) uint64 codes on the same grid
    known: np.ndarray, # (x, y, z) bool, known in both
    block: int = 4, # side of a block [voxel]
    steps: int = 4, # displacements -steps...steps along each axis
    quantum: int = 1, # voxels a step
    *,
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: # (n, 3) middles, (n, 3) displacements [voxel], (n,) weights
    "Where blocks of one image are in the other"
    pairs = []
    for one, two in ((fixed, moving), (moving, fixed)):
        cost = cost_volume(one, two, block, steps, quantum, backend=backend)
        blocks = cost.shape[:3]
        cut = known[tuple(slice(0, n*block) for n in blocks)].reshape([k for n in blocks for k in (n, block)])
        depth = (cost.mean(axis=-1) - cost.min(axis=-1))*cut.mean(axis=(1, 3, 5))
        u = quantum*coupled_convex(cost, np.zeros((3, *blocks), np.float32), couplings=(0.003, 0.01), backend=backend)
        pairs.append((u, depth))
    (u, depth), (back, _) = pairs
    middles = np.indices(blocks).reshape(3, -1)*block + (block - 1)/2
    flat = u.reshape(3, -1)
    at = np.clip(np.rint((middles + flat - (block - 1)/2)/block).astype(int), 0, np.array(blocks)[:, None] - 1)
    lost = np.linalg.norm(flat + back[(slice(None), *at)], axis=0)/(2*quantum) # how far a block misses itself
    return middles.T, flat.T, depth.ravel()/(1 + lost**2)

def likeness(
    fixed: np.ndarray, # (x, y, z) uint64 codes
    moving: np.ndarray, # (x, y, z) uint64 codes on the same grid
    known: np.ndarray, # (x, y, z) bool, known in both
) -> float: # 1: equal, 0: as like as unrelated places; what is unknown counts 0
    "How alike two images are, by their codes"
    apart = np.bitwise_count(fixed ^ moving)[known].sum()
    v = [code_levels(c[known]) for c in (fixed, moving)]
    unrelated = 0.0
    for a, b in zip(*v): # mean level difference of independent draws
        p, q = (np.bincount(x, minlength=6)/max(1, x.size) for x in (a, b))
        unrelated += float(np.abs(np.subtract.outer(np.arange(6), np.arange(6)))*1.0 @ q @ p)
    return float((unrelated*known.sum() - apart)/max(unrelated*known.size, 1e-9))

# %%
#| export
@dataclass(frozen=True)
class Alignment:
    "An affine between two images, and how it came about"
    transform: Transform # fixed -> moving
    estimate: Estimate # of the last round of block matches
    likeness: float # of the images' codes afterwards, 1 is equal; NaN if the guess was given
    source: str # 'matches', 'search' or 'given'
    tried: tuple[float, ...] # likeness of every guess, refined

LEAST_LIKENESS = 0.05 # two volumes of noise reach 0.01, CT and MR of a head 0.56
STAGES = ((4.0, 4, 4, 2, 24.0), (4.0, 4, 4, 1, 14.0), (2.5, 5, 4, 1, 10.0)) # spacing [mm], block, steps, quantum, limit

def refine_affine(
    fixed: Volume, # image without channels
    moving: Volume, # image without channels
    guess: np.ndarray, # (4, 4) fixed -> moving [mm]
    *,
    model: Model = "affine", # how much may change
    stages: Sequence[tuple[float, int, int, int, float]] = STAGES, # spacing [mm], block, steps, quantum, limit [mm]
    fixed_mask: np.ndarray | None = None, # n-d bool on the array of `fixed`, what counts
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> tuple[Estimate, float]: # the fit of the last stage, whose matrix is fixed -> moving, and the likeness
    "Improve a guess by block matching"
    matrix, last = np.asarray(guess, np.float64), None
    for spacing, block, steps, quantum, limit in stages:
        grid, mov = working_grid(fixed, spacing), working_grid(moving, spacing)
        mask = _mask(fixed_mask, fixed, grid)
        image, known = _on_grid(mov, Transform((matrix,)), grid)
        known &= mask
        if known.sum() < 0.02*known.size: break
        codes = ssc_codes(grid.data, 1, backend=backend), ssc_codes(image, 1, valid=known, backend=backend)
        middles, u, w = block_matches(*codes, known, block, steps, quantum, backend=backend)
        q = to_world(grid.affine, middles)
        found = estimate_transform(q, to_world(matrix, to_world(grid.affine, middles + u)), w, model, limit, trials=300)
        if found.status == "failed": break
        matrix, last = found.matrix, found
    if last is None:
        last = Estimate("failed", matrix, model, np.zeros(0, bool), np.zeros(0), 0.0, np.inf, np.inf, "no blocks agree")
    grid = working_grid(fixed, 4.0)
    image, known = _on_grid(working_grid(moving, 4.0), Transform((matrix,)), grid)
    known &= _mask(fixed_mask, fixed, grid)
    alike = likeness(ssc_codes(grid.data, backend=backend), ssc_codes(image, backend=backend), known) \
        if known.any() else -1.0
    if last.status != "failed" and alike < LEAST_LIKENESS:
        last = replace(last, status="failed", reason=f"the images are not alike afterwards, likeness {alike:.3f}")
    return last, alike

def _mask(mask: np.ndarray | None, vol: Volume, grid: Volume) -> np.ndarray:
    return np.ones(grid.shape, bool) if mask is None else _mask_on(mask, vol, Transform(), grid, "fixed_mask")

# %%
#| export
Matching = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] # (n, 3) [mm] -> (n, 3) [mm] and (n,) weights

def matching_of(
    matcher: Matcher, # of the fixed image's embedding with the moving one's
) -> Matching: # for `align` and `register_pair`
    "Mutual matches of an embedding, weighted by score"
    def matched(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m = matcher.match(q, "mutual")
        return m.matched, np.where(m.ok, np.maximum(m.score, 0), 0)
    return matched

def _guess_from(matcher: Matching, fixed: Volume, mask: np.ndarray | None, model: Model) -> Estimate:
    "Robust transform of the matches of a grid of points, 20 mm apart"
    grid = working_grid(fixed, 20.0)
    q = to_world(grid.affine, np.argwhere(_mask(mask, fixed, grid)))
    k, w = matcher(q)
    found = estimate_transform(q, k, w, model, 20.0)
    grown = np.linalg.det(found.matrix[:3, :3])
    if found.status == "failed" or (found.inlier_fraction >= 0.25 and 0.4 < grown < 2.5): return found
    return replace(found, status="failed", reason=f"{found.inlier_fraction:.0%} of the matches agree, on a volume of "
                                                  f"{grown:.2f} times the fixed one's")

def align(
    fixed: Volume, # image without channels, any axes and contrast
    moving: Volume, # image without channels, any axes and contrast
    matcher: Matching | None = None, # matches of points, such as those of an embedding
    *,
    model: Model = "affine", # how much may change
    fixed_mask: np.ndarray | None = None, # n-d bool on the array of `fixed`, what counts
    max_angle: float = 30.0, # largest rotation about each axis that is searched [degree]
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> Alignment: # transform fixed -> moving
    "Affine between two images, without a first guess"
    guesses, source = [], "search"
    if matcher is not None:
        guess = _guess_from(matcher, fixed, fixed_mask, model)
        if guess.status == "failed": log.warning("matches are of no use (%s), searching instead", guess.reason)
        else: guesses, source = [guess.matrix], "matches"
    if not guesses: guesses = [m for _, m in search_rigid(fixed, moving, max_angle=max_angle, backend=backend)]
    fix, mov = working_grid(fixed, 2.0), working_grid(moving, 2.0)
    mask = None if fixed_mask is None else _mask(fixed_mask, fixed, fix)
    rough = [refine_affine(fix, mov, g, model="rigid" if model == "rigid" else "similarity", stages=STAGES[:1],
                           fixed_mask=mask, backend=backend) for g in guesses]
    order = np.argsort([-alike for _, alike in rough], kind="stable")[:2]
    fine = [refine_affine(fix, mov, rough[k][0].matrix, model=model, stages=STAGES[:1] + STAGES, fixed_mask=mask,
                          backend=backend) for k in order]
    last, alike = max(fine, key=lambda f: f[1])
    return Alignment(Transform((last.matrix,)), last, alike, source, tuple(a for _, a in rough))

# %%
found = align(mr, moving, max_angle=20)
off_by = np.linalg.norm(found.transform(pts) - to_world(truth, pts), axis=1)
{"error [mm]": off_by.mean().round(2), "likeness": round(found.likeness, 2),
 "guesses": np.round(found.tried, 2).tolist()}

# %%
assert off_by.mean() < 2 and found.estimate.status == "ok"
wrong = lambda q: (q + rng_for(0, "w").uniform(-90, 90, q.shape), np.ones(len(q)))
right = lambda q: (to_world(truth, q) + rng_for(0, "r").normal(0, 4, q.shape), np.ones(len(q)))
assert align(mr, moving, right).source == "matches"

# %% [markdown]
# ## One call
# `register_pair` does all of it and, with a folder, writes what the next step needs: `<id>_0000.nii.gz` is the fixed
# image, `<id>_0001.nii.gz` the moving one on its grid (the layout in which pairs are
# [prepared](30d_embed_prepare.ipynb) for training across contrasts), `<id>_known.nii.gz` where the moving image has
# data, `<id>_field.nii.gz` the whole transform as one field for any program of ITK's family, and `<id>_report.json`.

# %%
#| export
@dataclass(frozen=True)
class Registration:
    "The result of `register_pair`"
    transform: Transform # fixed -> moving: the field, then the affine
    affine: Alignment # the first part
    warped: Volume # moving image on the fixed image's grid, axes xyz
    known: Volume # uint8, 1 where the moving image has data
    report: dict[str, Any] # numbers of all steps

def register_pair(
    fixed: Volume | str | os.PathLike, # image without channels
    moving: Volume | str | os.PathLike, # image without channels, any contrast and place
    matcher: Matching | None = None, # matches of points, such as those of an embedding; without it, search
    *,
    init: Transform | None = None, # known first guess, in place of matches and search
    model: Model = "affine", # of the first part
    deformable: bool = True, # False: only the first part
    spacing: float = 2.0, # of the working grid [mm]
    fixed_mask: np.ndarray | None = None, # n-d bool on the array of `fixed`, what counts
    max_angle: float = 30.0, # largest rotation about each axis that is searched [degree]
    order: Literal[0, 1, 3] = 1, # interpolation of the result: 0 nearest, 1 linear, 3 cubic
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
    **options: Any, # passed to `register_deformable`, such as features= or engine=
) -> Registration: # transform, warped image and report
    "Register two images of any contrast without an initial guess"
    begin = time.perf_counter()
    vols = [v if isinstance(v, Volume) else read_volume(v) for v in (fixed, moving)]
    fix, mov = (_single(v, what) for v, what in zip(vols, ("fixed image", "moving image")))
    fixed_mask, moving_mask = (m if m is None or v.axes == "xyz" else np.transpose(m, [v.axes.index(a) for a in "xyz"])
                               for m, v in zip((fixed_mask, options.pop("moving_mask", None)), vols))
    if options and not deformable:
        raise ConfigError(f"{', '.join(options)}: belongs to the deformable step, which is switched off")
    if init is None:
        found = align(fix, mov, matcher, model=model, fixed_mask=fixed_mask, max_angle=max_angle, backend=backend)
    else: found = Alignment(init, Estimate("ok", np.eye(4), "given", np.zeros(0, bool), np.zeros(0), 1.0, 0.0, 1.0),
                            float("nan"), "given", ())
    seconds, transform, jacobian = {"affine": time.perf_counter() - begin}, found.transform, None
    if deformable:
        d = register_deformable(fix, mov, transform, fixed_mask=fixed_mask, moving_mask=moving_mask, spacing=spacing,
                                backend=backend, **options)
        transform, jacobian = compose(Transform((d.field,)), transform), d.log["jacobian"]
        seconds["deformable"] = d.log["seconds"]
    warped = warp(mov, transform, fix.affine, fix.shape, order)
    ones = Volume(np.ones(mov.shape, np.uint8), mov.affine)
    known = warp(ones, transform, fix.affine, fix.shape, 0, fill=0)
    seconds["all"] = time.perf_counter() - begin
    e = found.estimate
    report = {"status": e.status, "reason": e.reason, "source": found.source, "model": e.model,
              "matrix": np.round(e.matrix, 9).tolist() if init is None else None, "likeness": _number(found.likeness),
              "tried": list(found.tried), "inlier_fraction": e.inlier_fraction, "rms_mm": _number(e.rms),
              "jacobian": jacobian, "known": float(known.data.mean()), "seconds": seconds}
    return Registration(transform, found, warped, known, report)

def _number(x: float) -> float | None: return float(x) if np.isfinite(x) else None

def write_registration(
    found: Registration, # result of `register_pair`
    fixed: Volume, # the fixed image
    folder: str | os.PathLike, # where the files go
    case: str, # id of the pair, begins the names
    *,
    spacing: float = 2.0, # of the field's grid [mm]
) -> list[Path]: # the files; the report is written last
    "Write a registered pair: both images on one grid, where there is data, the transform and the report"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    grid = working_grid(fixed, spacing)
    names = [folder/f"{case}_{part}" for part in ("0000.nii.gz", "0001.nii.gz", "known.nii.gz", "field.nii.gz",
                                                  "report.json")]
    write_volume(_single(fixed, "fixed image"), names[0], "overwrite")
    write_volume(found.warped, names[1], "overwrite")
    write_volume(found.known, names[2], "overwrite")
    write_transform(Transform((as_field(found.transform, grid.affine, grid.shape),)), names[3], "overwrite")
    write_json(names[4], found.report)
    return names

# %%
axes = [np.arange(n)*3.0 for n in shape]
wave = Field(3*np.stack([phantoms.smooth_noise(axes, 60, rng_for(5, "wave", c)) for c in range(3)]), here)
soft = warp(bent, Transform((wave,)), here, shape) # voxel p of `soft` shows p + d(p) of `bent`
moving, place = knocked(soft, (-10, 14, 8), (-35, 20, 30))
done = register_pair(mr, moving, max_angle=20, spacing=3.0)
montage([v.data[:, :, 30].T[::-1] for v in (mr, warp(moving, Transform(), here, shape), done.warped)],
        titles=["fixed", "moving, as it came", "registered"])

# %% [markdown]
# The error is measured against the warp that was applied: the place $p$ of the fixed image is now at $K(y)$ with $y +
# d(y) = p$.

# %%
y = pts.copy()
for _ in range(60): y = 0.5*y + 0.5*(pts - (wave(y) - y))
goal = to_world(place, y)
error = np.linalg.norm(done.transform(pts) - goal, axis=1)
{"before [mm]": np.linalg.norm(pts - goal, axis=1).mean().round(1), "after [mm]": error.mean().round(2),
 "folded": done.report["jacobian"]["fraction_folded"]}

# %%
assert error.mean() < 2.5 and done.report["jacobian"]["fraction_folded"] < 1e-3
with raises(DataError, match="moving image: every voxel is 3"):
    register_pair(mr, Volume(np.full((9, 9, 9), 3.0), np.eye(4)))

# %% [markdown]
# ## Many pairs
# `medvol embedding register` takes two files, or one folder in the layout of unregistered pairs (`<id>_0000` is fixed,
# `<id>_0001` and `<id>_0002` are registered to it). It goes on where it stopped; a pair that fails is listed in
# `failed.csv` and the others are finished.

# %%
#| export
def _pairs(fixed: Path, moving: Path | None) -> dict[str, tuple[Path, Path]]:
    "Names of the results and the files they are made from"
    if moving is not None:
        for p in (fixed, moving):
            if not p.exists(): raise MissingFile(f"{p} does not exist")
        return {stem_of(moving): (fixed, moving)}
    if not fixed.is_dir(): raise MissingFile(f"{fixed} is not a folder. Give a folder of pairs, or two files")
    cases = pair_files(fixed)
    found = {name + tail: (files["0000"], files[end]) for name, files in cases.items()
             for end, tail in (("0001", ""), ("0002", "_t2")) if {"0000", end} <= files.keys()}
    if not found: raise DataError(f"{fixed}: holds no pairs <id>_0000 and <id>_0001")
    used = {p for pair in found.values() for p in pair}
    if left := [p.name for files in cases.values() for p in files.values() if p not in used]:
        log.warning("%s: %d scans are left out, first %s: not in a pair of <id>_0000 with <id>_0001 or <id>_0002",
                    fixed, len(left), left[0])
    return found

def register(
    fixed: str | os.PathLike, # fixed image, or folder of pairs <id>_0000 (fixed), <id>_0001 (moving)
    out: str | os.PathLike, # folder of results
    moving: str | os.PathLike | None = None, # moving image, if `fixed` is one image
    *,
    model: Model = "affine", # of the first part
    deformable: bool = True, # False: only the affine part
    spacing: float = 2.0, # of the working grid [mm]
    max_angle: float = 30.0, # largest rotation about each axis that is searched [degree]
    embedder: str | os.PathLike | None = None, # trained network for the first guess; without it, search
    device: str = "auto", # where the network runs
    workers: int = 0, # processes; 0: in this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers see the same folders
    on_exists: OnExists = "skip", # "skip": go on where it stopped
) -> dict: # number of pairs and the folder
    "Register pairs of scans of any contrast, without an initial guess"
    pairs, out = _pairs(Path(fixed), None if moving is None else Path(moving)), Path(out)
    for case in pairs:
        if (n := len(os.fsencode(case)) + len("_known.nii.gz")) > 255:
            raise DataError(f"{case}: names of its results would have {n} bytes, 255 bytes are the most. "
                            "Use a shorter name")
    out.mkdir(parents=True, exist_ok=True)
    net, cfg = (None, None) if embedder is None else load_embedder(embedder, device)
    params = {"model": model, "deformable": deformable, "spacing": spacing, "max_angle": max_angle, "embedder": cfg}
    def one(case: str) -> dict:
        a, b = (read_volume(p) for p in pairs[case])
        matcher = None
        if net is not None:
            pair = [embed_volume(net, v, config=cfg, body="auto", device=device) for v in (a, b)]
            matcher = matching_of(Matcher(*pair, device="cpu"))
        found = register_pair(a, b, matcher, model=model, deformable=deformable, spacing=spacing, max_angle=max_angle)
        if found.report["status"] == "failed": raise DataError(f"{case}: not registered, {found.report['reason']}")
        files = write_registration(found, a, out, case, spacing=spacing)
        return {"outputs": [p.name for p in files], "source": digests(pairs[case])}
    keys = list(pairs)
    with Ledger(out/"ledger.jsonl", params, on_exists=on_exists) as ledger:
        ledger.recheck(pairs)
        with on_cluster(dask):
            values, failures = pmap(one, keys, workers, keys=keys, desc="register", errors="collect", ledger=ledger)
    write_csv(out/"failed.csv", [{"pair": keys[f.index], "error": f.error} for f in failures], ["pair", "error"])
    if failures: raise BatchError(failures, values, len(keys))
    return {"pairs": len(keys), "out": out}

# %%
with tmpdir() as d:
    (d/"pairs").mkdir()
    write_volume(mr, d/"pairs/p1_0000.nii.gz")
    write_volume(moving, d/"pairs/p1_0001.nii.gz")
    register(d/"pairs", d/"out", spacing=4.0, max_angle=15)
    names = sorted(p.name for p in (d/"out").iterdir())
    again = register(d/"pairs", d/"out", spacing=4.0, max_angle=15)
    field = read_transform(d/"out/p1_field.nii.gz")
    (d/"empty").mkdir()
    with raises(DataError, match="no pairs"): register(d/"empty", d/"none")
names, np.linalg.norm(field(pts) - goal, axis=1).mean().round(2)

# %%
assert again["pairs"] == 1 and np.linalg.norm(field(pts) - goal, axis=1).mean() < 3
