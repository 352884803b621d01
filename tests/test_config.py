"""Settings: all problems at once with their lines, suggestions, aliases, overrides, paths, hostile YAML,
round trips."""
import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from medvol_nb import core
from medvol_nb.config import (
    Config,
    ConfigPath,
    check_config,
    config_schema,
    dump_config,
    load_config,
    parse_overrides,
    parse_settings,
)
from medvol_nb.core import ConfigError, FormatError, MissingFile, OutputExists


class Optimizer(Config):
    aliases = {"learning_rate": "lr", "weightDecay": "weight_decay"}
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = 0.0


class Head(Config):
    name: str
    channels: int = Field(1, ge=1)


class Sam(Config):
    kind: Literal["sam"] = "sam"
    depth: int = 1


class Unet(Config):
    kind: Literal["unet"] = "unet"
    levels: int = 5


class Task(Config):
    volume: ConfigPath
    masks: list[ConfigPath] = []
    patch_size: tuple[int, int, int] = (64, 64, 64)
    batch_size: int = Field(2, ge=1)
    optimizer: Optimizer = Optimizer()
    second: Optimizer | None = None
    heads: list[Head] = []
    groups: dict[str, list[Head]] = {}
    model: Annotated[Sam | Unet, Field(discriminator="kind")] = Sam()


BAD = {"volume": 3, "batchsize": 1, "patch_size": [1, 2], "optimizer": {"lr": -1, "nme": "x"}, "second": {"lr": "fast"},
       "heads": [{"name": "a"}, {"chanels": 2}], "groups": {"g": [{"name": "b", "channel": 3}]},
       "model": {"kind": "unet", "level": 3}}
PLACES = ["volume", "batchsize", "patch_size.2", "optimizer.lr", "optimizer.nme", "second.lr", "heads.1.name",
          "heads.1.chanels", "groups.g.0.channel", "level"]
HINTS = {"batchsize": "batch_size", "optimizer.nme": "name", "heads.1.chanels": "channels",
"groups.g.0.channel": "channels",
         "level": "levels"}


def message(call, *args, **options) -> str:
    with pytest.raises(ConfigError) as e: call(*args, **options)
    return str(e.value)


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_all_problems_at_once_with_lines(tmp_path, suffix):
    file = tmp_path/f"task.{suffix}"
    text = json.dumps(BAD, indent=1) if suffix == "json" else yaml.safe_dump(BAD, sort_keys=False)
    file.write_text(text)
    told = message(load_config, Task, file)
    assert told.startswith(f"10 problems in {file}: ")
    problems = told.split(": ", 1)[1].split("; ")
    lines = [int(p.split("(line ")[1].split(")")[0]) for p in problems]
    assert lines == sorted(lines) and len(problems) == 10
    for place in PLACES:
        found = [(n, p) for n, p in zip(lines, problems) if p.split(" (line")[0].endswith(place)]
        assert len(found) == 1, place
        line, problem = found[0]
        key = next(w for w in reversed(place.split(".")) if not w.isdigit())
        shown = text.splitlines()[line - 1]
        where = {"heads.1.name": "", "patch_size.2": "patch_size", "level": "model"}.get(place, key)
        assert where in shown, (place, line, shown)
        if place in HINTS: assert f"unknown key, did you mean '{HINTS[place]}'?" in problem


def test_no_hint_where_nothing_is_near():
    told = message(check_config, Task, {"volume": "v", "zzz": 1, "optimizer": {"qqq": 1}})
    assert "did you mean" not in told and told.count("unknown key") == 2


def test_hint_knows_historic_names(): assert "'learning_rate'" in message(check_config, Optimizer, {"learnin_rate": 1})


@pytest.mark.parametrize("data, words", [
    ({"volume": "v", "batch_size": "4.5"}, "batch_size: must be a valid integer"),
    ({"volume": "v", "batch_size": None}, "batch_size: must be a valid integer.*got None"),
    ({"volume": "v", "batch_size": 0}, "batch_size: must be greater than or equal to 1, got 0"),
    ({"volume": "v", "optimizer": {"lr": float("inf")}}, "optimizer.lr: must be a finite number"),
    ({"volume": "v", "optimizer": []}, "optimizer: must be"), ({}, "volume: missing, it has no default"),
    ([], r"\(top level\)"),
    (None, r"\(top level\)"), ({"volume": "v", "model": {"kind": "vit"}}, "model: .*'sam', 'unet'"),
    ({"volume": "x"*500 + "\0", "batch_size": "y"*500}, r"got 'y{56}\.\.\."), ({"volume": "v", 3: 4}, "3"),
    ({"volume": "v", "optimizer": {"lr": 1, "learning_rate": 1}}, "optimizer: 'learning_rate' and 'lr' mean the same")])
def test_single_problems(data, words):
    with pytest.raises(ConfigError, match=rf"^1 problem in settings: .*{words}"): check_config(Task, data)


def test_aliases():
    assert check_config(Optimizer, {"learning_rate": 0.5, "weightDecay": 0.1}) == Optimizer(lr=0.5, weight_decay=0.1)
    assert check_config(Task, {"volume": "v", "second": {"learning_rate": 0.5}}).second.lr == 0.5
    for both in ({"learning_rate": 1, "lr": 1}, {"lr": 1, "learning_rate": 1}):
        assert "give one of them" in message(check_config, Optimizer, both)


def test_instances_are_frozen():
    with pytest.raises(ValidationError): Optimizer().lr = 3
    with pytest.raises(ValidationError): Optimizer(lrr=3)


def test_defaults_are_validated():
    class Wrong(Config): size: int = Field(0, ge=1)
    with pytest.raises(ConfigError, match="size: must be greater"): check_config(Wrong, {})


def test_own_validators_speak_for_themselves():
    class Pair(Config):
        f_maps: list[int]
        levels: int
        @model_validator(mode="after")
        def agree(self):
            if len(self.f_maps) != self.levels: raise ValueError(f"{len(self.f_maps)} f_maps for {self.levels} levels")
            return self
    assert "(top level): 2 f_maps for 3 levels" in message(check_config, Pair, {"f_maps": [1, 2], "levels": 3})


# ---------------------------------------------------------------- files

def test_paths_start_at_the_file(tmp_path, monkeypatch):
    (tmp_path/"sub").mkdir()
    (tmp_path/"sub"/"t.yaml").write_text("volume: a/b.zarr\nmasks: [m.nii, /abs/n.nii, ../up.nii]\n")
    for here in (tmp_path, tmp_path/"sub", Path("/")):
        monkeypatch.chdir(here)
        cfg = load_config(Task, tmp_path/"sub"/"t.yaml")
        assert cfg.volume == tmp_path/"sub"/"a"/"b.zarr" and cfg.masks[1] == Path("/abs/n.nii")
        assert cfg.masks[2] == tmp_path/"sub"/".."/"up.nii"
    assert check_config(Task, {"volume": "a"}).volume == Path("a")
    monkeypatch.chdir(tmp_path/"sub")
    assert load_config(Task, "t.yaml").volume == tmp_path/"sub"/"a"/"b.zarr"


@pytest.mark.parametrize("name, content, kind, words", [
    ("x.toml", b"", ConfigError, "end in .json, .yaml or .yml"), ("x.yaml", None, MissingFile, "does not exist"),
    ("x.yaml", b"", ConfigError, "volume: missing"), ("x.yaml", b"# nothing\n", ConfigError, "volume: missing"),
    ("x.yaml", b"a: \xff", FormatError, "line 1: byte 0xff"), ("x.json", b"", FormatError, "x.json, line 1"),
    ("x.json", b"[]", ConfigError, "must be a group of keys, got list"), ("x.yaml", b"3", ConfigError, "got int"),
    ("x.json", b'{"volume": "v", "volume": "w"}', FormatError, "'volume' appears twice"),
    ("x.json", b'{"volume": NaN}', FormatError, "NaN"), ("x.json", b"volume: v", FormatError, "line 1, column 1"),
    ("x.yaml", b"a: b: c", FormatError, "line 1"), ("x.yaml", b"--- 1\n--- 2\n", FormatError, "x.yaml"),
    ("x.yaml", b"a: \x07", FormatError, "x.yaml"), ("x.yaml", b" "*(2**24 + 1), FormatError, "16.0 MiB are allowed")])
def test_files_that_are_not_settings(tmp_path, name, content, kind, words):
    if content is not None: (tmp_path/name).write_bytes(content)
    with pytest.raises(kind, match=words): load_config(Task, tmp_path/name)


def test_json_with_what_yaml_does_not_know(tmp_path):
    "Valid JSON is read even if YAML, which is only asked for the lines, cannot spell it"
    for text in ('{"volume": "\\ud83d\\ude00"}', '{"volume"\n: "\\/v"}', "\t{\r\n\t\"volume\":\t\"v\"}",
                 '{"volume": "a\\tb"}'):
        (tmp_path/"x.json").write_text(text)
        assert load_config(Task, tmp_path/"x.json").volume.name == Path(json.loads(text)["volume"]).name
    (tmp_path/"x.json").write_text(json.dumps({"volume": "v", "a"*2000: 1}))
    assert "unknown key" in message(load_config, Task, tmp_path/"x.json")


# ---------------------------------------------------------------- hostile text

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(9*['*' + a])}]\n" for a, b in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize("text, words", [
    (BOMB, "more than 200000 values"), ("a: [" + "x, "*200_001 + "]", "more than 200000 values"),
    ("a: &a [*a]", "contains itself"), ("a: &a {b: {c: *a}}", "contains itself"), ("a: *b", "undefined alias"),
    ("["*100_000, "100 levels"), ("- "*100_000, "100 levels"), ("{a: "*5000, "100 levels"),
    ("".join(" "*k + "a:\n" for k in range(200)), "line 101: nested more than 100"),
    ("? [a]\n: 1", "a key must be a plain word"),
    ("? {a: 1}\n: 1", "a key must be a plain word"), ("a: 1\nb: {c: 1, d: 1, c: 2}", "line 2: key 'c' appears twice"),
    ("x: !!python/object/apply:os.system ['true']", "line 1: tag"), ("a:\n  x: !!python/name:os.system", "line 2: tag"),
    ("a: !ruby/object:X {}", "line 1: tag"), ("- !include x", "line 1: tag"),
    ("a: 2024-13-01", "month"),
    ("a: " + "1"*5000, "digits"), ("a: '", "line 1"), ("a: [1\nb: 2", "line 2"), ("\tb: 1", "line 1"),
    ("%YAML 9.9\n---\na", "incompatible"),
    ("!!int x", "invalid literal"), ("a: !!float x", "convert"), ("a: !!timestamp x", "")])
def test_hostile_yaml(text, words):
    with pytest.raises(FormatError, match=f"x.yaml.*{words}"): parse_settings(text, "x.yaml")


@pytest.mark.parametrize("text, value", [
    ("", {}), ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
    ("a: &x {c: 1}\nb:\n  <<: *x\n  d: 2", {"a": {"c": 1}, "b": {"c": 1, "d": 2}}),
    ("a: '1'\nb: 0x10\nc: 1_000\nd: null", {"a": "1", "b": 16, "c": 1000, "d": None}), ("- 1\n- [2]", [1, [2]]),
    ("a: !!str 1", {"a": "1"}), ("a: |\n  x\n  y\n", {"a": "x\ny\n"})])
def test_harmless_yaml(text, value): assert parse_settings(text)[0] == value


def test_lines():
    _, lines = parse_settings("a: 1\nb:\n- x\n- c: 2\n  d: [5,\n   6]\n")
    assert lines == {("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "c"): 4, ("b", 1, "d"): 5, ("b", 1,
                                                                                                          "d", 0): 5,
                     ("b", 1, "d", 1): 6}
    assert parse_settings('{"a": 1,\n\n"b": {"c":\n2}}', "x.json")[1] == {("a",): 1, ("b",): 3, ("b", "c"): 3}


@given(st.text(max_size=60) | st.text("[]{}-:,&*!|>?'\"\n ab1", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_parsed_or_refused(text):
    for where in ("x.yaml", "x.json"):
        try: parse_settings(text, where)
        except FormatError as e: assert where in str(e)


# ---------------------------------------------------------------- overrides

def test_overrides(tmp_path):
    (tmp_path/"t.yaml").write_text("volume: v\noptimizer: {lr: 0.5}\n")
    def get(*pairs): return load_config(Task, tmp_path/"t.yaml", pairs)
    cfg = get("batch_size=7", "optimizer.name=sgd", "second.lr=0.25", "heads=[{name: a, channels: 3}]",
              "volume = w.zarr ")
    assert (cfg.batch_size, cfg.optimizer, cfg.second.lr) == (7, Optimizer(name="sgd", lr=0.5), 0.25)
    assert cfg.heads == [Head(name="a", channels=3)] and cfg.volume == tmp_path/"w.zarr"
    assert load_config(Task, tmp_path/"t.yaml", {"optimizer.lr": 0.125}).optimizer.lr == 0.125
    assert get("second=null").second is None
    assert "optimizer.lrr: unknown key, did you mean 'lr'?" in message(get, "optimizer.lrr=1")
    assert "'x' is inside a value that is not a group" in message(get, "volume.x=1")
    for bad in ("batch_size", "=3", " = 3",
                "batch_size=1\nvolume: w"): assert "write it as key=value" in message(get, bad)
    for bad in ("batch_size=[1", "a=b: c", "volume=!!python/name:os.system"):
        with pytest.raises(FormatError, match="override"): get(bad)


@pytest.mark.parametrize("text, value", [("1", 1), ("1.5", 1.5), ("true", True), ("null", None), ("", None),
                                         ("'1'", "1"), ("[1, 2]", [1, 2]),
                                         ("{a: 1}", {"a": 1}), ("a=b", "a=b"), ("x#y", "x#y"), ("C:\\x", "C:\\x")])
def test_override_values(text, value): assert parse_overrides([f"k.l={text}"]) == {"k.l": value}


# ---------------------------------------------------------------- round trips

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["yes", "1e3", "2024-01-01", "=", "null", "~", "0x1", "1:30", "- a", "a: b", "#", "\x85", "\u2028", "\r\n", "😀",
    "<<", " x "])
finite = st.floats(allow_nan=False, allow_infinity=False)
optimizers = st.builds(Optimizer, name=st.sampled_from(["adamw", "sgd"]), lr=st.floats(1e-300, 1e300),
weight_decay=finite)
heads = st.builds(Head, name=words, channels=st.integers(1, 2**80))
tasks = st.builds(Task, volume=words.filter(lambda w: w.strip("./ ") and "\0" not in w).map(lambda w: Path("/",
w.lstrip("/"))),
                  patch_size=st.tuples(*[st.integers()]*3), optimizer=optimizers, second=st.none() | optimizers,
                  heads=st.lists(heads, max_size=3), groups=st.dictionaries(words, st.lists(heads, max_size=2),
                  max_size=3),
                  model=st.builds(Sam, depth=st.integers()) | st.builds(Unet, levels=st.integers()))


@given(tasks, st.sampled_from(["json", "yaml"]))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_dump_and_load(cfg, suffix):
    with core.tmpdir() as d:
        text = dump_config(cfg, d/f"t.{suffix}")
        assert load_config(Task, d/f"t.{suffix}") == cfg
        assert dump_config(load_config(Task, d/f"t.{suffix}"), d/f"t.{suffix}", "overwrite") == text


def test_dump(tmp_path):
    cfg = Task(volume="/v")
    assert json.loads(dump_config(cfg))["optimizer"] == {"name": "adamw", "lr": 0.001, "weight_decay": 0.0}
    dump_config(cfg, tmp_path/"a.yaml")
    with pytest.raises(OutputExists): dump_config(cfg, tmp_path/"a.yaml")
    with pytest.raises(ConfigError, match="settings files end in"): dump_config(cfg, tmp_path/"a.toml")
    assert not (tmp_path/"a.toml").exists()
    assert list(yaml.safe_load((tmp_path/"a.yaml").read_text())) == list(Task.model_fields)


def test_schema():
    import jsonschema
    schema = config_schema(Task)
    assert schema["additionalProperties"] is False and schema["required"] == ["volume"]
    jsonschema.validate({"volume": "v", "batch_size": 3}, schema)
    for bad in ({"volume": "v", "batch_size": 0}, {"volume": "v", "x": 1}, {}):
        with pytest.raises(jsonschema.ValidationError): jsonschema.validate(bad, schema)
