"""Networks, losses, training, weights; embryo.classify."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medvol_nb import phantoms
from medvol_nb.checkpoints import load_checkpoint
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, read_csv, rng_for
from medvol_nb.embryo.classify import (
    ClassifierConfig,
    OrdinalHead,
    PhaseNet,
    TrainingPictures,
    balanced_accuracy,
    class_weights,
    load_classifier,
    merge_phases,
    phase_loss,
    predict_phases,
    train_classifier,
    turned,
)
from medvol_nb.embryo.features import LabelledImages, phantom_images
from medvol_nb.embryo.phases import PHASES

torch.set_num_threads(1)
SMALL = ClassifierConfig(
    architecture="small", size=32, steps=20, batch_size=12, lr=4e-3, device="cpu", validate_every=5
)


@pytest.fixture(scope="module")
def sets():
    return [phantom_images((0, 5, 13), range(a, b), 32) for a, b in ((0, 10), (100, 106), (200, 210))]


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("clf") / "run"
    return out, train_classifier(sets[0], sets[1], SMALL, out_dir=out)


# --------------------------------------------------------------------------------------------------------- networks


def test_parameters_are_those_of_the_published_networks():
    "About 60 000, 7.0 and 23.5 million"
    for name, millions in (("small", 0.06), ("densenet121", 7.0), ("resnet50", 23.5)):
        net = PhaseNet(name)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
        assert net.head.in_features == {"small": 64, "densenet121": 1024, "resnet50": 2048}[name]


@pytest.mark.parametrize("architecture", ["small", "densenet121"])
@pytest.mark.parametrize("ordinal", [False, True])
def test_outputs_are_log_probabilities(architecture, ordinal):
    net = PhaseNet(architecture, ordinal=ordinal).eval()
    with torch.no_grad():
        out = net(torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (2, 16) and torch.allclose(out.exp().sum(1), torch.ones(2), atol=1e-5)


def test_initial_weights_depend_on_the_seed_alone():
    a, b, c = PhaseNet(seed=1), PhaseNet(seed=1), PhaseNet(seed=2)
    assert torch.equal(a.head.weight, b.head.weight) and not torch.equal(a.head.weight, c.head.weight)


def test_ordinal_head_equals_differences_of_sigmoids():
    head = OrdinalHead(3, 16).double()
    with torch.no_grad():
        head.gaps.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = torch.cat([head.first[None], head.first + nn.functional.softplus(head.gaps).cumsum(0)])
    above = torch.cat([torch.ones(50, 1), torch.sigmoid(head.score(x) - theta), torch.zeros(50, 1)], 1)
    assert torch.allclose(head(x).exp(), above[:, :-1] - above[:, 1:], atol=1e-12)


def test_ordinal_head_has_finite_gradients_far_out():
    head = OrdinalHead(1, 16)
    x = torch.tensor([[-1e3], [0.0], [1e3]], requires_grad=True)
    phase_loss(head(x), torch.tensor([15, 7, 0])).backward()
    assert torch.isfinite(x.grad).all() and all(torch.isfinite(p.grad).all() for p in head.parameters())


# ------------------------------------------------------------------------------------------------------------ losses


def test_focal_loss_is_of_each_sample_and_not_of_the_batch_mean():
    logits, truth = torch.tensor([[4.0, 0, 0], [0, 1.0, 0], [0, 0, -2.0]]), torch.tensor([0, 1, 2])
    log_p = logits.log_softmax(1)
    own = log_p[range(3), truth]
    expected = (-((1 - own.exp()) ** 2) * own).mean()
    assert phase_loss(log_p, truth, focal=2.0) == pytest.approx(float(expected), rel=1e-6)
    of_the_mean = (1 - (own.mean()).exp()) ** 2 * -own.mean()
    assert abs(float(expected) - float(of_the_mean)) > 0.1


def test_missing_phases_have_weight_zero():
    w = class_weights(np.array([3, 3, 3, 7]))
    assert w[w > 0].mean() == pytest.approx(1) and w[7] == pytest.approx(3 * w[3])
    assert (np.delete(w, [3, 7]) == 0).all()


def test_turns_show_the_same_pixels_and_each_is_drawn():
    img = np.arange(25, dtype=np.uint8).reshape(5, 5)
    cfg, seen = ClassifierConfig(), set()
    for k in range(200):
        out = turned(img, rng_for(0, k), cfg)
        assert np.array_equal(np.sort(out.ravel()), img.ravel())
        seen.add(out.tobytes())
    assert len(seen) == 8
    still = ClassifierConfig(flips=False, rotations=False)
    assert np.array_equal(turned(img, rng_for(0, 1), still), img)
    free = turned(phantoms.embryo_frame(3, 64, 0), rng_for(0, 1), ClassifierConfig(free_angle=30))
    assert free.shape == (64, 64) and free.dtype == np.uint8


def test_pictures_are_kept_as_far_as_there_is_room():
    images = phantom_images((0, 5), range(4), 32)
    data = TrainingPictures(images, SMALL, keep_bytes=3 * 32 * 32)
    for i in range(8):
        data.load(i)
    assert len(data.kept) == 3 and np.array_equal(data.load(7), images.load(7, 32))


# ---------------------------------------------------------------------------------------------------------- training


def test_D26_loaded_weights_keep_their_head(trained, sets):
    out, _ = trained
    judge = load_classifier(out / "model.safetensors")
    saved = load_checkpoint(out / "model.safetensors")["model"]
    assert torch.equal(judge.net.head.weight, saved["head.weight"])
    first = predict_phases(judge, sets[2], device="cpu").probs
    again = predict_phases(load_classifier(out / "model.safetensors"), sets[2], device="cpu").probs
    assert np.array_equal(first, again)
    x = torch.from_numpy(np.stack([sets[2].load(i, 32) for i in range(len(sets[2]))]))[:, None] / 255
    with torch.no_grad():
        direct = judge.net((x - judge.about["mean"]) / judge.about["std"]).exp().numpy()
    np.testing.assert_allclose(first, direct, atol=1e-5)


def test_D26_weights_of_monai_predict_as_monai_does(tmp_path):
    from monai.networks.nets import DenseNet121

    theirs = DenseNet121(spatial_dims=2, in_channels=1, out_channels=16).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "d.pth")
    with pytest.raises(ConfigError, match="Pass the architecture"):
        load_classifier(tmp_path / "d.pth")
    judge = load_classifier(tmp_path / "d.pth", "densenet121", size=64)
    images = phantom_images((0, 5), range(2))
    x = torch.from_numpy(np.stack([images.load(i, 64) for i in range(4)]))[:, None] / 255
    with torch.no_grad():
        expected = theirs(x).softmax(1).numpy()
    np.testing.assert_allclose(predict_phases(judge, images, device="cpu").probs, expected, atol=1e-5)


def test_D27_best_is_the_best_of_the_whole_run_and_balanced(trained, sets):
    out, done = trained
    scores = [float(r["val_balanced_accuracy"]) for r in done.log if r.get("val_balanced_accuracy")]
    best = load_checkpoint(out / "best.safetensors")
    assert len(scores) == 4 and done.best == pytest.approx(max(scores), rel=1e-6)
    assert best["step"] == 5 * (1 + int(np.argmax(scores)))
    got = predict_phases(load_classifier(out), sets[1], device="cpu").probs.argmax(1)
    assert balanced_accuracy(sets[1].phases, got) == pytest.approx(max(scores), abs=1e-6)
    assert balanced_accuracy(np.array([0] * 9 + [1]), np.zeros(10, int)) == 0.5


def test_interrupted_training_ends_with_the_same_bytes(trained, sets, tmp_path):
    out, _ = trained
    for stop in (7, 13, None):
        done = train_classifier(sets[0], sets[1], SMALL, out_dir=tmp_path / "r", stop_at=stop)
    assert done.finished
    for name in ("model.safetensors", "best.safetensors", "log.csv"):
        assert (tmp_path / "r" / name).read_bytes() == (out / name).read_bytes()
    with pytest.raises(DataError, match="other settings"):
        changed = SMALL.model_copy(update={"ordinal": True})
        train_classifier(sets[0], sets[1], changed, out_dir=tmp_path / "r")


@pytest.mark.parametrize("changes", [{"loss": "focal"}, {"balance": "sampler"}, {"ordinal": True}])
def test_options_learn(sets, tmp_path, changes):
    cfg = SMALL.model_copy(update={"steps": 60, "validate_every": 60, "lr": 1e-2, **changes})
    train_classifier(*sets[:2], cfg, out_dir=tmp_path / "r")
    got = predict_phases(load_classifier(tmp_path / "r" / "model.safetensors"), sets[0], device="cpu").probs.argmax(1)
    assert balanced_accuracy(sets[0].phases, got) > 0.6


def test_frozen_body_stays_as_it_was(trained, sets, tmp_path):
    out, _ = trained
    cfg = SMALL.model_copy(update={"freeze": True, "weights": out, "steps": 5})
    train_classifier(sets[0], sets[1], cfg, out_dir=tmp_path / "r")
    start, end = (load_checkpoint(p)["model"] for p in (out / "best.safetensors", tmp_path / "r" / "model.safetensors"))
    assert all(torch.equal(start[k], end[k]) for k in start if k.startswith("body."))
    assert not torch.equal(start["head.weight"], end["head.weight"])


def test_sets_that_would_mislead_are_refused(sets, tmp_path):
    train, val, _ = sets
    with pytest.raises(DataError, match="videos are in training and validation, such as E0"):
        train_classifier(train, train, SMALL, out_dir=tmp_path / "r")
    with pytest.raises(DataError, match="validation pictures must be real"):
        train_classifier(train, phantom_images((0,), range(3), 32, synthetic=True), SMALL, out_dir=tmp_path / "r")
    with pytest.raises(DataError, match="both are needed"):
        train_classifier(train, val.at(val.phases == 9), SMALL, out_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_merging_renames_and_leaves_out_unlabelled():
    images = LabelledImages.of([np.zeros((4, 4), np.uint8)] * 4, [15, 14, -1, 3], ["a"] * 4)
    assert merge_phases(images, {"tHB": "tEB"}).phases.tolist() == [14, 14, 3]
    with pytest.raises(ConfigError, match="got 'teb'"):
        merge_phases(images, {"tHB": "teb"})


def test_wrong_weight_files_are_named(trained, tmp_path):
    out, _ = trained
    with pytest.raises(MissingFile, match="nowhere"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(MissingFile, match="is it a run folder"):
        load_classifier(tmp_path)
    with pytest.raises(ConfigError, match="is of a small, not of a resnet50"):
        load_classifier(out, "resnet50")
    raw = bytearray((out / "best.safetensors").read_bytes())
    raw[-9] ^= 1
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(FormatError, match="damaged"):
        load_classifier(tmp_path / "x.safetensors")
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "y.pth")
    with pytest.raises(FormatError, match="layout not recognised"):
        load_classifier(tmp_path / "y.pth", "small")


@pytest.mark.slow
def test_A15_small_network_recognises_phantoms_it_has_not_seen(tmp_path):
    "640 training and 320 test phantoms of 64 pixels; 90 % balanced accuracy"
    train, val, test = (phantom_images(range(16), range(a, b)) for a, b in ((0, 40), (100, 105), (200, 220)))
    cfg = ClassifierConfig(architecture="small", size=64, epochs=14, batch_size=16, lr=4e-3, device="cpu")
    train_classifier(train, val, cfg, out_dir=tmp_path / "r")
    probs = predict_phases(load_classifier(tmp_path / "r"), test, device="cpu").probs
    assert len(train) == 640 and len(test) == 320 and probs.shape[1] == len(PHASES)
    assert balanced_accuracy(test.phases, probs.argmax(1)) >= 0.9


# ------------------------------------------------------------------------------------------------- several processes

SCRIPT = """
import sys
from tests.test_embryo_classify import SMALL, phantom_images, train_classifier
sets = [phantom_images((0, 5, 13), range(a, b)) for a, b in ((0, 8), (100, 102))]
cfg = SMALL.model_copy(update={"freeze": True, "balance": "none", "steps": 6, "batch_size": int(sys.argv[2])})
train_classifier(*sets, cfg, out_dir=sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    "Of the head alone: batch normalisation and class weights are those of each process"
    (tmp_path / "run.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29587"]
    for name, batch, more in (("one", "12", []), ("two", "6", torchrun)):
        command = [sys.executable, *more, str(tmp_path / "run.py"), str(tmp_path / name), batch]
        end = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert end.returncode == 0, end.stderr[-3000:]
    logs = [read_csv(tmp_path / n / "log.csv") for n in ("one", "two")]
    assert len(logs[0]) >= 6 and np.allclose(*([float(r["loss"]) for r in rows] for rows in logs), rtol=1e-4)
    a, b = (load_checkpoint(tmp_path / n / "model.safetensors")["model"] for n in ("one", "two"))
    assert all(torch.allclose(v.float(), b[k].float(), atol=1e-5) for k, v in a.items())
