# %% [markdown]
# # Views of a label map
#
# > Two pictures of one anatomy that share nothing but their shapes: thirteen operations, all pure functions on tensors.
#
# What should stay the same when a scanner, a protocol or a contrast agent changes? The anatomy. Contrastive
# pretraining teaches this with pairs: the same label map is drawn twice, with independent grey levels, noise, shading
# and artefacts, and a network learns that equal places mean equal things. The recipe is that of anatomix (MIT licence;
# [arXiv 2411.02372](https://arxiv.org/abs/2411.02372)). It draws its views with MONAI, from float64 labels and with a
# boolean mask for each of thirty labels. Two runs with one seed give two different data sets, because MONAI's
# transforms keep generators of their own.
#
# As with label ensembles, a plan takes all random decisions and rendering takes none. Rendering uses identities instead
# of brute force: polynomials and interpolation split into one small matrix per axis, a spike in the spectrum is one
# plane wave, and a ring of lost frequencies needs only half a spectrum. Nothing but PyTorch is needed, on CPU and GPU.

# %%
#| default_exp synth.views

# %%
#| export
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from medvol_nb.checkpoints import keep_freed_memory, torch_rng_for
from medvol_nb.config import Config, check_config
from medvol_nb.core import DataError, fingerprint, rng_for

# %%
from medvol_nb.core import ConfigError, plain, raises, to_json
from medvol_nb.phantoms import random_body
from medvol_nb.plot import curves, histograms, montage

# %% [markdown]
# ## Settings
# The preset `"anatomix"` is the reference. `"medvol"` differs in one thing: the voxels of a low-resolution view are no
# longer cubes, each axis has its own size, as in most scans. An operation is switched by its probability.

# %%
#| export
VIEW_PRESETS: dict[str, dict[str, Any]] = {"anatomix": {}, "medvol": {"anisotropic": True}}

Range = tuple[float, float]

class ViewConfig(Config):
    "How views are drawn"
    preset: Literal["anatomix", "medvol"] = "anatomix" # where fields that are not given come from
    mean: Range = (25.0, 255.0) # grey level of a label
    sd: Range = (5.0, 20.0) # noise of a label, in the unit of `mean`
    p_zero: float = Field(0.25, ge=0, le=1) # share of views where the lowest label is exactly 0
    texture_scales: tuple[int, ...] = (4, 8, 16, 32) # distance of knots [voxel]
    texture: Range = (0.0, 5.0) # amplitude, per scale
    texture_strength: float = Field(0.02, ge=0) # factor of all amplitudes
    p_bias: float = Field(0.98, ge=0, le=1) # share with shading
    bias: Range = (0.0, 0.075) # 20 coefficients
    p_spike: float = Field(0.2, ge=0, le=1) # share with a plane wave
    spike: Range = (0.95, 1.1) # log-magnitude, in units of 2.5 times the mean log-magnitude
    p_gamma: float = Field(0.5, ge=0, le=1) # share with another contrast
    gamma: Range = (0.5, 2.0) # exponent
    p_blur: float = Field(0.5, ge=0, le=1) # share with blur
    blur: Range = (0.0, 0.333) # sigma per axis [voxel]
    p_gibbs: float = Field(0.5, ge=0, le=1) # share with ringing
    gibbs: Range = (0.0, 0.333) # share of the spectrum's radius that is cut off
    p_sharpen: float = Field(0.25, ge=0, le=1) # share with sharpening
    sharpen_first: Range = (0.5, 1.0) # sigma of the first blur, per axis [voxel]
    sharpen_second: float = Field(0.5, ge=0) # least sigma of the second blur, the first is the most [voxel]
    sharpen_amount: Range = (10.0, 30.0) # weight of the difference
    p_lowres: float = Field(0.333, ge=0, le=1) # share with large voxels
    zoom: Range = (0.5, 1.0) # of the grid
    anisotropic: bool = False # True: a zoom for each axis

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        "Fields that are not given come from the preset"
        if not isinstance(data, Mapping): return data
        return {**VIEW_PRESETS.get(data.get("preset", "anatomix"), {}), **data}

    @model_validator(mode="after")
    def _consistent(self) -> "ViewConfig":
        limits = {"mean": (0, math.inf), "sd": (0, math.inf), "texture": (0, math.inf), "bias": (-10, 10),
                  "spike": (0, 2), "gamma": (0.01, 100), "blur": (0, 64), "gibbs": (0, 1), "sharpen_first": (0, 64),
                  "sharpen_amount": (0, math.inf), "zoom": (0.01, 1)}
        for name, (low, high) in limits.items():
            a, b = getattr(self, name)
            if a > b: raise ValueError(f"{name}: the range must rise, got {a}...{b}")
            if not (low <= a and b <= high): raise ValueError(f"{name}: must lie in {low}...{high}, got {a}...{b}")
        if self.sharpen_second > self.sharpen_first[0]:
            raise ValueError(f"sharpen_second: must be at most sharpen_first, got {self.sharpen_second}")
        if any(s < 1 for s in self.texture_scales): raise ValueError("texture_scales: must be >= 1")
        return self

# %%
ViewConfig(preset="medvol").anisotropic, ViewConfig().p_bias

# %%
with raises(ConfigError, match="did you mean 'gamma'"): check_config(ViewConfig, {"gama": (1, 2)})
with raises(ConfigError, match="zoom: must lie in 0.01...1"): check_config(ViewConfig, {"zoom": (0.5, 2)})

# %% [markdown]
# ## The plan
# A plan holds every number but the noise, which is named by its stream and made at rendering. Labels get their grey
# levels from a stream of their own, and every value is drawn whether it is used or not: neither the number of labels
# nor the probability of one operation moves the parameters of another. What an operation does not do is `None`.

# %%
#| export
Triple = tuple[float, float, float]

class ViewPlan(Config):
    "All decisions of one view"
    seed: int = Field(ge=0) # of the data set
    index: int = Field(ge=0) # of the item
    view: int = Field(ge=0) # which picture of the item, such as 1 and 2
    mean: tuple[float, ...] = Field(min_length=1) # grey level of labels 0, 1, ...
    sd: tuple[float, ...] # noise of labels 0, 1, ...
    zero: bool # the lowest label is exactly 0
    texture_scales: tuple[int, ...] # distance of knots [voxel]
    texture: tuple[float, ...] # amplitude per scale
    bias: tuple[float, ...] | None = Field(None, min_length=20, max_length=20) # coefficients, see BIAS_ORDERS
    spike: Triple | None = None # place in the centred spectrum, as share of its size [0, 1)
    spike_level: float = Field(1.0, ge=0, le=2) # log-magnitude, in units of 2.5 times the mean log-magnitude
    gamma: float | None = Field(None, gt=0) # exponent
    blur: Triple | None = None # sigma per axis [voxel]
    gibbs: float | None = Field(None, ge=0, le=1) # share of the spectrum's radius that is cut off
    sharpen: tuple[Triple, Triple] | None = None # sigma per axis of the first and second blur [voxel]
    sharpen_amount: float = 0.0 # weight of the difference
    zoom: Triple | None = None # of the grid, per axis

    @model_validator(mode="after")
    def _consistent(self) -> "ViewPlan":
        if len(self.sd) != len(self.mean): raise ValueError(f"sd: {len(self.mean)} means, {len(self.sd)} sd")
        if len(self.texture) != len(self.texture_scales): raise ValueError("texture: one amplitude per scale")
        if any(s < 1 for s in self.texture_scales): raise ValueError("texture_scales: must be >= 1")
        if self.spike and not all(0 <= u < 1 for u in self.spike): raise ValueError("spike: must lie in [0, 1)")
        if self.zoom and not all(0 < z <= 1 for z in self.zoom): raise ValueError("zoom: must lie in (0, 1]")
        if any(not 0 <= s <= 64 for t in (self.blur, *(self.sharpen or ())) for s in t or ()):
            raise ValueError("blur, sharpen: sigma must lie in 0...64 voxels")
        return self

    @property
    def digest(self) -> str: return fingerprint(self) # 16 hexadecimal digits

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any], # what `medvol_nb.core.plain(plan)` gave
    ) -> "ViewPlan": # the same plan
        "Read a plan back"
        return check_config(cls, data, "view plan")

# %%
#| export
def draw_view_plan(
    seed: int, # of the data set
    index: int, # of the item
    view: int, # which picture of the item, such as 1 and 2
    config: ViewConfig, # settings
    n_labels: int, # labels are 0...n_labels - 1
) -> ViewPlan: # depends on these five alone
    "Take all random decisions of one view"
    for name, value, least in (("index", index, 0), ("view", view, 0), ("n_labels", n_labels, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise DataError(f"draw_view_plan: {name} must be an integer >= {least}, got {value!r}")
    c, index, view = config, int(index), int(view)
    rng = rng_for(seed, "views", index, view, "plan")
    def between(bounds: Range, n: int) -> tuple[float, ...]: return tuple(rng.uniform(*bounds, n).tolist())
    names = ("zero", "bias", "spike", "gamma", "blur", "gibbs", "sharpen", "lowres")
    on = {n: u < getattr(c, f"p_{n}") for n, u in zip(names, rng.random(len(names)).tolist())}
    levels = rng_for(seed, "views", index, view, "labels").random((n_labels, 2))
    mean, sd = (low + (high - low)*levels[:, k] for k, (low, high) in enumerate((c.mean, c.sd)))
    plan = {"texture": tuple(c.texture_strength*a for a in between(c.texture, len(c.texture_scales))),
            "bias": between(c.bias, 20), "spike": tuple(rng.random(3).tolist()), "spike_level": between(c.spike, 1)[0],
            "gamma": between(c.gamma, 1)[0], "blur": between(c.blur, 3), "gibbs": between(c.gibbs, 1)[0]}
    first = between(c.sharpen_first, 3)
    plan["sharpen"] = first, tuple(c.sharpen_second + (s - c.sharpen_second)*u for s, u in zip(first, rng.random(3)))
    plan["sharpen_amount"] = between(c.sharpen_amount, 1)[0]
    zoom = between(c.zoom, 3)
    plan["zoom"] = zoom if c.anisotropic else zoom[:1]*3
    off = {"zoom" if n == "lowres" else n for n in names if not on[n]}
    off |= {"spike_level"} if "spike" in off else set()
    off |= {"sharpen_amount"} if "sharpen" in off else set()
    return ViewPlan(seed=int(seed), index=index, view=view, mean=tuple(mean.tolist()), sd=tuple(sd.tolist()),
                    zero=on["zero"], texture_scales=c.texture_scales, **{k: v for k, v in plan.items() if k not in off})

# %%
plans = [draw_view_plan(0, i, 1, ViewConfig(), n_labels=5) for i in range(500)]
operations = ("bias", "spike", "gamma", "blur", "gibbs", "sharpen", "zoom")
{k: sum(getattr(p, k) is not None for p in plans)/500 for k in operations}, len(to_json(plans[0], None))

# %%
assert plans[3] == draw_view_plan(0, 3, 1, ViewConfig(), 5) and len({p.digest for p in plans}) == 500
assert ViewPlan.from_json(plain(plans[0])) == plans[0]
longer = draw_view_plan(0, 3, 1, ViewConfig(p_gamma=0), n_labels=9)
assert longer.mean[:5] == plans[3].mean and longer.bias == plans[3].bias and longer.gamma is None

# %%
with raises(DataError, match="n_labels must be an integer >= 1"): draw_view_plan(0, 0, 1, ViewConfig(), 0)
with raises(ConfigError, match="spike: must lie in"): ViewPlan.from_json({**plain(plans[0]), "spike": (0, 0, 1.0)})

# %% [markdown]
# ## Grey levels
# Each label gets a mean and a standard deviation, each voxel a normal number. The reference makes a mask for each
# label. One look-up for all labels at once does the same. Values below 0 become 0. `rescale` maps the range to
# [0, 1]; it divides rather than multiplying by an inverse, so that the largest value is exactly 1. A constant volume
# becomes 0, where the reference computes 0/0.
#
# Operations like these make and drop volumes all the time. If the allocator hands each back to the system, getting it
# again costs more than the arithmetic, so it is told to keep them (`keep_freed_memory`, page 08).

# %%
#| export
def _column(values: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    "One number an item, as (b, 1, 1, 1)"
    return torch.tensor(values, dtype=torch.float32, device=x.device).view(-1, 1, 1, 1)

def _extremes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Least and largest value of each item, (b, 1, 1, 1)"
    return x.flatten(1).amin(1).view(-1, 1, 1, 1), x.flatten(1).amax(1).view(-1, 1, 1, 1)

def sample_levels(
    lbl: torch.Tensor, # (b, x, y, z) integers in 0...n - 1
    mean: Sequence[Sequence[float]], # (b, n) grey level of each label
    sd: Sequence[Sequence[float]], # (b, n) noise of each label
    noise: torch.Tensor, # (b, x, y, z) float32, standard normal
    zero: Sequence[bool], # (b,) whether the lowest label of the item is exactly 0
) -> torch.Tensor: # (b, x, y, z) float32, >= 0
    "Grey level and noise of each voxel by its label"
    n = max(map(len, mean))
    table = torch.tensor([[(*m, *[0.0]*(n - len(m))), (*s, *[0.0]*(n - len(s)))] for m, s in zip(mean, sd)],
                         dtype=torch.float32, device=lbl.device)
    at = lbl.to(torch.int32)
    silent = torch.tensor(zero, device=lbl.device)[:, None]
    lowest = at.flatten(1).amin(1, keepdim=True).long()
    hidden = torch.zeros(len(at), n, dtype=torch.bool, device=lbl.device).scatter_(1, lowest, silent)
    mu, sigma = table.masked_fill(hidden[:, None], 0).transpose(0, 1).reshape(2, -1)
    if len(at) > 1: at = at + n*torch.arange(len(at), dtype=torch.int32, device=lbl.device).view(-1, 1, 1, 1)
    x, spread = (t.index_select(0, at.flatten()).view(lbl.shape) for t in (mu, sigma))
    return x.addcmul_(spread, noise).clamp_(min=0)

def rescale(
    x: torch.Tensor, # (b, x, y, z) finite
    out: torch.Tensor | None = None, # (b, x, y, z) takes the result, may be `x`; None: a new one
) -> torch.Tensor: # (b, x, y, z) from 0 to 1; 0 where all values are equal
    "Map the range of each item to [0, 1]"
    low, high = _extremes(x)
    width = torch.where(high > low, high - low, 1)
    return torch.sub(x, low, out=out).div_(width)

# %%
lbl = torch.from_numpy(random_body((56, 48, 40), seed=5).lbl)[None]
noise = torch.randn(lbl.shape, generator=torch_rng_for(0, "lesson"))
n_labels = int(lbl.max()) + 1
levels = draw_view_plan(0, 1, 1, ViewConfig(), n_labels)
clean = rescale(sample_levels(lbl, [levels.mean], [levels.sd], noise, [False]))
montage([clean[0, :, :, 20], clean[0, :, :, 20]], lbls=[np.zeros((56, 48), int), lbl[0, :, :, 20]],
        titles=["levels and noise", "labels"], width=4)

# %%
raw = sample_levels(lbl, [[100.0]*n_labels], [[10.0]*n_labels], noise, [True])
assert (raw[lbl == 0] == 0).all() and torch.allclose(raw[lbl > 0], 100 + 10*noise[lbl > 0])
assert clean.min() == 0 and clean.max() == 1 and not rescale(torch.full((1, 2, 2, 2), 7.0)).any()

# %% [markdown]
# ## Texture
# Normal numbers on a coarse grid, interpolated linearly, make smooth noise; several grids make it rough and smooth at
# once. The volume is multiplied by one plus the noise. Interpolation acts on each axis alone, so it is one small matrix
# an axis. The last one is the expensive one: it multiplies the whole volume. The coarse grids of all scales are put
# side by side before it, and one product serves them all. The side need not be a multiple of a scale: what sticks out
# is cut off.

# %%
#| export
def _places(n: int, m: int, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Lower knot, upper knot and weight of the upper one for each of `n` voxels, with `m` knots `step` voxels apart"
    at = np.clip((np.arange(n) + 0.5)/step - 0.5, 0, None)
    low = np.minimum(at.astype(np.int64), m - 1)
    return low, np.minimum(low + 1, m - 1), (at - low).astype(np.float32)

@lru_cache(256)
def _stretch(n: int, m: int, step: float, device: torch.device) -> torch.Tensor:
    "Linear interpolation from `m` knots to `n` voxels, (n, m)"
    low, high, weight = _places(n, m, step)
    out = np.zeros((n, m), np.float32)
    np.add.at(out, (np.arange(n), low), 1 - weight)
    np.add.at(out, (np.arange(n), high), weight)
    return torch.from_numpy(out).to(device)

def texture_knots(
    plan: ViewPlan, # seed, scales and amplitudes
    shape: Sequence[int], # of the volume (x, y, z)
) -> list[torch.Tensor]: # one a scale, each (gx, gy, gz) float32, on the CPU
    "Values of the texture on its coarse grids"
    rng = torch_rng_for(plan.seed, "views", plan.index, plan.view, "texture")
    sizes = [[math.ceil(n/s) for n in shape] for s in plan.texture_scales]
    return [a*torch.randn(size, generator=rng) for a, size in zip(plan.texture, sizes)]

def add_texture(
    x: torch.Tensor, # (b, x, y, z)
    knots: Sequence[torch.Tensor], # one a scale, each (b, gx, gy, gz)
    scales: Sequence[float], # distance of knots [voxel]
) -> torch.Tensor: # (b, x, y, z)
    "Multiply by one plus smooth noise"
    if not knots: return x
    def matrix(axis: int, k: torch.Tensor, step: float) -> torch.Tensor:
        return _stretch(x.shape[axis], k.shape[axis], float(step), x.device)
    rows = [matrix(2, k, s) @ (matrix(1, k, s) @ k.flatten(2)).view(len(k), x.shape[1], *k.shape[2:])
            for k, s in zip(knots, scales)]
    last = torch.cat([matrix(3, k, s) for k, s in zip(knots, scales)], 1)
    field = torch.cat(rows, 3) @ last.T
    return torch.addcmul(x, x, field, out=field)

# %%
strong = levels.model_copy(update={"texture": tuple(10*a for a in levels.texture)})
knots = [k[None] for k in texture_knots(strong, lbl.shape[1:])]
each = [add_texture(torch.ones(lbl.shape), [k], [s]) for k, s in zip(knots, levels.texture_scales)]
together = add_texture(torch.ones(lbl.shape), knots, levels.texture_scales)
montage([t[0, :, :, 20] for t in (*each, together)], titles=[*map(str, levels.texture_scales), "together"], cols=5)

# %%
assert torch.allclose(together, 1 + sum(e - 1 for e in each), atol=1e-5)
built_in = F.interpolate(knots[0][None], scale_factor=4, mode="trilinear")[0]
assert torch.allclose(each[0] - 1, built_in, atol=1e-6)

# %% [markdown]
# ## Shading
# A bias field is $\exp \sum c_{ijk} P_i(u) P_j(v) P_k(w)$ with Legendre polynomials up to degree 3. The sum over three
# indices is three products with a table of four columns.

# %%
#| export
BIAS_ORDERS = tuple(o for o in product(range(4), repeat=3) if sum(o) <= 3)

@lru_cache(64)
def _legendre(n: int, device: torch.device) -> torch.Tensor:
    "Polynomials of degree 0...3 on the grid, (n, 4)"
    return torch.from_numpy(np.polynomial.legendre.legvander(np.linspace(-1, 1, n), 3).astype(np.float32)).to(device)

def apply_bias(
    x: torch.Tensor, # (b, x, y, z)
    coefficients: Sequence[Sequence[float]], # (b, 20) in the order of BIAS_ORDERS
) -> torch.Tensor: # (b, x, y, z)
    "Shade as a coil or a beam does"
    c = torch.zeros(len(x), 4, 4, 4, device=x.device)
    i, j, k = np.array(BIAS_ORDERS).T
    c[:, i, j, k] = torch.tensor(coefficients, dtype=torch.float32, device=x.device)
    px, py, pz = (_legendre(n, x.device) for n in x.shape[1:])
    rows = torch.einsum("bijk,xi,yj->bxyk", c, px, py)
    return (rows @ pz.T).exp_().mul_(x)

# %%
shaded = apply_bias(clean, [[0.5*(k in (1, 4, 10)) for k in range(20)]])
curves({"before": clean.mean((0, 2, 3)), "after": shaded.mean((0, 2, 3))}, title="mean of planes")

# %%
grid = [np.linspace(-1, 1, n) for n in lbl.shape[1:]]
dense = np.polynomial.legendre.leggrid3d(*grid, np.eye(64)[1].reshape(4, 4, 4))
one = apply_bias(torch.ones(lbl.shape), [[float(k == 1) for k in range(20)]])
assert BIAS_ORDERS[1] == (0, 0, 1) and np.allclose(one[0], np.exp(dense), atol=1e-6)

# %% [markdown]
# ## A spike in the spectrum
# A spark during acquisition sets one value $F_q$ of the spectrum to a huge magnitude $T$: the image gets stripes. There
# is no need to transform back. The change of one value adds one plane wave,
# $x + \mathrm{Re}\,[(T - |F_q|)\, e^{i \arg F_q}\, e^{2\pi i\, q x/S}]/S^3$, and a plane wave is a product of three
# vectors. $T$ follows from the mean of $\log |F|$, for which half a spectrum suffices: the other half is its mirror.

# %%
#| export
AXES = (1, 2, 3)

def _mean_log(half: torch.Tensor, n: int) -> torch.Tensor:
    "Mean of log |F| over the spectrum of which `half` is one half, (b,) float64; `n` is the length of the last axis"
    real, imag = torch.view_as_real(half).unbind(-1)
    logs = (real*real).addcmul_(imag, imag).add_(1e-20).log_()
    rows = 2*logs.sum(-1) - logs[..., 0] - (logs[..., -1] if n % 2 == 0 else 0)
    return rows.double().sum(-1).sum(-1)/(2*half.shape[1]*half.shape[2]*n)

def _frequency(half: torch.Tensor, f: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    "The value at frequency `f`, which may be in the half that is not there"
    mirrored = f[2] % shape[2] > shape[2]//2
    at = tuple((-g if mirrored else g) % n for g, n in zip(f, shape))
    return half[at].conj().resolve_conj() if mirrored else half[at]

def add_spike(
    x: torch.Tensor, # (b, x, y, z)
    place: Sequence[Sequence[int]], # (b, 3) index in the centred spectrum
    level: Sequence[float], # (b,) log-magnitude, in units of 2.5 times the mean log-magnitude
) -> torch.Tensor: # (b, x, y, z)
    "Set one value of the spectrum to a large magnitude, its phase is kept"
    shape, half = x.shape[1:], torch.fft.rfftn(x, dim=AXES)
    logs, out = 2.5*_mean_log(half, shape[2]), torch.empty_like(x)
    for b, (q, u) in enumerate(zip(place, level)):
        f = [i - n//2 for i, n in zip(q, shape)]
        value = _frequency(half[b], f, shape).to(torch.complex128)
        change = torch.polar((u*logs[b]).exp() - value.abs(), value.angle())/math.prod(shape)
        wx, wy, wz = (torch.from_numpy(np.exp(2j*np.pi*g*np.arange(n)/n)).to(x.device) for g, n in zip(f, shape))
        plane = torch.view_as_real((change*wx)[:, None]*wy).float().view(-1, 2)
        wave = torch.stack((wz.real, -wz.imag)).float()
        torch.addmm(x[b].reshape(-1, shape[2]), plane, wave, out=out[b].view(-1, shape[2]))
    return out

# %%
striped = add_spike(clean, [(31, 27, 20)], [1.1])
montage([clean[0, :, :, 20], striped[0, :, :, 20]], titles=["before", "a spike"], width=4)

# %%
spectrum = torch.fft.fftn(clean[0].double())
q = (3, 3, 0)
height = torch.exp(1.1*2.5*spectrum.abs().log().mean())
spectrum[q] = torch.polar(height, spectrum[q].angle())
assert torch.allclose(striped[0].double(), torch.fft.ifftn(spectrum).real, atol=1e-5)

# %% [markdown]
# ## Contrast
# A power of the values between their minimum and maximum: below one it brightens, above one it darkens.

# %%
#| export
def apply_gamma(
    x: torch.Tensor, # (b, x, y, z)
    gamma: Sequence[float], # (b,) exponent
) -> torch.Tensor: # (b, x, y, z)
    "Bend the grey levels, the extremes stay"
    low, high = _extremes(x)
    y = (x - low).div_(high - low + 1e-7)
    for item, g in zip(y, gamma): item.pow_(g)
    return y.mul_(high - low).add_(low)

# %%
bent = apply_gamma(torch.cat([clean, clean]), [0.5, 2.0])
histograms({"before": clean, "0.5": bent[0], "2": bent[1]}, title="grey levels")

# %%
assert torch.allclose(bent[1], clean[0]**2, atol=1e-6) and torch.allclose(apply_gamma(clean, [1.0]), clean, atol=1e-6)

# %% [markdown]
# ## Blur and sharpening
# A Gaussian filter of small width has 3 to 9 taps: the Gaussian's integral over each voxel, cut at four widths, *not*
# divided by its sum, with zeros outside. So it darkens a little, and more so at the border. Taps are shifted copies
# that are added up. Sharpening blurs twice and adds the difference, with a weight of 10 to 30.

# %%
#| export
def _taps(sigma: float) -> list[float]:
    "Middle and right half of the kernel: the Gaussian's integral over each voxel"
    tail = int(max(4*sigma, 0.5) + 0.5)
    if sigma == 0: return [1.0, *[0.0]*tail]
    edge = [math.erf((d - 0.5)*math.sqrt(0.5)/sigma) for d in range(tail + 2)]
    return [0.5*(b - a) for a, b in zip(edge, edge[1:])]

def _spread(x: torch.Tensor, taps: Sequence[list[float]], dim: int) -> torch.Tensor:
    "Filter along one axis with the `taps` of each item: scaled copies of the volume, shifted both ways and added"
    n, longest = x.shape[dim], max(map(len, taps))
    weights = [_column([t[d] if d < len(t) else 0.0 for t in taps], x) for d in range(min(longest, n))]
    out = x*weights[0]
    for d, w in enumerate(weights[1:], 1):
        out.narrow(dim, d, n - d).addcmul_(x.narrow(dim, 0, n - d), w)
        out.narrow(dim, 0, n - d).addcmul_(x.narrow(dim, d, n - d), w)
    return out

def gaussian_blur(
    x: torch.Tensor, # (b, x, y, z)
    sigma: Sequence[Sequence[float]], # (b, 3) per axis [voxel]
) -> torch.Tensor: # (b, x, y, z)
    "Gaussian filter, integrated over voxels, not normalised, zeros outside"
    for axis in range(3): x = _spread(x, [_taps(s[axis]) for s in sigma], axis + 1)
    return x

def sharpen(
    x: torch.Tensor, # (b, x, y, z)
    first: Sequence[Sequence[float]], # (b, 3) sigma of the first blur [voxel]
    second: Sequence[Sequence[float]], # (b, 3) sigma of the second blur [voxel]
    amount: Sequence[float], # (b,) weight of the difference
) -> torch.Tensor: # (b, x, y, z)
    "Blur, and add what a second blur would take away"
    y = gaussian_blur(x, first)
    return gaussian_blur(y, second).sub_(y).mul_(-_column(amount, x)).add_(y)

# %%
dull, sharp = gaussian_blur(clean, [(0.9, 0.3, 0.3)]), sharpen(clean, [(0.9,)*3], [(0.6,)*3], [20.0])
montage([v[0, :, :, 20] for v in (clean, dull, sharp)], titles=["before", "blurred along x", "sharpened"], width=6)

# %%
dot = torch.zeros(1, 9, 9, 9)
dot[0, 4, 4, 4] = 1
kernel = gaussian_blur(dot, [(1, 0.5, 0)])
assert abs(float(kernel.sum()) - 1) < 1e-3 and kernel[0, :, 4, 4].argmax() == 4
assert torch.equal(kernel, kernel.flip(1, 2, 3)) and torch.equal(gaussian_blur(dot, [(0, 0, 0)]), dot)

# %% [markdown]
# ## Ringing
# A scan that stops at high frequencies rings at edges (Gibbs). The reference keeps a ball of the centred spectrum. On
# an even grid its centre is half a step beside frequency 0, so the ball is not symmetric and the inverse is not real;
# the reference takes the real part. That equals keeping the average of the ball and its mirror image: 1 where both
# keep, ½ where one does. The average is symmetric, so half a spectrum is enough. Distances are compared as whole
# numbers. In a row of half the spectrum they only grow, so a row of weights is a number of places that are kept.

# %%
#| export
@lru_cache(64)
def _distances(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    "4 x squared distance from the centre (n - 1)/2 of frequencies 0, 1, ... and of their mirror images, (n,) float64"
    f = np.fft.ifftshift(np.arange(n) - n//2) # in the order of the transform
    mirror = np.where(2*f == -n, f, -f)
    return tuple(torch.from_numpy((2.0*(g + n//2) - (n - 1))**2).to(device) for g in (f, mirror))

@lru_cache(64)
def _prefixes(n: int, device: torch.device) -> torch.Tensor:
    "Row k is ½ in its first k places and 0 after them, (n + 1, n)"
    return torch.ones(n + 1, n, device=device).tril(-1)/2

def apply_gibbs(
    x: torch.Tensor, # (b, x, y, z)
    alpha: Sequence[float], # (b,) share of the spectrum's radius that is cut off
) -> torch.Tensor: # (b, x, y, z)
    "Drop high frequencies"
    shape = x.shape[1:]
    half, n_z = torch.fft.rfftn(x, dim=AXES), shape[2]//2 + 1
    kept = math.sqrt(2)*max(shape) # twice the radius
    limit = torch.tensor([math.floor(((1 - a)*kept)**2) for a in alpha], dtype=torch.float64, device=x.device)
    def kept_by(dx: torch.Tensor, dy: torch.Tensor, dz: torch.Tensor) -> torch.Tensor:
        rest = (limit[:, None, None] - dx[:, None] - dy).flatten()
        return _prefixes(n_z, x.device).index_select(0, torch.searchsorted(dz[:n_z].contiguous(), rest, right=True))
    ball, mirrored = (kept_by(*d) for d in zip(*(_distances(n, x.device) for n in shape)))
    return torch.fft.irfftn(half.mul_(ball.add_(mirrored).view(half.shape)), s=tuple(shape), dim=AXES)

# %%
alphas = (0.0, 0.2, 0.6)
rung = apply_gibbs(torch.cat([clean]*3), alphas)
montage(list(rung[:, :, :, 20]), titles=list(map(str, alphas)), width=6)

# %%
ball = sum((np.arange(n) - (n - 1)/2)[(slice(None), *[None]*k)]**2 for n, k in zip(clean.shape[1:], (2, 1, 0)))
kept = torch.from_numpy(np.sqrt(ball) <= 0.4*56*math.sqrt(0.5))
spectrum = torch.fft.fftshift(torch.fft.fftn(clean[0].double()))*kept
assert torch.allclose(rung[2].double(), torch.fft.ifftn(torch.fft.ifftshift(spectrum)).real, atol=1e-5)
assert not apply_gibbs(clean, [1.0]).any()

# %% [markdown]
# ## Large voxels
# The volume is thinned out to a smaller grid, nearest voxel, and interpolated back. Interpolation mixes two planes for
# each plane of the result, one axis after the other. The last axis goes first, while the volume is still small; there
# both steps are one matrix.

# %%
#| export
@lru_cache(256)
def _thinned(n: int, m: int, device: torch.device) -> torch.Tensor:
    "Which of `n` voxels the `m` voxels of a smaller grid are, (m,); ties are rounded as PyTorch rounds them"
    ramp = torch.arange(n, dtype=torch.float32)[None, None]
    return F.interpolate(ramp, size=m, mode="nearest-exact")[0, 0].long().to(device)

@lru_cache(256)
def _coarsened(n: int, m: int, device: torch.device) -> torch.Tensor:
    "Thinning `n` voxels to `m` and interpolating back as one matrix, (n, n)"
    return F.one_hot(_thinned(n, m, device), n).T.to(torch.float32) @ _stretch(n, m, n/m, device).T

def lower_resolution(
    x: torch.Tensor, # (b, x, y, z)
    zoom: Sequence[Sequence[float]], # (b, 3) of the grid, per axis
) -> torch.Tensor: # (b, x, y, z)
    "Show the volume as if its voxels were larger"
    out = torch.empty_like(x)
    for target, y, factors in zip(out, x, zoom):
        sizes = [max(1, round(n*z)) for n, z in zip(y.shape, factors)]
        for axis in (0, 1): y = y.index_select(axis, _thinned(y.shape[axis], sizes[axis], x.device))
        y = y @ _coarsened(y.shape[2], sizes[2], x.device)
        for axis in (1, 0):
            n, m = target.shape[axis], sizes[axis]
            low, high, weight = (torch.from_numpy(v).to(x.device) for v in _places(n, m, n/m))
            weight = weight.view((-1, 1, 1) if axis == 0 else (-1, 1))
            y = torch.lerp(y.index_select(axis, low), y.index_select(axis, high), weight)
        target.copy_(y)
    return out

# %%
coarse = lower_resolution(torch.cat([clean]*2), [(0.5, 0.5, 0.5), (0.25, 1, 1)])
montage([clean[0, :, :, 20], *coarse[:, :, :, 20]], titles=["before", "0.5", "0.25 along x"], width=6)

# %%
assert torch.allclose(lower_resolution(clean, [(1, 1, 1)]), clean, atol=1e-6)
built_in = F.interpolate(F.interpolate(clean[None], size=(28, 24, 20), mode="nearest-exact"), size=(56, 48, 40),
                         mode="trilinear")[0, 0]
assert torch.allclose(coarse[0], built_in, atol=1e-6)

# %% [markdown]
# ## From plan to view
# On a CPU each item is rendered alone and on one thread, so a view is the same bytes in any batch: the last bit of a
# power or a product depends on how threads divide the work. Several threads render several items. On a GPU a batch goes
# through together, each operation on the items that have it. The order is fixed. At the end negative values are cut,
# the range becomes [0, 1], and 255 times the value is truncated to bytes.
#
# Noise comes from a generator that the plan names. GPUs have generators of their own: their noise is another draw with
# the same distribution. Give `noise` to render the same picture on both.

# %%
#| export
STEPS: dict[str, Callable[[torch.Tensor, list[ViewPlan]], torch.Tensor]] = {
    "bias": lambda x, ps: apply_bias(x, [p.bias for p in ps]),
    "spike": lambda x, ps: add_spike(x, [[min(int(u*n), n - 1) for u, n in zip(p.spike, x.shape[1:])] for p in ps],
                                     [p.spike_level for p in ps]),
    "gamma": lambda x, ps: apply_gamma(x, [p.gamma for p in ps]),
    "blur": lambda x, ps: gaussian_blur(x, [p.blur for p in ps]),
    "gibbs": lambda x, ps: apply_gibbs(x, [p.gibbs for p in ps]),
    "sharpen": lambda x, ps: sharpen(x, *zip(*(p.sharpen for p in ps)), [p.sharpen_amount for p in ps]),
    "zoom": lambda x, ps: lower_resolution(x, [p.zoom for p in ps]),
}

def quantise(
    x: torch.Tensor, # (b, x, y, z) in [0, 1]
) -> torch.Tensor: # (b, x, y, z) uint8
    "Grey levels 0...255, truncated"
    return (255*x).to(torch.uint8)

def voxel_noise(
    plan: ViewPlan, # names the stream
    out: torch.Tensor, # (x, y, z) float32, takes the numbers; a GPU draws others than a CPU
) -> torch.Tensor: # (x, y, z) float32, standard normal
    "The noise of a view"
    return out.normal_(generator=torch_rng_for(plan.seed, "views", plan.index, plan.view, "noise", device=out.device))

@torch.no_grad()
def _render(lbl: torch.Tensor, plans: list[ViewPlan], noise: torch.Tensor | None) -> torch.Tensor:
    shape, device = lbl.shape[1:], lbl.device
    if noise is None:
        noise = torch.empty(lbl.shape, device=device)
        for p, part in zip(plans, noise): voxel_noise(p, part)
    x = sample_levels(lbl, [p.mean for p in plans], [p.sd for p in plans], noise, [p.zero for p in plans])
    del noise
    rescale(x, out=x)
    knots = [torch.stack(k).to(device) for k in zip(*(texture_knots(p, shape) for p in plans))]
    x = add_texture(x, knots, plans[0].texture_scales)
    rescale(x, out=x)
    for name, step in STEPS.items():
        on = [i for i, p in enumerate(plans) if getattr(p, name) is not None]
        if len(on) == len(plans): x = step(x, plans)
        elif on:
            at = torch.tensor(on, device=device)
            x[at] = step(x[at], [plans[i] for i in on])
    x.clamp_(min=0)
    return quantise(rescale(x, out=x))

def _each_alone(f: Callable[[int], None], n: int) -> None:
    "Call `f` for 0...n - 1, side by side if PyTorch may use several threads, each call on one of them"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if min(threads, n) == 1:
            for i in range(n): f(i)
        else:
            with ThreadPoolExecutor(min(threads, n), initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(f, range(n)))
    finally: torch.set_num_threads(threads)

# %%
#| export
def render_views(
    lbl: torch.Tensor | np.ndarray, # (b, x, y, z) label maps, any integer type
    plans: Sequence[ViewPlan], # one an item
    *,
    device: torch.device | str | None = None, # None: where the labels are
    noise: torch.Tensor | None = None, # (b, x, y, z) float32, standard normal; None: drawn from the plans' streams
) -> torch.Tensor: # (b, x, y, z) uint8 on `device`
    "Turn plans into pictures of label maps"
    lbl, plans = torch.as_tensor(lbl), list(plans)
    if lbl.ndim != 4 or 0 in lbl.shape or lbl.shape[0] != len(plans):
        raise DataError(f"render_views: labels must be (b, x, y, z) with one plan an item, got {tuple(lbl.shape)} and "
                        f"{len(plans)} plans")
    if lbl.is_floating_point() or lbl.is_complex() or lbl.dtype == torch.bool:
        raise DataError(f"render_views: labels must be integers, got {lbl.dtype}. Convert them, if they are whole")
    if noise is not None and noise.shape != lbl.shape:
        raise DataError(f"render_views: noise {tuple(noise.shape)} and labels {tuple(lbl.shape)} differ in shape")
    if len({p.texture_scales for p in plans}) > 1:
        raise DataError("render_views: plans of one batch must have the same texture_scales")
    lbl = lbl.to(lbl.device if device is None else device)
    wide = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
    low, high = lbl.to(wide.get(lbl.dtype, lbl.dtype)).aminmax()
    most = min(len(p.mean) for p in plans)
    if low < 0 or high >= most:
        raise DataError(f"render_views: labels {int(low)}...{int(high)}, the plans know 0...{most - 1}. Draw them with "
                        f"n_labels={int(high) + 1}")
    if lbl.device.type != "cpu": return _render(lbl, plans, None if noise is None else noise.to(lbl.device))
    out = torch.empty(lbl.shape, dtype=torch.uint8)
    def one(i: int) -> None:
        k = slice(i, i + 1)
        out[k] = _render(lbl[k], plans[k], None if noise is None else noise[k])
    keep_freed_memory()
    _each_alone(one, len(plans))
    return out

def render_view(
    lbl: torch.Tensor | np.ndarray, # (x, y, z) label map, any integer type
    plan: ViewPlan, # decisions, from `draw_view_plan`
    *,
    device: torch.device | str | None = None, # None: where the labels are
) -> torch.Tensor: # (x, y, z) uint8
    "Turn a plan into a picture of a label map"
    return render_views(torch.as_tensor(lbl)[None], [plan], device=device)[0]

# %% [markdown]
# Four pairs. What two pictures of a column have in common is the labels, and nothing else.

# %%
pairs = {i: [draw_view_plan(2, i, v, ViewConfig(), n_labels) for v in (1, 2)] for i in range(4)}
views = torch.stack([render_view(lbl[0], pairs[i][v]) for v in (0, 1) for i in range(4)])
maps = [np.zeros((56, 48), int)]*8 + [lbl[0, :, :, 20]]*4
montage([*views[:, :, :, 20], *[views[0, :, :, 20]]*4], lbls=maps, cols=4, width=6, alpha=1,
        titles=[*(f"pair {i}, view {v}" for v in (1, 2) for i in range(4)), *["labels"]*4])

# %%
batch = render_views(lbl.expand(2, -1, -1, -1), pairs[1])
assert torch.equal(batch[0], views[1]) and torch.equal(batch[1], views[5])
assert all(v.min() == 0 and v.max() == 255 for v in views)

# %% [markdown]
# The same label map with each operation switched on alone shows what it does to a picture.

# %%
everything = ViewConfig(**{f"p_{n}": 1 for n in ("bias", "spike", "gamma", "blur", "gibbs", "sharpen", "lowres")})
full = draw_view_plan(9, 0, 1, everything, n_labels)
alone = [full.model_copy(update={k: None for k in operations if k != name}) for name in operations]
montage([render_view(lbl[0], p)[:, :, 20] for p in (*alone, full)], titles=[*operations, "all"], cols=4, width=6)

# %%
with raises(DataError, match="Draw them with n_labels=31"): render_view(lbl[0].int() + 31 - n_labels, full)
with raises(DataError, match="labels must be integers"): render_view(lbl[0].float(), full)
with raises(DataError, match="one plan an item"): render_views(lbl, [full, full])
