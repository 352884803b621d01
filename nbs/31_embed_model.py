# %% [markdown]
# # The embedding network
#
# > An inflated 3-D ResNet with pyramid heads gives every voxel a unit vector, near in value where anatomy is the same.
#
# Where in this scan is the point that I clicked in the other one? If every voxel carries a vector that describes *where
# in the body* it is, and not how bright it is, the answer is the voxel with the most similar vector. Yan et al.
# (SAM: self-supervised learning of pixel-wise anatomical embeddings, IEEE TMI 2022) train such vectors without labels.
# Their network has two heads. The *fine* one sees less and is exact; the *coarse* one sees the body from side to side
# and knows on which side it is. The third, *semantic*, of SAM++ (Bai et al., 2023) is trained with organ masks.
#
# This page has the network, its three ways to get first weights, and the file that carries a trained one. Losses are on
# [page 32](32_embed_loss.ipynb), training on [page 33a](33a_embed_train.ipynb).

# %%
#| default_exp embed.model

# %%
#| export
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import nn

from medvol_nb.blocks import FPN, ConvBlock, ResidualBlock, init_weights
from medvol_nb.checkpoints import (Converter, device_for, load_checkpoint, load_foreign, load_weights, save_checkpoint,
                                   seeded)
from medvol_nb.config import Config, check_config
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OnExists, fingerprint, plain

# %%
import numpy as np

from medvol_nb import phantoms, plot
from medvol_nb.blocks import conv_flops, count_parameters
from medvol_nb.core import close, raises, rng_for, tmpdir

# %% [markdown]
# ## Settings
# The names `AnatSAM`, `AnatSAMpp` and `CrossAnat` stand for the published three; `tiny` is a quarter as wide and learns
# on a CPU. A bare "SAM" does not appear: in this library that is Segment Anything.

# %%
#| export
Head = Literal["fine", "coarse", "semantic"]
STRIDES: dict[str, tuple[int, int, int]] = { # (z, y, x) network voxels for a voxel of each map
    "fine": (2, 2, 2), "coarse": (4, 16, 16), "semantic": (2, 2, 2)}
_NORMS = {"bn": "batch", "syncbn": "batch", "gn": "group", "in": "instance"}
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}

class ModelConfig(Config):
    "Shape of an embedding network"
    depth: Literal[18, 34] = 18 # of the ResNet
    dims: Literal[2, 3] = 3 # volumes, or single slices
    heads: tuple[Head, ...] = ("fine", "coarse") # maps that are computed
    width: int = Field(64, ge=8, multiple_of=8) # channels of the first stage; then 2, 4 and 8 times as many
    emb: int = Field(128, ge=1) # length of the vectors
    norm: Literal["bn", "syncbn", "gn", "in"] = "bn" # batch, batch over all processes, group or instance normalisation

    @field_validator("heads")
    @classmethod
    def _fine_and_coarse(cls, heads: tuple[Head, ...]) -> tuple[Head, ...]:
        if len(set(heads)) != len(heads) or not {"fine", "coarse"} <= set(heads):
            raise ValueError(f"must hold 'fine' and 'coarse', each head once, got {list(heads)}")
        return heads

MODELS: dict[str, ModelConfig] = {
    "AnatSAM": ModelConfig(), "AnatSAMpp": ModelConfig(heads=("fine", "coarse", "semantic")),
    "CrossAnat": ModelConfig(heads=("fine", "coarse", "semantic")), "tiny": ModelConfig(width=16, emb=64)}

# %%
with raises(ConfigError, match="must hold 'fine' and 'coarse'"):
    check_config(ModelConfig, {"heads": ["fine", "semantic"]}, "model.json")

# %% [markdown]
# ## The network
# Tensors are `(b, 1, z, y, x)`, one network voxel is 2 mm. The two first stages look within slices only; what they
# would see across, at slice distances of several millimetres, differs from scanner to scanner. One max-pooling halves z
# after the first stage; the last two stages have 3×3×3 kernels.
#
# | part | kernel (z, y, x) | stride | channels | map for 32×96×96 |
# |---|---|---|---|---|
# | stem | 3, 7, 7 | 1 | 64 | 32×96×96 |
# | stage 1, then max-pooling (2, 1, 1) | 1, 3, 3 | 1, 2, 2 | 64 | 16×48×48 |
# | stage 2 | 1, 3, 3 | 1, 2, 2 | 128 | 16×24×24 |
# | stage 3 | 3, 3, 3 | 1, 2, 2 | 256 | 16×12×12 |
# | stage 4 | 3, 3, 3 | 2, 2, 2 | 512 | 8×6×6 |
#
# The fine head is a pyramid over the first three maps, the coarse one over the last alone. Pooling rounds up, as the
# strided convolutions do, so every map has $\lceil n/s\rceil$ voxels. Vectors are normalised in float32, also under
# mixed precision: the published code casts them to half precision, where neighbouring similarities become equal.

# %%
#| export
class AnatNet(nn.Module):
    "Unit vectors for the voxels of a volume, on one grid for each head"
    def __init__(
        self,
        depth: int = 18, # of the ResNet: 18 or 34
        dims: int = 3, # 3, or 2 for slices
        heads: tuple[str, ...] = ("fine", "coarse"), # and 'semantic'
        width: int = 64, # channels of the first stage
        emb: int = 128, # length of the vectors
        norm: str = "bn", # 'bn', 'syncbn', 'gn' or 'in'
    ):
        super().__init__()
        self.cfg = check_config(ModelConfig, {"depth": depth, "dims": dims, "heads": list(heads), "width": width,
                                              "emb": emb, "norm": norm}, "AnatNet")
        own = {"dims": dims, "norm": _NORMS[norm], "act": "relu"}
        cut = lambda *zyx: zyx[3 - dims:] # a network of slices has no z
        widths = [width, 2*width, 4*width, 8*width]
        self.stem = ConvBlock(1, width, kernel=cut(3, 7, 7), **own)
        self.pool = (nn.MaxPool3d((2, 1, 1), ceil_mode=True) if dims == 3 else nn.Identity())
        self.stages = nn.ModuleList()
        for i, (c_in, c_out, n) in enumerate(zip([width, *widths], widths, _BLOCKS[depth])):
            kernel, stride = cut(3 if i > 1 else 1, 3, 3), cut(2 if i == 3 else 1, 2, 2)
            self.stages.append(nn.Sequential(*(
                ResidualBlock(c_out if k else c_in, c_out, kernel=kernel, stride=1 if k else stride, around="conv",
                              **own) for k in range(n))))
        self.heads = nn.ModuleDict({h: FPN(widths[3:] if h == "coarse" else widths[:3], emb, dims, outputs=[0])
                                    for h in heads})
        init_weights(self, "relu")
        init_weights(self.heads, "none", scheme="xavier")
        if norm == "syncbn": self.stages = nn.SyncBatchNorm.convert_sync_batchnorm(self.stages)
        if norm == "syncbn": self.stem = nn.SyncBatchNorm.convert_sync_batchnorm(self.stem)

    def levels(
        self,
        x: torch.Tensor, # (b, 1, z, y, x) intensities of page 30, about [-50, 205]
    ) -> list[torch.Tensor]: # (b, c, z', y', x') for each of the 4 stages
        "Maps of the ResNet"
        if x.ndim != self.cfg.dims + 2 or x.shape[1] != 1:
            raise DataError(f"embedding network: (b, 1, {', '.join('zyx'[-self.cfg.dims:])}) is needed, got "
                            f"{tuple(x.shape)}")
        x, maps = self.stem(x), [] # (b, width, z, y, x)
        for i, stage in enumerate(self.stages):
            x = stage(x) # (b, c, z', y', x')
            if i == 0: x = self.pool(x)
            maps.append(x)
        return maps

    def forward(
        self,
        x: torch.Tensor | Sequence[torch.Tensor], # (b, 1, z, y, x) intensities about [-50, 205], or several of them
    ) -> dict[str, torch.Tensor] | list[dict]: # head -> (b, emb, z/s, y/s, x/s) float32, rounded up, length 1 over emb
        "Embed a batch of volumes; a list of batches of different sizes gives a list"
        if not isinstance(x, torch.Tensor): return [self.forward(v) for v in x]
        maps = self.levels(x)
        return {h: F.normalize(head(maps[3:] if h == "coarse" else maps[:3])[0].float(), dim=1)
                for h, head in self.heads.items()}

def build_model(
    cfg: ModelConfig = MODELS["AnatSAM"], # shape
    seed: int = 0, # names the first weights
) -> AnatNet: # in training mode, on the CPU
    "Network with random first weights"
    with seeded(seed, "embed.model"): return AnatNet(**cfg.model_dump())

def map_shape(
    shape: tuple[int, ...], # (z, y, x) of the network volume
    head: str = "fine", # which map
) -> tuple[int, ...]: # (z, y, x) of the map
    "Size of a head's map"
    return tuple(-(-n//s) for n, s in zip(shape, STRIDES[head][3 - len(shape):]))

# %% [markdown]
# Sizes and counts are those of the published network: 31.82 million parameters in the ResNet, 0.500 in the fine head,
# 0.508 in the coarse one, and 114.6 billion operations (two for each multiply-add) for a training crop.

# %%
full = build_model(MODELS["AnatSAMpp"])
parts = {"ResNet": count_parameters(full) - count_parameters(full.heads),
         **{h: count_parameters(m) for h, m in full.heads.items()}}
work = 2*conv_flops(build_model(), (1, 1, 32, 96, 96))
{k: f"{n/1e6:.3f} M" for k, n in parts.items()}, f"{work/1e9:.1f} GFLOP"

# %%
assert [round(n/1e6, 2) for n in parts.values()] == [31.82, 0.50, 0.51, 0.50] and round(work/1e9, 1) == 114.6
tiny = build_model(MODELS["tiny"]).eval()
with torch.no_grad():
    for shape in ((32, 96, 96), (5, 33, 70), (1, 1, 1)):
        for head, v in tiny(torch.ones(1, 1, *shape)).items():
            assert tuple(v.shape[2:]) == map_shape(shape, head) and v.dtype == torch.float32
            assert close(v.norm(dim=1), torch.ones(1, *map_shape(shape, head)), 1e-3)

# %%
with raises(DataError, match=r"\(b, 1, z, y, x\) is needed, got \(2, 3, 8, 8, 8\)"): tiny(torch.zeros(2, 3, 8, 8, 8))
with raises(ConfigError, match="width"): AnatNet(width=12)

# %% [markdown]
# A network of slices is the same without z:

# %%
flat = AnatNet(dims=2, width=8, emb=16).eval()
{h: tuple(v.shape) for h, v in flat(torch.zeros(1, 1, 64, 80)).items()}

# %% [markdown]
# How far does a voxel see? Set all weights to one positive number and let the pooling average: the gradient of an
# output is then positive exactly where it looks. The fine head sees 48 mm along the body and 226 mm across; the coarse
# head sees 112 mm and half a metre, more than a whole training crop of 32×96×96 voxels.

# %%
def field_of(head, shape):
    net = AnatNet(width=8, emb=1).eval().double()
    net.pool = torch.nn.AvgPool3d((2, 1, 1))
    for p in net.parameters(): torch.nn.init.constant_(p, 0.01 if p.ndim > 1 else 1.0)
    x = torch.ones(1, 1, *shape, dtype=torch.float64, requires_grad=True)
    maps = net.levels(x)
    out = net.heads[head](maps[3:] if head == "coarse" else maps[:3])[0] # (1, 1, z, y, x), not normalised
    out[(0, 0, *(n//2 for n in out.shape[2:]))].backward()
    z, _, x = torch.nonzero(x.grad[0, 0]).T
    return [len(z.unique()), len(x.unique())]

sees = {"fine": field_of("fine", (32, 16, 140)), "coarse": field_of("coarse", (64, 16, 280))}
sees

# %%
assert sees == {"fine": [24, 113], "coarse": [56, 249]}

# %% [markdown]
# Even with random weights, vectors follow the image. Their three main directions, shown as red, green and blue:

# %%
def as_rgb(v):
    flat = v.flatten(1).T # (n, emb)
    flat = flat - flat.mean(0)
    rgb = flat @ torch.linalg.svd(flat, full_matrices=False)[2][:3].T # (n, 3)
    low, high = rgb.quantile(0.02, dim=0), rgb.quantile(0.98, dim=0)
    return ((rgb - low)/(high - low)).clip(0, 1).reshape(*v.shape[1:], 3).numpy()

body = phantoms.random_body((96, 96, 32), seed=4)
grey = torch.from_numpy(np.ascontiguousarray(body.img.transpose(2, 1, 0))).float()[None, None]
grey = 255*(grey - grey.min())/(grey.max() - grey.min()) - 50
with torch.no_grad(): maps = tiny(grey)
colours = {h: as_rgb(v[0])[v.shape[2]//2] for h, v in maps.items()}
plot.montage([grey[0, 0, 16].numpy(), *colours.values()], titles=["slice", *colours], cols=3)

# %% [markdown]
# ## First weights from photographs
# A ResNet that has seen a million photographs already knows edges and textures. Its 2-D kernels are *inflated*:
# repeated along z and divided by their number, so that a volume that is constant along z gives what the photograph
# would give. The stem had three colours; they become its three z taps.

# %%
#| export
_IN_STAGE = re.compile(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.(\d))\.(\w+)")

def _own_name(stage: int, block: int, part: str, kind: str, leaf: str) -> str:
    "Our name of a tensor in a stage; part is '1' or '2' for the convolutions, '' for the shortcut"
    middle = f"body.{int(part) - 1}" if part else "shortcut.conv"
    return f"stages.{stage - 1}.{block}.{middle}.{'conv' if kind == 'conv' else 'norm'}.{leaf}"

def inflate_resnet18(
    state: Mapping[str, torch.Tensor], # n-d arrays by torchvision's names: 'conv1.weight', 'layer1.0.bn2.bias'
    dims: int = 3, # of the network to fill; 2 keeps kernels flat and sums the colours
) -> dict[str, torch.Tensor]: # n-d arrays by the names of `AnatNet`, without heads
    "Weights of a 2-D ResNet of photographs as first weights of a volume network"
    out = {}
    for k, v in state.items():
        if k.startswith("fc."): continue
        if k == "conv1.weight":
            out["stem.conv.weight"] = v[:, None].clone() if dims == 3 else v.sum(1, keepdim=True) # (o, 1, 3, 7, 7)
        elif k.startswith("bn1."): out[k.replace("bn1", "stem.norm")] = v.clone()
        elif m := _IN_STAGE.fullmatch(k):
            stage, block = int(m[1]), int(m[2])
            kind = m[3] or ("conv" if m[5] == "0" else "bn")
            if v.ndim == 4 and dims == 3:
                taps = 3 if stage > 2 and v.shape[-1] == 3 else 1
                v = v[:, :, None].repeat(1, 1, taps, 1, 1)/taps # (o, i, taps, y, x)
            out[_own_name(stage, block, m[4] or "", kind, m[6])] = v.clone()
        else: raise FormatError(f"not the weights of a ResNet-18 or -34: {k!r} has no place in one")
    if "stem.conv.weight" not in out: raise FormatError("not the weights of a ResNet: 'conv1.weight' is missing")
    return out

# %% [markdown]
# The names and shapes of torchvision's file, written down from its layout, with random content:

# %%
def photo_resnet(width=64):
    shapes, c_in = {"conv1.weight": (width, 3, 7, 7), "fc.weight": (10, 8*width), "fc.bias": (10,)}, width
    norms = {"bn1": width}
    for s in range(4):
        c = width*2**s
        for b in range(2):
            name = f"layer{s + 1}.{b}"
            shapes |= {f"{name}.conv1.weight": (c, c if b else c_in, 3, 3), f"{name}.conv2.weight": (c, c, 3, 3)}
            norms |= {f"{name}.bn1": c, f"{name}.bn2": c}
            if b == 0 and s:
                shapes[f"{name}.downsample.0.weight"], norms[f"{name}.downsample.1"] = (c, c_in, 1, 1), c
        c_in = c
    leaves = ("weight", "bias", "running_mean", "running_var")
    for k, c in norms.items(): shapes |= {f"{k}.{leaf}": (c,) for leaf in leaves}
    draw = lambda k, s: torch.from_numpy(rng_for(0, k).normal(0.0, (2/np.prod((*s[1:], 1)))**0.5, s)).float()
    return {k: draw(k, s).abs() if "norm" in k or "var" in k else draw(k, s) for k, s in shapes.items()}

photo = photo_resnet(16)
net = build_model(MODELS["tiny"])
report = load_weights(net, inflate_resnet18(photo), strict=False)
len(report.loaded), sorted({".".join(k.split(".")[:3]) for k in report.missing if "num_batches" not in k})

# %% [markdown]
# What stays random are the heads and the shortcut of the first stage, which torchvision's network does not have there
# (it pools instead). Along z the stem sees what it would see in red, green and blue:

# %%
assert not report.unexpected and not report.changed
plane = torch.from_numpy(rng_for(1, "plane").normal(size=(1, 3, 20, 20))).float()
want = F.conv2d(plane, photo["conv1.weight"], padding=3)
same_along_z = torch.from_numpy(rng_for(2, "c").normal(size=(1, 64, 1, 8, 8))).float().repeat(1, 1, 5, 1, 1)
with torch.no_grad():
    assert close(net.stem.conv(plane[:, None])[:, :, 1], want, 1e-4)
    inner = net.stages[2][1].body[0].conv(same_along_z)[:, :, 2]
assert close(inner, F.conv2d(same_along_z[:, :, 2], photo["layer3.1.conv1.weight"], padding=1), 1e-4)
with raises(FormatError, match="'backbone.w' has no place"): inflate_resnet18({"backbone.w": torch.ones(1)})

# %% [markdown]
# ## Published weights
# The published checkpoints are PyTorch pickles with the names of another tool box. They are opened with the restricted
# reader of [page 08](08_checkpoints.ipynb), which runs no code from the file, and their names are translated:
# `neck` is the fine head, `read_out_head` the coarse one.

# %%
#| export
_PUBLISHED_HEADS = {"neck": "fine", "read_out_head": "coarse", "semantic_head": "semantic"}
_PUBLISHED_STAGE = re.compile(r"backbone\.layer(\d)\.(\d+)\.(?:conv(\d)|downsample)\.(conv|bn)\.(\w+)")
_PUBLISHED_HEAD = re.compile(r"(neck|read_out_head|semantic_head)\.(lateral|fpn)_convs\.(\d)\.conv\.(\w+)")

def published_name(
    key: str, # name in a published checkpoint
) -> str | None: # name in `AnatNet`; None if it has no counterpart
    "Translate the name of a tensor"
    if m := re.fullmatch(r"backbone\.conv1\.(conv|bn)\.(\w+)", key):
        return f"stem.{'conv' if m[1] == 'conv' else 'norm'}.{m[2]}"
    if m := _PUBLISHED_STAGE.fullmatch(key): return _own_name(int(m[1]), int(m[2]), m[3] or "", m[4], m[5])
    if m := _PUBLISHED_HEAD.fullmatch(key):
        return f"heads.{_PUBLISHED_HEADS[m[1]]}.{'lateral' if m[2] == 'lateral' else 'output'}.{m[3]}.{m[4]}"
    return None

def _from_published(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {published_name(k) or k: v for k, v in weights.items()}
    if unknown := [k for k in weights if published_name(k) is None]:
        raise FormatError(f"published embedding weights: {len(unknown)} tensors have no place, first {unknown[0]!r}")
    return out

_PUBLISHED = Converter("published anatomical embedding", lambda w: any(k.startswith("backbone.conv1.") for k in w),
                       _from_published)

def model_of(
    weights: Mapping[str, torch.Tensor], # n-d arrays by the names of `AnatNet`
) -> ModelConfig: # shape
    "Read the shape of a network off its weights"
    heads = tuple(h for h in STRIDES if f"heads.{h}.output.0.bias" in weights)
    if "stem.conv.weight" not in weights or not heads: raise FormatError("not the weights of an embedding network")
    stem, blocks = weights["stem.conv.weight"], {k.split(".")[2] for k in weights if k.startswith("stages.2.")}
    kind = "bn" if "stem.norm.running_mean" in weights else "gn" # instance norms have the same tensors as group norms
    return ModelConfig(depth=18 if len(blocks) == 2 else 34, dims=stem.ndim - 2, heads=heads, width=len(stem),
                       emb=len(weights[f"heads.{heads[0]}.output.0.bias"]), norm=kind)

# %% [markdown]
# ## A file that says what it is
# A downstream project once paired a checkpoint with the wrong settings and got plausible nonsense. Here the file
# carries the shape of its network, the voxel size and the intensities it was trained with, and a digest of the weights
# that every stored embedding repeats.

# %%
#| export
class EmbedderConfig(Config):
    "What must be known to use a trained network"
    model: ModelConfig = ModelConfig() # its shape
    spacing: float = Field(2.0, gt=0) # network voxel [mm]
    intensity: Literal["ct", "mr", "auto"] = "ct" # grey value rule of page 30
    name: str = "" # preset or run it comes from
    digest: str = "" # of the weights; filled in when a file is read

def model_digest(
    net: nn.Module, # any network
) -> str: # short hash
    "Digest of a network's weights"
    state = net.state_dict()
    return fingerprint([[k, state[k].cpu()] for k in sorted(state) if not k.endswith("num_batches_tracked")])

def save_embedder(
    path: str | os.PathLike, # .safetensors file
    net: AnatNet, # trained network
    cfg: EmbedderConfig, # what must be known to use it
    on_exists: OnExists = "error", # what to do when `path` is there already
) -> Path: # `path`
    "Write a network and what must be known to use it"
    cfg = cfg.model_copy(update={"model": net.cfg, "digest": ""})
    return save_checkpoint(path, {"model": net.state_dict(), "config": {"embedder": plain(cfg)}}, on_exists)

def _published_state(path: Path) -> tuple[dict[str, torch.Tensor], EmbedderConfig]:
    weights = load_foreign(path, (_PUBLISHED,))
    return weights, EmbedderConfig(model=model_of(weights), intensity="auto", name=path.stem)

def _own_state(path: Path) -> tuple[dict[str, torch.Tensor], EmbedderConfig]:
    saved = load_checkpoint(path)
    about = saved["config"].get("embedder") if isinstance(saved.get("config"), Mapping) else None
    if "model" not in saved or not isinstance(about, Mapping):
        raise FormatError(f"{path}: no embedding network. Use the model.safetensors of `medvol embedding train`, or a "
                          "published .pth")
    return saved["model"], check_config(EmbedderConfig, dict(about), str(path))

def load_embedder(
    path: str | os.PathLike, # run folder of the training, its .safetensors, or published .pth
    device: str = "auto", # where the network goes
) -> tuple[AnatNet, EmbedderConfig]: # network in evaluation mode, and its settings with the digest of the weights
    "Read a trained network"
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path/"best.safetensors", path/"model.safetensors") if p.is_file()]
        if not found: raise MissingFile(f"{path}: holds no best.safetensors or model.safetensors, is it a run folder?")
        path = found[0]
    if not path.is_file(): raise MissingFile(f"{path} does not exist")
    weights, cfg = (_own_state if path.suffix == ".safetensors" else _published_state)(path)
    net = build_model(cfg.model)
    load_weights(net, {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")} | weights)
    return net.eval().to(device_for(device)), cfg.model_copy(update={"digest": model_digest(net)})

def load_start(
    net: AnatNet, # changed in place
    path: str | os.PathLike, # trained network, published .pth, or a ResNet of photographs (2-D)
) -> str: # digest of what was read
    "Begin a training with weights from a file; heads that the file lacks stay as they are"
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors": weights = load_embedder(path, "cpu")[0].state_dict()
    else:
        photo = Converter("ResNet of photographs", lambda w: "conv1.weight" in w and "layer4.0.conv1.weight" in w,
                          lambda w: inflate_resnet18(w, net.cfg.dims))
        weights = load_foreign(path, (_PUBLISHED, photo))
    report = load_weights(net, weights, strict=False)
    lost = [k for k in report.missing if not k.startswith(("heads.", "stages.0.0.shortcut")) and "num_batches" not in k]
    if lost or report.changed:
        raise ConfigError(f"start_from: {path} does not fit {plain(net.cfg)}: "
                          f"{'; '.join([*lost[:3], *report.changed[:3]])}. Set model to the shape of the file")
    return fingerprint([[k, weights[k]] for k in sorted(weights)])

# %% [markdown]
# Back through both doors. The stand-in for a published file has the published names; a key that nobody knows is an
# error, not a silent loss.

# %%
def published(net):
    back = {"fine": "neck", "coarse": "read_out_head", "semantic": "semantic_head"}
    part = lambda k: "conv" if k == "conv" else "bn"
    def name(k):
        p = k.split(".")
        if p[0] == "stem": return f"backbone.conv1.{part(p[1])}.{p[2]}"
        if p[0] == "heads":
            return f"{back[p[1]]}.{'lateral' if p[2] == 'lateral' else 'fpn'}_convs.{p[3]}.conv.{p[4]}"
        middle = f"conv{int(p[4]) + 1}" if p[3] == "body" else "downsample"
        return f"backbone.layer{int(p[1]) + 1}.{p[2]}.{middle}.{part(p[-2])}.{p[-1]}"
    return {name(k): v for k, v in net.state_dict().items()}

place = tmpdir()
root = place.__enter__()
three = build_model(MODELS["tiny"].model_copy(update={"heads": ("fine", "coarse", "semantic")}), seed=3)
torch.save({"meta": {"epoch": 1}, "state_dict": published(three)}, root/"SAMv2.pth")
save_embedder(root/"own.safetensors", tiny, EmbedderConfig(name="lesson"))
(a, about_a), (b, about_b) = load_embedder(root/"SAMv2.pth", "cpu"), load_embedder(root/"own.safetensors", "cpu")
about_a.model, about_b.digest

# %%
assert all(torch.equal(v, three.state_dict()[k]) for k, v in a.state_dict().items())
assert about_b.digest == model_digest(tiny) != about_a.digest and not b.training
torch.save(published(three) | {"backbone.extra": torch.ones(1)}, root/"odd.pth")
with raises(FormatError, match="first 'backbone.extra'"): load_embedder(root/"odd.pth")
save_checkpoint(root/"other.safetensors", {"model": {}})
with raises(FormatError, match="no embedding network"): load_embedder(root/"other.safetensors")
with raises(MissingFile, match="is it a run folder"): load_embedder(root)

# %% [markdown]
# A start may lack heads, as a network of SAM does for SAM++, or come from photographs; another width is refused.

# %%
torch.save(photo, root/"photo.pth")
start = build_model(three.cfg)
digests = [load_start(start, root/f) for f in ("own.safetensors", "photo.pth")]
assert len(set(digests)) == 2 and torch.equal(start.stem.conv.weight[:, 0], photo["conv1.weight"])
with raises(ConfigError, match="Set model to the shape of the file"):
    load_start(build_model(MODELS["AnatSAM"]), root/"photo.pth")
place.__exit__(None, None, None)
