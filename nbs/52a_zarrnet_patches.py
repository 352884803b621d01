# %% [markdown]
# # Patch lists and splits
#
# > Patches of all volumes of a training, kept in a cache that knows when it is stale, divided without shared voxels.
#
# A training needs two lists: patches to learn from, and patches to validate with. The reference system keeps the first
# in a file that it trusts for ever: whoever changes the patch size, a threshold, the order of volumes or the labels
# themselves goes on with the old positions, without a word. The second it draws at random from patches that overlap by
# half, anew in every run: 97 % of the voxels it validates with were trained on.
#
# Here the cache carries a key with everything that decides its content, and a digest of its own. And whole blocks of
# space are given to training or to validation, so that no voxel belongs to both.

# %%
#| default_exp zarrnet.patches

# %%
#| export
import hashlib
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.core import (ConfigError, DataError, FormatError, MedvolError, check_output, fingerprint, log,
                            parse_json, plain, rng_for, to_json, write_text)
from medvol_nb.parallel import on_cluster
from medvol_nb.zarrnet.config import VolumeEntry, ZarrConfig
from medvol_nb.zarrnet.finder import PatchTable, find_patches
from medvol_nb.zarrnet.io import ChunkedVolume, open_volume

# %%
import logging
import tempfile

import matplotlib.pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import raises
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr

# %% [markdown]
# ## The volumes of a training
# The settings name an input, labels and masks. Before any of them is searched, all are opened and compared: labels of
# another shape than their input would be cut at wrong places without an error. Everything that is wrong is reported
# at once.

# %%
#| export
_STORED_CHANNELS = {"binary": 1, "multiclass": 1, "normals": 3}

def _opened(cfg: ZarrConfig, index: int, options: Mapping[str, Any]) -> tuple[dict[str, ChunkedVolume], list[str]]:
    "What belongs to one volume of the settings, and what is wrong with it"
    entry, at = cfg.volumes[index], partial(cfg.place, "dataset_config", "volume_paths", index)
    problems: list[str] = []
    out: dict[str, ChunkedVolume] = {}
    def open_one(key: str, path: str, channels: int | None) -> None:
        axis = {"channel_axis": entry.axis_of(key), "channels": channels} if key not in ("mask", "ignore_mask") else {}
        try:
            found = open_volume(path, entry.level if key == "input" else 0, **axis, **options)
            if key != "input" and entry.level and "input" in out and found.shape != out["input"].shape:
                found = open_volume(path, entry.level, **axis, **options)
            out[key] = found
        except MedvolError as e: problems.append(f"{at(key)}: {e}")
    open_one("input", entry.input, cfg.dataset_config.in_channels)
    for name, target in cfg.targets.items():
        channels = _STORED_CHANNELS.get(target.kind, target.channels)
        if entry.paths.get(name): open_one(name, entry.paths[name], channels)
    for key in ("mask", "ignore_mask"):
        if getattr(entry, key): open_one(key, getattr(entry, key), None)
    return out, problems + _misfits(cfg, entry, at, out)

def _misfits(cfg: ZarrConfig, entry: VolumeEntry, at: Callable[[str], str], volumes: Mapping[str, ChunkedVolume]
             ) -> list[str]:
    "What does not fit to the input"
    if "input" not in volumes: return []
    shape, patch, out = volumes["input"].shape, cfg.tr_params.patch_size, []
    for key, v in volumes.items():
        if v.shape != shape: out.append(f"{at(key)}: shape {v.shape}, but the input has {shape}")
        if key in cfg.targets and cfg.targets[key].kind == "multiclass" and v.dtype.kind not in "iub":
            out.append(f"{at(key)}: {v.dtype} values, classes must be whole numbers")
        if key in ("mask", "ignore_mask") and v.channels: out.append(f"{at(key)}: has channels, a mask has none")
    if entry.bbox and any(hi > n for (_, hi), n in zip(entry.bbox, shape)):
        out.append(f"{at('bbox')}: {list(map(list, entry.bbox))} leaves the volume of {shape}")
    extent = [hi - lo for lo, hi in entry.bbox] if entry.bbox else shape
    padded = [cfg.tr_params.pad_small and e == n for e, n in zip(extent, shape)] # only what ends is padded
    small = [a for a, p, e, ok in zip("zyx", patch, extent, padded) if p > e and not ok]
    if small:
        what = "bbox" if entry.bbox else "input"
        sizes = [" x ".join(map(str, v)) for v in (extent, patch)]
        hint = "a larger bbox" if entry.bbox else "set tr_params.pad_small"
        out.append(f"{at(what)}: {sizes[0]} is smaller than the patch {sizes[1]} (axis {', '.join(small)}). Take a "
                   f"smaller patch, or {hint}")
    return out

def open_entries(
    cfg: ZarrConfig, # settings
    *,
    cache_bytes: int = 0, # decoded chunks kept for each array in each process [byte]
    reader: str = "auto", # see `open_volume`
) -> list[dict[str, ChunkedVolume]]: # for each "input", targets with labels, and "mask" and "ignore_mask" if given
    "Open the volumes of the settings, and refuse them together if anything is wrong"
    if not cfg.volumes: raise ConfigError("dataset_config.volume_paths: is empty, there is nothing to train with")
    options = {"cache_bytes": cache_bytes, "reader": reader}
    opened = [_opened(cfg, i, options) for i in range(len(cfg.volumes))]
    problems = [p for _, ps in opened for p in ps]
    channels = {v["input"].channels or 1 for v, _ in opened if "input" in v}
    if len(channels) > 1:
        problems.append(f"{cfg.place('dataset_config', 'volume_paths')}: inputs have {sorted(channels)} channels")
    if problems:
        raise ConfigError(f"{len(problems)} problem{'s'*(len(problems) > 1)} with the volumes: " + "; ".join(problems))
    return [v for v, _ in opened]

# %% [markdown]
# A roll in two volumes serves as the example: 32 slices each, the second annotated in part only.

# %%
folder = tempfile.TemporaryDirectory()
d = Path(folder.name)

def write(name, array): write_zarr(Volume(array, affine_from(1.0, axes="zyx"), "zyx"), d/f"{name}.zarr", chunks=32)

for name, seed in (("a", 0), ("b", 1)):
    roll = phantoms.sheets((32, 128, 128), seed=seed, pitch=20)
    write(name, roll.img)
    write(f"{name}_sheet", roll.mask*(np.arange(128) < (128 if name == "a" else 70)))

settings = {"tr_params": {"patch_size": [16, 32, 32], "tr_val_split": 0.8},
            "model_config": {"f_maps": [8, 16, 32]},
            "dataset_config": {"min_labeled_ratio": 0.15, "cache_file": str(d/"patches.json"),
                               "volume_paths": [{"input": str(d/f"{n}.zarr"), "sheet": str(d/f"{n}_sheet.zarr")}
                                                for n in "ab"],
                               "targets": {"sheet": {"channels": 1}}}}
cfg = ZarrConfig.model_validate(settings)
[{k: v.shape for k, v in entry.items()} for entry in open_entries(cfg)]

# %%
write("short", roll.mask[:, :100])
wrong = json.loads(json.dumps(settings))
wrong["dataset_config"]["volume_paths"][0]["sheet"] = str(d/"short.zarr")
wrong["dataset_config"]["volume_paths"][1]["input"] = str(d/"absent.zarr")
with raises(ConfigError, match=r"2 problems .*0.sheet: shape \(32, 100, 128\), but .*1.input: .*absent"):
    open_entries(ZarrConfig.model_validate(wrong))

# %% [markdown]
# ## The list
# Patches of all volumes, in the order of volumes and candidates.

# %%
#| export
@dataclass(frozen=True)
class PatchList:
    "Patches of several volumes"
    patch_size: tuple[int, int, int] # (z, y, x) [voxel]
    names: tuple[str, ...] # of the volumes
    volume_idx: np.ndarray # (n) int64, position in `names`
    starts: np.ndarray # (n, 3) int64, first voxel (z, y, x)
    counts: np.ndarray # (n) int64, labelled voxels; -1: not known
    bbox_frac: np.ndarray # (n) float64, tight box of the labelled voxels, as a fraction of the patch; nan: not known
    key: Mapping[str, Any] = field(default_factory=dict) # what decided the list

    def __len__(self) -> int: return len(self.starts)

    def take(
        self,
        index: np.ndarray, # (m) positions or (n) bool
    ) -> "PatchList": # of the same volumes
        "Some of the patches"
        return replace(self, volume_idx=self.volume_idx[index], starts=self.starts[index], counts=self.counts[index],
                       bbox_frac=self.bbox_frac[index])

    def digest(self) -> str: # 16 hexadecimal digits
        "Short hash of the patches themselves"
        return fingerprint([list(self.patch_size), list(self.names), self.volume_idx, self.starts])

def _joined(tables: Sequence[PatchTable], names: Sequence[str], key: Mapping[str, Any]) -> PatchList:
    volume = np.repeat(np.arange(len(tables)), [len(t) for t in tables])
    columns = (np.concatenate([getattr(t, k) for t in tables]) for k in ("starts", "counts", "bbox_frac"))
    return PatchList(tables[0].patch_size, tuple(names), volume, *columns, key)

# %% [markdown]
# ## A cache that knows when it is stale
# The key holds the search settings and, for each volume, what was searched: path, metadata, and the names, sizes and
# dates of the stored chunks. Any difference means a new search, and the log says what it was. Thresholds are special:
# candidates are kept down to half of them, so tighter ones only filter. The file is JSON with a line for each patch,
# and a digest over these lines tells whether they were damaged or edited. All lines have the same length, so that a
# hundred thousand of them are read as columns, in a fraction of the time that a JSON parser takes.

# %%
#| export
_VERSION = 1
_MARK, _END = b'"patches": [\n', b"\n]}\n"

def _key(cfg: ZarrConfig, volumes: Sequence[Mapping[str, ChunkedVolume]]) -> dict[str, Any]:
    "Everything that decides the list"
    data, tr = cfg.dataset_config, cfg.tr_params
    step = data.patch_step or tuple(max(1, p//2) for p in tr.patch_size)
    seen = []
    for e, v in zip(cfg.volumes, volumes):
        paths = {"label": v[e.ref_label], **{k: v[k] for k in ("mask", "ignore_mask") if k in v}}
        ignore = cfg.targets[e.ref_label].ignore_label
        seen.append({"name": e.name, "ref_label": e.ref_label, "bbox": e.bbox and [list(b) for b in e.bbox],
                     "ignore_label": None if ignore is None else str(ignore),
                     **{k: {"path": p.path, **p.fingerprint()} for k, p in paths.items()}})
    return plain({"patch_size": tr.patch_size, "step": step, "grid_origin": data.grid_origin,
                  "end_aligned": data.end_aligned, "pad_small": tr.pad_small, "labeled_ratio_of": data.labeled_ratio_of,
                  "min_bbox_percent": data.min_bbox_percent*data.cache_floor,
                  "min_labeled_ratio": data.min_labeled_ratio*data.cache_floor, "volumes": seen})

def _changes(old: Any, new: Any, asked: Mapping[str, float], at: str = "") -> list[str]:
    "Dotted names of what differs; a threshold may have been lower than what is asked for now"
    if at in asked and isinstance(old, (int, float)) and old <= asked[at]: return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [c for k in new | old for c in _changes(old.get(k), new.get(k), asked, f"{at}.{k}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [c for k, (a, b) in enumerate(zip(old, new)) for c in _changes(a, b, asked, f"{at}.{k}")]
    return [] if old == new else [at]

def _write_cache(path: Path, patches: PatchList) -> None:
    names = [json.dumps(n) for n in patches.names]
    columns = [patches.volume_idx, *patches.starts.T, patches.counts]
    wi, wz, wy, wx, wn = (max((len(str(v)) for v in (c.min(), c.max())), default=1) if len(c) else 1 for c in columns)
    wv = max(map(len, names))
    rows = ",\n".join(
        f'{{"volume_idx": {i:{wi}}, "volume": {names[i]:{wv}}, "start_pos": [{z:{wz}}, {y:{wy}}, {x:{wx}}], '
        f'"count": {n:{wn}}, "bbox_frac": {f:.17f}}}'
        for i, z, y, x, n, f in zip(*(c.tolist() for c in columns), patches.bbox_frac.tolist()))
    head = {"version": _VERSION, "key": patches.key, "digest": hashlib.sha256(rows.encode()).hexdigest()}
    write_text(path, f"{to_json(head)[:-2]},\n  {_MARK.decode()}{rows}{_END.decode()}")

def _whole(table: np.ndarray, start: int, stop: int) -> np.ndarray:
    "(n) int64 from one column of text (n, characters): digits, perhaps with blanks and a minus in front"
    column = table[:, start:stop]
    digits = np.where(column < ord("0"), 0, column - ord("0")).astype(np.int64)
    return digits@10**np.arange(stop - start)[::-1]*np.where((column == ord("-")).any(axis=1), -1, 1)

def _read_cache(path: Path) -> PatchList | list:
    "A list of patches as it was written; a bare list of the reference as it is"
    raw = path.read_bytes()
    if raw[:64].lstrip()[:1] == b"[": return parse_json(raw.decode("utf-8", "replace"), str(path))
    start, stop = raw.find(_MARK) + len(_MARK), len(raw) - len(_END)
    first = parse_json((raw[:start] + b"]}").decode("utf-8", "replace"), str(path))
    if not isinstance(first, dict) or first.get("version") != _VERSION or not isinstance(first.get("key"), dict):
        raise FormatError(f"{path}: not a patch cache of version {_VERSION}")
    rows = memoryview(raw)[start:max(start, stop)]
    if not raw.endswith(_END) or first.get("digest") != hashlib.sha256(rows).hexdigest():
        raise FormatError(f"{path}: damaged, or edited by hand")
    key, one = first["key"], bytes(rows[:4096]).split(b"\n")[0].rstrip(b",")
    size, names = tuple(key["patch_size"]), tuple(v["name"] for v in key["volumes"])
    if not one: return PatchList(size, names, *(np.zeros(s, np.int64) for s in (0, (0, 3), 0)), np.zeros(0), key)
    table = np.frombuffer(raw, np.uint8, len(rows) + 2, start).reshape(-1, len(one) + 2)
    at = [one.index(w) + len(w) for w in (b'_idx": ', b'_pos": [', b'"count": ', b'_frac": ')]
    ends = [one.index(c, a) for c, a in zip((b",", b"]", b",", b"}"), at)]
    commas = [at[1] - 1, *(at[1] + k for k, c in enumerate(one[at[1]:ends[1]]) if c == ord(",")), ends[1]]
    starts = np.stack([_whole(table, a + 1, b) for a, b in zip(commas, commas[1:])], axis=1)
    # all digits of the fraction as one number; it stands for a whole number of voxels
    frac = _whole(np.delete(table[:, at[3]:ends[3]], 1, axis=1), 0, ends[3] - at[3] - 1)/1e17
    volume = math.prod(size)
    return PatchList(size, names, _whole(table, at[0], ends[0]), starts, _whole(table, at[2], ends[2]),
                     np.rint(frac*volume)/volume, key)

def _bare(path: Path, found: list, key: Mapping[str, Any], shapes: Sequence[tuple], pad: bool) -> PatchList:
    "The reference's list, of which nothing is known but that the patches are inside"
    log.warning("%s: a bare list of the reference; nothing tells whether it fits these volumes and settings", path)
    names, size = tuple(v["name"] for v in key["volumes"]), tuple(key["patch_size"])
    def whole(v: Any) -> bool: return isinstance(v, int) and not isinstance(v, bool)
    for k, p in enumerate(found):
        i, s = (p.get("volume_idx"), p.get("start_pos")) if isinstance(p, dict) else (None, None)
        if not whole(i) or not 0 <= i < len(names) or not isinstance(s, list) or len(s) != 3 or \
                not all(map(whole, s)):
            raise FormatError(f"{path}, entry {k}: needs volume_idx below {len(names)} and start_pos of three numbers. "
                              "Remove the file to search again")
        if any(a < 0 or a + q > n for a, q, n in zip(s, size, shapes[i])) and not pad:
            raise DataError(f"{path}, entry {k}: the patch at {s} of size {size} leaves volume '{names[i]}' of "
                            f"{shapes[i]}. Remove the file to search again")
    idx, starts = (np.array([p[k] for p in found], np.int64) for k in ("volume_idx", "start_pos"))
    return PatchList(size, names, idx, starts.reshape(-1, 3), np.full(len(idx), -1), np.full(len(idx), np.nan), key)

# %% [markdown]
# `patch_list` is the front door. It never goes on with an empty list: the error says how many candidates there were,
# which test they failed and how near the best one came.

# %%
#| export
def _searched(cfg: ZarrConfig, volumes: Sequence[Mapping[str, ChunkedVolume]], workers: int) -> list[PatchTable]:
    data, tables = cfg.dataset_config, []
    for e, v in zip(cfg.volumes, volumes):
        tables.append(find_patches(
            v[e.ref_label], cfg.tr_params.patch_size, min_bbox_percent=data.min_bbox_percent,
            min_labeled_ratio=data.min_labeled_ratio, step=data.patch_step, grid_origin=data.grid_origin,
            labeled_ratio_of=data.labeled_ratio_of, ignore_label=cfg.targets[e.ref_label].ignore_label,
            end_aligned=data.end_aligned, floor=data.cache_floor, region=e.bbox, mask=v.get("mask"),
            ignore_mask=v.get("ignore_mask"), pad_small=cfg.tr_params.pad_small, workers=workers))
        log.info("%s: %s", e.name, tables[-1].summary())
    return tables

def _cached(path: Path, key: Mapping[str, Any], asked: Mapping[str, float], shapes: Sequence[tuple], pad: bool
            ) -> PatchList | None:
    "The list in the cache, None if there is none that can be used; the log says why"
    if not path.exists(): return None
    try: found = _read_cache(path)
    except (FormatError, KeyError, TypeError, ValueError) as e:
        log.warning("patches are searched again: %s", str(e) if isinstance(e, FormatError) else f"{path}: damaged")
        return None
    if isinstance(found, list): return _bare(path, found, key, shapes, pad)
    if changed := _changes(found.key, key, asked):
        log.warning("patches are searched again, %s was made with other %s", path, ", ".join(changed[:8]))
        return None
    return found

def patch_list(
    cfg: ZarrConfig, # settings
    *,
    workers: int = 0, # processes for the search; 0: in this process
    cache: bool | str | os.PathLike = True, # file; True: where the settings say, False: none
    volumes: Sequence[Mapping[str, ChunkedVolume]] | None = None, # from `open_entries`, if they are open already
) -> PatchList: # never empty
    "Patches with enough label of all volumes, from the cache if it still holds"
    volumes = open_entries(cfg) if volumes is None else volumes
    data, tables = cfg.dataset_config, None
    path = (cfg.cache_path if cache is True else None if cache is False else Path(cache))
    key = _key(cfg, volumes)
    asked = {"min_bbox_percent": data.min_bbox_percent, "min_labeled_ratio": data.min_labeled_ratio}
    shapes = [v["input"].shape for v in volumes]
    out = _cached(path, key, asked, shapes, cfg.tr_params.pad_small) if path is not None else None
    if out is None:
        if path is not None: check_output(path, "overwrite")
        tables = _searched(cfg, volumes, workers)
        out = _joined(tables, [e.name for e in cfg.volumes], key)
    elif len(out) and out.counts[0] < 0: return out
    kept = PatchTable(out.patch_size, np.arange(len(out)), out.counts, out.bbox_frac).select(
        data.min_bbox_percent, data.min_labeled_ratio, data.labeled_ratio_of).starts
    if not len(kept):
        told = [f"{e.name}: {t.summary()}" for e, t in zip(cfg.volumes, tables or _searched(cfg, volumes, workers))]
        raise DataError(f"no patch passes min_bbox_percent {data.min_bbox_percent} and min_labeled_ratio "
                        f"{data.min_labeled_ratio}. {'; '.join(told)}. Lower them, or check ref_label")
    if tables is not None and path is not None: _write_cache(path, out)
    return out.take(kept)

# %%
logging.getLogger("medvol_nb").setLevel("ERROR")
patches = patch_list(cfg)
n_each = np.bincount(patches.volume_idx)
dict(zip(patches.names, n_each.tolist())), (d/"patches.json").read_text().splitlines()[-3:]

# %% [markdown]
# The second time nothing is searched. Tighter thresholds filter what is there; a label that was written again, or
# another patch size, is noticed; a damaged cache is not believed.

# %%
def stale(cfg):
    volumes = open_entries(cfg)
    asked = {k: getattr(cfg.dataset_config, k) for k in ("min_bbox_percent", "min_labeled_ratio")}
    return _changes(_read_cache(d/"patches.json").key, _key(cfg, volumes), asked)

def changed(**values):
    other = json.loads(json.dumps(settings))
    for dotted, v in values.items():
        section, key = dotted.split("__")
        other[section][key] = v
    return ZarrConfig.model_validate(other)

tighter = changed(dataset_config__min_labeled_ratio=0.2)
looser, other_size = changed(dataset_config__min_labeled_ratio=0.05), changed(tr_params__patch_size=[16, 16, 16])
[stale(c) for c in (cfg, tighter, looser, other_size)]

# %%
assert patch_list(cfg).digest() == patches.digest()
assert patch_list(tighter).digest() == patch_list(tighter, cache=False).digest() and not stale(tighter)
before = (d/"patches.json").read_bytes()
head, mark, rows = before.partition(b'"patches": ')
(d/"patches.json").write_bytes(head + mark + rows.replace(b"16", b"17", 1))
with raises(FormatError, match="damaged, or edited by hand"): _read_cache(d/"patches.json")
assert patch_list(cfg).digest() == patches.digest() and (d/"patches.json").read_bytes() == before

# %%
with raises(DataError, match="no patch passes .* a: candidates 147, .* ratio 147, best bbox 1, best ratio 0.3"):
    patch_list(changed(dataset_config__min_labeled_ratio=0.9), cache=False)

# %% [markdown]
# ## Training and validation
# Space is cut into blocks of four patches an edge. Blocks go to validation in a seeded order until the wanted part of
# the patches is reached. A patch belongs to a side only if all of it lies in blocks of that side; patches across a
# border belong to none. What follows is exact: no voxel is shared. Volumes that read the same input share their blocks,
# too. Where a volume is so small that blocks of four patches leave one side empty, smaller ones are tried.

# %%
#| export
@dataclass(frozen=True)
class Split:
    "Which patches are trained and which validated"
    train: np.ndarray # (n) int64, positions in the patch list, increasing
    val: np.ndarray # (m) int64, positions in the patch list, increasing
    dropped: int # patches that belong to neither side
    hash: str # of the patches of both sides
    mode: str # "block", "volume" or "random"
    block: tuple[int, int, int] | None = None # (z, y, x) edge of a block [voxel]

def _blocks_of(patches: PatchList, block: Sequence[int], source: np.ndarray) -> tuple[list[tuple], list[list[int]]]:
    "The blocks that hold patches, and for each patch the blocks that it touches"
    number: dict[tuple, int] = {}
    low = patches.starts//np.array(block)
    high = (patches.starts + np.array(patches.patch_size) - 1)//np.array(block)
    touched = [[number.setdefault((int(g), *k), len(number)) for k in itertools.product(*map(range, a, b + 1))]
               for g, a, b in zip(source, low, high)]
    return list(number), touched

def _block_sides(patches: PatchList, block: Sequence[int], source: np.ndarray, part: float, seed: int) -> np.ndarray:
    "1 train, 2 val, 0 neither, for each patch"
    blocks, touched = _blocks_of(patches, block, source)
    members = defaultdict(list)
    for p, ks in enumerate(touched):
        for k in ks: members[k].append(p)
    total = np.array([len(ks) for ks in touched])
    inside = np.zeros(len(patches), np.int64) # blocks of each patch that are for validation
    n_val, n_train = 0, len(patches)
    for k in sorted(range(len(blocks)), key=lambda k: rng_for(seed, "split", *blocks[k]).random()):
        if n_val >= part*(n_val + n_train): break
        here = np.array(members[k])
        lost, won = int((inside[here] == 0).sum()), int((inside[here] + 1 == total[here]).sum())
        if lost >= n_train: continue # nothing would be left to train with
        inside[here] += 1
        n_val, n_train = n_val + won, n_train - lost
    return np.where(inside == 0, 1, np.where(inside == total, 2, 0))

def _meet(a: Sequence | None, b: Sequence | None) -> bool:
    "Do two boxes share a voxel? None is everything"
    return a is None or b is None or all(low < end and start < high for (low, high), (start, end) in zip(a, b))

def split_patches(
    patches: PatchList, # from `patch_list`
    cfg: ZarrConfig, # settings: tr_val_split, val_split_mode, val_block, seed, and split of the volumes
) -> Split: # the same for the same patches and settings
    "Divide patches into training and validation without shared voxels"
    tr, entries = cfg.tr_params, cfg.volumes
    part, mode, block = 1 - tr.tr_val_split, tr.val_split_mode, None
    inputs = [f"{e.input}@{e.level}" for e in entries]
    source = np.array([inputs.index(i) for i in inputs])[patches.volume_idx]
    if mode == "volume":
        sides = ([(i, e.bbox) for i, e in zip(inputs, entries) if (e.split == "val") == val] for val in (False, True))
        if both := sorted(a for (a, box), (b, other) in itertools.product(*sides) if a == b and _meet(box, other)):
            raise ConfigError(f"dataset_config.volume_paths: {both[0]} is an input of train and of val. Give it twice "
                              "with a bbox each that do not meet")
        side = np.array([2 if e.split == "val" else 1 for e in entries])[patches.volume_idx]
    elif part <= 0: side = np.ones(len(patches), np.int64)
    elif mode == "random":
        log.warning("tr_params.val_split_mode: 'random' validates with voxels that are trained on, patches overlap")
        order = rng_for(tr.seed, "split").permutation(len(patches))
        side = np.ones(len(patches), np.int64)
        side[order[:max(1, round(part*len(patches)))]] = 2
    else:
        sizes = [tr.val_block] if tr.val_block else [tuple(k*p for p in patches.patch_size) for k in (4, 3, 2, 1)]
        for block in sizes:
            side = _block_sides(patches, block, source, part, tr.seed)
            if (side == 2).any(): break
        else:
            raise DataError(f"no division of {len(patches)} patches into blocks of {block} leaves both sides some. Set "
                            "a smaller val_block, val_split_mode 'volume', or tr_val_split 1")
        if not tr.val_block and block != sizes[0]:
            log.warning("val_block: %s, larger blocks leave one side empty", block)
    train, val = np.flatnonzero(side == 1), np.flatnonzero(side == 2)
    if not len(train): raise DataError("no patch is left to train with, see tr_params.val_split_mode and tr_val_split")
    dropped = len(patches) - len(train) - len(val)
    log.info("%d patches to train, %d to validate, %d across a border are left out", len(train), len(val), dropped)
    sides = [patches.take(train).digest(), patches.take(val).digest()]
    return Split(train, val, dropped, fingerprint(sides), mode, block and tuple(block))

# %%
split = split_patches(patches, cfg)
fig, ax = plt.subplots(figsize=(4, 4))
for side, colour in ((split.train, "tab:blue"), (split.val, "tab:orange")):
    for k in side:
        if patches.volume_idx[k] == 0:
            ax.add_patch(plt.Rectangle(patches.starts[k, :0:-1] + 1, 30, 30, fill=False, color=colour))
ax.set(xlim=(0, 128), ylim=(128, 0), aspect="equal", title="volume a: training blue, validation orange")
ax.axis("off")
len(split.train), len(split.val), split.dropped, split.block

# %%
painted = np.zeros((2, 2, 32, 128, 128), bool)
for s, side in enumerate((split.train, split.val)):
    for k in side:
        z, y, x = patches.starts[k]
        painted[s, patches.volume_idx[k], z:z + 16, y:y + 32, x:x + 32] = True
assert not (painted[0] & painted[1]).any() and split.hash == split_patches(patch_list(cfg), cfg).hash

# %% [markdown]
# ## Patches that share chunks
# Drawing patches in a random order decodes the same chunks over and over. If patches come in groups of neighbours, the
# cache of decoded chunks answers most of the reads. The order is still random: of the groups, and within each group.

# %%
#| export
def grouped_order(
    patches: PatchList, # from `patch_list`
    index: np.ndarray, # (n) positions to be ordered
    group: Sequence[int], # (z, y, x) edge of a group [voxel], such as a few chunks
    rng: np.random.Generator, # see `rng_for`
) -> np.ndarray: # (n) the same positions
    "Random order in which neighbours come together"
    cell = np.column_stack([patches.volume_idx[index], patches.starts[index]//np.array(group)])
    _, which = np.unique(cell, axis=0, return_inverse=True)
    rank = rng.permutation(int(which.max(initial=0)) + 1)[which]
    return np.asarray(index)[np.lexsort((rng.random(len(index)), rank))]

# %%
order = grouped_order(patches, np.arange(len(patches)), (16, 64, 64), rng_for(0, "order"))
def median_step(order): return float(np.median(np.abs(np.diff(patches.starts[order], axis=0)).max(axis=1)))
median_step(order), median_step(rng_for(0, "order").permutation(len(patches)))

# %%
assert sorted(order) == list(range(len(patches)))

# %% [markdown]
# ## As a command
# Searching can be done once, before the training. The split is written beside the cache, with names and places.

# %%
#| export
def write_split(
    path: str | os.PathLike, # JSON file
    split: Split, # from `split_patches`
    patches: PatchList, # that it divides
) -> Path: # `path`
    "Write which patches are trained and validated, by volume and start"
    def rows(index: np.ndarray) -> str:
        names = [json.dumps(patches.names[v]) for v in patches.volume_idx[index]]
        return ",\n".join(f"[{n}, {z}, {y}, {x}]" for n, (z, y, x) in zip(names, patches.starts[index].tolist()))
    head = {"version": _VERSION, "hash": split.hash, "mode": split.mode, "block": split.block, "dropped": split.dropped,
            "patch_size": patches.patch_size}
    return write_text(path, to_json(head)[:-2] + "".join(
        f',\n  "{side}": [\n{rows(getattr(split, side))}\n]' for side in ("train", "val")) + "}\n")

def find_patches_command(
    config: str | os.PathLike, # settings, .json or .yaml
    *,
    overrides: Sequence[str] = (), # settings to change, 'tr_params.batch_size=2'
    workers: int = 0, # processes; 0: in this process
    dask: str | None = None, # address of a Dask scheduler whose workers see the same stores
    dry_run: bool = False, # open and check the volumes, search and write nothing
) -> dict: # numbers of patches by volume, split and files
    "Find the patches of a training, and divide them into training and validation"
    cfg = ZarrConfig.load(config, overrides)
    volumes = open_entries(cfg)
    path = cfg.cache_path
    if dry_run:
        stored = {e.name: v[e.ref_label].stored_chunks() for e, v in zip(cfg.volumes, volumes)}
        return {"volumes": {n: {"stored_chunks": None if s is None else len(s)} for n, s in stored.items()},
                "cache": None if path is None else str(path)}
    with on_cluster(dask): patches = patch_list(cfg, workers=workers, volumes=volumes)
    split = split_patches(patches, cfg)
    each = np.bincount(patches.volume_idx, minlength=len(patches.names)).tolist()
    out = {"patches": len(patches), "volumes": dict(zip(patches.names, each)),
           "train": len(split.train), "val": len(split.val), "dropped": split.dropped, "split_hash": split.hash,
           "cache": None if path is None else str(path), "split": None}
    if path is not None: out["split"] = str(write_split(path.with_name(f"{path.stem}_split.json"), split, patches))
    return out

# %%
(d/"task.json").write_text(json.dumps(settings))
told = find_patches_command(d/"task.json", overrides=["tr_params.tr_val_split=0.7"])
dry = find_patches_command(d/"task.json", dry_run=True)
{k: v for k, v in told.items() if k not in ("cache", "split")}, dry["volumes"]

# %%
assert told["patches"] == len(patches) and (d/"patches_split.json").exists()
folder.cleanup()
