"""Row 40: settings of the multi-task U-Net that are wrong, hostile, or do not fit their data."""

import copy
import re

import numpy as np
import yaml
import zarr

from medvol_nb.core import ConfigError, FormatError
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet.config import ZarrConfig
from medvol_nb.zarrnet.patches import open_entries

BASE = {
    "tr_params": {"model_name": "Sheet", "patch_size": [16, 32, 32], "batch_size": 2},
    "model_config": {"f_maps": [8, 16, 32], "num_levels": 3},
    "inference_params": {"overlap": 0.5, "output_targets": "all"},
    "dataset_config": {
        "min_labeled_ratio": 0.07,
        "volume_paths": [{"input": "a.zarr", "sheet": "a_sheet.zarr", "normals": "a_normals.zarr"}],
        "targets": {"sheet": {"channels": 1}, "normals": {"channels": 3}},
    },
}


def edited(place, value, old=None):
    data = copy.deepcopy(BASE)
    *parents, last = [int(p) if p.isdigit() else p for p in place.split(".")]
    at = data
    for p in parents:
        at = at[p]
    if old:
        del at[old]
    at[last] = value
    return yaml.safe_dump(data, sort_keys=False)


def test_row_40_zarr_unet_settings(instances, tmp_path):
    "Everything at once, with lines; nothing is written and nothing in the file runs"
    file, canary = tmp_path / "task.yaml", tmp_path / "canary"
    plain = yaml.safe_dump(BASE, sort_keys=False)
    file.write_text(plain)
    assert ZarrConfig.load(file).plan.divisor == (4, 4, 4)

    keys = {  # what: (place, value, key that it replaces, words)
        "unknown key": ("tr_params.colour", "red", None, "unknown key"),
        "unknown section": ("training", {}, None, "unknown key"),
        "key of another section": ("tr_params.overlap", 0.5, None, "it belongs to inference_params"),
        "typo": ("tr_params.batchsize", 2, "batch_size", "did you mean 'batch_size'"),
        "typo of a section": ("modelconfig", {}, None, "did you mean 'model_config'"),
        "typo of a target": ("dataset_config.volume_paths.0.shete", "x.zarr", None, "did you mean 'sheet'"),
        "typo in a target": ("dataset_config.targets.sheet.wieght", 1, None, "did you mean 'weight'"),
        "typo of a loss": ("dataset_config.targets.sheet.loss", "bce_dise", None, "did you mean 'bce_dice'"),
        "text for a number": ("tr_params.batch_size", "two", None, "valid integer, .*got 'two'"),
        "number for text": ("tr_params.model_name", 3, None, "valid string, got 3"),
        "group for a number": ("tr_params.batch_size", {"a": 1}, None, "valid integer"),
        "list for a group": ("model_config", [1], None, "model_config"),
        "text for a list": ("dataset_config.volume_paths", "a.zarr", None, "valid tuple"),
        "null for a number": ("inference_params.overlap", None, None, "valid number"),
        "yes for a label": ("tr_params.ignore_label", True, None, "a label value"),
        "two of three": ("tr_params.patch_size", [32, 32], None, "patch_size"),
        "letters": ("inference_params.output_targets", "sheet", None, "a list of targets, or 'all'"),
        "below": ("tr_params.batch_size", 0, None, "greater than or equal to 1, got 0"),
        "above": ("inference_params.overlap", 0.95, None, "less than or equal to 0.9, got 0.95"),
        "percent": ("dataset_config.min_labeled_ratio", 7, None, "less than or equal to 1, got 7"),
        "infinite": ("dataset_config.min_labeled_ratio", float("inf"), None, "must be"),
        "not a number": ("tr_params.initial_lr", float("nan"), None, "finite number"),
        "negative weight": ("dataset_config.targets.sheet.weight", -1, None, "greater than or equal to 0"),
        "no path": ("dataset_config.volume_paths.0.name", "v", "sheet", "no path for target 'sheet'"),
        "null path": ("dataset_config.volume_paths.0.sheet", None, None, "allow_missing_targets"),
        "no channels": ("dataset_config.targets.sheet.weight", 1, "channels", "missing, it has no default"),
        "indivisible z": ("tr_params.patch_size", [18, 32, 32], None, "axis z: 18 is not divisible by 4.*16 and 20"),
        "indivisible x": ("inference_params.patch_size", [16, 32, 31], None, "axis x: 31 .*28 and 32"),
        "levels": ("model_config.f_maps", [8, 16], None, "2 numbers for num_levels 3"),
        "a path that is no text": ("dataset_config.volume_paths.0.input", [1], None, "valid string"),
    }
    for name, (place, value, old, words) in keys.items():
        text = edited(place, value, old)
        file.write_text(text)
        at = {"no path": "input", "no channels": "sheet"}.get(name, place.split(".")[-1])  # where what lacks would be
        lines = [str(i + 1) for i, t in enumerate(text.split("\n")) if t.strip(" -").startswith(f"{at}:")]
        with instances.refuses(name, ConfigError, words, rf"task\.yaml: .*\(line ({'|'.join(lines)})\)"):
            ZarrConfig.load(file)

    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join(9 * ['*' + a])}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    run = f"!!python/object/apply:os.system ['touch {canary}']"
    hostile = {
        "alias bomb": (bomb, "more than 200000"),
        "alias bomb as patch size": (bomb + plain.replace("batch_size: 2", "batch_size: *i"), "more than 200000"),
        "python call": (
            plain.replace("model_name: Sheet", f"model_name: {run}"),
            "line 2: tag .* is not a plain value",
        ),
        "python name": (plain.replace("all", "!!python/name:os.system"), "tag .* is not a plain value"),
        "python tuple": (plain.replace("Sheet", "!!python/tuple [1]"), "line 2: tag .* is not a plain value"),
        "own tag": (plain.replace("Sheet", "!path a"), "line 2: tag '!path' is not a plain value"),
    }
    for name, (text, *words) in hostile.items():
        file.write_text(text)
        with instances.refuses(name, (ConfigError, FormatError), "task.yaml", *words):
            ZarrConfig.load(file)

    shape = (16, 32, 32)
    for name in ("a", "a_sheet"):
        write_zarr(Volume(np.ones(shape, np.uint8), affine_from(1.0, axes="zyx"), "zyx"), tmp_path / f"{name}.zarr")
    zarr.create_array(tmp_path / "a_normals.zarr", shape=(3, *shape), dtype="uint16")
    zarr.create_array(tmp_path / "two.zarr", shape=(2, *shape), dtype="uint16")
    zarr.create_array(tmp_path / "short.zarr", shape=(16, 32, 30), dtype="uint8")
    before = sorted(p.name for p in tmp_path.iterdir())
    entry = "dataset_config.volume_paths.0"
    data = {  # checks that open the data, one after the settings themselves are right
        "missing path": (f"{entry}.sheet", "absent.zarr", "absent.zarr does not exist"),
        "channels unlike the array": (f"{entry}.normals", "two.zarr", "of 2 x 16 x 32 x 32 can be the 3 channels"),
        "another shape": (f"{entry}.sheet", "short.zarr", r"shape \(16, 32, 30\), but the input has \(16, 32, 32\)"),
        "patch larger than the volume": ("tr_params.patch_size", [16, 64, 32], "16 x 32 x 32 is smaller than .*axis y"),
    }
    file.write_text(plain)
    open_entries(ZarrConfig.load(file))
    for name, (place, value, words) in data.items():
        file.write_text(text := edited(place, value))
        at = {"patch larger than the volume": "input"}.get(name, place.split(".")[-1])
        line = next(str(i + 1) for i, t in enumerate(text.split("\n")) if t.strip(" -").startswith(f"{at}:"))
        with instances.refuses(name, ConfigError, rf"{re.escape(entry)}\.{at} \(line {line}\): ", words):
            open_entries(ZarrConfig.load(file))
    assert sorted(p.name for p in tmp_path.iterdir()) == before and not canary.exists()

    many = edited("tr_params.batchsize", 2, "batch_size").replace("channels: 1", "chanels: 1").replace("0.5", "5")
    file.write_text(many.replace("- 16", "- 18", 1))
    try:
        ZarrConfig.load(file)
        raise AssertionError("loaded")
    except ConfigError as e:
        assert str(e).startswith("5 problems") and str(e).count("(line ") == 5, e
    instances.check(40)
