"""Rows 3, 4, 6 and 7: data lists from outside that are wrong, hostile or inconsistent."""

import shutil
from dataclasses import replace

import numpy as np

from medvol_nb import phantoms
from medvol_nb.core import ConfigError, DataError, FormatError, MedvolError
from medvol_nb.datalists import DataList, parse_datalist, write_datalist
from medvol_nb.labels import LabelSpace
from medvol_nb.loading import materialise
from medvol_nb.verify import verify
from medvol_nb.volume import Volume, affine_from, write_volume

from .rows import SilentlyWrong


def listed(changes=None, labels=None):
    items = [{"image": f"i{k}.nii.gz", "label": f"l{k}.nii.gz", "fold": k % 5} for k in range(20)]
    if changes:
        items[12] = {**items[12], **changes}
    return {"training": items, "testing": [], "label_dict": {"1": "liver"} if labels is None else labels}


def test_row_03_wrong_types(instances):
    "Refused with the JSON pointer of the value"
    parse_datalist(listed(), "X", "X.json")
    for fold in ("0", -1, 1.5, True, None, [0], {}, 1e3):
        with instances.refuses(f"fold {fold!r}", MedvolError, "X.json", "/training/12/fold"):
            parse_datalist(listed({"fold": fold}), "X", "X.json")
    for image in (7, None, True, {}, [], [3], "", ["a.nii.gz", None]):
        with instances.refuses(f"image {image!r}", MedvolError, "X.json", "/training/12/image"):
            parse_datalist(listed({"image": image}), "X", "X.json")
    for key, name in (("1.5", "a"), ("-1", "a"), ("x", "a"), ("1", 3), ("1", ""), ("99999999999", "a")):
        with instances.refuses(f"label {key!r}: {name!r}", MedvolError, "X.json", "/label_dict"):
            parse_datalist(listed(labels={key: name}), "X", "X.json")
    for reliability in (2, "1"):
        with instances.refuses(f"reliability {reliability!r}", MedvolError, "X.json", "/training/12/pseudo_label_rel"):
            parse_datalist(listed({"pseudo_label_reliability": reliability}), "X", "X.json")
    instances.check(24)


def test_row_04_executable_content(instances, tmp_path):
    "Refused, and nothing is run: the canary is never made"
    canary = tmp_path / "canary"
    run = f"open({str(canary)!r}, 'w')"
    strings = [
        f"${run}",
        f"$import os; {run}",
        f"$__import__('pathlib').Path({str(canary)!r}).touch()",
        f"$[{run}]",
        f"$(lambda: {run})()",
        f"${run} and (1,)",
        "$tuple(float(i >= 0) for i in range(10**9))",
        f"$tuple({run} for i in range(1))",
        "$exec('1')",
        "$globals()",
        "$().__class__.__base__.__subclasses__()",
        "$@patch_size.__class__",
        f"$tuple(float(i >= 0) for i in range(133)) + ({run},)",
        "$ 1",
        "$",
    ]
    targets = [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "builtins.exec",
        "pathlib.Path.touch",
        "monai.bundle.run",
        "monai.transforms.utils.os.system",
        "torch.load",
        "pickle.loads",
        "importlib.import_module",
        "__import__",
        "monai.transforms.__class__",
        "Lambda",
        "monai.transforms.Lambdad",
        "shutil.rmtree",
    ]
    for text in strings:
        with instances.refuses(text, MedvolError, "/training_transform/0"):
            materialise(
                [{"_target_": "RandScaleIntensityd", "keys": ["image"], "factors": text}], {"patch_size": (8, 8, 8)}
            )
    for target in targets:
        with instances.refuses(target, MedvolError, "/training_transform/0"):
            materialise([{"_target_": target, "command": f"touch {canary}", "args": [f"touch {canary}"]}])
    nested = [
        {"_target_": "os.system"},
        [{"_target_": "os.system"}],
        {"a": {"_target_": "os.system"}},
        "@__class__",
        "@patch_size::__class__",
        "%/etc/passwd",
        {"_mode_": "debug"},
        {"_requires_": f"${run}"},
        {"_disabled_": f"${run}"},
        {"__class__": 1},
    ]
    for value in nested:
        with instances.refuses(str(value), MedvolError, "/training_transform/0"):
            materialise(
                [{"_target_": "RandScaleIntensityd", "keys": ["image"], "factors": value}], {"patch_size": (8,) * 3}
            )
    assert not canary.exists()
    instances.check(40)


FAULTS = {
    "E102": "image without label",
    "E101": "label without image",
    "E103": "same image twice",
    "E402": "same patient in two folds",
    "E202": "shape mismatch",
    "E203": "affine mismatch",
    "E303": "value outside the dictionary",
    "W305": "all-background label",
    "W306": "NaN voxels",
}


def test_row_06_all_findings_in_one_table(instances, tmp_path):
    "Twelve of each kind in one list, all of them reported, and no sound case accused"
    items, count = [], 12
    for n in range(count * (len(FAULTS) + 1)):
        code = [None, *FAULTS][n // count]
        p = phantoms.abdomen(shape=(12, 10, 11), seed=n)
        img, lbl = (Volume(a, affine_from(p.spacing)) for a in (p.img, (p.lbl > 0).astype(np.uint8)))
        if code == "E202":
            lbl = replace(lbl, data=lbl.data[:-1])
        if code == "E203":
            lbl = replace(lbl, affine=affine_from(p.spacing, (0, 0, 99)))
        if code == "E303":
            lbl = replace(lbl, data=lbl.data * 9)
        if code == "W305":
            lbl = replace(lbl, data=lbl.data * 0)
        if code == "W306":
            img = replace(img, data=np.where(lbl.data > 0, np.nan, img.data.astype(np.float32)))
        if code != "E101":
            write_volume(img, tmp_path / f"i{n}.nii.gz")
        if code != "E102":
            write_volume(lbl, tmp_path / f"l{n}.nii.gz")
        item = {"image": f"i{n}.nii.gz", "label": f"l{n}.nii.gz", "fold": n % 5, "subject": f"p{n}"}
        items.append(item)
        if code == "E103":
            items.append(dict(item))
        if code == "E402":
            twin = {**item, "image": f"i{n}b.nii.gz", "label": f"l{n}b.nii.gz", "fold": (n + 1) % 5}
            other = phantoms.abdomen(shape=(12, 10, 11), seed=1000 + n)
            write_volume(Volume(other.img, img.affine), tmp_path / twin["image"])
            shutil.copy(tmp_path / item["label"], tmp_path / twin["label"])
            items.append(twin)
    path = tmp_path / "X.json"
    write_datalist(DataList("X", tuple(items), (), {1: "organ"}, {}, extra={}), path)
    report = verify([path], level="full")
    sound = {f"training/{k}" for k in range(count)}
    for code, name in FAULTS.items():
        for n in range(count):
            with instances(f"{name}, {n}"):
                if report.counts.get(code) != count:
                    raise SilentlyWrong(f"{code}: {report.counts}")
    assert not report.ok and not sound & {r["item"] for r in report.findings}
    instances.check(count * len(FAULTS))


def test_row_07_label_dictionaries(instances, tmp_path):
    "Gaps are fine; what cannot be a label space is refused with every name"
    space = LabelSpace.shipped()
    with instances("gaps"):
        names = space.class_names()
        assert [k for k, n in enumerate(names) if n is None] == [2, 16, 18, 20, 21, 129, 130, 131]
    with instances("new classes leave old ids alone"):
        larger = space.extended("New", {1: "dragon", 2: "liver"})
        assert all(larger.to_label_dict()[n] == k for n, k in space.to_label_dict().items())
    (tmp_path / "twice.json").write_text('{"liver": 1, "spleen": 1}')
    with instances.refuses("one id twice", MedvolError, "liver", "spleen"):
        LabelSpace.from_files(tmp_path / "twice.json")
    (tmp_path / "same.json").write_text('{"liver": 1, "liver": 2}')
    with instances.refuses("one name twice", FormatError, "liver"):
        LabelSpace.from_files(tmp_path / "same.json")
    (tmp_path / "zero.json").write_text('{"liver": 0}')
    with instances.refuses("background as class", MedvolError, "liver"):
        LabelSpace.from_files(tmp_path / "zero.json")
    missing = {k: f"unheard of {k}" for k in range(1, 9)}
    with instances.refuses("eight unknown names", (ConfigError, DataError), *missing.values()):
        space.extended("X", missing, unknown="error")
    instances.check(6)
