"""Views of label maps: operations against their definitions, plans against MONAI's draws, bytes against everything."""
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ks_2samp, kstest

from benchmarks.reference import synth_views as reference
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.config import check_config
from medvol_nb.core import ConfigError, DataError, plain, rng_for, to_json
from medvol_nb.parallel import pmap
from medvol_nb.phantoms import random_body
from medvol_nb.synth import views
from medvol_nb.synth.views import ViewConfig, ViewPlan, draw_view_plan, render_view, render_views

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(32, 32, 32), (33, 31, 29), (24, 40, 17), (1, 7, 12)]
SWITCHES = ("zero", "bias", "spike", "gamma", "blur", "gibbs", "sharpen", "lowres")
ALL_ON = ViewConfig(**{f"p_{n}": 1 for n in SWITCHES})


@functools.lru_cache
def labels(shape, seed=0, n=12) -> torch.Tensor:
    "A body with organs; 0 outside"
    return torch.from_numpy(random_body(shape, seed=seed, n_organs=n).lbl)


def image(shape, seed=0) -> torch.Tensor:
    "(1, x, y, z) in [0, 1], with flat regions and noise"
    lbl = labels(shape, seed) if min(shape) > 8 else torch.randint(0, 4, shape, generator=torch_rng_for(seed, "l"))
    return views.rescale(lbl[None].float() + 0.3*torch.randn(1, *shape, generator=torch_rng_for(seed, "image", shape)))


def draws(seed, k=4):
    "Plans with all operations on"
    return [draw_view_plan(seed, i, 1, ALL_ON, 20) for i in range(k)]


def numbers(img) -> np.ndarray: return np.asarray(getattr(img, "array", img))


# ---- A2: each operation is what its definition says


def same(ours: torch.Tensor, theirs, atol=1e-5) -> None:
    "1e-5 of the range, and at most one grey level where a value lies on the edge between two"
    theirs = torch.as_tensor(numbers(theirs), dtype=torch.float64)
    scale = max(1.0, float(theirs.abs().max()))
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    assert (ours.double() - theirs).abs().max() <= atol*scale
    grey = [views.quantise(views.rescale(v[None].float()))[0].int() for v in (ours, theirs)]
    assert (grey[0] - grey[1]).abs().max() <= 1 and (grey[0] != grey[1]).float().mean() <= 1e-2


@pytest.mark.parametrize("shape", SIZES)
def test_A2_operations_are_those_of_monai(shape):
    mt = pytest.importorskip("monai.transforms")
    for k, plan in enumerate(draws(1)):
        x = image(shape, k)
        bias = mt.RandBiasField(prob=1)
        field = bias._generate_random_field(shape, 3, list(plan.bias))
        same(views.apply_bias(x, [plan.bias])[0], x[0].double()*torch.from_numpy(np.exp(field)))
        place = [int(u*n) for u, n in zip(plan.spike, shape)]
        logs = torch.fft.fftn(x[0].double()).abs().add(1e-10).log().mean()
        spike = mt.KSpaceSpikeNoise([(0, *place)], [float(plan.spike_level*2.5*logs)])
        same(views.add_spike(x, [place], [plan.spike_level])[0], spike(x.double())[0])
        same(views.apply_gamma(x, [plan.gamma])[0], mt.AdjustContrast(plan.gamma)(x)[0])
        same(views.gaussian_blur(x, [plan.blur])[0], mt.GaussianSmooth(plan.blur)(x)[0])
        same(views.apply_gibbs(x, [plan.gibbs])[0], mt.GibbsNoise(plan.gibbs)(x)[0])
        first, second = plan.sharpen
        same(views.sharpen(x, [first], [second], [plan.sharpen_amount])[0],
             mt.GaussianSharpen(first, second, plan.sharpen_amount)(x)[0])
        low = mt.RandSimulateLowResolution(prob=1, downsample_mode="nearest-exact")
        low.set_random_state(0)
        low.randomize()
        low._do_transform, low.zoom_factor = True, plan.zoom[0]
        same(views.lower_resolution(x, [plan.zoom])[0], low(x, randomize=False)[0])
        same(views.rescale(3*x - 1)[0], mt.ScaleIntensity()(3*x - 1)[0])


@pytest.mark.parametrize("shape", [(32, 32, 32), (64, 32, 96)])
def test_A2_texture_and_levels_are_those_of_the_definition(shape):
    plan = draws(2)[0]
    knots = views.texture_knots(plan, shape)
    field = sum(torch.nn.functional.interpolate(k[None, None], scale_factor=s, mode="trilinear")[0, 0]
                for k, s in zip(knots, plan.texture_scales))
    x = image(shape)
    same(views.add_texture(x, [k[None] for k in knots], plan.texture_scales)[0], x[0]*(1 + field))
    lbl, noise = labels(shape), torch.randn(shape)
    want = torch.zeros(shape)
    for k in lbl.unique()[int(plan.zero):]: want[lbl == k] = plan.sd[k]*noise[lbl == k] + plan.mean[k]
    got = views.sample_levels(lbl[None], [plan.mean], [plan.sd], noise[None], [plan.zero])[0]
    assert plan.zero and torch.allclose(got, want.clip(min=0), atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 64, 97])
def test_A2_identities_hold_at_every_place_and_radius(n):
    "Spikes at the special frequencies, Gibbs at random radii: even and odd, self-mirrored bins, bins of either half"
    shape = (n, 6, 5) if n % 2 else (6, 5, n)
    x = torch.rand(1, *shape, dtype=torch.float32, generator=torch_rng_for(n, "x"))
    spectrum = torch.fft.fftshift(torch.fft.fftn(x[0].double()))
    level = torch.exp(2.5*spectrum.abs().add(1e-10).log().mean())
    rng = rng_for(n, "places")
    places = [(0, 0, 0), tuple(m//2 for m in shape), tuple(m - 1 for m in shape), (0, shape[1]//2, shape[2] - 1)]
    for place in [*places, *(tuple(int(rng.integers(m)) for m in shape) for _ in range(6))]:
        changed = spectrum.clone()
        changed[place] = torch.polar(level, spectrum[place].angle())
        want = torch.fft.ifftn(torch.fft.ifftshift(changed)).real
        got = views.add_spike(x, [place], [1.0])[0]
        assert (got - want).abs().max() <= 1e-5*max(1.0, float(want.abs().max()))
    centre = [(np.arange(m) - (m - 1)/2)**2 for m in shape]
    distance = np.sqrt(centre[0][:, None, None] + centre[1][:, None] + centre[2])
    for alpha in rng.uniform(0, 1, 12):
        kept = torch.from_numpy(distance <= (1 - alpha)*max(shape)*math.sqrt(2)/2)
        want = torch.fft.ifftn(torch.fft.ifftshift(spectrum*kept)).real
        assert (views.apply_gibbs(x, [alpha])[0] - want).abs().max() <= 1e-5


def test_A2_low_resolution_is_that_of_torch_at_all_sizes():
    f = torch.nn.functional.interpolate
    for n in (1, 2, 5, 32, 33, 96, 128):
        for m in sorted({max(1, n//2), max(1, round(0.7*n)), n}):
            x = torch.rand(1, n, 3, 2)
            want = f(f(x[None], size=(m, 3, 2), mode="nearest-exact"), size=(n, 3, 2), mode="trilinear")[0]
            assert torch.allclose(views.lower_resolution(x, [(m/n, 1, 1)]), want, atol=1e-5), (n, m)
            turned = views.lower_resolution(x.permute(0, 3, 2, 1).contiguous(), [(1, 1, m/n)])
            assert torch.allclose(turned.permute(0, 3, 2, 1), want, atol=1e-5), (n, m)


def test_A2_batches_are_items(shape=(20, 17, 23)):
    "Each operation on a batch with different parameters is the operation on each item"
    ps = draws(3)
    x = torch.cat([image(shape, k) for k in range(len(ps))])
    for name, step in views.STEPS.items():
        both = step(x, ps)
        for k, p in enumerate(ps): assert torch.allclose(both[k], step(x[k:k + 1], [p])[0], atol=1e-5), name
    lbl = torch.stack([labels(shape, k).int() for k in range(len(ps))])
    kept, settings = lbl.clone(), ([p.mean for p in ps], [p.sd for p in ps])
    both = views.sample_levels(lbl, *settings, x, [True, False]*2)
    for k, p in enumerate(ps):
        assert torch.equal(both[k], views.sample_levels(lbl[k:k + 1], [p.mean], [p.sd], x[k:k + 1], [k % 2 == 0])[0])
    assert torch.equal(lbl, kept)
    before = x.clone()
    for step in views.STEPS.values(): step(x, ps)
    views.rescale(x), views.quantise(x)
    assert torch.equal(x, before), "an operation changed its input"


# ---- A3: plans have the distributions they promise


@pytest.fixture(scope="module")
def many() -> list[ViewPlan]: return [draw_view_plan(11, i, 1, ViewConfig(), 3) for i in range(20000)]


def test_A3_switches(many):
    chances = {"zero": 0.25, "bias": 0.98, "spike": 0.2, "gamma": 0.5, "blur": 0.5, "gibbs": 0.5, "sharpen": 0.25,
               "zoom": 0.333}
    on = {k: np.array([getattr(p, k) not in (None, False) for p in many]) for k in chances}
    for k, p in chances.items(): assert binomtest(int(on[k].sum()), len(many), p).pvalue > 1e-4, k
    table = np.corrcoef(np.array(list(on.values()), float))
    assert np.abs(table - np.eye(len(table))).max() < 4.5/math.sqrt(len(many)), "switches depend on each other"


def test_A3_ranges(many):
    def uniform(values, low, high):
        assert kstest(np.ravel(values), "uniform", (low, high - low)).pvalue > 1e-4
    def on(name): return [getattr(p, name) for p in many if getattr(p, name) is not None]
    uniform([p.mean for p in many], 25, 255)
    uniform([p.sd for p in many], 5, 20)
    uniform([p.texture for p in many], 0, 0.1)
    uniform(on("bias"), 0, 0.075)
    uniform(on("spike"), 0, 1)
    uniform([p.spike_level for p in many if p.spike], 0.95, 1.1)
    uniform(on("gamma"), 0.5, 2)
    uniform(on("blur"), 0, 0.333)
    uniform(on("gibbs"), 0, 0.333)
    first, second = np.moveaxis(np.array(on("sharpen")), 1, 0)
    uniform(first, 0.5, 1)
    uniform((second - 0.5)/(first - 0.5), 0, 1)
    uniform([p.sharpen_amount for p in many if p.sharpen], 10, 30)
    uniform([z[0] for z in on("zoom")], 0.5, 1)
    assert all(len(set(z)) == 1 for z in on("zoom"))


def test_A3_parameters_are_drawn_as_monai_draws_them(many):
    "Two-sample tests against the transforms of the reference, each asked 3000 times for its parameters"
    pytest.importorskip("monai")
    kinds = {type(t).__name__: t for t in reference.transforms(5).transforms}
    def asked(name, read, n=3000):
        t = kinds[name]
        inner = next(v for v in vars(t).values() if hasattr(v, "randomize"))
        out = []
        x = torch.rand(1, 8, 8, 8)
        for _ in range(n):
            t.randomize(None)
            if name == "RandKSpaceSpikeNoised": inner.randomize(x, [(0.95, 1.1)])
            elif name == "RandBiasFieldd": inner.randomize((8, 8, 8))
            else: inner.randomize(None)
            on = t._do_transform
            if on and inner._do_transform is not False: out.append(read(inner))
            if name == "RandKSpaceSpikeNoised": inner.sampled_locs, inner.sampled_k_intensity = [], []
        return np.array(out)
    def ours(name): return np.array([getattr(p, name) for p in many if getattr(p, name) is not None])
    sets = {"gamma": ("RandAdjustContrastd", lambda t: t.gamma_value, ours("gamma")),
            "gibbs": ("RandGibbsNoised", lambda t: t.sampled_alpha, ours("gibbs")),
            "blur": ("RandGaussianSmoothd", lambda t: (t.x, t.y, t.z), ours("blur")),
            "bias": ("RandBiasFieldd", lambda t: t._coeff, ours("bias")),
            "sharpen first": ("RandGaussianSharpend", lambda t: (t.x1, t.y1, t.z1), ours("sharpen")[:, 0]),
            "sharpen second": ("RandGaussianSharpend", lambda t: (t.x2, t.y2, t.z2), ours("sharpen")[:, 1]),
            "amount": ("RandGaussianSharpend", lambda t: t.a, np.array([p.sharpen_amount for p in many if p.sharpen])),
            "zoom": ("RandSimulateLowResolutiond", lambda t: t.zoom_factor, ours("zoom")[:, 0]),
            "place": ("RandKSpaceSpikeNoised", lambda t: t.sampled_locs[-1][1:], np.floor(8*ours("spike"))),
            "level": ("RandKSpaceSpikeNoised", lambda t: t.sampled_k_intensity[-1],
                      np.array([p.spike_level for p in many if p.spike]))}
    for what, (name, read, mine) in sets.items():
        theirs = asked(name, read)
        assert ks_2samp(mine.ravel(), theirs.ravel()).pvalue > 1e-4, what


def test_A3_plans_differ():
    digests = {draw_view_plan(s, i, v, ViewConfig(), 4).digest for s in (0, 1) for i in range(500) for v in (1, 2)}
    assert len(digests) == 2000


# ---- A4: rendered views look like those of the reference


def statistics(v: np.ndarray) -> tuple:
    x = v.astype(np.float64)/255
    c = x - x.mean()
    return (x.mean(), x.std(), *np.quantile(x, (0.05, 0.5, 0.95)), (v == 0).mean(),
            np.mean([np.abs(np.diff(x, axis=a)).mean() for a in range(3)]), (c[1:]*c[:-1]).mean()/max(c.var(), 1e-12))


def compared(maps, seed) -> None:
    "Pairs of either kind of each map; p > 1e-3 for each of eight statistics"
    ours, theirs = [], []
    for i, m in enumerate(maps):
        ps = [draw_view_plan(seed, i, v, ViewConfig(), int(m.max()) + 1) for v in (1, 2)]
        ours += [statistics(v.numpy()) for v in render_views(torch.from_numpy(m).expand(2, -1, -1, -1), ps)]
        theirs += [statistics(v) for v in reference.view_pair(m, seed + i)]
    for k, (a, b) in enumerate(zip(np.array(ours).T, np.array(theirs).T)):
        assert ks_2samp(a, b).pvalue > 1e-3, (k, np.quantile(a, (0.25, 0.5, 0.75)), np.quantile(b, (0.25, 0.5, 0.75)))


@pytest.mark.parametrize("count, side", [pytest.param(60, 32, id="60_pairs"),
                                         pytest.param(200, 64, id="200_pairs", marks=pytest.mark.slow)])
def test_A4_views_are_distributed_as_the_references(count, side):
    pytest.importorskip("monai")
    compared([labels((side,)*3, seed=i % 20, n=6 + i % 15).numpy() for i in range(count)], 100)


@pytest.mark.slow
def test_A4_views_of_real_shapes(data_dir):
    "Ensembles of the 61 and 95 organ shapes at 64^3"
    pytest.importorskip("monai")
    labels_page, templates = (pytest.importorskip(f"medvol_nb.synth.{m}") for m in ("labels", "templates"))
    from medvol_nb.core import tmpdir
    with tmpdir() as d:
        templates.build_bank([data_dir/"synthetic_labels"], d/"bank", max_bad=1000)
        bank = templates.TemplateBank.open(d/"bank")
        config = labels_page.EnsembleConfig(shape=64)
        maps = [labels_page.render_labels(labels_page.draw_plan(3, i, config, len(bank)), bank) for i in range(60)]
    compared(maps, 300)


# ---- A5, D1, D2: bytes


def one(task) -> str:
    seed, index, threads = task
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ps = [draw_view_plan(seed, index, v, ViewConfig(), 20) for v in (1, 2)]
        pair = render_views(labels((24, 20, 28)).expand(2, -1, -1, -1), ps)
        return hashlib.sha256(pair.numpy()).hexdigest()
    finally: torch.set_num_threads(before)


def test_D1_same_seed_same_bytes():
    "The reference gives other views each time: MONAI's transforms keep generators that its seed does not reach"
    tasks = [(7, i, 1) for i in range(8)]
    serial = [one(t) for t in tasks]
    torch.rand(5), np.random.default_rng(0).random()
    assert [one(t) for t in reversed(tasks)] == serial[::-1], "the order matters"
    for workers in (1, 3): assert pmap(one, tasks, workers=workers) == serial, workers
    assert len(set(serial)) == len(serial)


def test_A5_threads_and_batches_do_not_change_a_bit():
    "One item with everything on, at a size where PyTorch divides work among threads"
    lbl = labels((64, 48, 56))
    ps = [draw_view_plan(1, i, 1, ALL_ON, 20) for i in range(3)]
    alone = torch.stack([render_view(lbl, p) for p in ps])
    before = torch.get_num_threads()
    try:
        for n in (2, 3):
            torch.set_num_threads(n)
            assert torch.equal(render_views(lbl.expand(3, -1, -1, -1), ps), alone), n
    finally: torch.set_num_threads(before)
    order = [2, 0]
    assert torch.equal(render_views(lbl.expand(2, -1, -1, -1), [ps[k] for k in order]), alone[order])


def test_D1_no_global_generator_is_touched():
    before = torch.get_rng_state()
    render_view(labels((12, 12, 12)), draws(4)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_D2_more_items_are_the_same_and_some():
    "The reference draws seeds from ten times the number of items: a longer run repeats a tenth of them"
    few, lots = ([draw_view_plan(0, i, 1, ViewConfig(), 9) for i in range(n)] for n in (50, 400))
    assert lots[:50] == few and len({p.bias for p in lots if p.bias}) == sum(p.bias is not None for p in lots)


def test_plans_survive_json_and_switches_are_independent():
    for p in draws(5) + [draw_view_plan(0, i, 2, ViewConfig(preset="medvol"), 7) for i in range(20)]:
        assert ViewPlan.from_json(json.loads(to_json(p, None))) == p and ViewPlan.from_json(plain(p)).digest == p.digest
    for name in SWITCHES:
        a, b = (draw_view_plan(0, 3, 1, ViewConfig(**{**{f"p_{s}": 1 for s in SWITCHES}, f"p_{name}": c}), 5)
                for c in (1, 0))
        field = {"lowres": "zoom"}.get(name, name)
        gone = {field, f"{field}_level", f"{field}_amount"}
        assert a.model_dump(exclude=gone) == b.model_dump(exclude=gone) and getattr(b, field) in (None, False)


def test_medvol_has_voxels_that_are_no_cubes():
    ps = [draw_view_plan(0, i, 1, ViewConfig(preset="medvol", p_lowres=1), 5) for i in range(20)]
    assert all(len(set(p.zoom)) == 3 for p in ps)


# ---- A8: bad input


def test_A8_bad_plans_and_labels_are_refused():
    good = plain(draws(6)[0])
    for change in ({"gama": 1}, {"gamma": -1}, {"gamma": math.nan}, {"bias": good["bias"][:19]}, {"sd": [1.0]},
                   {"zoom": (0, 1, 1)}, {"spike": (0.5, 0.5, 1.0)}, {"blur": (-1, 0, 0)}, {"texture": [1.0]},
                   {"blur": (1e9, 0, 0)}, {"gibbs": 1.5}, {"mean": []}, {"texture_scales": (0, 1, 2, 3)}):
        with pytest.raises(ConfigError): ViewPlan.from_json({**good, **change})
    for change in ({"gamma": (2, 1)}, {"p_blur": 1.5}, {"zoom": (0, 1)}, {"gibbs": (0, 2)}, {"texture_scales": (0,)},
                   {"sharpen_second": 0.9}, {"mean": (-5, 3)}, {"colour": 1}, {"blur": (0, 1e6)}):
        with pytest.raises(ConfigError): check_config(ViewConfig, change)
    plan, lbl = draws(6)[0], torch.zeros(4, 4, 4, dtype=torch.uint8)
    for bad in (lbl.float(), lbl.bool(), lbl[None], lbl[:0], lbl + 20, lbl.int() - 1):
        with pytest.raises(DataError): render_view(bad, plan)
    with pytest.raises(DataError): render_views(lbl[None], [plan, plan])
    with pytest.raises(DataError): render_views(lbl[None], [plan], noise=torch.zeros(1, 4, 4, 5))
    mixed = draw_view_plan(0, 0, 1, ViewConfig(texture_scales=(4,)), 20)
    with pytest.raises(DataError): render_views(lbl.expand(2, -1, -1, -1), [plan, mixed])
    for bad in ({"seed": -1}, {"index": -1}, {"index": 1.5}, {"view": True}, {"n_labels": 0}):
        with pytest.raises(DataError):
            draw_view_plan(**{"seed": 0, "index": 0, "view": 1, "config": ViewConfig(), "n_labels": 3, **bad})


# ---- A12: what a worker needs


def test_A12_memory_and_imports():
    script = """
import sys, threading
import psutil, torch
torch.set_num_threads(1)
from medvol_nb.synth.views import ViewConfig, draw_view_plan, render_views
lbl = torch.zeros(2, 128, 128, 128, dtype=torch.uint8)
lbl[:, 30:90, 30:90] = 3
process, done = psutil.Process(), threading.Event()
seen = [process.memory_info().rss]
def watch():
    while not done.wait(0.001): seen.append(process.memory_info().rss)
watcher = threading.Thread(target=watch)
watcher.start()
everything = ViewConfig(**{"p_" + n: 1 for n in "bias spike gamma blur gibbs sharpen lowres".split()})
for i in range(2): render_views(lbl, [draw_view_plan(0, i, v, everything, 4) for v in (1, 2)])
done.set()
watcher.join()
print(seen[0]/2**20, max(seen)/2**20, "monai" in sys.modules, "numba" in sys.modules)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after, has_monai, has_numba = out.stdout.split()
    assert float(after) - float(before) <= 250 and float(after) <= 600, out.stdout
    assert (has_monai, has_numba) == ("False", "False")


# ---- A13: GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_A13_gpu_draws_the_same_picture_from_the_same_noise():
    lbl = labels((40, 33, 48)).expand(4, -1, -1, -1)
    ps = [draw_view_plan(2, i, 1, c, 20) for i, c in enumerate((ViewConfig(), ALL_ON, ViewConfig(), ALL_ON))]
    noise = torch.stack([torch.randn(lbl.shape[1:], generator=torch_rng_for(0, i)) for i in range(4)])
    cpu, gpu = render_views(lbl, ps, noise=noise), render_views(lbl, ps, device="cuda", noise=noise).cpu()
    assert (cpu.int() - gpu.int()).abs().max() <= 1 and (cpu != gpu).float().mean() < 1e-2
    assert torch.equal(render_views(lbl, ps, device="cuda"), render_views(lbl, ps, device="cuda"))


# ---- A17, D8, D9: sizes and labels


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (32, 32, 32), (97, 33, 50), (100, 100, 100), (256, 40, 36)])
def test_D9_any_size(shape):
    "The reference fails unless the sides are multiples of 32"
    lbl = torch.randint(0, 5, shape, generator=torch_rng_for(0, "any"))
    for p in draws(7, 2):
        v = render_view(lbl, p)
        assert v.shape == shape and v.dtype == torch.uint8 and (math.prod(shape) == 1 or int(v.max()) == 255)


def test_D9_coarse_grids_of_more_than_255_knots():
    "The reference counts knots in 8 bits"
    plan = draws(8, 1)[0]
    assert [k.shape[0] for k in views.texture_knots(plan, (1030, 4, 4))] == [258, 129, 65, 33]
    assert render_view(torch.zeros(1030, 4, 4, dtype=torch.uint8), plan).shape == (1030, 4, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_D8_labels_of_any_integer_type(dtype):
    "More than 255 labels work, and the type changes nothing"
    n = 200 if dtype == torch.uint8 else 400
    lbl = (torch.arange(8**3)*n//8**3).reshape(8, 8, 8)
    plan = draw_view_plan(0, 0, 1, ViewConfig(), n)
    assert torch.equal(render_view(lbl.to(dtype), plan), render_view(lbl, plan))
    assert torch.equal(render_view(lbl.to(dtype).numpy(), plan), render_view(lbl, plan))


def test_the_lowest_label_is_the_background_even_if_it_is_not_zero():
    plan = next(p for i in range(40) if (p := draw_view_plan(0, i, 1, ViewConfig(), 9)).zero)
    lbl = labels((16, 16, 16)).clamp(max=4).long()
    x = views.sample_levels((lbl + 3)[None], [plan.mean], [plan.sd], torch.randn(1, 16, 16, 16), [True])[0]
    assert (x[lbl == 0] == 0).all() and (x[lbl == 1] > 0).any()
