# %% [markdown]
# # Segment Anything: weights and networks
#
# > Which model is in the file, whether it is whole, and what a slice through it costs.
#
# The features of the next page come from the image encoder of *Segment Anything* (Kirillov et al., ICCV 2023), a plain
# vision transformer. Its weights exist in half a dozen layouts: the original `.pth` files, the same nested under
# `model` or with `module.` in front of every name, fine-tuned ones with extra heads, folders of Hugging Face, pruned
# ones, and the second generation. Most questions in the public trackers about these models are dumps of names that
# did not fit. So the first half of this page reads every layout and tells a model by the shapes of its tensors, never
# by the name of its file; what does not fit ends in one message. The second half builds the two networks and counts
# their work.
#
# The network code is that of `transformers` (the `sam` extra); no patched repository is needed. No weights are
# downloaded, ever.

# %%
#| default_exp samweights

# %%
#| export
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medvol_nb.blocks import count_parameters
from medvol_nb.checkpoints import Converter, load_foreign, load_weights, torch_rng_for
from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, file_digest, fingerprint, optional,
                            read_json)

# %%
import pickle
import time

from safetensors.torch import save_file

from medvol_nb import plot
from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## A model is its shapes
# The encoder of SAM is fixed by a few numbers, and all of them can be read off the tensors: the width and the grid from
# the position table `(1, grid, grid, width)`, the heads from the width of a relative position table, and whether a
# layer looks at the whole grid or at windows of 14 tokens from its length, $2\cdot\text{grid}-1$ or
# $2\cdot\text{window}-1$.

# %%
#| export
@dataclass(frozen=True)
class SamShape:
    "Size of the image encoder of a Segment Anything model"
    width: int # channels of a token
    layers: int # transformer layers
    heads: int # of the attention
    mlp: int # hidden channels of the perceptron after each attention
    global_layers: tuple[int, ...] # layers whose attention sees all tokens
    window: int = 14 # side of the attention windows of the others [token]
    grid: int = 64 # tokens along a side of the image
    patch: int = 16 # side of a token [pixel]
    neck: int = 256 # channels of the embedding; an eighth of it are features

    @property
    def image_size(self) -> int: return self.grid*self.patch # side of the image the weights were made for [pixel]
    @property
    def step(self) -> int: return self.patch # the image's side must be a multiple of it [pixel]
    @property
    def size(self) -> tuple[int, ...]: return self.width, self.layers, self.mlp # what tells the models apart

@dataclass(frozen=True)
class Sam2Shape:
    "Size of that part of a Segment Anything 2 model which its finest feature map depends on"
    width: int # channels of a token in the first stage
    layers: int # transformer layers of the first stage
    heads: int # of the attention
    mlp: int # hidden channels of the perceptron after each attention
    window: int = 8 # side of the attention windows [token]
    background: int = 7 # side of the coarse position table
    neck: int = 256 # channels of the feature pyramid; an eighth of it are features

    @property
    def image_size(self) -> int: return 1024 # side of the image the weights were made for [pixel]
    @property
    def step(self) -> int: return 4*self.window # the image's side must be a multiple of it [pixel]
    @property
    def size(self) -> tuple[int, ...]: return self.width, self.layers, self.mlp # what tells the models apart

_EVERY_THIRD = (2, 5, 8, 11)
SAM_MODELS = MappingProxyType({
    "vit_b": SamShape(768, 12, 12, 3072, _EVERY_THIRD),
    "vit_l": SamShape(1024, 24, 16, 4096, (5, 11, 17, 23)),
    "vit_h": SamShape(1280, 32, 16, 5120, (7, 15, 23, 31)),
    "slimsam_50": SamShape(384, 12, 12, 1536, _EVERY_THIRD),
    "slimsam_77": SamShape(168, 12, 12, 696, _EVERY_THIRD),
    "sam2_tiny": Sam2Shape(96, 1, 1, 384),
    "sam2_base_plus": Sam2Shape(112, 2, 2, 448, background=14),
    "sam2_large": Sam2Shape(144, 2, 2, 576),
}) # sam2_small has the first stage of sam2_tiny

SAM_FILES = MappingProxyType({
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}) # name at https://dl.fbaipublicfiles.com/segment_anything/ -> SHA-256

WHERE = ("Files that work: " + ", ".join(SAM_FILES) + " from https://dl.fbaipublicfiles.com/segment_anything/; "
         "medsam_vit_b.pth from https://github.com/bowang-lab/MedSAM; model.safetensors or the folder of "
         "https://huggingface.co/facebook/sam-vit-base (-large, -huge), nielsr/slimsam-50-uniform (-77-) or "
         "facebook/sam2.1-hiera-tiny (-small, -base-plus, -large). Nothing is downloaded for you")

def model_name(
    shape: SamShape | Sam2Shape, # of an encoder
) -> str: # 'vit_b', ... or 'custom'
    "Name of a known model, by its shape"
    same = (n for n, s in SAM_MODELS.items() if type(s) is type(shape) and s.size == shape.size)
    return next(same, "custom")

# %%
model_name(SamShape(1024, 24, 16, 4096, (5, 11, 17, 23))), model_name(SamShape(64, 2, 4, 128, (1,)))

# %% [markdown]
# ## Reading every layout
# Unpacking files, nested tables and `module.` in front of names is the business of `load_foreign`. What is left are
# three layouts, told apart by one name each, and a fourth that is refused with a reason. Whatever else a file carries
# (prompt encoder, mask decoder, the heads of SAM-HQ) is left out; unknown parts *inside* the encoder, as adapters add
# them, are not, since without them the encoder would be another one.

# %%
#| export
_RENAMES = (("image_encoder.", "vision_encoder."), ("patch_embed.proj.", "patch_embed.projection."),
            (".blocks.", ".layers."), (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
            ("neck.0.", "neck.conv1."), ("neck.1.", "neck.layer_norm1."), ("neck.2.", "neck.conv2."),
            ("neck.3.", "neck.layer_norm2."), ("output_upscaling.0.", "upscale_conv1."),
            ("output_upscaling.1.", "upscale_layer_norm."), ("output_upscaling.3.", "upscale_conv2."))
_NEEDED = r"(vision_encoder\.(?!backbone)|mask_decoder\.upscale_)"
_NEEDED_2 = r"(vision_encoder\.backbone\.(?!blocks)|vision_encoder\.neck\.convs\.3\.|mask_decoder\.conv_s0\.)"

def _prefix(weights: Mapping[str, torch.Tensor], name: str) -> str | None:
    "What stands before `name` in the file; None if it is not there"
    return next((k.removesuffix(name) for k in weights if k == name or k.endswith("." + name)), None)

def _renamed(weights: Mapping[str, torch.Tensor], anchor: str, needed: str, renames: tuple = ()
             ) -> dict[str, torch.Tensor]:
    "The needed tensors in float32 under the names of `transformers`"
    out, prefix = {}, _prefix(weights, anchor) or ""
    for k, v in weights.items():
        name = k.removeprefix(prefix)
        for old, new in renames: name = name.replace(old, new)
        if k.startswith(prefix) and re.match(needed, name): out[name] = v.float()
    return out

def _first_stage(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    "Of SAM 2: position tables, the blocks before the first change of width, and the two layers behind them"
    anchor = "vision_encoder.backbone.patch_embed.projection.weight"
    out, block = _renamed(weights, anchor, _NEEDED_2), "vision_encoder.backbone.blocks."
    blocks = _renamed(weights, anchor, re.escape(block))
    width, n = len(out[anchor]), 0
    while f"{block}{n}.layer_norm1.weight" in blocks and f"{block}{n}.proj.weight" not in blocks and \
            len(blocks[f"{block}{n}.layer_norm1.weight"]) == width: n += 1
    return out | {k: v for k, v in blocks.items() if int(k.removeprefix(block).split(".")[0]) < n}

def _original_2(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise FormatError("this is an original SAM 2 file, which is not read; SAM 2 is read in the Hugging Face layout")

def _converter(name: str, anchor: str, needed: str = "", renames: tuple = (), convert: Callable | None = None
               ) -> Converter:
    return Converter(name, lambda w: _prefix(w, anchor) is not None,
                     convert or (lambda w: _renamed(w, anchor, needed, renames)))

SAM_CONVERTERS = (
    _converter("SAM, original names", "image_encoder.pos_embed", _NEEDED, _RENAMES),
    _converter("SAM, Hugging Face names", "vision_encoder.pos_embed", _NEEDED),
    _converter("SAM 2, Hugging Face names", "vision_encoder.backbone.patch_embed.projection.weight",
               convert=_first_stage),
    _converter("SAM 2, original names", "image_encoder.trunk.pos_embed", convert=_original_2),
)

# %% [markdown]
# From the names and shapes to the model. A relative position table is missing where a layer is missing; that is not
# decided here, the complete list of what does not fit comes from `load_weights`.

# %%
#| export
def sam_shape(
    weights: Mapping[str, torch.Tensor], # n-d arrays by the names of `transformers`
) -> SamShape: # of the encoder they belong to
    "Find the size of a SAM encoder by the shapes of its tensors"
    table, e = weights["vision_encoder.pos_embed"], "vision_encoder."
    layers = 1 + max(int(m[1]) for m in (re.match(rf"{e}layers\.(\d+)\.", k) for k in weights) if m)
    if 4*layers > len(weights): raise ValueError(f"{len(weights)} tensors for {layers} layers")
    tables = {i: weights[k] for i in range(layers) if (k := f"{e}layers.{i}.attn.rel_pos_h") in weights}
    lengths = {i: len(t) for i, t in tables.items()}
    whole = tuple(i for i, n in lengths.items() if n == 2*table.shape[1] - 1)
    parts = [n for i, n in lengths.items() if i not in whole]
    return SamShape(width=table.shape[3], layers=layers, heads=table.shape[3]//next(iter(tables.values())).shape[1],
                    mlp=len(next(v for k, v in weights.items() if k.endswith("mlp.lin1.weight"))),
                    global_layers=whole, window=(parts[0] + 1)//2 if parts else 14, grid=table.shape[1],
                    patch=weights[e + "patch_embed.projection.weight"].shape[2],
                    neck=len(weights[e + "neck.conv1.weight"]))

def sam2_shape(
    weights: Mapping[str, torch.Tensor], # n-d arrays by the names of `transformers`
    heads: int | None = None, # of the first stage, which shapes do not show; None: as the published models
) -> Sam2Shape: # of the first stage they belong to
    "Find the size of the first stage of SAM 2 by the shapes of its tensors"
    b = "vision_encoder.backbone."
    width, mlp = (len(weights[b + k]) for k in ("patch_embed.projection.weight", "blocks.0.mlp.proj_in.weight"))
    layers = 1 + max(int(m[1]) for m in (re.match(rf"{b}blocks\.(\d+)\.", k) for k in weights) if m)
    known = {s.width: s.heads for s in SAM_MODELS.values() if isinstance(s, Sam2Shape)}
    if heads is None and width not in known:
        raise ValueError(f"the number of heads is not known for width {width}; name the folder with its config.json")
    return Sam2Shape(width, layers, known[width] if heads is None else heads, mlp,
                     weights[b + "pos_embed_window"].shape[2], weights[b + "pos_embed"].shape[2],
                     len(weights["vision_encoder.neck.convs.3.weight"]))

# %% [markdown]
# ## The two networks
# SAM: the encoder turns an image into `(256, 64, 64)`, then two transposed convolutions (the *output upscaling* of the
# mask decoder, without prompts) make `(32, 256, 256)` of it:
#
# $$f = \mathrm{GELU}(U_2(\mathrm{GELU}(\mathrm{LN}(U_1(E)))))$$
#
# Both convolutions are 2 × 2 with stride 2, they do not overlap. Every token becomes a block of 4 × 4 features on its
# own: the true resolution is 64 tokens across the slice.
#
# SAM 2 has a map of 32 channels on a quarter of the image's side. Its pyramid passes nothing from coarse levels down to
# that map, so it depends on the first stage alone: one or two layers with windows of 8 × 8 tokens of 4 pixels. Only
# these are built here. The result is the same as of the whole model at a fraction of the work, and it also shows what
# these features can know: 32 pixels around each place, no anatomy.

# %%
#| export
class SamNetwork(nn.Module):
    "Image encoder of SAM and the output upscaling of its mask decoder"
    def __init__(
        self,
        shape: SamShape, # of the encoder
        image_size: int, # side of the image [pixel], a multiple of the patch
    ):
        super().__init__()
        hf = optional("transformers.models.sam.modeling_sam", extra="sam")
        n = shape.neck
        self.vision_encoder = hf.SamVisionEncoder(hf.SamVisionConfig(
            hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            mlp_dim=shape.mlp, global_attn_indexes=list(shape.global_layers), window_size=shape.window,
            image_size=image_size, patch_size=shape.patch, output_channels=n))
        self.mask_decoder = nn.ModuleDict({
            "upscale_conv1": nn.ConvTranspose2d(n, n//4, 2, stride=2),
            "upscale_layer_norm": hf.SamLayerNorm(n//4, data_format="channels_first"),
            "upscale_conv2": nn.ConvTranspose2d(n//4, n//8, 2, stride=2)})

    def embed(
        self,
        pixels: torch.Tensor, # (b, 3, n, n) float32, normalised
    ) -> torch.Tensor: # (b, 256, n/16, n/16)
        "The expensive part, worth keeping"
        return self.vision_encoder(pixels).last_hidden_state

    def expand(
        self,
        embedding: torch.Tensor, # (b, 256, n, n)
    ) -> torch.Tensor: # (b, 32, 4n, 4n)
        "Features from the embedding"
        up = self.mask_decoder
        return F.gelu(up["upscale_conv2"](F.gelu(up["upscale_layer_norm"](up["upscale_conv1"](embedding)))))

    def forward(
        self,
        pixels: torch.Tensor, # (b, 3, n, n) float32, normalised
    ) -> torch.Tensor: # (b, 32, n/4, n/4)
        "Features of images"
        return self.expand(self.embed(pixels))

# %%
#| export
class Sam2Network(nn.Module):
    "First stage of SAM 2 and the two layers that turn it into the finest map of `get_image_embeddings`"
    def __init__(
        self,
        shape: Sam2Shape, # of the first stage
        image_size: int, # side of the image [pixel], a multiple of `shape.step`
    ):
        super().__init__()
        hf = optional("transformers.models.sam2.modeling_sam2", extra="sam")
        n = shape.neck
        self.vision_encoder = nn.ModuleDict({
            "backbone": hf.Sam2HieraDetModel(hf.Sam2HieraDetConfig(
                hidden_size=shape.width, num_attention_heads=shape.heads, image_size=[image_size]*2,
                window_positional_embedding_background_size=[shape.background]*2, blocks_per_stage=[shape.layers],
                embed_dim_per_stage=[shape.width], num_attention_heads_per_stage=[shape.heads],
                window_size_per_stage=[shape.window], global_attention_blocks=[], mlp_ratio=shape.mlp/shape.width)),
            "neck": nn.ModuleDict({"convs": nn.ModuleDict({"3": nn.Conv2d(shape.width, n, 1)})})})
        self.mask_decoder = nn.ModuleDict({"conv_s0": nn.Conv2d(n, n//8, 1)})

    def embed(
        self,
        pixels: torch.Tensor, # (b, 3, n, n) float32, normalised
    ) -> torch.Tensor: # (b, 32, n/4, n/4)
        "Features of images, nothing is left to expand"
        tokens = self.vision_encoder["backbone"](pixels).last_hidden_state.permute(0, 3, 1, 2)
        return self.mask_decoder["conv_s0"](self.vision_encoder["neck"]["convs"]["3"](tokens))

    def expand(
        self,
        embedding: torch.Tensor, # (b, 32, n, n)
    ) -> torch.Tensor: # (b, 32, n, n)
        "The features are the embedding"
        return embedding

    def forward(
        self,
        pixels: torch.Tensor, # (b, 3, n, n) float32, normalised
    ) -> torch.Tensor: # (b, 32, n/4, n/4)
        "Features of images"
        return self.embed(pixels)

# %% [markdown]
# Networks are first built without memory, on the `meta` device: that is enough to compare names and shapes and to
# count the work.

# %%
#| export
def build_network(
    shape: SamShape | Sam2Shape, # of the encoder
    image_size: int | None = None, # side of the image [pixel]; None: what the model was made for
) -> nn.Module: # without content, on the meta device
    "An encoder of the given size"
    size = shape.image_size if image_size is None else image_size
    if isinstance(size, bool) or not isinstance(size, int) or size < shape.step or size % shape.step:
        raise ConfigError(f"image_size: must be a multiple of {shape.step}, got {size!r}")
    with torch.device("meta"):
        return (SamNetwork if isinstance(shape, SamShape) else Sam2Network)(shape, size).eval()

# %% [markdown]
# ## What a slice costs
# The work is counted on the network itself: torch notes every matrix product of a pass over an image without content.
# It grows with the square of the image's side (global attention with the fourth power), which is why half the side
# costs a quarter.

# %%
#| export
@dataclass(frozen=True)
class EncoderCost:
    "Work and memory of one slice"
    parameters: int # of the encoder, without the upscaling
    macs: int # multiply-adds of encoder and upscaling
    embedding: tuple[int, int, int] # (c, h, w) of what is kept of a slice

    @property
    def tflop(self) -> float: return 2*self.macs/1e12 # [TFLOP], an addition and a multiplication are two
    @property
    def cache_bytes(self) -> int: # [byte] in half precision
        c, h, w = self.embedding
        return 2*c*h*w

@lru_cache(typed=True)
def encoder_cost(
    shape: SamShape | Sam2Shape | str, # of an encoder, or the name of a known model
    image_size: int | None = None, # side of the image [pixel]; None: what the model was made for
) -> EncoderCost: # of one slice
    "Count the work of one slice without running it"
    from torch.utils.flop_counter import FlopCounterMode
    if isinstance(shape, str) and shape not in SAM_MODELS:
        raise ConfigError(f"model: must be one of {', '.join(SAM_MODELS)}, got {shape!r}")
    shape = SAM_MODELS[shape] if isinstance(shape, str) else shape
    network = build_network(shape, image_size)
    size = shape.image_size if image_size is None else image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        embedding = network.embed(torch.empty(1, 3, size, size, device="meta"))
        network.expand(embedding)
    parameters = count_parameters(network.vision_encoder)
    return EncoderCost(parameters, counter.get_total_flops()//2, tuple(embedding.shape[1:]))

# %% [markdown]
# The slices of all three directions of a 512 × 512 × 300 scan are 1,324; on a grid of 2 mm they are about 625.

# %%
cases = [("vit_h", None), ("vit_l", None), ("vit_b", None), ("vit_b", 512), ("slimsam_77", None), ("sam2_tiny", None)]
costs = {f"{n} {s or 1024}": encoder_cost(n, s) for n, s in cases}
{n: (f"{c.parameters/1e6:.0f} M", f"{c.macs/1e9:,.0f} GMAC", f"{c.tflop:.2f} TFLOP", f"{1324*c.tflop/1e3:.2f} PFLOP",
     f"{625*c.tflop/1e3:.2f} PFLOP") for n, c in costs.items()}

# %%
assert [round(costs[n].macs/1e9) for n in ("vit_h 1024", "vit_l 1024", "vit_b 1024")] == [2981, 1493, 486]
assert [round(costs[n].parameters/1e6) for n in ("vit_h 1024", "vit_l 1024", "vit_b 1024")] == [637, 308, 90]
with raises(ConfigError, match="must be a multiple of 16, got 1000"): encoder_cost("vit_b", 1000)
with raises(ConfigError, match="model: must be one of vit_b"): encoder_cost("vit_x")

# %%
plot.bars({n: c.tflop for n, c in costs.items()}, "TFLOP", title="cost of one slice")

# %% [markdown]
# ## Weights into the network
# The two position tables belong to the size of the image the weights were made for. Another size stretches them:
# the absolute table bicubically, the relative ones along their length. Everything that can go wrong ends in one
# message with what was expected, what was found, which known model is nearest and which files work.

# %%
#| export
def _stretched(weights: Mapping[str, torch.Tensor], shape: SamShape, grid: int) -> dict[str, torch.Tensor]:
    "Position tables for another number of tokens"
    out = dict(weights)
    if grid == shape.grid: return out
    table = weights["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    out["vision_encoder.pos_embed"] = F.interpolate(table, (grid, grid), mode="bicubic").permute(0, 2, 3, 1)
    for i in shape.global_layers:
        for k in (f"vision_encoder.layers.{i}.attn.rel_pos_{a}" for a in "hw"):
            if k in out: out[k] = F.interpolate(out[k].T[None], 2*grid - 1, mode="linear")[0].T
    return out

def _explained(shape: SamShape | Sam2Shape | None) -> str:
    "What was found, and the known model it is nearest to"
    if shape is None: return f"Expected the image encoder and the output upscaling of a SAM model. {WHERE}"
    known = {n: s for n, s in SAM_MODELS.items() if type(s) is type(shape)}
    near = min(known, key=lambda n: sum(max(a, b)/max(1, min(a, b)) for a, b in zip(known[n].size, shape.size)))
    found, best = (f"width {w}, {n} layers, mlp {m}" for w, n, m in (shape.size, known[near].size))
    return f"The shapes say {found}; the nearest known model is {near} with {best}. {WHERE}"

@dataclass(frozen=True, eq=False)
class SamWeights:
    "An encoder's tensors with what is known about them"
    shape: SamShape | Sam2Shape # found by the shapes
    tensors: Mapping[str, torch.Tensor] # n-d float32 arrays by the names of `transformers`
    where: str # file, for messages and provenance

    @property
    def name(self) -> str: return "random" if self.where == "random" else model_name(self.shape) # of the model
    @cached_property
    def digest(self) -> str: return fingerprint(dict(self.tensors)) # the same for the same weights in any layout

    def network(
        self,
        image_size: int | None = None, # side of the image [pixel]; None: what the weights were made for
    ) -> nn.Module: # on the CPU, ready to run
        "Build the network and load the weights"
        size = self.shape.image_size if image_size is None else image_size
        net = build_network(self.shape, size)
        tensors = self.tensors
        if isinstance(self.shape, SamShape): tensors = _stretched(tensors, self.shape, size//self.shape.patch)
        try:
            if count_parameters(net) > 2*sum(v.numel() for v in tensors.values()):
                raise DataError("less than half of the model is in the file")
            load_weights(net.to_empty(device="cpu"), tensors)
        except DataError as e: raise FormatError(f"{self.where}: {e}. {_explained(self.shape)}") from None
        return net.requires_grad_(False)

# %%
#| export
def _weight_file(path: Path) -> tuple[Path, int | None]:
    "The file of a checkpoint, and the heads that the settings beside it name"
    if not path.is_dir(): return path, None
    file = next((path/n for n in ("model.safetensors", "pytorch_model.bin") if (path/n).is_file()), None)
    if file is None:
        raise MissingFile(f"{path}: a folder of weights holds model.safetensors or pytorch_model.bin, this one has "
                          f"{', '.join(sorted(p.name for p in path.iterdir())[:6]) or 'nothing'}. {WHERE}")
    heads: Any = read_json(path/"config.json") if (path/"config.json").is_file() else None
    for key in ("vision_config", "backbone_config", "num_attention_heads_per_stage", 0):
        try: heads = heads[key]
        except (TypeError, KeyError, IndexError): return file, None
    return file, heads if isinstance(heads, int) and heads > 0 else None

def read_sam(
    path: str | os.PathLike | None, # .pth or .safetensors file, or a folder of Hugging Face
    *,
    model: str = "auto", # name the model must have, such as 'vit_b'; 'auto': whatever is in the file
    sha256: str | None = None, # digest the file must have, at least 8 of its digits; see `SAM_FILES`
) -> SamWeights: # the encoder's tensors
    "Read the encoder of a Segment Anything model in any layout; nothing in the file is executed"
    if path is None: raise MissingFile(f"features of Segment Anything need a checkpoint and none was named. {WHERE}")
    path = Path(path)
    if not path.exists(): raise MissingFile(f"checkpoint {path} does not exist. {WHERE}")
    file, heads = _weight_file(path)
    if sha256 is not None:
        if not re.fullmatch("[0-9a-f]{8,64}", sha256.lower()):
            raise ConfigError(f"sha256: 8 to 64 hexadecimal digits are needed, got {sha256!r}")
        found = file_digest(file, 64)
        if not found.startswith(sha256.lower()):
            raise FormatError(f"{file}: SHA-256 is {found}, must be {sha256}. The file is damaged or another one")
    shape = None
    try:
        tensors = load_foreign(file, SAM_CONVERTERS)
        two = "mask_decoder.conv_s0.weight" in tensors
        shape = sam2_shape(tensors, heads) if two else sam_shape(tensors)
        if min(shape.heads, shape.step, shape.neck//8) < 1 or shape.width % shape.heads: raise ValueError("sizes of 0")
    except FormatError as e: raise FormatError(f"{e}. {_explained(shape)}") from None
    except (KeyError, IndexError, ValueError, StopIteration, ZeroDivisionError) as e:
        raise FormatError(f"{file}: parts of the encoder are missing ({e}). {_explained(shape)}") from None
    out = SamWeights(shape, tensors, str(file))
    if model not in ("auto", out.name):
        raise ConfigError(f"model: {model!r} was asked for, {file} holds {out.name}. {_explained(shape)}")
    return out

def random_sam(
    shape: SamShape | Sam2Shape = SamShape(32, 2, 2, 64, (1,), grid=16), # of the encoder
    seed: int = 0, # of the weights
) -> SamWeights: # weights that know nothing
    "An encoder that was never trained, to try out everything around it"
    tensors = {}
    for k, v in build_network(shape).state_dict().items():
        draw = torch.randn(v.shape, generator=torch_rng_for(seed, "random-encoder", k))
        spread = max(1, v[0].numel())**-0.5 if v.ndim > 1 else 0.1
        tensors[k] = draw*spread + (1 if v.ndim == 1 and "norm" in k and k.endswith("weight") else 0)
    return SamWeights(shape, tensors, "random")

# %% [markdown]
# Without trained weights at hand the page shows the rules on random ones: the same tensors in the original layout, in
# that of Hugging Face, nested and with a prefix, are the same weights.

# %%
def original(tensors):
    out = {}
    for k, v in tensors.items():
        for old, new in reversed(_RENAMES): k = k.replace(new, old)
        out[k] = v
    return out

tiny = random_sam()
extra = {"mask_decoder.hf_token.weight": torch.zeros(1, 256)}
with tmpdir() as d:
    torch.save(original(tiny.tensors), d/"original.pth")
    torch.save({"model": {f"module.{k}": v for k, v in original(tiny.tensors).items()}}, d/"nested.pth")
    torch.save(original(tiny.tensors) | extra, d/"hq.pth")
    (d/"folder").mkdir()
    save_file({k: v.contiguous() for k, v in tiny.tensors.items()}, d/"folder"/"model.safetensors")
    read = {p.name: read_sam(p) for p in sorted(d.iterdir())}
{n: (w.name, w.digest) for n, w in read.items()}

# %%
assert {w.digest for w in read.values()} == {tiny.digest} and all(w.shape == tiny.shape for w in read.values())

# %% [markdown]
# A network for another image size gives features of another size, and a missing layer is named.

# %%
start = time.perf_counter()
with torch.no_grad(): sizes = {s: tuple(tiny.network(s)(torch.zeros(1, 3, s, s)).shape) for s in (256, 320)}
part = SamWeights(tiny.shape, {k: v for k, v in tiny.tensors.items() if "layers.0" not in k}, "part.pth")
with raises(FormatError, match=r"14 missing: .*layers.0.*nearest known model is slimsam_77.*sam_vit_b_01ec64.pth"):
    part.network()
sizes, f"{time.perf_counter() - start:.1f} s"

# %%
assert sizes == {256: (1, 32, 64, 64), 320: (1, 32, 80, 80)}

# %% [markdown]
# No checkpoint, a file that runs code, the wrong file: each is refused before anything is built.

# %%
class Canary:
    def __reduce__(self): return os.mkdir, (str(folder/"canary"),)

with tmpdir() as folder:
    (folder/"evil.pth").write_bytes(pickle.dumps({"w": Canary()}))
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, folder/"resnet.pth")
    with raises(FormatError, match="nothing that runs code"): read_sam(folder/"evil.pth")
    with raises(FormatError, match="layout not recognised.*conv1.weight.*Expected the image encoder"):
        read_sam(folder/"resnet.pth")
    with raises(FormatError, match="SHA-256 is"): read_sam(folder/"resnet.pth", sha256="a7bf3b02")
    with raises(FileNotFoundError, match="none was named. Files that work"): read_sam(None)
    assert not (folder/"canary").exists()
