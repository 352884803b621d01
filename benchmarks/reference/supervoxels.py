"""Supervoxels from slice features as VISTA3D makes them (scripts/slic_process_sam.py), step by step, without any trick.

Axes are (x, y, z) in file order: no reorientation, no resampling, no use of the voxel size.
"""
from collections.abc import Callable

import numpy as np

MEAN, SD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SLICES = 8 # taken at a time


def window(vol: np.ndarray) -> np.ndarray:
    "1: HU -1000...1000 become 0...255"
    return np.clip((vol.astype(np.float32) + 1000)/2000, 0, 1)*255


def encode_slices(images: np.ndarray, encode: Callable, side: int = 1024) -> np.ndarray:
    "2.1 to 2.5: images (n, h, w) to features (n, c, h, w); `encode` maps tensors (n, 3, side, side) to (n, c, ?, ?)"
    import torch
    import torch.nn.functional as F
    h, w = images.shape[1:]
    square = max(h, w)
    padded = F.pad(torch.from_numpy(np.ascontiguousarray(images, np.float32)), (0, square - w, 0, square - h))
    grey = F.interpolate(padded[:, None], (side, side), mode="bilinear", align_corners=False)
    colour = (grey.repeat(1, 3, 1, 1) - torch.tensor(MEAN).view(1, 3, 1, 1))/torch.tensor(SD).view(1, 3, 1, 1)
    with torch.no_grad(): features = encode(colour).float()
    features = F.interpolate(features, (square, square), mode="bilinear", align_corners=False)
    return features[:, :, :h, :w].numpy()


def view_features(img: np.ndarray, axis: int, slice_features: Callable) -> np.ndarray:
    "Features (c, x, y, z) of the slices along one axis; `slice_features` maps (n, h, w) to (n, c, h, w)"
    slices = np.moveaxis(img, axis, 0)
    parts = [np.asarray(slice_features(slices[k:k + SLICES])) for k in range(0, len(slices), SLICES)]
    features = np.concatenate(parts) # (n, c, h, w)
    return np.moveaxis(np.moveaxis(features, 0, -1), -1, axis + 1)


def sum_of_views(img: np.ndarray, slice_features: Callable) -> np.ndarray:
    "2 and 3: features (c, x, y, z), slices along z, y and x summed as they are"
    total = view_features(img, 2, slice_features).astype(np.float32)
    total += view_features(img, 1, slice_features)
    total += view_features(img, 0, slice_features)
    return total


def clusters(features: np.ndarray, n_segments: int = 400) -> np.ndarray:
    "4 and 5: labels 1...K, where K is not what was asked for"
    from skimage.segmentation import slic
    return slic(features, channel_axis=0, compactness=0.01, n_segments=n_segments, sigma=3)


def air(vol: np.ndarray) -> np.ndarray:
    "6: the largest component of what is below -800 HU, corners connect, closed by 3 x 3 x 3"
    from scipy.ndimage import binary_dilation, binary_erosion, label
    box = np.ones((3, 3, 3), bool)
    parts, n = label(vol < -800, box)
    if n == 0: return np.zeros(vol.shape, bool)
    largest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return binary_erosion(binary_dilation(largest, box), box, border_value=1) # outside: not air, then air


def supervoxels(vol: np.ndarray, slice_features: Callable, n_segments: int = 400) -> np.ndarray:
    "All steps: volume (x, y, z) in HU to labels (x, y, z) int16, 0 in the air, ids not renumbered"
    labels = clusters(sum_of_views(window(vol), slice_features), n_segments)
    labels[air(vol)] = 0
    return labels.astype(np.int16)
