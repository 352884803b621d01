"""Literal re-statements of how the published code matches points and stores embeddings"""

import io
import pickle

import numpy as np
import torch
import torch.nn.functional as F


def transfer(query: dict[str, torch.Tensor], key: dict[str, torch.Tensor], node: tuple[int, int, int], native: tuple):
    """One point: interpolate all coarse channels of both volumes, normalise, average, scale up, take the maximum.

    Maps are (c, z, y, x); `node` is the fine voxel of the point; the answer is the voxel (z, y, x) of the native grid
    and the value there.
    """
    shapes = query["fine"].shape[1:], key["fine"].shape[1:]
    coarse = [
        F.normalize(F.interpolate(m["coarse"][None], size=s, mode="trilinear", align_corners=False)[0], dim=0)
        for m, s in zip((query, key), shapes)
    ]
    place = (slice(None), *node)
    fine = torch.einsum("c,czyx->zyx", query["fine"][place], key["fine"])
    rough = torch.einsum("c,czyx->zyx", coarse[0][place], coarse[1])
    similar = (fine + rough) / 2
    large = F.interpolate(similar[None, None], size=native, mode="trilinear", align_corners=False)[0, 0]
    best = large.max()  # two scans of the table, as published
    flat = int(large.argmax())
    return tuple(int(v) for v in np.unravel_index(flat, native)), float(best)


def pickled(maps: dict[str, torch.Tensor], image: np.ndarray) -> int:
    "Bytes of the published form: a pickle of half-precision maps and the network's image"
    out = io.BytesIO()
    pickle.dump([*(m.half().numpy() for m in maps.values()), image.astype(np.float32), "case"], out, protocol=4)
    return len(out.getvalue())
