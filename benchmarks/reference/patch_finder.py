"The reference's patch finder as it was written: scan for the box of the label, then read and test every candidate"
from typing import Any

import numpy as np


def label_box(label: Any, block: int = 192) -> tuple[list[int], list[int]] | None:
    "First and last index with a value > 0 along each axis, from one pass over cubes of `block`; None if there is none"
    low, high = [np.inf]*3, [-1]*3
    for z in range(0, label.shape[0], block):
        for y in range(0, label.shape[1], block):
            for x in range(0, label.shape[2], block):
                found = np.argwhere(label[z:z + block, y:y + block, x:x + block] > 0)
                if not len(found): continue
                first, last = found.min(axis=0) + (z, y, x), found.max(axis=0) + (z, y, x)
                low, high = [min(a, int(b)) for a, b in zip(low, first)], [max(a, int(b)) for a, b in zip(high, last)]
    return None if high[0] < 0 else (low, high)


def literal_patches(label: Any, patch: tuple[int, ...], min_bbox: float, min_ratio: float, volume_idx: int = 0
                    ) -> list[dict]:
    "Accepted patches in candidate order; `label` is anything with a shape and slicing, such as a zarr array"
    box = label_box(label)
    if box is None: return []
    axes = [range(lo, hi - p + 2, max(1, p//2)) for lo, hi, p in zip(*box, patch)]
    volume, out = patch[0]*patch[1]*patch[2], []
    for z in axes[0]:
        for y in axes[1]:
            for x in axes[2]:
                data = label[z:z + patch[0], y:y + patch[1], x:x + patch[2]]
                found = np.argwhere(data > 0)
                if len(found) == 0: continue
                size = found.max(axis=0) - found.min(axis=0) + 1
                if np.prod(size)/volume >= min_bbox and len(found)/volume >= min_ratio:
                    out.append({"volume_idx": volume_idx, "start_pos": [z, y, x]})
    return out
