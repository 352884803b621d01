"""Page 11b: folds are held out, only paths are joined, the caller's roots count, and a list is never executed."""
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvol_nb import loading
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, write_json
from medvol_nb.datalists import DataList, parse_datalist
from medvol_nb.loading import (
    UPSTREAM_DIRS,
    find_datalists,
    get_datalist_with_dataset_name,
    get_datalist_with_dataset_name_and_transform,
    hold_out,
    located_items,
    materialise,
    published_transform,
    transform_problems,
)

CALL = {"image_key": "image", "label_key": "label", "label_sv_key": "label_sv", "pseudo_label_key": "pseudo_label",
        "num_patches_per_image": 2, "patch_size": [32, 32, 32]}


@pytest.fixture(scope="session")
def monai():
    "MONAI, imported once (6 to 16 s)"
    return pytest.importorskip("monai.transforms")


def published(name: str, n: int = 12, **more) -> dict:
    "A list with all that the published ones have"
    training = [{"image": f"imagesTr/{name}_{k}.nii.gz", "pseudo_label": f"imagesTr/{name}_{k}.nii.gz",
                 "label": f"labelsTr/{name}_{k}.nii.gz", "fold": k*5//n, "pseudo_label_reliability": k % 2,
                 **({"label_sv": f"/workspace_infer/supervoxel_sam/{name}_100/{k}/{k}_seg.nii.gz"} if k*5//n else {})}
                for k in range(n)]
    return {"training": training, "training_transform": published_transform(), "label_dict": {"1": "x"},
            "original_label_dict": {"1": "X"}, **more,
            "testing": [{"image": "imagesTs/t.nii.gz", "label": "labelsTs/t.nii.gz"}]}


@pytest.fixture
def lists(tmp_path) -> Path:
    folder = tmp_path/"jsons"
    folder.mkdir()
    for name in ("Task09", "VerSe", "BTCV-Abdomen"): write_json(folder/f"{name}_5_folds.json", published(name))
    bare = {"training": [{"image": f"a/{k}.nii.gz", "pseudo_label": f"a/{k}.nii.gz"} for k in range(3)],
            "training_transform": published_transform()}
    write_json(folder/"NLST_5_folds.json", bare)
    write_json(folder/"label_dict.json", {"x": 1})
    return folder


# ------------------------------------------------------------------------------------------------------------- folds

@pytest.mark.parametrize("n_folds, n", [(5, 23), (3, 3), (1, 4)])
def test_every_fold_is_held_out_once(n_folds, n):
    items = [{"image": f"{k}", "fold": k % n_folds} for k in range(n)] + [{"image": "no fold"}]
    for fold in range(n_folds):
        train, held = hold_out(items, fold)
        assert sorted(map(str, train + held)) == sorted(map(str, items))
        assert held == [i for i in items if i.get("fold") == fold]
        assert items[-1] in train
    assert hold_out(items, -1) == (items, [])


@pytest.mark.parametrize("fold", ["0", 0.0, True, None, -2, 1.5])
def test_fold_must_be_an_integer(fold):
    with pytest.raises(ConfigError, match="fold_idx: an integer"): hold_out([{"image": "a", "fold": 0}], fold)


def test_empty_fold_is_an_error(lists):
    with pytest.raises(DataError, match=r"Task09: no case is in fold 9, there are folds \[0, 1, 2, 3, 4\]"):
        get_datalist_with_dataset_name("Task09", 9, json_dir=lists)
    with pytest.raises(DataError, match="no case of .'NLST'. is in fold 0"):
        get_datalist_with_dataset_name("NLST", 0, json_dir=lists)
    train, held = get_datalist_with_dataset_name(["NLST", "Task09"], 0, json_dir=lists)
    assert {i["dataset_name"] for i in held} == {"Task09"} and sum(i["dataset_name"] == "NLST" for i in train) == 3


def test_misspelt_fold_is_refused(tmp_path):
    write_json(tmp_path/"A_5_folds.json", {"training": [{"image": "a.nii.gz", "fold:": 0}]})
    with pytest.raises(FormatError, match="/training/0/fold:: unknown field 'fold:', did you mean 'fold'"):
        get_datalist_with_dataset_name(fold_idx=0, json_dir=tmp_path)


def test_holdout_fold_is_the_same(lists):
    def load(**k): return get_datalist_with_dataset_name("Task09", json_dir=lists, **k)
    assert load(fold_idx=2) == load(holdout_fold=2) == load(fold_idx=2, holdout_fold=2) != load()
    with pytest.raises(ConfigError, match="mean the same"): load(fold_idx=1, holdout_fold=2)
    with pytest.raises(ConfigError, match="holdout_fold"): load(holdout_fold="2")


# ------------------------------------------------------------------------------------------ parity with the reference

@pytest.mark.parametrize("name, fold", [*((n, f) for n in ("Task09", "BTCV-Abdomen", "VerSe") for f in (-1, 0, 3)),
                                        ("NLST", -1)])
def test_same_as_datafold_read(monai, lists, name, fold):
    "A1: items, order and names of MONAI's reader with upstream's layout below /data"
    from monai.auto3dseg.utils import datafold_read
    base = f"/data/{UPSTREAM_DIRS[name]}"
    theirs = datafold_read(str(lists/f"{name}_5_folds.json"), basedir=base, fold=fold)
    for part in theirs:
        for item in part:
            item["dataset_name"] = name
            for key, root in (("label_sv", "/workspace_infer/supervoxel_sam/"), ("pseudo_label", "/pl/")):
                if key in item: item[key] = item[key].replace("/data/", root, 1)
    ours = get_datalist_with_dataset_name(name, fold, json_dir=lists, roots={"pseudo_label": "/pl"})
    assert ours == tuple(map(tuple, theirs))
    assert [list(i) for i in ours[0]] == [list(i) for i in theirs[0]], "key order"


def test_testing_section_goes_to_the_first_tuple(monai, lists):
    from monai.auto3dseg.utils import datafold_read
    theirs = datafold_read(str(lists/"Task09_5_folds.json"), "/data/Task09", fold=0, key="testing")[0]
    train, held = get_datalist_with_dataset_name("Task09", 0, "testing", lists)
    assert [dict(i, dataset_name="Task09") for i in theirs] == list(train) and held == ()


def test_order_of_datasets(lists):
    assert list(find_datalists(lists)) == ["BTCV-Abdomen", "VerSe", "NLST", "Task09"] or \
        list(find_datalists(lists)) == [n for n in UPSTREAM_DIRS if (lists/f"{n}_5_folds.json").exists()]
    train, _ = get_datalist_with_dataset_name(["VerSe", "Task09"], json_dir=lists)
    assert list(dict.fromkeys(i["dataset_name"] for i in train)) == ["VerSe", "Task09"]


def test_signatures_are_upstreams():
    import inspect
    def names(f): return [p.name for p in inspect.signature(f).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    common = ["datasets", "fold_idx", "key", "json_dir", "base_dirs"]
    assert names(get_datalist_with_dataset_name) == common
    assert names(get_datalist_with_dataset_name_and_transform) == [
        "image_key", "label_key", "label_sv_key", "pseudo_label_key", "num_patches_per_image", "patch_size", *common]


def test_four_results(monai, lists):
    both = get_datalist_with_dataset_name_and_transform(*CALL.values(), ["Task09", "NLST"], 1, "training", lists)
    assert len(both) == 4 and both[:2] == get_datalist_with_dataset_name(["Task09", "NLST"], 1, json_dir=lists)
    assert [len(t.transforms) for t in both[2].values()] == [7, 7] and list(both[2]) == ["Task09", "NLST"]
    assert both[3] == {"Task09": None, "NLST": None}


def test_validation_transform(monai, lists):
    write_json(lists/"Own_5_folds.json", published("Own", validation_transform=[
        {"_target_": "Orientationd", "keys": ["@image_key"], "axcodes": "RAS"}]))
    *_, val = get_datalist_with_dataset_name_and_transform(**CALL, datasets="Own", json_dir=lists)
    assert [type(t).__name__ for t in val["Own"].transforms] == ["Orientationd"]


# -------------------------------------------------------------------------------------------------------------- paths

def test_D9_only_paths_are_joined():
    dl = parse_datalist({"training": [{"image": ["a.nii", "b.nii"], "region": "chest", "modality": ["CT", "PET"],
                                       "site": "", "age": 7, "notes": {"image": "x"}}]}, "D")
    item, = located_items(dl, "/base")
    assert item == {"image": ["/base/a.nii", "/base/b.nii"], "region": "chest", "modality": ["CT", "PET"], "site": "",
                    "age": 7, "notes": {"image": "x"}, "dataset_name": "D"}
    assert dl.training[0]["image"] == ["a.nii", "b.nii"], "the list itself is unchanged"
    assert located_items(dl, "/base", path_keys=("region",))[0]["region"] == "/base/chest"


@pytest.mark.parametrize("base_dirs", [{"Task09": "/mnt/a b/\u00fcbung"}, {"Task09": Path("/mnt/a b/\u00fcbung")}])
def test_D10_the_callers_base_dirs_count(lists, base_dirs):
    train, _ = get_datalist_with_dataset_name(json_dir=lists, base_dirs=base_dirs)
    assert train[0]["image"] == "/mnt/a b/\u00fcbung/imagesTr/Task09_0.nii.gz"
    assert {i["dataset_name"] for i in train} == {"Task09"}, "the table also says which data sets there are"


def test_base_dirs_as_one_folder(lists):
    train, _ = get_datalist_with_dataset_name(["BTCV-Abdomen", "Task09"], json_dir=lists, base_dirs="/mnt")
    assert {os.path.dirname(os.path.dirname(i["image"])) for i in train} == {"/mnt/BTCV/Abdomen", "/mnt/Task09"}


def test_D11_roots_need_no_data_prefix(lists):
    def pseudo(base, root):
        train, _ = get_datalist_with_dataset_name("BTCV-Abdomen", json_dir=lists, base_dirs={"BTCV-Abdomen": base},
                                                  roots={"pseudo_label": root})
        return os.path.dirname(os.path.dirname(train[0]["pseudo_label"]))
    assert pseudo("/mnt/btcv", "/pl") == "/pl/BTCV/Abdomen" == pseudo("/data/BTCV/Abdomen", {"/data/": "/pl/"})
    assert pseudo("/data/elsewhere", "/pl") == "/pl/elsewhere"
    assert pseudo("/mnt/btcv", "/pl/{dataset}/x") == "/pl/BTCV-Abdomen/x"
    assert pseudo("/mnt/btcv", {"BTCV-Abdomen": "/own"}) == "/own"
    assert pseudo("/mnt/btcv", {"Task09": "/own"}) == "/mnt/btcv"
    with pytest.raises(DataError, match="begins with none of"): pseudo("/mnt/btcv", {"/data/": "/pl/"})
    with pytest.raises(DataError, match="begins with none of"): pseudo("/database/x", {"/data": "/pl/"})


def test_D11_absolute_paths_are_not_silently_kept(lists):
    with pytest.raises(DataError, match="/training/.*/label_sv: .* is absolute, so the root"):
        get_datalist_with_dataset_name("Task09", json_dir=lists, roots={"label_sv": "/sv"})
    train, _ = get_datalist_with_dataset_name("Task09", json_dir=lists,
                                              roots={"label_sv": {"/workspace_infer/supervoxel_sam": "/sv"}})
    assert train[-1]["label_sv"] == "/sv/Task09_100/11/11_seg.nii.gz"
    with pytest.raises(DataError, match="is absolute, and absolute names were not allowed"):
        get_datalist_with_dataset_name("Task09", json_dir=lists, absolute=False)


def test_symbolic_links_that_leave_are_refused(tmp_path):
    (tmp_path/"base").mkdir()
    (tmp_path/"base"/"out").symlink_to(tmp_path)
    dl = DataList("D", ({"image": "out/x.nii.gz"},))
    with pytest.raises(DataError, match="D, /training/0/image: .*symbolic link"): located_items(dl, tmp_path/"base")
    (tmp_path/"base"/"x").mkdir()
    (tmp_path/"base"/"x"/"b.nii.gz").symlink_to(tmp_path/"secret")
    (tmp_path/"base"/"x"/"c.nii.gz").symlink_to(tmp_path/"base"/"x"/"a.nii.gz")
    assert len(located_items(DataList("D", ({"image": "x/a.nii.gz"}, {"image": "x/c.nii.gz"})), tmp_path/"base")) == 2
    for bad in ("x/b.nii.gz", "x/../../y", "x/a\0", "x\\a"):
        dl = DataList("D", ({"image": "x/a.nii.gz"}, {"image": bad}))
        with pytest.raises(DataError, match="D, /training/1/image: path"): located_items(dl, tmp_path/"base")


def test_relative_base_dir_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dl = DataList("D", ({"image": "x.nii.gz"},))
    assert located_items(dl, "data")[0]["image"] == str(tmp_path/"data"/"x.nii.gz")


def test_did_you_mean(lists):
    with pytest.raises(ConfigError, match="unknown name 'Task9', did you mean 'Task09'"):
        get_datalist_with_dataset_name("Task9", json_dir=lists)
    with pytest.raises(ConfigError, match="datasets: unknown name 'q', there are: A"):
        get_datalist_with_dataset_name("q", json_dir=lists, base_dirs={"A": "/a"})
    with pytest.raises(MissingFile, match="A_5_folds.json"):
        get_datalist_with_dataset_name("A", json_dir=lists, base_dirs={"A": "/a"})
    with pytest.raises(ConfigError, match="json_dir"): get_datalist_with_dataset_name("A")
    with pytest.raises(MissingFile, match="not a folder"): get_datalist_with_dataset_name("A", json_dir="/nowhere")


def test_several_numbers_of_folds(lists):
    write_json(lists/"Task09_3_folds.json", {"training": []})
    assert find_datalists(lists)["Task09"].name == "Task09_5_folds.json"
    for k in (3, 4): write_json(lists/f"New_{k}_folds.json", {"training": []})
    with pytest.raises(DataError, match="New has several lists"): find_datalists(lists)


def test_A14_unlabelled_and_multichannel_items(lists):
    write_json(lists/"Mix_5_folds.json", {"training": [
        {"image": ["t1.nii", "t2.nii"], "pseudo_label": "p.nii", "fold": 0, "region": "head/neck"},
        {"image": "u.nii"}]})
    train, held = get_datalist_with_dataset_name("Mix", 0, json_dir=lists, base_dirs="/b")
    assert train == ({"image": "/b/Mix/u.nii", "dataset_name": "Mix"},)
    assert held[0]["image"] == ["/b/Mix/t1.nii", "/b/Mix/t2.nii"] and held[0]["region"] == "head/neck"
    assert "label" not in held[0]


# --------------------------------------------------------------------------------------------------- no code in lists

REFS = {"image_key": "image", "patch_size": (8, 8, 8), "num_patches_per_image": 2}


def zoom(**more) -> dict: return {"_target_": "RandZoomd", "keys": "@image_key", **more}


def attacks(canary: str) -> list:
    "40 ways to have a list executed (fault row 4); each would create the file `canary`"
    touch = f"open('{canary}', 'w').close()"
    shell = f"touch {canary}"
    expressions = [
        f"${touch}", f"$__import__('os').system('{shell}')", "$import os", f"$import os; os.system('{shell}')",
        f"$exec({touch!r})", f"$eval({touch!r})", f"$ {touch}", f"$tuple(float(i >= 0) for i in range(133)) or {touch}",
        f"$tuple(float(i >= 0) for i in range(133)); {touch}", f"$tuple(float({touch} or i >= 0) for i in range(3))",
        "$tuple(float(i >= 0) for i in range(10**12))", "$tuple(float(i >= 0) for i in range(9999999999))",
        f"$().__class__.__base__.__subclasses__() and {touch}", f"$[x for x in [{touch}]]", f"$(lambda: {touch})()",
        f"$subprocess.run(['touch', '{canary}'])", "$@image_key.__class__.__mro__", f"$monai.utils.{touch}",
        "().__class__.__bases__[0].__subclasses__()", "__import__", "@image_key.__class__", "@unknown_reference",
        "@image_key::upper", f"%{canary}", "%/etc/passwd#0", f"!!python/object/apply:os.system ['{shell}']",
        "!!python/name:os.system", "{{7*7}}", "${jndi:ldap://host/a}"]
    as_argument = [zoom(prob=e) for e in expressions]
    as_target = [{"_target_": t, "args": [shell], "keys": "image"} for t in (
        "os.system", "subprocess.run", "subprocess.Popen", "builtins.eval", "builtins.exec", "$os.system", "eval",
        "monai.transforms.Lambdad", "monai.transforms.utility.dictionary.Lambdad", "monai.bundle.ConfigParser",
        "LoadImaged", "SaveImaged", "torch.load", "pickle.loads", "RandZoomd.__init__.__globals__",
        "monai.transforms.os.system", "RandZoomd\n", "randzoomd")]
    nested = [zoom(prob={"_target_": "os.system", "command": shell}), zoom(prob=[{"_target_": "builtins.eval"}]),
              zoom(**{"__class__": "x"}), zoom(**{"_requires_": f"${touch}"}), zoom(**{"_mode_": "debug"}),
              zoom(mode={"$x": 1}), zoom(mode={"__init__": 1}), {"_target_": ["os.system"]}, [], None, "RandZoomd",
              {"keys": "image"}]
    return as_argument + as_target + nested


@pytest.mark.parametrize("k", range(len(attacks("x"))))
def test_row_04_executable_content(k, tmp_path):
    canary = tmp_path/"canary"
    attack = attacks(str(canary))[k]
    at = "/training_transform/1"
    with pytest.raises(ConfigError) as refused: materialise([zoom(prob=0.1), attack], REFS, where="list.json")
    assert at in str(refused.value) and "list.json" in str(refused.value) and not canary.exists()
    assert all(p.startswith(at) for p in transform_problems([zoom(), attack], REFS))


def test_row_04_has_enough_attacks(): assert len(attacks("x")) >= 40


def test_D12_loading_a_list_executes_nothing(lists, tmp_path):
    canary = tmp_path/"canary"
    for config in ([a] for a in attacks(str(canary)) if isinstance(a, dict)):
        write_json(lists/"Evil_5_folds.json", published("Evil", training_transform=config))
        train, _ = get_datalist_with_dataset_name("Evil", json_dir=lists)
        assert len(train) == 12
        with pytest.raises(ConfigError, match="data list 'Evil'.*/training_transform/0"):
            get_datalist_with_dataset_name_and_transform(**CALL, datasets="Evil", json_dir=lists)
    assert not canary.exists()


def test_D12_refusing_needs_no_monai(lists):
    write_json(lists/"Evil_5_folds.json", published("Evil", training_transform=[{"_target_": "os.system"}]))
    code = ("import sys; from medvol_nb.loading import *\n"
            "try: get_datalist_with_dataset_name_and_transform(*'abcd', 1, 1, 'Evil', json_dir=sys.argv[1])\n"
            "except ValueError as e: print('monai' in sys.modules, 'os.system' in str(e))")
    path = os.pathsep.join([str(Path(loading.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code, lists], text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_trust_is_logged_and_hands_over(monai, caplog):
    config = [zoom(prob="$0.1 + 0.1", min_zoom="@low")]
    with pytest.raises(ConfigError, match="not evaluated"): materialise(config, {**REFS, "low": 0.7})
    with caplog.at_level(logging.WARNING, "medvol_nb"):
        made, = materialise(config, {**REFS, "low": 0.7}, trust=True, where="mine.json")
    assert abs(made.prob - 0.2) < 1e-9 and made.rand_zoom.min_zoom == (0.7,)
    assert "mine.json" in caplog.text and "trust=True" in caplog.text


def test_all_seven_published_transforms(monai):
    assert transform_problems(json.loads(json.dumps(published_transform())), CALL) == []
    made = materialise(published_transform(), CALL)
    assert [type(t).__name__ for t in made] == [
        "RandCropByLabelClassesd", "RandZoomd", "RandSimulateLowResolutiond", "RandGaussianSmoothd",
        "RandScaleIntensityd", "RandShiftIntensityd", "RandGaussianNoised"]
    crop = made[0].cropper
    assert crop.ratios == (1.0,)*133 and crop.num_samples == 2 and made[0].label_key == "pseudo_label"
    assert list(made[0].keys) == ["image", "label", "pseudo_label", "label_sv"]


def test_same_objects_as_monais_parser(monai):
    "What the interpreter makes of the published configuration is what upstream's parser makes of it"
    ours, theirs = (materialise(published_transform(), CALL, trust=t) for t in (False, True))

    def plain(obj, depth=0):
        if depth > 3 or not hasattr(obj, "__dict__"): return repr(obj) if isinstance(obj, (str, int, float)) else obj
        return {k: plain(v, depth + 1) for k, v in vars(obj).items() if k not in ("R", "id") and not callable(v)}
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        left, right = plain(a), plain(b)
        assert left.keys() == right.keys()
        for k, v in left.items():
            if isinstance(v, (str, int, float, tuple, list)): assert v == right[k], (type(a), k)


def test_every_allowed_transform_exists(monai):
    assert [n for n in loading.TRANSFORMS if not hasattr(monai, n)] == []
    import inspect
    reading = {"LoadImaged", "SaveImaged", "Lambdad", "RandLambdad", "TorchVisiond", "TorchIOd", "Invertd",
               "WriteFileMappingd", "SaveClassificationd"}
    assert not reading & loading.TRANSFORMS
    for n in loading.TRANSFORMS: assert inspect.getmodule(getattr(monai, n)).__name__.startswith("monai.transforms.")


@pytest.mark.parametrize("target", ["RandZoomd", "RandZoomD", "RandZoomDict", "monai.transforms.RandZoomd",
                                    "monai.transforms.spatial.dictionary.RandZoomD"])
def test_spellings_of_a_target(target):
    assert transform_problems([{"_target_": target, "keys": ["@image_key"], "_desc_": "why"}], REFS) == []


@pytest.mark.parametrize("text, value", [
    ("$tuple(float(i >= 0) for i in range(133))", (1.0,)*133),
    ("$tuple(float(i >= 2) for i in range(4))", (0.0, 0.0, 1.0, 1.0)),
    ("$tuple(float(i > 0) for i in range(3))", (0.0, 1.0, 1.0)), ("$tuple(float(i >= 0) for i in range(0))", ())])
def test_family_of_ratios(text, value):
    problems: list[str] = []
    assert loading._literal(text, "/x", {}, problems) == value and problems == []
    assert len(text) < 40 or value == eval(text[1:])


@pytest.mark.parametrize("value", [None, True, 3, -0.5, "bilinear", "", "monai.x", [1, [2, (3, "a")]], {"a": [1]},
                                   "\u00e4 b", "1e-3"])
def test_literals_stay(value):
    problems: list[str] = []
    assert loading._literal(value, "", {}, problems) == value and problems == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"x", {1: 2}, "a\nb", "a\0", "a;b", "a()"])
def test_what_is_no_literal(value): assert transform_problems([zoom(prob=value)], REFS)


def test_deep_nesting_is_bounded():
    deep: list = []
    for _ in range(500): deep = [deep]
    assert "more than 20 levels" in transform_problems([zoom(prob=deep)], REFS)[0]


def test_wrong_arguments(monai):
    with pytest.raises(ConfigError, match="/t/0/prop: argument of RandZoomd: unknown name 'prop', did you mean 'prob'"):
        materialise([zoom(prop=1)], REFS, at="/t")
    with pytest.raises(ConfigError, match="RandZoomd refuses its arguments"):
        materialise([zoom(min_zoom=[1, 2, 3], max_zoom=[1])], REFS)
    with pytest.raises(ConfigError, match="a list of transforms is needed"):
        materialise({"_target_": "RandZoomd"}, REFS)


def test_missing_training_transform(lists):
    write_json(lists/"Bare_5_folds.json", {"training": [{"image": "a.nii.gz"}]})
    with pytest.raises(ConfigError, match="'Bare': has no training_transform.*published_transform"):
        get_datalist_with_dataset_name_and_transform(**CALL, datasets="Bare", json_dir=lists)


def test_a_hundred_thousand_cases(tmp_path):
    import time
    items = [{"image": f"imagesTr/{k}.nii.gz", "label": f"labelsTr/{k}.nii.gz", "fold": k % 5} for k in range(100_000)]
    write_json(tmp_path/"Big_5_folds.json", {"training": items})
    begin = time.process_time()
    train, held = get_datalist_with_dataset_name(fold_idx=0, json_dir=tmp_path, base_dirs=tmp_path)
    assert (len(train), len(held)) == (80_000, 20_000)
    assert time.process_time() - begin < 8
