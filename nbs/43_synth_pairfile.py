# %% [markdown]
# # Pairs in one file
#
# > Two pictures and their labels, a hundred thousand times, in an HDF5 file that a killed process cannot break.
#
# The reference packs its pairs into one HDF5 file: no chunks, no checksums, no word about their origin, opened with
# mode "w" by one process. A run that is killed leaves a file that nothing can open, and 200 of 200 flipped bits are
# read as data.
#
# The file of this page has the same layout, so the reader of the reference and any other HDF5 program open it. Samples
# are appended one by one, each wholly or not at all. Beside the file lies its *index*, one line a sample: what it is,
# the digest of its voxels, and where its bytes are, with their checksum. Our own reader (next page) follows the index.
# It needs no library state, works in any process, also while the file grows, and still reads when the directory inside
# the file is damaged.

# %%
#| default_exp synth.pairfile

# %%
#| export
import contextlib
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from medvol_nb.core import (DataError, DiskFull, FormatError, MissingFile, OnExists, OutputExists, _full, atomic,
                            check_output, fingerprint, lock, parse_json, plain, to_json)

# %%
import signal

import h5py

from medvol_nb.core import raises, rng_for, tmpdir
from medvol_nb.phantoms import random_body

# %% [markdown]
# ## Records that notice their own damage
# A record is a line of JSON that ends with the digest of what is before it. It is made of text, so a changed space is
# noticed, too.

# %%
#| export
_MARK = ', "check": "'

def sealed(
    record: Mapping[str, Any], # plain values
) -> str: # without line end
    "One line of JSON with a digest of itself"
    body = to_json(record, None)
    return f"{body[:-1]}{_MARK}{hashlib.sha256(body.encode()).hexdigest()[:16]}\"}}"

def unsealed(
    line: bytes | str, # from `sealed`
    where: str, # file, for the message
) -> dict[str, Any]: # plain values
    "The record, or an error if one of its bytes has changed"
    try: text = line.decode() if isinstance(line, bytes) else line
    except UnicodeDecodeError: raise FormatError(f"{where}: damaged record (not UTF-8 text)") from None
    body, mark, check = text.rstrip("\n").rpartition(_MARK)
    body += "}"
    if not mark or check != hashlib.sha256(body.encode()).hexdigest()[:16] + '"}':
        raise FormatError(f"{where}: damaged record, it is not what was written")
    return parse_json(body, where)

# %%
sealed({"key": "000007", "bytes": 12})

# %%
assert unsealed(sealed({"a": [1, "ä"]}) + "\n", "x") == {"a": [1, "ä"]}
for bad in (sealed({"a": 1}).replace("1", "2", 1), '{"a": 1}', sealed({"a": 1})[:-3], b"\xff"):
    with raises(FormatError, match="damaged record"): unsealed(bad, "x")

# %% [markdown]
# ## A sample
# Two pictures of one label map, all on one grid. Its facts are the digests of the voxels and how often each label
# occurs.

# %%
#| export
VERSION = 1 # of records and store folders

class Sample(NamedTuple):
    "Two pictures of one label map"
    id: str # name in tables
    img: np.ndarray # (2, x, y, z) uint8, the pictures
    seg: np.ndarray # (x, y, z) uint8 or uint16, the labels
    facts: Mapping[str, Any] = {} # where it comes from: index, kind, digests of plans

def array_digest(
    a: np.ndarray, # n-d
) -> str: # SHA-256 of the values in C order
    "Digest of the voxels alone"
    return hashlib.sha256(np.ascontiguousarray(a).data).hexdigest()

def sample_row(
    s: Sample, # to be stored
    shape: Sequence[int], # grid of the store (x, y, z)
    dtype: Any, # labels of the store
) -> dict[str, Any]: # id, its facts, voxels of each label, sha256 of both arrays
    "What is recorded about a sample, if it fits the store"
    if s.img.dtype != np.uint8 or s.img.shape != (2, *shape):
        raise DataError(f"sample {s.id}: img must be uint8 {(2, *shape)}, got {s.img.dtype} {s.img.shape}")
    if s.seg.dtype != np.dtype(dtype) or s.seg.shape != tuple(shape):
        raise DataError(f"sample {s.id}: seg must be {np.dtype(dtype)} {tuple(shape)}, got {s.seg.dtype} {s.seg.shape}")
    counts = np.bincount(s.seg.reshape(-1))
    return {"id": s.id, **s.facts, "labels": {str(v): int(counts[v]) for v in np.flatnonzero(counts)},
            "sha256": {"img": array_digest(s.img), "seg": array_digest(s.seg)}}

# %%
def toy(k, n=16):
    seg = random_body((n, n, n), seed=k).lbl.astype(np.uint8)
    img = rng_for(0, "toy", k).integers(0, 256, (2, n, n, n)).astype(np.uint8)//2 + 20*seg
    return Sample(f"{k:06d}", img, seg, {"index": k})

{k: v for k, v in sample_row(toy(3), (16, 16, 16), "u1").items() if k != "sha256"}

# %%
with raises(DataError, match="sample 000003: img must be uint8"): sample_row(toy(3), (16, 16, 8), "u1")

# %% [markdown]
# ## Bytes in a file
# A chunk is one picture or one label map. Its entry in the record is its first byte, its length and the CRC-32 of what
# is stored. Every codec used here ends with four bytes of a checksum of its own, for readers that know no records.

# %%
#| export
def _decoded(stored: bytes, codec: str, out: np.ndarray) -> None:
    "Fill `out` from the stored bytes of a chunk"
    flat = out.reshape(-1).view(np.uint8)
    if codec == "zstd":
        import numcodecs
        numcodecs.Zstd().decode(stored[:-4], out=flat)
    elif codec == "gzip": flat[:] = np.frombuffer(zlib.decompressobj().decompress(stored[:-4], out.nbytes + 1), "u1")
    elif codec == "none" or (codec == "lzf" and len(stored) == out.nbytes + 4): # LZF leaves noise as it is
        flat[:] = np.frombuffer(stored[:-4], np.uint8)
    elif codec == "lzf": # only HDF5 itself can
        import h5py
        with h5py.File(io.BytesIO(), "w") as f:
            d = f.create_dataset("a", out.shape, out.dtype, chunks=out.shape, compression="lzf", fletcher32=True)
            d.id.write_direct_chunk((0,)*out.ndim, stored)
            try: out[...] = d[...]
            except OSError as e: raise ValueError(str(e)) from None
    else: raise FormatError(f"codec {codec!r} is not known")

def _read_chunk(path: Path, entry: Sequence[int], codec: str, out: np.ndarray) -> None:
    "Read one chunk and compare it with its checksum"
    try:
        start, size, crc = entry
        if not (0 <= start and 4 < size <= 2*out.nbytes + 4096): raise ValueError(f"a chunk of {size} bytes")
        with open(path, "rb", buffering=0) as f: stored = os.pread(f.fileno(), size, start)
        if len(stored) < size: raise ValueError(f"the file ends after {len(stored)} of {size} bytes of a chunk")
        if zlib.crc32(stored) != crc: raise ValueError("checksum does not match")
        _decoded(stored, codec, out)
    except FileNotFoundError: raise MissingFile(f"{path} does not exist") from None
    except OSError: raise
    except Exception as e: raise FormatError(f"{path}, byte {entry[0]}: damaged ({e})") from None

class Place(NamedTuple):
    "Where a sample is"
    img: Path # file with the pictures
    seg: Path # file with the labels
    codec: str # zstd, gzip, lzf or none
    shape: tuple[int, ...] # grid (x, y, z)
    dtype: str # of the labels
    row: Mapping[str, Any] # from `sample_row`, and the entries of the chunks

    def load(self) -> dict[str, np.ndarray]: # {'img': (2, x, y, z) uint8, 'seg': (x, y, z) uint8 or uint16}
        "Read the sample; damage is an error that names it"
        img, seg = np.empty((2, *self.shape), np.uint8), np.empty(self.shape, self.dtype)
        try:
            for k in (0, 1): _read_chunk(self.img, self.row["img"][k], self.codec, img[k])
            _read_chunk(self.seg, self.row["seg"][0], self.codec, seg)
        except (FormatError, MissingFile) as e: raise type(e)(f"sample {self.row['id']}: {e}") from None
        return {"img": img, "seg": seg}

# %% [markdown]
# ## The HDF5 layout
# As the reference has it: a group for each sample, `/000000/img` (2, x, y, z) and `/000000/seg` (x, y, z). New are
# chunks of one picture, Fletcher-32 checksums, the file format of HDF5 1.10, in which the metadata have checksums as
# well, attributes that say where the data come from, and no time stamps, so that equal data are equal files.

# %%
#| export
Compression = Literal["none", "gzip", "lzf"]
HDF5_FORMAT = {"libver": ("v110", "v110"), "track_order": False} # metadata have checksums since version 1.10

def new_hdf5(
    head: Mapping[str, Any], # plain values that say where the data come from; attribute 'medvol'
    links: Mapping[str, tuple[str, str]] | None = None, # group -> (file, group in it), for a file of links
) -> bytes: # content of a file without samples
    "An empty HDF5 file, or one of links to others"
    import h5py
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **HDF5_FORMAT) as f:
        f.attrs["medvol"] = np.bytes_(to_json(head, None).encode())
        for key, (file, group) in (links or {}).items(): f[key] = h5py.ExternalLink(file, group)
    return buffer.getvalue()

def add_group(
    f: Any, # open HDF5 file
    key: str, # of the group, such as '000012'
    s: Sample, # what goes into it
    compression: Compression, # of its chunks
) -> None:
    "Write one sample into an open HDF5 file"
    import h5py
    timeless = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    timeless.set_obj_track_times(False)
    group = h5py.Group(h5py.h5g.create(f.id, key.encode(), gcpl=timeless))
    options = {"none": {}, "gzip": {"compression": "gzip", "compression_opts": 1}, "lzf": {"compression": "lzf"}}
    for name, a, chunk in (("img", s.img, (1, *s.img.shape[1:])), ("seg", s.seg, s.seg.shape)):
        group.create_dataset(name, data=a, chunks=chunk, fletcher32=True, track_times=False, **options[compression])

def chunk_entries(
    f: Any, # open HDF5 file, flushed
    key: str, # of a group
) -> dict[str, list[list[int]]]: # 'img' and 'seg' -> first byte and length of each chunk, in order
    "Where the chunks of a sample are"
    out = {}
    for name in ("img", "seg"):
        ids = f[key][name].id
        found = sorted((tuple(c.chunk_offset), c.byte_offset, c.size)
                       for c in map(ids.get_chunk_info, range(ids.get_num_chunks())))
        out[name] = [[start, size] for _, start, size in found]
    return out

def with_crc(
    file: Any, # the HDF5 file, opened as plain bytes
    table: Mapping[str, list], # from `chunk_entries`
) -> dict[str, list[list[int]]]: # first byte, length, CRC-32
    "Read chunks back and add the checksums of what is stored"
    return {name: [[start, size, zlib.crc32(os.pread(file.fileno(), size, start))] for start, size in rows]
            for name, rows in table.items()}

# %% [markdown]
# ## Appending to a file that may not break
# HDF5 changes its directory in place. If the process dies in between, the whole file is lost. So the library does not
# get the file itself but a stage: new bytes go behind the old end, where nothing refers to them yet; changes of old
# bytes are kept in memory. Then the old content of these few pages is saved in a small file of its own (the *undo*
# file), only then they are overwritten, and at last the record of the sample is added to the index. Whoever finds an
# undo file puts the old pages back, unless the record is there. This is how SQLite does it. Every sample starts from
# the bytes on disk alone, so an interrupted file ends with the same bytes as an uninterrupted one.

# %%
#| export
_PAGE = 4096

def _write_at(fd: int, data: Any, start: int) -> None:
    "Write all of `data`, or raise"
    rest = memoryview(data)
    while rest:
        n = os.pwrite(fd, rest, start)
        start, rest = start + n, rest[n:]

class _Stage:
    "A file for HDF5 in which old bytes are not changed: new ones are appended, changed pages are collected"
    def __init__(self, file: Any, size: int):
        self.fd, self.old, self.end, self.at = file.fileno(), size, size, 0
        self.pages: dict[int, bytearray] = {}
        self.error: Exception | None = None

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.end)[whence]
        return self.at

    def tell(self) -> int: return self.at
    def flush(self) -> None: pass

    def _original(self, page: int) -> bytes: return os.pread(self.fd, min(_PAGE, self.old - page*_PAGE), page*_PAGE)

    def _overlaps(self, n: int) -> Iterator[tuple[int, slice, slice]]:
        "Pages below the next `n` bytes: number, part of the page, part of the bytes"
        stop = min(self.at + n, self.old)
        for p in range(self.at//_PAGE, -(-stop//_PAGE) if stop > self.at else 0):
            a, b = max(self.at, p*_PAGE), min(stop, (p + 1)*_PAGE)
            yield p, slice(a - p*_PAGE, b - p*_PAGE), slice(a - self.at, b - self.at)

    def read(self, n: int = -1) -> bytes: # the library looks for it, but calls `readinto`
        out = bytearray(self.end - self.at if n < 0 else n)
        return bytes(out[:self.readinto(out)])

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = os.pread(self.fd, min(len(view), max(0, self.end - self.at)), self.at)
        view[:len(data)] = data
        for p, here, there in self._overlaps(len(data)):
            if p in self.pages: view[there] = self.pages[p][here]
        self.at += len(data)
        return len(data)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for p, here, there in self._overlaps(len(view)):
            self.pages.setdefault(p, bytearray(self._original(p)))[here] = view[there]
        start = max(self.at, self.old)
        try:
            if self.error is None: _write_at(self.fd, view[start - self.at:], start)
        except OSError as e: self.error = e # HDF5 would crash; `changed` tells
        self.at += len(view)
        self.end = max(self.end, self.at)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self.at if size is None else size
        try:
            if size < self.old: raise FormatError(f"the file would shrink from {self.old} to {size} bytes")
            os.ftruncate(self.fd, size)
            self.end = size
        except (OSError, FormatError) as e: self.error = self.error or e
        return size

    def changed(self) -> dict[int, tuple[bytes, bytes]]: # offset -> old and new bytes
        if self.error is not None: raise self.error
        pages = {p: (self._original(p), bytes(new)) for p, new in sorted(self.pages.items())}
        return {p*_PAGE: (old, new) for p, (old, new) in pages.items() if old != new}

def beside(
    path: str | os.PathLike, # HDF5 file
    what: Literal["index", "undo"], # which companion
) -> Path: # such as 'train_data.hdf5.index'
    "Companion of an HDF5 file"
    return Path(path).with_name(f"{Path(path).name}.{what}")

@contextlib.contextmanager
def _in_place(path: Path, size: int) -> Iterator[Any]:
    "Open a file to change it; what lies behind its `size` bytes is the rest of a sample that was never finished"
    with open(path, "r+b", buffering=0) as f:
        f.truncate(size)
        yield f

def _undo(path: Path) -> None:
    "Put back what an unfinished append has changed; the caller holds the lock"
    undo, index = beside(path, "undo"), beside(path, "index")
    if not undo.exists(): return
    first, _, pages = undo.read_bytes().partition(b"\n")
    told = unsealed(first, str(undo))
    if index.read_bytes()[told["index"]:].endswith(b"\n"): # the record is there, so the sample is
        undo.unlink()
        return
    with _in_place(path, told["bytes"]) as f:
        for offset, n in told["pages"]:
            _write_at(f.fileno(), pages[:n], offset)
            pages = pages[n:]
        os.fsync(f.fileno())
    with _in_place(index, told["index"]) as f: os.fsync(f.fileno())
    undo.unlink()

# %%
#| export
def read_index(
    path: str | os.PathLike, # HDF5 file
) -> tuple[dict[str, Any], list[dict[str, Any] | None]]: # head, and a row for each sample; None: damaged
    "What the index of an HDF5 file says; a line without an end was never finished"
    index = beside(path, "index")
    if not index.is_file(): raise MissingFile(f"{index} does not exist")
    lines = index.read_bytes().split(b"\n")[:-1]
    if not lines: raise FormatError(f"{index}: empty")
    head, rows = unsealed(lines[0], f"{index}, line 1"), []
    if head.get("medvol pairs") != VERSION: raise FormatError(f"{index}: is not an index of version {VERSION}")
    for k, line in enumerate(lines[1:], 2):
        try: rows.append(unsealed(line, f"{index}, line {k}"))
        except FormatError: rows.append(None)
    return head, rows

def differing(
    a: Mapping[str, Any], # head of what is there
    b: Mapping[str, Any], # head of what is asked for
) -> list[str]: # names, of parameters if nothing else differs
    "Which settings of two heads are not the same"
    def names(x: Mapping, y: Mapping) -> list[str]:
        return [k for k in sorted({*x, *y}) if fingerprint(plain(x.get(k))) != fingerprint(plain(y.get(k)))]
    found = names(a, b)
    return names(a["params"], b["params"]) if found == ["params"] else found

class PairFile:
    "An HDF5 file in the reference's layout that samples are appended to, each wholly or not at all"
    def __init__(
        self,
        path: str | os.PathLike, # such as 'train_data.hdf5'; its index is 'train_data.hdf5.index'
        shape: Sequence[int], # grid of all samples (x, y, z)
        dtype: Any = np.uint8, # of the labels
        *,
        first: int = 0, # number of the first group
        compression: Compression = "none", # of the chunks
        params: Mapping[str, Any] | None = None, # where the data come from; a resumed file must have the same
        on_exists: OnExists = "skip", # "skip": go on where it stopped, "overwrite": start anew, "error": refuse
    ):
        if compression not in ("none", "gzip", "lzf"):
            raise DataError(f"compression: must be none, gzip or lzf, got {compression!r}")
        self.path, self._on_exists, self._stack = Path(path), on_exists, contextlib.ExitStack()
        self.head = {"medvol pairs": VERSION, "shape": [int(n) for n in shape], "seg_dtype": np.dtype(dtype).str[1:],
                     "first": first, "compression": compression, "params": dict(params or {})}
        self.rows: list[dict[str, Any]] = [] # what is in the file, in order

    def __len__(self) -> int: return len(self.rows)

    def __enter__(self) -> "PairFile":
        index = beside(self.path, "index")
        fresh = check_output(self.path, self._on_exists) and self._on_exists == "overwrite"
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.path))
            if fresh: beside(self.path, "undo").unlink(missing_ok=True)
            elif self.path.exists() and not index.exists():
                raise OutputExists(f"output {self.path} has no index {index.name}: it cannot be continued. Choose "
                                   "another place, or on_exists='overwrite' (--on-exists)")
            else: _undo(self.path)
            if fresh or not index.exists(): self._create(index)
            self._load()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc) -> None: self._stack.close()

    def _create(self, index: Path) -> None:
        with atomic(index) as t: t.write_text(sealed({**self.head, "bytes": len(new_hdf5(self.head))}) + "\n")

    def _load(self) -> None:
        head, rows = read_index(self.path)
        self.size = head.pop("bytes")
        if other := differing(head, self.head):
            raise OutputExists(f"output {self.path} was made with other {', '.join(other)}. Choose another place, or "
                               "on_exists='overwrite' (--on-exists)")
        if None in rows:
            raise FormatError(f"{beside(self.path, 'index')}, line {rows.index(None) + 2}: damaged record. Start "
                              "anew: on_exists='overwrite' (--on-exists overwrite)")
        self.rows = rows
        if rows: self.size = rows[-1]["bytes"]
        else:
            with atomic(self.path) as t: t.write_bytes(new_hdf5(self.head))
        if not self.path.exists() or self.path.stat().st_size < self.size:
            raise FormatError(f"{self.path}: shorter than its index says, or gone. Start anew: on_exists='overwrite'")

    def append(
        self,
        sample: Sample, # of the file's shape and type
    ) -> str: # key of its group
        "Add a sample; when this returns it will survive the death of this process"
        row = sample_row(sample, self.head["shape"], self.head["seg_dtype"])
        key = f"{self.head['first'] + len(self):06d}"
        try: line = self._stage(sample, key, row)
        except BaseException as e:
            _undo(self.path)
            if not (isinstance(e, OSError) and (code := _full(e))): raise
            raise DiskFull(code, f"no room to add sample {sample.id} to {self.path} ({os.strerror(code)}). The "
                           f"{len(self)} samples before it are intact; free some space and run again") from e
        self.rows.append(line)
        self.size = line["bytes"]
        return key

    def _stage(self, sample: Sample, key: str, row: dict[str, Any]) -> dict[str, Any]:
        import h5py
        undo, index = beside(self.path, "undo"), beside(self.path, "index")
        with _in_place(self.path, self.size) as file:
            stage = _Stage(file, self.size)
            with h5py.File(stage, "r+", **HDF5_FORMAT) as f:
                add_group(f, key, sample, self.head["compression"])
                f.flush()
                table = chunk_entries(f, key)
            pages = stage.changed()
            line = {"key": key, "bytes": stage.end, **row, **with_crc(file, table)}
            os.fsync(file.fileno())
            told = {"bytes": self.size, "index": index.stat().st_size,
                    "pages": [[offset, len(old)] for offset, (old, _) in pages.items()]}
            with atomic(undo) as t:
                t.write_bytes(sealed(told).encode() + b"\n" + b"".join(a for a, _ in pages.values()))
            for offset, (_, new) in pages.items(): _write_at(file.fileno(), new, offset)
            os.fsync(file.fileno())
        with _in_place(index, told["index"]) as f:
            _write_at(f.fileno(), sealed(line).encode() + b"\n", told["index"])
            os.fsync(f.fileno())
        undo.unlink()
        return line

# %% [markdown]
# Three samples, the process is killed in the fourth, and a second run goes on. The file is the same, byte by byte, as
# one that was written without interruption.

# %%
def fill(path, n, die_at=None):
    with PairFile(path, (16, 16, 16)) as f:
        for k in range(len(f), n):
            if k == die_at: os.kill(os.getpid(), signal.SIGKILL)
            f.append(toy(k))

with tmpdir() as d:
    fill(d/"straight.hdf5", 5)
    if not (child := os.fork()): fill(d/"killed.hdf5", 5, die_at=3)
    status = os.waitpid(child, 0)[1]
    with h5py.File(d/"killed.hdf5") as f: survivors = list(f)
    fill(d/"killed.hdf5", 5)
    same = (d/"killed.hdf5").read_bytes() == (d/"straight.hdf5").read_bytes()
    with h5py.File(d/"straight.hdf5") as f: read_back, shape = f["000004"]["img"][1], f["000004/seg"].shape
    with raises(OutputExists, match="made with other shape"):
        with PairFile(d/"straight.hdf5", (8, 8, 8)): pass
status, survivors, same, shape

# %%
assert status == signal.SIGKILL and survivors == ["000000", "000001", "000002"] and same
assert np.array_equal(read_back, toy(4).img[1])

