# %% [markdown]
# # The plan of a network
#
# > From settings and a patch to channels, strides, kernels and blocks of every level, checked before any is built.
#
# How deep a U-Net can be follows from its patch: every level halves it, and what cannot be halved evenly either fails
# deep inside the network or is resized without a word. So a network is planned first, in numbers, without a single
# weight. The plan says which sizes of input are legal; settings are checked against it, the network is built from it.
#
# Axes are (z, y, x), as on all pages of this family.

# %%
#| default_exp zarrnet.plan

# %%
#| export
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from medvol_nb.config import Config
from medvol_nb.core import ConfigError

# %%
from medvol_nb.config import check_config
from medvol_nb.core import raises

# %% [markdown]
# ## Settings
# Three presets: `resenc` is nnU-Net's residual encoder, `auto` also chooses its levels from patch and voxel size, and
# `seed` is the reference's own network. What is left out is filled in by the preset.

# %%
#| export
Axis3 = tuple[int, int, int]
AXES = ("z", "y", "x")

def _listed(value: Any, what: str) -> Sequence:
    if isinstance(value, (list, tuple)) and value: return value
    raise ValueError(f"must be {what}, got {value!r}")

def _counts(value: Any) -> Any:
    "A whole number for all levels, or one a level"
    if value is None: return None
    if not isinstance(value, int): value = tuple(_listed(value, "a whole number, or a list with one for each level"))
    for v in value if isinstance(value, tuple) else [value]:
        if not isinstance(v, int) or isinstance(v, bool) or v < 1: raise ValueError(f"must be >= 1, got {v!r}")
    return value

def _per_axis(value: Any) -> Any:
    "For each level a whole number or one for each of z, y and x"
    if value is None: return None
    levels = []
    for v in _listed(value, "a list with one entry for each level"):
        v = (v,)*3 if isinstance(v, int) else tuple(v) if isinstance(v, (list, tuple)) else ()
        if len(v) != 3 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in v):
            raise ValueError("every level needs a whole number >= 1, or three for z, y and x")
        levels.append(v)
    return tuple(levels)

LevelCounts = Annotated[int | tuple[int, ...] | None, BeforeValidator(_counts)]
LevelAxes = Annotated[tuple[Axis3, ...] | None, BeforeValidator(_per_axis)]

class NetworkConfig(Config):
    "What the network looks like; `model_config` in files"
    preset: Literal["resenc", "seed", "auto"] = "resenc" # family of networks
    f_maps: LevelCounts = None # channels of each level, or those of the first, doubled up to 320
    num_levels: int | None = Field(None, ge=2) # default: as many as f_maps lists; 6 if it is a number, 4 without it
    norm: Literal["instance", "group", "batch"] | None = None # normalisation; default: group for seed, else instance
    num_groups: int = Field(8, ge=1) # of group norm
    nonlin: Literal["leaky_relu", "relu", "elu"] | None = None # default: relu for seed, else leaky_relu
    blocks_per_level: LevelCounts = None # residual blocks; default: 1 for seed, else 1, 3, 4, 6, 6 ...
    kernel_sizes: LevelAxes = None # per level [voxel]; default: 3
    strides: LevelAxes = None # per level [voxel]; default: 1, then 2
    se: Literal["none", "cse", "sse", "scse"] | None = None # squeeze-excite; default: scse for seed, else none
    se_reduction: float | None = Field(None, gt=0) # hidden channels = channels/this; default: 1 for seed, else 16
    decoder: Literal["separate", "shared"] = "separate" # one for each target, or one for all
    decoder_convs: int = Field(1, ge=1) # convolutions of a decoder level
    dropout: float = Field(0.0, ge=0, lt=1) # of channels, between the convolutions of a block
    stochastic_depth: float = Field(0.0, ge=0, lt=1) # of blocks, rising to this in the last one
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0) # size of a voxel in z, y, x, for auto
    vram_max_gb: float | None = Field(None, gt=0) # refuse to train what needs more [GB]

    @model_validator(mode="before")
    @classmethod
    def _levels(cls, data: Any) -> Any:
        "`n_levels` is the name that the reference's code reads, `num_levels` the one that it documents"
        if not isinstance(data, Mapping) or "n_levels" not in data: return data
        data = dict(data)
        old = data.pop("n_levels")
        if data.setdefault("num_levels", old) != old:
            raise ValueError(f"'n_levels' is {old!r} and 'num_levels' is {data['num_levels']!r}, give one of them")
        return data

    @field_validator("spacing")
    @classmethod
    def _positive(cls, value: tuple) -> tuple:
        if min(value) <= 0: raise ValueError(f"must be > 0, got {list(value)}")
        return value

# %%
check_config(NetworkConfig, {"f_maps": 16, "n_levels": 5, "strides": [1, [1, 2, 2], 2, 2, 2]}).strides

# %%
with raises(ConfigError, match="'n_levels' is 4 and 'num_levels' is 5, give one of them"):
    check_config(NetworkConfig, {"n_levels": 4, "num_levels": 5})
with raises(ConfigError, match="strides: every level needs a whole number >= 1, or three for z, y and x"):
    check_config(NetworkConfig, {"strides": [1, [2, 2]]})

# %% [markdown]
# ## Levels
# The plan is what a network is built from: channels, strides, kernels and blocks of each level. The automatic one
# (Isensee et al., *nnU-Net*, Nature Methods 2021) halves every axis that keeps at least 4 voxels and whose voxels are
# not already twice as large as the smallest, until none is left; an axis is convolved once its voxels are within twice
# the smallest.

# %%
#| export
@dataclass(frozen=True)
class NetworkPlan:
    "A network in numbers"
    preset: str # family
    features: tuple[int, ...] # channels of each level
    strides: tuple[Axis3, ...] # of each level, the first is 1 [voxel]
    kernels: tuple[Axis3, ...] # of each level [voxel]
    blocks: tuple[int, ...] # residual blocks of each level
    norm: str # normalisation
    groups: int # of group norm
    nonlin: str # activation
    se: str # squeeze-excite
    se_reduction: float # its bottleneck
    se_divisor: int # steps of its hidden channels
    patch_size: Axis3 | None # patch that the plan was made for, enlarged to fit [voxel]

    @property
    def divisor(self) -> Axis3:
        "What every axis of an input must be divisible by"
        return tuple(math.prod(s[a] for s in self.strides) for a in range(3))

def auto_levels(
    patch_size: Sequence[int], # (z, y, x) [voxel]
    spacing: Sequence[float] = (1, 1, 1), # size of a voxel in z, y, x
    min_edge: int = 4, # smallest edge of the deepest level [voxel]
) -> tuple[tuple[Axis3, ...], tuple[Axis3, ...]]: # strides and kernels of each level
    "Levels of the automatic configuration"
    edge, spacing, kernel = list(patch_size), list(spacing), [1, 1, 1]
    strides, kernels = [(1, 1, 1)], []
    while long := [a for a in range(3) if edge[a] >= 2*min_edge]:
        least = min(spacing[a] for a in long)
        halved = [a for a in long if spacing[a] < 2*least]
        kernel = [3 if s < 2*min(spacing) else k for k, s in zip(kernel, spacing)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in halved else 1 for a in range(3)))
        for a in halved: edge[a], spacing[a] = -(-edge[a]//2), spacing[a]*2
    return tuple(strides), (*kernels, (3, 3, 3))

def _features(f_maps: int | Sequence[int] | None, levels: int) -> tuple[int, ...]:
    if isinstance(f_maps, tuple): return f_maps
    return tuple(min((f_maps or 32)*2**k, max(320, f_maps or 0)) for k in range(levels))

def _plan_problems(net: NetworkConfig, auto: tuple | None) -> Iterator[tuple[str, str]]:
    "Key and message of every rule of the network that does not hold"
    f, n = net.f_maps, net.num_levels
    if isinstance(f, tuple) and n is not None and len(f) != n:
        yield "f_maps", f"{len(f)} numbers for num_levels {n}, got {list(f)}"
    if isinstance(f, tuple) and len(f) < 2: yield "f_maps", "at least 2 levels are needed"
    if auto is not None:
        m = len(auto[0])
        if m < 2: yield "preset", "the patch is too small for an automatic network, an edge of 8 voxels is needed"
        for key, given in (("f_maps", len(f) if isinstance(f, tuple) else None), ("num_levels", n)):
            if given not in (None, m):
                yield key, f"the automatic configuration has {m} levels for this patch, got {given}. Leave it out"
        n = m
    n = len(f) if isinstance(f, tuple) else n
    fixed = {"seed": ("blocks_per_level", "kernel_sizes", "strides"), "auto": ("kernel_sizes", "strides")}
    for key in ("blocks_per_level", "kernel_sizes", "strides"):
        value = getattr(net, key)
        if value is None: continue
        if key in fixed.get(net.preset, ()): yield key, f"is fixed by the preset '{net.preset}', leave it out"
        elif isinstance(value, tuple) and len(value) != (n or _default_levels(net)):
            yield key, f"{len(value)} entries for {n or _default_levels(net)} levels"
    if net.preset == "seed" and net.decoder_convs != 1: yield "decoder_convs", "the preset 'seed' has 1"
    if net.kernel_sizes and any(k % 2 == 0 for ks in net.kernel_sizes for k in ks):
        yield "kernel_sizes", "must be odd, so that convolutions keep sizes"
    if net.strides and max(net.strides[0]) > 1: yield "strides", "the first level keeps the size, its stride is 1"
    if (net.norm or ("group" if net.preset == "seed" else "")) == "group":
        bad = [c for c in _features(f, n or _default_levels(net)) if c >= net.num_groups and c % net.num_groups]
        if bad: yield "f_maps", f"{bad[0]} channels do not divide into {net.num_groups} groups (num_groups)"

def _default_levels(net: NetworkConfig) -> int: return net.num_levels or (4 if net.f_maps is None else 6)

def plan_network(
    net: NetworkConfig, # settings
    patch_size: Sequence[int] | None = None, # (z, y, x) [voxel]; needed by the preset auto
) -> NetworkPlan: # nothing left open
    "Fill in what the preset decides"
    if net.preset == "auto" and patch_size is None: raise ConfigError("preset 'auto': needs a patch size")
    auto = auto_levels(patch_size, net.spacing) if net.preset == "auto" else None
    if found := [f"model_config.{k}: {m}" for k, m in _plan_problems(net, auto)]: raise ConfigError("; ".join(found))
    n = len(auto[0]) if auto else len(net.f_maps) if isinstance(net.f_maps, tuple) else _default_levels(net)
    seed = net.preset == "seed"
    strides = auto[0] if auto else net.strides or ((1, 1, 1),) + ((2, 2, 2),)*(n - 1)
    kernels = auto[1] if auto else net.kernel_sizes or ((3, 3, 3),)*n
    blocks = (1,)*n if seed else net.blocks_per_level or tuple((1, 3, 4, 6)[min(k, 3)] for k in range(n))
    plan = NetworkPlan(
        net.preset, _features(net.f_maps, n), strides, kernels, (blocks,)*n if isinstance(blocks, int) else blocks,
        net.norm or ("group" if seed else "instance"), net.num_groups, net.nonlin or ("relu" if seed else "leaky_relu"),
        net.se or ("scse" if seed else "none"), net.se_reduction or (1 if seed else 16), 1 if seed else 8, None)
    if patch_size is None: return plan
    fitted = tuple(-(-p//d)*d for p, d in zip(patch_size, plan.divisor)) if auto else tuple(patch_size)
    return NetworkPlan(**{**plan.__dict__, "patch_size": fitted})

def size_problem(
    size: Sequence[int], # (z, y, x) [voxel]
    plan: NetworkPlan, # network that it is for
) -> str: # empty if the size is legal
    "What is wrong with the size of a patch, and which sizes near it are legal"
    found = []
    for axis, n, d in zip(AXES, size, plan.divisor):
        if n % d or n < 1:
            near = " and ".join(str(m) for m in (n//d*d, n//d*d + d) if m > 0)
            found.append(f"axis {axis}: {n} is not divisible by {d}, the nearest legal sizes are {near}")
    if not found and plan.norm == "instance" and tuple(size) == plan.divisor:
        found.append(f"{tuple(size)} leaves one voxel at the deepest level, which instance norm cannot normalise. "
                     f"Double one axis or use fewer levels")
    return "; ".join(found)

# %%
shown = {str(p): auto_levels(p) for p in [(64, 192, 192), (14, 256, 256)]}
{p: [s for s in strides] for p, (strides, _) in shown.items()}

# %%
assert len(auto_levels((64, 192, 192))[0]) == 6 and auto_levels((64, 192, 192))[0][-1] == (1, 2, 2)
assert len(auto_levels((64, 64, 64))[0]) == 5 and len(auto_levels((14, 256, 256))[0]) == 7
assert plan_network(NetworkConfig(preset="auto"), (14, 256, 256)).patch_size == (14, 256, 256)
assert auto_levels((32, 256, 256), (5, 1, 1))[1][:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
assert plan_network(NetworkConfig(f_maps=24, num_levels=5)).features == (24, 48, 96, 192, 320)
assert "axis x: 200 is not divisible by 32, the nearest legal sizes are 192 and 224" in size_problem(
    (64, 192, 200), plan_network(NetworkConfig(num_levels=6)))
assert "one voxel at the deepest level" in size_problem((8, 8, 8), plan_network(NetworkConfig(num_levels=4)))

# %%
with raises(ConfigError, match="model_config.f_maps: 3 numbers for num_levels 6"):
    plan_network(NetworkConfig(f_maps=(8, 16, 32), num_levels=6))
