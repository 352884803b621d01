# %% [markdown]
# # What a diffusion model learns from
#
# > Pictures as latent means and spreads, conditions as rows of a table, one loss, one module for all that is trained.
#
# A latent diffusion model is trained to find the noise in a noisy latent image, given a condition. Two of its networks
# never change in the process: the autoencoder and the text encoder. The usual scripts run them at every step all the
# same. Here each picture is encoded once, to a mean and a standard deviation for each latent value, and each distinct
# prompt once; sampling from these at every step is the same distribution. All chance (which crop, which noise, which
# time, whether the caption is dropped) is drawn with the item from its own named stream, so that an item does not
# depend on device, worker, or history. What the published scripts got wrong: the phase table of the class-conditioned
# trainer was never saved; captions were ignored; weights by signal-to-noise ratio and prior preservation together
# mixed up their shapes.

# %%
#| default_exp embryo.diffusion

# %%
#| export
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medvol_nb.checkpoints import seeded, torch_rng_for
from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, _read_text, file_digest, optional,
                            parse_json, progress, read_csv, read_json, rng_for)
from medvol_nb.embryo.folders import read_image_folder
from medvol_nb.embryo.phases import FocalPlane, Phase, parse_label, parse_prompt

# %%
import tempfile

from PIL import Image

from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises, write_json
from medvol_nb.embryo.phases import PHASES, PromptTemplate
from medvol_nb.embryo.tiny import encode_prompts, load_sd, make_tiny_sd
from medvol_nb.torchcore import Batches, FitConfig, fit

# %% [markdown]
# ## A folder of pictures
# Three layouts are common: `images/` with `descriptions/`, `images/` with `metadata.jsonl`, and pictures beside text
# files of the same name. [Image folders](61a_embryo_folders.ipynb) of this library bring a record, and
# `read_image_folder` compares them with it; others are read as they are. A caption is the whole text without its last
# line end. Phase and plane come from the record or from `metadata.csv`, else from captions of a known form. A folder
# that says it is synthetic is refused: a model trained on its own pictures is not what anybody wants by accident.

# %%
#| export
_SUFFIXES = (".jpg", ".jpeg", ".png")

@dataclass(frozen=True)
class Pictures:
    "Training pictures with what is known about them"
    root: Path # folder
    files: tuple[Path, ...] # pictures, in order of their numbers
    captions: tuple[str, ...] | None # one a picture; None: there are none
    classes: tuple[tuple[Phase, FocalPlane | None] | None, ...] # phase and plane of each picture, where known
    about: Mapping[str, Any] = field(default_factory=dict) # content of folder.json, without its list of pictures
    def __len__(self) -> int: return len(self.files)
    @property
    def phases(self) -> list[str]: return sorted({c[0].value for c in self.classes if c}, key=[*_ORDER].index)

_ORDER = {p.value: p.idx() for p in Phase}

def picture_number(
    path: Path, # such as img10.jpeg
) -> tuple[int, str]: # what to sort by
    "img2 before img10"
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits[:18]) if digits else -1, path.name)

def _captions(root: Path, files: Sequence[Path]) -> list[str] | None:
    if (root/"metadata.jsonl").exists():
        rows = [parse_json(line, f"{root/'metadata.jsonl'}, line {n}") for n, line in
                enumerate(_read_text(root/"metadata.jsonl", 2**28).split("\n"), 1) if line.strip()]
        try: texts = {Path(r["file_name"]).name: r["text"] for r in rows}
        except (KeyError, TypeError): raise FormatError(f"{root/'metadata.jsonl'}: file_name and text needed") from None
        found = [texts.get(f.name) for f in files]
    else:
        beside = root/"descriptions" if (root/"descriptions").is_dir() else files[0].parent
        texts = [beside/f"{f.stem}.txt" for f in files]
        found = [_read_text(t, 2**16).removesuffix("\n") if t.exists() else None for t in texts]
    if not any(found): return None
    if lacking := [f.name for f, c in zip(files, found) if not isinstance(c, str) or not c.strip()]:
        raise DataError(f"{root}: {len(lacking)} of {len(files)} pictures have no caption, first {lacking[0]}. Add "
                        "them, or use one prompt for all")
    return found

def _classes(root: Path, files: Sequence[Path], captions: Sequence[str] | None) -> list:
    table: dict[str, tuple[Phase, FocalPlane | None]] = {}
    if (root/"metadata.csv").exists():
        for row in read_csv(root/"metadata.csv", ("filename", "phase")):
            plane = parse_label(row["label"])[0] if row.get("label") else None
            table[row["filename"]] = (Phase.parse(row["phase"]), plane)
    out = []
    for k, f in enumerate(files):
        found = table.get(f.name)
        if found is None and captions is not None:
            try: found = parse_prompt(captions[k])
            except ConfigError: pass
        out.append(found)
    return out

def read_pictures(
    folder: str | os.PathLike, # image folder in any of the three layouts
    *,
    allow_synthetic: bool = False, # take generated pictures, too
) -> Pictures: # at least one
    "List the pictures of a folder with captions, phases and planes; nothing is decoded"
    root = Path(folder)
    if not root.is_dir(): raise MissingFile(f"image folder {root} does not exist")
    place = root/"images" if (root/"images").is_dir() else root
    files = sorted((p for p in place.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")),
                   key=picture_number)
    if not files: raise DataError(f"image folder {root}: no {', '.join(_SUFFIXES)} files in {place}")
    notes = [read_json(p, 2**24) for p in (root/"metadata.json", place/"metadata.json") if p.exists()]
    if not allow_synthetic and any(isinstance(n, dict) and n.get("synthetic") for n in notes):
        raise DataError(f"image folder {root} holds synthetic pictures, as its metadata.json says. Name a folder of "
                        "real ones, or ask for it with allow_synthetic")
    if (root/"folder.json").exists():
        items, about = read_image_folder(root), read_json(root/"folder.json")
        return Pictures(root, tuple(i.path for i in items), tuple(i.prompt for i in items),
                        tuple((i.phase, i.plane) if i.phase else None for i in items),
                        {k: v for k, v in about.items() if k != "items"})
    captions = _captions(root, files)
    classes = _classes(root, files, captions)
    return Pictures(root, tuple(files), None if captions is None else tuple(captions), tuple(classes))

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
(root/"few"/"images").mkdir(parents=True)
(root/"few"/"descriptions").mkdir()
for k, phase in enumerate(["t2", "t4", "tM", "tB"]*3):
    frame = phantoms.embryo_frame(PHASES.index(phase), 80, seed=k)
    Image.fromarray(frame).save(root/"few"/"images"/f"{k}.jpeg", quality=92)
    (root/"few"/"descriptions"/f"{k}.txt").write_text(PromptTemplate().format(phase) + "\n")
few = read_pictures(root/"few")
len(few), few.phases, few.captions[0], few.classes[2], few.files[-1].name

# %%
assert [f.stem for f in few.files] == [str(k) for k in range(12)]
(root/"few"/"descriptions"/"3.txt").unlink()
with raises(DataError, match="1 of 12 pictures have no caption, first 3.jpeg"): read_pictures(root/"few")
(root/"few"/"descriptions"/"3.txt").write_text(PromptTemplate().format("tB") + "\n")
write_json(root/"few"/"metadata.json", {"synthetic": True})
with raises(DataError, match="holds synthetic pictures"): read_pictures(root/"few")
(root/"few"/"metadata.json").unlink()

# %% [markdown]
# ## From file to pixels
# The shorter side is scaled to the resolution and the middle is cut out, as in the reference. On square pictures
# nothing is cut. A damaged file is an error with its name, not a picture that is grey below the place of the damage.
# An embryo has no upright position, so the eight flips and quarter turns may be used as well.

# %%
#| export
def read_pixels(
    path: str | os.PathLike, # picture
    resolution: int, # of the shorter side [pixel]
) -> np.ndarray: # (row, column, 3) uint8
    "Decode a picture and scale it"
    from PIL import Image
    try:
        with Image.open(path) as img:
            if img.mode.startswith(("I", "F")): raise ValueError(f"{img.mode} pixels, 8 bit are needed")
            img = img.convert("RGB")
            w, h = img.size
            k = resolution/min(w, h)
            if k != 1: img = img.resize((max(resolution, round(w*k)), max(resolution, round(h*k))), Image.BILINEAR)
            return np.asarray(img)
    except FileNotFoundError: raise MissingFile(f"picture {path} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(f"picture {path} cannot be read: {e}. Remove or replace it") from None

def turned(
    x: np.ndarray, # (row, column, ...) square
    variant: int, # 0...7; 0 leaves it as it is
) -> np.ndarray: # (row, column, ...)
    "One of the eight flips and quarter turns"
    x = np.rot90(x, variant % 4)
    return np.ascontiguousarray(x[:, ::-1] if variant >= 4 else x)

def cut(
    x: np.ndarray, # (row, column, 3) with a side of `size`
    size: int, # of the square [pixel]
    at: float = 0.5, # place along the longer side, 0...1
) -> np.ndarray: # (size, size, 3)
    "Square piece of a picture"
    i, j = (round(at*(n - size)) for n in x.shape[:2])
    return x[i:i + size, j:j + size]

# %%
pixels = read_pixels(few.files[1], 64)
plot.montage([turned(pixels, v) for v in range(8)], 8, title="eight variants")

# %%
assert pixels.shape == (64, 64, 3) and len({turned(pixels, v).tobytes() for v in range(8)}) == 8
assert cut(np.zeros((64, 96, 3)), 64, 1.0).shape == (64, 64, 3)
broken = root/"broken.jpeg"
broken.write_bytes(few.files[0].read_bytes()[:-400])
with raises(DataError, match="broken.jpeg cannot be read"): read_pixels(broken, 64)

# %% [markdown]
# ## Latent pictures, encoded once
# The autoencoder gives every latent value a mean and a standard deviation. Both are kept in memory, for each variant
# that will be used: 128 KiB for a picture of 512 pixels. The autoencoder is not needed after that. Where pictures are
# cut at random places there is nothing to keep: `Raw` then hands out pixels, and they are encoded in every step.

# %%
#| export
def latent_stats(
    vae: nn.Module, # AutoencoderKL
    pixels: torch.Tensor, # (b, 3, row, column) float32 in [-1, 1], on its device
) -> tuple[torch.Tensor, torch.Tensor]: # two arrays (b, c, row, column): mean and standard deviation, scaled
    "Distribution of the latent values of pictures"
    with torch.no_grad(): dist = vae.encode(pixels.to(vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return dist.mean.float()*scale, dist.std.float()*scale

def _tensor(x: np.ndarray) -> np.ndarray:
    "(3, row, column) float32 in [-1, 1]"
    return np.ascontiguousarray(np.moveaxis(x, -1, 0), np.float32)/np.float32(127.5) - np.float32(1)

@dataclass(frozen=True, eq=False)
class Latents:
    "Pictures as latent means and standard deviations"
    stats: np.ndarray # (n, variant, 2, c, row, column) float32
    def __len__(self) -> int: return len(self.stats)
    def draw(
        self,
        i: int, # picture
        rng: np.random.Generator, # of the item
    ) -> np.ndarray: # (2, c, row, column) mean and standard deviation
        "Distribution of one variant of a picture"
        return self.stats[i, rng.integers(self.stats.shape[1])]

@dataclass(frozen=True, eq=False)
class Raw:
    "Pictures as pixels, for training without stored latents"
    files: Sequence[Path] # pictures
    resolution: int # [pixel]
    variants: int = 1 # 1, or 8 with flips and turns
    random_crop: bool = False # cut at a random place instead of the middle
    def __len__(self) -> int: return len(self.files)
    def draw(
        self,
        i: int, # picture
        rng: np.random.Generator, # of the item
    ) -> np.ndarray: # (3, row, column) float32 in [-1, 1]
        "Pixels of one variant of a picture"
        variant = int(rng.integers(self.variants))
        at = rng.random() if self.random_crop else 0.5
        return _tensor(turned(cut(read_pixels(self.files[i], self.resolution), self.resolution, at), variant))

def encode_pictures(
    vae: nn.Module, # AutoencoderKL, on the device that shall do it
    files: Sequence[Path], # pictures
    resolution: int, # [pixel]
    *,
    variants: int = 1, # 1, or 8 with flips and turns
) -> Latents: # of all pictures
    "Encode every picture once"
    device, out = next(vae.parameters()).device, []
    for f in progress(files, "encoding", unit="picture"):
        x = cut(read_pixels(f, resolution), resolution)
        batch = torch.from_numpy(np.stack([_tensor(turned(x, v)) for v in range(variants)])).to(device)
        out.append(torch.stack([torch.stack(latent_stats(vae, b[None]), 1)[0] for b in batch]).cpu().numpy())
    return Latents(np.stack(out))

def picture_digests(
    files: Sequence[Path], # pictures
) -> list[str]: # one hash a picture
    "What a set of pictures is, whatever its place is called"
    return [file_digest(f) for f in files]

# %%
tiny = make_tiny_sd(root/"tiny", channels=(32, 32))
pipe = load_sd(tiny, device="cpu")
known = encode_pictures(pipe.vae, few.files, 64)
raw = Raw(few.files, 64)
known.stats.shape, f"spread of the means {known.stats[:, :, 0].std():.2f}"

# %%
again = torch.from_numpy(raw.draw(3, rng_for(0)))[None]
assert close(torch.stack(latent_stats(pipe.vae, again), 1)[0], known.draw(3, rng_for(0)), 1e-5)
assert 0.5 < known.stats[:, :, 0].std() < 2

# %% [markdown]
# ## The noise
# At time $t$ the latent image is $z_t = \sqrt{a_t}\,z + \sqrt{1-a_t}\,\varepsilon$ (Ho et al., *Denoising diffusion
# probabilistic models*, NeurIPS 2020). The network answers with $\varepsilon$ or with the velocity
# $\sqrt{a_t}\,\varepsilon - \sqrt{1-a_t}\,z$; the model's scheduler says which. Weighting by the signal-to-noise ratio
# $s = a/(1-a)$ limits the easy times: $\min(s, \gamma)/s$ for noise, $\min(s,\gamma)/(s+1)$ for velocity (Hang et al.,
# *Efficient diffusion training via min-SNR weighting strategy*, ICCV 2023).

# %%
#| export
@dataclass(frozen=True, eq=False)
class Noise:
    "How noisy a time is, and what the network is asked for"
    alphas: torch.Tensor # (times,) float32, cumulative products
    kind: str = "epsilon" # or 'v_prediction'

    @classmethod
    def of(cls, scheduler: Any) -> "Noise":
        "The noise of a pipeline's scheduler"
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ConfigError(f"model: prediction type {kind!r} is not supported (epsilon, v_prediction)")
        return cls(scheduler.alphas_cumprod.float().clone(), kind)

    def at(
        self,
        t: torch.Tensor, # (b,) integer times
    ) -> torch.Tensor: # (b, 1, 1, 1)
        "The alphas of times"
        return self.alphas.to(t.device)[t][:, None, None, None]

    def add(
        self,
        z: torch.Tensor, # (b, c, row, column)
        noise: torch.Tensor, # (b, c, row, column) standard normal
        t: torch.Tensor, # (b,) integer times
    ) -> tuple[torch.Tensor, torch.Tensor]: # two arrays (b, c, row, column): noisy latents, and the right answer
        "Noisy latents and what the network should say"
        a = self.at(t)
        target = noise if self.kind == "epsilon" else a.sqrt()*noise - (1 - a).sqrt()*z
        return a.sqrt()*z + (1 - a).sqrt()*noise, target

    def weights(
        self,
        t: torch.Tensor, # (b,) integer times
        gamma: float | None, # largest ratio that counts; None: all weights are 1
    ) -> torch.Tensor: # (b,) float32
        "Weights of times by their signal-to-noise ratio"
        a = self.at(t).flatten()
        if gamma is None: return torch.ones_like(a)
        snr = a/(1 - a).clamp_min(1e-12)
        if self.kind == "v_prediction": return snr.clamp_max(gamma)/(snr + 1)
        return torch.where(snr < gamma, torch.ones_like(snr), gamma/snr.clamp_min(1e-12))

# %%
noise = Noise.of(pipe.scheduler)
plot.curves({f"gamma {g}": noise.weights(torch.arange(1000), g).numpy() for g in (1, 5, 20)}, xlabel="time",
            ylabel="weight", height=2)

# %%
from diffusers import DDPMScheduler

peer, t = DDPMScheduler.from_config(pipe.scheduler.config), torch.tensor([0, 500, 999])
z, e = (torch.from_numpy(rng_for(k).standard_normal((3, 4, 8, 8), np.float32)) for k in (1, 2))
assert close(noise.add(z, e, t)[0], peer.add_noise(z, e, t), 1e-5)
assert close(Noise(noise.alphas, "v_prediction").add(z, e, t)[1], peer.get_velocity(z, e, t), 1e-5)

# %% [markdown]
# ## Conditions as rows of a table
# Row 0 is "no condition": the empty prompt, or a vector of its own. In the text modes the rows are encoded prompts and
# stay as they are. In the mode `class` they are learned: one row for each phase (and plane), `n_tokens` vectors each.
# This is the class-conditioned trainer of the reference, finished: the width is the model's, gradients are clipped with
# the rest, the table is part of what is saved, and since row 0 is learned by dropping conditions, guidance works.
#
# `Denoiser` puts network and table into one module for `fit`, and its state holds what is trained, nothing else: a
# LoRA checkpoint (Hu et al., *LoRA: low-rank adaptation of large language models*, ICLR 2022) has megabytes, not
# gigabytes.

# %%
#| export
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

def learned_table(
    n: int, # rows, the first is "no condition"
    n_tokens: int, # vectors a row
    width: int, # of a vector
    seed: int = 0, # of the first values
) -> nn.Parameter: # (n, n_tokens, width)
    "Fresh table for learned conditions"
    return nn.Parameter(torch.randn((n, n_tokens, width), generator=torch_rng_for(seed, "table")))

class Denoiser(nn.Module):
    "A denoising network with its table of conditions; `state_dict` holds the trained part"
    def __init__(
        self,
        unet: nn.Module, # UNet2DConditionModel; trained in place
        table: torch.Tensor, # (n, tokens, width); trained if it is a parameter
        *,
        train: str = "lora", # 'lora' or 'full'
        rank: int = 4, # of the additions
        alpha: float | None = None, # their scale times `rank`; None: `rank`
        seed: int = 0, # of the additions' first values
    ):
        super().__init__()
        if train not in ("lora", "full"): raise ConfigError(f"train: must be 'lora' or 'full', got {train!r}")
        if table.shape[-1] != unet.config.cross_attention_dim:
            raise DataError(f"conditions have width {table.shape[-1]}, the network takes "
                            f"{unet.config.cross_attention_dim}")
        if isinstance(table, nn.Parameter): self.table = table
        else: self.register_buffer("table", table.detach().clone(), persistent=False)
        self.unet, self.train_mode = unet.float(), train
        unet.requires_grad_(train == "full")
        if train == "lora":
            peft = optional("peft", extra="gen")
            with seeded(seed, "lora"):
                unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian",
                                                 target_modules=list(LORA_TARGETS)))

    def forward(
        self,
        z: torch.Tensor, # (b, c, row, column) noisy latents
        t: torch.Tensor, # (b,) times
        rows: torch.Tensor, # (b,) of the table
    ) -> torch.Tensor: # (b, c, row, column)
        "What the network says"
        return self.unet(z, t, self.table[rows]).sample

    def _trained(self) -> set[str]: return {k for k, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        "The trained tensors"
        keep = self._trained()
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in keep}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False) -> Any:
        "Load trained tensors; what is frozen stays"
        if strict and (odd := self._trained() ^ state.keys()):
            raise DataError(f"weights do not fit the model: {len(odd)} names differ, first {min(odd)}")
        return super().load_state_dict(state, strict=False, assign=assign)

# %%
prompts = ["", *dict.fromkeys(few.captions)]
rows = [prompts.index(c) for c in few.captions]
small = Denoiser(load_sd(tiny, device="cpu").unet, encode_prompts(pipe, prompts), rank=4)
own = sum(v.numel() for v in small.state_dict().values())
f"{own:,} of {sum(p.numel() for p in small.parameters()):,} weights are trained", len(small.state_dict())

# %%
with torch.no_grad():
    before, plain_answer = small(z, t, torch.tensor([1, 2, 3])), pipe.unet(z, t, small.table[1:4]).sample
assert close(before, plain_answer, 1e-5) and "table" not in small.state_dict()
with raises(DataError, match="names differ"): small.load_state_dict({})
with raises(DataError, match="width 16, the network takes 32"): Denoiser(pipe.unet, torch.zeros(2, 4, 16))

# %% [markdown]
# ## An item, and the loss
# An item carries everything that one step needs, drawn from the item's stream. With prior preservation (Ruiz et al.,
# *DreamBooth*, CVPR 2023) it holds a second picture, made by the base model before training, on a second axis: each
# half keeps its own noise, time and weight, and the loss is the first plus $w$ times the second.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Items:
    "Training items: a picture, perhaps a class picture, noise, time and condition"
    pictures: Latents | Raw # of the data
    rows: Sequence[int] # row of the table for each picture
    cells: tuple[int, int, int] # (c, row, column) of a latent picture
    names: Sequence[str] = () # of the pictures, for messages
    repeats: int = 1 # how often a picture comes in an epoch, with other noise each time
    prior: Latents | Raw | None = None # class pictures
    prior_row: int = 0 # their row of the table
    dropout: float = 0.0 # share of items whose condition is row 0
    times: int = 1000 # of the scheduler
    offset: float = 0.0 # noise that is the same all over a channel
    def __len__(self) -> int: return len(self.pictures)*self.repeats
    @property
    def keys(self) -> list[str]: return [*self.names]*self.repeats
    def draw(
        self,
        i: int, # picture
        rng: np.random.Generator, # of the item
    ) -> dict[str, np.ndarray]: # arrays with a first axis of 1, or 2 with a class picture
        "Everything of one step that is due to chance"
        i %= len(self.pictures)
        pictures, rows = [self.pictures.draw(i, rng)], [0 if rng.random() < self.dropout else self.rows[i]]
        if self.prior is not None:
            pictures.append(self.prior.draw(int(rng.integers(len(self.prior))), rng))
            rows.append(self.prior_row)
        n = len(rows)
        noise = rng.standard_normal((n, *self.cells), np.float32)
        if self.offset: noise += np.float32(self.offset)*rng.standard_normal((n, self.cells[0], 1, 1), np.float32)
        return {"picture": np.stack(pictures), "rows": np.array(rows), "noise": noise,
                "spread": rng.standard_normal((n, *self.cells), np.float32), "t": rng.integers(0, self.times, n)}

def diffusion_loss(
    noise: Noise, # of the scheduler
    *,
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None, # pixels -> statistics, for items without latents
    prior_weight: float = 1.0, # of class pictures
    snr_gamma: float | None = None, # limit of the signal-to-noise weights; None: no weights
) -> Callable[[nn.Module, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]: # loss for `fit`
    "Mean squared error of the predicted noise or velocity"
    def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        b, halves = batch["t"].shape
        flat = {k: v.flatten(0, 1) for k, v in batch.items()}
        stats = flat["picture"] if encode is None else encode(flat["picture"])
        z = stats[:, 0] + stats[:, 1]*flat["spread"]
        noisy, target = noise.add(z, flat["noise"], flat["t"])
        error = (model(noisy, flat["t"], flat["rows"]).float() - target).square().mean((1, 2, 3))
        each = (error*noise.weights(flat["t"], snr_gamma)).view(b, halves).mean(0)
        if halves == 1: return {"loss": each[0]}
        return {"loss": each[0] + prior_weight*each[1], "instance_loss": each[0], "prior_loss": each[1]}
    return loss

def pixel_encoder(
    vae: nn.Module, # AutoencoderKL, on the device of the training
) -> Callable[[torch.Tensor], torch.Tensor]: # (b, 3, row, column) -> (b, 2, c, row, column)
    "Encode the pictures of a step"
    return lambda pixels: torch.stack(latent_stats(vae, pixels), 1)

# %%
items = Items(known, rows, (4, 8, 8), dropout=0.1)
batch = next(Batches(items, 4, seed=3).epoch(0))[1]
value = diffusion_loss(noise)(small, batch)
{k: tuple(v.shape) for k, v in batch.items()}, f"{value['loss'].item():.3f}"

# %%
from_pixels = next(Batches(Items(raw, rows, (4, 8, 8), dropout=0.1), 4, seed=3).epoch(0))[1]
assert torch.equal(batch["noise"], from_pixels["noise"])
uncached = diffusion_loss(noise, encode=pixel_encoder(pipe.vae))(small, from_pixels)
assert close(uncached["loss"].item(), value["loss"].item(), 1e-4)
both = next(Batches(Items(known, rows, (4, 8, 8), prior=known), 2, seed=3).epoch(0))[1]
parts = diffusion_loss(noise, prior_weight=0.5, snr_gamma=5.0)(small, both)
assert close(parts["loss"].item(), (parts["instance_loss"] + 0.5*parts["prior_loss"]).item())

# %% [markdown]
# ## Is the condition really used?
# A model can draw good embryos and ignore the prompt. The swap test tells: the loss with the wrong condition divided by
# the loss with the right one, at fixed noise and late times. It is 1 for a model that does not listen.

# %%
#| export
def fixed_batches(
    items: Items, # to be looked at
    seed: int, # names the draws
    batch_size: int = 8, # items at a time
    rounds: int = 1, # draws of each picture
) -> Iterator[dict[str, torch.Tensor]]: # batches of `items`, always the same
    "The same noise, times and variants at every call"
    drawn = [(i, r) for r in range(rounds) for i in range(len(items))]
    for k in range(0, len(drawn), batch_size):
        yield torch.utils.data.default_collate(
            [items.draw(i, rng_for(seed, "fixed", i, r)) for i, r in drawn[k:k + batch_size]])

def swap_ratio(
    model: nn.Module, # in evaluation mode
    items: Items, # pictures of several conditions
    noise: Noise, # of the scheduler
    *,
    seed: int = 0, # names the draws
    rounds: int = 8, # draws of each picture
    late: int = 400, # earliest time that counts
) -> float: # 1: the condition is ignored
    "Loss with a wrong condition divided by the loss with the right one"
    conditions, sums, loss = sorted(set(items.rows)), [0.0, 0.0], diffusion_loss(noise)
    if len(conditions) < 2: raise DataError("swap_ratio: needs pictures of at least two conditions")
    follower = dict(zip(conditions, conditions[1:] + conditions[:1]))
    for batch in fixed_batches(items, seed, rounds=rounds):
        batch["t"] = late + batch["t"] % (len(noise.alphas) - late)
        wrong = torch.tensor([[follower.get(int(r), int(r)) for r in row] for row in batch["rows"]])
        with torch.no_grad():
            for k, rows in enumerate((batch["rows"], wrong)):
                sums[k] += float(loss(model, {**batch, "rows": rows})["loss"])*len(rows)
    return sums[1]/sums[0]

# %% [markdown]
# Two flat grey pictures, two learned conditions, ninety steps:

# %%
for k, grey in enumerate((51, 204)): Image.fromarray(np.full((64, 64), grey, np.uint8)).save(root/f"flat-{k}.png")
flat = encode_pictures(pipe.vae, [root/"flat-0.png", root/"flat-1.png"], 64)
listener = Denoiser(load_sd(tiny, device="cpu").unet, learned_table(3, 4, 32), train="full")
pair = Items(flat, [1, 2], (4, 8, 8), repeats=8)
settings = FitConfig(steps=90, lr=3e-3, schedule="constant", clip_norm=1.0, seed=1, device="cpu")
deaf = swap_ratio(listener.eval(), pair, noise, rounds=1)
result = fit(listener, Batches(pair, 8, seed=1), diffusion_loss(noise), settings, out_dir=root/"run")
heard = swap_ratio(listener.eval(), pair, noise, rounds=1)
plot.curves({"loss": [float(r["loss"]) for r in result.log]}, xlabel="step", height=2,
            title=f"wrong / right condition: {deaf:.2f} before, {heard:.2f} after")

# %%
assert abs(deaf - 1) < 0.2 and heard > 1.15
with raises(DataError, match="two conditions"): swap_ratio(listener, Items(flat, [1, 1], (4, 8, 8)), noise)
place.cleanup()
