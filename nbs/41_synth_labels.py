# %% [markdown]
# # Label ensembles
#
# > Random label maps out of organ shapes: first a plan of plain numbers, then its exact rendering.
#
# A network that shall recognise structure in *any* volume can be trained on volumes that never existed. The recipe of
# anatomix (MIT licence; [arXiv 2411.02372](https://arxiv.org/abs/2411.02372)) begins with label maps: twenty to
# forty organ shapes, stretched, turned, sheared and mirrored, are thrown onto one grid. Two thirds are cut out by a
# wavy ball, so that there is a foreground and air around it, and half of these get a shell like skin.
#
# Here a label map is made in two steps. `draw_plan` takes all random decisions and returns them as plain numbers, in
# about 0.1 ms. `render_labels` turns a plan into voxels and takes no decision. The plan of item 7 depends on the
# seed and on 7, on nothing else: not on how many items there are, which process made them, or what was made before. So
# a data set can be extended, divided over machines, and its statistics can be tested on a hundred thousand plans
# without rendering one.

# %%
#| default_exp synth.labels

# %%
#| export
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from medvol_nb.config import Config
from medvol_nb.core import DataError, fingerprint, plain, rng_for
from medvol_nb.synth.kernels import (Backend, Scene, Waves, _sampled, choose_backend, filter_labels, near_surface,
                                     paint, wavy_ball)
from medvol_nb.synth.templates import TemplateBank

# %%
from collections import Counter

from medvol_nb.core import ConfigError, raises, to_json
from medvol_nb.config import check_config
from medvol_nb.plot import bars, histograms, montage
from medvol_nb.synth.templates import procedural_bank

# %% [markdown]
# ## Settings
# Two presets. `"anatomix"` is the reference, number for number, with its quirks: the first shape writes label 0 and is
# invisible, shapes turn about the corner of the grid and repeat periodically, the median is one of label numbers, the
# mask is magnified by $S/(S-1)$, and at another side length the shapes keep their size in voxels. `"medvol"` does each
# of these as one would expect: all shapes are seen, each appears once, turned about its own middle at a random place,
# neighbours vote, displacements are exact, and shapes grow with the grid. Every field can be set on its own.

# %%
#| export
PRESETS: dict[str, dict[str, Any]] = {
    "anatomix": {},
    "medvol": {"first_hidden": False, "max_inclusive": True, "periodic": False, "smoothing": "vote", "centred": True,
               "fit_side": True},
}

Range = tuple[float, float]

class EnsembleConfig(Config):
    "How label ensembles are drawn; lengths in [voxel at 128] grow with the grid, those in [voxel] do not"
    aliases: ClassVar[Mapping[str, str]] = {"side_length": "shape"}
    preset: Literal["anatomix", "medvol"] = "anatomix" # where fields that are not given come from
    shape: tuple[int, int, int] = (128, 128, 128) # size of the grid (x, y, z); one number for a cube [voxel]
    min_templates: int = Field(20, ge=1) # fewest shapes
    max_templates: int = Field(40, ge=1, le=60000) # most shapes, see max_inclusive
    max_inclusive: bool = False # False: max_templates itself is never drawn, as in the reference
    scale: Range = (0.5, 1.5) # per axis; the apparent magnification is 1/scale
    angle: Range = (-180.0, 180.0) # per axis [degree]
    shift: Range = (-5.0, 5.0) # per axis [voxel]; only if periodic
    shear: Range = (-0.5, 0.5) # of three entries
    p_flip: float = Field(0.5, ge=0, le=1) # per axis
    periodic: bool = True # True: shapes turn about the grid's corner and repeat; False: once, at a random place
    fit_side: bool = False # True: shapes grow with the grid; False: they keep their size in voxels
    first_hidden: bool = True # True: the first shape writes label 0
    smoothing: Literal["median", "vote"] = "median" # how 27 neighbours decide
    warp: Range = (0.0, 0.0) # amplitude of a smooth deformation of all shapes, per scale [voxel at 128]
    p_mask: float = Field(0.66667, ge=0, le=1) # share with a foreground mask
    p_envelope: float = Field(0.5, ge=0, le=1) # share of these with an envelope
    radius: Range = (48.0, 72.0) # of the ball [voxel at 128], upper end exclusive
    offset: float = Field(32.0, ge=0) # of its centre, largest per axis [voxel at 128], upper end exclusive
    noise_scales: tuple[float, ...] = Field((8.0, 16.0, 32.0), min_length=1) # of the displacement [voxel at 128]
    amplitude: Range = (1.0, 5.0) # of the displacement, per scale [voxel at 128]
    envelope: tuple[int, ...] = Field((2, 3, 4), min_length=1) # half widths to choose from [voxel], 1...6
    centred: bool = False # False: the reference's grid for displacements; True: exact

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        "Fields that are not given come from the preset"
        if not isinstance(data, Mapping): return data
        return {**PRESETS.get(data.get("preset", "anatomix"), {}), **data}

    @field_validator("shape", mode="before")
    @classmethod
    def _cube(cls, value: Any) -> Any: return (value,)*3 if isinstance(value, int) else value

    @model_validator(mode="after")
    def _consistent(self) -> "EnsembleConfig":
        if not all(1 <= n <= 4096 for n in self.shape): raise ValueError(f"shape: 1...4096 voxels, got {self.shape}")
        if self.max_templates < self.min_templates:
            raise ValueError(f"max_templates: {self.max_templates} is below min_templates, {self.min_templates}")
        for name in ("scale", "angle", "shift", "shear", "warp", "radius", "amplitude"):
            lo, hi = getattr(self, name)
            if lo > hi: raise ValueError(f"{name}: the range must rise, got {lo}...{hi}")
        if self.scale[0] <= 0: raise ValueError(f"scale: must be > 0, got {self.scale}")
        if min(self.radius[0], self.warp[0], self.amplitude[0]) < 0: raise ValueError("lengths must be >= 0")
        if min(self.noise_scales) < 1: raise ValueError(f"noise_scales: must be >= 1, got {self.noise_scales}")
        if not all(1 <= e <= 6 for e in self.envelope): raise ValueError(f"envelope: 1...6 voxels, got {self.envelope}")
        return self

# %%
medvol = EnsembleConfig(preset="medvol", shape=96)
{k: (v, getattr(medvol, k)) for k, v in EnsembleConfig().model_dump().items() if v != getattr(medvol, k)}

# %%
assert EnsembleConfig(side_length=64).shape == (64, 64, 64) and EnsembleConfig(preset="medvol", periodic=True).periodic
with raises(ConfigError, match="below min_templates"):
    check_config(EnsembleConfig, {"min_templates": 9, "max_templates": 4})
with raises(ConfigError, match="did you mean 'amplitude'"): check_config(EnsembleConfig, {"amplitudes": (1, 2)})

# %% [markdown]
# ## The plan
# A plan holds every number that rendering needs, except the values of the mask's noise, which are named by their stream
# and made when they are needed. It converts to JSON and back without loss. Its `digest` is its identity.

# %%
#| export
KINDS = ("unconstrained", "foreground_masked", "foreground_masked_enveloped")

@dataclass(frozen=True)
class EnsemblePlan:
    "All decisions of one label ensemble"
    seed: int # of the data set
    index: int # of the item
    shape: tuple[int, int, int] # of the grid (x, y, z)
    templates: tuple[int, ...] # shapes in the bank, in the order of painting
    scale: tuple[tuple[float, ...], ...] # per shape and axis
    angle: tuple[tuple[float, ...], ...] # per shape and axis [degree]
    shift: tuple[tuple[float, ...], ...] # per shape and axis [voxel]; not periodic: of the middle, as share of the grid
    shear: tuple[tuple[float, ...], ...] # per shape: entries (0, 1), (0, 2), (1, 2)
    flip: tuple[tuple[bool, ...], ...] # per shape and axis
    periodic: bool # shapes turn about the corner and repeat
    zoom: float # size of shapes relative to their templates
    first_hidden: bool # the first shape writes 0
    smoothing: str # 'median' or 'vote'
    centred: bool # exact displacements
    noise_scales: tuple[float, ...] # distance of the knots of displacements [voxel]
    warp: tuple[float, ...] = () # amplitude per scale [voxel]; empty: none
    radius: float = 0.0 # of the mask's ball [voxel]; 0: no mask
    centre: tuple[int, ...] = () # of the mask's ball [voxel]
    amplitude: tuple[float, ...] = () # of the mask's displacement, per scale [voxel]
    envelope: int = 0 # half width of the shell [voxel]; 0: none

    @property
    def n_shapes(self) -> int: return len(self.templates) # shapes painted, with the hidden one
    @property
    def masked(self) -> bool: return len(self.centre) == 3 # there is a foreground mask
    @property
    def kind(self) -> str: return KINDS[self.masked + (self.envelope > 0)] # one of KINDS
    @property
    def max_label(self) -> int: # largest label that can occur
        return self.n_shapes - self.first_hidden + self.masked + (self.envelope > 0)
    @property
    def dtype(self) -> np.dtype: return np.dtype(np.uint8 if self.max_label < 256 else np.uint16) # of the label map
    @property
    def digest(self) -> str: return fingerprint(self) # 16 hexadecimal digits

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any], # what `medvol_nb.core.plain(plan)` gave
    ) -> "EnsemblePlan": # the same plan
        "Read a plan back"
        known = {f.name: f for f in fields(cls)}
        need = {n for n, f in known.items() if n not in ("warp", "radius", "centre", "amplitude", "envelope")}
        if not isinstance(data, Mapping) or not need <= set(data) <= set(known):
            raise DataError(f"plan: needs the keys {sorted(need)}, got {sorted(data) if data else data!r:.200}")
        def tupled(v: Any) -> Any: return tuple(tupled(w) for w in v) if isinstance(v, (list, tuple)) else v
        return cls(**{k: tupled(v) for k, v in data.items()})

def mask_noise(
    plan: EnsemblePlan, # says how large
    purpose: Literal["mask", "warp"] = "mask", # displacement of the mask, or of the shapes
) -> list[np.ndarray]: # one a scale, each (3, gx, gy, gz) float32 [voxel], component 0 moves along z
    "Values of the noise that displaces"
    amplitudes = plan.amplitude if purpose == "mask" else plan.warp
    out = []
    for k, (scale, a) in enumerate(zip(plan.noise_scales, amplitudes)):
        grid = [math.ceil(n/scale) for n in plan.shape]
        rng = rng_for(plan.seed, "labels", plan.index, f"{purpose} noise", k)
        out.append(np.float32(a)*rng.standard_normal((3, *grid), dtype=np.float32))
    return out

# %%
#| export
def _between(rng: np.random.Generator, bounds: Range, size: Any) -> Any:
    "Uniform values as nested tuples of plain numbers"
    values = rng.uniform(*bounds, size).tolist()
    return tuple(map(tuple, values)) if isinstance(size, tuple) else tuple(values)

def _whole(rng: np.random.Generator, lo: int, hi: int) -> int: return int(rng.integers(lo, max(lo + 1, hi)))

def draw_plan(
    seed: int, # of the data set
    index: int, # of the item
    config: EnsembleConfig, # settings
    n_templates: int, # shapes in the bank
) -> EnsemblePlan: # depends on these four alone
    "Take all random decisions of one label ensemble"
    if n_templates < 1: raise DataError(f"draw_plan: the bank must hold at least 1 shape, got {n_templates}")
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or index < 0:
        raise DataError(f"draw_plan: index must be an integer >= 0, got {index!r}")
    c, rng = config, rng_for(seed, "labels", int(index), "plan")
    r = min(c.shape)/128
    n = _whole(rng, c.min_templates, c.max_templates + c.max_inclusive)
    plan = {"templates": tuple(rng.integers(0, n_templates, n).tolist()),
            "scale": _between(rng, c.scale, (n, 3)), "angle": _between(rng, c.angle, (n, 3)),
            "shift": _between(rng, c.shift if c.periodic else (0.0, 1.0), (n, 3)),
            "shear": _between(rng, c.shear, (n, 3)),
            "flip": tuple(map(tuple, (rng.random((n, 3)) < c.p_flip).tolist())),
            "periodic": c.periodic, "zoom": r if c.fit_side else 1.0, "first_hidden": c.first_hidden,
            "smoothing": c.smoothing, "centred": c.centred,
            "noise_scales": tuple(max(1.0, s*r) for s in c.noise_scales)}
    is_masked, has_envelope = (rng.random(2) < (c.p_mask, c.p_envelope)).tolist()
    radius = _whole(rng, round(c.radius[0]*r), round(c.radius[1]*r))
    centre = tuple(n//2 + _whole(rng, -(reach := round(c.offset*n/128)), reach) for n in c.shape)
    amplitude = _between(rng, c.amplitude, len(c.noise_scales))
    envelope = int(rng.choice(c.envelope))
    if c.warp[1] > 0: plan["warp"] = tuple(r*a for a in _between(rng, c.warp, len(c.noise_scales)))
    if is_masked: plan |= {"radius": float(radius), "centre": centre, "amplitude": tuple(r*a for a in amplitude)}
    if is_masked and has_envelope: plan["envelope"] = envelope
    return EnsemblePlan(int(seed), int(index), c.shape, **plan)

# %%
plans = [draw_plan(0, i, EnsembleConfig(shape=64), n_templates=12) for i in range(400)]
text = to_json(plans[0], None)
bars(Counter(p.kind for p in plans), title="400 plans"), len(text)

# %%
assert EnsemblePlan.from_json(plain(plans[0])) == plans[0] and plans[0] == draw_plan(0, 0, EnsembleConfig(shape=64), 12)
assert len({p.digest for p in plans}) == 400 and {p.n_shapes for p in plans} == set(range(20, 40))
assert draw_plan(1, 0, EnsembleConfig(shape=64), 12) != plans[0]

# %%
with raises(DataError, match="at least 1 shape"): draw_plan(0, 0, EnsembleConfig(), 0)
with raises(DataError, match="index must be"): draw_plan(0, -1, EnsembleConfig(), 5)
with raises(DataError, match="plan: needs the keys"): EnsemblePlan.from_json({"seed": 0})

# %% [markdown]
# ## From plan to places
# The map of a shape is $A = \mathrm{diag}(\pm s)\,R_x R_y R_z\,H$, from grid to template (pull-back), so that a scale
# of 2 shows the shape at half its size. In the reference the template lies in the middle of a *working box* of at least
# the size of the grid, $x_{in} = A x + t$ turns about the corner of the grid, and the box repeats. Otherwise the middle
# of the template goes to a random place of the grid.

# %%
#| export
def shape_matrices(
    plan: EnsemblePlan, # scale, angle, shear and flip of each shape
) -> np.ndarray: # (n, 3, 3) float64, from the grid to the template
    "Linear part of the map of each shape"
    a = np.deg2rad(np.array(plan.angle))
    c, s, o, i = np.cos(a), np.sin(a), np.zeros(len(a)), np.ones(len(a))
    def stack(*rows: Any) -> np.ndarray: return np.stack([np.stack(row, -1) for row in rows], -2)
    rx = stack((i, o, o), (o, c[:, 0], -s[:, 0]), (o, s[:, 0], c[:, 0]))
    ry = stack((c[:, 1], o, s[:, 1]), (o, i, o), (-s[:, 1], o, c[:, 1]))
    rz = stack((c[:, 2], -s[:, 2], o), (s[:, 2], c[:, 2], o), (o, o, i))
    h = np.array(plan.shear)
    shear = stack((i, h[:, 0], h[:, 1]), (o, i, h[:, 2]), (o, o, i))
    scale = np.array(plan.scale)*np.where(np.array(plan.flip), -1, 1)/plan.zoom
    return scale[:, :, None]*(rx @ ry @ rz @ shear)

def scene_of(
    plan: EnsemblePlan, # decisions
    bank: TemplateBank, # sizes of the shapes
) -> Scene: # what `paint` needs
    "Where each shape of a plan lies on the grid"
    if max(plan.templates) >= len(bank):
        raise DataError(f"plan {plan.index}: asks for template {max(plan.templates)}, the bank has {len(bank)}. Use "
                        "the bank that the plan was drawn for")
    t, shape = np.array(plan.templates), np.array(plan.shape)
    size, matrices = bank.shapes[t], shape_matrices(plan)
    if plan.periodic:
        period = np.maximum(shape, size)
        low, shifts = (period - size + 1)//2, np.array(plan.shift) # an odd remainder goes in front
    else:
        period, low = np.zeros_like(size), np.zeros_like(size)
        shifts = (size - 1)/2 - (matrices @ (np.array(plan.shift)*shape - 0.5)[:, :, None])[:, :, 0]
    labels = np.arange(len(t)) + (0 if plan.first_hidden else 1)
    return Scene(plan.shape, t, matrices, shifts, low, period, labels, plan.dtype)

# %%
bank = procedural_bank(12, seed=4, size=(16, 40))
scene = scene_of(plans[0], bank)
scene.period[:2].tolist(), np.abs(np.linalg.det(scene.matrices[:2])).round(3).tolist()

# %%
scales = np.prod(plans[0].scale, axis=1)
assert np.allclose(np.abs(np.linalg.det(scene.matrices)), scales)
assert np.array_equal(np.linalg.det(scene.matrices) < 0, np.sum(plans[0].flip, axis=1) % 2 == 1)
with raises(DataError, match="the bank has 3"): scene_of(plans[0], procedural_bank(3, size=(8, 10)))

# %% [markdown]
# ## Rendering
# Paint, smooth, mask, wrap. With a mask, labels inside move up by one, so that 0 is outside and 1 is inside without a
# shape. The envelope gets the next free number. On a GPU everything but the mask's small tables happens there.

# %%
#| export
def _warped(lbl: np.ndarray, waves: Waves) -> np.ndarray:
    "Labels sampled at displaced places, plane by plane"
    out, (nx, ny, nz) = np.empty_like(lbl), lbl.shape
    for x in range(nx):
        dz, dy, dx = waves.row(x)
        ix = _sampled(np.float32(x), dx, nx, True)
        iy = _sampled(np.arange(ny, dtype=np.float32)[:, None], dy, ny, True)
        out[x] = lbl[ix, iy, _sampled(np.arange(nz, dtype=np.float32), dz, nz, True)]
    return out

def render_mask(
    plan: EnsemblePlan, # with a mask
    backend: Backend = "auto", # implementation
) -> np.ndarray: # (x, y, z) uint8, 1 is foreground
    "Foreground of a plan: the wavy ball, smoothed"
    if not plan.masked: raise DataError(f"plan {plan.index} has no mask (kind {plan.kind})")
    waves = Waves.of(mask_noise(plan), plan.shape, backend)
    mask = wavy_ball(waves, plan.centre, plan.radius, centred=plan.centred, backend=backend)
    return filter_labels(mask, "median", backend)

def render_labels(
    plan: EnsemblePlan, # decisions, from `draw_plan`
    bank: TemplateBank, # the shapes it was drawn for
    *,
    backend: Backend = "auto", # "numba", "torch", or whichever is there; the result is the same
    device: str = "cpu", # for the backend "torch", such as "cuda"
) -> np.ndarray: # (x, y, z) uint8, or uint16 if there are more than 255 labels
    "Turn a plan into a label map"
    backend = choose_backend(backend, device)
    lbl = paint(scene_of(plan, bank), bank, backend, device)
    if not isinstance(lbl, np.ndarray) and plan.max_label < 256: lbl = lbl.byte()
    if plan.warp:
        waves = Waves.of(mask_noise(plan, "warp"), plan.shape, backend)
        if isinstance(lbl, np.ndarray): lbl = _warped(lbl, waves)
        else: lbl = lbl.new_tensor(_warped(lbl.cpu().numpy(), waves))
    lbl = filter_labels(lbl, plan.smoothing, backend)
    if plan.masked:
        mask = render_mask(plan, backend)
        if not isinstance(lbl, np.ndarray):
            import torch
            mask = torch.from_numpy(mask).to(lbl.device)
        lbl = (lbl + 1)*mask
        if plan.envelope: lbl[near_surface(mask, plan.envelope, backend)] = int(lbl.max()) + 1
    return lbl if isinstance(lbl, np.ndarray) else lbl.cpu().numpy().astype(plan.dtype)

# %%
chosen = [next(p for p in plans if p.kind == k) for k in ("unconstrained", "foreground_masked")]
chosen += [next(p for p in plans if p.envelope == e) for e in (2, 4)]
rendered = [render_labels(p, bank) for p in chosen]
montage([np.ones_like(r[:, :, 32]) for r in rendered], lbls=[r[:, :, 32] for r in rendered], alpha=1,
        titles=[f"{p.kind} {p.envelope or ''}" for p in chosen], cols=4)

# %%
for p, r in zip(chosen, rendered):
    assert np.array_equal(r, render_labels(p, bank, backend="torch")) and r.max() <= p.max_label
shell = rendered[2] == rendered[2].max()
assert shell.any() and (rendered[1][render_mask(chosen[1]) == 0] == 0).all() and (rendered[0] == 0).any()

# %% [markdown]
# The same bank with the other preset, also with deformed shapes, and on a grid that is no cube.

# %%
shape = (64, 48, 80)
others = {"medvol": {"preset": "medvol"}, "warped": {"preset": "medvol", "warp": (6, 9)}, "anatomix": {}}
maps = {k: render_labels(draw_plan(3, 5, EnsembleConfig(shape=shape, p_mask=0, **v), 12), bank)
        for k, v in others.items()}
montage([np.ones_like(m[:, :, 40]) for m in maps.values()], lbls=[m[:, :, 40] for m in maps.values()], alpha=1,
        titles=list(maps))

# %%
assert {m.shape for m in maps.values()} == {shape} and not np.array_equal(maps["medvol"], maps["warped"])
many = draw_plan(0, 0, EnsembleConfig(preset="medvol", shape=16, min_templates=300, max_templates=300, p_mask=0), 12)
assert render_labels(many, bank).dtype == np.uint16 and many.max_label == 300

# %% [markdown]
# ## Statistics without voxels
# Because plans are cheap, what the settings promise can be counted. There are 20 to 39 shapes, each number equally
# likely; a third of the ensembles is of each kind; each envelope width has a third of those with an envelope.

# %%
histograms({"shapes": [p.n_shapes for p in plans]}, title="shapes of 400 plans")

# %%
share = np.array([sum(p.kind == k for p in plans) for k in KINDS])/400
assert np.abs(share - 1/3).max() < 0.1 and {p.envelope for p in plans} == {0, 2, 3, 4}
