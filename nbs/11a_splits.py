# %% [markdown]
# # Splits
#
# > Test set and folds: the published split to the bit, one that never moves a case, and a balanced one; groups whole.
#
# A split is a promise: nothing in the test set was seen in training. It is broken quietly. One animal is scanned five
# times, and the scans are shuffled one by one. The same patients are published under two names, and each data set is
# split on its own. In the lists that come with VISTA3D, 15 of 20 mice and 4 patients of VerSe are in training *and*
# test; of the 16 test cases of Pancreas-CT, 7 are training cases of another list. So the unit of every split here is a
# *group*: a subject, or whatever must not be torn.
#
# Three methods answer three questions. `legacy`: what did the reference do? `hash`: how do I add cases next year
# without moving the old ones? `stratified`: how does each fold get its share of the rare classes?

# %%
#| default_exp splits

# %%
#| export
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Literal

import numpy as np

from medvol_nb.core import ConfigError, DataError, log, rng_for, seed_words

# %%
import matplotlib.pyplot as plt

from medvol_nb.core import raises

# %% [markdown]
# ## Twenty mice, torn apart
# Twenty animals, each scanned at seven hours. Shuffle the scans, take a fifth for testing, and count the animals that
# are on both sides:

# %%
mice = [{"image": f"native/M{animal:02}_{hour:03}h/CT140.nii.gz", "label": f"native/M{animal:02}_{hour:03}h/seg.nii.gz"}
        for animal in range(1, 21) for hour in (0, 24, 48, 72, 96, 120, 144)]
shuffled = [mice[k]["image"][:10] for k in rng_for(0, "mice").permutation(len(mice))]
mice[8], len(set(shuffled[:28]) & set(shuffled[28:]))

# %% [markdown]
# ## The legacy split
# The reference shuffles the positions with NumPy's legacy generator, takes the first 80 % for training, shuffles the
# training list again with a *fresh* generator of the same seed, and deals it out like cards: fold $f$ gets positions
# $f, f+5, f+10, …$ Shuffling twice with one seed is an accident, but lists were published with it, so it is reproduced
# to the bit. It is the one place in this library where another generator than `rng_for` is used.

# %%
#| export
def _check_numbers(test_ratio: float, n_folds: int) -> None:
    if not 0 <= test_ratio < 1: raise ConfigError(f"split: test_ratio must be in [0, 1), got {test_ratio!r}")
    if not isinstance(n_folds, int) or isinstance(n_folds, bool) or n_folds < 1:
        raise ConfigError(f"split: n_folds must be an integer from 1, got {n_folds!r}")

def _enough(n_groups: int, n_folds: int, what: str = "") -> None:
    if n_groups < n_folds:
        raise DataError(f"split: {n_groups} groups{what} cannot fill {n_folds} folds. Lower n_folds (--n-folds) or "
                        "test_ratio (--test-ratio), or use smaller groups")

def legacy_split(
    n: int, # number of cases, in the order of their sorted paths
    test_ratio: float = 0.2, # share of the test set
    n_folds: int = 5, # number of folds
    seed: int = 20230808, # of NumPy's legacy generator
) -> tuple[list[int], list[list[int]]]: # positions of the test cases; positions of each fold
    "The split of the VISTA3D lists, bit by bit (MONAI's `partition_dataset`, applied twice)"
    _check_numbers(test_ratio, n_folds)
    idx = list(range(n))
    np.random.RandomState(seed).shuffle(idx)
    n_train = min(n, int((1 - test_ratio)*n + 0.5))
    train, test = idx[:n_train], idx[n_train:]
    _enough(len(train), n_folds, f" for training (of {n})")
    deal = list(range(len(train)))
    np.random.RandomState(seed).shuffle(deal)
    return test, [[train[k] for k in deal[f::n_folds]] for f in range(n_folds)]

# %%
legacy_split(10)

# %% [markdown]
# The golden vectors, computed with the reference, and the law that every case has one place:

# %%
assert legacy_split(10) == ([7, 5], [[4, 6], [0, 3], [9, 1], [8], [2]])
assert legacy_split(23) == ([10, 11, 14, 13, 21],
                            [[2, 4, 17, 5], [18, 0, 1, 9], [22, 20, 16, 8], [7, 6, 3], [19, 15, 12]])
for n in (7, 50, 101):
    test, folds = legacy_split(n)
    assert sorted(test + sum(folds, [])) == list(range(n)) and len(folds[0]) - len(folds[-1]) in (0, 1)
with raises(ValueError, match="4 groups for training \\(of 5\\) cannot fill 5 folds"): legacy_split(5)

# %% [markdown]
# ## A split that never moves a case
# With shuffling, one new case changes the place of all others, and models trained before can no longer be compared.
# Here a group's place is a hash of its *name* and the seed, and of nothing else. It costs exact sizes: they scatter
# like a binomial, about $\sqrt{n}$. It gives two things. Old cases stay when new ones come. And a subject that appears
# in several data sets, under the same name, falls on the same side in all of them, though each is split on its own.

# %%
#| export
def _members(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    "Group -> positions of its items, groups by first appearance"
    out: dict[Hashable, list[int]] = {}
    for k, g in enumerate(groups): out.setdefault(g, []).append(k)
    return out

def hash_split(
    groups: Sequence[int | str], # group of each item, such as the subject's name
    test_ratio: float = 0.2, # expected share of groups in the test set
    n_folds: int = 5, # number of folds
    seed: int = 20230808, # part of what is hashed
) -> tuple[list[int], list[list[int]]]: # positions of the test items; positions of each fold
    "Place each group by a hash of its name: independent of all other groups and of their order"
    _check_numbers(test_ratio, n_folds)
    members = _members(groups)
    _enough(len(members), n_folds)
    test: list[int] = []
    folds: list[list[int]] = [[] for _ in range(n_folds)]
    for g, items in members.items():
        side, fold = seed_words(seed, "hash_split", g)[:2]
        (test if side < test_ratio*2**32 else folds[fold % n_folds]).extend(items)
    if empty := [f for f, items in enumerate(folds) if not items]:
        log.warning("hash split: folds %s are empty, as there are only %d groups. Take another seed, fewer folds, or "
                    "method='stratified'", empty, len(members))
    return sorted(test), [sorted(f) for f in folds]

# %%
names = [f"case_{k:04}" for k in range(1000)]
first, later = hash_split(names[:500]), hash_split(names)
[len(first[0]), *map(len, first[1])], [len(later[0]), *map(len, later[1])]

# %%
def place(split: tuple, names: Sequence[str]) -> dict[str, int]:
    return {names[k]: f for f, part in enumerate([split[0], *split[1]], -1) for k in part}

old, new = place(first, names), place(later, names)
assert all(new[k] == old[k] for k in old)
turned = names[::-1]
assert place(hash_split(turned), turned) == new
few, more = hash_split(names, test_ratio=0.1)[0], hash_split(names, test_ratio=0.3)[0]
assert set(few) < set(later[0]) < set(more)
with raises(ValueError, match="3 groups cannot fill 5 folds"): hash_split(["a", "b", "c", "a", "b"])

# %% [markdown]
# ## A balanced split
# With 30 cases of a rare tumour among 500, chance gives one fold two of them and another nine. Iterative stratification
# (Sechidis, Tsoumakas and Vlahavas, *On the stratification of multi-label data*, ECML PKDD 2011) goes through the
# classes, rarest first, and hands each case to the part that lacks this class most. Two changes are made to it. What is
# handed out is a group with all its classes, the number of cases being treated as one more class. And since a greedy
# choice can go wrong near the end, groups are exchanged afterwards as long as a part misses its share by more than one
# case and the exchange helps. The test set is cut off first, then the rest is divided into folds.

# %%
#| export
def _greedy(counts: np.ndarray, ideal: np.ndarray, order: np.ndarray) -> np.ndarray:
    "Part of each group; `counts` (group, class), `ideal` (part, class), `order` breaks ties"
    part = np.full(len(counts), -1)
    lacking = ideal.astype(float).copy()
    left = (counts > 0).sum(0)
    while (part < 0).any():
        rare = int(np.argmin(np.where(left > 0, left, np.iinfo(np.int64).max)))
        mine = [g for g in order if part[g] < 0 and counts[g, rare]]
        for g in sorted(mine, key=lambda g: (-counts[g, rare], -counts[g, -1])): # stable: ties stay in `order`
            part[g] = np.lexsort((-lacking[:, -1], -lacking[:, rare]))[0]
            lacking[part[g]] -= counts[g]
            left -= counts[g] > 0
    return part

def _cost(off: np.ndarray) -> np.ndarray:
    "How bad it is to be `off` cases from the ideal: little up to one case, much beyond; summed over classes"
    far = np.maximum(np.abs(off) - 0.999, 0)
    return (far*far*1e3 + far*1e3 + off*off).sum(-1)

def _exchange(counts: np.ndarray, ideal: np.ndarray, part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "Move or swap groups while a part misses its share of a class by more than one case"
    part = part.copy()
    off = np.stack([counts[part == p].sum(0) for p in range(len(ideal))]) - ideal
    tries = np.zeros(off.shape, int) # draws of candidates that did not help, since the last one that did
    some = max(8, int((2**17/counts.shape[1])**0.5)) # candidates looked at together, a matter of memory
    nothing = np.zeros((1, counts.shape[1]), counts.dtype)
    for _ in range(8*off.size + 200):
        far = np.where(tries < 8, np.abs(off), 0)
        p, c = np.unravel_index(int(np.argmax(far)), far.shape)
        if far[p, c] <= 1: break
        mine = np.flatnonzero((part == p) & ((counts[:, c] > 0) == (off[p, c] > 0)))
        others = np.flatnonzero(part != p)
        mine, others = rng.permutation(mine)[:some], rng.permutation(others)[:4*some]
        a = np.r_[counts[mine], nothing] # the last row stands for "nothing", which makes a swap a move
        b = np.r_[counts[others], *[nothing]*len(ideal)]
        q = np.r_[part[others], np.arange(len(ideal))]
        delta = b[None] - a[:, None] # (mine, others, class): what part p gains
        gain = _cost(off[p] + delta) + _cost(off[q][None] - delta) - _cost(off[p]) - _cost(off[q])[None]
        gain[:, q == p] = 0
        i, j = np.unravel_index(int(np.argmin(gain)), gain.shape)
        if gain[i, j] > -1e-9:
            tries[p, c] += 1
            continue
        tries[:] = 0
        off[p] += delta[i, j]
        off[q[j]] -= delta[i, j]
        if i < len(mine): part[mine[i]] = q[j]
        if j < len(others): part[others[j]] = p
    return part

# %%
#| export
def _stratify(counts: np.ndarray, shares: Sequence[float], seed: int, what: str) -> np.ndarray:
    "Part of each group so that each part gets its share of every class"
    ideal = np.asarray(shares, float)[:, None]*counts.sum(0)
    rng = rng_for(seed, "stratified_split", what)
    def off(part: np.ndarray) -> np.ndarray:
        return np.stack([counts[part == p].sum(0) for p in range(len(ideal))]) - ideal
    best = _exchange(counts, ideal, _greedy(counts, ideal, rng.permutation(len(counts))), rng)
    for _ in range(min(100, 150_000//counts.size)): # small tables deserve another try from nearby
        if np.abs(off(best)).max() <= 1: break
        part, some = best.copy(), rng.permutation(len(counts))[:max(2, min(8, len(counts)//5))]
        part[some] = part[rng.permutation(some)]
        part = _exchange(counts, ideal, part, rng)
        if _cost(off(part)).sum() <= _cost(off(best)).sum(): best = part
    return best

def stratified_split(
    groups: Sequence[Hashable], # group of each item, such as the subject's name
    classes_per_item: Sequence[Collection[Hashable]], # the classes present in each item
    test_ratio: float = 0.2, # share of the test set
    n_folds: int = 5, # number of folds
    seed: int = 20230808, # breaks ties
) -> tuple[list[int], list[list[int]]]: # positions of the test items; positions of each fold
    """Share out the cases of every class evenly, groups whole: iterative stratification, then exchanges

    Sechidis, Tsoumakas and Vlahavas, On the stratification of multi-label data, ECML PKDD 2011; here with groups and
    with exchanges at the end."""
    _check_numbers(test_ratio, n_folds)
    if len(groups) != len(classes_per_item):
        raise DataError(f"split: {len(groups)} groups but {len(classes_per_item)} sets of classes, one an item each")
    members = _members(groups)
    _enough(len(members), n_folds)
    names = sorted(members, key=lambda g: (str(g), str(type(g)))) # the order of items must not matter
    classes = {c: k for k, c in enumerate(sorted({c for s in classes_per_item for c in s}, key=str))}
    counts = np.zeros((len(names), len(classes) + 1), np.int64)
    for g, name in enumerate(names):
        for k in members[name]:
            counts[g, [classes[c] for c in set(classes_per_item[k])] + [-1]] += 1
    in_test = _stratify(counts, (1 - test_ratio, test_ratio), seed, "test") == 1 if test_ratio else \
        np.zeros(len(names), bool)
    train = np.flatnonzero(~in_test)
    _enough(len(train), n_folds, f" for training (of {len(names)})")
    part = np.full(len(names), -1)
    part[train] = _stratify(counts[train], [1/n_folds]*n_folds, seed, "folds")
    items = {p: sorted(k for g in np.flatnonzero(part == p) for k in members[names[g]]) for p in range(-1, n_folds)}
    return items[-1], [items[f] for f in range(n_folds)]

# %%
rng = rng_for(0, "splits")
chance = {"liver": 0.95, "spleen": 0.7, "liver tumour": 0.3, "metastasis": 0.06}
present = [{c for c, p in chance.items() if rng.random() < p} for _ in range(500)]
cases = [f"p{k:03}" for k in range(500)]
def table(split: tuple) -> np.ndarray:
    return np.array([[sum(c in present[k] for k in part) for c in chance] for part in [split[0], *split[1]]])
balanced, chancy = table(stratified_split(cases, present)), table(legacy_split(500))
fig, axes = plt.subplots(1, 2, figsize=(6, 2.2), sharey=True)
for ax, t, title in [(axes[0], chancy, "legacy"), (axes[1], balanced, "stratified")]:
    off = t - np.array([0.2] + [0.16]*5)[:, None]*t.sum(0)
    ax.imshow(off.T, cmap="coolwarm", vmin=-8, vmax=8)
    for (x, y), v in np.ndenumerate(off): ax.text(x, y, f"{v:+.1f}", ha="center", va="center", fontsize=6)
    ax.set_xticks(range(6), ["test", *map(str, range(5))], fontsize=7)
    ax.set_yticks(range(4), list(chance), fontsize=7)
    ax.set_title(f"{title}: cases off the ideal", fontsize=8)

# %%
share = np.array([0.2] + [0.16]*5)[:, None]*balanced.sum(0)
assert np.abs(balanced - share).max() <= 1.2 and np.abs(chancy - share).max() > 3
flip = rng.permutation(500)
again = stratified_split([cases[k] for k in flip], [present[k] for k in flip])
assert sorted(flip[again[0]]) == stratified_split(cases, present)[0]

# %% [markdown]
# ## Groups from names
# The subject usually stands in the path. `group_keys` reads it with a regular expression whose group is the name. The
# expression is applied to the path *in the list*, never to the absolute path of a machine, so a folder named after the
# pattern somewhere above cannot trigger it. A case that does not match is an error; silently making it a group of its
# own would be the leak again.

# %%
#| export
def group_keys(
    items: Sequence[Mapping], # items of a data list
    pattern: str, # regular expression; its group `subject`, else its first group, else the match is the name
    key: str = "image", # the field that is searched
) -> list[str]: # one name an item
    "Name of the subject of each item, read from its path"
    try: finder = re.compile(pattern)
    except re.error as e: raise ConfigError(f"group pattern {pattern!r} is no regular expression: {e}") from None
    out, lost = [], []
    for n, item in enumerate(items):
        text = item.get(key, "")
        text = text if isinstance(text, str) else text[0]
        m = finder.search(text)
        if not m:
            lost.append(f"item {n} ({text!r})")
            continue
        name = m["subject"] if "subject" in finder.groupindex else m[1] if finder.groups else m[0]
        if name is None: lost.append(f"item {n} ({text!r})")
        else: out.append(name)
    if lost: raise DataError(f"group pattern {pattern!r} does not match {len(lost)} of {len(items)} items: "
                             f"{', '.join(lost[:5])}. Make it match every {key!r}")
    return out

# %%
group_keys(mice, r"/M(\d+)_")[::35], group_keys(mice, r"(?P<subject>M\d+)_(\d+)h")[8]

# %%
with raises(DataError, match="does not match 77 of 140 items: item 63"): group_keys(mice, "/(M0.)_")
with raises(ConfigError, match="no regular expression"): group_keys(mice, "M(")

# %% [markdown]
# ## Putting it together
# `assign` takes the items of a list and returns training items with their `fold` and testing items without one, in the
# order of the published files: all of fold 0, then fold 1, and so on. Groups may be given as a list of names or as a
# pattern. Without groups every item stands for itself.

# %%
#| export
def _with_fold(item: Mapping, fold: int | None) -> dict:
    "The item with another fold, or with none; `fold` comes after image and label"
    head = {k: item[k] for k in ("image", "label") if k in item}
    rest = {k: v for k, v in item.items() if k not in ("image", "label", "fold")}
    return head | ({} if fold is None else {"fold": fold}) | rest

def _item_key(item: Mapping) -> str:
    image = item.get("image", item.get("label", ""))
    return image if isinstance(image, str) else "\n".join(image)

def assign(
    items: Sequence[Mapping], # items of a data list; their order matters for "legacy" only
    method: Literal["legacy", "hash", "stratified"] = "legacy", # how cases are divided
    *,
    groups: Sequence[int | str] | str | None = None, # group of each item, or a pattern for `group_keys`
    classes: Sequence[Collection[Hashable]] | None = None, # classes present in each item, for "stratified"
    test_ratio: float = 0.2, # share of the test set, in [0, 1)
    n_folds: int = 5, # number of folds
    seed: int = 20230808, # same seed, same split
) -> tuple[list[dict], list[dict]]: # training items with `fold`, testing items without
    "Divide items into test set and folds; no group is ever torn"
    items = list(items)
    if isinstance(groups, str): groups = group_keys(items, groups)
    if groups is not None and len(groups) != len(items):
        raise DataError(f"split: {len(groups)} groups for {len(items)} items, one an item is needed")
    numbers = {"test_ratio": test_ratio, "n_folds": n_folds, "seed": seed}
    if method == "legacy":
        members = list(_members(range(len(items)) if groups is None else groups).values())
        test, folds = legacy_split(len(members), **numbers)
        test, folds = [k for g in test for k in members[g]], [[k for g in f for k in members[g]] for f in folds]
    elif method == "hash": test, folds = hash_split(_names(items) if groups is None else groups, **numbers)
    elif method == "stratified":
        if classes is None: raise DataError("split: method 'stratified' needs `classes`, those present in each item")
        test, folds = stratified_split(_names(items) if groups is None else groups, classes, **numbers)
    else: raise ConfigError(f"split: method must be 'legacy', 'hash' or 'stratified', got {method!r}")
    return [_with_fold(items[k], f) for f, part in enumerate(folds) for k in part], \
        [_with_fold(items[k], None) for k in test]

def _names(items: Sequence[Mapping]) -> list[str]: return [_item_key(i) for i in items]

# %%
training, testing = assign(mice, groups=r"/M(\d+)_")
len(training), len(testing), training[0], testing[0]

# %% [markdown]
# The animals again, torn by the reference's rule and whole with groups:

# %%
def sections(training: list, testing: list) -> np.ndarray:
    out = np.zeros((6, 20), int)
    for i in training: out[1 + i["fold"], int(i["image"][8:10]) - 1] += 1
    for i in testing: out[0, int(i["image"][8:10]) - 1] += 1
    return out

fig, axes = plt.subplots(1, 2, figsize=(7, 1.9), sharey=True)
for ax, g, title in [(axes[0], None, "each scan on its own"), (axes[1], r"/M(\d+)_", "animals as groups")]:
    ax.imshow(sections(*assign(mice, groups=g)), cmap="Greys", vmin=0, vmax=7, aspect="auto")
    ax.set_yticks(range(6), ["test", *(f"fold {f}" for f in range(5))], fontsize=7)
    ax.set_title(title, fontsize=8)
    ax.set_xlabel("animal", fontsize=7)
    ax.set_xticks([])

# %%
torn = sections(*assign(mice))
assert ((torn[0] > 0) & (torn[1:].sum(0) > 0)).sum() > 12
for method in ("legacy", "hash", "stratified"):
    parts = assign(mice, method, groups=r"/M(\d+)_", classes=[{"heart"}]*140)
    assert ((sections(*parts) > 0).sum(0) == 1).all() and len(parts[0]) + len(parts[1]) == 140

# %%
with raises(ValueError, match="4 groups for training \\(of 5\\) cannot fill 5 folds"):
    assign(mice[:35], groups=r"/M(\d+)_")
with raises(DataError, match="needs `classes`"): assign(mice, "stratified")
with raises(ConfigError, match="must be 'legacy', 'hash' or 'stratified'"): assign(mice, "random")

# %% [markdown]
# ## The same patients under two names
# Pancreas-CT and one half of the multi-organ data set show the same patients. Split each on its own, by position, and
# test patients of one are training patients of the other. Split each on its own by the hash of the patient's number,
# and they agree without knowing of each other.

# %%
pancreas = [{"image": f"nifti/PANCREAS_{k:04}.nii.gz"} for k in range(1, 83) if k not in (25, 70)]
organs = [{"image": f"images_tcia/PANCREAS_{k:04}.nii"} for k in range(1, 83, 2) if k not in (25, 70)]
def leaks(method: str) -> int:
    number = r"PANCREAS_(\d+)"
    (train_a, test_a), (train_b, test_b) = (assign(x, method, groups=number) for x in (pancreas, organs))
    def ids(x: list) -> set: return set(group_keys(x, number))
    return len(ids(test_a) & ids(train_b)) + len(ids(test_b) & ids(train_a))

{m: leaks(m) for m in ("legacy", "hash")}

# %%
assert leaks("hash") == 0 and leaks("legacy") > 5

# %% [markdown]
# ## Leaving one data set out
# Whether a model travels to another hospital is asked by training on all data sets but one. This is a split of lists,
# not of cases.

# %%
#| export
def leave_one_dataset_out(
    names: Sequence[str], # data sets
) -> dict[str, list[str]]: # held-out data set -> the others, to train on
    "One split a data set: it is held out, all others train"
    names = list(names)
    if len(set(names)) < len(names): raise DataError(f"leave one out: a data set is named twice in {names}")
    if len(names) < 2: raise DataError(f"leave one out: two data sets are needed, got {names}")
    return {held: [n for n in names if n != held] for held in names}

# %%
leave_one_dataset_out(["AMOS22", "FLARE22", "Task09"])

# %%
with raises(DataError, match="two data sets are needed"): leave_one_dataset_out(["AMOS22"])

# %% [markdown]
# ## Agreement with the reference
# MONAI's own function, called as the reference calls it:

# %%
from monai.data import partition_dataset

for n in (10, 64, 157):
    train, test = partition_dataset(list(range(n)), ratios=[0.8, 0.2], shuffle=True, seed=20230808)
    assert legacy_split(n) == (test, partition_dataset(train, num_partitions=5, shuffle=True, seed=20230808))
n
