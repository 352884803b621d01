"""Page 57: figures of merit against independent formulas."""

import numpy as np
import pytest
import torch

from medvol_nb.core import rng_for
from medvol_nb.zarrnet.config import Target, TrainParams
from medvol_nb.zarrnet.metrics import Scores

BOX = (3, 5, 7)


def target(name, **settings):
    return Target(**settings).resolved(name, TrainParams())


def one(t, name, batches, masks=None):
    scores = Scores({name: t})
    for k, (pred, truth) in enumerate(batches):
        mask = torch.ones(len(truth), 1, *BOX, dtype=torch.uint8) if masks is None else masks[k]
        scores.add({name: pred}, {name: truth, f"{name}__mask": mask})
    return scores.result()


def batches(seed, channels, n=3):
    rng = rng_for(seed, "metrics")
    return [torch.from_numpy(rng.normal(size=(2, channels, *BOX))) for _ in range(n)]


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_dice_is_pooled_over_patches(activation):
    logits, truths = batches(0, 1), [(b > 0.3).float() for b in batches(1, 1)]
    preds = [torch.sigmoid(v) if activation == "sigmoid" else v for v in logits]
    found = one(target("sheet", channels=1, activation=activation), "sheet", list(zip(preds, truths)))
    a = torch.cat([v > 0 for v in logits])
    b = torch.cat(truths) > 0
    assert found == {"sheet_dice": pytest.approx(2 * (a & b).sum().item() / (a.sum() + b.sum()).item())}


def test_dice_of_classes_leaves_out_background_and_absent_ones():
    rng = rng_for(2, "classes")
    truth = torch.from_numpy(rng.integers(0, 3, (2, 1, *BOX)))  # class 3 of 4 never occurs
    guess = torch.from_numpy(rng.integers(0, 3, (2, 1, *BOX)))
    pred = torch.nn.functional.one_hot(guess[:, 0], 4).movedim(-1, 1).float()
    found = one(target("t", channels=4, activation="softmax"), "t", [(pred, truth)])
    dice = [
        2 * ((guess == k) & (truth == k)).sum().item() / ((guess == k).sum() + (truth == k).sum()).item()
        for k in (1, 2)
    ]
    assert found["t_dice"] == pytest.approx(np.mean(dice))


def test_nothing_there_and_nothing_found_is_agreement():
    zero = torch.zeros(1, 1, *BOX)
    assert one(target("s", channels=1, activation="sigmoid"), "s", [(zero, zero)]) == {"s_dice": 1.0}


def test_angles_against_arccos():
    p, t = batches(3, 3, 1)[0], torch.nn.functional.normalize(batches(4, 3, 1)[0], dim=1)
    t[0, :, 0] = 0  # background: no normal
    found = one(target("normals", channels=3), "normals", [(p, t)])
    a, b = (v.movedim(1, -1).reshape(-1, 3).numpy() for v in (p, t))
    seen = np.linalg.norm(b, axis=1) > 0
    cos = (a * b).sum(1)[seen] / np.linalg.norm(a, axis=1)[seen]
    for name, angles in (("angle", np.degrees(np.arccos(cos))), ("axial", np.degrees(np.arccos(np.abs(cos))))):
        assert found[f"normals_{name}_mean"] == pytest.approx(angles.mean(), abs=1e-6)
        for q, key in ((50, "median"), (95, "p95")):
            want = np.percentile(angles, q, method="inverted_cdf")
            assert found[f"normals_{name}_{key}"] == pytest.approx(want, abs=0.05)


def test_no_direction_is_no_good_direction():
    t = torch.nn.functional.normalize(batches(3, 3, 1)[0], dim=1)
    found = one(target("normals", channels=3), "normals", [(0 * t, t)])
    assert found["normals_angle_mean"] == found["normals_axial_mean"] == 90


def test_no_normal_no_number():
    zero = torch.zeros(1, 3, *BOX)
    assert all(np.isnan(v) for v in one(target("normals", channels=3), "normals", [(zero, zero)]).values())


def test_masked_voxels_count_nowhere():
    rng = rng_for(5, "masked")
    mask = torch.from_numpy(rng.integers(0, 2, (2, 1, *BOX)).astype(np.uint8))
    for t, name, channels in (
        (target("s", channels=1, activation="sigmoid"), "s", 1),
        (target("normals", channels=3), "normals", 3),
        (target("d", channels=2), "d", 2),
    ):
        pred, truth = (
            torch.rand(2, channels, *BOX, dtype=torch.float64),
            torch.rand(2, channels, *BOX, dtype=torch.float64),
        )
        other = torch.where(mask > 0, pred, 1 - pred)
        assert one(t, name, [(pred, truth)], [mask]) == one(t, name, [(other, truth)], [mask])
