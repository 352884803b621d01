"""Sphinx configuration. The pages are the percent scripts of nbs/; `nbread` makes notebooks with API blocks of them."""
import hashlib
import os
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

docs = Path(__file__).resolve().parent
root = docs.parent
sys.path[:0] = [str(docs), str(root)]

import reference  # noqa: E402, beside this file

# Processes that run pages inherit this environment: this checkout's package, one thread each, no progress bars
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
os.environ["IN_TEST"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(root/"settings.ini", encoding="utf-8")
meta = settings["DEFAULT"]
project, author, copyright = meta["title"], meta["author"], meta["copyright"]
version = release = meta["version"]


def readme() -> str:
    "README.md as seen from docs/: links to the manual and its pictures are adapted, links to other files become text"
    text = re.sub(r'(<img\b[^>]*\bsrc=")docs/', r"\1", (root/"README.md").read_text(encoding="utf-8"))

    def adapt(m: re.Match) -> str:
        label, target = m[1], m[2]
        if re.match(r"[a-z]+:|#", target): return m[0]
        if page := re.fullmatch(r"(?:\./)?nbs/(\d\w*)\.(?:py|ipynb)", target): return f"{label}(nbs/{page[1]}.py)"
        inner = target.removeprefix("./").removeprefix("docs/")
        return f"{label}({inner})" if (docs/inner.split("#")[0]).is_file() else label.lstrip("!")[1:-1]

    return re.sub(r"(!?\[[^\]\n]*\])\(([^()\s]+)\)", adapt, text)


def copy_pages() -> None:
    "Mirror nbs/[0-9]*.py and the README in docs/nbs, touching only what changed, so that Sphinx rebuilds no more"
    target = docs/"nbs"
    target.mkdir(exist_ok=True)
    pages = {p.name: p.read_bytes() for p in (root/"nbs").glob("[0-9]*.py")} | {"README.md": readme().encode("utf-8")}
    for old in target.iterdir():
        if old.is_file() and old.name not in pages: old.unlink()
    for name, content in pages.items():
        page = target/name
        if not page.exists() or page.read_bytes() != content: page.write_bytes(content)


def drop_stale_outputs() -> None:
    "Cached outputs belong to the code that made them; MEDVOL_DOCS_KEEP_CACHE=1 keeps them while writing prose"
    digest, makers = hashlib.sha256(), (docs/"nbread.py", docs/"execute.py")
    for p in (*makers, *sorted((root/"medvol_nb").rglob("*.py"))): digest.update(p.read_bytes())
    cache, stamp = docs/"_build/outputs", docs/"_build/library.sha256"
    same = stamp.exists() and stamp.read_text() == digest.hexdigest()
    if not same and not os.environ.get("MEDVOL_DOCS_KEEP_CACHE"): shutil.rmtree(cache, ignore_errors=True)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(digest.hexdigest())


copy_pages()
reference.write(docs, root)
drop_stale_outputs()

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton", "nbread"]
include_patterns = ["*.md", "nbs/*.py", "reference/*.rst"]  # without this Sphinx would read conf.py as a notebook
exclude_patterns = ["_build"]

nb_custom_formats = {".py": "nbread.read"}
nb_execution_mode = "off"  # docs/execute.py runs them
nb_merge_streams = True
nb_code_prompt_show = "Show source"
nb_code_prompt_hide = "Hide source"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", 10000)]  # last: the picture wins
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 3

default_role = "py:obj"  # single backticks of a docstring: a link where there is a target, code otherwise
add_module_names = False
python_maximum_signature_line_length = 100
python_display_short_literal_types = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "all"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}
smartquotes_action = "D"  # dashes only: quoted values of parameters stay as they are typed

html_theme = "furo"
html_title = f"{project} {release}"
html_show_sphinx = False


def drop_empty_families(app, docname: str, source: list[str]) -> None:
    "Sphinx warns about patterns of a toctree that match nothing; families without pages are left out of the index"
    if docname != "index": return

    def keep(m: re.Match) -> str:
        lines = [line for line in m[0].split("\n") if not re.match(r"nbs/", line) or any(docs.glob(line + ".py"))]
        return "\n".join(lines) if any(line.startswith("nbs/") for line in lines) else ""

    source[0] = re.sub(r"```\{toctree\}\n(?:(?!```).*\n)*?nbs/(?:.*\n)*?```", keep, source[0])


def setup(app) -> None: app.connect("source-read", drop_empty_families)
