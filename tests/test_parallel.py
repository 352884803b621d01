"""Maps that survive their items, and ledgers that survive their process."""
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from medvol_nb import parallel
from medvol_nb.core import (
    ConfigError,
    DataError,
    FormatError,
    Journal,
    Locked,
    MissingFile,
    OutputExists,
    atomic,
    rng_for,
)
from medvol_nb.parallel import BatchError, Failure, Ledger, cpu_count, describe, on_cluster, pmap

ROOT = Path(__file__).resolve().parents[1]


def script(path: Path, code: str, *args, timeout=60, **options) -> subprocess.CompletedProcess:
    "Run `code` as a script of its own, so that its functions live in __main__"
    path.write_text(code)
    return subprocess.run([sys.executable, str(path), *map(str, args)], text=True, capture_output=True, timeout=timeout,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "IN_TEST": "1"}, **options)


def failures_of(f, items, **options) -> list[tuple[int, str]]:
    return [(f.index, f.kind) for f in pmap(f, items, errors="collect", **options)[1]]


# ---------------------------------------------------------------- the map

def test_cpu_count(): assert 1 <= cpu_count() <= os.cpu_count()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_same_results_for_any_number_of_workers(workers):
    def work(case): return case, rng_for(3, "case", case).normal(size=2).tolist(), np.float32(case)
    want = [work(c) for c in range(9)]
    got = pmap(work, range(9), workers=workers)
    assert got == want and pickle.dumps([g[1] for g in got]) == pickle.dumps([w[1] for w in want])
    order = random.Random(1).sample(range(9), 9)
    assert pmap(work, order, workers=workers) == [want[k] for k in order]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("items", [[], [7], range(3), "abc", (x for x in (1, 2)), [None], [[1], {"a": 2}]])
def test_items_of_any_kind(items, workers):
    items = list(items)
    assert pmap(lambda x: [x], iter(items), workers=workers) == [[x] for x in items]


def test_order_is_kept_when_the_last_is_done_first():
    def work(k):
        time.sleep(0.2 if k == 0 else 0)
        return k
    assert pmap(work, range(8), workers=2) == list(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_collected(workers):
    def work(k):
        if k % 3 == 1: raise KeyError(f"no {k}")
        return k*10
    values, failures = pmap(work, range(7), workers=workers, keys=[f"case {k}" for k in range(7)], errors="collect")
    assert values == [0, None, 20, 30, None, 50, 60] and [f.index for f in failures] == [1, 4]
    assert failures[0] == Failure(1, "case 1", "error", "KeyError: 'no 1'", failures[0].trace)
    assert "in work" in failures[0].trace and "KeyError" in failures[0].trace
    with pytest.raises(BatchError, match="2 of 7 items failed:\n  1: KeyError: 'no 1'\n  4: KeyError") as e:
        pmap(work, range(7), workers=workers)
    assert e.value.values == values and len(pickle.loads(pickle.dumps(e.value)).failures) == 2


def test_long_lists_of_failures_are_cut():
    with pytest.raises(BatchError, match=r"25 of 25 items failed:(\n.*){10}\n  \.\.\. and 15 more$"):
        pmap(lambda k: 1/0, range(25))


@pytest.mark.parametrize("options, kind, words", [
    ({"workers": -2}, ConfigError, "workers: must be -1, 0 or a number"),
    ({"timeout": 1}, ConfigError, "timeout: needs workers"),
    ({"keys": ["a"]}, DataError, "2 items but 1 keys")])
def test_wrong_use(options, kind, words):
    with pytest.raises(kind, match=words): pmap(str, [1, 2], **options)


class NoPickle:
    def __reduce__(self): raise TypeError("stays here")


def refuse(): raise RuntimeError("does not arrive")


class NoUnpickle:
    def __reduce__(self): return refuse, ()


class TwoArguments(Exception):
    "Pickles, but unpickling calls it with one argument"
    def __init__(self, a, b): super().__init__(f"{a} {b}")


def test_what_does_not_pickle_is_an_error_of_its_item():
    "These hung forever or took all other results with them"
    def work(k):
        if k == 1: return NoPickle()
        if k == 2: return NoUnpickle()
        if k == 3: raise TwoArguments("a", "b")
        if k == 4: raise type("Local", (Exception,), {})("of a class nobody else has")
        if k == 5: return threading.Lock()
        return k if isinstance(k, int) else "?"
    values, failures = pmap(work, [0, 1, 2, 3, 4, 5, threading.Lock(), NoUnpickle(), 8], workers=2, errors="collect",
                            keys=list("abcdefghi"))
    assert values == [0, *[None]*7, 8] and [(f.key, f.kind) for f in failures] == [(k, "error") for k in "bcdefgh"]
    for f, words in zip(failures, ["cannot be sent back.*stays here", "cannot be unpickled.*does not arrive",
                                   "TwoArguments: a b", "Local: of a class", "cannot be sent back", "cannot be sent to",
                                   "RuntimeError: does not arrive"]):
        assert re.search(words, f.error), f.error


def test_function_that_does_not_pickle():
    held = threading.Lock()
    with pytest.raises(TypeError, match="the function cannot be sent to a process"): pmap(lambda k: held, [1, 2],
                                                                                          workers=2)
    class Bad(NoUnpickle):
        def __call__(self, k): return k
    assert failures_of(Bad(), [1, 2], workers=2) == [(0, "error"), (1, "error")]


def test_lost_worker_and_hang():
    def work(k):
        if k == 1: os.kill(os.getpid(), signal.SIGKILL)
        if k == 3: time.sleep(60)
        return k
    start = time.monotonic()
    values, failures = pmap(work, range(5), workers=2, retries=0, timeout=1.0, errors="collect")
    assert values == [0, None, 2, None, 4] and time.monotonic() - start < 25
    assert [(f.index, f.kind) for f in failures] == [(1, "killed"), (3, "timeout")]
    assert failures[0].error == "its process was killed, 1 times"
    assert failures[1].error.startswith("took longer than 1 s, ")


def test_all_items_lost():
    def work(k): os._exit(3)
    assert failures_of(work, range(3), workers=2, retries=0) == [(k, "killed") for k in range(3)]


def test_next_map_after_a_lost_worker():
    assert failures_of(lambda k: os._exit(1) if k == 1 else k, range(3), workers=2, retries=0) == [(1, "killed")]
    assert pmap(lambda k: k + 1, range(4), workers=2) == [1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interruption_passes_through(workers, error):
    def work(k):
        if k == 1: raise error
        return k
    with pytest.raises(error): pmap(work, range(4), workers=workers, errors="collect")


def test_ctrl_c_ends_a_map_of_processes(tmp_path):
    code = ("import sys, time\nfrom medvol_nb.parallel import pmap\n"
            "def work(k): print('at work', flush=True); time.sleep(60)\n"
            "if __name__ == '__main__': pmap(work, range(4), workers=2)")
    (tmp_path/"job.py").write_text(code)
    with subprocess.Popen([sys.executable, str(tmp_path/"job.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) as child:
        child.stdout.readline()
        start = time.monotonic()
        os.killpg(child.pid, signal.SIGINT)
        _, told = child.communicate(timeout=20)
    assert time.monotonic() - start < 8 and child.returncode != 0 and "KeyboardInterrupt" in told


def test_functions_of_a_script(tmp_path):
    told = script(tmp_path/"job.py", """
import json
from medvol_nb.parallel import pmap
class Point:
    def __init__(self, x): self.x = x
def square(p): return Point(p.x**2)
if __name__ == "__main__": print(json.dumps([p.x for p in pmap(square, [Point(k) for k in range(4)], workers=2)]))
""")
    assert told.stdout.strip() == "[0, 1, 4, 9]", told.stderr


def nested(k): return sum(pmap(lambda j: j*k, range(4), workers=2))


def test_map_in_a_map():
    def outer(k): return sum(pmap(lambda j: j*k, range(4), workers=2))
    assert pmap(outer, range(3), workers=2) == [0, 6, 12]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_map_in_a_child_of_multiprocessing(tmp_path, method):
    "Such a child waits for its own children when it ends: idle workers must be gone by then"
    (tmp_path/"inner.py").write_text("from medvol_nb.parallel import pmap\n"
                                     "def double(k): return 2*k\n"
                                     "def child(q): q.put(pmap(double, range(5), workers=2))\n")
    told = script(tmp_path/"job.py", """
import json, multiprocessing, sys, time
from inner import child
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    q = context.Queue()
    p = context.Process(target=child, args=(q,))
    p.start()
    got, start = q.get(timeout=40), time.monotonic()
    p.join(20)
    print(json.dumps([got, p.exitcode, time.monotonic() - start < 10]))
""", method)
    assert told.stdout.strip() == "[[0, 2, 4, 6, 8], 0, true]", told.stderr


DASK = """
import json, os, sys
import joblib
from dask.distributed import Client, LocalCluster
from medvol_nb.parallel import on_cluster, pmap
def work(k):
    if k == "die": os._exit(1)
    if k == "raise": raise ValueError("bad header")
    return k*2
if __name__ == "__main__":
    cluster = LocalCluster(processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster:
        with on_cluster(cluster.scheduler_address): first = pmap(work, range(6))
        os.chdir(sys.argv[1])
        with on_cluster(cluster.scheduler_address): here = pmap(os.path.exists, ["job.py"])
        with Client(cluster), joblib.parallel_config(backend="dask"):
            values, failures = pmap(work, ["a", "die", "b", "raise", "c"], workers=2, retries=0, errors="collect")
    print(json.dumps([first, here, values, [(f.index, f.kind) for f in failures]]))
"""


@pytest.mark.slow
def test_on_a_dask_cluster(tmp_path):
    pytest.importorskip("distributed")
    told = script(tmp_path/"job.py", DASK, str(tmp_path), timeout=180)
    assert told.returncode == 0, told.stderr
    first, here, values, failures = json.loads(told.stdout.strip().splitlines()[-1])
    assert first == [0, 2, 4, 6, 8, 10] and here == [True] and values == ["aa", None, "bb", None, "cc"]
    assert failures == [[1, "killed"], [3, "error"]]


def test_a_time_limit_that_nobody_keeps_is_refused():
    import joblib
    with joblib.parallel_config(backend="multiprocessing"):
        with pytest.raises(ConfigError, match="not those of a cluster"): pmap(str, range(3), workers=2, timeout=9)


def test_no_cluster_at_the_address():
    pytest.importorskip("distributed")
    with pytest.raises(MissingFile, match="no scheduler answers at nonsense"), on_cluster("nonsense://x"): pass


def test_marks_of_a_run_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pmap(lambda k: k, range(3), workers=2)
    with pytest.raises(BatchError): pmap(lambda k: 1/0, range(3), workers=2)
    assert not list(tmp_path.glob("medvol-marks-*"))


# ---------------------------------------------------------------- ledgers

def write(folder: Path, key: str, text: str | None = None) -> dict:
    with atomic(folder/f"{key}.txt") as t: t.write_text(key*3 if text is None else text)
    return {"outputs": [f"{key}.txt"], "length": len(key)}


def open_ledger(folder: Path, params=1, **options) -> Ledger: return Ledger(folder/"ledger.jsonl", params, **options)


def test_ledger_remembers(tmp_path):
    with open_ledger(tmp_path) as led:
        led.done("a", write(tmp_path, "a"))
        led.failed("b", "ValueError: no")
        led.done("c", {"nothing": "written", "t": (1, np.float32(0.5))})
        assert led.is_done("a") and not led.is_done("b") and not led.is_done("x")
    with open_ledger(tmp_path) as led:
        assert led.is_done("a", verify=True) and led.value("a") == {"outputs": ["a.txt"], "length": 1}
        assert led.value("c") == {"nothing": "written", "t": [1, 0.5]} and led.failures() == {"b": "ValueError: no"}
        led.done("b", None)
        assert led.is_done("b") and led.failures() == {}
    with open_ledger(tmp_path) as led: assert led.is_done("b") and led.value("b") is None


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, workers):
    cases = [f"case {k}" for k in range(8)]
    for name in ("straight", "resumed"): (tmp_path/name).mkdir()
    with open_ledger(tmp_path/"straight") as led:
        want = pmap(lambda c: write(tmp_path/"straight", c), cases, ledger=led)
    for stop in (2, 5, 7, None):
        def work(c, stop=stop):
            if stop is not None and c == cases[stop]: raise KeyboardInterrupt
            return write(tmp_path/"resumed", c)
        with contextlib.suppress(KeyboardInterrupt), open_ledger(tmp_path/"resumed") as led:
            got = pmap(work, random.Random(stop).sample(cases, 8), workers=workers, ledger=led)
    with open_ledger(tmp_path/"resumed") as led: again = pmap(lambda c: 1/0, cases, ledger=led)
    assert len(got) == 8 and again == want, "the values, too, are those of the uninterrupted run"
    assert describe(tmp_path/"resumed") == describe(tmp_path/"straight")


def test_finished_items_are_not_done_again(tmp_path):
    calls = []
    def work(c):
        calls.append(c)
        if c == "b" and calls.count("b") < 2: raise ValueError
        return write(tmp_path, c)
    for _ in range(3):
        with open_ledger(tmp_path) as led: pmap(work, list("abc"), ledger=led, errors="collect")
    assert calls == ["a", "b", "c", "b"]


@pytest.mark.parametrize("damage", ["delete", "grow", "shrink"])
def test_changed_outputs_are_not_done(tmp_path, damage):
    with open_ledger(tmp_path) as led: pmap(lambda c: write(tmp_path, c), list("abc"), ledger=led)
    if damage == "delete": (tmp_path/"b.txt").unlink()
    else: (tmp_path/"b.txt").write_text("bbbb" if damage == "grow" else "")
    with open_ledger(tmp_path) as led: assert [led.is_done(k) for k in "abc"] == [True, False, True]


def test_same_size_is_found_by_content(tmp_path):
    with open_ledger(tmp_path) as led: led.done("a", write(tmp_path, "a"))
    (tmp_path/"a.txt").write_text("xxx")
    with open_ledger(tmp_path) as led: assert led.is_done("a") and not led.is_done("a", verify=True)


def test_outputs_that_are_folders(tmp_path):
    with atomic(tmp_path/"a.zarr", folder=True) as t:
        (t/"c").mkdir()
        (t/"c"/"0").write_text("chunk")
        (t/"meta").write_text("{}")
    with open_ledger(tmp_path) as led: led.done("a", {"outputs": ["a.zarr"]})
    (tmp_path/"a.zarr"/"meta").rename(tmp_path/"a.zarr"/"atem")
    with open_ledger(tmp_path) as led: assert led.is_done("a") and not led.is_done("a", verify=True)
    (tmp_path/"a.zarr"/"c"/"0").unlink()
    with open_ledger(tmp_path) as led: assert not led.is_done("a")


def test_done_needs_its_outputs(tmp_path):
    with open_ledger(tmp_path) as led:
        with pytest.raises(MissingFile, match="a: recorded as finished, but .*a.txt does not exist"):
            led.done("a", {"outputs": ["a.txt"]})
        assert not led.is_done("a")
    (tmp_path/"sub").mkdir()
    write(tmp_path/"sub", "b")
    with open_ledger(tmp_path, root=tmp_path/"sub") as led:
        led.done("b", {"outputs": ["b.txt"]})
        assert led.is_done("b")


@pytest.mark.parametrize("bad, words", [(lambda: object(), "TypeError"), (lambda: float("nan"), "DataError.*no NaN"),
                                        (lambda: {"outputs": ["absent"]}, "MissingFile"),
                                        (lambda: {1: 1, "1": 2}, "TypeError")])
def test_values_that_cannot_be_recorded_are_failures(tmp_path, bad, words):
    "One such item ended the whole run before"
    with open_ledger(tmp_path) as led:
        values, failures = pmap(lambda k: bad() if k == 1 else k, range(3), ledger=led, errors="collect")
    assert values == [0, None, 2] and [f.index for f in failures] == [1]
    assert re.search(words, failures[0].error)
    with open_ledger(tmp_path) as led: assert led.is_done("0") and list(led.failures()) == ["1"]


def test_changed_parameters(tmp_path):
    with open_ledger(tmp_path, {"seed": 0}) as led: led.done("a")
    before = (tmp_path/"ledger.jsonl").read_bytes()
    for params in ({"seed": 1}, {"seed": 0.0}, {"seed": 0, "x": None}, None):
        with pytest.raises(DataError, match="other parameters.*--on-exists overwrite"), open_ledger(tmp_path,
                                                                                                    params): pass
    assert (tmp_path/"ledger.jsonl").read_bytes() == before
    with open_ledger(tmp_path, {"seed": 1}, on_exists="overwrite") as led: assert not led.is_done("a")
    with pytest.raises(OutputExists), open_ledger(tmp_path, {"seed": 1}, on_exists="error"): pass


@pytest.mark.parametrize("tail", [b'{"key": "c", "sta', b"\xff\xfe\x00", b'{"key": "c"}\n', b"[]\n", b"null",
                                     b'{"key": 3, "status": "done"}',
                                  b'{"key": "c", "status": "done"}\n', b'{"key": "c", "status": "failed"}\n',
                                  b"\n\n\n", b"NaN"])
def test_torn_and_foreign_lines_are_dropped(tmp_path, tail):
    with open_ledger(tmp_path) as led: pmap(lambda c: write(tmp_path, c), list("ab"), ledger=led)
    good = (tmp_path/"ledger.jsonl").read_bytes()
    (tmp_path/"ledger.jsonl").write_bytes(good + tail)
    with open_ledger(tmp_path) as led:
        assert led.is_done("a") and led.is_done("b") and not led.is_done("c") and not led.failures()
        led.done("c")
    with open_ledger(tmp_path) as led: assert led.is_done("c")


def test_ledger_cut_anywhere(tmp_path):
    "Whatever the crash leaves is either a ledger of the first items or refused as no ledger"
    with open_ledger(tmp_path) as led: pmap(lambda c: write(tmp_path, c), list("abcd"), ledger=led)
    good = (tmp_path/"ledger.jsonl").read_bytes()
    head = good.index(b"\n")
    for n in range(0, len(good), 3):
        (tmp_path/"ledger.jsonl").write_bytes(good[:n])
        if n < head:
            with pytest.raises(FormatError, match="is not a ledger"), open_ledger(tmp_path): pass
            continue
        with open_ledger(tmp_path) as led: done = [led.is_done(k) for k in "abcd"]
        assert done == sorted(done, reverse=True) and sum(done) >= good[:n].count(b"\n") - 1


@pytest.mark.parametrize("content", [b"", b"\n", b"hello\n", b'{"ledger": 2, "params": "x"}\n', b"[]", b"\xff",
                                     b'{"params": 1}'])
def test_files_that_are_no_ledgers(tmp_path, content):
    (tmp_path/"ledger.jsonl").write_bytes(content)
    with pytest.raises(FormatError, match="on_exists='overwrite'"), open_ledger(tmp_path): pass
    assert (tmp_path/"ledger.jsonl").read_bytes() == content and os.listdir(tmp_path) == ["ledger.jsonl"]


def test_places(tmp_path):
    with pytest.raises(MissingFile, match="mkdir -p"), open_ledger(tmp_path/"no"): pass
    (tmp_path/"link").symlink_to("elsewhere")
    with pytest.raises(OutputExists, match="symbolic link"), Ledger(tmp_path/"link"): pass


@pytest.mark.parametrize("key", ["with space", "new\nline", "quo\"te", "ü😀\u2028", os.fsdecode(b"caf\xe9"), "", "{",
                                                                                                                  "a"*5000])
def test_keys(tmp_path, key):
    for _ in range(2):
        with open_ledger(tmp_path) as led: pmap(lambda k: 1, [key, "x"], ledger=led)
    with open_ledger(tmp_path) as led: assert led.is_done(key) and led.is_done("x")
    assert len((tmp_path/"ledger.jsonl").read_bytes().splitlines()) == 3


def test_keys_must_be_unique(tmp_path):
    with open_ledger(tmp_path) as led, pytest.raises(DataError, match="keys must be unique"): pmap(str, [1, 1],
                                                                                                   ledger=led)


def test_second_process_is_refused(tmp_path):
    with open_ledger(tmp_path):
        with pytest.raises(Locked), open_ledger(tmp_path): pass
        told = script(tmp_path/"second.py", "import sys\nfrom medvol_nb.parallel import Ledger\n"
                      "with Ledger(sys.argv[1], 1): pass", tmp_path/"ledger.jsonl")
        assert told.returncode and "Locked" in told.stderr and str(os.getpid()) in told.stderr
    with open_ledger(tmp_path): pass


def test_error_in_the_block_keeps_what_is_done(tmp_path):
    with contextlib.suppress(ZeroDivisionError), open_ledger(tmp_path) as led:
        led.done("a")
        1/0
    assert not (tmp_path/"ledger.jsonl.lock").exists()
    with open_ledger(tmp_path) as led: assert led.is_done("a")


KILLED = """
import os, signal, sys
from pathlib import Path
from medvol_nb import core, parallel
folder, moment = Path(sys.argv[1]), sys.argv[2]
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
def after(f): return lambda *a, **k: (f(*a, **k), die())
if moment == "opening": parallel.Ledger._rewrite = die
with parallel.Ledger(folder/"ledger.jsonl", 1) as led:
    if moment == "before the record": core.Journal.append = die
    if moment == "in the record": core.Journal.append = lambda self, line: (self._file.write(line.encode()[:20]), die())
    if moment == "after the record": core.Journal.append = after(core.Journal.append)
    for key in "abc":
        with core.atomic(folder/f"{key}.txt") as t:
            t.write_text(key*3)
            if moment == "in the output" and key == "b": die()
        led.done(key, {"outputs": [f"{key}.txt"], "length": 1})
    if moment == "closing": parallel.Ledger._rewrite = die
die()
"""


@pytest.mark.parametrize("moment, done", [("opening", ""), ("before the record", ""), ("in the record", ""),
                                          ("after the record", "a"), ("in the output", "a"), ("closing", "abc"),
                                          ("the end", "abc")])
def test_kill(tmp_path, moment, done):
    (tmp_path/"run").mkdir()
    assert script(tmp_path/"job.py", KILLED, tmp_path/"run", moment).returncode == -signal.SIGKILL
    with open_ledger(tmp_path/"run") as led:
        assert [k for k in "abc" if led.is_done(k, verify=True)] == list(done)
        pmap(lambda c: write(tmp_path/"run", c), list("abc"), ledger=led)
    (tmp_path/"straight").mkdir()
    with open_ledger(tmp_path/"straight") as led: pmap(lambda c: write(tmp_path/"straight", c), list("abc"), ledger=led)
    assert describe(tmp_path/"run") == describe(tmp_path/"straight"), "and no litter is left"


def test_describe(tmp_path):
    (tmp_path/"d"/"e").mkdir(parents=True)
    (tmp_path/"d"/"e"/"x").write_bytes(b"12345")
    (tmp_path/"d"/"y").write_bytes(b"6")
    assert describe(tmp_path/"d", content=False) == {"bytes": 6} and describe(tmp_path/"d"/"y",
                                                                              content=False) == {"bytes": 1}
    assert describe(tmp_path/"no") == {"bytes": -1, "sha256": ""}
    before = describe(tmp_path/"d")
    (tmp_path/"d"/"y").rename(tmp_path/"d"/"z")
    assert describe(tmp_path/"d") != before and describe(tmp_path/"d")["bytes"] == 6


def test_ledger_of_another_thread_or_fork_is_locked(tmp_path):
    seen = []
    def other():
        try:
            with open_ledger(tmp_path): seen.append("open")
        except Locked: seen.append("locked")
    with open_ledger(tmp_path):
        t = threading.Thread(target=other)
        t.start()
        t.join()
    assert seen == ["locked"]


def test_journal_lines_reach_the_system_at_once(tmp_path):
    with open_ledger(tmp_path) as led:
        led.done("a")
        assert b'"key": "a"' in (tmp_path/"ledger.jsonl").read_bytes()
        assert isinstance(led._journal, Journal)


def test_functions_that_need_the_parent_process():
    assert multiprocessing.parent_process() is None and not parallel._is_elsewhere()[0]
