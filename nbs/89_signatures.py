# %% [markdown]
# # Signatures
#
# > Parameter comments and docstrings, read from source text without importing it.
#
# In this library a parameter is explained by the comment beside it, and by nothing else. Three places want to show that
# comment: the reference tables of the documentation, `medvol <command> --help`, and the test that no parameter was left
# without one. Python drops comments when it compiles, so they have to come from the source.
#
# The obvious way, importing the module and asking for its source, is a bad way here. Many pages import torch, which
# costs two seconds, and a help text that takes two seconds feels broken. So this page never imports what it describes.
# It finds the file, parses it, and tokenises only the head of the wanted function.

# %%
#| default_exp signatures

# %%
#| export
import ast
import itertools
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from medvol_nb.core import ConfigError, DataError

# %%
import inspect
import subprocess
import sys
import time
from medvol_nb import core
from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## What is known about a function
# Two frozen records hold the answer. Annotations and defaults stay text: whoever needs the value must import the module
# anyway, everybody else wants to print what the author wrote. A class is described by what one passes to create it.

# %%
#| export
@dataclass(frozen=True)
class Param:
    "One parameter of a function, or one field of a class, as its author wrote it"
    name: str # without stars
    annotation: str | None # source text; None if there is none
    default: str | None # source text; None if there is none
    comment: str # what stands beside and below it, in one line
    kind: str # "positional", "keyword", "var_positional" or "var_keyword"

@dataclass(frozen=True)
class FunctionDoc:
    "What the source says about a function, a method or a class"
    name: str # such as 'atomic' or 'Volume.save'
    module: str # dotted name, may be empty
    params: tuple[Param, ...] # in order; of a class, what one passes to create it
    returns: str | None # source text of the return annotation
    returns_comment: str # what stands beside the return annotation
    doc: str # docstring without common indentation
    is_class: bool # True for a class

# %%
Param("spacing", "float | tuple", "1.0", "target voxel size [mm]", "positional")

# %% [markdown]
# ## Which comment belongs to which parameter
# A comment begins beside the last line of a parameter and may go on, alone, in the lines directly below. A comment line
# that follows nothing, such as a heading between two groups of parameters, belongs to nobody. Behind the colon that
# ends the head, the same rule gives the comment of the return value.
#
# The tokeniser is asked for the head only, so a long function body costs nothing. Commas are counted at the first level
# of brackets: a default that spans several lines ends where its comma is.

# %%
#| export
_Comments = dict[int, tuple[str, bool]]

def _comment(token: tokenize.TokenInfo) -> tuple[str, bool]:
    "Text of a comment, and whether it stands alone in its line"
    return token.string.lstrip("#").strip(), not token.line[:token.start[1]].strip()

def _joined(comments: _Comments, line: int) -> str:
    "The comment that begins beside the code of `line` and goes on alone below"
    parts: list[str] = []
    while line in comments and comments[line][1] == bool(parts): parts.append(comments[line][0]); line += 1
    return " ".join(p for p in parts if p)

def _tokens(lines: list[str], start: int) -> Iterator[tokenize.TokenInfo]:
    "Tokens from line `start` (counted from 1) on; their own line numbers begin at 1 again"
    return tokenize.generate_tokens(itertools.chain((line + "\n" for line in lines[start - 1:]), [""]).__next__)

def _head(lines: list[str], start: int) -> tuple[dict[str, str], str]:
    "Comments of the parameters by name, and that of the return value, of the function whose `def` is in line `start`"
    depth, name, last, stage, inner, ends = 0, "", 0, "before", {}, {}
    tokens = itertools.dropwhile(lambda t: t.string != "def", _tokens(lines, start))
    for t in tokens:
        if t.type == tokenize.COMMENT: inner[t.start[0]] = _comment(t)
        if t.type in (tokenize.COMMENT, tokenize.NL): continue
        depth += (t.string in ("(", "[", "{")) - (t.string in (")", "]", "}"))
        if t.string == ":" and depth == 0: break
        if stage == "before" and t.string == "(": stage = "inside"
        elif stage == "inside" and depth == 0: stage, ends[name] = "behind", last
        elif stage == "inside" and depth == 1 and t.string == ",": ends[name], name = t.start[0], ""
        elif stage == "inside" and depth == 1 and t.type == tokenize.NAME: name = name or t.string
        last = t.end[0]
    after = {}
    for t in tokens:
        if t.type == tokenize.COMMENT: after[t.start[0]] = _comment(t)
        elif t.type not in (tokenize.NL, tokenize.NEWLINE): break
    return {n: _joined(inner, line) for n, line in ends.items() if n}, _joined(after, min(after, default=0))

# %%
example = '''
def resample(
    vol, # (x, y, z) intensities
    spacing: float | tuple = (1.0,
                              1.0), # target voxel size [mm],
                                    # scalar or per axis
    *,
    # --- rarely needed
    order: int = 1, # 0 nearest, 1 linear
) -> "Volume": # same field of view
    # not part of the signature
    "Change the voxel size of `vol`"
'''
_head(example.split("\n"), 2)

# %%
found, returned = _head(example.split("\n"), 2)
assert found["spacing"] == "target voxel size [mm], scalar or per axis" and found["order"] == "0 nearest, 1 linear"
assert returned == "same field of view not part of the signature"
assert _head(["def f(a, b=lambda x: {1: x}): return a # sum"], 1) == ({"a": "", "b": ""}, "")

# %% [markdown]
# The second assertion shows the price of a simple rule: comment lines directly below the head continue the return
# comment. A docstring, a blank line or code in between ends it, and the house style puts the docstring there.
#
# ## From a definition to a record
# `ast` knows the names, annotations and defaults. Text is cut from the lines by byte offsets, as `ast` counts them; a
# piece that spans several lines may hold comments, so it is printed from the tree instead.

# %%
#| export
def _text(lines: list[str], node: ast.AST | None) -> str | None:
    "Source text of an expression, in one line"
    if node is None: return None
    if node.lineno != node.end_lineno: return ast.unparse(node)
    return lines[node.lineno - 1].encode()[node.col_offset:node.end_col_offset].decode()

_Function = ast.FunctionDef | ast.AsyncFunctionDef

def _parameters(lines: list[str], node: _Function, comments: dict[str, str]) -> tuple[Param, ...]:
    "Parameters of a function in the order of its signature"
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    rows = [(arg, d, "positional") for arg, d in zip(plain, [None]*(len(plain) - len(a.defaults)) + a.defaults)]
    if a.vararg: rows.append((a.vararg, None, "var_positional"))
    rows += [(arg, d, "keyword") for arg, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: rows.append((a.kwarg, None, "var_keyword"))
    return tuple(Param(arg.arg, _text(lines, arg.annotation), _text(lines, d), comments.get(arg.arg, ""), kind)
                 for arg, d, kind in rows)

def _last_word(node: ast.AST) -> str:
    "The name at the end of `a.b.name`, `name(...)` or `name[...]`"
    if isinstance(node, ast.Call): return _last_word(node.func)
    if isinstance(node, ast.Subscript): return _last_word(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""

def _function(lines: list[str], name: str, module: str, node: _Function) -> FunctionDoc:
    comments, returned = _head(lines, node.lineno)
    params = _parameters(lines, node, comments)
    if "." in name and "staticmethod" not in map(_last_word, node.decorator_list): params = params[1:]
    return FunctionDoc(name, module, params, _text(lines, node.returns), returned, ast.get_docstring(node) or "", False)

# %% [markdown]
# ### Classes
# A class that defines `__init__` is described by it. Dataclasses and configuration models have no `__init__` in the
# source; their annotated fields are the parameters, each with the comment beside it. Bases from the same file
# contribute their fields first, as in Python. `field(default_factory=list)` is shown as what it means, `list()`.

# %%
#| export
_FIELD_MAKERS = ("field", "Field")

def _field_default(lines: list[str], value: ast.expr | None) -> str | None:
    "Default of a field; `field(...)` and `Field(...)` are looked into"
    if not (isinstance(value, ast.Call) and _last_word(value.func) in _FIELD_MAKERS): return _text(lines, value)
    given = {k.arg: k.value for k in value.keywords}
    default, factory = value.args[0] if value.args else given.get("default"), given.get("default_factory")
    if isinstance(factory, ast.Lambda): return _text(lines, factory.body)
    if factory is not None: return f"{_text(lines, factory)}()"
    return None if isinstance(default, ast.Constant) and default.value is ... else _text(lines, default)

def _fields(lines: list[str], node: ast.ClassDef) -> tuple[Param, ...]:
    "Annotated fields of a class that a caller sets"
    comments = {t.start[0] + node.lineno - 1: _comment(t) for t in _tokens(lines[:node.end_lineno], node.lineno)
                if t.type == tokenize.COMMENT}
    by_place = any(_last_word(d) == "dataclass" and "kw_only" not in ast.unparse(d) for d in node.decorator_list) or \
        "NamedTuple" in map(_last_word, node.bases)
    kind, params = "positional" if by_place else "keyword", []
    for s in node.body:
        if not isinstance(s, ast.AnnAssign) or not isinstance(s.target, ast.Name): continue
        if _last_word(s.annotation) == "KW_ONLY": kind = "keyword"
        fixed = isinstance(s.value, ast.Call) and any(
            k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in s.value.keywords)
        if fixed or s.target.id.startswith("_") or _last_word(s.annotation) == "ClassVar": continue
        params.append(Param(s.target.id, _text(lines, s.annotation), _field_default(lines, s.value),
                            _joined(comments, s.end_lineno), kind))
    return tuple(params)

def _class_params(lines: list[str], found: dict[str, ast.AST], node: ast.ClassDef) -> tuple[tuple[Param, ...], bool]:
    "What one passes to create the class, and whether an `__init__` said so"
    name = f"{node.name}.__init__"
    if name in found: return _function(lines, name, "", found[name]).params, True
    bases = [b for b in (found.get(_last_word(b)) for b in node.bases) if isinstance(b, ast.ClassDef) and b is not node]
    inherited = [_class_params(lines, found, b) for b in bases]
    is_dataclass = "dataclass" in map(_last_word, node.decorator_list)
    for params, from_init in inherited:
        if from_init and not is_dataclass: return params, True
    merged = {p.name: p for params, _ in reversed(inherited) for p in params}
    return tuple((merged | {p.name: p for p in _fields(lines, node)}).values()), False

# %% [markdown]
# ## A whole module
# `parse_source` gives every top-level function and class by its name, and methods as `Class.method`.

# %%
#| export
def _definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    "Functions, classes and methods by dotted name, also below `if` and `try`"
    for node in body:
        if isinstance(node, _Function):
            marks = {_last_word(d) for d in node.decorator_list}
            if not marks & {"overload", "setter", "deleter"}: yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            if not prefix: yield from _definitions(node.body, f"{node.name}.")
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(node, part, []):
                    yield from _definitions(inner.body if isinstance(inner, ast.ExceptHandler) else [inner], prefix)

def _scan(text: str, where: str) -> tuple[list[str], dict[str, ast.AST]]:
    "Lines of a source text and its definitions by name"
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    try: tree = ast.parse(text)
    except SyntaxError as e: raise DataError(f"{where}, line {e.lineno}: not valid Python: {e.msg}") from None
    except (ValueError, RecursionError) as e: raise DataError(f"{where}: not valid Python: {e}") from None
    return text.split("\n"), dict(_definitions(tree.body))

def _describe(lines: list[str], found: dict[str, ast.AST], name: str, module: str) -> FunctionDoc:
    node = found[name]
    if not isinstance(node, ast.ClassDef): return _function(lines, name, module, node)
    params, _ = _class_params(lines, found, node)
    return FunctionDoc(name, module, params, None, "", ast.get_docstring(node) or "", True)

def parse_source(
    text: str, # Python source
    module: str = "", # dotted name written into the records and used in errors
) -> dict[str, FunctionDoc]: # by name; methods as 'Class.method'
    "Read all signatures, comments and docstrings of a module from its text"
    lines, found = _scan(text, module or "source")
    return {name: _describe(lines, found, name, module) for name in found}

# %%
parsed = parse_source(example)["resample"]
[(p.name, p.default, p.kind) for p in parsed.params]

# %%
assert parsed.doc == "Change the voxel size of `vol`" and parsed.returns == '"Volume"'
assert [p.annotation for p in parsed.params] == [None, "float | tuple", "int"]

# %%
model = parse_source('''
@dataclass
class Optimiser:
    "How to step"
    lr: float = 1e-3 # step size
    betas: list = field(default_factory=list) # decay rates
    steps: int = field(init=False) # counted, not given
@dataclass
class Adam(Optimiser):
    "A kind"
    lr: float = 3e-4 # another default
    eps: float = 1e-8 # keeps the
                      # quotient finite
    def step(self, grad: "Tensor", # (n,) slope
             ) -> None: "Move"
''')
[(p.name, p.default, p.comment) for p in model["Adam"].params]

# %%
assert [p.name for p in model["Optimiser"].params] == ["lr", "betas"] and model["Adam"].is_class
assert model["Adam.step"].params == (Param("grad", '"Tensor"', None, "(n,) slope", "positional"),)

# %%
with raises(DataError, match="broken.py, line 2: not valid Python"): parse_source("x = 1\ndef f(:", "broken.py")

# %% [markdown]
# The code itself is the best test: for every function of the core page, names, order and kinds agree with what Python's
# own `inspect` says about the imported function.

# %%
KINDS = {"POSITIONAL_ONLY": "positional", "POSITIONAL_OR_KEYWORD": "positional", "KEYWORD_ONLY": "keyword",
         "VAR_POSITIONAL": "var_positional", "VAR_KEYWORD": "var_keyword"}
ours = parse_source(inspect.getsource(core), "medvol_nb.core")
functions = {n: f for n, f in vars(core).items() if inspect.isfunction(f) and f.__module__ == core.__name__}
for n, f in functions.items():
    assert [(p.name, p.kind, p.default is None) for p in ours[n].params] == \
        [(p.name, KINDS[p.kind.name], p.default is p.empty) for p in inspect.signature(f).parameters.values()], n
    assert ours[n].doc == (inspect.getdoc(f) or "")
len(functions)

# %%
for p in ours["atomic"].params: print(f"{p.name:10} {p.annotation:22} {p.default!s:12} {p.kind:10} {p.comment}")

# %%
assert ours["atomic"].returns_comment == "temporary name to write to" and ours["lock"].returns == "Iterator[Path]"
assert ours["rng_for"].params[1] == Param("keys", "int | str | float | bytes | tuple", None,
                                          "name of the stream: epoch, index, case id, purpose, ...", "var_positional")

# %% [markdown]
# ## From a name to a file
# `importlib.util.find_spec("a.b.c")` imports `a` and `a.b` on the way. Asking for `a` alone imports nothing, and the
# rest of the path is a matter of folders.

# %%
#| export
def module_path(
    dotted: str, # such as 'medvol_nb.embed.train'
) -> Path: # its source file
    "Find the file of a module without importing it or its package"
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", dotted):
        raise ConfigError(f"{dotted!r} is not the dotted name of a module")
    top, *rest = dotted.split(".")
    try: spec = find_spec(top)
    except ValueError: spec = None
    if spec is None: raise ConfigError(f"module {dotted!r}: there is no package {top!r}. Is it installed here?")
    inside = [Path(p, *rest) for p in spec.submodule_search_locations or []]
    files = [f for p in inside for f in (p.with_suffix(".py"), p/"__init__.py")] if rest else [Path(spec.origin or "")]
    for file in files:
        if file.suffix == ".py" and file.is_file(): return file
    raise ConfigError(f"module {dotted!r}: no such file below package {top!r}")

# %%
module_path("medvol_nb.core").name, module_path("medvol_nb").name, module_path("json.decoder").name

# %%
with raises(ConfigError, match="no such file below package 'medvol_nb'"): module_path("medvol_nb.nothing")
with raises(ConfigError, match="there is no package"): module_path("no_such_package.x")
with raises(ConfigError, match="not the dotted name"): module_path("../core")

# %% [markdown]
# ## The entry point
# `function_doc` takes a target as entry points write it, `module:name`. The parsed file is kept until its modification
# time or size changes, so a command line that asks for forty functions reads each file once.

# %%
#| export
@lru_cache(maxsize=128)
def _scanned(path: str, mtime_ns: int, size: int) -> tuple[list[str], dict[str, ast.AST]]:
    try: text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as e: raise DataError(f"{path}: not UTF-8 text (byte {e.start})") from None
    return _scan(text, path)

def function_doc(
    target: str, # 'package.module:function', ':Class' or ':Class.method'
) -> FunctionDoc: # what its source says
    "Describe a function or class by its name, without importing its module"
    module, colon, name = target.partition(":")
    if not colon or not name: raise ConfigError(f"{target!r}: write 'package.module:function'")
    path = module_path(module)
    stat = path.stat()
    lines, found = _scanned(str(path), stat.st_mtime_ns, stat.st_size)
    if name not in found:
        from difflib import get_close_matches
        hint = "".join(f", did you mean {near!r}?" for near in get_close_matches(name, found, n=1))
        raise ConfigError(f"{module} defines no function or class {name!r}{hint}")
    return _describe(lines, found, name, module)

# %%
start = time.process_time()
docs = [function_doc(f"medvol_nb.core:{n}") for n in functions]
took = time.process_time() - start
docs[0].name, f"{1e3*took/len(docs):.2f} ms a function"

# %%
assert took < 1 and [d.params for d in docs] == [ours[n].params for n in functions]
with raises(ConfigError, match="did you mean 'atomic'"): function_doc("medvol_nb.core:atomik")
with raises(ConfigError, match="package.module:function"): function_doc("medvol_nb.core.atomic")

# %% [markdown]
# A module that cannot even be imported is described all the same, and a changed file is read again:

# %%
sys.path.insert(0, (folder := tmpdir()).__enter__().as_posix())
file = Path(sys.path[0])/"mv_absent_gpu.py"
file.write_text("import no_such_cuda\ndef run(n: int = 3, # turns\n        ): 'Turn'\n")
first = function_doc("mv_absent_gpu:run").params[0]
file.write_text("import no_such_cuda\ndef run(n: int = 12, # all turns\n        ): 'Turn'\n")
second = function_doc("mv_absent_gpu:run").params[0]
sys.path.pop(0)
folder.__exit__(None, None, None)
first, second

# %%
assert (first.default, second.comment) == ("3", "all turns") and "mv_absent_gpu" not in sys.modules

# %% [markdown]
# ## Lines for the reference manual
# The documentation builder reads reStructuredText, in which a star, a bar or a trailing underscore of an innocent
# comment would be markup, and `(n) float32` the fourteenth point of a list. `rst_text` keeps single backticks (names
# become links, anything else code) and takes the magic from the rest. `docstring_lines` writes the parameter table.

# %%
#| export
def rst_text(
    text: str, # one line in which only `backticks` mean something
) -> str: # reStructuredText that shows the same
    "Keep comments from being taken for markup"
    out = ""
    for piece in re.split(r"(`[^`]+`)", text):
        if len(piece) > 2 and piece[0] == piece[-1] == "`":
            name = re.fullmatch(r"`~?\.?[A-Za-z_]\w*(\.\w+)*(\(\))?`", piece)
            out += ("\\ " if out and out[-1].isalnum() else "") + (piece if name else f"``{piece[1:-1].strip()}``")
        elif piece:
            glue = "\\ " if out.endswith("`") and piece[0].isalnum() else ""
            out += glue + re.sub(r"[\\*|`]|_(?!\w)", lambda m: "\\" + m[0], piece)
    return "\\" + out if re.match(r"[-+•:>(]|\.\.|\w{1,4}[.)]\s", out) else out

def docstring_lines(
    doc: FunctionDoc, # as from `function_doc`
) -> list[str]: # ':param name: comment' and ':returns: comment', only where there is a comment
    "Parameter comments as the field list that Sphinx shows as a table"
    stars = {"var_positional": r"\*", "var_keyword": r"\*\*"}
    lines = [f":param {stars.get(p.kind, '')}{p.name}: {rst_text(p.comment)}" for p in doc.params if p.comment]
    return lines + ([f":returns: {rst_text(doc.returns_comment)}"] if doc.returns_comment else [])

# %%
docstring_lines(function_doc("medvol_nb.core:rng_for"))

# %%
assert rst_text("(n) float32, n_ * 2, see `close` and `a b`") == r"\(n) float32, n\_ \* 2, see `close` and ``a b``"
assert rst_text("the `n`th of |x|") == r"the `n`\ th of \|x\|"

# %% [markdown]
# ## What a help text costs
# All this must stay cheap in a fresh process. The interpreter and numpy, which the core page imports, take most of the
# time; torch and its kind never appear.

# %%
script = """
import sys, time
from medvol_nb.signatures import function_doc
function_doc("medvol_nb.core:atomic")
print(sorted({"torch", "pandas", "matplotlib", "monai"} & set(sys.modules)), time.process_time())
"""
root = module_path("medvol_nb").parents[1]
run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
loaded, seconds = run.stdout.rsplit(maxsplit=1)
loaded, f"{1e3*float(seconds):.0f} ms of CPU"

# %%
assert loaded == "[]" and float(seconds) < 1
