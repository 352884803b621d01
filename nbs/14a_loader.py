# %% [markdown]
# # Training patches from many data sets
#
# > From lists to batches: one grid, one label space, patches balanced over classes, the same for any number of workers.
#
# Twenty data sets come in different orientations, voxel sizes and label numbers; some cases have labels, some only the
# opinion of another network, some both. A training wants none of this. It wants patches of equal size in which rare
# classes occur, with labels that mean the same everywhere. This page is the way from the lists to such patches, in the
# order in which VISTA3D does it (He et al., *VISTA3D: A Unified Segmentation Foundation Model For 3D Medical Imaging*,
# CVPR 2025), and with what went wrong there put right: a case names itself when its file is damaged, labels on another
# grid are refused, and a draw depends on the seed, the epoch and the case, not on who draws.
#
# The first half, up to the padded volume, is deterministic and uses the geometry
# and intensity pages of this library. The second half is random. It executes the transforms that the lists
# carry, which are MONAI's.

# %%
#| default_exp loader

# %%
#| export
import contextlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medvol_nb.analyze import dataset_weights
from medvol_nb.config import Config
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, close
from medvol_nb.datalists import DataList, read_datalist
from medvol_nb.geometry import Volume, corner_displacement, crop, reorient, resample, to_axes, to_world
from medvol_nb.grid import centred_start, random_starts, take_patch
from medvol_nb.intensity import Normalizer
from medvol_nb.labels import LabelSpace, relabel
from medvol_nb.loading import _divided, _parsed, materialise, published_transform
from medvol_nb.volume import read_volume

# %%
import tempfile
import time
from pathlib import Path

from medvol_nb import phantoms, plot
from medvol_nb.core import raises, rng_for
from medvol_nb.geometry import affine_from
from medvol_nb.loading import located_items
from medvol_nb.torchcore import Batches
from medvol_nb.volume import write_volume

# %% [markdown]
# ## Two data sets to learn from
# The first has labels of four organs in its own numbers and was written in LPS orientation, as scanners do. The second
# has no labels; its pseudo labels are in global numbers. Both were made from the same kind of phantom.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
own = {"liver": 6, "spleen": 1, "right kidney": 2, "aorta": 8}

def write_case(name, seed):
    body = phantoms.abdomen((48, 36, 42), seed=seed)
    space, folder = LabelSpace.shipped(), root/name
    for sub in ("images", "labels", "pseudo", "sv"): (folder/sub).mkdir(parents=True, exist_ok=True)
    names = {k: n.replace("urinary ", "") for k, n in body.names.items()}
    local = np.choose(body.lbl, [0, *(own.get(names[k], 0) for k in sorted(names))]).astype(np.uint8)
    known = np.choose(body.lbl, [0, *(space.resolve(names[k]) or 0 for k in sorted(names))]).astype(np.uint8)
    parts = {"images": body.img, "labels": local, "pseudo": known, "sv": (body.img//200 + 9).astype(np.int32)}
    for sub, data in parts.items():
        vol = reorient(Volume(data, affine_from(body.spacing, (-180, -140, 20))), "LPS" if sub == "images" else "RAS")
        write_volume(vol, folder/sub/f"{seed}.nii.gz")
    return {"image": f"images/{seed}.nii.gz", "label": f"labels/{seed}.nii.gz", "pseudo_label": f"pseudo/{seed}.nii.gz",
            "label_sv": f"sv/{seed}.nii.gz"}

hospital = DataList("AMOS22", tuple({**write_case("AMOS22", k), "fold": k, "pseudo_label_reliability": k % 2}
                                    for k in range(3)), label_dict={k: n for n, k in own.items()})
archive = DataList("NLST", tuple({k: v for k, v in write_case("NLST", s).items() if k != "label"} for s in (7, 8)))
space = LabelSpace.shipped()
folders = {"AMOS22": root/"AMOS22", "NLST": root/"NLST"}
{organ: (k, space.mapping("AMOS22")[k]) for organ, k in own.items()}

# %% [markdown]
# ## Settings
# The defaults are those of the published trainings: 1.5 mm, patches of 128³, two from each image, Hounsfield units from
# −963.8 to 1053.7 mapped to [0, 1], and a margin of ten voxels around whatever is denser than water.

# %%
#| export
VISTA_CT = "ct:-963.8247715525971,1053.678477684517" # window of the published trainings [HU], see `Normalizer`
MAP_KEYS = ("label", "pseudo_label", "label_sv")

class LoaderSettings(Config):
    "How cases become patches"
    patch_size: tuple[int, int, int] = (128, 128, 128) # (x, y, z) [voxel]
    patches_per_image: int = Field(2, ge=1) # patches drawn from a case at a time
    spacing: float | tuple[float, float, float] | None = 1.5 # voxel size [mm]; None: as stored
    margin: int = Field(10, ge=0) # kept around the foreground [voxel], before resampling
    foreground: float = 0.0 # brighter voxels are foreground [HU]
    intensity: str = VISTA_CT # normalisation of the image, as text of a `Normalizer`
    supervoxels: bool = True # hand out `label_sv`
    unmapped: Literal["ignore", "zero", "error"] = "ignore" # fate of local labels without a global class
    ignore: int = Field(255, ge=1) # label of voxels that do not count
    augment: bool = True # apply the lists' random transforms; False: only cut patches
    require_labels: bool = True # refuse cases with neither label nor pseudo label; False: cut them anywhere
    cache_items: int = Field(0, ge=0) # prepared cases kept in memory by each process

# %%
LoaderSettings(patch_size=(96, 96, 96)).model_dump()

# %% [markdown]
# ## Who plays the label
# A case can have a label, a pseudo label, or both, and a mark whether the pseudo label is reliable. The rules:
#
# | the list has | label is | pseudo label is | classes annotated |
# |---|---|---|---|
# | a label | the label | – | the data set's |
# | a label and a reliable pseudo label | the label | used besides | the data set's, TotalSegmentatorV2's |
# | a label and an unreliable pseudo label | the label | only decides where to cut | the data set's |
# | a pseudo label only | the pseudo label | – | TotalSegmentatorV2's |
#
# A missing mark counts as reliable. Pseudo labels are in global numbers already, so only true labels are renumbered.

# %%
#| export
PSEUDO_SET = "TotalSegmentatorV2" # data set whose classes pseudo labels hold
PSEUDO_EXTRA = ("hepatic vessel", "airway") # classes they hold besides

def cast_roles(
    item: Mapping[str, Any], # of a data list, with `dataset_name`
) -> dict[str, Any]: # the item with `label_set`, `label_is_global` and `use_pseudo_label`; label and pseudo label cast
    "Decide what plays the label of a case"
    out = dict(item)
    only_pseudo = not out.get("label") and bool(out.get("pseudo_label"))
    if only_pseudo: out["label"] = out.pop("pseudo_label")
    for key in MAP_KEYS:
        if not out.get(key): out.pop(key, None)
    return out | {"label_set": PSEUDO_SET if only_pseudo else out["dataset_name"], "label_is_global": only_pseudo,
                  "use_pseudo_label": "pseudo_label" in out and out.get("pseudo_label_reliability", 1) > 0}

def target_classes(
    space: LabelSpace, # label space
    label_set: str, # as `draw` hands it out: a data set's name
    pseudo: bool = False, # classes of the pseudo label that is used besides
) -> tuple[int, ...]: # global ids, ascending
    "Classes that are annotated, where an absent class means that it is not there"
    ids = set(space.mapping(PSEUDO_SET if pseudo else label_set).values())
    if pseudo: ids |= {k for n in PSEUDO_EXTRA if (k := space.resolve(n)) is not None}
    return tuple(sorted(ids))

# %%
both = cast_roles({"image": "i", "label": "l", "pseudo_label": "p", "dataset_name": "Task06"})
alone = cast_roles({"image": "i", "pseudo_label": "p", "dataset_name": "NLST"})
doubtful = cast_roles({"image": "i", "label": "l", "pseudo_label": "p", "pseudo_label_reliability": 0,
                       "dataset_name": "Task06"})
[(r["label"], r.get("pseudo_label"), r["use_pseudo_label"], r["label_set"]) for r in (both, alone, doubtful)]

# %%
assert both["use_pseudo_label"] and not doubtful["use_pseudo_label"] and doubtful["pseudo_label"] == "p"
assert alone["label_is_global"] and not both["label_is_global"]
assert {25, 132} <= set(target_classes(space, "Task06", pseudo=True)) and target_classes(space, "Task06") == (23,)

# %% [markdown]
# ## Reading a case
# Image and label are brought into the image's orientation, because a label whose y axis runs the other way is still
# the same grid. After that their grids must agree to a tenth of a voxel. Several files as `image` become channels.
#
# What can be wrong with one of ten thousand files will be, in the third epoch. The error names data set, case and file:

# %%
#| export
@contextlib.contextmanager
def _about(item: Mapping[str, Any], what: str) -> Iterator[None]:
    "Say which case an error is about"
    try: yield
    except (ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as e:
        kind = next((k for k in (MissingFile, FormatError) if isinstance(e, k)), DataError)
        image = item["image"] if isinstance(item["image"], str) else item["image"][0]
        raise kind(f"data set {item.get('dataset_name', '?')!r}, case {image}, {what}: {e}") from e

def _read_map(path: str, image: Volume) -> Volume:
    "A label map on the grid of its image, as int32"
    vol = to_axes(read_volume(path), "xyz")
    if vol.channels == 1: vol = replace(vol, data=vol.data[0], axes="xyz")
    if vol.channels is not None: raise DataError(f"{path}: a label has no channels, got {vol.channels}")
    vol = reorient(vol, image.orientation)
    if vol.shape != image.shape: raise DataError(f"{path}: shape {vol.shape}, the image has {image.shape}")
    far, limit = corner_displacement(vol, image), 0.1*min(image.spacing)
    if far > limit:
        raise DataError(f"{path}: its grid is displaced from the image's by {far:.3g} mm (limit {limit:.3g}). Resample "
                        "the label, or fix its header; `medvol datalists verify` lists all such cases")
    with np.errstate(invalid="ignore"): data = vol.data.astype(np.int32)
    if not np.array_equal(data, vol.data): raise DataError(f"{path}: labels are not whole numbers that fit int32")
    return Volume(data[None], image.affine, "cxyz")

def read_case(
    item: Mapping[str, Any], # with absolute paths, as from `located_items`
    keys: Sequence[str] = MAP_KEYS, # maps to read besides the image
) -> dict[str, Volume]: # key -> (c, x, y, z); image as stored, maps int32, all on the image's grid
    "Read image and label maps of a case"
    paths = [item["image"]] if isinstance(item["image"], str) else list(item["image"])
    parts = []
    for p in paths:
        with _about(item, "image"):
            vol = to_axes(read_volume(p), "xyz")
            parts.append(replace(vol, data=vol.data[None], axes="cxyz") if vol.channels is None else vol)
    with _about(item, "image"):
        first = parts[0]
        for p, vol in zip(paths[1:], parts[1:]):
            if vol.shape != first.shape or corner_displacement(vol, first) > 0.1*min(first.spacing):
                raise DataError(f"{p}: lies on another grid than {paths[0]}. Resample the channels to one grid")
        image = first if len(parts) == 1 else replace(first, data=np.concatenate([v.data for v in parts]))
    out = {"image": image}
    for key in keys:
        if not item.get(key): continue
        with _about(item, key): out[key] = _read_map(item[key], image)
    return out

# %%
cases = [cast_roles(i) for dl in (hospital, archive) for i in located_items(dl, folders[dl.name])]
read_case(cases[0])

# %%
stored = read_case(cases[0])
assert {v.orientation for v in stored.values()} == {"LPS"} and stored["label"].dtype == np.int32
torn = root/"AMOS22"/"labels"/"torn.nii.gz"
torn.write_bytes(Path(cases[0]["label"]).read_bytes()[:500])
with raises(FormatError, match="data set 'AMOS22', case .*images/0.nii.gz, label: .*torn.nii.gz"):
    read_case({**cases[0], "label": str(torn)})
with raises(MissingFile, match="data set 'NLST', case .*/images/7.nii.gz, label_sv: .*absent.nii.gz does not exist"):
    read_case({**cases[3], "label_sv": str(root/"absent.nii.gz")})
moved = Volume(stored["label"].data[0], stored["image"].affine @ np.array(np.eye(4) + np.eye(4, k=3)))
write_volume(moved, root/"AMOS22"/"labels"/"moved.nii.gz")
with raises(DataError, match="moved.nii.gz: its grid is displaced from the image's by 8 mm \\(limit 0.8\\)"):
    read_case({**cases[0], "label": str(root/"AMOS22"/"labels"/"moved.nii.gz")})

# %% [markdown]
# ## Preparing a case
# The order is that of the published trainings: cut to the foreground with a margin, resample (linear for the image,
# nearest for maps), clip and scale, turn to RAS, pad to the patch size. The difference to MONAI's `Spacingd`: when
# the voxel size changes, the outer faces of the volume stay in place, not the centre of the first voxel (see
# the page on geometry). Positions in the world agree, so networks trained on either see the same.

# %%
#| export
def _foreground_box(data: np.ndarray, threshold: float, margin: int) -> tuple[list[int], list[int]]:
    "Start and size of the box around what is brighter; the whole volume if nothing is"
    bright = (data > threshold).any(axis=0)
    start, size = [], []
    for axis in range(3):
        there = np.flatnonzero(bright.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (there[0], there[-1] + 1) if len(there) else (0, bright.shape[axis])
        start.append(max(0, int(low) - margin))
        size.append(min(bright.shape[axis], int(high) + margin) - start[-1])
    return start, size

def _padded(vol: Volume, patch_size: Sequence[int]) -> Volume:
    "At least as large as a patch, zeros shared by both sides"
    size = [max(n, p) for n, p in zip(vol.shape, patch_size)]
    return vol if tuple(size) == vol.shape else crop(vol, [(n - s + 1)//2 for n, s in zip(vol.shape, size)], size)

def prepare_case(
    volumes: Mapping[str, Volume], # from `read_case`
    settings: LoaderSettings, # margin, spacing, intensity, patch size
) -> dict[str, Volume]: # key -> (c, x, y, z) in RAS; image float32 in [0, 1], maps int32
    "The deterministic half of the pipeline"
    start, size = _foreground_box(volumes["image"].data, settings.foreground, settings.margin)
    normalise, out = Normalizer.parse(settings.intensity), {}
    for key, vol in volumes.items():
        vol = crop(vol, start, size)
        if settings.spacing is not None and not close(vol.spacing, np.broadcast_to(settings.spacing, 3), 1e-4):
            vol = resample(vol, settings.spacing, order=int(key == "image"), antialias=False)
        if key == "image": vol = replace(vol, data=np.stack([normalise(c) for c in vol.data]))
        vol = _padded(reorient(vol, "RAS"), settings.patch_size)
        out[key] = replace(vol, data=np.ascontiguousarray(vol.data))
    return out

# %%
small = LoaderSettings(patch_size=(16, 16, 16), spacing=8.0, margin=2)
ready = prepare_case(stored, small)
plot.planes(ready["image"].data[0], ready["label"].data[0], ready["image"].spacing)

# %%
assert ready["image"].orientation == "RAS" and ready["image"].dtype == np.float32
assert 0 <= ready["image"].data.min() and ready["image"].data.max() <= 1
centre = np.argwhere(ready["label"].data[0] == own["liver"]).mean(axis=0)
before = np.argwhere(stored["label"].data[0] == own["liver"]).mean(axis=0)
assert close(to_world(ready["label"].affine, centre), to_world(stored["label"].affine, before), 2.0)
assert prepare_case(stored, LoaderSettings(patch_size=(99, 16, 16), spacing=8.0))["image"].shape[0] == 99

# %% [markdown]
# ## Patches in which rare classes occur
# A patch is cut around a voxel, and the voxel is chosen in two steps: first a class, with equal odds for all that are
# present in the case, background included; then a voxel of that class. So the adrenal gland is met as often as the
# liver. This is what MONAI's `RandCropByLabelClassesd` does, too. That goes through the volume once for each of 133
# classes; one histogram and one search for the chosen class are enough.

# %%
#| export
def balanced_starts(
    lbl: np.ndarray, # (x, y, z) integer labels that decide where to cut
    patch_size: Sequence[int], # (x, y, z) [voxel]
    n: int, # number of patches
    rng: np.random.Generator, # see `rng_for`
    odds: Sequence[float] = (1.0,)*256, # relative frequency of each class, by id; beyond the end: never
) -> np.ndarray: # (n, 3) int64 first voxels
    "Starts of patches around voxels of randomly chosen classes"
    flat = lbl.ravel()
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, -1)
    counted = flat[(flat >= 0) & (flat < len(odds))] if low < 0 or high >= len(odds) else flat
    counts = np.bincount(counted, minlength=len(odds))
    weights = np.where(counts > 0, np.asarray(odds, np.float64), 0)
    if not weights.sum() > 0: return random_starts(lbl.shape, patch_size, n, rng)
    chosen = rng.choice(len(odds), n, p=weights/weights.sum())
    ranks = np.minimum((rng.random(n)*counts[chosen]).astype(np.int64), counts[chosen] - 1)
    where = {c: np.flatnonzero(flat == c) for c in set(chosen.tolist())}
    centres = np.stack(np.unravel_index([where[c][r] for c, r in zip(chosen.tolist(), ranks)], lbl.shape), axis=1)
    return np.array([centred_start(lbl.shape, patch_size, c) for c in centres], np.int64)

# %%
lbl = ready["label"].data[0]
at = balanced_starts(lbl, (1, 1, 1), 4000, rng_for(0, "crops"), [1.0]*9)
share = np.bincount(lbl[tuple(at.T)], minlength=9)/len(at)
plot.bars({f"{n}: {what}": 100*v[k] for k, n in {0: "background", **hospital.label_dict}.items()
           for what, v in (("of voxels", np.bincount(lbl.ravel(), minlength=9)/lbl.size), ("of patches", share))}, "%",
          ids=[k for k in range(1, 6) for _ in range(2)])

# %%
assert close(share[[0, 1, 2, 6, 8]], [0.2]*5, 0.03)
never = balanced_starts(lbl, (9, 9, 9), 200, rng_for(0, "crops"), [0, 1, 0, 0, 0, 0, 0, 0, 0])
assert set(np.unique(lbl[tuple((never + 4).T)])) <= {0, 1} and never.min() >= 0
assert np.array_equal(balanced_starts(lbl, (9, 9, 9), 3, rng_for(1)), balanced_starts(lbl, (9, 9, 9), 3, rng_for(1)))
assert balanced_starts(np.full((9, 9, 9), 7), (5, 5, 5), 2, rng_for(0), [1.0]*3).shape == (2, 3)

# %% [markdown]
# ## The list's own transforms
# A list says how its patches are cut and changed. If its first transform is a class-balanced crop, which is so in all
# published lists, the crop above takes its place with the same odds; everything else goes to MONAI as it is written. A
# list without transforms gets the published ones. Nothing in a list is executed, see the page on loading.
#
# The published transforms cut by the pseudo label. A case that has none is cut by its label, in global numbers.

# %%
#| export
_CROP = frozenset("keys label_key num_classes num_samples spatial_size ratios warn allow_missing_keys".split())

class _Recipe:
    "How the patches of one data set are made: our crop, or none, and MONAI transforms"
    def __init__(self, dl: DataList, settings: LoaderSettings, n_classes: int, trust: bool):
        config = published_transform(n_classes) if dl.training_transform is None else list(dl.training_transform)
        names = {"image_key": "image", "label_key": "label", "label_sv_key": "label_sv",
                 "pseudo_label_key": "pseudo_label", "num_patches_per_image": settings.patches_per_image,
                 "patch_size": settings.patch_size}
        where, self.by, self.odds = f"data list {dl.name!r}", "pseudo_label", None
        if not trust and not (parsed := _parsed(config[:1], names, ""))[1] and parsed[0]: self._take_crop(*parsed[0][0])
        if self.odds is not None: config = config[1:]
        elif not settings.augment: raise ConfigError(f"{where}: augment=False needs a class-balanced crop as the first "
                                                     "of its training_transform")
        self.transforms: list = []
        if settings.augment: self.transforms = materialise(config, names, trust, where=where)

    def _take_crop(self, name: str, given: dict[str, Any]) -> None:
        "Use `balanced_starts` if the crop asks for nothing else"
        if name != "RandCropByLabelClassesd" or not set(given) <= _CROP: return
        odds = given.get("ratios") or [1.0]*int(given.get("num_classes") or 0)
        if given.get("label_key") not in MAP_KEYS or len(odds) != given.get("num_classes") or not sum(odds) > 0: return
        self.by, self.odds = given["label_key"], list(odds)
        self.n, self.size = int(given.get("num_samples", 1)), tuple(np.broadcast_to(given["spatial_size"], 3).tolist())

    def seed(self, seed: int) -> Callable[[Any], Any]:
        "The transforms, with all their randomness from `seed`"
        from monai.transforms import Compose
        return Compose(self.transforms).set_random_state(seed=seed)

# %%
recipe = _Recipe(hospital, small.model_copy(update={"augment": False}), 133, trust=False)
recipe.by, len(recipe.odds), recipe.n, recipe.size

# %% [markdown]
# ## The data set
# `draw(i, rng)` makes the patches of case `i`. All randomness comes from `rng`, which `Batches` names by seed, epoch
# and case. The result is a dictionary with the same entries for every case, so that cases from different data sets go
# into one batch: what a case does not have is zero, and a flag says so.

# %%
#| export
class TrainingDataset:
    "Cases of many data sets as patches on one grid with global labels; `draw(i, rng)` for `torchcore.Batches`"
    def __init__(
        self,
        items: Sequence[Mapping[str, Any]], # with absolute paths and `dataset_name`, as from `located_items`
        datalists: Mapping[str, DataList], # data set -> its list, for its transforms
        space: LabelSpace | None, # global label ids; None: labels stay as they are
        settings: LoaderSettings, # grid, patches, intensity
        trust: bool = False, # True: execute expressions in the lists' transforms
    ):
        self.items, self.space, self.settings = [cast_roles(i) for i in items], space, settings
        bare = [i for i in self.items if "label" not in i]
        if bare and settings.require_labels:
            raise DataError(f"{len(bare)} of {len(self.items)} cases have neither label nor pseudo label, such as "
                            f"{bare[0]['image']} of data set {bare[0]['dataset_name']!r}. Leave them out, or set "
                            "require_labels=False")
        used = list(dict.fromkeys(i["dataset_name"] for i in self.items))
        n_classes = 133 if space is None else len(space.class_names())
        self.recipes = {n: _Recipe(datalists[n], settings, n_classes, trust) for n in used}
        local = {i["dataset_name"] for i in self.items if "label" in i and not i["label_is_global"]}
        self.tables = {} if space is None else {n: space.lut(n, np.int32, settings.unmapped, settings.ignore)
                                                for n in sorted(local)}
        self._cache: OrderedDict[int, dict[str, Volume]] = OrderedDict()

    def __len__(self) -> int: return len(self.items)

    @property
    def keys(self) -> list[str]: # one name a case, for messages of a training
        "Data set and image of every case"
        return [f"{i['dataset_name']}: {i['image']}" for i in self.items]

    def case(
        self,
        i: int, # which case
    ) -> dict[str, Volume]: # key -> (c, x, y, z) in RAS, local label ids
        "The whole prepared case, without chance"
        if i in self._cache:
            self._cache.move_to_end(i)
            return self._cache[i]
        item = self.items[i]
        volumes = read_case(item, MAP_KEYS if self.settings.supervoxels else MAP_KEYS[:2])
        with _about(item, "preparing it"): ready = prepare_case(volumes, self.settings)
        if self.settings.cache_items:
            while len(self._cache) >= self.settings.cache_items: self._cache.popitem(last=False)
            self._cache[i] = ready
        return ready

    def draw(
        self,
        i: int, # which case
        rng: np.random.Generator, # all randomness of the draw
    ) -> dict[str, Any]: # image (n, c, x, y, z) float32, maps (n, 1, x, y, z) int32, affine (n, 4, 4), flags and names
        "Patches of a case"
        item, ready = self.items[i], self.case(i)
        with _about(item, "making patches"):
            patches = _patches(self, item, ready, rng)
            return _stacked(self, item, patches) | {"index": i}

    def weights(
        self,
        sample_weights: Sequence[float] | None = None, # one a case, relative within its data set; None: all equal
    ) -> list[float]: # one a case, for `Batches(weights=...)`
        "Odds that draw every data set equally often"
        return sampling_weights(self.items, sample_weights)

# %%
#| export
def _global_label(data: TrainingDataset, item: Mapping[str, Any], lbl: np.ndarray) -> np.ndarray:
    "Labels in global numbers; pseudo labels, and all labels without a label space, are there already"
    known = item["label_is_global"] or not data.tables
    return lbl if known else relabel(lbl, data.tables[item["dataset_name"]])

def _guide(data: TrainingDataset, item: Mapping[str, Any], ready: Mapping[str, Volume], by: str) -> Volume | None:
    "The map that decides where to cut: the one that the list names, or else the label in global numbers"
    if by in ready or "label" not in ready: return ready.get(by)
    return replace(ready["label"], data=_global_label(data, item, ready["label"].data))

def _patches(data: TrainingDataset, item: Mapping[str, Any], ready: Mapping[str, Volume], rng: np.random.Generator
             ) -> list[dict[str, Any]]:
    "Cut patches and apply the random transforms; values are volumes, or MONAI's tensors"
    recipe, seed = data.recipes[item["dataset_name"]], int(rng.integers(2**32))
    guide = _guide(data, item, ready, recipe.by)
    if recipe.odds is None:
        whole = dict(ready) if guide is None else {recipe.by: guide, **ready}
        made = recipe.seed(seed)({k: _tensor(v) for k, v in whole.items()})
        return made if isinstance(made, list) else [made]
    shape = ready["image"].shape
    starts = random_starts(shape, recipe.size, recipe.n, rng) if guide is None else \
        balanced_starts(guide.data[0], recipe.size, recipe.n, rng, recipe.odds)
    cut = [{k: _window(v, s, recipe.size) for k, v in ready.items()} for s in starts]
    if not recipe.transforms: return cut
    apply = recipe.seed(seed)
    return [apply({k: _tensor(v) for k, v in p.items()}) for p in cut]

def _window(vol: Volume, start: Sequence[int], size: Sequence[int]) -> Volume:
    affine = vol.affine.copy()
    affine[:3, 3] = to_world(vol.affine, start)
    return replace(vol, data=take_patch(vol.data, start, size), affine=affine)

def _tensor(vol: Volume) -> Any:
    "MONAI's tensor with a place in the world, which its spatial transforms need"
    import torch
    from monai.data import MetaTensor
    return MetaTensor(torch.from_numpy(vol.data), affine=torch.from_numpy(np.array(vol.affine)))

def _plain(value: Any, dtype: Any) -> np.ndarray:
    "Array of a volume or a tensor; maps that became floats on the way are whole numbers still"
    out = value.data if isinstance(value, Volume) else value.detach().cpu().numpy()
    return np.ascontiguousarray(np.rint(out) if dtype == np.int32 and out.dtype.kind == "f" else out, dtype)

def _stacked(data: TrainingDataset, item: Mapping[str, Any], patches: list[dict[str, Any]]) -> dict[str, Any]:
    "Arrays and flags of a draw"
    size = tuple(data.settings.patch_size)
    image = [_plain(p["image"], np.float32) for p in patches]
    if wrong := [p.shape[1:] for p in image if p.shape[1:] != size]:
        raise DataError(f"its training_transform makes patches of {wrong[0]}, the settings say {size}")
    affine = [np.asarray(p["image"].affine, np.float64) for p in patches]
    out: dict[str, Any] = {"image": np.stack(image), "affine": np.stack(affine)}
    has = {"label": "label" in item, "pseudo_label": item["use_pseudo_label"], "label_sv": "label_sv" in item}
    for key in MAP_KEYS if data.settings.supervoxels else MAP_KEYS[:2]:
        maps = np.stack([_plain(p[key], np.int32) if has[key] else np.zeros((1, *size), np.int32) for p in patches])
        out[key] = _global_label(data, item, maps) if key == "label" and has[key] else maps
        out[f"has_{key}"] = has[key]
    return out | {"label_set": item["label_set"], "dataset_name": item["dataset_name"]}

# %% [markdown]
# ## Sampling
# Data sets differ in size by a factor of a hundred. With odds of $100/n$ for a case of a data set with $n$ cases (the
# published *dataset weights*), each data set is drawn equally often. Weights of single cases, such as those that
# the analysis page derives from class frequencies, act within the data set and leave its share unchanged.

# %%
#| export
def sampling_weights(
    items: Sequence[Mapping[str, Any]], # with `dataset_name`
    sample_weights: Sequence[float] | None = None, # one a case, relative within its data set; None: all equal
) -> list[float]: # one a case
    "Odds of every case: its data set's share, divided among its cases"
    own = np.ones(len(items)) if sample_weights is None else np.asarray(sample_weights, np.float64)
    if own.shape != (len(items),) or not np.isfinite(own).all() or (own < 0).any():
        raise DataError(f"sample_weights: {len(items)} finite numbers >= 0 are needed, got shape {own.shape}")
    names = [i["dataset_name"] for i in items]
    share, mean = dataset_weights(Counter(names)), {n: own[[m == n for m in names]].mean() for n in set(names)}
    if empty := sorted(n for n, m in mean.items() if m == 0):
        raise DataError(f"sample_weights: all cases of {empty} have weight 0. Leave the data set out instead")
    return [float(share[n]*w/mean[n]) for n, w in zip(names, own)]

# %%
weights = sampling_weights(cases, [1, 1, 2, 1, 1])
assert close(sum(weights[:3]), 100) and close(sum(weights[3:]), 100)
with raises(DataError, match="all cases of \\['NLST'\\] have weight 0"): sampling_weights(cases, [1, 1, 1, 0, 0])
dataset_weights(Counter(c["dataset_name"] for c in cases)), [round(w, 1) for w in weights]

# %% [markdown]
# ## From lists to a data set
# `training_dataset` puts the pages together: lists are read, the requested fold is *held out*, paths are joined, and
# the rest trains. With `held_out=True` the same call returns the held-out cases instead, as they are.

# %%
#| export
def training_dataset(
    datalists: str | os.PathLike | DataList | Sequence, # lists, or their files; one or several
    base_dirs: str | os.PathLike | Mapping[str, str | os.PathLike], # folder of the data set; several: by name
    space: LabelSpace | None = None, # global label ids; None: labels stay as they are (one data set only)
    patch_size: Sequence[int] | None = None, # (x, y, z) [voxel]; default: that of `settings`
    *,
    fold_idx: int = -1, # the fold that is held out; -1: none
    held_out: bool = False, # True: the cases of the held-out fold instead of the others, not augmented
    roots: Mapping[str, Any] | None = None, # other roots for pseudo labels or supervoxels, see `located_items`
    settings: LoaderSettings | None = None, # everything else
    trust: bool = False, # True: execute expressions in the lists' transforms
) -> TrainingDataset: # for `torchcore.Batches`
    "Training cases of one or many data lists, ready to draw patches from"
    several = isinstance(datalists, Sequence) and not isinstance(datalists, str)
    lists = [d if isinstance(d, DataList) else read_datalist(d) for d in (datalists if several else [datalists])]
    by_name = {d.name: d for d in lists}
    if not lists or len(by_name) < len(lists): raise ConfigError(f"datalists: different names are needed, got "
                                                                 f"{[d.name for d in lists]}")
    if not isinstance(base_dirs, Mapping):
        if len(lists) > 1: raise ConfigError("base_dirs: name the folder of each data set, {'Task09': ..., ...}")
        base_dirs = {lists[0].name: base_dirs}
    if lacking := [n for n in by_name if n not in base_dirs]: raise ConfigError(f"base_dirs: no folder for {lacking}")
    if space is None and len(lists) > 1:
        raise ConfigError("space: several data sets need a label space, such as LabelSpace.shipped()")
    settings = settings or LoaderSettings()
    if patch_size is not None: settings = LoaderSettings(**settings.model_dump() | {"patch_size": tuple(patch_size)})
    parts = _divided({n: (dl, os.fspath(base_dirs[n])) for n, dl in by_name.items()}, fold_idx, "training", roots=roots)
    if held_out: settings = settings.model_copy(update={"augment": False}) # they are there to measure on
    if not parts[held_out]:
        raise DataError(f"no case of {list(by_name)} is {'held out' if held_out else 'left to train'}, fold {fold_idx}")
    return TrainingDataset(parts[held_out], by_name, space, settings, trust)

# %%
plain = small.model_copy(update={"augment": False, "patches_per_image": 3})
data = training_dataset([hospital, archive], folders, space, fold_idx=0, settings=plain)
sample = data.draw(0, rng_for(0, "a draw"))
len(data), {k: v.shape if hasattr(v, "shape") else v for k, v in sample.items()}

# %%
again = data.draw(0, rng_for(0, "a draw"))
assert all(np.array_equal(sample[k], again[k]) for k in sample)
assert set(np.unique(sample["label"])) <= {0, 1, 3, 5, 6} and data.draw(1, rng_for(1))["has_pseudo_label"] is False
unlabelled = data.draw(2, rng_for(2))
assert (unlabelled["label_set"], unlabelled["has_label"]) == ("TotalSegmentatorV2", True)
held = training_dataset([hospital, archive], folders, space, fold_idx=0, held_out=True, settings=plain)
assert held.keys == [f"AMOS22: {root/'AMOS22'/'images'/'0.nii.gz'}"]

# %% [markdown]
# The place of a patch in the world goes with it. The voxels of a patch, looked up in the prepared case:

# %%
ready = data.case(0)
at = np.rint(np.linalg.inv(ready["image"].affine) @ sample["affine"][1][:, 3])[:3].astype(int)
assert np.array_equal(take_patch(ready["image"].data, at, (16, 16, 16)), sample["image"][1])
at

# %%
with raises(ConfigError, match="several data sets need a label space"): training_dataset([hospital, archive], folders)
with raises(DataError, match="1 of 1 cases have neither label nor pseudo label"):
    training_dataset(DataList("NLST", ({"image": "a.nii.gz"},)), root, space)
with raises(DataError, match="label space has no data set 'AMOS'"):
    training_dataset(replace(hospital, name="AMOS"), root, space, settings=plain)

# %% [markdown]
# ## Batches
# An item of the data set is several patches of one case. `collate_patches` lays the patches of all cases of a batch
# behind each other; without it there is one more axis, the case.

# %%
#| export
def collate_patches(
    samples: Sequence[Mapping[str, Any]], # from `TrainingDataset.draw`
) -> dict[str, Any]: # image (b, c, x, y, z), maps (b, 1, x, y, z), affine (b, 4, 4), flags (b,), names: b of them
    "Make one batch of the patches of several cases"
    import torch
    counts, out = [len(s["image"]) for s in samples], {}
    for key, value in samples[0].items():
        if isinstance(value, np.ndarray): out[key] = torch.from_numpy(np.concatenate([s[key] for s in samples]))
        else:
            spread = [s[key] for s, n in zip(samples, counts) for _ in range(n)]
            out[key] = spread if isinstance(value, str) else torch.tensor(spread)
    return out

# %%
batches = Batches(data, batch_size=2, seed=3, weights=data.weights(), collate=collate_patches)
(first, batch), *_ = batches.epoch(0)
first, {k: tuple(v.shape) if hasattr(v, "shape") else v for k, v in batch.items()}

# %%
(_, cases_first), = list(Batches(data, batch_size=4, seed=3).epoch(0))
assert cases_first["image"].shape == (4, 3, 1, 16, 16, 16) and batch["image"].shape == (6, 1, 16, 16, 16)
drawn = np.bincount(np.concatenate([batches.order(e).ravel() for e in range(500)]), minlength=4)/2000
assert close(drawn, [0.25]*4, 0.05)

# %% [markdown]
# ## Putting it together
# Now with the published transforms: zoom, low resolution, blur, brightness, noise. Each row is one case, drawn eight
# times. Cuts through the middle of the patches; colours are global classes. The same seed gives the same patches with
# two loading processes as with none.

# %%
augmented = training_dataset([hospital, archive], folders, space, (24, 24, 24), fold_idx=0,
                             settings=LoaderSettings(spacing=6.0, margin=2, patches_per_image=8, cache_items=4))
draws = [augmented.draw(i, rng_for(5, i)) for i in (0, 2)]
begin = time.perf_counter()
for k in range(8): augmented.draw(k % 4, rng_for(6, k))
took = (time.perf_counter() - begin)/64
axial = lambda patch: np.rot90(patch[0, :, :, 12])[:, ::-1]
plot.montage([axial(p) for s in draws for p in s["image"]], 8, limits=(0, 1), alpha=0.3,
             lbls=[axial(p) for s in draws for p in s["label"]],
             title=f"AMOS22 (labels) and NLST (pseudo labels): {1000*took:.0f} ms a patch")

# %%
serial, parallel = ([b for _, b in Batches(augmented, 2, seed=1, workers=w, collate=collate_patches).epoch(0)]
                    for w in (0, 2))
for a, b in zip(serial, parallel, strict=True):
    assert all(bool((a[k] == b[k]).all()) for k in ("image", "label", "pseudo_label", "label_sv", "affine"))
assert all(np.array_equal(draws[0][k], augmented.draw(0, rng_for(5, 0))[k]) for k in ("image", "label"))

# %%
place.cleanup()
