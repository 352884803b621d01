# %% [markdown]
# # Matching points
#
# > Point at anatomy in one scan, find it in another: with a score, a way back, and a word on how far to trust it.
#
# [The search](34a_embed_search.ipynb) finds the most similar voxel, whatever it is worth. Here it becomes a match.
# Scores are means of cosines, in [-1, 1]. (The published thresholds 1.3 and 1.5 were sums of three and two of them, and
# the published code, which averages, kept nothing.) What separates right from wrong better than any threshold is the
# way back: a match from which the best match is the point itself is *mutual*. That check is the default. Points go in
# and come out as world positions in mm; whatever lies between, orientation, voxel size, network and feature grids, is
# the business of the grids that an embedding carries.

# %%
#| default_exp embed.match

# %%
#| export
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medvol_nb.checkpoints import device_for
from medvol_nb.core import DataError, read_json, write_json
from medvol_nb.embed.cycle import fixed_points
from medvol_nb.embed.search import (BATCH, FEW, Query, Side, between_voxels, descriptors, make_query, make_side,
                                    native_voxels, plane_scores, search, search_pruned, voxel_scores)
from medvol_nb.embed.store import Embedding, open_embedding, same_model
from medvol_nb.geometry import Volume

# %%
import time
from dataclasses import replace

from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises, rng_for
from medvol_nb.embed.store import position_embedding
from medvol_nb.geometry import affine_from

# %% [markdown]
# ## What a match says about itself
# Every point gets a place, also where there is no good one; `status` says which.
#
# | status | meaning |
# |---|---|
# | ok | nothing speaks against it |
# | not_mutual | the way back ends more than `cycle_mm` from the point |
# | low_score | below `min_score`, if one was given |
# | background | the point is not in the body |
# | outside | the point is not in the scan; its nearest voxel was matched |
# | flat | all neighbours of the best voxel are as similar: the place says nothing |
# | invalid | no vector of the point, or none in the other scan, is finite and has a length; the place is the centre |
# | translation | [fixed points](34b_embed_cycle.ipynb): too few or in one plane, their mean shift was used |
# | nn_fallback | fixed points: none, the nearest neighbour was used |

# %%
#| export
@dataclass(eq=False)
class Matches:
    "Points of one scan and their places in another"
    points: np.ndarray # (n, 3) float64, RAS+ [mm]
    matched: np.ndarray # (n, 3) float64 in the other scan, RAS+ [mm]
    score: np.ndarray # (n) float64, mean cosine in [-1, 1]
    status: np.ndarray # (n) str
    second: np.ndarray | None = None # (n) float64, score of the next peak
    others: np.ndarray | None = None # (n, k - 1, 3) float64, places of the next peaks [mm]
    cycle_mm: np.ndarray | None = None # (n) float64, how far from the point the way back ends [mm]
    confidence: np.ndarray | None = None # (n) float64, probability of being right, see `Calibration`
    residual: np.ndarray | None = None # (n) float64, misfit of the fixed points around it [mm]; -1 without

    def __len__(self) -> int: return len(self.points)
    @property
    def ok(self) -> np.ndarray: return self.status == "ok" # (n) bool

    def rows(self) -> list[dict[str, Any]]: # one dict of plain values a point
        "As a table"
        out = []
        for i in range(len(self)):
            row: dict[str, Any] = {k: round(float(v), 4) for k, v in zip(("x", "y", "z"), self.points[i])}
            row |= {k: round(float(v), 4) for k, v in zip(("matched_x", "matched_y", "matched_z"), self.matched[i])}
            row |= {"score": round(float(self.score[i]), 6)}
            for name in ("second", "cycle_mm", "confidence", "residual"):
                if (v := getattr(self, name)) is not None: row[name] = round(float(v[i]), 6)
            out.append({**row, "status": str(self.status[i])})
        return out

# %% [markdown]
# ## A score that is a probability
# A cosine of 0.8 means little by itself: it depends on the network and on how alike the two scans are. Where the right
# places are known for some points, a logistic regression on score, lead over the second peak and length of the way back
# turns them into the probability that a match is within a given distance.

# %%
#| export
@dataclass(frozen=True)
class Calibration:
    "From what a match says about itself to the probability that it is right"
    weights: tuple[float, ...] # of the constant, the score, the lead over the second and the way back
    within_mm: float # what counted as right [mm]
    model: str = "" # digest of the network it was made for

    def __call__(
        self,
        m: Matches, # with second peaks and way back
    ) -> np.ndarray: # (n) probability
        "Probability of being right"
        return 1/(1 + np.exp(-np.clip(_evidence(m) @ np.array(self.weights), -30, 30)))

    def save(
        self,
        path: str | os.PathLike, # .json file
    ) -> Path: # `path`
        "Write to a file"
        return write_json(path, {"calibration": 1, "weights": self.weights, "within_mm": self.within_mm,
                                 "model": self.model})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike, # .json file written by `save`
    ) -> "Calibration": # equal to what was saved
        "Read from a file"
        d = read_json(path)
        if not isinstance(d, dict) or d.get("calibration") != 1 or len(d.get("weights", ())) != 4:
            raise DataError(f"{path}: not a calibration of match scores")
        return cls(tuple(float(w) for w in d["weights"]), float(d["within_mm"]), str(d.get("model", "")))

def _evidence(m: Matches) -> np.ndarray:
    "Columns of the regression (n, 4)"
    if m.second is None or m.cycle_mm is None:
        raise DataError("calibration: needs second peaks and the way back; match with mode='mutual' and top_k=2")
    return np.stack([np.ones(len(m)), m.score, m.score - m.second, np.minimum(m.cycle_mm, 60)/10], 1)

def calibrate(
    m: Matches, # with second peaks and way back
    wanted: np.ndarray, # (n, 3) the right places, RAS+ [mm]
    within_mm: float = 10.0, # what counts as right [mm]
    *,
    ridge: float = 1e-2, # keeps weights finite where right and wrong separate perfectly
    model: str = "", # digest of the network, kept with the result
) -> Calibration: # to be given to `Matcher`
    "Fit the probability that a match is right"
    x, y = _evidence(m), np.linalg.norm(m.matched - wanted, axis=1) <= within_mm
    if len(x) < 8 or y.all() or not y.any():
        raise DataError(f"calibrate: needs 8 matches or more, right and wrong ones; got {len(x)}, {int(y.sum())} right")
    centre, width = x[:, 1:].mean(0), np.maximum(x[:, 1:].std(0), 1e-6)
    z, w = np.column_stack([np.ones(len(x)), (x[:, 1:] - centre)/width]), np.zeros(4)
    for _ in range(50): # Newton's method
        p = 1/(1 + np.exp(-np.clip(z @ w, -30, 30)))
        slope = z.T @ (p - y) + ridge*len(x)*np.array([0, *w[1:]])
        bend = z.T @ (z*(p*(1 - p))[:, None]) + ridge*len(x)*np.diag([1e-6, 1, 1, 1])
        w = w - (step := np.linalg.solve(bend, slope))
        if np.abs(step).max() < 1e-8: break
    slopes = w[1:]/width
    return Calibration((float(w[0] - slopes @ centre), *map(float, slopes)), within_mm, model)

# %% [markdown]
# ## The matcher
# It holds both scans, so matching again is cheap, and it refuses scans that were embedded by different networks. Which
# heads count: all that both have, the coarse one as much as each of the others, as published. Networks that were
# trained for minutes find more places with half the weight (experiment E1 of the benchmarks).

# %%
#| export
class Matcher:
    "Transfers points from one scan to another"
    def __init__(
        self,
        emb_q: Embedding | str | os.PathLike, # scan the points are in, or its store
        emb_k: Embedding | str | os.PathLike, # scan they are looked for in, or its store
        *,
        heads: Sequence[str] | None = None, # heads that count; default: all that both have
        coarse_weight: float = 1.0, # of the coarse cosine in the mean; others have 1
        restrict_to_body: bool = True, # matches lie in the body, where an embedding knows it
        calibration: Calibration | None = None, # gives matches a probability
        device: str = "cpu", # where to compute
    ):
        self.emb_q, self.emb_k = (e if isinstance(e, Embedding) else open_embedding(e) for e in (emb_q, emb_k))
        same_model(self.emb_k.model, self.emb_q.model, str(self.emb_k.info.get("path", "second embedding")))
        both = [h for h in self.emb_q.maps if h in self.emb_k.maps]
        self.heads = tuple(both if heads is None else heads)
        if "fine" not in self.heads or not set(self.heads) <= set(both) or len(set(self.heads)) < len(self.heads):
            raise DataError(f"heads: 'fine' and others of {both} are needed, each once, got {list(self.heads)}")
        if any(self.emb_q.maps[h].shape[0] != self.emb_k.maps[h].shape[0] for h in self.heads):
            raise DataError("heads: vectors of the two scans differ in length")
        if not 0 < coarse_weight < np.inf:
            raise DataError(f"coarse_weight: must be > 0, got {coarse_weight!r}. To do without, name the other heads")
        if calibration is not None and calibration.model: same_model(self.emb_q.model, calibration.model, "calibration")
        self.restrict, self.calibration, self.device = restrict_to_body, calibration, device_for(device)
        order = tuple(h for h in both if h in self.heads) # descriptors follow the order of maps
        self._q, self._k = (make_side(e, order, self.device, restrict_to_body, coarse_weight)
                            for e in (self.emb_q, self.emb_k))

    def side(
        self,
        which: Literal["q", "k"], # 'q': where points are, 'k': where they are looked for
    ) -> Side: # ready to be searched
        "One of the two scans"
        return self._q if which == "q" else self._k

    def _batches(self, at: np.ndarray, back: bool, between: bool) -> Iterator[tuple[slice, Query, torch.Tensor]]:
        "Queries in batches: which points, their query, usable or not"
        source, target = (self._k, self._q) if back else (self._q, self._k)
        for s in range(0, len(at), BATCH):
            part = torch.from_numpy(np.ascontiguousarray(at[s:s + BATCH], np.float64)).to(self.device)
            fine, coarse, good = descriptors(source, part, between)
            yield slice(s, s + BATCH), make_query(target, fine, coarse), good

    def nearest(
        self,
        points_mm: np.ndarray, # (n, 3) RAS+ [mm]
        back: bool = False, # False: from q to k, True: from k to q
        *,
        top_k: int = 1, # peaks wanted
        radius_mm: float = 24.0, # peaks are at least that far apart [mm]
        refine: Literal["parabola", "native", "voxel"] = "parabola", # where exactly
        between: bool = True, # interpolate the vectors of points between voxels
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: # (n, k, 3) [mm], (n, k) scores, (n) flat, (n) usable
        "Places of points in the other scan, without judging them"
        source, target = (self._k, self._q) if back else (self._q, self._k)
        at = source.emb.fine.to_index(points_mm)
        n = len(at)
        places, scores = np.zeros((n, top_k, 3)), np.full((n, top_k), -1.0)
        flat, usable = np.zeros(n, bool), np.zeros(n, bool)
        middle = target.emb.fine.to_world((np.array(target.shape) - 1)/2)
        for s, q, good in self._batches(at, back, between):
            few = len(q.fine) <= FEW and q.coarse is not None and refine != "native"
            if few: where, score, _ = search_pruned(target, q)
            elif refine == "native":
                voxel, value, node = native_voxels(target, q)
                where, score = node[:, None], voxel_scores(target, q, node[:, None])
            else: where, score = search(target, q)
            taken = where[:, :1]
            for k in range(top_k):
                if k: where, score = search(target, q, 1, taken, radius_mm)
                fine, level = between_voxels(target, q, where[:, 0], score[:, 0])
                if k == 0: flat[s] = level.cpu().numpy()
                if refine == "native" and k == 0:
                    place, value = target.emb.native.to_world(voxel.numpy()), value.numpy()
                else:
                    at_end = fine if refine != "voxel" else where[:, 0].double()
                    place, value = target.emb.fine.to_world(at_end.cpu().numpy()), score[:, 0].cpu().numpy()
                found = np.isfinite(value)
                places[s, k] = np.where(found[:, None], place, places[s, 0] if k else middle)
                scores[s, k] = np.where(found, np.clip(value, -1, 1), -1.0)
                if k: taken = torch.cat([taken, where], 1)
                else: there = found
            usable[s] = good.cpu().numpy() & there
            places[s][~usable[s]], scores[s][~usable[s]] = middle, -1.0
        return places, scores, flat, usable

    def match(
        self,
        points_mm: np.ndarray, # (n, 3) RAS+ [mm]
        mode: Literal["nn", "mutual", "fixed_point"] = "mutual", # nearest; with the way back; from points around
        *,
        top_k: int = 1, # peaks wanted; from 2 on, `second` is known
        cycle_mm: float = 12.0, # 'mutual': longest way back that counts as one's own [mm]
        min_score: float | None = None, # mean cosine below which a match is flagged
        refine: Literal["parabola", "native", "voxel"] = "parabola", # where exactly; 'native': as the reference
        between: bool = True, # interpolate the vectors of points between voxels; False: as the reference
        radius_mm: float = 24.0, # peaks are at least that far apart [mm]
        cube: int = 1, # 'fixed_point': voxels around the point on each side
        reach_mm: float = 100.0, # 'fixed_point': farthest stable point that is used [mm]
    ) -> Matches: # one place a point, always finite
        "Transfer points"
        pts = checked_points(points_mm)
        if mode not in ("nn", "mutual", "fixed_point"):
            raise DataError(f"mode: must be nn, mutual or fixed_point, got {mode!r}")
        if refine not in ("parabola", "native", "voxel"):
            raise DataError(f"refine: must be parabola, native or voxel, got {refine!r}")
        if top_k < 1: raise DataError(f"top_k: must be >= 1, got {top_k}")
        if self.calibration is not None and mode != "mutual":
            raise DataError(f"calibration: needs the way back; match with mode='mutual', got {mode!r}")
        if mode == "fixed_point": return self._fixed(pts, cube, reach_mm, min_score)
        if self.calibration is not None: top_k = max(top_k, 2)
        options = {"refine": refine, "between": between}
        places, scores, flat, usable = self.nearest(pts, top_k=top_k, radius_mm=radius_mm, **options)
        m = Matches(pts, places[:, 0], scores[:, 0].astype(np.float64), self.status(pts, flat, usable))
        if top_k > 1: m.second, m.others = scores[:, 1].astype(np.float64), places[:, 1:]
        if mode == "mutual":
            home = self.nearest(m.matched, True, **options)[0][:, 0]
            m.cycle_mm = np.linalg.norm(home - pts, axis=1)
            m.status[m.ok & (m.cycle_mm > cycle_mm)] = "not_mutual"
        if min_score is not None: m.status[m.ok & (m.score < min_score)] = "low_score"
        if self.calibration is not None: m.confidence = self.calibration(m)
        return m

    def _fixed(self, pts: np.ndarray, cube: int, reach_mm: float, min_score: float | None) -> Matches:
        "Matches from the stable points around each point"
        places, scores, flat, usable = self.nearest(pts)
        status = self.status(pts, flat, usable)
        found = fixed_points(self._q, self._k, pts, cube=cube, reach_mm=reach_mm, min_score=min_score)
        lost = (found.kind == "nn_fallback") | (status == "invalid")
        matched = np.where(lost[:, None], places[:, 0], found.matched)
        score = np.where(lost, scores[:, 0], found.score)
        status = np.where((status == "ok") | ((status == "flat") & ~lost), found.kind, status)
        m = Matches(pts, matched, score, status, residual=np.where(lost, -1.0, found.residual))
        if min_score is not None: m.status[m.ok & (m.score < min_score)] = "low_score"
        return m

    def status(
        self,
        pts: np.ndarray, # (n, 3) RAS+ [mm]
        flat: np.ndarray, # (n) bool, nothing around the best voxel is lower
        usable: np.ndarray, # (n) bool, vectors of the points are finite and have a length
    ) -> np.ndarray: # (n) str
        "What speaks against the points themselves"
        out = np.full(len(pts), "ok", "U16")
        emb = self.emb_q
        out[flat] = "flat"
        if self.restrict and emb.body is not None and len(pts):
            at = np.rint(emb.fine.to_index(pts)).astype(int)
            at = np.clip(at, 0, np.array(emb.fine.shape) - 1)
            out[~np.asarray(emb.body, bool)[tuple(at.T)]] = "background"
        out[~emb.native.contains(pts)] = "outside"
        out[~usable] = "invalid"
        return out

    def similarity_map(
        self,
        point_mm: np.ndarray, # (3,) RAS+ [mm]
        back: bool = False, # False: from q to k, True: from k to q
    ) -> Volume: # zyx float32, mean cosine on the fine grid; -1 where no match may be
        "Score of every voxel of the other scan for one point"
        source, target = (self._k, self._q) if back else (self._q, self._k)
        at = source.emb.fine.to_index(checked_points(np.reshape(point_mm, (1, 3))))
        _, q, _ = next(self._batches(at, back, True))
        out = torch.cat([plane_scores(target, q, z) for z in range(target.shape[0])], 1).reshape(-1)
        out = torch.where(target.allowed.reshape(-1), torch.nan_to_num(out, nan=-1.0), -1.0).clamp(-1, 1)
        return Volume(out.reshape(target.shape).cpu().numpy(), target.emb.fine.affine, "zyx")

def checked_points(
    points_mm: Any, # (n, 3) numbers [mm]
) -> np.ndarray: # (n, 3) float64
    "Points as an array, or an error"
    try: pts = np.asarray(points_mm, np.float64)
    except (TypeError, ValueError): pts = np.zeros(0)
    if pts.ndim != 2 or pts.shape[1] != 3: raise DataError(f"points: needs (n, 3) numbers [mm], got shape {pts.shape}")
    bad = int((~np.isfinite(pts)).any(1).sum())
    if bad: raise DataError(f"points: {bad} hold NaN or infinity")
    return pts

# %% [markdown]
# A phantom and the same rotated by 12 degrees, with vectors of position: 200 points, their matches, and the map of
# scores for one of them. Cross: where it should be.

# %%
body = phantoms.abdomen((56, 40, 48), seed=1)
scan = Volume(body.img, affine_from((5.0, 5.0, 6.0), origin=(-40.0, 10.0, 5.0)))
turn = np.deg2rad(12)
rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
shift = np.array([14.0, -9.0, 6.0])
def there(p): return p @ rotation.T + shift
def back(p): return (p - shift) @ rotation
moved = Volume(np.zeros((60, 44, 50), np.uint8), affine_from((5.0, 5.0, 6.0), origin=(-60.0, 20.0, 8.0)))
first, second = position_embedding(scan), position_embedding(moved, back)
pair = Matcher(first, second)
pts = first.fine.to_world(rng_for(1, "points").uniform(0.2, 0.8, (200, 3))*(np.array(first.fine.shape) - 1))
start = time.perf_counter()
result = pair.match(pts, top_k=2)
spent = time.perf_counter() - start
error = np.linalg.norm(result.matched - there(pts), axis=1)
f"{len(pts)} points, {1e3*spent/len(pts):.1f} ms each; error {error.mean():.2f} mm, {result.ok.mean():.0%} mutual"

# %%
heat = pair.similarity_map(pts[0])
want = np.rint(second.fine.to_index(there(pts[:1]))[0]).astype(int)
got = np.rint(second.fine.to_index(result.matched[:1])[0]).astype(int)
marks = np.zeros(heat.shape, np.uint8)
marks[got[0], got[1] - 1:got[1] + 2, got[2]] = marks[got[0], got[1], got[2] - 1:got[2] + 2] = 1
plot.montage([heat.data[got[0]]], lbls=[marks[got[0]]], titles=[f"score {result.score[0]:.2f}"], width=3)

# %%
inner = second.native.contains(there(pts))
assert error[inner].max() < 1.0 and result.ok[inner].all() and (result.second[inner] < result.score[inner]).all()
assert np.abs(got - want).max() <= 1 and close(heat.data.max(), result.score[0], 0.01)
one = pair.match(pts[:1])
assert close(one.matched[0], result.matched[0], 1e-3)
assert set(result.rows()[0]) >= {"x", "matched_x", "score", "second", "cycle_mm", "status"}

# %% [markdown]
# From the stable points around each point, which costs four searches for 27 voxels:

# %%
steady = pair.match(pts[:12], "fixed_point")
off = np.linalg.norm(steady.matched - there(pts[:12]), axis=1)
f"error {off.mean():.2f} mm, misfit {steady.residual.mean():.2f} mm"

# %%
assert off.max() < 2 and steady.ok.all()

# %% [markdown]
# Points that have no match still get a place, and a status.

# %%
hostile = pair.match(np.array([[1e5, 0, 0], *pts[:1]]))
broken = replace(first, maps={**first.maps, "fine": np.full_like(first.maps["fine"], np.nan)})
even = replace(first, maps={h: np.full(m.shape, 64**-0.5, np.float32) for h, m in first.maps.items()})
[str(s) for s in hostile.status], *(str(Matcher(e, e).match(pts[:1]).status[0]) for e in (broken, even))

# %%
assert all(np.isfinite(v).all() for v in (hostile.matched, Matcher(broken, first).match(pts[:1]).matched))
with raises(DataError, match="Vectors of different networks"): Matcher(first, replace(second, model="other"))
with raises(DataError, match="1 hold NaN"): pair.match([[0, 0, np.nan]])
with raises(DataError, match=r"needs \(n, 3\) numbers"): pair.match([1.0, 2.0, 3.0])

# %% [markdown]
# Calibration, on a pair where it matters: the waves of the second scan carry noise that grows from left to right. Of
# the matches that are said to be right with a probability of 0.8 to 1, about that share is.

# %%
noise = rng_for(2, "noise").standard_normal(second.maps["fine"].shape)*np.linspace(0, 0.6, second.fine.shape[2])
noisy = second.maps["fine"] + noise.astype(np.float32)
worse = replace(second, maps={**second.maps, "fine": noisy/np.linalg.norm(noisy, axis=0)})
blurred = Matcher(first, worse).match(pts, top_k=2)
cal = calibrate(blurred, there(pts), within_mm=6.0)
said, right = cal(blurred), np.linalg.norm(blurred.matched - there(pts), axis=1) <= 6
bins = [(said >= lo) & (said < hi) for lo, hi in ((0, 0.2), (0.2, 0.8), (0.8, 1.001))]
[(f"{said[m].mean():.2f} said", f"{right[m].mean():.2f} right") for m in bins if m.sum() > 5]

# %%
assert np.mean((said - right)**2) < np.mean((right.mean() - right)**2)
with raises(DataError, match="right and wrong ones"): calibrate(result, there(pts), 1e6)
