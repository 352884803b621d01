"""Settings of the multi-task U-Net: every rule has an example that breaks it, and its message names the place."""

import copy
import json
import math
import pickle
import re

import pytest
import yaml

from medvol_nb.config import check_config, dump_config
from medvol_nb.core import ConfigError, rng_for
from medvol_nb.zarrnet.config import (
    LOSS_KINDS,
    NetworkConfig,
    Target,
    TrainParams,
    VolumeEntry,
    ZarrConfig,
    auto_levels,
    infer_kind,
    plan_network,
    size_problem,
)

SEED = {  # the example of the reference's manual, key by key
    "tr_params": {
        "model_name": "SheetNorm",
        "patch_size": [64, 192, 192],
        "batch_size": 4,
        "tr_val_split": 0.80,
        "ignore_label": None,
        "loss_only_on_label": False,
        "dilate_label": False,
        "label_smoothing": 0.1,
        "initial_lr": 0.001,
        "weight_decay": 0.0001,
        "max_steps_per_epoch": 500,
        "max_val_steps_per_epoch": 25,
        "max_epoch": 500,
        "gradient_accumulation": 1,
        "checkpoint_path": "checkpoints/SheetNorm_325.pth",
        "load_weights_only": True,
        "ckpt_out_base": "checkpoints/augs_and_s4",
        "optimizer": "AdamW",
        "num_dataloader_workers": 4,
        "tensorboard_log_dir": "tensorboard",
    },
    "inference_params": {
        "patch_size": [64, 192, 192],
        "batch_size": 4,
        "checkpoint_path": "checkpoints/SheetNorm_301.pth",
        "num_dataloader_workers": 4,
        "input_path": "s4.zarr",
        "input_format": "zarr",
        "output_dir": "inference_out",
        "output_format": "zarr",
        "output_type": "np.uint8",
        "output_targets": ["sheet", "normals"],
        "overlap": 0.25,
    },
    "model_config": {"f_maps": [32, 64, 128, 256, 320, 528], "num_levels": 6},
    "dataset_config": {
        "min_bbox_percent": 0.95,
        "min_labeled_ratio": 0.07,
        "use_cache": True,
        "cache_file": "cache.json",
        "normalization": "ct_normalization",
        "volume_paths": [
            {"input": "a.zarr", "sheet": "a_sheet.zarr", "normals": "a_n.zarr", "ref_label": "sheet"},
            {"input": "b.zarr", "sheet": "b_sheet.zarr", "normals": "b_n.zarr", "ref_label": "sheet"},
        ],
        "targets": {
            "sheet": {"channels": 1, "activation": "none", "weight": 1},
            "normals": {"channels": 3, "activation": "none", "weight": 0.75},
        },
    },
}
REMOVED = object()


def changed(*changes, start=SEED):
    "A copy of the settings with values at dotted places replaced or removed"
    data = copy.deepcopy(start)
    for dotted, value in changes:
        at = data
        *parents, last = [int(p) if p.isdigit() else p for p in dotted.split(".")]
        for p in parents:
            at = at[p] if isinstance(at, list) else at.setdefault(p, {})
        if value is REMOVED:
            del at[last]
        else:
            at[last] = value
    return data


def load(data):
    return check_config(ZarrConfig, data)


# (place, illegal value, what the message says after the place)
WRONG = [
    ("tr_params.model_name", "", "match pattern"),
    ("tr_params.model_name", "a/b", "match pattern"),
    ("tr_params.patch_size", [64, 192], "missing"),
    ("tr_params.patch_size.0", 0, "greater than or equal to 1"),
    ("tr_params.patch_size", [64, 200, 192], "axis y: 200 is not divisible by 32, the nearest legal sizes are 192 and"),
    ("tr_params.batch_size", 0, "greater than or equal to 1"),
    ("tr_params.batch_size", "many", "valid integer"),
    ("tr_params.tr_val_split", 0, "greater than 0"),
    ("tr_params.tr_val_split", 1.1, "less than or equal to 1"),
    ("tr_params.ignore_label", True, "a label value"),
    ("tr_params.ignore_label", "none", "a label value"),
    ("tr_params.loss_only_on_label", "perhaps", "valid boolean"),
    ("tr_params.dilate_label", -1, "radius >= 0"),
    ("tr_params.dilate_label", "much", "radius >= 0"),
    ("tr_params.label_smoothing", 0.5, "less than 0.5"),
    ("tr_params.initial_lr", 0, "greater than 0"),
    ("tr_params.weight_decay", -1, "greater than or equal to 0"),
    ("tr_params.beta2", 1, "less than 1"),
    ("tr_params.max_steps_per_epoch", 0, "greater than or equal to 1"),
    ("tr_params.max_val_steps_per_epoch", -1, "greater than or equal to 0"),
    ("tr_params.max_epoch", 0, "greater than or equal to 1"),
    ("tr_params.gradient_accumulation", 0, "greater than or equal to 1"),
    ("tr_params.checkpoint_path", 7, "path"),
    ("tr_params.load_weights_only", [], "valid boolean"),
    ("tr_params.ckpt_out_base", None, "path"),
    ("tr_params.optimizer", "adam", "'AdamW' or 'SGD'"),
    ("tr_params.num_dataloader_workers", -1, "greater than or equal to 0"),
    ("tr_params.tensorboard_log_dir", 5, "path"),
    ("tr_params.seed", -1, "greater than or equal to 0"),
    ("tr_params.device", 0, "valid string"),
    ("tr_params.precision", "fp8", "'auto', 'fp32', 'fp16' or 'bf16'"),
    ("tr_params.grad_clip", 0, "greater than 0"),
    ("tr_params.scheduler", "step", "'cosine', 'poly' or 'constant'"),
    ("tr_params.warmup_steps", -1, "greater than or equal to 0"),
    ("tr_params.eta_min", 1, "above initial_lr"),
    ("tr_params.val_split_mode", "patch", "'block', 'volume' or 'random'"),
    ("tr_params.val_split_mode", "volume", "needs split"),
    ("tr_params.val_block.1", 0, None),
    ("tr_params.keep_checkpoints", -1, "greater than or equal to 0"),
    ("tr_params.keep_best", 3, "must be 1, got 3"),
    ("tr_params.ema_decay", 1, "less than 1"),
    ("tr_params.deep_supervision", 3, "valid boolean"),
    ("tr_params.compile", "fast", "valid boolean"),
    ("tr_params.debug_gif_every", -1, "greater than or equal to 0"),
    ("tr_params.early_stopping_patience", -1, "greater than or equal to 0"),
    ("tr_params.pad_small", "x", "valid boolean"),
    ("tr_params.oversample_foreground", 2, "less than or equal to 1"),
    ("tr_params.batchsize", 4, r"unknown key, did you mean 'batch_size'\?"),
    ("inference_params.patch_size", [64, 192, 100], "axis x: 100 is not divisible by 32"),
    ("inference_params.batch_size", 0, "greater than or equal to 1"),
    ("inference_params.checkpoint_path", 1.5, "path"),
    ("inference_params.num_dataloader_workers", -1, "greater than or equal to 0"),
    ("inference_params.input_path", 3, "valid string"),
    ("inference_params.input_path", " ", "empty text"),
    ("inference_params.input_format", "nifti", "'auto', 'zarr', 'ome-zarr' or 'tif'"),
    ("inference_params.output_dir", None, "path"),
    ("inference_params.output_format", "auto", "'zarr', 'ome-zarr' or 'tif'"),
    ("inference_params.output_type", "np.int8", "auto, uint8, uint16, float16 or float32"),
    ("inference_params.output_type", {"sheet": "uint3"}, "auto, uint8"),
    ("inference_params.output_type", {"shet": "uint8"}, "'shet' is not a target, did you mean 'sheet'"),
    ("inference_params.output_targets", "sheet", "a list of targets, or 'all'"),
    ("inference_params.output_targets", ["sheet", "ink"], "'ink' is not a target, there are sheet, normals"),
    ("inference_params.overlap", 0.95, "less than or equal to 0.9"),
    ("inference_params.overlap", -0.1, "greater than or equal to 0"),
    ("inference_params.load_all", "x", "valid boolean"),
    ("inference_params.blend", "linear", "'gaussian' or 'constant'"),
    ("inference_params.sigma_scale", 0, "greater than 0"),
    ("inference_params.tta", "flip", "'none' or 'mirror'"),
    ("inference_params.max_memory_gb", 0, "greater than 0"),
    ("inference_params.resume", "x", "valid boolean"),
    ("inference_params.overwrite", "x", "valid boolean"),
    ("inference_params.part_id", 1, "below num_parts 1"),
    ("inference_params.num_parts", 0, "greater than or equal to 1"),
    ("inference_params.bbox", [[0, 10], [5, 5], [0, 10]], "0 <= from < to"),
    ("inference_params.mask_path", 1, "valid string"),
    ("inference_params.mask_threshold", "x", "valid number"),
    ("inference_params.skip_empty", "x", "valid boolean"),
    ("inference_params.chunks", [0, 1, 1], None),
    ("inference_params.compressor", "zstd", "valid dictionary"),
    ("inference_params.activation_override", {"ink": "none"}, "'ink' is not a target"),
    ("inference_params.activation_override", {"sheet": "softmax"}, "channels >= 2"),
    ("inference_params.activation_override", {"sheet": "tanh"}, "'none', 'sigmoid' or 'softmax'"),
    ("inference_params.overlp", 0.2, r"did you mean 'overlap'\?"),
    ("model_config.f_maps", [32, 64, 128], "3 numbers for num_levels 6"),
    ("model_config.f_maps", [32, 64, 128, 256, 320, 0], "must be >= 1"),
    ("model_config.f_maps", [], "a whole number, or a list"),
    ("model_config.num_levels", 1, "greater than or equal to 2"),
    ("model_config.n_levels", 5, "'n_levels' is 5 and 'num_levels' is 6"),
    ("model_config.preset", "unet", "'resenc', 'seed' or 'auto'"),
    ("model_config.norm", "layer", "'instance', 'group' or 'batch'"),
    ("model_config.num_groups", 0, "greater than or equal to 1"),
    ("model_config.nonlin", "gelu", "'leaky_relu', 'relu' or 'elu'"),
    ("model_config.blocks_per_level", [1, 3], "2 entries for 6 levels"),
    ("model_config.kernel_sizes", [3, 3, 3, 3, 3, 2], "must be odd"),
    ("model_config.kernel_sizes", [3], "1 entries for 6 levels"),
    ("model_config.strides", [2, 2, 2, 2, 2, 2], "the first level keeps the size"),
    ("model_config.strides", [1, [2, 2], 2, 2, 2, 2], "three for z, y and x"),
    ("model_config.se", "both", "'none', 'cse', 'sse' or 'scse'"),
    ("model_config.se_reduction", 0, "greater than 0"),
    ("model_config.decoder", "joint", "'separate' or 'shared'"),
    ("model_config.decoder_convs", 0, "greater than or equal to 1"),
    ("model_config.dropout", 1, "less than 1"),
    ("model_config.stochastic_depth", -0.1, "greater than or equal to 0"),
    ("model_config.spacing", [1, 1, 0], "must be > 0"),
    ("model_config.vram_max_gb", 0, "greater than 0"),
    ("model_config.fmaps", [1], r"did you mean 'f_maps'\?"),
    ("dataset_config.min_bbox_percent", 95, "less than or equal to 1"),
    ("dataset_config.min_labeled_ratio", -0.1, "greater than or equal to 0"),
    ("dataset_config.labeled_ratio_of", "volume", "'patch' or 'bbox'"),
    ("dataset_config.use_cache", "x", "valid boolean"),
    ("dataset_config.cache_file", 3, "path"),
    ("dataset_config.cache_folder", "cache", "cache_file or cache_folder"),
    ("dataset_config.cache_floor", 2, "less than or equal to 1"),
    ("dataset_config.normalization", "percent", "'none', 'scale'"),
    ("dataset_config.in_channels", 0, "greater than or equal to 1"),
    ("dataset_config.allow_missing_targets", "x", "valid boolean"),
    ("dataset_config.patch_step", [1, 1], "missing"),
    ("dataset_config.grid_origin", "label", "'volume' or 'label_bbox'"),
    ("dataset_config.volume_paths", "a.zarr", "valid tuple"),
    ("dataset_config.volume_paths.1.input", REMOVED, "missing, it has no default"),
    ("dataset_config.volume_paths.1.shet", "x.zarr", r"not a target and not a setting, did you mean 'sheet'\?"),
    ("dataset_config.volume_paths.1.ref_label", "ink", "'ink' is not a target of this volume"),
    ("dataset_config.volume_paths.1.normals", None, "only allowed with dataset_config.allow_missing_targets"),
    ("dataset_config.volume_paths.1.level", -1, "greater than or equal to 0"),
    ("dataset_config.volume_paths.1.bbox", [[4, 2], [0, 1], [0, 1]], "0 <= from < to"),
    ("dataset_config.volume_paths.1.mask", 3, "valid string"),
    ("dataset_config.volume_paths.1.ignore_mask", [], "valid string"),
    ("dataset_config.volume_paths.1.split", "test", "'train' or 'val'"),
    ("dataset_config.volume_paths.1.weight", -1, "greater than or equal to 0"),
    ("dataset_config.targets", {}, "at least 1 item"),
    ("dataset_config.targets.sheet.channels", REMOVED, "missing, it has no default"),
    ("dataset_config.targets.sheet.channels", 0, "greater than or equal to 1"),
    ("dataset_config.targets.sheet.activation", "relu", "'none', 'sigmoid' or 'softmax'"),
    ("dataset_config.targets.sheet.activation", "softmax", "softmax needs channels >= 2"),
    ("dataset_config.targets.normals.activation", "sigmoid", None),
    ("dataset_config.targets.sheet.weight", -1, "greater than or equal to 0"),
    ("dataset_config.targets.sheet.kind", "mask", "'binary', 'multiclass'"),
    ("dataset_config.targets.sheet.kind", "normals", "normals needs channels 3, got 1"),
    ("dataset_config.targets.sheet.kind", "multiclass", "multiclass needs channels >= 2"),
    ("dataset_config.targets.normals.kind", "binary", "binary needs channels 1, got 3"),
    ("dataset_config.targets.sheet.loss", "bcee", "unknown loss 'bcee', did you mean 'bce'.*Known: .*cosine"),
    ("dataset_config.targets.sheet.loss", "cosine", "'cosine' is not for binary, use one of bce"),
    ("dataset_config.targets.sheet.loss_kwargs", 3, "valid dictionary"),
    ("dataset_config.targets.sheet.ignore_label", False, "a label value"),
    ("dataset_config.targets.sheet.loss_only_on_label", "x", "valid boolean"),
    ("dataset_config.targets.sheet.dilate_label", -2, "radius >= 0"),
    ("dataset_config.targets.normals.label_smoothing", 0.1, "applies to classes, not to normals"),
    ("dataset_config.targets.sheet.label_scale", 0, "'auto', 'probability' or a factor > 0"),
    ("dataset_config.targets.sheet.signed", "x", "valid boolean"),
    ("dataset_config.targets.sheet.label_region_radius", -1, "greater than or equal to 0"),
    ("dataset_config.targets.sheet.output_range", [1, 0], "must rise"),
    ("dataset_config.targets.sheet.chanels", 1, r"did you mean 'channels'\?"),
    ("dataset_confg", {}, r"did you mean 'dataset_config'\?"),
]


@pytest.mark.parametrize(
    "place, value, words", WRONG, ids=[f"{p}={'removed' if v is REMOVED else repr(v)}"[:70] for p, v, _ in WRONG]
)
def test_B1_every_rule_names_its_place(place, value, words):
    start = SEED
    if place.startswith("tr_params.val_block"):
        start = changed(("tr_params.val_block", [1, 1, 1]))
    with pytest.raises(ConfigError) as e:
        load(changed((place, value), start=start))
    message = str(e.value)
    shown = place if place != "model_config.n_levels" else "model_config"
    assert f"{shown}" in message and message.startswith("1 problem in "), message
    if words:
        assert re.search(words, message), message


def test_every_key_is_tried():
    "The table above breaks a rule of every key of the specification that has one"
    tried = {p.split(".")[-1] if not p.split(".")[-1].isdigit() else p.split(".")[-2] for p, _, _ in WRONG}
    every = {*TrainParams.model_fields, *NetworkConfig.model_fields, *Target.model_fields}
    assert every - tried == set()


def test_all_problems_at_once(tmp_path):
    "Also rules between keys, when other keys are wrong in themselves"
    wrong = changed(
        ("tr_params.batch_size", 0),
        ("tr_params.patch_size", [64, 192, 190]),
        ("dataset_config.usecache", 0.1),
        ("dataset_config.targets.normals.weight", -1),
        ("dataset_config.volume_paths.0.sheet", REMOVED),
        ("dataset_config.volume_paths.1.ref_label", "ink"),
        ("inference_params.output_targets", ["ink"]),
    )
    (tmp_path / "c.json").write_text(json.dumps(wrong, indent=1))
    with pytest.raises(ConfigError) as e:
        ZarrConfig.load(tmp_path / "c.json")
    message = str(e.value)
    assert message.startswith("7 problems") and message.count("(line ") == 7, message
    for words in (
        "batch_size",
        "axis x: 190",
        "normals.weight",
        "volume_paths.0 ",
        "'ink' is not a target of",
        "there are",
        "use_cache",
    ):
        assert words in message


def test_structure_that_is_no_group_of_keys():
    for place, value in [
        ("tr_params", 3),
        ("model_config", []),
        ("dataset_config", "x"),
        ("dataset_config.targets", [1]),
    ]:
        with pytest.raises(ConfigError, match=place):
            load(changed((place, value)))
    for value in (None, 3, [], "x"):
        with pytest.raises(ConfigError):
            load(value)


def test_the_manuals_example_loads():
    cfg = load(SEED)
    assert cfg.tr_params.patch_size == (64, 192, 192) and cfg.plan.features == (32, 64, 128, 256, 320, 528)
    assert cfg.inference_params.output_type == "uint8" and cfg.inference_params.output_targets == ("sheet", "normals")
    assert {n: t.kind for n, t in cfg.targets.items()} == {"sheet": "binary", "normals": "normals"}
    assert [v.ref_label for v in cfg.volumes] == ["sheet", "sheet"] and cfg.plan.divisor == (32, 32, 32)


def test_json_yaml_and_dict_agree(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SEED))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(SEED))
    a, b = (ZarrConfig.load(tmp_path / f"a.{s}") for s in ("json", "yaml"))
    assert a == b and a.to_dict() == b.to_dict()
    assert ZarrConfig.model_validate(a.to_dict()) == a
    dump_config(a, tmp_path / "b.json")
    assert ZarrConfig.load(tmp_path / "b.json") == a
    assert pickle.loads(pickle.dumps(a)) == a
    assert a.volumes[0].input == str(tmp_path / "a.zarr") and a.tr_params.ckpt_out_base.is_absolute()


def test_addresses_are_not_paths(tmp_path):
    address = "https://example.org/s1.zarr"
    (tmp_path / "a.json").write_text(json.dumps(changed(("dataset_config.volume_paths.0.input", address))))
    cfg = ZarrConfig.load(tmp_path / "a.json")
    assert cfg.volumes[0].input == address and cfg.volumes[0].name == "s1"


def test_sections_and_keys_of_later_revisions():
    second = {
        "tr_setup": {"model_name": "Sheet", "tr_val_split": 0.9},
        "tr_config": {"patch_size": [64, 64, 64], "optimizer": "adamw"},
        "inference_config": {"output_path": "out", "overlap": 0.3},
        "model_config": {"n_levels": 4},
        "targets": {"sheet": {"channels": 1, "loss_fn": "BCEDiceLoss", "loss_kwargs": {"alpha": 0.5, "beta": 0.5}}},
        "volume_paths": {"input": "a.zarr", "sheet": "b.zarr"},
        "dataset_config": {"cache_folder": "patch_cache", "in_channels": 1},
    }
    cfg = load(second)
    assert (cfg.tr_params.model_name, cfg.tr_params.tr_val_split) == ("Sheet", 0.9)
    assert str(cfg.inference_params.output_dir) == "out" and cfg.targets["sheet"].loss == "bce_dice"
    assert str(cfg.cache_path) == "patch_cache/Sheet_64_64_64_cache.json"
    assert load(cfg.to_dict()) == cfg
    with pytest.raises(ConfigError, match=r"tr_config\.patch_size: axis x: 60 .*"):
        load(second | {"tr_config": {"patch_size": [64, 64, 60]}})
    with pytest.raises(ConfigError, match=r"targets\.sheet\.weight: must be greater"):
        load(second | {"targets": {"sheet": {"channels": 1, "weight": -1}}})
    with pytest.raises(ConfigError, match="volume_paths: no path for target 'sheet'"):
        load(second | {"volume_paths": {"input": "a.zarr"}})
    with pytest.raises(ConfigError, match=r"tr_config\.model_name: is given twice"):
        load(second | {"tr_config": {"patch_size": [64, 64, 64], "model_name": "x"}})
    with pytest.raises(ConfigError, match="inference_params: means the same as 'inference_config'"):
        load(second | {"inference_params": {}})
    with pytest.raises(ConfigError, match="targets: is given twice, at the top and in dataset_config"):
        load(second | {"dataset_config": {"targets": {"sheet": {"channels": 1}}}})


def test_activations_of_a_prediction_in_the_references_form():
    given = {"sheet": {"channels": 1, "activation": "sigmoid"}, "normals": {"channels": 3}}
    cfg = load(changed(("inference_params.targets", given)))
    assert cfg.inference_params.activation_override == {"sheet": "sigmoid"}
    with pytest.raises(ConfigError, match="say the same"):
        load(changed(("inference_params.targets", given), ("inference_params.activation_override", {"sheet": "none"})))


def test_B2_fuzz_never_anything_but_success_or_ConfigError():
    "B2: 3000 mutations of type at random places, one to four at a time"
    values = [None, True, 0, -1, 7, 1.5, "", "x", "null", [], [1], [[1]], {}, {"a": 1}, [None], {"sheet": None}, 10**30,
              -0.0, 1e308, "np.uint8", {"channels": 1}, [1, 2, 3], ["sheet"], b"x", math.nan, math.inf]  # fmt: skip

    def places(node, loc=()):
        yield loc
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for k, v in pairs:
            yield from places(v, (*loc, k))

    full = load(SEED).to_dict()
    every = [p for p in places(full) if p]
    loaded = 0
    for i in range(3000):
        rng, data = rng_for(7, "fuzz", i), copy.deepcopy(full)
        for _ in range(rng.integers(1, 5)):
            loc, at = every[rng.integers(len(every))], data
            try:
                for p in loc[:-1]:
                    at = at[p]
                kind = rng.integers(3)
                if kind == 0 and isinstance(at, dict):
                    at.pop(loc[-1])
                elif kind == 1 and isinstance(at, dict):
                    at[f"{loc[-1]}x"] = at[loc[-1]]
                else:
                    at[loc[-1]] = values[rng.integers(len(values))]
            except (KeyError, IndexError, TypeError):
                continue  # an earlier mutation took this place away
        try:
            load(data)
            loaded += 1
        except ConfigError as e:
            assert "problem" in str(e)
    assert 100 < loaded < 2900


# ---- what the first revision got wrong


def test_U01_num_levels_counts_and_has_one_other_name():
    "D1: `num_levels` is documented, `n_levels` is read, neither has an effect"
    for key in ("num_levels", "n_levels"):
        assert len(load(changed(("model_config", {key: 5}))).plan.features) == 5
    assert len(load(changed(("model_config", {"num_levels": 5, "n_levels": 5}))).plan.features) == 5
    with pytest.raises(ConfigError, match="'n_levels' is 4 and 'num_levels' is 5"):
        load(changed(("model_config", {"num_levels": 5, "n_levels": 4})))


def test_U01_thresholds_are_read_where_they_are_documented():
    "D2"
    cfg = load(changed(("dataset_config.min_labeled_ratio", 0.5)))
    assert cfg.dataset_config.min_labeled_ratio == 0.5
    with pytest.raises(ConfigError, match="tr_params.min_labeled_ratio: unknown key, it belongs to dataset_config"):
        load(changed(("tr_params.min_labeled_ratio", 0.5)))


def test_U01_documented_keys_reach_what_uses_them():
    "D3: values are inherited by targets, where loss and data read them"
    cfg = load(changed(("tr_params.ignore_label", 255), ("tr_params.dilate_label", True),
                       ("tr_params.loss_only_on_label", True), ("tr_params.label_smoothing", 0.05)))  # fmt: skip
    sheet, normals = cfg.targets["sheet"], cfg.targets["normals"]
    assert (sheet.ignore_label, sheet.dilate_label, sheet.loss_only_on_label) == (255, 5.0, True)
    assert (sheet.label_smoothing, normals.label_smoothing, normals.dilate_label) == (0.05, 0.0, 0.0)
    cfg = load(changed(("tr_params.dilate_label", 2), ("dataset_config.targets.normals.dilate_label", 3),
                       ("dataset_config.targets.sheet.ignore_label", 2)))  # fmt: skip
    assert (cfg.targets["normals"].dilate_label, cfg.targets["sheet"].ignore_label) == (3.0, 2)
    assert cfg.dataset_config.normalization == "ct_normalization" and cfg.tr_params.load_weights_only


def test_U09_no_activation_unless_it_is_asked_for():
    assert load(changed(("dataset_config.targets.sheet", {"channels": 1}))).targets["sheet"].activation == "none"


def test_U12_all_targets_is_a_word_and_not_its_letters():
    assert load(changed(("inference_params.output_targets", "all"))).inference_params.output_targets == "all"


def test_U13_kinds_decide_and_not_names():
    for name in ("normals", "normal"):
        assert infer_kind(name, 3) == "normals"
    assert infer_kind("sheet", 3) == "regression" and infer_kind("anything", 1) == "binary"
    assert infer_kind("organs", 4, "softmax") == "multiclass"
    cfg = load(changed(("dataset_config.targets.normals.kind", "regression")))
    assert cfg.targets["normals"].loss == "smooth_l1"


def test_U19_a_target_without_loss_arguments_has_defaults():
    assert {k: t.loss for k, t in load(SEED).targets.items()} == {"sheet": "bce_dice", "normals": "cosine"}


def test_nan_is_a_legal_ignore_label(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(changed(("tr_params.ignore_label", math.nan))))
    cfg = ZarrConfig.load(tmp_path / "a.yaml")
    assert math.isnan(cfg.targets["sheet"].ignore_label)
    assert cfg.to_dict()["tr_params"]["ignore_label"] == "nan"
    again = ZarrConfig.model_validate(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg


def test_unlabelled_volumes_must_be_allowed():
    changes = ("dataset_config.volume_paths.1.normals", None), ("dataset_config.allow_missing_targets", True)
    assert load(changed(*changes)).volumes[1].paths["normals"] is None
    with pytest.raises(ConfigError, match=r"volume_paths\.1\.ref_label: the labels of 'normals' are null"):
        load(changed(*changes, ("dataset_config.volume_paths.1.ref_label", "normals")))


def test_names_of_targets_and_volumes():
    for name in ("input", "mask", "a b", "1st", "x__mask", "image", "a.b"):
        data = changed(("dataset_config.targets", {name: {"channels": 1}}), ("dataset_config.volume_paths", []))
        with pytest.raises(ConfigError, match="cannot name a target"):
            load(data)
    cfg = load(changed(("dataset_config.volume_paths.1.input", "other/a.zarr")))
    assert [v.name for v in cfg.volumes] == ["a_0", "a_1"]
    both = [("dataset_config.volume_paths.0.name", "v"), ("dataset_config.volume_paths.1.name", "v")]
    with pytest.raises(ConfigError, match="volume 0 is also called 'v'"):
        load(changed(*both))


def test_split_by_volume_needs_something_to_train_with():
    mode = ("tr_params.val_split_mode", "volume")
    split = [(f"dataset_config.volume_paths.{i}.split", s) for i, s in enumerate(("train", "val"))]
    assert load(changed(mode, *split)).volumes[1].split == "val"
    with pytest.raises(ConfigError, match="every volume is for validation"):
        load(changed(mode, ("dataset_config.volume_paths.0.split", "val"), split[1]))


def test_channel_axis_of_an_entry():
    assert VolumeEntry(input="a", channel_axis=3).axis_of("input") == -1
    assert VolumeEntry(input="a", channel_axis={"n": 0}).axis_of("input") is None
    with pytest.raises(ConfigError, match="channel_axis"):
        load(changed(("dataset_config.volume_paths.0.channel_axis", 1)))


def test_places_in_messages_have_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SEED, indent=1))
    cfg = ZarrConfig.load(tmp_path / "a.json")
    line = 1 + (tmp_path / "a.json").read_text().split("\n").index('    "input": "b.zarr",')
    dotted = "dataset_config.volume_paths.1.input"
    assert cfg.place(*["dataset_config", "volume_paths", 1, "input"]) == f"{dotted} (line {line})"
    assert load(SEED).place("tr_params", "seed") == "tr_params.seed"
    for given in ({"tr_params.patch_size": [64, 192, 192]}, iter(["tr_params.patch_size=[64, 192, 192]"])):
        cfg = ZarrConfig.load(tmp_path / "a.json", given)
        assert cfg.place("tr_params", "patch_size") == "tr_params.patch_size", "the file says something else"
        assert cfg.place("dataset_config", "volume_paths", 1, "input") == f"{dotted} (line {line})"


@pytest.mark.parametrize("key", ["ignore_label", "dilate_label"])
def test_whole_numbers_beyond_any_array_are_refused(key):
    with pytest.raises(ConfigError, match=f"tr_params.{key}: must be"): load(changed((f"tr_params.{key}", 10**400)))


# ---- the plan


def test_automatic_levels():
    "Known answers of the specification"
    cases = {(64, 192, 192): 6, (64, 64, 64): 5, (14, 256, 256): 7, (16, 16, 16): 3}
    assert {p: len(auto_levels(p)[0]) for p in cases} == cases
    assert auto_levels((64, 192, 192))[0] == ((1, 1, 1), *((2, 2, 2),) * 4, (1, 2, 2))
    assert math.prod(s[0] for s in auto_levels((14, 256, 256))[0]) == 2
    strides, kernels = auto_levels((32, 256, 256), (4.0, 1.0, 1.0))
    assert strides[1:4] == ((1, 2, 2), (1, 2, 2), (2, 2, 2)) and kernels[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    assert kernels[-1] == (3, 3, 3) and len(kernels) == len(strides)


def test_an_automatic_patch_grows_and_says_so(caplog):
    auto = changed(("model_config", {"preset": "auto"}), ("tr_params.patch_size", [15, 250, 256]),
                   ("inference_params.patch_size", None))  # fmt: skip
    with caplog.at_level("WARNING", logger="medvol_nb"):
        cfg = load(auto)
    assert cfg.tr_params.patch_size == (16, 256, 256) == cfg.plan.patch_size and "enlarged to" in caplog.text
    assert ZarrConfig.model_validate(cfg.to_dict()) == cfg
    assert cfg.plan.features[-1] == 320 and len(cfg.plan.features) == 7
    with pytest.raises(ConfigError, match="the automatic configuration has 7 levels"):
        load(changed(("model_config.num_levels", 4), start=auto))


def test_presets_fix_what_makes_them():
    for preset in ("seed", "auto"):
        with pytest.raises(ConfigError, match=f"model_config.strides: is fixed by the preset '{preset}'"):
            load(changed(("model_config.preset", preset), ("model_config.strides", [1, 2, 2, 2, 2, 2])))
    with pytest.raises(ConfigError, match="12 channels do not divide into 8 groups"):
        load(changed(("model_config", {"preset": "seed", "f_maps": [4, 12]})))
    plan = plan_network(NetworkConfig(preset="seed"))
    assert (plan.norm, plan.nonlin, plan.se, plan.se_reduction, plan.blocks) == ("group", "relu", "scse", 1, (1,) * 4)
    assert plan_network(NetworkConfig(f_maps=32)).features == (32, 64, 128, 256, 320, 320)


def test_sizes_with_one_voxel_left_are_illegal_for_instance_norm():
    plan = plan_network(NetworkConfig(num_levels=3))
    assert size_problem((4, 4, 8), plan) == "" and "one voxel" in size_problem((4, 4, 4), plan)
    assert size_problem((4, 4, 4), plan_network(NetworkConfig(num_levels=3, norm="group"))) == ""
    assert size_problem((3, 4, 4), plan) == "axis z: 3 is not divisible by 4, the nearest legal sizes are 4"


def test_everything_left_out():
    cfg = load({"targets": {"sheet": {"channels": 1}}})
    assert cfg.volumes == [] and cfg.plan.features == (32, 64, 128, 256) and cfg.inference_params.overlap == 0.25
    assert set(LOSS_KINDS) >= {t.loss for t in cfg.targets.values()}


def test_smoothing_of_a_loss_that_has_none_is_refused():
    from medvol_nb.zarrnet.config import _UNSMOOTHED, LOSS_KINDS
    from medvol_nb.zarrnet.loss import LOSSES
    classes = {k for k, kinds in LOSS_KINDS.items() if {"binary", "multiclass"} & set(kinds)}
    assert {k for k in classes if "smoothing" not in LOSSES[k].settings} == _UNSMOOTHED
    with pytest.raises(ConfigError, match="sheet.label_smoothing: the loss 'focal' has none"):
        load({"targets": {"sheet": {"channels": 1, "loss": "focal", "label_smoothing": 0.2}}})
    assert load({"targets": {"sheet": {"channels": 1, "loss": "focal"}}}).targets["sheet"].loss == "focal"
