"""The network: parameters by formula, gradients everywhere, sizes refused early, costs known before."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from medvol_nb.blocks import conv_flops, count_parameters, init_weights
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.core import ConfigError, DataError, rng_for
from medvol_nb.zarrnet.config import NetworkConfig, Target, TrainParams, ZarrConfig, plan_network
from medvol_nb.zarrnet.model import (
    MultiTaskUNet,
    _assemble,
    _Live,
    _step,
    activate,
    build_model,
    estimate_memory,
    level_costs,
    summary,
)

TWO = {"sheet": Target(channels=1, activation="sigmoid"), "normals": Target(channels=3)}
TWO = {n: t.resolved(n, TrainParams()) for n, t in TWO.items()}
ORGANS = Target(channels=4, activation="softmax").resolved("organs", TrainParams())


def hollow(cfg, targets=None, channels=1, patch_size=None):
    "A network without content, for counting"
    with torch.device("meta"):
        return _assemble(cfg, targets or TWO, channels, patch_size)


def image(*shape):
    return torch.from_numpy(rng_for(0, *shape).normal(size=shape)).float()


# ---- (14) parameters


def gate_size(kind, c, reduction, divisor):
    hidden = max(divisor, int(c / reduction + divisor / 2) // divisor * divisor)
    return {"none": 0, "sse": c + 1}.get(kind, 2 * c * hidden + hidden + c) + (c + 1 if kind == "scse" else 0)


def closed_form(net, targets, channels, patch_size, depth):
    "Number of parameters by hand: a convolution has no bias before a normalisation, which has two values a channel"
    plan = plan_network(net, patch_size)
    f, taps = plan.features, [math.prod(k) for k in plan.kernels]

    def block(a, b, t):
        return a * b * t + 2 * b

    def residual(a, b, t):
        around = block(a, b, 1) if a != b else 0
        return block(a, b, t) + block(b, b, t) + around + gate_size(plan.se, b, plan.se_reduction, plan.se_divisor)

    encoder = block(channels, f[0], taps[0])
    for k, n in enumerate(plan.blocks):
        before = f[max(k - 1, 0)]
        encoder += residual(before, f[k], taps[k]) + (n - 1) * residual(f[k], f[k], taps[k])
    decoder = 0
    for k in range(len(f) - 1):
        decoder += f[k + 1] * f[k] * math.prod(plan.strides[k + 1]) + f[k]
        decoder += block(2 * f[k], f[k], taps[k]) + (net.decoder_convs - 1) * block(f[k], f[k], taps[k])
    heads = sum((c + 1) * t.channels for t in targets.values() for c in f[:depth])
    return encoder + decoder * (1 if net.decoder == "shared" else len(targets)) + heads


@pytest.mark.parametrize("i", range(24))
def test_B14_parameters_follow_a_formula(i):
    rng = rng_for(i, "plans")
    levels = int(rng.integers(2, 6))
    some = {
        "f_maps": tuple(int(8 * rng.integers(1, 9)) for _ in range(levels)),
        "norm": str(rng.choice(["instance", "group", "batch"])),
        "se": str(rng.choice(["none", "cse", "sse", "scse"])),
        "se_reduction": float(rng.choice([1, 4, 16])),
        "decoder": str(rng.choice(["separate", "shared"])),
        "decoder_convs": int(rng.integers(1, 4)),
        "blocks_per_level": tuple(int(n) for n in rng.integers(1, 4, levels)),
        "kernel_sizes": tuple(tuple(int(k) for k in rng.choice([1, 3], 3)) for _ in range(levels)),
        "strides": ((1, 1, 1), *(tuple(int(s) for s in rng.integers(1, 3, 3)) for _ in range(levels - 1))),
    }
    patch = None
    if i % 6 == 0:  # also automatic plans
        patch = tuple(int(16 * n) for n in rng.integers(1, 9, 3))
        for key in ("f_maps", "blocks_per_level", "kernel_sizes", "strides"):
            some.pop(key)
        some |= {"preset": "auto", "spacing": tuple(float(s) for s in rng.choice([1, 2.5, 5], 3))}
    net = NetworkConfig(**some)
    targets = TWO if i % 2 else {**TWO, "organs": ORGANS}
    channels = int(rng.integers(1, 4))
    model = hollow(net, targets, channels, patch)
    assert count_parameters(model) == closed_form(net, targets, channels, patch, 1)


def test_B14_parameters_of_the_seed_preset():
    "U10: 82 172 922 parameters of the first revision, less 18 549 254 of the decoder that nothing reaches"
    example = NetworkConfig(preset="seed", f_maps=(32, 64, 128, 256, 320, 528), num_levels=6)
    assert count_parameters(hollow(example)) == 82_172_922 - 18_549_254 == 63_623_668
    assert count_parameters(hollow(NetworkConfig(preset="seed", f_maps=(32, 64, 128, 256)))) == 9_655_278


def test_parameters_of_the_references_own_networks():
    "In millions: the second revision's automatic networks (cap 512, norms without parameters), and two of the table"

    def count(net, targets=TWO, patch=None, without_norms=False):
        model = hollow(net, targets, 1, patch)
        norms = sum(p.numel() for n, p in model.named_parameters() if ".norm." in n)
        return round((count_parameters(model) - norms * without_norms) / 1e6, 1)

    f = (32, 64, 128, 256, 512, 512)
    assert count(NetworkConfig(preset="auto", f_maps=f), patch=(64, 192, 192), without_norms=True) == 233.4
    assert count(NetworkConfig(preset="auto", f_maps=f[:5]), patch=(64, 64, 64), without_norms=True) == 118.1
    assert count(NetworkConfig(f_maps=f[:4]), {"all": Target(channels=4)}) == 25.9
    assert count(NetworkConfig(f_maps=f[:4], se="cse"), without_norms=True) == 27.4


# ---- (13) gradients, keys, files

NETS = {
    "resenc": NetworkConfig(f_maps=(8, 16, 16)),
    "shared": NetworkConfig(f_maps=(8, 16, 16), decoder="shared", decoder_convs=2),
    "seed": NetworkConfig(preset="seed", f_maps=(8, 16, 24)),
    "seed_small": NetworkConfig(preset="seed", f_maps=(4, 8, 16), num_groups=4),
    "anisotropic": NetworkConfig(
        f_maps=(8, 8, 16), strides=(1, (1, 2, 2), 2), kernel_sizes=((1, 3, 3), 3, 3), se="cse", nonlin="elu"
    ),
    "batch": NetworkConfig(f_maps=(8, 16, 16), norm="batch", se="scse", nonlin="relu"),
    "noisy": NetworkConfig(f_maps=(8, 16, 16), norm="group", dropout=0.1, stochastic_depth=0.2, se="sse"),
    "auto": NetworkConfig(preset="auto", blocks_per_level=1),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("deep", [False, True])
def test_B13_every_parameter_gets_a_gradient(name, deep):
    "U10: nothing is built that is not used. Gates may be shut in one network, so that several are drawn"
    net, patch = NETS[name], (16, 16, 16)
    if deep and net.preset != "auto":
        net = net.model_copy(update={"f_maps": (8, 8, 16, 16), "kernel_sizes": None, "strides": None, "num_groups": 4})
    model, moved = MultiTaskUNet(plan_network(net, patch), TWO, deep_supervision=deep, decoder=net.decoder), set()
    for k in range(6):
        init_weights(model, generator=torch_rng_for(k))
        out = model(image(2, 1, 16, 16, 16))
        ys = [y for v in out.values() for y in (v if isinstance(v, list) else [v])]
        assert len(ys) == (2 * max(1, len(model.plan.features) - 3) if deep else 2)
        model.zero_grad()
        sum((y * image(*y.shape)).sum() for y in ys).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        moved |= {n for n, p in model.named_parameters() if p.grad.abs().max() > 0}
    assert moved == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["resenc", "shared", "seed"])
def test_U23_B13_no_module_is_stored_twice(name, tmp_path):
    "U23: the second revision stores the shared encoder once more under each decoder"
    model = build_model(NETS[name], TWO)
    state = model.state_dict()
    assert len({v.data_ptr() for v in state.values()}) == len(state)
    assert len(state) == len(list(model.named_parameters())) + len(list(model.named_buffers()))
    save_file(state, tmp_path / "w.safetensors")
    other = build_model(NETS[name], TWO, seed=1)
    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    x = image(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x).values(), other(x).values(), strict=True))


# ---- forward, predict


@pytest.mark.parametrize("preset", ["seed", "resenc"])
@pytest.mark.parametrize("decoder", ["separate", "shared"])
def test_U10_nothing_is_built_that_is_not_used(preset, decoder):
    "The reference inherits a decoder that no target uses, 23 % of its parameters"
    net = NetworkConfig(preset=preset, f_maps=(8, 16, 32), decoder=decoder)
    model, used = build_model(net, TWO), set()
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: used.add(name))
    model(image(1, 1, 16, 16, 16))
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert owners == used


def test_U15_an_architecture_written_by_hand_works(tmp_path):
    "Text read from a file is equal to the known words without being the same object"
    for k, (norm, nonlin, se, decoder) in enumerate(
        [
            ("instance", "relu", "cse", "shared"),
            ("group", "elu", "scse", "separate"),
            ("batch", "leaky_relu", "sse", "shared"),
        ]
    ):
        file = tmp_path / f"{k}.yaml"
        file.write_text(
            f"tr_params: {{patch_size: [16, 16, 16]}}\n"
            f"model_config: {{preset: resenc, f_maps: [8, 16], norm: {norm}, nonlin: {nonlin}, "
            f"se: {se}, decoder: {decoder}}}\n"
            "dataset_config:\n  volume_paths: [{input: a.zarr, sheet: b.zarr}]\n"
            "  targets: {sheet: {channels: 1, activation: sigmoid}}\n"
        )
        model = build_model(ZarrConfig.load(file))
        assert (model.plan.norm, model.plan.nonlin, model.plan.se) == (norm, nonlin, se)
        assert model(image(1, 1, 16, 16, 16))["sheet"].shape == (1, 1, 16, 16, 16)
        assert ("shared" in model.decoders) == (decoder == "shared")


def test_U09_forward_gives_logits_and_predict_probabilities():
    "The first revision applied the activation in training, so the loss saw it twice; U17: the second in validation"
    targets = {**TWO, "organs": ORGANS}
    model = build_model(NETS["resenc"], targets)
    x = image(1, 1, 8, 8, 16)
    with torch.no_grad():
        train = model.train()(x)
        test, out = model.eval()(x), model.predict(x)
    assert all(torch.equal(train[n], test[n]) for n in targets)
    assert torch.equal(out["sheet"], torch.sigmoid(test["sheet"]))
    assert torch.equal(out["organs"], torch.softmax(test["organs"], 1))
    assert torch.allclose(out["normals"].norm(dim=1), torch.ones(1, 8, 8, 16), atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.predict(x, {"sheet": "none"})["sheet"], test["sheet"])
    zero = activate(torch.zeros(1, 3, 2, 2, 2), "none", "normals")
    assert torch.equal(zero, torch.zeros(1, 3, 2, 2, 2))


def test_deep_supervision_has_heads_at_all_but_the_two_coarsest_levels():
    net = NetworkConfig(f_maps=(8, 8, 8, 16, 16, 16), blocks_per_level=1)
    model = MultiTaskUNet(plan_network(net), TWO, deep_supervision=True)
    x = image(1, 1, 32, 32, 64)
    sizes = [tuple(y.shape[2:]) for y in model(x)["sheet"]]
    assert sizes == [(32, 32, 64), (16, 16, 32), (8, 8, 16)]
    with torch.no_grad():
        assert model.eval()(x)["sheet"].shape == (1, 1, 32, 32, 64)


def test_group_norm_uses_the_groups_of_the_settings():
    model = hollow(NetworkConfig(f_maps=(6, 12), norm="group", num_groups=3))
    assert {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {3}
    with pytest.raises(ConfigError, match="12 channels do not divide into 8 groups"):
        hollow(NetworkConfig(f_maps=(8, 12), norm="group"))


def test_stochastic_depth_keeps_the_mean_and_is_off_in_evaluation():
    net = NetworkConfig(f_maps=(4, 4), stochastic_depth=0.5, dropout=0.3)
    model = build_model(net, TWO)
    blocks = [m for m in model.modules() if hasattr(m, "skipped")]
    assert [b.skipped for b in blocks] == pytest.approx([0, 1 / 6, 2 / 6, 0.5][-len(blocks) :], abs=1e-9)
    x = image(1, 1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(model.eval()(x)["sheet"], model(x)["sheet"])
        assert not torch.equal(model.train()(x)["sheet"], model(x)["sheet"])


def test_same_seed_same_weights():
    a, b, c = (build_model(NETS["resenc"], TWO, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


# ---- (16) sizes


def test_U32_B16_illegal_sizes_are_refused_before_anything_is_allocated():
    "U32: the check of the third revision's parent is always true"
    model = hollow(NetworkConfig(num_levels=6))
    huge = torch.empty(1, 1, 2**14 + 1, 2**14, 2**14, device="meta")
    with pytest.raises(DataError, match="axis z: 16385 is not divisible by 32, the nearest legal sizes are 16384 and"):
        model(huge)
    model = build_model(NETS["anisotropic"], TWO)
    for size in [(16, 16, 16), (2, 8, 4), (6, 12, 20)]:
        assert model(torch.zeros(1, 1, *size))["sheet"].shape == (1, 1, *size)
    for size, words in [((3, 8, 8), "axis z: 3 .* 2 and 4"), ((4, 8, 10), "axis x: 10 .* 8 and 12")]:
        with pytest.raises(DataError, match=words):
            model(torch.zeros(1, 1, *size))
    with pytest.raises(DataError, match="one voxel at the deepest level"):
        build_model(NETS["resenc"], TWO)(torch.zeros(1, 1, 4, 4, 4))
    for shape in [(1, 2, 16, 16, 16), (1, 16, 16, 16), (16, 16, 16)]:
        with pytest.raises(DataError, match=r"needs \(b, 1, z, y, x\)"):
            model(torch.zeros(shape))


def test_nothing_is_resized_but_in_the_seed_preset():
    "Exact doubling: a shift of the input by the stride shifts the output by as much, away from borders"
    net = build_model(NetworkConfig(f_maps=(4, 4, 4), norm="batch", blocks_per_level=1), TWO).eval()
    x = torch.zeros(1, 1, 64, 16, 16)
    x[:, :, 30:34, 6:10, 6:10] = 1
    with torch.no_grad():
        a, b = net(x)["sheet"], net(x.roll(4, 2))["sheet"]
    assert torch.allclose(a.roll(4, 2)[:, :, 20:44], b[:, :, 20:44], atol=1e-5)


# ---- settings


def test_a_network_from_the_settings_of_a_run():
    cfg = ZarrConfig.model_validate(
        {
            "tr_params": {"patch_size": [16, 16, 16], "deep_supervision": True, "seed": 5},
            "model_config": {"f_maps": [4, 4, 8, 8], "blocks_per_level": 1},
            "targets": {"sheet": {"channels": 1}, "normals": {"channels": 3}},
        }
    )
    model = build_model(cfg)
    assert list(model.targets) == ["sheet", "normals"] and model.targets["normals"].kind == "normals"
    assert torch.equal(model.encoder.stem.conv.weight, build_model(cfg, seed=5).encoder.stem.conv.weight)
    assert build_model(cfg, in_channels=2).in_channels == 2
    with pytest.raises(ConfigError, match="a network needs at least one"):
        build_model(NetworkConfig())
    told = cfg.to_dict()
    told["dataset_config"]["in_channels"] = 2
    with pytest.raises(ConfigError, match="in_channels: 2, but the input has 1"):
        build_model(ZarrConfig.model_validate(told), in_channels=1)
    told["dataset_config"]["in_channels"], told["model_config"]["vram_max_gb"] = 1, 0.001
    with pytest.raises(ConfigError, match="vram_max_gb: training needs about .* allowed are 0.001"):
        build_model(ZarrConfig.model_validate(told))


# ---- costs


def test_published_work_of_the_comparison_networks():
    "FLOPs of the specification's table, per 64^3 input: 168.9 for the seed network, 154.0 and 101.4 for two prototypes"
    shape, f = (1, 1, 64, 64, 64), (32, 64, 128, 256)
    seed = hollow(NetworkConfig(preset="seed", f_maps=f))
    assert abs(2 * conv_flops(seed, shape) / 1e9 - 168.9) < 1
    nets = {d: hollow(NetworkConfig(f_maps=f, blocks_per_level=1, se="cse", decoder=d)) for d in ("separate", "shared")}
    flops = {d: 2 * conv_flops(m, shape) / 1e9 for d, m in nets.items()}
    assert flops["shared"] < 0.67 * flops["separate"]


def test_the_summary_adds_up():
    for net in ("resenc", "seed", "anisotropic", "shared"):
        model = build_model(NETS[net], TWO)
        costs = level_costs(model, (16, 16, 16), 2)
        assert sum(c.parameters for c in costs) == count_parameters(model)
        assert sum(c.gflop for c in costs) == pytest.approx(2 * conv_flops(model, (2, 1, 16, 16, 16)) / 1e9)
        assert all(c.megabytes > 0 and c.shape[0] == 2 for c in costs)
        text = summary(model, (16, 16, 16))
        assert f"{count_parameters(model):,}" in text.split("\n")[-1] and len(text.split("\n")) == len(costs) + 2
    with pytest.raises(DataError, match="needs"):
        summary(model)


@pytest.mark.parametrize("name", ["resenc", "seed", "shared"])
def test_estimated_memory_is_what_a_step_holds(name):
    model, x = build_model(NETS[name], TWO), torch.zeros(2, 1, 32, 32, 32)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    activations = sum(n for k, n in kept.items() if k not in own)
    del out
    with _Live() as live:
        _step(model, x)
    told = estimate_memory(NETS[name], "fp32", targets=TWO, patch_size=(32, 32, 32), batch_size=2)
    assert told == live.peak + x.nbytes + 12 * count_parameters(model)
    assert activations <= live.peak <= 1.5 * activations + 4 * count_parameters(model)
    half = estimate_memory(NETS[name], "bf16", targets=TWO, patch_size=(32, 32, 32), batch_size=2)
    assert 0.45 * told < half < 0.75 * told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["resenc", "seed", "shared"])
def test_estimated_memory_on_a_gpu(name, precision):
    "Within a quarter of the measured peak"
    net = NETS[name].model_copy(update={"f_maps": (32, 64, 128)})
    model = build_model(net, TWO).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.zeros(2, 1, 64, 96, 96, device="cuda")
    for k in range(2):
        if k:
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            out = model(x)
        sum(torch.sigmoid(y.float()).square().sum() for y in out.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        del out
    told = estimate_memory(net, precision, targets=TWO, patch_size=(64, 96, 96), batch_size=2)
    assert 0.75 < told / torch.cuda.max_memory_allocated() < 1.25
