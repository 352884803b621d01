# %% [markdown]
# # Kernels of label ensembles
#
# > Painting, voting, warping and distances on label grids: compiled where numba is there, tensors where it is not.
#
# A label ensemble is thirty organ shapes on one grid, painted over each other. Done as written, each shape is resampled
# over the whole grid, and the next one covers most of it again. The four inner loops of this page do the same work the
# other way round, and touch a voxel as rarely as possible. Each exists twice: as a plain loop that
# [numba](https://numba.pydata.org) compiles at its first call, and as tensor operations for GPUs and for computers
# without numba. Both give the same numbers to the last bit, which fixes every rounding step: coordinates are float64,
# summed from left to right; the mask's displacement is float32 as PyTorch computes it.

# %%
#| default_exp synth.kernels

# %%
#| export
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medvol_nb.core import ConfigError, DataError, MissingExtra, compiled, optional
from medvol_nb.synth.templates import TemplateBank

if TYPE_CHECKING: import torch

# %%
from medvol_nb.core import raises, rng_for
from medvol_nb.phantoms import ball, ellipsoid
from medvol_nb.plot import montage
from medvol_nb.synth.templates import procedural_bank

# %%
#| export
Backend = Literal["auto", "numba", "torch"]

def choose_backend(
    backend: Backend = "auto", # "auto": numba if it is there and the work is on the CPU
    device: str = "cpu", # where the work is done
) -> Literal["numba", "torch"]: # what will be used
    "Which of the two implementations serves"
    if backend not in ("auto", "numba", "torch"):
        raise ConfigError(f"backend: must be 'auto', 'numba' or 'torch', got {backend!r}")
    on_cpu = str(device) == "cpu"
    if backend == "numba" and not on_cpu:
        raise ConfigError(f"backend: numba works on the CPU, not on {device}. Use backend='torch' (--backend torch)")
    if backend != "auto": return backend
    try: optional("numba", "fast")
    except MissingExtra: return "torch"
    return "numba" if on_cpu else "torch"

# %%
choose_backend(), choose_backend(device="cuda")

# %%
with raises(ConfigError, match="'auto', 'numba' or 'torch'"): choose_backend("cupy")
with raises(ConfigError, match="numba works on the CPU"): choose_backend("numba", "cuda")

# %% [markdown]
# ## Painting from the last shape to the first
# A `Scene` says for each shape how a voxel $x$ of the grid finds its place in the template: $i = \lfloor A x + t +
# \tfrac12 \rfloor$, perhaps modulo a period $W$, minus the corner of the template's box. Later shapes cover earlier
# ones. So the painter begins with the *last* shape and never asks about a voxel again that has its colour.
#
# Along a row of voxels the place moves on a straight line. The box of a shape fills a few percent of its period, so
# most of the row lies outside. For each axis a division tells after how many voxels the line enters the box, and the
# painter jumps there; inside it tests bit by bit, with exact integer bounds. A jump is rounded down, so rounding can
# cost a test but never a voxel.

# %%
#| export
@dataclass(frozen=True)
class Scene:
    "Shapes and their places on a grid"
    shape: tuple[int, int, int] # size of the grid [voxel]
    templates: np.ndarray # (n,) int64, index in the bank
    matrices: np.ndarray # (n, 3, 3) float64, grid -> template [voxel]
    shifts: np.ndarray # (n, 3) float64 [voxel]
    low: np.ndarray # (n, 3) int64, corner of the template's box
    period: np.ndarray # (n, 3) int64 [voxel]; 0: the shape appears once
    labels: np.ndarray # (n,) int64 number that the shape writes; 0 writes nothing
    dtype: np.dtype # of the painted labels

def _paint_rows(out, bits, starts, sizes, low, period, matrices, shifts, labels):
    nx, ny, nz = out.shape
    left = np.full((nx, ny), nz, np.int32) # voxels of each row that are still free
    c, corner, per_step, per_turn = np.empty(3), np.empty(3, np.int64), np.empty(3), np.empty(3)
    for k in range(len(starts) - 1, -1, -1):
        if labels[k] == 0: continue
        m, label, start = matrices[k], labels[k], starts[k]
        (b0, b1, b2), (w0, w1, w2) = sizes[k], period[k]
        for a in range(3):
            per_step[a] = 1/m[a, 2] if m[a, 2] != 0 else 0.0
            per_turn[a] = 1/period[k, a] if period[k, a] > 0 else 0.0
        for x in range(nx):
            for y in range(ny):
                if left[x, y] == 0: continue
                for a in range(3): c[a] = shifts[k, a] + m[a, 0]*x + m[a, 1]*y
                z = 0
                while z < nz:
                    skip, run = 0.0, float(nz) # voxels to the box, and inside of it to its end
                    for a in range(3):
                        u, s, b, w = c[a] + m[a, 2]*z - low[k, a] + 0.5, per_step[a], sizes[k, a], period[k, a]
                        turns = int(math.floor(u*per_turn[a]))
                        u -= turns*w
                        corner[a] = low[k, a] + turns*w
                        if -1e-6 < u < b + 1e-6:
                            if s > 0: run = min(run, (b - u)*s)
                            elif s < 0: run = min(run, -u*s)
                        elif w > 0 and u > w - 1e-6: run = 0.0
                        elif s > 0 and (w > 0 or u < 0): skip = max(skip, (w - u)*s if w > 0 else -u*s)
                        elif s < 0 and u > b: skip = max(skip, (b - u)*s)
                        else: skip = float(nz)
                    if skip > 0:
                        z += max(1, int(min(skip - 1e-6, float(nz))))
                        continue
                    end = min(nz, z + 1 + max(0, int(run)))
                    c0, c1, c2, m0, m1, m2 = c[0], c[1], c[2], m[0, 2], m[1, 2], m[2, 2]
                    l0, l1, l2, row = corner[0], corner[1], corner[2], out[x, y]
                    first, z = z, end
                    for v in range(first, end):
                        if row[v] != 0: continue
                        i, j, h = c0 + m0*v + 0.5 - l0, c1 + m1*v + 0.5 - l1, c2 + m2*v + 0.5 - l2
                        if w0 > 0 and (i < 0 or i >= w0): i -= math.floor(i/w0)*w0 # only at the ends of a run
                        if w1 > 0 and (j < 0 or j >= w1): j -= math.floor(j/w1)*w1
                        if w2 > 0 and (h < 0 or h >= w2): h -= math.floor(h/w2)*w2
                        if i < 0 or j < 0 or h < 0 or i >= b0 or j >= b1 or h >= b2: continue
                        at = (int(i)*b1 + int(j))*b2 + int(h)
                        if bits[start + (at >> 3)] >> (at & 7) & 1:
                            row[v] = label
                            left[x, y] -= 1

# %%
#| export
def _paint_tensor(scene: Scene, bank: TemplateBank, device: str) -> "torch.Tensor":
    "Shape by shape over the voxels that are still free, axis by axis, in slabs that fit the cache"
    import torch
    (nx, ny, nz), x, y, z = scene.shape, *(torch.arange(n, dtype=torch.float64, device=device) for n in scene.shape)
    out = torch.zeros(scene.shape, dtype=torch.int32, device=device)
    thick = max(1, 2**18//(ny*nz)) if device == "cpu" else nx
    def place(k: int, a: int, x: Any, y: Any, z: Any) -> Any:
        (m0, m1, m2), w = scene.matrices[k, a].tolist(), int(scene.period[k, a])
        i = (float(scene.shifts[k, a]) + m0*x + m1*y) + m2*z
        i.add_(0.5).floor_().sub_(int(scene.low[k, a]))
        return i.sub_((i/w).floor_().mul_(w)) if w else i
    for k in reversed(range(len(scene.templates))):
        if scene.labels[k] == 0: continue
        template = int(scene.templates[k])
        size, bits = bank.shapes[template].tolist(), torch.from_numpy(np.array(bank.packed(template))).to(device)
        share = [b/(int(scene.period[k, a]) or scene.shape[a]) for a, b in enumerate(size)]
        first, *others = sorted(range(3), key=lambda a: share[a])
        for x0 in range(0, nx, thick):
            slab = out[x0:x0 + thick].view(-1)
            i = place(k, first, x[x0:x0 + thick, None, None], y[:, None], z).view(-1)
            voxels = torch.nonzero((i >= 0) & (i < size[first]) & (slab == 0)).view(-1)
            found = {first: i[voxels]}
            for a in others:
                i = place(k, a, x[x0 + voxels//(ny*nz)], y[voxels//nz % ny], z[voxels % nz])
                inside = (i >= 0) & (i < size[a])
                voxels, found = voxels[inside], {b: v[inside] for b, v in found.items()} | {a: i[inside]}
            bit = ((found[0]*size[1] + found[1])*size[2] + found[2]).long()
            hit = (bits[bit >> 3] >> (bit & 7)) & 1
            slab[voxels[hit.bool()]] = int(scene.labels[k])
    return out

def paint(
    scene: Scene, # what to paint
    bank: TemplateBank, # its shapes
    backend: Backend = "auto", # implementation
    device: str = "cpu", # for the backend "torch"
) -> Any: # (x, y, z) NumPy array of the scene's dtype, or int32 tensor on `device` for the backend "torch"
    "Paint all shapes, later ones over earlier ones; 0 where there is none"
    if len(scene.templates) and int(scene.templates.max()) >= len(bank):
        raise DataError(f"paint: template {int(scene.templates.max())} is asked for, the bank has {len(bank)}. Use the "
                        "bank that the plan was drawn for")
    if choose_backend(backend, device) == "torch": return _paint_tensor(scene, bank, device)
    out = np.zeros(scene.shape, scene.dtype)
    t = scene.templates
    bits = bank.bits if type(bank.bits) is np.ndarray else np.asarray(bank.bits)
    compiled(_paint_rows)(out, bits, bank.starts[t], bank.shapes[t], scene.low, scene.period, scene.matrices,
                          scene.shifts, scene.labels)
    return out

# %% [markdown]
# Three scenes of 6, 9 and 30 shapes; in the first and the last shapes repeat. `literal` beside them does what the
# definition says, voxel by voxel.

# %%
bank = procedural_bank(12, seed=2, size=(10, 30))
rng = rng_for(0, "kernels")

def scene_of(shape, n, period):
    t = rng.integers(0, len(bank), n)
    low = (np.array(shape) - bank.shapes[t] + 1)//2
    wide = np.maximum(shape, bank.shapes[t])*period
    return Scene(shape, t, rng.normal(0, 0.8, (n, 3, 3)), rng.uniform(-9, 40, (n, 3)), low, wide,
                 np.arange(1, n + 1), np.dtype(np.uint8))

def literal(scene):
    out = np.zeros(scene.shape, np.uint8)
    xyz = np.stack(np.meshgrid(*map(np.arange, scene.shape), indexing="ij"))
    for k, t in enumerate(scene.templates):
        m = scene.matrices[k][:, :, None, None, None]
        at = np.floor(scene.shifts[k].reshape(3, 1, 1, 1) + m[:, 0]*xyz[0] + m[:, 1]*xyz[1] + m[:, 2]*xyz[2] + 0.5)
        at = at.astype(int) - scene.low[k].reshape(3, 1, 1, 1)
        if scene.period[k].all(): at %= scene.period[k].reshape(3, 1, 1, 1)
        inside = ((at >= 0) & (at < bank.shapes[t].reshape(3, 1, 1, 1))).all(axis=0)
        at = np.where(inside, at, 0)
        out[inside & bank[t][tuple(at)]] = scene.labels[k]
    return out

scenes = [scene_of((40, 37, 5), 6, 1), scene_of((20, 30, 44), 9, 0), scene_of((3, 50, 21), 30, 1)]
painted = [paint(s, bank) for s in scenes]
montage([p[:, :, 2] for p in painted[:2]], lbls=[p[:, :, 2] for p in painted[:2]], titles=["periodic", "once"])

# %%
for s, p in zip(scenes, painted):
    expected = literal(s)
    assert np.array_equal(p, expected) and np.array_equal(paint(s, bank, "torch").numpy(), expected)

# %%
with raises(DataError, match="the bank has 3"): paint(scenes[0], procedural_bank(3, size=(8, 9)))

# %% [markdown]
# ## The value of most neighbours
# Thin leftovers are removed with a filter over the 27 neighbours of a voxel (edge values repeated). The reference takes
# the *median of the label numbers*, which is no statement about regions: between region 2 and region 9 it can put a
# layer of region 5. The alternative is a *vote*: the most frequent number wins, the voxel's own on a tie, then the
# smallest. A number that fills more than half of the neighbourhood wins under both rules; counting the voxel's own
# number is quick, and leaves a few percent of the voxels to be looked at closely.

# %%
#| export
def _filter_rows(lbl, out, vote):
    nx, ny, nz = lbl.shape
    same, near = np.empty(nz, np.uint8), np.empty(27, lbl.dtype)
    for x in range(nx):
        for y in range(ny):
            own, same[:] = lbl[x, y], 0
            for i in range(x - 1, x + 2):
                for j in range(y - 1, y + 2):
                    row = lbl[min(max(i, 0), nx - 1), min(max(j, 0), ny - 1)]
                    for z in range(1, nz - 1):
                        same[z] += np.uint8(np.uint8(row[z - 1] == own[z]) + np.uint8(row[z] == own[z])
                                            + np.uint8(row[z + 1] == own[z]))
            for z in range(nz):
                out[x, y, z] = own[z]
                if same[z] >= 14: continue # more than half: it is the median and wins the vote
                a, b, n = max(z - 1, 0), min(z + 1, nz - 1), 0
                for i in range(x - 1, x + 2):
                    for j in range(y - 1, y + 2):
                        row = lbl[min(max(i, 0), nx - 1), min(max(j, 0), ny - 1)]
                        near[n], near[n + 1], near[n + 2] = row[a], row[z], row[b]
                        n += 3
                value, most = near.min(), near.max()
                seen = best = 0
                while True: # distinct values from the smallest to the largest
                    count, following = 0, most
                    for n in range(27):
                        v = near[n]
                        count += v == value
                        if v > value and v < following: following = v
                    seen += count
                    score = 2*count + (value == own[z])
                    if (vote and score > best) or (not vote and seen >= 14): best, out[x, y, z] = score, value
                    if value == most or (seen >= 14 and not vote): break
                    value = following

def _unsettled(lbl: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    "Voxels whose own label does not fill half of the 27 neighbours, and these neighbours (27, n)"
    import torch
    ends = [torch.arange(-1, n + 1, device=lbl.device).clamp(0, n - 1) for n in lbl.shape]
    padded = lbl.index_select(0, ends[0]).index_select(1, ends[1]).index_select(2, ends[2])
    (nx, ny, nz), steps = lbl.shape, [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]
    same = torch.zeros(lbl.shape, dtype=torch.uint8, device=lbl.device)
    for i, j, k in steps: same += padded[i:i + nx, j:j + ny, k:k + nz] == lbl
    open_ = same < 14
    x, y, z = torch.nonzero(open_, as_tuple=True)
    return open_, torch.stack([padded[x + i, y + j, z + k] for i, j, k in steps])

def _filter_tensor(lbl: "torch.Tensor", vote: bool) -> "torch.Tensor":
    import torch
    open_, near = _unsettled(lbl)
    near, out = near.int(), lbl.clone()
    if vote:
        counts = torch.stack([(near == v).sum(0, dtype=torch.int32) for v in near])
        score = (2*counts + (near == near[13]).int())*2**20 - near # ties go to the smallest number
        out[open_] = near.gather(0, score.argmax(0)[None])[0].to(out.dtype)
    else:
        value = torch.zeros(near.shape[1], dtype=near.dtype, device=near.device)
        for bit in reversed(range(max(1, int(lbl.max())).bit_length())): # the 14th smallest, bit by bit
            higher = value + (1 << bit)
            value = torch.where((near < higher).sum(0) <= 13, higher, value)
        out[open_] = value.to(out.dtype)
    return out

def filter_labels(
    lbl: Any, # (x, y, z) NumPy array uint8 or uint16, or a tensor of integers >= 0
    rule: Literal["median", "vote"] = "median", # of the numbers, or the most frequent one
    backend: Backend = "auto", # implementation
) -> Any: # array or tensor as `lbl`
    "Replace each label by the one its 3 x 3 x 3 neighbourhood stands for"
    if rule not in ("median", "vote"): raise ConfigError(f"rule: must be 'median' or 'vote', got {rule!r}")
    if not isinstance(lbl, np.ndarray): return _filter_tensor(lbl, rule == "vote")
    if choose_backend(backend) == "torch":
        import torch
        narrow = np.uint8 if lbl.dtype == np.uint8 else np.int32
        return _filter_tensor(torch.from_numpy(lbl.astype(narrow)), rule == "vote").numpy().astype(lbl.dtype)
    out = np.empty_like(lbl, order="C")
    compiled(_filter_rows)(np.ascontiguousarray(lbl), out, rule == "vote")
    return out

# %%
from scipy.ndimage import median_filter

plates = np.zeros((24, 24, 3), np.uint8)
plates[12:] = 9
plates[(np.arange(24)[:, None, None] + np.arange(24)[:, None] > 24) & (plates == 0)] = 5
rough = np.where(rng.random(plates.shape) < 0.15, 3, plates).astype(np.uint8)
filtered = {"before": rough, **{r: filter_labels(rough, r) for r in ("median", "vote")}}
montage([f[:, :, 1] for f in filtered.values()], lbls=[f[:, :, 1] for f in filtered.values()], titles=list(filtered))

# %%
assert np.array_equal(filtered["median"], median_filter(rough, 3, mode="nearest"))
for rule in ("median", "vote"):
    assert np.array_equal(filter_labels(rough, rule, "torch"), filtered[rule])
corner = np.array([[[2, 2, 2]]*3, [[2, 5, 9]]*3, [[9, 9, 9]]*3], np.uint8) # 5 is an outsider between 2 and 9
assert filter_labels(corner, "median")[1, 1, 1] == 5 and filter_labels(corner, "vote")[1, 1, 1] in (2, 9)

# %%
with raises(ConfigError, match="'median' or 'vote'"): filter_labels(rough, "mean")

# %% [markdown]
# ## A ball with a wavy surface
# The foreground mask is a ball that is sampled at displaced places. The displacement is noise on three coarse grids,
# interpolated linearly, added up. Interpolation is separable: along z and y it is done once on small tables, and
# along x on the fly. `fused` rounds as the fused multiply-add of processors does, so that the result is that of
# `torch.nn.functional.interpolate` to the last bit, on any computer.

# %%
#| export
def fused(
    a: np.ndarray, # array float32
    b: np.ndarray, # array float32
    c: np.ndarray, # array float32
) -> np.ndarray: # array float32
    "a*b + c with a single rounding"
    return (a.astype(np.float64)*b + c).astype(np.float32)

def _taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    "Neighbours and weights of linear interpolation with centred pixels"
    step = np.float32(n_in)/np.float32(n_out)
    at = np.maximum(fused(np.arange(n_out, dtype=np.float32) + np.float32(0.5), step, np.float32(-0.5)), np.float32(0))
    low = np.minimum(at.astype(np.int64), n_in - 1)
    high = np.clip(at - low.astype(np.float32), np.float32(0), np.float32(1))
    return low, np.minimum(low + 1, n_in - 1), np.float32(1) - high, high

def _spread_rows(noise, i, j, wi, wj, out):
    for a in range(len(noise)):
        for k in range(len(i)):
            p, q, low, high = noise[a, i[k]], noise[a, j[k]], np.float64(wi[k]), wj[k]
            for b in range(noise.shape[2]):
                out[a, k, b] = np.float32(np.float64(p[b])*low + np.float64(np.float32(q[b]*high)))

def _spread(noise: np.ndarray, axis: int, n: int, backend: Backend = "auto") -> np.ndarray:
    "Interpolate along one axis to `n` places"
    i, j, wi, wj = _taps(noise.shape[axis], n)
    if choose_backend(backend) == "numba":
        shape, out_shape = noise.shape, (*noise.shape[:axis], n, *noise.shape[axis + 1:])
        flat = np.ascontiguousarray(noise).reshape(math.prod(shape[:axis]), shape[axis], -1)
        out = np.empty((len(flat), n, flat.shape[2]), np.float32)
        compiled(_spread_rows)(flat, i, j, wi, wj, out)
        return out.reshape(out_shape)
    across = [-1 if k == axis else 1 for k in range(noise.ndim)]
    return fused(noise.take(i, axis), wi.reshape(across), noise.take(j, axis)*wj.reshape(across))

@dataclass(frozen=True)
class Waves:
    "Displacement of a grid: noise on coarse grids, interpolated along y and z, not yet along x"
    shape: tuple[int, int, int] # of the grid
    tables: tuple[np.ndarray, ...] # one a scale, each (3, gx, y, z) float32 [voxel]; component 0 moves along z
    taps: tuple[tuple[np.ndarray, ...], ...] # one a scale: neighbours (x,), (x,) and weights (x,), (x,)

    @classmethod
    def of(
        cls,
        noise: Sequence[np.ndarray], # one a scale, each (3, gx, gy, gz) float32 [voxel]
        shape: Sequence[int], # of the grid
        backend: Backend = "auto", # implementation
    ) -> "Waves": # ready to be sampled
        "Interpolate noise along two of three axes"
        shape = tuple(int(n) for n in shape)
        tables = tuple(_spread(_spread(n, 3, shape[2], backend), 2, shape[1], backend) for n in noise)
        return cls(shape, tables, tuple(_taps(n.shape[1], shape[0]) for n in noise))

    def row(
        self,
        x: int, # which plane
    ) -> np.ndarray: # (3, y, z) float32 [voxel], component 0 moves along z
        "Displacement of one plane"
        out = np.zeros((3, *self.shape[1:]), np.float32)
        for t, (i, j, wi, wj) in zip(self.tables, self.taps): out += fused(t[:, i[x]], wi[x], t[:, j[x]]*wj[x])
        return out

def _corners(n: int) -> np.ndarray: return np.linspace(-1, 1, n).astype(np.float32) # (n,) grid from corner to corner

def _sampled(g: np.ndarray, d: np.ndarray, n: int, centred: bool) -> np.ndarray:
    "Nearest voxel at displacement `d` from the places `g`, reflected at the borders; float32 steps as in grid_sample"
    one, size = np.float32(1), np.float32(n)
    if centred or n == 1: at = g + d
    else: at = ((g + d/np.float32((n - 1)/2) + one)*size - one)/np.float32(2)
    off = np.abs(at + np.float32(0.5))
    turns, rest = np.floor(off/size), np.fmod(off, size)
    at = np.where(turns % 2 == 0, rest - np.float32(0.5), size - rest + np.float32(-0.5))
    return np.rint(np.clip(at, 0, n - 1)).astype(np.int64)

# %%
#| export
def _wavy_rows(out, places, tables, lows, highs, weights_low, weights_high, centre, radius, centred):
    "`tables`: (scales, 3, gx, y, z) zero-padded; `places`: three axes of the grid in the sampler's unit"
    nx, ny, nz = out.shape
    size, far, d = np.array([nz, ny, nx]), np.empty(nz, np.float32), np.empty((3, nz), np.float32)
    bound = np.float32(size.min()/2)
    half, one, two = np.float32(0.5), np.float32(1), np.float32(2)
    inner, outer = np.float32(max(radius - 1, 0)**2), np.float32((radius + 1)**2)
    for x in range(nx):
        for y in range(ny):
            far[:], d[:] = 0, 0
            for c in range(3): # first about where each voxel goes; component 0 moves along the last axis
                for s in range(len(lows)):
                    a, b = weights_low[s, x], weights_high[s, x]
                    p, q = tables[s, c, lows[s, x], y], tables[s, c, highs[s, x], y]
                    for z in range(nz): d[c, z] += a*p[z] + b*q[z]
                n, middle = np.float32(size[c]), np.float32(centre[2 - c])
                unit = one if centred or size[c] == 1 else n/np.float32(size[c] - 1)
                start = np.float32(0 if c == 0 else y if c == 1 else x)
                step = one if c == 0 else np.float32(0)
                ground = np.float32(0) if centred or size[c] == 1 else -half
                for z in range(nz):
                    off = abs((start + step*np.float32(z) + d[c, z])*unit + ground + half)
                    if off > n: off = two*n - off
                    far[z] += (off - half - middle)**2
            for z in range(nz):
                out[x, y, z] = far[z] < inner
            for z in range(nz): # then exactly, where rounding decides
                sure = far[z] < inner or far[z] >= outer
                if sure and max(abs(d[0, z]), abs(d[1, z]), abs(d[2, z])) < bound: continue
                total = 0
                for c in range(3):
                    move = np.float32(0)
                    for s in range(len(lows)):
                        p = np.float64(tables[s, c, lows[s, x], y, z])*np.float64(weights_low[s, x])
                        q = tables[s, c, highs[s, x], y, z]*weights_high[s, x]
                        move += np.float32(p + np.float64(q))
                    n = size[c]
                    width, g = np.float32(n), places[c, z if c == 0 else y if c == 1 else x]
                    if centred or n == 1: at = g + move
                    else: at = ((g + move/np.float32((n - 1)/2) + one)*width - one)/two
                    off = abs(at + half)
                    turns, rest = int(off/width), off
                    if turns: rest = np.fmod(off, width)
                    at = rest - half if turns % 2 == 0 else width - rest - half
                    i = np.int64(np.rint(min(max(at, np.float32(0)), np.float32(n - 1))))
                    total += (i - centre[2 - c])**2
                out[x, y, z] = total <= radius*radius

def wavy_ball(
    waves: Waves, # displacement
    centre: Sequence[int], # (x, y, z) of the ball [voxel]
    radius: float, # [voxel]
    *,
    centred: bool = False, # False: the reference's grid, which magnifies by n/(n - 1); True: exactly the displacement
    backend: Backend = "auto", # implementation
) -> np.ndarray: # (x, y, z) uint8, 1 inside
    "Ball sampled at displaced places, nearest voxel, reflected at the borders"
    shape = waves.shape
    axes = [np.arange(n, dtype=np.float32) if centred or n == 1 else _corners(n) for n in shape]
    if choose_backend(backend) == "numba":
        out, n_scales = np.empty(shape, np.uint8), len(waves.tables)
        tables = np.zeros((n_scales, 3, max(t.shape[1] for t in waves.tables), *shape[1:]), np.float32)
        for s, t in enumerate(waves.tables): tables[s, :, :t.shape[1]] = t
        places = np.zeros((3, max(shape)), np.float32)
        for c in range(3): places[c, :shape[2 - c]] = axes[2 - c]
        taps = [np.stack([t[k] for t in waves.taps]) for k in range(4)]
        compiled(_wavy_rows)(out, places, tables, *taps, np.array(centre, np.int64), float(radius), centred)
        return out
    out = np.empty(shape, np.uint8)
    for x in range(shape[0]):
        dz, dy, dx = waves.row(x)
        ix = _sampled(axes[0][x], dx, shape[0], centred) - centre[0]
        iy = _sampled(axes[1][:, None], dy, shape[1], centred) - centre[1]
        iz = _sampled(axes[2], dz, shape[2], centred) - centre[2]
        out[x] = ix**2 + iy**2 + iz**2 <= float(radius)**2
    return out

# %%
noise = [a*rng.standard_normal((3, g, g, g), dtype=np.float32) for a, g in ((1, 8), (2, 4), (3, 2))]
waves = Waves.of(noise, (40, 44, 48))
balls = {c: wavy_ball(waves, (18, 22, 24), 13, centred=c) for c in (False, True)}
montage([b[:, :, 24] for b in balls.values()], titles=["reference grid", "centred"])

# %%
import torch

up = sum(torch.nn.functional.interpolate(torch.from_numpy(n)[None], size=(40, 44, 48), mode="trilinear")[0].numpy()
         for n in noise)
worst = max(np.abs(waves.row(x) - up[:, x]).max() for x in range(40))
plain = Waves.of(noise, (40, 44, 48), "torch")
assert all(np.array_equal(a, b) for a, b in zip(waves.tables, plain.tables))
assert worst <= 4e-6 # 0 where PyTorch uses fused multiply-add
for c, b in balls.items(): assert np.array_equal(wavy_ball(waves, (18, 22, 24), 13, centred=c, backend="torch"), b)
still = Waves.of([0*n for n in noise], (40, 44, 48))
assert np.array_equal(wavy_ball(still, (18, 22, 24), 13, centred=True), ball((40, 44, 48), 13, (18, 22, 24)))

# %% [markdown]
# ## Near the surface
# The envelope is all that lies within `e` voxels of the mask's surface, inside and outside. As morphology this is a
# dilation minus an erosion with a ball, whose cost grows as $e^3$. It is the same as asking: is there a voxel of the
# *other* side at a squared distance of at most $e^2$? Squared distances are separable, and bounded ones fit a byte.

# %%
#| export
def _near_rows(mask, e, out):
    nx, ny, nz = mask.shape
    best, row, limit = np.empty(nz, np.uint8), np.empty(nz, np.uint8), np.uint8(e*e)
    along, plane = np.empty((nx, ny, nz), np.uint8), np.empty((nx, ny, nz), np.uint8) # squared distances <= 208
    for side in (np.uint8(0), np.uint8(1)):
        for x in range(nx):
            for y in range(ny):
                here = mask[x, y]
                for z in range(nz): row[z] = np.uint8(0) if here[z] == side else np.uint8(100)
                best[:] = row
                for k in range(1, e + 1):
                    more = np.uint8(k*k)
                    for z in range(nz - k): best[z] = min(best[z], np.uint8(row[z + k] + more))
                    for z in range(nz - k): best[z + k] = min(best[z + k], np.uint8(row[z] + more))
                along[x, y] = best
        for x in range(nx):
            for y in range(ny):
                best[:] = along[x, y]
                for j in range(max(y - e, 0), min(y + e + 1, ny)):
                    other, more = along[x, j], np.uint8((j - y)**2)
                    for z in range(nz): best[z] = min(best[z], np.uint8(other[z] + more))
                plane[x, y] = best
        for x in range(nx):
            for y in range(ny):
                best[:] = plane[x, y]
                for i in range(max(x - e, 0), min(x + e + 1, nx)):
                    other, more = plane[i, y], np.uint8((i - x)**2)
                    for z in range(nz): best[z] = min(best[z], np.uint8(other[z] + more))
                here, near = mask[x, y], out[x, y]
                for z in range(nz): near[z] |= np.uint8(here[z] != side) & np.uint8(best[z] <= limit)

def _near_tensor(mask: "torch.Tensor", e: int) -> "torch.Tensor":
    import torch
    import torch.nn.functional as F
    d = torch.stack([mask != side for side in (0, 1)]).to(torch.uint8)*100
    for axis in (3, 2, 1):
        pad = [0, 0]*(3 - axis) + [e, e]
        wide, n = F.pad(d, pad, value=100), d.shape[axis]
        for k in range(2*e + 1): d = torch.minimum(d, wide.narrow(axis, k, n) + (k - e)**2)
    return torch.where(mask == 0, d[1], d[0]) <= e*e

def near_surface(
    mask: Any, # (x, y, z) NumPy array or tensor of 0 and 1
    e: int, # [voxel], 1...6
    backend: Backend = "auto", # implementation
) -> Any: # (x, y, z) bool array or tensor
    "Voxels with one of the other side within a distance of `e`; beyond the grid there is nothing"
    if not 1 <= e <= 6: raise DataError(f"near_surface: e must be 1...6 voxels, got {e!r}")
    if not isinstance(mask, np.ndarray): return _near_tensor(mask, int(e))
    if choose_backend(backend) == "torch":
        import torch
        return _near_tensor(torch.from_numpy(mask.astype(np.uint8)), int(e)).numpy()
    out = np.zeros(mask.shape, np.uint8)
    compiled(_near_rows)(np.ascontiguousarray(mask, np.uint8), int(e), out)
    return out.view(bool)

# %%
from scipy.ndimage import binary_dilation, binary_erosion

mask = ellipsoid((30, 26, 34), (10, 12, 20), (12, 9, 11)).astype(np.uint8)
shells = {e: near_surface(mask, e) for e in (2, 3, 4)}
montage([mask[:, 12] + s[:, 12] for s in shells.values()], titles=[f"e = {e}" for e in shells])

# %%
for e, shell in shells.items():
    element = ball(2*e + 1, e)
    wide, thin = binary_dilation(mask, element), binary_erosion(mask, element, border_value=1)
    assert np.array_equal(shell, wide & ~thin) and np.array_equal(near_surface(mask, e, "torch"), shell)
with raises(DataError, match="1...6"): near_surface(mask, 9)
