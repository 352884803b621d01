"""What an import and a help text may cost. Every module is imported in a process of its own."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/"medvol_nb"
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted(PACKAGE.rglob("*.py"))
           if p.name not in ("__init__.py", "_modidx.py")]

LIGHT = {f"medvol_nb.{m}" for m in """core config parallel phantoms volume intensity grid plot signatures cli doctor
    demo report""".split()}
NEVER = {"monai", "diffusers", "transformers", "torchvision"}
HEAVY = NEVER | {"torch", "sklearn", "pandas", "matplotlib", "skimage", "SimpleITK", "dask", "torchio"}

IMPORT = "import importlib, json, sys; importlib.import_module(sys.argv[1]); print(json.dumps(sorted(sys.modules)))"
HELP_LIMIT, IMPORT_LIMIT = 1.0, 0.5  # [s] of CPU, user and system together


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    drop = ("COVERAGE_PROCESS_START", "PYTHONPROFILEIMPORTTIME")
    return {k: v for k, v in os.environ.items() if k not in drop} | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def cpu_seconds(*argv: str) -> tuple[float, str]:
    "CPU time of a child and of all it started and waited for, and what it printed; fails if the child does"
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=environment())
    out = process.stdout.read().decode("utf-8", "replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert process.returncode == 0, f"{' '.join(argv)} ended with {process.returncode}:\n{out}"
    return usage.ru_utime + usage.ru_stime, out


def best_of(n: int, limit: float, *argv: str) -> tuple[float, str]:
    "Smallest CPU time of up to `n` runs; no more runs once one is within the limit"
    best, out = float("inf"), ""
    for _ in range(n):
        seconds, out = cpu_seconds(*argv)
        best = min(best, seconds)
        if best < limit: break
    return best, out


@pytest.mark.parametrize("module", MODULES)
def test_import_leaves_heavy_packages_out(module):
    loaded = set(json.loads(cpu_seconds("-c", IMPORT, module)[1].splitlines()[-1]))
    forbidden = HEAVY if module in LIGHT else NEVER
    assert sorted(forbidden & loaded) == [], f"import {module} loads what it should load inside functions"


def test_import_of_the_package_is_quick():
    seconds, out = best_of(3, IMPORT_LIMIT, "-c", IMPORT, "medvol_nb")
    assert seconds < IMPORT_LIMIT, f"import medvol_nb takes {seconds:.2f} s of CPU"
    assert not HEAVY & set(json.loads(out.splitlines()[-1]))


def commands() -> list[list[str]]:
    "Every command of the command line, as the words that select it; groups included"
    if not (PACKAGE/"cli.py").exists(): return []
    script = """
import json, typer
from medvol_nb import cli
def walk(command, words):
    yield words
    if hasattr(command, "list_commands"):
        context = command.make_context(words[-1] if words else "medvol", [], resilient_parsing=True)
        for name in command.list_commands(context): yield from walk(command.get_command(context, name), [*words, name])
print(json.dumps(list(walk(typer.main.get_command(cli.build_app()), []))))
"""
    run = subprocess.run([sys.executable, "-c", script], env=environment(), cwd=ROOT, capture_output=True, text=True)
    try: return json.loads(run.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError): return [["--cannot-list-commands", run.stderr[-2000:]]]


COMMANDS = commands()


def test_the_command_line_lists_its_commands():
    assert COMMANDS[0] == [], f"the commands of medvol_nb.cli could not be listed: {COMMANDS[0][-1]}"
    assert len(COMMANDS) > 1


@pytest.mark.parametrize("words", [w for w in COMMANDS if "--cannot-list-commands" not in w],
                         ids=lambda w: "-".join(w) or "medvol")
def test_help_is_quick(words):
    seconds, out = best_of(3, HELP_LIMIT, "-m", "medvol_nb.cli", *words, "--help")
    assert "Usage" in out
    assert seconds < HELP_LIMIT, f"medvol {' '.join(words)} --help takes {seconds:.2f} s of CPU"
