# %% [markdown]
# # Fine and coarse contrast
#
# > The same place in two views shall have the same vector, and no other place may come near.
#
# Two views of one scan are cut, turned, enlarged and recoloured at random. A voxel of one view has a *key* in the
# other, the voxel at the same millimetres; everything further away is a *negative*. InfoNCE asks the query to find its
# key among the negatives:
# $$L = -\log\frac{e^{\langle q,k\rangle/\tau}}{e^{\langle q,k\rangle/\tau}+\sum_n e^{\langle q,n\rangle/\tau}}.$$
# The published code carries a volume of coordinates through every resampling and measures all distances between 2,000
# voxels of one view and all 36,864 of the other, of which at most 100 rows survive. A view is an affine map, so a key
# is one matrix product and a rounding. Choosing the queries first and measuring only their distances is the same loss
# for a thirtieth of the time. Views and their maps are made on [page 30b](30b_embed_views.ipynb), vectors on
# [page 31](31_embed_model.ipynb); the losses of SAM++ and Cross-SAM are on [page 32a](32a_embed_losses_more.ipynb).

# %%
#| default_exp embed.loss

# %%
#| export
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field

from medvol_nb.config import Config
from medvol_nb.core import DataError
from medvol_nb.embed.coarse import coarse_similarity, coarse_vectors
from medvol_nb.embed.model import STRIDES

# %%
import numpy as np
from matplotlib import pyplot as plt

from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.core import close, raises, rng_for

# %% [markdown]
# ## Settings
# Distances are in millimetres of the scan. The numbers are the published ones. `reference_quirks` brings back what the
# published code does and its papers do not say; each place below says what it is.

# %%
#| export
class LossConfig(Config):
    "Which voxels are compared with which"
    tau: float = Field(0.5, gt=0) # temperature of fine and coarse contrast
    positive_mm: float = Field(2.0, gt=0) # a key lies at most so far from its query [mm]
    ignore_mm: float = Field(20.0, ge=0) # fine negatives lie at least so far from the query [mm]
    queries: int = Field(100, ge=1) # fine queries from each view
    hard: int = Field(2000, ge=1) # most similar fine negatives, of which are drawn:
    negatives: int = Field(500, ge=1) # fine negatives of a query
    coarse_positive_mm: float = Field(25.0, gt=0) # as above, for the coarse map [mm]
    coarse_z_mm: float = Field(6.0, gt=0) # coarse keys are also at most so far away along the body [mm]
    coarse_ignore_mm: float = Field(5.0, ge=0) # coarse negatives lie at least so far from the query [mm]
    coarse_hard: int = Field(250, ge=1) # most similar coarse negatives, of which are drawn:
    coarse_negatives: int = Field(200, ge=1) # coarse negatives from the pair itself
    coarse_global: int = Field(1000, ge=0) # coarse negatives from the other pairs of the batch
    semantic_tau: float = Field(0.1, gt=0) # temperature of the prototypes
    reference_quirks: bool = False # do as the published code does, where that differs from its paper

# %% [markdown]
# ## Where feature voxels are
# With strides $s$, feature $f$ covers the network voxels $sf \dots sf + s - 1$, its centre is $sf + (s-1)/2$. A view's
# map gives world millimetres. They are counted from the middle of the pair, so that float32 has digits to spare: the
# published code keeps coordinates in half precision, which is wrong by up to 0.25 mm.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Maps:
    "Vectors of a view and where they are"
    fine: torch.Tensor # (e, z, y, x) of length 1 over e
    coarse: torch.Tensor # (e, z', y', x') likewise
    matrix: torch.Tensor # (3, 3) float64: world position of network voxel q = (z, y, x) is matrix @ q + offset [mm]
    offset: torch.Tensor # (3,) float64, RAS+ [mm]
    valid: torch.Tensor | None = None # (Z, Y, X) bool, network voxels inside the scan; None: all

@dataclass(frozen=True, eq=False)
class Places:
    "The feature voxels of a view as a list"
    shape: tuple[int, ...] # (z, y, x)
    stride: tuple[int, ...] # (z, y, x) [network voxel]
    matrix: torch.Tensor # (3, 3) float64
    offset: torch.Tensor # (3,) float64, from the middle of the pair [mm]
    points: torch.Tensor # (n, 3) float32, from the middle of the pair [mm]
    valid: torch.Tensor # (n,) bool, at least half inside the scan

def places(
    view: Maps, # maps of a view
    head: str, # 'fine' or 'coarse'
    origin: torch.Tensor, # (3,) float64, middle of the pair [mm]
) -> Places: # feature voxels in the order of the flattened map
    "List the feature voxels of a view"
    shape, stride = tuple(getattr(view, head).shape[1:]), STRIDES[head]
    device, offset = view.matrix.device, view.offset - origin
    axes = [(torch.arange(n, device=device) + 0.5)*s - 0.5 for n, s in zip(shape, stride)]
    idx = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).to(view.matrix) # (n, 3)
    valid = torch.ones(len(idx), dtype=torch.bool, device=device)
    if view.valid is not None:
        size = tuple(min(s, n) for s, n in zip(stride, view.valid.shape))
        share = F.avg_pool3d(view.valid[None, None].float(), size, stride, ceil_mode=True)
        valid = (share >= 0.5).reshape(-1)
    return Places(shape, stride, view.matrix, offset, (idx @ view.matrix.T + offset).float(), valid)

def middle(
    views: Sequence[Maps], # of a pair
) -> torch.Tensor: # (3,) float64 [mm]
    "Mean position of the views' corners"
    ends = [v.offset + v.matrix @ v.matrix.new_tensor([n*s for n, s in zip(v.fine.shape[1:], STRIDES["fine"])])/2
            for v in views]
    return torch.stack(ends).mean(0)

def nearest(
    points: torch.Tensor, # (n, 3) float32, from the middle of the pair [mm]
    to: Places, # feature voxels of a view
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: # voxel (n,), its distance (n,) [mm], inside the view (n,) bool
    "Feature voxel nearest to each point: through the inverse map and rounded, without a table of distances"
    q = (points.to(to.offset) - to.offset) @ torch.linalg.inv(to.matrix).T # (n, 3) network voxels
    stride, shape = q.new_tensor(to.stride), q.new_tensor(to.shape)
    f = (q + 0.5)/stride - 0.5
    near = torch.minimum(f.round().clamp(min=0), shape - 1) # (n, 3)
    flat = ((near[:, 0]*to.shape[1] + near[:, 1])*to.shape[2] + near[:, 2]).long()
    inside = ((f >= -0.5) & (f <= shape - 0.5)).all(1) & to.valid[flat]
    return flat, (points - to.points[flat]).norm(dim=1), inside

# %% [markdown]
# Two views of a scan, made by hand: different places, scales and turns. Each arrow leads from a voxel of the first to
# its key in the second; the key is never further than half the diagonal of a voxel.

# %%
def turn(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])

def lps(spacing, degrees=0.0): return np.diag([-1.0, -1, 1]) @ np.eye(3)[::-1] @ turn(degrees)*spacing

def toy_view(matrix, offset, size=(16, 64, 64), emb=8, key="toy", valid=None, dtype=torch.float32):
    draw = lambda *s: F.normalize(torch.from_numpy(rng_for(0, key, *s).normal(size=s)).to(dtype), dim=0)
    f, c = ([-(-n//s) for n, s in zip(size, STRIDES[h])] for h in ("fine", "coarse"))
    offset = torch.tensor(offset, dtype=torch.float64)
    return Maps(draw(emb, *f), draw(emb, *c), torch.from_numpy(matrix), offset, valid)

one, two = toy_view(lps(1.7), (60., 60, 0), key=1), toy_view(lps(2.3, 8), (70., 75, -2), key=2)
a, b = (places(v, "fine", middle((one, two))) for v in (one, two))
flat, far, inside = nearest(a.points, b)
shown = torch.nonzero(inside & (a.points[:, 2].round() == a.points[len(a.points)//2, 2].round()))[::23, 0]
fig, ax = plt.subplots(figsize=(3.2, 3))
for p, colour in ((a, "C0"), (b, "C1")): ax.plot(*p.points[p.points[:, 2].abs() < 4][::5, :2].T, ",", color=colour)
ax.quiver(*a.points[shown, :2].T, *(b.points[flat[shown]] - a.points[shown])[:, :2].T, angles="xy", scale_units="xy",
          scale=1, width=0.006)
ax.set(aspect="equal", xticks=[], yticks=[], title=f"{inside.float().mean():.0%} have a key");

# %%
table = torch.cdist(a.points[::7].double(), b.points.double())
assert torch.equal(table.min(1).values.float() < 2, far[::7] < 2) and float(far[inside].max()) < 2.3*3**0.5
same = inside[::7] & (far[::7] < 2)
assert close(table.min(1).values[same], far[::7][same], 1e-4)
back, zero, _ = nearest(a.points, a)
assert torch.equal(back, torch.arange(len(back))) and float(zero.max()) < 1e-4

# %% [markdown]
# ## Rows
# A row is a query, its key and its negatives, all numbers of voxels in one *pool*: the voxels of both views behind each
# other. Mining does not need gradients; the loss then needs them only through the similarities that were chosen.
#
# Negatives are *hard, then diverse*: the most similar ones by fine plus coarse similarity, and of those a random part.
# What is too near counts as $-\infty$. (The published code multiplies by 0 instead, so that voxels that must be ignored
# come back as soon as fewer than 2,000 others have a positive score: quirk *d*.) The key is never a negative, and
# neither is what lies outside of the scan.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Rows:
    "What is compared: numbers of voxels in a pool"
    query: torch.Tensor # (r,) integer
    key: torch.Tensor # (r,) integer
    negative: torch.Tensor # (r, k) integer
    use: torch.Tensor # (r, k) bool, False: not a negative, only fills the row

def some(
    candidates: torch.Tensor, # (n,) integer
    count: int, # at most so many
    rng: torch.Generator, # CPU generator, see `torch_rng_for`
) -> torch.Tensor: # (min(n, count),) integer
    "Draw without replacement"
    return candidates[torch.randperm(len(candidates), generator=rng)[:count].to(candidates.device)]

def largest(
    score: torch.Tensor, # (r, p) any values
    count: int, # so many of each row
) -> tuple[torch.Tensor, torch.Tensor]: # (r, k) values, (r, k) integer; in no order; k = min(p, count)
    "The largest of each row; what a sample of the row shows to be too small is not looked at twice"
    r, p = score.shape
    count, step = min(p, count), 17
    sample = score[:, ::step]
    rank = int(1.5*count/step) + 32 # so many of the sample are above the bar, and nearly certainly `count` of all
    if score.device.type != "cpu" or 4*rank > sample.shape[1]: return score.topk(count, dim=1, sorted=False)
    bar = sample.kthvalue(sample.shape[1] - rank + 1, dim=1).values # (r,)
    row, at = torch.nonzero(score >= bar[:, None], as_tuple=True)
    found = torch.bincount(row, minlength=r) # (r,)
    if int(found.min()) < count: return score.topk(count, dim=1, sorted=False)
    column = torch.arange(len(row)) - (found.cumsum(0) - found)[row]
    few = score.new_full((r, int(found.max())), -math.inf)
    few[row, column], places = score[row, at], torch.zeros(few.shape, dtype=torch.long)
    places[row, column] = at
    top, pick = few.topk(count, dim=1, sorted=False)
    return top, places.gather(1, pick)

def hard_then_diverse(
    score: torch.Tensor, # (r, p) similarity; -inf: may not be drawn
    hard: int, # most similar, of which are drawn
    count: int, # so many
    rng: torch.Generator, # CPU generator
) -> tuple[torch.Tensor, torch.Tensor]: # (r, k) integer, (r, k) bool: usable; k = min(p, hard, count)
    "Draw negatives from the most similar ones"
    top, at = largest(score, hard) # (r, hard)
    usable = top > -math.inf
    chance = torch.rand(top.shape, generator=rng).to(score.device).masked_fill(~usable, -1.0)
    pick = chance.topk(min(count, top.shape[1]), dim=1, sorted=False).indices # (r, k)
    return at.gather(1, pick), usable.gather(1, pick)

def contrast(
    similarity: torch.Tensor, # (r, p) of the queries with the pool
    rows: Rows, # what is compared
    tau: float, # temperature
    against: torch.Tensor | None = None, # (r, p) similarity that negatives have; None: `similarity`
) -> torch.Tensor: # scalar
    "InfoNCE: cross-entropy with the key in front"
    key, use = rows.key[:, None], F.pad(rows.use, (1, 0), value=True) # (r, 1), (r, 1 + k)
    if against is None: chosen = similarity.gather(1, torch.cat([key, rows.negative], 1)) # (r, 1 + k)
    else: chosen = torch.cat([similarity.gather(1, key), against.gather(1, rows.negative)], 1)
    logits = chosen.masked_fill(~use, -math.inf)/tau
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

# %%
score = torch.tensor([[0.9, 0.1, 0.8, -math.inf, 0.7, 0.2]]).repeat(300, 1)
at, usable = hard_then_diverse(score, 3, 2, torch_rng_for(0, "rows"))
short, ok = hard_then_diverse(score[:1], 6, 6, torch_rng_for(0, "rows"))
torch.bincount(at.flatten(), minlength=6).tolist(), short[ok].sort().values.tolist()

# %%
assert set(at.flatten().tolist()) == {0, 2, 4} and usable.all() and int(ok.sum()) == 5
alike = torch.tensor([[0.9, 0.1, 0.1]])
pair_rows = Rows(torch.tensor([0]), torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[True, False]]))
assert close(contrast(alike, pair_rows, 0.5), math.log(1 + math.exp(-1.6)), 1e-6)

# %%
many = torch.randn(4, 60000, generator=torch_rng_for(0, "many"))
many[1, 1000:] = -math.inf # fewer than asked for are left
many[2] = many[2].sort().values # not as a sample expects it
for k in (1, 300, 2000):
    (values, at), exact = largest(many, k), many.topk(k).values
    assert torch.equal(values.sort(descending=True).values, exact) and torch.equal(many.gather(1, at), values)

# %% [markdown]
# ## The fine loss of a pair
# Queries are drawn from both views among the voxels that have a key within `positive_mm`. If there is none, although
# the views overlap, those within half a millimetre of the smallest distance are taken. Views that do not overlap only
# repel: 100 voxels of the first are their own keys, and their most similar far ones are the negatives.
#
# The coarse map takes part in the choice of negatives alone: interpolated to the fine grid and normalised again, as on
# [page 31a](31a_embed_coarse.ipynb). Voxels that are too near lie in a box around the query; nothing else is measured.

# %%
#| export
def coarse_at(
    view: Maps, # of one crop
    at: torch.Tensor, # (r,) fine voxels
) -> torch.Tensor: # (r, e) of unit length; gradients do not pass
    "Coarse vectors at some fine voxels"
    return coarse_vectors(view.coarse.detach(), view.fine.shape[1:], at)

def coarse_scores(
    vectors: torch.Tensor, # (r, e), from `coarse_at` of this or another view
    view: Maps, # whose voxels they are compared with
) -> torch.Tensor: # (r, n); gradients do not pass
    "Similarity of coarse vectors with those at the n fine voxels of a view"
    return coarse_similarity(vectors, view.coarse.detach(), view.fine.shape[1:])

def too_near(
    points: torch.Tensor, # (r, 3) float32, from the middle of the pair [mm]
    to: Places, # feature voxels of a view
    within: float, # distance [mm]
) -> tuple[torch.Tensor, torch.Tensor]: # (k,) points, (k,) feature voxels
    "Pairs of points and voxels less than `within` apart; only the box of voxels around each point is measured"
    inverse, stride = torch.linalg.inv(to.matrix), to.matrix.new_tensor(to.stride)
    f = ((points.to(to.offset) - to.offset) @ inverse.T + 0.5)/stride - 0.5 # (r, 3) feature voxels
    reach = (within*inverse.norm(dim=1)/stride).ceil().long().tolist()
    flat = torch.zeros(len(points), 1, dtype=torch.long, device=points.device)
    for axis, (n, r) in enumerate(zip(to.shape, reach)):
        count = min(2*r + 2, n)
        first = (f[:, axis].floor().long() - r).clamp(0, n - count)[:, None]
        steps = first + torch.arange(count, device=points.device) # (r, count)
        flat = (flat[:, :, None]*n + steps[:, None]).flatten(1)
    near = (points[:, None] - to.points[flat]).norm(dim=2) < within
    row, k = torch.nonzero(near, as_tuple=True)
    return row, flat[row, k]

def _keys(a: Places, b: Places, within: float) -> tuple[torch.Tensor, torch.Tensor]:
    "Voxels of `a` with a key in `b`, and the keys"
    flat, far, inside = nearest(a.points, b)
    ok = inside & a.valid
    if not ok.any(): return flat[:0], flat[:0]
    hit = ok & (far < max(within, float(far[ok].min()) + 0.5 if not (ok & (far < within)).any() else 0.0))
    at = torch.nonzero(hit)[:, 0]
    return at, flat[at]

def forget_near(
    score: torch.Tensor, # (r, n) of points with the voxels of a view, changed in place
    points: torch.Tensor, # (r, 3) float32, from the middle of the pair [mm]
    to: Places, # the view
    within: float, # distance [mm]
    quirk: bool = False, # what is too near gets the score 0, what is outside the scan stays (d)
) -> None:
    "Voxels that are too near to be negatives, or outside the scan, get the score -inf"
    score[too_near(points, to, within)] = 0 if quirk else -math.inf
    if not quirk and not to.valid.all(): score.masked_fill_(~to.valid, -math.inf)

def _fine_queries(a: Places, b: Places, cfg: LossConfig, rng: torch.Generator
                  ) -> tuple[torch.Tensor, torch.Tensor, bool]:
    "Queries, keys, and whether the views have nothing in common"
    n = len(a.points)
    (qa, ka), (qb, kb) = _keys(a, b, cfg.positive_mm), _keys(b, a, cfg.positive_mm)
    if len(qa) + len(qb):
        pa, pb = (some(torch.arange(len(q), device=q.device), cfg.queries, rng) for q in (qa, qb))
        return torch.cat([qa[pa], qb[pb] + n]), torch.cat([ka[pa] + n, kb[pb]]), False
    query = some(torch.nonzero(a.valid)[:, 0], cfg.queries, rng)
    if not len(query): raise DataError("fine loss: no voxel of the first view is inside the scan")
    return query, query, True

def _fine_table(views: tuple[Maps, Maps], cfg: LossConfig, rng: torch.Generator, rows: Rows | None
                ) -> tuple[torch.Tensor, Rows]:
    "Similarity of the queries with the pool, with its gradient, and what is compared"
    pool = torch.cat([v.fine.flatten(1) for v in views], 1) # (e, p)
    if rows is not None: return pool[:, rows.query].T @ pool, rows
    origin = middle(views)
    a, b = (places(v, "fine", origin) for v in views)
    n = len(a.points)
    query, key, apart = _fine_queries(a, b, cfg, rng)
    similarity = pool[:, query].T @ pool # (r, p)
    with torch.no_grad():
        score, of_a = similarity.clone(), query < n
        blocks = score[:, :n], score[:, n:]
        if not apart:
            vectors = torch.cat([coarse_at(views[0], query[of_a]), coarse_at(views[1], query[~of_a] - n)])
            for block, view in zip(blocks, views): block += coarse_scores(vectors, view)
        points = torch.cat([a.points, b.points])[query]
        for block, to in zip(blocks, (a, b)): forget_near(block, points, to, cfg.ignore_mm, cfg.reference_quirks)
        if not cfg.reference_quirks: score.scatter_(1, key[:, None], -math.inf)
        if apart: blocks[1].fill_(-math.inf)
        negatives = hard_then_diverse(score, cfg.negatives if apart else cfg.hard, cfg.negatives, rng)
    return similarity, Rows(query, key, *negatives)

def fine_rows(
    views: tuple[Maps, Maps], # of one scan
    cfg: LossConfig, # distances and numbers
    rng: torch.Generator, # CPU generator of this pair
) -> Rows: # numbers in the pool: voxels of the first view, then of the second
    "Choose queries, keys and negatives of the fine map"
    with torch.no_grad(): return _fine_table(views, cfg, rng, None)[1]

def fine_infonce(
    views: tuple[Maps, Maps], # of one scan
    cfg: LossConfig = LossConfig(), # distances and numbers
    *,
    rng: torch.Generator, # CPU generator of this pair
    rows: Rows | None = None, # what is compared; None: drawn
) -> torch.Tensor: # scalar
    "Fine contrast of a pair of views"
    similarity, rows = _fine_table(views, cfg, rng, rows)
    return contrast(similarity, rows, cfg.tau)

# %% [markdown]
# Vectors that are a function of the place have a low loss; random ones have $\log$ of the number of candidates, a
# little more because the negatives are hard. Ten waves through space make such a function:

# %%
waves = torch.from_numpy(rng_for(0, "waves").normal(size=(3, 10)))/12

def wave_view(matrix, offset, size=(16, 64, 64), valid=None, dtype=torch.float32):
    empty = toy_view(matrix, offset, size, valid=valid)
    def at(head):
        p = places(empty, head, torch.zeros(3, dtype=torch.float64)).points.double() @ waves # (n, 10)
        return F.normalize(torch.cat([p.sin(), p.cos()], 1), dim=1).T.reshape(20, *getattr(empty, head).shape[1:])
    return Maps(at("fine").to(dtype), at("coarse").to(dtype), empty.matrix, empty.offset, valid)

right = wave_view(lps(1.7), (60., 60, 0)), wave_view(lps(2.3, 8), (70., 75, -2))
small = LossConfig(queries=40, hard=400, negatives=100, tau=0.1)
losses = {"places": fine_infonce(right, small, rng=torch_rng_for(0, 1)).item(),
          "random": fine_infonce((one, two), small, rng=torch_rng_for(0, 1)).item(), "log 101": math.log(101)}
{k: round(v, 2) for k, v in losses.items()}

# %%
assert losses["places"] < 2 < losses["log 101"] < losses["random"]
rows = fine_rows(right, LossConfig(queries=60), torch_rng_for(0, 2))
spots = torch.cat([a.points, b.points])
assert (rows.negative != rows.key[:, None]).all() and rows.use.all()
assert float((spots[rows.query] - spots[rows.key]).norm(dim=1).max()) < 2
assert float((spots[rows.negative] - spots[rows.query][:, None]).norm(dim=2).min()) >= 20

# %% [markdown]
# Too few negatives, views apart, and air around the scan are all legal; a pair that shows nothing is not.

# %%
nearby = LossConfig(ignore_mm=130, queries=10)
few = fine_rows(right, nearby, torch_rng_for(0, 3))
assert not few.use.all() and math.isfinite(fine_infonce(right, nearby, rng=torch_rng_for(0)))
away = right[0], wave_view(lps(2.0), (900., 0, 0))
alone = fine_rows(away, small, torch_rng_for(0, 4))
assert torch.equal(alone.query, alone.key) and int(alone.negative.max()) < len(a.points)
half = torch.zeros(16, 64, 64, dtype=torch.bool)
half[:, :, :30] = True
partly = wave_view(lps(1.7), (60., 60, 0), valid=half), right[1]
rows = fine_rows(partly, small, torch_rng_for(0, 5))
column = (rows.negative % 32)[rows.negative < len(a.points)]
assert int(column.max()) < 15
with raises(DataError, match="no voxel of the first view"):
    fine_infonce((wave_view(lps(2.0), (900., 0, 0), valid=half & False), away[1]), small, rng=torch_rng_for(0))

# %% [markdown]
# ## The coarse loss of a batch
# A coarse voxel is 8×32×32 mm, so keys may be 25 mm away, but not more than 6 mm along the body. Negatives come from
# the pair (the most similar, then a random part) and from the *other pairs of the batch*, at any place: they are other
# people. Several processes exchange their coarse maps for that, so that a batch means the same on one device or four.
#
# Quirks of the published code: keys of the second view are taken up to 8 mm along the body and those of the first up to
# 6 (*e*); SAM++ draws 200 numbers below 250 and uses them as voxels, instead of as places in the list of the most
# similar (*a*), so that its "hard negatives" are the first 250 voxels of the first view.

# %%
#| export
def _coarse_keys(a: Places, b: Places, cfg: LossConfig, z_mm: float) -> tuple[torch.Tensor, torch.Tensor]:
    far = torch.cdist(a.points, b.points).masked_fill(~b.valid, math.inf) # (n, m)
    least, flat = far.min(1)
    up = (a.points - b.points[flat])[:, 2].abs()
    at = torch.nonzero(a.valid & (least < cfg.coarse_positive_mm) & (up < z_mm))[:, 0]
    return at, flat[at]

def coarse_rows(
    views: tuple[Maps, Maps], # of one scan
    cfg: LossConfig, # distances and numbers
    rng: torch.Generator, # CPU generator of this pair
    others: int = 0, # vectors of other pairs, which follow in the pool
    quirk: bool = False, # draw the negatives as SAM++ does (a)
) -> Rows: # numbers in the pool: voxels of the first view, of the second, then those of other pairs
    "Choose queries, keys and negatives of the coarse map"
    origin = middle(views)
    a, b = (places(v, "coarse", origin) for v in views)
    n = len(a.points)
    points, valid = torch.cat([a.points, b.points]), torch.cat([a.valid, b.valid]) # (p, 3), (p,)
    far = 8.0 if cfg.reference_quirks else cfg.coarse_z_mm
    (qa, ka), (qb, kb) = _coarse_keys(a, b, cfg, far), _coarse_keys(b, a, cfg, cfg.coarse_z_mm)
    query, key = torch.cat([qa, qb + n]), torch.cat([ka + n, kb])
    apart = not len(query)
    if apart: query = key = torch.nonzero(valid)[:, 0]
    if not len(query): raise DataError("coarse loss: no voxel of the pair is inside the scan")
    with torch.no_grad():
        pool = torch.cat([v.coarse.flatten(1) for v in views], 1) # (e, p)
        score = pool[:, query].T @ pool # (r, p)
        for block, to in ((score[:, :n], a), (score[:, n:], b)):
            forget_near(block, points[query], to, cfg.coarse_ignore_mm, cfg.reference_quirks)
        if not cfg.reference_quirks: score.scatter_(1, key[:, None], -math.inf)
        hard, count = (cfg.coarse_negatives + 1,)*2 if apart else (cfg.coarse_hard, cfg.coarse_negatives)
        if quirk and not apart:
            negative = torch.stack([torch.randperm(min(hard, score.shape[1]), generator=rng)[:count] for _ in query])
            negative, use = negative.to(query.device), torch.ones_like(negative, dtype=torch.bool)
        else: negative, use = hard_then_diverse(score, hard, count, rng)
        if others and cfg.coarse_global:
            more = torch.rand(len(query), others, generator=rng).topk(min(cfg.coarse_global, others), 1, sorted=False)
            more = more.indices.to(query.device) + 2*n # (r, g)
            negative, use = torch.cat([negative, more], 1), torch.cat([use, torch.ones_like(more, dtype=torch.bool)], 1)
    return Rows(query, key, negative, use)

def coarse_infonce(
    pairs: Sequence[tuple[Maps, Maps]], # pairs of views
    cfg: LossConfig = LossConfig(), # distances and numbers
    *,
    rngs: Sequence[torch.Generator], # CPU generators, one for each pair
    rows: Sequence[Rows] | None = None, # what is compared; None: drawn
    everyone: Sequence[torch.Tensor] | None = None, # (e, m) vectors of each pair of the global batch; None: of `pairs`
    places_of: Sequence[int] | None = None, # places of `pairs` in `everyone`; None: 0, 1, 2, ...
    quirk: bool = False, # draw the negatives as SAM++ does (a)
) -> torch.Tensor: # scalar, mean over pairs
    "Coarse contrast of a batch of pairs"
    own = [torch.cat([v.coarse.flatten(1) for v in pair], 1) for pair in pairs] # (e, m) each
    everyone, out = own if everyone is None else everyone, []
    for i, (pair, rng) in enumerate(zip(pairs, rngs, strict=True)):
        me = i if places_of is None else places_of[i]
        rest = [v for k, v in enumerate(everyone) if k != me]
        others = sum(v.shape[1] for v in rest) if cfg.coarse_global else 0
        r = coarse_rows(pair, cfg, rng, others, quirk) if rows is None else rows[i]
        pool = torch.cat([own[i], *rest], 1) if others else own[i] # (e, p)
        out.append(contrast(pool[:, r.query].T @ pool, r, cfg.tau))
    return torch.stack(out).mean()

# %%
wide = LossConfig(tau=0.1, coarse_global=50)
batch = [right, (wave_view(lps(2.0), (500., 60, 0)), wave_view(lps(2.1, -5), (510., 55, 1)))]
noise = [(one, two), (toy_view(lps(2.0), (0., 0, 0), key=5), toy_view(lps(2.2), (3., 0, 0), key=6))]
draws = lambda: [torch_rng_for(0, k) for k in range(2)]
{k: round(coarse_infonce(v, wide, rngs=draws()).item(), 2) for k, v in (("places", batch), ("random", noise))}

# %%
rows = [coarse_rows(p, wide, r, 128) for p, r in zip(batch, draws())]
spots = torch.cat([places(v, "coarse", middle(right)).points for v in right])
step = (spots[rows[0].query] - spots[rows[0].key]).abs()
assert float(step.norm(dim=1).max()) < 25 and float(step[:, 2].max()) < 6
assert (rows[0].negative != rows[0].key[:, None])[rows[0].use].all() and rows[0].negative.max() >= len(spots)
published = LossConfig(reference_quirks=True, coarse_hard=20, coarse_negatives=9)
quirky = coarse_rows(right, published, draws()[0], quirk=True)
assert int(quirky.negative.max()) < 20

# %% [markdown]
# ## Gradients
# The derivative of both losses, against finite differences in float64, with the rows held fixed:

# %%
tight = LossConfig(queries=3, hard=20, negatives=5, tau=0.3, ignore_mm=6, positive_mm=4)
where = ((lps(1.7), (10., 10, 0)), (lps(2.0, 8), (12., 12, -2)))
views = tuple(toy_view(m, o, (8, 16, 16), emb=3, key=k, dtype=torch.float64) for k, (m, o) in enumerate(where))
chosen = fine_rows(views, tight, torch_rng_for(0, "g")), coarse_rows(views, tight, torch_rng_for(0, "g"))

def total(*maps):
    pair = tuple(Maps(f, c, v.matrix, v.offset) for v, f, c in zip(views, maps[::2], maps[1::2]))
    return fine_infonce(pair, tight, rng=None, rows=chosen[0]) + coarse_infonce([pair], tight, rngs=[None],
                                                                               rows=[chosen[1]])

inputs = [t.clone().requires_grad_() for v in views for t in (v.fine, v.coarse)]
assert torch.autograd.gradcheck(total, inputs)
round(total(*inputs).item(), 3)
