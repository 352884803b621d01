"From shapes to a store at 128^3: the reference's three steps with their files, and one command with one or two workers"
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks._synth_labels import realistic_tree
from benchmarks.common import Row, compare, interleaved, median, threads
from benchmarks.reference import synth as labels
from benchmarks.reference import synth_views as pictures
from medvol_nb.core import human_bytes
from medvol_nb.synth.generate import generate
from medvol_nb.synth.labels import KINDS, EnsembleConfig, draw_plan, mask_noise
from medvol_nb.synth.pairs import SynthConfig, make_pair
from medvol_nb.synth.stores import prepare_store, write_shard
from medvol_nb.synth.templates import TemplateBank, build_bank


def literal_steps(d: Path, plans: list, loads: list) -> None:
    "Steps 1 to 3: label maps as .nii.gz, views as .nii.gz, both read again, one contiguous HDF5 file"
    import h5py
    import nibabel as nib
    for sub in ("labels", "view1", "view2"): (d/sub).mkdir(parents=True, exist_ok=True)
    for k, p in enumerate(plans):
        lbl = labels.literal_labels(p, loads, mask_noise(p) if p.masked else ())
        nib.save(nib.Nifti1Image(lbl, np.eye(4)), d/"labels"/f"{k}.nii.gz")
    for k in range(len(plans)):
        both = pictures.view_pair(nib.load(d/"labels"/f"{k}.nii.gz").get_fdata(), k)
        for v, a in zip((1, 2), both): nib.save(nib.Nifti1Image(a, np.eye(4)), d/f"view{v}"/f"{k}.nii.gz")
    with h5py.File(d/"train_data.hdf5", "w") as f:
        for k in range(len(plans)):
            group = f.create_group(f"{k:06d}")
            views = [nib.load(d/f"view{v}"/f"{k}.nii.gz").get_fdata() for v in (1, 2)]
            group.create_dataset("img", data=np.stack(views).astype(np.uint8))
            group.create_dataset("seg", data=nib.load(d/"labels"/f"{k}.nii.gz").get_fdata().astype(np.uint8))


def written(folder: Path) -> int: return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def pipeline(full: bool = False) -> list[Row]:
    "Equal label plans of all kinds on both sides; bytes written are told"
    import nibabel as nib
    with realistic_tree() as (d, what), threads():
        labels.literal_prepare(d/"tree"/"s0001")
        build_bank(d/"tree", d/"bank", max_bad=1000)
        bank, config = TemplateBank.open(d/"bank"), SynthConfig()
        files = [d/"tree"/r["source"]/"segmentations"/Path(r["files"][0]).name for r in bank.table]
        loads = [partial(lambda f: nib.load(f).get_fdata(), f) for f in files]
        drawn = [draw_plan(0, i, config.ensemble, len(bank)) for i in range(100)]
        plans = [p for k in KINDS for p in [p for p in drawn if p.kind == k][:4 if full else 1]]
        n, rounds = len(plans), iter(range(1000))
        size: dict[str, int] = {}

        def ours(kind: str) -> None:
            out = d/f"{kind}{next(rounds)}"
            prepare_store(out, kind, n, config.ensemble.shape)
            write_shard(out, 0, (make_pair(0, p.index, bank, config) for p in plans))
            size[kind] = written(out)

        def reference() -> None:
            out = d/f"reference{next(rounds)}"
            literal_steps(out, plans, loads)
            size["reference"] = written(out)

        def floor() -> None: # the bytes of the samples, to the disk and no further
            with open(d/"floor", "wb") as f:
                for _ in range(n): f.write(noise)
                os.fsync(f.fileno())

        noise = bytes(3*128**3)
        make_pair(0, plans[-1].index, bank, config) # compiles
        t = interleaved({"zarr": partial(ours, "zarr"), "hdf5": partial(ours, "hdf5"), "reference": reference,
                         "floor": floor}, 3 if full else 1, warm_up=0)
        wall, cpu = ({k: median(v, which)/n for k, v in t.items()} for which in (0, 1))
        text = f"128^3, {n} samples of all kinds, {what} at 1.5 mm, from masks to a store"
        def note(kind: str) -> str:
            return (f"processor time of a sample; {human_bytes(size[kind]/n)} written, reference "
                    f"{human_bytes(size['reference']/n)}; wall {wall[kind]:.3g} and {wall['reference']:.3g} s; floor: "
                    "raw bytes to the disk")
        return [Row(f"synth.pipeline{name}", text, cpu[k], cpu["reference"], "s", cpu["reference"]/cpu[k], cpu["floor"],
                    cpu["floor"]/cpu[k], 12, note(k), cpu[k], cpu["reference"], 3 if full else 1)
                for k, name in (("zarr", ""), ("hdf5", "_hdf5"))]


def workers(full: bool = False) -> list[Row]:
    "The same store made by one process and by two that have started: their start and imports cost 4 s, once"
    n = 128
    with tempfile.TemporaryDirectory() as name, threads():
        d, rounds = Path(name), iter(range(1000))
        from medvol_nb.synth.templates import procedural_bank
        procedural_bank(48, seed=0, size=(20, 100)).save(d/"bank")

        def run(k: int) -> None:
            generate(d/f"out{next(rounds)}", n_ensembles=n, templatedir=d/"bank", workers=k)

        assert EnsembleConfig().shape == (128,)*3
        return [compare("synth.workers", f"128^3, {n} samples, two processes; reference: in this one", partial(run, 2),
                        partial(run, 0), unit="s", runs=3, warm_up=1, bar=1.8,
                        note=f"wall seconds, started before; load of the machine meanwhile {os.getloadavg()[0]:.1f}")]


ROWS = {"pipeline": pipeline, "workers": workers}
