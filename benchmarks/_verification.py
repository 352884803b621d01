"Verification of data lists: headers of ten thousand pairs, every voxel of real ones, one process against two"

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import isal_zlib
from nibabel.affines import apply_affine

from benchmarks.common import DATA, Row, interleaved, median, threads
from medvol_nb.checks import check_pairs
from medvol_nb.volume import Volume, affine_from, write_volume


def many(folder: Path, n: int) -> list[tuple[str, str]]:
    "`n` sound pairs of small files: verification at the header level never looks at the voxels"
    img = Volume(np.zeros((64, 64, 32), np.int16) + np.arange(32, dtype=np.int16), affine_from((1, 1, 2.0)))
    write_volume(img, folder / "i.nii.gz")
    write_volume(replace(img, data=(img.data > 20).astype(np.uint8)), folder / "l.nii.gz")
    a, b = (folder / "i.nii.gz").read_bytes(), (folder / "l.nii.gz").read_bytes()
    pairs = [(str(folder / f"img{k:05d}.nii.gz"), str(folder / f"lbl{k:05d}.nii.gz")) for k in range(n)]
    for image, label in pairs:
        Path(image).write_bytes(a)
        Path(label).write_bytes(b)
    return pairs


def by_nibabel(pairs: list[tuple[str, str]]) -> int:
    "What careful users write: load both headers, compare shape and the corners of both grids, look at the types"
    bad = 0
    for pair in pairs:
        a, b = (nib.load(p) for p in pair)
        ends = np.array(list(itertools.product(*((0, n - 1) for n in a.shape))))
        gap = (
            np.abs(apply_affine(a.affine, ends) - apply_affine(b.affine, ends)).max() if a.shape == b.shape else np.inf
        )
        bad += gap > 0.1 * min(a.header.get_zooms()) or b.get_data_dtype().kind == "f"
        bad += nib.aff2axcodes(a.affine) != nib.aff2axcodes(b.affine)
    return bad


def header_verify(full: bool = False) -> list[Row]:
    n = 10_000
    with tempfile.TemporaryDirectory() as d, threads():
        pairs = many(Path(d), n)
        some = pairs[:500]
        t = interleaved(
            {
                "ours1": lambda: check_pairs(pairs),
                "ours2": lambda: check_pairs(pairs, workers=2),
                "reference": lambda: by_nibabel(some),
            },
            5,
        )
        slow, one, two = median(t["reference"]) * n / len(some), median(t["ours1"]), median(t["ours2"])
        check_pairs(pairs, cache=Path(d) / "cache")
        again = median(interleaved({"again": lambda: check_pairs(pairs, cache=Path(d) / "cache")}, 5)["again"])
    note = f"nibabel timed on {len(some)} pairs; second run from the cache {again:.2f} s"
    what = f"{n} pairs, header level; reference: nibabel in one process; ours in"
    return [
        Row("datalists.header_verify", f"{what} two", two, slow, "s", slow / two, bar=25, note=note),
        Row("datalists.header_verify_serial", f"{what} one", one, slow, "s", slow / one),
    ]


def workers(full: bool = False) -> list[Row]:
    with tempfile.TemporaryDirectory() as d, threads():
        pairs = many(Path(d), 10_000)
        t = interleaved({"one": lambda: check_pairs(pairs, workers=1), "two": lambda: check_pairs(pairs, workers=2)}, 7)
    one, two = median(t["one"]), median(t["two"])
    what = "10000 pairs, header level: two processes against one, pool warm"
    return [Row("datalists.workers", what, two, one, "s", one / two, floor=one / 2, share=one / 2 / two, bar=1.7)]


def real_pairs() -> list[tuple[str, str]]:
    root = DATA / "datalists_supervoxels"
    out = [(p, Path(str(p).replace("images", "labels"))) for p in sorted(root.glob("openkbp/images*/*.nii.gz"))]
    out += [
        (p, p.with_name(p.name.replace("_ct.", "_seg.").replace("_mr.", "_mr_seg.")))
        for p in sorted(root.glob("totalseg/*_[cm][tr].nii.gz"))
    ]
    return [(str(a), str(b)) for a, b in out]


def full_verify(full: bool = False) -> list[Row]:
    pairs = real_pairs()
    if not pairs:
        raise SystemExit("datalists.full_verify needs the volumes below MEDVOL_DATA")

    def bare() -> None:
        for path in (p for pair in pairs for p in pair):
            isal_zlib.decompressobj(wbits=31).decompress(Path(path).read_bytes())

    calls = {
        "bare": bare,
        "one": lambda: check_pairs(pairs, "full"),
        "two": lambda: check_pairs(pairs, "full", workers=2),
    }
    with threads():
        t = interleaved(calls, 9)
    floor, one, two = (median(t[k]) for k in ("bare", "one", "two"))
    what = f"{len(pairs)} real pairs read once for findings and statistics; reference: one isal decompression of all;"
    note, ms = "the bar is 1.3 times the decompression", 1e3
    return [
        Row(
            "datalists.full_verify",
            f"{what} two processes",
            two * ms,
            floor * ms,
            "ms",
            floor / two,
            floor * ms / 2,
            floor / 2 / two,
            1 / 1.3,
            note,
        ),
        Row(
            "datalists.full_verify_serial",
            f"{what} one process",
            one * ms,
            floor * ms,
            "ms",
            floor / one,
            floor * ms,
            floor / one,
        ),
    ]
