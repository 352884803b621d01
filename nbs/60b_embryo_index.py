# %% [markdown]
# # Index of an embryo data set
#
# > One pass over the folders: every frame with its planes, phase and time, and everything that is odd, video by video.
#
# The published loader lists 704 videos in its source, reads every table it expects, takes the frames of all planes
# from the first one, and stops with an assertion at the first stray file. This page looks at what is there. The index
# is a handful of arrays with a row for each frame; paths follow from names. What is missing, doubled, overlapping, cut
# off or on another clock is listed with the video it belongs to, because a data set that nobody can audit is a data set
# that nobody should train on.

# %%
#| default_exp embryo.index

# %%
#| export
import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medvol_nb.core import (DataError, MissingFile, OutputExists, _temp_for, atomic, fingerprint, log,
                            parse_json, progress, remove_tree, sweep_temporary, to_json)
from medvol_nb.embryo.phases import (ANNOTATIONS, GRADES, TIMES, AnnotationError, FocalPlane, Interval, Phase,
                                     VideoName, interval_problems, is_on_another_clock, label_frames, parse_planes,
                                     parse_video, read_grades, read_phases, read_times)

# %%
import matplotlib.pyplot as plt

from medvol_nb.core import raises, tmpdir
from medvol_nb.embryo.phantom import make_phantom_dataset

# %% [markdown]
# ## What a folder holds
# A picture is called `<prefix>RUN<n>.jpeg`; the prefix is the same in a whole video, the number has no leading zeros
# and starts from 1. Most folders are exactly like that, so they are read with a slice of each name. Whatever is
# different goes through the regular expression: other endings are accepted, everything else is told and left out.

# %%
#| export
class Problem(NamedTuple):
    "Something odd about a video"
    video: str # name; '' for the whole data set
    kind: str # a word to filter by, such as 'gap' or 'truncated'
    text: str # what it is

class Listing(NamedTuple):
    "Pictures of one folder"
    prefix: str # what comes before RUN; '' if there is no picture
    frames: np.ndarray # (n,) int64, ascending
    other: dict[int, str] # frame -> file name, where it is not '<prefix>RUN<frame>.jpeg'
    strange: list[str] # entries that are not pictures, F0 left out
    prefixes: list[str] # all prefixes found; more than one is an error
    has_f0: bool = False # a folder F0 is there, too

_FRAME = re.compile(r"(?P<prefix>.*)RUN(?P<n>[0-9]{1,9})\.jpe?g", re.IGNORECASE | re.DOTALL)
_LAST_FRAME = 32767 # frames are stored in 16 bits
_POWERS = 10**np.arange(1, 6) # from which on a number has one digit more

def _regular(names: Sequence[str]) -> Listing | None:
    "The listing of a folder whose names are all of the usual form; None otherwise"
    if not names or "RUN" not in names[0]: return None
    prefix = names[0][:names[0].rfind("RUN") + 3]
    text = "\n".join(names).replace(f".jpeg\n{prefix}", " ").removeprefix(prefix).removesuffix(".jpeg")
    all_digits = text.replace(" ", "")
    if not all_digits.isdecimal() or not all_digits.isascii() or "  " in f" {text} ": return None
    frames = np.fromstring(text, np.int64, sep=" ")
    if len(frames) != len(names): return None
    frames.sort()
    digits = 6*len(frames) - sum(np.searchsorted(frames, _POWERS).tolist())
    if digits != len(all_digits) or frames[0] < 1 or frames[-1] > _LAST_FRAME: return None # zeros in front, too
    return Listing(prefix[:-3], frames, {}, [], [prefix[:-3]])

def list_frames(
    folder: str | os.PathLike, # of one video in one plane
) -> Listing: # what is there
    "Pictures in the folder of a video"
    names = os.listdir(folder)
    if has_f0 := "F0" in names: names.remove("F0")
    if (found := _regular(names)) is not None: return found._replace(has_f0=has_f0)
    names.sort()
    numbers, strange, prefixes = {}, [], Counter()
    for name in names:
        m = _FRAME.fullmatch(name)
        if not m or not 1 <= int(m["n"]) <= _LAST_FRAME: strange.append(name)
        elif int(m["n"]) in numbers: strange.append(f"{name} (a second frame {int(m['n'])})")
        else:
            numbers[int(m["n"])] = name
            prefixes[m["prefix"]] += 1
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    other = {n: f for n, f in numbers.items() if f != f"{prefix}RUN{n}.jpeg"}
    return Listing(prefix, np.array(sorted(numbers), np.int64), other, strange, sorted(prefixes), has_f0)

# %%
with tmpdir() as d:
    for name in ("aRUN1.jpeg", "aRUN3.JPG", "aRUN010.jpeg", "aRUN10.jpeg", "cover.jpeg", "aRUN0.jpeg"):
        (d/name).touch()
    found = list_frames(d)
found

# %%
assert found.frames.tolist() == [1, 3, 10] and found.other == {3: "aRUN3.JPG", 10: "aRUN010.jpeg"}
assert found.strange == ["aRUN0.jpeg", "aRUN10.jpeg (a second frame 10)", "cover.jpeg"]
assert _regular(["aRUN2.jpeg", "aRUN10.jpeg"]).frames.tolist() == [2, 10]
assert _regular(["aRUN²2.jpeg"]) is None and _regular(["co12.jpeg"]) is None

# %% [markdown]
# ## The index
# A row for each frame that exists in any plane: its video, number, phase, time, and one bit a plane.

# %%
#| export
@dataclass(frozen=True)
class Video:
    "What is known about one embryo"
    name: str # name of its folder
    prefix: str # begin of its pictures' names
    parts: VideoName # couple, cycle, well
    grades: tuple[str, str] # TE and ICM: 'A', 'B', 'C' or 'NA'
    intervals: tuple[Interval, ...] # annotated phases, by first frame
    flags: tuple[str, ...] # of 'no_annotation', 'no_time', 'timeline_suspect'

@dataclass(frozen=True, eq=False)
class EmbryoIndex:
    "Every frame of a data set, as arrays with one row a frame; videos by name, frames ascending"
    root: Path # extracted data set
    planes: tuple[FocalPlane, ...] # that were looked at
    videos: tuple[Video, ...] # by name
    video: np.ndarray # (n,) int16, place in `videos`
    frame: np.ndarray # (n,) int16, RUN number
    phase: np.ndarray # (n,) int8, index of the phase, -1 where there is none
    time_h: np.ndarray # (n,) float32, since fertilisation [h], NaN where it is not known
    plane_bits: np.ndarray # (n,) uint8, bit k: plane of index k has this frame
    other: Mapping[str, str] = field(default_factory=dict) # 'plane/video/frame' -> file name of another form
    problems: tuple[Problem, ...] = () # what is odd

    def __len__(self) -> int: return len(self.frame)
    def __repr__(self) -> str:
        return f"EmbryoIndex({len(self.videos)} videos, {len(self)} frames, {'/'.join(p.pretty for p in self.planes)})"
    @property
    def names(self) -> list[str]: return [v.name for v in self.videos]
    @cached_property
    def _places(self) -> dict[str, int]: return {v.name: k for k, v in enumerate(self.videos)}
    @cached_property
    def _starts(self) -> list[int]: return np.searchsorted(self.video, np.arange(len(self.videos) + 1)).tolist()

    def place(
        self,
        video: str, # name
    ) -> int: # place in `videos`
        "Place of a video"
        if (k := self._places.get(video)) is not None: return k
        raise DataError(f"video {video!r} is not in {self.root}, which holds {len(self.videos)} videos, such as "
                        f"{', '.join(self.names[:3])}")

    def rows(
        self,
        video: str, # name
    ) -> slice: # of the arrays
        "Rows of a video"
        return slice(self._starts[k := self.place(video)], self._starts[k + 1])

    def path(
        self,
        plane: FocalPlane, # where it was focused
        video: str, # name
        frame: int, # RUN number
    ) -> Path: # of a picture
        "File of a frame"
        file = self.other.get(f"{plane.folder}/{video}/{frame}")
        name = file or f"{self.videos[self.place(video)].prefix}RUN{frame}.jpeg"
        return Path(f"{self.root}/{plane.folder}/{video}/{name}") # half the time of joining paths

    def has(
        self,
        plane: FocalPlane, # asked for
    ) -> np.ndarray: # (n,) bool
        "Which frames exist in a plane"
        return (self.plane_bits >> plane.idx() & 1).astype(bool)

    def counts(self) -> dict[str, int]: # phase -> frames, unlabelled ones under ''
        "Frames of every phase"
        n = np.bincount(self.phase.astype(np.int64) + 1, minlength=17)
        return {p.value: int(n[p.idx() + 1]) for p in Phase} | {"": int(n[0])}

    def by_video(self) -> dict[str, list[str]]: # video -> problems, only those that have any
        "What is odd, video by video"
        out: dict[str, list[str]] = {}
        for p in self.problems: out.setdefault(p.video, []).append(f"{p.kind}: {p.text}")
        return out

# %% [markdown]
# ## One video
# Frames of all planes are joined, tables are read, and whatever does not fit is told. A table that makes no sense
# leaves the video without labels; `strict=True` makes that, and every unexpected entry, an error. Two prefixes in one
# video are always one, because then nobody knows which pictures belong to this embryo.

# %%
#| export
def _ranges(numbers: np.ndarray) -> str:
    "Numbers as '3, 7-9, 12', shortened"
    if not len(numbers): return ""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    texts = [f"{p[0]}" if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]
    return ", ".join(texts[:6] + ([f"and {len(texts) - 6} more ranges"] if len(texts) > 6 else []))

def _frame_problems(lists: Mapping[FocalPlane, Listing], frames: np.ndarray) -> list[tuple[str, str]]:
    found = []
    for plane, one in lists.items():
        if one.strange:
            shown = ", ".join(map(repr, one.strange[:5]))
            found.append(("unexpected", f"{plane.pretty}: {len(one.strange)} entries are not frames: {shown}"))
        if one.other: found.append(("name", f"{plane.pretty}: {len(one.other)} names of another form, such as "
                                            f"{next(iter(one.other.values()))!r}"))
        lack = np.setdiff1d(frames, one.frames) if len(one.frames) < len(frames) else frames[:0]
        if len(lack): found.append(("plane", f"{plane.pretty}: lacks frames {_ranges(lack)} that other planes have"))
        if one.has_f0: found.append(("f0", f"{plane.pretty}: a folder F0 holds frames again"))
    if not len(frames): return [*found, ("empty", "holds no frame")]
    if frames[-1] - frames[0] >= len(frames):
        gaps = np.setdiff1d(np.arange(frames[0], frames[-1] + 1), frames)
        found.append(("gap", f"{len(gaps)} frames between {frames[0]} and {frames[-1]} do not exist: {_ranges(gaps)}"))
    if frames[0] > 1: found.append(("start", f"the first frame is {frames[0]}"))
    return found

def _table_problems(rows: Sequence[Interval], frames: np.ndarray, labels: np.ndarray) -> list[tuple[str, str]]:
    found = [("interval", text) for text in interval_problems(rows)]
    if rows and len(frames):
        last = max(r.last for r in rows)
        if last > frames[-1]: found.append(("beyond", f"annotated to frame {last}, the last picture is {frames[-1]}"))
        if labels.min() < 0: found.append(("unlabelled", f"{int((labels < 0).sum())} frames lie outside all "
                                                         f"intervals: {_ranges(frames[labels < 0])}"))
    return found

def _index_video(name: str, folders: Mapping[FocalPlane, Path], root: Path, has_times: bool,
                 grades: Mapping[str, tuple[str, str]]) -> tuple[Video, dict[str, Any], list[Problem], list[str]]:
    "One video: what is known, its rows, what is odd, and its prefixes"
    lists = {plane: list_frames(folder) for plane, folder in folders.items()}
    planes = [one.frames for one in lists.values()]
    same = all(np.array_equal(planes[0], f) for f in planes[1:])
    frames = planes[0] if same else np.unique(np.concatenate(planes))
    found, flags = _frame_problems(lists, frames), []
    intervals, times = [], (np.zeros(0, np.int64), np.zeros(0))
    try:
        intervals = read_phases(f"{root}/{ANNOTATIONS}/{name}_phases.csv")
        if not intervals: found.append(("no_annotation", "the annotation is empty"))
    except MissingFile: found.append(("no_annotation", "there is no annotation"))
    except AnnotationError as e: found.append(("bad_annotation", str(e)))
    try: times = read_times(root/TIMES/f"{name}_timeElapsed.csv") if has_times else times
    except MissingFile: found.append(("no_time", "there is no table of times"))
    except AnnotationError as e: found.append(("bad_time", str(e)))
    labels, hours = label_frames(frames, intervals), np.full(len(frames), np.nan, np.float32)
    if len(times[0]):
        at = np.searchsorted(times[0], frames)
        known = np.flatnonzero(at < len(times[0]))
        known = known[times[0][at[known]] == frames[known]]
        hours[known] = times[1][at[known]]
    found += _table_problems(intervals, frames, labels)
    if not intervals: flags.append("no_annotation")
    if not len(times[0]): flags.append("no_time")
    if len(frames) and is_on_another_clock(times[1], intervals, int(frames[-1])):
        flags.append("timeline_suspect")
        found.append(("timeline", "tables and pictures seem to run on different clocks"))
    bits = np.zeros(len(frames), np.uint8)
    for plane, one in lists.items():
        if len(one.frames) == len(frames): bits |= 1 << plane.idx()
        else: bits[np.searchsorted(frames, one.frames)] |= 1 << plane.idx()
    prefixes = sorted({p for one in lists.values() for p in one.prefixes})
    video = Video(name, prefixes[0] if prefixes else "", parse_video(name), grades.get(name, ("NA", "NA")),
                  tuple(intervals), tuple(flags))
    rows = {"frame": frames, "phase": labels, "time_h": hours, "plane_bits": bits,
            "other": {f"{p.folder}/{name}/{n}": f for p, one in lists.items() for n, f in one.other.items()}}
    return video, rows, [Problem(name, *f) for f in found], prefixes

# %% [markdown]
# ## All videos, and a cache
# Reading two million names takes seconds. The result is kept outside of the data set, keyed by the times of all folders
# and tables: whatever is added, removed or edited there makes it stale. A folder that was changed a moment ago is not
# cached at all, since a change in the same tick of the clock would go unseen. A damaged cache is made again.

# %%
#| export
_FORMAT = 1

def _cache_file(root: Path, planes: Sequence[FocalPlane], cache: bool | str | os.PathLike) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home()/".cache")/"medvol_nb" if cache is True else Path(cache)
    return base/f"embryo-{fingerprint([str(root.resolve()), [p.value for p in planes]])}.npz"

def _stamp(root: Path, folders: Mapping[str, Mapping[FocalPlane, Path]]) -> tuple[str, float]:
    "Fingerprint of everything that the index depends on, and the newest change [s]"
    seen: list[tuple] = [(_FORMAT,)]
    for f in {p.parent for v in folders.values() for p in v.values()}: seen.append((f.name, os.stat(f).st_mtime_ns))
    for v in folders.values(): seen += [(p.parent.name, p.name, os.stat(p).st_mtime_ns) for p in v.values()]
    for name in (ANNOTATIONS, TIMES):
        if not (root/name).is_dir(): continue
        with os.scandir(root/name) as it: seen += [(name, e.name, (s := e.stat()).st_mtime_ns, s.st_size) for e in it]
    if (root/GRADES).is_file(): seen.append((GRADES, (s := os.stat(root/GRADES)).st_mtime_ns, s.st_size))
    newest = max((t for row in seen for t in row[1:] if isinstance(t, int)), default=0)
    return fingerprint(sorted(map(repr, seen))), newest/1e9

def _save(path: Path, index: EmbryoIndex, stamp: str) -> None:
    table = [[v.name, v.prefix, list(v.grades), [[i.phase.value, i.first, i.last] for i in v.intervals], list(v.flags)]
             for v in index.videos]
    head = to_json({"stamp": stamp, "videos": table, "other": index.other, "problems": index.problems}, None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, sync=False) as t, open(t, "wb") as f:
            np.savez(f, head=np.frombuffer(head.encode(), np.uint8), **{k: getattr(index, k) for k in _COLUMNS})
    except (OSError, OutputExists) as e: log.warning("the index could not be cached: %s", e)

_COLUMNS = {"video": np.int16, "frame": np.int16, "phase": np.int8, "time_h": np.float32, "plane_bits": np.uint8}

def _load(path: Path, root: Path, planes: tuple[FocalPlane, ...], stamp: str) -> EmbryoIndex | None:
    "The cached index, or None if it is absent, stale or damaged"
    try:
        with np.load(path, allow_pickle=False) as z:
            head = parse_json(z["head"].tobytes().decode(), str(path))
            if head["stamp"] != stamp: return None
            columns = {k: z[k] for k in _COLUMNS}
        videos = tuple(Video(n, p, parse_video(n), tuple(g), tuple(Interval(Phase(a), b, c) for a, b, c in rows),
                             tuple(flags)) for n, p, g, rows, flags in head["videos"])
        if {k: a.dtype for k, a in columns.items()} != _COLUMNS or len({a.shape for a in columns.values()}) != 1:
            return None
        return EmbryoIndex(root, planes, videos, **columns, other=head["other"],
                           problems=tuple(Problem(*p) for p in head["problems"]))
    except FileNotFoundError: return None
    except Exception as e: # whatever a damaged archive makes NumPy raise: the index is read anew
        log.warning("the cached index %s is damaged (%s) and is made again", path, e)
        return None

def _find(root: Path, planes: Sequence[FocalPlane]) -> tuple[dict[str, dict[FocalPlane, Path]], list[Problem]]:
    "Folders of every video in every plane, by name"
    folders: dict[str, dict[FocalPlane, Path]] = {}
    odd = []
    for plane in planes:
        with os.scandir(root/plane.folder) as entries:
            for e in entries:
                if e.is_dir(): folders.setdefault(e.name, {})[plane] = Path(e.path)
                else: odd.append(Problem("", "unexpected", f"{plane.folder}/{e.name} is not the folder of a video"))
    for name, found in folders.items():
        if lack := [p.pretty for p in planes if p not in found]:
            odd.append(Problem(name, "plane", f"has no folder in {', '.join(lack)}"))
    return dict(sorted(folders.items())), sorted(odd)

def build_index(
    root: str | os.PathLike, # extracted data set
    planes: Sequence[str | FocalPlane] | None = None, # planes to look at; None: those that are there
    cache: bool | str | os.PathLike = True, # keep the result: True in the user's cache, a folder, or False
    *,
    strict: bool = False, # tables and entries that make no sense are errors instead of problems in the list
) -> EmbryoIndex: # one row a frame
    "Find every frame of a data set, with its phase and time, and everything that is odd about it"
    root = Path(root)
    if not root.is_dir(): raise MissingFile(f"data set {root} is not a folder")
    chosen = parse_planes(planes, [p for p in FocalPlane if (root/p.folder).is_dir()])
    if lack := [p.folder for p in chosen if not (root/p.folder).is_dir()]:
        raise MissingFile(f"data set {root} lacks {', '.join(lack)}")
    if not chosen: raise MissingFile(f"data set {root} holds none of {', '.join(p.folder for p in FocalPlane)}")
    folders, problems = _find(root, chosen)
    if len(folders) > _LAST_FRAME: raise DataError(f"data set {root}: {len(folders)} videos, at most {_LAST_FRAME}")
    stamp, newest = _stamp(root, folders) if cache is not False else ("", 0.0)
    start, file = time.time(), _cache_file(root, chosen, cache) if cache is not False else None
    index = _load(file, root, tuple(chosen), stamp) if file else None
    if index is None:
        index = _build(root, tuple(chosen), folders, problems)
        if file and newest < start - 0.05: _save(file, index, stamp)
    wrong = ("bad_annotation", "bad_time", "bad_grades", "unexpected")
    if strict and (bad := [p for p in index.problems if p.kind in wrong]):
        text = "; ".join(f"{p.video}: {p.text}" if p.video else p.text for p in bad[:5])
        raise AnnotationError(f"{len(bad)} problems in {root}: {text}")
    return index

def _build(root: Path, planes: tuple[FocalPlane, ...], folders: Mapping[str, Mapping[FocalPlane, Path]],
           problems: list[Problem]) -> EmbryoIndex:
    grades: dict[str, tuple[str, str]] = {}
    if (root/GRADES).is_file():
        try: grades = read_grades(root/GRADES)
        except AnnotationError as e: problems.append(Problem("", "bad_grades", str(e)))
    else: problems.append(Problem("", "no_grades", f"there is no {GRADES}"))
    has_times = (root/TIMES).is_dir()
    if not has_times: problems.append(Problem("", "no_time", f"there is no folder {TIMES}"))
    done, torn = [], []
    for name, where in progress(folders.items(), "index", total=len(folders)):
        done.append(_index_video(name, where, root, has_times, grades))
        if len(done[-1][3]) > 1: torn.append(f"{name}: {' and '.join(map(repr, done[-1][3][:3]))}")
    if torn: raise DataError(f"{len(torn)} videos hold frames of two recordings, told by their prefix: "
                             f"{'; '.join(torn[:5])}. Move one of them out of {root}")
    with contextlib.suppress(FileNotFoundError):
        known = {n.removesuffix("_phases.csv") for n in os.listdir(root/ANNOTATIONS)}
        if alone := sorted(known - set(folders)):
            problems.append(Problem("", "no_video", f"{len(alone)} annotations have no video, such as {alone[0]}"))
    sizes = [len(rows["frame"]) for _, rows, _, _ in done]
    columns = {k: np.concatenate([rows[k] for _, rows, _, _ in done] or [[]]).astype(_COLUMNS[k])
               for k in _COLUMNS if k != "video"}
    return EmbryoIndex(root, planes, tuple(v for v, _, _, _ in done),
                       np.repeat(np.arange(len(done)), sizes).astype(np.int16), **columns,
                       other={k: f for _, rows, _, _ in done for k, f in rows["other"].items()},
                       problems=tuple([*problems, *(p for _, _, found, _ in done for p in found)]))

# %%
with tmpdir() as d:
    make_phantom_dataset(d/"tree", 6, 30, ["F+00", "F15"], 24,
                         defects=["f0", "missing_frames", "no_annotation", "overlap", "beyond", "stray"])
    index = build_index(d/"tree", cache=d/"cache")
    again = build_index(d/"tree", cache=d/"cache")
print(*(f"{v}: {'; '.join(t)}" for v, t in index.by_video().items()), sep="\n")
index

# %%
assert len(index) == 180 and index.has(FocalPlane.F15).sum() == 174 and again.problems == index.problems
assert all(np.array_equal(getattr(again, k), getattr(index, k), equal_nan=k == "time_h") for k in _COLUMNS)
assert [v.name for v in index.videos if "no_annotation" in v.flags] == ["BM016-5"]
assert index.path(FocalPlane.F15, "UL050-_9", 7).name.endswith("RUN7.jpeg")

# %%
fig, ax = plt.subplots(figsize=(7, 2.2), layout="constrained")
ax.imshow([index.phase[index.rows(n)] for n in index.names], aspect="auto", cmap="viridis", vmin=-1, vmax=15)
ax.set_yticks(range(len(index.names)), index.names, fontsize=7)
_ = ax.set_title("phase of every frame (darkest: none)", fontsize=9)

# %%
with tmpdir() as d:
    make_phantom_dataset(d/"tree", 1, 6, ["F+00"], 24)
    with raises(MissingFile, match="lacks embryo_dataset_F15"): build_index(d/"tree", ["F+15"], cache=False)
    (d/"tree"/"embryo_dataset"/"AA83-7"/"otherRUN9.jpeg").touch()
    with raises(DataError, match="two recordings.*AA83-7: 'D2013.*'other'"): build_index(d/"tree", cache=False)
    with raises(DataError, match="'XX1-1' is not in"): index.place("XX1-1")

# %% [markdown]
# ## Folders that are there twice
# In 211 videos of the central plane a folder `F0` holds the same pictures again. It is removed only if every name and
# every byte is the same; anything else is told and left alone. The folder gets another name first, so that a removal
# that is interrupted leaves nothing that looks like data.

# %%
#| export
def _same_bytes(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()

def remove_f0_duplicates(
    root: str | os.PathLike, # extracted data set
    dry_run: bool = True, # compare and tell, remove nothing
) -> dict[str, Any]: # 'removed' (or what would be), 'kept' with reasons, 'bytes' freed
    "Remove folders F0 that repeat the frames of their video"
    removed, kept, size = [], {}, 0
    top = Path(root)/FocalPlane.F0.folder
    if not top.is_dir(): raise MissingFile(f"data set {root} lacks {FocalPlane.F0.folder}")
    for folder in progress(sorted(p for p in top.iterdir() if p.is_dir()), "compare F0"):
        if not dry_run: sweep_temporary(folder)
        twice = folder/"F0"
        if not twice.is_dir() or twice.is_symlink(): continue
        ours = {p.name for p in folder.iterdir() if p.is_file()}
        theirs = {p.name: p for p in twice.iterdir()}
        if ours != theirs.keys():
            only = sorted(ours ^ theirs.keys())
            kept[folder.name] = f"{len(only)} names are in one folder only, such as {only[0]}"
        elif different := [n for n, p in theirs.items() if p.is_symlink() or not p.is_file()
                           or not _same_bytes(p, folder/n)]:
            kept[folder.name] = f"{len(different)} files differ, such as {sorted(different)[0]}"
        else:
            removed.append(folder.name)
            size += sum(p.stat().st_size for p in theirs.values())
            if not dry_run:
                temp = _temp_for(twice)
                os.rename(twice, temp)
                remove_tree(temp)
    return {"removed": removed, "kept": kept, "bytes": size, "dry_run": dry_run}

# %%
with tmpdir() as d:
    make_phantom_dataset(d/"tree", 2, 6, ["F+00"], 24, defects=["f0", "f0"])
    torn = next((d/"tree"/"embryo_dataset"/"AA83-9"/"F0").iterdir())
    torn.write_bytes(torn.read_bytes()[:-1])
    plan, left = remove_f0_duplicates(d/"tree"), len(list(d.rglob("F0")))
    done = remove_f0_duplicates(d/"tree", dry_run=False)
    folders = [p.parent.name for p in d.rglob("F0")]
plan, left, folders

# %%
assert plan["removed"] == done["removed"] == ["AA83-7"] and left == 2 and folders == ["AA83-9"]
assert "1 files differ" in done["kept"]["AA83-9"]
