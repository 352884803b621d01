"Registration: the deformable step beside ConvexAdam, and real pairs that were knocked apart"
import functools
import time
from collections.abc import Callable

import numpy as np

from benchmarks.common import DATA, Row, interleaved, median, threads
from medvol_nb import phantoms
from medvol_nb.core import rng_for
from medvol_nb.embed import deform, register
from medvol_nb.embed.transforms import Field, Transform, jacobian_report, warp
from medvol_nb.geometry import Volume, crop, reorient, resample, to_axes, to_world
from medvol_nb.volume import read_volume

ANATOMY = DATA/"anatomical_embedding"
CT = DATA/"datalists_supervoxels/totalseg/abdomen_3mm_ct.nii.gz"


def smooth_field(vol: Volume, size: float, scale: float, seed: int, largest: float | None = None) -> Field:
    "Smooth random displacement: `size` [mm] root mean square, or `largest` [mm] at most, structures of `scale` [mm]"
    axes = [np.arange(n)*s for n, s in zip(vol.shape, vol.spacing)]
    d = np.stack([phantoms.smooth_noise(axes, scale, rng_for(seed, "field", c)) for c in range(3)])
    length = np.sqrt((d**2).sum(axis=0))
    return Field(d*(size/np.sqrt((length**2).mean()) if largest is None else largest/length.max()), vol.affine)


def solve(transform: Transform, goal: np.ndarray, rounds: int = 80) -> np.ndarray:
    "Points that a transform near the identity moves to `goal`"
    y = goal.copy()
    for _ in range(rounds): y = y + 0.5*(goal - transform(y))
    return y


# ------------------------------------------------------------------------------------------------ the deformable step

def scaled(d: np.ndarray, inside: np.ndarray, mean: float) -> np.ndarray:
    return d*(mean/np.sqrt((d**2).sum(axis=0))[inside].mean())


@functools.lru_cache(1)
def anchor(seed: int = 0) -> dict:
    "Abdominal CT at 2 mm, 180 x 150 x 165; itself and an MR-like remap, warped by 7.75 mm on average"
    vol = crop(resample(read_volume(CT), 2.0), (0, 0, 0), (180, 150, 165))
    body = vol.data > -500
    d = smooth_field(vol, 1, 80, seed).displacement
    d = scaled(d, body, 7.75)
    rng = rng_for(seed, "anchor")
    moving_to_fixed = Field(d, vol.affine) # moving(y) = fixed(y + d(y)), so fixed point p is at y with y + d(y) = p
    moved = warp(vol, Transform((moving_to_fixed,)), vol.affine, vol.shape, fill="edge").data
    moved = moved + rng.normal(0, 10, moved.shape).astype(np.float32)
    v = np.clip((moved + 1000)/2000, 0, 1) # non-monotone remap
    remap = 400*np.abs(np.sin(9*v))*(0.3 + v) + rng.normal(0, 8, v.shape).astype(np.float32)
    inner = np.argwhere(body[10:-10, 10:-10, 10:-10]) + 10
    pts = to_world(vol.affine, rng.permutation(inner)[:3000])
    return {"fixed": vol, "same": Volume(moved, vol.affine), "mr": Volume(remap.astype(np.float32), vol.affine),
            "points": pts, "truth": solve(Transform((moving_to_fixed,)), pts)}


def errors(field: Field, a: dict) -> np.ndarray: return np.linalg.norm(field(a["points"]) - a["truth"], axis=1)


def convex_adam(fixed: Volume, moving: Volume) -> Field:
    "The package at its defaults, on one thread of the CPU; raises ImportError if it is not there"
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt
    u = convex_adam_pt(torch.from_numpy(fixed.data.copy()), torch.from_numpy(moving.data.copy()),
                       dtype=torch.float32, device=torch.device("cpu"), verbose=False)
    return deform._in_mm(np.moveaxis(np.asarray(u, np.float32), -1, 0), fixed.affine)


def keep(found: dict, name: str, call: Callable, *args) -> None: found[name] = call(*args)


def deformable(full: bool = False) -> list[Row]:
    "Processor time and accuracy of both, same and MR-like contrast"
    from benchmarks.reference.embed_register import coupled_convex_adam
    try:
        import convexAdam  # noqa: F401
        theirs, name = convex_adam, "convexAdam package, defaults"
    except ImportError: theirs, name = coupled_convex_adam, "literal coupled convex + Adam, defaults of convexAdam"
    rows, a = [], anchor()
    with threads():
        deform.register_deformable(a["fixed"], a["same"])
        for kind, what, bar in (("same", "same contrast", 0.8), ("mr", "MR-like contrast", 1.0)):
            found = {}
            sides = {"ours": lambda *v: deform.register_deformable(*v).field, "reference": theirs}
            t = interleaved({k: functools.partial(keep, found, k, f, a["fixed"], a[kind]) for k, f in sides.items()},
                            1, 0)
            e = {k: errors(f, a) for k, f in found.items()}
            fold = jacobian_report(found["ours"])["fraction_folded"]
            before = np.linalg.norm(a["points"] - a["truth"], axis=1)
            said = ", ".join(f"{k} {v.mean():.2f} mm (95 %: {np.percentile(v, 95):.2f})" for k, v in
                             {"before": before, **e}.items())
            accurate = "met" if e["ours"].mean() <= bar else "MISSED"
            rows.append(Row("embedding.register" + "_mr"*(kind == "mr"),
                            f"deformable step, {what}, 4.5 M voxels; reference: {name}",
                            median(t["ours"], 1), median(t["reference"], 1), "s",
                            median(t["reference"], 1)/median(t["ours"], 1), bar=1.0, runs=1,
                            note=f"processor time; {said}; bar {bar} mm {accurate}; folded {fold:.3%}"))
    return rows


# ------------------------------------------------------------------------------------------------ knocked apart

def knock(seed: int, name: str, about: np.ndarray, shift: float = 40, angle: float = 20,
          scale: float = 0.05) -> np.ndarray:
    "Random affine about a point: rotation up to `angle` [degree] a axis, shift up to `shift` [mm], scales within 5 %"
    from scipy.spatial.transform import Rotation
    rng = rng_for(seed, "knock", name)
    m = np.eye(4)
    m[:3, :3] = Rotation.from_euler("xyz", rng.uniform(-angle, angle, 3), degrees=True).as_matrix() \
        @ np.diag(1 + rng.uniform(-scale, scale, 3))
    direction = rng.normal(size=3)
    m[:3, 3] = about - m[:3, :3] @ about + direction/np.linalg.norm(direction)*rng.uniform(0.3, 1)*shift
    return m


def knocked_apart(vol: Volume, seed: int, deform_mm: float, resampled: bool) -> tuple[Volume, Callable]:
    """The volume deformed and moved, and where its points are then.

    Without `resampled` the affine part is a change of the header; with it, voxels are interpolated on a larger grid
    along the old axes and the outside is filled with the darkest value.
    """
    middle = to_world(vol.affine, (np.array(vol.shape) - 1)/2)
    field = smooth_field(vol, 0, 60, seed, largest=deform_mm)
    m = knock(seed, "affine", middle)
    soft = warp(vol, Transform((field,)), vol.affine, vol.shape, fill="edge") if deform_mm else vol
    moved = Volume(soft.data, m @ soft.affine)
    if resampled:
        pad = [int(np.ceil(45/s)) for s in vol.spacing]
        big = crop(vol, [-p for p in pad], [n + 2*p for n, p in zip(vol.shape, pad)], float(vol.data.min()))
        moved = warp(moved, Transform(), big.affine, big.shape)
    return moved, lambda p: to_world(m, solve(Transform((field,)), p) if deform_mm else p)


@functools.lru_cache(1)
def lung() -> tuple[Volume, Volume, np.ndarray, np.ndarray]:
    "Baseline, follow-up on its grid, 500 points in the lung [mm], and the lung mask on the baseline's array"
    d = ANATOMY/"lung_two_timepoints"
    fixed, moving, mask = (to_axes(read_volume(d/f), "xyz") for f in (
        "baseline_half_res_ct.nii.gz", "followup_warped_to_baseline_ct.nii.gz", "baseline_lung_mask.nii.gz"))
    pts = to_world(mask.affine, rng_for(0, "points").permutation(np.argwhere(mask.data > 0))[:500])
    return fixed, Volume(np.asarray(moving.data, np.float32), moving.affine), pts, mask


def lung_trial(seed: int) -> dict:
    "One known transform: error before and after, folding in the lung, seconds"
    fixed, followup, pts, mask = lung()
    moving, place = knocked_apart(followup, seed, 15, resampled=seed % 2 == 1)
    truth, start = place(pts), time.process_time()
    found = register.register_pair(fixed, moving)
    seconds = time.process_time() - start
    field = found.transform.steps[0]
    inside = warp(mask, Transform(), field.affine, field.shape, 0, fill=0).data > 0
    off = np.linalg.norm(found.transform(pts) - truth, axis=1)
    return {"seed": seed, "before": float(np.linalg.norm(pts - truth, axis=1).mean()), "mean": float(off.mean()),
            "p95": float(np.percentile(off, 95)), "likeness": found.affine.likeness, "source": found.affine.source,
            "affine": float(np.linalg.norm(found.affine.transform(pts) - truth, axis=1).mean()),
            "folded": jacobian_report(field, inside)["fraction_folded"], "seconds": seconds}


@functools.lru_cache(1)
def at_rest() -> Transform: return register.register_pair(*brains()[:2]).transform


@functools.lru_cache(1)
def brains() -> tuple[Volume, Volume, np.ndarray]:
    "T1 and CT of the same space, skull-stripped, and 500 points in the brain [mm]"
    d = ANATOMY/"brain_ct_mr"
    t1, ct = (to_axes(reorient(read_volume(d/f), "RAS"), "xyz") for f in (
        "mni_t1_stripped.nii.gz", "mni_ct_template_stripped.nii.gz"))
    t1 = resample(t1, 2.0)
    both = (t1.data > 40) & (warp(Volume(np.asarray(ct.data, np.float32), ct.affine), Transform(), t1.affine,
                                  t1.shape).data > 0)
    pts = to_world(t1.affine, rng_for(0, "brain").permutation(np.argwhere(both))[:500])
    return t1, Volume(np.asarray(ct.data, np.float32), ct.affine), pts


def ct_mr_trial(seed: int, deform_mm: float = 8) -> dict:
    "T1 fixed, CT knocked apart: error before and after; seed -1: not knocked, what the two templates disagree by"
    t1, ct, pts = brains()
    moving, place = ct, lambda p: p
    if seed >= 0: moving, place = knocked_apart(ct, 1000 + seed, deform_mm, resampled=seed % 2 == 1)
    truth, start = place(pts), time.process_time()
    found = register.register_pair(t1, moving)
    seconds = time.process_time() - start
    off = lambda t: float(np.linalg.norm(t(pts) - truth, axis=1).mean())
    return {"seed": seed, "before": off(Transform()), "affine": off(found.affine.transform),
            "mean": off(found.transform), "likeness": found.affine.likeness, "seconds": seconds,
            "to_rest": float(np.linalg.norm(found.transform(pts) - place(at_rest()(pts)), axis=1).mean()),
            "folded": found.report["jacobian"]["fraction_folded"]}


def cropped_trial(seed: int) -> dict:
    "E6: the moving image shows half of the height; errors at points it shows, and of plain Kabsch on block matches"
    fixed, followup, pts, _ = lung()
    nz = followup.shape[2]
    low = (nz//4, nz//2)[seed % 2]
    half = crop(followup, (0, 0, low), (*followup.shape[:2], nz//2))
    at = np.linalg.solve(half.affine, np.c_[pts, np.ones(len(pts))].T)[2]
    seen = (at > 2) & (at < half.shape[2] - 3)
    moving, place = knocked_apart(half, 2000 + seed, 10, resampled=False)
    truth = place(pts[seen])
    found = register.register_pair(fixed, moving)
    return {"seed": seed, "seen": int(seen.sum()), "before": float(np.linalg.norm(pts[seen] - truth, axis=1).mean()),
            "affine": float(np.linalg.norm(found.affine.transform(pts[seen]) - truth, axis=1).mean()),
            "mean": float(np.linalg.norm(found.transform(pts[seen]) - truth, axis=1).mean())}


def simple_itk(fixed: Volume, moving: Volume, seed: int = 1) -> Callable:
    "The peer: centred by moments, affine by mutual information in three scales, then B-spline by correlation"
    import SimpleITK as sitk

    from medvol_nb.embed.transforms import _FLIP

    def image(v: Volume):
        m = _FLIP @ v.affine
        zooms = np.linalg.norm(m[:3, :3], axis=0)
        img = sitk.GetImageFromArray(np.ascontiguousarray(np.asarray(v.data, np.float32).T))
        img.SetSpacing(zooms.tolist())
        img.SetOrigin(m[:3, 3].tolist())
        img.SetDirection((m[:3, :3]/zooms).ravel().tolist())
        return img

    fix, mov = image(fixed), image(moving)
    first = sitk.CenteredTransformInitializer(fix, mov, sitk.AffineTransform(3),
                                              sitk.CenteredTransformInitializerFilter.MOMENTS)

    def method(shrink, sigmas):
        r = sitk.ImageRegistrationMethod()
        r.SetInterpolator(sitk.sitkLinear)
        r.SetShrinkFactorsPerLevel(shrink)
        r.SetSmoothingSigmasPerLevel(sigmas)
        r.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        r.SetMetricSamplingStrategy(r.RANDOM)
        r.SetMetricSamplingPercentage(0.2, seed)
        return r

    r = method([4, 2, 1], [6, 3, 1])
    r.SetMetricAsMattesMutualInformation(50)
    r.SetOptimizerAsGradientDescentLineSearch(1.0, 200, 1e-6, 10)
    r.SetOptimizerScalesFromPhysicalShift()
    r.SetInitialTransform(first, inPlace=False)
    affine = r.Execute(fix, mov)
    mesh = [max(1, round(n*s/30)) for n, s in zip(fixed.shape, fixed.spacing)]
    spline = sitk.BSplineTransformInitializer(fix, mesh, 3)
    r = method([2, 1], [3, 1])
    r.SetMetricAsCorrelation()
    r.SetMovingInitialTransform(affine)
    r.SetInitialTransform(spline, True)
    r.SetOptimizerAsLBFGSB(1e-5, 60)
    r.Execute(fix, mov)
    both = sitk.CompositeTransform([affine, spline]) # the last one is applied first
    flip = np.array([-1, -1, 1])
    return lambda p: np.array([both.TransformPoint((q*flip).tolist()) for q in p])*flip


def peer_trial(seed: int) -> dict:
    "The lung trial by SimpleITK"
    fixed, followup, pts, _ = lung()
    moving, place = knocked_apart(followup, seed, 15, resampled=seed % 2 == 1)
    start = time.process_time()
    off = np.linalg.norm(simple_itk(fixed, moving)(pts) - place(pts), axis=1)
    return {"seed": seed, "mean": float(off.mean()), "p95": float(np.percentile(off, 95)),
            "seconds": time.process_time() - start}


def real_pairs(full: bool = False) -> list[Row]:
    "Mean error [mm] of known transforms, median of trials; on the lung beside SimpleITK"
    with threads():
        lungs, peers = ([f(s) for s in range(20 if full else 3)] for f in (lung_trial, peer_trial))
        heads = [ct_mr_trial(s) for s in range(20 if full else 3)]
        halves = [cropped_trial(s) for s in range(6 if full else 2)]

    def said(ts: list[dict], limit: float) -> str:
        m = np.array([t["mean"] for t in ts])
        return f"median {np.median(m):.2f}, worst {m.max():.2f}, {(m <= limit).sum()} of {len(m)} within {limit:g} mm"

    mean = lambda ts, k: float(np.mean([t[k] for t in ts]))
    middle = lambda ts, k="mean": float(np.median([t[k] for t in ts])) # one that got lost must not decide
    fold = max(t["folded"] for t in lungs)
    row = lambda name, what, a, b, note: Row(f"embedding.{name}", what, a, b, "mm", b/a, note=note, runs=1)
    return [row("register_lung", f"lung, {len(lungs)} known transforms; reference: SimpleITK affine + B-spline",
                middle(lungs), middle(peers),
                f"ours {said(lungs, 3)}, {mean(lungs, 'seconds'):.0f} s, folded at most {fold:.3%}; "
                f"SimpleITK {said(peers, 3)}, {mean(peers, 'seconds'):.0f} s"),
            row("register_ct_mr", f"CT to T1, {len(heads)} known transforms; reference: before", middle(heads),
                middle(heads, "before"), f"{said(heads, 3)}; affine alone {mean(heads, 'affine'):.2f}; "
                f"from where the pair that was not "
                f"knocked apart comes to rest {mean(heads, 'to_rest'):.2f}"),
            row("register_half", f"half field of view, {len(halves)} known transforms; reference: before",
                middle(halves), middle(halves, "before"), said(halves, 3))]


ROWS = {"register": deformable, "register_real": real_pairs}
