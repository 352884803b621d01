"""Many scans: places of results, what counts as done, death, sharing between processes, folds, the commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from medvol_nb import phantoms, sv_batch
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OutputExists, lock, read_json
from medvol_nb.datalists import DataList, read_datalist, write_datalist
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.parallel import BatchError
from medvol_nb.samweights import SamShape, random_sam
from medvol_nb.supervoxels import SupervoxelSettings, supervoxels
from medvol_nb.sv_batch import batch_infer, infer, metrics, plan_cases, select_items
from medvol_nb.volume import read_volume, write_volume

from .faults.injectors import forked
from .faults.jobs import content

ROOT = Path(__file__).resolve().parents[1]
SHAPE = SamShape(16, 2, 2, 32, (1,), window=3, grid=8, neck=64)
NAMES = ["a/one", "a/two", "b/one"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Three small scans in two folders and their list"
    root = tmp_path_factory.mktemp("data")
    for k, name in enumerate(NAMES):
        p = phantoms.abdomen((24 + 2 * k, 20, 16), seed=k)
        (root / name).parent.mkdir(exist_ok=True)
        vol = Volume(p.img.astype(np.int16), affine_from(p.spacing))
        write_volume(vol, root / f"{name}.nii.gz")
        write_volume(replace(vol, data=p.lbl), root / f"{name}_seg.nii.gz")
    training = tuple({"image": f"{n}.nii.gz", "fold": k} for k, n in enumerate(NAMES[:2]))
    write_datalist(DataList("toy", training, ({"image": "b/one.nii.gz"},), {1: "liver"}), root / "toy.json")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("sam") / "tiny.safetensors"
    save_file(dict(random_sam(SHAPE, seed=5).tensors), path)
    return path


def call(data, out, **options):
    return batch_infer(
        data / "toy.json", data, output_dir=out, **{"n_segments": 12, "features": "intensity", **options}
    )


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    "What one process writes without interruption"
    out = tmp_path_factory.mktemp("expected") / "sv"
    call(data, out)
    return content(out)


# ---------------------------------------------------------------- one case


def test_labels_and_record_are_what_the_pipeline_says(data, expected, tmp_path):
    call(data, tmp_path)
    assert sorted(expected) == sorted(f"{n}/{n[2:]}_seg.{e}" for n in NAMES for e in ("json", "nii.gz"))
    for name in NAMES:
        vol = read_volume(data / f"{name}.nii.gz")
        found = read_volume(tmp_path / name / f"{name[2:]}_seg.nii.gz")
        assert (found.data == supervoxels(vol, 12).labels.data).all() and found.dtype == np.int16
        np.testing.assert_array_equal(found.affine, vol.affine)
        record = read_json(tmp_path / name / f"{name[2:]}_seg.json")
        assert record["params"]["n_segments"] == 12 and record["info"]["n"] == 12
        assert record["info"]["encoder"] == "intensity"


def test_S4_the_reason_of_a_failure_is_told_and_interrupts_are_not_swallowed(data, tmp_path, monkeypatch):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes((data / "a/one.nii.gz").read_bytes()[:200])
    with pytest.raises(BatchError, match=r"1 of 2 items failed:\n.*bad.nii.gz: FormatError") as told:
        infer([bad, data / "a/one.nii.gz"], output_dir=tmp_path / "sv", n_segments=12, features="intensity")
    assert told.value.values[1]["status"] == "done" and "Traceback" in told.value.failures[0].trace

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sv_batch, "supervoxels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(data, tmp_path / "other")
    assert not [p for p in (tmp_path / "other").rglob("*") if p.is_file()]  # no lock, nothing half-written


def test_S4_a_half_written_folder_is_not_skipped(data, expected, tmp_path):
    "Labels cut short are made again; a folder without a record is refused, never taken for a result"
    call(data, tmp_path)
    labels = tmp_path / "a/one/one_seg.nii.gz"
    labels.write_bytes(labels.read_bytes()[:100])
    assert call(data, tmp_path)["done"] == 1 and content(tmp_path) == expected
    (tmp_path / "a/one/one_seg.json").unlink()
    with pytest.raises(BatchError, match="holds no record one_seg.json"):
        call(data, tmp_path)
    assert call(data, tmp_path, on_exists="overwrite")["done"] == 3 and content(tmp_path) == expected


def test_S9_results_carry_their_origin(data, weights, tmp_path):
    infer([data / "a/one.nii.gz"], output_dir=tmp_path, n_segments=12, checkpoint=weights, device="cpu")
    record = read_json(tmp_path / "one/one_seg.json")
    assert len(record["params"]["weights"]) >= 8 and record["image_digest"] and record["labels_digest"]
    assert record["params"]["features"] == "sam" and record["params"]["compactness"] == 0.15


@pytest.mark.parametrize("change", [{"n_segments": 13}, {"compactness": 0.2}, {"window": "ct"}, {"grid_mm": 3}])
def test_other_settings_are_refused(data, tmp_path, change):
    call(data, tmp_path)
    before = content(tmp_path)
    with pytest.raises(BatchError, match=f"made with other {next(iter(change))}. Choose another folder"):
        call(data, tmp_path, **change)
    assert content(tmp_path) == before


def test_another_scan_of_the_same_name_is_refused(data, tmp_path):
    shutil.copy(data / "a/one.nii.gz", tmp_path / "x.nii.gz")
    run = lambda: infer([tmp_path / "x.nii.gz"], output_dir=tmp_path / "sv", n_segments=12, features="intensity")
    run()
    shutil.copy(data / "b/one.nii.gz", tmp_path / "x.nii.gz")
    with pytest.raises(BatchError, match="made with other image"):
        run()


def test_existing_results_may_be_an_error_or_be_replaced(data, expected, tmp_path):
    assert call(data, tmp_path, on_exists="error")["done"] == 3
    with pytest.raises(BatchError, match="3 of 3 items failed") as told:
        call(data, tmp_path, on_exists="error")
    assert "OutputExists" in told.value.failures[0].error and issubclass(OutputExists, FileExistsError)
    assert call(data, tmp_path, n_segments=9, on_exists="overwrite")["done"] == 3
    assert call(data, tmp_path, on_exists="overwrite")["done"] == 3 and content(tmp_path) == expected


# ---------------------------------------------------------------- names and lists


def test_S11_equal_stems_do_not_collide(data, tmp_path):
    with pytest.raises(DataError, match="would both be written to"):
        infer([data / f"{n}.nii.gz" for n in NAMES], output_dir=tmp_path, features="intensity")
    assert not list(tmp_path.iterdir())
    cases = plan_cases([data / f"{n}.nii.gz" for n in NAMES], tmp_path, data)
    assert [c.labels.relative_to(tmp_path).as_posix() for c in cases] == [f"{n}/{n[2:]}_seg.nii.gz" for n in NAMES]
    with pytest.raises(DataError, match="is not below data_root_dir"):
        plan_cases([data / "a/one.nii.gz"], tmp_path, data / "b")
    with pytest.raises(MissingFile, match="does not exist"):
        infer([data / "a/absent.nii.gz"], output_dir=tmp_path, features="intensity")


def test_S5_all_folds_and_the_test_set_by_default(data, tmp_path):
    dl = read_datalist(data / "toy.json")
    assert select_items(dl) == [("training", 0), ("training", 1), ("testing", 0)]
    assert select_items(dl, folds="train") == [("training", 1), ("testing", 0)]
    assert select_items(dl, "training", "0") == [("training", 0)]
    assert select_items(dl, "testing") == [("testing", 0)]
    for wrong in ("first", "-1", "0.5", ""):
        with pytest.raises(ConfigError, match="folds"):
            select_items(dl, folds=wrong)
    with pytest.raises(DataError, match="no section 'validation'"):
        select_items(dl, "validation")
    rows = call(data, tmp_path, dry_run=True)["cases"]
    assert [Path(r["image"]).relative_to(data).as_posix() for r in rows] == [f"{n}.nii.gz" for n in NAMES]


def test_the_list_is_filled_in(data, tmp_path):
    call(data, tmp_path / "sv", write_datalist=tmp_path / "out.json", key="training")
    made, before = read_datalist(tmp_path / "out.json"), read_datalist(data / "toy.json")
    for item, old in zip(made.training, before.training, strict=True):
        assert read_volume(tmp_path / "sv" / item.pop("label_sv")).data.max() == 12
        assert item == old
    assert made.testing == before.testing and made.label_dict == before.label_dict


def test_folds_without_a_case_are_told(data, tmp_path):
    with pytest.raises(DataError, match=r"no case of training is in the folds asked for, '7'; there are \[0, 1\]"):
        call(data, tmp_path / "sv", key="training", folds="7")
    with pytest.raises(ConfigError, match="'all', 'train' or a number"):
        call(data, tmp_path / "sv", folds="\u00b2")


def test_the_place_of_the_list_is_looked_at_first(data, tmp_path):
    with pytest.raises(MissingFile, match="mkdir -p"):
        call(data, tmp_path / "sv", write_datalist=tmp_path / "no" / "out.json")
    with pytest.raises(OutputExists, match="also an input"):
        call(data, tmp_path / "sv", write_datalist=data / "toy.json")
    assert not (tmp_path / "sv").exists()


def test_lists_with_several_images_or_bad_paths_are_refused(data, tmp_path):
    raw = json.loads((data / "toy.json").read_text())
    raw["training"][0]["image"] = ["a/one.nii.gz", "a/two.nii.gz"]
    (tmp_path / "two.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="made from one image, /training/0 name"):
        batch_infer(tmp_path / "two.json", data, output_dir=tmp_path / "sv", features="intensity")
    raw["training"][0]["image"] = "../one.nii.gz"
    (tmp_path / "out.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match=r"holds '\.\.'"):
        batch_infer(tmp_path / "out.json", data, output_dir=tmp_path / "sv", features="intensity")
    assert not (tmp_path / "sv").exists()


def test_settings_come_from_a_file_and_options_win(data, tmp_path):
    (tmp_path / "s.yaml").write_text("features: intensity\nn_segments: 7\nmax_iter: 3\n")
    infer([data / "a/one.nii.gz"], output_dir=tmp_path / "a", settings=tmp_path / "s.yaml")
    infer([data / "a/one.nii.gz"], output_dir=tmp_path / "b", settings=tmp_path / "s.yaml", n_segments=9)
    params = [read_json(tmp_path / k / "one/one_seg.json")["params"] for k in "ab"]
    assert [(p["n_segments"], p["max_iter"]) for p in params] == [(7, 3), (9, 3)]
    with pytest.raises(ConfigError, match="takes no checkpoint"):
        infer([data / "a/one.nii.gz"], features="intensity", legacy=True)
    with pytest.raises(MissingFile, match="sam_vit_b_01ec64.pth"):
        infer([data / "a/one.nii.gz"], output_dir=tmp_path)


def test_figures_of_a_result(data, expected, tmp_path):
    call(data, tmp_path)
    found = metrics(tmp_path / "a/one/one_seg.nii.gz", data / "a/one_seg.nii.gz", image=data / "a/one.nii.gz")
    assert found["k"] == 12 and found["disconnected"] == 0 and 0 < found["asa"] <= 1 and "ev_image" in found
    with pytest.raises(DataError, match="does not lie on the grid"):
        metrics(tmp_path / "a/one/one_seg.nii.gz", data / "b/one_seg.nii.gz")


# ---------------------------------------------------------------- encoder


@pytest.mark.parametrize("legacy", [False, True])
def test_B11_the_dry_run_says_how_many_slices_are_encoded(data, weights, tmp_path, legacy):
    options = {"features": "sam", "checkpoint": weights, "device": "cpu", "legacy": legacy, "n_segments": 12}
    if not legacy:
        options["cache"] = tmp_path / "kept"
    plan = call(data, tmp_path / "sv", dry_run=True, **options)
    assert not (tmp_path / "sv").exists() and plan["to_do"] == 3
    encoder = sv_batch._encoder(str(weights), "cpu", "auto")
    before = encoder.encoded
    call(data, tmp_path / "sv", **options)
    assert encoder.encoded - before == plan["encoder_calls"] == sum(r["encoder_calls"] for r in plan["cases"]) > 0
    done = call(data, tmp_path / "sv", dry_run=True, **options)
    assert done["to_do"] == 0 and done["done"] == 3 and done["encoder_calls"] == 0
    if not legacy:
        call(data, tmp_path / "other", **options | {"n_segments": 9})
        assert encoder.encoded - before == plan["encoder_calls"]


# ---------------------------------------------------------------- death, and several processes


def test_B10_killed_anywhere_the_same_command_gives_the_same_bytes(data, expected, tmp_path):
    "Steps below the output folder: folders, locks, temporary files, renames; here a sample, in row 13 all"
    steps = forked(lambda: call(data, tmp_path / "count"), tmp_path / "count")
    assert steps > 20
    for at in range(1, steps + 1, steps // 7):
        out = tmp_path / f"at{at}"
        assert forked(lambda: call(data, out), out, at) == -signal.SIGKILL  # noqa: B023
        for name in NAMES:  # a folder under its final name is whole
            if (out / name).exists():
                assert {f"{name}/{k}": v for k, v in content(out / name).items()}.items() <= expected.items()
        again = call(data, out)
        assert again["done"] + again["skipped"] == 3 and again["done"] >= 1 and content(out) == expected


def test_B10_a_failing_case_does_not_stop_the_others(data, expected, tmp_path):
    for p in data.rglob("*"):
        if p.is_file():
            (tmp_path / "data" / p.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, tmp_path / "data" / p.relative_to(data))
    good = (data / "a/two.nii.gz").read_bytes()
    (tmp_path / "data/a/two.nii.gz").write_bytes(good[:-40])
    with pytest.raises(BatchError, match=r"1 of 3 items failed:\n  .*a/two.nii.gz: FormatError"):
        call(tmp_path / "data", tmp_path / "sv")
    (tmp_path / "data/a/two.nii.gz").write_bytes(good)
    again = call(tmp_path / "data", tmp_path / "sv")
    assert (again["done"], again["skipped"]) == (1, 2) and content(tmp_path / "sv") == expected


def test_B10_a_case_in_other_hands_is_waited_for(data, expected, tmp_path):
    "Another process holds a case and dies without finishing it: done here at the end"
    (tmp_path / "a").mkdir()
    child = os.fork()
    if not child:
        try:
            with lock(tmp_path / "a/one"):
                (tmp_path / "held").write_text("")
                time.sleep(1.5)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    rows = call(data, tmp_path)["cases"]
    os.waitpid(child, 0)
    (tmp_path / "held").unlink()
    assert [r["status"] for r in rows] == ["done"] * 3 and content(tmp_path) == expected


@pytest.mark.parametrize("on_exists", ["skip", "overwrite"])
def test_B10_two_processes_share_the_work(data, expected, tmp_path, on_exists):
    if on_exists == "overwrite":
        call(data, tmp_path, n_segments=5)
    start, pids = tmp_path.parent / f"{tmp_path.name}.start", []
    for k in range(2):
        pid = os.fork()
        if not pid:
            try:
                (tmp_path.parent / f"{tmp_path.name}.ready{k}").write_text("")
                while not start.exists():
                    time.sleep(0.002)
                rows = call(data, tmp_path, on_exists=on_exists)
                start.with_suffix(f".{k}").write_text(json.dumps([r["status"] for r in rows["cases"]]))
            finally:
                os._exit(0)
        pids.append(pid)
    while len(list(tmp_path.parent.glob(f"{tmp_path.name}.ready*"))) < 2:
        time.sleep(0.01)
    start.write_text("")
    for pid in pids:
        os.waitpid(pid, 0)
    told = [json.loads(start.with_suffix(f".{k}").read_text()) for k in range(2)]
    assert content(tmp_path) == expected
    assert all(sorted(pair) == ["done", "skipped"] for pair in zip(*told, strict=True)), told


def test_workers_write_what_one_process_writes(data, expected, tmp_path):
    assert call(data, tmp_path, workers=2)["done"] == 3 and content(tmp_path) == expected


@pytest.mark.slow
def test_B10_torchrun_shares_the_work(data, expected, tmp_path):
    code = """
import json, os, sys
from pathlib import Path
from medvol_nb.sv_batch import batch_infer
data, out = map(Path, sys.argv[1:])
rows = batch_infer(data/"toy.json", data, output_dir=out, n_segments=12, features="intensity",
                   write_datalist=out.parent/"made.json")["cases"]
(out.parent/f"rank{os.environ['RANK']}.json").write_text(json.dumps([r["status"] for r in rows]))
"""
    (tmp_path / "run.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]
    command += [str(tmp_path / "run.py"), str(data), str(tmp_path / "sv")]
    end = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert end.returncode == 0, end.stderr
    told = [json.loads((tmp_path / f"rank{k}.json").read_text()) for k in range(2)]
    assert content(tmp_path / "sv") == expected
    assert all(sorted(pair) == ["done", "skipped"] for pair in zip(*told, strict=True)), told
    assert all("label_sv" in i for i in read_datalist(tmp_path / "made.json").items())


@pytest.mark.slow
def test_B10_dask_shares_the_work(data, expected, tmp_path):
    distributed = pytest.importorskip("distributed")
    kind = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**kind) as cluster:
        found = call(data, tmp_path, dask=cluster.scheduler_address)
    assert found["done"] == 3 and content(tmp_path) == expected


# ---------------------------------------------------------------- the commands


def test_commands(data, expected, tmp_path, run_cli):
    options = ("--n_segments", 12, "--features", "intensity", "--output_dir", tmp_path / "sv", "--json")
    end = run_cli("supervoxels", "batch-infer", "--datalist", data / "toy.json", "--basedir", data, *options)
    assert end.returncode == 0, end.stderr
    assert json.loads(end.stdout)["done"] == 3 and content(tmp_path / "sv") == expected
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"not an image")
    files = ("--image_file", bad, "--image-file", data / "a/two.nii.gz")
    end = run_cli("supervoxels", "infer", *files, *options[:4], "--output-dir", tmp_path / "x")
    assert end.returncode == 3 and "bad.nii.gz" in end.stderr and (tmp_path / "x/two/two_seg.nii.gz").exists()
    end = run_cli("supervoxels", "infer", "--image_file", data / "a/one.nii.gz")
    assert end.returncode == 1 and "sam_vit_b_01ec64.pth" in end.stderr and not (tmp_path / "supervoxel_sam").exists()


def test_settings_that_no_command_names_have_their_usual_value():
    assert SupervoxelSettings().model_dump()["n_segments"] == 400 and SupervoxelSettings().features == "sam"
