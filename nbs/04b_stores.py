# %% [markdown]
# # Zarr, OME-Zarr, HDF5 and NumPy
#
# > Volumes in chunks: lazily read, checksummed when written, with their place in the world.
#
# A volume of a terabyte does not fit in memory and does not have to. Chunked formats keep it as many small compressed
# blocks. The functions here return a `Volume` whose data is the store itself: slicing reads only the blocks that are
# touched. They also cure two weaknesses. By default neither zarr nor HDF5 notices a flipped bit, so what we write
# carries checksums. And neither says where the volume is in the world, so we write the affine, and read what others
# wrote: OME-NGFF scales and translations, names of dimensions, and the usual voxel size attributes.
#
# Formats: [Zarr v2 and v3](https://zarr-specs.readthedocs.io), [OME-NGFF 0.4 and 0.5](https://ngff.openmicroscopy.org),
# [HDF5](https://docs.h5py.org), [NPY](https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).

# %%
#| default_exp stores

# %%
#| export
import asyncio
import contextlib
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal

import numpy as np

from medvol_nb.core import (ConfigError, DataError, FormatError, MedvolError, MissingExtra, MissingFile, OnExists,
                            atomic, check_output, human_bytes, log, optional)
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.nifti import MAX_BYTES

# %%
import matplotlib.pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import close, raises, tmpdir
from medvol_nb.geometry import same_grid, to_world

# %% [markdown]
# ## Files are untrusted
# Damaged or hostile metadata makes the libraries below raise a dozen kinds of errors, few of which say which file it
# was. `as_format_error` turns them into one that does. And a store of a few bytes can announce a petabyte, so whatever
# is to be loaded is compared with a budget first.

# %%
#| export
@contextlib.contextmanager
def as_format_error(
    where: str, # file or store, for the message
    what: str = "damaged", # what is wrong if anything is raised
) -> Iterator[None]:
    "Whatever a library raises in the block becomes a `FormatError` with its place; our own errors keep their kind"
    try: yield
    except MedvolError as e:
        if where in str(e): raise
        raise type(e)(f"{where}: {e}") from None
    except Exception as e: raise FormatError(f"{where}: {what} ({type(e).__name__}: {e})") from None

def check_budget(
    shape: Sequence[int], # of the array to be loaded
    dtype: Any, # its number type
    where: str, # file or store, for the message
    max_bytes: int = MAX_BYTES, # refuse larger arrays [byte]
) -> None:
    "Refuse to load an array that is too large, before memory is taken"
    size = int(np.prod([int(n) for n in shape], dtype=object))*np.dtype(dtype).itemsize
    if size > max_bytes:
        raise DataError(f"{where}: {human_bytes(size)} ({' x '.join(map(str, shape))}) is more than the budget of "
                        f"{human_bytes(max_bytes)}. Read a part of it, or set MEDVOL_MAX_BYTES")

# %%
with raises(FormatError, match=r"a.zarr: damaged \(KeyError: 'shape'\)"):
    with as_format_error("a.zarr"): {}["shape"]
with raises(DataError, match="TiB .* is more than the budget"): check_budget((10**6,)*3, "u2", "a.zarr")

# %% [markdown]
# ## Where is it, how large is a voxel
# Attributes are words from outside. Our own are checked as strictly as a header; the known ones of other tools are read
# with their units, and a name that says nothing about units is not guessed at. Where nothing names the axes with single
# letters, they are taken for `zyx`, with channels in front of a fourth.

# %%
#| export
_TO_MM = MappingProxyType({"m": 1e3, "meter": 1e3, "cm": 10.0, "centimeter": 10.0, "mm": 1.0, "millimeter": 1.0,
                           "um": 1e-3, "µm": 1e-3, "micrometer": 1e-3, "micron": 1e-3, "nm": 1e-6, "nanometer": 1e-6,
                           "angstrom": 1e-7})
_SIZE_KEYS = MappingProxyType({"spacing_mm": 1.0, "voxel_size_mm": 1.0, "element_size_um": 1e-3, "voxel_size_um": 1e-3,
                               "voxel_size_nm": 1e-6, "resolution_nm": 1e-6, "resolution_um": 1e-3})

def _numbers(value: Any, n: int, where: str) -> np.ndarray:
    try: out = np.array(value, np.float64)
    except (TypeError, ValueError): out = np.array([])
    if out.shape not in ((n,), (4, n//4)) or not np.isfinite(out).all():
        raise FormatError(f"{where}: must be {n} numbers, got {str(value)[:80]}")
    return out

def _place(attrs: Mapping, ndim: int, where: str) -> tuple[str, np.ndarray, list[tuple[str, str]]]:
    "Axes, affine and notes from the attributes of an array"
    default = ("zyx" if ndim == 3 else "czyx")
    axes = attrs.get("axes", attrs.get("_ARRAY_DIMENSIONS", default))
    if isinstance(axes, (list, tuple)) and all(isinstance(a, str) for a in axes): axes = "".join(axes)
    axes = axes.lower() if isinstance(axes, str) and len(axes) == ndim else default
    if sorted(axes.removeprefix("c")) != list("xyz"):
        raise FormatError(f"{where}: axes are {axes!r}, must be x, y, z in any order, with 'c' in front for channels")
    if "affine" in attrs: return axes, _numbers(attrs["affine"], 16, f"{where}: affine").reshape(4, 4), []
    for key, factor in _SIZE_KEYS.items():
        if key in attrs:
            sizes = _numbers(attrs[key], 3, f"{where}: {key}")*factor
            if sizes.min() <= 0: raise FormatError(f"{where}: {key} must be > 0, got {attrs[key]}")
            return axes, affine_from(sizes, axes=axes), []
    return axes, affine_from(1.0, axes=axes), [("W207", "the store has no voxel size, 1 mm is assumed")]

# %% [markdown]
# ## OME-NGFF
# A multiscale image is a list of arrays with, for each, a scale and a translation by axis. We need the three space
# axes, in stored order, and their unit. Writers other than ours exist, so all of it is optional but none of it is
# trusted.

# %%
#| export
def _scale_and_shift(transforms: Any, n: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    scale, shift = np.ones(n), np.zeros(n)
    for t in transforms or ():
        if not isinstance(t, Mapping): raise FormatError(f"{where}: a coordinate transformation is not an object")
        if t.get("type") == "scale":
            factor = _numbers(t.get("scale"), n, f"{where}: scale")
            scale, shift = scale*factor, shift*factor
        elif t.get("type") == "translation": shift = shift + _numbers(t.get("translation"), n, f"{where}: translation")
        elif t.get("type") != "identity": raise FormatError(f"{where}: transformation {t.get('type')!r} is not known")
    return scale, shift

def _ome_level(image: Mapping, level: int, where: str) -> tuple[str, str, np.ndarray, list[tuple[str, str]]]:
    "Path, axes, affine and notes of one resolution level of a multiscale image"
    sets = image.get("datasets")
    if not isinstance(sets, list) or not sets: raise FormatError(f"{where}: multiscales without datasets")
    if not 0 <= level < len(sets): raise DataError(f"{where}: level {level} was asked for, it has 0 to {len(sets) - 1}")
    axes = image.get("axes") or ["t", "c", "z", "y", "x"]
    names = [a.get("name") if isinstance(a, Mapping) else a for a in axes]
    if not all(isinstance(a, str) for a in names): raise FormatError(f"{where}: axes have no names")
    names = [a.lower() for a in names]
    scale, shift = _scale_and_shift(sets[level].get("coordinateTransformations"), len(names), where)
    scale2, shift2 = _scale_and_shift(image.get("coordinateTransformations"), len(names), where)
    scale, shift = scale*scale2, shift*scale2 + shift2
    space = [k for k, a in enumerate(names) if a in "xyz"]
    if sorted(names[k] for k in space) != list("xyz") or not set(names) <= set("tcxyz"):
        raise FormatError(f"{where}: axes {names} are not x, y, z")
    units = [str(axes[k].get("unit") or "").lower() if isinstance(axes[k], Mapping) else "" for k in space]
    for u in units:
        if u and u not in _TO_MM: raise FormatError(f"{where}: length unit {u!r} is not known")
    notes = [] if all(units) else [("W207", "the store has no length unit, taken as millimetres")]
    mm = np.array([_TO_MM.get(u, 1.0) for u in units])
    sizes, origin = scale[space]*mm, np.zeros(3)
    if sizes.min() <= 0: raise FormatError(f"{where}: scale must be > 0, got {scale.tolist()}")
    kept = "".join(names[k] for k in space)
    for a, o in zip(kept, shift[space]*mm): origin["xyz".index(a)] = o
    path = sets[level].get("path")
    if not isinstance(path, str) or ".." in path.split("/"):
        raise FormatError(f"{where}: dataset path {path!r} is not valid")
    return path, "".join(names), affine_from(sizes, origin, kept), notes

# %%
#| export
def _drop_single(data: Any, names: str, where: str) -> tuple[Any, str]:
    "Remove time and channel axes of length one; loads nothing unless an axis has to go"
    gone = [k for k, a in enumerate(names) if a in "tc" and data.shape[k] == 1]
    if any(a == "t" and data.shape[k] > 1 for k, a in enumerate(names)):
        raise DataError(f"{where}: holds {data.shape[names.index('t')]} time points. Read one of them with zarr itself")
    if gone: data = data[tuple(0 if k in gone else slice(None) for k in range(len(names)))]
    return data, "".join(a for k, a in enumerate(names) if k not in gone)

def _split(path: str | os.PathLike) -> tuple[Path, str]:
    "Split 'file.h5::a/b' or 'store.zarr/a/b' into the file and the name inside"
    text = os.fspath(path)
    if "::" in text:
        file, _, name = text.rpartition("::")
        return Path(file), name.strip("/")
    p = Path(text)
    for parent in p.parents:
        if parent.suffix == ".zarr": return parent, p.relative_to(parent).as_posix()
    return p, ""

_MAX_CHUNK = 4*2**30

def open_zarr(
    path: str | os.PathLike, # store folder; 'store.zarr/name' or 'store.zarr::name' for an array inside
    level: int = 0, # resolution level of a multiscale image, 0 is the finest
) -> Volume: # data is the zarr array itself, read when sliced
    "Open a zarr v2 or v3 array, or a level of an OME-Zarr image, without reading its voxels"
    import zarr
    store, name = _split(path)
    where = str(path)
    if not store.exists(): raise MissingFile(f"{store} does not exist")
    if not store.is_dir(): raise FormatError(f"{where}: a zarr store is a folder")
    with as_format_error(where, "damaged zarr metadata"):
        try: node = zarr.open(str(store), path=name or None, mode="r")
        except (FileNotFoundError, KeyError): raise MissingFile(f"{where}: there is no zarr array or group") from None
        return _zarr_volume(node, store, name, level, where)

def _zarr_volume(node: Any, store: Path, name: str, level: int, where: str) -> Volume:
    "The volume that an open array or group holds"
    import zarr
    attrs: dict = dict(node.attrs)
    if isinstance(node, zarr.Group):
        ome = attrs.get("ome", attrs)
        images = ome.get("multiscales") if isinstance(ome, Mapping) else None
        if images:
            inner, names, affine, notes = _ome_level(images[0], level, where)
            if inner not in node:
                raise FormatError(f"{where}: level {level} names the array {inner!r}, which does not exist")
            array = _check_array(node[inner], where)
            if array.ndim != len(names): raise FormatError(f"{where}: {array.ndim} dimensions, but axes {names}")
            data, axes = _drop_single(array, names, where)
            if axes[0] != "c" and "c" in axes:
                raise DataError(f"{where}: channels are not in front (axes {axes}). Rewrite it with channels first")
            meta = {"path": where, "notes": tuple(notes), "levels": len(images[0]["datasets"])}
            return Volume(data, affine, axes, MappingProxyType(meta))
        arrays = sorted(k for k, _ in node.arrays())
        if len(arrays) != 1:
            raise DataError(f"{where} is a group of {len(arrays)} arrays ({', '.join(arrays[:8]) or 'none'}). "
                            f"Name one of them: {store}/{arrays[0] if arrays else 'NAME'}")
        node = node[arrays[0]]
        attrs = {**attrs, **dict(node.attrs)}
    elif name and "/" not in name:
        parent = zarr.open(str(store), mode="r")
        attrs = {**dict(parent.attrs), **attrs}
    if level: raise DataError(f"{where}: level {level} was asked for, but it is one array and no pyramid")
    array = _check_array(node, where)
    if array.ndim not in (3, 4):
        raise DataError(f"{where}: {array.ndim} dimensions, a volume has 3, or 4 with channels")
    dims = getattr(array.metadata, "dimension_names", None) # of version 3; version 2 has them in the attributes
    axes, affine, notes = _place({**({"_ARRAY_DIMENSIONS": list(dims)} if dims else {}), **attrs}, array.ndim, where)
    return Volume(array, affine, axes, MappingProxyType({"path": where, "notes": tuple(notes), "levels": 1}))

def _check_array(array: Any, where: str) -> Any:
    "Refuse types we cannot use and chunks no machine could hold, before anything is decoded"
    if not hasattr(array, "chunks"): raise FormatError(f"{where}: a group where an array is expected")
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "biuf": raise DataError(f"{where}: holds {dtype} values, only real numbers are supported")
    chunk = int(np.prod(getattr(array, "shards", None) or array.chunks, dtype=object))*dtype.itemsize
    if chunk > _MAX_CHUNK:
        raise FormatError(f"{where}: one chunk would take {human_bytes(chunk)}, the metadata must be damaged")
    return array

# %% [markdown]
# ## Decoding faster
# Where it is installed, [tensorstore](https://google.github.io/tensorstore) decodes local stores: the same voxels,
# several times faster on shards and small chunks. It does not survive a fork of a process that used it, so a forked
# child takes zarr, whose event loop starts anew there. Its file reads run in one thread, which keeps the buffers warm
# (a quarter of the time on uncompressed chunks), and in a worker process so does its decoding: the other workers need
# their processors.

# %%
#| export
_tensorstore_pid: int | None = None # process that first used tensorstore: a fork of it must not

def fast_reader(
    folder: str | os.PathLike, # of the array itself, local
    version: int, # of the zarr format, 2 or 3
    cache_bytes: int = 0, # decoded chunks that are kept [byte]
) -> Callable: # from an index of slices and integers to the voxels
    "Read an array by tensorstore. Raises MissingExtra without it, ValueError for a codec it lacks and after a fork"
    global _tensorstore_pid
    if _tensorstore_pid not in (None, os.getpid()):
        raise DataError(f"{folder}: tensorstore was used before this process was forked from its parent and would "
                        "hang. Start workers with 'spawn' or 'forkserver', or use reader='auto'")
    ts = optional("tensorstore", extra="fast")
    spec = {"driver": "zarr" if version == 2 else "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"},
            "recheck_cached_metadata": "open", "recheck_cached_data": "open"}
    limits = {"cache_pool": {"total_bytes_limit": cache_bytes}, "file_io_concurrency": {"limit": 1}}
    if multiprocessing.parent_process() is not None: limits["data_copy_concurrency"] = {"limit": 1}
    context = ts.Context(limits)
    _tensorstore_pid = _tensorstore_pid or os.getpid()
    array = ts.open(spec=spec, context=context, read=True).result()
    return lambda index: array[index].read().result()

def reader_of(
    data: Any, # array, or array in a store
) -> Callable: # from an index of slices and integers to the voxels
    "How boxes of a volume's data are read fastest"
    folder = getattr(getattr(data, "store", None), "root", None) # of a zarr array in a local store
    if folder is not None:
        try: return fast_reader(os.path.join(folder, data.path).rstrip("/"), data.metadata.zarr_format)
        except (ValueError, MissingExtra) as e: # a codec it lacks, not installed, or after a fork
            log.debug("%s: read by zarr instead of tensorstore (%s)", folder, e)
    return data.__getitem__

# %% [markdown]
# ## Writing with checksums
# Version 3 stores get a CRC-32C over each compressed chunk, version 2 stores use the content checksum of zstd. A whole
# store is written beside its final name and moved there when complete, so a half-written store is never found under
# the name of a whole one.

# %%
#| export
def _chunks_for(shape: Sequence[int], chunks: int | Sequence[int], shards: Sequence[int] | None = None
                ) -> tuple[int, ...]:
    "Chunk of an array of this shape: no larger than the array, unless it has to divide the shards"
    wanted = np.asarray(chunks)
    if wanted.shape not in ((), (3,)) or wanted.dtype.kind not in "iu" or wanted.min() < 1:
        raise DataError(f"chunks: must be one size or three, each >= 1, got {chunks}")
    wanted = np.broadcast_to(wanted, (3,))
    if shards is not None and (len(shards) != 3 or min(shards) < 1 or any(s % c for s, c in zip(shards, wanted))):
        raise DataError(f"shards: must be three multiples of the chunk {tuple(wanted.tolist())}, got {shards}")
    most = shape[-3:] if shards is None else shards
    return (1,)*(len(shape) - 3) + tuple(int(min(c, n)) for c, n in zip(wanted, most))

def packers_for(
    compressor: Mapping[str, Any], # {"name": "zstd", "level": 1}; names: zstd, gzip, blosc, none; blosc takes more
    version: int, # of the zarr format, 2 or 3
) -> tuple: # codecs for `zarr.Group.create_array`
    "Compression with a checksum behind it"
    given = dict(compressor)
    name, level = given.pop("name", "zstd"), given.pop("level", 1)
    known = {3: ("zstd", "gzip", "blosc", "none"), 2: ("zstd", "gzip")}[version]
    if name not in known:
        raise ConfigError(f"compressor: {name!r} is not one of {', '.join(known)}, which zarr version {version} stores "
                          "with checksums here")
    try:
        if version == 2:
            import numcodecs
            return (numcodecs.Zstd(level=level, checksum=True, **given) if name == "zstd" else
                    numcodecs.GZip(level=level, **given),)
        from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
        make = {"zstd": lambda: ZstdCodec(level=level, **given), "gzip": lambda: GzipCodec(level=level, **given),
                "blosc": lambda: BloscCodec(clevel=level, **{"cname": "zstd", "shuffle": "shuffle", **given})}
        return (*([make[name]()] if name in make else []), Crc32cCodec())
    except (TypeError, ValueError) as e: raise ConfigError(f"compressor: {compressor} is not understood: {e}") from None

def create_array(
    group: Any, # open zarr group
    name: str, # of the new array
    shape: Sequence[int], # of the new array
    dtype: Any, # number type
    chunks: Sequence[int], # of the new array
    *,
    attributes: Mapping | None = None, # plain values
    shards: Sequence[int] | None = None, # version 3 only: several chunks in one file, each a multiple of `chunks`
    compressor: Mapping[str, Any] | None = None, # see `packers_for`; None: zstd of level 3
    nested: bool = False, # version 2: a folder for each index of a chunk, as version 3 always has it
    axes: str | None = None, # names of the dimensions, kept by version 3
) -> Any: # zarr array; chunks that hold nothing but 0 are not stored
    "New zarr array with compression and checksums, in the version of its group"
    version = group.metadata.zarr_format
    packers = packers_for(compressor or {"name": "zstd", "level": 3}, version)
    extra: dict[str, Any] = {"shards": tuple(shards)} if shards is not None else {}
    if axes is not None and version == 3: extra["dimension_names"] = list(axes)
    if nested and version == 2: extra["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
    return group.create_array(name, shape=tuple(shape), dtype=dtype, chunks=tuple(chunks), compressors=packers,
                              fill_value=0, attributes=dict(attributes or {}), config={"write_empty_chunks": False},
                              **extra)

@contextlib.contextmanager
def settled() -> Iterator[None]:
    "Around writes: zarr tells the first error while it still writes other chunks in its threads; wait for those"
    from zarr.core.sync import sync
    async def settle() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
    try: yield
    except BaseException:
        sync(settle())
        raise

@contextlib.contextmanager
def new_store(
    path: str | os.PathLike, # of the store, a folder
    on_exists: OnExists = "overwrite", # as in `atomic`
    *,
    version: Literal[2, 3] = 3, # of the zarr format
    attributes: Mapping | None = None, # plain values
) -> Iterator[Any]: # its zarr group, open until the store takes its name
    "Write a store all at once"
    import zarr
    with atomic(path, on_exists, folder=True) as t, settled():
        yield zarr.create_group(str(t), zarr_format=version, attributes=dict(attributes or {}))

def _fill(array: Any, vol: Volume) -> None:
    "Copy a volume into an array, one row of chunks at a time"
    lead = (slice(None),)*(len(vol.axes) - 3)
    rows = (getattr(array, "shards", None) or array.chunks)[len(lead)]
    for k in range(0, vol.shape[0], rows):
        part = (*lead, slice(k, k + rows))
        array[part] = np.asarray(vol.data[part])

def write_zarr(
    vol: Volume, # any axes
    path: str | os.PathLike, # new store, a folder ending in .zarr
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    chunks: int | Sequence[int] = 64, # of the spatial axes, stored order [voxel]
    shards: Sequence[int] | None = None, # of the spatial axes, each a multiple of the chunk [voxel]
    version: Literal[2, 3] = 3, # of the zarr format
    name: str = "image", # of the array inside the store
) -> Path: # `path`
    "Write one array with its axes and affine, checksummed and all at once"
    path = Path(path)
    if version not in (2, 3): raise DataError(f"version: must be 2 or 3, got {version}")
    if shards is not None and version == 2: raise DataError("shards: exist in version 3 of zarr only")
    sizes = _chunks_for(vol.data.shape, chunks, shards)
    if not check_output(path, on_exists): return path
    with new_store(path, version=version) as group:
        where = {"axes": list(vol.axes), "affine": vol.affine.tolist(), "affine_maps": "stored index to RAS+ mm"}
        lead = (1,)*(len(vol.axes) - 3)
        array = create_array(group, name, vol.data.shape, vol.dtype, sizes, attributes=where,
                             shards=None if shards is None else (*lead, *shards))
        _fill(array, vol)
    return path

# %%
#| export
def downsample2(
    data: np.ndarray, # (..., z, y, x) or any spatial order, the last three axes are halved
    labels: bool = False, # keep one of the values instead of their mean
) -> np.ndarray: # same dtype; odd sizes round up
    "Next level of a pyramid: mean of 2 x 2 x 2 voxels, or their first for labels"
    if labels: return data[..., ::2, ::2, ::2]
    pad = [(0, 0)]*(data.ndim - 3) + [(0, n % 2) for n in data.shape[-3:]]
    exact = np.float32 if data.dtype.itemsize < 4 or data.dtype == np.float32 else np.float64
    total = np.pad(data, pad, mode="edge").astype(exact)
    for axis in (-3, -2, -1):
        a, b = ((slice(None),)*(total.ndim + axis) + (slice(k, None, 2),) for k in (0, 1))
        total = total[a] + total[b]
    total /= 8
    return (np.round(total) if data.dtype.kind in "iu" else total).astype(data.dtype)

def write_ome_zarr(
    vol: Volume, # axes zyx or czyx, along the world axes (no rotation: the format has none)
    path: str | os.PathLike, # new store, a folder ending in .zarr
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    version: Literal["0.4", "0.5"] = "0.5", # of OME-NGFF; 0.4 is zarr v2, 0.5 is zarr v3
    levels: int = 3, # resolution levels, each half the size of the one before
    labels: bool = False, # voxels are labels: never averaged
    chunks: int | Sequence[int] = 64, # of the spatial axes [voxel]
    unit: str = "millimeter", # unit the scales are written in
    image_label: Mapping | None = None, # colours and names of labels, as OME-NGFF has them; makes it a label image
) -> Path: # `path`
    "Write a multiscale image that other OME-Zarr readers understand, checksummed and all at once"
    path = Path(path)
    if vol.spatial_axes != "zyx":
        raise DataError(f"OME-Zarr holds zyx volumes, got {vol.axes}. Use to_axes(vol, 'zyx')")
    if unit not in _TO_MM: raise DataError(f"unit: must be one of {sorted(_TO_MM)}, got {unit!r}")
    if version not in ("0.4", "0.5"): raise DataError(f"version: must be '0.4' or '0.5', got {version!r}")
    if levels < 1: raise DataError(f"levels: must be >= 1, got {levels}")
    _chunks_for(vol.data.shape, chunks)
    if not np.allclose(vol.affine, affine_from(vol.spacing, vol.affine[:3, 3], "zyx"), atol=1e-6*max(vol.spacing)):
        raise DataError("OME-Zarr has no rotations or flips: this volume's axes do not run along the world axes. "
                        "Use reorient(vol, 'RAS') or resample_to first")
    if not check_output(path, on_exists): return path
    lead, mm = len(vol.axes) - 3, _TO_MM[unit]
    sets, origin = [], vol.affine[:3, 3][::-1]
    for k in range(levels):
        scale = np.array(vol.spacing)*2**k
        shift = origin + (0 if labels else 1)*np.array(vol.spacing)*(2**k - 1)/2
        sets.append({"path": str(k), "coordinateTransformations": [
            {"type": "scale", "scale": [1.0]*lead + (scale/mm).tolist()},
            {"type": "translation", "translation": [0.0]*lead + (shift/mm).tolist()}]})
    axes = [{"name": "c", "type": "channel"}]*lead + [{"name": a, "type": "space", "unit": unit} for a in "zyx"]
    image = {"axes": axes, "datasets": sets, "name": path.stem, "type": "nearest" if labels else "mean"}
    three = version == "0.5"
    about = {} if image_label is None else {"image-label": {**({} if three else {"version": "0.4"}), **image_label}}
    old = {"multiscales": [{**image, "version": "0.4"}], **about}
    attributes = {"ome": {"version": "0.5", "multiscales": [image], **about}} if three else old
    with new_store(path, version=3 if three else 2, attributes=attributes) as group:
        current = vol
        for k in range(levels):
            sizes = _chunks_for(current.data.shape, chunks)
            array = create_array(group, str(k), current.data.shape, vol.dtype, sizes, nested=True, axes=vol.axes)
            _fill(array, current)
            if k + 1 < levels: current = replace(vol, data=downsample2(np.asarray(array[...]), labels))
    return path

# %%
head = phantoms.head()
place = affine_from(head.spacing[::-1], (-30, -40, 5), "zyx")
brain = Volume(np.ascontiguousarray(head.img.transpose(2, 1, 0)), place, "zyx")
with tmpdir() as d:
    write_zarr(brain, d/"brain.zarr", chunks=32)
    write_ome_zarr(brain, d/"pyramid.ome.zarr", version="0.4")
    lazy = open_zarr(d/"brain.zarr")
    levels = [open_zarr(d/"pyramid.ome.zarr", level=k).load() for k in range(3)]
    loaded = lazy.load()
    with raises(DataError, match="level 5 was asked for, it has 0 to 2"): open_zarr(d/"pyramid.ome.zarr", level=5)
fig, axs = plt.subplots(1, 3, figsize=(7, 2.6))
for ax, v in zip(axs, levels):
    ax.imshow(v.data[v.shape[0]//2], cmap="gray", origin="lower")
    ax.set_title(" x ".join(map(str, v.shape)))
    ax.axis("off")
type(lazy.data).__name__, loaded

# %% [markdown]
# All levels show the same place: the centre of the coarse volume is the centre of the fine one.

# %%
assert same_grid(loaded, brain) and np.array_equal(loaded.data, brain.data)
middle = [to_world(v.affine, (np.array(v.shape) - 1)/2) for v in levels]
assert close(middle[1], middle[0], 1e-5) and levels[0].axes == "zyx"

# %% [markdown]
# One flipped bit in any chunk is an error, not a different image:

# %%
with tmpdir() as d:
    write_zarr(brain, d/"b.zarr", chunks=32)
    chunk = max((p for p in (d/"b.zarr").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(chunk.read_bytes())
    raw[len(raw)//2] ^= 4
    chunk.write_bytes(raw)
    with raises(ValueError, match="crc32c|checksum"): open_zarr(d/"b.zarr").load()

# %% [markdown]
# ## HDF5 and NumPy
# HDF5 data sets get a Fletcher-32 checksum and gzip, which every HDF5 build since 1.10 reads. That version also keeps
# checksums of its metadata; what h5py writes by default has none, and a flipped bit in the affine would move the volume
# unnoticed. NumPy files hold numbers only: pickled objects are refused, and a bare array has no place in the world.

# %%
#| export
def open_hdf5(
    path: str | os.PathLike, # 'file.h5', or 'file.h5::dataset' if it holds several
) -> Volume: # data is in memory
    "Read a volume from an HDF5 file"
    import h5py
    file, name = _split(path)
    where = str(path)
    if not file.exists(): raise MissingFile(f"{file} does not exist")
    try: f = h5py.File(file, "r")
    except OSError as e: raise FormatError(f"{where}: not a readable HDF5 file ({e})") from None
    with f, as_format_error(where, "damaged HDF5 file"):
        found: list[str] = []
        f.visititems(lambda k, v: found.append(k) if isinstance(v, h5py.Dataset) and v.ndim in (3, 4) else None)
        if not name and len(found) != 1:
            raise DataError(f"{where} holds {len(found)} volumes ({', '.join(sorted(found)[:8]) or 'none'}). "
                            f"Name one of them: {file}::{sorted(found)[0] if found else 'NAME'}")
        name = name or found[0]
        if name not in found:
            raise MissingFile(f"{where}: no 3-D data set {name!r}, found {', '.join(sorted(found)[:8]) or 'none'}")
        dataset = f[name]
        attrs = {k: v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v
                 for k, v in {**f.attrs, **dataset.attrs}.items()}
        attrs = {k: v.decode("ascii") if isinstance(v, bytes) else v for k, v in attrs.items()}
        if dataset.dtype.kind not in "biuf":
            raise DataError(f"{where}: holds {dataset.dtype} values, only real numbers are supported")
        axes, affine, notes = _place(attrs, dataset.ndim, where)
        check_budget(dataset.shape, dataset.dtype, where)
        return Volume(dataset[...], affine, axes, MappingProxyType({"path": where, "notes": tuple(notes)}))

class _Sink(io.FileIO):
    "File for libraries that crash on a full disk, or do not notice it: takes all they write and remembers the error"
    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        n = len(rest)
        try:
            while self.error is None and rest: rest = rest[super().write(rest):]
        except OSError as e: self.error = e
        return n

    def truncate(self, size: int | None = None) -> int:
        try: return super().truncate(size)
        except OSError as e: self.error = self.error or e
        return size or 0

    def check(self) -> None:
        "Raise what went wrong"
        if self.error is not None: raise self.error

def write_hdf5(
    vol: Volume, # any axes
    path: str | os.PathLike, # new file
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    name: str = "image", # of the data set
    chunks: int | Sequence[int] = 64, # of the spatial axes [voxel]
) -> Path: # `path`
    "Write a volume to an HDF5 file with gzip and checksums, atomically"
    import h5py
    path = Path(path)
    sizes = _chunks_for(vol.data.shape, chunks)
    if not check_output(path, on_exists): return path
    with atomic(path) as t, _Sink(t, "w+") as sink:
        with h5py.File(sink, "w", track_order=False, libver=("v110", "v110")) as f:
            dataset = f.create_dataset(name, vol.data.shape, vol.dtype, chunks=sizes,
                                       compression="gzip", compression_opts=1, shuffle=True, fletcher32=True,
                                       track_times=False)
            dataset.attrs["axes"], dataset.attrs["affine"] = np.bytes_(vol.axes), vol.affine.ravel()
            _fill(dataset, vol)
        sink.check()
    return path

# %%
#| export
def read_numpy(
    path: str | os.PathLike, # .npy file, or .npz file with the entry 'data' and optionally 'affine' and 'axes'
) -> Volume: # data in memory
    "Read a volume from a NumPy file; without an affine, 1 mm voxels are assumed"
    path = Path(path)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    with as_format_error(str(path), "not a readable NumPy file"):
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        attrs: dict = {}
        if isinstance(content, np.ndarray): data = content
        else:
            with content, open(path, "rb") as f:
                f.seek(-12 - len(content.zip.comment), os.SEEK_END)
                if len(content.zip.infolist()) != int.from_bytes(f.read(2), "little"):
                    raise FormatError(f"{path}: damaged, entries are missing")
                for entry in content.zip.infolist():
                    check_budget((entry.file_size,), np.uint8, str(path))
                    content.zip.open(name=entry, mode="r").close() # its name is there twice, and they must agree
                if "data" not in content: raise FormatError(f"{path}: has no entry 'data', found {sorted(content)}")
                data = content["data"]
                attrs = {k: content[k].tolist() for k in ("affine", "axes") if k in content}
        if data.dtype.kind not in "biuf":
            raise DataError(f"{path}: holds {data.dtype} values, only real numbers are supported")
        if data.ndim not in (3, 4):
            raise DataError(f"{path}: {data.ndim} dimensions, a volume has 3, or 4 with channels")
        check_budget(data.shape, data.dtype, str(path))
        axes, affine, notes = _place({"axes": "cxyz"[-data.ndim:], **attrs}, data.ndim, str(path))
        return Volume(np.array(data), affine, axes, MappingProxyType({"path": str(path), "notes": tuple(notes)}))

def write_numpy(
    vol: Volume, # any axes
    path: str | os.PathLike, # .npy (voxels only) or .npz (with affine and axes) file
    on_exists: OnExists = "error", # what to do when `path` is there already
) -> Path: # `path`
    "Write a volume to a NumPy file, atomically"
    path = Path(path)
    if not check_output(path, on_exists): return path
    with atomic(path) as t, _Sink(t, "w+") as sink:
        if path.suffix == ".npz": np.savez(sink, data=np.asarray(vol.data[...]), affine=vol.affine, axes=vol.axes)
        else: # a bare `write` keeps NumPy from writing past Python, where errors get lost
            np.save(SimpleNamespace(write=sink.write), np.asarray(vol.data[...]), allow_pickle=False)
        sink.check()
    return path

# %%
with tmpdir() as d:
    write_hdf5(brain, d/"brain.h5")
    write_numpy(brain, d/"brain.npz")
    fromh5, fromnp = open_hdf5(d/"brain.h5"), read_numpy(d/"brain.npz")
    np.save(d/"objects.npy", np.array([{}], dtype=object))
    with raises(FormatError, match="not a readable NumPy file"): read_numpy(d/"objects.npy")
    with raises(MissingFile, match="no 3-D data set 'raw', found image"): open_hdf5(f"{d}/brain.h5::raw")
fromh5, fromnp

# %%
for v in (fromh5, fromnp): assert same_grid(v, brain) and v.axes == "zyx" and np.array_equal(v.data, brain.data)
