"Step 0 and step 1 of synthetic data: cutting out templates, and composing label ensembles of 128^3"
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import DATA, Row, compare, interleaved, median, threads
from benchmarks.reference import synth as reference
from medvol_nb.core import rng_for
from medvol_nb.geometry import Volume
from medvol_nb.synth.labels import KINDS, EnsembleConfig, draw_plan, mask_noise, render_labels
from medvol_nb.synth.templates import TemplateBank, build_bank, procedural_bank
from medvol_nb.volume import read_volume, write_volume

ORGANS = DATA/"synthetic_labels"/"totalseg_layout"/"s0001"


@contextlib.contextmanager
def realistic_tree() -> Iterator[tuple[Path, str]]:
    "One subject of 61 masks at 1.5 mm, 244 x 202 x 224 voxels: real organs of 3 mm, doubled; or shapes by formula"
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)/"tree"/"s0001"/"segmentations"
        folder.mkdir(parents=True)
        if ORGANS.is_dir():
            for path in sorted((ORGANS/"segmentations").glob("*.nii.gz")):
                vol = read_volume(path)
                data = np.asarray(vol.data).repeat(2, 0).repeat(2, 1).repeat(2, 2)
                write_volume(Volume(data, vol.affine @ np.diag([0.5, 0.5, 0.5, 1])), folder/path.name)
            yield Path(d), "61 real organs"
        else:
            bank = procedural_bank(61, seed=0, size=(20, 160))
            for i in range(61):
                field = np.zeros((244, 202, 224), np.uint8)
                nx, ny, nz = bank.shapes[i]
                field[10:10 + nx, 10:10 + ny, 10:10 + nz] = bank[i]
                write_volume(Volume(field, np.diag([1.5, 1.5, 1.5, 1])), folder/f"shape_{i:02d}.nii.gz")
            yield Path(d), "61 shapes by formula"


def bank(full: bool = False) -> list[Row]:
    "Preparation of one subject; the reference works in place, so each of its runs gets a copy"
    with realistic_tree() as (d, what), threads():
        copies = iter(range(100))

        def prepare() -> None:
            copy = d/f"copy{next(copies)}"
            shutil.copytree(d/"tree", copy)
            reference.literal_prepare(copy/"s0001")
            shutil.rmtree(copy)

        return [compare("synth.bank", f"{what}, 244 x 202 x 224", lambda: build_bank(d/"tree", d/"bank",
                        on_exists="overwrite"), prepare, unit="s", runs=3 if full else 1, warm_up=0, cpu=True,
                        note="processor time; the reference's copy of the tree (0.02 s) counts")]


def ensemble(full: bool = False) -> list[Row]:
    "Step 1, plan to label map, equal plans of all kinds; the reference loads its masks from compressed files each time"
    import nibabel as nib
    with realistic_tree() as (d, what), threads():
        reference.literal_prepare(d/"tree"/"s0001")
        build_bank(d/"tree", d/"bank")
        organs, config = TemplateBank.open(d/"bank"), EnsembleConfig()
        files = [d/"tree"/r["source"]/"segmentations"/Path(r["files"][0]).name for r in organs.table]
        loads = [partial(lambda f: nib.load(f).get_fdata(), f) for f in files]
        drawn = [draw_plan(0, i, config, len(organs)) for i in range(100)]
        plans = [p for k in KINDS for p in [p for p in drawn if p.kind == k][:4 if full else 2]]

        places = rng_for(0, "floor").integers(0, organs.bits.size, config.shape)
        bits, out = np.array(organs.bits), np.empty(config.shape, np.uint8)
        found: dict[str, list] = {k: [] for k in ("numba", "torch", "reference")}

        def literal() -> None:
            found["reference"] += [reference.literal_labels(p, loads, mask_noise(p) if p.masked else ()) for p in plans]

        def ours(backend: str) -> None: found[backend] += [render_labels(p, organs, backend=backend) for p in plans]

        def floor() -> None: # one look at a template a voxel, one write of the result of each stage
            for p in plans:
                np.take(bits, places, out=out)
                for _ in range(6 if p.envelope else 5 if p.masked else 2): np.copyto(out, places, casting="unsafe")

        render_labels(plans[-1], organs) # compiles
        t = interleaved({"numba": partial(ours, "numba"), "torch": partial(ours, "torch"), "reference": literal,
                         "floor": floor}, 3 if full else 1, warm_up=0)
        for k in ("numba", "torch"):
            assert all(np.array_equal(a, b) for a, b in zip(found[k], found["reference"])), f"{k}: voxels differ"
        n, shapes = len(plans), np.mean([p.n_shapes for p in plans])
        text = f"128^3, {n} plans of all kinds, {shapes:.0f} shapes each, {what} at 1.5 mm"
        note = "processor time of one ensemble, 0 voxels differ; floor: a look-up a voxel, a write a stage"
        wall, cpu = ({k: median(v, which)/n for k, v in t.items()} for which in (0, 1))
        return [Row(f"synth.ensemble{name}", text, cpu[k], cpu["reference"], "s", cpu["reference"]/cpu[k], cpu["floor"],
                    cpu["floor"]/cpu[k], bar, f"{note}; wall {wall[k]:.3g} and {wall['reference']:.3g} s", cpu[k],
                    cpu["reference"], 3 if full else 1) for k, name, bar in (("numba", "", 15), ("torch", "_torch", 2))]


ROWS = {"bank": bank, "ensemble": ensemble}
