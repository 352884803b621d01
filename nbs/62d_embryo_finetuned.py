# %% [markdown]
# # A fine-tuned model, ready to draw
#
# > Reads runs, checkpoints, folders of diffusers and LoRA files back, with the words that the model was trained with.
#
# A model without its words is of little use: asked for "a t4 embryo" it draws anything if it was trained on
# "a photo of an embryo at phase t4". The record that [the run](62c_embryo_finetune.ipynb) leaves beside the weights
# says which words, phases and planes there were, and the base that additions belong to.

# %%
#| default_exp embryo.finetuned

# %%
#| export
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medvol_nb.checkpoints import load_checkpoint, load_weights
from medvol_nb.config import check_config
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, file_digest, fingerprint, read_json
from medvol_nb.embryo.diffusion import Denoiser
from medvol_nb.embryo.finetune import read_run
from medvol_nb.embryo.phases import PROMPT, FocalPlane, Phase, PromptTemplate, parse_prompt
from medvol_nb.embryo.plan import FinetuneConfig
from medvol_nb.embryo.tiny import encode_prompts, load_sd, resolve_model, weights_digest

# %%
import tempfile

import numpy as np
from PIL import Image

from medvol_nb import plot
from medvol_nb.core import raises
from medvol_nb.embryo.finetune import finetune
from medvol_nb.embryo.phases import PHASES
from medvol_nb.embryo.tiny import make_tiny_sd, sample, to_grey
from medvol_nb.phantoms import embryo_frame

# %% [markdown]
# ## Whatever a model can be
# `load_finetuned` reads a run folder, one of its checkpoints, a folder of diffusers, or a LoRA file with its base. It
# knows the words the model was trained with and refuses a phase it never saw.

# %%
#| export
@dataclass(frozen=True, eq=False)
class FineTuned:
    "A model that draws, with the words it understands"
    pipe: Any # StableDiffusionPipeline
    digest: str # of its weights
    about: Mapping[str, Any] # run.json, {} for models from elsewhere
    table: torch.Tensor | None = None # (n, tokens, width) learned conditions, None: it takes prompts
    rows: tuple[tuple[str, str], ...] = () # phase and plane of the table's rows

    def prompt(
        self,
        phase: Phase, # wanted
        plane: FocalPlane, # wanted
        prompt: str | None = None, # text or template; None: the one of training
    ) -> str: # as it is given to the model
        "The prompt for a phase, in the words of the training"
        if prompt is not None: return PromptTemplate(prompt, plane="{focal_plane}" in prompt).format(phase, plane)
        if given := self.about.get("instance_prompt"):
            try: trained = parse_prompt(given)[0]
            except ConfigError: return given
            if trained is phase: return given
            raise ConfigError(f"phase: this model was trained with the one prompt {given!r}, it cannot draw "
                              f"{phase.value}")
        if self.about.get("mode") == "caption" and not self.about.get("template"):
            raise ConfigError("prompt: this model was trained with captions of a form of their own; give the prompt "
                              "(--prompt)")
        text, with_plane = self.about.get("template") or (PROMPT, False)
        return PromptTemplate(text, with_plane).format(phase, plane)

    def condition(
        self,
        phase: Phase, # wanted
        plane: FocalPlane, # wanted
        prompt: str | None = None, # text or template; None: the one of training
    ) -> tuple[torch.Tensor, torch.Tensor, str]: # two arrays (tokens, width): condition and none; and the prompt
        "What the network gets for a phase"
        planes = self.about.get("pictures", {}).get("planes", [])
        if planes and plane.pretty not in planes:
            raise ConfigError(f"focal_plane: this model saw {', '.join(planes)}, not {plane.pretty}")
        if self.table is None:
            text = self.prompt(phase, plane, prompt)
            seen = self.about.get("pictures", {}).get("phases", [])
            if seen and phase.value not in seen: # one prompt for all (mode 'prompt') may name no phase at all
                raise ConfigError(f"phase: this model never saw {phase.value}, it was trained on {', '.join(seen)}")
            return *encode_prompts(self.pipe, [text, ""]), text
        for name in ((phase.value, plane.pretty), (phase.value, "")):
            if name not in self.rows: continue
            return self.table[self.rows.index(name)], self.table[0], f"class {' '.join(name)}".strip()
        known = ", ".join(" ".join(filter(None, r)) for r in self.rows[1:])
        raise ConfigError(f"phase: this model was trained on {known}, not on {phase.value} {plane.pretty}")

def _table_in(folder: Path) -> tuple[torch.Tensor | None, tuple]:
    if not (folder/"phase_embeddings.safetensors").exists(): return None, ()
    rows = tuple(tuple(r) for r in read_json(folder/"phase_embeddings.json")["rows"])
    return load_checkpoint(folder/"phase_embeddings.safetensors")["table"], rows

def latest_run(
    folder: str | os.PathLike, # holds run folders
) -> Path: # the one that was finished last
    "Newest complete run, by the time in its record"
    found = [(about["finished"], p.parent) for p in sorted(Path(folder).glob("*/run.json"))
             if (about := read_run(p.parent))["complete"]]
    if not found: raise MissingFile(f"{folder}: holds no complete run")
    return max(found)[1]

def load_finetuned(
    path: str | os.PathLike, # run folder, checkpoint of a run, folder of diffusers, hub name, or a LoRA file
    *,
    device: str = "auto", # where it goes
    base: str | os.PathLike | None = None, # base model, needed for a LoRA file; None: the one in the run's record
    local_files_only: bool = False, # never ask the hub
) -> FineTuned: # model, words, identity
    "Load a model to draw with"
    path, keys = Path(path), {"device": device, "local_files_only": local_files_only}
    run = path if (path/"run.json").exists() else path.parent.parent if path.parent.name == "checkpoints" else None
    if run is not None and (run/"run.json").exists(): return _load_run(run, path, base, keys)
    if path.is_file() and base is not None: # additions made by any program
        about = read_run(path.parent.parent) if (path.parent.parent/"run.json").exists() else {}
        digest = weights_digest(resolve_model(base, local_files_only=local_files_only))
        if about and digest != about["model"]["digest"]:
            raise DataError(f"{base}: is not the base that {path} was trained from, its weights differ")
        pipe = load_sd(base, **keys)
        try: pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as e:
            raise FormatError(f"{path}: does not fit as additions to {base}: {str(e).splitlines()[0][:160]}") from None
        return FineTuned(pipe, fingerprint([digest, file_digest(path)]), about,
                         *_table_in(path.parent))
    pipe = load_sd(path, **keys)
    about = read_run(path.parent) if path.name == "pipeline" and (path.parent/"run.json").exists() else {}
    digest = weights_digest(resolve_model(path, local_files_only=local_files_only))
    return FineTuned(pipe, digest, about, *_table_in(path))

def _load_run(run: Path, path: Path, base: Any, keys: Mapping[str, Any]) -> FineTuned:
    about = read_run(run)
    if path == run and not about["complete"]:
        raise DataError(f"{run}: this run is not complete. Run the same training again to finish it, or name one of "
                        f"its checkpoints in {run/'checkpoints'}")
    if path == run and (run/"pipeline").is_dir(): return load_finetuned(run/"pipeline", **keys)
    base = resolve_model(base if base is not None else about["model"]["path"],
                         local_files_only=keys["local_files_only"])
    if weights_digest(base) != about["model"]["digest"]:
        raise DataError(f"{base}: is not the base that {run} was trained from, its weights differ")
    file = run/"model.safetensors" if path == run else path
    pipe, saved = load_sd(base, **keys), load_checkpoint(file)
    state = saved["ema"]["shadow"] if saved.get("ema") else saved["model"]
    rows = tuple([("", ""), *map(tuple, about["classes"])]) if about["mode"] == "class" else ()
    table = nn.Parameter(state["table"].clone()) if rows else torch.zeros(1, 1, pipe.unet.config.cross_attention_dim)
    cfg = check_config(FinetuneConfig, about["settings"], f"{run}/run.json")
    net = Denoiser(pipe.unet, table, train=cfg.train, rank=cfg.rank, alpha=cfg.alpha)
    load_weights(net, state)
    net.eval().requires_grad_(False).to(pipe.device)
    digest = fingerprint([about["model"]["digest"], file_digest(file)])
    return FineTuned(pipe, digest, about, state["table"] if rows else None, rows)

# %% [markdown]
# ## The same picture, from the run and from its LoRA file
# A few steps of training on the pipeline that knows nothing. The model draws from the run folder, and from the LoRA
# file with its base; the two agree.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
for part in ("images", "descriptions"): (root/"few"/part).mkdir(parents=True)
for k, phase in enumerate(["t2", "tM"]*2):
    Image.fromarray(embryo_frame(PHASES.index(phase), 64, seed=k)).save(root/"few"/"images"/f"{k}.jpeg", quality=92)
    (root/"few"/"descriptions"/f"{k}.txt").write_text(PromptTemplate().format(phase) + "\n")
base = make_tiny_sd(root/"tiny")
common = {"model": str(base), "image_folder": root/"few", "output_dir": root/"runs", "device": "cpu", "lr": 1e-3,
          "max_train_steps": 4, "num_validation_images": 0, "batch_size": 2}
finetune(**common, run_name="few")
finetune(**common, run_name="part", stop_at=2)
run = root/"runs"/"few"
models = {"run": load_finetuned(run, device="cpu"), "LoRA file": load_finetuned(
    run/"lora"/"pytorch_lora_weights.safetensors", base=base, device="cpu")}
drawn = {}
for name, m in models.items():
    condition, empty, text = m.condition(Phase.tM, FocalPlane.F0)
    drawn[name] = to_grey(sample(m.pipe, condition, empty, [7], steps=5)[0])
plot.montage(list(drawn.values()), 2, list(drawn))

# %%
assert np.abs(drawn["run"].astype(int) - drawn["LoRA file"]).max() <= 1 and text.endswith("at phase tM")
assert latest_run(root/"runs") == run
with raises(DataError, match="not complete"): load_finetuned(root/"runs"/"part", device="cpu")
with raises(ConfigError, match="never saw t8"): m.condition(Phase.t8, FocalPlane.F0)
place.cleanup()
