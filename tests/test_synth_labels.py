"""Label ensembles: plans, their statistics, and exact agreement of three renderings of the same plan."""
import itertools
import json
import pickle
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import median_filter

from benchmarks.reference import synth as reference
from medvol_nb import core
from medvol_nb.config import check_config
from medvol_nb.core import ConfigError, DataError, MissingExtra, fingerprint, plain, read_json, rng_for, seed_words
from medvol_nb.parallel import pmap
from medvol_nb.synth import kernels
from medvol_nb.synth.kernels import Scene, Waves, choose_backend, filter_labels, near_surface, paint, wavy_ball
from medvol_nb.synth.labels import (
    KINDS,
    EnsembleConfig,
    EnsemblePlan,
    draw_plan,
    mask_noise,
    render_labels,
    render_mask,
    scene_of,
    shape_matrices,
)
from medvol_nb.synth.templates import TemplateBank, procedural_bank
from tests.memory import PEAK

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT/"tests"/"golden_synth_labels.json"


@lru_cache
def bank() -> TemplateBank:
    "Shapes from 9 to 77 voxels, so that some are larger than a grid of 32 or 64"
    return procedural_bank(18, seed=5, size=(10, 80))


def loads() -> list:
    "The same shapes as full fields of view with air around, as the reference loads them"
    def load(i: int) -> np.ndarray: return np.pad(bank()[i], ((2, 1), (0, 3), (1, 0))).astype(np.float64)
    return [partial(load, i) for i in range(len(bank()))]


def literal(plan: EnsemblePlan) -> np.ndarray:
    return reference.literal_labels(plan, loads(), mask_noise(plan) if plan.masked else ())


def golden_plans() -> list[EnsemblePlan]:
    "Every kind and envelope on grids of 32, 64 and 128; more than 20"
    plans = []
    for side, most, per_kind in ((32, 40, 2), (64, 30, 2), (128, 8, 1)):
        config = EnsembleConfig(shape=side, min_templates=min(most - 1, 20) if side < 128 else 5, max_templates=most)
        drawn = [draw_plan(side, i, config, len(bank())) for i in range(120)]
        for kind, e in ((KINDS[0], 0), (KINDS[1], 0), (KINDS[2], 2), (KINDS[2], 3), (KINDS[2], 4)):
            plans += [p for p in drawn if p.kind == kind and p.envelope == e][:per_kind]
    return plans


PLANS = golden_plans()
IDS = [f"{p.shape[0]}-{p.kind}-{p.envelope}-{p.index}" for p in PLANS]


# ---------------------------------------------------------------- A1: three renderings

@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_A1_parity_with_the_literal_reference(plan):
    "0 differing voxels: numba, tensors, the reference, and the digest that was stored"
    ours = render_labels(plan, bank(), backend="numba")
    assert fingerprint(ours) == read_json(GOLDEN)[plan.digest]
    assert np.array_equal(render_labels(plan, bank(), backend="torch"), ours)
    assert np.array_equal(literal(plan), ours)


def test_A1_plans_cover_what_is_asked_for():
    assert len(PLANS) >= 20 and {p.shape[0] for p in PLANS} == {32, 64, 128} and {p.kind for p in PLANS} == set(KINDS)
    assert {p.envelope for p in PLANS} == {0, 2, 3, 4}
    large = [(bank().shapes[list(p.templates)] > p.shape[0]).any() for p in PLANS]
    assert sum(large) >= 10 # the working box is larger than the grid
    assert set(read_json(GOLDEN)) == {p.digest for p in PLANS}


@pytest.mark.parametrize("plan", PLANS[::4], ids=IDS[::4])
def test_stages_agree_with_the_reference(plan):
    matrices = [reference.matrix(*v) for v in zip(plan.scale, plan.angle, plan.shear, plan.flip)]
    assert np.abs(shape_matrices(plan) - matrices).max() < 1e-14
    scene = scene_of(plan, bank())
    theirs = reference.painted([loads()[t] for t in plan.templates], matrices, plan.shift, plan.shape)
    assert np.array_equal(paint(scene, bank()), theirs)
    assert np.array_equal(filter_labels(theirs), median_filter(theirs, 3, mode="nearest"))
    if plan.masked:
        mask = reference.foreground(mask_noise(plan), plan.centre, plan.radius, plan.shape)
        assert np.array_equal(render_mask(plan), mask)
        for e in (2, 3, 4): assert np.array_equal(near_surface(mask, e), reference.shell(mask, e))


@pytest.mark.parametrize("shape", [(32, 32, 32), (50, 64, 37), (97, 97, 97), (1, 5, 9), (100, 64, 80)])
def test_displacement_is_that_of_pytorch(shape):
    "To the last bit where PyTorch uses fused multiply-add, as on any x86 processor since 2013"
    rng = rng_for(0, "waves", shape)
    noise = [3*rng.standard_normal((3, *(max(1, n//k) for n in shape)), dtype=np.float32) for k in (4, 9, 17)]
    theirs = reference.displacement(noise, shape).numpy()
    for backend in ("numba", "torch"):
        waves = Waves.of(noise, shape, backend)
        ours = np.stack([waves.row(x) for x in range(shape[0])], 1)
        assert np.abs(ours - theirs).max() < 1e-5
        if "AVX2" in str(np.show_config(mode="dicts")): assert (ours != theirs).mean() < 1e-6


# ---------------------------------------------------------------- kernels against definitions

def scene(shape, n, period, seed=0, straight=False) -> Scene:
    rng = rng_for(seed, "scene", shape, n, period)
    t = rng.integers(0, len(bank()), n)
    matrices = np.stack([np.diag(rng.choice([-1.0, 1.0, 0.5, 2.0], 3)) for _ in range(n)]) if straight else \
        rng.normal(0, 0.7, (n, 3, 3))
    shifts = rng.integers(-20, 40, (n, 3))/2 if straight else rng.uniform(-90, 90, (n, 3))
    wide = np.maximum(shape, bank().shapes[t])
    return Scene(shape, t, matrices, shifts, (wide - bank().shapes[t] + 1)//2*period, wide*period, np.arange(1, n + 1),
                 np.dtype(np.uint16 if n > 255 else np.uint8))


def by_definition(s: Scene) -> np.ndarray:
    out, x = np.zeros(s.shape, s.dtype), np.stack(np.meshgrid(*map(np.arange, s.shape), indexing="ij")).astype(float)
    wide = lambda v: np.asarray(v).reshape(3, 1, 1, 1)
    for k, t in enumerate(s.templates):
        m = s.matrices[k][:, :, None, None, None]
        at = np.floor(wide(s.shifts[k]) + m[:, 0]*x[0] + m[:, 1]*x[1] + m[:, 2]*x[2] + 0.5).astype(int) - wide(s.low[k])
        if s.period[k].all(): at %= wide(s.period[k])
        inside = ((at >= 0) & (at < wide(bank().shapes[t]))).all(axis=0)
        out[inside & bank()[t][tuple(np.where(inside, at, 0))]] = s.labels[k]
    return out


@pytest.mark.parametrize("straight", [False, True], ids=["oblique", "axis parallel, on halves"])
@pytest.mark.parametrize("period", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 40), (7, 1, 3), (33, 20, 41), (2, 64, 64)])
def test_painter_is_its_definition(shape, period, straight):
    for seed in range(3):
        s = scene(shape, 12, period, seed, straight)
        expected = by_definition(s)
        assert np.array_equal(paint(s, bank(), "numba"), expected)
        assert np.array_equal(paint(s, bank(), "torch").numpy(), expected)


def test_painter_with_more_than_255_labels():
    s = scene((16, 20, 24), 400, 1)
    expected = by_definition(s)
    assert expected.max() > 255 and np.array_equal(paint(s, bank(), "numba"), expected)
    assert np.array_equal(paint(s, bank(), "torch").numpy(), expected)


@pytest.mark.parametrize("dtype, top", [(np.uint8, 2), (np.uint8, 6), (np.uint8, 256), (np.uint16, 60000)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 30), (9, 1, 5), (17, 16, 19), (4, 30, 2)])
def test_filters_are_their_definitions(shape, dtype, top):
    lbl = rng_for(1, "filter", shape, top).integers(0, top, shape).astype(dtype)
    assert np.array_equal(filter_labels(lbl, "median", "numba"), median_filter(lbl, 3, mode="nearest"))
    vote, padded = lbl.copy(), np.pad(lbl, 1, mode="edge")
    for at in np.ndindex(shape):
        near, own = padded[tuple(slice(i, i + 3) for i in at)].ravel(), lbl[at]
        vote[at] = min(set(near.tolist()), key=lambda v: (-(near == v).sum(), v != own, v))
    for backend in ("numba", "torch"):
        assert np.array_equal(filter_labels(lbl, "median", backend), median_filter(lbl, 3, mode="nearest"))
        assert np.array_equal(filter_labels(lbl, "vote", backend), vote)


@pytest.mark.parametrize("e", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 12, 3), (20, 19, 25)])
def test_near_surface_is_a_distance(shape, e):
    from scipy.ndimage import distance_transform_edt
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = (rng_for(2, "near", shape, share).random(shape) < share).astype(np.uint8)
        far = np.full(shape, np.inf)
        if 0 < mask.sum() < mask.size: far = np.maximum(distance_transform_edt(mask), distance_transform_edt(1 - mask))
        for backend in ("numba", "torch"):
            assert np.array_equal(near_surface(mask, e, backend), far <= e + 1e-9)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("strength", [0, 1, 8, 60])
def test_wavy_ball_backends_agree_also_beyond_reflection(centred, strength):
    rng = rng_for(3, "ball", strength)
    for shape in ((30, 17, 41), (1, 8, 8), (5, 5, 5)):
        noise = [strength*rng.standard_normal((3, 3, 2, 4), dtype=np.float32) for _ in range(2)]
        waves = Waves.of(noise, shape)
        for radius in (0, 3, 11):
            args = (waves, [n//2 + 1 for n in shape], radius)
            one, other = (wavy_ball(*args, centred=centred, backend=b) for b in ("numba", "torch"))
            assert np.array_equal(one, other)


def test_without_numba_tensors_serve(monkeypatch):
    def missing(name, extra): raise MissingExtra(f"{name} needs the `{extra}` extra")
    plan = PLANS[3]
    expected = render_labels(plan, bank())
    for module in (kernels, core): monkeypatch.setattr(module, "optional", missing)
    assert choose_backend() == "torch" and np.array_equal(render_labels(plan, bank()), expected)
    core.compiled.cache_clear()
    with pytest.raises(MissingExtra): render_labels(plan, bank(), backend="numba")


# ---------------------------------------------------------------- A3: statistics of plans

@lru_cache
def many() -> tuple[EnsemblePlan, ...]:
    config = EnsembleConfig()
    return tuple(draw_plan(7, i, config, 43) for i in range(20_000))


def uniform(values, lo, hi) -> float: return stats.kstest((np.ravel(values) - lo)/(hi - lo), "uniform").pvalue


def even(values, options) -> float: return stats.chisquare([np.sum(np.asarray(values) == o) for o in options]).pvalue


def test_A3_plan_statistics():
    plans = many()
    some = plans[::20] # about 30,000 shapes
    parts = {k: np.concatenate([getattr(p, k) for p in some]) for k in ("scale", "angle", "shift", "shear")}
    flips = np.concatenate([p.flip for p in some])
    masked = [p for p in plans if p.masked]
    p_values = {
        "kinds": even([KINDS.index(p.kind) for p in plans], range(3)),
        "envelopes": even([p.envelope for p in plans if p.envelope], (2, 3, 4)),
        "shapes": even([p.n_shapes for p in plans], range(20, 40)),
        "templates": even(np.concatenate([p.templates for p in some]), range(43)),
        "flips": stats.binomtest(int(flips.sum()), flips.size).pvalue,
        "scale": uniform(parts["scale"], 0.5, 1.5), "angle": uniform(parts["angle"], -180, 180),
        "shift": uniform(parts["shift"], -5, 5), "shear": uniform(parts["shear"], -0.5, 0.5),
        "radius": even([p.radius for p in masked], range(48, 72)),
        "centre": even(np.array([p.centre for p in masked]), range(32, 96)),
        "amplitude": uniform([p.amplitude for p in masked], 1, 5),
        "noise": stats.kstest(np.concatenate([(n/a).ravel() for p in masked[:4]
                                              for n, a in zip(mask_noise(p), p.amplitude)]), "norm").pvalue,
    }
    assert min(p_values.values()) > 1e-4, p_values


def test_A3_axes_and_parameters_are_independent():
    some = many()[::20]
    table = np.concatenate([np.hstack([p.scale, p.angle, p.shift, p.shear, p.flip]) for p in some])
    r = np.corrcoef(table.T)[np.triu_indices(table.shape[1], 1)]
    assert np.abs(r).max()*np.sqrt(len(table)) < 5 # 105 pairs, five standard deviations


def test_plans_are_distributed_as_the_literal_draws():
    "Two samples, ours and the reference's own calls, for every random decision"
    theirs = [reference.literal_draws(s, 43, 16) for s in range(1500)]
    config = EnsembleConfig(shape=16)
    ours = [draw_plan(1, i, config, 43) for i in range(1500)]
    p_values = {}
    for name in ("scale", "angle", "shift", "shear"):
        a, b = (np.concatenate([np.ravel(v) for v in x]) for x in
                ([getattr(p, name) for p in ours[:300]], [d[name] for d in theirs[:300]]))
        p_values[name] = stats.ks_2samp(a, b).pvalue
    for name, of_ours, of_theirs in (
            ("n", [p.n_shapes for p in ours], [d["n"] for d in theirs]),
            ("kind", [KINDS.index(p.kind) for p in ours], [KINDS.index(d["kind"]) for d in theirs]),
            ("envelope", [p.envelope for p in ours], [d["envelope"] for d in theirs]),
            ("radius", [int(p.radius) for p in ours if p.masked], [d["radius"] for d in theirs if "radius" in d]),
            ("centre", np.ravel([p.centre for p in ours if p.masked]),
             np.ravel([d["centre"] for d in theirs if "centre" in d]))):
        values = sorted({*np.ravel(of_ours).tolist(), *np.ravel(of_theirs).tolist()})
        counts = [[np.sum(np.ravel(x) == v) for v in values] for x in (of_ours, of_theirs)]
        p_values[name] = stats.chi2_contingency(counts).pvalue
    noise = [np.concatenate([n.ravel() for n in x]) for x in
             ([n for p in ours[:99] if p.masked for n in mask_noise(p)],
              [n for d in theirs[:99] for n in d.get("noise", ())])]
    p_values["noise"] = stats.ks_2samp(noise[0][::97], noise[1][::97]).pvalue
    assert [n.shape for n in mask_noise(next(p for p in ours if p.masked))] == \
        [n.shape for n in next(d for d in theirs if "noise" in d)["noise"]]
    assert min(p_values.values()) > 1e-4, p_values


# ---------------------------------------------------------------- A4: statistics of label maps

def facts(lbl: np.ndarray) -> list[float]:
    "Distinct labels, share of 0, share of voxels with another label at +1, largest and median region"
    sizes = np.bincount(lbl.ravel())
    sizes[0], zero = 0, sizes[0]/lbl.size
    here = lbl[:-1, :-1, :-1]
    change = (here != lbl[1:, :-1, :-1]) | (here != lbl[:-1, 1:, :-1]) | (here != lbl[:-1, :-1, 1:])
    regions = sizes[sizes > 0]
    return [len(regions) + (zero > 0), zero, change.mean(), regions.max(initial=0)/lbl.size,
            float(np.median(regions)) if len(regions) else 0.0]


def test_label_maps_are_distributed_as_the_references():
    "Seeds of ours against the reference's own draws, same bank, side 32"
    small = TemplateBank.of([bank()[i] for i in range(18) if max(bank().shapes[i]) < 60])
    fields = [lambda m=small[i]: m.astype(np.float64) for i in range(len(small))]
    config = EnsembleConfig(shape=32)
    ours = [facts(render_labels(draw_plan(2, i, config, len(small)), small)) for i in range(150)]
    theirs = [facts(reference.literal_ensemble(s, fields, 32)) for s in range(60)]
    p_values = [stats.ks_2samp(a, b).pvalue for a, b in zip(np.transpose(ours), np.transpose(theirs))]
    assert min(p_values) > 1e-3, p_values


# Quartiles of 22 ensembles of the reference, 43 organs at 1.5 mm (specification, section 16)
QUARTILES = [(23.3, 33.0), (0.486, 0.669), (0.059, 0.115), (0.099, 0.160), (6100, 15000)]


@pytest.mark.slow
def test_A4_200_ensembles_of_real_organs(data_dir, tmp_path):
    "Medians inside the quartiles that were measured on the reference"
    from medvol_nb.synth.templates import build_bank
    build_bank(data_dir/"synthetic_labels"/"totalseg_layout"/"s0001", tmp_path/"bank", spacing=1.5)
    organs, config = TemplateBank.open(tmp_path/"bank"), EnsembleConfig()
    assert len(organs) == 43
    found = np.array([facts(render_labels(draw_plan(0, i, config, 43), organs)) for i in range(200)])
    medians = np.median(found, axis=0)
    inside = [lo <= m <= hi for m, (lo, hi) in zip(medians, QUARTILES)]
    assert all(inside), medians.tolist()


# ---------------------------------------------------------------- A6, A5: keys, not history

def test_A6_plans_depend_on_seed_and_index_alone():
    config = EnsembleConfig(shape=32)
    first = [draw_plan(0, i, config, 9) for i in range(10)]
    assert [draw_plan(0, i, config, 9) for i in reversed(range(30))][::-1][:10] == first
    assert len({p.digest for s in (0, 1) for p in [draw_plan(s, i, config, 9) for i in range(300)]}) == 600


@pytest.mark.slow
def test_A6_no_two_of_a_million_share_a_plan():
    "128 bits of entropy name a stream; equal plans would need equal streams"
    assert len({seed_words(0, "labels", i, "plan") for i in range(10**6)}) == 10**6


def test_D2_extending_a_data_set_repeats_nothing():
    "The reference draws 1000 seeds from 10,000 each time, so two runs share about a hundred"
    config = EnsembleConfig(shape=32)
    digests = [draw_plan(0, i, config, 43).digest for i in range(1000)]
    assert len(set(digests)) == 1000
    assert [draw_plan(0, i, config, 43).digest for i in range(500)] == digests[:500]


def test_plans_are_the_same_everywhere():
    "Philox and the way from bits to numbers are fixed; this digest must never change"
    plan = draw_plan(2026, 4, EnsembleConfig(), 43)
    assert plan.digest == read_json(GOLDEN.with_name("golden_synth_plan.json"))["digest"]


def render_one(index: int) -> str:
    return fingerprint(render_labels(draw_plan(0, index, EnsembleConfig(shape=32), len(bank())), bank()))


@pytest.mark.parametrize("workers", [1, 2])
def test_A5_processes_and_order_do_not_matter(workers):
    expected = [render_one(i) for i in range(6)]
    assert pmap(render_one, [5, 3, 1, 0, 2, 4], workers) == [expected[i] for i in (5, 3, 1, 0, 2, 4)]


def test_json_and_pickle_keep_a_plan():
    for plan in PLANS[::5]:
        assert EnsemblePlan.from_json(json.loads(json.dumps(plain(plan)))) == plan == pickle.loads(pickle.dumps(plan))
    with pytest.raises(DataError, match="plan: needs the keys"): EnsemblePlan.from_json({"a": 1})
    with pytest.raises(DataError, match="plan: needs the keys"): EnsemblePlan.from_json([])


# ---------------------------------------------------------------- defects of the reference

def test_D7_every_shape_is_seen_and_counted():
    config = EnsembleConfig(preset="medvol", shape=128, min_templates=1, max_templates=1, p_mask=0)
    for i in range(6):
        plan = draw_plan(0, i, config, len(bank()))
        assert plan.n_shapes == plan.max_label == 1
        painted = paint(scene_of(plan, bank()), bank())
        assert painted.any() and set(np.unique(render_labels(plan, bank()))) <= {0, 1}
    hidden = EnsembleConfig(shape=48, min_templates=1, max_templates=1, p_mask=0)
    assert render_labels(draw_plan(0, 0, hidden, len(bank())), bank()).max() == 0


def test_D8_bounds_are_inclusive_and_many_labels_do_not_wrap():
    fixed = EnsembleConfig(preset="medvol", min_templates=3, max_templates=5)
    assert {draw_plan(0, i, fixed, 9).n_shapes for i in range(200)} == {3, 4, 5}
    assert {draw_plan(0, i, EnsembleConfig(min_templates=4, max_templates=4), 9).n_shapes for i in range(9)} == {4}
    for n in (253, 254, 700):
        config = EnsembleConfig(preset="medvol", shape=24, min_templates=n, max_templates=n, p_mask=1, p_envelope=1)
        plan = draw_plan(0, 0, config, len(bank()))
        lbl = render_labels(plan, bank())
        assert plan.max_label == n + 2 and lbl.dtype == (np.uint8 if n + 2 < 256 else np.uint16)
        assert lbl.max() <= plan.max_label and np.array_equal(lbl, render_labels(plan, bank(), backend="torch"))


@pytest.mark.parametrize("preset", ["anatomix", "medvol"])
@pytest.mark.parametrize("shape", [32, 33, 50, 97, 100, (40, 64, 33), (256, 32, 32), (1, 30, 30), (2, 2, 2), 1])
def test_A17_D9_any_side_length(shape, preset):
    "The reference fails for sides that are no multiple of 32, and ignored the option for a year"
    config = EnsembleConfig(preset=preset, shape=shape, min_templates=4, max_templates=6, p_mask=1, p_envelope=1)
    plan = draw_plan(0, 3, config, len(bank()))
    lbl = render_labels(plan, bank(), backend="numba")
    assert lbl.shape == config.shape and np.array_equal(lbl, render_labels(plan, bank(), backend="torch"))
    assert lbl.max() <= plan.max_label


@pytest.mark.slow
@pytest.mark.parametrize("shape", [256, (256, 200, 130)])
def test_A17_large_sides(shape):
    plan = draw_plan(0, 0, EnsembleConfig(shape=shape, p_mask=1, p_envelope=1), len(bank()))
    lbl = render_labels(plan, bank())
    assert lbl.shape == plan.shape and len(np.unique(lbl)) > 5


def test_D9_shapes_grow_with_the_grid():
    "Same plan on a grid of half the side: every second voxel, up to the borders"
    both = {}
    for side in (64, 128):
        config = EnsembleConfig(preset="medvol", shape=side, min_templates=5, max_templates=5, p_mask=0)
        plan = draw_plan(4, 0, config, len(bank()))
        both[side] = paint(scene_of(plan, bank()), bank())
    low, high = both[64], both[128]
    agree = np.mean([(low == high[i::2, j::2, k::2]) for i, j, k in itertools.product((0, 1), repeat=3)])
    assert agree > 0.97 and (low > 0).any()


def test_D10_a_vote_invents_no_layers():
    "Between two regions a third label appears under the median of numbers, never under a vote"
    lbl = np.full((20, 20, 20), 2, np.uint8)
    lbl[10:] = 9
    rough = np.where(rng_for(0, "D10").random(lbl.shape) < 0.12, 5, lbl).astype(np.uint8)
    median, vote = filter_labels(rough, "median"), filter_labels(rough, "vote")
    assert (median[9:11] == 5).sum() > 50 and (vote[9:11] == 5).sum() == 0
    assert EnsembleConfig(preset="medvol").smoothing == "vote" and EnsembleConfig().smoothing == "median"


def test_D11_displacements_are_exact_and_shapes_appear_once():
    move = [np.zeros((3, 2, 2, 2), np.float32) + np.array([3, 0, -4], np.float32).reshape(3, 1, 1, 1)]
    grid = np.stack(np.meshgrid(*[np.arange(41)]*3, indexing="ij"))
    true = ((grid - np.array([24, 20, 17]).reshape(3, 1, 1, 1))**2).sum(0) <= 9**2
    assert np.array_equal(wavy_ball(Waves.of(move, (41, 41, 41)), (20, 20, 20), 9, centred=True), true)
    cube = TemplateBank.of([np.ones((9, 9, 9))])
    config = EnsembleConfig(preset="medvol", shape=128, min_templates=1, max_templates=1, p_mask=0, scale=(1, 1),
                            shear=(0, 0))
    for i in range(8):
        plan = draw_plan(0, i, config, 1)
        at = np.argwhere(render_labels(plan, cube) > 0)
        middle = np.array(plan.shift[0])*128 - 0.5
        if ((middle > 9) & (middle < 118)).all():
            assert np.abs(at.mean(axis=0) - middle).max() < 0.3 and 0.85*729 < len(at) < 1.05*729


def test_D12_D13_what_a_task_carries_is_small(tmp_path):
    "The reference sends the list of all files and a 25 MB grid with every task, and loads float64 volumes"
    opened = TemplateBank.open(bank().save(tmp_path/"bank"))
    assert len(pickle.dumps((opened, EnsembleConfig(), 17))) < 2000


MEMORY = PEAK + """
import json, sys
import medvol_nb.synth.labels as L, numba, numpy, scipy.ndimage
from medvol_nb.synth.templates import TemplateBank
bank, config = TemplateBank.open(sys.argv[1]), L.EnsembleConfig(p_mask=1, p_envelope=1)
before = peak()//1024
for i in range(3): L.render_labels(L.draw_plan(0, i, config, len(bank)), bank, backend="numba")
print(json.dumps([before, peak()//1024, sorted({"monai", "torch"} & set(sys.modules))]))
"""


def test_A12_memory_of_a_worker(tmp_path):
    "At 128^3: at most 250 MB beyond the imports and 600 MB in all, and no MONAI"
    path = bank().save(tmp_path/"bank")
    out = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, cwd=ROOT)
    before, after, heavy = json.loads(out.stdout.splitlines()[-1])
    assert after - before <= 250 and after <= 600 and heavy == [], (before, after, heavy)


# ---------------------------------------------------------------- settings

@pytest.mark.parametrize("wrong, message", [
    ({"shape": 0}, "4096"), ({"shape": (4, 4)}, "shape"), ({"min_templates": 0}, "min_templates"),
    ({"min_templates": 50}, "below min_templates"), ({"scale": (0, 1)}, "scale: must be > 0"),
    ({"angle": (9, 1)}, "angle: the range must rise"), ({"p_mask": 1.5}, "p_mask"), ({"envelope": (9,)}, "envelope"),
    ({"noise_scales": ()}, "noise_scales"), ({"amplitude": (-1, 2)}, "lengths"), ({"preset": "other"}, "preset"),
    ({"side": 64}, "unknown key"), ({"scale": (float("nan"), 1)}, "scale")])
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message): check_config(EnsembleConfig, wrong)


def test_the_wrong_bank_is_refused():
    with pytest.raises(DataError, match="the bank has 2"): render_labels(PLANS[0], procedural_bank(2, size=(6, 8)))
    with pytest.raises(DataError, match="has no mask"): render_mask(next(p for p in PLANS if not p.masked))
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(DataError, match="index must be"): draw_plan(0, wrong, EnsembleConfig(), 4)
    with pytest.raises(DataError, match="seed must be"): draw_plan(-1, 0, EnsembleConfig(), 4)


def test_deformed_shapes():
    config = EnsembleConfig(preset="medvol", shape=40, warp=(20, 25), p_mask=0)
    plan = draw_plan(0, 1, config, len(bank()))
    lbl = render_labels(plan, bank())
    assert len(plan.warp) == 3 and np.array_equal(lbl, render_labels(plan, bank(), backend="torch"))
    assert not np.array_equal(lbl, filter_labels(paint(scene_of(plan, bank()), bank()), "vote"))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS[::3], ids=IDS[::3])
def test_A1_a_gpu_gives_the_same_labels(plan):
    import torch
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    assert np.array_equal(render_labels(plan, bank(), device="cuda"), render_labels(plan, bank(), backend="torch"))
