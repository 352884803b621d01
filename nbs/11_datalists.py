# %% [markdown]
# # Data lists
#
# > Which image belongs to which label and to which fold: read strictly, written canonically.
#
# A data list is a JSON file that says which files form a case and which fold a case belongs to. Everything downstream
# trusts it: a wrong fold is a wrong result, and nothing crashes. So the reader below is strict where it matters (types,
# spelling of keys, paths that leave the data folder), keeps what it does not know, and reports *all* problems at once,
# each with a JSON pointer such as `/training/12/fold`. The writer is canonical: the same list is always the same bytes,
# in the key order of the lists that the VISTA3D project publishes, which this format follows.
#
# How cases are divided into folds is the next page; what folds mean when a list is loaded is the page after it.

# %%
#| default_exp datalists

# %%
#| export
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from medvol_nb.core import (DataError, FormatError, MissingFile, OnExists, check_output, inside, parse_json, read_json,
                            to_json, write_text)
from medvol_nb.labels import _pointer, dataset_name_of, edit_distance, label_dict_problems

# %%
import json
import time

import matplotlib.pyplot as plt
import numpy as np

from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## A typo that nobody notices
# Here is a list of twenty cases in which somebody wrote `"fold:"` for `"fold"`. The usual loader takes every item
# whose fold is not the requested one for training, so all twenty cases train, none validates, and the run succeeds.

# %%
def lenient(items: list[dict], fold: int) -> tuple[list, list]:
    return [i for i in items if i.get("fold") != fold], [i for i in items if i.get("fold") == fold]

typed = [{"image": f"imagesTr/spleen_{k}.nii.gz", "label": f"labelsTr/spleen_{k}.nii.gz", "fold:": k % 5}
         for k in range(20)]
[len(part) for part in lenient(typed, fold=0)]

# %% [markdown]
# ## Keys that are nearly right
# Items may carry fields of their own, such as `modality` or `site`: they are kept and never touched. But a key that
# differs from a known one by a stroke of the pen is a typo. "A stroke" is the restricted edit distance, in which
# swapping two neighbours counts once; one is allowed for short keys and two for long ones, after case and punctuation
# are set aside. A stricter rule would refuse `age` (two letters from `image`), and numbered keys such as `image2` are
# names of their own.

# %%
#| export
PATH_KEYS = ("image", "label", "pseudo_label", "label_sv")
ITEM_KEYS = ("image", "label", "fold", "pseudo_label", "pseudo_label_reliability", "label_sv")
LIST_KEYS = ("training", "testing", "label_dict", "original_label_dict", "training_transform", "validation_transform")

@lru_cache(1024)
def nearly(
    key: str, # a key from a file
    known: tuple[str, ...] = ITEM_KEYS, # keys with a meaning
) -> str | None: # the key that was meant, or None
    "The known key that `key` is a misspelling of"
    if key in known or key.rstrip("0123456789").rstrip("_") in known: return None
    if len(key) > 64: return None
    bare = {k: "".join(filter(str.isalnum, k)).casefold() for k in (key, *known)}
    near = [(edit_distance(bare[key], bare[k]), k) for k in known]
    near = [(n, k) for n, k in near if n <= (1 if len(k) <= 8 else 2)]
    return min(near)[1] if near else None

# %%
keys = ("fold:", "Fold", "lable", "images", "pseudolabel", "psuedo_lable", "age", "modality", "image2")
{k: nearly(k) for k in keys}

# %%
assert all(nearly(k) is None for k in (*ITEM_KEYS, "age", "region", "dataset", "site", "image_2", "subject"))
assert {nearly(k) for k in ("fold :", "fodl", "FOLD", "folds")} == {"fold"}

# %% [markdown]
# ## What an item may hold
# Each field has one short rule; a rule returns what is wrong, or nothing. Paths are relative to the data set's folder
# and are checked by spelling alone, because a list can be read where the images are not. The published lists also hold
# absolute paths (of supervoxel files), so absolute names are let through here unless `absolute=False`; whoever opens
# the file decides again, with `item_path`.

# %%
#| export
def item_path(
    root: str | os.PathLike, # folder of the data set
    name: str, # path from a data list
    absolute: bool = False, # allow absolute names
) -> Path: # the file to open
    "Join a path of a list to its root, or refuse it if it leads outside"
    return inside(root, name, absolute=absolute)

def _path_problem(name: Any, absolute: bool) -> str:
    if not isinstance(name, str): return f"a path is needed, got {name!r:.80}"
    first = name[:1]
    if not (first in "~/" or ".." in name or ":" in name or "\\" in name) and name.isprintable(): return ""
    if absolute and first == "/" and name.isprintable(): return ""
    try: inside(os.sep + "nowhere", name, absolute=absolute)
    except DataError as e: return str(e).split(". Names are")[0] + ". Paths are relative to the data set's folder"
    return ""

def _image_problem(value: Any, absolute: bool) -> str:
    if not isinstance(value, list): return _path_problem(value, absolute)
    if not value: return "a path, or a list of one path a channel is needed, got []"
    return next(filter(None, (_path_problem(v, absolute) for v in value)), "")

def _fold_problem(value: Any, absolute: bool) -> str:
    return "" if type(value) is int and value >= 0 else f"an integer from 0 is needed, got {value!r:.80}"

def _reliability_problem(value: Any, absolute: bool) -> str:
    return "" if type(value) is int and value in (0, 1) else f"0 or 1 is needed, got {value!r:.80}"

_RULES: dict[str, Callable[[Any, bool], str]] = {
    "image": _image_problem, "label": _path_problem, "pseudo_label": _path_problem, "label_sv": _path_problem,
    "fold": _fold_problem, "pseudo_label_reliability": _reliability_problem}

# %%
#| export
def items_problems(
    items: Any, # what a file holds as a list of items
    at: str = "/training", # JSON pointer of `items` in its file
    absolute: bool = True, # allow absolute paths
) -> list[str]: # one line a problem, beginning with its JSON pointer
    "What is wrong with a list of items"
    if not isinstance(items, (list, tuple)): return [f"{at}: a list of items is needed, got {items!r:.80}"]
    problems: list[str] = []
    for n, item in enumerate(items):
        if not isinstance(item, dict):
            problems.append(f"{at}/{n}: an object with 'image' is needed, got {item!r:.80}")
            continue
        if "image" not in item: problems.append(f"{at}/{n}: 'image' is missing")
        for key, value in item.items():
            rule = _RULES.get(key)
            if rule is not None:
                if why := rule(value, absolute): problems.append(f"{at}/{n}/{key}: {why}")
            elif meant := nearly(key):
                problems.append(f"{at}/{n}{_pointer(key)}: unknown field {key!r}, did you mean {meant!r}?")
    return problems

# %%
wrong = [{"image": "a.nii.gz", "fold": "0"}, {"image": "../a.nii.gz", "fold": True}, {"label": "b.nii.gz"},
         {"image": ["t1.nii.gz", 7], "fold": 1.5}, "a.nii.gz"]
items_problems(wrong)

# %%
fine = [{"image": "a.nii.gz", "fold": 0, "site": "B", "age": 63}, {"image": ["t1.nii.gz", "t2.nii.gz"]},
        {"image": "a.nii.gz", "label_sv": "/sv/a_seg.nii.gz", "pseudo_label_reliability": 0}]
assert items_problems(fine) == [] and len(items_problems(wrong)) == 7
assert items_problems(fine, absolute=False)[0].startswith("/training/2/label_sv: path '/sv/a_seg.nii.gz': is absolute")

# %% [markdown]
# ## The list
# A `DataList` is what one file holds. Items are plain dictionaries, since the transforms that consume them expect that.
# Label ids are integers here and strings in files, as JSON has no other keys. Whatever else the file says, such as the
# `description`, `validation` or `numTraining` of the Medical Segmentation Decathlon (MSD), is kept in `extra`.

# %%
#| export
@dataclass(frozen=True)
class DataList:
    "The cases of one data set, with their folds and label names"
    name: str # data set name
    training: tuple[dict, ...] = () # items of the cross-validation pool
    testing: tuple[dict, ...] = () # held-out items
    label_dict: dict[int, str] = field(default_factory=dict) # local id -> class name, unified wording
    original_label_dict: dict[int, str] = field(default_factory=dict) # local id -> the data set's own wording
    training_transform: list | None = None # transform configurations, never run by reading
    validation_transform: list | None = None # likewise
    extra: dict[str, Any] = field(default_factory=dict) # further keys of the file, `provenance` among them

    def items(
        self,
        section: str | None = None, # "training", "testing" or another list of the file; None: training, then testing
    ) -> tuple[dict, ...]:
        "Items of a section, or all"
        if section is None: return self.training + self.testing
        if section in ("training", "testing"): return getattr(self, section)
        found = self.extra.get(section)
        if isinstance(found, list): return tuple({"image": i} if isinstance(i, str) else i for i in found)
        there = ["training", "testing", *(k for k in _SECTIONS if k in self.extra)]
        raise DataError(f"data list {self.name!r} has no section {section!r}, there are {there}")

    def labelled(
        self,
        section: str | None = None, # as in `items`
    ) -> tuple[dict, ...]:
        "Items that have a label"
        return tuple(i for i in self.items(section) if "label" in i)

    def folds(self) -> dict[int, int]:
        "Fold -> number of training items, by fold; items without a fold do not count"
        found = [i["fold"] for i in self.training if "fold" in i]
        return {f: found.count(f) for f in sorted(set(found))}

_SECTIONS = ("validation", "test")

# %% [markdown]
# `parse_datalist` turns the plain values of a file into a `DataList`, or says everything that is wrong with them.

# %%
#| export
def _shown(problems: Sequence[str], where: str) -> str:
    "One message for many problems"
    more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {where}: " + "; ".join(problems[:20]) + more

def _list_problems(data: Any, absolute: bool) -> list[str]:
    "All that is wrong with a list; reads everything before it returns"
    if not isinstance(data, dict): return [f"/: an object with 'training' is needed, got {data!r:.80}"]
    problems = []
    for key in data:
        if key not in _SECTIONS and (meant := nearly(key, LIST_KEYS)) and meant not in data:
            problems.append(f"{_pointer(key)}: unknown field {key!r}, did you mean {meant!r}?")
    if not problems and "training" not in data:
        problems.append("/training: is missing; a data list holds its cases there (an empty list is allowed)")
    problems += items_problems(data.get("training", []), "/training", absolute)
    for section in ("testing", *_SECTIONS):
        if not isinstance(items := data.get(section, []), list) and section in _SECTIONS: continue
        if isinstance(items, list): items = [{"image": i} if isinstance(i, str) else i for i in items]
        problems += items_problems(items, f"/{section}", absolute)
    for key in ("label_dict", "original_label_dict"): problems += label_dict_problems(data.get(key, {}), f"/{key}")
    for key in ("training_transform", "validation_transform"):
        for n, t in enumerate(data[key] if isinstance(data.get(key), list) else ()):
            if not isinstance(t, dict): problems.append(f"/{key}/{n}: a transform is an object, got {t!r:.80}")
        if not isinstance(data.get(key), (list, type(None))):
            problems.append(f"/{key}: a list of transforms is needed, got {data[key]!r:.80}")
    return problems

def parse_datalist(
    data: Any, # plain values, as from a JSON file
    name: str, # data set name
    where: str = "data list", # file name for errors
    *,
    absolute: bool = True, # allow absolute paths in items
) -> DataList: # with copies of the items
    "Check the content of a data list; all problems are reported at once, with their JSON pointers"
    if problems := _list_problems(data, absolute): raise FormatError(_shown(problems, where))
    ids = {k: {int(i): n for i, n in data.get(k, {}).items()} for k in ("label_dict", "original_label_dict")}
    return DataList(name, tuple(map(dict, data["training"])),
                    tuple({"image": i} if isinstance(i, str) else dict(i) for i in data.get("testing", [])),
                    **ids, training_transform=data.get("training_transform"),
                    validation_transform=data.get("validation_transform"),
                    extra={k: v for k, v in data.items() if k not in LIST_KEYS})

# %%
spleen = parse_datalist({
    "training": [{**i, "fold": k % 5} for k, i in enumerate({x: i[x] for x in ("image", "label")} for i in typed[:16])],
    "testing": [{x: i[x] for x in ("image", "label")} for i in typed[16:]],
    "label_dict": {"1": "spleen"}, "original_label_dict": {"1": "Spleen"}, "licence": "CC-BY-SA 4.0"}, "Task09")
len(spleen.items()), spleen.folds(), spleen.label_dict, spleen.extra

# %%
assert spleen.labelled() == spleen.items() == spleen.training + spleen.testing
assert len(spleen.items("testing")) == 4 and sum(spleen.folds().values()) == 16

# %% [markdown]
# And the list of the beginning, refused with the place and the remedy:

# %%
try: parse_datalist({"training": typed[:2]}, "Task09", "Task09_5_folds.json")
except FormatError as e: told = str(e)
told

# %%
assert "/training/0/fold:: unknown field 'fold:', did you mean 'fold'?" in told
assert told.startswith("2 problems in Task09_5_folds.json: ")
with raises(FormatError, match="40 problems.* and 20 more"): parse_datalist({"training": typed*2}, "x")
with raises(FormatError, match="'trainning', did you mean 'training'"): parse_datalist({"trainning": []}, "x")
with raises(FormatError, match="/training: is missing"): parse_datalist({}, "x")
with raises(FormatError, match="/label_dict/1.5: a label id is a whole number"):
    parse_datalist({"training": [], "label_dict": {"1.5": "liver"}}, "x")
with raises(DataError, match="no section 'tests', there are"): spleen.items("tests")

# %% [markdown]
# ## Reading and writing
# Reading adds what the JSON page refuses (duplicate keys, `NaN`, damaged files) and a bound on the size. Writing puts
# keys in the order of the published lists, four spaces a level, so a list made with the same cases and folds has the
# same bytes as the one VISTA3D's script would write.

# %%
#| export
MAX_BYTES = 2**27 # a list of 100,000 cases has about 2**25

def read_datalist(
    path: str | os.PathLike, # JSON file
    *,
    absolute: bool = True, # allow absolute paths in items
) -> DataList: # what the file holds
    "Read a data list; the data set's name comes from the file name"
    return parse_datalist(read_json(path, MAX_BYTES), dataset_name_of(path), str(path), absolute=absolute)

def _ordered(item: Mapping) -> dict:
    "The item with its known fields first"
    return {k: item[k] for k in ITEM_KEYS if k in item} | {k: v for k, v in item.items() if k not in ITEM_KEYS}

def datalist_text(
    dl: DataList, # the list
) -> str: # JSON, four spaces a level, no newline at the end
    "Canonical text of a list: the bytes of the reference for the content of the reference"
    data: dict[str, Any] = {"training": [_ordered(i) for i in dl.training]}
    if dl.testing or dl.folds(): data["testing"] = [_ordered(i) for i in dl.testing]
    for key in ("label_dict", "original_label_dict", "training_transform", "validation_transform"):
        if value := getattr(dl, key): data[key] = value
    return to_json(data | {k: v for k, v in dl.extra.items() if k not in LIST_KEYS}, indent=4)

# %%
print(datalist_text(replace(spleen, training=spleen.training[:1], testing=())))

# %%
again = parse_datalist(parse_json(datalist_text(spleen)), "Task09")
assert again == spleen and datalist_text(again) == datalist_text(spleen)
reference = json.dumps({"training": list(spleen.training), "testing": list(spleen.testing),
                        "label_dict": {"1": "spleen"}, "original_label_dict": {"1": "Spleen"}}, indent=4)
assert datalist_text(replace(spleen, extra={})) == reference
mixed = replace(spleen, training=tuple(dict(reversed(i.items())) for i in spleen.training))
assert datalist_text(mixed) == datalist_text(spleen)

# %% [markdown]
# ## What would change
# A list that exists has been trained on. Before it is replaced one wants to know which cases come, go, and, worst of
# all, move between folds. `diff_datalists` tells by image; `write_datalist` returns it, and with `dry_run` does nothing
# else.

# %%
#| export
def _places(dl: DataList) -> dict[str, tuple]:
    "Image -> (section, fold) and the whole item"
    out: dict[str, tuple] = {}
    for section in ("training", "testing"):
        for item in dl.items(section):
            key = item["image"] if isinstance(item["image"], str) else " + ".join(item["image"])
            out[key] = (section if item.get("fold") is None else f"{section}, fold {item['fold']}", item)
    return out

def diff_datalists(
    old: DataList, # before
    new: DataList, # after
) -> dict: # 'added', 'removed', 'changed': lists of images; 'moved': image -> [from, to]; 'label_dict': it differs
    "How two versions of a list differ, by image"
    a, b = _places(old), _places(new)
    both = [k for k in b if k in a]
    return {"added": [k for k in b if k not in a], "removed": [k for k in a if k not in b],
            "moved": {k: [a[k][0], b[k][0]] for k in both if a[k][0] != b[k][0]},
            "changed": [k for k in both if a[k][0] == b[k][0] and a[k][1] != b[k][1]],
            "label_dict": old.label_dict != new.label_dict}

def write_datalist(
    dl: DataList, # the list
    path: str | os.PathLike, # JSON file, '<name>_<n>_folds.json' by custom
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    dry_run: bool = False, # True: tell what would change, write nothing
) -> dict: # `diff_datalists` to what was there (nothing: all added), and 'path', 'written'
    "Write a list canonically and atomically, and tell what changed"
    text, broken = datalist_text(dl), ""
    parse_datalist(parse_json(text), dl.name, f"the list to be written as {path}")
    old = DataList(dl.name, label_dict=dl.label_dict)
    try: old = read_datalist(path)
    except MissingFile: pass
    except FormatError as e: broken = str(e)
    out = {"path": str(path), "written": False} | diff_datalists(old, dl) | ({"unreadable": broken} if broken else {})
    if not dry_run and check_output(path, on_exists):
        write_text(path, text, on_exists)
        out["written"] = True
    return out

# %%
moved = replace(spleen, training=tuple({**i, "fold": (i["fold"] + 1) % 5} if k == 3 else i
                                       for k, i in enumerate(spleen.training[1:])))
with tmpdir() as d:
    first = write_datalist(spleen, d/"Task09_5_folds.json")
    second = write_datalist(moved, d/"Task09_5_folds.json", dry_run=True)
    stored = read_datalist(d/"Task09_5_folds.json")
    with raises(FileExistsError, match="--on-exists"): write_datalist(moved, d/"Task09_5_folds.json")
len(first["added"]), {k: second[k] for k in ("written", "added", "removed", "moved", "changed")}

# %%
assert stored == spleen and first["written"] and not second["written"]
assert second["moved"] == {spleen.training[4]["image"]: ["training, fold 4", "training, fold 0"]}

# %% [markdown]
# A list also says where it comes from: the version of this library, the seed, the method, the counts. The block goes
# into `extra["provenance"]`, a key that other readers ignore.

# %%
#| export
def with_provenance(
    dl: DataList, # the list
    **facts: Any, # what else made it: seed, method, recipe fingerprint, ...
) -> DataList: # the same with `extra["provenance"]`
    "Write down which tool made a list, from what, and how many cases it holds"
    from medvol_nb import __version__
    block = {"tool": f"medvol_nb {__version__}", **facts, "n_training": len(dl.training), "n_testing": len(dl.testing),
             "n_labelled": len(dl.labelled())}
    return replace(dl, extra={**dl.extra, "provenance": block})

# %%
with_provenance(spleen, method="legacy", seed=20230808).extra["provenance"]

# %%
assert with_provenance(spleen).training is spleen.training and "provenance" not in spleen.extra

# %% [markdown]
# ## Names that stay in their folder
# A list from elsewhere names files, and a name can lead anywhere: to a parent folder, to another user's home, through a
# symbolic link. `item_path` joins a name to its root or refuses. Symbolic links are looked at then, not when the list
# is read.

# %%
bad = ["../x.nii.gz", "a/../../x.nii.gz", "/etc/passwd", "~/x.nii.gz", "https://host/x.nii.gz", "C:/x.nii.gz",
       "a\\x.nii.gz", "a\0.nii.gz", "a\n.nii.gz", ""]
[p.split(". Paths")[0] for p in items_problems([{"image": b} for b in bad], absolute=False)]

# %%
with tmpdir() as d:
    (d/"data").mkdir()
    (d/"data"/"link").symlink_to(d)
    for name in (*bad, "link/x.nii.gz"):
        with raises(DataError, match="path"): item_path(d/"data", name)
    assert item_path(d/"data", "imagesTr/a..b.nii.gz") == d/"data"/"imagesTr"/"a..b.nii.gz"
    assert item_path(d, "/sv/a.nii.gz", absolute=True) == Path("/sv/a.nii.gz")
assert items_problems([{"image": "imagesTr/a..b.nii.gz"}, {"image": "im age/\u00e9\u00a0.nii"}]) == []

# %% [markdown]
# ## A hundred thousand cases
# The lists of today have up to three thousand cases; those of tomorrow are longer. Reading is one pass of the JSON
# parser and one pass over the fields. The picture is also what a look at a new list should begin with: how many cases a
# fold has, and how many of them have labels.

# %%
many = replace(spleen, training=tuple({"image": f"imagesTr/case_{k:06}_0000.nii.gz", "fold": k % 5,
                                       **({"label": f"labelsTr/case_{k:06}.nii.gz"} if k % 7 else {}),
                                       "pseudo_label": f"imagesTr/case_{k:06}_0000.nii.gz",
                                       "label_sv": f"/sv/many_100/case_{k:06}/case_{k:06}_seg.nii.gz"}
                                      for k in range(20_000)))
with tmpdir() as d:
    write_datalist(many, d/"many_5_folds.json")
    start = time.perf_counter()
    read = read_datalist(d/"many_5_folds.json")
    seconds = time.perf_counter() - start
assert read.training == many.training
f"{seconds/len(many.training)*1e6:.1f} microseconds a case"

# %%
fig, ax = plt.subplots(figsize=(5, 2))
for shown, name, color in [(read.training, "image only", "0.8"), (read.labelled("training"), "with label", "tab:blue")]:
    folds = np.bincount([i["fold"] for i in shown])
    ax.bar(range(len(folds)), folds, label=name, color=color)
ax.set(xlabel="fold", ylabel="cases", title="cases in each fold")
ax.legend(fontsize=7, loc="lower right")
