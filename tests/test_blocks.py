"Network blocks: sizes, agreement with literal torch code, gradients, counting"
import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medvol_nb.blocks import (
    FPN,
    BottleneckBlock,
    ConcurrentSqueezeExcite,
    ConvBlock,
    ResidualBlock,
    SpatialSqueezeExcite,
    SqueezeExcite,
    UpBlock,
    activation,
    conv,
    conv_flops,
    conv_transpose,
    count_parameters,
    excite_layer,
    init_weights,
    match_size,
    norm_layer,
    shortcut,
    upsample,
)
from medvol_nb.core import ConfigError, DataError, rng_for

NORMS = ["batch", "instance", "group", "layer", "none"]
SIZES = {2: [(8, 8), (7, 9), (5, 4)], 3: [(8, 8, 8), (7, 5, 6), (5, 9, 4)]}


def tensor(*shape): return torch.from_numpy(rng_for(0, "tests", *shape).normal(size=shape)).float()


def gradients_flow(module, *inputs):
    "Every parameter and every input receives a finite gradient that is not all zero"
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = module(*inputs)
    (out*tensor(*out.shape)).sum().backward()
    for name, g in [(n, p.grad) for n, p in module.named_parameters()] + [("input", x.grad) for x in inputs]:
        assert g is not None and torch.isfinite(g).all(), name
        assert g.abs().max() > 0, name


def ceil_div(size, stride): return tuple(-(-n//s) for n, s in zip(size, stride, strict=True))


# ---- convolutions

@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_conv_size_is_ceil_of_n_over_stride(dims, kernel, stride, dilation):
    for n in (1, 2, 5, 6, 7):
        out = conv(dims, 2, 3, kernel, stride, dilation=dilation)(tensor(1, 2, n, *(4,)*(dims - 1)))
        assert out.shape == (1, 3, -(-n//stride), *(-(-4//stride),)*(dims - 1))


def test_conv_per_axis_settings_reach_torch():
    layer = conv(3, 4, 8, (1, 3, 5), (1, 2, 3), groups=2, bias=False, dilation=[1, 2, 1])
    assert (layer.kernel_size, layer.stride, layer.dilation) == ((1, 3, 5), (1, 2, 3), (1, 2, 1))
    assert layer.padding == (0, 2, 2) and layer.groups == 2 and layer.bias is None
    assert type(layer) is nn.Conv3d and type(conv(2, 1, 1)) is nn.Conv2d


@pytest.mark.parametrize("dims", [2, 3])
def test_transposed_conv_paints_each_voxel_into_its_own_block(dims):
    layer = conv_transpose(dims, 1, 1, 2, bias=False)
    x = torch.zeros(1, 1, *(3,)*dims)
    x[(0, 0) + (1,)*dims] = 1
    out = layer(x)
    assert out.shape[2:] == (6,)*dims
    block = out[(0, 0) + (slice(2, 4),)*dims]
    assert torch.equal(block, layer.weight[0, 0]) and torch.isclose(out.abs().sum(), block.abs().sum())


def test_transposed_conv_of_odd_kernel():
    assert conv_transpose(3, 2, 2, 2, 3, padding=1)(tensor(1, 2, 4, 5, 6)).shape[2:] == (7, 9, 11)


@pytest.mark.parametrize("make, match", [
    (lambda: conv(1, 1, 1), "dims: must be 2 or 3, got 1"), (lambda: conv(3, 1, 1, 0), "kernel"),
    (lambda: conv(3, 1, 1, (3, 3)), "3 of them"), (lambda: conv(3, 1, 1, 2.5), "kernel"),
    (lambda: conv(3, 1, 1, "3"), "kernel"), (lambda: conv(3, 1, 1, stride=-1), "stride"),
    (lambda: conv(3, 0, 1), "channels"), (lambda: conv(3, 1.5, 1), "channels"),
    (lambda: conv(3, 4, 6, groups=4), "does not divide"),
    (lambda: norm_layer("batchnorm", 4), "Did you mean 'batch'"), (lambda: norm_layer("group", 9), "do not divide"),
    (lambda: norm_layer("batch", 0), "channels"), (lambda: norm_layer("batch", 4, 4), "dims"),
    (lambda: activation("rellu"), "Did you mean 'relu'"), (lambda: ConvBlock(1, 1, order="ncc"), "order"),
    (lambda: ConvBlock(1, 1, order=""), "order"), (lambda: ConvBlock(1, 1, order="cx"), "order"),
    (lambda: SqueezeExcite(8, 0), "reduction"), (lambda: excite_layer("se", 8), "se:"),
    (lambda: ResidualBlock(4, 4, kernel=4), "odd"), (lambda: ResidualBlock(4, 4, around="avg"), "shortcut"),
    (lambda: ResidualBlock(4, 4, norm="none", zero_init=True), "learned scale"),
    (lambda: BottleneckBlock(4, 6), "expansion"), (lambda: BottleneckBlock(4, 8, kernel=(3, 2, 3)), "odd"),
    (lambda: upsample("trilinear", 3, 1, 1), "up: must be one of"), (lambda: UpBlock(4, 4, 4, join="add"), "join"),
    (lambda: UpBlock(4, 4, 4, kernel=2), "odd"), (lambda: FPN([4, 4], 4, kernel=(3, 3, 4)), "odd"),
    (lambda: UpBlock(4, 4, 4, fit="crop"), "fit"), (lambda: UpBlock(4, 4, 4, n_convs=0), "n_convs"),
    (lambda: FPN([], 4), "at least one"), (lambda: FPN([4], 4, outputs=[]), "outputs"),
    (lambda: FPN([4, 4], 4, outputs=[1]), "outputs"), (lambda: FPN([4, 4], 4, outputs=[0, 2]), "outputs"),
    (lambda: init_weights(nn.Linear(1, 1), "tanh"), "nonlinearity"),
    (lambda: init_weights(nn.Linear(1, 1), scheme="orth"), "scheme"),
])
def test_wrong_settings_are_config_errors(make, match):
    with pytest.raises(ConfigError, match=match): make()


# ---- norms, activations, blocks

@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", NORMS)
def test_norm_equals_its_definition(dims, kind):
    x = 3 + 2*tensor(3, 16, *(5, 4, 6)[:dims])
    out, space = norm_layer(kind, 16, dims)(x), tuple(range(2, 2 + dims))
    if kind == "none":
        assert torch.equal(out, x)
        return
    grouped = x.reshape(3, 8, 2, *x.shape[2:])
    mean, var = {
        "batch": (x.mean((0, *space), keepdim=True), x.var((0, *space), correction=0, keepdim=True)),
        "instance": (x.mean(space, keepdim=True), x.var(space, correction=0, keepdim=True)),
        "layer": (x.mean((1, *space), keepdim=True), x.var((1, *space), correction=0, keepdim=True)),
        "group": (grouped.mean((2, *(s + 1 for s in space)), keepdim=True),
                  grouped.var((2, *(s + 1 for s in space)), correction=0, keepdim=True)),
    }[kind]
    expected = (((grouped if kind == "group" else x) - mean)/torch.sqrt(var + 1e-5)).reshape(x.shape)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_norm_details():
    assert norm_layer("group", 4).num_groups == 1 and norm_layer("group", 24).num_groups == 8
    assert norm_layer("group", 12, groups=4).num_groups == 4
    assert norm_layer("instance", 4).weight is not None and norm_layer("instance", 4, affine=False).weight is None


@pytest.mark.parametrize("kind, function", [
    ("relu", F.relu), ("leaky_relu", lambda x: F.leaky_relu(x, 0.01)), ("elu", F.elu), ("gelu", F.gelu),
    ("silu", F.silu), ("none", lambda x: x),
])
def test_activation(kind, function):
    x = tensor(4, 5)
    assert torch.equal(activation(kind)(x), function(x))
    assert torch.equal(activation(kind, inplace=True)(x.clone()), function(x))


@pytest.mark.parametrize("order", ["".join(p) for k in (1, 2, 3) for p in itertools.permutations("cna", k) if "c" in p])
@pytest.mark.parametrize("norm", ["none", "instance"])
def test_conv_block_order_and_input_untouched(order, norm):
    x = tensor(2, 3, 6, 7)
    before, block = x.clone(), ConvBlock(3, 5, dims=2, norm=norm, order=order)
    out = block(x)
    assert torch.equal(x, before) and out.shape == (2, 5, 6, 7)
    steps = {"c": lambda y: F.conv2d(y, block.conv.weight, block.conv.bias, padding=1),
             "n": lambda y: F.instance_norm(y) if norm == "instance" else y, "a": lambda y: F.leaky_relu(y, 0.01)}
    for letter in order: x = steps[letter](x)
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)
    assert (block.conv.bias is None) == (norm == "instance" and "n" in order)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_conv_block_gradients(dims, norm):
    gradients_flow(ConvBlock(3, 8, dims=dims, norm=norm), tensor(2, 3, *SIZES[dims][1]))


# ---- squeeze-excite

@pytest.mark.parametrize("dims", [2, 3])
def test_se_equals_linear_layers(dims):
    x, se = tensor(3, 32, *SIZES[dims][1]), SqueezeExcite(32, 8, dims)
    w1, w2 = (layer.weight.flatten(1) for layer in (se.squeeze, se.excite))
    pooled = x.flatten(2).mean(2)
    gate = torch.sigmoid(F.linear(F.relu(F.linear(pooled, w1, se.squeeze.bias)), w2, se.excite.bias))
    torch.testing.assert_close(se(x), x*gate.reshape(3, 32, *(1,)*dims))
    assert se.squeeze.out_channels == 4


@pytest.mark.parametrize("channels, reduction, divisor, hidden", [
    (32, 16, 1, 2), (8, 16, 1, 1), (4, 16, 1, 1), (32, 16, 8, 8), (320, 16, 8, 24), (64, 1, 1, 64), (40, 16, 1, 3),
])
def test_se_hidden_width(channels, reduction, divisor, hidden):
    # 320/16 = 20 lies between 16 and 24 and goes up, as in timm's make_divisible
    assert SqueezeExcite(channels, reduction, divisor=divisor).squeeze.out_channels == hidden


@pytest.mark.parametrize("dims", [2, 3])
def test_spatial_and_concurrent_se(dims):
    x, both = tensor(2, 8, *SIZES[dims][0]), ConcurrentSqueezeExcite(8, 2, dims)
    weight = both.spatial.excite.weight.reshape(8)
    spatial = torch.sigmoid(torch.einsum("bc...,c->b...", x, weight) + both.spatial.excite.bias)[:, None]
    torch.testing.assert_close(both.spatial(x), x*spatial)
    torch.testing.assert_close(both(x), torch.maximum(x*both.channel.gate(x), x*spatial))
    assert type(excite_layer("sse", 8)) is SpatialSqueezeExcite and type(excite_layer("none", 8)) is nn.Identity


def test_gate_lies_in_the_open_unit_interval_and_ignores_place():
    x, se = 10*tensor(2, 16, 4, 5, 6), SqueezeExcite(16, 4)
    gate = se.gate(x)
    assert gate.shape == (2, 16, 1, 1, 1) and 0 < gate.min() and gate.max() < 1
    torch.testing.assert_close(se(x.flip(3)), se(x).flip(3))


# ---- residual blocks

@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("around", ["pool", "conv"])
@pytest.mark.parametrize("block", [ResidualBlock, BottleneckBlock])
def test_residual_sizes_and_gradients(dims, norm, around, block):
    for size, stride in itertools.product(SIZES[dims], ((1,)*dims, (2,)*dims, (1, *(2,)*(dims - 1)))):
        net = block(8, 16, dims=dims, stride=stride, norm=norm, around=around, se="cse", se_reduction=2)
        out = net(tensor(2, 8, *size))
        assert out.shape == (2, 16, *ceil_div(size, stride)) and torch.isfinite(out).all()
    gradients_flow(block(8, 16, dims=dims, stride=2, norm=norm, around=around), tensor(2, 8, *SIZES[dims][0]))


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("around", ["pool", "conv"])
def test_residual_paths_agree_at_every_size(n, around):
    out = ResidualBlock(2, 2, dims=2, stride=(2, 3), norm="none", around=around)(tensor(1, 2, n, n))
    assert out.shape[2:] == (-(-n//2), -(-n//3))


def test_residual_equals_literal_code():
    x, net = tensor(2, 4, 7, 6, 5), ResidualBlock(4, 8, stride=2, se="cse", se_reduction=2)
    first, second, around = net.body[0], net.body[1], net.shortcut
    y = F.leaky_relu(F.instance_norm(F.conv3d(x, first.conv.weight, stride=2, padding=1)), 0.01)
    y = net.gate(F.instance_norm(F.conv3d(y, second.conv.weight, padding=1)))
    ones = torch.ones_like(x)
    eight = torch.ones(4, 1, 2, 2, 2)
    total, count = (F.conv3d(F.pad(v, [0, 1, 0, 0, 0, 1]), eight, stride=2, groups=4) for v in (x, ones))
    short = F.instance_norm(F.conv3d(total/count, around.conv.conv.weight))
    torch.testing.assert_close(net(x), F.leaky_relu(y + short, 0.01), rtol=1e-4, atol=1e-5)


def test_bottleneck_equals_literal_code():
    x, net = tensor(2, 8, 6, 5), BottleneckBlock(8, 8, expansion=2, dims=2, norm="none", act="relu")
    y = x
    for block, pad, last in zip(net.body, (0, 1, 0), (False, False, True)):
        y = F.conv2d(y, block.conv.weight, block.conv.bias, padding=pad)
        y = y if last else F.relu(y)
    torch.testing.assert_close(net(x), F.relu(x + y))
    assert net.body[1].conv.in_channels == 4


@pytest.mark.parametrize("norm", [n for n in NORMS if n != "none"])
@pytest.mark.parametrize("block", [ResidualBlock, BottleneckBlock])
def test_zero_init_is_the_identity_and_survives_init_weights(norm, block):
    net, x = init_weights(block(8, 8, norm=norm, zero_init=True, act="relu")), tensor(2, 8, 4, 4, 4)
    torch.testing.assert_close(net(x), F.relu(x))
    assert torch.equal(x, tensor(2, 8, 4, 4, 4))


def test_shortcut_is_the_identity_only_if_nothing_changes():
    assert type(shortcut(4, 4)) is nn.Identity and type(shortcut(4, 4, kind="conv")) is nn.Identity
    assert count_parameters(shortcut(4, 4, stride=2)) == 0
    assert count_parameters(shortcut(4, 4, stride=2, kind="conv")) > 0
    x = tensor(1, 4, 6, 6, 6)
    torch.testing.assert_close(shortcut(4, 4, stride=2)(x), F.avg_pool3d(x, 2))


# ---- up-sampling

@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["transpose", "linear", "nearest"])
@pytest.mark.parametrize("scale", [1, 2, 3, "mixed"])
def test_upsample_sizes(dims, kind, scale):
    scale = (1, 2, 4)[:dims] if scale == "mixed" else scale
    sizes = SIZES[dims][1]
    out = upsample(kind, dims, 4, 3, scale)(tensor(1, 4, *sizes))
    per_axis = scale if isinstance(scale, tuple) else (scale,)*dims
    assert out.shape == (1, 3, *(n*s for n, s in zip(sizes, per_axis)))


@pytest.mark.parametrize("kind, expected", [
    ("nearest", [1, 1, 2, 2, 4, 4]), ("linear", [1, 1.25, 1.75, 2.5, 3.5, 4]),
])
def test_upsample_values(kind, expected):
    up = upsample(kind, 2, 1, 1, (1, 2))
    nn.init.ones_(up[0].weight)
    nn.init.zeros_(up[0].bias)
    np.testing.assert_allclose(up(torch.tensor([[[[1., 2, 4]]]])).detach().numpy()[0, 0, 0], expected)


def test_match_size():
    x = tensor(1, 2, 3, 4, 5)
    assert match_size(x, (3, 4, 5)) is x
    out = match_size(x, [5, 3, 6], "fit")
    assert out.shape[2:] == (5, 3, 6) and torch.equal(out[:, :, :3, :, :5], x[:, :, :, :3])
    assert torch.equal(out[:, :, 4, :, 5], x[:, :, 2, :3, 4])
    with pytest.raises(DataError, match="divisible by the product"): match_size(x, (3, 4, 6))
    with pytest.raises(ConfigError, match="fit"): match_size(x, (3, 4, 6), "crop")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("up", ["transpose", "linear", "nearest"])
@pytest.mark.parametrize("join", ["concat", "sum"])
def test_up_block(dims, up, join):
    fine = SIZES[dims][1]
    block = UpBlock(16, 8, 4, dims=dims, up=up, join=join, fit="fit", n_convs=2)
    coarse, skip = tensor(2, 16, *ceil_div(fine, (2,)*dims)), tensor(2, 8, *fine)
    assert block(coarse, skip).shape == (2, 4, *fine)
    joined = torch.cat([block.up(coarse)[(..., *(slice(n) for n in fine))], skip], 1) if join == "concat" else \
        block.up(coarse)[(..., *(slice(n) for n in fine))] + skip
    torch.testing.assert_close(block(coarse, skip), block.convs(joined))
    gradients_flow(block, coarse, skip)
    with pytest.raises(DataError, match="does not match the skip"): UpBlock(16, 8, 4, dims=dims, up=up)(coarse, skip)


# ---- pyramid

@pytest.mark.parametrize("dims", [2, 3])
def test_fpn_equals_literal_code(dims):
    conv_f = {2: F.conv2d, 3: F.conv3d}[dims]
    sizes = [(13, 12, 7), (7, 6, 4), (3, 5, 1)]
    features = [tensor(2, c, *n[:dims]) for c, n in zip((3, 5, 7), sizes)]
    net = FPN([3, 5, 7], 6, dims)
    lateral = [conv_f(f, m.weight, m.bias) for f, m in zip(features, net.lateral)]
    def up(x, like):  # nearest: out[i] = in[floor(i*m/n)]
        for axis in range(2, 2 + dims):
            n, m = like.shape[axis], x.shape[axis]
            x = x.index_select(axis, torch.tensor([i*m//n for i in range(n)]))
        return x
    p1 = lateral[1] + up(lateral[2], lateral[1])
    p0 = lateral[0] + up(p1, lateral[0])
    expected = [conv_f(p, m.weight, m.bias, padding=1) for p, m in zip((p0, p1, lateral[2]), net.output)]
    for ours, theirs in zip(net(features), expected, strict=True): torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("outputs", [None, [0], [0, 2], [2, 0, 0]])
def test_fpn_outputs_and_no_idle_parameter(outputs):
    net = FPN([3, 5, 7], 6, outputs=outputs)
    features = [tensor(1, c, n, n, n) for c, n in ((3, 8), (5, 4), (7, 2))]
    out = net(features)
    wanted = sorted(set(outputs)) if outputs else [0, 1, 2]
    assert [o.shape for o in out] == [(1, 6, *features[i].shape[2:]) for i in wanted]
    sum((o*tensor(*o.shape)).sum() for o in out).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    before = [f.clone() for f in features]
    net(features)
    assert all(torch.equal(a, b) for a, b in zip(before, features))


def test_fpn_level_count():
    with pytest.raises(DataError, match="2 levels, got 1"): FPN([1, 1], 2)([tensor(1, 1, 4, 4, 4)])


# ---- initialisation

@pytest.mark.parametrize("nonlinearity, gain", [
    ("relu", 2**0.5), ("leaky_relu", (2/1.0001)**0.5), ("none", 1), ("gelu", 2**0.5),
])
@pytest.mark.parametrize("make, fan_in", [
    (lambda: conv(3, 32, 64), 32*27), (lambda: conv(2, 32, 64, (1, 5), groups=4), 8*5),
    (lambda: nn.Linear(500, 200), 500),
    (lambda: conv_transpose(3, 64, 32), 64), (lambda: conv_transpose(2, 64, 64, 2, 4), 64*4),
])
def test_he_weights_have_the_right_spread(make, fan_in, nonlinearity, gain):
    layer = init_weights(make(), nonlinearity, generator=torch.Generator().manual_seed(0))
    expected, n = gain/math.sqrt(fan_in), layer.weight.numel()
    assert abs(layer.weight.std().item()/expected - 1) < 4/math.sqrt(2*n) and (layer.bias == 0).all()


def test_xavier_bound():
    layer = init_weights(conv(3, 8, 24, stride=2), "none", scheme="xavier")
    bound = math.sqrt(6/(8*27 + 24*27/8))
    assert 0.95*bound < layer.weight.abs().max() <= bound


def test_init_is_repeatable_and_leaves_norms():
    nets = [init_weights(ResidualBlock(4, 8), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()))
    assert (nets[0].body[0].norm.weight == 1).all()


# ---- counting

def test_count_parameters():
    net = nn.Sequential(conv(3, 2, 4), nn.Linear(4, 4))
    net[1].weight.requires_grad_(False)
    net.add_module("again", net[0])
    assert count_parameters(net) == (2*4*27 + 4) + 20 and count_parameters(net, trainable=True) == (2*4*27 + 4) + 4


@pytest.mark.parametrize("make, shape, expected", [
    (lambda: conv(3, 4, 8), (2, 4, 5, 6, 7), 2*8*5*6*7*4*27),
    (lambda: conv(2, 4, 8, 3, 2, groups=2), (1, 4, 7, 7), 8*4*4*2*9),
    (lambda: conv_transpose(3, 4, 8), (1, 4, 3, 3, 3), 4*27*8*8),
    (lambda: nn.Linear(6, 3), (2, 5, 6), 2*5*3*6),
    (lambda: SqueezeExcite(32, 16), (1, 32, 9, 9, 9), 32*2*2),
    (lambda: ConvBlock(1, 2, dims=2, norm="batch"), (1, 1, 1, 1), 2*9),
])
def test_flops_against_hand_count(make, shape, expected): assert conv_flops(make(), shape) == expected


def test_flops_against_torch_counter():
    from torch.utils.flop_counter import FlopCounterMode
    net = nn.Sequential(ResidualBlock(3, 8, stride=2, se="cse"), BottleneckBlock(8, 16, stride=2))
    x = tensor(2, 3, 9, 8, 7)
    with FlopCounterMode(display=False) as counter: net(x)
    assert 2*conv_flops(net, x.shape) == counter.get_total_flops()


def test_flops_of_modules_and_parameters_that_are_used_twice():
    "A network that holds a part under two names, and two layers with one weight, keep their values"
    net = nn.Module()
    net.first = net.again = nn.Conv3d(2, 2, 3, padding=1)
    net.third = nn.Conv3d(2, 2, 3, padding=1)
    net.third.weight = net.first.weight
    net.forward = lambda x: net.third(net.again(net.first(x)))
    before = copy.deepcopy(net.state_dict())
    assert conv_flops(net, (1, 2, 4, 4, 4)) == 3*64*2*2*27
    assert all(p.device.type == "cpu" for p in net.parameters()) and net.third.weight is net.first.weight
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))


def test_flops_of_several_inputs_and_lists():
    net = FPN([3, 5], 4, 2)
    assert conv_flops(net, [(1, 3, 8, 8), (1, 5, 4, 4)]) == 64*4*3 + 16*4*5 + (64 + 16)*4*4*9
    up = UpBlock(6, 4, 3, dims=2)
    assert conv_flops(up, (1, 6, 4, 4), (1, 4, 8, 8)) == 16*6*4*4 + 64*3*8*9


def test_flops_leaves_the_network_alone_and_is_cheap():
    net = nn.Sequential(ConvBlock(1, 4, norm="batch"), nn.Dropout()).train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    assert conv_flops(net, (1, 1, 4096, 4096, 4096)) == 4096**3*4*27  # never allocated
    assert net.training and net[0].norm.training and not net[1].training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert not any(m._forward_hooks for m in net.modules()) and all(p.device.type == "cpu" for p in net.parameters())
    with pytest.raises(RuntimeError): conv_flops(net, (1, 2, 8, 8, 8))
    assert not any(m._forward_hooks for m in net.modules()) and net.training


# ---- whole blocks

@pytest.mark.parametrize("make", [
    lambda: ResidualBlock(4, 8, se="scse", stride=2), lambda: BottleneckBlock(4, 8), lambda: FPN([4, 8], 4),
    lambda: UpBlock(4, 4, 4),
])
def test_modules_pickle_and_state_loads(make):
    net = make()
    again = pickle.loads(pickle.dumps(net))
    other = make()
    other.load_state_dict(net.state_dict())
    for a, b, c in zip(net.state_dict().values(), again.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 5, 2), (2, 1, 1)])
def test_axes_shorter_than_the_stride(size):
    out = ResidualBlock(1, 2, stride=(2, 2, 3), norm="layer")(tensor(1, 1, *size))
    assert out.shape == (1, 2, *ceil_div(size, (2, 2, 3)))
