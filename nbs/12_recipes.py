# %% [markdown]
# # Recipes
#
# > From folders to a data list: 42 data sets and the usual layouts, written down as data, and one command for all.
#
# The page before pairs images with labels by a recipe. Here are the recipes: those of the 42 data sets that the VISTA3D
# project lists, and those of the usual layouts (nnU-Net, Medical Segmentation Decathlon, BIDS, TotalSegmentator, two
# parallel folders, files side by side, tables). A recipe is a short YAML file. What is special about a data set stands
# in it and nowhere else: which cases are known to be bad, where the patient's number is, which other data set holds the
# same scans. `make_datalists` turns a folder and a recipe into a data list with a test set and folds.

# %%
#| default_exp recipes

# %%
#| export
import difflib
import fnmatch
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np

from medvol_nb.config import Config, check_config, parse_settings
from medvol_nb.core import (ConfigError, DataError, FormatError, OnExists, OutputExists, _read_text, check_output,
                            fingerprint, inside, read_csv, read_json)
from medvol_nb.datalists import DataList, dataset_name_of, with_provenance, write_datalist
from medvol_nb.pairing import (Ambiguous, Excluded, Legacy, Missing, Override, Pair, Recipe, Rule, # noqa: F401
                               ScanResult, _as_legacy, _scan, _Tree, find_cases)
from medvol_nb.parallel import on_cluster, pmap
from medvol_nb.splits import assign, group_keys
from medvol_nb.volume import read_volume, stem_of

_all_ = ["Ambiguous", "Excluded", "Legacy", "Missing", "Override", "Pair", "Recipe", "Rule", "ScanResult"]

# %%
import json

import matplotlib.pyplot as plt
import pandas as pd

from medvol_nb import phantoms
from medvol_nb.core import raises, tmpdir
from medvol_nb.datalists import read_datalist
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.splits import legacy_split
from medvol_nb.volume import write_volume

def touch(root, *names):
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        (root/n).touch()
    return root

# %% [markdown]
# ## The shipped recipes
# One file a family of data sets. `load_recipe` takes a name, or the path of a file of one's own; mistakes in it are
# reported like those in any settings file, with their line and a suggestion.

# %%
#| export
class _Family(Config):
    recipes: tuple[Recipe, ...]

def _parse(text: str, where: str) -> tuple[Recipe, ...]:
    data, lines = parse_settings(text, where)
    if isinstance(data, dict) and "recipes" in data: return check_config(_Family, data, where, lines=lines).recipes
    return (check_config(Recipe, data, where, lines=lines),)

@lru_cache(1)
def _shipped() -> dict[str, Recipe]:
    folder = files("medvol_nb")/"resources"/"recipes"
    found = [r for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".yaml")
             for r in _parse(f.read_text(encoding="utf-8"), f.name)]
    return {r.name: r for r in sorted(found, key=lambda r: (r.generic, "" if r.generic else r.name.casefold()))}

def recipe_names(
    generic: bool | None = None, # True: only layouts, False: only data sets, None: both
) -> list[str]: # names for `load_recipe`; data sets first
    "Names of the shipped recipes; layouts come in the order in which they are tried"
    return [n for n, r in _shipped().items() if generic is None or r.generic == generic]

def load_recipe(
    name: str | os.PathLike, # name of a shipped recipe, or a YAML or JSON file
) -> Recipe: # checked
    "Get a recipe by name or from a file"
    shipped, text = _shipped(), os.fspath(name)
    if text in shipped: return shipped[text]
    if text.endswith((".yaml", ".yml", ".json")):
        found = _parse(_read_text(text, 2**24), text)
        if len(found) != 1: raise ConfigError(f"{text}: holds {len(found)} recipes, give a file with one")
        return found[0]
    same = [n for n in shipped if n.casefold() == text.casefold()]
    if len(same) == 1: return shipped[same[0]]
    near = same or difflib.get_close_matches(text, shipped, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ConfigError(f"no recipe {text!r}: {hint}`recipe_names()` lists {len(shipped)}; or give a .yaml file")

# %%
len(recipe_names(generic=False)), recipe_names(generic=True)

# %%
rows = [load_recipe(n) for n in recipe_names(generic=False)]
pd.DataFrame([{"data set": r.name, "modality": r.modality, "classes": len(set(r.label_dict.values())),
               "label": r.cases[0].labels[0], "subject": r.subject, "same images as": ", ".join(r.same_images_as)}
              for r in rows]).style.hide(axis="index")

# %%
with raises(ConfigError, match="did you mean 'AMOS22'"): load_recipe("AMOS2")
with tmpdir() as d:
    (d/"m.yaml").write_text("name: mine\nlabel_dict: {1: liver}\ncases:\n  - labels: ['l/{id}{.}']\n    image: []\n")
    with raises(ConfigError, match=r"cases.0.image \(line 5\): unknown key, did you mean 'images'"):
        load_recipe(d/"m.yaml")

# %% [markdown]
# The recipe of a data set whose headers were repaired later. Where there is a repaired pair it replaces the original;
# four cases are left out; the order is that of the file names, as in the published list.

# %%
print((files("medvol_nb")/"resources"/"recipes"/"ct_org.yaml").read_text())

# %% [markdown]
# ## Scanning
# `scan` takes a recipe or its name. Nothing that is missing, doubled or left out stops it.

# %%
#| export
def scan(
    recipe: Recipe | str | os.PathLike, # recipe, its name, or its file
    root: str | os.PathLike, # folder of the data set; for tables also the table
    *,
    legacy: bool = False, # True: choose as the reference's lists did, where the recipe corrects it
) -> ScanResult: # pairs, and all that could not be paired
    "Find the cases of a data set by name; whatever is wrong is part of the result"
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return _scan_table(recipe, root) if recipe.table else find_cases(recipe, root, legacy=legacy)

# %%
ids = [*range(1, 8), 19]
with tmpdir() as d:
    touch(d, "OrganSegmentations/labels-7 (copy).nii.gz", *(f"fixed_affine/{n}-3.nii.gz" for n in ("labels", "volume")),
          *(f"OrganSegmentations/{n}-{k}.nii.gz" for k in ids for n in ("labels", "volume")[:1 + (k != 5)]))
    ct_org = scan("CT-ORG", d)
[p.image for p in ct_org.pairs], ct_org.missing_images, ct_org.excluded

# %%
assert ct_org.counts() == {"pairs": 6, "missing_images": 1, "missing_labels": 0, "ambiguous": 0, "excluded": 2}
assert ct_org.pairs[2].item() == {"image": "fixed_affine/volume-3.nii.gz", "label": "fixed_affine/labels-3.nii.gz"}

# %% [markdown]
# Two studies of one patient fit an atlas label, and nothing tells which one it was drawn on. The recipe takes neither
# and says so; the reference took the first, and so does `legacy`.

# %%
with tmpdir() as d:
    touch(d, "AutoPET-Atlas/atlas_0a1_1.nii.gz", "AutoPET-Atlas/atlas_0a2_1.nii.gz",
          *(f"Autopet23/FDG-PET-CT-Lesions/PETCT_{study}/CT.nii.gz" for study in ("0a1/x", "0a2/x", "0a2/y")))
    careful, literal = (scan("AutoPET-Atlas", d, legacy=l) for l in (False, True))
careful.ambiguous, len(careful.pairs), len(literal.pairs)

# %%
assert (len(careful.pairs), len(literal.pairs), careful.ambiguous[0].chosen) == (1, 2, None)

# %% [markdown]
# ## Tables
# A CSV file is a recipe, too: the pairs are written down. Paths are relative to the folder of the table.

# %%
#| export
_COLUMNS = {"patient": "subject", "group": "subject", "split": "section"}
_SECTION = {"": "training", "train": "training", "training": "training", "test": "testing", "testing": "testing"}

def _table_in(root: str | os.PathLike, name: str) -> Path:
    "The table that `root` is or holds"
    if Path(root).is_file(): return Path(root)
    found = [p for p in sorted(_Tree(root).root.iterdir()) if p.is_file() and fnmatch.fnmatch(p.name, name)]
    if len(found) == 1: return found[0]
    raise DataError(f"{root}: {len(found)} files {name} where one is needed. Name the table itself, not its folder")

def _row(row: Mapping[str, str], where: str) -> tuple[Pair, list[str]]:
    "A case from one row, and what is wrong with it"
    row = {_COLUMNS.get(k, k): v.strip() for k, v in row.items() if v.strip()}
    fold, section, problems = row.get("fold", ""), _SECTION.get(row.get("section", "").lower()), []
    if "image" not in row: problems.append(f"{where}: no image")
    if fold and not fold.isdecimal(): problems.append(f"{where}: fold must be a whole number from 0, got {fold!r}")
    if section is None: problems.append(f"{where}: section must be training or testing, got {row['section']!r}")
    fields = {k: v for k, v in row.items() if k not in ("image", "label", "section", "fold")}
    if fold.isdecimal(): fields = {"fold": int(fold), **fields}
    image, label, subject = row.get("image", ""), row.get("label"), row.get("subject")
    return Pair(image, label, where, subject, section or "training", fields), problems

def _scan_table(recipe: Recipe, root: str | os.PathLike) -> ScanResult:
    "Cases of a table, each checked for its files"
    path = _table_in(root, recipe.table)
    rows = [_row(r, f"row {n}") for n, r in enumerate(read_csv(path, ["image"]), 2)]
    if problems := [p for _, found in rows for p in found]:
        raise FormatError(f"{len(problems)} problems in {path}: {'; '.join(problems[:20])}")
    pairs, missing, unlabelled, excluded, seen = [], [], [], [], {}
    for p, _ in rows:
        try: there = [inside(path.parent, n).exists() for n in filter(None, (p.image, p.label))]
        except DataError as e: why = str(e).split(". Names")[0]
        else: why = f"{p.case} repeats the image of {seen[p.image]}" if p.image in seen else ""
        seen.setdefault(p.image, p.case)
        if why: excluded.append(Excluded(p.image, why))
        elif not there[0]: missing.append(Missing(p.label or p.image, (p.image,)))
        elif not all(there): excluded.append(Excluded(p.image, f"{p.case}: label {p.label} does not exist"))
        else: (pairs if p.label else unlabelled).append(p)
    return ScanResult(recipe.name, tuple(pairs), tuple(missing), tuple(unlabelled), (), tuple(excluded))

# %%
with tmpdir() as d:
    touch(d, "i/1.nii.gz", "i/2.nii.gz", "l/1.nii.gz")
    (d/"cases.csv").write_text("image,label,patient,site,fold\ni/1.nii.gz,l/1.nii.gz,p1,B,0\ni/2.nii.gz,,p2,A,\n../x.nii,,,,\n")
    table = scan("csv", d)
    (d/"cases.csv").write_text("image,fold\ni/1.nii.gz,a\n,1\n")
    with raises(FormatError, match="2 problems .*row 2: fold must be a whole number from 0, got 'a'; row 3: no image"):
        scan("csv", d)
table.pairs[0].item(), table.missing_labels[0].item(), table.excluded

# %%
assert table.counts() == {"pairs": 1, "missing_images": 0, "missing_labels": 1, "ambiguous": 0, "excluded": 1}

# %% [markdown]
# ## Which layout is this?
# `recipe="auto"` tries the shipped data sets whose folder name it recognises, then the layouts, and says what it chose
# and why. A data set is never guessed from its files alone: every folder with `ct.nii.gz` and `seg.nii.gz` would
# become TotalSegmentator, with 117 class names that are not its own.

# %%
#| export
def _is_called(root: Path, names: Sequence[str]) -> str:
    "The one of `names` that the folder's path ends with; empty if none does"
    parts = [p.casefold() for p in Path(os.path.realpath(root)).parts]
    return next((n for n in names if parts[-len(n.split("/")):] == n.casefold().split("/")), "")

def detect_recipe(
    root: str | os.PathLike, # folder of a data set, or a table
) -> tuple[Recipe, str]: # the recipe, and why
    "Find the recipe that fits a folder"
    if Path(root).is_file() and str(root).endswith(".csv"): return load_recipe("csv"), "it is a table"
    tree, tried = _Tree(root), []
    for generic in (False, True):
        for r in (_shipped()[n] for n in recipe_names(generic)):
            called = _is_called(tree.root, r.roots)
            if r.table or not (called or generic): continue
            c = _scan(r, tree).counts()
            labels = c["pairs"] + c["missing_images"] + c["ambiguous"]
            why = f"{c['pairs']} of {labels} labels that look like {r.cases[0].labels[0]!r} have their image"
            if c["pairs"]: tried.append((2*c["pairs"] >= labels, generic, c["pairs"], r, why + (
                f", and the folder is called {called!r}" if called else "")))
        if best := [t for t in tried if t[0]]: break
    else: best = tried
    tables = sorted(p.name for p in tree.root.glob("*.csv"))
    if not best and len(tables) == 1: return load_recipe("csv"), f"no layout fits, and there is a table {tables[0]!r}"
    if not best:
        kinds = Counter(os.path.splitext(p)[1] for p in tree.below("")).most_common(4)
        raise DataError(f"{root}: none of the layouts {', '.join(recipe_names(True))} fits; it holds "
                        f"{', '.join(f'{n} files {k}' for k, n in kinds) or 'no files'}. Write a recipe, or a table")
    chosen = best[0] if best[0][1] else max(best, key=lambda t: t[2])
    also = [t[3].name for t in best if t is not chosen and not t[1]]
    return chosen[3], chosen[4] + (f" (also possible: {', '.join(also)})" if also else "")

# %%
LAYOUTS = {
    "nnunet": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"],
    "msd": ["imagesTr/liver_1.nii.gz", "labelsTr/liver_1.nii.gz", "imagesTs/liver_9.nii.gz"],
    "totalsegmentator": ["s0001/ct.nii.gz", "s0001/segmentations/liver.nii.gz", "s0001/segmentations/spleen.nii.gz"],
    "bids": ["sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz",
             "derivatives/manual/sub-01/anat/sub-01_T2w_label-lesion_dseg.nii.gz"],
    "folders": ["images/img1.mha", "masks/1_mask.nii.gz"],
    "beside": ["a/p1_ct.nrrd", "a/p1_seg.nrrd"],
}
seen = []
for layout, names in LAYOUTS.items():
    with tmpdir() as d:
        chosen, why = detect_recipe(touch(d, *names))
        seen.append((chosen.name, *scan(chosen, d).pairs[0].item().values()))
    assert chosen.name == layout
seen

# %%
with tmpdir() as d, raises(DataError, match="none of the layouts nnunet"): detect_recipe(touch(d, "notes.txt"))
with tmpdir() as d:
    touch(d/"Task09_Spleen", "labelsTr/spleen_2.nii.gz", "imagesTr/spleen_2.nii.gz")
    chosen, why = detect_recipe(d/"Task09_Spleen")
chosen.name, why

# %% [markdown]
# ## Names of classes
# A data set's recipe knows its classes. For a layout they are read from where the layout keeps them: the `labels` of
# `dataset.json` (which the three dialects write in both directions), or the names of the mask files. TotalSegmentator
# writes `kidney_left` where most others say *left kidney*; the unified wording follows the majority.

# %%
#| export
def worded(
    name: str, # such as 'rib_left_3'
) -> str: # such as 'left rib 3'
    "Class name in unified wording: blanks for underscores, the side in front"
    if name == "urinary_bladder": return "bladder"
    parts = name.split("_")
    side = [p for p in parts if p in ("left", "right")]
    return " ".join([*side[:1], *(p for p in parts if p not in side[:1])])

def _named_in(root: Path, source: str) -> dict[int, str]:
    "Class names from 'file.json#/key', where ids are keys or values"
    name, _, key = source.partition("#/")
    if not (root/name).is_file(): return {}
    found = read_json(root/name)
    found = found.get(key, {}) if isinstance(found, dict) else {}
    if not isinstance(found, dict): raise FormatError(f"{root/name}, /{key}: an object of ids and names is needed")
    out = {}
    for k, v in found.items():
        number, text = (k, v) if isinstance(v, str) and k.isdecimal() else (v, k)
        if isinstance(number, (int, str)) and str(number).isdecimal() and int(number): out[int(number)] = text
    return dict(sorted(out.items()))

def _class_names(recipe: Recipe, root: Path, pairs: Sequence[Pair]) -> tuple[dict[int, str], dict[int, str]]:
    "Unified and original names of a data set's classes"
    known = recipe.label_dict, recipe.original_label_dict or recipe.label_dict
    if known[0] or not recipe.names_from: return known
    if recipe.names_from != "masks": original = _named_in(root, recipe.names_from)
    else:
        stems = {stem_of(n) for p in pairs if (root/p.label).is_dir() for n in os.listdir(root/p.label) if n[0] != "."}
        schemes = [_shipped()[n].original_label_dict for n in ("TotalSegmentatorV2", "TotalSegmentator")]
        original = next((k for k in schemes if stems <= set(k.values())), dict(enumerate(sorted(stems), 1)))
    return {k: worded(n) for k, n in original.items()}, original

# %%
[worded(n) for n in ("kidney_right", "rib_left_3", "adrenal_gland_left", "urinary_bladder", "vertebrae_L5")]

# %%
for n in ("TotalSegmentator", "TotalSegmentatorV2"):
    r = load_recipe(n)
    assert {k: worded(v) for k, v in r.original_label_dict.items()} == r.label_dict

# %% [markdown]
# ## Making the list
# `make_datalists` joins what the pages before hold: scan, split, write. Whatever was missing, ambiguous or left out is
# returned, and the list says in its provenance which recipe, seed and method made it. Patients with several scans stay
# together, because the recipe knows where the patient's name stands; `legacy=True` makes the reference's list, torn
# patients and wrong class names included, but never its wrong pairs.

# %%
#| export
def _classes_in(path: Path) -> list[int]:
    "Class ids that a label file holds"
    return [int(v) for v in np.unique(read_volume(path).data) if v > 0 and float(v).is_integer()]

def _subjects(pairs: Sequence[Pair], notes: list[str]) -> list[str] | None:
    "Subject of each pair, for the split; None if no case names one"
    if not any(p.subject for p in pairs): return None
    if lost := [_first(p.image) for p in pairs if not p.subject]:
        notes.append(f"{len(lost)} of {len(pairs)} cases name no subject and stand for themselves, first {lost[0]!r}; "
                     "pass group= with a pattern that fits them")
    return [p.subject or f"case {_first(p.image)}" for p in pairs]

def _first(image: str | tuple[str, ...]) -> str: return image if isinstance(image, str) else image[0]

def _given(pairs: Sequence[Pair]) -> list[dict]:
    "Training items whose folds the table gives"
    if lost := [p.case for p in pairs if "fold" not in p.fields]:
        raise DataError(f"{len(lost)} training cases have no fold while others do: {', '.join(lost[:5])}")
    return sorted((p.item() for p in pairs), key=lambda i: i["fold"])

def _divided(
    pairs: Sequence[Pair], root: Path, notes: list[str], group: str | None, alone: bool, workers: int, numbers: dict,
) -> tuple[list[dict], list[dict], int, int]: # training, testing, number of groups, number of folds
    "Divide labelled pairs into folds and test set; what the data set itself gives is kept"
    own, fixed = ([p for p in pairs if p.section == s] for s in ("training", "testing"))
    if any("fold" in p.fields for p in own):
        notes.append("folds were given and are kept")
        training = _given(own)
        return training, [p.item() for p in fixed], 0, training[-1]["fold"] + 1
    if fixed:
        numbers = {**numbers, "test_ratio": 0.0}
        notes.append(f"the data set comes with a test set of {len(fixed)} cases; all others go to folds")
        if shared := {p.subject for p in fixed if p.subject} & {p.subject for p in own}:
            notes.append(f"subjects in training and in the given test set: {', '.join(sorted(shared)[:5])}")
    if not own: return [], [p.item() for p in fixed], 0, 0
    items = [p.item() for p in own]
    groups = group_keys(items, group) if group else None if alone else _subjects(own, notes)
    classes = None
    if numbers["method"] == "stratified":
        classes = pmap(_classes_in, [root/p.label for p in own], workers, keys=[p.label for p in own], desc="classes")
    training, testing = assign(items, groups=groups, classes=classes, **numbers)
    n_groups = len(own) if groups is None else len(set(groups))
    return training, testing + [p.item() for p in fixed], n_groups, numbers["n_folds"]

# %%
#| export
def _notes(recipe: Recipe, legacy: bool) -> list[str]:
    "What somebody who makes this list should know"
    out = [recipe.notes] if recipe.notes else []
    if legacy and recipe.legacy.note: out.append(recipe.legacy.note)
    return out + [f"same scans as {n}: do not train on one and test on the other" for n in recipe.same_images_as]

def _nothing(found: ScanResult, root: str | os.PathLike) -> str:
    "Message for a folder without a single pair"
    labels = [m.label for m in found.missing_images] + [a.label for a in found.ambiguous]
    text = f"{root}: no pair of image and label for recipe {found.recipe!r}"
    if labels: text += f"; {len(labels)} labels without a clear image, first {labels[0]!r}"
    if found.missing_images: text += f" (looked for {', '.join(found.missing_images[0].expected)})"
    if n := len(found.missing_labels): text += f"; {n} images without a label, keep_unlabelled=True takes them"
    for e in found.excluded[:1]: text += f"; {len(found.excluded)} files left out, first {e.path!r}: {e.why}"
    return text + ("" if labels or found.missing_labels or found.excluded else ". Is it the right folder?")

def _listed(found: ScanResult) -> dict[str, list]:
    "What was not paired, as plain values"
    return {"missing_images": [m._asdict() for m in found.missing_images],
            "missing_labels": [_first(p.image) for p in found.missing_labels],
            "ambiguous": [a._asdict() for a in found.ambiguous], "excluded": [e._asdict() for e in found.excluded]}

def _check_place(out: str | os.PathLike, on_exists: OnExists) -> None:
    "Refuse a place that cannot be written before any work is done"
    path = Path(out)
    if path.is_dir(): return
    if path.suffix != ".json" and path.exists():
        raise OutputExists(f"output {out} is a file. Name a folder, or a file that ends in .json")
    check_output(path, on_exists)

def _place(out: str | os.PathLike, name: str | None, own_name: str, n_folds: int) -> tuple[str, Path]:
    "Name of the data set and file of its list"
    path = Path(out)
    name = name or (dataset_name_of(path) if path.suffix == ".json" else own_name)
    if "/" in name or name in ("", ".", ".."): raise ConfigError(f"name {name!r}: it becomes a file name")
    if path.suffix == ".json": return name, path
    return name, path/(f"{name}_{n_folds}_folds.json" if n_folds else f"{name}.json")

# %%
#| export
def make_datalists(
    root: str | os.PathLike, # folder of the data set, or a table
    out: str | os.PathLike, # folder for the list, made if absent, or the .json file itself
    *,
    recipe: str = "auto", # name or file of a recipe; "auto": find out
    name: str | None = None, # name of the data set; default: from the recipe, for layouts from the folder
    method: Literal["legacy", "hash", "stratified"] = "legacy", # how cases are divided
    n_folds: int = 5, # number of folds
    test_ratio: float = 0.2, # share of the test set; unused if the data set comes with one
    seed: int = 20230808, # same seed, same split
    group: str | None = None, # regular expression for the patient in the image's path; default: from the recipe
    keep_unlabelled: bool = False, # add images without a label, without a fold
    legacy: bool = False, # make the reference's list: no grouping, and its class names
    workers: int = 0, # processes that read labels, for method "stratified"; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers read labels instead
    on_exists: OnExists = "error", # what to do when the list is there already
    dry_run: bool = False, # tell what would be written and what would change, write nothing
) -> dict: # path, counts, folds, what is missing, ambiguous or excluded, notes, diff, provenance
    "Make the data list of a data set: find its cases, divide them into test set and folds, write"
    if legacy and (method != "legacy" or group): raise ConfigError("legacy: needs method='legacy' and no group")
    if not dry_run: _check_place(out, on_exists)
    used, why = detect_recipe(root) if recipe == "auto" else (load_recipe(recipe), "it was asked for")
    used = _as_legacy(used) if legacy else used
    found, folder = scan(used, root, legacy=legacy), Path(root).parent if Path(root).is_file() else Path(root)
    lonely = [p for p in found.missing_labels if keep_unlabelled]
    if not found.pairs and not lonely: raise DataError(_nothing(found, root))
    numbers = {"method": method, "n_folds": n_folds, "test_ratio": test_ratio, "seed": seed}
    notes = _notes(used, legacy)
    with on_cluster(dask):
        training, testing, n_groups, n = _divided(found.pairs, folder, notes, group, legacy, workers, numbers)
    for p in lonely: (training if p.section == "training" else testing).append(p.item())
    names, original = _class_names(used, folder, found.pairs)
    if not names: notes.append("no class names are known; write them into the list's label_dict")
    own_name = Path(os.path.realpath(folder)).name if used.generic else used.name
    name, path = _place(out, name, own_name, n)
    dl = with_provenance(DataList(name, tuple(training), tuple(testing), names, original), recipe=used.name,
                         recipe_fingerprint=fingerprint(used), legacy=legacy, **numbers, n_groups=n_groups,
                         scan=found.counts())
    if not dry_run: path.parent.mkdir(exist_ok=True)
    diff = write_datalist(dl, path, on_exists, dry_run=dry_run)
    counts = {**found.counts(), "training": len(training), "testing": len(testing), "groups": n_groups}
    return {"name": name, "recipe": used.name, "why": why, "path": diff.pop("path"), "written": diff.pop("written"),
            "counts": counts, "folds": {str(f): k for f, k in dl.folds().items()}, "notes": notes, **_listed(found),
            "diff": diff, "provenance": dl.extra["provenance"]}

# %% [markdown]
# A small data set of phantoms, in the layout of nnU-Net, with the accidents of real ones: a lost image, an image nobody
# labelled, and two scans of the same patient.

# %%
def phantom_dataset(root: Path) -> Path:
    for k in range(1, 15):
        body = phantoms.ball(16, radius=4 + k % 3)
        img = Volume((40*body + 10*k).astype(np.int16), affine_from((2, 2, 2)))
        name = f"p{(k + 1)//2:02}_visit{1 + (k + 1) % 2}"
        for folder in ("imagesTr", "labelsTr"): (root/folder).mkdir(parents=True, exist_ok=True)
        if k != 4: write_volume(img, root/f"imagesTr/{name}_0000.nii.gz")
        if k != 9: write_volume(Volume(body.astype(np.uint8), img.affine), root/f"labelsTr/{name}.nii.gz")
    (root/"dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball_left": 1}}))
    return root

with tmpdir() as d:
    made = make_datalists(phantom_dataset(d/"Balls"), d/"lists", group=r"(p\d+)_visit")
    dl = read_datalist(made["path"])
    again = make_datalists(d/"Balls", d/"lists", group=r"(p\d+)_visit", seed=1, dry_run=True)
    with raises(FileExistsError): make_datalists(d/"Balls", d/"lists", group=r"(p\d+)_visit")
{k: made[k] for k in ("name", "recipe", "why", "counts", "missing_images", "missing_labels")}

# %%
pd.DataFrame([{"image": i["image"], "label": i["label"], "fold": i.get("fold", "test")} for i in dl.items()])

# %% [markdown]
# No patient is torn. And with another seed, a dry run tells which cases would move, before anything is lost.

# %%
assert dl.label_dict == {1: "left ball"} and dl.original_label_dict == {1: "ball_left"}
side = {}
for i in dl.items(): side.setdefault(i["image"][9:12], set()).add(i.get("fold", "test"))
assert len(side) == 7 and all(len(s) == 1 for s in side.values())
assert not again["written"] and len(again["diff"]["moved"]) > 3
made["provenance"], dict(list(again["diff"]["moved"].items())[:3])

# %%
with tmpdir() as d:
    touch(d, "Task09/labelsTr/spleen_1.nii.gz")
    with raises(DataError, match="no pair of image and label.*1 labels without a clear.*looked for imagesTr/spleen_1"):
        make_datalists(d/"Task09", d, recipe="Task09")
with raises(ConfigError, match="needs method='legacy'"): make_datalists(".", ".", method="hash", legacy=True)

# %% [markdown]
# ## Agreement with the reference
# The lists of the reference are zips of sorted paths, split by the legacy rule. On complete data sets our list has the
# same bytes, provenance aside. Where the reference went another way, `legacy` follows it: the mice of the micro-CT data
# set are torn apart again. `tests/test_recipes.py` compares all 42 recipes with a literal implementation.

# %%
def reference_list(pairs: list[tuple[str, str]], names: dict) -> str:
    items = [{"image": i, "label": l} for i, l in pairs]
    test, folds = legacy_split(len(items))
    return json.dumps({"training": [{**items[k], "fold": f} for f, fold in enumerate(folds) for k in fold],
                       "testing": [items[k] for k in test], "label_dict": names, "original_label_dict": names},
                      indent=4)

def without_provenance(path: str) -> str: return json.dumps({k: v for k, v in json.loads(Path(path).read_text()).items()
                                                             if k != "provenance"}, indent=4)

scans = [f"M{m:02}_{h:03}h" for m in range(1, 9) for h in (0, 24, 96)]
with tmpdir() as d:
    root = touch(d/"1_nativeCTdata_nifti", *(f"{s}/{n}.nii.gz" for s in scans for n in ("seg", "CT140")))
    ours = make_datalists(root, d, legacy=True)
    assert without_provenance(ours["path"]) == reference_list([(f"{s}/CT140.nii.gz", f"{s}/seg.nii.gz") for s in scans],
                                                              load_recipe("micro-ct-murine-native").label_dict)
    lists = [read_datalist(ours["path"]), read_datalist(make_datalists(root, d, on_exists="overwrite")["path"])]

fig, axes = plt.subplots(1, 2, figsize=(7, 1.9), sharey=True)
for ax, l, title in zip(axes, lists, ("legacy: each scan on its own", "default: animals stay whole")):
    grid = np.zeros((6, 8), int)
    for i in l.items(): grid[i.get("fold", -1) + 1, int(i["image"][1:3]) - 1] += 1
    ax.imshow(grid, cmap="Greys", vmin=0, vmax=3, aspect="auto")
    ax.set_yticks(range(6), ["test", *(f"fold {f}" for f in range(5))], fontsize=7)
    ax.set_title(title, fontsize=8)
    ax.set_xlabel("animal", fontsize=7)
    ax.set_xticks([])
