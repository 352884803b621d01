# %% [markdown]
# # How good is it
#
# > Lesion tracking by both of its definitions, landmark errors, overlap and surface distance, smoothness of fields.
#
# Numbers of different papers under one name are not always one number. The published evaluation of anatomical
# embeddings on lesion tracking (DeepLesion, *DLT*) prints two shares of hits under the names of the benchmark's, but
# counts differently, and more kindly: scored its way, the benchmark's own published results rise from 79 to 87 % and
# from 87 to 95 %. This page computes both sets of definitions, under names that cannot be confused, with confidence
# intervals, and writes one JSON and one row for every case.

# %%
#| default_exp embed.evaluate

# %%
#| export
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb import plot
from medvol_nb.core import (DataError, FormatError, MissingFile, OnExists, atomic, check_output, read_json,
                            rng_for, write_csv, write_json)
from medvol_nb.embed.data import NetGrid
from medvol_nb.embed.match import Matcher, checked_points
from medvol_nb.embed.points import POINT_FILES, read_points
from medvol_nb.embed.transforms import Field, jacobian_report, read_transform
from medvol_nb.geometry import Volume, resample_to, same_grid, to_axes
from medvol_nb.parallel import on_cluster, pmap
from medvol_nb.volume import read_volume, stem_of

# %%
import tempfile

from medvol_nb import phantoms
from medvol_nb.core import close, raises, read_csv
from medvol_nb.embed.points import write_points
from medvol_nb.embed.store import position_embedding, write_embedding
from medvol_nb.geometry import affine_from
from medvol_nb.volume import write_volume

# %% [markdown]
# ## A number and how sure it is
# Cases are drawn again with replacement, 2,000 times, and the middle 95 % of the means are the interval (Efron, 1979).
# Cases are pairs of scans here; two directions of one pair are not independent, so the interval is rather too short.

# %%
#| export
def bootstrap(
    values: np.ndarray, # (n, k) numbers of the cases, one column a quantity
    resamples: int = 2000, # how often the cases are drawn again
    level: float = 0.95, # share of the means inside the interval
    seed: int = 0, # names the draws
) -> np.ndarray: # (2, k) lower and upper end for the mean of each column
    "Confidence interval of means"
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not len(values): raise DataError(f"bootstrap: needs (n, k) numbers, got {values.shape}")
    if not 0 < level < 1 or resamples < 1: raise DataError(f"bootstrap: level {level}, resamples {resamples}")
    rng, means = rng_for(seed, "bootstrap"), np.empty((resamples, values.shape[1]))
    for i in range(resamples): means[i] = values[rng.integers(0, len(values), len(values))].mean(0)
    return np.quantile(means, [(1 - level)/2, (1 + level)/2], axis=0)

def error_summary(
    errors_mm: np.ndarray, # (n,) distances [mm]
    *,
    within_mm: Sequence[float] = (5.0, 10.0), # shares of errors up to these are told [mm]
    resamples: int = 2000, # for the interval of the mean
    seed: int = 0, # names the draws
) -> dict[str, Any]: # n, mean, sd, median, p90, p95, max, mean_ci, within_<d>mm
    "What a set of distances says"
    e = np.asarray(errors_mm, np.float64)
    if e.ndim != 1 or not len(e): raise DataError(f"errors: needs (n,) distances, got shape {e.shape}")
    if not np.isfinite(e).all() or e.min() < 0: raise DataError("errors: distances must be finite and >= 0")
    out = {"n": len(e), "mean": float(e.mean()), "sd": float(e.std()), "median": float(np.median(e)),
           "p90": float(np.quantile(e, 0.9)), "p95": float(np.quantile(e, 0.95)), "max": float(e.max()),
           "mean_ci": bootstrap(e[:, None], resamples, seed=seed)[:, 0].tolist()}
    return out | {f"within_{d:g}mm": float((e <= d).mean()) for d in within_mm}

def landmark_errors(
    found_mm: np.ndarray, # (n, 3) where they were found, RAS+ [mm]
    wanted_mm: np.ndarray, # (n, 3) where they are, RAS+ [mm]
) -> np.ndarray: # (n,) [mm]
    "Target registration error of each landmark"
    found, wanted = checked_points(found_mm), checked_points(wanted_mm)
    if len(found) != len(wanted): raise DataError(f"landmarks: {len(found)} found, {len(wanted)} wanted")
    return np.linalg.norm(found - wanted, axis=1)

# %%
rng = rng_for(0, "errors")
distances = np.abs(rng.normal(0, 5, 300))
summary = error_summary(distances)
{k: np.round(v, 2).tolist() for k, v in summary.items()}

# %%
low, high = summary["mean_ci"]
assert low < distances.mean() < high and abs((high - low)/2 - 1.96*distances.std()/300**0.5) < 0.1
assert landmark_errors([[0, 0, 0]], [[3, 4, 0]]).tolist() == [5]
with raises(DataError, match="1 found, 2 wanted"): landmark_errors([[0, 0, 0]], [[3, 4, 0], [0, 0, 0]])

# %% [markdown]
# ## Overlap and surfaces
# Two empty masks agree, so their Dice is 1 and they have no surface to be apart. HD95 is the larger of the two 95th
# percentiles of the distances from one surface to the other; if one mask is empty it is infinite, written as null.

# %%
#| export
def dice(
    a: np.ndarray, # (x, y, z) bool
    b: np.ndarray, # (x, y, z) bool
) -> float: # [0, 1]
    "Overlap of two masks"
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape: raise DataError(f"dice: masks differ in shape, got {a.shape} and {b.shape}")
    total = int(a.sum()) + int(b.sum())
    return 2*int((a & b).sum())/total if total else 1.0

def _surface(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import binary_erosion
    return mask & ~binary_erosion(mask)

def hd95(
    a: np.ndarray, # (x, y, z) bool
    b: np.ndarray, # (x, y, z) bool
    spacing: Sequence[float] = (1.0, 1.0, 1.0), # (x, y, z) voxel size [mm]
    percentile: float = 95.0, # of the distances; 100 is the Hausdorff distance itself
) -> float: # [mm]; inf if one mask is empty
    "Distance between the surfaces of two masks, without the farthest 5 %"
    import edt
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape: raise DataError(f"hd95: masks differ in shape, got {a.shape} and {b.shape}")
    if not a.any() or not b.any(): return 0.0 if a.any() == b.any() else math.inf
    both = a | b
    box = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(both))
    sa, sb = (_surface(np.pad(m[box], 1)) for m in (a, b))
    sizes = tuple(float(s) for s in spacing)
    to_b, to_a = (edt.edt(np.ascontiguousarray(~s), anisotropy=sizes, black_border=False) for s in (sb, sa))
    return float(max(np.percentile(to_b[sa], percentile), np.percentile(to_a[sb], percentile)))

def compare_labels(
    found: Volume, # label map to be judged, any grid
    wanted: Volume, # label map that is right
    labels: Sequence[int] | None = None, # ids that count; default: all but 0 in `wanted`
) -> list[dict[str, Any]]: # one row a label: label, dice, hd95, voxels, wanted_voxels
    "Dice and HD95 of every label, on the grid of the right one"
    for name, v in (("found", found), ("wanted", wanted)):
        if v.channels is not None or v.dtype.kind not in "biu":
            raise DataError(f"{name}: a label map of whole numbers is needed, got {v.dtype} of shape {v.data.shape}")
    wanted = to_axes(wanted, "xyz")
    found = to_axes(found, "xyz")
    if not same_grid(found, wanted, 0.01): found = resample_to(found, wanted.affine, wanted.shape, order=0)
    a, b = np.asarray(found.data), np.asarray(wanted.data)
    ids = [int(k) for k in np.unique(b) if k] if labels is None else [int(k) for k in labels]
    if not ids: raise DataError("labels: the right label map is empty")
    return [{"label": k, "dice": dice(a == k, b == k), "hd95": hd95(a == k, b == k, wanted.spacing),
             "voxels": int((a == k).sum()), "wanted_voxels": int((b == k).sum())} for k in ids]

# %%
abdomen = phantoms.abdomen((40, 30, 36), seed=1)
right = Volume(abdomen.lbl.astype(np.uint8), affine_from(abdomen.spacing))
shifted = Volume(np.roll(right.data, 1, axis=0), right.affine)
rows = compare_labels(shifted, right)
plot.bars({str(r["label"]): r["dice"] for r in rows}, "Dice after a shift by one voxel")

# %%
ball = phantoms.ball(24, radius=7)
assert dice(ball, ball) == 1 and dice(ball, ~ball) == 0 and dice(ball & False, ball & False) == 1
assert hd95(ball, np.roll(ball, 2, 0), (3, 1, 1), 100) == 6 and hd95(ball, ball) == 0
assert hd95(ball, ball & False) == math.inf
assert max(r["hd95"] for r in rows) <= abdomen.spacing[0] + 1e-4
with raises(DataError, match="differ in shape"): dice(ball, ball[1:])

# %% [markdown]
# ## Lesions to track
# The benchmark of Cai et al. (*Deep lesion tracker: monitoring lesions in 4D longitudinal imaging studies*, CVPR 2021)
# lists 960 pairs: a lesion in one scan, its box, centre and diameters in the next. Coordinates are voxels, x and y as
# in the pictures of DeepLesion, and *z counts from the other end* than in the NIfTI files: a centre at z is at
# $n_z - z - 1$ there. The diameters are pixels too, although the file's description says millimetres.

# %%
#| export
@dataclass(frozen=True, eq=False)
class LesionPair:
    "A lesion in one scan and where it is in the next; all in voxels of the list, z reversed against the files"
    key: str # name of the pair
    source: str # file of the first scan
    target: str # file of the second scan
    source_center: np.ndarray # (3,) x, y, z [voxel]
    target_center: np.ndarray # (3,) x, y, z [voxel]
    target_box: np.ndarray # (6,) corner x, y, z and size w, h, d [voxel]
    target_spacing: np.ndarray # (3,) [mm]
    diameter: float # longest of the target [voxel of x]
    guess: np.ndarray | None = None # (3,) x, y, z that the list predicts [voxel]

    @property
    def radius_mm(self) -> float: return 0.5*self.diameter*float(self.target_spacing[0]) # half the longest diameter

def _numbers(tree: Mapping, key: str, n: int, where: str) -> np.ndarray:
    try: out = np.asarray(tree.get(key), np.float64)
    except (TypeError, ValueError): out = np.zeros(0)
    if out.shape != (n,) or not np.isfinite(out).all():
        raise FormatError(f"{where}/{key}: {n} numbers are needed, got {str(tree.get(key))[:60]}")
    return out

def read_lesion_pairs(
    path: str | os.PathLike, # test.json of the benchmark, or a list of the same form
) -> list[LesionPair]: # in the order of the file
    "Read the pairs of the lesion tracking benchmark"
    tree = read_json(path)
    if not isinstance(tree, dict) or not tree: raise FormatError(f"{path}: an object of lesion pairs is needed")
    out = []
    for key, t in tree.items():
        where = f"{path}, /{key}"
        if not isinstance(t, dict): raise FormatError(f"{where}: an object is needed")
        for k in ("source", "target"):
            if not isinstance(t.get(k), str) or not t[k]: raise FormatError(f"{where}/{k}: a file name is needed")
        guess = _numbers(t, "predict target center", 3, where) if "predict target center" in t else None
        p = LesionPair(key, t["source"], t["target"], _numbers(t, "source center", 3, where),
                       _numbers(t, "target center", 3, where), _numbers(t, "target box", 6, where),
                       _numbers(t, "target spacing", 3, where),
                       float(_numbers(t, "target recist diameter", 2, where).max()), guess)
        if min(p.target_spacing) <= 0 or p.diameter <= 0 or min(p.target_box[3:]) <= 0:
            raise FormatError(f"{where}: spacing, diameters and box sizes must be > 0")
        out.append(p)
    return out

# %% [markdown]
# ## Four ways to count a hit
# | name | a hit if | whose |
# |---|---|---|
# | `cpm_radius` | $e < r$, half the longest diameter | the benchmark's CPM@Radius |
# | `cpm_10mm` | $e \le \min(r, 10)$ mm | the benchmark's CPM@10mm |
# | `box_hit` | the place is in the 3-D box of the lesion | printed as CPM@Radius by the SAM++ evaluation |
# | `within_10mm` | $e \le 10$ mm | printed as CPM@10MM there |
#
# A box holds its first face and not the last, as ranges of voxels do.

# %%
#| export
_HITS = ("cpm_radius", "cpm_10mm", "box_hit", "within_10mm")

def score_lesions(
    pairs: Sequence[LesionPair], # what is right
    predicted: np.ndarray, # (n, 3) x, y, z in voxels of the list
) -> list[dict[str, Any]]: # one row a pair
    "Judge each prediction by all definitions"
    found = checked_points(predicted)
    if len(found) != len(pairs): raise DataError(f"lesions: {len(pairs)} pairs, {len(found)} predictions")
    rows = []
    for p, at in zip(pairs, found):
        delta = np.abs(at - p.target_center)*p.target_spacing
        e, r = float(np.linalg.norm(delta)), p.radius_mm
        low, size = p.target_box[:3], p.target_box[3:]
        rows.append({"key": p.key, "x": float(at[0]), "y": float(at[1]), "z": float(at[2]), "error_mm": e,
                     "error_x": float(delta[0]), "error_y": float(delta[1]), "error_z": float(delta[2]),
                     "radius_mm": r, "cpm_radius": e < r, "cpm_10mm": e <= min(r, 10),
                     "box_hit": bool(((at >= low) & (at < low + size)).all()), "within_10mm": e <= 10})
    return rows

def lesion_metrics(
    rows: Sequence[Mapping[str, Any]], # from `score_lesions`
    *,
    resamples: int = 2000, # for the intervals
    seed: int = 0, # names the draws
) -> dict[str, Any]: # shares of hits and mean errors with their sd and interval
    "All definitions over all pairs"
    if not rows: raise DataError("lesions: no pairs to be judged")
    names = [*_HITS, "error_mm", "error_x", "error_y", "error_z"]
    table = np.array([[float(r[k]) for k in names] for r in rows])
    low, high = bootstrap(table, resamples, seed=seed)
    mean, sd, e = table.mean(0), table.std(0), table[:, 4]
    out: dict[str, Any] = {"n": len(rows)}
    for i, k in enumerate(_HITS):
        out[k] = float(mean[i])
        out[f"{k}_n"], out[f"{k}_ci"] = int(table[:, i].sum()), [float(low[i]), float(high[i])]
    for i, k in enumerate(("med", "med_x", "med_y", "med_z"), 4):
        out[k], out[f"{k}_sd"], out[f"{k}_ci"] = float(mean[i]), float(sd[i]), [float(low[i]), float(high[i])]
    return out | {"median": float(np.median(e)), "p95": float(np.quantile(e, 0.95)), "max": float(e.max())}

def seed_layout(
    m: Mapping[str, Any], # from `lesion_metrics`
) -> str: # eight lines
    "The numbers as the published evaluation prints them, with its lenient definitions"
    n, hit, near = m["n"], m["box_hit_n"], m["within_10mm_n"]
    lines = [f"{n} {hit} {n - hit}", f"{hit/n}", f"{n} {near} {n - near}", f"{near/n}"]
    return "\n".join(lines + [f"{m[k]} {m[k + '_sd']}" for k in ("med", "med_x", "med_y", "med_z")])

# %% [markdown]
# Twelve lesions with errors from 0 to 22 mm, of growing radius. What is a hit depends on who counts.

# %%
def lesion(i, error):
    centre = np.array([100.0, 120.0, 30.0])
    return {"source": "a.nii.gz", "target": "b.nii.gz", "source center": [90, 80, 20], "target center": centre.tolist(),
            "target box": [*(centre - [9, 9, 3]), 18, 18, 6], "target spacing": [0.8, 0.8, 2.0],
            "target recist diameter": [15 + 3*i, 12], "predict target center": [100 + error/0.8, 120, 30]}

place = tempfile.TemporaryDirectory()
root = Path(place.name)
write_json(root/"test.json", {f"{i:04d}": lesion(i, 2.0*i) for i in range(12)})
pairs = read_lesion_pairs(root/"test.json")
scored = score_lesions(pairs, np.array([p.guess for p in pairs]))
metrics = lesion_metrics(scored)
plot.bars({k: 100*metrics[k] for k in _HITS}, "% hits")

# %%
assert [metrics[f"{k}_n"] for k in _HITS] == [sum(2*i < 0.4*(15 + 3*i) for i in range(12)), 6, 4, 6]
assert metrics["med"] == 11 and metrics["med_y"] == 0 and close(metrics["max"], 22)
assert seed_layout(metrics).splitlines()[:2] == ["12 4 8", f"{4/12}"]
with raises(FormatError, match="/0000/target box: 6 numbers"):
    read_lesion_pairs(write_json(root/"bad.json", {"0000": lesion(0, 0) | {"target box": [1, 2]}}))

# %% [markdown]
# ## From voxels of the list to the world and back
# The list's axes are those of the scan turned to x left, y back, z *down*. With the grid that an embedding keeps of its
# scan this is one line each way. Nothing is rounded and no half voxel is added: a lesion that is matched to itself has
# the error 0. (The reference compares a position that was moved by half a voxel of 2 mm with one that was not.)

# %%
#| export
def list_to_world(
    native: NetGrid, # of a scan, see `Embedding.native`
    pts: np.ndarray, # (n, 3) x, y, z in voxels of the list
) -> np.ndarray: # (n, 3) RAS+ [mm]
    "World positions of the list's coordinates"
    x, y, z = np.asarray(pts, np.float64).T
    return native.to_world(np.stack([native.shape[0] - 1 - z, y, x], 1))

def world_to_list(
    native: NetGrid, # of a scan
    pts_xyz: np.ndarray, # (n, 3) RAS+ [mm]
) -> np.ndarray: # (n, 3) x, y, z in voxels of the list
    "Inverse of `list_to_world`"
    z, y, x = native.to_index(pts_xyz).T
    return np.stack([x, y, native.shape[0] - 1 - z], 1)

def track_lesions(
    pairs: Sequence[LesionPair], # what to track
    stores: str | os.PathLike, # folder of embeddings, named after the scans
    *,
    mode: Literal["nn", "mutual", "fixed_point"] = "fixed_point", # how points are matched
    device: str = "cpu", # where to compute
    cube: int = 1, # 'fixed_point': voxels around the point on each side
    workers: int = 0, # processes that share the pairs of scans; 0: this one, -1: one per processor
) -> tuple[np.ndarray, list[dict[str, Any]]]: # (n, 3) x, y, z in voxels of the list, and a row a pair: score, status
    "Find each lesion in the next scan, with embeddings"
    folder, found, rows = Path(stores), np.zeros((len(pairs), 3)), [{} for _ in pairs]
    if not folder.is_dir(): raise MissingFile(f"{folder} is not a folder of embeddings")
    groups: dict[tuple[str, str], list[int]] = {}
    for i, p in enumerate(pairs): groups.setdefault((p.source, p.target), []).append(i)
    lacking = sorted({n for g in groups for n in g if not (folder/f"{stem_of(n)}.zarr").is_dir()})
    if lacking: raise MissingFile(f"{folder}: {len(lacking)} scans have no embedding, first {stem_of(lacking[0])}.zarr")
    def track(scans: tuple[str, str]) -> tuple[np.ndarray, list[dict]]: # all lesions of two scans
        pair = Matcher(*(folder/f"{stem_of(n)}.zarr" for n in scans), device=device)
        pts = list_to_world(pair.emb_q.native, np.array([pairs[i].source_center for i in groups[scans]]))
        m = pair.match(pts, mode, cube=cube)
        at = world_to_list(pair.emb_k.native, m.matched)
        return at, [{"score": float(s), "status": str(t)} for s, t in zip(m.score, m.status)]
    names = [" -> ".join(g) for g in groups]
    for own, (at, about) in zip(groups.values(), pmap(track, list(groups), workers, keys=names, desc="lesions")):
        found[own] = at
        for i, row in zip(own, about): rows[i] = row
    return found, rows

# %%
scan = Volume(abdomen.img, affine_from((4.0, 4.0, 6.0)))
for name, move in (("a", 0), ("b", 12)):
    write_embedding(position_embedding(scan, lambda p, move=move: p - [move, 0, 0]), root/f"{name}.zarr")
native = position_embedding(scan).native
for i, p in enumerate(pairs[:3]):
    p.source_center[:] = [18, 14 + i, 20]
    p.target_center[:] = world_to_list(native, list_to_world(native, p.source_center[None]) + [12, 0, 0])[0]
found, about = track_lesions(pairs[:3], root)
errors = (found - [p.target_center for p in pairs[:3]])*[4, 4, 6]
np.abs(errors).max(), about[0]["status"]

# %%
assert np.abs(errors).max() < 1 and close(pairs[0].target_center - pairs[0].source_center, [-3, 0, 0], 1e-9)
with raises(MissingFile, match="1 scans have no embedding, first c.zarr"):
    track_lesions(read_lesion_pairs(write_json(root/"c.json", {"1": lesion(0, 0) | {"target": "c.nii"}})), root)

# %% [markdown]
# ## One command
# `medvol embedding evaluate` looks at what it is given: a list of lesion pairs, two files of points, two label maps, or
# the field of a registration. It fills a folder: `metrics.json`, `cases.csv`, and where there are errors to draw, their
# distribution.

# %%
#| export
Kind = Literal["lesions", "landmarks", "labels", "field"]

def _kind_of(path: str | os.PathLike) -> str:
    "What a file holds, by its name and, for JSON, its content"
    name = os.fspath(path).lower()
    if name.endswith((".tfm", ".h5", ".hdf5")): return "field"
    if name.endswith(".json") and not name.endswith(".mrk.json"):
        tree = read_json(path)
        first = next(iter(tree.values()), None) if isinstance(tree, dict) and "points" not in tree else None
        if isinstance(first, dict) and "target box" in first: return "lesions"
    return "landmarks" if name.endswith(POINT_FILES) else "labels"

def read_predictions(
    path: str | os.PathLike, # JSON: pair -> [x, y, z], or pairs with 'predict target center'
    pairs: Sequence[LesionPair], # which are needed
) -> np.ndarray: # (n, 3) x, y, z in voxels of the list
    "Read predicted lesion centres, in the order of the pairs"
    tree = read_json(path)
    if not isinstance(tree, dict): raise FormatError(f"{path}: an object from pair to [x, y, z] is needed")
    if lacking := [p.key for p in pairs if p.key not in tree]:
        raise DataError(f"{path}: {len(lacking)} of {len(pairs)} pairs have no prediction, first {lacking[0]!r}")
    rows = [{"predict target center": t} if isinstance(t := tree[p.key], list) else t for p in pairs]
    return np.array([_numbers(r if isinstance(r, dict) else {}, "predict target center", 3, f"{path}, /{p.key}")
                     for p, r in zip(pairs, rows)])

def _lesions(reference: Any, found: Any, resamples: int, seed: int, dask: str | None, **how: Any
             ) -> tuple[dict, list, dict]:
    pairs, about = read_lesion_pairs(reference), []
    if found is None:
        if lacking := [p.key for p in pairs if p.guess is None]:
            raise DataError(f"{reference}: pair {lacking[0]!r} holds no 'predict target center'; name the predictions")
        at = np.array([p.guess for p in pairs])
    elif Path(found).is_dir():
        with on_cluster(dask): at, about = track_lesions(pairs, found, **how)
    else: at = read_predictions(found, pairs)
    rows = score_lesions(pairs, at)
    metrics = lesion_metrics(rows, resamples=resamples, seed=seed)
    e = np.array([r["error_mm"] for r in rows])
    rows = [{**r, **a} for r, a in zip(rows, about or [{}]*len(rows))]
    return {**metrics, "text": seed_layout(metrics).splitlines()}, rows, {"error": e}

def _landmarks(reference: Any, found: Any, transform: Any, resamples: int, seed: int) -> tuple[dict, list, dict]:
    wanted, own = read_points(reference), read_points(found)
    if len(own) != len(wanted): raise DataError(f"{found}: {len(own)} landmarks, {len(wanted)} in {reference}")
    both, other = set(own.names) & set(wanted.names), set(own.names) ^ set(wanted.names)
    if both and other:
        raise DataError(f"{found}: some landmarks are named as in {reference} and some are not, such as "
                        f"{min(other)!r}. Give them the same names, or none")
    if len(both) == len(wanted): # by name; else in the order of the files
        order = [own.names.index(n) for n in wanted.names]
        own = type(own)(own.xyz[order], wanted.names)
    at = own.xyz if transform is None else read_transform(transform)(own.xyz)
    e = landmark_errors(at, wanted.xyz)
    rows = [{"name": n, "x": p[0], "y": p[1], "z": p[2], "error_mm": float(v)} for n, p, v in zip(wanted.names, at, e)]
    return error_summary(e, resamples=resamples, seed=seed), rows, {"error": e}

def _labels(reference: Any, found: Any) -> tuple[dict, list, dict]:
    rows = compare_labels(read_volume(found), read_volume(reference))
    far = np.array([r["hd95"] for r in rows])
    metrics = {"n": len(rows), "dice": float(np.mean([r["dice"] for r in rows])),
               "hd95": float(far.mean()) if np.isfinite(far).all() else None, "missing": int(np.isinf(far).sum())}
    return metrics, [{**r, "hd95": r["hd95"] if math.isfinite(r["hd95"]) else ""} for r in rows], {}

def _field(reference: Any, mask: Any) -> tuple[dict, list, dict]:
    fields = [s for s in read_transform(reference).steps if isinstance(s, Field)]
    if len(fields) != 1: raise DataError(f"{reference}: one displacement field is needed, it holds {len(fields)}")
    inside = None
    if mask is not None:
        m = to_axes(read_volume(mask), "xyz")
        inside = resample_to(m, fields[0].affine, fields[0].shape, order=0).data > 0
    report = jacobian_report(fields[0], inside)
    return report, [report], {}

def evaluate(
    reference: str | os.PathLike, # lesion pairs, points, label map that is right; or the field to be judged
    out: str | os.PathLike, # folder to make
    predicted: str | os.PathLike | None = None, # lesion centres or folder of embeddings; points; label map
    *,
    kind: Literal["auto"] | Kind = "auto", # what is judged; a field as .nii.gz must be named
    transform: str | os.PathLike | None = None, # landmarks: applied to the predicted points first
    mask: str | os.PathLike | None = None, # field: where it counts
    mode: Literal["nn", "mutual", "fixed_point"] = "fixed_point", # lesions: how they are matched
    device: str = "cpu", # where to compute
    resamples: int = 2000, # for confidence intervals
    seed: int = 0, # of their draws
    workers: int = 0, # lesions: processes that share the pairs of scans; 0: this one, -1: one per processor
    dask: str | None = None, # lesions: address of a Dask scheduler whose workers see the same folders
    on_exists: OnExists = "error", # what to do when `out` is there already
) -> dict: # the metrics and the folder
    "Judge lesion tracking, landmarks, label maps or a field"
    what = _kind_of(reference) if kind == "auto" else kind
    given = [p for p in (reference, predicted, transform, mask) if p is not None]
    if not check_output(out, on_exists, inputs=given): return {"out": Path(out), "skipped": True}
    if what in ("landmarks", "labels") and predicted is None: raise DataError(f"{what}: name what is to be judged, too")
    if what == "lesions":
        found = _lesions(reference, predicted, resamples, seed, dask, mode=mode, device=device, workers=workers)
    elif what == "landmarks": found = _landmarks(reference, predicted, transform, resamples, seed)
    elif what == "labels": found = _labels(reference, predicted)
    elif what == "field": found = _field(reference, mask)
    else: raise DataError(f"kind: must be auto, lesions, landmarks, labels or field, got {kind!r}")
    metrics, rows, errors = found
    with atomic(out, on_exists, folder=True) as t:
        write_json(t/"metrics.json", {"kind": what, **metrics})
        write_csv(t/"cases.csv", rows)
        if errors: plot.save_figure(error_curves(errors), t/"errors.png")
    return {"kind": what, **metrics, "out": Path(out)}

def error_curves(
    errors: Mapping[str, np.ndarray], # name -> array (n,) of distances [mm]
    title: str = "", # above the chart
) -> Any: # figure
    "Share of cases up to each distance"
    series = {k: (np.sort(e), np.arange(1, len(e) + 1)/len(e)) for k, e in errors.items()}
    return plot.curves(series, title=title, xlabel="distance [mm]", ylabel="share of cases")

# %%
first = evaluate(root/"test.json", root/"lesions")
{k: v for k, v in first.items() if k in ("n", "cpm_radius", "med", "med_ci")}

# %%
some = rng.uniform(-50, 50, (30, 3))
write_points(root/"right.csv", some)
write_points(root/"left.fcsv", some + rng.normal(0, 3, some.shape))
near = evaluate(root/"right.csv", root/"points", root/"left.fcsv")
error_curves({"landmarks": np.array([float(r["error_mm"]) for r in read_csv(root/"points/cases.csv")])})

# %%
for name, v in (("right", right), ("shifted", shifted)): write_volume(v, root/f"{name}.nii.gz")
labels = evaluate(root/"right.nii.gz", root/"labels", root/"shifted.nii.gz")
assert near["n"] == 30 and 3 < near["mean"] < 7 and close(labels["dice"], np.mean([r["dice"] for r in rows]))
assert sorted(p.name for p in (root/"lesions").iterdir()) == ["cases.csv", "errors.png", "metrics.json"]
with raises(DataError, match="name what is to be judged"): evaluate(root/"right.csv", root/"x")
place.cleanup()
