# %% [markdown]
# # Phantoms
#
# > Seeded synthetic volumes with known truth: the test data of all pages.
#
# A segmentation network that learns nothing and one that learns slowly look alike on real data, and a flipped axis
# looks like anatomy. A phantom settles such questions, because its truth is known: where each organ is, which side is
# left, which way a surface faces, how far a voxel was moved. The phantoms here are no simulations of physics. They
# are the smallest pictures that have the *structure* each method needs: folded layers for a brain, organs on their
# proper side for a CT, branching tubes, rolled-up sheets, dividing cells. All are made in a fraction of a second,
# from a seed, with no file and no download. Everything comes back as plain NumPy arrays; page 04 turns them into
# volumes with a place in the world.

# %%
#| default_exp phantoms

# %%
#| export
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medvol_nb.core import DataError, rng_for

# %%
import io
import time

from IPython.display import Image
from matplotlib.figure import Figure
from scipy.ndimage import label

from medvol_nb.core import close, raises

# %% [markdown]
# Plotting has its own page (07), which imports this one. Until then a strip of pictures is all we need. Medical
# slices are `(x, y)` arrays, so `cut` turns them until the patient's front or head is on top.

# %%
def strip(*panels, width=7):
    tall = max(image.shape[0]/image.shape[1] for _, image in panels)
    fig = Figure(figsize=(width, tall*width/len(panels) + 0.3), layout="constrained")
    for ax, (title, image) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        ax.imshow(image, cmap="gray" if image.dtype != np.uint8 or image.max() > 20 else "nipy_spectral")
        ax.set_title(title, fontsize=8)
        ax.set_axis_off()
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100)
    return Image(buffer.getvalue())

def cut(vol, axis, index=None):
    return np.take(vol, vol.shape[axis]//2 if index is None else index, axis).T[::-1]

# %% [markdown]
# ## Balls and ellipsoids
# Voxel centres lie at whole numbers, so the middle of an axis of length $n$ is $(n-1)/2$, and a voxel belongs to a
# body if its *centre* does. Even so, the number of voxels of a ball comes close to $\frac43\pi r^3$, since what the
# rule adds on one side it takes away on the other.

# %%
#| export
def _numbers(values, n: int, what: str, kind: type = float, positive: bool = True) -> tuple:
    "`values` as a tuple of `n` finite numbers of one kind, a scalar repeated"
    out = (values,)*n if np.isscalar(values) else tuple(values)
    allowed = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    good = len(out) == n and all(isinstance(v, allowed) and np.isfinite(v) and not isinstance(v, bool) for v in out)
    if not good or (positive and min(out) <= 0):
        rule = f"{n} {'positive ' if positive else ''}{'integers' if kind is int else 'numbers'}"
        raise DataError(f"{what}: needs {rule}, got {values!r}")
    return tuple(kind(v) for v in out)

def _open(axes: Sequence[np.ndarray]) -> list[np.ndarray]:
    "1-D axes as arrays that broadcast to the grid"
    return np.meshgrid(*axes, indexing="ij", sparse=True)

def _radius(grid: list[np.ndarray], centre: Sequence[float], radii: Sequence[float], turn: float = 0.0) -> np.ndarray:
    "Distance from `centre` in units of `radii`: 1 on the ellipsoid's surface"
    x, y, z = (g - np.float32(c) for g, c in zip(grid, centre))
    c, s = np.float32(np.cos(np.deg2rad(turn))), np.float32(np.sin(np.deg2rad(turn)))
    if turn: x, y = c*x + s*y, c*y - s*x
    return np.sqrt(sum((g/np.float32(r))**2 for g, r in zip((x, y, z), radii)))

# %%
#| export
def ellipsoid(
    shape: int | Sequence[int], # size of the grid (x, y, z) [voxel]
    centre: float | Sequence[float], # (x, y, z) position of the middle [voxel]
    radii: float | Sequence[float], # (x, y, z) semi-axes [voxel]
    *,
    turn: float = 0.0, # rotation about the z axis, from x towards y [degree]
) -> np.ndarray: # (x, y, z) bool
    "Solid ellipsoid: the voxels whose centre lies inside"
    shape = _numbers(shape, 3, "ellipsoid: shape", int)
    centre, radii = _numbers(centre, 3, "ellipsoid: centre", positive=False), _numbers(radii, 3, "ellipsoid: radii")
    return _radius(_open([np.arange(n, dtype=np.float32) for n in shape]), centre, radii, turn) <= 1

def ball(
    size: int | Sequence[int], # size of the grid (x, y, z), scalar for a cube [voxel]
    radius: float, # [voxel]
    centre: Sequence[float] | None = None, # (x, y, z) position of the middle [voxel]; default: middle of the grid
) -> np.ndarray: # (x, y, z) bool
    "Solid ball: the voxels whose centre lies inside"
    shape = _numbers(size, 3, "ball: size", int)
    return ellipsoid(shape, [(n - 1)/2 for n in shape] if centre is None else centre, radius)

# %%
strip(("ball", cut(ball(32, 10), 2)), ("ellipsoid", cut(ellipsoid(32, 15.5, (14, 6, 9)), 2)),
      ("turned by 30°", cut(ellipsoid(32, 15.5, (14, 6, 9), turn=30), 2)), width=5)

# %%
for radius in (6, 9, 12, 15): assert abs(ball(32, radius).sum()/(4/3*np.pi*radius**3) - 1) < 0.02
assert (ball(15, 5) == ball(15, 5)[::-1]).all() and ball((9, 7, 1), 3).shape == (9, 7, 1)
assert (ellipsoid(16, 7.5, (6, 3, 3), turn=90) == ellipsoid(16, 7.5, (3, 6, 3))).all()

# %%
with raises(DataError, match="ball: size: needs 3 positive integers, got"): ball((8, 8), 3)
with raises(DataError, match="radii"): ellipsoid(8, 4, (3, 3, 0))

# %% [markdown]
# ## Smooth noise that lives in space
# Folds, bias fields, textures and displacements are all *smooth noise*: random numbers on coarse knots, with cubic
# B-splines between them. Two choices matter. The knots belong to space, not to the array, and repeat after 32 of
# them; so the same seed gives the same field on a coarse and a fine grid, and a phantom is the same patient at every
# voxel size. And the spline is evaluated one axis after the other, four taps each, which makes it cheap. The mean of
# $\sum_k B_k^2$ along one axis is $151/315$; dividing by its root brings the variance to one.

# %%
#| export
_KNOTS = 32

def smooth_noise(
    axes: Sequence[np.ndarray], # one 1-D array of positions an axis, any unit
    scale: float, # distance of knots, same unit as the positions; structures are about twice as wide
    rng: np.random.Generator, # from `rng_for`
) -> np.ndarray: # float32, one axis a position array, mean about 0, variance about 1
    "Smooth random field at given positions, the same on every grid"
    if not scale > 0: raise DataError(f"smooth_noise: scale must be positive, got {scale!r}")
    out = rng.standard_normal((_KNOTS,)*len(axes), dtype=np.float32)
    for d, points in enumerate(axes):
        t = np.asarray(points, np.float64)/scale
        i = np.floor(t)
        f, i = t - i, i.astype(np.int64)
        taps = ((1 - f)**3, 3*f**3 - 6*f**2 + 4, -3*f**3 + 3*f**2 + 3*f + 1, f**3)
        along = [-1 if k == d else 1 for k in range(len(axes))]
        weights = [(w/6/np.sqrt(151/315)).astype(np.float32).reshape(along) for w in taps]
        out = sum(np.take(out, (i + k) % _KNOTS, axis=d)*w for k, w in enumerate(weights))
    return out

# %%
fine = np.arange(0, 96, 1.0)
fields = [smooth_noise((fine, fine), scale, rng_for(0, "demo")) for scale in (4, 8, 16)]
strip(*((f"scale {s}", f) for s, f in zip((4, 8, 16), fields)), width=5)

# %%
assert close(fields[1][::3, ::3], smooth_noise((fine[::3], fine[::3]), 8, rng_for(0, "demo")))
assert abs(fields[0].mean()) < 0.2 and abs(fields[0].std() - 1) < 0.1

# %% [markdown]
# ## What comes back
# A phantom is an image, its label map, the voxel size, and what the labels are called. Medical phantoms are `(x, y,
# z)` arrays in RAS+ order: the first index grows towards the patient's **r**ight, the second towards **a**nterior,
# the third towards **s**uperior. So the patient's left is the low end of the first axis.
#
# Anatomy is laid out in millimetres around the middle of the grid. If no voxel size is given, it is chosen such that
# the whole body part is in view; if one is given, a small grid shows a part of the patient, as a scanner would.

# %%
#| export
class Phantom(NamedTuple):
    "A synthetic image with its truth"
    img: np.ndarray # (x, y, z) intensities
    lbl: np.ndarray # (x, y, z) uint8 label ids, 0 background
    spacing: tuple[float, float, float] # (x, y, z) voxel size [mm]
    names: dict[int, str] # label id -> name, without the background

def _frame(shape, spacing, view: tuple[float, ...], what: str) -> tuple[tuple, tuple, list[np.ndarray]]:
    "Checked shape, voxel size and centred positions [mm]; without a voxel size `view` fills the grid"
    shape = _numbers(shape, 3, f"{what}: shape", int)
    spacing = _numbers([v/n for v, n in zip(view, shape)] if spacing is None else spacing, 3, f"{what}: spacing")
    return shape, spacing, [((np.arange(n) - (n - 1)/2)*s).astype(np.float32) for n, s in zip(shape, spacing)]

# %% [markdown]
# ## A head, T1-like
# From outside in: scalp, dark skull, cerebrospinal fluid, a folded grey ribbon, white matter, ventricles and deep
# grey nuclei. The depth below an ellipsoid decides the layer, and smooth noise added to the depth folds it. A slow
# multiplicative bias field and noise follow; outside the head the image is exactly 0.
#
# A head is nearly symmetric, so flips hide well in it. This one wears a bright capsule on the patient's **left**
# temple, has a wider left ventricle, a nose in front and a neck below.

# %%
#| export
def _head_parts(grid: list[np.ndarray], axes: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    "Depth below the brain's surface [mm], labels, and masks of the head and of the capsule"
    rx, ry, rz = np.array([64, 80, 66])*np.clip(1 + 0.03*rng.standard_normal(3), 0.92, 1.08)
    x, y, z = grid
    depth = (1 - _radius(grid, (0, 0, 8), (rx, ry, rz)))*68
    fold, ribbon = smooth_noise(axes, 11, rng), smooth_noise(axes, 18, rng)
    pial = 1 + 9*np.maximum(fold - 0.4, 0)
    grey = depth > pial
    white = depth > np.maximum(13 + 4*ribbon + 7*fold, pial + 6)
    fluid = (np.abs(x - 3*np.sin(y/40)) < 2.1) & (depth < 30) & (z > 5)
    for side, size in ((1, 1.0), (-1, 1.35)):
        fluid = fluid | (_radius(grid, (14*side, -6, 16), (6*size, 30, 8*size), 8*side) < 1)
    nuclei = np.minimum(*(_radius(grid, (20*side, 4, 0), (10, 17, 10)) for side in (1, -1))) < 1
    lbl = np.where(depth > -3, 1, 0) + (grey & ~fluid) + (white & ~fluid & ~nuclei)
    skin = depth > -16 + 1.5*ribbon
    nose = _radius(grid, (0, ry + 17, -22), (9, 12, 14)) < 1
    neck = (_radius(grid, (0, -18, 0), (46, 50, 400)) < 1) & (z < 0)
    capsule = _radius(grid, (-rx - 20, 8, 4), (7, 7, 7)) < 1
    return depth, lbl.astype(np.uint8), skin | nose | neck | capsule, capsule

def head(
    shape: Sequence[int] = (48, 56, 48), # size (x, y, z) [voxel]
    seed: int = 0, # which person
    spacing: float | Sequence[float] | None = None, # voxel size (x, y, z) [mm]; default: 192 x 224 x 192 mm in view
    *,
    noise: float = 3.0, # standard deviation of the noise; white matter is about 100
) -> Phantom: # img float32 >= 0; labels 1 csf, 2 grey, 3 white
    "T1-like head with a folded cortex, a bias field, and a capsule on the patient's left"
    from scipy.ndimage import gaussian_filter
    shape, spacing, axes = _frame(shape, spacing, (192, 224, 192), "head")
    rng = rng_for(seed, "phantom", "head")
    depth, lbl, inside, capsule = _head_parts(_open(axes), axes, rng)
    img = np.where(inside, np.float32(85), np.float32(0))
    img[(depth > -10) & (depth < -3)] = 14
    for k, value in ((1, 30), (2, 68), (3, 100)): img[lbl == k] = value
    img[capsule] = 180
    bias = np.exp(0.12*smooth_noise(axes, 110, rng))
    img = gaussian_filter(img, 0.5)*bias + noise*rng.standard_normal(shape, dtype=np.float32)
    img = np.where(inside, np.maximum(img, 0), 0).astype(np.float32)
    return Phantom(img, lbl, spacing, {1: "csf", 2: "grey", 3: "white"})

# %%
brain = head()
strip(("sagittal", cut(brain.img, 0, 20)), ("coronal", cut(brain.img, 1)), ("axial", cut(brain.img, 2)),
      ("labels", cut(brain.lbl, 2)), ("another person", cut(head(seed=1).img, 2)))

# %% [markdown]
# The capsule is bright and sits at the low end of the first axis. Half the voxel size shows the same head, finer.

# %%
assert brain.img[:6].max() > 1.2*brain.img[-6:].max() and brain.img.dtype == np.float32
assert brain.img[0, 0, -1] == 0 and set(np.unique(brain.lbl)) == {0, 1, 2, 3}
levels = [brain.img[brain.lbl == k].mean() for k in (1, 2, 3)]
assert levels == sorted(levels)
for a, b in zip(head().img, brain.img): assert (a == b).all()

# %%
def millilitres(phantom): return np.bincount(phantom.lbl.ravel())[1:]*np.prod(phantom.spacing)/1000

volumes = np.array([millilitres(brain), millilitres(head((32, 40, 32)))])
assert np.abs(volumes[1]/volumes[0] - 1).max() < 0.1
volumes.round().astype(int)

# %% [markdown]
# ## An abdomen, CT-like
# Hounsfield units tell tissues apart: air −1000, fat about −100, water 0, muscle 55, contrast-filled organs 100 to
# 200, bone several hundred. The liver lies on the patient's right, the spleen on the left. Every patient (seed) has
# organs of slightly other size, place and outline.

# %%
#| export
_ORGANS = {"liver": ((72, 18, 70), (64, 66, 62), 112), "spleen": ((-92, -30, 84), (28, 38, 44), 125),
           "right kidney": ((58, -42, -8), (25, 24, 48), 180), "left kidney": ((-58, -42, 6), (25, 24, 48), 180),
           "urinary bladder": ((0, 34, -125), (34, 30, 28), 8)}
_ABDOMEN = ("liver", "spleen", "right kidney", "left kidney", "aorta", "vertebrae", "urinary bladder", "ribs")

def _abdomen_parts(grid: list[np.ndarray], axes: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    "Normalised distance from the body's axis (1 at the skin), and the mask of each organ"
    wide, deep, tall = np.exp(0.04*np.clip(rng.standard_normal(3), -2, 2))
    x, y, z = grid[0]/wide, grid[1]/deep, grid[2]/tall
    waist = 1 - 0.05*np.exp(-((z + 20)/70)**2)
    body = np.sqrt((x/165)**2 + (y/115)**2)/waist
    bend = 6*rng.standard_normal()*np.cos(z/90)
    spine = np.hypot(x - bend, y + 66)
    disc = np.cos(2*np.pi*z/34 + rng.uniform(0, 6))
    wobble = 0.07*smooth_noise(axes, 32, rng)
    ribs = (np.abs(body - 0.83) < 0.035) & (np.cos(2*np.pi*(z + 0.3*y)/30) > 0.3) & (z > -20) & (np.abs(x) > 22)
    process = (np.abs(x - bend) < 5) & (y < -80) & (y > -100)
    out = {"ribs": ribs, "vertebrae": ((spine < 22) | process) & (disc > -0.8),
           "aorta": np.hypot(x - bend + 14, y + 36) < 11 + 1.5*np.sin(z/60)}
    for name, (centre, radii, _) in _ORGANS.items():
        centre = centre + 4*np.clip(rng.standard_normal(3), -2, 2)
        radii = radii*np.exp(0.06*np.clip(rng.standard_normal(3), -2, 2))
        out[name] = (_radius([x, y, z], centre, radii) + wobble < 1) & (body < 0.78) & ~out["vertebrae"] & ~out["aorta"]
    out["spleen"] &= ~out["liver"]
    for kidney in ("right kidney", "left kidney"): out[kidney] &= ~(out["liver"] | out["spleen"])
    return body, out

def abdomen(
    shape: Sequence[int] = (64, 48, 56), # size (x, y, z) [voxel]
    seed: int = 0, # which patient
    spacing: float | Sequence[float] | None = None, # voxel size (x, y, z) [mm]; default: 384 x 288 x 336 mm in view
    *,
    noise: float = 12.0, # standard deviation of the noise [HU]
) -> Phantom: # img int16 [HU]; labels liver, spleen, kidneys, aorta, vertebrae, urinary bladder, ribs
    "CT-like trunk with organs on their proper side"
    from scipy.ndimage import gaussian_filter
    shape, spacing, axes = _frame(shape, spacing, (384, 288, 336), "abdomen")
    rng = rng_for(seed, "phantom", "abdomen")
    body, parts = _abdomen_parts(_open(axes), axes, rng)
    img = np.full(shape, -1000, np.float32)
    bowel = np.where(smooth_noise(axes, 22, rng) > 0.1, 35, -95)
    for limit, value in ((1.0, -105), (0.9, 55), (0.78, bowel)): np.copyto(img, value, where=body < limit)
    lbl = np.zeros(shape, np.uint8)
    values = {"ribs": 480, "vertebrae": 320, "aorta": 210, **{k: v[2] for k, v in _ORGANS.items()}}
    for name, value in values.items():
        img[parts[name]] = value
        lbl[parts[name]] = _ABDOMEN.index(name) + 1
    img = gaussian_filter(img, 0.5) + np.where(body < 1, 6*smooth_noise(axes, 9, rng), 0)
    img += noise*rng.standard_normal(shape, dtype=np.float32)
    return Phantom(np.clip(np.rint(img), -1024, 3000).astype(np.int16), lbl, spacing, dict(enumerate(_ABDOMEN, 1)))

# %%
trunk = abdomen()
soft = np.clip(trunk.img, -160, 300)
strip(("sagittal", cut(soft, 0)), ("coronal, right is right", cut(soft, 1, 17)), ("axial", cut(soft, 2, 36)),
      ("labels", cut(trunk.lbl, 2, 36)), ("patient 3", cut(np.clip(abdomen(seed=3).img, -160, 300), 2, 36)))

# %%
middle = {name: np.argwhere(trunk.lbl == k).mean(0) for k, name in trunk.names.items()}
assert middle["liver"][0] > 40 > 24 > middle["spleen"][0]
assert middle["right kidney"][0] > middle["left kidney"][0]
assert middle["vertebrae"][1] < middle["aorta"][1] < middle["liver"][1]
assert middle["urinary bladder"][2] < middle["left kidney"][2] < middle["spleen"][2]
{name: [round(float(v)) for v in at] for name, at in middle.items()}

# %% [markdown]
# Patients differ, but not wildly: over seeds the liver of this population has about one litre, and no two are alike.

# %%
litres = [float((p.lbl == 1).sum()*np.prod(p.spacing)/1e6) for p in (abdomen((32, 24, 28), seed=s) for s in range(6))]
assert len(set(litres)) == 6 and 0.5 < min(litres) and max(litres) < 2
[round(v, 2) for v in litres]

# %%
with raises(DataError, match="abdomen: spacing: needs 3 positive numbers"): abdomen(spacing=(1, 0, 1))

# %% [markdown]
# ## A body nobody knows
# To compare clusterings fairly one wants many bodies without fixed anatomy. In this one, a warped ellipsoid holds a
# number of random organs, painted one over the other, each with a random mean between −600 and 800 HU. The pages on
# synthetic views draw their label maps from this population; the clusterings are measured on `organs`, below.

# %%
#| export
def random_body(
    shape: int | Sequence[int] = (48, 48, 48), # size (x, y, z) [voxel]
    seed: int = 0, # which body
    n_organs: int = 13, # ellipsoids painted in order, <= 254
) -> Phantom: # img float32 [HU]; label 1 is the body, 2... the organs still visible
    "Warped ellipsoid filled with random organs"
    from scipy.ndimage import gaussian_filter
    shape = _numbers(shape, 3, "random_body: shape", int)
    if not 0 <= n_organs <= 254: raise DataError(f"random_body: n_organs must be 0...254, got {n_organs!r}")
    rng = rng_for(seed, "phantom", "random_body")
    axes = [((2*np.arange(n) + 1)/n - 1).astype(np.float32) for n in shape]
    warped = [g + np.float32(0.08)*np.clip(smooth_noise(axes, 0.5, rng), -3, 3) for g in _open(axes)]
    lbl = (_radius(warped, (0, 0, 0), (0.92, 0.8, 0.98)) <= 1).astype(np.uint8)
    means = np.array([-1000, 40, *rng.uniform(-600, 800, n_organs)], np.float32)
    for k in range(n_organs):
        organ = _radius(warped, rng.uniform(-0.55, 0.55, 3), rng.uniform(0.12, 0.38, 3)) <= 1
        lbl[organ & (lbl > 0)] = k + 2
    texture = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 1.5)
    img = gaussian_filter(means[lbl], 0.7) + 20*texture/max(float(texture.std()), 1e-6)
    img += 25*rng.standard_normal(shape, dtype=np.float32)
    names = {1: "body", **{k + 2: f"organ {k + 1}" for k in range(n_organs) if (lbl == k + 2).any()}}
    return Phantom(img.astype(np.float32), lbl, (1.0, 1.0, 1.0), names)

# %%
bodies = [random_body(seed=s) for s in (0, 1)]
strip(*((f"seed {s}", cut(b.img, 2)) for s, b in enumerate(bodies)),
      *((f"labels of {s}", cut(b.lbl, 2)) for s, b in enumerate(bodies)), width=6)

# %%
assert set(np.unique(bodies[0].lbl)) - {0} == set(bodies[0].names)
assert bodies[0].img[bodies[0].lbl == 0].mean() < -900 and (bodies[0].img != bodies[1].img).any()

# %% [markdown]
# ## Vessels
# A tree grows from the bottom of the grid: each tube ends in two thinner ones. Murray's law (C. Murray, *The
# physiological principle of minimum work*, PNAS 1926) gives their radii, $r_0^3 = r_1^3 + r_2^3$, with a floor of 1.2
# voxels below which a tube would fall apart. Every tube has its own label.

# %%
#| export
def _stamp(lbl: np.ndarray, centre: np.ndarray, radius: float, k: int) -> None:
    "Give the free voxels of a ball the label `k`"
    lo = np.maximum(np.ceil(centre - radius), 0).astype(int)
    hi = np.minimum(np.floor(centre + radius) + 1, lbl.shape).astype(int)
    if (lo >= hi).any(): return
    box = lbl[tuple(map(slice, lo, hi))]
    near = sum((g - c)**2 for g, c in zip(np.ogrid[tuple(map(slice, lo, hi))], centre)) <= radius**2
    box[near & (box == 0)] = k

def vessels(
    shape: int | Sequence[int] = (48, 48, 64), # size (x, y, z) [voxel]
    seed: int = 0, # which tree
    n_branches: int = 15, # tubes, 1...255
) -> Phantom: # img float32, about 300 in vessels, 50 around; lbl one id a tube, 1 the trunk
    "Tree of branching tubes that grows along +z"
    from scipy.ndimage import gaussian_filter
    shape = _numbers(shape, 3, "vessels: shape", int)
    if not 1 <= n_branches <= 255: raise DataError(f"vessels: n_branches must be 1...255, got {n_branches!r}")
    rng = rng_for(seed, "phantom", "vessels")
    size, lbl = np.array(shape, float), np.zeros(shape, np.uint8)
    queue = [(size*(0.5, 0.5, 0), np.array([0, 0, 1.0]), max(0.07*size.min(), 1.2), 0.3*size[2])]
    for k in range(1, n_branches + 1):
        start, way, radius, length = queue.pop(0)
        end = np.clip(start + way*length, 0.06*size, 0.94*size - 1)
        middle = (start + end)/2 + 0.12*length*rng.standard_normal(3)
        t = np.linspace(0, 1, int(2*length) + 8)[:, None]
        for point in (1 - t)**2*start + 2*t*(1 - t)*middle + t**2*end: _stamp(lbl, point, radius, k)
        part = rng.uniform(0.35, 0.65)
        side = rng.standard_normal(3)
        side -= way*(side @ way)
        side /= np.linalg.norm(side)
        for share, sign in ((part, 1), (1 - part, -1)):
            new = way + sign*side*rng.uniform(0.5, 0.9)
            queue.append((end, new/np.linalg.norm(new), max(radius*share**(1/3), 1.2), max(0.82*length, 6.0)))
    img = 50 + 250*gaussian_filter((lbl > 0).astype(np.float32), 0.6) + 15*rng.standard_normal(shape, dtype=np.float32)
    names = {int(k): f"vessel {k}" for k in np.unique(lbl[lbl > 0])}
    return Phantom(img.astype(np.float32), lbl, (1.0, 1.0, 1.0), names)

# %%
tree = vessels()
strip(("largest value along y", tree.img.max(1).T[::-1]), ("labels along y", tree.lbl.max(1).T[::-1]),
      ("labels along x", tree.lbl.max(0).T[::-1]), ("seed 1", vessels(seed=1).img.max(1).T[::-1]), width=6)

# %%
assert label(tree.lbl > 0, np.ones((3, 3, 3)))[1] == 1
assert tree.img[tree.lbl > 0].mean() > 200 > 100 > tree.img[tree.lbl == 0].mean()

# %%
with raises(DataError, match="n_branches must be 1...255"): vessels(n_branches=400)

# %% [markdown]
# ## Rolled sheets
# A carbonised papyrus roll in a scanner is a spiral of wavy sheets. With $\theta$ the angle and $r$ the distance from
# the axis, the level function $\varphi = r - p\,\theta/2\pi + w$ grows by the pitch $p$ from one winding to the next,
# where $w$ is smooth noise; the sheets are where $\varphi \bmod p$ is within half a thickness of $p/2$. Its gradient
# is the normal, known exactly but for $w$, and points outward. Across a sheet the image gets brighter from the inner
# to the outer face, so which way a normal points can be *seen*, and learned.
#
# These arrays are `(z, y, x)`, as zarr stores of such scans are, and so are the components of the normals. The core,
# where a spiral has no meaningful normal, is left empty.

# %%
#| export
class Sheets(NamedTuple):
    "A synthetic roll with its truth"
    img: np.ndarray # (z, y, x) uint8 intensities
    mask: np.ndarray # (z, y, x) uint8, 1 on sheets
    normals: np.ndarray # (3, z, y, x) float32 unit vectors, components (z, y, x), outward; 0 off the sheets

def sheets(
    shape: Sequence[int] = (48, 64, 64), # size (z, y, x) [voxel]
    seed: int = 0, # which roll
    pitch: float = 16.0, # distance of windings [voxel]
    thickness: float = 5.0, # of a sheet, < pitch [voxel]
    noise: float = 7.0, # standard deviation of the noise [grey level]
) -> Sheets: # image, sheet mask and outward normals
    "Wavy spiral of papyrus-like sheets about the z axis"
    shape = _numbers(shape, 3, "sheets: shape", int)
    if not 0 < thickness < pitch:
        raise DataError(f"sheets: needs 0 < thickness < pitch, got thickness {thickness!r} and pitch {pitch!r}")
    rng = rng_for(seed, "phantom", "sheets")
    axes = [(np.arange(n) - (n - 1)/2).astype(np.float32) for n in shape]
    z, y, x = _open(axes)
    r = np.maximum(np.hypot(y, x), np.float32(1e-3))
    turn = np.arctan2(y, x)/np.float32(2*np.pi) + np.float32(rng.uniform())
    knots = 1.5*pitch
    wave = 0.2*pitch*smooth_noise([np.append(a, a[-1] + 1) for a in axes], knots, rng)
    slope = [np.diff(wave, axis=d)[:n0, :n1, :n2] for d, (n0, n1, n2) in enumerate([shape]*3)]
    level = np.mod(r - np.float32(pitch)*turn + wave[:-1, :-1, :-1], np.float32(pitch))
    across = (level - (pitch - thickness)/2)/thickness
    mask = (across >= 0) & (across < 1) & (r > pitch/2)
    spin = np.float32(pitch/(2*np.pi))/r**2
    grad = np.stack([slope[0], y/r + spin*-x + slope[1], x/r + spin*y + slope[2]])
    normals = np.where(mask, grad/np.linalg.norm(grad, axis=0), 0).astype(np.float32)
    img = 50 + 110*np.where(mask, 0.1 + 0.9*across, 0) + 6*smooth_noise(axes, 3, rng)
    img = img + noise*rng.standard_normal(shape, dtype=np.float32)
    return Sheets(np.clip(np.rint(img), 0, 255).astype(np.uint8), mask.astype(np.uint8), normals)

# %%
roll = sheets()
colours = (np.moveaxis(roll.normals[::-1, 24], 0, -1) + 1)/2
strip(("image, z fixed", roll.img[24]), ("image, y fixed", roll.img[:, 40]), ("mask", roll.mask[24]),
      ("normals as colours", colours), ("seed 1", sheets(seed=1).img[24]))

# %% [markdown]
# On sheets the normals have length one and point away from the axis; off them they are zero. A step along the normal
# leads to a brighter voxel, until the sheet ends.

# %%
on = roll.mask > 0
z, y, x = np.meshgrid(*(np.arange(n) - (n - 1)/2 for n in on.shape), indexing="ij")
outward = (roll.normals[1]*y + roll.normals[2]*x)/np.hypot(y, x)
assert close(np.linalg.norm(roll.normals, axis=0), on, atol=1e-5)
assert outward[on].min() > 0.3 and outward[on].mean() > 0.9

# %%
slopes = np.stack(np.gradient(sheets(noise=0).img.astype(np.float32)))
assert (slopes*roll.normals).sum(0)[on].mean() > 5

# %%
with raises(DataError, match="0 < thickness < pitch"): sheets(thickness=20)

# %% [markdown]
# ## Embryos
# Time-lapse incubators photograph a human embryo at several focal planes while it divides; the developmental phases
# have fixed names, from the second polar body (`tPB2`) to the hatching blastocyst (`tHB`). The drawing below shows
# what an expert counts: the zona as a ring, polar body and pronuclei, the number of cells, then the compact morula
# and the growing cavity. Each embryo (seed) keeps its place, its orientation and a texture of its own over all
# phases; only the camera noise changes with `frame`. Out of focus, the picture blurs.

# %%
#| export
EMBRYO_PHASES = ("tPB2", "tPNa", "tPNf", "t2", "t3", "t4", "t5", "t6",
                 "t7", "t8", "t9+", "tM", "tSB", "tB", "tEB", "tHB")

def _embryo_discs(phase: str) -> list[tuple[float, float, float, float]]:
    "Discs (u, v, radius, brightness) of a phase, in units of the zona's radius"
    def ring(n: int, far: float, radius: float, start: float = 0.0) -> list:
        turns = start + 2*np.pi*np.arange(n)/n
        return [(far*np.cos(t), far*np.sin(t), radius, 0.07) for t in turns]
    if phase in EMBRYO_PHASES[:3]:
        pronuclei = [(0.22*s, 0.0, 0.19, 0.16) for s in (-1, 1)][:EMBRYO_PHASES.index(phase)]
        return [(0.0, 0.0, 0.7, 0.07), (0.0, 0.83, 0.13, 0.1), *pronuclei]
    if phase == "t9+": return ring(9, 0.6, 0.27) + ring(3, 0.24, 0.26, 0.5)
    if phase[1:].isdigit():
        n = int(phase[1:])
        return ring(n, {2: 0.37, 3: 0.42, 4: 0.47}[n], {2: 0.5, 3: 0.42, 4: 0.38}[n]) if n < 5 else \
            ring(n - 1, 0.56, 0.33) + [(0.0, 0.0, 0.31, 0.07)]
    cavity = (0.08, 0.02, 0.82, -0.16)
    return {"tM": [(0.0, 0.0, 0.74, 0.12)],
            "tSB": [(0.0, 0.0, 0.8, 0.1), (0.28, 0.1, 0.3, -0.16)],
            "tB": [(0.0, 0.0, 0.88, 0.1), (0.16, 0.06, 0.58, -0.16)],
            "tEB": [(0.0, 0.0, 1.0, 0.1), cavity, (-0.52, 0.0, 0.26, 0.12)],
            "tHB": [(0.0, 0.0, 0.98, 0.1), cavity, (1.04, 0.1, 0.4, 0.05), (-0.5, 0.0, 0.26, 0.12)]}[phase]

def embryo_frame(
    phase_index: int, # 0...15, place in `EMBRYO_PHASES`
    size: int = 128, # width and height [pixel]
    seed: int = 0, # which embryo
    focal: float = 0.0, # distance from the plane in focus [micrometre], such as 15 or -45
    *,
    frame: int = 0, # number of the picture; changes the camera noise only
) -> np.ndarray: # (row, column) uint8
    "Grey picture that resembles an embryo of one phase at one focal plane"
    from scipy.ndimage import gaussian_filter
    if not isinstance(phase_index, (int, np.integer)) or not 0 <= phase_index < len(EMBRYO_PHASES):
        raise DataError(f"embryo_frame: phase_index must be 0...{len(EMBRYO_PHASES) - 1}, got {phase_index!r}")
    (size,) = _numbers(size, 1, "embryo_frame: size", int)
    if not np.isfinite(focal): raise DataError(f"embryo_frame: focal must be finite, got {focal!r}")
    phase, rng = EMBRYO_PHASES[phase_index], rng_for(seed, "phantom", "embryo")
    shift, turn, zona = rng.uniform(-0.1, 0.1, 2), rng.uniform(0, 2*np.pi), rng.uniform(0.66, 0.72)
    jitter = 0.025*rng.standard_normal((16, 3))
    at = ((2*np.arange(size) + 1)/size - 1).astype(np.float32)
    v, u = ((g - np.float32(s))/np.float32(zona) for g, s in zip(_open((at, at)), shift))
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = c*u + s*v, c*v - s*u
    far, soft = np.hypot(u, v), np.float32(1.5/size + 0.01)
    thick = 0.05 if phase in ("tEB", "tHB") else 0.13
    def disc(d: np.ndarray, radius: float) -> np.ndarray: return 1/(1 + np.exp(np.clip((d - radius)/soft, -40, 40)))
    img = 0.47 + 0.16*(disc(far, 1.04 + thick) - disc(far, 1.04)) - 0.1*np.exp(-((far - 1.04)/0.035)**2)
    texture = smooth_noise((at, at), 0.08, rng)
    img += 0.05*texture*(0.3 + 0.7*disc(far, 1.0))
    if phase in ("tM", "tSB"): img += 0.05*np.sign(texture)*disc(far, 0.74)
    for (cu, cv, radius, bright), (du, dv, dr) in zip(_embryo_discs(phase), jitter):
        d, radius = np.hypot(u - (cu + du), v - (cv + dv)), radius*(1 + dr)
        rim, glow = np.exp(-((d - radius)/0.035)**2), np.exp(-((d - radius + 0.08)/0.05)**2)
        img += bright*disc(d, radius) - 0.2*rim + 0.08*glow
    if focal: img = gaussian_filter(img, 0.2*abs(focal)*size/128, mode="nearest")
    camera = rng_for(seed, "phantom", "camera", int(phase_index), float(focal), int(frame))
    return np.clip(np.rint(255*img + 3*camera.standard_normal(img.shape)), 0, 255).astype(np.uint8)

# %%
one = np.vstack([np.hstack([embryo_frame(p, 96) for p in row]) for row in np.arange(16).reshape(2, 8)])
strip(("the 16 phases of one embryo, " + EMBRYO_PHASES[0] + " to " + EMBRYO_PHASES[-1], one))

# %%
strip(*((f"focal {f} µm", embryo_frame(5, focal=f)) for f in (-45, -15, 0, 15)),
      *((f"embryo {s}", embryo_frame(13, seed=s)) for s in (1, 2)))

# %% [markdown]
# The blur takes contrast away, other frames of an embryo differ by noise only, and other embryos differ by more.

# %%
def likeness(a, b): return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

contrast = [embryo_frame(5, focal=f).std() for f in (0, 15, 30, 45)]
assert contrast == sorted(contrast, reverse=True)
assert likeness(embryo_frame(5), embryo_frame(5, frame=1)) > 0.95
assert likeness(embryo_frame(5), embryo_frame(5, seed=1)) < 0.9
assert (embryo_frame(5) == embryo_frame(5)).all()

# %%
with raises(DataError, match="phase_index must be 0...15"): embryo_frame(16)

# %% [markdown]
# ## Organs for clustering
# How well supervoxels follow organs can only be told where the organs are known, and only if the features are as
# awkward as those of a network: many mixed channels, coarse, a bit noisy. `organs` paints thirteen random ellipsoids
# into a body, bends the whole with a smooth displacement, and adds blur, texture and noise. Coordinates run from −1 to
# 1 along every axis, so other shapes show the same organs at other voxel sizes.
#
# `organ_features` stands in for an image encoder: a 14-channel local descriptor at half resolution (smoothed
# intensity, gradients, one nuisance field) goes through a random two-layer network to 32 channels; three noisy "views",
# each blurred within its own plane, are summed, and the sum is interpolated to full resolution.

# %%
#| export
def organs(
    shape: int | Sequence[int] = (48, 48, 48), # size of the grid (x, y, z) [voxel]
    seed: int = 0, # which body
    *,
    noise: float = 25.0, # standard deviation of the white noise [HU]
) -> Phantom: # img float32 [HU]; labels 0 outside, 1 body, 2...14 organs
    "Body of thirteen bent ellipsoids in a cube of 200 mm, for measuring how regions follow borders"
    from scipy.ndimage import gaussian_filter
    shape = _numbers(shape, 3, "organs: shape", int)
    rng = rng_for(seed, "phantom", "organs")
    axes = [((2*np.arange(n) + 1)/n - 1).astype(np.float32) for n in shape]
    grid = [g + np.float32(0.24)*np.tanh(0.6*smooth_noise(axes, 0.5, rng)) for g in _open(axes)]
    body = _radius(grid, (0, 0, 0), (0.92, 0.8, 0.98)) < 1
    lbl, img = body.astype(np.uint8), np.where(body, np.float32(40), np.float32(-1000))
    for k in range(2, 15):
        centre, radii, value = rng.uniform(-0.55, 0.55, 3), rng.uniform(0.12, 0.38, 3), rng.uniform(-600, 800)
        inside = body & (_radius(grid, centre, radii) < 1)
        lbl[inside], img[inside] = k, value
    texture = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 1.5)
    img = gaussian_filter(img, 0.7) + 20*texture/max(texture.std(), 1e-6)
    img += noise*rng.standard_normal(shape, dtype=np.float32)
    names = {1: "body"} | {k: f"organ {k - 1}" for k in range(2, 15)}
    return Phantom(img, lbl, tuple(200/n for n in shape), names)

def _halved(a: np.ndarray) -> np.ndarray:
    "Means of pairs along the last three axes; the last voxel counts twice where it has no partner"
    for axis in (-3, -2, -1):
        at = np.arange(0, a.shape[axis], 2)
        a = (a.take(at, axis) + a.take(np.minimum(at + 1, a.shape[axis] - 1), axis))/2
    return a

def _doubled(a: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    "Linear interpolation back to `shape`"
    for axis, n in zip((-3, -2, -1), shape):
        at = np.arange(n)
        near, far = at//2, np.clip(at//2 + 2*(at % 2) - 1, 0, a.shape[axis] - 1)
        a = np.float32(0.75)*a.take(near, axis) + np.float32(0.25)*a.take(far, axis)
    return a

def organ_features(
    img: np.ndarray, # (x, y, z) image, such as that of `organs`
    seed: int = 0, # of the random network and the noise
    *,
    half: bool = False, # as they come, at half resolution, instead of interpolated
) -> np.ndarray: # (32, x, y, z) float32
    "Stand-in for the features of an image encoder: 32 mixed, noisy channels of half resolution"
    from scipy.ndimage import gaussian_filter, gaussian_gradient_magnitude
    img = np.asarray(img, np.float32)
    if img.ndim != 3: raise DataError(f"organ_features: img must be (x, y, z), got shape {img.shape}")
    rng = rng_for(seed, "phantom", "organ features")
    local = [gaussian_filter(img, s) for s in (1, 2, 4, 8)] + [gaussian_gradient_magnitude(img, s) for s in (1, 2, 4)]
    local += [gaussian_filter(img, s, order=np.eye(3, dtype=int)[d]) for s in (1.5, 3) for d in range(3)]
    local.append(smooth_noise([((2*np.arange(n) + 1)/n - 1).astype(np.float32) for n in img.shape], 0.5, rng))
    x = np.stack([_halved(v) for v in local]).astype(np.float32)
    x -= x.mean((1, 2, 3), keepdims=True)
    x /= x.std((1, 2, 3), keepdims=True) + np.float32(1e-6)
    def layer(x: np.ndarray, n: int) -> np.ndarray:
        weight = rng.standard_normal((n, len(x)), dtype=np.float32)/np.sqrt(np.float32(len(x)))
        return np.tensordot(weight, x, 1)
    y = layer(np.maximum(layer(x, 64), 0), 32)
    y /= 1 + np.exp(-1.702*y)
    out = np.zeros_like(y)
    for axis in (1, 2, 3):
        sigma = [0 if d in (0, axis) else 1.6 for d in range(4)]
        out += gaussian_filter(y + np.float32(0.15)*rng.standard_normal(y.shape, dtype=np.float32), sigma)
    return out if half else _doubled(out, img.shape)

# %%
body = organs()
descriptor = organ_features(body.img)
strip(("image", cut(body.img, 2)), ("labels", cut(body.lbl, 2)), ("feature 1", cut(descriptor[0], 2)),
      ("feature 7", cut(descriptor[6], 2)), ("the same body, 16 slices", cut(organs((48, 48, 16)).lbl, 2)))

# %%
assert set(np.unique(body.lbl)) <= set(range(15)) and body.img[body.lbl == 0].mean() < -900
assert np.abs(millilitres(organs((48, 48, 24)))[0]/millilitres(body)[0] - 1) < 0.05
assert descriptor.shape == (32, 48, 48, 48) and organ_features(body.img, half=True).shape == (32, 24, 24, 24)

# %%
with raises(DataError, match="img must be"): organ_features(descriptor)

# %% [markdown]
# ## Known displacements
# A registration can be checked if the true displacement is known. `smooth_field` makes one: three components of
# smooth noise, scaled such that the longest vector has the stated length. `warp` pulls back: the new value at voxel
# $i$ is the old one at $i + f(i)$. So a *constant* field of +2 along x moves the content by −2, which is worth
# remembering.

# %%
#| export
def smooth_field(
    shape: Sequence[int], # size (x, y, z) [voxel]
    seed: int = 0, # which field
    amplitude: float = 3.0, # length of the longest vector [voxel], >= 0
    scale: float = 16.0, # distance of the knots [voxel]; amplitude below about scale/4 keeps the map without folds
) -> np.ndarray: # (3, x, y, z) float32 displacement [voxel]
    "Smooth random displacement with a known largest length"
    shape = _numbers(shape, 3, "smooth_field: shape", int)
    if not 0 <= amplitude < np.inf: raise DataError(f"smooth_field: amplitude must be >= 0, got {amplitude!r}")
    axes = [np.arange(n) for n in shape]
    field = np.stack([smooth_noise(axes, scale, rng_for(seed, "phantom", "field", k)) for k in range(3)])
    return field*np.float32(amplitude/np.linalg.norm(field, axis=0).max())

def warp(
    vol: np.ndarray, # (x, y, z) image, labels or mask
    field: np.ndarray, # (3, x, y, z) displacement [voxel]
    order: int = 1, # 0 nearest (labels), 1 linear, 3 cubic
) -> np.ndarray: # (x, y, z), dtype of `vol`; beyond the border the nearest voxel counts
    "Pull-back: the value at voxel i is that of `vol` at i + field(i)"
    from scipy.ndimage import map_coordinates
    vol, field = np.asarray(vol), np.asarray(field)
    if vol.ndim != 3 or field.shape != (3, *vol.shape):
        raise DataError(f"warp: the field of a volume {vol.shape} must have shape {(3, *vol.shape)}, got {field.shape}")
    if order not in (0, 1, 2, 3): raise DataError(f"warp: order must be 0, 1, 2 or 3, got {order!r}")
    at = [g + f for g, f in zip(_open([np.arange(n, dtype=np.float64) for n in vol.shape]), field)]
    if order == 0:
        idx = tuple(np.clip(np.rint(a), 0, n - 1).astype(np.intp) for a, n in zip(at, vol.shape))
        return vol[idx]
    out = map_coordinates(vol.astype(np.float64), at, order=order, mode="nearest")
    if vol.dtype == bool: return out >= 0.5
    if vol.dtype.kind not in "iu": return out.astype(vol.dtype)
    info = np.iinfo(vol.dtype)
    return np.clip(np.rint(out), info.min, info.max).astype(vol.dtype)

# %%
field = smooth_field(brain.img.shape, amplitude=4)
strip(("before", cut(brain.img, 2)), ("displacement along x", cut(field[0], 2)),
      ("after", cut(warp(brain.img, field), 2)), ("labels after", cut(warp(brain.lbl, field, order=0), 2)), width=6)

# %%
assert close(np.linalg.norm(field, axis=0).max(), 4, atol=1e-4)
assert (warp(brain.img, 0*field, order=1) == brain.img).all() and (warp(brain.lbl, 0*field, 0) == brain.lbl).all()

shift = np.zeros_like(field)
shift[0] = 2
for order in (0, 1, 3): assert close(warp(brain.img, shift, order)[:-8], brain.img[2:-6], atol=1e-3)

# %% [markdown]
# With a knot distance of 16 voxels and 4 voxels at most, no voxel overtakes its neighbour: the determinant of the
# map's Jacobian stays positive.

# %%
jacobian = np.stack([np.stack(np.gradient(f)) for f in field]) + np.eye(3)[:, :, None, None, None]
folds = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))
assert folds.min() > 0
round(float(folds.min()), 2), round(float(folds.max()), 2)

# %%
with raises(DataError, match=r"must have shape \(3, 48, 56, 48\)"): warp(brain.img, field[:, :40])

# %% [markdown]
# ## All of them, timed
# Each phantom takes well under half a second, so every page makes its own. A phantom depends on its seed alone.

# %%
makers = {"head": head, "abdomen": abdomen, "random_body": random_body, "vessels": vessels, "sheets": sheets,
          "organs": organs, "organ_features": lambda: organ_features(body.img),
          "smooth_field": lambda: smooth_field((48, 48, 48)), "embryo_frame": lambda: embryo_frame(5)}

def seconds(make):
    start = time.perf_counter()
    make()
    return round(time.perf_counter() - start, 3)

spent = {name: seconds(make) for name, make in makers.items()}
spent

# %%
assert max(spent.values()) < 3
