"""Page 31: shapes, counts and strides of the published network, inflation, key map, files."""

import pytest
import torch
import torch.nn.functional as F

from medvol_nb.blocks import conv_flops, count_parameters
from medvol_nb.checkpoints import load_weights, save_checkpoint
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile
from medvol_nb.embed.model import (
    MODELS,
    STRIDES,
    AnatNet,
    EmbedderConfig,
    ModelConfig,
    build_model,
    inflate_resnet18,
    load_embedder,
    load_start,
    map_shape,
    model_digest,
    model_of,
    published_name,
    save_embedder,
)

SMALL = ModelConfig(width=8, emb=12, heads=("fine", "coarse", "semantic"))
HEADS = {"fine": "neck", "coarse": "read_out_head", "semantic": "semantic_head"}


def published(net: AnatNet) -> dict[str, torch.Tensor]:
    "State dict under the names of the published checkpoints, written from the list in the specification"
    out = {}
    for key, value in net.state_dict().items():
        p = key.split(".")
        kind = "conv" if p[-2] == "conv" else "bn"
        if p[0] == "stem": name = f"backbone.conv1.{kind}.{p[-1]}"
        elif p[0] == "heads":
            part = "lateral" if p[2] == "lateral" else "fpn"
            name = f"{HEADS[p[1]]}.{part}_convs.{p[3]}.conv.{p[-1]}"
        elif p[3] == "shortcut": name = f"backbone.layer{int(p[1]) + 1}.{p[2]}.downsample.{kind}.{p[-1]}"
        else: name = f"backbone.layer{int(p[1]) + 1}.{p[2]}.conv{int(p[4]) + 1}.{kind}.{p[-1]}"
        out[name] = value
    return out


def photos(width: int = 8, blocks: tuple = (2, 2, 2, 2)) -> dict[str, torch.Tensor]:
    "Random weights in the layout of torchvision's ResNet with basic blocks"
    g, out, c_in = torch.Generator().manual_seed(0), {}, width

    def norm(name, c):
        out.update({f"{name}.{k}": torch.rand(c, generator=g) + 0.5
                    for k in ("weight", "bias", "running_mean", "running_var")})
        out[f"{name}.num_batches_tracked"] = torch.tensor(3)

    out["conv1.weight"] = torch.randn(width, 3, 7, 7, generator=g)
    norm("bn1", width)
    for s, n in enumerate(blocks):
        c = width*2**s
        for b in range(n):
            for k, i in ((1, c if b else c_in), (2, c)):
                out[f"layer{s + 1}.{b}.conv{k}.weight"] = torch.randn(c, i, 3, 3, generator=g)
                norm(f"layer{s + 1}.{b}.bn{k}", c)
            if b == 0 and s:
                out[f"layer{s + 1}.{b}.downsample.0.weight"] = torch.randn(c, c_in, 1, 1, generator=g)
                norm(f"layer{s + 1}.{b}.downsample.1", c)
        c_in = c
    return out | {"fc.weight": torch.ones(5, c_in), "fc.bias": torch.ones(5)}


@pytest.mark.parametrize(("name", "total"), [("AnatSAM", 32.83), ("AnatSAMpp", 33.33)])
def test_A1_parameter_counts_are_the_published_ones(name, total):
    net = build_model(MODELS[name])
    assert round(count_parameters(net)/1e6, 2) == total
    assert round((count_parameters(net) - count_parameters(net.heads))/1e6, 2) == 31.82
    assert round(count_parameters(net.heads["fine"])/1e6, 3) == 0.5
    assert round(count_parameters(net.heads["coarse"])/1e6, 3) == 0.508


def test_A1_work_of_a_training_crop():
    assert round(2*conv_flops(build_model(), (1, 1, 32, 96, 96))/1e9, 1) == 114.6


@pytest.mark.parametrize("shape", [(32, 96, 96), (7, 33, 50), (1, 16, 17), (150, 12, 14)])
def test_A1_maps_have_ceiled_sizes_and_unit_vectors(shape):
    net = build_model(SMALL).eval()
    with torch.no_grad(): out = net(torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(1))*50)
    assert list(out) == list(SMALL.heads)
    for head, v in out.items():
        assert v.shape == (2, 12, *(-(-n//s) for n, s in zip(shape, STRIDES[head])))
        assert v.shape[2:] == map_shape(shape, head) and v.dtype == torch.float32
        assert (v.norm(dim=1) - 1).abs().max() < 1e-3


def test_A1_kernels_and_strides_of_every_stage():
    net = build_model(MODELS["AnatSAM"])
    assert net.stem.conv.kernel_size == (3, 7, 7) and net.stem.conv.stride == (1, 1, 1)
    assert net.pool.kernel_size == (2, 1, 1)
    for i, stage in enumerate(net.stages):
        for b, block in enumerate(stage):
            first, second = (layer.conv for layer in block.body)
            assert first.kernel_size == second.kernel_size == ((3 if i > 1 else 1), 3, 3) and second.stride == (1, 1, 1)
            assert first.stride == ((1, 1, 1) if b else ((2 if i == 3 else 1), 2, 2)) and first.bias is None
    assert [len(h.lateral) for h in net.heads.values()] == [3, 1]


@pytest.mark.parametrize("cfg", [SMALL, ModelConfig(width=16, emb=8), ModelConfig(depth=34, width=8, emb=8)])
def test_A1_published_names_load_with_no_key_missing(cfg, tmp_path):
    net = build_model(cfg, seed=4)
    weights = published(net)
    assert {published_name(k) for k in weights} == set(net.state_dict())
    torch.save({"meta": {"epoch": 3}, "state_dict": weights, "optimizer": {}}, tmp_path/"iter_20000.pth")
    back, about = load_embedder(tmp_path/"iter_20000.pth", "cpu")
    assert about.model == cfg and about.digest == model_digest(net)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in back.state_dict().items())


def test_published_file_without_counters_or_with_a_lost_key(tmp_path):
    weights = {k: v for k, v in published(build_model(SMALL)).items() if "num_batches" not in k}
    torch.save(weights, tmp_path/"a.pth")
    load_embedder(tmp_path/"a.pth", "cpu")
    weights.pop("backbone.layer3.1.conv2.conv.weight")
    torch.save(weights, tmp_path/"b.pth")
    with pytest.raises(DataError, match="1 missing: stages.2.1.body.1.conv.weight"): load_embedder(tmp_path/"b.pth")


@pytest.mark.parametrize(("depth", "blocks"), [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))])
def test_inflated_weights_do_on_a_constant_z_what_the_photo_network_does(depth, blocks):
    photo = photos(blocks=blocks)
    net = AnatNet(depth=depth, width=8, emb=8)
    report = load_weights(net, inflate_resnet18(photo), strict=False)
    assert not report.unexpected and not report.changed
    assert {k.split(".")[0] for k in report.missing} == {"heads", "stages"}
    assert all(k.startswith(("heads.", "stages.0.0.shortcut")) for k in report.missing)
    for i, stage in enumerate(net.stages):
        for b, block in enumerate(stage):
            for j, layer in enumerate(block.body):
                flat = photo[f"layer{i + 1}.{b}.conv{j + 1}.weight"]
                assert torch.allclose(layer.conv.weight.sum(2), flat, atol=1e-6)
                assert torch.equal(layer.norm.running_var, photo[f"layer{i + 1}.{b}.bn{j + 1}.running_var"])
    assert torch.equal(net.stem.conv.weight[:, 0], photo["conv1.weight"])


def test_slices_keep_flat_kernels():
    photo, net = photos(), AnatNet(dims=2, width=8, emb=8).eval()
    report = load_weights(net, inflate_resnet18(photo, dims=2), strict=False)
    assert not report.unexpected and not report.changed
    x = torch.randn(1, 1, 20, 20, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = F.conv2d(x.expand(1, 3, 20, 20), photo["conv1.weight"], padding=3)
        assert torch.allclose(net.stem.conv(x), want, atol=1e-4)
        assert net(x)["coarse"].shape == (1, 8, 2, 2)


def test_D06_a_file_of_gpu_pickles_is_not_the_format(tmp_path):
    "Ours opens on a CPU, without the code that wrote it, and says which network it is"
    path = save_embedder(tmp_path/"m.safetensors", build_model(SMALL), EmbedderConfig(name="x", spacing=1.5))
    net, about = load_embedder(path, "cpu")
    assert about.spacing == 1.5 and about.model == SMALL and not net.training
    assert next(net.parameters()).device.type == "cpu"


@pytest.mark.parametrize("norm", ["bn", "syncbn", "gn", "in"])
def test_D21_every_norm_trains_and_loads(norm, tmp_path):
    net = build_model(SMALL.model_copy(update={"norm": norm}))
    sum(v.square().mean() + v.sum() for v in net(torch.randn(2, 1, 8, 32, 32)).values()).backward()
    assert all(p.grad is not None for p in net.parameters())
    path = save_embedder(tmp_path/"m.safetensors", net, EmbedderConfig())
    assert load_embedder(path, "cpu")[0].cfg.norm == norm
    assert model_of(net.state_dict()).norm == {"syncbn": "bn", "in": "gn"}.get(norm, norm)


def test_several_sizes_in_one_call():
    net = build_model(SMALL).eval()
    xs = [torch.randn(2, 1, 8, 32, 32), torch.randn(1, 1, 6, 16, 24)]
    with torch.no_grad():
        for a, b in zip(net(xs), map(net, xs)): assert all(torch.equal(a[h], b[h]) for h in a)


def test_same_seed_same_weights():
    a, b, c = (model_digest(build_model(SMALL, s)) for s in (0, 0, 1))
    assert a == b != c


def test_a_start_keeps_what_the_file_lacks(tmp_path):
    two = SMALL.model_copy(update={"heads": ("fine", "coarse")})
    save_embedder(tmp_path/"two.safetensors", build_model(two, 1), EmbedderConfig())
    net = build_model(SMALL, 2)
    before = net.heads["semantic"].output[0].weight.clone()
    load_start(net, tmp_path/"two.safetensors")
    assert torch.equal(net.heads["semantic"].output[0].weight, before)
    assert torch.equal(net.stem.conv.weight, build_model(two, 1).stem.conv.weight)


def test_what_is_no_embedding_network_is_refused(tmp_path):
    with pytest.raises(MissingFile): load_embedder(tmp_path/"none.pth")
    with pytest.raises(MissingFile, match="is it a run folder"): load_embedder(tmp_path)
    save_checkpoint(tmp_path/"a.safetensors", {"model": {}, "config": {"model": {}}})
    with pytest.raises(FormatError, match="no embedding network"): load_embedder(tmp_path/"a.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path/"a.pth")
    with pytest.raises(FormatError, match="layout not recognised"): load_embedder(tmp_path/"a.pth")
    odd = {"conv1.weight": torch.ones(4, 3, 7, 7), "x": torch.ones(1)}
    with pytest.raises(FormatError, match="has no place"): inflate_resnet18(odd)
    for bad in ({"depth": 50}, {"width": 12}, {"heads": ["fine"]}, {"norm": "ln"}, {"dims": 4}):
        with pytest.raises(ConfigError): AnatNet(**bad)
    with pytest.raises(DataError, match="is needed, got"): build_model(SMALL)(torch.zeros(1, 1, 8, 8))
