"""Steps 0 and 1 of anatomix as they were written: whole volumes, every time.

Written from the description of the reference (MIT licence, commit a29b8a8): preparation of a TotalSegmentator tree in
place, and label ensembles. `literal_labels` renders a given plan, so that both sides draw the same; `literal_draws`
draws in the order and with the calls of the reference. Its generators are local, so that its seeds do no harm here.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------- step 0


def literal_prepare(subject: Path) -> None:
    "Step 0 on one subject, IN PLACE: delete empty masks, add up ribs and vertebrae, delete their parts"
    import nibabel as nib
    folder = subject/"segmentations"
    (subject/"ct.nii.gz").unlink(missing_ok=True)
    for path in sorted(folder.glob("*.nii.gz")):
        if nib.load(path).get_fdata().sum() == 0: path.unlink()
    for pattern, name in (("rib_", "all_ribs"), ("vertebrae_", "all_vertebrae")):
        parts = [p for p in sorted(folder.glob("*.nii.gz")) if pattern in p.name]
        if not parts: continue
        images = [nib.load(p) for p in parts]
        total = sum(i.get_fdata() for i in images)
        if total.sum() > 0: nib.save(nib.Nifti1Image(total.astype(np.uint8), images[0].affine), folder/f"{name}.nii.gz")
        for p in parts: p.unlink()


# ---------------------------------------------------------------- step 1: places

def rotation(angles: Sequence[float]) -> np.ndarray:
    "Rx Ry Rz, in radians"
    (a, b, c) = angles
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return rx @ ry @ rz


def matrix(scale, angle, shear, flip) -> np.ndarray:
    "diag(+-s) R H, angles in degrees"
    h = np.array([[1, shear[0], shear[1]], [0, 1, shear[2]], [0, 0, 1]])
    return np.diag(np.where(flip, -1, 1)*np.array(scale)) @ rotation(np.deg2rad(angle)) @ h


def cropped_and_padded(mask: np.ndarray, side: Sequence[int]) -> np.ndarray:
    "Non-zero box, centred in at least the size of the grid; an odd remainder goes in front"
    where = np.argwhere(mask > 0)
    lo, hi = where.min(axis=0), where.max(axis=0) + 1
    mask = mask[lo[0]:hi[0], lo[1]:hi[1], lo[2]:hi[2]]
    missing = [max(s - n, 0) for s, n in zip(side, mask.shape)]
    return np.pad(mask, [((m + 1)//2, m//2) for m in missing])


def painted(templates: Sequence, matrices: Sequence, shifts: Sequence, shape: Sequence[int], first: int = 0
            ) -> np.ndarray:
    "Shapes over each other; `templates` are functions that load a full mask as float64, as the reference does"
    from scipy.ndimage import affine_transform
    out = np.zeros(shape, np.uint8)
    for k, (load, a, t) in enumerate(zip(templates, matrices, shifts)):
        box = cropped_and_padded(load(), shape)
        moved = affine_transform(box, a, t, order=0, mode="grid-wrap")[:shape[0], :shape[1], :shape[2]]
        out[moved > 0] = k + first
    return out


# ---------------------------------------------------------------- step 1: mask and envelope

def displacement(noise: Sequence[np.ndarray], shape: Sequence[int]):
    "Sum over scales of up-sampled noise, a (3, x, y, z) tensor"
    import torch
    total = torch.zeros(3, *shape)
    for n in noise:
        total += torch.nn.functional.interpolate(torch.from_numpy(n)[None], size=tuple(shape), mode="trilinear",
                                                 align_corners=False)[0]
    return total


def foreground(noise: Sequence[np.ndarray], centre: Sequence[int], radius: float, shape: Sequence[int]) -> np.ndarray:
    "Ball sampled at identity + displacement, then a median"
    import torch
    from scipy.ndimage import median_filter
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    sphere = np.sqrt(((grid - np.array(centre))**2).sum(-1)) <= radius
    axes = [torch.from_numpy(np.linspace(-1, 1, n).astype(np.float32)) for n in shape]
    identity = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1) # the last component is the first axis
    half = torch.tensor([(n - 1)/2 for n in shape[::-1]])
    field = identity + displacement(noise, shape).permute(1, 2, 3, 0)/half
    sampled = torch.nn.functional.grid_sample(torch.from_numpy(sphere.astype(np.float32))[None, None], field[None],
                                              mode="nearest", padding_mode="reflection", align_corners=False)
    return median_filter(sampled[0, 0].numpy().astype(np.uint8), 3, mode="nearest")


def shell(mask: np.ndarray, e: int) -> np.ndarray:
    "Dilation minus erosion by a ball"
    import warnings

    from skimage.morphology import ball, binary_dilation, binary_erosion
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return binary_dilation(mask > 0, ball(e)) & ~binary_erosion(mask > 0, ball(e))


def literal_labels(plan, templates: Sequence, noise: Sequence[np.ndarray] = ()) -> np.ndarray:
    "Step 1 with the decisions of `plan` (an EnsemblePlan of the preset 'anatomix')"
    from scipy.ndimage import median_filter
    matrices = [matrix(s, a, h, f) for s, a, h, f in zip(plan.scale, plan.angle, plan.shear, plan.flip)]
    lbl = painted([templates[t] for t in plan.templates], matrices, plan.shift, plan.shape)
    lbl = median_filter(lbl, 3, mode="nearest")
    if plan.kind == "unconstrained": return lbl
    mask = foreground(noise, plan.centre, plan.radius, plan.shape)
    lbl = np.where(mask > 0, lbl + 1, 0).astype(np.uint8)
    if plan.envelope: lbl[shell(mask, plan.envelope)] = lbl.max() + 1
    return lbl


# ---------------------------------------------------------------- step 1: draws

def literal_draws(seed: int, n_templates: int, side: int = 128, min_templates: int = 20, max_templates: int = 40
                  ) -> dict:
    "The decisions of one ensemble, drawn one by one as the reference does, from a generator of its own"
    rng, r = np.random.RandomState(seed), side/128
    n = rng.randint(min_templates, max_templates)
    out = {"templates": [], "scale": [], "angle": [], "shift": [], "shear": [], "flip": []}
    for _ in range(n):
        out["templates"].append(rng.randint(0, n_templates))
        out["scale"].append(rng.uniform(0.5, 1.5, 3))
        out["angle"].append(np.rad2deg(rng.uniform(-np.pi, np.pi, 3)))
        out["shift"].append(rng.uniform(-5, 5, 3))
        out["shear"].append(rng.uniform(-0.5, 0.5, 3))
        out["flip"].append(rng.rand(3) < 0.5)
    out |= {"n": n, "kind": "unconstrained", "envelope": 0}
    if rng.rand() > 0.33333:
        out["kind"] = "foreground_masked"
        out["radius"] = rng.randint(round(48*r), round(72*r))
        out["centre"] = [side//2 + rng.randint(-round(32*r), round(32*r)) for _ in range(3)]
        out["amplitude"] = [rng.uniform(r, 5*r) for _ in range(3)]
        out["noise"] = [(a*rng.standard_normal((3, *[int(np.ceil(side/(s*r)))]*3))).astype(np.float32)
                        for a, s in zip(out["amplitude"], (8, 16, 32))]
        if rng.rand() < 0.5:
            out["kind"] = "foreground_masked_enveloped"
            out["envelope"] = int(rng.choice([2, 3, 4]))
    return out


def literal_ensemble(seed: int, templates: Sequence, side: int = 128, **limits) -> np.ndarray:
    "Step 1 from a seed to a label map, with the reference's own draws"
    from types import SimpleNamespace
    d = literal_draws(seed, len(templates), side, **limits)
    plan = SimpleNamespace(**{"centre": (), "radius": 0, **d}, shape=(side,)*3)
    return literal_labels(plan, templates, d.get("noise", ()))
