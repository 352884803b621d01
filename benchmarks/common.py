"""Timing that can be trusted: both sides in one process, interleaved, medians, one thread unless a row says otherwise.

`ratio` is reference / ours: 2 means twice as fast. `floor` is the time no implementation can beat for this row, such as
one pass of the bare decompressor over the same bytes; `share` is floor / ours, 1 means nothing is left to gain.
"""
import contextlib
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

DATA = Path(os.environ.get("MEDVOL_DATA", Path(__file__).resolve().parents[1]/"../shared/data"))  # real volumes


@dataclass
class Row:
    row: str  # 'family.name'
    what: str  # what was done, with sizes
    ours: float  # median, in `unit`
    reference: float  # median, in `unit`
    unit: str
    ratio: float  # reference / ours
    floor: float | None = None  # in `unit`
    share: float | None = None  # floor / ours
    bar: float | None = None  # smallest ratio that was asked for
    note: str = ""
    ours_cpu: float | None = None  # processor time, median, in `unit`
    reference_cpu: float | None = None
    runs: int = 0
    spread: tuple = field(default=())  # smallest and largest ratio of neighbouring runs


def clock(f: Callable) -> tuple[float, float]:
    "Wall and processor seconds of one call; processor time of ended child processes counts"
    def spent():
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usage)
    c0, w0 = spent(), time.perf_counter()
    f()
    return time.perf_counter() - w0, spent() - c0


def interleaved(calls: dict[str, Callable], runs: int = 7, warm_up: int = 1) -> dict[str, list[tuple[float, float]]]:
    "Wall and processor seconds of each call, taken in turns so that a slow minute of the machine hits all alike"
    for _ in range(warm_up):
        for f in calls.values(): f()
    out: dict[str, list] = {k: [] for k in calls}
    for _ in range(runs):
        for k, f in calls.items(): out[k].append(clock(f))
    return out


def median(times: list[tuple[float, float]], which: int = 0) -> float: return statistics.median(t[which] for t in times)


def compare(row: str, what: str, ours: Callable, reference: Callable, floor: Callable | float | None = None, *,
            unit: str = "ms", runs: int = 7, warm_up: int = 1, items: int = 1, bar: float | None = None, note: str = "",
            others: dict[str, Callable] | None = None, cpu: bool = False) -> Row:
    "Time both sides; `others` go into the note; `cpu` compares processor instead of wall time"
    scale = {"s": 1, "ms": 1e3, "us": 1e6}[unit.split("/")[0]]/items
    calls = {"ours": ours, "reference": reference, **(others or {})}
    if callable(floor): calls["floor"] = floor
    t = interleaved(calls, runs, warm_up)
    which = int(cpu)
    a, b = median(t["ours"], which), median(t["reference"], which)
    low = median(t["floor"], which) if callable(floor) else floor
    ratios = [y[which]/x[which] for x, y in zip(t["ours"], t["reference"]) if x[which]]
    notes = [note] if note else []
    notes += [f"{k} {median(t[k], which)*scale:.3g} {unit}" for k in others or {}]
    floor_and_share = (None, None) if low is None else (low*scale, low/a)
    return Row(row, what, a*scale, b*scale, unit, b/a, *floor_and_share, bar, "; ".join(notes),
               median(t["ours"], 1)*scale, median(t["reference"], 1)*scale, runs,
               (min(ratios), max(ratios)) if ratios else ())


@contextlib.contextmanager
def threads(n: int = 1):
    "All numeric libraries limited to `n` threads"
    from threadpoolctl import threadpool_limits
    with threadpool_limits(n):
        with contextlib.suppress(ImportError):
            import torch
            torch.set_num_threads(n)
        yield


def copy_bandwidth() -> float:
    "Bytes read and written a second by one large copy"
    a = np.ones(2**26, np.float32)
    b = np.empty_like(a)
    return 2*a.nbytes/median(interleaved({"copy": lambda: np.copyto(b, a)}, 5)["copy"])


def machine() -> dict[str, str]:
    "What the numbers were measured on; no names of hosts or people"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    from medvol_nb.parallel import cpu_count
    packages = {}
    for name in ("numpy", "scipy", "nibabel", "isal", "zarr", "torch", "monai", "joblib"):
        with contextlib.suppress(PackageNotFoundError): packages[name] = version(name)
    return {"cpu": f"{model}, {cpu_count()} cores usable", "threads": os.environ.get("OMP_NUM_THREADS", "not limited"),
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "packages": ", ".join(f"{k} {v}" for k, v in packages.items())}


def number(x: float | None) -> str:
    if x is None: return ""
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


COLUMNS = ("row", "what", "ours", "reference", "unit", "ratio", "bar", "floor", "share", "note")


def cells(r: Row) -> list[str]:
    d = asdict(r)
    text = {k: number(v) if isinstance(v, float) or v is None else str(v) for k, v in d.items()}
    text["ratio"] = f"{r.ratio:.2f}"
    if r.share is not None: text["share"] = f"{r.share:.0%}"
    if r.bar is not None: text["bar"] = f"{'met' if r.ratio >= r.bar else 'MISSED'} (>= {r.bar:g})"
    return [text[c] for c in COLUMNS]


def table(rows: list[Row], markdown: bool = False) -> str:
    "Aligned columns, or a Markdown table"
    lines = [list(COLUMNS), *(cells(r) for r in rows)]
    if markdown:
        lines.insert(1, ["---"]*len(COLUMNS))
        return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)
    widths = [max(len(line[k]) for line in lines) for k in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)
