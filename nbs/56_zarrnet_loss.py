# %% [markdown]
# # Losses that know what counts
#
# > One loss for each kind of target, all with a mask, all per sample; ignored voxels change nothing, not even rounding.
#
# Labels of large volumes have holes: voxels nobody looked at, patches that reach over the border, targets that one
# volume lacks. The usual way out, to set logits and labels to zero there, does not work: every ignored voxel still adds
# $\ln 2$ to a cross-entropy and a quarter to the denominator of Dice. Here each loss multiplies its *terms* by the mask
# $M$ and divides by $\sum M$. Sums are taken for each sample, so that a batch of four and four batches of one have the
# same gradient; a sample without a valid voxel has no part in the average.
#
# Predictions are logits $p$ (b, c, z, y, x). Targets are (b, c, z, y, x) numbers, or (b, 1, z, y, x) integers for
# several classes. Masks are (b, 1, z, y, x).

# %%
#| default_exp zarrnet.loss

# %%
#| export
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from medvol_nb.core import ConfigError, DataError
from medvol_nb.zarrnet.config import LOSS_KINDS, Target

# %%
import matplotlib.pyplot as plt

from medvol_nb.core import raises, rng_for

# %% [markdown]
# ## A registry
# A loss is a function of prediction, target and mask that returns one value *for each sample*, and the number of valid
# voxels it was made from. `register_loss` turns it into a loss: half precision becomes single, what the mask hides is
# replaced by zero *before* the function sees it, so that not even NaN gets through, and the samples are averaged.
# Settings refer to losses by name.

# %%
#| export
LOSSES: dict[str, Callable] = {} # name -> loss(pred, target, mask=None, **settings)

def _visible(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    "Prediction and target with zeros where the mask is 0, and the mask as numbers (b, 1, z, y, x)"
    if pred.dtype in (torch.float16, torch.bfloat16): pred = pred.float()
    if target.is_floating_point(): target = target.to(pred.dtype)
    if target.shape[2:] != pred.shape[2:] or len(target) != len(pred) or target.shape[1] not in (1, pred.shape[1]):
        raise DataError(f"loss: prediction {tuple(pred.shape)} and target {tuple(target.shape)} do not fit")
    if mask is None: return pred, target, pred.new_ones(len(pred), 1, *pred.shape[2:])
    if mask.shape != (len(pred), 1, *pred.shape[2:]):
        raise DataError(f"loss: the mask must be {(len(pred), 1, *pred.shape[2:])}, got {tuple(mask.shape)}")
    on = mask != 0
    return torch.where(on, pred, 0), torch.where(on, target, torch.zeros_like(target)), on.to(pred.dtype)

def register_loss(
    name: str, # in settings
    kinds: Sequence[str] | None = None, # kinds of target that it fits; default: what is known, or all
) -> Callable: # decorator
    "Make a function of (pred, target, mask) with values and weights per sample into a loss with a name"
    def wrap(values: Callable) -> Callable:
        def loss(
            pred: torch.Tensor, # (b, c, z, y, x) logits
            target: torch.Tensor, # (b, c, z, y, x), or integers (b, 1, z, y, x)
            mask: torch.Tensor | None = None, # (b, 1, z, y, x), 0 where nothing counts; None: everything counts
            **settings, # of this loss
        ) -> torch.Tensor: # a number
            with torch.autocast(pred.device.type, enabled=False):
                value, count = values(*_visible(pred, target, mask), **settings) # (b), (b)
                valid = count > 0
                return torch.where(valid, value, 0.0).sum()/valid.sum().clamp(min=1)
        loss.__doc__, loss.__name__ = values.__doc__, name
        loss.settings = list(inspect.signature(values).parameters)[3:]
        LOSSES[name] = loss
        LOSS_KINDS[name] = tuple(kinds or LOSS_KINDS.get(name, ("binary", "multiclass", "normals", "regression")))
        return values
    return wrap

def _per_sample(x: torch.Tensor) -> torch.Tensor: return x.flatten(1).sum(1) # (b, ...) -> (b)

def _mean(terms: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Mean of the valid terms (b, c, z, y, x) of every sample, and how many voxels are valid"
    count = _per_sample(mask)
    return _per_sample(terms*mask)/(count.clamp(min=1)*terms.shape[1]), count

# %% [markdown]
# ## Yes or no
# Cross-entropy with smoothed labels, $y' = y(1-2\alpha)+\alpha$. The focal form (Lin et al., ICCV 2017) lowers the
# weight of what is easy. In `bce_z` $\alpha$ rises from the middle slice to the ends, where patches of a slice-wise
# annotation are least certain.

# %%
#| export
def _bce(pred: torch.Tensor, target: torch.Tensor, smoothing: float | torch.Tensor = 0.0) -> torch.Tensor:
    target = target.to(pred.dtype)
    return F.binary_cross_entropy_with_logits(pred, target*(1 - 2*smoothing) + smoothing, reduction="none")

@register_loss("bce")
def _bce_values(pred, target, mask, smoothing: float = 0.0):
    "Binary cross-entropy"
    return _mean(_bce(pred, target, smoothing), mask)

@register_loss("bce_z")
def _bce_z_values(pred, target, mask, centre: float = 0.1, ends: float = 0.4):
    "Binary cross-entropy with labels that are smoothed more towards the first and last slice"
    n = pred.shape[2]
    away = (torch.arange(n, device=pred.device, dtype=pred.dtype) - (n - 1)/2).abs()/(n/2) # (z) in [0, 1)
    return _mean(_bce(pred, target, (centre + (ends - centre)*away)[:, None, None]), mask)

@register_loss("focal")
def _focal_values(pred, target, mask, gamma: float = 2.0, alpha: float | None = 0.25):
    "Focal binary cross-entropy (Lin et al., 2017); `alpha` weighs the foreground, None weighs nothing"
    y = target.to(pred.dtype)
    p = torch.sigmoid(pred)
    terms = _bce(pred, y)*(1 - (p*y + (1 - p)*(1 - y))).clamp(min=1e-12)**gamma
    return _mean(terms if alpha is None else terms*(alpha*y + (1 - alpha)*(1 - y)), mask)

# %%
def numbers(*shape, key=0): return torch.from_numpy(rng_for(key, *shape).normal(size=shape))

logits, label = numbers(2, 1, 6, 8, 8), (numbers(2, 1, 6, 8, 8, key=1) > 0).double()
{name: round(LOSSES[name](logits, label).item(), 4) for name in ("bce", "bce_z", "focal")}

# %% [markdown]
# Half of the voxels hidden, with NaN in label and prediction: the value is that of the other half, and the gradient
# there is zero.

# %%
mask = torch.zeros(2, 1, 6, 8, 8)
mask[..., :4] = 1
holes = [torch.where(mask > 0, a, torch.nan).requires_grad_() for a in (logits, label)]
value = LOSSES["bce"](*holes, mask)
value.backward()
assert torch.allclose(value, LOSSES["bce"](logits[..., :4], label[..., :4]))
assert (holes[0].grad[..., 4:] == 0).all() and holes[0].grad[..., :4].abs().min() > 0
assert LOSSES["bce"](logits, label, mask*0).item() == 0
with raises(DataError, match="the mask must be"): LOSSES["bce"](logits, label, mask[:1])

# %% [markdown]
# ## Overlap
# Dice with squares in the denominator (Milletari et al., 3DV 2016),
# $1 - 2\sum M p\,y\,/\max(\sum M p^2 + \sum M y^2, 10^{-6})$, for each channel of each sample, then their mean. The
# generalised form weighs classes by $1/\sum y^2$, so that small ones count as much as large ones. For integer targets
# $p$ is the softmax and $y$ one channel a class.

# %%
#| export
def _classes(pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Probabilities and labels, one channel a class; integers (b, 1, z, y, x) mean several classes"
    if target.is_floating_point() or pred.shape[1] == 1: return torch.sigmoid(pred), target.to(pred.dtype)
    return torch.softmax(pred, 1), _one_hot(target, pred)

def _one_hot(target: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(pred).scatter_(1, target.long(), 1) # (b, c, z, y, x)

def _sums(x: torch.Tensor) -> torch.Tensor: return x.flatten(2).sum(2) # (b, c, ...) -> (b, c)

@register_loss("dice")
def _dice_values(pred, target, mask):
    "Soft Dice"
    p, y = _classes(pred, target)
    sizes = _sums(p*p*mask) + _sums(y*y*mask) # (b, c)
    return (1 - 2*_sums(p*y*mask)/sizes.clamp(min=1e-6)).mean(1), _per_sample(mask)

@register_loss("generalised_dice")
def _generalised_dice_values(pred, target, mask):
    "Soft Dice over all classes at once, each weighed by the inverse of its size (after Sudre et al., DLMIA 2017)"
    p, y = _classes(pred, target)
    if p.shape[1] == 1: p, y = torch.cat([1 - p, p], 1), torch.cat([1 - y, y], 1)
    sizes = _sums(y*y*mask) # (b, c)
    weights = 1/sizes.clamp(min=1) # (b, c); classes that are absent weigh as if they had one voxel
    joint = (weights*_sums(p*y*mask)).sum(1)
    both = (weights*(_sums(p*p*mask) + sizes)).sum(1)
    return 1 - 2*joint/both.clamp(min=1e-6), _per_sample(mask)

# %%
slab = torch.zeros(1, 1, 40, 4, 4)
slab[:, :, 10:20] = 1
plt.figure(figsize=(4, 2.2))
for name in ("dice", "generalised_dice"):
    plt.plot([LOSSES[name](20*(2*slab.roll(k, 2) - 1), slab).item() for k in range(14)], "o-", label=name)
plt.xlabel("shift of a slab of 10 voxels [voxel]")
plt.legend();

# %%
classes = torch.from_numpy(rng_for(3).integers(0, 4, (2, 1, 6, 8, 8)))
sure = torch.where(label > 0, 20.0, -20.0)
right = 20.0*F.one_hot(classes[:, 0], 4).movedim(-1, 1).float()
assert LOSSES["dice"](sure, label) < 1e-6 < 0.999 < LOSSES["dice"](-sure, label)
assert LOSSES["dice"](right, classes) < 1e-6 and LOSSES["generalised_dice"](right, classes) < 1e-6

# %% [markdown]
# ## Classes, and the usual sums
# Cross-entropy over classes with $y' = (1-\alpha)\,\text{onehot} + \alpha/K$. The defaults of the two kinds join
# cross-entropy, whose gradient is everywhere, and Dice, which does not drown in background. Dice always sees unsmoothed
# labels.

# %%
#| export
def _ce(pred: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    logs = torch.log_softmax(pred, 1) # (b, c, z, y, x)
    picked = logs.gather(1, target.long()) # (b, 1, z, y, x)
    return -(1 - smoothing)*picked - smoothing*logs.mean(1, keepdim=True)

@register_loss("ce")
def _ce_values(pred, target, mask, smoothing: float = 0.0):
    "Cross-entropy over classes"
    return _mean(_ce(pred, target, smoothing), mask)

@register_loss("bce_dice")
def _bce_dice_values(pred, target, mask, smoothing: float = 0.0, alpha: float = 0.5, beta: float = 0.5):
    "Binary cross-entropy, `alpha` times, and Dice, `beta` times"
    value, count = _bce_values(pred, target, mask, smoothing)
    return alpha*value + beta*_dice_values(pred, target, mask)[0], count

@register_loss("ce_dice")
def _ce_dice_values(pred, target, mask, smoothing: float = 0.0, alpha: float = 1.0, beta: float = 1.0):
    "Cross-entropy over classes, `alpha` times, and Dice, `beta` times"
    value, count = _ce_values(pred, target, mask, smoothing)
    return alpha*value + beta*_dice_values(pred, target, mask)[0], count

# %%
several = numbers(2, 4, 6, 8, 8)
expected = F.cross_entropy(several, classes[:, 0], label_smoothing=0.1)
assert torch.allclose(LOSSES["ce"](several, classes, smoothing=0.1), expected)
parts = LOSSES["bce"](logits, label), LOSSES["dice"](logits, label)
assert torch.allclose(LOSSES["bce_dice"](logits, label), (parts[0] + parts[1])/2)
[round(v.item(), 4) for v in (expected, *parts)]

# %% [markdown]
# ## Directions and values
# Normals are compared by the cosine of the angle, where the label is not the zero vector. Without a sign
# (`signed: false`) the square of the cosine is taken, which does not tell a line from its reverse. `normal_smoothness`
# compares neighbouring predictions and can be added to the cosine with `smoothness`. Values use mean squares, mean
# absolute differences, or the smooth form of the latter (Huber).

# %%
#| export
def _smoothness(pred: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Mean of 1 - cos between neighbours that are both valid, and the number of such pairs"
    unit = pred/torch.linalg.vector_norm(pred, dim=1, keepdim=True).clamp(min=1e-8)
    total, pairs = 0, 0
    for axis in (2, 3, 4):
        n = pred.shape[axis] - 1
        both = mask.narrow(axis, 0, n)*mask.narrow(axis, 1, n)
        cos = (unit.narrow(axis, 0, n)*unit.narrow(axis, 1, n)).sum(1, keepdim=True)
        total, pairs = total + _per_sample((1 - cos)*both), pairs + _per_sample(both)
    return total/pairs.clamp(min=1), pairs

def _norm_mask(target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask*(torch.linalg.vector_norm(target, dim=1, keepdim=True) > 1e-6)

@register_loss("normal_smoothness")
def _smoothness_values(pred, target, mask):
    "Change of direction from voxel to voxel, where there are labels"
    return _smoothness(pred, _norm_mask(target, mask))

@register_loss("cosine")
def _cosine_values(pred, target, mask, signed: bool = True, smoothness: float = 0.0):
    "One minus the cosine of the angle, or minus its square for lines without direction"
    mask = _norm_mask(target, mask)
    cos = F.cosine_similarity(pred, target, dim=1, eps=1e-8)[:, None] # (b, 1, z, y, x)
    value, count = _mean(1 - (cos if signed else cos*cos), mask)
    return value + smoothness*_smoothness(pred, mask)[0] if smoothness else value, count

@register_loss("mse")
def _mse_values(pred, target, mask):
    "Mean squared difference"
    return _mean((pred - target)**2, mask)

@register_loss("l1")
def _l1_values(pred, target, mask):
    "Mean absolute difference"
    return _mean((pred - target).abs(), mask)

@register_loss("smooth_l1")
def _smooth_l1_values(pred, target, mask, beta: float = 1.0):
    "Squares below `beta`, absolute differences above"
    return _mean(F.smooth_l1_loss(pred, target.expand_as(pred), reduction="none", beta=beta), mask)

# %%
angle = torch.linspace(0, torch.pi, 50)
turned = torch.stack([angle.cos(), angle.sin(), 0*angle])[None, :, :, None, None] # (1, 3, 50, 1, 1)
fixed = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1, 1)
fig, ax = plt.subplots(figsize=(4.5, 2.2))
for signed in (True, False):
    ax.plot(torch.rad2deg(angle), [LOSSES["cosine"](turned[:, :, k:k + 1], fixed, signed=signed) for k in range(50)],
            label=f"signed={signed}")
ax.set(xlabel="angle [degrees]", ylabel="loss")
ax.legend();

# %%
vectors = F.normalize(numbers(2, 3, 6, 8, 8), dim=1)
some = torch.where(mask > 0, vectors, 0)
assert torch.allclose(LOSSES["cosine"](vectors, some), torch.zeros((), dtype=torch.float64), atol=1e-7)
assert torch.allclose(LOSSES["cosine"](-vectors, some), 2*torch.ones((), dtype=torch.float64))
assert LOSSES["cosine"](-vectors, some, signed=False) < 1e-7 and LOSSES["cosine"](vectors, 0*some) == 0
assert torch.allclose(LOSSES["smooth_l1"](3*vectors, 0*vectors), F.smooth_l1_loss(3*vectors, 0*vectors))

# %% [markdown]
# ## Thin things
# A sheet that is torn is a worse mistake than a sheet that is thin. *Skeleton recall* (Kirchhoff et al., ECCV 2024)
# asks what part of the dilated skeleton of the label is found. *clDice* (Shit et al., CVPR 2021) compares soft
# skeletons, made by repeated pooling, of label and prediction. For several classes the background takes no part.
#
# The skeleton of a volume is made of lines, and a sheet shrinks to a point. So skeletons are drawn in the slices across
# each axis, and what at least two of the three agree on is kept: the middle plane of a sheet, the middle line of a
# tube. It takes about half a second for a patch of 64×192×192 voxels.

# %%
#| export
def _thin_classes(pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p, y = _classes(pred, target)
    return (p, y) if p.shape[1] == 1 or target.is_floating_point() else (p[:, 1:], y[:, 1:])

@torch.no_grad()
def _skeletons(y: torch.Tensor, radius: int) -> torch.Tensor:
    "Dilated skeleton of every channel of every sample, within the label"
    from skimage.morphology import skeletonize
    votes = torch.zeros_like(y)
    for axis in (2, 3, 4):
        slices = (y > 0.5).movedim(axis, 2)
        flat = slices.flatten(0, 2).cpu().numpy()
        thin = np.stack([skeletonize(a) if a.any() else a for a in flat])
        votes += torch.from_numpy(thin).view_as(slices).movedim(2, axis).to(y)
    thin = (votes >= 2).to(y)
    return (F.max_pool3d(thin, 2*radius + 1, 1, radius) if radius else thin)*(y > 0.5)

@register_loss("skeleton_recall")
def _skeleton_values(pred, target, mask, radius: int = 1):
    "Part of the skeleton that is missed"
    p, y = _thin_classes(pred, target)
    tube = _skeletons(y, radius)*mask
    sizes = _sums(tube) # (b, c)
    missed = 1 - _sums(p*tube)/sizes.clamp(min=1)
    there = sizes > 0 # (b, c)
    return torch.where(there, missed, 0).sum(1)/there.sum(1).clamp(min=1), there.sum(1)*_per_sample(mask)

def _soft_skeleton(x: torch.Tensor, steps: int) -> torch.Tensor:
    def erode(a):
        parts = [-F.max_pool3d(-a, k, 1, tuple(n//2 for n in k)) for k in ((3, 1, 1), (1, 3, 1), (1, 1, 3))]
        return torch.minimum(torch.minimum(parts[0], parts[1]), parts[2])
    def rest(a): return F.relu(a - F.max_pool3d(erode(a), 3, 1, 1))
    skeleton = rest(x)
    for _ in range(steps):
        x = erode(x)
        more = rest(x)
        skeleton = skeleton + F.relu(more - skeleton*more)
    return skeleton

@register_loss("cldice")
def _cldice_values(pred, target, mask, steps: int = 3):
    "One minus the harmonic mean of two overlaps: of each soft skeleton with the other mask"
    p, y = (a*mask for a in _thin_classes(pred, target))
    sp, sy = _soft_skeleton(p, steps), _soft_skeleton(y, steps)
    precision = (_sums(sp*y) + 1)/(_sums(sp) + 1)
    recall = (_sums(sy*p) + 1)/(_sums(sy) + 1)
    return (1 - 2*precision*recall/(precision + recall)).mean(1), _per_sample(mask)

# %%
sheet = torch.zeros(1, 1, 13, 16, 16)
sheet[:, :, 4:9] = 1
torn, thin = sheet.clone(), torch.zeros_like(sheet)
torn[..., 7:9] = 0
thin[:, :, 5:8] = 1
table = {name: {what: round(LOSSES[name](20*(2*a - 1), sheet).item(), 3) for what, a in
                [("right", sheet), ("thin", thin), ("torn", torn)]}
         for name in ("dice", "skeleton_recall", "cldice")}
table

# %%
planes = _skeletons(sheet, 0).sum((0, 1, 3, 4))
assert planes[6] > 0.7*planes.sum()
for name in ("skeleton_recall", "cldice"):
    assert table[name]["right"] < 0.01 and table[name]["torn"] > table[name]["thin"]
assert table["dice"]["torn"] < table["dice"]["thin"]

# %% [markdown]
# ## Many targets, many scales
# `MultiTaskLoss` takes what the network gives and what the data hold, and returns the weighted sum, with every loss
# beside it with and without its weight: curves of training and validation are then of the same thing. With deep
# supervision, labels are brought to the size of each output: nearest voxels for labels, averages of unit length for
# normals, the minimum for masks; level $i$ weighs $2^{-i}$, in all 1. Targets can also be balanced automatically by
# learned uncertainties (Kendall, Gal and Cipolla, CVPR 2018): each loss counts $e^{-s}L+s$.

# %%
#| export
def _coarse(x: torch.Tensor, size: Sequence[int], how: str) -> torch.Tensor:
    "Labels (b, c, z, y, x) on a coarser grid"
    if tuple(x.shape[2:]) == tuple(size): return x
    step = [n//m for n, m in zip(x.shape[2:], size)]
    if any(n != m*s for n, m, s in zip(x.shape[2:], size, step)):
        raise DataError(f"loss: labels of size {tuple(x.shape[2:])} do not divide into {tuple(size)}")
    if how == "min": return -F.max_pool3d(-x.float(), step)
    if how == "mean": return F.normalize(F.avg_pool3d(x, step), dim=1, eps=1e-6)
    return x[:, :, ::step[0], ::step[1], ::step[2]]

class MultiTaskLoss(nn.Module):
    "Weighted sum of the losses of all targets"
    def __init__(
        self,
        targets: Mapping[str, Target], # with kinds and losses filled in, as `ZarrConfig.targets`
        balance: bool = False, # learn the weights; then this module has parameters to be trained
    ):
        super().__init__()
        self.targets, self.settings = dict(targets), {}
        for name, t in targets.items():
            if t.kind is None or t.loss is None: raise ConfigError(f"targets.{name}: kind and loss are not filled in")
            if t.loss not in LOSSES: raise ConfigError(f"targets.{name}.loss: unknown loss '{t.loss}'. Known: "
                                                       f"{', '.join(sorted(LOSSES))}")
            known = LOSSES[t.loss].settings
            for key in t.loss_kwargs:
                if key in known: continue
                near = difflib.get_close_matches(key, known, n=1)
                raise ConfigError(f"targets.{name}.loss_kwargs: '{t.loss}' has no setting '{key}'" +
                                  (f", did you mean '{near[0]}'?" if near else f", it has {known}"))
            own = {"smoothing": t.label_smoothing or 0.0, "signed": t.signed}
            self.settings[name] = {k: v for k, v in own.items() if k in known} | dict(t.loss_kwargs)
        self.log_variance = nn.Parameter(torch.zeros(len(targets))) if balance else None # (targets)

    def _one(self, name: str, outputs: torch.Tensor | Sequence[torch.Tensor], batch: Mapping) -> torch.Tensor:
        t, outputs = self.targets[name], [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        label, mask, total = batch[name], batch.get(f"{name}__mask"), 0
        for i, pred in enumerate(outputs):
            here = _coarse(label, pred.shape[2:], "mean" if t.kind == "normals" else "nearest")
            seen = None if mask is None else _coarse(mask, pred.shape[2:], "min")
            total = total + 2.0**-i*LOSSES[t.loss](pred, here, seen, **self.settings[name])
        return total/sum(2.0**-i for i in range(len(outputs)))

    def forward(
        self,
        outputs: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], # logits (b, c, z, y, x), or lists, finest first
        batch: Mapping[str, torch.Tensor], # labels (b, c, z, y, x), masks `<target>__mask` (b, 1, z, y, x)
    ) -> dict[str, torch.Tensor]: # "loss" () to minimise; `<target>` and `<target>_weighted` for the log
        "Losses of a batch"
        found = {name: self._one(name, outputs[name], batch) for name in self.targets}
        weighted = {f"{name}_weighted": self.targets[name].weight*value for name, value in found.items()}
        if self.log_variance is not None:
            weighted = {k: torch.exp(-s)*v + s for (k, v), s in zip(weighted.items(), self.log_variance)}
        return {"loss": sum(weighted.values()), **{k: v.detach() for k, v in {**found, **weighted}.items()}}

# %%
targets = {"sheet": Target(channels=1, kind="binary", loss="bce_dice", label_smoothing=0.1),
           "normals": Target(channels=3, kind="normals", loss="cosine", weight=0.75)}
loss = MultiTaskLoss(targets)
batch = {"sheet": label.float(), "normals": some.float(), "normals__mask": mask}
outputs = {"sheet": logits.float().requires_grad_(), "normals": numbers(2, 3, 6, 8, 8, key=5).float()}
values = loss(outputs, batch)
{k: round(v.item(), 4) for k, v in values.items()}

# %%
assert torch.allclose(values["loss"], values["sheet"] + 0.75*values["normals"])
levels = {k: [v, v[:, :, ::2, ::2, ::2]] for k, v in outputs.items()}
deep, coarse = loss(levels, batch), loss({k: v[1:] for k, v in levels.items()}, batch)
assert torch.allclose(deep["sheet"], (2*values["sheet"] + coarse["sheet"])/3)
assert torch.allclose(MultiTaskLoss(targets, balance=True)(outputs, batch)["loss"], values["loss"])

# %%
with raises(ConfigError, match="'bce_dice' has no setting 'alfa', did you mean 'alpha'"):
    MultiTaskLoss({"sheet": targets["sheet"].model_copy(update={"loss_kwargs": {"alfa": 1}})})

# %% [markdown]
# ## Batches of any size
# Four samples at once and four times one: the same gradient, which is what accumulating gradients takes for granted.

# %%
def gradient(*parts):
    x = outputs["sheet"].detach().clone().requires_grad_()
    sum(loss({"sheet": x[p], "normals": outputs["normals"][p]}, {k: v[p] for k, v in batch.items()})["loss"]/len(parts)
        for p in parts).backward()
    return x.grad

whole, halves = gradient(slice(0, 2)), gradient(slice(0, 1), slice(1, 2))
assert torch.allclose(whole, halves, rtol=1e-6, atol=1e-10)
(whole - halves).abs().max().item()
