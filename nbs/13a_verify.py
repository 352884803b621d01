# %% [markdown]
# # Verification
#
# > Everything that is wrong with a multi-dataset list, in one table, before a model is trained on it.
#
# Shifted pairs, labels on another grid, a truncated file among ten thousand, the same patient in training and test:
# each is silent, and each costs weeks. The page before looks at one pair at a time. Some mistakes no pair shows: a
# case that two lists hold under two names, a person in two folds, a crop that claims to be where it is not. This page
# puts all of it in one table, never stopping at the first finding.

# %%
#| default_exp verify

# %%
#| export
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.checks import Finding, Level, check_pairs
from medvol_nb.core import ConfigError, DataError, FormatError, MedvolError, OnExists, write_csv, write_json
from medvol_nb.datalists import DataList, item_path, read_datalist
from medvol_nb.labels import LabelSpace
from medvol_nb.splits import group_keys
from medvol_nb.volume import format_of, locate_crop, read_header, read_volume, to_world

# %%
from medvol_nb import phantoms
from medvol_nb.core import tmpdir
from medvol_nb.datalists import write_datalist
from medvol_nb.volume import Volume, affine_from, reorient, write_volume

# %% [markdown]
# ## Across lists
# Two questions no single pair can answer. Is the same scan in training and in test, perhaps under another name in
# another dataset? Is the same person in two folds? Content is compared by checksum and length, and confirmed by reading
# both files. Persons are known by a `subject` field of the item, or by a pattern on the file's name.

# %%
#| export
@dataclass(frozen=True)
class _Task:
    "One pair to look at, and where it stands"
    dataset: str
    item: str # such as 'training/17'
    role: str # key of the second file: 'label', 'pseudo_label', 'label_sv'
    image: str # path
    label: str | None # path
    shown: tuple[str, str] # both as the list names them
    fold: Any # of the item; 'test' in the test section
    subject: str | None

def _subjects(dl: DataList, pattern: str | None) -> list[str | None]:
    "Person of each item, training before testing; None where neither a field nor the pattern tells"
    items = dl.items()
    bare = [i for i in items if "subject" not in i]
    try: found = iter([None]*len(bare) if pattern is None else group_keys(bare, pattern))
    except (ConfigError, DataError) as e: raise type(e)(f"subject, data set {dl.name!r}: {e}") from None
    return [str(i["subject"]) if "subject" in i else next(found) for i in items]

def _tasks(dl: DataList, root: Path, subject: str | None, found: list[Finding]) -> list[_Task]:
    "Pairs of a list, with a finding for each name that may not be used"
    out, people = [], iter(_subjects(dl, subject))
    for section, items in (("training", dl.training), ("testing", dl.testing)):
        for n, (item, person) in enumerate(zip(items, people)):
            where, paths = f"{section}/{n}", {}
            for key in ("image", "label", "pseudo_label", "label_sv"):
                names = item.get(key)
                for k, name in enumerate(names if isinstance(names, list) else [names] if names is not None else []):
                    try: paths[key, k] = str(item_path(root, name)), name
                    except DataError as e: found.append(Finding("E106", dl.name, where, str(name), str(e)))
            if ("image", 0) not in paths: continue
            image, fold = paths["image", 0], "test" if section == "testing" else item.get("fold")
            seconds = [(key, *paths[key, 0]) for key in ("label", "pseudo_label", "label_sv") if (key, 0) in paths]
            for key, path, name in seconds or [("label", None, "")]:
                out.append(_Task(dl.name, where, key, image[0], path, (image[1], name), fold, person))
            for (key, k), (path, name) in paths.items():
                if key == "image" and k:
                    out.append(_Task(dl.name, where, "label", path, None, (name, ""), fold, person))
    return out

def _repeats(tasks: Sequence[_Task], found: list[Finding]) -> None:
    "Duplicate names in a list, and files used in two roles"
    for name in {t.dataset for t in tasks}:
        mine = [t for t in tasks if t.dataset == name]
        images = defaultdict(set)
        for t in mine: images[t.image].add(t.item)
        labels = {t.label for t in mine if t.label}
        for t in {t.image: t for t in reversed(mine)}.values():
            if len(images[t.image]) > 1:
                listed = ", ".join(sorted(images[t.image]))
                found.append(Finding("E103", name, t.item, t.shown[0], f"the image is in {listed}"))
            if t.image in labels: found.append(Finding("E104", name, t.item, t.shown[0], "is an image and a label"))

def _unused(tasks: Sequence[_Task], roots: Mapping[str, Path], found: list[Finding]) -> None:
    "Volume files beside the listed ones that no list mentions"
    used = {os.path.abspath(p) for t in tasks for p in (t.image, t.label) if p}
    for name, root in roots.items():
        folders = sorted({os.path.dirname(p) for t in tasks if t.dataset == name for p in (t.image, t.label) if p})
        for folder in folders:
            left = []
            for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                path = os.path.join(folder, entry)
                try: known = not entry.startswith(".") and os.path.isfile(path) and bool(format_of(path).suffixes)
                except FormatError: known = False
                if known and os.path.abspath(path) not in used: left.append(entry)
            if left:
                more = f" and {len(left) - 5} more" if len(left) > 5 else ""
                listed = f"{len(left)} files: {', '.join(left[:5])}{more}"
                found.append(Finding("W105", name, "", os.path.relpath(folder, root), listed))

# %%
#| export
def _is_same(a: str, b: str) -> bool:
    "Confirm equal voxels by reading both files"
    try: x, y = read_volume(a), read_volume(b)
    except (MedvolError, OSError): return False
    return x.data.shape == y.data.shape and np.array_equal(x.data, y.data)

def _leaks(tasks: Sequence[_Task], ids: Sequence[int], found: list[Finding]) -> None:
    "Same content, or same person, on both sides of a split"
    seen: dict[int, _Task] = {}
    for t, i in zip(tasks, ids):
        if not i: continue
        first = seen.setdefault(i, t)
        if first.image == t.image or not _is_same(first.image, t.image): continue
        where = f"same voxels as dataset '{first.dataset}' {first.item} {first.shown[0]}"
        if (first.fold == "test") != (t.fold == "test") or (first.dataset == t.dataset and first.fold != t.fold):
            found.append(Finding("E401", t.dataset, t.item, t.shown[0], f"{where} ({_fold(first)} and {_fold(t)})"))
        else: found.append(Finding("W403", t.dataset, t.item, t.shown[0], where))
    people = defaultdict(dict)
    for t in tasks:
        if t.subject is not None: people[t.dataset, t.subject].setdefault(t.fold, t)
    for (dataset, person), places in people.items():
        if len(places) > 1:
            listed = ", ".join(f"{_fold(t)} ({t.item})" for t in places.values())
            t = next(iter(places.values()))
            found.append(Finding("E402", dataset, t.item, t.shown[0], f"subject '{person}' is in {listed}"))

def _fold(t: _Task) -> str:
    return "test" if t.fold == "test" else "training" if t.fold is None else f"fold {t.fold}"

def _forgotten_crops(tasks: Sequence[_Task], facts: Sequence[Mapping], found: list[Finding]) -> None:
    "Images that start at the same place as a larger one although they were cut out of its middle"
    groups = defaultdict(dict)
    for t, f in zip(tasks, facts):
        if "image" not in f or f["image"]["channels"] > 1: continue
        groups[t.dataset, tuple(f["image"]["spacing"])].setdefault(t.image, (t, f))
    for members in groups.values():
        members = sorted(members.values(), key=lambda m: -np.prod(m[1]["image"]["shape"]))
        if not 2 <= len(members) <= 32: continue
        for n, (part, facts_part) in enumerate(members):
            for whole, facts_whole in members[:n]:
                sizes = np.array(facts_whole["image"]["shape"]), np.array(facts_part["image"]["shape"])
                if (sizes[0] == sizes[1]).sum() < 2 or (sizes[0] < sizes[1]).any() or (sizes[0] == sizes[1]).all():
                    continue
                a, b = read_header(whole.image), read_header(part.image)
                if not np.allclose(a.affine, b.affine, atol=1e-3): continue
                a, b = read_volume(whole.image), read_volume(part.image)
                start = locate_crop(a, b)
                if start is not None and any(start):
                    off = to_world(a.affine, start) - b.affine[:3, 3]
                    text = (f"holds the voxels of {whole.shown[0]} from index {start} on, but its origin says "
                            f"{np.round(-off, 1).tolist()} mm away from there")
                    found.append(Finding("W309", part.dataset, part.item, part.shown[0], text))

# %% [markdown]
# ## The report
# One table of all findings, in the order of the lists, the same for any number of workers.

# %%
#| export
@dataclass(frozen=True)
class Report:
    "Result of a verification"
    ok: bool # nothing as bad as `fail_on`
    level: str # how deep it looked
    pairs: int # image-label pairs looked at
    counts: dict[str, int] # code -> findings
    findings: list[dict[str, str]] # rows of the table

    def __str__(self) -> str:
        lines = [f"{r['code']} {r['dataset']} {r['item']} {r['path']}: {r['finding']}" for r in self.findings]
        return "\n".join([*lines, f"{self.pairs} pairs, level {self.level}, {len(lines)} findings"])

# %%
#| export
def roots_for(
    names: Sequence[str], # of the lists
    files: Sequence[Path], # of the lists
    root: str | os.PathLike | None, # one folder for all, or a folder with a subfolder for each, or None
) -> dict[str, Path]: # dataset -> folder its names are relative to
    "Where the files of each list are: `root/<name>` if that exists, else `root`, else the list's own folder"
    out = {}
    for name, file in zip(names, files):
        if root is None: out[name] = file.parent
        else: out[name] = Path(root)/name if (Path(root)/name).is_dir() else Path(root)
    return out

def verify(
    datalists: Sequence[str | os.PathLike], # list files
    *,
    root: str | os.PathLike | None = None, # folder of the data, or with a subfolder per dataset; default: the lists'
    level: Level = "header", # 'exists': files are there, 'header': sizes and grids, 'full': every voxel
    fail_on: Literal["error", "warning", "never"] = "error", # what makes the report not ok
    subject: str | None = None, # pattern on image names whose group is the person, such as '(sub-[0-9]+)'
    space: str | os.PathLike | None = None, # label_space.json to check as well
    workers: int = 0, # processes; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers see the same files
    cache: str | os.PathLike | None = None, # folder that remembers results; unchanged files are not read again
    out: str | os.PathLike | None = None, # folder for findings.csv and report.json
    on_exists: OnExists = "overwrite", # what to do when `out` holds an earlier report
    limit: int | None = None, # look only at so many items of each list
) -> Report: # all findings
    "Check lists and their files: everything that is wrong, in one table"
    if level not in ("exists", "header", "full"):
        raise ConfigError(f"level: must be exists, header or full, got {level!r}")
    files = [Path(p) for p in datalists]
    lists = [read_datalist(p) for p in files]
    names = [dl.name for dl in lists]
    if len(set(names)) < len(names): raise DataError(f"two lists have the same name: {sorted(names)}")
    if limit is not None:
        lists = [replace(dl, training=dl.training[:limit], testing=dl.testing[:limit]) for dl in lists]
    roots, findings = roots_for(names, files, root), []
    tasks = [t for dl in lists for t in _tasks(dl, roots[dl.name], subject, findings)]
    _repeats(tasks, findings)
    if limit is None: _unused(tasks, roots, findings)
    done = check_pairs([(t.image, t.label) for t in tasks], level, workers=workers, dask=dask, cache=cache)
    for k, rows in done.found.items():
        t = tasks[k]
        for code, role, text in rows:
            path = t.shown[0] if role == "image" else t.shown[1]
            text = text if role == "image" or t.role == "label" else f"{t.role} {text}"
            findings.append(Finding(code, t.dataset, t.item, path, text))
    _leaks(tasks, done.ids[:, 0].tolist(), findings)
    if level == "full":
        for dl in lists:
            _check_classes(dl, [(t, f) for t, f in zip(tasks, done.facts) if t.dataset == dl.name], findings)
        _forgotten_crops(tasks, done.facts, findings)
    if space is not None:
        findings += [Finding(c, "", "", str(space), t) for c, t in LabelSpace.load(space).problems(names)]
    place = {n: k for k, n in enumerate(names)}
    def order(f: Finding) -> tuple:
        section, _, number = f.item.partition("/")
        return place.get(f.dataset, -1), section != "training", int(number) if number else -1, f.code, f.path, f.message
    findings = sorted(set(findings), key=order)
    counts = dict(sorted(Counter(f.code for f in findings).items()))
    bad = {"error": "E", "warning": "EW", "never": ""}[fail_on]
    report = Report(not any(c[0] in bad for c in counts), level, len(tasks), counts, [f.row() for f in findings])
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_csv(Path(out)/"findings.csv", report.findings, list(Finding("E101", "", "", "", "").row()), on_exists)
        write_json(Path(out)/"report.json", report, on_exists)
    return report

def _check_classes(dl: DataList, done: list, found: list[Finding]) -> None:
    "Label values against the label dictionary"
    if not dl.label_dict: return
    present: set[int] = set()
    for t, facts in done:
        if t.role != "label" or "label" not in facts: continue
        ids = {int(k) for k in facts["label"]["counts"]} - {0}
        present |= ids
        if unknown := sorted(ids - set(dl.label_dict)):
            text = f"values {unknown[:10]}, the dictionary has {sorted(dl.label_dict)[:20]}"
            found.append(Finding("E303", dl.name, t.item, t.shown[1], text))
    if not any("label" in facts for _, facts in done): return
    for k in sorted(set(dl.label_dict) - present):
        found.append(Finding("W304", dl.name, "", "", f"{k} '{dl.label_dict[k]}'"))

# %% [markdown]
# ## Planted traps
# A dataset of phantoms in which each case after the first four has something wrong with it.

# %%
def plant(folder):
    folder.mkdir()
    items = []
    for k in range(12):
        p = phantoms.abdomen(shape=(40, 32, 36), seed=k)
        img, lbl = Volume(p.img, affine_from(p.spacing)), Volume(p.lbl, affine_from(p.spacing))
        if k == 4: lbl = reorient(lbl, "LAS")
        if k == 5: lbl = replace(lbl, affine=affine_from(p.spacing, (0, 0, 9)))
        if k == 6: lbl = replace(lbl, data=lbl.data.astype(np.float32)*0.99)
        if k == 7: lbl = replace(lbl, data=lbl.data*0)
        if k == 8: lbl = replace(lbl, data=lbl.data[:, :, :-1])
        if k == 9: lbl = replace(lbl, data=np.where(lbl.data == 1, 77, lbl.data).astype(np.uint8))
        if k == 10: img = Volume(phantoms.abdomen(shape=(40, 32, 36), seed=1).img, img.affine)
        for name, v in (("img", img), ("lbl", lbl)): write_volume(v, folder/f"{name}{k:02d}.nii.gz")
        items.append({"image": f"img{k:02d}.nii.gz", "label": f"lbl{k:02d}.nii.gz", "fold": k % 5})
    whole = (folder/"img11.nii.gz").read_bytes()
    (folder/"img11.nii.gz").write_bytes(whole[:len(whole)//2])
    dl = DataList("Traps", tuple(items), (), p.names, {}, extra={})
    write_datalist(dl, folder/"Traps.json")
    return folder/"Traps.json"

with tmpdir() as d:
    trapped = plant(d/"data")
    reports = {level: verify([trapped], level=level, cache=d/"cache") for level in ("exists", "header", "full")}
    again = verify([trapped], level="full", cache=d/"cache", workers=2)
for row in reports["full"].findings: print(row["code"], row["item"], row["path"], "|", row["finding"][:95])

# %%
{level: report.counts for level, report in reports.items()}

# %%
assert reports["exists"].ok and not reports["header"].ok and again == reports["full"]
assert reports["header"].counts == {"E202": 1, "E203": 1, "E301": 1, "E401": 1, "W209": 1, "W211": 1}
assert set(reports["full"].counts) == {"E202", "E203", "E301", "E302", "E303", "E401", "W209", "W211", "W305"}
clean = {r["item"] for r in reports["full"].findings} & {f"training/{k}" for k in range(1, 4)}
assert not clean
