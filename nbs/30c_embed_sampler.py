# %% [markdown]
# # Batches of several kinds
#
# > Which scans are in batch 7001, and what is done to each of them, is a function of the number 7001.
#
# Anatomical embeddings train on mixtures: crops of CT beside whole volumes with organ labels, or beside registered
# pairs of CT and MR. The reference mixes them with a sampler whose last slot comes from the last data set; its manual
# says to edit one line of the sampler for one training stage and to undo the edit for the next. Edited, it silently
# never draws from the last data set; unedited, it crashes with a single one. All processes draw the same last item, and
# a resumed run replays the stream from its start. Half of what is loaded is thrown away, because the branch of the loss
# is chosen *after* loading.
#
# Here the number of slots per kind is an option. The branch of a batch, its items and every random number used on them
# follow from the seed and the batch's number alone, so workers, processes and interruptions change nothing, and only
# what the branch needs is loaded.

# %%
#| default_exp embed.sampler

# %%
#| export
import functools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from medvol_nb.core import ConfigError, DataError, MedvolError, MissingFile, log, read_csv, rng_for
from medvol_nb.embed.data import Contrast, list_scans
from medvol_nb.embed.intensity import AUGMENTS, Augment, augment
from medvol_nb.embed.views import Source, View, ViewSampler, open_source, sample_view
from medvol_nb.volume import stem_of

# %%
import tempfile
from dataclasses import replace

from matplotlib import pyplot as plt
from scipy import ndimage

from medvol_nb import phantoms
from medvol_nb.core import raises
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.volume import write_volume

# %% [markdown]
# ## A stream without memory
# Each kind of sample has its own endless stream: one permutation of its items after another. Batch $b$ takes the next
# $k$ places for each process: with $W$ processes, slot $j$ of process $r$ is place $(b k + j) W + r$. So two processes
# see together what one process with twice the slots sees, and every item comes once per round. If a batch has *one*
# kind, drawn with given odds, $b$ counts the earlier batches of that kind, which a table of draws tells without
# replaying anything.
#
# The classical call `MixedBatchSampler(lengths, batch_size, tail_slots=1)` is the reference's: the last data set fills
# `tail_slots` slots, the others the rest. `tail_slots=0` is the manual's edit without its loss: all data sets fill all
# slots; `exclude_tail=True` reproduces the loss.

# %%
#| export
class Draw(NamedTuple):
    "One slot of a batch"
    index: int # item, counted over all data sets
    batch: int # number of the batch
    kind: str # which kind of sample
    slot: int # counted over all processes

    def rng(
        self,
        seed: int, # of the run
    ) -> np.random.Generator: # the only randomness that the sample may use
        "Generator of this sample"
        return rng_for(seed, "sample", self.kind, self.batch, self.slot)

class MixedBatchSampler:
    "Which items are in which batch: a function of seed, batch and process"
    _BLOCK = 4096 # draws of branches per generator

    def __init__(
        self,
        lengths: Sequence[int] | Mapping[str, int], # sizes of the data sets; or of the kinds, by name
        batch_size: int | None = None, # slots of a batch, in each process; not needed with `slots`
        tail_slots: int = 1, # so many of them come from the tail; 0: all data sets fill all slots
        *,
        tail: Literal["last"] | int = "last", # which data set is the tail
        exclude_tail: bool = False, # with tail_slots=0: never draw from the tail, as the reference's edit does
        slots: Mapping[str, int] | None = None, # slots by kind, in each process, for named lengths
        odds: Mapping[str, float] | None = None, # a batch has one kind, with these odds; None: all kinds
        seed: int = 0, # names the streams
        rank: int = 0, # this process
        world: int = 1, # processes that share the work
        start_batch: int = 0, # where iteration begins
    ):
        if not 0 <= rank < world: raise ConfigError(f"rank: must be 0 <= rank < world, got {rank} of {world}")
        self.seed, self.rank, self.world, self.start_batch = seed, rank, world, start_batch
        self.groups = self._named(lengths, slots) if isinstance(lengths, Mapping) else \
            self._tailed(list(lengths), batch_size, tail_slots, tail, exclude_tail)
        for kind, (items, n) in self.groups.items():
            if n < 0 or (n and not len(items)): raise DataError(f"slots: {n} of {kind!r}, which has {len(items)} items")
        self.odds = None
        if odds is not None:
            if odds.keys() - self.groups.keys() or min(odds.values(), default=0) < 0 or not sum(odds.values()) > 0:
                raise ConfigError(f"odds: need numbers >= 0 for some of {sorted(self.groups)}, got {dict(odds)}")
            self.odds = {k: odds.get(k, 0)/sum(odds.values()) for k in self.groups}
        self._order = functools.lru_cache(8)(self._permutation)
        self._table = functools.lru_cache(None)(self._branch_block)

    @staticmethod
    def _named(lengths: Mapping[str, int], slots: Mapping[str, int] | None) -> dict[str, tuple[np.ndarray, int]]:
        if slots is None or slots.keys() != lengths.keys():
            raise ConfigError(f"slots: need a number for each of {sorted(lengths)}, got {slots}")
        starts = np.cumsum([0, *lengths.values()])
        return {k: (np.arange(s, s + n), slots[k]) for (k, n), s in zip(lengths.items(), starts)}

    @staticmethod
    def _tailed(lengths: list[int], batch_size: int | None, tail_slots: int, tail: Any, exclude_tail: bool
                ) -> dict[str, tuple[np.ndarray, int]]:
        if not lengths or min(lengths) < 1: raise DataError(f"lengths: need data sets with items, got {lengths}")
        if batch_size is None or not 0 <= tail_slots <= batch_size or batch_size < 1:
            raise ConfigError(f"tail_slots: must be 0...{batch_size} (batch_size), got {tail_slots}")
        which = len(lengths) - 1 if tail == "last" else int(tail)
        starts, n = np.cumsum([0, *lengths]), sum(lengths)
        if not 0 <= which < len(lengths): raise ConfigError(f"tail: must be 0...{len(lengths) - 1}, got {tail}")
        last = np.arange(starts[which], starts[which + 1])
        rest = np.setdiff1d(np.arange(n), last)
        if len(lengths) == 1: return {"body": (np.arange(n), batch_size)}
        if tail_slots: return {"body": (rest, batch_size - tail_slots), "tail": (last, tail_slots)}
        return {"body": (rest if exclude_tail else np.arange(n), batch_size)}

    def _permutation(self, kind: str, round_: int) -> np.ndarray:
        items = self.groups[kind][0]
        return items[rng_for(self.seed, "order", kind, round_).permutation(len(items))]

    def _branch_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        "Kinds of a block of batches, and how many of each kind came before the block"
        u = rng_for(self.seed, "branch", block).random(self._BLOCK)
        kinds = np.searchsorted(np.cumsum(list(self.odds.values()))[:-1], u, side="right")
        before = np.zeros(len(self.odds), np.int64)
        if block: before = self._table(block - 1)[1] + np.bincount(self._table(block - 1)[0], minlength=len(self.odds))
        return kinds, before

    def branch(
        self,
        batch: int, # number of a batch
    ) -> str | None: # its kind, the same in all processes; None: all kinds
        "Which kind of samples a batch has"
        if self.odds is None: return None
        block, at = divmod(batch, self._BLOCK)
        for b in range(block): self._table(b) # in order, so that no recursion is deep
        return list(self.odds)[int(self._table(block)[0][at])]

    def _rounds_before(self, kind: str, batch: int) -> int:
        "Batches before this one that hold the kind"
        if self.odds is None: return batch
        self.branch(batch)
        block, at = divmod(batch, self._BLOCK)
        k, (kinds, before) = list(self.odds).index(kind), self._table(block)
        return int(before[k] + np.count_nonzero(kinds[:at] == k))

    def batch(
        self,
        number: int, # of the batch, from 0
    ) -> list[Draw]: # its slots in this process
        "What is in a batch"
        branch, out = self.branch(number), []
        for kind, (items, k) in self.groups.items():
            if not k or branch not in (None, kind): continue
            first = self._rounds_before(kind, number)*k
            for j in range(k):
                round_, at = divmod((first + j)*self.world + self.rank, len(items))
                out.append(Draw(int(self._order(kind, round_)[at]), number, kind, j*self.world + self.rank))
        return out

    def __iter__(self) -> Iterator[list[Draw]]:
        number = self.start_batch
        while True:
            yield self.batch(number)
            number += 1

# %% [markdown]
# Two data sets, 20 scans of the abdomen and 20 of lymph nodes, four slots: one slot for the tail gives three to one,
# none gives each scan the same chance, and the quirk never shows the second data set.

# %%
def share(**options):
    sampler = MixedBatchSampler([20, 20], 4, **options)
    seen = Counter("abdomen" if d.index < 20 else "lymph" for b in range(250) for d in sampler.batch(b))
    return {k: seen[k]/1000 for k in ("abdomen", "lymph")}

shares = {"tail_slots=1": share(), "tail_slots=0": share(tail_slots=0),
          "exclude_tail": share(tail_slots=0, exclude_tail=True)}
fig, ax = plt.subplots(figsize=(5, 1.8))
for k, name in enumerate(("abdomen", "lymph")):
    ax.barh(list(shares), [s[name] for s in shares.values()], label=name,
            left=[k*s["abdomen"] for s in shares.values()])
ax.legend(loc="upper right")
shares

# %%
assert shares["tail_slots=1"] == {"abdomen": 0.75, "lymph": 0.25} and shares["exclude_tail"]["lymph"] == 0
assert shares["tail_slots=0"] == {"abdomen": 0.5, "lymph": 0.5}
mixed = MixedBatchSampler({"views": 7, "organs": 3}, slots={"views": 4, "organs": 1})
for b in range(20): assert Counter(d.kind for d in mixed.batch(b)) == {"views": 4, "organs": 1}
seen = [d.index for b in range(7) for d in mixed.batch(b) if d.kind == "views"]
assert all(sorted(seen[k:k + 7]) == list(range(7)) for k in (0, 7, 14, 21))
assert MixedBatchSampler([5], 2).batch(3) == next(iter(MixedBatchSampler([5], 2, start_batch=3)))

# %% [markdown]
# Two processes share the stream, and odds decide for both of them what kind of batch comes:

# %%
odds = {"views": 0.6, "organs": 0.4}
two = [MixedBatchSampler({"views": 7, "organs": 3}, slots={"views": 2, "organs": 1}, odds=odds, rank=r, world=2)
       for r in (0, 1)]
one = MixedBatchSampler({"views": 7, "organs": 3}, slots={"views": 4, "organs": 2}, odds=odds)
for b in (*range(50), 5000, 9001):
    assert sorted([*two[0].batch(b), *two[1].batch(b)]) == sorted(one.batch(b))
    assert len({d.kind for d in one.batch(b)}) == 1
part = np.mean([one.branch(b) == "organs" for b in range(4000)])
seen = [d.index for b in range(40) for d in one.batch(b) if d.kind == "views"]
assert all(sorted(seen[k:k + 7]) == list(range(7)) for k in range(0, len(seen) - 7, 7))
round(part, 2)

# %%
assert 0.37 < part < 0.43
with raises(ConfigError, match="tail_slots: must be 0...2"): MixedBatchSampler([3, 4], 2, tail_slots=3)
with raises(ConfigError, match="slots: need a number for each"): MixedBatchSampler({"a": 3}, slots={"b": 3})
with raises(DataError, match="has 0 items"): MixedBatchSampler({"a": 3, "b": 0}, slots={"a": 1, "b": 1})

# %% [markdown]
# ## Finding the scans
# A case has one image, or several of one patient. A prepared folder (`medvol embedding prepare`) lists its files in
# `index.csv`; any other folder simply holds scans. With `suffixes`, files that differ only in the end of their names,
# `p1_0000` and `p1_0001`, are one case.

# %%
#| export
class Case(NamedTuple):
    "A patient's scans"
    name: str # for messages
    images: tuple[Any, ...] # paths or volumes
    masks: tuple[Any, ...] = () # as many, or none: body masks, or organ labels
    regions: tuple[Any, ...] = () # as many, or none: regions with a contrast of their own

def _found(name: str, images: Path, root: Path) -> Case:
    beside = [(root/folder/name,) if (root/folder/name).exists() else () for folder in ("masks", "regions")]
    return Case(stem_of(name), (images/name,), *beside)

def _joined(name: str, parts: Sequence[Case]) -> Case:
    "One case of several; what only some of them have is left out"
    lists = [tuple(x for c in parts for x in c[k]) for k in (1, 2, 3)]
    return Case(name, *(found if len(found) == len(lists[0]) else () for found in lists))

def read_cases(
    folder: Any, # prepared folder, or any folder with scans
    suffixes: Sequence[str] = (), # such as ('_0000', '_0001'): ends of the names of one case's files, all needed
) -> list[Case]: # sorted by name
    "List the cases of a folder"
    folder = Path(folder)
    if not folder.is_dir(): raise MissingFile(f"{folder} does not exist, or is no folder")
    if (folder/"index.csv").is_file():
        names = [row["name"] for row in read_csv(folder/"index.csv", ["name"])]
        found = [_found(name, folder/"images", folder) for name in sorted(names)]
        if absent := [c.name for c in found if not c.images[0].exists()]:
            raise MissingFile(f"{folder}/index.csv lists {absent[0]}, which is not in {folder/'images'}")
    else:
        found = [_found(p.name, folder, folder) for p in list_scans(folder)]
    if twice := [name for name, n in Counter(c.name for c in found).items() if n > 1]:
        raise DataError(f"{folder}: several scans are called {twice[0]!r}; cases are told apart by their names")
    if suffixes:
        of, by_name = Counter(), {c.name: c for c in found}
        for c in found: of.update([c.name[:-len(s)] for s in suffixes if c.name.endswith(s)])
        groups = {i: [by_name[i + s] for s in suffixes] for i, n in sorted(of.items()) if n == len(suffixes)}
        found = [_joined(i, g) for i, g in groups.items()]
    if not found: raise DataError(f"{folder}: holds no scans" + f" with the ends {list(suffixes)}"*bool(suffixes))
    return found

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
def patient(k): return phantoms.abdomen((56, 48, 40), seed=k)
for k in range(3):
    p = patient(k)
    for end, img in (("_0000", p.img), ("_0001", np.where(p.img > -500, 400 - np.abs(p.img - 60), 0))):
        write_volume(Volume(img.astype(np.int16), affine_from(p.spacing)), root/f"p{k}{end}.nii.gz")
    (root/"masks").mkdir(exist_ok=True)
    for end in ("_0000", "_0001"):
        write_volume(Volume(p.lbl.astype(np.uint8), affine_from(p.spacing)), root/"masks"/f"p{k}{end}.nii.gz")
[c.name for c in read_cases(root)], [c.name for c in read_cases(root, ("_0000", "_0001"))]

# %%
assert len(read_cases(root)) == 6 and len(read_cases(root, ("_0000", "_0001"))[0].images) == 2
with raises(DataError, match="holds no scans with the ends"): read_cases(root, ("_0000", "_0007"))
with raises(MissingFile): read_cases(root/"nowhere")
(root/"p0_0000.mha").touch()
with raises(DataError, match="several scans are called 'p0_0000'"): read_cases(root)
(root/"p0_0000.mha").unlink()

# %% [markdown]
# ## Three kinds of samples
# `ViewSet`: two views of one scan. `OrganSet`: two whole volumes of different cases with organ labels, for the semantic
# head. `PairSet`: the same place in a registered CT and MR: a box of the MR's foreground, and the box of the CT at the
# same millimetres, each with its own scale, rotation, contrast and slightly moved faces. A scan that cannot be used
# (damaged, empty, too small) is logged and replaced by another one that the sample's own generator picks, so a bad file
# neither stops a run nor changes it from one start to the next.

# %%
#| export
class _Shelf:
    "Sources that are open; those in memory are dropped, oldest first, beyond a number of bytes"
    def __init__(self, cache_bytes: int): self.cache_bytes, self.open = cache_bytes, OrderedDict()
    def __getstate__(self) -> dict: return {"cache_bytes": self.cache_bytes, "open": OrderedDict()}

    def get(self, key: Any, make: Any) -> Source:
        if key in self.open: self.open.move_to_end(key)
        else: self.open[key] = make()
        size = lambda s: sum(a.nbytes for a in (s.data, s.mask, s.regions) if isinstance(a, np.ndarray))
        while len(self.open) > 1 and sum(map(size, self.open.values())) > self.cache_bytes:
            self.open.popitem(last=False)
        return self.open[key]

@dataclass(eq=False)
class _Set:
    "What the three kinds have in common: cases, and sources that stay open"
    cases: Sequence[Case] # what samples are made of
    spacing: float = 2.0 # of a view at scale 1 [mm]
    cache_bytes: int = 2 << 30 # scans kept in memory, with their masks and regions

    def __post_init__(self):
        if not len(self.cases): raise DataError("data set: has no cases")
        self._shelf = _Shelf(self.cache_bytes)
    def __len__(self) -> int: return len(self.cases)
    @property
    def keys(self) -> list[str]: return [c.name for c in self.cases] # names of the items

    def _source(self, case: Case, k: int, contrast: Any, mask: bool = True, regions: Sequence[Any] = ()) -> Source:
        def make() -> Source:
            given = case.masks[k] if mask and case.masks else None, regions[k] if regions else None
            return open_source(case.images[k], *given, contrast=contrast, name=f"{case.name}[{k}]")
        return self._shelf.get((case.name, k), make)

    def draw(
        self,
        index: int, # of a case
        rng: np.random.Generator, # of this sample
    ) -> dict[str, Any]: # the sample
        "Make a sample; one that cannot be made is logged and replaced by another case"
        for _ in range(20):
            try: return {"index": index, **self.make(index, rng)}
            except MedvolError as e:
                log.warning("%s is replaced: %s", self.cases[index].name, e)
                index = int(rng.integers(len(self.cases)))
        raise DataError(f"20 of {len(self.cases)} cases in a row cannot be used, the last is {self.cases[index].name}; "
                        "see the log")

@dataclass(eq=False)
class ViewSet(_Set):
    "Two views of one scan"
    sampler: ViewSampler = ViewSampler() # how they are cut
    augment: Augment = AUGMENTS["plain"] # how their contrast is changed
    odds: Sequence[float] | None = None # chances of the images of a case; default: equal
    contrasts: Sequence[Literal["auto"] | Contrast] | None = None # of the images of a case; default: found out

    def make(
        self,
        index: int, # of a case
        rng: np.random.Generator, # of this sample
    ) -> dict[str, Any]: # images and valid (2, z, y, x), matrix (2, 3, 3), offset (2, 3)
        "Cut two views and change their contrast"
        case = self.cases[index]
        p = np.ones(len(case.images)) if self.odds is None else np.array(self.odds[:len(case.images)], float)
        k = int(rng.choice(len(case.images), p=p/p.sum())) if len(p) > 1 else 0
        source = self._source(case, k, self.contrasts[k] if self.contrasts else "auto",
                              regions=case.regions if self.augment.regions else ())
        pair = self.sampler(source, rng)
        images = [augment(v.image, rng, self.augment, spacing=np.linalg.norm(v.matrix, axis=0), mask=v.mask,
                          regions=v.regions, contrast=source.contrast) for v in pair.views]
        return {"images": np.stack(images), "matrix": pair.matrix, "offset": pair.offset, "valid": pair.valid}

def _whole(source: Source, low: np.ndarray, high: np.ndarray, spacing: float, scale: float, turn: np.ndarray) -> View:
    "Sample the box between two indices of a source, at a voxel size of `scale * spacing`, turned about its centre"
    shape = np.maximum(1, np.floor((high - low)*source.spacing/(spacing*scale) + 0.501)).astype(int)
    matrix = source.affine[:3, :3]/source.spacing @ turn*(spacing*scale)
    centre = source.affine[:3, :3] @ ((low + high - 1)/2) + source.affine[:3, 3]
    return sample_view(source, matrix, centre - matrix @ ((shape - 1)/2), shape.tolist())

@dataclass(eq=False)
class OrganSet(_Set):
    "Two whole volumes with organ labels, which are the masks of the cases"
    crop: tuple[int, int, int] = (120, 180, 180) # (z, y, x) largest size; an axis longer by more than 10 is cut [voxel]
    augment: Augment = AUGMENTS["blur"] # how their contrast is changed
    contrast: Literal["auto"] | Contrast = "auto" # of all scans

    def make(
        self,
        index: int, # of a case
        rng: np.random.Generator, # of this sample
    ) -> dict[str, Any]: # two volumes and two labels, each (z, y, x)
        "Take a case and another one, at random places if they are large"
        out: dict[str, list] = {"volumes": [], "labels": []}
        for case in (self.cases[index], self.cases[int(rng.integers(len(self.cases)))]):
            if not case.masks: raise DataError(f"{case.name}: has no organ labels")
            source = self._source(case, 0, self.contrast, mask=False, regions=case.masks)
            most = np.array(self.crop)*self.spacing/source.spacing # in voxels of the source
            size = np.array(source.shape)
            cut = size > most + 10*self.spacing/source.spacing
            low = np.where(cut, np.floor(rng.random(3)*(size - most)), 0)
            view = _whole(source, low, np.where(cut, low + most, size), self.spacing, 1.0, np.eye(3))
            if not view.regions.any(): raise DataError(f"{case.name}: no organ in the part that was cut")
            out["volumes"].append(augment(view.image, rng, self.augment, spacing=self.spacing))
            out["labels"].append(view.regions.astype(np.int64))
        return out

@dataclass(eq=False)
class PairSet(_Set):
    "The same place in a registered CT and MR: cases of two images in one world"
    crop: tuple[int, int, int] = (104, 128, 128) # (z, y, x) largest size of the common box [voxel]
    jitter: int = 10 # each face of the box is moved by up to this, in either image [voxel]
    scale: tuple[float, float] = (0.8, 1.2) # range of the voxel size, relative to `spacing`
    degrees: float = 5.0 # largest rotation about each axis
    augment: Augment = AUGMENTS["aggressive"] # how their contrast is changed
    contrasts: tuple[Contrast, Contrast] = ("ct", "mr") # of the two images

    def make(
        self,
        index: int, # of a case
        rng: np.random.Generator, # of this sample
    ) -> dict[str, Any]: # lists of two: images, valid and mask (z, y, x); matrix (2, 3, 3) and offset (2, 3)
        "Cut a box of the MR's foreground out of both images"
        case = self.cases[index]
        if len(case.images) != 2: raise DataError(f"{case.name}: a pair has two images, got {len(case.images)}")
        ct, mr = (self._source(case, k, c) for k, c in enumerate(self.contrasts))
        low, high = (mr.inside.min(axis=0), mr.inside.max(axis=0) + 1) if mr.mask is not None and len(mr.inside) \
            else mr.box
        size = np.minimum(high - low, np.array(self.crop)*self.spacing/mr.spacing)
        low = low + rng.random(3)*(high - low - size)
        centre, extent = mr.affine[:3, :3] @ (low + (size - 1)/2) + mr.affine[:3, 3], size*mr.spacing
        views = [self._cut(source, centre, extent, rng) for source in (ct, mr)]
        images = [augment(v.image, rng, self.augment, spacing=np.linalg.norm(v.matrix, axis=0), mask=v.mask)
                  for v in views]
        masks = [v.image > -25 if v.mask is None else v.mask for v in views]
        for name, mask in zip(("CT", "MR"), masks):
            if not mask.any(): raise DataError(f"{case.name}: the {name} shows nothing where the box is")
        return {"images": images, "valid": [v.valid for v in views], "mask": masks,
                "matrix": np.stack([v.matrix for v in views]), "offset": np.stack([v.offset for v in views])}

    def _cut(self, source: Source, centre: np.ndarray, extent: np.ndarray, rng: np.random.Generator) -> View:
        "The box in one image, its faces moved, clipped to the image"
        scale = rng.uniform(*self.scale)
        at = np.linalg.solve(source.affine[:3, :3], centre - source.affine[:3, 3])
        half, shift = extent/source.spacing/2, self.spacing*scale/source.spacing
        moved = rng.integers(-self.jitter, self.jitter + 1, (2, 3))*shift
        low = np.clip(at - half + 0.5 + moved[0], 0, np.array(source.shape) - 1)
        high = np.clip(at + half + 0.5 + moved[1], low + 1, source.shape)
        turn = Rotation.from_euler("xyz", rng.uniform(-self.degrees, self.degrees, 3), degrees=True).as_matrix()
        return _whole(source, low, high, self.spacing, scale, turn)

# %%
suffixes = ("_0000", "_0001")
view_set = ViewSet(read_cases(root, suffixes), sampler=ViewSampler(patch=(16, 32, 32), spacing=4), odds=(0.6, 0.4))
organ_set = OrganSet([c for c in read_cases(root) if c.name.endswith("_0000")], crop=(24, 32, 32), spacing=4)
pair_set = PairSet(read_cases(root, suffixes), crop=(20, 28, 28), jitter=2, spacing=4)
sample = pair_set.draw(0, rng_for(3, "pair"))
two_organs = organ_set.draw(1, rng_for(3, "organs"))
fig, axs = plt.subplots(1, 4, figsize=(7, 2), layout="constrained")
for ax, a, name in zip(axs, [*sample["images"], two_organs["volumes"][0], two_organs["labels"][0]],
                       ("CT", "MR", "volume", "labels")):
    ax.imshow(a[len(a)//2], cmap="tab20" if name == "labels" else "Greys_r", interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=f"{name} {'x'.join(map(str, a.shape))}")

# %% [markdown]
# The two boxes of a pair show the same places: where the MR shows an organ, the CT does at the same millimetres, to a
# voxel.

# %%
plain = replace(pair_set, augment=AUGMENTS["none"])
for k in range(5):
    s = plain.draw(k % 3, rng_for(k, "law"))
    (ct_img, mr_img), M, c = s["images"], s["matrix"], s["offset"]
    q = np.argwhere(s["mask"][1])
    at = np.round((q @ M[1].T + c[1] - c[0]) @ np.linalg.inv(M[0]).T).astype(int)
    inside = ((at >= 0) & (at < ct_img.shape)).all(axis=1)
    near = ndimage.binary_dilation(s["mask"][0], np.ones((3, 3, 3)))
    assert inside.mean() > 0.5 and near[tuple(at[inside].T)].mean() > 0.99
assert organ_set.draw(0, rng_for(1))["labels"][0].max() > 0

# %% [markdown]
# A damaged file is replaced, the same way in every run:

# %%
(root/"p9_0000.nii.gz").write_bytes(b"not a scan")
broken = ViewSet(read_cases(root), sampler=ViewSampler(patch=(16, 32, 32), spacing=4))
bad = broken.keys.index("p9_0000")
first, second = (broken.draw(bad, rng_for(0, "bad")) for _ in range(2))
(root/"p9_0000.nii.gz").unlink()
broken.keys[first["index"]]

# %%
assert first["index"] == second["index"] != bad and np.array_equal(first["images"], second["images"])
lost = ViewSet([Case("x", (root/"nothing.nii.gz",))])
with raises(DataError, match="20 of 1 cases in a row"): lost.draw(0, rng_for(0))

# %% [markdown]
# ## Batches for training
# `MixedBatches` joins sets and sampler into what [`fit`](08a_torchcore.ipynb) takes. A batch is a dict; `branch` names
# its kind.

# %%
#| export
def collate(
    items: Sequence[tuple[str, Mapping[str, Any]]], # (kind, sample) of each slot
) -> dict[str, Any]: # tensors with the batch in front; 'volumes' and 'labels' are lists, 'pairs' a list of dicts
    "Make a batch of samples; kinds whose samples differ in size stay lists"
    kinds = list(dict.fromkeys(k for k, _ in items))
    out: dict[str, Any] = {"branch": kinds[0] if len(kinds) == 1 else "all"}
    tensor = lambda a: [torch.from_numpy(x) for x in a] if isinstance(a, list) else torch.from_numpy(np.asarray(a))
    for kind in kinds:
        of = [s for k, s in items if k == kind]
        if "volumes" in of[0]:
            for key in ("volumes", "labels"): out[key] = [torch.from_numpy(a) for s in of for a in s[key]]
        elif isinstance(of[0]["images"], list):
            out["pairs"] = [{k: tensor(v) for k, v in s.items() if k != "index"} for s in of]
        else: out |= {k: torch.from_numpy(np.stack([s[k] for s in of])) for k in of[0] if k != "index"}
    out["index"] = torch.tensor([s["index"] for _, s in items])
    return out

class _Joined(torch.utils.data.Dataset):
    "Several sets as one; addressed by the draws of a sampler"
    def __init__(self, sets: Mapping[str, Sequence[Any]], seed: int):
        self.sets, self.seed = sets, seed
        self.starts = {k: np.cumsum([0, *map(len, group)]) for k, group in sets.items()}
        self.first = dict(zip(sets, np.cumsum([0, *(s[-1] for s in self.starts.values())])))
        self.keys = [name for group in sets.values() for s in group for name in s.keys]
    def __len__(self) -> int: return len(self.keys)
    def __getitem__(self, key: tuple) -> tuple[str, dict[str, Any]]:
        d = Draw(*key)
        at, starts = d.index - self.first[d.kind], self.starts[d.kind]
        which = int(np.searchsorted(starts, at, side="right")) - 1
        sample = self.sets[d.kind][which].draw(int(at - starts[which]), d.rng(self.seed))
        return d.kind, {**sample, "index": int(sample["index"] + self.first[d.kind] + starts[which])}

class MixedBatches:
    "Batches of several kinds of samples, for `fit`"
    def __init__(
        self,
        sets: Mapping[str, Sequence[Any]], # kind -> sets (`ViewSet`, `OrganSet`, `PairSet`)
        slots: Mapping[str, int], # samples of each kind in a batch, in each process
        *,
        odds: Mapping[str, float] | None = None, # a batch has one kind, with these odds; None: all kinds
        per_epoch: int | None = None, # steps in an epoch; default: items of the largest kind over its slots
        seed: int = 0, # names order and draws
        workers: int = 0, # loading processes; 0: in this process
    ):
        self.sets, self.slots, self.odds, self.seed, self.workers = sets, dict(slots), odds, seed, workers
        self.dataset = _Joined(sets, seed)
        self.per_epoch = per_epoch
        self.sampler() # refuses what does not fit together

    def sampler(
        self,
        rank: int = 0, # this process
        world: int = 1, # processes that share the work
    ) -> MixedBatchSampler: # what is in which batch
        "The order of the batches"
        lengths = {k: int(s[-1]) for k, s in self.dataset.starts.items()}
        return MixedBatchSampler(lengths, slots=self.slots, odds=self.odds, seed=self.seed, rank=rank, world=world)

    def steps(
        self,
        world: int = 1, # processes that share the work
    ) -> int: # at least one
        "Steps in an epoch"
        if self.per_epoch: return self.per_epoch
        return max([1, *(int(s[-1])//(self.slots[k]*world) for k, s in self.dataset.starts.items() if self.slots[k])])

    def epoch(
        self,
        epoch: int, # from 0
        start: int = 0, # first step
        rank: int = 0, # this process
        world: int = 1, # processes that share the work
    ) -> Iterator[tuple[list[int], dict[str, Any]]]: # (items, batch)
        "Batches of one process from step `start` to the end of the epoch"
        sampler, n = self.sampler(rank, world), self.steps(world)
        batches = [[tuple(d) for d in sampler.batch(b)] for b in range(epoch*n + start, (epoch + 1)*n)]
        extra = {"prefetch_factor": 2} if self.workers else {}
        loader = torch.utils.data.DataLoader(self.dataset, batch_sampler=batches, collate_fn=collate,
                                             num_workers=self.workers, generator=torch.Generator(), **extra)
        for batch in loader: yield batch["index"].tolist(), batch

# %%
batches = MixedBatches({"views": [view_set], "organs": [organ_set]}, {"views": 2, "organs": 1},
                       odds={"views": 0.6, "organs": 0.4}, per_epoch=8)
seen = [b for _, b in batches.epoch(0)]
[(b["branch"], tuple(b["images"].shape) if "images" in b else len(b["volumes"])) for b in seen]

# %% [markdown]
# Loading processes and a later start change no bit; a batch loads what its branch needs and nothing else.

# %%
def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    return all(same(x, y) for x, y in zip(a, b)) if isinstance(a, list) else a == b

batches.workers = 2
later = [b for _, b in batches.epoch(0, start=4)]
for a, b in zip(later, seen[4:]): assert a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
for b in seen: assert ("images" in b) == (b["branch"] == "views") and ("labels" in b) == (b["branch"] == "organs")

# %%
place.cleanup()
