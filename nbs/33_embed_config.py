# %% [markdown]
# # Settings of an embedding
#
# > The six published trainings as settings that are checked, and a small one that a CPU can do.
#
# The published trainings are six Python files that inherit from each other and hold absolute paths of their author's
# machine, where test data should be named there is an image pipeline, and one of them silently begins with weights of
# photographs instead of those of the stage before. Here a training is data: which network, which losses, how views are
# cut, how often which kind of batch comes, and how long. Paths are not part of it; they are arguments of
# [training](33a_embed_train.ipynb).

# %%
#| default_exp embed.config

# %%
#| export
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from medvol_nb.config import Config, ConfigPath, check_config, load_config, parse_overrides
from medvol_nb.core import ConfigError
from medvol_nb.embed.intensity import AUGMENTS, Augment
from medvol_nb.embed.loss import LossConfig
from medvol_nb.embed.model import MODELS, ModelConfig
from medvol_nb.embed.views import Rule
from medvol_nb.torchcore import FitConfig

# %%
import pandas as pd

from medvol_nb.config import dump_config
from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## The parts
# A batch has samples of up to three kinds: *views*, pairs of views of one scan; *organs*, two volumes with organ masks;
# *pairs*, registered CT and MR. With `odds`, each batch has one kind, and nothing is loaded that is not used. The
# published SAM++ loads both kinds each time and throws one away.

# %%
#| export
Kind = Literal["views", "organs", "pairs"]

class ViewConfig(Config):
    "How two views of a scan are cut and changed"
    rule: Rule = "sample" # where they are
    patch: tuple[int, int, int] = (32, 96, 96) # (z, y, x) [network voxel]
    scale: tuple[float, float] = (0.8, 1.2) # range of the voxel size, relative to `spacing`
    degrees: float = Field(0.0, ge=0) # largest turn about each axis
    independent: float | None = Field(None, ge=0, le=1) # chance of two independent places; None: as the rule says
    augment: Augment = AUGMENTS["plain"] # change of contrast

class EmbeddingFit(FitConfig):
    "Length and optimiser as published: SGD at a constant rate after a warm-up"
    steps: int | None = Field(20000, ge=1) # optimiser steps
    optimizer: Literal["adamw", "adam", "sgd"] = "sgd" # update rule
    lr: float = Field(0.02, gt=0) # learning rate
    weight_decay: float = Field(1e-4, ge=0) # decay of weights, not of biases and norms
    schedule: Literal["constant", "cosine", "poly"] = "constant" # of the learning rate after warm-up
    warmup_steps: int = Field(500, ge=0) # linear rise at the start
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto" # of the forward pass; auto: what the device does best
    checkpoint_every: int | None = Field(1000, ge=1) # steps between checkpoints
    keep: int = Field(20, ge=0) # checkpoints kept
    validate_every: int | None = Field(1000, ge=1) # steps between validations

class EmbeddingConfig(Config):
    "Settings of a training"
    name: str = "AnatSAM" # stored with the weights
    spacing: float = Field(2.0, gt=0) # network voxel [mm]
    intensity: Literal["ct", "mr", "auto"] = "ct" # grey value rule of the scans that the network is for
    model: ModelConfig = MODELS["AnatSAM"] # shape of the network
    loss: LossConfig = LossConfig() # what is compared
    views: ViewConfig = ViewConfig() # how views are cut
    suffixes: tuple[str, ...] = () # ends of the file names of one case, such as '_0000' for CT and '_0001' for MR
    suffix_odds: tuple[float, ...] = () # chances of a case's images; empty: equal
    organs_augment: Augment = AUGMENTS["blur"] # change of contrast of whole volumes
    organs_crop: tuple[int, int, int] = (120, 180, 180) # (z, y, x) largest whole volume [network voxel]
    pairs_augment: Augment = AUGMENTS["aggressive"] # change of contrast of registered pairs
    pairs_crop: tuple[int, int, int] = (104, 128, 128) # (z, y, x) largest box of a registered pair [network voxel]
    slots: dict[Kind, int] = {"views": 6} # samples of each kind in a batch, in each process
    odds: dict[Kind, float] | None = None # a batch has one kind, with these odds; None: all kinds
    per_epoch: int | None = Field(None, ge=1) # steps in an epoch; None: items of the largest kind over its slots
    start_from: ConfigPath | None = None # first weights: run folder, .safetensors, published .pth or a 2-D ResNet
    needs_start: bool = False # refuse to begin with random weights
    workers: int = Field(0, ge=0) # loading processes
    fit: EmbeddingFit = EmbeddingFit() # length, optimiser, device, checkpoints

    @model_validator(mode="after")
    def _fits_together(self) -> "EmbeddingConfig":
        used = {k for k, n in self.slots.items() if n > 0 and (self.odds is None or self.odds.get(k, 0) > 0)}
        if not used: raise ValueError("slots: no kind of sample is ever drawn")
        if self.odds is not None and (lost := set(self.odds) - set(self.slots)):
            raise ValueError(f"odds: for {sorted(lost)}, which have no slots")
        if "organs" in used and "semantic" not in self.model.heads:
            raise ValueError("model.heads: samples with organs need the head 'semantic'")
        if self.suffix_odds and len(self.suffix_odds) != len(self.suffixes):
            raise ValueError(f"suffix_odds: {len(self.suffix_odds)} numbers for {len(self.suffixes)} suffixes")
        if self.suffix_odds and (min(self.suffix_odds) < 0 or not sum(self.suffix_odds) > 0):
            raise ValueError(f"suffix_odds: need numbers >= 0, not all of them 0, got {list(self.suffix_odds)}")
        return self

    @property
    def kinds(self) -> tuple[Kind, ...]: # kinds of samples that are ever drawn
        return tuple(k for k, n in self.slots.items() if n > 0 and (self.odds is None or self.odds.get(k, 0) > 0))

# %%
with raises(ConfigError, match="need the head 'semantic'"):
    check_config(EmbeddingConfig, {"slots": {"views": 1, "organs": 1}}, "run.json")
with raises(ConfigError, match="lss: unknown key, did you mean 'loss'"):
    check_config(EmbeddingConfig, {"lss": {"tau": 0.1}}, "run.json")

# %% [markdown]
# ## The published six
# | preset | trains | differs by |
# |---|---|---|
# | `sam_deeplesion` | AnatSAM | views with a wanted overlap, blur, positives up to 5 mm, ignoring 3 mm |
# | `sam_NIHLN` | AnatSAM | the plain one |
# | `samv2_NIHLN` | AnatSAM++ | organs in two of five batches |
# | `ct_mri_intra` | CrossAnat, stage 1 | CT and MR views, wild contrast, turns |
# | `ct_mri_inter` | CrossAnat, stage 2 | registered pairs only; must start from stage 1 |
# | `ct_mri_infer` | CrossAnat | thicker views, both kinds half of the time |

# %%
#| export
def _presets() -> dict[str, dict[str, Any]]:
    three = {"heads": ["fine", "coarse", "semantic"]}
    cross = {"intensity": "auto", "model": three, "suffixes": ["_0000", "_0001"], "suffix_odds": [0.6, 0.4]}
    wild = {"rule": "masksample", "degrees": 5.0, "augment": AUGMENTS["aggressive"].model_dump()}
    return {
        "sam_deeplesion": {
            "slots": {"views": 3}, "views": {"rule": "overlap", "augment": AUGMENTS["blur"].model_dump()},
            "loss": {"positive_mm": 5.0, "ignore_mm": 3.0, "coarse_global": 300}, "fit": {"precision": "fp32"}},
        "sam_NIHLN": {},
        "samv2_NIHLN": {"name": "AnatSAMpp", "model": three, "slots": {"views": 4, "organs": 1},
                        "odds": {"views": 0.6, "organs": 0.4}},
        "ct_mri_intra": {**cross, "name": "CrossAnat", "slots": {"views": 4}, "views": wild},
        "ct_mri_inter": {**cross, "name": "CrossAnat", "slots": {"views": 3, "pairs": 1}, "views": wild,
                         "odds": {"views": 0.0, "pairs": 1.0}, "needs_start": True},
        "ct_mri_infer": {**cross, "name": "CrossAnat", "slots": {"views": 3, "pairs": 1},
                         "views": {"rule": "masksample", "patch": [48, 96, 96], "degrees": 10.0,
                                   "augment": AUGMENTS["blur"].model_dump()},
                         "odds": {"views": 0.5, "pairs": 0.5}}}

PRESETS: tuple[str, ...] = tuple(_presets())

def preset(
    name: str, # one of PRESETS
) -> EmbeddingConfig: # settings
    "Settings of a published training"
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ConfigError(f"preset: must be one of {', '.join(PRESETS)}, got {name!r}" +
                          (f". Did you mean {near[0]!r}?" if near else ""))
    return check_config(EmbeddingConfig, _presets()[name], f"preset {name}")

# %%
rows = {n: preset(n) for n in PRESETS}
pd.DataFrame({n: {"rule": c.views.rule, "patch z": c.views.patch[0], "degrees": c.views.degrees, "slots": c.slots,
                  "odds": c.odds, "positive/ignore mm": (c.loss.positive_mm, c.loss.ignore_mm),
                  "heads": len(c.model.heads)} for n, c in rows.items()}).T

# %%
assert all(c.fit.steps == 20000 and c.fit.lr == 0.02 and c.loss.tau == 0.5 for c in rows.values())
assert rows["ct_mri_inter"].kinds == ("pairs",) and rows["ct_mri_inter"].needs_start
with raises(ConfigError, match="Did you mean 'sam_NIHLN'"): preset("sam_NIHL")

# %% [markdown]
# ## Small
# The published network takes 20 seconds a step on a CPU core. `tiny` is a quarter as wide, has vectors of 64 numbers,
# smaller views, boxes and batches, fewer negatives that may lie nearer, turns of at least 10°, a sharper temperature
# and AdamW with a falling rate, and learns within minutes. It also has another norm: with four views a step, means and
# variances of a batch are those of one place in one or two scans, and what they say of another part of the body is
# wrong. With group norm 240 steps on two crops of a thorax find 50 % of places within 10 mm in another thorax and 77 %
# in a head and neck; with batch norm 300 steps find 45 and 64 %. The price is that such a network cannot embed a scan
# in slabs.

# %%
#| export
def tiny(
    cfg: EmbeddingConfig, # settings of a full training
    steps: int = 700, # optimiser steps
) -> EmbeddingConfig: # settings for a CPU
    "Make settings small enough for a CPU"
    least = lambda a, b: tuple(min(x, y) for x, y in zip(a, b))
    return cfg.model_copy(update={
        "model": cfg.model.model_copy(update={"width": 16, "emb": 64, "norm": "gn"}),
        "views": cfg.views.model_copy(update={"patch": least(cfg.views.patch, (32, 64, 64)),
                                              "degrees": max(cfg.views.degrees, 10.0)}),
        "organs_crop": least(cfg.organs_crop, (48, 64, 64)), "pairs_crop": least(cfg.pairs_crop, (32, 64, 64)),
        "slots": {k: min(n, 2) for k, n in cfg.slots.items()},
        "loss": cfg.loss.model_copy(update={"tau": 0.1, "ignore_mm": min(cfg.loss.ignore_mm, 12.0), "hard": 1500,
                                            "negatives": 300, "coarse_global": min(cfg.loss.coarse_global, 300)}),
        "fit": cfg.fit.model_copy(update={
            "steps": steps, "optimizer": "adamw", "lr": 2e-3, "weight_decay": 1e-2, "schedule": "cosine",
            "warmup_steps": min(50, max(1, steps//10)), "checkpoint_every": 100, "keep": 3,
            "validate_every": max(1, steps//4), "clip_norm": 1.0})})

# %%
small = tiny(preset("samv2_NIHLN"))
small.model.width, small.views.patch, small.slots, small.odds

# %% [markdown]
# ## From a file, from the command line
# `settings` puts together a preset or a file, changes by dotted names, and the arguments of a command.

# %%
#| export
def settings(
    config: str | os.PathLike | None = None, # .json or .yaml file of the settings
    name: str | None = None, # preset, if there is no file
    overrides: Sequence[str] = (), # settings to change, 'fit.lr=1e-3'
    given: Mapping[str, Any] | None = None, # dotted name -> value; None means: not given
    *,
    small: bool = False, # make it small enough for a CPU before the changes
) -> EmbeddingConfig: # settings
    "Settings of a run from a preset or a file, with changes"
    if config is not None and name is not None: raise ConfigError("config and preset: give one of them, not both")
    changes = parse_overrides(overrides) | {k: v for k, v in (given or {}).items() if v is not None}
    base = load_config(EmbeddingConfig, config) if config is not None else preset(name or "sam_NIHLN")
    data = (tiny(base) if small else base).model_dump(mode="json")
    for dotted, value in changes.items():
        *groups, last = dotted.split(".")
        at = data
        for g in groups:
            if not isinstance(at.get(g), dict): raise ConfigError(f"override {dotted}: {g!r} is no group of settings")
            at = at[g]
        at[last] = value
    return check_config(EmbeddingConfig, data, str(config or name or "settings"))

# %%
with tmpdir() as d:
    dump_config(small, d/"run.json")
    again = settings(d/"run.json", overrides=["fit.lr=1e-3", "loss.tau=0.2"], given={"fit.seed": 4, "workers": None})
assert again.model_copy(update={"fit": small.fit, "loss": small.loss}) == small
assert (again.fit.lr, again.fit.seed, again.loss.tau) == (1e-3, 4, 0.2)
with raises(ConfigError, match="not both"): settings("run.json", "sam_NIHLN")
with raises(ConfigError, match="'fti' is no group"): settings(overrides=["fti.lr=1"])
