"""Rows 3 to 7: data lists from outside: wrong, hostile, inconsistent, or just as other projects publish them."""

import json
import shutil
from dataclasses import replace

import numpy as np

from medvol_nb import phantoms
from medvol_nb.convert import from_msd, from_nnunet, kind_of, to_msd, to_nnunet
from medvol_nb.core import ConfigError, DataError, FormatError, MedvolError, write_json
from medvol_nb.datalists import DataList, parse_datalist, read_datalist, write_datalist
from medvol_nb.labels import LabelSpace
from medvol_nb.loading import located_items, materialise, published_transform
from medvol_nb.recipes import load_recipe, make_datalists
from medvol_nb.splits import legacy_split
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


# The published lists: cases for training and testing, names of image and label (made up where the data set has no rule)
LABELLED = {
    "AMOS22": (240, 60, "imagesTr/amos_{:04}.nii.gz", "labelsTr/amos_{:04}.nii.gz"),
    "AbdomenCT-1K": (800, 200, "AbdomenCT-1K-ImagePart1/Case_{:05}_0000.nii.gz", "Mask/Case_{:05}.nii.gz"),
    "AeroPath": (22, 5, "{0}/{0}_CT_HR.nii.gz", "{0}/{0}_CT_HR_label.nii.gz"),
    "BTCV-Abdomen": (24, 6, "RawData/Training/img/img{:04}.nii.gz", "RawData/Training/label/label{:04}.nii.gz"),
    "BTCV-Cervix": (24, 6, "FixedData/Training/img/{:07}-Image.nii.gz", "FixedDataV2/Training/label/{:07}-Mask.nii.gz"),
    "CRLM-CT": (158, 39, "CRLM-CT-{}/ct.nii.gz", "CRLM-CT-{}/mask.nii.gz"),
    "CT-ORG": (109, 27, "OrganSegmentations/volume-{}.nii.gz", "OrganSegmentations/labels-{}.nii.gz"),
    "CTPelvic1K-CLINIC": (
        94,
        23,
        "CTPelvic1K_dataset6_data/dataset6_CLINIC_{:04}_data.nii.gz",
        "ipcai2021_dataset6_Anonymized/dataset6_CLINIC_{:04}_mask_4label.nii.gz",
    ),
    "FLARE22": (40, 10, "images/FLARE22_Tr_{:04}_0000.nii.gz", "labels/FLARE22_Tr_{:04}.nii.gz"),
    "Multi-organ-Abdominal-CT-btcv": (38, 9, "images_btcv/img{:04}.nii", "label_btcv_multiorgan/label{:04}.nii"),
    "Multi-organ-Abdominal-CT-tcia": (
        34,
        9,
        "images_tcia/PANCREAS_{:04}.nii",
        "label_tcia_multiorgan+rkidney/label{:04}.nii",
    ),
    "Pancreas-CT": (
        64,
        16,
        "manifest-1599750808610/nifti/PANCREAS_{:04}.nii.gz",
        "TCIA_pancreas_labels-02-05-2017/label{:04}.nii.gz",
    ),
    "Task03": (105, 26, "imagesTr/liver_{}.nii.gz", "labelsTr/liver_{}.nii.gz"),
    "Task06": (50, 13, "imagesTr/lung_{:03}.nii.gz", "labelsTr/lung_{:03}.nii.gz"),
    "Task07": (225, 56, "imagesTr/pancreas_{:03}.nii.gz", "labelsTr/pancreas_{:03}.nii.gz"),
    "Task08": (242, 61, "imagesTr/hepaticvessel_{:03}.nii.gz", "labelsTr/hepaticvessel_{:03}.nii.gz"),
    "Task09": (33, 8, "imagesTr/spleen_{}.nii.gz", "labelsTr/spleen_{}.nii.gz"),
    "Task10": (101, 25, "imagesTr/colon_{:03}.nii.gz", "labelsTr/colon_{:03}.nii.gz"),
    "TotalSegmentatorV2": (980, 248, "s{:04}/ct.nii.gz", "s{:04}/seg.nii.gz"),
    "VerSe": (
        299,
        75,
        "dataset-01training/rawdata/sub-verse{0:03}/sub-verse{0:03}_ct.nii.gz",
        "dataset-01training/derivatives/sub-verse{0:03}/sub-verse{0:03}_seg-vert_msk.nii.gz",
    ),
}
UNLABELLED = {  # cases, image, data set and region as the lists write them, folder of supervoxels
    "Covid19": (524, "data/volume-covid19-A-{:04}.nii.gz", "tcia_covid19", "chest", "covid19_100"),
    "LIDC": (422, "Image_LIDC/LIDC-IDRI-{:04}_0.nii.gz", "LIDC", "chest", "lidc_100"),
    "NLST": (3113, "{:06}/2_0opasevzoomb50f36021206030na.nii.gz", "NLST", "chest", "nlst"),
    "StonyBrook-CT": (1274, "A{:06}/2_standard_25mm.nii.gz", "Stony_Brook", "all", "sb_ct_100"),
    "TCIA_Colon": (1440, "images/img_{}.nii.gz", "tcia_colon", "Abdomen", "tcia_colon_100"),
}


def supervoxels(folder, image):
    stem = image.split("/")[-1].split(".")[0]
    return f"/workspace_infer/supervoxel_sam/{folder}/{stem}/{stem}_seg.nii.gz"


def published(name):
    "What the list of a data set holds, in the order of keys in which it was published"
    if name in UNLABELLED:
        n, image, dataset, region, folder = UNLABELLED[name]
        items = []
        for i in (image.format(k) for k in range(1, n + 1)):
            more = {"dataset": f"/data/{name}/{dataset}", "region": f"/data/{name}/{region}"}
            items.append({"image": i, "pseudo_label": i, **more, "label_sv": supervoxels(folder, i)})
        return {"training": items, "training_transform": published_transform()}
    n_training, n_testing, image, label = LABELLED[name]
    pairs = sorted((label.format(k), image.format(k)) for k in range(1, n_training + n_testing + 1))
    if name == "TotalSegmentatorV2":  # its folds were made by hand
        test, folds = range(980, 1228), [range(k, 980, 5) for k in range(5)]
    else:
        test, folds = legacy_split(len(pairs))
    items = []
    for fold, k in ((f, k) for f, part in enumerate(folds) for k in part):
        item = {"image": pairs[k][1], "pseudo_label": pairs[k][1], "label": pairs[k][0], "fold": fold}
        if name != "TotalSegmentatorV2":
            item["pseudo_label_reliability"] = k % 2
            if fold and k % 7:  # the held-out fold has none, and some others lack it
                item["label_sv"] = supervoxels(f"{name}_100", pairs[k][1])
        items.append(item)
    recipe = load_recipe(name)
    original = recipe.original_label_dict or recipe.label_dict
    names = {key: {str(k): v for k, v in d.items()} for key, d in
             (("label_dict", recipe.label_dict), ("original_label_dict", original))}
    testing = [{"image": pairs[k][1], "label": pairs[k][0]} for k in test]
    return {"training": items, "training_transform": published_transform(), **names, "testing": testing}


def check(holds, what):
    if not holds:
        raise SilentlyWrong(what)


def test_row_05_published_lists(instances, tmp_path):
    """Lists in the form of the 25 that VISTA3D publishes are read, and written back to equal content

    They are generated: the fields, the order of keys, the transforms, the numbers of cases, the split, the class names
    and the odd paths are those of the published files; which case has which number and a reliable pseudo label is not.
    """
    space, root = LabelSpace.shipped(), tmp_path / "data"
    for name in [*LABELLED, *UNLABELLED]:
        with instances(name):
            content, source, copy = published(name), tmp_path / f"{name}_5_folds.json", tmp_path / f"{name}.json"
            source.write_text(json.dumps(content, indent=4))
            dl = read_datalist(source)
            counts = LABELLED[name][:2] if name in LABELLED else (UNLABELLED[name][0], 0)
            check(dl.name == name and (len(dl.training), len(dl.testing)) == counts, f"cases: {counts}")
            check(list(dl.folds()) == (list(range(5)) if name in LABELLED else []), f"folds: {dl.folds()}")
            write_datalist(dl, copy)
            check(json.loads(copy.read_text()) == content, "the content changed on the way")
            first = copy.read_bytes()
            write_datalist(read_datalist(copy), copy, "overwrite")
            check(copy.read_bytes() == first and read_datalist(copy).items() == dl.items(), "a second time")
            check(set(space.mapping(name) if name in LABELLED else ()) <= set(dl.label_dict), "label ids")
            check(len(located_items(dl, root)) == counts[0], "paths")
            references = {f"{k}_key": k for k in ("image", "label", "pseudo_label", "label_sv")}
            more = {"num_patches_per_image": 2, "patch_size": (8, 8, 8)}
            check(len(materialise(dl.training_transform, {**references, **more})) == 7, "transforms")
            if name == "AeroPath":  # cases 1 to 27 are all there are, so these folds are the published ones
                held_out = [int(i["image"].split("/")[0]) for i in dl.training if i["fold"] == 0]
                check(held_out == [8, 6, 14, 16, 15], f"fold 0: {held_out}")
    instances.check(25)


def test_row_05_other_formats(instances, tmp_path):
    "Examples of the Decathlon, nnU-Net 1 and 2 and BIDS are read, and written back to equal content"
    cases = [f"spleen_{k}" for k in (2, 3, 6, 9, 10)]
    pairs = [{"image": f"imagesTr/{c}.nii.gz", "label": f"labelsTr/{c}.nii.gz"} for c in cases]
    about = {"name": "Spleen", "description": "Spleen Segmentation", "tensorImageSize": "3D", "licence": "CC-BY-SA 4.0"}
    listed = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
        "numTraining": 5,
        "numTest": 1,
        "training": [{k: f"./{p}" for k, p in pair.items()} for pair in pairs],
        "test": ["./imagesTs/spleen_1.nii.gz"],
    }
    splits = [{"train": [c for c in cases if c != v], "val": [v]} for v in cases]
    with instances("Decathlon"):
        folder = tmp_path / "Task09_Spleen"
        folder.mkdir()
        write_json(folder / "dataset.json", {**about, **listed})
        dl = from_msd(folder)
        check(kind_of(folder) == "msd" and list(dl.training) == pairs and dl.label_dict == {1: "spleen"}, "cases")
        check(dl.testing == ({"image": "imagesTs/spleen_1.nii.gz"},) and dl.extra["licence"] == "CC-BY-SA 4.0", "rest")
        to_msd(dl, folder / "again.json")
        check(from_msd(folder / "again.json") == dl, "the content changed on the way")
    for version in (1, 2):
        with instances(f"nnU-Net {version}"):
            folder = tmp_path / f"Dataset009_Spleen{version}"
            names = {"labelsTr": "{}.nii.gz", "imagesTr": "{}_0000.nii.gz", "imagesTs": "{}_0000.nii.gz"}
            for sub, form in names.items():
                (folder / sub).mkdir(parents=True)
                for c in ["spleen_1"] if sub == "imagesTs" else cases:
                    (folder / sub / form.format(c)).write_text(c)
            two = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1}, "numTraining": 5}
            two["file_ending"] = ".nii.gz"
            write_json(folder / "dataset.json", {**about, **listed} if version == 1 else two)
            write_json(folder / "splits_final.json", splits)
            dl = from_nnunet(folder)
            stored = {c: {"image": f"imagesTr/{c}_0000.nii.gz", "label": f"labelsTr/{c}.nii.gz"} for c in cases}
            found = {i["label"][9:-7]: {k: i[k] for k in ("image", "label")} for i in dl.training}
            check(kind_of(folder) == "nnunet" and found == stored and dl.label_dict == {1: "spleen"}, "cases")
            check({i["label"][9:-7]: i["fold"] for i in dl.training} == {c: k for k, c in enumerate(cases)}, "folds")
            check(dl.testing == ({"image": "imagesTs/spleen_1_0000.nii.gz"},), "test cases")
            to_nnunet(dl, tmp_path / f"again{version}", folder, version, "copy", channel_names=["CT"])
            again = from_nnunet(tmp_path / f"again{version}", name=dl.name)
            check(again.items() == dl.items() and again.label_dict == dl.label_dict, "the content changed on the way")
    with instances("BIDS"):
        folder, expected = tmp_path / "ds000117", {}
        for k in range(1, 13):
            image = f"sub-{k:02}/anat/sub-{k:02}_T1w.nii.gz"
            label = f"derivatives/manual/sub-{k:02}/anat/sub-{k:02}_T1w_label-lesion_dseg.nii.gz"
            expected[image] = label
            for p in (image, label):
                (folder / p).parent.mkdir(parents=True, exist_ok=True)
                (folder / p).touch()
        made = make_datalists(folder, tmp_path, recipe="bids")
        dl = read_datalist(made["path"])
        check({i["image"]: i["label"] for i in dl.items()} == expected, "pairs")
        write_datalist(dl, tmp_path / "bids.json")
        check(replace(read_datalist(tmp_path / "bids.json"), name=dl.name) == dl, "the content changed on the way")
    instances.check(4)


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
