# %% [markdown]
# # Two views of one scan
#
# > Cut twice, scaled and turned differently, and still every voxel of one view knows where it is in the other.
#
# The training signal of an anatomical embedding is free: cut two overlapping boxes out of one scan, change them, and
# the truth about which voxel of the one is which voxel of the other is known from the cutting. The reference carries
# this truth through the pipeline as *data*: four extra float64 volumes with the coordinates of every voxel, resampled
# along with the image, 540 MB for a CT of 256³, and then rounded to half precision, which is an error of up to 0.25 mm
# where positives are defined by 2 mm. But a box that is scaled and turned is an affine map. It has twelve numbers.
#
# Here a view is a matrix $M$ and an offset $c$: voxel $q = (z, y, x)$ of the view shows the world position
# $p = M q + c$ in millimetres. The image is sampled once, through that map, and correspondences are computed for the
# few thousand points that a loss asks for.

# %%
#| default_exp embed.views

# %%
#| export
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medvol_nb.core import DataError
from medvol_nb.embed.data import Contrast, contrast_of, limits_of, net_volume, rescale
from medvol_nb.geometry import Volume, resample_to, same_grid
from medvol_nb.stores import as_format_error
from medvol_nb.volume import read_volume

# %%
import time
from dataclasses import replace

from matplotlib import pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import close, raises, rng_for, tmpdir
from medvol_nb.geometry import affine_from, reorient, to_axes
from medvol_nb.volume import write_volume

# %% [markdown]
# ## What views are cut from
# A source is a scan in the axes of the networks, with its contrast and the ends of its brightness scale. Its voxels
# stay where they are: of a zarr store only the chunks under a view are read. What has to be known about the whole scan
# (the box around the tissue, places inside a mask) is found once, on a subset of the voxels about 4 mm apart.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Source:
    "A scan that views are cut from"
    data: Any # (z, y, x) to the head, back and left; NumPy or an array that can be sliced (zarr)
    affine: np.ndarray # (4, 4) index (z, y, x) -> RAS+ [mm]
    contrast: Contrast = "ct" # which brightness scale
    mask: Any = None # (z, y, x) on the same grid, not 0 inside; None: no mask
    regions: Any = None # (z, y, x) on the same grid, labels: organs, or regions of the contrast; None: none
    name: str = "scan" # for messages

    def read(
        self,
        array: Any, # data, mask or regions
        part: Any = ..., # slices
    ) -> np.ndarray: # (z, y, x)
        "Part of an array; damage is an error with the name of the scan"
        with as_format_error(self.name): return np.asarray(array[part])

    @property
    def shape(self) -> tuple[int, ...]: return tuple(int(n) for n in self.data.shape) # (z, y, x) [voxel]
    @property
    def spacing(self) -> np.ndarray: return np.sqrt((self.affine[:3, :3]**2).sum(axis=0)) # (3,) z, y, x [mm]
    @cached_property
    def _sparse(self) -> tuple[np.ndarray, np.ndarray]: # every k-th voxel, about 4 mm apart, and k
        steps = np.maximum(1, (4/self.spacing).astype(int))
        picks = tuple(slice(None, None, int(k)) for k in steps)
        whole = self.read(self.data)
        if whole.dtype.kind == "f" and not np.isfinite(whole).all():
            raise DataError(f"{self.name}: {np.count_nonzero(~np.isfinite(whole))} voxels are NaN or infinite")
        return np.ascontiguousarray(whole[picks]), steps
    @cached_property
    def limits(self) -> tuple[float, float]: return limits_of(self._sparse[0], self.contrast) # of the brightness
    @cached_property
    def box(self) -> tuple[np.ndarray, np.ndarray]: # first and last + 1 voxel of the box around the tissue
        img, steps = self._sparse
        tissue = img > -500 if self.contrast == "ct" else rescale(img, self.limits) > -25
        if not tissue.any(): raise DataError(f"{self.name}: shows no tissue")
        spans = [np.flatnonzero(tissue.any(axis=tuple({0, 1, 2} - {a}))) for a in range(3)]
        low = np.array([s[0] for s in spans])*steps - steps + 1
        high = np.array([s[-1] for s in spans])*steps + steps
        return np.maximum(low, 0), np.minimum(high, self.shape)
    @cached_property
    def inside(self) -> np.ndarray: # (n, 3) indices of mask voxels, about 4 mm apart
        steps, mask = self._sparse[1], self.read(self.mask)
        found = np.argwhere(mask[tuple(slice(None, None, int(k)) for k in steps)])*steps
        return found if len(found) else np.argwhere(mask) # small things can lie between

def open_source(
    scan: Any, # path of any readable file, or a `Volume`
    mask: Any = None, # path or `Volume` on the same voxels, stored in any orientation
    regions: Any = None, # path or `Volume` of labels on the same voxels
    *,
    contrast: Literal["auto"] | Contrast = "auto", # 'ct' or 'mr'
    name: str | None = None, # for messages; default: the path
) -> Source: # its voxels are on disk if the file is a zarr store in (z, y, x) LPS order, else in memory
    "Open a scan for cutting views"
    def opened(x: Any) -> Volume:
        with as_format_error(name or str(x)):
            return net_volume(x if isinstance(x, Volume) else read_volume(x, lazy=True))
    vol = opened(scan)
    name = name or str(vol.meta.get("path", "scan"))
    if min(vol.shape) < 1: raise DataError(f"{name}: has no voxels, shape {vol.shape}")
    others = []
    for what, x in (("mask", mask), ("regions", regions)):
        other = None if x is None else opened(x)
        if other is not None and not same_grid(vol, other, 0.1*min(vol.spacing)):
            raise DataError(f"{name}: its {what} is on another grid, {other} for {vol}")
        others.append(None if other is None else other.data)
    if contrast == "auto":
        steps = tuple(slice(None, None, max(1, n//64)) for n in vol.shape)
        with as_format_error(name): contrast = contrast_of(Volume(np.asarray(vol.data[steps]), vol.affine, "zyx"))
    return Source(vol.data, vol.affine, contrast, *others, name)

# %%
scan = phantoms.abdomen(seed=1)
ct = Volume(scan.img, affine_from(scan.spacing, (-90, -70, -40)))
source = open_source(ct, Volume((scan.lbl > 0).astype(np.uint8), ct.affine))
source.shape, source.contrast, [v.tolist() for v in source.box], len(source.inside)

# %%
for v in (reorient(ct, "AIL"), to_axes(ct, "zyx")):
    again = open_source(v)
    assert np.array_equal(again.data, source.data) and close(again.affine, source.affine, 1e-9)
low, high = source.box
tissue = np.argwhere(np.asarray(source.data) > -500)
assert (low <= tissue.min(axis=0)).all() and (high > tissue.max(axis=0)).all()
with raises(DataError, match="its mask is on another grid"): open_source(ct, Volume(scan.lbl[1:], ct.affine))

# %% [markdown]
# ## Sampling through a map
# One interpolation, on the part of the scan that the view touches: axis by axis if the view is straight, by
# `grid_sample` if it is turned. Outside of the scan there is air, and `valid` says so. If the view's voxels are larger
# than the scan's, the part is smoothed first, with the rule of [geometry](04_geometry.ipynb), so that a view and a
# whole volume prepared by `network_volume` look alike.

# %%
#| export
@dataclass(frozen=True, eq=False)
class View:
    "A box of a scan as a network sees it, and where it is"
    image: np.ndarray # (z, y, x) float32 in [-50, 205]
    matrix: np.ndarray # (3, 3) float64: world position of voxel q is matrix @ q + offset
    offset: np.ndarray # (3,) float64, RAS+ [mm]
    valid: np.ndarray # (z, y, x) bool: inside the scan
    mask: np.ndarray | None = None # (z, y, x) bool, if the source has a mask
    regions: np.ndarray | None = None # (z, y, x) integer, if the source has regions

    def to_world(
        self,
        idx: np.ndarray, # (..., 3) voxel indices (z, y, x)
    ) -> np.ndarray: # (..., 3) float64, RAS+ [mm]
        "World position of voxels"
        return np.asarray(idx, np.float64) @ self.matrix.T + self.offset

    def to_index(
        self,
        pts_xyz: np.ndarray, # (..., 3) RAS+ [mm]
    ) -> np.ndarray: # (..., 3) float64 voxel indices (z, y, x), fractional
        "Voxels at world positions"
        return (np.asarray(pts_xyz, np.float64) - self.offset) @ np.linalg.inv(self.matrix).T

_Sampled = tuple[Callable[[np.ndarray, int], np.ndarray], np.ndarray]

def _straight(step: np.ndarray, start: np.ndarray, shape: Sequence[int], low: np.ndarray, high: np.ndarray) -> _Sampled:
    "Axis by axis: a function of (array, order), and which voxels of the view are between `low` and `high`"
    at = [step[k, k]*np.arange(n) + start[k] for k, n in enumerate(shape)]
    z, y, x = ((c >= a - 1e-6) & (c <= b + 1e-6) for c, a, b in zip(at, low, high))
    place = np.eye(4)
    place[:3, :3], place[:3, 3] = step, start
    def sampled(a: np.ndarray, order: int) -> np.ndarray:
        vol = Volume(np.asarray(a, np.float32), np.eye(4), "zyx")
        return resample_to(vol, place, shape, order, antialias=False, fill=-50*order).data
    return sampled, z[:, None, None] & y[:, None] & x

def _turned(step: np.ndarray, start: np.ndarray, shape: Sequence[int], low: np.ndarray, high: np.ndarray) -> _Sampled:
    "The same for a turned view, by one grid"
    axes = [torch.arange(n, dtype=torch.float32).view([-1 if a == k else 1 for a in range(3)])
            for k, n in enumerate(shape)]
    at, s = torch.empty(*shape, 3), step.tolist()
    for k in range(3): at[..., k] = axes[0]*s[k][0] + axes[1]*s[k][1] + (axes[2]*s[k][2] + float(start[k]))
    valid = ((at >= torch.tensor((low - 1e-4).tolist())) & (at <= torch.tensor((high + 1e-4).tolist()))).all(dim=-1)
    def sampled(a: np.ndarray, order: int) -> np.ndarray:
        room = torch.tensor([max(n - 1, 1) for n in a.shape])
        grid = (at*(2/room) - 1).flip(-1)[None]
        img = torch.from_numpy(np.ascontiguousarray(a, np.float32))[None, None]
        mode = "bilinear" if order else "nearest"
        return torch.nn.functional.grid_sample(img, grid, mode, "border", align_corners=True)[0, 0].numpy()
    return sampled, valid.numpy()

def sample_view(
    source: Source, # scan
    matrix: np.ndarray, # (3, 3): world position of voxel q is matrix @ q + offset
    offset: np.ndarray, # (3,) RAS+ [mm]
    shape: Sequence[int], # (z, y, x) of the view [voxel]
) -> View: # in the brightness of the networks
    "Sample a scan through an affine map"
    inverse = np.linalg.inv(source.affine[:3, :3])
    step, start = inverse @ matrix, inverse @ (offset - source.affine[:3, 3])
    ends = np.array(list(itertools.product(*((0, n - 1) for n in shape)))) @ step.T + start
    size = np.array(source.shape)
    sigma = np.maximum((np.sqrt((step**2).sum(axis=1)) - 1)/2, 0) # as in `geometry.resample_to`
    margin = 1 + np.ceil(3*sigma).astype(int)
    low = np.clip(np.floor(ends.min(axis=0)).astype(int) - margin, 0, size - 1)
    high = np.clip(np.ceil(ends.max(axis=0)).astype(int) + margin + 1, low + 1, size)
    part = tuple(slice(int(a), int(b)) for a, b in zip(low, high))
    img = rescale(source.read(source.data, part), source.limits)
    if sigma.max() > 0.15: img = ndimage.gaussian_filter(img, sigma, mode="nearest", truncate=3)
    turned = np.abs(step - np.diag(np.diag(step))).max() > 1e-9*np.abs(step).max()
    sampled, valid = (_turned if turned else _straight)(step, start - low, shape, -0.5 - low, size - low - 0.5)
    image = sampled(img, 1)
    image[~valid] = -50
    mask = regions = None
    if source.mask is not None: mask = (sampled(source.read(source.mask, part) > 0, 0) > 0) & valid
    if source.regions is not None:
        found, lbl = np.unique(source.read(source.regions, part), return_inverse=True) # float32 holds positions exactly
        regions = found[sampled(lbl.reshape(high - low), 0).astype(int)]
        regions[~valid] = 0
    return View(image, np.asarray(matrix, np.float64), np.asarray(offset, np.float64), valid, mask, regions)

# %% [markdown]
# A ramp that equals a world coordinate in every voxel makes the law visible: the image *is* the map.

# %%
def ramp_source(direction, shape=(50, 60, 40), spacing=(1.6, 1.6, 2.5)):
    vol = Volume(np.zeros(shape, np.float32), affine_from(spacing, (-40, -45, -50)))
    world = np.indices(shape).reshape(3, -1).T @ vol.affine[:3, :3].T + vol.affine[:3, 3]
    return open_source(replace(vol, data=(world @ direction).reshape(shape).astype(np.float32)), contrast="ct")

direction = np.array([0.5, -0.7, 0.4])
ramp = ramp_source(direction)
turn = np.diag([1.7, 1.5, 1.9]) @ np.array([[.98, -.2, 0], [.2, .98, 0], [0, 0, 1.]])
M = ramp.affine[:3, :3]/ramp.spacing @ turn
view = sample_view(ramp, M, np.array([70., 60, -30]), (12, 20, 24))
places = view.to_world(np.argwhere(view.valid))
hu = (view.image[view.valid] + 50)*4095/255 - 1024
np.abs(hu - places @ direction).max().round(3)

# %%
centre = (np.array([50, 60, 40]) - 1)/2
rim = np.abs((places - [-40, -45, -50])/[1.6, 1.6, 2.5] - centre) > centre - 1
assert np.abs(hu - places @ direction)[~rim.any(axis=1)].max() < 0.05
assert close(view.to_index(view.to_world(np.array([[3, 4, 5.5]]))), [[3, 4, 5.5]], 1e-9)
assert (view.image[~view.valid] == -50).all() and 0.2 < view.valid.mean() < 1

# %% [markdown]
# ## Where to cut
# All rules count in the *standard* grid of 2 mm over the box around the tissue. A view of scale $s$ covers
# $\lceil s \cdot \text{patch} \rceil$ of its voxels, and five per cent more are kept free as the reference does.
#
# * `sample` (SAM, SAM++): in one pair of five both boxes are placed independently. Otherwise a seed voxel is drawn away
#   from the border, and both boxes contain it.
# * `masksample` (Cross-SAM): as before, but one pair of ten is independent, and nine of ten seeds come from the mask.
# * `overlap` (the first configuration): for each axis an overlap of at least 20 voxels (5 along z), or a gap.
#
# Where the scan is smaller than a box, the box is centred on it and reaches out into air. A scan that fills less than
# half of the patch along an axis is refused.

# %%
#| export
Rule = Literal["sample", "masksample", "overlap"] # how two boxes are placed

def _corner(seed: int, crop: int, size: int, rng: np.random.Generator) -> int:
    "First voxel of a box that contains a seed, one voxel away from the border; centred if the box is larger"
    low, high = max(seed - crop + 1, 1), min(size - 1 - crop, seed)
    if size - 1 - crop < 1: return (size - crop)//2
    return int(rng.integers(low, high + 1)) if high >= low else int(np.clip(seed - crop//2, 1, size - 1 - crop))

def seeded_corners(
    size: Sequence[int], # (z, y, x) of the standard grid [voxel]
    crops: Sequence[Sequence[int]], # two sizes (z, y, x) [voxel]
    rng: np.random.Generator, # of this sample
    seed: Sequence[int] | None = None, # (z, y, x) voxel that both boxes contain; None: draw one
    margin: Sequence[int] = (4, 10, 10), # a drawn seed is so far from the border [voxel]
) -> np.ndarray: # (2, 3) int: first voxels
    "Place two boxes around a common voxel"
    if seed is None:
        seed = [int(rng.integers(m, n - m)) if n > 2*m else n//2 for m, n in zip(margin, size)]
    return np.array([[_corner(int(p), c, n, rng) for p, c, n in zip(seed, crop, size)] for crop in crops])

def independent_corners(
    size: Sequence[int], # (z, y, x) of the standard grid [voxel]
    crops: Sequence[Sequence[int]], # two sizes (z, y, x) [voxel]
    rng: np.random.Generator, # of this sample
) -> np.ndarray: # (2, 3) int: first voxels
    "Place two boxes anywhere"
    return np.array([[int(rng.integers(1, n - c)) if n - c > 1 else (n - c)//2 for c, n in zip(crop, size)]
                     for crop in crops])

def overlap_corners(
    size: Sequence[int], # (z, y, x) of the standard grid [voxel]
    crops: Sequence[Sequence[int]], # two sizes (z, y, x) [voxel]
    rng: np.random.Generator, # of this sample
    least: Sequence[int] = (5, 20, 20), # smallest overlap [voxel]
    p: float = 0.8, # chance of an overlap along an axis where a gap would fit
) -> np.ndarray: # (2, 3) int: first voxels
    "Place two boxes by drawing their overlap, or their gap, along each axis"
    out = np.zeros((2, 3), int)
    for a, (n, one, two, low) in enumerate(zip(size, *crops, least)):
        if max(one, two) > n - 2:
            out[:, a] = independent_corners([n], [[one], [two]], rng)[:, 0]
            continue
        room, small = n - 2 - one - two, min(one, two)
        if room >= 2 and rng.random() >= p: shared = -int(rng.integers(0, room + 1))
        else:
            low = max(min(low, small - 3), -room)
            shared = int(rng.integers(low, max(small - 2, low + 1)))
        extent = one + two - shared
        start = int(rng.integers(1, n - extent))
        first = int(rng.integers(2)) # which box comes first along this axis
        out[first, a], out[1 - first, a] = start, start + (one, two)[first] - shared
    return out

# %%
size, crops = (120, 180, 180), [(34, 101, 101), (40, 120, 120)]
fig, axs = plt.subplots(1, 3, figsize=(7, 2.6), layout="constrained")
rules = {"seeded": seeded_corners, "independent": independent_corners, "overlap": overlap_corners}
for ax, (name, rule) in zip(axs, rules.items()):
    for k in range(4):
        for corner, crop in zip(rule(size, crops, rng_for(k, name)), crops):
            ax.add_patch(plt.Rectangle(corner[2:0:-1], crop[2], crop[1], fill=False, color=f"C{k}"))
    ax.set(xlim=(0, size[2]), ylim=(0, size[1]), aspect="equal", xticks=[], yticks=[], title=name)

# %%
def shared(corners): return np.min(corners + crops, axis=0) - corners.max(axis=0)

for k in range(200):
    for name, rule in rules.items():
        corners = rule(size, crops, rng_for(k, name))
        assert (corners >= 1).all() and (corners + crops <= np.array(size) - 1).all(), name
    seed = rng_for(k).integers(5, 115, 3)
    corners = seeded_corners(size, crops, rng_for(k, "seed"), seed)
    assert (corners <= seed).all() and (corners + crops > seed).all()
touch = [(shared(overlap_corners(size, crops, rng_for(k)))[0] >= 5) for k in range(300)]
assert 0.72 < np.mean(touch) < 0.88
assert (seeded_corners((20, 200, 200), crops, rng_for(0))[:, 0] == (-7, -10)).all()

# %% [markdown]
# ## The pair
# Scale is drawn for each view, and a rotation about its centre if the configuration asks for one. Pairs that show
# nothing but air are drawn again.

# %%
#| export
@dataclass(frozen=True, eq=False)
class ViewPair:
    "Two views of a scan"
    views: tuple[View, View] # each with its image and map

    @property
    def images(self) -> np.ndarray: return np.stack([v.image for v in self.views]) # (2, z, y, x) float32
    @property
    def matrix(self) -> np.ndarray: return np.stack([v.matrix for v in self.views]) # (2, 3, 3) float64
    @property
    def offset(self) -> np.ndarray: return np.stack([v.offset for v in self.views]) # (2, 3) float64, RAS+ [mm]
    @property
    def valid(self) -> np.ndarray: return np.stack([v.valid for v in self.views]) # (2, z, y, x) bool

    def keys(
        self,
        idx: np.ndarray, # (n, 3) voxels (z, y, x) of one view
        view: int = 0, # which one
    ) -> tuple[np.ndarray, np.ndarray]: # two arrays: (n, 3) float64 places in the other view; (n,) bool: inside of it
        "Where voxels of one view are in the other"
        other = self.views[1 - view]
        at = other.to_index(self.views[view].to_world(idx))
        near = np.floor(at + 0.5).astype(int)
        inside = ((near >= 0) & (near < other.image.shape)).all(axis=1)
        inside[inside] = other.valid[tuple(near[inside].T)]
        return at, inside

@dataclass(frozen=True)
class ViewSampler:
    "How two views are cut from a scan"
    rule: Rule = "sample" # placement
    patch: tuple[int, int, int] = (32, 96, 96) # (z, y, x) of a view [voxel]
    spacing: float = 2.0 # voxel size of the standard grid [mm]
    scale: tuple[float, float] = (0.8, 1.2) # a view's voxels are `spacing` times a number of this range
    degrees: float = 0.0 # largest rotation about each axis
    independent: float | None = None # chance of independent boxes; default: 0.2, for masksample 0.1
    tissue: float = 0.02 # least part of a view that shows tissue

    def _corners(self, source: Source, size: np.ndarray, crops: list, rng: np.random.Generator) -> np.ndarray:
        if self.rule == "overlap": return overlap_corners(size, crops, rng)
        by_mask, seed = self.rule == "masksample", None
        if by_mask and source.mask is None: raise DataError(f"{source.name}: the rule masksample needs a mask")
        if by_mask and not len(source.inside): raise DataError(f"{source.name}: its mask is empty")
        default = 0.1 if by_mask else 0.2
        if rng.random() < (default if self.independent is None else self.independent):
            return independent_corners(size, crops, rng)
        if by_mask and rng.random() < 0.9:
            at = (source.inside - source.box[0] + 0.5)*source.spacing/self.spacing - 0.5
            inner = at[((at >= 5) & (at < size - 5)).all(axis=1)]
            at = inner if len(inner) else at # all of it is at the border
            seed = np.clip(at[int(rng.integers(len(at)))].round().astype(int), 0, size - 1)
        return seeded_corners(size, crops, rng, seed)

    def draw(
        self,
        source: Source, # scan
        rng: np.random.Generator, # of this sample
    ) -> list[tuple[np.ndarray, np.ndarray]]: # matrix (3, 3) and offset (3,) of both views
        "Draw the maps of two views"
        low, high = source.box
        size = np.maximum(1, np.floor((high - low)*source.spacing/self.spacing).astype(int))
        patch = np.array(self.patch)
        if (2*size < patch).any():
            raise DataError(f"{source.name}: too small, {size.tolist()} voxels of {self.spacing:g} mm for views of "
                            f"{patch.tolist()}")
        scales = rng.uniform(*self.scale, 2)
        crops = [np.ceil(1.05*np.ceil(patch*s)).astype(int).tolist() for s in scales]
        out = []
        for s, crop, corner in zip(scales, crops, self._corners(source, size, crops, rng)):
            centre = corner + (np.array(crop) - 1)/2 # in the standard grid
            at = low + (centre + 0.5)*self.spacing/source.spacing - 0.5
            turn = Rotation.from_euler("xyz", rng.uniform(-self.degrees, self.degrees, 3), degrees=True).as_matrix()
            matrix = source.affine[:3, :3]/source.spacing @ turn*(self.spacing*s)
            place = source.affine[:3, :3] @ at + source.affine[:3, 3]
            out.append((matrix, place - matrix @ ((patch - 1)/2)))
        return out

    def __call__(
        self,
        source: Source, # scan
        rng: np.random.Generator, # of this sample
    ) -> ViewPair: # the same for the same generator
        "Cut two views"
        for _ in range(8):
            pair = ViewPair(tuple(sample_view(source, *m, self.patch) for m in self.draw(source, rng)))
            if min((v.image > -25).mean() for v in pair.views) >= self.tissue: return pair
        raise DataError(f"{source.name}: shows no tissue in 8 pairs of views")

# %%
sampler = ViewSampler("masksample", patch=(24, 40, 40), degrees=10)
pair = sampler(source, rng_for(1, "pair"))
some = np.argwhere(pair.views[0].mask)
at, inside = pair.keys(some)
inside &= np.abs(at[:, 0] - np.median(at[inside, 0])) < 0.5 # those that lie in one plane of the second view
inside &= some[:, 0] == np.bincount(some[inside, 0]).argmax()
pts = [some[inside][::9], at[inside][::9]]
fig, axs = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
for ax, view, p in zip(axs, pair.views, pts):
    ax.imshow(view.image[round(p[0, 0])], cmap="Greys_r", vmin=0, vmax=30)
    ax.scatter(p[:, 2], p[:, 1], c=np.arange(len(p)), cmap="turbo", s=12)
    ax.set(xticks=[], yticks=[])

# %% [markdown]
# Where two views overlap, they show the same intensities, to the error of interpolation. On a ramp there is none, so
# the error of the correspondence itself can be read off in millimetres.

# %%
steep = ramp_source(np.array([0, 0, 8.0]), (110, 100, 90), (1.2, 1.3, 1.6))
worst = []
for k in range(10):
    p = ViewSampler(patch=(16, 32, 32), degrees=10, tissue=0)(steep, rng_for(k, "ramp"))
    q = rng_for(k).integers((1, 1, 1), (15, 31, 31), (500, 3))
    q = q[p.views[0].valid[tuple(q.T)]]
    at, inside = p.keys(q)
    inside &= ((at >= 0) & (at <= np.array([15, 31, 31]))).all(axis=1)
    inside[inside] &= ndimage.map_coordinates(p.views[1].valid.astype(float), at[inside].T, order=1) > 0.999
    if not inside.any(): continue
    a = p.views[0].image[tuple(q[inside].T)]
    b = ndimage.map_coordinates(p.views[1].image, at[inside].T, order=1)
    worst.append(np.abs(a - b).max()*4095/255/8)
f"{len(worst)} overlapping pairs, largest error {max(worst):.4f} mm"

# %%
assert max(worst) < 0.01
one, two = (sampler(source, rng_for(7, "pair")) for _ in range(2))
assert np.array_equal(one.images, two.images) and close(one.matrix, two.matrix, 0)
sizes = [np.linalg.norm(m, axis=0) for k in range(20) for m, _ in sampler.draw(source, rng_for(k))]
assert np.ptp(sizes, axis=1).max() < 1e-9 and 1.6 <= np.min(sizes) < 1.7 and 2.3 < np.max(sizes) <= 2.4

# %%
with raises(DataError, match="too small"): ViewSampler()(open_source(Volume(scan.img[:5], ct.affine)), rng_for(0))
with raises(DataError, match="needs a mask"): sampler(ramp, rng_for(0))
with raises(DataError, match="no tissue"): open_source(Volume(np.full((9, 9, 9), -1000.), ct.affine)).box

# %% [markdown]
# ## From disk
# A zarr store in the order of the networks gives up only the chunks under the views, and a pair costs a few
# hundredths of a second.

# %%
with tmpdir() as d:
    write_volume(net_volume(replace(ct, data=ct.data.astype(np.int16))), d/"ct.zarr")
    stored = open_source(d/"ct.zarr")
    lazy = not isinstance(stored.data, np.ndarray)
    stored.box
    begin = time.perf_counter()
    from_disk = ViewSampler(patch=(24, 40, 40))(stored, rng_for(1))
    seconds = time.perf_counter() - begin
from_memory = ViewSampler(patch=(24, 40, 40))(open_source(replace(ct, data=ct.data.astype(np.int16))), rng_for(1))
lazy, seconds < 1

# %%
assert lazy and np.array_equal(from_disk.images, from_memory.images)
