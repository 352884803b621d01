"""Blending of the reference system, as literally as its description: sums on disk (R1), and stored patches (R3).

R1: two float32 arrays a target on disk, read, added to and written back for every patch; then divided, scaled, clipped,
truncated. R3: every patch is stored as float16; a second pass blends block by block with a Gaussian, a third applies
the activation and writes integers. Both under zarr 3 in format version 2, as measured in the functional description.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np


def positions(size: int, patch: int, overlap: float) -> list[int]:
    step = round(patch*(1 - overlap))
    starts = list(range(0, size - patch + 1, step))
    return starts if starts[-1] == size - patch else [*starts, size - patch]


def starts_of(shape, patch, overlap) -> list[tuple[int, int, int]]:
    z, y, x = (positions(n, p, overlap) for n, p in zip(shape, patch))
    return [(a, b, c) for a in z for b in y for c in x]


def _create(group, name: str, shape, chunks, dtype, level: int, shuffle: int):
    from numcodecs import Blosc
    return group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, fill_value=0,
                              compressors=(Blosc("zstd", clevel=level, shuffle=shuffle),))


def blend_r1(predict: Callable, shape, patch, overlap: float, targets: dict[str, int], path: Path, chunk: int = 128):
    "`predict(start)` gives {target: (c, *patch)}; read-modify-write of sums and counts"
    import zarr
    group = zarr.create_group(str(path), zarr_format=2)
    sums, counts = {}, {}
    for t, c in targets.items():
        sums[t] = _create(group, f"{t}_sum", (c, *shape), (c, chunk, chunk, chunk), "f4", 5, 2)
        counts[t] = _create(group, f"{t}_count", shape, (chunk,)*3, "f4", 5, 2)
    for start in starts_of(shape, patch, overlap):
        where = tuple(slice(a, a + p) for a, p in zip(start, patch))
        for t, pred in predict(start).items():
            sums[t][(slice(None), *where)] = sums[t][(slice(None), *where)] + pred
            counts[t][where] = counts[t][where] + 1
    for t, c in targets.items():
        normals = c == 3
        out = _create(group, f"{t}_final", (c, *shape), (c, chunk, chunk, chunk), "u2" if normals else "u1", 5, 2)
        for z in range(0, shape[0], chunk):
            for y in range(0, shape[1], chunk):
                for x in range(0, shape[2], chunk):
                    where = slice(z, z + chunk), slice(y, y + chunk), slice(x, x + chunk)
                    mean = sums[t][(slice(None), *where)]/np.maximum(counts[t][where], 1)
                    value = (mean + 1)/2*65535 if normals else mean*255
                    out[(slice(None), *where)] = np.clip(value, 0, 65535 if normals else 255).astype(out.dtype)
    return group


def gaussian(patch) -> np.ndarray:
    "An impulse at p//2, smoothed with sigma p/8"
    bells = [np.exp(-0.5*((np.arange(p) - p//2)/(p/8))**2) for p in patch]
    w = np.multiply.outer(np.multiply.outer(bells[0], bells[1]), bells[2])
    return (w/w.max()).astype(np.float32)


def blend_r3(predict: Callable, shape, patch, overlap: float, targets: dict[str, int], path: Path, chunk: int = 128):
    "`predict(start)` gives {target: (c, *patch)} logits; patch store, blending, activation"
    import zarr
    group, c = zarr.create_group(str(path), zarr_format=2), sum(targets.values())
    starts = starts_of(shape, patch, overlap)
    stored = _create(group, "logits_part_0", (len(starts), c, *patch), (1, c, *patch), "f2", 3, 1)
    for k, start in enumerate(starts): stored[k] = np.concatenate(list(predict(start).values())).astype(np.float16)
    weight, blended = gaussian(patch), _create(group, "logits", (c, *shape), (c, chunk, chunk, chunk), "f2", 1, 1)
    blocks = [(z, y, x) for z in range(0, shape[0], chunk) for y in range(0, shape[1], chunk)
              for x in range(0, shape[2], chunk)]
    for block in blocks:
        ends = [min(b + chunk, n) for b, n in zip(block, shape)]
        size = [e - b for b, e in zip(block, ends)]
        total, weights = np.zeros((c, *size), np.float32), np.zeros(size, np.float32)
        for k, start in enumerate(starts):
            low = [max(b, s) for b, s in zip(block, start)]
            high = [min(e, s + p) for e, s, p in zip(ends, start, patch)]
            if any(a >= b for a, b in zip(low, high)): continue
            inside = tuple(slice(a - b, e - b) for a, e, b in zip(low, high, block))
            part = tuple(slice(a - s, e - s) for a, e, s in zip(low, high, start))
            total[(slice(None), *inside)] += stored[k][(slice(None), *part)].astype(np.float32)*weight[part]
            weights[inside] += weight[part]
        where = tuple(slice(b, e) for b, e in zip(block, ends))
        blended[(slice(None), *where)] = (total/(weights + 1e-8)).astype(np.float16)
    finals = {t: _create(group, f"{t}_final", (n, *shape), (n, chunk, chunk, chunk), "u1", 1, 1)
              for t, n in targets.items()}
    for block in blocks:
        where = tuple(slice(b, b + chunk) for b in block)
        logits, at = blended[(slice(None), *where)].astype(np.float32), 0
        for t, n in targets.items():
            value = 1/(1 + np.exp(-logits[at:at + n])) if n == 1 else (np.clip(logits[at:at + n], -1, 1) + 1)/2
            finals[t][(slice(None), *where)] = (value*255).astype(np.uint8)
            at += n
    return group
