# %% [markdown]
# # Fine-tuning a diffusion model on embryos
#
# > From a plan to a run folder: exact continuation, a loss on fixed noise, everything kept, and back again.
#
# [The plan](62b_embryo_plan.ipynb) meets [the shared loop](08a_torchcore.ipynb). Around them: a loss on fixed noise,
# because the training loss is too noisy to see anything in it; a record of what the weights were made from; and the
# way back, from a run folder to a model that draws. In the published trainer a missing checkpoint meant a silent new
# start, a run could overwrite another one, and the phase table of the class-conditioned model was not saved at all.

# %%
#| default_exp embryo.finetune

# %%
#| export
import datetime
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from medvol_nb.checkpoints import (autocast_for, device_for, latest_checkpoint, load_checkpoint, load_weights,
                                   save_checkpoint)
from medvol_nb.config import check_config, parse_overrides
from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, OutputExists, atomic,
                            check_output, file_digest, fingerprint, lock, log, plain, read_json, write_json)
from medvol_nb.embryo.diffusion import (Denoiser, Items, Noise, Raw, diffusion_loss, encode_pictures, fixed_batches,
                                        learned_table, picture_digests, pixel_encoder, read_pictures)
from medvol_nb.embryo.phases import DATA_LICENCE, PROMPT, PromptTemplate
from medvol_nb.embryo.plan import (Conditions, FinetuneConfig, Plan, class_pictures, make_conditions, plan_run, set_of,
                                   template_of)
from medvol_nb.embryo.tiny import (encode_prompts, load_sd, quiet_diffusers, resolve_model, sample, share_files,
                                   weights_digest)
from medvol_nb.torchcore import Batches, FitConfig, FitResult, FitState, at_start, fit, to_device

# %%
import tempfile

from PIL import Image

from medvol_nb import phantoms
from medvol_nb.core import raises, read_csv
from medvol_nb.embryo.phases import PHASES
from medvol_nb.embryo.tiny import make_tiny_sd

# %% [markdown]
# ## Validation
# The same noise, times and variants for the same pictures, every time: the curve shows the model and not the dice. It
# looks at held-out pictures if there is a folder of them (`val_loss`), else at some of the training pictures
# (`fixed_loss`). And it draws a few pictures, always from the same seeds.

# %%
#| export
@dataclass(eq=False)
class Validation:
    "Loss on fixed noise, and pictures; called by `fit`"
    items: Items # to look at
    name: str # of the number: 'val_loss' or 'fixed_loss'
    loss: Callable # of the training
    seed: int # names the draws
    precision: str # of the forward pass
    out: Path # folder of the run
    pipe: Any = None # draws pictures with the network in training; None: no pictures
    shots: Sequence[tuple[str, int, int]] = () # file name, row of the table, seed
    steps: int = 25 # of the solver

    def __call__(
        self,
        model: Denoiser, # in evaluation mode
        state: FitState, # says which device and step
    ) -> dict[str, float]: # the loss
        "Validate"
        total = 0.0
        for batch in fixed_batches(self.items, self.seed):
            with autocast_for(state.device, self.precision):
                value = self.loss(model, to_device(batch, state.device))
            total += float(value["loss"])*len(batch["t"])
        if self.shots and state.rank == 0: self.draw(model, state.step)
        return {self.name: total/len(self.items)}

    def draw(
        self,
        model: Denoiser, # in evaluation mode
        step: int, # names the folder
    ) -> None:
        "Write the pictures of a step"
        from PIL import Image
        (self.out/"samples").mkdir(exist_ok=True)
        with atomic(self.out/"samples"/f"step-{step}", folder=True) as folder:
            for name, row, seed in self.shots:
                img = sample(self.pipe, model.table[row].float(), model.table[0].float(), [seed], steps=self.steps)[0]
                pixels = np.rint(255*np.nan_to_num(img)).astype(np.uint8)
                Image.fromarray(pixels).save(folder/f"{name}.png")

# %% [markdown]
# ## The run
# The run folder:
#
# | file | holds |
# |---|---|
# | `run.json` | settings, prompts, base model and data with their hashes, versions, licences; `complete` at the end |
# | `log.csv` | losses, learning rate, gradient norm by step |
# | `checkpoints/` | the newest states, from which a run goes on exactly |
# | `samples/step-N/` | pictures drawn during training |
# | `model.safetensors` | what was trained |
# | `pipeline/` or `lora/` | the same for other programs: a folder of diffusers, or a LoRA file |

# %%
#| export
_FORMAT = "medvol_nb.embryo.finetune 1"
# Settings that do not change the weights that a run arrives at; the number of steps is for `fit` to compare
_FREE = {"device", "workers", "checkpoint_steps", "checkpoints_total_limit", "report_to", "wandb_entity",
         "wandb_project_name", "wandb_mode", "steps_per_image", "max_train_steps", "num_validation_images",
         "validation_image_steps", "validation_folder", "sample_batch_size"}
MODEL_LICENCE = ("base model: its own licence holds; Stable Diffusion 1 and 2 are under CreativeML OpenRAIL-M and "
                 "OpenRAIL++-M, whose use restrictions are passed on with all weights and images derived from it")

def versions() -> dict[str, str]: # package -> version
    "What made a result"
    from importlib.metadata import version
    return {p: version(p) for p in ("medvol_nb", "torch", "diffusers", "transformers", "peft")}

def _now() -> str: return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

def fit_config(
    cfg: FinetuneConfig, # settings
    steps: int, # optimiser steps
    monitor: str, # number that decides which weights are best
) -> FitConfig: # the same for the shared loop
    "Training settings in the words of page 08a"
    return FitConfig(
        steps=steps, lr=cfg.lr or {"lora": 1e-4, "full": 5e-6}[cfg.train], weight_decay=cfg.weight_decay,
        schedule=cfg.schedule, warmup_steps=cfg.warmup_steps, precision=cfg.precision, device=cfg.device,
        accumulate=cfg.accumulate, clip_norm=cfg.clip_norm, ema_decay=cfg.ema_decay, seed=cfg.seed,
        checkpoint_every=cfg.checkpoint_steps, keep=cfg.checkpoints_total_limit, validate_every=cfg.validation_steps,
        monitor=monitor, tensorboard=cfg.report_to == "tensorboard")

def _small_adam(cfg: FinetuneConfig) -> Callable[[nn.Module], Any] | None:
    "8-bit optimiser, where memory is short"
    if not cfg.low_memory_optimizations: return None
    def make(model: nn.Module) -> Any:
        params = [p for p in model.parameters() if p.requires_grad]
        kind = importlib.import_module("bitsandbytes").optim.AdamW8bit
        return kind(params, lr=cfg.lr or {"lora": 1e-4, "full": 5e-6}[cfg.train], weight_decay=cfg.weight_decay)
    return make

def _wandb(plan: Plan) -> Callable[[str, FitState], None]:
    "Callback that sends the numbers of each step to Weights & Biases"
    cfg, wandb = plan.cfg, importlib.import_module("wandb")
    session = wandb.init(entity=cfg.wandb_entity, project=cfg.wandb_project_name, name=plan.out.name,
                         mode=cfg.wandb_mode, config=plain(cfg), resume="allow",
                         id=fingerprint(str(plan.out.resolve()))) # a resumed run goes on under its own name
    def tell(event: str, state: FitState) -> None:
        if event == "step": session.log(state.metrics, step=state.step)
        if event == "end": session.finish()
    return tell

def _start_record(plan: Plan, base: Path, digest: str, pictures: list[str], c: Conditions) -> dict[str, Any]:
    "What is known before the first step"
    p = plan.pictures
    said = p.about.get("prompt")
    template = template_of(p.captions, [said] if isinstance(said, str) else []) if plan.mode == "caption" else None
    note = p.root/"folder.json"
    return {"format": _FORMAT, "complete": False, "started": _now(), "settings": plain(plan.cfg),
            "model": {"path": str(base.resolve()), "digest": digest}, "mode": plan.mode, "prompts": list(c.prompts),
            "instance_prompt": plan.cfg.instance_prompt if plan.mode == "prompt" else None,
            "template": [template.text, template.plane] if template else None,
            "classes": [list(k) for k in c.classes],
            "pictures": {"folder": str(p.root.resolve()), "n": len(p), "phases": p.phases,
                         "planes": sorted({k[1].pretty for k in p.classes if k and k[1]}), "set": set_of(p),
                         "digest": fingerprint(pictures),
                         "folder_json": file_digest(note) if note.exists() else None},
            "steps": plan.steps, "versions": versions(),
            "licences": [str(p.about.get("licence") or DATA_LICENCE), MODEL_LICENCE]}

def read_run(
    folder: str | os.PathLike, # of a run
) -> dict[str, Any]: # its run.json
    "The record of a run"
    about = read_json(Path(folder)/"run.json")
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise FormatError(f"{folder}/run.json: is not the record of a fine-tuning")
    return about

def save_table(
    folder: str | os.PathLike, # of the model, being written
    table: torch.Tensor, # (n, tokens, width) learned conditions
    classes: Sequence[tuple[str, str]], # phase and plane of the rows from 1 on
) -> None:
    "Keep learned conditions with the model"
    save_checkpoint(Path(folder)/"phase_embeddings.safetensors", {"table": table})
    write_json(Path(folder)/"phase_embeddings.json", {"rows": [["", ""], *map(list, classes)]})

def _export(plan: Plan, base: Path, model: Denoiser, c: Conditions) -> None:
    "The result in the form that other programs read"
    kind = "pipeline" if plan.cfg.train == "full" else "lora"
    with atomic(plan.out/kind, folder=True) as folder:
        if kind == "pipeline":
            pipe = load_sd(base, device="cpu", local_files_only=True)
            load_weights(pipe.unet, {k: v.cpu() for k, v in model.unet.state_dict().items()})
            pipe.save_pretrained(folder)
        else:
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft.utils import get_peft_model_state_dict
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.unet))
            quiet_diffusers().StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
        if c.mode == "class": save_table(folder, model.table, c.classes)
        share_files(folder)

def _resume_from(plan: Plan, given: str) -> Path | None:
    "The checkpoint that is named; None: the newest"
    folder = plan.out/"checkpoints"
    if given == "latest":
        if latest_checkpoint(folder) is None:
            raise MissingFile(f"resume_from_checkpoint: {folder} holds no checkpoint to go on from")
        return None
    path = folder/given if not Path(given).exists() else Path(given)
    mine = {p.resolve(): p for p in sorted(folder.glob("step-*.safetensors"))}
    if path.resolve() not in mine:
        shown = ", ".join(p.name for p in mine.values()) or "none"
        raise MissingFile(f"resume_from_checkpoint: {given} is not a checkpoint of this run. There are: {shown}")
    return mine[path.resolve()]

def _go_back(out: Path, to: Path, identity: Mapping[str, Any]) -> None:
    "Make a checkpoint the newest one, if it is of this very run"
    if fingerprint(load_checkpoint(to)["config"]) != fingerprint(plain(identity)):
        raise DataError(f"{to}: is of a run with other settings, pictures or base. Nothing was removed")
    if not _is_main(): return
    with lock(out):
        for p in (out/"checkpoints").glob("step-*.safetensors"):
            if int(p.stem.split("-")[1]) > int(to.stem.split("-")[1]): p.unlink()

# %%
#| export
def _is_main() -> bool: return int(os.environ.get("RANK", 0)) == 0

def _prior(plan: Plan, pipe: Any, digest: str, size: int) -> list[Path]:
    "Class pictures; of several processes one draws them, the others wait"
    cfg = plan.cfg
    def draw() -> list[Path]:
        return class_pictures(pipe, digest, plan.class_dir, cfg.num_class_images, prompt=cfg.class_prompt, size=size,
                              seed=cfg.seed, steps=cfg.class_steps, batch_size=cfg.sample_batch_size)
    if _is_main(): return draw()
    last = plan.class_dir/f"class-{cfg.num_class_images - 1:05d}.png"
    while not last.exists() or plan.class_dir.with_name(plan.class_dir.name + ".lock").exists(): time.sleep(1)
    return draw()

def _learning(plan: Plan, pipe: Any, c: Conditions, prior: Sequence[Path], size: int) -> tuple[Items, Items, Any]:
    "Items to learn from, items to look at, and what encodes their pictures (None: that is done already)"
    cfg, variants = plan.cfg, 8 if plan.cfg.augment else 1
    cached = cfg.cache and cfg.crop == "center"
    def known(files: Sequence[Path]) -> Any:
        if cached: return encode_pictures(pipe.vae, files, size, variants=variants)
        return Raw(files, size, variants, cfg.crop == "random")
    cells = (pipe.unet.config.in_channels, size//pipe.vae_scale_factor, size//pipe.vae_scale_factor)
    common = {"cells": cells, "times": len(pipe.scheduler.alphas_cumprod), "offset": cfg.noise_offset}
    dropout = cfg.caption_dropout if cfg.caption_dropout is not None else 0.0 if plan.mode == "prompt" else 0.1
    files = plan.pictures.files
    items = Items(known(files), c.rows, prior=known(prior) if prior else None, prior_row=c.prior_row, dropout=dropout,
                  names=[f.name for f in files], repeats=math.ceil(cfg.batch_size/len(files)), **common)
    look = (plan.held or plan.pictures).files[:64 if plan.held else 16]
    fixed = Items(known(look), (c.held or c.rows)[:len(look)], **common)
    return items, fixed, None if cached else pixel_encoder(pipe.vae)

def _table(plan: Plan, pipe: Any, c: Conditions) -> torch.Tensor:
    "(n, tokens, width) conditions: encoded prompts, or fresh vectors to be learned"
    if plan.mode != "class": return encode_prompts(pipe, c.prompts)
    return learned_table(len(c.classes) + 1, plan.cfg.n_tokens, pipe.unet.config.cross_attention_dim, plan.cfg.seed)

def _finish(plan: Plan, base: Path, net: Denoiser, c: Conditions, result: FitResult, record: Mapping[str, Any]) -> None:
    "Export what was learned, then say that the run is complete"
    load_weights(net, load_checkpoint(result.weights)["model"])
    _export(plan, base, net, c)
    losses = [float(r["loss"]) for r in result.log if r.get("loss")]
    tenth = max(1, len(losses)//10)
    ends = {"first": np.mean(losses[:tenth]), "last": np.mean(losses[-tenth:])} if losses else {}
    write_json(plan.out/"run.json", {**record, "complete": True, "finished": _now(),
                                     "loss": {**ends, _monitor(plan): result.best}})

def _monitor(plan: Plan) -> str: return "val_loss" if plan.held else "fixed_loss"

def train_diffusion(
    plan: Plan, # from `plan_run`
    model: str | os.PathLike, # base: folder of diffusers, file, or hub name
    *,
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many steps in all
    local_files_only: bool = False, # never ask the hub
    back_to: Path | None = None, # checkpoint to go on from; later ones are removed
) -> FitResult: # steps, log, weights
    "Fine-tune as planned; an interrupted run goes on exactly where it stopped"
    cfg, out, start = plan.cfg, plan.out, time.monotonic()
    base = resolve_model(model, local_files_only=local_files_only)
    pipe = load_sd(base, device=str(device_for(cfg.device)), local_files_only=local_files_only)
    digest, c, noise = weights_digest(base), make_conditions(plan), Noise.of(pipe.scheduler)
    size = cfg.resolution or pipe.unet.config.sample_size*pipe.vae_scale_factor
    table, prior = _table(plan, pipe, c), _prior(plan, pipe, digest, size) if plan.prior else []
    items, fixed, encode = _learning(plan, pipe, c, prior, size)
    loss = diffusion_loss(noise, encode=encode, prior_weight=cfg.prior_weight, snr_gamma=cfg.snr_gamma)
    net = Denoiser(pipe.unet, table, train=cfg.train, rank=cfg.rank, alpha=cfg.alpha, seed=cfg.seed)
    if cfg.low_memory_optimizations: net.unet.enable_gradient_checkpointing()
    pipe.text_encoder = None
    if encode is None and not cfg.num_validation_images: pipe.vae = None
    names, shown = c.names(), sorted(set(c.rows))
    drawn = [(k, shown[k % len(shown)]) for k in range(cfg.num_validation_images)]
    shots = [(f"{names[r]}-{k}", r, cfg.seed + k) for k, r in drawn]
    validate = Validation(fixed, _monitor(plan), loss, cfg.seed, cfg.precision, out, pipe, shots,
                          cfg.validation_image_steps)
    pictures = picture_digests(plan.pictures.files)
    identity = {"base": digest, "pictures": pictures, "prompts": c.prompts,
                "classes": c.classes, "rows": c.rows, "prior": picture_digests(prior),
                "settings": plain(cfg.model_dump(mode="json", exclude=_FREE)), "size": size}
    if back_to is not None: _go_back(out, back_to, identity)
    tell = [_wandb(plan)] if cfg.report_to == "wandb" and _is_main() else []
    record = _start_record(plan, base, digest, pictures, c)
    note = at_start(lambda: write_json(out/"run.json", record))
    result = fit(net, Batches(items, cfg.batch_size, seed=cfg.seed, workers=cfg.workers), loss,
                 fit_config(cfg, plan.steps, _monitor(plan)), out_dir=out, validate=validate, callbacks=[note, *tell],
                 optimizer=_small_adam(cfg), config=identity, on_exists=on_exists, stop_at=stop_at, desc=out.name)
    if result.finished and _is_main():
        _finish(plan, base, net, c, result, {**record, "seconds": round(time.monotonic() - start, 1)})
    return result

# %% [markdown]
# ## The command
# `medvol embryo finetune`. Options that are set for every run have a name of their own, with the spelling of the
# published script beside ours; all others are given as `--overrides key=value`.

# %%
#| export
def finetune(
    *,
    model: str, # base: folder of diffusers, .safetensors or .ckpt file, or hub name
    image_folder: Path, # folder of pictures, made by image-folder
    run_name: str | None = None, # name of the run
    wandb_run_name: str | None = None, # the same, as the published script spells it
    output_dir: str | os.PathLike = ".", # where the run's folder goes
    save_model_to: Path | None = None, # the same, as the published script spells it
    instance_prompt: str | None = None, # one prompt for all pictures; default: their descriptions
    train: Literal["lora", "full"] = "lora", # what is trained
    rank: int = 4, # of the LoRA additions
    conditioning: Literal["prompt", "caption", "class"] | None = None, # default: prompt if given, else descriptions
    allow_mixed_phases: bool = False, # one prompt for pictures of several phases
    caption_dropout: float | None = None, # share of steps without condition; default: 0.1, for one prompt 0
    resolution: int | None = None, # of the pictures [pixel]; default: the model's own
    max_train_steps: int | None = None, # steps in all
    steps_per_image: int = 550, # steps in all: this times the number of pictures
    batch_size: int = 1, # pictures a step, in each process
    lr: float | None = None, # learning rate; default: 1e-4 for lora, 5e-6 for full
    cache: bool = True, # encode pictures and prompts once instead of at every step
    class_data_dir_parent: Path | None = None, # folder for class pictures; default: output_dir
    checkpoint_steps: int = 500, # steps between checkpoints
    checkpoints_total_limit: int = 3, # checkpoints kept, 0 keeps all
    resume_from_checkpoint: str | None = None, # 'latest' or a checkpoint of this run; default: the newest, if any
    validation_steps: int = 500, # steps between validations
    num_validation_images: int = 4, # pictures drawn at each
    validation_folder: Path | None = None, # held-out pictures
    low_memory_optimizations: bool = False, # recompute activations, 8-bit optimiser
    mixed_precision: Literal["no", "fp16", "bf16"] = "no", # of the forward pass
    report_to: Literal["none", "csv", "tensorboard", "wandb"] = "csv", # where numbers go, beside log.csv
    wandb_entity: str | None = None, # account at Weights & Biases
    wandb_project_name: str = "medvol-embryo", # project there
    seed: int = 10, # names every random stream
    device: str = "auto", # where to train
    workers: int = 0, # loading processes
    overrides: Sequence[str] = (), # further settings of FinetuneConfig, 'lr=1e-5'
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many steps in all
    dry_run: bool = False, # check everything, train nothing
) -> dict: # run folder, steps, losses
    "Fine-tune a Stable Diffusion model on embryo pictures, or go on with a run that was interrupted"
    given = locals()
    names = [n for n in (run_name, wandb_run_name) if n]
    if len(set(names)) != 1: raise ConfigError("run_name: give one name for the run (--run-name)")
    if names[0] in (".", "..") or any(ch in names[0] for ch in "/\\\0"):
        raise ConfigError(f"run_name: {names[0]!r} is not a folder name")
    cfg = check_config(FinetuneConfig, {k: v for k, v in given.items() if k in FinetuneConfig.model_fields} |
                       parse_overrides(overrides), "finetune")
    if resume_from_checkpoint and on_exists != "skip":
        raise ConfigError(f"resume_from_checkpoint: goes on with a run, on_exists={on_exists!r} does not")
    parent = Path(save_model_to or output_dir)
    out = parent/names[0]
    if (out/"run.json").exists() and (about := read_run(out))["complete"]:
        if on_exists != "skip" or resume_from_checkpoint:
            raise OutputExists(f"{out} is a finished run, it is never overwritten. Choose another --run-name")
        free = _FREE - {"steps_per_image", "max_train_steps"} # the steps of this run are done
        differ = [k for k, v in plain(cfg).items() if k not in free and about["settings"].get(k, v) != v]
        pictures = fingerprint(picture_digests(read_pictures(image_folder).files))
        if about["model"]["digest"] != weights_digest(resolve_model(model)): differ.append("model")
        if about["pictures"].get("digest", pictures) != pictures: differ.append("image_folder")
        if differ:
            raise OutputExists(f"{out} is a finished run with other settings ({', '.join(differ)}), it is never "
                               "overwritten. Choose another --run-name")
        return {"run": str(out), "finished": True, "steps": about["steps"], "note": "was finished before"}
    class_dir = Path(class_data_dir_parent)/names[0] if class_data_dir_parent is not None else None
    plan = plan_run(cfg, image_folder, out, class_dir=class_dir)
    summary = {"run": str(out), "pictures": len(plan.pictures), "phases": plan.pictures.phases, "mode": plan.mode,
               "prior_preservation": plan.prior, "total_steps": plan.steps}
    if dry_run: return {**summary, "model": str(resolve_model(model))}
    back = _resume_from(plan, resume_from_checkpoint) if resume_from_checkpoint else None
    parent.mkdir(parents=True, exist_ok=True)
    check_output(out, "error" if on_exists == "error" else "overwrite")
    log.info("%s", DATA_LICENCE)
    done = train_diffusion(plan, model, on_exists=on_exists, stop_at=stop_at, back_to=back)
    last = {k: v for row in done.log[-1:] for k, v in row.items() if v}
    return {**summary, "steps": done.steps, "finished": done.finished, "best": done.best, "last": last}

# %% [markdown]
# ## A short run
# Sixteen steps of LoRA with the descriptions as prompts, on the pipeline that knows nothing.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
for part in ("images", "descriptions"): (root/"few"/part).mkdir(parents=True)
for k, phase in enumerate(["t2", "tM"]*4):
    frame = phantoms.embryo_frame(PHASES.index(phase), 64, seed=k)
    Image.fromarray(frame).save(root/"few"/"images"/f"{k}.jpeg", quality=92)
    (root/"few"/"descriptions"/f"{k}.txt").write_text(PromptTemplate().format(phase) + "\n")
base = make_tiny_sd(root/"tiny")
common = {"model": str(base), "image_folder": root/"few", "output_dir": root/"runs", "device": "cpu",
          "max_train_steps": 16, "checkpoint_steps": 5, "validation_steps": 8, "num_validation_images": 2, "lr": 1e-3,
          "batch_size": 2, "overrides": ("validation_image_steps=3",)}
before = weights_digest(base)
done = finetune(**common, run_name="few")
run = root/"runs"/"few"
sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()), done["last"]

# %%
assert done["finished"] and done["steps"] == 16 == len(read_csv(run/"log.csv")) and weights_digest(base) == before
assert read_run(run)["template"] == [PROMPT, False] and read_run(run)["complete"]
assert finetune(**common, run_name="few")["note"] == "was finished before"
with raises(OutputExists, match="never overwritten"): finetune(**common, run_name="few", on_exists="overwrite")
with raises(OutputExists, match=r"other settings \(rank\)"): finetune(**common, run_name="few", rank=8)

# %% [markdown]
# Interrupted after any number of steps, it ends with the same bytes:

# %%
part = finetune(**common, run_name="again", stop_at=7)
assert not read_run(root/"runs"/"again")["complete"]
rest = finetune(**common, run_name="again", resume_from_checkpoint="latest")
assert not part["finished"] and rest["finished"]
assert all((root/"runs"/"again"/n).read_bytes() == (run/n).read_bytes()
           for n in ("model.safetensors", "log.csv", "lora/pytorch_lora_weights.safetensors"))
with raises(MissingFile, match="holds no checkpoint"): finetune(**common, run_name="x", resume_from_checkpoint="latest")
place.cleanup()
