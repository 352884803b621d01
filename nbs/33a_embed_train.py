# %% [markdown]
# # Training an embedding
#
# > From folders of scans to a network: one loop, every published method, exact continuation.
#
# Samples come from [page 30c](30c_embed_sampler.ipynb), settings from [page 33](33_embed_config.ipynb), the loop from
# [page 08a](08a_torchcore.ipynb). What is left is to say what a step does with a batch of each kind. In the published
# code a resumed run continues with other data, all processes draw the same samples, and the choice of the loss is a
# draw from a global generator that the processes share by luck. Here everything random in a step is a function of the
# sample itself, and so one process with twice the batch, two processes, and a run that was interrupted do the same.

# %%
#| default_exp embed.train

# %%
#| export
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medvol_nb.checkpoints import device_for, precision_for, torch_rng_for
from medvol_nb.core import ConfigError, DataError, OnExists, fingerprint, plain, rng_for, write_json
from medvol_nb.embed.config import EmbeddingConfig, settings
from medvol_nb.embed.loss import (LossConfig, Maps, coarse_at, coarse_infonce, coarse_scores, fine_infonce, middle,
                                  nearest, places)
from medvol_nb.embed.losses_more import cross_modal_loss, prototype_loss
from medvol_nb.embed.model import EmbedderConfig, build_model, load_start
from medvol_nb.embed.sampler import Case, MixedBatches, OrganSet, PairSet, ViewSet, collate, read_cases
from medvol_nb.embed.views import ViewSampler
from medvol_nb.parallel import describe
from medvol_nb.torchcore import FitResult, FitState, at_start, fit, to_device

# %%
from medvol_nb import phantoms, plot
from medvol_nb.core import raises, read_csv, tmpdir
from medvol_nb.embed.config import preset, tiny
from medvol_nb.embed.model import load_embedder
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.volume import write_volume

# %% [markdown]
# ## A step
# All images of a batch go through the network in one call, whatever their sizes, because the wrapper for several
# processes wants it so. The losses are computed in float32, also where the network is not. Heads that a batch does not
# use enter with weight 0, so that every parameter always has a gradient.
#
# What a loss draws (queries, negatives) is named by the run's seed and the sample's map, which is as good as unique.
# The coarse maps of all processes are exchanged, in the order of the slots of one large process.

# %%
#| export
def _draws(cfg_seed: int, name: str, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Generator:
    "Generator of a sample's losses"
    return torch_rng_for(cfg_seed, name, matrix.cpu().numpy().tobytes(), offset.cpu().numpy().tobytes())

def _everyone(own: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    "Coarse maps (e, m) of all processes, with gradients, and the places of this process's own among them"
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1): return own, [*range(len(own))]
    from torch.distributed.nn.functional import all_gather
    world, rank = dist.get_world_size(), dist.get_rank()
    parts = all_gather(torch.stack(own)) # (b, e, m) of each process
    return [parts[r][j] for j in range(len(own)) for r in range(world)], [j*world + rank for j in range(len(own))]

def maps_of(
    out: Mapping[str, torch.Tensor], # head -> (b, e, z, y, x)
    at: int, # which of the b images
    matrix: torch.Tensor, # (3, 3) float64
    offset: torch.Tensor, # (3,) float64 [mm]
    valid: torch.Tensor | None = None, # (Z, Y, X) bool
) -> Maps: # for the losses
    "Vectors of one image of a batch, with their place"
    return Maps(out["fine"][at], out["coarse"][at], matrix, offset, valid)

def view_losses(
    out: Mapping[str, torch.Tensor], # head -> (2b, e, z, y, x): views of each pair behind each other
    batch: Mapping[str, torch.Tensor], # matrix (b, 2, 3, 3), offset (b, 2, 3), valid (b, 2, z, y, x)
    cfg: LossConfig, # distances and numbers
    seed: int = 0, # of the run
    quirk: bool = False, # coarse negatives as SAM++ draws them
) -> dict[str, torch.Tensor]: # 'fine' and 'coarse', scalars
    "Contrast of pairs of views"
    m, c, ok = batch["matrix"], batch["offset"], batch["valid"]
    pairs = [tuple(maps_of(out, 2*i + v, m[i, v], c[i, v], ok[i, v]) for v in (0, 1)) for i in range(len(m))]
    draws = lambda name: [_draws(seed, name, m[i], c[i]) for i in range(len(m))]
    fine = torch.stack([fine_infonce(p, cfg, rng=r) for p, r in zip(pairs, draws("fine"))]).mean()
    own = [torch.cat([v.coarse.flatten(1) for v in p], 1) for p in pairs]
    everyone, at = _everyone(own) if cfg.coarse_global else (own, [*range(len(own))])
    coarse = coarse_infonce(pairs, cfg, rngs=draws("coarse"), everyone=everyone, places_of=at, quirk=quirk)
    return {"fine": fine, "coarse": coarse}

def batch_losses(
    model: nn.Module, # embedding network, or its wrapper for several processes
    batch: Mapping[str, Any], # from `MixedBatches`
    cfg: EmbeddingConfig, # settings
) -> dict[str, torch.Tensor]: # 'loss', and its parts for the log
    "What a training step makes of a batch"
    inputs = [batch["images"].flatten(0, 1)[:, None]] if "images" in batch else []
    inputs += [v[None, None] for v in batch.get("volumes", ())]
    inputs += [v[None, None] for p in batch.get("pairs", ()) for v in p["images"]]
    outs, parts = model(inputs), {}
    rest, used = list(outs), set()
    with torch.autocast(inputs[0].device.type, enabled=False):
        if "images" in batch:
            parts |= view_losses(rest.pop(0), batch, cfg.loss, cfg.fit.seed,
                                 quirk=cfg.loss.reference_quirks and "organs" in cfg.slots)
            used |= {"fine", "coarse"}
        if "volumes" in batch:
            maps = [rest.pop(0)["semantic"][0] for _ in batch["volumes"]]
            couples = [prototype_loss(maps[k:k + 2], batch["labels"][k:k + 2], cfg.loss.semantic_tau)
                       for k in range(0, len(maps), 2)]
            parts["semantic"] = torch.stack(couples).mean()
            used |= {"semantic"}
        if "pairs" in batch:
            both = [_pair_losses([rest.pop(0), rest.pop(0)], p, cfg) for p in batch["pairs"]]
            for k, name in enumerate(("cross_fine", "cross_coarse")):
                parts[name] = torch.stack([b[k] for b in both]).mean()
            used |= {"fine", "coarse"}
        idle = sum((v.sum()*0 for out in outs for head, v in out.items() if head not in used), torch.zeros(()).to(
            inputs[0].device))
        return {"loss": sum(parts.values()) + idle, **parts}

def _pair_losses(outs: list[Mapping[str, torch.Tensor]], pair: Mapping[str, Any], cfg: EmbeddingConfig
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    m, c = pair["matrix"], pair["offset"]
    views = tuple(maps_of(o, 0, m[k], c[k], pair["valid"][k]) for k, o in enumerate(outs))
    return cross_modal_loss(views, pair["mask"][1], cfg.loss, rng=_draws(cfg.fit.seed, "cross", m, c))

# %% [markdown]
# Scans to learn from: phantoms of the abdomen with organs, and an "MR" of each, made from the CT.

# %%
place = tmpdir()
root = place.__enter__()
for k in range(4):
    p = phantoms.abdomen((48, 40, 36), seed=k)
    mr = np.where(p.img > -500, 400 - np.abs(p.img - 60), 0)
    for end, img, lbl in (("_0000", p.img, p.lbl), ("_0001", mr, p.lbl)):
        for folder, a in (("", img.astype(np.int16)), ("masks", lbl.astype(np.uint8))):
            (root/"scans"/folder).mkdir(parents=True, exist_ok=True)
            write_volume(Volume(a, affine_from(p.spacing)), root/"scans"/folder/f"p{k}{end}.nii.gz")

small = tiny(preset("ct_mri_infer"), 6)
small = small.model_copy(update={"spacing": 4.0, "views": small.views.model_copy(update={"patch": (16, 32, 32)}),
                                 "pairs_crop": (16, 32, 32), "slots": {"views": 2, "organs": 1, "pairs": 1},
                                 "odds": None, "organs_crop": (24, 32, 32)})

# %% [markdown]
# ## From folders to batches
# Views are cut from every scan of `scans`; organs need masks beside the scans (`masks/`), pairs two images a case.

# %%
#| export
@dataclass(frozen=True)
class Folders:
    "Where the scans of a training are"
    scans: tuple[str, ...] = () # folders for views
    organs: tuple[str, ...] = () # folders with organ masks
    pairs: tuple[str, ...] = () # folders with registered pairs

def _cases(folders: Sequence[str], cfg: EmbeddingConfig, suffixes: bool) -> list[list[Case]]:
    ends = cfg.suffixes if suffixes else ()
    def read(folder: str) -> list[Case]:
        try: return read_cases(folder, ends)
        except DataError:
            if not ends: raise
            return read_cases(folder) # a folder of single scans among folders of cases
    return [read(f) for f in folders]

def make_batches(
    data: Folders, # where the scans are
    cfg: EmbeddingConfig, # settings
) -> MixedBatches: # for `fit`
    "Batches of a training"
    given = {"views": data.scans, "organs": data.organs, "pairs": data.pairs}
    for kind in cfg.kinds:
        if not given[kind]:
            option = "scans" if kind == "views" else kind
            raise ConfigError(f"{cfg.name}: batches hold {kind}, so folders are needed: {option} (--{option})")
    sets: dict[str, list[Any]] = {}
    for kind in cfg.kinds:
        if kind == "views":
            v = cfg.views
            cut = ViewSampler(v.rule, tuple(v.patch), cfg.spacing, v.scale, v.degrees, v.independent)
            known = ["ct" if s == "_0000" else "mr" for s in cfg.suffixes] or [cfg.intensity]
            sets[kind] = [ViewSet(cases, spacing=cfg.spacing, sampler=cut, augment=v.augment,
                                  odds=cfg.suffix_odds or None,
                                  contrasts=known if all(len(c.images) == len(known) for c in cases) else None)
                          for cases in _cases(data.scans, cfg, True)]
        elif kind == "organs":
            sets[kind] = [OrganSet(cases, spacing=cfg.spacing, crop=cfg.organs_crop, augment=cfg.organs_augment,
                                   contrast=cfg.intensity)
                          for cases in _cases(data.organs, cfg, False)]
        else:
            ends = cfg.suffixes or ("_0000", "_0001")
            sets[kind] = [PairSet(read_cases(f, ends[:2]), spacing=cfg.spacing, crop=cfg.pairs_crop,
                                  scale=cfg.views.scale, degrees=cfg.views.degrees, augment=cfg.pairs_augment)
                          for f in data.pairs]
    slots = {k: cfg.slots[k] for k in sets}
    odds = None if cfg.odds is None else {k: cfg.odds.get(k, 0.0) for k in sets}
    return MixedBatches(sets, slots, odds=odds, per_epoch=cfg.per_epoch, seed=cfg.fit.seed, workers=cfg.workers)

# %%
scans = str(root/"scans")
batches = make_batches(Folders((scans,), (scans,), (scans,)), small)
batch = next(iter(batches.epoch(0)))[1]
net = build_model(small.model)
losses = batch_losses(net, batch, small)
{k: round(v.item(), 2) for k, v in losses.items()}

# %% [markdown]
# The same batch gives the same loss, bit for bit, and every parameter has a gradient:

# %%
losses["loss"].backward()
net.train()
again = batch_losses(net, batch, small)
assert all(torch.equal(losses[k], again[k]) for k in losses)
assert all(p.grad is not None for p in net.parameters())
with raises(ConfigError, match="batches hold organs"): make_batches(Folders((scans,)), small)

# %% [markdown]
# ## How far off
# The loss says little about millimetres. So a validation also asks, on held-out pairs of views that never change:
# where in the second view is the most similar vector, and how far is that from the truth? The mean is over the queries
# that have a key. Matches are voxels of 4 mm, so even perfect ones are off: by 1.9 mm on average, and by half the
# diagonal of a voxel, 3.5 mm, at most.

# %%
#| export
@torch.no_grad()
def matching_error(
    views: tuple[Maps, Maps], # of one scan
    count: int = 300, # at most so many queries
    rng: torch.Generator | None = None, # which ones; None: the first of a fixed draw
) -> torch.Tensor: # (n,) distance of the best match from the truth [mm]
    "Match voxels of the first view in the second one by fine plus coarse similarity"
    a, b = (places(v, "fine", middle(views)) for v in views)
    _, _, inside = nearest(a.points, b)
    at = torch.nonzero(inside & a.valid)[:, 0]
    order = torch.randperm(len(at), generator=rng or torch_rng_for(0, "matching error"))[:count].to(at.device)
    query = at[order]
    score = views[0].fine.flatten(1)[:, query].T @ views[1].fine.flatten(1) # (n, m)
    score += coarse_scores(coarse_at(views[0], query), views[1])
    found = score.masked_fill(~b.valid, -torch.inf).argmax(1)
    return (b.points[found] - a.points[query]).norm(dim=1)

class Validation:
    "Loss and matching error on pairs of views that never change"
    def __init__(
        self,
        views: Sequence[ViewSet], # of held-out scans
        cfg: EmbeddingConfig, # settings
        pairs: int = 8, # so many
    ):
        chosen = [(views[k % len(views)], k) for k in range(pairs)]
        self.cfg = cfg
        self.samples = [s.draw((k//len(views)) % len(s), rng_for(0, "validation", k)) for s, k in chosen]

    def __call__(
        self,
        model: nn.Module, # bare network in evaluation mode
        state: FitState, # device
    ) -> dict[str, float]: # val_loss, val_mm (mean), val_median_mm
        "Numbers of a validation"
        totals, errors = [], []
        for sample in self.samples:
            batch = to_device(collate([("views", sample)]), state.device)
            out = model(batch["images"].flatten(0, 1)[:, None])
            parts = view_losses(out, batch, self.cfg.loss, self.cfg.fit.seed)
            totals.append(float(sum(parts.values()).detach()))
            pair = tuple(maps_of(out, v, batch["matrix"][0, v], batch["offset"][0, v], batch["valid"][0, v])
                         for v in (0, 1))
            errors.append(matching_error(pair).cpu())
        far = torch.cat(errors)
        if not len(far): raise DataError("validation: no voxel of the views has a key. Use larger scans or more pairs")
        return {"val_loss": float(np.mean(totals)), "val_mm": float(far.mean()), "val_median_mm": float(far.median())}

# %% [markdown]
# ## A run
# The run folder holds `config.json`, the log, checkpoints, and `model.safetensors`, which `load_embedder` of
# [page 31](31_embed_model.ipynb) opens: the weights carry the shape of their network and what scans it is for.

# %%
#| export
def _about_files(cases: Sequence[Case]) -> list[list[Any]]:
    return [[c.name, *([Path(p).name, describe(p, content=False)["bytes"]] for p in (*c.images, *c.masks, *c.regions)
                       if isinstance(p, (str, os.PathLike)))] for c in cases]

def _begin(cfg: EmbeddingConfig) -> tuple[nn.Module, str, torch.device]:
    "The network that a training begins with, the digest of the weights it was given ('' for none), and the device"
    device = device_for(cfg.fit.device)
    if cfg.model.norm == "syncbn" and device.type == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("model.norm: syncbn needs GPUs when there are several processes. Use gn (model.norm=gn)")
    if cfg.needs_start and cfg.start_from is None:
        raise ConfigError(f"{cfg.name}: this stage continues another one. Name its weights: start_from (--start-from)")
    net = build_model(cfg.model, cfg.fit.seed)
    return net, load_start(net, cfg.start_from) if cfg.start_from is not None else "", device

def train_network(
    batches: MixedBatches, # from `make_batches`
    cfg: EmbeddingConfig, # settings
    *,
    out_dir: str | os.PathLike, # run folder; created
    held_out: Sequence[ViewSet] = (), # views to validate with
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many optimiser steps in all
    callbacks: Sequence[Callable[[str, FitState], None]] = (), # told 'start', 'step', 'epoch', 'validate', 'end'
) -> FitResult: # steps, best number, log, path of the weights
    "Train an embedding network"
    net, started, device = _begin(cfg)
    about = EmbedderConfig(model=cfg.model, spacing=cfg.spacing, intensity=cfg.intensity, name=cfg.name)
    data = fingerprint([[k, *(_about_files(s.cases) for s in sets)] for k, sets in batches.sets.items()])
    identity = {"embedder": plain(about), "data": data, "start": started,
                "settings": cfg.model_dump(mode="json", exclude={"fit", "workers", "start_from"})}
    run = cfg.fit.model_copy(update={"precision": precision_for(cfg.fit.precision, device)})
    check = Validation(held_out, cfg) if held_out else None
    keep = at_start(lambda: write_json(Path(out_dir)/"config.json", plain(cfg.model_dump(mode="json")), "overwrite"))
    return fit(net, batches, lambda model, batch: batch_losses(model, batch, cfg), run, out_dir=out_dir,
               validate=check, callbacks=[keep, *callbacks], config=identity, on_exists=on_exists, stop_at=stop_at,
               desc=f"training {cfg.name}")

def _folders(given: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[str, ...]:
    return (str(given),) if isinstance(given, (str, os.PathLike)) else tuple(str(f) for f in given)

def train(
    scans: Sequence[str] = (), # folders of scans for views
    *,
    organs: Sequence[str] = (), # folders of scans with organ masks, for the semantic head
    pairs: Sequence[str] = (), # folders of registered CT and MR
    val: Sequence[str] = (), # folders of held-out scans
    out: str | os.PathLike = "embedding", # run folder; created
    preset: str | None = None, # published training: sam_NIHLN (default), samv2_NIHLN, ct_mri_intra ...
    config: str | os.PathLike | None = None, # settings file instead, .json or .yaml
    overrides: Sequence[str] = (), # settings to change, 'fit.lr=1e-3'
    tiny: bool = False, # small network, views and batches: for a CPU
    start_from: str | os.PathLike | None = None, # first weights: run folder, .safetensors, .pth; default: random
    steps: int | None = None, # optimiser steps; default: as the settings say
    device: str | None = None, # where to train; default: as the settings say
    workers: int | None = None, # loading processes; default: as the settings say
    seed: int | None = None, # names all random streams; default: as the settings say
    on_exists: OnExists = "skip", # 'skip': go on where the run stopped, 'overwrite': start anew, 'error': refuse
    stop_at: int | None = None, # end this part of the run after so many optimiser steps in all
    dry_run: bool = False, # check everything, train nothing
) -> dict: # run folder, steps, figures
    "Train an anatomical embedding, or go on with a run that was interrupted"
    given = {"fit.device": device, "workers": workers, "fit.seed": seed, "fit.steps": steps,
             "start_from": None if start_from is None else str(start_from)}
    cfg = settings(config, preset, overrides, given, small=tiny)
    data = Folders(_folders(scans), _folders(organs), _folders(pairs))
    batches = make_batches(data, cfg)
    held_out = make_batches(Folders(_folders(val)), cfg.model_copy(update={"slots": {"views": 1}, "odds": None})
                            ).sets["views"] if len(_folders(val)) else ()
    if dry_run:
        _begin(cfg)
        return {"run": str(out), "name": cfg.name, "kinds": list(cfg.kinds), "steps": cfg.fit.steps,
                "scans": {k: sum(len(s) for s in sets) for k, sets in batches.sets.items()}}
    done = train_network(batches, cfg, out_dir=out, held_out=held_out, on_exists=on_exists, stop_at=stop_at)
    last = {k: v for row in done.log for k, v in row.items() if v}
    return {"run": str(out), "steps": done.steps, "finished": done.finished, "best": done.best, "last": last,
            "weights": str(done.weights)}

# %% [markdown]
# A short run on the phantoms: 24 steps, validated with a phantom that it has not seen.

# %%
views = {"views.patch": "[16,32,32]", "spacing": "4", "views.degrees": "5", "fit.validate_every": "12",
         "fit.tensorboard": "false", "suffixes": "[]", "suffix_odds": "[]"}
override = [f"{k}={v}" for k, v in views.items()]
p = phantoms.abdomen((48, 40, 36), seed=9)
(root/"val").mkdir()
write_volume(Volume(p.img.astype(np.int16), affine_from(p.spacing)), root/"val"/"p9.nii.gz")
done = train([scans], val=[root/"val"], out=root/"run", tiny=True, steps=24, device="cpu", overrides=override)
rows = [{k: float(v) for k, v in r.items() if v} for r in read_csv(root/"run"/"log.csv")]
plot.curves({k: [r[k] for r in rows] for k in ("fine", "coarse")}, xlabel="step", height=2)

# %%
[{k: round(v, 2) for k, v in r.items() if k.startswith("val_")} for r in rows if "val_loss" in r]

# %%
first, last = (np.mean([r["loss"] for r in part]) for part in (rows[:6], rows[-6:]))
net, about = load_embedder(root/"run", "cpu")
assert last < first and about.spacing == 4 and net.cfg.width == 16

# %% [markdown]
# Stopped twice and continued, a run ends with the same bytes. Other settings or scans are refused.

# %%
short = {"tiny": True, "steps": 4, "device": "cpu", "overrides": [*override, "fit.validate_every=2"]}
for name, stops in (("a", [None]), ("b", [1, 3, None])):
    for stop in stops: train([scans], out=root/name, stop_at=stop, **short)
assert all((root/"a"/f).read_bytes() == (root/"b"/f).read_bytes() for f in ("model.safetensors", "log.csv"))
with raises(DataError, match="other settings"): train([root/"val"], out=root/"a", **short)
with raises(ConfigError, match="this stage continues another one"):
    train(pairs=[scans], out=root/"c", preset="ct_mri_inter", tiny=True, dry_run=True)
place.__exit__(None, None, None)
