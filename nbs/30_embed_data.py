# %% [markdown]
# # Volumes for anatomical embeddings
#
# > From any scan to the array a network sees, with one grid that knows where each of its voxels is.
#
# An anatomical embedding gives every voxel a vector that says *which place of the body* it shows, so that a point of
# one scan is found again in another (Yan et al., *SAM: Self-supervised Learning of Pixel-wise Anatomical Embeddings in
# Radiological Images*, IEEE TMI 2022, [arXiv 2012.02383](https://arxiv.org/abs/2012.02383)). The method is a question
# of millimetres, and the published code loses them in small change: axes are flipped by hand in nine files, a point is
# half a voxel off when it passes from the file to the 2 mm grid and again on the way to the feature grid, label numbers
# depend on the order of a directory listing. So this page does two things once: a `NetGrid` is the only way from world
# millimetres to network and feature indices, and `network_volume` is the only way from a scan to what a network sees.
# Its descendants SAM++ ([2306.13988](https://arxiv.org/abs/2306.13988)) and Cross-SAM
# ([2307.03535](https://arxiv.org/abs/2307.03535)) see the same. Folders of scans become training data on [a later
# page](30d_embed_prepare.ipynb).

# %%
#| default_exp embed.data

# %%
#| export
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.body import body_mask, modality_of
from medvol_nb.core import DataError, MissingFile
from medvol_nb.geometry import Volume, reorient, resample, to_axes, to_index, to_world

# %%
from dataclasses import replace

from matplotlib import pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import close, raises, tmpdir
from medvol_nb.geometry import affine_from

# %% [markdown]
# ## One grid, all indices
# A network sees `(z, y, x)` arrays whose indices grow to the left, to the back and to the head (LPS+), with voxels of
# 2 mm. Its features live on coarser grids: with the strides $s$, feature $f$ stands for the network voxels
# $s f \dots s f + s - 1$, so its centre is the network index $s f + (s-1)/2$. Both grids, and any other, are a shape
# and an affine to RAS+ millimetres. Whoever has a point asks the grid; nobody adds half voxels by hand.

# %%
#| export
@dataclass(frozen=True, eq=False)
class NetGrid:
    "Where the voxels of a network's input, or of its features, are"
    shape: tuple[int, int, int] # (z, y, x) [voxel]
    affine: np.ndarray # (4, 4) float64, index (z, y, x) -> RAS+ [mm]
    strides: tuple[int, int, int] = (1, 1, 1) # (z, y, x) network voxels per voxel of this grid

    def __post_init__(self):
        shape, strides = tuple(int(n) for n in self.shape), tuple(int(s) for s in self.strides)
        if len(shape) != 3 or min(shape) < 1: raise DataError(f"grid: needs three sizes >= 1, got {shape}")
        if len(strides) != 3 or min(strides) < 1: raise DataError(f"grid: needs three strides >= 1, got {strides}")
        affine = Volume(np.broadcast_to(np.float32(0), shape), self.affine, "zyx").affine
        for name, value in (("shape", shape), ("strides", strides), ("affine", affine)):
            object.__setattr__(self, name, value)

    @property
    def spacing(self) -> tuple[float, ...]: # (z, y, x) voxel size [mm]
        return tuple(float(s) for s in np.sqrt((self.affine[:3, :3]**2).sum(axis=0)))

    def to_world(
        self,
        idx: np.ndarray, # (..., 3) indices (z, y, x), integers are voxel centres
    ) -> np.ndarray: # (..., 3) float64, RAS+ [mm]
        "World position of indices"
        return to_world(self.affine, idx)

    def to_index(
        self,
        pts_xyz: np.ndarray, # (..., 3) RAS+ [mm]
    ) -> np.ndarray: # (..., 3) float64 indices (z, y, x), fractional
        "Indices of world positions"
        return to_index(self.affine, pts_xyz)

    def contains(
        self,
        pts_xyz: np.ndarray, # (..., 3) RAS+ [mm]
    ) -> np.ndarray: # (...) bool
        "Whether positions are inside the outer faces of the grid"
        idx = self.to_index(pts_xyz)
        return ((idx >= -0.5 - 1e-6) & (idx <= np.array(self.shape) - 0.5 + 1e-6)).all(axis=-1)

    def feature(
        self,
        strides: Sequence[int], # (z, y, x) network voxels per feature
    ) -> "NetGrid": # ceil(shape / strides)
        "The grid of features with these strides, counted from the network's input"
        if self.strides != (1, 1, 1): raise DataError(f"feature grid: made from the network's grid, not from {self}")
        step = np.diag([*strides, 1.0])
        step[:3, 3] = (np.array(strides) - 1)/2
        return NetGrid(tuple(-(-n//s) for n, s in zip(self.shape, strides)), self.affine @ step, tuple(strides))

    def to_dict(self) -> dict[str, Any]: # JSON-able
        "For files"
        return {"shape": list(self.shape), "affine": self.affine.tolist(), "strides": list(self.strides)}

    @classmethod
    def from_dict(
        cls,
        d: Mapping[str, Any], # from `to_dict`
    ) -> "NetGrid": # equal grid
        "Inverse of `to_dict`"
        return cls(tuple(d["shape"]), np.array(d["affine"], np.float64), tuple(d.get("strides", (1, 1, 1))))

# %%
#| export
def net_volume(
    vol: Volume, # without channels, any axes and orientation
) -> Volume: # axes zyx, x to the left, y to the back, z to the head; same voxels at the same places
    "Bring a volume into the axes that networks of this family see"
    if vol.channels is not None:
        raise DataError(f"embedding: one 3-D scan is needed, got shape {tuple(vol.data.shape)}. Take one channel of it")
    return to_axes(reorient(vol, "LPS"), "zyx")

def net_grid(
    volume: Volume, # scan, or its header: the voxels are not read
    spacing: float = 2.0, # voxel size of the network's input [mm]
) -> NetGrid: # same field of view within half a voxel
    "The grid on which a network sees a volume"
    empty = Volume(np.broadcast_to(np.float32(0), volume.shape), volume.affine, volume.spatial_axes)
    empty = resample(net_volume(empty), spacing, order=0)
    return NetGrid(empty.shape, empty.affine)

# %%
scan = phantoms.abdomen(seed=1)
ct = Volume(scan.img, affine_from(scan.spacing, (-90, -70, -40)))
grid = net_grid(ct)
grid.shape, grid.feature((2, 2, 2)).shape, grid.feature((4, 16, 16)).shape

# %% [markdown]
# A point keeps its millimetres through every grid, whichever way the file was stored, and the outer faces of a feature
# are those of its network voxels:

# %%
point = np.array([[-12.3, 5.6, 20.1]])
tilt = np.array([[.94, -.34, 0, 3], [.34, .94, 0, -7], [0, 0, 1, 11], [0, 0, 0, 1]])
for v in (ct, reorient(ct, "PIL"), to_axes(ct, "zyx"), replace(ct, affine=tilt @ ct.affine)):
    for g in (net_grid(v), net_grid(v, 1.3).feature((2, 2, 2)), net_grid(v).feature((4, 16, 16))):
        assert close(g.to_world(g.to_index(point)), point, 1e-9)
assert close(net_grid(reorient(ct, "PIL")).affine, grid.affine, 1e-9)
first = grid.to_world(np.mgrid[:4, :16, :16].reshape(3, -1).T).mean(axis=0)
assert close(grid.feature((4, 16, 16)).to_world((0, 0, 0)), first, 1e-9)
assert grid.to_world((0, 0, 0))[0] > grid.to_world((0, 0, 1))[0] and grid.contains(grid.to_world((0, 0, -0.4)))
assert NetGrid.from_dict(grid.to_dict()).to_dict() == grid.to_dict()

# %%
with raises(DataError, match="Take one channel"): net_volume(Volume(scan.img[None], ct.affine, "cxyz"))
with raises(DataError, match="made from the network's grid"): grid.feature((2, 2, 2)).feature((2, 2, 2))

# %% [markdown]
# ## The brightness a network sees
# CT has an absolute scale: $[-1024, 3071]$ HU become $[-50, 205]$, so water is 13.8. MR has none: its percentiles 0.2
# and 99.8 take the place of the limits. The bounds are cut to whole numbers, as the published weights expect, but not
# where that would leave nothing between them, which happens to images that were already scaled to $[0, 1]$.

# %%
#| export
Contrast = Literal["ct", "mr"] # which of the two scales

def limits_of(
    img: np.ndarray, # n-d, any axes
    contrast: Contrast, # which scale
    mask: np.ndarray | None = None, # n-d, same axes, bool: voxels that define the percentiles of MR
) -> tuple[float, float]: # intensities that become -50 and 205
    "Ends of the brightness scale of a scan"
    if contrast == "ct": return -1024.0, 3071.0
    if contrast != "mr": raise DataError(f"contrast: must be 'ct' or 'mr', got {contrast!r}")
    low, high = (float(v) for v in np.percentile(img if mask is None else img[mask], (0.2, 99.8)))
    if high < 1: high = 1.0
    return (float(int(low)), float(int(high))) if int(high) > int(low) else (low, max(high, low + 1e-6))

def rescale(
    img: np.ndarray, # n-d, any axes
    limits: tuple[float, float], # see `limits_of`
) -> np.ndarray: # n-d, same axes, float32 in [-50, 205]
    "Intensities on the scale of the networks"
    low, high = limits
    out = np.clip(np.asarray(img, np.float32), low, high)
    out -= np.float32(low)
    out *= np.float32(255/(high - low))
    out -= 50
    return np.minimum(out, 205, out=out) # rounding

def rescale_ct(
    img: np.ndarray, # n-d, any axes [HU]
) -> np.ndarray: # n-d, same axes, float32 in [-50, 205]
    "Hounsfield units on the scale of the networks"
    return rescale(img, limits_of(img, "ct"))

def rescale_mr(
    img: np.ndarray, # n-d, any axes and unit
    mask: np.ndarray | None = None, # n-d, same axes, bool: voxels that define the percentiles
) -> np.ndarray: # n-d, same axes, float32 in [-50, 205]
    "MR on the scale of the networks, by its own percentiles"
    return rescale(img, limits_of(img, "mr", mask))

# %%
[rescale_ct(np.array([hu]))[0].round(1).item() for hu in (-2000, -1024, 0, 3071)]

# %%
assert close(rescale_ct(np.array([-1024, 0, 3071, 9999])), [-50, 13.766, 205, 205], 1e-3)
mr = phantoms.head(seed=1).img
assert rescale_mr(mr).min() == -50 and rescale_mr(mr).max() == 205 and rescale_mr(mr/mr.max()/2).max() < 205
assert (rescale_mr(np.ones((3, 3, 3))) == rescale_mr(np.ones((3, 3, 3)))[0, 0, 0]).all()

# %%
#| export
def contrast_of(
    vol: Volume, # scan
) -> Contrast: # 'ct' if the values look like Hounsfield units
    "Guess whether a scan is CT or MR"
    return "ct" if modality_of(vol.data) == "ct" else "mr"

def checked_scan(
    vol: Volume, # as read from a file
    where: str = "scan", # name for messages
) -> Volume: # the same
    "Refuse what no embedding can be made of: channels, no voxels, NaN, one constant value"
    data = np.asarray(vol.data[...])
    if vol.channels is not None: raise DataError(f"{where}: one 3-D scan is needed, got shape {data.shape}")
    if not data.size: raise DataError(f"{where}: has no voxels, shape {data.shape}")
    if data.dtype.kind not in "biuf": raise DataError(f"{where}: intensities must be real numbers, got {data.dtype}")
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise DataError(f"{where}: {np.count_nonzero(~np.isfinite(data))} voxels are NaN or infinite")
    if data.min() == data.max(): raise DataError(f"{where}: every voxel is {data.flat[0]}")
    return vol

def network_volume(
    volume: Volume, # scan without channels, any axes and orientation
    spacing: float = 2.0, # voxel size of the network's input [mm]
    intensity: Literal["auto"] | Contrast = "auto", # 'ct' for Hounsfield units, 'mr' for percentiles
    body: Literal["auto"] | np.ndarray | None = None, # bool on the stored array of `volume`; 'auto': found; None: all
) -> tuple[np.ndarray, NetGrid]: # (z, y, x) float32 in [-50, 205], and its grid
    "What a network sees of a scan; outside of `body`, if given, there is air"
    volume = checked_scan(volume, str(volume.meta.get("path", "scan")))
    contrast = contrast_of(volume) if intensity == "auto" else intensity
    if contrast not in ("ct", "mr"): raise DataError(f"intensity: must be 'auto', 'ct' or 'mr', got {intensity!r}")
    if isinstance(body, str): body = body_mask(volume, "ct" if contrast == "ct" else "other").mask
    if body is not None:
        if np.shape(body) != volume.shape:
            raise DataError(f"body: mask of shape {np.shape(body)} for a scan of shape {volume.shape}")
        data = np.where(body, volume.data, -1024 if contrast == "ct" else np.min(volume.data))
        volume = Volume(data, volume.affine, volume.axes)
    seen = resample(net_volume(volume), spacing)
    return rescale(seen.data, limits_of(seen.data, contrast)), NetGrid(seen.shape, seen.affine)

# %%
img, grid = network_volume(ct, body="auto")
fig, axs = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
for ax, plane, name in zip(axs, (img[len(img)//2], img[:, img.shape[1]//2][::-1]), ("axial", "coronal")):
    ax.imshow(plane, cmap="Greys_r")
    ax.set(xticks=[], yticks=[], title=name)

# %% [markdown]
# The file's storage order makes no difference to what the network sees:

# %%
assert img.shape == grid.shape and -50 <= img.min() and img.max() <= 205
assert close(network_volume(reorient(ct, "AIL"))[0], network_volume(ct)[0], 1e-3)
assert contrast_of(ct) == "ct" and contrast_of(Volume(mr, np.eye(4))) == "mr"

# %%
with raises(DataError, match="every voxel is 1"): network_volume(Volume(np.ones((4, 4, 4)), np.eye(4)))
with raises(DataError, match="1 voxels are NaN"): network_volume(Volume(np.where(np.eye(4) > 2, 0, np.pad(
    [[[np.nan]]], ((0, 3),)*3)), np.eye(4)))
with raises(DataError, match="for a scan of shape"): network_volume(ct, body=np.ones((2, 2, 2), bool))

# %% [markdown]
# ## Scans in a folder
# Every file of a known kind, and every subfolder that is a DICOM series.

# %%
#| export
SCAN_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".npz", ".h5", ".zarr")

def list_scans(
    folder: str | Path, # its subfolders count if they hold a DICOM series (.dcm)
) -> list[Path]: # in order of their names
    "Files and DICOM series of a folder"
    folder = Path(folder)
    if not folder.is_dir(): raise MissingFile(f"{folder} does not exist, or is no folder")
    def is_scan(p: Path) -> bool:
        return p.name.lower().endswith(SCAN_SUFFIXES) or (p.is_dir() and next(p.glob("*.dcm"), None) is not None)
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and is_scan(p))

# %%
with tmpdir() as d:
    for name in ("b.nii.gz", "a.mha", "notes.txt", ".hidden.nii"): (d/name).touch()
    (d/"series").mkdir()
    (d/"series"/"1.dcm").touch()
    found = [p.name for p in list_scans(d)]
found

# %%
assert found == ["a.mha", "b.nii.gz", "series"]
with raises(MissingFile): list_scans("nowhere")
