"""Losses: the mask is exact, empty samples do not count, gradients are right, accumulation equals one batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medvol_nb.core import ConfigError, DataError, rng_for
from medvol_nb.zarrnet.config import LOSS_KINDS, Target, TrainParams
from medvol_nb.zarrnet.loss import LOSSES, MultiTaskLoss, _skeletons, register_loss

SHAPE = (3, 6, 7, 8)  # samples, z, y, x


def numbers(*shape, key=0):
    return torch.from_numpy(rng_for(key, *shape).normal(size=shape))


def blobs(*shape, key=1):
    "Labels with some extent, so that thin-structure losses have something to see"
    return (F.avg_pool3d(numbers(*shape, key=key), 3, 1, 1) > 0).double()


def example(kind, dtype=torch.float64):
    "Prediction and target of a kind of target"
    b, *size = SHAPE
    if kind == "binary":
        return numbers(b, 1, *size).to(dtype), blobs(b, 1, *size).to(dtype)
    if kind == "multiclass":
        return numbers(b, 4, *size).to(dtype), torch.from_numpy(rng_for(2).integers(0, 4, (b, 1, *size)))
    pred, target = numbers(b, 3, *size).to(dtype), numbers(b, 3, *size, key=3).to(dtype)
    return pred, F.normalize(target, dim=1) if kind == "normals" else target


def half_mask():
    return (torch.from_numpy(rng_for(4).random((SHAPE[0], 1, *SHAPE[1:]))) < 0.6).to(torch.uint8)


CASES = [(name, kind) for name, kinds in LOSS_KINDS.items() for kind in kinds]
IDS = [f"{n}-{k}" for n, k in CASES]


def test_every_name_of_the_settings_has_a_loss():
    assert set(LOSSES) == set(LOSS_KINDS) and len(LOSSES) >= 15


@pytest.mark.parametrize("name, kind", CASES, ids=IDS)
class TestB17:
    def test_a_full_mask_is_no_mask(self, name, kind):
        pred, target = example(kind)
        ones = torch.ones(SHAPE[0], 1, *SHAPE[1:], dtype=torch.uint8)
        assert torch.equal(LOSSES[name](pred, target), LOSSES[name](pred, target, ones))

    def test_what_is_hidden_changes_neither_loss_nor_gradient(self, name, kind):
        "Bitwise, whatever stands there: other numbers, infinity, NaN, classes that do not exist"
        pred, target = example(kind)
        mask, found = half_mask(), []
        for there in (None, 7.0, float("inf"), float("nan")):
            p, t = pred.clone(), target.clone()
            if there is not None:
                p[(mask == 0).expand_as(p)] = there
                t[(mask == 0).expand_as(t)] = 255 if kind == "multiclass" else there
            p.requires_grad_()
            value = LOSSES[name](p, t, mask)
            value.backward()
            found.append((value, p.grad))
        for value, grad in found:
            assert torch.isfinite(value) and torch.isfinite(grad).all()
            assert torch.equal(value, found[0][0]) and torch.equal(grad, found[0][1])
            assert (grad[(mask == 0).expand_as(grad)] == 0).all() and grad.abs().max() > 0

    def test_nothing_valid_is_zero_with_zero_gradient(self, name, kind):
        pred, target = example(kind)
        pred.requires_grad_()
        value = LOSSES[name](pred, target, half_mask() * 0)
        value.backward()
        assert value.item() == 0 and (pred.grad == 0).all()

    def test_an_empty_sample_has_no_part_in_the_average(self, name, kind):
        pred, target = example(kind)
        mask = half_mask()
        mask[1] = 0
        kept = [0, 2]
        value = LOSSES[name](pred, target, mask)
        assert torch.allclose(value, LOSSES[name](pred[kept], target[kept], mask[kept]), rtol=1e-12)

    def test_gradients_are_right(self, name, kind):
        pred, target = example(kind)
        pred, target, mask = pred[:2, :, :3, :4, :3].clone(), target[:2, :, :3, :4, :3], half_mask()[:2, :, :3, :4, :3]
        pred.requires_grad_()
        assert torch.autograd.gradcheck(lambda p: LOSSES[name](p, target, mask), (pred,), atol=1e-6, rtol=1e-4)

    def test_half_precision_is_computed_in_single(self, name, kind):
        pred, target = example(kind, torch.float32)
        low = pred.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            value = LOSSES[name](low, target)
        assert value.dtype == torch.float32 and torch.equal(value, LOSSES[name](low.float(), target))

    def test_B18_accumulating_equals_one_batch(self, name, kind):
        pred, target = example(kind)
        mask = half_mask()
        pred.requires_grad_()
        LOSSES[name](pred, target, mask).backward()
        whole = pred.grad.clone()
        pred.grad = None
        for k in range(SHAPE[0]):
            s = slice(k, k + 1)
            (LOSSES[name](pred[s], target[s], mask[s]) / SHAPE[0]).backward()
        assert (whole - pred.grad).abs().max() <= 1e-6 * whole.abs().max()


# ---- values, one by one


def test_binary_cross_entropy_is_torchs():
    pred, y = example("binary")
    expected = F.binary_cross_entropy_with_logits(pred, y * 0.8 + 0.1)
    assert torch.allclose(LOSSES["bce"](pred, y, smoothing=0.1), expected)


def test_smoothing_by_slice_goes_from_the_middle_to_the_ends():
    pred, y = torch.zeros(1, 1, 8, 2, 2) + 3, torch.ones(1, 1, 8, 2, 2)
    alphas = 0.1 + 0.3 * (torch.arange(8) - 3.5).abs() / 4
    terms = [F.binary_cross_entropy_with_logits(torch.tensor(3.0), 1 - a) for a in alphas]
    assert torch.allclose(LOSSES["bce_z"](pred, y), torch.stack(terms).mean())


def test_focal_without_focus_is_cross_entropy():
    pred, y = example("binary")
    assert torch.allclose(LOSSES["focal"](pred, y, gamma=0.0, alpha=None), LOSSES["bce"](pred, y))
    easy, hard = (LOSSES["focal"](s * (2 * y - 1), y) for s in (4.0, -4.0))
    assert easy < 1e-4 < 0.5 < hard


def test_dice_is_per_sample_and_per_channel():
    "The reference pools the batch, so that accumulating gradients changes them"
    pred, y = example("binary")
    mask = half_mask().double()
    p = torch.sigmoid(pred)
    each = [
        1 - 2 * (m * a * b).sum() / ((m * a * a).sum() + (m * b * b).sum()) for a, b, m in zip(p, y, mask, strict=True)
    ]
    assert torch.allclose(LOSSES["dice"](pred, y, mask), torch.stack(each).mean())
    pred, y = example("multiclass")
    p, hot = torch.softmax(pred, 1), F.one_hot(y[:, 0], 4).movedim(-1, 1).double()
    sums = [t.flatten(2).sum(2) for t in (p * hot, p * p, hot * hot)]
    assert torch.allclose(LOSSES["dice"](pred, y), (1 - 2 * sums[0] / (sums[1] + sums[2])).mean())


def test_generalised_dice_counts_small_classes_as_much():
    y = torch.zeros(1, 1, 10, 10, 10).long()
    y[..., 0, 0, :5] = 1
    right = 30.0 * (2 * F.one_hot(y[:, 0], 2).movedim(-1, 1).double() - 1)
    lost = torch.stack([torch.full_like(right[:, 0], 30), torch.full_like(right[:, 0], -30)], 1)
    assert LOSSES["generalised_dice"](right, y) < 1e-9
    assert LOSSES["generalised_dice"](lost, y) > 0.3 and LOSSES["ce"](lost, y) < 0.5


def test_cross_entropy_is_torchs():
    pred, y = example("multiclass")
    for a in (0.0, 0.1):
        assert torch.allclose(LOSSES["ce"](pred, y, smoothing=a), F.cross_entropy(pred, y[:, 0], label_smoothing=a))
    mask = half_mask()
    ignored = torch.where(mask > 0, y, -100)
    per = [F.cross_entropy(pred[k : k + 1], ignored[k : k + 1, 0]) for k in range(SHAPE[0])]
    assert torch.allclose(LOSSES["ce"](pred, torch.where(mask > 0, y, 255), mask), torch.stack(per).mean())


def test_U19_integer_classes_with_one_channel_are_what_cross_entropy_takes():
    pred, y = example("multiclass")
    target = Target(channels=4, activation="softmax").resolved("organs", TrainParams())
    value = MultiTaskLoss({"organs": target})({"organs": pred}, {"organs": y})
    assert torch.isfinite(value["loss"])
    expected = LOSSES["ce"](pred, y, smoothing=0.1) + LOSSES["dice"](pred, y)
    assert torch.allclose(value["organs"], expected)


def test_U19_defaults_need_no_arguments():
    for kind in ("binary", "multiclass", "normals", "regression"):
        pred, y = example(kind)
        act = "softmax" if kind == "multiclass" else "none"
        t = Target(channels=pred.shape[1], kind=kind, activation=act).resolved("t", TrainParams())
        assert torch.isfinite(MultiTaskLoss({"t": t})({"t": pred}, {"t": y})["loss"])


def test_U03_the_background_of_normals_has_no_loss():
    "Zero vectors do not count; in the first revision they decode to a diagonal, and count"
    pred, y = example("normals")
    y[:, :, :3] = 0
    pred.requires_grad_()
    value = LOSSES["cosine"](pred, y)
    value.backward()
    cos = F.cosine_similarity(pred[:, :, 3:], y[:, :, 3:])
    assert torch.allclose(value, (1 - cos).mean()) and (pred.grad[:, :, :3] == 0).all()


def test_cosine_with_and_without_sign():
    _, y = example("normals")
    assert abs(LOSSES["cosine"](5 * y, y).item()) < 1e-12 and abs(LOSSES["cosine"](-y, y).item() - 2) < 1e-12
    assert abs(LOSSES["cosine"](-y, y, signed=False).item()) < 1e-12
    rough = LOSSES["cosine"](y, y, smoothness=0.5)
    assert torch.allclose(rough, 0.5 * LOSSES["normal_smoothness"](y, y))
    flat = torch.ones_like(y)
    assert LOSSES["normal_smoothness"](flat, y).item() < 1e-12
    assert torch.isfinite(LOSSES["cosine"](torch.zeros_like(y).requires_grad_(), y))


def test_regression_is_torchs():
    pred, y = example("regression")
    for name, f in (("mse", F.mse_loss), ("l1", F.l1_loss), ("smooth_l1", F.smooth_l1_loss)):
        assert torch.allclose(LOSSES[name](pred, y), f(pred, y))
    assert torch.allclose(LOSSES["smooth_l1"](pred, y, beta=0.3), F.smooth_l1_loss(pred, y, beta=0.3))


def test_skeletons_are_middles():
    z, y, x = np.meshgrid(*[np.arange(n) for n in (24, 40, 40)], indexing="ij")
    r = np.hypot(y - 20, x - 20)
    shells = torch.from_numpy((np.abs(r - 12) < 2.6) * 1.0)[None, None]
    thin = _skeletons(shells, 0)[0, 0].numpy() > 0
    assert 0.1 < thin.sum() / shells.sum() < 0.4 and np.abs(r[thin] - 12).max() < 2.1
    assert np.percentile(np.abs(r[thin] - 12), 90) < 1.0
    rod = torch.from_numpy((np.hypot(z - 12, y - 20) < 3.2) * 1.0)[None, None]
    line = _skeletons(rod, 0)[0, 0].numpy() > 0
    assert np.hypot(z - 12, y - 20)[line[:]].max() < 2.3 and line.any((0, 1)).sum() > 30


def test_thin_losses_see_tears():
    sheet = torch.zeros(1, 1, 13, 16, 16)
    sheet[:, :, 4:9] = 1
    torn, thin = sheet.clone(), torch.zeros_like(sheet)
    torn[..., 7:9], thin[:, :, 5:8] = 0, 1
    for name in ("skeleton_recall", "cldice"):
        right, hole, slim = (LOSSES[name](20 * (2 * a - 1), sheet).item() for a in (sheet, torn, thin))
        assert right < 0.01 and hole > max(0.03, 3 * slim), name
    nothing = torch.zeros_like(sheet)
    assert LOSSES["skeleton_recall"](numbers(1, 1, 13, 16, 16), nothing).item() == 0


# ---- many targets


def two(**changes):
    tr = TrainParams(label_smoothing=0.1)
    targets = {"sheet": Target(channels=1), "normals": Target(channels=3, weight=0.75)}
    return {n: t.resolved(n, tr).model_copy(update=changes.get(n, {})) for n, t in targets.items()}


def batch(key=0):
    (ps, ys), (pn, yn) = example("binary"), example("normals")
    mask = half_mask()
    return {"sheet": ps, "normals": pn}, {"sheet": ys, "sheet__mask": mask, "normals": yn, "normals__mask": mask}


def test_the_sum_is_weighted_and_both_values_are_told():
    outputs, data = batch()
    found = MultiTaskLoss(two())(outputs, data)
    assert set(found) == {"loss", "sheet", "normals", "sheet_weighted", "normals_weighted"}
    assert torch.allclose(found["loss"], found["sheet"] + 0.75 * found["normals"])
    assert torch.allclose(
        found["sheet"], LOSSES["bce_dice"](outputs["sheet"], data["sheet"], data["sheet__mask"], smoothing=0.1)
    )
    assert torch.equal(found["normals_weighted"], 0.75 * found["normals"])


def test_smoothing_is_that_of_the_settings():
    "The second revision's default loss smooths by 0.1 whatever is asked for"
    outputs, data = batch()
    found = [MultiTaskLoss(two(sheet={"label_smoothing": a}))(outputs, data)["sheet"] for a in (0.0, 0.1, 0.3)]
    assert len({v.item() for v in found}) == 3
    mask = data["sheet__mask"]
    bce, dice = (LOSSES[n](outputs["sheet"], data["sheet"], mask) for n in ("bce", "dice"))
    assert torch.allclose(found[0], (bce + dice) / 2)


def test_B24_weight_0_gives_exactly_zero_gradient():
    outputs, data = batch()
    outputs = {k: v.requires_grad_() for k, v in outputs.items()}
    MultiTaskLoss(two(normals={"weight": 0.0}))(outputs, data)["loss"].backward()
    assert (outputs["normals"].grad == 0).all() and outputs["sheet"].grad.abs().max() > 0


def test_a_target_that_a_volume_lacks():
    outputs, data = batch()
    outputs = {k: v.requires_grad_() for k, v in outputs.items()}
    data["normals"], data["normals__mask"] = data["normals"] * torch.nan, data["normals__mask"] * 0
    found = MultiTaskLoss(two())(outputs, data)
    found["loss"].backward()
    assert found["normals"] == 0 and (outputs["normals"].grad == 0).all() and torch.isfinite(found["loss"])


def test_B18_accumulating_equals_one_batch_for_the_sum():
    outputs, data = batch()
    outputs = {k: v.requires_grad_() for k, v in outputs.items()}
    loss, n = MultiTaskLoss(two()), SHAPE[0]
    loss(outputs, data)["loss"].backward()
    whole = {k: v.grad.clone() for k, v in outputs.items()}
    for v in outputs.values():
        v.grad = None
    for k in range(n):
        part = slice(k, k + 1)
        (loss({t: v[part] for t, v in outputs.items()}, {t: v[part] for t, v in data.items()})["loss"] / n).backward()
    for t in outputs:
        assert (whole[t] - outputs[t].grad).abs().max() <= 1e-6 * whole[t].abs().max()


def test_deep_supervision_weights_and_labels():
    "Nearest labels, normals of unit length, a coarse voxel is valid if all of its voxels are"
    targets = {**two(), "sheet": two()["sheet"].model_copy(update={"loss": "bce", "label_smoothing": 0.0})}
    y, n = blobs(1, 1, 8, 8, 8), F.normalize(numbers(1, 3, 8, 8, 8), dim=1)
    mask = torch.ones(1, 1, 8, 8, 8)
    mask[..., 0, 0, 0] = 0
    data = {"sheet": y, "sheet__mask": mask, "normals": n, "normals__mask": mask}
    outputs = {
        "sheet": [numbers(1, 1, m, m, m) for m in (8, 4, 2)],
        "normals": [numbers(1, 3, m, m, m) for m in (8, 4, 2)],
    }
    found = MultiTaskLoss(targets)(outputs, data)
    sheet, normals = [], []
    for k, step in enumerate((1, 2, 4)):
        m = -F.max_pool3d(-mask, step)
        assert (m == 0).sum() == 1
        sheet.append(LOSSES["bce"](outputs["sheet"][k], y[:, :, ::step, ::step, ::step], m))
        normals.append(LOSSES["cosine"](outputs["normals"][k], F.normalize(F.avg_pool3d(n, step), dim=1), m))
    weights = torch.tensor([4, 2, 1]) / 7
    assert torch.allclose(found["sheet"], sum(w * v for w, v in zip(weights, sheet, strict=True)))
    assert torch.allclose(found["normals"], sum(w * v for w, v in zip(weights, normals, strict=True)))
    with pytest.raises(DataError, match="do not divide"):
        MultiTaskLoss(targets)({**outputs, "sheet": [numbers(1, 1, 3, 3, 3)]}, data)


def test_balance_learns_weights():
    outputs, data = batch()
    loss = MultiTaskLoss(two(), balance=True)
    plain = MultiTaskLoss(two())(outputs, data)
    found = loss(outputs, data)
    assert torch.allclose(found["loss"], plain["loss"]) and len(list(loss.parameters())) == 1
    found["loss"].backward()
    expected = torch.stack([1 - plain["sheet"], 1 - 0.75 * plain["normals"]]).float()
    assert torch.allclose(loss.log_variance.grad, expected)
    assert not list(MultiTaskLoss(two()).parameters())


def test_refusals():
    with pytest.raises(ConfigError, match="'bce_dice' has no setting 'alfa', did you mean 'alpha'"):
        MultiTaskLoss(two(sheet={"loss_kwargs": {"alfa": 1}}))
    with pytest.raises(ConfigError, match="unknown loss 'nothing'"):
        MultiTaskLoss(two(sheet={"loss": "nothing"}))
    with pytest.raises(ConfigError, match="kind and loss are not filled in"):
        MultiTaskLoss({"sheet": Target(channels=1)})
    pred, y = example("binary")
    with pytest.raises(DataError, match="the mask must be"):
        LOSSES["bce"](pred, y, torch.ones(pred.shape[0], 2, *SHAPE[1:]))
    with pytest.raises(DataError, match="do not fit"):
        LOSSES["bce"](pred, y[:, :, :3])


def test_own_losses_have_names_in_settings():
    try:

        @register_loss("hinge", ["binary"])
        def hinge(pred, target, mask, margin: float = 1.0):
            "Squared hinge"
            terms = F.relu(margin - pred * (2 * target - 1)) ** 2
            count = mask.flatten(1).sum(1)
            return (terms * mask).flatten(1).sum(1) / count.clamp(min=1), count

        t = Target(channels=1, loss="hinge", loss_kwargs={"margin": 2.0}).resolved("t", TrainParams())
        pred, y = example("binary")
        value = MultiTaskLoss({"t": t})({"t": pred}, {"t": y, "t__mask": half_mask()})["loss"]
        assert value > LOSSES["hinge"](pred, y, half_mask(), margin=1.0)
    finally:
        LOSSES.pop("hinge", None)
        LOSS_KINDS.pop("hinge", None)
