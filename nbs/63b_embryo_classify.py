# %% [markdown]
# # Which phase is it?
#
# > A network that names the developmental phase of an embryo, with weights that know what they are.
#
# The classifier has two jobs: it is the judge of synthetic pictures ([quality](63a_embryo_quality.ipynb) takes its
# features), and whether it gets better with them is the proof that they help ([study](63d_embryo_study.ipynb)). So it
# must be boring and right. The reference replaced the last layer after the weights were loaded, so that its
# predictions came from a random head; forgot its best score every epoch, so that "best" was "last"; and averaged
# accuracy over batches. Here the loop is the shared [`fit`](08a_torchcore.ipynb), and a weight file says what network
# it is of.

# %%
#| default_exp embryo.classify

# %%
#| export
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from medvol_nb.checkpoints import Converter, Precision, load_checkpoint, load_foreign, load_weights, seeded
from medvol_nb.config import Config, ConfigPath
from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, fingerprint, log, plain,
                            rng_for)
from medvol_nb.embryo.dataset import merged_phases
from medvol_nb.embryo.features import Extractor, Features, LabelledImages, extract_features
from medvol_nb.embryo.phases import DATA_LICENCE, PHASES
from medvol_nb.torchcore import Batches, FitConfig, FitResult, FitState, fit

# %%
import tempfile

from medvol_nb import plot
from medvol_nb.core import close, raises
from medvol_nb.embryo.features import phantom_images

# %% [markdown]
# ## Networks
# DenseNet-121 and ResNet-50 are those of MONAI, in two dimensions with one grey channel; `small` has four convolutions
# and 60 000 parameters, for processors and tests. Each is a body that ends in a vector, and a head. `ordinal` gives a
# head that knows that phases have an order: one score $s$ and rising thresholds $\theta_k$ with
# $P(\text{phase} > k)=\sigma(s-\theta_k)$, the proportional odds model (McCullagh, 1980). Its far mistakes are fewer,
# its near ones more. Either head gives log-probabilities, so nothing else needs to know which one it is.

# %%
#| export
Architecture = Literal["small", "densenet121", "resnet50"]

class OrdinalHead(nn.Module):
    "Log-probabilities of ordered classes from one score and rising thresholds"
    def __init__(
        self,
        width: int, # features
        classes: int, # ordered
    ):
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        self.first = nn.Parameter(torch.tensor(-float(classes)/4))
        self.gaps = nn.Parameter(torch.zeros(classes - 2)) # softplus keeps thresholds apart

    def forward(
        self,
        x: torch.Tensor, # (b, width)
    ) -> torch.Tensor: # (b, classes)
        "Logarithms of the differences of neighbouring sigmoids, without cancellation"
        rise = F.softplus(self.gaps).cumsum(0)
        theta = torch.cat([self.first[None], self.first + rise])
        z = self.score(x) - theta # (b, classes - 1), falling
        inner = F.logsigmoid(z[:, :-1]) + F.logsigmoid(-z[:, 1:]) + torch.log(-torch.expm1(z[:, 1:] - z[:, :-1]))
        return torch.cat([F.logsigmoid(-z[:, :1]), inner, F.logsigmoid(z[:, -1:])], 1)

def _small() -> nn.Sequential:
    parts: list[nn.Module] = []
    for k, (a, b) in enumerate(((1, 16), (16, 32), (32, 64), (64, 64))):
        parts += [nn.Conv2d(a, b, 3, 2 if k == 0 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        if k in (0, 1, 2): parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())

def _body(architecture: str) -> tuple[nn.Module, int]:
    "Network from pictures (b, 1, h, w) to vectors, and their length"
    if architecture == "small": return _small(), 64
    from monai.networks.nets import DenseNet121, resnet50
    if architecture == "densenet121":
        net = DenseNet121(spatial_dims=2, in_channels=1, out_channels=1)
        width, net.class_layers.out = net.class_layers.out.in_features, nn.Identity()
    elif architecture == "resnet50":
        net = resnet50(spatial_dims=2, n_input_channels=1, num_classes=1)
        width, net.fc = net.fc.in_features, nn.Identity()
    else: raise ConfigError(f"architecture: must be small, densenet121 or resnet50, got {architecture!r}")
    return net, width

class PhaseNet(nn.Module):
    "Body and head of a phase classifier"
    def __init__(
        self,
        architecture: Architecture = "small", # of the body
        classes: int = len(PHASES), # outputs
        ordinal: bool = False, # a head that knows the order of phases
        frozen: bool = False, # train the head alone
        seed: int = 0, # names the initial weights
    ):
        super().__init__()
        with seeded(seed, "PhaseNet", architecture):
            self.body, width = _body(architecture)
            self.head = OrdinalHead(width, classes) if ordinal else nn.Linear(width, classes)
        self.frozen = frozen
        self.body.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "PhaseNet":
        super().train(mode)
        if self.frozen: self.body.eval() # or its running statistics would follow the new data
        return self

    def forward(
        self,
        x: torch.Tensor, # (b, 1, h, w)
    ) -> torch.Tensor: # (b, classes) log-probabilities
        "Name the phase"
        return F.log_softmax(self.head(self.body(x)), 1)

# %%
def parameters(net): return sum(p.numel() for p in net.parameters())

{name: (parameters(PhaseNet(name)), tuple(PhaseNet(name).eval()(torch.zeros(2, 1, 64, 64)).shape))
 for name in ("small", "densenet121")}

# %% [markdown]
# The ordinal head gives probabilities that sum to one, also for scores that overflow an exponential, and its most
# probable class rises with the score.

# %%
head = OrdinalHead(1, 16)
with torch.no_grad():
    head.score.weight.fill_(1)
    ladder = head(torch.tensor([[-300.0], [-3.0], [-1.0], [1.0], [3.0], [300.0]]))
assert close(ladder.exp().sum(1).numpy(), np.ones(6), 1e-5) and torch.isfinite(ladder[:, [0, 15]]).any(1).all()
assert ladder.argmax(1).tolist() == sorted(ladder.argmax(1).tolist()) and ladder[5].argmax() == 15
with raises(ConfigError, match="must be small"): PhaseNet("vgg")

# %% [markdown]
# ## Settings
# Rare phases get a weight in the loss (inverse frequency, mean 1 over the phases that occur), or are drawn more often,
# never both. `focal` lowers the loss of easy pictures, each by its own probability (Lin et al., ICCV 2017; the
# reference used the mean of the batch, which is another thing). `merge` renames phases, such as the very rare tHB into
# tEB. The learning rate rises over a tenth of the steps and falls along a cosine.

# %%
#| export
class ClassifierConfig(Config):
    "How to train a phase classifier"
    architecture: Architecture = "densenet121" # network
    size: int = Field(256, ge=16, le=2048) # width and height of the input [pixel]
    ordinal: bool = False # a head that knows the order of phases
    loss: Literal["ce", "focal"] = "ce" # cross-entropy, or focal loss with exponent 2
    balance: Literal["weights", "sampler", "none"] = "weights" # what is done for rare phases
    flips: bool = True # mirror training pictures at random
    rotations: bool = True # and turn them by multiples of 90 degrees
    free_angle: float = Field(0.0, ge=0, le=180) # and by any angle up to this one [degree]
    merge: dict[str, str] = Field(default_factory=dict) # phases that are trained as another one: {'tHB': 'tEB'}
    weights: ConfigPath | None = None # start from these: a run, .safetensors, .pth; None: at random
    freeze: bool = False # train the head alone
    epochs: int = Field(20, ge=1) # passes over the data; ignored if `steps` is given
    steps: int | None = Field(None, ge=1) # optimiser steps in all
    batch_size: int = Field(16, ge=2) # pictures a step
    lr: float = Field(3e-4, gt=0) # peak learning rate
    weight_decay: float = Field(1e-2, ge=0) # of AdamW
    patience: int | None = Field(None, ge=1) # stop after so many validations without a better score
    validate_every: int | None = Field(None, ge=1) # steps between validations; default: every epoch
    precision: Precision = "fp32" # of the forward pass
    device: str = "auto" # where to train
    workers: int = Field(0, ge=0) # loading processes
    seed: int = Field(0, ge=0) # names every random stream

def class_weights(
    phases: np.ndarray, # (n) int, place in `PHASES`
) -> np.ndarray: # (16) float32, mean 1 over phases that occur, 0 for others
    "Inverse frequencies"
    counts = np.bincount(phases, minlength=len(PHASES))[:len(PHASES)]
    out = np.divide(counts.sum(), counts, out=np.zeros(len(PHASES)), where=counts > 0)
    return (out/out[counts > 0].mean()).astype(np.float32)

def phase_loss(
    log_probs: torch.Tensor, # (b, classes)
    truth: torch.Tensor, # (b) int64
    weights: torch.Tensor | None = None, # (classes) of each phase
    focal: float = 0.0, # exponent; 0: cross-entropy
) -> torch.Tensor: # () weighted mean over samples
    "Cross-entropy or focal loss"
    own = log_probs.gather(1, truth[:, None])[:, 0]
    loss = -own*(1 - own.exp()).clamp(min=0)**focal if focal else -own
    if weights is None: return loss.mean()
    w = weights.to(own)[truth]
    return (w*loss).sum()/w.sum().clamp(min=1e-6)

# %%
log_p = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).log_softmax(1)
truth, w = torch.arange(8) % 3, torch.from_numpy(class_weights(np.array([0, 0, 0, 1, 2, 2])))
{"weights": w[:4].tolist(), "ce": float(phase_loss(log_p, truth, w)), "focal": float(phase_loss(log_p, truth, w, 2.0))}

# %%
assert close(float(phase_loss(log_p, truth, w)), float(F.nll_loss(log_p, truth, w)), 1e-6)
assert close(float(w[:3].mean()), 1, 1e-6) and (w[3:] == 0).all()

# %% [markdown]
# ## Training
# Flips and quarter turns leave a phase what it is. What is drawn depends on seed, epoch and picture alone. Validation
# looks at all its pictures, and its score is the *balanced* accuracy over all of them; the best weights of the whole
# run are kept.

# %%
#| export
def turned(
    img: np.ndarray, # (row, column) uint8
    rng: np.random.Generator, # of this draw
    cfg: ClassifierConfig, # which changes are wanted
) -> np.ndarray: # (row, column) uint8
    "A picture that shows the same phase"
    flip, quarter, angle = rng.integers(2), rng.integers(4), rng.uniform(-1, 1)*cfg.free_angle
    if cfg.flips and flip: img = img[:, ::-1]
    if cfg.rotations: img = np.rot90(img, quarter)
    if not cfg.free_angle: return img
    from PIL import Image
    grey = int(np.median(img[[0, -1]])) # what is beyond the border
    return np.asarray(Image.fromarray(np.ascontiguousarray(img)).rotate(angle, Image.Resampling.BILINEAR,
                                                                        fillcolor=grey))

class TrainingPictures:
    "Decoded pictures for `Batches`, kept in memory as far as there is room"
    def __init__(
        self,
        images: LabelledImages, # labelled
        cfg: ClassifierConfig, # size and changes
        keep_bytes: int = 2**29, # memory for decoded pictures
    ):
        self.images, self.cfg, self.keys = images, cfg, list(images.ids)
        self.kept: dict[int, np.ndarray] = {}
        self.room = keep_bytes//cfg.size**2
    def __len__(self) -> int: return len(self.images)
    def load(
        self,
        i: int, # which picture
    ) -> np.ndarray: # (size, size) uint8
        "Decode a picture, or remember it"
        found = self.kept.get(i)
        if found is None:
            found = self.images.load(i, self.cfg.size)
            if len(self.kept) < self.room: self.kept[i] = found
        return found
    def draw(
        self,
        i: int, # which picture
        rng: np.random.Generator, # of this draw
    ) -> dict[str, np.ndarray]: # 'image' (1, size, size) float32 in [0, 1], 'phase' () int64
        "A changed picture and its phase"
        img = turned(self.load(i), rng, self.cfg)
        return {"image": (img/np.float32(255))[None], "phase": np.int64(self.images.phases[i])}

def merge_phases(
    images: LabelledImages, # labelled
    merge: Mapping[str, str], # phase -> what it is called instead
) -> LabelledImages: # without unlabelled pictures
    "Rename phases and leave out pictures without one"
    return LabelledImages(images.sources, merged_phases(merge)[images.phases], images.videos, images.ids,
                          images.synthetic).at(images.phases >= 0)

# %%
#| export
def _intensities(data: TrainingPictures, seed: int) -> tuple[float, float]:
    "Mean and spread of training pictures, in [0, 1]"
    pick = np.sort(rng_for(seed, "intensities").permutation(len(data))[:256])
    values = np.stack([data.load(int(i)).mean() for i in pick]), np.stack([data.load(int(i)).std() for i in pick])
    return float(values[0].mean()/255), float(max(np.sqrt((values[1]**2).mean() + values[0].var()), 1)/255)

def describe_classifier(
    cfg: ClassifierConfig, # settings
    mean: float, # of intensities, [0, 1]
    std: float, # of intensities, [0, 1]
) -> dict[str, Any]: # plain values
    "What a weight file must carry to be used"
    return {"format": "medvol_nb.embryo.classify 1", "architecture": cfg.architecture, "size": cfg.size,
            "ordinal": cfg.ordinal, "phases": list(PHASES), "mean": mean, "std": std, "data_licence": DATA_LICENCE}

def balanced_accuracy(
    truth: np.ndarray, # (n) int
    predicted: np.ndarray, # (n) int
) -> float: # [0, 1]
    "Mean over the phases that occur of the share that was recognised"
    return float(np.mean([(predicted[truth == c] == c).mean() for c in np.unique(truth)]))

# What does not change the weights a run arrives at, or is compared in another form: `start`, and steps by `fit`
_FREE = {"device", "workers", "weights", "epochs", "steps"}

def train_classifier(
    train: LabelledImages, # real, synthetic or both
    val: LabelledImages, # real; decides which weights are best
    cfg: ClassifierConfig = ClassifierConfig(), # settings
    *,
    out_dir: str | os.PathLike, # folder of the run; a run that is there goes on
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many steps in all
) -> FitResult: # steps, best balanced accuracy, log, weights
    "Train a phase classifier"
    train, val = (merge_phases(s, cfg.merge) for s in (train, val))
    if not len(train) or not len(val):
        raise DataError(f"classifier: {len(train)} labelled pictures for training, {len(val)} for validation; both are "
                        "needed")
    if val.synthetic.any(): raise DataError("classifier: validation pictures must be real, some are synthetic")
    if shared := sorted({*train.videos} & {*val.videos} - {""}):
        raise DataError(f"classifier: {len(shared)} videos are in training and validation, such as {shared[0]}. Split "
                        "by video, or better by couple")
    data, checks = TrainingPictures(train, cfg), TrainingPictures(val, cfg)
    mean, std = _intensities(data, cfg.seed)
    net = PhaseNet(cfg.architecture, ordinal=cfg.ordinal, frozen=cfg.freeze, seed=cfg.seed)
    started = "" if cfg.weights is None else _start_from(net, cfg)
    odds = class_weights(train.phases)
    weights = torch.from_numpy(odds) if cfg.balance == "weights" else None
    batches = Batches(data, min(cfg.batch_size, len(train)), seed=cfg.seed, workers=cfg.workers,
                      weights=odds[train.phases] if cfg.balance == "sampler" else None, start_method="forkserver")
    def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return phase_loss(model((batch["image"] - mean)/std).float(), batch["phase"], weights,
                          2.0*(cfg.loss == "focal"))
    def validate(model: nn.Module, state: FitState) -> dict[str, float]:
        parts = []
        for k in range(0, len(val), 64):
            x = np.stack([checks.load(i) for i in range(k, min(k + 64, len(val)))])
            x = torch.from_numpy(x).to(state.device)[:, None].float()/255
            parts.append(model((x - mean)/std).float().cpu())
        log_probs, truth = torch.cat(parts), torch.from_numpy(val.phases.astype(np.int64))
        got = log_probs.argmax(1).numpy()
        return {"val_loss": float(phase_loss(log_probs, truth)), "val_accuracy": float((got == val.phases).mean()),
                "val_balanced_accuracy": balanced_accuracy(val.phases, got)}
    total = cfg.steps or cfg.epochs*batches.steps()
    settings = FitConfig(
        steps=total, lr=cfg.lr, weight_decay=cfg.weight_decay, warmup_steps=total//10, precision=cfg.precision,
        device=cfg.device, clip_norm=5.0, seed=cfg.seed, checkpoint_every=max(1, min(batches.steps(), total)), keep=1,
        validate_every=min(cfg.validate_every or batches.steps(), total), monitor="val_balanced_accuracy", mode="max",
        patience=cfg.patience, tensorboard=False)
    about = {"model": describe_classifier(cfg, mean, std), "start": started,
             "settings": plain(cfg.model_dump(mode="json", exclude=_FREE)),
             "train": [len(train), fingerprint([train.identity, train.phases])],
             "val": [len(val), fingerprint([val.identity, val.phases])]}
    return fit(net, batches, loss, settings, out_dir=out_dir, validate=validate, config=about, on_exists=on_exists,
               stop_at=stop_at, desc=cfg.architecture)

# %% [markdown]
# ## Weights that know what they are
# A run's weights carry network, input size and normalisation. Weights of the reference (MONAI's or torchvision's names,
# with the prefix of data parallelism) are read, too; then the architecture must be told. A head is never replaced
# after loading: what was trained is what predicts.

# %%
#| export
def _own_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    "Names of MONAI or torchvision networks to body and head"
    out = {}
    for k, v in weights.items():
        for head in ("class_layers.out.", "classifier.", "fc."):
            if k.startswith(head): out["head." + k.removeprefix(head)] = v; break
        else: out["body." + k] = v
    return out

_CONVERTERS = (Converter("own", lambda w: any(k.startswith("head.") for k in w), dict),
               Converter("MONAI", lambda w: any(k.startswith(("features.", "layer1.")) for k in w), _own_names))

def _weights_in(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    "Tensors, and what the file says about them"
    if path.is_dir():
        found = [p for p in (path/"best.safetensors", path/"model.safetensors") if p.exists()]
        if not found: raise MissingFile(f"{path}: holds no best.safetensors or model.safetensors, is it a run folder?")
        path = found[0]
    if path.suffix != ".safetensors": return load_foreign(path, _CONVERTERS), None
    saved = load_checkpoint(path)
    about = (saved.get("config") or {}).get("model")
    if not about or not str(about.get("format")).startswith("medvol_nb.embryo.classify"):
        raise FormatError(f"{path}: these are not weights of a phase classifier")
    return saved["model"], about

def _start_from(net: PhaseNet, cfg: ClassifierConfig) -> str:
    weights, _ = _weights_in(Path(cfg.weights))
    report = load_weights(net, weights, strict=False)
    if not report.loaded:
        raise DataError(f"{cfg.weights}: none of its {len(weights)} tensors fits a {cfg.architecture}")
    for what in ("missing", "unexpected", "changed"):
        if names := getattr(report, what): log.warning("%s: %d tensors %s", cfg.weights, len(names), what)
    return fingerprint([[k, weights[k]] for k in report.loaded])

@dataclass(frozen=True, eq=False)
class Classifier:
    "A trained network with what is needed to use it"
    net: PhaseNet # in evaluation mode
    about: Mapping[str, Any] # `describe_classifier`
    name: str # for tables
    @cached_property
    def extractor(self) -> Extractor: # features before the head, and the head
        "The network as a judge of pictures"
        a = self.about
        return Extractor(self.net.body, a["size"], self.net.head, a["mean"], a["std"])

def load_classifier(
    path: str | os.PathLike, # run folder, .safetensors of a run, or .pth of the reference
    architecture: Architecture | None = None, # for weights that do not say it
    size: int = 256, # input size of weights that do not say it [pixel]
    name: str | None = None, # for tables; default: name of the folder or file
) -> Classifier: # ready to predict
    "Build the classifier that a weight file is of"
    path = Path(path)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    weights, about = _weights_in(path)
    if about is None:
        if architecture is None:
            raise ConfigError(f"{path}: does not say what network it is of. Pass the architecture of its training")
        about = describe_classifier(ClassifierConfig(architecture=architecture, size=size), 0.0, 1.0)
    elif architecture not in (None, about["architecture"]):
        raise ConfigError(f"{path}: is of a {about['architecture']}, not of a {architecture}")
    net = PhaseNet(about["architecture"], ordinal=about["ordinal"])
    load_weights(net, weights)
    if path.is_dir(): own = path.name # all of it: 'run-0.5' is not 'run-0'
    else: own = path.parent.name if path.name in ("best.safetensors", "model.safetensors") else path.stem
    return Classifier(net.eval(), about, name or own)

def predict_phases(
    classifier: Classifier, # trained
    images: LabelledImages, # pictures
    **options: Any, # of `extract_features`: batch_size, workers, device, dask, cache
) -> Features: # with `probs` (n, 16)
    "Probabilities of phases, and the features they come from"
    return extract_features(classifier.extractor, images, **options)

# %%
place = tempfile.TemporaryDirectory()
folder, some = Path(place.name), (0, 3, 5, 11, 13)
train, val, test = (phantom_images(some, range(a, b), 48) for a, b in ((0, 24), (100, 110), (200, 212)))
settings = ClassifierConfig(architecture="small", size=48, epochs=8, lr=4e-3, device="cpu")
done = train_classifier(train, val, settings, out_dir=folder/"small")
scores = [(int(r["step"]), float(r["val_balanced_accuracy"])) for r in done.log if r.get("val_balanced_accuracy")]
plot.curves({"validation": tuple(zip(*scores))}, xlabel="step", ylabel="balanced accuracy", height=2)

# %% [markdown]
# Interrupted and continued, the weights are the same to the last bit; loaded again, so are the probabilities; and the
# best score is that of the whole run.

# %%
train_classifier(train, val, settings, out_dir=folder/"again", stop_at=17)
train_classifier(train, val, settings, out_dir=folder/"again")
judge, twin = load_classifier(folder/"small"), load_classifier(folder/"again"/"best.safetensors")
found = predict_phases(judge, test)
assert np.array_equal(found.probs, predict_phases(twin, test).probs) and judge.extractor.digest == twin.extractor.digest
assert done.best == max(s for _, s in scores) > 0.6 and close(found.probs.sum(1), np.ones(len(test)), 1e-5)
round(balanced_accuracy(test.phases, found.probs.argmax(1)), 2)

# %%
with raises(DataError, match="24 videos are in training and validation"):
    train_classifier(train, train, settings, out_dir=folder/"leak")
with raises(ConfigError, match="is of a small, not of a resnet50"): load_classifier(folder/"small", "resnet50")
with raises(ConfigError, match="got 'tXY'"): merge_phases(train, {"tHB": "tXY"})
place.cleanup()
