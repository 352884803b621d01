"""Two views the way the published loader makes them (alibaba-damo-academy/self-supervised-anatomical-embedding-v2,
Apache-2.0): three coordinate volumes and a mask of valid voxels go through every spatial transform with the image.

Restated with NumPy and SciPy; the original needs mmcv and torchio. The crop is cut at native spacing, as published,
from all five volumes, each is resampled to the view's spacing and centre-cropped.
"""
import numpy as np
from scipy import ndimage


def subject(img: np.ndarray, spacing: tuple) -> dict[str, np.ndarray]:
    "Image, the coordinates of every voxel in mm, and the mask of valid voxels"
    grids = np.meshgrid(*(np.arange(n, dtype=np.float64)*s for n, s in zip(img.shape, spacing)), indexing="ij")
    valid = np.ones(img.shape, np.float64)
    valid[tuple(n//2 for n in img.shape)] = 0
    return {"image": np.clip(img, -1024, 3071).astype(np.float32), **dict(zip(("z", "y", "x"), grids)), "valid": valid}


def view(sub: dict[str, np.ndarray], spacing: tuple, scale: float, corner: np.ndarray, patch: tuple) -> dict:
    "Crop, resample and centre-crop every volume of a copy of the subject"
    sub = {k: v.copy() for k, v in sub.items()}
    ratio = 2/np.array(spacing)
    crop = np.ceil(1.05*np.ceil(np.array(patch)*scale))
    low = np.floor(corner*ratio).astype(int)
    high = np.minimum(np.ceil((corner + crop)*ratio).astype(int), sub["image"].shape)
    out = {}
    for name, a in sub.items():
        a = a[tuple(slice(i, j) for i, j in zip(low, high))]
        zoom = np.array(spacing)/(2*scale)
        a = ndimage.zoom(a, zoom, order=1 if name != "valid" else 0)
        start = [max(0, (n - p)//2) for n, p in zip(a.shape, patch)]
        out[name] = a[tuple(slice(s, s + p) for s, p in zip(start, patch))]
    out["image"] = (out["image"] + 1024)*(255/4095) - 50
    return out


def pair(img: np.ndarray, spacing: tuple, seed: int, patch: tuple = (32, 96, 96)) -> list[dict]:
    "Both views of a scan around a seed voxel, rule `sample`"
    rng, sub = np.random.default_rng(seed), subject(img, spacing)
    size = np.floor(np.array(img.shape)*np.array(spacing)/2).astype(int)
    point = [int(rng.integers(m, n - m)) for m, n in zip((4, 10, 10), size)]
    out = []
    for s in rng.uniform(0.8, 1.2, 2):
        crop = np.ceil(1.05*np.ceil(np.array(patch)*s)).astype(int)
        corner = np.array([rng.integers(max(p - c, 1), max(min(n - 1 - c, p), max(p - c, 1) + 1))
                           for p, c, n in zip(point, crop, size)])
        out.append(view(sub, spacing, s, corner, patch))
    return out
