"Files, resampling, viewers, parallel maps and imports: what all pages stand on"
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.common import Row, compare, copy_bandwidth, interleaved, median, number, threads
from benchmarks.reference.core import each, trilinear
from medvol_nb import phantoms
from medvol_nb.geometry import Volume, resample
from medvol_nb.nifti import fastzlib, read_nifti, write_nifti
from medvol_nb.parallel import pmap

MB = 1e6


def scan(full: bool) -> tuple[np.ndarray, np.ndarray]:
    "A CT with noise and its label map in the memory order of files; 42 MB, or 168 MB"
    body = phantoms.abdomen((256, 256, 160))
    img, lbl = (np.concatenate([a, a[::-1]] if not full else [a, a[::-1]]*4, axis=2) for a in (body.img, body.lbl))
    return np.asfortranarray(img.astype(np.int16)), np.asfortranarray(lbl)


def inflate(raw: bytes) -> None:
    "The bare decompressor: every byte is produced and its checksum tested, nothing is kept"
    stream, step = fastzlib.decompressobj(wbits=31), 1 << 17
    for k in range(0, len(raw), step):
        rest = raw[k:k + step]
        while rest and not stream.eof:
            stream.decompress(rest, 1 << 18)
            rest = stream.unconsumed_tail


def deflate(raw: bytes) -> int:
    "The bare compressor at our level"
    stream, step = fastzlib.compressobj(1, wbits=31), 1 << 22
    return sum(len(stream.compress(raw[k:k + step])) for k in range(0, len(raw), step)) + len(stream.flush())


def _read(name: str, data: np.ndarray, folder: Path, bar: float | None) -> Row:
    path = folder/"theirs.nii.gz"
    nib.save(nib.Nifti1Image(data, np.diag([1.5, 1.5, 1.5, 1])), path)
    raw = path.read_bytes()
    def reference(): return np.asarray(nib.load(path).dataobj)
    assert np.array_equal(read_nifti(path).data, reference())
    return compare(name, f"read {data.nbytes/MB:.0f} MB of {data.dtype} from {len(raw)/MB:.1f} MB written by nibabel",
                   lambda: read_nifti(path), reference, lambda: inflate(raw), runs=9, bar=bar,
                   others={"nibabel get_fdata()": lambda: nib.load(path).get_fdata()})


def gzip_read(full: bool = False) -> list[Row]:
    img, lbl = scan(full)
    with tempfile.TemporaryDirectory() as d, threads():
        return [_read("core.gzip_read", img, Path(d), 3), _read("core.gzip_read_labels", lbl, Path(d), 3)]


def gzip_write(full: bool = False) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as d, threads():
        for name, data in zip(("core.gzip_write", "core.gzip_write_labels"), scan(full)):
            one, two = Path(d)/"ours.nii.gz", Path(d)/"theirs.nii.gz"
            vol, raw = Volume(data, np.diag([1.5, 1.5, 1.5, 1])), data.tobytes("F")
            img = nib.Nifti1Image(data, vol.affine)
            write_nifti(vol, one, "overwrite")
            nib.save(img, two)
            assert np.array_equal(np.asarray(nib.load(one).dataobj), data)
            sizes = [f"{who} {p.stat().st_size/MB:.2f} MB" for who, p in (("ours", one), ("nibabel", two))]
            note = f"sizes: {', '.join(sizes)}; ours includes fsync"
            rows.append(compare(name, f"write {data.nbytes/MB:.0f} MB of {data.dtype}, default levels",
                                lambda vol=vol, one=one: write_nifti(vol, one, "overwrite"),
                                lambda img=img, two=two: nib.save(img, two), lambda raw=raw: deflate(raw),
                                runs=5, bar=3, note=note))
    return rows


def _monai(data: np.ndarray, spacing: float):
    "MONAI's Spacing as its documentation shows it for images"
    try:
        import torch
        from monai.data import MetaTensor
        from monai.transforms import Spacing
    except ImportError: return {}
    img = MetaTensor(torch.from_numpy(data)[None], affine=np.eye(4))
    move = Spacing((spacing,)*3, mode="bilinear", padding_mode="border")
    return {"MONAI Spacing bilinear": lambda: move(img)}


def resampling(full: bool = False) -> list[Row]:
    from scipy import ndimage
    n = 384 if full else 256
    data = np.random.default_rng(0).random((n, n, n), np.float32)
    vol, rows = Volume(data, np.eye(4)), []
    small = Volume(data[:20, :21, :22], np.eye(4))
    for s in (.8, 1.5):
        out = resample(small, s, antialias=False)
        assert np.allclose(out.data, trilinear(small.data, out.affine, out.shape), atol=1e-6)
    with threads():
        speed = copy_bandwidth()
        for name, s in (("core.resample", .8), ("core.resample_shrink", 1.5)):
            out = resample(vol, s, antialias=False)
            matrix, shape = np.diag(out.affine)[:3], out.shape
            offset = out.affine[:3, 3]
            def reference(matrix=matrix, offset=offset, shape=shape):
                return ndimage.affine_transform(data, matrix, offset, shape, order=1, mode="nearest")
            assert np.allclose(out.data, reference(), atol=1e-5)
            others = {"scipy zoom": lambda shape=shape: ndimage.zoom(data, np.array(shape)/n, order=1, mode="nearest",
                                                                      grid_mode=True)} | _monai(data, s)
            if s > 1: others["ours with antialias"] = lambda s=s: resample(vol, s)
            rows.append(compare(name, f"{n}^3 float32 linear to {s} mm, {shape[0]}^3; reference scipy affine_transform",
                                lambda s=s: resample(vol, s, antialias=False), reference,
                                (data.nbytes + out.data.nbytes)/speed, runs=3, others=others,
                                note=f"floor: bytes in and out at {speed/1e9:.1f} GB/s"))
    return rows


def viewing(full: bool = False) -> list[Row]:
    "A slider of the viewer is moved: three planes are read, coloured and packed, two of them as they were"
    from numcodecs import Zstd

    from medvol_nb.stores import write_zarr
    from medvol_nb.viewer import viewer
    size, limit, zstd = (512, 512, 300), 0.05, Zstd()
    body = phantoms.abdomen(size)
    affine = np.diag([.7, .7, 1, 1])
    ct, lbl = Volume(body.img.astype(np.int16), affine), Volume(body.lbl, affine)
    def row(name, what, times, floor=None):
        took = median(times)
        return Row(f"core.view_{name}", f"{what}, {' x '.join(map(str, size))} int16; reference: the limit", took*1e3,
                   limit*1e3, "ms", limit/took, floor and floor*1e3, floor and floor/took, 1,
                   f"slowest {number(max(t[0] for t in times)*1e3)} ms", median(times, 1)*1e3, runs=len(times))
    def moved(look, name, steps):
        return interleaved({k: lambda k=k: look.set(name, k) for k in steps}, runs=1, warm_up=0)
    rows = []
    with tempfile.TemporaryDirectory() as d, threads():
        for v, file in ((ct, "ct.zarr"), (lbl, "lbl.zarr")): write_zarr(v, Path(d)/file)
        for kind, image, over in (("array", ct, lbl), ("zarr", Path(d)/"ct.zarr", Path(d)/"lbl.zarr")):
            look, times = viewer(image, {"organs": over}, limits=(-160, 300)), []
            for name in look.image.names:
                first = look.image.count(name)//2
                look.set(name, first) # decoded now
                times += itertools.chain(*moved(look, name, range(first + 1, first + 12)).values())
            rows.append(row(kind, f"next slice of the viewer, with labels, {kind}", times))
        for name in ("axial", "coronal", "sagittal"):
            look = viewer(Path(d)/"ct.zarr", limits=(-160, 300))
            steps = [k for k in range(32, look.image.count(name), 64) if k//64 != look.image.count(name)//2//64]
            times = list(itertools.chain(*moved(look, name, steps).values()))
            across = look.image.screen(name).across
            packed = [f.read_bytes()[:-4] for f in (Path(d)/"ct.zarr"/"image"/"c").glob("*/*/*") # without checksum
                      if f.relative_to(d).parts[3 + across] == str(steps[0]//64)]
            floor = interleaved({"decode": lambda packed=packed: [zstd.decode(p) for p in packed]}, 5)["decode"]
            rows.append(row(f"zarr_first_{name}", f"first {name} slice of a row of {len(packed)} chunks of 64^3, zstd",
                            times, median(floor)))
    return rows


def double(x): return 2*x


def parallel(full: bool = False) -> list[Row]:
    from joblib import Parallel, delayed
    n = 100_000 if full else 10_000
    items = list(range(n))
    def generator():
        return list(Parallel(n_jobs=2, return_as="generator", max_nbytes=None)(delayed(double)(i) for i in items))
    assert pmap(double, items) == generator() == pmap(double, items, workers=2)
    return [compare("core.pmap", f"{n} trivial items in this process; reference: a list comprehension",
                    lambda: pmap(double, items), lambda: each(double, items), unit="us/item", items=n, runs=9,
                    note="overhead an item"),
            compare("core.pmap_workers", f"{n} trivial items, 2 processes; reference: joblib.Parallel, generator",
                    lambda: pmap(double, items, workers=2), generator, unit="us/item", items=n, runs=5)]


def imports(full: bool = False) -> list[Row]:
    def run(code): return lambda: subprocess.run([sys.executable, "-c", code], check=True)
    empty = median(interleaved({"python": run("pass")}, 7)["python"], 1)
    rows = [compare(name, f"{code}, processor time with the interpreter's {empty*1e3:.0f} ms; reference: {other}",
                    run(code), run(other), empty, runs=7, cpu=True)
            for name, code, other in (("core.import", "import medvol_nb", "import numpy"),
                                      ("core.import_volume", "import medvol_nb.volume", "import nibabel"))]
    run("import sys, medvol_nb; assert not {'torch', 'nibabel', 'zarr'} & set(sys.modules)")()
    return rows


ROWS = {"gzip_read": gzip_read, "gzip_write": gzip_write, "resample": resampling, "view": viewing,
        "pmap": parallel, "import": imports}
