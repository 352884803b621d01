"""Row 31, views: label maps that leave nothing to normalise, and sides that nothing divides."""
import warnings

import numpy as np
import torch

from medvol_nb.core import rng_for
from medvol_nb.synth import views
from medvol_nb.synth.views import ViewConfig, draw_view_plan, render_view, render_views

from .rows import SilentlyWrong

SWITCHES = ("zero", "bias", "spike", "gamma", "blur", "gibbs", "sharpen", "lowres")
ALL_ON, ALL_OFF = (ViewConfig(**{f"p_{n}": p for n in SWITCHES}) for p in (1, 0))


def finite(lbl: torch.Tensor, config: ViewConfig) -> torch.Tensor:
    "A view whose every step is finite: bytes alone do not show that a NaN was cast"
    plan, seen = draw_view_plan(31, 0, 1, config, int(lbl.max()) + 1), []
    steps = dict(views.STEPS)
    views.STEPS.update({k: lambda x, ps, f=f: seen.append(f(x, ps)) or seen[-1].clone() for k, f in steps.items()})
    original = views.quantise
    views.quantise = lambda x: seen.append(x) or original(x)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error") # NumPy warns when it casts NaN
            out = render_view(lbl, plan)
    finally:
        views.STEPS.update(steps)
        views.quantise = original
    if not all(torch.isfinite(x).all() for x in seen): raise SilentlyWrong("a step gave a value that is not finite")
    last = seen[-1]
    if float(last.min()) < 0 or float(last.max()) > 1: raise SilentlyWrong("a value outside of [0, 1] was cast")
    return out


def test_row_31_views(instances):
    "Nine instances: three sides and three kinds of constant input, with all operations and with none"
    for side in (1, 7, 97):
        with instances(f"side {side}"):
            rng = rng_for(31, side)
            lbl = torch.from_numpy(rng.integers(0, 5, (side, min(side, 7), side)).astype(np.uint8))
            for config in (ALL_ON, ALL_OFF, ViewConfig(preset="medvol")):
                assert finite(lbl, config).shape == lbl.shape
    for shape in ((7, 7, 7), (32, 32, 32), (97, 5, 33)):
        with instances(f"one label, {shape}"):
            "with its background at exactly 0 the reference computes 0/0"
            lbl = torch.full(shape, 3, dtype=torch.uint8)
            assert not finite(lbl, ViewConfig(**{f"p_{n}": float(n == "zero") for n in SWITCHES})).any()
            finite(lbl, ALL_ON), finite(lbl, ALL_OFF)
    for value in (0.0, 1.0, 255.0):
        with instances(f"constant image of {value}"):
            x = torch.full((2, 6, 5, 7), value)
            assert not views.rescale(x).any() and not views.quantise(views.rescale(x)).any()
            for name, step in views.STEPS.items():
                plans = [draw_view_plan(31, i, 1, ALL_ON, 2) for i in range(2)]
                if not torch.isfinite(step(x, plans)).all(): raise SilentlyWrong(f"{name} of a constant is not finite")
            plain = [draw_view_plan(31, i, 1, ViewConfig(sd=(0, 0)), 1) for i in range(2)]
            assert torch.isfinite(render_views(torch.zeros(2, 6, 5, 7, dtype=torch.uint8), plain).float()).all()
    instances.check(9)
