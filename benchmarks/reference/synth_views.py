"""Paired views as anatomix makes them (step 2 of its generator), step by step, through MONAI's dictionary transforms.

Axes are (x, y, z). What is random comes from the global generator of torch, and from one that each MONAI transform
keeps for itself: `transforms(seed)` sets these.
"""
import numpy as np
import torch

SCALES = (4, 8, 16, 32) # of the texture [voxel]


def gmm(means: torch.Tensor, sds: torch.Tensor, labels: np.ndarray, p_zero: float = 0.25) -> torch.Tensor:
    "1: a mask, a normal draw and an assignment for each label; clip at 0, min-max"
    img = torch.zeros(labels.shape)
    for i, k in enumerate(np.unique(labels)):
        if i == 0 and torch.rand(1) < p_zero: continue
        where = labels == k
        img[where] = sds[i]*torch.randn(where.sum()) + means[i]
    img = torch.clip(img, min=0)
    return (img - img.min())/(img.max() - img.min())


def texture(shape: tuple[int, ...], scales: tuple[int, ...] = SCALES, largest: float = 5.0) -> torch.Tensor:
    "2: normal numbers on coarse grids, interpolated and added; fails unless the sides are multiples of the scales"
    out = torch.zeros(shape)
    for scale in scales:
        grid = tuple(np.ceil(np.array(shape)/scale).astype(np.uint8))
        knots = largest*torch.rand(1)*torch.randn(grid)
        out += torch.nn.functional.interpolate(knots[None, None], scale_factor=scale, mode="trilinear")[0, 0]
    return out


def transforms(seed: int | None = None):
    "3 to 12: MONAI's transforms, one of each kind for either view"
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandBiasFieldd,
        RandGaussianSharpend,
        RandGaussianSmoothd,
        RandGibbsNoised,
        RandKSpaceSpikeNoised,
        RandSimulateLowResolutiond,
        ScaleIntensityd,
        ThresholdIntensityd,
    )
    views, width = ("view1", "view2"), (0.0, 0.333)
    random = ((RandBiasFieldd, {"prob": 0.98, "coeff_range": (0.0, 0.075)}),
              (RandKSpaceSpikeNoised, {"prob": 0.2}),
              (RandAdjustContrastd, {"prob": 0.5, "gamma": (0.5, 2.0)}),
              (RandGaussianSmoothd, {"prob": 0.5, "sigma_x": width, "sigma_y": width, "sigma_z": width}),
              (RandGibbsNoised, {"prob": 0.5, "alpha": (0.0, 0.333)}),
              (RandGaussianSharpend, {"prob": 0.25}),
              (RandSimulateLowResolutiond, {"prob": 0.333, "downsample_mode": "nearest-exact"}))
    steps = [ScaleIntensityd(keys=views)]
    steps += [kind(keys=[v], **settings) for kind, settings in random for v in views]
    steps += [ThresholdIntensityd(keys=views, above=True, threshold=0.0), ScaleIntensityd(keys=views)]
    out = Compose(steps)
    if seed is not None: out.set_random_state(seed)
    return out


def view_pair(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    "Both views of a label map, uint8"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        labels = np.asarray(labels, np.float64) # as nibabel's get_fdata gives them
        n = len(np.unique(labels))
        means, sds = ([low + (high - low)*torch.rand(n) for _ in range(2)] for low, high in ((25, 255), (5, 20)))
        images = [gmm(m, s, labels) for m, s in zip(means, sds)]
        images = [img*(1 + 0.02*texture(labels.shape)) for img in images]
        out = transforms(seed)({"view1": images[0][None], "view2": images[1][None], "label": labels})
    return tuple(np.asarray(out[v][0]*255.0).astype(np.uint8) for v in ("view1", "view2"))
