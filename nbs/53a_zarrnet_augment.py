# %% [markdown]
# # Augmentation of patches
#
# > Random flips, turns, deformations, lighting, blur, noise for 3-D samples; all chance is drawn first, then applied.
#
# A network sees a few thousand patches a thousand times. Augmentation shows it each patch a little differently, so that
# it learns what stays. Two things go wrong easily. A library for photographs takes the `(z, y, x)` patch for an image
# with $x$ colour channels and clips to [0, 1]; of a z-scored patch, half of the voxels are gone. And one random
# generator for all makes an epoch depend on the number of loading processes.
#
# Here every transform has two halves. `draw` makes all random choices and returns them as a small dictionary; `apply`
# is a pure function of sample and dictionary. Intensity transforms touch the image alone, never clip, and measure their
# amounts in units of the patch's own standard deviation or range, so they mean the same for z-scores, for [0, 1] and
# for grey levels. Geometric transforms move the whole sample, vectors included, by the functions of the page before.
# Validation uses none of this.

# %%
#| default_exp zarrnet.augment

# %%
#| export
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from medvol_nb.config import Config
from medvol_nb.core import DataError, rng_for
from medvol_nb.zarrnet.geometry import (FOLD_LIMIT, check_sample, control_shape, flip, make_warp, rot90,
                                        rotation_matrix, swap_axes, turn_sample, warp_sample)

# %%
import time

from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises
from medvol_nb.zarrnet.geometry import normals_rgb, symmetries, turn

# %% [markdown]
# ## A transform
# Settings with a probability `p`. A subclass says which parameters it draws and what it does with them. Noise is not
# drawn but named: its parameters hold a seed, so they stay small enough to be written down.

# %%
#| export
def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]: raise ValueError(f"a range needs its lower end first, got {value}")
    return value

Range = Annotated[tuple[float, float], AfterValidator(_ordered)] # (lowest, highest), drawn uniformly
Positive = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)]
Share = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]],
                  AfterValidator(_ordered)] # of a whole
Plane = Literal["zy", "zx", "yx"] # a turn in "yx" is one about z

class Transform(Config):
    "Settings of one random change; all chance is in `draw`"
    p: float = Field(0.3, ge=0, le=1) # probability that a sample is changed

    def draw(
        self,
        shape: Sequence[int], # (c, z, y, x) of the image
        rng: np.random.Generator, # all randomness
    ) -> dict[str, Any] | None: # plain parameters for `apply`; None: leave the sample alone
        "Make the random choices"
        return self.parameters(tuple(shape), rng) if rng.random() < self.p else None

    def parameters(
        self,
        shape: tuple[int, ...], # (c, z, y, x) of the image
        rng: np.random.Generator, # all randomness
    ) -> dict[str, Any] | None: # plain parameters
        "What to draw for a sample that is changed"
        raise NotImplementedError

    def apply(
        self,
        sample: Mapping[str, Any], # see `check_sample`
        params: Mapping[str, Any], # from `draw`
        kinds: Mapping[str, str], # target -> kind
    ) -> dict[str, Any]: # a new sample; the input stays as it is
        "Do it, without chance"
        return {**sample, "image": self.change(sample["image"], params)}

    def change(
        self,
        image: np.ndarray, # (c, z, y, x) float32
        params: Mapping[str, Any], # from `draw`
    ) -> np.ndarray: # (c, z, y, x) float32, a new array
        "What an intensity transform does"
        raise NotImplementedError

def _uniform(rng: np.random.Generator, ends: tuple[float, float]) -> float: return float(rng.uniform(*ends))
def _seed(rng: np.random.Generator) -> int: return int(rng.integers(2**63))
def _per_channel(f: Callable, image: np.ndarray) -> np.ndarray:
    "(c, 1, 1, 1) float32 numbers such as the mean"
    return f(image.reshape(len(image), -1), axis=1).reshape(-1, 1, 1, 1).astype(np.float32)

# %% [markdown]
# ## Changing places
# Flips, quarter turns and transpositions are exact and cost next to nothing. Quarter turns and transpositions exchange
# axes, which needs equal edges. By default the planes that allow it are used: all three in a cube, only `"yx"` in a
# patch of 64 × 192 × 192. Naming a plane that the patch does not allow is an error. For thick sections, where z is
# another world than x and y, name `planes: [yx]` even in a cube.

# %%
#| export
_PLANES = {"zy": (0, 1), "zx": (0, 2), "yx": (1, 2)}

class Flip(Transform):
    "Mirror each axis, or not"
    p: float = Field(0.5, ge=0, le=1) # probability for each axis
    axes: tuple[Literal["z", "y", "x"], ...] = ("z", "y", "x") # those that may be mirrored

    def draw(self, shape, rng):
        "Make the random choices"
        chosen = [bool(v) for v in rng.random(3) < self.p]
        axes = [a for a, name in enumerate("zyx") if chosen[a] and name in self.axes]
        return {"axes": axes} if axes else None

    def apply(self, sample, params, kinds):
        "Do it, without chance"
        return turn_sample(sample, kinds, flip(*params["axes"]))

class _InPlane(Transform):
    planes: tuple[Plane, ...] | None = None # None: all that have equal edges

    def _plane(self, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[int, int] | None:
        equal = [n for n, (a, b) in _PLANES.items() if shape[1 + a] == shape[1 + b]]
        if wrong := [n for n in self.planes or () if n not in equal]:
            raise DataError(f"augmentation: plane {wrong[0]!r} has edges of different length in a patch of "
                            f"{shape[1:]}. Name others (possible here: {equal or 'none'}) or leave `planes` out")
        names = [n for n in _PLANES if n in (equal if self.planes is None else self.planes)]
        return _PLANES[names[rng.integers(len(names))]] if names else None

class Rot90(_InPlane):
    "One, two or three quarter turns in a plane"
    p: float = Field(0.5, ge=0, le=1) # probability that a sample is changed

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        plane = self._plane(shape, rng)
        return None if plane is None else {"k": int(rng.integers(1, 4)), "axes": list(plane)}

    def apply(self, sample, params, kinds):
        "Do it, without chance"
        return turn_sample(sample, kinds, rot90(params["k"], tuple(params["axes"])))

class Transpose(_InPlane):
    "Exchange the axes of a plane"
    p: float = Field(0.2, ge=0, le=1) # probability that a sample is changed

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        plane = self._plane(shape, rng)
        return None if plane is None else {"axes": list(plane)}

    def apply(self, sample, params, kinds):
        "Do it, without chance"
        return turn_sample(sample, kinds, swap_axes(*params["axes"]))

# %% [markdown]
# Rotation by any angle, scaling and an elastic bend are one interpolation, not three. It is by far the dearest
# transform (seconds for a patch of 64 × 192 × 192), so `p` is 0 unless asked for. Elastic displacements are a share of
# the distance of the control points, below the limit at which space would fold.

# %%
#| export
class Deform(Transform):
    "Rotate, scale and bend"
    p: float = Field(0.0, ge=0, le=1) # probability that a sample is changed
    rotate: tuple[float, float, float] = (15.0, 15.0, 15.0) # largest angle about z, y and x [degree]
    scale: Positive = (0.85, 1.2) # one factor for all axes; > 1 enlarges
    elastic: float = Field(0.25, ge=0, le=FOLD_LIMIT) # largest displacement, share of `knots`; 0: none
    knots: float = Field(24.0, ge=2) # distance of control points [voxel]

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        angles = [float(a) for a in rng.uniform(-1, 1, 3)*self.rotate]
        return {"rotate": angles, "scale": _uniform(rng, self.scale), "elastic": self.elastic, "knots": self.knots,
                "seed": _seed(rng)}

    def apply(self, sample, params, kinds):
        "Do it, without chance"
        shape, knots, control = check_sample(sample, kinds), (params["knots"],)*3, None
        if params["elastic"]:
            control = rng_for(params["seed"], "elastic").uniform(-1, 1, (3, *control_shape(shape, knots)))
            control *= params["elastic"]*params["knots"]
        matrix = params["scale"]*rotation_matrix(params["rotate"])
        return warp_sample(sample, kinds, make_warp(shape, matrix, control, knots))

# %%
roll = phantoms.sheets((24, 64, 64))
KIND = {"sheet": "binary", "normals": "normals"}
image = ((roll.img - roll.img.mean())/roll.img.std())[None].astype(np.float32)
sample = {"image": image, "sheet": roll.mask[None].astype(np.float32), "normals": roll.normals[::-1].copy(),
          "sheet__mask": np.ones((1, 24, 64, 64), np.uint8), "normals__mask": roll.mask[None]}

def example(transform, key, shape=image.shape):
    params = next(p for k in range(99) if (p := transform.draw(shape, rng_for(k, key))) is not None)
    return transform.apply(sample, params, KIND), params

moved = {name: example(t, name) for name, t in
         {"flip": Flip(), "rot90": Rot90(), "transpose": Transpose(), "deform": Deform(p=1)}.items()}
{name: params for name, (_, params) in moved.items()}

# %%
plot.montage([s["image"][0, 12] for s, _ in moved.values()] + [normals_rgb(s["normals"][:, 12])
                                                               for s, _ in moved.values()],
             cols=4, titles=[*moved, *[""]*4])

# %% [markdown]
# Whatever is drawn: sheet and normals end at the same voxels, and with the image on a sheet still brightening along its
# normal.

# %%
def brightening(s): return float((np.stack(np.gradient(s["image"][0], axis=(2, 1, 0)))*s["normals"]).sum(0).mean())

assert all(np.array_equal((s["normals"] != 0).any(0), s["sheet"][0] > 0) for s, _ in moved.values())
assert all(brightening(s) > 0.5*brightening(sample) > 0 for s, _ in moved.values())
draws = [Rot90(p=1).draw((1, 24, 64, 64), rng_for(k)) for k in range(20)]
assert {tuple(d["axes"]) for d in draws} == {(1, 2)} and {d["k"] for d in draws} == {1, 2, 3}
assert Rot90(p=1).draw((1, 24, 32, 40), rng_for(0)) is None

# %%
with raises(DataError, match="plane 'zx' has edges of different length in a patch of \\(24, 64, 64\\)"):
    Rot90(p=1, planes=("yx", "zx")).draw((1, 24, 64, 64), rng_for(0))
with raises(ValueError, match="less than or equal to 0.403"): Deform(elastic=0.6)

# %% [markdown]
# ## Changing the light
# `Contrast` stretches about the mean and shifts by a share of the standard deviation. `Gamma` bends the range of the
# patch, from its smallest to its largest value, and turned upside down in some cases. `Illumination` makes slabs along
# one axis brighter or darker, as a drifting beam does. The last one is a gain, and a gain needs a zero: it is the
# patch's smallest value, not the number 0, which in a z-scored image is just the mean.

# %%
#| export
class Contrast(Transform):
    "Other contrast and brightness"
    contrast: Positive = (0.75, 1.25) # factor about the mean
    brightness: Range = (-0.25, 0.25) # shift in units of the standard deviation

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        return {"contrast": _uniform(rng, self.contrast), "brightness": _uniform(rng, self.brightness)}

    def change(self, image, params):
        "What an intensity transform does"
        mean, std = _per_channel(np.mean, image), _per_channel(np.std, image)
        return (image - mean)*np.float32(params["contrast"]) + (mean + np.float32(params["brightness"])*std)

class Gamma(Transform):
    "Bend the scale of intensities"
    gamma: Positive = (0.7, 1.5) # exponent
    p_invert: float = Field(0.2, ge=0, le=1) # share of the cases in which dark and bright change roles for the bend

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        return {"gamma": _uniform(rng, self.gamma), "invert": bool(rng.random() < self.p_invert)}

    def change(self, image, params):
        "What an intensity transform does"
        low, high = _per_channel(np.min, image), _per_channel(np.max, image)
        width = np.maximum(high - low, np.float32(1e-12))
        part = np.clip((high - image if params["invert"] else image - low)/width, 0, 1)**np.float32(params["gamma"])
        return high - part*width if params["invert"] else low + part*width

class Illumination(Transform):
    "Slabs along an axis that are brighter or darker"
    n_defects: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (2, 5) # fewest and most slabs
    width: Positive = (25.0, 50.0) # of a slab, four standard deviations of its bell [voxel]
    gain: Range = (-0.4, 0.4) # change at the middle of a slab

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        axis = int(rng.integers(3))
        n = int(rng.integers(min(self.n_defects), max(self.n_defects) + 1))
        return {"axis": axis, "centre": rng.uniform(0, shape[1 + axis], n).tolist(),
                "width": rng.uniform(*self.width, n).tolist(), "gain": rng.uniform(*self.gain, n).tolist()}

    def change(self, image, params):
        "What an intensity transform does"
        i = np.arange(image.shape[1 + params["axis"]])[:, None]
        centre, sigma = np.array(params["centre"]), np.array(params["width"])/4
        gain = 1 + (np.array(params["gain"])*np.exp(-0.5*((i - centre)/sigma)**2)).sum(1)
        along = [-1 if a == params["axis"] else 1 for a in range(3)]
        gain = np.maximum(gain, 0.1).astype(np.float32).reshape(along)
        low = _per_channel(np.min, image)
        return low + (image - low)*gain

# %% [markdown]
# ## Losing sharpness
# Blur, a coarser detector (`LowRes` takes every n-th voxel and interpolates between them), and slices that carry a
# shadow of those before (`Smear`).

# %%
#| export
class Blur(Transform):
    "Gaussian blur"
    sigma: Positive = (0.3, 1.5) # [voxel]

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        return {"sigma": _uniform(rng, self.sigma)}

    def change(self, image, params):
        "What an intensity transform does"
        from scipy.ndimage import gaussian_filter
        return np.stack([gaussian_filter(c, params["sigma"], truncate=3) for c in image])

class LowRes(Transform):
    "Coarser sampling, brought back to the grid"
    p: float = Field(0.25, ge=0, le=1) # probability that a sample is changed
    scale: Positive = (0.4, 1.0) # voxels left along each axis, share

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        return {"scale": _uniform(rng, self.scale)}

    def change(self, image, params):
        "What an intensity transform does"
        out = image
        for axis in (1, 2, 3):
            n = image.shape[axis]
            m = min(n, max(1, round(n*params["scale"])))
            if m == n: continue
            centres = (np.arange(m) + 0.5)*n/m - 0.5 # of the coarse voxels, in fine ones
            coarse = np.take(out, np.rint(centres).astype(int), axis=axis)
            t = np.clip((np.arange(n) + 0.5)*m/n - 0.5, 0, m - 1)
            i = np.minimum(t.astype(int), max(m - 2, 0))
            f = (t - i).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
            out = np.take(coarse, i, axis=axis)*(1 - f) + np.take(coarse, np.minimum(i + 1, m - 1), axis=axis)*f
        return np.array(out, np.float32)

class Smear(Transform):
    "Slices with a shadow of the slices before them"
    p: float = Field(0.1, ge=0, le=1) # probability that a sample is changed
    strength: Share = (0.1, 0.4) # of the shadow in the slice
    n_slices: int = Field(3, ge=1) # most slices a shadow comes from

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        return {"axis": int(rng.integers(3)), "strength": _uniform(rng, self.strength),
                "n": int(rng.integers(1, self.n_slices + 1)), "backwards": bool(rng.integers(2))}

    def change(self, image, params):
        "What an intensity transform does"
        axis = 1 + params["axis"]
        n, step = image.shape[axis], 1 if params["backwards"] else -1
        places = [np.clip(np.arange(n) + step*k, 0, n - 1) for k in range(1, params["n"] + 1)]
        shadow = sum(np.take(image, i, axis=axis) for i in places)/np.float32(len(places))
        return image + np.float32(params["strength"])*(shadow - image)

# %% [markdown]
# ## Noise and holes
# The standard deviation of `Noise` is in units of the patch's own. `Speckle` is noise that grows with the signal, again
# measured from the smallest value. `Dropout` fills boxes with the mean of the patch: no 0.5, which is nothing special
# in a z-scored image.

# %%
#| export
class Noise(Transform):
    "Additive Gaussian noise"
    std: Range = (0.0, 0.45) # in units of the image's standard deviation

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        return {"std": abs(_uniform(rng, self.std)), "seed": _seed(rng)}

    def change(self, image, params):
        "What an intensity transform does"
        noise = rng_for(params["seed"], "noise").standard_normal(image.shape, np.float32)
        return image + np.float32(params["std"])*_per_channel(np.std, image)*noise

class Speckle(Transform):
    "Multiplicative Gaussian noise"
    p: float = Field(0.15, ge=0, le=1) # probability that a sample is changed
    std: Range = (0.0, 0.2) # in units of the signal above the smallest value

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        return {"std": abs(_uniform(rng, self.std)), "seed": _seed(rng)}

    def change(self, image, params):
        "What an intensity transform does"
        noise = rng_for(params["seed"], "speckle").standard_normal(image.shape, np.float32)
        return image + np.float32(params["std"])*(image - _per_channel(np.min, image))*noise

class Dropout(Transform):
    "Boxes without information"
    p: float = Field(0.15, ge=0, le=1) # probability that a sample is changed
    n_boxes: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 5) # fewest and most
    size: Share = (0.1, 0.4) # edge, as a share of the patch's

    def parameters(self, shape, rng):
        "What to draw for a sample that is changed"
        edges = np.array(shape[1:])
        boxes = []
        for _ in range(int(rng.integers(min(self.n_boxes), max(self.n_boxes) + 1))):
            size = np.maximum(1, np.rint(rng.uniform(*self.size, 3)*edges)).astype(int)
            start = (rng.random(3)*(edges - size + 1)).astype(int)
            boxes.append([start.tolist(), (start + size).tolist()])
        return {"boxes": boxes}

    def change(self, image, params):
        "What an intensity transform does"
        out, mean = image.copy(), _per_channel(np.mean, image)
        for start, stop in params["boxes"]: out[(slice(None), *map(slice, start, stop))] = mean
        return out

# %%
changes = {"contrast": Contrast(p=1), "gamma": Gamma(p=1), "illumination": Illumination(p=1), "blur": Blur(p=1),
           "low_res": LowRes(p=1), "smear": Smear(p=1, strength=(0.5, 0.5)), "noise": Noise(p=1),
           "speckle": Speckle(p=1), "dropout": Dropout(p=1)}
changed = {name: example(t, name)[0]["image"] for name, t in changes.items()}
plot.montage([image[0, 12], *(c[0, 12] for c in changed.values())], cols=5, titles=["as it was", *changed],
             limits=(-2, 4))

# %% [markdown]
# None of them clips: what is drawn is a change of the patch's own scale. So a change of units (here to grey levels of a
# 16-bit scanner) commutes with all of them, labels are untouched, and the input is never written to.

# %%
before = image.copy()
for name, t in changes.items():
    params = t.draw(image.shape, rng_for(3, name))
    grey = t.change(300*image + 5000, params)
    assert close(grey, 300*t.change(image, params) + 5000, 0.5), name
    assert example(t, name)[0]["sheet"] is sample["sheet"] and changed[name].dtype == np.float32
    assert t.change(np.full_like(image, 3), params).std() < 1e-6
assert np.array_equal(image, before) and not np.array_equal(changed["noise"], image)

# %% [markdown]
# ## All of them
# The settings list the transforms in the order in which they act: places, light, sharpness, noise. Probabilities are
# near those of nnU-Net and its relatives. `only` switches everything else off.
#
# Every transform has a random stream of its own, named by the sample's seed and the transform. Changing one setting
# therefore leaves the draws of all others as they were, and a comparison of two settings compares just that.

# %%
#| export
class AugmentConfig(Config):
    "Which changes, how often and how much"
    flip: Flip = Flip() # mirrors
    rot90: Rot90 = Rot90() # quarter turns
    transpose: Transpose = Transpose() # exchanged axes
    deform: Deform = Deform() # rotation by any angle, scaling, elastic bend
    contrast: Contrast = Contrast() # contrast and brightness
    gamma: Gamma = Gamma() # bent scale of intensities
    illumination: Illumination = Illumination() # bright and dark slabs
    blur: Blur = Blur() # Gaussian blur
    low_res: LowRes = LowRes() # coarser sampling
    smear: Smear = Smear() # shadows of other slices
    speckle: Speckle = Speckle() # multiplicative noise
    noise: Noise = Noise() # additive noise
    dropout: Dropout = Dropout() # boxes without information

    @classmethod
    def only(
        cls,
        **transforms: Transform, # those that stay, by field name
    ) -> "AugmentConfig": # all others with p = 0
        "Settings with a few transforms and nothing else"
        off = {name: field.annotation(p=0) for name, field in cls.model_fields.items()}
        return cls(**off | transforms)

class Augment:
    "Random changes of samples, the same for the same generator"
    def __init__(
        self,
        settings: AugmentConfig | Mapping[str, Any] | None, # or its dictionary; None: the defaults
        kinds: Mapping[str, str], # target -> kind, see `check_sample`
    ):
        self.settings = settings if isinstance(settings, AugmentConfig) else AugmentConfig(**(settings or {}))
        self.kinds = dict(kinds)

    def draw(
        self,
        shape: Sequence[int], # (c, z, y, x) of the image
        rng: np.random.Generator, # one number is taken
    ) -> list[tuple[str, dict[str, Any]]]: # transforms that act, in order, with their parameters
        "All random choices for one sample"
        seed = _seed(rng)
        drawn = [(name, getattr(self.settings, name).draw(shape, rng_for(seed, name)))
                 for name in AugmentConfig.model_fields]
        return [(name, params) for name, params in drawn if params is not None]

    def apply(
        self,
        sample: Mapping[str, Any], # see `check_sample`
        drawn: Sequence[tuple[str, Mapping[str, Any]]], # from `draw`
    ) -> dict[str, Any]: # a new sample
        "Do what was drawn"
        check_sample(sample, self.kinds)
        out = dict(sample)
        for name, params in drawn: out = getattr(self.settings, name).apply(out, params, self.kinds)
        return out

    def __call__(
        self,
        sample: Mapping[str, Any], # see `check_sample`
        rng: np.random.Generator, # see `rng_for`
    ) -> dict[str, Any]: # a new sample
        "Draw and apply"
        return self.apply(sample, self.draw(sample["image"].shape, rng))

# %%
augment = Augment(None, KIND)
drawn = augment.draw(image.shape, rng_for(0, "item", 0, 7))
drawn

# %%
begin = time.process_time()
several = [augment(sample, rng_for(0, "item", 0, k)) for k in range(10)]
seconds = (time.process_time() - begin)/10
plot.montage([s["image"][0, 12] for s in several] + [normals_rgb(s["normals"][:, 12]) for s in several], cols=10,
             title=f"ten draws of one sample, {seconds*1000:.0f} ms each on 24 × 64 × 64 voxels", limits=(-2, 4))

# %%
twice = augment(sample, rng_for(0, "item", 0, 7))
assert all(np.array_equal(twice[k], several[7][k]) for k in sample)
calm = Augment({**augment.settings.model_dump(), "noise": {"p": 0}}, KIND)
assert [d for d in calm.draw(image.shape, rng_for(0, "item", 0, 7))] == [d for d in drawn if d[0] != "noise"]
few = AugmentConfig.only(flip=Flip(), rot90=Rot90(planes=("yx",)))
found = {name for k in range(40) for name, _ in Augment(few, KIND).draw(image.shape, rng_for(k))}
assert found == {"flip", "rot90"}

# %% [markdown]
# With flips, turns and transpositions alone, a cube is shown in all of its 48 symmetries:

# %%
cube = np.arange(27, dtype=np.float32).reshape(1, 3, 3, 3)
turns = Augment(AugmentConfig.only(flip=Flip(), rot90=Rot90(), transpose=Transpose(p=0.5)), {})
seen = {turns({"image": cube}, rng_for(k))["image"].tobytes() for k in range(1500)}
assert seen == {turn(cube, s).tobytes() for s in symmetries()}
len(seen)

# %%
with raises(ValueError, match="lower end first"): AugmentConfig(gamma={"gamma": (1.5, 0.7)})
with raises(ValueError, match="Extra inputs are not permitted"): AugmentConfig(gama={})
with raises(DataError, match="is no target"): augment({**sample, "extra": image}, rng_for(0))
