"""Between nbs/ and Sphinx: percent scripts become notebooks with API blocks, parameter comments become tables.

`setup` makes this module a Sphinx extension: pages are run before anything is read. `read` (MyST-NB's custom reader,
see `nb_custom_formats` in conf.py) takes them as they were run.
"""
import ast
import re
from pathlib import Path

import execute
import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from sphinx.errors import ExtensionError

from medvol_nb.core import ConfigError
from medvol_nb.signatures import docstring_lines, function_doc, rst_text

DOCS = Path(__file__).resolve().parent
OUTPUTS = DOCS/"_build/outputs"
DIRECTIVE = re.compile(r"#\s*\|\s*(\S+)\s*(.*)")
PAGE_LINK = re.compile(r"(\]\(\d\w*)\.ipynb(?=[#)])")  # what a notebook says; the manual is made of the .py files
SKIPPED = {"slow", "gpu", "net"}  # tst_flags of settings.ini: shown, not run
DEFINITIONS = {ast.FunctionDef: "autofunction", ast.AsyncFunctionDef: "autofunction", ast.ClassDef: "autoclass"}


def split(source: str) -> tuple[dict[str, str], str]:
    "Directives at the top of a cell, and the rest of its source"
    lines, directives = source.split("\n"), {}
    while lines and (m := DIRECTIVE.match(lines[0])):
        directives[m[1].rstrip(":")] = m[2].strip()
        lines.pop(0)
    return directives, "\n".join(lines).strip("\n")


def api_block(body: list[ast.stmt], module: str) -> str:
    "Autodoc directives for the public definitions of an exported cell"
    blocks = []
    for node in body:
        if (kind := DEFINITIONS.get(type(node))) and not node.name.startswith("_"):
            block = f".. {kind}:: medvol_nb.{module}.{node.name}"
            if kind == "autoclass": block += "\n   :members:" + "\n   :show-inheritance:"*bool(node.bases)
            blocks.append(block)
    return "```{eval-rst}\n" + "\n\n".join(blocks) + "\n```" if blocks else ""


def page_notebook(text: str) -> NotebookNode:
    "The notebook that the documentation shows for a percent script, without outputs"
    nb, cells, module = jupytext.reads(text, "py:percent"), [], ""
    for cell in nb.cells:
        if cell.cell_type != "code":
            cell.source = PAGE_LINK.sub(r"\1.py", cell.source)
            cells.append(cell)
            continue
        directives, cell.source = split(cell.source)
        module = directives.get("default_exp", module)
        if not cell.source.strip(): continue
        tags = cell.metadata.setdefault("tags", [])
        if "hide" in directives: tags.append("remove-cell")
        if directives.get("eval") == "false" or SKIPPED & set(directives): tags.append("skip-execution")
        cells.append(cell)
        if not {"export", "exporti", "exports"} & set(directives): continue
        body = ast.parse(cell.source).body
        only_imports = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)
        if only_imports: tags.append("remove-input")
        elif "exports" not in directives: tags.append("hide-input")
        if "exporti" not in directives and (block := api_block(body, module)): cells.append(new_markdown_cell(block))
    nb.cells = cells
    nb.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nb


def read(text: str) -> NotebookNode:
    "The notebook that the documentation shows for a percent script, as it was run"
    return execute.executed(text, OUTPUTS)


def run_pages(app) -> None:
    "Run what has changed; a page that fails ends the build"
    if failed := execute.run_pages((DOCS/"nbs").glob("*.py"), OUTPUTS):
        raise ExtensionError(f"{len(failed)} pages failed\n\n" + "\n".join(failed))


def add_parameters(app, what, name, obj, options, lines) -> None:
    "Escape a plain docstring and append the parameter comments of the source to it"
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try: doc = function_doc(f"{'.'.join(parts[:n])}:{'.'.join(parts[n:])}")
        except ConfigError: continue
        if not any("::" in line or "``" in line or re.search(r":\w+:`", line) for line in lines):
            lines[:] = [line[:len(line) - len(line.lstrip())] + rst_prose(line.strip()) for line in lines]
        lines[:] = [*lines, "", *docstring_lines(doc), ""]
        return


def rst_prose(line: str) -> str:
    "A docstring line as reStructuredText; a bullet at its beginning stays a bullet"
    bullet = re.match(r"([-*+]|\d+\.) (?=\S)", line)
    return bullet[0] + rst_text(line[bullet.end():]) if bullet else rst_text(line)


def setup(app):
    app.connect("builder-inited", run_pages)
    app.connect("autodoc-process-docstring", add_parameters)
    return {"parallel_read_safe": True}
