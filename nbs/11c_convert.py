# %% [markdown]
# # Converting data lists
#
# > nnU-Net, the Medical Segmentation Decathlon, tables: the same cases, folds and label names in each of them.
#
# A data set rarely arrives as the list that a training wants. It is an nnU-Net folder with `dataset.json` and
# `splits_final.json`, a Decathlon folder, or a table that somebody keeps in a spreadsheet. Results go back the same
# way, because the baseline to compare with is nnU-Net. What must survive are three things: which label belongs to which
# image, which fold a case is in, and what the numbers in a label are called. Each converter below comes in two
# directions, and the page checks that going there and back changes nothing.
#
# Images are not touched. nnU-Net can be told where files are; where it insists on its own folder layout, links or
# copies are made on request.

# %%
#| default_exp convert

# %%
#| export
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medvol_nb.core import (ConfigError, DataError, FormatError, MissingExtra, MissingFile, OnExists, atomic,
                            check_output, log, progress, read_csv, read_json, to_json, write_csv, write_json)
from medvol_nb.datalists import (ITEM_KEYS, PATH_KEYS, DataList, _shown, dataset_name_of, item_path, items_problems,
                                 parse_datalist, read_datalist, write_datalist)
from medvol_nb.volume import FORMATS, stem_of

# %%
import matplotlib.pyplot as plt
import numpy as np

from medvol_nb import phantoms
from medvol_nb.core import raises, tmpdir
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.volume import write_volume

# %% [markdown]
# ## A small data set
# Five abdomens with labels, one image without, one case for testing, folder names as people choose them:

# %%
def build(root):
    for k in range(6):
        body = phantoms.abdomen((16, 12, 14), seed=k)
        affine = affine_from(body.spacing)
        write_volume(Volume(body.img, affine), root/f"scans of \u00dcrsula/p{k}.nii.gz")
        if k != 4: write_volume(Volume(body.lbl, affine), root/f"labels/p{k}.nii.gz")
    def case(k, **more): return {"image": f"scans of \u00dcrsula/p{k}.nii.gz", "label": f"labels/p{k}.nii.gz", **more}
    return DataList("Abdomen", (case(3, fold=0), case(0, fold=0), case(1, fold=1, site="B", age=63), case(2, fold=2),
                                {"image": "scans of \u00dcrsula/p4.nii.gz", "region": "abdomen"}),
                    (case(5),), body.names, {1: "Liver"})

import tempfile

place = tempfile.TemporaryDirectory()
root = Path(place.name)
for folder in ("scans of \u00dcrsula", "labels"): (root/folder).mkdir()
abdomen = build(root)
abdomen.folds(), abdomen.label_dict

# %% [markdown]
# ## Names of cases
# nnU-Net and its splits speak of cases by identifier, which is the file name without channel number and suffix. Data
# sets that keep one folder a case call every image `ct.nii.gz`; then the folders become part of the identifier.

# %%
#| export
def case_ids(
    items: Sequence[Mapping], # items of a data list
) -> list[str]: # one a case, all different
    "Identifiers of cases: the image's file name, with as many folders in front as it takes to tell cases apart"
    first = [i["image"] if isinstance(i["image"], str) else i["image"][0] for i in items]
    stems, folders = [stem_of(p) for p in first], [[f for f in p.split("/")[:-1] if f] for p in first]
    bare, ids = [re.sub(r"_\d{4}$", "", s) for s in stems], []
    for depth in range(max(map(len, folders), default=0) + 1):
        for names in (bare, stems):
            ids = ["_".join([*f[max(0, len(f) - depth):], s]) for f, s in zip(folders, names)]
            if len(set(ids)) == len(ids): return ids
    twice = sorted({i for i in ids if ids.count(i) > 1})
    raise DataError(f"case names: {len(twice)} images occur in several items, such as {twice[0]!r}. Keep one item each")

# %%
case_ids(abdomen.items()), case_ids([{"image": "s1/ct.nii.gz"}, {"image": "s2/ct.nii.gz"}])

# %%
assert case_ids([{"image": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"]}]) == ["a"]
assert case_ids([{"image": "amos_0004.nii.gz"}, {"image": "amos_0007.nii.gz"}]) == ["amos_0004", "amos_0007"]
with raises(DataError, match="1 images occur in several items"): case_ids([{"image": "a.nii.gz"}]*2)

# %% [markdown]
# ## Names of labels
# Ours map ids to names and leave the background out; nnU-Net 2 maps names to ids and wants `"background": 0`, version 1
# and the Decathlon map ids to names with the background. A name may stand for several ids (two kinds of bone lesion are
# one class): nnU-Net calls that a *region*, a list of ids. Regions that overlap have no counterpart here.

# %%
#| export
_BACKGROUND = "background"

def _names_to_ids(label_dict: Mapping[int, str]) -> dict[str, int | list[int]]:
    "nnU-Net 2: name -> id, or all ids of a name that occurs more than once"
    out: dict[str, Any] = {_BACKGROUND: 0}
    for name in dict.fromkeys(n for i, n in label_dict.items() if i):
        ids = [i for i, n in label_dict.items() if n == name and i]
        if name in out: raise DataError(f"label_dict: id {ids[0]} is called {name!r}, which nnU-Net keeps for 0")
        out[name] = ids[0] if len(ids) == 1 else ids
    return out

def _ids_to_names(label_dict: Mapping[int, str]) -> dict[str, str]:
    "nnU-Net 1 and MSD: id -> name, background included"
    return {"0": label_dict.get(0, _BACKGROUND)} | {str(i): n for i, n in label_dict.items() if i}

def _label_names(labels: Any, where: str) -> dict[int, str]:
    "Id -> name without the background, from any of the forms"
    if not isinstance(labels, Mapping): raise FormatError(f"{where}, /labels: an object is needed, got {labels!r:.80}")
    pairs = []
    for key, value in labels.items():
        ids = value if isinstance(value, list) else [value]
        if isinstance(value, str): pairs.append((key, value))
        elif all(type(i) is int for i in ids): pairs += [(str(i), key) for i in ids]
        else: raise FormatError(f"{where}, /labels/{key}: an id, a list of ids or a name is needed, got {value!r:.80}")
    out: dict[int, str] = {}
    for key, name in pairs:
        if not re.fullmatch(r"\d{1,10}", key): raise FormatError(f"{where}, /labels/{key}: {key!r} is no id")
        if int(key) in out:
            raise FormatError(f"{where}, /labels: id {key} is in {out[int(key)]!r} and in {name!r}. Regions that "
                              "overlap have no counterpart in a data list; convert the labels to plain classes first")
        out[int(key)] = name
    if out.get(0, "").casefold() in (_BACKGROUND, "unlabelled", "unlabeled", ""): out.pop(0, None)
    return out

# %%
_names_to_ids({1: "bone lesion", 2: "bone lesion", 4: "liver"}), _ids_to_names({1: "liver"})

# %%
for names in ({1: "liver", 7: "spleen"}, {1: "bone lesion", 2: "bone lesion"}, {}):
    assert _label_names(_names_to_ids(names), "x") == names == _label_names(_ids_to_names(names), "x")
with raises(FormatError, match="id 2 is in 'tumour' and in 'core'"):
    _label_names({"background": 0, "tumour": [1, 2], "core": [2]}, "dataset.json")

# %% [markdown]
# ## Folds
# `splits_final.json` holds, for each fold, the identifiers that train and those that validate. A list says less: the
# fold in which a case validates. So the reader insists that each case validates at most once and that all others train;
# anything else would be lost silently.

# %%
#| export
def splits_of(
    items: Sequence[Mapping], # labelled training items
    ids: Sequence[str], # their identifiers
) -> list[dict[str, list[str]]]: # for each fold 'train' and 'val', as in splits_final.json; empty without folds
    "Folds in nnU-Net's form"
    n = max((i["fold"] for i in items if "fold" in i), default=-1) + 1
    return [{"train": [c for i, c in zip(items, ids) if i.get("fold") != k],
             "val": [c for i, c in zip(items, ids) if i.get("fold") == k]} for k in range(n)]

def folds_of(
    splits: Any, # content of splits_final.json
    ids: Sequence[str], # identifiers of all labelled training cases
    where: str = "splits_final.json", # file name for errors
) -> dict[str, int]: # identifier -> fold in which it validates
    "Folds from nnU-Net's form; what a data list cannot say is an error"
    out: dict[str, int] = {}
    problems = []
    if not isinstance(splits, list): raise FormatError(f"{where}: a list of folds is needed, got {splits!r:.80}")
    for k, fold in enumerate(splits):
        parts = [fold.get(p) if isinstance(fold, Mapping) else None for p in ("train", "val")]
        if not all(isinstance(p, list) and all(isinstance(c, str) for c in p) for p in parts):
            raise FormatError(f"{where}, /{k}: an object with lists 'train' and 'val' is needed, got {fold!r:.80}")
        train, val = map(set, parts)
        for what, bad in (("unknown cases", (train | val) - set(ids)), ("cases that train and validate", train & val),
                          ("cases in neither part", set(ids) - train - val),
                          ("cases that validate in another fold, too", val & set(out))):
            if bad: problems.append(f"/{k}: {what}: {', '.join(sorted(bad)[:5])}{' ...'*(len(bad) > 5)}")
        out |= dict.fromkeys(val, k)
    if problems: raise DataError(_shown(problems, where))
    return out

# %%
labelled = abdomen.labelled("training")
splits = splits_of(labelled, case_ids(labelled))
assert folds_of(splits, case_ids(labelled)) == {"p3": 0, "p0": 0, "p1": 1, "p2": 2}
splits

# %%
with raises(DataError, match="2 problems .*/0: unknown cases: q; /0: cases in neither part: p2"):
    folds_of([{"train": ["p0", "p1"], "val": ["p3", "q"]}], case_ids(labelled))

# %% [markdown]
# ## To nnU-Net
# Version 2 knows three ways to find images: its folder layout `imagesTr/<case>_0000.nii.gz`, or a table `dataset` in
# `dataset.json` that says where files are. The table is the default here (`files="refer"`). `"link"` and `"copy"` make
# the layout, which version 1 needs. Links are hard links: a symbolic link that leads out of a data set's folder is
# refused by every reader of this library.
#
# What nnU-Net has no word for (cases without labels, test cases, fields of the user, the original wording) goes into a
# block `medvol_nb` that it ignores, so that the way back loses nothing. Things that may surprise are told in `notes`.

# %%
#| export
FileMode = Literal["refer", "link", "copy"]

def _suffix(path: str) -> str:
    known = sorted((s for f in FORMATS for s in f.suffixes), key=len, reverse=True)
    return next((s for s in known if path.lower().endswith(s)), os.path.splitext(path)[1])

def _channels(item: Mapping) -> list[str]: return [item["image"]] if isinstance(item["image"], str) else item["image"]

def _laid_out(dl: DataList) -> tuple[DataList, dict[str, str]]:
    "The list in nnU-Net's folder layout, and new name -> old name"
    moves: dict[str, str] = {}
    sections = {}
    for section, tail in (("training", "Tr"), ("testing", "Ts")):
        items, sections[section] = dl.items(section), []
        for item, case in zip(items, case_ids(items)):
            spare = "imagesUn" if tail == "Tr" and "label" not in item else f"images{tail}"
            images = [f"{spare}/{case}_{k:04}{_suffix(p)}" for k, p in enumerate(_channels(item))]
            new = {**item, "image": images[0] if isinstance(item["image"], str) else images}
            moves |= zip(images, _channels(item))
            if "label" in item:
                new["label"] = f"labels{tail}/{case}{_suffix(item['label'])}"
                moves[new["label"]] = item["label"]
            sections[section].append(new)
    return replace(dl, **{k: tuple(v) for k, v in sections.items()}), moves

def _uniform(dl: DataList) -> tuple[str, int]:
    "The one suffix and number of channels that nnU-Net demands"
    items = dl.labelled("training")
    endings = sorted({_suffix(p) for i in items for p in [*_channels(i), i["label"]]})
    counts = sorted({len(_channels(i)) for i in items})
    if len(endings) > 1 or len(counts) > 1 or not items:
        raise DataError(f"data list {dl.name!r} for nnU-Net: labelled cases of one file type and one number of "
                        f"channels are needed, got {len(items)} cases with {endings} and {counts} channels")
    return endings[0], counts[0]

# %%
#| export
def _block(dl: DataList, ids: Sequence[str]) -> dict[str, Any]:
    "What nnU-Net and MSD have no word for"
    more = {c: {k: v for k, v in i.items() if k not in ("image", "label", "fold")} for c, i in zip(ids, dl.training)}
    out = {"name": dl.name, "order": list(ids), "fields": {c: m for c, m in more.items() if m},
           "unlabelled": {c: i for c, i in zip(ids, dl.training) if "label" not in i}, "testing": list(dl.testing),
           "background": dl.label_dict.get(0), "original_label_dict": {str(k): v for k, v in
                                                                       dl.original_label_dict.items()},
           "training_transform": dl.training_transform, "validation_transform": dl.validation_transform,
           "extra": dl.extra}
    return {k: v for k, v in out.items() if v}

def _part(block: Mapping, key: str, kind: type) -> Any:
    "A part of the block, empty if it is not what it should be"
    return block[key] if isinstance(block.get(key), kind) else kind()

def _restore(dl: DataList, ids: Sequence[str], block: Any) -> DataList:
    "The list with what `_block` kept, as far as it still fits"
    if not isinstance(block, Mapping): return dl
    unlabelled, fields = _part(block, "unlabelled", dict), _part(block, "fields", dict)
    kept = {k: block[k] for k in ("original_label_dict", "training_transform", "validation_transform") if k in block}
    ours = parse_datalist({"training": list(unlabelled.values()), "testing": _part(block, "testing", list), **kept},
                          dl.name, f"{dl.name}, block medvol_nb")
    known = dict(zip(ids, dl.training)) | dict(zip(unlabelled, ours.training))
    known = {c: {**i, **{k: v for k, v in _part(fields, c, dict).items() if k not in i}} for c, i in known.items()}
    if problems := items_problems(list(known.values())): raise FormatError(_shown(problems, f"{dl.name}, medvol_nb"))
    order = [c for c in _part(block, "order", list) if c in known]
    names = {0: block["background"]} if isinstance(block.get("background"), str) else {}
    return replace(ours, training=tuple(known[c] for c in dict.fromkeys([*order, *known])),
                   testing=ours.testing or dl.testing, label_dict=names | dl.label_dict,
                   extra={**dl.extra, **_part(block, "extra", dict)})

# %%
#| export
def _nnunet_json(dl: DataList, ids: Sequence[str], version: int, at: Mapping[str, str] | None, channels: Sequence[str]
                 ) -> dict[str, Any]:
    "Content of dataset.json; `at` says where files are, None for the folder layout"
    ending, n = _uniform(dl)
    cases = [(c, i) for c, i in zip(ids, dl.training) if "label" in i]
    channel_names = {str(k): c for k, c in enumerate(channels)}
    if version == 1:
        out = {"name": dl.name, "description": "", "tensorImageSize": "4D" if n > 1 else "3D", "reference": "",
               "licence": "", "release": "", "modality": channel_names, "labels": _ids_to_names(dl.label_dict),
               "numTraining": len(cases), "numTest": len(dl.testing),
               "training": [{"image": f"./imagesTr/{c}{ending}", "label": f"./{i['label']}"} for c, i in cases],
               "test": [f"./imagesTs/{c}{ending}" for c in case_ids(dl.testing)]}
    else:
        out = {"name": dl.name, "channel_names": channel_names, "labels": _names_to_ids(dl.label_dict),
               "numTraining": len(cases), "file_ending": ending}
        regions = [v for v in out["labels"].values() if v]
        if any(isinstance(v, list) for v in regions): out["regions_class_order"] = list(range(1, len(regions) + 1))
        if at is not None: out["dataset"] = {c: {"images": [at[p] for p in _channels(i)], "label": at[i["label"]]}
                                             for c, i in cases}
    return out | {"medvol_nb": _block(dl, ids)}

def _nnunet_notes(dl: DataList, guessed: bool) -> list[str]:
    "What a user of nnU-Net should know"
    ids = sorted(i for i in dl.label_dict if i)
    found = dl.folds()
    notes = []
    if guessed: notes.append("channel 0 is called 'CT', by which nnU-Net chooses its normalisation (--channel-names)")
    if ids != list(range(1, len(ids) + 1)): notes.append(f"label ids {ids[:9]} are not 1, 2, 3, ... as nnU-Net demands")
    if n := len(dl.training) - len(dl.labelled("training")): notes.append(f"{n} cases without label are not trained on")
    if found and list(found) != list(range(len(found))): notes.append(f"folds {list(found)} leave gaps")
    return notes

def to_nnunet(
    dl: DataList, # the list
    out: str | os.PathLike, # nnU-Net's data set folder, such as 'Dataset007_Pancreas'; made if absent
    root: str | os.PathLike, # folder of the list's paths
    version: int = 2, # of nnU-Net, 1 or 2
    files: FileMode = "refer", # "refer": name files where they are; "link", "copy": fill nnU-Net's folders
    on_exists: OnExists = "error", # what to do with a dataset.json that is there already
    *,
    channel_names: Sequence[str] = (), # such as "CT", or "T1" "T2"; default: what the list says, or CT
    dry_run: bool = False, # True: check and tell, write nothing
) -> dict: # 'files' written, 'notes', 'n_training', 'n_testing', 'written'
    "Write dataset.json and splits_final.json for nnU-Net"
    out, root = Path(out), Path(root)
    if version not in (1, 2): raise ConfigError(f"version: nnU-Net 1 or 2, got {version!r}")
    if version == 1 and files == "refer":
        raise ConfigError("files: nnU-Net 1 finds images by its folder layout only, choose 'link' or 'copy'")
    n_channels = _uniform(dl)[1]
    said = dl.extra.get("channel_names") or dl.extra.get("modality")
    said = list(said.values()) if isinstance(said, Mapping) else []
    names = list(channel_names) or (said if len(said) == n_channels else [])
    guessed = not names
    if guessed: names = ["CT"] + [f"channel {k}" for k in range(1, n_channels)]
    if len(names) != n_channels: raise ConfigError(f"channel_names: {n_channels} channels, got names {names}")
    laid, moves = (dl, {}) if files == "refer" else _laid_out(dl)
    at = None
    if files == "refer":
        paths = {p for i in dl.labelled("training") for p in [*_channels(i), i["label"]]}
        at = {p: os.path.relpath(item_path(root, p, absolute=True).absolute(), out.absolute()) for p in paths}
    ids, labels = case_ids(laid.training), laid.labelled("training")
    content = _nnunet_json(laid, ids, version, at, names)
    splits = splits_of(labels, [c for c, i in zip(ids, laid.training) if "label" in i])
    outputs = {out/"dataset.json": content} | ({out/"splits_final.json": splits} if splits else {})
    result = {"path": str(out), "files": [str(p) for p in outputs], "notes": _nnunet_notes(dl, guessed),
              "n_training": len(dl.training), "n_testing": len(dl.testing), "written": False}
    if dry_run: return result
    if not out.is_dir():
        check_output(out)
        out.mkdir()
    if not all([check_output(p, on_exists) for p in outputs]): return result
    for folder in sorted({os.path.dirname(n) for n in moves}): (out/folder).mkdir(exist_ok=True)
    for new, old in progress(moves.items(), f"{files} images", total=len(moves), unit="files"):
        _bring(item_path(root, old, absolute=True), out/new, files)
    for p, content in reversed(outputs.items()): write_json(p, content, on_exists, indent=4)
    return result | {"written": True}

def _bring(source: Path, target: Path, files: str) -> None:
    "Put a file into nnU-Net's layout; what is there from an earlier run stays"
    if not source.exists(): raise MissingFile(f"{source} does not exist")
    if target.exists() and (files == "link" or os.path.getsize(target) == os.path.getsize(source)): return
    with atomic(target) as t:
        if files == "copy": shutil.copyfile(source, t)
        else:
            try: os.link(os.path.realpath(source), t)
            except OSError as e:
                raise DataError(f"{target}: cannot be linked to {source} ({e.strerror}). Hard links need one file "
                                "system; choose files='copy'") from e

# %%
with tmpdir() as d:
    told = to_nnunet(abdomen, d/"Dataset001_Abdomen", root)
    content = read_json(d/"Dataset001_Abdomen"/"dataset.json")
told["notes"], {k: content[k] for k in ("channel_names", "labels", "file_ending", "numTraining")}, \
    list(content["dataset"])

# %% [markdown]
# ## From nnU-Net
# The other direction reads `dataset.json` of either version, the splits beside it or where `splits` says, and looks
# into the folders where the file does not name images. Paths must stay inside `root`, which is the data set's folder
# unless another is named: a `dataset.json` from elsewhere cannot make a list read other people's files.

# %%
#| export
def _relative(path: Any, folder: Path, root: Path, at: str) -> str:
    "Path of dataset.json, as a path relative to `root`"
    if not isinstance(path, str) or not path: raise FormatError(f"{at}: a path is needed, got {path!r:.80}")
    if path.startswith("$"): raise DataError(f"{at}: path {path!r} begins with a variable. Write the path itself")
    if "://" in path: raise DataError(f"{at}: path {path!r} is an address, not a file")
    full = os.path.normpath(os.path.join(os.path.abspath(folder), path))
    name = os.path.relpath(full, os.path.abspath(root))
    if name.split(os.sep)[0] == os.pardir:
        raise DataError(f"{at}: path {path!r} leaves the folder {root}. If that is meant, name a common folder as root")
    try: item_path(root, name)
    except DataError as e: raise DataError(f"{at}: {e}") from None
    return name

def _tidied(item: Mapping, folder: Path, root: Path, at: str) -> dict:
    "The item with paths relative to `root`; supervoxels and pseudo labels of published lists may be absolute"
    def tidy(key: str, path: Any, where: str) -> Any:
        if isinstance(path, list): return [tidy(key, p, f"{where}/{n}") for n, p in enumerate(path)]
        if isinstance(path, str) and path.startswith("/") and key in ("label_sv", "pseudo_label"): return path
        return _relative(path, folder, root, where)
    return {k: tidy(k, v, f"{at}/{k}") if k in PATH_KEYS else v for k, v in item.items()}

def _by_layout(folder: Path, tail: str, ending: str, n: int) -> list[dict]:
    "Items of nnU-Net's folders imagesTr and labelsTr (or ..Ts)"
    images: dict[str, list[str]] = {}
    for p in sorted((folder/f"images{tail}").glob("*")):
        if (m := re.fullmatch(r"(.+)_(\d{4})", p.name.removesuffix(ending))) and p.name.endswith(ending):
            images.setdefault(m[1], []).append(f"images{tail}/{p.name}")
    labels = {p.name.removesuffix(ending): f"labels{tail}/{p.name}" for p in sorted((folder/f"labels{tail}").glob("*"))
              if p.name.endswith(ending)}
    wrong = [c for c in labels if len(images.get(c, ())) != n] + [c for c in images if c not in labels and tail == "Tr"]
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} cases lack a label or one of {n} channels: {', '.join(wrong[:9])}")
    return [{"image": v[0] if n == 1 else v, **({"label": labels[c]} if c in labels else {})}
            for c, v in images.items()]

def _entries(data: Mapping, section: str, where: str) -> list:
    "Entries of a section of dataset.json, none if it is not there"
    found = data.get(section, [])
    if not isinstance(found, list): raise FormatError(f"{where}, /{section}: a list is needed, got {found!r:.80}")
    return found

def _listed(entries: list, folder: Path, root: Path, n: int, where: str) -> list[dict]:
    "Items of version 1's lists, whose image names lack the channel number that the files carry"
    items = []
    for k, entry in enumerate(entries):
        entry = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping):
            raise FormatError(f"{where}/{k}: an object or a path is needed, got {entry!r:.80}")
        item = {key: _relative(entry[key], folder, root, f"{where}/{k}/{key}") for key in ("image", "label")
                if key in entry}
        if "image" not in item: raise FormatError(f"{where}/{k}: 'image' is missing")
        end = _suffix(item["image"])
        numbered = [f"{item['image'].removesuffix(end)}_{c:04}{end}" for c in range(n)]
        if not (root/item["image"]).exists() and all((root/p).exists() for p in numbered):
            item["image"] = numbered[0] if n == 1 else numbered
        items.append(item)
    return items

# %%
#| export
def from_nnunet(
    source: str | os.PathLike, # nnU-Net's data set folder, or its dataset.json
    root: str | os.PathLike | None = None, # folder that paths shall be relative to; default: the data set's folder
    splits: str | os.PathLike | None = None, # splits_final.json; default: the one beside dataset.json, if any
    name: str | None = None, # data set name; default: what dataset.json says, or the folder
) -> DataList: # paths relative to `root`
    "Read an nnU-Net data set of version 1 or 2 with its splits"
    source = Path(source)
    file = source/"dataset.json" if source.is_dir() else source
    folder, where, data = file.parent, str(file), read_json(file)
    root = folder if root is None else Path(root)
    if not isinstance(data, Mapping): raise FormatError(f"{where}: an object is needed, got {data!r:.80}")
    channels = data.get("channel_names", data.get("modality", {"0": "?"}))
    n = max(1, len(channels)) if isinstance(channels, Mapping) else 1
    ending, testing = str(data.get("file_ending", ".nii.gz")), []
    if isinstance(data.get("dataset"), Mapping):
        training, ids = [], list(data["dataset"])
        for case, entry in data["dataset"].items():
            at, entry = f"{where}, /dataset/{case}", entry if isinstance(entry, Mapping) else {}
            images = entry.get("images")
            if not isinstance(images, list) or not images: raise FormatError(f"{at}/images: a list of paths is needed")
            images = [_relative(p, folder, root, f"{at}/images/{k}") for k, p in enumerate(images)]
            training.append({"image": images[0] if len(images) == 1 else images,
                             "label": _relative(entry.get("label"), folder, root, f"{at}/label")})
        if root == folder: testing = _by_layout(folder, "Ts", ending, n)
    elif isinstance(data.get("training"), list):
        training = _listed(data["training"], folder, root, n, f"{where}, /training")
        testing = _listed(_entries(data, "test", where), folder, root, n, f"{where}, /test")
        ids = [stem_of(i["label"] if "label" in i else i["image"]) for i in training]
    else:
        training, testing = ([_tidied(i, folder, root, where) for i in _by_layout(folder, tail, ending, n)]
                             for tail in ("Tr", "Ts"))
        ids = case_ids(training)
    if splits is not None and not Path(splits).exists(): raise MissingFile(f"splits: {splits} does not exist")
    splits = Path(splits) if splits is not None else folder/"splits_final.json"
    if splits.exists():
        folds = folds_of(read_json(splits), ids, str(splits))
        training = [i | ({"fold": folds[c]} if c in folds else {}) for i, c in zip(training, ids)]
    elif splits.with_suffix(".pkl").exists():
        log.warning("%s is a pickle, which can execute code and is not read: the list has no folds. nnU-Net 2 writes "
                    "splits_final.json", splits.with_suffix(".pkl"))
    extra = {"channel_names": dict(channels)} if "channel_names" in data else {}
    label_dict = {str(k): v for k, v in _label_names(data.get("labels", {}), where).items()}
    dl = parse_datalist({"training": training, "testing": testing, "label_dict": label_dict, **extra},
                        name or str(data.get("name") or folder.absolute().name), where, absolute=False)
    return _without_guess(_restore(dl, ids, data.get("medvol_nb")), data.get("medvol_nb"))

def _without_guess(dl: DataList, block: Any) -> DataList:
    "Channel names that our own writer made up are not kept"
    made_up = isinstance(block, Mapping) and "channel_names" not in (block.get("extra") or {})
    return replace(dl, extra={k: v for k, v in dl.extra.items() if k != "channel_names"}) if made_up else dl

# %%
with tmpdir() as d:
    to_nnunet(abdomen, d/"Dataset001_Abdomen", root)
    back = from_nnunet(d/"Dataset001_Abdomen", root)
    with raises(DataError, match="leaves the folder .*If that is meant"): from_nnunet(d/"Dataset001_Abdomen")
    to_nnunet(abdomen, d/"Task001", root, version=1, files="link")
    linked = from_nnunet(d/"Task001", name="Abdomen")
    layout = sorted(p.relative_to(d/"Task001").as_posix() for p in (d/"Task001").rglob("*") if p.is_file())
layout

# %%
assert back == abdomen
assert linked.folds() == abdomen.folds() and linked.label_dict == abdomen.label_dict
assert [case_ids([i])[0] for i in linked.items()] == [case_ids([i])[0] for i in abdomen.items()]
assert linked.training[2] == {"image": "imagesTr/p1_0000.nii.gz", "label": "labelsTr/p1.nii.gz", "fold": 1, "site": "B",
                              "age": 63}

# %% [markdown]
# ## The Decathlon's layout
# A `dataset.json` of the Medical Segmentation Decathlon names images and labels, ids and their names, and test images
# without labels. MONAI's readers accept any further field in an item, so folds and all the rest stay where they are.

# %%
#| export
def to_msd(
    dl: DataList, # the list
    out: str | os.PathLike, # JSON file, 'dataset.json' by custom
    on_exists: OnExists = "error", # what to do when `out` is there already
    *,
    dry_run: bool = False, # True: check and tell, write nothing
) -> dict: # 'files' written, 'notes', 'n_training', 'n_testing', 'written'
    "Write a list in the layout of the Medical Segmentation Decathlon"
    keep = ("training_transform", "validation_transform", "original_label_dict", "background")
    block = {k: v for k, v in _block(dl, range(len(dl.training))).items() if k in keep}
    extra = {k: v for k, v in dl.extra.items() if k not in ("numTraining", "numTest", "training", "test", "labels")}
    data = {"name": dl.name, "description": "", "tensorImageSize": "3D", "modality": {"0": "CT"}} | extra
    data |= {"labels": _ids_to_names(dl.label_dict), "numTraining": len(dl.training), "numTest": len(dl.testing),
             "training": list(dl.training), "medvol_nb": block,
             "test": [i["image"] if list(i) == ["image"] and isinstance(i["image"], str) else i for i in dl.testing]}
    block["added"] = [k for k in ("description", "tensorImageSize", "modality") if k not in extra]
    notes = [] if "modality" in extra else ["the modality is given as CT"]
    result = {"path": str(out), "files": [str(out)], "notes": notes, "n_training": len(dl.training),
              "n_testing": len(dl.testing), "written": False}
    if dry_run or not check_output(out, on_exists): return result
    write_json(out, data, on_exists, indent=4)
    return result | {"written": True}

def from_msd(
    source: str | os.PathLike, # JSON file, or the folder of dataset.json
    root: str | os.PathLike | None = None, # folder that paths shall be relative to; default: that of the file
    name: str | None = None, # data set name; default: what the file says
) -> DataList: # paths relative to `root`
    "Read a list in the layout of the Medical Segmentation Decathlon"
    file = Path(source)/"dataset.json" if Path(source).is_dir() else Path(source)
    where, data = str(file), read_json(file)
    if not isinstance(data, Mapping) or not isinstance(data.get("training"), list):
        raise FormatError(f"{where}: an object with a list 'training' is needed")
    root, block = file.parent if root is None else Path(root), data.get("medvol_nb")
    block = dict(block) if isinstance(block, Mapping) else {}

    def items(section: str) -> list[Any]:
        items = [{"image": i} if isinstance(i, str) else i for i in _entries(data, section, where)]
        return [_tidied(i, file.parent, root, f"{where}, /{section}/{n}") if isinstance(i, Mapping) else i
                for n, i in enumerate(items)]
    label_dict = {str(k): v for k, v in _label_names(data.get("labels", {}), where).items()}
    if isinstance(block.get("background"), str): label_dict = {"0": block["background"]} | label_dict
    known = {"training", "test", "testing", "labels", "numTraining", "numTest", "name", "medvol_nb"}
    extra = {k: v for k, v in data.items() if k not in known | set(block.get("added", ()))}
    if isinstance(extra.get("validation"), list): extra["validation"] = items("validation")
    ours = {k: block[k] for k in ("original_label_dict", "training_transform", "validation_transform") if k in block}
    return parse_datalist({"training": items("training"), "testing": [*items("test"), *items("testing")],
                           "label_dict": label_dict, **ours, **extra},
                          name or str(data.get("name") or file.absolute().parent.name), where)


# %%
with tmpdir() as d:
    to_msd(abdomen, d/"dataset.json")
    back, content = from_msd(d), read_json(d/"dataset.json")
assert back == abdomen
{k: content[k] for k in ("modality", "labels", "numTraining", "test")}, content["training"][2]

# %%
with tmpdir() as d:
    write_json(d/"dataset.json", {"name": "Spleen", "modality": {"0": "CT"},
                                  "labels": {"0": "background", "1": "spleen"},
                                  "training": [{"image": "./imagesTr/s2.nii.gz", "label": "./labelsTr/s2.nii.gz"}],
                                  "test": ["./imagesTs/s1.nii.gz"], "numTraining": 1, "numTest": 1})
    spleen = from_msd(d)
    write_json(d/"dataset.json", {"training": [{"image": "../../secret.nii.gz"}]})
    with raises(DataError, match="/training/0/image: path '../../secret.nii.gz' leaves the folder"): from_msd(d)
assert spleen.items() == ({"image": "imagesTr/s2.nii.gz", "label": "labelsTr/s2.nii.gz"},
                          {"image": "imagesTs/s1.nii.gz"}) and spleen.label_dict == {1: "spleen"}
spleen

# %% [markdown]
# ## Tables
# One row a case, one column a field, an empty cell for what is absent. Text is written as it is. A cell that is not
# text (a number, a list of channels), and text that would look like one, is written in JSON, so that `007` stays text
# and `7` stays a number. Label names are a second small table beside the first. A name that ends in `.parquet` gives
# that format, if pyarrow is installed.

# %%
#| export
_COLUMNS = ("section", *ITEM_KEYS)

def _to_cell(key: str, value: Any) -> str:
    if not isinstance(value, str): return to_json(value, indent=None)
    if key in PATH_KEYS: special = value[:1] in '["' or not value
    else:
        try: special, _ = True, json.loads(value)
        except ValueError: special = not value
    return to_json(value, indent=None) if special else value

def _from_cell(key: str, cell: str, at: str) -> Any:
    if key in ("fold", "pseudo_label_reliability"):
        if not re.fullmatch(r"\d{1,9}(\.0)?", cell): raise FormatError(f"{at}: a whole number is needed, got {cell!r}")
        return int(cell.removesuffix(".0"))
    if key in PATH_KEYS and cell[:1] not in '["': return cell
    try: value = json.loads(cell, parse_constant=lambda name: name)
    except ValueError: return cell
    return cell if value in (float("inf"), -float("inf")) else value

def _labels_beside(path: Path) -> Path: return path.with_name(f"{path.stem}.labels.csv")

def _parquet() -> Any:
    try: import pyarrow.parquet as parquet
    except ImportError: raise MissingExtra("Parquet files need pyarrow: pip install pyarrow. Or write .csv") from None
    return parquet

# %%
#| export
def to_csv(
    dl: DataList, # the list
    out: str | os.PathLike, # .csv or .parquet; label names go to '<name>.labels.csv' beside it
    on_exists: OnExists = "error", # what to do when `out` is there already
    *,
    dry_run: bool = False, # True: check and tell, write nothing
) -> dict: # 'files' written, 'notes', 'n_training', 'n_testing', 'written'
    "Write a list as a table"
    out = Path(out)
    own = [k for k in dict.fromkeys(k for i in dl.items() for k in i) if k not in ITEM_KEYS]
    if "section" in own: raise DataError("to_csv: a field named 'section' has no place in the table. Rename it")
    rows = [{"section": s} | {k: _to_cell(k, i[k]) if k in i else "" for k in (*ITEM_KEYS, *own)}
            for s in ("training", "testing") for i in dl.items(s)]
    ids = sorted({*dl.label_dict, *dl.original_label_dict})
    names = [{"id": i, "name": dl.label_dict.get(i, ""), "original_name": dl.original_label_dict.get(i, "")}
             for i in ids]
    lost = [k for k in ("training_transform", "validation_transform", "extra") if getattr(dl, k)]
    result = {"path": str(out), "files": [str(out), *([str(_labels_beside(out))] if names else [])],
              "notes": [f"a table does not hold {', '.join(lost)}"] if lost else [], "n_training": len(dl.training),
              "n_testing": len(dl.testing), "written": False}
    parquet = _parquet() if out.suffix == ".parquet" else None
    if dry_run or not all([check_output(p, on_exists) for p in result["files"]]): return result
    if names: write_csv(_labels_beside(out), names, on_exists=on_exists)
    elif on_exists == "overwrite": _labels_beside(out).unlink(missing_ok=True) # would be read with this list
    if parquet is None: write_csv(out, rows, [*_COLUMNS, *own], on_exists)
    else:
        import pyarrow
        table = pyarrow.table({c: pyarrow.array([r[c] or None for r in rows], pyarrow.string())
                               for c in (*_COLUMNS, *own)})
        with atomic(out, on_exists) as t: parquet.write_table(table, t)
    return result | {"written": True}

def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix != ".parquet": return read_csv(path, ["image"])
    if not path.is_file(): raise MissingFile(f"{path} does not exist")
    rows = _parquet().read_table(path).to_pylist()
    if rows and "image" not in rows[0]: raise FormatError(f"{path}: column 'image' is missing, found {list(rows[0])}")
    return [{k: v if isinstance(v, str) else "" if v is None or v != v else to_json(v, indent=None)
             for k, v in r.items()} for r in rows]

def from_csv(
    source: str | os.PathLike, # .csv or .parquet with a column 'image'; further columns become fields
    name: str | None = None, # data set name; default: the file's
) -> DataList: # with the label names of '<name>.labels.csv', if that is there
    "Read a list from a table"
    source = Path(source)
    sections: dict[str, list] = {"training": [], "testing": []}
    for n, row in enumerate(_rows(source)):
        at = f"{source}, case {n + 1}"
        section = row.pop("section", "") or "training"
        if section not in sections: raise FormatError(f"{at}, section: training or testing, got {section!r}")
        sections[section].append({k: _from_cell(k, v, f"{at}, {k}") for k, v in row.items() if v != ""})
    labels: dict[str, dict[str, str]] = {"label_dict": {}, "original_label_dict": {}}
    if (beside := _labels_beside(source)).is_file():
        for row in read_csv(beside, ["id", "name"]):
            for key, column in (("label_dict", "name"), ("original_label_dict", "original_name")):
                if row.get(column): labels[key][row["id"]] = row[column]
    return parse_datalist({**sections, **labels}, name or dataset_name_of(source.with_suffix(".json")), str(source))

# %%
with tmpdir() as d:
    told = to_csv(abdomen, d/"Abdomen.csv")
    text, back = (d/"Abdomen.csv").read_text(encoding="utf-8"), from_csv(d/"Abdomen.csv")
print(text)
assert back == abdomen

# %% [markdown]
# Cells that could be taken for something else:

# %%
odd = DataList("odd", ({"image": ["t1.nii", "t2.nii"], "id": "007", "n": 7, "s": "7", "empty": "", "yes": True,
                        "quoted": 'say "x", y', "none": None}, {"image": "[1].nii.gz", "list": [1, "a"], "t": "true"}))
with tmpdir() as d:
    to_csv(odd, d/"odd.csv")
    assert from_csv(d/"odd.csv") == odd
    (d/"mine.csv").write_text("image,fold,age\na.nii.gz,0.0,63\nb.nii.gz,,\n")
    mine = from_csv(d/"mine.csv")
    (d/"bad.csv").write_text("image,fold\na.nii.gz,zero\n")
    with raises(FormatError, match="bad.csv, case 1, fold: a whole number is needed, got 'zero'"): from_csv(d/"bad.csv")
mine.training

# %% [markdown]
# ## One command
# `convert` finds out what the source is and writes what is asked for; `medvol datalists convert` is the same on the
# command line. A folder with a `dataset.json` is nnU-Net's if it names a `file_ending`, has splits or numbered channel
# files, and the Decathlon's otherwise.

# %%
#| export
Kind = Literal["list", "nnunet", "msd", "csv"]

def kind_of(
    source: str | os.PathLike, # file or folder
) -> str: # "list", "nnunet", "msd" or "csv"
    "What sort of data list a file or folder is"
    path = Path(source)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    if path.suffix in (".csv", ".parquet"): return "csv"
    file = path/"dataset.json" if path.is_dir() else path
    if not file.is_file(): raise MissingFile(f"{path} holds no dataset.json")
    data = read_json(file)
    if not isinstance(data, Mapping): raise FormatError(f"{file}: an object is needed, got {data!r:.80}")
    if data.keys() & {"file_ending", "channel_names", "dataset"}: return "nnunet"
    if "labels" in data or "modality" in data:
        splits = any((file.parent/f"splits_final.{e}").exists() for e in ("json", "pkl"))
        return "nnunet" if splits or next((file.parent/"imagesTr").glob("*_0000.*"), None) else "msd"
    return "list"

def read_any(
    source: str | os.PathLike, # data list, nnU-Net or Decathlon folder or dataset.json, table
    root: str | os.PathLike | None = None, # folder that paths shall be relative to; default: that of the source
    name: str | None = None, # data set name; default: what the source says
    kind: Kind | Literal["auto"] = "auto", # what the source is
) -> DataList: # paths relative to `root`; those of lists and tables as they are
    "Read a data list of any supported kind"
    kind = kind_of(source) if kind == "auto" else kind
    if kind == "nnunet": return from_nnunet(source, root, name=name)
    if kind == "msd": return from_msd(source, root, name)
    if kind == "csv": return from_csv(source, name)
    if kind != "list": raise ConfigError(f"kind: auto, list, nnunet, msd or csv, got {kind!r}")
    dl = read_datalist(source)
    return dl if name is None else replace(dl, name=name)

def convert(
    source: str | os.PathLike, # data list, nnU-Net or Decathlon folder or dataset.json, .csv or .parquet table
    out: str | os.PathLike, # what to write: a file, or the data set folder for nnU-Net
    *,
    to: Kind = "list", # what to make: a data list, nnunet, msd (Decathlon), csv (or Parquet, by the name)
    root: str | os.PathLike | None = None, # folder of the images, which paths are relative to; default: the source's
    name: str | None = None, # data set name; default: what the source says
    kind: Literal["auto", "list", "nnunet", "msd", "csv"] = "auto", # what the source is
    version: int = 2, # of nnU-Net, 1 or 2
    files: FileMode = "refer", # for nnU-Net: refer to images where they are, or link or copy them into its folders
    channel_names: Sequence[str] = (), # for nnU-Net: such as "CT", or "T1" "T2"
    on_exists: OnExists = "error", # what to do when `out` is there already
    dry_run: bool = False, # check and tell, write nothing
) -> dict: # 'kind', 'to', 'files', 'notes', 'n_training', 'n_testing', 'n_classes', 'folds', 'written'
    "Convert a data list between formats, keeping pairs, folds and label names"
    found = kind_of(source) if kind == "auto" else kind
    dl = read_any(source, root, name, found)
    if root is None: root = source if Path(source).is_dir() else Path(source).parent
    if to == "nnunet":
        result = to_nnunet(dl, out, root, version, files, on_exists, channel_names=channel_names, dry_run=dry_run)
    elif to == "msd": result = to_msd(dl, out, on_exists, dry_run=dry_run)
    elif to == "csv": result = to_csv(dl, out, on_exists, dry_run=dry_run)
    elif to == "list":
        written = write_datalist(dl, out, on_exists, dry_run=dry_run)["written"]
        result = {"path": str(out), "files": [str(out)], "notes": [], "n_training": len(dl.training),
                  "n_testing": len(dl.testing), "written": written}
    else: raise ConfigError(f"to: list, nnunet, msd or csv, got {to!r}")
    return {"kind": found, "to": to, **result, "n_classes": len(dl.label_dict), "folds": dl.folds()}

# %% [markdown]
# ## Putting it together
# A list goes to nnU-Net, from there to a table, to the Decathlon's layout, and back. The picture shows the pairs and
# folds after every step as a matrix, case by case (yellow with label, grey without; the last column is "no fold"). All
# four are the same.

# %%
with tmpdir() as d:
    write_datalist(abdomen, d/"Abdomen_5_folds.json")
    steps = [convert(d/"Abdomen_5_folds.json", d/"Dataset001_Abdomen", to="nnunet", root=root),
             convert(d/"Dataset001_Abdomen", d/"Abdomen.csv", to="csv", root=root),
             convert(d/"Abdomen.csv", root/"dataset.json", to="msd"),
             convert(root, d/"again.json", name="Abdomen")]
    lists = [read_any(p, root) for p in (d/"Dataset001_Abdomen", d/"Abdomen.csv", root/"dataset.json", d/"again.json")]
    same = (d/"again.json").read_bytes() == (d/"Abdomen_5_folds.json").read_bytes()

fig, axs = plt.subplots(1, 4, figsize=(7, 1.7), sharey=True)
for ax, dl, title in zip(axs, lists, ("nnU-Net", "table", "Decathlon", "list")):
    table = np.full((len(abdomen.items()), 4), -1.0)
    for r, i in enumerate(dl.items()): table[r, i.get("fold", 3)] = "label" in i
    ax.pcolormesh(table[::-1], cmap="cividis", edgecolors="w", linewidth=1, vmin=-1, vmax=1)
    ax.set_xticks(np.arange(4) + 0.5, [0, 1, 2, "-"])
    ax.set_title(title, fontsize=8)
    ax.set_xlabel("fold", fontsize=7)
axs[0].set_yticks(np.arange(6) + 0.5, case_ids(abdomen.items())[::-1]);

# %%
assert same and all(dl.items() == abdomen.items() and dl.label_dict == abdomen.label_dict for dl in lists)
steps[0]

# %%
place.cleanup()
