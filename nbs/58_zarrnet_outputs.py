# %% [markdown]
# # Outputs of a prediction
#
# > How predicted values become integers in a store, and how a store remembers which of its parts are finished.
#
# A network's answer is a few float channels for every voxel; what is kept of it is a byte or two. Three things went
# wrong at this border in the reference: values were truncated instead of rounded, raw logits were multiplied by 255 as
# if they were probabilities, and nothing in the file said what its numbers mean. An interrupted run left something
# behind that looked complete. Here every array carries its scale, and a prediction knows row by row what is finished,
# so a run that was killed goes on to the same bytes. How values are computed is the next page; this one stores them.
#
# Formats: Zarr v2 and v3, [OME-NGFF 0.4 and 0.5](https://ngff.openmicroscopy.org), BigTIFF.

# %%
#| default_exp zarrnet.outputs

# %%
#| export
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, OutputExists, _fsync,
                            atomic, optional, plain, read_json, remove_tree, write_json, write_text)
from medvol_nb.stores import as_format_error, create_array, downsample2, new_store, packers_for, settled
from medvol_nb.zarrnet.columns import room_in
from medvol_nb.zarrnet.config import Target, infer_kind
from medvol_nb.zarrnet.geometry import unit_vectors

# %%
import matplotlib.pyplot as plt

from medvol_nb.core import raises, rng_for, tmpdir

# %% [markdown]
# ## What an integer means
# A range of values is laid over the integers, $q = \mathrm{rint}((v - lo)/(hi - lo)\cdot q_{max})$: probabilities over
# [0, 1], components of unit vectors over [-1, 1]. Zero is background everywhere: the fill value of the array, which
# costs nothing to store. For vectors that needs care, as $n = 0$ would become the middle of the range; a vector without
# direction is stored as (0, 0, 0), a code that no unit vector has. Values without an activation have no natural range,
# so one must be given, or a float type chosen; scaling logits by 255 is not an encoding.
#
# In memory, NaN marks voxels that no patch reached. They become background, too.

# %%
#| export
_NO_LENGTH = 1e-6

@dataclass(frozen=True)
class Encoding:
    "How the values of one target are stored, and how they are read again"
    target: str # name
    kind: str # "probability", "normals", "labels" or "raw"
    channels: int # of the model's output
    activation: str # "none", "sigmoid" or "softmax": what was applied to the logits
    dtype: str # of the stored array
    low: float = 0.0 # value stored as 0, for integers
    high: float = 1.0 # value stored as the largest integer
    axial: bool = False # normals without a sign: averaged as `axis_tensors`

    @property
    def averaged(self) -> int: # numbers a voxel
        "Channels of what is averaged over patches"
        return 6 if self.axial else self.channels

    @property
    def lead(self) -> tuple[int, ...]: # () or (channels,)
        "Shape before the spatial axes"
        return () if self.kind == "labels" or self.channels == 1 else (self.channels,)

    @property
    def is_scaled(self) -> bool: # integers that stand for other numbers
        "True if stored integers are a scale over [low, high]"
        return self.kind != "labels" and np.dtype(self.dtype).kind == "u"

    def encode(
        self,
        values: np.ndarray, # (channels, ...) float32, NaN: background
    ) -> np.ndarray: # (*lead, ...) of `dtype`
        "Values as they are stored"
        if len(values) != self.channels:
            raise DataError(f"target '{self.target}': {self.channels} channels are needed, got {len(values)}")
        empty = np.isnan(values[0])
        if self.kind == "normals":
            values = unit_vectors(values)
            empty = ~values.any(axis=0)
        if self.kind == "labels": out = np.argmax(values, axis=0)
        elif self.is_scaled:
            top = np.iinfo(self.dtype).max
            with np.errstate(invalid="ignore"):
                out = np.clip(np.rint((values - np.float32(self.low))*np.float32(top/(self.high - self.low))), 0, top)
        else: out = values
        if empty.any(): out = np.where(empty, 0, out)
        with np.errstate(over="ignore"): out = out.astype(self.dtype)
        if self.dtype == "float16" and not np.isfinite(out).all():
            raise DataError(f"target '{self.target}': values beyond 65504 do not fit float16. Use output_type float32")
        return out if self.lead else out.reshape(values.shape[1:])

    def decode(
        self,
        stored: np.ndarray, # (*lead, ...) of `dtype`
    ) -> np.ndarray: # (channels, ...) float32, labels as integers
        "Values of stored numbers; background becomes 0"
        if self.kind == "labels": return stored
        stored = stored if self.lead else stored[None]
        if not self.is_scaled: return stored.astype(np.float32)
        values = stored*np.float32(self.scale) + np.float32(self.low)
        return np.where(stored.any(axis=0), unit_vectors(values), 0) if self.kind == "normals" else values

    @property
    def scale(self) -> float: # of one step
        "Difference of values that are neighbours in the store"
        return (self.high - self.low)/np.iinfo(self.dtype).max if self.is_scaled else 1.0

    def attributes(self) -> dict[str, Any]: # plain values
        "What a reader has to know: value = stored*scale + offset, and 0 is background"
        return {"target": self.target, "kind": self.kind, "activation": self.activation, "background": 0,
                "scale": self.scale, "offset": self.low if self.is_scaled else 0.0,
                **({"vector": ["x", "y", "z"]} if self.kind == "normals" else {}),
                **({"signed": False} if self.axial else {})}

# %%
#| export
def encoding_for(
    name: str, # of the target
    target: Target, # its settings
    output_type: str | Mapping[str, str] = "auto", # number type, for all or by target; auto: normals uint16, else uint8
    *,
    activation: str | None = None, # instead of the target's own
    argmax: bool = False, # store the most likely class instead of probabilities
) -> Encoding: # checked
    "The way a target is stored"
    where = f"target '{name}'"
    kind = target.kind or infer_kind(name, target.channels, target.activation)
    activation = activation or target.activation
    dtype = output_type if isinstance(output_type, str) else output_type.get(name, "auto")
    if dtype == "auto": dtype = "uint16" if kind == "normals" else "uint8"
    if argmax:
        if kind != "multiclass": raise ConfigError(f"{where}: argmax needs a multiclass target, this one is {kind}")
        if target.channels > 256:
            raise ConfigError(f"{where}: argmax is stored as uint8, got {target.channels} classes")
        return Encoding(name, "labels", target.channels, activation, "uint8")
    if kind == "normals":
        if target.channels != 3: raise ConfigError(f"{where}: normals have 3 channels, got {target.channels}")
        return Encoding(name, "normals", 3, "none", dtype, -1.0, 1.0, not target.signed)
    if activation != "none": return Encoding(name, "probability", target.channels, activation, dtype)
    low, high = target.output_range or (0.0, 1.0)
    if np.dtype(dtype).kind == "u" and (target.output_range is None or not low < high):
        raise ConfigError(f"{where}: {dtype} needs output_range [lo, hi] with lo < hi, or an activation, as raw values "
                          f"have no natural range; got {target.output_range}. Or choose output_type float32")
    return Encoding(name, "raw", target.channels, activation, dtype, low, high)

# %%
sheet = encoding_for("sheet", Target(channels=1, activation="sigmoid"))
normals = encoding_for("normals", Target(channels=3))
depth = encoding_for("depth", Target(channels=1, kind="regression", output_range=(-5, 5)), "uint8")
{e.target: (e.dtype, e.attributes()["scale"], e.attributes()["offset"]) for e in (sheet, normals, depth)}

# %% [markdown]
# The largest error is half a step, and the largest error of an angle follows from it.

# %%
rng = rng_for(0, "outputs")
p = rng.random((1, 1000), dtype=np.float32)
n = unit_vectors(rng.normal(size=(3, 1000)).astype(np.float32))
def angle(a, b): return np.degrees(2*np.arcsin(np.clip(np.linalg.norm(a.astype(float) - b, axis=0)/2, 0, 1)))

small = encoding_for("normals", Target(channels=3), "uint8")
steps = {"probability, of 1/255": float(np.abs(sheet.decode(sheet.encode(p)) - p).max()*255),
         "uint16 normals [deg]": float(angle(normals.decode(normals.encode(n)), n).max()),
         "uint8 normals [deg]": float(angle(small.decode(small.encode(n)), n).max())}
steps

# %%
assert steps["probability, of 1/255"] <= 0.501
assert steps["uint16 normals [deg]"] <= 0.002 and steps["uint8 normals [deg]"] <= 0.4
gap = np.full((3, 2), np.nan, np.float32)
assert not normals.encode(gap).any() and not depth.encode(gap[:1]).any() and not normals.encode(gap*0 + 1e-9).any()
assert normals.encode(-np.eye(3, dtype=np.float32)).any(axis=0).all()

# %% [markdown]
# ## Lines have no sign
# The mean of predictions from several patches is the mean of their vectors, where these have a direction. The
# orientation of a fibre has none ($v$ and $-v$ are the same line, `signed: false`): two patches that agree about the
# line but not about the sign would cancel. What can be averaged is the tensor $vv^\top$, the same for both; the
# line of a mean of tensors is its principal axis. It is found by squaring: $M^{64}$ is a multiple of $ww^\top$ to any
# accuracy that matters, and its column with the largest diagonal element is the axis, with a sign that depends on
# nothing else.

# %%
#| export
def axis_tensors(
    vectors: Any, # array or tensor (3, ...)
) -> Any: # (6, ...) xx, yy, zz, xy, xz, yz
    "Products of components, which do not tell a vector from its opposite"
    return vectors[[0, 1, 2, 0, 0, 1]]*vectors[[0, 1, 2, 1, 2, 2]]

def principal_axes(
    tensors: np.ndarray, # (6, ...) float32, means of `axis_tensors`, NaN where nothing is known
    squarings: int = 6, # 2**squarings is the power that is taken
) -> np.ndarray: # (3, ...) float32 of length 1, largest component positive; 0 where there is no axis
    "Line that a mean of lines has"
    m = [np.asarray(t, np.float32) for t in tensors]
    for _ in range(squarings + 1):
        trace = m[0] + m[1] + m[2]
        with np.errstate(invalid="ignore"): known = trace >= _NO_LENGTH**2
        a, b, c, d, e, f = (np.divide(t, trace, out=np.zeros_like(t), where=known) for t in m)
        m = [a*a + d*d + e*e, d*d + b*b + f*f, e*e + f*f + c*c, a*d + d*b + e*f, a*e + d*f + e*c, d*e + b*f + f*c]
    columns = np.stack([[m[0], m[3], m[4]], [m[3], m[1], m[5]], [m[4], m[5], m[2]]]) # (column, component, ...)
    largest = np.argmax(np.stack(m[:3]), axis=0)
    return unit_vectors(np.take_along_axis(columns, largest[None, None], axis=0)[0])

# %% [markdown]
# Two hundred lines in a cone of 30 degrees, every second one turned round. Their mean vector points nowhere; the
# axis of their mean tensor points along the cone.

# %%
spread = unit_vectors((np.array([[0.2], [0.5], [0.8]]) + 0.3*rng_for(0, "lines").normal(size=(3, 200))
                       ).astype(np.float32))
turned = spread*np.where(np.arange(200) % 2, -1, 1).astype(np.float32)
axis = principal_axes(axis_tensors(turned).mean(axis=1)[:, None])[:, 0]
exact = np.linalg.eigh(np.cov(np.concatenate([spread, -spread], axis=1)))[1][:, -1]
np.linalg.norm(turned.mean(axis=1)), axis, np.abs(axis @ exact)

# %%
assert np.abs(axis @ exact) > 1 - 1e-5 and axis.max() == np.abs(axis).max()
assert not any(principal_axes(np.full((6, 1), value, np.float32)).any() for value in (0, np.nan))
assert np.array_equal(principal_axes(axis_tensors(spread)), principal_axes(axis_tensors(-spread)))
assert np.abs(np.einsum("cn,cn->n", principal_axes(axis_tensors(spread)), spread)).min() > 1 - 1e-5

# %%
with raises(ConfigError, match=r"target 'sheet': uint8 needs output_range \[lo, hi\]"):
    encoding_for("sheet", Target(channels=1, activation="none"))
with raises(DataError, match="do not fit float16"):
    encoding_for("depth", Target(channels=1), "float16").encode(np.full((1, 2), 1e6, np.float32))

# %% [markdown]
# ## A store and its journal
# `predictions.zarr` holds one array for each target, and a folder `.progress`. In there, `run.json` says what the
# output is made from: the *key*. A run that continues compares keys and refuses if a field differs, by name. Around it
# lie empty files, one for each row of chunks of each column (a column is the part of the plane that is worked on at a
# time). A marker is made when the chunks it stands for are on disk, so whatever has a marker is complete, and whatever
# has none is done again. The store itself is made beside its name and moved there, so it is never found half made.

# %%
#| export
PROGRESS = ".progress"

def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or (at and not value): return {at: value}
    return {k: v for n, inner in value.items() for k, v in _flat(inner, f"{at}.{n}" if at else str(n)).items()}

def differing(
    old: Mapping, # key of the output
    new: Mapping, # key of this run
) -> list[str]: # "grid.overlap: 0.25 there, 0.5 now"
    "Fields in which two runs differ"
    a, b = _flat(plain(old)), _flat(plain(new))
    return [f"{k}: {a.get(k)!r:.80} there, {b.get(k)!r:.80} now" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]

# %%
#| export
@dataclass(frozen=True)
class Format:
    "Shape and make of the stored arrays"
    shape: tuple[int, int, int] # (z, y, x) of the volume [voxel]
    chunks: tuple[int, int, int] = (128, 128, 128) # (z, y, x) [voxel]
    kind: str = "zarr" # "zarr", "ome-zarr" (with a pyramid) or "tif"
    version: int = 3 # of zarr, 2 or 3
    compressor: Mapping[str, Any] | None = None # None: zstd of level 1
    array_name: str = "{target}" # of a target; "{target}_final" is what the reference writes
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0) # (z, y, x) [mm]

    def __post_init__(self):
        if self.version not in (2, 3): raise ConfigError(f"zarr version: must be 2 or 3, got {self.version!r}")
        if self.kind not in ("zarr", "ome-zarr", "tif"):
            raise ConfigError(f"output_format: must be zarr, ome-zarr or tif, got {self.kind!r}")
        sizes = tuple(min(int(c), int(n)) for c, n in zip(self.chunks, self.shape, strict=True))
        object.__setattr__(self, "chunks", sizes)

    @property
    def levels(self) -> int: # at least 1
        "Resolution levels: halved until the volume fits into one chunk, 8 at most"
        if self.kind != "ome-zarr": return 1
        ratio = max(n/c for n, c in zip(self.shape, self.chunks))
        return min(8, 1 + max(0, math.ceil(math.log2(ratio))))

    def names(
        self,
        target: str, # name of the target
    ) -> list[str]: # paths inside the store, finest first
        "Arrays of a target"
        name = self.array_name.replace("{target}", target)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise ConfigError(f"array_name: {self.array_name!r} makes {name!r} of target '{target}', only letters, "
                              "digits, '.', '_' and '-' make a name")
        return [f"{name}/{k}" for k in range(self.levels)] if self.kind == "ome-zarr" else [name]

def _multiscale(e: Encoding, form: Format) -> dict:
    "OME-NGFF attributes of a target; the voxels of a coarse level lie between those of the fine one"
    lead = len(e.lead)
    axes = [{"name": "c", "type": "channel"}]*lead + [{"name": a, "type": "space", "unit": "millimeter"} for a in "zyx"]
    sets = []
    for k in range(form.levels):
        shift = [0.0 if e.kind == "labels" else s*(2**k - 1)/2 for s in form.spacing]
        sets.append({"path": str(k), "coordinateTransformations": [
            {"type": "scale", "scale": [1.0]*lead + [s*2**k for s in form.spacing]},
            {"type": "translation", "translation": [0.0]*lead + shift}]})
    image = {"axes": axes, "datasets": sets, "name": e.target,
             "type": {"labels": "mode", "normals": "renormalised mean"}.get(e.kind, "mean")}
    return {"multiscales": [{**image, "version": "0.4"}]} if form.version == 2 else \
        {"ome": {"version": "0.5", "multiscales": [image]}}

def create_predictions(
    path: str | os.PathLike, # new store, a folder ending in .zarr
    encodings: Sequence[Encoding], # one a target
    form: Format, # shape and make
    key: Mapping[str, Any], # what the output depends on, plain values
    columns: tuple[int, int], # (y, x) size of a column [voxel], multiples of the chunk
    on_exists: OnExists = "error", # what to do when `path` is there already
) -> "Predictions": # empty
    "Make a store with all its arrays and no voxels"
    packing = form.compressor or {"name": "zstd", "level": 1}
    packers_for(packing, form.version)
    if len({form.names(e.target)[0] for e in encodings}) < len(encodings):
        raise ConfigError(f"array_name: {form.array_name!r} gives several targets the same name")
    told = {k: {n: x for n, x in v.items() if n != "content"} if isinstance(v, dict) else v # dates of input files
            for k, v in plain(key).items()}
    with new_store(path, on_exists, version=form.version) as root:
        for e in encodings:
            names, shape = form.names(e.target), form.shape
            about = e.attributes() | {"run": told, "spacing_mm": list(form.spacing)}
            if form.kind == "ome-zarr":
                root.create_group(names[0].split("/")[0], attributes=_multiscale(e, form))
            for name in names:
                sizes = tuple(min(c, n) for c, n in zip(form.chunks, shape))
                create_array(root, name, (*e.lead, *shape), e.dtype, (*(1 for _ in e.lead), *sizes),
                             attributes=about | {"axes": ["c"]*len(e.lead) + list("zyx")}, compressor=packing,
                             nested=True, axes="c"*len(e.lead) + "zyx")
                shape = tuple(-(-n//2) for n in shape)
        progress = Path(root.store.root)/PROGRESS
        progress.mkdir()
        write_json(progress/"run.json", {"version": 1, "key": key, "columns": columns})
    return Predictions(path, encodings, form, resumed=False)

# %% [markdown]
# `Predictions` is the store while it is worked on. zarr writes each chunk to a temporary name and moves it; a killed
# run may leave such a temporary file, which is swept when its chunk is written again.

# %%
#| export
class Predictions:
    "A store of predictions in the making: its arrays, what is finished, and what it was made from"
    def __init__(
        self,
        path: str | os.PathLike, # store made by `create_predictions`
        encodings: Sequence[Encoding], # one a target
        form: Format, # shape and make
        resumed: bool = True, # look for what a killed run left behind
    ):
        import zarr
        self.path, self.encodings, self.form, self.resumed = Path(path), list(encodings), form, resumed
        record = Path(path)/PROGRESS/"run.json"
        if not record.exists():
            raise OutputExists(f"output {path} exists and was not made by a prediction (no {PROGRESS}/run.json). "
                               "Choose another output_dir, or overwrite: true to replace it")
        self.record = read_json(record)
        sizes = self.record.get("columns") if isinstance(self.record, dict) else None
        if not (isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes)):
            raise FormatError(f"{record}: damaged, the size of the columns is missing. Start over: overwrite: true")
        self.columns = tuple(sizes)
        with as_format_error(str(path), "damaged zarr metadata"): self._root = zarr.open_group(str(path), mode="r+")
        self._arrays: dict[str, Any] = {}

    def check_key(
        self,
        key: Mapping[str, Any], # what this run depends on
    ) -> None:
        "Refuse to go on with an output that was made from something else"
        if wrong := differing(self.record.get("key", {}), key):
            raise DataError(f"{self.path} belongs to a run with other settings: {'; '.join(wrong[:6])}. Choose another "
                            "output_dir, or start over with overwrite: true")

    def array(
        self,
        target: str, # name
        level: int = 0, # of the pyramid
    ) -> Any: # zarr array (*lead, z, y, x)
        "Stored array of a target"
        name = self.form.names(target)[level]
        if name not in self._arrays:
            with as_format_error(str(self.path), "damaged zarr metadata"):
                try: self._arrays[name] = self._root[name]
                except KeyError: raise MissingFile(f"{self.path}: the array {name!r} is gone") from None
        return self._arrays[name]

    def _marker(self, group: str, row: int | None) -> Path:
        return self.path/PROGRESS/group if row is None else self.path/PROGRESS/group/f"r{row:05d}"

    def is_done(
        self,
        group: str, # "c00003" for column 3, "l1-sheet" for level 1 of a target; a bare marker without a row
        row: int | None = None, # of chunks
    ) -> bool: # it is on disk
        "Whether a row was finished"
        return self._marker(group, row).is_file()

    def mark(
        self,
        group: str, # see `is_done`
        row: int | None = None, # of chunks
    ) -> None:
        "Remember that a row is on disk"
        file = self._marker(group, row)
        with room_in(self.path):
            file.parent.mkdir(exist_ok=True)
            write_text(file, "")

    def write(
        self,
        target: str, # name
        corner: Sequence[int], # (z, y, x) first voxel
        block: np.ndarray, # (*lead, z, y, x) encoded values of whole chunks, or up to an edge
        level: int = 0, # of the pyramid
    ) -> int: # bytes on disk
        "Write a block and bring its chunks to disk"
        array = self.array(target, level)
        files = list(self._chunk_files(array, corner, block.shape[-3:]))
        if not block.any() and not any(f.exists() for f in files): return 0
        for left in [p for f in files if self.resumed for p in f.parent.glob(f"{f.name}.*.partial")]: left.unlink()
        region = tuple(slice(a, a + n) for a, n in zip((*(0 for _ in block.shape[:-3]), *corner), block.shape))
        with room_in(self.path, block.nbytes), settled(): array[region] = block
        there = [f for f in files if f.is_file()]
        for f in [*there, *sorted({f.parent for f in there})]: _fsync(f)
        return sum(f.stat().st_size for f in there)

    def _chunk_files(self, array: Any, corner: Sequence[int], size: Sequence[int]) -> Iterator[Path]:
        ranges = [range(array.shape[0])]*(array.ndim - 3)
        ranges += [range(a//c, (a + n - 1)//c + 1) for a, n, c in zip(corner, size, array.chunks[-3:])]
        for index in np.ndindex(*map(len, ranges)):
            key = array.metadata.encode_chunk_key(tuple(r[i] for r, i in zip(ranges, index)))
            yield self.path/array.path/key

# %%
with tmpdir() as d:
    form = Format((20, 30, 30), (8, 16, 16))
    made = create_predictions(d/"predictions.zarr", [sheet, normals], form, {"overlap": 0.25}, (16, 32))
    block = normals.encode(unit_vectors(rng.normal(size=(3, 8, 16, 16)).astype(np.float32)))
    written = made.write("normals", (8, 0, 16), block[..., :14])
    made.mark("c00000", 1)
    again = Predictions(d/"predictions.zarr", [sheet, normals], form)
    back = again.array("normals")[:, 8:16, :16, 16:]
    files = sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file())
    with raises(DataError, match="overlap: 0.25 there, 0.5 now"): again.check_key({"overlap": 0.5})
files

# %%
assert np.array_equal(back, block[..., :14]) and written > 0
assert differing({"a": {"b": 1}}, {"a": {"b": 1}}) == [] and differing({}, {"a": 1}) == ["a: None there, 1 now"]
with raises(ConfigError, match="'lzma' is not one of zstd, gzip, blosc, none"): packers_for({"name": "lzma"}, 3)

# %% [markdown]
# ## A pyramid, a block at a time
# Coarse levels are made from finished fine ones, chunk by chunk: neither needs memory. What "half the resolution" means
# depends on what the numbers are: probabilities are averaged, vectors are averaged and brought to length one again (the
# mean of stored vectors would shrink towards the middle of the range), classes give the most frequent of eight.

# %%
#| export
def halve(
    stored: np.ndarray, # (*lead, z, y, x) stored values
    encoding: Encoding, # what they mean
) -> np.ndarray: # (*lead, z, y, x) same dtype; odd sizes round up
    "Next level of a pyramid"
    if encoding.axial:
        return encoding.encode(principal_axes(downsample2(axis_tensors(encoding.decode(stored)))))
    if encoding.kind == "normals": return encoding.encode(downsample2(encoding.decode(stored)))
    if encoding.kind != "labels": return downsample2(stored)
    pad = np.pad(stored, [(0, n % 2) for n in stored.shape], mode="edge")
    eight = np.sort(np.stack([pad[a::2, b::2, c::2] for a, b, c in np.ndindex(2, 2, 2)]), axis=0)
    counts = np.stack([(eight == one).sum(axis=0) for one in eight])
    return np.take_along_axis(eight, counts.argmax(axis=0)[None], axis=0)[0]

def build_pyramid(
    made: Predictions, # store whose finest level is complete
) -> None:
    "Fill the coarse levels; goes on where it was interrupted"
    for e in made.encodings:
        for level in range(1, made.form.levels):
            fine, coarse = made.array(e.target, level - 1), made.array(e.target, level)
            shape, chunk = coarse.shape[-3:], coarse.chunks[-3:]
            for row in range(-(-shape[0]//chunk[0])):
                if made.is_done(f"l{level}-{e.target}", row): continue
                for y, x in np.ndindex(*(-(-n//c) for n, c in zip(shape[1:], chunk[1:]))):
                    corner = row*chunk[0], y*chunk[1], x*chunk[2]
                    block = fine[(..., *(slice(2*a, 2*(a + c)) for a, c in zip(corner, chunk)))]
                    if block.any(): made.write(e.target, corner, halve(block, e), level)
                made.mark(f"l{level}-{e.target}", row)

# %%
classes = Encoding("classes", "labels", 5, "softmax", "uint8")
lbl = (np.hypot(*(np.indices((64, 64)) - 30)) // 8).clip(0, 4).astype(np.uint8)[None].repeat(4, 0)
lbl[rng.random(lbl.shape) < 0.2] = 1
halved = halve(lbl, classes)
fig, axes = plt.subplots(1, 2, figsize=(5, 2.5))
for ax, a, title in zip(axes, (lbl[0], halved[0]), ("classes", "most frequent of eight")):
    ax.imshow(a, cmap="Greys_r", vmax=4)
    ax.set(xticks=[], yticks=[], title=title)

# %%
flat = np.zeros((3, 2, 2, 2), np.float32)
flat[0] = 1
flat[:, 0, 0] = 0
assert halve(np.array([[[3, 3], [1, 2]], [[1, 4], [1, 3]]], np.uint8), classes).tolist() == [[[1]]]
assert np.allclose(normals.decode(halve(normals.encode(flat), normals))[:, 0, 0, 0], (1, 0, 0), atol=1e-4)

# %% [markdown]
# ## TIFF
# A TIFF is written front to back, page by page, and cannot be continued. So it is made at the end from a finished
# store, which is then emptied, and nothing temporary remains. Pages are compressed with zlib, which every reader has.

# %%
#| export
def write_tif(
    array: Any, # ((c,) z, y, x) zarr or NumPy array
    path: str | os.PathLike, # new file
    about: Mapping[str, Any], # goes into the description of the first page
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0), # (z, y, x) [mm]
    max_bytes: int = 2**28, # of pages held at a time
) -> Path: # `path`
    "Stream an array into a BigTIFF, z outermost"
    tifffile = optional("tifffile", "io")
    z = array.shape[-3]
    rows = max(1, min(z, max_bytes//max(1, array.dtype.itemsize*math.prod(array.shape)//z)))
    def pages() -> Iterator[np.ndarray]:
        for k in range(0, z, rows):
            block = np.asarray(array[..., k:k + rows, :, :])
            block = block[None] if block.ndim == 3 else block
            for plane in block.swapaxes(0, 1): yield from plane
    shape = (z, *array.shape[:-3], *array.shape[-2:])
    with atomic(path) as t:
        tifffile.imwrite(t, data=pages(), shape=shape, dtype=array.dtype, bigtiff=True, compression="zlib",
                         photometric="minisblack", resolution=(10/spacing[2], 10/spacing[1]),
                         resolutionunit="CENTIMETER",
                         metadata={**plain(about), "axes": "ZYX" if len(shape) == 3 else "ZCYX"})
    return Path(path)

def finish_predictions(
    made: Predictions, # store whose finest level is complete
) -> list[Path]: # what to look at
    "Make what follows from the finest level, the pyramid or the TIFF files, and mark the output as complete"
    form = made.form
    results = [made.path] if form.kind != "tif" else [
        made.path.with_name(f"{form.names(e.target)[0]}.tif") for e in made.encodings]
    if not made.is_done("complete"):
        if form.kind == "ome-zarr": build_pyramid(made)
        if form.kind == "tif":
            for e, file in zip(made.encodings, results):
                write_tif(made.array(e.target), file, e.attributes(), spacing=form.spacing)
        made.mark("complete")
    if form.kind == "tif":
        for e in made.encodings: remove_tree(made.path/form.names(e.target)[0])
        if lost := [f for f in results if not f.is_file()]:
            raise MissingFile(f"{lost[0]} was written and is gone. Start over: overwrite: true")
    return results

# %%
with tmpdir() as d:
    import tifffile
    values = normals.encode(unit_vectors(rng.normal(size=(3, 6, 9, 8)).astype(np.float32)))
    write_tif(values, d/"normals.tif", normals.attributes())
    back = tifffile.imread(d/"normals.tif")
assert np.array_equal(back.swapaxes(0, 1), values)
back.shape, back.dtype
