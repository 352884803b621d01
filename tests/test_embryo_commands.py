"""Real pictures, metrics and classify from the command line's functions; embryo.commands."""
import numpy as np
import pytest
import torch

from medvol_nb.core import ConfigError, DataError, read_csv, write_json
from medvol_nb.embryo.commands import classify, metrics, real_images
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.phantom import make_phantom_dataset
from medvol_nb.embryo.phases import PHASES

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    make_phantom_dataset(root / "data", 5, 14, ["F+00"], 24, defects=["f0"])
    names = build_index(root / "data", cache=False).names
    write_json(root / "split.json", {"train": names[:2], "val": names[2:3], "test": names[3:]})
    where = {"dataset": root / "data", "split_file": root / "split.json"}
    settings = {"architecture": "small", "size": 24, "device": "cpu"}
    classify("train", out=root / "net", steps=4, batch_size=8, **where, **settings)
    return root, where


def test_D12_validation_and_test_sets_are_found_by_all_their_names(data, tmp_path):
    root, where = data
    common = {"model": [str(root / "net")], "device": "cpu", **where}
    tables = [classify("predict", set=s, out=tmp_path / s, **common)["net"]["files"][0] for s in ("val", "eval")]
    assert read_csv(tables[0]) == read_csv(tables[1]) and len(read_csv(tables[0])) == 13


def test_a_run_folder_may_have_a_dot_in_its_name(data, tmp_path):
    import shutil

    root, where = data
    for name in ("net-0.5", "net-0.7"):
        shutil.copytree(root / "net", tmp_path / name)
    models = [str(tmp_path / name) for name in ("net-0.5", "net-0.7")]
    assert list(classify("predict", model=models, out=tmp_path / "t", device="cpu", **where)) == ["net-0.5", "net-0.7"]


def test_tables_must_have_the_pictures_of_the_set(data, tmp_path):
    root, where = data
    found = classify("predict", model=[str(root / "net")], out=tmp_path / "t", device="cpu", **where)["net"]["files"]
    first = next(f for f in found if f.endswith("net_pred-prob.csv"))
    lines = open(first).read().splitlines()
    short = tmp_path / "short_pred-prob.csv"
    short.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match="lacks 1 of 26 pictures"):
        classify("metrics", model=[str(short)], out=tmp_path / "m", **where)


def test_what_an_action_needs_is_asked_for(tmp_path):
    for action, option in (("train", "dataset"), ("experiment", "dataset"), ("plot", "model")):
        with pytest.raises(ConfigError, match=f"classify {action}: --{option} is needed"):
            classify(action, out=tmp_path)


def test_D25_runs_of_two_phases_in_one_folder_have_their_own_statistics(data, tmp_path):
    from PIL import Image

    from medvol_nb.phantoms import embryo_frame

    root, where = data
    index = build_index(root / "data", cache=False)
    counts = [np.bincount(index.phase[np.isin(index.video, v)] + 1, minlength=17)[1:] for v in ([0, 1], [3, 4])]
    common = np.flatnonzero((counts[0] > 0) & (counts[1] > 0))[:2].tolist()
    assert len(common) == 2
    for p in common:
        (tmp_path / "runs" / PHASES[p]).mkdir(parents=True)
        write_json(tmp_path / "runs" / PHASES[p] / "metadata.json", {"phase": PHASES[p], "focal-plane": "F+00"})
        for k in range(3):
            Image.fromarray(embryo_frame(p, 24, 900 + k)).save(tmp_path / "runs" / PHASES[p] / f"img{k}.png")

    def measure(synth, out):
        return metrics(
            orig_data_path=root / "data", synth_data_path=synth, model_weights_path=root / "net", device="cpu",
            result_fold_path=tmp_path / out, split_file_path=root / "split.json",
        )  # fmt: skip

    both = {r["label"]: r for r in read_csv(measure(tmp_path / "runs", "both")["table"])}
    assert len({r["fid_reference"] for r in both.values()} | {r["entropy_orig"] for r in both.values()}) > 2
    for p in common:
        alone = read_csv(measure(tmp_path / "runs" / PHASES[p], f"alone{p}")["table"])[0]
        joint = both[PHASES[p]]
        assert alone["n_test"] == joint["n_test"] and alone["accuracy_orig"] == joint["accuracy_orig"]
        assert float(alone["entropy_orig"]) == pytest.approx(float(joint["entropy_orig"]), rel=1e-5)


def test_real_frames_and_other_annotations(data_dir):
    root = data_dir / "embryo"
    index = build_index(root / "extracted", cache=False)
    own = real_images(index, index.names)
    assert 700 < len(own) < 775 and (own.phases >= 0).all() and own.load(0, 64).shape == (64, 64)
    revised = real_images(index, ["AA83-7"], annotations=root / "annotations_revised_all")
    assert len(revised) > 250 and (np.diff(revised.phases) >= 0).all()
    median = real_images(index, ["AA83-7"], median=True)
    assert len(median) == len(np.unique(own.phases[own.videos == "AA83-7"]))


def test_runs_that_repeat_training_pictures_are_not_exported(data, tmp_path):
    import shutil

    root, where = data
    index = build_index(root / "data", cache=False)
    video = index.names[0]
    rows, phase = index.rows(video), None
    seen = np.bincount(index.phase[index.rows(index.names[3])] + 1, minlength=17)[1:]
    own = np.bincount(index.phase[rows] + 1, minlength=17)[1:]
    phase = int(np.argmax(np.minimum(own, seen)))
    frames = index.frame[rows][index.phase[rows] == phase].tolist()
    for name, count in (("copied", 3), ("again", 1)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        write_json(folder / "metadata.json", {"phase": PHASES[phase], "focal-plane": "F+00"})
        for k in range(count):
            shutil.copy(index.path(list(index.planes)[0], video, frames[k % len(frames)]), folder / f"img{k}.jpg")
    (tmp_path / "runs" / "again" / "._img0.jpg").touch()  # left by another system, not a picture
    (tmp_path / "out").mkdir()
    given = {"orig_data_path": root / "data", "synth_data_path": tmp_path / "runs", "device": "cpu",
             "model_weights_path": root / "net", "split_file_path": root / "split.json",
             "export": tmp_path / "out"}  # fmt: skip
    with pytest.raises(DataError, match="near-copies of training pictures"):
        metrics(result_fold_path=tmp_path / "m", **given)
    assert list((tmp_path / "out").iterdir()) == []
    told = metrics(result_fold_path=tmp_path / "m2", max_copy_share=1.0, **given)
    assert sorted(told["exported"]) == ["again", "copied"] == sorted(p.name for p in (tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="copied holds more than max_dataset_size .2"):
        metrics(result_fold_path=tmp_path / "m", max_dataset_size=2, **given)
    with pytest.raises(ConfigError, match="not --debug"):
        metrics(result_fold_path=tmp_path / "m", debug=True, **given)
