# %% [markdown]
# # Patches as a data set
#
# > Normalised images, decoded targets and masks from chunked stores: the same samples for any number of workers.
#
# The patch finder says where to look, the pages before say what the numbers mean and how a sample may move. What is
# left is to bring them together a few hundred times a second, from stores that are larger than memory, in processes
# that come and go. Three rules keep that honest. A sample depends on its index and its random stream, on nothing that
# happened before. Statistics for normalisation are found once, stored, and used again in prediction. And a volume that
# does not fit its labels is refused when the data set is made, not in the third epoch.

# %%
#| default_exp zarrnet.data

# %%
#| export
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from medvol_nb.core import ConfigError, DataError, log, rng_for
from medvol_nb.intensity import Normalizer
from medvol_nb.parallel import pmap
from medvol_nb.torchcore import Batches
from medvol_nb.zarrnet.augment import Augment
from medvol_nb.zarrnet.config import Target, VolumeEntry, ZarrConfig
from medvol_nb.zarrnet.decode import LabelRule, decode_label, label_rule, target_patch
from medvol_nb.zarrnet.io import ChunkedVolume
from medvol_nb.zarrnet.patches import PatchList, grouped_order, open_entries

# %%
import tempfile
from pathlib import Path

from medvol_nb import phantoms, plot
from medvol_nb.config import check_config
from medvol_nb.core import close, raises
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet.augment import AugmentConfig, Flip, Rot90
from medvol_nb.zarrnet.geometry import encode_normals, normals_rgb
from medvol_nb.zarrnet.patches import patch_list

# %% [markdown]
# ## Two rolls to learn from
# Each has an image, a sheet mask and normals in 16 bits, as stores of their own.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)

def write_roll(name, seed, shape=(48, 72, 72)):
    roll = phantoms.sheets(shape, seed)
    affine = affine_from(1.0, axes="zyx")
    write_zarr(Volume(roll.img, affine, "zyx"), root/f"{name}.zarr", chunks=24)
    write_zarr(Volume(roll.mask, affine, "zyx"), root/f"{name}_sheet.zarr", chunks=24)
    write_zarr(Volume(encode_normals(roll.normals[::-1]), affine, "czyx"), root/f"{name}_normals.zarr", chunks=24)
    return {"input": str(root/f"{name}.zarr"), "sheet": str(root/f"{name}_sheet.zarr"),
            "normals": str(root/f"{name}_normals.zarr")}

settings = {
    "tr_params": {"patch_size": [16, 32, 32], "batch_size": 2, "dilate_label": False},
    "model_config": {"f_maps": [8, 16]},
    "dataset_config": {"volume_paths": [write_roll("a", 0), write_roll("b", 1)], "use_cache": False,
                       "min_bbox_percent": 0.5, "min_labeled_ratio": 0.05,
                       "targets": {"sheet": {"channels": 1}, "normals": {"channels": 3, "weight": 0.75}}}}
cfg = check_config(ZarrConfig, settings)
patches = patch_list(cfg)
len(patches.starts), patches.starts[:3].tolist()

# %% [markdown]
# The page on patches opens volumes and refuses those that do not fit together. Here they get names.

# %%
#| export
@dataclass(frozen=True)
class Source:
    "An opened volume with its labels; no voxel is read yet"
    name: str # of the volume
    entry: VolumeEntry # its settings
    image: ChunkedVolume # input
    labels: Mapping[str, ChunkedVolume | None] # target -> stored labels; None: unlabelled here
    ignore: ChunkedVolume | None = None # nothing is learned where this is not zero

def open_sources(
    cfg: ZarrConfig, # settings with volumes and targets
    *,
    cache_bytes: int = 0, # decoded chunks kept by each process, over all arrays [byte]
    reader: Literal["auto", "zarr", "tensorstore"] = "auto", # see `open_volume`
) -> list[Source]: # one a volume, in the order of the settings
    "Open all volumes of a training; see `open_entries` for what is checked"
    n_arrays = sum(1 + sum(p is not None for p in e.paths.values()) + (e.ignore_mask is not None) for e in cfg.volumes)
    opened = open_entries(cfg, cache_bytes=cache_bytes//max(1, n_arrays), reader=reader)
    return [Source(e.name, e, v["input"], {t: v.get(t) for t in cfg.targets}, v.get("ignore_mask"))
            for e, v in zip(cfg.volumes, opened)]

# %%
[(s.name, s.image.shape, s.labels["normals"].channels) for s in open_sources(cfg)]

# %% [markdown]
# ## Normalisation
# If every patch is normalised by itself, a voxel enters the network with another value in the next patch, and the seam
# can be seen in the output. So statistics belong to a *volume* (`zscore`, `minmax`, `robust`) or to all training
# volumes (`ct_normalization`: the foreground's percentiles, mean and deviation). They come from blocks of 64³ voxels in
# a seeded order, until a million voxels are found, 4096 blocks or everything was read. Which blocks are taken depends
# on shape and content alone, not on the file format; in a large volume, blocks in which nothing varies are passed over,
# since most of it may be empty. Channels are normalised one by one, except by `zscore_patch`, which is there for
# networks trained elsewhere.

# %%
#| export
_SCOPES = {"none": "fixed", "scale": "fixed", "zscore_patch": "patch", "minmax": "volume", "zscore": "volume",
           "robust": "volume", "ct_normalization": "pool"}
_BLOCK, _MOST_BLOCKS = 64, 4096

def _blocks(volume: ChunkedVolume, bbox: Sequence | None, seed: int) -> Iterator[tuple[list[slice], bool]]:
    "Blocks in a seeded order, and whether anything is stored there"
    low, high = zip(*(bbox or [(0, n) for n in volume.shape]))
    counts = [-(-(b - a)//_BLOCK) for a, b in zip(low, high)]
    listed = volume.stored_chunks() if volume.fill_value == 0 else None
    if listed is not None:
        unit = volume.shards or volume.chunks
        stored = np.zeros([-(-n//u) for n, u in zip(volume.shape, unit)], bool)
        stored[tuple(np.array(listed, np.int64).reshape(-1, 3).T)] = True
    for k in rng_for(seed, "statistics", *volume.shape, *low, *high).permutation(int(np.prod(counts))):
        start = [a + int(i)*_BLOCK for a, i in zip(low, np.unravel_index(k, counts))]
        box = [slice(s, min(s + _BLOCK, b)) for s, b in zip(start, high)]
        yield box, listed is None or stored[tuple(slice(s.start//u, -(-s.stop//u)) for s, u in zip(box, unit))].any()

def _values(image: ChunkedVolume, bbox: Sequence | None, seed: int, min_voxels: int, label: ChunkedVolume | None = None,
            rule: LabelRule | None = None) -> list[np.ndarray]:
    "(c, n) values of the image; with labels only those on foreground"
    out, total, reads = [], 0, 0
    size = np.prod([b - a for a, b in bbox] if bbox else image.shape, dtype=np.int64)
    by = image if label is None else label
    for box, stored in _blocks(by, bbox, seed):
        if total >= min_voxels or reads >= _MOST_BLOCKS: break
        if size > min_voxels and not stored: continue
        reads += 1
        if label is not None:
            value, valid = decode_label(label[tuple(box)], rule)
            on = (value != 0).any(0) & valid[0]
            if not on.any(): continue
        block = image[tuple(box)]
        block = block if block.ndim == 4 else block[None]
        if label is None and size > min_voxels and block.min() == block.max(): continue
        out.append(block.reshape(len(block), -1) if label is None else block[:, on])
        total += out[-1].shape[1]
    return out

def fit_volume(
    image: ChunkedVolume, # input
    scheme: str, # "zscore", "minmax" or "robust"
    *,
    bbox: Sequence[Sequence[int]] | None = None, # [from, to) of z, y and x that count [voxel]; None: all
    seed: int = 0, # which blocks
    min_voxels: int = 10**6, # read at least so many, everything, or 4096 blocks
) -> tuple[Normalizer, ...]: # one a channel
    "Normalisation of one volume from a sample of it"
    if _SCOPES.get(scheme) != "volume":
        raise ConfigError(f"normalization: {scheme!r} is not fitted to a volume, only zscore, minmax and robust are")
    values = _values(image, bbox, seed, min_voxels)
    if not values:
        log.warning("%s: nothing varies in the sample, the normalised image will be 0", image.path)
        values = [np.full((image.channels or 1, 1), image.fill_value, image.dtype)]
    return tuple(Normalizer.parse(scheme).fit((v[c], None) for v in values) for c in range(len(values[0])))

# %%
#| export
@dataclass(frozen=True)
class ImageNormalizer:
    "The normalisation of a training: what `fit_normalizer` found, and what goes into the checkpoint"
    scheme: str # dataset_config.normalization
    volumes: Mapping[str, tuple[Normalizer, ...]] = field(default_factory=dict) # volume -> one a channel
    shared: tuple[Normalizer, ...] = () # one a channel, for schemes that do not depend on the volume

    def __call__(
        self,
        raw: np.ndarray, # (c, z, y, x) or (z, y, x) as stored
        volume: str = "", # name of the volume it is from
    ) -> np.ndarray: # (c, z, y, x) float32
        "Normalise a patch"
        raw = raw if raw.ndim == 4 else raw[None]
        scope = _SCOPES[self.scheme]
        if scope in ("patch", "fixed"): return Normalizer.parse(self.scheme)(raw)
        norms = self.shared if scope == "pool" else self.volumes.get(volume, ())
        if not norms:
            raise DataError(f"normalization {self.scheme!r}: no statistics of volume {volume!r}, only of "
                            f"{sorted(self.volumes)}. Add them: normalizer.with_volume(name, volume)")
        if len(norms) != len(raw):
            raise DataError(f"normalization {self.scheme!r}: was fitted to {len(norms)} channels, got {len(raw)}")
        return np.stack([n(c) for n, c in zip(norms, raw)])

    def with_volume(
        self,
        name: str, # of the volume
        volume: ChunkedVolume, # its image
        **settings: Any, # bbox, seed and min_voxels of `fit_volume`
    ) -> "ImageNormalizer": # knows this volume, too
        "Add the statistics of another volume, if the scheme has any; for prediction"
        if _SCOPES[self.scheme] != "volume" or name in self.volumes: return self
        return replace(self, volumes={**self.volumes, name: fit_volume(volume, self.scheme, **settings)})

    def to_dict(self) -> dict[str, Any]: # JSON-able
        "Plain values for caches and checkpoints"
        return {"scheme": self.scheme, "volumes": {k: [n.to_dict() for n in v] for k, v in self.volumes.items()},
                "shared": [n.to_dict() for n in self.shared]}

    @classmethod
    def from_dict(
        cls,
        d: Mapping[str, Any], # as from `to_dict`
    ) -> "ImageNormalizer":
        "Rebuild it from plain values"
        if d.get("scheme") not in _SCOPES:
            raise ConfigError(f"normalization: must be one of {', '.join(_SCOPES)}, got {d.get('scheme')!r}")
        return cls(d["scheme"], {k: tuple(map(Normalizer.from_dict, v)) for k, v in d.get("volumes", {}).items()},
                   tuple(map(Normalizer.from_dict, d.get("shared", ()))))

def _fit_one(source: Source, scheme: str, seed: int, min_voxels: int) -> list[dict]:
    return [n.to_dict() for n in fit_volume(source.image, scheme, bbox=source.entry.bbox, seed=seed,
                                            min_voxels=min_voxels)]

def _foreground(source: Source, target: Target, seed: int, min_voxels: int) -> list[np.ndarray]:
    label = source.labels[source.entry.ref_label]
    rule = label_rule(f"{source.name}, {source.entry.ref_label}", target, label.dtype)
    return _values(source.image, source.entry.bbox, seed, min_voxels, label, rule)

def fit_normalizer(
    cfg: ZarrConfig, # settings; dataset_config.normalization says which
    train: Sequence[int] | None = None, # volumes that count for ct_normalization; None: all but those with split: val
    *,
    sources: Sequence[Source] | None = None, # if they are open already
    min_voxels: int = 10**6, # of each volume, or everything
    workers: int = 0, # processes, see `pmap`
) -> ImageNormalizer: # fitted
    "Find the statistics that the normalisation of a training needs"
    scheme, seed, sources = cfg.dataset_config.normalization, cfg.tr_params.seed, sources or open_sources(cfg)
    if _SCOPES[scheme] == "volume":
        found = pmap(partial(_fit_one, scheme=scheme, seed=seed, min_voxels=min_voxels), sources, workers,
                     keys=[s.name for s in sources], desc="image statistics")
        return ImageNormalizer(scheme, {s.name: tuple(map(Normalizer.from_dict, f)) for s, f in zip(sources, found)})
    if _SCOPES[scheme] != "pool": return ImageNormalizer(scheme)
    chosen = [s for i, s in enumerate(sources) if (s.entry.split != "val" if train is None else i in set(train))]
    values = [v for s in chosen for v in _foreground(s, cfg.targets[s.entry.ref_label], seed, min_voxels)]
    if not values: raise DataError(f"normalization {scheme!r}: no foreground in {[s.name for s in chosen]}")
    return ImageNormalizer(scheme, shared=tuple(Normalizer.parse(scheme).fit((v[c], None) for v in values)
                                                for c in range(len(values[0]))))

# %%
normalizer = fit_normalizer(cfg)
{name: {k: round(v, 2) for k, v in n[0].stats.items()} for name, n in normalizer.volumes.items()}

# %%
first = open_sources(cfg)[0].image
image = normalizer(first[...], "a")
assert close(image.mean(), 0, 1e-4) and close(image.std(), 1, 1e-4)
assert ImageNormalizer.from_dict(normalizer.to_dict()) == normalizer
assert normalizer.with_volume("new", first).volumes["new"] == normalizer.volumes["a"]

# %%
with raises(DataError, match="no statistics of volume 'z', only of .*with_volume"): normalizer(first[:4], "z")

# %% [markdown]
# ## The data set
# `draw(i, rng)` is what training calls: one number is taken from `rng`, the *seed* of the sample, and everything random
# follows from it. The seed is part of the sample (`meta`), so any sample ever seen can be made again:
# `dataset.sample(i, seed)`. Without `augment`, for validation, nothing is random.
#
# A patch that sticks out of its volume (`pad_small`) shows the image mirrored and has mask 0 there. A target without
# labels in this volume is zero with mask 0.

# %%
#| export
class VolumeDataset:
    "Patches of chunked volumes as samples; `draw(i, rng)` for `torchcore.Batches`"
    def __init__(
        self,
        cfg: ZarrConfig, # settings
        patches: PatchList, # where to look
        index: Sequence[int] | None = None, # which of them, such as `Split.train`; None: all
        *,
        augment: Augment | None = None, # random changes; None: none, as in validation
        normalizer: ImageNormalizer | None = None, # None: fitted here
        cache_bytes: int = 0, # decoded chunks kept by each process, over all arrays [byte]
        reader: Literal["auto", "zarr", "tensorstore"] = "auto", # see `open_volume`
    ):
        self.targets, self.size = cfg.targets, tuple(cfg.tr_params.patch_size)
        self.sources = open_sources(cfg, cache_bytes=cache_bytes, reader=reader)
        if patches.patch_size != self.size or len(patches.names) != len(self.sources):
            raise DataError(f"data set: the patches are {patches.patch_size} in {len(patches.names)} volumes, the "
                            f"settings have {self.size} in {len(self.sources)}. Find the patches again")
        n, every = len(patches), np.asarray(range(len(patches)) if index is None else index, np.int64)
        if not len(every): raise DataError("data set: no patches were chosen")
        if every.min() < 0 or every.max() >= n:
            raise DataError(f"data set: index must lie in 0...{n - 1}, got {every.min()} to {every.max()}")
        self.index, self.patches = every, patches.take(every) # positions in the whole list; the patches of this set
        self._check_places(cfg.tr_params.pad_small)
        if augment is not None and augment.kinds != self.kinds:
            raise ConfigError(f"augment: was made for targets {augment.kinds}, the settings have {self.kinds}")
        used = np.unique(self.patches.volume_idx)
        self.augment, self.oversample = augment, cfg.tr_params.oversample_foreground
        self.normalizer = normalizer or fit_normalizer(cfg, used, sources=self.sources)
        first = {int(v): patches.starts[patches.volume_idx == v][0] for v in used} # the same for every index
        self.rules = {(v, t): self._rule(v, t, at) for v, at in first.items() for t in self.targets
                      if self.sources[v].labels[t] is not None}

    def _check_places(self, pad_small: bool) -> None:
        shapes = np.array([s.image.shape for s in self.sources])[self.patches.volume_idx]
        starts, ends = self.patches.starts, self.patches.starts + self.size
        inside = (starts < shapes) & (ends > 0) if pad_small else (starts >= 0) & (ends <= shapes)
        if not inside.all():
            k = int(np.flatnonzero(~inside.all(1))[0])
            raise DataError(f"data set: {int((~inside.all(1)).sum())} patches do not fit their volumes, such as "
                            f"{self.keys[k]} of size {self.size} in {tuple(shapes[k].tolist())}. Find the patches "
                            "again, or set tr_params.pad_small")

    def _rule(self, v: int, t: str, start: np.ndarray) -> LabelRule:
        label = self.sources[v].labels[t]
        sample = label.read(start, self.size)[0].reshape(label.channels or 1, *self.size)
        return label_rule(f"volume {self.sources[v].name!r}, target {t!r}", self.targets[t], label.dtype, sample)

    @property
    def kinds(self) -> dict[str, str]: # target -> kind
        "What a map must know about the targets"
        return {n: t.kind for n, t in self.targets.items()}

    @property
    def keys(self) -> list[str]: # one a sample, such as 'a at (0, 16, 32)'
        "Names of the samples, for messages of a training"
        return [f"{self.sources[v].name} at {tuple(p)}"
                for v, p in zip(self.patches.volume_idx.tolist(), self.patches.starts.tolist())]

    def __len__(self) -> int: return len(self.index)

    def __getitem__(
        self,
        i: int, # which sample
    ) -> dict[str, Any]: # as from `sample`
        "A sample without random changes"
        return self._load(i, 0)

    def draw(
        self,
        i: int, # which sample
        rng: np.random.Generator, # one number is taken
    ) -> dict[str, Any]: # as from `sample`
        "A sample with random changes"
        return self.sample(i, int(rng.integers(2**63)))

    def sample(
        self,
        i: int, # which sample
        seed: int, # `meta["seed"]` of a sample that was drawn
    ) -> dict[str, Any]: # image (c, z, y, x), targets, masks, and `meta`: volume, volume_idx, start (3), seed
        "Make the same sample again"
        out = self._load(i, seed)
        return out if self.augment is None else self.augment(out, rng_for(seed, "sample"))

    def _load(self, i: int, seed: int) -> dict[str, Any]:
        v, start = int(self.patches.volume_idx[i]), self.patches.starts[i]
        source = self.sources[v]
        out: dict[str, Any] = {"image": self.normalizer(_mirrored(source.image, start, self.size), source.name)}
        skip = None if source.ignore is None else source.ignore.read(start, self.size)[0].reshape(1, *self.size) != 0
        for t, target in self.targets.items():
            if source.labels[t] is None: value, mask = _nothing(target, self.size)
            else: value, mask = target_patch(source.labels[t], self.rules[v, t], start, self.size)
            if skip is not None: mask[skip] = 0
            out |= {t: value, f"{t}__mask": mask}
        return out | {"meta": {"volume": source.name, "volume_idx": v, "start": start.copy(), "seed": seed}}

    @property
    def weights(self) -> np.ndarray | None: # (n,) odds, for `Batches(weights=...)`; None: all equal
        "Odds of the samples from the weights of volumes and `oversample_foreground`"
        own = np.array([s.entry.weight for s in self.sources])[self.patches.volume_idx]
        if not own.sum() > 0: raise ConfigError("volume_paths: the weights of all volumes with patches are 0")
        out = own/own.sum()
        if self.oversample:
            by_label = own*np.maximum(self.patches.counts, 0)
            if by_label.sum() > 0: out = (1 - self.oversample)*out + self.oversample*by_label/by_label.sum()
        return None if np.ptp(out) == 0 else out

def _label_channels(target: Target) -> int: return 1 if target.kind == "multiclass" else target.channels

def _nothing(target: Target, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    "A target that is unlabelled: zeros, and mask 0"
    kind = np.int64 if target.kind == "multiclass" else np.float32
    return np.zeros((_label_channels(target), *size), kind), np.zeros((1, *size), np.uint8)

def _mirrored(image: ChunkedVolume, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    "(c, z, y, x) as stored; mirrored outside the volume"
    part, box = image.read(start, size)
    part = part if part.ndim == 4 else part[None]
    if part.shape[1:] == tuple(b.stop - b.start for b in box): return part
    return np.pad(part[(slice(None), *box)], [(0, 0), *((b.start, n - b.stop) for b, n in zip(box, size))], "reflect")

# %%
augment = Augment(AugmentConfig.only(flip=Flip(), rot90=Rot90()), {"sheet": "binary", "normals": "normals"})
train = VolumeDataset(cfg, patches, augment=augment, normalizer=normalizer)
sample = train.draw(3, rng_for(0, "item", 0, 3))
{k: (v.dtype.name, v.shape) for k, v in sample.items() if k != "meta"}, sample["meta"]

# %%
views = [train[3]] + [train.draw(3, rng_for(0, "item", epoch, 3)) for epoch in range(4)]
plot.montage([v["image"][0, 8] for v in views] + [v["sheet"][0, 8] for v in views] +
             [normals_rgb(v["normals"][:, 8]) for v in views], cols=5,
             titles=["as stored", *(f"epoch {k}" for k in range(4)), *[""]*10])

# %% [markdown]
# Laws: a sample can be made again from its seed, sheets and normals cover the same voxels after any change, and batches
# are the same whatever process makes them.

# %%
again = train.sample(3, sample["meta"]["seed"])
assert all(np.array_equal(again[k], sample[k]) for k in sample if k != "meta")
assert all(np.array_equal((v["normals"] != 0).any(0), v["sheet"][0] > 0) for v in views)
assert all(np.array_equal(v["normals__mask"][0] > 0, v["sheet"][0] > 0) and v["sheet__mask"].all() for v in views)
here, there = ([b for _, b in Batches(train, 2, workers=w).epoch(1)][:3] for w in (0, 2))
assert all((a["image"] == b["image"]).all() and a["meta"]["volume"] == b["meta"]["volume"] for a, b in zip(here, there))

# %%
with raises(DataError, match="no patches were chosen"): VolumeDataset(cfg, patches, [])
with raises(ConfigError, match="was made for targets"): VolumeDataset(cfg, patches, augment=Augment(None, {}))

# %% [markdown]
# ## Neighbours share chunks
# A patch of 64 × 192 × 192 in chunks of 128³ decodes eight times what it needs, and its neighbour decodes most of it
# again. A cache of decoded chunks helps only if neighbours come soon after each other. `GroupedBatches` arranges an
# epoch so: patches are grouped by the block of the volume they start in, groups come in random order, and every place
# in a batch walks through groups of its own. So a batch holds patches from far apart, and consecutive batches come from
# the same few blocks. The order does not depend on the number of workers.

# %%
#| export
class GroupedBatches(Batches):
    "Batches whose consecutive patches lie close together, for a cache of decoded chunks"
    def __init__(
        self,
        dataset: VolumeDataset, # patches
        batch_size: int = 1, # samples a step, in each process
        *,
        block: Sequence[int] | None = None, # (z, y, x) edge of a group [voxel]; default: two patches
        **settings: Any, # seed, workers, weights and collate of `Batches`
    ):
        super().__init__(dataset, batch_size, **settings)
        self.block = tuple(block or (2*n for n in dataset.size))
        if min(self.block) < 1: raise ConfigError(f"grouped batches: block must be >= 1 voxel, got {self.block}")

    def order(
        self,
        epoch: int, # from 0
        world: int = 1, # processes that share the work
    ) -> np.ndarray: # (steps, world * batch_size) dataset indices
        "Which items are in which global batch"
        items = super().order(epoch, world)
        stream = grouped_order(self.dataset.patches, items.ravel(), self.block, rng_for(self.seed, "groups", epoch))
        return stream.reshape(items.shape[1], items.shape[0]).T

# %%
plain, grouped = Batches(train, 2), GroupedBatches(train, 2, block=(16, 36, 36))
def jumps(batches):
    order = batches.order(0)
    volume, start = train.patches.volume_idx[order], train.patches.starts[order]
    return float(np.where(np.diff(volume, axis=0) == 0, np.abs(np.diff(start, axis=0)).max(2), 72).mean())
{"distance of consecutive patches, shuffled": round(jumps(plain), 1), "grouped": round(jumps(grouped), 1)}

# %%
assert sorted(grouped.order(2).ravel()) == sorted(plain.order(2).ravel())
assert jumps(grouped) < 0.7*jumps(plain) and not np.array_equal(grouped.order(0), grouped.order(1))
place.cleanup()
