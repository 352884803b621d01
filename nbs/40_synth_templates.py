# %% [markdown]
# # Template bank
#
# > Thousands of organ shapes, cut out once, packed to bits and opened in a moment: what label ensembles are made of.
#
# Random label maps that look like anatomy are composed of real organ shapes: *templates*. The reference (project
# anatomix, MIT licence; Dey et al., *Learning General-Purpose Biomedical Volume Representations using Randomized
# Synthesis*, ICLR 2025, [arXiv 2411.02372](https://arxiv.org/abs/2411.02372)) keeps them as compressed files of full
# field of view. It loads and crops thirty of them for every ensemble, which is half of its run time, and its
# preparation step works *in place*: a damaged file in a subject stops the merging of the ribs silently, after which the
# ribs are deleted.
#
# Here the shapes are cut to their bounding boxes once and stored as bits, about 1/170 of the original voxels. The
# source is only read. Whatever could not be used is listed, with its reason. Two more sources besides the
# [TotalSegmentator](https://zenodo.org/records/6802614) tree serve equally: any label maps, and shapes made by formula.

# %%
#| default_exp synth.templates

# %%
#| export
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.core import (ConfigError, DataError, FormatError, MedvolError, MissingFile, OnExists, OutputExists,
                            atomic, check_output, file_digest, fingerprint, read_json, remove_tree, rng_for, write_json)
from medvol_nb.geometry import Volume, resample
from medvol_nb.parallel import BatchError, Failure, Ledger, on_cluster, pmap
from medvol_nb.phantoms import smooth_noise
from medvol_nb.volume import format_of, read_header, read_volume, stem_of

# %%
import pickle

from medvol_nb.core import raises, tmpdir
from medvol_nb.geometry import affine_from
from medvol_nb.phantoms import abdomen, ball, ellipsoid
from medvol_nb.plot import bars, montage
from medvol_nb.volume import write_volume

# %% [markdown]
# ## Cut out and packed
# A template is a binary array cropped to its bounding box, eight voxels a byte, in C order. Its identity is the digest
# of size and bits, so equal shapes are recognised wherever they come from.

# %%
#| export
def bounding_box(
    mask: np.ndarray, # (x, y, z) bool or integer, not 0 means inside
) -> tuple[slice, slice, slice] | None: # smallest box that holds all of it; None if there is nothing
    "Where the non-zero voxels of a mask are"
    box = []
    for axis in range(3):
        at = np.flatnonzero(mask.any(axis=tuple(k for k in range(3) if k != axis)))
        if not len(at): return None
        box.append(slice(int(at[0]), int(at[-1]) + 1))
    return tuple(box)

def _pack(mask: np.ndarray) -> np.ndarray: # (n,) uint8
    return np.packbits(np.ascontiguousarray(mask != 0).reshape(-1), bitorder="little")

def _identity(shape: Sequence[int], packed: np.ndarray) -> str:
    head = ",".join(str(int(n)) for n in shape).encode()
    return hashlib.sha256(head + b":" + packed.tobytes()).hexdigest()

# %%
organ = ellipsoid((40, 40, 40), (12, 20, 30), (6, 9, 7))
box = bounding_box(organ)
box, organ.size, _pack(organ[box]).nbytes

# %%
assert bounding_box(np.zeros((3, 3, 3), bool)) is None and organ[box].sum() == organ.sum()
assert _identity((2, 3, 1), _pack(np.ones(6))) != _identity((3, 2, 1), _pack(np.ones(6)))

# %% [markdown]
# ## The bank
# A bank is a folder: `masks.npy` holds the bits of all templates one after the other, `index.npy` where each begins and
# how large it is, `table.json` where it came from, and `bank.json` the digest of it all. Opening maps the first file
# into memory, so that any number of processes share one copy. A bank that was opened is pickled as its path.

# %%
#| export
_VERSION = 1
_COLUMNS = ("start", "nx", "ny", "nz", "voxels") # of the index: first byte, size, number of voxels inside

class TemplateBank:
    "Immutable collection of binary shapes; `bank[i]` is the i-th as (x, y, z) bool"
    def __init__(
        self,
        bits: np.ndarray, # (bytes,) uint8, packed masks one after the other
        index: np.ndarray, # (n, 5) int64: start in `bits` [byte], size x, y, z, voxels inside
        table: Sequence[Mapping[str, Any]] | None = None, # name, source, sha256, ... of each; None: read when asked for
        path: str | os.PathLike | None = None, # folder it was opened from
    ):
        self.bits, self.index, self.path = bits, index, None if path is None else Path(path).absolute()
        if table is not None: self.table = [dict(row) for row in table]

    def __len__(self) -> int: return len(self.index)
    def __repr__(self) -> str: return f"TemplateBank({len(self)} shapes, {self.bits.nbytes} bytes, {self.digest})"
    def __reduce__(self):
        if self.path is not None: return type(self).open, (str(self.path),)
        return type(self), (self.bits, self.index, self.table)

    def packed(
        self,
        i: int, # which template
    ) -> np.ndarray: # (bytes,) uint8, bits in C order, lowest first
        "Bits of a template"
        start, *shape, _ = (int(v) for v in self.index[i])
        return self.bits[start:start - (-shape[0]*shape[1]*shape[2]//8)]

    def __getitem__(self, i: int) -> np.ndarray: # (x, y, z) bool
        if not -len(self) <= i < len(self): raise IndexError(f"template {i} of {len(self)}")
        shape = tuple(int(n) for n in self.index[i, 1:4])
        flat = np.unpackbits(self.packed(i), count=int(np.prod(shape)), bitorder="little")
        return flat.view(bool).reshape(shape)

    @property
    def starts(self) -> np.ndarray: return self.index[:, 0] # (n,) int64, first byte of each template
    @property
    def shapes(self) -> np.ndarray: return self.index[:, 1:4] # (n, 3) int64, sizes [voxel]
    @property
    def voxels(self) -> np.ndarray: return self.index[:, 4] # (n,) int64, voxels inside
    @property
    def names(self) -> list[str]: return [row["name"] for row in self.table] # such as 'liver'
    @property
    def sources(self) -> list[str]: return [row["source"] for row in self.table] # subject or file it came from

    @cached_property
    def table(self) -> list[dict[str, Any]]: # name, source, label, files, bbox, shape, spacing, voxels, sha256
        rows = self._extra["templates"]
        if not isinstance(rows, list) or len(rows) != len(self):
            raise FormatError(f"{self.path}: table.json does not list {len(self)} templates. Build the bank again")
        return rows

    @cached_property
    def digest(self) -> str: # 16 hexadecimal digits; depends on the shapes and their order alone
        return fingerprint([row["sha256"] for row in self.table])

    @cached_property
    def _extra(self) -> dict[str, Any]: return read_json(self.path/"table.json", 2**32)

    @classmethod
    def of(
        cls,
        masks: Sequence[np.ndarray], # each (x, y, z) bool or integer, not 0 means inside
        names: Sequence[str] | None = None, # default: 'shape 0', 'shape 1', ...
        source: str = "memory", # where they come from
    ) -> "TemplateBank": # in memory
        "Bank of given masks; empty ones are an error"
        names = [f"shape {i}" for i in range(len(masks))] if names is None else list(names)
        if len(names) != len(masks): raise DataError(f"bank: {len(masks)} masks but {len(names)} names")
        cut = [_cut(np.asarray(m), n, source, (1.0, 1.0, 1.0)) for m, n in zip(masks, names)]
        if empty := [n for n, c in zip(names, cut) if c is None]: raise DataError(f"bank: {empty[:5]} are empty masks")
        if not cut: raise DataError("bank: no shapes")
        return cls(np.concatenate([p for _, p in cut]), _index([row for row, _ in cut]), [row for row, _ in cut])

    @classmethod
    def open(
        cls,
        path: str | os.PathLike, # folder of a bank
    ) -> "TemplateBank": # memory-mapped
        "Open a bank; milliseconds, whatever its size"
        return open_bank(path)

    def save(
        self,
        path: str | os.PathLike, # folder to be made
        on_exists: OnExists = "error", # what to do when it is there already
    ) -> Path: # `path`
        "Write the bank to a folder"
        if check_output(path, on_exists): _write_bank(Path(path), [self.bits], self.table, {})
        return Path(path)

    def verify(self) -> None:
        "Read every template again and compare it with its digest"
        for i, row in enumerate(self.table):
            if _identity(self.shapes[i], self.packed(i)) != row["sha256"]:
                raise FormatError(f"{self.path or 'bank'}: template {i} ({row['name']!r} of {row['source']!r}) is not "
                                  "what was stored. Build the bank again")
        if fingerprint([row["sha256"] for row in self.table]) != self.digest:
            raise FormatError(f"{self.path or 'bank'}: bank.json and table.json do not belong together")

# %%
#| export
def _cut(mask: np.ndarray, name: str, source: str, spacing: Sequence[float], **facts: Any
         ) -> tuple[dict[str, Any], np.ndarray] | None:
    "Row of the table and bits of a mask; None if it is empty"
    if mask.ndim != 3: raise DataError(f"{source} {name}: a mask is (x, y, z), got shape {mask.shape}")
    if (box := bounding_box(mask)) is None: return None
    part = mask[box]
    packed = _pack(part)
    bbox = [[b.start for b in box], [b.stop for b in box]]
    return {"name": name, "source": source, **facts, "bbox": bbox, "shape": list(part.shape),
            "spacing": [round(float(s), 6) for s in spacing], "voxels": int(np.count_nonzero(part)),
            "sha256": _identity(part.shape, packed)}, packed

def _index(rows: Sequence[Mapping[str, Any]]) -> np.ndarray: # (n, 5) int64
    shapes = np.array([row["shape"] for row in rows], np.int64).reshape(-1, 3)
    sizes = -(-shapes.prod(axis=1)//8)
    return np.column_stack([np.cumsum(sizes) - sizes, shapes, [row["voxels"] for row in rows]]).astype(np.int64)

def _write_bank(path: Path, parts: Sequence[np.ndarray], rows: list[dict], extra: Mapping[str, Any],
                sources: Mapping[str, Any] = {}) -> None: # noqa: B006
    "Make the folder of a bank from packed pieces, in order"
    head = {"medvol template bank": _VERSION, "digest": fingerprint([r["sha256"] for r in rows]),
            "templates": len(rows), **extra}
    total = sum(p.size for p in parts)
    with atomic(path, folder=True) as t:
        with open(t/"masks.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (total,)})
            for p in parts: f.write(np.ascontiguousarray(p).data)
        np.save(t/"index.npy", _index(rows), allow_pickle=False)
        write_json(t/"table.json", {"templates": rows, "sources": dict(sources)}, indent=None)
        write_json(t/"bank.json", head)

def _mapped(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    "Digest, bits and index of a stored bank, checked against each other"
    if not (path/"bank.json").is_file():
        raise MissingFile(f"{path} is no template bank (bank.json is missing). Make one with `medvol synth templates`")
    head = read_json(path/"bank.json")
    if not isinstance(head, dict) or head.get("medvol template bank") != _VERSION:
        raise FormatError(f"{path}: not a template bank of version {_VERSION}")
    try:
        bits = np.load(path/"masks.npy", mmap_mode="r", allow_pickle=False)
        index = np.load(path/"index.npy", allow_pickle=False)
    except (OSError, ValueError) as e: raise FormatError(f"{path}: damaged template bank ({e})") from None
    good = bits.dtype == np.uint8 and bits.ndim == 1 and index.dtype == np.int64 and index.ndim == 2
    good = good and index.shape == (head.get("templates"), len(_COLUMNS)) and len(index) > 0
    if good:
        start, shape, voxels = index[:, 0], index[:, 1:4], index[:, 4]
        good = bool((shape >= 1).all() and (shape < 2**20).all() and (start >= 0).all() and (voxels >= 1).all())
        good = good and bool((start <= len(bits) - -(-shape.prod(axis=1)//8)).all())
    if not good: raise FormatError(f"{path}: damaged template bank, index and masks do not fit. Build it again")
    return str(head["digest"]), bits, index

def open_bank(
    path: str | os.PathLike, # folder of a bank
) -> TemplateBank: # memory-mapped
    "Open a bank, as `TemplateBank.open` does"
    digest, bits, index = _mapped(Path(path))
    bank = TemplateBank(bits, index, path=path)
    bank.digest = digest
    return bank

# %%
bank = TemplateBank.of([organ, ball(20, 8), ball(9, 4)], ["kidney", "head", "pearl"])
with tmpdir() as d:
    bank.save(d/"bank")
    opened = TemplateBank.open(d/"bank")
    opened.verify()
    again = pickle.loads(pickle.dumps(opened))
    listed, names = sorted(p.name for p in (d/"bank").iterdir()), opened.names
bank, listed, names

# %%
assert all(np.array_equal(opened[i], bank[i]) and opened[i].sum() == bank.voxels[i] for i in range(3))
assert np.array_equal(bank[0], organ[box]) and again.digest == opened.digest == bank.digest

# %%
with raises(DataError, match="empty masks"): TemplateBank.of([np.zeros((4, 4, 4))])
with raises(MissingFile, match="no template bank"): TemplateBank.open("nowhere")
with tmpdir() as d:
    bank.save(d/"bank")
    (d/"bank"/"masks.npy").write_bytes((d/"bank"/"masks.npy").read_bytes()[:-20])
    with raises(FormatError, match="damaged template bank"): TemplateBank.open(d/"bank")

# %% [markdown]
# ## Shapes by formula
# Tests and first steps need shapes without a download. Three families cover what organs look like from far away:
# super-ellipsoids ($|x/a|^p + |y/b|^p + |z/c|^p \le 1$, from star over ball to brick), bent tubes that taper, and
# blobs, balls with a bumpy surface.

# %%
#| export
def _turned(rng: np.random.Generator) -> np.ndarray: # (3, 3) rotation
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    return q*np.sign(np.diag(r))

def _procedural(kind: str, rng: np.random.Generator, size: tuple[float, float]) -> np.ndarray: # (x, y, z) bool
    half = rng.uniform(*size)/2
    n = 2*int(np.ceil(half)) + 3
    axis = (np.arange(n) - (n - 1)/2)/half # -1...1 within the shape
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    if kind == "super-ellipsoid":
        radii, power = np.array([1, *rng.uniform(0.3, 1, 2)]), rng.uniform(0.8, 4)
        turned = np.tensordot(_turned(rng), grid, 1)
        return (np.abs(turned/radii[:, None, None, None])**power).sum(0) <= 1
    if kind == "blob":
        bumps = smooth_noise([axis]*3, rng.uniform(0.3, 0.8), rng)
        return np.sqrt((grid**2).sum(0)) <= np.clip(0.75 + 0.2*bumps, 0.3, 1)
    ends, bend = rng.uniform(-0.8, 0.8, (2, 3)), rng.uniform(-0.8, 0.8, 3)
    thick = rng.uniform(0.08, 0.3)*np.linspace(1, rng.uniform(0.4, 1), 25)
    inside = np.zeros(grid.shape[1:], bool)
    for t, r in zip(np.linspace(0, 1, 25), thick):
        point = (1 - t)**2*ends[0] + 2*t*(1 - t)*bend + t**2*ends[1]
        inside |= ((grid - point[:, None, None, None])**2).sum(0) <= max(r, 1/half)**2
    return inside

def procedural_bank(
    n: int = 48, # number of shapes
    seed: int = 0, # same seed, same shapes
    *,
    size: tuple[float, float] = (16.0, 72.0), # smallest and largest extent [voxel]
) -> TemplateBank: # in memory; shape i depends on seed and i alone
    "Bank of super-ellipsoids, tubes and blobs, for work without data"
    if n < 1 or not 4 <= size[0] <= size[1] <= 1024:
        raise DataError(f"procedural_bank: needs n >= 1 and 4 <= size[0] <= size[1] <= 1024, got {n} and {size}")
    kinds = ("super-ellipsoid", "tube", "blob")
    masks = [_procedural(kinds[i % 3], rng_for(seed, "procedural shape", i), size) for i in range(n)]
    return TemplateBank.of(masks, [f"{kinds[i % 3]} {i//3}" for i in range(n)], f"procedural seed {seed}")

# %%
shapes = procedural_bank(12, seed=1, size=(20, 40))
montage([m.sum(axis=2) for m in map(shapes.__getitem__, range(12))], titles=shapes.names)

# %%
assert procedural_bank(3, seed=1, size=(20, 40)).digest == TemplateBank.of(
    [shapes[i] for i in range(3)], source="procedural seed 1").digest
assert (shapes.shapes.max(axis=1) <= 43).all() and (shapes.voxels > 30).all()
with raises(DataError, match="n >= 1"): procedural_bank(0)

# %% [markdown]
# ## What is in a folder
# Two layouts are understood. In a tree with folders called `segmentations` (TotalSegmentator, version 1 and 2), each
# file is one mask, and the folder above is the subject. Anything else is a collection of label maps, in which each
# number is a shape of its own. Of a subject, the 24 ribs and 24 vertebrae are merged into one shape each: they are too
# similar to count 48 times.

# %%
#| export
MERGE = (("ribs", "*rib_*"), ("vertebrae", "*vertebrae_*")) # name of the merged shape, pattern of file names
MAX_LABELS = 1000 # a label map with more numbers than this is an image by mistake

def _is_readable(path: Path) -> bool:
    try: return path.is_file() and not path.name.startswith(".") and format_of(path).read is not None
    except FormatError: return False

def find_sources(
    root: str | os.PathLike, # tree of masks, folder of label maps, or a single label map
) -> tuple[Path, list[tuple[str, str, list[str]]]]: # folder, (source, "masks" or "labels", files in it) in name order
    "What a folder offers as templates"
    root = Path(root)
    if not root.exists(): raise MissingFile(f"templates: {root} does not exist")
    if root.is_file(): return root.parent, [(stem_of(root), "labels", [root.name])]
    folders = sorted(p for p in root.rglob("segmentations") if p.is_dir())
    if root.name == "segmentations": folders = [root]
    found = []
    for f in folders:
        files = [p.relative_to(root).as_posix() for p in sorted(f.iterdir()) if _is_readable(p)]
        source = f.parent.relative_to(root).as_posix() if f != root else "."
        if files: found.append((source, "masks", files))
    if not folders:
        files = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if _is_readable(p)]
        found = [(f[:-len(Path(f).name)] + stem_of(f), "labels", [f]) for f in files]
    if not found: raise DataError(f"templates: no masks or label maps below {root}. Expected */segmentations/*.nii.gz, "
                                  "or label maps in any readable format")
    return root, found

# %%
def write_tree(root, masks): # {"s1/liver": mask} -> files as in TotalSegmentator
    for name, mask in masks.items():
        subject, organ = name.split("/")
        (root/subject/"segmentations").mkdir(parents=True, exist_ok=True)
        vol = Volume(mask.astype(np.uint8), affine_from((1.5, 1.5, 1.5)))
        write_volume(vol, root/subject/"segmentations"/f"{organ}.nii.gz")

body = abdomen((40, 40, 40)).lbl
masks = {f"s1/organ_{k}": body == k for k in range(2, 6)}
masks |= {f"s1/rib_left_{k}": ellipsoid((40, 40, 40), (20, 8*k, 20), (12, 2, 3)) for k in (1, 2, 3)}
masks |= {"s1/spleen": body == 99, "s2/dot": ellipsoid((40, 40, 40), 3, 0.2)}
with tmpdir() as d:
    write_tree(d, masks)
    found = find_sources(d)[1]
found

# %%
assert [s for s, _, _ in found] == ["s1", "s2"] and len(found[0][2]) == 8
with tmpdir() as d:
    with raises(DataError, match="no masks or label maps"): find_sources(d)

# %% [markdown]
# ## Reading one subject
# Every file is read completely and checked: whole numbers, one channel, the grid of its neighbours. What fails is
# listed and the others go on. A merged shape is made from all of its parts or not at all. Empty masks, masks without
# any background, and shapes below `min_voxels` are skipped and counted.

# %%
#| export
def _labels_of(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    "Whole numbers >= 0 of a label map, and its voxel size"
    vol = read_volume(path)
    if vol.channels is not None: raise DataError(f"{path}: has {vol.channels} channels, a mask has one value a voxel")
    data = np.asarray(vol.data)
    if data.dtype.kind == "f":
        if not np.isfinite(data).all(): raise DataError(f"{path}: holds NaN or infinity, labels are whole numbers")
        if (np.abs(data) > 2**31).any() or (data != np.rint(data)).any():
            raise DataError(f"{path}: holds fractions or huge numbers, labels are whole numbers. Is it an image?")
        data = data.astype(np.int32)
    elif data.dtype.kind not in "biu": raise DataError(f"{path}: holds {data.dtype}, labels are whole numbers")
    if data.dtype.kind == "i" and data.min() < 0: raise DataError(f"{path}: holds negative numbers. Is it an image?")
    return data, vol.spacing

def _pieces(mask: np.ndarray, spacing: tuple[float, ...], options: Mapping[str, Any]
            ) -> Iterator[tuple[str, np.ndarray, tuple[float, ...]]]:
    "The mask, resampled and divided as asked for: (ending of the name, mask, voxel size)"
    if options["spacing"] is not None and (box := bounding_box(mask)) is not None:
        step = np.diag([*spacing, 1.0])
        vol = resample(Volume(np.pad(mask[box], 1).astype(np.uint8), step), options["spacing"], order=0)
        mask, spacing = np.asarray(vol.data), vol.spacing
    if not options["components"]:
        yield "", mask, spacing
        return
    import cc3d
    pieces, n = cc3d.connected_components(np.ascontiguousarray(mask != 0), connectivity=26, return_N=True)
    for k in range(1, n + 1): yield f"#{k}", pieces == k, spacing
    if not n: yield "", mask, spacing

class _Subject:
    "What one subject or label map gives: rows and bits of templates, and all that was not used"
    def __init__(self, source: str, options: Mapping[str, Any]):
        self.source, self.options = source, options
        self.rows, self.bits, self.bad, self.skipped, self.files = [], [], [], [], {}

    def add(self, mask: np.ndarray, name: str, spacing: tuple[float, ...], files: list[str], label: int) -> None:
        if mask.all(): return self.skip(name, files, "every voxel is inside, this is no shape", lost=True)
        for ending, piece, size in _pieces(mask, spacing, self.options):
            cut = _cut(piece, name + ending, self.source, size, label=label, files=files)
            if cut is None: self.skip(name + ending, files, "empty")
            elif cut[0]["voxels"] < self.options["min_voxels"]:
                self.skip(name + ending, files, f"smaller than {self.options['min_voxels']}", lost=True)
            else: self.rows.append(cut[0]); self.bits.append(cut[1])

    def skip(self, name: str, files: list[str], why: str, lost: bool = False) -> None:
        "Note what is left out; `lost` marks its files as not wholly in the bank"
        self.skipped.append({"source": self.source, "name": name, "files": files, "why": why})
        if lost: self.files |= {f: {**self.files[f], "whole": False} for f in files}

    def read(self, base: Path, file: str) -> tuple[np.ndarray, tuple[float, ...]] | None:
        "Labels of a file; None if it is bad, which is noted"
        try: out = _labels_of(base/file)
        except (MedvolError, OSError) as e: self.fail(file, f"{type(e).__name__}: {e}"); return None
        self.files[file] = {"sha256": file_digest(base/file, 64), "whole": True}
        return out

    def fail(self, file: str, error: str) -> None: self.bad.append({"file": file, "error": error})

# %%
#| export
def _usual_shape(base: Path, files: Sequence[str]) -> tuple[int, ...] | None:
    "Grid that most files of a subject have"
    shapes: Counter = Counter()
    for f in files:
        try: shapes[tuple(read_header(base/f).shape)] += 1
        except (MedvolError, OSError): pass # told when the file is read
    return shapes.most_common(1)[0][0] if shapes else None

def _read_masks(subject: _Subject, base: Path, files: Sequence[str]) -> None:
    "One file, one shape; files that a rule of `merge` names become one shape together"
    usual, merged = _usual_shape(base, files), {name: [None, [], True] for name, _ in subject.options["merge"]}
    spacing = (1.0, 1.0, 1.0)
    for file in files:
        name = stem_of(file)
        rule = next((to for to, pattern in subject.options["merge"] if fnmatchcase(name, pattern)), None)
        got = subject.read(base, file)
        if got is not None and got[0].shape != usual:
            subject.fail(file, f"grid {got[0].shape} differs from that of the other masks, {usual}")
            del subject.files[file]
            got = None
        if got is not None and got[0].ndim == 3 and rule is None: subject.add(got[0] != 0, name, got[1], [file], 1)
        elif rule is not None:
            union, parts, whole = merged[rule]
            if got is not None:
                inside, spacing = got[0] != 0, got[1]
                merged[rule] = [inside if union is None else union | inside, [*parts, file], whole]
            else: merged[rule][2] = False
    for name, (union, parts, whole) in merged.items():
        if whole and union is not None: subject.add(union, name, spacing, parts, 1)
        elif not whole: subject.skip(name, parts, "not merged, a part of it is damaged", lost=True)

def _read_labels(subject: _Subject, base: Path, file: str) -> None:
    "One number, one shape"
    got = subject.read(base, file)
    if got is None: return
    from scipy.ndimage import find_objects
    labels, spacing = got
    values, places = np.unique(labels, return_inverse=True)
    if len(values) > MAX_LABELS:
        subject.fail(file, f"{len(values)} different numbers (at most {MAX_LABELS}). Is it an image?")
        del subject.files[file]
        return
    name = stem_of(file)
    numbers = [(k, int(v)) for k, v in enumerate(values) if v != 0]
    if len(values) == 1 or not numbers:
        subject.add(labels != 0, name, spacing, [file], int(values[-1]))
        return
    boxes = find_objects(places.reshape(labels.shape) + 1)
    for k, v in numbers:
        inside = np.pad(labels[boxes[k]] == v, 1) # a label that fills its box is still a shape among others
        before = len(subject.rows)
        subject.add(inside, name if len(numbers) == 1 else f"{name}:{v}", spacing, [file], v)
        for row in subject.rows[before:]:
            if not (subject.options["components"] or subject.options["spacing"]):
                row["bbox"] = [[b.start for b in boxes[k]], [b.stop for b in boxes[k]]]

def _read_source(task: Mapping[str, Any]) -> dict[str, Any]:
    "Read one source and leave its bits in a file; plain facts come back"
    subject, base = _Subject(task["source"], task["options"]), Path(task["base"])
    if task["kind"] == "masks": _read_masks(subject, base, task["files"])
    else: _read_labels(subject, base, task["files"][0])
    bits = np.concatenate([*subject.bits, np.empty(0, np.uint8)])
    with atomic(Path(task["parts"])/task["part"], sync=False) as t: t.write_bytes(bits.tobytes())
    return {"outputs": [task["part"]], "rows": subject.rows, "bad": subject.bad, "skipped": subject.skipped,
            "files": subject.files}

# %% [markdown]
# ## Building
# Subjects are independent, so they are read in parallel, and a run that was stopped goes on where it was: the bits of
# each finished subject wait in a hidden folder beside the output until all are there. The order in the bank is that of
# names, for any number of workers.
#
# The reference deletes what it has merged. Disks are finite, so that is possible here, too, but only on request and
# last: first the finished bank is read back and every template compared with its digest, then each file is compared
# with what was read, and only then it is removed. Files with anything that is not in the bank stay.
#
# A bank that is there already is used again (`on_exists="skip"`) only if it was made from the same places with the same
# options: shapes of another collection must not stand in for those that were asked for.

# %%
#| export
def _tasks(roots: Sequence[Path], parts: Path, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    "One task a source; names carry the number of the root if there are several"
    tasks = []
    for k, root in enumerate(roots):
        base, found = find_sources(root)
        for source, kind, files in found:
            key = f"{k}/{source}" if len(roots) > 1 else source
            tasks.append({"key": key, "source": key, "base": str(base.absolute()), "kind": kind, "files": files,
                          "parts": str(parts), "part": f"{fingerprint(key)}.bits", "options": dict(options)})
    return tasks

def _stamp(task: Mapping[str, Any]) -> list:
    "What a task reads, so that a resumed run notices changed sources"
    stats = [os.stat(Path(task["base"])/f) for f in task["files"]]
    return [task["key"], task["kind"], [[f, s.st_size, s.st_mtime_ns] for f, s in zip(task["files"], stats)]]

def _delete_sources(bank: TemplateBank) -> list[str]:
    "Remove the files that are in the bank completely and have not changed since"
    bank.verify()
    deleted = []
    for file, facts in bank._extra["sources"].items():
        path = Path(file)
        if not facts["whole"] or not path.exists(): continue
        if file_digest(path, 64) != facts["sha256"]:
            raise DataError(f"{path} has changed since it was read; it and what follows is kept. Build the bank again")
        path.unlink()
        deleted.append(file)
    return deleted

def _other_origin(out: Path) -> OutputExists:
    return OutputExists(f"bank {out} was made from other sources or with other settings. Remove it, or choose another "
                        "place")

def _same_origin(out: Path, roots: Sequence[Path], options: Mapping[str, Any]) -> None:
    "Refuse a bank that is there already, unless it was made from these places with these options"
    bank, head = open_bank(out), read_json(out/"bank.json")
    files = [Path(f) for f in (*bank._extra["sources"], *(b["file"] for b in head.get("bad", ())))]
    real = {p: Path(os.path.realpath(p)) for p in {*roots, *(f.parent for f in files)}} # a place may have two names
    inside = [[f.is_relative_to(r.absolute()) or (real[f.parent]/f.name).is_relative_to(real[r]) for r in roots]
              for f in files]
    same = inside and all(map(any, inside)) and all(map(any, zip(*inside))) # no file elsewhere, no place without one
    if not same or head.get("options") != options: raise _other_origin(out)

def _report(out: Path, deleted: Sequence[str] = ()) -> dict[str, Any]:
    head = read_json(out/"bank.json")
    why = Counter(s["why"] for s in head["skipped"])
    return {"bank": str(out), "digest": head["digest"], "templates": head["templates"], "sources": head["sources"],
            "bytes": (out/"masks.npy").stat().st_size, "skipped": dict(sorted(why.items())), "bad": head["bad"],
            "deleted": len(deleted)}

def build_bank(
    roots: str | os.PathLike | Sequence[str | os.PathLike], # trees of masks, folders of label maps, label maps
    out: str | os.PathLike, # folder of the bank
    *,
    merge: Sequence[tuple[str, str]] = MERGE, # (name, pattern of file names) of masks that become one shape a subject
    min_voxels: int = 2, # smaller shapes are skipped
    spacing: float | None = None, # resample to this voxel size [mm]; None: as they are
    components: bool = False, # True: each connected piece is a shape
    max_bad: int = 0, # so many damaged files are tolerated; all are listed
    delete_sources: bool = False, # True: remove the files that are in the bank, after it was verified
    workers: int = 0, # processes; 0: in this process, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler, whose workers see the same folders
    on_exists: OnExists = "error", # when the bank is there already; 'skip': use it, if it is of these roots and options
) -> dict[str, Any]: # bank, digest, templates, sources, bytes, skipped (reason -> count), bad, deleted
    "Cut the shapes out of segmentations, once; sources are only read"
    roots = [Path(r) for r in ([roots] if isinstance(roots, (str, os.PathLike)) else roots)]
    out = Path(out)
    if not roots: raise DataError("templates: no folder was given")
    if min_voxels < 1: raise ConfigError(f"min_voxels: must be >= 1, got {min_voxels}")
    for r in roots:
        if r.is_dir() and out.resolve().is_relative_to(r.resolve()):
            raise DataError(f"templates: the bank {out} would lie inside its source {r}, which is never changed")
    options = {"merge": [list(m) for m in merge], "min_voxels": min_voxels, "spacing": spacing,
               "components": components}
    if check_output(out, on_exists, inputs=roots): _build(roots, out, options, workers, dask)
    else: _same_origin(out, roots, options)
    report = _report(out)
    if len(report["bad"]) > max_bad:
        failures = [Failure(k, b["file"], "error", b["error"]) for k, b in enumerate(report["bad"])]
        raise BatchError(failures, [report], len(report["bad"]) + report["templates"])
    return _report(out, _delete_sources(open_bank(out))) if delete_sources else report

def _build(roots: list[Path], out: Path, options: dict[str, Any], workers: int, dask: str | None) -> None:
    "Read all sources and write the bank"
    tasks = _tasks(roots, Path(), options)
    params = [_VERSION, options, [_stamp(t) for t in tasks]]
    parts = out.parent.absolute()/f".{out.name}.{fingerprint(params, 8)}.parts"
    parts.mkdir(exist_ok=True)
    tasks = [{**t, "parts": str(parts)} for t in tasks]
    with Ledger(parts/"ledger.jsonl", params) as ledger, on_cluster(dask):
        got = pmap(_read_source, tasks, workers, keys=[t["key"] for t in tasks], desc="templates", ledger=ledger)
    rows, bad, skipped, files = [], [], [], {}
    for task, g in zip(tasks, got):
        full = lambda names, base=Path(task["base"]): [str(base/n) for n in names]
        rows += g["rows"]
        bad += [{"file": full([b["file"]])[0], "error": b["error"]} for b in g["bad"]]
        skipped += g["skipped"]
        files |= dict(zip(full(g["files"]), g["files"].values()))
    if not rows:
        remove_tree(parts)
        listed = "; ".join([b["error"] for b in bad[:3]] + [f"{s['name']}: {s['why']}" for s in skipped[:3]])
        raise DataError(f"templates: no shape is left of {len(files) + len(bad)} files, {len(bad)} damaged and "
                        f"{len(skipped)} skipped. Nothing was written. First of them: {listed}")
    bits = [np.memmap(parts/t["part"], np.uint8, "r") if (parts/t["part"]).stat().st_size else np.empty(0, np.uint8)
            for t in tasks]
    _write_bank(out, bits, rows, {"sources": len(tasks), "options": options, "bad": bad, "skipped": skipped}, files)
    for old in out.parent.absolute().glob(f".{out.name}.*.parts"): remove_tree(old)

# %%
with tmpdir() as d:
    write_tree(d/"tree", masks)
    before = fingerprint({p.name: file_digest(p) for p in sorted((d/"tree").rglob("*.gz"))})
    report = build_bank(d/"tree", d/"bank")
    bank = TemplateBank.open(d/"bank")
    bank.verify()
    after = fingerprint({p.name: file_digest(p) for p in sorted((d/"tree").rglob("*.gz"))})
    rows, ribs = bank.table, bank[bank.names.index("ribs")]
{k: v for k, v in report.items() if k != "bank"}

# %%
bars({r["name"]: r["voxels"] for r in rows}, title="voxels of each template")

# %% [markdown]
# The empty spleen and the single voxel were skipped, the ribs are one shape, and the source is what it was.

# %%
assert before == after and report["skipped"] == {"empty": 1, "smaller than 2": 1}
assert ribs.sum() == sum(masks[f"s1/rib_left_{k}"].sum() for k in (1, 2, 3))

# %% [markdown]
# A damaged rib: no rib is used, everything else is, and the command ends with a list instead of silence.

# %%
with tmpdir() as d:
    write_tree(d/"tree", masks)
    broken = d/"tree/s1/segmentations/rib_left_2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-30])
    with raises(BatchError, match="rib_left_2"): build_bank(d/"tree", d/"bank")
    with raises(OutputExists, match="other settings"): build_bank(d/"tree", d/"bank", min_voxels=9, on_exists="skip")
    names = TemplateBank.open(d/"bank").names
    n_left = len(list((d/"tree").rglob("*.nii.gz")))
assert "ribs" not in names and "organ_2" in names and n_left == len(masks)

# %% [markdown]
# ## Label maps
# A folder of label maps, or a single one: each number is a shape. With `components` each connected piece is one.

# %%
with tmpdir() as d:
    write_volume(Volume(body, affine_from((3, 3, 3))), d/"case_1.nii.gz")
    report = build_bank(d/"case_1.nii.gz", d/"bank", min_voxels=20, spacing=1.5)
    rows = TemplateBank.open(d/"bank").table
    pieces = build_bank(d/"case_1.nii.gz", d/"pieces", min_voxels=20, components=True)
{r["name"]: r["voxels"] for r in rows}, pieces["templates"]

# %%
assert rows[0]["spacing"] == [1.5, 1.5, 1.5] and pieces["templates"] >= report["templates"]
with tmpdir() as d:
    write_volume(Volume(np.zeros((4, 4, 4), np.uint8), np.eye(4)), d/"empty.nii.gz")
    with raises(DataError, match="no shape is left of 1 files"): build_bank(d/"empty.nii.gz", d/"bank")
    assert not (d/"bank").exists()

# %% [markdown]
# ## The command
# `medvol synth templates` takes the words of the reference's first step and adds what it lacks.

# %%
#| export
def _workers(workers: int | None, max_workers: int | None) -> int:
    "The reference's word for processes and this library's as one number"
    return workers if workers is not None else -1 if max_workers is None else max_workers

def templates(
    out: str | os.PathLike = "./template_bank", # folder of the bank
    *,
    totalsegmentator_path: Sequence[str] = ("./Totalsegmentator_dataset/",), # trees, folders of label maps, label maps
    max_workers: int | None = None, # processes; default: one per processor
    workers: int | None = None, # the same: 0 is this process, -1 one per processor
    merge: Sequence[str] = ("ribs=*rib_*", "vertebrae=*vertebrae_*"), # name=pattern of masks that become one shape
    min_voxels: int = 2, # smaller shapes are skipped
    spacing: float | None = None, # resample to this voxel size [mm]; default: as they are
    components: bool = False, # each connected piece is a shape
    max_bad: int = 0, # so many damaged files are tolerated; all are listed
    delete_sources: bool = False, # remove the files that are in the bank, after it was verified
    procedural: int = 0, # instead of files: this many shapes made by formula
    seed: int = 0, # of the shapes made by formula
    dask: str | None = None, # address of a Dask scheduler
    on_exists: OnExists = "error", # when the bank is there already; 'skip': use it, if it is of the same sources
) -> dict[str, Any]: # bank, digest, number of templates, what was skipped or damaged
    "Cut organ shapes out of segmentations, once, into a bank for label ensembles"
    if procedural:
        bank = procedural_bank(procedural, seed)
        if check_output(out, on_exists): _write_bank(Path(out), [bank.bits], bank.table, {})
        made, bank = bank, open_bank(out)
        if bank.digest != made.digest: raise _other_origin(Path(out))
        return {"bank": str(out), "digest": bank.digest, "templates": len(bank), "bytes": bank.bits.nbytes}
    rules = [tuple(m.split("=", 1)) for m in merge if m]
    if wrong := [m for m in rules if len(m) != 2 or not all(m)]:
        raise ConfigError(f"merge: must be name=pattern, such as 'ribs=*rib_*', got {'='.join(wrong[0])!r}")
    roots = [totalsegmentator_path] if isinstance(totalsegmentator_path, (str, os.PathLike)) else totalsegmentator_path
    return build_bank(roots, out, merge=rules, min_voxels=min_voxels, spacing=spacing, components=components,
                      max_bad=max_bad, delete_sources=delete_sources, dask=dask, on_exists=on_exists,
                      workers=_workers(workers, max_workers))

# %%
with tmpdir() as d:
    made = templates(d/"bank", procedural=6, seed=3)
    with raises(OutputExists, match="other settings"): templates(d/"bank", procedural=7, seed=3, on_exists="skip")
{k: v for k, v in made.items() if k != "bank"}

# %%
assert made["digest"] == procedural_bank(6, seed=3).digest
with tmpdir() as d:
    with raises(ConfigError, match="name=pattern"): templates(d/"bank", merge=("ribs",))
