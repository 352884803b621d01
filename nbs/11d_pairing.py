# %% [markdown]
# # Pairing
#
# > Which image belongs to which label: templates with named groups, one listing of the folder, and pairs by key.
#
# Every data set has its own idea of a folder. Images lie beside labels, in a parallel tree, in one of three folders, or
# in the only other file of the same directory; a number in the name, or in the name of a parent, says what belongs
# together. Scripts that make lists put this knowledge into code, one function a data set, with the root folder of the
# author's machine inside. Here it is data: a *recipe* has two kinds of templates, one for labels and one for images,
# that share named groups. This page says what a recipe is, and pairs files with it. The next page holds the recipes of
# 42 data sets and makes lists with them.

# %%
#| default_exp pairing

# %%
#| export
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from medvol_nb.config import Config
from medvol_nb.core import DataError, MissingFile, inside
from medvol_nb.volume import FORMATS, stem_of

# %%
from glob import glob

from medvol_nb.core import raises, tmpdir

def touch(root, *names):
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        (root/n).touch()
    return root

# %% [markdown]
# ## How a list goes wrong without an error
# Twelve labels; the images are spread over three folders, and image 4 was lost in a download. The usual script sorts
# the labels, looks for each image, appends what it finds, and zips the two lists. Where nothing is found nothing is
# appended, so from there on every label is paired with its neighbour's image. The last image drops off the end of the
# zip, and nobody is told.

# %%
def lost_image(root: Path) -> Path:
    for k in range(1, 13):
        touch(root, f"Mask/Case_{k:05}.nii.gz")
        if k != 4: touch(root, f"AbdomenCT-1K-ImagePart{1 + k % 3}/Case_{k:05}_0000.nii.gz")
    return root

def zipped(root: Path) -> list:
    labels, images = sorted(glob(f"{root}/Mask/*.nii.gz")), []
    for l in labels:
        images += glob(f"{root}/AbdomenCT-1K-ImagePart*/{stem_of(l)}_0000.nii.gz")[:1]
    return [(Path(i).name[:10], Path(l).name[:10]) for i, l in zip(images, labels)]

with tmpdir() as d: shifted = zipped(lost_image(d))
shifted[2:6], sum(i != l for i, l in shifted)

# %%
assert (len(shifted), sum(i != l for i, l in shifted)) == (11, 8)

# %% [markdown]
# Of eleven pairs eight are wrong. The remedy is not a better check but another mechanism: a pair exists because label
# and image have the same *key*, and for no other reason. Position plays no part.
#
# ## Templates
# A template is a path below the data set's folder. `{id}` is a named group, `*` anything within a name, `**/` any
# folders, `{folder}` any folders that must be the same for image and label, and `{.}` any suffix that the library can
# read (a folder with a DICOM series has none). Groups may be given as regular expressions, and one whose name begins
# with `_` may differ between image and label. A template is matched against the *whole relative* path. Scripts that
# search in the absolute path skip all cases of a user whose home folder contains the number of a bad one.

# %%
#| export
_KNOWN = sorted((s for f in FORMATS for s in f.suffixes), key=len, reverse=True)
_SUFFIX = f"(?:(?:\\.ome)?(?:{'|'.join(map(re.escape, _KNOWN))})|/)"
_TOKEN = re.compile(r"\{(\.|\w+)\}|(\*\*/)|(\*)")

@lru_cache(4096)
def _pattern(template: str, groups: tuple[tuple[str, str], ...]) -> re.Pattern:
    "Regular expression of a template, with its named groups"
    out, seen, at, known = "", set(), 0, {"folder": "(?:[^/]+/)*", **dict(groups)}
    for m in _TOKEN.finditer(template):
        out += re.escape(template[at:m.start()])
        name, at = m[1], m.end()
        if m[2]: out += "(?:[^/]+/)*"
        elif m[3]: out += "[^/]*"
        elif name == ".": out += _SUFFIX
        elif name in seen: out += f"(?P={name})"
        else: out += f"(?P<{name}>{known.get(name, '[^/]+?')})"
        seen.add(name)
    return re.compile(out + re.escape(template[at:]))

def _names(template: str) -> list[str]:
    "Groups of a template that take part in the key"
    return sorted({m[1] for m in _TOKEN.finditer(template) if m[1] and m[1][0] not in "._"})

def _fixed_folder(template: str) -> str:
    "Folder in which every match of a template lies"
    head = _TOKEN.split(template, maxsplit=1)[0]
    return head.rpartition("/")[0]

def _fill(template: str, groups: Mapping[str, str]) -> str:
    "The template with its groups filled in; what is not known stays a wildcard"
    return _TOKEN.sub(lambda m: groups.get(m[1], "*" if m[1] else m[0]) if m[1] != "." else ".*", template)

# %%
pattern = _pattern("labels/{folder}case_{id}{.}", (("id", r"\d+"),))
paths = "labels/a/case_7.nii.gz", "labels/case_7.mha", "labels/case_x.nii"
[m and m.groupdict() for m in map(pattern.fullmatch, paths)]

# %%
assert _fixed_folder("Mask/**/Case_{id}.nii.gz") == "Mask" and _fixed_folder("{folder}mask.nii.gz") == ""
assert _fill("images/{id}_{channel}{.}", {"id": "7"}) == "images/7_*.*"
assert _names("{_l}{id}_{channel}{.}") == ["channel", "id"]
assert not _pattern("Mask/{id}.nii.gz", ()).fullmatch("other/Mask/1.nii.gz")

# %% [markdown]
# ## A recipe
# Most recipes are one label template and one image template. The other fields are there because a data set needed
# them: images with several channels, files that a repaired release replaces, cases that are known to be bad, a folder
# with two series of which one is meant. What a reference list did otherwise, and wrongly, stands in `legacy`.

# %%
#| export
class Instead(Config):
    "Files that replace a pair where they exist, such as those of a repaired release"
    label: str # template of the label
    image: str | None = None # template of the image; None: the image stays

class Rule(Config):
    "Where labels are, and which images belong to them"
    labels: tuple[str, ...] # templates of label files
    images: tuple[str, ...] # templates of image files; the first that finds something wins
    without: tuple[str, ...] = () # words that the file name of an image must not hold
    replace: dict[str, str] = {} # changes to the label's groups before images are looked up
    instead: Instead | None = None # files that replace the pair
    channels: str = "" # group that numbers the channels of an image
    several: Literal["first", "none"] = "first" # several images fit: take the first in order, or none
    section: Literal["training", "testing"] = "training" # "testing": the data set comes with a labelled test set

class Override(Config):
    "A case that does not follow the rule"
    when: dict[str, str] # exact values of groups, or of 'subject'
    label: str | None = None # template of its label
    image: str | None = None # template of its image

class Legacy(Config):
    "What the reference's list has, where this recipe corrects it"
    note: str = "" # in words
    label_dict: dict[int, str] | None = None # its label dictionary
    original_label_dict: dict[int, str] | None = None # likewise; None: the same as `label_dict`
    rename: dict[int, str] = {} # its names of single classes
    several: Literal["first", "none"] | None = None # replaces `several` of all rules

# %%
#| export
class Recipe(Config):
    "What the folders of a data set look like, and what its labels mean"
    name: str # data set name, also that of its list
    modality: str = "" # such as CT, MR or PET-CT
    generic: bool = False # a layout, not a data set; lists are named after the folder
    roots: tuple[str, ...] = () # what the data set's folder is called, for recipe="auto"
    groups: dict[str, str] = {} # regular expressions of groups; default: anything within one name
    cases: tuple[Rule, ...] # rules, the first that matches a label wins
    table: str = "" # read cases from a CSV file of this name instead
    order: Literal["path", "name", "rules"] = "path" # sort by path, by file name, or by rule and then path
    keep: dict[str, tuple[int, int]] = {} # group -> first and last number that is kept
    exclude: dict[str, tuple[str, ...]] = {} # group or 'subject' -> exact values that are left out
    exclude_images: tuple[str, ...] = () # templates of images that are left out
    overrides: tuple[Override, ...] = () # single cases
    subject: str = "" # regular expression for the patient or animal in a relative path
    label_dict: dict[int, str] # local id -> class name, unified wording
    original_label_dict: dict[int, str] = {} # local id -> own wording of the data set; empty: the same
    names_from: str = "" # 'file.json#/key': read class names from there; 'masks': names of mask files
    same_images_as: tuple[str, ...] = () # data sets that hold the same scans: never test on them
    licence: str = "" # of the data, where it is certain
    notes: str = "" # for whoever makes the list
    legacy: Legacy = Field(default_factory=Legacy) # what upstream's list has instead

    def pattern(self, template: str) -> re.Pattern:
        "Regular expression of a template"
        return _pattern(template, tuple(self.groups.items()))

    def subject_of(self, path: str) -> str | None:
        "Patient or animal named in a relative path"
        m = re.search(self.subject, path) if self.subject else None
        return m and (m[1] if m.re.groups else m[0])

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        "All templates compile, and every group of an image occurs in its label"
        try: re.compile(self.subject)
        except re.error as e: raise ValueError(f"subject {self.subject!r}: {e}") from None
        for t in (t for rule in self.cases for t in (*rule.labels, *rule.images)):
            try: self.pattern(t)
            except re.error as e: raise ValueError(f"template {t!r}: {e}") from None
        for rule in self.cases:
            for image in rule.images:
                for label in rule.labels:
                    lost = set(_names(image)) - set(_names(label)) - {rule.channels}
                    if lost: raise ValueError(f"image template {image!r}: group {min(lost)!r} is not in {label!r}")
        return self

# %%
parts = [f"AbdomenCT-1K-ImagePart{k}/Case_{{id}}_0000.nii.gz" for k in (1, 2, 3)]
small = Recipe(name="lost", groups={"id": r"\d+"}, label_dict={1: "liver"},
               cases=[{"labels": ["Mask/**/Case_{id}.nii.gz"], "images": parts}])
small.cases[0].images, small.subject_of("x")

# %%
with raises(ValueError, match="group 'scan' is not in 'l/{id}.nii'"):
    Recipe(name="x", label_dict={}, cases=[{"labels": ["l/{id}.nii"], "images": ["i/{scan}.nii"]}])
with raises(ValueError, match="template"): Recipe(name="x", label_dict={}, groups={"id": "("}, cases=[
    {"labels": ["l/{id}.nii"], "images": ["i/{id}.nii"]}])

# %% [markdown]
# ## Listing a folder once
# All rules look at one listing. Hidden files (such as the `._` files that some archives are full of) are left out. A
# folder that is one volume, a zarr store or a DICOM series, counts as a file. Symbolic links that leave the data set's
# folder are not followed but reported: whoever opens the list elsewhere would be refused there.

# %%
#| export
class _Tree:
    "Sorted relative paths below a folder, each part of it listed once"
    def __init__(self, root: str | os.PathLike):
        self.root, self._lists, self.odd, self.mask_folders = Path(root), {}, {}, set()
        if not self.root.is_dir(): raise MissingFile(f"{root} is not a folder. Name the folder that holds the data set")
        self.top = os.path.realpath(root)

    def below(self, folder: str) -> list[str]:
        "Files in `folder` and in all folders below it"
        for known, found in self._lists.items():
            if known in ("", folder) or folder.startswith(known + "/"):
                return found[bisect_left(found, folder + "/"):bisect_left(found, folder + "0")] if folder else found
        self._lists[folder] = sorted(self._walk(folder))
        return self._lists[folder]

    def _walk(self, start: str) -> Iterator[str]:
        todo = [start]
        while todo:
            here = todo.pop()
            lead, volumes = here + "/" if here else "", 0
            try: entries = list(os.scandir(self.root/here))
            except FileNotFoundError: continue
            except OSError as e:
                self.odd[here] = f"cannot be read ({e.strerror})"
                continue
            for e in entries:
                path = lead + e.name
                if e.name.startswith(".") or self._is_odd(path, e): continue
                is_store = e.name.lower().endswith(".zarr")
                if e.is_dir() and not is_store: todo.append(path)
                elif not e.name.lower().endswith(".dcm"):
                    volumes += 1
                    yield path
            if here and volumes < len(entries) and any(e.name.lower().endswith(".dcm") for e in entries): yield lead
            if volumes and here.rpartition("/")[2] == "segmentations":
                self.mask_folders.add(lead)
                yield lead

    def _is_odd(self, path: str, entry: os.DirEntry) -> bool:
        "A name that a list may not hold, or a link that is not followed; remembered with the reason"
        if entry.is_symlink():
            if entry.is_dir(): self.odd[path] = "symbolic link to a folder, not followed"
            elif os.path.commonpath([self.top, os.path.realpath(entry.path)]) != self.top:
                self.odd[path] = "symbolic link that leaves the folder"
        if not path.isprintable() or "\\" in path or ":" in path or path[0] == "~":
            try: inside(self.root, path)
            except DataError as e: self.odd[path] = str(e).split(": ", 1)[1].split(". Names")[0]
        return path in self.odd

    def paths(self, template: str) -> list[str]:
        "Candidates for a template: folders of masks if it ends with a slash, else files"
        found = self.below(_fixed_folder(template))
        if template.endswith("/"): return [p for p in found if p in self.mask_folders]
        return [p for p in found if p not in self.mask_folders] if self.mask_folders else found

    def has(self, path: str) -> bool:
        "There is such a file, or a folder that stands for one"
        return path not in self.odd and os.path.exists(self.root/path)

# %% [markdown]
# ## What a scan finds
# A scan returns everything it saw: pairs, labels without an image, images without a label, labels that several images
# fit, and what was left out, with the reason. Nothing is printed and nothing is raised, as a data set with three
# missing files is the normal case.

# %%
#| export
@dataclass(frozen=True)
class Pair:
    "One case"
    image: str | tuple[str, ...] # relative path, or one path a channel
    label: str | None # relative path; None: not labelled
    case: str # what the key of the pair is, for messages
    subject: str | None = None # patient or animal
    section: Literal["training", "testing"] = "training" # "testing" if the data set itself says so
    fields: Mapping = field(default_factory=dict) # further fields of the item

    def item(self) -> dict:
        "The item of a data list"
        image = self.image if isinstance(self.image, str) else list(self.image)
        return {"image": image} | ({"label": self.label} if self.label else {}) | dict(self.fields)

class Missing(NamedTuple):
    "A label without an image"
    label: str # relative path
    expected: tuple[str, ...] # where its image was looked for

class Ambiguous(NamedTuple):
    "A label that several images fit, or an image that several labels claim"
    label: str # relative path
    images: tuple[str, ...] # what fits
    chosen: str | None # the one that was taken, by a rule of the recipe
    why: str # in words

class Excluded(NamedTuple):
    "A file that was left out"
    path: str # relative path
    why: str # in words

@dataclass(frozen=True)
class ScanResult:
    "All that was found in the folder of a data set"
    recipe: str # name of the recipe
    pairs: tuple[Pair, ...] = () # cases with image and label, in the recipe's order
    missing_images: tuple[Missing, ...] = () # labels without an image
    missing_labels: tuple[Pair, ...] = () # images without a label
    ambiguous: tuple[Ambiguous, ...] = () # reported even where the recipe chooses
    excluded: tuple[Excluded, ...] = () # left out on purpose

    def counts(self) -> dict[str, int]:
        "How many of each"
        return {k: len(getattr(self, k)) for k in self.__dataclass_fields__ if k != "recipe"}

# %% [markdown]
# The first half of a scan finds the labels and sorts them. The order is part of the recipe, because the split of the
# published lists depends on it: by relative path, except for one data set whose files were redirected after sorting,
# and one whose two folders are taken in the order of their release.

# %%
#| export
class _Label(NamedTuple):
    path: str
    rule: Rule
    place: tuple[int, int] # numbers of the rule and of its template
    groups: dict[str, str]

def _labels(recipe: Recipe, tree: _Tree) -> list[_Label]:
    "Label files in the recipe's order, each claimed by the first rule that matches it"
    found: dict[str, _Label] = {}
    for r, rule in enumerate(recipe.cases):
        for t, template in enumerate(rule.labels):
            pattern = recipe.pattern(template)
            for path in tree.paths(template):
                if path not in found and (m := pattern.fullmatch(path)):
                    found[path] = _Label(path, rule, (r, t), m.groupdict(""))
    keys = {"path": lambda l: l.path, "name": lambda l: (l.path.rpartition("/")[2], l.path),
            "rules": lambda l: (l.place, l.path)}
    return sorted(found.values(), key=keys[recipe.order])

def _refused(recipe: Recipe, groups: Mapping[str, str], path: str) -> str:
    "Why a case is left out; empty if it is not"
    values = {**groups, "subject": recipe.subject_of(path)}
    for name, bad in recipe.exclude.items():
        if values.get(name) in bad: return f"{name} {values[name]!r} is excluded by the recipe"
    for name, (low, high) in recipe.keep.items():
        if (v := values.get(name)) and not (v.isdecimal() and low <= int(v) <= high):
            return f"{name} {v!r} is not between {low} and {high}"
    return ""

# %% [markdown]
# The second half indexes the images by key, and asks the index. An image template with a wildcard can give several
# hits for a key; a template with channels gives one hit of several files.

# %%
#| export
class _Index(NamedTuple):
    names: list[str] # groups of the key
    hits: dict[tuple, list[tuple[str, ...]]] # key -> files of each image that fits
    width: int # channels of a whole image

def _index(recipe: Recipe, rule: Rule, template: str, tree: _Tree, labels: Mapping) -> _Index:
    "Image files by key"
    pattern, names = recipe.pattern(template), [n for n in _names(template) if n != rule.channels]
    banned = [recipe.pattern(t) for t in recipe.exclude_images]
    found: dict[tuple, dict[str, list[str]]] = {}
    channels: set[str] = set()
    for path in tree.paths(template):
        if path in labels or not (m := pattern.fullmatch(path)): continue
        name = path.rpartition("/")[2]
        if any(w in name for w in rule.without) or any(b.fullmatch(path) for b in banned): continue
        variant = path
        if rule.channels:
            channels.add(m[rule.channels])
            variant = path[:m.start(rule.channels)] + path[m.end(rule.channels):]
        found.setdefault(tuple(m[n] or "" for n in names), {}).setdefault(variant, []).append(path)
    return _Index(names, {k: [tuple(v) for v in d.values()] for k, d in found.items()}, max(1, len(channels)))

def _candidates(recipe: Recipe, label: _Label, indices: Sequence[_Index], tree: _Tree) -> tuple[str, list, tuple]:
    "Path of the label, images that fit by preference, and all files that count as spoken for"
    groups, rule = label.groups, label.rule
    changed = {k: _replaced(v, rule.replace) for k, v in groups.items()}
    found = (h for i in indices for h in i.hits.get(tuple(changed.get(n, "") for n in i.names), []))
    hits = list(dict.fromkeys(found))
    spoken = tuple(p for h in hits for p in h)
    own, image = label.path, None
    if rule.instead and tree.has(_fill(rule.instead.label, groups)):
        own, image = _fill(rule.instead.label, groups), rule.instead.image
    values = {**groups, "subject": recipe.subject_of(label.path)}
    for o in recipe.overrides:
        if all(values.get(k) == v for k, v in o.when.items()):
            own, image = _fill(o.label, groups) if o.label else own, o.image or image
    if image is not None: hits = [(p,) for p in [_fill(image, groups)] if tree.has(p)]
    return own, hits, spoken

def _replaced(text: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items(): text = text.replace(old, new)
    return text

# %%
#| export
def _shown(paths: Sequence[str]) -> str | tuple[str, ...]:
    "One path as a string, several channels as a tuple; the slash that marks a folder is dropped"
    paths = tuple(p.rstrip("/") for p in paths)
    return paths[0] if len(paths) == 1 else paths

def _case(label: _Label) -> str:
    parts = [v.strip("/") for k, v in label.groups.items() if k[0] != "_"]
    return " ".join(filter(None, parts)) or label.path

def _paired(recipe: Recipe, tree: _Tree, labels: list[_Label], indices: Mapping, legacy: bool) -> tuple:
    "Pairs, missing images, ambiguous labels, exclusions, and the files that are spoken for"
    pairs, missing, ambiguous, excluded, spoken, used = [], [], [], [], set(), {}
    for l in labels:
        own, hits, claimed = _candidates(recipe, l, indices[l.place[0]], tree)
        spoken.update(claimed, [own, l.path], *hits)
        width = max((i.width for i in indices[l.place[0]]), default=1)
        if why := _refused(recipe, l.groups, l.path): excluded.append(Excluded(l.path, why)); continue
        if not tree.has(own): excluded.append(Excluded(l.path, f"{own}, which replaces it, does not exist")); continue
        whole = [h for h in hits if len(h) == width]
        if not whole:
            short = tuple(f"{h[0]} and {width - len(h)} more channels" for h in hits)
            missing.append(Missing(own.rstrip("/"), short or tuple(_fill(t, l.groups) for t in l.rule.images)))
            continue
        image, flat = _shown(whole[0]), tuple(p.rstrip("/") for h in whole for p in h)
        if (other := used.get(image)) and not legacy:
            ambiguous.append(Ambiguous(own, flat, None, f"the image already belongs to {other}"))
            continue
        first = l.rule.several == "first"
        if len(whole) > 1:
            told = image if isinstance(image, str) else image[0]
            ambiguous.append(Ambiguous(own, flat, told if first else None, f"{len(whole)} images fit"))
            if not first: continue
        used[image] = own
        pairs.append(Pair(image, own.rstrip("/"), _case(l), recipe.subject_of(l.path), l.rule.section))
    return pairs, missing, ambiguous, excluded, spoken

# %% [markdown]
# What no label has spoken for is an image without a label. Files in a label folder that fit no template are worth a
# word, too: a copy called `Case_1 (2).nii.gz` is not a case, and neither should it disappear in silence.

# %%
#| export
def _unlabelled(recipe: Recipe, tree: _Tree, indices: Mapping, spoken: set[str]) -> list[Pair]:
    "Images that no label has claimed"
    out: dict[str | tuple, Pair] = {}
    for r, rule in enumerate(recipe.cases):
        for i in indices[r]:
            for key, hits in i.hits.items():
                for h in hits:
                    if spoken.intersection(h) or _refused(recipe, dict(zip(i.names, key)), h[0]): continue
                    image = _shown(h)
                    out.setdefault(image, Pair(image, None, " ".join(filter(None, key)) or h[0],
                                               recipe.subject_of(h[0]), rule.section))
    return [out[k] for k in sorted(out, key=str)]

def _strays(recipe: Recipe, tree: _Tree, known: set[str]) -> Iterator[Excluded]:
    "Files of the right kind in a folder of labels, whose names fit no template"
    seen: set[str] = set()
    for template in (t for rule in recipe.cases for t in rule.labels):
        folder, tail = _fixed_folder(template), _TOKEN.split(template)[-1]
        if not folder: continue
        for p in tree.paths(template):
            fits = p.endswith(tail) if tail else bool(re.search(_SUFFIX + "$", p))
            if fits and p not in known and p not in seen:
                seen.add(p)
                yield Excluded(p, f"its name does not fit {template!r}")

def _as_legacy(recipe: Recipe) -> Recipe:
    "The recipe as the reference has it"
    old, change = recipe.legacy, {}
    if old.label_dict is not None:
        change = {"label_dict": old.label_dict, "original_label_dict": old.original_label_dict or {}}
    if old.rename: change["label_dict"] = {k: old.rename.get(k, n) for k, n in recipe.label_dict.items()}
    if old.several: change["cases"] = tuple(r.model_copy(update={"several": old.several}) for r in recipe.cases)
    return recipe.model_copy(update=change)

def _scan(recipe: Recipe, tree: _Tree, legacy: bool = False) -> ScanResult:
    "All steps of a scan on one listing"
    labels = _labels(recipe, tree)
    every = {l.path: l for l in labels}
    indices = {r: [_index(recipe, rule, t, tree, every) for t in rule.images] for r, rule in enumerate(recipe.cases)}
    pairs, missing, ambiguous, excluded, spoken = _paired(recipe, tree, labels, indices, legacy)
    images = (h for found in indices.values() for i in found for hits in i.hits.values() for h in hits)
    known = spoken.union(*images)
    excluded += [*_strays(recipe, tree, known), *(Excluded(p, why) for p, why in sorted(tree.odd.items()))]
    return ScanResult(recipe.name, tuple(pairs), tuple(missing), tuple(_unlabelled(recipe, tree, indices, spoken)),
                      tuple(ambiguous), tuple(excluded))

# %%
#| export
def find_cases(
    recipe: Recipe, # what to look for; not a table
    root: str | os.PathLike, # folder of the data set
    *,
    legacy: bool = False, # True: choose as the reference's lists did, where the recipe corrects it
) -> ScanResult: # pairs, and all that could not be paired
    "Find the cases of a data set, pairing by key; whatever is wrong is part of the result"
    return _scan(_as_legacy(recipe) if legacy else recipe, _Tree(root), legacy)

# %% [markdown]
# The twelve labels from above: eleven correct pairs, and one entry that says what is missing and where it was looked
# for.

# %%
with tmpdir() as d: found = find_cases(small, lost_image(d))
found.counts(), found.missing_images

# %%
assert len(found.pairs) == 11 and all(p.image[-17:-12] == p.label[-12:-7] == p.case for p in found.pairs)
assert [m.label for m in found.missing_images] == ["Mask/Case_00004.nii.gz"]

# %% [markdown]
# A kidney data set keeps each case in its own folder: the mask, and the scan under whatever name it had. The rule is
# "the first other file without *seg* or *mask* in its name". It is a guess that the recipe makes openly, so a folder
# with two scans gives a pair *and* an entry in `ambiguous`. Folder names play no part in it: `mask_study` below does no
# harm.

# %%
each = Recipe(name="C4KC-KiTS", subject=r"KiTS-(\d+)", label_dict={1: "kidney"},
              cases=[{"labels": ["{folder}mask.nii.gz"], "images": ["{folder}*.nii.gz"], "without": ["seg", "mask"]}])
names = """KiTS-00001/mask KiTS-00001/2_arterial KiTS-00001/._mask KiTS-00002/mask KiTS-00002/3_arterial
    KiTS-00002/5_late mask_study/mask mask_study/1_arterial KiTS-00009/7_arterial KiTS-00010/mask""".split()
with tmpdir() as d: kidneys = find_cases(each, touch(d, *(f"{n}.nii.gz" for n in names)))
[(p.image, p.subject) for p in kidneys.pairs], kidneys.ambiguous, kidneys.missing_images, kidneys.missing_labels

# %%
assert kidneys.counts() == {"pairs": 3, "missing_images": 1, "missing_labels": 1, "ambiguous": 1, "excluded": 0}
