"""Rows 13 to 17: supervoxels killed, interrupted or fed with odd scans; encoders short of memory or damaged."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from medvol_nb import phantoms
from medvol_nb.core import DataError, FormatError, MedvolError, file_digest, rng_for
from medvol_nb.datalists import DataList, write_datalist
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.parallel import BatchError, cpu_count, pmap
from medvol_nb.samfeat import SamFeatureExtractor
from medvol_nb.samweights import SamShape, random_sam
from medvol_nb.sv_batch import batch_infer, infer
from medvol_nb.volume import read_volume, write_volume

from .injectors import ROOT, Canary, forked
from .jobs import content
from .rows import SilentlyWrong, sampled

SHAPE = SamShape(16, 2, 2, 32, (1,), window=3, grid=8, neck=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A sound checkpoint of a tiny encoder"
    path = tmp_path_factory.mktemp("sam") / "tiny.safetensors"
    save_file(dict(random_sam(SHAPE, seed=5).tensors), path)
    return path


CASES = [f"{folder}/case{k}" for k, folder in enumerate("aabbcc")]
CHOICE = {"n_segments": 15, "features": "intensity"}


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    "Six small scans, their list, and what an undisturbed run makes of them"
    root = tmp_path_factory.mktemp("six")
    for k, name in enumerate(CASES):
        p = phantoms.abdomen((30 + k, 26, 20), seed=k)
        (root / name).parent.mkdir(exist_ok=True)
        write_volume(Volume(p.img.astype(np.int16), affine_from(p.spacing)), root / f"{name}.nii.gz")
    items = tuple({"image": f"{name}.nii.gz", "fold": k % 3} for k, name in enumerate(CASES))
    write_datalist(DataList("six", items, (), {1: "liver"}), root / "six.json")
    assert run_six(root, root / "sv")["done"] == 6
    return root


def run_six(root, out):
    return batch_infer(root / "six.json", root, output_dir=out, **CHOICE)


def resumed(root, out):
    "The same command again: whole results are kept, the rest is made, all bytes are those of the undisturbed run"
    whole, times = content(root / "sv"), {}
    for name in CASES:
        if (out / name).exists():
            stem = name.rpartition("/")[2]
            for end in ("json", "nii.gz"):
                path = out / name / f"{stem}_seg.{end}"
                if path.read_bytes() != whole[f"{name}/{path.name}"]:
                    raise SilentlyWrong(f"{path.name} is torn under its final name")
                times[path] = path.stat().st_mtime_ns
    again = run_six(root, out)
    if content(out) != whole:
        raise SilentlyWrong("the resumed run left other bytes")
    assert again["skipped"] == len(times) // 2 and again["done"] == 6 - again["skipped"]
    assert all(p.stat().st_mtime_ns == t for p, t in times.items()), "a finished case was made again"


@sampled(20, quick=5)
def test_row_13_killed_during_a_batch(count, instances, six, tmp_path):
    "Kill -9 before steps spread over the whole run; nothing partial is skipped"
    steps = forked(lambda: run_six(six, tmp_path / "all"), tmp_path / "all")
    for k in range(count):
        out, at = tmp_path / f"sv{k}", 1 + k * (steps - 1) // (count - 1)
        with instances(f"step {at} of {steps}"):
            assert forked(lambda: run_six(six, out), out, at) == -signal.SIGKILL  # noqa: B023
            resumed(six, out)
    instances.check(count)


def test_row_14_odd_scans(instances, tmp_path):
    "A valid label map, or one error with the file and nothing written"
    rng = rng_for(14, "scans")
    noise = lambda *shape: rng.normal(100, 40, shape).astype(np.float32)
    holed, endless = noise(14, 12, 10), noise(14, 12, 10)
    holed[3, 4, 5], endless[2, 1, 0] = np.nan, -np.inf
    long = (np.sin(np.arange(3000) / 30)[:, None, None] * 100 + noise(3000, 5, 4)).astype(np.float32)
    refused = {
        "air": (rng.normal(-1000, 5, (16, 16, 16)).astype(np.int16), "no body found"),
        "nan": (holed, r"1 voxels are NaN or infinite, first at \(3, 4, 5\)"),
        "inf": (endless, r"1 voxels are NaN or infinite, first at \(2, 1, 0\)"),
    }
    accepted = {
        "axis of 1": (noise(30, 30, 1), 12),
        "constant": (np.full((14, 12, 10), 7, np.int16), 12),
        "huge values": (noise(20, 20, 20) * 1e9, 12),
        "axis of 3000": (long, 40),
        "many segments": (noise(34, 33, 33), 34 * 33 * 33),
    }
    for name, (img, n) in {**refused, **accepted}.items():
        file, out = tmp_path / f"{name.replace(' ', '_')}.nii.gz", tmp_path / name
        write_volume(Volume(img, affine_from(1.0)), file)
        (tmp_path / "s.json").write_text(json.dumps({"mask": "none" if name == "many segments" else "body"}))
        options = {"output_dir": out, "features": "intensity", "settings": tmp_path / "s.json"}
        if name in refused:
            with instances.refuses(name, BatchError, f"{name}.nii.gz: DataError", n):
                infer([file], n_segments=12, **options)
            assert not list(out.iterdir()) and issubclass(DataError, MedvolError)
            continue
        with instances(name):
            infer([file], n_segments=n, **options)
            stem = file.name.removesuffix(".nii.gz")
            lbl = read_volume(out / stem / f"{stem}_seg.nii.gz").data
            ids = np.unique(lbl)
            if lbl.shape != img.shape or ids[ids > 0].tolist() != list(range(1, n + 1)):
                raise SilentlyWrong(f"ids {ids[:3]} to {ids[-3:]} in {lbl.dtype} {lbl.shape}")
    instances.check(8)


@sampled(5, quick=2)
def test_row_16_interrupted(count, instances, six, tmp_path):
    "Ctrl-C in the terminal of the command, after so many cases: gone in 2 s with code 130, and resumable"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for k, (finished, workers) in enumerate([(0, 0), (2, 0), (1, 2), (1, 0), (3, 0)][:count]):
        out = tmp_path / f"sv{k}"
        command = [sys.executable, "-m", "medvol_nb.cli", "supervoxels", "batch-infer", "--datalist", six / "six.json"]
        command += ["--basedir", six, "--output-dir", out, "--n-segments", 15, "--features", "intensity"]
        command += ["--workers", workers]
        with instances(f"after {finished} cases, {workers} workers"):
            process = subprocess.Popen(
                [str(c) for c in command],
                env=env,
                start_new_session=True,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            done = lambda: len(list(out.glob("*/*/*.json")))  # noqa: B023
            while not list(out.glob("*/*.lock")) or done() < finished:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.002)
            start = time.perf_counter()
            os.killpg(process.pid, signal.SIGINT)
            _, told = process.communicate(timeout=60)
            seconds = time.perf_counter() - start
            assert process.returncode == 130 and "run the same command again" in told, (process.returncode, told)
            crowd = max(1.0, os.getloadavg()[0] / cpu_count())  # processes that wait for each processor
            assert seconds <= 2 * crowd, f"{seconds:.1f} s at load {crowd:.1f}"
            assert done() < 6, "interrupted too late to say anything"
            assert workers or not list(out.rglob(".mvtmp*")), "litter"  # of ended workers it is swept by the next run
            resumed(six, out)
    instances.check(count)


def short_of_memory(sam, error, when):
    "Make the encoder raise `error` whenever `when(call, slices in the batch)` says so; returns the sizes of batches"
    network, batch, sizes, calls = sam.network.embed, sam.embed, [], []

    def embed(images):
        sizes.append(len(images))
        return batch(images)

    def slice_(pixels):
        calls.append(1)
        if when(len(calls), sizes[-1]):
            raise error
        return network(pixels)

    sam.embed, sam.network.embed = embed, slice_
    return sizes


def test_row_15_encoder_out_of_memory(instances, weights, tmp_path):
    "The batch is halved and the result the same; with a single slice the case fails and the others go on"
    make = lambda size=8: SamFeatureExtractor(weights, device="cpu", batch_size=size)
    slices = torch.from_numpy(rng_for(0, "slices").random((11, 20, 24)) * 255)
    vol = rng_for(0, "volume").random((16, 12, 10))
    by_slice, by_volume = (
        make(1).slice_features(slices),
        make(1).volume_features(vol, stride=1, cache=tmp_path / "sound"),
    )

    def same(got, expected):
        if got.tobytes() != expected.tobytes():
            raise SilentlyWrong("other features after a batch was halved")

    with instances("MemoryError once, in the middle of the second batch"):
        sam = make()
        sizes = short_of_memory(sam, MemoryError(), lambda call, n: call == 10)
        same(sam.slice_features(slices).numpy(), by_slice.numpy())
        assert sizes == [8, 3, 1, 1, 1] and sam.encoded == 11
    with instances("MemoryError in the first batch of a volume"):
        sam = make()
        sizes = short_of_memory(sam, MemoryError(), lambda call, n: call == 1)
        same(sam.volume_features(vol, stride=1, cache=tmp_path / "halved"), by_volume)
        assert sizes[:3] == [8, 4, 4] and sam.encoded == sam.plan(vol.shape, stride=1).calls
        found, sound = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("halved", "sound"))
        assert found == sound
    with instances("every batch of more than one slice, as a GPU says it"):
        sam = make()
        sizes = short_of_memory(sam, torch.OutOfMemoryError("CUDA out of memory"), lambda call, n: n > 1)
        same(sam.slice_features(slices).numpy(), by_slice.numpy())
        assert sizes == [8, 4, 2] + [1] * 11
    with instances("one of three cases does not fit at all"):
        sam, cases = make(), {"a": vol, "large": vol[:15], "c": vol}
        sound = sam.embed

        def run(name):
            short = sam.network.embed
            if name == "large":
                short_of_memory(sam, MemoryError(), lambda call, n: True)
            try:
                return sam.volume_features(cases[name], stride=1)
            finally:
                sam.embed, sam.network.embed = sound, short

        done, failures = pmap(run, list(cases), errors="collect")
        assert [f.key for f in failures] == ["large"] and "out of memory with a single slice" in failures[0].error
        for got in (done[0], done[2]):
            same(got, by_volume)
    instances.check(4)


def test_row_17_weight_files(instances, weights, tmp_path):
    "Refused with the file and what to do, nothing of it is run, nothing is written"
    tensors, canary = dict(random_sam(SHAPE, seed=5).tensors), Canary(tmp_path / "canary")
    files = tmp_path / "files"
    files.mkdir()
    torch.save(tensors, files / "sound.pth")
    raw, good = (files / "sound.pth").read_bytes(), weights.read_bytes()
    assert SamFeatureExtractor(files / "sound.pth", device="cpu").digest == random_sam(SHAPE, seed=5).digest
    (files / "short.pth").write_bytes(raw[: len(raw) // 2])
    (files / "short.safetensors").write_bytes(good[:-1000])
    altered = bytearray(good)
    altered[-100] ^= 4
    (files / "altered.safetensors").write_bytes(altered)
    torch.save({f"layer{k}.0.conv1.weight": torch.zeros(64, 64, 3, 3) for k in range(4)}, files / "resnet.pth")
    wide = tensors | {"vision_encoder.layers.0.mlp.lin2.weight": torch.zeros(20, 32)}
    save_file(wide, files / "wide.safetensors")
    (files / "evil.pth").write_bytes(canary.pickled())
    before = {p.name: p.read_bytes() for p in files.iterdir()}
    damaged, where = "not a readable weight file|refused or damaged", "Files that work: sam_vit_b_01ec64.pth"
    rows = [
        ("short.pth", {}, [damaged, where]),
        ("short.safetensors", {}, [damaged, where]),
        ("altered.safetensors", {"sha256": file_digest(weights, 64)}, ["SHA-256 is", "damaged or another one"]),
        ("resnet.pth", {}, ["layout not recognised", "Expected the image encoder", where]),
        ("wide.safetensors", {}, [r"lin2.weight \(20, 32\) -> \(16, 32\)", "nearest known model", where]),
        ("evil.pth", {}, ["nothing that runs code", where]),
    ]
    for name, settings, words in rows:
        with instances.refuses(name, FormatError, name, *words):
            SamFeatureExtractor(files / name, device="cpu", **settings)
    if canary.sang:
        raise SilentlyWrong("a weight file was executed")
    assert {p.name: p.read_bytes() for p in files.iterdir()} == before
    assert issubclass(FormatError, MedvolError)
    instances.check(6)
