# %% [markdown]
# # Do synthetic images help?
#
# > A classifier is trained with and without them, with the same number of steps, and tested on real embryos.
#
# Figures of [quality](63a_embryo_quality.ipynb) say whether synthetic pictures resemble real ones. Whether they are of
# *use* is another question, and it has a direct answer: train a classifier on real pictures, train it on real and
# synthetic ones, look at real pictures of other embryos. The answer is easily biased. More pictures mean more steps,
# if epochs are counted; one seed can be lucky; frames of one video are not independent; and the best of many settings
# is always good. So every arm gets the same number of steps, there are at least three seeds, whole videos are
# resampled for the intervals, which are widened for the number of comparisons, and an interval that holds 0 is called
# no gain.

# %%
#| default_exp embryo.study

# %%
#| export
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb import plot
from medvol_nb.core import (ConfigError, DataError, MissingFile, OnExists, check_output, fingerprint, log, plain,
                            read_json, remove_tree, rng_for, write_csv, write_json)
from medvol_nb.embryo.classify import (ClassifierConfig, load_classifier, merge_phases, predict_phases,
                                       train_classifier)
from medvol_nb.embryo.dataset import EmbryoFrames
from medvol_nb.embryo.features import LabelledImages
from medvol_nb.embryo.generate import read_record, run_images
from medvol_nb.embryo.phases import PHASES
from medvol_nb.embryo.scores import phase_metrics, read_predictions, write_predictions

# %%
import tempfile

from PIL import Image

from medvol_nb.core import raises
from medvol_nb.embryo.features import phantom_images
from medvol_nb.phantoms import embryo_frame

# %% [markdown]
# ## Pictures from where they are
# Frames come from the [data set](60c_embryo_dataset.ipynb), with the labels `plane_video_frame` as names. A run of
# synthetic pictures is a folder with `metadata.json`, which says phase and plane; numbers in file names give the
# order. What is marked as synthetic stays marked; whoever passes such a folder as real gets an error.

# %%
#| export
def images_of(
    frames: EmbryoFrames, # of real videos
) -> LabelledImages: # in the same order
    "Frames of a data set as pictures for a classifier"
    keys = [frames._key(i) for i in range(len(frames))]
    return LabelledImages.of([frames.path(i) for i in range(len(keys))], frames.phase[[k[3] for k in keys]],
                             [k[1] for k in keys], [frames.label(i) for i in range(len(keys))])

def images_of_run(
    folder: str | os.PathLike, # with metadata.json
) -> LabelledImages: # synthetic pictures
    "Pictures of one synthetic run"
    folder = Path(folder)
    phase, _, about = read_record(folder)
    if about.get("complete") is False: raise DataError(f"{folder}: this run is not complete. Finish it first")
    files = run_images(folder)
    if not files: raise DataError(f"{folder}: holds no pictures")
    if len(files) != about.get("num_images", len(files)):
        raise DataError(f"{folder}: holds {len(files)} of {about['num_images']} pictures")
    return LabelledImages.of(files, [phase.idx()]*len(files), None,
                             [f"{folder.name}/{p.name}" for p in files])

def find_runs(
    root: str | os.PathLike, # a run, or a folder of runs
) -> list[Path]: # folders of runs, by name
    "Folders of synthetic pictures"
    root = Path(root)
    if not root.is_dir(): raise MissingFile(f"{root} is not a folder")
    found = [root] if (root/"metadata.json").exists() else sorted(p.parent for p in root.glob("*/metadata.json"))
    if not found: raise MissingFile(f"{root}: neither a run with metadata.json nor a folder of such runs")
    return found

# %%
place = tempfile.TemporaryDirectory()
folder = Path(place.name)
(folder/"runs"/"t4").mkdir(parents=True)
write_json(folder/"runs"/"t4"/"metadata.json", {"phase": "t4", "focal-plane": "F+00", "synthetic": True})
for k in (0, 2, 10): Image.fromarray(embryo_frame(5, 32, k)).save(folder/"runs"/"t4"/f"img{k}.png")
one = images_of_run(find_runs(folder/"runs")[0])
one.ids, one.phases.tolist(), one.synthetic.tolist()

# %%
assert one.ids == ["t4/img0.png", "t4/img2.png", "t4/img10.png"] and one.phases.tolist() == [5]*3
with raises(MissingFile, match="neither a run"): find_runs(folder)

# %% [markdown]
# ## Arms
# `real` is the reference: a share of the real training videos, no synthetic pictures. `mixed` adds synthetic pictures,
# `ratio` of them for each real one of the same phase. `synthetic` trains on synthetic pictures alone. `plain` is the
# reference without flips and turns: what classical augmentation is worth, to see synthetic gains in proportion. Shares
# are nested, so that a larger one holds the smaller ones.

# %%
#| export
@dataclass(frozen=True)
class Arm:
    "What a classifier is trained on"
    kind: Literal["real", "mixed", "synthetic", "plain"] # which pictures
    fraction: float = 1.0 # share of real training videos
    ratio: float = 0.0 # synthetic pictures for each real one
    @property
    def name(self) -> str: return f"{self.kind}-{self.fraction:g}" + (f"-x{self.ratio:g}" if self.ratio else "")

def plan_arms(
    fractions: Sequence[float] = (1.0,), # shares of real training videos, in (0, 1]
    ratios: Sequence[float] = (0, 0.5, 1, 3, 10), # synthetic pictures for each real one; 0 is always there
) -> list[Arm]: # the reference of each share before those that are compared with it
    "All arms of an experiment"
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise ConfigError(f"fractions: must be in (0, 1], got {list(fractions)}")
    if not all(0 <= r < 1000 for r in ratios): raise ConfigError(f"ratios: must be >= 0, got {list(ratios)}")
    out = []
    for f in sorted(set(fractions)):
        out += [Arm("real", f), Arm("plain", f), *(Arm("mixed", f, float(r)) for r in sorted(set(ratios)) if r)]
    return [*out, Arm("synthetic", 1.0)]

def arm_images(
    arm: Arm, # what is wanted
    real: LabelledImages, # all real training pictures
    synthetic: LabelledImages, # all synthetic pictures
    seed: int = 0, # names the choice
) -> LabelledImages: # for training
    "Training pictures of an arm"
    if arm.kind == "synthetic": return synthetic
    videos = rng_for(seed, "study", "videos").permutation(np.unique(real.videos))
    chosen = real.at(np.isin(real.videos, videos[:max(1, round(arm.fraction*len(videos)))]))
    if not arm.ratio: return chosen
    rng, extra = rng_for(seed, "study", "synthetic"), []
    for phase in np.unique(synthetic.phases):
        mine = rng.permutation(np.flatnonzero(synthetic.phases == phase))
        wanted = round(arm.ratio*(chosen.phases == phase).sum())
        if wanted > len(mine): log.warning("%s: %d synthetic pictures of %s wanted, there are %d", arm.name, wanted,
                                           PHASES[phase], len(mine))
        extra.append(mine[:wanted])
    return chosen + synthetic.at(np.sort(np.concatenate(extra)))

# %%
some = (0, 5, 13)
real, val, test = (phantom_images(some, range(a, b), 32) for a, b in ((0, 8), (100, 106), (200, 220)))
useful = phantom_images(some, range(300, 330), 32, synthetic=True)
useless = LabelledImages.of(list(rng_for(0, "noise").integers(0, 256, (90, 32, 32), np.uint8)), some*30)
[(a.name, len(arm_images(a, real, useful))) for a in plan_arms((0.5, 1), (1, 3))]

# %%
half, whole = (arm_images(Arm("real", f), real, useful) for f in (0.5, 1))
assert {*half.videos} < {*whole.videos} and len({*half.videos}) == 4
mixed = arm_images(Arm("mixed", 1, 3), real, useful)
assert mixed.synthetic.sum() == 72 and np.bincount(mixed.phases[mixed.synthetic])[5] == 24
with raises(ConfigError, match="fractions: must be in"): plan_arms((0, 1))

# %% [markdown]
# ## Intervals
# The score is balanced accuracy. For an interval, test videos are drawn with replacement, seeds too, and each draw is
# applied to both arms, since both saw the same videos. With $k$ comparisons the interval has level $1-0.05/k$, so
# that all of them hold together with 95 % (Bonferroni).

# %%
#| export
def _tallies(truth: np.ndarray, predicted: np.ndarray, videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "(videos, 16) pictures, and those recognised"
    names, at = np.unique(videos, return_inverse=True)
    seen, right = np.zeros((2, len(names), len(PHASES)))
    np.add.at(seen, (at, truth), 1)
    np.add.at(right, (at, truth), predicted == truth)
    return seen, right

def _balanced(seen: np.ndarray, right: np.ndarray) -> np.ndarray:
    "Balanced accuracy of tallies (..., 16)"
    with np.errstate(invalid="ignore"): return np.nanmean(np.where(seen > 0, right/seen, np.nan), -1)

def paired_interval(
    truth: np.ndarray, # (n) int, phases of test pictures
    videos: np.ndarray, # (n) str
    ours: np.ndarray, # (seeds, n) int, predictions of one arm
    theirs: np.ndarray, # (seeds, n) int, predictions of the reference with the same seeds
    *,
    level: float = 0.95, # of the interval
    draws: int = 2000, # resamplings
    seed: int = 0, # names them
) -> tuple[float, float, float]: # difference of balanced accuracy, lower and upper limit
    "How much better one arm is than another, with an interval over videos and seeds"
    if ours.shape != theirs.shape or ours.shape[1:] != truth.shape:
        raise DataError(f"interval: predictions {ours.shape} and {theirs.shape} for {truth.shape} pictures")
    seen, _ = _tallies(truth, truth, videos)
    right = np.stack([[_tallies(truth, p, videos)[1] for p in arm] for arm in (ours, theirs)]) # (2, seeds, videos, 16)
    rng, (n_videos, s) = rng_for(seed, "paired_interval"), (len(seen), len(ours))
    pick = rng.multinomial(n_videos, np.full(n_videos, 1/n_videos), draws).astype(float)
    drawn = _balanced(pick @ seen, pick @ right) # (2, seeds, draws)
    each = (drawn[0] - drawn[1]).T # (draws, seeds)
    found = np.take_along_axis(each, rng.integers(0, s, (draws, s)), 1).mean(1)
    score = _balanced(seen.sum(0), right.sum(2)) # (2, seeds)
    return (float((score[0] - score[1]).mean()), *np.quantile(found, [(1 - level)/2, (1 + level)/2]).tolist())

# %%
rng = rng_for(0, "lesson")
truth, of = rng.integers(0, 16, 800), np.repeat([f"v{k}" for k in range(40)], 20)
def guesses(right): return np.where(rng.random((3, 800)) < right, truth, rng.integers(0, 16, (3, 800)))
better, equal = (paired_interval(truth, of, guesses(r), guesses(0.6)) for r in (0.75, 0.6))
[tuple(round(v, 3) for v in r) for r in (better, equal)]

# %%
assert better[1] > 0 and equal[1] < 0 < equal[2] and better[1] < better[0] < better[2]
wide = paired_interval(truth, of, guesses(0.75), guesses(0.6), level=0.999)
assert wide[2] - wide[1] > better[2] - better[1]

# %% [markdown]
# ## The experiment
# Each arm and seed is a training run in a folder of its own. An experiment that was interrupted goes on with the run
# it was in; runs that are done are not repeated. The result is a table of runs, a table of arms with a verdict each,
# and a figure.

# %%
#| export
def _one_run(arm: Arm, seed: int, sets: Mapping[str, LabelledImages], cfg: ClassifierConfig, out: Path
             ) -> np.ndarray:
    "(n) phases of test pictures, by a classifier of this arm; from the table if it is there"
    changes = {"seed": seed} | ({"flips": False, "rotations": False, "free_angle": 0.0} if arm.kind == "plain" else {})
    settings = cfg.model_copy(update=changes)
    images = arm_images(arm, sets["real"], sets["synthetic"], seed)
    key = fingerprint([plain(settings), [[s.identity, s.phases] for s in (images, sets["val"], sets["test"])]])
    folder = out/"runs"/f"{arm.name}-s{seed}"
    table, note = folder/"test_pred-prob.csv", folder/"result.json"
    if not (note.exists() and table.exists() and read_json(note).get("key") == key):
        train_classifier(images, sets["val"], settings, out_dir=folder/"fit")
        found = predict_phases(load_classifier(folder/"fit"), sets["test"], device=cfg.device)
        write_predictions("test", sets["test"].ids, found.probs, folder, "overwrite")
        write_json(note, {"key": key, "arm": arm.name, "seed": seed, "pictures": len(images),
                          "synthetic": int(images.synthetic.sum())})
        remove_tree(folder/"fit"/"checkpoints")
    return read_predictions(table)[1].argmax(1)

def verdict(
    low: float, # lower limit of the difference
    high: float, # upper limit
) -> str: # in words
    "What an interval allows to say"
    if low > 0: return "gain"
    return "no gain" if high >= 0 else "no gain, worse than without"

def study_figure(
    rows: Sequence[Mapping[str, Any]], # of the table of arms
) -> Any: # figure
    "Balanced accuracy against the share of synthetic pictures"
    fig, ax = plot._chart(6, 3, "tested on real videos; mean and spread over seeds",
                          "synthetic pictures for each real one", "balanced accuracy")
    kinds = {"plain": "without flips and turns", "synthetic": "synthetic alone"}
    for k, f in enumerate(sorted({r["fraction"] for r in rows}), 1):
        mine = [r for r in rows if r["fraction"] == f and r["kind"] in ("real", "mixed")]
        ax.errorbar([r["ratio"] for r in mine], [r["mean"] for r in mine], [r["sd"] for r in mine], marker="o", ms=3,
                    capsize=2, lw=1.2, color=plot._ink(k), label=f"{f:.0%} of real videos")
        for r in rows:
            if r["fraction"] == f and r["kind"] in kinds:
                ax.axhline(r["mean"], color=plot._ink(k), lw=0.8, ls=":" if r["kind"] == "plain" else "--",
                           label=f"{f:.0%}, {kinds[r['kind']]}" if r["kind"] == "plain" else kinds["synthetic"])
    ax.grid(alpha=0.25, lw=0.5)
    ax.legend(fontsize=7, frameon=False)
    return fig

def augmentation_study(
    real: LabelledImages, # real training pictures
    val: LabelledImages, # real validation pictures of other videos
    test: LabelledImages, # real test pictures of yet other videos
    synthetic: LabelledImages, # synthetic pictures
    cfg: ClassifierConfig = ClassifierConfig(), # settings of every training but seed and pictures
    *,
    out: str | os.PathLike, # folder; an experiment that is there goes on
    fractions: Sequence[float] = (1.0,), # shares of real training videos
    ratios: Sequence[float] = (0, 0.5, 1, 3, 10), # synthetic pictures for each real one
    seeds: Sequence[int] = (0, 1, 2), # at least three
    on_exists: OnExists = "skip", # 'skip': go on, 'overwrite': start anew, 'error': refuse
) -> list[dict[str, Any]]: # a row an arm: mean, sd, difference, interval and verdict
    "Find out whether synthetic pictures help a classifier"
    if len(set(seeds)) < 3: raise ConfigError(f"seeds: at least three are needed to tell gain from luck, got {seeds}")
    sets = {k: merge_phases(s, cfg.merge) for k, s in (("real", real), ("val", val), ("test", test),
                                                        ("synthetic", synthetic))}
    for name in ("real", "val", "test"):
        if sets[name].synthetic.any(): raise DataError(f"study: the {name} pictures must be real, some are synthetic")
    if not sets["synthetic"].synthetic.all(): raise DataError("study: pictures of real videos are among the synthetic")
    for a, b in (("real", "test"), ("val", "test"), ("real", "val")):
        if shared := {*sets[a].videos} & {*sets[b].videos}:
            raise DataError(f"study: {len(shared)} videos are in {a} and {b}, such as {sorted(shared)[0]}")
    out = Path(out)
    if on_exists != "skip": check_output(out, on_exists)
    if on_exists == "overwrite": remove_tree(out/"runs")
    steps = cfg.steps or cfg.epochs*max(1, len(sets["real"])//cfg.batch_size)
    often = cfg.validate_every or max(1, steps//20) # equally often for all arms, whatever their epochs are
    cfg = cfg.model_copy(update={"steps": steps, "patience": None, "validate_every": often})
    arms, truth = plan_arms(fractions, ratios), sets["test"].phases.astype(int)
    got = {arm: np.stack([_one_run(arm, s, sets, cfg, out) for s in seeds]) for arm in arms}
    compared = [a for a in arms if a.kind != "real"]
    rows, runs = [], []
    for arm in arms:
        scores = [phase_metrics(truth, np.eye(len(PHASES))[p]).overall for p in got[arm]]
        values = np.array([s["Balanced_Accuracy"] for s in scores])
        runs += [{"arm": arm.name, "seed": s, **m} for s, m in zip(seeds, scores)]
        row = {"arm": arm.name, "kind": arm.kind, "fraction": arm.fraction, "ratio": arm.ratio, "steps": steps,
               "seeds": len(seeds), "mean": float(values.mean()), "sd": float(values.std(ddof=1))}
        share = max(fractions) if arm.kind == "synthetic" else arm.fraction
        base = got[Arm("real", share)]
        diff = (0.0, 0.0, 0.0) if arm.kind == "real" else paired_interval(
            truth, sets["test"].videos, got[arm], base, level=1 - 0.05/len(compared))
        rows.append(row | dict(zip(("difference", "low", "high"), diff)) |
                    {"verdict": "reference" if arm.kind == "real" else verdict(*diff[1:])})
    write_csv(out/"runs.csv", runs, on_exists="overwrite")
    write_csv(out/"study.csv", rows, on_exists="overwrite")
    plot.save_figure(study_figure(rows), out/"study.png", "overwrite")
    return rows

# %% [markdown]
# Eight embryos are few, and pictures of thirty others in the place of synthetic ones stand for a perfect generator.
# Noise in their place stands for a useless one.

# %%
cfg = ClassifierConfig(architecture="small", size=32, steps=24, batch_size=12, lr=4e-3, device="cpu", validate_every=24)
studies = {name: augmentation_study(real, val, test, images, cfg, out=folder/name, ratios=(0, 3), seeds=(0, 1, 2))
           for name, images in (("useful", useful), ("noise", useless))}
{name: [(r["arm"], round(r["mean"], 2), round(r["difference"], 2), r["verdict"]) for r in rows]
 for name, rows in studies.items()}

# %%
study_figure(studies["useful"])

# %%
assert "no gain" in next(r["verdict"] for r in studies["noise"] if r["kind"] == "mixed")
assert {r["steps"] for r in studies["useful"]} == {24}
again = augmentation_study(real, val, test, useful, cfg, out=folder/"useful", ratios=(0, 3), seeds=(0, 1, 2))
assert again == studies["useful"]

# %%
with raises(ConfigError, match="at least three"):
    augmentation_study(real, val, test, useful, cfg, out=folder/"x", seeds=(0, 1))
with raises(DataError, match="videos are in real and test"): augmentation_study(real, val, real, useful, cfg, out="x")
with raises(DataError, match="test pictures must be real"): augmentation_study(real, val, useful, useful, cfg, out="x")
place.cleanup()
