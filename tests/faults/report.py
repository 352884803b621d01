"""Run the rows of the table of faults and print what holds.

    python -m tests.faults.report [--quick] [rows ...] [-- options of pytest]

One line a row: number, name, instances passed of all, silently wrong results (must be 0), the longest instance, time.
The last line counts the rows passed and names those that no test is written for yet.
"""
import argparse
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
N_ROWS = 46
NAME = re.compile(r"test_row_(\d\d)_(\w+)")


@dataclass
class Row:
    "What the tests of a row said"
    names: list[str] = field(default_factory=list)
    passed: int = 0 # instances
    total: int = 0 # instances
    silently_wrong: int = 0
    worst: float = 0.0 # [s] longest instance
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list) # tests
    skipped: list[str] = field(default_factory=list) # tests
    ran: int = 0 # tests

    @property
    def state(self) -> str:
        return "FAILED" if self.failed else "passed" if self.ran and not self.skipped else "part skipped" if self.ran \
            else "skipped"


class Collector:
    "pytest plug-in: sums what the rows recorded"

    def __init__(self): self.rows: dict[int, Row] = defaultdict(Row)

    def pytest_runtest_logreport(self, report):
        if not (m := NAME.search(report.nodeid)): return
        row, name = self.rows[int(m[1])], m[2]
        row.seconds += report.duration
        if name not in row.names: row.names.append(name)
        expected_failure = hasattr(report, "wasxfail") and not report.passed
        if report.failed or expected_failure: row.failed.append(report.nodeid)
        elif report.skipped: row.skipped.append(report.nodeid)
        if report.when != "call" or (report.skipped and not expected_failure): return
        row.ran += 1
        for key, data in report.user_properties:
            if key != "instances": continue
            row.passed += data["passed"]
            row.total += data["total"]
            row.silently_wrong += data["silently_wrong"]
            row.worst = max(row.worst, data["worst_seconds"])


def written() -> set[int]:
    "Rows that a test is named after, whether it was run or not"
    return {int(n) for p in FOLDER.glob("test_*.py") for n, _ in NAME.findall(p.read_text(encoding="utf-8"))}


def table(rows: dict[int, Row]) -> str:
    lines = [f"{'row':>3}  {'name':<42} {'instances':>13}  {'silent':>6}  {'longest':>8}  {'time':>8}  result"]
    for number, r in sorted(rows.items()):
        names = ", ".join(r.names)
        names = names if len(names) <= 42 else names[:39] + "..."
        counts = f"{r.passed}/{r.total}"
        lines.append(f"{number:>3}  {names:<42} {counts:>13}  {r.silently_wrong:>6}  {r.worst:>6.1f} s  "
                     f"{r.seconds:>6.1f} s  {r.state}")
        lines += [f"       failed: {t}" for t in r.failed]
    return "\n".join(lines)


def summary(rows: dict[int, Row]) -> str:
    good = [n for n, r in rows.items() if r.state == "passed"]
    absent = sorted(set(range(1, N_ROWS + 1)) - written())
    return (f"{len(good)} of {N_ROWS} rows passed, {sum(r.passed for r in rows.values())} of "
            f"{sum(r.total for r in rows.values())} instances, {sum(r.silently_wrong for r in rows.values())} silently "
            f"wrong; not yet written: {' '.join(map(str, absent)) or 'none'}")


def main(argv: list[str] | None = None) -> int: # 0 if every row that ran passed
    argv = sys.argv[1:] if argv is None else argv
    own, extra = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, help="numbers of rows; default: all")
    parser.add_argument("--quick", action="store_true", help="the sample that runs in CI, not the full counts")
    a = parser.parse_args(own)
    collector = Collector()
    options = [str(FOLDER), "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", *extra]
    marks = ["not gpu and not net and not browser"] + (["not slow"] if a.quick else [])
    options += ["-m", " and ".join(marks)]
    if a.rows: options += ["-k", " or ".join(f"test_row_{n:02d}_" for n in a.rows)]
    code = pytest.main(options, plugins=[collector])
    print("\n" + table(collector.rows) + "\n" + summary(collector.rows))
    if code not in (0, 1, 5): return int(code)
    return int(any(r.failed or r.silently_wrong for r in collector.rows.values()) or not collector.rows)


if __name__ == "__main__": raise SystemExit(main())
