"""Driver of the notebook workflow: percent sources in nbs/ -> notebooks -> package.

    python nbs/_dev.py build  [--force]     nbs/*.py -> nbs/*.ipynb (ids from content, old outputs kept)
    python nbs/_dev.py sync                 two-way with Jupyter edits, newest wins, then build
    python nbs/_dev.py export               build, then nbdev_export
    python nbs/_dev.py check                export must leave no difference; sources must survive a round trip
    python nbs/_dev.py test   [names ...] [--flags "slow gpu net"] [--max-seconds 60] [--workers 2]
"""
import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs

NBS = Path(__file__).resolve().parent
ROOT = NBS.parent
PACKAGE = ROOT/"medvol_nb"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    "Percent scripts that are notebooks, in page order"
    return sorted(p for p in NBS.glob("*.py") if not p.name.startswith("_"))


def first_name(source: str) -> str | None:
    "Name of the first definition or assignment of an exported cell; 'imports' if it has none"
    try: body = ast.parse(source).body
    except SyntaxError: return None
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): return node.name
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name): return target.id
    return "imports"


def set_ids(nb) -> None:
    "Give every cell an id that depends on its content alone"
    seen: dict[str, int] = {}
    for cell in nb.cells:
        exported = cell.cell_type == "code" and re.match(r"#\s*\|\s*exports?i?\b", cell.source)
        name = first_name(cell.source) if exported else None
        base = name or hashlib.sha1((cell.cell_type + cell.source).encode()).hexdigest()[:8]
        base = re.sub(r"[^A-Za-z0-9_-]", "-", base)[:56]
        seen[base] = seen.get(base, 0) + 1
        cell["id"] = base if seen[base] == 1 else f"{base}-{seen[base]}"


def inputs(nb) -> list[tuple[str, str]]: return [(c.cell_type, c.source) for c in nb.cells]


def build(force: bool = False) -> int:
    "One way, .py -> .ipynb; refuses to overwrite a Jupyter edit that was never synchronised"
    unsynced = []
    for py in sources():
        nb = jupytext.read(py)
        nb.metadata["kernelspec"] = KERNEL
        ipynb = py.with_suffix(".ipynb")
        old = nbformat.read(ipynb, as_version=4) if ipynb.exists() else None
        if old is not None:
            if inputs(old) != inputs(nb) and ipynb.stat().st_mtime > py.stat().st_mtime and not force:
                unsynced.append(ipynb.name)
                continue
            nb = combine_inputs_with_outputs(nb, old)
            nb.metadata["kernelspec"] = KERNEL
        set_ids(nb)
        nb.nbformat, nb.nbformat_minor = 4, 5
        text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if old is None or ipynb.read_text(encoding="utf-8") != text: # at once: another build may be reading
            new = ipynb.with_suffix(f".ipynb.{os.getpid()}")
            new.write_text(text, encoding="utf-8")
            os.replace(new, ipynb)
        stat = py.stat()
        os.utime(ipynb, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for orphan in NBS.glob("*.ipynb"):
        if not orphan.with_suffix(".py").exists(): unsynced.append(f"{orphan.name} (has no source)")
    if unsynced:
        print("not built, the notebook is newer than its source: " + ", ".join(unsynced) +
              "\nrun `python nbs/_dev.py sync` to keep the edit, `build --force` to drop it", file=sys.stderr)
    return 1 if unsynced else 0


def sync() -> int:
    "Two way, newest wins, then build"
    paired = [str(p) for p in sorted(NBS.glob("*.ipynb"))]
    if paired and (rc := subprocess.run([sys.executable, "-m", "jupytext", "--sync", *paired], cwd=NBS).returncode):
        return rc
    return build()


def tool(name: str) -> list[str]:
    "The nbdev command beside this interpreter, in either spelling (nbdev 2: nbdev_export, nbdev 3: nbdev-export)"
    folder = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for spelling in (name, name.replace("_", "-")):
        if found := shutil.which(spelling, path=folder): return [found]
    raise SystemExit(f"{name} is not installed: pip install -e '.[dev]'")


def export() -> int:
    if rc := build(): return rc
    return subprocess.run(tool("nbdev_export"), cwd=ROOT).returncode


def check() -> int:
    if rc := export(): return rc
    problems = []
    status = subprocess.run(["git", "status", "--porcelain", "--", "medvol_nb"], cwd=ROOT, capture_output=True,
                            text=True)
    if status.returncode: problems.append(f"git status failed: {status.stderr.strip()}")
    if status.stdout.strip():
        problems.append("the package differs from the notebooks (run `_dev.py export` and commit):\n" + status.stdout)
    wanted = set()
    for py in sources():
        text = py.read_text(encoding="utf-8")
        named = re.findall(r"^#\s*\|\s*default_exp\s+(\S+)", text, re.M)
        wanted |= {n.replace(".", "/") + ".py" for n in named}
        if jupytext.writes(jupytext.reads(text, "py:percent"), "py:percent") != text:
            problems.append(f"{py.name} does not survive a round trip through jupytext: open it in Jupyter and save")
    for module in PACKAGE.rglob("*.py"):
        name = module.relative_to(PACKAGE).as_posix()
        if module.name not in ("__init__.py", "_modidx.py") and name not in wanted:
            problems.append(f"medvol_nb/{name} has no notebook: delete it")
    for p in problems: print(p, file=sys.stderr)
    return 1 if problems else 0


def test(names: list[str], flags: str, max_seconds: float, workers: int) -> int:
    if rc := build(): return rc
    picked = [p for p in sources() if not names or any(p.stem == n or p.stem.startswith(n) for n in names)]
    if not picked:
        print(f"no notebook matches {names}", file=sys.stderr)
        return 2
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "IN_TEST": "1", "MPLBACKEND": "agg",
           "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    new = subprocess.run([*tool("nbdev_test"), "--help"], capture_output=True, text=True).stdout
    three = "--n-workers" in new
    start = time.time()
    common = ["--n-workers" if three else "--n_workers", str(workers), "--timing"]
    if flags: common += ["--flags", flags]
    runs = [[]] if not names else [[str(p.with_suffix(".ipynb"))] for p in picked]
    failed, out = 0, ""
    for one in runs:
        where = (one if three else ["--path", *one]) if one else []
        run = subprocess.run([*tool("nbdev_test"), *common, *where], cwd=ROOT, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(run.stdout, end="", flush=True)
        out += run.stdout
        failed = failed or run.returncode
    timed = re.findall(r"(\S+\.ipynb)\D{0,40}?(\d+\.?\d*)\s*s", out)
    slow = [(n, float(t)) for n, t in timed if float(t) > max_seconds]
    for name, seconds in slow: print(f"{name} took {seconds:.0f} s, the limit is {max_seconds:g} s", file=sys.stderr)
    print(f"{len(picked)} notebooks {'FAILED' if failed else 'passed'} in {time.time() - start:.0f} s")
    return int(bool(failed or slow))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="verb", required=True)
    sub.add_parser("build").add_argument("--force", action="store_true")
    for verb in ("sync", "export", "check"): sub.add_parser(verb)
    t = sub.add_parser("test")
    t.add_argument("names", nargs="*")
    t.add_argument("--flags", default="")
    t.add_argument("--max-seconds", type=float, default=60)
    t.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    if a.verb == "build": return build(a.force)
    if a.verb == "test": return test(a.names, a.flags, a.max_seconds, a.workers)
    return {"sync": sync, "export": export, "check": check}[a.verb]()


if __name__ == "__main__": raise SystemExit(main())
