# %% [markdown]
# # All stages
#
# > From CT scans, organ masks and unregistered CT-MR pairs to a network for both modalities, with one call.
#
# The published method has four trainings, and between the last two a registration of every pair with the network so
# far. Its manual asks the user to copy a checkpoint's path into a configuration, to edit the sampler, to compile a
# program whose source was never published, and to run a script with absolute paths; whoever forgets the first of these
# trains the last stage from photographs. Here the stages are a list. Each one reads what the one before left, each can
# be interrupted, and the same call goes on where it stopped.

# %%
#| default_exp embed.pipeline

# %%
#| export
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medvol_nb.core import ConfigError, log, write_json
from medvol_nb.embed.prepare import prepare
from medvol_nb.embed.register import register
from medvol_nb.embed.train import train
from medvol_nb.parallel import BatchError

# %%
import numpy as np

from medvol_nb import phantoms
from medvol_nb.core import raises, read_json, tmpdir
from medvol_nb.embed.model import load_embedder
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.volume import write_volume

# %% [markdown]
# ## Which stages
# What is given decides: CT scans give AnatSAM, organ masks AnatSAM++ on top of it, pairs Cross-SAM on top of whatever
# there is. Pairs are trained on twice. First each image for itself, with wild contrast. Then they are registered, the
# network giving the first guess, and the key of an MR voxel becomes the CT voxel at the same place. `rounds=2`
# registers and trains once more with the better network.

# %%
#| export
def plan_stages(
    scans: Sequence[str] = (), # folders of prepared CT
    organs: Sequence[str] = (), # folders of prepared CT with organ masks
    pairs: str | None = None, # folder of CT and MR pairs, not registered
    rounds: int = 1, # registrations of the pairs, each with a training after it
) -> list[tuple[str, str]]: # (name of the stage, what it does: a preset, 'prepare' or 'register')
    "Which stages follow from what is there"
    if rounds < 1: raise ConfigError(f"rounds: must be >= 1, got {rounds}")
    out = [("sam", "sam_NIHLN")] if scans else []
    if organs:
        if not scans: raise ConfigError("organs: SAM++ also needs scans for views")
        out.append(("sampp", "samv2_NIHLN"))
    if pairs is not None:
        out += [("pairs", "prepare"), ("intra", "ct_mri_intra")]
        for k in range(1, rounds + 1):
            out += [(f"registered{k}", "register"), (f"prepared{k}", "prepare"), (f"inter{k}", "ct_mri_inter")]
    if not out: raise ConfigError("no stage: give scans, or pairs")
    return out

# %%
plan_stages(["ct"], ["organs"], "pairs", rounds=2)

# %%
assert plan_stages(pairs="p") == [("pairs", "prepare"), ("intra", "ct_mri_intra"), ("registered1", "register"),
                                  ("prepared1", "prepare"), ("inter1", "ct_mri_inter")]
with raises(ConfigError, match="no stage"): plan_stages()
with raises(ConfigError, match="also needs scans"): plan_stages(organs=["o"])

# %% [markdown]
# ## Running them
# Each stage has its folder under `out`. A pair that cannot be registered is left out, and `failed.csv` in its folder
# says why; only when none is left does the pipeline stop. A stage of AnatSAM has two heads, the following ones three:
# the third starts from random weights, the rest from the stage before.

# %%
#| export
def _tolerant(call: Callable[..., Any], dst: Path, *args: Any, **options: Any) -> None:
    "Go on with what could be done, unless that is nothing"
    try: call(*args, **options)
    except BatchError as e:
        if len(e.failures) >= e.total: raise
        log.warning("%s: %d of %d pairs are left out, see failed.csv", dst.name, len(e.failures), e.total)

def train_stages(
    out: str | os.PathLike, # folder of the stages; created
    *,
    scans: Sequence[str] = (), # folders of prepared CT (`medvol embedding prepare`)
    organs: Sequence[str] = (), # folders of prepared CT with organ masks
    pairs: str | None = None, # folder of CT and MR pairs, <id>_0000 and <id>_0001, not registered
    rounds: int = 1, # registrations of the pairs, each with a training after it
    tiny: bool = False, # small networks: for a CPU
    steps: int | None = None, # optimiser steps of each training; default: as published
    overrides: Sequence[str] = (), # settings to change in all trainings, 'fit.lr=1e-3'
    start_from: str | os.PathLike | None = None, # weights that the first training begins with
    spacing: float = 1.6, # voxel size of prepared pairs [mm]
    deformable: bool = True, # register pairs with a field, not only an affine map
    register_spacing: float = 2.0, # of the registration's grid [mm]
    max_angle: float = 30.0, # largest rotation that the registration looks for [degree]
    device: str = "auto", # where networks run
    workers: int = 0, # loading and preparing processes
) -> dict: # folder of the last network, and the stages
    "Train all stages of an anatomical embedding, registering pairs in between; goes on where it stopped"
    out, last, raw = Path(out), None if start_from is None else Path(start_from), pairs
    stages = plan_stages(scans, organs, pairs, rounds)
    out.mkdir(parents=True, exist_ok=True)
    common = {"tiny": tiny, "steps": steps, "device": device, "workers": workers, "overrides": list(overrides)}
    ready = out/"pairs"
    for name, what in stages:
        folder = out/name
        log.info("stage %s: %s", name, what)
        if what == "prepare":
            _tolerant(prepare, folder, raw, folder, kind="pairs", spacing=spacing, workers=workers)
            ready = folder
        elif what == "register":
            _tolerant(register, folder, Path(pairs), folder, embedder=last, deformable=deformable,
                      spacing=register_spacing, max_angle=max_angle, device=device)
            raw = folder
        else:
            views, registered = {"ct_mri_intra": ([ready], ()), "ct_mri_inter": ((), [ready])}.get(what, (scans, ()))
            train(views, organs=organs if what == "samv2_NIHLN" else (), pairs=registered, out=folder, preset=what,
                  start_from=last, **common)
            last = folder
        write_json(out/"stages.json", {"stages": [s[0] for s in stages], "done": name, "network": str(last)},
                   "overwrite")
    return {"network": str(last), "stages": [s[0] for s in stages]}

# %% [markdown]
# A phantom as CT and as an MR that lies elsewhere, and the smallest settings that go through all stages:

# %%
place = tmpdir()
root = place.__enter__()
p = phantoms.abdomen((40, 32, 36), seed=0)
mr = np.where(p.img > -500, 400 - np.abs(p.img - 60), 0)
for name, img, shift in (("ct/p0", p.img, 0), ("raw/p0_0000", p.img, 0), ("raw/p0_0001", mr, 12)):
    (root/name).parent.mkdir(exist_ok=True)
    write_volume(Volume(img.astype(np.int16), affine_from(p.spacing, (shift, 0, -shift))), root/f"{name}.nii.gz")
least = ["spacing=8", "views.patch=[8,16,16]", "pairs_crop=[16,32,32]", "model.width=8", "model.emb=8", "loss.hard=100",
         "loss.negatives=20", "loss.positive_mm=8", "fit.tensorboard=false", "views.rule=sample"]
how = {"scans": [str(root/"ct")], "pairs": str(root/"raw"), "tiny": True, "steps": 2, "overrides": least,
       "spacing": 8.0, "deformable": False, "register_spacing": 8.0, "max_angle": 10.0, "device": "cpu"}
done = train_stages(root/"out", **how)
done["stages"], load_embedder(done["network"], "cpu")[1].name

# %% [markdown]
# Each training began with the weights before it, and a second call finds everything done:

# %%
starts = {s: read_json(root/"out"/s/"fit.json")["config"]["start"] for s in ("sam", "intra", "inter1")}
weights = (root/"out"/"inter1"/"model.safetensors").read_bytes()
again = train_stages(root/"out", **how)
assert again == done and (root/"out"/"inter1"/"model.safetensors").read_bytes() == weights
assert starts["sam"] == "" and len({*starts.values()}) == 3
place.__exit__(None, None, None)
starts
