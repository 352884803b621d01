"""Tables of phases, pictures of them, and decoding over time; embryo.scores."""
import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    roc_auc_score,
)

from medvol_nb.core import DataError, FormatError, OutputExists, read_csv, rng_for
from medvol_nb.embryo.phases import PHASES
from medvol_nb.embryo.scores import (
    decode,
    decode_videos,
    emission_from_confusion,
    fit_transitions,
    phase_metrics,
    plot_metrics,
    read_metrics,
    read_predictions,
    write_metrics,
    write_predictions,
)

CLASSES = (0, 3, 4, 5, 11)


def predictions(n=400, seed=0):
    rng = rng_for(seed, "scores")
    truth = rng.choice(CLASSES, n)
    probs = rng.dirichlet(np.full(16, 0.3), n) + 0.8 * np.eye(16)[(truth + rng.integers(-1, 2, n)).clip(0, 15)]
    return truth, probs / probs.sum(1, keepdims=True)


def test_D28_absent_phases_are_nan_and_tables_have_all_phases(tmp_path):
    truth, probs = predictions()
    m = phase_metrics(truth, probs)
    assert m.confusion.shape == (16, 16) and m.confusion.sum() == len(truth)
    for name in ("Precision", "Recall", "F1_Score", "PR_AUC", "ROC_AUC", "Precision_raw", "F1_raw"):
        assert np.flatnonzero(np.isfinite(m.classes[name])).tolist() == list(CLASSES), name
    assert np.isnan(m.normalised[1]).all() and np.allclose(m.normalised[list(CLASSES)].sum(1), 1)
    write_metrics(m, tmp_path)
    assert [r["phase"] for r in read_csv(tmp_path / "class_metrics.csv")] == list(PHASES)
    single = phase_metrics(np.full(5, 7), np.eye(16)[np.full(5, 7)])
    assert single.overall["Balanced_Accuracy"] == 1 and np.isnan(single.classes["ROC_AUC"]).all()


def test_figures_are_those_of_scikit_learn():
    truth, probs = predictions()
    m, got = phase_metrics(truth, probs), probs.argmax(1)
    labels = list(CLASSES)
    assert m.overall["Balanced_Accuracy"] == pytest.approx(balanced_accuracy_score(truth, got))
    options = {"labels": labels, "average": None, "zero_division": 0}
    np.testing.assert_allclose(m.classes["Precision_raw"][labels], precision_score(truth, got, **options))
    np.testing.assert_allclose(m.classes["F1_raw"][labels], f1_score(truth, got, **options))
    for k in labels:
        assert m.classes["ROC_AUC"][k] == pytest.approx(roc_auc_score(truth == k, probs[:, k]))
        assert m.classes["PR_AUC"][k] == pytest.approx(average_precision_score(truth == k, probs[:, k]))
    assert m.overall["Mean_Phase_Error"] == pytest.approx(abs(got - truth).mean())
    assert m.overall["Within_One_Phase"] == pytest.approx((abs(got - truth) <= 1).mean())


def test_precision_without_prevalence_does_not_change_when_a_phase_is_repeated():
    truth, probs = predictions()
    more = np.concatenate([np.arange(len(truth)), *[np.flatnonzero(truth == 3)] * 4])
    a, b = phase_metrics(truth, probs), phase_metrics(truth[more], probs[more])
    np.testing.assert_allclose(a.classes["Precision"], b.classes["Precision"])
    assert abs(a.classes["Precision_raw"][3] - b.classes["Precision_raw"][3]) > 0.05


def test_unlabelled_pictures_do_not_count_and_wrong_shapes_are_refused():
    truth, probs = predictions()
    both = phase_metrics(np.r_[truth, [-1] * 3], np.r_[probs, probs[:3]])
    assert both.overall == phase_metrics(truth, probs).overall
    with pytest.raises(DataError, match="no labelled"):
        phase_metrics([-1], probs[:1])
    with pytest.raises(DataError, match="needs \\(400, 16\\)"):
        phase_metrics(truth, probs[:, :5])


def test_tables_come_back_and_are_not_overwritten(tmp_path):
    truth, probs = predictions(20)
    ids = [f"F+00_UL050-_9_{k}" for k in range(20)]
    m = phase_metrics(truth, probs)
    write_metrics(m, tmp_path)
    files = write_predictions("net", ids, probs, tmp_path)
    assert [f.name for f in files] == ["net_pred-prob.csv", "net_pred-class.csv"]
    assert list(read_csv(files[0])[0]) == ["id", *(f"class_prob_{k}" for k in range(16))]
    assert [int(r["class_pred"]) for r in read_csv(files[1], ["id", "class_pred"])] == probs.argmax(1).tolist()
    names, again = read_predictions(files[0])
    assert names == ids and np.allclose(again, probs, atol=1e-7)
    back = read_metrics(tmp_path)
    assert np.array_equal(back.confusion, m.confusion) and back.overall == m.overall
    np.testing.assert_array_equal(back.classes["F1_Score"], m.classes["F1_Score"])
    with pytest.raises(OutputExists):
        write_metrics(m, tmp_path)
    (tmp_path / "net_pred-prob.csv").write_text(files[0].read_text().replace("0.", "x.", 1))
    with pytest.raises(FormatError, match="net_pred-prob.csv"):
        read_predictions(files[0])


def test_one_picture_a_file(tmp_path):
    truth, probs = predictions(60)
    files = plot_metrics({"a": phase_metrics(truth, probs), "b": phase_metrics(truth, np.eye(16)[truth])}, tmp_path)
    assert len(files) == 7 and all(f.read_bytes().startswith(b"\x89PNG") for f in files)


# ---------------------------------------------------------------------------------------------------------- decoding


def test_transitions_count_lengths_steps_and_never_go_back():
    t = fit_transitions([np.array([0, 0, 0, 3, 3, -1, 3, 5]), np.array([0, 3])])
    step = np.exp(t.step)
    ones = 16 - np.arange(16)
    assert step[0, 0] == pytest.approx((1 + 3 + 1) / (ones[0] + 4 + 2)) and step[3, 3] == pytest.approx(5 / (13 + 5))
    assert step[0, 3] == pytest.approx(3 / 22) and step[3, 5] == pytest.approx(2 / 18), "the last step counts, too"
    assert (step[np.tril_indices(16, -1)] == 0).all() and np.allclose(step.sum(1), 1)
    assert np.exp(t.start[0]) == pytest.approx(3 / 18)


@pytest.mark.parametrize("seed", range(5))
def test_paths_never_go_back_and_beat_every_small_change(seed):
    rng = rng_for(seed, "paths")
    t = fit_transitions([np.sort(rng.integers(0, 16, 30)) for _ in range(5)])
    scores = np.log(rng.dirichlet(np.full(16, 0.2), 25) + 1e-6)
    path = decode(scores, t)

    def value(p):
        return t.start[p[0]] + scores[np.arange(25), p].sum() + t.step[p[:-1], p[1:]].sum()

    assert (np.diff(path) >= 0).all() and np.isfinite(value(path))
    for k in range(25):
        for c in range(16):
            other = path.copy()
            other[k] = c
            assert value(other) <= value(path) + 1e-9


def test_clear_frames_are_kept_and_one_frame_is_enough():
    t = fit_transitions([np.array([0, 1, 2, 3])])
    truth = np.array([0, 0, 1, 3, 3, 9])
    assert decode(np.log(np.eye(16)[truth] + 1e-12), t).tolist() == truth.tolist()
    assert decode(np.log(np.eye(16)[[7]] + 1e-12), t).tolist() == [7]
    for bad, message in ((np.zeros((0, 16)), "needs"), (np.full((2, 16), np.nan), "NaN")):
        with pytest.raises(DataError, match=message):
            decode(bad, t)


def test_videos_are_decoded_one_by_one_in_the_order_of_frame_numbers():
    "Numbers are not padded, so frame 10 comes after frame 9, not after frame 1"
    t = fit_transitions([np.array([0, 1, 2, 3])])
    frames = [(v, n) for v in ("UL050-_9", "AA83-7") for n in range(1, 13)]
    truth = np.array([min(n, 15) if v == "AA83-7" else 15 - (12 - n) // 4 for v, n in frames])
    order = rng_for(0, "shuffle").permutation(len(frames))
    ids = [f"F+00_{frames[i][0]}_{frames[i][1]}" for i in order]
    probs = np.eye(16)[truth[order]] * 0.9 + 0.1 / 16
    assert decode_videos(ids, probs, t).tolist() == truth[order].tolist()


def test_emission_from_confusion_is_a_table_of_conditional_probabilities():
    confusion = np.diag(np.arange(16))
    table = np.exp(emission_from_confusion(confusion))
    assert np.allclose(table.sum(1), 1) and table[15, 15] == pytest.approx(16 / 31) and table[0, 3] == 1 / 16
