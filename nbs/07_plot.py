# %% [markdown]
# # Plot
#
# > Orthogonal planes, label overlays, montages, curves, bars and histograms, as figures that show themselves.
#
# Most mistakes in volume data are visible at a glance, if the picture is right: a flipped axis, a label one slice
# off, a window that hides the organ. And many pictures are wrong in small ways: voxels drawn square although slices
# are 5 mm apart, left and right not marked, a label that is red in one figure and green in the next because the
# colours were spread over the labels present. This page settles these points once. Every label id has one colour,
# always. Planes have their physical shape and their sides lettered. Nothing touches matplotlib's global state, so a
# figure can be made in a worker thread or a server, leaks nothing, and comes out as the same bytes every time.

# %%
#| default_exp plot

# %%
#| export
import functools
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medvol_nb.core import DataError, OnExists, atomic, check_output

if TYPE_CHECKING: from matplotlib.figure import Figure

# %%
import threading

from medvol_nb import phantoms
from medvol_nb.core import OutputExists, close, raises, tmpdir

# %% [markdown]
# ## One colour per label
# If colours are spread over the ids present, the liver changes colour when the spleen is missing. Here the colour is
# a function of the id alone. Hues go around the colour wheel in steps of the golden ratio, which never repeats and
# keeps neighbours far apart; saturation and brightness alternate with it. Id 0 is background, black in a colour table
# and transparent in an overlay. Negative ids, such as an ignore label of −1, are grey.

# %%
#| export
_GOLDEN = (5**0.5 - 1)/2
_SHADES = np.array([[0.85, 1.0], [0.9, 0.9], [0.55, 1.0], [1.0, 0.75], [1.0, 0.65]])

def _hsv_to_rgb(h: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    "Colour wheel to red, green, blue, for arrays in [0, 1]"
    k = (np.array([5.0, 3.0, 1.0]) + 6*h[..., None]) % 6
    return v[..., None]*(1 - s[..., None]*np.clip(np.minimum(k, 4 - k), 0, 1))

def label_colours(
    n_or_ids: int | Sequence[int] | np.ndarray, # n for the ids 0...n-1, or any array of integer ids
) -> np.ndarray: # (..., 3) float64 in [0, 1], one colour an id
    "Colours of label ids; an id has the same colour everywhere"
    if isinstance(n_or_ids, (int, np.integer)):
        if n_or_ids < 0: raise DataError(f"label_colours: the number of ids must be >= 0, got {n_or_ids}")
        n_or_ids = range(n_or_ids)
    ids = np.asarray(n_or_ids)
    if ids.size == 0: return np.zeros((*ids.shape, 3))
    if ids.dtype.kind not in "iub": raise DataError(f"label_colours: ids must be integers, got {ids.dtype}")
    ids = ids.astype(np.int64)
    s, v = np.moveaxis(_SHADES[(ids - 1) % len(_SHADES)], -1, 0)
    rgb = _hsv_to_rgb((0.02 + (ids - 1)*_GOLDEN) % 1, s, v)
    rgb[ids == 0] = 0
    rgb[ids < 0] = 0.5
    return rgb

# %%
label_colours(4).round(2)

# %%
assert (label_colours(5) == label_colours(200)[:5]).all() and (label_colours([7]) == label_colours(8)[7]).all()
table = label_colours(1000)
assert np.linalg.norm(np.diff(table[1:], axis=0), axis=1).min() > 0.9
assert (table[0] == 0).all() and (label_colours([-1]) == 0.5).all()

# %%
with raises(DataError, match="ids must be integers, got float64"): label_colours([0.5, 1.0])

# %% [markdown]
# ## What range to show
# One metal clip, and everything else is black. So the display range is taken from percentiles, of the finite values
# only. Two cases break the plain percentile: an image that is constant has no range, and one that is almost
# everywhere 0 has percentiles 0 and 0. The first gets a range of one unit above its value, the second its full range.

# %%
#| export
def window_limits(
    img: np.ndarray, # n-d, any numeric dtype; NaN and infinities do not count
    percentiles: tuple[float, float] = (0.5, 99.5), # lower and upper, 0...100
) -> tuple[float, float]: # (low, high), always finite and low < high
    "Display range that survives outliers, NaN and constant images"
    low, high = percentiles
    if not 0 <= low < high <= 100:
        raise DataError(f"window_limits: percentiles must rise within 0...100, got {percentiles!r}")
    flat = np.asarray(img).reshape(-1)
    if flat.dtype.kind not in "biuf": raise DataError(f"window_limits: needs numbers, got {flat.dtype}")
    flat = flat[::max(1, flat.size//2**20)].astype(np.float64)
    flat = flat[np.isfinite(flat)]
    if flat.size == 0: return 0.0, 1.0
    lo, hi = (float(v) for v in np.percentile(flat, (low, high)))
    if not lo < hi: lo, hi = float(flat.min()), float(flat.max())
    return (lo, hi) if lo < hi else (lo, lo + max(1.0, abs(lo)*1e-6))

# %%
ramp = np.linspace(0, 100, 1001)
clip = np.append(ramp, 1e6)
window_limits(ramp), window_limits(clip), window_limits(np.full(5, 3.0)), window_limits([np.nan])

# %%
assert window_limits(clip)[1] < 101 and window_limits(np.full(5, 3.0)) == (3, 4)
assert window_limits(np.eye(50)) == (0, 1) and window_limits([np.nan, np.inf]) == (0, 1)

# %% [markdown]
# ## Labels over grey
# The colour of each label is mixed into the grey image, with weight `alpha`. With `outline` only the rim of each
# region is drawn, in full strength, so that the image below can be judged.

# %%
#| export
def _grey(img: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    "`img` mapped to [0, 1] by its display range; NaN becomes 0"
    lo, hi = window_limits(img) if limits is None else limits
    if not (np.isfinite(lo) and np.isfinite(hi) and lo < hi):
        raise DataError(f"display limits must be finite and rise, got {limits!r}")
    with np.errstate(invalid="ignore", over="ignore"): grey = (np.asarray(img, np.float64) - lo)/(hi - lo)
    return np.clip(np.nan_to_num(grey, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)

def rim(
    lbl: np.ndarray, # (row, column) integer labels or bool
) -> np.ndarray: # (row, column) bool
    "Pixels of a label that touch another value above, below, left or right"
    found = np.zeros(lbl.shape, bool)
    for d in range(2):
        a, b = (tuple(slice(*s) if k == d else slice(None) for k in range(2)) for s in ((1, None), (None, -1)))
        change = lbl[a] != lbl[b]
        found[a] |= change
        found[b] |= change
    return found & (lbl != 0)

def overlay(
    grey2d: np.ndarray, # (row, column) intensities of any dtype
    lbl2d: np.ndarray, # (row, column) integer labels or bool, 0 is transparent
    alpha: float = 0.5, # weight of the colour, 0...1
    outline: bool = False, # draw the rims of regions only
    *,
    limits: tuple[float, float] | None = None, # display range of the intensities; default: `window_limits`
) -> np.ndarray: # (row, column, 3) float64 in [0, 1]
    "Grey picture with labels in their colours"
    grey2d, lbl2d = np.asarray(grey2d), np.asarray(lbl2d)
    if grey2d.ndim != 2: raise DataError(f"overlay: needs a 2-D image, got shape {grey2d.shape}")
    if grey2d.shape != lbl2d.shape:
        raise DataError(f"overlay: image {grey2d.shape} and labels {lbl2d.shape} differ in shape")
    if not 0 <= alpha <= 1: raise DataError(f"overlay: alpha must be 0...1, got {alpha!r}")
    colours = label_colours(lbl2d)
    weight = np.where(rim(lbl2d), 1.0, 0.0) if outline else np.where(lbl2d != 0, alpha, 0.0)
    return _grey(grey2d, limits)[..., None]*(1 - weight[..., None]) + colours*weight[..., None]

# %%
brain = phantoms.head()
grey, lbl = brain.img[:, :, 28].T, brain.lbl[:, :, 28].T
tinted, rims = overlay(grey, lbl), overlay(grey, lbl, outline=True)
tinted.shape, float(tinted.min()), float(tinted.max())

# %%
assert close(overlay(grey, lbl, alpha=0), overlay(grey, 0*lbl)) and np.ptp(overlay(grey, 0*lbl), axis=-1).max() == 0
assert close(overlay(grey, lbl, alpha=1)[lbl == 2], np.broadcast_to(label_colours([2]), (int((lbl == 2).sum()), 3)))
changed = (rims != overlay(grey, 0*lbl)).any(-1)
assert 0 < changed.sum() < (lbl > 0).sum()

# %%
with raises(DataError, match="differ in shape"): overlay(grey, lbl[1:])

# %% [markdown]
# ## Figures that show themselves
# `pyplot` keeps every figure in a global list until it is closed: memory grows with the number of figures, and
# threads disturb one another. The functions below make `matplotlib.figure.Figure` objects directly. A plain `Figure`
# shows nothing at the end of a cell unless pyplot is set up, so ours knows how to turn itself into a PNG. The PNG
# carries neither date nor version, so equal figures are equal bytes.

# %%
#| export
@functools.cache
def _picture_class() -> type:
    "The figure class, made at first use so that importing this module does not import matplotlib"
    from matplotlib.figure import Figure
    class Picture(Figure):
        "A matplotlib figure that a notebook displays without pyplot"
        def _repr_png_(self) -> bytes: return png_bytes(self)
    return Picture

def _picture(width: float, height: float, **kwargs) -> "Figure":
    "Empty figure of a size in inches"
    return _picture_class()(figsize=(width, height), dpi=100, facecolor="white", **kwargs)

def png_bytes(
    fig: "Figure", # any matplotlib figure; one that pyplot holds is closed there
    dpi: int = 120, # pixels per inch
) -> bytes: # a PNG file's content, without date or version
    "Picture of a figure; the same figure gives the same bytes"
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    if pyplot := sys.modules.get("matplotlib.pyplot"): pyplot.close(fig)
    return buffer.getvalue()

def save_figure(
    fig: "Figure", # any matplotlib figure
    path: str | os.PathLike, # file to write, ends in .png
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    dpi: int = 150, # pixels per inch
) -> Path: # `path`
    "Write a figure as a PNG file, atomically"
    path = Path(path)
    if path.suffix.lower() != ".png": raise DataError(f"save_figure: the name must end in .png, got {path.name!r}")
    if check_output(path, on_exists):
        with atomic(path, on_exists) as t: t.write_bytes(png_bytes(fig, dpi))
    return path

# %% [markdown]
# ## Three planes through a point
# Arrays are `(x, y, z)` in RAS+ order: indices grow towards the patient's right, front and head. On screen,
# radiologists look at the patient from the feet or from the front, so the patient's **right is on the left** of the
# picture; neurologists look from behind. Both habits are in use, which is why the sides are lettered and the habit is
# named below the planes. Sagittal planes face left in both.
#
# All three planes are drawn at one scale in millimetres. The point defaults to where the label has its largest
# cross-sections, so that the planes cut what matters, or to the middle without a label. Only the three planes are
# read from `img`, so a memory-mapped file or a zarr array of any size will do; looking for the label's largest
# sections reads the label once, a slab at a time, unless `at` is given.

# %%
#| export
_PLANES = (("sagittal", 1, 2), ("coronal", 0, 2), ("axial", 0, 1))

def _largest_sections(lbl: Any) -> tuple[int, int, int] | None:
    "Index of the plane with most labelled voxels along each axis, read slab by slab"
    counts = [np.zeros(n, np.int64) for n in lbl.shape]
    step = max(1, 2**24//max(1, lbl.shape[1]*lbl.shape[2]))
    for i in range(0, lbl.shape[0], step):
        slab = np.asarray(lbl[i:i + step]) != 0
        counts[0][i:i + step] = slab.sum((1, 2))
        counts[1] += slab.sum((0, 2))
        counts[2] += slab.sum((0, 1))
    return tuple(int(c.argmax()) for c in counts) if counts[0].any() else None

def _point(at: Sequence[int] | None, shape: tuple[int, ...], lbl: Any) -> tuple[int, ...]:
    "Checked voxel through which the planes go"
    if at is None: return (lbl is not None and _largest_sections(lbl)) or tuple(n//2 for n in shape)
    at = tuple(at)
    whole = len(at) == 3 and all(isinstance(i, (int, np.integer)) for i in at)
    if not whole or not all(0 <= i < n for i, n in zip(at, shape)):
        raise DataError(f"planes: at must be three indices inside {tuple(shape)}, got {at}")
    return tuple(int(i) for i in at)

def _checked(img: Any, lbl: Any, spacing: Sequence[float]) -> tuple[Any, Any, tuple[float, ...]]:
    "Volume, labels and voxel size that fit together"
    img = img if hasattr(img, "shape") else np.asarray(img)
    lbl = lbl if lbl is None or hasattr(lbl, "shape") else np.asarray(lbl)
    if len(img.shape) != 3:
        raise DataError(f"planes: needs a 3-D volume (x, y, z), got shape {tuple(img.shape)}. Pick a channel first")
    if 0 in img.shape: raise DataError(f"planes: the volume is empty, shape {tuple(img.shape)}")
    if lbl is not None and tuple(lbl.shape) != tuple(img.shape):
        raise DataError(f"planes: image {tuple(img.shape)} and labels {tuple(lbl.shape)} differ in shape")
    spacing = tuple(np.ravel(spacing).tolist())
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise DataError(f"planes: spacing must be three positive numbers [mm], got {spacing}")
    return img, lbl, spacing

# %%
#| export
def _plane(vol: Any, axis: int, index: int, flip: bool) -> np.ndarray:
    "One plane of `vol` as (row, column), superior or anterior on top; `flip` turns it left to right"
    cut = np.asarray(vol[tuple(index if k == axis else slice(None) for k in range(3))]).T[::-1]
    return cut[:, ::-1] if flip else cut

def _letter(ax, sides: str, size: float) -> None:
    "Letters at the left, right, top and bottom of a picture"
    from matplotlib.patheffects import withStroke
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
              (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    for (x, y, h, v), side in zip(places, sides):
        ax.text(x, y, side, transform=ax.transAxes, ha=h, va=v, size=size, color="yellow",
                path_effects=[withStroke(linewidth=1.5, foreground="black")])

def planes(
    img: Any, # (x, y, z) intensities in RAS+ order; NumPy, memory map, zarr or alike
    lbl: Any = None, # (x, y, z) integer labels, same shape
    spacing: Sequence[float] = (1.0, 1.0, 1.0), # (x, y, z) voxel size [mm]
    at: Sequence[int] | None = None, # (i, j, k) voxel; default: the label's largest sections, or the middle
    title: str = "", # above the planes
    *,
    limits: tuple[float, float] | None = None, # display range; default: percentiles of the three planes
    alpha: float = 0.45, # weight of label colours, 0...1
    outline: bool = False, # draw the rims of labels only
    convention: Literal["radiological", "neurological"] = "radiological", # patient's right on the left, or on the right
    codes: bool = True, # letter the sides and name the convention
    width: float = 7.0, # [inch]
) -> "Figure": # displays itself in a notebook
    "Sagittal, coronal and axial plane through one voxel, at one physical scale"
    img, lbl, spacing = _checked(img, lbl, spacing)
    if convention not in ("radiological", "neurological"):
        raise DataError(f"planes: convention must be 'radiological' or 'neurological', got {convention!r}")
    at = _point(at, img.shape, lbl)
    flips = (True, convention == "radiological", convention == "radiological")
    greys = [_plane(img, d, at[d], flip) for d, flip in enumerate(flips)]
    if limits is None: limits = window_limits(np.concatenate([g.ravel() for g in greys]))
    extent = [n*s for n, s in zip(img.shape, spacing)]
    gap, top, bottom = 0.06, 0.45 if title else 0.22, 0.2 if codes else 0.04
    wide, tall = sum(extent[h] for _, h, _ in _PLANES), max(extent[v] for _, _, v in _PLANES)
    scale = min((width - 4*gap)/wide, 6.0/tall)
    height = max(tall*scale, 0.4) + top + bottom
    fig, left = _picture(width, height), (width - 2*gap - wide*scale)/2
    for d, (name, h, v) in enumerate(_PLANES):
        w = extent[h]*scale
        ax = fig.add_axes((left/width, bottom/height, w/width, (height - top - bottom)/height))
        left += w + gap
        shown = _grey(greys[d], limits) if lbl is None else \
            overlay(greys[d], _plane(lbl, d, at[d], flips[d]), alpha, outline, limits=limits)
        ax.imshow(shown, cmap="gray", vmin=0, vmax=1, aspect=spacing[v]/spacing[h], interpolation="nearest")
        ax.set_axis_off()
        ax.set_title(f"{name} {'xyz'[d]}={at[d]}", fontsize=8, pad=3)
        across = {0: "RL" if flips[d] else "LR", 1: "AP" if flips[d] else "PA"}[h]
        if codes: _letter(ax, across + {1: "AP", 2: "SI"}[v], 8)
    if title: fig.suptitle(title, fontsize=9, y=1 - 0.03/height, va="top")
    if codes:
        note = f"{convention}: patient's right is on the {'left' if convention == 'radiological' else 'right'}"
        fig.text(0.5, 0.03/height, note, ha="center", va="bottom", fontsize=6.5)
    return fig

# %%
planes(brain.img, brain.lbl, brain.spacing, title="T1-like head with csf, grey and white matter")

# %% [markdown]
# The capsule on the patient's left temple appears on the right, where the letter says L; neurologically it appears on
# the left. A trunk keeps its shape although its slices are six times as thick as its voxels are wide.

# %%
capsule = np.unravel_index(brain.img.argmax(), brain.img.shape)
planes(brain.img, spacing=brain.spacing, at=capsule, title="through the capsule", convention="neurological")

# %%
thick = phantoms.abdomen((96, 72, 14))
planes(thick.img, thick.lbl, thick.spacing, outline=True, limits=(-160, 300), title="abdomen, 24 mm slices, outlines")

# %%
def drawn(fig, panel): return fig.axes[panel].images[0].get_array()

def shown_at(fig, panel): return np.unravel_index(drawn(fig, panel).argmax(), drawn(fig, panel).shape)[1]

right, left = planes(brain.img, at=capsule), planes(brain.img, at=capsule, convention="neurological")
assert shown_at(right, 2) > 40 and shown_at(left, 2) < 8

# %% [markdown]
# A lazy array is asked for three planes, and no more. The spy below writes down what is read.

# %%
class Spy:
    shape = (400, 500, 600)
    asked = []
    def __getitem__(self, key):
        self.asked.append(key)
        return np.zeros([n for n, k in zip(self.shape, key) if isinstance(k, slice)], np.int16)

planes(Spy(), at=(10, 20, 30))
assert [[k for k in key if not isinstance(k, slice)] for key in Spy.asked] == [[10], [20], [30]]

# %%
with raises(DataError, match="3-D volume"): planes(brain.img[None])
with raises(DataError, match="differ in shape"): planes(brain.img, brain.lbl[1:])
with raises(DataError, match="three positive numbers"): planes(brain.img, spacing=(1, 1))
with raises(DataError, match="three indices inside"): planes(brain.img, at=(0, 0, 48))

# %% [markdown]
# ## Montages
# Many small pictures side by side, drawn as they are stored: the first index is the row, 0 on top. `limits="shared"`
# gives all of them one grey scale, for pictures that are to be compared.

# %%
#| export
def montage(
    images2d: Sequence[np.ndarray], # each (row, column) intensities, or (row, column, 3) colours, uint8 or [0, 1]
    cols: int | None = None, # pictures a row; default: at most 6
    titles: Sequence[str] | None = None, # one a picture
    *,
    lbls: Sequence[np.ndarray] | None = None, # one (row, column) label map a picture
    limits: tuple[float, float] | Literal["shared"] | None = None, # grey range, one range for all, or each its own
    aspect: float = 1.0, # height of a pixel divided by its width
    alpha: float = 0.45, # weight of label colours, 0...1
    outline: bool = False, # draw the rims of labels only
    title: str = "", # above all
    width: float = 7.0, # [inch]
) -> "Figure": # displays itself in a notebook
    "Grid of pictures"
    pictures = [np.asarray(i) for i in images2d]
    if not pictures: raise DataError("montage: no pictures")
    for k, p in enumerate(pictures):
        if 0 in p.shape or not (p.ndim == 2 or (p.ndim == 3 and p.shape[2] == 3)):
            raise DataError(f"montage: picture {k} must be (row, column) or (row, column, 3), got shape {p.shape}")
    for what, given in (("titles", titles), ("lbls", lbls)):
        if given is not None and len(given) != len(pictures):
            raise DataError(f"montage: {len(given)} {what} for {len(pictures)} pictures")
    if cols is not None and cols < 1: raise DataError(f"montage: cols must be at least 1, got {cols!r}")
    cols = min(cols or 6, len(pictures))
    rows = -(-len(pictures)//cols)
    if isinstance(limits, str):
        if limits != "shared": raise DataError(f"montage: limits must be two numbers or 'shared', got {limits!r}")
        limits = window_limits(np.concatenate([p.ravel() for p in pictures if p.ndim == 2] or [np.zeros(1)]))
    tall = max(p.shape[0]*aspect/p.shape[1] for p in pictures)
    cell = width/cols
    height = rows*(cell*min(tall, 4) + (0.2 if titles is not None else 0.04)) + (0.3 if title else 0)
    fig = _picture(width, height, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for k, ax in enumerate(fig.subplots(rows, cols, squeeze=False).ravel()):
        ax.set_axis_off()
        if k >= len(pictures): continue
        p = pictures[k]
        if p.ndim == 2: p = _grey(p, limits) if lbls is None else overlay(p, lbls[k], alpha, outline, limits=limits)
        else: p = p if p.dtype == np.uint8 else np.clip(np.nan_to_num(p.astype(np.float64)), 0, 1)
        ax.imshow(p, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
        if titles is not None: ax.set_title(str(titles[k]), fontsize=8, pad=2)
    if title: fig.suptitle(title, fontsize=9)
    return fig

# %%
montage([phantoms.embryo_frame(p, 96) for p in range(16)], 8, phantoms.EMBRYO_PHASES, title="phases of an embryo")

# %%
swatches = [label_colours(np.arange(k, k + 12)).reshape(4, 3, 3) for k in (0, 12, 1000)]
montage([grey[::-1], tinted[::-1], rims[::-1], *swatches],
        titles=["grey", "tinted", "rims", "ids 0 to 11", "12 to 23", "1000 to 1011"])

# %%
assert len(montage([grey]*7, cols=3).axes) == 9
low, high = montage([np.eye(9), 9*np.eye(9)], limits="shared").axes
assert low.images[0].get_array().max() < 0.2 and high.images[0].get_array().max() == 1

# %%
with raises(DataError, match="2 titles for 1 pictures"): montage([grey], titles=["a", "b"])
with raises(DataError, match="picture 0 must be"): montage([brain.img])

# %% [markdown]
# ## Curves, bars and histograms
# Losses, class volumes and intensity distributions need no more than three kinds of chart. All take a dictionary from
# name to numbers, whose order is the order in the chart; a name keeps its colour by its place.

# %%
#| export
def _named(values: Any, what: str) -> dict[str, Any]:
    "A non-empty dictionary with string keys"
    if not isinstance(values, Mapping) or not values:
        raise DataError(f"{what}: needs a dictionary with at least one entry, got {values!r}")
    return {str(k): v for k, v in values.items()}

def _ink(k: int) -> np.ndarray:
    "Colour of a label, dark enough for a thin line on white"
    colour = label_colours([k])[0]
    return colour*min(1.0, 0.5/max(colour @ (0.3, 0.6, 0.1), 0.01))

def _chart(width: float, height: float, title: str, xlabel: str, ylabel: str) -> tuple["Figure", Any]:
    "Figure with one plain pair of axes"
    fig = _picture(width, height, layout="constrained")
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.set_ylabel(ylabel, fontsize=8)
    return fig, ax

def curves(
    series: Mapping[str, Any], # name -> (n,) values y, or a tuple of two (n,) arrays (x, y); NaN leaves a gap
    *,
    title: str = "", # above the chart
    xlabel: str = "", # with its unit
    ylabel: str = "", # with its unit
    logx: bool = False, # logarithmic horizontal axis
    logy: bool = False, # logarithmic vertical axis
    width: float = 6.0, # [inch]
    height: float = 2.8, # [inch]
) -> "Figure": # displays itself in a notebook
    "Lines over a common axis"
    fig, ax = _chart(width, height, title, xlabel, ylabel)
    for k, (name, line) in enumerate(_named(series, "curves").items(), 1):
        pair = isinstance(line, tuple) and len(line) == 2 and np.ndim(line[0]) == 1
        y = np.asarray(line[1] if pair else line, np.float64)
        x = np.asarray(line[0], np.float64) if pair else np.arange(y.size)
        if y.ndim != 1 or x.shape != y.shape:
            raise DataError(f"curves: {name!r} must be (n,) values or two of them (x, y), got {x.shape} and {y.shape}")
        ax.plot(x, y, color=_ink(k), lw=1.4, marker="o" if y.size < 2 else None, ms=3, label=name)
    if logx: ax.set_xscale("log", nonpositive="mask")
    if logy: ax.set_yscale("log", nonpositive="mask")
    ax.grid(alpha=0.25, lw=0.5)
    ax.legend(fontsize=7, frameon=False)
    return fig

# %%
steps = np.arange(1, 200)
decay = 2/np.sqrt(steps)
curves({"training": (steps, decay), "validation": (steps[::20], decay[::20] + 0.1)},
       title="a loss that falls", xlabel="step", logx=True)

# %%
assert [line.get_label() for line in curves({"a": [1, 2], "b": [2, np.nan, 3]}).axes[0].lines] == ["a", "b"]
with raises(DataError, match="'a' must be"): curves({"a": ([1, 2, 3], [1, 2])})
with raises(DataError, match="at least one entry"): curves({})

# %%
#| export
def bars(
    values: Mapping[str, float] | tuple[Sequence[str], Sequence[float]], # name -> value, or (names, values)
    unit: str = "", # of the values, such as "mL"
    *,
    title: str = "", # above the chart
    ids: Sequence[int] | None = None, # label id of each bar, for its colour; default: 1, 2, 3, ...
    log: bool = False, # logarithmic lengths; values <= 0 have no bar then
    width: float = 6.0, # [inch]
) -> "Figure": # displays itself in a notebook
    "Horizontal bars with their values, the first on top"
    if not isinstance(values, tuple): values = _named(values, "bars")
    names, numbers = values if isinstance(values, tuple) else (list(values), list(values.values()))
    names, numbers = [str(n) for n in names], np.asarray(numbers, np.float64)
    if not names or numbers.shape != (len(names),):
        raise DataError(f"bars: needs one number a name, got {len(names)} names and values of shape {numbers.shape}")
    if ids is not None and len(ids) != len(names): raise DataError(f"bars: {len(ids)} ids for {len(names)} bars")
    fig, ax = _chart(width, 0.6 + 0.2*len(names), title, unit, "")
    lengths = np.where(np.isfinite(numbers) & ((numbers > 0) | (not log)), numbers, np.nan)
    ids = range(1, len(names) + 1) if ids is None else ids
    ax.barh(np.arange(len(names)), lengths, color=label_colours(ids)*0.9)
    if log and np.isfinite(lengths).any(): ax.set_xscale("log")
    for k, value in enumerate(numbers):
        text = f"{value:,.4g}" if np.isfinite(value) else "n/a"
        if np.isfinite(lengths[k]):
            ax.annotate(text, (value, k), (3, 0), textcoords="offset points", va="center", size=7)
        else: ax.text(0.01, k, text, transform=ax.get_yaxis_transform(), va="center", size=7)
    ax.set_yticks(np.arange(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.margins(x=0.12)
    return fig

# %%
trunk = phantoms.abdomen()
volumes = np.bincount(trunk.lbl.ravel())[1:]*np.prod(trunk.spacing)/1000
bars((list(trunk.names.values()), volumes), "mL", title="class volumes of an abdomen", ids=list(trunk.names))

# %%
assert [bar.get_width() for bar in bars({"a": 3, "b": 5}).axes[0].patches] == [3, 5]
with raises(DataError, match="one number a name"): bars((["a", "b"], [1.0]))

# %%
#| export
def histograms(
    arrays: Mapping[str, np.ndarray], # name -> array of values, any shape; NaN and infinities do not count
    bins: int = 80, # number of intervals, common to all
    *,
    limits: tuple[float, float] | None = None, # range of the horizontal axis; default: smallest to largest value
    title: str = "", # above the chart
    xlabel: str = "", # with its unit
    log: bool = False, # logarithmic frequencies
    width: float = 6.0, # [inch]
    height: float = 2.8, # [inch]
) -> "Figure": # displays itself in a notebook
    "Distributions of values over common intervals, each with total 1"
    given = {k: np.asarray(v).ravel() for k, v in _named(arrays, "histograms").items()}
    for name, v in given.items():
        if v.dtype.kind not in "biuf": raise DataError(f"histograms: {name!r} must hold numbers, got {v.dtype}")
    finite = {k: v[np.isfinite(v)].astype(np.float64) for k, v in given.items()}
    filled = [v for v in finite.values() if v.size]
    if limits is None and filled: limits = min(v.min() for v in filled), max(v.max() for v in filled)
    limits = limits or (0.0, 1.0)
    edges = np.histogram_bin_edges(np.zeros(0), bins, limits)
    fig, ax = _chart(width, height, title, xlabel, "share of values")
    for k, (name, v) in enumerate(finite.items(), 1):
        share = np.histogram(v, edges)[0]/max(v.size, 1)
        lost = given[name].size - v.size
        colour = _ink(k)
        ax.stairs(share, edges, color=colour, lw=1.3, label=f"{name} ({lost:,} not finite)" if lost else name)
        ax.stairs(share, edges, color=colour, fill=True, alpha=0.12)
    if log and filled: ax.set_yscale("log", nonpositive="mask")
    ax.legend(fontsize=7, frameon=False)
    return fig

# %%
histograms({name: brain.img[brain.lbl == k] for k, name in brain.names.items()},
           title="T1-like intensities", xlabel="intensity")

# %%
parts = histograms({"a": [0, 0, 1, np.nan]}, bins=2).axes[0].patches
assert close(parts[0].get_data().values, [2/3, 1/3]) and "1 not finite" in parts[0].get_label()
with raises(DataError, match="must hold numbers"): histograms({"a": ["x"]})

# %% [markdown]
# ## Files and threads
# A figure is written like any other output of this library: never half, and never over something by accident. Two
# threads that draw at the same time get the bytes that one gets alone.

# %%
picture = planes(brain.img, brain.lbl, brain.spacing)
with tmpdir() as d:
    path = save_figure(picture, d/"head.png")
    head_bytes = path.read_bytes()
    with raises(OutputExists, match="--on-exists"): save_figure(picture, path)
    with raises(DataError, match="end in .png"): save_figure(picture, d/"head.jpg")
len(head_bytes)

# %%
results = []

def draw(): results.append(png_bytes(planes(brain.img, brain.lbl, brain.spacing)))

threads = [threading.Thread(target=draw) for _ in range(2)]
for t in threads: t.start()
for t in threads: t.join()
assert len(results) == 2 and set(results) == {png_bytes(picture)} == {picture._repr_png_()}
assert b"tEXt" not in head_bytes and b"tIME" not in head_bytes
