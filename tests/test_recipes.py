"""Pages 11d and 12: pairing by key, the recipes of 42 data sets, layouts, and the making of lists.

The parity tests compare with a literal implementation of the reference's way, kept here: walk, sort, derive the image
path by string operations, zip, partition. Files are empty: pairing reads names only.
"""
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medvol_nb.pairing as pairing
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OutputExists
from medvol_nb.datalists import read_datalist
from medvol_nb.recipes import detect_recipe, load_recipe, make_datalists, recipe_names, scan, worded

SEED = 20230808


def touch(root: Path, *names: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        (root/n).touch()
    return root


def spleens(root: Path, n: int = 12) -> Path:
    return touch(root, *(f"{f}/spleen_{k}.nii.gz" for k in range(n) for f in ("imagesTr", "labelsTr")))


# -------------------------------------------------------------------------------- the reference's way, literally

def walk(root: Path, folder: str, suffix: str, regex: str = "") -> list[str]:
    "Files below a folder by suffix and a regex on the full path, sorted by full path; relative to the root"
    found = [os.path.join(d, f) for d, _, names in os.walk(root/folder) for f in names if f.endswith(suffix)]
    return [os.path.relpath(f, root) for f in sorted(f for f in found if not regex or re.search(regex, f))]


def partition(n: int) -> tuple[list[int], list[list[int]]]:
    "Test positions and folds, as the specification says them"
    idx = list(range(n))
    np.random.RandomState(SEED).shuffle(idx)
    n_train, n_test = int(0.8*n + 0.5), int(0.2*n + 0.5)
    train, test = idx[:n_train], idx[n_train:min(n, n_train + n_test)]
    place = list(range(len(train)))
    np.random.RandomState(SEED).shuffle(place)
    return test, [[train[k] for k in place[f::5]] for f in range(5)]


def reference_json(images: list[str], labels: list[str], label_dict: dict, original: dict | None = None) -> str:
    items = [{"image": i, "label": l} for i, l in zip(images, labels)]
    test, folds = partition(len(items))
    data = {"training": [{**items[k], "fold": f} for f, part in enumerate(folds) for k in part],
            "testing": [items[k] for k in test], "label_dict": label_dict}
    return json.dumps(data | {"original_label_dict": original or label_dict}, indent=4)


def our_json(path: str) -> str:
    data = json.loads(Path(path).read_text())
    assert data.pop("provenance")["tool"].startswith("medvol_nb ")
    return json.dumps(data, indent=4)


def first(root: Path, folders: list[str], name: str) -> str:
    return next(f"{f}/{name}" for f in folders if (root/f/name).exists())


def other(root: Path, label: str, *words: str) -> str:
    "The first other file in the label's folder without any of the words in its name"
    folder = os.path.dirname(label)
    names = sorted(n for n in os.listdir(root/folder) if n.endswith(".nii.gz"))
    return os.path.join(folder, next(n for n in names if not any(w in n for w in words)))


def num(text: str, pattern: str) -> str: return re.search(pattern, text)[1]


TR, BOTH = ("imagesTr", "labelsTr"), ("images", "labels")
IDS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 19, 21, 100, 101, 102, 110, 1000]  # their text order is not their order
VERSE = ["dataset-01training", "dataset-02validation", "dataset-03test", "dataset-verse19test",
         "dataset-verse19training", "dataset-verse19validation"]
ULS = "processed_data/partially_annotated/DeepLesion"


def ids(fmt: str, *also: str) -> list[str]: return [a.format(k) for k in IDS for a in (fmt, *also)]


# name -> (files, [searches], image of a label); searches are (folder, suffix, regex)
LITERAL = {
    "AbdomenCT-1K": (
        ids("Mask/Case_{:05}.nii.gz") + [f"AbdomenCT-1K-ImagePart{1 + k % 3}/Case_{k:05}_0000.nii.gz" for k in IDS],
        [("Mask", ".nii.gz", "")],
        lambda r, l: first(r, [f"AbdomenCT-1K-ImagePart{k}" for k in (1, 2, 3)],
                           f"Case_{num(l, r'Case_([0-9]+).nii')}_0000.nii.gz")),
    "FLARE22": (ids("labels/FLARE22_Tr_{:04}.nii.gz", "images/FLARE22_Tr_{:04}_0000.nii.gz"),
                [("labels", ".nii.gz", "")],
                lambda r, l: f"images/FLARE22_Tr_{num(l, r'Tr_([0-9]+).nii')}_0000.nii.gz"),
    "AMOS22": (
        [f"{x}{'Va' if k % 3 else 'Tr'}/amos_{k:04}.nii.gz" for k in [*IDS, 499, 500, 507] for x in BOTH],
        [("labelsTr", ".nii.gz", "amos_0[0-4]"), ("labelsVa", ".nii.gz", "amos_0[0-4]")],
        lambda r, l: first(r, ["imagesTr", "imagesVa"], os.path.basename(l))),
    "MR_AMOS22": (
        [f"{x}{'Va' if k % 3 else 'Tr'}/amos_{k:04}.nii.gz" for k in range(490, 520) for x in ("images", "labels")],
        [("labelsTr", ".nii.gz", "amos_05"), ("labelsVa", ".nii.gz", "amos_05")],
        lambda r, l: first(r, ["imagesTr", "imagesVa"], os.path.basename(l))),
    "BTCV-Abdomen": (ids("RawData/Training/label/label{:04}.nii.gz", "RawData/Training/img/img{:04}.nii.gz"),
                     [("RawData/Training/label", ".nii.gz", "")], lambda r, l: l.replace("label", "img")),
    "BTCV-Cervix": (ids("FixedDataV2/Training/label/{:07}-Mask.nii.gz", "FixedData/Training/img/{:07}-Image.nii.gz"),
                    [("FixedDataV2/Training/label", ".nii.gz", "")],
                    lambda r, l: f"FixedData/Training/img/{num(l, '([0-9]+)-Mask')}-Image.nii.gz"),
    "CHAOS": (ids("Train_Sets_nifti_ct/{}_segmentation.nii.gz", "Train_Sets_nifti_ct/{}_image.nii.gz"),
              [("Train_Sets_nifti_ct", "segmentation.nii.gz", "")],
              lambda r, l: f"Train_Sets_nifti_ct/{num(l, '([0-9]+)_seg')}_image.nii.gz"),
    "KiTS23": (ids("case_{:05}/segmentation.nii.gz", "case_{:05}/imaging.nii.gz"), [("", "segmentation.nii.gz", "")],
               lambda r, l: f"case_{num(l, 'case_([0-9]+)')}/imaging.nii.gz"),
    "LiTS": (ids("segmentation-{}.nii", "volume-{}.nii"), [("", ".nii", "segmentation")],
             lambda r, l: f"volume-{num(l, 'segmentation-([0-9]+).nii')}.nii"),
    "Multi-organ-Abdominal-CT-btcv": (
        ids("label_btcv_multiorgan/label{:04}.nii", "images_btcv/img{:04}.nii"),
        [("label_btcv_multiorgan", ".nii", "")],
        lambda r, l: f"images_btcv/img{num(l, 'label([0-9]+).nii')}.nii"),
    "Multi-organ-Abdominal-CT-tcia": (
        ids("label_tcia_multiorgan+rkidney/label{:04}.nii", "images_tcia/PANCREAS_{:04}.nii"),
        [("label_tcia_multiorgan+rkidney", ".nii", "")],
        lambda r, l: f"images_tcia/PANCREAS_{num(l, 'label([0-9]+).nii')}.nii"),
    "Pancreas-CT": (
        ids("TCIA_pancreas_labels-02-05-2017/label{:04}.nii.gz", "manifest-1599750808610/nifti/PANCREAS_{:04}.nii.gz"),
        [("TCIA_pancreas_labels-02-05-2017", ".nii.gz", "")],
        lambda r, l: f"manifest-1599750808610/nifti/PANCREAS_{num(l, 'label([0-9]+).nii')}.nii.gz"),
    **{f"Task{t}": (ids(f"labelsTr/{o}_{{}}.nii.gz", f"imagesTr/{o}_{{}}.nii.gz"), [("labelsTr", ".nii.gz", "")],
                    lambda r, l: l.replace("labelsTr", "imagesTr"))
       for t, o in {"03": "liver", "06": "lung", "07": "pancreas", "08": "hepaticvessel", "09": "spleen",
                    "10": "colon"}.items()},
    "TotalSegmentator": (ids("labels/s{:04}.nii.gz", "images/s{:04}.nii.gz"), [("labels", ".nii.gz", "")],
                         lambda r, l: l.replace("labels", "images")),
    "TotalSegmentatorV2": (
        [f"s{k:04}/{n}.nii.gz" for k in [*IDS, 1104, 992, 248] for n in ("seg", "ct")],
        [("", "seg.nii.gz", "s(?!1104|0992|0248)[0-9]{4}/")], lambda r, l: os.path.dirname(l) + "/ct.nii.gz"),
    "WORD": ([f"{x}{('Tr', 'Ts', 'Val')[k % 3]}/word_{k:04}.nii.gz" for k in IDS for x in ("images", "labels")],
             [(f"labels{p}", ".nii.gz", "") for p in ("Tr", "Ts", "Val")],
             lambda r, l: first(r, ["imagesTr", "imagesTs", "imagesVal"], os.path.basename(l))),
    "Bone-NIH": (
        [f"{'anon_data' if k % 2 else 'more/anon'}/BONE-{k:03}/{n}.nii.gz" for k in [*IDS, 66]
         for n in ("CT", "x/enriched_3-class")] + ["anon_data/BONE-017/CT.nii.gz"],
        [("", "enriched_3-class.nii.gz", "BONE-(?!066)")],
        lambda r, l: next(p for p in walk(r, "", "CT.nii.gz")
                          if p.endswith(f"BONE-{num(l, 'BONE-([0-9]+)')}/CT.nii.gz"))),
    "C4KC-KiTS": (ids("KiTS-{:05}/mask.nii.gz", "KiTS-{:05}/7_arterial.nii.gz", "KiTS-{:05}/seg-1.nii.gz")
                  + ["KiTS-00003/12_late.nii.gz"], [("", "mask.nii.gz", "")], lambda r, l: other(r, l, "seg", "mask")),
    "CRLM-CT": (ids("CRLM-CT-{}/mask.nii.gz", "CRLM-CT-{}/101_x.nii.gz"), [("", "mask.nii.gz", "")],
                lambda r, l: other(r, l, "seg", "mask")),
    "VerSe": (
        [f"{VERSE[k % 6]}/{f}/sub-verse{k:03}/sub-verse{k:03}{d}_{n}.nii.gz"
         for k in IDS for d in ("", "_dir-sag")[:1 + k % 2]
         for f, n in (("derivatives", "seg-vert_msk"), ("rawdata", "ct"))],
        [("", "_msk.nii.gz", "dataset-")],
        lambda r, l: l.replace("derivatives", "rawdata").replace("_seg-vert_msk", "_ct")),
    "AeroPath": (ids("{0}/{0}_CT_HR.nii.gz", "{0}/{0}_CT_HR_label.nii.gz"), [("", "_label.nii.gz", "")],
                 lambda r, l: other(r, l, "label")),
    "Autopet23": ([f"FDG-PET-CT-Lesions/PETCT_{k:04x}/study{s}/{n}.nii.gz" for k in IDS for s in range(1 + k % 2)
                   for n in ("SEG", "CTres", "SUV", "CT")], [("", "SEG.nii.gz", "")],
                  lambda r, l: os.path.dirname(l) + "/CTres.nii.gz"),
    "LIDC-IDRI": ([f"{x}/LIDC-IDRI-{k:04}/{x}_0.nii.gz" for k in [*IDS, 985] for x in ("Mask", "Image")],
                  [("Mask", ".nii.gz", "LIDC-IDRI-(?!0985)")], lambda r, l: l.replace("Mask", "Image")),
    "COLON_ACRIN6664": (
        ids("mask/dataset2_1.3.50.4.{:04}_3_325_mask_4label.nii.gz", "nifti/1.3.50.4.{:04}_3.nii.gz"),
        [("mask", ".nii.gz", "")], lambda r, l: "nifti/" + "_".join(l.split("_")[1:3]) + ".nii.gz"),
    "Adrenal_Ki67": (
        [f"Adrenal_Ki67_Seg_{k:03}-Adrenal_Ki67_Seg_{k:03}/{n}.nii.gz" for k in [*IDS[:14], 49, 53]
         for n in ("seg-1__fix", "1-SCOUT_1", "3-CAP_W_O_5.0_I30f_3_3", "7-ABD_AX_3_PV_7")],
        [("", "seg-1__fix.nii.gz", "")],
        lambda r, l: os.path.dirname(l) + ("/3-CAP_W_O_5.0_I30f_3_3.nii.gz" if "Seg_049" in l else
                                          "/7-ABD_AX_3_PV_7.nii.gz" if "Seg_053" in l else "/1-SCOUT_1.nii.gz")),
    **{f"micro-ct-murine-{n}": ([f"M{m:02}_{h:03}h/{f}.nii.gz" for m in range(1, 9) for h in (0, 4, 24)
                                 for f in ("seg", "CT140")], [("", "seg.nii.gz", "")],
                                lambda r, l: l.replace("seg.nii.gz", "CT140.nii.gz")) for n in ("native", "contrast")},
    "segrap23-task1": (
        ids("SegRap2023_Training_Set_120cases_OneHot_Labels/Task001/segrap_{:04}.nii.gz",
            "SegRap2023_Training_Set_120cases/segrap_{:04}/image.nii.gz"),
        [("SegRap2023_Training_Set_120cases_OneHot_Labels/Task001", ".nii.gz", "")],
        lambda r, l: f"SegRap2023_Training_Set_120cases/{os.path.basename(l)[:-7]}/image.nii.gz"),
    "Pediatric-CT-SEG": (ids("Pediatric-CT-SEG-{:08X}/image.nii.gz", "Pediatric-CT-SEG-{:08X}/seg.nii.gz"),
                         [("", "seg.nii.gz", "")], lambda r, l: l.replace("seg.nii.gz", "image.nii.gz")),
    "AutoPET-Atlas": (
        [n for k in IDS for n in (f"AutoPET-Atlas/Atlas_{k:04x}_{k:05}.nii.gz",
                                  f"Autopet23/FDG-PET-CT-Lesions/PETCT_{k:04x}/study/CT.nii.gz",
                                  f"Autopet23/FDG-PET-CT-Lesions/PETCT_{k:04x}/study/CTres.nii.gz")],
        [("AutoPET-Atlas", ".nii.gz", "")],
        lambda r, l: walk(r, f"Autopet23/FDG-PET-CT-Lesions/PETCT_{l.split('_')[1]}", "CT.nii.gz")[0]),
    "ULS23_DeepLesion": (
        [f"{a}/{ULS}/{b}/{k:06}_01_01_lesion.nii.gz" for k in IDS for a, b in (("ULS23_annotations", "labels_grabcut"),
                                                                             ("ULS23", "images"))],
        [(f"ULS23_annotations/{ULS}/labels_grabcut", ".nii.gz", "")],
        lambda r, l: l.replace("ULS23_annotations", "ULS23").replace("labels_grabcut", "images")),
    **{n: ([f"{a}/novel_data/{f}/{b}/{k:06}_0.nii.gz" for k in IDS for a, b in (("ULS23_annotations", "labels"),
                                                                             ("ULS23", "images"))],
           [(f"ULS23_annotations/novel_data/{f}/labels", ".nii.gz", "")],
           lambda r, l: l.replace("ULS23_annotations", "ULS23").replace("labels", "images"))
       for n, f in {"ULS23_DeepLesion3D": "ULS23_DeepLesion3D", "ULS23_Bone": "ULS23_Radboudumc_Bone",
                    "ULS23_Pancreas": "ULS23_Radboudumc_Pancreas"}.items()},
}
SPECIAL = {"CT-ORG", "CTPelvic1K-CLINIC", "HCC-TACE-Seg"}  # label paths change after sorting: own tests below


def expected_names(name: str) -> tuple[dict, dict]:
    r = load_recipe(name)
    names = {**(r.legacy.label_dict or r.label_dict), **r.legacy.rename}
    original = (r.legacy.original_label_dict or names) if r.legacy.label_dict else r.original_label_dict or names
    return names, original


def check_bytes(name: str, root: Path, out: Path, images: list[str], labels: list[str]) -> None:
    made = make_datalists(root, out, recipe=name, legacy=True)
    assert made["path"] == str(out/f"{name}_5_folds.json") and made["written"]
    assert our_json(made["path"]) == reference_json(images, labels, *expected_names(name))
    assert made["counts"]["missing_images"] == 0 and made["counts"]["pairs"] == len(labels) > 10


def test_all_42_data_sets_are_compared():
    assert len(LITERAL | dict.fromkeys(SPECIAL)) == 42
    assert set(LITERAL) | SPECIAL | {"openkbp", "totalseg_examples", "totalseg_examples_mr"} == set(recipe_names(False))


@pytest.mark.parametrize("name", LITERAL)
def test_A1_parity_bytes(name, tmp_path):
    names, searches, rule = LITERAL[name]
    root = touch(tmp_path/"data", *names)
    labels = [l for s in searches for l in walk(root, *s)]
    check_bytes(name, root, tmp_path, [rule(root, l) for l in labels], labels)


def test_A1_parity_ct_org_sorts_by_name_and_takes_repaired_files(tmp_path):
    keep = [*IDS, 28, 70, 74, 76]
    root = touch(tmp_path/"d", *(f"OrganSegmentations/{n}-{k}.nii.gz" for k in keep for n in ("labels", "volume")),
                 *(f"fixed_affine/{n}-{k}.nii.gz" for k in (28, 100, 3, 76) for n in ("labels", "volume")))
    found = [num(l, r"labels-(\d+)") for l in walk(root, "OrganSegmentations", ".nii.gz", "labels")]
    found = [k for k in found if k not in ("19", "70", "74", "76")]
    folders = ["fixed_affine" if k in ("28", "100", "3") else "OrganSegmentations" for k in found]
    check_bytes("CT-ORG", root, tmp_path, [f"{f}/volume-{k}.nii.gz" for f, k in zip(folders, found)],
                [f"{f}/labels-{k}.nii.gz" for f, k in zip(folders, found)])


def test_A1_parity_ctpelvic_takes_data_set_6_first(tmp_path):
    six = [(f"CTPelvic1K_dataset6_data/dataset6_CLINIC_{k:04}_data.nii.gz",
            f"ipcai2021_dataset6_Anonymized/dataset6_CLINIC_{k:04}_mask_4label.nii.gz") for k in range(1, 12)]
    seven = [(f"CTPelvic1K_dataset7_data/dataset7_CLINIC_metal_{k:04}_data.nii.gz",
              f"CTPelvic1K_dataset7_mask/CLINIC_metal_{k:04}_mask_4label.nii.gz") for k in range(8)]
    root = touch(tmp_path/"d", *(f for p in six + seven for f in p))
    check_bytes("CTPelvic1K-CLINIC", root, tmp_path, [i for i, _ in six + seven], [l for _, l in six + seven])


def test_A1_parity_hcc_replaces_one_label(tmp_path):
    root = touch(tmp_path/"d", *(f"HCC_{k:03}/{n}.nii.gz" for k in range(80, 100) for n in
                                 ("seg__fix", "seg_ori__fix_2", "2_Recon_3", "4_PRE")))
    labels = [f"HCC_{k:03}/{'seg_ori__fix_2' if k == 89 else 'seg__fix'}.nii.gz" for k in range(80, 100)]
    check_bytes("HCC-TACE-Seg", root, tmp_path, [f"HCC_{k:03}/2_Recon_3.nii.gz" for k in range(80, 100)], labels)


@pytest.mark.parametrize("n, test, folds", [
    (10, [7, 5], [[4, 6], [0, 3], [9, 1], [8], [2]]),
    (23, [10, 11, 14, 13, 21], [[2, 4, 17, 5], [18, 0, 1, 9], [22, 20, 16, 8], [7, 6, 3], [19, 15, 12]])])
def test_A1_golden_vectors(n, test, folds, tmp_path):
    root = touch(tmp_path/"Task09", *(f"{f}/spleen_{k:02}.nii.gz" for k in range(n) for f in TR))
    dl = read_datalist(make_datalists(root, tmp_path)["path"])
    def position(i: dict) -> int: return int(i["image"][-9:-7])
    assert [position(i) for i in dl.testing] == test
    assert [[position(i) for i in dl.training if i["fold"] == f] for f in range(5)] == folds


# ------------------------------------------------------------------------------------------- what the recipes say

CLASSES = {  # section 3 of the specification, as printed there; -> is 'original to unified'
    "AbdomenCT-1K": "1 liver 2 kidney 3 spleen 4 pancreas",
    "FLARE22": "1 liver 2 right kidney 3 spleen 4 pancreas 5 aorta 6 inferior vena cava 7 right adrenal gland "
               "8 left adrenal gland 9 gallbladder 10 esophagus 11 stomach 12 duodenum 13 left kidney",
    "AMOS22": "1 spleen 2 right kidney 3 left kidney 4 gallbladder 5 esophagus 6 liver 7 stomach 8 aorta "
              "9 postcava->inferior vena cava 10 pancreas 11 right adrenal gland 12 left adrenal gland 13 duodenum "
              "14 bladder 15 prostate or uterus",
    "BTCV-Abdomen": "1 spleen 2 right kidney 3 left kidney 4 gallbladder 5 esophagus 6 liver 7 stomach 8 aorta "
                    "9 inferior vena cava 10 portal vein and splenic vein 11 pancreas 12 right adrenal gland "
                    "13 left adrenal gland",
    "BTCV-Cervix": "1 bladder 2 uterus->prostate or uterus 3 rectum 4 small bowel",
    "CHAOS": "1 liver",
    "CT-ORG": "1 liver 2 bladder 3 lungs->lung 4 kidneys->kidney 5 bone 6 brain",
    "KiTS23": "1 kidney 2 tumor->kidney tumor 3 cyst->kidney cyst",
    "LiTS": "1 liver 2 tumor->liver tumor",
    "Multi-organ-Abdominal-CT-tcia": "1 spleen 2 right kidney 3 left kidney 4 gallbladder 5 esophagus 6 liver "
                                     "7 stomach 8 pancreas 9 duodenum",
    "Pancreas-CT": "1 pancreas", "Task03": "1 liver 2 cancer->hepatic tumor", "Task06": "1 cancer->lung tumor",
    "Task07": "1 pancreas 2 cancer->pancreatic tumor", "Task08": "1 Vessel->hepatic vessel 2 Tumour->hepatic tumor",
    "Task09": "1 spleen", "Task10": "1 colon cancer primaries",
    "WORD": "1 liver 2 spleen 3 left_kidney->left kidney 4 right_kidney->right kidney 5 stomach 6 gallbladder "
            "7 esophagus 8 pancreas 9 duodenum 10 colon 11 intestine 12 adrenal->adrenal gland 13 rectum 14 bladder "
            "15 Head_of_femur_L->left head of femur 16 Head_of_femur_R->right head of femur",
    "Bone-NIH": "1 lesion 1->bone lesion 2 lesion 2->bone lesion", "C4KC-KiTS": "1 Kidney->kidney 2 Mass->kidney mass",
    "Autopet23": "1 FDG-avid lesion", "LIDC-IDRI": "1 lung nodule", "Adrenal_Ki67": "1 adrenocortical tumor",
    "CTPelvic1K-CLINIC": "1 sacrum 2 left hip 3 right hip 4 lumbar spine",
    "micro-ct-murine-native": "1 heart 2 spinal cord 3 right lung 4 left lung",
    "micro-ct-murine-contrast": "1 heart 2 spinal cord 3 right lung 4 left lung",
    **dict.fromkeys(["ULS23_DeepLesion", "ULS23_DeepLesion3D", "ULS23_Bone", "ULS23_Pancreas"], "1 lesion"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_names_are_those_of_the_specification(name):
    ids = re.split(r"(?:^| )(\d+) (?=[A-Za-z])(?!1->|2->)", CLASSES[name].replace("lesion 1->", "lesion_1->")
                   .replace("lesion 2->", "lesion_2->"))[1:]
    both = {int(k): v.replace("lesion_", "lesion ").split("->") for k, v in zip(ids[::2], ids[1::2])}
    r = load_recipe(name)
    assert r.label_dict == {k: v[-1] for k, v in both.items()}
    assert (r.original_label_dict or r.label_dict) == {k: v[0] for k, v in both.items()}


def test_long_label_lists():
    v1, v2 = load_recipe("TotalSegmentator"), load_recipe("TotalSegmentatorV2")
    for r, n in ((v1, 104), (v2, 117)):
        assert sorted(r.label_dict) == sorted(r.original_label_dict) == list(range(1, n + 1))
        assert len(set(r.label_dict.values())) == n and r.label_dict == {k: worded(v) for k, v in
                                                                         r.original_label_dict.items()}
    assert {k: v1.label_dict[k] for k in range(1, 44)} == {k: v2.label_dict[k] for k in range(1, 44)}
    for r, anchors in [
        (v1, {18: "vertebrae L5", 34: "vertebrae T1", 41: "vertebrae C1", 43: "trachea", 44: "heart myocardium",
              50: "brain", 57: "colon", 58: "left rib 1", 81: "right rib 12", 82: "left humerus", 92: "sacrum",
              93: "face",
              95: "right gluteus maximus", 103: "right iliopsoas", 104: "bladder"}),
        (v2, {44: "brain", 45: "left iliac artery", 49: "small bowel", 51: "colon", 63: "left rib 12",
              75: "right rib 12", 86: "sacrum", 96: "right iliopsoas", 97: "bladder", 98: "left atrial appendage",
              104: "costal cartilages",
              108: "prostate", 115: "superior vena cava", 117: "vertebrae S1"}),
        (load_recipe("segrap23-task1"), {1: "brain", 3: "optic chiasm", 18: "left internal auditory canal",
                                         33: "right eustachian tube bone", 45: "right temporomandibular joint",
                                         51: "larynx pharynx const overlap", 54: "trachea"}),
        (load_recipe("Pediatric-CT-SEG"), {6: "left femoral head", 11: "gallbladder", 19: "left adrenal",
                                           24: "right lung", 29: "bones"}),
        (load_recipe("AutoPET-Atlas"), {2: "muscles", 10: "colon", 20: "uterocervix", 30: "right thyroid",
                                        40: "left autochthon", 42: "skin", 43: "vertebrae C1", 66: "vertebrae L5",
                                        67: "left costa 1",
                                        90: "right costa 12", 91: "rib_cartilage", 100: "left hip", 105: "heart",
                                        110: "left heart ventricle", 120: "left lung lower lobe", 125: "bronchie",
                                        131: "right eyeball"}),
        (load_recipe("VerSe"), {1: "vertebrae C1", 8: "vertebrae T1", 20: "vertebrae L1", 24: "vertebrae L5",
                                25: "vertebrae L6"}),
        (load_recipe("Multi-organ-Abdominal-CT-btcv"), {10: "portal vein and splenic vein", 14: "duodenum"})]:
        assert {k: r.label_dict[k] for k in anchors} == anchors
    counts = {"segrap23-task1": 54, "Pediatric-CT-SEG": 29, "AutoPET-Atlas": 130, "VerSe": 25}
    assert {n: len(load_recipe(n).label_dict) for n in counts} == counts
    assert load_recipe("CRLM-CT").label_dict == {3: "hepatic vessel", 4: "portal vein and splenic vein",
                                                 5: "liver tumor"}
    assert len(load_recipe("CRLM-CT").original_label_dict) == 5
    assert load_recipe("AeroPath").label_dict == {2: "airway"}


def test_recipes_are_data_without_surprises():
    for n in recipe_names():
        r = load_recipe(n)
        if n.casefold() != "totalsegmentator": assert load_recipe(n.swapcase()) == r
        assert all(v == v.strip() for v in r.label_dict.values()), n
        assert set(r.original_label_dict) >= set(r.label_dict) or not r.original_label_dict, n
        assert all(o in recipe_names(False) for o in r.same_images_as), n
        if r.subject: assert r.subject_of("nothing to see here") is None
        assert bool(r.generic) == (not r.roots)


# ------------------------------------------------------------------------------------------------------- defects

def lost_image(root: Path, *lost: int) -> Path:
    return touch(root, *(f"Mask/Case_{k:05}.nii.gz" for k in range(1, 13)),
                 *(f"AbdomenCT-1K-ImagePart{1 + k % 3}/Case_{k:05}_0000.nii.gz" for k in range(1, 13) if k not in lost))


@pytest.mark.parametrize("lost", [(4,), (1,), (12,), (1, 2, 3), (5, 7)])
def test_D1_a_missing_image_shifts_nothing(lost, tmp_path):
    found = scan("AbdomenCT-1K", lost_image(tmp_path, *lost))
    assert len(found.pairs) == 12 - len(lost)
    assert all(num(p.image, "Case_(.{5})") == num(p.label, "Case_(.{5})") for p in found.pairs)
    assert [m.label for m in found.missing_images] == [f"Mask/Case_{k:05}.nii.gz" for k in lost]
    assert found.missing_images[0].expected == tuple(
        f"AbdomenCT-1K-ImagePart{k}/Case_{lost[0]:05}_0000.nii.gz" for k in (1, 2, 3))
    assert found.counts() == {"pairs": 12 - len(lost), "missing_images": len(lost), "missing_labels": 0, "ambiguous": 0,
                              "excluded": 0}


@pytest.mark.parametrize("legacy", [False, True])
def test_D1_legacy_never_means_wrong_pairs(legacy, tmp_path):
    made = make_datalists(lost_image(tmp_path/"d", 4), tmp_path, recipe="AbdomenCT-1K", legacy=legacy)
    items = read_datalist(made["path"]).items()
    assert len(items) == 11 and all(num(i["image"], "Case_(.{5})") == num(i["label"], "Case_(.{5})") for i in items)
    assert made["missing_images"][0]["label"] == "Mask/Case_00004.nii.gz"


PROPERTY = ["AbdomenCT-1K", "AMOS22", "MR_AMOS22", "WORD", "Bone-NIH", "CT-ORG", "C4KC-KiTS", "VerSe",
            "Multi-organ-Abdominal-CT-btcv", "TotalSegmentatorV2", "AutoPET-Atlas", "LIDC-IDRI",
            "micro-ct-murine-native", "segrap23-task1"]


@pytest.mark.parametrize("name", PROPERTY)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_A2_no_pair_ever_has_differing_ids(name, data, tmp_path_factory):
    "Any files may be lost: what is paired belongs together, and every label that is left is accounted for"
    names = sorted(LITERAL[name][0]) if name in LITERAL else [
        f"{f}/{n}-{k}.nii.gz" for k in IDS for n in ("labels", "volume")
        for f in ("OrganSegmentations", "fixed_affine")]
    lost = data.draw(st.sets(st.sampled_from(names), max_size=len(names)//2))
    root = touch(tmp_path_factory.mktemp("t"), *(n for n in names if n not in lost))
    full = {p.label: p.image for p in scan(name, touch(tmp_path_factory.mktemp("f"), *names)).pairs}
    found = scan(name, root)
    for p in found.pairs:
        if name == "CT-ORG": assert num(p.image, r"-(\d+)\.") == num(p.label, r"-(\d+)\.")
        elif name == "C4KC-KiTS": assert os.path.dirname(p.image) == os.path.dirname(p.label) and "seg" not in p.image
        else: assert full[p.label] == p.image
    left = {l for s in (LITERAL[name][1] if name in LITERAL else [("OrganSegmentations", ".nii.gz", "labels")])
            for l in walk(root, *s)}
    told = {p.label for p in found.pairs} | {m.label for m in found.missing_images} | {e.path for e in found.excluded}
    told |= {a.label for a in found.ambiguous}
    if name != "CT-ORG": assert left <= told
    for image in (m.image for m in found.missing_labels): assert (root/image).exists()


def test_D4_scan_never_stops_at_the_first_problem(tmp_path):
    root = lost_image(tmp_path, 2, 3, 11)
    for n in ("Mask/Case_00006.nii.gz", "Mask/Case_00007.nii.gz"): (root/n).unlink()
    touch(root, "Mask/Case_5 copy.nii.gz", "AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz", "Mask/notes.txt")
    found = scan("AbdomenCT-1K", root)
    assert found.counts() == {"pairs": 7, "missing_images": 3, "missing_labels": 2, "ambiguous": 1, "excluded": 1}
    assert [Path(m.image).name for m in found.missing_labels] == ["Case_00006_0000.nii.gz", "Case_00007_0000.nii.gz"]
    assert found.ambiguous[0].chosen == "AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz"
    assert found.excluded[0].path == "Mask/Case_5 copy.nii.gz" and "does not fit" in found.excluded[0].why


def test_D7_recipes_name_the_sets_that_share_scans_and_hash_keeps_them_apart(tmp_path):
    a = touch(tmp_path/"a", *LITERAL["Pancreas-CT"][0])
    b = touch(tmp_path/"b", *LITERAL["Multi-organ-Abdominal-CT-tcia"][0][:24])
    made = [make_datalists(r, tmp_path, recipe=n, method="hash", n_folds=2) for r, n in
            ((a, "Pancreas-CT"), (b, "Multi-organ-Abdominal-CT-tcia"))]
    assert any("same scans as Pancreas-CT" in n for n in made[1]["notes"])
    where = []
    for m in made:
        dl = read_datalist(m["path"])
        where.append({num(i["image"], r"PANCREAS_(\d+)"): i.get("fold", "test") for i in dl.items()})
    assert where[1] and all(where[0][k] == v for k, v in where[1].items())


def subjects_of(path: str, pattern: str) -> list[set]:
    dl = read_datalist(path)
    parts = [dl.testing, *([i for i in dl.training if i["fold"] == f] for f in dl.folds())]
    return [{num(i["image"], pattern) for i in part} for part in parts]


@pytest.mark.parametrize("name, pattern", [("micro-ct-murine-native", r"M(\d+)_"), ("VerSe", r"sub-([a-z]+\d+)"),
                                           ("Autopet23", "PETCT_(....)")])
def test_D8_A4_subjects_are_never_torn(name, pattern, tmp_path):
    root = touch(tmp_path/"d", *LITERAL[name][0])
    for method in ("legacy", "hash"):
        made = make_datalists(root, tmp_path/f"{method}.json", recipe=name, method=method, n_folds=3, name=name)
        parts = subjects_of(made["path"], pattern)
        assert sum(map(len, parts)) == len(set.union(*parts)) == made["counts"]["groups"] < made["counts"]["pairs"]
    torn = subjects_of(make_datalists(root, tmp_path/"torn.json", recipe=name, legacy=True)["path"], pattern)
    assert sum(map(len, torn)) > len(set.union(*torn))


def test_A4_group_option_and_too_few_groups(tmp_path):
    root = touch(tmp_path/"d", *(f"{f}/s{k//3}_{k}.nii.gz" for k in range(12) for f in BOTH))
    made = make_datalists(root, tmp_path, group=r"/(s\d)_", n_folds=3)
    parts = subjects_of(made["path"], r"/(s\d)_")
    assert sum(map(len, parts)) == 4 and made["counts"]["groups"] == 4
    with pytest.raises(DataError, match="3 groups for training .of 4. cannot fill 5 folds"):
        make_datalists(root, tmp_path, group=r"/(s\d)_")
    with pytest.raises(DataError, match="does not match 12 of 12"): make_datalists(root, tmp_path, group="patient")


@pytest.mark.parametrize("name, above", [
    ("LIDC-IDRI", "user_0985"), ("HCC-TACE-Seg", "server089"), ("Adrenal_Ki67", "Ki67_Seg_049"),
    ("C4KC-KiTS", "mask_seg"), ("CT-ORG", "labels"), ("TotalSegmentatorV2", "s1104"), ("Bone-NIH", "BONE-066"),
    ("AMOS22", "amos_0600.nii.gz")])
def test_D13_folders_above_the_root_change_nothing(name, above, tmp_path):
    names = LITERAL[name][0] if name in LITERAL else [
        *(f"OrganSegmentations/{n}-{k}.nii.gz" for k in IDS for n in ("labels", "volume")),
        *(f"HCC_{k:03}/{n}.nii.gz" for k in range(85, 95) for n in ("seg__fix", "seg_ori__fix_2", "2_R"))]
    assert scan(name, touch(tmp_path/"plain", *names)) == scan(name, touch(tmp_path/above/"data", *names))


def test_D13_words_are_looked_for_in_file_names_only(tmp_path):
    found = scan("C4KC-KiTS", touch(tmp_path, "mask_seg_study/mask.nii.gz", "mask_seg_study/1.nii.gz"))
    assert [p.image for p in found.pairs] == ["mask_seg_study/1.nii.gz"]
    odd = scan("LIDC-IDRI", touch(tmp_path/"l", *(f"{f}/LIDC-IDRI-0001/10985.nii.gz" for f in ("Mask", "Image"))))
    assert len(odd.pairs) == 1 and not odd.excluded


def test_D14_wrong_dictionaries_are_legacy_only(tmp_path):
    root = touch(tmp_path/"d", *LITERAL["COLON_ACRIN6664"][0])
    ours = read_datalist(make_datalists(root, tmp_path/"a.json", recipe="COLON_ACRIN6664")["path"])
    theirs = read_datalist(make_datalists(root, tmp_path/"b.json", recipe="COLON_ACRIN6664", legacy=True)["path"])
    assert ours.label_dict == {} and theirs.label_dict == load_recipe("CTPelvic1K-CLINIC").label_dict
    hcc = load_recipe("HCC-TACE-Seg")
    assert min(hcc.label_dict) == 1 and hcc.legacy.label_dict == {2: "hepatic tumor"}
    assert load_recipe("AutoPET-Atlas").label_dict[105] == "heart" != load_recipe("AutoPET-Atlas").legacy.rename[105]


def test_D14_bone_ct_that_nobody_claims_is_listed(tmp_path):
    more = ("x/BONE-300/CT.nii.gz", "x/BONE-301/CT.nii.gz", "y/BONE-001/CT.nii.gz")
    root = touch(tmp_path, *LITERAL["Bone-NIH"][0], *more)
    found = scan("Bone-NIH", root)
    assert [p.image for p in found.missing_labels] == ["x/BONE-300/CT.nii.gz", "x/BONE-301/CT.nii.gz"]
    assert [a.chosen for a in found.ambiguous] == [None] and len(found.ambiguous[0].images) == 2
    assert [e.why for e in found.excluded] == ["id '066' is excluded by the recipe"]


def test_D15_total_segmentator_leaves_three_cases_out(tmp_path):
    found = scan("TotalSegmentatorV2", touch(tmp_path, *LITERAL["TotalSegmentatorV2"][0]))
    assert {e.path for e in found.excluded} == {f"s{k}/seg.nii.gz" for k in ("1104", "0992", "0248")}
    assert not found.missing_labels and "three excluded cases" in load_recipe("TotalSegmentatorV2").legacy.note


# ---------------------------------------------------------------------------------------------------- the folder

def test_A10_directory_order_does_not_matter(tmp_path, monkeypatch):
    root = touch(tmp_path/"d", *LITERAL["VerSe"][0])
    before = make_datalists(root, tmp_path/"a.json", recipe="VerSe", name="v")
    listed = pairing._Tree._walk
    monkeypatch.setattr(pairing._Tree, "_walk", lambda self, start: reversed(list(listed(self, start))))
    after = make_datalists(root, tmp_path/"b.json", recipe="VerSe", name="v")
    assert Path(before["path"]).read_bytes() == Path(after["path"]).read_bytes()


def test_row_01_links_and_names_that_a_list_may_not_hold(tmp_path):
    root = touch(tmp_path/"d", *(f"{f}/spleen_{k}.nii.gz" for k in (1, 2, 3) for f in TR))
    touch(tmp_path, "outside/spleen_7.nii.gz", "outside/spleen_8.nii.gz")
    for f in TR: (root/f"{f}/spleen_7.nii.gz").symlink_to(tmp_path/"outside/spleen_7.nii.gz")
    (root/"imagesTr/spleen_4.nii.gz").symlink_to(root/"imagesTr/spleen_1.nii.gz")
    (root/"labelsTr/more").symlink_to(tmp_path/"outside")
    touch(root, "labelsTr/spleen_4.nii.gz", "labelsTr/spleen\n5.nii.gz", "labelsTr/spl\\een_6.nii.gz",
          "labelsTr/._spleen_1.nii.gz")
    found = scan("Task09", root)
    assert [p.case for p in found.pairs] == ["1", "2", "3", "4"]
    why = {e.path: e.why for e in found.excluded}
    assert why["labelsTr/spleen_7.nii.gz"] == "symbolic link that leaves the folder" == why["imagesTr/spleen_7.nii.gz"]
    assert why["labelsTr/more"] == "symbolic link to a folder, not followed"
    assert "control" in why["labelsTr/spleen\n5.nii.gz"] and "Windows" in why["labelsTr/spl\\een_6.nii.gz"]
    assert not any("._" in p for p in why)


def test_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    root = touch(spleens(tmp_path/"d", 3), "labelsTr/locked/spleen_9.nii.gz")
    scandir = os.scandir
    def guarded(p):
        if str(p).endswith("locked"): raise PermissionError(13, "Permission denied")
        return scandir(p)
    monkeypatch.setattr(pairing.os, "scandir", guarded)
    found = scan("Task09", root)
    assert len(found.pairs) == 3 and found.excluded == (("labelsTr/locked", "cannot be read (Permission denied)"),)


def test_missing_root_and_empty_root(tmp_path):
    with pytest.raises(MissingFile, match="is not a folder"): scan("Task09", tmp_path/"absent")
    assert not any(scan("Task09", tmp_path).counts().values())
    with pytest.raises(DataError, match="no pair .*Is it the right folder"):
        make_datalists(tmp_path, tmp_path, recipe="Task09")
    with pytest.raises(DataError, match="none of the layouts .* it holds no files"): detect_recipe(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'TotalSegmentator' or 'totalsegmentator'"):
        load_recipe("TOTALSEGMENTATOR")


@pytest.mark.parametrize("suffix", ".nii .nii.gz .mha .mhd .nrrd .nhdr .zarr .ome.zarr .h5 .hdf5 .npy .npz /".split())
def test_A12_every_format_pairs_in_every_layout(suffix, tmp_path):
    "Files, zarr stores (folders) and DICOM series (folders with .dcm files), image and label of different kinds"
    def volume(stem: str, kind: str = suffix) -> None:
        if kind == "/": touch(tmp_path, f"{stem}/1.dcm", f"{stem}/2.DCM")
        elif kind.endswith(".zarr"): touch(tmp_path, f"{stem}{kind}/c/0", f"{stem}{kind}/zarr.json")
        else: touch(tmp_path, stem + kind)
    for k in (1, 2):
        volume(f"nn/imagesTr/case_{k}_0000"); volume(f"nn/labelsTr/case_{k}", ".nii.gz")
        volume(f"folders/img/img{k}"); volume(f"folders/mask/label{k}", ".mha")
        volume(f"side/p{k}/ct"); volume(f"side/p{k}/seg", ".nrrd")
    for layout, folder in (("nnunet", "nn"), ("folders", "folders"), ("beside", "side")):
        chosen, _ = detect_recipe(tmp_path/folder)
        found = scan(chosen, tmp_path/folder)
        assert chosen.name == layout and len(found.pairs) == 2 and not found.missing_labels
        assert found.pairs[0].image.endswith(suffix.rstrip("/")) and (tmp_path/folder/found.pairs[0].image).exists()


def test_A12_unknown_suffix_is_not_paired(tmp_path):
    root = touch(tmp_path, "images/1.png", "labels/1.png")
    with pytest.raises(DataError, match="holds 2 files .png"): detect_recipe(root)


# ------------------------------------------------------------------------------------------------------- layouts

def test_nnunet_channels(tmp_path):
    root = touch(tmp_path/"Dataset001_X", *(f"imagesTr/c_{k}_{c:04}.nii.gz" for k in range(8) for c in (0, 1)),
                 *(f"labelsTr/c_{k}.nii.gz" for k in range(8)), "imagesTs/c_9_0000.nii.gz", "imagesTs/c_9_0001.nii.gz")
    (root/"imagesTr/c_3_0001.nii.gz").unlink()
    (root/"dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT", "1": "PET"}, "file_ending": ".nii.gz",
        "labels": {"background": 0, "liver_left": 1, "both": [1, 2], "tumor": 2}}))
    made = make_datalists(root, tmp_path, n_folds=2, keep_unlabelled=True)
    dl = read_datalist(made["path"])
    assert made["recipe"] == "nnunet" and made["name"] == "Dataset001_X"
    assert dl.label_dict == {1: "left liver", 2: "tumor"}
    stem = dl.training[0]["label"].removesuffix(".nii.gz").replace("labels", "images")
    assert dl.training[0]["image"] == [f"{stem}_0000.nii.gz", f"{stem}_0001.nii.gz"]
    assert made["missing_images"] == [{"label": "labelsTr/c_3.nii.gz",
                                       "expected": ("imagesTr/c_3_0000.nii.gz and 1 more channels",)}]
    assert dl.testing[-1] == {"image": ["imagesTs/c_9_0000.nii.gz", "imagesTs/c_9_0001.nii.gz"]}
    assert dl.labelled() == dl.items()[:-1]


def test_nnunet_1_and_msd_dictionaries(tmp_path):
    for style, fmt in (("nnunet", "{}_0000.nii.gz"), ("msd", "{}.nii.gz")):
        root = touch(tmp_path/style, *(n for k in range(7) for n in (f"imagesTr/{fmt.format(f'la_{k}')}",
                                                                     f"labelsTr/la_{k}.nii.gz")))
        (root/"dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "left atrium"}}))
        made = make_datalists(root, tmp_path)
        assert made["recipe"] == style and read_datalist(made["path"]).label_dict == {1: "left atrium"}


def test_msd_with_its_own_test_set(tmp_path):
    root = touch(tmp_path/"d", *(f"{f}/x_{k}.nii.gz" for k in range(7) for f in TR),
                 *(f"{f}/x_{k}.nii.gz" for k in (7, 8) for f in ("imagesTs", "labelsTs")))
    made = make_datalists(root, tmp_path, recipe="msd")
    dl = read_datalist(made["path"])
    assert len(dl.testing) == 2 and len(dl.training) == 7 and "test set of 2 cases" in made["notes"][1]


def test_bids(tmp_path):
    names = []
    for s in range(1, 8):
        for ses in ("01", "02"):
            stem = f"sub-{s:02}_ses-{ses}"
            names += [f"sub-{s:02}/ses-{ses}/anat/{stem}_T1w.nii.gz", f"sub-{s:02}/ses-{ses}/anat/{stem}_FLAIR.nii.gz",
                      f"derivatives/lesions/sub-{s:02}/ses-{ses}/anat/{stem}_FLAIR_label-lesion_mask.nii.gz"]
    names += ["sub-09/anat/sub-09_acq-hr_T1w.nii.gz", "sub-10/anat/sub-10_T1w.nii.gz", "sub-10/anat/sub-10_T2w.nii.gz",
              "derivatives/lesions/sub-09/anat/sub-09_acq-hr_desc-manual_dseg.nii.gz",
              "derivatives/l/sub-10/anat/sub-10_dseg.nii.gz"]
    root = touch(tmp_path/"b", *names)
    chosen, why = detect_recipe(root)
    found = scan(chosen, root)
    assert chosen.name == "bids" and len(found.pairs) == 15 and "15 of 16 labels" in why
    assert all(p.image.split("/")[-1].split("_T1w")[0].split("_FLAIR")[0] in p.label for p in found.pairs)
    assert [a.label for a in found.ambiguous] == ["derivatives/l/sub-10/anat/sub-10_dseg.nii.gz"]
    parts = subjects_of(make_datalists(root, tmp_path, n_folds=3)["path"], r"sub-(\d+)")
    assert sum(map(len, parts)) == 8 == len(set.union(*parts))


def test_verse_is_read_by_the_bids_layout_too(tmp_path):
    root = touch(tmp_path, *LITERAL["VerSe"][0])
    bids, verse = ({(p.image, p.label) for p in scan(n, root).pairs} for n in ("bids", "VerSe"))
    assert bids == verse and len(bids) > 20


def test_totalsegmentator_masks(tmp_path):
    parts = "ct", "segmentations/liver", "segmentations/kidney_left"
    touch(tmp_path/"d", *(f"s{k:04}/{n}.nii.gz" for k in range(6) for n in parts))
    touch(tmp_path/"d", "s0003/seg.nii.gz", "s0009/ct.nii.gz")
    made = make_datalists(tmp_path/"d", tmp_path, n_folds=2)
    dl = read_datalist(made["path"])
    labels = {i["image"][:5]: i["label"] for i in dl.items()}
    assert made["recipe"] == "totalsegmentator" and made["missing_labels"] == ["s0009/ct.nii.gz"]
    assert labels["s0001"] == "s0001/segmentations" and labels["s0003"] == "s0003/seg.nii.gz"
    assert dl.label_dict[3] == "left kidney" and len(dl.label_dict) == 117
    touch(tmp_path/"d", "s0001/segmentations/dragon_left.nii.gz")
    own = make_datalists(tmp_path/"d", tmp_path, n_folds=2, dry_run=True, on_exists="overwrite")
    assert own["diff"]["label_dict"] and not own["written"]


@pytest.mark.parametrize("image, label", [("images/a.nii", "labels/a.nii"), ("imgs/img001.nii", "masks/mask001.nii"),
                                          ("CT/x_ct.nii", "seg/x_seg.nii"), ("Images/p/1.nii", "Ground-Truth/p/1.nii"),
                                          ("volumes/volume-1.nii", "segmentations/segmentation-1.nii"),
                                          ("imagesTrain/a_0000.nii", "labelsTrain/a.nii"),
                                          ("images/segovia.nii", "labels/segovia.nii")])
def test_parallel_folders(image, label, tmp_path):
    chosen, _ = detect_recipe(touch(tmp_path, image, label))
    assert chosen.name == "folders" and scan(chosen, tmp_path).pairs[0].item() == {"image": image, "label": label}


@pytest.mark.parametrize("image, label", [
    ("a.nii", "a_seg.nii"), ("a_ct.nii", "a_mask.nii"), ("p/a_T1w.nii", "p/a_label.nii"),
    ("p/image.nii", "p/label.nii"), ("p/CT.nii", "p/SEG.nii"), ("a_mr.nii", "a_mr_seg.nii"), ("a-img.mha", "a-gt.mha")])
def test_files_side_by_side(image, label, tmp_path):
    chosen, _ = detect_recipe(touch(tmp_path, image, label))
    found = scan(chosen, tmp_path)
    assert chosen.name == "beside" and found.pairs[0].item() == {"image": image, "label": label}
    assert not found.missing_labels


def table(root: Path, *lines: str, name: str = "c.csv") -> Path:
    (root/name).write_text("\n".join(lines) + "\n")
    return root


def table_files(root: Path) -> Path:
    return touch(root, *(f"i/{k}.nii.gz" for k in range(9)), *(f"l/{k}.nii.gz" for k in range(8)))


def test_table_with_patients(tmp_path):
    root = table(table_files(tmp_path/"t"), "image,label,patient,site",
                 *(f"i/{k}.nii.gz,l/{k}.nii.gz,p{k//2},B" for k in range(8)), "i/8.nii.gz,,p9,A")
    made = make_datalists(root, tmp_path, n_folds=2, keep_unlabelled=True, name="mine")
    dl = read_datalist(made["path"])
    assert made["recipe"] == "csv" and made["counts"]["groups"] == 4 and Path(made["path"]).name == "mine_2_folds.json"
    assert list(dl.training[0]) == ["image", "label", "fold", "subject", "site"] and dl.training[0]["site"] == "B"
    assert dl.training[-1] == {"image": "i/8.nii.gz", "subject": "p9", "site": "A"}
    parts = [{i["subject"] for i in dl.labelled() if i.get("fold", -1) == f} for f in (-1, 0, 1)]
    assert sum(map(len, parts)) == 4


def test_table_with_folds(tmp_path):
    root = table(table_files(tmp_path/"t"), "image,label,fold,split",
                 *(f"i/{k}.nii.gz,l/{k}.nii.gz,{k % 3}," for k in range(6)), "i/6.nii.gz,l/6.nii.gz,,test")
    made = make_datalists(root/"c.csv", tmp_path)
    dl = read_datalist(made["path"])
    assert [i["fold"] for i in dl.training] == [0, 0, 1, 1, 2, 2] and Path(made["path"]).name == "t_3_folds.json"
    assert dl.testing == ({"image": "i/6.nii.gz", "label": "l/6.nii.gz"},)
    table(root, "image,label,fold", "i/1.nii.gz,l/1.nii.gz,0", "i/2.nii.gz,l/2.nii.gz,")
    with pytest.raises(DataError, match="1 training cases have no fold while others do: row 3"):
        make_datalists(root/"c.csv", tmp_path)


def test_table_problems(tmp_path):
    root = table(table_files(tmp_path/"t"), "image,label,section", "i/1.nii.gz,l/77.nii.gz,", "i/2.nii.gz,l/2.nii.gz,",
                 "i/2.nii.gz,l/3.nii.gz,", "/etc/x.nii,,", "i/99.nii.gz,,")
    assert scan("csv", root).counts() == {"pairs": 1, "missing_images": 1, "missing_labels": 0, "ambiguous": 0,
                                          "excluded": 3}
    for lines, match in [(("image,section", "a,maybe"), "row 2: section must be training or testing, got 'maybe'"),
                         (("image,fold", "a,-1", ",0"), "2 problems .*row 2: fold must be.*row 3: no image"),
                         (("picture", "a"), "columns .'image'. are missing")]:
        with pytest.raises(FormatError, match=match): scan("csv", table(root, *lines))
    table(root, "image", name="d.csv")
    with pytest.raises(DataError, match="2 files .* where one is needed"): scan("csv", root)


def test_auto_prefers_the_data_set_whose_name_the_folder_has(tmp_path):
    root = touch(tmp_path/"AMOS22", *LITERAL["AMOS22"][0])
    chosen, why = detect_recipe(root)
    assert chosen.name == "AMOS22" and "the folder is called 'AMOS22'" in why and "MR_AMOS22" in why
    chosen, _ = detect_recipe(touch(tmp_path/"x", "s1/ct.nii.gz", "s1/seg.nii.gz"))
    assert chosen.name == "beside"
    nested = touch(tmp_path/"BTCV"/"Abdomen", *LITERAL["BTCV-Abdomen"][0])
    assert detect_recipe(nested)[0].name == "BTCV-Abdomen"


# -------------------------------------------------------------------------------------------------- making lists

def test_dry_run_diff_and_on_exists(tmp_path):
    root = spleens(tmp_path/"Task09")
    dry = make_datalists(root, tmp_path, dry_run=True)
    assert not dry["written"] and len(dry["diff"]["added"]) == 12 and not list(tmp_path.glob("*.json"))
    made = make_datalists(root, tmp_path)
    assert made["written"] and made["folds"] == {"0": 2, "1": 2, "2": 2, "3": 2, "4": 2} and made["recipe"] == "Task09"
    touch(root, *(f"{f}/spleen_99.nii.gz" for f in TR))
    with pytest.raises(OutputExists): make_datalists(root, tmp_path)
    assert not make_datalists(root, tmp_path, on_exists="skip")["written"]
    later = make_datalists(root, tmp_path, dry_run=True)
    assert later["diff"]["added"] == ["imagesTr/spleen_99.nii.gz"] and not later["written"]
    assert make_datalists(root, tmp_path, on_exists="overwrite")["written"]


def test_the_folder_for_lists_is_made_but_not_its_parent(tmp_path, monkeypatch):
    "As with every other command; and a place that cannot be written is told before the data are looked at"
    root = spleens(tmp_path/"Task09")
    make_datalists(root, tmp_path/"lists", dry_run=True)
    assert not (tmp_path/"lists").exists()
    made = make_datalists(root, tmp_path/"lists")
    assert made["path"] == str(tmp_path/"lists"/"Task09_5_folds.json") and read_datalist(made["path"]).name == "Task09"
    (tmp_path/"file").touch()
    monkeypatch.setattr("medvol_nb.recipes.scan", lambda *_, **__: pytest.fail("looked at the data first"))
    for out in ("no/lists", "no/list.json"):
        with pytest.raises(MissingFile, match="mkdir -p"): make_datalists(root, tmp_path/out)
    with pytest.raises(OutputExists, match="file is a file. Name a folder"):
        make_datalists(root, tmp_path/"file", on_exists="overwrite")
    assert not (tmp_path/"no").exists()


def test_hash_does_not_move_old_cases(tmp_path):
    root = spleens(tmp_path/"Task09", 40)
    make_datalists(root, tmp_path, method="hash")
    touch(root, *(f"{f}/spleen_{k}.nii.gz" for k in range(100, 110) for f in TR))
    assert make_datalists(root, tmp_path, method="hash", dry_run=True)["diff"]["moved"] == {}


def test_provenance_is_complete_and_repeatable(tmp_path):
    root = spleens(tmp_path/"Task09")
    a, b = (make_datalists(root, tmp_path/f"{n}.json", name="Task09", seed=3) for n in "ab")
    assert Path(a["path"]).read_bytes() == Path(b["path"]).read_bytes()
    told = json.loads(Path(a["path"]).read_text())["provenance"]
    assert told == a["provenance"] and told["recipe"] == "Task09" and told["seed"] == 3 and told["method"] == "legacy"
    assert told["scan"]["pairs"] == 12 == told["n_training"] + told["n_testing"]
    assert len(told["recipe_fingerprint"]) == 16
    assert str(tmp_path) not in json.dumps(told)


def test_unlabelled_only(tmp_path):
    root = touch(tmp_path/"msd_like", "imagesTr/a.nii.gz", "imagesTr/b.nii.gz")
    with pytest.raises(DataError, match="2 images without a label, keep_unlabelled=True"):
        make_datalists(root, tmp_path, recipe="msd")
    made = make_datalists(root, tmp_path, recipe="msd", keep_unlabelled=True)
    assert Path(made["path"]).name == "msd_like.json"
    assert read_datalist(made["path"]).training == ({"image": "imagesTr/a.nii.gz"}, {"image": "imagesTr/b.nii.gz"})


def test_stratified_reads_labels(tmp_path):
    from medvol_nb.geometry import Volume
    from medvol_nb.volume import write_volume
    root = spleens(tmp_path/"Task09", 20)
    for k in range(20):
        data = np.zeros((3, 3, 3), np.uint8)
        data[0], data[1, 0] = 1, 2*(k < 6)
        (root/f"labelsTr/spleen_{k}.nii.gz").unlink()
        write_volume(Volume(data, np.eye(4)), root/f"labelsTr/spleen_{k}.nii.gz")
    dl = read_datalist(make_datalists(root, tmp_path, method="stratified")["path"])
    rare = [sum(int(num(i["image"], r"_(\d+)\.")) < 6 for i in dl.items() if i.get("fold", -1) == f)
            for f in range(-1, 5)]
    assert sum(rare) == 6 and max(rare) - min(rare) <= 1


def test_bad_requests(tmp_path):
    root = spleens(tmp_path/"Task09")
    for bad in ({"method": "hash", "legacy": True}, {"legacy": True, "group": "x"}, {"name": "a/b"},
                {"recipe": "Task99"}, {"method": "random"}, {"n_folds": 0}, {"test_ratio": 1.0}):
        with pytest.raises(ConfigError): make_datalists(root, tmp_path, **bad)
    with pytest.raises(MissingFile): make_datalists(root, tmp_path/"no"/"absent")
    assert not list(tmp_path.glob("*.json"))


def test_own_recipe_file_and_its_mistakes(tmp_path):
    (tmp_path/"r.yaml").write_text("name: mine\nlabel_dict: {1: spleen}\ngroups: {id: '\\d+'}\ncases:\n"
                                   "  - labels: ['labelsTr/spleen_{id}{.}']\n    images: ['imagesTr/spleen_{id}{.}']\n")
    made = make_datalists(spleens(tmp_path/"d"), tmp_path, recipe=str(tmp_path/"r.yaml"))
    assert made["name"] == "mine" and made["counts"]["pairs"] == 12
    for text, match in [("name: x\nlabel_dict: {}\ncases: []\nlabel_dicts: {}", "did you mean 'label_dict'"),
                        ("name: x\nlabel_dict: {a: b}\ncases: []", "label_dict.a"),
                        ("name: x\nlabel_dict: {}\ncases: []\nsubject: '('", "subject '\\('"),
                        ("a: !!python/object/apply:os.system [x]", "not a plain value")]:
        (tmp_path/"bad.yaml").write_text(text)
        with pytest.raises((ConfigError, FormatError), match=match): load_recipe(tmp_path/"bad.yaml")


def test_several_channels_of_the_same_case_in_two_formats(tmp_path):
    root = touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0000.mha", "labelsTr/a.nii.gz")
    found = scan("nnunet", root)
    assert found.ambiguous[0].images == ("imagesTr/a_0000.mha", "imagesTr/a_0000.nii.gz") and len(found.pairs) == 1


def test_two_labels_for_one_image(tmp_path):
    root = touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "labelsTr/a.mha")
    found = scan("msd", root)
    assert len(found.pairs) == 1 and "already belongs to labelsTr/a.mha" in found.ambiguous[0].why


@pytest.mark.slow
def test_ten_thousand_cases_in_seconds(tmp_path):
    import time
    root = spleens(tmp_path/"Task09", 10_000)
    start = time.process_time()
    assert len(scan("Task09", root).pairs) == 10_000
    assert time.process_time() - start < 5


# ----------------------------------------------------------------------------------------------------- real data

def test_openkbp(data_dir, tmp_path):
    root = data_dir/"datalists_supervoxels/openkbp"
    made = make_datalists(root, tmp_path)
    dl = read_datalist(made["path"])
    assert made["recipe"] == "openkbp" and made["counts"]["pairs"] == 6
    assert dl.testing == ({"image": "imagesTs/kbp_236.nii.gz", "label": "labelsTs/kbp_236.nii.gz"},)
    assert dl.folds() == {f: 1 for f in range(5)} and dl.label_dict[7] == "mandible" and len(dl.label_dict) == 7
    assert detect_recipe(root)[0].name == "openkbp" and len(scan("msd", root).pairs) == 6
    assert all((root/i[k]).is_file() for i in dl.items() for k in ("image", "label"))
    balanced = make_datalists(root, tmp_path, method="stratified", n_folds=2)
    assert balanced["folds"] in ({"0": 2, "1": 3}, {"0": 3, "1": 2})


def test_totalseg_examples(data_dir, tmp_path):
    root = data_dir/"datalists_supervoxels/totalseg"
    made = make_datalists(root, tmp_path, recipe="totalseg_examples", n_folds=2, test_ratio=0)
    dl = read_datalist(made["path"])
    assert {i["image"]: i["label"] for i in dl.items()} == {f"abdomen_{s}_ct.nii.gz": f"abdomen_{s}_seg.nii.gz"
                                                            for s in ("3mm", "3mm_crop30", "512")}
    fold = {i["image"]: i["fold"] for i in dl.training}
    assert fold["abdomen_3mm_ct.nii.gz"] == fold["abdomen_3mm_crop30_ct.nii.gz"] != fold["abdomen_512_ct.nii.gz"]
    assert len(dl.label_dict) == 117
    assert (dl.label_dict[2], dl.original_label_dict[2]) == ("right kidney", "kidney_right")
    mr = make_datalists(root, tmp_path, recipe="totalseg_examples_mr", n_folds=1, test_ratio=0)
    mr = read_datalist(mr["path"])
    assert mr.training == ({"image": "abdomen_mr.nii.gz", "label": "abdomen_mr_seg.nii.gz", "fold": 0},)
    assert len(mr.label_dict) == 50
    chosen, why = detect_recipe(root)
    assert chosen.name == "totalseg_examples" and len(scan("beside", root).pairs) == 4
    from medvol_nb.volume import read_volume
    present = set(np.unique(read_volume(root/"abdomen_512_seg.nii.gz").data)) - {0}
    assert present <= set(dl.label_dict)


def test_mask_folders(data_dir, tmp_path):
    root = data_dir/"synthetic_labels/totalseg_layout"
    found = scan("totalsegmentator", root)
    assert [(p.image, p.label) for p in found.pairs] == [("s0001/ct.nii.gz", "s0001/segmentations")]
    assert [m.label for m in found.missing_images] == ["s0002/segmentations"]
