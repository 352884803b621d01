"""Experiments E1 and E2: does an embedding learn anatomy within a quarter of an hour of one core?

Training: the two thorax crops, which are of one person (`thorax-SEED`; `wild-SEED` goes on from there with random
grey value curves), or these and five scans more (`more-SEED`). Test: the abdomen CT, which no training sees, and a
known warp of it (8 degrees, 8 % larger, smooth elastic of 6 mm rms) with changed contrast: gamma 0.85 and noise of 4
HU (E1), or a grey value curve that is not monotone, as between CT and MR (E2). 384 points of the body in the warped
scan are looked for in the whole original. Settings were compared on warps of the lung CT and of a head-and-neck CT
(`VALIDATION`), never on the abdomen.

    python -m benchmarks._embed_e1 train runs/thorax-0 runs/thorax-1 runs/wild-0
    python -m benchmarks._embed_e1 table runs/* --json rows.json --write
"""
import argparse
import datetime
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.transform import Rotation

from benchmarks.__main__ import put
from benchmarks.common import DATA, Row, machine
from benchmarks.common import table as markdown
from medvol_nb.body import body_mask
from medvol_nb.core import ConfigError, rng_for, write_json
from medvol_nb.embed.config import EmbeddingConfig, preset, tiny
from medvol_nb.embed.data import NetGrid, net_volume, network_volume
from medvol_nb.embed.intensity import AUGMENTS, Augment
from medvol_nb.embed.match import Matcher
from medvol_nb.embed.model import STRIDES, AnatNet, build_model, load_embedder
from medvol_nb.embed.search import descriptors, make_query, make_side, search_pruned
from medvol_nb.embed.store import Embedding, embed_volume
from medvol_nb.embed.train import Folders, make_batches, train_network
from medvol_nb.geometry import Volume, resample
from medvol_nb.volume import read_volume

MUTUAL_MM = 12.0  # a match is mutual if the way back ends so near to its beginning
STEPS = {"thorax": 1000, "more": 300, "wild": 1000}  # of one training; `wild` goes on after `thorax`
WEIGHTS = {"fine": 1.0, "coarse": 0.5}  # of the cosines; with 1.0 2.7 points fewer are within 10 mm on VALIDATION
EXPERIMENTS = ("E1", "E2")
KINDS = {"thorax": "two thorax crops", "wild": "two thorax crops, then random grey value curves", "more": "seven scans"}
TEST = "datalists_supervoxels/totalseg/abdomen_3mm_ct.nii.gz"
THORAX = [f"anatomical_embedding/thorax_two_crops/crop_{n}_ct.nii.gz" for n in "ab"]
MORE = ["anatomical_embedding/lung_two_timepoints/followup_warped_to_baseline_ct.nii.gz",
        *(f"datalists_supervoxels/openkbp/imagesTr/kbp_{n}.nii.gz" for n in ("017", "060", "083", "099"))]
VALIDATION = ["anatomical_embedding/lung_two_timepoints/followup_warped_to_baseline_ct.nii.gz",
              "datalists_supervoxels/openkbp/imagesTr/kbp_060.nii.gz"]  # of the settings
PATCH = "MIND-SSC, 27 voxels 6 mm apart"
ABOUT = """384 points of the body of a warped abdomen CT are looked for in the original (122 x 101 x 112 voxels of 3
mm, searched at 2 mm): turned by 8 degrees, 8 % larger, smooth elastic of 6 mm rms, noise of 4 HU; E1 with
gamma 0.85, E2 with a curve of grey values as between CT and MR. No training saw this scan, and no setting
of the network was chosen by it; the noise and the distance of the 27 voxels are such that the hand-made
rows come out near what was measured for them before. Trainings have 1000 steps, `more` 300, `wild` 1000 more
after those of `thorax`. The coarse cosine counts half as much as the fine one (chosen on two other scans).
*mutual*: share of the matches whose way back ends within 12 mm of its beginning, then the errors of these alone.
*E7*: share of the voxels that an exact search of single points leaves out. *CPU s*: processor time of the
training on one core, in bfloat16."""


# ---- training

def settings(seed: int, steps: int, kind: str = "thorax") -> EmbeddingConfig:
    "Small network; both crops are of one patient, so there are no strangers in a batch"
    if kind not in KINDS: raise ConfigError(f"{kind}: runs are called {', '.join(f'{k}-SEED' for k in KINDS)}")
    cfg = tiny(preset("sam_NIHLN"), steps)
    how = AUGMENTS["aggressive"] if kind == "wild" else Augment(log_gamma=(-0.3, 0.3))
    return cfg.model_copy(update={
        "loss": cfg.loss.model_copy(update={"coarse_global": 0}),
        "views": cfg.views.model_copy(update={"augment": how}),
        "fit": cfg.fit.model_copy(update={"seed": seed, "device": "cpu", "precision": "bf16", "tensorboard": False,
                                          "checkpoint_every": 50, "keep": 1})})


def train(data: Path, run: Path, steps: int) -> None:
    "One training; its processor seconds go into seconds.json"
    kind, seed = kind_of(run), int(run.name.rsplit("-", 1)[1])
    cfg, began, before = settings(seed, steps, kind), time.process_time(), 0.0
    if kind == "wild": # curves from the first step on teach less: first the anatomy, then that contrast says little
        first = run.with_name(f"thorax-{seed}")
        if not (first/"seconds.json").exists(): raise ConfigError(f"{run}: goes on from {first}, train that first")
        cfg = cfg.model_copy(update={"start_from": str(first)})
        before = json.loads((first/"seconds.json").read_text())["processor"]
    folder = run.parent/("scans_more" if kind == "more" else "scans")
    folder.mkdir(parents=True, exist_ok=True)
    for scan in THORAX + MORE*(kind == "more"):
        if not (folder/Path(scan).name).exists(): shutil.copy(data/scan, folder)
    def tell(event, s):
        if event == "step" and s.step % 50 == 0:
            print(run.name, s.step, f"{time.process_time() - began:.0f} s",
                  {k: round(v, 3) for k, v in s.metrics.items()}, flush=True)
    train_network(make_batches(Folders((str(folder),)), cfg), cfg, out_dir=run, on_exists="overwrite",
                  callbacks=[tell])
    write_json(run/"seconds.json", {"processor": before + time.process_time() - began, "steps": steps}, "overwrite")


# ---- the test pair

@dataclass
class Pair:
    "A scan, its warp, and points with their true places"
    fixed: np.ndarray  # (z, y, x) float32, the original: searched
    moved: np.ndarray  # (z, y, x) float32, the warp: asked
    grid: NetGrid  # of both
    voxels: np.ndarray  # (n, 3) voxels of the warp
    points: np.ndarray  # (n, 3) the same, RAS+ [mm]
    truth: np.ndarray  # (n, 3) their places in the original, RAS+ [mm]


def remap(unit: np.ndarray) -> np.ndarray:
    "A grey value curve that is not monotone, as between CT and MR"
    return np.interp(unit, [0, 0.05, 0.22, 0.25, 0.27, 0.3, 0.5, 1], [0, 0.1, 0.55, 0.9, 0.7, 0.35, 0.15, 0.05])


def test_pair(data: Path, seed: int = 0, mr_like: bool = False, count: int = 384, scan: str = TEST) -> Pair:
    "Known warp of a scan"
    vol = read_volume(data/scan)
    fixed, grid = network_volume(vol, 2.0, "ct")
    rng, size = rng_for(seed, "warp"), np.array(grid.shape)
    centre = grid.to_world((size - 1)/2)
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(np.deg2rad(8)*axis/np.linalg.norm(axis)).as_matrix()*1.08
    knots = rng.normal(size=(3, *np.maximum(4, np.ceil(size*2/60).astype(int) + 3)))
    bend = np.stack([ndimage.zoom(k, size/k.shape, order=3, grid_mode=True, mode="nearest") for k in knots])
    bend *= 6/np.sqrt((bend**2).sum(0).mean())
    idx = np.indices(grid.shape).reshape(3, -1).T
    there = (grid.to_world(idx) - centre) @ turn.T + centre + bend.reshape(3, -1).T
    moved = ndimage.map_coordinates(fixed, grid.to_index(there).T, order=1, mode="constant", cval=-50)
    unit = ((moved.reshape(grid.shape) + 50)/255).clip(0, 1)
    unit = remap(unit) if mr_like else unit**0.85
    moved = (unit*255 - 50 + rng.normal(0, 0.25, unit.shape)).astype(np.float32)
    body = resample(net_volume(Volume(body_mask(vol, "ct").mask.astype(np.uint8), vol.affine, vol.axes)), 2.0,
                    order=0).data > 0
    body = ndimage.map_coordinates(body.astype(np.uint8), grid.to_index(there).T, order=0).reshape(grid.shape) > 0
    place = grid.to_index(there).reshape(*grid.shape, 3)
    inside = ((place >= 4) & (place <= size - 5)).all(-1) & body
    edge = np.zeros(grid.shape, bool)
    edge[5:-5, 5:-5, 5:-5] = True
    candidates = np.argwhere(inside & edge)
    voxels = candidates[rng.choice(len(candidates), count, replace=False)]
    flat = np.ravel_multi_index(voxels.T, grid.shape)
    return Pair(fixed, moved, grid, voxels, grid.to_world(voxels), there[flat])


# ---- descriptors: each asks one scan at voxels and searches the other

def peak(scores: torch.Tensor, shape: tuple) -> np.ndarray:
    "(n, 3) best place of each row of (n, z*y*x), with a parabola through its neighbours"
    at = scores.argmax(1)
    idx = torch.stack(torch.unravel_index(at, shape), 1)
    out = idx.double().numpy()
    for a, step in enumerate((shape[1]*shape[2], shape[2], 1)):
        ok = (idx[:, a] > 0) & (idx[:, a] < shape[a] - 1)
        low, mid, high = (scores.gather(1, (at + d*ok*step)[:, None])[:, 0].double() for d in (-1, 0, 1))
        bend = (2*mid - low - high).clamp(min=1e-12)
        out[:, a] += torch.where(ok, ((high - low)/(2*bend)).clamp(-0.5, 0.5), 0.0).numpy()
    return out


class Vectors:
    "Fine, or fine and coarse, vectors of a network"
    def __init__(self, net: AnatNet, heads: tuple[str, ...] = ("fine", "coarse")):
        self.net, self.heads = net.eval(), heads

    @torch.no_grad()
    def prepare(self, img: np.ndarray, grid: NetGrid) -> dict:
        out = self.net(torch.from_numpy(img)[None, None])
        fine = out["fine"]
        z, y, x = fine.shape[2:]
        times = tuple(c/f for c, f in zip(STRIDES["coarse"], STRIDES["fine"]))
        coarse = F.interpolate(out["coarse"], scale_factor=times, mode="trilinear")[:, :, :z, :y, :x]
        coarse = F.normalize(coarse, dim=1)
        return {"maps": [{"fine": fine, "coarse": coarse}[h][0] for h in self.heads],
                "grid": grid.feature(STRIDES["fine"])}

    def find(self, asked: dict, points: np.ndarray, searched: dict) -> np.ndarray:
        at, shape = asked["grid"].to_index(points), asked["grid"].shape
        norm = torch.from_numpy(2*(at + 0.5)/np.array(shape) - 1).float().flip(-1)[None, None, None]
        out = []
        for part in torch.arange(len(points)).split(64):
            score = 0
            for head, a, b in zip(self.heads, asked["maps"], searched["maps"]):
                q = F.grid_sample(a[None], norm[:, :, :, part], padding_mode="border", align_corners=False)[0, :, 0, 0]
                score = score + WEIGHTS[head]*F.normalize(q, dim=0).T @ b.flatten(1)
            out.append(peak(score, searched["grid"].shape))
        return searched["grid"].to_world(np.concatenate(out))


class Patches:
    "Descriptors that are channels at voxels around a point; less is better: sum of squared differences"
    dilations, centred, reach = (1,), False, 1

    def channels(self, img: np.ndarray) -> list[torch.Tensor]: raise NotImplementedError

    @torch.no_grad()
    def prepare(self, img: np.ndarray, grid: NetGrid) -> dict:
        maps, sums, squares = self.channels(img), 0, 0
        for m, d in zip(maps, self.dilations):
            ones = torch.ones(1, len(m), *[2*self.reach + 1]*3)
            sums, squares = sums + self.summed(m, ones, d), squares + self.summed(m**2, ones, d)
        return {"maps": maps, "grid": grid, "sums": sums, "squares": squares}

    def summed(self, m: torch.Tensor, weights: torch.Tensor, dilation: int) -> torch.Tensor:
        "(n, z, y, x) weighted sums around each voxel; edges are repeated"
        return F.conv3d(F.pad(m[None], [self.reach*dilation]*6, mode="replicate"), weights, dilation=dilation)[0]

    @torch.no_grad()
    def find(self, asked: dict, points: np.ndarray, searched: dict) -> np.ndarray:
        grid, out = searched["grid"], []
        at = np.round(asked["grid"].to_index(points)).astype(int).clip(0, np.array(asked["grid"].shape) - 1)
        for part in np.array_split(at, -(-len(at)//48)):
            out.append(peak(self.scores(asked, part, searched), grid.shape))
        return grid.to_world(np.concatenate(out))

    def scores(self, asked: dict, at: np.ndarray, searched: dict) -> torch.Tensor:
        "(n, z*y*x), up to what is the same for all voxels"
        dots, own, n, r = 0, 0, 0, self.reach
        for a, b, d in zip(asked["maps"], searched["maps"], self.dilations):
            big = F.pad(a[None], [r*d]*6, mode="replicate")[0]
            offsets = np.stack(np.meshgrid(*[np.arange(-r, r + 1)*d]*3, indexing="ij"), -1)
            where = torch.from_numpy(at[:, None, None, None] + offsets + r*d)
            q = big[:, where[..., 0], where[..., 1], where[..., 2]].movedim(0, 1)  # (n, c, k, k, k)
            dots, own, n = dots + self.summed(b, q, d), own + q.flatten(1).sum(1), n + q[0].numel()
        sums, squares = searched["sums"], searched["squares"]
        if not self.centred: return dots.mul_(2).sub_(squares).flatten(1)
        dots.addcmul_(sums, own[:, None, None, None], value=-1/n)
        return dots.mul_((squares - sums**2/n).clamp(min=n).rsqrt()).flatten(1)


class GreyPatch(Patches):
    "54 grey values: 3x3x3 at 6 mm, and 3x3x3 of the smoothed scan at 12 mm; normalised cross-correlation"
    dilations, centred = (3, 6), True

    def channels(self, img):
        img = img + 50
        return [torch.from_numpy(a)[None] for a in (img, ndimage.gaussian_filter(img, 1.0))]


def mind_ssc(img: np.ndarray) -> torch.Tensor:
    "(12, z, y, x): self-similarity of pairs of the six neighbours two voxels apart (Heinrich et al., MICCAI 2013)"
    x = F.pad(torch.from_numpy(img)[None, None], [2]*6, mode="replicate")[0, 0]
    six = [(0, 0, -2), (0, 0, 2), (0, -2, 0), (0, 2, 0), (-2, 0, 0), (2, 0, 0)]
    n = img.shape
    moved = [x[2 + a:2 + a + n[0], 2 + b:2 + b + n[1], 2 + c:2 + c + n[2]] for a, b, c in six]
    pairs = [(i, j) for i in range(6) for j in range(i) if sum((p - q)**2 for p, q in zip(six[i], six[j])) == 8]
    d = torch.stack([F.avg_pool3d(F.pad((moved[i] - moved[j])[None, None]**2, [1]*6, mode="replicate"), 3, 1)[0, 0]
                     for i, j in pairs])
    d = d - d.min(0).values
    v = d.mean(0)
    return torch.exp(-d/v.clamp(v.mean()*1e-3, v.mean()*1e3))


class Mind(Patches):
    "MIND-SSC at one voxel (12), or at 27 that are `apart` voxels from each other (324)"
    def __init__(self, reach: int, apart: int = 3): self.reach, self.dilations = reach, (apart,)
    def channels(self, img): return [mind_ssc(img)]


# ---- the table

def numbers(far: np.ndarray) -> dict:
    if not len(far): return {"mean": None, "median": None, "within_10": None, "p90": None}
    return {"mean": float(far.mean()), "median": float(np.median(far)), "within_10": float((far <= 10).mean()),
            "p90": float(np.percentile(far, 90))}


def measure(pair: Pair, how) -> dict:
    "Errors of all matches, and of the mutual ones"
    if how is None: return {**numbers(np.linalg.norm(pair.points - pair.truth, axis=1)), "kept": 1.0}
    moved, fixed = how.prepare(pair.moved, pair.grid), how.prepare(pair.fixed, pair.grid)
    found = how.find(moved, pair.points, fixed)
    back = how.find(fixed, found, moved)
    far = np.linalg.norm(found - pair.truth, axis=1)
    mutual = np.linalg.norm(back - pair.points, axis=1) < MUTUAL_MM
    return {**numbers(far), "kept": float(mutual.mean()), **{f"mutual_{k}": v for k, v in numbers(far[mutual]).items()}}


def show(name: str, r: dict) -> None: print(f"{name:44s}", *(f"{c:>7s}" for c in cells(r)), flush=True)


def pruned(pair: Pair, net: AnatNet, count: int = 20) -> float:
    "Share of voxels that an exact search of single points leaves out (E7)"
    sides = []
    for img in (pair.moved, pair.fixed):
        with torch.no_grad(): out = net(torch.from_numpy(img)[None, None])
        maps = {h: out[h][0].numpy() for h in ("fine", "coarse")}
        sides.append(make_side(Embedding(maps, pair.grid, pair.grid, "e1"), ("fine", "coarse"), torch.device("cpu"),
                               coarse_weight=WEIGHTS["coarse"]))
    at = torch.from_numpy(pair.grid.feature(STRIDES["fine"]).to_index(pair.points[:count]))
    fine, coarse, _ = descriptors(sides[0], at)
    return search_pruned(sides[1], make_query(sides[1], fine, coarse))[2]


def between_crops(data: Path, run: Path, count: int = 384) -> float:
    "Median error of points that one thorax crop shows and the other, too, where they are at the same place [voxel]"
    net, cfg = load_embedder(run, "cpu")
    a, b = (embed_volume(net, data/s, config=cfg, device="cpu") for s in THORAX)
    points = a.fine.to_world(np.argwhere(a.body))
    at = np.rint(b.fine.to_index(points)).astype(int)
    inside = ((at >= 0) & (at < b.fine.shape)).all(1)
    inside[inside] = b.body[tuple(at[inside].T)]
    points = points[inside]
    points = points[rng_for(0, "crops").choice(len(points), count, replace=False)]
    found = Matcher(a, b, coarse_weight=WEIGHTS["coarse"]).match(points, "nn").matched
    return float(np.median(np.linalg.norm(found - points, axis=1)))/cfg.spacing


HAND_MADE = {"identity": lambda: None, PATCH: lambda: Mind(1), "grey patch, NCC": GreyPatch,
             "MIND-SSC, 1 voxel": lambda: Mind(0), "MIND-SSC, 27 voxels 8 mm apart": lambda: Mind(1, 4)}


def kind_of(run: Path) -> str: return run.name.rsplit("-", 1)[0]


def table(data: Path, runs: list[Path], path: Path | None = None) -> list[dict]:
    "Both experiments: what is made by hand, random weights, trained runs; rows that `path` has are not measured again"
    out = json.loads(path.read_text()) if path is not None and path.exists() else []
    done = {(r["experiment"], r["row"]) for r in out}
    for title in EXPERIMENTS:
        pair = test_pair(data, 0, title == "E2")
        rows = dict(HAND_MADE)
        for heads in (("fine",), ("fine", "coarse")):
            end = ", fine only" if len(heads) == 1 else ""
            rows[f"random weights{end}"] = lambda h=heads: Vectors(build_model(settings(0, 1).model, 0), h)
            rows |= {f"{run.name}{end}": lambda r=run, h=heads: Vectors(load_embedder(r, "cpu")[0], h) for run in runs}
        for name, make in rows.items():
            if (title, name) in done: continue
            out.append({"experiment": title, "row": name, **measure(pair, make())})
            show(f"{title} {name}", out[-1])
            if path is not None: write_json(path, out, "overwrite")
        for run in runs:
            row = next(r for r in out if (r["experiment"], r["row"]) == (title, run.name))
            if "pruned" not in row: row["pruned"] = pruned(pair, load_embedder(run, "cpu")[0])
            if title == "E1" and "crops" not in row: row["crops"] = between_crops(data, run)
    return out


# ---- what is asked for, and the section of RESULTS.md

def mean_of(rows: list[dict], experiment: str, kind: str, end: str = "") -> dict:
    "Means over the seeds of a kind of training"
    own = [r for r in rows if r["experiment"] == experiment and re.fullmatch(rf"{kind}-\d+{end}", r["row"])]
    keys = [k for k in (own or [{}])[0] if k not in ("experiment", "row") and all(r.get(k) is not None for r in own)]
    return {"seeds": len(own), **{k: float(np.mean([r[k] for r in own])) for k in keys}}


def judged(rows: list[dict]) -> list[Row]:
    "The bars of E1 and E2"
    of = {(r["experiment"], r["row"]): r for r in rows}
    out, best = [], min((of["E1", n] for n in list(HAND_MADE)[1:] if ("E1", n) in of), key=lambda r: r["mean"])
    patch, chance = of["E1", PATCH], of["E1", "random weights"]
    for kind in KINDS:
        r = mean_of(rows, "E1", kind)
        if not r["seeds"] or kind == "wild": continue
        def add(name, what, ours, reference, unit, bar=1.0, note="", less=True, kind=kind, n=r["seeds"]):
            out.append(Row(f"embed_e1.{kind}_{name}", f"E1, {KINDS[kind]}, seeds: {n}; {what}", ours, reference, unit,
                           reference/ours if less else ours/reference, bar=bar, note=note))
        more = "more is better: ratio = ours / reference"
        add("mean", f"mean error; reference: {best['row']}", r["mean"], best["mean"], "mm", round(1/0.65, 3))
        add("random", "mean error; reference: random weights", r["mean"], chance["mean"], "mm", 4.0)
        add("p90", f"90 % of the errors are below; reference: {PATCH}", r["p90"], patch["p90"], "mm")
        add("share", f"within 10 mm; reference: {PATCH}, less 3 points", 100*r["within_10"],
            100*patch["within_10"] - 3, "%", note=more, less=False)
        add("goal", f"within 10 mm; reference: {PATCH}", 100*r["within_10"], 100*patch["within_10"], "%", note=more,
            less=False)
        add("mutual", "mutual matches within 10 mm; reference: 85 asked", 100*r["mutual_within_10"], 85.0, "%",
            note=f"{more}; {PATCH}: {100*patch['mutual_within_10']:.1f}", less=False)
        add("crops", "median error from one thorax crop to the other, which is where it learned; reference: 2 asked",
            r["crops"], 2.0, "network voxel")
        add("kept", "matches that are mutual; reference: 65 asked", 100*r["kept"], 65.0, "%",
            note=f"{more}; {PATCH}: {100*patch['kept']:.1f}", less=False)
    plain, wild = mean_of(rows, "E2", "thorax"), mean_of(rows, "E2", "wild")
    if plain["seeds"] and wild["seeds"]:
        a, b = 100*wild["within_10"], 100*plain["within_10"] + 10
        out.append(Row("embed_e1.wild_share", f"E2, {KINDS['wild']}, seeds: {wild['seeds']}; within 10 mm; reference: "
                       "without curves, plus 10 points", a, b, "%", a/b, bar=1.0, note="more is better: ratio = ours / "
                       f"reference; {PATCH}: {100*of['E2', PATCH]['within_10']:.1f}"))
    return out


def cells(r: dict) -> list[str]:
    f = lambda k, n=1, s=1: "" if r.get(k) is None else f"{r[k]*s:.{n}f}"
    return [f("mean"), f("median"), f("within_10", 1, 100), f("p90"), f("kept", 1, 100), f("mutual_mean"),
            f("mutual_within_10", 1, 100), f("mutual_p90"), f("pruned", 1, 100), f("seconds", 0)]


def section(rows: list[dict]) -> str:
    "Section of RESULTS.md"
    head = ["", "row", "mean mm", "median", "<= 10 mm %", "p90", "mutual %", "mean", "<= 10 mm %", "p90", "E7 %",
            "CPU s"]
    lines = [head, ["---"]*len(head)]
    for title in EXPERIMENTS:
        mine = [r for r in rows if r["experiment"] == title]
        for r in mine: lines.append([title, r["row"], *cells(r)])
        for kind in KINDS:
            for end in ("", ", fine only"):
                r = mean_of(rows, title, kind, end)
                if r["seeds"] > 1: lines.append([title, f"**{kind}, mean of {r['seeds']} seeds{end}**", *cells(r)])
    about = "\n".join(f"* {k}: {v}" for k, v in machine().items())
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (f"## embed_e1\n\n* date: {datetime.date.today().isoformat()}\n{about}\n\n{ABOUT}\n\n"
            f"{markdown(judged(rows), markdown=True)}\n\n{text}\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["train", "table"])
    p.add_argument("runs", nargs="*", type=Path, help="folders KIND-SEED, such as thorax-0")
    p.add_argument("--data", type=Path, default=DATA)
    p.add_argument("--steps", type=int, help="default: 1000, more 300")
    p.add_argument("--json", type=Path, help="rows so far; those of it are not measured again")
    p.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.what == "train":
        for run in a.runs: train(a.data, run, a.steps or STEPS.get(kind_of(run), 1))
        return
    rows = table(a.data, a.runs, a.json)
    for r in rows:
        if (spent := next((run/"seconds.json" for run in a.runs if run.name == r["row"]), None)) is not None:
            r["seconds"] = json.loads(spent.read_text())["processor"]
    if a.json: write_json(a.json, rows, "overwrite")
    print(markdown(judged(rows)))
    if a.write: put("embed_e1", section(rows))


if __name__ == "__main__": main()
