# %% [markdown]
# # Pretraining on pairs of views
#
# > From a store of pairs to a feature network: augmentation, points, the shared loop, and a measure that does not lie.
#
# Page 44 has network and loss. Here they meet data. A pair is two views of one label map; before each use it is
# mirrored, turned and stretched as a whole, and then each view gets blur, noise, shading, gamma and motion of its own.
# The published training could only do one pair at a time on a GPU, kept 3,000 checkpoints and could not go on where it
# stopped. The shared `fit` of page 08a takes all of that away: any batch, any device, several processes, three
# checkpoints, exact continuation.

# %%
#| default_exp synth.pretrain

# %%
#| export
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from medvol_nb.blocks import count_parameters
from medvol_nb.checkpoints import autocast_for, torch_rng_for
from medvol_nb.config import Config, ConfigPath, check_config, load_config, parse_overrides
from medvol_nb.core import (ConfigError, DataError, MissingFile, OnExists, fingerprint, log, plain, rng_for,
                            write_json)
from medvol_nb.grid import random_starts
from medvol_nb.synth.contrast import (Contrast, ContrastConfig, NetworkConfig, PointSampler, build_network,
                                      contrast_loss, describe_network, load_network, plateau, retrieval,
                                      retrieval_points)
from medvol_nb.synth.stores import PairReader, open_pairs
from medvol_nb.torchcore import Batches, FitConfig, FitResult, FitState, at_start, fit

# %%
from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises, read_csv, tmpdir

# %% [markdown]
# ## What happens to a pair
# The space of a pair is changed once for both views and their labels; grey values are changed for each view. Ranges
# and probabilities are those of the published training, which used TorchIO; the operations here are our own, on tensors
# of any device. First all decisions are drawn, as plain numbers, then they are carried out.

# %%
#| export
Span = tuple[float, float]

class AugmentConfig(Config):
    "How pairs are varied; p_... are probabilities"
    p_flip: float = Field(0.9, ge=0, le=1) # of mirroring at all; then each axis with 1/2
    p_affine: float = Field(0.5, ge=0, le=1) # of turning and stretching
    scale: Span = (0.6, 1.4) # magnification, per axis
    degrees: float = Field(45.0, ge=0) # largest turn about each axis [degree]
    p_blur: float = Field(0.33, ge=0, le=1) # of smoothing
    blur: Span = (0.0, 2.0) # standard deviation per axis [voxel]
    p_noise: float = Field(0.33, ge=0, le=1) # of noise
    noise: Span = (0.0, 0.25) # its standard deviation, where the image is [0, 1]
    p_bias: float = Field(0.5, ge=0, le=1) # of shading
    bias: float = Field(0.5, ge=0) # largest coefficient of its polynomial
    p_gamma: float = Field(0.5, ge=0, le=1) # of bent grey values
    log_gamma: Span = (-0.4, 0.4) # logarithm of the exponent
    p_motion: float = Field(0.33, ge=0, le=1) # of movement during the scan
    motion_degrees: float = Field(10.0, ge=0) # largest turn [degree]
    motion_shift: float = Field(10.0, ge=0) # largest shift [voxel]
    motion_count: int = Field(2, ge=1) # movements
    same_intensity: bool = False # both views get the same change of grey values

NO_AUGMENTATION = AugmentConfig(**{k: 0 for k in AugmentConfig.model_fields if k.startswith("p_")})

def _uniform(rng: np.random.Generator, low: float, high: float, n: int = 3) -> list[float]:
    return rng.uniform(low, high, n).tolist()

def _draw_intensity(rng: np.random.Generator, cfg: AugmentConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if rng.random() < cfg.p_blur: out["blur"] = _uniform(rng, *cfg.blur)
    if rng.random() < cfg.p_noise: out["noise"] = {"std": rng.uniform(*cfg.noise), "seed": int(rng.integers(2**62))}
    if rng.random() < cfg.p_bias: out["bias"] = _uniform(rng, -cfg.bias, cfg.bias, 20)
    if rng.random() < cfg.p_gamma: out["gamma"] = math.exp(rng.uniform(*cfg.log_gamma))
    if rng.random() < cfg.p_motion:
        n, step = cfg.motion_count, 1/(cfg.motion_count + 1)
        times = np.arange(1, n + 1)*step + rng.uniform(-0.3*step, 0.3*step, n)
        out["motion"] = {"times": times.tolist(),
                         "degrees": [_uniform(rng, -cfg.motion_degrees, cfg.motion_degrees) for _ in range(n)],
                         "shift": [_uniform(rng, -cfg.motion_shift, cfg.motion_shift) for _ in range(n)]}
    return out

def draw_augmentation(
    rng: np.random.Generator, # see `rng_for`
    cfg: AugmentConfig, # probabilities and ranges
) -> dict[str, Any]: # plain values: 'order', 'flip', 'affine', 'views'
    "Take all random decisions of a pair"
    order = rng.permutation(2).tolist()
    flip = [bool(f) for f in rng.random(3) < 0.5] if rng.random() < cfg.p_flip else [False]*3
    affine = None
    if rng.random() < cfg.p_affine:
        affine = {"scale": _uniform(rng, *cfg.scale), "degrees": _uniform(rng, -cfg.degrees, cfg.degrees)}
    views = [_draw_intensity(rng, cfg) for _ in range(2)]
    return {"order": order, "flip": flip, "affine": affine, "views": [views[0]]*2 if cfg.same_intensity else views}

# %%
draw_augmentation(rng_for(0, "augment", 3), AugmentConfig())

# %%
drawn = [draw_augmentation(rng_for(0, "augment", k), AugmentConfig()) for k in range(600)]
shares = {"affine": np.mean([d["affine"] is not None for d in drawn]), "flip x": np.mean([d["flip"][0] for d in drawn])}
shares |= {k: np.mean([k in d["views"][0] for d in drawn]) for k in ("blur", "noise", "bias", "gamma", "motion")}
for k, p in {"affine": 0.5, "flip x": 0.45, "blur": 0.33, "noise": 0.33, "bias": 0.5, "gamma": 0.5}.items():
    assert abs(shares[k] - p) < 0.09

# %% [markdown]
# ## Space
# Turning and stretching are one resampling about the middle: linear for the views, nearest for labels, 0 outside.

# %%
#| export
def turns(
    degrees: Sequence[float], # about each axis [degree]
) -> np.ndarray: # (3, 3) rotation
    "Turn about x, then y, then z"
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ y @ x

def warp(
    x: torch.Tensor, # (c, x, y, z) float32
    matrix: np.ndarray, # (3, 3) from output to input, about the middle
    shift: Sequence[float] = (0.0, 0.0, 0.0), # added in the input [voxel]
    *,
    nearest: bool = False, # for labels
) -> torch.Tensor: # (c, x, y, z), 0 where the input ends
    "Resample by an affine map"
    half = [max(n - 1, 1)/2 for n in x.shape[1:]]
    axes = [torch.arange(n, device=x.device, dtype=torch.float32) - (n - 1)/2 for n in x.shape[1:]]
    u = [a.view([-1 if k == i else 1 for i in range(3)]) for k, a in enumerate(axes)]
    m = np.asarray(matrix, np.float64).tolist()
    at = [(m[k][0]*u[0] + m[k][1]*u[1] + m[k][2]*u[2] + shift[k])/half[k] for k in range(3)]
    grid = torch.stack(at[::-1], -1)[None] # (1, x, y, z, 3), last axis of the array first
    return F.grid_sample(x[None], grid, "nearest" if nearest else "bilinear", "zeros", align_corners=True)[0]

def apply_spatial(
    x: torch.Tensor, # (c, x, y, z) float32
    drawn: Mapping[str, Any], # from `draw_augmentation`
    *,
    nearest: bool = False, # for labels
) -> torch.Tensor: # (c, x, y, z)
    "Mirror, turn and stretch"
    if axes := [k + 1 for k, f in enumerate(drawn["flip"]) if f]: x = x.flip(axes)
    if (a := drawn["affine"]) is None: return x
    return warp(x, np.linalg.inv(np.diag(a["scale"]) @ turns(a["degrees"])), nearest=nearest)

# %%
body = phantoms.random_body((48, 40, 32), seed=3)
grey = torch.from_numpy(np.stack([body.img, rng_for(0, "grey").permutation(256).astype(np.float32)[body.lbl]]))
grey = (grey - grey.amin((1, 2, 3), True))/(grey.amax((1, 2, 3), True) - grey.amin((1, 2, 3), True))
labels = torch.from_numpy(body.lbl.astype(np.float32))[None]
moved = {"flip": [True, False, False], "affine": {"scale": [1.2, 0.8, 1.0], "degrees": [0, 0, 30]}}
both = apply_spatial(grey, moved), apply_spatial(labels, moved, nearest=True)
shown = [*(v[..., 16].T for v in grey), *(v[..., 16].T for v in both[0]), both[1][0, ..., 16].T]
plot.montage([np.asarray(v) for v in shown], titles=["view 1", "view 2", "both turned", "", "labels"], cols=5)

# %%
straight = warp(grey, np.eye(3))
close(straight, grey, 1e-4)
square = labels[:, :40]
turned = apply_spatial(square, {"flip": [False]*3, "affine": {"scale": [1]*3, "degrees": [0, 0, 90]}}, nearest=True)
assert torch.equal(turned, square.transpose(1, 2).flip(1))
assert set(np.unique(both[1])) <= set(np.unique(labels))

# %% [markdown]
# ## Grey values
# Blur is a matrix per axis, mirrored at the borders. Shading is the exponential of a polynomial of third order. Motion
# is what happens when the head moves while a scanner fills its frequency space along one axis: each part comes from
# the volume as it lay at that time, and the middle, where most of the energy is, from the volume at rest. Parts differ
# along the last axis only, so a transform along that axis is enough.

# %%
#| export
def blur_matrix(
    n: int, # length of the axis [voxel]
    sigma: float, # standard deviation [voxel]
) -> np.ndarray: # (n, n) float32, rows sum to 1
    "Gaussian filter of an axis, mirrored at both ends, cut at 4 sigma"
    reach = int(4*sigma + 0.5)
    d = np.arange(-reach, reach + 1)
    taps = np.exp(-0.5*(d/max(sigma, 1e-6))**2)
    at = (np.arange(n)[:, None] + d) % (2*n) # mirrored with period 2n: c b a | a b c
    out = np.zeros((n, n))
    np.add.at(out, (np.arange(n)[:, None], np.where(at < n, at, 2*n - 1 - at)), taps/taps.sum())
    return out.astype(np.float32)

def blur(
    x: torch.Tensor, # (x, y, z) float32
    sigma: Sequence[float], # per axis [voxel]
) -> torch.Tensor: # (x, y, z)
    "Smooth"
    for axis, s in enumerate(sigma):
        m = torch.from_numpy(blur_matrix(x.shape[axis], s)).to(x.device)
        x = torch.movedim(torch.movedim(x, axis, -1) @ m.T, -1, axis)
    return x.contiguous()

_ORDERS = [(i, j, k) for i in range(4) for j in range(4 - i) for k in range(4 - i - j)]

def shade(
    x: torch.Tensor, # (x, y, z) float32
    coefficients: Sequence[float], # 20, of the monomials up to third order on [-1, 1]
) -> torch.Tensor: # (x, y, z)
    "Multiply by the exponential of a polynomial"
    c = torch.zeros(4, 4, 4, device=x.device)
    for (i, j, k), v in zip(_ORDERS, coefficients, strict=True): c[i, j, k] = v
    px, py, pz = (torch.linspace(-1, 1, n, device=x.device)[:, None]**torch.arange(4, device=x.device) for n in x.shape)
    return x*(torch.einsum("ijk,xi,yj->xyk", c, px, py) @ pz.T).exp()

def move(
    x: torch.Tensor, # (x, y, z) float32
    times: Sequence[float], # of each movement, as share of the scan (0, 1), rising
    degrees: Sequence[Sequence[float]], # turn after each movement [degree]
    shift: Sequence[Sequence[float]], # likewise [voxel]
) -> torch.Tensor: # (x, y, z)
    "Mix the spectra of the volume in its positions"
    parts = [x, *(warp(x[None], turns(d), s)[0] for d, s in zip(degrees, shift))]
    rest = int(np.argmax(np.asarray(times) > 0.5)) if max(times) > 0.5 else len(times)
    parts[0], parts[rest] = parts[rest], parts[0] # the middle of the spectrum belongs to the volume at rest
    n = x.shape[-1]
    edges = [0, *(int(n*t) for t in times), n]
    spectrum = torch.empty(x.shape, dtype=torch.complex64, device=x.device)
    for part, a, b in zip(parts, edges, edges[1:]):
        spectrum[..., a:b] = torch.fft.fftshift(torch.fft.fft(part), -1)[..., a:b]
    return torch.fft.ifft(torch.fft.ifftshift(spectrum, -1)).real.contiguous()

def apply_intensity(
    x: torch.Tensor, # (x, y, z) float32, about [0, 1]
    drawn: Mapping[str, Any], # one of the 'views' of `draw_augmentation`
) -> torch.Tensor: # (x, y, z)
    "Change grey values"
    if "blur" in drawn: x = blur(x, drawn["blur"])
    if "noise" in drawn:
        rng = torch_rng_for(drawn["noise"]["seed"], "noise", device=x.device)
        x = x + drawn["noise"]["std"]*torch.randn(x.shape, generator=rng, device=x.device)
    if "bias" in drawn: x = shade(x, drawn["bias"])
    if "gamma" in drawn: x = x.sign()*x.abs()**drawn["gamma"]
    if "motion" in drawn: x = move(x, **drawn["motion"])
    return x

# %%
samples = {"blur": {"blur": [2.0, 2.0, 0]}, "noise": {"noise": {"std": 0.1, "seed": 1}},
           "bias": {"bias": _uniform(rng_for(1, "bias"), -0.5, 0.5, 20)}, "gamma": {"gamma": 1.5},
           "motion": {"motion": {"times": [0.3, 0.7], "degrees": [[0, 8, 0], [5, 0, 0]],
                                 "shift": [[0, 0, 4], [3, 0, 0]]}}}
changed = {k: apply_intensity(grey[0], v) for k, v in samples.items()}
plot.montage([np.asarray(v[:, 20].T) for v in changed.values()], titles=list(changed), cols=5)

# %%
flat = torch.ones(6, 5, 4)
close(blur(flat, [1.5, 0.7, 3]), flat, 1e-6)
close(shade(flat, [0.3, *[0]*19]), math.exp(0.3)*flat, 1e-6)
still = move(grey[0], [0.3, 0.6], [[0]*3]*2, [[0]*3]*2)
close(still, grey[0], 1e-5)
assert torch.equal(apply_intensity(grey[0], samples["noise"]), changed["noise"])

# %% [markdown]
# ## Items of a batch
# `pairs` is anything with a length whose items hold `img` (both views) and `seg`: a store (page 43a), pairs rendered on
# the fly (43b), or a list. An item is a function of its number and of the generator it is given, as everywhere in this
# library; that generator also chooses the points, so nothing random is left for the step itself.

# %%
#| export
def scale_view(
    view: np.ndarray, # (x, y, z) any real type
) -> np.ndarray: # (x, y, z) float32: 0 at the minimum, 1 at the 99.99th percentile
    "Grey values of a stored view for training"
    view = np.asarray(view, np.float32)
    low, high = float(view.min()), float(np.percentile(view, 99.99))
    return (view - low)/(high - low) if high > low else np.zeros_like(view)

def check_pair(
    item: Mapping[str, Any], # img and seg
    name: Any, # shown in messages
) -> tuple[np.ndarray, np.ndarray]: # (2, x, y, z) and (x, y, z)
    "Refuse what is not a pair"
    if not isinstance(item, Mapping) or not {"img", "seg"} <= item.keys():
        raise DataError(f"pair {name}: a dict with 'img' and 'seg' is needed")
    img, seg = (np.asarray(item[k]) for k in ("img", "seg"))
    if img.ndim != 4 or len(img) != 2 or img.shape[1:] != seg.shape or seg.dtype.kind not in "iu":
        raise DataError(f"pair {name}: img (2, x, y, z) and integer seg (x, y, z) are needed, got {img.shape} and "
                        f"{seg.dtype} {seg.shape}")
    return img, seg

@dataclass(frozen=True, eq=False)
class TrainingPairs:
    "Pairs with augmentation and points, for `Batches`"
    pairs: Any # len() and [i], or draw(i, rng), giving img (2, x, y, z) and seg (x, y, z)
    sampler: PointSampler # from `Contrast`
    augment: AugmentConfig = NO_AUGMENTATION # how items are varied
    crop: tuple[int, ...] | None = None # (x, y, z) of random crops [voxel]; None: whole volumes

    def __len__(self) -> int: return len(self.pairs)

    @property
    def keys(self) -> list[str]: return [str(k) for k in getattr(self.pairs, "ids", range(len(self.pairs)))]

    def draw(
        self,
        index: int, # of the pair
        rng: np.random.Generator, # see `rng_for`
    ) -> dict[str, Any]: # img (2, x, y, z) float32; points and labels per layer
        "One item"
        item = self.pairs.draw(index, rng) if hasattr(self.pairs, "draw") else self.pairs[index]
        img, seg = check_pair(item, index)
        drawn = draw_augmentation(rng, self.augment)
        views = torch.from_numpy(np.stack([scale_view(img[k]) for k in drawn["order"]])) # (2, x, y, z)
        views = apply_spatial(views, drawn)
        moved = apply_spatial(torch.from_numpy(seg.astype(np.float32))[None], drawn, nearest=True)[0]
        views = torch.stack([apply_intensity(v, d) for v, d in zip(views, drawn["views"])])
        crop = self.crop or seg.shape
        if any(c > n for c, n in zip(crop, seg.shape)):
            raise DataError(f"pair {index}: {seg.shape} is smaller than the crop {crop}. Set crop_size")
        start = random_starts(seg.shape, crop, 1, rng)[0]
        box = tuple(slice(a, a + c) for a, c in zip(start, crop))
        return {"img": views[(slice(None), *box)].contiguous(),
                **self.sampler.draw(moved[box].numpy().astype(np.int64), rng)}

# %%
def toy_pair(k, n=32): # random greys of a random body
    body, rng = phantoms.random_body((n, n, n), seed=k), rng_for(k, "toy")
    means, noise = rng.uniform(25, 255, (2, 256)), rng.normal(0, 10, (2, n, n, n))
    return {"img": np.clip(means[:, body.lbl] + noise, 0, 255).astype(np.uint8), "seg": body.lbl}

toys = [toy_pair(k) for k in range(12)]
tiny = NetworkConfig(width=8, levels=3)
items = TrainingPairs(toys, Contrast(build_network(tiny)).sampler, AugmentConfig(), (16, 16, 16))
item = items.draw(0, rng_for(0, "item"))
{k: tuple(v.shape) for k, v in item["points"].items()}, tuple(item["img"].shape)

# %%
again = items.draw(0, rng_for(0, "item"))
assert torch.equal(item["img"], again["img"]) and np.array_equal(item["labels"]["20"], again["labels"]["20"])
with raises(DataError, match="is smaller than the crop"):
    TrainingPairs(toys, items.sampler, crop=(64,)*3).draw(0, rng_for(0))
with raises(DataError, match="'img' and 'seg' is needed"): check_pair({"img": 0}, 7)

# %% [markdown]
# ## Validation
# Pairs never trained with, whole and unchanged, one at a time, always with the same points. The loss is that of
# training; beside it stands retrieval (page 44) with the output's features, and what grey values alone would find.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Validation:
    "Loss and retrieval on fixed pairs; called by `fit`"
    pairs: Any # len() and [i]
    indices: Sequence[int] # of the pairs that are looked at
    cfg: ContrastConfig # temperature and balance
    seed: int = 0 # names the points
    precision: str = "fp32" # of the forward pass

    def one(
        self,
        model: Contrast, # in evaluation mode
        i: int, # index of the pair
        device: torch.device, # of the model
    ) -> dict[str, float]: # 'loss', 'retrieval', 'retrieval_grey', 'chance'
        "Numbers of one pair"
        img, seg = check_pair(self.pairs[i], i)
        step = 2**model.net.cfg.levels
        box = tuple(slice((n % step)//2, (n % step)//2 + n//step*step) for n in seg.shape)
        seg, last = seg[box], len(model.net.layers) - 1
        views = np.stack([scale_view(v[box]) for v in img])
        rng = rng_for(self.seed, "validation", i)
        drawn = {k: {n: torch.from_numpy(v)[None].to(device) for n, v in part.items()}
                 for k, part in model.sampler.draw(seg, rng).items()}
        with autocast_for(device, self.precision):
            found = model.net.features(torch.from_numpy(views)[:, None].to(device), {*model.addresses, last})
            vectors = model.project(found, drawn["points"])
        numbers = contrast_loss(vectors, drawn["labels"], self.cfg, model.weights)
        where = retrieval_points(seg, rng)
        f = found[last].flatten(2)[..., torch.from_numpy(where).to(device)].float().transpose(1, 2).cpu().numpy()
        g = views.reshape(2, -1, 1)[:, where]
        known = seg.reshape(-1)[where]
        return {"loss": float(numbers["loss"]), "retrieval": retrieval(*f, known),
                "retrieval_grey": retrieval(*g, known), "chance": 1/len(np.unique(known))}

    @torch.no_grad()
    def __call__(
        self,
        model: Contrast, # in evaluation mode
        state: FitState, # says which device
    ) -> dict[str, float]: # 'val_' before the names of `one`
        "Validate"
        rows = [self.one(model, i, state.device) for i in self.indices]
        return {f"val_{k}": float(np.mean([r[k] for r in rows])) for k in rows[0]}

# %% [markdown]
# ## A run
# Everything that decides the result is in one settings model; `fit` is the shared `FitConfig` with the published
# learning rate and length. The published rate falls in five steps to a fifth; the nearest schedule here falls smoothly
# to 0 (`poly`). The run folder holds what every run of this library holds: `config.json`, `log.csv`, `checkpoints/`,
# and `best.safetensors` and `model.safetensors` for use.

# %%
#| export
class PretrainFit(FitConfig):
    "`FitConfig` with the defaults of pretraining"
    epochs: int = Field(5, ge=1) # passes over the data; ignored if `steps` is given
    lr: float = Field(2e-4, gt=0) # peak learning rate
    weight_decay: float = Field(1e-5, ge=0) # decay of weights, not of biases and norms
    schedule: Literal["constant", "cosine", "poly"] = "poly" # of the learning rate after warm-up
    checkpoint_every: int | None = Field(200, ge=1) # steps between checkpoints
    validate_every: int | None = Field(200, ge=1) # steps between validations

class PretrainConfig(Config):
    "Settings of a pretraining"
    network: NetworkConfig = NetworkConfig() # its shape
    contrast: ContrastConfig = ContrastConfig() # what is compared
    augment: AugmentConfig = AugmentConfig() # how pairs are varied
    crop_size: int = Field(0, ge=0) # side of random crops [voxel]; 0: whole volumes
    batch_size: int = Field(1, ge=1) # pairs a step, in each process
    val_pairs: int = Field(51, ge=0) # held-out pairs that a validation looks at
    workers: int = Field(0, ge=0) # loading processes
    start_from: ConfigPath | None = None # weights to start with: run folder, .safetensors or published .pth
    fit: PretrainFit = PretrainFit() # length, learning rate, device, checkpoints

def _crop_of(cfg: PretrainConfig, shape: Sequence[int], model: Contrast) -> tuple[int, ...]:
    crop = (cfg.crop_size,)*3 if cfg.crop_size else tuple(shape)
    try: model.net.check(crop)
    except DataError as e: raise ConfigError(f"crop_size: {e}") from None
    return crop

def _start(cfg: PretrainConfig) -> tuple[Contrast, str]:
    "Model with its first weights, and their digest if they come from a file"
    net, digest = build_network(cfg.network, cfg.fit.seed), ""
    if cfg.start_from is not None:
        found = load_network(cfg.start_from, "cpu")
        if found.net.cfg != cfg.network:
            raise ConfigError(f"start_from: {cfg.start_from} is a network {plain(found.net.cfg)}, not "
                              f"{plain(cfg.network)}. Set network to its shape")
        net.load_state_dict(found.net.state_dict())
        digest = found.digest
    return Contrast(net, cfg.contrast, cfg.fit.seed), digest

def pretrain_network(
    pairs: Any, # to train with: len() and [i], or draw(i, rng), giving img and seg
    held_out: Any, # to validate with, or None
    cfg: PretrainConfig, # settings
    *,
    out_dir: str | os.PathLike, # run folder; created
    data: Any = None, # plain values that identify the pairs; a run goes on only with the same
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many optimiser steps in all
    callbacks: Sequence[Callable[[str, FitState], None]] = (), # told 'start', 'step', 'epoch', 'validate', 'end'
) -> FitResult: # steps, best loss, log, path of the weights
    "Train a feature network on pairs of views"
    model, started = _start(cfg)
    img, _ = check_pair(pairs[0], 0)
    crop = _crop_of(cfg, img.shape[1:], model)
    items = TrainingPairs(pairs, model.sampler, cfg.augment, crop)
    batches = Batches(items, cfg.batch_size, seed=cfg.fit.seed, workers=cfg.workers, start_method="forkserver")
    check = None
    if held_out is not None and cfg.val_pairs and len(held_out):
        check = Validation(held_out, range(min(cfg.val_pairs, len(held_out))), cfg.contrast, cfg.fit.seed,
                           cfg.fit.precision)
    about = describe_network(cfg.network, crop)
    settings = cfg.model_dump(mode="json", exclude={"fit", "workers", "start_from"})
    def loss(wrapped: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return contrast_loss(wrapped(batch["img"], batch["points"]), batch["labels"], cfg.contrast, model.weights)
    keep = at_start(lambda: write_json(Path(out_dir)/"config.json", plain(cfg.model_dump(mode="json")), "overwrite"))
    return fit(model, batches, loss, cfg.fit, out_dir=out_dir, validate=check, callbacks=[keep, *callbacks],
               config={"model": about, "settings": settings, "start": started, "data": plain(data)},
               on_exists=on_exists, stop_at=stop_at, desc="pretraining")

# %% [markdown]
# ## The command
# `medvol synth pretrain` takes a store (page 43a). Held-out pairs are those the store itself keeps apart, or another
# store. A single HDF5 file keeps none apart: without `val` there is then no validation, and the log says so.

# %%
#| export
def _settings(config: str | os.PathLike | None, overrides: Sequence[str], given: Mapping[str, Any]) -> PretrainConfig:
    changes = parse_overrides(overrides) | {k: v for k, v in given.items() if v is not None}
    if config is not None: return load_config(PretrainConfig, config, changes)
    data: dict[str, Any] = {}
    for dotted, value in changes.items():
        *groups, last = dotted.split(".")
        at = data
        for g in groups:
            at = at.setdefault(g, {})
            if not isinstance(at, dict): raise ConfigError(f"override {dotted}: '{g}' is already a value")
        at[last] = value
    return check_config(PretrainConfig, data, "overrides")

def _held_out(store: str | os.PathLike, val: str | os.PathLike | None) -> PairReader | None:
    if val is not None: return open_pairs(val)
    if Path(store).is_dir():
        try: found = open_pairs(store, "val")
        except MissingFile: found = ()
        if len(found): return found
    log.warning("%s keeps no pairs apart: there will be no validation. Name a store with val (--val)", store)
    return None

def _identity(pairs: PairReader) -> str:
    "Digest of the samples' names, and of the content of the first and the last as far as the store knows it"
    return fingerprint([pairs.ids, pairs.facts(0), pairs.facts(-1)])

def pretrain(
    store: str | os.PathLike, # pairs: store folder, HDF5 file, or folder with train_data.hdf5 and val_data.hdf5
    *,
    out: str | os.PathLike = "pretrained", # run folder; created
    val: str | os.PathLike | None = None, # held-out pairs; default: those that the store keeps apart
    config: str | os.PathLike | None = None, # settings, .json or .yaml; default: the published ones
    overrides: Sequence[str] = (), # settings to change, 'fit.lr=1e-3'
    device: str | None = None, # where to train; default: as the settings say
    workers: int | None = None, # loading processes; default: as the settings say
    seed: int | None = None, # of weights, order, augmentation and points; default: as the settings say
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many optimiser steps in all
    dry_run: bool = False, # check everything, train nothing
) -> dict: # run folder, steps, figures
    "Pretrain a feature network on pairs of views, or go on with a run that was interrupted"
    cfg = _settings(config, overrides, {"fit.device": device, "workers": workers, "fit.seed": seed})
    pairs, held_out = open_pairs(store, "train") if Path(store).is_dir() else open_pairs(store), _held_out(store, val)
    if not len(pairs): raise DataError(f"{store}: holds no pairs to train with")
    if dry_run:
        model, img = _start(cfg)[0], check_pair(pairs[0], 0)[0]
        crop = _crop_of(cfg, img.shape[1:], model)
        return {"run": str(out), "pairs": len(pairs), "val_pairs": len(held_out or ()), "crop": list(crop),
                "steps": cfg.fit.steps or cfg.fit.epochs*max(1, len(pairs)//(cfg.batch_size*cfg.fit.accumulate)),
                "parameters": count_parameters(model.net), "plateau": plateau(model.sampler.count(crop), model.weights)}
    done = pretrain_network(pairs, held_out, cfg, out_dir=out, data=_identity(pairs), on_exists=on_exists,
                            stop_at=stop_at)
    last = {k: v for row in done.log for k, v in row.items() if v}
    return {"run": str(out), "steps": done.steps, "finished": done.finished, "best": done.best, "last": last,
            "weights": str(done.weights)}

# %% [markdown]
# A short run: ten bodies, a tiny network, forty steps.

# %%
settings = PretrainConfig(
    network=tiny, contrast=ContrastConfig(layers=(24, 31, 51), points=128, projector_width=32), crop_size=24,
    augment=AugmentConfig(p_motion=0), fit=PretrainFit(steps=40, lr=2e-3, validate_every=20, tensorboard=False))
place = tmpdir()
root = place.__enter__()
done = pretrain_network(toys[:10], toys[10:], settings, out_dir=root/"run")
rows = read_csv(root/"run"/"log.csv")
level = plateau(Contrast(build_network(tiny), settings.contrast).sampler.count((24, 24, 24)))
plot.curves({"loss": [float(r["loss"]) for r in rows], "plateau": [level]*len(rows)}, xlabel="step", height=2)

# %%
[{k: round(float(v), 3) for k, v in r.items() if k.startswith("val_")} for r in rows if r["val_loss"]]

# %%
first, last = (np.mean([float(r["loss"]) for r in part]) for part in (rows[:8], rows[-8:]))
assert last < first and done.finished and done.steps == 40
assert load_network(root/"run", "cpu").net.cfg == tiny

# %% [markdown]
# Stopped and continued, it ends with the same bytes; other data or settings are refused.

# %%
short = settings.model_copy(update={"fit": PretrainFit(steps=4, lr=2e-3, tensorboard=False, validate_every=2)})
for name, stops in (("a", [None]), ("b", [1, 3, None])):
    for stop in stops: pretrain_network(toys[:3], toys[10:], short, out_dir=root/name, stop_at=stop)
assert all((root/"a"/f).read_bytes() == (root/"b"/f).read_bytes() for f in ("model.safetensors", "log.csv"))
with raises(DataError, match="other settings"):
    pretrain_network(toys[:3], None, short, out_dir=root/"a", data="other pairs")
with raises(ConfigError, match="crop_size: network: sides must be multiples of 8"):
    pretrain_network(toys, None, short.model_copy(update={"crop_size": 20}), out_dir=root/"c")
place.__exit__(None, None, None)
