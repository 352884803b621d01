"""Errors, fingerprints, random streams, atomic outputs, locks, journals, strict files, paths, progress."""
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import random
import signal
import stat
import string
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvol_nb import core
from medvol_nb.core import (
    ConfigError,
    DataError,
    DiskFull,
    FormatError,
    Journal,
    Locked,
    MedvolError,
    MissingExtra,
    MissingFile,
    OutputExists,
    atomic,
    check_output,
    close,
    file_digest,
    fingerprint,
    human_bytes,
    human_time,
    inside,
    lock,
    optional,
    parse_json,
    plain,
    progress,
    raises,
    read_csv,
    read_json,
    remove_tree,
    rng_for,
    seed_words,
    sweep_temporary,
    to_json,
    write_csv,
    write_json,
    write_text,
)

ROOT = Path(__file__).resolve().parents[1]
ODD_NAMES = ["with space", "quo'te\"", "; touch x", "new\nline", "tab\t", "ünïcødé 脳", "-dash", ".hidden", "a"*250,
             "x.tar.gz", "a.b.c.d", "%s{}$HOME", "é"*120]


def python(code: str, *args, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True, capture_output=True,
                          timeout=60, **options)


def names(folder: Path) -> list[str]: return sorted(os.listdir(folder))


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("kind, builtin", [(ConfigError, ValueError), (DataError, ValueError),
                                           (FormatError, ValueError),
                                           (MissingFile, FileNotFoundError), (OutputExists, FileExistsError),
                                           (DiskFull, OSError), (Locked, RuntimeError), (MissingExtra, ImportError)])
def test_errors_are_also_the_builtin(kind, builtin):
    assert issubclass(kind, MedvolError) and issubclass(kind, builtin)
    assert str(kind("what broke: rule")) == "what broke: rule"


def test_helpers_of_lessons():
    with raises(KeyError): {}["x"]
    with pytest.raises(AssertionError, match="does not match"), raises(ValueError, "right"): raise ValueError("wrong")
    with pytest.raises(AssertionError, match="not raised"), raises(ValueError): pass
    with pytest.raises(KeyError), raises(ValueError): raise KeyError
    assert not close(np.zeros(2), np.zeros(3)) and close([], []) and not close(np.nan, np.nan)
    assert close(np.uint8(3), np.uint8(4), atol=1) and not close(np.uint8(0), np.uint8(255), atol=1)
    with core.tmpdir() as d: (d/"a"/"b").mkdir(parents=True)
    assert not d.exists()


# ---------------------------------------------------------------- fingerprints

@dataclasses.dataclass
class Point:
    x: int
    y: float


# Computed once and then frozen: caches and ledgers of older runs must stay valid. If one of these has to change,
# so must the version of whatever stores fingerprints.
# Derivation by hand: sha256(b"lit:4:None"), sha256(b"int:1:1"), ... with a tag and a length before every part.
GOLDEN = [
    (None, "1e2c3fbd8dae177d"), (True, "1fcf93bfae68aa60"), (1, "13aaa720a36e7abd"), (1.0, "802a991ae191c873"),
    ("1", "e44f4e2a1fd206c1"), (b"1", "548c67053eac86c2"), ([1, 2], "99ce908be2ac46fe"),
    ({"a": 1, "b": 2}, "05efd26be24bad8c"), ({1, 2, 3}, "d2c127c1555c786e"), (Path("a/b"), "e1329ecc8348ff69"),
    (np.arange(6, dtype="<i8").reshape(2, 3), "9dd2948fbaf3703f"), (np.float32(0.5), "61e9d785f2869704"),
    (Point(1, 2.5), "aab715eb2eefa75e"), ({"nested": [{"deep": (1.5, None, "ü")}]}, "f18be5dd6474974b")]


@pytest.mark.parametrize("value, digest", GOLDEN, ids=[str(i) for i in range(len(GOLDEN))])
def test_fingerprint_golden(value, digest): assert fingerprint(value) == digest


def test_fingerprint_derivation():
    sha = lambda data: hashlib.sha256(data).hexdigest()[:16]
    assert fingerprint(None) == sha(b"lit:4:None") and fingerprint([1, "x"]) == sha(b"seq:1:2int:1:1str:1:x")
    assert fingerprint(np.arange(2, dtype="<i2")) == sha(b"array:7:<i2(2,)" + bytes([0, 0, 1, 0]))


def test_fingerprint_does_not_depend_on_the_process():
    code = ("from medvol_nb.core import fingerprint; "
            "print(fingerprint({'b': {3, 1, 2}, 'a': ['x', {'z', 'y'}], 'c': frozenset('pqr')}))")
    told = {python(code, env={**os.environ, "PYTHONHASHSEED": str(s)}).stdout for s in (0, 1, 77)}
    assert len(told) == 1 and len(told.pop().strip()) == 16


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_letters, max_size=4), inner,
                                                                max_size=4),
    max_leaves=12)


@given(plain_values, plain_values)
@settings(max_examples=150, deadline=None)
def test_fingerprint_tells_values_apart(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (fingerprint(a) == fingerprint(b)) == same


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=6), st.randoms())
@settings(max_examples=50, deadline=None)
def test_fingerprint_ignores_the_order_of_keys(d, rnd):
    items = list(d.items())
    rnd.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(d)


def test_fingerprint_is_unambiguous():
    pairs = [(["ab"], ["a", "b"]), ([[1], 2], [[1, 2]]), ({"a": ["b"]}, {"a": "b"}), ([], {}), ([], ""), ("", b""),
             ([1, 2], {1, 2}), (0.0, -0.0), (np.zeros((2, 3)), np.zeros((3, 2))), (np.zeros((0, 3)), np.zeros((3, 0))),
             (np.zeros(3, "f4"), np.zeros(3, "f8")), (np.zeros(3), [0.0]*3), (True, 1), (1, 1.0), ({1: 2}, {"1": 2}),
             ([None], [[]]), ("a:1", ["a", 1]), (Path("a"), "a"), ([{}, []], [[], {}])]
    for a, b in pairs: assert fingerprint(a) != fingerprint(b), (a, b)


def test_fingerprint_looks_at_content():
    a = np.arange(24).reshape(4, 6)
    for same in (a.copy(order="F"), a.T.copy().T, np.ascontiguousarray(a)): assert fingerprint(same) == fingerprint(a)
    view = np.arange(48).reshape(4, 12)[:, ::2]
    assert fingerprint(view) == fingerprint(view.copy()) and fingerprint(np.int64(3)) == fingerprint(3)
    assert fingerprint((1, 2)) == fingerprint([1, 2]) and fingerprint("x", 64).startswith(fingerprint("x"))
    assert fingerprint(np.True_) == fingerprint(True) and fingerprint(Point(1, 2.0)) == fingerprint({"x": 1, "y": 2.0})
    for bad in (object(), np.array([object()]), [print], {1: {2: lambda: 0}}):
        with pytest.raises(TypeError, match="fingerprint"): fingerprint(bad)


def test_file_digest(tmp_path):
    (tmp_path/"x").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" # FIPS 180-4, example 'abc'
    assert file_digest(tmp_path/"x", 64) == known and file_digest(tmp_path/"x") == known[:16]
    (tmp_path/"x").write_bytes(bytes(3_000_000))
    assert len(file_digest(tmp_path/"x")) == 16


# ---------------------------------------------------------------- random streams

def test_rng_golden():
    "The numbers of a stream never change: results of old runs can be made again"
    assert seed_words(0) == GOLDEN_WORDS[0] and seed_words(7, "crop", 3, 1.5) == GOLDEN_WORDS[1]
    assert rng_for(0, "case", 1).integers(0, 2**32, 3).tolist() == GOLDEN_DRAWS[0]
    assert rng_for(2**70, b"x", ("a", 1)).random(2).tolist() == GOLDEN_DRAWS[1]


GOLDEN_WORDS = [(2185429243, 1321040708, 3050617232, 2072614890), (2961068661, 641000897, 3188828156, 2413752576)]
GOLDEN_DRAWS = [[345129943, 1648464975, 1615439279], [0.4089753193877641, 0.09573479782936012]]


def test_rng_depends_on_name_alone():
    order = list(range(30))
    random.Random(0).shuffle(order)
    shuffled = {k: rng_for(5, "x", k).random() for k in order}
    assert [shuffled[k] for k in range(30)] == [rng_for(5, "x", k).random() for k in range(30)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda k: rng_for(5, "x", k).random(), range(30))) == [shuffled[k] for k in range(30)]
    keys = [(), ("a",), ("a", 1), ("a", "1"), ("a1",), (("a", 1),), (b"a", 1), (1, "a"), ("a", 1, 0), ("a", 1.0)]
    assert len({rng_for(0, *k).random() for k in keys}) == len(keys)
    assert len({rng_for(s, "a").random() for s in range(500)}) == 500
    assert rng_for(np.int64(3), "a").random() == rng_for(3, "a").random()


@pytest.mark.parametrize("bad", [-1, 1.0, "1", None, True, [1]])
def test_seed_must_be_a_count(bad):
    with pytest.raises(DataError, match="seed must be an integer >= 0"): rng_for(bad)


# ---------------------------------------------------------------- places

def test_check_output(tmp_path):
    new, old, folder = tmp_path/"new", tmp_path/"old", tmp_path/"folder"
    old.write_text("x")
    folder.mkdir()
    assert check_output(new) and check_output(old, "overwrite") and not check_output(old, "skip")
    for bad, kind, words in [(old, OutputExists, "--on-exists"), (folder, OutputExists, "exists"),
                             (tmp_path/"no"/"x", MissingFile, "mkdir -p"), (old/"x", OutputExists, "is a file"),
                             ("a\0b", OutputExists, "NUL"), (tmp_path/"..", OutputExists, "does not name"),
                             ("", OutputExists, "does not name"), ("/", OutputExists, "does not name")]:
        with pytest.raises(kind, match=words): check_output(bad)
    with pytest.raises(ConfigError, match="must be 'error', 'skip' or 'overwrite', got 'yes'"): check_output(new, "yes")


def test_check_output_links(tmp_path):
    (tmp_path/"real").write_text("x")
    (tmp_path/"link").symlink_to("real")
    (tmp_path/"dangling").symlink_to("nowhere")
    (tmp_path/"sub").symlink_to(tmp_path, target_is_directory=True)
    for name in ("link", "dangling"):
        with pytest.raises(OutputExists, match="symbolic link to"): check_output(tmp_path/name, "overwrite")
    assert check_output(tmp_path/"sub"/"new")


def test_inputs_are_never_overwritten(tmp_path):
    (tmp_path/"in").mkdir()
    (tmp_path/"in"/"case.nii").write_text("x")
    (tmp_path/"alias").symlink_to("in")
    for out, given_ in [("in/case.nii", "in/case.nii"), ("in/case.nii", "alias/case.nii"), ("in", "in/case.nii"),
                        ("in/../in/case.nii", "in/case.nii")]:
        with pytest.raises(OutputExists, match="is also an input"):
            check_output(tmp_path/out, "overwrite", inputs=[tmp_path/"x", tmp_path/given_])
    assert check_output(tmp_path/"in"/"case2.nii", "overwrite", inputs=[tmp_path/"in"/"case.nii"])
    assert check_output(tmp_path/"in2", inputs=[tmp_path/"in"])


# ---------------------------------------------------------------- atomic

@pytest.mark.parametrize("name", ODD_NAMES)
def test_atomic_names(tmp_path, name):
    for text in ("first", "second"):
        with atomic(tmp_path/name) as t:
            t.write_text(text)
            assert t.parent == tmp_path and t.name != name
        assert (tmp_path/name).read_text() == text and names(tmp_path) == [name]
    with atomic(tmp_path/"folder", folder=True) as t: (t/name).write_text("inside")
    with atomic(tmp_path/"folder", folder=True) as t: (t/f"{name[:200]}2").write_text("inside")
    assert names(tmp_path/"folder") == [f"{name[:200]}2"]


def test_atomic_keeps_suffixes(tmp_path):
    for name, end in [("x.nii.gz", ".nii.gz"), ("a.zarr", ".zarr"), ("a", ""), ("v1.2 of the case.nii", ".nii")]:
        with atomic(tmp_path/name) as t:
            assert t.name.endswith(end)
            t.write_text("")


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_atomic_error_leaves_the_old(tmp_path, folder, error):
    def put(t, text): (t/"part").write_text(text) if folder else t.write_text(text)
    def get(): return (tmp_path/"x"/"part").read_text() if folder else (tmp_path/"x").read_text()
    with atomic(tmp_path/"x", folder=folder) as t: put(t, "old")
    with pytest.raises(error), atomic(tmp_path/"x", folder=folder) as t:
        put(t, "new")
        raise error("boom")
    assert get() == "old" and names(tmp_path) == ["x"]
    with pytest.raises(error), atomic(tmp_path/"y", folder=folder) as t: raise error
    assert names(tmp_path) == ["x"]


def test_atomic_wants_something(tmp_path):
    with pytest.raises(MedvolError, match="nothing was written for"), atomic(tmp_path/"x"): pass
    with atomic(tmp_path/"empty", folder=True): pass
    assert names(tmp_path) == ["empty"]


def test_atomic_refuses_before_the_block(tmp_path):
    (tmp_path/"file").write_text("x")
    (tmp_path/"folder").mkdir()
    ran = []
    for path, options, words in [("folder", {}, "is a folder, a file was"),
                                 ("file", {"folder": True}, "is a file, a folder"),
                                 ("file", {"on_exists": "error"}, "exists"), ("no/x", {}, "does not exist")]:
        with pytest.raises(MedvolError, match=words), atomic(tmp_path/path, **options): ran.append(path)
    assert not ran and names(tmp_path) == ["file", "folder"]


def test_atomic_respects_the_umask(tmp_path):
    "Not 0600, as temporary files of the standard library have: others are meant to read results"
    old = os.umask(0o027)
    try:
        with atomic(tmp_path/"x") as t: t.write_text("")
        with atomic(tmp_path/"d", folder=True) as t: (t/"y").write_text("")
    finally: os.umask(old)
    modes = [stat.S_IMODE((tmp_path/n).stat().st_mode) for n in ("x", "d", "d/y")]
    assert modes == [0o640, 0o750, 0o640]


def test_atomic_folder_is_swapped_in_one_step(tmp_path):
    "A reader that looks all the time finds the folder at every moment, with all parts of one generation"
    if not core._exchange(tmp_path/"a", tmp_path/"b") and sys.platform != "linux": pytest.skip("two steps here")
    def make(k):
        with atomic(tmp_path/"d", folder=True, sync=False) as t:
            for n in range(5): (t/str(n)).write_text(str(k))
    make(0)
    stop, absent, reads = threading.Event(), [], []
    def look():
        while not stop.is_set():
            reads.append(1)
            if not os.path.isdir(tmp_path/"d"): absent.append(1)
    reader = threading.Thread(target=look)
    reader.start()
    for k in range(200): make(k)
    stop.set()
    reader.join()
    assert not absent and len(reads) > 200 and {p.read_text() for p in (tmp_path/"d").iterdir()} == {"199"}
    assert names(tmp_path) == ["d"]


def test_atomic_folder_without_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "_exchange", lambda a, b: False)
    for text in "ab":
        with atomic(tmp_path/"d", folder=True) as t: (t/"x").write_text(text)
    assert (tmp_path/"d"/"x").read_text() == "b" and names(tmp_path) == ["d"]


KILLED = """
import os, signal, sys
from medvol_nb import core
path, folder, moment = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
if moment == "fsync": core._fsync = die
if moment == "rename": os.replace = os.rename = core._exchange = die
if moment == "after rename":
    for module, name in ((os, "replace"), (os, "rename"), (core, "_exchange")):
        def then_die(*a, f=getattr(module, name)): f(*a); die()
        setattr(module, name, then_die)
with core.atomic(path, folder=folder) as t:
    if moment == "start": die()
    (t/"part" if folder else t).write_text("new")
    if moment == "written": die()
"""


@pytest.mark.parametrize("moment", ["start", "written", "fsync", "rename", "after rename"])
@pytest.mark.parametrize("folder", [False, True])
def test_atomic_kill(tmp_path, folder, moment):
    path = tmp_path/"x"
    with atomic(path, folder=folder) as t: (t/"part" if folder else t).write_text("old")
    assert python(KILLED, path, folder, moment).returncode == -signal.SIGKILL
    text = (path/"part" if folder else path).read_text()
    assert text == ("new" if moment == "after rename" else "old")
    with atomic(tmp_path/"other") as t: t.write_text("")
    assert names(tmp_path) == ["other", "x"], "the next writer sweeps what the killed one left"


TWO_STEPS = """
import os, signal, sys
from medvol_nb import core
calls, rename = [], os.rename
core._exchange = lambda a, b: False
def second_dies(*a):
    calls.append(a)
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
    rename(*a)
os.rename = second_dies
with core.atomic(sys.argv[1], folder=True) as t: (t/"part").write_text("new")
"""


def test_a_kill_between_the_two_steps_keeps_the_old_folder(tmp_path):
    "Where folders cannot be exchanged; the next writer used to sweep the old one and the new one"
    (tmp_path/"x").mkdir()
    (tmp_path/"x"/"part").write_text("old")
    assert python(TWO_STEPS, tmp_path/"x").returncode == -signal.SIGKILL and not (tmp_path/"x").exists()
    with atomic(tmp_path/"other") as t: t.write_text("")
    assert names(tmp_path) == ["other", "x"] and (tmp_path/"x"/"part").read_text() == "old"


def test_a_second_step_that_fails_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "_exchange", lambda a, b: False)
    with atomic(tmp_path/"x", folder=True) as t: (t/"part").write_text("old")
    calls, rename = [], os.rename
    def second_fails(*a):
        calls.append(a)
        if len(calls) == 2: raise OSError(116, "Stale file handle")
        rename(*a)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Stale"), atomic(tmp_path/"x", folder=True) as t: (t/"part").write_text("new")
    assert names(tmp_path) == ["x"] and (tmp_path/"x"/"part").read_text() == "old"


def test_a_folder_that_stepped_aside_is_swept_once_its_successor_is_there(tmp_path):
    old = tmp_path/f".mvold-{core._host()}-999999999-1-x"
    for d in (old, tmp_path/"x"): d.mkdir(); (d/"part").write_text(d.name)
    assert sweep_temporary(tmp_path) == [old.name] and (tmp_path/"x"/"part").read_text() == "x"


FULL = """
import resource, signal, sys
from medvol_nb.core import DiskFull, atomic
path, n = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
try:
    with atomic(path) as t, open(t, "wb", buffering=0) as f:
        for _ in range(100): f.write(bytes(1000)); f.flush()
except DiskFull as e: print(e.errno, e)
"""


@pytest.mark.parametrize("room", [0, 1, 999, 50_000])
def test_disk_full(tmp_path, room):
    (tmp_path/"x").write_text("old")
    told = python(FULL, tmp_path/"x", room)
    shown = human_bytes(room)
    assert told.stdout.startswith("27 ") and f"no room for {tmp_path/'x'}: stopped after {shown}, " in told.stdout, told
    assert " free (File too large). What was there before is intact" in told.stdout
    assert (tmp_path/"x").read_text() == "old" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("error, code", [
    (OSError(28, "No space left on device"), 28), (OSError(122, "Disk quota exceeded"), 122),
    (OSError(5, "I/O error"), 0),
    (RuntimeError("can't write (errno = 28, error message = 'No space left on device')"), 28),
    (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), 27),
    (OSError("64000 requested and 29872 written"), 28), (ValueError("errno = 5"), 0), (RuntimeError("boom"), 0),
    (OutputExists(28, "said by us"), 0)])
def test_disk_full_in_the_words_of_libraries(tmp_path, error, code):
    with pytest.raises(DiskFull if code else type(error)) as caught, atomic(tmp_path/"x") as t:
        t.write_bytes(bytes(2048))
        raise error
    assert (caught.value.errno, "2.0 KiB" in str(caught.value)) == (code, True) if code else caught.value is error
    assert not names(tmp_path)


def test_sweep_leaves_what_lives(tmp_path):
    dead = f".mvtmp-{'0'*8}-{core._host()}-999999999-1-5.nii.gz"
    (tmp_path/dead).write_text("x")
    (tmp_path/dead.replace("-5.", "-6.")).mkdir()
    (tmp_path/dead.replace("-5.", "-6.")/"x").write_text("x")
    kept = [f".mvtmp-{'0'*8}-{'f'*6}-999999999-1-5", ".mvtmp-else",
            f".mvtmp-{'0'*8}-{core._host()}-{core._process_token()}-1"]
    for n in kept: (tmp_path/n).write_text("of another host, not ours, of this process")
    assert sweep_temporary(tmp_path) == sorted([dead, dead.replace("-5.", "-6.")])
    assert names(tmp_path) == sorted(kept)


def test_sweep_of_many_at_once(tmp_path):
    "Writers that sweep the same litter at the same time do not trip over each other"
    for k in range(30):
        d = tmp_path/f".mvtmp-{k:08x}-{core._host()}-999999999-1-5"
        d.mkdir()
        for n in range(20): (d/str(n)).write_text("x")
    with ThreadPoolExecutor(4) as pool: list(pool.map(lambda k: write_text(tmp_path/f"{k}", "x"), range(16)))
    assert len(names(tmp_path)) == 16


def test_remove_tree_does_not_follow_links(tmp_path):
    (tmp_path/"keep").mkdir()
    (tmp_path/"keep"/"x").write_text("x")
    (tmp_path/"d").mkdir()
    (tmp_path/"d"/"link").symlink_to(tmp_path/"keep")
    (tmp_path/"link").symlink_to(tmp_path/"keep")
    for n in ("d", "link", "absent"): remove_tree(tmp_path/n)
    assert names(tmp_path) == ["keep"] and names(tmp_path/"keep") == ["x"]


@pytest.mark.parametrize("n, text", [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3.25*2**20, "3.2 MiB"),
                                     (2**60, "1048576.0 TiB"), (-2048, "-2.0 KiB")])
def test_human_bytes(n, text): assert human_bytes(n) == text


@pytest.mark.parametrize("s, text", [(0, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.4, "59 s"), (60, "1 min 00 s"),
                                     (125, "2 min 05 s"), (3599.7, "1 h 00 min"), (7320, "2 h 02 min")])
def test_human_time(s, text): assert human_time(s) == text


# ---------------------------------------------------------------- locks

def test_lock_is_exclusive_and_goes_away(tmp_path):
    with lock(tmp_path/"x") as file:
        assert file.name == "x.lock" and names(tmp_path) == ["x.lock"]
        with pytest.raises(Locked, match="in use by another process"), lock(tmp_path/"x"): pass
        with lock(tmp_path/"y"): pass
    assert not names(tmp_path)
    with contextlib.suppress(ZeroDivisionError), lock(tmp_path/"x"): 1/0
    assert not names(tmp_path)


def test_lock_of_the_living_and_the_dead(tmp_path):
    code = ("import sys, time; from medvol_nb.core import lock\n"
            "with lock(sys.argv[1]): print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"x")], cwd=ROOT, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with pytest.raises(Locked, match=str(child.pid)), lock(tmp_path/"x"): pass
        child.kill()
        child.wait()
        assert names(tmp_path) == ["x.lock"]
        with lock(tmp_path/"x"): pass
    assert not names(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"somebody", b"ffffff-999999999-1"])
def test_lock_of_the_unknown(tmp_path, content):
    "Another host, or nobody we know: never broken, the message says what to do"
    (tmp_path/"x.lock").write_bytes(content)
    with pytest.raises(Locked, match="remove .*x.lock"), lock(tmp_path/"x"): pass
    assert (tmp_path/"x.lock").read_bytes() == content


def test_lock_names_missing_folder(tmp_path):
    with pytest.raises(MissingFile, match="mkdir -p"), lock(tmp_path/"no"/"x"): pass
    with lock(tmp_path/("a"*245)): pass


CONTEND = """
import sys, time
from pathlib import Path
from medvol_nb.core import Locked, lock
path, times, had = Path(sys.argv[1]), int(sys.argv[2]), 0
while had < times:
    try:
        with lock(path):
            value = int(path.read_text())
            time.sleep(0.0005)
            path.write_text(str(value + 1))
            had += 1
    except Locked: time.sleep(0.0003)
"""


def test_lock_contention(tmp_path):
    "Four processes count to 160 together, beginning with the lock of a dead one: no update is lost"
    (tmp_path/"n").write_text("0")
    (tmp_path/"n.lock").write_text(f"{core._host()}-999999999-1")
    children = [subprocess.Popen([sys.executable, "-c", CONTEND, str(tmp_path/"n"), "40"], cwd=ROOT) for _ in range(4)]
    assert [c.wait(60) for c in children] == [0]*4
    assert (tmp_path/"n").read_text() == "160" and names(tmp_path) == ["n"]


def test_dead_lock_is_broken_by_one(tmp_path, monkeypatch):
    "Two breakers saw the same dead owner; the slower one must not remove the lock that the faster one took since"
    (tmp_path/"x.lock").write_text(f"{core._host()}-999999999-1")
    real, went_on = core._is_dead, []
    def slow(token):
        dead = real(token)
        if dead and not went_on:
            went_on.append(1)
            other = threading.Thread(target=enter_and_stay)
            other.start()
            time.sleep(0.3) # the other one would take the lock here if nothing kept it from doing so
        return dead
    inside_now, most, done = [], [], threading.Event()
    def hold():
        inside_now.append(1)
        most.append(len(inside_now))
        time.sleep(0.8)
        inside_now.pop()
    def enter_and_stay():
        with contextlib.suppress(Locked), lock(tmp_path/"x"): hold()
        done.set()
    monkeypatch.setattr(core, "_is_dead", slow)
    with contextlib.suppress(Locked), lock(tmp_path/"x"): hold()
    assert done.wait(10) and max(most) == 1


def test_process_token_is_not_shared_by_the_next_of_that_number():
    me = core._process_token()
    assert me.startswith(f"{os.getpid()}-") and core._process_token() == me
    assert not core._is_dead(f"{core._host()}-{me}") and core._is_dead(f"{core._host()}-{os.getpid()}-1")
    child = subprocess.Popen([sys.executable, "-c", ""])
    token = core._process_token(child.pid)
    time.sleep(0.3)
    if token: assert core._is_dead(f"{core._host()}-{token}"), "a zombie is dead"
    child.wait()
    assert core._process_token(child.pid) is None


# ---------------------------------------------------------------- journals

def test_journal(tmp_path):
    with Journal(tmp_path/"j") as j:
        for k in range(3): j.append(f"line {k} ü\u2028")
        assert len((tmp_path/"j").read_bytes().split(b"\n")) == 4, "each line is there at once"
    with open(tmp_path/"j", "ab") as f: f.write(b"torn")
    with Journal(tmp_path/"j") as j: j.append("next")
    j.close()
    assert (tmp_path/"j").read_bytes().split(b"\n")[3:] == [b"torn", b"next", b""]


def test_journal_goes_on_after_a_full_disk(tmp_path):
    code = """
import resource, sys
from medvol_nb.core import DiskFull, Journal
old = resource.getrlimit(resource.RLIMIT_FSIZE)
with Journal(sys.argv[1]) as j:
    j.append("first")
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, old[1]))
    try: j.append("second, too long")
    except DiskFull as e: print(e)
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    j.append("third")
"""
    told = python(code, tmp_path/"j")
    assert told.returncode == 0 and "intact" in told.stdout, told
    assert (tmp_path/"j").read_text().splitlines() == ["first", "sec", "third"]


# ---------------------------------------------------------------- JSON

@given(plain_values)
@settings(max_examples=150, deadline=None)
def test_json_round_trip(value):
    assert parse_json(to_json(value)) == value and parse_json(to_json(value, None)) == value
    assert to_json(value) == to_json(parse_json(to_json(value)))


@pytest.mark.parametrize("text, words", [
    ("", "line 1, column 1"), ("{", "line 1"), ('{"a": 1,}', "line 1"), ("[1, 2] 3", "Extra data"),
    ("{'a': 1}", "line 1"),
    ('{"a": 1, "a": 1}', "'a' appears twice"), ('[{"b": {"c": 1, "d": 2, "c": 3}}]', "'c' appears twice"),
    ("NaN", "NaN is not a JSON number"), ("[Infinity]", "Infinity is not"), ('{"a": -Infinity}', "-Infinity is not"),
    ("1e999", "beyond the range"), ("[-1e400]", "beyond the range"), ("9"*5000, "digits"), ("["*100_000, "too deeply"),
    ('{"a":'*50_000, "too deeply"), ('"a\nb"', "control character"), ("// no\n1", "line 1"), ("nul", "line 1"),
    ("\ufeff\ufeff1", "line 1"), ("01", "Extra data")])
def test_json_is_strict(text, words):
    with pytest.raises(FormatError, match=f"^list.json.*{words}"): parse_json(text, "list.json")


@pytest.mark.parametrize("text, value", [("1", 1), ("\ufeff[1]", [1]), ('{"": {"a": null}}', {"": {"a": None}}),
                                         ("1e-400", 0.0),
                                         ('"\\ud83d\\ude00"', "😀"), ("-0.0", -0.0), (" \n[ ]\t", [])])
def test_json_accepts(text, value): assert parse_json(text) == value


def test_read_json_names_the_place(tmp_path):
    file = tmp_path/"x.json"
    with pytest.raises(MissingFile, match="does not exist"): read_json(file)
    with pytest.raises(FormatError, match="is not a file"): read_json(tmp_path)
    file.write_bytes(b'{"a":\n"\xe9"}')
    with pytest.raises(FormatError, match="x.json, line 2: byte 0xe9 is not UTF-8"): read_json(file)
    file.write_bytes(b"[1]" + b" "*100)
    with pytest.raises(FormatError, match="103 B, at most 100 B are allowed here"): read_json(file, max_bytes=100)
    file.write_bytes(b"\xef\xbb\xbf[1]\r\n")
    assert read_json(file) == [1]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path/"pipe")
        with pytest.raises(FormatError, match="is not a file"): read_json(tmp_path/"pipe")


def test_plain():
    given_ = {"path": Path("a/b"), "i": np.int8(3), "f": np.float32(0.5), "a": np.eye(2), "s": {3, 1}, "t": (1, (2,)),
              "d": Point(1, 2.0), "b": np.True_, "n": None, 7: "int key", "z": np.array(5), "u": np.str_("x")}
    want = {"path": "a/b", "i": 3, "f": 0.5, "a": [[1.0, 0.0], [0.0, 1.0]], "s": [1, 3], "t": [1, [2]],
            "d": {"x": 1, "y": 2.0}, "b": True, "n": None, "7": "int key", "z": 5, "u": "x"}
    assert plain(given_) == want and parse_json(to_json(given_)) == want
    for bad in (object(), b"x", 1j, {"a": print}, np.array([1j])):
        with pytest.raises(TypeError): to_json(bad)
    with pytest.raises(TypeError, match="not distinct"): plain({1: "a", "1": "b"})
    for bad in (float("nan"), np.inf, [np.float32("nan")], np.array([np.nan])):
        with pytest.raises(DataError, match="no NaN or Infinity"): to_json(bad)


def test_write_json(tmp_path):
    file = tmp_path/"x.json"
    assert write_json(file, {"b": 1, "a": "ü"}) == file
    assert file.read_bytes() == '{\n  "b": 1,\n  "a": "ü"\n}\n'.encode()
    assert write_json(file, 2, "skip") == file and read_json(file) == {"b": 1, "a": "ü"}
    with pytest.raises(OutputExists): write_json(file, 2, "error")
    with pytest.raises(DataError): write_json(file, {"a": float("nan")})
    with pytest.raises(TypeError): write_json(tmp_path/"y.json", object())
    write_json(file, {os.fsdecode(b"caf\xe9.nii"): 1}) # a file name that is not UTF-8
    assert os.fsencode(next(iter(read_json(file)))) == b"caf\xe9.nii" and names(tmp_path) == ["x.json"]


# ---------------------------------------------------------------- CSV

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6) \
    | st.sampled_from(["a\nb", "a\rb", "\r\n", '"', ",", "\u2028", "\x85", "\x0b", " x ", "", "'", ";", "a,\"b\"\n\r"])


@given(st.lists(st.tuples(cells, cells), max_size=5))
@settings(max_examples=200, deadline=None)
def test_csv_round_trip(rows):
    table = [{"case": a, "note": b} for a, b in rows]
    with core.tmpdir() as d:
        write_csv(d/"t.csv", table, ["case", "note"])
        assert read_csv(d/"t.csv", ["case"]) == table


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"a,b\n1\n", "line 2: 1 fields, the header has 2"), (b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields"),
    (b"a,a\n1,2\n", "appears twice"), (b"b\n1\n", r"columns \['a'\] are missing, found \['b'\]"),
    (b"a\n\xff\n", "line 2.*UTF-8"),
    (b"a\n\"x\n", "line 2"), (b"a\n1\0\n", "NUL"), (b'a\n"x"y\n', "line 2"), (b"a\n" + b"x"*200_000, "field larger")])
def test_csv_is_strict(tmp_path, content, words):
    (tmp_path/"t.csv").write_bytes(content)
    with pytest.raises(FormatError, match=f"t.csv.*{words}"): read_csv(tmp_path/"t.csv", ["a"])


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"a,b\r\n1,2\r\n", b"a,b\r1,2\r", b"\xef\xbb\xbfa,b\n1,2",
                                     b" a , b\n\n1,2\n\n", b'"a","b"\n"1","2"\n'])
def test_csv_of_other_systems(tmp_path, content):
    (tmp_path/"t.csv").write_bytes(content)
    assert read_csv(tmp_path/"t.csv") == [{"a": "1", "b": "2"}]


def test_write_csv(tmp_path):
    file = tmp_path/"t.csv"
    write_csv(file, [{"a": 1, "b": None}, {"a": 2.5, "b": "x, y"}])
    assert file.read_bytes() == b'a,b\n1,\n2.5,"x, y"\n'
    with pytest.raises(ValueError): write_csv(file, [{"a": 1}, {"c": 2}])
    with pytest.raises(DataError, match="NUL"): write_csv(file, [{"a": "x\0"}])
    with pytest.raises(OutputExists): write_csv(file, [], on_exists="error")
    write_csv(file, [], on_exists="skip")
    assert len(read_csv(file)) == 2 and names(tmp_path) == ["t.csv"]
    write_csv(file, [], ["a", "b"])
    assert read_csv(file, ["a"]) == []


# ---------------------------------------------------------------- paths

@pytest.mark.parametrize("bad, why", [
    ("../x", "'..'"), ("a/../b", "'..'"), ("a/..", "'..'"), ("/x", "absolute"), ("//x", "absolute"), ("~", "'~'"),
    ("~u/x", "'~'"),
    ("C:/x", "Windows"), ("c:x", "Windows"), ("\\\\host\\x", "Windows"), ("a\\b", "Windows"), ("http://x/y", "address"),
    ("S3://x", "address"), ("file:///x", "address"), ("git+ssh://x", "address"), ("a\0", "control"),
    ("a\nb", "control"),
    ("\x7f", "control"), ("", "non-empty"), (None, "non-empty"), (3, "non-empty"), (b"x", "non-empty"),
    (Path("x"), "non-empty")])
def test_inside_refuses(tmp_path, bad, why):
    with pytest.raises(DataError, match=why) as e: inside(tmp_path, bad)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("good", ["x", "a/b.nii.gz", "./a", "a//b", "..x", "x..", "a/...", "-x", "a b", "ü", "it's",
                                  "$HOME", "ab:c"])
def test_inside_accepts(tmp_path, good): assert inside(tmp_path, good) == tmp_path/good


def test_inside_links(tmp_path):
    root = tmp_path/"root"
    (root/"real").mkdir(parents=True)
    (root/"ok").symlink_to("real")
    (root/"up").symlink_to("..")
    (root/"abs").symlink_to("/etc")
    (root/"loop").symlink_to("loop")
    (tmp_path/"rootother").mkdir()
    (root/"near").symlink_to(tmp_path/"rootother")
    (tmp_path/"alias").symlink_to(root)
    assert inside(root, "ok/x") == root/"ok"/"x" and inside(tmp_path/"alias", "ok/x") and inside(root, "new/y")
    for bad in ("up/x", "abs/passwd", "near/x", "ok/../../x"):
        with pytest.raises(DataError): inside(root, bad)


# ---------------------------------------------------------------- progress, optional

def test_progress(monkeypatch, caplog):
    for k in ("MEDVOL_QUIET", "IN_TEST", "PYTEST_CURRENT_TEST"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    clock = itertools.count(0, 5)
    monkeypatch.setattr(core, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO, "medvol_nb"):
        assert list(progress(range(100), "counting")) == list(range(100))
        assert list(progress(iter("abc"), "unknown length")) == ["a", "b", "c"] and list(progress([])) == []
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 10, "one line for every tenth"
    assert lines[0].startswith("counting: 10 of 100 it") and lines[-1].startswith("counting: 100 of 100")
    monkeypatch.setenv("MEDVOL_QUIET", "1")
    assert list(progress(range(3))) == [0, 1, 2] and len(caplog.records) == 10


def test_optional(tmp_path, monkeypatch):
    assert optional("json", "x") is json
    for name in ("no_such_package", "no_such_package.below", "json.no_such_part"):
        with pytest.raises(MissingExtra, match=r"pip install 'medvol_nb\[gen\]'"): optional(name, "gen")
    (tmp_path/"broken_package.py").write_text("import needs_this_other_one")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match="is installed but does not import: No module named 'needs_this"):
        optional("broken_package", "gen")
