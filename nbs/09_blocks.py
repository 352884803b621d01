# %% [markdown]
# # Blocks
#
# > Convolution, residual, squeeze-excite, up-sampling and pyramid blocks in two and three dimensions.
#
# The U-Net, the embedding network and the contrastive network of this library are built from the same dozen parts.
# Written three times they differ in small ways: padding that loses a voxel at odd sizes, an up-sampling that shifts
# features by half a voxel, a skip connection that resizes in silence. Here is each part once, for images and volumes
# alike: `dims` is 2 or 3, and sizes, kernels and strides are one number or one an axis. Wrong settings are a
# `ConfigError` when the network is built; sizes that do not fit are a `DataError` when it runs.

# %%
#| default_exp blocks

# %%
#| export
import difflib
import itertools
import math
import numbers
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medvol_nb.core import ConfigError, DataError

# %%
import time

import matplotlib.pyplot as plt

from medvol_nb.core import raises, rng_for

# %% [markdown]
# ## Convolutions by dimension
# With an odd kernel and padding `(kernel - 1)/2` a convolution of stride $s$ turns size $n$ into $\lceil n/s\rceil$,
# for every $n \ge 1$: nothing is cut off, and the first voxel of the output sits on the first voxel of the input.
# Transposed convolutions use kernel = stride unless told otherwise: exactly $s\,n$ voxels, each made from one, without
# the chequered pattern of overlapping kernels.

# %%
#| export
def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value in allowed: return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    raise ConfigError(f"{name}: must be one of {', '.join(map(repr, allowed))}, got {value!r}" +
                      (f". Did you mean {near[0]!r}?" if near else ""))

def _axes(name: str, value: Any, dims: int) -> tuple[int, ...]:
    "A whole number >= 1 for each axis, from one number or a sequence"
    if dims not in (2, 3): raise ConfigError(f"dims: must be 2 or 3, got {dims!r}")
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)*dims
    if len(values) != dims or not all(isinstance(v, numbers.Integral) and v >= 1 for v in values):
        raise ConfigError(f"{name}: a whole number >= 1, or {dims} of them, is needed, got {value!r}")
    return tuple(int(v) for v in values)

def _channels(name: str, *values: int) -> None:
    if not all(isinstance(v, numbers.Integral) and v >= 1 for v in values):
        raise ConfigError(f"{name}: channels must be whole numbers >= 1, got {', '.join(map(repr, values))}")

def _class(name: str, dims: int) -> type[nn.Module]: return getattr(nn, f"{name}{dims}d")

# %%
#| export
def conv(
    dims: int, # 2 or 3
    c_in: int, # input channels
    c_out: int, # output channels
    kernel: int | Sequence[int] = 3, # [voxel]
    stride: int | Sequence[int] = 1, # [voxel]
    *,
    dilation: int | Sequence[int] = 1, # distance of the kernel's taps [voxel]
    groups: int = 1, # divides both channel counts
    bias: bool = True, # add a learned constant
) -> nn.Module: # (b, c_in, *n) -> (b, c_out, *ceil(n/stride)) for odd kernels
    "Convolution that keeps sizes, up to the stride"
    kernel, stride = _axes("kernel", kernel, dims), _axes("stride", stride, dims)
    dilation = _axes("dilation", dilation, dims)
    _channels("conv", c_in, c_out, groups)
    if c_in % groups or c_out % groups:
        raise ConfigError(f"groups: {groups} does not divide {c_in} and {c_out} channels")
    padding = tuple(d*(k - 1)//2 for d, k in zip(dilation, kernel))
    return _class("Conv", dims)(c_in, c_out, kernel, stride, padding, dilation, groups, bias)

def conv_transpose(
    dims: int, # 2 or 3
    c_in: int, # input channels
    c_out: int, # output channels
    stride: int | Sequence[int] = 2, # [voxel]
    kernel: int | Sequence[int] | None = None, # [voxel]; None: as `stride`
    *,
    padding: int | Sequence[int] = 0, # voxels cut from both ends
    bias: bool = True, # add a learned constant
) -> nn.Module: # (b, c_in, *n) -> (b, c_out, *stride*n) for kernel = stride
    "Transposed convolution"
    _channels("conv_transpose", c_in, c_out)
    stride = _axes("stride", stride, dims)
    kernel = stride if kernel is None else _axes("kernel", kernel, dims)
    return _class("ConvTranspose", dims)(c_in, c_out, kernel, stride, padding, bias=bias)

# %%
def tensor(*shape): return torch.from_numpy(rng_for(0, "blocks", *shape).normal(size=shape)).float()

[(n, tuple(conv(3, 1, 4, stride=(1, 2, 3))(tensor(1, 1, n, n, n)).shape[2:])) for n in (1, 7, 8, 9)]

# %%
for n, k, s in itertools.product((1, 2, 7, 12), (1, 3, 5), (1, 2, 3)):
    assert conv(2, 1, 1, k, s)(tensor(1, 1, n, 4)).shape[2] == -(-n//s)
    assert conv_transpose(2, 1, 1, s)(tensor(1, 1, n, 4)).shape[2] == s*n

# %%
with raises(ConfigError, match="dims: must be 2 or 3, got 4"): conv(4, 1, 1)
with raises(ConfigError, match="kernel: a whole number >= 1, or 3 of them"): conv(3, 1, 1, kernel=(3, 3))
with raises(ConfigError, match="groups: 2 does not divide"): conv(3, 3, 4, groups=2)

# %% [markdown]
# ## Normalisation and activation
# Batch statistics are noisy with the batches of one or two that volumes allow, so the default is instance
# normalisation, with learned scale and shift. `group` uses 8 groups, one group below 8 channels. `layer` normalises
# over channels and space of each sample, that is one group.

# %%
#| export
def norm_layer(
    kind: str, # "batch", "instance", "group", "layer" or "none"
    channels: int, # of the input
    dims: int = 3, # 2 or 3
    *,
    groups: int = 8, # for "group"; fewer channels than this form one group
    affine: bool = True, # learn a scale and a shift per channel
) -> nn.Module: # (b, c, *n) -> same
    "Normalisation layer"
    _one_of("norm", kind, ("batch", "instance", "group", "layer", "none"))
    _channels("norm", channels)
    _axes("dims", 1, dims)
    if kind == "none": return nn.Identity()
    if kind == "batch": return _class("BatchNorm", dims)(channels, affine=affine)
    if kind == "instance": return _class("InstanceNorm", dims)(channels, affine=affine)
    n = 1 if kind == "layer" or channels < groups else groups
    if channels % n: raise ConfigError(f"norm: {channels} channels do not divide into {n} groups")
    return nn.GroupNorm(n, channels, affine=affine)

def activation(
    kind: str, # "relu", "leaky_relu", "elu", "gelu", "silu" or "none"
    inplace: bool = False, # overwrite the input to save memory; for relu and leaky_relu only
) -> nn.Module: # (...) -> same
    "Activation function as a layer; the leaky one has slope 0.01"
    _one_of("act", kind, ("relu", "leaky_relu", "elu", "gelu", "silu", "none"))
    if kind == "relu": return nn.ReLU(inplace)
    if kind == "leaky_relu": return nn.LeakyReLU(0.01, inplace)
    return {"elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU, "none": nn.Identity}[kind]()

# %%
shifted = 5 + 3*tensor(2, 16, 6, 6, 6)
normed = {kind: norm_layer(kind, 16)(shifted) for kind in ("batch", "instance", "group", "layer", "none")}
{kind: (round(out.mean().item(), 3), round(out.std().item(), 3)) for kind, out in normed.items()}

# %%
assert torch.equal(normed.pop("none"), shifted)
for out in normed.values():
    assert abs(out.mean().item()) < 1e-4 and abs(out.std().item() - 1) < 1e-2 and out.shape == shifted.shape

# %%
with raises(ConfigError, match="got 'instence'. Did you mean 'instance'"): norm_layer("instence", 4)
with raises(ConfigError, match="12 channels do not divide into 8 groups"): norm_layer("group", 12)

# %% [markdown]
# ## The convolution block
# Convolution, normalisation, activation: letters `c`, `n`, `a` in any order. A bias before a normalisation is dead
# weight, so it is left out when the block normalises.

# %%
#| export
class ConvBlock(nn.Sequential):
    "Convolution, normalisation and activation in the order given"
    def __init__(
        self,
        c_in: int, # input channels
        c_out: int, # output channels
        *,
        dims: int = 3, # 2 or 3
        kernel: int | Sequence[int] = 3, # [voxel]
        stride: int | Sequence[int] = 1, # [voxel]
        norm: str = "instance", # see `norm_layer`
        act: str = "leaky_relu", # see `activation`
        order: str = "cna", # c convolution, n normalisation, a activation; n and a may be left out
        bias: bool | None = None, # None: only if nothing normalises
    ):
        if not isinstance(order, str) or set(order) - set("cna") or "c" not in order or len(set(order)) != len(order):
            raise ConfigError(f"order: 'c' once, 'n' and 'a' at most once, got {order!r}")
        if bias is None: bias = norm == "none" or "n" not in order
        before = order[:max(order.find("a"), 0)]
        fresh = "c" in before or ("n" in before and norm != "none")
        layers = {"c": ("conv", conv(dims, c_in, c_out, kernel, stride, bias=bias)),
                  "n": ("norm", norm_layer(norm, c_in if order.find("n") < order.find("c") else c_out, dims)),
                  "a": ("act", activation(act, inplace=fresh))}
        super().__init__(OrderedDict(layers[letter] for letter in order))

# %%
ConvBlock(1, 8, stride=2)

# %%
assert ConvBlock(1, 8, norm="none").conv.bias is not None and ConvBlock(1, 8).conv.bias is None
assert ConvBlock(8, 16, norm="group", order="nca").norm.num_channels == 8
with raises(ConfigError, match="'c' once"): ConvBlock(1, 8, order="nan")

# %% [markdown]
# ## Squeeze and excite
# A channel may matter in one image and not in the next. Squeeze-excite (Hu, Shen and Sun, CVPR 2018) averages each
# channel over space, passes the averages through two small fully connected layers, and multiplies the channels with the
# resulting gates in (0, 1):
# $$y = x\cdot\sigma\big(W_2\,\mathrm{relu}(W_1\,\bar x)\big).$$
# The spatial form gates voxels instead of channels, the concurrent form takes the larger of both (Roy, Navab and
# Wachinger, MICCAI 2018).

# %%
#| export
class SqueezeExcite(nn.Module):
    "Weigh the channels by what the whole image holds"
    def __init__(
        self,
        channels: int, # of the input
        reduction: float = 16, # hidden channels = channels/reduction, rounded to a multiple of `divisor`
        dims: int = 3, # 2 or 3
        *,
        divisor: int = 1, # smallest hidden width, and its steps
    ):
        super().__init__()
        if not reduction > 0: raise ConfigError(f"reduction: must be > 0, got {reduction!r}")
        _channels("squeeze-excite", channels, divisor)
        hidden = max(divisor, int(channels/reduction + divisor/2)//divisor*divisor)
        self.squeeze, self.excite = conv(dims, channels, hidden, 1), conv(dims, hidden, channels, 1)

    def gate(
        self,
        x: torch.Tensor, # (b, c, *n)
    ) -> torch.Tensor: # (b, c, *1) in (0, 1)
        "Weight of each channel"
        mean = x.mean(tuple(range(2, x.ndim)), keepdim=True) # (b, c, *1)
        return torch.sigmoid(self.excite(F.relu(self.squeeze(mean)))) # (b, c, *1)

    def forward(self, x: torch.Tensor) -> torch.Tensor: return x*self.gate(x) # (b, c, *n)

class SpatialSqueezeExcite(nn.Module):
    "Weigh the voxels by what their channels hold"
    def __init__(
        self,
        channels: int, # of the input
        dims: int = 3, # 2 or 3
    ):
        super().__init__()
        self.excite = conv(dims, channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor: return x*torch.sigmoid(self.excite(x)) # (b, c, *n)

class ConcurrentSqueezeExcite(nn.Module):
    "The larger of channel-wise and spatial squeeze-excite"
    def __init__(
        self,
        channels: int, # of the input
        reduction: float = 16, # see `SqueezeExcite`
        dims: int = 3, # 2 or 3
        *,
        divisor: int = 1, # see `SqueezeExcite`
    ):
        super().__init__()
        self.channel = SqueezeExcite(channels, reduction, dims, divisor=divisor)
        self.spatial = SpatialSqueezeExcite(channels, dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(self.channel(x), self.spatial(x)) # (b, c, *n)

def excite_layer(
    kind: str, # "cse" channels, "sse" voxels, "scse" both, or "none"
    channels: int, # of the input
    dims: int = 3, # 2 or 3
    *,
    reduction: float = 16, # see `SqueezeExcite`
    divisor: int = 1, # see `SqueezeExcite`
) -> nn.Module: # (b, c, *n) -> same
    "Squeeze-excite layer by name"
    _one_of("se", kind, ("none", "cse", "sse", "scse"))
    if kind == "none": return nn.Identity()
    if kind == "sse": return SpatialSqueezeExcite(channels, dims)
    return (SqueezeExcite if kind == "cse" else ConcurrentSqueezeExcite)(channels, reduction, dims, divisor=divisor)

# %%
se = SqueezeExcite(32)
x = tensor(2, 32, 5, 6, 7)
gate = se.gate(x)
tuple(gate.shape), round(gate.min().item(), 3), round(gate.max().item(), 3), se.squeeze.out_channels

# %%
assert 0 < gate.min().item() and gate.max().item() < 1
assert torch.allclose(se(x), x*gate) and torch.allclose(se.gate(x), se.gate(x.flip(2)), atol=1e-6)
assert SqueezeExcite(40, divisor=8).squeeze.out_channels == 8
with raises(ConfigError, match="Did you mean 'scse'"): excite_layer("scs", 8)

# %% [markdown]
# ## Residual blocks
# A block that learns a correction to its input is easier to train than one that learns the whole map (He et al., CVPR
# 2016). Where sizes or channels change, the input must change as well. A strided 1×1 convolution would look at one
# voxel in eight and drop the rest; the default here averages first, then changes channels (the "ResNet-D" of He et al.,
# CVPR 2019, used by nnU-Net's residual encoders). At odd sizes the last average takes the voxels that there are, so
# that both paths agree for every size.
#
# With `zero_init` the last normalisation starts at scale 0: the block begins as the identity, up to the activation
# (Goyal et al., 2017).

# %%
#| export
class _Average(nn.Module):
    "Mean of blocks of `stride` voxels; the last block of an axis takes what is left"
    def __init__(self, stride: tuple[int, ...]):
        super().__init__()
        self.stride = stride

    def extra_repr(self) -> str: return f"stride={self.stride}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = F.avg_pool2d if len(self.stride) == 2 else F.avg_pool3d
        size = tuple(min(s, n) for s, n in zip(self.stride, x.shape[2:]))
        return pool(x, size, size, ceil_mode=True, count_include_pad=False) # (b, c, *ceil(n/stride))

def shortcut(
    c_in: int, # input channels
    c_out: int, # output channels
    dims: int = 3, # 2 or 3
    stride: int | Sequence[int] = 1, # [voxel]
    kind: str = "pool", # "pool": average, then 1x1 convolution; "conv": strided 1x1 convolution
    norm: str = "instance", # see `norm_layer`
) -> nn.Module: # (b, c_in, *n) -> (b, c_out, *ceil(n/stride)); the identity if nothing changes
    "Path of the input around a residual block"
    stride = _axes("stride", stride, dims)
    _one_of("shortcut", kind, ("pool", "conv"))
    layers, strided = [], max(stride) > 1
    if kind == "pool" and strided:
        layers.append(("pool", _Average(stride)))
    if c_in != c_out or (kind == "conv" and strided):
        step = stride if kind == "conv" else 1
        layers.append(("conv", ConvBlock(c_in, c_out, dims=dims, kernel=1, stride=step, norm=norm, order="cn")))
    return nn.Sequential(OrderedDict(layers)) if layers else nn.Identity()

class _Residual(nn.Module):
    "Body and gate, plus shortcut, then activation"
    def __init__(self, body: nn.Module, gate: nn.Module, around: nn.Module, act: str, zero_init: bool):
        super().__init__()
        self.body, self.gate, self.shortcut, self.act = body, gate, around, activation(act, inplace=True)
        if zero_init:
            scale = getattr(body[-1].norm, "weight", None)
            if scale is None:
                raise ConfigError("zero_init: needs a normalisation with a learned scale, got norm='none'")
            nn.init.zeros_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.gate(self.body(x)) + self.shortcut(x)) # (b, c_out, *ceil(n/stride))

def _odd(kernel: tuple[int, ...]) -> None:
    if any(k % 2 == 0 for k in kernel):
        raise ConfigError(f"kernel: must be odd, so that sizes are kept, got {kernel}")

class ResidualBlock(_Residual):
    "Two convolutions with a way around them"
    def __init__(
        self,
        c_in: int, # input channels
        c_out: int, # output channels
        *,
        dims: int = 3, # 2 or 3
        kernel: int | Sequence[int] = 3, # odd [voxel]
        stride: int | Sequence[int] = 1, # of the first convolution [voxel]
        norm: str = "instance", # see `norm_layer`
        act: str = "leaky_relu", # see `activation`
        se: str = "none", # see `excite_layer`
        se_reduction: float = 16, # see `SqueezeExcite`
        se_divisor: int = 1, # see `SqueezeExcite`
        around: str = "pool", # kind of `shortcut`
        zero_init: bool = False, # start as the identity
    ):
        _odd(_axes("kernel", kernel, dims))
        body = nn.Sequential(
            ConvBlock(c_in, c_out, dims=dims, kernel=kernel, stride=stride, norm=norm, act=act), # (b, c_out, *m)
            ConvBlock(c_out, c_out, dims=dims, kernel=kernel, norm=norm, order="cn")) # m = ceil(n/stride)
        gate = excite_layer(se, c_out, dims, reduction=se_reduction, divisor=se_divisor)
        super().__init__(body, gate, shortcut(c_in, c_out, dims, stride, around, norm), act, zero_init)

class BottleneckBlock(_Residual):
    "1x1, kernel, 1x1 convolutions with a way around them; the middle one is narrow and carries the stride"
    def __init__(
        self,
        c_in: int, # input channels
        c_out: int, # output channels
        *,
        expansion: int = 4, # the middle has c_out/expansion channels
        dims: int = 3, # 2 or 3
        kernel: int | Sequence[int] = 3, # of the middle convolution, odd [voxel]
        stride: int | Sequence[int] = 1, # of the middle convolution [voxel]
        norm: str = "instance", # see `norm_layer`
        act: str = "leaky_relu", # see `activation`
        se: str = "none", # see `excite_layer`
        se_reduction: float = 16, # see `SqueezeExcite`
        se_divisor: int = 1, # see `SqueezeExcite`
        around: str = "pool", # kind of `shortcut`
        zero_init: bool = False, # start as the identity
    ):
        _odd(_axes("kernel", kernel, dims))
        _channels("bottleneck", c_in, c_out, expansion)
        if c_out % expansion: raise ConfigError(f"expansion: {expansion} does not divide {c_out} channels")
        middle, shared = c_out//expansion, dict(dims=dims, norm=norm, act=act)
        body = nn.Sequential(ConvBlock(c_in, middle, kernel=1, **shared), # (b, middle, *n)
                             ConvBlock(middle, middle, kernel=kernel, stride=stride, **shared), # (b, middle, *m)
                             ConvBlock(middle, c_out, kernel=1, order="cn", **shared)) # m = ceil(n/stride)
        gate = excite_layer(se, c_out, dims, reduction=se_reduction, divisor=se_divisor)
        super().__init__(body, gate, shortcut(c_in, c_out, dims, stride, around, norm), act, zero_init)

# %%
x = tensor(2, 8, 9, 10, 11)
{f"{block.__name__} {around}": tuple(block(8, 16, stride=(1, 2, 2), around=around, se="cse")(x).shape)
 for block in (ResidualBlock, BottleneckBlock) for around in ("pool", "conv")}

# %%
for block in (ResidualBlock, BottleneckBlock):
    start = block(8, 8, zero_init=True)
    assert torch.allclose(start(x), F.leaky_relu(x, 0.01))
    assert isinstance(start.shortcut, nn.Identity)

# %%
with raises(ConfigError, match="must be odd"): ResidualBlock(8, 8, kernel=2)
with raises(ConfigError, match="needs a normalisation"): ResidualBlock(8, 8, norm="none", zero_init=True)

# %% [markdown]
# ## Up again
# Three ways lead to a finer grid: a transposed convolution with kernel = stride, linear, or nearest interpolation.
# Interpolation needs a 1×1 convolution for the channels, which goes *before* it: the two commute, and so the
# convolution runs on an eighth of the voxels.

# %%
#| export
def upsample(
    kind: str, # "transpose", "linear" or "nearest"
    dims: int, # 2 or 3
    c_in: int, # input channels
    c_out: int, # output channels
    scale: int | Sequence[int] = 2, # enlargement of each axis
) -> nn.Module: # (b, c_in, *n) -> (b, c_out, *scale*n)
    "Go to a finer grid and change the channels"
    _one_of("up", kind, ("transpose", "linear", "nearest"))
    scale = _axes("scale", scale, dims)
    if kind == "transpose": return conv_transpose(dims, c_in, c_out, scale)
    mode = {"nearest": "nearest", "linear": {2: "bilinear", 3: "trilinear"}[dims]}[kind]
    corners = False if kind == "linear" else None
    return nn.Sequential(conv(dims, c_in, c_out, 1), nn.Upsample(scale_factor=scale, mode=mode, align_corners=corners))

# %%
x = tensor(1, 6, 4, 5, 6)
for kind in ("linear", "nearest"):
    pointwise, enlarge = upsample(kind, 3, 6, 3)
    assert torch.allclose(enlarge(pointwise(x)), pointwise(enlarge(x)), atol=1e-6)
{kind: tuple(upsample(kind, 3, 6, 3, (1, 2, 2))(x).shape) for kind in ("transpose", "linear", "nearest")}

# %% [markdown]
# An encoder that halved 7 to 4 comes back as 8. Whether that may happen is a decision, and `match_size` makes it
# explicit: an error by default, or `"fit"`, which cuts or repeats the far end, the end where the stride left its
# remainder.

# %%
#| export
def match_size(
    x: torch.Tensor, # (b, c, *n)
    size: Sequence[int], # (d) wanted [voxel]
    how: str = "error", # "error", or "fit" to cut or repeat at the far end of each axis
) -> torch.Tensor: # (b, c, *size)
    "Bring a tensor to a size, or refuse"
    size = tuple(size)
    if tuple(x.shape[2:]) == size: return x
    if _one_of("fit", how, ("error", "fit")) == "error":
        raise DataError(f"size {tuple(x.shape[2:])} does not match the skip's {size}: the input must be divisible by "
                        "the product of the strides on each axis. Pad the input, or build with fit='fit'")
    x = x[(slice(None), slice(None), *(slice(n) for n in size))]
    lacking = [n - m for n, m in zip(size, x.shape[2:])]
    return F.pad(x, [v for n in reversed(lacking) for v in (0, n)], mode="replicate") if any(lacking) else x

class UpBlock(nn.Module):
    "Decoder step: up-sample, join with the skip, convolve"
    def __init__(
        self,
        c_in: int, # channels of the coarse input
        c_skip: int, # channels of the skip; the up-sampled input gets as many
        c_out: int, # output channels
        *,
        dims: int = 3, # 2 or 3
        scale: int | Sequence[int] = 2, # enlargement of each axis
        up: str = "transpose", # see `upsample`
        join: str = "concat", # "concat" or "sum"
        fit: str = "error", # see `match_size`
        n_convs: int = 1, # convolution blocks after joining
        kernel: int | Sequence[int] = 3, # odd [voxel]
        norm: str = "instance", # see `norm_layer`
        act: str = "leaky_relu", # see `activation`
    ):
        super().__init__()
        _channels("up block: c_in, c_skip, c_out, n_convs", c_in, c_skip, c_out, n_convs)
        _odd(_axes("kernel", kernel, dims))
        self.join, self.fit = _one_of("join", join, ("concat", "sum")), _one_of("fit", fit, ("error", "fit"))
        self.up = upsample(up, dims, c_in, c_skip, scale)
        widths = [c_skip*(2 if join == "concat" else 1)] + [c_out]*n_convs
        self.convs = nn.Sequential(*(ConvBlock(a, b, dims=dims, kernel=kernel, norm=norm, act=act)
                                     for a, b in zip(widths, widths[1:])))

    def forward(
        self,
        x: torch.Tensor, # (b, c_in, *m) coarse
        skip: torch.Tensor, # (b, c_skip, *n) fine
    ) -> torch.Tensor: # (b, c_out, *n)
        "Decode one level"
        x = match_size(self.up(x), skip.shape[2:], self.fit) # (b, c_skip, *n)
        x = torch.cat([x, skip], 1) if self.join == "concat" else x + skip # (b, 2*c_skip or c_skip, *n)
        return self.convs(x) # (b, c_out, *n)

# %%
coarse, skip = tensor(1, 16, 4, 4, 3), tensor(1, 8, 8, 7, 6)
tuple(UpBlock(16, 8, 8, fit="fit")(coarse, skip).shape)

# %%
assert torch.equal(match_size(coarse, (3, 4, 2), "fit"), coarse[:, :, :3, :, :2])
assert torch.equal(match_size(coarse, (5, 4, 3), "fit")[:, :, 4], coarse[:, :, 3])
with raises(DataError, match=r"size \(8, 8, 6\) does not match the skip's \(8, 7, 6\)"):
    UpBlock(16, 8, 8)(coarse, skip)

# %% [markdown]
# ## The feature pyramid
# Coarse levels know what, fine levels know where. The feature pyramid (Lin et al., CVPR 2017) sends the first down to
# the second: each level is brought to the same number of channels by a 1×1 convolution, the level above is enlarged
# (nearest) to its exact size and added, and a 3×3 convolution smooths the result. Levels whose output nobody wants get
# no output convolution, so no parameter is idle.

# %%
#| export
class FPN(nn.Module):
    "Top-down feature pyramid"
    def __init__(
        self,
        c_in: Sequence[int], # channels of the levels, finest first
        c_out: int, # channels of every output
        dims: int = 3, # 2 or 3
        *,
        kernel: int | Sequence[int] = 3, # of the output convolutions, odd [voxel]
        outputs: Sequence[int] | None = None, # levels wanted, 0 the finest, which must be among them; None: all
    ):
        super().__init__()
        if not c_in: raise ConfigError("fpn: at least one level is needed")
        self.outputs = sorted(set(range(len(c_in)) if outputs is None else outputs))
        if not self.outputs or self.outputs[0] != 0 or self.outputs[-1] >= len(c_in):
            raise ConfigError(f"fpn: outputs must hold 0 and lie below {len(c_in)}, got {outputs!r}. "
                              "Leave out finer levels by not passing them")
        _odd(_axes("kernel", kernel, dims))
        self.lateral = nn.ModuleList(conv(dims, c, c_out, 1) for c in c_in)
        self.output = nn.ModuleList(conv(dims, c_out, c_out, kernel) for _ in self.outputs)

    def forward(
        self,
        features: Sequence[torch.Tensor], # (b, c_in[i], *n[i]) for each level i, finest first
    ) -> list[torch.Tensor]: # (b, c_out, *n[i]) for each wanted level i
        "Merge the levels from coarse to fine"
        if len(features) != len(self.lateral):
            raise DataError(f"fpn: built for {len(self.lateral)} levels, got {len(features)}")
        levels = [lateral(f) for lateral, f in zip(self.lateral, features)] # (b, c_out, *n[i])
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[2:], mode="nearest")
        return [out(levels[i]) for out, i in zip(self.output, self.outputs)]

# %%
features = [tensor(1, 4, 9, 12, 7), tensor(1, 8, 5, 6, 4), tensor(1, 16, 3, 3, 2)]
[tuple(f.shape) for f in FPN([4, 8, 16], 12)(features)]

# %% [markdown]
# With one level a pyramid is two convolutions; and what a fine voxel receives from above is the coarse voxel over it.

# %%
single, pyramid = FPN([4], 12), FPN([4, 8, 16], 12, outputs=[0])
assert torch.equal(single(features[:1])[0], single.output[0](single.lateral[0](features[0])))
top = pyramid.lateral[1](features[1]) + F.interpolate(pyramid.lateral[2](features[2]), size=(5, 6, 4))
by_hand = pyramid.output[0](pyramid.lateral[0](features[0]) + F.interpolate(top, size=(9, 12, 7)))
assert torch.allclose(pyramid(features)[0], by_hand) and len(pyramid(features)) == 1

# %%
with raises(ConfigError, match="outputs must hold 0"): FPN([4, 8], 12, outputs=[1])
with raises(DataError, match="built for 3 levels, got 2"): pyramid(features[:2])

# %% [markdown]
# ## Initial weights
# If every layer keeps the variance of its input, deep networks start in the range where gradients live. He et al. (ICCV
# 2015) derive the standard deviation $\mathrm{gain}/\sqrt{\text{fan-in}}$, with gain $\sqrt{2/(1+a^2)}$ for a leaky
# rectifier of slope $a$. The fan-in is the number of inputs that *one output* sums. For a transposed convolution that
# is `c_in*kernel/stride` and not, as the common code has it, `c_out*kernel`. Normalisation layers stay as they are, so
# `zero_init` survives.

# %%
#| export
_LAYERS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

def _fans(layer: nn.Module) -> tuple[float, float]:
    "Inputs that one output sums, and outputs that one input reaches"
    if isinstance(layer, nn.Linear): return layer.in_features, layer.out_features
    taps, step = math.prod(layer.kernel_size), math.prod(layer.stride)
    if not layer.transposed: return layer.in_channels//layer.groups*taps, layer.out_channels//layer.groups*taps/step
    return layer.in_channels//layer.groups*taps/step, layer.out_channels//layer.groups*taps

def init_weights(
    module: nn.Module, # changed in place
    nonlinearity: str = "leaky_relu", # activation that follows, see `activation`; "none" for a linear layer
    *,
    scheme: str = "he", # "he" normal, or "xavier" uniform (Glorot and Bengio, 2010)
    generator: torch.Generator | None = None, # see `torch_rng_for` in `medvol_nb.torchcore`; None: torch's own
) -> nn.Module: # `module`
    "Initialise convolutions and linear layers so that signals keep their size; biases become 0"
    _one_of("nonlinearity", nonlinearity, ("relu", "leaky_relu", "elu", "gelu", "silu", "none"))
    _one_of("scheme", scheme, ("he", "xavier"))
    gain = {"leaky_relu": math.sqrt(2/(1 + 0.01**2)), "none": 1.0}.get(nonlinearity, math.sqrt(2))
    for layer in module.modules():
        if not isinstance(layer, _LAYERS): continue
        fan_in, fan_out = _fans(layer)
        if scheme == "he": nn.init.normal_(layer.weight, 0.0, gain/math.sqrt(fan_in), generator=generator)
        else:
            bound = math.sqrt(6/(fan_in + fan_out))
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        if layer.bias is not None: nn.init.zeros_(layer.bias)
    return module

# %%
def differences(layers, x):
    stds = []
    with torch.no_grad():
        for layer in layers:
            x = F.relu(layer(x)) # (b, c, x, y)
            stds.append(x.std(0).mean().item())
    return stds

deep = nn.Sequential(*(conv(2, 32, 32) for _ in range(20)))
x = tensor(8, 32, 16, 16)
default, he = differences(deep, x), differences(init_weights(deep, "relu"), x)
fig, ax = plt.subplots(figsize=(5, 2.2))
ax.semilogy(default, label="torch's default")
ax.semilogy(he, label="He")
ax.set(xlabel="layer", title="how much 8 inputs still differ")
ax.legend();

# %%
assert default[-1] < 1e-4 < 0.01 < he[-1] < 3
up = init_weights(conv_transpose(3, 64, 16), "none")
assert 0.9 < up(tensor(1, 64, 6, 6, 6)).std().item() < 1.1

# %% [markdown]
# ## Counting
# Parameters decide the size of a checkpoint, multiply-adds the time. `conv_flops` runs the network on tensors without
# content (torch's *meta* device), so that counting a large input takes milliseconds and no memory. The common "FLOPs"
# is twice this number.

# %%
#| export
def count_parameters(
    module: nn.Module, # any network
    trainable: bool = False, # only those that receive gradients
) -> int: # number of values, shared parameters once
    "Size of a network"
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)

def _meta(shape: Sequence) -> Any:
    "A tensor without content, or a list of them"
    return torch.empty(tuple(shape), device="meta") if all(isinstance(n, numbers.Integral) for n in shape) else \
        [_meta(s) for s in shape]

def _weightless(module: nn.Module) -> dict[str, torch.Tensor]:
    "Parameters and buffers without content, once for each module, however often that is registered"
    return {f"{path}.{k}".lstrip("."): v.to("meta") for path, m in module.named_modules()
            for k, v in itertools.chain(m.named_parameters(recurse=False, remove_duplicate=False),
                                        m.named_buffers(recurse=False, remove_duplicate=False))}

def conv_flops(
    module: nn.Module, # any network; left as it was
    *input_shapes: Sequence, # shape (b, c, *n) of each argument of `forward`, or a list of shapes where it takes a list
) -> int: # multiply-adds of convolutions, transposed convolutions and linear layers, without biases
    "Work of one forward pass"
    counts: list[int] = []

    def count(layer, inputs, output):
        if isinstance(layer, nn.Linear): counts.append(output.numel()*layer.in_features)
        else:
            moved = inputs[0] if layer.transposed else output
            reach = (layer.out_channels if layer.transposed else layer.in_channels)//layer.groups
            counts.append(moved.numel()*reach*math.prod(layer.kernel_size))
    modes = {m: m.training for m in module.modules()}
    hooks = [m.register_forward_hook(count) for m in modes if isinstance(m, _LAYERS)]
    inputs = tuple(_meta(s) for s in input_shapes)
    try:
        module.eval()
        with torch.no_grad(): torch.func.functional_call(module, _weightless(module), inputs, tie_weights=False)
    finally:
        for h in hooks: h.remove()
        for m, training in modes.items(): m.training = training
    return sum(counts)

# %%
block = ResidualBlock(32, 64, stride=2, se="cse")
f"{count_parameters(block):,} parameters, {conv_flops(block, (1, 32, 128, 128, 128))/1e9:.2f} billion multiply-adds"

# %% [markdown]
# By hand, for a small one: the output has 4·4·4 voxels; the first convolution costs 8·27 per output value, the second
# 16·27, the shortcut 8, on 16 channels each.

# %%
by_hand = 4**3*16*(8*27 + 16*27 + 8)
assert conv_flops(ResidualBlock(8, 16, stride=2), (1, 8, 8, 8, 8)) == by_hand
assert conv_flops(conv_transpose(2, 6, 5), (2, 6, 7, 7)) == 2*7*7*6*5*4 and conv_flops(nn.Linear(10, 4), (3, 10)) == 120
assert count_parameters(conv(3, 8, 16)) == 16*8*27 + 16

# %% [markdown]
# ## Putting it together
# An encoder of three residual levels and a decoder of two, in 20 lines. It works on odd sizes with `fit="fit"`, every
# parameter receives a gradient, and a few steps reduce the loss on a toy task: find the bright voxels.

# %%
class TinyUNet(nn.Module):
    def __init__(self, widths=(8, 16, 32), dims=3):
        super().__init__()
        self.stem = ConvBlock(1, widths[0], dims=dims)
        steps = list(zip((widths[0], *widths), widths, (1, 2, 2)))
        self.down = nn.ModuleList(ResidualBlock(a, b, dims=dims, stride=s) for a, b, s in steps)
        self.up = nn.ModuleList(UpBlock(b, a, a, dims=dims, fit="fit") for a, b in zip(widths, widths[1:]))
        self.head = conv(dims, widths[0], 1, 1)

    def forward(self, x):
        x, skips = self.stem(x), []
        for level in self.down: skips.append(x := level(x))
        for level, skip in zip(reversed(self.up), reversed(skips[:-1])): x = level(x, skip)
        return self.head(x)

net = init_weights(TinyUNet())
image = tensor(2, 1, 15, 18, 13)
target = (F.avg_pool3d(image, 3, 1, 1) > 0.1).float()
optimizer = torch.optim.Adam(net.parameters(), 1e-2)
began, losses = time.perf_counter(), []
for _ in range(15):
    loss = F.binary_cross_entropy_with_logits(net(image), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
fig, ax = plt.subplots(figsize=(4, 2))
ax.plot(losses)
ax.set(xlabel="step", title=f"{count_parameters(net):,} parameters, {time.perf_counter() - began:.1f} s");

# %%
assert losses[-1] < 0.8*losses[0] and net(image).shape == image.shape
assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
