# %% [markdown]
# # From stored labels to targets
#
# > Values, validity masks and dilation of label patches, the same as if the whole volume had been decoded at once.
#
# A label array is a file that somebody wrote for another purpose: a mask of 0 and 1, or of 0 and 255, probabilities in
# 8 bits, class numbers with 255 for "don't know", normals in 16 bits. The reference divides every `uint8` by 255, so a
# mask of 0 and 1 becomes a target of 0.0039, on which a network trains to nothing without any sign of it. Its
# background normals are vectors of length 1.7, and its value to be ignored is read from the settings and forgotten.
#
# On this page a stored patch becomes two things: the target's values, and the mask of voxels at which a loss may look.
# What needs a neighbourhood, dilation and "near an annotation", is computed with a margin of that size and cropped, so
# a patch does not show where it was cut.

# %%
#| default_exp zarrnet.decode

# %%
#| export
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medvol_nb.core import DataError, log
from medvol_nb.zarrnet.config import Target
from medvol_nb.zarrnet.geometry import decode_normals
from medvol_nb.zarrnet.io import ChunkedVolume

# %%
from scipy.ndimage import distance_transform_edt

from medvol_nb import phantoms, plot
from medvol_nb.core import raises, rng_for
from medvol_nb.zarrnet.config import TrainParams
from medvol_nb.zarrnet.geometry import encode_normals
from medvol_nb.zarrnet.io import open_volume

# %% [markdown]
# ## What the numbers mean
# It is decided once for an array, from its type and a sample of its values, and written to the log. `label_scale` is
# `auto`, `probability` or a factor:
#
# | kind | `auto` | `probability` | a factor |
# |---|---|---|---|
# | binary | more than 0 is 1 | divided by the type's largest value | times the factor, in [0, 1] |
# | multiclass | class numbers | – | – |
# | normals | by type, see [geometry](53_zarrnet_geometry.ipynb) | – | – |
# | regression | as stored | divided by the type's largest value | times the factor |
#
# Floating point types have no largest value: their probabilities are taken as they are.
#
# The sample catches what the type cannot tell: classes that the network has no channel for, probabilities above one,
# "normals" that no writer of normals can have written.

# %%
#| export
@dataclass(frozen=True)
class LabelRule:
    "How the stored numbers of one label array become a target"
    name: str # target and place, for messages
    target: Target # with everything filled in, see `ZarrConfig.targets`
    factor: float | None = None # multiplies stored values; None: more than 0 is 1, or values are codes

    @property
    def halo(self) -> int: # [voxel]
        "Margin that must be read around a patch"
        t = self.target
        region = t.label_region_radius if t.loss_only_on_label and t.kind in ("binary", "multiclass") else 0
        return math.ceil(max(t.dilate_label or 0, region))

def label_rule(
    name: str, # target and place, for messages
    target: Target, # with everything filled in
    dtype: np.dtype, # of the stored array
    sample: np.ndarray | None = None, # array of stored values, some patch of it
) -> LabelRule: # for all patches of the array
    "Decide how a label array is decoded"
    dtype, scale, factor = np.dtype(dtype), target.label_scale, None
    if dtype.kind not in "biuf": raise DataError(f"{name}: labels must be numbers, got {dtype}")
    if target.kind in ("multiclass", "normals"):
        if scale != "auto": raise DataError(f"{name}: label_scale {scale!r} does not apply to {target.kind}")
    elif scale == "probability": factor = 1/np.iinfo(dtype).max if dtype.kind in "iu" else 1.0
    elif scale != "auto": factor = float(scale)
    elif target.kind == "regression": factor = 1.0
    rule = LabelRule(name, target, factor)
    how = {"multiclass": "class numbers", "normals": f"unit vectors in {dtype}"}.get(
        target.kind, "more than 0 is 1" if factor is None else f"times {factor:.6g}")
    top = None
    if sample is not None and sample.size:
        real = sample[~_ignored(sample, target.ignore_label)]
        top = real.max() if real.size else None
        if real.size: _suspicious(rule, real)
    log.info("%s: %s, %s%s", name, dtype, how, "" if top is None else f" (largest value of a sample: {top})")
    return rule

def _suspicious(rule: LabelRule, values: np.ndarray) -> None:
    "Refuse or report values that cannot be meant"
    t, kind = rule.target, rule.target.kind
    if kind == "normals" and values.dtype == np.uint16 and 0 < values.max() <= 255:
        raise DataError(f"{rule.name}: normals in uint16 with no value above 255 look like normals in uint8. "
                        "Store them as uint8, or as rint((n + 1)*32767.5)")
    if kind == "normals" and values.dtype.kind == "f" and np.nanmax(np.abs(values)) > 1.5:
        raise DataError(f"{rule.name}: float normals must lie in -1...1, got {np.nanmax(np.abs(values)):g}")
    if kind == "multiclass": _check_classes(rule, values)
    if kind == "binary" and t.label_scale == "probability" and values.dtype.kind == "f" and np.nanmax(values) > 1:
        raise DataError(f"{rule.name}: probabilities lie in 0...1, got {np.nanmax(values):g}")
    if kind == "binary" and t.label_scale == "auto" and len(np.unique(values[::max(1, values.size//4096)])) > 2:
        log.warning("%s: holds more than two values; all above 0 count as 1. If they are probabilities, set "
                    "label_scale: probability", rule.name)

# %%
training = TrainParams(dilate_label=False)
def resolved(name, **settings): return Target(**settings).resolved(name, training)
sheet = resolved("sheet", channels=1)
cases = [("uint8", "auto"), ("uint8", "probability"), ("uint16", "probability"), ("float32", 0.5)]
[(*c, label_rule("sheet", sheet.model_copy(update={"label_scale": c[1]}), np.dtype(c[0])).factor) for c in cases]

# %% [markdown]
# ## Values and validity
# A voxel is *valid* if its raw value is not the one to be ignored. This is decided before anything else happens to the
# number. NaN may be that value. With several channels, one ignored channel spoils a voxel; of normals all three must
# have the value, since 255 in one channel may be a direction.

# %%
#| export
def _ignored(raw: np.ndarray, ignore: float | None) -> np.ndarray:
    if ignore is None: return np.zeros(raw.shape, bool)
    return np.isnan(raw) if isinstance(ignore, float) and math.isnan(ignore) else raw == ignore

def label_mask(
    raw: np.ndarray, # (c, z, y, x) as stored
    target: Target, # its ignore_label and kind
) -> np.ndarray: # (1, z, y, x) bool, False where nothing is known
    "Where a stored label counts"
    bad = _ignored(raw, target.ignore_label)
    return ~(bad.all(0, keepdims=True) if target.kind == "normals" else bad.any(0, keepdims=True))

def _check_classes(rule: LabelRule, values: np.ndarray) -> None:
    n = rule.target.channels
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        raise DataError(f"{rule.name}: classes must be whole numbers, got {values[values != np.rint(values)][0]:g}")
    if values.size and not 0 <= values.min() <= values.max() < n:
        bad = values.max() if values.max() >= n else values.min()
        raise DataError(f"{rule.name}: class {bad:g}, but channels is {n} (classes 0 to {n - 1}). Set channels, or "
                        f"ignore_label: {bad:g} if it means unknown")

def decode_label(
    raw: np.ndarray, # (c, z, y, x) or (z, y, x) as stored
    rule: LabelRule, # from `label_rule`
) -> tuple[np.ndarray, np.ndarray]: # target (c, z, y, x) float32, classes (1, z, y, x) int64; valid (1, z, y, x) bool
    "Values and validity of a stored patch; what is not valid is 0"
    t, raw = rule.target, raw[None] if raw.ndim == 3 else raw
    expected = 1 if t.kind == "multiclass" else t.channels
    if raw.ndim != 4 or len(raw) != expected:
        raise DataError(f"{rule.name}: need {expected} channels, got an array of {raw.shape}")
    valid = label_mask(raw, t)
    if not valid.all(): raw = np.where(valid, raw, raw.dtype.type(0))
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        raise DataError(f"{rule.name}: holds NaN or infinite values. If NaN means unknown, set ignore_label: nan")
    if t.kind == "normals": return decode_normals(raw), valid
    if t.kind == "multiclass":
        _check_classes(rule, raw)
        return raw.astype(np.int64), valid
    if rule.factor is None: return (raw > 0).astype(np.float32), valid
    out = raw.astype(np.float32)*np.float32(rule.factor)
    return (np.clip(out, 0, 1) if t.kind == "binary" else out), valid

# %%
stored = np.array([0, 1, 128, 255], np.uint8).reshape(1, 1, 1, 4)
{name: [v.ravel().tolist() for v in decode_label(stored, label_rule(name, t, stored.dtype))] for name, t in {
    "mask": sheet, "mask, 255 unknown": sheet.model_copy(update={"ignore_label": 255}),
    "probability": sheet.model_copy(update={"label_scale": "probability"}),
    "depth": resolved("depth", channels=1, kind="regression", label_scale=0.5)}.items()}

# %%
unknown = resolved("depth", channels=1, kind="regression", ignore_label=float("nan"))
value, valid = decode_label(np.array([[[0.5, np.nan]]], np.float32), label_rule("depth", unknown, np.float32))
assert value.ravel().tolist() == [0.5, 0] and valid.ravel().tolist() == [True, False]
tissue = resolved("tissue", channels=3, activation="softmax", ignore_label=255)
assert decode_label(np.array([[[0, 2, 255]]]), label_rule("tissue", tissue, np.uint8))[0].dtype == np.int64

# %%
with raises(DataError, match="class 3, but channels is 3 .* ignore_label: 3 if it means unknown"):
    decode_label(np.array([[[0, 3]]]), label_rule("tissue", tissue, np.int64))
with raises(DataError, match="look like normals in uint8"):
    label_rule("n", resolved("normals", channels=3), np.uint16, np.full((3, 1, 1, 1), 128, np.uint16))
with raises(DataError, match="If NaN means unknown, set ignore_label: nan"):
    decode_label(np.array([[[np.nan]]]), label_rule("sheet", sheet, float))

# %% [markdown]
# ## Within a distance
# Two questions are about distance: is a voxel within $R$ of a label, and which label is the nearest? The squared
# distance is a sum over axes, so its minimum can be taken one axis after the other: along each, compare with the $2R$
# neighbours, $k$ steps away and $k^2$ dearer. In whole numbers this is exact, and for a small $R$ it is several times
# faster than a full distance transform. Carrying the voxel's index in the low digits of the number also tells *which*
# label was nearest, and settles ties by position, so that a patch and the whole volume never disagree.

# %%
#| export
def _spread(key: np.ndarray, radius: int, unit: int) -> np.ndarray:
    "Smallest of key + unit * squared distance over a cube of neighbours, axis by axis"
    for axis in range(3):
        out, lead = key.copy(), (slice(None),)*axis
        for k in range(1, min(radius, key.shape[axis] - 1) + 1):
            near, far, step = (*lead, slice(k, None)), (*lead, slice(None, -k)), key.dtype.type(unit*k*k)
            np.minimum(out[near], key[far] + step, out=out[near])
            np.minimum(out[far], key[near] + step, out=out[far])
        key = out
    return key

def within(
    mask: np.ndarray, # (z, y, x) bool
    radius: float, # [voxel]
) -> np.ndarray: # (z, y, x) bool
    "Voxels whose distance to the mask is at most `radius`"
    square = math.floor(radius*radius + 1e-9)
    if square == 0 or not mask.any(): return mask.copy()
    kind = np.uint16 if square < 2**14 else np.uint32
    return _spread(np.where(mask, kind(0), kind(square + 1)), math.floor(radius + 1e-9), 1) <= square

def dilate(
    label: np.ndarray, # (c, z, y, x) target, 0 background
    radius: float, # [voxel]
    valid: np.ndarray | None = None, # (1, z, y, x) bool; other voxels stay as they are
) -> np.ndarray: # (c, z, y, x) of the same type
    "Give background within `radius` the value of the nearest label; labels never overwrite each other"
    there = (label != 0).any(0)
    grow = within(there, radius) & ~there
    if valid is not None: grow &= valid[0]
    if not grow.any(): return label
    out = label.copy()
    if len(label) == 1 and (label[0][there] == label[0][there][0]).all():
        out[:, grow] = label[0][there][0]
        return out
    unit = there.size
    far = np.int64(unit*(math.floor(radius*radius) + 2))
    key = np.where(there, np.arange(unit).reshape(there.shape), far)
    nearest = _spread(key, math.floor(radius + 1e-9), unit)[grow] % unit
    out[:, grow] = label.reshape(len(label), -1)[:, nearest]
    return out

# %%
cells = np.zeros((1, 1, 60, 90), np.int64)
for k, (y, x) in enumerate(((15, 20), (35, 45), (20, 70)), 1): cells[0, 0, y - 4:y + 4, x - 6:x + 6] = k
unknown = np.ones((1, 1, 60, 90), bool)
unknown[..., 30:40, 70:] = False
plot.montage([v[0, 0] > 99 for v in (cells, cells, cells)], 3, ["classes", "within 12 voxels", "12, and unknown stays"],
             lbls=[cells[0, 0], dilate(cells, 12)[0, 0], dilate(cells, 12, unknown)[0, 0]])

# %%
speckled = rng_for(0, "specks").random((12, 20, 30)) > 0.995
for radius in (0, 1, 2**0.5, 3.7, 5):
    assert np.array_equal(within(speckled, radius), distance_transform_edt(~speckled) <= radius + 1e-9)
grown = dilate(cells, 12)
assert (grown[cells > 0] == cells[cells > 0]).all() and not dilate(cells, 12, unknown)[~unknown].any()

# %% [markdown]
# ## A patch of a target
# All of it together: read with the margin, decode, restrict, dilate, crop. The mask at the end is 1 where the voxel
# exists, is not to be ignored, and fits the kind: a vector can only be compared where there is one, and with
# `loss_only_on_label` a regression counts on labels only, a class within `label_region_radius` of an annotation. (On
# annotations alone, "everything is foreground" would be the best answer.)

# %%
#| export
def target_patch(
    label: ChunkedVolume, # stored labels
    rule: LabelRule, # from `label_rule`
    start: Sequence[int], # (z, y, x) first voxel, may lie outside
    size: Sequence[int], # (z, y, x) [voxel]
) -> tuple[np.ndarray, np.ndarray]: # target (c, z, y, x) float32 or int64; mask (1, z, y, x) uint8
    "Values of a target in a box, and where a loss may look"
    t, h = rule.target, rule.halo
    raw, box = label.read([s - h for s in start], [n + 2*h for n in size])
    value, valid = decode_label(raw, rule)
    exists = np.zeros(valid.shape, bool)
    exists[(0, *box)] = True
    valid &= exists
    mask, there = valid, (value != 0).any(0, keepdims=True)
    if t.loss_only_on_label and t.kind in ("binary", "multiclass"):
        mask = valid & within(there[0], t.label_region_radius)[None]
    if t.dilate_label:
        value = dilate(value, t.dilate_label, valid)
        there = (value != 0).any(0, keepdims=True)
    if t.kind == "normals" or (t.kind == "regression" and t.loss_only_on_label): mask = mask & there
    inner = (slice(None), *(slice(h, h + n) for n in size))
    return np.ascontiguousarray(value[inner]), np.ascontiguousarray(mask[inner], dtype=np.uint8)

# %%
roll = phantoms.sheets((32, 64, 64))
raw = {"sheet": roll.mask*200, "normals": encode_normals(roll.normals[::-1])}
raw["sheet"][:, :12, :12] = 255
volumes = {k: open_volume(v) for k, v in raw.items()}
wishes = {"as it is": {}, "255 unknown, R = 2": {"ignore_label": 255, "dilate_label": 2},
          "near labels": {"ignore_label": 255, "loss_only_on_label": True, "label_region_radius": 4}}
rules = {k: label_rule("sheet", resolved("sheet", channels=1, **w), np.uint8) for k, w in wishes.items()}
parts = {k: target_patch(volumes["sheet"], r, (8, -6, 4), (16, 48, 48)) for k, r in rules.items()}
plot.montage([v[0, 8] for v, _ in parts.values()] + [m[0, 8] for _, m in parts.values()], 3,
             [f"{k}: target" for k in parts] + ["mask"]*3, limits=(0, 1), width=5)

# %% [markdown]
# A patch is the crop of the whole: values and masks agree exactly, wherever it is cut.

# %%
for rule in rules.values():
    whole, ok = target_patch(volumes["sheet"], rule, (0, 0, 0), (32, 64, 64))
    value, mask = target_patch(volumes["sheet"], rule, (5, 9, 20), (16, 30, 40))
    assert np.array_equal(value, whole[:, 5:21, 9:39, 20:60]) and np.array_equal(mask, ok[:, 5:21, 9:39, 20:60])
vectors = label_rule("normals", resolved("normals", channels=3), np.uint16)
n, mask = target_patch(volumes["normals"], vectors, (0, 0, 0), (32, 64, 64))
assert np.array_equal(mask[0], roll.mask) and not n[:, roll.mask == 0].any()
