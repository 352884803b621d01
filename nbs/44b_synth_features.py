# %% [markdown]
# # Features of any volume
#
# > What a pretrained network is for: sixteen numbers a voxel, whatever scanner the volume came from.
#
# A feature network knows no organ. It gives a voxel a vector that depends on the structure around it and hardly on
# contrast, so that the same place has similar vectors in a CT and in an MR. This page takes a network of page 44a, or
# the published weights, and makes features of whole files by overlapping windows; a linear probe says how much of the
# anatomy they hold. Page 44c trains on with a few labelled volumes.

# %%
#| default_exp synth.features

# %%
#| export
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from medvol_nb.checkpoints import Precision, autocast_for, device_for, precision_for
from medvol_nb.core import ConfigError, DataError, OnExists, check_output, fingerprint, rng_for
from medvol_nb.geometry import Volume, to_axes
from medvol_nb.grid import Grid, sweep
from medvol_nb.intensity import Normalizer
from medvol_nb.parallel import on_cluster, pmap
from medvol_nb.synth.contrast import (Contrast, ContrastConfig, FeatureNetwork, FlatUNet, NetworkConfig, build_network,
                                      load_network, plateau)
from medvol_nb.synth.labels import EnsembleConfig, draw_plan, render_labels
from medvol_nb.synth.pairfile import array_digest
from medvol_nb.synth.pretrain import (NO_AUGMENTATION, PretrainConfig, PretrainFit, Validation, pretrain_network,
                                      scale_view)
from medvol_nb.synth.templates import TemplateBank, procedural_bank
from medvol_nb.synth.views import ViewConfig, draw_view_plan, render_view
from medvol_nb.torchcore import FitState
from medvol_nb.volume import read_volume, stem_of, write_volume

# %%
from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises, tmpdir

# %% [markdown]
# ## Window by window
# The network was trained on windows, so it is used on windows: normalise the volume as a whole (by default its range
# becomes [0, 1]; `ct:-450,450` clips first), slide with much overlap, blend with a Gaussian. Volumes smaller than the
# window get a smaller one, a multiple of what the poolings need. Networks with instance normalisation give vectors of
# any length; theirs are scaled to length 1.

# %%
#| export
def window_size(
    net: FlatUNet, # says what its poolings need
    shape: Sequence[int], # (x, y, z) of the volume [voxel]
    patch_size: Sequence[int], # (x, y, z) largest window [voxel]
) -> tuple[int, ...]: # (x, y, z) window [voxel]
    "Largest useful window for a volume"
    step = 2**net.cfg.levels
    out = tuple(min(p, max(2*step, -(-n//step)*step)) for n, p in zip(shape, patch_size, strict=True))
    net.check(out)
    return out

def extract_features(
    network: FeatureNetwork, # from `load_network`
    img: np.ndarray, # (x, y, z) any real type
    *,
    normalizer: str | None = None, # spec of page 05; None: that of the network
    patch_size: Sequence[int] | None = None, # (x, y, z) window [voxel]; None: that of the training
    overlap: float = 0.8, # part of a window shared with the next one
    batch_size: int = 2, # windows in a forward pass
    precision: Precision = "fp32", # of the forward pass
    unit: bool | None = None, # scale the vector of each voxel to length 1; None: if the network needs it
) -> np.ndarray: # (c, x, y, z) float32
    "Features of a volume of any size"
    if img.ndim != 3: raise DataError(f"features: a volume (x, y, z) is needed, got shape {img.shape}")
    grey = Normalizer.parse(normalizer or network.normalizer)(img)
    grid = Grid(grey.shape, window_size(network.net, grey.shape, patch_size or network.patch_size), overlap)
    device = next(network.net.parameters()).device
    @torch.no_grad()
    def predict(windows: np.ndarray) -> np.ndarray: # (b, 1, x, y, z) -> (b, c, x, y, z)
        with autocast_for(device, precision): out = network.net(torch.from_numpy(windows).to(device))
        return out.float().cpu().numpy()
    out = sweep(predict, grey, grid, sigma_scale=0.25, batch=batch_size, fill=0, desc="features")
    if network.net.cfg.norm == "instance" if unit is None else unit:
        out /= np.maximum(np.linalg.norm(out, axis=0, keepdims=True), 1e-12)
    return out

def pca_colours(
    *features: np.ndarray, # (c, x, y, z) each; one set of colours for all
) -> list[np.ndarray]: # each (x, y, z, 3) in [0, 1]
    "Show features as colours: red, green and blue are the three directions in which they vary most"
    rows = np.concatenate([f.reshape(len(f), -1) for f in features], 1).astype(np.float64)
    middle = rows.mean(1, keepdims=True)
    _, axes = np.linalg.eigh(np.cov(rows)) # rising
    axes = axes[:, ::-1][:, :3]*np.sign(axes[0, ::-1][:3] + 1e-30) # the same sign on every machine
    low, high = np.percentile(axes.T @ (rows - middle), (1, 99), axis=1)
    width = np.maximum(high - low, 1e-12)
    colour = lambda f: (np.tensordot(f - middle[..., None, None], axes, (0, 0)) - low)/width
    return [np.clip(colour(f), 0, 1) for f in features]

# %%
tiny = NetworkConfig(width=8, levels=3)
fresh = FeatureNetwork(build_network(tiny).eval(), "minmax", (32, 32, 32), "")
body = phantoms.random_body((48, 40, 36), seed=1)
drawn = extract_features(fresh, body.img, overlap=0.5)
plot.montage([body.img[:, :, 18].T, np.swapaxes(pca_colours(drawn)[0][:, :, 18], 0, 1)],
             titles=["volume", "features of an untrained network"], width=5)

# %%
small = body.img[:29, :30, :27]
assert window_size(fresh.net, small.shape, (128,)*3) == (32, 32, 32)
assert extract_features(fresh, small).shape == (16, *small.shape)
shifted = extract_features(fresh, 3*body.img + 7, overlap=0.5)
close(shifted, drawn, 1e-3)
close(np.linalg.norm(extract_features(fresh, small, unit=True), axis=0), np.ones(small.shape), 1e-5)
with raises(DataError, match="a volume"): extract_features(fresh, small[None])

# %% [markdown]
# ## The command
# `medvol synth features` does this for files; the affine stays. One bad file does not stop the others: they are listed
# at the end. Workers load the network themselves, once, and make sure that it is the one that the command began with.

# %%
#| export
@lru_cache(maxsize=1)
def _network(checkpoint: str, device: str, digest: str) -> FeatureNetwork:
    "One network a process"
    found = load_network(checkpoint, device)
    if found.digest != digest: raise DataError(f"{checkpoint}: these are not the weights that this run began with")
    return found

def features(
    image_file: Sequence[str | os.PathLike], # volumes: NIfTI, zarr, ...
    *,
    checkpoint: str | os.PathLike, # run folder, .safetensors of `medvol synth pretrain`, or published .pth
    output_dir: str | os.PathLike = "features", # folder of the results; created
    normalizer: str | None = None, # such as 'ct:-450,450' or 'minmax'; default: that of the network
    patch_size: int | None = None, # side of the window [voxel]; default: that of the training
    overlap: float = 0.8, # part of a window shared with the next one
    batch_size: int = 2, # windows in a forward pass
    precision: Literal["fp32", "bf16", "fp16"] = "fp32", # of the forward pass
    device: str = "auto", # where the network runs
    suffix: Literal[".nii.gz", ".zarr", ".npz"] = ".nii.gz", # format of the results
    dtype: Literal["float32", "float16"] = "float32", # of the results; NIfTI holds float32 only
    workers: int = 0, # processes; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers see the same folders
    on_exists: OnExists = "error", # what to do with results that are there
) -> dict: # weights' digest, one row a volume
    "Features of some volumes"
    if dtype == "float16" and suffix == ".nii.gz": raise ConfigError("dtype: NIfTI cannot hold float16. Use .zarr")
    if not 0 <= overlap < 1: raise ConfigError(f"overlap: must be in [0, 1), got {overlap}")
    outs = {Path(f): Path(output_dir)/f"{stem_of(f)}{suffix}" for f in image_file}
    if len(set(outs.values())) < len(image_file):
        raise DataError("features: two volumes have the same name, their results would overwrite each other")
    network = load_network(checkpoint, device)
    weights, here = network.digest, network if workers == 0 and dask is None else None
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    def one(path: Path) -> dict[str, Any]:
        row = {"image": str(path), "features": str(outs[path])}
        if not check_output(outs[path], on_exists, inputs=[path]): return {**row, "status": "skipped"}
        vol = to_axes(read_volume(path), "xyz")
        if vol.channels is not None: raise DataError(f"{path}: has {vol.channels} channels, one is needed")
        net = _network(os.fspath(checkpoint), device, weights) if here is None else here
        made = extract_features(net, np.asarray(vol.data), normalizer=normalizer, overlap=overlap,
                                patch_size=(patch_size,)*3 if patch_size else None, batch_size=batch_size,
                                precision=precision_for(precision, device_for(device)))
        write_volume(Volume(made.astype(dtype), vol.affine, "cxyz"), outs[path], on_exists)
        return {**row, "status": "done", "shape": list(made.shape)}
    with on_cluster(dask): rows = pmap(one, list(outs), workers, keys=[str(p) for p in outs], desc="features")
    return {"weights": weights, "volumes": rows}

# %% [markdown]
# ## How much anatomy is in there: the linear probe
# A linear classifier on frozen features: softmax regression with a small penalty, trained to convergence. It can only
# read what is already there. The score is the mean over classes of the share that was found, so that background does
# not decide it.
#
# A probe learned and tested in one view could live on grey values. Tested in the other view of the same labels, where
# all grey values are different, it can only live on what does not depend on contrast.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Probe:
    "Linear classifier of voxels"
    classes: np.ndarray # (k) labels
    weight: np.ndarray # (c, k)
    bias: np.ndarray # (k)

    def __call__(
        self,
        features: np.ndarray, # (n, c)
    ) -> np.ndarray: # (n) labels
        "Most likely label"
        return self.classes[(features @ self.weight + self.bias).argmax(1)]

def fit_probe(
    features: np.ndarray, # (n, c)
    labels: np.ndarray, # (n) integers
    *,
    penalty: float = 1e-3, # of squared weights
    steps: int = 100, # of L-BFGS, at most
) -> Probe: # of the labels that occur
    "Softmax regression on standardised features, every class with the same weight"
    x, y = np.asarray(features, np.float64), np.asarray(labels)
    if x.ndim != 2 or len(x) != len(y) or len(np.unique(y)) < 2:
        raise DataError(f"probe: features (n, c) and n labels of at least 2 classes are needed, got {x.shape}, "
                        f"{y.shape} and {len(np.unique(y))} classes")
    classes, target = np.unique(y, return_inverse=True)
    middle, width = x.mean(0), np.maximum(x.std(0), 1e-12)
    a, t = torch.from_numpy((x - middle)/width), torch.from_numpy(target)
    share = torch.from_numpy(1/np.bincount(target)/len(classes))
    w = torch.zeros(x.shape[1] + 1, len(classes), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([w], max_iter=steps, line_search_fn="strong_wolfe")
    def loss() -> torch.Tensor:
        search.zero_grad()
        value = (F.cross_entropy(a @ w[1:] + w[0], t, reduction="none")*share[t]).sum() + penalty*(w[1:]**2).sum()
        value.backward()
        return value
    search.step(loss)
    found = w.detach().numpy()
    weight = found[1:]/width[:, None]
    return Probe(classes, weight, found[0] - middle @ weight)

def class_recall(
    predicted: np.ndarray, # (n) labels
    labels: np.ndarray, # (n) true labels
) -> float: # [0, 1]; guessing gives 1/number of classes
    "Mean over classes of the share that was found"
    return float(np.mean([(predicted[labels == k] == k).mean() for k in np.unique(labels)]))

def voxels_of(
    seg: np.ndarray, # (x, y, z) labels
    rng: np.random.Generator, # see `rng_for`
    per_label: int = 100, # voxels of each label for learning, and as many for testing
) -> tuple[np.ndarray, np.ndarray]: # positions in C order for learning, and others for testing
    "Two sets of voxels with equal shares of labels; labels of fewer than 4 voxels are left out"
    flat, sets = seg.reshape(-1), ([], [])
    for k in np.unique(flat):
        at = rng.permutation(np.flatnonzero(flat == k))
        n = min(per_label, len(at)//2)
        if n >= 2: sets[0].append(at[:n]), sets[1].append(at[n:2*n])
    if len(sets[0]) < 2: raise DataError("probe: fewer than two labels have 4 voxels")
    return tuple(np.concatenate(s) for s in sets)

def probe_scores(
    first: np.ndarray, # (c, x, y, z) features of view 1
    second: np.ndarray, # (c, x, y, z) features of view 2
    seg: np.ndarray, # (x, y, z) labels of both
    rng: np.random.Generator, # see `rng_for`
    per_label: int = 100, # see `voxels_of`
) -> dict[str, float]: # 'same_view', 'other_view', 'chance'
    "Learn in view 1; test on other voxels of view 1 and on the same other voxels of view 2"
    learn, test = voxels_of(seg, rng, per_label)
    rows = lambda f, at: f.reshape(len(f), -1)[:, at].T
    known = seg.reshape(-1)
    probe = fit_probe(rows(first, learn), known[learn])
    return {"same_view": class_recall(probe(rows(first, test)), known[test]),
            "other_view": class_recall(probe(rows(second, test)), known[test]), "chance": 1/len(probe.classes)}

# %%
flat = body.lbl.ravel()
onehot = np.eye(flat.max() + 1)[body.lbl].transpose(3, 0, 1, 2)
grey = body.img[None]
{"labels": probe_scores(onehot, onehot, body.lbl, rng_for(0, "probe")),
 "grey values": probe_scores(grey, -grey, body.lbl, rng_for(0, "probe"))}

# %%
perfect, poor = (probe_scores(f, s, body.lbl, rng_for(0, "probe")) for f, s in ((onehot, onehot), (grey, -grey)))
assert perfect["same_view"] == perfect["other_view"] == 1 and poor["other_view"] < 0.35
with raises(DataError, match="at least 2 classes"): fit_probe(np.ones((5, 2)), np.ones(5))

# %% [markdown]
# ## A short pretraining, end to end
# Shapes without any data (page 40), label ensembles (41), views (42), the tiny network, and the numbers that count: is
# the loss below its plateau, and do features hold more anatomy than grey values and than the network before training?
# Shapes are rendered at full size and thinned out afterwards: small shapes rendered small teach little.

# %%
#| export
def render_pairs(
    n: int, # pairs
    seed: int = 0, # names them
    *,
    side: int = 128, # of the rendered volumes [voxel]
    thin: int = 4, # every so many voxels are kept
    bank: TemplateBank | None = None, # shapes; None: procedural ones
) -> list[dict[str, np.ndarray]]: # img (2, x, y, z) uint8 and seg (x, y, z), sides side/thin
    "Pairs of views in memory, for short trainings"
    bank, cfg = bank or procedural_bank(48, seed), EnsembleConfig(shape=side)
    step, out = (slice(None, None, thin),)*3, []
    for i in range(n):
        lbl = render_labels(draw_plan(seed, i, cfg, len(bank)), bank)
        plans = [draw_view_plan(seed, i, v, ViewConfig(), int(lbl.max()) + 1) for v in (1, 2)]
        out.append({"img": np.stack([render_view(lbl, p).numpy()[step] for p in plans]), "seg": lbl[step].copy()})
    return out

def short_settings(
    steps: int = 480, # optimiser steps
    seed: int = 0, # of weights, order and points
    device: str = "cpu", # where to train
) -> PretrainConfig: # a network of 0.37 million parameters, mirrored pairs of 32 voxels a side
    "Settings of a pretraining that takes a minute and a half on one core"
    return PretrainConfig(
        network=NetworkConfig(width=8, levels=3), augment=NO_AUGMENTATION.model_copy(update={"p_flip": 1.0}),
        contrast=ContrastConfig(layers=(24, 31, 38, 51), points=256, projector_width=128), val_pairs=8,
        fit=PretrainFit(steps=steps, lr=2e-3, schedule="constant", validate_every=60, checkpoint_every=60, seed=seed,
                        device=device, tensorboard=False))

def compare_probes(
    networks: Mapping[str, FlatUNet], # by name, in evaluation mode
    pairs: Sequence[Mapping[str, np.ndarray]], # array img (2, x, y, z) and seg (x, y, z) of each held-out pair
    seed: int = 0, # names the voxels
) -> dict[str, dict[str, float]]: # 'grey' and each name -> see `probe_scores`; mean over pairs
    "Linear probes on grey values and on the features of some networks"
    sums: dict[str, list[dict[str, float]]] = {"grey": [], **{k: [] for k in networks}}
    for i, pair in enumerate(pairs):
        views = np.stack([scale_view(v) for v in pair["img"]])
        made = {"grey": views[:, None]}
        for name, net in networks.items():
            with torch.no_grad(): made[name] = net(torch.from_numpy(views)[:, None]).numpy()
        for name, (a, b) in made.items(): sums[name].append(probe_scores(a, b, pair["seg"], rng_for(seed, "probe", i)))
    return {name: {k: float(np.mean([r[k] for r in rows])) for k in rows[0]} for name, rows in sums.items()}

def short_pretraining(
    out_dir: str | os.PathLike, # run folder; created
    pairs: Sequence[Mapping[str, np.ndarray]], # array img (2, x, y, z), seg (x, y, z); the last 8 are held out
    *,
    steps: int = 480, # optimiser steps
    seed: int = 0, # of weights, order, points and probes
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped
) -> dict[str, Any]: # loss, plateau, retrieval and probes, before and after
    "Pretrain a tiny network on a few small pairs, and say what it learned"
    pairs, cfg = [pairs[i] for i in range(len(pairs))], short_settings(steps, seed)
    if len(pairs) < 10: raise DataError(f"pairs: at least 10 are needed, 8 are held out, got {len(pairs)}")
    fresh = Contrast(build_network(cfg.network, seed), cfg.contrast, seed).eval()
    check = Validation(pairs[-8:], range(8), cfg.contrast, seed)
    with torch.no_grad(): before = check(fresh, FitState(fresh, Path(out_dir)))
    done = pretrain_network(pairs[:-8], pairs[-8:], cfg, out_dir=out_dir, on_exists=on_exists,
                            data=fingerprint([[array_digest(p[k]) for k in ("img", "seg")] for p in pairs]))
    losses = [float(r["loss"]) for r in done.log]
    after = {k: float(v) for k, v in done.log[-1].items() if k.startswith("val_") and v}
    trained = load_network(done.weights, "cpu").net
    return {"steps": done.steps, "loss_first": float(np.mean(losses[:20])), "loss_last": float(np.mean(losses[-20:])),
            "plateau": plateau(fresh.sampler.count(pairs[0]["seg"].shape), fresh.weights),
            "retrieval_before": before["val_retrieval"], "retrieval_after": after["val_retrieval"],
            "retrieval_grey": after["val_retrieval_grey"], "chance": after["val_chance"],
            "probes": compare_probes({"untrained": fresh.net, "trained": trained}, pairs[-8:], seed)}

# %% [markdown]
# Measured with the 138 real organ shapes of two people, 40 pairs for training and 8 held out,
# three seeds; the last column is retrieval:
#
# | steps, rate | CPU | loss (plateau 5.888) | untrained, grey, **trained** |
# |---|---|---|---|
# | 240, 1e-3 | 40 s | 5.840, 5.888, 5.829 | .061, .052, **.115**; .059, .062, **.060**; .066, .057, **.119** |
# | 480, 2e-3 | 100 s | 5.716, 5.776, 5.738 | .061, .052, **.211**; .059, .062, **.142**; .066, .057, **.254** |
#
# The second seed had not left the plateau after 240 steps; 480 at twice the rate bring all three to more than twice the
# untrained network and twice grey values. Linear probes in one view after the first row's training: 0.42, 0.37 and 0.55
# of the labels' voxels, with grey values 0.27, 0.24 and 0.31; in the other view 0.12, 0.07 and 0.13 against 0.07,
# 0.06 and 0.08: little, but that test is hard, with twenty labels and nothing but structure to go by.
#
# On this page it is shorter still: volumes half as large, a dozen pairs, 30 steps. That is enough to run through every
# part, and too little to learn anything, which the numbers say.

# %%
with tmpdir() as folder:
    told = short_pretraining(folder/"run", render_pairs(12, side=64), steps=30)
    trained = load_network(folder/"run", "cpu")
{k: v if isinstance(v, dict) else round(v, 3) for k, v in told.items()}

# %%
assert told["steps"] == 30 and set(told["probes"]) == {"grey", "untrained", "trained"}
assert all(0 <= s["other_view"] <= 1 for s in told["probes"].values())
with raises(DataError, match="at least 10 are needed"): short_pretraining("nowhere", render_pairs(1, side=16)*9)

# %% [markdown]
# Both views of a pair that was not trained with, and their features in common colours.

# %%
pair = render_pairs(1, 99, side=64, thin=1)[0]
made = [extract_features(trained, v, overlap=0.25) for v in pair["img"]]
colours = [np.swapaxes(c[:, :, 32], 0, 1) for c in pca_colours(*made)]
plot.montage([*(v[:, :, 32].T for v in pair["img"]), *colours], cols=4,
             titles=["view 1", "view 2", "features 1", "features 2"])
