# %% [markdown]
# # Deformable registration
#
# > A dense displacement between two roughly aligned volumes, of the same or of different contrast, in seconds.
#
# After the [robust affine](35_embed_transforms.ipynb) organs are still centimetres apart: breathing, another bladder,
# another person. Gradient methods find the next minimum, which across such distances is the wrong one. Discrete
# methods try every displacement of a range instead. [deeds](https://github.com/mattiaspaul/deedsBCV) (Heinrich et al.,
# 2013) does it with descriptors of 60 bits whose distance is a count of bits, and finds the smoothest choice on a
# spanning tree of control points. [ConvexAdam](https://github.com/multimodallearning/convexAdam) (Siebert et al.,
# 2021) keeps real-valued descriptors and alternates between smoothing and choosing, then descends with Adam.
#
# This page takes the cheap half of each. Costs come from [counting bits](34f_embed_codes.ipynb): eight voxels an
# instruction, so that all displacements of a level cost less than a second. Smoothness comes from the coupled convex
# iteration: it looks at the whole lattice, where a tree cuts two thirds of the edges and leaves steps across them. And
# since costs are cheap, there are four levels down to blocks of two voxels, in both directions, with minima
# interpolated between labels.

# %%
#| default_exp embed.deform

# %%
#| export
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from medvol_nb.core import ConfigError, DataError, MedvolError, MissingFile, tmpdir
from medvol_nb.embed.codes import Backend, _kernel, code_levels, cost_volume, coupled_convex, ssc_codes, vector_codes
from medvol_nb.embed.transforms import Field, Transform, jacobian_report, read_deeds_field, warp
from medvol_nb.geometry import Volume, resample, to_axes, to_world
from medvol_nb.volume import write_volume

# %%
from medvol_nb import phantoms
from medvol_nb.core import close, raises, rng_for
from medvol_nb.embed.transforms import compose
from medvol_nb.geometry import affine_from
from medvol_nb.plot import montage

# %% [markdown]
# ## From level to level
# Four levels: blocks of 6, 4, 3 and 2 voxels, steps of 3, 2, 1 and 1. Together they reach 25 voxels, 50 mm at 2 mm. At
# each level the moving image is warped by what is known, both images look for each other, and the two answers are made
# inverse to each other, ten times $u \leftarrow \frac12(u - \tilde u\circ(\mathrm{id} + u))$: where they disagree,
# neither is believed. The result is *composed* with the field so far: $d + u\circ(\mathrm{id} + d)$. Adding, as the
# reference does, forgets that the warped image has moved.
#
# What lies outside of the moving image, or of a mask, is unknown, not different. Its codes are halfway between all
# others, and blocks count with the share of their voxels that is known on both sides; the others follow their
# neighbours.

# %%
#| export
LEVELS = ((6, 5, 3), (4, 3, 2), (3, 2, 1), (2, 2, 1)) # block side, steps, voxels a step

def _centres(blocks: Sequence[int], block: int) -> np.ndarray:
    "Middle of each block [voxel], (3, *blocks)"
    return (np.indices(blocks, np.float32)*block + (block - 1)/2).astype(np.float32)

def _at(u: np.ndarray, block: int, places: np.ndarray) -> np.ndarray:
    "A field on blocks at (3, ...) voxel positions, linear between the middles of blocks"
    from scipy.ndimage import map_coordinates
    q = (places - (block - 1)/2)/block
    return np.stack([map_coordinates(c, q, order=1, mode="nearest", output=np.float32) for c in u])

def _dense(u: np.ndarray, block: int, shape: Sequence[int]) -> np.ndarray:
    "A field on blocks at every voxel, (3, *shape) float32"
    for axis, n in enumerate(shape, 1):
        m = u.shape[axis]
        p = np.clip((np.arange(n) - (block - 1)/2)/block, 0, m - 1)
        i = np.minimum(p.astype(np.intp), max(m - 2, 0))
        f = (p - i).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        u = u.take(i, axis) + f*(u.take(np.minimum(i + 1, m - 1), axis) - u.take(i, axis))
    return u

def _warp_loop(img, u, out):
    nx, ny, nz = img.shape
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                x = min(max(i + u[0, i, j, k], np.float32(0)), np.float32(nx - 1))
                y = min(max(j + u[1, i, j, k], np.float32(0)), np.float32(ny - 1))
                z = min(max(k + u[2, i, j, k], np.float32(0)), np.float32(nz - 1))
                a, b, c = min(int(x), nx - 2), min(int(y), ny - 2), min(int(z), nz - 2)
                p, q, r = x - np.float32(a), y - np.float32(b), z - np.float32(c)
                v00 = img[a, b, c] + r*(img[a, b, c + 1] - img[a, b, c])
                v01 = img[a, b + 1, c] + r*(img[a, b + 1, c + 1] - img[a, b + 1, c])
                v10 = img[a + 1, b, c] + r*(img[a + 1, b, c + 1] - img[a + 1, b, c])
                v11 = img[a + 1, b + 1, c] + r*(img[a + 1, b + 1, c + 1] - img[a + 1, b + 1, c])
                v0, v1 = v00 + q*(v01 - v00), v10 + q*(v11 - v10)
                out[i, j, k] = v0 + p*(v1 - v0)

def _warp_arrays(img, u, out):
    from scipy.ndimage import map_coordinates
    for i in range(len(img)):
        at = u[:, i] + np.stack(np.broadcast_arrays(np.float32(i), *np.indices(img.shape[1:], sparse=True)))
        map_coordinates(img, at, output=out[i], order=1, mode="nearest")

def _warped(img: np.ndarray, u: np.ndarray, backend: str) -> np.ndarray:
    "img(i + u(i)), linear, edge value outside"
    out = np.empty(img.shape, np.float32)
    _kernel(_warp_loop, _warp_arrays, backend)(np.ascontiguousarray(img, np.float32), np.ascontiguousarray(u), out)
    return out

def make_inverse(
    u: np.ndarray, # (3, *blocks) from A to B [voxel]
    v: np.ndarray, # (3, *blocks) from B to A [voxel]
    block: int = 1, # side of a block [voxel]
    rounds: int = 10, # of averaging
) -> tuple[np.ndarray, np.ndarray]: # u and v, nearly inverse to each other
    "Pull two fields towards being each other's inverse"
    c = _centres(u.shape[1:], block)
    for _ in range(rounds): u, v = (0.5*(u - _at(v, block, c + u)), 0.5*(v - _at(u, block, c + v)))
    return u, v

# %%
c = _centres((9, 9, 9), 4)
one, two = (np.full((3, 9, 9, 9), x, np.float32) for x in (3, -1))
u, v = make_inverse(one, two, 4)
u[0, 4, 4, 4], v[0, 4, 4, 4]

# %%
assert np.abs(u - 2).max() < 1e-3 and np.abs(u + _at(v, 4, c + u)).max() < 1e-3
big = _dense(c, 4, (36, 36, 36))
assert close(big[:, 5, 20, 11], (5, 20, 11), 1e-4)

# %%
#| export
def discrete_search(
    fixed: np.ndarray, # (x, y, z) float32
    moving: np.ndarray, # (x, y, z) float32 on the same grid
    *,
    levels: Sequence[tuple[int, int, int]] = LEVELS, # block side [voxel], steps, voxels a step; coarse to fine
    fixed_valid: np.ndarray | None = None, # (x, y, z) bool, voxels that are known
    moving_valid: np.ndarray | None = None, # (x, y, z) bool
    extra: Callable | None = None, # field [voxel] or None -> codes of both images on this grid, to be added
    extra_weight: float = 1.0, # of the additional codes
    couplings: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), # see `coupled_convex`
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> np.ndarray: # (3, x, y, z) float32 [voxel]: fixed(i) is like moving(i + u(i))
    "Displacement field of two arrays on one grid, by discrete search from coarse to fine"
    if fixed.shape != moving.shape: raise DataError(f"arrays differ in shape, got {fixed.shape} and {moving.shape}")
    known = [np.ones(fixed.shape, bool) if m is None else np.asarray(m, bool) for m in (fixed_valid, moving_valid)]
    levels = [lv for lv in levels if min(fixed.shape)//lv[0] >= 2]
    if not levels: raise DataError(f"images of {fixed.shape} voxels are too small to be registered")
    seen, u, dense = {}, None, None # codes of the fixed image for each radius; field on blocks; field on voxels
    for n, (block, steps, quantum) in enumerate(levels):
        radius, blocks = quantum//2 + 1, tuple(k//block for k in fixed.shape)
        if radius not in seen: seen[radius] = ssc_codes(fixed, radius, valid=known[0], backend=backend)
        image = moving if dense is None else _warped(moving, dense, backend)
        valid = known[1] if dense is None or known[1].all() else _warped(known[1], dense, backend) > 0.5
        pair = (seen[radius], ssc_codes(image, radius, valid=valid, backend=backend))
        more = extra(dense) if extra is not None else None
        both = (known[0] & valid)[tuple(slice(0, m*block) for m in blocks)]
        both = both.reshape([k for m in blocks for k in (m, block)])
        weight = both.mean(axis=(1, 3, 5), dtype=np.float32)
        middles = _centres(blocks, block)
        prior = np.zeros((3, *blocks), np.float32) if u is None else _at(u, levels[n - 1][0], middles)
        answers = []
        for one, two, sign in ((0, 1, 1), (1, 0, -1)):
            cost = cost_volume(pair[one], pair[two], block, steps, quantum, backend=backend)
            if more is not None:
                cost += extra_weight*cost_volume(more[one], more[two], block, steps, quantum, backend=backend)
            cost *= weight[..., None]
            answers.append(quantum*coupled_convex(cost, sign*prior/quantum, couplings=couplings, backend=backend))
        d, _ = make_inverse(*answers, block)
        u = d if u is None else d + _at(u, levels[n - 1][0], middles + d)
        dense = _dense(u, block, fixed.shape)
    return dense

# %% [markdown]
# A known warp, an inverted and bent contrast, and noise. What counts is how far points are from where they should be.

# %%
shape = (72, 72, 56)
person = phantoms.head(shape, spacing=2.5).img
axes = [np.arange(n, dtype=float) for n in shape]
true = np.stack([2.5*phantoms.smooth_noise(axes, 24, rng_for(3, "warp", c)) for c in range(3)])
there = _warped(person, true, "auto")
bent = 90*np.sin(there/40) + rng_for(0, "n").normal(0, 2, shape)
u = discrete_search(bent, person)
inside = person > 20
size = lambda d: np.sqrt((d**2).sum(axis=0))[inside]
error = np.sqrt(((u - true)**2).sum(axis=0))
montage([v[:, :, 28].T[::-1] for v in (bent, person, _warped(person, u, "auto"), error)],
        titles=["fixed", "moving", "registered", "error"])

# %%
{"before": size(true).mean().round(2), "after": size(u - true).mean().round(2)}

# %%
assert size(u - true).mean() < 0.35*size(true).mean()
assert jacobian_report(Field(u, np.eye(4)))["fraction_folded"] < 1e-3

# %% [markdown]
# ## Going on with Adam
# A continuous descent can follow the search: the levels of the codes as twelve channels, mean squared difference plus
# $\lambda$ times the squared gradient of the correction, on every second voxel. ConvexAdam lives from it, because its
# last discrete level is coarse. After the four levels above there was nothing left to gain on the CT it was tried with,
# at three times their cost, so it is off unless steps are asked for.

# %%
#| export
def adam_refine(
    fixed: np.ndarray, # (x, y, z) uint64 codes
    moving: np.ndarray, # (x, y, z) uint64 codes
    u: np.ndarray, # (3, x, y, z) float32 to begin with [voxel]
    steps: int = 40, # of Adam
    *,
    every: int = 2, # distance of control points [voxel]
    smoothness: float = 5.0, # weight of the correction's squared gradient
    rate: float = 0.02, # of learning [voxel]
    weight: np.ndarray | None = None, # (x, y, z) what counts, such as a mask
) -> np.ndarray: # (3, x, y, z) float32 [voxel]
    "Improve a field by gradient descent on the codes' levels"
    def channels(codes: np.ndarray) -> torch.Tensor: return torch.from_numpy(code_levels(codes)).float()/5
    shape, blocks = fixed.shape, tuple(n//every for n in fixed.shape)
    middles = _centres(blocks, every)
    places = torch.from_numpy(middles)
    size = torch.tensor(shape, dtype=torch.float32).reshape(3, 1, 1, 1)
    def sampled(of: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        grid = ((at + 0.5)*2/size - 1).flip(0).permute(1, 2, 3, 0)[None]
        return F.grid_sample(of[None], grid, padding_mode="border", align_corners=False)[0]
    wanted, of = sampled(channels(fixed), places), channels(moving)
    counts = torch.ones(blocks) if weight is None else sampled(torch.from_numpy(np.asarray(weight, np.float32))[None],
                                                               places)[0]
    places = places + torch.from_numpy(_at(u, 1, middles))
    x = torch.zeros((3, *blocks), requires_grad=True) # the correction
    adam = torch.optim.Adam([x], lr=rate)
    for _ in range(steps):
        smooth = F.avg_pool3d(F.pad(x[None], (1,)*6, mode="replicate"), 3, stride=1)[0]
        loss = (((sampled(of, places + smooth) - wanted)**2).sum(dim=0)*counts).mean()
        loss = loss + smoothness*sum((smooth.diff(dim=d)**2).mean() for d in (1, 2, 3))/every**2
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad(): x = F.avg_pool3d(F.pad(x[None], (1,)*6, mode="replicate"), 3, stride=1)[0]
    return u + _dense(x.numpy(), every, shape)

# %%
refined = adam_refine(ssc_codes(bent), ssc_codes(person), u, 15)
size(u - true).mean().round(3), size(refined - true).mean().round(3)

# %%
assert size(refined - true).mean() < 1.2*size(u - true).mean()

# %% [markdown]
# ## In the world
# Engines share one contract: two volumes, a first guess and masks go in, a displacement in mm on the fixed image's
# field of view comes out. `"convex"` is the search above. `"deeds"` calls an installed deedsBCV with the published
# parameters: arguments as a list, never a shell, files in a private folder. It sees the two images alone: masks,
# vectors, levels and steps of Adam are for the search. Volumes may have any grid and orientation; the work is done on a
# grid of `spacing` mm along the fixed image's axes.

# %%
#| export
@dataclass(frozen=True)
class Deformation:
    "What an engine found"
    field: Field # p -> p + d(p) in the fixed image's world; the first guess follows it
    log: dict[str, Any] # engine, grid, seconds, Jacobian

def _on_grid(vol: Volume, init: Transform, grid: Volume) -> tuple[np.ndarray, np.ndarray]:
    "Moving image on the working grid, its edges repeated outside, and where it is known"
    shape, ones = grid.shape, Volume(np.ones(vol.shape, np.uint8), vol.affine)
    return (warp(vol, init, grid.affine, shape, fill="edge").data,
            warp(ones, init, grid.affine, shape, order=0, fill=0).data > 0)

def _mask_on(mask: np.ndarray | None, vol: Volume, init: Transform, grid: Volume, what: str) -> np.ndarray | None:
    if mask is None: return None
    if np.shape(mask) != vol.shape: raise DataError(f"{what}: shape {np.shape(mask)} for an image of {vol.shape}")
    whole = to_axes(Volume(np.asarray(mask, bool).astype(np.uint8), vol.affine, vol.axes), "xyz")
    return warp(whole, init, grid.affine, grid.shape, order=0, fill=0).data > 0

def _single(vol: Volume, what: str) -> Volume:
    "Axes xyz, float32, one finite number a voxel"
    if vol.channels is not None: raise DataError(f"{what}: one channel is needed, got axes {vol.axes}")
    data = np.asarray(vol.data[...], np.float32)
    if not np.isfinite(data).all(): raise DataError(f"{what}: {np.count_nonzero(~np.isfinite(data))} voxels are NaN "
                                                    f"or infinite. Replace them first")
    if data.min() == data.max(): raise DataError(f"{what}: every voxel is {data.min():g}, there is nothing to register")
    return to_axes(Volume(data, vol.affine, vol.axes, vol.meta), "xyz")

def working_grid(
    vol: Volume, # image without channels
    spacing: float = 2.0, # [mm]
) -> Volume: # xyz, float32, on a grid along its axes
    "The image as engines see it: smoothed and resampled to cubes"
    if not (np.isfinite(spacing) and spacing > 0): raise DataError(f"spacing: must be > 0 mm, got {spacing}")
    return resample(_single(vol, "image"), spacing)

def _searcher(features: Sequence[Volume], init: Transform, grid: Volume) -> Callable:
    "Codes of two volumes of vectors on the working grid, after a field"
    codes = []
    for v in features:
        v = to_axes(v, "cxyz")
        codes.append(Volume(vector_codes(np.asarray(v.data[...])), v.affine))
    still = warp(codes[0], Transform(), grid.affine, grid.shape, order=0, fill="edge").data
    def extra(u: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        steps = init.steps if u is None else (_in_mm(u, grid.affine), *init.steps)
        return still, warp(codes[1], Transform(steps), grid.affine, grid.shape, order=0, fill="edge").data
    return extra

def _in_mm(u: np.ndarray, affine: np.ndarray) -> Field:
    "Voxel displacements of a grid as a field in the world"
    return Field(np.einsum("ij,jxyz->ixyz", affine[:3, :3].astype(np.float32), u), affine)

# %%
#| export
DEEDS = ("-l", "3", "-G", "5x4x3", "-L", "5x4x3", "-Q", "2x2x1") # the published parameters

def _run_deeds(binary: str | os.PathLike, fixed: np.ndarray, moving: np.ndarray, grid: Volume) -> Field:
    "Displacements of an installed deedsBCV on the working grid"
    if not Path(binary).is_file(): raise MissingFile(f"deeds: {binary} does not exist. Give the path of deedsBCV")
    with tmpdir() as d:
        for name, data in (("fixed", fixed), ("moving", moving)):
            write_volume(Volume(np.ascontiguousarray(data, np.float32), grid.affine), d/f"{name}.nii.gz")
        call = [os.fspath(Path(binary).resolve()), "-F", str(d/"fixed.nii.gz"), "-M", str(d/"moving.nii.gz"),
                "-O", str(d/"out"), *DEEDS]
        done = subprocess.run(call, cwd=d, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise MedvolError(f"deeds ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
        return read_deeds_field(d/"out_displacements.dat", grid.affine, grid.shape, 3)

def register_deformable(
    fixed: Volume, # image without channels, any axes and contrast
    moving: Volume, # image without channels, any axes and contrast
    init: Transform = Transform(), # fixed -> moving, such as a robust affine
    *,
    fixed_mask: np.ndarray | None = None, # n-d bool on the array of `fixed`, what counts
    moving_mask: np.ndarray | None = None, # n-d bool on the array of `moving`
    features: tuple[Volume, Volume] | None = None, # vectors of both images with axes c and x, y, z, to be used, too
    feature_weight: float = 1.0, # of the vectors' costs
    engine: Literal["convex", "deeds"] = "convex", # the search of this page, or an installed deedsBCV
    deeds: str | os.PathLike | None = None, # path of the deedsBCV program
    spacing: float = 2.0, # of the working grid [mm]
    levels: Sequence[tuple[int, int, int]] = LEVELS, # block side [voxel], steps, voxels a step
    adam_steps: int = 0, # of continuous descent afterwards
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> Deformation: # field [mm] and log
    "Deformation from the fixed image to the moving one, after a first guess"
    start = time.perf_counter()
    if engine not in ("convex", "deeds"): raise ConfigError(f"engine: must be 'convex' or 'deeds', got {engine!r}")
    if engine == "deeds" and deeds is None: raise ConfigError("engine 'deeds': give the path of deedsBCV as deeds=")
    grid, mov = working_grid(fixed, spacing), _single(moving, "moving image")
    mov = resample(mov, np.maximum(mov.spacing, spacing))
    image, known = _on_grid(mov, init, grid)
    if not known.any(): raise DataError("the moving image is nowhere inside the fixed one after the first guess")
    valid = _mask_on(fixed_mask, fixed, Transform(), grid, "fixed_mask")
    inside = _mask_on(moving_mask, moving, init, grid, "moving_mask")
    if inside is not None: known &= inside
    if engine == "deeds": field = _run_deeds(deeds, grid.data, image, grid)
    else:
        extra = None if features is None else _searcher(features, init, grid)
        u = discrete_search(grid.data, image, levels=levels, fixed_valid=valid, moving_valid=known, extra=extra,
                            extra_weight=feature_weight, backend=backend)
        if adam_steps:
            both = known if valid is None else known & valid
            u = adam_refine(ssc_codes(grid.data, backend=backend), ssc_codes(image, backend=backend), u, adam_steps,
                            weight=both)
        field = _in_mm(u, grid.affine)
    log = {"engine": engine, "spacing": spacing, "shape": list(grid.shape), "adam_steps": adam_steps,
           "known": float(known.mean()), "jacobian": jacobian_report(field), "seconds": time.perf_counter() - start}
    return Deformation(field, log)

# %%
place = affine_from(2.5, (-80, -90, -60))
guess = Transform((affine_from(1.0, (4, -3, 5)),))
mr = Volume(bent.astype(np.float32), place)
ct = warp(Volume(person, place), Transform((affine_from(1.0, (-4, 3, -5)),)), affine_from((2.5, 2, 3), (-85, -95, -62)),
          (76, 95, 52))
found = register_deformable(mr, ct, guess, spacing=2.5)
pts = to_world(place, np.argwhere(inside)[::50])
truth = pts + 2.5*true[:, inside].T[::50] + (4, -3, 5)
off = np.linalg.norm(compose(Transform((found.field,)), guess)(pts) - truth, axis=1)
{"error [mm]": off.mean().round(2), **{k: v for k, v in found.log.items() if k in ("engine", "known")}}

# %%
assert off.mean() < 0.45*np.linalg.norm(2.5*true[:, inside], axis=0).mean()

# %%
with raises(DataError, match="nowhere inside"): register_deformable(mr, ct, Transform((affine_from(1.0, (999, 0, 0)),)))
with raises(DataError, match="nothing to register"): register_deformable(mr, Volume(np.ones((9, 9, 9)), np.eye(4)))
with raises(ConfigError, match="path of deedsBCV"): register_deformable(mr, ct, engine="deeds")
