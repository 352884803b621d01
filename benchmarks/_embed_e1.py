"""Experiments E1 and E2: does an embedding learn anatomy within a quarter of an hour of one core?

Training scans: the two thorax crops. Test: the lung CT, which no training sees, and a known warp of it (8 degrees,
8 % larger, smooth elastic of 6 mm rms) with changed contrast: gamma 0.85 and noise of 20 HU (E1), or a grey value
curve that is not monotone, as between CT and MR (E2). Points of the body in the warped scan are looked for in the
whole original.

    python -m benchmarks._embed_e1 train --seed 0 --steps 700 --out /tmp/e1/seed0 [--wild]
    python -m benchmarks._embed_e1 table /tmp/e1/seed0 [more runs ...] [--json table.json]
"""
import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medvol_nb.body import body_mask
from medvol_nb.core import rng_for, write_json
from medvol_nb.embed.config import EmbeddingConfig, preset, tiny
from medvol_nb.embed.data import NetGrid, net_volume, network_volume
from medvol_nb.embed.intensity import AUGMENTS, Augment
from medvol_nb.embed.model import STRIDES, AnatNet, build_model, load_embedder
from medvol_nb.embed.train import Folders, make_batches, train_network
from medvol_nb.geometry import Volume, resample
from medvol_nb.volume import read_volume

ROOT = Path(__file__).resolve().parents[1]
MUTUAL_MM = 12.0  # a match is mutual if the way back ends so near to its beginning


# ---- training

def settings(seed: int, steps: int, wild: bool = False) -> EmbeddingConfig:
    "Small network; both crops are of one patient, so there are no strangers in a batch"
    cfg = tiny(preset("sam_NIHLN"), steps)
    how = AUGMENTS["aggressive"] if wild else Augment(log_gamma=(-0.3, 0.3))
    return cfg.model_copy(update={
        "loss": cfg.loss.model_copy(update={"coarse_global": 0}),
        "views": cfg.views.model_copy(update={"augment": how}),
        "fit": cfg.fit.model_copy(update={"seed": seed, "device": "cpu", "tensorboard": False,
                                          "checkpoint_every": 50, "keep": 0})})


def train(data: Path, seed: int, steps: int, out: Path, wild: bool = False) -> float:
    "One training; the seconds of processor time that it took"
    folder = out.parent/"scans"
    folder.mkdir(parents=True, exist_ok=True)
    for n in "ab":
        if not (folder/f"crop_{n}_ct.nii.gz").exists():
            shutil.copy(data/"thorax_two_crops"/f"crop_{n}_ct.nii.gz", folder)
    cfg, began = settings(seed, steps, wild), time.process_time()
    def tell(event, s):
        if event == "step" and s.step % 50 == 0:
            print(s.step, f"{time.process_time() - began:.0f} s", {k: round(v, 3) for k, v in s.metrics.items()},
                  flush=True)
    train_network(make_batches(Folders((str(folder),)), cfg), cfg, out_dir=out, callbacks=[tell])
    return time.process_time() - began


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


def test_pair(data: Path, seed: int = 0, mr_like: bool = False, count: int = 384, scan: str = "") -> Pair:
    "Known warp of a scan"
    vol = read_volume(data/(scan or "lung_two_timepoints/followup_warped_to_baseline_ct.nii.gz"))
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
    moved = (unit*255 - 50 + rng.normal(0, 1.25, unit.shape)).astype(np.float32)
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
        coarse = F.normalize(F.interpolate(out["coarse"], size=fine.shape[2:], mode="trilinear"), dim=1)
        return {"maps": [{"fine": fine, "coarse": coarse}[h][0] for h in self.heads],
                "grid": grid.feature(STRIDES["fine"])}

    def find(self, asked: dict, points: np.ndarray, searched: dict) -> np.ndarray:
        at, shape = asked["grid"].to_index(points), asked["grid"].shape
        norm = torch.from_numpy(2*(at + 0.5)/np.array(shape) - 1).float().flip(-1)[None, None, None]
        out = []
        for part in torch.arange(len(points)).split(64):
            score = 0
            for a, b in zip(asked["maps"], searched["maps"]):
                q = F.grid_sample(a[None], norm[:, :, :, part], padding_mode="border", align_corners=False)[0, :, 0, 0]
                score = score + F.normalize(q, dim=0).T @ b.flatten(1)
            out.append(peak(score, searched["grid"].shape))
        return searched["grid"].to_world(np.concatenate(out))


class Patches:
    "Descriptors that are channels at voxels around a point; less is better: sum of squared differences"
    dilations, centred = (1,), False

    def channels(self, img: np.ndarray) -> list[torch.Tensor]: raise NotImplementedError

    @torch.no_grad()
    def prepare(self, img: np.ndarray, grid: NetGrid) -> dict:
        return {"maps": self.channels(img), "grid": grid}

    def find(self, asked: dict, points: np.ndarray, searched: dict) -> np.ndarray:
        grid, out = searched["grid"], []
        at = np.round(asked["grid"].to_index(points)).astype(int).clip(0, np.array(asked["grid"].shape) - 1)
        for part in np.array_split(at, -(-len(at)//48)):
            out.append(peak(self.scores(asked, part, searched), grid.shape))
        return grid.to_world(np.concatenate(out))

    def scores(self, asked: dict, at: np.ndarray, searched: dict) -> torch.Tensor:
        dots, own, theirs, n = 0, 0, 0, 0
        sums, own_sum = 0, 0
        for a, b, d in zip(asked["maps"], searched["maps"], self.dilations):
            r = self.reach
            pad = [r*d]*6
            big, wide = F.pad(a[None], pad, mode="replicate")[0], F.pad(b[None], pad, mode="replicate")
            offsets = np.stack(np.meshgrid(*[np.arange(-r, r + 1)*d]*3, indexing="ij"), -1)
            where = torch.from_numpy(at[:, None, None, None] + offsets + r*d)
            q = big[:, where[..., 0], where[..., 1], where[..., 2]].movedim(0, 1)  # (n, c, k, k, k)
            ones = torch.ones_like(q[:1])
            dots = dots + F.conv3d(wide, q, dilation=d)[0]
            theirs = theirs + F.conv3d(wide**2, ones, dilation=d)[0]
            sums = sums + F.conv3d(wide, ones, dilation=d)[0]
            own, own_sum = own + (q**2).flatten(1).sum(1), own_sum + q.flatten(1).sum(1)
            n += q[0].numel()
        if not self.centred: return (2*dots - theirs).flatten(1)
        own_sum, own = own_sum[:, None, None, None], own[:, None, None, None]
        cov = dots - sums*own_sum/n
        scale = ((theirs - sums**2/n).clamp(min=n)*(own - own_sum**2/n).clamp(min=n)).sqrt()
        return (cov/scale).flatten(1)


class GreyPatch(Patches):
    "54 grey values: 3x3x3 at 2 mm, and 3x3x3 of the smoothed scan at 4 mm; normalised cross-correlation"
    dilations, centred, reach = (1, 2), True, 1

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
    "MIND-SSC at one voxel (12), or at 27 (324)"
    def __init__(self, reach: int): self.reach = reach
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


def crops_error(data: Path, net: AnatNet, count: int = 400) -> dict:
    "Places of the second thorax crop, looked for in the first; both cover them at the same millimetres"
    vols = [read_volume(data/f"thorax_two_crops/crop_{n}_ct.nii.gz") for n in "ab"]
    (img_a, grid_a), (img_b, grid_b) = (network_volume(v, 2.0, "ct") for v in vols)
    how = Vectors(net)
    a, b = how.prepare(img_a, grid_a), how.prepare(img_b, grid_b)
    tissue = np.argwhere(img_b > -25)
    idx = tissue[rng_for(0, "crops").permutation(len(tissue))]
    world = grid_b.to_world(idx)
    world = world[grid_a.contains(world)][:count]
    return numbers(np.linalg.norm(how.find(b, world, a) - world, axis=1))


def baselines() -> dict:
    return {"identity": None, "grey patch, NCC": GreyPatch(), "MIND-SSC, 1 voxel": Mind(0),
            "MIND-SSC, 27 voxels": Mind(1)}


def show(name: str, r: dict) -> None:
    f = lambda k, n=1, s=1: "-" if r.get(k) is None else f"{r[k]*s:.{n}f}"
    print(f"{name:44s} {f('mean'):>7s} {f('median'):>7s} {f('within_10', 1, 100):>7s} {f('p90'):>7s} | "
          f"{f('kept', 1, 100):>6s} {f('mutual_mean'):>7s} {f('mutual_within_10', 1, 100):>7s} "
          f"{f('mutual_p90'):>7s}", flush=True)


def table(data: Path, runs: list[Path], seeds: tuple[int, ...] = (0,), hand_made: bool = True) -> list[dict]:
    out = []
    for mr_like in (False, True):
        for seed in seeds:
            pair = test_pair(data, seed, mr_like)
            title = f"{'E2' if mr_like else 'E1'}, warp {seed}"
            print(f"\n{title:44s}    mean  median   <10mm     p90 |  kept    mean   <10mm     p90  (mutual)")
            rows = dict(baselines()) if hand_made else {"identity": None}
            net = build_model(settings(0, 1).model, 0)
            rows |= {"random weights, fine": Vectors(net, ("fine",)), "random weights": Vectors(net)}
            for run in runs:
                net = load_embedder(run, "cpu")[0]
                name = f"{run.parent.name}/{run.stem}" if run.is_file() else run.name
                rows |= {f"{name}, fine": Vectors(net, ("fine",)), name: Vectors(net)}
            for name, how in rows.items():
                r = measure(pair, how)
                out.append({"experiment": title, "row": name, **r})
                show(name, r)
    for run in runs:
        r = crops_error(data, load_embedder(run, "cpu")[0])
        out.append({"experiment": "thorax crops", "row": str(run), **r})
        show(f"thorax crops, {run.name}", r)
    return out


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["train", "table"])
    p.add_argument("runs", nargs="*", type=Path)
    p.add_argument("--data", type=Path, default=Path(os.environ.get("MEDVOL_DATA", ROOT/"../shared/data")))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=700)
    p.add_argument("--out", type=Path)
    p.add_argument("--wild", action="store_true")
    p.add_argument("--warps", type=int, default=1)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    data = a.data/"anatomical_embedding"
    if a.what == "train": print(f"{train(data, a.seed, a.steps, a.out, a.wild):.0f} s of processor time")
    else:
        rows = table(data, a.runs, tuple(range(a.warps)))
        if a.json: write_json(a.json, rows, "overwrite")


if __name__ == "__main__": main()
