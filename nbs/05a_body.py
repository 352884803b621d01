# %% [markdown]
# # Where the patient is
#
# > One mask of the body for any scan, so that nobody spends segments, samples or matches on air.
#
# Half of a CT volume is air around the patient, and some of it is inside: the lungs. A threshold cannot tell the two
# apart, and the largest dark component cannot either as soon as the nose is in the picture, because then the airways
# connect lungs and room. Supervoxels and embeddings both need the answer, so it lives here, once.

# %%
#| default_exp body

# %%
#| export
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import cc3d
import edt
import numpy as np
from scipy import ndimage

from medvol_nb.core import ConfigError, DataError
from medvol_nb.geometry import Volume

# %%
from dataclasses import replace

from matplotlib import pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import raises
from medvol_nb.geometry import affine_from

# %% [markdown]
# ## CT or something else
# Hounsfield units are absolute: air is -1000, and a scan that shows any of it holds values far below zero. Nothing else
# that is stored with negative values comes near: MR with an offset, z-scored images, probability maps.

# %%
#| export
Modality = Literal["ct", "other"]

def modality_of(
    img: np.ndarray, # (x, y, z) intensities of a scan
) -> Modality: # 'ct' if the values look like Hounsfield units
    "Guess whether a scan is CT: at least one voxel in a hundred is air"
    flat = np.asarray(img).reshape(-1)
    low = np.percentile(flat[::max(1, flat.size//10**6)], 1) if flat.size else 0
    return "ct" if low <= -700 else "other"

# %%
ct = phantoms.abdomen(seed=1)
[modality_of(img) for img in (ct.img, ct.img*0.1, phantoms.head(seed=1).img)]

# %%
assert modality_of(ct.img) == "ct" and modality_of(ct.img*0.1) == "other"

# %% [markdown]
# ## Air that belongs to the room
# On a grid of a few millimetres, dark voxels are shrunk by the radius of a nostril before components are counted: the
# necks break, and growing the room back by the same radius restores its border. The room is the largest component that
# touches the border of the volume and, in CT, is mostly below -900: a crop inside the chest shows lung only, and lung
# is body. What is left is the body with its lungs; of that the largest component is kept, which drops a table that
# stands apart. For other modalities, dark means either the constant that fills the background of the file
# (skull-stripped brains, masked scans), or the darkest of the three classes that Otsu's threshold gives when it is
# applied twice: at the first one muscle is background, too.

# %%
#| export
def _largest(mask: np.ndarray) -> np.ndarray: return cc3d.largest_k(mask, k=1, connectivity=6).astype(bool)

def _threshold(img: np.ndarray, kind: Modality) -> float:
    "Body voxels are above it"
    if kind == "ct": return -500.0
    low = img.min()
    if np.count_nonzero(img == low) > 0.05*img.size: return float(low)
    from skimage.filters import threshold_otsu
    first = threshold_otsu(img.reshape(-1))
    lower = img[img <= first]
    return float(threshold_otsu(lower) if lower.min() < lower.max() else first)

def _outer_air(dark: np.ndarray, spacing: Sequence[float], neck: float, room: np.ndarray | None) -> np.ndarray:
    "The part of `dark` around the body, cut off where it is narrower than 2 `neck` [mm]; `room`: voxels like its air"
    padded = np.pad(dark, 1, mode="edge") # a border of the volume is no wall
    core = edt.edt(padded, anisotropy=spacing, black_border=False, parallel=1) > neck
    found = cc3d.connected_components(core, connectivity=6)
    size = np.bincount(found.reshape(-1))
    border = np.ones(found.shape, bool)
    border[2:-2, 2:-2, 2:-2] = False
    outside = np.bincount(found[border], minlength=len(size)) > 0
    if room is not None:
        padded = np.pad(room, 1, mode="edge")
        outside &= 2*np.bincount(found[padded], minlength=len(size)) > size
    outside[0] = False
    if not outside.any(): return np.zeros_like(dark)
    core = found == np.argmax(size*outside)
    near = edt.edt(~core, anisotropy=spacing, black_border=False, parallel=1) <= neck + 0.5*max(spacing)
    return dark & near[1:-1, 1:-1, 1:-1]

# %%
#| export
class Body(NamedTuple):
    "The body in a scan"
    mask: np.ndarray # (x, y, z) bool, one 6-connected component
    modality: Modality # what the scan was taken for
    threshold: float # voxels above it are tissue; in the unit of the scan

def body_mask(
    vol: Volume, # scan without channels, any orientation
    modality: Literal["auto", "ct", "other"] = "auto", # 'ct' for Hounsfield units
    *,
    grid_mm: float = 3.0, # the decision is made on a grid of about this voxel size [mm]
    neck_mm: float = 4.0, # radius of the necks of air that are cut [mm]
) -> Body: # mask on the grid of `vol`; everything if there is no contrast
    "Find the body: tissue and the cavities inside it"
    if vol.channels is not None: raise DataError(f"body mask: one 3-D scan is needed, got shape {vol.data.shape}")
    if modality not in ("auto", "ct", "other"):
        raise ConfigError(f"modality: must be 'auto', 'ct' or 'other', got {modality!r}")
    img = np.asarray(vol.data)
    kind = modality_of(img) if modality == "auto" else modality
    if img.size == 0 or img.min() == img.max(): return Body(np.ones(img.shape, bool), kind, -math.inf)
    steps = [max(1, round(min(grid_mm, s*n/4)/s)) for s, n in zip(vol.spacing, vol.shape)]
    level = _threshold(img[tuple(slice(None, None, k) for k in steps)], kind)
    body, spacing = _shrunk(img > level, steps), [s*k for s, k in zip(vol.spacing, steps)]
    room = _shrunk(img < -900, steps) if kind == "ct" else None
    body = _largest(~_outer_air(~body, spacing, neck_mm, room))
    if not body.any():
        raise DataError(f"no body found: no voxel is above {level:g} on a grid of {max(spacing):.3g} mm. Pass a mask, "
                        "or mask='none' to use the whole volume")
    return Body(body if max(steps) == 1 else _grown(body, steps, img, level), kind, level)

def _shrunk(mask: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    "What most voxels of each block say"
    total, full = mask.astype(np.uint16), 1
    for axis, k in enumerate(steps):
        starts = np.arange(0, mask.shape[axis], k)
        total = np.add.reduceat(total, starts, axis=axis)
        sizes = np.diff(np.append(starts, mask.shape[axis])).reshape(-1, *(1,)*(2 - axis))
        full = full*sizes
    return 2*total > full

def _grown(body: np.ndarray, steps: Sequence[int], img: np.ndarray, level: float) -> np.ndarray:
    "Mask on the grid of `img`: certain well inside and outside of the coarse one, by threshold in between"
    reach = ndimage.generate_binary_structure(3, 3)
    sure, maybe = ndimage.binary_erosion(body, reach, border_value=1), ndimage.binary_dilation(body, reach)
    picks = np.ix_(*(np.arange(n)//k for n, k in zip(img.shape, steps)))
    return _largest(sure[picks] | (maybe[picks] & (img > level)))

# %% [markdown]
# A trunk without lungs is the easy case: the mask ends where the tissue does.

# %%
scan = Volume(ct.img, affine_from(ct.spacing))
body = body_mask(scan)
fig, axes = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
for ax, axis, name in zip(axes, (2, 1), ("axial", "coronal")):
    place, (a, b) = ct.img.shape[axis]//2, [s for k, s in enumerate(ct.spacing) if k != axis]
    ax.imshow(np.take(ct.img, place, axis).T, cmap="Greys_r", vmin=-1000, vmax=400, origin="lower", aspect=b/a)
    ax.contour(np.take(body.mask, place, axis).T, [0.5], colors="tab:orange", linewidths=1)
    ax.set(xticks=[], yticks=[], title=f"{name}, body above {body.threshold:g}")

# %% [markdown]
# The mask holds every labelled voxel, is one component, and does not change when the scan is stored another way round.

# %%
assert body.mask[ct.lbl > 0].mean() > 0.999 and cc3d.connected_components(body.mask, connectivity=6).max() == 1
assert 0.2 < body.mask.mean() < 0.8
flipped = replace(scan, data=scan.data[::-1, :, ::-1])
assert np.mean(body_mask(flipped).mask[::-1, :, ::-1] != body.mask) < 0.01

# %% [markdown]
# A dark cavity inside is body, too, and a neck of air between it and the room, as the nose makes one, is cut.

# %%
room = np.full((40, 40, 40), -1000.0)
room[6:34, 6:34, 6:34] = 40
room[12:28, 12:28, 12:28] = -850
room[19:21, 19:21, :12] = -1000
open_lung = body_mask(Volume(room, affine_from(2.0)), "ct", grid_mm=2).mask
assert open_lung[20, 20, 20] and not open_lung[2, 2, 2] and open_lung.sum() > 0.95*28**3

# %% [markdown]
# A background that is one constant needs no threshold, a volume without contrast is all body, a crop of lung is body,
# and a scan of air has none.

# %%
brain = phantoms.ball(24, radius=9)*np.linspace(1, 50, 24)
assert (body_mask(Volume(brain, affine_from(2.0))).mask == (brain > 0)).all()
assert body_mask(Volume(np.ones((5, 5, 5)), affine_from(2.0))).mask.all()
assert body_mask(Volume(room[14:26, 14:26, 14:26], affine_from(2.0)), "ct").mask.all()
air = np.full((12, 12, 12), -1000) + np.arange(12)
with raises(DataError, match="no body found"): body_mask(Volume(air, affine_from(2.0)), "ct")
