"""Page 44a: augmentation against its definitions, items, exact resume, several processes, the command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from medvol_nb import phantoms
from medvol_nb.checkpoints import load_checkpoint
from medvol_nb.core import ConfigError, DataError, MissingFile, read_csv, read_json, rng_for
from medvol_nb.synth.contrast import Contrast, ContrastConfig, NetworkConfig, build_network, load_network, plateau
from medvol_nb.synth.pretrain import (
    NO_AUGMENTATION,
    AugmentConfig,
    PretrainConfig,
    PretrainFit,
    TrainingPairs,
    Validation,
    apply_intensity,
    apply_spatial,
    blur,
    draw_augmentation,
    move,
    pretrain,
    pretrain_network,
    scale_view,
    shade,
    turns,
    warp,
)
from medvol_nb.torchcore import Batches, FitState

ROOT = Path(__file__).resolve().parents[1]
TINY = NetworkConfig(width=4, levels=2, out_channels=6)


def toy_pair(k, n=16):
    body, rng = phantoms.random_body((n, n, n), seed=k), rng_for(k, "toy")
    means, noise = rng.uniform(25, 255, (2, 256)), rng.normal(0, 10, (2, n, n, n))
    return {"img": np.clip(means[:, body.lbl] + noise, 0, 255).astype(np.uint8), "seg": body.lbl.astype(np.uint8)}


TOYS = [toy_pair(k) for k in range(6)]


def config(**fit):
    usual = {"steps": 6, "lr": 1e-3, "validate_every": 3, "checkpoint_every": 1, "tensorboard": False, "device": "cpu"}
    return PretrainConfig(
        network=TINY,
        contrast=ContrastConfig(points=40, projector_width=8),
        val_pairs=2,
        fit=PretrainFit(**{**usual, **fit}),
    )


# ---------------------------------------------------------------- augmentation against its definitions


def test_draws_have_their_probabilities_and_ranges():
    n, cfg = 3000, AugmentConfig()
    drawn = [draw_augmentation(rng_for(0, "a", k), cfg) for k in range(n)]
    views = [v for d in drawn for v in d["views"]]
    shares = {k: sum(k in v for v in views) for k in ("blur", "noise", "bias", "gamma", "motion")}
    for name, p in {"blur": 0.33, "noise": 0.33, "bias": 0.5, "gamma": 0.5, "motion": 0.33}.items():
        assert stats.binomtest(shares[name], 2 * n, p).pvalue > 1e-4, name
    for axis in range(3):
        assert stats.binomtest(sum(d["flip"][axis] for d in drawn), n, 0.45).pvalue > 1e-4
    assert stats.binomtest(sum(d["affine"] is not None for d in drawn), n, 0.5).pvalue > 1e-4
    assert stats.binomtest(sum(d["order"][0] for d in drawn), n, 0.5).pvalue > 1e-4
    flat = lambda values: np.concatenate([np.ravel(v) for v in values])  # noqa: E731
    affine = [d["affine"] for d in drawn if d["affine"]]
    motion = [v["motion"] for v in views if "motion" in v]
    for values, low, high in (
        (flat(a["scale"] for a in affine), 0.6, 1.4),
        (flat(a["degrees"] for a in affine), -45, 45),
        (flat(v["blur"] for v in views if "blur" in v), 0, 2),
        (flat(v["noise"]["std"] for v in views if "noise" in v), 0, 0.25),
        (flat(v["bias"] for v in views if "bias" in v), -0.5, 0.5),
        (np.log(flat(v["gamma"] for v in views if "gamma" in v)), -0.4, 0.4),
        (flat(m["degrees"] for m in motion), -10, 10),
        (flat(m["shift"] for m in motion), -10, 10),
        (flat(m["times"][0] for m in motion), 1 / 3 - 0.1, 1 / 3 + 0.1),
    ):
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-4
    assert drawn[5] == draw_augmentation(rng_for(0, "a", 5), cfg) and json.loads(json.dumps(drawn[5])) == drawn[5]


def test_views_are_varied_independently_unless_told():
    kinds = {
        json.dumps(draw_augmentation(rng_for(0, k), AugmentConfig(same_intensity=True))["views"]) for k in range(9)
    }
    assert all(json.loads(k)[0] == json.loads(k)[1] for k in kinds)
    drawn = [draw_augmentation(rng_for(0, k), AugmentConfig())["views"] for k in range(40)]
    assert any(v[0] != v[1] for v in drawn)
    none = draw_augmentation(rng_for(0), NO_AUGMENTATION)
    assert none["flip"] == [False] * 3 and none["affine"] is None and none["views"] == [{}, {}]


@pytest.mark.parametrize("shape", [(12, 9, 14), (5, 16, 7)])
@pytest.mark.parametrize("nearest", [False, True])
def test_warp_is_scipy_affine_transform(shape, nearest):
    x = rng_for(0, "w", *shape).normal(size=shape).astype(np.float32)
    matrix, shift = np.linalg.inv(np.diag([1.3, 0.7, 1.1]) @ turns([20, -35, 12])), [0.4, -1.2, 2.1]
    middle = (np.array(shape) - 1) / 2
    offset = middle + shift - matrix @ middle
    theirs = ndimage.affine_transform(x, matrix, offset, order=0 if nearest else 1, mode="grid-constant")
    ours = warp(torch.from_numpy(x)[None], matrix, shift, nearest=nearest)[0].numpy()
    if nearest:
        assert (ours != theirs).mean() < 0.005  # a voxel on a border may fall on either side
    else:
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_space_is_the_same_for_views_and_labels():
    drawn = {"flip": [True, False, True], "affine": {"scale": [1.2, 0.8, 1.1], "degrees": [10, 20, -30]}}
    seg = torch.from_numpy(TOYS[0]["seg"].astype(np.float32))[None]
    a, b = apply_spatial(seg, drawn, nearest=True), apply_spatial(torch.cat([seg, 2 * seg]), drawn, nearest=True)
    assert torch.equal(a, b[:1]) and torch.equal(2 * a, b[1:])
    bigger = {"flip": [False] * 3, "affine": {"scale": [1.4] * 3, "degrees": [0] * 3}}
    assert (apply_spatial(seg, bigger, nearest=True) > 0).float().mean() > (seg > 0).float().mean()


@pytest.mark.parametrize("sigma", [(0.0, 1.3, 2.0), (0.4, 0.0, 0.05)])
def test_blur_is_scipy_gaussian_filter(sigma):
    x = rng_for(0, "b").normal(size=(11, 16, 5)).astype(np.float32)
    theirs = ndimage.gaussian_filter(x, sigma, mode="reflect", truncate=4)
    np.testing.assert_allclose(blur(torch.from_numpy(x), sigma).numpy(), theirs, atol=1e-5)


def test_shading_is_the_exponential_of_its_polynomial():
    c = rng_for(0, "c").uniform(-0.5, 0.5, 20)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (8, 6, 5)), indexing="ij")
    orders = [(i, j, k) for i in range(4) for j in range(4 - i) for k in range(4 - i - j)]
    theirs = np.exp(sum(a * x**i * y**j * z**k for a, (i, j, k) in zip(c, orders)))
    np.testing.assert_allclose(shade(torch.ones(8, 6, 5), c.tolist()).numpy(), theirs, rtol=1e-5)


def literal_motion(images, times):
    "Complete 3-D spectra, sorted so that the first image is in the middle, put together along the last axis"
    spectra = [np.fft.fftshift(np.fft.fftn(v)) for v in images]
    at = np.where(np.array(times) > 0.5)[0].min() if max(times) > 0.5 else len(times)
    spectra[0], spectra[at] = spectra[at], spectra[0]
    out, start = np.empty_like(spectra[0]), 0
    for s, end in zip(spectra, [*(int(t * out.shape[-1]) for t in times), out.shape[-1]]):
        out[..., start:end] = s[..., start:end]
        start = end
    return np.real(np.fft.ifftn(np.fft.ifftshift(out)))


@pytest.mark.parametrize("times", [[0.3, 0.7], [0.36, 0.64], [0.25, 0.5, 0.75]])
def test_motion_is_the_mixture_of_complete_spectra(times):
    x = torch.from_numpy(phantoms.random_body((12, 10, 17), seed=2).img.astype(np.float32) / 100)
    degrees = rng_for(0, "d").uniform(-10, 10, (len(times), 3)).tolist()
    shift = rng_for(0, "s").uniform(-3, 3, (len(times), 3)).tolist()
    parts = [x.numpy(), *(warp(x[None], turns(d), s)[0].numpy() for d, s in zip(degrees, shift))]
    np.testing.assert_allclose(move(x, times, degrees, shift).numpy(), literal_motion(parts, times), atol=1e-3)


def test_operations_against_torchio():
    "The library of the published training, with the same parameters; its axes and ours agree"
    tio = pytest.importorskip("torchio")
    x = torch.from_numpy(scale_view(phantoms.random_body((16, 14, 12), seed=1).img))
    image = tio.ScalarImage(tensor=x[None])

    def theirs(transform):
        return transform(image).data[0]

    assert torch.allclose(blur(x, (0.5, 1.5, 1.0)), theirs(tio.Blur((0.5, 1.5, 1.0))), atol=1e-4)
    assert torch.allclose(apply_intensity(x, {"gamma": 1.3}), theirs(tio.Gamma(1.3)), atol=1e-5)
    grown = {"flip": [False] * 3, "affine": {"scale": [1.3, 0.8, 1.1], "degrees": [0, 0, 0]}}
    other = theirs(tio.Affine(scales=(1.3, 0.8, 1.1), degrees=0, translation=0, default_pad_value=0))
    inside = (slice(3, -3),) * 3
    assert torch.allclose(apply_spatial(x[None], grown)[0][inside], other[inside], atol=1e-3)


def test_noise_is_named_by_its_seed():
    x = torch.zeros(32, 32, 32)
    a, b, c = (apply_intensity(x, {"noise": {"std": 0.2, "seed": s}}) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and abs(a.std() - 0.2) < 0.005


def test_views_are_scaled_by_their_minimum_and_high_percentile():
    x = rng_for(0, "v").integers(7, 250, (20, 20, 20)).astype(np.uint8)
    y = scale_view(x)
    assert y.min() == 0 and abs(np.percentile(y, 99.99) - 1) < 1e-5 and y.dtype == np.float32
    assert not scale_view(np.full((3, 3, 3), 9, np.uint8)).any()


# ---------------------------------------------------------------- items


def items(augment=NO_AUGMENTATION, crop=None, pairs=TOYS):
    return TrainingPairs(pairs, Contrast(build_network(TINY), config().contrast).sampler, augment, crop)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_item_holds_both_views_and_the_labels_at_its_points(dtype):
    pair = {"img": TOYS[0]["img"], "seg": TOYS[0]["seg"].astype(dtype) + (dtype(300) if dtype == np.uint16 else 0)}
    made = items(pairs=[pair]).draw(0, rng_for(0, "i"))
    order = draw_augmentation(rng_for(0, "i"), NO_AUGMENTATION)["order"]
    assert torch.equal(made["img"], torch.from_numpy(np.stack([scale_view(pair["img"][k]) for k in order])))
    last = list(made["points"])[-1]
    assert np.array_equal(made["labels"][last], pair["seg"].ravel()[made["points"][last]])


def test_a_crop_takes_views_and_labels_from_one_place():
    flat = {"img": np.stack([np.arange(4096).reshape(16, 16, 16) % 251] * 2).astype(np.uint8)}
    flat["seg"] = flat["img"][0].astype(np.uint8)
    made = items(crop=(8, 8, 8), pairs=[flat]).draw(0, rng_for(3, "i"))
    last = list(made["points"])[-1]
    grey = made["img"][0].reshape(-1)[made["points"][last]]
    assert np.corrcoef(grey, made["labels"][last])[0, 1] > 0.9999


def test_batches_do_not_depend_on_processes():
    data = items(AugmentConfig(), (8, 8, 8))
    own, others = ([b for _, b in Batches(data, 2, workers=w).epoch(1)] for w in (0, 2))
    for a, b in zip(own, others, strict=True):
        assert torch.equal(a["img"], b["img"]) and all(torch.equal(a["labels"][k], b["labels"][k]) for k in a["labels"])


def test_pairs_made_on_the_fly_get_the_items_generator():
    class Fly:
        ids = ["a", "b"]

        def __len__(self):
            return 2

        def draw(self, i, rng):
            return toy_pair(int(rng.integers(100)))

    data = items(pairs=Fly())
    assert torch.equal(data.draw(0, rng_for(1))["img"], data.draw(0, rng_for(1))["img"])
    assert not torch.equal(data.draw(0, rng_for(1))["img"], data.draw(0, rng_for(2))["img"]) and data.keys == ["a", "b"]


@pytest.mark.parametrize(
    "pair",
    [
        {"img": TOYS[0]["img"]},
        {"img": TOYS[0]["img"][:1], "seg": TOYS[0]["seg"]},
        {"img": TOYS[0]["img"], "seg": TOYS[0]["seg"][:8]},
        {"img": TOYS[0]["img"], "seg": TOYS[0]["seg"].astype(np.float32)},
        "no pair",
    ],
)
def test_what_is_no_pair_is_refused(pair):
    with pytest.raises(DataError, match="pair 0"):
        items(pairs=[pair]).draw(0, rng_for(0))


# ---------------------------------------------------------------- runs (D17)


def test_D17_a_stopped_run_goes_on_to_the_same_bytes_and_keeps_few_checkpoints(tmp_path):
    cfg = config().model_copy(update={"augment": AugmentConfig(motion_shift=2), "batch_size": 2})
    for name, stops in (("a", [None]), ("b", [1, 2, 5, None])):
        for stop in stops:
            done = pretrain_network(TOYS[:4], TOYS[4:], cfg, out_dir=tmp_path / name, stop_at=stop)
    assert done.finished and done.steps == 6
    for name in ("model.safetensors", "best.safetensors", "log.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(list((tmp_path / "a" / "checkpoints").iterdir())) == 3
    rows = [r for r in read_csv(tmp_path / "a" / "log.csv") if r["val_loss"]]
    assert [r["step"] for r in rows] == ["3", "6"] and all(0 <= float(r["val_retrieval"]) <= 1 for r in rows)


def test_D17_loading_processes_change_nothing(tmp_path):
    for w in (0, 2):
        cfg = config(steps=2).model_copy(update={"workers": w})
        pretrain_network(TOYS[:4], None, cfg, out_dir=tmp_path / str(w))
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()


def test_half_precision_trains(tmp_path):
    done = pretrain_network(TOYS[:4], TOYS[4:], config(steps=3, precision="bf16"), out_dir=tmp_path / "run")
    assert all(math.isfinite(float(r["loss"])) for r in done.log)


def test_other_data_or_settings_are_refused(tmp_path):
    pretrain_network(TOYS[:4], None, config(), out_dir=tmp_path / "run", stop_at=1, data="a")
    for cfg, data in ((config(), "b"), (config().model_copy(update={"batch_size": 2}), "a"), (config(lr=1e-2), "a")):
        with pytest.raises(DataError, match="Choose another folder"):
            pretrain_network(TOYS[:4], None, cfg, out_dir=tmp_path / "run", data=data)


def test_a_run_starts_from_weights(tmp_path):
    pretrain_network(TOYS[:2], None, config(steps=1), out_dir=tmp_path / "first")
    later = config(steps=1, lr=1e-12).model_copy(update={"start_from": tmp_path / "first"})
    pretrain_network(TOYS[2:4], None, later, out_dir=tmp_path / "second")
    a, b = (load_network(tmp_path / n, "cpu").net for n in ("first", "second"))
    assert torch.allclose(a.layers[0].weight, b.layers[0].weight, atol=1e-6)
    wrong = later.model_copy(update={"network": NetworkConfig(width=8, levels=2)})
    with pytest.raises(ConfigError, match="Set network to its shape"):
        pretrain_network(TOYS[:2], None, wrong, out_dir=tmp_path / "third")


def test_validation_is_always_the_same_and_looks_at_sizes_that_do_not_fit():
    pairs = [toy_pair(k, 19) for k in (1, 2)]
    model = Contrast(build_network(TINY), config().contrast).eval()
    check = Validation(pairs, range(2), model.cfg)
    a, b = (check(model, FitState(model, Path("."))) for _ in range(2))
    assert a == b and set(a) == {"val_loss", "val_retrieval", "val_retrieval_grey", "val_chance"}


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.test_synth_pretrain import TOYS, config, pretrain_network
cfg = config(steps=4, validate_every=4).model_copy(update={{"batch_size": int(sys.argv[2])}})
pretrain_network(TOYS[:4], TOYS[4:], cfg, out_dir=sys.argv[1])
"""


@pytest.mark.slow
def test_D17_two_processes_are_one_with_the_doubled_batch(tmp_path):
    "Losses, weights and running statistics, up to rounding: sums over processes are made in another order"
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    one = [sys.executable, str(script), str(tmp_path / "one"), "2"]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29547"]
    for command in (one, [*two, str(script), str(tmp_path / "two"), "1"]):
        end = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        assert end.returncode == 0, end.stderr[-3000:]
    logs = [[float(r["loss"]) for r in read_csv(tmp_path / n / "log.csv")] for n in ("one", "two")]
    np.testing.assert_allclose(*logs, atol=2e-4)
    a, b = (load_checkpoint(tmp_path / n / "model.safetensors")["model"] for n in ("one", "two"))
    for name in a:
        assert torch.allclose(a[name].float(), b[name].float(), atol=3e-3), name
    validated = [float(read_csv(tmp_path / n / "log.csv")[-1]["val_loss"]) for n in ("one", "two")]
    assert abs(validated[0] - validated[1]) < 5e-3


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Pairs as the reference writes them: contiguous HDF5 data sets in a file for training and one for validation"
    folder = tmp_path_factory.mktemp("h5_w_segs")
    for name, keys in (("train", range(4)), ("val", range(4, 6))):
        with h5py.File(folder / f"{name}_data.hdf5", "w") as f:
            for k in keys:
                group = f.create_group(f"{k:06d}")
                group["img"], group["seg"] = TOYS[k]["img"], TOYS[k]["seg"]
    return folder


OPTIONS = ("network.width=4", "network.levels=2", "contrast.points=40", "contrast.projector_width=8", "fit.steps=2")
OPTIONS += ("val_pairs=2", "fit.validate_every=2", "fit.tensorboard=false")


def test_the_command_trains_on_a_store(store, tmp_path):
    plan = pretrain(store, out=tmp_path / "run", overrides=OPTIONS, device="cpu", dry_run=True)
    assert (plan["pairs"], plan["val_pairs"], plan["steps"], plan["crop"]) == (4, 2, 2, [16] * 3)
    assert not (tmp_path / "run").exists() and 3 < plan["plateau"] <= math.log(79)
    done = pretrain(store, out=tmp_path / "run", overrides=OPTIONS, device="cpu", seed=3)
    assert done["steps"] == 2 and done["finished"] and float(done["last"]["val_loss"]) > 0
    assert load_network(done["run"], "cpu").net.cfg.width == 4
    assert read_json(tmp_path / "run" / "config.json")["fit"]["seed"] == 3
    again = pretrain(store, out=tmp_path / "run", overrides=OPTIONS, device="cpu", seed=3)
    assert again["steps"] == 2
    same = pretrain(store, out=tmp_path / "other", config=tmp_path / "run" / "config.json")
    assert Path(same["weights"]).read_bytes() == Path(done["weights"]).read_bytes()


def test_a_single_file_keeps_no_pairs_apart(store, tmp_path, caplog):
    plan = pretrain(store / "train_data.hdf5", out=tmp_path / "run", overrides=OPTIONS, dry_run=True)
    assert plan["val_pairs"] == 0 and "there will be no validation" in caplog.text
    plan = pretrain(store / "train_data.hdf5", val=store / "val_data.hdf5", overrides=OPTIONS, dry_run=True)
    assert plan["val_pairs"] == 2


def test_the_command_refuses_what_cannot_work(store, tmp_path):
    with pytest.raises(MissingFile):
        pretrain(tmp_path / "nothing", overrides=OPTIONS)
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        pretrain(store, overrides=["network.widht=4"])
    with pytest.raises(ConfigError, match="crop_size"):
        pretrain(store, overrides=["crop_size=12"], dry_run=True)
    with pytest.raises(ConfigError, match="is already a value"):
        pretrain(store, overrides=["fit=3", "fit.lr=1"])


# ---------------------------------------------------------------- A14: does it learn?


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_A14_short_pretraining_learns(seed, data_dir, tmp_path):
    """Setting A of section 17 with real organ shapes: loss below its plateau, retrieval against untrained and grey.

    Thresholds as written; 480 steps at 2e-3 instead of 240 at 1e-3, with which one of three seeds had not left the
    plateau (retrieval 0.060 against 0.059 untrained). The figures of both are on page 44b.
    """
    from medvol_nb.synth.features import render_pairs, short_pretraining
    from medvol_nb.synth.templates import TemplateBank, build_bank

    build_bank(data_dir / "synthetic_labels/totalseg_layout", tmp_path / "bank", spacing=1.5)
    pairs = render_pairs(48, seed, bank=TemplateBank.open(tmp_path / "bank"))
    found = short_pretraining(tmp_path / "run", pairs, seed=seed)
    assert abs(found["plateau"] - plateau({"a": 64, "b": 256, "c": 256, "d": 256})) < 1e-9
    assert found["loss_last"] < found["plateau"]
    assert found["retrieval_after"] >= 1.7 * found["retrieval_before"]
    assert found["retrieval_after"] >= 2 * found["retrieval_grey"]
