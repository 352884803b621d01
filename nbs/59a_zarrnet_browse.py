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
import io
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from medvol_nb.core import DataError, FormatError
from medvol_nb.plot import label_colours, window_limits
from medvol_nb.stores import as_format_error
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
# Across an axis, an array of one slice is read and the axis dropped. Of a large one every second or third voxel is
# kept, after reading: chunks are the unit that costs.

# %%
#| export
AXES = ("z", "y", "x")

def read_slice(
    vol: ChunkedVolume, # from `open_volume`
    axis: Literal["z", "y", "x"] = "z", # across which
    index: int = 0, # where along it [voxel]
    most: int = 1024, # rows and columns at most; larger slices are thinned out
) -> np.ndarray: # (row, column) or (c, row, column), as stored
    "One slice of a chunked volume"
    if axis not in AXES: raise DataError(f"read_slice: axis must be one of {', '.join(AXES)}, got {axis!r}")
    k = AXES.index(axis)
    if not 0 <= index < vol.shape[k]:
        raise DataError(f"read_slice: {axis} must be 0...{vol.shape[k] - 1}, got {index}")
    box = [slice(None)]*3
    box[k] = slice(index, index + 1)
    plane = np.squeeze(vol[tuple(box)], axis=k - 3)
    step = max(1, -(-max(plane.shape[-2:])//most))
    return plane[..., ::step, ::step]

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
roll = phantoms.sheets((40, 72, 88))
write_zarr(Volume(roll.img, affine_from(1.0, axes="zyx"), "zyx"), root/"ct.zarr", chunks=16)
ct = open_volume(root/"ct.zarr")
[read_slice(ct, a, 20).shape for a in AXES]

# %%
assert np.array_equal(read_slice(ct, "y", 30), roll.img[:, 30]) and read_slice(ct, "z", 3, most=40).shape == (24, 30)
with raises(DataError, match="x must be 0...87, got 88"): read_slice(ct, "x", 88)

# %% [markdown]
# ## Colours over grey
# What is laid over depends on what it is. Three channels are vectors and shown as colours; a vector of length zero is
# background and shows the image. Labels get their fixed colours. Anything else is a probability, integers over the
# largest value they can hold, and its colour is as strong as it is likely.

# %%
#| export
def tinted(
    grey: np.ndarray, # (row, column) intensities
    found: np.ndarray | None, # (row, column) probabilities or labels, (3, row, column) vectors; None: nothing
    opacity: float = 0.5, # of the colour, [0, 1]
    *,
    limits: tuple[float, float] | None = None, # intensities shown as black and white; None: those of the slice
    labels: bool = False, # integers are labels, not probabilities
) -> np.ndarray: # (row, column, 3) uint8
    "A grey slice with a prediction over it"
    if not 0 <= opacity <= 1: raise DataError(f"tinted: opacity must be in [0, 1], got {opacity!r}")
    low, high = limits or window_limits(grey)
    base = np.repeat(np.clip((grey.astype(np.float32) - low)/max(high - low, 1e-9), 0, 1)[..., None], 3, -1)
    if found is not None:
        if found.ndim == 3 and len(found) == 1: found = found[0]
        if found.shape[-2:] != grey.shape or found.ndim > 2 and len(found) != 3:
            raise DataError(f"tinted: needs (row, column) or (3, row, column) over {grey.shape}, got {found.shape}")
        if found.ndim == 3:
            v = decode_normals(found)
            colour, weight = normals_rgb(v), v.any(0)
        elif labels: colour, weight = label_colours(found), found != 0
        else:
            top = np.iinfo(found.dtype).max if found.dtype.kind in "ui" else 1
            colour, weight = np.float32([1.0, 0.25, 0.1]), np.clip(found.astype(np.float32)/top, 0, 1)
        base = base + opacity*np.asarray(weight, np.float32)[..., None]*(colour - base)
    return np.round(255*np.clip(base, 0, 1)).astype(np.uint8)

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
# for a while, since the next slice needs the same ones. The scale of grey is that of the middle slice and stays, so
# that brightness means the same everywhere.

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
) -> Any: # ipywidgets box; `axis`, `slice`, `opacity`, `target` and `picture` are its parts
    "Walk through a volume with its prediction laid over it"
    import ipywidgets as w
    from PIL import Image as Picture
    cache = int(cache_gb*1e9/2)
    vol = volume if isinstance(volume, ChunkedVolume) else open_volume(volume, cache_bytes=cache)
    layers = predictions_in(prediction, cache)
    for name, layer in layers.items():
        if layer.shape != vol.shape:
            raise DataError(f"walk: {name!r} has shape {layer.shape}, the volume {vol.shape}. Is it of this volume?")
    if not 0 <= channel < (vol.channels or 1): raise DataError(f"walk: channel {channel} of {vol.channels or 1}")
    def grey(at: str, k: int) -> np.ndarray:
        plane = read_slice(vol, at, k, most)
        return plane if plane.ndim == 2 else plane[channel]
    def middle(at: str) -> int: return vol.shape[AXES.index(at)]//2
    limits, begin = window_limits(grey(axis, middle(axis))), middle(axis) if index is None else index
    box = w.VBox()
    box.axis = w.ToggleButtons(options=AXES, value=axis, description="across")
    box.slice = w.IntSlider(begin, 0, vol.shape[AXES.index(axis)] - 1, description="slice", continuous_update=False)
    box.opacity = w.FloatSlider(opacity, min=0, max=1, step=0.05, description="opacity", continuous_update=False)
    box.target = w.Dropdown(options=[*layers, "none"], description="shown")
    box.picture = w.Image(format="png")
    def draw(_: Any = None) -> None:
        at, k = box.axis.value, box.slice.value
        found = None if box.target.value == "none" else read_slice(layers[box.target.value], at, k, most)
        rgb = tinted(grey(at, k), found, box.opacity.value, limits=limits, labels=labels)
        out = io.BytesIO()
        Picture.fromarray(rgb).save(out, "PNG")
        tall, wide = (n*s for n, s, a in zip(vol.shape, vol.spacing or (1, 1, 1), AXES) if a != at)
        box.picture.width, box.picture.height = (str(max(1, round(640*v/max(tall, wide)))) for v in (wide, tall))
        box.picture.value = out.getvalue()
    def turn(_: Any) -> None:
        "Another axis has another number of slices; the picture is drawn once, with the new one"
        box.slice.unobserve(draw, "value")
        box.slice.max = vol.shape[AXES.index(box.axis.value)] - 1
        box.slice.value = middle(box.axis.value)
        box.slice.observe(draw, "value")
        draw()
    box.axis.observe(turn, "value")
    for part in (box.slice, box.opacity, box.target): part.observe(draw, "value")
    box.children = [w.HBox([box.axis, box.target]), w.HBox([box.slice, box.opacity]), box.picture]
    draw()
    return box

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
box.target.value, box.axis.value, box.opacity.value = "sheet", "x", 0.8
Image(box.picture.value, width=420)

# %%
assert box.picture.value[:8] == b"\x89PNG\r\n\x1a\n" and box.picture.value != before
assert box.target.options == ("normals", "sheet", "none") and box.slice.max == 87 and box.slice.value == 44
with raises(DataError, match="Is it of this volume?"): walk(ct, np.zeros((4, 4, 4), np.uint8))

# %%
place.cleanup()
