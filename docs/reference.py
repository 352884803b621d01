"""Reference pages that are made while the manual is built: every command, and the table of faults.

`write` fills docs/reference, which is not in git. Commands come from `medvol_nb.cli.COMMANDS` and the signatures behind
it, so the pages say what `--help` says; the promises of the faults are the first lines of their tests.
"""
import ast
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from medvol_nb.cli import _SHARED, COMMANDS, GROUPS, command
from medvol_nb.core import ConfigError
from medvol_nb.signatures import FunctionDoc, Param, function_doc, module_path, rst_text

GENERAL = "general" # page of the commands that belong to no group
ROW = re.compile(r"test_row_(\d\d)_(\w+)")
MADE_FROM = re.compile(r"File to edit: \S*?nbs/(\w+)\.ipynb")

FAULTS = { # row -> (part, what is injected); what is promised stands in the tests
    1: ("paths", "names in lists that lead elsewhere: `../x`, absolute, symbolic links, NUL, `~`, URLs, drives"),
    2: ("JSON", "files cut off, byte order mark, equal keys, NaN, 100,000 levels, 200 MB, another encoding"),
    3: ("data lists", "wrong types: folds that are text or negative, label ids, images"),
    4: ("data lists", "expressions, `_target_`s and tags that would run a program"),
    5: ("data lists", "lists in the form of the 25 that VISTA3D publishes, and examples of the other formats"),
    6: ("data lists", "nine kinds of bad cases, twelve of each: lost files, repeated images, patients in two folds, "
        "other grids, unknown label values, empty labels, NaN"),
    7: ("data lists", "label dictionaries with gaps, repeated names, names that no label space knows"),
    8: ("NIfTI", "one flipped bit in a `.nii.gz`"),
    9: ("NIfTI", "files that are cut off, at 60 lengths"),
    10: ("NIfTI", "headers that promise terabytes, impossible sizes and offsets, gzip that unpacks a thousandfold"),
    11: ("NIfTI", "odd headers: affines that are zero, sheared or in conflict, scaling, number types, byte order"),
    12: ("NIfTI", "random bytes, web pages and folders under the names of images"),
    13: ("supervoxels", "`kill -9` during a batch of six cases"),
    14: ("supervoxels", "scans with an axis of 1 or 3000 voxels, constant, all air, NaN, values of 10⁹"),
    15: ("supervoxels", "an encoder that runs out of memory"),
    16: ("supervoxels", "Ctrl-C in the terminal of the command"),
    17: ("supervoxels", "weight files that are cut off, changed, of another network, or run code"),
    18: ("checkpoints", "`kill -9` while checkpoints are written, and trainings that are killed again and again"),
    19: ("embeddings", "masks of another shape or empty, views larger than the scan, single voxels, thick slices"),
    20: ("embeddings", "equal similarities, points outside, vectors that are NaN or zero"),
    21: ("embeddings", "losses that are NaN or infinite from some step on"),
    22: ("embeddings", "one of two processes of a training is killed"),
    23: ("embeddings", "stores that are damaged, or made by different networks"),
    24: ("registration", "matches that are too few, on a line, in one point, mostly wrong, or mirrored"),
    25: ("registration", "file names with spaces, quotes, semicolons, newlines, of 255 bytes"),
    26: ("parallel jobs", "workers that are killed, end, crash, or hang on a chosen item"),
    27: ("synthetic data", "`kill -9` of the whole run"),
    28: ("parallel jobs", "other numbers of workers, ways to start them, orders and ranges"),
    29: ("synthetic data", "templates that are empty, constant, of one voxel or damaged, and none left"),
    30: ("synthetic data", "death between merging templates and deleting their sources"),
    31: ("synthetic data", "constant images, one label only, cubes with sides of 1, 7 and 97 voxels"),
    32: ("pair files", "`kill -9` while writing, a second writer, readers during an append"),
    33: ("pair stores", "flipped bits in data and in metadata"),
    34: ("pair stores", "lists of views and labels that do not match"),
    35: ("embryo archives", "members that leave the folder, links, devices, repeated names, huge or many files"),
    36: ("embryo archives", "archives cut off, damaged, of another kind, missing or too many; targets in use"),
    37: ("embryo archives", "`kill -9` while extracting"),
    38: ("embryo frames", "damaged pictures, odd file names, tables of phases with overlaps, gaps and unknown words"),
    39: ("embryo images", "no GPU, a full disk, prompts with newlines and quotes, a kill after 37 % of the images"),
    40: ("settings", "unknown keys, typing mistakes, wrong types and ranges, YAML bombs, tags that run a program"),
    41: ("zarr U-Net", "patch lists that are stale or damaged, volumes and labels that do not fit"),
    42: ("zarr U-Net", "`kill -9` during a prediction, and two processes on one output"),
    43: ("all", "a disk that is full at some write"),
    44: ("zarr U-Net", "flipped bits in chunks, metadata that lie, servers that fail"),
    45: ("all", "outputs that cannot be: a folder for a file, no permission, no parent, a link, the input itself"),
    46: ("all", "random sequences of create, append, overwrite, kill, resume, merge and delete"),
}


def heading(text: str, line: str) -> str: return f"{text}\n{line*len(text)}\n"


def table(head: Sequence[str], widths: Sequence[int], rows: Iterable[Sequence[str]]) -> str:
    "A list-table of reStructuredText"
    out = [".. list-table::", "   :header-rows: 1", f"   :widths: {' '.join(map(str, widths))}", ""]
    for row in (head, *rows):
        for k, cell in enumerate(row):
            first, *more = (cell or "–").split("\n")
            out += [f"   {' ' if k else '*'} - {first}", *(f"       {line}".rstrip() for line in more)]
    return "\n".join(out) + "\n"


def option(q: inspect.Parameter) -> str:
    "How a parameter is written on the command line"
    name, info = q.name.removeprefix("cli_"), q.annotation.__metadata__[0]
    if is_argument(q): return name.upper()
    flag = f"--{name.replace('_', '-')}"
    if q.name.startswith("cli_"): return ", ".join([flag, *(d for d in info.param_decls if not d.startswith("--"))])
    kinds = get_args(q.annotation)[0]
    return f"{flag}/--no-{flag[2:]}" if kinds is bool or bool in get_args(kinds) else flag


def is_argument(q: inspect.Parameter) -> bool: return type(q.annotation.__metadata__[0]).__name__ == "ArgumentInfo"


def kind(annotation: Any, source: str) -> str:
    "Type of a parameter in words"
    words = {str: "path" if "Path" in source else "text", int: "whole number", float: "number", bool: "switch"}
    if isinstance(annotation, type) and issubclass(annotation, Path): return "path"
    if annotation in words: return words[annotation]
    inner, origin = [a for a in get_args(annotation) if a is not type(None)], get_origin(annotation)
    if origin is Literal: return " or ".join(f"``{a}``" for a in inner)
    if origin is list: return f"{kind(inner[0], source)}; one or several"
    if len(inner) == 1: return kind(inner[0], source) # may be absent
    raise ConfigError(f"{annotation}: has no words in the reference of commands")


def default(q: inspect.Parameter) -> str:
    "Default of a parameter, as one would type it"
    value = q.default
    if value is q.empty: return "required"
    if value is None or value == [] or value == "": return ""
    if isinstance(value, bool): return "on" if value else "off"
    return " ".join(f"``{v}``" for v in (value if isinstance(value, (list, tuple)) else [value]))


def parameters(target: str) -> list[tuple[inspect.Parameter, Param]]:
    "Parameters of a command with what its source says about them; without --json and the like"
    params = {p.name: p for p in function_doc(target).params}
    return [(q, params[q.name]) for q in inspect.signature(command(target)).parameters.values() if q.name in params]


def page_of(module: str) -> str:
    "Notebook page that a module is exported from"
    found = MADE_FROM.search(module_path(module).read_text(encoding="utf-8"))
    if found is None: raise ConfigError(f"{module}: does not say which page it is made from")
    return found[1]


def usage(name: str, params: Sequence[tuple[inspect.Parameter, Param]]) -> str:
    "The shortest call"
    words = []
    for q, _ in params:
        if q.default is not q.empty: continue
        several = "..." if get_origin(get_args(q.annotation)[0]) is list else ""
        words.append(f"{option(q)}{several}" if is_argument(q) else f"{option(q)} {q.name.upper()}{several}")
    words.sort(key=lambda w: w.startswith("--"))
    return " ".join(["medvol", name, *words, "[options]"])


def command_section(name: str, target: str) -> str:
    "Everything about one command"
    doc: FunctionDoc = function_doc(target)
    params = sorted(parameters(target), key=lambda p: (not is_argument(p[0]), p[0].default is not p[0].empty))
    rows = [(f"``{option(q)}``", kind(get_args(q.annotation)[0], p.annotation or ""), default(q), rst_text(p.comment))
            for q, p in params]
    purpose = rst_text(" ".join(doc.doc.split()))
    returned = f" It returns {rst_text(doc.returns_comment)}." if doc.returns_comment else ""
    return "\n".join([
        f".. _command-{name.replace(' ', '-')}:\n", heading(f"medvol {name}", "-"), f"{purpose}.\n",
        f".. code-block:: console\n\n   $ {usage(name, params)}\n",
        table(("argument or option", "type", "default", "meaning"), (28, 18, 14, 40), rows),
        f"In Python: :py:obj:`{doc.name} <{doc.module}.{doc.name}>` of ``{doc.module}``, explained on "
        f":doc:`/nbs/{page_of(doc.module)}`.{returned}\n"])


def command_pages() -> dict[str, str]: # file name -> text
    "The overview, and a page for each group"
    groups: dict[str, list[str]] = {}
    for name in COMMANDS: groups.setdefault(name.rpartition(" ")[0] or GENERAL, []).append(name)
    shared = [(f"``{option(q)}``", rst_text(q.annotation.__metadata__[0].help))
              for q in inspect.signature(command(next(iter(COMMANDS.values())))).parameters.values()
              if q.name.removeprefix("cli_") in _SHARED and q.name.startswith("cli_")]
    shared.append(("``--help``, -h", "arguments, options and defaults of a command"))
    index = [heading("Commands", "="), """\
Every command is a function of the library with the same parameters and defaults. An underscore of a Python name is a
dash on the command line; both spellings are understood. An option that takes several values is repeated
(``--skip unet --skip embryo``), or its values follow each other (``--skip unet embryo``) if the arguments stand first
and none of these takes several values. A switch has two forms, ``--crop`` and ``--no-crop``. Values of ``--overrides``
are ``key=value``, with dots for keys inside of sections.

What the function returns is printed as ``name: value``, progress and messages go to the error stream. The exit code is
0 if all is done, 1 if something failed, 2 for wrong usage, 3 if some cases failed and the others are finished, and 130
after an interruption.
""", table(("command", "purpose"), (30, 70), [
        (f":ref:`{n} <command-{n.replace(' ', '-')}>`", rst_text(function_doc(t).doc.split("\n")[0]))
        for n, t in COMMANDS.items()]),
        "Options that all commands have:\n", table(("option", "meaning"), (30, 70), shared),
        ".. toctree::\n   :hidden:\n\n   " + "\n   ".join(f"commands_{g}" for g in groups) + "\n"]
    pages = {"commands.rst": "\n".join(index)}
    for group, names in groups.items():
        title = "medvol" if group == GENERAL else f"medvol {group}"
        about = "Commands that belong to no group" if group == GENERAL else GROUPS[group]
        pages[f"commands_{group}.rst"] = "\n".join(
            [heading(title, "="), rst_text(about) + ".\n", *(command_section(n, COMMANDS[n]) for n in names)])
    return pages


def fault_tests(folder: Path) -> dict[int, list[tuple[str, str, str]]]: # row -> (test, promise, file)
    "Tests of the table of faults, by row"
    rows: dict[int, list[tuple[str, str, str]]] = {}
    for file in sorted(folder.glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (m := ROW.fullmatch(node.name)):
                promise = " ".join((ast.get_docstring(node) or "").split())
                rows.setdefault(int(m[1]), []).append((m[2], promise, file.name))
    return rows


def number_of_rows(folder: Path) -> int:
    "How many rows the table has, as its report counts them"
    return int(re.search(r"^N_ROWS = (\d+)", (folder/"report.py").read_text(encoding="utf-8"), re.M)[1])


def fault_page(folder: Path) -> str:
    "The table of faults, from the tests in `folder`"
    tests, rows = fault_tests(folder), []
    for number in range(1, number_of_rows(folder) + 1):
        part, injected = FAULTS[number]
        found = tests.get(number, [])
        promises = "\n\n".join(rst_text(promise) + "." for _, promise, _ in found) or "no test yet"
        files = "\n\n".join(f"``{f}``" for f in dict.fromkeys(f for *_, f in found))
        rows.append((str(number), part, rst_text(injected), promises, files))
    missing = [n for n in range(1, number_of_rows(folder) + 1) if n not in tests]
    none = f" Rows without a test: {', '.join(map(str, missing))}." if missing else ""
    return "\n".join([heading("Faults", "="), f"""\
What happens to files, processes, disks and inputs, and what the library promises then. Each row is one or more tests in
``tests/faults``, named ``test_row_NN_...``, that inject the fault many times; a row passes if every instance holds. The
promise below is the first line of the test.{none}

.. code-block:: console

   $ python -m tests.faults.report --quick      # the sample that runs in CI
   $ python -m tests.faults.report              # all instances
   $ python -m tests.faults.report 8 9          # some rows

The report prints for each row how many instances passed, how many results were wrong without an error (must be 0), and
the longest instance.
""", table(("row", "part", "what is injected", "what is promised", "tests"), (5, 13, 32, 34, 16), rows)])


def write(
    docs: Path, # folder of the manual; pages go to its folder `reference`
    root: Path, # of the repository
) -> None:
    "Write the pages that changed, and remove those that are no more"
    target = docs/"reference"
    target.mkdir(exist_ok=True)
    pages = command_pages() | {"faults.rst": fault_page(root/"tests"/"faults")}
    for old in target.iterdir():
        if old.is_file() and old.name not in pages: old.unlink()
    for name, text in pages.items():
        page = target/name
        if not page.exists() or page.read_text(encoding="utf-8") != text: page.write_text(text, encoding="utf-8")
