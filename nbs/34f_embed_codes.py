# %% [markdown]
# # Codes of bits and what they cost
#
# > Voxels become 60 bits that survive a change of contrast; every displacement of a block is tried by counting bits.
#
# Two volumes of different contrast are to be laid over each other. This page has the three cheap pieces of the
# [search](35a_embed_deform.ipynb) that does it: a description of each voxel that CT and MR share, the dissimilarity of
# each block to each displaced block, and the choice among displacements that is cheap and smooth. Each exists twice, as
# a compiled loop and as calls of NumPy where numba is missing, and both give the same.

# %%
#| default_exp embed.codes

# %%
#| export
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from medvol_nb.core import ConfigError, DataError, MissingExtra, compiled, rng_for

# %%
from medvol_nb import phantoms
from medvol_nb.core import close, raises
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
