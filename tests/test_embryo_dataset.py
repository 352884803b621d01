"""Phases, tables, index and data set of embryo frames (acceptance A5, A6, A17; defects D5 to D11, D20)."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OutputExists, rng_for
from medvol_nb.embryo.dataset import EmbryoFrames, EmptyDataset, check_frames, focal_stack, ground_truth, video_volume
from medvol_nb.embryo.index import build_index, list_frames, remove_f0_duplicates
from medvol_nb.embryo.phantom import DEFECTS, make_phantom_dataset, phantom_videos
from medvol_nb.embryo.phases import (
    PHASES,
    AnnotationError,
    FocalPlane,
    Interval,
    Phase,
    label_frames,
    parse_label,
    parse_video,
    read_grades,
    read_phases,
    read_times,
)
from medvol_nb.stores import write_zarr
from medvol_nb.volume import read_volume


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "Ten videos, each with one defect"
    root = tmp_path_factory.mktemp("embryo") / "tree"
    make_phantom_dataset(root, 10, 16, ["F-15", "F+00", "F15"], 16, defects=DEFECTS)
    return root


@pytest.fixture(scope="module")
def index(tree):
    return build_index(tree, cache=False)


def at(index, defect):
    "Name of the video that a defect befell"
    return phantom_videos(len(index.videos))[DEFECTS.index(defect)]


def test_A5_labels_are_those_of_the_interval_rule():
    "1,000 random interval sets against a loop over frames"
    for seed in range(1000):
        rng = rng_for(5, seed)
        rows = []
        for _ in range(int(rng.integers(0, 9))):
            first = int(rng.integers(1, 40))
            rows.append(Interval(Phase.from_idx(int(rng.integers(16))), first, first + int(rng.integers(0, 15))))
        rows.sort(key=lambda r: r.first)
        frames = np.sort(rng.permutation(np.arange(1, 60))[: int(rng.integers(1, 50))])
        wanted = []
        for n in frames:
            holds = [(r.first, k, r.phase.idx()) for k, r in enumerate(rows) if r.first <= n <= r.last]
            wanted.append(max(holds)[2] if holds else -1)
        assert label_frames(frames, rows).tolist() == wanted


def test_D7_first_frames_and_single_frame_phases_are_kept():
    rows = [
        Interval(Phase.tPNf, 5, 9),
        Interval(Phase.t2, 10, 14),
        Interval(Phase.t3, 15, 15),
        Interval(Phase.t4, 16, 20),
    ]
    labels = label_frames(np.arange(1, 25), rows)
    assert [np.flatnonzero(labels == p.idx()).tolist() for p in (Phase.tPNf, Phase.t2, Phase.t3, Phase.t4)] == [
        [4, 5, 6, 7, 8],
        [9, 10, 11, 12, 13],
        [14],
        [15, 16, 17, 18, 19],
    ]


def test_D8_repeated_phases_keep_all_intervals(index):
    video = index.videos[index.place(at(index, "repeated"))]
    twice = video.intervals[0].phase
    rows = index.rows(video.name)
    held = [i for i in video.intervals if i.phase is twice]
    assert len(held) == 2
    assert (index.phase[rows] == twice.idx()).sum() == sum(i.last - i.first + 1 for i in held)
    assert any("several intervals" in t for t in index.by_video()[video.name])


def test_every_defect_is_listed_with_its_video(index):
    kinds = {d: {p.kind for p in index.problems if p.video == at(index, d)} for d in DEFECTS}
    for defect, kind in {
        "f0": "f0",
        "missing_frames": "plane",
        "no_annotation": "no_annotation",
        "empty_annotation": "no_annotation",
        "repeated": "interval",
        "overlap": "interval",
        "beyond": "timeline",
        "grid": "timeline",
        "stray": "unexpected",
    }.items():
        assert kind in kinds[defect], (defect, kinds[defect])
    assert [(p.video, p.kind) for p in check_frames(index)] == [(at(index, "truncated"), "truncated")]


def test_D5_D6_any_subset_works(tree, tmp_path):
    "No list of videos, no table for each"
    root = tmp_path / "part" / "embryo_dataset" / "AA83-7"
    root.mkdir(parents=True)
    source = next((tree / "embryo_dataset" / "AA83-9").glob("*RUN3.jpeg"))
    (root / "xRUN3.jpeg").write_bytes(source.read_bytes())
    index = build_index(tmp_path / "part", cache=False)
    assert len(index) == 1 and index.phase.tolist() == [-1] and np.isnan(index.time_h[0])
    assert {p.kind for p in index.problems if not p.video} == {"no_grades", "no_time"}


def test_bad_grades_are_a_problem_and_with_strict_an_error(tree, tmp_path):
    root = tmp_path / "part"
    shutil.copytree(tree, root)
    (root / "embryo_dataset_grades.csv").write_text("video_name,TE,ICM\nAA83-7,A,Z\n")
    index = build_index(root, cache=False)
    bad = [p for p in index.problems if p.kind == "bad_grades"]
    assert len(bad) == 1 and "row 2: grades must be" in bad[0].text
    assert {v.grades for v in index.videos} == {("NA", "NA")}
    with pytest.raises(AnnotationError, match="row 2: grades must be"):
        build_index(root, cache=False, strict=True)


def test_D9_each_plane_has_its_own_frames(index):
    video = at(index, "missing_frames")
    frames = EmbryoFrames(index, [video], ["F+00", "F15"], unlabelled=True)
    lengths = [sum(frames.unflatten_idx(i)[0] == k for i in range(len(frames))) for k in (0, 1)]
    assert lengths == [16, 13] and all(frames.path(i).is_file() for i in range(len(frames)))
    with pytest.raises(MissingFile, match="other planes have it"):
        EmbryoFrames(index, [video], ["F15"], on_missing="raise")


def test_D10_stray_files_and_prefixes(tmp_path):
    for name in ("aRUN2.jpeg", "aRUN1.jpeg", "Thumbs.db", "zRUN3.jpeg"):
        (tmp_path / name).touch()
    found = list_frames(tmp_path)
    assert found.frames.tolist() == [1, 2, 3] and found.strange == ["Thumbs.db"] and found.prefixes == ["a", "z"]


@pytest.mark.parametrize("policy, length", [("raise", 16), ("pad", 16), ("skip", 0)])
def test_D11_truncated_pictures_follow_the_policy(index, policy, length):
    from PIL import ImageFile

    video = at(index, "truncated")
    make = lambda: EmbryoFrames(index, [video], ["F+00"], on_corrupt=policy, unlabelled=True)  # noqa: E731
    if not length:
        with pytest.raises(EmptyDataset):
            make()
        return
    assert len(make()) == length
    if policy == "raise":
        with pytest.raises(FormatError, match="is cut off"):
            make()[0]
    else:
        assert make()[0].padded and make()[0].image.shape == (1, 16, 16)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_D20_underscores_in_names():
    for name in ("UL050-_9", "UL050-_10", "GS490-_6", "RG434-_10"):
        assert parse_label(f"F-45_{name}_7") == (FocalPlane.Fm45, name, 7) and parse_video(name).couple == name[:5]


def test_A6_order_and_places(index):
    names = [at(index, "overlap"), at(index, "f0")]
    frames = EmbryoFrames(index, names, ["F15", "F+00"])
    keys = [(i.plane, i.video, i.frame_number) for i in frames]
    order = [[FocalPlane.F15.idx(), FocalPlane.F0.idx()], [index.place(n) for n in names]]
    assert keys == sorted(keys, key=lambda k: (order[0].index(k[0]), order[1].index(k[1]), k[2]))
    assert [frames.flatten_idx(*frames.unflatten_idx(i)) for i in range(len(frames))] == list(range(len(frames)))
    for wrong in ((2, 0, 0), (0, 2, 0), (0, 0, 99), (-1, 0, 0)):
        with pytest.raises(IndexError):
            frames.flatten_idx(*wrong)
    again = pickle.loads(pickle.dumps(frames))
    assert again.label(3) == frames.label(3) and np.array_equal(again[3].image, frames[3].image)


def test_A6_selection(index):
    name = at(index, "f0")
    whole, middle = (EmbryoFrames(index, [name], ["F+00"], select=s) for s in ("all", "median"))
    by_phase = {}
    for i in whole:
        by_phase.setdefault(i.phase, []).append(i.frame_number)
    assert {i.phase: i.frame_number for i in middle} == {p: f[(len(f) - 1) // 2] for p, f in by_phase.items()}
    first = EmbryoFrames(index, [name], ["F+00"], select=lambda f: f[:1])
    assert {i.phase: i.frame_number for i in first} == {p: f[0] for p, f in by_phase.items()}
    last = PHASES[max(by_phase)]
    merged = EmbryoFrames(index, [name], ["F+00"], merge={last: "t2"}, phases=["t2"])
    assert len(merged) == len(by_phase[max(by_phase)]) + len(by_phase.get(Phase.t2.idx(), []))
    for wrong in ({"videos": []}, {"planes": []}, {"phases": []}, {"select": "mean"}, {"on_corrupt": "?"}):
        with pytest.raises(ConfigError):
            EmbryoFrames(index, **wrong)
    with pytest.raises(DataError, match="'XX' is not in"):
        EmbryoFrames(index, ["XX"])


def test_suspects_can_be_dropped(index):
    kept = EmbryoFrames(index, drop_suspects=True).videos
    assert set(index.names) - set(kept) == {at(index, "grid"), at(index, "beyond")}


def test_volumes_go_to_zarr_and_back(index, tmp_path):
    stack = focal_stack(index, at(index, "f0"), 5)
    film = video_volume(index, at(index, "f0"), "F+15")
    assert stack.shape == (7, 16, 16) and np.isnan(stack.data[[0, 1, 5, 6]]).all() and film.shape == (16, 16, 16)
    assert np.array_equal(stack.data[4], film.data[4])
    write_zarr(film, tmp_path / "film.zarr", chunks=(1, 16, 16))
    assert np.array_equal(read_volume(tmp_path / "film.zarr").data, film.data)


def test_cache_follows_every_change(tmp_path):
    root = tmp_path / "tree"
    make_phantom_dataset(root, 2, 8, ["F+00"], 16)
    for p in [*root.rglob("*"), root]:
        os.utime(p, (10**9, 10**9))
    cached = lambda: build_index(root, cache=tmp_path / "cache")  # noqa: E731
    before = cached()
    (file,) = (tmp_path / "cache").iterdir()
    made = file.stat().st_mtime_ns
    same = cached()
    assert file.stat().st_mtime_ns == made and same.videos == before.videos and same.problems == before.problems
    for name in ("video", "frame", "phase", "time_h", "plane_bits"):
        np.testing.assert_array_equal(getattr(same, name), getattr(before, name))
    table = root / "embryo_dataset_annotations" / "AA83-7_phases.csv"
    table.write_text("tM,1,8\n")
    assert set(cached().phase[:8].tolist()) == {Phase.tM.idx()}
    next((root / "embryo_dataset" / "AA83-7").glob("*RUN8.jpeg")).unlink()
    assert len(cached()) == 15
    file.write_bytes(file.read_bytes()[:-40])
    assert len(cached()) == 15
    file.write_text("nonsense")
    assert len(cached()) == 15


def test_tables_refuse_nonsense(tmp_path):
    file = tmp_path / "t.csv"
    for text in (
        "frame_index,time\n1,x\n",
        "frame_index,time\n1,1\n1,2\n",
        "frame,hours\n1,2\n",
        "frame_index,time\n1,nan\n",
    ):
        file.write_text(text)
        with pytest.raises(AnnotationError, match="t.csv"):
            read_times(file)
    file.write_text("ICM,video_name,TE\nNA,AA83-7,B\n")
    assert read_grades(file) == {"AA83-7": ("B", "NA")}
    file.write_bytes(b"t2,1,\xff\n")
    with pytest.raises(AnnotationError, match="is not UTF-8"):
        read_phases(file)


def test_strict_raises(tree):
    with pytest.raises(AnnotationError, match="Thumbs.db"):
        build_index(tree, cache=False, strict=True)


def test_remove_f0_survives_an_interruption(tree, tmp_path, monkeypatch):
    from medvol_nb.embryo import index as module

    root = tmp_path / "tree"
    make_phantom_dataset(root, 1, 6, ["F+00"], 16, defects=["f0"])

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "remove_tree", stop)
    with pytest.raises(KeyboardInterrupt):
        remove_f0_duplicates(root, dry_run=False)
    assert not (root / "embryo_dataset" / "AA83-7" / "F0").exists()
    monkeypatch.undo()
    assert len(list((root / "embryo_dataset" / "AA83-7").glob("*.jpeg"))) == 6


def test_ground_truth(tree, tmp_path):
    told = ground_truth(tree, tmp_path / "truth.csv")
    lines = (tmp_path / "truth.csv").read_text().splitlines()
    assert lines[0] == "identifier,phase-label,phase-index" and len(lines) == told["frames"] + 1
    for line in lines[1:]:
        label, phase, k = line.split(",")
        assert PHASES[int(k)] == phase and parse_label(label)[0] is FocalPlane.F0
    with pytest.raises(OutputExists):
        ground_truth(tree, tmp_path / "truth.csv")
    before = (tmp_path / "truth.csv").read_bytes()
    told = ground_truth(tree, tmp_path / "truth.csv", planes=["all"], on_exists="skip")
    assert told == {"table": str(tmp_path / "truth.csv"), "skipped": True}  # not the lines of another table
    assert (tmp_path / "truth.csv").read_bytes() == before


def test_A17_no_torch_and_quick():
    for module in ("phases", "phantom", "index", "dataset", "members", "archives", "splits", "folders"):
        code = f"import sys, json, medvol_nb.embryo.{module}; print(json.dumps(sorted(sys.modules)))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded = {m.split(".")[0] for m in json.loads(run.stdout)}
        assert not loaded & {"torch", "diffusers", "transformers", "pandas", "torchvision", "PIL", "matplotlib"}, module


# ------------------------------------------------------------------------------------------------------- real data


def test_real_videos(data_dir):
    index = build_index(data_dir / "embryo" / "extracted", cache=False)
    told = index.by_video()
    assert len(index.videos) == 8 and len(index) == 285 + 430 + 6 * 10
    assert any("annotated to frame 286, the last picture is 285" in t for t in told["AA83-7"])
    assert any("1 frames between 1 and 431 do not exist: 95" in t for t in told["AAL839-6"])
    assert any("annotated to frame 703, the last picture is 431" in t for t in told["AAL839-6"])
    assert any("frames lie outside all intervals: 1-13" in t for t in told["AAL839-6"])
    assert [v.name for v in index.videos if "timeline_suspect" in v.flags] != [] and check_frames(index) == []
    for v in index.videos:
        rows = index.rows(v.name)
        for n, phase in zip(index.frame[rows].tolist(), index.phase[rows].tolist()):
            holds = [i.phase.idx() for i in v.intervals if i.first <= n <= i.last]
            assert phase == (holds[-1] if holds else -1)
    frames = EmbryoFrames(index, ["AA83-7"], select="median", size=128)
    assert frames[0].image.shape == (1, 128, 128) and 0.05 < frames[0].image.mean() < 0.95


def test_real_tables(data_dir):
    from medvol_nb.embryo.phases import interval_problems

    files = sorted((data_dir / "embryo" / "annotations_revised_all").glob("*.csv"))
    rows = {p.name.removesuffix("_phases.csv"): read_phases(p) for p in files}
    told = {v: interval_problems(r) for v, r in rows.items()}
    assert len(files) == 521 and sum(len(r) for r in rows.values()) == 6320
    assert sum(r[0].first > 1 for r in rows.values()) == 519
    assert sum("have no phase" in t for ts in told.values() for t in ts) == 17
    assert sum("overlap" in t for ts in told.values() for t in ts) == 14
    assert "frames 154-154" in " ".join(told["BG723-5"]) and "92-94" in " ".join(told["BY829-3"])
