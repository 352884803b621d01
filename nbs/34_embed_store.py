# %% [markdown]
# # Embeddings on disk
#
# > Embed a scan once, keep the vectors in a quarter of the space, open any part of them without the network.
#
# A scan of 512 x 512 x 300 voxels becomes 800,000 vectors of length 128 and a few thousand coarse ones. The reference
# keeps them as a pickle of GPU tensors, 434 MB a case, that only opens on a machine with a GPU and runs code when it
# does. Here a case is a zarr group: numbers of 8 bits, checksums, and everything that matching must know about them:
# where each vector is, which network made it, and what the scan's grid was. The networks are those of
# [the model page](31_embed_model.ipynb), their input that of [the data page](30_embed_data.ipynb); the next pages
# [search](34a_embed_search.ipynb) in them and [match points](34c_embed_match.ipynb).

# %%
#| default_exp embed.store

# %%
#| export
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medvol_nb.body import body_mask
from medvol_nb.checkpoints import Precision, autocast_for, device_for
from medvol_nb.core import (DataError, FormatError, MissingFile, OnExists, check_output, fingerprint,
                            inside, read_csv, read_json, rng_for, write_csv)
from medvol_nb.embed.coarse import COARSE_RATIOS, norm_map
from medvol_nb.embed.data import (SCAN_SUFFIXES, Contrast, NetGrid, contrast_of, list_scans, net_grid, net_volume,
                                  network_volume)
from medvol_nb.embed.model import STRIDES, EmbedderConfig, load_embedder, map_shape, model_digest
from medvol_nb.geometry import Volume, resample_to
from medvol_nb.parallel import BatchError, Ledger, digests, on_cluster, pmap
from medvol_nb.stores import as_format_error, create_array, new_store
from medvol_nb.volume import format_of, read_volume, stem_of

# %%
import tempfile

from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises
from medvol_nb.embed.model import ModelConfig, build_model, save_embedder
from medvol_nb.geometry import affine_from
from medvol_nb.volume import write_volume

# %% [markdown]
# ## What an embedding knows
# `maps` holds the vectors of each head, in memory or still on disk; `scales` says by how much stored integers were
# enlarged. `grid` is the network's, `native` that of the scan in the network's axes. Points are always world
# positions, so nobody has to know either of them. `body` marks the fine voxels that are worth matching: a search that
# may end in the air above the couch does end there.

# %%
#| export
VERSION = 2

@dataclass(frozen=True, eq=False)
class Embedding:
    "Vectors of one scan, with where they are and where they come from"
    maps: Mapping[str, Any] # head -> (c, z, y, x) float32, float16 or int8 array; NumPy, or zarr until it is needed
    grid: NetGrid # of the network's input
    native: NetGrid # of the scan, in the axes z, y, x of the network
    model: str # digest of the weights
    scales: Mapping[str, float] = field(default_factory=dict) # head -> stored number of the component 1; default 1
    norm: Any = None # (z, y, x) on the fine grid, see `norm_map`; None: computed when needed
    body: Any = None # (z, y, x) on the fine grid, bool; None: everywhere
    stretch: bool = False # the coarse map is stretched to the size of the fine one, as in the reference
    info: Mapping[str, Any] = field(default_factory=dict) # plain values: source, intensity, spacing, config digest

    def __post_init__(self):
        if "fine" not in self.maps: raise DataError(f"embedding: needs a map 'fine', got {sorted(self.maps)}")
        for head, m in self.maps.items():
            if head not in STRIDES: raise DataError(f"embedding: head {head!r} is not one of {', '.join(STRIDES)}")
            if tuple(m.shape[1:]) != self.map_grid(head).shape:
                grid = self.map_grid(head).shape
                raise DataError(f"embedding: map {head!r} has shape {tuple(m.shape)}, its grid {grid}")
        for name, m in (("norm", self.norm), ("body", self.body)):
            if m is not None and tuple(m.shape) != self.fine.shape:
                raise DataError(f"embedding: {name} has shape {tuple(m.shape)}, the fine grid {self.fine.shape}")

    @property
    def ratios(self) -> tuple[float | None, ...]: return (None,)*3 if self.stretch else COARSE_RATIOS # see `norm_map`
    @cached_property
    def fine(self) -> NetGrid: return self.grid.feature(STRIDES["fine"]) # where fine vectors are
    def map_grid(
        self,
        head: str, # 'fine', 'coarse' or 'semantic'
    ) -> NetGrid: # where its vectors are
        "Grid of one head"
        return self.grid.feature(STRIDES[head])

    def vectors(
        self,
        head: str = "fine", # which map
        planes: slice = slice(None), # along z
    ) -> np.ndarray: # (c, z, y, x) float32
        "Vectors of some planes, in memory and of length about 1"
        with as_format_error(str(self.info.get("path", "embedding")), f"damaged map {head!r}"):
            part = np.asarray(self.maps[head][:, planes])
        scale = self.scales.get(head, 1.0)
        return part.astype(np.float32) if scale == 1 else part*np.float32(1/scale)

    def __repr__(self) -> str:
        maps = ", ".join(f"{h} {tuple(m.shape)} {m.dtype}" for h, m in self.maps.items())
        return f"Embedding({maps}; model {self.model[:8]}, {self.info.get('source', '')})"

# %% [markdown]
# ## An embedding that knows the answer
# Lessons and tests need vectors for which the right match is known. Take random waves of the world position: $f(p) =
# \sqrt{2/c}\,[\cos \omega_i p, \sin \omega_i p]$ has length 1, and its inner products fall with distance like a bell of
# width $\ell$ (Rahimi and Recht, *Random features for large-scale kernel machines*, NIPS 2007). With a `place`
# function, the positions of another scan are first brought to the common frame, and the pair has known matches.

# %%
#| export
def waves(
    pts_xyz: np.ndarray, # (n, 3) positions [mm]
    c: int = 64, # length of the vectors, even
    width: float = 12.0, # distance at which similarity has fallen to 0.6 [mm]
    seed: int = 0, # names the directions
) -> np.ndarray: # (n, c) float32 of length 1
    "Vectors whose similarity falls with distance"
    w = rng_for(seed, "waves", c).standard_normal((3, c//2))/width
    phase = np.asarray(pts_xyz, np.float64) @ w
    return (np.concatenate([np.cos(phase), np.sin(phase)], 1)*np.sqrt(2/c)).astype(np.float32)

def position_embedding(
    vol: Volume, # scan or header; the voxels are not read
    place: Callable[[np.ndarray], np.ndarray] | None = None, # (n, 3) mm of this scan -> common frame; None: as it is
    *,
    c: int = 64, # length of the vectors
    widths: Mapping[str, float] | None = None, # head -> width of the bell [mm]; default: fine 12, coarse 60
    spacing: float = 2.0, # voxel size of the network [mm]
    seed: int = 0, # names the waves; those with the same seed can be matched
) -> Embedding: # in memory, without a body mask
    "Embedding that depends on position alone, for lessons and tests"
    native = net_volume(Volume(np.broadcast_to(np.float32(0), vol.shape), vol.affine, vol.spatial_axes))
    grid, maps = net_grid(vol, spacing), {}
    for head, width in (widths or {"fine": 12.0, "coarse": 60.0}).items():
        g = grid.feature(STRIDES[head])
        at = g.to_world(np.indices(g.shape).reshape(3, -1).T)
        maps[head] = waves(at if place is None else place(at), c, width, seed).T.reshape(c, *g.shape)
    return Embedding(maps, grid, NetGrid(native.shape, native.affine), f"waves-{c}-{seed}", info={"source": "waves"})

# %%
body = phantoms.abdomen((40, 30, 36), seed=1)
scan = Volume(body.img, affine_from(body.spacing))
known = position_embedding(scan)
near = known.vectors("fine").reshape(64, -1)
middle = tuple(n//2 for n in known.fine.shape)
similar = (known.vectors("fine")[(slice(None), *middle)] @ near).reshape(known.fine.shape)
plot.montage([similar[middle[0]], similar[:, middle[1]]], titles=["similarity to the middle", "coronal"], width=5)

# %%
assert np.ptp(np.linalg.norm(near, axis=0)) < 1e-5 and similar.argmax() == np.ravel_multi_index(middle, similar.shape)
with raises(DataError, match="map 'fine' has shape"): replace(known, maps={"fine": np.zeros((4, 3, 3, 3))})

# %% [markdown]
# ## Embedding a scan
# A scan goes through the network at once, or in slabs along z. Slabs are exact: a network of depth 18 sees at most 28
# network voxels up and down, one of depth 34 at most 52, so a slab with so many voxels more at either end has the same
# vectors inside. In the plane networks see 125 voxels or more to each side, and tiles there would be mostly margin.
# Networks with group or instance normalisation see everything through the statistics, and refuse slabs.

# %%
#| export
HALO = {18: 28, 34: 52} # depth -> network voxels along z that a vector sees up or down, a multiple of the coarse stride

def _forward(net: torch.nn.Module, x: np.ndarray, device: torch.device, precision: str) -> dict[str, np.ndarray]:
    "Maps of one network volume (z, y, x)"
    with torch.inference_mode(), autocast_for(device, precision):
        out = net(torch.from_numpy(np.ascontiguousarray(x, np.float32))[None, None].to(device))
    return {h: m[0].float().cpu().numpy() for h, m in out.items()}

def _in_slabs(net: torch.nn.Module, x: np.ndarray, slab: int, device: torch.device, precision: str
              ) -> dict[str, np.ndarray]:
    "The same, `slab` planes at a time"
    halo, parts = HALO[net.cfg.depth], []
    for z in range(0, len(x), slab):
        low, high = max(0, z - halo), min(len(x), z + slab + halo)
        maps, top = _forward(net, x[low:high], device, precision), min(len(x), z + slab)
        parts.append({h: m[:, (z - low)//STRIDES[h][0]:-(-(top - low)//STRIDES[h][0])] for h, m in maps.items()})
    return {h: np.concatenate([p[h] for p in parts], 1) for h in parts[0]}

def _sees_everything(net: torch.nn.Module) -> bool:
    wide = (torch.nn.GroupNorm, torch.nn.InstanceNorm1d, torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)
    return net.training or any(isinstance(m, wide) for m in net.modules())

def _fine_body(volume: Volume, body: Any, contrast: str, grid: NetGrid) -> np.ndarray | None:
    "Body mask on the fine grid; None if the scan shows no body to find"
    if body is None: return None
    if isinstance(body, str):
        try: body = body_mask(volume, "ct" if contrast == "ct" else "other").mask
        except DataError: return None
    if np.shape(body) != volume.shape:
        raise DataError(f"body: mask of shape {np.shape(body)} for a scan of shape {volume.shape}")
    mask = net_volume(replace(volume, data=np.asarray(body, np.uint8)))
    out = resample_to(mask, grid.affine, grid.shape, order=0).data > 0
    return out if out.any() else None

def embed_volume(
    net: torch.nn.Module, # network of the model page, in evaluation mode
    volume: Volume | str | os.PathLike, # scan, any orientation, or its file
    out: str | os.PathLike | None = None, # store to write, ends in .zarr; None: keep it in memory
    *,
    config: EmbedderConfig | None = None, # voxel size and intensities, as `load_embedder` returns them
    body: Literal["auto"] | np.ndarray | None = "auto", # bool on the grid of the scan (array in its axes); None: all
    slab: int | None = None, # network planes a pass, a multiple of 4; None: all at once
    device: str = "auto", # where the network runs
    precision: Precision = "fp32", # arithmetic
    dtype: Literal["int8", "float16"] = "int8", # of the vectors on disk
    on_exists: OnExists = "error", # what to do when `out` is there already
) -> Embedding: # in memory in full precision, or opened from `out`
    "Embed one scan"
    cfg = config or EmbedderConfig()
    if out is not None and not check_output(out, on_exists):
        return open_embedding(out, cfg.digest or model_digest(net))
    if slab is not None and (slab < 4 or slab % 4): raise DataError(f"slab: must be a multiple of 4, got {slab}")
    if slab is not None and _sees_everything(net):
        raise DataError("slab: this network normalises over the whole volume (or is in training mode), so slabs would "
                        "change its vectors. Use slab=None")
    if net.training: raise DataError("embed_volume: the network is in training mode, call net.eval() first")
    vol = volume if isinstance(volume, Volume) else read_volume(volume)
    contrast: Contrast = contrast_of(vol) if cfg.intensity == "auto" else cfg.intensity
    img, grid = network_volume(vol, cfg.spacing, contrast)
    where = device_for(device)
    net = net.to(where)
    maps = _forward(net, img, where, precision) if slab is None else _in_slabs(net, img, slab, where, precision)
    native = net_volume(replace(vol, data=np.broadcast_to(np.float32(0), vol.shape)))
    path = vol.meta.get("path")
    info = {"source": Path(str(path)).name if path else "array", "intensity": contrast, "spacing": float(cfg.spacing),
            "config": fingerprint(cfg.model_dump(mode="json", exclude={"digest", "name"})), "name": cfg.name}
    emb = Embedding(maps, grid, NetGrid(native.shape, native.affine), cfg.digest or model_digest(net),
                    norm=norm_map(torch.from_numpy(maps["coarse"]), grid.feature(STRIDES["fine"]).shape).numpy()
                    if "coarse" in maps else None,
                    body=_fine_body(vol, body, contrast, grid.feature(STRIDES["fine"])), info=info)
    if out is None: return emb
    write_embedding(emb, out, on_exists, dtype=dtype)
    return open_embedding(out)

# %%
small = build_model(ModelConfig(width=8, emb=16), seed=3).eval()
tall = Volume(phantoms.abdomen((16, 14, 60), seed=2, spacing=6.0).img, affine_from((6.0, 6.0, 3.0)))
whole = embed_volume(small, tall, device="cpu")
slabs = embed_volume(small, tall, slab=16, device="cpu")
whole

# %%
assert all(np.abs(whole.maps[h] - slabs.maps[h]).max() < 2e-6 for h in whole.maps)
assert whole.map_grid("coarse").shape == map_shape(whole.grid.shape, "coarse")
with raises(DataError, match="multiple of 4, got 6"): embed_volume(small, tall, slab=6)
with raises(DataError, match="normalises over the whole volume"):
    embed_volume(build_model(ModelConfig(width=8, emb=16, norm="gn")).eval(), tall, slab=8)

# %% [markdown]
# ## On disk
# Components of unit vectors of length 128 are around 0.09, so 8 bits with one scale for the whole map keep similarities
# to about 0.01. The component 1 is stored as 127, or as less if a larger one has to fit. Neighbours resemble each
# other, so differences are stored where they are smaller than the numbers: along x, then of those along y, then of
# those along z, where they begin anew with each row of chunks, so that any planes can be opened alone. They wrap around
# at 8 bits, and adding them up gives the same numbers. Every chunk carries a checksum, and none may be missing: zarr
# reads an absent chunk as zeros, so the number of chunks is compared when a store is opened. (The body mask is stored
# as 1 and 2 for that reason: nothing is ever all zero.) Attributes are covered by a digest of their own.

# %%
#| export
CHUNK = (8, 32, 32) # (z, y, x) of the maps
_ATTRS = ("version", "model", "grid", "native", "scales", "stretch", "differences", "info")

_ALONG = ("", "x", "xy", "xyz") # axes that differences may be stored along

class _Summed:
    "Stored differences, read as the numbers themselves"
    def __init__(self, array: Any, along: str):
        self.array, self.along, self.shape, self.dtype = array, along, array.shape, array.dtype
    def __getitem__(self, key: Any) -> np.ndarray:
        if not (isinstance(key, tuple) and len(key) == 2 and key[0] == slice(None) and isinstance(key[1], slice)):
            return self[:, :][key]
        first, last, step = key[1].indices(self.shape[1])
        low = first - first % CHUNK[0]
        out = np.array(self.array[:, low:last])
        for a in self.along:
            for part in _parts(out, a): np.cumsum(part, "czyx".index(a), np.int8, part)
        return out[:, first - low::step]

def _parts(m: np.ndarray, along: str) -> list[np.ndarray]:
    "What differences along an axis go through: all of the map, or along z its rows of chunks"
    return [m] if along != "z" else [m[:, z:z + CHUNK[0]] for z in range(0, m.shape[1], CHUNK[0])]

def _differences(m: np.ndarray, along: str) -> np.ndarray:
    "Differences of an int8 map along some axes"
    out = m.copy()
    for a in along:
        for part in _parts(out, a):
            part = np.moveaxis(part, "czyx".index(a), 0)
            part[1:] -= part[:-1].copy()
    return out

def _smallest(m: np.ndarray) -> tuple[np.ndarray, str]:
    "An int8 map, or those of its differences that are smallest on average, and along which axes; no chunk is all zero"
    sizes = {along: np.abs(_differences(m[::4], along).astype(np.int16)).mean() for along in _ALONG}
    for along in sorted(sizes, key=sizes.get):
        d = _differences(m, along)
        filled = (d != 0).any(0)
        for axis, c in enumerate(CHUNK):
            filled = np.logical_or.reduceat(filled, np.arange(0, m.shape[axis + 1], c), axis)
        if filled.all(): return d, along
    return m, ""

def _quantised(m: np.ndarray, dtype: str, levels: float) -> tuple[np.ndarray, float]:
    "A map in the type it is stored in, and the stored number of the component 1"
    if dtype == "float16": return np.asarray(m, np.float16), 1.0
    scale = min(levels, 127/max(float(np.abs(m).max()), 1e-6))
    return np.rint(m*np.float32(scale)).astype(np.int8), scale

def write_embedding(
    emb: Embedding, # to be stored
    path: str | os.PathLike, # store, a folder that ends in .zarr
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    dtype: Literal["int8", "float16"] = "int8", # of the fine and semantic vectors
    levels: float = 127.0, # int8: stored number of the component 1, at most; smaller packs tighter and is coarser
) -> Path: # `path`
    "Write an embedding, checksummed and all at once"
    if dtype not in ("int8", "float16"): raise DataError(f"dtype: must be int8 or float16, got {dtype!r}")
    if not Path(path).name.endswith(".zarr"): raise DataError(f"{path}: an embedding store ends in .zarr")
    if not check_output(path, on_exists): return Path(path)
    arrays, scales = {}, {}
    for head in emb.maps:
        m = emb.vectors(head)
        if not np.isfinite(m).all(): raise DataError(f"{path}: map {head!r} holds NaN or infinity, it is not stored")
        arrays[head], scales[head] = _quantised(m, "float16" if head == "coarse" else dtype, levels)
    smaller = {h: _smallest(a) for h, a in arrays.items() if a.dtype == np.int8}
    arrays |= {h: d for h, (d, _) in smaller.items()}
    if emb.norm is not None: arrays["norm"] = np.maximum(np.asarray(emb.norm), 1e-4).astype(np.float16)
    if emb.body is not None: arrays["body"] = np.asarray(emb.body, np.uint8) + np.uint8(1)
    info = {k: v for k, v in emb.info.items() if k != "path"}
    attrs = {"version": VERSION, "model": emb.model, "grid": emb.grid.to_dict(), "native": emb.native.to_dict(),
             "scales": scales, "stretch": emb.stretch, "info": info,
             "differences": {h: along for h, (_, along) in smaller.items()}}
    attrs = json.loads(json.dumps(attrs))
    with new_store(path, attributes={**attrs, "digest": fingerprint(attrs)}) as group:
        for name, a in arrays.items():
            chunks = (*a.shape[:-3], *(min(c, n) for c, n in zip(CHUNK, a.shape[-3:])))
            array = create_array(group, name, a.shape, a.dtype, chunks)
            array[...] = a
    return Path(path)

def open_embedding(
    path: str | os.PathLike, # store written by `write_embedding`
    model: str | None = None, # digest of the network it must come from; None: any
) -> Embedding: # maps are read when they are used
    "Open a stored embedding without reading its vectors"
    import zarr
    path, where = Path(path), str(path)
    if not path.exists(): raise MissingFile(f"{where} does not exist")
    with as_format_error(where, "not a readable embedding store"):
        group = zarr.open_group(where, mode="r")
        attrs = dict(group.attrs)
        if "digest" not in attrs or not set(_ATTRS) <= attrs.keys():
            raise FormatError(f"{where}: not an embedding store of this library")
        if attrs["version"] != VERSION:
            raise FormatError(f"{where}: written in format {attrs['version']}, this version reads {VERSION}")
        if attrs.pop("digest") != fingerprint(attrs): raise FormatError(f"{where}: damaged, attributes were altered")
        arrays = {n: a for n, a in group.arrays()}
        for name, a in arrays.items():
            if (there := a.nchunks_initialized) != a.nchunks:
                lost = a.nchunks - there
                raise FormatError(f"{where}: damaged, {lost} of {a.nchunks} chunks of {name!r} are missing")
        along = attrs["differences"]
        if unknown := set(along.values()) - set(_ALONG):
            raise FormatError(f"{where}: differences along {unknown.pop()!r} are not known")
        maps = {h: _Summed(arrays[h], along[h]) if along.get(h) else arrays[h] for h in STRIDES if h in arrays}
        lacking = sorted(set(attrs["scales"]) - set(maps))
        if lacking: raise FormatError(f"{where}: map {lacking[0]!r} is missing")
        parts = {n: np.asarray(arrays[n][...]) for n in ("norm", "body") if n in arrays}
        emb = Embedding(maps, NetGrid.from_dict(attrs["grid"]), NetGrid.from_dict(attrs["native"]), attrs["model"],
                        attrs["scales"], parts.get("norm"), parts["body"] == 2 if "body" in parts else None,
                        attrs["stretch"], {**attrs["info"], "path": where})
    if model is not None: same_model(emb.model, model, where)
    return emb

def same_model(
    found: str, # digest of the network an embedding comes from
    wanted: str, # digest of the network it must come from
    where: str, # for the message
) -> None:
    "Refuse to compare vectors of different networks"
    if found != wanted:
        raise DataError(f"{where}: made by model {found[:12]}, model {wanted[:12]} is needed. Vectors of different "
                        "networks cannot be compared; embed the scan again")

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
write_embedding(whole, root/"tall.zarr")
stored = open_embedding(root/"tall.zarr")
stored

# %%
a, b = whole.vectors("fine").reshape(16, -1).T, stored.vectors("fine").reshape(16, -1).T
assert np.abs(a[:200] @ a.T - b[:200] @ b.T).max() < 0.02 and close(stored.fine.affine, whole.fine.affine, 0)
with raises(DataError, match="Vectors of different networks"): open_embedding(root/"tall.zarr", "0"*16)
with raises(FormatError, match="not an embedding store"):
    open_embedding(write_volume(tall, root/"image.zarr"))

# %% [markdown]
# A chunk that was lost, and one with a flipped bit, are found.

# %%
chunk = next(p for p in sorted((root/"tall.zarr"/"fine").rglob("*")) if p.is_file() and p.name[-1].isdigit())
raw = chunk.read_bytes()
chunk.write_bytes(bytes([*raw[:40], raw[40] ^ 4, *raw[41:]]))
with raises(FormatError, match="tall.zarr"): open_embedding(root/"tall.zarr").vectors("fine")
chunk.unlink()
with raises(FormatError, match="1 of . chunks of 'fine' are missing"): open_embedding(root/"tall.zarr")

# %% [markdown]
# ## Folders of scans
# `medvol embedding embed` takes a file, a folder or a list, and goes on where it stopped. A scan that cannot be
# embedded is listed in `failed.csv` and the others are finished. Stores are named after the scans.

# %%
#| export
def scan_files(
    src: str | os.PathLike, # scan, folder of scans, .csv with a column image or name, or .json list
) -> list[Path]: # in order
    "Which scans a source names"
    src = Path(src)
    if not src.exists(): raise MissingFile(f"{src} does not exist")
    if src.is_dir() and not src.name.endswith(".zarr"):
        if next(src.glob("*.dcm"), None) is not None: return [src]
        if not (found := list_scans(src)): raise DataError(f"{src}: holds no scans ({' '.join(SCAN_SUFFIXES)})")
        return found
    if src.suffix == ".csv":
        rows = read_csv(src)
        key = next((k for k in ("image", "name") if rows and k in rows[0]), None)
        if key is None: raise FormatError(f"{src}: needs rows and a column image or name")
        root = src.parent/"images" if src.name == "index.csv" and (src.parent/"images").is_dir() else src.parent
        return [inside(root, r[key], absolute=True) for r in rows]
    if src.suffix == ".json":
        tree = read_json(src)
        if isinstance(tree, dict): tree = [i for part in tree.values() if isinstance(part, list) for i in part]
        names = [i.get("image") if isinstance(i, dict) else i for i in tree if isinstance(i, (dict, str))]
        if not names or not all(isinstance(n, str) for n in names):
            raise FormatError(f"{src}: names no scans; a list of files, or of objects with 'image', is needed")
        return [inside(src.parent, n, absolute=True) for n in names]
    format_of(src)
    return [src]

def embed(
    src: str | os.PathLike, # scan, folder of scans, .csv with a column image or name, or .json list
    out: str | os.PathLike, # folder of stores
    model: str | os.PathLike, # run folder or weights of the network
    *,
    intensity: Literal["ct", "mr", "auto"] | None = None, # default: what the network was trained for
    body: bool = True, # remember where the body is, so that only it is searched
    slab: int | None = None, # network planes a pass, a multiple of 4; default: all at once
    dtype: Literal["int8", "float16"] = "int8", # of the vectors
    device: str = "auto", # where the network runs
    precision: Precision = "fp32", # arithmetic
    workers: int = 0, # processes; 0: in this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers see the same folders
    on_exists: OnExists = "skip", # "skip": go on where it stopped
) -> dict: # numbers of scans and the folder
    "Embed scans and store the vectors"
    files, out = scan_files(src), Path(out)
    keys = [stem_of(p) for p in files]
    if twice := sorted({k for k in keys if keys.count(k) > 1}):
        raise DataError(f"{src}: {len(twice)} scans share a name, first {twice[0]!r}; stores are named after them")
    net, cfg = load_embedder(model, device)
    if intensity is not None: cfg = cfg.model_copy(update={"intensity": intensity})
    out.mkdir(parents=True, exist_ok=True)
    params = {"config": cfg, "body": body, "dtype": dtype, "slab": slab, "precision": precision}
    def one(file: Path) -> dict:
        store = f"{stem_of(file)}.zarr"
        embed_volume(net, file, out/store, config=cfg, body="auto" if body else None, slab=slab, device=device,
                     precision=precision, dtype=dtype, on_exists="overwrite")
        return {"outputs": [store], "source": digests([file])}
    with Ledger(out/"ledger.jsonl", params, on_exists=on_exists) as ledger:
        ledger.recheck({key: [file] for key, file in zip(keys, files)})
        with on_cluster(dask):
            values, failures = pmap(one, files, workers, keys=keys, desc="embed", errors="collect", ledger=ledger)
    write_csv(out/"failed.csv", [{"scan": str(files[f.index]), "error": f.error} for f in failures], ["scan", "error"])
    if failures: raise BatchError(failures, values, len(files))
    return {"scans": len(files), "model": cfg.digest, "out": out}

# %%
save_embedder(root/"net.safetensors", small, EmbedderConfig(name="lesson", intensity="ct"))
(root/"scans").mkdir()
for k in range(2): write_volume(Volume(tall.data + np.float32(k), tall.affine), root/f"scans/case_{k}.nii.gz")
done = embed(root/"scans", root/"out", root/"net.safetensors", device="cpu")
np.save(root/"scans/flat.npy", np.zeros((4, 4, 4), np.float32))
np.savez(root/"scans/flat.npz", data=np.zeros((4, 4, 4), np.float32))
sorted(p.name for p in (root/"out").iterdir()), done["scans"]

# %%
with raises(BatchError, match="1 of 3 items failed(.|\n)*every voxel is 0"):
    embed(root/"scans", root/"out", root/"net.safetensors", device="cpu")
assert "flat.npz" in (root/"out/failed.csv").read_text()
with raises(DataError, match="other parameters"):
    embed(root/"scans", root/"out", root/"net.safetensors", device="cpu", dtype="float16")

# %%
place.cleanup()
