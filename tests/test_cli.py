"""Page 90: commands made from signatures; names, help, defaults, exit codes, and what goes to which stream."""
import ast
import importlib
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from medvol_nb import __version__, cli
from medvol_nb.core import ConfigError
from medvol_nb.core import log as logger
from medvol_nb.signatures import function_doc

ROOT = Path(__file__).resolve().parents[1]

TOOLS = '''
"Functions of a fake page"
import os
from pathlib import Path
from typing import Literal

from medvol_nb.core import DataError, log
from medvol_nb.parallel import BatchError, Failure, pmap

DEFAULT = (1.0, 2.0, 3.0)
Kind = Literal["soft_max", "sharp"]

def echo(
    path: str | os.PathLike, # what to read
    n_ensembles: int = 5, # how many, at
                          # most
    *,
    spacing: float | None = None, # target voxel size [mm]
    patch_size: tuple[float, ...] = DEFAULT, # of a patch
    box: tuple[int, int, int] = (1, 2, 3), # three numbers
    names: list[str] = (), # repeated
    kind: Kind = "soft_max", # how
    use_ema: bool = True, # average
    out: str | os.PathLike | None = None, # where to
) -> dict: # what came in
    "Say what was given"
    log.info("echo runs")
    return {k: v if not isinstance(v, os.PathLike) else Path(v) for k, v in locals().items()}

def fail(
    how: str, # which fault
) -> None:
    "Fail in some way"
    if how == "batch": pmap(lambda x: 1/x, [1, 0, 2], keys=["p1", "p2", "p3"])
    if how == "data": raise DataError("label grid differs: case 'p017'. Resample the label")
    if how == "missing": open("/no/such/file")
    if how == "interrupt": raise KeyboardInterrupt
    if how == "bug": return {}["key"]
    if how == "memory": raise MemoryError
    if how == "not ok": return {"ok": False, "problems": ["one"]}
    if how == "nan": return {"dice": float("nan")}

def sleep(
    seconds: float = 30.0, # [s]
) -> None:
    "Wait"
    import time
    print("sleeping", flush=True)
    time.sleep(seconds)

def nested() -> dict:
    "A result of several levels"
    return {"text": "a", "numbers": (1, 2.5), "rows": [{"x": 1, "y": "b"}], "empty": {}, "none": None,
            "deep": {"k": [Path("p")]}}
'''


@pytest.fixture
def clean(monkeypatch):
    "Loggers and environment as before"
    handlers, level = logger.handlers[:], logger.level
    for h in handlers: logger.removeHandler(h)
    monkeypatch.setenv("MEDVOL_QUIET", "") # so that what a command sets is undone
    yield
    for h in logger.handlers[:]: logger.removeHandler(h)
    for h in handlers: logger.addHandler(h)
    logger.setLevel(level)


@pytest.fixture
def medvol(tmp_path, monkeypatch, capfd, clean):
    "Run a command line in this process, with the fake commands in the table"
    (tmp_path/"fake_tools.py").write_text(TOOLS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_tools", raising=False)
    for name in ("echo", "fail", "nested"): monkeypatch.setitem(cli.COMMANDS, name, f"fake_tools:{name}")
    monkeypatch.setitem(cli.COMMANDS, "tools batch_echo".replace("_", "-"), "fake_tools:echo")
    def run(*words):
        for h in logger.handlers[:]: logger.removeHandler(h)
        code = cli.main(list(map(str, words)))
        return (code, *capfd.readouterr())
    yield run
    sys.modules.pop("fake_tools", None)


def commands(group=None, prefix=""):
    "Every command of the app by its full name"
    group = group or typer.main.get_command(cli.build_app())
    for name, c in group.commands.items():
        if hasattr(c, "commands"): yield from commands(c, f"{prefix}{name} ")
        else: yield prefix + name, c


def squeezed(text): return re.sub(r"\s+", "", text)


# ---- every command --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_agrees_with_its_function(name):
    "Names, order and defaults as the imported function has them; each option says what it is for"
    target = cli.COMMANDS[name]
    module, _, function = target.partition(":")
    f, doc = getattr(importlib.import_module(module), function), function_doc(target)
    found = dict(commands())[name]
    options = {p.name: p for p in found.params if not p.name.startswith("cli_") and p.name != "help"}
    parameters = inspect.signature(f).parameters
    assert list(options) == list(parameters) == [p.name for p in doc.params]
    for p in doc.params:
        default = parameters[p.name].default
        assert options[p.name].required == (default is inspect.Parameter.empty)
        if default is not inspect.Parameter.empty:
            ours, read = options[p.name].default, cli._default(p, doc.module, name)
            assert (tuple(ours) if isinstance(ours, list) else ours) == default
            assert read == default and type(read) is type(default)
        assert p.comment and p.annotation
    assert found.help.startswith((inspect.getdoc(f) or "?").splitlines()[0])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_holds_every_comment_and_imports_nothing_heavy(name):
    script = "import sys; from medvol_nb.cli import main; code = main(sys.argv[1:]); " \
             "print(code, {'torch', 'matplotlib', 'scipy', 'pandas', 'zarr'} & set(sys.modules))"
    words = [sys.executable, "-c", script, *name.split(), "--help"]
    run, doc = subprocess.run(words, cwd=ROOT, text=True, capture_output=True), function_doc(cli.COMMANDS[name])
    assert run.stdout.splitlines()[-1] == "0 set()" and run.stderr == ""
    for p in doc.params:
        assert squeezed(p.comment) in squeezed(run.stdout), p
        if p.default is not None: assert f"--{p.name.replace('_', '-')}" in run.stdout
        if p.default not in (None, "None") and not p.default.isidentifier():
            shown = ast.literal_eval(p.default)
            if type(shown) in (int, str): assert f"default:{shown}]" in squeezed(run.stdout)
    assert doc.doc.splitlines()[0] in " ".join(run.stdout.split()) and "--json" in run.stdout


def test_the_list_of_commands(run_cli):
    run = run_cli("--help")
    assert run.returncode == 0
    for name in cli.COMMANDS: assert f"  {name.split()[0]} " in run.stdout


def test_version(run_cli, capsys):
    assert run_cli("--version").stdout == f"medvol_nb {__version__}\n"
    assert cli.main(["-V"]) == 0 and capsys.readouterr().out == f"medvol_nb {__version__}\n"


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["--no-such"], ["doctor", "a", "b", "--x"], ["view"]])
def test_wrong_usage_is_2_and_changes_nothing(run_cli, tmp_path, words):
    run = run_cli(*words)
    assert run.returncode == 2 and run.stdout == "" and "Usage" in run.stderr and "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


# ---- from words to values -------------------------------------------------------------------------------------------
def test_defaults_reach_the_function_unchanged(medvol):
    code, out, _ = medvol("echo", "a.nii.gz", "--json")
    assert code == 0 and json.loads(out) == {
        "path": "a.nii.gz", "n_ensembles": 5, "spacing": None, "patch_size": [1.0, 2.0, 3.0], "box": [1, 2, 3],
        "names": [], "kind": "soft_max", "use_ema": True, "out": None}


@pytest.mark.parametrize("words, name, value", [
    (["--n-ensembles", "7"], "n_ensembles", 7),
    (["--n_ensembles", "7"], "n_ensembles", 7),
    (["--n_ensembles=7"], "n_ensembles", 7),
    (["--n-ensembles=7"], "n_ensembles", 7),
    (["--patch_size", "1", "--patch-size", "2.5"], "patch_size", [1.0, 2.5]),
    (["--box", "4", "5", "6"], "box", [4, 5, 6]),
    (["--names", "a_b", "--names", "c-d"], "names", ["a_b", "c-d"]),
    (["--no-use-ema"], "use_ema", False),
    (["--no_use_ema"], "use_ema", False),
    (["--kind", "sharp"], "kind", "sharp"),
    (["--kind", "soft_max"], "kind", "soft_max"),
    (["--spacing", "1e-3"], "spacing", 0.001),
    (["--out", "x_y/z_1.png"], "out", "x_y/z_1.png")])
def test_hyphens_underscores_and_types(medvol, words, name, value):
    for command in (["echo"], ["tools", "batch-echo"], ["tools", "batch_echo"]):
        code, out, err = medvol(*command, "my_file.nii.gz", *words, "--json")
        assert code == 0, err
        assert json.loads(out)[name] == value and json.loads(out)["path"] == "my_file.nii.gz"


@pytest.mark.parametrize("words, names, path", [
    (["p", "--names", "a", "b", "-3", "--kind", "sharp"], ["a", "b", "-3"], "p"),
    (["p", "--names", "a", "--names", "b", "c"], ["a", "b", "c"], "p"),
    (["p", "--names=a", "--names", "b"], ["a", "b"], "p"),
    (["--names", "a", "p"], ["a"], "p"), # a word that the path may be is the path
])
def test_an_option_of_several_values_takes_several_words(medvol, words, names, path):
    code, out, err = medvol("echo", *words, "--json")
    assert code == 0, err
    assert json.loads(out)["names"] == names and json.loads(out)["path"] == path


@pytest.mark.parametrize("words", [["--n-ensembles", "many"], ["--n-ensembles", "1.5"], ["--kind", "hard"],
                                   ["--box", "1", "2"], ["--n-ensemble"], ["b.nii.gz"]])
def test_words_of_the_wrong_kind_are_usage_errors(medvol, words):
    code, out, err = medvol("echo", "a.nii.gz", *words)
    assert code == 2 and out == "" and "Error: " in err and "Traceback" not in err


@pytest.mark.parametrize("source, said", [
    ("def f(x: np.ndarray): 'F'", "parameter x: annotation 'np.ndarray' has no form"),
    ("def f(x: int = g()): 'F'", r"parameter x: default 'g\(\)' is not a literal"),
    ("def f(*x: int): 'F'", "args cannot be a command")])
def test_functions_without_a_form_are_refused_when_the_table_is_built(tmp_path, monkeypatch, source, said):
    (tmp_path/"formless.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=said): cli.command("formless:f")
    assert "formless" not in sys.modules


def test_an_option_of_the_function_wins_over_the_shared_one(tmp_path, monkeypatch, capsys, clean):
    text = "def f(\n    json: str = 'x', # own\n) -> dict: # all\n    'F'\n    return {'json': json}\n"
    (tmp_path/"own_json.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "own", "own_json:f")
    assert cli.main(["own", "--json", "mine"]) == 0 and capsys.readouterr().out == "json: mine\n"


# ---- what is printed ------------------------------------------------------------------------------------------------
def test_results_go_to_stdout_and_logs_to_stderr(medvol):
    code, out, err = medvol("echo", "a", "--json")
    assert code == 0 and err == "echo runs\n" and json.loads(out)
    assert medvol("echo", "a", "--json", "--quiet")[2] == "" and medvol("echo", "a", "-q")[2] == ""


def test_results_for_people(medvol):
    code, out, _ = medvol("nested")
    lines = ["text: a", "numbers: 1, 2.5", "rows:", "  x 1, y b", "empty: ", "none: None", "deep:", "  k:", "    p"]
    assert code == 0 and out.splitlines() == lines
    values = json.loads(medvol("nested", "--json")[1])
    assert values == {"text": "a", "numbers": [1, 2.5], "rows": [{"x": 1, "y": "b"}], "empty": {}, "none": None,
                      "deep": {"k": ["p"]}}


# ---- how it ends ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how, code, said", [
    ("none", 0, ""), ("batch", 3, "BatchError: 1 of 3 items failed:\n  p2: ZeroDivisionError"),
    ("data", 1, "DataError: label grid differs: case 'p017'. Resample the label\n"),
    ("missing", 1, "FileNotFoundError"),
    ("interrupt", 130, "interrupted; run the same command again to go on"), ("not ok", 1, ""),
    ("bug", 1, "internal error, please report it (KeyError: 'key'). `--debug` shows where"),
    ("memory", 1, "MemoryError")])
def test_exit_codes(medvol, how, code, said):
    got, out, err = medvol("fail", how)
    assert got == code and said in err and "Traceback" not in err and (out == "" or how == "not ok")


def test_a_result_that_is_not_ok_is_still_printed(medvol):
    code, out, _ = medvol("fail", "not ok", "--json")
    assert code == 1 and json.loads(out) == {"ok": False, "problems": ["one"]}


def test_json_never_holds_nan(medvol):
    code, out, err = medvol("fail", "nan", "--json")
    assert code == 1 and out == "" and "no NaN" in err


@pytest.mark.parametrize("how, kind", [("bug", "KeyError: 'key'"), ("data", "DataError"), ("batch", "BatchError")])
def test_debug_shows_the_traceback(tmp_path, how, kind):
    (tmp_path/"fake_tools.py").write_text(TOOLS)
    script = "from medvol_nb import cli; cli.COMMANDS['fail'] = 'fake_tools:fail'; raise SystemExit(cli.main())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    words = [sys.executable, "-c", script, "fail", how, "--debug"]
    run = subprocess.run(words, env=env, text=True, capture_output=True)
    assert run.returncode == 1 and "Traceback" in run.stderr and kind in run.stderr and "fake_tools.py" in run.stderr


def test_ctrl_c_is_130(tmp_path):
    (tmp_path/"fake_tools.py").write_text(TOOLS)
    script = "from medvol_nb import cli; cli.COMMANDS['sleep'] = 'fake_tools:sleep'; raise SystemExit(cli.main())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    run = subprocess.Popen([sys.executable, "-c", script, "sleep"], env=env, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    assert run.stdout.readline() == "sleeping\n"
    start = time.monotonic()
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=20)
    assert run.returncode == 130 and time.monotonic() - start < 2 and "interrupted" in err and "Traceback" not in err


def test_a_closed_pipe_is_no_crash(tmp_path):
    run = subprocess.run(f"{sys.executable} -m medvol_nb.cli demo --help | head -1", shell=True, text=True, cwd=ROOT,
                         capture_output=True)
    assert run.stdout.startswith("Usage") and "Traceback" not in run.stderr


@pytest.mark.parametrize("group", ["", *cli.GROUPS])
def test_help_is_quick(group):
    "Processor time; a command line never needs more than one group"
    start = time.process_time()
    cli.build_app([group])
    assert time.process_time() - start < 1 and logging.getLogger("medvol_nb") is logger
