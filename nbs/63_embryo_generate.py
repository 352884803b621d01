# %% [markdown]
# # Synthetic runs
#
# > A folder of images of one phase: exactly as many as asked for, each from its own seed, and marked as synthetic.
#
# Images that a model drew look like data. A year later nobody knows which model drew them, with which words, and
# whether they are all there. A *run* is a folder of images with a record that says so, and each image says for itself
# that it is synthetic. An interrupted run goes on and ends with the same files as one that was not. In the published
# scripts the model's path had to be a file and was then loaded as a folder, so that no image was ever made; the record
# held the template instead of the prompt, and was written before the images; and the class that should read the runs
# failed at the first item.

# %%
#| default_exp embryo.generate

# %%
#| export
import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, OutputExists, atomic,
                            check_output, fingerprint, lock, log, progress, read_json, remove_tree, rng_for,
                            sweep_temporary, write_json)
from medvol_nb.embryo.dataset import Item, to_float
from medvol_nb.embryo.diffusion import picture_number
from medvol_nb.embryo.finetune import MODEL_LICENCE, versions
from medvol_nb.embryo.finetuned import FineTuned, latest_run, load_finetuned
from medvol_nb.embryo.phases import DATA_LICENCE, PHASES, FocalPlane, Phase
from medvol_nb.embryo.tiny import SOLVERS, is_blank, sample, to_grey
from medvol_nb.parallel import on_cluster, pmap

# %%
import tempfile

from PIL import Image

from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises
from medvol_nb.embryo.tiny import make_tiny_sd

# %% [markdown]
# ## An image that says what it is
# Grey, 8 bit, JPEG by default: the real images are JPEG, and a classifier shall not learn to tell them apart by the
# missing block edges. A note inside the file (EXIF in JPEG, text in PNG) says that the image is synthetic, and which
# run, number and seed made it. So an image can be recognised far from its folder, and a run can be continued.

# %%
#| export
_DESCRIPTION = 0x010E # EXIF: ImageDescription

def save_synthetic(
    path: str | os.PathLike, # .jpg or .png; replaced if there
    image: np.ndarray, # (row, column) uint8
    note: Mapping[str, Any], # plain values: run, number, seed, phase, plane
) -> Path: # `path`
    "Write an image with a note in it that it is synthetic"
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    path, text = Path(path), json.dumps({"synthetic": True, **note}, sort_keys=True) # ASCII, as EXIF wants it
    picture = Image.fromarray(image)
    with atomic(path) as temp, open(temp, "wb") as f:
        if path.suffix == ".png":
            info = PngInfo()
            info.add_text("synthetic", "true")
            info.add_text("medvol_nb", text)
            picture.save(f, "PNG", pnginfo=info)
        else:
            exif = Image.Exif()
            exif[_DESCRIPTION] = text
            picture.save(f, "JPEG", quality=95, exif=exif)
    return path

def read_note(
    path: str | os.PathLike, # image
) -> dict[str, Any] | None: # its note; None: not marked, or the file is damaged
    "What an image says about itself; the image is decoded to see that it is whole"
    from PIL import Image
    try:
        with Image.open(path) as img:
            img.load()
            text = img.text.get("medvol_nb", "") if img.format == "PNG" else img.getexif().get(_DESCRIPTION, "")
        note = json.loads(text)
    except (OSError, ValueError, SyntaxError, TypeError): return None
    return note if isinstance(note, dict) and note.get("synthetic") is True else None

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
frame = phantoms.embryo_frame(5, 64)
for name in ("a.jpg", "a.png"): save_synthetic(root/name, frame, {"run": "0123", "index": 7, "seed": 7})
read_note(root/"a.jpg")

# %%
assert read_note(root/"a.png") == read_note(root/"a.jpg") and (root/"a.jpg").stat().st_size < 6000
(root/"cut.jpg").write_bytes((root/"a.jpg").read_bytes()[:-300])
assert read_note(root/"cut.jpg") is None and read_note(root/"absent.jpg") is None

# %% [markdown]
# ## A run
# Image $k$ of $n$ has the seed $s + k$. An image that is black or constant is rejected, and its next seeds are
# $s + n + k$, $s + 2n + k$ and so on: they depend on the image, not on what happened before, so a continued run draws
# the same ones. Images are drawn in blocks of `batch_size`, always the same blocks, because sums in another batch
# differ in their last bits, and those can change a grey level. If one image of a block is missing, the block is drawn
# again and the missing one is written.
#
# `metadata.json` is there from the start with `complete: false`; at the end it is replaced.

# %%
#| export
@dataclass(frozen=True)
class RunSpec:
    "What decides the images of a run"
    phase: str # label
    plane: str # 'F+00', ...
    prompt: str # as the model got it
    model: str # hash of the weights
    num_images: int = 50 # how many
    seed: int = 0 # image k has seed + k
    batch_size: int = 4 # drawn at a time
    steps: int = 25 # of the solver
    guidance_scale: float = 7.5 # weight of the condition
    scheduler: str = "dpm++" # solver
    size: int | None = None # width and height [pixel]; None: the model's own
    format: str = "jpg" # 'jpg' or 'png'

    def __post_init__(self):
        wrong = [f"{n}: must be at least 1, got {v}" for n, v in (
            ("num_images", self.num_images), ("batch_size", self.batch_size), ("steps", self.steps)) if v < 1]
        if self.seed < 0: wrong.append(f"seed: must be >= 0, got {self.seed}")
        if self.scheduler not in SOLVERS:
            wrong.append(f"scheduler: one of {', '.join(SOLVERS)}, got {self.scheduler!r}")
        if self.format not in ("jpg", "png"): wrong.append(f"format: must be jpg or png, got {self.format!r}")
        if not 1 <= self.guidance_scale < 100: wrong.append(f"guidance_scale: 1 to 100, got {self.guidance_scale}")
        if self.size is not None and (self.size < 8 or self.size % 8):
            wrong.append(f"size: must be a multiple of 8, got {self.size}")
        if wrong: raise ConfigError("; ".join(wrong))

    @property
    def identity(self) -> str: return fingerprint(self)
    def name(self, k: int) -> str: return f"img{k}.{self.format}"

Draw = Callable[[Sequence[int]], np.ndarray]

def _kept(folder: Path, spec: RunSpec) -> dict[int, int]:
    "Images of this run that are there and whole: number -> seed"
    kept = {}
    for k in range(spec.num_images):
        path = folder/spec.name(k)
        note = read_note(path) if path.exists() else None
        if note and note.get("run") == spec.identity and note.get("index") == k and isinstance(note.get("seed"), int):
            if (note["seed"] - spec.seed) % spec.num_images == k: kept[k] = note["seed"]
    return kept

def fill_run(
    folder: str | os.PathLike, # of the run, there already
    spec: RunSpec, # what to draw
    draw: Draw, # seeds -> (n, row, column, 3) float32 images in [0, 1]
    *,
    max_rejects: int | None = None, # constant images that are put up with; None: a fifth of the images
) -> tuple[list[int], int]: # seeds of the images, and how many were rejected
    "Draw the images of a run that are not there yet"
    folder, n = Path(folder), spec.num_images
    most = max_rejects if max_rejects is not None else max(1, n//5)
    seeds = _kept(folder, spec)
    rejects = sum((s - spec.seed)//n for s in seeds.values())
    again: list[int] = []

    def keep(k: int, seed: int, image: np.ndarray) -> bool:
        grey = to_grey(image)
        if is_blank(grey): return False
        save_synthetic(folder/spec.name(k), grey, {"run": spec.identity, "index": k, "seed": seed,
                                                   "phase": spec.phase, "plane": spec.plane})
        seeds[k] = seed
        return True

    blocks = [range(a, min(a + spec.batch_size, n)) for a in range(0, n, spec.batch_size)]
    for block in progress(blocks, f"drawing {spec.phase}", unit="batch"):
        if all(k in seeds for k in block): continue
        for k, image in zip(block, draw([spec.seed + k for k in block])):
            if k not in seeds and not keep(k, spec.seed + k, image): again.append(k)
    for k in again:
        for seed in range(spec.seed + n + k, spec.seed + n*(most + 2), n):
            rejects += 1
            if rejects > most:
                raise DataError(f"{folder}: {rejects} images were constant or not finite, {most} are put up with "
                                f"(max_rejects). Images that are good are kept; look at the model, or try another "
                                "precision, prompt or guidance_scale")
            if keep(k, seed, draw([seed])[0]): break
    return [seeds[k] for k in range(n)], rejects

# %%
def painter(seeds): return np.stack([np.repeat(phantoms.embryo_frame(5, 32, seed=s)[..., None]/255, 3, -1)
                                     for s in seeds]).astype(np.float32)

def sometimes_black(seeds):
    out = painter(seeds)
    out[np.isin(seeds, [2, 3, 13])] = 0
    return out

spec = RunSpec("t4", "F+00", "a prompt, with \"quotes\"", "0123", num_images=10)
for name in ("whole", "again"): (root/name).mkdir()
seeds, rejected = fill_run(root/"whole", spec, sometimes_black, max_rejects=3)
seeds, rejected

# %%
assert seeds == [0, 1, 12, 23, 4, 5, 6, 7, 8, 9] and rejected == 3
before = {p.name: p.read_bytes() for p in (root/"whole").iterdir()}
for k in (3, 4, 9): (root/"whole"/f"img{k}.jpg").unlink()
(root/"whole"/"img6.jpg").write_bytes(before["img6.jpg"][:200])
assert fill_run(root/"whole", spec, sometimes_black, max_rejects=3) == (seeds, rejected)
assert before == {p.name: p.read_bytes() for p in (root/"whole").iterdir()} and len(before) == 10

# %%
with raises(DataError, match="3 images were constant .* 2 are put up with"):
    fill_run(root/"again", spec, sometimes_black, max_rejects=2)
with raises(ConfigError, match="num_images: must be at least 1.*scheduler: one of"):
    RunSpec("t4", "F+00", "", "", num_images=0, scheduler="ddpm")

# %% [markdown]
# ## The record
# The keys of the published record are there, with their spelling; the rest is what one would like to know a year later.

# %%
#| export
def _record(spec: RunSpec, source: str, about: Mapping[str, Any]) -> dict[str, Any]:
    return {"datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "prompt": spec.prompt,
            "phase": spec.phase, "focal-plane": spec.plane, "synthetic": True,
            "model": {"path": source, "digest": spec.model},
            "run": fingerprint(about) if about else None, "identity": spec.identity, "num_images": spec.num_images,
            "seed": spec.seed, "batch_size": spec.batch_size, "steps": spec.steps,
            "guidance_scale": spec.guidance_scale, "scheduler": spec.scheduler, "size": spec.size,
            "format": spec.format, "versions": versions(), "source_dataset": about.get("pictures"),
            "licences": about.get("licences") or [DATA_LICENCE, MODEL_LICENCE]}

def make_run(
    model: FineTuned, # see `load_finetuned`
    folder: str | os.PathLike, # of the run; may exist if it is empty
    phase: str | Phase, # what is drawn
    *,
    plane: str | FocalPlane = "F+00", # where it seems to be focused
    prompt: str | None = None, # text or template; None: the one of the model's training
    max_rejects: int | None = None, # constant images that are put up with; None: a fifth of the images
    resume: bool = False, # go on with a run that is there
    on_exists: OnExists = "error", # 'skip': go on as with `resume`, 'overwrite': start anew
    source: str = "", # path or name of the model, for the record
    **settings: Any, # of RunSpec: num_images, seed, batch_size, steps, guidance_scale, scheduler, size, format
) -> dict[str, Any]: # content of metadata.json
    "Make a synthetic run, or go on with it"
    spec, condition, empty = _planned(model, phase, plane, prompt, settings)
    def draw(seeds: Sequence[int]) -> np.ndarray:
        return sample(model.pipe, condition, empty, seeds, steps=spec.steps, guidance_scale=spec.guidance_scale,
                      size=spec.size, solver=spec.scheduler)
    return write_run(folder, spec, draw, source=source, about=model.about, max_rejects=max_rejects,
                     resume=resume or on_exists == "skip", overwrite=on_exists == "overwrite")

def _planned(model: FineTuned, phase: str | Phase, plane: str | FocalPlane, prompt: str | None,
             settings: Mapping[str, Any]) -> tuple[RunSpec, Any, Any]:
    "What a run is to be, and the conditions of its images and of none"
    phase, plane = Phase.parse(phase), FocalPlane.parse(plane)
    condition, empty, text = model.condition(phase, plane, prompt)
    size = settings.get("size") or model.pipe.unet.config.sample_size*model.pipe.vae_scale_factor
    return RunSpec(phase.value, plane.pretty, text, model.digest, **{**settings, "size": size}), condition, empty

def write_run(
    folder: str | os.PathLike, # of the run
    spec: RunSpec, # what to draw
    draw: Draw, # seeds -> (n, row, column, 3) float32 images in [0, 1]
    *,
    source: str = "", # path or name of the model, for the record
    about: Mapping[str, Any] = MappingProxyType({}), # run.json of the model, for the record
    max_rejects: int | None = None, # constant images that are put up with; None: a fifth of the images
    resume: bool = False, # go on with a run that is there
    overwrite: bool = False, # remove what is there
) -> dict[str, Any]: # content of metadata.json
    "Fill a run folder and its record"
    folder, record = Path(folder), _record(spec, source, about)
    with lock(folder):
        if started := check_run(folder, spec, resume=resume, overwrite=overwrite): record["datetime"] = started
        if overwrite: remove_tree(folder)
        folder.mkdir(exist_ok=True)
        unfinished = {**record, "complete": False, "seeds": None, "rejected": None}
        if len(_kept(folder, spec)) < spec.num_images: write_json(folder/"metadata.json", unfinished)
        seeds, rejected = fill_run(folder, spec, draw, max_rejects=max_rejects)
        done = {**record, "complete": True, "seeds": seeds, "rejected": rejected}
        write_json(folder/"metadata.json", done)
    return done

def check_run(
    folder: str | os.PathLike, # of the run
    spec: RunSpec, # what to draw
    *,
    resume: bool = False, # go on with a run that is there
    overwrite: bool = False, # remove what is there
) -> str | None: # when the run that goes on was started; None: a new one
    "Refuse a folder that holds something else, before any image is drawn"
    folder = Path(folder)
    check_output(folder, "overwrite")
    if folder.exists() and not folder.is_dir(): raise OutputExists(f"output {folder} is a file, not a folder")
    if folder.exists(): sweep_temporary(folder)
    if not folder.exists() or not any(folder.iterdir()): return None
    if overwrite:
        if (folder/"metadata.json").exists(): return None
        raise OutputExists(f"{folder} is not a synthetic run (no metadata.json), it is not overwritten")
    if not (folder/"metadata.json").exists():
        raise OutputExists(f"{folder} is not empty and holds no metadata.json. Choose another name")
    there = read_json(folder/"metadata.json", 2**28)
    if not resume:
        raise OutputExists(f"{folder} holds a run already. Go on with it by resume (--resume), or choose another name")
    if there.get("identity") != spec.identity:
        differ = [k for k, v in (("phase", spec.phase), ("focal-plane", spec.plane), ("prompt", spec.prompt),
                                 *((n, getattr(spec, n)) for n in ("num_images", "seed", "batch_size", "steps",
                                 "guidance_scale", "scheduler", "size", "format"))) if there.get(k) != v]
        raise OutputExists(f"{folder} holds a run with other settings ({', '.join(differ) or 'the model'} differ). "
                           "Choose another name, or start anew with on_exists='overwrite'")
    return there["datetime"]

# %%
model = load_finetuned(make_tiny_sd(root/"tiny"), device="cpu")
quick = {"num_images": 6, "steps": 4, "batch_size": 3, "guidance_scale": 2.0}
(root/"runs").mkdir()
runs = {p: make_run(model, root/"runs"/p, p, **quick) for p in ("t2", "tM")}
shown = [np.asarray(Image.open(root/"runs"/p/f"img{k}.jpg")) for p in runs for k in range(6)]
plot.montage(shown, 6, title="t2 and tM, from a model that knows nothing")

# %%
record = read_json(root/"runs"/"t2"/"metadata.json")
assert record["complete"] and record["seeds"] == list(range(6)) and record["phase"] == "t2"
assert record["prompt"] == "a grayscale microscopic image of a human embryo at phase t2"
assert sorted(p.name for p in (root/"runs"/"t2").iterdir()) == [f"img{k}.jpg" for k in range(6)] + ["metadata.json"]
with raises(OutputExists, match="holds a run already"): make_run(model, root/"runs"/"t2", "t2", **quick)
with raises(OutputExists, match=r"other settings \(steps"):
    make_run(model, root/"runs"/"t2", "t2", resume=True, **{**quick, "steps": 5})

# %%
before = {p.name: p.read_bytes() for p in (root/"runs"/"t2").iterdir()}
for k in (0, 4, 5): (root/"runs"/"t2"/f"img{k}.jpg").unlink()
make_run(model, root/"runs"/"t2", "t2", resume=True, **quick)
assert before == {p.name: p.read_bytes() for p in (root/"runs"/"t2").iterdir()}

# %% [markdown]
# ## Reading runs
# `SyntheticRuns` gives the same items as the data set of real frames, with video and frame -1 and `synthetic` true. The
# record is required; both published spellings of the focal plane are understood.

# %%
#| export
_IMAGES = (".jpg", ".jpeg", ".png")

def read_record(
    folder: str | os.PathLike, # of a run
) -> tuple[Phase, FocalPlane, dict[str, Any]]: # what it shows, and the whole record
    "The record of a synthetic run"
    file = Path(folder)/"metadata.json"
    if not file.exists(): raise MissingFile(f"{folder} is not a synthetic run: it has no metadata.json")
    about = read_json(file, 2**28)
    if not isinstance(about, dict): raise FormatError(f"{file}: must hold an object")
    plane = about.get("focal-plane", about.get("focal_plane"))
    if lacking := [n for n, v in (("phase", about.get("phase")), ("focal-plane", plane)) if v is None]:
        raise FormatError(f"{file}: {' and '.join(lacking)} missing")
    try: return Phase.parse(about["phase"]), FocalPlane.parse(plane), about
    except ConfigError as e: raise FormatError(f"{file}: {e}") from None

def run_images(
    folder: str | os.PathLike, # of a run
) -> list[Path]: # in order of their numbers, hidden files left out
    "Image files of a synthetic run"
    return sorted((p for p in Path(folder).iterdir() if p.suffix.lower() in _IMAGES and not p.name.startswith(".")),
                  key=picture_number)

class SyntheticRuns:
    "Images of one or many synthetic runs as a data set"
    def __init__(
        self,
        root: str | os.PathLike, # a run folder, or a folder of run folders
        phases: Sequence[str | Phase] | None = None, # only these; None: all
        *,
        transform: Callable[[np.ndarray], Any] | None = None, # of the (row, column) image, uint8; None: `to_float`
        incomplete: bool = False, # also read runs that are not finished
    ):
        root = Path(root)
        if not root.is_dir(): raise MissingFile(f"synthetic runs: {root} is not a folder")
        runs = [root] if (root/"metadata.json").exists() else sorted(p for p in root.iterdir() if p.is_dir())
        if not runs: raise MissingFile(f"synthetic runs: {root} holds no run")
        wanted = None if phases is None else {Phase.parse(p) for p in phases}
        self.transform = to_float if transform is None else transform
        self.paths: list[Path] = []
        self.about: dict[Path, dict] = {}
        phase_of, plane_of = [], []
        for run in runs:
            phase, plane, about = read_record(run)
            if wanted is not None and phase not in wanted: continue
            files = run_images(run)
            n = about.get("num_images", len(files))
            if not incomplete and (about.get("complete") is False or len(files) != n):
                raise DataError(f"{run}: this run has {len(files)} of {n} images. Go on with it (generate --resume)")
            self.paths += files
            self.about[run] = about
            phase_of += [phase.idx()]*len(files)
            plane_of += [plane.idx()]*len(files)
        if not self.paths: raise DataError(f"synthetic runs: no images in {root} for {phases or 'any phase'}")
        self.phases, self.planes = np.array(phase_of, np.int64), np.array(plane_of, np.int64)

    def __len__(self) -> int: return len(self.paths)

    def __getitem__(self, i: int) -> Item:
        from PIL import Image
        try:
            with Image.open(self.paths[i]) as img: grey = np.asarray(img.convert("L"))
        except (OSError, ValueError, SyntaxError) as e:
            raise FormatError(f"{self.paths[i]}: is damaged: {e}") from None
        return Item(self.transform(grey), int(self.phases[i]), int(self.planes[i]), -1, -1, True)

# %%
made = SyntheticRuns(root/"runs")
len(made), made[0]._replace(image=made[0].image.shape), [PHASES[p] for p in np.unique(made.phases)]

# %%
assert made[7].phase == Phase.tM.idx() and made[7].synthetic and made[7].video == -1
assert len(SyntheticRuns(root/"runs", ["t2"])) == 6 == len(SyntheticRuns(root/"runs"/"tM"))
(root/"runs"/"t2"/"img3.jpg").unlink()
with raises(DataError, match="has 5 of 6 images"): SyntheticRuns(root/"runs")
with raises(MissingFile, match="no metadata.json"): SyntheticRuns(root/"whole"/"..")
(root/"whole"/"metadata.json").write_text('{"phase": "t4"}')
with raises(FormatError, match="focal-plane missing"): SyntheticRuns(root/"whole")

# %% [markdown]
# ## Real and synthetic together
# How many synthetic images are added to a phase is said by a ratio to its real ones, or by a number that each phase
# shall reach; `max_ratio` limits both, because published gains end at ten to one. What is synthetic stays marked.

# %%
#| export
class Mixed:
    "Real and synthetic items as one data set"
    def __init__(
        self,
        real: Any, # data set of `Item`
        synthetic: Any, # data set of `Item`
        chosen: np.ndarray, # (n,) items of `synthetic` that are used
    ):
        self.parts, self.chosen = (real, synthetic), np.asarray(chosen, np.int64)
        self.phases = np.concatenate([phases_of(real), phases_of(synthetic)[self.chosen]])
        self.synthetic = np.arange(len(self.phases)) >= len(real)
    def __len__(self) -> int: return len(self.phases)
    def __getitem__(self, i: int) -> Item:
        if not -len(self) <= i < len(self): raise IndexError(f"item {i} of {len(self)}")
        i, n = i % len(self), len(self.parts[0])
        return self.parts[0][i] if i < n else self.parts[1][int(self.chosen[i - n])]

def phases_of(
    data: Any, # `EmbryoFrames`, `SyntheticRuns`, or anything with `phases`
) -> np.ndarray: # (n,) int, index of the phase of each item
    "Phases of a data set, without decoding images"
    return np.asarray(data.phases if hasattr(data, "phases") else data.phase[data._row], np.int64)

def mix(
    real: Any, # data set of real items
    synthetic: Any, # data set of synthetic items
    *,
    ratio: float | None = None, # synthetic images of each phase for each real one
    per_class_target: int | Literal["largest"] | None = None, # images that each phase shall have, instead
    max_ratio: float = 10.0, # synthetic images for each real one at most
    seed: int = 0, # of the choice
) -> Mixed: # real items first, then synthetic ones, phase by phase
    "Add synthetic images to a training set"
    if (ratio is None) == (per_class_target is None): raise ConfigError("mix: ratio or per_class_target, one of them")
    if ratio is not None and ratio < 0: raise ConfigError(f"ratio: must be >= 0, got {ratio}")
    there, made, chosen = phases_of(real), phases_of(synthetic), []
    counts = np.bincount(there[there >= 0], minlength=len(PHASES))
    target = counts.max() if per_class_target == "largest" else per_class_target
    for phase in range(len(PHASES)):
        n = int(counts[phase])
        wanted = round(ratio*n) if ratio is not None else max(0, target - n)
        wanted, pool = min(wanted, int(max_ratio*n)), np.flatnonzero(made == phase)
        if wanted > len(pool):
            log.warning("mix: %d synthetic images of %s wanted, there are %d", wanted, PHASES[phase], len(pool))
        chosen.append(np.sort(rng_for(seed, "mix", phase).permutation(pool)[:wanted]))
    return Mixed(real, synthetic, np.concatenate(chosen))

# %%
class Toy:
    def __init__(self, phases): self.phases = np.array(phases)
    def __len__(self): return len(self.phases)
    def __getitem__(self, i): return Item(None, int(self.phases[i]), 3, 0, i)

real, extra = Toy([3]*8 + [5]*2), Toy([3]*20 + [5]*20)
counts = {"ratio 0.5": mix(real, extra, ratio=0.5), "up to the largest": mix(real, extra, per_class_target="largest"),
          "at most 1 each": mix(real, extra, per_class_target=12, max_ratio=1.0)}
{k: {PHASES[p]: (int((m.phases[~m.synthetic] == p).sum()), int((m.phases[m.synthetic] == p).sum())) for p in (3, 5)}
 for k, m in counts.items()}

# %%
up = counts["up to the largest"]
assert np.bincount(up.phases)[[3, 5]].tolist() == [8, 8] and up.synthetic.sum() == 6
assert len(set(up.chosen.tolist())) == 6 and up[-1].phase == 5
assert close(up.chosen, mix(real, extra, per_class_target="largest").chosen)
with raises(ConfigError, match="one of them"): mix(real, extra)

# %% [markdown]
# ## The command
# `medvol embryo generate`. One run folder for each phase. On a cluster (`--dask`) each phase is drawn by one worker,
# which loads the model itself: nothing large travels.

# %%
#| export
def _model(model_path: Path | None, latest_model_in: Path | None, lora: Path | None, model: str | None, device: str
           ) -> tuple[FineTuned, str]:
    "The model that was asked for, and where it is"
    ways = {"--model-path": model_path, "--latest-model-in": latest_model_in, "--lora": lora}
    if len(given := [n for n, v in ways.items() if v]) != 1:
        raise ConfigError(f"model: give one of {', '.join(ways)}, got {', '.join(given) or 'none'}")
    if lora is not None and model is None: raise ConfigError("lora: --model must name the base model")
    path = latest_run(latest_model_in) if latest_model_in else model_path or lora
    return load_finetuned(path, device=device, base=model), str(path)

def _wanted(phase: Sequence[str], model: FineTuned) -> Iterator[Phase]:
    "Phases that were asked for; 'all' are those the model knows"
    if "all" not in phase:
        yield from (Phase.parse(p) for p in phase)
        return
    if len(phase) > 1: raise ConfigError(f"phase: 'all' stands alone, got {list(phase)}")
    known = {r[0] for r in model.rows} or set(model.about.get("pictures", {}).get("phases", ())) or set(PHASES)
    yield from (p for p in Phase if p.value in known)

@lru_cache(maxsize=1)
def _drawer(source: str, device: str, base: str | None, digest: str) -> FineTuned:
    "One model a worker"
    found = load_finetuned(source, device=device, base=base)
    if found.digest != digest: raise DataError(f"{source}: is not the model that this run began with")
    return found

def _draw_there(phase: Phase, folders: Mapping[Phase, Path], model: tuple, how: Mapping[str, Any]) -> None:
    "The run of one phase, on a worker of a cluster"
    make_run(_drawer(*model), folders[phase], phase, **how)

def generate(
    *,
    phase: Sequence[str], # what is drawn, one or several phases, or all
    dataset_name: str, # name of the run's folder; with several phases the phase is added
    synthetic_dataset_parent: Path, # existing folder that it goes into
    model_path: Path | None = None, # run folder, checkpoint, or folder of diffusers
    latest_model_in: Path | None = None, # folder of runs, of which the newest complete one is taken
    lora: Path | None = None, # LoRA file, together with --model
    model: str | None = None, # base model of a LoRA file or run
    focal_plane: str = "F+00", # where the embryo seems to be focused
    prompt: str | None = None, # text with {phase} and {focal_plane}; default: the one of the training
    num_images: int = 50, # images of each phase
    seed: int = 0, # image k has seed + k
    batch_size: int = 4, # drawn at a time
    steps: int = 25, # of the solver
    guidance_scale: float = 7.5, # weight of the condition
    scheduler: Literal["dpm++", "ddim", "pndm", "euler"] = "dpm++", # solver
    format: Literal["jpg", "png"] = "jpg", # of the files
    size: int | None = None, # width and height [pixel]; default: the model's own
    resume: bool = False, # go on with a run that is there
    max_rejects: int | None = None, # constant images that are put up with; default: a fifth of the images
    device: str = "auto", # where to compute
    dask: str | None = None, # address of a Dask scheduler whose workers see the same folders; one phase a worker
    on_exists: OnExists = "error", # what to do with a run that is there; 'skip' goes on with it
    dry_run: bool = False, # load the model and check, draw nothing
) -> dict: # folders, number of images, prompts
    "Draw synthetic embryo images of some phases with a fine-tuned model"
    parent = Path(synthetic_dataset_parent)
    if not parent.is_dir():
        raise MissingFile(f"synthetic_dataset_parent: {parent} is not a folder. Create it: mkdir -p '{parent}'")
    if dataset_name in ("", ".", "..") or any(c in dataset_name for c in "/\\\0"):
        raise ConfigError(f"dataset_name: {dataset_name!r} is not a folder name")
    if not phase: raise ConfigError("phase: at least one is needed, or all")
    for p in set(phase) - {"all"}: Phase.parse(p)
    loaded, source = _model(model_path, latest_model_in, lora, model, device)
    phases = list(dict.fromkeys(_wanted(phase, loaded)))
    folders = {p: parent/(dataset_name if len(phases) == 1 else f"{dataset_name}-{p.value}") for p in phases}
    settings = {"num_images": num_images, "seed": seed, "batch_size": batch_size, "steps": steps,
                "guidance_scale": guidance_scale, "scheduler": scheduler, "size": size, "format": format}
    plane, told = FocalPlane.parse(focal_plane), []
    for p in phases: # everything that can be refused is refused before the first image
        spec, _, _ = _planned(loaded, p, plane, prompt, settings)
        check_run(folders[p], spec, resume=resume or on_exists == "skip", overwrite=on_exists == "overwrite")
        told.append({"folder": str(folders[p]), "phase": p.value, "images": num_images, "prompt": spec.prompt})
    if dry_run: return {"runs": told, "model": source}
    log.info("%s", DATA_LICENCE)
    how = {"plane": plane, "prompt": prompt, "max_rejects": max_rejects, "resume": resume, "on_exists": on_exists,
           "source": source, **settings}
    if dask is None:
        for p in phases: make_run(loaded, folders[p], p, **how)
    else:
        there = partial(_draw_there, folders=folders, model=(source, device, model, loaded.digest), how=how)
        with on_cluster(dask): pmap(there, phases, keys=[p.value for p in phases], desc="phases")
    return {"runs": told, "model": source, "licences": loaded.about.get("licences") or [DATA_LICENCE, MODEL_LICENCE]}

# %%
told = generate(phase=["t2", "t9+"], dataset_name="new", synthetic_dataset_parent=root, model_path=root/"tiny",
                num_images=2, steps=3, size=64, format="png", device="cpu")
[(Path(r["folder"]).name, r["prompt"]) for r in told["runs"]]

# %%
assert len(SyntheticRuns(root/"new-t9+")) == 2 and SyntheticRuns(root/"new-t9+")[0].phase == 10
again = {"dataset_name": "new", "synthetic_dataset_parent": root, "model_path": root/"tiny", "steps": 3, "size": 64}
with raises(OutputExists, match="new-t2 holds a run already"):
    generate(phase=["t4", "t2"], num_images=2, format="png", device="cpu", **again)
assert not (root/"new-t4").exists() # nothing was drawn
where = {"dataset_name": "x", "synthetic_dataset_parent": root, "device": "cpu"}
with raises(ConfigError, match="give one of --model-path"): generate(phase=["t2"], **where)
with raises(ConfigError, match="must be one of tPB2"): generate(phase=["t17"], model_path=root/"tiny", **where)
with raises(MissingFile, match="does not exist"): generate(phase=["t2"], model_path=root/"typo", **where)
place.cleanup()
