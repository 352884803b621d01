"""Real frames from folder to figures: does a tiny model learn anything from a real embryo?"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from medvol_nb.core import write_json
from medvol_nb.embryo.classify import ClassifierConfig, load_classifier, train_classifier
from medvol_nb.embryo.commands import real_images
from medvol_nb.embryo.dataset import read_frame
from medvol_nb.embryo.diffusion import read_pictures
from medvol_nb.embryo.features import extract_features
from medvol_nb.embryo.finetune import finetune
from medvol_nb.embryo.folders import make_image_folder
from medvol_nb.embryo.generate import generate
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.phases import PHASES
from medvol_nb.embryo.quality import frechet_distance
from medvol_nb.embryo.study import find_runs, images_of_run
from medvol_nb.embryo.tiny import make_tiny_sd, teach_autoencoder

torch.set_num_threads(1)
SPLIT = {
    "train": ["AA83-7", "AAL839-6"],  # the two long ones
    "val": ["CAV074-6", "CF946-6"],
    "test": ["DE842-3", "JE021-4", "MJ402-10", "RC545-2-5"],
}


def folder_of_real_frames(data_dir, place, phases, **more):
    write_json(place / "split.json", SPLIT)
    told = make_image_folder(
        dataset=data_dir / "embryo" / "extracted", split_file=place / "split.json", set="train", phases=phases,
        image_folder_parent=place, image_folder_name="frames", link="copy", **more,
    )  # fmt: skip
    return told, place / "frames"


def test_image_folder_of_real_frames_is_byte_exact_and_can_be_trained_from(data_dir, tmp_path):
    told, folder = folder_of_real_frames(data_dir, tmp_path, ["all"])
    source = data_dir / "embryo" / "extracted"
    about = json.loads((folder / "folder.json").read_text())
    assert told["images"] == 19 == len(about["items"]) and "CC BY-NC-SA" in about["licence"]  # one a phase and video
    for item in about["items"]:
        assert (folder / item["file"]).read_bytes() == (source / item["source"]).read_bytes()
    pictures = read_pictures(folder)
    assert len(pictures) == 19 and pictures.phases == list(PHASES[:11]) and pictures.about["set"] == "train"
    assert (folder / "metadata.csv").read_text().startswith("filename,label,phase\n0.jpeg,F+00_AA")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pipeline_taught_from_nothing_beats_its_own_start(data_dir, tmp_path):
    "Two videos, minutes; features of a classifier that saw these two alone; compared with frames of four other videos"
    _, folder = folder_of_real_frames(
        data_dir, tmp_path, ["all"], strategy="balanced", per_phase=24, on_shortage="drop"
    )
    index = build_index(data_dir / "embryo" / "extracted", cache=False)
    videos = {k: real_images(index, v) for k, v in SPLIT.items()}
    small = ClassifierConfig(architecture="small", size=64, steps=300, lr=2e-3, device="cpu", validate_every=50)
    train_classifier(videos["train"], videos["val"], small, out_dir=tmp_path / "judge")
    judge = load_classifier(tmp_path / "judge").extractor

    frames = [read_frame(p, 64) for p in read_pictures(folder).files]
    nothing = make_tiny_sd(tmp_path / "nothing")
    error = teach_autoencoder(nothing, frames, tmp_path / "start", steps=400, device="cpu")
    finetune(
        model=str(tmp_path / "start"), image_folder=folder, output_dir=tmp_path / "runs", run_name="taught",
        train="full", conditioning="class", max_train_steps=800, batch_size=8, lr=1e-3, num_validation_images=0,
        validation_steps=400, device="cpu", overrides=("n_tokens=4", "schedule=cosine"),
    )  # fmt: skip
    models = {"nothing": nothing, "start": tmp_path / "start", "taught": tmp_path / "runs" / "taught"}
    found = {}
    for name, model in models.items():
        (tmp_path / name / "images").mkdir(parents=True, exist_ok=True)
        generate(
            phase=[PHASES[p] for p in np.unique(videos["train"].phases)], dataset_name="x", model_path=model,
            synthetic_dataset_parent=tmp_path / name / "images", num_images=8, batch_size=8, steps=20,
            guidance_scale=1.5, device="cpu",
        )  # fmt: skip
        runs = [images_of_run(f) for f in find_runs(tmp_path / name / "images")]
        found[name] = sum(runs[1:], runs[0])
    features = {k: extract_features(judge, v, device="cpu") for k, v in {**videos, **found}.items()}
    mean, std = features["train"].values.mean(0), features["train"].values.std(0)
    scaled = {k: (f.values - mean) / np.maximum(std, 1e-3 * std.max()) for k, f in features.items()}
    fid = {k: frechet_distance(scaled["test"], scaled[k]) for k in (*models, "train", "val")}
    right = {k: float((f.probs.argmax(1) == f.phases).mean()) for k, f in features.items()}
    told = {"autoencoder": error, "fid": fid, "right_phase": right, "n": {k: len(v) for k, v in scaled.items()}}
    if place := os.environ.get("MEDVOL_TELL"):
        write_json(Path(place), told, "overwrite")
    assert fid["taught"] < fid["start"] and fid["taught"] < fid["nothing"], told
