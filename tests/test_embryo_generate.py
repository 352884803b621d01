"""Synthetic runs, their reader, and mixing (acceptance A13; defects D20 to D23)."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from medvol_nb import phantoms
from medvol_nb.core import (
    ConfigError,
    DataError,
    FormatError,
    Locked,
    MissingFile,
    OutputExists,
    lock,
    read_json,
    rng_for,
)
from medvol_nb.embryo.finetune import finetune
from medvol_nb.embryo.finetuned import load_finetuned
from medvol_nb.embryo.generate import (
    Mixed,
    RunSpec,
    SyntheticRuns,
    fill_run,
    generate,
    make_run,
    mix,
    read_note,
    read_record,
    save_synthetic,
    write_run,
)
from medvol_nb.embryo.phases import PHASES, FocalPlane, Phase
from medvol_nb.embryo.tiny import make_tiny_sd
from tests.faults.injectors import forked
from tests.faults.jobs import content

QUICK = {"num_images": 5, "steps": 2, "batch_size": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_sd(tmp_path_factory.mktemp("base") / "tiny", channels=(32, 32))


@pytest.fixture(scope="module")
def model(tiny):
    return load_finetuned(tiny, device="cpu")


def paint(seeds, black=()):
    "Cheap images that belong to their seeds; some are black"
    frames = [phantoms.embryo_frame(5, 24, seed=s) * (s not in black) for s in seeds]
    return np.repeat(np.stack(frames)[..., None] / np.float32(255), 3, -1)


def spec_of(**more):
    return RunSpec(**{"phase": "t4", "plane": "F+00", "prompt": "x", "model": "m", "num_images": 12} | more)


def images(folder):
    return {k: v for k, v in content(folder).items() if k != "metadata.json"}


# ---------------------------------------------------------------- A13


def test_A13_record_images_and_marks(model, tmp_path):
    about = make_run(model, tmp_path / "r", "t9+", plane="F15", **QUICK)
    assert about == read_json(tmp_path / "r" / "metadata.json")
    required = {
        "datetime",
        "prompt",
        "phase",
        "focal-plane",
        "synthetic",
        "model",
        "run",
        "seeds",
        "num_images",
        "steps",
    }
    required |= {
        "guidance_scale",
        "scheduler",
        "size",
        "versions",
        "complete",
        "rejected",
        "licences",
        "source_dataset",
    }
    assert about["size"] == 64  # the model's own
    assert required <= set(about) and about["complete"] is True and about["synthetic"] is True
    assert about["phase"] == "t9+" and about["focal-plane"] == "F+15" and about["seeds"] == [0, 1, 2, 3, 4]
    assert sorted(images(tmp_path / "r")) == [f"img{k}.jpg" for k in range(5)]
    for k in range(5):
        with Image.open(tmp_path / "r" / f"img{k}.jpg") as img:
            assert img.mode == "L" and img.size == (64, 64) and img.format == "JPEG"
        note = read_note(tmp_path / "r" / f"img{k}.jpg")
        assert note["synthetic"] is True and note["seed"] == k and note["run"] == about["identity"]


def test_D22_the_record_holds_the_formatted_prompt(model, tmp_path):
    about = make_run(model, tmp_path / "r", "t2", prompt="an embryo at {phase} in {focal_plane}", **QUICK)
    assert about["prompt"] == "an embryo at t2 in F+00"
    with pytest.raises(ConfigError, match="only {phase} and {focal_plane}"):
        make_run(model, tmp_path / "x", "t2", prompt="an {embryo}", **QUICK)
    assert not (tmp_path / "x").exists()


def test_A13_resume_fills_gaps_and_leaves_the_rest(model, tmp_path):
    make_run(model, tmp_path / "r", "t4", **QUICK)
    before = content(tmp_path / "r")
    for k in (0, 3, 4):
        (tmp_path / "r" / f"img{k}.jpg").unlink()
    times = {k: (tmp_path / "r" / f"img{k}.jpg").stat().st_mtime_ns for k in (1, 2)}
    make_run(model, tmp_path / "r", "t4", resume=True, **QUICK)
    assert content(tmp_path / "r") == before
    assert times == {k: (tmp_path / "r" / f"img{k}.jpg").stat().st_mtime_ns for k in (1, 2)}


@pytest.mark.parametrize("form", ["jpg", "png"])
def test_A13_images_belong_to_seeds_not_to_batches(model, tmp_path, form):
    for size in (1, 3):
        make_run(model, tmp_path / f"b{size}", "t4", **QUICK | {"batch_size": size, "format": form})
    a, b = (
        np.stack([np.asarray(Image.open(tmp_path / n / f"img{k}.{form}")).astype(int) for k in range(5)])
        for n in ("b1", "b3")
    )
    assert np.abs(a - b).max() <= (2 if form == "png" else 6)  # P11: one level; JPEG rounds coefficients
    make_run(model, tmp_path / "later", "t4", **QUICK | {"seed": 2, "num_images": 3, "batch_size": 1, "format": form})
    later = np.stack([np.asarray(Image.open(tmp_path / "later" / f"img{k}.{form}")).astype(int) for k in range(3)])
    assert np.array_equal(later, a[2:])


def test_A13_constant_images_are_rejected(tmp_path):
    (tmp_path / "r").mkdir()
    seeds, rejected = fill_run(tmp_path / "r", spec_of(), lambda s: paint(s, black=(0, 5, 17)), max_rejects=3)
    assert (seeds, rejected) == ([12, 1, 2, 3, 4, 29, 6, 7, 8, 9, 10, 11], 3) and len(images(tmp_path / "r")) == 12
    (tmp_path / "s").mkdir()
    with pytest.raises(DataError, match="3 images were constant or not finite, 2 are put up with"):
        fill_run(tmp_path / "s", spec_of(), lambda s: paint(s) * np.float32("nan"))
    assert images(tmp_path / "s") == {}


def test_A13_killed_at_any_step_and_run_again(tmp_path):
    def job(name, resume=True):
        draw = lambda s: paint(s, black=(2, 14))  # noqa: E731
        return write_run(tmp_path / name, spec_of(), draw, resume=resume)

    job("whole")
    steps = forked(lambda: job("count"), tmp_path)
    for k, at in enumerate(sorted(rng_for(1, "kill").choice(steps - 4, 12, replace=False) + 2)):
        assert forked(lambda n=f"k{k}": job(n), tmp_path, int(at)) < 0
        job(f"k{k}")
        assert images(tmp_path / f"k{k}") == images(tmp_path / "whole")
        records = [read_json(tmp_path / n / "metadata.json") | {"datetime": ""} for n in (f"k{k}", "whole")]
        assert records[0] == records[1]
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".mvtmp") or p.suffix == ".lock"]


def test_images_of_another_run_are_not_taken_over(tmp_path):
    "A file of the right name that this run did not make is drawn again"
    folder = tmp_path / "r"
    write_run(folder, spec_of(), paint)
    before = content(folder)
    save_synthetic(folder / "img1.jpg", np.zeros((24, 24), np.uint8), {"run": "other", "index": 1, "seed": 1})
    shutil.copy(folder / "img2.jpg", folder / "img3.jpg")
    (folder / "img4.jpg").write_bytes(b"")
    write_run(folder, spec_of(), paint, resume=True)
    assert content(folder) == before


def test_folders_that_are_not_this_run_are_refused(model, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("notes", "file"):
        for how in ({}, {"resume": True}, {"on_exists": "overwrite"}):
            with pytest.raises(OutputExists):
                make_run(model, tmp_path / name, "t4", **QUICK, **how)
    assert (tmp_path / "notes" / "a.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    make_run(model, tmp_path / "empty", "t4", **QUICK)
    with pytest.raises(OutputExists, match="holds a run already"):
        make_run(model, tmp_path / "empty", "t4", **QUICK)
    with pytest.raises(OutputExists, match=r"other settings .*seed"):
        make_run(model, tmp_path / "empty", "t4", resume=True, seed=3, **QUICK)
    make_run(model, tmp_path / "empty", "t2", on_exists="overwrite", **QUICK)
    assert read_json(tmp_path / "empty" / "metadata.json")["phase"] == "t2"
    with lock(tmp_path / "empty"), pytest.raises(Locked):
        make_run(model, tmp_path / "empty", "t2", resume=True, **QUICK)


# ---------------------------------------------------------------- the command


def test_D21_models_are_folders(tiny, tmp_path):
    told = generate(phase=["t2"], dataset_name="new-synthetic-t2", model_path=tiny, synthetic_dataset_parent=tmp_path,
                    num_images=2, steps=2, device="cpu")  # fmt: skip
    assert len(SyntheticRuns(told["runs"][0]["folder"])) == 2


def test_command_draws_from_the_latest_run_and_knows_its_phases(tiny, tmp_path):
    (tmp_path / "f" / "images").mkdir(parents=True)
    (tmp_path / "f" / "descriptions").mkdir()
    for k, phase in enumerate(("t2", "tM")):
        Image.fromarray(phantoms.embryo_frame(PHASES.index(phase), 64)).save(tmp_path / "f" / "images" / f"{k}.png")
        (tmp_path / "f" / "descriptions" / f"{k}.txt").write_text(
            f"a microscopic image of a human embryo at phase {phase}"
        )
    finetune(model=str(tiny), image_folder=tmp_path / "f", output_dir=tmp_path / "m", run_name="a", device="cpu",
             max_train_steps=2, num_validation_images=0)  # fmt: skip
    common = {"synthetic_dataset_parent": tmp_path, "num_images": 2, "steps": 2, "device": "cpu"}
    told = generate(phase=["all"], dataset_name="d", latest_model_in=tmp_path / "m", **common)
    assert [r["prompt"] for r in told["runs"]] == [
        f"a microscopic image of a human embryo at phase {p}"
        for p in ("t2", "tM")  # the words of the training
    ]
    assert sorted(p.name for p in tmp_path.glob("d-*")) == ["d-t2", "d-tM"]
    about = read_json(tmp_path / "d-tM" / "metadata.json")
    assert about["run"] and about["source_dataset"]["n"] == 2 and "CC BY-NC-SA" in about["licences"][0]
    with pytest.raises(ConfigError, match="never saw t8"):
        generate(phase=["t2", "t8"], dataset_name="e", latest_model_in=tmp_path / "m", **common)
    assert not list(tmp_path.glob("e*"))
    lora = tmp_path / "m" / "a" / "lora" / "pytorch_lora_weights.safetensors"
    told = generate(phase=["t2"], dataset_name="g", lora=lora, model=str(tiny), dry_run=True, **common)
    assert told["runs"][0]["prompt"].endswith("t2") and not list(tmp_path.glob("g*"))


@pytest.mark.parametrize(
    "more, error, words",
    [
        ({"phase": []}, ConfigError, "at least one"),
        ({"phase": ["all", "t2"]}, ConfigError, "stands alone"),
        ({"phase": ["T2"]}, ConfigError, "must be one of"),
        ({"focal_plane": "F20"}, ConfigError, "focal plane"),
        ({"num_images": 0}, ConfigError, "num_images"),
        ({"size": 20}, ConfigError, "multiple of 8"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"guidance_scale": 0.5}, ConfigError, "guidance_scale"),
        ({"dataset_name": "a/b"}, ConfigError, "folder name"),
        ({"synthetic_dataset_parent": "/nowhere/at/all"}, MissingFile, "mkdir"),
        ({"lora": "x.safetensors", "model_path": None}, ConfigError, "--model must name"),
        ({"latest_model_in": "x"}, ConfigError, "give one of"),
        ({"model_path": None}, ConfigError, "give one of"),
    ],
)
def test_wrong_requests_write_nothing(tiny, tmp_path, more, error, words):
    given = {"phase": ["t2"], "dataset_name": "d", "synthetic_dataset_parent": tmp_path, "model_path": tiny}
    with pytest.raises(error, match=words):
        generate(**given | {"device": "cpu"} | more)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- reader


@pytest.mark.parametrize("key", ["focal-plane", "focal_plane"])
@pytest.mark.parametrize("plane", ["F+15", "F15", "_F15", "embryo_dataset_F15", "15"])
def test_D23_both_spellings_and_items_of_the_real_data_set(tmp_path, key, plane):
    folder = tmp_path / "runs" / "new-t9+"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(
        json.dumps({"datetime": "2023", "prompt": "x", "phase": "t9+", key: plane, "more": 1})
    )
    for k in range(3):
        Image.fromarray(phantoms.embryo_frame(10, 32, seed=k)).convert("RGB").save(folder / f"img{k}.jpg")
    (folder / "Thumbs.db").write_bytes(b"")
    runs = SyntheticRuns(tmp_path / "runs")
    item = runs[2]
    assert len(runs) == 3 and item.phase == Phase.t9.idx() and item.plane == FocalPlane.F15.idx()
    assert (item.video, item.frame_number, item.synthetic) == (-1, -1, True)
    assert item.image.shape == (1, 32, 32) and item.image.dtype == np.float32
    assert runs.paths[1].name == "img1.jpg"


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"phase": "t2"}', "focal-plane missing"),
        ('{"focal-plane": "F+00"}', "phase missing"),
        ('{"phase": "t17", "focal-plane": "F+00"}', "must be one of"),
        ('{"phase": "t2", "focal-plane": "F+00",}', "line 1"),  # the published example is not JSON
        ("[]", "must hold an object"),
    ],
)
def test_D22_records_that_cannot_be_read_name_the_file(tmp_path, text, words):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(FormatError, match=words) as e:
        read_record(tmp_path)
    assert "metadata.json" in str(e.value)


def test_unfinished_runs_are_refused(tmp_path):
    write_run(tmp_path / "r", spec_of(), paint)
    assert len(SyntheticRuns(tmp_path / "r", ["t4"])) == 12
    (tmp_path / "r" / "img3.jpg").unlink()
    with pytest.raises(DataError, match="11 of 12 images"):
        SyntheticRuns(tmp_path)
    assert len(SyntheticRuns(tmp_path, incomplete=True)) == 11
    with pytest.raises(DataError, match="no images"):
        SyntheticRuns(tmp_path / "r", ["t2"], incomplete=True)
    (tmp_path / "r" / "img4.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(FormatError, match="img4.jpg: is damaged"):
        SyntheticRuns(tmp_path, incomplete=True)[3]


# ---------------------------------------------------------------- mixing


class Known:
    def __init__(self, phases):
        self.phases = np.array(phases)

    def __len__(self):
        return len(self.phases)

    def __getitem__(self, i):
        return ("item", i, int(self.phases[i]))


@pytest.mark.parametrize("seed", range(5))
def test_mixing_keeps_its_promises(seed):
    rng = rng_for(seed, "mix test")
    real, made = Known(rng.integers(0, 6, 60)), Known(rng.integers(0, 16, 400))
    for how in ({"ratio": 0.5}, {"ratio": 20.0}, {"per_class_target": "largest"}, {"per_class_target": 30}):
        both = mix(real, made, max_ratio=3.0, seed=seed, **how)
        assert len(both) == len(both.synthetic) == len(both.phases) and (~both.synthetic).sum() == 60
        again = mix(real, made, max_ratio=3.0, seed=seed, **how)
        assert len(set(both.chosen.tolist())) == len(both.chosen) and np.array_equal(both.chosen, again.chosen)
        for p in range(16):
            n, extra = (both.phases[~both.synthetic] == p).sum(), (both.phases[both.synthetic] == p).sum()
            there = (made.phases == p).sum()
            top = how.get("per_class_target")
            top = np.bincount(real.phases).max() if top == "largest" else top
            wanted = round(how["ratio"] * n) if "ratio" in how else max(0, top - n)
            assert extra == min(wanted, int(3 * n), there)
        for i in (0, 59, 60, len(both) - 1, -1):
            assert both[i][2] == both.phases[i]
    with pytest.raises(IndexError):
        both[len(both)]


def test_mixing_frames_of_the_data_set_with_runs(model, tmp_path):
    from medvol_nb.embryo.dataset import EmbryoFrames
    from medvol_nb.embryo.index import build_index
    from medvol_nb.embryo.phantom import make_phantom_dataset

    make_phantom_dataset(tmp_path / "tree", 4, 24, ["F+00"], 32)
    real = EmbryoFrames(build_index(tmp_path / "tree", cache=False), select="median")
    (tmp_path / "runs").mkdir()
    make_run(model, tmp_path / "runs" / "t4", "t4", **QUICK)
    both = mix(real, SyntheticRuns(tmp_path / "runs"), ratio=1.0)
    assert isinstance(both, Mixed) and both.synthetic.sum() == (both.phases[: len(real)] == Phase.t4.idx()).sum() > 0
    for i in (0, len(both) - 1):
        assert both[i].synthetic == both.synthetic[i] and both[i].phase == both.phases[i]


def test_prompts_that_would_be_cut_off_are_refused(model, tmp_path):
    with pytest.raises(DataError, match="at most 77 are seen"):
        make_run(model, tmp_path / "r", "t2", prompt="phase " * 90, **QUICK)
    assert os.listdir(tmp_path) == []
