"""What the manual says can be typed: command lines, Python imports and file names exist; the reference is complete."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from medvol_nb.cli import COMMANDS, GROUPS, build_app
from medvol_nb.core import ConfigError
from medvol_nb.signatures import function_doc, module_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = sorted((ROOT / "nbs").glob("9[5-9]*_*.py"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"(?<!`)`(medvol [^`]+)`(?!`)")
FILE = re.compile(r"`([a-z_]\w*\.(?:json|jsonl|csv|npy|png|hdf5|safetensors|zarr))`")
SHARED = {"--json", "--quiet", "-q", "--debug", "--help", "-h"}
APP = typer.main.get_command(build_app())


def leaf(words: list[str]):
    "The command that some words begin with, its name, and the words behind it"
    n = 2 if words and words[0] in GROUPS else 1
    name = " ".join(words[:n])
    assert name in COMMANDS, f"no command {name!r}"
    group = APP.commands[words[0]] if n == 2 else APP
    return group.commands[words[n - 1]], name, words[n:]


def arguments(line: str) -> list[str] | None:
    "Words behind `medvol` in a line for the shell; None if the line calls something else"
    line = re.sub(r"\$\(\([^)]*\)\)|\$\{?\w+\}?", "1", line)
    words = shlex.split(line, comments=True)
    for k, word in enumerate(words):
        if word == "medvol" or (word == "medvol_nb.cli" and words[k - 1] == "-m"):
            words = words[k + 1 :]
            end = next((i for i, w in enumerate(words) if w in ("|", "&&", "||", ">", "&", ";")), len(words))
            return words[:end]
    return None


def whole(words: list[str]) -> None:
    "A complete command line: names, values and what is required; nothing is run"
    if words in (["--version"], ["--help"], []):
        return
    found, name, rest = leaf(words)
    found.make_context(name, list(rest))


def names(words: list[str]) -> None:
    "Part of a command line in a sentence: names only"
    if words in (["--version"], ["--help"]) or (len(words) == 1 and words[0] in GROUPS):
        return
    found, name, rest = leaf(words)
    known = SHARED | {o for p in found.params for o in (*p.opts, *p.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0].replace("_", "-") in known, f"{name} has no option {word}"


def prose(page: Path) -> str:
    "Markdown of a page; of a page in nbs, that of its markdown cells"
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".py":
        return text
    cells = re.split(r"^# %%", text, flags=re.M)
    return "\n".join(re.sub(r"^# ?", "", c.split("\n", 1)[1], flags=re.M) for c in cells if c.startswith(" [markdown]"))


def blocks(page: Path, *kinds: str) -> list[str]:
    return [body for kind, body in FENCE.findall(prose(page)) if kind in kinds]


def problems(lines: list[list[str]], check) -> list[str]:
    "What is wrong with each of these command lines"
    found = []
    for words in lines:
        try:
            check(words)
        except Exception as e:
            found.append(f"medvol {' '.join(words)}: {type(e).__name__}: {e}")
    return found


def command_lines(page: Path) -> list[list[str]]:
    text = "\n".join(blocks(page, "bash", "console", "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := arguments(line.removeprefix("$ "))) is not None]


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS], ids=lambda p: p.name)
def test_command_lines_of_blocks(page):
    "They are complete: every required value is there and every value has its type"
    assert not (found := problems(command_lines(page), whole)), "\n".join(found)


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS], ids=lambda p: p.name)
def test_command_names_in_sentences(page):
    text = FENCE.sub("", prose(page))
    lines = [m[1].split()[1:] for m in SPAN.finditer(text)]
    assert not (found := problems(lines, names)), "\n".join(found)


def test_there_are_lines_to_check():
    "The patterns find what the pages hold"
    assert sum(len(command_lines(p)) for p in PAGES) > 40 and all(len(command_lines(p)) > 3 for p in TUTORIALS)
    assert arguments("torchrun --nproc-per-node 2 -m medvol_nb.cli unet train --config a.json  # x") == [
        *"unet train --config a.json".split()
    ]
    assert arguments("medvol synth generate --shard $((SLURM_ARRAY_TASK_ID + 1))/8 > log")[-1] == "1/8"
    assert arguments("dask scheduler --port 8786") is None


@pytest.mark.parametrize(
    "line",
    [
        "unet trian --config a.json",
        "unet train",
        "unet train a.json",
        "unet train --confg a.json",
        "unet predict --config a.json --num-parts many",
        "datalists verify a.json --level deep",
        "synthesise",
    ],
)
def test_wrong_lines_are_found(line):
    assert problems([line.split()], whole)


def test_wrong_options_in_sentences_are_found():
    assert problems([["unet", "train", "--nothing"], ["unet", "walk"]], names) and not problems([["unet"]], names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_names(page):
    "Imports of the library exist, and keyword arguments are parameters of what is called"
    for body in blocks(page, "python"):
        tree, known = ast.parse(body), {}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("medvol_nb"):
                continue
            source = module_path(node.module).read_text(encoding="utf-8")
            for alias in node.names:
                assert re.search(rf"['\"]{alias.name}['\"]|def {alias.name}\b|class {alias.name}\b", source), alias.name
                known[alias.name] = f"{node.module}:{alias.name}"
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in known:
                try:
                    params = function_doc(known[call.func.id]).params
                except ConfigError:
                    continue  # handed on by the module, defined elsewhere
                wrong = {k.arg for k in call.keywords} - {p.name for p in params}
                assert not wrong, f"{page.name}: {call.func.id} has no parameter {wrong}"


def test_file_names_of_the_formats_page_occur_in_the_library():
    library = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "medvol_nb").rglob("*.py"))
    found = set(FILE.findall((ROOT / "docs" / "formats.md").read_text(encoding="utf-8")))
    lacking = [name for name in sorted(found) if name not in library]
    assert len(found) > 30 and not lacking, lacking


def test_every_page_is_in_the_index():
    listed = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    lacking = [p.stem for p in PAGES[1:] if p.stem != "index" and not re.search(rf"^{p.stem}$", listed, re.M)]
    assert not lacking, lacking


def test_links_between_pages_lead_somewhere():
    "Also those to pages of nbs, which are copied beside the manual's pages when it is built"
    for page in PAGES[1:]:
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            made = target.startswith("reference/")
            place = ROOT / target if target.startswith("nbs/") else ROOT / "docs" / target
            assert made or place.exists(), f"{page.name}: {target}"


# ---------------------------------------------------------------- generated pages


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_holds_every_command_and_option(reference):
    pages = reference.command_pages()
    text = "\n".join(pages.values())
    for name, target in COMMANDS.items():
        page = pages[f"commands_{name.rpartition(' ')[0] or 'general'}.rst"]
        section = page.split(f"\nmedvol {name}\n", 1)[1].split("\n.. _command-", 1)[0]
        found, _, _ = leaf(name.split())
        for p in found.params:
            if p.name.removeprefix("cli_") in ("json", "quiet", "debug", "help") and p.name.startswith("cli_"):
                continue
            shown = p.name.upper() if p.param_type_name == "argument" else p.opts[0]
            assert re.search(rf"- ``{re.escape(shown)}(/--no-[\w-]+)?``", section), f"{name}: {shown}"
        assert target.replace(":", ".") in section and f":ref:`{name} <" in text
    assert "<class" not in text and "typing." not in text


def test_reference_tells_types_and_defaults(reference):
    page = reference.command_pages()["commands_datalists.rst"]
    row = page.split("``--level``", 1)[1].split("   * -", 1)[0]
    assert "``exists`` or ``header`` or ``full``" in row and "     - ``header``\n" in row


def test_fault_table_lists_every_row(reference):
    folder = ROOT / "tests" / "faults"
    tests, n = reference.fault_tests(folder), reference.number_of_rows(folder)
    assert set(reference.FAULTS) == set(range(1, n + 1)) and set(tests) <= set(reference.FAULTS)
    page = reference.fault_page(folder)
    assert page.count("\n   * - ") == n + 1
    for number, found in tests.items():
        row = page.split(f"\n   * - {number}\n", 1)[1].split("\n   * - ", 1)[0]
        assert all(file in row and promise for _, promise, file in found)


def test_pages_are_written_once(reference, tmp_path):
    reference.write(tmp_path, ROOT)
    (tmp_path / "reference" / "old.rst").write_text("")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "reference").iterdir() if p.name != "old.rst"}
    reference.write(tmp_path, ROOT)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "reference").iterdir()} == before
