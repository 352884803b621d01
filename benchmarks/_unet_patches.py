"Finding patches in sparse labels, and loading them from all kinds of stores"
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import Row, compare, interleaved, median, threads
from benchmarks.reference.patch_finder import literal_patches
from medvol_nb.core import rng_for
from medvol_nb.parallel import pmap
from medvol_nb.zarrnet.config import ZarrConfig
from medvol_nb.zarrnet.finder import find_patches
from medvol_nb.zarrnet.io import ChunkedVolume, open_volume
from medvol_nb.zarrnet.patches import PatchList, _key, _write_cache, grouped_order, open_entries, patch_list

PATCH, BBOX, RATIO, CHUNK = (64, 192, 192), 0.95, 0.07, 128


def sheet_labels(path: Path, n: int) -> float:
    "Spiral sheets inside an ellipsoid, written as n^3 uint8 in chunks of 128^3; returns the labelled fraction"
    import zarr
    array = zarr.create_array(str(path), shape=(n,)*3, dtype="u1", chunks=(CHUNK,)*3, zarr_format=2)
    y, x = (np.arange(n, dtype=np.float32) - n/2 for _ in range(2))
    turn = np.arctan2(y[:, None], x)/np.float32(2*np.pi)
    radius, total = np.hypot(y[:, None], x), 0
    for z in range(0, n, CHUNK):
        slab = np.zeros((CHUNK, n, n), np.uint8)
        for k in range(0, CHUNK, 16):
            inside = ((y[:, None]/0.36)**2 + (x/0.31)**2 + ((z + k - n/2)/0.45)**2) < n*n
            wave = 4*np.sin((z + k)/60)
            slab[k:k + 16] = (np.mod(radius - 32*turn + wave, 32) < 4) & inside
        array[z:z + CHUNK] = slab
        total += int(slab.sum())
    return total/n**3


class Counted:
    "An array that counts the stored chunks which its reads touch; reads nothing if `dry`"
    def __init__(self, array, stored):
        self.array, self.shape, self.stored, self.reads, self.dry = array, array.shape, set(stored), 0, False

    def __getitem__(self, index):
        spans = [range(s.start//CHUNK, -(-min(s.stop, n)//CHUNK)) for s, n in zip(index, self.shape)]
        self.reads += sum(k in self.stored for k in itertools.product(*spans))
        return np.zeros((1, 1, 1), np.uint8) if self.dry else self.array[index]


class ReadsCounted:
    "Counts the chunk files that zarr reads inside the block"
    def __enter__(self):
        from zarr.storage import LocalStore
        self.store, self.get, self.n = LocalStore, LocalStore.get, 0

        async def get(store, key, *args, **kwargs):
            data = await self.get(store, key, *args, **kwargs)
            self.n += data is not None and key.rsplit("/", 1)[-1].replace(".", "").isdigit()
            return data
        LocalStore.get = get
        return self

    def __exit__(self, *exc): self.store.get = self.get


def ours(path: Path, reader: str = "auto"):
    return find_patches(open_volume(path, reader=reader), PATCH, min_bbox_percent=BBOX, min_labeled_ratio=RATIO,
                        grid_origin="label_bbox")


def patch_finder(full: bool = False) -> list[Row]:
    "The whole search; the reference reads and tests every candidate. Both in one process"
    import zarr
    n = 1024 if full else 640
    with tempfile.TemporaryDirectory() as d, threads():
        path = Path(d)/"labels.zarr"
        labelled = sheet_labels(path, n)
        array = zarr.open_array(str(path), mode="r")
        expected = [p["start_pos"] for p in literal_patches(array, PATCH, BBOX, RATIO)]
        for reader in ("auto", "zarr"): assert ours(path, reader).starts.tolist() == expected
        zarr_alone = {"by zarr-python": lambda: ours(path, "zarr")}
        what = f"{n}^3 uint8, {labelled:.1%} labelled, patch 64 x 192 x 192, {len(expected)} found"
        def reference() -> list: return literal_patches(array, PATCH, BBOX, RATIO)
        return [compare("unet.patch_finder", what, lambda: ours(path), reference, unit="s", runs=1 if full else 3,
                        warm_up=0, bar=12, cpu=True, others=zarr_alone, note="processor time")]


def patch_reads(full: bool = False) -> list[Row]:
    "Chunks decoded at 1024^3; counted, not timed, and the candidates of the reference are counted without reading"
    import zarr

    from benchmarks.reference import patch_finder as module
    n = 1024
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/"labels.zarr"
        sheet_labels(path, n)
        stored = open_volume(path).stored_chunks()
        counted = Counted(zarr.open_array(str(path), mode="r"), stored)
        box = module.label_box(counted)
        counted.dry = True
        module_box, module.label_box = module.label_box, lambda label: box
        try: module.literal_patches(counted, PATCH, BBOX, RATIO)
        finally: module.label_box = module_box
        with ReadsCounted() as reads: found = ours(path, "zarr")
        assert reads.n == len(stored)
        return [Row("unet.patch_reads", f"{n}^3, {len(stored)} of {(n//CHUNK)**3} chunks stored, {len(found)} patches",
                    reads.n, counted.reads, "chunk reads", counted.reads/reads.n, len(stored),
                    len(stored)/reads.n, 25, "exact counts")]


def cached_start(full: bool = False) -> list[Row]:
    "From settings to a list of 100,000 patches that were found before; the limit is 0.2 s"
    import zarr
    n = 100_000
    with tempfile.TemporaryDirectory() as d, threads():
        for name in ("a", "a_sheet"):
            zarr.create_array(f"{d}/{name}.zarr", shape=(4096,)*3, dtype="u1", chunks=(128,)*3)[:256, :256, :256] = 1
        cfg = ZarrConfig.model_validate({
            "tr_params": {"patch_size": [64, 64, 64]}, "model_config": {"f_maps": [8, 16]},
            "dataset_config": {"cache_file": f"{d}/patches.json", "targets": {"sheet": {"channels": 1}},
                               "volume_paths": [{"input": f"{d}/a.zarr", "sheet": f"{d}/a_sheet.zarr"}]}})
        rng = rng_for(0, "starts")
        patches = PatchList((64,)*3, ("a",), np.zeros(n, np.int64), rng.integers(0, 4000, (n, 3)),
                            rng.integers(10**5, 2*10**5, n), rng.uniform(0.96, 1, n), _key(cfg, open_entries(cfg)))
        _write_cache(Path(d)/"patches.json", patches)
        assert patch_list(cfg).digest() == patches.digest()
        seconds = median(interleaved({"ours": lambda: patch_list(cfg)}, 5)["ours"])
    return [Row("unet.cached_start", f"{n} patches; reference: the limit", seconds, 0.2, "s", 0.2/seconds, bar=1)]


def stores() -> dict[str, dict]:
    "The stores of the table: arguments of `zarr.create_array`"
    from numcodecs import Blosc, GZip
    from zarr.codecs import BloscCodec, ZstdCodec
    shuffled = BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=1)
    v2, v3 = {"zarr_format": 2, "chunks": (128,)*3}, {"zarr_format": 3, "chunks": (128,)*3}
    bits = Blosc("zstd", 3, Blosc.BITSHUFFLE)
    return {"v2_none": {**v2, "compressors": None}, "v2_lz4": {**v2, "compressors": Blosc("lz4")},
            "v2_bits": {**v2, "compressors": bits}, "v2_gzip": {**v2, "compressors": GZip(5)},
            "v2_bits_64": {**v2, "compressors": bits, "chunks": (64,)*3}, "v3_none": {**v3, "compressors": None},
            "v3_zstd": {**v3, "compressors": ZstdCodec(level=3)}, "v3_bits": {**v3, "compressors": shuffled},
            "shard_64": {**v3, "compressors": shuffled, "chunks": (64,)*3, "shards": (128,)*3},
            "shard_32": {**v3, "compressors": shuffled, "chunks": (32,)*3, "shards": (128,)*3}}


BARS = {"v2_none": 1.6, "shard_32": 3.0} # with tensorstore; all others: not slower than plain zarr-python
QUICK = ("v2_none", "v3_zstd", "v2_bits", "shard_32")


def noise(full: bool) -> np.ndarray:
    "Noise in a cylinder, black outside: compresses like a CT scan, 1.35 by zstd and 1.15 by bitshuffle and zstd"
    n, shape = (768, (384, 768, 768)) if full else (384, (256, 384, 384))
    y, x = np.mgrid[:n, :n] - (n - 1)/2
    tissue = np.hypot(y, x) < 0.52*n
    values = rng_for(0, "noise").standard_normal(shape, np.float32)*25 + 120
    return np.where(tissue, np.clip(values, 0, 255), 0).astype(np.uint8)


def drawn(shape: tuple, n: int) -> np.ndarray:
    return (rng_for(0, "draws").random((n, 3))*(np.array(shape) - PATCH + 1)).astype(int)


def take(v: ChunkedVolume, starts: np.ndarray) -> int: return sum(int(v.read(s, PATCH)[0][0, 0, 0]) for s in starts)


def bare(array, starts: np.ndarray) -> int:
    return sum(int(array[tuple(slice(a, a + p) for a, p in zip(s, PATCH))][0, 0, 0]) for s in starts)


def loader(full: bool = False) -> list[Row]:
    "Random patches, warm page cache; the reference is plain zarr-python on an open array. Processor time"
    import zarr
    data, rows, known = noise(full), [], stores()
    n = 20 if full else 8
    starts = drawn(data.shape, n)
    with tempfile.TemporaryDirectory() as d, threads():
        for name in known if full else QUICK:
            path = f"{d}/{name}"
            array = zarr.create_array(path, shape=data.shape, dtype=data.dtype, **known[name])
            array[...] = data
            array, ours, plain = zarr.open_array(path, mode="r"), open_volume(path), open_volume(path, reader="zarr")
            warm = open_volume(path, cache_bytes=2*data.nbytes)
            others: dict[str, Callable] = {"reader='zarr'": lambda v=plain: take(v, starts),
                                           "whole volume cached": lambda v=warm: take(v, starts)}
            assert take(ours, starts) == bare(array, starts) == take(plain, starts)
            rows.append(compare(f"unet.loader_{name}", f"64 x 192 x 192 of {' x '.join(map(str, data.shape))} uint8",
                                lambda v=ours: take(v, starts), lambda a=array: bare(a, starts), unit="ms/sample",
                                cpu=True, items=n, runs=5, bar=BARS.get(name, 0.95), others=others))
    return rows


def grouped(full: bool = False) -> list[Row]:
    "Neighbours together and a cache of a quarter of the volume, against a random order without a cache"
    import zarr
    data = noise(True)
    starts = np.array(list(itertools.product(*(range(0, n - p + 1, p//2) for n, p in zip(data.shape, PATCH)))))
    some = rng_for(0, "some").permutation(len(starts))[:270]
    nothing = np.zeros(len(starts), np.int64)
    patches = PatchList(PATCH, ("a",), nothing, starts, nothing, nothing)
    near = starts[grouped_order(patches, some, (128, 256, 256), rng_for(0, "order"))]
    with tempfile.TemporaryDirectory() as d, threads():
        zarr.create_array(d, shape=data.shape, dtype=data.dtype, overwrite=True, **stores()["v2_bits"])[...] = data
        random = open_volume(d)
        def ours() -> int: return take(open_volume(d, cache_bytes=data.nbytes//4), near)
        assert ours() == take(random, starts[some])
        what = f"half of the candidates ({len(some)}), bitshuffle-zstd 128^3, cache of a quarter of the volume"
        return [compare("unet.loader_grouped", what, ours, lambda: take(random, starts[some]), unit="ms/sample",
                        items=len(some), runs=3, warm_up=0, bar=1.5, cpu=True)]


def workers(full: bool = False) -> list[Row]:
    "Two processes against one; wall time on two idle cores, so with large sizes only"
    if not full: return []
    import zarr
    data = noise(full)
    parts = np.array_split(drawn(data.shape, 96), 8)
    with tempfile.TemporaryDirectory() as d:
        zarr.create_array(d, shape=data.shape, dtype=data.dtype, overwrite=True, **stores()["v3_zstd"])[...] = data
        job = partial(take, open_volume(d))
        return [compare("unet.loader_workers", "96 patches by 2 processes; reference: 1 process",
                        lambda: pmap(job, parts, 2), lambda: pmap(job, parts, 1), unit="ms/sample", items=96, runs=3,
                        bar=1.7)]


ROWS = {"patch_finder": patch_finder, "patch_reads": patch_reads, "cached_start": cached_start, "loader": loader,
        "loader_grouped": grouped, "loader_workers": workers}
