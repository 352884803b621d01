"What the core pages do, written down without any trick"
import numpy as np


def trilinear(data: np.ndarray, matrix: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    "Eight neighbours and their weights for every output voxel; the nearest border voxel counts outside the centres"
    ijk = np.indices(shape).reshape(3, -1)
    at = np.clip(matrix[:3, :3] @ ijk + matrix[:3, 3:], 0, np.array(data.shape)[:, None] - 1)
    low = np.minimum(np.floor(at).astype(int), np.maximum(np.array(data.shape)[:, None] - 2, 0))
    part, out = at - low, np.zeros(ijk.shape[1])
    for corner in np.ndindex(2, 2, 2):
        near = np.minimum(low + np.array(corner)[:, None], np.array(data.shape)[:, None] - 1)
        weight = np.prod([part[k] if corner[k] else 1 - part[k] for k in range(3)], axis=0)
        out += weight*data[near[0], near[1], near[2]]
    return out.reshape(shape).astype(np.float32)


def each(f, items) -> list:
    "A map"
    return [f(item) for item in items]
