# %% [markdown]
# # Scores of phases, and time
#
# > Tables that always have all sixteen phases, pictures of them, and decoding that lets no embryo grow younger.
#
# Most videos lack some phases, and tHB hardly ever occurs. The reference sized its tables by the phases that were
# there and indexed them from 0 to 15, which crashes or, worse, shifts names. And it judged frames one by one, although
# a video is a sequence that goes one way: that alone is worth many per cent.

# %%
#| default_exp embryo.scores

# %%
#| export
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb import plot
from medvol_nb.core import DataError, FormatError, OnExists, OutputExists, read_csv, tmpdir, write_csv
from medvol_nb.embryo.phases import PHASES, parse_label

# %%
from itertools import combinations_with_replacement

from medvol_nb.core import raises, rng_for

# %% [markdown]
# ## Figures and tables
# A phase that does not occur has no recall; it is NaN, not a crash and not 0. Precision and F1 are given twice: from
# counts (`_raw`), and as if all phases were equally frequent, so that videos of other lengths can be compared. Because
# phases have an order, the share within one phase and the mean distance in phases tell more than accuracy.

# %%
#| export
@dataclass(frozen=True, eq=False)
class PhaseMetrics:
    "How well phases were recognised"
    confusion: np.ndarray # (16, 16) int64, rows are true phases
    classes: Mapping[str, np.ndarray] # name -> (16) float64, NaN where the phase does not occur
    overall: Mapping[str, float] # name -> figure
    @property
    def normalised(self) -> np.ndarray: # (16, 16) rows sum to 1, NaN where the phase does not occur
        "Shares of each true phase"
        rows = self.confusion.sum(1, keepdims=True)
        return np.where(rows > 0, self.confusion/np.maximum(rows, 1), np.nan)

def _scores(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Precision, recall and F1 from the diagonal, the sums of columns and of rows; NaN where the row is empty"
    divide = lambda a, b: np.where(true > 0, np.divide(a, b, out=np.zeros(len(b)), where=b > 0), np.nan)
    precision, recall = divide(hits, predicted), divide(hits, true)
    return precision, recall, divide(2*np.nan_to_num(precision*recall), np.nan_to_num(precision + recall))

def phase_metrics(
    truth: np.ndarray, # (n) int, place in `PHASES`; -1 does not count
    probs: np.ndarray, # (n, 16) probabilities
    predicted: np.ndarray | None = None, # (n) int, decoded phases; default: the most probable
) -> PhaseMetrics: # all phases, whether they occur or not
    "Compare predictions with annotations"
    from sklearn.metrics import average_precision_score, roc_auc_score
    truth, probs = np.asarray(truth).astype(int), np.asarray(probs, np.float64)
    n = len(PHASES)
    if probs.shape != (len(truth), n): raise DataError(f"metrics: needs ({len(truth)}, {n}) numbers, got {probs.shape}")
    got = probs.argmax(1) if predicted is None else np.asarray(predicted).astype(int)
    probs, got, truth = probs[truth >= 0], got[truth >= 0], truth[truth >= 0]
    if not len(truth): raise DataError("metrics: no labelled picture")
    confusion = np.bincount(truth*n + got, minlength=n*n).reshape(n, n)
    true = confusion.sum(1)
    shares = confusion/np.maximum(true, 1)[:, None]
    even = _scores(shares.diagonal(), shares.sum(0), (true > 0).astype(float))
    raw = _scores(confusion.diagonal(), confusion.sum(0), true)
    mixed = [c for c in range(n) if 0 < true[c] < len(truth)] # a curve needs both answers
    curves = [[f(truth == c, probs[:, c]) if c in mixed else np.nan for c in range(n)]
              for f in (average_precision_score, roc_auc_score)]
    classes = dict(zip(("Precision", "Recall", "F1_Score", "PR_AUC", "ROC_AUC"), [*even, *map(np.array, curves)]))
    classes |= {"Precision_raw": raw[0], "F1_raw": raw[2], "Support": true.astype(float)}
    off = abs(got - truth)
    present = true > 0
    overall = {"Balanced_Accuracy": float(even[1][present].mean()), "Accuracy": float((off == 0).mean()),
               "Macro_F1": float(raw[2][present].mean()), "Within_One_Phase": float((off <= 1).mean()),
               "Mean_Phase_Error": float(off.mean())}
    return PhaseMetrics(confusion, classes, overall)

def _written(write: Callable[[Path, OnExists], Any], path: Path, on_exists: OnExists) -> Path:
    "Write a result; 'skip' leaves the same result alone and does not pass off an old one as new"
    if on_exists != "skip" or not path.exists():
        write(path, on_exists)
        return path
    with tmpdir() as d:
        write(d/path.name, "error")
        if (d/path.name).read_bytes() != path.read_bytes():
            raise OutputExists(f"{path} holds other results than those found now. Choose another folder, or "
                               "--on-exists overwrite")
    return path

def write_metrics(
    found: PhaseMetrics, # figures
    folder: str | os.PathLike, # gets conf_mat.csv, norm_conf_mat.csv, class_metrics.csv and other_metrics.csv
    on_exists: OnExists = "error", # what to do with tables that are there
) -> list[Path]: # files
    "Write the figures as tables"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    square = lambda m: [{"true": p, **dict(zip(PHASES, row.tolist()))} for p, row in zip(PHASES, m)]
    classes = [{"phase": p, **{k: v[c] for k, v in found.classes.items()}} for c, p in enumerate(PHASES)]
    tables = {"conf_mat": square(found.confusion), "norm_conf_mat": square(found.normalised), "class_metrics": classes,
              "other_metrics": [dict(found.overall)]}
    return [_written(lambda p, e, rows=rows: write_csv(p, rows, on_exists=e), folder/f"{k}.csv", on_exists)
            for k, rows in tables.items()]

def read_metrics(
    folder: str | os.PathLike, # written by `write_metrics`
) -> PhaseMetrics: # figures
    "Read the tables back"
    folder = Path(folder)
    confusion = np.array([[int(r[p]) for p in PHASES] for r in read_csv(folder/"conf_mat.csv", PHASES)])
    rows = read_csv(folder/"class_metrics.csv", ["phase", "F1_Score"])
    if confusion.shape != (len(PHASES),)*2 or [r["phase"] for r in rows] != list(PHASES):
        raise FormatError(f"{folder}: these tables do not have the {len(PHASES)} phases")
    overall = {k: float(v) for k, v in read_csv(folder/"other_metrics.csv", ["Balanced_Accuracy"])[0].items()}
    classes = {k: np.array([float(r[k]) for r in rows]) for k in rows[0] if k != "phase"}
    return PhaseMetrics(confusion, classes, overall)

def write_predictions(
    name: str, # of the model
    ids: Sequence[str], # of the pictures
    probs: np.ndarray, # (n, 16)
    folder: str | os.PathLike, # gets '<name>_pred-prob.csv' and '<name>_pred-class.csv'
    on_exists: OnExists = "error", # what to do with tables that are there
    predicted: np.ndarray | None = None, # (n) int, decoded phases; default: the most probable
) -> tuple[Path, Path]: # the two files
    "Write probabilities and phases of pictures"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    got = probs.argmax(1) if predicted is None else predicted
    rows = [{"id": i, **{f"class_prob_{c}": f"{v:.9g}" for c, v in enumerate(p)}} for i, p in zip(ids, probs)]
    phases = [{"id": i, "class_pred": int(c)} for i, c in zip(ids, got)]
    return tuple(_written(lambda p, e, t=t: write_csv(p, t, on_exists=e), folder/f"{name}_pred-{kind}.csv", on_exists)
                 for kind, t in (("prob", rows), ("class", phases)))

def read_predictions(
    path: str | os.PathLike, # '<name>_pred-prob.csv'
) -> tuple[list[str], np.ndarray]: # names, and (n, 16) probabilities
    "Read probabilities back"
    columns = [f"class_prob_{c}" for c in range(len(PHASES))]
    rows = read_csv(path, ["id", *columns])
    try: probs = np.array([[float(r[c]) for c in columns] for r in rows], np.float32).reshape(-1, len(PHASES))
    except ValueError as e: raise FormatError(f"{path}: {e}") from None
    return [r["id"] for r in rows], probs

# %%
rng, some = rng_for(0, "lesson"), (0, 3, 4, 5, 11, 13)
truth = rng.choice(some, 300)
probs = rng.dirichlet(np.full(16, 0.1), 300) + 0.9*np.eye(16)[(truth + rng.integers(-1, 2, 300)).clip(0, 15)]
probs = (probs/probs.sum(1, keepdims=True)).astype(np.float32)
ids = [f"F+00_E{k}_{k + 1}" for k in range(300)]
result = phase_metrics(truth, probs)
with tmpdir() as d:
    write_metrics(result, d)
    write_predictions("noisy", ids, probs, d)
    write_metrics(result, d, "skip")
    with raises(OutputExists, match="holds other results"): write_metrics(phase_metrics(truth, probs[::-1]), d, "skip")
    files, back, (names, again) = sorted(p.name for p in d.iterdir()), read_metrics(d), read_predictions(
        d/"noisy_pred-prob.csv")
files, {k: round(v, 3) for k, v in result.overall.items()}

# %%
assert names == ids and np.array_equal(again, probs) and back.overall == result.overall
assert np.array_equal(np.isfinite(result.classes["Recall"]), np.isin(np.arange(16), some))
perfect = phase_metrics(truth, np.eye(16)[truth])
assert perfect.overall["Balanced_Accuracy"] == perfect.overall["Macro_F1"] == np.nanmin(perfect.classes["PR_AUC"]) == 1
with raises(DataError, match="needs \\(300, 16\\) numbers"): phase_metrics(truth, probs[:, :4])

# %% [markdown]
# Pictures, one file each: where phases are confused, and how several models compare.

# %%
#| export
def confusion_figure(
    found: PhaseMetrics, # figures
    title: str = "", # above
) -> Any: # figure
    "Shares of each true phase as a map"
    fig = plot._picture(5.2, 4.8, layout="constrained")
    ax = fig.subplots()
    shares = found.normalised
    ax.imshow(np.nan_to_num(shares), cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(np.nan_to_num(shares) >= 0.005):
        ax.text(j, i, f"{100*shares[i, j]:.0f}", ha="center", va="center", size=6,
                color="white" if shares[i, j] > 0.6 else "black")
    ax.set_xticks(range(len(PHASES)), PHASES, rotation=90, fontsize=7)
    ax.set_yticks(range(len(PHASES)), PHASES, fontsize=7)
    ax.set_xlabel("predicted", fontsize=8)
    ax.set_ylabel("true [%]", fontsize=8)
    ax.set_title(title, fontsize=9)
    return fig

def _panels(models: Mapping[str, PhaseMetrics], columns: Sequence[str]) -> Any:
    "A panel of bars by phase for each column"
    fig = plot._picture(7, 1.9*len(columns), layout="constrained")
    for ax, column in zip(fig.subplots(len(columns), squeeze=False)[:, 0], columns):
        for k, (name, m) in enumerate(models.items()):
            wide = 0.8/len(models)
            ax.bar(np.arange(len(PHASES)) - 0.4 + (k + 0.5)*wide, np.nan_to_num(m.classes[column]), wide,
                   color=plot.label_colours([k + 1])[0]*0.9, label=name)
        ax.set_xticks(range(len(PHASES)), PHASES, fontsize=7)
        ax.set_ylabel(column, fontsize=8)
        ax.set_ylim(0, 1)
        ax.spines[["top", "right"]].set_visible(False)
    fig.axes[0].legend(fontsize=7, frameon=False, ncols=4)
    return fig

def plot_metrics(
    models: Mapping[str, PhaseMetrics], # name -> figures
    folder: str | os.PathLike, # for the pictures; created
    on_exists: OnExists = "overwrite", # what to do with pictures that are there
) -> list[Path]: # files
    "Draw what was measured, one picture a file"
    if not models: raise DataError("plot_metrics: needs at least one model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    def mean(column: str) -> dict[str, float]: return {k: np.nanmean(m.classes[column]) for k, m in models.items()}
    figures = {"balanced_accuracy": plot.bars({k: m.overall["Balanced_Accuracy"] for k, m in models.items()},
                                              title="balanced accuracy"),
               "f1": plot.curves({k: m.classes["F1_Score"] for k, m in models.items()}, xlabel="phase", ylabel="F1"),
               "precision_recall": _panels(models, ("Precision", "Recall")),
               "roc_auc": plot.bars(mean("ROC_AUC"), title="mean area under the ROC curve"),
               "pr_auc": plot.bars(mean("PR_AUC"), title="mean area under the precision-recall curve")}
    figures["f1"].axes[0].set_xticks(range(len(PHASES)), PHASES, fontsize=6)
    figures |= {f"confusion_{k}": confusion_figure(m, k) for k, m in models.items()}
    return [_written(lambda p, e, f=f: plot.save_figure(f, p, e), folder/f"{k}.png", on_exists)
            for k, f in figures.items()]

# %%
confusion_figure(result, "six phases occur, sixteen are drawn")

# %%
with tmpdir() as d: drawn = plot_metrics({"noisy": result, "perfect": perfect}, d)
assert [p.stem for p in drawn] == ["balanced_accuracy", "f1", "precision_recall", "roc_auc", "pr_auc",
                                   "confusion_noisy", "confusion_perfect"]
_panels({"noisy": result, "perfect": perfect}, ("Precision", "Recall"))

# %% [markdown]
# ## No embryo grows younger
# Pictures of a video are not independent: a phase lasts, and development goes one way. The most probable path through
# phases that never goes back (Viterbi, 1967) takes transition probabilities from annotated training videos: how long
# phases last, and which one follows. Counts start at one for every way forward, so that nothing is impossible but the
# way back.

# %%
#| export
@dataclass(frozen=True, eq=False)
class Transitions:
    "Log-probabilities of phases from one frame to the next"
    start: np.ndarray # (16) of the first frame
    step: np.ndarray # (16, 16) from row to column; -inf below the diagonal

def fit_transitions(
    sequences: Sequence[np.ndarray], # each (t) int, phases of a video in the order of frames; -1: none
) -> Transitions: # one way only
    "How long phases last and what follows them, from annotated videos"
    n = len(PHASES)
    start, step = np.ones(n), np.triu(np.ones((n, n)))
    for s in sequences:
        s = np.asarray(s)[np.asarray(s) >= 0]
        if not len(s): continue
        start[s[0]] += 1
        begins = np.flatnonzero(np.r_[True, s[1:] != s[:-1]])
        for phase, length in zip(s[begins], np.diff(np.r_[begins, len(s)])): step[phase, phase] += length
        for a, b in zip(s[begins], s[begins[1:]]): step[a, b] += b > a
    with np.errstate(divide="ignore"):
        return Transitions(np.log(start/start.sum()), np.log(step/step.sum(1, keepdims=True)))

def decode(
    log_probs: np.ndarray, # (t, 16) of each frame, in the order of frames
    transitions: Transitions, # from training videos
) -> np.ndarray: # (t) int, never falling
    "Most probable path of phases that never goes back"
    scores = np.asarray(log_probs, np.float64)
    if scores.ndim != 2 or scores.shape[1] != len(transitions.start) or not len(scores):
        raise DataError(f"decode: needs (t, {len(transitions.start)}) log-probabilities, got {scores.shape}")
    if np.isnan(scores).any(): raise DataError("decode: log-probabilities hold NaN")
    best, back = transitions.start + scores[0], np.zeros(scores.shape, np.int64)
    for t in range(1, len(scores)):
        ways = best[:, None] + transitions.step
        back[t] = ways.argmax(0)
        best = ways.max(0) + scores[t]
    path = [int(best.argmax())]
    for t in range(len(scores) - 1, 0, -1): path.append(int(back[t, path[-1]]))
    return np.array(path[::-1])

def emission_from_confusion(
    confusion: np.ndarray, # (16, 16) counts on validation videos, rows are true phases
) -> np.ndarray: # (16, 16) log-probabilities of a predicted phase (column) given the true one (row)
    "How often a phase is taken for another; `table[:, predicted].T` are frames for `decode`"
    return np.log((confusion + 1)/(confusion + 1).sum(1, keepdims=True))

def decode_videos(
    ids: Sequence[str], # labels such as 'F+00_BM016-5_146'
    probs: np.ndarray, # (n, 16) probabilities, or emission probabilities
    transitions: Transitions, # from training videos
) -> np.ndarray: # (n) int, phases in the given order of pictures
    "Decode every video and plane by itself, in the order of its frame numbers"
    keys = [parse_label(i) for i in ids]
    out = np.empty(len(ids), np.int64)
    groups: dict[tuple, list[int]] = {}
    for i, (plane, video, _) in enumerate(keys): groups.setdefault((plane, video), []).append(i)
    for mine in groups.values():
        mine.sort(key=lambda i: keys[i][2])
        out[mine] = decode(np.log(np.maximum(probs[mine], 1e-9)), transitions)
    return out

# %% [markdown]
# Twenty embryos, each seen in a hundred frames by a classifier that errs in every third frame. The path follows the
# truth more closely than the frames do.

# %%
def embryo(t=100):
    return np.sort(rng.choice(16, 8, replace=False))[np.sort(rng.integers(0, 8, t))]

def seen(truth):
    shown = np.where(rng.random(len(truth)) < 0.35, (truth + rng.integers(-3, 4, len(truth))).clip(0, 15), truth)
    return 0.7*np.eye(16)[shown] + 0.3/16

transitions = fit_transitions([embryo() for _ in range(40)])
truths = [embryo() for _ in range(20)]
views = [seen(t) for t in truths]
paths = [decode(np.log(v), transitions) for v in views]
plot.curves({"frame by frame": views[0].argmax(1), "path": paths[0], "truth": truths[0]}, xlabel="frame",
            ylabel="phase")

# %%
before, after = (np.mean([np.mean(p == t) for p, t in zip(group, truths)])
                 for group in ([v.argmax(1) for v in views], paths))
assert all((np.diff(p) >= 0).all() for p in paths) and after > before + 0.1
round(before, 2), round(after, 2)

# %% [markdown]
# The path is the best of all that do not go back: of four frames and three phases, tried one by one.

# %%
small = Transitions(np.log([0.5, 0.3, 0.2]), np.log(np.triu(rng.random((3, 3)) + 0.1) + 1e-300))
frames = np.log(rng.random((4, 3)))
def score(path):
    return small.start[path[0]] + sum(frames[t, p] for t, p in enumerate(path)) + sum(
        small.step[a, b] for a, b in zip(path, path[1:]))
assert tuple(decode(frames, small)) == max(combinations_with_replacement(range(3), 4), key=score)
with raises(DataError, match="needs \\(t, 3\\)"): decode(np.zeros((4, 2)), small)
