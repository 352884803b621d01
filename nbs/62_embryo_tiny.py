# %% [markdown]
# # A real pipeline of five megabytes, and how real ones are loaded
#
# > Stable Diffusion in miniature for tests and lessons, loading without surprises, and images that belong to a seed.
#
# A latent diffusion model (Rombach et al., *High-resolution image synthesis with latent diffusion models*, CVPR 2022)
# is four networks and a table of words. The public ones have a billion weights, need a network connection, and vanish:
# the base model of the published embryo work was removed from its hub in November 2025. So that every line of the
# following pages can be run by everybody, this page makes a pipeline of the same classes with 1.3 million random
# weights. It knows nothing, but it trains, saves, loads and draws like the large ones. The second half loads any such
# pipeline and refuses what would fail later, above all a tokenizer that quietly maps every prompt to the same numbers.

# %%
#| default_exp embryo.tiny

# %%
#| export
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from medvol_nb.checkpoints import device_for, seeded, torch_rng_for
from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, atomic, check_output,
                            file_digest, fingerprint, optional, read_json, remove_tree)
from medvol_nb.embryo.phases import PHASES, FocalPlane, PromptTemplate
from medvol_nb.phantoms import embryo_frame
from medvol_nb.torchcore import Batches, FitConfig, fit

# %%
import shutil
import tempfile

from medvol_nb import plot
from medvol_nb.core import human_bytes, raises, write_json

# %% [markdown]
# ## Importing quietly
# The two libraries announce things that are none of a user's business (a missing image library that is not used here)
# and draw their own progress bars. They are part of the extra `gen`, and they are imported when needed: together they
# take seconds.

# %%
#| export
def quiet_diffusers() -> ModuleType: # the package `diffusers`
    "Import diffusers and transformers without their announcements and progress bars"
    transformers = optional("transformers", extra="gen")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers = optional("diffusers", extra="gen")
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    return diffusers

# %%
sd = quiet_diffusers()
sd.__name__

# %% [markdown]
# ## Words
# CLIP's tokenizer lowers the case, splits words, digits and signs, and joins frequent pairs of letters. Trained on the
# 112 sentences that name a phase and a plane, it spends 23 numbers on the longest of them; 77 is the limit. The order
# of its vocabulary is that of the published one: bytes, bytes that end a word, joined pairs, then start and end.

# %%
#| export
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

def embryo_prompts() -> list[str]: # 112 sentences
    "A prompt for every phase and plane"
    return [PromptTemplate(plane=True).format(phase, plane) for phase in PHASES for plane in FocalPlane]

def _learn_pairs(words: Mapping[str, int]) -> list[tuple[str, str]]:
    "Pairs to join, most frequent first, ties by spelling (the trainer of the library leaves ties to chance)"
    spelled, pairs = {w: [*w[:-1], w[-1] + "</w>"] for w in words}, []
    while True:
        counts: Counter = Counter()
        for w, n in words.items(): counts.update({p: n*k for p, k in Counter(pairwise(spelled[w])).items()})
        if not counts: return pairs
        a, b = min(counts, key=lambda p: (-counts[p], p))
        pairs.append((a, b))
        for w, parts in spelled.items():
            joined: list[str] = []
            for part in parts:
                if part == b and joined and joined[-1] == a: joined[-1] = a + b
                else: joined.append(part)
            spelled[w] = joined

def _tokenizer(sentences: Sequence[str]) -> Any:
    "CLIP tokenizer whose pairs were counted in `sentences`"
    from tokenizers import Regex, pre_tokenizers
    from transformers import CLIPTokenizer
    split = pre_tokenizers.Split(Regex(_SPLIT), "removed", invert=True)
    words = Counter(w for s in sentences for w, _ in split.pre_tokenize_str(s.lower()))
    pairs, alphabet = _learn_pairs(words), sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(a + "</w>" for a in alphabet), *(a + b for a, b in pairs)]
    vocab = {w: i for i, w in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=77)

# %%
words = _tokenizer(embryo_prompts())
longest = max(embryo_prompts(), key=lambda p: len(words(p)["input_ids"]))
len(words), longest, len(words(longest)["input_ids"]), words.convert_ids_to_tokens(words("phase t9+")["input_ids"])

# %%
assert len({tuple(words(p)["input_ids"]) for p in embryo_prompts()}) == 112
assert all(len(words(p)["input_ids"]) < 30 for p in embryo_prompts())

# %% [markdown]
# ## The pipeline
# Weights come from a named stream, so the same seed gives the same files. A fresh autoencoder makes latent images of
# standard deviation 0.3, where diffusion expects 1, so its scaling factor is measured on phantoms; and it calls them
# uncertain by 1, which would drown them, where a trained one is sure to a few hundredths.

# %%
#| export
def as_pixels(
    images: Sequence[np.ndarray], # each (row, column) uint8
) -> torch.Tensor: # (b, 3, row, column) float32 in [-1, 1]
    "Grey pictures in the form that the autoencoder takes"
    x = torch.from_numpy(np.stack([np.asarray(i, np.uint8) for i in images])).float()/127.5 - 1
    return x[:, None].expand(-1, 3, -1, -1).contiguous()

def _tiny_parts(resolution: int, channels: Sequence[int]) -> dict[str, Any]:
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    tok = _tokenizer(embryo_prompts())
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4,
        block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        sample_size=resolution)
    unet = UNet2DConditionModel(
        sample_size=resolution//8, block_out_channels=tuple(channels), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    noise = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                          steps_offset=1)
    noise.register_to_config(clip_sample=False) # other schedulers that start from this one would clip
    return {"vae": vae, "text_encoder": text, "tokenizer": tok, "unet": unet, "scheduler": noise}

def make_tiny_sd(
    out: str | os.PathLike, # folder to write, in the layout of diffusers
    *,
    seed: int = 0, # of the weights
    resolution: int = 64, # width and height of its images, a multiple of 16 [pixel]
    latent_scale: float | str = "auto", # scaling factor of the latent images; 'auto': measured on phantoms
    channels: Sequence[int] = (32, 64), # of the two levels of the denoising network
    on_exists: OnExists = "error", # what to do when `out` is there already
) -> Path: # `out`
    "Write a working Stable Diffusion pipeline with 1.3 million random weights"
    if resolution < 16 or resolution % 16: raise ConfigError(f"resolution: must be a multiple of 16, got {resolution}")
    if latent_scale != "auto" and not (isinstance(latent_scale, (int, float)) and latent_scale > 0):
        raise ConfigError(f"latent_scale: must be 'auto' or a number > 0, got {latent_scale!r}")
    if not check_output(out, on_exists): return Path(out)
    sd = quiet_diffusers()
    with seeded(seed, "tiny"): parts = _tiny_parts(resolution, channels)
    vae = parts["vae"].eval()
    with torch.no_grad(): # trained autoencoders are sure of their latent images: log variance -8
        vae.quant_conv.weight[vae.config.latent_channels:] *= 0.1
        vae.quant_conv.bias[vae.config.latent_channels:] = -8
    if latent_scale == "auto":
        with torch.no_grad():
            pixels = as_pixels([embryo_frame(p, resolution, seed=p) for p in range(16)])
            latent_scale = 1/float(vae.encode(pixels).latent_dist.mean.std())
    vae.register_to_config(scaling_factor=float(latent_scale))
    pipe = sd.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                      requires_safety_checker=False)
    with atomic(out, on_exists, folder=True) as temp:
        pipe.save_pretrained(temp)
        share_files(temp)
    return Path(out)

def share_files(
    folder: str | os.PathLike, # just written
) -> None:
    "Give weight files the usual permissions; the libraries write them readable for the owner only"
    mask = os.umask(0)
    os.umask(mask)
    for p in Path(folder).rglob("*"):
        if p.is_file(): p.chmod(0o666 & ~mask)

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
tiny = make_tiny_sd(root/"tiny")
{p.name: human_bytes(sum(f.stat().st_size for f in p.rglob("*") if f.is_file())) for p in sorted(tiny.iterdir())}

# %%
again = make_tiny_sd(root/"again")
files = sorted(p.relative_to(tiny) for p in tiny.rglob("*") if p.is_file())
assert all((tiny/f).read_bytes() == (again/f).read_bytes() for f in files) and len(files) > 8
assert all((tiny/f).stat().st_mode & 0o044 for f in files)
with raises(ConfigError, match="multiple of 16"): make_tiny_sd(root/"x", resolution=60)

# %% [markdown]
# ## Loading
# A model is a folder in the layout of diffusers, one file in the layout of the original authors, or a name on the hub,
# which works offline if it was loaded before. The libraries' own messages mislead here: a mistyped folder is reported
# as a repository that does not exist. A folder says which Python classes it is made of; only those of Stable Diffusion
# 1 and 2 are accepted, nothing else is imported.

# %%
#| export
_PARTS = {"vae": {"AutoencoderKL"}, "text_encoder": {"CLIPTextModel"},
          "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"}, "unet": {"UNet2DConditionModel"}}
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}

def _check_index(folder: Path) -> None:
    "Refuse folders that are not Stable Diffusion 1 or 2, or that name classes from elsewhere"
    index = read_json(folder/"model_index.json", 2**20)
    if not isinstance(index, dict): raise FormatError(f"{folder}/model_index.json: must hold an object")
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ConfigError(f"model: {folder} is a {kind}. Only StableDiffusionPipeline (Stable Diffusion 1 and 2) is "
                          "supported; XL, 3 and Flux are not")
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list): continue
        if len(value) != 2 or value[0] not in _LIBRARIES:
            raise FormatError(f"{folder}/model_index.json: {name} comes from {value[:1]}, which is not loaded")
        if name in _PARTS and value[1] not in _PARTS[name]:
            raise ConfigError(f"model: {name} of {folder} is a {value[1]}, supported are {sorted(_PARTS[name])}")
    if lacking := [n for n in [*_PARTS, "scheduler"] if n not in index or not (folder/n).is_dir()]:
        raise MissingFile(f"model: {folder} lacks {', '.join(lacking)}. Copy the whole folder of the pipeline")

def resolve_model(
    model: str | os.PathLike, # folder, .safetensors or .ckpt file, or hub name 'owner/name'
    *,
    local_files_only: bool = False, # never ask the hub
) -> Path: # folder or file on this machine
    "Where the weights of a model are"
    path, text = Path(model), os.fspath(model)
    if path.is_dir():
        if not (path/"model_index.json").exists():
            raise MissingFile(f"model: {path} has no model_index.json, it is not a folder of diffusers")
        return path
    if path.is_file(): return path
    is_name = text.count("/") == 1 and not text.startswith((".", "/", "~")) and "\\" not in text
    if not is_name or path.suffix in (".ckpt", ".safetensors"):
        raise MissingFile(f"model: {text} does not exist. Name a folder of diffusers, a .safetensors or .ckpt file, "
                          "or a name on the hub such as 'owner/name'")
    sd = quiet_diffusers()
    tries = (True,) if local_files_only or os.environ.get("HF_HUB_OFFLINE") else (True, False)
    for local in tries:
        try: return Path(sd.StableDiffusionPipeline.download(text, local_files_only=local))
        except Exception as e: why = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
    raise MissingFile(f"model: {text} is neither a folder here nor in the local cache of the hub, and the hub did not "
                      f"deliver it ({why}). stable-diffusion-2 of stabilityai and v1-5 of runwayml were removed from "
                      "there; use a copy that you have, by its folder")

def weights_digest(
    model: str | os.PathLike, # folder of diffusers, or one file
) -> str: # hash of all weights, whatever the place is called
    "Identity of a model's weights"
    path = Path(model)
    if path.is_file(): return file_digest(path)
    files = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin") and p.is_file())
    if not files: raise MissingFile(f"model: {path} holds no weights")
    return fingerprint({p.relative_to(path).as_posix(): file_digest(p, 64) for p in files})

# %%
resolve_model(tiny).name, weights_digest(tiny)

# %%
assert weights_digest(tiny) == weights_digest(again) != weights_digest(make_tiny_sd(root/"other", seed=1))
with raises(MissingFile, match="does not exist"): resolve_model(root/"typo")
with raises(MissingFile, match="no model_index.json"): resolve_model(root)
index = read_json(tiny/"model_index.json")
write_json(again/"model_index.json", {**index, "unet": ["os", "system"]})
with raises(FormatError, match="which is not loaded"): _check_index(again)
write_json(again/"model_index.json", {**index, "_class_name": "StableDiffusionXLPipeline"})
with raises(ConfigError, match="XL, 3 and Flux are not"): _check_index(again)

# %% [markdown]
# The dangerous case: where the tokenizer's files are missing, `CLIPTokenizer.from_pretrained` gives a stub that knows
# two tokens and says nothing. The pipeline loads, trains and draws, and the prompt has no meaning any more.

# %%
#| export
def assert_pipeline_sane(
    pipe: Any, # StableDiffusionPipeline
) -> None:
    "Refuse a pipeline whose prompts have no meaning, or that cannot be trained"
    tok, cfg = pipe.tokenizer, pipe.text_encoder.config
    known = getattr(cfg, "vocab_size", 0)
    if len(tok) != known or not 0 < tok.model_max_length <= cfg.max_position_embeddings:
        raise DataError(f"model: the tokenizer knows {len(tok)} tokens (at most {tok.model_max_length:.3g} a prompt), "
                        f"its text encoder {known} ({cfg.max_position_embeddings}). The tokenizer's files are missing "
                        "or of another model; prompts would have no meaning")
    prompts = [PromptTemplate().format(p) for p in PHASES]
    if len({tuple(tok(p)["input_ids"]) for p in prompts}) < len(prompts):
        raise DataError("model: its tokenizer cannot tell the prompts of the 16 phases apart")
    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ConfigError(f"model: prediction type {kind!r} of its scheduler is not supported (epsilon, v_prediction)")

def load_sd(
    model: str | os.PathLike, # folder, .safetensors or .ckpt file, or hub name
    *,
    device: str = "auto", # where it goes
    local_files_only: bool = False, # never ask the hub
) -> Any: # StableDiffusionPipeline in float32 and evaluation mode
    "Load a Stable Diffusion 1 or 2 pipeline, or say why not"
    path, where = resolve_model(model, local_files_only=local_files_only), device_for(device)
    sd = quiet_diffusers()
    try:
        if path.is_file():
            pipe = sd.StableDiffusionPipeline.from_single_file(str(path), safety_checker=None, local_files_only=True)
        else:
            from transformers import AutoTokenizer
            _check_index(path)
            pipe = sd.StableDiffusionPipeline.from_pretrained(
                str(path), tokenizer=AutoTokenizer.from_pretrained(str(path/"tokenizer"), local_files_only=True),
                safety_checker=None, feature_extractor=None, requires_safety_checker=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, KeyError) as e:
        if isinstance(e, (FormatError, ConfigError, MissingFile)): raise
        raise FormatError(f"model: {path} cannot be loaded: {str(e).splitlines()[0][:200]}") from None
    assert_pipeline_sane(pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet): part.requires_grad_(False).float().eval()
    return pipe.to(where)

# %%
pipe = load_sd(tiny, device="cpu")
{n: f"{sum(p.numel() for p in getattr(pipe, n).parameters()):,}" for n in ("unet", "vae", "text_encoder")}

# %%
shutil.rmtree(root/"again")
shutil.copytree(tiny, root/"again")
for p in (root/"again"/"tokenizer").glob("tokenizer*.json"): p.unlink()
with raises(FormatError, match="cannot be loaded"): load_sd(root/"again", device="cpu")
(root/"again"/"unet"/"diffusion_pytorch_model.safetensors").write_bytes(b"half a file")
with raises(FormatError, match="cannot be loaded"): load_sd(root/"again", device="cpu")

# %%
from transformers import CLIPTokenizer

stub = CLIPTokenizer.from_pretrained(root/"again"/"tokenizer")
pipe.tokenizer, own = stub, pipe.tokenizer
with raises(DataError, match="prompts would have no meaning"): assert_pipeline_sane(pipe)
pipe.tokenizer = own

# %% [markdown]
# ## An autoencoder that has seen pictures
# Between latent values and pictures stands the autoencoder, and one with random weights paints fog whatever it is
# given. Where a model shall show anything, the tiny autoencoder learns the pictures first: it gives them back through
# its narrow middle, with squared error, in all eight orientations. The scale of the latent values is measured again.

# %%
#| export
class _Turned:
    "Pictures in one of their eight orientations"
    def __init__(self, images: Sequence[np.ndarray]): self.images = images
    def __len__(self) -> int: return len(self.images)
    def draw(self, i: int, rng: np.random.Generator) -> np.ndarray:
        x = np.rot90(self.images[i], int(rng.integers(4)))
        return as_pixels([x[:, ::-1] if rng.random() < 0.5 else x])[0].numpy()

def _reconstruction(vae: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    z = vae.encode(x).latent_dist.mode()
    error = (vae.decode(z).sample - x).square().mean()
    return {"loss": error + 1e-4*z.square().mean(), "error": error}

def teach_autoencoder(
    model: str | os.PathLike, # folder of a small pipeline
    images: Sequence[np.ndarray], # each (row, column) uint8, square, as large as the pictures of the pipeline
    out: str | os.PathLike, # folder to write: the same pipeline with a trained autoencoder
    *,
    steps: int = 250, # of the optimiser
    batch_size: int = 8, # pictures a step
    lr: float = 2e-3, # peak learning rate
    seed: int = 0, # names every random stream
    device: str = "auto", # where to train
    on_exists: OnExists = "error", # what to do when `out` is there already
) -> float: # squared error at the end, of pixels in [-1, 1]; NaN: skipped
    "Train the autoencoder of a pipeline on pictures; an interrupted training goes on where it stopped"
    if not check_output(out, on_exists, inputs=[model]): return float("nan")
    pipe = load_sd(model, device=device)
    size = pipe.unet.config.sample_size*pipe.vae_scale_factor
    if wrong := [i.shape for i in images if i.shape != (size, size)]:
        raise DataError(f"images: must be {size} x {size}, {len(wrong)} of {len(images)} are not, such as {wrong[0]}")
    work, pixels = Path(f"{out}.training"), as_pixels(images)
    settings = FitConfig(steps=steps, lr=lr, clip_norm=1.0, seed=seed, device=device, checkpoint_every=100,
                         tensorboard=False)
    identity = {"base": weights_digest(resolve_model(model)), "images": fingerprint(list(images))}
    vae = pipe.vae.requires_grad_(True)
    done = fit(vae, Batches(_Turned(images), batch_size, seed=seed), _reconstruction, settings, out_dir=work,
               config=identity, on_exists="skip", desc="autoencoder")
    vae.eval().requires_grad_(False)
    with torch.no_grad(): means = [vae.encode(b.to(vae.device)).latent_dist.mean for b in pixels.split(16)]
    vae.register_to_config(scaling_factor=1/float(torch.cat(means).std()))
    with atomic(out, on_exists, folder=True) as temp:
        pipe.to("cpu").save_pretrained(temp)
        share_files(temp)
    remove_tree(work)
    return float(done.log[-1]["error"])

# %%
shown = [embryo_frame(p, 32, seed=p) for p in (3, 5, 11, 13)]
learned = teach_autoencoder(make_tiny_sd(root/"little", resolution=32), shown, root/"taught", steps=60, device="cpu")
pairs = []
for name in ("little", "taught"):
    vae, x = load_sd(root/name, device="cpu").vae, as_pixels(shown)
    with torch.no_grad(): pairs += list(vae.decode(vae.encode(x).latent_dist.mode()).sample[:, 0].numpy())
plot.montage([*shown, *pairs], 4, title=f"pictures, and what random and trained weights give back ({learned:.3f})")

# %%
assert learned < 0.2 and not (root/"taught.training").exists()
assert weights_digest(root/"taught"/"unet") == weights_digest(root/"little"/"unet")
with raises(DataError, match="must be 32 x 32"): teach_autoencoder(root/"little", [np.zeros((8, 8))], root/"x")

# %% [markdown]
# ## Prompts as numbers
# The denoising network sees a prompt as 77 vectors. They are computed once for each distinct prompt. Two prompts with
# the same numbers, or one that is cut off at 77, would be a condition that is silently lost.

# %%
#| export
def encode_prompts(
    pipe: Any, # StableDiffusionPipeline
    prompts: Sequence[str], # distinct texts; may hold the empty one
) -> torch.Tensor: # (n, tokens, width) float32, on the device of the text encoder
    "What the denoising network sees of prompts"
    tok, length = pipe.tokenizer, pipe.tokenizer.model_max_length
    ids = [tuple(tok(p)["input_ids"]) for p in prompts]
    for p, i in zip(prompts, ids):
        if len(i) > length: raise DataError(f"prompt {p!r}: {len(i)} tokens, at most {length} are seen. Shorten it")
    if len(set(ids)) < len(set(prompts)):
        same = next(k for k, i in enumerate(ids) if i in ids[:k] and prompts[k] != prompts[ids.index(i)])
        raise DataError(f"prompts {prompts[ids.index(ids[same])]!r} and {prompts[same]!r} are the same to the "
                        "tokenizer, the model could not tell them apart")
    batch = tok(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
    use_mask = getattr(pipe.text_encoder.config, "use_attention_mask", False)
    device = pipe.text_encoder.device
    mask = batch["attention_mask"].to(device) if use_mask else None
    with torch.no_grad(): return pipe.text_encoder(batch["input_ids"].to(device), attention_mask=mask)[0].float()

# %%
embedded = encode_prompts(pipe, ["", *(PromptTemplate().format(p) for p in PHASES)])
embedded.shape

# %%
apart = torch.cdist(embedded.flatten(1), embedded.flatten(1)) + 9*torch.eye(17)
assert embedded.shape == (17, 77, 32) and apart.min() > 1e-3
with raises(DataError, match="same to the tokenizer"): encode_prompts(pipe, ["phase T2", "phase t2"])
with raises(DataError, match="at most 77 are seen"): encode_prompts(pipe, ["phase "*80])

# %% [markdown]
# ## Drawing
# Image $k$ starts from noise of its own seed, drawn on the CPU, so the same seed is the same image on any device and in
# any batch, up to the last bits of floating point sums. The solvers below add no noise later on. Where a sum overflows,
# pixels are not numbers; `to_grey` makes such an image black and `is_blank` finds it, like those a safety checker would
# have blackened: a set with black images in it trains a classifier to see black.

# %%
#| export
SOLVERS = {"dpm++": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler", "pndm": "PNDMScheduler",
           "euler": "EulerDiscreteScheduler"}

def sample(
    pipe: Any, # StableDiffusionPipeline
    condition: torch.Tensor, # (tokens, width) of the prompt, see `encode_prompts`
    empty: torch.Tensor, # (tokens, width) of the empty prompt
    seeds: Sequence[int], # one an image
    *,
    steps: int = 25, # of the solver
    guidance_scale: float = 7.5, # weight of the condition; 1: no guidance
    size: int | None = None, # width and height, a multiple of 8 [pixel]; None: the model's own
    solver: str = "dpm++", # one of `SOLVERS`
) -> np.ndarray: # (n, row, column, 3) float32 in [0, 1]
    "Images of one condition, each from its own seed"
    if solver not in SOLVERS: raise ConfigError(f"scheduler: must be one of {', '.join(SOLVERS)}, got {solver!r}")
    size = size or pipe.unet.config.sample_size*pipe.vae_scale_factor
    if size < 8 or size % pipe.vae_scale_factor:
        raise ConfigError(f"size: must be a multiple of {pipe.vae_scale_factor}, got {size}")
    cells = size//pipe.vae_scale_factor
    noise = torch.stack([torch.randn((pipe.unet.config.in_channels, cells, cells),
                                     generator=torch_rng_for(s, "image")) for s in seeds])
    device, before = pipe.unet.device, pipe.scheduler
    keep = lambda c: c.to(device)[None].expand(len(seeds), -1, -1)
    kind = getattr(quiet_diffusers(), SOLVERS[solver])
    try:
        pipe.scheduler = kind.from_config(before.config)
        with torch.no_grad():
            return pipe(prompt_embeds=keep(condition), negative_prompt_embeds=keep(empty), latents=noise.to(device),
                        num_inference_steps=steps, guidance_scale=guidance_scale, height=size, width=size,
                        output_type="np").images
    finally: pipe.scheduler = before

def to_grey(
    image: np.ndarray, # (row, column, 3) float32 in [0, 1]
) -> np.ndarray: # (row, column) uint8, black where a value was not a number
    "Mean of the colours in 8 bit"
    if not np.isfinite(image).all(): return np.zeros(image.shape[:2], np.uint8)
    return np.clip(np.rint(255*image.mean(-1)), 0, 255).astype(np.uint8)

def is_blank(
    image: np.ndarray, # (row, column) uint8
) -> bool: # standard deviation below 2 grey levels
    "True for black and other constant images"
    return bool(image.std() < 2)

# %%
images = sample(pipe, embedded[4], embedded[0], seeds=[0, 1, 2, 3], steps=8)
plot.montage([to_grey(i) for i in images], 4, title="what an untrained model draws")

# %%
one = sample(pipe, embedded[4], embedded[0], seeds=[2], steps=8)[0]
assert images.shape == (4, 64, 64, 3) and np.abs(to_grey(one).astype(int) - to_grey(images[2])).max() <= 1
assert np.array_equal(one, sample(pipe, embedded[4], embedded[0], seeds=[2], steps=8)[0])
assert np.abs(images[0] - images[1]).max() > 0.02
for solver in SOLVERS: assert np.isfinite(sample(pipe, embedded[4], embedded[0], [0], steps=3, solver=solver)).all()
assert is_blank(to_grey(np.full((8, 8, 3), np.nan))) and not is_blank(embryo_frame(5, 32))

# %%
with raises(ConfigError, match="must be one of dpm"): sample(pipe, embedded[4], embedded[0], [0], solver="karras")
with raises(ConfigError, match="multiple of 8"): sample(pipe, embedded[4], embedded[0], [0], size=60)
place.cleanup()
