# %% [markdown]
# # Intensity
#
# > Windows, z-scores, percentile ranges and data set statistics, as one object that training and inference share.
#
# A network learns numbers, not tissues. If training divides by the standard deviation of a volume and inference by that
# of a patch, the same liver enters with different values and the result has seams. If a script rescales "to [0, 1]" by
# the volume's extremes, one metal clip makes the rest of a CT black. And nobody can tell afterwards what was done,
# because it was three lines in a loader. Here the choice is a short text such as `"ct:-1000,1000"`. It becomes a
# `Normalizer`, which normalises, can be fitted to a data set, and goes into the checkpoint with its statistics.
#
# The page works on NumPy arrays of any shape and treats all elements alike; images with several channels use one
# normaliser a channel. Tensors are refused: normalisation happens before the batch is made.

# %%
#| default_exp intensity

# %%
#| export
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from medvol_nb.core import ConfigError, DataError

# %%
import json

import matplotlib.pyplot as plt

from medvol_nb.core import close, fingerprint, raises, rng_for

# %% [markdown]
# ## Every normalisation is a clip and a straight line
# A window, a z-score, a percentile range: all of them clip to an interval (perhaps infinite), subtract a shift, divide
# by a width, and map to an output range. They differ in where the numbers come from. So there is one function that does
# the arithmetic, without touching the input: in float64, a few rows at a time, rounded to float32 at the end. Large
# integers and float64 values are shifted before they are rounded to float32, so that 10⁹ ± 1 keeps its ± 1. A width of
# zero, from a constant volume, gives zeros (the low end of the output range), never a division.

# %%
#| export
class Line(NamedTuple):
    "Clip to [low, high], then (x - shift)/width*gain + offset"
    shift: float # becomes 0 before gain and offset
    width: float # this far above `shift` becomes 1; 0: everything becomes `offset`
    low: float = -math.inf # clip below
    high: float = math.inf # clip above
    gain: float = 1.0 # width of the output range
    offset: float = 0.0 # low end of the output range

def apply_line(
    vol: np.ndarray, # (...) any real dtype
    line: Line, # what to do
) -> np.ndarray: # (...) float32, a new array
    "Clip, shift and scale"
    if line.width == 0: return np.full(vol.shape, line.offset, np.float32)
    out = np.empty(vol.shape, np.float32)
    rows, target = np.atleast_1d(vol), np.atleast_1d(out)
    step = max(1, 2**17//max(1, math.prod(rows.shape[1:])))
    for k in range(0, len(rows), step):
        part = rows[k:k + step].astype(np.float64)
        if line.low > -math.inf or line.high < math.inf: np.clip(part, line.low, line.high, out=part)
        part -= line.shift
        part /= line.width
        target[k:k + step] = part*line.gain + line.offset if (line.gain, line.offset) != (1, 0) else part
    return out

def window_range(
    centre: float, # [HU]
    width: float, # [HU], > 0
) -> tuple[float, float]: # (low, high) [HU]
    "The interval a radiologist means by a window"
    if not width > 0: raise ConfigError(f"window: width must be > 0, got {width!r}")
    return centre - width/2, centre + width/2

# %%
low, high = window_range(centre=40, width=400)
apply_line(np.array([-1000, -160, 40, 240, 3000], np.int16), Line(shift=low, width=high - low, low=low, high=high))

# %%
far = 1e9 + np.array([-1.0, 0, 1])
assert apply_line(far, Line(shift=1e9, width=1)).tolist() == [-1, 0, 1] and far[0] == 1e9 - 1
assert apply_line(far, Line(shift=0, width=0)).tolist() == [0, 0, 0]
with raises(ConfigError, match="width must be > 0"): window_range(40, 0)

# %% [markdown]
# ## Statistics in one pass and in bounded memory
# A data set does not fit into memory, and percentiles need all values. The remedy is a histogram of fixed size that
# knows no range beforehand. Two are kept. *Whole numbers* between −2¹⁵ and 2¹⁶ (Hounsfield units, 8- and 16-bit scans,
# also when stored as floats) are counted one by one: their percentiles are exact. Everything else is counted by the
# first 20 bits of its float32 representation, rearranged so that the bits sort like the numbers. Such a bin is
# $2^{-11}$ = 0.05 % of the value wide, at every magnitude. Inside a bin values are taken to be evenly spread.
#
# Counts are integers, so the percentiles do not depend on the order of the volumes at all. Mean and variance are merged
# in float64 (Chan, Golub and LeVeque, *Updating formulae and a pairwise algorithm for computing sample variances*,
# 1979) and agree to about $10^{-12}$ for any order.

# %%
#| export
_LOWEST, _HIGHEST, _SHIFT = -2**15, 2**16, 12

def _float_bins(v: np.ndarray) -> np.ndarray:
    "Bin of each value: the first bits of float32, in an order that sorts like the numbers"
    bits = (v.astype(np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31)) >> _SHIFT

def _bin_values(key: np.ndarray) -> np.ndarray:
    "The float32 whose rearranged bits are `key`"
    key = key.astype(np.uint32)
    return np.where(key >> 31, key ^ np.uint32(2**31), ~key).view(np.float32).astype(np.float64)

def _pieces(img: np.ndarray, mask: np.ndarray | None, nonzero: bool) -> Iterator[np.ndarray]:
    "The chosen values of `img`, a bounded number at a time"
    img, mask = np.atleast_1d(img), None if mask is None else np.atleast_1d(mask)
    step = max(1, 2**18//max(1, math.prod(img.shape[1:])))
    for k in range(0, len(img), step):
        part = img[k:k + step]
        if mask is not None: part = part[mask[k:k + step]]
        if nonzero: part = part[part != 0]
        if part.size: yield part.ravel().astype(np.float64)

# %%
#| export
class Statistics:
    "Count, mean, standard deviation, extremes and percentiles of a stream of values, in 9 MiB"
    def __init__(self):
        self.n, self.mean, self._m2, self.min, self.max = 0, 0.0, 0.0, math.inf, -math.inf
        self._whole = np.zeros(_HIGHEST - _LOWEST, np.int64)
        self._float = np.zeros(2**(32 - _SHIFT), np.int64)

    @property
    def std(self) -> float:
        "Population standard deviation; exactly 0 if all values are equal"
        return math.sqrt(self._m2/self.n) if self.n and self.min < self.max else 0.0

    def add(
        self,
        img: np.ndarray, # (...) finite values
        mask: np.ndarray | None = None, # (...) bool, the values that count; None: all
        *,
        nonzero: bool = False, # count only values that are not 0
        histogram: bool = True, # False: no percentiles will be asked
    ) -> "Statistics": # itself
        "Count the values of one volume"
        for v in _pieces(img, mask, nonzero):
            mean = float(v.mean())
            self._merge(len(v), mean, float(((v - mean)**2).sum()), float(v.min()), float(v.max()))
            if not histogram: continue
            whole = (v >= _LOWEST) & (v < _HIGHEST) & (v == np.rint(v))
            self._whole += np.bincount((v[whole] - _LOWEST).astype(np.int64), minlength=len(self._whole))
            if not whole.all(): self._float += np.bincount(_float_bins(v[~whole]), minlength=len(self._float))
        return self

    def merge(
        self,
        other: "Statistics", # from another process; stays as it is
    ) -> "Statistics": # itself
        "Count what `other` has counted"
        if other.n: self._merge(other.n, other.mean, other._m2, other.min, other.max)
        self._whole += other._whole
        self._float += other._float
        return self

    def _merge(self, n: int, mean: float, m2: float, low: float, high: float) -> None:
        total, delta = self.n + n, mean - self.mean
        self.mean += delta*n/total
        self._m2 += m2 + delta*delta*self.n*n/total
        self.n, self.min, self.max = total, min(self.min, low), max(self.max, high)

    def percentile(
        self,
        q: float, # [%] 0 to 100
    ) -> float: # exact for whole numbers in [-2**15, 2**16), otherwise within 0.05 % of the value
        "Linear percentile, as `np.percentile`"
        if not self.n: raise DataError("percentile: no values were counted")
        if not 0 <= q <= 100: raise ConfigError(f"percentile: 0 to 100 is needed, got {q!r}")
        whole, key = np.flatnonzero(self._whole), np.flatnonzero(self._float)
        low = np.r_[whole + _LOWEST, _bin_values(key << _SHIFT)]
        high = np.r_[whole + _LOWEST, _bin_values((key << _SHIFT) + 2**_SHIFT - 1)]
        order = np.argsort(low, kind="stable")
        count = np.r_[self._whole[whole], self._float[key]][order]
        end = np.cumsum(count)
        if not end.size or end[-1] != self.n:
            raise DataError("percentile: some volumes were added with histogram=False")

        def ranked(k: int) -> float:
            if k in (0, self.n - 1): return self.min if k == 0 else self.max
            j = int(np.searchsorted(end, k, side="right"))
            part = (k - (end[j] - count[j]) + 0.5)/count[j]
            return low[order[j]] + (high[order[j]] - low[order[j]])*part
        rank = q/100*(self.n - 1)
        k, rest = int(rank), rank - int(rank)
        value = ranked(k) if rest == 0 else (1 - rest)*ranked(k) + rest*ranked(k + 1)
        return float(min(max(value, self.min), self.max))

# %%
rng = rng_for(0, "intensity")
volumes = [np.rint(rng.normal(50, 20, (30, 40, 20))).astype(np.int16) for _ in range(3)]
volumes.append(rng.gamma(2, 300, (20, 20, 20)))
stats = Statistics()
for v in volumes: stats.add(v)
everything = np.concatenate([v.ravel() for v in volumes]).astype(float)
{q: (round(stats.percentile(q), 3), round(float(np.percentile(everything, q)), 3)) for q in (0.5, 50, 95, 99.5)}

# %%
turned = Statistics()
for v in reversed(volumes): turned.merge(Statistics().add(v))
assert all(stats.percentile(q) == turned.percentile(q) for q in (0, 0.5, 50, 99.5, 100))
assert close(stats.mean, turned.mean, 1e-9) and close(stats.std, everything.std(), 1e-9)
whole = Statistics().add(volumes[0])
assert all(close(whole.percentile(q), np.percentile(volumes[0], q), 1e-9) for q in range(0, 101, 5))

# %% [markdown]
# ## A table of what a data set holds

# %%
#| export
def _checked(vol: Any, nonfinite: str) -> np.ndarray:
    "A real NumPy array whose values fit float32; or the reason why not"
    if not isinstance(vol, (np.ndarray, np.generic)):
        raise DataError(f"intensity: a NumPy array is needed, got {type(vol).__module__}.{type(vol).__name__}")
    vol = np.asarray(vol)
    if vol.dtype.kind not in "buif": raise DataError(f"intensity: real numbers are needed, got dtype {vol.dtype}")
    if vol.dtype.kind != "f": return vol.astype(np.float32) if vol.dtype == bool else vol
    bad = ~np.isfinite(vol)
    if vol.dtype.itemsize > 4: bad |= np.abs(vol) > np.finfo(np.float32).max
    if not bad.any(): return vol
    if nonfinite == "zero": return np.where(bad, vol.dtype.type(0), vol)
    n_nan, n_inf = int(np.isnan(vol).sum()), int(np.isinf(vol).sum())
    n_big = int(bad.sum()) - n_nan - n_inf
    raise DataError(f"intensity: {n_nan} NaN, {n_inf} infinite and {n_big} too large values among {vol.size}. "
                    "Repair the volume, or count them as 0 with nonfinite='zero'")

def _checked_pair(img: Any, mask: Any, nonfinite: str) -> tuple[np.ndarray, np.ndarray | None]:
    img = _checked(img, nonfinite)
    if mask is None: return img, None
    mask = np.asarray(mask)
    if mask.shape != img.shape: raise DataError(f"intensity: mask has shape {mask.shape}, the volume {img.shape}")
    return img, mask if mask.dtype == bool else mask != 0

# %%
#| export
def dataset_statistics(
    items: Iterable[tuple[np.ndarray, np.ndarray | None]], # (img, mask or None) one after the other
) -> dict[str, float]: # n, mean, std, min, max, median and percentiles 0.5, 99.5; JSON-able
    "Intensity statistics of many volumes, inside their masks"
    stats = Statistics()
    for img, mask in items: stats.add(*_checked_pair(img, mask, "error"))
    if not stats.n: raise DataError("statistics: no voxel was counted; are the masks empty?")
    marks = {"percentile_00_5": 0.5, "median": 50, "percentile_99_5": 99.5}
    return _numbers(stats) | {k: stats.percentile(q) for k, q in marks.items()}

def _numbers(stats: Statistics) -> dict[str, float]:
    return {"n": stats.n, "mean": stats.mean, "std": stats.std, "min": stats.min, "max": stats.max}

# %%
body = volumes[3] > 100
{k: round(v, 2) for k, v in dataset_statistics([(volumes[0], None), (volumes[3], body)]).items()}

# %%
with raises(DataError, match="2 NaN, 1 infinite and 0 too large values among 4"):
    dataset_statistics([(np.array([np.nan, 1, np.inf, np.nan]), None)])
with raises(DataError, match="are the masks empty"): dataset_statistics([(volumes[0], volumes[0] > 999)])

# %% [markdown]
# ## The kinds
# A kind is one small function: from the volume (and mask) to a `Line`. `ct` and `window` need no data. `zscore`,
# `minmax` and `percentile` look at the volume, unless they were fitted to a data set, then they use its statistics for
# every volume. `dataset` must be fitted: it clips to the foreground's 0.5 and 99.5 percentiles and subtracts the
# foreground's mean, divided by its standard deviation, the scheme that nnU-Net uses for CT (Isensee et al., *nnU-Net*,
# Nature Methods 2021); mean and deviation are those of the values *before* clipping, as there. `scale` divides integers
# by the largest value of their type.
#
# The mask only says where statistics come from; the map is applied everywhere. The exception is `nonzero`: zeros are
# taken for background, left out of the statistics, and are 0 in the result.

# %%
#| export
def _spread(stats: Mapping) -> tuple[float, float]: return stats["mean"], stats["std"]

def _between(low: float, high: float, p: Mapping) -> Line:
    return Line(low, high - low, low, high, p["out_high"] - p["out_low"], p["out_low"])

def _volume_statistics(vol: np.ndarray, mask: np.ndarray | None, nonzero: bool, q: tuple = ()) -> dict[str, float]:
    "What a fit would store, of one volume; its percentiles are exact"
    stats = Statistics().add(vol, mask, nonzero=nonzero, histogram=False)
    if not stats.n and mask is not None and not mask.any():
        raise DataError(f"intensity: the mask is empty, volume of shape {vol.shape}")
    if not stats.n: return {"n": 0, "mean": 0.0, "std": 0.0, "min": 0.0, "max": 0.0, "low": 0.0, "high": 0.0}
    found = _numbers(stats)
    if q:
        chosen = vol if mask is None else vol[mask]
        found["low"], found["high"] = (float(v) for v in np.percentile(chosen[chosen != 0] if nonzero else chosen, q))
    return found

class _Kind(NamedTuple):
    "How one kind of normaliser is written and what it does"
    numbers: tuple[str, ...] # names of its numbers in the spec
    line: Callable # (parameters, statistics or None, dtype) -> Line
    statistics: bool = False # uses statistics, of the volume or fitted
    must_fit: bool = False # of a fit only
    ranged: bool = False # takes an output range as two further numbers
    defaults: tuple[float, ...] = ()

_KINDS = {
    "identity": _Kind((), lambda p, s, dtype: Line(0, 1)),
    "scale": _Kind((), lambda p, s, dtype: Line(0, float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1)),
    "ct": _Kind(("low", "high"), lambda p, s, dtype: _between(p["low"], p["high"], p), ranged=True),
    "window": _Kind(("centre", "width"), lambda p, s, dtype: _between(*window_range(p["centre"], p["width"]), p),
                    ranged=True),
    "minmax": _Kind((), lambda p, s, dtype: _between(s["min"], s["max"], p), statistics=True, ranged=True),
    "percentile": _Kind(("q_low", "q_high"), lambda p, s, dtype: _between(s["low"], s["high"], p), statistics=True,
                        ranged=True, defaults=(0.5, 99.5)),
    "zscore": _Kind((), lambda p, s, dtype: Line(*_spread(s)), statistics=True),
    "dataset": _Kind((), lambda p, s, dtype: Line(*_spread(s), s["low"], s["high"]), statistics=True, must_fit=True),
}
_ALIASES = {"none": "identity", "robust": "percentile:1,99", "ct_normalization": "dataset", "zscore_patch": "zscore",
            "nonzero": "zscore:nonzero"}

# %% [markdown]
# ## The text form
# A spec is a kind, a colon, and the kind's numbers: `ct:-1000,1000`, `window:40,400`, `percentile:0.5,99.5`. Kinds that
# map to [0, 1] take two more numbers for another range, `ct:-1024,3071,-50,205`. The words `nonzero` and
# `nonfinite=zero` may follow. A few names from elsewhere are understood: `none`, `robust`, `ct_normalization`,
# `zscore_patch`, `nonzero`.

# %%
#| export
def _number(text: Any, spec: Any) -> float:
    try: value = float(text)
    except (TypeError, ValueError):
        raise ConfigError(f"normalizer {spec!r}: {text!r} is no number, nor 'nonzero' or 'nonfinite=zero'") from None
    if not math.isfinite(value) or isinstance(text, bool):
        raise ConfigError(f"normalizer {spec!r}: finite numbers are needed, got {text!r}")
    return value

def _kind(name: Any, spec: Any) -> str:
    if isinstance(name, str) and name in _KINDS: return name
    near = difflib.get_close_matches(str(name), [*_KINDS, *_ALIASES], n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"normalizer {spec!r}: unknown kind {name!r}{hint} Allowed: {', '.join(_KINDS)}")

def _parse(spec: str) -> dict[str, Any]:
    "Fields of a `Normalizer` from its text form"
    name, _, rest = re.sub(r"\s", "", spec).partition(":")
    name, _, usual = _ALIASES.get(name, name).partition(":")
    name, words = _kind(name, spec), [w for w in rest.split(",") if w]
    if all(w[0] == "n" for w in words): words = usual.split(",")*bool(usual) + words
    fields = {"kind": name, "nonfinite": "zero" if "nonfinite=zero" in words else "error"}
    numbers = [_number(w, spec) for w in words if w not in ("nonzero", "nonfinite=zero", "nonfinite=error")]
    own, extra = _KINDS[name].numbers, ("out_low", "out_high")*_KINDS[name].ranged
    allowed = {len(own), len(own) + len(extra)} | ({0} if not own or _KINDS[name].defaults else set())
    if len(numbers) not in allowed:
        raise ConfigError(f"normalizer {spec!r}: {name!r} takes {' or '.join(map(str, sorted(allowed)))} numbers "
                          f"({', '.join(own + extra) or 'none'}), got {len(numbers)}")
    params: dict[str, Any] = dict(zip(own + extra, numbers))
    return fields | {"params": params | ({"nonzero": True} if "nonzero" in words else {})}

# %% [markdown]
# ## The object

# %%
#| export
@dataclass(frozen=True)
class Normalizer:
    "Intensity normalisation that can be written down, fitted, stored and called"
    kind: str # identity, scale, ct, window, minmax, percentile, zscore or dataset
    params: Mapping[str, Any] = field(default_factory=dict) # its numbers by name, and `nonzero`
    stats: Mapping[str, float] | None = None # fitted statistics; None: those of each volume
    nonfinite: str = "error" # NaN and infinite values: "error", or "zero" to count them as 0

    def __post_init__(self):
        k = _KINDS[_kind(self.kind, self.kind)]
        known = dict(zip(k.numbers, k.defaults)) | ({"out_low": 0.0, "out_high": 1.0} if k.ranged else {})
        known |= {"nonzero": False} if k.statistics else {}
        params = {n: bool(v) if n == "nonzero" else _number(v, self.kind) for n, v in dict(self.params).items()}
        full = known | params
        names = [*k.numbers, *known]
        if wrong := [n for n in full if n not in names]:
            raise ConfigError(f"normalizer {self.kind!r}: unknown parameters {wrong}, allowed: {sorted(set(names))}")
        if lacking := [n for n in k.numbers if n not in full]:
            raise ConfigError(f"normalizer {self.kind!r}: parameters {lacking} are missing")
        if self.nonfinite not in ("error", "zero"):
            raise ConfigError(f"normalizer: nonfinite must be 'error' or 'zero', got {self.nonfinite!r}")
        _check_order(self.kind, full)
        object.__setattr__(self, "params", {n: full[n] for n in dict.fromkeys(names)})
        if self.stats is not None: object.__setattr__(self, "stats", _check_stats(self, k))

    @classmethod
    def parse(
        cls,
        spec: "str | Mapping | Normalizer", # such as "ct:-1000,1000", a dict from `to_dict`, or a normaliser
    ) -> "Normalizer":
        "Read a spec; what is a normaliser already comes back as it is"
        if isinstance(spec, Normalizer): return spec
        if isinstance(spec, Mapping): return cls.from_dict(spec)
        if not isinstance(spec, str): raise ConfigError(f"normalizer: a text or a dict is needed, got {spec!r}")
        return cls(**_parse(spec))

    def __str__(self) -> str: return _spec(self)

    @property
    def is_fitted(self) -> bool:
        "True if the numbers do not depend on the volume"
        return self.stats is not None or not _KINDS[self.kind].statistics

    def __call__(
        self,
        vol: np.ndarray, # (...) any real dtype, unchanged
        mask: np.ndarray | None = None, # (...) where statistics of the volume come from; not used once fitted
    ) -> np.ndarray: # (...) float32, a new array
        "Normalise one volume"
        return _normalise(self, vol, mask)

    def fit(
        self,
        items: Iterable[tuple[np.ndarray, np.ndarray | None]], # (img, mask or None), read once
    ) -> "Normalizer": # a new one with statistics
        "Take the statistics from a data set; inside the masks, where there are masks"
        return _fit(self, items)

    def to_dict(self) -> dict[str, Any]: # JSON-able
        "Plain values that `from_dict` turns back"
        return {"kind": self.kind, "params": dict(self.params), "nonfinite": self.nonfinite,
                "stats": None if self.stats is None else dict(self.stats)}

    @classmethod
    def from_dict(
        cls,
        d: Mapping[str, Any], # as from `to_dict`; everything but "kind" may be absent
    ) -> "Normalizer":
        "Rebuild a normaliser from plain values"
        if wrong := [k for k in d if k not in ("kind", "params", "stats", "nonfinite")]:
            raise ConfigError(f"normalizer: unknown keys {wrong}, allowed: kind, params, stats, nonfinite")
        if "kind" not in d: raise ConfigError(f"normalizer: 'kind' is missing. Allowed: {', '.join(_KINDS)}")
        return cls(d["kind"], d.get("params") or {}, d.get("stats"), d.get("nonfinite", "error"))

# %%
#| export
def _check_order(kind: str, p: Mapping) -> None:
    "Refuse ranges that are empty or upside down"
    for low, high in (("low", "high"), ("q_low", "q_high"), ("out_low", "out_high")):
        if low in p and not p[low] < p[high]:
            raise ConfigError(f"normalizer {kind!r}: {low} must be below {high}, got {p[low]:g} and {p[high]:g}")
    if "width" in p: window_range(p["centre"], p["width"])
    if "q_low" in p and not (0 <= p["q_low"] and p["q_high"] <= 100):
        raise ConfigError(f"normalizer {kind!r}: percentiles lie in 0 to 100, got {p['q_low']:g} and {p['q_high']:g}")

def _check_stats(norm: Normalizer, k: _Kind) -> dict[str, float]:
    if not k.statistics: raise ConfigError(f"normalizer {norm.kind!r}: has no statistics, got {dict(norm.stats)}")
    names = ["n", "mean", "std", "min", "max"] + (["low", "high"] if norm.kind in ("percentile", "dataset") else [])
    if set(norm.stats) != set(names):
        raise ConfigError(f"normalizer {norm.kind!r}: statistics {names} are needed, got {dict(norm.stats)}")
    return {n: int(norm.stats[n]) if n == "n" else _number(norm.stats[n], norm.kind) for n in names}

def _spec(norm: Normalizer) -> str:
    "Text form; statistics are not part of it"
    k, p = _KINDS[norm.kind], norm.params
    names = list(k.numbers)
    if k.ranged and (p["out_low"], p["out_high"]) != (0, 1): names += ["out_low", "out_high"]
    words = [repr(p[n]).removesuffix(".0") for n in names]
    words += ["nonzero"]*p.get("nonzero", False) + ["nonfinite=zero"]*(norm.nonfinite == "zero")
    return norm.kind + (":" + ",".join(words) if words else "")

# %%
#| export
def _percents(norm: Normalizer) -> tuple[float, ...]:
    if norm.kind == "dataset": return 0.5, 99.5
    return (norm.params["q_low"], norm.params["q_high"]) if norm.kind == "percentile" else ()

def _normalise(norm: Normalizer, vol: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    kind, nonzero, stats = _KINDS[norm.kind], norm.params.get("nonzero", False), norm.stats
    vol, mask = _checked_pair(vol, mask, norm.nonfinite)
    if kind.must_fit and stats is None:
        raise DataError(f"normalizer {norm.kind!r} has no statistics yet: call fit with the training volumes first")
    if vol.size == 0: return np.zeros(vol.shape, np.float32)
    if kind.statistics and stats is None: stats = _volume_statistics(vol, mask, nonzero, _percents(norm))
    out = apply_line(vol, kind.line(norm.params, stats, vol.dtype))
    if nonzero: out[vol == 0] = 0
    return out

def _fit(norm: Normalizer, items: Iterable) -> Normalizer:
    kind = _KINDS[norm.kind]
    if not kind.statistics: return norm
    found, percents = Statistics(), _percents(norm)
    for img, mask in items:
        found.add(*_checked_pair(img, mask, norm.nonfinite), nonzero=norm.params["nonzero"], histogram=bool(percents))
    if not found.n:
        raise DataError(f"normalizer {norm.kind!r}: no voxel to fit to; are there volumes, and are the masks empty?")
    extra = dict(zip(("low", "high"), (found.percentile(q) for q in percents)))
    return replace(norm, stats=_numbers(found) | extra)

# %% [markdown]
# Text, object, dictionary: the same thing three times. A dictionary carries the statistics too, and its fingerprint
# says whether two runs used the same normalisation.

# %%
specs = ["ct:-1000,1000", "ct:-1024,3071,-50,205", "window:40,400", "zscore", "zscore:nonzero", "percentile:0.5,99.5",
         "minmax:nonfinite=zero", "minmax", "scale", "identity", "dataset"]
[str(Normalizer.parse(s)) for s in ("percentile", "robust", "window: 40, 400", "ct_normalization")]

# %%
for s in specs:
    norm = Normalizer.parse(s)
    assert str(norm) == s and Normalizer.parse(json.loads(json.dumps(norm.to_dict()))) == norm == Normalizer.parse(norm)
fingerprint(Normalizer.parse("zscore"))

# %%
with raises(ConfigError, match="'zscor', did you mean 'zscore'\\? Allowed: identity"): Normalizer.parse("zscor")
with raises(ConfigError, match="takes 2 or 4 numbers"): Normalizer.parse("ct:-1000")
with raises(ConfigError, match="low must be below high, got 5 and -5"): Normalizer.parse("ct:5,-5")
with raises(ConfigError, match="unknown parameters"): Normalizer("zscore", {"low": 3})

# %% [markdown]
# ## What it does to an image
# A toy CT: air, fat, soft tissue, bone, and one metal clip.

# %%
side = np.linspace(-1, 1, 64)
r = np.sqrt(side[:, None, None]**2 + side[None, :, None]**2 + 0.5*side[None, None, ::4]**2)
tissue = np.select([r < 0.2, r < 0.6, r < 0.8], [700, 50, -90], -1000)
ct = np.rint(tissue + rng.normal(0, 15, tissue.shape)).astype(np.int16)
ct[30:33, 45:48, 8] = 30000
shown = ["ct:-1000,1000", "window:0,300", "minmax", "percentile:0.5,99.5", "zscore"]
fig, axes = plt.subplots(2, 6, figsize=(7, 2.8))
for (top, below), name, v in zip(axes.T, ["input [HU]", *shown], [ct, *(Normalizer.parse(s)(ct) for s in shown)]):
    top.imshow(v[:, :, 8], cmap="Greys_r", vmax=1000 if v is ct else None)
    top.set_title(name, fontsize=7)
    top.set(xticks=[], yticks=[])
    below.hist(v.ravel(), bins=60, range=(-1100, 1100) if v is ct else None, log=True, color="0.4")
    below.tick_params(labelsize=6)
    below.set_yticks([])
fig.tight_layout()

# %% [markdown]
# The clip ruins `minmax` and pulls mean and deviation of `zscore`; what clips first is safe. Laws: the output is
# float32 of the same shape, the input stays as it was, a z-score does not care about a linear change of units, a
# constant volume gives zeros.

# %%
before = ct.copy()
for s in specs[:-1]:
    out = Normalizer.parse(s)(ct)
    assert out.dtype == np.float32 and out.shape == ct.shape and np.array_equal(ct, before)
    assert np.isfinite(Normalizer.parse(s)(np.zeros((4, 4)))).all()
z = Normalizer.parse("zscore")
assert close(z(ct), z(3.0*ct + 100), 1e-4) and close(z(ct).mean(), 0, 1e-5) and close(z(ct).std(), 1, 1e-5)
assert (z(np.full((5, 5), 0.1)) == 0).all()

# %%
with raises(DataError, match="1 NaN, 0 infinite"): z(np.array([1.0, np.nan]))
with raises(DataError, match="NumPy array is needed, got builtins.list"): z([1.0, 2.0])
with raises(DataError, match="mask has shape"): z(ct, mask=np.ones(3, bool))
Normalizer.parse("minmax:nonfinite=zero")(np.array([1.0, np.nan, 2.0]))

# %% [markdown]
# ## Fitting to a data set
# `fit` reads the volumes once and gives a new object. The statistics are those of the foreground, so that the amount of
# air around the patient has no say.

# %%
patients = [ct + np.int16(d) for d in (-8, 0, 8)]
fitted = Normalizer.parse("dataset").fit((v, v > -500) for v in patients)
{k: round(v, 1) for k, v in fitted.stats.items()}

# %%
fig, axes = plt.subplots(1, 2, figsize=(7, 2))
for ax, vols, title in [(axes[0], patients, "before [HU]"), (axes[1], [fitted(v) for v in patients], str(fitted))]:
    for v in vols: ax.hist(v[patients[0] > -500].clip(-500, 1000), bins=80, histtype="step", log=True)
    ax.set(title=title, yticks=[])

# %%
assert not Normalizer.parse("dataset").is_fitted and fitted.is_fitted and fitted == Normalizer.parse(fitted.to_dict())
assert fitted == Normalizer.parse("dataset").fit((v, v > -500) for v in patients)
inside = np.concatenate([v[v > -500] for v in patients]).astype(float)
assert close(fitted.stats["std"], inside.std(), 1e-9) and close(fitted.stats["high"], np.percentile(inside, 99.5), 1e-9)
shared = Normalizer.parse("zscore").fit((v, v > -500) for v in patients)
assert close(np.concatenate([shared(v)[v > -500] for v in patients]).std(), 1, 1e-5)

# %%
with raises(DataError, match="call fit with the training volumes first"): Normalizer.parse("dataset")(ct)
with raises(DataError, match="no voxel to fit to"): Normalizer.parse("dataset").fit([])

# %% [markdown]
# ## Agreement with the reference
# nnU-Net's CT scheme written out literally, with all foreground values in memory:

# %%
low, high = np.percentile(inside, [0.5, 99.5])
literal = (np.clip(ct.astype(np.float64), low, high) - inside.mean())/max(inside.std(), 1e-8)
np.testing.assert_allclose(fitted(ct), literal, atol=1e-5)
float(np.abs(fitted(ct) - literal).max())
