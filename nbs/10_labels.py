# %% [markdown]
# # Labels
#
# > One label space for many data sets: ids that never change, names that meet, look-up tables that relabel.
#
# Every public data set numbers its classes from 1 and spells them its own way. To train one network on many of them,
# each *local* id must become a *global* one. Three things go wrong in practice. Ids are handed out in the order in
# which data sets happen to be listed, so inserting one renumbers the classes of a trained network. `left adrenal` and
# `left adrenal gland` become two classes. And a local id that has no global class keeps its value, which is some other
# organ's global id. This page has an answer to each: a `LabelSpace` to which one can only append, names compared by
# meaning, and look-up tables in which every possible value has a stated fate.
#
# The ids, mappings and examples come from VISTA3D (He et al., *VISTA3D: A Unified Segmentation Foundation Model for 3D
# Medical Imaging*, CVPR 2025; its dictionaries are published under Apache-2.0).

# %%
#| default_exp labels

# %%
#| export
import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medvol_nb.colours import TABLE_IDS, colour_table
from medvol_nb.core import (ConfigError, DataError, FormatError, OnExists, check_output, log, read_json, to_json,
                            write_json, write_text)

if TYPE_CHECKING: import torch

# %%
import time

import matplotlib.pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import raises, rng_for, tmpdir
from medvol_nb.plot import overlay

# %% [markdown]
# ## The lung that became a spleen
# CT-ORG has six classes. The global list of VISTA3D has the liver, the bladder and the brain, but no whole lung, kidney
# or bone. The usual relabelling replaces what is in the mapping and keeps the rest. Here is what the rest then means:

# %%
ct_org = {1: "liver", 2: "bladder", 3: "lung", 4: "kidney", 5: "bone", 6: "brain"}
pairs = {1: 1, 2: 15, 6: 22}
meaning = {1: "liver", 3: "spleen", 4: "pancreas", 5: "right kidney", 15: "bladder", 22: "brain"}
{name: meaning[pairs.get(local, local)] for local, name in ct_org.items()}

# %% [markdown]
# ## When two names are the same class
# Names differ in spelling and in words. Spelling is a matter of rules: case, spaces and underscores, the side at the
# front (`kidney_right`, `Kidney R`, `right kidney`), British and American. Words are a matter of knowledge: a
# `clavicle` is a `clavicula`. That knowledge is a data file, `aliases.json`, whose entries leave out side and number,
# so one entry serves `left costa 3` and `right costa 12`. Names that mean *nearly* the same, such as spinal canal and
# spinal cord, are not in it.

# %%
#| export
def _resource(name: str) -> Path:
    import medvol_nb
    return Path(medvol_nb.__file__).parent/"resources"/"labels"/name

ALIASES = "aliases.json" # name of the data file of synonyms, in resources/labels

@lru_cache(1)
def aliases() -> dict[str, dict[str, str]]: # 'words': variants of single words; 'names': synonym -> preferred name
    "The table of synonyms"
    return {k: v for k, v in read_json(_resource(ALIASES)).items() if k in ("words", "names")}

_SIDES = {"left": "left", "lef": "left", "lt": "left", "l": "left", "right": "right", "rig": "right", "rt": "right",
          "r": "right"}

@lru_cache(4096)
def canonical_name(
    name: str, # class name in any spelling
) -> str: # lower case, single spaces, side first
    "Spell a class name in the one canonical way; words stay what they are"
    words = re.sub(r"[\s_\-]+", " ", name).strip().casefold()
    if "vertebra" in words: words = re.sub(r"\b([ctls]) (\d+)\b", r"\1\2", words)
    words = [aliases()["words"].get(w, w) for w in words.split()]
    at = [k for k, w in enumerate(words) if w in _SIDES]
    if len(at) == 1 and len(words) > 1: words = [_SIDES[words.pop(at[0])], *words]
    return " ".join(words)

@lru_cache(4096)
def preferred_name(
    name: str, # class name in any spelling
) -> str: # canonical spelling of the preferred synonym
    "What a class is called here: two names mean the same class exactly if this is equal"
    known, spelled = aliases()["names"], canonical_name(name)
    side, base, number = re.fullmatch(r"((?:left |right )?)(.*?)((?: (?:\d+|[ctls]\d+))?)", spelled).groups()
    return known.get(spelled) or f"{side}{known.get(base, base)}{number}"

# %%
same = [("heart   ", "heart"), ("left costa 1", "left rib 1"), ("rib_left_3", "left rib 3"),
        ("left clavicle", "left clavicula"), ("liver tumor", "hepatic tumor"), ("Tumour of", "tumor of"),
        ("left adrenal", "left adrenal gland"), ("small-intestine", "small bowel"), ("right eyeball", "right eye"),
        ("rib_cartilage", "costal cartilages"), ("bones", "bone"), ("Head_of_femur_L", "left head of femur"),
        ("femoral-head-lef", "left head of femur"), ("urinary_bladder", "bladder"), ("vertebrae_L5", "vertebrae L5"),
        ("postcava", "inferior vena cava"), ("left lung lower", "left lung lower lobe")]
{a: (canonical_name(a), preferred_name(a)) for a, _ in same}

# %%
assert all(preferred_name(a) == preferred_name(b) for a, b in same)
assert all(preferred_name(preferred_name(a)) == preferred_name(a) for pair in same for a in pair)
apart = ["left kidney", "right kidney", "kidney", "spinal canal", "spinal cord", "left rib 1", "left rib 11",
         "vertebrae L1", "vertebrae T1", "colon", "large intestine", "hepatic tumor", "hepatic vessel"]
assert len({preferred_name(a) for a in apart}) == len(apart)

# %% [markdown]
# ## Names that are suspiciously close
# Beyond rules and synonyms there are typing errors. `near_duplicates` finds pairs of names with the same side and
# number that are one stroke apart: a letter too many, too few, wrong, or two swapped. They are reported, never merged,
# and two strokes are not enough: gluteus maximus and gluteus minimus are two muscles.

# %%
#| export
def edit_distance(
    a: str, # a word
    b: str, # another word
) -> int: # strokes
    "Number of insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`"
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(rows[-1][j] + 1, row[j - 1] + 1, rows[-1][j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y: row[j] = min(row[j], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]

def near_duplicates(
    names: Iterable[str], # class names
) -> list[tuple[str, str]]: # pairs, in the order given
    "Pairs of names that probably mean the same class"
    names = list(dict.fromkeys(names))
    keys = [preferred_name(n) for n in names]
    bare = [re.sub(r"^(left|right) | ?[ctls]?\d+$", "", k) for k in keys]
    fixed = [k.replace(b, "", 1) if b else k for k, b in zip(keys, bare)] # side and number
    letters = [Counter(b) for b in bare]
    found = []
    for i, a in enumerate(bare):
        for j in range(i + 1, len(bare)):
            if fixed[i] != fixed[j]: continue
            allowed = 0 if min(len(a), len(bare[j])) < 5 else 1
            if abs(len(a) - len(bare[j])) > allowed or (letters[i] - letters[j]).total() > allowed: continue
            if keys[i] == keys[j] or edit_distance(a, bare[j]) <= allowed: found.append((names[i], names[j]))
    return found

# %%
near_duplicates(["pancreas", "pancraes", "left kidney", "right kidney", "left rib 1", "left rib 2", "gall bladder",
                 "gallbladder", "right brachiocephalic vien", "right brachiocephalic vein"])

# %%
assert edit_distance("lable", "label") == 1 and edit_distance("age", "image") == 2 and edit_distance("", "abc") == 3
assert near_duplicates(apart) == []

# %% [markdown]
# ## What a file of labels must look like
# Two helpers serve this page and the next: what is wrong with a dictionary of local ids, and the name of the data set a
# list belongs to. In files ids are strings, since JSON has no other keys; in memory they are integers.

# %%
#| export
MAX_LABEL_ID = 2**31 - 1 # ids in files are int32 at most

def _pointer(*keys: str | int) -> str:
    "JSON pointer (RFC 6901) of a place in a file"
    return "".join("/" + str(k).replace("~", "~0").replace("/", "~1") for k in keys)

def label_dict_problems(
    data: Any, # what a file holds as a label dictionary
    at: str = "", # JSON pointer of `data` in its file
) -> list[str]: # one line a problem, beginning with its JSON pointer
    "What is wrong with a dictionary of local ids and names"
    if not isinstance(data, Mapping): return [f"{at or '/'}: an object of ids and names is needed, got {data!r:.80}"]
    problems = []
    for key, name in data.items():
        place = at + _pointer(key)
        if not isinstance(key, str) or not re.fullmatch(r"0|[1-9][0-9]{0,9}", key) or int(key) > MAX_LABEL_ID:
            problems.append(f"{place}: a label id is a whole number from 0 to {MAX_LABEL_ID}, written '7', got {key!r}")
        if not isinstance(name, str) or not name.strip():
            problems.append(f"{place}: a class name is needed, got {name!r:.80}")
    return problems

def dataset_name_of(
    path: str | os.PathLike, # a data list, such as 'lists/Task09_5_folds.json'
) -> str: # data set name, such as 'Task09'
    "Name of the data set that a list belongs to"
    path = Path(path)
    name = re.sub(r"_\d+_folds$", "", path.name.removesuffix(".json"))
    return path.absolute().parent.name if name in ("dataset", "datalist") else name

# %%
label_dict_problems({"1": "liver", "2.5": "spleen", "-1": "colon", "07": "aorta", "8": ""}, "/label_dict")

# %%
assert dataset_name_of("lists/Task09_5_folds.json") == "Task09" and dataset_name_of("WORD.json") == "WORD"
assert dataset_name_of("Task09_Spleen/dataset.json") == "Task09_Spleen" and not label_dict_problems({"0": "background"})

# %% [markdown]
# ## The reference's rule, and why it is not ours
# The reference gives a class the id 1 + the order of its first appearance, by exact spelling. The same two lists in
# another order, or one more list in front, and the ids are different:

# %%
#| export
def legacy_label_dict(
    lists: Iterable[Mapping[Hashable, str]], # label dictionaries (local id -> name), in the order of the data sets
) -> dict[str, int]: # name -> global id
    "Global ids by the builder of the reference: exact names, numbered by first appearance"
    out: dict[str, int] = {}
    for labels in lists:
        for name in labels.values(): out.setdefault(name, len(out) + 1)
    return out

# %%
amos = {1: "spleen", 2: "right kidney", 6: "liver"}
adrenals = {1: "liver", 2: "left adrenal", 3: "left adrenal gland"}
legacy_label_dict([amos, adrenals]), legacy_label_dict([adrenals, amos])

# %%
assert legacy_label_dict([amos, adrenals])["liver"] != legacy_label_dict([adrenals, amos])["liver"]

# %% [markdown]
# ## The label space
# A `LabelSpace` is a value: classes with their ids, and for each data set the mapping from local to global. Nothing
# changes it; `extended` and `retire` return a new one. They never renumber, and an id that was ever given out, be it to
# a class or only in a mapping, is not given out again. A retired class loses its name and its pairs but its id stays
# taken.

# %%
#| export
@dataclass(frozen=True)
class LabelClass:
    "One global class"
    id: int # global id, 1 or more; 0 is background
    name: str # as in the files
    aliases: tuple[str, ...] = () # further names of this class
    parents: tuple[int, ...] = () # ids of classes that contain it, as the liver contains its tumours
    retired: bool = False # True: not used any more, the id stays taken

@dataclass(frozen=True)
class LabelSpace:
    "Global classes and, for each data set, which local id means which of them"
    classes: tuple[LabelClass, ...] = () # in any order
    mappings: Mapping[str, Mapping[int, int]] = field(default_factory=dict) # data set -> local id -> global id
    local_names: Mapping[str, Mapping[int, str]] = field(default_factory=dict) # data set -> local id -> name, if known

    def __post_init__(self):
        for name in ("mappings", "local_names"):
            given = getattr(self, name)
            object.__setattr__(self, name, {d: dict(m) for d, m in given.items() if m or name == "mappings"})
        _check_space(self)

    @cached_property
    def _active(self) -> dict[int, LabelClass]:
        return {c.id: c for c in reversed(self.classes) if not c.retired}

    @cached_property
    def _by_name(self) -> tuple[dict[str, int], dict[str, int]]:
        active = sorted(self._active.values(), key=lambda c: c.id)
        exact = {c.name: c.id for c in reversed(active)}
        meant = {preferred_name(a): c.id for c in reversed(active) for a in c.aliases}
        return exact, meant | {preferred_name(c.name): c.id for c in reversed(active)}

    @classmethod
    def shipped(cls) -> "LabelSpace":
        "The 124 classes and 24 data sets of VISTA3D, ids up to 132 with gaps, as published"
        return _shipped()

    @classmethod
    def from_files(
        cls,
        label_dict: str | os.PathLike, # JSON object: class name -> global id
        label_mappings: str | os.PathLike | None = None, # JSON object: data set -> list of [local id, global id]
        *,
        strict: bool = True, # refuse names and ids that are used twice; False: leave it to `problems`
    ) -> "LabelSpace":
        "Read the two files of the reference"
        return _from_files(label_dict, label_mappings, strict)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike, # label_space.json, the folder it is in, or a label_dict.json of the reference
    ) -> "LabelSpace":
        "Read a label space from a file"
        return _load(Path(path))

    def save(
        self,
        path: str | os.PathLike, # JSON file, label_space.json by custom
        on_exists: OnExists = "error", # what to do when `path` is there already
    ) -> Path: # `path`
        "Write everything into one versioned file"
        return write_text(path, _space_text(self), on_exists)

    def resolve(
        self,
        name: str, # class name in any spelling
    ) -> int | None: # global id; None if no class is meant
        "The class that a name means: exact name, else spelling and synonyms"
        exact, meant = self._by_name
        return exact.get(name, meant.get(preferred_name(name)))

    def extended(
        self,
        dataset: str, # data set name; may be there already
        label_dict: Mapping[int | str, str], # local id -> class name
        unknown: Literal["add", "unmapped", "error"] = "add", # what becomes of names that no class has
        overrides: Mapping[int | str, int | str | None] | None = None, # local id or name -> class or id; None: unmapped
    ) -> "LabelSpace": # a new one, in which everything that was there is unchanged
        "Add a data set; new classes get new ids behind all ids that were ever used"
        return _extended(self, dataset, label_dict, unknown, overrides or {})

    def retire(
        self,
        name: str, # class name in any spelling
    ) -> "LabelSpace": # a new one, in which labels of this class are unmapped
        "Take a class out of use; its id is never given out again"
        gid = _known(self, name)
        classes = tuple(replace(c, retired=True) if c.id == gid else c for c in self.classes)
        maps = {d: {k: g for k, g in m.items() if g != gid} for d, m in self.mappings.items()}
        lost = {d: {k: self._active[gid].name for k, g in m.items() if g == gid} for d, m in self.mappings.items()}
        return LabelSpace(classes, maps, {d: {**lost.get(d, {}), **self.local_names.get(d, {})}
                                          for d in {**self.mappings, **self.local_names}})

    def mapping(
        self,
        dataset: str, # data set name
    ) -> dict[int, int]: # local id -> global id
        "Which local ids of a data set mean which classes"
        if dataset in self.mappings: return dict(self.mappings[dataset])
        near = difflib.get_close_matches(dataset, self.mappings, n=3)
        hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ". Add it with `extended`"
        raise DataError(f"label space has no data set {dataset!r}{hint}")

    def unmapped(
        self,
        dataset: str, # data set name
    ) -> dict[int, str]: # local id -> name
        "Local classes of a data set that no global class stands for"
        there = self.mapping(dataset)
        return {k: n for k, n in sorted(self.local_names.get(dataset, {}).items()) if k not in there}

    def to_label_dict(self) -> dict[str, int]: # name -> global id, by id
        "Content of label_dict.json"
        return {c.name: c.id for c in sorted(self.classes, key=lambda c: c.id) if not c.retired}

    def to_label_mappings(self) -> dict[str, list[list[int]]]: # data set -> [local id, global id] pairs
        "Content of label_mappings.json"
        return {d: [[k, g] for k, g in m.items()] for d, m in self.mappings.items()}

    def class_names(self) -> list[str | None]: # index = global id; 'background' at 0, None where there is no class
        "Names by id, up to the highest class; its length is the number of outputs of a network"
        names: list[str | None] = [None]*(max(self._active, default=0) + 1)
        names[0] = "background"
        for gid, c in self._active.items(): names[gid] = c.name
        return names

    def children(
        self,
        class_id: int, # global id
    ) -> tuple[int, ...]: # ids of classes that lie inside it
        "Classes that belong to a class"
        return tuple(sorted(c.id for c in self._active.values() if class_id in c.parents))

    def parents(
        self,
        class_id: int, # global id
    ) -> tuple[int, ...]: # ids of classes that contain it
        "Classes that a class belongs to"
        return self._active[class_id].parents if class_id in self._active else ()

    def problems(
        self,
        datasets: Iterable[str] | None = None, # look only at the mappings of these data sets; default: all
    ) -> list[tuple[str, str]]: # (code, text): W404, E405, E406, W407
        "What should be looked at before training with these labels"
        return _problems(self, None if datasets is None else set(datasets))

    def lut(
        self,
        dataset: str, # data set name
        dtype: "np.typing.DTypeLike" = np.int16, # integer type of the result
        unmapped: Literal["ignore", "zero", "error", "keep"] = "ignore", # fate of values without a global class
        ignore: int = 255, # value for unmapped="ignore"
    ) -> np.ndarray: # (n + 2,) look-up table for `relabel`; table[local id] is the global id, see `make_lut`
        "Look-up table from the local ids of a data set to global ids"
        if unmapped == "ignore" and ignore in self._active:
            raise ConfigError(f"lut: ignore id {ignore} is the class {self._active[ignore].name!r}, choose another one")
        return make_lut(self.mapping(dataset), dtype, unmapped, ignore)

# %% [markdown]
# The pieces behind it: what may not be in a space at all, and how the files are read.

# %%
#| export
def _check_space(space: LabelSpace) -> None:
    wrong = [f"class {c.name!r}: id {c.id!r} is not a whole number from 1 to {MAX_LABEL_ID}" for c in space.classes
             if type(c.id) is not int or not 1 <= c.id <= MAX_LABEL_ID]
    wrong += [f"class {c.id}: a name is needed, got {c.name!r:.80}" for c in space.classes
              if not isinstance(c.name, str) or not c.name.strip()]
    for d, m in space.mappings.items():
        wrong += [f"{d}: pair [{k!r}, {g!r}] must be two whole numbers from 1 to {MAX_LABEL_ID}" for k, g in m.items()
                  if not all(type(v) is int and 1 <= v <= MAX_LABEL_ID for v in (k, g))]
    if wrong: raise DataError(f"{len(wrong)} problems in a label space: " + "; ".join(wrong[:20]))

def _known(space: LabelSpace, name: str) -> int:
    "Id of a class that must be there"
    if (gid := space.resolve(name)) is not None: return gid
    near = difflib.get_close_matches(name, space.to_label_dict(), n=3)
    raise DataError(f"label space has no class {name!r}" + (f", did you mean {near}?" if near else ""))

def _twice(values: Iterable[Hashable]) -> list: return [v for v, n in Counter(values).items() if n > 1]

def _from_files(label_dict: Any, label_mappings: Any, strict: bool) -> LabelSpace:
    data = read_json(label_dict)
    if not isinstance(data, dict): raise FormatError(f"{label_dict}: an object of class names and ids is needed")
    wrong = [f"{_pointer(n)}: an integer from 1 is needed, got {v!r:.80}" for n, v in data.items()
             if type(v) is not int or not 1 <= v <= MAX_LABEL_ID or not n.strip()]
    if strict:
        meant = {n: preferred_name(n) for n in data}
        wrong += [f"the names {[n for n in data if meant[n] == m]} mean one class" for m in _twice(meant.values())]
        ids = [v for v in data.values() if isinstance(v, int)]
        wrong += [f"id {v} stands for {[n for n in data if data[n] == v]}" for v in _twice(ids)]
    if wrong: raise FormatError(f"{len(wrong)} problems in {label_dict}: " + "; ".join(wrong[:20]))
    maps = {} if label_mappings is None else read_json(label_mappings)
    if not isinstance(maps, dict): raise FormatError(f"{label_mappings}: an object of data sets and pairs is needed")
    for d, m in maps.items():
        for n, p in enumerate(m if isinstance(m, list) else [None]):
            if not (isinstance(p, list) and len(p) == 2 and all(type(v) is int and 1 <= v <= MAX_LABEL_ID for v in p)):
                wrong.append(f"{_pointer(d, n)}: a pair [local id, global id] is needed, got {p!r:.80}")
        if not wrong and (twice := _twice(p[0] for p in m)): wrong.append(f"{_pointer(d)}: {twice} are mapped twice")
    if wrong: raise FormatError(f"{len(wrong)} problems in {label_mappings}: " + "; ".join(wrong[:20]))
    return LabelSpace(tuple(LabelClass(v, n) for n, v in data.items()), {d: dict(m) for d, m in maps.items()})

@lru_cache(1)
def _shipped() -> LabelSpace:
    space = _from_files(_resource("vista3d_label_dict.json"), _resource("vista3d_label_mappings.json"), True)
    notes = read_json(_resource("vista3d_notes.json"))
    classes = tuple(replace(c, parents=tuple(notes["parents"].get(str(c.id), ()))) for c in space.classes)
    unmapped = {d: {int(k): n for k, n in m.items()} for d, m in notes["unmapped"].items()}
    return LabelSpace(classes, space.mappings, unmapped)

# %%
#| export
_FORMAT, _VERSION = "medvol_nb.label_space", 1

def _space_text(space: LabelSpace) -> str:
    "One line a class and a data set, so that versions can be compared"
    def block(items: Iterable[str], ends: str) -> str:
        return f"{ends[0]}\n    " + ",\n    ".join(items) + f"\n  {ends[1]}" if (items := list(items)) else ends
    classes = (to_json(_class_fields(c), None) for c in space.classes)
    maps = (f"{to_json(d, None)}: {to_json(p, None)}" for d, p in space.to_label_mappings().items())
    names = (f"{to_json(d, None)}: {to_json(m, None)}" for d, m in space.local_names.items() if m)
    return (f'{{\n  "format": "{_FORMAT}",\n  "version": {_VERSION},\n  "classes": {block(classes, "[]")},\n'
            f'  "mappings": {block(maps, "{}")},\n  "local_names": {block(names, "{}")}\n}}\n')

def _class_fields(c: LabelClass) -> dict[str, Any]:
    return {"id": c.id, "name": c.name} | {k: v for k in ("aliases", "parents", "retired") if (v := getattr(c, k))}

def _load(path: Path) -> LabelSpace:
    if path.is_dir(): path = next((p for n in ("label_space.json", "label_dict.json") if (p := path/n).exists()), path)
    data = read_json(path)
    if not isinstance(data, dict): raise FormatError(f"{path}: is no label space")
    if "format" not in data or isinstance(data["format"], int):
        maps = path.with_name("label_mappings.json")
        return _from_files(path, maps if path.name == "label_dict.json" and maps.exists() else None, False)
    if data["format"] != _FORMAT or data.get("version") != _VERSION:
        raise FormatError(f"{path}: {data['format']!r} version {data.get('version')!r}, this reads {_FORMAT!r} version "
                          f"{_VERSION}. Update medvol_nb")
    try:
        classes = tuple(LabelClass(c["id"], c["name"], tuple(c.get("aliases", ())), tuple(c.get("parents", ())),
                                   bool(c.get("retired", False))) for c in data["classes"])
        return LabelSpace(classes, {d: dict(m) for d, m in data["mappings"].items()},
                          {d: {int(k): n for k, n in m.items()} for d, m in data["local_names"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise FormatError(f"{path}: is damaged ({type(e).__name__}: {e}). Write it again with LabelSpace.save") from e

# %%
shipped = LabelSpace.shipped()
len(shipped.classes), len(shipped.class_names()), shipped.resolve("adrenal_gland_left"), shipped.mapping("CT-ORG")

# %% [markdown]
# The published ids have gaps (classes that were given up), and a few data sets have classes without a global one. The
# reference lists its class names by counting from 0, which fails on its own file:

# %%
with raises(KeyError, match="2"): [{v: k for k, v in shipped.to_label_dict().items()}[k] for k in range(1, 125)]
names = shipped.class_names()
[k for k, n in enumerate(names) if n is None], {d: shipped.unmapped(d) for d in shipped.local_names}

# %%
assert len(names) == 133 and names[0] == "background" and names[132] == "airway" and names.count(None) == 8
assert [shipped.children(k) for k in (1, 4, 132)] == [(25, 26), (24,), (57,)] and shipped.parents(57) == (132,)
assert len(shipped.mapping("TotalSegmentatorV2")) == 117 and shipped.mapping("Bone-NIH") == {1: 128, 2: 128}
assert shipped.resolve("unicorn") is None
with raises(DataError, match="did you mean 'VerSe'"): shipped.mapping("Verse")

# %% [markdown]
# ## Adding a data set
# A list with six names: four are known, one of them by a synonym; two are new. The new ones get ids behind the highest
# ever used. That is 135, not 132: the published mappings name 133 to 135, though no class of the dictionary has them.

# %%
#| export
def _local_ids(label_dict: Mapping, dataset: str) -> dict[int, str]:
    "Local id -> name, without the background"
    strings = {k if isinstance(k, str) else str(k) if type(k) is int else k: v for k, v in label_dict.items()}
    if problems := label_dict_problems(strings): raise DataError(f"labels of {dataset!r}: " + "; ".join(problems[:20]))
    ids = {int(k): n for k, n in strings.items()}
    if 0 in ids and preferred_name(ids[0]) not in ("background", "unlabeled", "unlabelled", "unspecified", "clear"):
        raise DataError(f"labels of {dataset!r}: id 0 is background, got {ids[0]!r}. Renumber the labels from 1")
    return {k: n for k, n in ids.items() if k}

def _override(space: LabelSpace, overrides: Mapping, k: int, name: str) -> tuple[bool, int | None]:
    "Is there an override for this local class, and what does it say"
    for key in (k, str(k), name):
        if key in overrides:
            goal = overrides[key]
            if goal is None or isinstance(goal, str): return True, None if goal is None else _known(space, goal)
            if goal in space._active: return True, goal
            raise DataError(f"override {key!r}: there is no class with id {goal!r}")
    return False, None

def _extended(space: LabelSpace, dataset: str, label_dict: Mapping, unknown: str, overrides: Mapping) -> LabelSpace:
    if unknown not in ("add", "unmapped", "error"):
        raise ConfigError(f"unknown: must be 'add', 'unmapped' or 'error', got {unknown!r}")
    local, before = _local_ids(label_dict, dataset), space.local_names.get(dataset, {})
    if stray := [o for o in overrides if not any(o in (k, str(k), n) for k, n in local.items())]:
        raise DataError(f"overrides {stray}: data set {dataset!r} has no such class")
    if changed := [f"{k}: {before[k]!r}, now {n!r}" for k, n in local.items()
                   if k in before and preferred_name(before[k]) != preferred_name(n)]:
        raise DataError(f"data set {dataset!r} is there already with other names ({'; '.join(changed[:10])}). "
                        "Give the new version another name")
    pairs, classes, lost = dict(space.mappings.get(dataset, {})), list(space.classes), []
    used = [c.id for c in classes] + [g for m in space.mappings.values() for g in m.values()]
    new: dict[str, int] = {}
    for k, name in local.items():
        if k in pairs: continue
        given, gid = _override(space, overrides, k, name)
        if not given: gid = space.resolve(name) or new.get(preferred_name(name))
        if gid is None and not given and unknown == "error": lost.append(f"{k} {name!r}")
        if gid is None and not given and unknown == "add":
            gid = new[preferred_name(name)] = max([0, *used, *new.values()]) + 1
            classes.append(LabelClass(gid, name.strip()))
        if gid is not None: pairs[k] = gid
    if lost: raise DataError(f"data set {dataset!r} has {len(lost)} classes that the label space has not: "
                             f"{', '.join(lost)}. Add them (unknown='add'), leave them out ('unmapped'), or say what "
                             "they are with `overrides`")
    return LabelSpace(tuple(classes), {**space.mappings, dataset: dict(sorted(pairs.items()))},
                      {**space.local_names, dataset: {**before, **local}})

# %%
word = {1: "liver", 3: "left_kidney", 7: "esophagus", 11: "intestine", 12: "adrenal", 15: "Head_of_femur_L"}
more = shipped.extended("WORD", word)
more.mapping("WORD"), [(c.id, c.name) for c in more.classes[124:]]

# %%
assert more.to_label_dict().items() >= shipped.to_label_dict().items() and more.mapping("WORD")[3] == 14
assert more.extended("WORD", word) == more and shipped.resolve("intestine") is None
pediatric = more.extended("Pediatric", {6: "femoral-head-lef", 24: "lung_l"})
assert pediatric.mapping("Pediatric")[6] == more.resolve("left head of femur") == more.mapping("WORD")[15]
assert shipped.extended("X", {2: "prostate or uterus"}, overrides={2: "prostate"}).mapping("X") == {2: 118}
assert shipped.extended("X", word, unknown="unmapped").unmapped("X") == {k: word[k] for k in (11, 12, 15)}

# %% [markdown]
# Retiring takes a class out of use. Its name may come back later, as another class with another id.

# %%
gone = more.retire("intestine")
back = gone.extended("Y", {1: "intestine"})
more.resolve("intestine"), gone.resolve("intestine"), gone.unmapped("WORD"), back.mapping("Y")

# %%
assert back.resolve("intestine") > max(c.id for c in more.classes) and 11 not in back.mapping("WORD")
with raises(DataError, match="has 3 classes that the label space has not: 11 'intestine', 12 'adrenal', 15"):
    shipped.extended("WORD", word, unknown="error")
with raises(DataError, match="1: 'liver', now 'spleen'"): more.extended("WORD", {1: "spleen"})
with raises(DataError, match="id 0 is background, got 'liver'"): shipped.extended("X", {0: "liver"})
with raises(DataError, match="no class 'panceas', did you mean \\['pancreas'"): shipped.retire("panceas")

# %% [markdown]
# ## What should be looked at
# `problems` lists four kinds. `W404`: a local class has no global one, or a mapping names a class that does not exist.
# `E405`: the id of such a local class is a global id in use, so a relabelling that keeps unmapped values turns it into
# another organ, as the lung above. `E406`: two classes share an id. `W407`: two names probably mean one class. All the
# collisions known from the published mappings appear:

# %%
#| export
def _problems(space: LabelSpace, datasets: set[str] | None) -> list[tuple[str, str]]:
    found, active = [], space._active
    for d in space.mappings:
        if datasets is not None and d not in datasets: continue
        for k, name in space.unmapped(d).items():
            found.append(("W404", f"unmapped class: data set {d!r}, local id {k} {name!r} has no global class"))
            if k in active:
                found.append(("E405", f"mapping collision: data set {d!r}, local id {k} {name!r} is unmapped and "
                                      f"equals the global id of {active[k].name!r}. Do not keep unmapped values"))
        for k, g in space.mappings[d].items():
            if g not in active:
                found.append(("W404", f"unmapped class: data set {d!r}, local id {k} goes to {g}, which no class has"))
    for gid in sorted(_twice(c.id for c in space.classes)):
        found.append(("E406", f"duplicate global id: {gid} is {[c.name for c in space.classes if c.id == gid]}"))
    for a, b in near_duplicates(c.name for c in space.classes if not c.retired):
        found.append(("W407", f"near-duplicate names: {a!r} and {b!r}. If they mean one class, use an override"))
    return sorted(found, key=lambda f: f[0])

# %%
[text.partition(". Do not")[0] for code, text in shipped.problems() if code == "E405"]

# %%
assert Counter(code for code, _ in shipped.problems()) == {"W404": 11, "E405": 7}
double = LabelSpace((LabelClass(1, "pancreas"), LabelClass(1, "liver"), LabelClass(2, "Pancraes")))
[code for code, _ in double.problems()]

# %% [markdown]
# ## Files
# The reference's two files come out of a label space as they went in. Our own file also holds what they cannot:
# aliases, parents, retired classes, the names of unmapped ids.

# %%
with tmpdir() as d:
    write_json(d/"label_dict.json", shipped.to_label_dict())
    write_json(d/"label_mappings.json", shipped.to_label_mappings())
    copy = LabelSpace.from_files(d/"label_dict.json", d/"label_mappings.json")
    stored = LabelSpace.load(gone.save(d/"label_space.json"))
    lines = (d/"label_space.json").read_text().splitlines()
    write_json(d/"bad.json", {"heart": 1, "heart   ": 2, "aorta": 2, "colon": "x"})
    with raises(FormatError, match="3 problems.*'x'.*'heart', 'heart   '. mean one class.*id 2 stands for"):
        LabelSpace.from_files(d/"bad.json")
lines[1:6]

# %%
assert (copy.to_label_dict(), copy.mappings) == (shipped.to_label_dict(), shipped.mappings) and stored == gone

# %% [markdown]
# ## One table instead of a hundred passes
# The usual relabelling goes through the volume once for each pair: 117 passes for TotalSegmentator. A look-up table
# needs one. The table is indexed by the local value. Values with no entry, negative ones and those beyond the end, need
# an answer too, so two more entries follow: the answer for all of them, and a code that says how to take it. It may be
# a value (`"ignore"`, `"zero"`), or a mark for "as it was" (`"keep"`) or "stop" (`"error"`). The default is `"ignore"`:
# a loss can leave such voxels out, and nothing turns into another organ.

# %%
#| export
_VALUE, _KEEP, _STOP = 0, 1, 2 # last entry of a table

def _spare(used: set[int], limits: np.iinfo) -> int:
    "A value of the dtype that no result can have"
    order = range(limits.min, limits.max + 1) if limits.min < 0 else range(limits.max, -1, -1)
    for v in order:
        if v not in used: return v
    raise DataError(f"lut: {limits.dtype} has no value to spare, choose a wider dtype")

def make_lut(
    mapping: Mapping[int, int] | Iterable[Sequence[int]], # local id -> global id, or pairs of them
    dtype: "np.typing.DTypeLike" = np.int16, # integer type of the result
    unmapped: Literal["ignore", "zero", "error", "keep"] = "ignore", # fate of other values; 0 stays 0 unless mapped
    ignore: int = 255, # value for unmapped="ignore"
) -> np.ndarray: # (n + 2,) entries of the values 0 to n - 1, then the answer for all others and how to take it
    "Look-up table for `relabel`"
    pairs, dtype = {0: 0} | {int(k): int(g) for k, g in dict(mapping).items()}, np.dtype(dtype)
    if dtype.kind not in "iu": raise ConfigError(f"lut: an integer dtype is needed, got {dtype}")
    if unmapped not in ("ignore", "zero", "error", "keep"):
        raise ConfigError(f"lut: unmapped must be 'ignore', 'zero', 'error' or 'keep', got {unmapped!r}")
    n, limits = max(pairs) + 1, np.iinfo(dtype)
    if min(pairs) < 0 or n > 2**22: raise DataError(f"lut: local ids must be 0 to {2**22 - 1}, got {sorted(pairs)[:9]}")
    results = {*pairs.values(), *{"ignore": [ignore], "keep": range(n)}.get(unmapped, ())}
    if odd := sorted(v for v in results if not limits.min <= v <= limits.max):
        raise DataError(f"lut: {odd[:5]} do not fit {dtype}, choose a wider dtype" +
                        (" or another ignore id" if ignore in odd else ""))
    code, mark = (_VALUE, {"ignore": ignore, "zero": 0}[unmapped]) if unmapped in ("ignore", "zero") else \
        (_KEEP if unmapped == "keep" else _STOP, _spare(results, limits))
    table = np.arange(n + 2).astype(dtype) if unmapped == "keep" else np.full(n + 2, mark, dtype)
    table[list(pairs)] = list(pairs.values())
    table[n:] = mark, code
    return table

# %%
shipped.lut("CT-ORG"), shipped.lut("CT-ORG", unmapped="zero"), shipped.lut("CT-ORG", unmapped="keep", dtype=np.int32)

# %% [markdown]
# Applying it is one `np.take` over pieces that fit the cache. Signed values are looked at as unsigned ones of the same
# width: −1 becomes the largest number there is, so negative values and those beyond the end are one case. For 8 and 16
# bits the table is written out for all values there can be; wider ones are limited to its last entry. Tensors take the
# same way on the CPU; on other devices indexing does it. What carries meta data (MONAI's `MetaTensor`) gets it back.
# Labels that were loaded as floats are accepted if they are whole numbers.

# %%
#| export
def _whole(arr: np.ndarray) -> np.ndarray:
    "Labels as integers; refused if that would change them"
    if arr.dtype.kind in "iu": return arr if arr.dtype.isnative else arr.astype(arr.dtype.newbyteorder("="))
    if arr.dtype == bool: return arr.view(np.uint8)
    if arr.dtype.kind != "f": raise DataError(f"relabel: labels are integers, got dtype {arr.dtype}")
    with np.errstate(invalid="ignore"): out = arr.astype(np.int32)
    if not np.array_equal(out, arr):
        raise DataError(f"relabel: {int((out != arr).sum())} of {arr.size} labels are not whole numbers")
    return out

def _stop(values: Any) -> None:
    found = sorted({int(v) for v in values})
    raise DataError(f"relabel: values {found[:10]}{' ...' if len(found) > 10 else ''} have no global class. Map them, "
                    "or choose unmapped='ignore', 'zero' or 'keep'")

def _kept(values: Any, dtype: np.dtype) -> None:
    "Values that stay as they are must fit the result"
    limits = np.iinfo(dtype)
    if len(values) and not (limits.min <= int(values.min()) and int(values.max()) <= limits.max):
        raise DataError(f"relabel: kept values {int(values.min())} to {int(values.max())} do not fit {dtype}")

def _take(arr: np.ndarray, lut: np.ndarray) -> np.ndarray:
    arr = _whole(arr)
    if not arr.flags.c_contiguous and arr.flags.f_contiguous: return _take(arr.T, lut).T
    out = np.empty(arr.shape, lut.dtype)
    table, n, code, result = lut[:-1], len(lut) - 2, int(lut[-1]), out.reshape(-1)
    values = np.ascontiguousarray(arr).reshape(-1)
    index, width = values.view(f"u{values.itemsize}"), 2**(8*values.itemsize)
    if narrow := width <= 2**16:
        table = np.full(width, table[-1])
        table[:n] = lut[:min(n, width)]
    buffer = np.empty(min(len(values), 2**15), np.intp)
    for k in range(0, len(values), 2**15):
        part, goal = index[k:k + 2**15], result[k:k + 2**15]
        at = buffer[:len(part)]
        if narrow: np.copyto(at, part)
        else: np.minimum(part, n, out=at, casting="unsafe")
        np.take(table, at, mode="wrap", out=goal) # all lie inside; with "wrap" NumPy is quickest
        if code == _VALUE: continue
        if not (other := goal == lut[-2]).any(): continue
        found = values[k:k + 2**15][other]
        if code == _STOP: _stop(np.unique(found))
        _kept(found, out.dtype)
        goal[other] = found
    return out

# %%
#| export
def _take_on_device(arr: "torch.Tensor", lut: np.ndarray) -> "torch.Tensor":
    "The same where NumPy cannot go"
    import torch
    values, n, code = arr, len(lut) - 2, int(lut[-1])
    if arr.is_floating_point():
        values = arr.to(torch.int64)
        if not bool((values == arr).all()): raise DataError("relabel: some labels are not whole numbers")
    values = values.to(torch.int64)
    table = torch.from_numpy(lut[:-1].astype(np.int64)).to(arr.device)
    out = table[torch.where((values < 0) | (values > n), n, values)]
    if code != _VALUE and bool((other := out == int(lut[-2])).any()):
        if code == _STOP: _stop(values[other].unique().tolist())
        _kept(values[other], lut.dtype)
        out = torch.where(other, values, out)
    return out.to(torch.from_numpy(lut[:0]).dtype)

def relabel(
    arr: "np.ndarray | torch.Tensor", # array of any shape: labels, integers (or floats that are whole numbers)
    lut: np.ndarray, # (n + 2,) from `LabelSpace.lut` or `make_lut`
) -> "np.ndarray | torch.Tensor": # array of the same shape and kind, dtype of the table; meta data kept
    "Replace local ids by global ones, in one pass"
    if isinstance(arr, np.ndarray | np.generic): return _take(np.asarray(arr), lut)
    if not hasattr(arr, "detach"): raise DataError(f"relabel: an array or a tensor is needed, got {type(arr).__name__}")
    import torch
    plain = arr.detach().as_subclass(torch.Tensor)
    out = torch.from_numpy(_take(plain.numpy(), lut)) if plain.device.type == "cpu" else _take_on_device(plain, lut)
    return type(arr)(out).copy_meta_from(arr) if hasattr(arr, "copy_meta_from") else out

# %%
values = np.array([0, 1, 2, 3, 6, 7, -1, 30000], np.int16)
{u: relabel(values, shipped.lut("CT-ORG", unmapped=u)).tolist() for u in ("ignore", "zero", "keep")}

# %%
for dtype in (np.int8, np.int16, np.int32, np.int64):
    some = rng_for(0, "labels", dtype.__name__).integers(-3, 9, (3, 4, 5)).astype(dtype)
    plain = np.vectorize({1: 1, 2: 15, 6: 22, 0: 0}.get)(some, 255)
    assert np.array_equal(relabel(some, shipped.lut("CT-ORG")), plain)
    assert np.array_equal(relabel(np.asfortranarray(some)[::2], shipped.lut("CT-ORG")), plain[::2])
with raises(DataError, match="values \\[-1, 3, 7, 30000\\] have no global class"):
    relabel(values, shipped.lut("CT-ORG", unmapped="error"))
with raises(DataError, match="1 of 2 labels are not whole numbers"): relabel(np.array([1, 1.5]), shipped.lut("CT-ORG"))
with raises(DataError, match="\\[300\\] do not fit int8"): make_lut({1: 300}, np.int8, "zero")
with raises(ConfigError, match="ignore id 15 is the class 'bladder'"): shipped.lut("CT-ORG", ignore=15)

# %% [markdown]
# A toy abdomen with CT-ORG's numbers: liver 1, bladder 2, kidneys 4, bone 5. With `"keep"` the kidneys become pancreas
# (4) and the bone right kidney (5), and nothing looks wrong. With `"ignore"` both are set apart (255).

# %%
body = phantoms.abdomen((96, 72, 84))
in_ct_org = {"liver": 1, "urinary bladder": 2, "right kidney": 4, "left kidney": 4, "vertebrae": 5, "ribs": 5}
local = relabel(body.lbl, make_lut({k: in_ct_org[n] for k, n in body.names.items() if n in in_ct_org}, unmapped="zero"))
at = max(range(local.shape[1]), key=lambda k: (len(np.unique(local[:, k])), int((local[:, k] == 4).sum())))
fig, axes = plt.subplots(1, 3, figsize=(7, 2.5))
for ax, u in zip(axes, ("local", "keep", "ignore")):
    v = (local if u == "local" else relabel(local, shipped.lut("CT-ORG", unmapped=u)))[:, at]
    ax.imshow(np.rot90(overlay(body.img[:, at], v)))
    ax.set(title=f"{u}: {np.unique(v).tolist()}", xticks=[], yticks=[])
    ax.title.set_fontsize(8)

# %% [markdown]
# What it costs, against the passes over pairs, on a map of 96³ voxels with 117 classes:

# %%
def by_pairs(lbl: np.ndarray, pairs: dict) -> np.ndarray:
    out = lbl.copy()
    for k, g in pairs.items(): out[lbl == k] = g
    return out

big = rng_for(0, "big").integers(0, 118, (96, 96, 96)).astype(np.int16)
table, pairs = shipped.lut("TotalSegmentatorV2"), shipped.mapping("TotalSegmentatorV2")
seconds = []
for f in (lambda: relabel(big, table), lambda: by_pairs(big, pairs)):
    start = time.perf_counter()
    result = f()
    seconds.append(time.perf_counter() - start)
assert np.array_equal(relabel(big, table), result)
f"{seconds[0]*1e3:.1f} ms and {seconds[1]*1e3:.0f} ms, {seconds[1]/seconds[0]:.0f} times"

# %% [markdown]
# ## In a pipeline
# Items of a training pipeline are dictionaries that carry the name of their data set. `RelabelLUTd` picks the table by
# that name; `DatasetSelectTransformd` picks a whole transform. Both behave like the dictionary transforms of MONAI and
# can stand in its `Compose`. An item whose data set is not in the space is an error: passing it on unchanged, as the
# reference does, is the lung and the spleen again. For labels that are global already, say `unknown="keep"`.

# %%
#| export
def _dataset_of(data: Mapping, key: str, who: str) -> str:
    if key in data: return data[key]
    raise KeyError(f"{who}: the item has no {key!r}, which names its data set; it has {sorted(map(str, data))}")

class RelabelLUTd:
    "Dictionary transform: local label ids to global ones, by the item's data set"
    def __init__(
        self,
        keys: str | Sequence[str], # entries that hold labels
        space_or_mappings: LabelSpace | Mapping[str, Any], # label space, or data set -> pairs of local and global id
        dataset_key: str = "dataset_name", # entry with the data set's name
        dtype: "np.typing.DTypeLike" = np.int16, # integer type of the result
        unmapped: Literal["ignore", "zero", "error", "keep"] = "ignore", # fate of values without a global class
        allow_missing_keys: bool = False, # skip keys that an item has not
        *,
        ignore: int = 255, # value for unmapped="ignore"
        unknown: Literal["error", "keep"] = "error", # items of unknown data sets: refuse, or leave them unchanged
    ):
        self.keys, self.dataset_key = (keys,) if isinstance(keys, str) else tuple(keys), dataset_key
        self.allow_missing_keys, self.unknown = allow_missing_keys, unknown
        if unknown not in ("error", "keep"): raise ConfigError(f"unknown: must be 'error' or 'keep', got {unknown!r}")
        space = space_or_mappings
        maps = space.mappings if isinstance(space, LabelSpace) else space
        self.tables = {d: space.lut(d, dtype, unmapped, ignore) if isinstance(space, LabelSpace)
                       else make_lut(m, dtype, unmapped, ignore) for d, m in maps.items()}

    def __call__(
        self,
        data: Mapping[Hashable, Any], # item with labels of any shape and the name of its data set
    ) -> dict[Hashable, Any]: # a new dictionary, labels replaced
        "Relabel one item"
        name, out = _dataset_of(data, self.dataset_key, "RelabelLUTd"), dict(data)
        if name not in self.tables:
            if self.unknown == "keep": return out
            near = difflib.get_close_matches(str(name), self.tables, n=1)
            raise DataError(f"RelabelLUTd: no label mapping for data set {name!r}" +
                            (f", did you mean {near[0]!r}?" if near else "") +
                            ". Add it to the label space, or choose unknown='keep' if its labels are global already")
        for key in self.keys:
            if key in out: out[key] = relabel(out[key], self.tables[name])
            elif not self.allow_missing_keys:
                raise KeyError(f"Key `{key}` of transform `RelabelLUTd` was missing in the data and "
                               "allow_missing_keys==False.")
        return out

class DatasetSelectTransformd:
    "Dictionary transform: apply the transform of the item's data set"
    def __init__(
        self,
        keys: str | Sequence[str], # kept for compatibility with the reference; the transforms know their own keys
        dataset_transforms: Mapping[str, Callable | None], # data set -> transform; None: leave the item unchanged
        dataset_key: str = "dataset_name", # entry with the data set's name
    ):
        self.keys, self.dataset_key = (keys,) if isinstance(keys, str) else tuple(keys), dataset_key
        self.dataset_transforms = dict(dataset_transforms)

    def __call__(
        self,
        data: Mapping[Hashable, Any], # item with the name of its data set
    ) -> Any: # what the transform returns, or the item
        "Transform one item"
        name = _dataset_of(data, self.dataset_key, "DatasetSelectTransformd")
        if name not in self.dataset_transforms:
            raise KeyError(f"DatasetSelectTransformd: no transform for data set {name!r}, there are "
                           f"{sorted(self.dataset_transforms)}")
        transform = self.dataset_transforms[name]
        return data if transform is None else transform(data)

    def set_random_state(
        self,
        seed: int | None = None, # seed of the random transforms inside
        state: Any = None, # NumPy's legacy generator, as MONAI passes it on
    ) -> "DatasetSelectTransformd": # itself
        "Hand the seed on to the transforms inside; MONAI's loaders call this in each worker"
        for n, t in enumerate(self.dataset_transforms.values()):
            if hasattr(t, "set_random_state"): t.set_random_state(None if seed is None else (seed + n) % 2**32, state)
        return self

DatasetSelectTansformd = DatasetSelectTransformd # the name by which the reference knows it

# %%
item = {"label": values, "dataset_name": "CT-ORG", "fold": 0}
to_global = RelabelLUTd("label", shipped)
chosen = DatasetSelectTransformd("label", {"CT-ORG": to_global, "LIDC": None})
chosen(item)["label"], chosen({**item, "dataset_name": "LIDC"})["label"]

# %%
assert np.array_equal(item["label"], values) and DatasetSelectTansformd is DatasetSelectTransformd
assert "label" not in RelabelLUTd(["label"], shipped, allow_missing_keys=True)({"dataset_name": "VerSe"})
with raises(DataError, match="no label mapping for data set 'CTORG', did you mean 'CT-ORG'"):
    to_global({**item, "dataset_name": "CTORG"})
with raises(KeyError, match="Key `label` of transform"): to_global({"dataset_name": "CT-ORG"})
with raises(KeyError, match="has no 'dataset_name'"): chosen({"label": values})

# %% [markdown]
# ## Putting it together: a label space from data lists
# The command `medvol datalists labels` reads the `label_dict` of each list, extends a base, and writes the two files of
# the reference and our own. What was there stays as it was; run it again with its own result as base when a data set is
# added. Beside them lie names and colours for 3D Slicer (`labels.ctbl`) and ITK-SNAP (`labels.label`), for looking at
# volumes in global ids. A table whose program cannot hold a name, such as one with a quotation mark in ITK-SNAP, is
# left out with a warning; the label space is written all the same.

# %%
#| export
def _base(base: str | os.PathLike) -> LabelSpace:
    if base == "shipped": return LabelSpace.shipped()
    return LabelSpace() if base == "empty" else LabelSpace.load(base)

_TABLES = {"labels.ctbl": "slicer", "labels.label": "itksnap"} # file -> program that reads it

def _tables(space: LabelSpace) -> tuple[dict[str, str], dict[str, str]]:
    "Colour tables of the classes, and why those are left out that cannot hold them"
    names = {i: n for n, i in space.to_label_dict().items()}
    made, why = {}, {}
    for file, program in _TABLES.items():
        try: made[file] = colour_table(names, program, where=file)
        except DataError as e:
            why[file] = f"{e}. {file} is left out; to have it, rename these classes in their data lists or in the base"
            if max(names) > TABLE_IDS[program]: why[file] = f"{e}. {file} is left out"
    return made, why

def build_label_space(
    datalists: Sequence[str | os.PathLike], # data lists, '<name>_5_folds.json'
    out: str | os.PathLike, # folder for label_dict.json, label_mappings.json, label_space.json and colour tables
    *,
    base: str | os.PathLike = "shipped", # what is extended: 'shipped', 'empty', or a label space from before
    unknown: Literal["add", "unmapped", "error"] = "add", # what becomes of names that no class has
    on_exists: OnExists = "error", # what to do when the files are there already
    dry_run: bool = False, # tell what would be written, write nothing
) -> dict: # 'written' files, tables 'left_out' and why, number of 'classes', 'added' classes, 'problems' [code, text]
    "Make one label space for many data lists"
    start = space = _base(base)
    for path in datalists:
        data = read_json(path)
        labels = data.get("label_dict") if isinstance(data, dict) else None
        if labels is None: raise FormatError(f"{path}: no 'label_dict' in it. Is this a data list with labels?")
        if wrong := label_dict_problems(labels, "/label_dict"): raise FormatError(f"{path}: {'; '.join(wrong[:20])}")
        space = space.extended(dataset_name_of(path), labels, unknown)
    tables, left_out = _tables(space)
    files = {"label_dict.json": to_json(space.to_label_dict(), 4) + "\n",
             "label_mappings.json": to_json(space.to_label_mappings(), None) + "\n",
             "label_space.json": _space_text(space), **tables}
    for why in left_out.values(): log.warning("%s", why)
    known = {c.id for c in start.classes}
    report = {"out": str(out), "written": [], "left_out": left_out, "classes": len(space.to_label_dict()),
              "datasets": len(space.mappings), "added": {c.name: c.id for c in space.classes if c.id not in known},
              "problems": [list(p) for p in space.problems(map(dataset_name_of, datalists))]}
    if dry_run: return report
    if not Path(out).is_dir():
        check_output(out, on_exists)
        Path(out).mkdir()
    todo = [n for n in files if check_output(Path(out)/n, on_exists)]
    if on_exists == "overwrite": # a table of the space that was here before may name other classes
        for n in left_out: (Path(out)/n).unlink(missing_ok=True)
    for n in todo: write_text(Path(out)/n, files[n], on_exists)
    return report | {"written": todo}

# %%
with tmpdir() as d:
    lists = {"WORD": word, "Pediatric": {8: "small-intestine", 15: "adrenal-left", 29: "bones"}}
    for name, labels in lists.items(): write_json(d/f"{name}_5_folds.json", {"training": [], "label_dict": labels})
    report = build_label_space([d/f"{n}_5_folds.json" for n in lists], d/"space")
    built = LabelSpace.load(d/"space")
    again = build_label_space([d/"Pediatric_5_folds.json"], d/"again", base=d/"space", dry_run=True)
report["written"], report["added"], [p for p in report["problems"] if "Pediatric" in p[1]]

# %%
assert built.mapping("Pediatric")[15] == 9 and built.resolve("bones") == built.mapping("Pediatric")[29]
assert again["added"] == {} and again["written"] == [] and report["left_out"] == {}
assert built.to_label_dict().items() > shipped.to_label_dict().items()

# %% [markdown]
# ## Agreement with the reference
# MONAI's `MapLabelValue` on the pairs of TotalSegmentator, which replaces them one by one, and the same through a
# `Compose` on a `MetaTensor`, whose affine stays:

# %%
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapLabelValue

small = big[:32, :32, :32]
theirs = MapLabelValue(orig_labels=list(pairs), target_labels=list(pairs.values()), dtype=np.int16)(small)
assert np.array_equal(relabel(small, table), theirs)
meta = MetaTensor(torch.from_numpy(small[None].copy()), affine=torch.diag(torch.tensor([1.5, 1.5, 3.0, 1.0])))
out = Compose([RelabelLUTd("label", shipped)])({"label": meta, "dataset_name": "TotalSegmentatorV2"})["label"]
assert isinstance(out, MetaTensor) and torch.equal(out.affine, meta.affine) and np.array_equal(out.numpy()[0], theirs)
out.shape, out.dtype, out.pixdim
