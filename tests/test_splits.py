"""Splits: the published one to the bit, groups whole, old cases in place, classes balanced."""
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medvol_nb.core import ConfigError, DataError
from medvol_nb.splits import (
    assign,
    group_keys,
    hash_split,
    leave_one_dataset_out,
    legacy_split,
    stratified_split,
)

METHODS = ["legacy", "hash", "stratified"]

# Computed with the reference (spec 01, section 2): positions in the list sorted by path
GOLDEN = {10: ([7, 5], [[4, 6], [0, 3], [9, 1], [8], [2]]),
          23: ([10, 11, 14, 13, 21], [[2, 4, 17, 5], [18, 0, 1, 9], [22, 20, 16, 8], [7, 6, 3], [19, 15, 12]])}


def cases(n: int) -> list[dict]:
    return [{"image": f"i/{k:04}.nii.gz", "label": f"l/{k:04}.nii.gz", "site": k % 3} for k in range(n)]


# ----------------------------------------------------------------------------------------------------------- legacy

@pytest.mark.parametrize("n", GOLDEN)
def test_golden_vectors(n): assert legacy_split(n) == GOLDEN[n]


@pytest.mark.parametrize("n", [7, 10, 23, 50, 64, 101, 300, 1228])
@pytest.mark.parametrize("seed", [20230808, 0])
def test_legacy_is_the_reference(n, seed):
    from monai.data import partition_dataset
    train, test = partition_dataset(list(range(n)), ratios=[0.8, 0.2], shuffle=True, seed=seed)
    folds = partition_dataset(train, num_partitions=5, shuffle=True, seed=seed)
    assert legacy_split(n, seed=seed) == (test, folds)


@given(st.integers(1, 400), st.sampled_from([0, 0.1, 0.2, 0.25, 1/3, 0.5]), st.integers(1, 8))
def test_legacy_places_every_case_once(n, ratio, n_folds):
    n_train = min(n, int((1 - ratio)*n + 0.5))
    if n_train < n_folds:
        with pytest.raises(ValueError, match=f"{n_train} groups for training \\(of {n}\\) cannot fill {n_folds} folds"):
            legacy_split(n, ratio, n_folds)
        return
    test, folds = legacy_split(n, ratio, n_folds)
    sizes = [len(f) for f in folds]
    assert sorted(test + sum(folds, [])) == list(range(n)) and len(test) == n - n_train
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_legacy_leaves_global_generators_alone():
    def state() -> tuple: return np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    before = state()
    legacy_split(50)
    assert before == state()


def test_A1_order_of_items_and_keys():
    items = [{**i, "fold": 9, "pseudo_label": i["image"]} for i in cases(23)]
    training, testing = assign(items)
    test, folds = GOLDEN[23]
    assert [int(i["image"][2:6]) for i in training] == sum(folds, []) and [i["fold"] for i in training] == \
        [0]*4 + [1]*4 + [2]*4 + [3]*3 + [4]*3
    assert [int(i["image"][2:6]) for i in testing] == test
    assert list(training[0]) == ["image", "label", "fold", "site", "pseudo_label"]
    assert all("fold" not in i for i in testing) and items[0]["fold"] == 9


# ------------------------------------------------------------------------------------------------------------- groups

def sections(training: list[dict], testing: list[dict]) -> dict[str, object]:
    return {i["image"]: i["fold"] for i in training} | {i["image"]: "test" for i in testing}


@hypothesis_settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from(METHODS), st.integers(1, 5), st.sampled_from([0, 0.1, 0.2, 0.5]), st.integers(0, 99))
def test_A4_no_group_is_torn(data, method, n_folds, ratio, seed):
    groups = data.draw(st.lists(st.integers(0, 30), max_size=80))
    items = cases(len(groups))
    classes = [{g % 3, "x"} for g in groups]
    try: training, testing = assign(items, method, groups=groups, classes=classes, test_ratio=ratio, n_folds=n_folds,
                                    seed=seed)
    except DataError as e:
        numbers = str(n_folds), str(len(set(groups)))
        assert all(f"{x}" in str(e) for x in numbers) and "cannot fill" in str(e)
        return
    place = sections(training, testing)
    assert len(place) == len(items) == len(training) + len(testing)
    for g in set(groups): assert len({place[i["image"]] for i, h in zip(items, groups) if h == g}) == 1
    again = assign(items, method, groups=groups, classes=classes, test_ratio=ratio, n_folds=n_folds, seed=seed)
    assert again == (training, testing)
    if method != "legacy":
        flip = data.draw(st.permutations(range(len(items))))
        other = assign([items[k] for k in flip], method, groups=[groups[k] for k in flip],
                       classes=[classes[k] for k in flip], test_ratio=ratio, n_folds=n_folds, seed=seed)
        assert sections(*other) == place
    if method != "hash": assert {i["fold"] for i in training} == set(range(n_folds))


@pytest.mark.parametrize("method", METHODS)
def test_A4_fewer_groups_than_folds_names_both_numbers(method):
    with pytest.raises(ValueError, match="3 groups.* cannot fill 5 folds"):
        assign(cases(30), method, groups=[k % 3 for k in range(30)], classes=[{1}]*30, test_ratio=0)


def test_A4_sizes_with_equal_groups():
    groups = [k//4 for k in range(400)]
    for method in ("legacy", "stratified"):
        training, testing = assign(cases(400), method, groups=groups, classes=[{1}]*400)
        sizes = [sum(i["fold"] == f for i in training) for f in range(5)]
        assert len(testing) == 80 and sizes == [64]*5
    training, testing = assign(cases(4000), "hash")
    assert abs(len(testing) - 800) < 4*(4000*.2*.8)**.5
    assert all(abs(sum(i["fold"] == f for i in training) - 640) < 4*640**.5 for f in range(5))


# -------------------------------------------------------------------------------------------------------------- hash

@given(st.sets(st.integers(0, 10**6), min_size=5, max_size=60), st.sets(st.integers(0, 10**6), max_size=30))
def test_hash_never_moves_old_cases(old, new):
    def place(names: list) -> dict:
        test, folds = hash_split(names)
        return {names[k]: f for f, part in enumerate([test, *folds], -1) for k in part}
    before, after = place(sorted(old)), place(sorted(old | new, key=str))
    assert all(after[k] == before[k] for k in old)


HASH_GOLDEN = ([5], [[1, 6, 7, 8, 11], [3], [], [4, 9, 10], [0, 2]])


def test_hash_golden():
    "Places are a promise to the users of old lists: SHA-256 of seed and name, as `core.seed_words` makes it"
    names = [f"case_{k:03}" for k in range(12)]
    assert hash_split(names) == HASH_GOLDEN and hash_split(names, seed=1) != HASH_GOLDEN


def test_hash_share_grows_without_moving():
    names = [f"p{k}" for k in range(2000)]
    tests = [set(hash_split(names, test_ratio=r)[0]) for r in (0, 0.1, 0.2, 0.5, 0.9)]
    assert tests[0] == set() and all(a < b for a, b in zip(tests, tests[1:]))


def test_hash_warns_of_empty_folds(caplog):
    with caplog.at_level("WARNING", "medvol_nb"): test, folds = hash_split([f"p{k}" for k in range(6)])
    assert ("are empty" in caplog.text) == any(not f for f in folds)


def test_hash_without_groups_goes_by_image():
    items = [{"image": ["a_t1.nii", "a_t2.nii"]}, *cases(20)]
    place = sections(*([{**i, "image": str(i["image"])} for i in part] for part in assign(items, "hash")))
    other = sections(*([{**i, "image": str(i["image"])} for i in part] for part in assign(items[::-1], "hash")))
    assert place == other and len(place) == 21


# -------------------------------------------------------------------------------------------------------- stratified

def counts(split: tuple, classes: list[set]) -> np.ndarray:
    "(part, class), the number of cases as the last class"
    names = sorted({c for s in classes for c in s}, key=str)
    parts = [split[0], *split[1]]
    return np.array([[sum(c in classes[k] for k in part) for c in names] + [len(part)] for part in parts])


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_A4_classes_are_shared_out_where_it_is_feasible(seed):
    "25 equal bundles of groups: 5 bundles for the test set and 4 a fold would be perfect, so one case off is feasible"
    rng = np.random.default_rng(seed)
    n_classes = int(rng.integers(1, 7))
    bundle = [rng.random((int(rng.integers(1, 4)), n_classes)) < rng.random(n_classes)
              for _ in range(rng.integers(1, 5))]
    groups = [f"{u}-{b}" for u in range(25) for b, g in enumerate(bundle) for _ in g]
    classes = [set(np.flatnonzero(row).tolist()) for _ in range(25) for g in bundle for row in g]
    order = rng.permutation(len(groups))
    groups, classes = [groups[k] for k in order], [classes[k] for k in order]
    found = counts(stratified_split(groups, classes), classes)
    ideal = np.array([0.2] + [0.16]*5)[:, None]*found.sum(0)
    assert np.abs(found - ideal).max() <= 1


@pytest.mark.parametrize("n", [50, 137, 500])
def test_stratified_single_cases(n):
    rng = np.random.default_rng(n)
    classes = [{c for c, p in enumerate((0.95, 0.6, 0.3, 0.1, 0.05)) if rng.random() < p} for _ in range(n)]
    found = counts(stratified_split(list(range(n)), classes), classes)
    assert np.abs(found[0] - 0.2*found.sum(0)).max() <= 1
    assert np.abs(found[1:] - found[1:].sum(0)/5).max() <= 1
    chance = counts(legacy_split(n), classes)
    assert np.abs(chance[1:] - chance[1:].sum(0)/5).max() > np.abs(found[1:] - found[1:].sum(0)/5).max()


def test_a_class_with_as_many_cases_as_parts_reaches_every_fold():
    classes = [{"common", "rare"} if k % 20 == 0 else {"common"} for k in range(120)]
    found = counts(stratified_split(list(range(120)), classes), classes)
    assert found[:, 1].min() >= 1 and found[:, 1].sum() == 6


def test_stratified_without_classes_is_by_size():
    test, folds = stratified_split(list(range(53)), [set()]*53)
    assert len(test) in (10, 11) and max(map(len, folds)) - min(map(len, folds)) <= 1


def test_stratified_depends_on_the_seed():
    classes = [{k % 3} for k in range(60)]
    assert stratified_split(list(range(60)), classes, seed=1) != stratified_split(list(range(60)), classes, seed=2)


def test_stratified_with_one_large_group():
    groups = [0]*50 + list(range(1, 51))
    test, folds = stratified_split(groups, [{1}]*100)
    assert sorted(test + sum(folds, [])) == list(range(100))
    assert sum(set(range(50)) <= set(part) for part in (test, *folds)) == 1


# ------------------------------------------------------------------------------------------------------------ leakage

def test_D8_animals_and_patients_are_not_torn():
    "15 of 20 animals of the published list are in training and test; 4 subjects of VerSe, whose file names tell them"
    mice = [{"image": f"1_nativeCTdata_nifti/M{a:02}_{h:03}h/CT140.nii.gz"} for a in range(1, 21)
            for h in range(0, 168, 24)]
    verse = [{"image": f"dataset-01training/rawdata/sub-verse{s:03}/sub-verse{s:03}_split-verse{k}_ct.nii.gz"}
             for s in range(80) for k in range(1 + (s % 4 == 0))]
    for items, pattern in ((mice, r"/M(\d+)_"), (verse, r"/sub-(?P<subject>[^_/]+)_")):
        def torn(parts: tuple, items: list = items, pattern: str = pattern) -> int:
            place, names = sections(*parts), group_keys(items, pattern)
            return sum(len({place[i["image"]] for i, n in zip(items, names) if n == g}) > 1 for g in set(names))
        assert torn(assign(items)) > 3
        for method in METHODS:
            assert torn(assign(items, method, groups=pattern, classes=[{"x"}]*len(items))) == 0


def test_D7_the_same_patients_under_two_names():
    "The 80 patients of Pancreas-CT, 43 of them also in the multi-organ set, split without knowing of each other"
    a = [{"image": f"manifest/nifti/PANCREAS_{k:04}.nii.gz"} for k in range(1, 83) if k not in (25, 70)]
    b = [{"image": f"images_tcia/PANCREAS_{k:04}.nii"} for k in range(1, 44)]
    pattern = r"PANCREAS_(\d+)\.nii"
    def leaks(method: str) -> int:
        (train_a, test_a), (train_b, test_b) = (assign(x, method, groups=pattern) for x in (a, b))
        ids = [set(group_keys(x, pattern)) for x in (train_a, test_a, train_b, test_b)]
        return len(ids[1] & ids[2]) + len(ids[3] & ids[0])
    assert leaks("legacy") > 5 and leaks("hash") == 0


# -------------------------------------------------------------------------------------------------------- group names

@pytest.mark.parametrize("pattern, expected", [
    (r"M\d+", "M01"), (r"/M(\d+)_", "01"), (r"(?P<subject>M\d+)_(\d+)h", "M01"),
    (r"_(\d+)h/CT(?P<subject>\d+)", "140")])
def test_group_names(pattern, expected):
    assert group_keys([{"image": "native/M01_000h/CT140.nii.gz"}], pattern) == [expected]


def test_group_names_of_multi_channel_images_and_other_keys():
    items = [{"image": ["p7/t1.nii", "p7/t2.nii"], "subject_id": "S9"}]
    assert group_keys(items, r"p\d") == ["p7"] and group_keys(items, r"\d", key="subject_id") == ["9"]


def test_D13_folders_above_the_data_do_not_count(tmp_path):
    "A pattern is searched in the path of the list; where the data lies has no say"
    items = [{"image": f"case_{k}.nii.gz"} for k in range(10)]
    (tmp_path/"study_089").mkdir()
    assert group_keys(items, r"(\d+)\.nii") == [str(k) for k in range(10)]
    with pytest.raises(DataError, match=r"does not match 10 of 10 items: item 0 \('case_0.nii.gz'\)"):
        group_keys(items, "089")


def test_optional_groups_must_match():
    items = [{"image": "a1"}, {"image": "a"}]
    with pytest.raises(DataError, match="does not match 1 of 2"): group_keys(items, r"a(\d)?")


# ------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("options, words", [
    ({"method": "random"}, "method must be"), ({"test_ratio": 1}, "test_ratio must be"),
    ({"test_ratio": -.1}, "test_ratio"), ({"test_ratio": float("nan")}, "test_ratio"),
    ({"n_folds": 0}, "n_folds must be"), ({"n_folds": 2.0}, "n_folds must be"), ({"n_folds": True}, "n_folds must be"),
    ({"method": "stratified"}, "needs `classes`"), ({"method": "stratified", "classes": [{1}]}, "1 sets of classes"),
    ({"groups": [1]}, "1 groups for 20 items"), ({"groups": "("}, "no regular")])
def test_wrong_options(options, words):
    with pytest.raises((DataError, ConfigError), match=words): assign(cases(20), **options)


def test_leave_one_dataset_out():
    assert leave_one_dataset_out("ABC") == {"A": ["B", "C"], "B": ["A", "C"], "C": ["A", "B"]}
    for bad in ([], ["A"], ["A", "B", "A"]):
        with pytest.raises(DataError, match="leave one out"): leave_one_dataset_out(bad)


def test_stratified_is_quick_on_a_whole_body_data_set():
    "1204 cases with 117 classes, neighbours present together, as in TotalSegmentator"
    import time
    rng = np.random.default_rng(0)
    low = rng.integers(0, 100, 1204)
    classes = [set(range(a, b)) for a, b in zip(low.tolist(), (low + rng.integers(5, 60, 1204)).tolist())]
    start = time.process_time()
    split = stratified_split(list(range(1204)), classes)
    assert time.process_time() - start < 30
    found = counts(split, classes)
    assert np.abs(found[0] - 0.2*found.sum(0)).max() <= 1 and np.abs(found[1:] - found[1:].sum(0)/5).max() <= 2
