# %% [markdown]
# # Seams
#
# > Numbers for what patches leave behind: steps at their borders, dependence on the overlap, errors at the rim.
#
# A volume predicted in patches should look as if it had been predicted at once. Whether it does is hard to see by eye
# and easy to measure, as it is known where patches begin and end. Three numbers tell three things. The *seam ratio*
# compares the change of the prediction across patch borders with its change everywhere else: 1 means that borders
# cannot be found in it. *Self-consistency* compares a prediction with one of more overlap, which costs more and is
# worth it only if the difference matters. The *border error* looks at the rim of the volume, where no second patch
# helps.
#
# Predictions come from the page on [inference](58a_zarrnet_infer.ipynb); positions and weights from
# [grid](06_grid.ipynb).

# %%
#| default_exp zarrnet.seams

# %%
#| export
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medvol_nb.core import DataError
from medvol_nb.grid import Grid
from medvol_nb.zarrnet.config import InferenceParams, Target
from medvol_nb.zarrnet.infer import predict_array

# %%
import matplotlib.pyplot as plt
import torch

from medvol_nb import phantoms
from medvol_nb.core import raises

# %% [markdown]
# ## Where patches meet
# Along an axis, a border lies between voxels $k-1$ and $k$ if a patch starts at $k$ or ends there. The edges of the
# volume do not count.

# %%
#| export
def border_planes(
    grid: Grid, # positions
) -> list[np.ndarray]: # an array (n) int64 for each axis: k for the plane between voxels k - 1 and k
    "Planes where patches begin or end"
    return [np.array(sorted({int(k) for k in (*starts, *(starts + p)) if 0 < k < n}), np.int64)
            for starts, p, n in zip(grid.starts, grid.patch_size, grid.shape)]

# %%
border_planes(Grid((20, 20, 8), 8, 0.25))

# %%
assert [b.tolist() for b in border_planes(Grid((16, 20, 8), 8, 0))] == [[8], [8, 12, 16], []]

# %% [markdown]
# ## Seam ratio
# For each axis, the mean of $|f(k) - f(k-1)|$ over all border planes, divided by the mean over all other planes. The
# borders may happen to lie where the object itself changes, so the same ratio of the truth is the reference; with few
# planes both are noisy, and the number of planes is given with the ratio.

# %%
#| export
class SeamRatio(NamedTuple):
    "How much a prediction changes across patch borders, for one axis"
    ratio: float # of the mean change at borders to that elsewhere; NaN without borders
    reference: float # the same of the truth; 1 if there is none
    planes: int # borders

    @property
    def relative(self) -> float: # 1: borders cannot be found in the prediction
        "The ratio, divided by that of the truth"
        return self.ratio/self.reference

def _ratio(values: np.ndarray, axis: int, borders: np.ndarray) -> float:
    steps = np.abs(np.diff(values.astype(np.float64), axis=axis - 3))
    planes = steps.mean(axis=tuple(a for a in range(steps.ndim) if a != steps.ndim + axis - 3))
    at = np.zeros(len(planes), bool)
    at[borders - 1] = True
    if not at.any() or at.all(): return float("nan")
    return float(planes[at].mean()/planes[~at].mean()) if planes[~at].any() else float("inf")

def seam_ratio(
    values: np.ndarray, # (..., z, y, x) prediction
    grid: Grid, # positions of its patches
    truth: np.ndarray | None = None, # (..., z, y, x) what should have been predicted
) -> tuple[SeamRatio, ...]: # for z, y, x
    "Change of a prediction across patch borders, relative to its change elsewhere"
    for name, a in (("values", values), ("truth", truth)):
        if a is not None and a.shape[-3:] != grid.shape:
            raise DataError(f"seam_ratio: {name} must end in the grid's {grid.shape}, got shape {a.shape}")
    return tuple(SeamRatio(_ratio(values, axis, b), 1.0 if truth is None else _ratio(truth, axis, b), len(b))
                 for axis, b in enumerate(border_planes(grid)))

# %% [markdown]
# A smooth ramp has no seams; one with a step of its own height at each border has twice the change there.

# %%
grid = Grid((40, 8, 8), (10, 8, 8), 0)
ramp = np.broadcast_to(np.arange(40.)[:, None, None], (40, 8, 8))
stairs = ramp + (np.arange(40)//10)[:, None, None]
seam_ratio(ramp, grid)[0], seam_ratio(stairs, grid, ramp)[0]

# %%
assert seam_ratio(ramp, grid)[0] == (1, 1, 3) and seam_ratio(stairs, grid, ramp)[0].relative == 2
assert np.isnan(seam_ratio(ramp, grid)[1].ratio) and seam_ratio(ramp[None], grid)[0].ratio == 1
with raises(DataError, match=r"values must end in the grid's \(40, 8, 8\)"): seam_ratio(ramp[1:], grid)

# %% [markdown]
# ## Self-consistency
# The reference is the same model with Gaussian weights and an overlap of 0.75. That favours Gaussian weights a little;
# what it shows is how much would change if one paid for more overlap.

# %%
#| export
def self_consistency(
    model: Any, # see `predict_array`
    array: np.ndarray, # (z, y, x) or (c, z, y, x)
    targets: Mapping[str, Target], # name -> settings
    settings: InferenceParams, # the run to be judged
    *,
    overlap: float = 0.75, # of the reference
    **options: Any, # others of `predict_array`
) -> dict[str, float]: # name -> mean absolute difference, over all channels and voxels
    "Mean difference to a prediction with more overlap"
    dense = settings.model_copy(update={"overlap": overlap, "blend": "gaussian"})
    ours, theirs = (predict_array(model, array, targets, s, **options) for s in (settings, dense))
    return {name: float(np.abs(ours[name] - theirs[name]).mean()) for name in ours}

# %% [markdown]
# ## Border error
# The outer quarter of a patch along the faces of the volume, against the rest.

# %%
#| export
class BorderError(NamedTuple):
    "Mean absolute error near the faces of a volume, and inside"
    border: float # in the outer quarter of a patch
    interior: float # elsewhere; NaN if there is nothing else

def border_error(
    values: np.ndarray, # (..., z, y, x) prediction
    truth: np.ndarray, # (..., z, y, x) of the same shape
    patch_size: Sequence[int], # (z, y, x) [voxel]
    valid: np.ndarray | None = None, # (z, y, x) bool: voxels that count
) -> BorderError: # same unit as the values
    "Error in the rim that no second patch covers, and in the interior"
    if values.shape != truth.shape:
        raise DataError(f"border_error: prediction and truth differ in shape, got {values.shape} and {truth.shape}")
    error = np.abs(values.astype(np.float64) - truth)
    inside = np.zeros(values.shape[-3:], bool)
    inside[tuple(slice(p//4, n - p//4) for p, n in zip(patch_size, inside.shape, strict=True))] = True
    counted = np.ones_like(inside) if valid is None else valid
    def mean(where: np.ndarray) -> float: return float(error[..., where].mean()) if where.any() else float("nan")
    return BorderError(mean(counted & ~inside), mean(counted & inside))

# %%
rim = np.ones((12, 12, 12))
rim[2:-2, 2:-2, 2:-2] = 0
border_error(rim, rim*0, (8, 8, 8))

# %%
assert border_error(rim, rim*0, (8, 8, 8)) == (1, 0) and np.isnan(border_error(rim, rim, (24, 24, 24)).interior)
with raises(DataError, match="differ in shape"): border_error(rim, rim[1:], (8, 8, 8))

# %% [markdown]
# ## Putting it together
# A model that is good in the middle of its patch and drifts toward its border, differently in each patch, as a network
# does that normalises over what it sees. Many planes are needed for the ratio to mean anything, so the patch is small.

# %%
class Drifts:
    "Brightness, plus an error that grows toward the border of the patch with a sign that depends on its content"
    def predict(self, x):
        away = [torch.linspace(-1, 1, n).abs()**4 for n in x.shape[2:]]
        far = torch.stack(torch.meshgrid(*away, indexing="ij")).amax(0)
        sign = torch.where((x.mean(dim=(1, 2, 3, 4))*97 % 1) < 0.5, -1.0, 1.0).reshape(-1, 1, 1, 1, 1)
        return {"sheet": (x + 0.2*far*sign).clamp(0, 1)}

roll = phantoms.sheets((32, 96, 96))
volume = roll.img.astype(np.float32)/255
target = {"sheet": Target(channels=1, activation="sigmoid")}
ways = [(blend, overlap) for blend in ("gaussian", "constant") for overlap in (0.5, 0.25)] + [("constant", 0)]
rows, shown = {}, {}
for blend, overlap in ways:
    way = InferenceParams(patch_size=(16, 16, 16), blend=blend, overlap=overlap, skip_empty=False, batch_size=8)
    shown[blend, overlap] = out = predict_array(Drifts(), volume, target, way)["sheet"]
    x = seam_ratio(out, Grid(volume.shape, 16, overlap), volume)[2]
    rows[blend, overlap] = {"seam ratio": round(x.relative, 3), "planes": x.planes,
                            "consistency": round(self_consistency(Drifts(), volume, target, way)["sheet"], 4),
                            "border, interior": [round(e, 4) for e in border_error(out[0], volume, (16, 16, 16))]}
rows

# %%
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6))
for ax, way in zip(axes, (("constant", 0), ("constant", 0.5), ("gaussian", 0.5))):
    ax.imshow(shown[way][0, 16] - volume[16], cmap="RdBu", vmin=-0.15, vmax=0.15)
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"error, {way[0]} {way[1]}\nseam ratio {rows[way]['seam ratio']:.2f}", fontsize=9)

# %% [markdown]
# At equal overlap the Gaussian window wins in both numbers. At the rim of the volume nothing helps but a larger patch.

# %%
for overlap in (0.5, 0.25):
    gaussian, constant = rows["gaussian", overlap], rows["constant", overlap]
    assert gaussian["seam ratio"] < constant["seam ratio"] < rows["constant", 0]["seam ratio"]
    assert gaussian["consistency"] < constant["consistency"]
assert abs(rows["gaussian", 0.5]["seam ratio"] - 1) <= 0.08 and rows["gaussian", 0.5]["planes"] >= 6
