# %% [markdown]
# # Settings of a multi-task U-Net
#
# > One typed file says what a network reads, learns and writes; every rule is checked before any data is opened.
#
# The system that this family follows
# ([multi-task-3d-resencoder-unet](https://github.com/bruniss/multi-task-3d-resencoder-unet)) is driven by one JSON
# file. Of its keys, six were documented and never read, three were read under another name, and a misspelt one was
# ignored; a night of training told nobody. Here the same file loads unchanged, and so do the files of its successors,
# but every key is known, every rule is checked, and all problems come in one message with their places in the file.
#
# Axes are (z, y, x) on all pages of this family, and the channels of a vector are (x, y, z), because the data are
# written that way.

# %%
#| default_exp zarrnet.config

# %%
#| export
import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (AfterValidator, BeforeValidator, ConfigDict, Field, PlainSerializer, PrivateAttr,
                      ValidationError, ValidationInfo, field_validator, model_validator)
from pydantic_core import InitErrorDetails, PydanticCustomError

from medvol_nb.config import Config, ConfigPath, _known_keys, load_config, parse_overrides, parse_settings
from medvol_nb.core import _read_text, log
from medvol_nb.zarrnet.plan import (NetworkConfig, NetworkPlan, _listed, _plan_problems, auto_levels, plan_network,
                                    size_problem)

_all_ = ["NetworkConfig", "NetworkPlan", "auto_levels", "plan_network", "size_problem"]

# %%
import json

from medvol_nb.config import check_config
from medvol_nb.core import ConfigError, raises, tmpdir

# %% [markdown]
# ## Types that explain themselves
# A union of types reports one error for each alternative. The types below parse in one step and say in one sentence
# what they take. Stores may be local paths or addresses; only paths start from the folder of the file. An ignore label
# is a *value* of the label (the reference's manual says yes or no, which its code cannot use), and NaN is a legal one.

# %%
#| export
Fraction = Annotated[float, Field(ge=0, le=1)]
Size3 = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
                  Field(description="(z, y, x) [voxel]")]
Activation = Literal["none", "sigmoid", "softmax"]
Kind = Literal["binary", "multiclass", "normals", "regression"]

def _is_number(value: Any) -> bool:
    "Whether it is a number that an array can hold; True and False are none"
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64)

def _store(value: str, info: ValidationInfo) -> str:
    "A local path starts from the folder of the settings file, an address stays as it is"
    if not value.strip(): raise ValueError("must be a path or an address, got an empty text")
    base = (info.context or {}).get("base")
    return value if base is None or "://" in value else os.path.normpath(os.path.join(base, value))

def _ignore_value(value: Any) -> Any:
    if value is None: return None
    if isinstance(value, str) and value.lower() == "nan": return math.nan
    if not _is_number(value):
        raise ValueError(f"must be a label value (a number) or null, got {value!r}")
    if math.isinf(value): raise ValueError("must be finite or NaN")
    return math.nan if math.isnan(value) else int(value) if value == int(value) else value

def _radius(value: Any) -> Any:
    "Dilation [voxel]: true is 5, false is none"
    if value is None: return None
    if isinstance(value, bool): return 5.0 if value else 0.0
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"must be true, false or a radius >= 0 in voxels, got {value!r}")
    return float(value)

def _scale(value: Any) -> Any:
    if value in ("auto", "probability") or (_is_number(value) and 0 < value < math.inf): return value
    raise ValueError(f"must be 'auto', 'probability' or a factor > 0, got {value!r}")

def _dtype(value: Any) -> str:
    name = value.removeprefix("np.") if isinstance(value, str) else value
    if name in ("auto", "uint8", "uint16", "float16", "float32"): return name
    raise ValueError(f"must be auto, uint8, uint16, float16 or float32, got {value!r}")

def _dtypes(value: Any) -> Any:
    return {k: _dtype(v) for k, v in value.items()} if isinstance(value, Mapping) else _dtype(value)

def _names(value: Any) -> Any:
    if value == "all": return value
    names = tuple(_listed(value, "a list of targets, or 'all'"))
    if not all(isinstance(n, str) for n in names): raise ValueError(f"must hold names of targets, got {value!r}")
    return names

StorePath = Annotated[str, AfterValidator(_store)]
_AnyFloat = Annotated[float, Field(allow_inf_nan=True)]
IgnoreLabel = Annotated[int | _AnyFloat | None, BeforeValidator(_ignore_value),
                        AfterValidator(_ignore_value), # one NaN object, so that equal settings compare equal
                        PlainSerializer(lambda v: "nan" if v is not None and math.isnan(v) else v, when_used="json")]
Radius = Annotated[float | None, BeforeValidator(_radius)]

# %% [markdown]
# ## How to train
# Names and defaults are those of the reference's code; where its manual says something else, the code won, but for
# label smoothing. The second half of the list is new.

# %%
#| export
class TrainParams(Config):
    "How to train"
    model_name: str = Field("SheetNorm", pattern=r"^[A-Za-z0-9._-]+$") # stem of the checkpoints
    patch_size: Size3 = (192, 192, 192) # (z, y, x) [voxel], divisible by the strides of the network
    batch_size: int = Field(2, ge=1) # patches a step
    tr_val_split: float = Field(0.95, gt=0, le=1) # part of the patches to train with; 1: no validation
    ignore_label: IgnoreLabel = None # label value that counts nowhere
    loss_only_on_label: bool = False # trust annotations only near annotations
    dilate_label: Radius = 0.0 # radius [voxel]; true is 5
    label_smoothing: float = Field(0.1, ge=0, lt=0.5) # of binary and multiclass targets
    initial_lr: float = Field(1e-3, gt=0) # peak learning rate
    weight_decay: float = Field(1e-4, ge=0) # of weights, not of biases and norms
    max_steps_per_epoch: int = Field(500, ge=1) # batches in an epoch
    max_val_steps_per_epoch: int = Field(25, ge=0) # batches of a validation, the same ones each time
    max_epoch: int = Field(500, ge=1) # epochs in all
    gradient_accumulation: int = Field(1, ge=1) # batches summed into one optimiser step
    checkpoint_path: ConfigPath | None = None # where to go on from
    load_weights_only: bool = False # take the weights alone, and start at epoch 0
    ckpt_out_base: ConfigPath = Field("checkpoints", validate_default=True) # folder of the run
    optimizer: Literal["AdamW", "SGD"] = "AdamW" # SGD has momentum 0.9 (Nesterov)
    beta2: float = Field(0.999, ge=0, lt=1) # the second beta of AdamW; 0.99 suits runs of a few hundred steps
    num_dataloader_workers: int = Field(4, ge=0) # loading processes
    tensorboard_log_dir: ConfigPath | None = Field("tensorboard_logs", validate_default=True) # null: no TensorBoard
    seed: int = Field(0, ge=0) # names every random stream
    device: str = "auto" # see `device_for`
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto" # auto: bf16 or fp16 on a GPU, fp32 on the CPU
    grad_clip: float | None = Field(3.0, gt=0) # largest gradient norm
    scheduler: Literal["cosine", "poly", "constant"] = "cosine" # of the learning rate
    warmup_steps: int = Field(0, ge=0) # linear rise, optimiser steps
    eta_min: float = Field(0.0, ge=0) # floor of the learning rate
    val_split_mode: Literal["block", "volume", "random"] = "block" # unit that is given to validation
    val_block: Size3 | None = None # edge of a block [voxel]; default: 4 patches
    keep_checkpoints: int = Field(10, ge=0) # newest kept; 0: all
    keep_best: Literal[1] = 1 # best weights kept, as best.safetensors
    ema_decay: float | None = Field(None, gt=0, lt=1) # average of the weights
    deep_supervision: bool = False # losses at coarse levels, too
    compile: bool = False # torch.compile
    debug_gif_every: int = Field(1, ge=0) # epochs between panels; 0: none
    early_stopping_patience: int = Field(0, ge=0) # epochs without progress; 0: never stop
    pad_small: bool = False # accept volumes smaller than a patch
    oversample_foreground: float | None = Field(None, ge=0, le=1) # part of the patches drawn by labelled voxels

    @field_validator("optimizer", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return {"adamw": "AdamW", "sgd": "SGD"}.get(value.lower(), value) if isinstance(value, str) else value

# %%
TrainParams(optimizer="sgd", dilate_label=True).model_dump(include={"optimizer", "dilate_label", "precision"})

# %%
with raises(ConfigError, match=r"ignore_label: must be a label value \(a number\) or null, got True"):
    check_config(TrainParams, {"ignore_label": True})

# %% [markdown]
# ## How to predict
# `overlap` is the part of a patch that it shares with the next one. One successor of the reference kept the name and
# used it as the *step*, so that 0.25 there is 0.75 here.

# %%
#| export
class InferenceParams(Config):
    "How to predict a volume"
    aliases = {"output_path": "output_dir"}
    patch_size: Size3 | None = None # (z, y, x) [voxel]; default: the checkpoint's
    batch_size: int = Field(2, ge=1) # patches a forward pass
    checkpoint_path: ConfigPath | None = None # trained network
    num_dataloader_workers: int = Field(4, ge=0) # 0: read between batches; else a thread reads ahead
    input_path: StorePath | None = None # volume to predict
    input_format: Literal["auto", "zarr", "ome-zarr", "tif"] = "auto" # of the input; refused if it is another one
    output_dir: ConfigPath = Field(".", validate_default=True) # gets predictions.zarr
    output_format: Literal["zarr", "ome-zarr", "tif"] = "zarr" # of the output
    output_type: Annotated[str | dict[str, str], BeforeValidator(_dtypes)] = "auto" # auto: normals uint16, others uint8
    output_targets: Annotated[str | tuple[str, ...], BeforeValidator(_names)] = "all" # names, or "all"
    overlap: float = Field(0.25, ge=0, le=0.9) # part of the patch shared with the next one
    load_all: bool = False # hold the input in memory
    blend: Literal["gaussian", "constant"] = "gaussian" # weight of a voxel in its patch
    sigma_scale: float = Field(0.125, gt=0) # of the Gaussian, in patch edges
    tta: Literal["none", "mirror"] = "none" # average over the 8 mirror images
    max_memory_gb: float = Field(2.0, gt=0) # for sums, weights and slabs [GB]
    resume: bool = True # go on after an interruption
    overwrite: bool = False # start over
    part_id: int = Field(0, ge=0) # which part this process predicts
    num_parts: int = Field(1, ge=1) # into how many the volume is divided
    bbox: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None # [from, to) of z, y, x [voxel]
    mask_path: StorePath | None = None # predict only where this is above the threshold
    mask_threshold: float = 0.0 # of the mask
    skip_empty: bool = True # leave out patches without stored or varying input
    chunks: Size3 = (128, 128, 128) # of the output [voxel]
    compressor: dict[str, Any] = {"name": "zstd", "level": 1} # of the output
    activation_override: dict[str, Activation] | None = None # target -> activation

    @model_validator(mode="before")
    @classmethod
    def _activations(cls, data: Any) -> Any:
        "Files of the reference give activations as `targets: {name: {channels, activation}}`"
        if not isinstance(data, Mapping) or "targets" not in data: return data
        data = dict(data)
        given = data.pop("targets")
        if not isinstance(given, Mapping) or not all(isinstance(t, Mapping) for t in given.values()):
            raise ValueError(f"targets: must be groups of keys, got {given!r}")
        if odd := sorted({str(k) for t in given.values() for k in t} - {"channels", "activation", "weight"}):
            raise ValueError(f"targets: unknown keys {', '.join(odd)}")
        if data.get("activation_override"): raise ValueError("'targets' and 'activation_override' say the same")
        data["activation_override"] = {n: t["activation"] for n, t in given.items() if "activation" in t} or None
        return data

    @field_validator("bbox")
    @classmethod
    def _ordered(cls, box: Any) -> Any:
        if box is not None and any(not 0 <= a < b for a, b in box):
            raise ValueError(f"every axis needs 0 <= from < to, got {[list(r) for r in box]}")
        return box

# %%
with raises(ConfigError, match="must be a list of targets, or 'all', got 's'; overlap: must be less than or equal to"):
    check_config(InferenceParams, {"overlap": 1, "output_targets": "s"})

# %% [markdown]
# ## What is read and what is learned
# An entry of `volume_paths` names its input, the labels of each target, and a few settings of its own. Keys that are
# not settings are names of targets. What a target *is* decides its loss, its decoding and its behaviour under rotation;
# it follows from channels and activation and can be said with `kind`.

# %%
#| export
LOSS_KINDS: dict[str, tuple[str, ...]] = { # name -> kinds of target that it fits; completed by `register_loss`
    "bce": ("binary",), "bce_dice": ("binary",), "focal": ("binary",), "bce_z": ("binary",),
    "dice": ("binary", "multiclass"), "generalised_dice": ("binary", "multiclass"),
    "skeleton_recall": ("binary", "multiclass"), "cldice": ("binary", "multiclass"),
    "ce": ("multiclass",), "ce_dice": ("multiclass",),
    "cosine": ("normals",), "normal_smoothness": ("normals",),
    "mse": ("regression", "normals"), "l1": ("regression", "normals"), "smooth_l1": ("regression", "normals")}
DEFAULT_LOSS: dict[str, str] = {"binary": "bce_dice", "multiclass": "ce_dice", "normals": "cosine",
                                "regression": "smooth_l1"} # kind of target -> loss

_OLD_LOSSES = {"BCEDiceLoss": "bce_dice", "BCEWithLogitsLoss": "bce", "BCEWithLogitsLossLabelSmoothing": "bce",
               "BCEWithLogitsLossZSmooth": "bce_z", "CrossEntropyLoss": "ce", "MSELoss": "mse",
               "masked_cosine_loss": "cosine", "MaskedCosineLoss": "cosine"} # names in files of the reference

class Target(Config):
    "One thing that the network predicts"
    aliases = {"loss_fn": "loss"}
    channels: int = Field(ge=1) # of the output
    activation: Activation = "none" # of the prediction; never applied in training
    weight: float = Field(1.0, ge=0) # of its loss in the sum
    kind: Kind | None = None # default: from name, channels and activation
    loss: str | None = None # name of a loss; default: by kind
    loss_kwargs: dict[str, Any] = {} # its arguments
    ignore_label: IgnoreLabel = None # default: that of tr_params
    loss_only_on_label: bool | None = None # default: that of tr_params
    dilate_label: Radius = None # radius [voxel]; default: that of tr_params, for normals 0
    label_smoothing: float | None = Field(None, ge=0, lt=0.5) # default: that of tr_params, for others than classes 0
    label_scale: Annotated[str | float, BeforeValidator(_scale)] = "auto" # how stored labels become values
    signed: bool = True # of normals: the two directions of a line differ
    label_region_radius: float = Field(16.0, ge=0) # for loss_only_on_label [voxel]
    output_range: tuple[float, float] | None = None # values that become 0 and the largest integer of the output

    @field_validator("loss")
    @classmethod
    def _renamed(cls, value: str | None) -> str | None: return _OLD_LOSSES.get(value, value)

    def resolved(
        self,
        name: str, # of the target
        tr: TrainParams, # what is inherited
    ) -> "Target": # nothing left open
        "The target with its kind, its loss and inherited values filled in"
        kind = self.kind or infer_kind(name, self.channels, self.activation)
        classes = kind in ("binary", "multiclass")
        inherited = {"dilate_label": 0.0 if kind == "normals" else tr.dilate_label, "ignore_label": tr.ignore_label,
                     "loss_only_on_label": tr.loss_only_on_label,
                     "label_smoothing": tr.label_smoothing if classes else 0.0}
        filled = {k: v for k, v in inherited.items() if getattr(self, k) is None}
        return self.model_copy(update={"kind": kind, "loss": self.loss or DEFAULT_LOSS[kind], **filled})

def infer_kind(
    name: str, # of the target
    channels: int, # of the output
    activation: str = "none", # of the output
) -> str: # "binary", "multiclass", "normals" or "regression"
    "What a target is, if nobody says so"
    if channels == 1: return "binary"
    if activation == "softmax": return "multiclass"
    return "normals" if name in ("normal", "normals") and channels == 3 else "regression"

class VolumeEntry(Config):
    "One input with its labels; keys that are not settings are targets, their values paths of labels"
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, StorePath | None] = Field(init=False)
    input: StorePath # image
    ref_label: str | None = None # target that the patch finder looks at; default: the first
    name: str | None = None # in lists and messages; default: from the path
    level: int = Field(0, ge=0) # resolution of an OME-Zarr
    bbox: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None # [from, to) of z, y, x [voxel]
    mask: StorePath | None = None # patches only where this is not zero
    ignore_mask: StorePath | None = None # nothing is learned where this is not zero
    split: Literal["train", "val"] | None = None # for val_split_mode "volume"
    weight: float = Field(1.0, ge=0) # of its patches in sampling
    channel_axis: Literal[0, 3, -1] | dict[str, Literal[0, 3, -1]] | None = None # of 4-D arrays, where both fit

    _box = field_validator("bbox")(InferenceParams._ordered.__func__)

    @property
    def paths(self) -> dict[str, str | None]:
        "Path of the labels of each target"
        return dict(self.__pydantic_extra__ or {})

    def axis_of(
        self,
        key: str, # "input" or a target
    ) -> int | None: # 0, -1, or None if it follows from the data
        "Channel axis of an array of this entry"
        axis = self.channel_axis.get(key) if isinstance(self.channel_axis, dict) else self.channel_axis
        return -1 if axis == 3 else axis

class DatasetParams(Config):
    "What to learn from"
    min_bbox_percent: Fraction = 0.95 # extent of the labelled voxels of a patch, as a fraction of the patch
    min_labeled_ratio: Fraction = 0.10 # labelled voxels of a patch, as a fraction
    labeled_ratio_of: Literal["patch", "bbox"] = "patch" # of what they are a fraction
    patch_step: Size3 | None = None # distance of candidates [voxel]; default: half a patch
    grid_origin: Literal["volume", "label_bbox"] = "volume" # where the grid of candidates starts
    end_aligned: bool = False # also a last candidate on each axis
    use_cache: bool = True # keep the patches that were found
    cache_file: ConfigPath | None = None # where; default: valid_patches.json in the current folder
    cache_folder: ConfigPath | None = None # where, with an automatic name
    cache_floor: Fraction = 0.5 # part of the thresholds down to which candidates are kept
    normalization: Literal["none", "scale", "minmax", "zscore", "zscore_patch", "robust",
                           "ct_normalization"] = "zscore" # of the image
    in_channels: int | None = Field(None, ge=1) # checked against the input if given
    allow_missing_targets: bool = False # a path may be null: nothing is learned about that target there
    decoded_cache_gb: float = Field(0, ge=0) # decoded chunks kept by each loading process; patches then come in groups
    augmentation: dict[str, Any] | None = None # settings of the augmentation; default: all of it
    volume_paths: tuple[VolumeEntry, ...] = () # inputs with labels
    targets: dict[str, Target] = Field(min_length=1) # what is predicted

# %%
{name: infer_kind(name, c, a) for name, c, a in
 [("sheet", 1, "none"), ("organs", 5, "softmax"), ("normals", 3, "none"), ("flow", 3, "none")]}

# %%
entry = VolumeEntry(input="a.zarr", sheet="a_sheet.zarr", normals=None, channel_axis={"normals": 3})
assert entry.paths == {"sheet": "a_sheet.zarr", "normals": None} and entry.axis_of("normals") == -1
assert Target(channels=1).resolved("fibre", TrainParams()).label_smoothing == 0.1
assert Target(channels=3).resolved("normals", TrainParams(dilate_label=3)).dilate_label == 0

# %% [markdown]
# ## Rules that tie keys together
# A patch must fit the strides of the network, a volume needs a path for each target, a loss must fit its target. But
# pydantic stops before such rules if any single value is wrong. Here values that are wrong are set aside, the rules
# that do not need them are checked all the same, and everything is reported at once.

# %%
#| export
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_UNSMOOTHED = {"focal", "bce_z", "dice", "generalised_dice", "skeleton_recall", "cldice"} # losses of hard classes
_RESERVED = {*VolumeEntry.model_fields, "image", "meta", "paths"}

def _target_problems(name: str, t: Target, ok: Any) -> Iterator[tuple[tuple, str]]:
    "Rules of one target; `ok(key)` tells whether its value is legal"
    if not _NAME.fullmatch(name) or name in _RESERVED or name.endswith("__mask"):
        yield (), f"'{name}' cannot name a target: letters, digits, _ and -, and none of {', '.join(sorted(_RESERVED))}"
    if not ok("channels", "activation", "kind"): return
    kind = t.kind or infer_kind(name, t.channels, t.activation)
    if t.activation == "softmax" and t.channels < 2:
        yield ("activation",), f"softmax needs channels >= 2, got {t.channels}"
    elif t.channels not in {"binary": (1,), "normals": (3,)}.get(kind, (t.channels,)):
        yield ("kind",), f"{kind} needs channels {1 if kind == 'binary' else 3}, got {t.channels}"
    elif kind == "multiclass" and t.channels < 2: yield ("kind",), f"multiclass needs channels >= 2, got {t.channels}"
    if t.activation != "none" and kind == "normals": yield ("activation",), "normals have none"
    if ok("label_smoothing") and t.label_smoothing and kind in ("normals", "regression"):
        yield ("label_smoothing",), f"applies to classes, not to {kind}"
    elif ok("label_smoothing") and t.label_smoothing and t.loss in _UNSMOOTHED:
        yield ("label_smoothing",), f"the loss '{t.loss}' has none. Leave it out, or take bce_dice or ce_dice"
    if ok("loss") and t.loss is not None:
        if t.loss not in LOSS_KINDS:
            near = difflib.get_close_matches(t.loss, LOSS_KINDS, n=1)
            yield ("loss",), (f"unknown loss '{t.loss}'" + (f", did you mean '{near[0]}'?" if near else "") +
                              f" Known: {', '.join(sorted(LOSS_KINDS))}")
        elif kind not in LOSS_KINDS[t.loss]:
            fit = [k for k, kinds in LOSS_KINDS.items() if kind in kinds]
            yield ("loss",), f"'{t.loss}' is not for {kind}, use one of {', '.join(fit)}"
    if ok("output_range") and t.output_range and not t.output_range[0] < t.output_range[1]:
        yield ("output_range",), f"must rise, got {list(t.output_range)}"

def _entry_problems(e: VolumeEntry, names: list, data: DatasetParams, ok: Any) -> Iterator[tuple[tuple, str]]:
    "Rules of one entry of volume_paths"
    known = [*names, *VolumeEntry.model_fields]
    for key in e.paths:
        if key not in names:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            yield (key,), "not a target and not a setting" + (f", did you mean '{near[0]}'?" if near else "")
        elif e.paths[key] is None and ok(key) and not data.allow_missing_targets:
            yield (key,), "null, which is only allowed with dataset_config.allow_missing_targets"
    for name in names:
        if name not in e.paths and ok(name): yield (), f"no path for target '{name}'"
    ref = e.ref_label or names[0]
    if ok("ref_label") and ref not in names:
        yield ("ref_label",), f"'{ref}' is not a target of this volume, it has {', '.join(e.paths) or 'none'}"
    elif ok(ref) and e.paths.get(ref, "") is None:
        yield ("ref_label",), f"the labels of '{ref}' are null here, name another target"

def _rules(cfg: Any, ok: Any) -> Iterator[tuple[tuple, str]]:
    "Location and message of every rule between keys that does not hold; `ok(*loc)` tells whether a value is legal"
    tr, inf, net, data = cfg.tr_params, cfg.inference_params, cfg.network, cfg.dataset_config
    if ok("model_config") and ok("tr_params", "patch_size"):
        auto = auto_levels(tr.patch_size, net.spacing) if net.preset == "auto" else None
        problems = list(_plan_problems(net, auto))
        yield from ((("model_config", k), m) for k, m in problems)
        if not problems:
            plan = plan_network(net, tr.patch_size)
            if m := size_problem(plan.patch_size, plan): yield ("tr_params", "patch_size"), m
            if inf.patch_size and ok("inference_params", "patch_size"):
                if m := size_problem(inf.patch_size, plan): yield ("inference_params", "patch_size"), m
    at = "dataset_config", "targets"
    names = list(data.targets) # those with an illegal value are still there
    for name, t in data.targets.items():
        for loc, m in _target_problems(name, t, lambda *keys, n=name: all(ok(*at, n, k) for k in keys)):
            yield (*at, name, *loc), m
    at = "dataset_config", "volume_paths"
    seen: dict[str, int] = {}
    known = ok("dataset_config", "targets", "") # some of them may be wrong, but it is known what they are called
    for i, e in enumerate(data.volume_paths if known else ()):
        if not ok(*at, i, "input"): continue
        for loc, m in _entry_problems(e, names, data, lambda *keys, n=i: all(ok(*at, n, k) for k in keys)):
            if not loc or ok("dataset_config", "targets", loc[0]): yield (*at, i, *loc), m
        if e.name is not None and seen.setdefault(e.name, i) != i:
            yield (*at, i, "name"), f"volume {seen[e.name]} is also called '{e.name}'"
    if ok("tr_params", "val_split_mode") and tr.val_split_mode == "volume" and data.volume_paths and ok(*at):
        if any(e.split is None for e in data.volume_paths):
            yield ("tr_params", "val_split_mode"), "'volume' needs split: train or val in every entry of volume_paths"
        elif all(e.split == "val" for e in data.volume_paths):
            yield ("tr_params", "val_split_mode"), "every volume is for validation, none is left to train with"
    if data.cache_file and data.cache_folder:
        yield ("dataset_config", "cache_folder"), "give cache_file or cache_folder, not both"
    if ok("inference_params", "part_id") and ok("inference_params", "num_parts") and inf.part_id >= inf.num_parts:
        yield ("inference_params", "part_id"), f"must be below num_parts {inf.num_parts}, got {inf.part_id}"
    if ok("tr_params", "eta_min") and ok("tr_params", "initial_lr") and tr.eta_min > tr.initial_lr:
        yield ("tr_params", "eta_min"), f"above initial_lr {tr.initial_lr}"
    for key in ("output_targets", "output_type", "activation_override"):
        value = getattr(inf, key)
        if not known or not value or isinstance(value, str): continue
        for n in value:
            if n not in names:
                near = difflib.get_close_matches(n, names, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
                yield ("inference_params", key), f"'{n}' is not a target, {hint}"
            elif key == "activation_override" and value[n] == "softmax" and ok(*at[:1], "targets", n, "channels") \
                    and data.targets[n].channels < 2:
                yield ("inference_params", key, n), "softmax needs channels >= 2"

# %% [markdown]
# ## Three generations of files
# The reference's first revision writes `tr_params`; the second divides it into `tr_setup` and `tr_config`, and calls
# `inference_params` `inference_config`. Some files have `volume_paths` and `targets` at the top. All are brought to one
# form, and messages name places as they stand in the file.

# %%
#| export
_SECTIONS = {"tr_setup": "tr_params", "tr_config": "tr_params", "inference_config": "inference_params",
             "network": "model_config"}

def _arrange(data: Mapping) -> tuple[dict, dict[tuple, tuple], list[tuple[tuple, str]]]:
    "Settings in one form; where parts of it stood before; what contradicts itself"
    tree, origin, found = {}, {}, []
    for key, value in data.items():
        name = _SECTIONS.get(key, key)
        if name not in tree: tree[name], origin[(name,)] = value, (key,)
        elif isinstance(value, Mapping) and isinstance(tree[name], Mapping) and name == "tr_params":
            for k in value:
                if k in tree[name]: found.append(((key, k), "is given twice, in two sections that mean the same"))
                origin[(name, k)] = (key, k)
            tree[name] = {**tree[name], **value}
        else: found.append(((key,), f"means the same as '{origin[(name,)][0]}', give one of them"))
    for key in ("volume_paths", "targets"):
        if key not in tree: continue
        value, section = tree.pop(key), tree.get("dataset_config", {})
        if not isinstance(section, Mapping): continue
        if key in section: found.append(((key,), "is given twice, at the top and in dataset_config"))
        else: tree["dataset_config"], origin[("dataset_config", key)] = {**section, key: value}, (key,)
    section = tree.get("dataset_config")
    if isinstance(section, Mapping) and isinstance(section.get("volume_paths"), Mapping):
        tree["dataset_config"] = {**section, "volume_paths": [section["volume_paths"]]}
        at = ("dataset_config", "volume_paths")
        origin[(*at, 0)] = origin.get(at, at)
    return tree, origin, found

def _placed(loc: tuple, origin: Mapping[tuple, tuple]) -> tuple:
    "Location in the file as it was written"
    n = next((n for n in range(len(loc), 0, -1) if loc[:n] in origin), 0)
    return (*origin.get(loc[:n], ()), *loc[n:])

_FILLERS = {"channels": 1, "input": "-", "targets": {"_": {"channels": 1}}}

def _without(tree: Any, loc: tuple) -> Any:
    "A copy without the value at `loc`; what has no default gets a filler, so that the rest can be looked at"
    head, *rest = loc
    if isinstance(tree, Mapping):
        if rest and isinstance(tree.get(head), (Mapping, list, tuple)):
            inner = tree[head]
            if isinstance(inner, Mapping) == isinstance(rest[0], str) and (len(rest) == 1 or rest[0] in inner or
                                                                           isinstance(rest[0], int)):
                return {**tree, head: _without(inner, tuple(rest))}
        return {**{k: v for k, v in tree.items() if k != head}, **({head: _FILLERS[head]} if head in _FILLERS else {})}
    if isinstance(tree, (list, tuple)) and isinstance(head, int) and head < len(tree):
        inner = tree[head]
        new = _without(inner, tuple(rest)) if rest and isinstance(inner, Mapping) else {"input": "-"}
        return [*tree[:head], new, *tree[head + 1:]]
    return tree

def _reworded(cls: type[Config], err: Mapping) -> tuple[str, str]:
    "Type and message of a problem; keys that nobody knows get a hint"
    loc = tuple("network" if p == "model_config" else p for p in err["loc"])
    if err["type"] != "extra_forbidden": return err["type"], err["msg"].removeprefix("Value error, ")
    sections = [*_SECTIONS, "model_config"] if len(loc) == 1 else []
    home = [f.alias or name for name, f in ZarrConfig.model_fields.items()
            if loc[-1] in _known_keys(cls, (name,)) and name != loc[0]]
    near = difflib.get_close_matches(str(loc[-1]), [*_known_keys(cls, loc[:-1]), *sections], n=1)
    hint = f", it belongs to {' or '.join(home)}" if home else f", did you mean '{near[0]}'?" if near else ""
    return "value_error", f"unknown key{hint}"

class _Lines(dict):
    "Where the values of a file stand; settings that differ in nothing else are equal"
    def __eq__(self, other: Any) -> bool: return True

# %%
#| export
class ZarrConfig(Config):
    "Settings of training and prediction of a multi-task U-Net"
    model_config = ConfigDict(serialize_by_alias=True)
    _lines: _Lines = PrivateAttr(default_factory=_Lines) # location in the file -> line
    tr_params: TrainParams = Field(default_factory=dict, validate_default=True) # how to train
    inference_params: InferenceParams = Field(default_factory=dict, validate_default=True) # how to predict
    network: NetworkConfig = Field(NetworkConfig(), alias="model_config") # the network; `model_config` in files
    dataset_config: DatasetParams # what to learn from

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, data: Any, handler: Any) -> Any:
        "Bring to one form, check values, then rules, and report all problems where they stand in the file"
        if not isinstance(data, Mapping): return handler(data)
        tree, origin, doubled = _arrange(data)
        problems, bad = [("value_error", loc, m, None) for loc, m in doubled], []
        try: cfg = handler(tree)
        except ValidationError as e:
            for err in e.errors(include_url=False):
                bad.append(err["loc"])
                kind, m = _reworded(cls, err)
                problems.append((kind, _placed(err["loc"], origin), m, err["input"]))
            for loc in bad: tree = _without(tree, loc)
            try: cfg = handler(tree)
            except ValidationError: cfg = None # too little is left to look at
        def ok(*loc: Any) -> bool: return not any(b[:len(loc)] == loc or loc[:len(b)] == b for b in bad)
        for loc, m in _rules(cfg, ok) if cfg is not None else ():
            problems.append(("value_error", _placed(loc, origin), m, None))
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, [
                InitErrorDetails(type=PydanticCustomError(kind, m), loc=loc, input=v)
                for kind, loc, m, v in problems])
        cfg._settle()
        return cfg

    def _settle(self) -> None:
        "An automatic network may need a larger patch; say so, and what else deserves a warning"
        fitted = self.plan.patch_size
        if fitted != self.tr_params.patch_size:
            log.warning("tr_params.patch_size: %s enlarged to %s, which the strides of the automatic network divide",
                        list(self.tr_params.patch_size), list(fitted))
            object.__setattr__(self, "tr_params", self.tr_params.model_copy(update={"patch_size": fitted}))
        if self.tr_params.tr_val_split == 1: log.warning("tr_params.tr_val_split: 1 leaves nothing to validate with")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike, # .json, .yaml or .yml file
        overrides: Mapping[str, Any] | Iterable[str] = (), # dotted key -> value, or 'key=value' strings
    ) -> "ZarrConfig":
        "Read settings; relative paths start from the folder of the file"
        overrides = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
        cfg = load_config(cls, path, overrides)
        data, lines = parse_settings(_read_text(path, 2**24), str(path))
        for place in (tuple(key.split(".")) for key in overrides): # not from a line of the file
            lines = {**{loc: n for loc, n in lines.items() if loc[:len(place)] != place}, place: 0}
        cfg._lines = _Lines(lines | {loc: lines[old] for loc, old in _arrange(data)[1].items() if old in lines})
        return cfg

    def place(
        self,
        *loc: str | int, # such as "dataset_config", "volume_paths", 1, "input"
    ) -> str: # dotted, with the line in the file if these settings come from one
        "Name a value in messages of checks that need the data"
        line = next((self._lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in self._lines), None)
        return ".".join(map(str, loc)) + (f" (line {line})" if line else "")

    def to_dict(self) -> dict[str, Any]: # plain values under the key names of files
        "Settings with all defaults filled in; `ZarrConfig.model_validate` reads them back"
        return self.model_dump(mode="json")

    @property
    def targets(self) -> dict[str, Target]:
        "Targets in their order, with kind, loss and inherited values filled in"
        return {n: t.resolved(n, self.tr_params) for n, t in self.dataset_config.targets.items()}

    @property
    def volumes(self) -> list[VolumeEntry]:
        "Entries of volume_paths, each with a name of its own and a reference target"
        entries = self.dataset_config.volume_paths
        first = next(iter(self.dataset_config.targets))
        names = [e.name or PurePosixPath(e.input.replace("\\", "/").rstrip("/")).name.split(".")[0] or "volume"
                 for e in entries]
        return [e.model_copy(update={"ref_label": e.ref_label or first,
                                     "name": n if names.count(n) == 1 else f"{n}_{i}"})
                for i, (e, n) in enumerate(zip(entries, names))]

    @property
    def plan(self) -> NetworkPlan:
        "The network in numbers"
        return plan_network(self.network, self.tr_params.patch_size)

    @property
    def cache_path(self) -> Path | None:
        "Where the patches that were found are kept; None if they are not"
        data, tr = self.dataset_config, self.tr_params
        if not data.use_cache: return None
        if data.cache_folder is None: return data.cache_file or Path("valid_patches.json")
        return data.cache_folder/f"{tr.model_name}_{'_'.join(map(str, tr.patch_size))}_cache.json"

# %% [markdown]
# The example of the reference's manual, shortened, loads as it is:

# %%
example = {
    "tr_params": {"model_name": "SheetNorm", "patch_size": [64, 192, 192], "batch_size": 4},
    "model_config": {"f_maps": [32, 64, 128, 256, 320, 528], "num_levels": 6},
    "dataset_config": {
        "min_bbox_percent": 0.95, "min_labeled_ratio": 0.07, "use_cache": True, "cache_file": "cache.json",
        "volume_paths": [
            {"input": "a.zarr", "sheet": "a_sheet.zarr", "normals": "a_n.zarr", "ref_label": "sheet"},
            {"input": "b.zarr", "sheet": "b_sheet.zarr", "normals": "b_n.zarr", "ref_label": "sheet"}],
        "targets": {"sheet": {"channels": 1, "activation": "none", "weight": 1},
                    "normals": {"channels": 3, "activation": "none", "weight": 0.75}}}}
with tmpdir() as d:
    (d/"task.json").write_text(json.dumps(example, indent=1))
    cfg = ZarrConfig.load(d/"task.json", ["tr_params.batch_size=1"])
cfg.place("dataset_config", "volume_paths", 1, "normals")

# %%
{name: (t.kind, t.loss, t.weight, t.label_smoothing) for name, t in cfg.targets.items()}, cfg.plan.divisor

# %%
assert ZarrConfig.model_validate(cfg.to_dict()) == cfg and cfg.tr_params.batch_size == 1
assert "model_config" in cfg.to_dict() and cfg.volumes[1].paths["sheet"].endswith("b_sheet.zarr")
assert [v.name for v in cfg.volumes] == ["a", "b"] and cfg.cache_path.name == "cache.json"

# %% [markdown]
# And a file with one of everything that can be wrong: a misspelt key, a wrong type, a volume without a path, a path of
# no target, an activation that does not fit, a patch that the network cannot halve five times.

# %%
wrong = json.loads(json.dumps(example))
wrong["tr_params"] |= {"batchsize": 4, "initial_lr": "quick", "patch_size": [60, 192, 192]}
wrong["dataset_config"]["volume_paths"][1].pop("normals")
wrong["dataset_config"]["volume_paths"][0]["shet"] = "x.zarr"
wrong["dataset_config"]["targets"]["sheet"]["activation"] = "softmax"
with tmpdir() as d:
    (d/"task.json").write_text(json.dumps(wrong, indent=1))
    try: ZarrConfig.load(d/"task.json")
    except ConfigError as e: message = str(e)
message.replace(str(d), "").split("; ")

# %%
assert "6 problems" in message and "did you mean 'batch_size'?" in message and "did you mean 'sheet'?" in message
assert "dataset_config.volume_paths.1 (line 37): no path for target 'normals'" in message
assert "axis z: 60 is not divisible by 32, the nearest legal sizes are 32 and 64" in message

# %% [markdown]
# Files of the second revision, with its section names, and with `targets` at the top:

# %%
later = {"tr_setup": {"model_name": "m"}, "tr_config": {"patch_size": [32, 32, 32]}, "model_config": {"n_levels": 3},
         "targets": {"ink": {"channels": 1, "loss_fn": "bce"}}, "volume_paths": {"input": "a.zarr", "ink": "b.zarr"}}
cfg = check_config(ZarrConfig, later)
cfg.tr_params.patch_size, cfg.plan.features, cfg.targets["ink"].loss, cfg.volumes[0].paths

# %%
with raises(ConfigError, match=r"tr_config.patch_size: axis x: 30 is not divisible by 4"):
    check_config(ZarrConfig, later | {"tr_config": {"patch_size": [32, 32, 30]}})
with raises(ConfigError, match="means the same as 'tr_setup'|given twice"):
    check_config(ZarrConfig, later | {"tr_params": {"model_name": "n"}})
