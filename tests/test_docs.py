"""Every public name is documented where it is defined: a docstring, and a comment beside every parameter and return."""
import ast
import re
from pathlib import Path

import pytest

from medvol_nb.signatures import FunctionDoc, parse_source

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/"medvol_nb"
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))
           if p.name not in ("__init__.py", "_modidx.py")}
ARRAY = re.compile(r"\b(ndarray|Tensor|ArrayLike|NDArray)\b")
AXES = re.compile(r"\([^()]*\)|\barrays?\b|\bn-d\b", re.IGNORECASE)
NOTHING = re.compile(r"None|NoReturn|Never|(Iterator|Generator|Iterable)\[None(, None)*\]")


def tells_axes(annotation: str, comment: str) -> bool:
    "An array's comment begins with its axes; containers of arrays and 'number or array' say them somewhere"
    plain = re.sub(r"Callable\[\[[^\]]*\], *[^\]]*\]", "", annotation).strip("'\"")
    if not ARRAY.search(plain): return True
    kinds = [k.strip() for k in plain.split("|") if k.strip() != "None"]
    is_array = all(ARRAY.fullmatch(k.split(".")[-1]) or re.match(r"(\w+\.)*NDArray\[", k) for k in kinds)
    return bool(AXES.match(comment) if is_array else AXES.search(comment))


def public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return []


def problems_of(doc: FunctionDoc) -> list[str]:
    "What is missing in the documentation of one public name"
    found = [] if doc.doc.strip() else ["no docstring"]
    for p in doc.params:
        if not p.annotation: found.append(f"parameter {p.name}: no annotation")
        if not p.comment: found.append(f"parameter {p.name}: no comment")
        elif not tells_axes(p.annotation or "", p.comment):
            found.append(f"parameter {p.name}: {p.annotation}, but no axes, 'array' or 'n-d' in front: {p.comment!r}")
    if not doc.is_class:
        if doc.returns is None: found.append("no return annotation")
        elif not doc.returns_comment and not NOTHING.fullmatch(doc.returns.strip("'\"")):
            found.append("return: no comment")
    return [f"{doc.name}: {f}" for f in found]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    text = MODULES[module].read_text(encoding="utf-8")
    docs = parse_source(text, module)
    found = [f for name in public_names(ast.parse(text)) if name in docs for f in problems_of(docs[name])]
    assert not found, f"{len(found)} problems in {module}:\n" + "\n".join(found)


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_for(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert (ast.get_docstring(ast.parse(text)) or "").strip(), "the page needs a title and a '> one-line summary'"
    assert "__all__" in text


@pytest.mark.parametrize("source, expected", [
    ("def f(a: int, # n\n) -> int: # m\n 'Doc'", []),
    ("def f(a: int, # n\n) -> None: 'Doc'", []),
    ("def f(a: np.ndarray, # (x, y, z) bool\n) -> None: 'Doc'", []),
    ("def f(a: np.ndarray, # array of any shape\n) -> None: 'Doc'", []),
    ("def f(a: Callable[[Tensor], Tensor], # what to call\n) -> None: 'Doc'", []),
    ("def f(a: list[Tensor], # each (b, c, x, y, z)\n) -> None: 'Doc'", []),
    ("def f(a: float | np.ndarray, # one for all, or (n,)\n) -> None: 'Doc'", []),
    ("class A:\n 'Doc'\n x: int = 1 # n", []),
    ("def f() -> None: pass", ["no docstring"]),
    ("def f(a: int) -> None: 'Doc'", ["no comment"]),
    ("def f(a, # n\n) -> None: 'Doc'", ["no annotation"]),
    ("def f() -> int: 'Doc'", ["return: no comment"]),
    ("def f(): 'Doc'", ["no return annotation"]),
    ("def f(a: np.ndarray | None, # image (x, y, z)\n) -> None: 'Doc'", ["no axes"]),
    ("def f(a: list[Tensor], # image\n) -> None: 'Doc'", ["no axes"]),
    ("class A:\n 'Doc'\n x: int = 1", ["no comment"]),
])
def test_rules_catch(source, expected):
    doc = next(iter(parse_source(source).values()))
    found = problems_of(doc)
    assert len(found) == len(expected) and all(e in f for e, f in zip(expected, found))


def test_no_paths_of_a_machine():
    "Nothing that only exists on the computer of an author"
    needles = [f"/{name}/" for name in ("work", "root", "home", "Users")]
    needles += [str(ROOT)] + [str(Path.home())]*(len(Path.home().parts) > 2)
    patterns = """nbs/*.py medvol_nb/**/*.py docs/*.md docs/*.py tests/**/*.py benchmarks/**/*.py benchmarks/*.md .ci/*
        *.md *.toml *.ini setup.py Makefile constraints.txt""".split()
    files = [p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()]
    assert len(files) > 10
    found = []
    for p in files:
        for n, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1):
            for needle in needles:
                at = line.find(needle)
                if at >= 0 and (at == 0 or line[at - 1] not in "/abcdefghijklmnopqrstuvwxyz_.}"):
                    found.append(f"{p.relative_to(ROOT)}:{n}: {needle}")
    assert not found, "\n".join(found)
