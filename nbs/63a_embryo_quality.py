# %% [markdown]
# # Are synthetic images any good?
#
# > Distances between sets of pictures, how much of the real variety is there, and whether pictures were copied.
#
# The usual figure for generated images, the Fréchet distance of Inception features (Heusel et al., NeurIPS 2017), was
# made for photographs. Microscopy needs features that know embryos; here the features are a parameter, and by default
# those of the [phase classifier](63b_embryo_classify.ipynb), trained on *real training videos only*. Three questions
# follow. Do both sets look as if drawn from one distribution? Which part of either set does the other reach? And the
# one that is forgotten: are the new pictures copies of training pictures? What the reference got wrong: its features
# kept one picture a batch and strung the vectors together, so that its distances are not distances; and statistics of
# one phase were taken from a cache and used for another.

# %%
#| default_exp embryo.quality

# %%
#| export
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medvol_nb import plot
from medvol_nb.checkpoints import device_for
from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, atomic, fingerprint, lock, log, progress,
                            read_csv, rng_for, write_csv)
from medvol_nb.embryo.dataset import read_frame
from medvol_nb.embryo.phases import PHASES
from medvol_nb.parallel import on_cluster, pmap

# %%
import tempfile

from PIL import Image

from medvol_nb import phantoms
from medvol_nb.core import close, raises

# %% [markdown]
# ## Pictures with a phase
# Everything below works on a list of grey pictures of which the phase, the video and the origin are known *without*
# decoding them. Pictures are decoded one at a time, scaled to the size that is asked for. A damaged file is an error
# with its name; no process-wide switch is touched. `balanced` picks a number of pictures so that no video dominates:
# round after round, one picture of each video.

# %%
#| export
@dataclass(frozen=True, eq=False)
class LabelledImages:
    "Grey pictures whose phase, video and origin are known before they are decoded"
    sources: Sequence[Any] # image files, or arrays (row, column) uint8
    phases: np.ndarray # (n) int, place in `PHASES`, -1: unknown
    videos: np.ndarray # (n) str, '' for synthetic pictures
    ids: Sequence[str] # names for tables
    synthetic: np.ndarray # (n) bool
    @staticmethod
    def of(
        sources: Sequence[Any], # image files, or arrays (row, column) uint8
        phases: Sequence[int], # place in `PHASES`, -1: unknown
        videos: Sequence[str] | None = None, # of each picture; None: synthetic pictures
        ids: Sequence[str] | None = None, # names; default: file names or numbers
    ) -> "LabelledImages": # checked
        "Put a set together"
        n, made = len(sources), videos is None
        names = ids or [str(k) if isinstance(s, np.ndarray) else Path(s).name for k, s in enumerate(sources)]
        phase, video = np.asarray(phases, np.int16).reshape(-1), np.asarray([""]*n if made else videos, str)
        if not len(phase) == len(video) == len(names) == n:
            raise DataError(f"pictures: {n} sources, {len(phase)} phases, {len(video)} videos and {len(names)} names")
        if n and not -1 <= phase.min() <= phase.max() < len(PHASES):
            raise DataError(f"pictures: phases are -1...{len(PHASES) - 1}, got {phase.min()}...{phase.max()}")
        return LabelledImages(list(sources), phase, video, list(names), np.full(n, made))
    def __len__(self) -> int: return len(self.sources)
    def at(
        self,
        chosen: np.ndarray, # (m) indices, or (n) bool
    ) -> "LabelledImages": # those
        "A part of the set"
        index = np.arange(len(self))[chosen]
        return LabelledImages([self.sources[i] for i in index], self.phases[index], self.videos[index],
                              [self.ids[i] for i in index], self.synthetic[index])
    def __add__(self, other: "LabelledImages") -> "LabelledImages":
        parts = [[getattr(s, name) for s in (self, other)] for name in ("phases", "videos", "synthetic")]
        phases, videos, synthetic = (np.concatenate(p) for p in parts)
        return LabelledImages([*self.sources, *other.sources], phases, videos, [*self.ids, *other.ids], synthetic)
    def load(
        self,
        i: int, # which picture
        size: int, # width and height [pixel]
    ) -> np.ndarray: # (size, size) uint8
        "Decode a picture and scale it"
        from PIL import Image
        source = self.sources[i]
        if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() in (".jpg", ".jpeg"):
            return read_frame(source, size)
        try:
            with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as im:
                grey = im.convert("L")
        except FileNotFoundError: raise MissingFile(f"{source} does not exist") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise FormatError(f"{source}: damaged picture ({e}). Leave it out, or make it again") from None
        return np.asarray(grey if grey.size == (size, size) else grey.resize((size, size), Image.Resampling.BILINEAR))
    @cached_property
    def identity(self) -> str: # changes when any picture does
        "Fingerprint of paths, sizes and times of files, or of the arrays themselves"
        def of(s: Any) -> Any:
            if isinstance(s, np.ndarray): return s
            stat = os.stat(s)
            return [os.path.abspath(s), stat.st_size, stat.st_mtime_ns]
        return fingerprint([of(s) for s in self.sources])

def balanced(
    images: LabelledImages, # to choose from
    n: int, # pictures wanted at most
    seed: int = 0, # names the choice
) -> np.ndarray: # (<= n) indices, ascending
    "Choose pictures round by round, one of each video, so that none dominates"
    rng = rng_for(seed, "balanced")
    turn = np.empty(len(images), np.int64)
    for video in np.unique(images.videos):
        mine = np.flatnonzero(images.videos == video)
        turn[mine] = rng.permutation(len(mine))
    return np.sort(np.lexsort((rng.permutation(len(images)), turn))[:n])

# %%
def pictures(phases, seeds, size=64, **kwargs):
    at = [(p, s) for p in phases for s in seeds]
    frames = [phantoms.embryo_frame(p, size, s) for p, s in at]
    return LabelledImages.of(frames, [p for p, _ in at], [f"E{s}" for _, s in at], **kwargs)

few = pictures((3, 11), range(8))
plot.montage([few.load(i, 64) for i in range(0, 16, 2)], 8, [PHASES[few.phases[i]] for i in range(0, 16, 2)])

# %%
assert len(few) == 16 and len(few.at(few.phases == 3)) == 8 and len(few + few) == 32
skewed = few.at(np.r_[np.zeros(9, int), 1:8]) # ten pictures of one video, one of each other
assert len(np.unique(skewed.videos[balanced(skewed, 8)])) == 8
with raises(DataError, match="16 sources, 1 phases"): LabelledImages.of(few.sources, [1])
with raises(MissingFile, match="nowhere.png"): LabelledImages.of(["nowhere.png"], [0]).load(0, 64)

# %% [markdown]
# ## Features
# Any network that turns pictures into vectors will do. Its fingerprint, which covers the weights, goes with every
# result: numbers from different networks are never compared. Features of a set of files are kept under a name made of
# network, list of files and size, so another phase, another video or an edited file is another entry.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Extractor:
    "A network for features of pictures"
    body: nn.Module # (b, 1, size, size) -> (b, d)
    size: int # width and height that it wants [pixel]
    head: nn.Module | None = None # (b, d) -> (b, phases) logits or log-probabilities
    mean: float = 0.5 # of intensities in [0, 1], taken away
    std: float = 0.25 # of intensities in [0, 1], divided by
    @cached_property
    def digest(self) -> str: # of structure, weights and input
        "What makes its features comparable"
        parts = [m for m in (self.body, self.head) if m is not None]
        weights = [[k, v.cpu()] for m in parts for k, v in sorted(m.state_dict().items())]
        return fingerprint([[repr(m) for m in parts], weights, self.size, self.mean, self.std])

@dataclass(frozen=True, eq=False)
class Features:
    "Features of a set of pictures"
    values: np.ndarray # (n, d) float32
    probs: np.ndarray | None # (n, phases) float32, None: the network has no head
    thumbs: np.ndarray # (n, 64, 64) uint8
    phases: np.ndarray # (n) int
    videos: np.ndarray # (n) str
    extractor: str # digest of the network
    def __len__(self) -> int: return len(self.values)
    def at(
        self,
        chosen: np.ndarray, # (m) indices, or (n) bool
    ) -> "Features": # those
        "A part of the set"
        probs = None if self.probs is None else self.probs[chosen]
        return Features(self.values[chosen], probs, self.thumbs[chosen], self.phases[chosen], self.videos[chosen],
                        self.extractor)

def extract_features(
    net: Extractor, # network
    images: LabelledImages, # pictures
    *,
    batch_size: int = 50, # pictures at a time
    workers: int = 0, # threads that decode
    device: str = "auto", # where the network runs
    dask: str | None = None, # address of a Dask scheduler whose workers see the same files
    cache: str | os.PathLike | None = None, # folder that keeps features; None: nothing is kept
) -> Features: # in the order of the pictures
    "Features, class probabilities and thumbnails of pictures"
    if not len(images): raise DataError("features: no pictures")
    path = None if cache is None else Path(cache)/f"{fingerprint([net.digest, images.identity, 'features 1'])}.npz"
    found = None if path is None else _cached(path)
    if found is None:
        if dask is None: found = _compute(net, images, batch_size, workers, device)
        else: found = _on_cluster(dask, net, images, batch_size, workers, device)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as t, open(t, "wb") as f: np.savez(f, **found)
    probs = found["probs"] if found["probs"].size else None
    return Features(found["values"], probs, found["thumbs"], images.phases, images.videos, net.digest)

def _cached(path: Path) -> dict[str, np.ndarray] | None:
    "Arrays of a cache entry; a damaged one is made again"
    if not path.exists(): return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as z:
            return {k: z[k] for k in ("values", "probs", "thumbs")}
    except Exception as e: log.warning("%s: damaged, the features are computed again (%s)", path, e)

_BATCHES = 20 # in a task of a cluster, since the network travels with each task

def _on_cluster(dask: str, net: Extractor, images: LabelledImages, batch: int, workers: int, device: str) -> dict:
    "The same in pieces of whole batches, so that batches are those of one process"
    pieces = [images.at(np.arange(k, min(k + _BATCHES*batch, len(images))))
              for k in range(0, len(images), _BATCHES*batch)]
    keys = [f"pictures from {p.ids[0]}" for p in pieces]
    with on_cluster(dask):
        found = pmap(lambda p: _compute(net, p, batch, workers, device), pieces, keys=keys, desc="features")
    return {k: np.concatenate([f[k] for f in found]) for k in found[0]}

def _compute(net: Extractor, images: LabelledImages, batch: int, workers: int, device: str) -> dict:
    from PIL import Image
    device = device_for(device)
    parts: dict[str, list] = {"values": [], "probs": [], "thumbs": []}
    was = [(m, m.training) for m in (net.body, net.head) if m is not None]
    for m, _ in was: m.to(device).eval()
    def read(i: int) -> tuple[np.ndarray, np.ndarray]:
        full = images.load(i, net.size)
        return full, np.asarray(Image.fromarray(full).resize((64, 64), Image.Resampling.BILINEAR))
    try:
        with ThreadPoolExecutor(max(1, workers)) as pool, torch.inference_mode():
            for k in progress(range(0, len(images), batch), "features", unit="batch"):
                full, thumbs = zip(*pool.map(read, range(k, min(k + batch, len(images)))))
                x = torch.from_numpy(np.stack(full)).to(device)[:, None].float()/255
                values = net.body((x - net.mean)/net.std)
                if values.ndim != 2 or len(values) != len(full):
                    raise DataError(f"features: the network must give (n, d), got {tuple(values.shape)} for {len(x)}")
                parts["values"].append(values.float().cpu().numpy())
                if net.head is not None: parts["probs"].append(net.head(values).float().softmax(1).cpu().numpy())
                parts["thumbs"].append(np.stack(thumbs))
    finally:
        for m, training in was: m.train(training)
    out = {k: np.concatenate(v) if v else np.zeros(0, np.float32) for k, v in parts.items()}
    if not np.isfinite(out["values"]).all(): raise DataError("features: the network gave NaN or infinite values")
    return out

# %% [markdown]
# A network without training already tells phases apart a little; a trained one comes with the
# [classifier](63b_embryo_classify.ipynb).

# %%
class Summary(nn.Module):
    def forward(self, x):
        parts = [nn.functional.adaptive_avg_pool2d(f, 4).flatten(1) for f in (x, (x - nn.functional.avg_pool2d(
            x, 5, 1, 2)).abs())]
        return torch.cat(parts, 1)

summary, place = Extractor(Summary(), 64), tempfile.TemporaryDirectory()
folder = Path(place.name)
for k, frame in enumerate(few.sources): Image.fromarray(frame).save(folder/f"{k}.png")
files = LabelledImages.of([folder/f"{k}.png" for k in range(16)], few.phases, few.videos)
kept = extract_features(summary, files, batch_size=5, cache=folder/"cache")
kept.values.shape, kept.extractor, len(list((folder/"cache").iterdir()))

# %%
again = extract_features(summary, files, workers=2, cache=folder/"cache")
other = extract_features(summary, files.at(files.phases == 11), cache=folder/"cache")
assert np.array_equal(kept.values, again.values) and len(list((folder/"cache").iterdir())) == 2
np.testing.assert_allclose(other.values, kept.values[kept.phases == 11], atol=1e-6)

# %% [markdown]
# ## Fréchet distance
# Between Gaussians with means $\mu_i$ and covariances $S_i$ it is
# $|\mu_1-\mu_2|^2 + \mathrm{tr}\,S_1 + \mathrm{tr}\,S_2 - 2\,\mathrm{tr}\,(S_1S_2)^{1/2}$. The usual root of a
# $d\times d$ matrix is slow, and needs more pictures than features to be well conditioned. With centred features
# $A,B$ divided by $\sqrt{n-1}$, $S_1=A^\top A$ and the last trace is the *nuclear norm* of $AB^\top$: the sum of its
# singular values. That is exact for any number of pictures, and as small a problem as the smaller of pictures and
# features allows.

# %%
#| export
def _matrix(x: np.ndarray, what: str, least: int = 2) -> np.ndarray:
    "Checked features as float64"
    x = np.asarray(x, np.float64)
    if x.ndim != 2: raise DataError(f"{what}: features must be (n, d), got shape {x.shape}")
    if len(x) < least: raise DataError(f"{what}: needs at least {least} pictures, got {len(x)}")
    if not np.isfinite(x).all(): raise DataError(f"{what}: features hold NaN or infinite values")
    return x

def _pair(a: np.ndarray, b: np.ndarray, what: str, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a, b = _matrix(a, what, least), _matrix(b, what, least)
    if a.shape[1] != b.shape[1]: raise DataError(f"{what}: {a.shape[1]} and {b.shape[1]} features differ")
    return a, b

def frechet_distance(
    a: np.ndarray, # (n, d) features
    b: np.ndarray, # (m, d) features
) -> float: # >= 0
    "Distance of two sets as if both were Gaussian, from a nuclear norm instead of a matrix root"
    a, b = _pair(a, b, "frechet_distance")
    gap = a.mean(0) - b.mean(0)
    # only the triangle of a QR decomposition matters when there are more pictures than features
    small = [np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x
             for x in ((x - x.mean(0))/np.sqrt(len(x) - 1) for x in (a, b))]
    spread = sum(float((x*x).sum()) for x in small)
    return max(0.0, float(gap @ gap) + spread - 2*float(np.linalg.svd(small[0] @ small[1].T, compute_uv=False).sum()))

# %%
rng = np.random.default_rng(0)
cloud = rng.standard_normal((400, 16))
[round(frechet_distance(cloud, s*cloud + t), 3) for s, t in ((1, 0), (1, 0.5), (2, 0))]

# %% [markdown]
# For one Gaussian moved by $t$ in each of $d$ features it is $dt^2$, and for one scaled by $s$ it is $(s-1)^2$ times
# the trace of its covariance.

# %%
trace = np.cov(cloud.T).trace()
assert close([frechet_distance(cloud, s*cloud + t) for s, t in ((1, 0), (1, 0.5))], [0, 16*0.25], 1e-6)
assert close(frechet_distance(cloud - cloud.mean(0), 2*(cloud - cloud.mean(0))), trace, 1e-6)
with raises(DataError, match="at least 2 pictures"): frechet_distance(cloud, cloud[:1])

# %% [markdown]
# ## Kernel distance
# With few pictures the Fréchet distance is too large, even between halves of one set. The kernel distance (Bińkowski et
# al., ICLR 2018) has no such bias: the squared maximum mean discrepancy with kernel $(x^\top y/d+1)^3$, averaged over
# seeded subsets. It may be slightly negative; that is what unbiased means.

# %%
#| export
def kernel_distance(
    a: np.ndarray, # (n, d) features
    b: np.ndarray, # (m, d) features
    *,
    subsets: int = 50, # how many are drawn
    size: int = 100, # pictures in each at most
    seed: int = 0, # names the subsets
) -> tuple[float, float]: # mean and standard deviation over subsets
    "Unbiased squared discrepancy of two sets with a cubic kernel"
    a, b = _pair(a, b, "kernel_distance")
    n, rng = min(len(a), len(b), size), rng_for(seed, "kernel_distance")
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray: return (x @ y.T/x.shape[1] + 1)**3
    found = []
    for _ in range(subsets):
        x, y = a[rng.permutation(len(a))[:n]], b[rng.permutation(len(b))[:n]]
        inner = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))/(n*(n - 1))
        found.append(inner - 2*kernel(x, y).mean())
    return float(np.mean(found)), float(np.std(found))

# %%
halves = rng.standard_normal((2, 60, 16))
{"frechet": round(frechet_distance(*halves), 2), "kernel": tuple(round(v, 3) for v in kernel_distance(*halves)),
 "kernel, moved": round(kernel_distance(halves[0], halves[1] + 0.5)[0], 3)}

# %%
assert frechet_distance(*halves) > 1 and abs(kernel_distance(*halves)[0]) < 0.1
assert kernel_distance(*halves) == kernel_distance(*halves)

# %% [markdown]
# ## Precision and recall
# One number cannot say whether pictures are unreal or merely all alike. Around every picture of a set, a ball reaches
# to its fifth neighbour; together the balls are the set's territory. *Precision* is the share of synthetic pictures in
# the real territory, *recall* the share of real pictures in the synthetic one (Kynkäänniemi et al., NeurIPS 2019).
# *Density* counts in how many real balls a synthetic picture lies, *coverage* which share of real balls holds one
# (Naeem et al., ICML 2020); both suffer less from outliers. Shares come with Wilson's 95 % interval; frames of one
# video are no independent witnesses, so for the real side videos count, not frames.

# %%
#| export
def wilson(
    share: float, # observed, [0, 1]
    n: int, # independent observations
    z: float = 1.959964, # 95 %
) -> tuple[float, float]: # lower and upper limit, [0, 1]
    "Confidence interval of a share that stays sensible at 0 and 1"
    if n < 1: return 0.0, 1.0
    middle, half = share + z*z/(2*n), z*np.sqrt(share*(1 - share)/n + z*z/(4*n*n))
    return float(max(0.0, (middle - half)/(1 + z*z/n))), float(min(1.0, (middle + half)/(1 + z*z/n)))

def distances(
    a: np.ndarray, # (n, d) features
    b: np.ndarray, # (m, d) features
) -> np.ndarray: # (n, m) float64
    "Euclidean distances, by matrix products, and exactly where those would cancel"
    centre = a.mean(0)
    a, b = a - centre, b - centre
    aa, bb = (a*a).sum(1)[:, None], (b*b).sum(1)[None]
    out = aa + bb - 2*(a @ b.T)
    for i, j in zip(*np.nonzero(out < 1e-6*(aa + bb))): out[i, j] = ((a[i] - b[j])**2).sum()
    return np.sqrt(out)

def _reach(x: np.ndarray, k: int) -> np.ndarray:
    "(n) distance of each picture to its k-th neighbour in the set"
    own = distances(x, x)
    np.fill_diagonal(own, np.inf)
    return np.partition(own, k - 1, axis=1)[:, k - 1]

def precision_recall(
    real: np.ndarray, # (n, d) features
    synth: np.ndarray, # (m, d) features
    k: int = 5, # neighbours that make a ball
    *,
    videos: Sequence[str] | None = None, # of the real pictures; None: they are independent
) -> dict[str, float]: # precision, recall, density, coverage, and limits '<share>_low', '<share>_high'
    "How much of either set the other one reaches"
    real, synth = _pair(real, synth, f"precision_recall with k = {k}", k + 1)
    cross, real_reach, synth_reach = distances(real, synth), _reach(real, k), _reach(synth, k)
    in_real, in_synth = cross <= real_reach[:, None], cross <= synth_reach[None]
    n_real = len(real) if videos is None else len(np.unique(videos))
    out = {"density": float(in_real.sum(0).mean()/k)}
    for name, hits, n in (("precision", in_real.any(0), len(synth)), ("recall", in_synth.any(1), n_real),
                          ("coverage", in_real.any(1), n_real)):
        share = float(hits.mean())
        out |= {name: share} | dict(zip((f"{name}_low", f"{name}_high"), wilson(share, n)))
    return out

# %%
plane = rng.standard_normal((300, 2))
cases = {"same": rng.standard_normal((200, 2)), "one corner": 0.3*rng.standard_normal((200, 2)) + 1,
         "too wide": 4*rng.standard_normal((200, 2))}
{name: {k: round(v, 2) for k, v in precision_recall(plane, x).items() if "_" not in k} for name, x in cases.items()}

# %% [markdown]
# A set with little variety has high precision and low recall; one that is too wide the reverse. Of a set with itself
# both are 1, duplicates or not.

# %%
self_pr = precision_recall(plane, plane)
assert self_pr["precision"] == self_pr["recall"] == self_pr["coverage"] == 1 and self_pr["precision_low"] > 0.98
twice = np.repeat(plane[:20], 8, axis=0)
assert precision_recall(twice, twice)["precision"] == 1
assert precision_recall(plane, cases["one corner"])["recall"] < 0.5 < precision_recall(plane, cases["one corner"])[
    "precision"]
with raises(DataError, match="at least 6 pictures"): precision_recall(plane, plane[:5])

# %% [markdown]
# ## Copies of training pictures
# Diffusion models trained on small sets repeat them. Each synthetic picture is compared with every training picture, in
# two ways: correlation of thumbnails over the eight flips and quarter turns, and distance of features. What counts as
# too near is *calibrated* by real test pictures, which cannot be copies: above the 99.5th percentile of their
# correlations, and at least 0.9; or nearer than the 0.5th percentile of their distances. Of few test pictures the
# smallest distance is a poor guess of that, so a tolerance limit that knows the number of videos must be undercut, too.

# %%
#| export
def _unit(thumbs: np.ndarray) -> np.ndarray:
    "(n, 4096) float32 of mean 0 and length 1; flat pictures become 0"
    x = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    x -= x.mean(1, keepdims=True)
    return x/np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)

def correlation(
    a: np.ndarray, # (n, 64, 64) thumbnails
    b: np.ndarray, # (m, 64, 64) thumbnails
) -> np.ndarray: # (n, m) float32, [-1, 1]
    "Largest correlation of two pictures over the flips and quarter turns of one of them"
    other, best = _unit(b), np.full((len(a), len(b)), -1, np.float32)
    for flipped in (a, a[:, :, ::-1]):
        for k in range(4): np.maximum(best, _unit(np.rot90(flipped, k, (1, 2))) @ other.T, out=best)
    return np.clip(best, -1, 1)

@dataclass(frozen=True, eq=False)
class Copies:
    "How near synthetic pictures are to training pictures"
    flagged: np.ndarray # (n) bool, too near to be new
    nearest: np.ndarray # (n) index of the training picture that correlates most
    correlations: np.ndarray # (n) with it
    distances: np.ndarray # (n) of features, to the nearest training picture in that sense
    limits: tuple[float, float] # correlation above and distance below which a picture is flagged
    ratio: float # mean distance of synthetic pictures to training, divided by that of test pictures; copies: near 0
    @property
    def share(self) -> float: return float(self.flagged.mean())

def _lower_tolerance(x: np.ndarray) -> float:
    "Limit below which, with 95 % confidence, at most 0.5 % of log-normal values lie; 0 for fewer than 3"
    from scipy.stats import nct, norm
    n, logs = len(x), np.log(np.maximum(x, 1e-12))
    if n < 3: return 0.0
    return float(np.exp(logs.mean() - nct.ppf(0.95, n - 1, norm.ppf(0.995)*np.sqrt(n))/np.sqrt(n)*logs.std(ddof=1)))

def find_copies(
    train: Features, # real pictures that the generator has seen, of one phase
    test: Features, # real pictures that it has not seen, of the same phase
    synth: Features, # its pictures
) -> Copies: # which are too near
    "Look for copies of training pictures, with limits that unseen real pictures set"
    _comparable(train, test, synth)
    for name, part in (("train", train), ("test", test), ("synthetic", synth)):
        if not len(part): raise DataError(f"find_copies: no {name} pictures of this phase")
    seen, unseen = correlation(synth.thumbs, train.thumbs), correlation(test.thumbs, train.thumbs).max(1)
    x, y, z = (f.values.astype(np.float64) for f in (train, test, synth))
    far, usual = distances(z, x).min(1), distances(y, x).min(1)
    high = max(0.9, float(np.quantile(unseen, 0.995, method="higher")))
    nearest = [usual[test.videos == v].min() for v in np.unique(test.videos)] # frames of a video are alike
    low = min(float(np.quantile(usual, 0.005, method="lower")), _lower_tolerance(np.array(nearest)))
    return Copies((seen.max(1) > high) | (far < low), seen.argmax(1), seen.max(1), far, (high, low),
                  float(far.mean()/usual.mean()) if usual.mean() else float("nan"))

def _comparable(*parts: Features) -> None:
    if len({f.extractor for f in parts}) > 1:
        raise DataError("quality: these features come from different networks and must not be compared. Extract all "
                        "of them with one")

def refuse_copies(
    copies: Copies, # what was found
    limit: float = 0.05, # largest share that is let pass
) -> None:
    "Stop before pictures are given away that repeat those of patients"
    if copies.share > limit:
        raise DataError(f"copies: {copies.flagged.sum()} of {len(copies.flagged)} synthetic pictures are near-copies "
                        f"of training pictures, at most {limit:.0%} are let pass. Look at the pairs, train for fewer "
                        "steps or on more pictures")

def copies_figure(
    copies: Copies, # of these pictures
    train: Features, # real training pictures
    synth: Features, # synthetic pictures
    n: int = 8, # pairs shown
) -> Any: # figure
    "The nearest pairs: synthetic pictures above, their training pictures below"
    worst = np.argsort(-copies.correlations, kind="stable")[:n]
    marks = [f"{copies.correlations[i]:.2f}" + (" copy" if copies.flagged[i] else "") for i in worst]
    below = [train.thumbs[copies.nearest[i]] for i in worst]
    return plot.montage([*synth.thumbs[worst], *below], len(worst), [*marks, *["training"]*len(worst)])

# %% [markdown]
# Twelve new pictures and four copies that were turned, made brighter and noisier:

# %%
seen, unseen = (extract_features(summary, pictures([11], s)) for s in (range(40), range(100, 120)))
def spoiled(k):
    turned = np.rot90(phantoms.embryo_frame(11, 64, k)[:, ::-1], k)
    return (turned*1.08 + 3*rng_for(0, "spoil", k).standard_normal((64, 64))).clip(0, 255).astype(np.uint8)
planted = LabelledImages.of([spoiled(k) for k in range(4)], [11]*4)
made = extract_features(summary, pictures([11], range(200, 212)) + planted)
copies = find_copies(seen, unseen, made)
copies_figure(copies, seen, made)

# %%
assert copies.flagged[12:].all() and copies.flagged[:12].sum() <= 1 and copies.nearest[12:].tolist() == [0, 1, 2, 3]
with raises(DataError, match="near-copies of training pictures"): refuse_copies(copies)
refuse_copies(find_copies(seen, unseen, unseen), 0.2)

# %% [markdown]
# ## Unlikely pictures
# Some generated pictures are simply bad. In the first principal directions of real features of the same phase,
# the squared Mahalanobis distance of a real picture follows $\chi^2$ roughly, which gives every synthetic picture a
# probability to be as far out. Directions are limited to a fifth of the number of pictures, and variances pulled
# towards their mean a little, or a small real set would make everything unlikely.

# %%
#| export
def typicality(
    real: np.ndarray, # (n, d) features of one phase
    synth: np.ndarray, # (m, d) features
    directions: int = 64, # principal directions at most
) -> np.ndarray: # (m) p-values, [0, 1]; small is unlikely
    "Probability of a real picture to be as far out as a synthetic one"
    from scipy.stats import chi2
    real, synth = _pair(real, synth, "typicality", 1)
    if len(real) < 5: raise DataError(f"typicality: needs at least 5 real pictures, got {len(real)}")
    k = min(directions, max(1, len(real)//5), real.shape[1])
    _, s, v = np.linalg.svd(real - real.mean(0), full_matrices=False)
    variance = s[:k]**2/(len(real) - 1)
    variance = 0.95*variance + 0.05*variance.mean()
    if not variance.mean() > 0: raise DataError("typicality: all real pictures have the same features")
    return chi2.sf((((synth - real.mean(0)) @ v[:k].T)**2/variance).sum(1), k)

# %%
p_new, p_odd = (typicality(cloud, x) for x in (rng.standard_normal((200, 16)), 2*rng.standard_normal((200, 16))))
plot.histograms({"as real": p_new, "too wide": p_odd}, bins=20, xlabel="p-value")

# %%
assert 0.3 < p_new.mean() < 0.6 and np.median(p_odd) < 0.01

# %% [markdown]
# ## A row a run
# All figures of one run of synthetic pictures of one phase. Features are scaled to unit spread over the real training
# pictures. Real pictures of the *test* videos are the yardstick; the same distance from real training to real test
# pictures, with as many of them, says what a perfect generator would reach.

# %%
#| export
def _entropy(probs: np.ndarray) -> float:
    return float(-(probs*np.log(np.maximum(probs, 1e-12))).sum(1).mean())

def _agreement(name: str, probs: np.ndarray, phase: int) -> dict[str, float]:
    got = probs.argmax(1)
    return {f"entropy_{name}": _entropy(probs), f"accuracy_{name}": float((got == phase).mean()),
            f"accuracy_near_{name}": float((abs(got - phase) <= 1).mean())}

def run_quality(
    train: Features, # of real training pictures, all phases
    test: Features, # of real test pictures, all phases
    synth: Features, # of a run of synthetic pictures
    phase: int, # that the run was asked for, place in `PHASES`
    *,
    k: int = 5, # neighbours for precision and recall
    seed: int = 0, # names subsets
) -> tuple[dict[str, Any], Copies]: # figures by name, NaN where there are too few pictures; copies
    "All figures of one run"
    _comparable(train, test, synth)
    mean, std = train.values.mean(0, dtype=np.float64), train.values.std(0, dtype=np.float64)
    std = np.where(std > 1e-6*std.max(), std, 1) if std.max() > 0 else np.ones_like(std)
    def scaled(f: Features) -> Features:
        return Features((f.values - mean)/std, f.probs, f.thumbs, f.phases, f.videos, f.extractor)
    known, real, made = (scaled(f) for f in (train.at(train.phases == phase), test.at(test.phases == phase), synth))
    copies = find_copies(known, real, made)
    n = min(len(known), len(made))
    pick = {name: rng_for(seed, "run_quality", name).permutation(len(f))[:n] for name, f in
            (("train", known), ("synth", made))}
    row: dict[str, Any] = {"n_train": len(known), "n_test": len(real), "n_synth": len(made), "n_reference": n}
    enough = min(n, len(real)) >= 2
    def frechet(x: np.ndarray) -> float: return frechet_distance(x, real.values) if enough else float("nan")
    row |= {"fid": frechet(made.values), "fid_same_n": frechet(made.values[pick["synth"]]),
            "fid_reference": frechet(known.values[pick["train"]])}
    row |= dict(zip(("kid", "kid_sd"), kernel_distance(made.values, real.values, seed=seed) if enough else [np.nan]*2))
    shares = [f"{s}{end}" for s in ("precision", "recall", "coverage") for end in ("", "_low", "_high")] + ["density"]
    row |= precision_recall(real.values, made.values, k, videos=real.videos) if min(len(real), len(made)) > k \
        else dict.fromkeys(shares, float("nan"))
    if made.probs is not None:
        row |= _agreement("synth", made.probs, phase) | _agreement("orig", real.probs, phase)
        counts = np.bincount(made.probs.argmax(1), minlength=made.probs.shape[1])
        row["predicted"] = " ".join(f"{PHASES[c]}:{counts[c]}" for c in np.flatnonzero(counts))
    inside, own = distances(made.values, made.values), distances(real.values, real.values)
    spread = [d[np.triu_indices(len(d), 1)] for d in (inside, own)]
    twins = np.triu(correlation(made.thumbs, made.thumbs), 1) > 0.99
    row |= {"diversity": float(spread[0].mean()/spread[1].mean()) if all(len(s) for s in spread) else float("nan"),
            "duplicates": int(twins.any(0).sum()), "copies": int(copies.flagged.sum()), "copy_share": copies.share,
            "copy_ratio": copies.ratio, "copy_correlation_limit": copies.limits[0],
            "copy_distance_limit": copies.limits[1], "extractor": synth.extractor}
    row["atypical"] = float((typicality(known.values, made.values) < 0.01).mean()) if len(known) >= 5 else float("nan")
    return row, copies

# %% [markdown]
# A generator that blurs, and one that draws a neighbouring phase. The further from real, the larger the distance.

# %%
from scipy.ndimage import gaussian_filter

train, test = (extract_features(summary, pictures((10, 11, 12), s)) for s in (range(30), range(100, 130)))
def variant(blur):
    frames = [gaussian_filter(phantoms.embryo_frame(11, 64, s), blur) for s in range(200, 230)]
    return extract_features(summary, LabelledImages.of(frames, [11]*30))
rows = {f"blur {b}": run_quality(train, test, variant(b), 11)[0] for b in (0, 0.7, 1.4, 2.8)}
rows["tSB instead"] = run_quality(train, test, extract_features(summary, pictures([12], range(200, 230))), 11)[0]
shown = ("fid", "fid_reference", "kid", "precision", "recall", "diversity", "copies")
{name: {k: round(r[k], 2) for k in shown} for name, r in rows.items()}

# %%
fids = [rows[f"blur {b}"]["fid"] for b in (0, 0.7, 1.4, 2.8)]
assert fids == sorted(fids) and fids[0] < 2*rows["blur 0"]["fid_reference"] < fids[-1]
stranger = Extractor(Summary(), 32)
with raises(DataError, match="different networks"): find_copies(train, test, extract_features(stranger, few))

# %% [markdown]
# ## The table of runs
# One row for each run and phase, in the columns of the reference and then ours. A run that is measured again replaces
# its row. A table belongs to one network: rows from another are refused.

# %%
#| export
_UPSTREAM = ("model_name", "orig_data", "synth_data", "label", "entropy_orig", "entropy_synth", "accuracy_orig",
             "accuracy_synth", "fid")

def add_quality(
    path: str | os.PathLike, # .csv file, made if it is not there
    row: Mapping[str, Any], # figures of `run_quality`
    *,
    model_name: str, # of the network behind the features
    orig_data: str, # where real pictures are
    synth_data: str, # where synthetic pictures are
    label: str, # phase
) -> Path: # `path`
    "Put the figures of a run into a table"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"model_name": model_name, "orig_data": orig_data, "synth_data": synth_data, "label": label, **row}
    new = {k: f"{v:.9g}" if isinstance(v, float) else str(v) for k, v in whole.items()}
    with lock(path):
        old = read_csv(path, ["synth_data", "label", "extractor"]) if path.exists() else []
        if strange := {r["extractor"] for r in old} - {new["extractor"]}:
            raise ConfigError(f"{path}: holds results of another network ({', '.join(sorted(strange))}, now "
                              f"{new['extractor']}), which must not be compared. Choose another table")
        key = (new["synth_data"], new["label"])
        rows = [r for r in old if (r["synth_data"], r["label"]) != key] + [new]
        columns = [*_UPSTREAM, *dict.fromkeys(k for r in rows for k in r if k not in _UPSTREAM)]
        return write_csv(path, [{c: r.get(c, "nan") for c in columns} for r in rows], columns, "overwrite")

# %%
for name, r in rows.items():
    add_quality(folder/"synth_img_metrics.csv", r, model_name="summary", orig_data="phantoms", synth_data=name,
                label="tM")
add_quality(folder/"synth_img_metrics.csv", rows["blur 0"], model_name="summary", orig_data="phantoms",
            synth_data="blur 0", label="tM")
table = read_csv(folder/"synth_img_metrics.csv")
plot.bars({r["synth_data"]: float(r["fid"]) for r in table}, title="Fréchet distance to real test pictures")

# %%
assert len(table) == len(rows) and list(table[0])[:9] == list(_UPSTREAM)
with raises(ConfigError, match="holds results of another network"):
    add_quality(folder/"synth_img_metrics.csv", rows["blur 0"] | {"extractor": "other"}, model_name="x", orig_data="x",
                synth_data="x", label="tM")
place.cleanup()
