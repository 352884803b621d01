"""Features of slices against a literal Segment Anything, and of volumes: grids, weights of views, caches, memory."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medvol_nb import samfeat
from medvol_nb.checkpoints import seeded
from medvol_nb.core import ConfigError, DataError, FormatError, MedvolError, MissingFile, OutputExists, rng_for
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.samfeat import (
    VIEWS,
    EmbeddingCache,
    SamFeatureExtractor,
    encoder_input,
    in_batches,
    plan_encoding,
    slice_image,
    view_planes,
)
from medvol_nb.samweights import _RENAMES, SamShape, random_sam

from .faults.injectors import forked

TINY = SamShape(16, 3, 2, 32, (1,), window=3, grid=8, neck=64)


def original(tensors):
    "Names of segment_anything for the names of transformers"
    out = {}
    for k, v in tensors.items():
        for old, new in reversed(_RENAMES):
            k = k.replace(new, old)
        out[k] = v
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("sam") / "tiny.pth"
    torch.save({"model": original(random_sam(TINY, seed=3).tensors)}, path)
    return path


@pytest.fixture
def sam(checkpoint):
    return SamFeatureExtractor(checkpoint, device="cpu")


def volume(shape, seed=0):
    "Smooth random values in [0, 1]"
    from scipy.ndimage import gaussian_filter, zoom

    rough = rng_for(seed, "samfeat").random([max(2, n // 4) for n in shape])
    v = zoom(gaussian_filter(rough, 0.5), np.divide(shape, rough.shape), order=1)
    return ((v - v.min()) / max(np.ptp(v), 1e-9)).astype(np.float32)


# ---------------------------------------------------------------- literal Segment Anything, §3.1 and §1


def literal_encoder(p, x, depth, heads, window, global_layers):
    "The image encoder of segment_anything, written out: original names, explicit attention, float64"
    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=16).permute(0, 2, 3, 1)
    x = x + p["pos_embed"]
    for i in range(depth):
        q = {k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if k.startswith(f"blocks.{i}.")}
        norm = lambda v, n, q=q: F.layer_norm(v, v.shape[-1:], q[f"{n}.weight"], q[f"{n}.bias"], 1e-6)
        y, side = norm(x, "norm1"), x.shape[1]
        w = side if i in global_layers else window
        padded = math.ceil(side / w) * w
        y = F.pad(y, (0, 0, 0, padded - side, 0, padded - side))
        out = torch.empty_like(y)
        for r in range(0, padded, w):
            for c in range(0, padded, w):
                out[:, r : r + w, c : c + w] = literal_attention(q, y[:, r : r + w, c : c + w], heads)
        x = x + out[:, :side, :side]
        h = F.gelu(norm(x, "norm2") @ q["mlp.lin1.weight"].T + q["mlp.lin1.bias"])
        x = x + h @ q["mlp.lin2.weight"].T + q["mlp.lin2.bias"]
    x = x.permute(0, 3, 1, 2)
    x = norm_2d(F.conv2d(x, p["neck.0.weight"]), p["neck.1.weight"], p["neck.1.bias"])
    return norm_2d(F.conv2d(x, p["neck.2.weight"], padding=1), p["neck.3.weight"], p["neck.3.bias"])


def literal_attention(q, y, heads):
    "Attention within a window: softmax(q k / sqrt(d) + q . R_h + q . R_w) v"
    n, w, _, d = y.shape
    qkv = (y @ q["attn.qkv.weight"].T + q["attn.qkv.bias"]).reshape(n, w * w, 3, heads, d // heads)
    out = torch.empty(n, w * w, heads, d // heads, dtype=y.dtype)
    row, column = torch.arange(w * w) // w, torch.arange(w * w) % w
    for h in range(heads):
        a, b, v = qkv[:, :, 0, h], qkv[:, :, 1, h], qkv[:, :, 2, h]
        s = a @ b.transpose(1, 2) / math.sqrt(d // heads)
        for table, at in ((q["attn.rel_pos_h"], row), (q["attn.rel_pos_w"], column)):
            distance = at[:, None] - at[None, :] + w - 1
            s = s + (a @ table.T).gather(2, distance.expand(n, -1, -1))
        out[:, :, h] = torch.softmax(s, -1) @ v
    return (out.reshape(n, w * w, d) @ q["attn.proj.weight"].T + q["attn.proj.bias"]).reshape(y.shape)


def norm_2d(x, weight, bias):
    "LayerNorm2d of segment_anything: over the channels"
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(1, keepdim=True) + 1e-6)
    return x * weight[:, None, None] + bias[:, None, None]


def literal_features(path, images, size, shape=TINY):
    "§1, step 2: pad at the end, resize, three colours, normalise, encoder, upscaling, back to the slice"
    p = {k: v.double() for k, v in torch.load(path, weights_only=True)["model"].items()}
    encoder = {k.removeprefix("image_encoder."): v for k, v in p.items()}
    up = {k.removeprefix("mask_decoder.output_upscaling."): v for k, v in p.items()}
    n, h, w = images.shape
    square = torch.zeros(n, 1, max(h, w), max(h, w), dtype=torch.float64)
    square[:, 0, :h, :w] = images
    x = F.interpolate(square, (size, size), mode="bilinear", antialias=False).repeat(1, 3, 1, 1)
    x = (x - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / torch.tensor([58.395, 57.12, 57.375])[
        :, None, None
    ]
    e = literal_encoder(encoder, x, shape.layers, shape.heads, shape.window, shape.global_layers)
    f = F.gelu(norm_2d(F.conv_transpose2d(e, up["0.weight"], up["0.bias"], stride=2), up["1.weight"], up["1.bias"]))
    f = F.gelu(F.conv_transpose2d(f, up["3.weight"], up["3.bias"], stride=2))
    return F.interpolate(f, (max(h, w),) * 2, mode="bilinear")[:, :, :h, :w]


@pytest.mark.parametrize("shape", [(3, 40, 52), (1, 52, 40), (2, 33, 33), (1, 1, 9), (1, 150, 100)])
def test_B1_slice_features_equal_the_formula(sam, checkpoint, shape):
    "1e-4 relative to the largest feature is asked for; float32 against float64 gives a few 1e-6"
    images = torch.from_numpy(rng_for(1, *shape).random(shape) * 255)
    got, expected = sam.slice_features(images), literal_features(checkpoint, images, 128)
    assert got.shape == expected.shape == (shape[0], 8, *shape[1:]) and got.dtype == torch.float32
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-4


def test_B1_at_1024_pixels(tmp_path):
    "The published image size: 64 x 64 tokens, windows of 14 with padding to 70, 256 channels"
    shape = SamShape(8, 2, 1, 16, (1,))
    path = tmp_path / "wide.pth"
    torch.save({"model": original(random_sam(shape).tensors)}, path)
    images = torch.from_numpy(rng_for(2, "wide").random((1, 20, 16)) * 255)
    got, expected = (
        SamFeatureExtractor(path, device="cpu").slice_features(images),
        literal_features(path, images, 1024, shape),
    )
    assert got.shape == (1, 32, 20, 16) and ((got - expected).abs().max() / expected.abs().max()).item() < 1e-4


def test_native_features_are_those_below_the_padding(sam):
    images = torch.from_numpy(rng_for(1, "n").random((2, 30, 20)) * 255)
    native = sam.slice_features(images, native=True)
    assert native.shape == (2, 8, 32, math.ceil(32 * 20 / 30))
    full = sam.network.expand(sam.embed(list(images.float())))
    assert native.equal(full[..., :22])


def test_S1_no_patched_repository():
    "Only public classes of transformers; segment_anything is not needed"
    import sys

    SamFeatureExtractor(None, allow_random=True, device="cpu")
    assert "segment_anything" not in sys.modules and "torchvision" not in sys.modules


@pytest.mark.parametrize("kind", ["u1", ">f4", ">u2", "f8", "?", "list", "backwards", "tensor"])
def test_slices_of_any_number_type(sam, kind):
    images = (rng_for(8, "types").random((2, 9, 12)) > 0.5).astype(np.float32)
    given = {"list": images.tolist(), "backwards": images[::-1].copy()[::-1], "tensor": torch.from_numpy(images)}
    expected = sam.slice_features(images)
    assert sam.slice_features(given[kind] if kind in given else images.astype(kind)).equal(expected)


def test_embeddings_beyond_half_precision_are_refused(tmp_path):
    with pytest.raises(DataError, match="65504"):
        EmbeddingCache(tmp_path / "c").write("k", torch.full((1, 2, 2), 1e5))
    assert not list((tmp_path / "c").iterdir())


def test_encoder_input_pads_at_the_end():
    x = encoder_input(torch.full((1, 2, 4), 255.0), 4)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    assert torch.allclose(x[0, :, 0, 0], (255 - mean) / std) and torch.allclose(x[0, :, 3, 3], -mean / std)


@pytest.mark.parametrize(
    "bad, words",
    [
        (np.zeros((4, 4)), r"\(n, h, w\)"),
        (np.zeros((0, 4, 4)), r"\(n, h, w\)"),
        (np.zeros((1, 4, 0)), r"\(n, h, w\)"),
        (np.full((1, 4, 4), -1000), "got -1000 to -1000"),
        (np.full((1, 4, 4), 300), "got 300"),
        (np.full((1, 4, 4), np.nan), "got nan"),
        (np.full((1, 4, 4), np.inf), "got inf"),
    ],
)
def test_bad_slices_are_refused(sam, bad, words):
    with pytest.raises(DataError, match=words):
        sam.slice_features(bad)
    assert sam.encoded == 0


# ---------------------------------------------------------------- settings


def test_checkpoint_is_never_replaced_silently(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match="none was named"):
        SamFeatureExtractor(None)
    with pytest.raises(MissingFile, match="does not exist"):
        SamFeatureExtractor(tmp_path / "sam_vit_h_4b8939.pth", allow_random=True)
    assert SamFeatureExtractor(None, allow_random=True, device="cpu").name == "random"
    found = SamFeatureExtractor(checkpoint, device="cpu", allow_random=True)
    assert (found.name, found.config, found.channels, found.image_size) == ("custom", TINY, 8, 128)
    assert found.digest == random_sam(TINY, seed=3).digest


def test_S10_runs_on_a_processor_in_full_precision(checkpoint):
    sam = SamFeatureExtractor(checkpoint, device="cpu")
    assert (sam.device.type, sam.precision, sam.batch_size) == ("cpu", "fp32", 1)
    assert {p.device.type for p in sam.network.parameters()} == {"cpu"}
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        SamFeatureExtractor(checkpoint, device="cpu", dtype="fp16")
    with pytest.raises(ConfigError, match="precision"):
        SamFeatureExtractor(checkpoint, device="cpu", dtype="float32")
    for bad in (0, -1, 2.0, True, "many"):
        with pytest.raises(ConfigError, match="batch_size"):
            SamFeatureExtractor(checkpoint, device="cpu", batch_size=bad)
    half = SamFeatureExtractor(checkpoint, device="cpu", dtype="bf16")
    images = torch.from_numpy(rng_for(4, "bf").random((1, 24, 24)) * 255)
    a, b = sam.slice_features(images), half.slice_features(images)
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.1 * a.abs().max()


@pytest.mark.gpu
def test_S10_half_precision_on_a_gpu_is_close(checkpoint):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = torch.from_numpy(rng_for(4, "gpu").random((5, 24, 24)) * 255)
    a = SamFeatureExtractor(checkpoint, device="cpu").slice_features(images)
    gpu = SamFeatureExtractor(checkpoint, device="cuda")
    b = gpu.slice_features(images)
    assert gpu.precision in ("bf16", "fp16") and gpu.batch_size == 8 and (a - b).abs().max() < 0.05 * a.abs().max()


def test_not_a_number_from_the_encoder_is_an_error(sam):
    with torch.no_grad():
        next(sam.network.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="NaN or infinity in fp32"):
        sam.slice_features(np.zeros((1, 8, 8)))


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_result_does_not_depend_on_the_batch(checkpoint, size):
    images = torch.from_numpy(rng_for(5, "batch").random((7, 20, 28)) * 255)
    one = SamFeatureExtractor(checkpoint, device="cpu").slice_features(images)
    assert SamFeatureExtractor(checkpoint, device="cpu", batch_size=size).slice_features(images).equal(one)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
def test_batches_are_halved_on_every_kind_of_shortage(error):
    seen = []

    def f(part):
        seen.append(len(part))
        if len(part) > 2:
            raise error
        return [x + 1 for x in part]

    assert list(in_batches(f, list(range(11)), 8)) == list(range(1, 12))
    assert seen == [8, 4, 2, 2, 2, 2, 2, 1]
    with pytest.raises(MedvolError, match="out of memory with a single slice") as e:
        list(in_batches(lambda part: (_ for _ in ()).throw(error), [1, 2], 2))
    assert e.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyboardInterrupt(), ValueError("x")])
def test_other_errors_pass_through_batches(error):
    def f(part):
        raise error

    with pytest.raises(type(error)):
        list(in_batches(f, [1], 1))


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "shape, spacing, stride, expected",
    [
        ((512, 512, 300), (1, 1, 1), 1, 1324),  # the figure of §4.1
        ((512, 512, 300), (1, 1, 1), "auto", 171 + 171 + 100),
        ((512, 512, 60), (0.7, 0.7, 5), "auto", 128 + 128 + 60),
        ((1, 1, 1), (1, 1, 1), "auto", 3),
        ((7, 5, 3), (9, 9, 9), "auto", 15),
        ((10, 10, 10), (1, 1, 1), {"ax": 5}, 2 + 4 + 4),
    ],
)
def test_B11_plan_counts_slices(shape, spacing, stride, expected):
    plan = plan_encoding("vit_b", shape, spacing, stride=stride)
    assert plan.calls == expected and str(plan).startswith(f"{expected} encoder calls (")
    for v, s in plan.slices.items():
        step = s[1] - s[0] if len(s) > 1 else shape[VIEWS[v]]
        assert (
            len(set(np.diff(s))) <= 1
            and s[0] <= (step - 1) // 2 + (step == 1)
            and shape[VIEWS[v]] - 1 - s[-1] <= step / 2
        )
        if stride == "auto" and len(s) > 1:
            assert step * spacing[VIEWS[v]] <= 3 or step == 1


def test_plan_prints_the_cost():
    text = str(plan_encoding("vit_h", (512, 512, 300), stride=1))
    assert text == (
        "1324 encoder calls (300 ax + 512 cor + 512 sag) of vit_h at 1024 pixels: 7.89 PFLOP, embeddings 2.6 GiB"
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"views": ()}, "views"),
        ({"views": ("ax", "ax")}, "views"),
        ({"views": "ax"}, "views"),
        ({"views": ("axial",)}, "views"),
        ({"stride": 0}, "stride.*got 0"),
        ({"stride": 1.5}, "stride"),
        ({"stride": {"axial": 2}}, "stride.*axial"),
        ({"stride": "wide"}, "stride"),
    ],
)
def test_bad_plans_are_refused(sam, change, words):
    with pytest.raises(ConfigError, match=words):
        sam.plan((9, 9, 9), **change)
    with pytest.raises(ConfigError, match=words):
        sam.volume_features(np.zeros((9, 9, 9)), **change)


def test_B11_calls_equal_the_plan_and_a_cache_needs_none(checkpoint, tmp_path):
    vol, kept = volume((24, 18, 30)), tmp_path / "case"
    sam = SamFeatureExtractor(checkpoint, device="cpu", batch_size=4)
    plan = sam.plan(vol.shape, stride=3)
    first = sam.volume_features(vol, shape=(12, 9, 15), stride=3, cache=kept)
    assert sam.encoded == plan.calls == len(list(kept.iterdir())) == 8 + 6 + 10
    again = SamFeatureExtractor(checkpoint, device="cpu")
    assert np.array_equal(again.volume_features(vol, shape=(12, 9, 15), stride=3, cache=kept), first)
    again.volume_features(vol, shape=(24, 18, 30), stride=3, n_components=5, cache=kept)
    assert again.encoded == 0
    assert np.array_equal(sam.volume_features(vol, shape=(12, 9, 15), stride=3), first), "a cache changes nothing"


def test_cache_follows_everything_that_matters(checkpoint, tmp_path):
    "Other weights, image size, precision or grey values: encoded anew; a finer stride: only the new slices"
    vol, kept = volume((8, 8, 8)), tmp_path / "case"

    def encoded(v=vol, path=checkpoint, stride=4, **settings):
        sam = SamFeatureExtractor(path, device="cpu", **settings)
        sam.volume_features(v, shape=(4, 4, 4), views=("ax",), stride=stride, cache=kept)
        return sam.encoded

    other = tmp_path / "other.pth"
    torch.save(original(random_sam(TINY, seed=4).tensors), other)
    assert [encoded(), encoded(), encoded(stride=2), encoded(stride=1)] == [2, 0, 4, 2]
    changed = vol.copy()
    changed[3, 3, 1] += 1e-3
    assert [encoded(changed), encoded(path=other), encoded(image_size=144), encoded(dtype="bf16")] == [1, 2, 2, 2]
    assert encoded() == 0


# ---------------------------------------------------------------- volumes


@pytest.mark.parametrize("view", VIEWS)
def test_views_lie_where_the_slices_are(sam, view):
    "One view, every slice, the volume's own grid: the slices' features, standardised, on their axis"
    vol, axis = volume((17, 13, 11), seed=2), VIEWS[view]
    got = sam.volume_features(vol, views=(view,), stride=1).astype(np.float64)
    images = np.moveaxis(vol, axis, 0) * 255
    expected = np.moveaxis(sam.slice_features(images).double().numpy(), 0, 1 + axis)
    mean, std = (getattr(expected, k)(axis=(1, 2, 3), keepdims=True) for k in ("mean", "std"))
    assert got.shape == (8, 17, 13, 11) and np.abs(got - (expected - mean) / std).max() < 0.02


def test_three_views_are_the_sum_of_single_ones(sam):
    vol = volume((17, 13, 11), seed=2)
    single = sum(sam.volume_features(vol, views=(v,), stride=2).astype(np.float64) for v in VIEWS)
    assert np.abs(sam.volume_features(vol, stride=2) - single).max() < 0.02


def test_S6_no_view_outshouts_the_others(sam, monkeypatch):
    "Every view has deviation 1 in every channel; a view with activations times 100 changes nothing"
    vol = volume((20, 16, 12), seed=3)
    for v in VIEWS:
        f = sam.volume_features(vol, views=(v,), stride=2).astype(np.float64)
        assert np.abs(f.mean((1, 2, 3))).max() < 1e-3 and np.abs(f.std((1, 2, 3)) - 1).max() < 1e-3
    before, view = sam.volume_features(vol, stride=2), samfeat._View
    louder = lambda axis, n, slices, image, load: view(
        axis, n, slices, image, (lambda k: load(k) * 100 + 7) if axis == 2 else load
    )
    monkeypatch.setattr(samfeat, "_View", louder)
    assert np.abs(sam.volume_features(vol, stride=2).astype(np.float32) - before).max() < 0.02


def test_S3_slices_keep_the_proportions_of_the_body(sam):
    "A ball stays a ball: thick slices are stretched to square pixels before they are encoded"
    ijk = np.indices((40, 40, 40)) - 19.5
    ball = ((ijk**2).sum(0) < 12**2).astype(np.float32)
    thick = ball[:, :, 2::5]
    for axis in (0, 1):
        image = slice_image(thick, (1, 1, 5), axis, 20, 1024).numpy() > 127
        assert image.shape == (40, 40) and abs(image.any(0).sum() - image.any(1).sum()) <= 5  # a slice
    assert slice_image(thick, (1, 1, 5), 2, 4, 1024).shape == (40, 40)
    even = slice_image(ball, (0.9, 0.9, 0.9), 0, 20, 1024)
    assert even.equal(torch.from_numpy(ball[20] * 255))


@pytest.mark.parametrize(
    "shape, spacing, expected",
    [
        ((4, 512, 20), (1, 0.7, 5), (512, 143)),
        ((4, 512, 400), (1, 0.7, 5), (184, 1024)),
        ((4, 30, 2), (1, 0.1, 50), (30, 1000)),
        ((4, 1, 3000), (1, 1, 1.001), (1, 3000)),
        ((4, 1, 9), (1, 1e-6, 9), (1, 1024)),
    ],
)
def test_S3_images_stay_bounded(shape, spacing, expected):
    assert tuple(slice_image(np.zeros(shape), spacing, 0, 2, 1024).shape) == expected


def test_S7_features_stay_on_the_grid_that_was_asked_for(sam):
    f = sam.volume_features(volume((40, 36, 30)), shape=(10, 9, 8), stride=5)
    assert f.shape == (8, 10, 9, 8) and f.dtype == np.float16 and np.isfinite(f).all()


def test_coarse_grid_samples_the_fine_one(sam):
    "Same field of view: features on half the grid lie near the means of the cells they stand for"
    vol = volume((32, 32, 32), seed=6)
    fine = sam.volume_features(vol, stride=2).astype(np.float64)
    coarse = sam.volume_features(vol, shape=(16, 16, 16), stride=2).astype(np.float64)
    means = fine.reshape(8, 16, 2, 16, 2, 16, 2).mean((2, 4, 6))
    away = np.roll(means, 1, axis=(1, 2, 3))
    error = lambda m: np.sqrt(((coarse - m) ** 2).mean())
    assert error(means) < 0.5 * error(away) and np.corrcoef(coarse.ravel(), means.ravel())[0, 1] > 0.95


def test_planes_interpolate_between_slices_and_stay_beyond_them():
    load = lambda k: torch.full((1, 4, 4), float(k))
    got = [float(p.mean()) for p in view_planes(load, (2, 6), (4, 4), 0, 9, (9, 4, 4))]
    assert got == [2, 2, 2, 3, 4, 5, 6, 6, 6]
    some = [float(p.mean()) for p in view_planes(load, (2, 6), (4, 4), 0, 9, (9, 4, 4), np.array([0, 4, 8]))]
    assert some == [2, 4, 6]


def test_planes_hold_two_slices_at_a_time():
    alive = []

    def load(k):
        alive.append(k)
        return torch.zeros(1, 4, 4)

    for _ in view_planes(load, range(50), (4, 4), 2, 50, (2, 2, 50)):
        pass
    assert alive == list(range(50)), "each slice is read once, in order"


def test_reduction_keeps_the_variance_of_the_stack(sam):
    "The most possible components keep everything; fewer keep the largest part; the order is that of the variance"
    vol = volume((20, 18, 16), seed=7)
    every = sam.volume_features(vol, stride=2, n_components=24).astype(np.float64)
    few = sam.volume_features(vol, stride=2, n_components=6).astype(np.float64)
    variance = every.var((1, 2, 3))
    assert every.shape[0] == 24 and np.array_equal(few, every[:6]) and (np.diff(variance) < 1e-3).all()
    assert abs(variance.sum() - 24) < 0.05 and variance[:6].sum() > 1.5 * 6
    c = np.corrcoef(every.reshape(24, -1)[:6])
    assert np.abs(c - np.eye(6)).max() < 0.02
    assert np.array_equal(few, sam.volume_features(vol, stride=2, n_components=6))


@pytest.mark.parametrize("n", [0, 25, -1, 2.0, True])
def test_impossible_numbers_of_components_are_refused_before_work(sam, n):
    with pytest.raises(ConfigError, match="n_components: must be an integer from 1 to 24"):
        sam.volume_features(volume((8, 8, 8)), n_components=n)
    assert sam.encoded == 0


def test_volumes_bring_axes_and_spacing(sam):
    "A Volume, its transpose in zyx, and the array with its spacing are the same thing"
    vol = volume((16, 12, 10))
    a = sam.volume_features(Volume(vol, affine_from((1, 2, 3))))
    b = sam.volume_features(Volume(np.ascontiguousarray(vol.T), affine_from((3, 2, 1), axes="zyx"), "zyx"))
    assert np.array_equal(a, b) and np.array_equal(a, sam.volume_features(vol, spacing=(1, 2, 3)))
    assert not np.array_equal(a, sam.volume_features(vol))


@pytest.mark.parametrize("kind", ["<f4", ">f4", "f8", "u1", "?", "strided"])
def test_number_types_do_not_matter(sam, kind):
    vol = (volume((10, 8, 6)) > 0.5).astype(np.float32)
    given = np.repeat(vol, 2, 0)[::2] if kind == "strided" else vol.astype(kind)
    expected = sam.volume_features(vol, stride=4)
    assert np.array_equal(sam.volume_features(given, stride=4), expected)


@pytest.mark.parametrize(
    "bad, words",
    [
        (np.zeros((4, 4)), r"three axes .* got shape \(4, 4\)"),
        (np.zeros((2, 4, 4, 4)), "three axes"),
        (np.zeros((4, 4, 0)), "three axes"),
        (np.zeros((4, 4, 4), complex), "complex"),
        (np.zeros((4, 4, 4), "U2"), "<U2"),
        (np.full((4, 4, 4), -1000), r"must be in \[0, 1\], got -1000 to -1000. Apply a window"),
        (np.full((4, 4, 4), 1e9), "got 1e"),
        (np.where(np.arange(64).reshape(4, 4, 4) > 61, np.nan, 0), r"2 values are NaN .* first at \(3, 3, 2\)"),
        (np.where(np.arange(64).reshape(4, 4, 4) == 5, np.inf, 0), r"1 values .* first at \(0, 1, 1\)"),
    ],
)
def test_bad_volumes_are_refused(sam, bad, words):
    with pytest.raises(DataError, match=words):
        sam.volume_features(bad)


def test_bad_grids_and_spacings_are_refused(sam):
    for shape in ((4, 4), (4, 0, 4), (4, 4, -1)):
        with pytest.raises(DataError, match="shape"):
            sam.volume_features(np.zeros((4, 4, 4)), shape=shape)
    for spacing in ((1, 1), (1, 0, 1), (1, -1, 1), (1, np.nan, 1), (1, np.inf, 1)):
        with pytest.raises(DataError, match="spacing"):
            sam.volume_features(np.zeros((4, 4, 4)), spacing=spacing)
    vol = Volume(np.zeros((2, 4, 4, 4)), np.eye(4), "cxyz")
    with pytest.raises(DataError, match="one channel is needed, got 2"):
        sam.volume_features(vol)
    with pytest.raises(ConfigError, match="brings its own"):
        sam.volume_features(Volume(np.zeros((4, 4, 4)), np.eye(4)), spacing=(1, 1, 1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 20, 20), (3, 1, 2), (90, 2, 2)])
@pytest.mark.parametrize("value", [None, 0.0, 1.0])
def test_thin_and_constant_volumes(sam, shape, value):
    vol = volume(shape) if value is None else np.full(shape, value)
    f = sam.volume_features(vol)
    assert f.shape == (8, *shape) and np.isfinite(f).all()


def test_threads_do_not_change_more_than_rounding(checkpoint):
    vol, before = volume((20, 16, 12)), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(
                SamFeatureExtractor(checkpoint, device="cpu").volume_features(vol, stride=4).astype(np.float32)
            )
    finally:
        torch.set_num_threads(before)
    assert np.abs(results[0] - results[1]).max() < 0.01


def test_global_random_state_is_left_alone(checkpoint):
    state = torch.random.get_rng_state()
    SamFeatureExtractor(checkpoint, device="cpu")
    SamFeatureExtractor(None, allow_random=True, device="cpu")
    assert state.equal(torch.random.get_rng_state())
    with seeded(0, "x"):
        a = SamFeatureExtractor(None, allow_random=True, device="cpu").digest
    assert a == SamFeatureExtractor(None, allow_random=True, device="cpu").digest


# ---------------------------------------------------------------- cache


def test_cache_rounds_to_half_precision_and_reads_the_same(tmp_path):
    kept, e = EmbeddingCache(tmp_path / "c"), torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    kept.write("k", e)
    assert kept.read("k").equal(e.half()) and kept.read("other") is None


def test_cache_never_reads_damage_as_data(tmp_path):
    "Every truncation, and one flipped bit in every byte: nothing, or the data as it was"
    from .faults.injectors import truncations

    kept = EmbeddingCache(tmp_path / "c")
    kept.write("k", torch.arange(18.0).reshape(2, 3, 3))
    file = kept.folder / "k.safetensors"
    raw, sound = file.read_bytes(), kept.read("k").clone()
    for n, part in truncations(raw, 40):
        file.write_bytes(part)
        assert kept.read("k") is None, n
    for at in range(len(raw)):
        bad = bytearray(raw)
        bad[at] ^= 1 << at % 8
        file.write_bytes(bad)
        found = kept.read("k")
        assert found is None or found.equal(sound), at


def test_damaged_entries_are_encoded_again(checkpoint, tmp_path):
    vol, kept = volume((8, 8, 8)), tmp_path / "case"
    sam = SamFeatureExtractor(checkpoint, device="cpu")
    first = sam.volume_features(vol, stride=4, cache=kept)
    files = sorted(kept.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-3])
    files[1].write_bytes(files[2].read_bytes())
    files[3].unlink()
    (kept / "notes.txt").write_text("mine")
    before = sam.encoded
    assert np.array_equal(sam.volume_features(vol, stride=4, cache=kept), first)
    assert sam.encoded - before == 3 and sorted(kept.glob("*.safetensors")) == files


def test_a_killed_run_goes_on_where_it_was(checkpoint, tmp_path):
    "Death before every third step of writing the cache: the rest is encoded, the result is the same"
    vol = volume((8, 8, 8))
    sam = SamFeatureExtractor(checkpoint, device="cpu")
    whole = sam.volume_features(vol, stride=4, cache=tmp_path / "whole")
    entries = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    run = lambda folder: sam.volume_features(vol, stride=4, cache=folder)
    steps = forked(lambda: run(tmp_path / "count"), tmp_path / "count")
    assert steps > 12
    for at in range(1, steps, 3):
        folder = tmp_path / f"k{at}"
        assert forked(lambda folder=folder: run(folder), folder, at) == -9
        sound = [p for p in folder.iterdir() if p.name in entries] if folder.exists() else []
        assert all(p.read_bytes() == entries[p.name] for p in sound)
        before = sam.encoded
        assert np.array_equal(run(folder), whole) and sam.encoded - before == len(entries) - len(sound)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == entries, "nothing is left over"


def test_cache_places_that_cannot_be(sam, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExists, match="is a file, a folder is needed"):
        sam.volume_features(volume((4, 4, 4)), cache=tmp_path / "file")
    with pytest.raises(MissingFile, match="mkdir -p"):
        sam.volume_features(volume((4, 4, 4)), cache=tmp_path / "no" / "c")
    assert sam.encoded == 0


def test_a_cache_that_is_emptied_meanwhile_is_an_error(sam, tmp_path):
    vol, expand = volume((6, 6, 6)), sam.network.expand

    def emptied(e):
        for p in (tmp_path / "c").iterdir():
            p.unlink()
        return expand(e)

    sam.network.expand = emptied
    with pytest.raises(FormatError, match="was changed while it was in use"):
        sam.volume_features(vol, stride=2, cache=tmp_path / "c")
