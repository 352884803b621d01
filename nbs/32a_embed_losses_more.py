# %% [markdown]
# # Organs and modalities
#
# > Two more losses: vectors that gather around their organ, and vectors that agree between CT and MR.
#
# Contrast between two views of one scan (page [32](32_embed_loss.ipynb)) never compares two people. It learns where
# things are, but a liver of one patient and a liver of another are only alike because the network is smooth. SAM++ (Bai
# et al., 2023) adds a head that is trained with organ masks of *different* people. Cross-SAM adds pairs of CT and MR
# that were registered with its own earlier vectors: the key of an MR voxel is the CT voxel at the same millimetres.

# %%
#| default_exp embed.losses_more

# %%
#| export
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F

from medvol_nb.core import DataError
from medvol_nb.embed.loss import (LossConfig, Maps, Places, Rows, coarse_at, coarse_scores, contrast, forget_near,
                                  hard_then_diverse, middle, nearest, places, some)
from medvol_nb.embed.model import STRIDES

# %%
import numpy as np
from matplotlib import pyplot as plt

from medvol_nb import phantoms
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.core import close, raises, rng_for

# %% [markdown]
# ## Prototypes
# The prototype of an organ is the mean of its vectors, over both volumes of the batch. The loss pulls the organ's
# voxels to it and pushes everything else away,
# $$L = \operatorname*{mean}_k\Big[-\frac{1}{|P_k|}
#     \sum_{j\in P_k}\log\frac{e^{p_k f_j/\tau}}{\sum_i e^{p_k f_i/\tau}}\Big]
#     = \operatorname*{mean}_k\Big[\log\sum_i e^{p_k f_i/\tau} - |p_k|^2/\tau\Big],$$
# where the sum over $i$ runs over *all* voxels, background and the organ itself included. So its smallest value is not
# 0 but about $\log|P_k|$. The other form, a softmax over prototypes for each labelled voxel, has its minimum at 0 when
# organs are far apart; it is `over="prototypes"`. Because the mean of the organ's similarities is $|p_k|^2$, one table
# of prototypes by voxels is all that is needed.

# %%
#| export
def coarse_labels(
    labels: torch.Tensor, # (Z, Y, X) integer, on the network's grid
) -> torch.Tensor: # (z, y, x) integer, on the grid of the fine and semantic maps
    "Labels of feature voxels: that of their first network voxel"
    return labels[tuple(slice(None, None, s) for s in STRIDES["semantic"])]

def prototypes(
    vectors: torch.Tensor, # (n, e)
    labels: torch.Tensor, # (n,) integer, 0 background
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: # labels present (k,), their mean vectors (k, e), place of each
    "Mean vector of each label above 0; the last array (n,) is the place of a voxel's label among them, or -1"
    found, at = labels.unique(return_inverse=True)
    first = int((found <= 0).sum()) # labels that are no organ
    at = at - first
    inside = at >= 0
    total = vectors.new_zeros(len(found) - first, vectors.shape[1]).index_add(0, at[inside], vectors[inside])
    return found[first:], total/torch.bincount(at[inside], minlength=len(total))[:, None], at

def prototype_loss(
    maps: Sequence[torch.Tensor], # (e, z, y, x) semantic vectors of each volume
    labels: Sequence[torch.Tensor], # (Z, Y, X) integer labels of each volume, on the network's grid
    tau: float = 0.1, # temperature
    *,
    over: Literal["voxels", "prototypes"] = "voxels", # "voxels": as published; "prototypes": bounded by 0
) -> torch.Tensor: # scalar
    "Gather the vectors of an organ, over several volumes"
    if over not in ("voxels", "prototypes"): raise DataError(f"over: must be voxels or prototypes, got {over!r}")
    small = [coarse_labels(v) for v in labels]
    for m, v in zip(maps, small, strict=True):
        if m.shape[1:] != v.shape: raise DataError(f"prototypes: map {tuple(m.shape)} for labels {tuple(v.shape)}")
    vectors = torch.cat([m.flatten(1) for m in maps], 1).T # (n, e)
    found, mean, at = prototypes(vectors, torch.cat([v.flatten() for v in small]))
    if not len(found): raise DataError("prototypes: the volumes show no organ")
    if over == "prototypes": return F.cross_entropy(vectors[at >= 0] @ mean.T/tau, at[at >= 0])
    table = mean @ vectors.T/tau # (k, n)
    return (table.logsumexp(1) - (mean*mean).sum(1)/tau).mean()

def nearest_prototype(
    vectors: torch.Tensor, # (n, e)
    found: torch.Tensor, # (k,) labels
    mean: torch.Tensor, # (k, e) their prototypes
) -> torch.Tensor: # (n,) label
    "Label of the most similar prototype"
    return found[(vectors @ F.normalize(mean, dim=1).T).argmax(1)]

# %% [markdown]
# Vectors that hesitate between their organ and noise, from all noise to all organ. The published form ends at the
# logarithm of the organ's size, the other one at 0:

# %%
body = phantoms.random_body((24, 40, 32), seed=2)
lbl = torch.from_numpy(np.ascontiguousarray(body.lbl.transpose(2, 1, 0)).astype(np.int64))
corner = F.normalize(torch.from_numpy(rng_for(0, "organs").normal(size=(int(lbl.max()) + 1, 24))).float(), dim=1)
blank = torch.from_numpy(rng_for(1, "organs").normal(size=(24, *coarse_labels(lbl).shape))).float()
mixed = [F.normalize((1 - t)*F.normalize(blank, dim=0) + t*corner[coarse_labels(lbl)].movedim(-1, 0), dim=0)
         for t in np.linspace(0, 1, 6)]
curves = {how: [prototype_loss([m], [lbl], over=how).item() for m in mixed] for how in ("voxels", "prototypes")}
counts = torch.bincount(coarse_labels(lbl).flatten())[1:]
fig, ax = plt.subplots(figsize=(4, 2.2))
for how, values in curves.items(): ax.plot(np.linspace(0, 1, 6), values, label=f"over {how}")
ax.axhline(counts[counts > 0].float().log().mean(), ls=":", color="C0")
ax.set(xlabel="share of the organ's own vector", ylabel="loss")
ax.legend();

# %%
flat = mixed[2].flatten(1).T.double()
small = coarse_labels(lbl).flatten()
found, mean, _ = prototypes(flat, small)
literal = [-(torch.log_softmax(p @ flat.T/0.1, 0)[small == k]).mean() for k, p in zip(found, mean)]
assert close(prototype_loss([mixed[2].double()], [lbl]), torch.stack(literal).mean(), 1e-9)
assert curves["voxels"][-1] < 0.7*curves["voxels"][0] and curves["prototypes"][-1] < 0.1
assert torch.equal(nearest_prototype(mixed[-1].flatten(1).T[small > 0], found, mean.float()), small[small > 0])
halves = [m[:, :6] for m in (mixed[2],)] + [mixed[2][:, 6:]], [lbl[:12], lbl[12:]]
assert close(prototype_loss(*halves), prototype_loss([mixed[2]], [lbl]), 1e-5)

# %%
with raises(DataError, match="show no organ"): prototype_loss([blank], [lbl*0])
with raises(DataError, match="over: must be voxels or prototypes"): prototype_loss([blank], [lbl], over="organs")
with raises(DataError, match=r"map \(24, 16, 20, 12\) for labels"): prototype_loss([blank], [lbl[:2]])

# %% [markdown]
# ## CT and MR of one patient
# Queries are foreground voxels of the MR that have a CT voxel within `positive_mm`; each pair serves in both
# directions. Negatives of an MR voxel are CT voxels and the other way round, because within a modality it is easy to
# tell places apart by their grey values. The coarse map works likewise, with `coarse_positive_mm`, 8 mm along the body,
# and no strangers. A pair of boxes that shares no voxel gives 0.
#
# Quirks: negatives from MR to CT have fine plus coarse similarity and those from CT to MR, as all keys, fine alone
# (*c*); rows from CT to MR on the coarse map take their negatives from the table of the other direction (*b*).

# %%
#| export
CROSS_Z_MM = 8.0 # coarse keys of registered pairs are at most so far away along the body [mm]

def cross_rows(
    views: tuple[Maps, Maps], # CT and MR, in one world
    head: str, # 'fine' or 'coarse'
    foreground: torch.Tensor, # (Z, Y, X) bool, network voxels of the MR that show the patient
    cfg: LossConfig, # distances and numbers
    rng: torch.Generator, # CPU generator of this pair
) -> tuple[Rows, Rows] | None: # from MR to CT, from CT to MR; None: no voxel has a key
    "Choose queries, keys and negatives between two modalities"
    origin, is_fine = middle(views), head == "fine"
    ct, mr = (places(v, head, origin) for v in views)
    shown = places(replace(views[1], valid=foreground), head, origin).valid
    if is_fine:
        flat, far, inside = nearest(mr.points, ct)
        hit = shown & mr.valid & inside & (far < cfg.positive_mm)
    else:
        far, flat = torch.cdist(mr.points, ct.points).masked_fill(~ct.valid, math.inf).min(1)
        up = (mr.points - ct.points[flat])[:, 2].abs()
        hit = shown & mr.valid & (far < cfg.coarse_positive_mm) & (up < CROSS_Z_MM)
    query = torch.nonzero(hit)[:, 0]
    if is_fine: query = some(query, cfg.queries, rng)
    if not len(query): return None
    key = flat[query]
    return (_one_way(views, head, 1, (query, mr), (key, ct), cfg, rng),
            _one_way(views, head, 0, (key, ct), (query, mr), cfg, rng))

def _cross_similarity(views: tuple[Maps, Maps], head: str, at: int, query: torch.Tensor) -> torch.Tensor:
    "(r, p) of voxels of view `at` with all those of the other one"
    return getattr(views[at], head).flatten(1)[:, query].T @ getattr(views[1 - at], head).flatten(1)

@torch.no_grad()
def _coarse_similarity(views: tuple[Maps, Maps], at: int, query: torch.Tensor) -> torch.Tensor:
    "Likewise of the coarse vectors, interpolated to the fine grids"
    return coarse_scores(coarse_at(views[at], query), views[1 - at])

@torch.no_grad()
def _one_way(views: tuple[Maps, Maps], head: str, at: int, own: tuple[torch.Tensor, Places],
             other: tuple[torch.Tensor, Places], cfg: LossConfig, rng: torch.Generator) -> Rows:
    "Rows whose queries are in view `at`; `own` and `other`: voxels of the pairs, and all places, in both views"
    (query, here), (key, there) = own, other
    score = _cross_similarity(views, head, at, query)
    if head == "fine": score = score + _coarse_similarity(views, at, query)
    ignore = cfg.ignore_mm if head == "fine" else cfg.coarse_ignore_mm
    hard, count = (cfg.hard, cfg.negatives) if head == "fine" else (cfg.coarse_hard, cfg.coarse_negatives)
    forget_near(score, here.points[query], there, ignore, cfg.reference_quirks)
    if not cfg.reference_quirks: score.scatter_(1, key[:, None], -math.inf)
    return Rows(query, key, *hard_then_diverse(score, hard, count, rng))

def cross_modal_loss(
    views: tuple[Maps, Maps], # CT and MR, in one world
    foreground: torch.Tensor, # (Z, Y, X) bool, network voxels of the MR that show the patient
    cfg: LossConfig = LossConfig(), # distances and numbers
    *,
    rng: torch.Generator, # CPU generator of this pair
    rows: Sequence[tuple[Rows, Rows] | None] | None = None, # of the fine and of the coarse map; None: drawn
) -> tuple[torch.Tensor, torch.Tensor]: # two scalars: fine and coarse
    "Contrast between two modalities, in both directions"
    if rows is None: rows = [cross_rows(views, head, foreground, cfg, rng) for head in ("fine", "coarse")]
    out = []
    for head, both in zip(("fine", "coarse"), rows):
        if both is None:
            out.append(sum(getattr(v, head).sum()*0 for v in views))
            continue
        tables = [_cross_similarity(views, head, at, r.query) for at, r in zip((1, 0), both)] # MR to CT, CT to MR
        against: list[torch.Tensor | None] = [None, None]
        if cfg.reference_quirks and head == "fine": # (c)
            against[0] = tables[0] + _coarse_similarity(views, 1, both[0].query)
        losses = [contrast(t, r, cfg.tau, a) for t, r, a in zip(tables, both, against)]
        if cfg.reference_quirks and head == "coarse": # (b)
            keys = tables[1].gather(1, both[1].key[:, None])
            swapped = tables[0].gather(1, both[0].negative).masked_fill(~both[0].use, -math.inf)
            logits = torch.cat([keys, swapped], 1)/cfg.tau
            losses[1] = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        n = torch.tensor([len(r.query) for r in both])
        out.append((losses[0]*n[0] + losses[1]*n[1])/n.sum())
    return out[0], out[1]

# %% [markdown]
# Boxes of different sizes, scales and turns around one place, with vectors that are waves through space as on page 32:

# %%
waves = torch.from_numpy(rng_for(0, "waves").normal(size=(3, 10)))/12

def box(spacing, offset, size, mixed=0.0, key=0):
    matrix = torch.diag(torch.tensor([-1.0, -1, 1], dtype=torch.float64)) @ torch.eye(3, dtype=torch.float64).flip(0)
    maps = {h: torch.zeros(1, *(-(-n//s) for n, s in zip(size, STRIDES[h]))) for h in ("fine", "coarse")}
    empty = Maps(**maps, matrix=matrix*spacing, offset=torch.tensor(offset, dtype=torch.float64))
    def at(head):
        p = places(empty, head, torch.zeros(3, dtype=torch.float64)).points.double() @ waves # (n, 10)
        noise = torch.from_numpy(rng_for(key, head).normal(size=(len(p), 20)))
        v = F.normalize((1 - mixed)*torch.cat([p.sin(), p.cos()], 1) + mixed*noise, dim=1)
        return v.T.reshape(20, *getattr(empty, head).shape[1:]).float()
    return Maps(at("fine"), at("coarse"), empty.matrix, empty.offset)

def boxes(mixed): return box(1.8, (40., 40, 0), (20, 48, 64), mixed), box(2.2, (38., 45, -5), (24, 40, 40), mixed, 1)

front = torch.zeros(24, 40, 40, dtype=torch.bool)
front[:, 10:] = True
cfg = LossConfig(tau=0.1, queries=30, hard=300, negatives=100)
[[round(v.item(), 2) for v in cross_modal_loss(boxes(m), front, cfg, rng=torch_rng_for(0))] for m in (0.0, 0.5, 1.0)]

# %%
series = [cross_modal_loss(boxes(m), front, cfg, rng=torch_rng_for(0)) for m in (0.0, 0.5, 1.0)]
assert series[0][0] < series[1][0] < series[2][0] and series[0][1] < series[2][1]
there, back = cross_rows(boxes(0), "fine", front, cfg, torch_rng_for(1))
assert torch.equal(there.query, back.key) and torch.equal(there.key, back.query) and len(there.query) == 30
assert (there.query//20 % 20).min() >= 5
points = [places(v, "fine", middle(boxes(0))).points for v in boxes(0)]
assert float((points[1][there.query] - points[0][there.key]).norm(dim=1).max()) < cfg.positive_mm
assert (points[0][there.negative] - points[1][there.query][:, None]).norm(dim=2)[there.use].min() >= cfg.ignore_mm
assert cross_rows(boxes(0), "fine", front & False, cfg, torch_rng_for(1)) is None
none = cross_modal_loss(boxes(0), front & False, cfg, rng=torch_rng_for(1))
assert none[0] == none[1] == 0

# %% [markdown]
# Each quirk changes its own direction and nothing else:

# %%
quirks = cfg.model_copy(update={"reference_quirks": True})
fixed = [cross_rows(boxes(0.5), h, front, cfg, torch_rng_for(2)) for h in ("fine", "coarse")]
plain, odd = (cross_modal_loss(boxes(0.5), front, c, rng=None, rows=fixed) for c in (cfg, quirks))
[round(v.item(), 3) for v in (*plain, *odd)]

# %%
assert not close(plain[0], odd[0], 1e-4) and not close(plain[1], odd[1], 1e-4)
