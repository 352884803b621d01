# %% [markdown]
# # Command line
#
# > `medvol`: every command is a documented function of the library, with the same names, meanings and defaults.
#
# A command that is written beside its function drifts away from it: another default here, a forgotten option there.
# So no command is written. The table below names functions; their signatures become options, their parameter comments
# become help texts. And because help must answer at once, signatures are read from the *source text*: `medvol --help`
# imports neither torch nor anything else that is heavy.

# %%
#| default_exp cli

# %%
#| export
import ast
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer
import typer.core

from medvol_nb.core import ConfigError, MedvolError, log, plain, to_json
from medvol_nb.signatures import FunctionDoc, Param, function_doc, module_path

# %%
import io
from contextlib import redirect_stderr, redirect_stdout

from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## The table
# Name of the command, and where its function is. Groups come from names with two words.

# %%
#| export
COMMANDS = {
    "doctor": "medvol_nb.doctor:doctor",
    "demo": "medvol_nb.demo:demo",
    "view": "medvol_nb.view:view",
    "datalists make": "medvol_nb.recipes:make_datalists",
    "datalists verify": "medvol_nb.verify:verify",
    "datalists labels": "medvol_nb.labels:build_label_space",
    "datalists analyze": "medvol_nb.analyze:analyze",
    "datalists convert": "medvol_nb.convert:convert",
    "supervoxels infer": "medvol_nb.sv_batch:infer",
    "supervoxels batch-infer": "medvol_nb.sv_batch:batch_infer",
    "supervoxels metrics": "medvol_nb.sv_batch:metrics",
    "synth templates": "medvol_nb.synth.templates:templates",
    "synth ensembles": "medvol_nb.synth.generate:ensembles",
    "synth views": "medvol_nb.synth.generate:views",
    "synth pack": "medvol_nb.synth.generate:pack",
    "synth generate": "medvol_nb.synth.generate:generate",
    "synth pretrain": "medvol_nb.synth.pretrain:pretrain",
    "synth features": "medvol_nb.synth.features:features",
    "unet find-patches": "medvol_nb.zarrnet.patches:find_patches_command",
    "unet preview": "medvol_nb.zarrnet.train:preview",
    "unet summary": "medvol_nb.zarrnet.train:network_summary",
    "unet train": "medvol_nb.zarrnet.train:train",
    "unet predict": "medvol_nb.zarrnet.predict:predict",
    "embedding prepare": "medvol_nb.embed.prepare:prepare",
    "embedding train": "medvol_nb.embed.train:train",
    "embedding embed": "medvol_nb.embed.store:embed",
    "embedding match": "medvol_nb.embed.points:match",
    "embedding register": "medvol_nb.embed.register:register",
    "embedding evaluate": "medvol_nb.embed.evaluate:evaluate",
    "embryo extract": "medvol_nb.embryo.archives:extract",
    "embryo split": "medvol_nb.embryo.splits:split",
    "embryo ground-truth": "medvol_nb.embryo.dataset:ground_truth",
    "embryo image-folder": "medvol_nb.embryo.folders:make_image_folder",
    "embryo finetune": "medvol_nb.embryo.finetune:finetune",
    "embryo generate": "medvol_nb.embryo.generate:generate",
    "embryo metrics": "medvol_nb.embryo.commands:metrics",
    "embryo classify": "medvol_nb.embryo.commands:classify",
}
GROUPS: dict[str, str] = {
    "datalists": "From folders of images and labels to verified lists, one label space, class statistics",
    "supervoxels": "Pieces of scans that follow the borders of what is in them, for training and annotation",
    "synth": "Label ensembles from organ shapes, paired synthetic views of them, and features learnt from both",
    "unet": "Multi-task U-Nets on chunked volumes that may be larger than memory",
    "embedding": "Anatomical embeddings: find a point of one scan in another, register, track",
    "embryo": "Time-lapse frames of embryos: from archives to synthetic images, and whether those help",
}

# %% [markdown]
# ## From annotation to option
# A small, closed set of annotations is understood; anything else is a mistake in the library and says so when the
# command line is built, which a test does for every command. Defaults are literals or named constants of the same
# module.

# %%
#| export
@lru_cache
def _constants(module: str) -> dict[str, ast.expr]:
    "Names that a module assigns once at top level, as source trees"
    body = ast.parse(module_path(module).read_text(encoding="utf-8")).body
    return {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)
            and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)}

def _constant(module: str, name: str) -> ast.expr | None:
    "Source tree of a name of a module; looks into the module of this package that it was imported from"
    if (found := _constants(module).get(name)) is not None: return found
    for node in ast.parse(module_path(module).read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.ImportFrom) and node.level and node.module): continue # of this package
        for alias in node.names:
            if name == (alias.asname or alias.name):
                return _constant(f"{module.rsplit('.', node.level)[0]}.{node.module}", alias.name)
    return None

def _type(node: ast.expr, module: str, where: str) -> Any:
    "Python type of an annotation"
    simple = {"str": str, "int": int, "float": float, "bool": bool, "Path": Path, "os.PathLike": Path, "None": None}
    text = ast.unparse(node)
    if text in simple: return simple[text]
    if isinstance(node, ast.Name) and (found := _constant(module, text)) is not None: return _type(found, module, where)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        sides = [_type(n, module, where) for n in (node.left, node.right)]
        kept = [s for s in sides if s is not None and not (s is Path and str in sides)] # a name can mean more than that
        if None in sides: return Optional[kept[0]] # noqa: UP045
        many = [s for s in kept if getattr(s, "__origin__", None) is list]
        return many[0] if many else kept[0]
    if isinstance(node, ast.Subscript):
        outer, inner = ast.unparse(node.value), node.slice
        if outer == "Literal": return Literal[ast.literal_eval(inner)] # noqa: F821
        if outer in ("list", "Sequence"): return list[_type(inner, module, where)]
        if outer == "tuple" and isinstance(inner, ast.Tuple):
            kinds = [_type(n, module, where) for n in inner.elts if ast.unparse(n) != "..."]
            return list[kinds[0]] if len(kinds) < len(inner.elts) else tuple[tuple(kinds)]
    raise ConfigError(f"{where}: annotation {text!r} has no form on the command line")

def _default(p: Param, module: str, where: str) -> Any:
    "Value of a parameter's default"
    node = ast.parse(p.default, mode="eval").body
    if isinstance(node, ast.Name): node = _constant(module, node.id) or node
    try: return ast.literal_eval(node)
    except ValueError: raise ConfigError(f"{where}: default {p.default!r} is not a literal") from None

# %%
#| export
_NAMED = ("config", "image_file", "datalist", "basedir") # options on the command line, as in the systems followed here

def _parameter(p: Param, doc: FunctionDoc) -> inspect.Parameter:
    "Typer parameter: arguments are those before * without default or named like files, the rest are options"
    where = f"{doc.module}:{doc.name}, parameter {p.name}"
    kind = _type(ast.parse(p.annotation or "str", mode="eval").body, doc.module, where)
    given = p.kind == "positional" and p.name not in _NAMED
    if p.default is None:
        extra, default = (typer.Argument if given else typer.Option)(help=p.comment), inspect.Parameter.empty
    else:
        default = _default(p, doc.module, where)
        default = list(default) if isinstance(default, tuple) and getattr(kind, "__origin__", None) is list else default
        extra = typer.Option(help=p.comment, show_default=default is not None)
        flag = p.name.replace("_", "-")
        if kind is bool: extra = typer.Option(f"--{flag}/--no-{flag}", help=p.comment)
        if default is None and type(None) not in getattr(kind, "__args__", ()): kind = Optional[kind] # noqa: UP045
    return inspect.Parameter(p.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, extra])

_SHARED = {
    "json": (bool, typer.Option("--json", help="print the result as JSON"), False),
    "quiet": (bool, typer.Option("--quiet", "-q", help="no progress, only the result"), False),
    "debug": (bool, typer.Option("--debug", help="show the whole traceback of an error"), False),
}

def command(
    target: str, # 'package.module:function'
) -> Callable[..., None]: # function that typer can register; importing its module is left until it is called
    "Make a command from a function's source: annotations, defaults and comments"
    doc = function_doc(target)
    if any(p.kind.startswith("var_") for p in doc.params): raise ConfigError(f"{target}: *args cannot be a command")
    params = [_parameter(p, doc) for p in doc.params]
    taken = {p.name for p in doc.params}
    shared = {k: v for k, v in _SHARED.items() if k not in taken}
    params += [inspect.Parameter(f"cli_{k}", inspect.Parameter.KEYWORD_ONLY, default=d, annotation=Annotated[t, o])
               for k, (t, o, d) in shared.items()]

    def run(**given: Any) -> None:
        flags = {k: k in shared and given.pop(f"cli_{k}") for k in _SHARED}
        _quiet(flags["quiet"])
        module, _, name = target.partition(":")
        f = getattr(importlib.import_module(module), name)
        result = f(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        _show(result, flags["json"])
        ok = result.get("ok") if isinstance(result, Mapping) else getattr(result, "ok", None)
        if ok is False: raise typer.Exit(1)

    run.__name__, run.__doc__ = doc.name, doc.doc
    run.__signature__ = inspect.Signature(params)
    run.__annotations__ = {p.name: p.annotation for p in params}
    return run

# %% [markdown]
# ## What is printed
# The result goes to standard output, everything else to standard error, so `--json` can be piped.

# %%
#| export
def _quiet(quiet: bool) -> None:
    if quiet: os.environ["MEDVOL_QUIET"] = "1"
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)

def _show(result: Any, as_json: bool, depth: int = 0) -> None:
    "Print a result as JSON, or as indented 'name: value' lines"
    if as_json:
        typer.echo(to_json(result))
        return
    has_text = hasattr(result, "__dataclass_fields__") and "__str__" in vars(type(result))
    value = str(result) if has_text else plain(result)
    pad = "  "*depth
    if isinstance(value, dict):
        for k, v in value.items():
            numbers = isinstance(v, list) and all(isinstance(x, (int, float)) for x in v)
            if isinstance(v, (dict, list)) and v and not numbers:
                typer.echo(f"{pad}{k}:")
                _show(v, False, depth + 1)
            else: typer.echo(f"{pad}{k}: {', '.join(map(str, v)) if isinstance(v, list) else v if v != {} else ''}")
    elif isinstance(value, list):
        for v in value:
            typer.echo(pad + (", ".join(f"{k} {x}" for k, x in v.items()) if isinstance(v, dict) else str(v)))
    elif value is not None: typer.echo(f"{pad}{value}")

# %% [markdown]
# ## The app
# Option names may be written with hyphens or underscores, and an option that can be given several times takes several
# words, as in `--phases t6 t7 t8`. The exit code says what happened: 0 done, 1 failed, 2 wrong
# usage, 3 finished but some cases failed, 130 interrupted.

# %%
#| export
def _normal(name: str) -> str: return name.replace("_", "-") if name.startswith("-") or "_" in name else name

_USAGE = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException") # typer's own, or that of click

class _Spread(typer.core.TyperCommand):
    "`--phases t2 t4` means `--phases t2 --phases t4`, where no word could be anything else"
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        places = [p for p in self.params if p.param_type_name == "argument"]
        leading = next((k for k, w in enumerate(args) if w.startswith("-")), len(args))
        if any(p.nargs < 0 for p in places) or leading < sum(p.nargs for p in places):
            return super().parse_args(ctx, args)
        many, out, option, is_given = {o for p in self.params for o in p.opts if p.multiple}, [], "", False
        for w in args:
            if w.startswith("-") and not w[1:2].isdigit():
                option, is_given = _normal(w) if _normal(w) in many else "", False
                out.append(w)
            else:
                out += [option, w] if option and is_given else [w]
                is_given = True
        return super().parse_args(ctx, out)

def build_app(
    words: Sequence[str] | None = None, # of the command line; groups that they do not name stay empty. None: all
) -> typer.Typer: # the command line
    "Assemble the commands of the table; reading the source of each takes a while, so only those that are asked for"
    asked = None if words is None else next((w for w in words if not w.startswith("-")), "")
    settings = {"token_normalize_func": _normal, "help_option_names": ["-h", "--help"], "max_content_width": 100}
    app = typer.Typer(name="medvol", help="From raw 3D biomedical volumes to trained models.", no_args_is_help=True,
                      add_completion=False, context_settings=settings, rich_markup_mode=None,
                      pretty_exceptions_enable=False)
    groups: dict[str, typer.Typer] = {}
    for name, target in COMMANDS.items():
        group, _, verb = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(help=GROUPS.get(group), no_args_is_help=True, context_settings=settings,
                                        rich_markup_mode=None)
            groups[group].callback()(lambda: None)
            app.add_typer(groups[group], name=group)
        if group and asked not in (None, group): continue
        (groups[group] if group else app).command(verb, cls=_Spread, context_settings=settings)(command(target))
    return app

def main(
    args: list[str] | None = None, # words after the command's name; default: those of this process
) -> int: # exit code
    "Entry point of the `medvol` command"
    words = sys.argv[1:] if args is None else args
    debug = "--debug" in words
    try:
        if words in (["--version"], ["-V"]):
            from medvol_nb import __version__
            typer.echo(f"medvol_nb {__version__}")
            return 0
        code = build_app(words)(words, standalone_mode=False)
        if code == 130: raise KeyboardInterrupt # how typer hands on Ctrl-C
        return code if isinstance(code, int) else 0
    except _USAGE as e:
        e.show()
        return e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("interrupted; run the same command again to go on", err=True)
        return 130
    except typer.Exit as e: return e.exit_code
    except (MedvolError, OSError) as e:
        if debug: raise
        typer.echo(f"{type(e).__name__}: {e}", err=True)
        return 3 if type(e).__name__ == "BatchError" else 1
    except Exception as e:
        if debug: raise
        typer.echo(f"internal error, please report it ({type(e).__name__}: {e}). `--debug` shows where", err=True)
        return 1

# %%
def medvol(*words):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err): code = main(list(words))
    return code, out.getvalue(), err.getvalue()

print(medvol("view", "--help")[1])

# %%
with tmpdir() as d:
    results = [medvol("view", str(d/"absent.nii.gz"), "--out", str(d/"x.png")), medvol("view"),
               medvol("demo", "--no-such-option"), medvol("demo", "--dry_run", "--json", "--out", str(d/"demo"))]
[(code, (out + err).strip().splitlines()[-1]) for code, out, err in results]

# %%
assert [code for code, *_ in results] == [1, 2, 2, 0]
with raises(ConfigError, match="has no form on the command line"):
    _type(ast.parse("np.ndarray", mode="eval").body, "medvol_nb.core", "x")

# %%
#| export
if __name__ == "__main__" and __spec__ is not None: raise SystemExit(main()) # python -m medvol_nb.cli, not a notebook

