"""Faults to inject: damaged bytes, malicious content, full disks, and death at a chosen moment.

What must really die (SIGKILL), run out of room or lack permissions runs in a child of a zygote: a clean process that
has imported everything once and forks for every call. `python -m tests.faults.injectors` is that process.
"""
import contextlib
import importlib
import json
import os
import pickle
import random
import resource
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
STEPS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


# ---------------------------------------------------------------- damaged bytes

def bit_flips(data: bytes, n: int, seed: int = 0) -> Iterator[tuple[int, bytes]]:
    "`n` copies of `data`, each with one flipped bit, at distinct seeded places: (bit index, damaged bytes)"
    for at in sorted(random.Random(seed).sample(range(8*len(data)), n)):
        bad = bytearray(data)
        bad[at//8] ^= 1 << at % 8
        yield at, bytes(bad)


def truncations(data: bytes, n: int) -> Iterator[tuple[int, bytes]]:
    "`n` proper prefixes of `data`, evenly spread, the first empty and the last one byte short: (length, bytes)"
    assert n <= len(data)
    for k in range(n):
        length = k*(len(data) - 1)//max(1, n - 1)
        yield length, data[:length]


# ---------------------------------------------------------------- malicious content

@dataclass(frozen=True)
class Canary:
    "Makes the folder `path` when it is unpickled or its commands run; a test then asserts that it is absent"
    path: Path

    def __reduce__(self): return os.mkdir, (str(self.path),)

    @property
    def sang(self) -> bool: return self.path.exists()

    def pickled(self) -> bytes: return pickle.dumps({"weights": self})

    def texts(self) -> list[str]:
        "The same as words of configuration languages"
        make = f"__import__('os').mkdir('{self.path}')"
        return [f"$__import__('os').mkdir('{self.path}')", f"$import os; os.mkdir('{self.path}')", f"${{{make}}}",
                f"{{{{ {make} }}}}", f"%({make})s", f"`mkdir {self.path}`", f"$(mkdir {self.path})", make]

    def yaml(self) -> list[str]:
        p = self.path
        return [f"!!python/object/apply:os.mkdir ['{p}']", f"!!python/object/apply:os.system ['mkdir {p}']",
                "!!python/name:os.mkdir", "!!python/module:os", f"!!python/object/new:os.mkdir ['{p}']",
                f"!!python/object/apply:subprocess.run [['mkdir', '{p}']]",
                f"!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{p}']", f"!include {p}", f"!mkdir {p}"]


# ---------------------------------------------------------------- no room, no time

@contextlib.contextmanager
def disk_full(limit: int) -> Iterator[None]:
    "No file may grow past `limit` bytes inside the block. Use in a child process: it also holds for its log files"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)


class StepKiller:
    "Counts the steps of this process on names below `folder`; ends it before step `at` (from 1), or `pause` s later"

    def __init__(self, folder: str, at: int | None = None, pause: float = 0):
        self.count, self.at, self.pause, self.folder = 0, at, pause, folder
        if pause: signal.signal(signal.SIGALRM, signal.SIG_DFL) # the kernel ends the process, no handler runs
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if event not in STEPS or not any(isinstance(a, str) and a.startswith(self.folder) for a in args): return
        self.count += 1
        if self.count != self.at: return
        if not self.pause: os.kill(os.getpid(), signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, self.pause)


def forked(job: Callable[[], Any], folder: str | os.PathLike, at: int | None = None, pause: float = 0) -> int:
    "Run `job()` in a fork that dies at step `at` on names below `folder` (see StepKiller): steps, or minus the signal"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            killer = StepKiller(os.fspath(folder), at, pause)
            job()
            os.write(write, str(killer.count).encode())
        except BaseException: traceback.print_exc()
        finally: os._exit(0)
    os.close(write)
    with open(read) as pipe: steps = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): return -os.WTERMSIG(status)
    assert steps, "the job raised in the fork; see its traceback above"
    return int(steps)


# ---------------------------------------------------------------- children

@dataclass(frozen=True)
class Outcome:
    "What became of a call in a child"
    value: Any = None # what the function returned
    error: str = "" # class names of the exception, from special to general, separated by spaces
    message: str = "" # its text
    signal: int = 0 # number of the signal that ended the child
    steps: int = 0 # steps counted below the folder

    @property
    def killed(self) -> bool: return self.signal == signal.SIGKILL


def _child(order: dict, out: int) -> None:
    try:
        if order["user"] is not None:
            os.setgroups([])
            os.setgid(order["user"])
            os.setuid(order["user"])
        killer = StepKiller(order["folder"], order["kill_at"]) if order["folder"] else None
        module, _, name = order["job"].partition(":")
        job = getattr(importlib.import_module(module), name)
        limit = contextlib.nullcontext() if order["room"] is None else disk_full(order["room"])
        reply: dict = {}
        try:
            with limit: reply["value"] = job(*order["args"])
        except BaseException as e:
            reply |= {"error": " ".join(c.__name__ for c in type(e).__mro__), "message": str(e)}
            if os.environ.get("FAULTS_DEBUG"): traceback.print_exc()
        reply["steps"] = killer.count if killer else 0
        os.write(out, json.dumps(reply).encode())
    finally: os._exit(0)


def _serve() -> None:
    "The zygote: one order a line, one reply a line"
    for name in filter(None, os.environ.get("FAULTS_PRELOAD", "").split()): importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            _child(order, write)
        os.close(write)
        with selectors.DefaultSelector() as ready, open(read, "rb") as pipe:
            ready.register(read, selectors.EVENT_READ)
            limit = order["kill_after"] if order["kill_after"] is not None else order["timeout"]
            if not ready.select(limit): os.kill(pid, signal.SIGKILL)
            reply = pipe.read()
        _, status = os.waitpid(pid, 0)
        answer = json.loads(reply) if reply else {}
        if os.WIFSIGNALED(status): answer["signal"] = os.WTERMSIG(status)
        print(json.dumps(answer), flush=True)


class Zygote:
    "Starts jobs `module:function` in fresh children with a fault"

    def __init__(self, *preload: str):
        env = {**os.environ, "FAULTS_PRELOAD": " ".join(preload), "OMP_NUM_THREADS": "1", "IN_TEST": "1",
               "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen([sys.executable, "-m", "tests.faults.injectors"], cwd=ROOT, env=env, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(
        self,
        job: str, # 'module:function'
        *args: Any, # plain values
        folder: str | os.PathLike = "", # steps on names below it are counted
        kill_at: int | None = None, # SIGKILL before this step
        kill_after: float | None = None, # [s] SIGKILL then
        room: int | None = None, # [byte] no file may grow larger
        user: int | None = None, # user id to change to
        timeout: float = 60, # [s] SIGKILL then, too
    ) -> Outcome:
        order = {"job": job, "args": args, "folder": os.fspath(folder), "kill_at": kill_at, "kill_after": kill_after,
                 "room": room, "user": user, "timeout": timeout}
        print(json.dumps(order, default=os.fspath), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _run(command: list[str], timeout: float, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([sys.executable, *command], env=env, text=True, capture_output=True, timeout=timeout,
                          **options)


def run_python(code: str, *args: Any, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    "Run Python text in a fresh process with the repository on its path"
    return _run(["-c", code, *map(str, args)], timeout, **options)


def run_script(path: Path, *args: Any, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    "Run a file as a script, with the repository on its path"
    return _run([str(path), *map(str, args)], timeout, **options)


if __name__ == "__main__": _serve()
