# %% [markdown]
# # How good a multi-task prediction is
#
# > Dice for masks, angles for normals, absolute error for the rest, pooled over patches and blind to what is ignored.
#
# A falling loss proves little: with normals decoded wrongly it falls all the same (86 degrees off, and a loss of 0.35
# against 0.85 with the right decoding). Numbers in units that mean something show it at once. They are sums over all
# validation patches, not means of patch values, because a patch with three labelled voxels must not weigh as much as a
# full one.

# %%
#| default_exp zarrnet.metrics

# %%
#| export
from collections.abc import Mapping

import numpy as np
import torch

from medvol_nb.core import DataError
from medvol_nb.zarrnet.config import Target

# %%
from medvol_nb.core import close, raises, rng_for
from medvol_nb.zarrnet.config import TrainParams

# %% [markdown]
# ## Counting
# Every kind of target keeps a few sums. Masks: true positives and the two sizes, by class. Normals: a histogram of the
# angle between prediction and truth in steps of 0.05 degrees, once as directions and once as axes, where the sign does
# not count; means are exact, medians and percentiles as fine as a step. A voxel counts where its mask is 1 and, for
# normals, where a normal is given. A prediction without a direction, the zero vector, is 90 degrees off.

# %%
#| export
_STEP = 0.05 # [degree]

class _Overlap:
    "Dice of each class"
    def __init__(self, classes: int, binary: bool):
        self.binary, self.sums = binary, np.zeros((3, 1 if binary else classes), np.int64)

    def add(self, pred: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor) -> None:
        if self.binary: a, b = (pred >= 0.5).long(), (truth > 0.5).long()
        else: a, b = pred.argmax(1, keepdim=True), truth.long()
        keep = mask > 0
        a, b, n = a[keep], b[keep], 2 if self.binary else self.sums.shape[1]
        rows = (torch.bincount(a[a == b], minlength=n), torch.bincount(a, minlength=n), torch.bincount(b, minlength=n))
        found = torch.stack(rows).cpu().numpy()
        self.sums += found[:, 1:] if self.binary else found

    def result(self) -> dict[str, float]:
        both, a, b = self.sums if self.binary else self.sums[:, 1:]
        seen = a + b > 0
        return {"dice": float(np.mean(2*both[seen]/(a + b)[seen])) if seen.any() else 1.0}

class _Angles:
    "Angle between vectors, and between axes [degree]"
    def __init__(self): self.counts, self.sums = np.zeros((2, round(180/_STEP) + 1), np.int64), np.zeros(2)

    def add(self, pred: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor) -> None:
        keep = (mask[:, 0] > 0) & (torch.linalg.vector_norm(truth, dim=1) > 1e-6)
        p, t = (v.movedim(1, -1)[keep].double() for v in (pred, truth))
        cross = torch.linalg.vector_norm(torch.linalg.cross(p, t), dim=-1)
        angle = torch.rad2deg(torch.atan2(cross, (p*t).sum(-1)))
        angle = torch.where(p.any(-1), angle, 90.0).cpu().numpy()
        for row, a in enumerate((angle, np.minimum(angle, 180 - angle))):
            self.counts[row] += np.bincount(np.floor(a/_STEP).astype(int), minlength=self.counts.shape[1])
            self.sums[row] += a.sum()

    def result(self) -> dict[str, float]:
        out = {}
        for row, name in enumerate(("angle", "axial")):
            n = int(self.counts[row].sum())
            below = np.cumsum(self.counts[row])
            median, p95 = (np.searchsorted(below, (0.5*n, 0.95*n)) + 0.5)*_STEP if n else (np.nan, np.nan)
            mean = self.sums[row]/n if n else np.nan
            out |= {f"{name}_mean": float(mean), f"{name}_median": float(median), f"{name}_p95": float(p95)}
        return out

class _Error:
    "Mean absolute error"
    def __init__(self): self.total, self.n = 0.0, 0

    def add(self, pred: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor) -> None:
        keep = (mask > 0).expand_as(truth)
        self.total += float((pred[keep].double() - truth[keep].double()).abs().sum())
        self.n += int(keep.sum())

    def result(self) -> dict[str, float]: return {"mae": self.total/self.n if self.n else float("nan")}

# %%
#| export
class Scores:
    "Figures of merit of all targets, summed up patch by patch"
    def __init__(
        self,
        targets: Mapping[str, Target], # with their kinds
    ):
        kinds = {"binary": lambda t: _Overlap(2, True), "multiclass": lambda t: _Overlap(t.channels, False),
                 "normals": lambda t: _Angles(), "regression": lambda t: _Error()}
        self.parts = {name: kinds[t.kind](t) for name, t in targets.items()}
        self.signs = {name: t.kind == "binary" and t.activation == "none" for name, t in targets.items()}

    def add(
        self,
        preds: Mapping[str, torch.Tensor], # (b, c, z, y, x) for each target, as from `predict`
        batch: Mapping[str, torch.Tensor], # (b, c, z, y, x) truths, and masks '<target>__mask'
    ) -> None:
        "Count a batch"
        for name, part in self.parts.items():
            pred, truth = preds[name].detach().float(), batch[name]
            if pred.shape[2:] != truth.shape[2:]:
                raise DataError(f"scores: {name!r} is {tuple(pred.shape)}, the truth is {tuple(truth.shape)}")
            if self.signs[name]: pred = torch.sigmoid(pred)
            part.add(pred, truth, batch[f"{name}__mask"])

    def result(self) -> dict[str, float]: # such as 'sheet_dice', 'normals_angle_mean' [degree]
        "All figures so far"
        return {f"{name}_{k}": v for name, part in self.parts.items() for k, v in part.result().items()}

# %% [markdown]
# Known answers: half of a mask found gives a Dice of 2/3, normals turned by 10 degrees are 10 degrees off, turned
# around they are 180 degrees off as directions and right as axes, and what the mask hides does not count.

# %%
def kinds(**names): return {n: Target(**t).resolved(n, TrainParams()) for n, t in names.items()}

targets = kinds(sheet={"channels": 1, "activation": "sigmoid"}, normals={"channels": 3}, depth={
    "channels": 1, "kind": "regression"}, tissue={"channels": 3, "activation": "softmax"})
rng, box = rng_for(0, "scores"), (4, 6, 8)
vectors = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(1, 3, *box))), dim=1)
turn = torch.tensor([[np.cos(np.radians(10)), -np.sin(np.radians(10)), 0], [np.sin(np.radians(10)),
                    np.cos(np.radians(10)), 0], [0, 0, 1]], dtype=torch.float64)
flat = torch.nn.functional.normalize(vectors*torch.tensor([1., 1, 0]).view(1, 3, 1, 1, 1), dim=1)
half = torch.zeros(1, 1, *box)
half[..., :4] = 1
tissue = torch.from_numpy(rng.integers(0, 3, (1, 1, *box)))
truth = {"sheet": torch.ones(1, 1, *box), "normals": flat, "depth": half, "tissue": tissue,
         **{f"{n}__mask": torch.ones(1, 1, *box, dtype=torch.uint8) for n in targets}}
guess = {"sheet": half, "normals": torch.einsum("ij,bjzyx->bizyx", turn, flat), "depth": half + 0.25,
         "tissue": torch.nn.functional.one_hot(tissue[:, 0], 3).movedim(-1, 1).float()}
scores = Scores(targets)
scores.add(guess, truth)
found = scores.result()
found

# %%
assert close(found["sheet_dice"], 2/3) and found["tissue_dice"] == 1 and close(found["depth_mae"], 0.25)
assert abs(found["normals_angle_mean"] - 10) < 1e-6 and abs(found["normals_angle_median"] - 10) < 0.05
back = Scores({"normals": targets["normals"]})
back.add({"normals": -flat}, truth)
assert abs(back.result()["normals_angle_mean"] - 180) < 1e-3 and back.result()["normals_axial_p95"] < 0.05

# %%
hidden = {**truth, "sheet__mask": (half > 0).byte()}
scores = Scores({"sheet": targets["sheet"]})
for _ in range(2): scores.add(guess, hidden)
assert scores.result() == {"sheet_dice": 1.0}
with raises(DataError, match="the truth is"): scores.add({"sheet": half[..., 1:]}, truth)
