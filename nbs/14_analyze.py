# %% [markdown]
# # What is in the data
#
# > How often each class occurs, how large it is, and the weights that follow: from the same pass that verifies.
#
# A class that fills a hundred voxels in three cases out of a thousand will not be learned unless somebody notices.
# The numbers that show it are counted while every file is verified, so they cost no second reading, and nothing is
# resampled first: a small structure that vanishes on a coarse grid would vanish from the statistics too. Volumes are
# in millilitres, because voxels of different sizes cannot be added.

# %%
#| default_exp analyze

# %%
#| export
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.checks import check_pairs
from medvol_nb.core import DataError, OnExists, atomic, check_output, write_csv, write_json
from medvol_nb.datalists import DataList, item_path, read_datalist
from medvol_nb.labels import LabelSpace, preferred_name
from medvol_nb.plot import bars, save_figure
from medvol_nb.verify import roots_for

# %%
from medvol_nb import phantoms, plot
from medvol_nb.core import close, read_csv, tmpdir
from medvol_nb.datalists import write_datalist
from medvol_nb.volume import Volume, affine_from, write_volume

# %% [markdown]
# ## Weights
# The three formulas of VISTA3D. A class of frequency $f_c$ (of all voxels, background included) gets $w_c = \max(1,
# \sqrt{t/f_c})$ with $t = 0.001$, the square root keeping rare classes from drowning the rest. A case gets the
# largest weight of its classes if it has few, the smallest if it has more than ten: a case with everything in it is
# not rare. A dataset gets $100/n$, so that each is drawn equally often.

# %%
#| export
def class_weights(
    counts: Mapping[int, int], # label id -> voxels, with 0 for the background
    t: float = 0.001, # frequency below which a class counts as rare
) -> dict[int, float]: # label id -> weight >= 1; background and absent classes have none
    "Weight of each class from its frequency"
    total = sum(counts.values())
    return {k: max(1.0, math.sqrt(t*total/n)) for k, n in sorted(counts.items()) if k != 0 and n > 0}

def sample_weight(
    present: Sequence[int], # label ids in the case, background left out
    weights: Mapping[int, float], # of the classes
) -> float: # 1.0 for a case without classes
    "Weight of a case from the classes in it"
    found = [weights[k] for k in present if k in weights]
    if not found: return 1.0
    return max(found) if len(found) <= 10 else min(found)

def dataset_weights(
    sizes: Mapping[str, int], # dataset -> training items
) -> dict[str, float]: # dataset -> weight of each of its items
    "Weights with which every dataset is drawn equally often"
    if bad := [k for k, n in sizes.items() if n < 1]: raise DataError(f"datasets without training items: {bad}")
    return {k: 100/n for k, n in sizes.items()}

# %%
counts = {0: 9_000_000, 1: 990_000, 2: 9_900, 3: 100}
{k: round(w, 2) for k, w in class_weights(counts).items()}, dataset_weights({"A": 640, "B": 19})

# %%
w = class_weights(counts)
assert w[1] == 1 and close(w[2], math.sqrt(0.001*10_000_000/9_900)) and close(w[3], 10)
assert sample_weight([1, 3], w) == w[3] and sample_weight(range(1, 20), {k: k for k in range(1, 20)}) == 1
assert close(dataset_weights({"Task06": 40})["Task06"], 2.5)

# %% [markdown]
# ## Counting
# Local ids become global ones through the label space, so classes of different lists are counted together. Ids
# without a global class keep a name of their own. Without a label space an id must mean the same class in every list.

# %%
#| export
def _classes(dl: DataList, space: LabelSpace | None) -> dict[int, tuple[int, str]]:
    "Local id -> (id to count under, name); without a space the local id itself, with one only ids that it maps"
    if space is None: return {k: (k, v) for k, v in dl.label_dict.items()}
    mapping, names = space.mapping(dl.name), {c.id: c.name for c in space.classes}
    return {k: (mapping[k], names.get(mapping[k], v)) for k, v in dl.label_dict.items() if k in mapping}

def _one_scheme(lists: Sequence[DataList]) -> None:
    "Refuse lists in which an id means different classes: their weights would be of no class at all"
    seen: dict[int, tuple[str, str]] = {}
    for dl in lists:
        for k, name in dl.label_dict.items():
            first, where = seen.setdefault(k, (name, dl.name))
            if preferred_name(first) != preferred_name(name):
                raise DataError(f"label {k} is {first!r} in {where} and {name!r} in {dl.name}. Make one label space of "
                                "the lists (`medvol datalists labels`) and pass it as space (--space)")

def _first(item: Mapping) -> str: return item["image"] if isinstance(item["image"], str) else item["image"][0]

def _case_rows(dl: DataList, items: Sequence, done: Sequence) -> list[dict[str, Any]]:
    rows = []
    for (section, n, item), d in zip(items, done):
        facts, fore = d["facts"], d["facts"].get("foreground", {})
        counts = {int(k): v for k, v in facts.get("label", {}).get("counts", {}).items()}
        img, ml = facts.get("image", {}), facts.get("label", {}).get("voxel_ml", 0.0)
        labelled = sum(v for k, v in counts.items() if k)
        rows.append({"dataset": dl.name, "item": f"{section}/{n}", "image": _first(item), "fold": item.get("fold", ""),
                     "shape": "x".join(map(str, img.get("shape", ()))),
                     "spacing_mm": "x".join(f"{s:g}" for s in img.get("spacing", ())),
                     "orientation": img.get("orientation", ""), "dtype": img.get("dtype", ""),
                     "image_min": img.get("min"), "image_max": img.get("max"),
                     **{f"foreground_{k}": fore.get(k) for k in ("mean", "std", "p0.5", "p50", "p99.5")},
                     "classes": sum(1 for k, v in counts.items() if k and v), "labelled_ml": round(labelled*ml, 6),
                     "_counts": counts, "_ml": ml})
    return rows

def _class_rows(rows: Sequence[Mapping], classes: Mapping[str, Mapping[int, tuple[int, str]]]) -> list[dict[str, Any]]:
    table: dict[tuple[int, str], dict[str, Any]] = {}
    for r in rows:
        for k, n in r["_counts"].items():
            if not k: continue
            key = classes[r["dataset"]].get(k, (-1, f"{r['dataset']}: label {k}"))
            t = table.setdefault(key, {"cases": 0, "voxels": 0, "ml": []})
            t["cases"], t["voxels"] = t["cases"] + 1, t["voxels"] + n
            t["ml"].append(n*r["_ml"])
    return [{"id": key[0] if key[0] >= 0 else "", "class": key[1], "cases": t["cases"], "voxels": t["voxels"],
             **{f"ml_{n}": round(float(f(t["ml"])), 6) for n, f in (("mean", np.mean), ("min", min), ("max", max))}}
            for key, t in sorted(table.items())]

# %% [markdown]
# ## The analysis
# One call: class table, case table, weights, pictures. With the cache of the verification nothing is read twice.

# %%
#| export
def analyze(
    datalists: Sequence[str | os.PathLike], # list files
    out: str | os.PathLike, # folder for classes.csv, cases.csv, weights.json and pictures
    *,
    root: str | os.PathLike | None = None, # folder of the data, or with a subfolder per dataset; default: the lists'
    space: str | os.PathLike | None = None, # label_space.json; classes are counted under their global ids
    workers: int = 0, # processes; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers see the same files
    cache: str | os.PathLike | None = None, # folder that remembers results, shared with verify
    on_exists: OnExists = "error", # what to do when `out` is there already
    limit: int | None = None, # use only so many items of each list
) -> dict: # main figures and the files that were written
    "Count classes, volumes and intensities of lists, and derive sampling weights"
    out = Path(out)
    if not check_output(out, on_exists): return {"out": out, "skipped": True}
    lists = [read_datalist(p) for p in datalists]
    names = [dl.name for dl in lists]
    if len(set(names)) < len(names): raise DataError(f"two lists have the same name: {sorted(names)}")
    whole = LabelSpace.load(space) if space is not None else None
    if whole is None: _one_scheme(lists)
    roots = roots_for(names, [Path(p) for p in datalists], root)
    classes = {dl.name: _classes(dl, whole) for dl in lists}
    both = lambda dl: (("training", dl.training), ("testing", dl.testing))
    todo = [(dl, [(s, n, i) for s, items in both(dl) for n, i in enumerate(items[:limit]) if "label" in i])
            for dl in lists]
    pairs = [tuple(str(item_path(roots[dl.name], p)) for p in (_first(i), i["label"])) for dl, items in todo
             for _, _, i in items]
    done = iter(check_pairs(pairs, "full", workers=workers, dask=dask, cache=cache))
    rows = [r for dl, items in todo for r in _case_rows(dl, items, [next(done) for _ in items])]
    table = _class_rows(rows, classes)
    totals: dict[int, int] = {}
    for r in rows:
        for k, n in r["_counts"].items():
            g = 0 if k == 0 else classes[r["dataset"]].get(k, (-1, ""))[0]
            if g >= 0: totals[g] = totals.get(g, 0) + n
    weights = class_weights(totals)
    for r in rows:
        present = {classes[r["dataset"]].get(k, (-1, ""))[0] for k, n in r["_counts"].items() if k and n}
        r["weight"] = round(sample_weight(sorted(present - {-1}), weights), 9)
    by_dataset = dataset_weights({dl.name: len(dl.training[:limit]) for dl in lists if dl.training})
    with atomic(out, on_exists, folder=True) as t:
        write_csv(t/"classes.csv", table, ["id", "class", "cases", "voxels", "ml_mean", "ml_min", "ml_max"])
        visible = [{k: v for k, v in r.items() if k[0] != "_"} for r in rows]
        write_csv(t/"cases.csv", visible, list(visible[0]) if visible else ["dataset"])
        write_json(t/"weights.json", {"class": weights, "dataset": by_dataset})
        write_json(t/"analysis.json", {"classes": table, "cases": len(rows), "voxels": dict(sorted(totals.items()))})
        if table: _pictures(t, table)
    rarest = min(table, key=lambda r: r["voxels"])["class"] if table else None
    return {"out": out, "cases": len(rows), "classes": len(table), "rarest": rarest,
            "labelled_ml": round(sum(r["labelled_ml"] for r in rows), 3)}

def _pictures(folder: Path, table: Sequence[Mapping]) -> None:
    "Bars of class volumes and of the number of cases, the largest forty"
    most = sorted(table, key=lambda r: -r["voxels"])[:40]
    ids, names = [r["id"] if r["id"] != "" else 0 for r in most], [r["class"] for r in most] # names may repeat
    volumes = bars((names, [r["ml_mean"] for r in most]), "mL", title="mean volume", ids=ids, log=True)
    presence = bars((names, [r["cases"] for r in most]), "cases", title="cases with the class", ids=ids)
    save_figure(volumes, folder/"volumes.png")
    save_figure(presence, folder/"presence.png")

# %%
def make(folder, name, seeds, voxel):
    folder.mkdir()
    items = []
    for k in seeds:
        p = phantoms.abdomen(shape=(48, 40, 44), seed=k, spacing=voxel)
        for kind, data in (("img", p.img), ("lbl", p.lbl)):
            write_volume(Volume(data, affine_from(p.spacing)), folder/f"{kind}{k}.nii.gz")
        items.append({"image": f"img{k}.nii.gz", "label": f"lbl{k}.nii.gz", "fold": k % 3})
    write_datalist(DataList(name, tuple(items), (), p.names, {}, extra={}), folder/f"{name}.json")
    return folder/f"{name}.json"

with tmpdir() as d:
    lists = [make(d/"A", "A", range(4), (8, 7, 8)), make(d/"B", "B", range(4, 6), (7, 7, 9))]
    summary = analyze(lists, d/"analysis", cache=d/"cache")
    table, cases = read_csv(d/"analysis"/"classes.csv"), read_csv(d/"analysis"/"cases.csv")
    volumes = {r["class"]: float(r["ml_mean"]) for r in table}
    figure = plot.bars(volumes, "mL", ids=[int(r["id"]) for r in table], log=True)
figure

# %%
[(r["class"], r["cases"], r["ml_mean"]) for r in table], [(r["image"], r["spacing_mm"], r["weight"]) for r in cases][:3]

# %%
one = phantoms.abdomen(shape=(48, 40, 44), seed=0, spacing=(8, 7, 8))
liver = next(r for r in table if r["class"] == "liver")
assert summary["cases"] == 6 and int(liver["cases"]) == 6
assert float(liver["ml_min"]) <= (one.lbl == 1).sum()*8*7*8/1000 <= float(liver["ml_max"])
