# %% [markdown]
# # Core
#
# > Errors, random streams, atomic writing, strict files, fingerprints and progress: what every page stands on.
#
# Research scripts fail in the same few ways. A job is killed and leaves half a file that the next run takes for a
# whole one. A result changes with the number of workers because all of them share one random generator. A typo in a
# JSON file is silently ignored. Two runs write to the same folder. This page holds the answer to each of these, once,
# so that no later page has to invent it again.

# %%
#| default_exp core

# %%
#| export
import contextlib
import csv
import ctypes
import errno
import fcntl
import hashlib
import importlib
import io
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np

# %%
import subprocess

# %% [markdown]
# ## Errors that say what, where and what to do
# Everything this library raises on purpose is a `MedvolError`. Each kind is also the Python error a caller would
# expect, so `except ValueError` keeps working. A message names what broke, where, and the next step.

# %%
#| export
log = logging.getLogger("medvol_nb")

# %%
#| export
class MedvolError(Exception):
    "Base of all errors raised on purpose by this library"

class ConfigError(MedvolError, ValueError):
    "A setting is wrong; the message lists every problem with its dotted key"

class DataError(MedvolError, ValueError):
    "Input data breaks a rule that the operation needs"

class FormatError(MedvolError, ValueError):
    "A file is damaged, truncated, or not of the format it claims"

class MissingFile(MedvolError, FileNotFoundError):
    "A file or folder that was named does not exist"

class OutputExists(MedvolError, FileExistsError):
    "The output is already there, or its place cannot be written"

class DiskFull(MedvolError, OSError):
    "No room left while writing; what was there before is intact"

class Locked(MedvolError, RuntimeError):
    "Another live process works on the same output"

class MissingExtra(MedvolError, ImportError):
    "An optional package is needed; the message holds the pip line"

# %% [markdown]
# Three small helpers keep the lesson cells short: `raises` for the errors a page wants to show, `close` for numbers,
# and `tmpdir` for a folder that goes away.

# %%
#| export
@contextlib.contextmanager
def raises(
    kind: type[BaseException], # expected exception class
    match: str = "", # regular expression the message must contain
) -> Iterator[None]:
    "Check that the block raises `kind`, used in lesson cells and tests"
    try: yield
    except kind as e:
        if not re.search(match, str(e)): raise AssertionError(f"message {str(e)!r} does not match {match!r}") from e
        return
    raise AssertionError(f"{kind.__name__} was not raised")

def close(
    a: Any, # array or number
    b: Any, # array or number of the same shape
    atol: float = 1e-6, # absolute tolerance, same unit as `a`
) -> bool: # all elements within `atol`
    "Compare arrays of equal shape with an absolute tolerance"
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and bool(np.all(np.abs(a.astype(np.float64) - b.astype(np.float64)) <= atol))

@contextlib.contextmanager
def tmpdir() -> Iterator[Path]: # an empty folder
    "A folder that is removed with its contents at the end of the block"
    with tempfile.TemporaryDirectory(prefix="medvol-") as folder: yield Path(folder)

# %%
with raises(ValueError, match="grid differs"):
    raise DataError("label grid differs from image grid by 4.7 mm (limit 0.3): case 'p017'. Resample the label.")
issubclass(DataError, ValueError), issubclass(MissingFile, FileNotFoundError), close([1, 2], [1, 2 + 1e-9])

# %%
with raises(AssertionError, match="not raised"):
    with raises(DataError): pass
assert close(1, 1) and not close([1, 2], [1, 2.1]) and not close([1], [1, 1])

# %% [markdown]
# ## Fingerprints
# Caches, sidecars and resumed jobs must know whether *the same thing* is asked for again. `fingerprint` turns any plain
# value, array or dataclass into a short stable hash. It depends on content alone: not on the order of a dictionary, on
# the process, or on the Python version. Types matter, so `1`, `1.0` and `"1"` differ. Of a `Path` only the name counts;
# `file_digest` reads the file.

# %%
#| export
def _feed(h, obj: Any) -> None:
    "Write a type-tagged, unambiguous encoding of `obj` into the hash `h`"
    def tag(kind: str, data: bytes = b"") -> None: h.update(f"{kind}:{len(data)}:".encode() + data)
    if hasattr(obj, "model_dump"): obj = obj.model_dump(mode="json")
    elif hasattr(obj, "__dataclass_fields__"): obj = {k: getattr(obj, k) for k in obj.__dataclass_fields__}
    if obj is None or isinstance(obj, (bool, np.bool_)): tag("lit", str(obj).encode())
    elif isinstance(obj, (int, np.integer)): tag("int", str(int(obj)).encode())
    elif isinstance(obj, (float, np.floating)): tag("float", float(obj).hex().encode())
    elif isinstance(obj, str): tag("str", obj.encode("utf-8", "surrogatepass"))
    elif isinstance(obj, (bytes, bytearray)): tag("bytes", bytes(obj))
    elif isinstance(obj, os.PathLike): tag("path", os.fspath(obj).encode("utf-8", "surrogateescape"))
    elif isinstance(obj, np.ndarray):
        if obj.dtype.hasobject: raise TypeError("fingerprint: object arrays have no stable content")
        tag("array", f"{obj.dtype.str}{obj.shape}".encode())
        h.update(np.ascontiguousarray(obj).data)
    elif isinstance(obj, Mapping):
        tag("map", str(len(obj)).encode())
        for k, v in sorted(((_digest(k), v) for k, v in obj.items()), key=lambda kv: kv[0]): tag("key", k); _feed(h, v)
    elif isinstance(obj, (set, frozenset)): tag("set", b"".join(sorted(_digest(v) for v in obj)))
    elif isinstance(obj, (list, tuple)):
        tag("seq", str(len(obj)).encode())
        for v in obj: _feed(h, v)
    elif hasattr(obj, "detach") and hasattr(obj, "numpy"): _feed(h, obj.detach().cpu().numpy())
    else: raise TypeError(f"fingerprint: no stable content for {type(obj).__name__}, pass plain values or arrays")

def _digest(obj: Any) -> bytes:
    h = hashlib.sha256()
    _feed(h, obj)
    return h.digest()

# %%
#| export
def fingerprint(
    obj: Any, # plain value, path (its name), array, dataclass, pydantic model or nesting of these
    length: int = 16, # hexadecimal digits kept
) -> str: # lower-case hexadecimal
    "Stable short hash of a value's content"
    return _digest(obj).hex()[:length]

def file_digest(
    path: str | os.PathLike, # existing file
    length: int = 16, # hexadecimal digits kept
) -> str: # lower-case hexadecimal of the SHA-256 of the bytes
    "Stable short hash of a file's bytes, read in blocks"
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()[:length]

# %%
fingerprint({"spacing": (1.0, 1.0, 3.0), "seed": 0}), fingerprint(np.arange(6).reshape(2, 3))

# %%
assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
assert len({fingerprint(v) for v in (1, 1.0, "1", True, [1], b"1", None)}) == 7
assert fingerprint(np.zeros((2, 3))) != fingerprint(np.zeros((3, 2)))
with raises(TypeError, match="no stable content"): fingerprint(object())

# %% [markdown]
# ## Randomness that belongs to the item
# A global generator makes the result depend on the order of calls, so the same seed gives other data with two workers
# than with one. Here a random stream has a *name* instead of a history: the seed plus the keys of the item. Whoever
# asks for the stream `(seed, "crop", epoch, index)` gets the same numbers, in any process, in any order. The keys are
# hashed into a `SeedSequence` and drive Philox, a counter-based generator (Salmon et al., *Parallel random numbers:
# as easy as 1, 2, 3*, SC 2011).

# %%
#| export
def seed_words(
    seed: int, # the run's seed, any integer >= 0
    *keys: int | str | float | bytes | tuple, # name of the stream: epoch, index, case id, purpose, ...
) -> tuple[int, ...]: # four 32-bit words
    "Entropy of the stream `(seed, *keys)`"
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise DataError(f"seed must be an integer >= 0, got {seed!r}")
    return tuple(int(w) for w in np.frombuffer(_digest((int(seed), keys))[:16], "<u4"))

def rng_for(
    seed: int, # the run's seed, any integer >= 0
    *keys: int | str | float | bytes | tuple, # name of the stream: epoch, index, case id, purpose, ...
) -> np.random.Generator: # independent of call order, worker and process
    "Random generator of the stream named `(seed, *keys)`"
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed_words(seed, *keys))))

# %%
[round(float(rng_for(0, "case", k).random()), 3) for k in (1, 2, 3, 1)]

# %%
assert rng_for(0, "a", 1).random() == rng_for(0, "a", 1).random()
assert len({rng_for(0, k).random() for k in (1, "1", (1,), b"1")}) == 4
draws = np.array([rng_for(7, i).random() for i in range(2000)])
assert abs(draws.mean() - 0.5) < 0.03 and abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.07

# %%
with raises(DataError, match="seed must be an integer"): rng_for(-1)

# %% [markdown]
# ## Who writes what, and what if it is there already
# One word decides in every function and command: `on_exists="error"`, `"skip"` or `"overwrite"`. The default is
# `"error"`. Jobs that can be resumed take `"skip"` and go on; the writers of this page, which stand at the end of
# functions that have asked already, take `"overwrite"`. `check_output` is asked before any work is done, so that a job
# never runs for an hour only to find its folder read-only.

# %%
#| export
OnExists = Literal["error", "skip", "overwrite"]

def check_output(
    path: str | os.PathLike, # file or folder to be written
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    inputs: Iterable[str | os.PathLike] = (), # files read by the same job; none of them may be the output
) -> bool: # True: go on and write, False: skip
    "Refuse an output place that cannot be written, before any work is done"
    path = Path(path)
    if on_exists not in ("error", "skip", "overwrite"):
        raise ConfigError(f"on_exists: must be 'error', 'skip' or 'overwrite', got {on_exists!r}")
    if "\0" in str(path): raise OutputExists(f"output {str(path)!r}: the name holds a NUL byte")
    if path.name in ("", ".."): raise OutputExists(f"output {str(path)!r}: does not name a file or folder to be made")
    parent = path.parent
    if not parent.exists():
        raise MissingFile(f"output {path}: folder {parent} does not exist. Create it: mkdir -p '{parent}'")
    if not parent.is_dir(): raise OutputExists(f"output {path}: {parent} is a file, not a folder")
    if path.is_symlink():
        raise OutputExists(f"output {path} is a symbolic link to {os.readlink(path)}. Name the real place instead")
    for i in inputs:
        real = os.path.realpath(path)
        if os.path.realpath(i) == real or (on_exists == "overwrite" and os.path.realpath(i).startswith(real + os.sep)):
            raise OutputExists(f"output {path} is also an input of this job. Inputs are never overwritten")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputExists(f"output {path}: no permission to write in {parent}")
    if not path.exists(): return True
    if on_exists == "skip": return False
    if on_exists == "overwrite": return True
    raise OutputExists(f"output {path} exists. Remove it, or choose on_exists='skip' or 'overwrite' (--on-exists)")

# %% [markdown]
# ## Atomic writing
# A reader must see the old file or the new one, never a half. `atomic` hands out a temporary sibling on the same
# disk, and only when the block ends without an error is it flushed to disk and renamed over the final name, in one
# step of the file system. The same goes for whole folders. If the process is killed the sibling stays behind; its
# name carries the process that owned it, so the next writer of that folder recognises it as dead and sweeps it away.
#
# Not every file system can swap two folders in one step; some network disks cannot. There the old folder steps aside
# under a name of its own before the new one takes its place. A process killed between the two leaves no folder, and
# the next writer puts the old one back.

# %%
#| export
_TEMP, _OLD = ".mvtmp-", ".mvold-" # what is being written; a folder that has stepped aside for its successor

def _process_token(pid: int | None = None) -> str | None:
    "Name of a living process that a later process with the same number does not share; None if it is dead"
    pid = os.getpid() if pid is None else pid
    try: stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self").exists(): return None
        try: os.kill(pid, 0)
        except ProcessLookupError: return None
        except PermissionError: pass
        return f"{pid}-0"
    except OSError: return f"{pid}-0"
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else f"{pid}-{fields[19]}"

def _host() -> str: return hashlib.sha1(os.uname().nodename.encode()).hexdigest()[:6]

def _is_dead(token: str) -> bool:
    "True if the owner `host-pid-start` ran on this host and is gone"
    host, pid, start = token.split("-")
    return host == _host() and _process_token(int(pid)) != f"{pid}-{start}"

def _temp_for(path: Path) -> Path:
    "A sibling of `path` that keeps its suffixes, for libraries that look at them"
    suffix = "".join(path.suffixes[-2:]) if len("".join(path.suffixes[-2:])) < 24 else ""
    return path.with_name(f"{_TEMP}{hashlib.sha1(path.name.encode()).hexdigest()[:8]}-{_host()}-{_process_token()}-"
                          f"{time.monotonic_ns() % 10**9}{suffix}")

def remove_tree(
    path: str | os.PathLike, # file or folder; nothing happens if it is absent
) -> None:
    "Remove a file or a whole folder, never following a symbolic link"
    path = Path(path)
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)

_until_sweep: dict[str, int] = {} # folder -> writes until it is looked at again: listing a large one costs too much

def sweep_temporary(
    folder: str | os.PathLike, # folder whose direct children are looked at
) -> list[str]: # names removed, or put back
    "Remove what killed writers left behind in `folder`, put back what had stepped aside; what live processes own stays"
    swept, names = [], os.listdir(folder)
    _until_sweep[os.fspath(folder)] = len(names)//16
    for p in (Path(folder)/n for n in names if n.startswith((_TEMP, _OLD))):
        owner = re.match(r"\.mv(?:tmp-[0-9a-f]{8}|old)-([0-9a-f]{6}-\d+-\d+)-(.+)", p.name, re.DOTALL)
        if not owner or not _is_dead(owner[1]): continue
        with contextlib.suppress(OSError): # another process may be sweeping, too
            if p.name.startswith(_OLD) and not p.with_name(owner[2]).exists(): os.rename(p, p.with_name(owner[2]))
            else: remove_tree(p)
            swept.append(p.name)
    return sorted(swept)

def _sweep_now_and_then(folder: Path) -> None:
    "Before a write into `folder`: sweep it at the first one, and then the more rarely the more it holds"
    _until_sweep[str(folder)] = _until_sweep.get(str(folder), 0) - 1
    if _until_sweep[str(folder)] < 0: sweep_temporary(folder)

# %%
#| export
def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try: os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP): raise
    finally: os.close(fd)

def _exchange(a: Path, b: Path) -> bool:
    "Swap two names in one step; False where the system cannot (only Linux can, on most file systems)"
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return swap is not None and swap(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0

def _publish(temp: Path, path: Path, sync: bool) -> None:
    "Move the finished `temp` to its final name and make the move durable"
    if temp.is_dir():
        if sync:
            for p in [*sorted(temp.rglob("*")), temp]:
                if not p.is_symlink(): _fsync(p)
        if not path.exists(): os.rename(temp, path)
        elif _exchange(temp, path): remove_tree(temp)
        else:
            old = path.with_name(f"{_OLD}{_host()}-{_process_token()}-{path.name}")
            os.rename(path, old)
            try: os.rename(temp, path)
            except BaseException:
                os.rename(old, path)
                raise
            remove_tree(old)
    else:
        if sync: _fsync(temp)
        os.replace(temp, path)
    if sync: _fsync(path.parent)

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

def _full(e: Exception) -> int:
    "Error number if `e` means that there is no room, in the words of Python, HDF5, Rust or NumPy; 0 otherwise"
    if isinstance(e, MedvolError): return 0
    if isinstance(e, OSError) and e.errno is not None: return e.errno if e.errno in _FULL else 0
    said = re.search(r"(?:errno =|os error) (\d+)|requested and \d+ written", str(e))
    code = int(said[1] or errno.ENOSPC) if said else 0
    return code if code in _FULL else 0

@contextlib.contextmanager
def atomic(
    path: str | os.PathLike, # final name
    on_exists: OnExists = "overwrite", # checked before the block starts; "skip" is the caller's business
    *,
    folder: bool = False, # True: the block fills a new folder instead of a file
    sync: bool = True, # False: leave flushing to the system (caches that can be made again)
) -> Iterator[Path]: # temporary name to write to
    "Write so that readers and crashes see the old output or the new one, never a part"
    path = Path(path)
    check_output(path, on_exists)
    if path.exists() and path.is_dir() != folder:
        there, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise OutputExists(f"output {path} is a {there}, a {wanted} was to be written there. Choose another name")
    _sweep_now_and_then(path.parent)
    temp = _temp_for(path)
    try:
        if folder: temp.mkdir()
        yield temp
        if not temp.exists(): raise MedvolError(f"nothing was written for {path}")
        _publish(temp, path, sync)
    except Exception as e:
        if not (code := _full(e)): raise
        done = sum(p.stat().st_size for p in ([temp, *temp.rglob("*")] if temp.exists() else []) if p.is_file())
        free = shutil.disk_usage(path.parent).free
        raise DiskFull(code, f"no room for {path}: stopped after {human_bytes(done)}, {human_bytes(free)} free "
                       f"({os.strerror(code)}). What was there before is intact; free some space and run again") from e
    finally:
        if temp.exists(): remove_tree(temp)

# %%
#| export
def human_bytes(
    n: float, # [byte]
) -> str: # such as '3.2 MiB'
    "A size a person can read"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB": break
        n /= 1024
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"

def human_time(
    seconds: float, # [s]
) -> str: # such as '2 min 05 s'
    "A duration a person can read"
    if seconds < 10: return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {s:02d} s" if minutes else f"{s} s"

# %% [markdown]
# An error inside the block leaves the old content untouched and no litter:

# %%
with tmpdir() as d:
    with atomic(d/"scores.txt") as t: t.write_text("first")
    with contextlib.suppress(ZeroDivisionError):
        with atomic(d/"scores.txt") as t:
            t.write_text("half of the second")
            1/0
    result = (d/"scores.txt").read_text(), os.listdir(d)
result

# %%
assert result == ("first", ["scores.txt"])
assert human_bytes(3.25*2**20) == "3.2 MiB" and human_time(125) == "2 min 05 s" and human_time(3.21) == "3.2 s"

# %% [markdown]
# What about `kill -9`? The process below dies in the middle of writing. Its litter stays until the next writer comes.

# %%
killed = """
import os, signal, sys
from medvol_nb.core import atomic
with atomic(sys.argv[1]) as t:
    t.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
with tmpdir() as d:
    (d/"x.json").write_text("old")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", killed, str(d/"x.json")], env=env)
    litter, content = len(os.listdir(d)) - 1, (d/"x.json").read_text()
    with atomic(d/"x.json") as t: t.write_text("new")
    after = sorted(os.listdir(d))
litter, content, after

# %%
assert (litter, content, after) == (1, "old", ["x.json"])

# %%
with tmpdir() as d:
    with raises(MissingFile, match="mkdir -p"): check_output(d/"absent"/"x.nii.gz")
    (d/"x").write_text("")
    with raises(OutputExists, match="--on-exists"): check_output(d/"x")
    with raises(OutputExists, match="never overwritten"): check_output(d/"x", "overwrite", inputs=[d/"x"])
    assert not check_output(d/"x", "skip") and check_output(d/"x", "overwrite")

# %% [markdown]
# ## One writer at a time
# Two processes that resume the same output would tread on each other. `lock` leaves a small file with the owner's host,
# process number and start time. A second process is refused while the owner lives; the lock of a dead owner is broken.

# %%
#| export
def _owner(file: Path) -> str: return file.read_text(encoding="utf-8", errors="replace")

def _break_dead(file: Path) -> bool:
    "Remove the lock of a dead owner; looking and removing is one step, or two breakers would remove a living lock"
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError): fcntl.flock(folder, fcntl.LOCK_EX) # not every network file system can
        with contextlib.suppress(FileNotFoundError):
            owner = _owner(file)
            if not re.fullmatch(r"[0-9a-f]{6}-\d+-\d+", owner) or not _is_dead(owner): return False
            file.unlink()
        return True
    finally: os.close(folder)

@contextlib.contextmanager
def lock(
    path: str | os.PathLike, # the output that is being worked on; the lock is its sibling '<name>.lock'
) -> Iterator[Path]: # the lock file
    "Hold `path` for this process alone; the lock of a dead process is broken, a live one raises `Locked`"
    file = Path(path).with_name(Path(path).name + ".lock")
    mine = f"{_host()}-{_process_token()}"
    check_output(file, "overwrite")
    _sweep_now_and_then(file.parent)
    for _ in range(20):
        temp = _temp_for(file)
        try:
            temp.write_text(mine)
            os.link(temp, file)
            break
        except FileExistsError:
            if _break_dead(file): continue
            try: owner = _owner(file)
            except FileNotFoundError: continue
            raise Locked(f"{path} is in use by another process (owner {owner}). Wait for it; if it ran on a machine "
                         f"that is gone, remove {file}") from None
        finally: temp.unlink(missing_ok=True)
    else: raise Locked(f"{path}: could not take {file}, it changes hands all the time")
    try: yield file
    finally: file.unlink(missing_ok=True)

# %%
with tmpdir() as d:
    with lock(d/"run"):
        with raises(Locked, match="in use by another process"):
            with lock(d/"run"): pass
    (d/"run.lock").write_text(f"{_host()}-999999999-1")
    with lock(d/"run") as held: names = os.listdir(d)
    assert names == ["run.lock"] and not held.exists()
names

# %% [markdown]
# ## Journals
# What is done must be remembered even if the process is killed the next moment. A journal is a text file that only
# grows, a line at a time. Each line reaches the system at once, so it survives the process; the disk gets what has come
# with the first line after a second, so a power cut takes the latest lines only. A line torn by a crash is closed off,
# so that it can be recognised and dropped.

# %%
#| export
class Journal:
    "Append-only text file that survives the death of its writer"
    def __init__(
        self,
        path: str | os.PathLike, # file; created if absent, continued otherwise
    ):
        self.path, self._synced, self._torn = Path(path), 0.0, False
        self._file = open(self.path, "ab", buffering=0)
        if self._file.tell():
            with open(self.path, "rb") as f:
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n": self._file.write(b"\n")

    def append(
        self,
        line: str, # text without a newline
    ) -> None:
        "Add one line"
        rest = memoryview((b"\n" if self._torn else b"") + line.encode("utf-8") + b"\n")
        try:
            self._torn = True
            while rest: rest = rest[self._file.write(rest):]
            self._torn = False
        except OSError as e:
            if not (code := _full(e)): raise
            raise DiskFull(code, f"no room to go on with {self.path} ({os.strerror(code)}). What is recorded there is "
                           "intact; free some space and run again") from e
        if time.monotonic() - self._synced > 1: self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        "Bring everything to disk and close the file"
        if self._file.closed: return
        self._sync()
        self._file.close()

    def __enter__(self) -> "Journal": return self
    def __exit__(self, *exc) -> None: self.close()

# %%
with tmpdir() as d:
    with Journal(d/"done.txt") as j: j.append("case 1")
    with open(d/"done.txt", "ab") as f: f.write(b"case 2, torn by a cra")
    with Journal(d/"done.txt") as j: j.append("case 3")
    lines = (d/"done.txt").read_text().splitlines()
lines

# %%
assert lines == ["case 1", "case 2, torn by a cra", "case 3"]

# %% [markdown]
# ## Strict JSON and CSV
# Python's JSON reader accepts `NaN`, keeps the last of two equal keys, and dies with a recursion error on a deeply
# nested file. A data list is an input from outside, so `read_json` refuses all three, names the line of a slip in the
# syntax, and reads no more than a stated number of bytes. `write_json` writes the same bytes for the same value.

# %%
#| export
def _read_text(path: str | os.PathLike, max_bytes: int) -> str:
    "UTF-8 text of a file of bounded size, with errors that name the place"
    try: about = os.stat(path)
    except (OSError, ValueError) as e: # ValueError: a name with a NUL byte
        if getattr(e, "errno", None) not in (None, errno.ENOENT, errno.ENOTDIR, errno.ELOOP): raise
        raise MissingFile(f"{path} does not exist") from None
    if not stat.S_ISREG(about.st_mode): raise FormatError(f"{path} is not a file")
    if about.st_size > max_bytes:
        raise FormatError(f"{path}: {human_bytes(about.st_size)}, at most {human_bytes(max_bytes)} are allowed here "
                          "(max_bytes)")
    with open(path, "rb") as f: raw = f.read()
    try: return raw.decode("utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as e:
        line = raw[:e.start].count(b"\n") + 1
        raise FormatError(f"{path}, line {line}: byte 0x{raw[e.start]:02x} is not UTF-8 text") from None

def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"key {next(k for k, _ in pairs if k in seen or seen.add(k))!r} appears twice in one object")
    return out

def _constant(name: str) -> None: raise ValueError(f"{name} is not a JSON number")

def _finite(text: str) -> float:
    if math.isinf(value := float(text)): raise ValueError(f"{text} is beyond the range of floating point numbers")
    return value

def parse_json(
    text: str, # JSON document
    where: str = "JSON", # name used in errors
) -> Any: # plain values
    "Parse strict JSON: duplicate keys, NaN and Infinity are errors"
    try: return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_pairs, parse_constant=_constant,
                           parse_float=_finite)
    except json.JSONDecodeError as e:
        raise FormatError(f"{where}, line {e.lineno}, column {e.colno}: {e.msg}") from None
    except RecursionError: raise FormatError(f"{where}: nested too deeply") from None
    except ValueError as e: raise FormatError(f"{where}: {e}") from None

def read_json(
    path: str | os.PathLike, # existing file
    max_bytes: int = 2**29, # refuse larger files [byte]
) -> Any: # plain values
    "Read a strict JSON file: duplicate keys, NaN and Infinity are errors"
    return parse_json(_read_text(path, max_bytes), str(path))

# %%
#| export
def plain(
    obj: Any, # numpy scalars and arrays, paths, dataclasses, models, sets or nestings of these
) -> Any: # dict, list, str, int, float, bool, None
    "Turn a value into what JSON can hold, exactly or not at all"
    if hasattr(obj, "model_dump"): return obj.model_dump(mode="json")
    if hasattr(obj, "__dataclass_fields__"): return {k: plain(getattr(obj, k)) for k in obj.__dataclass_fields__}
    if isinstance(obj, Mapping):
        out = {str(k): plain(v) for k, v in obj.items()}
        if len(out) < len(obj): raise TypeError(f"keys {list(obj)[:8]} are not distinct as JSON strings")
        return out
    if isinstance(obj, (set, frozenset)): return sorted(plain(v) for v in obj)
    if isinstance(obj, (list, tuple)): return [plain(v) for v in obj]
    if isinstance(obj, np.ndarray): return plain(obj.tolist())
    if isinstance(obj, np.generic): return obj.item()
    if isinstance(obj, os.PathLike): return os.fspath(obj)
    if obj is None or isinstance(obj, (bool, int, float, str)): return obj
    raise TypeError(f"{type(obj).__name__} has no JSON form")

def to_json(
    obj: Any, # anything `plain` accepts
    indent: int | None = 2, # spaces a level; None for one line
) -> str: # ends without a newline
    "JSON text of a value, the same bytes for the same value"
    try:
        text = json.dumps(plain(obj), indent=indent, ensure_ascii=False, allow_nan=False)
        if not re.search("[\ud800-\udfff]", text): return text
        return json.dumps(plain(obj), indent=indent, allow_nan=False) # file names that are not UTF-8 need escapes
    except ValueError as e: raise DataError(f"not written as JSON, which has no NaN or Infinity: {e}") from None

def write_text(
    path: str | os.PathLike, # file to write
    text: str, # content, written as UTF-8 with \n line ends
    on_exists: OnExists = "overwrite", # what to do when `path` is there already
) -> Path: # `path`
    "Write a text file atomically"
    if not check_output(path, on_exists): return Path(path)
    with atomic(path) as t: t.write_bytes(text.encode("utf-8"))
    return Path(path)

def write_json(
    path: str | os.PathLike, # file to write
    obj: Any, # anything `plain` accepts; key order is kept
    on_exists: OnExists = "overwrite", # what to do when `path` is there already
    indent: int | None = 2, # spaces a level; None for one line
) -> Path: # `path`
    "Write a JSON file atomically"
    return write_text(path, to_json(obj, indent) + "\n", on_exists)

# %%
#| export
def read_csv(
    path: str | os.PathLike, # existing file with a header line
    columns: Sequence[str] = (), # columns that must be there
    max_bytes: int = 2**29, # refuse larger files [byte]
) -> list[dict[str, str]]: # one dict of strings a row
    "Read a CSV table with a header; repeated column names, and rows of another length than the header, are errors"
    text = _read_text(path, max_bytes)
    if "\0" in text: raise FormatError(f"{path}: holds NUL bytes, this is not a text table")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try: header = [h.strip() for h in next(reader)]
    except StopIteration: raise FormatError(f"{path}: empty, a header line is needed") from None
    except csv.Error as e: raise FormatError(f"{path}, line 1: {e}") from None
    if len(set(header)) < len(header): raise FormatError(f"{path}: a column name appears twice in {header}")
    if lacking := [c for c in columns if c not in header]:
        raise FormatError(f"{path}: columns {lacking} are missing, found {header}")
    rows = []
    try:
        for row in reader:
            if not row: continue
            if len(row) != len(header):
                raise FormatError(f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(header)}")
            rows.append(dict(zip(header, row)))
    except csv.Error as e: raise FormatError(f"{path}, line {reader.line_num}: {e}") from None
    return rows

def write_csv(
    path: str | os.PathLike, # file to write
    rows: Iterable[Mapping[str, Any]], # all with the same keys
    columns: Sequence[str] | None = None, # order of columns; default: keys of the first row
    on_exists: OnExists = "overwrite", # what to do when `path` is there already
) -> Path: # `path`
    "Write a CSV table atomically"
    rows = list(rows)
    columns = list(columns if columns is not None else rows[0] if rows else ())
    texts = [str(v) for row in [columns, *(r.values() for r in rows)] for v in row]
    if any("\0" in t for t in texts): raise DataError(f"{path}: a text with a NUL byte cannot be written as CSV")
    quoting = csv.QUOTE_ALL if any("\r" in t for t in texts) else csv.QUOTE_MINIMAL # a bare \r is not quoted otherwise
    if not check_output(path, on_exists): return Path(path)
    with atomic(path) as t, open(t, "w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, columns, lineterminator="\n", extrasaction="raise", quoting=quoting)
        w.writeheader()
        w.writerows(rows)
    return Path(path)

# %%
with tmpdir() as d:
    write_json(d/"list.json", {"training": [{"image": Path("a.nii.gz"), "fold": np.int64(0)}]})
    write_csv(d/"t.csv", [{"case": "p1", "mL": 1.5}, {"case": "p2, left", "mL": 2}])
    text, table = (d/"list.json").read_text(), read_csv(d/"t.csv", columns=["case"])
print(text)
table

# %%
assert parse_json(text)["training"][0] == {"image": "a.nii.gz", "fold": 0} and table[1]["case"] == "p2, left"

# %%
with raises(FormatError, match="'fold' appears twice"): parse_json('{"fold": 0, "fold": 1}')
with raises(FormatError, match="NaN is not"): parse_json('{"a": NaN}')
with raises(FormatError, match="nested too deeply"): parse_json("["*100_000)
with raises(FormatError, match="case.json, line 2, column 8"): parse_json('{"a": 1,\n "fold"}', "case.json")
with raises(DataError, match="no NaN"): to_json({"a": float("nan")})

# %% [markdown]
# ## Paths that stay inside
# Lists, archives and configurations from elsewhere name files. `inside` joins such a name to its root and refuses what
# would leave it: `..`, absolute names, drive letters, addresses, home shortcuts, control characters, and symbolic links
# that point out.

# %%
#| export
def inside(
    root: str | os.PathLike, # folder that must not be left
    name: str, # relative name with forward slashes, from an untrusted source
    *,
    absolute: bool = False, # allow absolute names, for users who asked for it
) -> Path: # joined path
    "Join `name` to `root`, or refuse it if it leads outside"
    def refuse(why: str) -> None: raise DataError(f"path {name!r}: {why}. Names are relative to {root}")
    if not isinstance(name, str) or not name: refuse("not a non-empty string")
    if any(ord(c) < 32 or ord(c) == 127 for c in name): refuse("holds control characters")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name): refuse("is an address, not a file")
    if name.startswith("~"): refuse("starts with '~'")
    if "\\" in name or PureWindowsPath(name).drive: refuse("is a Windows path")
    pure = PurePosixPath(name)
    if pure.is_absolute():
        if absolute: return Path(name)
        refuse("is absolute, and absolute names were not allowed")
    if ".." in pure.parts: refuse("holds '..'")
    full = Path(root)/pure
    top = os.path.realpath(root)
    if os.path.commonpath([top, os.path.realpath(full)]) != top: refuse("leaves the folder through a symbolic link")
    return full

# %%
inside("data", "imagesTr/case_001.nii.gz").as_posix()

# %%
for bad in ("../x", "/etc/passwd", "a/../../x", "~/x", "C:/x", "a\\b", "http://h/x", "a\0b", ""):
    with raises(DataError, match="path"): inside("data", bad)
assert inside("data", "/abs/x.nii", absolute=True) == Path("/abs/x.nii")

# %% [markdown]
# ## Progress and optional packages
# `progress` is a bar where somebody looks (a terminal, a notebook), one log line every ten percent (at most one a
# second) where nobody does, and silent in tests. `optional` imports a package that belongs to an extra, or says which
# pip line brings it.

# %%
#| export
def is_quiet() -> bool: # no progress wanted
    "True in tests and when MEDVOL_QUIET is set"
    return any(os.environ.get(k) for k in ("MEDVOL_QUIET", "IN_TEST", "PYTEST_CURRENT_TEST"))

def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")

def progress(
    iterable: Iterable, # what to go through
    desc: str = "", # what is being done
    total: int | None = None, # number of items, if it cannot be asked
    unit: str = "it", # what an item is
) -> Iterator: # the items
    "Go through `iterable` and show how far it is"
    if total is None and hasattr(iterable, "__len__"): total = len(iterable)
    if is_quiet():
        yield from iterable
    elif sys.stderr.isatty() or _in_notebook():
        from tqdm.auto import tqdm
        yield from tqdm(iterable, desc=desc, total=total, unit=unit, leave=False)
    else:
        start = last = time.monotonic()
        told = 0
        for n, item in enumerate(iterable, 1):
            yield item
            if total and n*10//total > told and time.monotonic() - last > 1:
                told, last = n*10//total, time.monotonic()
                log.info("%s: %d of %d %s, %s", desc, n, total, unit, human_time(time.monotonic() - start))

def optional(
    name: str, # module to import, dots allowed
    extra: str, # extra of this library that brings it
) -> Any: # the module
    "Import an optional package, or say how to install it"
    try: return importlib.import_module(name)
    except ImportError as e:
        if isinstance(e, ModuleNotFoundError) and e.name and name.split(".")[0] == e.name.split(".")[0]:
            raise MissingExtra(f"{name} needs the `{extra}` extra: pip install 'medvol_nb[{extra}]'") from None
        raise MissingExtra(f"package {name} is installed but does not import: {e}. Run `medvol doctor`, or install the "
                           f"tested versions again: pip install 'medvol_nb[{extra}]'") from e

@lru_cache
def compiled(
    f: Callable, # plain Python loop over arrays
    error_model: str = "python", # or "numpy": a division by zero gives inf, and no test for it
) -> Callable: # the same, compiled at its first call and kept for later processes
    "Compile a function with numba (extra `fast`)"
    numba, how = optional("numba", "fast"), {"nogil": True, "error_model": error_model}
    try: return numba.njit(f, cache=True, **how)
    except RuntimeError: return numba.njit(f, **how) # no place for a cache

# %%
list(progress(range(4), desc="demo"))

# %%
with raises(MissingExtra, match=r"pip install 'medvol_nb\[gen\]'"): optional("no_such_package", extra="gen")
assert optional("math", extra="x") is math
