"""The command that predicts: from settings or from weights alone, in parts, and what it refuses."""

import inspect

import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.core import ConfigError, write_json
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet import patches
from medvol_nb.zarrnet import predict as page
from medvol_nb.zarrnet import train as training
from medvol_nb.zarrnet.io import open_volume
from medvol_nb.zarrnet.predict import normalizer_for, predict
from medvol_nb.zarrnet.train import load_model, train


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    "A network that was trained for two steps, its settings, and a volume it never saw"
    root = tmp_path_factory.mktemp("predict")
    for name, seed in (("a", 0), ("b", 1)):
        roll, affine = phantoms.sheets((16, 40, 40), seed), affine_from(1.0, axes="zyx")
        write_zarr(Volume(roll.img, affine, "zyx"), root / f"{name}.zarr", chunks=16)
        write_zarr(Volume(roll.mask, affine, "zyx"), root / f"{name}_sheet.zarr", chunks=16)
    settings = {
        "tr_params": {"model_name": "Sheet", "patch_size": [8, 16, 16], "tr_val_split": 1, "max_steps_per_epoch": 2,
                      "max_epoch": 1, "num_dataloader_workers": 0, "tensorboard_log_dir": None, "device": "cpu"},
        "inference_params": {"checkpoint_path": "checkpoints/Sheet", "input_path": "b.zarr", "output_dir": "out",
                             "chunks": [8, 16, 16]},
        "model_config": {"f_maps": [4, 8]},
        "dataset_config": {"volume_paths": [{"input": "a.zarr", "sheet": "a_sheet.zarr"}], "use_cache": False,
                           "min_bbox_percent": 0, "min_labeled_ratio": 0.01,
                           "targets": {"sheet": {"channels": 1, "activation": "sigmoid"}}},
    }
    train(write_json(root / "task.json", settings))
    return root


def voxels(folder):
    return open_volume(folder / "predictions.zarr" / "sheet")[...]


def test_U16_prediction_runs_from_settings_and_from_weights_alone(task):
    "The second revision's inference never builds its settings; here neither the file nor the weights need the other"
    told = predict(task / "task.json", device="cpu")
    assert told["complete"] and voxels(task / "out").shape == (16, 40, 40) and np.ptp(voxels(task / "out")) > 0
    predict(checkpoint_path=task / "checkpoints" / "Sheet", input_path=str(task / "b.zarr"), device="cpu",
            output_dir=task / "alone")
    assert np.array_equal(voxels(task / "out"), voxels(task / "alone"))


def test_U12_the_shipped_entry_point_starts(task, run_cli):
    done = run_cli("unet", "predict", "--config", task/"task.json", "--output-dir", task/"shell", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    predict(task / "task.json", output_dir=task / "here", device="cpu")
    assert np.array_equal(voxels(task / "shell"), voxels(task / "here"))


@pytest.mark.parametrize("f", [training.train, training.preview, training.network_summary, training.train_network,
                               page.predict, patches.find_patches_command], ids=lambda f: f.__name__)
def test_U14_options_have_names(f):
    "Two swapped booleans cannot happen where everything but the settings is given by name"
    first, *rest = inspect.signature(f).parameters.values()
    assert first.name in ("config", "cfg") and all(p.kind is p.KEYWORD_ONLY for p in rest)


def test_U18_a_new_volume_is_normalised_by_the_scheme_of_the_training(task):
    trained, source = load_model(task / "checkpoints" / "Sheet", "cpu"), open_volume(task / "b.zarr")
    image = normalizer_for(trained, source)(source[...])
    assert trained.normalizer.scheme == "zscore" and image.shape == (1, 16, 40, 40)
    assert abs(image.mean()) < 1e-3 and abs(image.std() - 1) < 1e-3


def test_U12_B31_parts_by_processes_equal_one_run(task):
    predict(task / "task.json", output_dir=task / "whole", device="cpu")
    told = predict(task / "task.json", output_dir=task / "parts", workers=2, device="cpu")
    assert told["parts"] == 2 and np.array_equal(voxels(task / "whole"), voxels(task / "parts"))


def test_parts_start_over_together(task):
    "Overwriting is done once, before the parts start: none of them removes what another one made"
    first = predict(task / "task.json", output_dir=task / "over", workers=2, overlap=0.5, device="cpu")
    told = predict(task / "task.json", output_dir=task / "over", workers=2, overwrite=True, device="cpu")
    assert told["parts"] == 2 and told["complete"] and 0 < told["patches"] < first["patches"]
    predict(task / "task.json", output_dir=task / "once", device="cpu")
    assert np.array_equal(voxels(task / "over"), voxels(task / "once"))


def test_one_part_for_each_processor(task, monkeypatch):
    monkeypatch.setattr(page, "cpu_count", lambda: 3)
    told = predict(task / "task.json", output_dir=task / "each", workers=-1, device="cpu")
    assert told["parts"] == 3 and told["complete"]


@pytest.mark.parametrize("said, fits", [("auto", True), ("zarr", True), ("ome-zarr", True), ("tif", False)])
def test_the_format_of_the_input_is_what_was_said(task, said, fits):
    given = dict(overrides=[f"inference_params.input_format={said}"], output_dir=task / f"is {said}", device="cpu")
    if fits: assert predict(task / "task.json", **given)["complete"]
    else:
        with pytest.raises(ConfigError, match="input_format: tif, but .*b.zarr is read as zarr"):
            predict(task / "task.json", **given)


@pytest.mark.parametrize("given, words", [
    (dict(), "checkpoint_path: is needed"),
    (dict(checkpoint_path="x"), "input_path: is needed"),
    (dict(overrides=["inference_params.tta=mirror"]), "pass config"),
    (dict(checkpoint_path="x", input_path="y", part_id=0, workers=2), "part_id: one part needs no workers"),
])
def test_what_lacks_is_named(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words): predict(**given)
