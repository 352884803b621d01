# %% [markdown]
# # Judging from the command line
#
# > `medvol embryo metrics` and `medvol embryo classify`: the pages before, with the names users of the reference type.
#
# Nothing new is computed here. A data set, a split and weights are found, checked and handed to the functions of
# [quality](63a_embryo_quality.ipynb), [classifier](63b_embryo_classify.ipynb), [scores](63c_embryo_scores.ipynb) and
# [study](63d_embryo_study.ipynb). Real pictures for the metrics are those of *test* videos, because the classifier
# that judges has seen the training videos; copies are looked for among the training videos, because those the
# generator has seen.

# %%
#| default_exp embryo.commands

# %%
#| export
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb import plot
from medvol_nb.core import ConfigError, DataError, OnExists, atomic, check_output, read_csv, write_csv
from medvol_nb.embryo.classify import (Architecture, ClassifierConfig, load_classifier, merge_phases, predict_phases,
                                       train_classifier)
from medvol_nb.embryo.dataset import EmbryoFrames, merged_phases
from medvol_nb.embryo.features import LabelledImages, balanced, extract_features
from medvol_nb.embryo.generate import read_record, run_images
from medvol_nb.embryo.index import EmbryoIndex, build_index
from medvol_nb.embryo.phases import PHASES, FocalPlane, label_frames, parse_label, parse_planes, read_phases
from medvol_nb.embryo.quality import Copies, add_quality, copies_figure, refuse_copies, run_quality
from medvol_nb.embryo.scores import (decode_videos, fit_transitions, phase_metrics, plot_metrics, read_metrics,
                                     read_predictions, write_metrics, write_predictions)
from medvol_nb.embryo.splits import load_split, set_name
from medvol_nb.embryo.study import augmentation_study, find_runs, images_of, images_of_run

# %%
import tempfile

from medvol_nb.core import raises, write_json
from medvol_nb.embryo.phantom import jpeg_bytes, make_phantom_dataset
from medvol_nb.phantoms import embryo_frame

# %% [markdown]
# ## Real pictures of a set
# The reference is given the folder of a plane and the folder of annotations; ours are found from the root of the
# extracted data set. Both are understood. Files that are cut off are left out, as are frames without a phase.

# %%
#| export
def _open_index(path: str | os.PathLike, planes: Sequence[str]) -> EmbryoIndex:
    path = Path(path)
    if path.name in {p.folder for p in FocalPlane}: path = path.parent
    return build_index(path, planes)

def _with_annotations(images: LabelledImages, folder: str | os.PathLike | None) -> LabelledImages:
    "The same pictures with phases from other annotation files"
    if folder is None: return images
    phases = np.full(len(images), -1, np.int16)
    frames = np.array([parse_label(i)[2] for i in images.ids])
    for video in np.unique(images.videos):
        mine = np.flatnonzero(images.videos == video)
        mine = mine[np.argsort(frames[mine], kind="stable")]
        phases[mine] = label_frames(frames[mine], read_phases(Path(folder)/f"{video}_phases.csv"))
    return LabelledImages.of(images.sources, phases, images.videos, images.ids)

def real_images(
    index: EmbryoIndex, # of the data set
    videos: Sequence[str], # names
    planes: Sequence[str] = ("F+00",), # focal planes
    *,
    median: bool = False, # the middle frame of each phase alone
    annotations: str | os.PathLike | None = None, # folder of other '<video>_phases.csv'
) -> LabelledImages: # labelled frames of whole files
    "Frames of some videos"
    frames = EmbryoFrames(index, list(videos), list(planes), select="median" if median else "all", on_corrupt="skip",
                          unlabelled=annotations is not None)
    images = _with_annotations(images_of(frames), annotations)
    return images.at(images.phases >= 0)

# %% [markdown]
# ## Metrics
# For every run below `synth_data_path`: a row in `synth_img_metrics.csv`, a picture of the nearest pairs, and a table
# of the synthetic pictures with their phase, the nearest training picture and a mark for copies. Runs leave the house
# through this command alone: with `export` they are copied to a folder to be shared, after the check for copies, and
# not at all if more than one in twenty of the pictures of any run repeats a training picture.

# %%
#| export
def export_run(
    folder: str | os.PathLike, # synthetic run
    out: str | os.PathLike, # new folder
    copies: Copies, # what was found in all its pictures
    *,
    limit: float = 0.05, # largest share of near-copies
    on_exists: OnExists = "error", # what to do when `out` is there already
) -> bool: # False: skipped
    "Copy a synthetic run to a place where it can be shared, unless its pictures repeat training pictures"
    refuse_copies(copies, limit)
    if not check_output(out, on_exists, inputs=[folder]): return False
    files = run_images(folder)
    if len(files) != len(copies.flagged):
        raise DataError(f"{folder}: holds {len(files)} pictures, {len(copies.flagged)} were looked at")
    with atomic(out, on_exists, folder=True) as temp:
        for p in [*files, Path(folder)/"metadata.json"]: shutil.copyfile(p, temp/p.name)
    return True

def metrics(
    *,
    orig_data_path: str | os.PathLike, # extracted data set, or the folder of a plane in it
    synth_data_path: str | os.PathLike, # a synthetic run, or a folder of runs
    model_weights_path: str | os.PathLike, # phase classifier: run folder, .safetensors, .pth
    result_fold_path: str | os.PathLike, # for tables and pictures; created
    split_file_path: str | os.PathLike = "split.json", # says which videos train and test
    orig_data_annot_folder: str | os.PathLike | None = None, # other annotations; default: those of the data set
    model_architecture: Architecture | None = None, # of weights that do not say it
    planes: Sequence[str] = ("F+00",), # focal planes of real pictures
    batch_size: int = 50, # pictures at a time
    num_workers: int = 0, # threads that decode
    num_classes: int = 16, # phases; there are sixteen
    max_dataset_size: int = 5000, # pictures at most: real ones of a phase, synthetic ones of a run
    debug: bool = False, # at most 50 pictures of each kind, for a quick look
    seed: int = 0, # names the choice of pictures
    device: str = "auto", # where the network runs
    dask: str | None = None, # address of a Dask scheduler whose workers see the same files
    cache: str | os.PathLike | None = None, # folder that keeps features; default: 'features' beside the results
    export: str | os.PathLike | None = None, # existing folder into which runs without near-copies are copied
    max_copy_share: float = 0.05, # share of near-copies from which on nothing is exported
) -> dict[str, Any]: # table, the main figures of each run, and what was exported
    "Measure synthetic pictures against real ones"
    if num_classes != len(PHASES): raise ConfigError(f"num_classes: there are {len(PHASES)} phases, got {num_classes}")
    if max_dataset_size < 2: raise ConfigError(f"max_dataset_size: must be at least 2, got {max_dataset_size}")
    if export is not None and (debug or not Path(export).is_dir()):
        raise ConfigError("export: needs all pictures, not --debug" if debug else f"export: {export} is not a folder")
    out, limit = Path(result_fold_path), min(max_dataset_size, 50) if debug else max_dataset_size
    judge = load_classifier(model_weights_path, model_architecture)
    runs = {folder: images_of_run(folder) for folder in find_runs(synth_data_path)}
    if large := [f.name for f, s in runs.items() if export is not None and len(s) > limit]:
        raise ConfigError(f"export: needs a look at all pictures, {', '.join(large)} holds more than max_dataset_size "
                          f"({limit}). Raise it")
    given = parse_planes(planes)
    if odd := [f.name for f in runs if read_record(f)[1] not in given]:
        raise ConfigError(f"planes: {', '.join(odd)} show another focal plane than "
                          f"{', '.join(p.pretty for p in given)}. Measure them with their own --planes")
    index = _open_index(orig_data_path, planes)
    split = load_split(split_file_path, index)
    if lack := [s for s in ("train", "test") if not split.get(s)]:
        raise DataError(f"{split_file_path}: needs videos for {' and '.join(lack)}")
    options = {"batch_size": batch_size, "workers": num_workers, "device": device, "dask": dask,
               "cache": cache or out/"features"}
    asked, real = sorted({int(s.phases[0]) for s in runs.values()}), {}
    for name in ("train", "test"):
        images = real_images(index, split[name], planes, annotations=orig_data_annot_folder)
        picks = [np.flatnonzero(images.phases == p) for p in asked]
        keep = [mine if name == "train" and not debug else mine[balanced(images.at(mine), limit, seed)]
                for mine in picks] # a copy may be of any picture for training
        if name == "train": # other phases give scale to features
            rest = np.flatnonzero(~np.isin(images.phases, asked))
            keep.append(rest[balanced(images.at(rest), limit, seed)])
        real[name] = images.at(np.sort(np.concatenate(keep)))
    features = {k: extract_features(judge.extractor, v, **options) for k, v in real.items()}
    rows, found = [], {}
    for folder, images in runs.items():
        phase = int(images.phases[0])
        images = images.at(np.arange(min(len(images), limit)))
        made = extract_features(judge.extractor, images, **options)
        row, copies = run_quality(features["train"], features["test"], made, phase, seed=seed)
        found[folder] = copies
        table = add_quality(out/"synth_img_metrics.csv", row, model_name=judge.name, orig_data=str(orig_data_path),
                            synth_data=str(folder), label=PHASES[phase])
        of_phase = real["train"].phases == phase
        seen, names = features["train"].at(of_phase), real["train"].at(of_phase).ids
        pairs = [{"id": i, "class_pred": PHASES[p], "nearest": names[n], "correlation": f"{c:.4f}", "copy": bool(f)}
                 for i, p, n, c, f in zip(images.ids, made.probs.argmax(1), copies.nearest, copies.correlations,
                                          copies.flagged)]
        write_csv(out/f"copies_{folder.name}.csv", pairs, on_exists="overwrite")
        plot.save_figure(copies_figure(copies, seen, made), out/f"copies_{folder.name}.png", "overwrite")
        shown = ("fid", "fid_reference", "kid", "precision", "recall", "accuracy_synth", "copies")
        rows.append({"run": folder.name, "label": PHASES[phase]} | {k: round(row[k], 4) if np.isfinite(row[k]) else None
                                                                   for k in shown})
    if export is not None:
        for folder, copies in found.items(): # all of them, before anything is written
            refuse_copies(copies, max_copy_share)
            check_output(Path(export)/folder.name, "error", inputs=[folder])
        for folder, copies in found.items(): export_run(folder, Path(export)/folder.name, copies, limit=max_copy_share)
    return {"table": str(table), "runs": rows, "exported": [f.name for f in found] if export is not None else []}

# %% [markdown]
# ## Classify
# Five things to do with a classifier, chosen by the first word. `train` and `experiment` take training and validation
# videos from the split; `predict` writes tables for one set and decodes videos with transitions of the training set;
# `metrics` compares such tables with annotations; `plot` draws the metrics of several models side by side.

# %%
#| export
Action = Literal["train", "predict", "metrics", "plot", "experiment"]

def _need(value: Any, name: str, action: str) -> Any:
    if value is None or value == (): raise ConfigError(f"classify {action}: --{name.replace('_', '-')} is needed")
    return value

def classify(
    action: Action, # what to do
    *,
    out: str | os.PathLike, # folder for the results; created
    dataset: str | os.PathLike | None = None, # extracted data set
    split_file: str | os.PathLike | None = None, # says which videos train, validate and test
    model: Sequence[str] = (), # weights or run folder; for `plot`: folders of `classify metrics`
    synthetic: str | os.PathLike | None = None, # synthetic runs, to train with (`train`) or to examine (`experiment`)
    set: str = "test", # for `predict` and `metrics`: which videos
    planes: Sequence[str] = ("F+00",), # focal planes
    architecture: Architecture = "densenet121", # network
    size: int = 256, # width and height of the input [pixel]
    ordinal: bool = False, # a head that knows the order of phases
    loss: Literal["ce", "focal"] = "ce", # cross-entropy or focal loss
    balance: Literal["weights", "sampler", "none"] = "weights", # what is done for rare phases
    merge_thb: bool = False, # train the very rare tHB as tEB
    freeze: bool = False, # train the head alone
    train_on_median: bool = False, # the middle frame of each phase alone, for training
    epochs: int = 20, # passes over the data
    steps: int | None = None, # optimiser steps, instead of epochs
    batch_size: int = 16, # pictures a step
    lr: float = 3e-4, # peak learning rate
    fractions: Sequence[float] = (1.0,), # for `experiment`: shares of real videos
    ratios: Sequence[float] = (0.0, 0.5, 1.0, 3.0, 10.0), # for `experiment`: synthetic pictures for each real one
    seeds: Sequence[int] = (0, 1, 2), # for `experiment`: at least three
    seed: int = 0, # names every random stream
    workers: int = 0, # loading processes or threads
    device: str = "auto", # where the network runs
    dask: str | None = None, # for `predict`: address of a Dask scheduler whose workers see the same files
    on_exists: OnExists = "skip", # 'skip': go on, leave equal results, 'overwrite': start anew, 'error': refuse
) -> dict[str, Any]: # what was made, and the main figures
    "Train a phase classifier, predict with it, measure it, draw it, or find out whether synthetic pictures help it"
    out = Path(out)
    if action == "plot":
        models = {Path(m).name: read_metrics(m) for m in _need(tuple(model), "model", action)}
        if len(models) < len(model): raise ConfigError("classify plot: two folders have the same name, rename one")
        return {"files": [str(p) for p in plot_metrics(models, out, on_exists)]}
    index = _open_index(_need(dataset, "dataset", action), planes)
    split = load_split(_need(split_file, "split_file", action), index, set if action in ("predict", "metrics") else
                       None)
    def images(name: str, median: bool = False) -> LabelledImages:
        if not split.get(name): raise DataError(f"{split_file}: has no videos for {name}")
        return real_images(index, split[name], planes, median=median)
    cfg = ClassifierConfig(architecture=architecture, size=size, ordinal=ordinal, loss=loss, balance=balance,
                           merge={"tHB": "tEB"} if merge_thb else {}, freeze=freeze, epochs=epochs, steps=steps,
                           batch_size=batch_size, lr=lr, workers=workers, device=device, seed=seed,
                           weights=model[0] if model and action in ("train", "experiment") else None)
    runs = None if synthetic is None else [images_of_run(f) for f in find_runs(synthetic)]
    made = None if runs is None else sum(runs[1:], runs[0])
    if action == "train":
        real = images("train", train_on_median)
        done = train_classifier(real if made is None else real + made, images("val"), cfg, out_dir=out,
                                on_exists=on_exists)
        return {"run": str(out), "steps": done.steps, "finished": done.finished, "balanced_accuracy": done.best}
    if action == "experiment":
        rows = augmentation_study(images("train", train_on_median), images("val"), images("test"),
                                  _need(made, "synthetic", action), cfg, out=out, fractions=fractions, ratios=ratios,
                                  seeds=seeds, on_exists=on_exists)
        return {"table": str(out/"study.csv"), "figure": str(out/"study.png"),
                "arms": [{k: r[k] for k in ("arm", "mean", "difference", "low", "high", "verdict")} for r in rows]}
    chosen = merge_phases(images(set_name(set)), cfg.merge)
    if action == "predict": return _predict(chosen, index, split, _need(tuple(model), "model", action), out, on_exists,
                                            cfg, dask)
    return _measure(chosen, _need(tuple(model), "model", action), out, on_exists)

# %%
#| export
def _predict(chosen: LabelledImages, index: EmbryoIndex, split: dict, models: Sequence[str], out: Path,
             on_exists: OnExists, cfg: ClassifierConfig, dask: str | None) -> dict[str, Any]:
    transitions = None
    if split.get("train"):
        transitions = fit_transitions([merged_phases(cfg.merge)[index.phase[index.rows(v)]] for v in split["train"]])
    report = {}
    for path in models:
        foreign = not Path(path).is_dir() and Path(path).suffix != ".safetensors" # says neither network nor size
        judge = load_classifier(path, cfg.architecture if foreign else None, cfg.size)
        if judge.name in report: raise ConfigError(f"classify predict: two models are called {judge.name}, rename one")
        probs = predict_phases(judge, chosen, batch_size=cfg.batch_size, workers=cfg.workers, device=cfg.device,
                               dask=dask).probs
        files = list(write_predictions(judge.name, chosen.ids, probs, out, on_exists))
        figures = {"frame by frame": phase_metrics(chosen.phases, probs).overall}
        if transitions is not None:
            decoded = decode_videos(chosen.ids, probs, transitions)
            files += write_predictions(f"{judge.name}_decoded", chosen.ids, probs, out, on_exists, decoded)
            figures["decoded"] = phase_metrics(chosen.phases, probs, decoded).overall
        report[judge.name] = {"files": [str(f) for f in files], **figures}
    return report

def _measure(chosen: LabelledImages, tables: Sequence[str], out: Path, on_exists: OnExists) -> dict[str, Any]:
    report, truth = {}, dict(zip(chosen.ids, chosen.phases.tolist()))
    for path in map(Path, tables):
        name = path.name.removesuffix("_pred-prob.csv")
        ids, probs = read_predictions(path)
        if lack := truth.keys() - set(ids):
            raise DataError(f"{path}: lacks {len(lack)} of {len(truth)} pictures of this set, such as {min(lack)}")
        at = np.array([i in truth for i in ids])
        classes = path.with_name(f"{name}_pred-class.csv")
        predicted = None
        if classes.exists(): # decoded phases are in this table
            found = {r["id"]: int(r["class_pred"]) for r in read_csv(classes, ["id", "class_pred"])}
            predicted = np.array([found[i] for i, ok in zip(ids, at) if ok])
        m = phase_metrics([truth[i] for i, ok in zip(ids, at) if ok], probs[at], predicted)
        write_metrics(m, out/name, on_exists)
        report[name] = {"folder": str(out/name), **m.overall}
    return report

# %% [markdown]
# Nine drawn videos, five of them for training, and two runs of pictures that pretend to be synthetic.

# %%
place = tempfile.TemporaryDirectory()
folder = Path(place.name)
make_phantom_dataset(folder/"data", 9, 30, ["F+00"], 32)
index = build_index(folder/"data", cache=False)
write_json(folder/"split.json", {"train": index.names[:5], "eval": index.names[5:7], "test": index.names[7:]})
counts = [np.bincount(index.phase[np.isin(index.video, v)] + 1, minlength=17)[1:] for v in (range(5), range(7, 9))]
common = np.argsort(-np.minimum(*counts), kind="stable")[:2].tolist() # frequent in training and in test
for phase in common:
    (folder/"runs"/PHASES[phase]).mkdir(parents=True)
    write_json(folder/"runs"/PHASES[phase]/"metadata.json", {"phase": PHASES[phase], "focal-plane": "F+00"})
    for k in range(12):
        (folder/"runs"/PHASES[phase]/f"img{k}.jpg").write_bytes(jpeg_bytes(embryo_frame(phase, 32, 10**6 + k)))

where = {"dataset": folder/"data", "split_file": folder/"split.json"}
settings = {"architecture": "small", "size": 32, "lr": 4e-3, "device": "cpu"}
classify("train", out=folder/"small", steps=60, **where, **settings)

# %%
predicted = classify("predict", model=[str(folder/"small")], out=folder/"tables", device="cpu", **where)
{k: {n: round(v, 2) for n, v in predicted["small"][k].items()} for k in ("frame by frame", "decoded")}

# %%
tables = [str(folder/"tables"/f"{n}_pred-prob.csv") for n in ("small", "small_decoded")]
measured = classify("metrics", model=tables, out=folder/"measured", **where)
drawn = classify("plot", model=[str(folder/"measured"/n) for n in ("small", "small_decoded")], out=folder/"plots")
assert measured["small"]["Accuracy"] == predicted["small"]["frame by frame"]["Accuracy"]
assert measured["small_decoded"]["Accuracy"] == predicted["small"]["decoded"]["Accuracy"] and len(drawn["files"]) == 7

# %%
(folder/"shared").mkdir()
judged = metrics(orig_data_path=folder/"data"/"embryo_dataset", synth_data_path=folder/"runs", device="cpu",
                 model_weights_path=folder/"small", result_fold_path=folder/"quality",
                 split_file_path=folder/"split.json", export=folder/"shared")
judged["runs"]

# %%
rows = read_csv(judged["table"])
assert {r["label"] for r in rows} == {PHASES[p] for p in common} and all(int(r["copies"]) == 0 for r in rows)
assert (folder/"quality"/f"copies_{PHASES[common[0]]}.png").exists()
assert len(list((folder/"shared"/PHASES[common[0]]).iterdir())) == 13 # twelve pictures and their record
with raises(ConfigError, match="--synthetic is needed"): classify("experiment", out=folder/"x", **where)
with raises(ConfigError, match="there are 16 phases"):
    metrics(orig_data_path="x", synth_data_path="x", model_weights_path="x", result_fold_path="x", num_classes=15)
place.cleanup()
