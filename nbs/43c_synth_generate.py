# %% [markdown]
# # From shapes to a data set
#
# > Bank in, store out, in one command, on one processor or a cluster, stopped and resumed at will: the same bytes.
#
# The reference makes a data set in three steps with two copies in between. When a data set is extended, a tenth of it
# is repeated under new names, and a run that was stopped begins anew. Here a run is a set of shards that are there or
# not. The three steps exist as well, with the names and options of the reference, for those who want to look at, or
# change, what is in between.

# %%
#| default_exp synth.generate

# %%
#| export
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.config import check_config, load_config
from medvol_nb.core import (ConfigError, DataError, Locked, MissingFile, OnExists, check_output, file_digest,
                            fingerprint, human_bytes, human_time, lock, log, plain, remove_tree)
from medvol_nb.geometry import Volume
from medvol_nb.parallel import BatchError, cpu_count, on_cluster, pmap
from medvol_nb.plot import montage, save_figure
from medvol_nb.synth.labels import EnsembleConfig, EnsemblePlan, draw_plan, render_labels
from medvol_nb.synth.pairfile import Compression, PairFile, Sample, array_digest
from medvol_nb.synth.pairs import SynthConfig, SyntheticPairs, make_pair, one_thread, render_two
from medvol_nb.synth.stores import (SHARD, PairReader, finish_store, index_of, is_whole, pair_by_name, prepare_store,
                                    read_head, read_pair, read_record, shard_range, write_record, write_shard)
from medvol_nb.synth.templates import TemplateBank, _is_readable, _labels_of, _workers, build_bank, templates
from medvol_nb.synth.views import ViewConfig
from medvol_nb.volume import read_header, stem_of, write_volume

# %%
import tempfile

from medvol_nb.core import raises
from medvol_nb.synth.templates import procedural_bank

# %% [markdown]
# ## Filling a store
# One task is one shard. A task looks whether its shard is there, takes its lock, makes the samples, writes data and
# record. A process that dies leaves no record, and a lock that is broken by whoever comes next. What another process
# has in hand is looked at again at the end, so any number of commands may work on the same folder. One shard is tried
# again twice if its process is killed; then it is listed and the others go on.

# %%
#| export
@lru_cache(maxsize=2)
def _opened(path: str, digest: str) -> TemplateBank:
    bank = TemplateBank.open(path)
    if bank.digest != digest: raise DataError(f"{path}: the bank is not the one that this run began with")
    return bank

def _pairs_of(job: Mapping[str, Any], shard: int, store: Path) -> None:
    "Make the samples of a shard from a bank"
    bank, config = _opened(job["bank"], job["digest"]), check_config(SynthConfig, job["config"])
    made = (make_pair(job["seed"], i, bank, config, backend=job["backend"], device=job["device"])
            for i in shard_range(read_head(store), shard))
    write_shard(store, shard, made)

def _files_of(job: Mapping[str, Any], shard: int, store: Path) -> None:
    "Read the samples of a shard from files"
    head = read_head(store)
    write_shard(store, shard, (read_pair(tuple(job["files"][str(i)]), head["seg_dtype"])
                               for i in shard_range(head, shard)))

def _visible(plan: EnsemblePlan) -> int: return plan.n_shapes - plan.first_hidden

def _ensemble_of(job: Mapping[str, Any], index: int, store: Path) -> None:
    "Make one label map as NIfTI file"
    bank, config = _opened(job["bank"], job["digest"]), check_config(EnsembleConfig, job["config"])
    plan = draw_plan(job["seed"], index, config, len(bank))
    with one_thread(): seg = render_labels(plan, bank, backend=job["backend"], device=job["device"])
    name = f"{plan.kind}_shapes{_visible(plan)}_{index:07d}"
    file = write_volume(Volume(seg, np.eye(4)), store/f"{name}.nii.gz", "overwrite")
    row = {"id": name, "index": index, "kind": plan.kind, "shapes": _visible(plan), "plan": plan.digest,
           "sha256": {"seg": array_digest(seg)}}
    write_record(store, index, [file], [row])

def _views_of(job: Mapping[str, Any], index: int, store: Path) -> None:
    "Make the two pictures of one label map as NIfTI files"
    source = Path(job["files"][str(index)])
    seg, config = _labels_of(source)[0], check_config(ViewConfig, job["config"])
    if seg.ndim != 3: raise DataError(f"{source}: a label map is (x, y, z), got shape {seg.shape}")
    if seg.max() > 65535: raise DataError(f"{source}: holds numbers up to {seg.max()}. Is it a label map?")
    with one_thread():
        img, digests = render_two(seg.astype("u1" if seg.max() < 256 else "u2"), job["seed"], index, config,
                                  job["device"])
    names = [f"view{v}/view{v}_{stem_of(source)}.nii.gz" for v in (1, 2)]
    for a, name in zip(img, names): write_volume(Volume(a, np.eye(4)), store/name, "overwrite")
    row = {"id": stem_of(source), "index": index, "view1": digests[0], "view2": digests[1]}
    write_record(store, index, [store/n for n in names], [row], input=file_digest(source))

_MAKERS: dict[str, Callable[[Mapping[str, Any], int, Path], None]] = {
    "pairs": _pairs_of, "files": _files_of, "ensembles": _ensemble_of, "views": _views_of}

def _is_done(job: Mapping[str, Any], shard: int, store: Path, verify: bool) -> bool:
    if not is_whole(store, shard, verify): return False
    if job["what"] != "views": return True
    return read_record(store, shard)["input"] == file_digest(job["files"][str(shard)]) # made from this label map?

def _fill_shard(task: Mapping[str, Any]) -> str:
    "Make one shard unless it is there"
    store, shard, job = Path(task["store"]), task["shard"], task["job"]
    try:
        with lock(store/"records"/f"{shard:06d}"):
            if _is_done(job, shard, store, task["verify"]): return "skipped"
            _MAKERS[job["what"]](job, shard, store)
            return "done"
    except Locked: return "busy"

def fill(
    store: str | os.PathLike, # folder, see `prepare_store`
    shards: Sequence[int], # which ones
    job: Mapping[str, Any], # plain values that say how samples are made
    *,
    workers: int = 0, # processes; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers see the same folders
    timeout: float | None = None, # [s] a shard may take; needs workers
    verify: bool = False, # compare finished shards with their digests and make damaged ones again
) -> dict[str, int]: # done, skipped
    "Make what is missing of some shards; failures are told at the end"
    store, count, failed = Path(store).absolute(), Counter(), {}
    head = read_head(store)
    def narrow(shard: int) -> dict[str, Any]: # a task carries its own files only
        items = [shard] if job["what"] == "views" else shard_range(head, shard)
        mine = {"files": {str(i): job["files"][str(i)] for i in items}} if "files" in job else {}
        return {"store": str(store), "shard": shard, "job": {**job, **mine}, "verify": verify}
    def untouched(shard: int) -> bool: # there, and without the lock of somebody who died after the record
        return _is_done(job, shard, store, False) and not (store/"records"/f"{shard:06d}.lock").exists()
    todo = [s for s in shards if verify or not untouched(s)]
    count["skipped"] = len(shards) - len(todo)
    with on_cluster(dask):
        while todo:
            values, failures = pmap(_fill_shard, [narrow(s) for s in todo], workers, timeout=timeout, errors="collect",
                                    keys=[f"{store.name} {s:06d}" for s in todo], desc=job["what"])
            failed |= {todo[f.index]: f for f in failures}
            count.update(v for v in values if v in ("done", "skipped"))
            todo = [s for s, v in zip(todo, values) if v == "busy"]
            if todo: time.sleep(0.5)
    if failed:
        raise BatchError([replace(f, index=s) for s, f in sorted(failed.items())], [dict(count)], len(shards))
    return {"done": count["done"], "skipped": count["skipped"]}

def part_of(
    shards: Sequence[int], # all
    shard: str | None, # "2/8": the second of eight parts; None: everything
) -> list[int]: # those of this part
    "Divide the work over machines that know nothing of each other"
    if shard is None: return list(shards)
    try: i, n = (int(w) for w in shard.split("/"))
    except ValueError: i, n = 0, 0
    if not 1 <= i <= n: raise ConfigError(f"shard: must be i/n with i = 1...n, such as 2/8, got {shard!r}")
    return list(shards)[i - 1::n]

# %%
part_of(range(10), "2/4"), part_of(range(3), None)

# %%
for bad in ("0/4", "5/4", "2", "a/b", "1/0"):
    with raises(ConfigError, match="shard: must be i/n"): part_of(range(10), bad)

# %% [markdown]
# ## What commands have in common
# The bank comes from a folder made by `medvol synth templates`, or is built beside the output from any tree of
# segmentations, or is made by formula (`procedural`). A bank that an earlier run put beside the output is used again,
# unless it is of something else. A contact sheet shows what was made.

# %%
#| export
def bank_for(
    templatedir: str | os.PathLike, # bank, segmentations, or 'procedural' or 'procedural:COUNT'
    beside: str | os.PathLike, # output of the command; a bank that has to be made is put next to it
    workers: int = 0, # processes
) -> Path: # folder of a bank
    "Find or make the bank"
    source, out = Path(templatedir), Path(beside).absolute()
    if (source/"bank.json").is_file(): return source
    out = out.with_name(f"{out.name}.bank")
    if str(templatedir).split(":")[0] == "procedural" and not source.exists():
        try: n = int((str(templatedir) + ":48").split(":")[1])
        except ValueError: n = 0
        if n < 1: raise ConfigError(f"templatedir: 'procedural:COUNT' with COUNT >= 1, got {templatedir!r}")
        templates(out, procedural=n, on_exists="skip")
        return out
    if not source.exists():
        raise MissingFile(f"templatedir: {source} does not exist. Name a folder of segmentations, a bank made with "
                          "`medvol synth templates`, or 'procedural' for shapes made by formula")
    build_bank(source, out, workers=workers, on_exists="skip")
    return out

def contact_sheet(
    pairs: PairReader | SyntheticPairs, # what is shown
    path: str | os.PathLike, # .png to write
    n: int = 8, # samples
) -> Path: # `path`
    "Picture of the first samples: both views and the labels"
    some = range(min(n, len(pairs)))
    if not some: raise DataError("preview: there are no samples yet")
    shown, lbls, titles = [], [], []
    for i in some:
        sample = pairs[i]
        z = sample["seg"].shape[2]//2
        seg = sample["seg"][:, :, z].T[::-1]
        shown += [*(v[:, :, z].T[::-1] for v in sample["img"]), np.full(seg.shape, 128, np.uint8)]
        lbls += [np.zeros_like(seg), np.zeros_like(seg), seg]
        titles += [f"{i} view 1", "view 2", "labels"]
    fig = montage(shown, 6, titles, lbls=lbls, alpha=1.0, limits=(0, 255))
    return save_figure(fig, path, "overwrite")

def _start(out: Path, on_exists: OnExists, shard: str | None) -> None:
    "Look at the place of the output before any work is done"
    if not check_output(out, on_exists) or not out.exists(): return
    if shard is not None: raise ConfigError("on_exists: 'overwrite' with shard would remove what other parts made")
    with lock(out): remove_tree(out)

def _device(device: str) -> str:
    from medvol_nb.checkpoints import device_for
    return str(device_for(device))

def _about() -> dict[str, str]: return {k: version(k) for k in ("medvol_nb", "numpy", "torch")}

def _settings(config: Any, preset: str, **given: Any) -> SynthConfig:
    "Settings of a file, changed by options that were given"
    if config is not None and preset != "anatomix":
        raise ConfigError(f"preset: the settings come from {config}. Write `preset: {preset}` into its groups "
                          "`ensemble` and `view`, or leave out one of the two")
    base = plain(load_config(SynthConfig, config)) if config is not None else \
        {"ensemble": {"preset": preset}, "view": {"preset": preset}}
    base["ensemble"] |= {k: v for k, v in given.items() if v is not None}
    return check_config(SynthConfig, base)

def _foresee(config: SynthConfig, seed: int, bank: TemplateBank, n: int, todo: int, workers: int, bytes_each: int,
             make: Callable[[int], Any]) -> dict[str, Any]:
    "Statistics of the first plans, bytes, and the time that one sample takes"
    plans = [draw_plan(seed, i, config.ensemble, len(bank)) for i in range(min(n, 1000))]
    kinds = Counter(p.kind for p in plans)
    make(0) # compiles
    start = time.perf_counter()
    make(min(1, n - 1))
    each = time.perf_counter() - start
    total = todo*each/max(1, cpu_count() if workers < 0 else workers)
    shapes = [_visible(p) for p in plans]
    return {"samples": n, "to_do": todo, "kinds": {k: round(v/len(plans), 3) for k, v in sorted(kinds.items())},
            "shapes": {"least": min(shapes), "mean": round(float(np.mean(shapes)), 1), "most": max(shapes)},
            "templates": len(bank), "bytes": todo*bytes_each, "size": human_bytes(todo*bytes_each),
            "seconds_each": round(each, 3), "seconds": round(total, 1), "time": human_time(total)}

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
bank = procedural_bank(12, seed=1, size=(8, 20))
bank.save(root/"bank")
toy = check_config(SynthConfig, {"ensemble": {"shape": 32, "min_templates": 6, "max_templates": 12}})
flying = SyntheticPairs(bank, 6, toy)
sheet = contact_sheet(flying, root/"sheet.png", 2)
bank_for(root/"bank", root/"x") == root/"bank", sheet.stat().st_size > 1000

# %% [markdown]
# ## The command that does it all
# `medvol synth generate`: bank in, store out.

# %%
#| export
def generate(
    out: str | os.PathLike = "./synthetic_pairs", # folder of the store
    *,
    n_ensembles: int = 120000, # samples; a store can be extended later
    min_templates: int | None = None, # fewest shapes of an ensemble; default 20
    max_templates: int | None = None, # most shapes, exclusive in the preset anatomix; default 40
    side_length: int | None = None, # of the cube [voxel]; default 128
    templatedir: str | os.PathLike = "./Totalsegmentator_dataset/", # bank, segmentations, or 'procedural'
    val_count: int = 100, # so many of the last samples are for validation
    seed: int = 0, # same seed, same bytes
    preset: Literal["anatomix", "medvol"] = "anatomix", # the reference exactly, or with its quirks repaired
    config: str | os.PathLike | None = None, # YAML or JSON file with `ensemble` and `view` settings and presets
    store: Literal["zarr", "hdf5"] = "zarr", # kind of store
    compression: Compression = "none", # of HDF5 chunks
    backend: Literal["auto", "numba", "torch"] = "auto", # of the labels; the result is the same
    device: str = "cpu", # where views are rendered; a GPU draws other noise
    shard: str | None = None, # part of the work, such as 2/8 for the second of eight machines
    max_workers: int | None = None, # processes; default: one per processor
    workers: int | None = None, # the same: 0 is this process, -1 one per processor
    dask: str | None = None, # address of a Dask scheduler
    timeout: float | None = None, # [s] a shard of 16 samples may take
    on_exists: OnExists = "skip", # 'skip': go on where an earlier run stopped
    verify: bool = False, # compare what is there with its digests and make damaged shards again
    preview: str | os.PathLike | None = None, # PNG with the first samples
    dry_run: bool = False, # tell statistics, bytes and time, write nothing but a bank
) -> dict[str, Any]: # shards done and skipped, whether the store is complete; or what a dry run found
    "Make a store of pairs of views from a bank of shapes, without files in between"
    out, n_workers = Path(out), _workers(workers, max_workers)
    cfg = _settings(config, preset, min_templates=min_templates, max_templates=max_templates, shape=side_length)
    part_of([], shard)
    if n_ensembles < 1: raise ConfigError(f"n_ensembles: must be >= 1, got {n_ensembles}")
    if not dry_run: _start(out, on_exists, shard)
    bank_path = bank_for(templatedir, out, n_workers)
    bank, device = TemplateBank.open(bank_path), _device(device)
    val_count = min(val_count, n_ensembles)
    shards = range(math.ceil(n_ensembles/SHARD))
    mine = part_of(shards, shard)
    params = {"what": "pairs", "seed": seed, "bank": bank.digest, "ensemble": plain(cfg.ensemble),
              "view": plain(cfg.view), "device": device.split(":")[0]}
    job = {"what": "pairs", "seed": seed, "bank": str(bank_path.absolute()), "digest": bank.digest,
           "config": plain(cfg), "backend": backend, "device": device}
    if dry_run:
        todo = sum(min(SHARD, n_ensembles - s*SHARD) for s in mine if not is_whole(out, s))
        each = int(np.prod(cfg.ensemble.shape))*(2 + cfg.seg_dtype.itemsize)
        return _foresee(cfg, seed, bank, n_ensembles, todo, n_workers, each,
                        lambda i: make_pair(seed, i, bank, cfg, backend=backend, device=device))
    prepare_store(out, store, n_ensembles, cfg.ensemble.shape, cfg.seg_dtype, val_count=val_count,
                  compression=compression if store == "hdf5" else "none", params=params, about=_about())
    told = fill(out, mine, job, workers=n_workers, dask=dask, timeout=timeout, verify=verify)
    complete = finish_store(out)
    if preview is not None: contact_sheet(PairReader(out), preview)
    return {"store": str(out), "samples": n_ensembles, "shards": len(mine), **told, "complete": complete}

# %%
options = dict(n_ensembles=20, min_templates=6, max_templates=12, side_length=32, templatedir=root/"bank", val_count=4,
               workers=0)
told = generate(root/"pairs", **options, store="hdf5", preview=root/"sheet.png")
foreseen = generate(root/"other", **options, dry_run=True)
told["complete"], {k: foreseen[k] for k in ("kinds", "shapes", "bytes", "to_do")}

# %% [markdown]
# Two commands, each with half of the work, and one that extends twelve samples to twenty: the same files.

# %%
def digests(folder):
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}

for part in ("2/2", "1/2"): halves = generate(root/"halves", **options, store="hdf5", shard=part)
generate(root/"longer", **{**options, "n_ensembles": 12}, store="hdf5")
longer = generate(root/"longer", **options, store="hdf5")
assert digests(root/"pairs") == digests(root/"halves") == digests(root/"longer")
assert halves["complete"] and longer["done"] == 2 and generate(root/"pairs", **options, store="hdf5")["done"] == 0
assert np.array_equal(PairReader(root/"pairs", "val")[0]["img"], make_pair(0, 16, bank, toy).img)

# %% [markdown]
# ## The three steps
# `medvol synth ensembles`, `medvol synth views` and `medvol synth pack` write what the reference's steps write, under
# the same names of options. File names end with the number of the ensemble in seven digits, where the reference has
# random characters: a name belongs to a sample, and a second run does not add a second copy. What `views` makes of a
# label map depends on that number, or on the name for label maps from elsewhere, never on what else is in the folder.

# %%
#| export
def ensembles(
    *,
    n_ensembles: int = 120000, # label maps
    min_templates: int | None = None, # fewest shapes of an ensemble; default 20
    max_templates: int | None = None, # most shapes, exclusive in the preset anatomix; default 40
    side_length: int | None = None, # of the cube [voxel]; default 128
    templatedir: str | os.PathLike = "./Totalsegmentator_dataset/", # bank, segmentations, or 'procedural'
    savedir: str | os.PathLike = "./label_ensembles/", # folder of the label maps
    start_idx: int = 0, # first one to make
    end_idx: int | None = None, # where to stop; default: all
    seed: int = 0, # same seed, same bytes
    preset: Literal["anatomix", "medvol"] = "anatomix", # the reference exactly, or with its quirks repaired
    config: str | os.PathLike | None = None, # YAML or JSON file with `ensemble` settings and preset
    backend: Literal["auto", "numba", "torch"] = "auto", # the result is the same
    device: str = "cpu", # for the backend torch
    shard: str | None = None, # part of the work, such as 2/8
    max_workers: int | None = None, # processes; default: one per processor
    workers: int | None = None, # the same: 0 is this process, -1 one per processor
    dask: str | None = None, # address of a Dask scheduler
    timeout: float | None = None, # [s] a label map may take
    on_exists: OnExists = "skip", # 'skip': go on where an earlier run stopped
    verify: bool = False, # compare what is there with its digests and make damaged files again
    preview: str | os.PathLike | None = None, # PNG with the first label maps
    dry_run: bool = False, # tell statistics, bytes and time, write nothing but a bank
) -> dict[str, Any]: # label maps done and skipped, whether all are there
    "Step 1: label maps of random shapes as NIfTI files"
    out, n_workers = Path(savedir), _workers(workers, max_workers)
    cfg = _settings(config, preset, min_templates=min_templates, max_templates=max_templates, shape=side_length)
    if n_ensembles < 1: raise ConfigError(f"n_ensembles: must be >= 1, got {n_ensembles}")
    mine = part_of(_slice(n_ensembles, start_idx, end_idx), shard)
    if not dry_run: _start(out, on_exists, shard)
    bank_path = bank_for(templatedir, out, n_workers)
    bank, device = TemplateBank.open(bank_path), _device(device)
    def label_map(i: int) -> np.ndarray:
        return render_labels(draw_plan(seed, i, cfg.ensemble, len(bank)), bank, backend=backend, device=device)
    if dry_run:
        todo = sum(not is_whole(out, i) for i in mine)
        return _foresee(cfg, seed, bank, n_ensembles, todo, n_workers, int(np.prod(cfg.ensemble.shape))//14, label_map)
    params = {"what": "ensembles", "seed": seed, "bank": bank.digest, "ensemble": plain(cfg.ensemble)}
    prepare_store(out, "ensembles", n_ensembles, cfg.ensemble.shape, cfg.seg_dtype, params=params, shard_size=1,
                  about=_about())
    job = {"what": "ensembles", "seed": seed, "bank": str(bank_path.absolute()), "digest": bank.digest,
           "config": plain(cfg.ensemble), "backend": backend, "device": device}
    told = fill(out, mine, job, workers=n_workers, dask=dask, timeout=timeout, verify=verify)
    complete = finish_store(out)
    if preview is not None:
        some = [label_map(i)[:, :, cfg.ensemble.shape[2]//2].T[::-1] for i in mine[:12]]
        save_figure(montage([np.ones_like(s) for s in some], lbls=some, alpha=1.0), preview, "overwrite")
    return {"folder": str(out), "ensembles": len(mine), **told, "complete": complete}

def _slice(n: int, start: int, end: int | None) -> range:
    if start < 0 or (end is not None and end < start):
        raise ConfigError(f"start_idx, end_idx: need 0 <= start_idx <= end_idx, got {start} and {end}")
    return range(n)[start:end]

def _number(name: str) -> int:
    "What the random stream of a label map is called"
    own = index_of(name)
    return own if own is not None else 10**7 + int(fingerprint(("ensemble", name)), 16) % 2**62

def views(
    *,
    start_idx: int = 0, # first label map of the sorted folder
    end_idx: int = 120000, # where to stop
    ensembledir: str | os.PathLike = "./label_ensembles/", # folder of label maps
    savedir: str | os.PathLike = "./synthesized_views/", # folder of view1 and view2
    seed: int = 0, # same seed, same bytes
    preset: Literal["anatomix", "medvol"] = "anatomix", # the reference exactly, or with its quirks repaired
    config: str | os.PathLike | None = None, # YAML or JSON file with `view` settings and preset
    device: str = "cpu", # where views are rendered; a GPU draws other noise
    shard: str | None = None, # part of the work, such as 2/8
    max_workers: int | None = 3, # processes
    workers: int | None = None, # the same: 0 is this process, -1 one per processor
    dask: str | None = None, # address of a Dask scheduler
    timeout: float | None = None, # [s] a pair may take
    on_exists: OnExists = "skip", # 'skip': go on where an earlier run stopped
    verify: bool = False, # compare what is there with its digests and make damaged files again
    dry_run: bool = False, # tell how many and how large, write nothing
) -> dict[str, Any]: # pairs done and skipped
    "Step 2: two pictures of each label map as NIfTI files"
    out, source = Path(savedir), Path(ensembledir)
    if not source.is_dir(): raise MissingFile(f"ensembledir: {source} is not a folder. Make label maps with "
                                              "`medvol synth ensembles`")
    cfg, files = _settings(config, preset).view, {}
    for p in sorted(filter(_is_readable, source.iterdir())):
        number = _number(stem_of(p))
        if number in files: raise DataError(f"{files[number]} and {p} have the same number. Rename one of them")
        files[number] = p
    if not files: raise DataError(f"ensembledir: {source} holds no label maps")
    chosen = list(files)[start_idx:_slice(len(files), start_idx, end_idx).stop]
    mine, device = part_of(chosen, shard), _device(device)
    if dry_run:
        todo = [k for k in mine if not is_whole(out, k)]
        voxels = math.prod(read_header(files[mine[0]]).shape) if mine else 0
        return {"pairs": len(mine), "to_do": len(todo), "bytes": int(1.3*voxels*len(todo)),
                "size": human_bytes(1.3*voxels*len(todo))}
    _start(out, on_exists, shard)
    params = {"what": "views", "seed": seed, "view": plain(cfg), "device": device.split(":")[0]}
    prepare_store(out, "views", 0, (0, 0, 0), params=params, shard_size=1, about=_about())
    for v in (1, 2): (out/f"view{v}").mkdir(exist_ok=True)
    job = {"what": "views", "seed": seed, "config": plain(cfg), "device": device,
           "files": {str(k): str(files[k].absolute()) for k in mine}}
    told = fill(out, mine, job, workers=_workers(workers, max_workers), dask=dask, timeout=timeout, verify=verify)
    return {"folder": str(out), "pairs": len(mine), **told}

# %%
#| export
def pack(
    *,
    view1_dir: str | os.PathLike = "synthesized_views/view1", # first pictures
    view2_dir: str | os.PathLike = "synthesized_views/view2", # second pictures
    seg_dir: str | os.PathLike = "label_ensembles", # label maps
    out_dir: str | os.PathLike = "./h5_w_segs/", # folder of train_data.hdf5 and val_data.hdf5, or of the Zarr store
    val_count: int = 100, # samples for validation, the last ones
    print_every: int = 10, # a line of progress every so many samples
    store: Literal["hdf5", "zarr"] = "hdf5", # kind of store
    compression: Compression = "none", # of HDF5 chunks
    pairs: str | os.PathLike | None = None, # instead of pictures: a store whose parts become one file
    workers: int = 0, # processes, for Zarr; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler, for Zarr
    on_exists: OnExists = "skip", # 'skip': go on where an earlier run stopped
    preview: str | os.PathLike | None = None, # PNG with the first samples
    dry_run: bool = False, # tell how many and how large, write nothing
) -> dict[str, Any]: # samples for training and validation, how many were written now
    "Step 3: pictures and labels of each sample, matched by name, into one store"
    out = Path(out_dir)
    if dask is not None and store != "zarr": raise ConfigError("dask: an HDF5 file has one writer. Use --store zarr")
    if pairs is not None: names, load, grid, dtype, origin = _stored(pairs, out)
    else: names, load, grid, dtype, origin = _listed(view1_dir, view2_dir, seg_dir)
    n = len(names)
    if not 0 <= val_count < n: raise ConfigError(f"val_count: must be 0...{n - 1} for {n} samples, got {val_count}")
    size = n*math.prod(grid)*(2 + np.dtype(dtype).itemsize)
    if dry_run: return {"train": n - val_count, "val": val_count, "bytes": size, "size": human_bytes(size)}
    params = {"what": "packed", "names": fingerprint(names), "samples": n, "val_count": val_count}
    if pairs is None and on_exists == "skip": _check_older(origin, out)
    if store == "zarr":
        if pairs is not None: raise ConfigError("pairs: become HDF5 files; a Zarr store is one already")
        _start(out, on_exists, None)
        prepare_store(out, "zarr", n, grid, dtype, val_count=val_count, params=params, about=_about())
        told = fill(out, range(math.ceil(n/SHARD)), {"what": "files", "files": origin}, workers=workers,
                    dask=dask)
        finish_store(out)
        written = told["done"]
    else: written = _pack_hdf5(out, names, load, grid, dtype, val_count, compression, params, print_every, on_exists)
    if preview is not None: contact_sheet(PairReader(out), preview)
    return {"store": str(out), "train": n - val_count, "val": val_count, "written": written}

def _check_older(files: Mapping[str, Sequence[str]], out: Path) -> None:
    "Refuse to go on with a store when pictures were made again since: it would keep the old ones"
    made = [p for p in (*out.glob("*_data.hdf5"), *out.glob("records/*.json")) if p.is_file()]
    if not made: return
    since = min(p.stat().st_mtime_ns for p in made)
    if new := [f for parts in files.values() for f in parts[1:] if os.stat(f).st_mtime_ns > since]:
        raise DataError(f"pack: {len(new)} pictures are newer than what {out} holds of them, such as {new[0]}. Pack "
                        "everything again (--on-exists overwrite), or into another folder")

def _pack_hdf5(out: Path, names: list[str], load: Callable[[int], Sample], grid: tuple, dtype: Any, val_count: int,
               compression: str, params: dict, print_every: int, on_exists: OnExists) -> int:
    "Append what is missing to both files"
    n, written = len(names), 0
    if out.is_symlink() or not out.exists(): check_output(out, on_exists)
    out.mkdir(exist_ok=True)
    for split, indices in (("train", range(n - val_count)), ("val", range(n - val_count, n))):
        with PairFile(out/f"{split}_data.hdf5", grid, dtype, first=indices.start, compression=compression,
                      params=params, on_exists=on_exists) as f:
            for i in indices[len(f):]:
                f.append(load(i))
                written += 1
                if print_every and (i + 1) % print_every == 0: log.info("pack: %d of %d samples", i + 1, n)
    return written

def _listed(view1_dir: Any, view2_dir: Any, seg_dir: Any) -> tuple:
    "Names, reader, grid, type and files of pictures in folders"
    files = pair_by_name(view1_dir, view2_dir, seg_dir)
    first = read_pair(files[0])
    dtype = np.dtype("u1" if np.dtype(read_header(files[0][3]).dtype).itemsize == 1 else first.seg.dtype)
    origin = {str(i): [str(p) for p in f] for i, f in enumerate(files)}
    def load(i: int) -> Sample:
        sample = read_pair(files[i], dtype)
        return sample._replace(facts={"inputs": [file_digest(p) for p in files[i][1:]]})
    return [f[0] for f in files], load, first.seg.shape, dtype, origin

def _stored(path: Any, out: Path) -> tuple:
    "The same of a store"
    reader = PairReader(path)
    if Path(path).resolve() == out.resolve(): raise DataError(f"pack: {path} is also the output")
    if reader.missing: raise DataError(f"pack: {path} is not complete, {reader.missing} samples are missing")
    def load(i: int) -> Sample:
        got, facts = reader[i], reader.facts(i)
        return Sample(facts.get("id", reader.ids[i]), got["img"], got["seg"],
                      {k: v for k, v in facts.items() if k not in ("id", "labels", "sha256", "key", "bytes")})
    seg = reader[0]["seg"]
    return reader.ids, load, seg.shape, seg.dtype, {}

# %%
(root/"steps").mkdir()
steps = {k: v for k, v in options.items() if k != "val_count"}
one = ensembles(savedir=root/"steps"/"labels", **steps, preview=root/"labels.png")
two = views(ensembledir=root/"steps"/"labels", savedir=root/"steps"/"views", workers=0)
folders = {"view1_dir": root/"steps"/"views"/"view1", "view2_dir": root/"steps"/"views"/"view2",
           "seg_dir": root/"steps"/"labels"}
three = pack(**folders, out_dir=root/"steps"/"h5", val_count=4)
pack(**folders, out_dir=root/"steps"/"zarr", val_count=4, store="zarr")
single = pack(pairs=root/"pairs", out_dir=root/"steps"/"single", val_count=4)
one, two, three

# %% [markdown]
# All ways lead to the same voxels: three steps over files, straight into a store, the parts of a store copied into one
# file. A second call has nothing to do.

# %%
ways = [PairReader(root/p) for p in ("pairs", "steps/h5", "steps/zarr", "steps/single")]
for k in (0, 7, 19):
    assert len({array_digest(w[k]["img"]) + array_digest(w[k]["seg"]) for w in ways}) == 1
assert all(w.verify()["ok"] for w in ways) and len(PairReader(root/"steps"/"h5", "val")) == 4
assert pack(**folders, out_dir=root/"steps"/"h5", val_count=4)["written"] == 0

# %%
with raises(ConfigError, match="val_count: must be 0...19"): pack(**folders, out_dir=root/"x", val_count=20)
with raises(MissingFile, match="'procedural' for shapes made by formula"): generate(root/"x", templatedir="absent")
(root/"steps"/"views"/"view1").joinpath(next((root/"steps"/"views"/"view1").glob("*_0000003.nii.gz")).name).unlink()
with raises(DataError, match="1 without view1: .*_0000003"): pack(**folders, out_dir=root/"x", val_count=4)
place.cleanup()
