# %% [markdown]
# # The network
#
# > One encoder, a decoder or a head for each target: built from a plan, with the sizes, costs and memory known before.
#
# Sheets and the directions of their normals are seen in the same features, so one encoder serves all targets. The
# reference grew such a network out of a library class and inherited its decoder: 18.5 of 82 million parameters are
# built, stored, moved to the GPU and never used. It applied the activation inside the network, so that the loss saw it
# twice; and it resized features silently where sizes did not fit. Here a plan says what is built, every parameter is
# used, `forward` gives logits and `predict` activated values, and a size that does not fit is an error that names those
# that do.

# %%
#| default_exp zarrnet.model

# %%
#| export
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medvol_nb.blocks import (ConvBlock, ResidualBlock, UpBlock, _weightless, activation, conv, conv_flops,
                              conv_transpose, count_parameters, excite_layer, init_weights)
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.core import ConfigError, DataError
from medvol_nb.zarrnet.config import (NetworkConfig, NetworkPlan, Target, TrainParams, ZarrConfig, plan_network,
                                      size_problem)

# %%
import matplotlib.pyplot as plt

from medvol_nb.core import raises, rng_for

# %% [markdown]
# ## The residual encoder
# Stem, then residual blocks; the first block of a level carries its stride. This is the encoder of nnU-Net's ResEnc
# networks (Isensee et al., *nnU-Net Revisited*, MICCAI 2024). Two kinds of noise can be added while training: dropout
# of channels between the convolutions of a block, and stochastic depth (Huang et al., ECCV 2016), which leaves out the
# body of a block for some samples, more often in deeper blocks.

# %%
#| export
def _layers(plan: NetworkPlan) -> dict[str, str]:
    "Norm and activation for blocks; they know groups of 8 only, so group norm starts as one group and is divided later"
    return {"norm": "layer" if plan.norm == "group" else plan.norm, "act": plan.nonlin}

class _Block(ResidualBlock):
    "Residual block with dropout and stochastic depth"
    def __init__(self, c_in: int, c_out: int, dropout: float, skipped: float, **kwargs):
        super().__init__(c_in, c_out, **kwargs)
        self.skipped = skipped
        if dropout: self.body.insert(1, nn.Dropout3d(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.gate(self.body(x)) # (b, c_out, z, y, x)
        if self.skipped and self.training: # kept samples are scaled so that the mean stays
            change = change*F.dropout(change.new_ones(len(x), 1, 1, 1, 1), self.skipped, True)
        return self.act(change + self.shortcut(x))

class ResidualEncoder(nn.Module):
    "Stem and levels of residual blocks"
    def __init__(
        self,
        plan: NetworkPlan, # channels, strides, kernels and blocks of the levels
        in_channels: int = 1, # of the image
        dropout: float = 0.0, # of channels inside a block
        stochastic_depth: float = 0.0, # of the last block; rises linearly
    ):
        super().__init__()
        shared = _layers(plan)
        self.stem = ConvBlock(in_channels, plan.features[0], kernel=plan.kernels[0], **shared)
        last, done = max(1, sum(plan.blocks) - 1), 0
        levels, c_in = [], plan.features[0]
        for c, stride, kernel, n in zip(plan.features, plan.strides, plan.kernels, plan.blocks):
            blocks = [_Block(c_in if k == 0 else c, c, dropout, stochastic_depth*(done + k)/last, kernel=kernel,
                             stride=stride if k == 0 else 1, se=plan.se, se_reduction=plan.se_reduction,
                             se_divisor=plan.se_divisor, **shared) for k in range(n)]
            levels.append(nn.Sequential(*blocks))
            c_in, done = c, done + n
        self.levels = nn.ModuleList(levels)

    def forward(
        self,
        x: torch.Tensor, # (b, c, z, y, x)
    ) -> list[torch.Tensor]: # (b, features[k], *size[k]) for each level k, finest first
        "Features of all levels"
        x, found = self.stem(x), []
        for level in self.levels: found.append(x := level(x))
        return found

# %% [markdown]
# ## The reference's own parts
# The preset `seed` rebuilds the first revision: normalisation before convolution, a residual that starts after the 1×1
# convolution, and concurrent squeeze-excite after the activation. Its up-sampling makes $2n-1$ voxels of $n$ and
# stretches them to the size of the skip by nearest neighbour, which shifts features by up to half a voxel. It is kept
# for trained weights; new networks have no reason to use it.

# %%
#| export
class SeedBlock(nn.Module):
    "Residual block of the reference's first revision"
    def __init__(
        self,
        c_in: int, # input channels
        c_out: int, # output channels
        plan: NetworkPlan, # norm, activation and squeeze-excite
    ):
        super().__init__()
        self.first = conv(3, c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.body = nn.Sequential(ConvBlock(c_out, c_out, order="nca", **_layers(plan)),
                                  ConvBlock(c_out, c_out, order="nc", **_layers(plan)))
        self.act = activation(plan.nonlin)
        self.gate = excite_layer(plan.se, c_out, reduction=plan.se_reduction, divisor=plan.se_divisor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) # (b, c_out, z, y, x)
        return self.gate(self.act(self.body(x) + x)) # (b, c_out, z, y, x)

class SeedEncoder(nn.Module):
    "One block a level with max-pooling between"
    def __init__(
        self,
        plan: NetworkPlan, # channels of the levels
        in_channels: int = 1, # of the image
    ):
        super().__init__()
        pairs = zip((in_channels, *plan.features), plan.features)
        self.levels = nn.ModuleList(SeedBlock(a, b, plan) for a, b in pairs)

    def forward(
        self,
        x: torch.Tensor, # (b, c, z, y, x)
    ) -> list[torch.Tensor]: # (b, features[k], *size[k]) for each level k, finest first
        "Features of all levels"
        found = [self.levels[0](x)]
        for level in self.levels[1:]: found.append(level(F.max_pool3d(found[-1], 2)))
        return found

class SeedUp(nn.Module):
    "Up-sample to 2n - 1, stretch, add the skip, one block"
    def __init__(
        self,
        c_in: int, # channels of the coarse input
        c_out: int, # channels of the skip and the output
        plan: NetworkPlan, # norm, activation and squeeze-excite
    ):
        super().__init__()
        self.up = conv_transpose(3, c_in, c_out, 2, 3, padding=1, bias=False)
        self.block = SeedBlock(c_out, c_out, plan)

    def forward(
        self,
        x: torch.Tensor, # (b, c_in, *m) coarse
        skip: torch.Tensor, # (b, c_out, *n) fine
    ) -> torch.Tensor: # (b, c_out, *n)
        "Decode one level"
        return self.block(F.interpolate(self.up(x), size=skip.shape[2:], mode="nearest") + skip)

# %% [markdown]
# ## The decoder
# From coarse to fine, one step a level. Transposed convolutions have kernel = stride, so that $n$ voxels become exactly
# $s\,n$ and nothing is resized; skips are concatenated.

# %%
#| export
class Decoder(nn.Module):
    "Steps from the coarsest level to the finest"
    def __init__(
        self,
        plan: NetworkPlan, # channels and strides of the levels
        n_convs: int = 1, # convolutions a step
    ):
        super().__init__()
        f = plan.features
        if plan.preset == "seed": steps = [SeedUp(f[k + 1], f[k], plan) for k in range(len(f) - 1)]
        else:
            steps = [UpBlock(f[k + 1], f[k], f[k], scale=plan.strides[k + 1], kernel=plan.kernels[k], n_convs=n_convs,
                             **_layers(plan)) for k in range(len(f) - 1)]
        self.steps = nn.ModuleList(steps)

    def forward(
        self,
        features: Sequence[torch.Tensor], # (b, c[k], *size[k]) for each level k, finest first
    ) -> list[torch.Tensor]: # (b, c[k], *size[k]) for each level but the last, finest first
        "Merge the levels"
        x, found = features[-1], []
        for step, skip in zip(reversed(self.steps), reversed(features[:-1])): found.append(x := step(x, skip))
        return found[::-1]

# %% [markdown]
# ## The whole network
# With `decoder: separate` each target has a decoder of its own, with `shared` only a head, which costs about two thirds
# of the time of two decoders. Deep supervision adds heads at the coarser decoder levels, all but the two coarsest; they
# answer in training only, so that the graph of an evaluated network has one head a target.

# %%
#| export
class MultiTaskUNet(nn.Module):
    "Encoder with decoders and heads for named targets"
    def __init__(
        self,
        plan: NetworkPlan, # the network in numbers
        targets: Mapping[str, Target], # what is predicted, with kinds filled in
        in_channels: int = 1, # of the image
        *,
        decoder: str = "separate", # "separate" or "shared"
        decoder_convs: int = 1, # convolutions of a decoder step
        dropout: float = 0.0, # of channels inside a block
        stochastic_depth: float = 0.0, # of the last block
        deep_supervision: bool = False, # heads at coarser levels, too
    ):
        super().__init__()
        self.plan, self.targets, self.in_channels = plan, dict(targets), in_channels
        self.encoder = SeedEncoder(plan, in_channels) if plan.preset == "seed" else \
            ResidualEncoder(plan, in_channels, dropout, stochastic_depth)
        names = ["shared"] if decoder == "shared" else [f"to_{t}" for t in targets]
        self.decoders = nn.ModuleDict({n: Decoder(plan, decoder_convs) for n in names})
        depth = max(1, len(plan.features) - 3) if deep_supervision else 1
        self.heads = nn.ModuleDict({
            f"to_{name}": nn.ModuleList(conv(3, c, t.channels, 1) for c in plan.features[:depth])
            for name, t in targets.items()})
        for layer in self.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.num_groups = plan.groups if layer.num_channels >= plan.groups else 1

    def check_size(
        self,
        shape: Sequence[int], # (b, c, z, y, x) of an input
    ) -> None:
        "Refuse inputs that the network cannot take, and say which it can"
        if len(shape) != 5 or shape[1] != self.in_channels:
            raise DataError(f"network: needs (b, {self.in_channels}, z, y, x), got {tuple(shape)}")
        if problem := size_problem(shape[2:], self.plan): raise DataError(f"network: {problem}")

    def forward(
        self,
        x: torch.Tensor, # (b, c, z, y, x)
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]: # (b, c_t, z, y, x); lists if deeply supervised in training
        "Logits of every target, lists with the finest first"
        self.check_size(x.shape)
        features = self.encoder(x)
        decoded = {name: decoder(features) for name, decoder in self.decoders.items()}
        out = {}
        for name in self.targets:
            levels, heads = decoded["shared" if "shared" in decoded else f"to_{name}"], self.heads[f"to_{name}"]
            if self.training and len(heads) > 1: out[name] = [head(f) for head, f in zip(heads, levels)]
            else: out[name] = heads[0](levels[0]) # (b, c_t, z, y, x)
        return out

    def predict(
        self,
        x: torch.Tensor, # (b, c, z, y, x)
        override: Mapping[str, str] | None = None, # target -> activation instead of its own
    ) -> dict[str, torch.Tensor]: # (b, c_t, z, y, x) for each target
        "Probabilities, unit vectors or values of every target"
        out = {name: y[0] if isinstance(y, list) else y for name, y in self(x).items()}
        return {name: activate(y, (override or {}).get(name, t.activation), t.kind) for (name, t), y in
                zip(self.targets.items(), out.values())}

def activate(
    logits: torch.Tensor, # (b, c, ...) float
    activation: str, # "none", "sigmoid" or "softmax"
    kind: str = "raw", # of the target; "normals" become unit vectors, zero stays zero
) -> torch.Tensor: # (b, c, ...)
    "Turn logits into what they stand for"
    if kind == "normals": return F.normalize(logits, dim=1, eps=1e-6)
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(1) if activation == "softmax" else logits

# %%
targets = {"sheet": Target(channels=1, activation="sigmoid"), "normals": Target(channels=3)}
targets = {name: t.resolved(name, TrainParams()) for name, t in targets.items()}
small = NetworkConfig(f_maps=(8, 16, 16, 32, 32), blocks_per_level=1)
net = MultiTaskUNet(plan_network(small), targets, deep_supervision=True)
x = torch.from_numpy(rng_for(0, "image").normal(size=(2, 1, 16, 48, 32))).float()
{name: [tuple(y.shape) for y in ys] for name, ys in net(x).items()}

# %% [markdown]
# Every parameter gets a gradient, no weight is stored twice, and `forward` never applies an activation: that is what
# `predict` is for.

# %%
sum(y.square().sum() for ys in net(x).values() for y in ys).backward()
assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
assert len({p.data_ptr() for p in net.state_dict().values()}) == len(net.state_dict())
net.eval()
logits, out = net(x), net.predict(x)
assert torch.equal(out["sheet"], torch.sigmoid(logits["sheet"]))
assert torch.allclose(out["normals"].norm(dim=1), torch.ones(2, 16, 48, 32), atol=1e-5)

# %%
with raises(DataError, match="axis z: 20 is not divisible by 16, the nearest legal sizes are 16 and 32"):
    net(torch.zeros(1, 1, 20, 48, 32))
with raises(DataError, match=r"needs \(b, 1, z, y, x\), got \(1, 2, 16, 16, 16\)"): net(torch.zeros(1, 2, 16, 16, 16))

# %% [markdown]
# ## From settings to weights
# Weights are drawn by He's rule from a stream named by the seed, so that the same settings give the same network.

# %%
#| export
def _assemble(cfg: ZarrConfig | NetworkConfig, targets: Mapping[str, Target] | None, in_channels: int | None,
              patch_size: Sequence[int] | None) -> MultiTaskUNet:
    "The network of some settings, on torch's current device, with torch's own weights"
    run = isinstance(cfg, ZarrConfig)
    net, tr = (cfg.network, cfg.tr_params) if run else (cfg, TrainParams())
    wanted = cfg.dataset_config.in_channels if run else None
    if None not in (wanted, in_channels) and wanted != in_channels:
        raise ConfigError(f"dataset_config.in_channels: {wanted}, but the input has {in_channels}")
    if run and targets is None: targets = cfg.targets
    if run and patch_size is None: patch_size = tr.patch_size
    if not targets: raise ConfigError("targets: a network needs at least one")
    return MultiTaskUNet(plan_network(net, patch_size), {n: t.resolved(n, tr) for n, t in targets.items()},
                         in_channels or wanted or 1, decoder=net.decoder, decoder_convs=net.decoder_convs,
                         dropout=net.dropout, stochastic_depth=net.stochastic_depth,
                         deep_supervision=tr.deep_supervision)

def build_model(
    cfg: ZarrConfig | NetworkConfig, # settings of a run, or of the network alone
    targets: Mapping[str, Target] | None = None, # what is predicted; default: those of the run
    in_channels: int | None = None, # of the image; default: what the settings say, or 1
    *,
    patch_size: Sequence[int] | None = None, # (z, y, x) [voxel], for the preset auto; default: that of the run
    seed: int | None = None, # of the weights; default: that of the run, or 0
) -> MultiTaskUNet: # on the CPU
    "Build a network and draw its weights"
    if isinstance(cfg, ZarrConfig):
        seed, limit = cfg.tr_params.seed if seed is None else seed, cfg.network.vram_max_gb
        if limit is not None and (need := estimate_memory(cfg, targets=targets, in_channels=in_channels)) > limit*1e9:
            raise ConfigError(f"model_config.vram_max_gb: training needs about {need/1e9:.1f} GB, allowed are "
                              f"{limit:g}. Make patch_size, batch_size or f_maps smaller, or decoder shared")
    model = _assemble(cfg, targets, in_channels, patch_size)
    return init_weights(model, model.plan.nonlin, generator=torch_rng_for(seed or 0, "model"))

# %% [markdown]
# ## What it will cost
# Multiply-adds follow from shapes. Memory is found by running a step on tensors without content and adding up what is
# alive: activations kept for the backward pass, gradients as they come, and what every operation makes on its way. To
# the peak come weights, the two moments of Adam, the average of the weights if there is one, and under mixed precision
# the half-size copies of the weights. What the libraries of a GPU need as scratch is not in it.

# %%
#| export
class _Live(TorchDispatchMode):
    "Adds up the bytes of all tensors that are made and still alive"
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor) or (key := (store := t.untyped_storage())._cdata) in self.sizes: continue
            self.sizes[key] = store.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(store, self._free, key)
        return out

    def _free(self, key: int) -> None: self.now -= self.sizes.pop(key)

def _step(model: MultiTaskUNet, x: torch.Tensor) -> None:
    "Forward and backward pass with a loss in full precision"
    total = 0
    for ys in model(x).values():
        for y in ys if isinstance(ys, list) else [ys]: total = total + torch.sigmoid(y.float()).square().sum()
    total.backward()

def estimate_memory(
    cfg: ZarrConfig | NetworkConfig, # settings of a run, or of the network alone
    precision: str | None = None, # "fp32", "bf16", "fp16" or "auto" (16 bits); default: that of the run, or "auto"
    *,
    targets: Mapping[str, Target] | None = None, # default: those of the run
    in_channels: int | None = None, # default: what the settings say, or 1
    patch_size: Sequence[int] | None = None, # (z, y, x) [voxel]; default: that of the run
    batch_size: int | None = None, # default: that of the run, or 1
    training: bool = True, # False: of a prediction
) -> int: # [byte]
    "Peak of the tensors on a device in a training step, or in a prediction"
    tr = cfg.tr_params if isinstance(cfg, ZarrConfig) else TrainParams(batch_size=1)
    if patch_size is None and not isinstance(cfg, ZarrConfig): raise ConfigError("patch_size: is needed")
    with torch.device("meta"): model = _assemble(cfg, targets, in_channels, patch_size)
    patch_size = model.plan.patch_size or tuple(patch_size or tr.patch_size)
    half = (precision or tr.precision) != "fp32"
    weights = 4*count_parameters(model)
    if half: model = model.bfloat16()
    x = torch.empty(batch_size or tr.batch_size, model.in_channels, *patch_size, device="meta",
                    dtype=torch.bfloat16 if half else torch.float32)
    with _Live() as live:
        if training: _step(model, x)
        else:
            with torch.no_grad(): model.eval().predict(x)
    total = live.peak + x.nbytes + weights + (weights//2 if half else 0)
    if not training: return total
    return total + 2*weights + (weights//2 if half else 0) + (weights if tr.ema_decay else 0)

# %%
sizes = [32, 48, 64]
fig, ax = plt.subplots(figsize=(5, 2.4))
for precision in ("fp32", "bf16"):
    need = [estimate_memory(small, precision, targets=targets, patch_size=(n, n, n)) for n in sizes]
    ax.plot(sizes, [b/1e6 for b in need], "o-", label=precision)
ax.set(xlabel="edge of the patch [voxel]", ylabel="training step [MB]")
ax.legend();

# %% [markdown]
# What is counted without content is what a real step holds:

# %%
net = build_model(small, targets)
x = torch.zeros(1, 1, 32, 32, 32)
with _Live() as live: _step(net, x)
counted = estimate_memory(small, "fp32", targets=targets, patch_size=(32, 32, 32))
assert counted == live.peak + x.nbytes + 3*4*count_parameters(net)
assert estimate_memory(small, "fp32", targets=targets, patch_size=(32, 32, 32), training=False) < counted/3

# %% [markdown]
# The table of a network shows where the time and the memory go: to the finest level.

# %%
#| export
@dataclass(frozen=True)
class LevelCost:
    "What one part of a network costs"
    part: str # such as "encoder 0" or "to_sheet 2"
    shape: tuple[int, ...] # (b, c, z, y, x) of its output
    parameters: int # weights and biases
    gflop: float # of a forward pass, 2 for a multiply-add
    megabytes: float # kept for the backward pass

def _kept(module: nn.Module, *shapes: Sequence) -> int:
    "Bytes that a forward pass leaves for the backward pass"
    args = [torch.empty(s, device="meta") for s in shapes]
    with _Live() as live:
        out = torch.func.functional_call(module, _weightless(module), tuple(args), tie_weights=False)
        return live.now if out is not None else 0

def level_costs(
    model: MultiTaskUNet, # any device
    patch_size: Sequence[int] | None = None, # (z, y, x) [voxel]; default: that of its plan
    batch_size: int = 1, # patches
) -> list[LevelCost]: # in the order of the forward pass
    "Costs of every level of encoder, decoders and heads"
    size = tuple(patch_size or model.plan.patch_size or ())
    model.check_size((batch_size, model.in_channels, *size))
    found = []
    def add(part: str, module: nn.Module, channels: int, size: Sequence[int], *shapes: Sequence[int]) -> tuple:
        out = (batch_size, channels, *size)
        found.append(LevelCost(part, out, count_parameters(module), 2*conv_flops(module, *shapes)/1e9,
                               _kept(module, *shapes)/1e6))
        return out
    plan, encoder = model.plan, model.encoder
    shape, features = (batch_size, model.in_channels, *size), []
    if hasattr(encoder, "stem"): shape = add("stem", encoder.stem, plan.features[0], size, shape)
    for k, (level, c, stride) in enumerate(zip(encoder.levels, plan.features, plan.strides)):
        size = tuple(n//s for n, s in zip(size, stride))
        if plan.preset == "seed": shape = (*shape[:2], *size) # the pooling before the level
        features.append(shape := add(f"encoder {k}", level, c, size, shape))
    for name, decoder in model.decoders.items():
        below = features[-1]
        for k in reversed(range(len(decoder.steps))):
            below = add(f"{name} {k}", decoder.steps[k], plan.features[k], features[k][2:], below, features[k])
    for name, heads in model.heads.items():
        for k, head in enumerate(heads):
            add(f"head {name} {k}", head, head.out_channels, features[k][2:], features[k])
    return found

def summary(
    model: MultiTaskUNet, # any device
    patch_size: Sequence[int] | None = None, # (z, y, x) [voxel]; default: that of its plan
    batch_size: int = 1, # patches
) -> str: # a line for each level, and the sums
    "Table of what a network costs"
    rows = level_costs(model, patch_size, batch_size)
    lines = [f"{'part':<20}{'output':<28}{'parameters':>12}{'GFLOP':>10}{'MB kept':>10}"]
    lines += [f"{r.part:<20}{str(r.shape):<28}{r.parameters:>12,}{r.gflop:>10.2f}{r.megabytes:>10.1f}" for r in rows]
    lines.append(f"{'sum':<48}{sum(r.parameters for r in rows):>12,}{sum(r.gflop for r in rows):>10.2f}"
                 f"{sum(r.megabytes for r in rows):>10.1f}")
    return "\n".join(lines)

# %%
print(summary(net, (32, 32, 32)))

# %%
costs = level_costs(net, (32, 32, 32))
assert sum(r.parameters for r in costs) == count_parameters(net)
assert abs(sum(r.gflop for r in costs) - 2*conv_flops(net, (1, 1, 32, 32, 32))/1e9) < 1e-9

# %% [markdown]
# ## Separate or shared, and the reference's network
# At the widths of the reference's shorter example, the shared decoder takes two thirds of the arithmetic of two. And
# the preset `seed` has exactly the parameters of the first revision, less its decoder that nothing ever reached.

# %%
widths = (32, 64, 128, 256)
with torch.device("meta"):
    nets = {d: _assemble(NetworkConfig(f_maps=widths, blocks_per_level=1, se="cse", decoder=d), targets, 1, None)
            for d in ("separate", "shared")}
    seeds = {n: _assemble(NetworkConfig(preset="seed", f_maps=w), targets, 1, None)
             for n, w in (("4 levels", widths), ("6 levels", (32, 64, 128, 256, 320, 528)))}
shape = (1, 1, 64, 64, 64)
[(n, f"{count_parameters(m)/1e6:.2f} million parameters, {2*conv_flops(m, shape)/1e9:.1f} GFLOP")
 for n, m in {**nets, **seeds}.items()]

# %%
assert conv_flops(nets["shared"], shape) < 0.67*conv_flops(nets["separate"], shape)
assert count_parameters(seeds["4 levels"]) == 9_655_278 and count_parameters(seeds["6 levels"]) == 63_623_668

# %% [markdown]
# ## Putting it together
# The same seed gives the same weights; a few steps on noise with a bright sheet show that both tasks learn at once.

# %%
again = build_model(small, targets)
assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
z = torch.arange(32).view(1, 1, -1, 1, 1).expand(1, 1, 32, 32, 16)
sheet = (z//8 == 1).float()
image = sheet + 0.3*torch.from_numpy(rng_for(1, "noise").normal(size=sheet.shape)).float()
up = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1, 1)
optimizer, curves = torch.optim.AdamW(net.parameters(), 3e-3), {"sheet": [], "normals": []}
for _ in range(30):
    out = net(image)
    parts = {"sheet": F.binary_cross_entropy_with_logits(out["sheet"], sheet),
             "normals": (1 - F.cosine_similarity(out["normals"], up))[sheet[:, 0] > 0].mean()}
    optimizer.zero_grad()
    sum(parts.values()).backward()
    optimizer.step()
    for name, value in parts.items(): curves[name].append(value.item())
fig, ax = plt.subplots(figsize=(5, 2.2))
for name, values in curves.items(): ax.plot(values, label=name)
ax.set(xlabel="step", ylabel="loss")
ax.legend();

# %%
assert all(values[-1] < 0.6*values[0] for values in curves.values())
