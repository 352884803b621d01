# %% [markdown]
# # Slices for the screen
#
# > One plane of any volume, in colour, as PNG bytes, in a few milliseconds.
#
# A picture of page 07 is made to be kept: lettered, to scale, drawn by matplotlib in a third of a second. Walking
# through a volume with a slider asks for ten pictures a second, also of a store that does not fit in memory. So this
# page does the same work with less: it reads one plane, colours it with small tables, and writes the PNG itself. It
# knows nothing about widgets; [the next page](07c_widgets.ipynb) puts sliders on it.

# %%
#| default_exp slices

# %%
#| export
import functools
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import DataError
from medvol_nb.plot import label_colours, rim, window_limits
from medvol_nb.stores import as_format_error, check_budget, reader_of
from medvol_nb.volume import Volume, affine_from, format_of, read_volume, resample_to, same_grid, to_axes, to_index

# %%
import time

from IPython.display import Image

from medvol_nb import phantoms, plot
from medvol_nb.core import raises, tmpdir
from medvol_nb.volume import reorient, to_world, write_volume

# %% [markdown]
# ## A PNG in three milliseconds
# The usual writer tries five filters on every row and compresses hard: 16 to 75 ms for a coloured plane of 512 x 512,
# more than all the rest. A picture that is shown once needs neither. Every row is stored as its difference to the row
# above, and compressed by the library's fast deflate.

# %%
#| export
def encode_png(
    pixels: np.ndarray, # (row, column) or (row, column, 3) uint8
) -> bytes: # a PNG file's content
    "Grey or coloured picture as PNG, quickly"
    from isal import isal_zlib
    if pixels.dtype != np.uint8 or 0 in pixels.shape or not (pixels.ndim == 2 or pixels.shape[2:] == (3,)):
        raise DataError(f"encode_png: needs (row, column) or (row, column, 3) uint8, got {pixels.shape} {pixels.dtype}")
    flat = pixels.reshape(len(pixels), -1)
    rows = np.empty((len(flat), 1 + flat.shape[1]), np.uint8)
    rows[:, 0], rows[0, 1:] = 2, flat[0] # filter type 2: minus the row above
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    head = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", isal_zlib.compress(rows.data, 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)

# %%
body = phantoms.abdomen()
ct = Volume(body.img, affine_from(body.spacing))
wheel = np.round(255*plot.label_colours(np.add.outer(np.arange(128)//8, 16*(np.arange(160)//8)))).astype(np.uint8)
Image(encode_png(wheel))

# %%
import io

from PIL import Image as Picture

for pixels in (wheel, wheel[..., 0], wheel[:1, :1], wheel[::-1, ::2]):
    assert np.array_equal(np.asarray(Picture.open(io.BytesIO(encode_png(pixels)))), pixels)
with raises(DataError, match="uint8, got .* float64"): encode_png(wheel/255)

# %% [markdown]
# ## Colours over grey
# What is laid over an image depends on what it is, so that is a function: a *paint* takes a plane and returns a colour
# and a weight for each pixel. Two are here: labels in the fixed colours of page 07, and a score whose colour is as
# strong as the score is high. Pages with other needs, such as vectors, bring their own.

# %%
#| export
Paint = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] # plane -> (row, column, 3) or (3) 0...255, weight [0, 1]

def grey_bytes(
    plane: np.ndarray, # (row, column) of any numeric dtype; NaN is black
    limits: tuple[float, float], # shown as black and white
) -> np.ndarray: # (row, column) uint8
    "Intensities as grey"
    low, high = (float(v) for v in limits)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise DataError(f"display limits must be finite and rise, got {limits!r}")
    with np.errstate(invalid="ignore", over="ignore"):
        grey = plane.astype(np.float32)
        grey -= low
        grey *= 255/(high - low)
    return np.rint(np.nan_to_num(np.clip(grey, 0, 255, out=grey), copy=False)).astype(np.uint8)

@functools.lru_cache(8)
def _table(n: int) -> np.ndarray: return np.round(255*label_colours(n)).astype(np.uint8)

def label_bytes(
    ids: np.ndarray, # (row, column) integers or bool
) -> np.ndarray: # (row, column, 3) uint8
    "Colours of labels, those of `plot.label_colours`, through a table"
    if ids.dtype.kind == "b": ids = ids.view(np.uint8)
    if ids.dtype.kind in "iu" and ids.size and ids.min() >= 0 and ids.max() < 2**16:
        return _table(1 << int(ids.max()).bit_length())[ids]
    values, where = np.unique(ids, return_inverse=True)
    return np.round(255*label_colours(values)).astype(np.uint8)[where.reshape(ids.shape)]

def label_paint(
    plane: np.ndarray, # (row, column) labels; whole numbers of any dtype, 0 is transparent
    outline: bool = False, # rims of regions only
) -> tuple[np.ndarray, np.ndarray]: # colours (row, column, 3) uint8 and weights (row, column)
    "Labels in their fixed colours"
    if plane.dtype.kind == "f":
        if not np.array_equal(plane, np.rint(plane)):
            raise DataError("labels: these are fractions, a label map holds whole numbers")
        plane = plane.astype(np.int64)
    return label_bytes(plane), rim(plane) if outline else plane != 0

def heat_paint(
    plane: np.ndarray, # (row, column) scores; integers count over the largest value of their type
    limits: tuple[float, float] = (0.0, 1.0), # scores that are transparent and full
    colour: Sequence[float] = (255, 64, 26), # red, green, blue, 0...255
) -> tuple[np.ndarray, np.ndarray]: # colour (3) and weights (row, column)
    "Scores in one colour, the stronger the higher"
    top = float(np.iinfo(plane.dtype).max) if plane.dtype.kind in "ui" else 1.0
    low, high = limits
    weight = (plane.astype(np.float32)/np.float32(top) - low)/max(high - low, 1e-9)
    return np.float32(colour), np.clip(np.nan_to_num(weight, copy=False), 0, 1)

def blend(
    base: np.ndarray, # (row, column) or (row, column, 3) uint8
    colour: np.ndarray, # (row, column, 3) or (3), 0...255
    weight: np.ndarray, # (row, column) [0, 1]
    opacity: float = 0.5, # of the colour, [0, 1]
) -> np.ndarray: # (row, column, 3) uint8
    "A colour over a picture"
    if not 0 <= opacity <= 1: raise DataError(f"opacity: must be in [0, 1], got {opacity!r}")
    if weight.shape != base.shape[:2]:
        raise DataError(f"what is laid over a picture of {base.shape[:2]} pixels has {weight.shape}")
    out, share = np.empty((*weight.shape, 3), np.uint8), weight.astype(np.float32)*np.float32(opacity)
    for k in range(3): # one colour after the other: passes over whole planes, which NumPy is fast at
        below = (base if base.ndim == 2 else base[..., k]).astype(np.float32)
        mixed = (colour[..., k] if colour.ndim == 3 else colour[k]) - below
        mixed *= share
        mixed += below
        out[..., k] = np.rint(mixed, out=mixed)
    return out

# %%
grey = grey_bytes(body.img[:, ::-1, 24].T, (-160, 300))
ids = body.lbl[:, ::-1, 24].T
score = np.exp(-((np.indices(grey.shape) - 20)**2).sum(0)/200)
painted = label_paint(ids), label_paint(ids, outline=True), heat_paint(score)
shown = [blend(grey, *p, opacity) for p, opacity in zip(painted, (0.5, 1, 0.5))]
plot.montage(shown, titles=["labels", "outlines", "a score"])

# %% [markdown]
# The colours are those of page 07, to the byte, and ids that are too large for a table, or negative, get theirs too.

# %%
reference = np.round(255*plot.overlay(body.img[:, ::-1, 24].T, ids, 0.5, limits=(-160, 300)))
assert np.abs(reference - shown[0]).max() <= 1
odd = np.array([[-1, 0, 7], [70_000, 2**40, 65_535]])
assert np.array_equal(label_bytes(odd), np.round(255*plot.label_colours(odd)))
assert np.array_equal(blend(grey, *label_paint(ids), 0)[..., 1], grey)
with raises(DataError, match="these are fractions"): label_paint(score)

# %% [markdown]
# ## Marks

# %%
#| export
def draw_cross(
    rgb: np.ndarray, # (row, column, 3) uint8, changed in place
    row: float, # centre; outside is moved to the border
    column: float, # centre
    colour: Sequence[int] = (0, 255, 120), # red, green, blue
    gap: int = 3, # pixels left free around the centre
) -> None:
    "Lines through a pixel, mixed into the picture, open in the middle"
    r, c = (int(np.clip(np.rint(v), 0, n - 1)) for v, n in zip((row, column), rgb.shape))
    for line in (rgb[r, :max(0, c - gap)], rgb[r, c + gap + 1:], rgb[:max(0, r - gap), c], rgb[r + gap + 1:, c]):
        line[:] = line//2 + np.asarray(colour, np.uint8)//2

def draw_box(
    rgb: np.ndarray, # (row, column, 3) uint8, changed in place
    rows: tuple[float, float], # first and last; what lies outside is not drawn
    columns: tuple[float, float], # first and last
    colour: Sequence[int] = (255, 220, 0), # red, green, blue
) -> None:
    "Frame of a rectangle"
    (top, bottom), (left, right) = ((int(np.rint(v)) for v in sorted(pair)) for pair in (rows, columns))
    inside = slice(max(top, 0), max(bottom + 1, 0)), slice(max(left, 0), max(right + 1, 0))
    for r in (top, bottom):
        if 0 <= r < rgb.shape[0]: rgb[r, inside[1]] = colour
    for c in (left, right):
        if 0 <= c < rgb.shape[1]: rgb[inside[0], c] = colour

# %%
marked = shown[0].copy()
draw_cross(marked, 20, 50)
draw_box(marked, (-5, 30), (10, 40))
Image(encode_png(marked), width=300)

# %%
assert (marked[30, 10:41] == (255, 220, 0)).all() and np.array_equal(marked[20, 50], shown[0][20, 50])
edge = shown[0].copy()
draw_cross(edge, -9, 1e6)
assert (edge != shown[0]).any()

# %% [markdown]
# ## Which way up
# Medical volumes, stored `xyz`, are shown as radiologists look at them, whatever their orientation in the file: the
# patient's right on the left, the head or the front on top. Nothing is reoriented for that, which would load the
# volume: the plane is cut from the array as it is stored, then turned. Microscopy, stored `zyx`, is shown as stored,
# the first row on top. Both rules can be overruled.

# %%
#| export
Convention = Literal["auto", "radiological", "neurological", "stored"]

@dataclass(frozen=True)
class Screen:
    "How planes across one axis lie on the screen"
    across: int # stored spatial axis
    rows: int # stored axis that runs down
    columns: int # stored axis that runs right
    up: bool = False # rows run against the stored index
    back: bool = False # columns run against the stored index
    sides: str = "" # letters at the left, right, top and bottom

def screens(
    vol: Volume, # any orientation and storage order
    convention: Convention = "auto", # auto: radiological for xyz, stored for zyx and all others
) -> dict[str, Screen]: # by name: axial, coronal, sagittal; or the names of the axes where shown as stored
    "The three ways to cut a volume"
    if convention not in ("auto", "radiological", "neurological", "stored"):
        raise DataError(f"convention: 'auto', 'radiological', 'neurological' or 'stored' is needed, got {convention!r}")
    if convention == "stored" or (convention == "auto" and vol.spatial_axes != "xyz"):
        return {a: Screen(d, *(k for k in range(3) if k != d)) for d, a in enumerate(vol.spatial_axes)}
    axis = {w: k for k, letter in enumerate(vol.orientation) for w, pair in enumerate(("LR", "PA", "IS"))
            if letter in pair}
    grows = {w: vol.orientation[k] in "RAS" for w, k in axis.items()}
    out = {}
    for name, w, h, v in (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2)):
        first = name == "sagittal" or convention != "neurological" # the right, or the front, is on the left
        sides = {0: "RL" if first else "LR", 1: "AP"}[h] + {1: "AP", 2: "SI"}[v]
        out[name] = Screen(axis[w], axis[v], axis[h], grows[v], grows[h] == first, sides)
    return out

# %%
screens(ct)

# %% [markdown]
# ## Opening
# A path, an array or a volume will do. A pyramid is opened at the finest level that fits the screen, since what does
# not fit would be thrown away. Objects of the zarr pages, which read all channels at once, are taken as well.

# %%
#| export
class _Whole:
    "A chunked volume with a spatial shape, as an array of all its axes"
    def __init__(self, vol: Any):
        lead = () if vol.channels is None else (int(vol.channels),)
        self.vol, self.dtype, self.shape = vol, vol.dtype, (*lead, *vol.shape)
        self.chunks = (*lead, *vol.chunks)
    def __getitem__(self, index: tuple) -> np.ndarray:
        lead = len(self.shape) - 3
        return self.vol[index[lead:]][index[:lead]] if lead else self.vol[index]

def as_volume(
    source: Any, # path, `Volume`, array (x, y, z) or (c, x, y, z), or chunked volume of the zarr pages
    spacing: float | Sequence[float] = 1.0, # voxel size of a plain array [mm]
    *,
    level: int | None = None, # resolution level of a pyramid; None: the finest that fits `most`
    most: int = 1024, # rows and columns of a screen
) -> Volume: # its voxels may still be on disk
    "Whatever is to be shown, as a volume"
    if isinstance(source, Volume): vol = source
    elif isinstance(source, (str, Path, os.PathLike)):
        if level is not None and format_of(source).name != "zarr":
            raise DataError(f"{source}: level {level} was asked for, only OME-Zarr images have levels")
        vol, k = read_volume(source, lazy=True, **({} if level is None else {"level": level})), level or 0
        while level is None and max(vol.shape) > most and k + 1 < vol.meta.get("levels", 1):
            k += 1
            vol = read_volume(source, lazy=True, level=k)
    elif hasattr(source, "channels") and hasattr(source, "chunks"):
        vol = Volume(_Whole(source), affine_from(source.spacing or 1.0, axes="zyx"),
                     "zyx" if source.channels is None else "czyx", {"path": getattr(source, "path", "volume")})
    else:
        data = source if hasattr(source, "shape") else np.asarray(source)
        if len(data.shape) not in (3, 4):
            raise DataError(f"a volume has 3 dimensions, or 4 with channels, got shape {tuple(data.shape)}")
        vol = Volume(data, affine_from(spacing), "cxyz"[-len(data.shape):])
    if 0 in vol.data.shape: raise DataError(f"the volume is empty, its shape is {tuple(vol.data.shape)}")
    if np.dtype(vol.dtype).kind not in "biuf": raise DataError(f"real numbers are needed, got {vol.dtype}")
    return vol

def on_grid(
    source: Any, # what is laid over, as for `as_volume`; a plain array must have the image's shape
    image: Volume, # below it
    order: int = 0, # 0 nearest (labels), 1 linear
    what: str = "overlay", # name for errors
    max_bytes: int = 2**31, # refuse to resample to more [byte]
) -> Volume: # voxel by voxel the place of `image`; whole numbers keep their type
    "Bring an overlay to the grid of its image; one on the same grid stays where it is, on disk perhaps"
    placed = isinstance(source, (str, Path, os.PathLike, Volume))
    vol = as_volume(source, most=max(image.shape)) # of a pyramid the level of the image
    if not placed:
        if vol.shape != image.shape:
            raise DataError(f"{what} has shape {vol.shape}, the volume {image.shape}. Is it of this volume?")
        return Volume(vol.data, image.affine, "c"*(vol.channels is not None) + image.spatial_axes, vol.meta)
    if vol.spatial_axes == image.spatial_axes and same_grid(vol, image, 0.1*min(image.spacing)): return vol
    for shape in (vol.shape, image.shape):
        check_budget((vol.channels or 1, *shape), np.float32 if order else vol.dtype, f"{what}, resampled", max_bytes)
    out = resample_to(to_axes(vol.load(), image.spatial_axes), image.affine, image.shape, order)
    whole = order and vol.dtype.kind in "iu" # scores in bytes: their number type says what is full
    return replace(out, data=np.rint(out.data).astype(vol.dtype)) if whole else out

# %% [markdown]
# ## Planes
# `Planes` reads. An array in memory gives a view. A store is read by whole rows of chunks across the axis, since a
# chunk is decoded as a whole anyway, and the latest rows are kept: of 64 slices one waits for the decoder. If a single
# row of chunks is more than may be kept, slices are read alone. Very large planes are thinned out after reading.

# %%
#| export
class Planes:
    "A volume as planes on a screen, of which only what is shown is read"
    def __init__(
        self,
        source: Any, # see `as_volume`
        *,
        convention: Convention = "auto", # see `screens`
        channel: int | None = 0, # of a volume that has several; None: all, in front of the plane
        most: int = 1024, # rows and columns at most
        cache_bytes: int = 2**28, # decoded rows of chunks that are kept [byte]
    ):
        self.vol = as_volume(source, most=most)
        n = self.vol.channels
        if n is not None and channel is not None and not 0 <= channel < n:
            raise DataError(f"channel {channel} was asked for, the volume has 0 to {n - 1}")
        self._lead = () if n is None else (slice(None) if channel is None else channel,)
        self.screens, self.most, self.cache_bytes = screens(self.vol, convention), most, cache_bytes
        self._read = reader_of(self.vol.data)
        self._each = self.vol.dtype.itemsize*(n if n is not None and channel is None else 1) # bytes a voxel
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]: return tuple(self.screens)

    def screen(
        self,
        name: str, # axial, coronal or sagittal; or an axis where shown as stored
    ) -> Screen: # its axes
        "How planes of a name lie"
        if name in self.screens: return self.screens[name]
        raise DataError(f"there is no plane {name!r}, there are {', '.join(self.screens)}")

    def count(
        self,
        name: str, # of the plane
    ) -> int: # slices
        "How many planes of a name there are"
        return self.vol.shape[self.screen(name).across]

    def _box(self, across: int, first: int, last: int) -> np.ndarray:
        box = tuple(slice(first, last) if k == across else slice(None) for k in range(3))
        with as_format_error(str(self.vol.meta.get("path", "volume")), "cannot be read"):
            return np.asarray(self._read((*self._lead, *box)))

    def _cut(self, across: int, k: int) -> np.ndarray:
        "Slice `k` across a stored axis, in stored order"
        chunks, n = getattr(self.vol.data, "chunks", None), self.vol.shape[across]
        high = min(chunks[across - 3], n) if chunks else 1
        row = high*self._each*int(np.prod(self.vol.shape, dtype=object))//n
        if isinstance(self.vol.data, np.ndarray) or row > self.cache_bytes:
            return self._box(across, k, k + 1).take(0, across - 3)
        key = across, k//high*high
        if key not in self._kept: self._kept[key] = self._box(across, key[1], min(key[1] + high, n))
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(a.nbytes for a in self._kept.values()) > self.cache_bytes:
            self._kept.popitem(last=False)
        return self._kept[key].take(k - key[1], across - 3)

    def step(
        self,
        name: str, # of the plane
    ) -> int: # voxels a pixel
        "How much planes of a name are thinned out"
        s = self.screen(name)
        return max(1, -(-max(self.vol.shape[s.rows], self.vol.shape[s.columns])//self.most))

    def plane(
        self,
        name: str, # which way to cut
        k: int, # where, along the stored axis [voxel]
    ) -> np.ndarray: # (row, column), or (c, row, column) if all channels were asked for
        "One plane as it lies on the screen"
        s, step = self.screen(name), self.step(name)
        if not 0 <= k < self.count(name): raise DataError(f"{name}: must be 0...{self.count(name) - 1}, got {k}")
        cut = self._cut(s.across, int(k))
        if s.rows > s.columns: cut = cut.swapaxes(-1, -2)
        return cut[..., ::-1 if s.up else 1, ::-1 if s.back else 1][..., ::step, ::step]

    def extent(
        self,
        name: str, # of the plane
    ) -> tuple[float, float]: # height and width [mm]
        "Physical size of planes of a name"
        s = self.screen(name)
        return tuple(self.vol.shape[a]*self.vol.spacing[a] for a in (s.rows, s.columns))

    def matrix(
        self,
        name: str, # of the plane
        k: int, # which plane
    ) -> np.ndarray: # (4, 4) of pixel (row, column, 0) -> stored index
        "Where the pixels of a plane are; times `vol.affine` from the left, in the world"
        s, step = self.screen(name), self.step(name)
        m = np.zeros((4, 4))
        m[3, 3] = m[s.across, 2] = 1
        m[s.across, 3] = k
        for axis, column, flip in ((s.rows, 0, s.up), (s.columns, 1, s.back)):
            m[axis, column], m[axis, 3] = (-step, self.vol.shape[axis] - 1) if flip else (step, 0)
        return m

    def pixel_of(
        self,
        name: str, # of the plane
        index: Sequence[float], # (3) stored index [voxel]
    ) -> tuple[float, float]: # row and column, fractional
        "Where on a plane a voxel is seen"
        return tuple(float(v) for v in to_index(self.matrix(name, 0), index)[:2])

    def limits(
        self,
        name: str | None = None, # plane that will be shown first
    ) -> tuple[float, float]: # black and white
        "Display range from the middle planes; of a store, which is slow, from that of one name only"
        seen = self.names if isinstance(self.vol.data, np.ndarray) else [name or self.names[0]]
        return window_limits(np.concatenate([self.plane(n, self.count(n)//2).ravel() for n in seen]))

# %%
scan = Planes(ct)
where = tuple(int(v) for v in np.argwhere(body.lbl == 3).mean(0))
pictures = [grey_bytes(scan.plane(n, where[scan.screen(n).across]), scan.limits()) for n in scan.names]
plot.montage(pictures, titles=scan.names)

# %% [markdown]
# A volume that is stored in any other orientation looks the same, and a pixel knows its voxel.

# %%
for codes in ("LPS", "ILA", "PSR"):
    turned = Planes(reorient(ct, codes))
    for n, picture in zip(scan.names, pictures):
        s = turned.screen(n)
        at = to_index(turned.vol.affine, to_world(ct.affine, where))
        assert np.array_equal(grey_bytes(turned.plane(n, round(at[s.across])), scan.limits()), picture)
        m = turned.vol.affine @ turned.matrix(n, round(at[s.across]))
        assert np.allclose(to_world(m, [*turned.pixel_of(n, at), 0]), to_world(ct.affine, where))

# %%
plain = Planes(Volume(body.img.transpose(2, 1, 0), affine_from(body.spacing[::-1], axes="zyx"), "zyx"))
assert plain.names == ("z", "y", "x") and np.array_equal(plain.plane("z", 5), body.img[:, :, 5].T)
coarse = Planes(ct, most=40)
m = coarse.matrix("axial", 3)
assert np.array_equal(coarse.plane("axial", 3), scan.plane("axial", 3)[::coarse.step("axial"), ::coarse.step("axial")])
assert coarse.plane("axial", 3)[5, 7] == body.img[tuple(int(v) for v in to_world(m, [5, 7, 0]))]
with raises(DataError, match="axial: must be 0"): scan.plane("axial", 10_000)
with raises(DataError, match="no plane 'oblique'"): scan.plane("oblique", 0)
with raises(DataError, match="Is it of this volume"): on_grid(np.zeros((2, 2, 2)), ct)

# %% [markdown]
# ## From a store
# Walking through 40 slices of a store decodes each chunk once.

# %%
class Spy:
    "An array on disk that writes down what is read"
    def __init__(self, a, chunks):
        self.a, self.shape, self.dtype, self.chunks, self.asked = a, a.shape, a.dtype, chunks, []
    def __getitem__(self, key):
        self.asked.append(key)
        return self.a[key]

spy = Spy(np.zeros((64, 300, 200), np.int16), (16, 64, 64))
far = Planes(Volume(spy, np.eye(4), "zyx"), cache_bytes=2**23)
for k in range(40): far.plane("z", k)
[(key[0].start, key[0].stop) for key in spy.asked]

# %%
assert [key[0].start for key in spy.asked] == [0, 16, 32]
small = Planes(Volume(spy, np.eye(4), "zyx"), cache_bytes=2**16)
small.plane("z", 7)
assert spy.asked[-1][0] == slice(7, 8) and not small._kept

# %% [markdown]
# ## Layers
# An image with what is laid over it, ready to be drawn.

# %%
#| export
@dataclass(frozen=True)
class Layer:
    "Something laid over a volume"
    planes: Planes # on the grid of the image
    paint: Paint # what its voxels look like

def layer(
    source: Any, # path, volume, array or chunked volume; see `on_grid`
    image: Planes, # below it
    kind: Literal["auto", "labels", "heat"] | Paint = "auto", # auto: integers are labels, fractions a score
    what: str = "overlay", # name for errors
) -> Layer: # with the same planes as the image
    "What is laid over an image"
    if not callable(kind) and kind not in ("auto", "labels", "heat"):
        raise DataError(f"{what}: 'labels', 'heat', 'auto' or a function is needed, got {kind!r}")
    vol = on_grid(source, image.vol, 1 if kind == "heat" else 0, what)
    planes = Planes(vol, channel=None if callable(kind) else 0, most=image.most, cache_bytes=image.cache_bytes)
    planes.screens = image.screens
    if kind == "auto":
        name = planes.names[0]
        middle = planes.plane(name, planes.count(name)//2)
        kind = "heat" if middle.dtype.kind == "f" and not np.array_equal(middle, np.rint(middle)) else "labels"
    paint = kind if callable(kind) else {"labels": label_paint, "heat": heat_paint}[kind]
    return Layer(planes, paint)

def draw(
    image: Planes, # below
    name: str, # which way to cut
    k: int, # where [voxel]
    limits: tuple[float, float], # shown as black and white
    layers: Sequence[Layer] = (), # above, in this order
    opacity: float = 0.5, # of the layers, [0, 1]
) -> np.ndarray: # (row, column, 3) uint8
    "One plane with its layers"
    rgb = grey_bytes(image.plane(name, k), limits)
    for part in layers: rgb = blend(rgb, *part.paint(part.planes.plane(name, k)), opacity)
    return np.repeat(rgb[..., None], 3, -1) if rgb.ndim == 2 else rgb

# %%
labels = layer(reorient(Volume(body.lbl, ct.affine), "LAS"), scan)
views = [draw(scan, n, where[scan.screen(n).across], (-160, 300), [labels]) for n in scan.names]
plot.montage(views, titles=scan.names)

# %% [markdown]
# How long does a slice take? Here a plane of 512 x 512 with labels, from a zarr store of 24 slices, in milliseconds of
# processor time: the first has to decode its chunks, those after it only have to be drawn.

# %%
wide = np.add.outer(np.arange(24), np.add.outer(np.arange(512), np.arange(512))).astype(np.int16)
with tmpdir() as d:
    write_volume(Volume(wide, np.eye(4), "zyx"), d/"wide.zarr")
    image = Planes(d/"wide.zarr")
    over, spent = layer((wide//100).astype(np.uint8), image), []
    for k in range(8, 16):
        start = time.process_time()
        encode_png(draw(image, "z", k, (0, 1000), [over]))
        spent.append(round(1e3*(time.process_time() - start), 1))
spent
