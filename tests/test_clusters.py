"""Every command with --dask on a cluster of processes, one of which is killed while it works: the same bytes."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from medvol_nb import phantoms
from medvol_nb.analyze import analyze
from medvol_nb.checkpoints import save_checkpoint
from medvol_nb.cli import COMMANDS
from medvol_nb.core import ConfigError, rng_for, write_json
from medvol_nb.embed.evaluate import evaluate, list_to_world, world_to_list
from medvol_nb.embed.model import EmbedderConfig, ModelConfig, build_model, save_embedder
from medvol_nb.embed.prepare import prepare
from medvol_nb.embed.register import register
from medvol_nb.embed.store import embed, position_embedding, write_embedding
from medvol_nb.embryo import features as picture_features
from medvol_nb.embryo.commands import classify
from medvol_nb.embryo.commands import metrics as picture_metrics
from medvol_nb.embryo.generate import generate as draw_pictures
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.phantom import make_phantom_dataset
from medvol_nb.embryo.phases import PHASES
from medvol_nb.embryo.tiny import make_tiny_sd
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.recipes import make_datalists
from medvol_nb.signatures import function_doc
from medvol_nb.stores import write_zarr
from medvol_nb.sv_batch import batch_infer, infer
from medvol_nb.synth.contrast import Contrast, NetworkConfig, build_network, describe_network
from medvol_nb.synth.features import features
from medvol_nb.synth.generate import ensembles, generate, pack, views
from medvol_nb.synth.templates import procedural_bank, templates
from medvol_nb.verify import verify
from medvol_nb.volume import write_volume
from medvol_nb.zarrnet.patches import find_patches_command
from medvol_nb.zarrnet.predict import predict
from medvol_nb.zarrnet.train import train

CASES = 6
DRAWN = {"n_ensembles": 40, "min_templates": 3, "max_templates": 6, "side_length": 16, "templatedir": "bank"}


def scans(root):
    "Bodies with organs, the fourth label shifted; heads to register"
    for k in range(CASES):
        p = phantoms.abdomen(shape=(40, 32, 36), seed=k)
        where = affine_from(p.spacing)
        for folder in ("scans", "labels", "set/imagesTr", "set/labelsTr", "pairs"):
            (root / folder).mkdir(exist_ok=True, parents=True)
        write_volume(Volume(p.img, where), root / f"scans/case_{k}.nii.gz")
        write_volume(Volume(p.lbl, affine_from(p.spacing, (0, 0, 5 * (k == 3)))), root / f"labels/lbl_{k}.nii.gz")
        os.link(root / f"scans/case_{k}.nii.gz", root / f"set/imagesTr/case_{k}_0000.nii.gz")
        os.link(root / f"labels/lbl_{k}.nii.gz", root / f"set/labelsTr/case_{k}.nii.gz")
        head = phantoms.head((24, 27, 23), spacing=8.0).img
        for end, shift in (("0000", 0), ("0001", 4 * k)):
            write_volume(Volume(head, affine_from(8.0, (shift, 0, 0))), root / f"pairs/p{k}_{end}.nii.gz")
    names = {str(i): n for i, n in phantoms.abdomen().names.items()}
    items = [{"image": f"scans/case_{k}.nii.gz", "label": f"labels/lbl_{k}.nii.gz", "fold": k % 2}
             for k in range(CASES)]  # fmt: skip
    write_json(root / "list.json", {"name": "drawn", "labels": names, "training": items, "testing": []})


def embeddings(root):
    "Weights of a small network, and stores in which lesions can be found"
    model = ModelConfig(width=8, emb=16)
    (root / "stores").mkdir()
    save_embedder(root / "net.safetensors", build_model(model, 0), EmbedderConfig(model=model, name="t"))
    vol, (rows, rng) = Volume(np.zeros((50, 46, 20), np.uint8), affine_from((2.1, 2.1, 5.0))), ({}, rng_for(0, "l"))
    for k in range(CASES):
        write_embedding(position_embedding(vol, lambda p, k=k: p - [k, 0, 0], c=32), root / f"stores/{k}.zarr")
    native = position_embedding(vol).native
    for i, p in enumerate(rng.uniform([8, 8, 4], [40, 36, 16], (12, 3))):
        a, b = i % CASES, (i + 1) % CASES
        at = world_to_list(native, list_to_world(native, p[None]) + [b - a, 0, 0])[0]
        rows[str(i)] = {"source": f"{a}.nii", "target": f"{b}.nii", "source center": p.tolist(),
                        "target center": at.tolist(), "target box": [*(at - 3), 6, 6, 6],
                        "target spacing": [2.1, 2.1, 5.0], "target recist diameter": [10, 6]}  # fmt: skip
    write_json(root / "lesions.json", rows)


def pictures(root):
    "Drawn bodies: a bank, label maps with their two pictures, and a network for features"
    procedural_bank(8, seed=2, size=(6, 16)).save(root / "bank")
    ensembles(savedir=root / "maps", **DRAWN | {"templatedir": root / "bank"}, workers=0)
    views(ensembledir=root / "maps", savedir=root / "views", workers=0)
    tiny = NetworkConfig(width=8, levels=2)
    model, about = Contrast(build_network(tiny, 1)), {"model": describe_network(tiny, (16, 16, 16))}
    save_checkpoint(root / "features.safetensors", {"model": model.state_dict(), "config": about})


def rolls(root):
    "Two sheets in stores, and a network that was trained for two steps"
    for name, seed in (("a", 0), ("b", 1)):
        roll, affine = phantoms.sheets((16, 96, 96), seed), affine_from(1.0, axes="zyx")
        write_zarr(Volume(roll.img, affine, "zyx"), root / f"{name}.zarr", chunks=16)
        write_zarr(Volume(roll.mask, affine, "zyx"), root / f"{name}_sheet.zarr", chunks=16)
    settings = {
        "tr_params": {"model_name": "Sheet", "patch_size": [8, 16, 16], "tr_val_split": 1, "max_steps_per_epoch": 2,
                      "max_epoch": 1, "num_dataloader_workers": 0, "tensorboard_log_dir": None, "device": "cpu"},
        "inference_params": {"checkpoint_path": "checkpoints/Sheet", "input_path": "b.zarr", "chunks": [8, 16, 16]},
        "model_config": {"f_maps": [4, 8]},
        "dataset_config": {"volume_paths": [{"input": f"{n}.zarr", "sheet": f"{n}_sheet.zarr"} for n in "ab"],
                           "min_bbox_percent": 0, "min_labeled_ratio": 0.01,
                           "targets": {"sheet": {"channels": 1, "activation": "sigmoid"}}},
    }  # fmt: skip
    train(write_json(root / "task.json", settings), overrides=["dataset_config.use_cache=false"])


def embryos(root):
    "Frames of five videos, a classifier of four steps, two runs of pictures, and a tiny pipeline"
    from PIL import Image

    make_phantom_dataset(root / "frames", 5, 14, ["F+00"], 24)
    index = build_index(root / "frames", cache=False)
    write_json(root / "split.json", {"train": index.names[:2], "val": index.names[2:3], "test": index.names[3:]})
    classify("train", out=root / "judge", steps=4, batch_size=8, dataset=root / "frames", device="cpu", size=24,
             architecture="small", split_file=root / "split.json")  # fmt: skip
    counts = [np.bincount(index.phase[np.isin(index.video, v)] + 1, minlength=17)[1:] for v in ([0, 1], [3, 4])]
    for p in np.flatnonzero((counts[0] > 0) & (counts[1] > 0))[:2].tolist():
        (root / "runs" / PHASES[p]).mkdir(parents=True)
        write_json(root / "runs" / PHASES[p] / "metadata.json", {"phase": PHASES[p], "focal-plane": "F+00"})
        for k in range(4):
            Image.fromarray(phantoms.embryo_frame(p, 24, 900 + k)).save(root / "runs" / PHASES[p] / f"img{k}.png")
    make_tiny_sd(root / "tiny", channels=(32, 32))


MAKERS = {"scans": scans, "embeddings": embeddings, "pictures": pictures, "rolls": rolls, "embryos": embryos}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Folder of inputs; each kind is made when it is first asked for"
    root, made = tmp_path_factory.mktemp("data"), set()

    def ready(*kinds):
        for kind in set(kinds) - made:
            MAKERS[kind](root)
            made.add(kind)
        return root

    return ready


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed")
    kind = {"processes": True, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**kind) as c:
        yield c


@pytest.fixture(autouse=True)
def one_thread():
    "As workers have it: a convolution sums in another order on two threads"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killer(threading.Thread):
    "Kills a worker of a cluster as soon as it has work"

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.cluster, self.killed, self.over = cluster, False, False

    def run(self):
        while not (self.killed or self.over):
            for nanny in self.cluster.workers.values():
                state = self.cluster.scheduler.workers.get(nanny.worker_address)
                if state is not None and state.processing:
                    os.kill(nanny.pid, signal.SIGKILL)
                    self.killed = True
                    break
            time.sleep(0.0005)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.over = True
        self.join()


def content(folder):
    "Bytes of all files; the ledger and reports hold times"
    times = ("ledger.jsonl", "report.json", "metadata.json")
    files = [p for p in Path(folder).rglob("*") if p.is_file() and not p.name.endswith(times)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(files)}


def found_patches(out, dask):
    out.mkdir()
    overrides = [f"dataset_config.cache_file={out / 'patches.json'}", "dataset_config.grid_origin=label_bbox"]
    return find_patches_command("task.json", overrides=overrides, dask=dask)["split_hash"]


def listed(out, dask):
    out.mkdir()
    made = make_datalists("set", out / "list.json", recipe="nnunet", method="stratified", n_folds=2, dask=dask)
    return made["folds"], made["counts"]


SV = {"n_segments": 12, "features": "intensity"}
PAIRS = {"view1_dir": "views/view1", "view2_dir": "views/view2", "seg_dir": "maps", "val_count": 4}
JUDGED = {"orig_data_path": "frames", "synth_data_path": "runs", "model_weights_path": "judge", "batch_size": 1}
PHASE_SET = {"dataset": "frames", "split_file": "split.json", "model": ["judge"], "batch_size": 2, "device": "cpu"}
DREAMS = {"phase": ["t2", "t4", "tM"], "dataset_name": "d", "model_path": Path("tiny"), "num_images": 3, "steps": 2}

# Command -> inputs and a call with the output folder and the address; what it returns is compared, too
CALLS = {
    "datalists make": (["scans"], listed),
    "datalists verify": (["scans"], lambda out, dask: verify(["list.json"], level="full", dask=dask).findings),
    "datalists analyze": (["scans"], lambda out, dask: analyze(["list.json"], out, dask=dask) and None),
    "supervoxels infer": (["scans"], lambda out, dask: infer(
        [f"scans/case_{k}.nii.gz" for k in range(CASES)], output_dir=out, **SV, dask=dask)["done"]),
    "supervoxels batch-infer": (["scans"], lambda out, dask: batch_infer(
        "list.json", ".", output_dir=out, **SV, dask=dask)["done"]),
    "synth templates": (["scans"], lambda out, dask: templates(
        out, totalsegmentator_path=["labels"], dask=dask)["digest"]),
    "synth ensembles": (["pictures"], lambda out, dask: ensembles(savedir=out, **DRAWN, dask=dask) and None),
    "synth views": (["pictures"], lambda out, dask: views(ensembledir="maps", savedir=out, dask=dask) and None),
    "synth pack": (["pictures"], lambda out, dask: pack(**PAIRS, out_dir=out, store="zarr", dask=dask)["written"]),
    "synth generate": (["pictures"], lambda out, dask: generate(out, **DRAWN, dask=dask)["done"]),
    "synth features": (["scans", "pictures"], lambda out, dask: features(
        [f"scans/case_{k}.nii.gz" for k in range(CASES)], checkpoint="features.safetensors", output_dir=out,
        patch_size=16, overlap=0.0, device="cpu", dask=dask)["weights"]),
    "unet find-patches": (["rolls"], found_patches),
    "unet predict": (["rolls"], lambda out, dask: predict(
        "task.json", output_dir=out, num_parts=3, device="cpu", workers=0 if dask else 1, dask=dask)["patches"]),
    "embedding prepare": (["scans"], lambda out, dask: prepare("scans", out, spacing=4.0, dask=dask)["files"]),
    "embedding embed": (["scans", "embeddings"], lambda out, dask: embed(
        "scans", out, "net.safetensors", device="cpu", dask=dask)["scans"]),
    "embedding register": (["scans"], lambda out, dask: register(
        "pairs", out, deformable=False, spacing=8.0, max_angle=5, dask=dask)["pairs"]),
    "embedding evaluate": (["embeddings"], lambda out, dask: evaluate("lesions.json", out, "stores", dask=dask)["med"]),
    "embryo generate": (["embryos"], lambda out, dask: out.mkdir() or draw_pictures(
        **DREAMS, synthetic_dataset_parent=out, device="cpu", dask=dask)["model"]),
    "embryo metrics": (["embryos"], lambda out, dask: picture_metrics(
        **JUDGED, result_fold_path=out, device="cpu", dask=dask)["runs"]),
    "embryo classify": (["embryos"], lambda out, dask: classify(
        "predict", out=out, **PHASE_SET, dask=dask)["judge"]["frame by frame"]),
}  # fmt: skip


def test_every_command_with_the_option_is_here():
    has = [name for name, target in COMMANDS.items() if any(p.name == "dask" for p in function_doc(target).params)]
    assert sorted(has) == sorted(CALLS)


@pytest.mark.slow
@pytest.mark.parametrize("command", CALLS)
def test_a_killed_worker_changes_no_byte(command, data, cluster, tmp_path, monkeypatch):
    "Inputs are relative to the folder of the caller, who went there after the workers had started"
    kinds, call = CALLS[command]
    monkeypatch.chdir(data(*kinds))
    monkeypatch.setattr(picture_features, "_BATCHES", 4)  # several tasks from few pictures
    here = call(tmp_path / "here", None)
    with Killer(cluster) as killer:
        there = call(tmp_path / "there", cluster.scheduler_address)
    assert killer.killed, "nobody had work"
    assert here == there
    wrote = content(tmp_path / "here") if (tmp_path / "here").exists() else {}
    assert wrote == (content(tmp_path / "there") if wrote else {}) and (wrote or here)


def test_two_processes_in_a_few_seconds(data, cluster, monkeypatch):
    monkeypatch.chdir(data("scans"))
    found = verify(["list.json"], level="header", dask=cluster.scheduler_address).findings
    assert found == verify(["list.json"], level="header").findings and found


def test_one_file_has_one_writer(tmp_path):
    with pytest.raises(ConfigError, match="Use --store zarr"):
        pack(**PAIRS, out_dir=tmp_path, dask="tcp://nowhere:1")
