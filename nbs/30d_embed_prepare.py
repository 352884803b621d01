# %% [markdown]
# # Folders of scans for training
#
# > One command: CT, organ masks or CT-MR pairs in, any orientation, evenly spaced scans with body masks out.
#
# Training reads the same scans thousands of times, so they are prepared once: resampled to 1.6 mm, cut to the body,
# with a mask beside them. The reference has a script for each data set, with its paths inside; one bad file ends the
# pool of workers, a rerun starts from the beginning, the numbers of the organs depend on the order in which a disk
# lists files, and the script called *crop* does not crop. Here it is one function, `prepare`, behind
# `medvol embedding prepare`. It goes on where it stopped, lists what it could not use in `failed.csv`, and writes names
# of labels next to the labels.

# %%
#| default_exp embed.prepare

# %%
#| export
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import ndimage

from medvol_nb.core import (ConfigError, DataError, MissingFile, OnExists, log, read_json, sweep_temporary, write_csv,
                            write_json)
from medvol_nb.embed.data import (SCAN_SUFFIXES, Contrast, checked_scan, contrast_of, limits_of, list_scans, net_volume,
                                  rescale)
from medvol_nb.geometry import Volume, resample, resample_to, same_grid
from medvol_nb.parallel import BatchError, Failure, Ledger, cpu_count, on_cluster, pmap
from medvol_nb.volume import read_volume, stem_of, write_volume

# %%
import contextlib
import tempfile

from matplotlib import pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import raises, read_csv
from medvol_nb.geometry import affine_from, reorient

# %% [markdown]
# ## The body, slice by slice
# The published rule thresholds (-900 HU for CT alone, -300 HU for pairs, in MR percentile 0.2 plus 30), then cleans
# each axial slice: closing and opening with a disk of radius 3, dropping objects below 2000 pixels (the couch), and
# filling holes below 40 000. That takes most of the preparation's time, and counts pixels, which were 0.8 mm wide: in a
# scan with pixels of 4 mm the same count is a whole neck. So these are lengths and areas here, and slices are cleaned
# on the resampled grid; `exact=True` counts pixels on the grid of the file, as published.
# Two things differ. What touches the edge of a slice is no hole: the published rule fills all the air of a picture of
# less than 200 by 200 pixels. And an MR that was scaled to a small range has its threshold at a tenth of that range.

# %%
#| export
class SliceRule(NamedTuple):
    "How the body is found in slices; lengths and areas are counted in pixels of 0.8 mm"
    threshold: float = -900 # CT: body is above it [HU]
    above: float = 30 # MR: body is above percentile 0.2 by this, at most by a tenth of the range
    radius: float = 3 # of the disk for closing and opening [pixel]
    objects: float = 2000 # smaller ones are dropped [pixel]
    holes: float = 40000 # smaller ones are filled [pixel]

RULES = {"ct": SliceRule(), "pairs": SliceRule(-300, holes=30000), "regions": SliceRule(-300, holes=25000)}

_PIXEL = 0.8 # of the scans that the rule was made for [mm]
_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)

def _sizes(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Components of each slice, and the size of the component of each number"
    found, n = ndimage.label(mask, _IN_PLANE)
    return found, np.bincount(found.reshape(-1), minlength=n + 1)

def clean_slices(
    mask: np.ndarray, # (z, y, x) bool
    radius: float = 3, # of the disk [voxel]; below 0.5 nothing is closed or opened
    objects: float = 2000, # smaller ones of a slice are dropped [voxel]
    holes: float = 40000, # smaller ones of a slice are filled [voxel]
) -> np.ndarray: # (z, y, x) bool
    "Close, open, drop small objects and fill holes, which do not touch the edge, in each slice by itself"
    reach = np.arange(-int(radius), int(radius) + 1)
    disk = (reach[:, None]**2 + reach**2 <= radius**2)[None]
    if disk.size > 1:
        mask = ndimage.binary_erosion(ndimage.binary_dilation(mask, disk), disk, border_value=1)
        mask = ndimage.binary_dilation(ndimage.binary_erosion(mask, disk, border_value=1), disk)
    found, size = _sizes(mask)
    keep = size >= objects
    keep[0] = False
    mask = keep[found]
    found, size = _sizes(~mask)
    fill = size < holes
    for edge in (found[:, 0], found[:, -1], found[:, :, 0], found[:, :, -1]): fill[edge] = False
    fill[0] = False
    return mask | fill[found]

def slice_mask(
    vol: Volume, # scan in the axes of the networks
    contrast: Contrast, # 'ct' or 'mr'
    rule: SliceRule = SliceRule(), # threshold and sizes
    exact: bool = False, # the rule counts the voxels of `vol`, whatever their size
) -> np.ndarray: # (z, y, x) bool
    "Find the body in each axial slice"
    ratio = 1.0 if exact else _PIXEL/float(np.sqrt(vol.spacing[1]*vol.spacing[2]))
    img = np.asarray(vol.data)
    level = rule.threshold
    if contrast == "mr":
        low, high = np.percentile(img, (0.2, 99.8))
        level = low + min(rule.above, 0.1*(high - low))
    mask = clean_slices(img > level, rule.radius*ratio, rule.objects*ratio**2, rule.holes*ratio**2)
    if not mask.any():
        raise DataError(f"empty body mask: nothing above {level:g} is left after cleaning the slices")
    return mask

# %%
patient = phantoms.abdomen((128, 96, 40), seed=1)
couch = patient.img.copy()
couch[20:108, 4] = 200
ct = net_volume(Volume(couch, affine_from((2.4, 2.6, 8.0), (-150, -120, -100))))
rule = SliceRule(radius=4.7)
fine = slice_mask(ct, "ct", rule)
coarse = resample(ct, (8, 3.6, 3.6))
rough = slice_mask(coarse, "ct", rule)
fig, axs = plt.subplots(1, 2, figsize=(6, 2.6), layout="constrained")
for ax, v, m, name in ((axs[0], ct, fine, "file"), (axs[1], coarse, rough, "coarse grid")):
    ax.imshow(v.data[v.shape[0]//2], cmap="Greys_r", vmin=-1000, vmax=400)
    ax.contour(m[v.shape[0]//2], [0.5], colors="tab:orange", linewidths=1)
    ax.set(xticks=[], yticks=[], title=name)

# %%
inside = net_volume(Volume(patient.lbl > 0, affine_from((2.4, 2.6, 8.0)))).data
assert fine[inside].mean() > 0.99 and abs(fine.mean() - rough.mean()) < 0.03
assert not fine[:, -6:].any() and not rough[:, -4:].any() # the couch, in the last rows: y runs to the back
blob = np.zeros((2, 20, 20), bool)
blob[0, 2:12, 2:12], blob[0, 5:7, 5:7], blob[1, 0, 0] = True, False, True
clean = clean_slices(blob, 0, objects=5, holes=10)
assert clean[0].sum() == 100 and not clean[1].any()
with raises(DataError, match="empty body mask"): slice_mask(replace(ct, data=ct.data*0 - 1000), "ct")

# %% [markdown]
# ## One scan
# The body is cut out of the resampled scan. A CT of whole numbers stays one (rounding moves it by at most half a unit
# of its 4000), which halves the files.

# %%
#| export
def _stored(img: np.ndarray, like: np.dtype, contrast: Contrast) -> np.ndarray:
    "Resampled intensities as they are written: CT of integers stays int16"
    if contrast != "ct" or np.dtype(like).kind not in "iu": return np.asarray(img, np.float32)
    return np.clip(np.rint(img), -32768, 32767).astype(np.int16)

def _cut(vol: Volume, low: Sequence[int], high: Sequence[int]) -> Volume:
    "Part of a volume between two indices"
    affine = vol.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.asarray(low, float)
    return replace(vol, data=np.asarray(vol.data[tuple(slice(a, b) for a, b in zip(low, high))]), affine=affine)

def prepare_scan(
    vol: Volume, # scan, any axes and orientation
    spacing: float = 1.6, # wanted voxel size [mm]
    *,
    contrast: Literal["auto"] | Contrast = "auto", # 'ct' or 'mr'
    rule: SliceRule = RULES["ct"], # how the body is found
    crop: bool = True, # cut to the box around the body
    exact: bool = False, # find the body on the grid of the file, as published, not on the new one
) -> tuple[Volume, Volume]: # image and uint8 mask, in the axes of the networks
    "Resample a scan and find the body in it"
    vol = net_volume(checked_scan(vol, str(vol.meta.get("path", "scan"))))
    kind = contrast_of(vol) if contrast == "auto" else contrast
    img = resample(vol, spacing)
    if exact:
        body = replace(vol, data=slice_mask(vol, kind, rule, exact=True).astype(np.uint8))
        mask = resample_to(body, img.affine, img.shape, order=0).data
    else: mask = slice_mask(img, kind, rule).astype(np.uint8)
    if not mask.any(): raise DataError("empty body mask on the new grid")
    img = replace(img, data=_stored(img.data, vol.dtype, kind), meta={})
    lbl = replace(img, data=mask)
    if not crop: return img, lbl
    spans = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {a}))) for a in range(3)]
    box = [int(s[0]) for s in spans], [int(s[-1]) + 1 for s in spans]
    return _cut(img, *box), _cut(lbl, *box)

# %%
img, lbl = prepare_scan(ct, 4.0, rule=rule)
img, lbl, f"{lbl.data.mean():.0%} of the box is body"

# %%
upright = prepare_scan(reorient(ct, "RAI"), 4.0, rule=rule)
assert np.array_equal(img.data, upright[0].data) and same_grid(img, upright[0])
floats = prepare_scan(replace(ct, data=ct.data.astype(np.float32)), 4.0, rule=rule)[0].data
assert np.abs(img.data - floats).max() <= 0.5
few = SliceRule(radius=1.5, objects=200, holes=4000) # in voxels of the file
exact = prepare_scan(ct, 4.0, rule=few, exact=True, crop=False)[1].data
quick = prepare_scan(ct, 4.0, rule=rule, crop=False)[1].data
assert (exact == quick).mean() > 0.98

# %% [markdown]
# ## Regions with a contrast of their own
# For [curves by region](30a_embed_intensity.ipynb): about 15 supervoxels inside the body (SLIC; Achanta et al., TPAMI
# 2012). So few regions need no fine grid: they are found at 4 mm and carried over.

# %%
#| export
def make_slic_mask(
    vol: Volume, # scan, any axes and orientation
    n_segments: int = 15, # regions
    compactness: float = 0.01, # weight of distance against brightness; 0.05 for MR
    *,
    contrast: Literal["auto"] | Contrast = "auto", # 'ct' or 'mr'
    grid_mm: float = 4.0, # regions are found on a grid of this voxel size [mm]
    exact: bool = False, # find the body on the grid of the file
) -> Volume: # int32 labels 1, 2, ... in the body and 0 outside, on the grid of `vol` in the axes of the networks
    "Divide the body into regions of similar brightness"
    from skimage.segmentation import slic
    vol = net_volume(checked_scan(vol, str(vol.meta.get("path", "scan"))))
    kind = contrast_of(vol) if contrast == "auto" else contrast
    small = resample(vol, [max(grid_mm, s) for s in vol.spacing])
    mask = slice_mask(small, kind, RULES["regions"])
    unit = (rescale(small.data, limits_of(small.data, kind)) + 50)/255
    found = slic(unit, n_segments=n_segments, compactness=compactness, mask=mask, start_label=1, channel_axis=None,
                 spacing=small.spacing).astype(np.int32)
    nearest = ndimage.distance_transform_edt(found == 0, sampling=small.spacing, return_distances=False,
                                             return_indices=True)
    regions = resample_to(replace(small, data=found[tuple(nearest)]), vol.affine, vol.shape, order=0).data
    body = slice_mask(vol, kind, RULES["regions"], exact=True) if exact else \
        resample_to(replace(small, data=mask.astype(np.uint8)), vol.affine, vol.shape, order=0).data > 0
    return replace(vol, data=np.where(body, regions, 0).astype(np.int32), meta={})

# %%
whole = net_volume(Volume(patient.img, affine_from((2.4, 2.6, 8.0))))
regions = make_slic_mask(whole, grid_mm=8)
plt.figure(figsize=(3, 2.4))
plt.imshow(np.where(regions.data[20] > 0, regions.data[20], np.nan), cmap="tab20", interpolation="nearest")
plt.axis("off")
regions, len(np.unique(regions.data)) - 1

# %%
assert 8 <= len(np.unique(regions.data)) - 1 <= 25 and regions.shape == whole.shape and regions.dtype == np.int32
assert (regions.data[inside] > 0).mean() > 0.95

# %% [markdown]
# ## Organs in one map
# A case of TotalSegmentator is a scan and a file for each organ. Organs get numbers from the *sorted* names of all
# cases, or from a list that is given; `labels.json` keeps them. Where two organs overlap, the later one counts, and the
# voxels are counted. A missing organ is a warning.

# %%
#| export
_CASE_IMAGES = ("ct", "mri", "image") # names of the scan in a case's folder

def _one_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder/f"{n}{s}" for n in names for s in SCAN_SUFFIXES if (folder/f"{n}{s}").exists()), None)

def organ_names(
    src: str | os.PathLike, # folder of cases
) -> list[str]: # sorted; their places from 1 are the labels
    "Names of all organs that any case has"
    files = (p for case in _case_folders(Path(src)) for p in (case/"segmentations").iterdir())
    return sorted({stem_of(p) for p in files if p.name.lower().endswith(SCAN_SUFFIXES) and p.name[0] != "."})

def _case_folders(src: Path) -> list[Path]:
    found = sorted(p.parent for p in src.glob("*/segmentations") if p.is_dir())
    if not found: raise DataError(f"{src}: holds no cases; expected <case>/ct.nii.gz and <case>/segmentations/<organ>")
    return found

def merge_totalseg(
    case: str | os.PathLike, # folder with ct.nii.gz (or mri, image) and segmentations/
    names: Sequence[str], # organs; the first is label 1
) -> tuple[Volume, Volume, dict[str, Any]]: # scan, labels uint8 or uint16; {"missing": names, "overlap": voxels}
    "Merge the organ masks of a case into one label map on the grid of its scan"
    case = Path(case)
    scan = _one_file(case, _CASE_IMAGES)
    if scan is None: raise MissingFile(f"{case}: holds no scan, expected one of {', '.join(_CASE_IMAGES)} (.nii.gz)")
    if len(names) > 65535: raise DataError(f"labels: at most 65535, got {len(names)}")
    img = net_volume(checked_scan(read_volume(scan), str(scan)))
    lbl = np.zeros(img.shape, np.uint8 if len(names) < 256 else np.uint16)
    missing, overlap = [], 0
    for k, name in enumerate(names, 1):
        file = _one_file(case/"segmentations", [name])
        if file is None:
            missing.append(name)
            continue
        part = net_volume(read_volume(file))
        if not same_grid(img, part, 0.1*min(img.spacing)):
            raise DataError(f"{file}: is on another grid than its scan, {part} for {img}")
        inside = np.asarray(part.data) > 0 # 1, or 255 in masks of other programs
        overlap += int(np.count_nonzero(lbl[inside]))
        lbl[inside] = k
    if missing: log.warning("%s: %d organs have no file, first %s", case.name, len(missing), missing[0])
    if not lbl.any(): raise DataError(f"{case}: no organ has a voxel")
    return replace(img, meta={}), replace(img, data=lbl, meta={}), {"missing": missing, "overlap": overlap}

# %% [markdown]
# ## Pairs of CT and MR
# Files that differ only in the end of their names, `_0000` (CT), `_0001`, `_0002` (MR), are one case. Whether they are
# registered makes no difference here; registration comes later and writes the same names.

# %%
#| export
_PAIR_END = re.compile(r"_(\d{4})$")

def pair_files(
    src: str | os.PathLike, # folder of scans
) -> dict[str, dict[str, Path]]: # id -> {'0000': CT, '0001': MR, ...}
    "Group the scans of a folder into cases"
    cases: dict[str, dict[str, Path]] = {}
    for p in list_scans(src):
        if not (m := _PAIR_END.search(stem_of(p))): continue
        case = cases.setdefault(stem_of(p)[:m.start()], {})
        if m[1] in case: raise DataError(f"{src}: {case[m[1]].name} and {p.name} are the same part of one case")
        case[m[1]] = p
    if not cases: raise DataError(f"{src}: holds no pairs; expected names such as p1_0000.nii.gz and p1_0001.nii.gz")
    return cases

def prepare_pair(
    files: Mapping[str, str | os.PathLike], # end of the name -> scan; '0000' is the CT
    spacing: float = 1.6, # wanted voxel size [mm]
    *,
    exact: bool = False, # find the body on the grid of the file
) -> dict[str, tuple[Volume, Volume]]: # end of the name -> image and mask
    "Resample the scans of a case and find the body in each"
    if "0000" not in files or len(files) < 2:
        raise DataError(f"a pair needs a CT (_0000) and an MR (_0001 or more), got {sorted(files)}")
    out = {}
    for end, file in files.items():
        vol = read_volume(file)
        out[end] = prepare_scan(vol, spacing, contrast="ct" if end == "0000" else "mr", rule=RULES["pairs"], crop=False,
                                exact=exact)
    return out

# %% [markdown]
# ## The command
# All three kinds write the same layout, which [`read_cases`](30c_embed_sampler.ipynb) reads: `images/`, `masks/`
# (organs or body) with the same file names, `index.csv` with a column `name`, `failed.csv` with `path` and `error`. A
# rerun does what is missing: finished cases are skipped if their outputs are there and their input is the same file. If
# some cases failed, the others are finished first.
#
# Zarr stores are the default because training cuts boxes out of them without reading the rest.

# %%
#| export
Kind = Literal["ct", "totalseg", "pairs"] # single scans of any contrast, organ masks, CT-MR pairs

def _state(files: Sequence[Path]) -> list[list]:
    "Names, sizes and times of input files; of a folder, those of its files"
    flat = [f for p in files for f in (sorted(q for q in p.rglob("*") if q.is_file()) if p.is_dir() else [p])]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in flat]

def _find(src: Path, kind: str) -> dict[str, list[Path]]:
    "Case -> its input files"
    if kind == "totalseg": return {p.name: [p] for p in _case_folders(src)}
    if kind == "pairs": return {i: list(files.values()) for i, files in pair_files(src).items()}
    found = list_scans(src)
    names = [stem_of(p) for p in found]
    if not found: raise DataError(f"{src}: holds no scans ({' '.join(SCAN_SUFFIXES)}, or folders of .dcm)")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f"{src}: several scans are called {twice[0]!r}; outputs are named after them")
    return {n: [p] for n, p in zip(names, found)}

def _prepare_one(task: Mapping[str, Any]) -> dict[str, Any]:
    "Prepare one case: the names of its outputs, and what is to be told about it"
    name, files, job, dst = task["name"], [Path(f) for f in task["files"]], task["job"], Path(task["dst"])
    about: dict[str, Any] = {}
    if job["kind"] == "totalseg":
        img, lbl, about = merge_totalseg(files[0], job["labels"])
        made = {name: (img, lbl)}
    elif job["kind"] == "pairs":
        ends = {_PAIR_END.search(stem_of(f))[1]: f for f in files}
        made = {f"{name}_{end}": v for end, v in prepare_pair(ends, job["spacing"], exact=job["exact"]).items()}
    else:
        made = {name: prepare_scan(read_volume(files[0]), job["spacing"], contrast=job["contrast"], crop=job["crop"],
                                   exact=job["exact"])}
    outputs, names = [], []
    for stem, (img, lbl) in made.items():
        names.append(stem + job["suffix"])
        parts = {"images": img, "masks": lbl}
        if job["regions"]:
            known = job.get("contrast", "auto")
            if job["kind"] == "pairs": known = "ct" if stem.endswith("_0000") else "mr"
            parts["regions"] = make_slic_mask(img, contrast=known, exact=job["exact"])
        for folder, vol in parts.items():
            outputs.append(f"{folder}/{names[-1]}")
            write_volume(vol, dst/outputs[-1], "overwrite")
    return {"outputs": outputs, "names": names, "input": _state(files), **about}

def _index(dst: Path, ledger: Ledger, cases: Mapping[str, list[Path]], failures: Mapping[str, Failure]) -> None:
    "Lists of what is there and of what could not be used"
    done = [n for name in cases if name not in failures and ledger.is_done(name) for n in ledger.value(name)["names"]]
    write_csv(dst/"index.csv", [{"name": n} for n in done], ["name"])
    failed = [{"path": str(cases[k][0]), "error": f.error} for k, f in sorted(failures.items())]
    write_csv(dst/"failed.csv", failed, ["path", "error"])

def _label_names(labels: Any, src: Path) -> list[str]:
    "Names of the organs in the order of their numbers"
    if labels is None: return organ_names(src)
    if isinstance(labels, (str, Path)): labels = read_json(labels)
    if isinstance(labels, Mapping):
        if sorted(labels) != sorted(str(k) for k in range(1, len(labels) + 1)):
            raise ConfigError(f"labels: must number organs from 1, got {sorted(labels)[:5]} ...")
        labels = [labels[str(k)] for k in range(1, len(labels) + 1)]
    texts = isinstance(labels, Sequence) and all(isinstance(n, str) for n in labels)
    if not texts or len(set(labels)) < len(labels):
        raise ConfigError("labels: must be different names, or a JSON file with them")
    return list(labels)

# %%
#| export
def prepare(
    src: str | os.PathLike, # folder of scans; for 'totalseg' of cases with segmentations/
    dst: str | os.PathLike, # folder to fill
    *,
    kind: Kind = "ct", # 'ct': single scans, 'totalseg': organ masks (SAM++), 'pairs': CT and MR (Cross-SAM)
    spacing: float = 1.6, # voxel size of the prepared scans [mm]; 'totalseg' keeps its own
    contrast: Literal["auto"] | Contrast = "auto", # of single scans
    crop: bool = True, # cut single scans to the body
    exact: bool = False, # find bodies on the grids of the files, as published: slower
    regions: bool = False, # also write regions that get a contrast of their own
    labels: str | os.PathLike | Sequence[str] | None = None, # organs, or .json with them; default: all, by name
    suffix: Literal[".zarr", ".nii.gz"] = ".zarr", # kind of files to write
    workers: int = 0, # processes; 0: in this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers see the same folders
    timeout: float | None = None, # [s] a case may take; needs workers
    on_exists: OnExists = "skip", # 'skip': go on where it stopped
) -> dict[str, Any]: # numbers of cases and files, folder
    "Prepare a folder of scans for training; cases that cannot be used are listed in failed.csv"
    src, dst = Path(src), Path(dst)
    if not src.is_dir(): raise MissingFile(f"{src} does not exist, or is no folder")
    if kind not in ("ct", "totalseg", "pairs"): raise ConfigError(f"kind: must be ct, totalseg or pairs, got {kind!r}")
    if suffix not in (".zarr", ".nii.gz"): raise ConfigError(f"suffix: must be .zarr or .nii.gz, got {suffix!r}")
    if not spacing > 0: raise ConfigError(f"spacing: must be > 0 mm, got {spacing}")
    cases = _find(src, kind)
    job: dict[str, Any] = {"kind": kind, "suffix": suffix, "exact": exact, "regions": regions, "version": 1}
    if kind == "totalseg": job["labels"] = _label_names(labels, src)
    else: job |= {"spacing": float(spacing)}
    if kind == "ct": job |= {"contrast": contrast, "crop": crop}
    for folder in ("images", "masks", "regions"):
        if regions or folder != "regions": (dst/folder).mkdir(parents=True, exist_ok=True)
    failures: dict[str, Failure] = {}
    with Ledger(dst/"ledger.jsonl", job, on_exists=on_exists) as ledger, on_cluster(dask) as there:
        for folder in dst.iterdir():
            if folder.is_dir(): sweep_temporary(folder)
        if kind == "totalseg": write_json(dst/"labels.json", {str(k): n for k, n in enumerate(job["labels"], 1)})
        for name, files in cases.items():
            if ledger.is_done(name) and ledger.value(name)["input"] != _state(files):
                ledger.failed(name, "its input has changed")
        keys = list(cases)
        step = 8*(there or (workers if workers > 0 else cpu_count())) # the lists grow with every step
        for at in range(0, len(keys), step):
            part = keys[at:at + step]
            tasks = [{"name": k, "files": [str(f) for f in cases[k]], "job": job, "dst": str(dst)} for k in part]
            _, failed = pmap(_prepare_one, tasks, workers, keys=part, desc="prepare", errors="collect", ledger=ledger,
                             timeout=timeout)
            failures |= {f.key: f for f in failed}
            _index(dst, ledger, cases, failures)
        overlap = sum(ledger.value(k).get("overlap", 0) for k in keys if k not in failures)
        n_files = sum(len(ledger.value(k)["names"]) for k in keys if k not in failures)
    told = {"cases": len(cases) - len(failures), "failed": len(failures), "files": n_files, "out": str(dst)}
    if failures: raise BatchError(list(failures.values()), [told], len(cases))
    return told | ({"overlap": overlap} if kind == "totalseg" else {})

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
def save(img, path, affine=affine_from((3, 3, 5))):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_volume(Volume(img, affine), path, "overwrite")

people = [phantoms.abdomen((96, 80, 24), seed=k) for k in range(3)]
for k, p in enumerate(people):
    write_volume(reorient(Volume(p.img, affine_from((3, 3, 5))), ("RAS", "LPI", "SAR")[k]), root/f"ct_{k}.nii.gz")
    save(p.img, root/"pairs"/f"p{k}_0000.nii.gz")
    save(np.where(p.img > -500, 400 - np.abs(p.img - 60), 0).astype(np.int16), root/"pairs"/f"p{k}_0001.nii.gz")
    save(p.img, root/"ts"/f"s{k}"/"ct.nii.gz")
    for name, value in (("liver", 2), ("aorta", 5), ("spleen", 3)):
        save((p.lbl == value).astype(np.uint8), root/"ts"/f"s{k}"/"segmentations"/f"{name}.nii.gz")
told = {kind: prepare(root/sub, root/f"out_{kind}", kind=kind, spacing=4)
        for kind, sub in (("ct", ""), ("pairs", "pairs"), ("totalseg", "ts"))}
told

# %%
shown = [read_volume(root/"out_ct"/"images"/"ct_2.zarr"), read_volume(root/"out_pairs"/"images"/"p2_0001.zarr"),
         read_volume(root/"out_totalseg"/"masks"/"s2.zarr")]
fig, axs = plt.subplots(1, 3, figsize=(7, 2.2), layout="constrained")
for ax, v, name in zip(axs, shown, ("CT, cut to the body", "MR", "organs")):
    ax.imshow(v.data[v.shape[0]//2], cmap="tab20" if name == "organs" else "Greys_r", interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=name)
shown

# %% [markdown]
# Whatever the orientation of the files, the outputs have one; labels are numbered by name; a rerun does nothing.

# %%
assert read_json(root/"out_totalseg"/"labels.json") == {"1": "aorta", "2": "liver", "3": "spleen"}
organs = read_volume(root/"out_totalseg"/"masks"/"s1.zarr")
expected = net_volume(Volume(people[1].lbl, affine_from((3, 3, 5)))).data
assert np.array_equal(organs.data == 2, expected == 2) and organs.dtype == np.uint8
assert [r["name"] for r in read_csv(root/"out_ct"/"index.csv")] == ["ct_0.zarr", "ct_1.zarr", "ct_2.zarr"]
before = {p: p.stat().st_mtime_ns for p in (root/"out_ct"/"images").rglob("*")}
assert prepare(root, root/"out_ct", spacing=4) == told["ct"]
assert before == {p: p.stat().st_mtime_ns for p in (root/"out_ct"/"images").rglob("*")}

# %% [markdown]
# Bad scans are listed and the good ones are finished; a repaired file is all that a rerun works on.

# %%
(root/"broken.nii.gz").write_bytes(b"\x1f\x8b damaged")
save(np.zeros((8, 8, 8), np.int16), root/"flat.nii.gz")
save(np.zeros((2, 8, 8, 8), np.int16)[0] + np.arange(8, dtype=np.int16) - 1024, root/"air.nii.gz")
with raises(BatchError, match="3 of 6 items failed"): prepare(root, root/"out_ct", spacing=4)
listed = {Path(r["path"]).name: r["error"] for r in read_csv(root/"out_ct"/"failed.csv")}
save(people[0].img, root/"broken.nii.gz")
with contextlib.suppress(BatchError): prepare(root, root/"out_ct", spacing=4)
{k: v[-60:] for k, v in listed.items()}

# %%
assert listed.keys() == {"broken.nii.gz", "flat.nii.gz", "air.nii.gz"}
names = [r["name"] for r in read_csv(root/"out_ct"/"index.csv")]
assert names == ["broken.zarr", "ct_0.zarr", "ct_1.zarr", "ct_2.zarr"]
with raises(DataError, match="other parameters"): prepare(root, root/"out_ct", spacing=5)
with raises(DataError, match="holds no cases"): prepare(root, root/"x", kind="totalseg")
place.cleanup()
