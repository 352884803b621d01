"""Page 89: parameter comments, annotations and docstrings, from source text alone."""
import ast
import inspect
import sys
from pathlib import Path

import pytest

from medvol_nb.core import ConfigError, DataError
from medvol_nb.signatures import FunctionDoc, Param, docstring_lines, function_doc, module_path, parse_source, rst_text

PACKAGE = Path(__file__).resolve().parents[1]/"medvol_nb"
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))


def one(text, name="f"): return parse_source(text)[name]


def comments(text, name="f"): return {p.name: p.comment for p in one(text, name).params}


# ---- which comment belongs to whom ----------------------------------------------------------------------------------
@pytest.mark.parametrize("text, expected", [
    ("def f(a, # first\n      b): # result\n    'F'", {"a": "first", "b": ""}),
    ("def f(\n    a, # one\n       # two\n    b=1, # three\n): 'F'", {"a": "one two", "b": "three"}),
    ("def f(\n    # heading\n    a, # one\n    # another heading\n    *,\n    b, # two\n): 'F'",
     {"a": "one another heading", "b": "two"}),
    ("def f(\n    a='# no comment', # yes\n): 'F'", {"a": "yes"}),
    ("def f(\n    a=(1, # inner\n       2), # outer\n): 'F'", {"a": "outer"}),
    ("def f(\n    a=lambda x, y: {x: y}, # map\n    *args, # rest\n    **kw, # named\n): 'F'",
     {"a": "map", "args": "rest", "kw": "named"}),
    ("def f(\n    a: dict[str, int] = {'k': 1}, # typed\n    b: int = 2 # last, no comma\n): 'F'",
     {"a": "typed", "b": "last, no comma"}),
    ("@deco(x=1) # of the decorator\ndef f(\n    a, # one\n): 'F'", {"a": "one"}),
    ("async def f(\n    a, # one\n): 'F'", {"a": "one"}),
    ("def f(\n    a, ## double\n    b, #tight\n    c, #\n): 'F'", {"a": "double", "b": "tight", "c": ""}),
    ("def f(\n    größe, # [µm] × 2\n): 'F'", {"größe": "[µm] × 2"}),
    ("def f(): 'F' # body", {})])
def test_comments_of_parameters(text, expected): assert comments(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("def f(a) -> int: # result\n    'F'", "result"),
    ("def f(a): # result\n         # goes on\n    'F'", "result goes on"),
    ("def f(a) -> int:\n    'F' # not this", ""),
    ("def f(\n    a, # one\n) -> dict[str, int]: # table\n    'F'", "table"),
    ("def f(a, b=lambda x: x): return a # sum", "")])
def test_comment_of_the_result(text, expected): assert one(text).returns_comment == expected


def test_text_of_annotations_defaults_and_docstrings():
    f = one('def f(a: "Volume", b: int | None = None, *c: str, d: float = 1e-3, e=("x",\n  "y"), **g) -> np.ndarray:\n'
            '    """First line\n\n    More\n    """')
    assert f == FunctionDoc("f", "", (
        Param("a", '"Volume"', None, "", "positional"), Param("b", "int | None", "None", "", "positional"),
        Param("c", "str", None, "", "var_positional"), Param("d", "float", "1e-3", "", "keyword"),
        Param("e", None, "('x', 'y')", "", "keyword"), Param("g", None, None, "", "var_keyword")),
        "np.ndarray", "", "First line\n\nMore", False)


def test_offsets_count_bytes_as_ast_does():
    assert one("def f(ä: 'größe' = 'µm', b: int = 3): 'F'").params[1] == Param("b", "int", "3", "", "positional")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_marks_do_not_matter(end):
    text = "\ufeff" + "def f(\n    a, # one\n): # two\n    'F'\n".replace("\n", end)
    assert comments(text) == {"a": "one"} and one(text).returns_comment == "two"


# ---- classes --------------------------------------------------------------------------------------------------------
def test_a_class_is_what_one_passes_to_create_it():
    text = ("class A:\n    'A'\n    def __init__(self,\n                 x, # one\n                 ): self.x = x\n"
            "    def g(self, y, # two\n          ): 'G'\n    @staticmethod\n    def h(z, # three\n          ): 'H'\n"
            "    @property\n    def p(self): 'P'\n    @p.setter\n    def p(self, v): pass\n")
    assert comments(text, "A") == {"x": "one"} and one(text, "A").is_class and one(text, "A").doc == "A"
    assert comments(text, "A.g") == {"y": "two"} and comments(text, "A.h") == {"z": "three"}
    assert one(text, "A.p").doc == "P"


def test_fields_of_dataclasses_and_models():
    text = ("@dataclass(frozen=True)\nclass A:\n    'A'\n    x: int # one\n"
            "    y: list = field(default_factory=list) # two\n    hidden: int = field(init=False) # three\n"
            "    kind: ClassVar[str] = 'a' # four\n    _own: int = 1 # five\n"
            "class M(BaseModel):\n    'M'\n    lr: float = Field(1e-3, gt=0) # rate\n"
            "    n: int = Field(..., ge=1) # needed\n"
            "class N(M):\n    'N'\n    lr: float = 2.0 # other\n    z: int = Field(default=4) # new\n")
    rows = [(p.name, p.default, p.comment, p.kind) for p in one(text, "A").params]
    assert rows == [("x", None, "one", "positional"), ("y", "list()", "two", "positional")]
    assert [(p.name, p.default, p.comment, p.kind) for p in one(text, "N").params] == \
        [("lr", "2.0", "other", "keyword"), ("n", None, "needed", "keyword"), ("z", "4", "new", "keyword")]


def test_definitions_below_if_and_try_are_found():
    text = "if x:\n    def a(): 'A'\nelse:\n    def b(): 'B'\ntry: import y\nexcept ImportError:\n    def c(): 'C'\n"
    assert set(parse_source(text)) == {"a", "b", "c"}


@pytest.mark.parametrize("text", ["def f(:", "x = (", "\0"])
def test_text_that_is_no_python_is_an_error_with_its_place(text):
    with pytest.raises(DataError, match="page.py.*not valid Python"): parse_source(text, "page.py")


# ---- the library itself ---------------------------------------------------------------------------------------------
KINDS = {"POSITIONAL_ONLY": "positional", "POSITIONAL_OR_KEYWORD": "positional", "KEYWORD_ONLY": "keyword",
         "VAR_POSITIONAL": "var_positional", "VAR_KEYWORD": "var_keyword"}


@pytest.mark.parametrize("name", ["core", "parallel", "plot", "torchcore", "checkpoints", "phantoms", "report", "view"])
def test_every_function_agrees_with_inspect(name):
    module = __import__(f"medvol_nb.{name}", fromlist=["x"])
    ours = parse_source((PACKAGE/f"{name}.py").read_text(encoding="utf-8"))
    count = 0
    for n, f in vars(module).items():
        f = inspect.unwrap(f) if callable(f) else f
        if not inspect.isfunction(f) or f.__module__ != module.__name__ or f.__name__ != n: continue
        found = inspect.signature(f).parameters.values()
        assert [(p.name, p.kind) for p in ours[n].params] == [(p.name, KINDS[p.kind.name]) for p in found]
        for p, q in zip(ours[n].params, found):
            assert (p.default is None) == (q.default is q.empty) and (p.annotation is None) == (q.annotation is q.empty)
            if p.default in ("None", "True", "False"): assert q.default is ast.literal_eval(p.default)
        assert ours[n].doc == (inspect.getdoc(f) or "")
        count += 1
    assert count > 3


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_read(name):
    found = parse_source((PACKAGE/f"{name}.py").read_text(encoding="utf-8"), name)
    assert found and all(isinstance(d, FunctionDoc) and d.module == name for d in found.values())


# ---- from a name to a file ------------------------------------------------------------------------------------------
def test_a_module_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path/"mv_box"/"deep").mkdir(parents=True)
    for name in ("mv_box/__init__.py", "mv_box/deep/__init__.py", "mv_box/deep/leaf.py", "mv_single.py"):
        (tmp_path/name).write_text("raise RuntimeError('imported')\ndef f(\n    n: int = 3, # turns\n): 'Turn'\n")
    monkeypatch.syspath_prepend(tmp_path)
    for dotted, file in (("mv_box", "mv_box/__init__.py"), ("mv_box.deep", "mv_box/deep/__init__.py"),
                         ("mv_box.deep.leaf", "mv_box/deep/leaf.py"), ("mv_single", "mv_single.py")):
        assert module_path(dotted) == tmp_path/file
        assert function_doc(f"{dotted}:f").params == (Param("n", "int", "3", "turns", "positional"),)
    assert not [m for m in sys.modules if m.startswith("mv_")]


def test_a_changed_file_is_read_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for text in ("one", "another"):
        (tmp_path/"mv_changing.py").write_text(f"def f(a, # {text}\n      ): 'F'\n")
        assert function_doc("mv_changing:f").params[0].comment == text


@pytest.mark.parametrize("dotted, said", [
    ("medvol_nb.nothing", "no such file below package 'medvol_nb'"), ("no_such_package.x", "there is no package"),
    ("../core", "not the dotted name"), ("", "not the dotted name"), ("a..b", "not the dotted name"),
    ("sys", "no such file|no package"), ("math.x", "no such file")])
def test_modules_that_are_not_there(dotted, said):
    with pytest.raises(ConfigError, match=said): module_path(dotted)


@pytest.mark.parametrize("target, said", [
    ("medvol_nb.core.atomic", "package.module:function"), ("medvol_nb.core:", "package.module:function"),
    ("medvol_nb.core:atomik", "did you mean 'atomic'"), ("medvol_nb.core:zzzzzz", "no function or class 'zzzzzz'$")])
def test_targets_that_are_not_there(target, said):
    with pytest.raises(ConfigError, match=said): function_doc(target)


def test_a_file_that_is_not_text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/"mv_binary.py").write_bytes(b"x = '\xff'")
    with pytest.raises(DataError, match="not UTF-8 text"): function_doc("mv_binary:f")


# ---- for the manual -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, expected", [
    ("plain", "plain"), ("a*b", r"a\*b"), ("n_", r"n\_"), ("n_items", "n_items"), ("|x|", r"\|x\|"), ("\\", r"\\"),
    ("(n) float", r"\(n) float"), ("1. first", r"\1. first"), ("- dash", r"\- dash"), (".. note", r"\.. note"),
    ("`close`", "`close`"), ("`a b`", "``a b``"), ("the `n`th", r"the `n`\ th"), ("x`y`", r"x\ `y`"),
    ("a ` b", r"a \` b"), ("", "")])
def test_comments_survive_restructured_text(text, expected): assert rst_text(text) == expected


def test_rst_shows_the_same_words():
    nodes = pytest.importorskip("docutils.core")
    for text in ("(x, y) int * 2 |a| n_ 5. of", "- no list", "1.5 mm", "`a b` and *stars*", "a) b", "..: x", "x_ y__"):
        shown = nodes.publish_doctree(rst_text(text), settings_overrides={"report_level": 5}).astext()
        assert shown == text.replace("`", "")


def test_the_table_of_parameters():
    doc = one("def f(\n    a, # one\n    b,\n    *rest, # more\n    **kw, # named\n): # all of it\n    'F'")
    lines = [":param a: one", r":param \*rest: more", r":param \*\*kw: named", ":returns: all of it"]
    assert docstring_lines(doc) == lines
    assert docstring_lines(one("def g(a): 'G'", "g")) == []
