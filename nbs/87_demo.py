# %% [markdown]
# # The main job
#
# > `medvol demo`: from a real brain volume to a verified dataset and its statistics, in one report.
#
# A library that promises to carry data from raw volumes to trained models should do so once before anybody's eyes, on
# data that is already there. The demo takes the MNI152 brain (the average T1 image of 152 people and its tissue maps,
# which the `nilearn` package carries), makes a small dataset of it, and runs the steps that exist so far. Every
# component of the library adds its own step to this list. `medvol demo --data DIR` does the same with `DIR/images`
# and `DIR/labels`.

# %%
#| default_exp demo

# %%
#| export
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb import phantoms, plot
from medvol_nb.core import (DataError, FormatError, MissingExtra, MissingFile, OnExists, file_digest, read_json,
                            rng_for, write_csv, write_json)
from medvol_nb.parallel import pmap
from medvol_nb.report import Job, Shown, Step, run_job
from medvol_nb.volume import (Volume, corner_displacement, format_of, read_volume, reorient, resample, same_grid,
                              stem_of, write_volume)

# %%
from IPython.display import Image

from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## A small dataset from one real brain
# The template gives the first case. The others are the same brain under smooth deformations of a few millimetres, with
# other contrast, other voxel sizes and other storage orders, as real collections have them. Labels: 1 cerebrospinal
# fluid (inside the brain, neither grey nor white), 2 grey matter, 3 white matter.

# %%
#| export
TISSUES = {1: "cerebrospinal fluid", 2: "grey matter", 3: "white matter"}

def template_paths() -> dict[str, Path]: # 't1', 'gm', 'wm' -> file in the nilearn package
    "The MNI152 files that nilearn carries (needs the `demo` extra)"
    spec = find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise MissingExtra("the demo needs the `demo` extra: pip install 'medvol_nb[demo]'")
    folder = Path(spec.origin).parent/"datasets"/"data"
    out = {k: folder/f"mni_icbm152_{k}_tal_nlin_sym_09a_converted.nii.gz" for k in ("t1", "gm", "wm")}
    for p in out.values():
        if not p.is_file(): raise MissingFile(f"{p} is not there: this version of nilearn does not carry the template")
    return out

def load_template(
    spacing: float = 2.0, # voxel size [mm]
) -> tuple[Volume, Volume]: # T1 image (float32) and tissue map (uint8, 0 to 3), RAS
    "The MNI152 brain and its tissues"
    t1, gm, wm = (resample(replace(v, data=v.data.astype(np.float32)), spacing) for v in
                  (reorient(read_volume(p), "RAS") for p in template_paths().values()))
    most = max(float(gm.data.max()), float(wm.data.max()))
    tissue = np.where(wm.data >= gm.data, 3, 2).astype(np.uint8)
    tissue[(gm.data + wm.data)/most < 0.5] = 1
    tissue[t1.data < 0.05*np.percentile(t1.data, 99)] = 0
    return t1, replace(t1, data=tissue)

# %%
t1, tissue = load_template()
plot.planes(t1.data, tissue.data, t1.spacing, title="MNI152, tissues")

# %%
share = np.bincount(tissue.data.ravel(), minlength=4)[1:]/np.count_nonzero(tissue.data)
assert tissue.orientation == "RAS" and 0.35 < share[1] < 0.65 and 0.2 < share[2] < 0.5
dict(zip(TISSUES.values(), np.round(share, 2).tolist()))

# %%
#| export
_STYLES = (((2.0, 2.0, 2.0), "RAS"), ((2.0, 2.0, 2.0), "LPS"), ((2.0, 2.0, 3.0), "LAS"), ((2.5, 2.5, 2.5), "RPI"))

def demo_case(
    k: int, # number of the case; 0 is the template itself
    seed: int, # names the deformations
    t1: Volume, # template image, RAS
    tissue: Volume, # template tissues, same grid
) -> tuple[str, Volume, Volume]: # name, image (int16) and label (uint8) on one grid
    "One case of the demo dataset"
    img, lbl = t1.data, tissue.data
    if k:
        rng = rng_for(seed, "demo", k)
        bend = phantoms.smooth_field(img.shape, int(rng.integers(2**31)), amplitude=6/t1.spacing[0], scale=24.0)
        img, lbl = phantoms.warp(img, bend), phantoms.warp(lbl, bend, order=0)
        top = float(img.max())
        img = top*(img/top)**rng.uniform(0.8, 1.3) + rng.normal(0, 0.01*top, img.shape)*(img > 0)
    spacing, codes = _STYLES[k % len(_STYLES)]
    name = "mni152" if k == 0 else f"warped_{k:02d}"
    img, lbl = replace(t1, data=img.astype(np.float32)), replace(tissue, data=lbl)
    img, lbl = reorient(resample(img, spacing), codes), reorient(resample(lbl, spacing, order=0), codes)
    return name, replace(img, data=np.round(img.data).astype(np.int16)), lbl

def _write_dataset(folder: Path, cases: int, seed: int, workers: int) -> Shown:
    t1, tissue = load_template()
    for sub in ("images", "labels"): (folder/sub).mkdir()
    def make(k: int) -> dict[str, Any]:
        name, img, lbl = demo_case(k, seed, t1, tissue)
        write_volume(img, folder/"images"/f"{name}.nii.gz")
        write_volume(lbl, folder/"labels"/f"{name}.nii.gz")
        shape, spacing = " x ".join(map(str, img.shape)), " x ".join(f"{s:g}" for s in img.spacing)
        return {"case": name, "shape": shape, "spacing [mm]": spacing, "orientation": img.orientation}
    rows = pmap(make, range(cases), workers, desc="writing cases")
    write_json(folder/"labels.json", TISSUES)
    return Shown(f"{cases} cases were written: the MNI152 template, and smooth deformations of it in other voxel sizes "
                 "and orientations.", {"cases": cases}, rows)

# %% [markdown]
# ## Pairs by name, never by position
# A label belongs to the image of the same name, with nnU-Net's channel suffix `_0000` left out. Sorting two folders and
# zipping them is how pairs get shifted by one without anybody noticing.

# %%
#| export
@dataclass(frozen=True)
class Pairs:
    "Images and labels matched by name"
    root: Path # folder that the names are relative to
    cases: dict[str, tuple[str, str]] # case -> (image, label), relative to `root`
    images_only: tuple[str, ...] # images without a label
    labels_only: tuple[str, ...] # labels without an image

def _volumes_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for p in sorted(folder.iterdir()):
        try: format_of(p)
        except FormatError: continue
        key = stem_of(p).removesuffix("_0000")
        if p.name.startswith("."): continue
        if key in found:
            raise DataError(f"{folder}: {found[key].name} and {p.name} are both case {key!r}. Keep one of them")
        found[key] = p
    return found

def find_pairs(
    root: str | os.PathLike, # folder with images/ and labels/, or imagesTr/ and labelsTr/
) -> Pairs: # what belongs together
    "Match the files of two folders by their names"
    root = Path(root)
    if not root.is_dir(): raise MissingFile(f"{root} is not a folder")
    for images, labels in (("images", "labels"), ("imagesTr", "labelsTr")):
        if (root/images).is_dir() and (root/labels).is_dir(): break
    else: raise MissingFile(f"{root} has no folders images and labels (or imagesTr and labelsTr)")
    img, lbl = _volumes_in(root/images), _volumes_in(root/labels)
    both = {k: (img[k].relative_to(root).as_posix(), lbl[k].relative_to(root).as_posix()) for k in img if k in lbl}
    if not both: raise DataError(f"{root}: no image in {images} has the name of a label in {labels}")
    return Pairs(root, both, tuple(k for k in img if k not in lbl), tuple(k for k in lbl if k not in img))

def _label_names(root: Path) -> dict[int, str]:
    "Names from labels.json or dataset.json beside the data; empty if there are none"
    for name in ("labels.json", "dataset.json"):
        if (root/name).is_file():
            table = read_json(root/name)
            table = table.get("labels", {}) if name == "dataset.json" and isinstance(table, dict) else table
            if not isinstance(table, Mapping):
                raise FormatError(f"{root/name}: label names must be an object of id: name")
            pairs = [(v, k) if isinstance(v, int) else (k, v) for k, v in table.items()]
            try: return {int(i): str(n) for i, n in pairs if int(i) > 0}
            except (TypeError, ValueError): raise FormatError(f"{root/name}: label ids must be whole numbers") from None
    return {}

def _write_datalist(folder: Path, root: Path, folds: int, limit: int | None) -> Shown:
    pairs = find_pairs(root)
    cases = dict(list(pairs.cases.items())[:limit])
    order = sorted(cases, key=lambda k: rng_for(20230808, "fold", k).random())
    items = [{"image": cases[k][0], "label": cases[k][1], "fold": n % folds} for n, k in enumerate(order)]
    names = _label_names(root)
    write_json(folder/"datalist.json", {"training": sorted(items, key=lambda i: (i["fold"], i["image"])), "testing": [],
                                        "label_dict": {str(k): v for k, v in names.items()}})
    odd = [f"image without label: {k}" for k in pairs.images_only]
    odd += [f"label without image: {k}" for k in pairs.labels_only]
    text = f"{len(items)} pairs were matched by name and dealt into {folds} folds."
    if odd: text += f" Left over: {'; '.join(odd)}."
    return Shown(text, {"pairs": len(items), "left over": len(odd), "classes": len(names)})

# %% [markdown]
# ## Verification
# Every pair is read completely, so a damaged file is found now and not in the night. What is found gets a code; errors
# are what training would stumble over, warnings what a person should know. Nothing stops at the first finding.

# %%
#| export
def verify_pair(
    image: str | os.PathLike, # image file
    label: str | os.PathLike, # label file
    names: Mapping[int, str], # label id -> name; empty: any id is allowed
) -> list[tuple[str, str]]: # (code, text); codes with E are errors, with W warnings
    "What is wrong or odd about an image and its label"
    found, vols = [], {}
    for what, path in (("image", image), ("label", label)):
        try:
            vols[what] = read_volume(path)
            found += [(code, f"{what}: {text}") for code, text in vols[what].meta.get("notes", ())]
        except MissingFile: found.append(("E101" if what == "image" else "E102", f"{what} is missing: {path}"))
        except (DataError, FormatError) as e: found.append(("E301", f"{what}: {e}"))
    if "image" in vols:
        img = vols["image"].data
        if img.dtype.kind == "f" and (bad := int(np.count_nonzero(~np.isfinite(img)))):
            found.append(("W306", f"image holds {bad} NaN or infinite voxels"))
        elif img.size and img.min() == img.max(): found.append(("W307", f"image is constant ({img.flat[0]})"))
    if "label" in vols:
        lbl = vols["label"].data
        if lbl.dtype.kind == "f" and not np.array_equal(lbl, np.round(lbl)):
            found.append(("E302", "label holds fractions or NaN"))
        else:
            ids = [int(v) for v in np.unique(lbl) if v != 0]
            if not ids: found.append(("W305", "label is empty"))
            unknown = [i for i in ids if i not in names]
            if names and unknown: found.append(("E303", f"label ids {unknown[:10]} are not in the label dictionary"))
    if len(vols) == 2: found += _compare(vols["image"], vols["label"])
    return found

def _compare(image: Volume, label: Volume) -> list[tuple[str, str]]:
    "Do both lie on the same grid"
    first = lambda v: v.data if v.channels is None else v.data[0]
    a, b = (reorient(replace(v, data=first(v), axes=v.spatial_axes), "RAS") for v in (image, label))
    if a.shape != b.shape: return [("E202", f"image has shape {image.shape}, label {label.shape}")]
    gap, limit = corner_displacement(a, b), 0.1*min(a.spacing)
    out = []
    if image.orientation != label.orientation:
        out.append(("W211", f"image is stored {image.orientation}, label {label.orientation}; reorient before "
                   "pairing arrays"))
    if gap > limit:
        out.append(("E203", f"label grid is displaced by {gap:.3g} mm ({gap/min(a.spacing):.2g} voxels) from the "
                   "image grid"))
    elif gap > 1e-3: out.append(("W204", f"grids differ by {gap:.2g} mm, within tolerance"))
    return out

def _verify(folder: Path, job: Job, root: Path, workers: int) -> Shown:
    listed = read_json(job.folder("datalist")/"datalist.json")
    names = {int(k): v for k, v in listed["label_dict"].items()}
    items = listed["training"]
    found = pmap(lambda i: verify_pair(root/i["image"], root/i["label"], names), items, workers,
                 keys=[i["image"] for i in items], desc="verifying")
    rows = [{"code": c, "image": i["image"], "finding": t} for i, f in zip(items, found) for c, t in f]
    write_csv(folder/"findings.csv", rows, ["code", "image", "finding"])
    errors = sum(r["code"][0] == "E" for r in rows)
    verdict = f"{errors} errors need a hand." if errors else \
        "All files are whole and every label lies on its image's grid."
    return Shown(f"{len(items)} pairs were read completely. {verdict}",
                 {"errors": errors, "warnings": len(rows) - errors}, rows)

# %% [markdown]
# ## What is in the labels
# Volumes in millilitres, because voxels of different sizes cannot be added.

# %%
#| export
def class_volumes(
    label: str | os.PathLike, # label file
) -> dict[int, float]: # label id -> [mL]
    "Volume of every class in a label map"
    lbl = read_volume(label)
    if lbl.dtype.kind == "f" and not np.array_equal(lbl.data, np.round(lbl.data)):
        raise DataError(f"{label}: holds fractions or NaN, a label map holds whole numbers")
    ids, counts = np.unique(lbl.data.astype(np.int64), return_counts=True)
    ml = float(np.prod(lbl.spacing))/1000
    return {int(i): float(n)*ml for i, n in zip(ids, counts) if i > 0}

def _statistics(folder: Path, job: Job, root: Path, workers: int) -> Shown:
    listed = read_json(job.folder("datalist")/"datalist.json")
    names = {int(k): v for k, v in listed["label_dict"].items()}
    items = sorted(listed["training"], key=lambda i: i["image"])
    volumes, failures = pmap(lambda i: class_volumes(root/i["label"]), items, workers, keys=[i["label"] for i in items],
                             errors="collect", desc="measuring")
    good = [(i, v) for i, v in zip(items, volumes) if v is not None]
    ids = sorted({k for _, v in good for k in v})
    named = {k: names.get(k, f"label {k}") for k in ids}
    each = [{"image": i["image"], "id": k, "class": named[k], "mL": round(v[k], 4)} for i, v in good for k in sorted(v)]
    write_csv(folder/"volumes.csv", each, ["image", "id", "class", "mL"])
    found = {k: [v[k] for _, v in good if k in v] for k in ids}
    rows = [{"id": k, "class": named[k], "cases": len(v), "mean [mL]": float(np.mean(v)), "smallest [mL]": min(v),
             "largest [mL]": max(v)} for k, v in found.items()]
    pictures = {}
    if rows:
        plot.save_figure(plot.bars({r["class"]: r["mean [mL]"] for r in rows}, "mL", ids=ids), folder/"volumes.png")
        pictures["Mean volume of each class over the cases that have it"] = "volumes.png"
    for item, _ in good:
        try: img, lbl = (reorient(read_volume(root/item[k]), "RAS") for k in ("image", "label"))
        except (DataError, FormatError, MissingFile): continue
        if img.channels is None and same_grid(img, lbl, 0.1*min(img.spacing)):
            figure = plot.planes(img.data, lbl.data.astype(np.int64), img.spacing, title=item["image"])
            plot.save_figure(figure, folder/"case.png")
            pictures = {"The first case with its labels": "case.png", **pictures}
            break
    text = f"{len(ids)} classes in {len(good)} cases."
    if failures: text += f" {len(failures)} labels could not be read."
    total = float(sum(sum(v.values()) for _, v in good))
    return Shown(text, {"classes": len(ids), "labelled [mL]": total}, rows, pictures)

# %% [markdown]
# ## The job
# Steps, their order and what they depend on, in one list. With `--data` the first step is not needed, and the names and
# sizes of the files take its place in the fingerprint: if a file changes, the steps that read it run again.

# %%
#| export
def _listing(root: Path) -> list:
    "Names, sizes and times of the user's files, to notice when they change"
    pairs = find_pairs(root)
    files = sorted({n for c in pairs.cases.values() for n in c} | {p.name for p in root.glob("*.json")})
    return [[n, (root/n).stat().st_size, (root/n).stat().st_mtime_ns] for n in files]

def demo_job(
    out: str | os.PathLike = "medvol_demo", # folder of the job
    data: str | os.PathLike | None = None, # folder with images/ and labels/; default: the brain dataset is made
    *,
    cases: int = 6, # of the brain dataset
    seed: int = 0, # names all random choices
    workers: int = 0, # processes
    limit: int | None = None, # use only so many cases
) -> Job: # its steps, not run yet
    "The steps of the demo"
    if cases < 1 or (limit is not None and limit < 1): raise DataError("cases and limit must be >= 1")
    steps, needs = [], ()
    source: Any = None
    if data is None:
        root, needs = Path(out)/"01_dataset", ("dataset",)
        template = [file_digest(p) for p in template_paths().values()]
        make = lambda f, job: _write_dataset(f, cases, seed, workers)
        steps.append(Step("dataset", "A small dataset of brains", make, params=[cases, seed, template]))
    else: root, source = Path(data), _listing(Path(data))
    folds, below = min(5, cases if data is None else 5), (*needs, "datalist")
    deal = lambda f, job: _write_datalist(f, root, folds, limit)
    steps += [
        Step("datalist", "Pairs and folds", deal, needs, [source, limit]),
        Step("verify", "Verification", lambda f, job: _verify(f, job, root, workers), below),
        Step("statistics", "What is in the labels", lambda f, job: _statistics(f, job, root, workers), below),
    ]
    title = "medvol_nb on the MNI152 brain" if data is None else f"medvol_nb on {Path(data).resolve().name}"
    return Job(out, steps, title)

def demo(
    out: str | os.PathLike = "medvol_demo", # folder for everything the demo writes
    data: str | os.PathLike | None = None, # your own folder with images/ and labels/, instead of the brain
    *,
    cases: int = 6, # cases made from the brain
    seed: int = 0, # names all random choices
    workers: int = 0, # processes; 0: this one, -1: one per processor
    limit: int | None = None, # use only so many cases
    on_exists: OnExists = "skip", # "skip": go on where an earlier run stopped, "overwrite": start anew, "error": refuse
    dry_run: bool = False, # only list the steps
) -> dict: # path of the report, steps that ran, and the main figures
    "Run the main job on a real brain, or on your own volumes, and write a report"
    job = demo_job(out, data, cases=cases, seed=seed, workers=workers, limit=limit)
    if dry_run: return {"out": Path(out), "steps": [f"{s.name}: {s.title}" for s in job.steps]}
    result = run_job(job, on_exists=on_exists)
    figures = {k: v["figures"] for k, v in result["steps"].items()}
    return {"report": result["report"], "ran": result["ran"], "figures": figures}

# %%
with tmpdir() as d:
    done = demo(d/"out", cases=3)
    picture = Image((d/"out"/"04_statistics"/"case.png").read_bytes())
    again = demo(d/"out", cases=3)["ran"]
    files = sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file())
picture

# %%
done["figures"], done["ran"], again

# %%
assert done["figures"]["verify"] == {"errors": 0, "warnings": 0} and again == []
assert 1000 < done["figures"]["statistics"]["labelled [mL]"]/3 < 2500
with raises(MissingFile, match="has no folders images and labels"):
    with tmpdir() as d: demo(d/"out", d)
