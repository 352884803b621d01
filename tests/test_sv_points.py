"Page 22b: every point lies in what it claims, labels change only where that is said, and the air is no object"
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from medvol_nb import phantoms
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.config import check_config
from medvol_nb.core import ConfigError, DataError, rng_for
from medvol_nb.sv_points import (
    COMPLETE_SETS,
    PADDING,
    PointDraw,
    PointPatch,
    PointSettings,
    SupervoxelPointSampler,
    _opened,
    _spread,
    batch_prompts,
    draw_modes,
)

CUBE = np.ones((3, 3, 3), bool)
MODES = ("organ_sub", "organ_add", "zeroshot_unseen", "zeroshot_random")
ALL_MODES = [("regular", ""), ("organ_sub", "part"), ("organ_sub", "rest"), ("organ_sub", "deleted"),
             ("organ_add", "organ"), ("organ_add", "zeroshot"), ("zeroshot_unseen", ""), ("zeroshot_random", "")]
SMALL = PointSettings(min_voxels=120, margin=3)
EVEN = SMALL.model_copy(update={m: 0.25 for m in MODES} | {"negatives": 2})


def world(seed, n=40):
    "Organs in a body, the body itself unlabelled, and pieces that cut across both; 0 outside the body"
    body = phantoms.random_body(n, seed=seed, n_organs=7)
    size = 9 + seed % 3
    blocks = np.ravel_multi_index((np.indices((n,)*3) + seed)//size, ((n + seed)//size + 1,)*3) + 1
    return np.where(body.lbl > 1, body.lbl, 0).astype(np.int32), np.where(body.lbl > 0, blocks, 0).astype(np.int32)


WORLDS = [world(seed) for seed in range(6)]


def classes(lbl): return [int(k) for k in np.unique(lbl) if k not in (0, 255)]


def values(lbl, points): return lbl[tuple(points.T)]


def check_points(sample, settings):
    "The claim of every prompt, in the labels as they are after all prompts"
    lbl = sample.lbl.reshape(sample.lbl.shape[-3:])
    for p in sample.prompts:
        assert p.points.dtype == p.point_labels.dtype == np.int64
        inside = np.isin(p.point_labels, (1, 3))
        assert np.isin(p.point_labels, (2, 3) if p.class_id in settings.special_ids else (0, 1)).all()
        assert ((values(lbl, p.points) == p.target) == inside).all()
        assert 1 <= inside.sum() <= settings.positives
        assert (~inside).sum() <= max(settings.negatives, p.mode == "organ_sub")
        assert len(np.unique(p.points[inside], axis=0)) == inside.sum()


# ------------------------------------------------------------------------------------------------------------- B12

@pytest.mark.parametrize("settings", [SMALL, EVEN, EVEN.model_copy(update={"positives": 1, "negatives": 0})])
def test_B12_every_point_lies_in_its_claimed_mask(settings):
    sampler, seen = SupervoxelPointSampler(settings), Counter()
    for k, (lbl, sv) in enumerate(WORLDS):
        for again in range(8):
            sample = sampler(lbl, sv, rng_for(again, k))
            assert [p.class_id for p in sample.prompts] == classes(lbl)
            check_points(sample, settings)
            seen.update(p.mode for p in sample.prompts)
    assert set(seen) == {"regular", *MODES} and min(seen.values()) >= 5


@pytest.mark.parametrize("mode, outcome", ALL_MODES)
def test_B12_points_come_from_eroded_masks_away_from_the_border(mode, outcome):
    made = 0
    for lbl, sv in WORLDS[:3]:
        for k in classes(lbl):
            sample = SupervoxelPointSampler(EVEN).apply(lbl, sv, [PointDraw(k, mode, outcome, 5)])
            (p,) = sample.prompts
            target = sample.lbl == p.target
            thin = mode == "regular" and not ndimage.binary_erosion(target, CUBE)[3:-3, 3:-3, 3:-3].any()
            if p.mode != mode or thin: continue
            made += 1
            organ_points = (values(lbl, p.points) == k) & (mode == "organ_add") # may lie anywhere in a thin organ
            for at, inside, free in zip(p.points, p.point_labels, organ_points):
                if free: continue
                assert (at >= 3).all() and (at < 37).all()
                around = sample.lbl[tuple(slice(a - 1, a + 2) for a in at)] == p.target
                assert around.all() if inside else not around.any()
    assert made >= 5


def test_B12_mode_frequencies_within_binomial_bounds():
    ids, n = [3, 7, 23, 57, 131], 4000
    draws = [d for k in range(n) for d in draw_modes(ids, rng_for(11, k))]
    def within(count, total, p): return stats.binom.ppf(1e-5, total, p) <= count <= stats.binom.ppf(1 - 1e-5, total, p)
    for k in ids:
        own = Counter(d.mode for d in draws if d.class_id == k)
        if k in (23, 57): assert own == {"regular": n}; continue
        assert within(own["regular"], n, 0.6) and all(within(own[m], n, 0.1) for m in MODES)
    def outcomes(mode): return Counter(d.outcome for d in draws if d.mode == mode)
    sub, add = outcomes("organ_sub"), outcomes("organ_add")
    assert all(within(sub[o], sub.total(), p) for o, p in {"part": 0.5, "rest": 0.25, "deleted": 0.25}.items())
    assert set(add) == {"organ", "zeroshot"} and within(add["zeroshot"], add.total(), 0.5)
    assert {d.outcome for d in draws if d.mode not in ("organ_sub", "organ_add")} == {""}


def test_B12_odds_are_parameters():
    for mode in MODES:
        only = PointSettings(**{m: float(m == mode) for m in MODES})
        assert {d.mode for k in range(50) for d in draw_modes([1, 2], rng_for(k), only)} == {mode}
    never = PointSettings(**dict.fromkeys(MODES, 0))
    assert {d.mode for k in range(50) for d in draw_modes([1, 2], rng_for(k), never)} == {"regular"}


@pytest.mark.parametrize("mode", ["zeroshot_unseen", "zeroshot_random", "organ_add", "organ_sub"])
def test_B12_never_id_0(mode):
    "What is taken, added or made an object lies in one supervoxel, and that is never 0"
    made = 0
    for lbl, sv in WORLDS:
        for k in classes(lbl):
            for outcome in {"organ_add": ("organ",), "organ_sub": ("part", "deleted")}.get(mode, ("",)):
                sample = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(k, mode, outcome, 3)])
                if sample.prompts[0].mode != mode: continue
                made += 1
                changed = sample.lbl != lbl
                if mode == "zeroshot_random": changed &= lbl == 0 # structures that join may be larger
                assert len(ids := np.unique(sv[changed])) == 1 and ids[0] > 0
    assert made >= 10


@pytest.mark.parametrize("mode, outcome", ALL_MODES)
def test_B12_labels_change_only_where_stated(mode, outcome):
    made = 0
    for lbl, sv in WORLDS:
        for k in classes(lbl):
            before, pieces = lbl.copy(), sv.copy()
            sample = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(k, mode, outcome, 1)])
            np.testing.assert_array_equal(lbl, before)
            np.testing.assert_array_equal(sv, pieces)
            (p,), organ, changed = sample.prompts, lbl == k, sample.lbl != lbl
            target, shifted = sample.lbl == p.target, outcome in ("part", "rest", "zeroshot") or "zeroshot" in mode
            if p.mode != mode:
                assert p.mode == "regular" and not changed.any()
                continue
            made += 1
            assert p.target == k + 512*shifted
            if mode == "regular": assert not changed.any()
            if mode == "organ_sub":
                assert changed.any() and organ[changed].all()
                part = changed ^ organ if outcome == "rest" else changed
                assert 0.1*organ.sum() <= part.sum() <= 0.9*organ.sum()
                assert set(sample.lbl[changed].tolist()) == {0 if outcome == "deleted" else k + 512}
                np.testing.assert_array_equal(part, opened_by_definition(part)) # the part is thick and one piece
            if mode == "organ_add":
                new = target & ~organ
                assert target[organ].all() and (lbl[new] == 0).all() and new.sum() >= 0.1*organ.sum()
                assert not changed[~new & ~organ].any()
                assert ndimage.label(new, CUBE)[1] == 1 and (ndimage.binary_dilation(new, CUBE) & organ).any()
                np.testing.assert_array_equal(new, opened_by_definition(new))
            if mode == "zeroshot_unseen":
                assert (lbl[changed] == 0).all() and np.array_equal(changed, target) and target.sum() >= 120
                np.testing.assert_array_equal(target, opened_by_definition(target))
            if mode == "zeroshot_random": assert np.array_equal(changed, target) and not target[organ].any()
    assert made >= 8


def opened_by_definition(mask):
    parts, n = ndimage.label(ndimage.binary_erosion(mask, CUBE, border_value=1), CUBE)
    if not n: return np.zeros_like(mask)
    core = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return ndimage.binary_dilation(core, CUBE) & mask


@pytest.mark.parametrize("mode, outcome", ALL_MODES[1:6])
def test_B12_an_organ_of_one_component(mode, outcome):
    lbl, sv = np.zeros((30, 30, 30), np.int32), np.full((30, 30, 30), 1, np.int32)
    lbl[8:20, 8:20, 8:20] = 4
    sv[14:26, 6:22, 6:22] = 2 # half of the organ and one piece beside it
    settings = SMALL.model_copy(update={"part_range": (0.1, 0.6)})
    sample = SupervoxelPointSampler(settings).apply(lbl, sv, [PointDraw(4, mode, outcome, 0)])
    assert sample.prompts[0].mode == mode and (sample.lbl != lbl).any()
    check_points(sample, settings)


# ------------------------------------------------------------------------------------------------------------- S12

def test_S12_the_air_is_no_object():
    "The reference offers the id 0 as an unseen object"
    lbl, sv = np.zeros((32, 32, 32), np.int32), np.zeros((32, 32, 32), np.int32)
    lbl[10:16, 10:16, 10:16], sv[10:16, 10:16, 10:16] = 3, 5
    for mode, outcome in ALL_MODES[1:]:
        for seed in range(5):
            sample = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(3, mode, outcome, seed)])
            assert sample.prompts[0].mode == "regular" and np.array_equal(sample.lbl, lbl)
    sv[20:30, 20:30, 20:30] = 9 # now there is one object, and it is taken every time
    for seed in range(20):
        sample = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(3, "zeroshot_unseen", "", seed)])
        assert np.array_equal(sample.lbl == 515, sv == 9)


def test_S12_an_organ_partly_in_the_air_does_not_grow_into_it():
    lbl, sv = np.zeros((32, 32, 32), np.int32), np.zeros((32, 32, 32), np.int32)
    lbl[8:24, 8:24, 8:24], sv[:12] = 3, 5
    for seed in range(20):
        sample = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(3, "organ_add", "organ", seed)])
        grown = (sample.lbl == 3) & (lbl == 0)
        assert sample.prompts[0].mode == "organ_add" and grown.any() and (sv[grown] == 5).all()


@pytest.mark.parametrize("last", [False, True])
def test_S12_the_last_component_counts(last):
    "The reference searches components 1...n-1, so a single one, or the largest if it comes last, is never added"
    lbl, sv = np.zeros((32, 20, 20), np.int32), np.zeros((32, 20, 20), np.int32)
    lbl[12:18, 6:14, 6:14] = 3
    sv[12:26, 5:15, 5:15] = 7 # the organ and what lies behind it
    if last: sv[7:12, 7:12, 7:12] = 7 # a smaller component before it
    unlabelled = (sv == 7) & (lbl == 0)
    assert ndimage.label(ndimage.binary_erosion(unlabelled, CUBE), CUBE)[1] == 1 + last
    sample = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(3, "organ_add", "organ")])
    grown = (sample.lbl == 3) & (lbl == 0)
    assert sample.prompts[0].mode == "organ_add" and grown[18:26, 5:15, 5:15].all() and not grown[:11].any()


def test_S12_components_that_do_not_touch_are_not_added():
    lbl, sv = np.zeros((40, 20, 20), np.int32), np.zeros((40, 20, 20), np.int32)
    lbl[12:18, 6:14, 6:14] = 3
    sv[14:22, 6:14, 6:14] = sv[26:40, 2:18, 2:18] = 7 # the larger part is elsewhere
    sample = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(3, "organ_add", "organ")])
    assert np.array_equal(sample.lbl == 3, (lbl == 3) | ((sv == 7) & (np.arange(40) < 22)[:, None, None]))


# -------------------------------------------------------------------------------------------------- sizes and merging

@pytest.mark.parametrize("cut, part_range, fits", [(3, (0.1, 0.9), True), (3, (0.11, 0.9), False),
                                                   (27, (0.1, 0.9), True), (27, (0.1, 0.89), False)])
def test_a_part_of_10_to_90_percent(cut, part_range, fits):
    lbl = np.zeros((36, 12, 12), np.int32)
    lbl[3:33, 3:9, 3:9] = 6
    sv = np.where((np.arange(36) < 3 + cut)[:, None, None], 1, 0)*np.ones_like(lbl)
    settings = PointSettings(margin=0, part_range=part_range)
    sample = SupervoxelPointSampler(settings).apply(lbl, sv, [PointDraw(6, "organ_sub", "part")])
    assert (sample.prompts[0].mode == "organ_sub") == fits
    assert (sample.lbl == 518).sum() == (cut*36 if fits else 0)


@pytest.mark.parametrize("side, fits", [(8, True), (7, False)])
def test_an_object_has_at_least_so_many_voxels(side, fits):
    lbl, sv = np.zeros((2, 30, 30, 30), np.int32)
    lbl[3:8, 3:8, 3:8], sv[15:15 + side, 15:15 + side, 15:15 + side] = 1, 2
    sampler = SupervoxelPointSampler(PointSettings(margin=3, min_voxels=8**3))
    for mode in ("zeroshot_unseen", "zeroshot_random"):
        assert (sampler.apply(lbl, sv, [PointDraw(1, mode)]).prompts[0].mode == mode) == fits


@pytest.mark.parametrize("covered, joins", [(1, False), (3, True)])
def test_structures_join_when_more_than_a_tenth_is_covered(covered, joins):
    lbl, sv = np.zeros((2, 40, 30, 30), np.int32)
    sv[3:20, 5:25, 5:25] = 4
    lbl[20 - covered:36, 8:18, 8:18] = 9 # 21 or 19 voxels long; 1/17 and 3/19 of it are in the supervoxel
    lbl[30:36, 20:26, 20:26] = 2
    sample = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(2, "zeroshot_random")])
    (p,), target = sample.prompts, sample.lbl == 514
    assert p.mode == "zeroshot_random" and target[sv == 4].all()
    assert ((lbl == 9) & ~target).any() != joins and (sample.lbl == 9).any() != joins
    if joins: assert sorted(values(lbl, p.points).tolist()) == [0, 0, 9]
    asked = SupervoxelPointSampler(SMALL).apply(lbl, sv, [PointDraw(2, "zeroshot_random"), PointDraw(9)])
    assert [q.mode for q in asked.prompts] == ["regular", "regular"] # now 9 has a prompt and is not to be touched


def test_small_organs_at_the_border_still_get_points():
    lbl = np.zeros((24, 24, 24), np.int32)
    lbl[0, :2, 5], lbl[12, 12, 3:20], lbl[-1, -1, -1] = 1, 2, 3
    sample = SupervoxelPointSampler()(lbl, np.ones_like(lbl), rng_for(0))
    assert [len(p.points) for p in sample.prompts] == [2, 3, 1]
    check_points(sample, PointSettings())


def test_ignored_voxels_are_neither_changed_nor_pointed_at():
    for k, (lbl, sv) in enumerate(WORLDS):
        lbl = lbl.copy()
        lbl[(np.indices(lbl.shape).sum(0) + k) % 11 == 0] = 255
        lbl[:, 20:26] = 255
        for again in range(4):
            sample = SupervoxelPointSampler(EVEN)(lbl, sv, rng_for(again, "ignore", k))
            assert np.array_equal(sample.lbl == 255, lbl == 255) and 255 not in [p.class_id for p in sample.prompts]
            for p in sample.prompts: assert (values(lbl, p.points) != 255).all()


# ----------------------------------------------------------------------------------------------------- determinism

def same(a, b):
    return np.array_equal(a.lbl, b.lbl) and all(np.array_equal(v, b.arrays()[k]) for k, v in a.arrays().items())


def test_same_generator_same_prompts():
    lbl, sv = WORLDS[0]
    sampler = SupervoxelPointSampler(EVEN)
    for rng in (rng_for, torch_rng_for):
        first = sampler(lbl, sv, rng(5))
        assert same(first, sampler(lbl, sv, rng(5))) and not same(first, sampler(lbl, sv, rng(6)))


def test_draw_and_apply_are_separate():
    lbl, sv = WORLDS[1]
    sampler = SupervoxelPointSampler(EVEN)
    draws = sampler.draw(sampler.classes(lbl), rng_for(2))
    assert same(sampler.apply(lbl, sv, draws), sampler(lbl, sv, rng_for(2)))
    assert same(sampler.apply(lbl, sv, draws), sampler.apply(lbl, sv, draws))


def test_a_class_is_drawn_alike_whoever_else_is_there():
    assert draw_modes([9, 4, 130], rng_for(1))[1:2] == draw_modes([4], rng_for(1)) == draw_modes(iter([4]), rng_for(1))


def test_a_generator_moves_on():
    for rng in (rng_for(3), torch_rng_for(3)): assert draw_modes([1], rng) != draw_modes([1], rng)


def test_global_generators_are_left_alone():
    def states(): return np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()  # noqa: NPY002
    before = states()
    SupervoxelPointSampler(EVEN)(*WORLDS[0], torch_rng_for(0))
    assert states() == before


@pytest.mark.parametrize("dtype", ["u1", "i2", "<u2", ">i4", "i8", "u8"])
def test_types_and_layouts_do_not_matter(dtype):
    lbl, sv = WORLDS[2]
    sampler = SupervoxelPointSampler(EVEN)
    expected = sampler(lbl, sv, rng_for(4))
    odd = np.asfortranarray(lbl.astype(dtype))
    wide = np.repeat(sv.astype("u2" if dtype == "u1" else dtype), 2, axis=2)[..., ::2]
    assert same(sampler(odd, wide, rng_for(4)), expected) and expected.lbl.dtype == np.int32
    tensors = sampler(torch.from_numpy(lbl)[None], torch.from_numpy(sv)[None], rng_for(4))
    assert tensors.lbl.shape == (1, *lbl.shape)
    assert same(type(tensors)(tensors.lbl[0], tensors.prompts), expected)


# ------------------------------------------------------------------------------------------------------- the pieces

@pytest.mark.parametrize("shape", [(7, 9, 8), (1, 5, 6), (3, 1, 1)])
def test_morphology_agrees_with_scipy(shape):
    for seed in range(20):
        mask = ndimage.gaussian_filter(rng_for(seed, *shape).standard_normal(shape), 0.8, mode="nearest") > -0.3
        kept = mask.copy()
        np.testing.assert_array_equal(_spread(mask, np.logical_and), ndimage.binary_erosion(mask, CUBE, border_value=1))
        np.testing.assert_array_equal(_spread(mask, np.logical_or), ndimage.binary_dilation(mask, CUBE))
        np.testing.assert_array_equal(_opened(mask), opened_by_definition(mask))
        np.testing.assert_array_equal(mask, kept)


def test_classes_may_be_chosen():
    lbl, sv = WORLDS[0]
    sampler, ids = SupervoxelPointSampler(EVEN), classes(WORLDS[0][0])
    sample = sampler(lbl, sv, rng_for(0), classes=[ids[2], ids[0], 99, 0])
    assert [p.class_id for p in sample.prompts] == [ids[0], ids[2]]
    check_points(sample, EVEN)


def test_special_classes_are_regular_and_have_labels_of_their_own():
    lbl, sv = WORLDS[0]
    ids = classes(lbl)
    settings = EVEN.model_copy(update={"special_ids": (ids[0], ids[1])})
    for k in range(10):
        sample = SupervoxelPointSampler(settings)(lbl, sv, rng_for(k))
        assert [p.mode for p in sample.prompts[:2]] == ["regular"]*2
        check_points(sample, settings)


def test_arrays_are_filled_up():
    lbl, sv = WORLDS[3]
    sample = SupervoxelPointSampler(EVEN)(lbl, sv, rng_for(8))
    out, lengths = sample.arrays(), [len(p.points) for p in sample.prompts]
    assert out["points"].shape == (len(lengths), max(lengths), 3) and len(set(lengths)) > 1
    for i, p in enumerate(sample.prompts):
        assert np.array_equal(out["points"][i, :lengths[i]], p.points) and not out["points"][i, lengths[i]:].any()
        assert np.array_equal(out["point_labels"][i, :lengths[i]], p.point_labels)
        assert (out["point_labels"][i, lengths[i]:] == PADDING).all()
    assert out["targets"].tolist() == [p.target for p in sample.prompts]
    assert out["class_ids"].tolist() == classes(lbl)


def test_id_shift_is_a_parameter():
    lbl, sv = WORLDS[0]
    settings = EVEN.model_copy(update={"id_shift": 1000})
    samples = [SupervoxelPointSampler(settings)(lbl, sv, rng_for(k)) for k in range(4)]
    assert {p.target - p.class_id for s in samples for p in s.prompts} == {0, 1000}


@pytest.mark.parametrize("change, words", [
    ({"organ_sub": 0.8}, "sum to more than 1"), ({"sub_part": 0.8, "sub_rest": 0.3}, "sub_part \\+ sub_rest"),
    ({"part_range": (0.9, 0.1)}, "part_range"), ({"id_shift": 255}, "larger than ignore"),
    ({"positives": 0}, "positives"), ({"vrange": [0.6]}, "unknown key")])
def test_settings_that_contradict_themselves(change, words):
    with pytest.raises(ConfigError, match=words): check_config(PointSettings, change)


@pytest.mark.parametrize("lbl, sv, words", [
    (np.zeros((4, 4, 4)), None, "label: whole numbers are needed, got float64"),
    (np.zeros((4, 4), int), None, r"label: \(x, y, z\) or \(1, x, y, z\) is needed, got \(4, 4\)"),
    (np.zeros((2, 4, 4, 4), int), None, "is needed, got"), (np.zeros((0, 4, 4), int), None, "is needed, got"),
    (np.full((4, 4, 4), -1), None, "label: ids must be >= 0, got -1"),
    (np.full((4, 4, 4), 512), None, r"below id_shift \(512\), got 512"),
    (np.ones((4, 4, 4), int), np.zeros((4, 4, 5), int), r"label_sv: shape \(4, 4, 5\), the label has \(4, 4, 4\)"),
    (np.ones((4, 4, 4), int), np.full((4, 4, 4), -7), "label_sv: ids must be >= 0, got -7. Was it stored"),
    (np.ones((4, 4, 4), int), np.ones((4, 4, 4)), "label_sv: whole numbers")])
def test_hostile_patches(lbl, sv, words):
    with pytest.raises(DataError, match=words): SupervoxelPointSampler()(lbl, sv, rng_for(0))


@pytest.mark.parametrize("draws, words", [
    ([PointDraw(3)], "class 3 is not in the patch"), ([PointDraw(0)], "class ids: different numbers 1...511"),
    ([PointDraw(255)], "without 255"), ([PointDraw(1), PointDraw(1)], "different"),
    ([PointDraw(1, "sub")], "mode: one of")])
def test_hostile_draws(draws, words):
    with pytest.raises(DataError, match=words):
        SupervoxelPointSampler().apply(np.ones((4, 4, 4), int), None, draws)


def test_hostile_generator():
    for rng in (3, None, "seed"):
        with pytest.raises(DataError, match="a generator of NumPy or torch"): draw_modes([1], rng)


def test_patch_keeps_its_input():
    lbl = np.ones((4, 4, 4), np.int32)
    PointPatch(lbl, None, [1]).lbl[:] = 5
    assert (lbl == 1).all()


# ---------------------------------------------------------------------------------------------------------- batches

def batch_of(*cases):
    "As `collate_patches` makes it: (dataset_name, has_label, has_pseudo_label, has_label_sv) each"
    lbl, sv = WORLDS[4]
    stack = torch.from_numpy(np.stack([lbl[None]]*len(cases)))
    flags = {k: torch.tensor([c[i] for c in cases])
             for i, k in enumerate(("has_label", "has_pseudo_label", "has_label_sv"), 1)}
    return {"label": stack, "pseudo_label": stack, "label_sv": torch.from_numpy(np.stack([sv[None]]*len(cases))),
            "dataset_name": [c[0] for c in cases], **flags}


def test_supervoxels_act_on_the_pseudo_label_or_on_labels_of_six_sets():
    assert len(COMPLETE_SETS) == 6
    cases = [("AMOS22", True, False, True), ("AMOS22", True, True, True), ("NLST", True, False, True),
             ("NLST", True, False, False), ("LIDC", True, True, True)]
    sampler = SupervoxelPointSampler(PointSettings(min_voxels=120, margin=3, organ_sub=0.25, organ_add=0.25,
                                                   zeroshot_unseen=0.25, zeroshot_random=0.25))
    out = batch_prompts(sampler, batch_of(*cases), torch_rng_for(0))
    acted = [{k: any(p.mode != "regular" for p in s.prompts) for k, s in o.items()} for o in out]
    assert acted == [{"label": False}, {"label": False, "pseudo_label": True}, {"label": True}, {"label": False},
                     {"label": False, "pseudo_label": True}]
    other = batch_prompts(sampler, batch_of(*cases), torch_rng_for(0), sets=["AMOS22"])
    assert any(p.mode != "regular" for p in other[0]["label"].prompts)
    for o in out:
        for s in o.values(): check_points(s, sampler.settings)


def test_patches_of_one_case_and_a_collated_batch_give_the_same():
    batch = batch_of(*[("NLST", True, False, True)]*3)
    single = {k: v[0].item() if k.startswith("has_") else v[0] if k == "dataset_name" else v.numpy()
              for k, v in batch.items()}
    sampler = SupervoxelPointSampler(EVEN)
    a, b = (batch_prompts(sampler, x, rng_for(7)) for x in (batch, single))
    assert len(a) == 3 and all(same(p["label"], q["label"]) for p, q in zip(a, b, strict=True))
    assert not same(a[0]["label"], a[1]["label"]) # patches differ in their streams even where they are equal
    without = {k: v for k, v in single.items() if "label_sv" not in k}
    assert {p.mode for o in batch_prompts(sampler, without, rng_for(7)) for p in o["label"].prompts} == {"regular"}
