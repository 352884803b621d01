"""Pages 44b and 44c: features of files, linear probes, short pretraining, few-shot fine-tuning."""

import json
import math
import os

import numpy as np
import pytest
import torch

from medvol_nb import phantoms
from medvol_nb.checkpoints import save_checkpoint
from medvol_nb.core import ConfigError, DataError, FormatError, read_csv, rng_for
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.intensity import Normalizer
from medvol_nb.parallel import BatchError
from medvol_nb.synth.contrast import Contrast, FeatureNetwork, NetworkConfig, build_network, describe_network
from medvol_nb.synth.features import (
    class_recall,
    extract_features,
    features,
    fit_probe,
    pca_colours,
    probe_scores,
    render_pairs,
    short_pretraining,
    short_settings,
    voxels_of,
    window_size,
)
from medvol_nb.synth.fewshot import (
    FewShotAugment,
    FewShotConfig,
    FewShotFit,
    LabelledCrops,
    Segmenter,
    choose_cases,
    dice_cross_entropy,
    dice_scores,
    finetune,
    load_segmenter,
    predict_labels,
    vary,
)
from medvol_nb.volume import read_volume, write_volume

TINY = NetworkConfig(width=4, levels=2, out_channels=6)


@pytest.fixture(scope="module")
def network():
    return FeatureNetwork(build_network(TINY, 1).eval(), "minmax", (16, 16, 16), "abc")


def volume(shape=(20, 24, 17), seed=0):
    return phantoms.random_body(shape, seed=seed).img


# ---------------------------------------------------------------- features of a volume


@pytest.mark.parametrize("shape", [(16, 16, 16), (12, 16, 9), (8, 12, 20)])
def test_one_window_is_the_network_itself(network, shape):
    x = volume(shape)
    made = extract_features(network, x, patch_size=(64, 64, 64))
    size = window_size(network.net, shape, (64, 64, 64))
    start = [-(-(p - n) // 2) for n, p in zip(shape, size)]
    assert made.shape == (6, *shape) and made.dtype == np.float32 and all(s % 4 == 0 for s in size)
    if size == shape:
        with torch.no_grad():
            whole = network.net(torch.from_numpy(Normalizer.parse("minmax")(x))[None, None])[0].numpy()
        np.testing.assert_allclose(made, whole, atol=1e-5)
    assert max(start) >= 0


def test_windows_follow_monai(network):
    "MONAI's sliding window with the published settings: Gaussian of 0.25, windows of two"
    inferers = pytest.importorskip("monai.inferers")
    x = volume((28, 16, 24))
    grey = Normalizer.parse("minmax")(x)
    with torch.no_grad():
        theirs = inferers.sliding_window_inference(
            torch.from_numpy(grey)[None, None], 16, 2, network.net, overlap=0.5, mode="gaussian", sigma_scale=0.25
        )[0].numpy()
    ours = extract_features(network, x, overlap=0.5)
    inside = (slice(None), slice(2, -2), slice(2, -2), slice(2, -2))
    assert np.abs(ours - theirs)[inside].max() < 1e-3 * np.abs(theirs).max()


def test_the_clip_and_the_batch_do_what_they_say(network):
    x = volume()
    a = extract_features(network, x, overlap=0.5, batch_size=1)
    assert np.allclose(a, extract_features(network, x, overlap=0.5, batch_size=5), atol=1e-5)
    clipped = extract_features(network, np.clip(x, -100, 100), normalizer="ct:-100,100", overlap=0.5)
    assert np.allclose(clipped, extract_features(network, x, normalizer="ct:-100,100", overlap=0.5), atol=1e-5)


def test_features_of_instance_normalised_networks_have_length_one():
    cfg = TINY.model_copy(update={"norm": "instance"})
    net = FeatureNetwork(build_network(cfg).eval(), "minmax", (16, 16, 16), "")
    made = extract_features(net, volume((16, 16, 16)))
    assert np.allclose(np.linalg.norm(made, axis=0), 1, atol=1e-5)
    raw = extract_features(net, volume((16, 16, 16)), unit=False)
    assert raw.std() > 0 and not np.allclose(np.linalg.norm(raw, axis=0), 1)


@pytest.mark.parametrize("bad", [np.zeros((4, 5)), np.zeros((2, 8, 8, 8)), np.full((8, 8, 8), np.nan)])
def test_what_is_no_volume_is_refused(network, bad):
    with pytest.raises(DataError):
        extract_features(network, bad)


def test_a_constant_volume_has_finite_features(network):
    assert np.isfinite(extract_features(network, np.full((9, 9, 9), 7, np.int16))).all()


def test_colours_are_common_and_the_same_for_turned_signs():
    f = rng_for(0, "f").normal(size=(5, 4, 4, 4)) * np.array([9, 5, 3, 1, 0.1])[:, None, None, None]
    a, b = pca_colours(f, f)
    assert np.array_equal(a, b) and a.shape == (4, 4, 4, 3) and 0 <= a.min() and a.max() <= 1


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder as `medvol synth pretrain` leaves it, and two volumes"
    folder = tmp_path_factory.mktemp("run")
    model = Contrast(build_network(TINY, 1))
    about = {"model": describe_network(TINY, (16, 16, 16))}
    save_checkpoint(folder / "model.safetensors", {"model": model.state_dict(), "config": about})
    affine = affine_from((1.5, 2, 3))
    for k in range(2):
        write_volume(Volume(volume(seed=k).astype(np.float32), affine), folder / f"v{k}.nii.gz")
    return folder


def test_the_command_keeps_the_place_of_a_volume(run, network, tmp_path):
    files = [run / "v0.nii.gz", run / "v1.nii.gz"]
    told = features(files, checkpoint=run, output_dir=tmp_path, overlap=0.5, device="cpu")
    assert [r["status"] for r in told["volumes"]] == ["done", "done"] and len(told["weights"]) == 16
    made, source = read_volume(tmp_path / "v0.nii.gz"), read_volume(files[0])
    assert made.axes == "cxyz" and made.data.shape == (6, 20, 24, 17) and np.allclose(made.affine, source.affine)
    assert np.allclose(made.data, extract_features(network, source.data, overlap=0.5), atol=1e-5)


def test_the_command_follows_on_exists(run, tmp_path):
    options = {"checkpoint": run, "output_dir": tmp_path, "overlap": 0.0, "device": "cpu", "suffix": ".npz"}
    features([run / "v0.nii.gz"], **options)
    before = (tmp_path / "v0.npz").read_bytes()
    with pytest.raises(BatchError, match="exists"):
        features([run / "v0.nii.gz"], **options)
    assert features([run / "v0.nii.gz"], **options, on_exists="skip")["volumes"][0]["status"] == "skipped"
    features([run / "v0.nii.gz"], **options, on_exists="overwrite")
    assert (tmp_path / "v0.npz").read_bytes() == before


def test_one_bad_file_does_not_stop_the_others(run, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"not an image")
    with pytest.raises(BatchError, match="bad.nii.gz"):
        features([bad, run / "v1.nii.gz"], checkpoint=run, output_dir=tmp_path / "out", overlap=0.0, device="cpu")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["v1.nii.gz"]


def test_the_command_stores_half_precision_in_zarr(run, tmp_path):
    with pytest.raises(ConfigError, match="NIfTI cannot hold float16"):
        features([run / "v0.nii.gz"], checkpoint=run, dtype="float16")
    options = {"checkpoint": run, "output_dir": tmp_path, "overlap": 0.0, "device": "cpu"}
    features([run / "v0.nii.gz"], **options, suffix=".zarr", dtype="float16")
    made = read_volume(tmp_path / "v0.zarr")
    assert made.dtype == np.float16 and made.data.shape == (6, 20, 24, 17)


def test_two_volumes_of_one_name_are_refused(run, tmp_path):
    (tmp_path / "a").mkdir()
    os.link(run / "v0.nii.gz", tmp_path / "a" / "v0.nii.gz")
    with pytest.raises(DataError, match="the same name"):
        features([run / "v0.nii.gz", tmp_path / "a/v0.nii.gz"], checkpoint=run, output_dir=tmp_path)
    with pytest.raises(DataError, match="the same name"):
        features([run / "v0.nii.gz"] * 2, checkpoint=run, output_dir=tmp_path)
    with pytest.raises(ConfigError, match="overlap"):
        features([run / "v0.nii.gz"], checkpoint=run, output_dir=tmp_path, overlap=1.0)


# ---------------------------------------------------------------- probes


def test_the_probe_is_softmax_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = rng_for(0, "probe")
    labels = np.repeat([2, 5, 8], 60)
    x = rng.normal(size=(180, 4)) * [1, 10, 0.1, 1] + np.eye(4)[labels % 4] * [2, 20, 0.2, 2]
    ours = fit_probe(x, labels, penalty=1e-3)
    scaled = (x - x.mean(0)) / x.std(0)
    theirs = linear_model.LogisticRegression(C=1 / (2e-3 * 180), max_iter=1000, tol=1e-10).fit(scaled, labels)
    assert (ours(x) == theirs.predict(scaled)).mean() > 0.98
    assert class_recall(ours(x), labels) > 0.7 and np.array_equal(ours.classes, [2, 5, 8])


def test_probe_voxels_are_apart_and_rare_labels_are_left_out():
    seg = np.zeros((8, 8, 8), np.int64)
    seg[0], seg[1, 0, :3], seg[2, 0, :4] = 1, 2, 3
    learn, test = voxels_of(seg, rng_for(0), 10)
    assert not set(learn) & set(test) and set(seg.ravel()[learn]) == {0, 1, 3} == set(seg.ravel()[test])
    with pytest.raises(DataError, match="fewer than two labels"):
        voxels_of(np.zeros((3, 3, 3), int), rng_for(0))


def test_a_probe_of_noise_guesses():
    seg = rng_for(0, "s").integers(0, 5, (12, 12, 12))
    a, b = rng_for(0, "n").normal(size=(2, 8, 12, 12, 12))
    found = probe_scores(a, b, seg, rng_for(0))
    assert found["chance"] == 0.2 and abs(found["same_view"] - 0.2) < 0.1 and abs(found["other_view"] - 0.2) < 0.1


# ---------------------------------------------------------------- short pretraining


def test_rendered_pairs_are_named_by_their_seed():
    a, b, c = (render_pairs(2, s, side=32, thin=2) for s in (1, 1, 2))
    assert all(np.array_equal(x[k], y[k]) for x, y in zip(a, b) for k in ("img", "seg"))
    assert not np.array_equal(a[0]["img"], c[0]["img"]) and a[0]["img"].shape == (2, 16, 16, 16)
    assert np.array_equal(render_pairs(1, 1, side=32, thin=2)[0]["img"], a[0]["img"])


def test_short_pretraining_tells_its_numbers(tmp_path):
    pairs = render_pairs(10, side=32, thin=2)
    found = short_pretraining(tmp_path / "run", pairs, steps=3)
    assert json.loads(json.dumps(found)) == found and found["steps"] == 3
    assert set(found["probes"]) == {"grey", "untrained", "trained"}
    again = short_pretraining(tmp_path / "run", pairs, steps=3)
    assert again == found
    assert short_settings().contrast.layers == (24, 31, 38, 51)


# ---------------------------------------------------------------- few labelled volumes

HEADS = [{"img": h.img, "seg": h.lbl} for h in (phantoms.head((16, 16, 16), seed=k) for k in range(3))]


def quick(**fit):
    usual = {"epochs": 1, "lr": 5e-3, "validate_every": 4, "checkpoint_every": 1, "tensorboard": False, "device": "cpu"}
    return FewShotConfig(crop_size=16, batch_size=2, steps_per_epoch=6, overlap=0.0, fit=FewShotFit(**{**usual, **fit}))


def test_the_loss_is_monais():
    losses = pytest.importorskip("monai.losses")
    pred = torch.from_numpy(rng_for(0, "l").normal(size=(2, 4, 6, 5, 7))).float()
    truth = torch.from_numpy(rng_for(1, "l").integers(0, 4, (2, 6, 5, 7)))
    theirs = losses.DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)(pred, truth[:, None])
    assert abs(dice_cross_entropy(pred, truth) - theirs) < 1e-5


def test_variation_keeps_labels_and_is_repeatable():
    img = torch.from_numpy(Normalizer.parse("minmax")(HEADS[0]["img"]))
    seg = torch.from_numpy(HEADS[0]["seg"].astype(np.float32))
    cfg = FewShotAugment(p=1)
    for k in range(4):
        a, b = (vary(img, seg, rng_for(k), cfg) for _ in range(2))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.isfinite(a[0]).all()
        assert set(np.unique(a[1])) <= set(np.unique(seg))
    assert torch.equal(img, torch.from_numpy(Normalizer.parse("minmax")(HEADS[0]["img"])))  # left as it was


def test_crops_of_volumes_smaller_than_the_crop_are_padded():
    data = LabelledCrops(
        [np.ones((8, 20, 5), np.float32)], [np.ones((8, 20, 5), int)], (16, 16, 16), FewShotAugment(p=0, p_affine=0)
    )
    made = data.draw(0, rng_for(0))
    assert made["img"].shape == (1, 16, 16, 16) and made["seg"].sum() == 8 * 16 * 5 == made["img"].sum()


def test_finetuning_goes_on_to_the_same_bytes_and_starts_from_the_pretrained_weights(network, tmp_path):
    for name, stops in (("a", [None]), ("b", [1, 4, None])):
        for stop in stops:
            done = finetune(network, HEADS[:2], HEADS[2:], quick(), out_dir=tmp_path / name, stop_at=stop)
    assert done.steps == 6
    for name in ("model.safetensors", "best.safetensors", "log.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = [r for r in read_csv(tmp_path / "a" / "log.csv") if r["val_loss"]]
    assert all(abs(float(r["val_loss"]) + float(r["val_dice"]) - 1) < 1e-6 for r in rows)
    model, about = load_segmenter(tmp_path / "a", "cpu")
    assert about["classes"] == 4 and not model.training
    labels = predict_labels(model, Normalizer.parse(about["normalizer"])(HEADS[2]["img"]), about["crop"], 0.0)
    best = max(float(r["val_dice"]) for r in rows)
    assert abs(np.nanmean(dice_scores(labels, HEADS[2]["seg"], 4)) - best) < 1e-6
    still = finetune(network, HEADS[:1], cfg=quick(lr=1e-12), out_dir=tmp_path / "still", stop_at=1)
    near = load_segmenter(still.weights, "cpu")[0].net.layers[0].weight
    assert torch.allclose(near, network.net.layers[0].weight, atol=1e-6)
    with pytest.raises(DataError, match="other settings"):
        finetune(TINY, HEADS[:2], HEADS[2:], quick(), out_dir=tmp_path / "a")


def test_chosen_volumes_nest_and_do_not_depend_on_the_amount():
    names = [f"case_{k}" for k in range(9)]
    assert choose_cases(names, 3) == choose_cases(names, 9)[:3] and sorted(choose_cases(names, 9)) == names
    for amount in (0, 10):
        with pytest.raises(ConfigError, match="train_amount"):
            choose_cases(names, amount)


def test_dice_of_classes():
    a, b = np.array([[[0, 1, 1, 2]]]), np.array([[[0, 1, 2, 2]]])
    scores = dice_scores(a, b, 4)
    assert scores[:2] == [2 / 3, 2 / 3] and math.isnan(scores[2])


@pytest.mark.parametrize(
    "cases, message",
    [
        ([], "no labelled volume"),
        ([{"img": np.zeros((8, 8, 8)), "seg": np.zeros((8, 8, 8), int)}], "background only"),
        ([{"img": np.zeros((8, 8, 8)), "seg": np.zeros((8, 8, 4), int)}], "volume 0 needs"),
        ([{"img": np.zeros((8, 8, 8)), "seg": np.zeros((8, 8, 8))}], "volume 0 needs"),
        ([{"img": np.zeros((8, 8, 8)), "seg": -np.ones((8, 8, 8), int)}], "volume 0 needs"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(cases, message, tmp_path):
    with pytest.raises(DataError, match=message):
        finetune(TINY, cases, out_dir=tmp_path / "run")


def test_other_weights_are_no_segmenter(run):
    with pytest.raises(FormatError, match="not weights of `finetune`"):
        load_segmenter(run)
    assert Segmenter(build_network(TINY), 3)(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 3, 8, 8, 8)
