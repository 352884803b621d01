# %% [markdown]
# # A few labelled volumes
#
# > Fine-tuning: the pretrained network, one new layer, and one to three volumes with labels.
#
# Pretraining knows no organ's name. With a handful of labelled volumes the whole network is trained on, behind it a
# convolution of one voxel that turns features into classes. As published: Dice and cross-entropy, Adam, a cosine that
# ends after 500 rounds of 75 batches. Is it better than training from nothing? That depends on the data, and users
# have reported cases where it is not; so the same function trains from nothing, too, and the comparison is one line.

# %%
#| default_exp synth.fewshot

# %%
#| export
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from medvol_nb.blocks import init_weights
from medvol_nb.checkpoints import device_for, load_checkpoint, load_weights, seeded, torch_rng_for
from medvol_nb.config import Config, check_config
from medvol_nb.core import ConfigError, DataError, FormatError, OnExists, fingerprint, plain, rng_for
from medvol_nb.grid import Grid, random_starts, sweep, take_patch
from medvol_nb.intensity import Normalizer
from medvol_nb.synth.contrast import FeatureNetwork, FlatUNet, NetworkConfig, build_network
from medvol_nb.synth.features import window_size
from medvol_nb.synth.pretrain import Span, turns, warp
from medvol_nb.synth.views import apply_bias, apply_gamma, apply_gibbs, gaussian_blur, sharpen
from medvol_nb.torchcore import Batches, FitConfig, FitResult, FitState, fit

# %%
from medvol_nb import phantoms, plot
from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## Loss
# Cross-entropy over all classes and soft Dice over all but background, both with equal weight.

# %%
#| export
def dice_cross_entropy(
    pred: torch.Tensor, # (b, k, x, y, z) logits, class 0 is background
    target: torch.Tensor, # (b, x, y, z) int64 classes
) -> torch.Tensor: # scalar
    "Cross-entropy plus one minus soft Dice"
    share, truth = pred.softmax(1)[:, 1:], F.one_hot(target, pred.shape[1]).movedim(-1, 1)[:, 1:].to(pred.dtype)
    both, total = ((f).flatten(2).sum(-1) for f in (share*truth, share + truth))
    return F.cross_entropy(pred, target) + (1 - (2*both + 1e-5)/(total + 1e-5)).mean()

# %%
truth = torch.from_numpy(phantoms.head((24, 24, 24)).lbl.astype(np.int64))[None]
sure = 30*F.one_hot(truth).movedim(-1, 1).float()
dice_cross_entropy(sure, truth).item(), dice_cross_entropy(torch.zeros_like(sure), truth).item()

# %%
assert dice_cross_entropy(sure, truth) < 1e-4 < dice_cross_entropy(-sure, truth)

# %% [markdown]
# ## Variation
# Small data needs variation: the published list, each with probability 1/3, and nearly always a turn, a stretch and a
# shear. The operations on grey values are those with which views are made (page 42).

# %%
#| export
class FewShotAugment(Config):
    "How labelled volumes are varied; p is the probability of each change of grey values"
    p: float = Field(0.33, ge=0, le=1) # of noise, shading, ringing, gamma, blur, sharpening, each
    p_affine: float = Field(0.98, ge=0, le=1) # of turning, stretching and shearing
    degrees: float = Field(45.0, ge=0) # largest turn about each axis [degree]
    scale: float = Field(0.2, ge=0, lt=1) # largest relative change of size, per axis
    shear: float = Field(0.2, ge=0) # largest shear
    noise: Span = (0.0, 0.1) # standard deviation, where the volume is [0, 1]
    bias: Span = (0.0, 0.05) # 20 coefficients
    gibbs: Span = (0.0, 0.33) # share of the spectrum that is cut off
    gamma: Span = (0.5, 2.0) # exponent
    blur: Span = (0.0, 0.1) # standard deviation per axis [voxel]

def vary(
    img: torch.Tensor, # (x, y, z) float32, about [0, 1]
    seg: torch.Tensor, # (x, y, z) float32 labels
    rng: np.random.Generator, # see `rng_for`
    cfg: FewShotAugment, # probabilities and ranges
) -> tuple[torch.Tensor, torch.Tensor]: # both (x, y, z)
    "Vary a volume and its labels"
    if rng.random() < cfg.p_affine:
        size, shear = 1 + rng.uniform(-cfg.scale, cfg.scale, 3), np.eye(3)
        shear[np.triu_indices(3, 1)] = rng.uniform(-cfg.shear, cfg.shear, 3)
        back = np.linalg.inv(np.diag(size) @ turns(rng.uniform(-cfg.degrees, cfg.degrees, 3)) @ shear)
        img, seg = warp(img[None], back)[0], warp(seg[None], back, nearest=True)[0]
    on, x = rng.random(6) < cfg.p, img[None]
    if on[0]:
        draws = torch_rng_for(int(rng.integers(2**62)), "noise")
        x = x + float(rng.uniform(*cfg.noise))*torch.randn(x.shape, generator=draws)
    if on[1]: x = apply_bias(x, [rng.uniform(*cfg.bias, 20).tolist()])
    if on[2]: x = apply_gibbs(x, [float(rng.uniform(*cfg.gibbs))])
    if on[3]: x = apply_gamma(x, [float(rng.uniform(*cfg.gamma))])
    if on[4]: x = gaussian_blur(x, [rng.uniform(*cfg.blur, 3).tolist()])
    if on[5]:
        first = rng.uniform(0.5, 1.0, 3)
        x = sharpen(x, [first.tolist()], [rng.uniform(0.5, first).tolist()], [float(rng.uniform(10, 30))])
    return x[0], seg

# %%
head = phantoms.head((40, 40, 40), seed=1)
grey, lbl = torch.from_numpy(Normalizer.parse("minmax")(head.img)), torch.from_numpy(head.lbl.astype(np.float32))
many = [vary(grey, lbl, rng_for(0, "vary", k), FewShotAugment()) for k in range(5)]
shown = [[np.asarray(part[:, :, 20].T) for part in v] for v in many]
plot.montage([v for v, _ in shown], lbls=[k.astype(int) for _, k in shown], cols=5, alpha=0.25)

# %%
same = vary(grey, lbl, rng_for(0), FewShotAugment(p=0, p_affine=0))
assert torch.equal(same[0], grey) and torch.equal(same[1], lbl)
assert all(set(np.unique(v[1])) <= set(np.unique(lbl)) for v in many)

# %% [markdown]
# ## Training
# Which volumes are taken, when there are more than wanted, is a permutation with a seed, so that a larger amount
# contains the smaller one.

# %%
#| export
class FewShotFit(FitConfig):
    "`FitConfig` with the defaults of fine-tuning"
    epochs: int = Field(500, ge=1) # rounds of `steps_per_epoch` batches
    lr: float = Field(2e-4, gt=0) # peak learning rate
    optimizer: Literal["adamw", "adam", "sgd"] = "adam" # update rule
    weight_decay: float = Field(0.0, ge=0) # none
    validate_every: int | None = Field(150, ge=1) # steps between validations

class FewShotConfig(Config):
    "Settings of a fine-tuning"
    crop_size: int = Field(128, ge=1) # side of training crops [voxel]; smaller volumes get a smaller one
    batch_size: int = Field(4, ge=1) # crops a step
    steps_per_epoch: int = Field(75, ge=1) # batches a round
    overlap: float = Field(0.7, ge=0, lt=1) # of the windows of prediction
    normalizer: str = "minmax" # spec of page 05
    augment: FewShotAugment = FewShotAugment() # how crops are varied
    workers: int = Field(0, ge=0) # loading processes
    fit: FewShotFit = FewShotFit() # length, learning rate, device, checkpoints

class Segmenter(nn.Module):
    "Feature network with a classifier of single voxels behind it"
    def __init__(
        self,
        net: FlatUNet, # trained on, in place
        n_classes: int, # with background
        seed: int = 0, # names the classifier's first weights
    ):
        super().__init__()
        self.net = net
        with seeded(seed, "classifier"): self.head = nn.Conv3d(net.cfg.out_channels, n_classes, 1)
        init_weights(self.head, "none", generator=torch_rng_for(seed, "classifier"))

    def forward(self, x: torch.Tensor) -> torch.Tensor: return self.head(self.net(x)) # (b, 1, *n) -> (b, k, *n) logits

def choose_cases(
    names: Sequence[str], # all that could be trained with
    amount: int = 3, # how many are taken
    seed: int = 12345, # names the choice
) -> list[str]: # `amount` names
    "The training volumes of a few-shot experiment; more are the same and others"
    if not 1 <= amount <= len(names): raise ConfigError(f"train_amount: 1 to {len(names)} volumes, got {amount}")
    return [names[k] for k in rng_for(seed, "few-shot").permutation(len(names))[:amount]]

@dataclass(frozen=True, eq=False)
class LabelledCrops:
    "Varied crops of labelled volumes, for `Batches`"
    imgs: Sequence[np.ndarray] # each (x, y, z) float32, normalised
    segs: Sequence[np.ndarray] # each (x, y, z) integers 0...k - 1
    crop: tuple[int, ...] # (x, y, z) [voxel]
    augment: FewShotAugment # how

    def __len__(self) -> int: return len(self.imgs)

    def draw(
        self,
        index: int, # of the volume
        rng: np.random.Generator, # see `rng_for`
    ) -> dict[str, torch.Tensor]: # img (1, x, y, z) float32, seg (x, y, z) int64
        "One crop"
        start = random_starts(self.imgs[index].shape, self.crop, 1, rng)[0]
        img, seg = (torch.from_numpy(np.ascontiguousarray(take_patch(a, start, self.crop, 0)))
                    for a in (self.imgs[index], self.segs[index].astype(np.float32)))
        img, seg = vary(img, seg, rng, self.augment)
        return {"img": img[None].contiguous(), "seg": seg.long()}

def predict_labels(
    model: Segmenter, # in evaluation mode
    img: np.ndarray, # (x, y, z) float32, normalised
    crop: Sequence[int], # (x, y, z) window [voxel]
    overlap: float = 0.7, # part of a window shared with the next one
) -> np.ndarray: # (x, y, z) uint8 classes
    "Classes of a volume of any size"
    device = next(model.parameters()).device
    @torch.no_grad()
    def predict(windows: np.ndarray) -> np.ndarray: # (b, 1, x, y, z) -> (b, k, x, y, z)
        return model(torch.from_numpy(windows).to(device)).softmax(1).float().cpu().numpy()
    grid = Grid(img.shape, window_size(model.net, img.shape, crop), overlap)
    return sweep(predict, img, grid, fill=0, finish=lambda rows: rows.argmax(0).astype(np.uint8), desc="labels")

def dice_scores(
    predicted: np.ndarray, # (x, y, z) classes
    truth: np.ndarray, # (x, y, z) classes
    n_classes: int, # with background
) -> list[float]: # of classes 1...k - 1; NaN for those that are in neither
    "Dice of each class"
    sizes = [(int(((predicted == k) & (truth == k)).sum()), int((predicted == k).sum() + (truth == k).sum()))
             for k in range(1, n_classes)]
    return [2*both/total if total else math.nan for both, total in sizes]

def finetune(
    network: FeatureNetwork | NetworkConfig, # pretrained; or a shape, to train from nothing
    cases: Sequence[Mapping[str, np.ndarray]], # each img (x, y, z) and seg (x, y, z) with labels 0...k - 1
    held_out: Sequence[Mapping[str, np.ndarray]] = (), # arrays likewise, to validate with
    cfg: FewShotConfig = FewShotConfig(), # settings
    *,
    out_dir: str | os.PathLike, # run folder; created
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many optimiser steps in all
) -> FitResult: # steps, best loss, log, path of the weights
    "Train a network to label volumes, from a few that are labelled"
    if not cases: raise DataError("few-shot: no labelled volume was given")
    for k, c in enumerate([*cases, *held_out]):
        img, seg = np.asarray(c["img"]), np.asarray(c["seg"])
        if img.ndim != 3 or img.shape != seg.shape or seg.dtype.kind not in "iu" or seg.min() < 0:
            raise DataError(f"few-shot: volume {k} needs img and integer seg >= 0 of one shape (x, y, z), got "
                            f"{img.shape} and {seg.dtype} {seg.shape}")
    classes, norm = int(max(c["seg"].max() for c in cases)) + 1, Normalizer.parse(cfg.normalizer)
    if classes < 2: raise DataError("few-shot: the labelled volumes hold background only")
    started = network.digest if isinstance(network, FeatureNetwork) else "from nothing"
    net = build_network(network if isinstance(network, NetworkConfig) else network.net.cfg, cfg.fit.seed)
    if isinstance(network, FeatureNetwork): net.load_state_dict(network.net.state_dict())
    model = Segmenter(net, classes, cfg.fit.seed)
    largest = [max(c["img"].shape[a] for c in cases) for a in range(3)]
    crop = window_size(net, largest, (cfg.crop_size,)*3)
    crops = LabelledCrops([norm(c["img"]) for c in cases], [c["seg"] for c in cases], crop, cfg.augment)
    batches = Batches(crops, cfg.batch_size, seed=cfg.fit.seed, workers=cfg.workers, per_epoch=cfg.steps_per_epoch,
                      start_method="forkserver")
    def loss(wrapped: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return dice_cross_entropy(wrapped(batch["img"]).float(), batch["seg"])
    def check(bare: Segmenter, state: FitState) -> dict[str, float]:
        rows = [dice_scores(predict_labels(bare, norm(c["img"]), crop, cfg.overlap), c["seg"], classes)
                for c in held_out]
        dice = float(np.nanmean(np.array(rows)))
        return {"val_loss": 1 - dice, "val_dice": dice}
    about = {"format": "medvol_nb.fewshot 1", "network": plain(net.cfg), "classes": classes, "crop": list(crop),
             "normalizer": cfg.normalizer}
    data = fingerprint([[c["img"], c["seg"]] for c in cases])
    settings = cfg.model_dump(mode="json", exclude={"fit", "workers"})
    return fit(model, batches, loss, cfg.fit, out_dir=out_dir, validate=check if held_out else None,
               config={"model": about, "settings": settings, "start": started, "data": data}, on_exists=on_exists,
               stop_at=stop_at, desc="few-shot")

def load_segmenter(
    path: str | os.PathLike, # run folder of `finetune`, or one of its weight files
    device: str = "auto", # where the network goes
) -> tuple[Segmenter, dict[str, Any]]: # in evaluation mode; classes, crop and normalizer
    "Build the network that `finetune` trained"
    path = Path(path)
    if path.is_dir(): path = path/("best.safetensors" if (path/"best.safetensors").exists() else "model.safetensors")
    saved = load_checkpoint(path)
    about = saved["config"].get("model") if isinstance(saved.get("config"), dict) else None
    if not isinstance(about, dict) or about.get("format") != "medvol_nb.fewshot 1":
        raise FormatError(f"{path}: these are not weights of `finetune`")
    model = Segmenter(build_network(check_config(NetworkConfig, about["network"], str(path))), about["classes"])
    load_weights(model, saved["model"])
    return model.eval().to(device_for(device)), about

# %%
people = [{"img": h.img, "seg": h.lbl} for h in (phantoms.head((32, 32, 32), seed=k) for k in range(3))]
settings = FewShotConfig(batch_size=1, steps_per_epoch=40, overlap=0.3, augment=FewShotAugment(degrees=10, p=0),
                         fit=FewShotFit(epochs=1, lr=1e-2, validate_every=20, tensorboard=False))
shape = NetworkConfig(width=4, levels=2)
with tmpdir() as folder:
    done = finetune(shape, people[:2], people[2:], settings, out_dir=folder/"run")
    model, about = load_segmenter(folder/"run", "cpu")
made = predict_labels(model, Normalizer.parse(about["normalizer"])(people[2]["img"]), about["crop"])
plot.montage([people[2]["img"][:, :, 16].T]*2, lbls=[people[2]["seg"][:, :, 16].T, made[:, :, 16].T],
             titles=["truth", "after 40 steps"], width=4), dice_scores(made, people[2]["seg"], about["classes"])

# %%
losses = [float(r["loss"]) for r in done.log]
assert np.mean(losses[-8:]) < np.mean(losses[:8]) and made.shape == (32, 32, 32)
assert dice_scores(people[0]["seg"], people[0]["seg"], 4) == [1, 1, 1]
assert choose_cases([*"abcdef"], 2) == choose_cases([*"abcdef"], 4)[:2]
with raises(ConfigError, match="1 to 2 volumes"): choose_cases(["a", "b"])
with raises(DataError, match="no labelled volume"): finetune(shape, [], out_dir="nowhere")
