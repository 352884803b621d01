"""Commands of data lists and embeddings on a Dask cluster of separate processes, one of which is killed meanwhile."""

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
from medvol_nb.core import read_json, write_json
from medvol_nb.embed.model import EmbedderConfig, ModelConfig, build_model, save_embedder
from medvol_nb.embed.register import register
from medvol_nb.embed.store import embed
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.verify import verify
from medvol_nb.volume import write_volume

pytestmark = pytest.mark.slow
CASES = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for k in range(CASES):
        p = phantoms.abdomen(shape=(40, 32, 36), seed=k)
        where = affine_from(p.spacing)
        write_volume(Volume(p.img, where), root / f"case_{k}.nii.gz")
        write_volume(Volume(p.lbl, affine_from(p.spacing, (0, 0, 5 * (k == 3)))), root / f"lbl_{k}.nii.gz")
        head = phantoms.head((24, 27, 23), spacing=8.0).img
        for end, shift in (("0000", 0), ("0001", 4 * k)):
            (root / "pairs").mkdir(exist_ok=True)
            write_volume(Volume(head, affine_from(8.0, (shift, 0, 0))), root / f"pairs/p{k}_{end}.nii.gz")
    items = [{"image": f"case_{k}.nii.gz", "label": f"lbl_{k}.nii.gz", "fold": k % 2} for k in range(CASES)]
    labels = {str(i): n for i, n in phantoms.abdomen().names.items()}
    write_json(root / "list.json", {"name": "drawn", "labels": labels, "training": items, "testing": []})
    (root / "scans").mkdir()
    for k in range(CASES):
        os.link(root / f"case_{k}.nii.gz", root / f"scans/case_{k}.nii.gz")
    model = ModelConfig(width=8, emb=16)
    save_embedder(root / "net.safetensors", build_model(model, 0), EmbedderConfig(model=model, name="t"))
    return root


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed")
    kind = {"processes": True, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**kind) as c:
        yield c


@pytest.fixture
def one_thread():
    "As workers have it: a convolution sums in another order on two threads"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def killed_soon(cluster):
    "A worker dies as soon as it has work"
    pid = next(iter(cluster.workers.values())).pid
    thread = threading.Thread(target=lambda: (time.sleep(1.0), os.kill(pid, signal.SIGKILL)))
    thread.start()
    return thread


def content(folder):
    "Bytes of all files; the ledger holds times and orders, reports hold times"
    files = [p for p in Path(folder).rglob("*") if p.is_file() and not p.name.endswith(("ledger.jsonl", "report.json"))]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(files)}


def test_lists_are_verified_and_analysed(data, cluster, tmp_path):
    here = verify([data / "list.json"], level="full")
    thread = killed_soon(cluster)
    there = verify([data / "list.json"], level="full", dask=cluster.scheduler_address)
    thread.join()
    assert here.findings == there.findings and any("3" in f["path"] for f in here.findings)
    for name, dask in (("here", None), ("there", cluster.scheduler_address)):
        analyze([data / "list.json"], tmp_path / name, dask=dask)
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_scans_are_embedded(data, cluster, tmp_path, one_thread):
    embed(data / "scans", tmp_path / "here", data / "net.safetensors", device="cpu")
    thread = killed_soon(cluster)
    address = cluster.scheduler_address
    told = embed(data / "scans", tmp_path / "there", data / "net.safetensors", device="cpu", dask=address)
    thread.join()
    assert told["scans"] == CASES and content(tmp_path / "here") == content(tmp_path / "there")


def test_pairs_are_registered(data, cluster, tmp_path):
    how = {"deformable": False, "spacing": 8.0, "max_angle": 5}
    register(data / "pairs", tmp_path / "here", **how)
    thread = killed_soon(cluster)
    told = register(data / "pairs", tmp_path / "there", dask=cluster.scheduler_address, **how)
    thread.join()
    assert told["pairs"] == CASES and content(tmp_path / "here") == content(tmp_path / "there")
    for k in range(CASES):
        a, b = (read_json(tmp_path / n / f"p{k}_report.json")["matrix"] for n in ("here", "there"))
        assert np.array_equal(a, b)
