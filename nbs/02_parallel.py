# %% [markdown]
# # Parallel maps and resumable jobs
#
# > `pmap` runs one function over many items and survives what happens to some of them; `Ledger` remembers what is done.
#
# Ten thousand scans go through the same function. One file is broken, one takes all the memory so that the system
# kills its process, one never ends. With a plain pool the first ends the run, the second loses everything in flight,
# and the third hangs it. The map on this page is a thin layer over [joblib](https://joblib.readthedocs.io), whose
# loky processes accept functions defined in a notebook. It adds what such jobs need: results in order, errors
# collected with their item, a killed item retried alone in a fresh process and then set aside, time limits, and a
# ledger from which an interrupted job goes on.

# %%
#| default_exp parallel

# %%
#| export
import contextlib
import faulthandler
import importlib
import json
import math
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal

from medvol_nb.core import (ConfigError, DataError, FormatError, Journal, MedvolError, MissingFile, OnExists, atomic,
                            check_output, file_digest, fingerprint, lock, log, optional, parse_json, plain, progress,
                            to_json)

# %%
import signal

from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## How many processors are really ours
# In a container or on a cluster the machine's core count is not the share we may use.

# %%
#| export
def cpu_count() -> int: # processors this process may use, at least 1
    "Processors after CPU affinity and control-group limits"
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError, IndexError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max": n = min(n, max(1, int(int(quota)/int(period) + 0.5)))
    return n

# %%
cpu_count()

# %% [markdown]
# ## What a worker leaves behind when it dies
# A process that is killed cannot say what it was working on. So each worker notes in a shared byte map, one byte an
# item, that an item was started. After a crash the marked items are the suspects: they are run again, each alone in a
# fresh process, while all others go on in a new pool. An innocent item passes this second try; the guilty one is
# retried and then set aside, and the run goes on without it.

# %%
#| export
@dataclass(frozen=True)
class Failure:
    "What happened to an item that gave no result"
    index: int # position in the list of items
    key: str # name of the item
    kind: Literal["error", "killed", "timeout"] # raised an exception, lost its process, ran out of time
    error: str # one line: type and message
    trace: str = "" # traceback, if there is one

class BatchError(MedvolError, RuntimeError):
    "Some items of a job failed; the others finished"
    def __init__(
        self,
        failures: Sequence[Failure], # what failed, in the order of items
        values: Sequence[Any], # results in the order of items, None where there is none
        total: int, # number of items
    ):
        self.failures, self.values, self.total = list(failures), list(values), total
        lines = [f"{f.key}: {f.error}" for f in self.failures]
        shown = "\n  ".join(lines[:10] + ([f"... and {len(lines) - 10} more"] if len(lines) > 10 else []))
        super().__init__(f"{len(lines)} of {total} items failed:\n  {shown}")
    def __reduce__(self): return type(self), (self.failures, self.values, self.total)

# %%
#| export
_STARTED, _DONE, _TIMEOUT = 1, 2, 3

def _mark(path: str, index: int, state: int) -> None:
    "Write the state of an item into the shared byte map; survives the death of this process, and threads may do it"
    with contextlib.suppress(FileNotFoundError): # the run is over
        fd = os.open(path, os.O_WRONLY)
        try: os.pwrite(fd, bytes([state]), index)
        finally: os.close(fd)

def _on_time(path: str, index: int, limit: float) -> threading.Timer:
    "Clock that marks the item and ends the process if the item takes longer than `limit`"
    def over() -> None:
        _mark(path, index, _TIMEOUT)
        os._exit(1)
    timer = threading.Timer(limit, over)
    timer.daemon = True
    timer.start()
    return timer

def _run_one(f: Callable, item: Any, index: int, marks: str | None, timeout: float | None) -> tuple[int, bool, Any]:
    "Run one item in a worker; exceptions come back as text so that they always travel"
    timer = None
    try:
        if marks is not None: _mark(marks, index, _STARTED)
        if timeout is not None:
            timer = _on_time(marks, index, timeout)
            faulthandler.dump_traceback_later(timeout + 5, exit=True, file=open(os.devnull, "w"))
        value = f(item)
        return index, True, value
    except Exception as e:
        return index, False, ("error", f"{type(e).__name__}: {e}", traceback.format_exc())
    finally:
        if timer is not None: timer.cancel(); faulthandler.cancel_dump_traceback_later()
        if marks is not None: _mark(marks, index, _DONE)

# %%
#| export
def _is_elsewhere() -> tuple[bool, int]:
    "Whether `joblib.parallel_config` moved the work to another back end, such as a Dask cluster"
    from joblib.parallel import get_active_backend
    backend, n_jobs = get_active_backend()
    return type(backend).__name__ not in ("LokyBackend", "SequentialBackend", "ThreadingBackend"), n_jobs

_loads = ForkingPickler.loads # between our own processes only, as multiprocessing itself does; never for files

def _pack(value: Any) -> bytes | str:
    "What travels to a worker, or why it cannot"
    from joblib.externals.loky.backend.reduction import dumps # cloudpickle's, the one that joblib uses
    try: return bytes(dumps(value))
    except Exception as e: return f"{type(e).__name__}: {e}"

def _run_packed(f: bytes, item: bytes | str, index: int, marks: str | None, timeout: float | None
                ) -> tuple[int, bool, Any]:
    "Run one item elsewhere: pickling is part of its work, so that what does not pickle is an error of this item alone"
    if marks is not None: _mark(marks, index, _STARTED)
    def load() -> tuple[Callable, Any]: # imports count as start-up, not as time of the item
        if isinstance(item, str): raise TypeError(f"the item cannot be sent to a process ({item})")
        return _loads(f), _loads(item)
    _, ok, loaded = _run_one(lambda _: load(), None, index, None, None)
    def work(given: Any) -> bytes:
        out = _pack(loaded[0](given))
        if isinstance(out, str): raise TypeError(f"the result cannot be sent back from a process ({out})")
        return out
    if ok: return _run_one(work, loaded[1], index, marks, timeout)
    if marks is not None: _mark(marks, index, _DONE)
    return index, False, loaded

def _unpacked(index: int, ok: bool, value: Any) -> tuple[int, bool, Any]:
    if not ok: return index, ok, value
    try: return index, True, _loads(value)
    except Exception as e:
        why = f"the result cannot be unpickled ({type(e).__name__}: {e})"
        return index, False, ("error", why, traceback.format_exc())

def _pool(f: bytes, todo: Iterator[tuple[int, bytes | str]], n_jobs: int, marks: str | None, timeout: float | None
          ) -> Iterator[tuple[int, bool, Any]]:
    "Results of one joblib run as they come"
    from joblib import Parallel, delayed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
        # joblib runs a single job in this very process; two of which one waits are one worker
        one = {"n_jobs": 2, "pre_dispatch": 1} if n_jobs == 1 else {"n_jobs": n_jobs}
        run = Parallel(**one, return_as="generator_unordered", max_nbytes=None)
        for index, ok, value in run(delayed(_run_packed)(f, item, i, marks, timeout) for i, item in todo):
            yield _unpacked(index, ok, value)

def _run_there(folder: str, f: bytes, item: bytes | str, index: int) -> tuple[int, bool, Any]:
    "Run one item on a cluster, in the caller's folder if the worker has it: relative paths mean the same as at home"
    with contextlib.chdir(folder) if os.path.isdir(folder) else contextlib.nullcontext():
        return _run_packed(f, item, index, None, None)

def _cluster(client: Any, f: bytes, items: Sequence) -> Iterator[tuple[int, bool, Any]]:
    "Results from the workers of a Dask client; joblib would wait for ever for a task that killed its workers"
    from distributed import as_completed
    todo, alone, running, waiting = list(range(len(items)))[::-1], [], {}, as_completed()
    room, asked = 0, -math.inf # tasks in flight: two a thread. Workers come and go, but to ask for each task is slow
    def submit(i: int) -> None:
        future = client.submit(_run_there, os.getcwd(), f, _pack(items[i]), i, pure=False)
        running[future] = i
        waiting.add(future)
    try:
        while todo or alone or running:
            if time.monotonic() - asked > 1:
                room, asked = max(2, 2*sum(client.ncores().values())), time.monotonic()
            while todo and len(running) < room: submit(todo.pop())
            company = bool(running)
            if not company: submit(alone.pop())
            future = next(waiting)
            i = running.pop(future)
            if future.status == "finished": yield _unpacked(*future.result())
            elif company: alone.append(i) # perhaps innocent, and only near to one that kills its workers
            else: yield i, False, ("killed", "its workers were lost again and again")
    finally: client.cancel(list(running))

def _end_pool() -> None:
    "Stop idle workers where nobody else would: a child process of multiprocessing waits for its own children at exit"
    if multiprocessing.parent_process() is None or _is_elsewhere()[0]: return
    from joblib.externals.loky import get_reusable_executor
    executor = get_reusable_executor()
    getattr(executor, "terminate", executor.shutdown)(kill_workers=True)

def _lost_a_worker(e: BaseException) -> bool:
    "Errors that mean: a process died, not: the function raised"
    names = {c.__name__ for c in type(e).__mro__}
    return bool(names & {"TerminatedWorkerError", "BrokenProcessPool", "KilledWorker", "BrokenExecutor"})

def _stream(f: Callable, items: Sequence, workers: int, retries: int, timeout: float | None
            ) -> Iterator[tuple[int, bool, Any]]:
    "Run all items in processes, whatever happens to some of them; yields as they finish"
    elsewhere, n_jobs = _is_elsewhere()
    packed = _pack(f)
    if isinstance(packed, str): raise TypeError(f"pmap: the function cannot be sent to a process ({packed})")
    from joblib.parallel import get_active_backend
    if (client := getattr(get_active_backend()[0], "client", None)) is not None:
        yield from _cluster(client, packed, items)
        return
    fd, marks = tempfile.mkstemp(prefix="medvol-marks-")
    os.write(fd, bytes(max(1, len(items))))
    os.close(fd)
    left, deaths, alone = set(range(len(items))), dict.fromkeys(range(len(items)), 0), []
    stalled = 0 # crashes in a row for which no running item can be blamed
    try:
        while left:
            group = [alone.pop()] if alone else sorted(left)
            jobs = n_jobs if elsewhere else 1 if len(group) == 1 else workers
            try:
                for i, ok, value in _pool(packed, ((i, _pack(items[i])) for i in group), jobs,
                                          None if elsewhere else marks, timeout):
                    left.discard(i)
                    yield i, ok, value
                continue
            except Exception as e:
                if not _lost_a_worker(e): raise
            states = Path(marks).read_bytes()
            lost = [i for i in group if i in left]
            suspects = [i for i in lost if elsewhere or states[i] in (_STARTED, _TIMEOUT)]
            stalled = 0 if suspects else stalled + 1
            if stalled > 2 or (stalled and len(group) == 1): suspects = lost # no item was running: any can be the cause
            for i in suspects:
                if len(group) == 1 or states[i] == _TIMEOUT: deaths[i] += 1
                if deaths[i] > retries or (states[i] == _TIMEOUT and deaths[i] > 1):
                    left.discard(i)
                    why = f"took longer than {timeout:g} s" if states[i] == _TIMEOUT else "its process was killed"
                    yield i, False, ("timeout" if states[i] == _TIMEOUT else "killed", f"{why}, {deaths[i]} times")
                else: alone.append(i)
            with open(marks, "r+b") as fh: fh.write(bytes(len(items)))
            log.warning("a worker process died; %d items are tried again one by one", len(alone))
    finally:
        os.unlink(marks)
        _end_pool()

# %% [markdown]
# ## The map
# `workers=0` runs in this process: the same results, easy to debug. The function sees only its item, so results cannot
# depend on the number of workers; a function that needs chance asks `rng_for(seed, key)`.

# %%
#| export
def pmap(
    f: Callable[[Any], Any], # what to do with one item; may be defined in a notebook
    items: Sequence, # what to work on
    workers: int = 0, # processes; 0: in this process, -1: one per processor
    *,
    keys: Sequence[str] | None = None, # names of the items for messages and ledger; default: their text form
    desc: str = "", # shown beside the progress bar
    errors: Literal["raise", "collect"] = "raise", # after all items ran: raise a BatchError, or return the failures
    ledger: "Ledger | None" = None, # skip items it knows as done and record the others (values must be plain)
    retries: int = 2, # how often an item whose process died is tried again, alone; on a cluster the scheduler decides
    timeout: float | None = None, # [s] an item may take; needs workers != 0, on this machine
) -> Any: # list of values in the order of items; with errors="collect" the pair (values, failures)
    "Apply `f` to every item, in order, surviving errors, killed processes and hangs of single items"
    items = list(items)
    names = [str(i) for i in items] if keys is None else [str(k) for k in keys]
    if len(names) != len(items): raise DataError(f"pmap: {len(items)} items but {len(names)} keys")
    if ledger is not None and len(set(names)) < len(names): raise DataError("pmap: keys must be unique to be resumed")
    if workers < -1: raise ConfigError(f"workers: must be -1, 0 or a number of processes, got {workers}")
    if timeout is not None and workers == 0: raise ConfigError("timeout: needs workers >= 1, to have a process to end")
    if timeout is not None and _is_elsewhere()[0]:
        raise ConfigError("timeout: only processes of this machine can be ended, not those of a cluster. Leave it out")
    values: list[Any] = [None]*len(items)
    failures: list[Failure] = []
    todo = list(range(len(items)))
    if ledger is not None:
        todo = [i for i in todo if not ledger.is_done(names[i])]
        for i in set(range(len(items))) - set(todo): values[i] = ledger.value(names[i])
    n = cpu_count() if workers == -1 else workers
    if n == 0 and not _is_elsewhere()[0]: run = (_run_one(f, items[i], j, None, None) for j, i in enumerate(todo))
    else: run = _stream(f, [items[i] for i in todo], n, retries, timeout)
    for j, ok, value in progress(run, desc, total=len(todo)):
        i = todo[j]
        if ok and ledger is not None:
            try: ledger.done(names[i], value)
            except (DataError, MissingFile, TypeError) as e: ok, value = False, ("error", f"{type(e).__name__}: {e}")
            else: value = ledger.value(names[i])
        if ok: values[i] = value
        else:
            failures.append(Failure(i, names[i], *value))
            if ledger is not None: ledger.failed(names[i], failures[-1].error)
    failures.sort(key=lambda x: x.index)
    if errors == "collect": return values, failures
    if failures: raise BatchError(failures, values, len(items))
    return values

# %%
def root(x): return x**0.5
pmap(root, [1, 4, 9]), pmap(root, [1, 4, 9], workers=2)

# %% [markdown]
# One item raises, one is killed by the system, one hangs. The rest is done, in order, and each failure has a name.

# %%
def fragile(x):
    if x == "bad header": raise ValueError("dim[0] is 9")
    if x == "too big": os.kill(os.getpid(), signal.SIGKILL)
    if x == "endless": time.sleep(60)
    return x.upper()

cases = ["a", "bad header", "b", "too big", "c", "endless", "d"]
values, failures = pmap(fragile, cases, workers=2, retries=1, timeout=1, errors="collect")
values, [(f.key, f.kind) for f in failures]

# %%
assert values == ["A", None, "B", None, "C", None, "D"]
assert [f.kind for f in failures] == ["error", "killed", "timeout"]

# %%
with raises(BatchError, match="1 of 3 items failed:\n  -1: TypeError"): pmap(lambda x: round(root(x)), [1, -1, 4])

# %% [markdown]
# ## A ledger of what is done
# A job that ran for two days must not start again. The ledger is a text file with one line for each finished item:
# its key, its value, and the outputs with their sizes and digests. The first line holds the fingerprint of all
# parameters, so a rerun with *other* parameters is refused instead of mixing two results. *Done* means the record is
# there and the files it names have the recorded size: never just that a file exists. A line torn by a crash is
# dropped. At the end the lines are sorted, so an interrupted job leaves the same bytes as an uninterrupted one.

# %%
#| export
class Ledger:
    "Record of finished items of one job; reopened by a rerun, refused if the parameters changed"
    version = 1

    def __init__(
        self,
        path: str | os.PathLike, # the ledger file, conventionally '<output>/ledger.jsonl'
        params: Any = None, # everything that decides the results; plain values
        *,
        on_exists: OnExists = "skip", # "skip": go on where it stopped, "overwrite": start anew, "error": refuse
        root: str | os.PathLike | None = None, # folder that output names are relative to; default: the ledger's
    ):
        self.path, self.root = Path(path), Path(root if root is not None else Path(path).parent)
        self.params = fingerprint(params)
        self._records: dict[str, dict] = {}
        self._stack = contextlib.ExitStack()
        self._on_exists = on_exists

    def __enter__(self) -> "Ledger":
        check_output(self.path, self._on_exists)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.path))
            if self._on_exists == "skip" and self.path.exists(): self._load()
            self._rewrite()
            self._journal = stack.enter_context(Journal(self.path))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        with self._stack:
            self._journal.close()
            self._rewrite()

    def _load(self) -> None:
        head, *lines = self.path.read_bytes().split(b"\n")
        try: first = parse_json(head.decode(), str(self.path))
        except (FormatError, UnicodeDecodeError): first = None
        if not isinstance(first, dict) or first.get("ledger") != self.version:
            raise FormatError(f"{self.path} is not a ledger of version {self.version}. Start anew: "
                              "on_exists='overwrite'")
        if first.get("params") != self.params:
            raise DataError(f"{self.path} belongs to a job with other parameters (now {self.params}). Choose another "
                            f"output, or start anew with on_exists='overwrite' (--on-exists overwrite)")
        for line in lines:
            with contextlib.suppress(ValueError, UnicodeDecodeError):
                record = json.loads(line.decode())
                if isinstance(record, dict) and isinstance(record.get("key"), str) and (
                    {"value", "files"} <= record.keys() if record.get("status") == "done" else "error" in record):
                    self._records[record["key"]] = record

    def _rewrite(self) -> None:
        lines = [to_json({"ledger": self.version, "params": self.params}, None)]
        lines += [to_json(self._records[k], None) for k in sorted(self._records)]
        with atomic(self.path) as t: t.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _append(self, record: dict) -> None:
        line = to_json(record, None)
        self._records[record["key"]] = json.loads(line)
        self._journal.append(line)

    def done(
        self,
        key: str, # name of the item
        value: Any = None, # plain result; if a dict holds "outputs", those files are recorded with size and digest
    ) -> None:
        "Record a finished item"
        value = plain(value)
        names = value.get("outputs", []) if isinstance(value, Mapping) else []
        files = {str(n): describe(self.root/n) for n in names}
        if absent := [n for n, d in files.items() if d["bytes"] < 0]:
            raise MissingFile(f"{key}: recorded as finished, but {self.root/absent[0]} does not exist")
        self._append({"key": key, "status": "done", "value": value, "files": files})

    def failed(
        self,
        key: str, # name of the item
        error: str, # one line that says why
    ) -> None:
        "Record an item that failed; a rerun tries it again"
        self._append({"key": key, "status": "failed", "error": error})

    def is_done(
        self,
        key: str, # name of the item
        verify: bool = False, # also compare the content of the outputs, not only their size
    ) -> bool: # finished, with its outputs in place
        "Whether the item is recorded as finished and its outputs are still what was recorded"
        record = self._records.get(key)
        if not record or record["status"] != "done": return False
        return all(describe(self.root/n, content=verify).items() <= want.items() for n, want in record["files"].items())

    def value(
        self,
        key: str, # name of an item that is done
    ) -> Any: # plain result, as JSON holds it
        "Result of a finished item"
        return self._records[key]["value"]

    def recheck(
        self,
        inputs: Mapping[str, Sequence[str | os.PathLike]], # item -> files it is made from
    ) -> None:
        "Items whose files are not those that their value names as 'source' (see `digests`) are tried again"
        for key, files in inputs.items():
            if self.is_done(key) and self.value(key)["source"] != digests(files):
                self.failed(key, "an input has changed")

    def failures(self) -> dict[str, str]: # item -> error
        "Items that failed at their last try"
        return {k: r["error"] for k, r in sorted(self._records.items()) if r["status"] == "failed"}

# %%
#| export
def describe(
    path: str | os.PathLike, # file or folder
    content: bool = True, # also the digest of the bytes
) -> dict[str, Any]: # {"bytes": total size, "sha256": digest}; bytes is -1 if it is absent
    "Size and digest of an output file, or of all files below an output folder"
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not path.exists(): return {"bytes": -1, **({"sha256": ""} if content else {})}
    out: dict[str, Any] = {"bytes": sum(p.stat().st_size for p in files)}
    if content:
        out["sha256"] = fingerprint([(p.relative_to(path).as_posix(), file_digest(p, 64)) for p in files])
    return out

def digests(
    paths: Sequence[str | os.PathLike], # files or folders
) -> list[str]: # one each
    "What identifies the content of some inputs"
    return [describe(p)["sha256"] for p in paths]

# %% [markdown]
# A job over five cases is interrupted in the third; the second run does only what is missing.

# %%
calls = []
def work(case, folder, stop=None):
    if case == stop: raise KeyboardInterrupt
    calls.append(case)
    with atomic(folder/f"{case}.txt") as t: t.write_text(case*3)
    return {"outputs": [f"{case}.txt"]}

with tmpdir() as d:
    with contextlib.suppress(KeyboardInterrupt), Ledger(d/"ledger.jsonl", {"times": 3}) as led:
        pmap(lambda c: work(c, d, stop="c"), list("abcde"), ledger=led)
    first = list(calls)
    with Ledger(d/"ledger.jsonl", {"times": 3}) as led: pmap(lambda c: work(c, d), list("abcde"), ledger=led)
    resumed = (d/"ledger.jsonl").read_bytes()
    with Ledger(d/"ledger.jsonl", {"times": 3}, on_exists="overwrite") as led:
        pmap(lambda c: work(c, d), list("edcba"), ledger=led)
    straight = (d/"ledger.jsonl").read_bytes()
    (d/"b.txt").write_text("tampered with")
    with Ledger(d/"ledger.jsonl", {"times": 3}) as led: again = [k for k in "abcde" if not led.is_done(k)]
    with raises(DataError, match="other parameters"):
        with Ledger(d/"ledger.jsonl", {"times": 4}): pass
first, calls[:5], again

# %%
assert first == ["a", "b"] and calls[:5] == list("abcde") and again == ["b"] and resumed == straight

# %% [markdown]
# ## The same job on a cluster
# Nothing changes in the call. Inside `on_cluster` (or `joblib.parallel_config(backend="dask")` with an own client) the
# items go to the workers of a Dask cluster. A lost worker's items are computed again by the others. Relative paths are
# those of the caller; workers need one thread each, since the current folder belongs to a whole process. Time limits
# are refused there, since nobody could end the item. This is what every command's `--dask ADDRESS` does.

# %%
#| export
@contextlib.contextmanager
def on_cluster(
    dask: str | None, # address of a Dask scheduler such as 'tcp://10.0.0.1:8786'; None: stay on this machine
) -> Iterator[int]: # the block whose `pmap` calls move, with the number of workers there; 0: they stay
    "Run the `pmap` calls of a block on a Dask cluster"
    if dask is None:
        yield 0
        return
    distributed, joblib = optional("distributed", "dask"), importlib.import_module("joblib")
    try: client = distributed.Client(dask, timeout=20)
    except (OSError, ValueError) as e:
        raise MissingFile(f"dask: no scheduler answers at {dask} ({type(e).__name__}: {e}). Start one with "
                          "`dask scheduler`, and workers with `dask worker ADDRESS`") from e
    with client, joblib.parallel_config(backend="dask"): yield sum(client.ncores().values())

# %%
with on_cluster(None) as there: here = pmap(len, ["a", "bc"])
assert here == [1, 2] and there == 0
