# %% [markdown]
# # Learning from pairs of views
#
# > A network whose every layer has an address, and a loss that pulls together what has the same label.
#
# Two renderings of one label map differ in everything except anatomy: contrast, texture, noise. A network that gives
# a voxel the same vector in both, and other structures other vectors, has learned to see structure in any contrast.
# That is the recipe of anatomix (MIT licence; [arXiv 2411.02372](https://arxiv.org/abs/2411.02372)), with the
# supervised contrastive loss of Khosla et al. (NeurIPS 2020), at several layers of a U-Net at once.
#
# This page has the parts: the network, into which the published weights load, the loss, the way both treat more than
# one pair at a time, and a measure of success that does not come from the loss. Page 44a trains, page 44b uses the
# features.

# %%
#| default_exp synth.contrast

# %%
#| export
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from medvol_nb.blocks import init_weights
from medvol_nb.checkpoints import (Converter, device_for, load_checkpoint, load_foreign, load_weights, seeded,
                                   torch_rng_for)
from medvol_nb.config import Config, check_config
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, fingerprint, plain

# %%
from medvol_nb import phantoms, plot
from medvol_nb.blocks import count_parameters
from medvol_nb.checkpoints import save_checkpoint
from medvol_nb.core import close, raises, rng_for, tmpdir

# %% [markdown]
# ## The network
# A U-Net as one flat list of layers; the index in the list is the address of a feature. A stem, then per level two
# convolutions and a pooling, two at the bottom, and the way back with nearest-neighbour up-sampling and the encoder's
# features beside it. Borders are mirrored, nothing is padded with zeros. `anatomix` is the published network of 5.9
# million parameters, `anatomix-dev` its larger successor.

# %%
#| export
class NetworkConfig(Config):
    "Shape of the feature network"
    in_channels: int = Field(1, ge=1) # of the image
    out_channels: int = Field(16, ge=1) # features of a voxel
    width: int = Field(16, ge=1) # channels of the first level; they double from the second one on
    levels: int = Field(4, ge=1, le=8) # poolings; sides are multiples of 2**levels
    norm: Literal["batch", "instance", "none"] = "batch" # after each convolution
    eps: float = Field(1e-5, gt=0) # added to the variance
    pool: Literal["max", "average"] = "max" # down-sampling
    up: Literal["nearest", "trilinear"] = "nearest" # up-sampling

NETWORKS = {
    "anatomix": NetworkConfig(),
    "anatomix-dev": NetworkConfig(out_channels=32, width=32, levels=5, norm="instance", eps=1e-2, pool="average",
                                  up="trilinear"),
}

# %% [markdown]
# ## One pair is one batch
# With batch normalisation a network sees the batch it is in. Published training had one pair, two volumes, in a batch,
# and the statistics were those of that pair. Here a batch of several pairs keeps to this: each pair is normalised by
# itself ("ghost" statistics, Hoffer et al., NeurIPS 2017). So a batch of $b$ pairs has the mean of the $b$ losses and
# gradients, and it does not matter whether the pairs are in one process or in several. The running averages, used for
# prediction, move towards the mean over all pairs of all processes.

# %%
#| export
class PairedNorm(_BatchNorm):
    "Batch normalisation with statistics of each of `groups` equal runs of the first axis"
    groups: int = 1 # set by `Contrast` before a batch

    def _check_input_dim(self, input: torch.Tensor) -> None: pass # (b, c, ...) with any number of axes

    def forward(self, input: torch.Tensor) -> torch.Tensor: # (groups*n, c, ...) -> same
        dist = torch.distributed
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.training or self.groups*world == 1: return super().forward(input)
        g, c = self.groups, input.shape[1]
        side = input.unflatten(0, (g, -1)).transpose(0, 1).flatten(1, 2) # (n, g*c, ...)
        mean, var = self.running_mean.new_zeros(g*c), self.running_var.new_zeros(g*c)
        scale = (None, None) if self.weight is None else (self.weight.repeat(g), self.bias.repeat(g))
        out = F.batch_norm(side, mean, var, *scale, training=True, momentum=1.0, eps=self.eps)
        with torch.no_grad():
            now = torch.stack([mean.view(g, c).mean(0), var.view(g, c).mean(0)])
            if world > 1: dist.all_reduce(now)
            self.running_mean.lerp_(now[0]/world, self.momentum)
            self.running_var.lerp_(now[1]/world, self.momentum)
            self.num_batches_tracked.add_(1)
        return out.unflatten(1, (g, c)).transpose(0, 1).flatten(0, 1)

# %%
paired, alone = PairedNorm(3), [nn.BatchNorm3d(3) for _ in range(2)]
paired.groups = 2
volumes = torch.from_numpy(rng_for(0, "norm").normal(2, 3, (4, 3, 5, 4, 6))).float()
with torch.no_grad(): apart = torch.cat([norm(part) for norm, part in zip(alone, volumes.split(2))])
(paired(volumes) - apart).abs().max().item()

# %%
with torch.no_grad(): close(paired(volumes), apart, 1e-5)
paired.running_mean.zero_()
paired(volumes)
close(paired.running_mean, (alone[0].running_mean + alone[1].running_mean)/2, 1e-6)

# %%
#| export
class FlatUNet(nn.Module):
    "U-Net as one list of layers; the index of a layer is the address of its output"
    def __init__(
        self,
        cfg: NetworkConfig = NETWORKS["anatomix"], # shape
    ):
        super().__init__()
        self.cfg, self.joins = cfg, {} # `joins`: address of an up-sampling -> address of the features put before it
        layers: list[nn.Module] = []
        def block(c_in: int, c_out: int) -> int:
            layers.append(nn.Conv3d(c_in, c_out, 3, padding=1, padding_mode="reflect", bias=cfg.norm == "instance"))
            if cfg.norm == "batch": layers.append(PairedNorm(c_out, eps=cfg.eps))
            if cfg.norm == "instance": layers.append(nn.InstanceNorm3d(c_out, eps=cfg.eps))
            layers.append(nn.ReLU(inplace=cfg.norm != "none")) # a normalisation's output is nobody's feature
            return c_out
        c, ends = block(cfg.in_channels, cfg.width), []
        for k in range(cfg.levels):
            c = block(block(c, cfg.width*2**k), cfg.width*2**k)
            ends.append((len(layers) - 1, c))
            layers.append((nn.MaxPool3d if cfg.pool == "max" else nn.AvgPool3d)(2))
        c = block(block(c, 2*c), 2*c)
        for end, skip in reversed(ends):
            self.joins[len(layers)] = end
            layers.append(nn.Upsample(scale_factor=2, mode=cfg.up))
            c = block(block(c + skip, skip), skip)
        layers.append(nn.Conv3d(c, cfg.out_channels, 3, padding=1, padding_mode="reflect", bias=cfg.norm == "instance"))
        self.layers = nn.ModuleList(layers)
        self.stride, before = [], 1 # voxels of the image per voxel of each layer's output
        for layer in layers:
            before = before*2 if isinstance(layer, (nn.MaxPool3d, nn.AvgPool3d)) else before
            before = before//2 if isinstance(layer, nn.Upsample) else before
            self.stride.append(before)
        self.channels = [0]*len(layers) # of each layer's output
        for k, layer in enumerate(layers):
            kept = self.channels[k - 1] + (self.channels[self.joins[k]] if k in self.joins else 0)
            self.channels[k] = layer.out_channels if isinstance(layer, nn.Conv3d) else kept

    def check(
        self,
        shape: Sequence[int], # (x, y, z) [voxel]
    ) -> None:
        "Refuse sizes that the poolings do not divide, or that leave nothing to mirror at the bottom"
        step = 2**self.cfg.levels
        if len(shape) != 3 or any(n % step or n < 2*step for n in shape):
            raise DataError(f"network: sides must be multiples of {step} from {2*step} up, got {tuple(shape)}. Crop or "
                            "pad the volume, or use fewer levels")

    def features(
        self,
        x: torch.Tensor, # (b, c, x, y, z)
        addresses: Iterable[int], # of the layers whose outputs are wanted; negative counts from the end
    ) -> dict[int, torch.Tensor]: # address as given -> (b, c, x, y, z) output of that layer
        "Outputs of chosen layers; layers after the last of them are not computed"
        self.check(x.shape[2:])
        wanted = {a: range(len(self.layers))[a] for a in addresses}
        kept, skips, found = set(self.joins.values()), {}, {}
        for k, layer in enumerate(self.layers[:max(wanted.values()) + 1]):
            x = layer(x)
            if k in kept: skips[k] = x
            if k in self.joins: x = torch.cat((skips.pop(self.joins[k]), x), 1)
            if k in wanted.values(): found[k] = x
        return {a: found[k] for a, k in wanted.items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor: return self.features(x, (-1,))[-1] # (b, c, x, y, z) output

def build_network(
    cfg: NetworkConfig = NETWORKS["anatomix"], # shape
    seed: int = 0, # names the first weights
) -> FlatUNet: # in training mode
    "A fresh network with Kaiming-normal weights"
    with seeded(seed, "network"): net = FlatUNet(cfg)
    return init_weights(net, "relu", generator=torch_rng_for(seed, "network"))

# %%
public = FlatUNet()
tiny = NetworkConfig(width=8, levels=3)
sizes = {name: count_parameters(FlatUNet(cfg)) for name, cfg in [*NETWORKS.items(), ("tiny", tiny)]}
sizes, len(public.layers)

# %%
at = (27, 31, 38, 45, 52, 65)
assert sizes["anatomix"] == 5_899_344 and len(public.layers) == 66
assert [public.channels[k] for k in at] == [128, 256, 128, 64, 32, 16]
assert [128//public.stride[k] for k in at] == [16, 8, 16, 32, 64, 128]
assert all(isinstance(public.layers[k], nn.Conv3d) for k in at)

# %%
small = build_network(tiny).eval()
picture = torch.from_numpy(phantoms.head((32, 32, 32)).img.astype(np.float32)/255)[None, None]
with torch.no_grad(): seen = small.features(picture, (24, 31, -1))
{k: tuple(v.shape) for k, v in seen.items()}

# %%
with torch.no_grad(): assert torch.equal(seen[-1], small(picture)) and seen[24].shape[1] == small.channels[24]
with raises(DataError, match="multiples of 8 from 16 up"): small(picture[..., :30])

# %% [markdown]
# ## Loss: who belongs together
# From the grid of a layer a few hundred voxels are taken, the same in both views. Each of the $n$ vectors $z_i$ (length
# one) is an anchor; its positives $P(i)$ are all other vectors of the same label, in either view:
# $$L=\frac1n\sum_i\frac{-1}{|P(i)|}\sum_{p\in P(i)}\log\frac{\exp(z_i z_p/T)}{\sum_{j\ne i}\exp(z_i z_j/T)}.$$
# Background is a label like others. Labels of two pairs have nothing in common, so pairs are never compared.
# If all vectors are alike, the loss is $\ln(n-1)$: the plateau below which learning begins.
#
# A large organ has most of the anchors and most of the denominator. Two options give every class the same say, or, as
# `sqrt`, half way: `anchors` weighs the mean over $i$, `others` weighs the sum over $j$.

# %%
#| export
Balance = Literal["none", "raw", "sqrt"] # weight of a vector: 1, 1/size of its class, or the square root of that

_POWER = {"none": 0.0, "raw": 1.0, "sqrt": 0.5}

def supervised_contrastive(
    vectors: torch.Tensor, # (b, n, d) of `b` pairs; any length, any float type
    labels: torch.Tensor, # (b, n) integers; compared within a pair only
    *,
    temperature: float = 0.33, # smaller: only the nearest negatives count
    anchors: Balance = "none", # weights in the mean over anchors
    others: Balance = "none", # weights in the denominator; their sum stays n - 1
) -> torch.Tensor: # scalar float32; 0 where no anchor has a positive
    "Supervised contrastive loss of each pair, mean over pairs"
    if vectors.ndim != 3 or vectors.shape[:2] != labels.shape or vectors.shape[1] < 2:
        raise DataError(f"contrastive loss: vectors (b, n, d) and labels (b, n) with n >= 2 are needed, got "
                        f"{tuple(vectors.shape)} and {tuple(labels.shape)}")
    n, device = labels.shape[1], vectors.device
    with torch.autocast(device.type, enabled=False): # similarities of half precision would tie
        z = F.normalize(vectors.float(), dim=-1)
        same = labels[:, :, None] == labels[:, None, :] # (b, n, n)
        itself = torch.eye(n, dtype=torch.bool, device=device)
        alike = (z @ z.transpose(1, 2)/temperature).masked_fill(itself, -math.inf) # (b, n, n)
        size = same.sum(-1) # (b, n) members of each vector's class
        if others == "none": total = alike.logsumexp(-1)
        else:
            weight = (size[:, None] - same.long()).clamp(min=1).float()**-_POWER[others] # sizes without the anchor
            weight = weight.masked_fill(itself, 0)
            total = (alike + (weight*(n - 1)/weight.sum(-1, keepdim=True)).log()).logsumexp(-1)
        friends = same & ~itself
        count = friends.sum(-1) # (b, n)
        close_by = alike.masked_fill(~friends, 0).sum(-1)/count.clamp(min=1)
        loss = torch.where(count > 0, total - close_by, 0.0)
        weight = torch.where(count > 0, size.float()**-_POWER[anchors], 0.0)
        return ((loss*weight).sum(-1)/weight.sum(-1).clamp(min=1e-12)).mean()

# %%
draws = rng_for(0, "loss")
labels = torch.from_numpy(draws.integers(0, 5, (2, 40)))
alike = torch.ones(2, 40, 8)
apart = F.one_hot(labels, 8).float()
noise = torch.from_numpy(draws.normal(size=(2, 40, 8))).float()
{name: round(supervised_contrastive(v, labels).item(), 3) for name, v in
 (("all alike", alike), ("random", noise), ("by class", apart))} | {"ln(n - 1)": round(math.log(39), 3)}

# %%
def by_hand(z, labels, temperature=0.33): # (n, d) and (n)
    "The formula, one exponential at a time"
    z = z.double()/z.double().norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(z)):
        total = sum(math.exp(z[i] @ z[j]/temperature) for j in range(len(z)) if j != i)
        friends = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        terms = [-math.log(math.exp(z[i] @ z[p]/temperature)/total) for p in friends]
        if friends: losses.append(sum(terms)/len(terms))
    return sum(losses)/len(losses)

pairs = [by_hand(z, c) for z, c in zip(noise, labels)]
assert abs(supervised_contrastive(noise, labels).item() - np.mean(pairs)) < 1e-5
assert abs(supervised_contrastive(alike, labels, anchors="raw", others="raw").item() - math.log(39)) < 1e-5
assert supervised_contrastive(noise, torch.arange(80).view(2, 40)).item() == 0
with raises(DataError, match="are needed, got"): supervised_contrastive(noise[0], labels)

# %% [markdown]
# ## Which voxels, which layers
# The published choice is six layers: the last encoder level, the bottom, and the way up to the output, all before
# normalisation. For other depths `loss_layers` gives the layers at the same places. Points are drawn for each layer's
# own grid; its labels are those of the voxel at the same place in the full grid.

# %%
#| export
def loss_layers(
    net: FlatUNet, # network
) -> tuple[int, ...]: # addresses, rising
    "Layers at the places of the published choice"
    convs = [k for k, layer in enumerate(net.layers) if isinstance(layer, nn.Conv3d)]
    n = net.cfg.levels
    return convs[2*n], convs[2*n + 1], *(convs[2*n + 3 + 2*k] for k in range(n - 1)), convs[-1]

def draw_points(
    shape: Sequence[int], # (x, y, z) of the layer's grid [voxel]
    n: int, # how many, at most all
    rng: np.random.Generator, # see `rng_for`
) -> np.ndarray: # (min(n, voxels)) int64 positions in C order, without repetition
    "Random voxels of a grid"
    voxels = math.prod(shape)
    return rng.choice(voxels, min(n, voxels), replace=False)

def labels_at(
    seg: np.ndarray, # (x, y, z) labels
    points: np.ndarray, # (n) positions in the grid of a layer
    stride: int, # voxels of `seg` per voxel of that grid
) -> np.ndarray: # (n) int64
    "Labels of a layer's voxels"
    return seg[::stride, ::stride, ::stride].reshape(-1)[points].astype(np.int64)

@dataclass(frozen=True)
class PointSampler:
    "Chooses the compared voxels of a pair, for every layer"
    strides: Mapping[str, int] # layer -> voxels of the image per voxel of its grid
    points: int # voxels per layer, at most

    def grid(
        self,
        layer: str, # address
        shape: Sequence[int], # (x, y, z) of the image [voxel]
    ) -> tuple[int, ...]: # (x, y, z) of the layer [voxel]
        "Size of a layer's grid"
        return tuple(n//self.strides[layer] for n in shape)

    def count(
        self,
        shape: Sequence[int], # (x, y, z) of the image [voxel]
    ) -> dict[str, int]: # points of each layer
        "How many voxels are compared"
        return {k: min(self.points, math.prod(self.grid(k, shape))) for k in self.strides}

    def draw(
        self,
        seg: np.ndarray, # (x, y, z) labels
        rng: np.random.Generator, # see `rng_for`
    ) -> dict[str, dict[str, np.ndarray]]: # 'points' and 'labels': layer -> (p) int64
        "Positions and labels: the part of a pair that the loss needs beside its views"
        points = {k: draw_points(self.grid(k, seg.shape), self.points, rng) for k in self.strides}
        return {"points": points, "labels": {k: labels_at(seg, p, self.strides[k]) for k, p in points.items()}}

def plateau(
    points: Mapping[Any, int], # points per layer
    weights: Mapping[Any, float] | None = None, # of the layers; None: all the same
) -> float: # loss
    "Loss of a network that sees no difference between voxels: ln(2P - 1), mean over layers"
    w = {k: 1.0 for k in points} if weights is None else weights
    return sum(w[k]*math.log(2*p - 1) for k, p in points.items())/sum(w[k] for k in points)

# %%
loss_layers(public), loss_layers(small), plateau({k: min(256, (32//small.stride[k])**3) for k in (24, 31, 38, 51)})

# %%
assert loss_layers(public) == at
seg = phantoms.head((32, 32, 32)).lbl
where = draw_points((8, 8, 8), 600, rng_for(0, "points"))
assert sorted(where) == list(range(512)) and labels_at(seg, where, 4)[0] == seg[::4, ::4, ::4].ravel()[where[0]]

# %% [markdown]
# ## Projectors
# The loss does not see the features themselves but what a small network of its own makes of them: it may throw away
# what the loss punishes, so that the features can keep it (Chen et al., ICML 2020). One projector per layer, nothing
# shared, and nothing of it used afterwards.

# %%
#| export
class ContrastConfig(Config):
    "What is compared, where and how"
    layers: tuple[int, ...] = () # addresses; empty: see `loss_layers`
    weights: tuple[float, ...] = () # of the layers in the loss; empty: all the same
    points: int = Field(512, ge=1) # voxels per layer and pair
    temperature: float = Field(0.33, gt=0) # see `supervised_contrastive`
    anchors: Balance = "none" # likewise
    others: Balance = "none" # likewise
    projector_width: int = Field(256, ge=2) # length of the compared vectors
    projector_depth: int = Field(3, ge=2, le=3) # linear layers

    @field_validator("weights")
    @classmethod
    def _positive(cls, v: tuple[float, ...]) -> tuple[float, ...]:
        if any(w < 0 for w in v) or v and not sum(v) > 0: raise ValueError(f"numbers >= 0, not all 0, got {v}")
        return v

    @model_validator(mode="after")
    def _matched(self) -> "ContrastConfig":
        if self.weights and len(self.weights) != len(self.layers):
            raise ValueError(f"weights: one for each of {len(self.layers)} layers, got {len(self.weights)}")
        if len(set(self.layers)) < len(self.layers): raise ValueError(f"layers: named twice in {self.layers}")
        return self

def projector(
    c_in: int, # channels of the layer
    width: int = 256, # length of the result
    depth: int = 3, # linear layers
) -> nn.Sequential: # (b, c_in) -> (b, width)
    "Linear layers with normalisation and ReLU between them"
    layers: list[nn.Module] = []
    for k in range(depth):
        layers.append(nn.Linear(width if k else c_in, width, bias=False))
        layers += [PairedNorm(width), nn.ReLU(inplace=True)] if k < depth - 1 else [PairedNorm(width, affine=False)]
    return nn.Sequential(*layers)

class Contrast(nn.Module):
    "Feature network with a projector for every compared layer: what is trained"
    def __init__(
        self,
        net: FlatUNet, # feature network
        cfg: ContrastConfig = ContrastConfig(), # layers and projectors
        seed: int = 0, # names the projectors' first weights
    ):
        super().__init__()
        known, self.cfg = range(len(net.layers)), cfg
        if wrong := [k for k in cfg.layers if k not in known]:
            raise ConfigError(f"contrast.layers: the network has layers 0 to {len(known) - 1}, got {wrong}")
        self.net, self.addresses = net, cfg.layers or loss_layers(net)
        self.weights = dict(zip(map(str, self.addresses), cfg.weights or (1.0,)*len(self.addresses)))
        with seeded(seed, "projectors"):
            self.heads = nn.ModuleDict({str(k): projector(net.channels[k], cfg.projector_width, cfg.projector_depth)
                                        for k in self.addresses})
        init_weights(self.heads, "relu", generator=torch_rng_for(seed, "projectors"))
        self.sampler = PointSampler({str(k): net.stride[k] for k in self.addresses}, cfg.points)

    def project(
        self,
        found: Mapping[int, torch.Tensor], # layer -> (2b, c, *grid) features, views of a pair together
        points: Mapping[str, torch.Tensor], # layer -> (b, p) positions in its grid
    ) -> dict[str, torch.Tensor]: # layer -> (b, 2p, d): all points of view 1, then of view 2
        "Vectors to compare, from features"
        out = {}
        for k, head in self.heads.items():
            f, where = found[int(k)], points[k].repeat_interleave(2, 0)[:, None] # (2b, 1, p)
            rows = f.flatten(2).gather(2, where.expand(-1, f.shape[1], -1)).transpose(1, 2) # (2b, p, c)
            out[k] = head(rows.flatten(0, 1)).unflatten(0, (len(points[k]), -1)) # (b, 2p, d)
        return out

    def forward(
        self,
        img: torch.Tensor, # (b, 2, x, y, z) both views of `b` pairs
        points: Mapping[str, torch.Tensor], # layer -> (b, p) positions in its grid
    ) -> dict[str, torch.Tensor]: # layer -> (b, 2p, d)
        "Vectors to compare, from images"
        for m in self.modules():
            if isinstance(m, PairedNorm): m.groups = len(img)
        return self.project(self.net.features(img.flatten(0, 1)[:, None], self.addresses), points)

def contrast_loss(
    vectors: Mapping[str, torch.Tensor], # layer -> (b, 2p, d), from `Contrast`
    labels: Mapping[str, torch.Tensor], # layer -> (b, p)
    cfg: ContrastConfig, # temperature and balance
    weights: Mapping[str, float], # of the layers
) -> dict[str, torch.Tensor]: # 'loss' and 'layer_<address>'
    "Weighted mean of the losses of all layers"
    parts = {k: supervised_contrastive(z, labels[k].repeat(1, 2), temperature=cfg.temperature, anchors=cfg.anchors,
                                       others=cfg.others) for k, z in vectors.items()}
    total = sum(weights[k]*v for k, v in parts.items())/sum(weights[k] for k in parts)
    return {"loss": total} | {f"layer_{k}": v.detach() for k, v in parts.items()}

# %%
contrast = ContrastConfig(layers=(24, 31, 51), points=64, projector_width=32)
model = Contrast(build_network(tiny), contrast)
def two_views(k):
    body = phantoms.random_body((32, 32, 32), seed=k)
    grey = rng_for(k, "grey").random((2, 256)).astype(np.float32)
    return {"img": torch.from_numpy(grey[:, body.lbl]), **model.sampler.draw(body.lbl, rng_for(k, "points"))}

batch = torch.utils.data.default_collate([two_views(0), two_views(1)])
def loss_of(batch):
    return contrast_loss(model(batch["img"], batch["points"]), batch["labels"], contrast, model.weights)

{k: round(v.item(), 3) for k, v in loss_of(batch).items()}, round(plateau(model.sampler.count((32, 32, 32))), 3)

# %% [markdown]
# Two pairs in a batch: the mean of the losses of one and of the other, and the mean of the gradients.

# %%
def gradient(batch):
    model.zero_grad()
    value = loss_of(batch)["loss"]
    value.backward()
    return value.item(), torch.cat([p.grad.ravel() for p in model.parameters()])

both = gradient(batch)
single = [gradient(torch.utils.data.default_collate([two_views(k)])) for k in (0, 1)]
assert abs(both[0] - np.mean([s[0] for s in single])) < 1e-5
close(both[1], (single[0][1] + single[1][1])/2, 1e-5)

# %%
with raises(ConfigError, match="has layers 0 to 51, got"): Contrast(build_network(tiny), ContrastConfig(layers=(65,)))

# %% [markdown]
# ## Did it learn?
# A falling loss alone proves nothing: the projector can learn the statistics of labels. So there is a measure on the
# features themselves. On a pair never trained with, up to 15 voxels of every label are chosen. For each of them in view
# 1 the most similar *other* one of view 2 is looked up, by the cosine of features from which the mean was taken. The
# score is how often it has the same label; guessing gives one over the number of labels.

# %%
#| export
def retrieval_points(
    seg: np.ndarray, # (x, y, z) labels
    rng: np.random.Generator, # see `rng_for`
    per_label: int = 15, # voxels of each label, at most
) -> np.ndarray: # (n) int64 positions in C order, in random order
    "Voxels with which retrieval is measured"
    flat = seg.reshape(-1)
    order = rng.permutation(len(flat))
    inside = flat[order]
    return rng.permutation(np.concatenate([order[np.flatnonzero(inside == k)[:per_label]] for k in np.unique(flat)]))

def retrieval(
    first: np.ndarray, # (n, c) features in view 1
    second: np.ndarray, # (n, c) features of the same voxels in view 2
    labels: np.ndarray, # (n) of the voxels
    *,
    metric: Literal["cosine", "euclidean"] = "cosine", # of features without their mean, or of features as they are
) -> float: # [0, 1]
    "How often the most similar other voxel of the other view has the same label"
    a, b = (np.asarray(f, np.float64) for f in (first, second))
    if a.shape != b.shape or a.ndim != 2 or len(a) != len(labels) or len(a) < 2:
        raise DataError(f"retrieval: features (n, c) of two views and n >= 2 labels are needed, got {a.shape}, "
                        f"{b.shape} and {len(labels)}")
    if metric == "cosine":
        a, b = (f - f.mean(0) for f in (a, b))
        a, b = (f/np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12) for f in (a, b))
        alike = a @ b.T
    else: alike = -((a[:, None] - b[None])**2).sum(-1)
    np.fill_diagonal(alike, -np.inf)
    return float(np.mean(labels[alike.argmax(1)] == labels))

# %%
chosen = retrieval_points(seg, rng_for(0, "retrieval"))
known = seg.ravel()[chosen]
told = np.eye(256)[known]
guess = rng_for(1, "retrieval").normal(size=(2, len(known), 16))
retrieval(told, told, known), retrieval(*guess, known), 1/len(np.unique(known))

# %%
assert retrieval(told, told, known) == 1 and retrieval(*guess, known) < 0.4
assert max(np.bincount(known)) <= 15 and set(known) == set(np.unique(seg))
with raises(DataError, match="are needed, got"): retrieval(told, told[:5], known)

# %% [markdown]
# ## Weights that explain themselves
# A run stores with its weights what network they are of. Published weights do not say it, but their shapes do. Names
# of wrappers (data parallelism, compilation) are taken off.

# %%
#| export
@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    "A trained network with what is needed to use it"
    net: FlatUNet # in evaluation mode
    normalizer: str # spec of page 05 that images go through
    patch_size: tuple[int, ...] # (x, y, z) of its training [voxel]
    digest: str # of its weights

def describe_network(
    cfg: NetworkConfig, # shape
    patch_size: Sequence[int], # (x, y, z) of the training [voxel]
    normalizer: str = "minmax", # spec of page 05 that images go through before use
) -> dict[str, Any]: # plain values
    "What a weight file must carry so that it can be used without the run's settings"
    return {"format": "medvol_nb.contrast 1", "network": plain(cfg), "patch_size": [int(n) for n in patch_size],
            "normalizer": normalizer}

def _bare(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in weights.items()}

_PUBLISHED = Converter("anatomix U-Net", lambda w: "model.0.weight" in _bare(w),
                       lambda w: {k.replace("model.", "layers.", 1): v for k, v in _bare(w).items()})

def network_of(
    weights: Mapping[str, torch.Tensor], # n-d arrays by name, 'layers.<address>.weight' and so on
) -> NetworkConfig: # shape
    "Read the shape of a network off its weights"
    address = lambda k: int(k.split(".")[1])
    convs = [weights[k] for k in sorted((k for k, v in weights.items() if v.ndim == 5), key=address)]
    levels, rest = divmod(len(convs) - 4, 4)
    if levels < 1 or rest: raise FormatError(f"{len(convs)} convolutions: not a network of this kind")
    own = {"in_channels": convs[0].shape[1], "out_channels": len(convs[-1]), "width": len(convs[0]), "levels": levels}
    if any(k.endswith("running_mean") for k in weights): return NetworkConfig(**own)
    if "layers.0.bias" not in weights: return NetworkConfig(**own, norm="none")
    return NETWORKS["anatomix-dev"].model_copy(update=own)

def load_network(
    path: str | os.PathLike, # run folder, .safetensors of a run, or published .pth
    device: str = "auto", # where the network goes
    cfg: NetworkConfig | None = None, # shape, for weights that do not say it; None: from their shapes
) -> FeatureNetwork: # network in evaluation mode, normalisation, patch size
    "Build the network that a weight file is of"
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path/"best.safetensors", path/"model.safetensors") if p.exists()]
        if not found: raise MissingFile(f"{path}: holds no best.safetensors or model.safetensors, is it a run folder?")
        path = found[0]
    if path.suffix == ".safetensors":
        saved = load_checkpoint(path)
        about = (saved.get("config") or {}).get("model") if isinstance(saved.get("config"), dict) else None
        if "model" not in saved or not isinstance(about, dict) or about.get("format") != "medvol_nb.contrast 1":
            raise FormatError(f"{path}: these are not weights of `medvol synth pretrain`")
        weights = {k.removeprefix("net."): v for k, v in saved["model"].items() if k.startswith("net.")}
        shape = check_config(NetworkConfig, about["network"], str(path))
    else:
        weights = load_foreign(path, (_PUBLISHED,))
        shape, about = cfg or network_of(weights), {"patch_size": [128]*3, "normalizer": "minmax"}
    net = build_network(shape)
    load_weights(net, weights)
    digest = fingerprint([[k, weights[k]] for k in sorted(weights)])
    return FeatureNetwork(net.eval().to(device_for(device)), about["normalizer"], tuple(about["patch_size"]), digest)

# %%
with tmpdir() as folder:
    saved = {f"_orig_mod.model.{k.removeprefix('layers.')}": v for k, v in public.state_dict().items()}
    torch.save(saved, folder/"anatomix.pth")
    back = load_network(folder/"anatomix.pth", "cpu")
    save_checkpoint(folder/"model.safetensors", {"model": model.state_dict(), "config": {
        "model": describe_network(tiny, (32, 32, 32))}})
    own = load_network(folder, "cpu")
    torch.save({k: v for k, v in saved.items() if ".65." not in k}, folder/"torn.pth")
    with raises(FormatError, match="19 convolutions: not a network"): load_network(folder/"torn.pth")
back.net.cfg, own.patch_size

# %%
assert back.net.cfg == NETWORKS["anatomix"] and own.net.cfg == tiny
assert all(torch.equal(v, public.state_dict()[k]) for k, v in back.net.state_dict().items())
assert network_of(FlatUNet(NETWORKS["anatomix-dev"]).state_dict()) == NETWORKS["anatomix-dev"]

# %% [markdown]
# ## A few steps
# Twelve steps of plain AdamW on two bodies in random greys, with the tiny network: the loss goes under its plateau.
# Whether the features got better on bodies never seen is another question; page 44b answers it with enough steps.

# %%
optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
for _ in range(12):
    optimizer.zero_grad()
    loss = loss_of(batch)["loss"]
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
level = plateau(model.sampler.count((32, 32, 32)))
plot.curves({"loss": losses, "plateau": [level]*12}, xlabel="step", height=2)

# %%
assert losses[-1] < level < losses[0]
