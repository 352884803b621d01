"""Page 87: the main job, as a user runs it: its files, its report, what it survives and what it refuses."""
import hashlib
import json
import random
import re
import shutil
import time
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.core import DataError, MedvolError, MissingFile, OutputExists, write_json
from medvol_nb.demo import demo as full_demo
from medvol_nb.demo_steps import supervoxel_step, synth_step
from medvol_nb.volume import Volume, affine_from, read_volume, reorient, write_volume
from tests.faults.injectors import forked

CASES = 2
SLOW = ("supervoxels", "synth", "unet", "embryo") # steps that every run but one leaves out
LESS = [w for s in SLOW for w in ("--skip", s)]
SHORT = 2 # training steps of that one: the way is tested here, not how far it leads


def demo(*args, **settings): return full_demo(*args, **{"skip": SLOW, **settings})


def told(folder):
    "Digests of all files of a job, without the times"
    out = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    out.pop("times.json", None)
    out["report.json"] = re.sub(rb'"seconds": ([\d.]+|null)', b"", out["report.json"])
    out["report.html"] = re.sub(rb"(<p class=time>(?:\d+ steps, )?)(?:\d+ h \d+ min|\d+ min \d+ s|[\d.]+ s)", rb"\1",
                                out["report.html"])
    return {name: hashlib.sha256(data).hexdigest() for name, data in out.items()}


def litter(folder): return [p.name for p in Path(folder).rglob("*") if ".mvtmp-" in p.name or p.name.endswith(".lock")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The demo, not interrupted, in this process"
    out = tmp_path_factory.mktemp("straight")/"out"
    demo(out, cases=CASES)
    return out


class Loads(HTMLParser):
    "Everything that a browser would load"
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]


# ---- as a user runs it ----------------------------------------------------------------------------------------------
def test_the_command_writes_a_report_that_stands_alone_and_then_has_nothing_to_do(run_cli, tmp_path, straight):
    env = {"IN_TEST": "", "PYTEST_CURRENT_TEST": ""}
    run = run_cli("demo", "--cases", CASES, *LESS, "--json", env=env)
    assert run.returncode == 0, run.stderr
    printed, out = json.loads(run.stdout), tmp_path/"medvol_demo"
    names = [s["name"] for s in json.loads((out/"report.json").read_text())["steps"]]
    assert Path(printed["report"]) == Path("medvol_demo/report.html") and printed["ran"] == names
    assert "[1/" in run.stderr and "Verification" in run.stderr
    text = (out/"report.html").read_text()
    page = Loads(text)
    assert "img" in page.tags and not {"script", "link", "iframe"} & set(page.tags) and "http" not in text
    assert page.links and all(s.startswith("data:image/png;base64,iVBOR") for s in page.links)
    assert told(out) == told(straight) and not litter(out)
    start = time.monotonic()
    again = run_cli("demo", "--cases", CASES, *LESS, "--json", "--quiet")
    assert again.returncode == 0 and json.loads(again.stdout)["ran"] == [] and again.stderr == ""
    assert time.monotonic() - start < 10 and told(out) == told(straight)


def test_the_report_in_numbers(straight):
    report = json.loads((straight/"report.json").read_text())
    assert list(report) == ["title", "steps"]
    for step in report["steps"]:
        assert {"name", "title", "folder", "seconds", "text", "figures", "table", "pictures"} == step.keys()
        assert (straight/step["folder"]).is_dir() and step["text"] and step["seconds"] >= 0
        assert all((straight/step["folder"]/p).read_bytes()[:4] == b"\x89PNG" for p in step["pictures"].values())
    steps = {s["name"]: s for s in report["steps"]}
    assert steps["verify"]["figures"] == {"errors": 0, "warnings": 0}
    assert steps["dataset"]["figures"] == {"cases": CASES} and steps["datalist"]["figures"]["pairs"] == CASES


def test_the_brain_dataset_is_what_it_says(straight):
    "Volumes of the same head in mL; images and labels on the same grid; other voxel sizes and orders"
    names = ["mni152", "warped_01"]
    pairs = [[read_volume(straight/"01_dataset"/sub/f"{n}.nii.gz") for sub in ("images", "labels")] for n in names]
    for img, lbl in pairs:
        assert np.allclose(img.affine, lbl.affine) and img.shape == lbl.shape
        assert set(np.unique(lbl.data)) == {0, 1, 2, 3}
        total = np.count_nonzero(lbl.data)*float(np.prod(lbl.spacing))/1000
        assert 1300 < total < 2300 and img.data.dtype == np.int16 and lbl.data.dtype == np.uint8
    assert [lbl.orientation for _, lbl in pairs] == ["RAS", "LPS"]
    assert "white matter" in (straight/"report.html").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_byte(tmp_path, straight, workers):
    demo(tmp_path/"out", cases=CASES, workers=workers)
    assert told(tmp_path/"out") == told(straight)


def test_the_whole_job(tmp_path, straight, monkeypatch):
    "All steps, twice: the same bytes, and the short ones as without the others"
    monkeypatch.setattr("medvol_nb.demo.synth_step", partial(synth_step, n_pairs=10, side=64))
    runs = [full_demo(tmp_path/k, cases=CASES, train_steps=SHORT) for k in "ab"]
    first = told(tmp_path/"a")
    assert first == told(tmp_path/"b") and not litter(tmp_path/"a") and set(SLOW) <= set(runs[0]["ran"])
    alone = told(straight)
    assert all(first[n] == alone[n] for n in alone if n[:2].isdigit())
    assert 0.7 < runs[0]["figures"]["supervoxels"]["ASA"] < 1 and 0 < runs[0]["figures"]["unet"]["Dice"] < 1


def test_a_case_without_supervoxels_is_told_and_not_in_the_table(tmp_path):
    case = phantoms.abdomen((24, 20, 22), seed=0)
    lbl = Volume(case.lbl, affine_from(case.spacing))
    for k, data in enumerate((np.where(case.lbl > 0, np.nan, 0).astype(np.float32), case.img.astype(np.float32))):
        write_volume(replace(lbl, data=data), tmp_path/f"img_{k}.nii.gz")
        write_volume(lbl, tmp_path/f"lbl_{k}.nii.gz")
    items = [{"image": f"img_{k}.nii.gz", "label": f"lbl_{k}.nii.gz", "fold": 0} for k in range(2)]
    write_json(tmp_path/"list.json", {"training": items})
    (tmp_path/"step").mkdir()
    told = supervoxel_step(tmp_path/"step", tmp_path/"list.json", tmp_path, 30)
    assert [r["case"] for r in told.table] == ["img_1.nii.gz"] and "supervoxels" in told.table[0]
    assert "Left out: img_0.nii.gz (" in told.text and "NaN" in told.text


def test_steps_can_be_left_out(tmp_path):
    for names, text in ((["nonsense"], "there is no step 'nonsense'"), (["datalist"], "needs what is left out")):
        with pytest.raises(MedvolError, match=text): full_demo(tmp_path/"out", skip=names)


def test_a_dry_run_writes_nothing(run_cli, tmp_path):
    run = run_cli("demo", "--dry_run", "--out", tmp_path/"out")
    assert run.returncode == 0 and "verify: Verification" in run.stdout and list(tmp_path.iterdir()) == []


# ---- what runs again ------------------------------------------------------------------------------------------------
def test_other_cases_run_the_steps_again(tmp_path, straight):
    shutil.copytree(straight, tmp_path/"out")
    assert demo(tmp_path/"out", cases=CASES)["ran"] == []
    steps = [s["name"] for s in json.loads((straight/"report.json").read_text())["steps"]]
    assert demo(tmp_path/"out", cases=1)["ran"] == steps
    demo(tmp_path/"one", cases=1)
    assert told(tmp_path/"out") == told(tmp_path/"one")
    assert demo(tmp_path/"out", cases=CASES)["ran"] == steps and told(tmp_path/"out") == told(straight)


@pytest.mark.parametrize("file, step", [("images/mni152.nii.gz", "dataset"), ("datalist.json", "datalist")])
def test_tampered_outputs_are_made_again(tmp_path, straight, file, step):
    shutil.copytree(straight, tmp_path/"out")
    path = next((tmp_path/"out").glob(f"*_{step}"))/file
    path.write_bytes(path.read_bytes()[:-30])
    assert demo(tmp_path/"out", cases=CASES)["ran"] == [step] and told(tmp_path/"out") == told(straight)


def test_existing_output(tmp_path, straight):
    shutil.copytree(straight, tmp_path/"out")
    with pytest.raises(OutputExists, match="--on-exists"): demo(tmp_path/"out", cases=CASES, on_exists="error")
    ran = demo(tmp_path/"out", cases=CASES, on_exists="overwrite")["ran"]
    assert "dataset" in ran and "statistics" in ran and told(tmp_path/"out") == told(straight)


# ---- killed ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed, moments", [(0, 3), pytest.param(1, 10, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_then_the_same_command(tmp_path, straight, seed, moments):
    def job(out): return lambda: demo(out, cases=CASES)
    steps, draw = forked(job(tmp_path/"warm"), tmp_path/"warm"), random.Random(seed)
    for k in range(moments):
        out = tmp_path/f"out{k}"
        pause = draw.choice([0, draw.uniform(0, 0.05)])
        died = forked(job(out), out, at=draw.randrange(1, steps), pause=pause)
        assert died < 0 or pause
        demo(out, cases=CASES)
        assert told(out) == told(straight) and litter(out) == []


# ---- the user's own volumes -----------------------------------------------------------------------------------------
def pair(root, name, change=lambda v: v, label=True):
    "One image and its label, changed by `change`"
    case = phantoms.abdomen(seed=sum(map(ord, name)))
    img = Volume(case.img[::2, ::2, ::2].astype(np.int16), affine_from([2*s for s in case.spacing]))
    write_volume(img, root/"imagesTr"/f"{name}_0000.nii.gz")
    lbl = replace(img, data=case.lbl[::2, ::2, ::2].astype(np.uint8))
    if label: write_volume(change(lbl), root/"labelsTr"/f"{name}.nii.gz")


def shifted(vol):
    affine = vol.affine.copy()
    affine[0, 3] += 5
    return replace(vol, affine=affine)


@pytest.fixture
def own(tmp_path):
    "A folder in nnU-Net's layout with one of each usual fault"
    root = tmp_path/"own"
    for sub in ("imagesTr", "labelsTr"): (root/sub).mkdir(parents=True)
    for name in ("good_1", "good_2"): pair(root, name)
    pair(root, "lonely", label=False)
    pair(root, "cut")
    pair(root, "shifted", shifted)
    pair(root, "halves", lambda v: replace(v, data=v.data*np.float32(0.5)))
    pair(root, "flipped", lambda v: reorient(v, "LPS"))
    file = root/"labelsTr"/"cut.nii.gz"
    file.write_bytes(file.read_bytes()[:-200])
    return root


def findings(out):
    "(case, code) of every finding in the report"
    steps = {s["name"]: s for s in json.loads((out/"report.json").read_text())["steps"]}
    rows = [(r["code"], " ".join(map(str, r.values()))) for r in steps["verify"]["table"]]
    names = ("good_1", "good_2", "lonely", "cut", "shifted", "halves", "flipped")
    return {(n, code) for code, text in rows for n in names if n in text}, steps


def test_own_volumes_are_verified_and_findings_do_not_fail_the_job(run_cli, tmp_path, own):
    before = {p: p.read_bytes() for p in own.rglob("*") if p.is_file()}
    run = run_cli("demo", "--data", own, *LESS, "--out", tmp_path/"out", "--json")
    assert run.returncode == 0, run.stderr
    found, steps = findings(tmp_path/"out")
    assert {("cut", "E301"), ("shifted", "E203"), ("halves", "E302"), ("flipped", "W211")} <= found
    assert {n for n, code in found if code[0] == "E"} == {"cut", "shifted", "halves"}
    assert steps["verify"]["figures"]["errors"] == 3 == json.loads(run.stdout)["figures"]["verify"]["errors"]
    assert "lonely" in (tmp_path/"out"/"report.html").read_text() and steps["datalist"]["figures"]["pairs"] == 6
    assert {p: p.read_bytes() for p in own.rglob("*") if p.is_file()} == before


def test_a_changed_file_of_the_user_is_noticed(tmp_path, own):
    demo(tmp_path/"out", own)
    assert demo(tmp_path/"out", own)["ran"] == []
    pair(own, "cut2")
    assert demo(tmp_path/"out", own)["figures"]["datalist"]["pairs"] == 7
    (own/"labelsTr"/"cut.nii.gz").write_bytes((own/"labelsTr"/"good_1.nii.gz").read_bytes())
    done = demo(tmp_path/"out", own)
    assert "verify" in done["ran"] and done["figures"]["verify"]["errors"] == 2
    assert demo(tmp_path/"out", own, limit=2)["figures"]["datalist"]["pairs"] == 2


@pytest.mark.parametrize("table, code", [({"1": "a"}, "E303"), (None, None)])
def test_label_names_are_compared_if_there_are_any(tmp_path, table, code):
    for sub in ("imagesTr", "labelsTr"): (tmp_path/"own"/sub).mkdir(parents=True)
    pair(tmp_path/"own", "good_1")
    if table: write_json(tmp_path/"own"/"dataset.json", {"labels": table})
    errors = demo(tmp_path/"out", tmp_path/"own")["figures"]["verify"]["errors"]
    assert errors == bool(code) and ({c for _, c in findings(tmp_path/"out")[0]} >= {code} if code else True)


@pytest.mark.parametrize("layout", ["none", "file", "empty", "one folder", "no pair"])
def test_folders_that_hold_no_dataset_are_refused_in_one_line(run_cli, tmp_path, layout):
    root = tmp_path/"own"
    if layout != "none": root.mkdir()
    if layout == "file": shutil.rmtree(root); root.write_text("x")
    if layout == "one folder": (root/"images").mkdir()
    if layout == "no pair":
        for sub in ("images", "labels"): (root/sub).mkdir()
    run = run_cli("demo", "--data", root, *LESS, "--out", tmp_path/"out")
    assert run.returncode == 1 and run.stdout == "" and "own" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1 and "Traceback" not in run.stderr and not (tmp_path/"out").exists()


def test_two_images_of_one_case_are_never_chosen_between_in_silence(tmp_path, own):
    shutil.copy(own/"imagesTr"/"good_1_0000.nii.gz", own/"imagesTr"/"good_1.nii.gz")
    try: figures = demo(tmp_path/"out", own)["figures"]
    except DataError as e: assert "good_1" in str(e) and not (tmp_path/"out").exists()
    else: assert figures["datalist"]["pairs"] == 6 and ("good_1", "W105") in findings(tmp_path/"out")[0]


@pytest.mark.parametrize("words", [["--cases", "many"], ["--no-such"], ["extra"], ["--on-exists", "maybe"],
                                   ["--seed", "1.5"]])
def test_usage_errors_exit_2(run_cli, tmp_path, words):
    run = run_cli("demo", *words)
    assert run.returncode == 2 and "Usage" in run.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--cases", "0"], ["--limit", "0"], ["--seed", "-1"]])
def test_numbers_out_of_range_exit_1(run_cli, tmp_path, words):
    run = run_cli("demo", *words)
    assert run.returncode == 1 and "internal error" not in run.stderr and ">= " in run.stderr


def test_places_that_cannot_be(tmp_path):
    (tmp_path/"file").write_text("mine")
    with pytest.raises(MedvolError, match="is a file"): demo(tmp_path/"file", cases=1)
    with pytest.raises(MissingFile, match="mkdir"): demo(tmp_path/"no"/"out", cases=1)
    assert (tmp_path/"file").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_real_planning_scans_have_no_errors(run_cli, tmp_path, data_dir):
    "OpenKBP: planning CTs and organ labels"
    source = data_dir/"datalists_supervoxels"/"openkbp"
    if not source.is_dir(): pytest.skip(f"{source} is not there")
    for sub in ("imagesTr", "labelsTr"):
        (tmp_path/"kbp"/sub).mkdir(parents=True)
        for p in (source/sub).iterdir(): shutil.copyfile(p, tmp_path/"kbp"/sub/p.name)
    run = run_cli("demo", "--data", tmp_path/"kbp", *LESS, "--json", "--workers", 2)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)["figures"]
    assert figures["verify"]["errors"] == 0 and figures["datalist"]["pairs"] == 5
    assert figures["statistics"]["classes"] == 7 and figures["statistics"]["labelled [mL]"] > 500
