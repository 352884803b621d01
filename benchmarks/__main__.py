"""python -m benchmarks FAMILY [--row NAME] [--full] [--json] [--write]

A family is a module of this folder with `ROWS`, a dict from the name of a group of rows to a function of `full` that
returns them; `all` runs every family.
"""
import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ.setdefault(_name, "1") # before NumPy is there
os.environ.setdefault("MEDVOL_QUIET", "1")

import argparse  # noqa: E402
import datetime  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.common import Row, machine, table  # noqa: E402
from medvol_nb.core import write_text  # noqa: E402

HERE = Path(__file__).resolve().parent
RESULTS = HERE/"RESULTS.md"
HEAD = """# Benchmarks

Written by `python -m benchmarks FAMILY --write`. Medians of interleaved runs in one process, one thread unless a row
says otherwise. `ratio` is reference / ours, so 2 means twice as fast; `share` is floor / ours, where the floor is the
time no implementation can beat. `python -m benchmarks FAMILY --json` also tells processor times and spread.
"""


def families() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_") and p.stem != "common")


def run(family: str, only: str | None, full: bool) -> list[Row]:
    module, rows = importlib.import_module(f"benchmarks.{family}"), []
    short = only.removeprefix(f"{family}.") if only else None
    groups = [g for g in module.ROWS if short is None or short == g or short.startswith(f"{g}_")]
    if short in module.ROWS: groups = [short]
    for g in groups:
        start = time.perf_counter()
        rows += [r for r in module.ROWS[g](full) if short in (None, g) or r.row == f"{family}.{short}"]
        print(f"{family}.{g}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not rows: raise SystemExit(f"no row {only!r} in {family}; groups: {', '.join(module.ROWS)}")
    return rows


def section(family: str, rows: list[Row], full: bool) -> str:
    about = "\n".join(f"* {k}: {v}" for k, v in machine().items())
    today = datetime.date.today().isoformat()
    date = f"* date: {today}{' (large sizes)' if full else ''}"
    return f"## {family}\n\n{date}\n{about}\n\n{table(rows, markdown=True)}\n"


def sections() -> dict[str, str]:
    "Family -> its section in RESULTS.md"
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    return {m[1]: m[0].rstrip() + "\n" for m in re.finditer(r"^## (\S+)\n.*?(?=^## |\Z)", old, re.M | re.S)}


def put(family: str, text: str) -> None:
    "Replace a section of RESULTS.md"
    parts = sections() | {family: text}
    write_text(RESULTS, HEAD + "".join(f"\n{parts[k]}" for k in sorted(parts)))


def write(family: str, rows: list[Row], full: bool, whole: bool) -> None:
    "Replace the section of one family in RESULTS.md, or single rows of it"
    old, new = sections(), section(family, rows, full)
    if not whole and family in old:
        lines = {line.split(" | ")[0]: line for line in new.splitlines() if line.startswith(f"| {family}.")}
        kept = [lines.pop(line.split(" | ")[0], line) for line in old[family].splitlines()]
        new = "\n".join([*kept, *lines.values()]) + "\n"
    put(family, new)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=[*families(), "all"])
    parser.add_argument("--row", help="only this row or group of rows, such as core.gzip_read")
    parser.add_argument("--full", action="store_true", help="large sizes")
    parser.add_argument("--json", action="store_true", help="one list of objects")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    a = parser.parse_args()
    rows: list[Row] = []
    for family in families() if a.family == "all" else [a.family]:
        found = run(family, a.row, a.full)
        if a.write: write(family, found, a.full, a.row is None)
        rows += found
    print(json.dumps([asdict(r) for r in rows], indent=1) if a.json else table(rows))
    return 0


if __name__ == "__main__": raise SystemExit(main())
