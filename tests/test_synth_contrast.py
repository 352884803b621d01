"""Page 44: the flat network and its published layout, the loss, statistics of pairs, retrieval."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from medvol_nb.checkpoints import save_checkpoint, torch_rng_for
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, rng_for
from medvol_nb.synth.contrast import (
    NETWORKS,
    Contrast,
    ContrastConfig,
    FlatUNet,
    NetworkConfig,
    PairedNorm,
    PointSampler,
    build_network,
    contrast_loss,
    describe_network,
    draw_points,
    labels_at,
    load_network,
    loss_layers,
    plateau,
    projector,
    retrieval,
    retrieval_points,
    supervised_contrastive,
)

TINY = NetworkConfig(width=4, levels=2, out_channels=6)


def normal(*shape, key=0):
    return torch.from_numpy(rng_for(0, "test", key, *shape).normal(size=shape)).float()


# ---------------------------------------------------------------- the network (A15)


class Described(nn.Module):
    "The network as its description says: one Sequential called `model`, skips before the up-sampled features"

    def __init__(self, width=16, out=16, levels=4):
        super().__init__()
        parts, self.save, self.join = [], [], []

        def unit(a, b):
            conv = nn.Conv3d(a, b, 3, padding="same", padding_mode="reflect", bias=False)
            parts.extend([conv, nn.BatchNorm3d(b), nn.ReLU()])

        unit(1, width)
        widths = [width * 2**k for k in range(levels)]
        for k, w in enumerate(widths):
            unit(widths[k - 1] if k else width, w)
            unit(w, w)
            self.save.append(len(parts) - 1)
            parts.append(nn.MaxPool3d(2))
        unit(widths[-1], 2 * widths[-1])
        unit(2 * widths[-1], 2 * widths[-1])
        for w in widths[::-1]:
            self.join.append(len(parts))
            parts.append(nn.Upsample(scale_factor=2))
            unit(3 * w, w)
            unit(w, w)
        parts.append(nn.Conv3d(width, out, 3, padding="same", padding_mode="reflect", bias=False))
        self.model = nn.Sequential(*parts)

    def forward(self, x):
        stack, seen = [], []
        for k, layer in enumerate(self.model):
            x = layer(x)
            if k in self.save:
                stack.append(x)
            if k in self.join:
                x = torch.cat([stack.pop(), x], 1)
            seen.append(x)
        return seen


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A network of the published shape and its weight file with the published names"
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        net = Described().eval()
    rng = torch_rng_for(0, "published")
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if "running_var" in name:
                value.copy_(torch.rand(value.shape, generator=rng) + 0.5)
            elif value.is_floating_point():
                value.mul_(1.5).add_(0.02 * torch.randn(value.shape, generator=rng))
    path = tmp_path_factory.mktemp("weights") / "anatomix.pth"
    torch.save(net.state_dict(), path)
    return net, path


def test_A15_the_published_layout_loads_strictly_and_gives_the_same_features(published):
    net, path = published
    ours = load_network(path, "cpu")
    assert ours.net.cfg == NETWORKS["anatomix"] and not ours.net.training
    assert len(ours.net.layers) == 66 and sum(p.numel() for p in ours.net.parameters()) == 5_899_344
    x = normal(1, 1, 32, 32, 48)
    with torch.no_grad():
        theirs, out = net(x), ours.net(x)
        mine = ours.net.features(x, (27, 31, 38, 45, 52, 65))
    assert out.shape == (1, 16, 32, 32, 48) and out.std() > 1e-3
    assert (out - theirs[-1]).abs().max() <= 1e-4
    for k, f in mine.items():
        assert (f - theirs[k]).abs().max() <= 1e-4
    assert [f.shape[1] for f in mine.values()] == [128, 256, 128, 64, 32, 16]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_A15_prefixes_of_wrappers_are_taken_off(published, prefix, tmp_path):
    net, _ = published
    torch.save({"state_dict": {prefix + k: v for k, v in net.state_dict().items()}}, tmp_path / "w.pth")
    assert torch.equal(load_network(tmp_path / "w.pth", "cpu").net.layers[65].weight, net.model[65].weight)


def test_A15_a_missing_an_extra_and_a_changed_tensor_are_errors(published, tmp_path):
    weights = published[0].state_dict()
    for change, message in (
        ({"model.4.weight": None}, "missing: layers.4.weight"),
        ({"model.99.scale": torch.ones(2)}, "unexpected: layers.99.scale"),
        ({"model.38.weight": torch.ones(128, 300, 3, 3, 3)}, "changed in shape: layers.38.weight"),
    ):
        torch.save({k: v for k, v in {**weights, **change}.items() if v is not None}, tmp_path / "w.pth")
        with pytest.raises(DataError, match=message):
            load_network(tmp_path / "w.pth", "cpu")


def test_the_larger_published_network_has_its_parameters():
    net = FlatUNet(NETWORKS["anatomix-dev"])
    assert sum(p.numel() for p in net.parameters()) == 94_369_568
    assert isinstance(net.layers[1], nn.InstanceNorm3d) and net.layers[1].eps == 1e-2
    assert any(isinstance(m, nn.AvgPool3d) for m in net.layers) and net.layers[-1].out_channels == 32


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_layers_keep_their_outputs(norm, levels):
    "No later layer writes into a feature, and a list of layers gives what the whole network gives"
    net = build_network(NetworkConfig(width=4, levels=levels, norm=norm)).eval()
    x = normal(2, 1, 16, 16, 32)
    convs = [k for k, m in enumerate(net.layers) if isinstance(m, nn.Conv3d)]
    with torch.no_grad():
        every = net.features(x, convs)
        for k in convs:
            assert torch.equal(net.features(x, (k,))[k], every[k])
            assert every[k].shape[1:] == (net.channels[k], *(n // net.stride[k] for n in x.shape[2:]))
    assert loss_layers(net)[-1] == len(net.layers) - 1


@pytest.mark.parametrize("shape", [(14, 16, 16), (8, 16, 4), (16, 16, 2)])
def test_sizes_that_do_not_fit_are_refused(shape):
    with pytest.raises(DataError, match=r"multiples of 4 from 8 up, got"):
        build_network(TINY)(torch.zeros(1, 1, *shape))


def test_networks_of_one_seed_are_equal_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    a, b, c = (build_network(TINY, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["layers.0.weight"], c["layers.0.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_files_that_are_no_networks_are_refused(tmp_path):
    with pytest.raises(MissingFile, match="is it a run folder"):
        load_network(tmp_path)
    with pytest.raises(MissingFile, match="does not exist"):
        load_network(tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"not a file of weights")
    with pytest.raises(FormatError, match="refused or damaged"):
        load_network(tmp_path / "bad.pth")
    torch.save({"encoder.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(FormatError, match="layout not recognised"):
        load_network(tmp_path / "other.pth")
    for k, state in enumerate(({"model": {}}, {"model": {}, "config": {"model": {"format": "other"}}}, {"step": 1})):
        path = save_checkpoint(tmp_path / f"{k}.safetensors", state)
        with pytest.raises(FormatError, match="not weights of `medvol synth pretrain`"):
            load_network(path)


def test_own_weights_carry_their_network(tmp_path):
    model = Contrast(build_network(TINY, 3))
    about = describe_network(TINY, (32, 16, 16), "ct:-450,450")
    save_checkpoint(tmp_path / "model.safetensors", {"model": model.state_dict(), "config": {"model": about}})
    back = load_network(tmp_path, "cpu")
    assert (back.net.cfg, back.patch_size, back.normalizer) == (TINY, (32, 16, 16), "ct:-450,450")
    assert all(torch.equal(v, model.net.state_dict()[k]) for k, v in back.net.state_dict().items())


# ---------------------------------------------------------------- the loss (A16)


def naive(z, labels, temperature=0.33, anchors="none", others="none"):
    "O(n² d): every sum written out"
    power = {"none": 0.0, "raw": 1.0, "sqrt": 0.5}
    z = [list(map(float, v)) for v in z.double()]
    labels, n = [int(v) for v in labels], len(z)
    length = [math.sqrt(sum(a * a for a in v)) for v in z]
    sim = [
        [sum(a * b for a, b in zip(z[i], z[j])) / length[i] / length[j] / temperature for j in range(n)]
        for i in range(n)
    ]
    losses, weights = [], []
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        size = {c: sum(labels[j] == c for j in rest) for c in labels}
        w = {j: size[labels[j]] ** -power[others] for j in rest}
        scale = (n - 1) / sum(w.values())
        total = sum(w[j] * scale * math.exp(sim[i][j]) for j in rest)
        friends = [j for j in rest if labels[j] == labels[i]]
        if friends:
            losses.append(-sum(sim[i][p] - math.log(total) for p in friends) / len(friends))
            weights.append(labels.count(labels[i]) ** -power[anchors])
    return sum(a * b for a, b in zip(losses, weights)) / sum(weights) if losses else 0.0


@pytest.mark.parametrize("anchors", ["none", "raw", "sqrt"])
@pytest.mark.parametrize("others", ["none", "raw", "sqrt"])
def test_A16_equals_the_naive_loss(anchors, others):
    for key, classes in enumerate((1, 2, 5, 12)):
        z = normal(3, 24, 7, key=key)
        labels = torch.from_numpy(rng_for(key, "labels").integers(0, classes, (3, 24)))
        for temperature in (0.07, 0.33, 1.0):
            ours = supervised_contrastive(z, labels, temperature=temperature, anchors=anchors, others=others)
            theirs = np.mean([naive(a, b, temperature, anchors, others) for a, b in zip(z, labels)])
            assert abs(ours.item() - theirs) < 1e-5 * max(1, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["single voxels", "one class", "one among many", "all vectors alike", "zeros"])
@pytest.mark.parametrize("balance", ["none", "raw"])
def test_A16_stays_finite(dtype, kind, balance):
    z, labels = normal(2, 16, 5), torch.zeros(2, 16, dtype=torch.int64)
    if kind == "single voxels":
        labels = torch.arange(32).view(2, 16)
    if kind == "one among many":
        labels[:, 3] = 1
    if kind == "all vectors alike":
        z = torch.ones_like(z)
    if kind == "zeros":
        z = torch.zeros_like(z)
    z = z.to(dtype).requires_grad_()
    loss = supervised_contrastive(z, labels, temperature=0.05, anchors=balance, others=balance)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(z.grad).all()
    if kind == "single voxels":
        assert loss.item() == 0 and not z.grad.any()
    if kind == "one class" and balance == "none":
        assert abs(loss.item() - np.mean([naive(a, b, 0.05) for a, b in zip(z.detach(), labels)])) < 1e-3


def test_A16_half_precision_around_the_loss_does_not_reach_into_it():
    z, labels = normal(1, 40, 8), torch.arange(40)[None] % 5
    with torch.autocast("cpu", torch.bfloat16):
        inside = supervised_contrastive(z, labels)
    assert torch.equal(inside, supervised_contrastive(z, labels))


def test_A16_pairs_of_a_batch_are_never_compared():
    z, labels = normal(4, 20, 6), torch.from_numpy(rng_for(0, "b").integers(0, 3, (4, 20)))
    apart = [supervised_contrastive(a[None], b[None]) for a, b in zip(z, labels)]
    assert abs(supervised_contrastive(z, labels) - torch.stack(apart).mean()) < 1e-6


def test_vectors_that_are_alike_give_the_plateau():
    for p in (64, 256):
        labels = torch.from_numpy(rng_for(p, "l").integers(0, 9, p)).repeat(2)[None]
        loss = supervised_contrastive(torch.ones(1, 2 * p, 4), labels)
        assert abs(loss.item() - plateau({"a": p})) < 1e-4
    assert abs(plateau({"a": 64, "b": 256, "c": 256, "d": 256}) - 5.888) < 1e-3  # section 17, setting A
    assert plateau({"a": 64, "b": 256}, {"a": 0.0, "b": 2.0}) == math.log(511)


@pytest.mark.parametrize("shapes", [((1, 4, 3), (1, 5)), ((4, 3), (4,)), ((1, 1, 3), (1, 1))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(DataError, match="vectors .b, n, d. and labels"):
        supervised_contrastive(torch.ones(shapes[0]), torch.ones(shapes[1], dtype=torch.int64))


# ---------------------------------------------------------------- pairs in a batch (D17)


def batch_of(model, keys, side=16):
    items = []
    for k in keys:
        seg = rng_for(k, "seg").integers(0, 5, (side, side, side))
        items.append({"img": normal(2, side, side, side, key=k), **model.sampler.draw(seg, rng_for(k, "points"))})
    return torch.utils.data.default_collate(items)


def step(model, batch):
    model.zero_grad()
    loss = contrast_loss(model(batch["img"], batch["points"]), batch["labels"], model.cfg, model.weights)["loss"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.ravel() for p in model.parameters()])


@pytest.mark.parametrize("depth", [2, 3])
def test_D17_a_batch_is_the_mean_of_its_pairs(depth):
    cfg = ContrastConfig(points=50, projector_width=16, projector_depth=depth)
    whole = Contrast(build_network(TINY), cfg)
    loss, gradient = step(whole, batch_of(whole, range(3)))
    parts, models = [], []
    for k in range(3):
        models.append(Contrast(build_network(TINY), cfg))
        parts.append(step(models[-1], batch_of(models[-1], [k])))
    assert abs(loss - np.mean([p[0] for p in parts])) < 1e-5
    mean = torch.stack([p[1] for p in parts]).mean(0)
    assert (gradient - mean).abs().max() < 1e-4 * mean.abs().max()
    for name, value in whole.named_buffers():  # running statistics move to the mean over pairs
        if "num_batches" not in name:
            own = torch.stack([dict(m.named_buffers())[name] for m in models]).mean(0)
            assert torch.allclose(value, own, atol=1e-5)


def test_paired_statistics_are_usual_ones_in_evaluation_and_for_one_group():
    ours, theirs = PairedNorm(5), nn.BatchNorm3d(5)
    x = normal(4, 5, 3, 4, 2)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)
    ours.groups = 2
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), theirs(x)) and list(ours.state_dict()) == list(theirs.state_dict())


# ---------------------------------------------------------------- points, projectors, settings


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_labels_are_those_of_torch_nearest(stride):
    seg = rng_for(stride, "seg").integers(0, 2**16, (16, 8, 24)).astype(np.uint16)
    points = draw_points([n // stride for n in seg.shape], 30, rng_for(0, "p"))
    small = torch.nn.functional.interpolate(
        torch.from_numpy(seg.astype(np.float64))[None, None], size=[n // stride for n in seg.shape], mode="nearest"
    )
    assert np.array_equal(labels_at(seg, points, stride), small.numpy().astype(np.int64).ravel()[points])


def test_points_are_distinct_uniform_and_repeatable():
    sampler = PointSampler({"a": 1, "b": 4}, 100)
    seg = np.zeros((8, 8, 8), np.uint8)
    drawn = sampler.draw(seg, rng_for(0, "p"))
    assert len(set(drawn["points"]["a"])) == 100 and sorted(drawn["points"]["b"]) == list(range(8))
    assert sampler.count(seg.shape) == {"a": 100, "b": 8}
    again = sampler.draw(seg, rng_for(0, "p"))
    assert all(np.array_equal(drawn["points"][k], again["points"][k]) for k in "ab")
    counts = np.zeros(512)
    for k in range(400):
        counts[draw_points((8, 8, 8), 64, rng_for(k, "u"))] += 1
    assert abs(counts.mean() - 50) < 1e-9 and ((counts - 50) ** 2 / 50).sum() < 512 + 6 * math.sqrt(2 * 512)


def test_vectors_belong_to_their_points():
    "View 1 first, then view 2, each at the drawn positions of the layer"
    model = Contrast(build_network(TINY), ContrastConfig(points=20)).eval()
    model.heads = nn.ModuleDict({k: nn.Identity() for k in model.heads})
    batch = batch_of(model, [0, 1])
    with torch.no_grad():
        out = model(batch["img"], batch["points"])
        for i in range(2):
            found = model.net.features(batch["img"][i][:, None], model.addresses)
            for k, z in out.items():
                at, f = batch["points"][k][i], found[int(k)].flatten(2)
                assert torch.allclose(z[i], torch.cat([f[0][:, at].T, f[1][:, at].T]), atol=1e-5)


def test_a_projector_is_what_the_description_says():
    layers = projector(40, 24, 3)
    kinds = [type(m).__name__ for m in layers]
    assert kinds == ["Linear", "PairedNorm", "ReLU", "Linear", "PairedNorm", "ReLU", "Linear", "PairedNorm"]
    assert all(m.bias is None for m in layers if isinstance(m, nn.Linear)) and layers[-1].weight is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"layers": (1, 1)}, "named twice"),
        ({"layers": (1, 2), "weights": (1.0,)}, "one for each of 2 layers"),
        ({"weights": (0.0, 0.0), "layers": (1, 2)}, "not all 0"),
        ({"temperature": 0}, "temperature"),
        ({"projector_depth": 4}, "projector_depth"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ContrastConfig(**given)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="the network has layers 0 to 37, got .90."):
        Contrast(build_network(TINY), ContrastConfig(layers=(3, 90)))


def test_layer_weights_count():
    cfg = ContrastConfig(layers=(3, 37), weights=(1.0, 3.0), points=30)
    model = Contrast(build_network(TINY), cfg)
    batch = batch_of(model, [0])
    with torch.no_grad():
        out = contrast_loss(model(batch["img"], batch["points"]), batch["labels"], cfg, model.weights)
    assert abs(out["loss"] - (out["layer_3"] + 3 * out["layer_37"]) / 4) < 1e-5


# ---------------------------------------------------------------- retrieval


def test_retrieval_by_hand():
    labels = np.array([0, 0, 1, 1])
    first = np.array([[1.0, 0], [1.0, 0.1], [-1, 0], [-1, 0.1]])
    assert retrieval(first, first, labels) == 1
    assert retrieval(first, first[[2, 3, 0, 1]], labels) == 0  # the other label is always nearest
    assert retrieval(first, 100 * first + 7, labels) == 1  # the mean is taken off, lengths do not count
    assert retrieval(first, first, labels, metric="euclidean") == 1


def test_a_voxel_never_finds_itself():
    "With one voxel of each label nothing right can be found, however good the features"
    eye = np.eye(6)
    assert retrieval(eye, eye, np.arange(6)) == 0


def test_guessing_gives_about_one_over_the_number_of_labels():
    labels = np.repeat(np.arange(8), 15)
    scores = [retrieval(*rng_for(k, "r").normal(size=(2, 120, 16)), labels) for k in range(40)]
    assert abs(np.mean(scores) - 14 / 119) < 0.02


def test_retrieval_points_take_at_most_fifteen_of_each_label():
    seg = rng_for(0, "s").integers(0, 4, (9, 9, 9)).astype(np.uint16)
    seg[0, 0, 0] = 77
    at = retrieval_points(seg, rng_for(0, "r"))
    counts = dict(zip(*np.unique(seg.ravel()[at], return_counts=True)))
    assert counts == {0: 15, 1: 15, 2: 15, 3: 15, 77: 1} and len(set(at)) == 61
    assert np.array_equal(at, retrieval_points(seg, rng_for(0, "r")))
