# %% [markdown]
# # Training a multi-task U-Net
#
# > From a settings file to a run folder: weights that carry all they need, a telling log, exact continuation.
#
# The loop itself is the shared `fit` of page 08a. This page puts the parts of the family around it: patches and their
# division (page 52a), samples (page 54a), the network (55) and its losses (56), validation on the same patches every
# time with figures from page 57, and pictures of one validation patch after each epoch. What the reference got wrong
# here: validation voxels that were also training voxels, gradients clipped before they were unscaled, weights of a
# compiled model that nobody could load, a missing checkpoint that meant silent training from scratch.

# %%
#| default_exp zarrnet.train

# %%
#| export
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medvol_nb.checkpoints import Converter, load_checkpoint, load_foreign, load_weights
from medvol_nb.config import check_config
from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, atomic, check_output,
                            fingerprint, log, plain, rng_for, write_json)
from medvol_nb.torchcore import (Batches, FitConfig, FitResult, FitState, at_start, autocast_for, device_for, fit,
                                 precision_for, to_device)
from medvol_nb.zarrnet.augment import Augment, AugmentConfig
from medvol_nb.zarrnet.config import NetworkConfig, Target, ZarrConfig
from medvol_nb.zarrnet.data import GroupedBatches, ImageNormalizer, VolumeDataset, fit_normalizer
from medvol_nb.zarrnet.geometry import normals_rgb
from medvol_nb.zarrnet.loss import MultiTaskLoss
from medvol_nb.zarrnet.metrics import Scores
from medvol_nb.zarrnet.model import MultiTaskUNet, activate, build_model, estimate_memory, level_costs
from medvol_nb.zarrnet.patches import PatchList, Split, patch_list, split_patches, write_split

# %%
import tempfile

from IPython.display import Image

from medvol_nb import phantoms, plot
from medvol_nb.core import raises, read_csv
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet.geometry import encode_normals

# %% [markdown]
# ## Weights that explain themselves
# Every weight file of a run holds, beside the tensors, what is needed to use them: the targets, the network, the number
# of input channels, the patch size and the fitted normalisation. `load_model` builds the network from that. It also
# reads the checkpoints of the reference (`.pth`, with the prefixes that compilation and data parallelism leave behind),
# for which the settings file must say the rest.

# %%
#| export
def describe_model(
    cfg: ZarrConfig, # settings of the run
    in_channels: int, # of the image
    normalizer: ImageNormalizer, # fitted
) -> dict[str, Any]: # plain values
    "What a weight file must carry so that it can be used without the run's settings"
    return {"format": "medvol_nb.zarrnet 1", "in_channels": in_channels,
            "targets": {n: plain(t) for n, t in cfg.targets.items()}, "model_config": plain(cfg.network),
            "patch_size": list(cfg.tr_params.patch_size), "deep_supervision": cfg.tr_params.deep_supervision,
            "normalizer": normalizer.to_dict()}

@dataclass(frozen=True, eq=False)
class TrainedModel:
    "A network with what is needed to use it"
    model: MultiTaskUNet # in evaluation mode
    targets: Mapping[str, Target] # what it predicts
    patch_size: tuple[int, ...] # (z, y, x) of its training [voxel]
    normalizer: ImageNormalizer | None # of its images; None: unknown (weights of the reference)
    digest: str # of its weights

def _upstream(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    "Names without what wrappers put before them, and without the shared encoder's copies"
    bare = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in weights.items()}
    return {k: v for k, v in bare.items() if not (k.startswith("task_decoders.") and ".encoder." in k)}

_UPSTREAM = Converter("multi-task-3d-resencoder-unet", lambda w: True, _upstream)

def weights_in(
    path: str | os.PathLike, # run folder, .safetensors of a run, or .pth of the reference
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]: # tensors by name, and `describe_model` if there is one
    "Read weights from wherever they are"
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path/"best.safetensors", path/"model.safetensors") if p.exists()]
        if not found: raise MissingFile(f"{path}: holds no best.safetensors or model.safetensors, is it a run folder?")
        path = found[0]
    if path.suffix != ".safetensors": return load_foreign(path, (_UPSTREAM,)), None
    saved = load_checkpoint(path)
    about = saved.get("config")
    if "model" not in saved or not isinstance(about, dict) or "model" not in about:
        raise FormatError(f"{path}: these are not weights of `medvol unet train`")
    return saved["model"], about["model"]

def load_model(
    path: str | os.PathLike, # run folder, .safetensors of a run, or .pth of the reference
    device: str = "auto", # where the model goes
    cfg: ZarrConfig | None = None, # settings, for weights that do not carry them
) -> TrainedModel: # network, targets, patch size, normalisation
    "Build the network that a weight file is of"
    weights, about = weights_in(path)
    if about is None and cfg is None:
        raise ConfigError(f"{path}: does not say what network it is of. Pass the settings of its training")
    if about is None: model, patch_size, norm = build_model(cfg), cfg.tr_params.patch_size, None
    else:
        targets = {n: check_config(Target, t, f"{path}: target {n}") for n, t in about["targets"].items()}
        net = check_config(NetworkConfig, about["model_config"], str(path))
        patch_size = tuple(about["patch_size"])
        model = build_model(net, targets, about["in_channels"], patch_size=patch_size)
        if about["deep_supervision"]: weights = {k: v for k, v in weights.items() if k in model.state_dict()}
        norm = ImageNormalizer.from_dict(about["normalizer"])
    load_weights(model, weights)
    digest = fingerprint([[k, weights[k]] for k in sorted(weights)])
    return TrainedModel(model.eval().to(device_for(device)), model.targets, tuple(patch_size), norm, digest)

# %% [markdown]
# ## Validation
# The same patches every time, drawn once by the seed, without augmentation. The losses are those of training; the
# figures are in their own units. Of several processes each looks at all of them, so the numbers do not depend on how
# many there are.

# %%
#| export
@dataclass(eq=False)
class Validation:
    "Losses and figures on a fixed set of patches; called by `fit`"
    data: VolumeDataset # validation patches
    loss: MultiTaskLoss # of the training
    index: np.ndarray # (n) positions in `data`
    batch_size: int = 1 # patches at a time
    precision: str = "fp32" # of the forward pass
    def batches(self) -> Iterator[dict]:
        "Patches as batches"
        for k in range(0, len(self.index), self.batch_size):
            yield torch.utils.data.default_collate([self.data[int(i)] for i in self.index[k:k + self.batch_size]])
    def __call__(
        self,
        model: MultiTaskUNet, # in evaluation mode
        state: FitState, # says which device
    ) -> dict[str, float]: # 'val_loss', 'val_<target>' losses, and the figures of `Scores`
        "Validate"
        scores, sums, n = Scores(model.targets), {}, 0
        for batch in self.batches():
            batch = to_device(batch, state.device)
            with autocast_for(state.device, self.precision): logits = model(batch["image"])
            for k, v in self.loss(logits, batch).items(): sums[k] = sums.get(k, 0.0) + float(v)*len(batch["image"])
            scores.add(predictions(model, logits), batch)
            n += len(batch["image"])
        return {f"val_{k}": v/n for k, v in sums.items()} | {f"val_{k}": v for k, v in scores.result().items()}

def predictions(
    model: MultiTaskUNet, # says what the logits are of
    logits: Mapping[str, torch.Tensor], # (b, c, z, y, x) of each target
) -> dict[str, torch.Tensor]: # (b, c, z, y, x) probabilities, unit vectors, values
    "What `predict` would have given"
    return {n: activate(logits[n].float(), t.activation, t.kind) for n, t in model.targets.items()}

def validation_patches(
    n: int, # patches there are
    wanted: int, # patches that are looked at
    seed: int, # names the choice
) -> np.ndarray: # positions, ascending
    "The patches that every validation looks at"
    return np.sort(rng_for(seed, "validation").permutation(n)[:wanted])

# %% [markdown]
# ## Pictures while it trains
# After each epoch one validation patch is shown as a film through its slices: image and labels above, predictions
# below. The scale is fixed by the kind of target, so that brightness means something: probabilities from 0 to 1,
# vectors as colours.

# %%
#| export
def _grey(values: np.ndarray, kind: str) -> np.ndarray:
    "(z, y, x, 3) uint8"
    if kind == "normals": rgb = normals_rgb(values)
    else:
        v = values.argmax(0)/max(1, len(values) - 1) if kind == "multiclass" and len(values) > 1 else values[0]
        low, high = (0.0, 1.0) if kind in ("binary", "multiclass") else (float(v.min()), float(v.max()))
        rgb = np.repeat((np.clip((v - low)/max(high - low, 1e-6), 0, 1))[..., None], 3, -1)
    return np.round(rgb*255).astype(np.uint8)

def panels(
    sample: Mapping[str, Any], # image (c, z, y, x), targets (c, z, y, x)
    preds: Mapping[str, np.ndarray] | None, # (c, z, y, x) of each target; None: the sample alone
    targets: Mapping[str, Target], # kinds
) -> np.ndarray: # (z, height, width, 3) uint8 frames
    "Image and labels in the upper row, predictions below"
    image = np.asarray(sample["image"][0], np.float32)
    low, high = np.percentile(image, (1, 99))
    first = _grey(np.clip((image - low)/max(high - low, 1e-6), 0, 1)[None], "binary")
    def truth(name: str) -> np.ndarray:
        v = np.asarray(sample[name])
        return _grey(v/max(1, targets[name].channels - 1) if targets[name].kind == "multiclass" else v,
                     "binary" if targets[name].kind == "multiclass" else targets[name].kind)
    rows = [np.concatenate([first, *map(truth, targets)], axis=2)]
    if preds is not None:
        rows.append(np.concatenate([np.zeros_like(first), *(_grey(np.asarray(preds[n]), t.kind)
                                                            for n, t in targets.items())], axis=2))
    return np.concatenate(rows, axis=1)

def write_gif(
    frames: np.ndarray, # (n, height, width, 3) uint8
    path: str | os.PathLike, # .gif; replaced if there
    fps: float = 5, # frames a second
) -> Path: # `path`
    "Write an animation"
    from PIL import Image
    pictures = [Image.fromarray(f) for f in frames]
    with atomic(path) as temp:
        with open(temp, "wb") as f:
            pictures[0].save(f, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000/fps), loop=0)
    return Path(path)

# %% [markdown]
# ## The run
# Settings of the reference map onto `FitConfig`: an epoch is `max_steps_per_epoch` batches, the schedule counts
# optimiser steps, clipping comes after unscaling. The run folder is `ckpt_out_base/model_name`:
#
# | file | holds |
# |---|---|
# | `config.json` | the settings with all defaults |
# | `split.json` | which patches are trained and validated |
# | `fit.json` | what a run must agree in to be continued |
# | `log.csv` | losses, learning rate, figures by step |
# | `checkpoints/` | the newest states, from which a run goes on exactly |
# | `best.safetensors`, `model.safetensors` | weights for use |
# | `debug/` | a film of each epoch |

# %%
#| export
def fit_config(
    cfg: ZarrConfig, # settings of the run
) -> FitConfig: # the same for the shared loop
    "Training settings in the words of page 08a"
    tr = cfg.tr_params
    device = device_for(tr.device)
    per_epoch = max(1, tr.max_steps_per_epoch//tr.gradient_accumulation)
    return FitConfig(
        epochs=tr.max_epoch, lr=tr.initial_lr, optimizer=tr.optimizer.lower(), weight_decay=tr.weight_decay,
        beta2=tr.beta2, schedule=tr.scheduler, warmup_steps=tr.warmup_steps, min_lr=tr.eta_min, device=tr.device,
        precision=precision_for(tr.precision, device), accumulate=tr.gradient_accumulation, clip_norm=tr.grad_clip,
        ema_decay=tr.ema_decay, seed=tr.seed, checkpoint_every=per_epoch, keep=tr.keep_checkpoints,
        validate_every=per_epoch, patience=tr.early_stopping_patience or None,
        tensorboard=False if tr.tensorboard_log_dir is None else tr.tensorboard_log_dir/tr.model_name)

# What does not change the weights a run arrives at
_FREE = {"ckpt_out_base", "tensorboard_log_dir", "num_dataloader_workers", "keep_checkpoints", "keep_best", "device",
         "debug_gif_every", "compile", "checkpoint_path", "load_weights_only", "max_epoch"}

@dataclass(frozen=True, eq=False)
class _Parts:
    "What a run is made of"
    cfg: ZarrConfig
    patches: PatchList
    split: Split
    train: VolumeDataset
    val: VolumeDataset | None
    model: MultiTaskUNet
    loss: MultiTaskLoss

def _assemble(cfg: ZarrConfig, workers: int) -> _Parts:
    patches = patch_list(cfg, workers=workers)
    split = split_patches(patches, cfg)
    settings = check_config(AugmentConfig, cfg.dataset_config.augmentation or {}, "dataset_config.augmentation")
    augment = Augment(settings, {n: t.kind for n, t in cfg.targets.items()})
    cache = int(cfg.dataset_config.decoded_cache_gb*1e9)
    normalizer = fit_normalizer(cfg, np.unique(patches.volume_idx[split.train]), workers=workers)
    train = VolumeDataset(cfg, patches, split.train, augment=augment, normalizer=normalizer, cache_bytes=cache)
    val = VolumeDataset(cfg, patches, split.val, normalizer=normalizer) if len(split.val) else None
    channels = train.sources[0].image.channels or 1
    return _Parts(cfg, patches, split, train, val, build_model(cfg, in_channels=channels), MultiTaskLoss(cfg.targets))

def _portable(value: Any, folder: Path) -> Any:
    "Settings whose absolute paths are written relative to the folder they are stored in"
    if isinstance(value, dict): return {k: _portable(v, folder) for k, v in value.items()}
    if isinstance(value, list): return [_portable(v, folder) for v in value]
    is_path = isinstance(value, str) and value.startswith(os.sep)
    return os.path.relpath(value, folder) if is_path else value

def _start_from(parts: _Parts, out: Path) -> str:
    "Weights to start with, as `checkpoint_path` says; returns their digest"
    tr = parts.cfg.tr_params
    if tr.checkpoint_path is None: return ""
    path = Path(tr.checkpoint_path)
    if not path.exists(): raise MissingFile(f"tr_params.checkpoint_path: {path} does not exist")
    if out.resolve() in (path.resolve(), *path.resolve().parents) and not tr.load_weights_only:
        return "" # the run's own checkpoints: `fit` goes on from the newest
    if not tr.load_weights_only:
        raise ConfigError(f"tr_params.checkpoint_path: {path} belongs to another run. To go on with a run, name its "
                          f"folder by ckpt_out_base and model_name ({out}); to start from its weights, set "
                          "load_weights_only: true")
    weights, _ = weights_in(path)
    report = load_weights(parts.model, weights, strict=False)
    if not report.loaded: raise DataError(f"{path}: none of its {len(weights)} tensors fits this network")
    for what in ("missing", "unexpected", "changed"):
        if names := getattr(report, what):
            log.warning("%s: %d tensors %s: %s", path.name, len(names), what, ", ".join(names[:8]))
    return fingerprint([[k, weights[k]] for k in report.loaded])

def train_network(
    cfg: ZarrConfig, # settings
    *,
    workers: int = 0, # processes for the search of patches
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many optimiser steps in all
    callbacks: Sequence[Callable[[str, FitState], None]] = (), # told 'start', 'step', 'epoch', 'validate', 'end'
) -> FitResult: # steps, best loss, log, path of the weights
    "Train a network as the settings say"
    tr, out = cfg.tr_params, Path(cfg.tr_params.ckpt_out_base)/cfg.tr_params.model_name
    parts = _assemble(cfg, workers)
    started = _start_from(parts, out)
    maker = GroupedBatches if cfg.dataset_config.decoded_cache_gb else Batches
    batches = maker(parts.train, tr.batch_size, seed=tr.seed, workers=tr.num_dataloader_workers,
                    weights=parts.train.weights, per_epoch=tr.max_steps_per_epoch, start_method="forkserver")
    settings, val = fit_config(cfg), None
    if parts.val is not None and tr.max_val_steps_per_epoch:
        index = validation_patches(len(parts.val), tr.max_val_steps_per_epoch*tr.batch_size, tr.seed)
        val = Validation(parts.val, parts.loss, index, tr.batch_size, settings.precision)
    about = describe_model(cfg, parts.model.in_channels, parts.train.normalizer)
    identity = {"model": about, "split": parts.split.hash, "start": started,
                "settings": plain(tr.model_dump(mode="json", exclude=_FREE)),
                "augmentation": cfg.dataset_config.augmentation}
    if cfg.dataset_config.decoded_cache_gb: identity["order"] = "grouped"
    if any(e.weight != 1 for e in cfg.volumes): identity["weights"] = [e.weight for e in cfg.volumes]
    def keep() -> None:
        write_json(out/"config.json", _portable(cfg.to_dict(), out), "overwrite")
        write_split(out/"split.json", parts.split, parts.patches)
    if tr.compile: parts.model.compile()
    def loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict:
        return parts.loss(model(batch["image"]), batch)
    films = [_film(cfg, val, out)] if val is not None and tr.debug_gif_every else []
    return fit(parts.model, batches, loss, settings, out_dir=out, validate=val,
               callbacks=[at_start(keep), *films, *callbacks], config=identity, on_exists=on_exists, stop_at=stop_at,
               desc=tr.model_name)

def _film(cfg: ZarrConfig, val: Validation, out: Path) -> Callable[[str, FitState], None]:
    "Callback that shows the first validation patch after an epoch"
    as_shown = {n: "sigmoid" for n, t in cfg.targets.items() if t.kind == "binary" and t.activation == "none"}
    def show(event: str, state: FitState) -> None:
        if event != "epoch" or state.rank or (state.epoch + 1) % cfg.tr_params.debug_gif_every: return
        sample, training = val.data[int(val.index[0])], state.model.training
        with torch.no_grad():
            image = torch.as_tensor(sample["image"])[None].to(state.device)
            preds = state.model.eval().predict(image, as_shown)
        state.model.train(training)
        (out/"debug").mkdir(exist_ok=True)
        write_gif(panels(sample, {n: p[0].float().cpu().numpy() for n, p in preds.items()}, cfg.targets),
                  out/"debug"/f"{cfg.tr_params.model_name}_{state.epoch + 1}.gif")
    return show

# %%
#| export
def train(
    config: str | os.PathLike, # settings, .json or .yaml
    *,
    overrides: Sequence[str] = (), # settings to change, 'tr_params.batch_size=2'
    workers: int = 0, # processes for the search of patches
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many optimiser steps in all
    dry_run: bool = False, # check everything, find the patches, train nothing
) -> dict: # run folder, steps, figures
    "Train a multi-task U-Net, or go on with a run that was interrupted"
    cfg = ZarrConfig.load(config, overrides)
    out = Path(cfg.tr_params.ckpt_out_base)/cfg.tr_params.model_name
    if dry_run:
        parts, settings = _assemble(cfg, workers), fit_config(cfg)
        return {"run": str(out), "patches": len(parts.patches), "train": len(parts.split.train),
                "val": len(parts.split.val), "steps": settings.epochs*settings.checkpoint_every,
                "parameters": sum(p.numel() for p in parts.model.parameters())}
    done = train_network(cfg, workers=workers, on_exists=on_exists, stop_at=stop_at)
    last = {k: v for row in done.log[-1:] for k, v in row.items() if v}
    return {"run": str(out), "steps": done.steps, "finished": done.finished, "best": done.best, "last": last,
            "weights": str(done.weights)}

def network_summary(
    config: str | os.PathLike, # settings, .json or .yaml
    *,
    overrides: Sequence[str] = (), # settings to change, 'model_config.decoder=shared'
    in_channels: int | None = None, # of the image; default: what the settings say, or 1
) -> dict: # the network level by level, and what a training step needs
    "Show the network of some settings and what it costs"
    cfg = ZarrConfig.load(config, overrides)
    tr, model = cfg.tr_params, build_model(cfg, in_channels=in_channels)
    rows = [{"part": r.part, "output": str(r.shape), "parameters": r.parameters, "GFLOP": round(r.gflop, 2),
             "MB": round(r.megabytes, 1)} for r in level_costs(model, tr.patch_size, tr.batch_size)]
    precision = precision_for(tr.precision, device_for(tr.device))
    need = estimate_memory(cfg, precision, in_channels=in_channels)
    return {"preset": cfg.plan.preset, "parameters": sum(r["parameters"] for r in rows),
            "GFLOP": round(sum(r["GFLOP"] for r in rows), 1), "training_GB": round(need/1e9, 2), "levels": rows}

def preview(
    config: str | os.PathLike, # settings, .json or .yaml
    *,
    out: str | os.PathLike = "preview", # folder for the films; created
    n: int = 4, # samples
    overrides: Sequence[str] = (), # settings to change, 'tr_params.batch_size=2'
    on_exists: OnExists = "overwrite", # what to do with films that are there
) -> dict: # files, with volume and start
    "Write samples as the network will see them: after augmentation, without training"
    cfg = ZarrConfig.load(config, overrides)
    parts = _assemble(cfg, 0)
    Path(out).mkdir(parents=True, exist_ok=True)
    rows, pick = [], rng_for(cfg.tr_params.seed, "preview").permutation(len(parts.train))[:n]
    for k, i in enumerate(pick.tolist()):
        sample, path = parts.train.draw(i, rng_for(cfg.tr_params.seed, "preview", k)), Path(out)/f"sample_{k}.gif"
        if not check_output(path, on_exists): continue
        write_gif(panels(sample, None, cfg.targets), path)
        rows.append({"file": str(path), "volume": sample["meta"]["volume"], "start": sample["meta"]["start"].tolist()})
    return {"samples": rows}

# %% [markdown]
# ## A short training
# A rolled sheet, a quarter of it for validation. Two targets: where the sheet is, and which way it faces. Forty steps
# of a very small network take seconds; the figures must move, they need not be good.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
roll, affine = phantoms.sheets((48, 96, 96), 0), affine_from(1.0, axes="zyx")
for name, data, axes in (("ct", roll.img, "zyx"), ("sheet", roll.mask, "zyx"),
                         ("normals", encode_normals(roll.normals[::-1]), "czyx")):
    write_zarr(Volume(data, affine, axes), root/f"{name}.zarr", chunks=24)
task = {
    "tr_params": {"model_name": "Roll", "patch_size": [16, 32, 32], "tr_val_split": 0.75, "val_block": [16, 32, 32],
                  "max_steps_per_epoch": 20, "max_val_steps_per_epoch": 2, "max_epoch": 2, "initial_lr": 4e-3,
                  "num_dataloader_workers": 0, "tensorboard_log_dir": None, "debug_gif_every": 2},
    "model_config": {"f_maps": [8, 16], "decoder": "shared"},
    "dataset_config": {"volume_paths": [{"input": "ct.zarr", "sheet": "sheet.zarr", "normals": "normals.zarr"}],
                       "use_cache": False, "min_bbox_percent": 0.5, "min_labeled_ratio": 0.05,
                       "augmentation": {"deform": {"p": 0}},
                       "targets": {"sheet": {"channels": 1, "activation": "sigmoid"},
                                   "normals": {"channels": 3, "weight": 0.75}}}}
write_json(root/"task.json", task)
plan = train(root/"task.json", dry_run=True)
done = train(root/"task.json")
plan, {k: done["last"][k] for k in ("val_loss", "val_sheet_dice", "val_normals_angle_mean")}

# %%
run = Path(done["run"])
log_rows = read_csv(run/"log.csv")
plot.curves({"training": [float(r["loss"]) for r in log_rows]}, xlabel="step", ylabel="loss")

# %%
first, last = (np.mean([float(r["loss"]) for r in rows]) for rows in (log_rows[:10], log_rows[-10:]))
assert last < first and done["steps"] == 40 == len(log_rows) and done["finished"]
assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == [
    "best.safetensors", "checkpoints", "config.json", "debug", "fit.json", "log.csv", "model.safetensors", "split.json"]
kept, given = (ZarrConfig.load(p) for p in (run/"config.json", root/"task.json"))
assert kept.tr_params.initial_lr == given.tr_params.initial_lr and kept.targets == given.targets
assert [Path(v.input).resolve() for v in kept.volumes] == [Path(v.input).resolve() for v in given.volumes]

# %% [markdown]
# What such a network costs, before it is trained:

# %%
network_summary(root/"task.json")["levels"]

# %% [markdown]
# The film of the last epoch; here its first frame. Above the image, the sheet and the normals, below the predictions.

# %%
Image((run/"debug"/"Roll_2.gif").read_bytes(), format="gif")

# %% [markdown]
# Interrupted after any number of steps, the run goes on where it stopped and ends with the same bytes.

# %%
other = [f"tr_params.ckpt_out_base={root/'again'}"]
part = train(root/"task.json", overrides=other, stop_at=27)
rest = train(root/"task.json", overrides=other)
assert not part["finished"] and rest["finished"]
assert all((root/"again"/"Roll"/n).read_bytes() == (run/n).read_bytes() for n in ("model.safetensors", "log.csv"))

# %% [markdown]
# Weights know how to be used. Another run takes them only if it is asked to; what does not fit is listed, and if
# nothing does it is an error.

# %%
trained = load_model(run, "cpu")
image = trained.normalizer(roll.img[:16, :32, :32], "ct")
with torch.no_grad(): out = trained.model.predict(torch.from_numpy(image)[None])
{k: tuple(v.shape) for k, v in out.items()}, trained.patch_size, trained.digest

# %%
assert 0 <= out["sheet"].min() and out["sheet"].max() <= 1
assert torch.linalg.vector_norm(out["normals"], dim=1).max() < 1.0001
start = [f"tr_params.checkpoint_path={run/'best.safetensors'}", f"tr_params.ckpt_out_base={root/'third'}"]
with raises(ConfigError, match="belongs to another run"): train(root/"task.json", overrides=start)
warm = train(root/"task.json", overrides=[*start, "tr_params.load_weights_only=true"], stop_at=1)
with raises(MissingFile, match="checkpoint_path"):
    train(root/"task.json", overrides=["tr_params.checkpoint_path=nowhere.pth", *other])

# %%
shown = preview(root/"task.json", out=root/"films", n=2)
place.cleanup()
[(s["volume"], s["start"]) for s in shown["samples"]]
