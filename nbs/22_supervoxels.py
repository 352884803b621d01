# %% [markdown]
# # Supervoxels
#
# > Cut a volume into a few hundred connected pieces that follow the borders of what is in it: one call, any modality.
#
# VISTA3D trains its interactive branch on organs that nobody has labelled: pieces of the scan that look alike stand in
# for them (He et al., *VISTA3D*, CVPR 2025). Its script makes these pieces from the features of a
# [Segment-Anything](https://github.com/facebookresearch/segment-anything) encoder and scikit-image's SLIC. It needs two
# hand edits to a foreign repository, more than ten minutes and 30 GB for a large scan, knows CT only, ignores voxel
# sizes and spends pieces on air. The idea is worth keeping. This page joins the parts that keep it: the body of page
# 05a, the features of page 21a or plain intensities, the clustering of page 20a, and the original once more, literally,
# for comparison.

# %%
#| default_exp supervoxels

# %%
#| export
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy import ndimage

from medvol_nb.body import Body, body_mask, modality_of
from medvol_nb.config import Config, check_config
from medvol_nb.core import ConfigError, DataError, MissingFile
from medvol_nb.geometry import Volume, reorient
from medvol_nb.intensity import Normalizer

# %%
from medvol_nb import phantoms, plot
from medvol_nb.core import raises
from medvol_nb.geometry import affine_from
from medvol_nb.samfeat import SamFeatureExtractor, plan_encoding
from medvol_nb.sv_metrics import supervoxel_metrics

# %% [markdown]
# ## What can be chosen
# Everything that decides the result is in one object. It is stored with every result, and a result counts as finished
# only for the settings it was made with.

# %%
#| export
Features = Literal["sam", "intensity"]

class SupervoxelSettings(Config):
    "Everything that decides the supervoxels of a scan"
    n_segments: int = Field(400, ge=1) # supervoxels wanted
    target_volume_ml: float | None = Field(None, gt=0) # mean size instead of a number [mL]; sets n_segments
    features: Features = "sam" # what the commands cluster: a Segment-Anything encoder's view, or intensities
    compactness: float = Field(0.15, ge=0) # weight of place against features: 0 ragged, 1 nearly boxes
    views: tuple[Literal["ax", "cor", "sag"], ...] = ("ax", "cor", "sag") # directions of the encoder's slices
    slice_stride: Literal["auto"] | int = "auto" # every how many slices are encoded; 'auto': at most 3 mm apart
    view_components: int | None = Field(None, ge=1) # reduce the stacked views to so many channels; None: add them up
    window: str = "auto" # 'ct' for -1000 to 1000 HU, 'low,high', or 'auto': ct, or percentiles of the body
    mask: Literal["body", "none"] = "body" # where supervoxels are made; 'none': everywhere
    grid_mm: float = Field(2.0, gt=0) # voxel size of the clustering; never finer than the scan [mm]
    min_size_factor: float = Field(0.25, ge=0, lt=1) # smallest supervoxel as a share of the mean
    max_size_factor: float | None = Field(4, ge=1) # largest supervoxel in mean sizes; None: no limit
    max_iter: int = Field(10, ge=1) # rounds of the clustering
    tol: float = Field(0.01, ge=0) # stop when fewer voxels than this share change
    refine: bool = True # borders choose again at the scan's resolution, where the clustering was coarser

# %%
with raises(ConfigError, match="n_segments"): check_config(SupervoxelSettings, {"n_segments": 0})
SupervoxelSettings()

# %% [markdown]
# ## The input
# A scan may be CT, MR or anything else, of any number type, in any orientation; it may not hold NaN. The window brings
# what matters to $[0, 1]$: the fixed one of CT, or the central 99 % of the intensities inside the body.

# %%
#| export
def _checked(vol: Volume) -> Volume:
    "The scan in memory, finite, three-dimensional and in RAS"
    if vol.channels is not None: raise DataError(f"supervoxels: one 3-D scan is needed, got shape {vol.data.shape}")
    vol = reorient(vol.load(), "RAS")
    if 0 in vol.shape: raise DataError(f"supervoxels: the scan is empty, its shape is {vol.shape}")
    data = vol.data
    if data.dtype.kind == "b": data = data.astype(np.uint8)
    if data.dtype.kind not in "iuf": raise DataError(f"supervoxels: real numbers are needed, got {data.dtype}")
    if data.dtype.kind == "f" and not (fine := np.isfinite(data)).all():
        first = tuple(int(k) for k in np.unravel_index(np.argmin(fine), data.shape))
        raise DataError(f"supervoxels: {np.count_nonzero(~fine)} voxels are NaN or infinite, first at {first} (RAS)")
    return replace(vol, data=data)

def windowed(
    vol: Volume, # scan
    window: str = "auto", # 'ct', 'auto' or 'low,high'
    body: Body | None = None, # where percentiles are taken; None: everywhere
) -> np.ndarray: # (x, y, z) float32 in [0, 1]
    "Bring the intensities that matter to [0, 1]"
    ct = body is not None and body.modality == "ct"
    if window == "ct" or (window == "auto" and ct): norm = Normalizer.parse("ct:-1000,1000")
    elif window == "auto": norm = Normalizer.parse("percentile:0.5,99.5")
    elif window.count(",") == 1: norm = Normalizer.parse(f"ct:{window}")
    else: raise ConfigError(f"window: 'ct', 'auto' or 'low,high' is needed, got {window!r}")
    mask = body.mask if body is not None and body.mask.any() else None
    return np.clip(norm(vol.data, mask) if norm.kind == "percentile" else norm(vol.data), 0, 1)

# %%
case = phantoms.abdomen(seed=3)
scan = Volume(case.img, affine_from(case.spacing))
body = body_mask(scan)
plot.planes(windowed(scan, "auto", body), body.mask.astype(np.uint8), case.spacing, title="window and body")

# %%
assert windowed(scan, "-100,100").min() == 0 and windowed(scan, "ct").max() <= 1
holes = case.img.astype(np.float32)
holes[3, 4, 5] = np.nan
with raises(DataError, match=r"1 voxels are NaN or infinite, first at \(3, 4, 5\)"):
    _checked(replace(scan, data=holes))
with raises(ConfigError, match="low,high"): windowed(scan, "soft tissue")

# %% [markdown]
# ## Features without a network
# Intensity smoothed at three scales, and the length of its gradient at the same scales, each divided by its robust
# range: what a radiologist's eye uses first. It needs no weights and takes seconds; with it supervoxels work on any
# machine. Scales are in millimetres as long as the grid is that coarse, in voxels below.

# %%
#| export
def intensity_features(
    img: np.ndarray, # (x, y, z) float32, windowed
    spacing: Sequence[float] = (1, 1, 1), # (x, y, z) voxel size [mm]
    mask: np.ndarray | None = None, # (x, y, z) bool, where ranges are taken
    scales: Sequence[float] = (1, 2, 4), # widths of the Gaussians [mm], or [voxel] of grids finer than 1 mm
) -> np.ndarray: # (2 x scales, x, y, z) float32
    "Smoothed intensity and gradient magnitude at several scales, each in units of its robust range"
    unit, out = min(1.0, max(spacing)), []
    inside = slice(None) if mask is None or not mask.any() else mask
    for s in scales:
        smooth = ndimage.gaussian_filter(img.astype(np.float32), [s*unit/a for a in spacing], mode="nearest")
        slope = np.zeros_like(smooth)
        for axis, a in enumerate(spacing):
            if img.shape[axis] > 1: slope += (np.gradient(smooth, axis=axis)*(s*unit/a))**2
        out += [smooth, np.sqrt(slope)]
    for f in out:
        low, high = np.percentile(f[inside], (1, 99))
        f /= max(float(high - low), 1e-6)
    return np.stack(out)

# %%
feats = intensity_features(windowed(scan, "auto", body), scan.spacing, body.mask)
middle = feats.shape[3]//2
plot.montage([f[:, :, middle].T[::-1] for f in feats], cols=3)

# %%
assert feats.shape == (6, *scan.shape) and np.isfinite(feats).all()
assert np.allclose(intensity_features(np.ones((4, 5, 1), np.float32))[1::2], 0)

# %% [markdown]
# ## The pipeline
# 1. Orient, window, find the body. 2. Go to a grid of `grid_mm`; no axis becomes finer than it was, and with many
# segments the grid is refined until a mean one has 64 voxels. 3. Features on that grid. 4. Cluster inside the body, in
# millimetres, down to the exact number. 5. Bring the labels to the scan's grid, let the voxels on borders choose again
# by the full-resolution intensities, and return to the scan's own orientation.
#
# `features="sam"` needs an encoder (page 21a). Without one there is an error, not a quiet change to intensities.

# %%
#| export
@dataclass(frozen=True, eq=False)
class SupervoxelResult:
    "Supervoxels of one scan"
    labels: Volume # on the scan's grid, int16 or int32: 0 outside, 1 to n
    centres: np.ndarray # (n, 3) centres of mass in the world [mm], RAS+
    info: dict # settings, sizes and figures

def working_spacing(
    spacing: Sequence[float], # (x, y, z) voxel size of the scan [mm]
    shape: Sequence[int], # (x, y, z) size [voxel]
    n_segments: int, # wanted
    grid_mm: float = 2.0, # wanted voxel size [mm]
) -> tuple[float, float, float]: # (x, y, z) [mm], whole multiples of `spacing`
    "Voxel size to cluster on: about `grid_mm`, but no finer than the scan, and at least 64 voxels a segment"
    step = min(grid_mm, (float(np.prod(spacing))*float(np.prod(shape))/(64*n_segments))**(1/3))
    return tuple(s*min(n, max(1, round(step/s))) for s, n in zip(spacing, shape))

@dataclass(frozen=True, eq=False)
class _Ready:
    "A scan ready to be clustered, cropped to the mask"
    ras: Volume # the whole scan in RAS
    modality: str # what it was taken for
    box: tuple[slice, ...] # of the mask
    img: np.ndarray # (x, y, z) windowed, in the box
    mask: np.ndarray # (x, y, z) bool, in the box
    stride: tuple[int, ...] # scan voxels of a working voxel
    islands: bool # the mask may have several components

    @property
    def spacing(self) -> tuple[float, ...]: # of the working grid [mm]
        return tuple(s*k for s, k in zip(self.ras.spacing, self.stride))

    @property
    def grid(self) -> tuple[int, ...]: # (x, y, z) size of the working grid
        return tuple(-(-n//k) for n, k in zip(self.img.shape, self.stride))

    def whole(self, a: np.ndarray, mode: str) -> np.ndarray:
        "Array in the box, padded to whole working voxels"
        extra = [(0, -n % k) for n, k in zip(a.shape, self.stride)]
        return np.pad(a, extra, mode=mode) if any(e for _, e in extra) else a

    @property
    def coarse(self) -> np.ndarray: # (x, y, z) bool, mask on the working grid
        padded = self.whole(self.mask, "constant")
        return padded.reshape([v for n, k in zip(self.grid, self.stride) for v in (n, k)]).any(axis=(1, 3, 5))

def _box(mask: np.ndarray) -> tuple[slice, ...]:
    "Bounds of the True voxels"
    seen = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(int(i[0]), int(i[-1]) + 1) for i in seen)

def _prepare(vol: Volume, cfg: SupervoxelSettings, mask: Any = None) -> _Ready:
    ras = _checked(vol)
    body = Body(np.ones(ras.shape, bool), modality_of(ras.data), -math.inf) if cfg.mask == "none" else \
        body_mask(ras, "ct" if cfg.window == "ct" else "auto")
    where = body.mask if mask is None else np.asarray(mask) != 0
    if where.shape != ras.shape:
        raise DataError(f"mask: must have the scan's grid {ras.shape} in RAS, got {where.shape}")
    if not where.any(): raise DataError("mask: is empty")
    box = _box(where)
    where = np.ascontiguousarray(where[box])
    img = windowed(replace(ras, data=ras.data[box]), cfg.window, body._replace(mask=where))
    filled = np.count_nonzero(where)/where.size
    step = working_spacing(ras.spacing, where.shape, math.ceil(_wanted(cfg, ras, where)/filled), cfg.grid_mm)
    stride = tuple(round(a/b) for a, b in zip(step, ras.spacing))
    return _Ready(ras, body.modality, box, img, where, stride, mask is not None)

def _features(ready: _Ready, source: Any, cfg: SupervoxelSettings, cache: Any = None) -> Any:
    "(c, x, y, z) on the working grid"
    from medvol_nb.slic import reduce_grid
    wide = replace(ready.ras, data=ready.whole(ready.img, "edge"))
    if isinstance(source, str):
        return intensity_features(reduce_grid(wide.data[None], ready.stride)[0], ready.spacing, ready.coarse)
    if hasattr(source, "volume_features"):
        return source.volume_features(wide.data, shape=ready.grid, spacing=wide.spacing, views=cfg.views, cache=cache,
                                      stride=cfg.slice_stride, n_components=cfg.view_components)
    found, grid = (np.asarray(source(wide)), wide.shape) if callable(source) else (np.asarray(source), ready.ras.shape)
    if found.ndim != 4 or found.shape[1:] not in (grid, ready.grid):
        raise DataError(f"features: (c, x, y, z) on the grid {grid} of the scan in RAS is needed, got {found.shape}")
    if found.shape[1:] == ready.grid: return found
    if not callable(source): found = np.stack([ready.whole(f[ready.box], "edge") for f in found])
    return reduce_grid(found, ready.stride)

def encoder_plan(
    vol: Volume, # scan
    encoder: Any, # as for `supervoxels`
    settings: SupervoxelSettings | None = None, # as for `supervoxels`
) -> Any: # the encoder's plan: `calls`, `tflop`, printable
    "What `supervoxels` will encode of a scan if nothing is cached: slices through the box around its body"
    cfg = settings or SupervoxelSettings()
    ready = _prepare(vol, cfg)
    shape = [n*k for n, k in zip(ready.grid, ready.stride)]
    return encoder.plan(shape, ready.ras.spacing, views=cfg.views, stride=cfg.slice_stride)

def _encoder_name(source: Any) -> str:
    "Where features come from, for the record; an error if there is no encoder"
    if isinstance(source, str) and source != "intensity":
        raise MissingFile(f"features {source!r}: Segment-Anything features need an encoder. Pass "
                          "features=SamFeatureExtractor(checkpoint) (page 21a), or features='intensity'")
    return source if isinstance(source, str) else source.name if hasattr(source, "volume_features") else "given"

def _wanted(cfg: SupervoxelSettings, ras: Volume, mask: np.ndarray) -> int:
    "Number of supervoxels"
    if cfg.target_volume_ml is None: return cfg.n_segments
    ml = float(np.prod(ras.spacing))*float(np.count_nonzero(mask))/1000
    return max(1, round(ml/cfg.target_volume_ml))

def _cluster(ready: _Ready, features: Any, cfg: SupervoxelSettings, device: str) -> np.ndarray:
    "Labels on the working grid"
    from medvol_nb.slic import slic3d
    return slic3d(features, _wanted(cfg, ready.ras, ready.mask), compactness=cfg.compactness, spacing=ready.spacing,
                  mask=ready.coarse, max_iter=cfg.max_iter, tol=cfg.tol, min_size_factor=cfg.min_size_factor,
                  max_size_factor=cfg.max_size_factor, device=device)

def _at_full_size(ready: _Ready, small: np.ndarray, cfg: SupervoxelSettings) -> np.ndarray:
    "Labels in the box: 0 outside the mask, one connected piece an id"
    from medvol_nb.regions import enforce_connectivity, merge_segments, refine_borders, upsample_labels
    n, img = _wanted(cfg, ready.ras, ready.mask), ready.img
    padded = [n*k for n, k in zip(small.shape, ready.stride)]
    labels = upsample_labels(small, padded, ready.stride)[tuple(slice(0, n) for n in img.shape)]
    labels = np.where(ready.mask, labels, 0)
    crumb = int(np.prod(ready.stride)) # voxels that the rim of the mask may cut off a working voxel
    if crumb > 1 and (ready.islands or not cfg.refine):
        labels = merge_segments(enforce_connectivity(labels, img[None], min_size=crumb), img[None], n)
    if crumb == 1 or not cfg.refine: return labels
    return refine_borders(labels, ndimage.gaussian_filter(img, 1, mode="nearest")[None]) # noise decides less

def _numbered(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Ids 1 to n without gaps in the smallest usual type, and their sizes [voxel]"
    most = int(labels.max()) + 1
    size = sum(np.bincount(plane.reshape(-1), minlength=most) for plane in labels)
    size[0] = 0
    kept = np.flatnonzero(size)
    table = np.zeros(len(size), np.int16 if len(kept) <= 32767 else np.int32)
    table[kept] = np.arange(1, len(kept) + 1)
    out = np.empty(labels.shape, table.dtype)
    for new, plane in zip(out, labels): new[...] = table[plane] # one plane at a time: indices are copied to int64
    return out, size[kept]

def _centres(labels: np.ndarray, size: np.ndarray, affine: np.ndarray) -> np.ndarray:
    "(n, 3) centres of mass [mm]"
    sums = np.zeros((len(size), 3))
    for x, plane in enumerate(labels):
        y, z = np.nonzero(plane)
        ids = plane[y, z] - 1
        for axis, v in enumerate((np.full(len(y), x), y, z)): sums[:, axis] += np.bincount(ids, v, len(size))
    return sums/size[:, None] @ affine[:3, :3].T + affine[:3, 3]

# %%
#| export
def supervoxels(
    vol: Volume, # scan without channels, any orientation, finite
    n_segments: int = 400, # supervoxels wanted
    *,
    features: Any = "intensity", # 'intensity', an encoder (page 21a), an array (c, x, y, z) in RAS, or Volume -> array
    mask: Any = None, # array (x, y, z) in RAS, where supervoxels are made; None: as `settings.mask` says
    settings: SupervoxelSettings | None = None, # everything but `features`; then `n_segments` is taken from it
    device: str = "cpu", # where the clustering runs, as in `device_for`
    cache: str | os.PathLike | None = None, # folder that keeps what the encoder said, for other settings
    **changes: Any, # single settings, such as compactness=0.1
) -> SupervoxelResult: # labels on the grid of `vol`
    "Connected pieces of a scan that follow its borders"
    base = {"n_segments": n_segments} if settings is None else settings.model_dump()
    cfg = check_config(SupervoxelSettings, {**base, **changes}, "supervoxels")
    if settings and "features" in settings.model_fields_set and isinstance(features, str) and features != cfg.features:
        raise ConfigError(f"features: the settings say {cfg.features!r}, the call {features!r}. Name them in the call, "
                          "features='intensity' or an encoder, and leave them out of the settings")
    name, ready = _encoder_name(features), _prepare(vol, cfg, mask)
    small = _cluster(ready, _features(ready, features, cfg, cache), cfg, device)
    return _result(ready, small, name, cfg, vol.orientation)

def _result(ready: _Ready, small: np.ndarray, name: str, cfg: SupervoxelSettings, orientation: str) -> SupervoxelResult:
    labels, size = _numbered(_at_full_size(ready, small, cfg))
    ras, ml = ready.ras, size*float(np.prod(ready.ras.spacing))/1000
    whole = np.zeros(ras.shape, labels.dtype)
    whole[ready.box] = labels
    least, middle, most = (float(v) for v in np.percentile(ml, (0, 50, 100)))
    info = {"n": len(size), "asked": _wanted(cfg, ras, ready.mask), "encoder": name,
            "modality": ready.modality, "grid": list(ready.grid), "grid_mm": [float(s) for s in ready.spacing],
            "volume_ml": float(ml.sum()), "smallest_ml": least, "median_ml": middle, "largest_ml": most}
    centres = _centres(whole, size, ras.affine)
    return SupervoxelResult(reorient(replace(ras, data=whole), orientation), centres, info)

# %%
result = supervoxels(scan, 150)
plot.planes(case.img, result.labels.data, case.spacing, title=f"{result.info['n']} supervoxels")

# %% [markdown]
# As many as asked, numbered without gaps, none in pieces, none outside the body. The figures say how well a
# segmentation could be pasted together from these pieces (ASA), how much they leak over borders (UE), and how much of
# the borders they find (BR).

# %%
figures = supervoxel_metrics(result.labels.data, case.lbl, case.spacing)
{k: round(figures[k], 3) for k in ("asa", "ue", "br", "bp")}

# %%
lbl = result.labels.data
assert result.info["n"] == 150 == lbl.max() and figures["disconnected"] == 0
assert ((lbl > 0) == body_mask(scan).mask).all() and lbl.dtype == np.int16
nearest = np.round((result.centres[9] - scan.affine[:3, 3])/scan.spacing).astype(int)
assert np.linalg.norm(np.argwhere(lbl == 10).mean(axis=0) - nearest) < 1

# %%
sizes = np.bincount(lbl.reshape(-1))[1:]*float(np.prod(case.spacing))/1000
plot.histograms({"supervoxels": sizes}, xlabel="size [mL]")

# %% [markdown]
# Another orientation of the file gives the same pieces, and another place in the world too.

# %%
turned = supervoxels(reorient(scan, "LPS"), 150)
assert turned.labels.orientation == "LPS"
assert (reorient(turned.labels, "RAS").data == lbl).all()
moved = replace(scan, affine=scan.affine + np.array([[0, 0, 0, 70.0]]*3 + [[0]*4]))
assert (supervoxels(moved, 150).labels.data == lbl).all()

# %%
with raises(MissingFile, match="need an encoder"): supervoxels(scan, features="sam")
with raises(DataError, match="one 3-D scan"):
    supervoxels(Volume(np.zeros((2, 4, 4, 4)), affine_from(1), "cxyz"))

# %% [markdown]
# What an encoder costs is known before it runs: the slices through the box around the body. An untrained one, which has
# its uses in tests, and what the published ones would take for this scan:

# %%
untrained = SamFeatureExtractor(None, allow_random=True, device="cpu")
plan = encoder_plan(scan, untrained)
print(plan, *(plan_encoding(m, scan.shape, scan.spacing) for m in ("vit_b", "vit_l", "vit_h")), sep="\n")

# %%
assert 0 < plan.calls <= untrained.plan(scan.shape, scan.spacing).calls

# %% [markdown]
# ## As it was published
# For parity the original is here, too: slices in file order, the CT window, three unnormalised views summed, SLIC of
# scikit-image at full resolution, and the air taken out afterwards, with what follows from it: about as many pieces as
# asked for, gaps in the numbers, and int16.

# %%
#| export
def legacy_supervoxels(
    vol: Volume, # CT, used in file order
    slice_features: Callable, # images (n, h, w) float32 in [0, 255] -> (n, 32, h, w), such as an encoder's method
    n_segments: int = 400, # asked for; what comes out differs
) -> Volume: # (x, y, z) int16 labels on the grid of `vol`, 0 in the air, with gaps
    "What VISTA3D's `slic_process_sam.py` makes of a CT, for comparison"
    from skimage.segmentation import slic
    img = np.clip((np.asarray(vol.data, np.float32) + 1000)/2000, 0, 1)*255
    if img.ndim != 3: raise DataError(f"supervoxels: one 3-D scan is needed, got shape {img.shape}")
    total = None
    for axis in (2, 1, 0):
        slices = np.moveaxis(img, axis, 0)
        found = np.concatenate([np.asarray(slice_features(slices[k:k + 8])) for k in range(0, len(slices), 8)])
        part = np.moveaxis(found, (0, 1), (-1, 0)) # (c, h, w, n)
        part = np.moveaxis(part, -1, axis + 1)
        total = part.astype(np.float32) if total is None else total + part
    labels = slic(total, channel_axis=0, compactness=0.01, n_segments=n_segments, sigma=3)
    if labels.max() > 32767: raise DataError(f"legacy: {labels.max()} segments do not fit int16. Ask for fewer")
    corner = np.ones((3, 3, 3), bool)
    parts, n = ndimage.label(np.asarray(vol.data) < -800, corner)
    if n:
        air = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        labels[ndimage.binary_erosion(ndimage.binary_dilation(air, corner), corner, border_value=1)] = 0
    return replace(vol, data=labels.astype(np.int16))

# %%
def grey_and_edges(images): return np.stack([images/255, np.hypot(*np.gradient(images/255, axis=(1, 2)))], axis=1)

old = legacy_supervoxels(replace(scan, data=case.img[::2, ::2, ::2]), grey_and_edges, 40)
{"asked": 40, "ids": len(np.unique(old.data)) - 1, "highest": int(old.data.max())}

# %% [markdown]
# ## Choosing by eye
# The features of a scan cost more than the clustering. `explore` computes them once and clusters again when a slider
# moves. It is the [slice browser](07c_widgets.ipynb) with two more sliders.

# %%
#| export
def explore(
    vol: Volume, # scan
    *,
    features: Any = "intensity", # as in `supervoxels`
    settings: SupervoxelSettings | None = None, # where the sliders start
) -> Any: # `widgets.Panel` with the controls segments and compactness; `result` is the last `SupervoxelResult`
    "Sliders for number and compactness beside the slice browser, with the borders of the supervoxels"
    import ipywidgets as w

    from medvol_nb.slices import Layer, Planes, label_paint
    from medvol_nb.widgets import browse
    cfg = settings or SupervoxelSettings()
    name, ready = _encoder_name(features), _prepare(vol, cfg)
    found = _features(ready, features, cfg)
    n = _wanted(cfg, ready.ras, ready.mask)
    number = w.IntSlider(n, min(10, n), max(2000, n), 10, description="segments", continuous_update=False)
    shape = w.FloatSlider(cfg.compactness, min=0, max=1, step=0.05, description="compactness", continuous_update=False)
    text = w.Label()
    def cluster() -> SupervoxelResult:
        now = cfg.model_copy(update={"n_segments": number.value, "compactness": shape.value, "target_volume_ml": None})
        out = _result(ready, _cluster(ready, found, now, "cpu"), name, now, "RAS")
        text.value = f"{out.info['n']} supervoxels, median {out.info['median_ml']:.3g} mL"
        return out
    def painted(found: SupervoxelResult) -> Layer: return Layer(Planes(found.labels), label_paint)
    first = cluster()
    def again(_: Any) -> None:
        panel.result = cluster()
        panel.layers["supervoxels"] = painted(panel.result)
    for slider in (number, shape): slider.observe(again, "value") # before the panel's own observer, which draws
    panel = browse(Planes(ready.ras), {"supervoxels": painted(first)}, opacity=1,
                   extra={"segments": number, "compactness": shape})
    panel.result, panel.outline.value, panel.box.children = first, True, (*panel.box.children, text)
    return panel

# %%
sliders = explore(scan, settings=SupervoxelSettings(n_segments=60))
before = sliders.picture.value
sliders.segments.value = 200
after = sliders.picture.value
assert sliders.result.info["n"] == 200 and after[:4] == b"\x89PNG" and after != before
sliders
