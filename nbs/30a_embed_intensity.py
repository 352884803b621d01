# %% [markdown]
# # Contrast that training must not trust
#
# > Random changes of brightness: from noise and blur to curves that turn a CT into something like an MR.
#
# Two crops of one CT show the same place with the same grey value, and a network that is asked to recognise the place
# learns the grey value. Between scanners, contrast phases and even modalities it is the one thing that does *not* stay.
# Cross-SAM ([arXiv 2307.03535](https://arxiv.org/abs/2307.03535)) therefore trains with random monotone curves and
# inversions before it ever sees an MR. This page holds those curves and the milder changes of the other methods. Every
# function takes an image and a generator and returns a new image; what it does depends on nothing else.
#
# Images are on the scale of the networks, $[-50, 205]$, see [volumes for
# embeddings](30_embed_data.ipynb); curves think in $[0, 1]$.

# %%
#| default_exp embed.intensity

# %%
#| export
from collections.abc import Sequence

import numpy as np
from pydantic import Field
from scipy import ndimage

from medvol_nb.config import Config
from medvol_nb.core import DataError
from medvol_nb.embed.data import Contrast

# %%
from matplotlib import pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import raises, rng_for
from medvol_nb.embed.data import network_volume
from medvol_nb.geometry import Volume, affine_from

# %%
#| export
def to_unit(
    img: np.ndarray, # n-d, any axes, in [-50, 205]
) -> np.ndarray: # n-d, same axes, float32 in [0, 1]
    "From the scale of the networks to the scale of curves"
    return (np.asarray(img, np.float32) + 50)*np.float32(1/255)

def from_unit(
    img: np.ndarray, # n-d, any axes, in [0, 1]
) -> np.ndarray: # n-d, same axes, float32 in [-50, 205]
    "Inverse of `to_unit`"
    return np.asarray(img, np.float32)*np.float32(255) - np.float32(50)

# %%
scan = phantoms.abdomen(seed=1)
img, grid = network_volume(Volume(scan.img, affine_from(scan.spacing)))
unit, body = to_unit(img), img > -25
img.shape, f"{img.min():.0f} ... {img.max():.0f}", f"{unit.min():.2f} ... {unit.max():.2f}"

# %%
assert np.allclose(from_unit(unit), img, atol=1e-4)

# %% [markdown]
# ## Noise and blur
# The published configurations list a noise of standard deviation up to 0.001 on a scale of 255 steps: it changes
# nothing, and nobody noticed. Here the default reaches 5 steps, about the noise of a CT. Blur is given in millimetres,
# so that thick and thin voxels lose the same structures.

# %%
#| export
def add_noise(
    img: np.ndarray, # n-d, any axes
    rng: np.random.Generator, # of this sample
    std: tuple[float, float] = (0, 5), # range of the standard deviation, in the unit of `img`
) -> np.ndarray: # n-d, same axes, float32
    "Gaussian noise of random strength"
    level = np.float32(rng.uniform(*std))
    return np.asarray(img, np.float32) + level*rng.standard_normal(img.shape, np.float32)

def blur(
    img: np.ndarray, # (z, y, x)
    rng: np.random.Generator, # of this sample
    spacing: Sequence[float] | float = 2.0, # voxel size [mm]
    std_mm: tuple[float, float] = (0, 4), # range of the standard deviation [mm]
) -> np.ndarray: # (z, y, x) float32
    "Gaussian blur of random width"
    sigma = rng.uniform(*std_mm)/np.broadcast_to(np.asarray(spacing, np.float64), (img.ndim,))
    return ndimage.gaussian_filter(np.asarray(img, np.float32), sigma, mode="nearest")

# %%
noisy, soft = add_noise(img, rng_for(0, "noise")), blur(img, rng_for(0, "blur"), grid.spacing)
f"noise {np.std(noisy - img):.1f}, contrast left by the blur {soft.std()/img.std():.2f}"

# %%
assert np.array_equal(noisy, add_noise(img, rng_for(0, "noise"))) and np.std(noisy - img) > 0.5
assert np.std(add_noise(img, rng_for(0, "noise"), (0, 0.001)) - img) < 0.0011
dot = np.zeros((33, 33, 33), np.float32)
dot[16, 16, 16] = 1
spread = blur(dot, rng_for(0, "b"), (2, 1, 1), (3, 3))
width = [np.sqrt((spread.sum(axis=tuple({0, 1, 2} - {a}))*(np.arange(33) - 16)**2).sum()) for a in (0, 1)]
assert np.allclose(width, (1.5, 3), atol=0.05)

# %% [markdown]
# ## Random curves
# A curve has 5 to 15 control points on the diagonal; each inner one moves anywhere between its two neighbours, in
# order, so the curve stays monotone: tissues keep their order but not their distance. Inversion before the curve swaps
# the order as well, as the change from T1 to T2 does. Stretching puts the control points over the range that the image
# really uses. Only voxels of the mask change: air stays air.

# %%
#| export
def shift_curve(
    rng: np.random.Generator, # of this sample
    points: tuple[int, int] = (5, 15), # fewest and most control points
    window: tuple[float, float] = (0.0, 1.0), # part that moves; outside of it the curve is the identity
) -> tuple[np.ndarray, np.ndarray]: # two arrays (n,) float64: x and y of the control points, both rising
    "A random monotone curve from [0, 1] to [0, 1]"
    x = np.linspace(*window, int(rng.integers(points[0], points[1] + 1)))
    y = x.copy()
    for i in range(1, len(y) - 1): y[i] = rng.uniform(y[i - 1], y[i + 1])
    before, after = np.linspace(0, window[0], 5, endpoint=False), np.linspace(1, window[1], 5, endpoint=False)[::-1]
    if window[0] > 0: x, y = np.concatenate([before, x]), np.concatenate([before, y])
    if window[1] < 1: x, y = np.concatenate([x, after]), np.concatenate([y, after])
    return x, y

def _through(v: np.ndarray, curve: tuple[np.ndarray, np.ndarray], invert: bool, stretch: bool) -> np.ndarray:
    "Values through a curve; `stretch` puts the curve over the range of the values"
    if invert: v = 1 - v
    low, high = (float(v.min()), float(v.max())) if stretch and len(v) else (0.0, 1.0)
    if high <= low: return v
    return low + (high - low)*np.interp((v - low)/(high - low), *curve)

def histogram_shift(
    img: np.ndarray, # n-d, any axes, in [0, 1]
    rng: np.random.Generator, # of this sample
    mask: np.ndarray | None = None, # n-d, same axes, bool: voxels that change; None: all
    *,
    p: float = 0.9, # chance that anything happens
    points: tuple[int, int] = (5, 15), # fewest and most control points
    p_invert: float = 0.3, # chance of 1 - img before the curve
    p_stretch: float = 0.3, # chance that the curve is put over the image's own range
) -> np.ndarray: # n-d, same axes, float32 in [0, 1]
    "Change the contrast by a random monotone curve, as from one modality to another"
    out = np.array(img, np.float32)
    if rng.random() >= p: return out
    curve = shift_curve(rng, points)
    invert, stretch = rng.random() < p_invert, rng.random() < p_stretch
    inside = ... if mask is None else mask
    out[inside] = _through(out[inside], curve, invert, stretch)
    return out

# %%
fig, axs = plt.subplots(2, 5, figsize=(7, 3.4), layout="constrained")
for k, (top, low) in enumerate(axs.T):
    shifted = histogram_shift(unit, rng_for(k, "curve"), body, p=1)
    low.imshow(shifted[len(img)//2], cmap="Greys_r")
    low.set(xticks=[], yticks=[])
    rng = rng_for(k, "curve")
    rng.random()
    top.plot(*shift_curve(rng), "o-", ms=3)
    top.set(aspect="equal", xticks=[0, 1], yticks=[0, 1])

# %%
small, small_body = unit[10:20, :40, :40], body[10:20, :40, :40]
for k in range(50):
    x, y = shift_curve(rng_for(k))
    assert 5 <= len(x) <= 15 and (np.diff(y) >= 0).all() and (y[0], y[-1]) == (0, 1)
    x, y = shift_curve(rng_for(k), window=(0.3, 0.7))
    fixed = (x <= 0.3) | (x >= 0.7)
    assert (np.diff(x) > 0).all() and (np.diff(y) >= 0).all() and np.array_equal(x[fixed], y[fixed])
    shifted = histogram_shift(small, rng_for(k), small_body, p=1)
    assert np.array_equal(shifted[~small_body], small[~small_body]) and shifted.min() >= 0 and shifted.max() <= 1
changed = [not np.array_equal(histogram_shift(small, rng_for(k), small_body), small) for k in range(100)]
assert 80 <= sum(changed) < 100

# %% [markdown]
# ## A curve for each region
# Between CT and MR no single curve does: liver and spleen may swap while bone and air do not. With a map of regions
# (`make_slic_mask` of [the preparation](30d_embed_prepare.ipynb)) each gets a curve of its own. A CT keeps its air and
# its metal: its curve only moves between a lower bound of 0.1 to 0.5 and an upper one of 0.6 to 0.8, with five fixed
# points on either side. The reference moves the first points of this list instead of the middle ones, so that its
# "fixed" lower side is what moves; here the middle moves.

# %%
#| export
def histogram_shift_regions(
    img: np.ndarray, # n-d, any axes, in [0, 1]
    regions: np.ndarray, # n-d, same axes, integer: 0 stays as it is
    rng: np.random.Generator, # of this sample
    contrast: Contrast = "ct", # 'ct': curves move inside a random window only
    *,
    p: float = 0.6, # chance that anything happens
    points: tuple[int, int] = (5, 15), # fewest and most control points
    p_invert: float = 0.3, # chance of 1 - img in a region
    p_stretch: float = 0.2, # chance that a curve is put over the region's own range
) -> np.ndarray: # n-d, same axes, float32 in [0, 1]
    "Change the contrast of each region by a curve of its own"
    if np.shape(regions) != np.shape(img):
        raise DataError(f"regions of shape {np.shape(regions)} for an image of shape {np.shape(img)}")
    out = np.array(img, np.float32)
    if rng.random() >= p: return out
    for region in np.unique(regions):
        if region == 0: continue
        window = (rng.uniform(0.1, 0.5), rng.uniform(0.6, 0.8)) if contrast == "ct" else (0.0, 1.0)
        curve = shift_curve(rng, points, window)
        invert, stretch = rng.random() < p_invert, rng.random() < p_stretch
        inside = regions == region
        out[inside] = _through(out[inside], curve, invert, stretch)
    return out

# %%
regions = np.where(body, 1 + (np.arange(img.shape[2]) > img.shape[2]//2), 0)
fig, axs = plt.subplots(1, 4, figsize=(7, 2), layout="constrained")
for k, ax in enumerate(axs):
    ax.imshow(histogram_shift_regions(unit, regions, rng_for(k), p=1)[len(img)//2], cmap="Greys_r")
    ax.set(xticks=[], yticks=[])

# %%
shifted = histogram_shift_regions(unit, regions, rng_for(0), p=1, p_invert=0, p_stretch=0)
assert np.array_equal(shifted[regions == 0], unit[regions == 0]) and not np.array_equal(shifted, unit)
assert np.array_equal(shifted[unit < 0.1], unit[unit < 0.1]) and np.array_equal(shifted[unit > 0.8], unit[unit > 0.8])
with raises(DataError, match="regions of shape"): histogram_shift_regions(unit, regions[1:], rng_for(0))

# %% [markdown]
# ## Gamma, coil, planes and tissue
# Four more that the reference holds ready: a power of the image, the slow brightness field of an MR coil (the
# exponential of a random polynomial), fewer planes, and a smooth random deformation with a resting border, for volumes
# whose label map moves along. Crops for the loss never use the last one: they need to know where each voxel came from.

# %%
#| export
def gamma(
    img: np.ndarray, # n-d, any axes, in [0, 1]
    rng: np.random.Generator, # of this sample
    log_gamma: tuple[float, float] = (-1, 1), # range of the exponent's logarithm
) -> np.ndarray: # n-d, same axes, float32
    "A random power of the image"
    return np.sign(img)*np.abs(np.asarray(img, np.float32))**np.float32(np.exp(rng.uniform(*log_gamma)))

def bias_field(
    img: np.ndarray, # (z, y, x) in [0, 1]
    rng: np.random.Generator, # of this sample
    coefficients: float = 0.5, # largest weight of a term
    order: int = 3, # of the polynomial
) -> np.ndarray: # (z, y, x) float32
    "Brightness that varies slowly in space, as near the coils of an MR scanner"
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in img.shape), indexing="ij", sparse=True)
    field = np.zeros(img.shape, np.float32)
    for i in range(order + 1):
        for j in range(order + 1 - i):
            for k in range(order + 1 - i - j):
                field += np.float32(rng.uniform(-coefficients, coefficients))*(z**i*y**j*x**k)
    return np.asarray(img, np.float32)*np.exp(field)

def crop_planes(
    img: np.ndarray, # (z, y, x)
    rng: np.random.Generator, # of this sample
    planes: tuple[int, int] = (18, 32), # at least so many, and fewer than so many
) -> tuple[np.ndarray, int]: # (z, y, x) array, a view of the image; index of its first plane
    "Keep a random slab of axial planes; all if there are not more"
    n = min(int(rng.integers(*planes)), len(img))
    first = int(rng.integers(0, len(img) - n + 1))
    return img[first:first + n], first

def _splines(n: int, points: int) -> np.ndarray:
    "(n, points): what each control point adds to each voxel of an axis, quadratic B-splines"
    at = [np.linspace(0, points - 1, n)]
    return np.stack([ndimage.map_coordinates(row, at, order=2, mode="nearest") for row in np.eye(points)], axis=1)

def elastic(
    img: np.ndarray, # (z, y, x)
    rng: np.random.Generator, # of this sample
    labels: np.ndarray | None = None, # (z, y, x) integer, moved along
    *,
    points: int = 7, # control points per axis
    largest: float = 7.5, # displacement of a control point [voxel]
    locked: int = 1, # layers of control points at the border that rest
) -> tuple[np.ndarray, np.ndarray | None]: # (z, y, x) float32 image, and labels if given
    "Smooth random deformation with a resting border"
    if points < 2*locked + 2: raise DataError(f"elastic: {points} points with {locked} resting layers leave none")
    moved = np.zeros((3, *(points,)*3))
    inner = (slice(None), *(slice(locked, points - locked),)*3)
    moved[inner] = rng.uniform(-largest, largest, moved[inner].shape)
    at = np.indices(img.shape, dtype=np.float32)
    at += np.einsum("cijk,zi,yj,xk->czyx", moved, *(_splines(n, points) for n in img.shape), optimize=True)
    out = ndimage.map_coordinates(np.asarray(img, np.float32), at, order=1, mode="nearest")
    return out, None if labels is None else ndimage.map_coordinates(labels, at, order=0, mode="nearest")

# %%
coil = bias_field(unit, rng_for(1, "coil"))
bent, bent_lbl = elastic(unit, rng_for(1, "tissue"), body.astype(np.uint8))
fig, axs = plt.subplots(1, 3, figsize=(6, 2), layout="constrained")
for ax, a, name in zip(axs, (gamma(unit, rng_for(1, "gamma")), coil, bent), ("gamma", "coil", "tissue")):
    ax.imshow(a[len(img)//2], cmap="Greys_r")
    ax.set(xticks=[], yticks=[], title=name)

# %%
assert np.allclose(gamma(unit, rng_for(0), (0, 0)), unit, atol=1e-6)
assert np.allclose(bias_field(unit, rng_for(0), 0), unit)
assert np.array_equal(elastic(small, rng_for(0), largest=0)[0], small)
slab, first = crop_planes(img, rng_for(2))
assert 18 <= len(slab) < 32 and np.array_equal(slab, img[first:first + len(slab)])
assert np.array_equal(bent[0], unit[0]) and np.abs(bent - unit).max() > 0.1
assert ((to_unit(np.float32(-25)) < bent) == (bent_lbl > 0)).mean() > 0.98
with raises(DataError, match="leave none"): elastic(unit, rng_for(0), points=4, locked=2)

# %% [markdown]
# ## What a configuration asks for
# The plain methods use noise and, in one configuration, blur. Cross-SAM uses curves, then blur. `Augment` says which,
# and `augment` applies them in that order.

# %%
#| export
class Augment(Config):
    "Which random changes of contrast a sample gets"
    noise: tuple[float, float] = (0.0, 5.0) # standard deviation, in steps of the scale of 255
    blur_mm: tuple[float, float] = (0.0, 0.0) # standard deviation [mm]
    histogram_shift: float = Field(0.0, ge=0, le=1) # chance of a random curve
    regions: float = Field(0.0, ge=0, le=1) # chance of a curve for each region, where a region map is given
    log_gamma: tuple[float, float] = (0.0, 0.0) # logarithm of the exponent
    bias_field: float = Field(0.0, ge=0) # largest coefficient of the field

AUGMENTS = {
    "plain": Augment(), # SAM, SAM++ crops
    "blur": Augment(blur_mm=(0, 4)), # sam_deeplesion, and the whole volumes of SAM++
    "aggressive": Augment(noise=(0, 0), histogram_shift=0.9, blur_mm=(0, 4)), # Cross-SAM
    "none": Augment(noise=(0, 0)),
}

def augment(
    img: np.ndarray, # (z, y, x) in [-50, 205]
    rng: np.random.Generator, # of this sample
    how: Augment, # what to do
    *,
    spacing: Sequence[float] | float = 2.0, # voxel size [mm]
    mask: np.ndarray | None = None, # (z, y, x) bool: voxels whose contrast may change; None: brighter than -25
    regions: np.ndarray | None = None, # (z, y, x) integer region map
    contrast: Contrast = "ct", # for the curves of regions
) -> np.ndarray: # (z, y, x) float32 in about [-50, 205]
    "Change the contrast of a sample: curves, gamma, coil, blur, noise"
    img = np.asarray(img, np.float32)
    curves = how.histogram_shift or (how.regions and regions is not None)
    if curves or any(how.log_gamma) or how.bias_field:
        unit = to_unit(img)
        inside = img > -25 if mask is None else mask
        if how.histogram_shift: unit = histogram_shift(unit, rng, inside, p=how.histogram_shift)
        if how.regions and regions is not None:
            unit = histogram_shift_regions(unit, regions, rng, contrast, p=how.regions)
        if any(how.log_gamma): unit = gamma(unit, rng, how.log_gamma)
        if how.bias_field: unit = bias_field(unit, rng, how.bias_field)
        img = from_unit(unit)
    if any(how.blur_mm): img = blur(img, rng, spacing, how.blur_mm)
    if any(how.noise): img = add_noise(img, rng, how.noise)
    return img

# %%
fig, axs = plt.subplots(1, 4, figsize=(7, 2), layout="constrained")
for ax, name in zip(axs, AUGMENTS):
    shown = augment(img, rng_for(5, "sample"), AUGMENTS[name], spacing=grid.spacing)
    ax.imshow(shown[len(img)//2], cmap="Greys_r")
    ax.set(xticks=[], yticks=[], title=name)

# %%
assert np.array_equal(augment(img, rng_for(0), AUGMENTS["none"]), img)
for how in AUGMENTS.values():
    once, twice = (augment(img, rng_for(3), how) for _ in range(2))
    assert np.array_equal(once, twice) and once.dtype == np.float32 and np.isfinite(once).all()
