# %% [markdown]
# # Volumes in stores
#
# > `open_volume`: one object for Zarr, OME-Zarr and TIF, of which only what is asked for is read.
#
# Training on volumes larger than memory means cutting thousands of small boxes out of files somebody else wrote. Those
# files differ: Zarr version 2 or 3, chunks or shards, channels first or last, a pyramid in a group, a stack of TIF
# pages, a folder of slices, a URL. The network page should see none of this. `open_volume` reads the metadata, checks
# it before anything is allocated, and returns a `ChunkedVolume`: axes are always $(z, y, x)$, channels come first, and
# slicing works as in NumPy. The object holds no open file, so it travels to worker processes; each of them opens its
# own handle when it reads for the first time.
#
# It builds on [stores](04b_stores.ipynb) and [remote access](50_zarrnet_remote.ipynb). Where it is installed,
# [tensorstore](https://google.github.io/tensorstore) reads local Zarr: the same voxels, several times faster on shards.

# %%
#| default_exp zarrnet.io

# %%
#| export
import contextlib
import itertools
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import DataError, FormatError, MissingExtra, MissingFile, fingerprint, log
from medvol_nb.grid import patch_slices
from medvol_nb.stores import (_TO_MM, _check_array, _ome_level, _place, _split, as_format_error, check_budget,
                              fast_reader)
from medvol_nb.zarrnet.remote import Remote, remote_store

# %%
import tempfile

import tifffile
import zarr

from medvol_nb import phantoms, plot
from medvol_nb.core import raises
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_ome_zarr, write_zarr

# %% [markdown]
# ## Which axis is which
# Stores tell their axes in half a dozen ways, or not at all. An array of three dimensions is $(z, y, x)$ unless it says
# otherwise. With four, the channels are first or last. If nothing tells, the number of expected channels decides, or
# else a length of at most 16 on one side only; if both sides fit, it has to be said.

# %%
#| export
_MAX_CHANNELS = 16

def _told(attrs: Mapping, dims: Any, ndim: int) -> str:
    "Axis letters from the attributes of an array, '' if it does not tell"
    for value in (attrs.get("axes"), attrs.get("_ARRAY_DIMENSIONS"), dims):
        if not isinstance(value, (str, list, tuple)) or len(value) != ndim: continue
        names = "".join(str(a.get("name") if isinstance(a, Mapping) else a).lower() for a in value)
        if len(names) == ndim and set(names) <= set("tcxyz") and set("xyz") <= set(names) and len(set(names)) == ndim:
            return names
    return ""

def _axes(told: str, shape: Sequence[int], channel_axis: int | None, channels: int | None, where: str) -> str:
    "One letter for each stored axis"
    ndim, size = len(shape), " x ".join(map(str, shape))
    if ndim not in (3, 4) and not told: raise DataError(f"{where}: {ndim} dimensions ({size}), and nothing names them")
    if channel_axis is not None:
        if ndim == 3 or not -ndim <= channel_axis < ndim:
            raise DataError(f"{where}: channel_axis {channel_axis} does not exist in {size}")
        names = told or "".join(np.insert(list("zyx"), channel_axis % ndim, "c"))
        if names[channel_axis] != "c":
            raise DataError(f"{where}: axis {channel_axis} is not the channels, the axes are {told}")
    elif told or ndim == 3: names = told or "zyx"
    else:
        fits = [a for a in (0, 3) if (shape[a] == channels if channels else shape[a] <= _MAX_CHANNELS)]
        if len(fits) != 1:
            what = "both the first and the last axis" if fits else "neither the first nor the last axis"
            raise DataError(f"{where}: {what} of {size} can be the {channels or ''} channels".replace("  ", " ") +
                            ". Set channel_axis")
        names = "czyx" if fits[0] == 0 else "zyxc"
    found = shape[names.index("c")] if "c" in names else None
    if channels and (found or 1) != channels:
        raise DataError(f"{where}: {found or 'no'} channels ({size}), {channels} are expected")
    if "t" in names and shape[names.index("t")] != 1:
        raise DataError(f"{where}: holds {shape[names.index('t')]} time points ({size}), must be 1")
    return names

# %%
[_axes("", s, None, None, "a") for s in ((8, 9, 9), (3, 64, 64, 64), (64, 64, 64, 2))]

# %%
assert _axes("", (3, 64, 64, 3), -1, None, "a") == "zyxc" and _axes("", (3, 64, 64, 2), None, 3, "a") == "czyx"
with raises(DataError, match="both the first and the last axis of 3 x 64 x 64 x 3 .* Set channel_axis"):
    _axes("", (3, 64, 64, 3), None, 3, "normals.zarr")
with raises(DataError, match="2 channels .* 3 are expected"): _axes("czyx", (2, 64, 64, 64), None, 3, "a")

# %% [markdown]
# ## Keeping decoded chunks
# Patches overlap, so the next one often needs chunks that were just decoded. The cache below keeps the latest of them,
# up to a number of bytes in each process. tensorstore has one of its own; this one serves the others, among them TIF
# files, whose pages are decoded as a whole.

# %%
#| export
class _Kept:
    "Reads boxes chunk by chunk and keeps the latest chunks, up to `max_bytes`"
    def __init__(self, read: Callable, shape: Sequence[int], chunks: Sequence[int], dtype: Any, max_bytes: int):
        self.read, self.shape, self.chunks, self.dtype, self.max_bytes = read, shape, chunks, dtype, max_bytes
        self.held: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self.bytes, self.lock = 0, threading.Lock()

    def __call__(self, index: Sequence[slice]) -> np.ndarray:
        out = np.empty([s.stop - s.start for s in index], self.dtype)
        for key in itertools.product(*(range(s.start//c, -(-s.stop//c)) for s, c in zip(index, self.chunks))):
            if not out.size: break
            low = [k*c for k, c in zip(key, self.chunks)]
            source, inside = patch_slices([s.start - a for s, a in zip(index, low)], out.shape, self.chunks)
            out[inside] = self._chunk(key, low)[source]
        return out

    def _chunk(self, key: tuple, low: Sequence[int]) -> np.ndarray:
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        data = np.asarray(self.read(tuple(slice(a, min(a + c, n)) for a, c, n in zip(low, self.chunks, self.shape))))
        with self.lock:
            if key not in self.held: self.held[key], self.bytes = data, self.bytes + data.nbytes
            while self.bytes > self.max_bytes and len(self.held) > 1:
                self.bytes -= self.held.popitem(last=False)[1].nbytes
        return data

# %%
decoded = []
def decode(index):
    decoded.append(index[0].start)
    return np.arange(100)[index]
kept = _Kept(decode, (100,), (10,), np.int64, max_bytes=160)
parts = [kept((slice(a, a + 15),)) for a in (0, 5, 40, 50, 85)]
decoded

# %%
assert all(np.array_equal(p, np.arange(a, a + 15)) for p, a in zip(parts, (0, 5, 40, 50, 85)))
assert decoded == [0, 10, 40, 50, 60, 80, 90] and kept.bytes <= 160

# %% [markdown]
# ## Handles
# A handle is a function from a box in stored axes to its voxels. It is made from plain values in the process that
# reads: by tensorstore where that can be (see [stores](04b_stores.ipynb)), else by zarr.

# %%
#| export
def _open_node(store: str, name: str, where: str) -> Any:
    "The zarr array or group at a place, local or not"
    import zarr
    at = remote_store(Remote(store)) if "://" in store else store
    try: return zarr.open(at, path=name or None, mode="r")
    except (FileNotFoundError, KeyError): raise MissingFile(f"{where}: there is no zarr array or group") from None

def _zarr_handle(
    where: str, store: str, name: str, version: int, reader: str, chunks: Sequence[int], shards: Sequence[int] | None,
    cache_bytes: int,
) -> Callable:
    if reader != "zarr" and "://" not in store:
        try: return fast_reader(os.path.join(store, name).rstrip("/"), version, cache_bytes)
        except (ValueError, MissingExtra) as e: # a codec it lacks, not installed, or after a fork
            if reader == "tensorstore": raise
            log.debug("%s: read by zarr instead of tensorstore (%s)", where, e)
    array = _open_node(store, name, where)
    read = array.__getitem__
    return _Kept(read, array.shape, chunks, array.dtype, cache_bytes) if cache_bytes else read

# %%
#| export
_PAGE_CACHE = 64*2**20 # [byte] of decoded TIF pages, unless more was asked for

@contextlib.contextmanager
def _strict_tif(where: str) -> Iterator[None]:
    "tifffile logs some damage, such as a broken chain of pages, and goes on with what is left: here it is an error"
    heard: list[str] = []
    ear = logging.Handler(logging.ERROR)
    ear.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("tifffile")
    logger.addHandler(ear)
    try: yield
    finally: logger.removeHandler(ear)
    if heard: raise FormatError(f"{where}: damaged TIF ({heard[0]})")

def _tif_series(file: Any, level: int, where: str) -> Any:
    if not file.series: raise FormatError(f"{where}: holds no image")
    levels = file.series[0].levels
    if not 0 <= level < len(levels):
        raise DataError(f"{where}: level {level} was asked for, it has 0 to {len(levels) - 1}")
    return levels[level]

def _tif_handle(where: str, files: Sequence[str], level: int, shape: Sequence[int], chunks: Sequence[int], dtype: str,
                cache_bytes: int) -> Callable:
    import tifffile
    if len(files) > 1:
        def page(index: Sequence[slice]) -> np.ndarray:
            with _strict_tif(files[index[0].start]): data = tifffile.imread(files[index[0].start])
            if data.shape != tuple(shape[1:]) or data.dtype != dtype:
                raise FormatError(f"{files[index[0].start]}: {data.shape} {data.dtype}, the first slice is "
                                  f"{tuple(shape[1:])} {dtype}")
            return data[None]
    else:
        with _strict_tif(where):
            file = tifffile.TiffFile(files[0])
            series = _tif_series(file, level, where)
        if series.keyframe.is_memmappable and series.dataoffset is not None:
            order = np.dtype(dtype).newbyteorder(file.byteorder)
            return np.memmap(files[0], order, "r", series.dataoffset, tuple(shape)).__getitem__
        lead = tuple(shape[:len(shape) - series.keyframe.ndim])
        def page(index: Sequence[slice]) -> np.ndarray:
            k = int(np.ravel_multi_index([s.start for s in index[:len(lead)]], lead)) if lead else 0
            if series.pages[k] is None: raise FormatError(f"{where}: page {k} is missing")
            with _strict_tif(where): return series.pages[k].asarray().reshape([1]*len(lead) + list(shape[len(lead):]))
    return _Kept(page, shape, chunks, dtype, max(cache_bytes, _PAGE_CACHE))

_HANDLES = {"zarr": _zarr_handle, "tif": _tif_handle}

# %% [markdown]
# ## The volume
# Slicing gives $(z, y, x)$, or $(c, z, y, x)$ if there are channels. `read` takes a start that may lie outside: what
# does not exist is zero, and it tells which part does. When a chunk cannot be decoded the error names it.
# `stored_chunks` lists what is there: a chunk that was never written equals the fill value and need not be read.

# %%
#| export
class ChunkedVolume:
    "A volume in a store, of which only what is asked for is read; see `open_volume`"
    def __init__(
        self,
        path: str, # where it is, for messages
        kind: str, # handle that reads it: "zarr", "tif" or "array"
        spec: Mapping[str, Any], # what that handle is made from
        names: str, # a letter for each stored axis
        shape: Sequence[int], # stored
        dtype: Any, # stored number type
        chunks: Sequence[int], # stored
        *,
        shards: Sequence[int] | None = None, # stored
        spacing: Sequence[float] | None = None, # (z, y, x) [mm], None: unknown
        fill_value: Any = 0, # of chunks that are not stored
        identity: str = "", # hash of the metadata
        array: np.ndarray | None = None, # n-d array in stored axes, for kind "array"
    ):
        self.path, self.kind, self._spec, self._names, self._shape = path, kind, dict(spec), names, tuple(shape)
        self.dtype = np.dtype(dtype).newbyteorder("=") # as read, native byte order
        self._spatial = [names.index(a) for a in "zyx"]
        self.shape = tuple(int(shape[k]) for k in self._spatial) # (z, y, x) [voxel]
        self.channel_axis = names.index("c") if "c" in names else None # stored position
        self.channels = int(shape[self.channel_axis]) if "c" in names else None # number, None: no such axis
        self.chunks = tuple(int(chunks[k]) for k in self._spatial) # (z, y, x) decoded at once [voxel]
        self.shards = tuple(int(shards[k]) for k in self._spatial) if shards else None # (z, y, x) a file [voxel]
        self.spacing = None if spacing is None else tuple(float(s) for s in spacing) # (z, y, x) [mm]
        self.fill_value, self._identity, self._array = fill_value, identity, array
        self._handle, self._pid = None, None

    def __getstate__(self) -> dict: return {**self.__dict__, "_handle": None, "_pid": None}

    def __repr__(self) -> str:
        lead = f"{self.channels} channels of " if self.channels else ""
        size = " x ".join(map(str, self.shape))
        return f"ChunkedVolume({self.path}: {lead}{size} {self.dtype}, chunks {self.chunks})"

    def _stored(self, index: tuple[slice, ...]) -> np.ndarray:
        if self._array is not None: return self._array[index].copy()
        if self._pid != os.getpid():
            self._handle, self._pid = _HANDLES[self.kind](where=self.path, **self._spec), os.getpid()
        return np.asarray(self._handle(index))

    def _index(self, box: Sequence[slice]) -> tuple[slice, ...]:
        take = dict(zip("zyx", box)) | {"t": slice(0, 1), "c": slice(0, self.channels)}
        return tuple(take[a] for a in self._names)

    def _box(self, box: Sequence[slice]) -> np.ndarray:
        "Voxels of a box inside the volume"
        size = [s.stop - s.start for s in box]
        check_budget([self.channels or 1, *size], self.dtype, self.path)
        try: out = self._stored(self._index(box))
        except (MissingFile, MissingExtra): raise
        except Exception as e: self._blame(box, e)
        kept = [a for a in self._names if a != "t"]
        if "t" in self._names: out = out.squeeze(self._names.index("t"))
        out = out.transpose([kept.index(a) for a in "czyx" if a in kept])
        out = np.ascontiguousarray(out, self.dtype)
        return out if out.flags.writeable else out.copy()

    def _blame(self, box: Sequence[slice], error: Exception) -> None:
        "Raise with the key of the first chunk of the box that cannot be read"
        for key in itertools.product(*(range(s.start//c, -(-s.stop//c)) for s, c in zip(box, self.chunks))):
            part = [slice(k*c, min((k + 1)*c, n)) for k, c, n in zip(key, self.chunks, self.shape)]
            with as_format_error(f"{self.path}, chunk {'.'.join(map(str, key))} of z.y.x", "cannot be read"):
                self._stored(self._index(part))
        with as_format_error(self.path, "cannot be read"): raise error

    def __getitem__(
        self,
        index: Any, # whole numbers, slices with a positive step and '...' for (z, y, x)
    ) -> np.ndarray: # (z, y, x) or (c, z, y, x), without the axes that got a whole number
        "Voxels, as a NumPy array would give them; all channels"
        index = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in index: k = index.index(Ellipsis); index[k:k + 1] = [slice(None)]*(4 - len(index))
        if len(index) > 3: raise DataError(f"{self.path}: {len(index)} indices, a volume has three axes")
        box, then = [], [slice(None)]*(self.channels is not None)
        for i, n in zip(index + [slice(None)]*(3 - len(index)), self.shape):
            if isinstance(i, slice):
                a, b, step = i.indices(n)
                if step < 1: raise DataError(f"{self.path}: steps must be >= 1, got {i}")
                box.append(slice(a, max(a, b)))
                then.append(slice(None, None, step))
            elif isinstance(i, (int, np.integer)) and -n <= i < n:
                box.append(slice(int(i) % n, int(i) % n + 1))
                then.append(0)
            else: raise DataError(f"{self.path}: index {i!r} is not a slice or a whole number below {n}")
        return self._box(box)[tuple(then)]

    def read(
        self,
        start: Sequence[int], # (z, y, x) first voxel, may lie outside
        size: Sequence[int], # (z, y, x) [voxel]
    ) -> tuple[np.ndarray, tuple[slice, ...]]: # (z, y, x) or (c, z, y, x) array, and the part of it inside the volume
        "Voxels of a box that may stick out of the volume; zero outside"
        lead = () if self.channels is None else (self.channels,)
        check_budget((*lead, *size), self.dtype, self.path)
        if any(s >= n or s + p <= 0 for s, p, n in zip(start, size, self.shape)):
            return np.zeros((*lead, *size), self.dtype), (slice(0, 0),)*3
        source, inside = patch_slices(start, size, self.shape)
        part = self._box(source)
        if part.shape[-3:] == tuple(size): return part, inside
        out = np.zeros((*lead, *size), self.dtype)
        out[(..., *inside)] = part
        return out, inside

    def _files(self) -> dict[str, str] | None:
        "Files of the store below the array -> size and date; None: it cannot be listed"
        if self.kind == "tif": return {f: _stamp(f) for f in self._spec["files"]}
        store, name = self._spec["store"], self._spec["name"]
        if "://" in store: return Remote(store).listing(name)
        root = os.path.join(store, name)
        found = (os.path.join(folder, f) for folder, _, files in os.walk(root) for f in files)
        return {os.path.relpath(f, root): _stamp(f) for f in found}

    def _keys(self, files: Mapping[str, str]) -> dict[tuple[int, ...], str]:
        "Chunk (or shard) in stored axes -> file, of those files that are chunks"
        unit = [s or c for s, c in zip(self._spec["shards"] or [0]*len(self._shape), self._spec["chunks"])]
        out = {}
        for f in files:
            at = re.fullmatch(r"(?:c[/.])?(\d+(?:[/.]\d+)*)", f)
            key = tuple(map(int, re.split("[/.]", at[1]))) if at else ()
            if len(key) == len(unit) and all(k*u < n for k, u, n in zip(key, unit, self._shape)): out[key] = f
        return out

    def stored_chunks(self) -> list[tuple[int, int, int]] | None: # sorted (z, y, x) indices; None: cannot be told
        "Chunks, or shards if there are shards, that the store holds; all others equal the fill value"
        if self.kind != "zarr": return None
        files = self._files()
        return None if files is None else sorted({tuple(k[a] for a in self._spatial) for k in self._keys(files)})

    def fingerprint(self) -> dict[str, str]: # hashes of the metadata and of the content
        "Short hashes that change when the volume changes: by names, sizes and dates of its files, or tags of a server"
        if self._array is not None: content: Any = self._array
        else:
            content = self._files()
            if content is None: content = self._tags()
            elif self.kind == "zarr": content = {f: content[f] for f in self._keys(content).values()}
            content = "\n".join(f"{f} {content[f]}" for f in sorted(content))
        return {"metadata": self._identity, "content": fingerprint(content)}

    def _tags(self, most: int = 4096) -> dict[str, str | None]:
        "Tags of the metadata and of the chunks; of evenly spread ones if there are very many"
        remote, name = Remote(self._spec["store"]), self._spec["name"]
        unit = self._spec["shards"] or self._spec["chunks"]
        counts = [-(-n//u) for n, u in zip(self._shape, unit)]
        total = int(np.prod(counts, dtype=object))
        if total > most: log.warning("%s: only %d of %d chunks are asked for changes", self.path, most, total)
        keys = {int(k) for k in np.linspace(0, total - 1, min(total, most))}
        encode = _open_node(self._spec["store"], name, self.path).metadata.encode_chunk_key
        names = [encode(tuple(int(v) for v in np.unravel_index(k, counts))) for k in sorted(keys)]
        return {f: remote.tag(f"{name}/{f}".lstrip("/")) for f in ("zarr.json", ".zarray", *names)}

def _stamp(file: str) -> str:
    s = os.stat(file)
    return f"{s.st_size} {s.st_mtime_ns}"

# %% [markdown]
# ## Opening
# Metadata are words from outside. They are bounded before anything is allocated: a chunk of 4 GiB cannot be meant.

# %%
#| export
def _zarr_volume(store: str, name: str, level: int, channel_axis: int | None, channels: int | None, reader: str,
                 cache_bytes: int, where: str) -> ChunkedVolume:
    import zarr
    node, told, place = _open_node(store, name, where), "", None
    attrs = dict(node.attrs)
    if isinstance(node, zarr.Group):
        ome = attrs.get("ome", attrs)
        images = ome.get("multiscales") if isinstance(ome, Mapping) else None
        if images:
            inner, told, place, notes = _ome_level(images[0], level, where)
            if inner not in node:
                raise FormatError(f"{where}: level {level} names the array {inner!r}, which does not exist")
            node = node[inner]
        else:
            arrays = sorted(k for k, _ in node.arrays()) if node.store.supports_listing else []
            if len(arrays) != 1:
                shown = f"{len(arrays)} arrays ({', '.join(arrays[:8])})" if arrays else "unknown arrays"
                raise DataError(f"{where} is a group of {shown} and no OME-Zarr image. Name one of them: "
                                f"{store}/{arrays[0] if arrays else 'NAME'}")
            node, level = node[arrays[0]], level or None
            attrs |= dict(node.attrs)
    else:
        level = level or None
        if name and "/" not in name and "://" not in store and _has_group(store):
            attrs = {**dict(zarr.open(store, mode="r").attrs), **attrs}
    if level and not told: raise DataError(f"{where}: level {level} was asked for, but it is one array and no pyramid")
    array = _check_array(node, where)
    if 0 in array.shape: raise DataError(f"{where}: is empty, shape {array.shape}")
    sizes = *array.shape, *array.chunks, *(getattr(array, "shards", None) or ())
    if min(sizes) < 1 or len(array.chunks) != array.ndim:
        raise FormatError(f"{where}: damaged metadata, shape {array.shape} in chunks of {array.chunks}")
    told = told or _told(attrs, getattr(array.metadata, "dimension_names", None), array.ndim)
    names = _axes(told, array.shape, channel_axis, channels, where)
    space = "".join(a for a in names if a in "xyz")
    if place is None: _, place, notes = _place({**attrs, "axes": space}, 3, where)
    sizes = np.linalg.norm(place[:3, :3], axis=0)
    spacing = None if any(code == "W207" for code, _ in notes) else [sizes[space.index(a)] for a in "zyx"]
    shards = getattr(array, "shards", None)
    described = {k: v for k, v in array.metadata.to_dict().items() if k not in ("attributes", "consolidated_metadata")}
    spec = {"store": store, "name": array.path, "version": array.metadata.zarr_format, "reader": reader,
            "chunks": array.chunks, "shards": shards, "cache_bytes": cache_bytes}
    fill = array.fill_value if array.fill_value is not None else 0
    return ChunkedVolume(where, "zarr", spec, names, array.shape, array.dtype, array.chunks, shards=shards,
                         spacing=spacing, fill_value=np.asarray(fill).item(), identity=fingerprint(repr(described)))

def _has_group(store: str) -> bool: return any(Path(store, f).exists() for f in (".zgroup", "zarr.json"))

# %%
#| export
def _slices(folder: Path) -> list[str]:
    "Numbered TIF files of a folder in the order of their numbers"
    files = [p for p in folder.iterdir() if p.suffix.lower() in (".tif", ".tiff") and p.is_file()]
    numbers = {p: re.findall(r"\d+", p.stem) for p in files}
    bare = sorted(p.name for p, n in numbers.items() if not n)
    if bare: raise FormatError(f"{folder}: {bare[0]} has no number")
    order = sorted(files, key=lambda p: int(numbers[p][-1]))
    found = [int(numbers[p][-1]) for p in order]
    for a, b, p in zip(found, found[1:], order[1:]):
        if b != a + 1:
            what = f"slice {a + 1} is missing" if b > a else f"two slices have the number {a}"
            raise FormatError(f"{folder}: {what} (at {p.name})")
    return [str(p) for p in order]

def _tif_spacing(file: Any, page: Any) -> list[float] | None:
    "(z, y, x) in mm, where ImageJ wrote it with a unit"
    meta = file.imagej_metadata or {}
    unit = str(meta.get("unit", "")).replace("\\u00B5", "µ").lower()
    rates = [page.tags.get(k) for k in ("YResolution", "XResolution")]
    if unit not in _TO_MM or "spacing" not in meta or not all(r is not None and r.value[0] for r in rates): return None
    return [s*_TO_MM[unit] for s in (float(meta["spacing"]), *(r.value[1]/r.value[0] for r in rates))]

def _tif_volume(path: Path, level: int, channel_axis: int | None, channels: int | None, cache_bytes: int, where: str
                ) -> ChunkedVolume:
    import tifffile
    files = _slices(path) if path.is_dir() else [str(path)]
    with _strict_tif(files[0]), tifffile.TiffFile(files[0]) as file:
        series = _tif_series(file, level, where)
        shape, letters, page = tuple(series.shape), series.axes, series.keyframe
        inner, spacing = page.shape, _tif_spacing(file, page)
        dtype = np.dtype(series.dtype)
    if dtype.kind not in "biuf": raise DataError(f"{where}: holds {dtype} values, only real numbers are supported")
    if len(shape) == len(inner) and (len(files) > 1 or len(shape) == 2):
        shape, letters = (len(files), *shape), "Z" + letters
    elif len(files) > 1: raise FormatError(f"{files[0]}: a slice has one page, this has {' x '.join(map(str, shape))}")
    if 0 in shape: raise DataError(f"{where}: is empty, shape {shape}")
    told = letters.lower().translate(str.maketrans("iqps", "zzzc"))
    chunks = (*(1,)*(len(shape) - len(inner)), *inner)
    check_budget(chunks, dtype, where)
    names = _axes(told if set("xyz") <= set(told) <= set("tcxyz") and len(set(told)) == len(told) else "",
                  shape, channel_axis, channels, where)
    native = dtype.newbyteorder("=")
    spec = {"files": files, "level": level, "shape": shape, "chunks": chunks, "dtype": native.str,
            "cache_bytes": cache_bytes}
    return ChunkedVolume(where, "tif", spec, names, shape, native, chunks, spacing=spacing,
                         identity=fingerprint([list(shape), names, native.str]))

# %%
#| export
def open_volume(
    path: str | os.PathLike | np.ndarray, # Zarr store, array in it, or URL; TIF file; folder of TIF slices; or an array
    level: int = 0, # resolution level of a pyramid, 0 is the finest
    *,
    channel_axis: int | None = None, # stored position of the channels, if the store does not tell
    channels: int | None = None, # how many are expected
    cache_bytes: int = 0, # decoded chunks kept in each process [byte]
    reader: Literal["auto", "zarr", "tensorstore"] = "auto", # of local Zarr; auto: the faster one there is
) -> ChunkedVolume: # (z, y, x), or (c, z, y, x) with channels
    "Open a volume for reading parts of it; voxels are not read yet"
    if reader not in ("auto", "zarr", "tensorstore"):
        raise DataError(f"reader: must be 'auto', 'zarr' or 'tensorstore', got {reader!r}")
    if isinstance(path, np.ndarray):
        names = _axes("", path.shape, channel_axis, channels, "array")
        chunks = [128 if a != "c" else n for a, n in zip(names, path.shape)]
        return ChunkedVolume("array", "array", {}, names, path.shape, path.dtype, chunks, array=path,
                             identity=fingerprint([list(path.shape), names, path.dtype.str]))
    where = os.fspath(path).removeprefix("file://")
    with as_format_error(where, "damaged, or not a volume"):
        if "://" in where:
            return _zarr_volume(where, "", level, channel_axis, channels, reader, cache_bytes, where)
        file = Path(where)
        if file.suffix.lower() in (".tif", ".tiff") and file.is_file():
            return _tif_volume(file, level, channel_axis, channels, cache_bytes, where)
        if file.is_dir() and not _has_group(where) and not (file/".zarray").exists():
            if any(p.suffix.lower() in (".tif", ".tiff") for p in file.iterdir()):
                return _tif_volume(file, level, channel_axis, channels, cache_bytes, where)
        store, name = _split(where)
        if not store.exists(): raise MissingFile(f"{store} does not exist")
        if not store.is_dir(): raise FormatError(f"{where}: not a Zarr folder, a TIF file or a folder of slices")
        return _zarr_volume(str(store), name, level, channel_axis, channels, reader, cache_bytes, where)

# %% [markdown]
# The same volume, written in seven ways. Whatever the file, the box is the same.

# %%
roll = phantoms.sheets((40, 64, 56))
vol = Volume(roll.img, affine_from(0.01, axes="zyx"), "zyx")
folder = tempfile.TemporaryDirectory()
d = Path(folder.name)
write_zarr(vol, d/"v2.zarr", chunks=32, version=2)
write_zarr(vol, d/"v3.zarr", chunks=32)
write_zarr(vol, d/"sharded.zarr", chunks=16, shards=(32, 32, 32))
write_ome_zarr(vol, d/"pyramid.ome.zarr", version="0.4", chunks=32, unit="micrometer")
tifffile.imwrite(d/"pages.tif", roll.img)
tifffile.imwrite(d/"packed.tif", roll.img, compression="zlib")
(d/"slices").mkdir()
for k, page in enumerate(roll.img): tifffile.imwrite(d/"slices"/f"roll_{k}.tif", page)
names = "v2.zarr", "v3.zarr", "sharded.zarr", "pyramid.ome.zarr", "pages.tif", "packed.tif", "slices"
volumes = {name: open_volume(d/name) for name in names}
[(name, v.chunks, v.shards, v.spacing and v.spacing[0]) for name, v in volumes.items()]

# %%
for v in volumes.values():
    assert v.shape == (40, 64, 56) and v.dtype == np.uint8 and np.array_equal(v[...], roll.img)
    assert np.array_equal(v[3:30, -20:, 7], roll.img[3:30, -20:, 7]) and np.array_equal(v[-1, ::3], roll.img[-1, ::3])
assert open_volume(d/"pyramid.ome.zarr", level=1).shape == (20, 32, 28)

# %% [markdown]
# A patch may stick out. The second value says which part is real.

# %%
patch, valid = volumes["sharded.zarr"].read((-8, 40, 20), (24, 48, 48))
plot.montage([patch[16], roll.img[8]], titles=["patch at (-8, 40, 20), slice 16", "volume, slice 8"])

# %%
assert valid == (slice(8, 24), slice(0, 24), slice(0, 36)) and np.array_equal(patch[valid], roll.img[:16, 40:, 20:])
assert not np.delete(patch, range(8, 24), axis=0).any()

# %% [markdown]
# Normals are often stored with the vector last. They come out with the vector first, and a chunk that was never
# written is not in the list.

# %%
raw = np.zeros((40, 64, 56, 3), np.uint16)
raw[:32, :32] = np.moveaxis(np.rint((roll.normals[:, :32, :32] + 1)*32767.5), 0, -1)
group = zarr.open_group(str(d/"normals.zarr"), mode="w")
group.create_array("normals", shape=raw.shape, dtype=raw.dtype, chunks=(32, 32, 32, 3))[...] = raw
normals = open_volume(d/"normals.zarr", channels=3)
normals, normals.stored_chunks()

# %%
assert normals.channel_axis == 3 and np.array_equal(normals[:9], np.moveaxis(raw[:9], -1, 0))
assert normals.stored_chunks() == [(0, 0, 0), (0, 0, 1)]

# %% [markdown]
# The fingerprint depends on content, not on how the object came to be, and notices a file that was written again.

# %%
before = normals.fingerprint()
group["normals"][39] = 1
assert open_volume(d/"normals.zarr", channels=3).fingerprint()["metadata"] == before["metadata"]
assert normals.fingerprint()["content"] != before["content"]

# %% [markdown]
# A damaged chunk is named, and a group of several arrays is not guessed at.

# %%
chunk = d/"v3.zarr"/"image"/"c"/"1"/"0"/"1"
damaged = bytearray(chunk.read_bytes())
damaged[50] ^= 1
chunk.write_bytes(damaged)
with raises(FormatError, match=r"v3.zarr, chunk 1.0.1 of z.y.x"): open_volume(d/"v3.zarr")[...]
with raises(FormatError, match=r"v3.zarr, chunk 1.0.1 of z.y.x"): open_volume(d/"v3.zarr", reader="zarr")[...]
group.create_array("sheet", shape=(8, 8, 8), dtype="u1")
with raises(DataError, match=r"group of 2 arrays \(normals, sheet\)"): open_volume(d/"normals.zarr")
with raises(MissingFile): open_volume(d/"absent.zarr")
(d/"slices"/"roll_7.tif").unlink()
with raises(FormatError, match="slice 7 is missing"): open_volume(d/"slices")

# %%
folder.cleanup()
