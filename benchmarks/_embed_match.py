"Matching points between two CT of 512 x 512 x 300 with embeddings in memory, and embeddings on disk"

import functools
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import DATA, Row, clock, interleaved, median, threads
from benchmarks.reference import embed_match as reference
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.core import rng_for
from medvol_nb.embed.coarse import norm_map
from medvol_nb.embed.data import NetGrid, net_grid
from medvol_nb.embed.match import Matcher
from medvol_nb.embed.model import ModelConfig, build_model
from medvol_nb.embed.store import STRIDES, Embedding, embed_volume, open_embedding, write_embedding
from medvol_nb.geometry import Volume, affine_from

SHAPE, SPACING = (512, 512, 300), (0.8, 0.8, 1.0)


def smooth(shape: tuple, seed: int, blur: int, common: torch.Tensor | None = None) -> torch.Tensor:
    "Unit vectors (c, z, y, x) that resemble those of a network: smooth, and alike where `common` is"
    small = [max(2, -(-n // blur)) for n in shape]
    x = torch.randn((1, 128, *small), generator=torch_rng_for(seed, "maps"))
    x = F.interpolate(x, size=shape, mode="trilinear")[0]
    x = x + 0.35 * torch.randn(x.shape, generator=torch_rng_for(seed, "detail"))
    return F.normalize(x if common is None else 0.4 * F.normalize(x, dim=0) + common, dim=0)


@functools.lru_cache(1)
def pair(full: bool) -> tuple[Embedding, Embedding]:
    "Two embeddings whose right answer is the same voxel"
    shape = SHAPE if full else (256, 256, 150)
    vol = Volume(np.broadcast_to(np.uint8(0), shape), affine_from(SPACING if full else (1.6, 1.6, 2.0)))
    grid, out, first = net_grid(vol), [], {}
    native = NetGrid(shape[::-1], affine_from(vol.spacing[::-1], axes="zyx"))
    for seed in (0, 1):
        sizes = {h: grid.feature(STRIDES[h]).shape for h in ("fine", "coarse")}
        maps = {h: smooth(s, seed, 4 if h == "fine" else 2, first.get(h)) for h, s in sizes.items()}
        first = first or maps
        arrays = {h: m.numpy() for h, m in maps.items()}
        norm = norm_map(maps["coarse"], sizes["fine"], (None,) * 3).numpy()
        out.append(Embedding(arrays, grid, native, "benchmark", norm=norm, stretch=True))
    return out[0], out[1]


def nodes(emb: Embedding, n: int) -> np.ndarray:
    return rng_for(0, "points").integers(4, np.array(emb.fine.shape) - 4, (n, 3))


def literal(a: Embedding, b: Embedding, at: np.ndarray) -> list[tuple]:
    maps = [{h: torch.from_numpy(m) for h, m in e.maps.items()} for e in (a, b)]
    return [reference.transfer(*maps, tuple(int(v) for v in p), b.native.shape) for p in at]


def same_voxels(b: Embedding, m, wanted: list[tuple]) -> str:
    found = np.rint(b.native.to_index(m.matched)).astype(int)
    equal = sum(tuple(f) == w for f, (w, _) in zip(found.tolist(), wanted))
    gap = max(abs(s - w) for s, (_, w) in zip(m.score, wanted))
    return f"{equal} of {len(wanted)} the same voxel, scores differ by {gap:.1g}"


def row(
    name: str, what: str, ours: float, theirs: float, bar: float | None, note: str, unit: str = "ms", **more
) -> Row:
    return Row(name, what, ours, theirs, unit, theirs / ours, bar=bar, note=note, runs=1, **more)


def with_body(emb: Embedding, store: Path) -> Embedding:
    "As a user has it: opened from disk, of 8 bits, with the mask of an elliptic body"
    _, y, x = (np.linspace(-1, 1, n)[(slice(None), *(None,) * (2 - k))] for k, n in enumerate(emb.fine.shape))
    body = np.broadcast_to((y / 0.8) ** 2 + (x / 0.95) ** 2 <= 1, emb.fine.shape)
    write_embedding(replace(emb, body=body), store)
    return open_embedding(store)


def matching(full: bool = False) -> list[Row]:
    "One point, and 200 at once, against the literal way; processor time"
    full = True  # the row is defined at 512 x 512 x 300
    a, b = pair(full)
    what, few = "512x512x300, 128 channels, 75x103x103 fine", 3
    with threads():
        at = nodes(a, 200)
        pts = a.fine.to_world(at)
        start = time.perf_counter()
        matcher = Matcher(a, b)
        ready = time.perf_counter() - start
        options = {"refine": "native", "between": False}
        matcher.match(pts[:1], "nn", **options)
        single, batch, pruned, theirs, wanted = [], [], [], [], []
        for i in range(few):
            single.append(clock(lambda i=i: matcher.match(pts[i : i + 1], "nn", **options)))
            pruned.append(clock(lambda i=i: matcher.match(pts[i : i + 1], "nn")))
            batch.append(clock(lambda: matcher.match(pts, "nn", **options)))
            theirs.append(clock(lambda i=i: wanted.extend(literal(a, b, at[i : i + 1]))))
        cpu = {k: 1e3 * median(v, 1) for k, v in (("1", single), ("p", pruned), ("n", batch), ("ref", theirs))}
        note = same_voxels(b, matcher.match(pts[:few], "nn", **options), wanted)
        with tempfile.TemporaryDirectory() as place:
            packed = [with_body(e, Path(place) / f"{k}.zarr") for k, e in enumerate((a, b))]
            share = float(np.mean(packed[1].body))
            stored = Matcher(*packed)
            eight_bits = median([clock(lambda: stored.match(pts, "nn", **options)) for _ in range(few)], 1)
        plane = torch.randn(824, 167)
        left = torch.randn(256, 167)
        gemm = median([clock(lambda: [left @ plane.T for _ in range(50)]) for _ in range(5)], 1) / 50 * 1e3
        floor = gemm * 75 * 13 / 256  # [ms] a point: the matrix products alone
    mine = cpu["n"] / len(pts)
    return [
        row(
            "embedding.match_single",
            f"{what}; one point",
            cpu["1"],
            cpu["ref"],
            40,
            f"{note}; between voxels {cpu['p']:.0f} ms; a pair is made ready in {ready:.1f} s",
        ),
        row(
            "embedding.match_batched",
            f"{what}; 200 points, each",
            mine,
            cpu["ref"],
            300,
            note,
            floor=floor,
            share=floor / mine,
        ),
        row(
            "embedding.match_stored",
            f"{what}; from int8 stores with body masks ({share:.0%} of the voxels), 200 points, each; reference: limit",
            1e3 * eight_bits / len(pts),
            20.0,
            1.0,
            "processor time",
        ),
    ]


def stores(full: bool = False) -> list[Row]:
    """Size of a case on disk against the published pickle, both with fine and coarse maps; time to open one slab.

    Vectors of a network with random weights, which pack as those of the networks of E1 do (after training 4.5 bits a
    number on this scan, before 4.5), and invented ones with noise of their own at each voxel, which pack worse.
    """
    scan = DATA / "anatomical_embedding/lung_two_timepoints/followup_warped_to_baseline_ct.nii.gz"
    cases = {"store_noise": ("invented vectors with noise", pair(full)[0], None)}
    if scan.exists():
        net = build_model(ModelConfig(width=16, norm="gn"), seed=0).eval()
        real = embed_volume(net, scan, device="cpu")
        cases = {"store_size": ("network with random weights, lung CT", real, 3.5), **cases}
    out, place = [], Path(tempfile.mkdtemp())
    try:
        for name, (what, emb, bar) in cases.items():
            store = place / f"{name}.zarr"
            write_embedding(emb, store)
            size = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
            tensors, image = {h: torch.from_numpy(m) for h, m in emb.maps.items()}, np.zeros(emb.grid.shape, np.float32)
            theirs = reference.pickled(tensors, image)
            three = reference.pickled({**tensors, "semantic": tensors["fine"]}, image)
            opened = median(
                interleaved({"slab": lambda s=store: open_embedding(s).vectors("fine", slice(8, 16))}, 3)["slab"]
            )
            note = f"slab in {opened:.2f} s; pickle with a third head {three / 2**20:.0f} MiB, {three / size:.1f}x"
            what = f"{what}: fine int8 and coarse, {'x'.join(map(str, emb.fine.shape))}"
            out.append(row(f"embedding.{name}", what, size / 2**20, theirs / 2**20, bar, note, unit="MiB"))
    finally:
        shutil.rmtree(place)
    return out


ROWS = {"match": matching, "store": stores}
