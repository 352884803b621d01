# %% [markdown]
# # Supervoxels of a whole data list
#
# > Two commands: a few scans, or every case of a data list, on one machine or many, interrupted as often as you like.
#
# The published script skips a case as soon as its folder exists, also when it holds half a file; it hides every error,
# Ctrl-C included, behind "failed. Skipped."; it leaves out fold 0; files of one name in different folders overwrite
# each other. Here a case's folder appears whole or not at all, together with a record of what made it. A case counts as
# done only if that record matches, and failures are told with their reason at the end.

# %%
#| default_exp sv_batch

# %%
#| export
import contextlib
import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from medvol_nb import datalists
from medvol_nb.config import check_config, load_config
from medvol_nb.core import (ConfigError, DataError, FormatError, Locked, MissingFile, OnExists, OutputExists, atomic,
                            check_output, file_digest, fingerprint, lock, log, read_json, write_json)
from medvol_nb.datalists import DataList, item_path, read_datalist
from medvol_nb.geometry import Volume, reorient, same_grid
from medvol_nb.parallel import BatchError, Failure, on_cluster, pmap
from medvol_nb.supervoxels import Features, SupervoxelSettings, encoder_plan, legacy_supervoxels, supervoxels
from medvol_nb.volume import read_header, read_volume, stem_of, write_volume

# %%
import tempfile

from medvol_nb import phantoms
from medvol_nb.core import raises
from medvol_nb.geometry import affine_from

# %% [markdown]
# ## Where results go
# As published: `OUT/STEM/STEM_seg.nii.gz`, and `OUT/sub/folder/STEM/STEM_seg.nii.gz` for files below `data_root_dir`.
# Two scans that would share a folder are an error before anything is computed.

# %%
#| export
class Case(NamedTuple):
    "One scan and the folder of its result"
    image: Path # file to read
    folder: Path # where labels and record go
    @property
    def labels(self) -> Path: return self.folder/f"{self.folder.name}_seg.nii.gz" # the supervoxels
    @property
    def record(self) -> Path: return self.folder/f"{self.folder.name}_seg.json" # what made them

def plan_cases(
    images: Sequence[str | os.PathLike], # scans
    output_dir: str | os.PathLike, # folder of the results
    data_root_dir: str | os.PathLike | None = None, # folders below it are kept
) -> list[Case]: # in the order of `images`
    "Where the supervoxels of every scan go"
    cases, taken = [], {}
    for p in map(Path, images):
        folder = Path(output_dir)
        if data_root_dir is not None:
            try: folder = folder/p.resolve().parent.relative_to(Path(data_root_dir).resolve())
            except ValueError:
                raise DataError(f"{p} is not below data_root_dir {data_root_dir}") from None
        folder = folder/stem_of(p)
        if folder in taken:
            raise DataError(f"{taken[folder]} and {p} would both be written to {folder}. Pass data_root_dir, a folder "
                            "above both, to keep their folders apart")
        taken[folder] = p
        cases.append(Case(p, folder))
    return cases

# %%
[str(c.labels) for c in plan_cases(["/data/a/ct.nii.gz", "/data/b/ct.nii.gz"], "sv", "/data")]

# %%
with raises(DataError, match="would both be written"): plan_cases(["/data/a/ct.nii.gz", "/data/b/ct.nii.gz"], "sv")
with raises(DataError, match="not below"): plan_cases(["/data/a/ct.nii.gz"], "sv", "/elsewhere")

# %% [markdown]
# ## One case
# The folder is filled under a temporary name and moved into place. The record holds the settings, the digest of scan
# and weights, and the figures, but no time and no host: the same scan gives the same bytes everywhere.

# %%
#| export
@dataclass(frozen=True)
class _Work:
    "What a process needs to know beside its case"
    settings: SupervoxelSettings
    checkpoint: str | None = None
    weights: str = "" # digest of the checkpoint
    legacy: bool = False
    device: str = "auto"
    dtype: str = "auto"
    cache: str | None = None
    on_exists: OnExists = "skip"
    since: float = math.inf # when the run began [s]: what is newer was made by another process of it

    def params(self) -> dict[str, Any]:
        "Everything that decides the labels of a given scan"
        return {"format": 1, "legacy": self.legacy, "weights": self.weights, "dtype": self.dtype,
                **self.settings.model_dump(mode="json")}

@functools.lru_cache(maxsize=1)
def _encoder(checkpoint: str | None, device: str, dtype: str) -> Any:
    "One network a process"
    from medvol_nb.samfeat import SamFeatureExtractor
    return SamFeatureExtractor(checkpoint, device=device, dtype=dtype)

def _is_done(case: Case, work: _Work) -> bool:
    "True if the result is there and was made from this scan with these settings"
    if not case.folder.exists(): return False
    ours = case.record.is_file() and case.record.stat().st_mtime >= work.since
    if not ours and work.on_exists == "overwrite": return False
    if not ours and work.on_exists == "error":
        raise OutputExists(f"output {case.folder} exists. Choose on_exists='skip' or 'overwrite' (--on-exists)")
    try: found = read_json(case.record)
    except (FormatError, MissingFile):
        raise OutputExists(f"output {case.folder} exists, but holds no record {case.record.name}: it was not made by "
                           "this command. Choose another folder, or on_exists='overwrite' (--on-exists)") from None
    mine, theirs = work.params(), found.get("params", {})
    other = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
    if found.get("image_bytes") != _size(case.image): other.append("image")
    if other:
        raise OutputExists(f"output {case.folder} was made with other {', '.join(other)}. Choose another folder, or "
                           "on_exists='overwrite' (--on-exists)")
    return case.labels.is_file() and case.labels.stat().st_size == found.get("labels_bytes")

def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())

def _content(path: Path) -> str:
    if path.is_file(): return file_digest(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return fingerprint([(p.relative_to(path).as_posix(), file_digest(p)) for p in files])

def run_case(
    case: Case, # scan and output folder
    work: _Work, # settings
) -> dict[str, Any]: # 'status': done, skipped, or busy if another process has it; and figures
    "Make the supervoxels of one scan, unless they are there"
    row = {"image": str(case.image), "labels": str(case.labels)}
    case.folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try: held.enter_context(lock(case.folder))
        except Locked: return {**row, "status": "busy"}
        if _is_done(case, work): return {**row, "status": "skipped"}
        start, vol = time.monotonic(), read_volume(case.image)
        labels, info = _labels(vol, work)
        with atomic(case.folder, folder=True) as temp:
            out = write_volume(labels, temp/case.labels.name)
            write_json(temp/case.record.name, {
                "params": work.params(), "image": case.image.name, "image_bytes": _size(case.image),
                "image_digest": _content(case.image), "labels_bytes": out.stat().st_size,
                "labels_digest": file_digest(out), "info": info})
        log.info("%s: %d supervoxels in %.1f s", case.image, info["n"], time.monotonic() - start)
        return {**row, "status": "done", "n": info["n"]}

def _labels(vol: Volume, work: _Work) -> tuple[Volume, dict]:
    encoder = _encoder(work.checkpoint, work.device, work.dtype) if work.checkpoint else None
    if work.legacy:
        if encoder is None: raise MissingFile("legacy: needs an encoder. Pass checkpoint (--checkpoint)")
        labels = legacy_supervoxels(vol, encoder.slice_features, work.settings.n_segments)
        return labels, {"n": int(np.count_nonzero(np.bincount(labels.data.ravel())[1:]))}
    found = supervoxels(vol, features=encoder or "intensity", settings=work.settings, cache=work.cache,
                        device=str(encoder.device) if encoder else "cpu")
    return found.labels, found.info

# %% [markdown]
# ## Many cases
# Cases are taken in the order of their size, the largest first, so that the last hour is not spent on one that nobody
# started early. Who works on a case holds its lock. That is all the coordination there is: local processes, the ranks
# of `torchrun`, the workers of a Dask cluster or a second terminal share the work by skipping what is done or busy, and
# whoever comes to the end looks again until nothing is busy. A process that died leaves a lock that is broken, and its
# case is done by another.

# %%
#| export
def _voxels(image: Path) -> int:
    "Size of a scan; unreadable ones come last and complain when it is their turn"
    try: return int(np.prod(read_header(image).shape))
    except (FormatError, DataError, OSError): return 0

def run_cases(
    cases: Sequence[Case], # scans and folders
    work: _Work, # settings
    workers: int = 0, # processes; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler
) -> list[dict]: # one row a case: image, labels, status
    "Make the supervoxels of many scans; failures are told at the end"
    rows: dict[Case, dict] = {}
    failed: dict[Case, Failure] = {}
    todo = sorted(cases, key=lambda c: (-_voxels(c.image), str(c.image)))
    with on_cluster(dask):
        while todo:
            values, failures = pmap(lambda c: run_case(c, work), todo, workers, keys=[str(c.image) for c in todo],
                                    desc="supervoxels", errors="collect")
            failed |= {todo[f.index]: f for f in failures}
            rows |= {c: v for c, v in zip(todo, values) if v is not None}
            todo = [c for c, v in zip(todo, values) if v is not None and v["status"] == "busy"]
            if todo: time.sleep(1)
    if failed: raise BatchError([failed[c] for c in cases if c in failed], [rows.get(c) for c in cases], len(cases))
    return [rows[c] for c in cases]

@dataclass(frozen=True)
class _Choice:
    "What both commands let the user choose; None: as in the settings file, or the usual value"
    n_segments: int | None
    features: Features | None
    checkpoint: str | os.PathLike | None
    device: str
    dtype: str
    views: str | None
    grid_mm: float | None
    window: str | None
    compactness: float | None
    settings: str | os.PathLike | None
    legacy: bool
    cache: str | os.PathLike | None
    on_exists: OnExists

    def work(self) -> tuple[_Work, Any]:
        "Settings and encoder, checked before the first scan is read"
        given = {k: getattr(self, k) for k in ("n_segments", "features", "grid_mm", "window", "compactness")}
        if self.views is not None: given["views"] = self.views.split(",")
        base = {} if self.settings is None else load_config(SupervoxelSettings, self.settings).model_dump()
        cfg = check_config(SupervoxelSettings, {**base, **{k: v for k, v in given.items() if v is not None}})
        if cfg.features == "intensity":
            if self.legacy or self.checkpoint: raise ConfigError("features 'intensity': takes no checkpoint, no legacy")
            return _Work(cfg, on_exists=self.on_exists, since=time.time()), None
        checkpoint = None if self.checkpoint is None else os.fspath(self.checkpoint)
        encoder = _encoder(checkpoint, self.device, self.dtype)
        cache = None if self.cache is None else str(self.cache)
        return _Work(cfg, checkpoint, encoder.digest, self.legacy, self.device, self.dtype, cache,
                     self.on_exists, time.time()), encoder

def _plan(cases: Sequence[Case], work: _Work, encoder: Any) -> dict[str, Any]:
    "What would be done: sizes, slices that go through the encoder, their cost"
    rows = []
    for c in cases:
        head = read_header(c.image)
        row = {"image": str(c.image), "labels": str(c.labels), "shape": list(head.shape), "done": _is_done(c, work)}
        if encoder is not None:
            plan = encoder.plan(head.shape, stride=1) if work.legacy else \
                encoder_plan(read_volume(c.image), encoder, work.settings) # the body decides, so the scan is read
            row |= {"encoder_calls": plan.calls, "tflop": round(plan.tflop, 4)}
        rows.append(row)
    todo = [r for r in rows if not r["done"]]
    totals = {k: sum(r[k] for r in todo) for k in ("encoder_calls", "tflop") if encoder is not None}
    return {"to_do": len(todo), "done": len(rows) - len(todo), **totals, "cases": rows}

def _summary(rows: Sequence[dict]) -> dict[str, Any]:
    return {"done": sum(r["status"] == "done" for r in rows), "skipped": sum(r["status"] == "skipped" for r in rows),
            "cases": list(rows)}

# %% [markdown]
# ## The commands
# `medvol supervoxels infer` takes scans, `medvol supervoxels batch-infer` a data list, of which it writes a copy with
# `label_sv` if asked to. Folds are all by default: a model that never saw supervoxels of fold 0 was the published
# script's surprise.

# %%
#| export
def infer(
    image_file: Sequence[str | os.PathLike], # scans to cut into supervoxels
    *,
    output_dir: str | os.PathLike = "./supervoxel_sam", # folder of the results
    data_root_dir: str | os.PathLike | None = None, # keep the scans' folders below this one
    n_segments: int | None = None, # supervoxels a scan; default 400
    features: Features | None = None, # 'sam' (default): needs a checkpoint; 'intensity': needs nothing
    checkpoint: str | os.PathLike | None = None, # Segment-Anything weights: .pth, .safetensors or Hugging Face folder
    device: str = "auto", # where the encoder runs
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto", # precision of the encoder
    views: str | None = None, # directions of the encoder's slices; default 'ax,cor,sag'
    grid_mm: float | None = None, # voxel size of the clustering [mm]; default 2
    window: str | None = None, # 'ct', 'low,high' or 'auto' (default)
    compactness: float | None = None, # weight of place against features; default 0.15
    settings: str | os.PathLike | None = None, # YAML or JSON file with these and all other settings
    legacy: bool = False, # the published algorithm, step by step
    cache: str | os.PathLike | None = None, # folder that keeps encoded slices for runs with other settings
    workers: int = 0, # processes; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler
    on_exists: OnExists = "skip", # 'skip': go on where an earlier run stopped
    dry_run: bool = False, # tell what would be done and what it costs, write nothing
) -> dict: # counts and one row a case
    "Supervoxels of some scans"
    work, encoder = _Choice(n_segments, features, checkpoint, device, dtype, views, grid_mm, window, compactness,
                            settings, legacy, cache, on_exists).work()
    cases = plan_cases(image_file, output_dir, data_root_dir)
    for c in cases:
        if not c.image.exists(): raise MissingFile(f"{c.image} does not exist")
    if dry_run: return _plan(cases, work, encoder)
    return _summary(run_cases(cases, work, workers, dask))

def select_items(
    dl: DataList, # the list
    key: str = "training,testing", # sections, separated by commas
    folds: str = "all", # 'all', 'train' (every fold but 0), or a fold; sections without folds are not touched
) -> list[tuple[str, int]]: # (section, index) of the items
    "Items of a list that supervoxels are made for"
    if folds not in ("all", "train") and not folds.isdecimal():
        raise ConfigError(f"folds: 'all', 'train' or a number is needed, got {folds!r}")
    def wanted(item: dict) -> bool:
        if folds == "all" or "fold" not in item: return True
        return item["fold"] != 0 if folds == "train" else item["fold"] == int(folds)
    return [(s, k) for s in key.split(",") for k, item in enumerate(dl.items(s)) if wanted(item)]

def batch_infer(
    datalist: str | os.PathLike, # JSON file
    basedir: str | os.PathLike, # folder that the list's paths are relative to
    *,
    output_dir: str | os.PathLike = "./supervoxel_sam", # folder of the results
    data_root_dir: str | os.PathLike | None = None, # keep the scans' folders below this one; default: `basedir`
    n_segments: int | None = None, # supervoxels a scan; default 400
    key: str = "training,testing", # sections of the list
    folds: str = "all", # 'all', 'train' (every fold but 0), or a fold
    features: Features | None = None, # 'sam' (default): needs a checkpoint; 'intensity': needs nothing
    checkpoint: str | os.PathLike | None = None, # Segment-Anything weights: .pth, .safetensors or Hugging Face folder
    device: str = "auto", # where the encoder runs
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto", # precision of the encoder
    views: str | None = None, # directions of the encoder's slices; default 'ax,cor,sag'
    grid_mm: float | None = None, # voxel size of the clustering [mm]; default 2
    window: str | None = None, # 'ct', 'low,high' or 'auto' (default)
    compactness: float | None = None, # weight of place against features; default 0.15
    settings: str | os.PathLike | None = None, # YAML or JSON file with these and all other settings
    legacy: bool = False, # the published algorithm, step by step
    cache: str | os.PathLike | None = None, # folder that keeps encoded slices for runs with other settings
    workers: int = 0, # processes; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler
    write_datalist: str | os.PathLike | None = None, # copy of the list with `label_sv` filled in; replaces an older one
    on_exists: OnExists = "skip", # 'skip': go on where an earlier run stopped
    limit: int | None = None, # only so many cases
    dry_run: bool = False, # tell what would be done and what it costs, write nothing
) -> dict: # counts and one row a case
    "Supervoxels of the cases of a data list"
    work, encoder = _Choice(n_segments, features, checkpoint, device, dtype, views, grid_mm, window, compactness,
                            settings, legacy, cache, on_exists).work()
    if write_datalist is not None: check_output(write_datalist, "overwrite", inputs=[datalist])
    dl = read_datalist(datalist)
    chosen = select_items(dl, key, folds)
    if not chosen and dl.items():
        raise DataError(f"{datalist}: no case of {key} is in the folds asked for, {folds!r}; there are {[*dl.folds()]}")
    chosen = chosen[:limit]
    if many := [f"/{s}/{k}" for s, k in chosen if not isinstance(dl.items(s)[k]["image"], str)]:
        raise DataError(f"{datalist}: supervoxels are made from one image, {', '.join(many[:5])} name several")
    images = {sk: item_path(basedir, dl.items(sk[0])[sk[1]]["image"]) for sk in chosen}
    unique = list(dict.fromkeys(images.values())) # testing cases may be listed twice
    cases = dict(zip(unique, plan_cases(unique, output_dir, basedir if data_root_dir is None else data_root_dir)))
    if dry_run: return _plan(list(cases.values()), work, encoder)
    out = _summary(run_cases(list(cases.values()), work, workers, dask))
    if write_datalist is None or int(os.environ.get("RANK", 0)): return out
    labels = {sk: cases[p].labels for sk, p in images.items()}
    made = with_supervoxels(dl, labels, basedir, output_dir)
    return {**out, **datalists.write_datalist(made, write_datalist, "overwrite")}

def with_supervoxels(
    dl: DataList, # the list
    labels: Mapping[tuple[str, int], Path], # (section, index) -> supervoxel file
    basedir: str | os.PathLike, # folder of the list's paths
    output_dir: str | os.PathLike, # folder of the results; names are relative to it if it is not below `basedir`
) -> DataList: # the same with `label_sv`
    "Fill in `label_sv`"
    root = Path(output_dir).resolve()
    if root.is_relative_to(Path(basedir).resolve()): root = Path(basedir).resolve()
    def filled(section: str) -> tuple[dict, ...]:
        return tuple({**item, "label_sv": labels[section, k].resolve().relative_to(root).as_posix()}
                     if (section, k) in labels else item for k, item in enumerate(dl.items(section)))
    others = {s: list(filled(s)) for s in {s for s, _ in labels} - {"training", "testing"}}
    return replace(dl, training=filled("training"), testing=filled("testing"), extra={**dl.extra, **others})

def metrics(
    labels: str | os.PathLike, # supervoxels
    truth: str | os.PathLike, # segmentation on the same grid
    *,
    image: str | os.PathLike | None = None, # scan, for the explained variation
    tolerance: float = 2.0, # how far a border may be off to count as found [voxel]
) -> dict: # figures, see `supervoxel_metrics`
    "How well supervoxels follow a segmentation"
    from medvol_nb.sv_metrics import supervoxel_metrics
    sv = reorient(read_volume(labels), "RAS")
    others = [reorient(read_volume(p), "RAS") for p in (truth, *([] if image is None else [image]))]
    for p, vol in zip((truth, image), others):
        if not same_grid(sv, vol, 0.1*min(sv.spacing)): raise DataError(f"{p} does not lie on the grid of {labels}")
    return supervoxel_metrics(sv.data, others[0].data, sv.spacing, tolerance=tolerance,
                              image=None if image is None else others[1].data)

# %% [markdown]
# ## A small data set
# Three cases in two folders, cut without a network. The second call has nothing to do; another number of supervoxels in
# the same folder is refused, not mixed in.

# %%
place = tempfile.TemporaryDirectory()
work_dir = Path(place.name)
for k, name in enumerate(["a/one", "a/two", "b/one"]):
    case = phantoms.abdomen(seed=k)
    small = Volume(case.img[::2, ::2, ::2].astype(np.int16), affine_from([2*s for s in case.spacing]))
    (work_dir/"data"/name).parent.mkdir(parents=True, exist_ok=True)
    write_volume(small, work_dir/"data"/f"{name}.nii.gz")
    write_volume(replace(small, data=case.lbl[::2, ::2, ::2]), work_dir/"data"/f"{name}_seg.nii.gz")
items = [{"image": "a/one.nii.gz", "fold": 0}, {"image": "a/two.nii.gz", "fold": 1}]
listed = DataList("toy", tuple(items), ({"image": "b/one.nii.gz"},), {1: "liver"})
datalists.write_datalist(listed, work_dir/"toy.json")
call = dict(basedir=work_dir/"data", output_dir=work_dir/"sv", n_segments=60, features="intensity")
first = batch_infer(work_dir/"toy.json", **call, write_datalist=work_dir/"toy_sv.json")
again = batch_infer(work_dir/"toy.json", **call)
[(r["status"], r["n"], Path(r["labels"]).relative_to(work_dir).as_posix()) for r in first["cases"]]

# %%
assert first["done"] == 3 and again == {"done": 0, "skipped": 3, "cases": again["cases"]}
assert read_datalist(work_dir/"toy_sv.json").training[0]["label_sv"] == "a/one/one_seg.nii.gz"
with raises(BatchError, match="made with other n_segments"):
    batch_infer(work_dir/"toy.json", **{**call, "n_segments": 50})

# %%
metrics(first["cases"][0]["labels"], work_dir/"data"/"a/one_seg.nii.gz")

# %% [markdown]
# No weights, no supervoxels: the message names files that would do.

# %%
with raises(MissingFile, match="sam_vit_b_01ec64.pth"): infer([work_dir/"data"/"a/one.nii.gz"])
with raises(ConfigError, match="folds: 'all', 'train' or a number"): select_items(listed, folds="first")

# %%
place.cleanup()
