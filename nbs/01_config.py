# %% [markdown]
# # Configuration
#
# > Typed settings files: every problem reported at once, with its line and a suggestion, before any work is done.
#
# A run that trains for a night with `batchsize` instead of `batch_size` has trained with the default, and nobody was
# told. A reader that stops at the first mistake costs one start per mistake. So a configuration is a
# [pydantic](https://docs.pydantic.dev) model: unknown keys are errors, types are checked, and all problems come in
# one message with dotted keys and line numbers. What this page adds is small: the hint *did you mean*, historic names
# of keys, paths relative to the file, and a guarded YAML reader.

# %%
#| default_exp config

# %%
#| export
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from medvol_nb.core import ConfigError, FormatError, OnExists, _read_text, parse_json, plain, to_json, write_text

# %%
from typing import Literal

from pydantic import Field

from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## A model is a list of promises
# `Config` is the base of every settings class in the library. Fields carry their type, default and bounds; the
# comment says what they mean. Instances are frozen: a run cannot change its own settings, so what is stored in a
# checkpoint is what was used. `aliases` maps names that files of older tools use to ours.

# %%
#| export
class Config(BaseModel):
    "Base of all settings: unknown keys are errors, instances do not change, historic key names are understood"
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True,
                              protected_namespaces=())
    aliases: ClassVar[Mapping[str, str]] = {} # historic key -> key of this model

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        "Replace historic names; giving both the old and the new one is an error"
        if not isinstance(data, Mapping) or not cls.aliases: return data
        out = {}
        for key, value in data.items():
            name = cls.aliases.get(key, key)
            if name in out or (name != key and name in data):
                raise ValueError(f"'{key}' and '{name}' mean the same, give one of them")
            out[name] = value
        return out

def _anchor(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return path if base is None or path.is_absolute() else Path(base)/path

ConfigPath = Annotated[Path, AfterValidator(_anchor)]

# %%
class Trainer(Config):
    aliases = {"train_batch_size": "batch_size"}
    batch_size: int = Field(2, ge=1) # samples a step
    patch_size: tuple[int, int, int] = (64, 64, 64) # [voxel]
    optimizer: Literal["adamw", "sgd"] = "adamw"

class Task(Config):
    name: str
    volume: ConfigPath
    trainer: Trainer = Trainer()

Task(name="brain", volume="brain.zarr").trainer

# %% [markdown]
# ## Reading text without surprises
# YAML is convenient and dangerous: it can build Python objects, and a file of 300 bytes can stand for billions of
# values through references to references. The reader below uses the safe loader and counts values before it builds
# any. The same parser tells on which line each key stands; JSON is close enough to YAML that it serves both.

# %%
#| export
MAX_VALUES = 200_000

def _measure(text: str, where: str, loader: type) -> None:
    "Refuse a document that is too large or too deep, event by event: building it first would take memory and stack"
    import yaml
    depth = values = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.NodeEvent)
        line = event.start_mark.line + 1
        if depth > 100: raise FormatError(f"{where}, line {line}: nested more than 100 levels deep")
        if values > MAX_VALUES: raise FormatError(f"{where}: holds more than {MAX_VALUES} values")

def _compose(text: str, where: str) -> Any:
    "YAML node tree of `text` with its source lines; refuses tags, cycles and reference bombs"
    import yaml
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _measure(text, where, loader)
        node = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise FormatError(f"{where}{place}: {getattr(e, 'problem', None) or e}") from None
    except RecursionError: raise FormatError(f"{where}: nested too deeply") from None
    sizes: dict[int, int] = {}
    def count(n: Any, depth: int) -> int:
        if n.tag.startswith(("tag:yaml.org,2002:python", "!")):
            raise FormatError(f"{where}, line {n.start_mark.line + 1}: tag '{n.tag}' is not a plain value")
        if isinstance(n, yaml.ScalarNode): return 1
        if sizes.get(id(n)) == -1: raise FormatError(f"{where}, line {n.start_mark.line + 1}: a value contains itself")
        if depth > 100: raise FormatError(f"{where}, line {n.start_mark.line + 1}: nested more than 100 levels deep")
        if isinstance(n, yaml.MappingNode) and (odd := [k for k, _ in n.value if not isinstance(k, yaml.ScalarNode)]):
            raise FormatError(f"{where}, line {odd[0].start_mark.line + 1}: a key must be a plain word")
        if id(n) not in sizes:
            sizes[id(n)] = -1
            parts = n.value if isinstance(n, yaml.SequenceNode) else [x for kv in n.value for x in kv]
            sizes[id(n)] = 1 + sum(count(x, depth + 1) for x in parts)
        if sizes[id(n)] > MAX_VALUES: raise FormatError(f"{where}: stands for more than {MAX_VALUES} values")
        return sizes[id(n)]
    if node is not None: count(node, 0)
    return node

def _lines(node: Any, prefix: tuple = ()) -> dict[tuple, int]:
    "Line (from 1) of every key and list element, by its location"
    import yaml
    out: dict[tuple, int] = {}
    if isinstance(node, yaml.MappingNode):
        for k, v in node.value:
            out[(*prefix, k.value)] = k.start_mark.line + 1
            out |= _lines(v, (*prefix, k.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, v in enumerate(node.value):
            out[(*prefix, i)] = v.start_mark.line + 1
            out |= _lines(v, (*prefix, i))
    return out

# %%
#| export
def parse_settings(
    text: str, # JSON or YAML document
    where: str = "settings", # name used in errors; a name ending in .json must hold JSON
) -> tuple[Any, dict[tuple, int]]: # plain values; line of every key by its location
    "Parse settings text safely, with the line of every key"
    import yaml
    if where.endswith(".json"):
        data = parse_json(text, where)
        try: return data, _lines(_compose(text.replace("\t", " "), where))
        except FormatError: return data, {} # the few spellings that JSON has and YAML has not
    node = _compose(text, where)
    lines = _lines(node)
    def check(n: Any) -> None:
        if isinstance(n, yaml.MappingNode):
            seen: set[str] = set()
            for k, v in n.value:
                if k.value in seen:
                    raise FormatError(f"{where}, line {k.start_mark.line + 1}: key '{k.value}' appears twice")
                seen.add(k.value)
                check(v)
        elif isinstance(n, yaml.SequenceNode):
            for v in n.value: check(v)
    if node is not None: check(node)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try: return (loader.construct_document(node) if node is not None else {}), lines
    except Exception as e: # explicit tags such as !!int and !!timestamp raise whatever comes
        raise FormatError(f"{where}: {getattr(e, 'problem', None) or e}") from None
    finally: loader.dispose()

# %%
parse_settings("name: brain\ntrainer:\n  batch_size: 4\n")

# %%
bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
bomb += "".join(f"{b}: &{b} [{', '.join(9*['*' + a])}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
with raises(FormatError, match="more than 200000 values"): parse_settings(bomb)
with raises(FormatError, match="line 1: tag .*not a plain"): parse_settings("x: !!python/object/apply:os.system [a]")
with raises(FormatError, match="line 2: key 'a' appears twice"): parse_settings("a: 1\na: 2")
with raises(FormatError, match="line 2"): parse_settings("a: 1\n b: [", "x.yaml")

# %% [markdown]
# ## All problems at once
# pydantic already collects all errors. We sort them, name the line, and for an unknown key look for the nearest key
# that exists at that place.

# %%
#| export
def _models(annotation: Any) -> list[type[BaseModel]]:
    "Config models that an annotation can hold at the next level"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel): return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple, dict, Annotated, set):
        return [m for a in typing.get_args(annotation) for m in _models(a)]
    return []

def _known_keys(model: type[BaseModel], loc: tuple) -> list[str]:
    "Keys that exist at the place `loc` of `model`"
    here = [model]
    for part in loc:
        found = [m for cls in here if part in cls.model_fields for m in _models(cls.model_fields[part].annotation)]
        here = found or here
    return sorted({k for cls in here for k in [*cls.model_fields, *getattr(cls, "aliases", {})]})

def _problem(error: Mapping, model: type[BaseModel], lines: Mapping[tuple, int]) -> tuple[int, str]:
    loc = tuple(p for p in error["loc"])
    dotted = ".".join(str(p) for p in loc) or "(top level)"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _known_keys(model, loc[:-1]), n=1, cutoff=0.6)
        what = "unknown key" + (f", did you mean '{near[0]}'?" if near else "")
    elif error["type"] == "missing": what = "missing, it has no default"
    else:
        shown = repr(error["input"])
        what = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        what += f", got {shown if len(shown) <= 60 else shown[:57] + '...'}" if error["type"] != "value_error" else ""
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 0)
    return line, f"{dotted}{f' (line {line})' if line else ''}: {what}"

def check_config(
    model: type[Config], # what the settings must be
    data: Any, # plain values
    where: str = "settings", # name used in errors
    *,
    base: str | os.PathLike | None = None, # folder that relative `ConfigPath` fields start from
    lines: Mapping[tuple, int] = types.MappingProxyType({}), # line of every key, from `parse_settings`
) -> Config: # instance of `model`
    "Validate plain values; one `ConfigError` lists every problem"
    try: return model.model_validate(data, context={"base": base})
    except ValidationError as e:
        found = sorted({_problem(err, model, lines) for err in e.errors(include_url=False)})
        n = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise ConfigError(f"{n} in {where}: " + "; ".join(text for _, text in found)) from None

# %%
settings = {"name": 3, "trainer": {"batchsize": 4, "patch_size": [64, 64], "optimizer": "adam"}}
try: check_config(Task, settings, "task.json")
except ConfigError as e: message = str(e)
message.split("; ")

# %%
assert message.startswith("5 problems in task.json") and "did you mean 'batch_size'?" in message
assert check_config(Task, {"name": "a", "volume": "v", "trainer": {"train_batch_size": 7}}).trainer.batch_size == 7
with raises(ConfigError, match="mean the same"): check_config(Trainer, {"train_batch_size": 7, "batch_size": 7})

# %% [markdown]
# ## Files, overrides, and back again
# `load_config` reads a file, applies overrides such as `trainer.batch_size=4` from a command line, and anchors relative
# paths at the file's folder, so that a run gives the same result from any working directory.

# %%
#| export
def parse_overrides(
    pairs: Iterable[str], # 'dotted.key=value', the value in YAML notation
) -> dict[str, Any]: # dotted key -> value
    "Read overrides given on a command line"
    out = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or not key.strip() or "\n" in value:
            raise ConfigError(f"override {pair!r}: write it as key=value, such as trainer.batch_size=4")
        out[key.strip()] = parse_settings(f"value: {value}", f"override {pair!r}")[0]["value"]
    return out

def _override(data: Any, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, part in enumerate([*parents, last]):
        if not isinstance(data, dict):
            raise ConfigError(f"override {dotted}: '{part}' is inside a value that is not a group of keys")
        if depth == len(parents): data[part] = value
        else: data = data.setdefault(part, {})

def _settings_file(path: str | os.PathLike) -> Path:
    if Path(path).suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"{path}: settings files end in .json, .yaml or .yml")
    return Path(path)

def load_config(
    model: type[Config], # what the file must hold
    path: str | os.PathLike, # .json, .yaml or .yml file
    overrides: Mapping[str, Any] | Iterable[str] = (), # dotted key -> value, or 'key=value' strings
) -> Config: # instance of `model`
    "Read, override and validate a settings file; relative paths start from its folder"
    path = _settings_file(path)
    data, lines = parse_settings(_read_text(path, 2**24), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be a group of keys, got {type(data).__name__}")
    overrides = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    for key, value in overrides.items():
        _override(data, key, value)
        place = tuple(key.split("."))
        lines = {**{k: n for k, n in lines.items() if k[:len(place)] != place}, place: 0} # not from a line of the file
    return check_config(model, data, str(path), base=path.parent.resolve(), lines=lines)

def dump_config(
    cfg: Config, # settings
    path: str | os.PathLike | None = None, # .json, .yaml or .yml file; None: only return the text
    on_exists: OnExists = "error", # what to do when `path` is there already
) -> str: # the text; reading it back gives an equal instance
    "Write settings with all defaults filled in"
    if path is not None and _settings_file(path).suffix != ".json":
        import yaml
        text = yaml.safe_dump(plain(cfg), sort_keys=False, allow_unicode=True)
        if parse_settings(text)[0] != plain(cfg): # odd line separators only survive as escapes
            text = yaml.safe_dump(plain(cfg), sort_keys=False)
    else: text = to_json(cfg) + "\n"
    if path is not None: write_text(path, text, on_exists)
    return text

# %%
with tmpdir() as d:
    (d/"task.yaml").write_text("name: brain\nvolume: scans/brain.zarr\ntrainer:\n  optimizer: sgd\n")
    cfg = load_config(Task, d/"task.yaml", ["trainer.batch_size=4"])
    dump_config(cfg, d/"used.json")
    again = load_config(Task, d/"used.json")
    (d/"bad.json").write_text('{"name": "brain",\n\t"volume": "v",\n\t"trainer": {\n\t\t"batchsize": 4}}')
    with raises(ConfigError, match=r"trainer.batchsize \(line 4\): unknown key, did you mean 'batch_size'\?"):
        load_config(Task, d/"bad.json")
print(dump_config(cfg.model_copy(update={"volume": Path("scans/brain.zarr")})))

# %%
assert again == cfg and cfg.volume == (d/"scans/brain.zarr").resolve() and cfg.trainer.batch_size == 4

# %%
with raises(ConfigError, match="write it as key=value"): parse_overrides(["epochs"])
with raises(ConfigError, match="settings files end in"): load_config(Task, "task.toml")

# %% [markdown]
# Editors complete and check a settings file against the JSON schema that pydantic derives from the model.

# %%
#| export
def config_schema(
    model: type[Config], # settings class
) -> dict[str, Any]: # JSON schema, draft 2020-12
    "JSON schema of a settings class, for editors and documentation"
    return model.model_json_schema()

# %%
config_schema(Trainer)["properties"]["batch_size"]
