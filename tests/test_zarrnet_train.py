"""Page 57a: the run around the shared loop: what it keeps, refuses, resumes and shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from medvol_nb import phantoms
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, read_csv, rng_for, write_json
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet.config import ZarrConfig
from medvol_nb.zarrnet.geometry import encode_normals
from medvol_nb.zarrnet.model import build_model
from medvol_nb.zarrnet.train import (
    fit_config,
    load_model,
    network_summary,
    panels,
    preview,
    train,
    train_network,
    validation_patches,
    write_gif,
)
from tests.faults.injectors import forked

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roll")
    roll, affine = phantoms.sheets((32, 64, 64), 0), affine_from(1.0, axes="zyx")
    for name, values, axes in (
        ("ct", roll.img, "zyx"),
        ("sheet", roll.mask, "zyx"),
        ("normals", encode_normals(roll.normals[::-1]), "czyx"),
    ):
        write_zarr(Volume(values, affine, axes), folder / f"{name}.zarr", chunks=16)
    return folder


def task(data, folder, **changes):
    "Settings of a run that takes a second"
    settings = {
        "tr_params": {
            "model_name": "Roll",
            "patch_size": [8, 16, 16],
            "tr_val_split": 0.75,
            "val_block": [8, 16, 16],
            "max_steps_per_epoch": 4,
            "max_val_steps_per_epoch": 1,
            "max_epoch": 3,
            "initial_lr": 4e-3,
            "num_dataloader_workers": 0,
            "tensorboard_log_dir": None,
            "debug_gif_every": 0,
            "ckpt_out_base": str(folder / "runs"),
        },
        "model_config": {"f_maps": [4, 8], "decoder": "shared"},
        "dataset_config": {
            "volume_paths": [
                {
                    "input": str(data / "ct.zarr"),
                    "sheet": str(data / "sheet.zarr"),
                    "normals": str(data / "normals.zarr"),
                }
            ],
            "use_cache": False,
            "min_bbox_percent": 0.5,
            "min_labeled_ratio": 0.05,
            "targets": {"sheet": {"channels": 1, "activation": "sigmoid"}, "normals": {"channels": 3, "weight": 0.75}},
        },
    }
    for dotted, value in changes.items():
        place, keys = settings, dotted.split("__")
        for k in keys[:-1]:
            place = place.setdefault(k, {})
        place[keys[-1]] = value
    folder.mkdir(exist_ok=True)
    return write_json(folder / "task.json", settings, "overwrite")


def left(run):
    return {n: (Path(run) / n).read_bytes() for n in ("model.safetensors", "best.safetensors", "log.csv", "split.json")}


# ---- the run --------------------------------------------------------------------------------------------------------
def test_dry_run_writes_nothing(data, tmp_path):
    told = train(task(data, tmp_path), dry_run=True)
    assert (
        told["steps"] == 12 and told["train"] > 0 and told["val"] > 0 and sorted(os.listdir(tmp_path)) == ["task.json"]
    )


def test_dry_run_counts_optimiser_steps(data, tmp_path):
    config = task(data, tmp_path, tr_params__gradient_accumulation=3)
    assert train(config, dry_run=True)["steps"] == train(config)["steps"] == 3


def test_summary_takes_the_channels_of_the_settings(data, tmp_path):
    one, two = (network_summary(task(data, tmp_path, dataset_config__in_channels=n))["parameters"] for n in (None, 2))
    assert two == one + 4 * 27  # the first of the network's convolutions is 3 x 3 x 3 to 4 channels
    with pytest.raises(ConfigError, match="in_channels: 2, but the input has 3"):
        network_summary(task(data, tmp_path, dataset_config__in_channels=2), in_channels=3)


@pytest.mark.parametrize("workers, accumulate", [(0, 1), (2, 1), (0, 2)])
def test_B19_two_and_two_epochs_are_four(data, tmp_path, workers, accumulate):
    more = {
        "tr_params__num_dataloader_workers": workers,
        "tr_params__gradient_accumulation": accumulate,
        "tr_params__max_epoch": 4,
        "tr_params__ema_decay": 0.9,
    }
    whole = train(task(data, tmp_path / "a", **more))
    half = whole["steps"] // 2
    part = train(task(data, tmp_path / "b", **more), stop_at=half)
    assert part["steps"] == half and not part["finished"]
    rest = train(task(data, tmp_path / "b", **more))
    assert rest["finished"] and left(whole["run"]) == left(rest["run"])


def test_workers_change_no_byte(data, tmp_path):
    runs = [train(task(data, tmp_path / str(w), tr_params__num_dataloader_workers=w))["run"] for w in (0, 2)]
    assert left(runs[0]) == left(runs[1])


def test_B22_killed_at_counted_steps(data, tmp_path):
    whole, config = train(task(data, tmp_path/"a")), task(data, tmp_path/"k")
    steps = forked(lambda: train(task(data, tmp_path/"count")), tmp_path/"count")
    draw, died = rng_for(0, "kill"), []
    for _ in range(4):
        died.append(forked(lambda: train(config), tmp_path/"k", int(draw.integers(1, steps//3))) < 0)
        newest = sorted((tmp_path/"k"/"runs"/"Roll"/"checkpoints").glob("step-*"))
        if newest: load_model(newest[-1], "cpu")
    assert sum(died) >= 2 and left(train(config)["run"]) == left(whole["run"])


def test_the_log_has_units_that_mean_something(data, tmp_path):
    told = train(task(data, tmp_path))
    rows = read_csv(Path(told["run"]) / "log.csv")
    seen = [r for r in rows if r["val_loss"]]
    assert len(rows) == 12 and len(seen) == 3
    for key in (
        "val_sheet_dice",
        "val_normals_angle_mean",
        "val_normals_axial_p95",
        "val_sheet",
        "val_sheet_weighted",
        "lr",
        "grad_norm",
    ):
        assert np.isfinite(float(seen[-1][key])), key
    assert float(seen[-1]["val_normals_weighted"]) == pytest.approx(0.75 * float(seen[-1]["val_normals"]), rel=1e-5)


def test_validation_looks_at_the_same_patches():
    a, b = (validation_patches(50, 12, seed=3) for _ in range(2))
    assert (a == b).all() and len(set(a)) == 12 and (np.diff(a) > 0).all()
    assert len(validation_patches(5, 12, 0)) == 5 and (validation_patches(50, 12, 4) != a).any()


def test_no_validation_at_all(data, tmp_path):
    told = train(task(data, tmp_path, tr_params__tr_val_split=1.0))
    assert told["finished"] and told["best"] is None and not (Path(told["run"]) / "best.safetensors").exists()


def test_settings_map_onto_the_shared_loop(data, tmp_path):
    cfg = ZarrConfig.load(
        task(
            data,
            tmp_path,
            tr_params__optimizer="sgd",
            tr_params__gradient_accumulation=2,
            tr_params__grad_clip=None,
            tr_params__early_stopping_patience=4,
        )
    )
    found = fit_config(cfg)
    assert found.optimizer == "sgd" and found.accumulate == 2 and found.clip_norm is None and found.patience == 4
    assert found.checkpoint_every == found.validate_every == 2 and found.epochs == 3 and not found.tensorboard


def test_deep_supervision_and_separate_decoders(data, tmp_path):
    told = train(
        task(
            data,
            tmp_path,
            tr_params__deep_supervision=True,
            tr_params__patch_size=[8, 16, 16],
            model_config={"f_maps": [4, 8, 8, 8], "num_levels": 4, "strides": [1, 2, 2, [1, 2, 2]]},
        )
    )
    trained = load_model(told["run"], "cpu")
    with torch.no_grad():
        out = trained.model.predict(torch.zeros(1, 1, 8, 16, 16))
    assert out["sheet"].shape == (1, 1, 8, 16, 16) and out["normals"].shape == (1, 3, 8, 16, 16)


# ---- weights --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    return Path(train(task(data, tmp_path_factory.mktemp("done") / "x"))["run"])


@pytest.mark.parametrize("name", ["", "best.safetensors", "model.safetensors", "checkpoints"])
def test_every_weight_file_explains_itself(done, name):
    path = done / name if name != "checkpoints" else sorted((done / "checkpoints").iterdir())[-1]
    found = load_model(path, "cpu")
    assert list(found.targets) == ["sheet", "normals"] and found.patch_size == (8, 16, 16)
    assert found.normalizer(np.zeros((2, 2, 2), np.uint8), "ct").shape == (1, 2, 2, 2) and len(found.digest) == 16


def test_B21_checkpoints_of_the_reference(data, tmp_path, done):
    cfg = ZarrConfig.load(task(data, tmp_path))
    own = load_model(done, "cpu")
    weights = {f"module._orig_mod.{k}": v for k, v in own.model.state_dict().items()}
    torch.save({"model": weights, "optimizer": {}, "epoch": 3}, tmp_path / "SheetNorm_3.pth")
    found = load_model(tmp_path / "SheetNorm_3.pth", "cpu", cfg)
    x = torch.from_numpy(rng_for(0, "x").normal(size=(1, 1, 8, 16, 16)).astype(np.float32))
    with torch.no_grad():
        for k, v in found.model.predict(x).items():
            assert torch.equal(v, own.model.predict(x)[k])
    with pytest.raises(ConfigError, match="does not say what network"):
        load_model(tmp_path / "SheetNorm_3.pth", "cpu")


def test_U13_a_missing_checkpoint_is_an_error(data, tmp_path):
    with pytest.raises(MissingFile, match="checkpoint_path"):
        train(task(data, tmp_path, tr_params__checkpoint_path=str(tmp_path / "gone.pth")))


def test_weights_of_another_run(data, tmp_path, done):
    start = {"tr_params__checkpoint_path": str(done / "best.safetensors")}
    with pytest.raises(ConfigError, match="load_weights_only"):
        train(task(data, tmp_path / "a", **start))
    warm = train(task(data, tmp_path / "b", **start, tr_params__load_weights_only=True), stop_at=1)
    cold = train(task(data, tmp_path / "c"), stop_at=1)
    first = [float(read_csv(Path(t["run"]) / "log.csv")[0]["loss"]) for t in (warm, cold)]
    assert first[0] < first[1]  # it began with what the other run had learnt


def test_weights_that_fit_in_part_are_listed(data, tmp_path, done, caplog):
    path = task(
        data,
        tmp_path,
        tr_params__checkpoint_path=str(done),
        tr_params__load_weights_only=True,
        model_config={"f_maps": [4, 16], "decoder": "shared"},
    )
    train(path, stop_at=1)
    assert "tensors changed" in caplog.text


def test_files_that_are_no_weights(done, tmp_path):
    with pytest.raises(MissingFile, match="run folder"):
        load_model(tmp_path, "cpu")
    from medvol_nb.checkpoints import save_checkpoint

    save_checkpoint(tmp_path / "x.safetensors", {"embedding": torch.zeros(2)})
    with pytest.raises(FormatError, match="not weights of"):
        load_model(tmp_path / "x.safetensors", "cpu")


def test_U08_a_compiled_model_saves_plain_names(data, tmp_path):
    cfg = ZarrConfig.load(task(data, tmp_path))
    model = build_model(cfg)
    model.compile()  # the way train_network compiles: in place
    assert not any("_orig_mod" in k for k in model.state_dict())


def test_other_settings_do_not_resume(data, tmp_path):
    train(task(data, tmp_path), stop_at=2)
    with pytest.raises(DataError, match="other settings"):
        train(task(data, tmp_path, tr_params__label_smoothing=0.05))
    with pytest.raises(DataError, match="other settings"):  # patches would come in another order
        train(task(data, tmp_path, dataset_config__decoded_cache_gb=0.1))
    again = train(task(data, tmp_path, tr_params__label_smoothing=0.05), on_exists="overwrite")
    assert again["finished"]


def test_moving_the_run_or_training_longer_resumes(data, tmp_path):
    train(task(data, tmp_path / "a", tr_params__scheduler="constant"))
    os.rename(tmp_path / "a", tmp_path / "b")
    told = train(task(data, tmp_path / "b", tr_params__scheduler="constant", tr_params__max_epoch=4))
    assert told["steps"] == 16 and len(read_csv(Path(told["run"]) / "log.csv")) == 16


# ---- pictures -------------------------------------------------------------------------------------------------------
def test_films(data, tmp_path):
    told = train(task(data, tmp_path, tr_params__debug_gif_every=2, tr_params__max_epoch=4))
    films = sorted(p.name for p in (Path(told["run"]) / "debug").iterdir())
    assert films == ["Roll_2.gif", "Roll_4.gif"]
    from PIL import Image

    film = Image.open(Path(told["run"]) / "debug" / "Roll_2.gif")
    assert film.n_frames == 8 and film.size == (48, 32)  # image, sheet, normals above; the predictions below


def test_films_show_probabilities_of_masks_without_activation(data, tmp_path, monkeypatch):
    page, seen = sys.modules[train.__module__], []
    monkeypatch.setattr(page, "panels", lambda sample, *rest: seen.append(rest[0]) or panels(sample, *rest))
    settings = {"tr_params__debug_gif_every": 1, "tr_params__max_epoch": 1}
    train(task(data, tmp_path, **settings, dataset_config__targets__sheet={"channels": 1}))
    assert len(seen) == 1 and 0 < seen[0]["sheet"].min() < seen[0]["sheet"].max() < 1


def test_panels_have_fixed_scales(data, tmp_path):
    targets = ZarrConfig.load(task(data, tmp_path)).targets
    box = (2, 3, 4)
    sample = {
        "image": np.zeros((1, *box), np.float32),
        "sheet": np.full((1, *box), 0.5, np.float32),
        "normals": np.zeros((3, *box), np.float32),
    }
    frames = panels(
        sample, {"sheet": np.full((1, *box), 0.25), "normals": np.stack([np.ones(box)] * 3) / np.sqrt(3)}, targets
    )
    assert frames.shape == (2, 6, 12, 3) and frames.dtype == np.uint8
    assert (frames[:, :3, 4:8] == 128).all() and (frames[:, 3:, 4:8] == 64).all() and (frames[:, :3, 8:] == 0).all()


def test_preview_is_reproducible(data, tmp_path):
    config = task(data, tmp_path)
    told = [preview(config, out=tmp_path / k, n=2)["samples"] for k in "ab"]
    assert [r["start"] for r in told[0]] == [r["start"] for r in told[1]] and len(told[0]) == 2
    assert all(
        (tmp_path / "a" / f"sample_{k}.gif").read_bytes() == (tmp_path / "b" / f"sample_{k}.gif").read_bytes()
        for k in (0, 1)
    )


def test_a_film_of_one_frame(tmp_path):
    assert write_gif(np.zeros((1, 4, 4, 3), np.uint8), tmp_path / "x.gif").read_bytes()[:6] == b"GIF89a"


# ---- several processes ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(data, tmp_path):
    "By SGD: AdamW divides by the size of gradients, and makes rounding of those near 0 as large as a step"
    config = task(data, tmp_path / "two", tr_params__batch_size=1, tr_params__optimizer="SGD")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-port=29613",
            "-m",
            "medvol_nb.cli",
            "unet",
            "train",
            "--config",
            str(config),
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one = train(task(data, tmp_path / "one", tr_params__batch_size=2, tr_params__optimizer="SGD"))
    two = read_csv(tmp_path / "two" / "runs" / "Roll" / "log.csv")
    got = np.array([[float(r["loss"]) for r in rows] for rows in (two, read_csv(Path(one["run"]) / "log.csv"))])
    np.testing.assert_allclose(got[0], got[1], rtol=2e-4)


def test_train_network_from_python(data, tmp_path):
    seen = []
    result = train_network(
        ZarrConfig.load(task(data, tmp_path)),
        stop_at=3,
        callbacks=[lambda event, state: seen.append((event, state.step))],
    )
    assert (
        result.steps == 3
        and [s for e, s in seen if e == "step"] == [1, 2, 3]
        and json.loads((Path(result.weights).parent / "config.json").read_text())["tr_params"]["model_name"] == "Roll"
    )
