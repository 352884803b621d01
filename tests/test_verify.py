"""Whole lists: structure, leaks, forgotten crops, classes, the real data with its planted traps, and A7-A10."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.checks import CODES
from medvol_nb.core import ConfigError, DataError, read_csv, read_json
from medvol_nb.datalists import DataList, write_datalist
from medvol_nb.labels import LabelSpace
from medvol_nb.verify import verify
from medvol_nb.volume import Volume, affine_from, crop, read_volume, write_volume

SHAPE = (24, 20, 22)


def case(folder, name, seed, **changes):
    p = phantoms.abdomen(shape=SHAPE, seed=seed)
    img, lbl = (Volume(a, affine_from(p.spacing)) for a in (p.img, p.lbl))
    write_volume(img, folder / f"{name}_img.nii.gz", "overwrite")
    write_volume(replace(lbl, **changes), folder / f"{name}_lbl.nii.gz", "overwrite")
    return {"image": f"{name}_img.nii.gz", "label": f"{name}_lbl.nii.gz"}


def listed(folder, name, training, testing=(), names=None):
    names = phantoms.abdomen(shape=SHAPE).names if names is None else names
    dl = DataList(name, tuple(training), tuple(testing), names, {}, extra={})
    write_datalist(dl, folder / f"{name}.json", "overwrite")
    return folder / f"{name}.json"


@pytest.fixture
def dataset(tmp_path):
    items = [{**case(tmp_path, f"c{k}", k), "fold": k % 3} for k in range(6)]
    return tmp_path, items


def codes(report):
    return dict(report.counts)


@pytest.mark.parametrize("level", ["exists", "header", "full"])
def test_a_sound_list_is_silent(dataset, level):
    folder, items = dataset
    report = verify([listed(folder, "A", items[:5], items[5:])], level=level)
    assert report.ok and report.findings == [] and report.pairs == 6


def test_E103_E104_E106_W105(dataset):
    folder, items = dataset
    odd = {"image": items[0]["label"], "label": items[1]["label"], "fold": 0}
    report = verify([listed(folder, "A", [*items[:4], dict(items[1]), odd], items[4:5])], level="exists")
    assert set(codes(report)) == {"E103", "E104", "W105"}
    assert next(r for r in report.findings if r["code"] == "W105")["finding"].count("c5_") == 2


def test_names_that_leave_the_folder_are_findings_not_reads(dataset, tmp_path):
    folder, items = dataset
    path = listed(folder, "A", items)
    (tmp_path / "inner").mkdir()
    os.symlink("/etc", tmp_path / "inner" / "link")
    text = json.loads(path.read_text())
    text["training"][0]["image"] = "inner/link/passwd.nii"
    path.write_text(json.dumps(text))
    assert "E106" in codes(verify([path], level="exists"))


def test_E401_W403_same_content_in_and_across_lists(dataset):
    folder, items = dataset
    for k, name in enumerate(("copy", "other", "same")):
        shutil.copy(folder / items[k]["image"], folder / f"{name}_img.nii.gz")
        shutil.copy(folder / items[k]["label"], folder / f"{name}_lbl.nii.gz")
    copy, other, same = ({"image": f"{n}_img.nii.gz", "label": f"{n}_lbl.nii.gz"} for n in ("copy", "other", "same"))
    a = listed(folder, "A", items, [copy])
    b = listed(folder, "B", [{**other, "fold": 1}, {**same, "fold": 2}])
    for level in ("header", "full"):
        found = {
            (r["code"], r["dataset"], r["path"]) for r in verify([a, b], level=level).findings if r["code"] != "W105"
        }
        assert found == {
            ("E401", "A", "copy_img.nii.gz"),
            ("W403", "B", "other_img.nii.gz"),
            ("W403", "B", "same_img.nii.gz"),
        }


def test_same_content_with_another_header_is_found_at_the_full_level(dataset):
    folder, items = dataset
    vol = read_volume(folder / items[0]["image"])
    write_volume(replace(vol, affine=affine_from(vol.spacing, (50, 0, 0))), folder / "moved_img.nii.gz")
    lbl = read_volume(folder / items[0]["label"])
    write_volume(replace(lbl, affine=affine_from(vol.spacing, (50, 0, 0))), folder / "moved_lbl.nii.gz")
    path = listed(folder, "A", items, [{"image": "moved_img.nii.gz", "label": "moved_lbl.nii.gz"}])
    assert "E401" not in codes(verify([path])) and "E401" in codes(verify([path], level="full"))


def test_D7_D8_E402_subject_in_two_folds_and_in_test(dataset):
    folder, items = dataset
    items = [{**i, "subject": "p1" if k in (0, 1) else f"p{k}"} for k, i in enumerate(items)]
    report = verify([listed(folder, "A", items[:5], [{**items[5], "subject": "p4"}])])
    assert codes(report) == {"E402": 2} and "'p1' is in fold 0" in report.findings[0]["finding"]
    by_name = verify(
        [listed(folder, "B", [{k: v for k, v in i.items() if k != "subject"} for i in items])], subject=r"^(c)\d"
    )
    assert codes(by_name) == {"E402": 1}
    with pytest.raises(ConfigError, match="subject, data set 'B': .* is no regular expression"):
        verify([folder / "B.json"], subject="(")
    with pytest.raises(DataError, match="subject, data set 'B': .* does not match 1 of 1 items"):
        verify(
            [listed(folder, "B", items[:1] and [{k: v for k, v in items[0].items() if k != "subject"}])], subject="zzz"
        )


def test_E303_W304_against_the_dictionary(dataset):
    folder, items = dataset
    names = {1: "liver", 2: "spleen", 99: "dragon"}
    report = verify([listed(folder, "A", items, names=names)], level="full")
    assert set(codes(report)) == {"E303", "W304"} and codes(report)["W304"] == 1 and "dragon" in str(report)


def test_W309_a_crop_whose_affine_was_forgotten(dataset):
    folder, items = dataset
    whole = read_volume(folder / items[0]["image"])
    part = crop(whole, (0, 0, 9), (*SHAPE[:2], 8))
    for name, v in (("good", part), ("bad", replace(part, affine=whole.affine))):
        write_volume(v, folder / f"{name}_img.nii.gz")
        write_volume(replace(v, data=(v.data > 0).astype(np.uint8)), folder / f"{name}_lbl.nii.gz")
    more = [{"image": f"{n}_img.nii.gz", "label": f"{n}_lbl.nii.gz", "fold": 0} for n in ("good", "bad")]
    report = verify([listed(folder, "A", [*items, *more])], level="full")
    rows = [r for r in report.findings if r["code"] == "W309"]
    assert [r["path"] for r in rows] == ["bad_img.nii.gz"] and "index (0, 0, 9)" in rows[0]["finding"]


def test_label_space_problems_of_these_lists_join_the_table(dataset, tmp_path):
    folder, items = dataset
    names = {**phantoms.abdomen(shape=SHAPE).names, 3: "dragon"}
    LabelSpace.shipped().extended("A", names, unknown="unmapped").save(tmp_path / "space.json")
    report = verify([listed(folder, "A", items, names=names)], space=tmp_path / "space.json")
    assert codes(report) == {"E405": 3, "W404": 3} and "dragon" in str(report) and "VerSe" not in str(report)


def test_pseudo_labels_and_supervoxels_are_checked_too(dataset):
    folder, items = dataset
    items[0]["pseudo_label"], items[1]["label_sv"] = "gone.nii.gz", items[1]["label"]
    report = verify([listed(folder, "A", items)])
    assert codes(report) == {"E102": 1} and "pseudo_label" in report.findings[0]["finding"]


def test_fail_on_and_outputs(dataset, tmp_path):
    folder, items = dataset
    case(folder, "c0", 0, data=phantoms.abdomen(shape=SHAPE, seed=0).lbl.astype(np.float32))
    path = listed(folder, "A", items)
    assert [verify([path], fail_on=f).ok for f in ("error", "warning", "never")] == [True, False, True]
    report = verify([path], out=tmp_path / "report")
    assert read_csv(tmp_path / "report" / "findings.csv")[0]["code"] == "W209"
    assert read_json(tmp_path / "report" / "report.json")["counts"] == report.counts


def test_every_code_has_a_title_and_a_hint():
    assert all(c[0] in "EW" and len(t) > 5 and len(h) > 10 for c, (t, h) in CODES.items())
    wanted = (
        "E101 E102 E103 E104 W105 E201 E202 E203 W204 W205 W206 W207 E208 W209 W210 E301 E302 E303 W304 W305 W306 W307 "
        "W308 E401 E402 W403 W404 E405 E406 W407"
    ).split()
    assert set(wanted) <= set(CODES)


def test_A10_the_report_is_the_same_for_any_workers_cache_and_file_order(dataset, tmp_path):
    folder, items = dataset
    case(folder, "c2", 2, affine=affine_from((1, 1, 1)))
    path = listed(folder, "A", items)
    reports = []
    for workers, cache in ((0, None), (2, None), (0, tmp_path / "c"), (2, tmp_path / "c")):
        out = tmp_path / f"out{len(reports)}"
        verify([path], level="full", workers=workers, cache=cache, out=out)
        reports.append((out / "report.json").read_bytes() + (out / "findings.csv").read_bytes())
    assert len(set(reports)) == 1


def test_A8_killed_and_resumed(dataset, tmp_path):
    folder, items = dataset
    path = listed(folder, "A", items)
    want = verify([path], level="full")
    script = "import sys; from medvol_nb.verify import verify; verify([sys.argv[1]], level='full', cache=sys.argv[2])"
    for delay in (0.5, 0.7, 0.9):
        run = subprocess.Popen([sys.executable, "-c", script, str(path), str(tmp_path / "cache")])
        time.sleep(delay)
        run.kill()
        run.wait()
    assert verify([path], level="full", cache=tmp_path / "cache") == want
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["full.jsonl"]


# ------------------------------------------------------------------------------------------------------ real data


def link(source: Path, target: Path, names: dict[str, str]) -> None:
    for new, old in names.items():
        (target / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / old, target / new)


@pytest.fixture
def real(data_dir, tmp_path):
    return data_dir / "datalists_supervoxels", tmp_path


def test_real_head_and_neck_cases_have_no_false_errors(real):
    source, folder = real
    pairs = [
        (p, p.replace("images", "labels"))
        for p in sorted(str(q.relative_to(source)) for q in source.glob("openkbp/images*/*"))
    ]
    items = [{"image": a, "label": b, "fold": k % 3} for k, (a, b) in enumerate(pairs)]
    names = dict(
        enumerate(("brainstem", "spinal cord", "right parotid", "left parotid", "esophagus", "larynx", "mandible"), 1)
    )
    path = folder / "KBP.json"
    write_datalist(DataList("KBP", tuple(items), (), names, {}, extra={}), path)
    report = verify([path], root=source, level="full")
    assert report.ok and report.pairs == 6 and not {c for c in report.counts if c not in ("W105",)}, report


def test_real_traps_are_found_by_name(real):
    "The traps of the folder's README: LPS image with LAS label, int32 CT, crop with the affine of the whole"
    source, folder = real
    pairs = [
        (f"totalseg/abdomen_{n}_ct.nii.gz", f"totalseg/abdomen_{n}_seg.nii.gz") for n in ("3mm", "3mm_crop30", "512")
    ]
    pairs.append(("totalseg/abdomen_mr.nii.gz", "totalseg/abdomen_mr_seg.nii.gz"))
    items = [{"image": a, "label": b, "fold": 0} for a, b in pairs]
    path = folder / "TS.json"
    write_datalist(DataList("TS", tuple(items), (), {}, {}, extra={}), path)
    report = verify([path], root=source, level="full")
    by_item = {}
    for r in report.findings:
        by_item.setdefault(r["item"], set()).add(r["code"])
    assert report.ok
    assert (
        by_item["training/0"] == {"W207", "W209"}
        and "W309" in by_item["training/1"]
        and by_item["training/2"] == {"W211"}
    )
    assert "W309" not in by_item["training/3"]
    row = next(r for r in report.findings if r["code"] == "W309")
    assert "index (0, 0, 82)" in row["finding"] and "246" in row["finding"]


def test_real_files_made_imperfect(real):
    "Swapped labels, truncation, shifted affine, float labels, a duplicated subject, a renamed folder"
    source, folder = real
    ids = ("017", "060", "083", "099", "112")
    link(
        source / "openkbp",
        folder,
        {f"i/{k}.nii.gz": f"imagesTr/kbp_{k}.nii.gz" for k in ids}
        | {f"l/{k}.nii.gz": f"labelsTr/kbp_{k}.nii.gz" for k in ids}
        | {"i/new.nii.gz": "imagesTr/kbp_017.nii.gz", "l/new.nii.gz": "labelsTr/kbp_017.nii.gz"},
    )
    (folder / "l" / "017.nii.gz").rename(folder / "x")
    (folder / "l" / "060.nii.gz").rename(folder / "l" / "017.nii.gz")
    (folder / "x").rename(folder / "l" / "060.nii.gz")
    raw = (folder / "i" / "083.nii.gz").read_bytes()
    (folder / "i" / "083.nii.gz").write_bytes(raw[: len(raw) * 2 // 3])
    v = read_volume(folder / "l" / "099.nii.gz")
    write_volume(
        replace(v, affine=v.affine + np.array([[0, 0, 0, 7.5], *[[0] * 4] * 3])),
        folder / "l" / "099.nii.gz",
        "overwrite",
    )
    v = read_volume(folder / "l" / "112.nii.gz")
    write_volume(replace(v, data=v.data.astype(np.float32) * 1.01), folder / "l" / "112.nii.gz", "overwrite")
    items = [{"image": f"i/{k}.nii.gz", "label": f"l/{k}.nii.gz", "fold": n % 5} for n, k in enumerate(ids)]
    path = folder / "K.json"
    write_datalist(
        DataList("K", tuple(items), ({"image": "i/new.nii.gz", "label": "l/new.nii.gz"},), {}, {}, extra={}), path
    )
    report = verify([path], level="full")
    found = {}
    for r in report.findings:
        found.setdefault(r["item"], set()).add(r["code"])
    assert {"E203"} <= found["training/0"] and {"E203"} <= found["training/1"]  # spacings of the two patients differ
    assert found["training/2"] == {"E301"} and found["training/3"] == {"E203"}
    assert {"E302", "W209"} <= found["training/4"] and found["testing/0"] >= {"E401"}
    (folder / "i").rename(folder / "images")
    assert codes(verify([path], level="exists"))["E101"] == 6
