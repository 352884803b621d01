"Step 2 of synthetic data: pairs of views at 128^3, each operation, and TorchIO's picture of a label map"
import functools

import numpy as np
import torch

from benchmarks._synth_labels import realistic_tree
from benchmarks.common import Row, compare, interleaved, median, threads
from benchmarks.reference import synth_views as reference
from medvol_nb.synth import views
from medvol_nb.synth.labels import EnsembleConfig, draw_plan, render_labels
from medvol_nb.synth.templates import TemplateBank, build_bank
from medvol_nb.synth.views import ViewConfig, draw_view_plan, render_views

SHAPE = (128, 128, 128)
NOTE = "processor time"


@functools.lru_cache(1)
def ensembles(n: int) -> list[np.ndarray]:
    "Label maps of real organs, uint8"
    with realistic_tree() as (d, _):
        build_bank(d/"tree", d/"bank", max_bad=1000)
        bank = TemplateBank.open(d/"bank")
        return [render_labels(draw_plan(0, i, EnsembleConfig(shape=SHAPE), len(bank)), bank) for i in range(n)]


def parts() -> dict[str, float]:
    "Seconds of what cannot be left out: drawing a volume of normal numbers, transforms, moving a volume"
    x, out = torch.rand(SHAPE), torch.empty(SHAPE)
    half = torch.fft.rfftn(x)
    calls = {"noise": lambda: out.normal_(), "forward": lambda: torch.fft.rfftn(x),
             "inverse": lambda: torch.fft.irfftn(half, s=SHAPE), "copy": lambda: out.copy_(x)}
    return {k: median(t, 1) for k, t in interleaved(calls, 9).items()}


def floors(p: dict[str, float]) -> dict[str, float]:
    "Least seconds of each operation: noise and transforms as they are, and one pass over the volume"
    return {"levels": p["noise"] + p["copy"], "spike": p["forward"] + p["copy"], "gibbs": p["forward"] + p["inverse"],
            **dict.fromkeys(("texture", "rescale", "bias", "gamma", "blur", "sharpen", "zoom"), p["copy"])}


def pair(full: bool = False) -> list[Row]:
    "Both sides from a label map in memory to two uint8 volumes in memory, a plan drawn for each"
    maps = ensembles(16 if full else 8)
    config, items = ViewConfig(), len(maps)
    drawn = [[draw_view_plan(0, i, v, config, int(m.max()) + 1) for v in (1, 2)] for i, m in enumerate(maps)]

    def ours() -> None:
        for i, m in enumerate(maps):
            plans = [draw_view_plan(0, i, v, config, int(m.max()) + 1) for v in (1, 2)]
            render_views(torch.from_numpy(m).expand(2, -1, -1, -1), plans)

    def literal() -> None:
        for i, m in enumerate(maps): reference.view_pair(m, i)

    with threads():
        low = floors(parts())
        least = sum(low["levels"] + low["texture"] + 2*low["rescale"] for ps in drawn for _ in ps)
        least += sum(low[k] for ps in drawn for p in ps for k in views.STEPS if getattr(p, k) is not None)
        return [compare("synth.view_pair", f"{items} ensembles of 128^3, two views each; reference: masks and MONAI",
                        ours, literal, least, unit="ms", runs=5, items=items, bar=7, cpu=True,
                        note=f"{NOTE} per pair; floor: noise, transforms and one pass for each operation")]


def operations(full: bool = False) -> list[Row]:
    "Each operation with the same parameters on both sides"
    from monai import transforms as mt
    lbl = ensembles(16 if full else 8)[0]
    everything = ViewConfig(**{f"p_{n}": 1 for n in ("bias", "spike", "gamma", "blur", "gibbs", "sharpen", "lowres")})
    plan = draw_view_plan(1, 0, 1, everything, int(lbl.max()) + 1)
    t, wide, out = torch.from_numpy(lbl)[None], lbl.astype(np.float64), torch.empty(1, *SHAPE)
    x = views.rescale(views.sample_levels(t, [plan.mean], [plan.sd], torch.randn(1, *SHAPE), [False]))
    means, sds = (torch.tensor(v)[torch.from_numpy(np.unique(lbl)).long()] for v in (plan.mean, plan.sd))
    place = [int(u*n) for u, n in zip(plan.spike, SHAPE)]
    logs = float(2.5*plan.spike_level*torch.fft.fftn(x[0].double()).abs().log().mean())
    bias, low = mt.RandBiasField(prob=1, coeff_range=(0, 0.075)), mt.RandSimulateLowResolution(
        prob=1, downsample_mode="nearest-exact")
    bias.set_random_state(0)
    bias.randomize(SHAPE)
    low.set_random_state(0)
    low.randomize()
    low._do_transform, low.zoom_factor = True, plan.zoom[0]
    step = {k: functools.partial(f, x, [plan]) for k, f in views.STEPS.items()}

    def texture() -> torch.Tensor:
        knots = [k[None] for k in views.texture_knots(plan, SHAPE)]
        return views.add_texture(x, knots, plan.texture_scales)

    def levels() -> torch.Tensor:
        noise = views.voxel_noise(plan, out[0])[None]
        return views.rescale(views.sample_levels(t, [plan.mean], [plan.sd], noise, [False]))

    calls = {
        "levels": (levels, lambda: reference.gmm(means, sds, wide)),
        "texture": (texture, lambda: x*(1 + 0.02*reference.texture(SHAPE))),
        "bias": (step["bias"], lambda: bias(x, randomize=False)),
        "spike": (step["spike"], lambda: mt.KSpaceSpikeNoise([(0, *place)], [logs])(x)),
        "gamma": (step["gamma"], lambda: mt.AdjustContrast(plan.gamma)(x)),
        "blur": (step["blur"], lambda: mt.GaussianSmooth(plan.blur)(x)),
        "gibbs": (step["gibbs"], lambda: mt.GibbsNoise(plan.gibbs)(x)),
        "sharpen": (step["sharpen"], lambda: mt.GaussianSharpen(*plan.sharpen, plan.sharpen_amount)(x)),
        "lowres": (step["zoom"], lambda: low(x, randomize=False)),
        "rescale": (lambda: views.rescale(x), lambda: mt.ScaleIntensity()(x)),
    }
    with threads():
        least = floors(parts())
        return [compare(f"synth.view_op_{k}", f"{k} of a volume of 128^3", a, b, least["zoom" if k == "lowres" else k],
                        runs=9, cpu=True, note=NOTE) for k, (a, b) in calls.items()]


def torchio(full: bool = False) -> list[Row]:
    "A picture of a label map: noise by label, the same means and deviations"
    import torchio as tio
    used, lbl = np.unique(ensembles(16 if full else 8)[0], return_inverse=True)
    lbl = lbl.reshape(SHAPE).astype(np.uint8) # TorchIO asks for labels without gaps
    plan = draw_view_plan(1, 0, 1, ViewConfig(), len(used))
    subject = tio.Subject(labels=tio.LabelMap(tensor=torch.from_numpy(lbl)[None]))
    mean, sd = ([(v, v) for v in values] for values in (plan.mean, plan.sd))
    theirs = tio.RandomLabelsToImage(label_key="labels", mean=mean, std=sd)
    t, out = torch.from_numpy(lbl)[None], torch.empty(1, *SHAPE)

    def ours() -> torch.Tensor:
        return views.sample_levels(t, [plan.mean], [plan.sd], views.voxel_noise(plan, out[0])[None], [False])

    with threads():
        least = floors(parts())["levels"]
        what = f"grey levels and noise of {len(used)} labels, 128^3; reference: TorchIO {tio.__version__} " \
            "RandomLabelsToImage"
        return [compare("synth.view_torchio", what, ours, lambda: theirs(subject), least, runs=5, cpu=True, note=NOTE)]


ROWS = {"view_pair": pair, "view_op": operations, "view_torchio": torchio}
