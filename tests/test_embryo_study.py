"""Does it help? Arms, intervals, the experiment; embryo.study and the commands."""
import shutil

import numpy as np
import pytest
import torch

from medvol_nb import phantoms
from medvol_nb.core import ConfigError, DataError, FormatError, read_csv, rng_for, write_json
from medvol_nb.embryo import study
from medvol_nb.embryo.classify import ClassifierConfig
from medvol_nb.embryo.dataset import EmbryoFrames
from medvol_nb.embryo.features import LabelledImages, phantom_images
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.phantom import jpeg_bytes, make_phantom_dataset
from medvol_nb.embryo.study import (
    Arm,
    arm_images,
    augmentation_study,
    images_of,
    images_of_run,
    paired_interval,
    plan_arms,
    verdict,
)

torch.set_num_threads(1)
CFG = ClassifierConfig(
    architecture="small", size=32, steps=16, batch_size=12, lr=6e-3, device="cpu", validate_every=16
)


SOME = (0, 5, 13)
REAL, VAL, TEST = (phantom_images(SOME, range(a, b), 32) for a, b in ((0, 5), (100, 104), (200, 212)))
NOISE = LabelledImages.of(list(rng_for(0, "noise").integers(0, 256, (60, 32, 32), np.uint8)), SOME * 20)


def test_pictures_of_a_data_set_carry_phase_video_and_name(tmp_path):
    make_phantom_dataset(tmp_path / "d", 3, 12, ["F+00"], 24)
    index = build_index(tmp_path / "d", cache=False)
    frames = EmbryoFrames(index, unlabelled=True)
    images = images_of(frames)
    assert len(images) == len(frames) == 36 and not images.synthetic.any()
    for i in (0, 13, 35):
        item = frames[i]
        assert images.phases[i] == item.phase and images.ids[i] == frames.label(i)
        assert images.videos[i] == index.videos[item.video].name
        np.testing.assert_allclose(images.load(i, 24) / 255, item.image[0], atol=1e-6)


def test_D22_D23_runs_are_read_in_both_spellings_and_incomplete_ones_refused(tmp_path):
    for name, about in (("a", {"focal-plane": "F+15"}), ("b", {"focal_plane": "_F15"})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "metadata.json", {"phase": "t9+", "seed": 4, **about})
        for k in (10, 9):
            (tmp_path / name / f"img{k}.jpg").write_bytes(jpeg_bytes(phantoms.embryo_frame(10, 24, k)))
        run = images_of_run(tmp_path / name)
        assert run.ids == [f"{name}/img9.jpg", f"{name}/img10.jpg"] and run.phases.tolist() == [10, 10]
        assert run.synthetic.all()
    write_json(tmp_path / "a" / "metadata.json", {"phase": "t2", "focal-plane": "F+00", "complete": False})
    with pytest.raises(DataError, match="not complete"):
        images_of_run(tmp_path / "a")
    write_json(tmp_path / "a" / "metadata.json", {"phase": "t2"})
    with pytest.raises(FormatError, match="metadata.json.*focal-plane"):
        images_of_run(tmp_path / "a")


def test_arms_are_nested_matched_by_phase_and_named_by_seed():
    made = phantom_images(SOME, range(300, 340), 32, synthetic=True)
    shares = [arm_images(Arm("real", f), REAL, made, 3) for f in (0.2, 0.6, 1)]
    assert [len({*s.videos}) for s in shares] == [1, 3, 5]
    assert {*shares[0].videos} < {*shares[1].videos} < {*shares[2].videos}
    mixed = arm_images(Arm("mixed", 0.6, 2.0), REAL, made, 3)
    assert np.bincount(mixed.phases[mixed.synthetic], minlength=16)[[0, 5, 13]].tolist() == [6, 6, 6]
    assert {*mixed.videos} - {""} == {*shares[1].videos}
    again, other = (arm_images(Arm("mixed", 0.6, 2.0), REAL, made, s).identity for s in (3, 4))
    assert mixed.identity == again != other
    assert [a.name for a in plan_arms([1], [0, 1])] == ["real-1", "plain-1", "mixed-1-x1", "synthetic-1"]


def test_interval_of_equal_predictions_is_zero_and_of_better_ones_above():
    truth, videos = np.repeat(np.arange(16), 6), np.tile([f"v{k}" for k in range(6)], 16)
    right, wrong = np.stack([truth] * 3), np.stack([(truth + 1) % 16] * 3)
    assert paired_interval(truth, videos, right, right) == (0, 0, 0)
    assert paired_interval(truth, videos, right, wrong) == (1, 1, 1)
    assert [verdict(*i) for i in ((0.01, 0.1), (-0.1, 0.1), (0, 0.2), (-0.2, -0.1))] == [
        "gain", "no gain", "no gain", "no gain, worse than without",
    ]  # fmt: skip


def test_interval_is_wider_for_few_videos_than_for_frames():
    "A gain that comes from one video of eight is no gain"
    truth, videos = np.tile(np.arange(16), 40), np.repeat([f"v{k}" for k in range(8)], 80)
    base = np.stack([np.where(videos == "v0", 0, truth)] * 3)
    ours = np.stack([truth] * 3)
    diff, low, high = paired_interval(truth, videos, ours, base)
    assert diff > 0.1 and low == 0 and verdict(low, high) == "no gain"
    independent = paired_interval(truth, np.arange(640).astype(str), ours, base)
    assert independent[1] > 0


def test_A16_noise_as_synthetic_data_is_no_gain_and_the_rest_is_written(tmp_path, monkeypatch):
    out, trained = tmp_path / "study", []
    original = study.train_classifier

    def counted(*args, **kwargs):
        trained.append(kwargs["out_dir"])
        if len(trained) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(study, "train_classifier", counted)
    with pytest.raises(KeyboardInterrupt):
        augmentation_study(REAL, VAL, TEST, NOISE, CFG, out=out, ratios=(0, 2))
    assert not (out / "study.csv").exists()
    rows = augmentation_study(REAL, VAL, TEST, NOISE, CFG, out=out, ratios=(0, 2))
    assert len(trained) == 5 + 12 - 4, "runs that were done are not repeated"
    assert [r["arm"] for r in rows] == ["real-1", "plain-1", "mixed-1-x2", "synthetic-1"]
    assert rows[0]["verdict"] == "reference" and all("no gain" in r["verdict"] for r in rows[2:])
    assert {r["steps"] for r in rows} == {16} and {r["seeds"] for r in rows} == {3}
    for folder in (out / "runs").iterdir():
        assert read_csv(folder / "fit" / "log.csv")[-1]["step"] == "16", "an equal budget of steps"
    assert len(read_csv(out / "runs.csv")) == 12 and (out / "study.png").read_bytes().startswith(b"\x89PNG")
    assert [r["verdict"] for r in read_csv(out / "study.csv")] == [r["verdict"] for r in rows]
    shutil.rmtree(out / "runs" / "real-1-s1")
    assert augmentation_study(REAL, VAL, TEST, NOISE, CFG, out=out, ratios=(0, 2)) == rows and len(trained) == 14


def test_experiments_that_would_mislead_are_refused(tmp_path):
    cases = [
        ({"seeds": (0, 1)}, ConfigError, "at least three"),
        ({"seeds": (0, 0, 1)}, ConfigError, "at least three"),
        ({"test": VAL}, DataError, "videos are in val and test"),
        ({"test": NOISE}, DataError, "test pictures must be real"),
        ({"real": NOISE}, DataError, "real pictures must be real"),
        ({"synthetic": REAL}, DataError, "real videos are among the synthetic"),
        ({"fractions": (0.5, 1.5)}, ConfigError, "fractions"),
    ]
    for changes, error, message in cases:
        sets = {"real": REAL, "val": VAL, "test": TEST, "synthetic": NOISE} | changes
        with pytest.raises(error, match=message):
            augmentation_study(cfg=CFG, out=tmp_path / "x", **sets)
    assert not (tmp_path / "x").exists()
