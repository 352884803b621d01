"""The rules of the code itself, checked on its syntax tree: imports go down, and each mechanism exists once.

Pages are checked as written, with the line numbers of nbs/NN_name.py.
"""
import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/"medvol_nb"
DIRECTIVE = re.compile(r"#\s*\|\s*(\w+)\s*(\S*)")

# Families 1x-6x do not know each other, but for these two needs (house style, section 3)
ALLOWED_ACROSS = {("sv_batch", "datalists"), ("embed.data", "labels"), ("synth.templates", "labels")}

# Writers outside `with atomic(...)`: 'module.function' -> why a crash there cannot leave a half-written output.
# Good reasons: the function only ever gets the temporary name of its caller's `atomic`; an append-only log whose reader
# accepts a torn last line; a chunked store whose ledger says which chunks are whole; scratch that nobody reads later.
WRITERS: dict[str, str] = {
    "parallel._mark": "scratch byte map in a temporary file, removed by the run that made it",
    "parallel._stream": "resets the same scratch byte map between attempts",
    "synth.pairfile._in_place": "an append with an undo log beside it; the next opener puts the old pages back",
    "synth.pairfile.PairFile._stage": "h5py writes into a copy of the touched pages in memory",
    "zarrnet.outputs.Predictions.__init__": "a chunked store whose markers say which rows of chunks are whole",
    "zarrnet.columns.Strip.__init__": "append-only scratch with a checksum for each record, made again if it is torn",
    "embryo.archives._Writer.file": "only ever gets the temporary folder of its caller's `atomic`",
    "embryo.folders._linked": "only ever gets names below the temporary folder of its caller's `atomic`",
    "embryo.index.remove_f0_duplicates": "moves a folder that is about to be removed out of sight",
}


@dataclass(frozen=True)
class Page:
    path: Path
    order: tuple[int, str]  # (34, 'a') for 34a_name.py
    module: str  # as in default_exp, '' for pages without export
    exported: str = field(repr=False)  # source with everything blanked that is not exported; line numbers kept
    lessons: str = field(repr=False)  # the other code cells, likewise

    @property
    def family(self) -> int: return self.order[0]//10


def read_page(path: Path) -> Page:
    number, letter = re.match(r"(\d\d)([a-z]?)_", path.name).groups()
    lines, module = path.read_text(encoding="utf-8").split("\n"), ""
    starts = [i for i, line in enumerate(lines) if re.match(r"# %%(\s|$)", line)] + [len(lines)]
    parts = {"exported": [""]*len(lines), "lessons": [""]*len(lines)}
    for a, b in zip(starts, starts[1:]):
        if "[markdown]" in lines[a]: continue
        cell = lines[a + 1:b]
        directives = {}
        for line in cell:
            if not (m := DIRECTIVE.match(line)): break
            directives[m[1]] = m[2]
        module = directives.get("default_exp", module)
        parts["exported" if {"export", "exporti", "exports"} & set(directives) else "lessons"][a + 1:b] = cell
    return Page(path, (int(number), letter), module, *("\n".join(parts[k]) for k in ("exported", "lessons")))


PAGES = [read_page(p) for p in sorted((ROOT/"nbs").glob("[0-9][0-9]*_*.py"))]
BY_MODULE = {p.module: p for p in PAGES if p.module}
EXPORTING = [pytest.param(p, id=p.path.stem) for p in PAGES if p.module]
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))
           if p.name not in ("__init__.py", "_modidx.py")}


def imported(tree: ast.AST, inside: str = "") -> list[tuple[int, str]]:
    "Lines and names of imported modules of this package, without 'medvol_nb.'; `inside` resolves leading dots"
    found = []

    def add(line: int, dotted: str, names: tuple[str, ...] = ()) -> None:
        top, _, rest = dotted.partition(".")
        if top != "medvol_nb": return
        if rest in BY_MODULE or not names: found.append((line, rest))
        else: found.extend((line, f"{rest}.{n}".strip(".")) for n in names)

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names: add(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level: base = ".".join([*f"medvol_nb.{inside}".split(".")[:-node.level], *filter(None, [base])])
            add(node.lineno, base, tuple(a.name for a in node.names))
        elif isinstance(node, ast.Call) and dotted_name(node.func).split(".")[-1] in ("import_module", "optional"):
            if node.args and isinstance(node.args[0], ast.Constant): add(node.lineno, str(node.args[0].value))
    return [(line, m) for line, m in found if m not in ("", "__version__")]


def dotted_name(node: ast.AST) -> str:
    "'np.random.rand' for the expression of that spelling; '' for anything that is not a plain chain of names"
    if isinstance(node, ast.Name): return node.id
    if isinstance(node, ast.Attribute): return f"{dotted_name(node.value) or '?'}.{node.attr}"
    return ""


def import_problems(page: Page, tree: ast.AST, inside: str = "", own: bool = False) -> list[str]:
    problems = []
    for line, target in imported(tree, inside):
        goal = BY_MODULE.get(target)
        if goal is None: problems.append(f"line {line}: no page exports medvol_nb.{target}"); continue
        if goal is page and own: continue
        if goal.order >= page.order:
            problems.append(f"line {line}: imports {target} (page {goal.path.stem}), which is not a lower page")
        if {page.family, goal.family} <= set(range(1, 7)) and page.family != goal.family:
            if (page.module, target) not in ALLOWED_ACROSS:
                problems.append(f"line {line}: family {page.family}x imports {target} of family {goal.family}x")
    return problems


def report(problems: list[str]) -> None:
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems)


# ---------------------------------------------------------------------------------------------------------- imports

def test_page_numbers_and_modules_are_unique():
    orders, modules = [p.order for p in PAGES], [p.module for p in PAGES if p.module]
    assert len(set(orders)) == len(orders), "two pages have the same number"
    assert len(set(modules)) == len(modules), "two pages export the same module"


def test_summaries_have_one_line(): # nbdev 2 makes the first line of it the module's docstring, nbdev 3 all lines
    assert [p.path.name for p in PAGES if len(re.findall(r"^# > .*\n# >", p.path.read_text(), re.M))] == []


def test_every_module_has_a_page():
    assert sorted(set(MODULES) - set(BY_MODULE)) == []


@pytest.mark.parametrize("page", EXPORTING)
def test_exported_cells_import_lower_pages_only(page):
    report(import_problems(page, ast.parse(page.exported)))


@pytest.mark.parametrize("page", [pytest.param(p, id=p.path.stem) for p in PAGES])
def test_lesson_cells_import_no_higher_page(page):
    "A page may import itself to show processes at work; tutorials (95 and up) may import everything"
    code = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", page.lessons).replace("await ", "")
    report([p for p in import_problems(page, ast.parse(code), own=True) if "family" not in p])


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_lower_pages_only(name):
    if name not in BY_MODULE: pytest.skip("has no page, see test_every_module_has_a_page")
    report(import_problems(BY_MODULE[name], ast.parse(MODULES[name].read_text(encoding="utf-8")), inside=name))


def style_problems(tree: ast.AST) -> list[str]:
    problems = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        if node.module == "__future__": problems.append(f"line {node.lineno}: from __future__ (Python 3.11 needs none)")
        if node.level: problems.append(f"line {node.lineno}: relative import; pages name medvol_nb in full")
        if any(a.name == "*" for a in node.names): problems.append(f"line {node.lineno}: star import")
    return problems


@pytest.mark.parametrize("page", EXPORTING)
def test_import_style(page): report(style_problems(ast.parse(page.exported)))


# ------------------------------------------------------------------------------------- randomness, output, dangers

TORCH_DRAWS = {f"torch.{n}" for n in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")}
TORCH_GLOBAL = re.compile(
    r"torch\.(manual_seed|seed|set_rng_state|random\.\w+|(cuda|mps|xpu)\.(manual_seed|seed|set_rng)\w*)")


def modules_imported(tree: ast.AST) -> set[str]:
    "Names under which whole modules were imported"
    return {(a.asname or a.name).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}


def random_problems(tree: ast.AST) -> list[str]:
    "Global generators, and generators that were not named through rng_for"
    problems, has_random = [], "random" in modules_imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            problems.append(f"line {node.lineno}: imports from {node.module}, use core.rng_for")
        if not isinstance(node, ast.Call): continue
        name = dotted_name(node.func)
        if re.match(r"(np|numpy)\.random\.", name) or (has_random and name.startswith("random.")):
            problems.append(f"line {node.lineno}: {name}(...), use core.rng_for")
        elif TORCH_GLOBAL.fullmatch(name):
            problems.append(f"line {node.lineno}: {name}(...), use checkpoints.torch_rng_for")
        elif name in TORCH_DRAWS and not any(k.arg == "generator" for k in node.keywords):
            problems.append(f"line {node.lineno}: {name}(...) draws from torch's global generator, pass generator=")
    return problems


def print_problems(tree: ast.AST) -> list[str]:
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    return [f"line {n.lineno}: print(...)" for n in calls if dotted_name(n.func) == "print"]


def is_true(node: ast.AST) -> bool: return isinstance(node, ast.Constant) and node.value is True


def danger_problems(tree: ast.AST) -> list[str]:
    "What turns data into code"
    problems = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for n in names:
                if n.split(".")[0] in ("pickle", "cPickle", "_pickle", "dill", "marshal", "shelve"):
                    problems.append(f"line {line}: import of {n}")
        if not isinstance(node, ast.Call): continue
        name, given = dotted_name(node.func), {k.arg: k.value for k in node.keywords}
        if name in ("eval", "exec", "compile", "__import__"): problems.append(f"line {line}: {name}(...)")
        if name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
            problems.append(f"line {line}: {name}(...), use subprocess.run with a list")
        if "shell" in given and not (isinstance(given["shell"], ast.Constant) and given["shell"].value is False):
            problems.append(f"line {line}: shell=True")
        if re.fullmatch(r"yaml\.(load|load_all|unsafe_load|unsafe_load_all|full_load|full_load_all)", name):
            problems.append(f"line {line}: {name}(...), use yaml.safe_load")
        if name.split(".")[-1] == "read_pickle" or name in ("joblib.load", "cloudpickle.load", "cloudpickle.loads"):
            problems.append(f"line {line}: {name}(...) unpickles")
        if is_true(given.get("allow_pickle")): problems.append(f"line {line}: allow_pickle=True")
        if name == "torch.load" and not is_true(given.get("weights_only")):
            problems.append(f"line {line}: torch.load without weights_only=True")
    return problems


# Calls that create or replace what a user will read later
WRITE_METHODS = set("""
    write_text write_bytes tofile to_filename to_csv to_parquet to_json to_excel to_hdf to_feather to_pickle savefig
    save_pretrained hardlink_to symlink_to touch
    """.split())
WRITE_FUNCTIONS = set("""
    np.save np.savez np.savez_compressed np.savetxt numpy.save nib.save nibabel.save torch.save save_file
    safetensors.torch.save_file safetensors.numpy.save_file plt.savefig imageio.imwrite tifffile.imwrite imwrite
    imsave shutil.copy shutil.copy2 shutil.copyfile shutil.copytree shutil.move shutil.make_archive os.rename
    os.replace os.link os.symlink zarr.save zarr.save_array zarr.save_group zarr.create zarr.create_array
    zarr.create_group zarr.array zarr.empty zarr.zeros zarr.ones zarr.full zarr.group zarr.copy_store
    """.split())
# Functions that open with a mode: position of the mode, and the mode if none is given
OPENERS = dict.fromkeys("""
    open io.open os.fdopen gzip.open bz2.open lzma.open igzip.open isal.igzip.open tarfile.open ZipFile
    zipfile.ZipFile gzip.GzipFile h5py.File
    """.split(), (1, "r")) | dict.fromkeys(
    ("zarr.open", "zarr.open_array", "zarr.open_group"), (None, "a")) | {
    "np.memmap": (2, "r+"), "open_memmap": (1, "r+"), "np.lib.format.open_memmap": (1, "r+")}
NOT_FILES = ("Image", "webbrowser", "np", "TemplateBank")
MEMORY = {"BytesIO", "StringIO", "MemoryStore", "SpooledTemporaryFile", "TemporaryFile"}


def written_by(call: ast.Call) -> str:
    "How the call writes; '' if it does not"
    name, given = dotted_name(call.func), {k.arg: k.value for k in call.keywords}
    if name == "os.open": return name if re.search("O_(WRONLY|RDWR|CREAT|APPEND|TRUNC)", ast.unparse(call)) else ""
    if name in OPENERS or name.endswith(".open") and name.split(".")[0] not in NOT_FILES:
        place, text = OPENERS.get(name, (0, "r"))
        mode = given.get("mode") or (call.args[place] if place is not None and len(call.args) > place else None)
        if mode is not None:
            if not isinstance(mode, ast.Constant): return f"{name}(mode not a literal)"
            text = mode.value
        return f"{name}(mode={text!r})" if isinstance(text, str) and re.search(r"[wax+]", text) else ""
    if name in WRITE_FUNCTIONS: return name
    last = name.split(".")[-1]
    if last in WRITE_METHODS and "." in name and not name.startswith("core."): return name
    if "." in name and last in ("rename", "replace") and len(call.args) == 1 and not call.keywords: return name
    return name if "." in name and last == "save" and call.args else ""


def is_atomic(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and dotted_name(node.func) in ("atomic", "core.atomic")


class WriteLint(ast.NodeVisitor):
    "Collects writing calls that are not lexically inside `with atomic(...)`"
    def __init__(self) -> None:
        self.found, self.scope, self.depth, self.memory = [], [], 0, [set()]

    def visit_definition(self, node) -> None:
        self.scope.append(node.name)
        bound = set()
        for n in ast.walk(node):
            pairs = [(t, n.value) for t in n.targets] if isinstance(n, ast.Assign) else \
                [(i.optional_vars, i.context_expr) for i in n.items] if isinstance(n, ast.With) else \
                [(n.target, n.value)] if isinstance(n, ast.NamedExpr) else []
            for target, value in pairs:
                if isinstance(target, ast.Name) and isinstance(value, ast.Call) and \
                        dotted_name(value.func).split(".")[-1] in MEMORY: bound.add(target.id)
        self.memory.append(bound)
        self.generic_visit(node)
        self.memory.pop()
        self.scope.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_definition

    def visit_With(self, node) -> None:
        before = self.depth
        for item in node.items:
            self.visit(item)
            self.depth += is_atomic(item.context_expr)
        self.depth += any(isinstance(n, ast.Call) and dotted_name(n.func).endswith(".enter_context") and n.args
                          and is_atomic(n.args[0]) for n in ast.walk(node))
        for statement in node.body: self.visit(statement)
        self.depth = before

    visit_AsyncWith = visit_With

    def in_memory(self, call: ast.Call) -> bool:
        "The target is a buffer, or the null device"
        targets = [*call.args[:2], *(k.value for k in call.keywords if k.arg in ("store", "fname", "file", "fileobj"))]
        for t in targets:
            if isinstance(t, ast.Name) and any(t.id in bound for bound in self.memory): return True
            if isinstance(t, ast.Call) and dotted_name(t.func).split(".")[-1] in MEMORY: return True
            if dotted_name(t) == "os.devnull": return True
        return False

    def visit_Call(self, node) -> None:
        if not self.depth and (how := written_by(node)) and not self.in_memory(node):
            self.found.append((node.lineno, ".".join(self.scope), how))
        self.generic_visit(node)


def write_problems(tree: ast.AST, module: str, used: set[str] | None = None) -> list[str]:
    lint, problems = WriteLint(), []
    lint.visit(tree)
    for line, scope, how in lint.found:
        key = f"{module}.{scope}"
        if key in WRITERS:
            if used is not None: used.add(key)
        else: problems.append(f"line {line}: {how} in {key}, outside `with atomic(...)`")
    return problems


ASKERS = [p for p in EXPORTING if p.values[0].module not in ("core", "checkpoints", "torchcore")]

# Other generators that a page may use: module -> (call, why `rng_for` cannot serve)
GENERATORS: dict[str, tuple[str, str]] = {
    "splits": ("np.random.RandomState", "published lists were split with NumPy's legacy generator, to be reproduced"),
    "embryo.splits": ("random.Random", "published splits and image folders were made with it, to be reproduced"),
}


@pytest.mark.parametrize("page", ASKERS)
def test_randomness_comes_from_rng_for(page):
    call, reason = GENERATORS.get(page.module, ("", ""))
    found = random_problems(ast.parse(page.exported))
    rest = [p for p in found if not (call and f" {call}(...)," in p)]
    report(rest)
    assert not call or len(rest) < len(found) and len(reason.split()) >= 4, "this exception is no longer needed"


@pytest.mark.parametrize("page", [p for p in EXPORTING if p.values[0].module not in ("cli", "doctor")])
def test_no_print(page): report(print_problems(ast.parse(page.exported)))


@pytest.mark.parametrize("page", EXPORTING)
def test_nothing_turns_data_into_code(page): report(danger_problems(ast.parse(page.exported)))


@pytest.mark.parametrize("page", [p for p in EXPORTING if p.values[0].module != "core"])
def test_outputs_are_atomic(page): report(write_problems(ast.parse(page.exported), page.module))


def test_exceptions_for_writers_are_needed_and_explained():
    used: set[str] = set()
    for page in PAGES:
        if page.module: write_problems(ast.parse(page.exported), page.module, used)
    assert sorted(set(WRITERS) - used) == [], "these exceptions are no longer needed"
    assert all(len(reason.split()) >= 4 for reason in WRITERS.values()), "an exception needs a reason"


# --------------------------------------------------------------------------------------- the checks check something

@pytest.mark.parametrize("check, bad", [
    (style_problems, "from __future__ import annotations"),
    (style_problems, "from medvol_nb.core import *"),
    (style_problems, "from .core import atomic"),
    (random_problems, "np.random.default_rng(0)"),
    (random_problems, "import random\nrandom.shuffle(x)"),
    (random_problems, "from random import shuffle"),
    (random_problems, "torch.manual_seed(0)"),
    (random_problems, "torch.cuda.manual_seed_all(0)"),
    (random_problems, "torch.randn(3)"),
    (print_problems, "def f(): print(1)"),
    (danger_problems, "eval(s)"),
    (danger_problems, "import pickle"),
    (danger_problems, "from pickle import loads"),
    (danger_problems, "yaml.load(f, Loader=yaml.SafeLoader)"),
    (danger_problems, "subprocess.run(c, shell=True)"),
    (danger_problems, "subprocess.run(c, shell=flag)"),
    (danger_problems, "os.system('ls')"),
    (danger_problems, "np.load(p, allow_pickle=True)"),
    (danger_problems, "torch.load(p)"),
])
def test_rules_catch(check, bad): assert check(ast.parse(bad))


@pytest.mark.parametrize("check, good", [
    (random_problems, "def f(rng: np.random.Generator): return rng.random() + self.random.x()"),
    (random_problems, "torch.randn(3, generator=g)"),
    (print_problems, "log.info('print(1)')"),
    (danger_problems, "model.eval(); re.compile('x'); yaml.safe_load(t); subprocess.run(['ls'], shell=False)"),
    (danger_problems, "torch.load(p, weights_only=True)"),
])
def test_rules_let_pass(check, good): assert check(ast.parse(good)) == []


def lint(code: str) -> list[str]: return write_problems(ast.parse("def f():\n " + code.replace("\n", "\n ")), "m")


@pytest.mark.parametrize("bad", [
    "open(p, 'w')", "open(p, mode='ab')", "open(p, mode)", "p.open('w')", "(d/'x').open('x')", "p.write_text(s)",
    "(d/'x').write_bytes(b)", "np.save(p, a)", "nib.save(i, p)", "table.to_csv(p)", "fig.savefig(p)",
    "os.replace(a, b)", "Image.fromarray(a).save(p)", "temp.rename(p)", "(d/'a').replace(p)", "h5py.File(p, 'r+')",
    "zarr.open(p, mode='w')", "zarr.open(p)", "gzip.open(p, 'wb')", "torch.save(x, p)", "save_file(t, p)",
    "zipfile.ZipFile(p, 'w')", "os.open(p, os.O_WRONLY | os.O_CREAT)",
    "with open(p, 'w') as f, atomic(q) as t: pass",
    "with atomic(p) as t: pass\nnp.save(p, a)",
])
def test_write_lint_catches(bad): assert lint(bad)


@pytest.mark.parametrize("good", [
    "open(p)", "open(p, 'rb')", "p.open()", "p.open('r')", "gzip.open(p)", "h5py.File(p, 'r')",
    "zarr.open(p, mode='r')", "s.replace('a', 'b')", "dataclasses.replace(x, a=1)", "Image.open(f)",
    "buf = io.BytesIO(); fig.savefig(buf)",
    "fig.savefig(io.BytesIO())", "zarr.create_array(store=zarr.storage.MemoryStore(), shape=s)", "write_text(p, s)",
    "write_json(p, x)", "open(os.devnull, 'w')", "os.open(p, os.O_RDONLY)",
    "with atomic(p) as t: np.save(t, a)",
    "with atomic(p) as t, open(t, 'w') as f: f.write(s)",
    "with atomic(p, folder=True) as d:\n  for x in y:\n   with open(d/x, 'wb') as f: f.write(x)",
    "with ExitStack() as s:\n  t = s.enter_context(atomic(p))\n  np.save(t, a)",
])
def test_write_lint_lets_pass(good): assert lint(good) == []


def test_import_rules_catch(monkeypatch):
    def page(order, module): return Page(Path(f"{order}_{module}.py"), (order, ""), module, "", "")
    pages = {p.module: p for p in (page(0, "core"), page(10, "labels"), page(11, "datalists"), page(22, "sv_batch"),
                                   page(30, "embed.data"), page(31, "embed.model"))}
    monkeypatch.setitem(globals(), "BY_MODULE", pages)
    def problems(module, source, inside=""): return import_problems(pages[module], ast.parse(source), inside)
    assert problems("labels", "from medvol_nb.datalists import x") and problems("labels", "import medvol_nb.labels")
    assert problems("embed.model", "def f():\n from medvol_nb.sv_batch import x")
    assert problems("embed.model", "from medvol_nb import sv_batch")
    assert problems("core", "from medvol_nb.gone import x")
    assert problems("embed.data", "from .model import x", inside="embed.data")
    assert problems("embed.data", "importlib.import_module('medvol_nb.embed.model')")
    assert not problems("sv_batch", "from medvol_nb.datalists import x\nfrom medvol_nb import core, __version__")
    assert not problems("embed.model", "from .data import x\nfrom ..core import y", inside="embed.model")
    assert not problems("embed.data", "from medvol_nb.labels import x")
