# %% [markdown]
# # Points from supervoxels
#
# > Clicks to train interactive segmentation with: on organs, and on objects that nobody has annotated.
#
# A network that segments whatever is clicked must learn two things which annotations do not teach. A click may mean
# something that has no class, such as a muscle in a data set of organs. And a click may correct: this piece belongs
# to it, that piece does not. Supervoxels stand in for both. They follow visible borders, so one of them in the
# unlabelled background is an object to be clicked at, and one that overlaps an organ is a piece to take away or to add.
# VISTA3D is trained that way (He et al., *VISTA3D: A Unified Segmentation Foundation Model For 3D Medical Imaging*,
# CVPR 2025); probabilities and sizes below are the published ones.
#
# This page takes a label patch and its supervoxels, as the loader yields them, and returns points together with a
# changed copy of the labels, in which every point's object can be looked up. Two errors of the original sampler are
# known: the id 0, which means *outside*, was offered as an object, and a search over connected components left out
# the last one, so an organ with a single piece beside it never grew.

# %%
#| default_exp sv_points

# %%
#| export
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from pydantic import Field, model_validator

from medvol_nb.config import Config
from medvol_nb.core import DataError, rng_for

# %%
import tempfile
import time
from collections import Counter
from pathlib import Path

from skimage.segmentation import slic

from medvol_nb import phantoms, plot
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.core import close, raises
from medvol_nb.datalists import DataList
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.labels import LabelSpace
from medvol_nb.loader import LoaderSettings, collate_patches, training_dataset
from medvol_nb.torchcore import Batches
from medvol_nb.volume import write_volume

# %% [markdown]
# ## A patch and its supervoxels
# An abdomen at 8 mm and pieces of similar intensity; 0 is outside the body. The pieces come from scikit-image and are
# cruder than those of page 22, which on so simple a phantom follow the organs so well that there is nothing to take
# away. In voxels they are smaller than real ones, so the sizes that this page asks for are scaled down, too.

# %%
body = phantoms.abdomen((48, 36, 42), seed=1)

def pieces(img): return slic(np.clip(img, -200, 300)/500, 150, compactness=0.03, mask=img > -300, channel_axis=None)

sv = pieces(body.img)
plot.planes(body.img, sv, body.spacing, at=(30, 17, 25), limits=(-160, 300), title=f"{sv.max()} pieces")

# %% [markdown]
# ## Settings
# Six classes of ten are prompted regularly: points inside, label unchanged. The other four modes share the rest. Sizes
# are in voxels of the patch, which was 128³ at 1.5 mm: 8,000 voxels are 27 mL. Classes that are parts of others, such
# as tumours and vessels in an organ, are always prompted regularly, and their points carry labels of their own.

# %%
#| export
POINT_LABELS = (0, 1) # label of a point outside and of a point inside its object
SPECIAL_LABELS = (2, 3) # likewise, for special classes
PADDING = -1 # label of what only fills up an array of points

class PointSettings(Config):
    "How prompts are drawn"
    organ_sub: float = Field(0.1, ge=0, le=1) # odds that a supervoxel is taken from the organ; what remains is regular
    organ_add: float = Field(0.1, ge=0, le=1) # odds that a supervoxel is added to the organ
    zeroshot_unseen: float = Field(0.1, ge=0, le=1) # odds of an unlabelled supervoxel
    zeroshot_random: float = Field(0.1, ge=0, le=1) # odds of a supervoxel, labelled or not
    sub_part: float = Field(0.5, ge=0, le=1) # organ_sub: odds that the part becomes an object
    sub_rest: float = Field(0.25, ge=0, le=1) # organ_sub: odds that the rest becomes one; else the part is deleted
    add_zeroshot: float = Field(0.5, ge=0, le=1) # organ_add: odds that the grown organ becomes an object without class
    part_range: tuple[float, float] = (0.1, 0.9) # smallest and largest part to take [share of the organ]
    add_share: float = Field(0.1, ge=0) # smallest part to add [share of the organ]
    merge_share: float = Field(0.1, ge=0, le=1) # structures join an object that covers more of them [share]
    min_voxels: int = Field(20**3, ge=1) # smallest object without class [voxel]
    positives: int = Field(3, ge=1) # points inside an object, at most
    negatives: int = Field(0, ge=0) # points outside, at most; organ_sub always makes one
    margin: int = Field(10, ge=0) # distance of points from the border of the patch [voxel]
    id_shift: int = Field(512, ge=2) # an object without class gets the id of the class it was drawn for plus this
    special_ids: tuple[int, ...] = (23, 24, 25, 26, 27, 57, 128) # classes that are always prompted regularly
    ignore: int = Field(255, ge=1) # label of voxels that do not count

    @model_validator(mode="after")
    def _consistent(self) -> "PointSettings":
        if sum(self.odds().values()) > 1 + 1e-9: raise ValueError("the odds of the four modes sum to more than 1")
        if self.sub_part + self.sub_rest > 1 + 1e-9: raise ValueError("sub_part + sub_rest is more than 1")
        if not 0 <= self.part_range[0] <= self.part_range[1] <= 1: raise ValueError("part_range: 0 <= low <= high <= 1")
        if self.id_shift <= self.ignore: raise ValueError("id_shift must be larger than ignore")
        return self

    def odds(self) -> dict[str, float]: # mode -> probability
        "The modes that use supervoxels"
        return {m: getattr(self, m) for m in ("organ_sub", "organ_add", "zeroshot_unseen", "zeroshot_random")}

# %%
small = PointSettings(min_voxels=150, margin=2)
small.odds()

# %%
with raises(ValueError, match="sum to more than 1"): PointSettings(organ_sub=0.8)
with raises(ValueError, match="id_shift must be larger than ignore"): PointSettings(id_shift=200)

# %% [markdown]
# ## What chance decides
# All chance is in the draw: the mode of each class, its outcome, and a number that names the streams for the order of
# candidates and the places of points. The draw of a class depends on the generator and the class id, not on which other
# classes are in the patch. The generator may be NumPy's or torch's.

# %%
#| export
@dataclass(frozen=True)
class PointDraw:
    "What chance decided for one class, before any voxel is looked at"
    class_id: int # of the label map
    mode: str = "regular" # or organ_sub, organ_add, zeroshot_unseen, zeroshot_random
    outcome: str = "" # organ_sub: "part", "rest" or "deleted"; organ_add: "organ" or "zeroshot"
    seed: int = 0 # names the streams for the order of candidates and the places of points

def _word(rng: Any) -> int:
    "One number from a generator of NumPy or torch"
    if isinstance(rng, np.random.Generator): return int(rng.integers(2**63 - 1))
    import torch
    if isinstance(rng, torch.Generator): return int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device))
    raise DataError(f"rng: a generator of NumPy or torch is needed, such as from rng_for, got {type(rng).__name__}")

def _class_ids(values: Iterable[int], cfg: PointSettings) -> list[int]:
    "Ids that can get a prompt, each once"
    ids = [int(k) for k in values]
    if len(set(ids)) < len(ids) or any(not 0 < k < cfg.id_shift or k == cfg.ignore for k in ids):
        raise DataError(f"class ids: different numbers 1...{cfg.id_shift - 1} without {cfg.ignore} (ignore) are "
                        f"needed, got {ids}")
    return ids

def _drawn(k: int, word: int, cfg: PointSettings) -> PointDraw:
    "The draw for one class"
    rng = rng_for(word, "points", k)
    (mode, second), seed = rng.random(2), int(rng.integers(2**63 - 1))
    name = next((m for m, end in zip(cfg.odds(), np.cumsum(list(cfg.odds().values()))) if mode < end), "regular")
    if k in cfg.special_ids: name = "regular"
    outcome = ""
    if name == "organ_sub":
        outcome = "part" if second < cfg.sub_part else "rest" if second < cfg.sub_part + cfg.sub_rest else "deleted"
    if name == "organ_add": outcome = "zeroshot" if second < cfg.add_zeroshot else "organ"
    return PointDraw(k, name, outcome, seed)

def draw_modes(
    class_ids: Iterable[int], # classes that get a prompt, each once
    rng: Any, # generator of NumPy or torch, the source of all randomness
    settings: PointSettings | None = None, # odds; default: the published ones
) -> tuple[PointDraw, ...]: # one a class, in the order given
    "Draw how each class is prompted"
    cfg = settings or PointSettings()
    ids, word = _class_ids(class_ids, cfg), _word(rng)
    return tuple(_drawn(k, word, cfg) for k in ids)

# %%
draws = draw_modes(range(1, 9), rng_for(4, "patch"))
[(d.class_id, d.mode, d.outcome) for d in draws]

# %%
many = [d for k in range(300) for d in draw_modes(range(1, 21), rng_for(0, k))]
shares = {m: n/len(many) for m, n in Counter(d.mode for d in many).items()}
sub = Counter(d.outcome for d in many if d.mode == "organ_sub")
assert close([shares[m] for m in ("regular", *small.odds())], [0.6, 0.1, 0.1, 0.1, 0.1], 0.02)
assert close(np.array([sub[o] for o in ("part", "rest", "deleted")])/sub.total(), [0.5, 0.25, 0.25], 0.06)
plot.bars({m: 100*v for m, v in shares.items()}, "% of 6,000 draws")

# %%
assert draws[2:3] == draw_modes([3], rng_for(4, "patch"))
assert draw_modes([5], torch_rng_for(1)) == draw_modes([5], torch_rng_for(1)) != draw_modes([5], torch_rng_for(2))
assert all(d.mode == "regular" for k in range(100) for d in draw_modes(small.special_ids, rng_for(k)))

# %%
with raises(DataError, match="different numbers 1...511 without 255 .*got \\[0, 3\\]"): draw_modes([0, 3], rng_for(0))
with raises(DataError, match="a generator of NumPy or torch is needed"): draw_modes([3], 17)

# %% [markdown]
# ## Pieces worth clicking at
# A supervoxel cut by an organ's border leaves crumbs and thin shells. *Opening* removes them: whatever is not at least
# three voxels thick in each direction disappears, the rest keeps its shape; of it, the largest component counts. A box
# of 3³ is the same along each axis in turn, and only the box around the piece is looked at. The border of
# the patch does not erode, since the object goes on behind it.

# %%
#| export
Box = tuple[slice, ...]

def _spread(mask: np.ndarray, combine: Callable) -> np.ndarray:
    "Erode (`np.logical_and`) or grow (`np.logical_or`) by one voxel in each direction, corners included"
    for axis in range(mask.ndim):
        out = mask.copy()
        a, b = np.moveaxis(mask, axis, 0), np.moveaxis(out, axis, 0)
        combine(b[1:], a[:-1], out=b[1:])
        combine(b[:-1], a[1:], out=b[:-1])
        mask = out
    return mask

def _cropped(mask: np.ndarray) -> tuple[Box, np.ndarray]:
    "The box around a mask, one voxel wider where the patch goes on, and the mask in it"
    box = []
    for axis in range(3):
        there = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (there[0], there[-1] + 1) if len(there) else (0, 0)
        box.append(slice(max(int(low) - 1, 0), int(high) + 1))
    return tuple(box), mask[tuple(box)]

def _opened(mask: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
    "Largest component after opening; with `near`: of those whose core reaches it"
    parts, n = cc3d.connected_components(_spread(mask, np.logical_and), connectivity=26, return_N=True)
    sizes = np.bincount(parts.ravel(), minlength=n + 1)
    if near is not None: sizes[np.setdiff1d(np.arange(n + 1), parts[near])] = 0
    sizes[0] = 0
    return _spread(parts == sizes.argmax(), np.logical_or) if sizes.any() else np.zeros_like(mask)

# %%
liver = body.lbl == 1
most = np.bincount(sv[liver]).argmax()
box, piece = _cropped((sv == most) & liver)
kept, z = _opened(piece), piece.shape[2]//2
plot.montage([p[:, :, z] for p in (piece, _spread(piece, np.logical_and), kept)], titles=["part", "eroded", "opened"])

# %%
bar = np.zeros((9, 9, 9), bool)
bar[1:4, 1:8, 1:8] = bar[4:, 4, 4] = True
assert _opened(bar).sum() == 3*7*7 and not _opened(bar[:, :, 4:5] & bar[4]).any()
assert _spread(np.ones((3, 4, 5), bool), np.logical_and).all() and not _opened(bar[4:6, 4:6, 1:2]).any()

# %% [markdown]
# ## The patch
# `PointPatch` holds the copy of the labels that prompts change one after the other, and the ids that are taken: classes
# with a prompt, and objects made for earlier ones. A later prompt leaves these alone, so a point once made stays
# right.
#
# Points come from the eroded object, away from the border of the patch.

# %%
#| export
def _map(values: Any, what: str) -> np.ndarray:
    "A label map (x, y, z) from an array or tensor, which may have one channel"
    arr = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if arr.dtype.kind not in "iu": raise DataError(f"{what}: whole numbers are needed, got {arr.dtype}")
    if arr.ndim == 4 and arr.shape[0] == 1: arr = arr[0]
    if arr.ndim != 3 or not arr.size: raise DataError(f"{what}: (x, y, z) or (1, x, y, z) is needed, got {arr.shape}")
    if arr.min() < 0: raise DataError(f"{what}: ids must be >= 0, got {arr.min()}. Was it stored in a type too small?")
    return arr

def _labels(values: Any, cfg: PointSettings) -> np.ndarray:
    "A label map whose ids leave room for those of objects without a class"
    lbl = _map(values, "label")
    if lbl.max() >= cfg.id_shift:
        raise DataError(f"label: ids must be below id_shift ({cfg.id_shift}), got {lbl.max()}. Ids from there on name "
                        "objects without a class; choose a larger id_shift")
    return lbl

class PointPatch:
    "A label map that prompts may change, with its supervoxels and the ids that are taken"
    def __init__(
        self,
        lbl: Any, # array or tensor (x, y, z) or (1, x, y, z), integer labels; not changed
        label_sv: Any, # array or tensor alike, supervoxel ids, 0 is outside; None: there are none
        class_ids: Iterable[int], # classes that get a prompt
        settings: PointSettings | None = None, # sizes; default: the published ones
    ):
        self.settings = settings or PointSettings()
        self.taken = set(_class_ids(class_ids, self.settings))
        self.lbl = _labels(lbl, self.settings).astype(np.int32)
        self.sv = np.zeros_like(self.lbl) if label_sv is None else _map(label_sv, "label_sv")
        if self.sv.shape != self.lbl.shape:
            raise DataError(f"label_sv: shape {self.sv.shape}, the label has {self.lbl.shape}")

    def candidates(
        self,
        region: np.ndarray, # (x, y, z) bool
        least: float, # fewest voxels in the region [voxel]
        rng: np.random.Generator, # for their order
    ) -> list[int]: # supervoxel ids, never 0
        "Supervoxels with enough voxels in a region, in random order"
        ids, counts = np.unique(self.sv[region], return_counts=True)
        return rng.permutation(ids[(ids > 0) & (counts >= least)]).tolist()

    def pick(
        self,
        box: tuple[slice, ...], # place of the mask in the patch
        mask: np.ndarray, # (x, y, z) bool, in the box
        n: int, # number of points, at most
        rng: np.random.Generator, # for their places
        *,
        anywhere: bool = False, # True: if there is none, take any voxel of the mask
    ) -> np.ndarray: # (m, 3) int64 voxels of the patch, m <= n, no two alike
        "Points in the eroded mask, away from the border of the patch"
        margin, size = self.settings.margin, self.lbl.shape
        inner = tuple(slice(max(margin - b.start, 0), max(s - margin - b.start, 0)) for b, s in zip(box, size))
        shift = [b.start + i.start for b, i in zip(box, inner)]
        core = _spread(mask, np.logical_and)[inner]
        found = np.flatnonzero(core)
        if not len(found) and anywhere: core, shift, found = mask, [b.start for b in box], np.flatnonzero(mask)
        found = rng.choice(found, min(n, len(found)), replace=False) if len(found) else found
        return np.stack(np.unravel_index(found, core.shape), axis=1).astype(np.int64) + np.array(shift)

# %%
patch = PointPatch(body.lbl, sv, [1], small)
possible = patch.pick(*_cropped(liver), liver.size, rng_for(0))
shaded = liver.astype(np.uint8)
shaded[tuple(possible.T)] = 2
plot.planes(body.img, shaded, body.spacing, limits=(-160, 300), title="where points in the liver can lie")

# %%
assert liver[tuple(possible.T)].all() and (possible >= 2).all() and (possible < np.array(liver.shape) - 2).all()
assert len(np.unique(possible, axis=0)) == len(possible) and len(patch.pick(*_cropped(liver), 3, rng_for(0))) == 3
corner = np.zeros_like(liver)
corner[:2, :2, :2] = True
assert len(patch.pick(*_cropped(corner), 3, rng_for(0))) == 0
assert len(patch.pick(*_cropped(corner), 3, rng_for(0), anywhere=True)) == 3

# %%
with raises(DataError, match="shape \\(48, 36, 41\\), the label has"): PointPatch(body.lbl, sv[..., 1:], [1])
with raises(DataError, match="ids must be below id_shift \\(512\\), got "): PointPatch(sv + 600, sv, [1])
with raises(DataError, match="label_sv: ids must be >= 0, got -31536"):
    PointPatch(body.lbl, np.full(sv.shape, 34000).astype(np.int16), [1])

# %% [markdown]
# ## Regular prompts
# A prompt names its class, what was done, the id of its object in the changed labels (`target`), and its points. Points
# with label 1 lie in the target, those with label 0 do not. An organ too thin to be eroded, or too close to the border
# of the patch, gets its points anywhere inside.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Prompt:
    "Points for one object"
    class_id: int # class that it was drawn for
    mode: str # what was done; also "regular" where nothing else was possible
    target: int # id of the object in the changed labels
    points: np.ndarray # (n, 3) int64 voxels of the patch
    point_labels: np.ndarray # (n,) int64, see `POINT_LABELS` and `SPECIAL_LABELS`

def _prompt(patch: PointPatch, ask: PointDraw, mode: str, target: int, positive: Sequence[np.ndarray],
            rng: np.random.Generator, negative: np.ndarray | None = None) -> Prompt:
    "Put points together; negatives that were asked for come from anywhere outside the target"
    cfg = patch.settings
    if negative is None and cfg.negatives:
        outside = (patch.lbl != target) & (patch.lbl != cfg.ignore)
        negative = patch.pick(tuple(slice(0, n) for n in outside.shape), outside, cfg.negatives, rng)
    if negative is None: negative = np.zeros((0, 3), np.int64)
    outer, inner = SPECIAL_LABELS if ask.class_id in cfg.special_ids else POINT_LABELS
    points = np.concatenate([*positive, negative])
    labels = np.where(np.arange(len(points)) < len(points) - len(negative), inner, outer)
    patch.taken.add(target)
    return Prompt(ask.class_id, mode, target, points, labels.astype(np.int64))

def regular(
    patch: PointPatch, # labels and supervoxels
    ask: PointDraw, # class, seed
) -> Prompt: # always possible
    "Points in the organ; the labels stay as they are"
    rng = rng_for(ask.seed, "points")
    positive = patch.pick(*_cropped(patch.lbl == ask.class_id), patch.settings.positives, rng, anywhere=True)
    return _prompt(patch, ask, "regular", ask.class_id, [positive], rng)

# %%
aorta = regular(PointPatch(body.lbl, sv, [4], small), PointDraw(4))
body.names[4], aorta.points.tolist(), aorta.point_labels.tolist()

# %%
assert (body.lbl[tuple(aorta.points.T)] == 4).all() and aorta.target == 4
tumour = regular(PointPatch(np.where(corner, 24, 0), None, [24], small), PointDraw(24))
assert tumour.point_labels.tolist() == [3, 3, 3] and corner[tuple(tumour.points.T)].all()

# %% [markdown]
# ## Taking a part away
# A supervoxel that holds 10 to 90 % of an organ splits it in *part* and *rest*. In half of the draws the part becomes
# an object without class (its id is the class id plus 512), in a quarter the rest does, and in a quarter the part is
# deleted from the labels. A negative point on the other side says where the object ends.

# %%
#| export
def organ_sub(
    patch: PointPatch, # labels and supervoxels; the labels change
    ask: PointDraw, # class, outcome, seed
) -> Prompt | None: # None: no supervoxel fits
    "Split an organ by a supervoxel, with a negative point on the other side"
    cfg, rng = patch.settings, rng_for(ask.seed, "points")
    organ = patch.lbl == ask.class_id
    low, high = (share*organ.sum() for share in cfg.part_range)
    candidates = patch.candidates(organ, low, rng)
    box, organ = _cropped(organ)
    for s in candidates:
        part = _opened((patch.sv[box] == s) & organ)
        if not low <= part.sum() <= high: continue
        rest = organ & ~part
        chosen, other = (part, rest) if ask.outcome == "part" else (rest, part)
        positive = patch.pick(box, chosen, cfg.positives, rng)
        negative = patch.pick(box, other, max(1, cfg.negatives), rng)
        if not (len(positive) and len(negative)): continue
        target = ask.class_id + (0 if ask.outcome == "deleted" else cfg.id_shift)
        if ask.outcome == "deleted": patch.lbl[box][other] = 0
        else: patch.lbl[box][chosen] = target
        return _prompt(patch, ask, "organ_sub", target, [positive], rng, negative)
    return None

# %%
def example(mode, k, outcome="", seed=0):
    made = PointPatch(body.lbl, sv, [k], small)
    return made, mode(made, PointDraw(k, mode.__name__, outcome, seed))

def shown(title, *examples):
    images, lbls = [], []
    for made, prompt in examples:
        picture, z = np.where(made.lbl == prompt.target, 2, body.lbl == prompt.class_id), prompt.points[-1][2]
        for (x, y, _), inside in zip(prompt.points, prompt.point_labels): picture[x, y, z] = 3 if inside else 5
        images.append(np.rot90(body.img[:, :, z])[:, ::-1])
        lbls.append(np.rot90(picture[:, :, z])[:, ::-1])
    return plot.montage(images, lbls=lbls, limits=(-160, 300), title=title)

shown("liver: part is the target; rest is the target; part is deleted",
      *(example(organ_sub, 1, outcome) for outcome in ("part", "rest", "deleted")))

# %%
for outcome, change in {"part": 513, "rest": 513, "deleted": 0}.items():
    made, prompt = example(organ_sub, 1, outcome)
    changed = made.lbl != body.lbl
    assert liver[changed].all() and (made.lbl[changed] == change).all()
    assert 0.1 <= (liver & (changed ^ (outcome == "rest"))).sum()/liver.sum() <= 0.9
    inside = made.lbl[tuple(prompt.points.T)] == prompt.target
    assert inside.tolist() == [True, True, True, False] == prompt.point_labels.astype(bool).tolist()

# %%
assert organ_sub(PointPatch(body.lbl, body.lbl, [1], small), PointDraw(1, "organ_sub", "part")) is None

# %% [markdown]
# ## Adding a part
# A supervoxel that reaches into the organ may hold a part that is not labelled. If that part touches the organ and is
# at least a tenth of its size, it joins; points lie on both. In half of the draws the grown organ becomes an object
# without class. Of several parts, the largest that touches counts. There may well be only one, and it counts, too.

# %%
#| export
def organ_add(
    patch: PointPatch, # labels and supervoxels; the labels change
    ask: PointDraw, # class, outcome, seed
) -> Prompt | None: # None: no supervoxel fits
    "Grow an organ by the unlabelled part of a supervoxel"
    cfg, rng = patch.settings, rng_for(ask.seed, "points")
    organ = patch.lbl == ask.class_id
    least, here = cfg.add_share*organ.sum(), _cropped(organ)
    for s in patch.candidates(organ, 1, rng):
        box, region = _cropped((patch.sv == s) & (patch.lbl == 0))
        if not region.any() or region.sum() < least: continue
        part = _opened(region, _spread(_spread(organ[box], np.logical_or), np.logical_or))
        added = patch.pick(box, part, (cfg.positives + 1)//2, rng)
        if part.sum() < least or not len(added): continue
        kept = patch.pick(*here, cfg.positives - len(added), rng, anywhere=True)
        target = ask.class_id + (cfg.id_shift if ask.outcome == "zeroshot" else 0)
        patch.lbl[box][part] = target
        patch.lbl[organ] = target
        return _prompt(patch, ask, "organ_add", target, [kept, added], rng)
    return None

# %%
shown("organs, grown by a supervoxel", *(example(organ_add, k, "organ") for k in (1, 2, 6)))

# %%
for outcome, target in {"organ": 1, "zeroshot": 513}.items():
    made, prompt = example(organ_add, 1, outcome)
    grown = (made.lbl == target) & ~liver
    assert prompt.target == target and (made.lbl[liver] == target).all() and (body.lbl[grown] == 0).all()
    assert grown.sum() >= 0.1*liver.sum() and np.array_equal(made.lbl[~grown & ~liver], body.lbl[~grown & ~liver])
    assert sorted(grown[tuple(prompt.points.T)].tolist()) == [False, True, True]

# %% [markdown]
# ## Objects without a class
# *Unseen* objects are supervoxels in the background. *Random* ones may overlap structures that have a label but no
# prompt in this patch; a structure that is covered by more than a tenth joins as a whole and gets a point of its own,
# as far as points and thickness allow. Neither shares voxels with a class that has a prompt. The class that it was
# drawn for stays in the labels as it is; its prompt now asks for something else.

# %%
#| export
def _zeroshot(patch: PointPatch, ask: PointDraw, mode: str, region: np.ndarray) -> Prompt | None:
    "Make an object of a supervoxel in a region, and of the structures it covers"
    cfg, rng, target = patch.settings, rng_for(ask.seed, "points"), ask.class_id + patch.settings.id_shift
    for s in patch.candidates(region, cfg.min_voxels, rng):
        box, part = _cropped((patch.sv == s) & region)
        part, lbl = _opened(part), patch.lbl[box]
        ids, counts = np.unique(lbl[part], return_counts=True)
        if counts.sum() < cfg.min_voxels or patch.taken & set(ids.tolist()): continue
        covered = [k for k, n in zip(ids.tolist(), counts) if k and n > cfg.merge_share*(patch.lbl == k).sum()]
        covered = rng.permutation(np.array(covered, np.int64)).tolist()
        shares = [len(range(i, cfg.positives, len(covered) + 1)) for i in range(len(covered) + 1)]
        positive = [patch.pick(box, part & (lbl == k), n, rng) for k, n in zip([0, *covered], shares)]
        if not len(positive[0]): continue
        for k in covered: patch.lbl[patch.lbl == k] = target
        lbl[part] = target
        return _prompt(patch, ask, mode, target, positive, rng)
    return None

def zeroshot_unseen(
    patch: PointPatch, # labels and supervoxels; the labels change
    ask: PointDraw, # class, seed
) -> Prompt | None: # None: no supervoxel fits
    "Make an object of a supervoxel in the background"
    return _zeroshot(patch, ask, "zeroshot_unseen", patch.lbl == 0)

def zeroshot_random(
    patch: PointPatch, # labels and supervoxels; the labels change
    ask: PointDraw, # class, seed
) -> Prompt | None: # None: no supervoxel fits
    "Make an object of a supervoxel and the structures without a prompt that it covers"
    return _zeroshot(patch, ask, "zeroshot_random", patch.lbl != patch.settings.ignore)

# %%
shown("drawn for the ribs: two unseen objects, a random one, and one that took the vertebrae along",
      *(example(zeroshot_unseen, 8, seed=k) for k in (0, 2)), *(example(zeroshot_random, 8, seed=k) for k in (0, 5)))

# %%
for mode, seed, made_of in ((zeroshot_unseen, 0, {0}), (zeroshot_random, 5, {0, 6})):
    made, prompt = example(mode, 8, seed=seed)
    target = made.lbl == 520
    assert prompt.target == 520 and set(body.lbl[target].tolist()) == made_of and target.sum() >= small.min_voxels
    assert target[tuple(prompt.points.T)].all() and not target[sv == 0].any()
    assert set(body.lbl[tuple(prompt.points.T)].tolist()) == made_of
    assert np.array_equal(made.lbl[~target], body.lbl[~target])

# %% [markdown]
# Outside the body every supervoxel id is 0, and that is no object, even where there is nothing else:

# %%
assert zeroshot_unseen(PointPatch(body.lbl, np.zeros_like(sv), [1], small), PointDraw(1, "zeroshot_unseen")) is None
assert 0 not in PointPatch(body.lbl, sv, [1], small).candidates(body.lbl >= 0, 1, rng_for(0)) and (sv == 0).any()

# %% [markdown]
# ## The sampler
# `SupervoxelPointSampler` draws, then applies: class after class, and regularly where a mode finds no candidate.
# The result holds the changed labels and the prompts. As arrays they have the form in which promptable networks take
# them: as many points for each prompt, filled up with label −1.

# %%
#| export
_MODES = {f.__name__: f for f in (regular, organ_sub, organ_add, zeroshot_unseen, zeroshot_random)}

@dataclass(frozen=True, eq=False)
class PointSample:
    "Prompts of one patch, and the labels that they ask for"
    lbl: np.ndarray # (x, y, z) int32 copy of the labels, or (1, x, y, z) where these came so
    prompts: tuple[Prompt, ...] # one a class

    def arrays(self) -> dict[str, np.ndarray]: # points (b, n, 3), point_labels (b, n), targets, class_ids (b,)
        "The prompts as arrays; short ones are filled up with zeros whose label is `PADDING`"
        b, n = len(self.prompts), max((len(p.points) for p in self.prompts), default=0)
        points, labels = np.zeros((b, n, 3), np.int64), np.full((b, n), PADDING, np.int64)
        for i, p in enumerate(self.prompts):
            points[i, :len(p.points)], labels[i, :len(p.points)] = p.points, p.point_labels
        targets, class_ids = np.array([(p.target, p.class_id) for p in self.prompts], np.int64).reshape(b, 2).T
        return {"points": points, "point_labels": labels, "targets": targets, "class_ids": class_ids}

class SupervoxelPointSampler:
    "Prompts for label patches with supervoxels"
    def __init__(
        self,
        settings: PointSettings | None = None, # odds and sizes; default: the published ones
    ):
        self.settings = settings or PointSettings()

    def classes(
        self,
        lbl: Any, # array or tensor (x, y, z) or (1, x, y, z), integer labels
    ) -> list[int]: # ascending
        "Classes in a patch that can get a prompt"
        present = np.bincount(_labels(lbl, self.settings).ravel().astype(np.int32))
        return [int(k) for k in np.flatnonzero(present) if k not in (0, self.settings.ignore)]

    def draw(
        self,
        class_ids: Iterable[int], # classes that get a prompt, each once
        rng: Any, # generator of NumPy or torch, the source of all randomness
    ) -> tuple[PointDraw, ...]: # one a class
        "What chance decides, without a look at the patch"
        return draw_modes(class_ids, rng, self.settings)

    def apply(
        self,
        lbl: Any, # array or tensor (x, y, z) or (1, x, y, z), integer labels; not changed
        label_sv: Any, # array or tensor alike, supervoxel ids, 0 is outside; None: there are none
        draws: Sequence[PointDraw], # from `draw`; they act in this order
    ) -> PointSample: # the same for the same draws
        "Make the prompts"
        patch, prompts = PointPatch(lbl, label_sv, [d.class_id for d in draws], self.settings), []
        for ask in draws:
            if ask.mode not in _MODES: raise DataError(f"mode: one of {', '.join(_MODES)} is needed, got {ask.mode!r}")
            if not (patch.lbl == ask.class_id).any(): raise DataError(f"class {ask.class_id} is not in the patch")
            prompts.append(_MODES[ask.mode](patch, ask) or regular(patch, ask))
        return PointSample(patch.lbl.reshape(np.shape(lbl)), tuple(prompts))

    def __call__(
        self,
        lbl: Any, # array or tensor (x, y, z) or (1, x, y, z), integer labels; not changed
        label_sv: Any, # array or tensor alike, supervoxel ids, 0 is outside; None: there are none
        rng: Any, # generator of NumPy or torch, the source of all randomness
        classes: Collection[int] | None = None, # classes that may get a prompt; None: all in the patch
    ) -> PointSample: # one prompt for each such class in the patch
        "Draw and make the prompts"
        ids = [k for k in self.classes(lbl) if classes is None or k in classes]
        return self.apply(lbl, label_sv, self.draw(ids, rng))

# %%
sampler = SupervoxelPointSampler(small)
sample = sampler(body.lbl, sv, rng_for(9, "patch"))
[(body.names[p.class_id], p.mode, p.target, len(p.points)) for p in sample.prompts]

# %%
eager = SupervoxelPointSampler(small.model_copy(update={m: 0.25 for m in small.odds()} | {"negatives": 2}))
samples = [eager(body.lbl, sv, rng_for(0, k)) for k in range(10)]
plot.planes(body.img, np.where(samples[0].lbl > 512, samples[0].lbl - 500, samples[0].lbl), body.spacing,
            at=(30, 17, 25), limits=(-160, 300), title="labels changed by a sampler that uses supervoxels for all")

# %%
def right(sample):
    return all((sample.lbl.squeeze()[tuple(p.points.T)] == p.target).tolist() == [k in (1, 3) for k in p.point_labels]
               for p in sample.prompts)

assert right(sample) and all(right(s) for s in samples)
Counter(p.mode for s in samples for p in s.prompts)

# %%
again = sampler(body.lbl, sv, rng_for(9, "patch"))
assert np.array_equal(sample.lbl, again.lbl)
assert all(np.array_equal(v, again.arrays()[k]) for k, v in sample.arrays().items())
no_sv = sampler(body.lbl[None], None, torch_rng_for(0))
assert np.array_equal(no_sv.lbl, body.lbl[None]) and {p.mode for p in no_sv.prompts} == {"regular"}
assert sampler(np.zeros((4, 4, 4), int), None, rng_for(0)).arrays()["points"].shape == (0, 0, 3)

# %%
with raises(DataError, match="class 77 is not in the patch"): sampler.apply(body.lbl, sv, [PointDraw(77)])
with raises(DataError, match="class ids: .* got \\[0\\]"): sampler.apply(body.lbl, sv, [PointDraw(0)])
with raises(DataError, match="mode: one of regular, organ_sub, .* got 'organ_mul'"):
    sampler.apply(body.lbl, sv, [PointDraw(1, "organ_mul")])
with raises(DataError, match="label: whole numbers are needed, got float64"): sampler(body.lbl/2, sv, rng_for(0))

# %% [markdown]
# ## Batches of the loader
# In the published training supervoxels act on the pseudo label where one is used, because that one knows all organs;
# what it leaves out is truly something else. On a true label they act only in six data sets, which are labelled as
# completely. All other labels are prompted regularly. `batch_prompts` follows that rule for what the loader yields,
# be it the patches of one case or a collated batch.

# %%
#| export
COMPLETE_SETS = ("TotalSegmentatorV2", "Covid19", "NLST", "LIDC", "StonyBrook-CT", "TCIA_Colon")

def batch_prompts(
    sampler: SupervoxelPointSampler, # with its settings
    batch: Mapping[str, Any], # label, pseudo_label, label_sv (b, 1, x, y, z), `has_...` flags and dataset_name
    rng: Any, # generator of NumPy or torch, the source of all randomness
    sets: Collection[str] = COMPLETE_SETS, # data sets where supervoxels act on the true label
) -> list[dict[str, PointSample]]: # one a patch: "label" and "pseudo_label", as far as there is one
    "Prompts for all patches of a batch"
    word, out = _word(rng), []
    def of(key: str, i: int, default: Any = False) -> Any:
        value = batch.get(key, default)
        return value if isinstance(value, (bool, np.bool_, str)) else value[i]
    for i in range(len(batch["label"])):
        pseudo = bool(of("has_pseudo_label", i))
        acts = "pseudo_label" if pseudo else "label" if of("dataset_name", i, "") in sets else None
        out.append({key: sampler(batch[key][i], batch["label_sv"][i] if key == acts and of("has_label_sv", i) else None,
                                 rng_for(word, i, key))
                    for key in ("label", "pseudo_label") if of(f"has_{key}", i)})
    return out

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)

def write_case(name, seed):
    made, item = phantoms.abdomen((48, 36, 42), seed=seed), {}
    for key, data in {"image": made.img, "label": made.lbl, "label_sv": pieces(made.img)}.items():
        item[key] = f"{name}_{key}.nii.gz"
        write_volume(Volume(data.astype(np.int16), affine_from(made.spacing)), root/item[key])
    return item

own = {name.replace("urinary ", ""): k for k, name in body.names.items() if name not in ("ribs", "vertebrae")}
lists = [DataList(n, (write_case(n, k),), label_dict=own) for k, n in enumerate(("AMOS22", "TotalSegmentatorV2"))]
settings = LoaderSettings(patch_size=(32, 32, 32), spacing=None, margin=2, augment=False)
space = LabelSpace.shipped()
data = training_dataset(lists, {d.name: root for d in lists}, space, settings=settings)
(_, batch), = Batches(data, 2, seed=1, collate=collate_patches).epoch(0)
place.cleanup()
prompted = batch_prompts(eager, batch, rng_for(1))
[(name, [p.mode for p in s["label"].prompts]) for name, s in zip(batch["dataset_name"], prompted)]

# %%
for name, lbl, made in zip(batch["dataset_name"], batch["label"], prompted):
    assert right(made["label"]) and list(made) == ["label"] and made["label"].lbl.shape == (1, 32, 32, 32)
    assert name == "TotalSegmentatorV2" or np.array_equal(made["label"].lbl, lbl)

# %% [markdown]
# ## Time
# A patch of 128³ with 13 organs, each of them with supervoxels, takes a fraction of a second on one core: masks are
# looked at in their boxes, and supervoxels that are too small not at all. It belongs into the loading processes.

# %%
large = phantoms.random_body(128, seed=3)
organs = np.where(large.lbl > 1, large.lbl, 0)
blocks = np.where(large.lbl > 0, np.ravel_multi_index(np.indices((128,)*3)//26, (5,)*3) + 1, 0)
busy = SupervoxelPointSampler(PointSettings(**{m: 0.25 for m in small.odds()}))
begin = time.perf_counter()
done = busy(organs, blocks, rng_for(2))
seconds = time.perf_counter() - begin
f"{seconds:.2f} s", Counter(p.mode for p in done.prompts)

# %%
assert right(done) and len(done.prompts) == len(large.names) - 1
