# %% [markdown]
# # What a fine-tuning needs to know
#
# > Settings, every check before the first step, class pictures of one model and prompt, numbered conditions.
#
# A run of days should not end at its last step because the logger is not installed, and it should not begin with
# pictures of all phases under the prompt of one. This page is about everything that comes before
# [the run](62c_embryo_finetune.ipynb): a list of *all* reasons why it cannot work, told before anything is loaded;
# class pictures for prior preservation that are made once; and the rows of the
# [table of conditions](62a_embryo_diffusion.ipynb). In the published trainer the number of steps was 550 times the
# number of *files* in a folder, captions were ignored, and class pictures of another prompt were used without a word.

# %%
#| default_exp embryo.plan

# %%
#| export
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medvol_nb.checkpoints import autocast_for, device_for
from medvol_nb.config import Config, ConfigPath
from medvol_nb.core import ConfigError, DataError, MedvolError, atomic, lock, log, read_json, write_json
from medvol_nb.embryo.diffusion import Pictures, read_pictures, read_pixels
from medvol_nb.embryo.phases import BASE_PROMPT, LEGACY_PROMPTS, PROMPT, Phase, PromptTemplate
from medvol_nb.embryo.tiny import encode_prompts, sample

# %%
import tempfile

from PIL import Image

from medvol_nb import phantoms, plot
from medvol_nb.core import raises
from medvol_nb.embryo.phases import PHASES
from medvol_nb.embryo.tiny import load_sd, make_tiny_sd, weights_digest

# %% [markdown]
# ## Settings
# Names and defaults of the reference where it had them. `None` means that the value follows from something else, as the
# comment says. LoRA is the default: full training of a public model needs 14 GB for weights, gradients
# and the optimiser's state alone.

# %%
#| export
class FinetuneConfig(Config):
    "How to fine-tune: what is trained, on which conditions, for how long"
    train: Literal["lora", "full"] = "lora" # additions to the attention layers, or all weights
    rank: int = Field(4, ge=1) # of the LoRA additions
    alpha: float | None = Field(None, gt=0) # of the LoRA additions; None: `rank`
    conditioning: Literal["prompt", "caption", "class"] | None = None # None: prompt if one is given, else caption
    instance_prompt: str | None = None # the one prompt of all pictures
    allow_mixed_phases: bool = False # one prompt for pictures of several phases
    caption_dropout: float | None = Field(None, ge=0, lt=1) # share without condition; None: 0.1, for one prompt 0
    n_tokens: int = Field(16, ge=1) # vectors of a learned condition
    resolution: int | None = Field(None, ge=8) # of the pictures [pixel]; None: the model's own
    crop: Literal["center", "random"] = "center" # where longer pictures are cut
    augment: bool = False # flips and quarter turns
    cache: bool = True # encode pictures once; cutting at random places switches it off
    prior_preservation: bool | None = None # train class pictures along; None: with one prompt only
    prior_weight: float = Field(1.0, ge=0) # of the class pictures in the loss
    class_prompt: str = BASE_PROMPT # of the class pictures
    num_class_images: int = Field(200, ge=1) # how many
    class_steps: int = Field(25, ge=1) # of the solver that draws them
    sample_batch_size: int = Field(4, ge=1) # class pictures drawn at a time
    noise_offset: float = Field(0.0, ge=0) # noise that is the same all over a channel
    snr_gamma: float | None = Field(None, gt=0) # limit of the signal-to-noise weights
    batch_size: int = Field(1, ge=1) # pictures a step, in each process
    accumulate: int = Field(1, ge=1) # batches a step
    steps_per_image: int = Field(550, ge=1) # steps in all: this times the number of pictures
    max_train_steps: int | None = Field(None, ge=1) # steps in all, instead
    lr: float | None = Field(None, gt=0) # learning rate; None: 1e-4 for lora, 5e-6 for full
    schedule: Literal["constant", "cosine", "poly"] = "constant" # of the learning rate
    warmup_steps: int = Field(0, ge=0) # linear rise at the start
    weight_decay: float = Field(1e-2, ge=0) # of AdamW
    clip_norm: float = Field(1.0, gt=0) # largest gradient norm
    ema_decay: float | None = Field(None, gt=0, lt=1) # keep an average of the weights
    seed: int = Field(10, ge=0) # names every random stream
    mixed_precision: Literal["no", "fp16", "bf16"] = "no" # of the forward pass
    device: str = "auto" # where to train
    workers: int = Field(0, ge=0) # loading processes
    low_memory_optimizations: bool = False # recompute activations, 8-bit optimiser (needs bitsandbytes)
    checkpoint_steps: int = Field(500, ge=1) # steps between checkpoints
    checkpoints_total_limit: int = Field(3, ge=0) # checkpoints kept, 0 keeps all
    validation_folder: ConfigPath | None = None # held-out pictures for the validation loss; None: some of training
    validation_steps: int = Field(500, ge=1) # steps between validations
    num_validation_images: int = Field(4, ge=0) # pictures drawn at each, always from the same seeds
    validation_image_steps: int = Field(25, ge=1) # of the solver that draws them
    report_to: Literal["none", "csv", "tensorboard", "wandb"] = "csv" # beside log.csv, which is always written
    wandb_entity: str | None = None # account there
    wandb_project_name: str = "medvol-embryo" # project there
    wandb_mode: Literal["online", "offline", "disabled"] = "online" # how it is used

    @property
    def precision(self) -> str: return {"no": "fp32"}.get(self.mixed_precision, self.mixed_precision)

# %% [markdown]
# ## All that is wrong, at once
# `plan_run` looks at everything that can be known without loading the model, and names all problems together.

# %%
#| export
LONG_RUN = 100_000 # steps from which on a run is warned about

@dataclass(frozen=True, eq=False)
class Plan:
    "A run that can be started"
    cfg: FinetuneConfig # settings
    pictures: Pictures # to learn from
    held: Pictures | None # to validate with
    mode: str # 'prompt', 'caption' or 'class'
    prior: bool # class pictures are trained along
    steps: int # optimiser steps
    out: Path # folder of the run
    class_dir: Path # folder of the class pictures

def _about_pictures(cfg: FinetuneConfig, pictures: Pictures, mode: str, found: list[str]) -> None:
    "What the pictures do not allow"
    if mode == "prompt" and not cfg.instance_prompt:
        found.append("instance_prompt: conditioning 'prompt' needs one, or descriptions for 'caption'")
    if mode == "caption" and pictures.captions is None:
        found.append(f"conditioning: {pictures.root} has no descriptions, give instance_prompt")
    if mode == "prompt" and len(pictures.phases) > 1 and not cfg.allow_mixed_phases:
        found.append(f"instance_prompt: the folder holds {len(pictures.phases)} phases ({', '.join(pictures.phases)}), "
                     "one prompt for all would mix them up. Leave it out to train with descriptions, or set "
                     "allow_mixed_phases")
    if mode == "class" and (n := sum(c is None for c in pictures.classes)):
        found.append(f"conditioning: the phase of {n} pictures is unknown; metadata.csv or descriptions must tell it")
    _about_files(pictures, found)

def _about_files(pictures: Pictures, found: list[str]) -> None:
    "Pictures that cannot be decoded"
    damaged = []
    for f in pictures.files:
        try: read_pixels(f, 64)
        except MedvolError as e: damaged.append(str(e))
    if damaged: found.append(f"{len(damaged)} of {len(pictures)} pictures are damaged: {'; '.join(damaged[:3])}")

def _about_machine(cfg: FinetuneConfig, found: list[str]) -> None:
    "What the machine does not allow"
    try: autocast_for(device_for(cfg.device), cfg.precision)
    except ConfigError as e: found.append(str(e))
    needed = {"tensorboard": cfg.report_to == "tensorboard", "wandb": cfg.report_to == "wandb",
              "bitsandbytes": cfg.low_memory_optimizations, "peft": cfg.train == "lora", "diffusers": True}
    for name, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(name) is None:
            why = {"tensorboard": "report_to", "wandb": "report_to", "bitsandbytes": "low_memory_optimizations"}
            found.append(f"{why.get(name, 'train')}: {name} is not installed. pip install {name}")

def plan_run(
    cfg: FinetuneConfig, # settings
    image_folder: str | os.PathLike, # pictures, see `read_pictures`
    out: str | os.PathLike, # folder of the run
    *,
    class_dir: str | os.PathLike | None = None, # folder for class pictures; None: beside the run
) -> Plan: # nothing stands against it
    "Check everything that can be checked before a model is loaded; all problems are told together"
    found: list[str] = []
    mode = cfg.conditioning or ("prompt" if cfg.instance_prompt else "caption")
    pictures = held = None
    try:
        pictures = read_pictures(image_folder)
        _about_pictures(cfg, pictures, mode, found)
        if cfg.validation_folder is not None:
            held = read_pictures(cfg.validation_folder)
            _about_files(held, found)
    except MedvolError as e: found.append(str(e))
    _about_machine(cfg, found)
    if cfg.resolution is not None and cfg.resolution % 8:
        found.append(f"resolution: must be a multiple of 8, got {cfg.resolution}")
    prior = cfg.prior_preservation if cfg.prior_preservation is not None else mode == "prompt"
    if prior and mode == "class":
        found.append("prior_preservation: class pictures have a prompt, a learned table of phases has none")
    if held is not None and held.captions is None and mode == "caption":
        found.append(f"validation_folder: {held.root} has no descriptions")
    if found: raise ConfigError(f"{len(found)} problem{'s'*(len(found) > 1)} before training: " + "; ".join(found))
    steps = cfg.max_train_steps or cfg.steps_per_image*len(pictures)
    if steps > LONG_RUN: log.warning("%d steps (%d pictures): this takes long. max_train_steps sets another number",
                                     steps, len(pictures))
    if set_of(pictures) in ("test", "val"):
        log.warning("%s was made from the %s set: a model trained on it cannot be judged with that set", pictures.root,
                    set_of(pictures))
    out = Path(out)
    folder = Path(class_dir) if class_dir is not None else out.parent/f"{out.name}-class-images"
    return Plan(cfg, pictures, held, mode, prior, steps, out, folder)

def set_of(
    pictures: Pictures, # see `read_pictures`
) -> str: # 'train', 'val', 'test', or '' if nobody says
    "Set of the split that pictures come from"
    return str(pictures.about.get("set", ""))

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
for part in ("images", "descriptions"): (root/"few"/part).mkdir(parents=True)
for k, phase in enumerate(["t2", "tM"]*4):
    frame = phantoms.embryo_frame(PHASES.index(phase), 64, seed=k)
    Image.fromarray(frame).save(root/"few"/"images"/f"{k}.jpeg", quality=92)
    (root/"few"/"descriptions"/f"{k}.txt").write_text(PromptTemplate().format(phase) + "\n")
plan = plan_run(FinetuneConfig(), root/"few", root/"run")
plan.mode, plan.prior, plan.steps

# %%
wrong = FinetuneConfig(instance_prompt="an embryo at phase t2", mixed_precision="fp16", device="cpu", resolution=60,
                       report_to="wandb", low_memory_optimizations=True)
with raises(ConfigError, match="5 problems.*holds 2 phases.*fp16 needs.*wandb is not.*bitsandbytes.*of 8, got 60"):
    plan_run(wrong, root/"few", root/"run")
with raises(ConfigError, match="1 problem before training: image folder .*does not exist"):
    plan_run(FinetuneConfig(), root/"none", root/"run")

# %% [markdown]
# ## Class pictures
# With prior preservation the model trains along on pictures that it drew itself before it was changed, so that it
# does not forget what an embryo is while it learns a phase. They belong to a model and a prompt: a note beside them
# says which, and if either changes they are drawn anew instead of being used for something else.

# %%
#| export
def class_pictures(
    pipe: Any, # StableDiffusionPipeline, untrained
    digest: str, # of its weights
    folder: str | os.PathLike, # of the pictures; created
    n: int, # how many are needed
    *,
    prompt: str = BASE_PROMPT, # what they show
    seed: int = 0, # picture k has seed + k
    steps: int = 25, # of the solver
    batch_size: int = 4, # drawn at a time
    size: int | None = None, # width and height [pixel]
) -> list[Path]: # n pictures
    "Draw the pictures that keep a model from forgetting; those that are there and fit are used again"
    from PIL import Image
    folder = Path(folder)
    note = {"format": "medvol_nb.class_images 1", "model": digest, "prompt": prompt, "seed": seed, "steps": steps,
            "size": size, "synthetic": True}
    names = [folder/f"class-{k:05d}.png" for k in range(n)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        folder.mkdir(exist_ok=True)
        said = read_json(folder/"class.json") if (folder/"class.json").exists() else None
        there = sorted(folder.glob("class-*.png"))
        if said != note:
            if said is None and there:
                raise DataError(f"{folder} holds class pictures without class.json, nobody knows what made them. "
                                "Remove them or choose another folder")
            if said is not None: log.warning("%s: other model, prompt or settings, its pictures are drawn anew", folder)
            for p in there: p.unlink()
            write_json(folder/"class.json", note)
        todo = [k for k, p in enumerate(names) if not p.exists()]
        if todo: condition, empty = encode_prompts(pipe, [prompt, ""])
        for start in sorted({k - k % batch_size for k in todo}):
            block = list(range(start, min(start + batch_size, n)))
            images = sample(pipe, condition, empty, [seed + k for k in block], steps=steps, size=size)
            for k, img in zip(block, images):
                if names[k].exists(): continue
                if not np.isfinite(img).all(): raise DataError(f"class picture {k} is not finite; use fp32 weights")
                with atomic(names[k]) as t, open(t, "wb") as f:
                    Image.fromarray(np.rint(255*img).astype(np.uint8)).save(f, "PNG")
    return names

# %%
base = make_tiny_sd(root/"tiny")
pipe = load_sd(base, device="cpu")
first = class_pictures(pipe, weights_digest(base), root/"class", 3, steps=3)
kept = [p.read_bytes() for p in first]
first[1].unlink()
more = class_pictures(pipe, weights_digest(base), root/"class", 5, steps=3)
plot.montage([np.asarray(Image.open(p).convert("L")) for p in more], 5)

# %%
assert [p.read_bytes() for p in more[:3]] == kept
other = class_pictures(pipe, weights_digest(base), root/"class", 3, steps=3, prompt="an embryo", size=64)
assert len(list((root/"class").glob("*.png"))) == 3 and other[0].read_bytes() != kept[0]

# %% [markdown]
# ## Conditions of a run
# The rows of the table: row 0 is the empty prompt, then the distinct prompts, or the classes. The template that all
# captions were made with is kept, so that drawing later uses the words of training.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Conditions:
    "Rows of the table and which picture has which"
    mode: str # 'prompt', 'caption' or 'class'
    prompts: tuple[str, ...] # of the rows; () in mode 'class'
    classes: tuple[tuple[str, str], ...] # (phase, plane) of the rows from 1 on, plane '' if unknown
    rows: tuple[int, ...] # of the training pictures
    held: tuple[int, ...] # of the validation pictures
    prior_row: int = 0 # of the class pictures
    def names(self) -> list[str]: # one a row
        "What a row is called in file names"
        if self.mode == "class": return ["none", *("-".join(filter(None, c)) for c in self.classes)]
        return [f"prompt-{k}" for k in range(len(self.prompts))]

def _class_names(pictures: Pictures) -> list[tuple[str, str]]:
    return [(c[0].value, c[1].pretty if c[1] else "") for c in pictures.classes]

def make_conditions(
    plan: Plan, # of the run
) -> Conditions: # rows of all pictures
    "Number the conditions of the pictures"
    p, held, n = plan.pictures, plan.held, len(plan.pictures)
    if plan.mode == "class":
        names = _class_names(p)
        order = sorted(set(names), key=lambda c: (Phase.parse(c[0]).idx(), c[1]))
        rows = [order.index(c) + 1 for c in names]
        other = _class_names(held) if held and None not in held.classes else []
        if held and (not other or set(other) - set(order)):
            raise DataError(f"validation_folder: {held.root} holds phases or planes that are not trained")
        return Conditions("class", (), tuple(order), tuple(rows), tuple(order.index(c) + 1 for c in other))
    given = list(p.captions) if plan.mode == "caption" else [plan.cfg.instance_prompt]*n
    extra = [] if held is None else list(held.captions) if plan.mode == "caption" else given[:1]*len(held)
    prompts = list(dict.fromkeys(["", *given, *extra, *([plan.cfg.class_prompt] if plan.prior else [])]))
    return Conditions(plan.mode, tuple(prompts), (), tuple(map(prompts.index, given)), tuple(map(prompts.index, extra)),
                      prompts.index(plan.cfg.class_prompt) if plan.prior else 0)

def template_of(
    captions: Sequence[str], # of the pictures
    texts: Sequence[str] = (), # templates to try first
) -> PromptTemplate | None: # None if no known one made them all
    "Template that captions were made with"
    for text in (*texts, PROMPT, *LEGACY_PROMPTS):
        found = [PromptTemplate(text).parse(c) for c in captions]
        if all(found) and len(with_plane := {f[1] is not None for f in found}) == 1:
            return PromptTemplate(text, with_plane.pop())
    return None

# %%
conditions = make_conditions(plan)
conditions.rows, conditions.prompts, template_of(plan.pictures.captions)

# %%
by_class = make_conditions(plan_run(FinetuneConfig(conditioning="class"), root/"few", root/"run"))
assert by_class.classes == (("t2", ""), ("tM", "")) and by_class.rows == (1, 2)*4
assert template_of(["a photograph"]) is None
assert template_of(plan.pictures.captions) == PromptTemplate(PROMPT, plane=False)
place.cleanup()
