# %% [markdown]
# # Stores of pairs
#
# > A folder that any number of processes and machines fill at once, and one reader for all kinds of stores.
#
# The reference writes its data set in one process, after two intermediate copies in compressed files. Pictures are
# matched with each other by their place in two sorted lists, so one missing file shifts all that follow. And the last
# names in alphabetical order are kept for validation, which are exactly those with the most shapes.
#
# A store folder is filled in *shards* of sixteen samples, as a Zarr v3 group or as HDF5 parts. As in the file of the
# page before, there are *records* beside the data: what each sample is, the digest of its voxels, and where its bytes
# are, with their checksum. A reader that follows them notices every flipped bit.

# %%
#| default_exp synth.stores

# %%
#| export
import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import (DataError, FormatError, MedvolError, MissingFile, OutputExists, atomic, file_digest,
                            fingerprint, inside, log, progress, write_csv)
from medvol_nb.stores import _Sink, create_array
from medvol_nb.synth.pairfile import (HDF5_FORMAT, VERSION, Compression, Place, Sample, add_group, array_digest, beside,
                                      chunk_entries, differing, new_hdf5, read_index, sample_row, sealed, unsealed,
                                      with_crc)
from medvol_nb.synth.templates import _is_readable, _labels_of
from medvol_nb.volume import stem_of

# %%
import h5py
import zarr

from medvol_nb.core import raises, rng_for, tmpdir
from medvol_nb.geometry import Volume
from medvol_nb.phantoms import random_body
from medvol_nb.plot import montage
from medvol_nb.volume import write_volume

# %% [markdown]
# ## A folder that many may fill
# `store.json` says what the store is; each shard has a record in `records/`. A shard counts as done if its record is
# there and its files have the recorded size. Data first, record last, everything in one rename: a shard is there or it
# is not. Nobody writes to a file that another one may write to, so processes and machines need no coordination except
# a lock for each shard.
#
# The Zarr shards are written here chunk by chunk, as the
# [sharding codec](https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html) says, because the
# Zarr library wants all sixteen samples in memory at once.

# %%
def toy(k, n=16):
    seg = random_body((n, n, n), seed=k).lbl.astype(np.uint8)
    img = rng_for(0, "toy", k).integers(0, 256, (2, n, n, n)).astype(np.uint8)//2 + 8*seg
    return Sample(f"{k:06d}", img, seg, {"index": k})

montage([*toy(0).img[..., 8], toy(0).seg[..., 8]], titles=["view 1", "view 2", "labels"])

# %%
#| export
SHARD = 16 # samples in a shard

def _record_path(store: Path, shard: int) -> Path: return store/"records"/f"{shard:06d}.json"

def shard_range(
    head: Mapping[str, Any], # of the store
    shard: int, # which
) -> range: # indices of its samples
    "Samples of a shard"
    return range(shard*head["shard_size"], min(head["n"], (shard + 1)*head["shard_size"]))

def read_head(
    store: str | os.PathLike, # store folder
) -> dict[str, Any]: # what `prepare_store` wrote
    "What a store folder says it is"
    path = Path(store)/"store.json"
    if not path.is_file(): raise MissingFile(f"{store} is no store (store.json is missing)")
    head = unsealed(path.read_bytes(), str(path))
    if head.get("medvol pairs") != VERSION: raise FormatError(f"{path}: is not a store of version {VERSION}")
    return head

def read_record(
    store: str | os.PathLike, # store folder
    shard: int, # which
) -> dict[str, Any] | None: # files, samples and where they are; None: not made yet
    "Record of a shard"
    path = _record_path(Path(store), shard)
    try: return unsealed(path.read_bytes(), str(path))
    except FileNotFoundError: return None

def write_record(
    store: str | os.PathLike, # store folder
    shard: int, # which
    files: Sequence[Path], # what was written for it
    samples: Sequence[Mapping[str, Any]], # its rows
    **facts: Any, # what the reader needs to know
) -> dict[str, Any]: # the record
    "Declare a shard done"
    store = Path(store)
    told = {f.relative_to(store).as_posix(): {"bytes": f.stat().st_size, "sha256": file_digest(f, 64)} for f in files}
    record = {"shard": shard, **facts, "files": told, "samples": list(samples)}
    path = _record_path(store, shard)
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as t: t.write_text(sealed(record) + "\n")
    return record

def is_whole(
    store: str | os.PathLike, # store folder
    shard: int, # which
    verify: bool = False, # also compare all bytes with their digest, not only the size
) -> bool: # False: has to be made
    "Whether a shard is there as it was written"
    try: record = read_record(store, shard)
    except FormatError: return False
    if record is None: return False
    for name, want in record["files"].items():
        file = inside(store, name)
        if not file.is_file() or file.stat().st_size != want["bytes"]: return False
        if verify and file_digest(file, 64) != want["sha256"]: return False
    return True

# %%
#| export
def _zarr_meta(head: Mapping[str, Any]) -> dict[str, bytes]:
    "Metadata files of the Zarr group"
    import zarr
    memory = zarr.storage.MemoryStore()
    group = zarr.create_group(memory, zarr_format=3, attributes={"medvol": dict(head)})
    n, s, grid = max(1, head["n"]), head["shard_size"], tuple(head["shape"])
    create_array(group, "img", (n, 2, *grid), "uint8", (1, 1, *grid), shards=(s, 2, *grid),
                 attributes={"axes": list("ncxyz")})
    create_array(group, "seg", (n, *grid), np.dtype(head["seg_dtype"]), (1, *grid), shards=(s, *grid),
                 attributes={"axes": list("nxyz")})
    return {k: memory._store_dict[k].to_bytes() for k in ("zarr.json", "img/zarr.json", "seg/zarr.json")}

def _put(path: Path, content: bytes) -> None:
    "Write a file unless it has this content already"
    if path.is_file() and path.read_bytes() == content: return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as t: t.write_bytes(content)

def prepare_store(
    store: str | os.PathLike, # folder; made if it is absent
    kind: str, # "zarr" or "hdf5", or any other word if the caller writes the shards
    n: int, # samples
    shape: Sequence[int], # grid of all samples (x, y, z)
    dtype: Any = np.uint8, # of the labels
    *,
    val_count: int = 0, # so many of the last samples are for validation
    compression: Compression = "none", # of HDF5 chunks; Zarr always has zstd
    params: Mapping[str, Any] | None = None, # everything that decides the voxels; a store to go on with has the same
    about: Mapping[str, Any] | None = None, # versions and the like: noted by the first run, not compared
    shard_size: int = SHARD, # samples in a shard
) -> dict[str, Any]: # head of the store
    "Make a store folder, or open one of the same parameters to go on; it may be extended, never shrunk"
    store = Path(store)
    if not 0 <= val_count <= n: raise DataError(f"val_count: must be 0...{n}, got {val_count}")
    head = {"medvol pairs": VERSION, "kind": kind, "n": int(n), "val_count": val_count, "shard_size": shard_size,
            "shape": [int(k) for k in shape], "seg_dtype": np.dtype(dtype).str[1:], "compression": compression,
            "params": dict(params or {}), "about": dict(about or {})}
    if (store/"store.json").exists():
        old = read_head(store)
        head["about"] = old["about"]
        same = {**old, "n": head["n"], "val_count": val_count}
        if other := differing(same, head):
            raise OutputExists(f"output {store} was made with other {', '.join(other)}. Choose another place, or "
                               "on_exists='overwrite' (--on-exists)")
        if n < old["n"]: raise OutputExists(f"output {store} holds {old['n']} samples, {n} were asked for. A store can "
                                            "be extended, not shrunk")
        if n > old["n"] and old["n"] % shard_size: # its last shard is not full and has to be made again
            _record_path(store, old["n"]//shard_size).unlink(missing_ok=True)
    elif store.exists() and any(p for p in store.iterdir() if not p.name.startswith(".")):
        raise OutputExists(f"output {store} is a folder with other content. Choose another place, or "
                           "on_exists='overwrite' (--on-exists)")
    _put(store/"store.json", (sealed(head) + "\n").encode()) # first: another process may be looking
    (store/"records").mkdir(exist_ok=True)
    if kind == "zarr":
        for name, content in _zarr_meta(head).items(): _put(store/name, content)
    return head

# %%
#| export
_NO_CHUNK = 2**64 - 1

def _chunk(a: np.ndarray) -> bytes:
    "A chunk as Zarr stores it: zstd and CRC-32C"
    import google_crc32c
    import numcodecs
    packed = numcodecs.Zstd(level=1).encode(np.ascontiguousarray(a))
    return packed + google_crc32c.value(packed).to_bytes(4, "little")

def _zarr_shard(store: Path, shard: int, head: Mapping[str, Any], samples: Iterable[Sample]
                ) -> tuple[list[dict], list[Path]]:
    "Write the two files of a shard, one sample in memory at a time"
    import google_crc32c
    paths = {"img": store/"img"/"c"/str(shard)/"0/0/0/0", "seg": store/"seg"/"c"/str(shard)/"0/0/0"}
    counts = {"img": 2*head["shard_size"], "seg": head["shard_size"]}
    for p in paths.values(): p.parent.mkdir(parents=True, exist_ok=True)
    rows, ends = [], {name: np.full((n, 2), _NO_CHUNK, "<u8") for name, n in counts.items()}
    with atomic(paths["img"]) as img, atomic(paths["seg"]) as seg, open(img, "wb") as fi, open(seg, "wb") as fs:
        for k, s in enumerate(samples):
            row = sample_row(s, head["shape"], head["seg_dtype"])
            for name, file, parts in (("img", fi, s.img), ("seg", fs, s.seg[None])):
                row[name] = []
                for j, part in enumerate(parts):
                    data, start = _chunk(part), file.tell()
                    file.write(data)
                    row[name].append([start, len(data), zlib.crc32(data)])
                    ends[name][k*len(parts) + j] = start, len(data)
            rows.append(row)
        for name, file in (("img", fi), ("seg", fs)):
            index = ends[name].tobytes()
            file.write(index + google_crc32c.value(index).to_bytes(4, "little"))
    return rows, list(paths.values())

def _hdf5_shard(store: Path, shard: int, head: Mapping[str, Any], samples: Iterable[Sample]
                ) -> tuple[list[dict], list[Path]]:
    "Write the part file of a shard"
    import h5py
    path, rows, tables = store/"parts"/f"{shard:06d}.hdf5", [], []
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as t:
        with _Sink(t, "w+") as sink:
            with h5py.File(sink, "w", **HDF5_FORMAT) as f:
                for k, s in zip(shard_range(head, shard), samples):
                    rows.append(sample_row(s, head["shape"], head["seg_dtype"]))
                    add_group(f, f"{k:06d}", s, head["compression"])
                f.flush()
                tables = [chunk_entries(f, f"{k:06d}") for k in shard_range(head, shard)]
            sink.check()
        with open(t, "rb") as f: rows = [{**r, **with_crc(f, e)} for r, e in zip(rows, tables)]
    return rows, [path]

def write_shard(
    store: str | os.PathLike, # folder, see `prepare_store`
    shard: int, # which
    samples: Iterable[Sample], # as many as the shard holds; one is in memory at a time
) -> dict[str, Any]: # its record
    "Write one shard and its record; until then it is not there"
    store, head = Path(store), read_head(store)
    wanted = len(shard_range(head, shard))
    if not wanted: raise DataError(f"{store}: has no shard {shard}")
    write = {"zarr": _zarr_shard, "hdf5": _hdf5_shard}[head["kind"]]
    rows, files = write(store, shard, head, samples)
    if len(rows) != wanted: raise DataError(f"{store}, shard {shard}: got {len(rows)} samples, it holds {wanted}")
    where = dict(zip(("img", "seg"), [f.relative_to(store).as_posix() for f in (files*2)[:2]]))
    codec = "zstd" if head["kind"] == "zarr" else head["compression"]
    return write_record(store, shard, files, rows, where=where, codec=codec, shape=head["shape"],
                        seg_dtype=head["seg_dtype"])

# %% [markdown]
# When all shards are there the folder gets `table.csv`, and, for HDF5, `train_data.hdf5` and `val_data.hdf5`. These
# hold no voxels but links to the parts, which HDF5 follows by itself, so a terabyte is not copied once more.
# The samples for validation are the last *indices*: an index carries no meaning, so they are like all others.

# %%
#| export
def split_ranges(
    head: Mapping[str, Any], # of a store
) -> dict[str, range]: # "train", "val" and "all" -> indices
    "Which samples are for what"
    n, val = head["n"], head["val_count"]
    return {"train": range(n - val), "val": range(n - val, n), "all": range(n)}

def finish_store(
    store: str | os.PathLike, # folder
) -> bool: # False: shards are missing, nothing was done
    "Table and links of a store whose shards are all there; the same bytes whoever does it"
    store, head = Path(store), read_head(store)
    shards = range(-(-head["n"]//head["shard_size"]))
    records = [read_record(store, s) for s in shards]
    if None in records: return False
    known = {"img", "seg", "inputs", "labels", "sha256"}
    rows = [{**{k: v for k, v in r.items() if k not in known}, **{k: len(r[k]) for k in ("labels",) if k in r},
             **{f"{name}_sha256": digest for name, digest in r["sha256"].items()}}
            for record in records for r in record["samples"]]
    write_csv(store/"table.csv", rows)
    if head["kind"] == "hdf5":
        for name in ("train", "val"):
            links = {f"{k:06d}": (f"parts/{k//head['shard_size']:06d}.hdf5", f"/{k:06d}")
                     for k in split_ranges(head)[name]}
            _put(store/f"{name}_data.hdf5", new_hdf5(head, links))
    return True

# %% [markdown]
# ## The reader
# One reader for all of it: a store folder, an HDF5 file with its index, the folder that holds the files for training
# and validation, and an HDF5 file of the reference, which has neither index nor checksums. `reader[i]` gives arrays;
# damage is an error that names the sample. If `store.json` is damaged all samples can still be read by their records,
# but not those of one split, since nothing else says which were held out.

# %%
#| export
class _Shards:
    "Samples of a store folder"
    def __init__(self, store: Path, split: str):
        try: self.head = read_head(store)
        except FormatError as e: # what is needed can be found in the records, too, but for what is held out
            if split != "all":
                raise FormatError(f"{e}. It alone says which samples are for validation. Read them all (split='all'), "
                                  "or make the store again") from None
            log.warning("%s. Its records are read instead; every sample found counts", e)
            self.head = self._guessed(store)
        self.store, self.size = store, self.head["shard_size"]
        if self.head["kind"] not in ("zarr", "hdf5"):
            raise DataError(f"{store}: holds {self.head['kind']}, not pairs. Pack them first: medvol synth pack")
        made = {int(p.stem) for p in (store/"records").glob("[0-9]*.json")}
        self.indices = [i for i in split_ranges(self.head)[split] if i//self.size in made]
        self.ids = [f"{i:06d}" for i in self.indices]
        self.missing = len(split_ranges(self.head)[split]) - len(self.indices)

    @staticmethod
    def _guessed(store: Path) -> dict[str, Any]:
        n = 0
        for p in sorted((store/"records").glob("[0-9]*.json")):
            with contextlib.suppress(FormatError):
                n = max(n, int(p.stem)*SHARD + len((read_record(store, int(p.stem)) or {}).get("samples", ())))
        return {"n": n, "val_count": 0, "shard_size": SHARD, "kind": "hdf5" if (store/"parts").exists() else "zarr"}

    def place(self, i: int) -> Place:
        shard, k = divmod(self.indices[i], self.size)
        try: record = _cached_record(str(self.store), shard, _record_path(self.store, shard).stat().st_mtime_ns)
        except FormatError as e: raise FormatError(f"sample {self.ids[i]}: {e}") from None
        where = [inside(self.store, record["where"][name]) for name in ("img", "seg")]
        return Place(*where, record["codec"], tuple(record["shape"]), record["seg_dtype"], record["samples"][k])

    def load(self, i: int) -> dict[str, np.ndarray]: return self.place(i).load()

    def files(self) -> Iterator[tuple[list[int], str]]: # (positions of its samples, what is wrong or nothing)
        by_shard: dict[int, list[int]] = {}
        for i, index in enumerate(self.indices): by_shard.setdefault(index//self.size, []).append(i)
        for shard, members in by_shard.items():
            try: wrong = "" if is_whole(self.store, shard, verify=True) else "not what was written"
            except OSError as e: wrong = str(e)
            yield members, wrong and f"shard {shard:06d}: {wrong}"

@lru_cache(maxsize=64)
def _cached_record(store: str, shard: int, changed: int) -> dict[str, Any]: return read_record(store, shard)

class _Indexed:
    "Samples of an HDF5 file with an index"
    def __init__(self, path: Path):
        self.path, (self.head, self.rows), self.missing = path, read_index(path), 0
        self.ids = [f"{self.head['first'] + k:06d}" for k in range(len(self.rows))]

    def place(self, i: int) -> Place:
        if self.rows[i] is None:
            raise FormatError(f"sample {self.ids[i]}: damaged record in {beside(self.path, 'index')}, line {i + 2}")
        return Place(self.path, self.path, self.head["compression"], tuple(self.head["shape"]),
                      self.head["seg_dtype"], {**self.rows[i], "id": self.ids[i]})

    def load(self, i: int) -> dict[str, np.ndarray]: return self.place(i).load()

    def files(self) -> Iterator[tuple[list[int], str]]:
        plain, wrong = None, []
        try:
            plain = _Plain(self.path)
            if plain.ids[:len(self.ids)] != self.ids: wrong = [f"{self.path}: its groups are not those of its index"]
        except FormatError as e: wrong = [str(e)]
        for i in range(len(self.ids)):
            here = list(wrong)
            try:
                if plain is not None and not here and self.rows[i]: _compare(plain.load(i), self.rows[i], self.ids[i])
            except FormatError as e: here = [str(e)]
            yield [i], here[0] if here else "" if self.rows[i] else "damaged record"

class _Plain:
    "Samples of any HDF5 file in the layout of the reference"
    def __init__(self, path: Path):
        self.path, self.missing = path, 0
        with self._open() as f: self.ids = sorted(k for k in f if k.isdigit())
        if not self.ids: raise FormatError(f"{path}: has no groups '000000', '000001', ... with 'img' and 'seg'")

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        import h5py
        try:
            with h5py.File(self.path, "r") as f: yield f
        except (OSError, RuntimeError, KeyError, ValueError) as e:
            if isinstance(e, FormatError): raise
            raise FormatError(f"{self.path}: damaged HDF5 file ({e})") from None

    def load(self, i: int) -> dict[str, np.ndarray]:
        with self._open() as f: out = {name: f[self.ids[i]][name][...] for name in ("img", "seg")}
        img, seg = out["img"], out["seg"]
        good = img.dtype == np.uint8 and img.ndim == 4 and len(img) == 2 and seg.dtype.kind == "u"
        if not good or img.shape[1:] != seg.shape:
            raise FormatError(f"{self.path}, sample {self.ids[i]}: img {img.dtype} {img.shape} and seg {seg.dtype} "
                              f"{seg.shape} are no pair")
        return out

    def files(self) -> Iterator[tuple[list[int], str]]: yield list(range(len(self.ids))), "no checksums"

def _compare(found: Mapping[str, np.ndarray], row: Mapping[str, Any], sample: str) -> None:
    for name in ("img", "seg"):
        if array_digest(found[name]) != row["sha256"][name]:
            raise FormatError(f"sample {sample}: {name} is not what was written")

# %%
#| export
def _sources(path: Path, split: str) -> list[Any]:
    if split not in ("train", "val", "all"): raise DataError(f"split: must be train, val or all, got {split!r}")
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    if path.is_dir():
        if (path/"store.json").exists(): return [_Shards(path, split)]
        names = ("train", "val") if split == "all" else (split,)
        files = [path/f"{n}_data.hdf5" for n in names if (path/f"{n}_data.hdf5").exists()]
        if not files: raise MissingFile(f"{path}: holds neither store.json nor {names[0]}_data.hdf5")
        return [s for f in files for s in _sources(f, "all")]
    if (path.parent/"store.json").exists() and path.name in ("train_data.hdf5", "val_data.hdf5"):
        return [_Shards(path.parent, path.name[:-10])]
    return [_Indexed(path) if beside(path, "index").exists() else _Plain(path)]

class PairReader:
    "Samples of a store: `reader[i]` is {'img': (2, x, y, z) uint8, 'seg': (x, y, z) uint8 or uint16}"
    def __init__(
        self,
        path: str | os.PathLike, # store folder, HDF5 file, or folder with train_data.hdf5 and val_data.hdf5
        split: Literal["train", "val", "all"] = "all", # which samples
    ):
        self.path, self.split = Path(path), split
        self._parts = _sources(self.path, split)
        self._starts = np.cumsum([0] + [len(p.ids) for p in self._parts])
        self.missing = sum(p.missing for p in self._parts) # samples that were announced and are not made yet
        if self.missing: log.warning("%s: %d samples are not made yet", path, self.missing)

    def __len__(self) -> int: return int(self._starts[-1])
    def __repr__(self) -> str: return f"PairReader({str(self.path)!r}, {self.split!r}: {len(self)} samples)"
    def __reduce__(self): return type(self), (str(self.path), self.split)

    @property
    def ids(self) -> list[str]: return [i for p in self._parts for i in p.ids] # keys of the samples, in order

    def _find(self, i: int) -> tuple[Any, int]:
        if not -len(self) <= i < len(self): raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._parts[k], i - int(self._starts[k])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        part, k = self._find(i)
        return part.load(k)

    def facts(
        self,
        i: int, # which sample
    ) -> dict[str, Any]: # id, index, kind, labels, digests; empty for files without an index
        "What is known about a sample"
        part, k = self._find(i)
        if isinstance(part, _Plain): return {}
        return {name: v for name, v in part.place(k).row.items() if name not in ("img", "seg")}

    def verify(self) -> dict[str, Any]: # samples, damaged (their ids), problems (with files), ok
        "Read everything and compare it with its digests"
        damaged, problems, total = [], [], 0
        for part in self._parts:
            for members, wrong in progress(part.files(), "verify"):
                total += len(members)
                if wrong: problems.append(wrong)
                for i in members if wrong else ():
                    try:
                        found = part.load(i)
                        if not isinstance(part, _Plain): _compare(found, part.place(i).row, part.ids[i])
                    except (MedvolError, OSError, LookupError, TypeError): damaged.append(part.ids[i])
        return {"samples": total, "damaged": damaged, "problems": problems, "ok": not (damaged or problems)}

def open_pairs(
    path: str | os.PathLike, # store folder, HDF5 file, or folder with train_data.hdf5 and val_data.hdf5
    split: Literal["train", "val", "all"] = "all", # which samples
) -> PairReader: # has len, [i], ids, facts and verify; may be pickled
    "Open a store of pairs"
    return PairReader(path, split)

# %%
work = tmpdir()
root = work.__enter__()
for kind in ("zarr", "hdf5"):
    head = prepare_store(root/kind, kind, 22, (16, 16, 16), val_count=4, params={"seed": 0})
    for shard in (1, 0): write_shard(root/kind, shard, map(toy, shard_range(head, shard)))
    finish_store(root/kind)
reader = open_pairs(root/"hdf5", "val")
montage([a for i in (0, 1) for a in (*reader[i]["img"][:, :, :, 8], reader[i]["seg"][:, :, 8])], cols=6,
        titles=[f"{w} {reader.ids[i]}" for i in (0, 1) for w in ("view 1", "view 2", "labels")])

# %% [markdown]
# Both kinds give the same samples, to our reader, to Zarr and to plain h5py.

# %%
pairs = open_pairs(root/"zarr")
group, links = zarr.open(root/"zarr", mode="r"), h5py.File(root/"hdf5"/"train_data.hdf5")
assert len(pairs) == 22 and len(links) == 18 and reader.ids == ["000018", "000019", "000020", "000021"]
for k in (0, 15, 17):
    assert all(np.array_equal(pairs[k][n], getattr(toy(k), n)) for n in ("img", "seg"))
    assert np.array_equal(group["img"][k], toy(k).img) and np.array_equal(group["seg"][k], toy(k).seg)
    assert np.array_equal(links[f"{k:06d}"]["img"][...], toy(k).img)
assert pairs.verify() == {"samples": 22, "damaged": [], "problems": [], "ok": True}
sorted(p.relative_to(root).as_posix() for p in (root/"hdf5").rglob("*") if p.is_file()), pairs.facts(3)["labels"]

# %% [markdown]
# A flipped bit in a chunk is one sample lost. A flipped bit in the directory of HDF5 is none, because the records know
# where the samples are; but it is told.

# %%
part = root/"hdf5"/"parts"/"000000.hdf5"
good = part.read_bytes()
def flipped(at): return good[:at] + bytes([good[at] ^ 1]) + good[at + 1:]

pairs = open_pairs(root/"hdf5")
part.write_bytes(flipped(pairs._parts[0].place(5).row["img"][1][0] + 100))
chunk = pairs.verify()
with raises(FormatError, match="sample 000005: .*000000.hdf5, byte .*checksum"): pairs[5]
part.write_bytes(flipped(20))
directory = pairs.verify()
still = pairs[5]["img"]
with raises(OSError): h5py.File(part)
part.write_bytes(good)
chunk, directory

# %%
assert chunk["damaged"] == ["000005"] and directory["damaged"] == [] and not directory["ok"]
assert np.array_equal(still, toy(5).img) and pairs.verify()["ok"]

# %%
with raises(OutputExists, match="made with other seed"):
    prepare_store(root/"zarr", "zarr", 22, (16, 16, 16), params={"seed": 1})
with raises(OutputExists, match="can be extended, not shrunk"):
    prepare_store(root/"zarr", "zarr", 20, (16, 16, 16), params={"seed": 0})
with raises(MissingFile, match="neither store.json nor train_data.hdf5"): open_pairs(root, "train")
work.__exit__(None, None, None)

# %% [markdown]
# ## Which picture belongs to which
# Names decide. `view1_X`, `view2_X` and `X` are one sample; whatever has no partner is listed and nothing is packed.
# The order in a store is that of the number at the end of a name, if all have one, as names made by `medvol synth
# ensembles` do. Others are ordered by a digest of their name: alphabetical order would sort by kind and number of
# shapes, and the last ones, kept for validation, would not be like the others.

# %%
#| export
def pair_by_name(
    view1_dir: str | os.PathLike, # folder of view1_X
    view2_dir: str | os.PathLike, # folder of view2_X
    seg_dir: str | os.PathLike, # folder of X
) -> list[tuple[str, Path, Path, Path]]: # (X, first picture, second picture, labels) in the order of the store
    "Find the files of every sample by their names, or say which have no partner"
    found: dict[str, dict[str, Path]] = {}
    for what, folder, prefix in (("view1", view1_dir, "view1_"), ("view2", view2_dir, "view2_"), ("seg", seg_dir, "")):
        if not Path(folder).is_dir(): raise MissingFile(f"{folder} is not a folder")
        found[what] = {}
        for p in sorted(filter(_is_readable, Path(folder).iterdir())):
            name = stem_of(p)
            if not name.startswith(prefix): raise DataError(f"{p}: the name must begin with {prefix!r}")
            name = name.removeprefix(prefix)
            if name in found[what]: raise DataError(f"{found[what][name]} and {p} are both {name!r}. Keep one of them")
            found[what][name] = p
    everything = set().union(*found.values())
    lost = {what: sorted(everything - set(names)) for what, names in found.items()}
    if any(lost.values()):
        told = "; ".join(f"{len(names)} without {what}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
                         for what, names in lost.items() if names)
        raise DataError(f"pack: pictures and labels do not match: {told}. Folders: {view1_dir}, {view2_dir}, {seg_dir}")
    if not everything: raise DataError(f"pack: no volumes in {view1_dir}, {view2_dir} and {seg_dir}")
    numbered = all(index_of(name) is not None for name in everything)
    ordered = sorted(everything, key=lambda name: (index_of(name) if numbered else fingerprint(("split", name)), name))
    return [(name, *(found[what][name] for what in ("view1", "view2", "seg"))) for name in ordered]

def index_of(
    name: str, # of an ensemble, without folder and ending
) -> int | None: # None: it was not made by this library
    "Number of an ensemble, the seven digits at the end of its name"
    tail = name.rpartition("_")[2]
    return int(tail) if len(tail) == 7 and tail.isascii() and tail.isdigit() else None

def read_pair(
    files: tuple[str, Path, Path, Path], # from `pair_by_name`
    dtype: Any = None, # of the labels; None: uint8 if they fit, else uint16
) -> Sample: # named as the ensemble
    "Read the files of a sample and check that they fit"
    name, *paths = files
    first, second, seg = (_labels_of(p)[0] for p in paths)
    for p, a, most in zip(paths, (first, second, seg), (255, 255, 65535)):
        if a.shape != seg.shape or a.ndim != 3:
            raise DataError(f"{p}: has the shape {a.shape}, its labels {paths[2]} have {seg.shape}")
        if a.max() > most: raise DataError(f"{p}: holds values up to {a.max()}, at most {most} is possible")
    dtype = np.dtype(dtype) if dtype is not None else np.dtype("u1" if seg.max() < 256 else "u2")
    if seg.max() > np.iinfo(dtype).max:
        raise DataError(f"{paths[2]}: holds labels up to {seg.max()}, the store has {dtype}")
    return Sample(name, np.stack([first, second]).astype(np.uint8), seg.astype(dtype))

# %%
def write_files(folder, names, skip=()):
    for k, name in enumerate(names):
        parts = dict(zip(("view1/view1_", "view2/view2_", "seg/"), (*toy(k).img, toy(k).seg)))
        for prefix, a in parts.items():
            (folder/prefix.split("/")[0]).mkdir(exist_ok=True)
            if prefix + name not in skip: write_volume(Volume(a, np.eye(4)), folder/f"{prefix}{name}.nii.gz")

with tmpdir() as d:
    write_files(d, [f"{kind}_shapes{n}_{k:07d}" for k, (kind, n) in enumerate([("u", 30), ("f", 21), ("e", 25)])])
    files = pair_by_name(d/"view1", d/"view2", d/"seg")
    sample = read_pair(files[1])
[name for name, *_ in files]

# %%
assert np.array_equal(sample.img, toy(1).img) and np.array_equal(sample.seg, toy(1).seg)
with tmpdir() as d:
    write_files(d, ["A", "B", "C"], skip=("view1/view1_A", "view2/view2_C"))
    with raises(DataError, match="1 without view1: A; 1 without view2: C"):
        pair_by_name(d/"view1", d/"view2", d/"seg")
