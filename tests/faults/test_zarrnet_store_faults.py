"""Rows 41 and 44: patch caches and labels that are stale or damaged, and stores that are damaged or far away."""

import json
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import zarr

from medvol_nb import phantoms
from medvol_nb.core import MedvolError
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet import patches as page
from medvol_nb.zarrnet import remote
from medvol_nb.zarrnet.config import ZarrConfig
from medvol_nb.zarrnet.finder import find_patches
from medvol_nb.zarrnet.io import open_volume
from medvol_nb.zarrnet.patches import patch_list

from .injectors import Canary, bit_flips
from .rows import SilentlyWrong, sampled


def store(path: Path, array: np.ndarray, **options) -> Path:
    return write_zarr(
        Volume(array, affine_from(1.0, axes="zyx"), "zyx"), path, "overwrite", **{"chunks": 16, **options}
    )


# ------------------------------------------------------------------------------------------------------------ row 41


def test_row_41_stale_or_damaged_patch_cache(instances, tmp_path, monkeypatch):
    "Searched again or refused; the list is always the one that a search without a cache finds"
    d, kept, searches, search = tmp_path / "work", tmp_path / "kept", [], page.find_patches
    d.mkdir()
    monkeypatch.setattr(page, "find_patches", lambda *a, **k: searches.append(1) or search(*a, **k))
    roll = phantoms.sheets((24, 64, 64), pitch=16)
    other = phantoms.sheets((24, 64, 64), seed=1, pitch=16)

    def fresh():
        "Everything as it was, with dates"
        shutil.rmtree(d)
        shutil.copytree(kept, d)
        searches.clear()
        patch_list(task())
        assert not searches

    def task(names="ab", patch=(8, 16, 16), **dataset):
        tree = {
            "tr_params": {"patch_size": list(patch)},
            "model_config": {"f_maps": [8, 16]},
            "dataset_config": {
                "min_labeled_ratio": 0.2,
                "min_bbox_percent": 0.9,
                "cache_file": "patches.json",
                "volume_paths": [{"input": f"{n}.zarr", "sheet": f"{n}_sheet.zarr", "name": n} for n in names],
                "targets": {"sheet": {"channels": 1}},
                **dataset,
            },
        }
        (d / "task.json").write_text(json.dumps(tree))
        return ZarrConfig.load(d / "task.json")

    for name, array in (("a", roll.img), ("b", roll.img), ("a_sheet", roll.mask), ("b_sheet", other.mask)):
        store(d / f"{name}.zarr", array)
    patch_list(task())
    shutil.copytree(d, kept)

    def rebuilt(name, cfg):
        with instances(name):
            found = patch_list(cfg)
            assert searches, "the stale cache was used"
            if found.digest() != patch_list(cfg, cache=False).digest():
                raise SilentlyWrong("stale patches")
            searches.clear()
            assert patch_list(cfg).digest() == found.digest() and not searches, "the new cache is not used"

    for name, cfg in (
        ("looser threshold", lambda: task(min_labeled_ratio=0.05)),
        ("other patch size", lambda: task(patch=(8, 16, 32))),
        ("volumes in another order", lambda: task("ba")),
    ):
        fresh()
        rebuilt(name, cfg())
    fresh()
    store(d / "a_sheet.zarr", other.mask)
    rebuilt("other labels under the same name", task())
    fresh()
    zarr.open(str(d / "b_sheet.zarr"))["image"][:, :30] = 0
    rebuilt("labels edited in place", task())
    fresh()
    shutil.rmtree(d / "b_sheet.zarr" / "image" / "c" / "0" / "2")
    rebuilt("chunks of the labels are gone", task())

    raw = (fresh(), (d / "patches.json").read_bytes())[1]
    row = raw.index(b'"start_pos": [') + 18
    damage = {
        "cut in the middle": raw[: len(raw) // 2],
        "empty": b"",
        "a flipped bit in a place": raw[:row] + bytes([raw[row] ^ 1]) + raw[row + 1 :],
        "a flipped bit in the key": raw.replace(b'"end_aligned": f', b'"end_alifned": f', 1),
    }
    for name, content in damage.items():
        fresh()
        (d / "patches.json").write_bytes(content)
        rebuilt(name, task())

    fresh()
    (d / "patches.json").write_text(json.dumps([{"volume_idx": 0, "start_pos": [20, 0, 0]}]))
    with instances.refuses(
        "a bare list that leaves the volume", MedvolError, "patches.json, entry 0", "Remove the file"
    ):
        patch_list(task())
    fresh()
    with instances.refuses("volume smaller than the patch", MedvolError, "volume_paths.0.input", "pad_small"):
        patch_list(task(patch=(32, 16, 16)))
    store(d / "a_sheet.zarr", roll.mask * 0)
    store(d / "b_sheet.zarr", roll.mask * 0)
    with instances.refuses("no label at all", MedvolError, "a: candidates 245, without label 245", "ref_label"):
        patch_list(task())
    store(d / "b_sheet.zarr", roll.mask[:, :60])
    words = r"volume_paths.1.sheet \(line 1\): shape \(24, 60, 64\)"
    with instances.refuses("labels of another shape", MedvolError, words):
        patch_list(task())
    instances.check(14)


# ------------------------------------------------------------------------------------------------------------ row 44


@sampled(200, 24)
def test_row_44_flipped_bits_in_chunks(instances, tmp_path, count):
    "An error, or the same voxels: never others"
    data = phantoms.sheets((24, 32, 32)).img
    kinds = {
        "v2": {"version": 2},
        "v3": {"version": 3},
        "shards": {"chunks": 8, "shards": (24, 16, 16)},
        "v2 large": {"version": 2, "chunks": 32},
    }
    for (name, options), reader in zip(kinds.items(), ("auto", "auto", "zarr", "zarr")):
        path = store(tmp_path / f"{name}.zarr", data, **options)
        files = sorted(p for p in (path / "image").rglob("*") if p.is_file() and p.name[-1].isdigit())
        chunk = files[len(files) // 2]
        good = chunk.read_bytes()
        for bit, bad in bit_flips(good, count // 4):
            chunk.write_bytes(bad)
            with instances(f"{name}, {chunk.name}, bit {bit}"):
                try:
                    found = open_volume(path, reader=reader)[...]
                except MedvolError as e:
                    assert f"{name}.zarr" in str(e)
                else:
                    if not np.array_equal(found, data):
                        raise SilentlyWrong("other voxels")
        chunk.write_bytes(good)
        assert np.array_equal(open_volume(path, reader=reader)[...], data)
    instances.check(count)


def changed(tree: dict, dotted: str, value) -> dict:
    "A copy with one value replaced, or removed if it is ..."
    tree = json.loads(json.dumps(tree))
    *way, last = dotted.split(".")
    node = tree
    for k in way:
        node = node[int(k)] if isinstance(node, list) else node[k]
    if value is ...:
        del node[last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    return tree


V3 = [
    ("chunk_grid.configuration.chunk_shape", [10**5] * 3),
    ("chunk_grid.configuration.chunk_shape", [0, 16, 16]),
    ("chunk_grid.configuration.chunk_shape", [-16, 16, 16]),
    ("chunk_grid.configuration.chunk_shape", [16, 16]),
    ("chunk_grid.name", "irregular"),
    ("shape", [-24, 32, 32]),
    ("shape", [0, 32, 32]),
    ("shape", ["24", 32, {}]),
    ("shape", 24),
    ("shape", [24, 32]),
    ("data_type", "object"),
    ("data_type", "r16384"),
    ("codecs", [{"name": "bytes"}, {"name": "secret"}]),
    ("codecs", []),
    ("codecs", ...),
    (
        "codecs",
        [{"name": "bytes"}, {"name": "blosc", "configuration": {"typesize": -1, "cname": "zstd", "clevel": -9}}],
    ),
    ("zarr_format", 9),
    ("node_type", "table"),
    ("fill_value", "none"),
]
V2 = [
    ("chunks", [10**5] * 3),
    ("chunks", [16, 0, 16]),
    ("compressor", {"id": "secret"}),
    ("compressor", {"id": "pickle"}),
    ("filters", [{"id": "pickle"}, {"id": "delta", "dtype": "|u1"}]),
    ("dtype", "|O"),
    ("dtype", "u"),
]


def test_row_44_metadata_that_lie(instances, tmp_path):
    "Refused when opened, or bounded when read; nothing is allocated, nothing is run"
    data, canary = phantoms.sheets((24, 32, 32)).img, Canary(tmp_path / "canary")
    for version, edits in ((3, V3), (2, V2)):
        path = store(tmp_path / f"v{version}.zarr", data, version=version)
        file = path / "image" / ("zarr.json" if version == 3 else ".zarray")
        good = json.loads(file.read_text())
        for dotted, value in edits:
            file.write_text(json.dumps(changed(good, dotted, value)))
            if "pickle" in str(value):
                for chunk in (path / "image").glob("*.0"):
                    chunk.write_bytes(canary.pickled())
            for reader in ("auto", "zarr"):
                if reader == "zarr":
                    with pytest.raises(MedvolError, match=f"v{version}.zarr"):
                        open_volume(path, reader=reader)[...]
                    continue
                with instances.refuses(f"v{version} {dotted} = {value}", MedvolError, f"v{version}.zarr"):
                    open_volume(path)[...]
        assert not canary.sang
    path = store(tmp_path / "vast.zarr", data)
    file = path / "image" / "zarr.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(changed(good, "shape", [10**6] * 3)))
    with instances.refuses("all of 10^18 voxels", MedvolError, "vast.zarr", "budget"):
        open_volume(path)[...]
    with instances.refuses("patches of 10^18 voxels", MedvolError, "vast.zarr", "max_memory_gb"):
        find_patches(open_volume(path), (16, 16, 16))
    instances.check(28)


class Stumbling(SimpleHTTPRequestHandler):
    "Serves files; `server.answer(path)` may say what goes wrong instead"

    def log_message(self, *args): ...

    def do_GET(self):
        path, fault = Path(self.translate_path(self.path)), self.server.answer(self.path)
        if isinstance(fault, int) or not path.is_file():
            return self.send_error(fault or 404)
        if fault == "reset":
            return self.connection.close()
        data = path.read_bytes() if not isinstance(fault, bytes) else fault
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "short" else data)


def test_row_44_servers_that_fail(instances, tmp_path, monkeypatch):
    "Five retries with back-off, then an error; a chunk that does not exist is the fill value, as the format says"
    data = phantoms.sheets((24, 32, 32)).img
    store(tmp_path / "a.zarr", data)
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Stumbling, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.zarr/image"

    def meta(fault):
        server.answer = lambda path: fault if path.endswith("zarr.json") else None

    def chunks(fault, times=10**6):
        left = [fault] * min(times, 10**4)
        server.answer = lambda path: left.pop() if left and "/c/" in path else None

    html = b"<html><body>Please log in</body></html>"
    try:
        for fault, words in (
            (404, "no zarr array"),
            (500, "HTTP 500 .* 6 times"),
            ("short", "6 times"),
            (html, "damaged"),
        ):
            meta(fault)
            with instances.refuses(f"metadata: {fault}", MedvolError, "a.zarr/image", words):
                open_volume(url)
        chunks(None)
        v = open_volume(url, reader="zarr")
        for fault, words in (
            (500, "HTTP 500"),
            ("short", "6 times"),
            ("reset", "6 times"),
            (html, "cannot be read"),
            (403, "403"),
        ):
            chunks(fault)
            pauses.clear()
            with instances.refuses(f"chunk: {fault}", MedvolError, "a.zarr/image, chunk 0.0.0", words):
                v[:8, :8, :8]
            assert fault in (html, 403) or pauses[:5] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])
        for fault in (503, "short"):
            chunks(fault, 4)
            with instances(f"chunk: {fault} four times, then well"):
                if not np.array_equal(v[:8, :8, :8], data[:8, :8, :8]):
                    raise SilentlyWrong("other voxels")
        os.unlink(tmp_path / "a.zarr" / "image" / "c" / "0" / "0" / "0")
        chunks(None)
        with instances("chunk: 404"):
            found = v[:17, :17, :17]
            assert not found[:16, :16, :16].any() and np.array_equal(found[16], data[16, :17, :17])
    finally:
        server.shutdown()
        server.server_close()
    instances.check(12)
