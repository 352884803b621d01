# %% [markdown]
# # Walking through a prediction
#
# > A slider through a volume of any size with its prediction laid over it; only the chunks of a slice are read.
#
# Figures say how often a prediction is right, not where it is wrong. For that one looks, slice by slice, along each
# axis, with the prediction now strong and now faint. The volume may be far larger than memory, so a slice is all that
# is ever read, and what is larger than a screen is thinned out before it is drawn. Predictions come from the page on
# [the command that predicts](58b_zarrnet_predict.ipynb).

# %%
#| default_exp zarrnet.browse

# %%
#| export
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from medvol_nb.core import DataError, FormatError
from medvol_nb.plot import window_limits
from medvol_nb.slices import Layer, Paint, Planes, blend, grey_bytes, heat_paint, label_paint, layer
from medvol_nb.stores import as_format_error
from medvol_nb.widgets import Panel, browse
from medvol_nb.zarrnet.geometry import decode_normals, normals_rgb
from medvol_nb.zarrnet.io import ChunkedVolume, open_volume

# %%
import tempfile
from pathlib import Path

from IPython.display import Image

from medvol_nb import phantoms
from medvol_nb.core import raises
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet.config import InferenceParams, Target
from medvol_nb.zarrnet.infer import predict_volume

# %% [markdown]
# ## One slice
# A slice is read by [the slices of page 07b](07b_slices.ipynb): rows of chunks across its axis are decoded once and
# kept for a while, and a slice that is larger than a screen is thinned out.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
roll = phantoms.sheets((40, 72, 88))
write_zarr(Volume(roll.img, affine_from(1.0, axes="zyx"), "zyx"), root/"ct.zarr", chunks=16)
ct = open_volume(root/"ct.zarr")
slices = Planes(ct)
[slices.plane(a, 20).shape for a in slices.names]

# %%
assert np.array_equal(slices.plane("y", 30), roll.img[:, 30]) and Planes(ct, most=40).plane("z", 3).shape == (24, 30)
with raises(DataError, match="x: must be 0...87, got 88"): slices.plane("x", 88)

# %% [markdown]
# ## Colours over grey
# What is laid over depends on what it is. Three channels are vectors and shown as colours; a vector of length zero is
# background and shows the image. Labels get their fixed colours. Anything else is a probability, integers over the
# largest value they can hold, and its colour is as strong as it is likely.

# %%
#| export
def vector_paint(
    plane: np.ndarray, # (3, row, column) vectors, floats or as stored
) -> tuple[np.ndarray, np.ndarray]: # colours (row, column, 3) and weights (row, column)
    "Directions as colours; a vector of length zero is background"
    if plane.ndim != 3 or len(plane) != 3: raise DataError(f"vectors: needs (3, row, column), got {plane.shape}")
    v = decode_normals(plane)
    return 255*normals_rgb(v), v.any(0)

def _first(paint: Paint) -> Paint:
    "A paint for planes that may have an axis of one channel"
    return lambda plane: paint(plane[0] if plane.ndim == 3 and len(plane) == 1 else plane)

def paint_of(
    channels: int | None, # of what is laid over
    labels: bool = False, # integers of one channel are labels, not probabilities
) -> Paint: # how it looks
    "Vectors as colours, labels in theirs, anything else as a probability"
    return vector_paint if channels == 3 else _first(label_paint if labels else heat_paint)

def tinted(
    grey: np.ndarray, # (row, column) intensities
    found: np.ndarray | None, # (row, column) probabilities or labels, (3, row, column) vectors; None: nothing
    opacity: float = 0.5, # of the colour, [0, 1]
    *,
    limits: tuple[float, float] | None = None, # intensities shown as black and white; None: those of the slice
    labels: bool = False, # integers are labels, not probabilities
) -> np.ndarray: # (row, column, 3) uint8
    "A grey slice with a prediction over it"
    base = grey_bytes(grey, limits or window_limits(grey))
    if found is None: return np.repeat(base[..., None], 3, -1)
    return blend(base, *paint_of(len(found) if found.ndim == 3 else None, labels)(found), opacity)

# %%
normals = roll.normals[::-1]
tinted(roll.img[20], roll.mask[20], labels=True).shape, tinted(roll.img[20], normals[:, 20]).dtype

# %%
plain = tinted(roll.img[20], None)
assert np.array_equal(tinted(roll.img[20], normals[:, 20], 0), plain)
assert np.array_equal((tinted(roll.img[20], np.uint8(255)*roll.mask[20], 1) != plain).any(-1), roll.mask[20] > 0)
with raises(DataError, match="over"): tinted(roll.img[20], roll.mask[20, 1:])

# %% [markdown]
# ## Walking
# `predict` writes a group with an array for each target; all of them can be chosen. Chunks that were decoded are kept
# for a while, since the next slice needs the same ones. The scale of grey is that of the middle slice and stays until
# the window is moved, so that brightness means the same everywhere.

# %%
#| export
def predictions_in(
    prediction: Any, # path of predictions.zarr or of one array, opened volume, array, or name -> such
    cache_bytes: int = 0, # see `open_volume`
) -> dict[str, ChunkedVolume]: # name -> volume
    "Open what is to be shown over a volume"
    def opened(p): return p if isinstance(p, ChunkedVolume) else open_volume(p, cache_bytes=cache_bytes)
    if prediction is None: return {}
    if isinstance(prediction, Mapping): return {str(n): opened(p) for n, p in prediction.items()}
    if isinstance(prediction, (ChunkedVolume, np.ndarray)): return {"prediction": opened(prediction)}
    import zarr
    where = os.fspath(prediction)
    with as_format_error(where, "damaged, or not a store"):
        group = zarr.open(where, mode="r")
        if isinstance(group, zarr.Array) or "multiscales" in group.attrs or "ome" in group.attrs:
            return {"prediction": opened(where)}
        names = sorted(n for n, _ in group.members())
    if not names: raise FormatError(f"{where}: holds no predictions")
    return {n: opened(f"{where}/{n}") for n in names}

def walk(
    volume: Any, # path, opened volume or array
    prediction: Any = None, # see `predictions_in`
    *,
    axis: Literal["z", "y", "x"] = "z", # to begin with
    index: int | None = None, # slice to begin with; None: the middle one
    opacity: float = 0.5, # of the prediction, [0, 1]
    labels: bool = False, # integers of one channel are labels, not probabilities
    channel: int = 0, # of a volume with channels
    most: int = 768, # rows and columns at most; larger slices are thinned out
    cache_gb: float = 0.25, # decoded chunks kept for the next slices [GB]
) -> Panel: # controls view, slice, window, opacity and layer; `picture`
    "Walk through a volume with its prediction laid over it"
    vol = volume if isinstance(volume, ChunkedVolume) else open_volume(volume)
    parts = predictions_in(prediction)
    image = Planes(vol, channel=channel, most=most, cache_bytes=int(cache_gb*1e9/(1 + len(parts))))
    layers: dict[str, Layer] = {n: layer(p, image, paint_of(p.channels, labels), n) for n, p in parts.items()}
    return browse(image, layers, view=axis, index=index, opacity=opacity, size=640)

# %% [markdown]
# A stand-in for a network sees sheets by their brightness and normals by the slope. Its predictions go into a store,
# and from there over the volume.

# %%
class Bright:
    "Sheets are bright, normals point where it gets brighter"
    def predict(self, x):
        import torch
        slope = torch.stack(torch.gradient(x[:, 0], dim=(3, 2, 1)), 1)
        on = (x > 0.4).float()
        return {"sheet": (12*(x - 0.4)).sigmoid(), "normals": torch.nn.functional.normalize(slope, dim=1)*on}

def by255(patch): return patch.astype(np.float32)/255

targets = {"sheet": Target(channels=1, activation="sigmoid"), "normals": Target(channels=3)}
way = InferenceParams(patch_size=(16, 32, 32), chunks=(16, 32, 32), overlap=0.5)
predict_volume(Bright(), ct, root, targets, way, normalizer=by255)
box = walk(root/"ct.zarr", root/"predictions.zarr")
Image(box.picture.value, width=420)

# %% [markdown]
# The parts can be set from code as by hand: here the sheets instead of the normals, from the side.

# %%
before = box.picture.value
box.layer.value, box.view.value, box.opacity.value = "sheet", "x", 0.8
Image(box.picture.value, width=420)

# %%
assert box.picture.value[:8] == b"\x89PNG\r\n\x1a\n" and box.picture.value != before
assert box.layer.options == ("normals", "sheet", "none") and box.slice.max == 87 and box.slice.value == 44
with raises(DataError, match="Is it of this volume?"): walk(ct, np.zeros((4, 4, 4), np.uint8))

# %%
place.cleanup()
