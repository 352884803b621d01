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
# This page takes the cheap half of each. Costs come from counting bits: eight voxels an instruction, so that all
# displacements of a level cost less than a second. Smoothness comes from the coupled convex iteration: it looks at the
# whole lattice, where a tree cuts two thirds of the edges and leaves steps across them. And since costs are cheap,
# there are four levels down to blocks of two voxels, in both directions, with minima interpolated between labels.

# %%
#| default_exp embed.deform

# %%
#| export
import math
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

from medvol_nb.core import ConfigError, DataError, MedvolError, MissingExtra, MissingFile, compiled, rng_for, tmpdir
from medvol_nb.embed.transforms import Field, Transform, jacobian_report, read_deeds_field, warp
from medvol_nb.geometry import Volume, resample, to_axes, to_world
from medvol_nb.volume import write_volume

# %%
from medvol_nb import phantoms
from medvol_nb.core import close, raises
from medvol_nb.embed.transforms import compose
from medvol_nb.geometry import affine_from
from medvol_nb.plot import montage

# %%
#| export
Backend = Literal["auto", "numba", "numpy"]

def _kernel(loop: Callable, arrays: Callable, backend: str) -> Callable:
    "The compiled loop, or its twin of NumPy calls where numba is missing"
    if backend not in ("auto", "numba", "numpy"):
        raise ConfigError(f"backend: must be 'auto', 'numba' or 'numpy', got {backend!r}")
    if backend == "numpy": return arrays
    try: return compiled(loop, "numpy")
    except MissingExtra:
        if backend == "numba": raise
        return arrays

# %% [markdown]
# ## Self-similarity in 60 bits
# CT and MR have nothing in common but structure. The self-similarity context (SSC) describes a voxel by how similar
# the patches *around* it are to each other, never by their values: six neighbours at distance $s$, twelve pairs of them
# that are $\sqrt2 s$ apart, for each the sum of squared differences of two patches of $(2s+1)^3$ voxels. The smallest
# of the twelve is subtracted, and the mean of what is left is the unit. Each of the twelve numbers is cut into six
# levels at $-\log\frac{i+1.5}{6}$ and written as a thermometer: level 3 of 5 is `11100`. The number of differing bits
# between two codes is then the sum of level differences, and one machine instruction counts it.

# %%
#| export
_SHIFTS = np.array([(1, 1, 0), (1, -1, 0), (1, 0, 1), (1, 0, -1), (0, 1, 1), (0, 1, -1)], np.int64)
_READS = np.array([[(-1, 0, 0), (0, -1, 0)], [(-1, 0, 0), (0, 1, 0)], [(-1, 0, 0), (0, 0, -1)],
                   [(-1, 0, 0), (0, 0, 1)], [(0, -1, 0), (0, 0, -1)], [(0, -1, 0), (0, 0, 1)]], np.int64)
_LEVELS = np.array([-math.log((i + 1.5)/6) for i in range(5)], np.float32)
_NEUTRAL = np.uint64(sum((0b11100 if c % 2 else 0b11000) << 5*c for c in range(12))) # halfway between all codes

def _codes_loop(img, s, shifts, reads, levels):
    nx, ny, nz = img.shape[0] - 6*s, img.shape[1] - 6*s, img.shape[2] - 6*s # the image comes padded by 3 s
    ax, ay, az, w = nx + 2*s, ny + 2*s, nz + 2*s, 2*s + 1
    maps = np.empty((6, ax, ay, az), np.float32)
    planes, strip = np.empty((w, ay, az), np.float32), np.empty((ay + 2*s, az), np.float32)
    row = np.empty(az + 2*s, np.float32)
    for m in range(6):
        h0, h1, h2 = shifts[m, 0]*s, shifts[m, 1]*s, shifts[m, 2]*s
        for i in range(ax + 2*s):
            for j in range(ay + 2*s):
                p, q = img[i + s, j + s, s:], img[i + s + h0, j + s + h1, s + h2:]
                for k in range(az + 2*s):
                    d = p[k] - q[k]
                    row[k] = d*d
                strip[j] = row[:az]
                for t in range(1, w):
                    for k in range(az): strip[j, k] += row[k + t]
            plane = planes[i % w]
            for j in range(ay):
                plane[j] = strip[j]
                for t in range(1, w):
                    for k in range(az): plane[j, k] += strip[j + t, k]
            if i < w - 1: continue
            for j in range(ay):
                o = maps[m, i - w + 1, j]
                o[:] = planes[0, j]
                for t in range(1, w):
                    for k in range(az): o[k] += planes[t, j, k]
    out = np.zeros((nx, ny, nz), np.uint64)
    v, low, unit = np.empty((12, nz), np.float32), np.empty(nz, np.float32), np.empty(nz, np.float32)
    for i in range(nx):
        for j in range(ny):
            low[:] = np.inf
            unit[:] = 0
            for c in range(12):
                o0, o1, o2 = reads[c//2, c % 2, 0] + 1, reads[c//2, c % 2, 1] + 1, reads[c//2, c % 2, 2] + 1
                src = maps[c//2, i + o0*s, j + o1*s, o2*s:]
                for k in range(nz):
                    x = src[k]
                    v[c, k] = x
                    unit[k] += x
                    low[k] = min(low[k], x)
            code = out[i, j]
            for k in range(nz): unit[k] = max(unit[k]/np.float32(12) - low[k], np.float32(1e-6))
            for c in range(12):
                for t in range(5):
                    bit, level = np.uint64(5*c + t), levels[t]
                    for k in range(nz): code[k] |= np.uint64(v[c, k] - low[k] > level*unit[k]) << bit
    return out

def _codes_arrays(img, s, shifts, reads, levels):
    from scipy.ndimage import uniform_filter
    n = [k - 6*s for k in img.shape]
    cut = lambda a, at, size: a[tuple(slice(o, o + k) for o, k in zip(at, size))]
    raw = []
    for shift, pair in zip(shifts*s, reads*s):
        size = [k + 4*s for k in n]
        d = cut(img, (s, s, s), size) - cut(img, shift + s, size)
        box = uniform_filter(d*d, 2*s + 1, mode="constant")*np.float32((2*s + 1)**3)
        raw += [cut(box, at + 2*s, n) for at in pair]
    v = np.stack(raw)
    v -= v.min(axis=0)
    unit, out = np.maximum(v.mean(axis=0), 1e-6), np.zeros(n, np.uint64)
    for c in range(12):
        for t in range(5): out |= (v[c] > levels[t]*unit).astype(np.uint64) << np.uint64(5*c + t)
    return out

# %%
#| export
def code_levels(
    codes: np.ndarray, # n-d uint64
) -> np.ndarray: # (12, ...) uint8, 0 to 5
    "The twelve numbers of each code"
    return np.stack([np.bitwise_count(codes & np.uint64(31 << 5*c)) for c in range(12)])

def ssc_codes(
    image: np.ndarray, # (x, y, z) intensities of any scale
    radius: int = 1, # of patches and their distance [voxel]
    *,
    valid: np.ndarray | None = None, # (x, y, z) bool; codes elsewhere are halfway between all others
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> np.ndarray: # (x, y, z) uint64, 12 thermometers of 5 bits
    "Describe each voxel by the similarity of the patches around it"
    if np.ndim(image) != 3: raise DataError(f"ssc_codes: an (x, y, z) array is needed, got shape {np.shape(image)}")
    img = np.asarray(image, np.float32)
    if not np.isfinite(img).all(): raise DataError("ssc_codes: the image holds NaN or infinite values")
    img = (img - img.mean())*np.float32(100/max(float(img.std()), 1e-12)) # differences of 1e-3 of the contrast count
    padded = np.pad(img, 3*radius, mode="edge")
    out = _kernel(_codes_loop, _codes_arrays, backend)(padded, radius, _SHIFTS, _READS, _LEVELS)
    if valid is not None: out[~np.asarray(valid, bool)] = _NEUTRAL
    return out

# %%
head = phantoms.head((40, 44, 36)).img
inverted = 120 - head
code, other = ssc_codes(head), ssc_codes(inverted)
montage([head[:, :, 18].T[::-1], *(code_levels(code)[c, :, :, 18].T[::-1] for c in (0, 4, 9)),
         np.bitwise_count(code ^ ssc_codes(np.roll(head, 3, 0)))[:, :, 18].T[::-1]],
        titles=["image", "pair 0", "pair 4", "pair 9", "bits to shifted image"])

# %%
assert np.bitwise_count(code ^ other).mean() < 0.02 and np.bitwise_count(code ^ ssc_codes(3*head + 7)).mean() < 0.05
assert np.bitwise_count(code ^ ssc_codes(head, backend="numpy")).mean() < 0.02
unknown, apart = code ^ ssc_codes(head, valid=head < -1), code ^ ssc_codes(np.roll(head, 9, 0))
assert 1 < np.bitwise_count(apart).mean() and 20 < np.bitwise_count(unknown).max() <= 36
with raises(DataError, match="NaN"): ssc_codes(np.full((9, 9, 9), np.nan))

# %% [markdown]
# Learned vectors take the same road. The signs of 60 fixed random projections are a code whose share of differing bits
# is, on average, the angle between two vectors divided by $\pi$ (Charikar, 2002); an
# [embedding](34_embed_store.ipynb) can vote beside the self-similarity or in its place.

# %%
#| export
def vector_codes(
    vectors: np.ndarray, # (c, x, y, z), such as an embedding
) -> np.ndarray: # (x, y, z) uint64 with 60 bits
    "Codes of vectors whose number of differing bits grows with the angle"
    v = np.asarray(vectors, np.float32)
    if v.ndim != 4: raise DataError(f"vector_codes: a (c, x, y, z) array is needed, got shape {v.shape}")
    directions = rng_for(0, "directions", v.shape[0]).standard_normal((60, v.shape[0]), dtype=np.float32)
    out, flat = np.zeros(v.shape[1:], np.uint64), v.reshape(len(v), -1)
    for bit, signs in enumerate(directions @ flat > 0):
        out |= signs.reshape(out.shape).astype(np.uint64) << np.uint64(bit)
    return out

# %%
a, b = (rng_for(0, "v", k).standard_normal((64, 20, 20, 20)) for k in (1, 2))
angles = np.linspace(0, np.pi, 5)
bits = [np.bitwise_count(vector_codes(a) ^ vector_codes(np.cos(t)*a + np.sin(t)*b)).mean() for t in angles]
np.round(bits, 1)

# %%
assert close(bits, [0, 15, 30, 45, 60], 2)

# %% [markdown]
# ## All displacements at once
# The image is cut into blocks of $G^3$ voxels. For each block and each of the $(2L+1)^3$ displacements in steps of $Q$
# voxels, the bits are counted between the block and the displaced block of the other image. The loop order makes it
# fast: for one displacement, whole rows of voxels are compared and added up over the block's rows, and only the sums
# are divided into blocks.

# %%
#| export
def _cost_loop(codes, padded, pad, G, L, Q, step, scale, out):
    nz, (mx, my, mz, _), w = codes.shape[2], out.shape, 2*L + 1
    c1, c2, c4 = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
    ones, u1, u2, u4, u56 = np.uint64(0x0101010101010101), np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(56)
    total = np.empty(nz, np.uint64)
    for cx in range(mx):
        for cy in range(my):
            for d in range(w**3):
                oz = pad + (d % w - L)*Q
                ox, oy = pad + (d//(w*w) - L)*Q, pad + (d//w % w - L)*Q
                total[:] = 0
                for i in range(cx*G, cx*G + G, step):
                    for j in range(cy*G, cy*G + G, step):
                        f, m = codes[i, j], padded[i + ox, j + oy, oz:oz + nz]
                        for k in range(nz): # the compiler makes this one population count
                            x = f[k] ^ m[k]
                            x = x - ((x >> u1) & c1)
                            x = (x & c2) + ((x >> u2) & c2)
                            x = (x + (x >> u4)) & c4
                            total[k] += (x*ones) >> u56
                for cz in range(mz):
                    s = np.uint64(0)
                    for k in range(cz*G, cz*G + G): s += total[k]
                    out[cx, cy, cz, d] += scale*np.float32(s)

def _cost_arrays(codes, padded, pad, G, L, Q, step, scale, out):
    (mx, my, mz, _), w = out.shape, 2*L + 1
    rows = lambda m: (np.arange(m)[:, None]*G + np.arange(0, G, step)).ravel()
    ix, iy, nz = rows(mx), rows(my), mz*G
    part, per = codes[np.ix_(ix, iy, np.arange(nz))], len(range(0, G, step))
    for d in range(w**3):
        ox, oy, oz = (pad + (k - L)*Q for k in (d//(w*w), d//w % w, d % w))
        bits = np.bitwise_count(part ^ padded[np.ix_(ix + ox, iy + oy, np.arange(oz, oz + nz))])
        sums = bits.reshape(mx, per, my, per, mz, G).sum(axis=(1, 3, 5), dtype=np.int64)
        out[..., d] += np.float32(scale)*sums

def cost_volume(
    codes: np.ndarray, # (x, y, z) uint64, codes of the image whose blocks look for a match
    others: np.ndarray, # (x, y, z) uint64, codes of the image in which they look
    block: int, # side of a block [voxel]
    steps: int, # displacements -steps...steps along each axis
    quantum: int = 1, # voxels a step
    *,
    out: np.ndarray | None = None, # array (*blocks, (2 steps + 1)**3) float32 to add to
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> np.ndarray: # array (*blocks, (2 steps + 1)**3) float32, mean level difference of a channel, 0 to 5
    "Dissimilarity of each block to each displaced block"
    blocks = tuple(n//block for n in codes.shape)
    if min(blocks) < 1: raise DataError(f"cost_volume: blocks of {block} voxels do not fit into {codes.shape}")
    if codes.shape != others.shape: raise DataError(f"cost_volume: shapes differ, {codes.shape} and {others.shape}")
    if out is None: out = np.zeros((*blocks, (2*steps + 1)**3), np.float32)
    pad, skip = steps*quantum, 2 if block > 4 else 1 # of large blocks every second row is enough
    scale = np.float32(1/(12*block*len(range(0, block, skip))**2))
    padded = np.pad(others, pad, mode="edge")
    _kernel(_cost_loop, _cost_arrays, backend)(codes, padded, pad, block, steps, quantum, skip, scale, out)
    return out

# %%
moved = np.roll(head, (4, -2, 0), (0, 1, 2))
cost = cost_volume(code, ssc_codes(moved), 6, 3, 2)
best = np.array(np.unravel_index(cost.mean(axis=(0, 1, 2)).argmin(), (7, 7, 7))) - 3
cost.shape, 2*best

# %%
assert (2*best).tolist() == [4, -2, 0]
assert close(cost, cost_volume(code, ssc_codes(moved), 6, 3, 2, backend="numpy"), 1e-5)
with raises(DataError, match="do not fit"): cost_volume(code, code, 64, 1)

# %% [markdown]
# ## The coupled convex iteration
# Wanted is a displacement $u$ for each block that is cheap, $C(u)$, and smooth. Both at once is hard; one at a time is
# easy (Chambolle's coupling, used by Heinrich et al., 2014): with a smooth field $v$, each block takes $u =
# \arg\min C(u) + \alpha\|u - v\|^2$ on its own, then $v$ is the smoothed $u$. $\alpha$ rises from nearly free to nearly
# bound. The minimum is searched exactly but not everywhere: a row of labels whose quadratic term alone exceeds the best
# sum so far is left out. A parabola through the neighbours of the best label gives the fraction of a step.

# %%
#| export
def _choose_loop(cost, v, alpha, w, out):
    L, nd = (w - 1)//2, w*w*w
    stride, at = np.array([w*w, w, 1]), np.empty(3, np.int64)
    for n in range(cost.shape[0]):
        c, floor = cost[n], np.float32(np.inf)
        for k in range(nd): floor = min(floor, c[k])
        best, found = np.float32(np.inf), 0
        for a in range(3): at[a] = min(max(int(np.rint(v[n, a])) + L, 0), w - 1)
        start = at[0]*w*w + at[1]*w + at[2]
        limit = np.float32(0)
        for a in range(3): limit += alpha*(v[n, a] + L - at[a])**2
        limit += c[start]
        best, found = limit, start
        for a in range(w):
            ea = alpha*(v[n, 0] + L - a)**2
            if ea + floor > best: continue
            for b in range(w):
                eb = ea + alpha*(v[n, 1] + L - b)**2
                if eb + floor > best: continue
                k = (a*w + b)*w
                for e in range(w):
                    x = c[k + e] + eb + alpha*(v[n, 2] + L - e)**2
                    if x < best: best, found = x, k + e
        for a in range(3):
            i = found//stride[a] % w
            u = np.float32(i - L)
            if 0 < i < w - 1:
                d = v[n, a] - u
                low = c[found - stride[a]] - c[found] + alpha*(1 + 2*d)
                high = c[found + stride[a]] - c[found] + alpha*(1 - 2*d)
                if low + high > 0: u += np.float32(0.5)*(low - high)/(low + high)
            out[n, a] = u

def _choose_arrays(cost, v, alpha, w, out):
    L = (w - 1)//2
    steps, stride = np.arange(-L, L + 1, dtype=np.float32), (w*w, w, 1)
    for rows in np.array_split(np.arange(len(cost)), max(1, cost.size//20_000_000)):
        c, s = cost[rows], v[rows]
        e = [alpha*(s[:, a, None] - steps)**2 for a in range(3)]
        total = (c.reshape(-1, w, w, w) + e[0][:, :, None, None] + e[1][:, None, :, None] + e[2][:, None, None, :])
        total = total.reshape(len(rows), -1)
        start = np.clip(np.rint(s).astype(np.intp) + L, 0, w - 1) @ np.array(stride)
        found, at = total.argmin(axis=1), lambda k, total=total: np.take_along_axis(total, k[:, None], 1)[:, 0]
        found = np.where(at(found) < at(start), found, start) # of equal ones the nearest
        here = at(found)
        for a in range(3):
            i = found//stride[a] % w
            inner = (i > 0) & (i < w - 1)
            low, high = (at(np.where(inner, found + d*stride[a], found)) - here for d in (-1, 1))
            part = np.where(inner & (low + high > 0), 0.5*(low - high)/np.maximum(low + high, 1e-20), 0)
            out[rows, a] = i - L + part

def coupled_convex(
    cost: np.ndarray, # array (*blocks, (2 steps + 1)**3) float32
    prior: np.ndarray, # (3, *blocks) displacement that is there already, in steps; the sum is to be smooth
    *,
    couplings: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), # alpha of each iteration, in cost a squared step
    backend: Backend = "auto", # "numba", "numpy", or whichever is there
) -> np.ndarray: # (3, *blocks) float32 [step], to be added to the prior
    "Displacement of each block that is cheap and smooth"
    from scipy.ndimage import uniform_filter
    blocks, w = cost.shape[:-1], round(cost.shape[-1]**(1/3))
    choose, flat = _kernel(_choose_loop, _choose_arrays, backend), cost.reshape(-1, cost.shape[-1])
    u, v = np.empty((len(flat), 3), np.float32), np.zeros((len(flat), 3), np.float32)
    p = np.asarray(prior, np.float32)
    for alpha in (0.0, *couplings): # the first choice is free
        if alpha:
            total = u.T.reshape(3, *blocks) + p
            for _ in range(2): total = np.stack([uniform_filter(c, 3, mode="nearest") for c in total])
            v = np.ascontiguousarray((total - p).reshape(3, -1).T)
        choose(flat, v, np.float32(alpha), w, u)
    return np.ascontiguousarray(u.T).reshape(3, *blocks)

# %%
found = coupled_convex(cost, np.zeros((3, *cost.shape[:3])))*2
free = np.stack(np.unravel_index(cost.argmin(axis=-1), (7, 7, 7)))*2 - 6
middle = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
{"free choice": np.abs(free - [[[[4]]], [[[-2]]], [[[0]]]])[middle].mean().round(2),
 "coupled": np.abs(found - [[[[4]]], [[[-2]]], [[[0]]]])[middle].mean().round(2)}

# %%
assert np.abs(found - [[[[4]]], [[[-2]]], [[[0]]]])[middle].mean() < 0.35
assert close(found, coupled_convex(cost, np.zeros((3, *cost.shape[:3])), backend="numpy")*2, 1e-2)

# %% [markdown]
# ## From level to level
# Four levels: blocks of 6, 4, 3 and 2 voxels, steps of 3, 2, 1 and 1. Together they reach 26 voxels, 52 mm at 2 mm. At
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
# parameters: arguments as a list, never a shell, files in a private folder. Volumes may have any grid and orientation;
# the work is done on a grid of `spacing` mm along the fixed image's axes.

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
