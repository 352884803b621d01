# %% [markdown]
# # The main job
#
# > `medvol demo`: from a real brain volume to a verified dataset and its statistics, in one report.
#
# A library that promises to carry data from raw volumes to trained models should do so once before anybody's eyes, on
# data that is already there. The demo takes the MNI152 brain (the average T1 image of 152 people and its tissue maps,
# which the `nilearn` package carries), makes a small dataset of it, and runs a list of steps, in which most components
# of the library have one of their own. `medvol demo --data DIR` does the same with `DIR/images` and `DIR/labels`.

# %%
#| default_exp demo

# %%
#| export
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb import phantoms, plot
from medvol_nb.analyze import analyze
from medvol_nb.core import (ConfigError, DataError, MissingExtra, MissingFile, OnExists, file_digest, read_csv,
                            rng_for, write_json)
from medvol_nb.datalists import read_datalist, write_datalist
from medvol_nb.demo_embryo import embryo_step
from medvol_nb.demo_steps import sound_cases, supervoxel_step, synth_step, unet_step
from medvol_nb.labels import LabelSpace, build_label_space
from medvol_nb.parallel import pmap
from medvol_nb.recipes import detect_recipe, load_recipe, make_datalists, scan
from medvol_nb.report import Job, Shown, Step, run_job
from medvol_nb.verify import verify
from medvol_nb.volume import Volume, read_volume, reorient, resample, write_volume

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
    write_json(folder/"dataset.json", {"name": "Brains", "labels": {"0": "background", **TISSUES}})
    return Shown(f"{cases} cases were written: the MNI152 template, and smooth deformations of it in other voxel sizes "
                 "and orientations.", {"cases": cases}, rows)

# %% [markdown]
# ## From files to a list
# Each of the next steps is one call to a component: the recipe of the layout finds the pairs, the verification reads
# every file, the label space gives the classes their global ids, the analysis counts.

# %%
#| export
def _recipe(root: Path) -> str:
    "Name of the layout below `root`"
    return "folders" if (root/"images").is_dir() and (root/"labels").is_dir() else detect_recipe(root)[0].name

def _write_datalist(folder: Path, root: Path, name: str, seed: int, limit: int | None) -> Shown:
    recipe = _recipe(root)
    n = len(scan(load_recipe(recipe), root).pairs)
    made = make_datalists(root, folder/"datalist.json", recipe=recipe, name=name, method="legacy", test_ratio=0.0,
                          n_folds=max(1, min(5, n)), seed=seed)
    if limit is not None:
        dl = read_datalist(folder/"datalist.json")
        dl = replace(dl, training=dl.training[:limit], testing=dl.testing[:limit])
        write_datalist(dl, folder/"datalist.json", "overwrite")
    dl = read_datalist(folder/"datalist.json")
    left = [*made["missing_images"], *made["missing_labels"], *made["ambiguous"]]
    text = f"{len(dl.training)} pairs were matched by name and dealt into {len(dl.folds())} folds."
    if left: text += f" Left over: {'; '.join(map(str, left[:10]))}."
    return Shown(text, {"pairs": len(dl.training), "left over": len(left), "classes": len(dl.label_dict)})

def _verify(folder: Path, job: Job, root: Path, workers: int) -> Shown:
    report = verify([job.folder("datalist")/"datalist.json"], root=root, level="full", workers=workers, out=folder)
    errors = sum(r["severity"] == "error" for r in report.findings)
    sound = "All files are whole and every label lies on its image's grid."
    verdict = f"{errors} errors need a hand." if errors else sound
    rows = [{k: r[k] for k in ("code", "item", "path", "finding")} for r in report.findings]
    return Shown(f"{report.pairs} pairs were read completely. {verdict}",
                 {"errors": errors, "warnings": len(rows) - errors}, rows)

def _labels(folder: Path, job: Job) -> Shown:
    if not read_datalist(job.folder("datalist")/"datalist.json").label_dict:
        return Shown("The data has no class names, so its classes keep their numbers. Write them into DIR/dataset.json "
                     'as {"labels": {"1": "liver"}}.', {"classes": 0})
    made = build_label_space([job.folder("datalist")/"datalist.json"], folder/"space", base="empty")
    space = LabelSpace.load(folder/"space"/"label_space.json")
    rows = [{"id": k, "class": n} for k, n in enumerate(space.class_names()) if k and n]
    return Shown("Every class name has one id, which stays when other datasets are added.",
                 {"classes": len(rows), "problems": len(made["problems"])}, rows)

def _statistics(folder: Path, job: Job, root: Path, workers: int) -> Shown:
    listed = job.folder("datalist")/"datalist.json"
    space = job.folder("labels")/"space"/"label_space.json"
    found = analyze([listed], folder/"analysis", root=root, workers=workers, space=space if space.exists() else None)
    rows = [{"class": r["class"], "cases": int(r["cases"]), "mean [mL]": float(r["ml_mean"]),
             "smallest [mL]": float(r["ml_min"]), "largest [mL]": float(r["ml_max"])}
            for r in read_csv(folder/"analysis"/"classes.csv")]
    pictures = {"Mean volume of each class over the cases that have it": "analysis/volumes.png"} if rows else {}
    if _picture(folder/"case.png", listed, root):
        pictures = {"The first case with its labels": "case.png", **pictures}
    return Shown(f"{len(rows)} classes in {found['cases']} cases; the rarest is {found['rarest'] or 'none'}.",
                 {"classes": len(rows), "labelled [mL]": found["labelled_ml"]}, rows, pictures)

def _picture(path: Path, datalist: Path, root: Path) -> bool:
    "Three planes of the first case whose label can be shown on its image"
    for name, img, lbl in sound_cases(datalist, root, 1):
        plot.save_figure(plot.planes(img.data, lbl.data, img.spacing, title=name), path)
        return True
    return False

# %% [markdown]
# ## The job
# Steps, their order and what they depend on, in one list. With `--data` the first step is not needed, and the names,
# sizes and times of the files take its place in the fingerprint: if a file changes, the steps that read it run again.

# %%
#| export
def _listing(root: Path) -> list:
    "Names, sizes and times of the user's files, to notice when they change"
    if not root.is_dir(): raise MissingFile(f"{root} is not a folder")
    found = scan(load_recipe(_recipe(root)), root)
    if not found.pairs: raise DataError(f"{root}: no image has the name of a label")
    names = {n for p in found.pairs for n in (p.image if isinstance(p.image, tuple) else (p.image,))}
    names |= {p.label for p in found.pairs} | {p.name for p in root.glob("*.json")}
    return [[n, (root/n).stat().st_size, (root/n).stat().st_mtime_ns] for n in sorted(names)]

def demo_job(
    out: str | os.PathLike = "medvol_demo", # folder of the job
    data: str | os.PathLike | None = None, # folder with images/ and labels/; default: the brain dataset is made
    *,
    cases: int = 6, # of the brain dataset
    seed: int = 0, # names all random choices
    workers: int = 0, # processes
    limit: int | None = None, # use only so many cases
    train_steps: int = 120, # length of the trainings
    skip: Sequence[str] = (), # names of steps to leave out
) -> Job: # its steps, not run yet
    "The steps of the demo"
    if min(cases, train_steps, 1 if limit is None else limit) < 1 or seed < 0:
        raise DataError(f"cases, limit and train_steps must be >= 1, seed >= 0, got {cases}, {limit}, {train_steps} "
                        f"and {seed}")
    steps, needs = [], ()
    source: Any = None
    name = "Brains" if data is None else Path(data).resolve().name
    if data is None:
        root, needs = Path(out)/"01_dataset", ("dataset",)
        template = [file_digest(p) for p in template_paths().values()]
        make = lambda f, job: _write_dataset(f, cases, seed, workers)
        steps.append(Step("dataset", "A small dataset of brains", make, params=[cases, seed, template]))
    else: root, source = Path(data), _listing(Path(data))
    deal = lambda f, job: _write_datalist(f, root, name, seed, limit)
    check = lambda f, job: _verify(f, job, root, workers)
    count = lambda f, job: _statistics(f, job, root, workers)
    listed = lambda job: job.folder("datalist")/"datalist.json"
    cut = lambda f, job: supervoxel_step(f, listed(job), root)
    render = lambda f, job: synth_step(f, listed(job), root, 2*train_steps, seed)
    learn = lambda f, job: unet_step(f, listed(job), root, train_steps, seed)
    steps += [
        Step("datalist", "Pairs and folds", deal, needs, [source, name, seed, limit]),
        Step("verify", "Verification", check, (*needs, "datalist")),
        Step("labels", "One label space", _labels, ("datalist",)),
        Step("statistics", "What is in the labels", count, (*needs, "datalist", "labels")),
        Step("supervoxels", "Supervoxels", cut, (*needs, "datalist"), version=2),
        Step("synth", "Synthetic anatomy", render, (*needs, "datalist"), [train_steps, seed]),
        Step("unet", "A network for two tasks", learn, (*needs, "datalist"), [train_steps, seed]),
    ]
    if data is None:
        draw = lambda f, job: embryo_step(f, 8*train_steps//3, seed)
        steps.append(Step("embryo", "Embryo frames", draw, (), [train_steps, seed]))
    if unknown := sorted(set(skip) - {s.name for s in steps} - {"dataset", "embryo"}): # these two not with `data`
        raise ConfigError(f"skip: there is no step {unknown[0]!r}, there are {', '.join(s.name for s in steps)}")
    if wanted := [s for s in steps if s.name not in skip and set(s.needs) & set(skip)]:
        raise ConfigError(f"skip: step {wanted[0].name!r} needs what is left out. Leave it out, too")
    steps = [s for s in steps if s.name not in skip]
    title = "medvol_nb on the MNI152 brain" if data is None else f"medvol_nb on {name}"
    return Job(out, steps, title)

def demo(
    out: str | os.PathLike = "medvol_demo", # folder for everything the demo writes
    data: str | os.PathLike | None = None, # your own folder with images/ and labels/, instead of the brain
    *,
    cases: int = 6, # cases made from the brain
    seed: int = 0, # names all random choices
    workers: int = 0, # processes; 0: this one, -1: one per processor
    limit: int | None = None, # use only so many cases
    train_steps: int = 120, # length of the trainings
    skip: Sequence[str] = (), # steps to leave out, such as 'unet'
    on_exists: OnExists = "skip", # "skip": go on where an earlier run stopped, "overwrite": start anew, "error": refuse
    dry_run: bool = False, # only list the steps
) -> dict: # path of the report, steps that ran, and the main figures
    "Run the main job on a real brain, or on your own volumes, and write a report"
    job = demo_job(out, data, cases=cases, seed=seed, workers=workers, limit=limit, train_steps=train_steps,
                   skip=skip)
    if dry_run: return {"out": Path(out), "steps": [f"{s.name}: {s.title}" for s in job.steps]}
    result = run_job(job, on_exists=on_exists)
    figures = {k: v["figures"] for k, v in result["steps"].items()}
    return {"report": result["report"], "ran": result["ran"], "figures": figures}

# %%
with tmpdir() as d:
    done = demo(d/"out", cases=3, train_steps=4, skip=("synth", "embryo")) # shown on pages 86a and 86b
    picture = Image((d/"out"/"05_statistics"/"case.png").read_bytes())
    again = demo(d/"out", cases=3, train_steps=4, skip=("synth", "embryo"))["ran"]
    files = sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file())
picture

# %%
done["figures"], done["ran"], again

# %%
assert done["figures"]["verify"] == {"errors": 0, "warnings": 0} and again == []
assert 1000 < done["figures"]["statistics"]["labelled [mL]"]/3 < 2500
with raises(MissingFile, match="is not a folder"): demo("out", "no/such/folder")
