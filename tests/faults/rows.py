"""One row of the table of faults = one test that records its instances and fails if one of them does not hold."""
import contextlib
import re
import time
from collections.abc import Iterator

import pytest


class SilentlyWrong(AssertionError):
    "The worst outcome: no error, and a wrong result"


class Instances:
    "Counts the instances of a row; all run, whatever happens to some of them"

    def __init__(self, row: int, record):
        self.data = {"row": row, "total": 0, "passed": 0, "silently_wrong": 0, "worst_seconds": 0.0}
        self.problems: list[str] = []
        self.checked = False
        record("instances", self.data)

    @contextlib.contextmanager
    def __call__(self, name: object) -> Iterator[None]:
        "One instance; an exception in the block is its failure"
        start = time.perf_counter()
        self.data["total"] += 1
        try: yield
        except Exception as e:
            self.data["silently_wrong"] += isinstance(e, SilentlyWrong)
            self.problems.append(f"{name}: {type(e).__name__}: {e}")
        else: self.data["passed"] += 1
        finally: self.data["worst_seconds"] = max(self.data["worst_seconds"], time.perf_counter() - start)

    @contextlib.contextmanager
    def refuses(self, name: object, kind: type[Exception], *words: str) -> Iterator[None]:
        "One instance that must end in an error of this library, with `words` in its one message"
        with self(name):
            try: yield
            except kind as e:
                lacking = [w for w in words if not re.search(w, str(e))]
                assert not lacking, f"message {str(e)!r} lacks {lacking}"
                return
            raise SilentlyWrong(f"no {kind.__name__}")

    def check(self, total: int) -> None:
        "At the end of the test: all of them ran and held"
        self.checked = True
        shown = "\n  ".join(self.problems[:20])
        assert not self.problems, f"{len(self.problems)} of {self.data['total']} instances do not hold:\n  {shown}"
        assert self.data["total"] == total, f"{self.data['total']} instances ran, the row asks for {total}"


def sampled(full: int, quick: int):
    "Parametrise `count`: a seeded sample in CI, all instances when slow tests run"
    return pytest.mark.parametrize("count", [pytest.param(quick, id=f"{quick}_of_{full}"),
                                             pytest.param(full, id="all", marks=pytest.mark.slow)])
