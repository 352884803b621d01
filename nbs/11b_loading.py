# %% [markdown]
# # Loading data lists
#
# > From list files to the cases a training sees: which fold is held out, where the files are, which transforms apply.
#
# Three things go wrong between a data list and a training, and none of them raises an error. Somebody asks for fold 0
# and believes to train *on* it. A field such as `region` is taken for a file name and gets a folder in front. And the
# list, which came by e-mail, holds a line that starts with a dollar sign and is executed as Python. This page loads
# the lists of the page on data lists with the call that VISTA3D users know, same arguments, same
# result, without these three.

# %%
#| default_exp loading

# %%
#| export
import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medvol_nb.core import ConfigError, DataError, MissingFile, log
from medvol_nb.datalists import PATH_KEYS, DataList, _path_problem, _shown, dataset_name_of, item_path, read_datalist
from medvol_nb.labels import _pointer

# %%
import time

import matplotlib.pyplot as plt
import numpy as np

from medvol_nb.core import raises, tmpdir, write_json
from medvol_nb.datalists import parse_datalist, write_datalist

# %% [markdown]
# ## The requested fold is held out
# Asking for fold 0 means: **the cases of fold 0 validate, all others train.** Cases that carry no fold always train.
# Asking for −1 holds nothing out. So "fold 0" in a training configuration does not mean that fold 0 is used for
# training, although that is what the reference's own comment says; its code does what is described here
# (`datafold_read` of MONAI), and so do the published supervoxels, which exist for all folds but 0.
#
# A fold without members would give a validation on nothing. That is an error, unless −1 was asked for.

# %%
#| export
def _fold_number(fold_idx: Any, holdout_fold: Any = None) -> int:
    "The fold to hold out, from either of its two names"
    for name, value in (("fold_idx", fold_idx), ("holdout_fold", holdout_fold)):
        if value is None and name == "holdout_fold": return fold_idx
        if type(value) is not int or value < -1:
            raise ConfigError(f"{name}: an integer is needed, a fold from 0 or -1 for none, got {value!r}")
    if fold_idx not in (-1, holdout_fold):
        raise ConfigError(f"fold_idx {fold_idx} and holdout_fold {holdout_fold} mean the same, give one of them")
    return holdout_fold

def hold_out(
    items: Iterable[Mapping], # of a data list
    fold_idx: int, # the fold that validates; -1: none
    name: str = "data list", # for errors
) -> tuple[list[Mapping], list[Mapping]]: # (items that train, items that validate), each in the order of the list
    "Divide items: the requested fold is held out, every other item trains, also those without a fold"
    items, fold_idx = list(items), _fold_number(fold_idx)
    held = [i for i in items if fold_idx >= 0 and i.get("fold") == fold_idx]
    there = sorted({i["fold"] for i in items if "fold" in i})
    if fold_idx >= 0 and not held and there:
        raise DataError(f"{name}: no case is in fold {fold_idx}, there are folds {there}. Pass one of them, or -1 to "
                        "hold nothing out")
    return [i for i in items if fold_idx < 0 or i.get("fold") != fold_idx], held

# %%
cases = [{"image": f"imagesTr/case_{k:02}.nii.gz", "fold": k % 5} for k in range(10)] + [{"image": "extra/new.nii.gz"}]
parts = {fold: hold_out(cases, fold) for fold in (-1, 0, 1, 2, 3, 4)}
held_out = np.array([[case in held for case in cases] for _, held in parts.values()])

fig, ax = plt.subplots(figsize=(6, 2.2))
ax.pcolormesh(held_out[::-1], cmap="cividis", edgecolors="w", linewidth=1)
ax.set_xticks(np.arange(len(cases)) + 0.5, [c.get("fold", "none") for c in cases])
ax.set_yticks(np.arange(len(parts)) + 0.5, list(parts)[::-1])
ax.set(xlabel="fold of the case", ylabel="fold asked for", title="yellow validates, blue trains")

# %%
for fold in range(5):
    train, held = hold_out(cases, fold)
    assert {i["fold"] for i in held} == {fold} and cases[-1] in train and len(train) + len(held) == len(cases)
assert parts[-1] == (cases, [])

# %%
with raises(DataError, match="no case is in fold 7, there are folds \\[0, 1, 2, 3, 4\\]"): hold_out(cases, 7)
with raises(ConfigError, match="fold_idx: an integer is needed.*got '0'"): hold_out(cases, "0")

# %% [markdown]
# ## Where the files are
# Paths in a list are relative to the data set's folder. Joined are the fields that hold paths, named in `path_keys`,
# and no others: `region`, `modality`, `site` stay as they are. Lists of paths (one a channel) are joined one by one.
#
# Pseudo labels and supervoxels often lie under another root than the images. `roots` says so for each key, in one of
# four ways:
#
# | `roots["pseudo_label"]` | file of `imagesTr/a.nii.gz` in data set `Task06` |
# |---|---|
# | `"/pl/{dataset}"` | `/pl/Task06/imagesTr/a.nii.gz` |
# | `"/pl"` | the same: below `/pl` the folders are named as they are below `/data` |
# | `{"Task06": "/mnt/six"}` | `/mnt/six/imagesTr/a.nii.gz`; data sets that are not named keep their folder |
# | `{"/data/": "/pl/"}` | the beginning of the *joined* path is exchanged, as upstream does |
#
# Upstream exchanges `/data/` wherever it first occurs and does nothing if it occurs nowhere. Here a prefix that does
# not fit is an error, and so is a root for a path that is absolute already. The published supervoxel paths are
# absolute: for these an exchange of prefixes, `{"/workspace_infer/": "/mnt/"}`, is the remedy.

# %%
#| export
UPSTREAM_DIRS: dict[str, str] = {
    "AbdomenCT-1K": "AbdomenCT-1K", "FLARE22": "AbdomenCT-1K/FLARE22Train", "AMOS22": "AMOS22",
    "BTCV-Abdomen": "BTCV/Abdomen", "BTCV-Cervix": "BTCV/Cervix", "CT-ORG": "CT-ORG",
    "Multi-organ-Abdominal-CT-btcv": "Multi-organ-Abdominal-CT/res_1.0mm_relabeled2",
    "Multi-organ-Abdominal-CT-tcia": "Multi-organ-Abdominal-CT/res_1.0mm_relabeled2", "Pancreas-CT": "Pancreas-CT",
    **{name: name for name in ("Task06", "Task07", "Task08", "Task09", "Task10", "TotalSegmentator",
                               "TotalSegmentatorV2", "Task03", "Bone-NIH")},
    "CRLM-CT": "CRLM-CT/nifti",
    **{name: name for name in ("VerSe", "AeroPath", "CTPelvic1K-CLINIC", "NLST", "LIDC", "Covid19", "TCIA_Colon",
                               "StonyBrook-CT")}}
_UPSTREAM_ROOT = "/data"

def _mirrored(name: str, base: str) -> str:
    "Folder of a data set below the common root: what follows /data/, or the published folder, or the name"
    return base.removeprefix(_UPSTREAM_ROOT + "/") if base.startswith(_UPSTREAM_ROOT + "/") else \
        UPSTREAM_DIRS.get(name, name)

def _swapped(full: str, prefixes: Mapping[str, Any], where: str) -> str:
    "Exchange the beginning of a path"
    for old in sorted(prefixes, key=len, reverse=True):
        stem = old.rstrip("/") + "/"
        if full.startswith(stem): return os.path.join(os.fspath(prefixes[old]), full[len(stem):])
    raise DataError(f"{where}: path {full} begins with none of {sorted(prefixes)}. Correct the prefix in `roots`")

def _place(key: str, name: str, base: str, roots: Mapping[str, Any], absolute: bool) -> Callable[[str], str]:
    "Function that turns a path of the list into a file name"
    rule, where = roots.get(key), f"{name}, {key}"
    if isinstance(rule, Mapping):
        prefixes = {k: v for k, v in rule.items() if k.startswith("/")}
        if name not in rule and prefixes:
            inside_base = _place(key, name, base, {}, absolute)
            return lambda path: _swapped(inside_base(path), prefixes, where)
        rule = rule.get(name)
        folder = base if rule is None else os.fspath(rule)
    elif rule is None: folder = base
    else:
        text = os.fspath(rule)
        folder = text.replace("{dataset}", name) if "{dataset}" in text else os.path.join(text, _mirrored(name, base))

    looked_at: set[str] = set() # folders that were found to stay inside; a sibling needs no second look

    def join(path: str) -> str:
        if rule is not None and path.startswith("/"):
            raise DataError(f"{where}: path {path} is absolute, so the root {folder} does not apply. Exchange its "
                            f"beginning: roots={{{key!r}: {{'{os.path.dirname(path)}/': '{folder}/'}}}}")
        parent, full = os.path.dirname(path), os.path.join(folder, path)
        plain = not ("./" in path or "//" in path or _path_problem(path, absolute))
        if plain and parent in looked_at and not os.path.islink(full): return full
        full = str(item_path(folder, path, absolute))
        looked_at.add(parent)
        return full
    return join

# %%
#| export
def _check_roots(roots: Mapping[str, Any] | None, path_keys: Sequence[str]) -> Mapping[str, Any]:
    for key in roots or {}:
        if key not in path_keys: raise ConfigError(_unknown("roots", key, path_keys))
    return roots or {}

def _unknown(what: str, name: Any, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 3, 0.5)
    there = ", ".join(known[:8]) + f" and {len(known) - 8} more"*(len(known) > 8)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {there or 'none'}"
    return f"{what}: unknown name {name!r}, {hint}"

def located_items(
    dl: DataList, # a data list
    base_dir: str | os.PathLike, # the data set's folder
    key: str = "training", # section: "training", "testing" or another list of the file
    *,
    path_keys: Sequence[str] = PATH_KEYS, # fields that hold paths
    roots: Mapping[str, Any] | None = None, # other roots for some of these fields, see the table above
    absolute: bool = True, # let absolute paths through
) -> list[dict]: # items with absolute paths and `dataset_name`
    "Items of a list with the files they mean; fields that are not paths stay as they are"
    base, roots = os.path.abspath(base_dir), _check_roots(roots, path_keys)
    join = {k: _place(k, dl.name, base, roots, absolute) for k in path_keys}
    out = []
    for n, item in enumerate(dl.items(key)):
        new = dict(item)
        for k in path_keys:
            value = item.get(k)
            if not value: continue
            try: new[k] = [join[k](v) for v in value] if isinstance(value, list) else join[k](value)
            except DataError as e: raise DataError(f"{dl.name}, /{key}/{n}/{k}: {e}") from None
        out.append(new | {"dataset_name": dl.name})
    return out

# %%
six = parse_datalist({"training": [
    {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz", "pseudo_label": "imagesTr/a.nii.gz", "fold": 0,
     "region": "chest/upper", "label_sv": "/workspace_infer/supervoxel_sam/Task06_100/a/a_seg.nii.gz"},
    {"image": ["imagesTr/b_t1.nii.gz", "imagesTr/b_t2.nii.gz"], "fold": 1, "site": ["ward", "7"]}]}, "Task06")
located_items(six, "/data/Task06", roots={"pseudo_label": "/pl", "label_sv": {"/workspace_infer/": "/mnt"}})

# %%
one, two = located_items(six, "/data/Task06")
assert one["region"] == "chest/upper" and two["site"] == ["ward", "7"] and one["dataset_name"] == "Task06"
assert two["image"] == ["/data/Task06/imagesTr/b_t1.nii.gz", "/data/Task06/imagesTr/b_t2.nii.gz"]
for root in ("/pl", "/pl/{dataset}", {"Task06": "/pl/Task06"}, {"/data/": "/pl/"}):
    assert located_items(six, "/data/Task06", roots={"pseudo_label": root})[0]["pseudo_label"] == \
        "/pl/Task06/imagesTr/a.nii.gz"

# %%
with raises(DataError, match="begins with none of \\['/data/'\\]"):
    located_items(six, "/mnt/Task06", roots={"pseudo_label": {"/data/": "/pl/"}})
with raises(DataError, match="is absolute, so the root /sv/Task06 does not apply"):
    located_items(six, "/mnt/Task06", roots={"label_sv": "/sv"})
with raises(ConfigError, match="roots: unknown name 'pseudolabel', did you mean 'pseudo_label'"):
    located_items(six, "/mnt/Task06", roots={"pseudolabel": "/pl"})

# %% [markdown]
# ## Many data sets in one call
# `get_datalist_with_dataset_name` has the arguments of VISTA3D's function of that name. Lists are the files
# `<name>_5_folds.json` of `json_dir`. `base_dirs` gives the folder of each data set; a single folder stands for
# upstream's layout below it, and nothing for upstream's `/data`. Unlike there, the caller's `base_dirs` counts.
#
# A list in which no case has a fold (the unlabelled sets) trains whole, whatever fold is held out; but if the fold has
# no member in *any* of the lists, the call fails.

# %%
#| export
def find_datalists(
    json_dir: str | os.PathLike | None, # folder with files <name>_<n>_folds.json
) -> dict[str, Path]: # data set -> file; those of VISTA3D first and in its order, then by name
    "The data lists in a folder; of several numbers of folds, 5 is preferred"
    if json_dir is None: raise ConfigError("json_dir: name the folder that holds the <name>_5_folds.json files")
    if not Path(json_dir).is_dir(): raise MissingFile(f"json_dir {json_dir} is not a folder")
    found: dict[str, list[Path]] = {}
    for p in sorted(Path(json_dir).glob("*_folds.json")): found.setdefault(dataset_name_of(p), []).append(p)
    out = {}
    for name in [*(n for n in UPSTREAM_DIRS if n in found), *sorted(set(found) - set(UPSTREAM_DIRS))]:
        five = [p for p in found[name] if p.name == f"{name}_5_folds.json"]
        if not five and len(found[name]) > 1:
            raise DataError(f"json_dir {json_dir}: {name} has several lists, {[p.name for p in found[name]]}. Keep one")
        out[name] = (five or found[name])[0]
    return out

def _chosen(datasets: str | Sequence[str] | None, json_dir: Any, base_dirs: Any) -> dict[str, tuple[DataList, str]]:
    "Data set -> its list and its folder, in the order asked for"
    files = find_datalists(json_dir)
    if isinstance(base_dirs, Mapping): known = list(base_dirs)
    else:
        known, top = list(files), _UPSTREAM_ROOT if base_dirs is None else os.fspath(base_dirs)
        base_dirs = {n: os.path.join(top, UPSTREAM_DIRS.get(n, n)) for n in known}
    names = known if datasets is None else [datasets] if isinstance(datasets, str) else list(datasets)
    for n in names:
        if n not in known: raise ConfigError(_unknown("datasets", n, known))
        if n not in files: raise MissingFile(f"{Path(json_dir)/(n + '_5_folds.json')} does not exist")
    return {n: (read_datalist(files[n]), os.fspath(base_dirs[n])) for n in names}

def _divided(chosen: Mapping[str, tuple[DataList, str]], fold: int, key: str, **options: Any
             ) -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    train, held = [], []
    for name, (dl, base) in chosen.items():
        t, v = hold_out(located_items(dl, base, key, **options), fold, name)
        train += t
        held += v
    if fold >= 0 and key == "training" and not held:
        raise DataError(f"no case of {list(chosen) or 'no data set'} is in fold {fold}. Pass -1 to hold nothing out")
    log.info("data lists %s, fold %d held out: %d train, %d validate", list(chosen), fold, len(train), len(held))
    return tuple(train), tuple(held)

def get_datalist_with_dataset_name(
    datasets: str | Sequence[str] | None = None, # names of data sets; None: all
    fold_idx: int = -1, # the fold that is held out; -1: none
    key: str = "training", # section of the lists
    json_dir: str | os.PathLike | None = None, # folder with the lists
    base_dirs: Mapping[str, str | os.PathLike] | str | os.PathLike | None = None, # folder of each data set, or of all
    *,
    holdout_fold: int | None = None, # clearer name of `fold_idx`
    path_keys: Sequence[str] = PATH_KEYS, # fields that hold paths
    roots: Mapping[str, Any] | None = None, # other roots for some path fields, see `located_items`
    absolute: bool = True, # let absolute paths through
) -> tuple[tuple[dict, ...], tuple[dict, ...]]: # (items that train, items of the held-out fold)
    "Cases of many data sets with absolute paths and their data set's name"
    return _divided(_chosen(datasets, json_dir, base_dirs), _fold_number(fold_idx, holdout_fold), key,
                    path_keys=path_keys, roots=roots, absolute=absolute)

# %%
plain_list = {"training": cases[:10], "testing": [{"image": "imagesTs/t.nii.gz"}], "label_dict": {"1": "spleen"}}
unlabelled = {"training": [{"image": "u.nii.gz", "dataset": "StonyBrook", "region": "chest"}]}
with tmpdir() as d:
    for name, content in (("Task09", plain_list), ("Liver", plain_list), ("Covid19", unlabelled)):
        write_json(d/f"{name}_5_folds.json", content)
    train, held = get_datalist_with_dataset_name(fold_idx=2, json_dir=d, base_dirs="/mnt")
    tests, _ = get_datalist_with_dataset_name("Liver", key="testing", json_dir=d, base_dirs={"Liver": "/a", "B": "/b"})
    with raises(ConfigError, match="unknown name 'Task9', did you mean 'Task09'"):
        get_datalist_with_dataset_name(["Task9"], json_dir=d)
    with raises(DataError, match="no case of \\['Covid19'\\] is in fold 0"):
        get_datalist_with_dataset_name("Covid19", 0, json_dir=d)
    with raises(MissingFile, match="B_5_folds.json does not exist"):
        get_datalist_with_dataset_name(json_dir=d, base_dirs={"B": "/b"})
[(i["dataset_name"], i["image"], i["fold"]) for i in held], tests

# %%
assert [i["image"] for i in held] == [f"/mnt/{n}/imagesTr/case_{k:02}.nii.gz" for n in ("Task09", "Liver")
                                      for k in (2, 7)]
assert len(train) == 17 and train[8] == {"image": "/mnt/Covid19/u.nii.gz", "dataset": "StonyBrook", "region": "chest",
                                         "dataset_name": "Covid19"}

# %% [markdown]
# ## A list is not a program
# Lists also carry transforms for their own data, such as how often a rare class is drawn. Upstream hands these to
# MONAI's configuration parser. That parser executes every string that begins with `$`, and creates an object of any
# class whose name stands in `_target_`, `subprocess.Popen` for instance. Whoever loads a list runs a program by a
# stranger.
#
# The published lists need very little of that power, so here is an interpreter for exactly that much:
#
# * `_target_` names one of the transforms below, by its short name or behind `monai.transforms.`;
# * arguments are numbers, plain words, `null`, `true`, `false`, lists and dictionaries of these;
# * `"@name"` stands for a value that the caller hands in;
# * `"$tuple(float(i >= 0) for i in range(133))"`, the class ratios of all published lists, is known as a pattern (with
#   other numbers, and with `>`), and is *computed*, not evaluated.
#
# Whatever reads files, writes files, imports modules or takes functions is not on the white list.

# %%
#| export
TRANSFORMS = frozenset("""
    BorderPadd CenterScaleCropd CenterSpatialCropd CropForegroundd DivisiblePadd RandCropByLabelClassesd
    RandCropByPosNegLabeld RandScaleCropd RandSpatialCropSamplesd RandSpatialCropd RandWeightedCropd
    ResizeWithPadOrCropd SpatialCropd SpatialPadd
    AdjustContrastd ClipIntensityPercentilesd GaussianSharpend GaussianSmoothd GibbsNoised HistogramNormalized
    KSpaceSpikeNoised MaskIntensityd MedianSmoothd NormalizeIntensityd RandAdjustContrastd RandBiasFieldd
    RandCoarseDropoutd RandCoarseShuffled RandGaussianNoised RandGaussianSharpend RandGaussianSmoothd RandGibbsNoised
    RandHistogramShiftd RandKSpaceSpikeNoised RandRicianNoised RandScaleIntensityFixedMeand RandScaleIntensityd
    RandShiftIntensityd RandStdShiftIntensityd ScaleIntensityRangePercentilesd ScaleIntensityRanged ScaleIntensityd
    ShiftIntensityd StdShiftIntensityd ThresholdIntensityd
    Affined Flipd Orientationd Rand3DElasticd RandAffined RandAxisFlipd RandFlipd RandGridDistortiond RandRotate90d
    RandRotated RandSimulateLowResolutiond RandZoomd Resized Rotate90d Rotated Spacingd Zoomd
    CastToTyped ConcatItemsd CopyItemsd DeleteItemsd EnsureChannelFirstd EnsureTyped Identityd MapLabelValued
    SelectItemsd SqueezeDimd
    """.split())
_TARGET = re.compile(r"(?:monai\.transforms\.(?:[a-z_]+\.dictionary\.)?)?([A-Z][A-Za-z0-9]*?)(?:d|D|Dict)")
_RATIOS = re.compile(r"\$\s*tuple\(float\(i (>=|>) (\d{1,5})\) for i in range\((\d{1,5})\)\)\s*")
_WORD = re.compile(r"[\w .:,+/-]*")

def _literal(value: Any, at: str, references: Mapping[str, Any], problems: list[str], depth: int = 0) -> Any:
    "The value that an argument stands for; what is not allowed goes to `problems`"
    def refuse(why: str) -> None: problems.append(f"{at}: {why}")
    if value is None or isinstance(value, (bool, int)): return value
    if isinstance(value, float): return value if math.isfinite(value) else refuse(f"{value} is no finite number")
    if isinstance(value, str): return _text(value, references, refuse)
    if depth > 20: return refuse("nested more than 20 levels deep")
    if isinstance(value, (list, tuple)):
        return type(value)(_literal(v, f"{at}/{n}", references, problems, depth + 1) for n, v in enumerate(value))
    if not isinstance(value, Mapping): return refuse(f"a plain value is needed, got {type(value).__name__}")
    if wrong := [k for k in value if not isinstance(k, str) or k.startswith("_") or not _WORD.fullmatch(k)]:
        return refuse(f"key {wrong[0]!r:.60} is not allowed inside an argument, objects are made at the top level only")
    return {k: _literal(v, at + _pointer(k), references, problems, depth + 1) for k, v in value.items()}

def _text(value: str, references: Mapping[str, Any], refuse: Callable[[str], None]) -> Any:
    "The value of a string: a reference, the known expression, or a plain word"
    if value.startswith("@"):
        if value[1:] in references: return references[value[1:]]
        return refuse(_unknown("reference", value[:60], [f"@{r}" for r in references]))
    if m := _RATIOS.fullmatch(value):
        return tuple(float(k > int(m[2]) or (m[1] == ">=" and k == int(m[2]))) for k in range(int(m[3])))
    if value.startswith("$"): return refuse(f"expression {value!r:.80} is not evaluated, write its value")
    if not _WORD.fullmatch(value) or re.search(r"__\w+__", value) or "\n" in value:
        return refuse(f"{value!r:.80} is no plain word")
    return value

# %%
#| export
def transform_problems(
    config: Any, # what a list holds as `training_transform` or `validation_transform`
    references: Mapping[str, Any], # name -> value of "@name"
    at: str = "/training_transform", # JSON pointer of `config` in its file
) -> list[str]: # one line a problem, beginning with its JSON pointer
    "What in a transform configuration is not allowed; nothing is imported or made"
    return _parsed(config, references, at)[1]

def _parsed(config: Any, references: Mapping[str, Any], at: str) -> tuple[list[tuple[str, dict]], list[str]]:
    "(class name, arguments) of each transform, and the problems"
    out, problems = [], []
    if not isinstance(config, (list, tuple)): return out, [f"{at}: a list of transforms is needed, got {config!r:.80}"]
    for n, entry in enumerate(config):
        here = f"{at}/{n}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("_target_"), str):
            problems.append(f"{here}: an object with '_target_' is needed, got {entry!r:.80}")
            continue
        name = (m := _TARGET.fullmatch(entry["_target_"])) and f"{m[1]}d"
        if name not in TRANSFORMS:
            problems.append(f"{here}/_target_: " + _unknown("transform", entry["_target_"][:60], sorted(TRANSFORMS)))
        arguments = {}
        for key, value in entry.items():
            if key in ("_target_", "_desc_"): continue
            if not isinstance(key, str) or not key.isidentifier() or key.startswith("_"):
                problems.append(f"{here}{_pointer(str(key))}: argument name {key!r:.60} is not allowed")
            else: arguments[key] = _literal(value, here + _pointer(key), references, problems)
        out.append((name, arguments))
    return out, problems

# %%
attack = [{"_target_": "subprocess.Popen", "args": ["touch", "canary"]},
          {"_target_": "RandZoomd", "keys": "@image_kee", "prob": "$__import__('os').system('touch canary')"},
          {"_target_": "Lambdad", "keys": "image", "func": {"_target_": "builtins.eval"}}]
transform_problems(attack, {"image_key": "image"})

# %%
assert len(transform_problems(attack, {"image_key": "image"})) == 5
assert transform_problems([{"_target_": "monai.transforms.RandZoomD", "keys": ["@k"], "prob": 0.2}], {"k": "img"}) == []
ratios = _literal("$tuple(float(i >= 0) for i in range(133))", "", {}, [])
assert ratios == (1.0,)*133 and _literal("$tuple(float(i > 1) for i in range(4))", "", {}, []) == (0, 0, 1, 1)

# %% [markdown]
# ## From configuration to transforms
# `materialise` makes the objects. It looks at everything first and reports all problems with their JSON pointers; only
# then is MONAI imported (which takes ten seconds). Misspelt argument names are found by the signature of the class.
# Users who know where a file comes from can say `trust=True`: this is logged, and MONAI's parser takes over with all
# it can do.
#
# All published lists carry the same seven transforms. `published_transform` writes them down, for lists that have none.

# %%
#| export
def published_transform(
    n_classes: int = 133, # of the label space, background included
) -> list[dict]: # configuration with the references @image_key, @label_key, @pseudo_label_key, @label_sv_key, ...
    "The seven transforms of the lists that VISTA3D published: class-balanced patches, zoom, blur, noise"
    keys = ["@image_key", "@label_key", "@pseudo_label_key", "@label_sv_key"]
    image, sometimes = {"keys": ["@image_key"]}, {"prob": 0.2}
    blur = {f"sigma_{a}": [0.5, 1.0] for a in "xyz"}
    return [
        {"_target_": "RandCropByLabelClassesd", "keys": keys, "label_key": "@pseudo_label_key",
         "num_classes": n_classes, "num_samples": "@num_patches_per_image", "spatial_size": "@patch_size",
         "ratios": f"$tuple(float(i >= 0) for i in range({n_classes}))", "warn": False, "allow_missing_keys": True},
        {"_target_": "RandZoomd", "keys": keys, "min_zoom": 0.8, "max_zoom": 1.2,
         "mode": ["trilinear", "nearest", "nearest", "nearest"], **sometimes, "allow_missing_keys": True},
        {"_target_": "RandSimulateLowResolutiond", **image, "zoom_range": [0.3, 1], **sometimes,
         "allow_missing_keys": True},
        {"_target_": "RandGaussianSmoothd", **image, **sometimes, **blur},
        {"_target_": "RandScaleIntensityd", **image, "factors": 0.1, **sometimes},
        {"_target_": "RandShiftIntensityd", **image, "offsets": 0.1, **sometimes},
        {"_target_": "RandGaussianNoised", **image, **sometimes, "mean": 0.0, "std": 0.2}]

def _make(name: str, arguments: dict[str, Any], at: str) -> Any:
    from monai import transforms
    kind = getattr(transforms, name)
    known = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for key in arguments:
        if key not in known: raise ConfigError(f"{at}/{key}: " + _unknown(f"argument of {name}", key, known))
    try: return kind(**arguments)
    except Exception as e: raise ConfigError(f"{at}: {name} refuses its arguments: {e}") from e

def materialise(
    config: Sequence[Mapping], # transforms as a list holds them: '_target_' and arguments
    references: Mapping[str, Any] | None = None, # name -> value of "@name"
    trust: bool = False, # True: let MONAI's parser evaluate expressions and make any object
    *,
    at: str = "/training_transform", # JSON pointer of `config`, for errors
    where: str = "transforms", # file it comes from, for errors
) -> list: # MONAI transforms
    "Make transforms from a configuration, without executing anything it says unless it is trusted"
    references = dict(references or {})
    if trust:
        log.warning("%s: %s is handed to MONAI's parser, which executes what it says (trust=True)", where, at)
        from monai.bundle import ConfigParser
        return list(ConfigParser({**references, "_transforms": list(config)}).get_parsed_content("_transforms"))
    parsed, problems = _parsed(config, references, at)
    if problems: raise ConfigError(_shown(problems, where))
    return [_make(name, arguments, f"{where}: {at}/{n}") for n, (name, arguments) in enumerate(parsed)]

# %%
names = {"image_key": "image", "label_key": "label", "label_sv_key": "label_sv", "pseudo_label_key": "pseudo_label",
         "num_patches_per_image": 2, "patch_size": (128, 128, 128)}
shown, problems = _parsed(published_transform(), names, "")
[name for name, _ in shown], problems

# %%
with raises(ConfigError, match="5 problems in list.json: /training_transform/0/_target_: .* unknown name 'subproc"):
    materialise(attack, names, where="list.json")
with raises(ConfigError, match="not evaluated"): materialise([{"_target_": "RandZoomd", "keys": "$print(1)"}], names)

# %% [markdown]
# With MONAI:

# %%
#| slow
made = materialise(published_transform(), names)
with raises(ConfigError, match="argument of RandZoomd: unknown name 'probb', did you mean 'prob'"):
    materialise([{"_target_": "RandZoomd", "keys": "image", "probb": 0.2}])
[type(t).__name__ for t in made], made[0].cropper.spatial_size

# %% [markdown]
# ## The whole call
# `get_datalist_with_dataset_name_and_transform` has upstream's arguments in upstream's order and returns the same four
# things. A list without `training_transform` is an error there and here; the error says what to add.

# %%
#| export
def get_datalist_with_dataset_name_and_transform(
    image_key: str, # value of "@image_key"
    label_key: str, # value of "@label_key"
    label_sv_key: str, # value of "@label_sv_key"
    pseudo_label_key: str, # value of "@pseudo_label_key"
    num_patches_per_image: int, # value of "@num_patches_per_image"
    patch_size: Sequence[int], # (x, y, z) value of "@patch_size" [voxel]
    datasets: str | Sequence[str] | None = None, # names of data sets; None: all
    fold_idx: int = -1, # the fold that is held out; -1: none
    key: str = "training", # section of the lists
    json_dir: str | os.PathLike | None = None, # folder with the lists
    base_dirs: Mapping[str, str | os.PathLike] | str | os.PathLike | None = None, # folder of each data set, or of all
    *,
    holdout_fold: int | None = None, # clearer name of `fold_idx`
    path_keys: Sequence[str] = PATH_KEYS, # fields that hold paths
    roots: Mapping[str, Any] | None = None, # other roots for some path fields, see `located_items`
    absolute: bool = True, # let absolute paths through
    trust: bool = False, # True: execute expressions in the lists' transforms
) -> tuple[tuple[dict, ...], tuple[dict, ...], dict[str, Any], dict[str, Any]]: # train, held out, Compose by data set
    "Cases of many data sets, and the training and validation transforms of each data set"
    fold = _fold_number(fold_idx, holdout_fold)
    chosen = _chosen(datasets, json_dir, base_dirs)
    train, held = _divided(chosen, fold, key, path_keys=path_keys, roots=roots, absolute=absolute)
    references = {"image_key": image_key, "label_key": label_key, "label_sv_key": label_sv_key,
                  "pseudo_label_key": pseudo_label_key, "num_patches_per_image": num_patches_per_image,
                  "patch_size": patch_size}
    for name, (dl, _) in chosen.items():
        if dl.training_transform is None:
            raise ConfigError(f"data list {name!r}: has no training_transform. Add one to the file; "
                              "loading.published_transform() gives the one of the published lists")
    made = [{name: _compose(getattr(dl, kind), references, trust, f"/{kind}", name) for name, (dl, _) in chosen.items()}
            for kind in ("training_transform", "validation_transform")]
    return train, held, *made

def _compose(config: Any, references: Mapping[str, Any], trust: bool, at: str, name: str) -> Any:
    "MONAI Compose of a configuration, None for none"
    if config is None: return None
    made = materialise(config, references, trust, at=at, where=f"data list {name!r}")
    from monai.transforms import Compose
    return Compose(made)

# %%
call = dict(image_key="image", label_key="label", label_sv_key="label_sv", pseudo_label_key="pseudo_label",
            num_patches_per_image=2, patch_size=(96, 96, 96))
with tmpdir() as d:
    write_json(d/"Task09_5_folds.json", plain_list)
    write_json(d/"Evil_5_folds.json", plain_list | {"training_transform": attack})
    with raises(ConfigError, match="data list 'Task09': has no training_transform"):
        get_datalist_with_dataset_name_and_transform(**call, datasets="Task09", json_dir=d)
    with raises(ConfigError, match="5 problems in data list 'Evil'"):
        get_datalist_with_dataset_name_and_transform(**call, datasets="Evil", json_dir=d)

# %% [markdown]
# ## Putting it together
# A list as it is published, loaded as its users do, with fold 0 held out:

# %%
#| slow
with tmpdir() as d:
    published = parse_datalist({"training": cases[:10], "training_transform": published_transform()}, "Task09")
    write_datalist(published, d/"Task09_5_folds.json")
    train, held, transforms, val_transforms = get_datalist_with_dataset_name_and_transform(
        **call, fold_idx=0, json_dir=d, base_dirs={"Task09": "/mnt/spleen"})
assert len(transforms["Task09"].transforms) == 7 and val_transforms == {"Task09": None}
len(train), [i["image"] for i in held]

# %% [markdown]
# How long does loading take? For lists of the size of all published ones together, well below a second:

# %%
with tmpdir() as d:
    thousands = parse_datalist({"training": [{"image": f"imagesTr/{k:05}.nii.gz", "label": f"labelsTr/{k:05}.nii.gz",
                                              "fold": k % 5} for k in range(5000)]}, "Big")
    write_datalist(thousands, d/"Big_5_folds.json")
    begin = time.perf_counter()
    train, held = get_datalist_with_dataset_name(holdout_fold=1, json_dir=d, base_dirs=d)
    took = time.perf_counter() - begin
assert (len(train), len(held)) == (4000, 1000)
f"{took/5000*1e6:.0f} microseconds a case"
