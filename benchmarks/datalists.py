"Data lists: relabelling, and reading long lists"
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks._verification import full_verify, header_verify, workers
from benchmarks.common import Row, compare, copy_bandwidth, threads
from benchmarks.reference.datalists import relabel_pairs
from medvol_nb.datalists import DataList, read_datalist, write_datalist
from medvol_nb.labels import LabelSpace, relabel


def relabelling(full: bool = False) -> list[Row]:
    "One look-up table against the reference's transform, which goes through the volume once a pair"
    import torch
    from monai.transforms import MapLabelValue
    n = 320 if full else 160
    space = LabelSpace.shipped()
    pairs, lut = space.mapping("TotalSegmentatorV2"), space.lut("TotalSegmentatorV2")
    blocks = np.random.default_rng(0).integers(0, 118, (n//8, n//8, n//8)).astype(np.int16)
    lbl = np.ascontiguousarray(blocks.repeat(8, 0).repeat(8, 1).repeat(8, 2)) # regions, as in a label map
    tensor = torch.from_numpy(lbl)
    monai = MapLabelValue(orig_labels=list(pairs), target_labels=list(pairs.values()), dtype=np.int16)
    expected = relabel_pairs(lbl, pairs)
    for out in (relabel(lbl, lut), relabel(tensor, lut).numpy(), monai(lbl), monai(tensor)):
        assert np.array_equal(np.asarray(out), expected)
    with threads():
        floor = 2*lbl.nbytes/copy_bandwidth()
        what = f"{len(pairs)} pairs on {n}^3 int16; reference: MONAI MapLabelValue"
        return [compare("datalists.relabel", f"{what} of an array", lambda: relabel(lbl, lut), lambda: monai(lbl),
                        floor, runs=5, bar=20, others={"loop over pairs": lambda: relabel_pairs(lbl, pairs)},
                        note="floor: bytes in and out at the speed of a copy"),
                compare("datalists.relabel_tensor", f"{what} of a tensor", lambda: relabel(tensor, lut),
                        lambda: monai(tensor), floor, runs=3, bar=20)]


def reading(full: bool = False) -> list[Row]:
    "A long list, checked field by field; the reference parses the JSON and checks nothing"
    n = 100_000 if full else 20_000
    dl = DataList("X", tuple({"image": f"imagesTr/case_{k:06}_0000.nii.gz", "label": f"labelsTr/case_{k:06}.nii.gz",
                              "fold": k % 5, "pseudo_label": f"imagesTr/case_{k:06}_0000.nii.gz",
                              "label_sv": f"/sv/X_100/case_{k:06}/case_{k:06}_seg.nii.gz"} for k in range(n)))
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/"X_5_folds.json"
        write_datalist(dl, path)
        def reference() -> dict: return json.loads(path.read_text(encoding="utf-8"))
        assert list(read_datalist(path).training) == reference()["training"]
        return [compare("datalists.read", f"read and check {n} items of five fields; reference: json.loads alone",
                        lambda: read_datalist(path), reference, unit="us/item", items=n, runs=7)]


ROWS = {"relabel": relabelling, "read": reading, "header_verify": header_verify, "workers": workers,
        "full_verify": full_verify}
