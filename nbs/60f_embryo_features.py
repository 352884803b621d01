# %% [markdown]
# # Pictures and their features
#
# > Grey pictures with phase, video and origin, and what a network sees in them.
#
# Everything that judges pictures, the [classifier](63b_embryo_classify.ipynb), the
# [distances between sets](63a_embryo_quality.ipynb) and the [study](63d_embryo_study.ipynb), starts from the same two
# things: a list of pictures that is known before any is decoded, and a vector for each of them.

# %%
#| default_exp embryo.features

# %%
#| export
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medvol_nb.checkpoints import device_for
from medvol_nb.core import DataError, FormatError, MissingFile, atomic, fingerprint, log, progress, rng_for
from medvol_nb.embryo.dataset import read_frame
from medvol_nb.embryo.phases import PHASES
from medvol_nb.parallel import on_cluster, pmap
from medvol_nb.phantoms import embryo_frame

# %%
import tempfile

from PIL import Image

from medvol_nb import plot
from medvol_nb.core import raises

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
            try: stat = os.stat(s)
            except FileNotFoundError: raise MissingFile(f"{s} does not exist") from None
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

# %% [markdown]
# Pictures of generated embryos, one video a seed, stand in for real ones in examples and tests.

# %%
#| export
def phantom_images(
    phases: Sequence[int], # places in `PHASES`
    seeds: Sequence[int], # one embryo each
    size: int = 64, # width and height [pixel]
    synthetic: bool = False, # as a model's: without a video
) -> LabelledImages: # every phase of the first embryo, then of the next
    "Generated pictures"
    at = [(p, s) for s in seeds for p in phases]
    return LabelledImages.of([embryo_frame(p, size, s) for p, s in at], [p for p, _ in at],
                             None if synthetic else [f"E{s}" for _, s in at], [f"F+00_E{s}_{p + 1}" for p, s in at])

# %%
few = phantom_images((3, 11), range(8))
plot.montage([few.load(i, 64) for i in range(8)], 8, [PHASES[few.phases[i]] for i in range(8)])

# %%
assert len(few) == 16 and len(few.at(few.phases == 3)) == 8 and len(few + few) == 32
skewed = few.at(np.r_[np.zeros(9, int), 2:16:2]) # nine pictures of one video, one of each other
assert len(np.unique(skewed.videos[balanced(skewed, 8)])) == 8
with raises(DataError, match="16 sources, 1 phases"): LabelledImages.of(few.sources, [1])
nowhere = LabelledImages.of(["nowhere.png"], [0])
with raises(MissingFile, match="nowhere.png"): nowhere.load(0, 64)
with raises(MissingFile, match="nowhere.png"): nowhere.identity

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
# `Summary` has nothing to train: means of a picture and of its edges in 4 x 4 fields. A trained network comes with the
# [classifier](63b_embryo_classify.ipynb). The second call finds its features in the cache; a part of the set is another
# entry.

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
place.cleanup()
