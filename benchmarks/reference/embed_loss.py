"""Literal re-statement of the published losses (spec 03, sections 4.1 and 4.2), one step after the other.

Coordinates are volumes, distances are tables of 2,000 by all voxels, negatives are drawn row by row in a loop.
`fine_of_rows` and `coarse_of_rows` take the drawn numbers instead, check each of them against the tables, and give the
loss by explicit sums: the slow twins of `medvol_nb.embed.loss`.
"""
import math

import torch
import torch.nn.functional as F

from medvol_nb.embed.loss import LossConfig, Maps, Rows
from medvol_nb.embed.model import STRIDES


def coordinates(view: Maps, head: str) -> torch.Tensor:
    "(n, 3) float64 world position of each feature voxel, by loops over the axes"
    shape, stride = getattr(view, head).shape[1:], STRIDES[head]
    out = torch.zeros(*shape, 3, dtype=torch.float64)
    for a, (n, s) in enumerate(zip(shape, stride)):
        along = torch.tensor([sum(range(i*s, i*s + s))/s for i in range(n)], dtype=torch.float64)
        out += along.view([-1 if k == a else 1 for k in range(3)] + [1])*view.matrix[:, a]
    return (out + view.offset).reshape(-1, 3)


def coarse_at_fine(view: Maps) -> torch.Tensor:
    up = F.interpolate(view.coarse[None], size=view.fine.shape[1:], mode="trilinear", align_corners=False)[0]
    return (up/up.norm(dim=0, keepdim=True)).flatten(1)


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    "(2000, n): differences of all coordinates, squares, sum, root, as the published code has them"
    return ((a[:, None, :] - b[None, :, :])**2).sum(2).sqrt()


def fine_infonce(views: tuple[Maps, Maps], cfg: LossConfig, rng: torch.Generator, pre: int = 2000) -> torch.Tensor:
    "The fine loss of a pair of views that overlap, with all its tables"
    points = [coordinates(v, "fine").float() for v in views]
    low = torch.stack([p.min(0).values for p in points]).max(0).values
    high = torch.stack([p.max(0).values for p in points]).min(0).values
    fine = [v.fine.flatten(1) for v in views]
    coarse = [coarse_at_fine(v) for v in views]
    all_fine, all_coarse = torch.cat(fine, 1), torch.cat(coarse, 1)
    logits = []
    for a, b in ((0, 1), (1, 0)):
        inside = torch.nonzero(((points[a] >= low) & (points[a] <= high)).all(1))[:, 0]
        chosen = inside[torch.randperm(len(inside), generator=rng)[:pre]]
        across = distances(points[a][chosen], points[b])
        within = distances(points[a][chosen], points[a])
        least, key = across.min(1)
        rows = torch.nonzero(least < cfg.positive_mm)[:, 0]
        rows = rows[torch.randperm(len(rows), generator=rng)[:cfg.queries]]
        tables = [within, across] if a == 0 else [across, within]
        ignore = torch.cat(tables, 1)[rows] < cfg.ignore_mm
        query = fine[a][:, chosen[rows]].T
        with torch.no_grad():
            score = query @ all_fine + coarse[a][:, chosen[rows]].T @ all_coarse
            score = score.masked_fill(ignore, -math.inf)
            top = score.topk(cfg.hard, dim=1).indices
        for r in range(len(rows)):
            negative = top[r][torch.randperm(cfg.hard, generator=rng)[:cfg.negatives]]
            pos = (query[r]*fine[b][:, key[rows[r]]]).sum()[None]
            logits.append(torch.cat([pos, query[r] @ all_fine[:, negative]]))
    logits = torch.stack(logits)/cfg.tau
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def cross_entropy_of_rows(pool: torch.Tensor, rows: Rows, tau: float) -> torch.Tensor:
    "InfoNCE by explicit sums over (e, p) vectors"
    total = []
    for q, k, negative, use in zip(rows.query, rows.key, rows.negative, rows.use):
        pos = (pool[:, q]*pool[:, k]).sum()/tau
        neg = torch.stack([(pool[:, q]*pool[:, n]).sum()/tau for n, u in zip(negative, use) if u] or [pos - math.inf])
        total.append(torch.logsumexp(torch.cat([pos[None], neg]), 0) - pos)
    return torch.stack(total).mean()


def _check(points: list[torch.Tensor], score: torch.Tensor, rows: Rows, ignore_mm: float, hard: int) -> None:
    "Keys are the nearest voxels of the other view, negatives are among the hardest that may be used"
    n, pool = len(points[0]), torch.cat(points)
    for r, (q, k) in enumerate(zip(rows.query.tolist(), rows.key.tolist())):
        other = slice(n, None) if q < n else slice(0, n)
        far = (pool[other] - pool[q]).norm(dim=1)
        found = (pool[k] - pool[q]).norm()
        assert abs(found - far.min()) < 1e-4 and (q < n) != (k < n)
        allowed = (pool - pool[q]).norm(dim=1) >= ignore_mm - 1e-4
        allowed[k] = False
        best = score[r].masked_fill(~allowed, -math.inf).topk(min(hard, len(pool))).values[-1]
        for negative, use in zip(rows.negative[r].tolist(), rows.use[r].tolist()):
            if use and negative < len(pool): assert allowed[negative] and score[r, negative] >= best - 1e-5


def fine_of_rows(views: tuple[Maps, Maps], cfg: LossConfig, rows: Rows) -> torch.Tensor:
    points = [coordinates(v, "fine") for v in views]
    pool = torch.cat([v.fine.flatten(1) for v in views], 1)
    coarse = torch.cat([coarse_at_fine(v) for v in views], 1)
    score = pool[:, rows.query].T @ pool + coarse[:, rows.query].T @ coarse
    _check(points, score, rows, cfg.ignore_mm, cfg.hard)
    return cross_entropy_of_rows(pool, rows, cfg.tau)


def coarse_of_rows(views: tuple[Maps, Maps], cfg: LossConfig, rows: Rows, others: torch.Tensor) -> torch.Tensor:
    points = [coordinates(v, "coarse") for v in views]
    own = torch.cat([v.coarse.flatten(1) for v in views], 1)
    _check(points, own[:, rows.query].T @ own, rows, cfg.coarse_ignore_mm, cfg.coarse_hard)
    return cross_entropy_of_rows(torch.cat([own, others], 1), rows, cfg.tau)
