# %% [markdown]
# # Splits of embryos
#
# > Which videos train and which test: couples whole, rare phases everywhere, and the published algorithm to the bit.
#
# Siblings look alike, and they were cultured in the same dish. In the published split 37 couples are in training and in
# test, with 45 of the 141 test videos, so its test score is partly a score of recognition. Here a couple is never torn,
# unless that is asked for. The published algorithm is kept for comparison, since results were reported with it.
# Its files call one set `val`, its writer `eval`, and its command accepts only the latter: these words are one here.

# %%
#| default_exp embryo.splits

# %%
#| export
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import (ConfigError, DataError, FormatError, OnExists, check_output, fingerprint, log, read_json,
                            rng_for, write_json)
from medvol_nb.embryo.index import EmbryoIndex, build_index
from medvol_nb.embryo.phases import Phase, parse_video

# %%
from medvol_nb.core import raises, tmpdir
from medvol_nb.embryo.phantom import make_phantom_dataset

# %% [markdown]
# ## The file
# A JSON object from set to video names. `val`, `eval`, `valid` and `validation` are one set; what is written is `val`.
# A key `_meta` tells how the split was made.

# %%
#| export
_VAL = ("val", "eval", "valid", "validation")

def set_name(
    name: str, # as a user or a file spells it
) -> str: # 'val' for all words that mean it
    "One word for each set"
    return "val" if name in _VAL else name

def load_split(
    path: str | os.PathLike, # JSON file
    index: EmbryoIndex | None = None, # videos that exist; None: do not compare
    set: str | None = None, # set that must be there and not empty; None: none in particular
) -> dict[str, list[str]]: # set -> video names
    "Read a split; unknown, doubled or torn videos are errors"
    data, out = read_json(path), {}
    if not isinstance(data, dict): raise FormatError(f"{path}: must be an object from set to video names")
    for key, names in data.items():
        if key.startswith("_"): continue
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise FormatError(f"{path}, set {key!r}: must be a list of video names")
        if (name := set_name(key)) in out: raise FormatError(f"{path}: set {name!r} comes twice, as {key!r}, too")
        out[name] = names
    if twice := [v for v, n in Counter(v for names in out.values() for v in names).items() if n > 1]:
        raise DataError(f"{path}: {len(twice)} videos come twice, such as {', '.join(sorted(twice)[:5])}")
    if set is not None:
        if set_name(set) not in out: raise DataError(f"{path}: has no set {set!r}, it has {', '.join(out)}")
        if not out[set_name(set)]: raise DataError(f"{path}: set {set!r} is empty")
    if index is not None:
        known = {v.name for v in index.videos}
        if unknown := [v for names in out.values() for v in names if v not in known]:
            raise DataError(f"{path}: {len(unknown)} videos are not in {index.root}: {', '.join(sorted(unknown)[:20])}")
    return out

# %% [markdown]
# ## The published algorithm
# Take the phase that the fewest remaining videos have, shuffle these videos, cut the list at the rounded shares, append
# the parts to the sets, forget the videos, go on. Siblings are torn, and a phase that too few videos have for every
# part to get one ends it with an error. Everything follows from one generator of Python's `random` module; this and the
# published image folders are the only places where it is used.

# %%
#| export
def _legacy_random(seed: int) -> random.Random:
    "Generator of the published scripts"
    return random.Random(seed)

def _check_weights(weights: Sequence[float], names: Sequence[str]) -> list[float]:
    if len(weights) != len(names): raise ConfigError(f"weights: {len(weights)} for the sets {', '.join(names)}")
    if not all(np.isfinite(w) and w > 0 for w in weights): raise ConfigError(f"weights: must be > 0, got {weights}")
    return [w/sum(weights) for w in weights]

def legacy_embryo_split(
    phases: Mapping[str, Sequence[str]], # video -> phases that at least one of its frames has, in the order of videos
    weights: Mapping[str, float], # set -> share
    seed: int = 1234567890, # of the shuffles
) -> dict[str, list[str]]: # set -> videos
    "The published split: greedy by rarity, siblings torn"
    shares, rng = _check_weights(list(weights.values()), list(weights)), _legacy_random(seed)
    cuts = np.cumsum([0, *shares])
    left: dict[str, list[str]] = {}
    for video, found in phases.items():
        for p in found: left.setdefault(p, []).append(video)
    out: dict[str, list[str]] = {name: [] for name in weights}
    while left:
        rarest = min(left, key=lambda p: len(left[p])) # the first inserted of equals
        videos = list(left[rarest])
        rng.shuffle(videos)
        ends = [round(c*len(videos)) for c in cuts]
        if any(a == b for a, b in zip(ends, ends[1:])):
            raise DataError(f"legacy split: {len(videos)} remaining videos with phase {rarest} cannot fill "
                            f"{len(out)} sets. Use the grouped split, or leave this phase out")
        for name, a, b in zip(out, ends, ends[1:]): out[name] += videos[a:b]
        taken = set(videos)
        left = {p: rest for p, vs in left.items() if (rest := [v for v in vs if v not in taken])}
    return out

# %%
phases = {f"AA{k//2}-{k % 2}": ["t2", "t4"] + ["tB"]*(k % 3 == 0) for k in range(30)}
torn = legacy_embryo_split(phases, {"train": 0.6, "val": 0.2, "test": 0.2}, seed=0)
{k: len(v) for k, v in torn.items()}, torn["test"]

# %%
assert sorted(v for vs in torn.values() for v in vs) == sorted(phases) and torn["train"][0] in phases
assert len({v.split("-")[0] for v in torn["train"]} & {v.split("-")[0] for v in torn["test"]}) > 0
with raises(DataError, match="2 remaining videos with phase tHB cannot fill 3 sets"):
    legacy_embryo_split(phases | {"X-1": ["tHB"], "X-2": ["tHB"]}, {"train": 0.6, "val": 0.2, "test": 0.2})

# %% [markdown]
# ## Couples whole
# Phases are dealt with from the rarest; the couples of a phase that have no set yet come in random order, large ones
# first; each goes to the set that lacks the most videos of this phase. Then every phase with as many couples as sets is
# looked at: if a set lacks it, the couple whose move disturbs the shares least is moved there. The result depends on
# names, phases, shares and seed, not on the order of folders.

# %%
#| export
Group = Literal["code", "cycle", "none"]

def group_of(
    video: str, # name
    group: Group = "code", # 'code': the couple, 'cycle': couple and cycle, 'none': the video itself
) -> str: # videos with the same group stay together
    "What must not be torn"
    name = parse_video(video)
    return {"code": name.couple, "cycle": f"{name.couple}-{name.cycle}", "none": video}[group]

def _deal(counts: np.ndarray, sizes: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "Set of every group; rows of `counts` are groups, columns are phases"
    part = np.full(len(sizes), -1)
    target, size_target = shares[:, None]*counts.sum(0), shares*sizes.sum()
    have, have_size = np.zeros_like(target), np.zeros_like(shares)
    def give(g: int, lack: np.ndarray) -> None:
        overall = size_target - have_size
        s = max(range(len(shares)), key=lambda s: (round(lack[s], 9), round(overall[s], 9), -s))
        part[g] = s
        have[s] += counts[g]
        have_size[s] += sizes[g]
    groups = (counts > 0).sum(0)
    for p in sorted(np.flatnonzero(groups).tolist(), key=lambda p: (groups[p], p)):
        todo = rng.permutation(np.flatnonzero((counts[:, p] > 0) & (part < 0)))
        for g in todo[np.argsort(-sizes[todo], kind="stable")].tolist(): give(g, target[:, p] - have[:, p])
    rest = rng.permutation(np.flatnonzero(part < 0))
    for g in rest[np.argsort(-sizes[rest], kind="stable")].tolist(): give(g, size_target - have_size)
    return part

def _best(counts: np.ndarray, sizes: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    "The first of some beginnings after which nothing is left to wish, or else the best; few couples may need several"
    tries = []
    for k in range(60):
        rng = rng_for(seed, "embryo split", k)
        part = _deal(counts, sizes, shares, rng) if k % 2 == 0 else rng.permutation(_deal(counts, sizes, shares, rng))
        cost, part = _cover(part, counts, sizes, shares)
        tries.append((cost[:2], k, part))
        if cost[:2] == (0, 0) or len(sizes) > 200: break
    return min(tries, key=lambda t: t[:2])[2]

def _cover(part: np.ndarray, counts: np.ndarray, sizes: np.ndarray, shares: np.ndarray
           ) -> tuple[tuple[float, float, float], np.ndarray]:
    "Move single groups until every phase that can be in every set is, and shares are as good as moves make them"
    n, total = len(shares), sizes.sum()
    coverable = (counts > 0).sum(0) >= n
    limit = np.maximum(0.02*total, sizes.max())
    def cost(part: np.ndarray) -> tuple[float, float, float]:
        have = np.array([(counts[part == s] > 0).sum(0) for s in range(n)])
        off = np.abs(np.bincount(part, sizes, n) - shares*total)
        return float((have[:, coverable] == 0).sum()), float(np.maximum(0, off - limit).sum()), float((off**2).sum())
    best = cost(part)
    while best[:2] > (0, 0):
        moves = []
        for g in range(len(part)):
            for s in range(n):
                if s == part[g]: continue
                trial = part.copy()
                trial[g] = s
                moves.append((cost(trial), g, s))
                for h in range(g + 1, len(part)):
                    if part[h] != s or len(part) > 60: continue
                    swapped = trial.copy()
                    swapped[h] = part[g]
                    moves.append((cost(swapped), g, s, h))
        found, g, s, *h = min(moves, default=(best, 0, 0))
        if found >= best: break
        for other in h: part[other] = part[g]
        part[g], best = s, found
    return best, part

def grouped_split(
    phases: Mapping[str, Sequence[str]], # video -> phases that at least one of its frames has
    weights: Mapping[str, float], # set -> share
    seed: int = 1234567890, # of the order of couples
    *,
    group: Group = "code", # what must not be torn
) -> dict[str, list[str]]: # set -> videos, by name
    "Split with couples whole and every phase in every set, as far as there are couples"
    if group not in ("code", "cycle", "none"): raise ConfigError(f"group: 'code', 'cycle' or 'none', got {group!r}")
    shares, videos = np.array(_check_weights(list(weights.values()), list(weights))), sorted(phases)
    if not videos: raise DataError("split: there are no videos")
    groups = sorted({group_of(v, group) for v in videos})
    if len(groups) < len(shares): raise DataError(f"split: {len(groups)} groups cannot fill {len(shares)} sets")
    place = {g: k for k, g in enumerate(groups)}
    counts, sizes = np.zeros((len(groups), len(Phase))), np.zeros(len(groups))
    for v in videos:
        sizes[k := place[group_of(v, group)]] += 1
        for p in set(phases[v]): counts[k, Phase.parse(p).idx()] += 1
    part = _best(counts, sizes, shares, seed)
    out: dict[str, list[str]] = {name: [] for name in weights}
    for v in videos: out[list(out)[part[place[group_of(v, group)]]]].append(v)
    if empty := [k for k, v in out.items() if not v]: raise DataError(f"split: no group is left for {', '.join(empty)}")
    return out

# %%
whole = grouped_split(phases, {"train": 0.6, "val": 0.2, "test": 0.2}, seed=0)
{k: len(v) for k, v in whole.items()}, whole["test"]

# %%
assert sum(map(len, whole.values())) == 30 and len(whole["train"]) == 18
codes = [{group_of(v) for v in vs} for vs in whole.values()]
assert not codes[0] & codes[1] and not codes[0] & codes[2] and not codes[1] & codes[2]
assert whole == grouped_split(dict(reversed(phases.items())), {"train": 0.6, "val": 0.2, "test": 0.2}, seed=0)
with raises(ConfigError, match="weights: must be > 0"): grouped_split(phases, {"train": 1, "test": 0})

# %% [markdown]
# ## How fair it is
# Videos and frames of every phase in every set, and how many couples are torn.

# %%
#| export
def check_fairness(
    index: EmbryoIndex, # of the data set
    split: Mapping[str, Sequence[str]], # set -> videos
) -> dict[str, Any]: # 'videos' and 'frames': phase -> set -> number; 'shares'; 'torn_couples', 'leaking_videos'
    "Phases in every set, and couples that are in more than one"
    names, sets = [v.name for v in index.videos], list(split)
    frames = np.zeros((len(names), len(Phase) + 1), np.int64)
    np.add.at(frames, (index.video.astype(np.int64), index.phase.astype(np.int64)), 1) # column -1 is the last
    place = {v: k for k, v in enumerate(names)}
    rows = {s: frames[[place[v] for v in split[s]]] for s in sets}
    where: dict[str, set] = {}
    for s in sets:
        for v in split[s]: where.setdefault(parse_video(v).couple, set()).add(s)
    torn = {c for c, found in where.items() if len(found) > 1}
    total = sum(len(v) for v in split.values())
    return {"videos": {p.value: {s: int((rows[s][:, p.idx()] > 0).sum()) for s in sets} for p in Phase},
            "frames": {p.value: {s: int(rows[s][:, p.idx()].sum()) for s in sets} for p in Phase},
            "shares": {s: round(len(split[s])/total, 4) for s in sets}, "torn_couples": len(torn),
            "leaking_videos": {s: sum(parse_video(v).couple in torn for v in split[s]) for s in sets}}

def phases_of(
    index: EmbryoIndex, # of the data set
) -> dict[str, list[str]]: # video -> phases with at least one frame, in the order of the phases
    "Phases that every video shows"
    return {v.name: [Phase.from_idx(k).value for k in np.unique(index.phase[index.rows(v.name)]).tolist() if k >= 0]
            for v in index.videos}

# %% [markdown]
# ## The command
# `medvol embryo split DATASET OUTPUT 0.6 0.2 0.2`: two weights are train and test, three are train, val and test.

# %%
#| export
def split(
    dataset: str | os.PathLike, # extracted data set
    output: str | os.PathLike, # JSON file; in a folder it is called split.json
    weights: Sequence[float], # shares of train and test, or of train, val and test; 0.6 0.2 0.2 is usual
    *,
    seed: int = 1234567890, # of the shuffles
    group: Literal["code", "cycle", "none"] = "code", # what must not be torn: couple, couple and cycle, or nothing
    compat: Literal["none", "upstream"] = "none", # 'upstream': the published algorithm, which tears couples
    on_exists: OnExists = "error", # what to do when the file is there already
) -> dict[str, Any]: # file, sizes, shares, torn couples, videos of every phase
    "Divide the videos of a data set into training, validation and test"
    names = {2: ("train", "test"), 3: ("train", "val", "test")}.get(len(weights))
    if names is None: raise ConfigError(f"weights: two or three are needed, got {len(weights)}")
    if compat not in ("none", "upstream"): raise ConfigError(f"compat: 'none' or 'upstream', got {compat!r}")
    path = Path(output)/"split.json" if Path(output).is_dir() else Path(output)
    shares = dict(zip(names, _check_weights(weights, names)))
    if not check_output(path, on_exists): return {"split": str(path), "skipped": True}
    index = build_index(dataset)
    found = phases_of(index)
    made = legacy_embryo_split({v: p for v, p in found.items() if p}, shares, seed) if compat == "upstream" else \
        grouped_split(found, shares, seed, group=group)
    fair = check_fairness(index, made)
    if fair["torn_couples"]: log.warning("%d couples are in more than one set", fair["torn_couples"])
    kept = "none" if compat == "upstream" else group # the published algorithm keeps nothing together
    meta = {"format": 1, "seed": seed, "weights": list(weights), "group": kept, "compat": compat,
            "counts": {k: len(v) for k, v in made.items()}, "videos": fingerprint(found)}
    write_json(path, {**made, "_meta": meta}, on_exists)
    return {"split": str(path), "counts": meta["counts"], **fair}

# %%
with tmpdir() as d:
    make_phantom_dataset(d/"tree", 20, 20, ["F+00"], 16)
    told = split(d/"tree", d, (0.6, 0.2, 0.2))
    index = build_index(d/"tree", cache=False)
    sets = load_split(d/"split.json", index, "eval")
    with raises(DataError, match="has no set 'trian', it has train, val, test"): load_split(d/"split.json", set="trian")
told["counts"], told["shares"], told["torn_couples"], {p: n for p, n in told["videos"].items() if p in ("t2", "tHB")}

# %%
assert told["torn_couples"] == 0 and sum(map(len, sets.values())) == 20 and list(sets) == ["train", "val", "test"]
