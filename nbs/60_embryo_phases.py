# %% [markdown]
# # Embryo phases, focal planes and tables
#
# > The words of the time-lapse data set: planes, phases, who is whose sibling, which frame is which phase, prompts.
#
# 704 embryos were filmed through seven focal planes until an embryologist could name sixteen events, from the second
# polar body to the hatching blastocyst (Gomez et al., *Data in Brief* 42, 108258, 2022). The tables that tell which
# frame shows which phase are small and easy to misread: both ends of an interval belong to it, frame 1 has the number
# 1, grades hold the word `NA`, and some tables go on for hundreds of frames after the last picture. A published reader
# loses the first frame of every phase but the first one, and with it every phase that lasts a single frame. The rules
# live on this page, in functions of a few lines, so that they can be checked one by one.

# %%
#| default_exp embryo.phases

# %%
#| export
import enum
import itertools
import operator
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medvol_nb.core import ConfigError, DataError, FormatError, _read_text, read_csv

# %%
from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## Phases and planes
# The order of both is their index, and the index is what models see. A plane has three spellings: the ending of its
# folder, the form used in labels and prompts, and its offset in micrometres. `parse` takes them all.

# %%
#| export
class _Listed(enum.Enum):
    "An enumeration whose order counts"
    def __init__(
        self,
        value: str, # as written in files
    ):
        self._idx = len(type(self).__members__)
    def idx(self) -> int: return self._idx # place, from 0
    @classmethod
    def from_idx(cls, i: int) -> "_Listed":
        if not 0 <= i < len(cls): raise DataError(f"{cls.__name__}: index must be 0...{len(cls) - 1}, got {i}")
        return list(cls)[i]
    @classmethod
    def all_indices(cls) -> list[int]: return list(range(len(cls)))
    @classmethod
    def from_indices(cls, indices: Iterable[int]) -> list["_Listed"]: return [cls.from_idx(i) for i in indices]

class Phase(_Listed):
    "What an embryologist can name; the value is the label in tables, upper and lower case as published"
    tPB2 = "tPB2" # second polar body is out
    tPNa = "tPNa" # pronuclei appear
    tPNf = "tPNf" # pronuclei fade
    t2 = "t2" # cells
    t3 = "t3"
    t4 = "t4"
    t5 = "t5"
    t6 = "t6"
    t7 = "t7"
    t8 = "t8"
    t9 = "t9+" # nine or more
    tM = "tM" # morula
    tSB = "tSB" # blastulation starts
    tB = "tB" # blastocyst
    tEB = "tEB" # expanded blastocyst
    tHB = "tHB" # hatching blastocyst

    @classmethod
    def parse(cls, text: "str | Phase") -> "Phase":
        "The phase of a label, or an error that lists them"
        try: return cls(text)
        except ValueError: raise ConfigError(f"phase: must be one of {', '.join(PHASES)}, got {text!r}") from None

PHASES = tuple(p.value for p in Phase)

class FocalPlane(_Listed):
    "Where the microscope was focused; the value is the ending of the plane's folder"
    Fm45 = "_F-45"
    Fm30 = "_F-30"
    Fm15 = "_F-15"
    F0 = ""
    F15 = "_F15"
    F30 = "_F30"
    F45 = "_F45"

    @property
    def offset(self) -> int: return int(self.value[2:] or 0) # from the central plane [micrometre]
    @property
    def pretty(self) -> str: return f"F{self.offset:+03d}" # such as 'F-45', 'F+00', 'F+15'
    @property
    def folder(self) -> str: return f"embryo_dataset{self.value}" # name of its folder

    @classmethod
    def parse(cls, given: "str | int | FocalPlane") -> "FocalPlane":
        "The plane of a folder ending, folder name, label form such as 'F+15' or 'F15', or offset in micrometres"
        if isinstance(given, cls): return given
        text = str(given).strip()
        if text in _PLANE_OF: return _PLANE_OF[text]
        m = re.fullmatch(r"_?F?([+-]?\d{1,2})", text.removeprefix("embryo_dataset"))
        if m and int(m[1]) in (offsets := {p.offset: p for p in cls}): return offsets[int(m[1])]
        raise ConfigError(f"focal plane: must be one of {', '.join(p.pretty for p in cls)}, got {given!r}")

_PLANE_OF = {p.value: p for p in FocalPlane} | {p.folder: p for p in FocalPlane}

# %%
[(p.idx(), p.value, p.pretty, p.offset) for p in FocalPlane], Phase.from_indices([0, 10, 15])

# %%
for plane in FocalPlane:
    for spelling in (plane.value, plane.pretty, plane.folder, plane.offset, f"F{plane.offset}", str(plane.offset)):
        assert FocalPlane.parse(spelling) is plane
assert len(Phase) == 16 and [p.idx() for p in Phase] == Phase.all_indices() and Phase("t9+").idx() == 10
assert [p.offset for p in FocalPlane] == [-45, -30, -15, 0, 15, 30, 45]

# %%
with raises(ConfigError, match="must be one of tPB2.*got 'tpb2'"): Phase.parse("tpb2")
with raises(ConfigError, match="F-45, F-30.*got 'F20'"): FocalPlane.parse("F20")

# %% [markdown]
# ## What lies where
# Ten downloads, ten entries once they are unpacked. The licence goes wherever the data go.

# %%
#| export
ANNOTATIONS, TIMES, GRADES = "embryo_dataset_annotations", "embryo_dataset_time_elapsed", "embryo_dataset_grades.csv"
DATA_LICENCE = ("Human embryo time-lapse video dataset, Gomez et al., Data in Brief 42, 108258 (2022), "
                "doi:10.5281/zenodo.6390798, CC BY-NC-SA 4.0: attribution, non-commercial, share alike; "
                "the same holds for images and weights derived from it")

def archive_names(
    planes: Iterable[FocalPlane] | None = None, # planes wanted; None: all seven
) -> list[str]: # file names of the downloads
    "Downloads that hold these planes and the three tables"
    folders = [p.folder for p in (FocalPlane if planes is None else planes)]
    return [f"{f}.tar.gz" for f in [*folders, ANNOTATIONS, TIMES]] + [GRADES]

def parse_planes(
    planes: Sequence[str | int | FocalPlane] | str | None, # planes in any spelling, 'all', or None
    default: Sequence[FocalPlane] = tuple(FocalPlane), # what None means
) -> list[FocalPlane]: # in the given order, each once
    "Planes that a user asked for"
    if planes is None: return list(default)
    given = [planes] if isinstance(planes, (str, int, FocalPlane)) else list(planes)
    if "all" in given:
        if len(given) > 1: raise ConfigError(f"planes: 'all' stands alone, got {given}")
        return list(FocalPlane)
    if not given: raise ConfigError("planes: at least one is needed, got none")
    found = [FocalPlane.parse(p) for p in given]
    if len(set(found)) < len(found): raise ConfigError(f"planes: {[p.pretty for p in found]} names one twice")
    return found

# %%
archive_names()

# %%
assert len(archive_names()) == 10 and archive_names([FocalPlane.F0])[0] == "embryo_dataset.tar.gz"
with raises(ConfigError, match="'all' stands alone"): parse_planes(["all", "F0"])

# %% [markdown]
# ## Names
# A video is named after the couple, perhaps the cycle, and the well: `BM016-5`, `MM445-2-9`. Siblings resemble each
# other, so the couple decides what may be split. Four names have an underscore (`UL050-_9`), which breaks whoever
# splits a frame's label `F+00_UL050-_9_146` at every underscore: the plane ends at the first, the frame begins after
# the last.

# %%
#| export
class VideoName(NamedTuple):
    "What the name of a video says"
    couple: str # code of the couple; siblings share it
    cycle: str # treatment cycle, often empty
    well: str # well of the dish

def parse_video(
    name: str, # such as 'MM445-2-9'
) -> VideoName: # its parts; a name of another form is its own couple
    "Couple, cycle and well of a video"
    head, *rest = name.split("-")
    code = re.match(r"[A-Z]+\d+", head)
    return VideoName(code[0] if code else head, "-".join(rest[:-1]), rest[-1] if rest else "")

def frame_label(
    plane: FocalPlane, # where it was focused
    video: str, # name of the video
    frame: int, # RUN number
) -> str: # such as 'F+00_BM016-5_146'
    "Identifier of one picture"
    return f"{plane.pretty}_{video}_{frame}"

def parse_label(
    label: str, # such as 'F+00_BM016-5_146'
) -> tuple[FocalPlane, str, int]: # plane, video, frame
    "Plane, video and frame of an identifier"
    m = re.fullmatch(r"([^_]*)_(.+)_(\d+)", label, re.DOTALL)
    if not m: raise DataError(f"label {label!r}: must be PLANE_VIDEO_FRAME, such as 'F+00_BM016-5_146'")
    return FocalPlane.parse(m[1]), m[2], int(m[3])

# %%
[parse_video(v) for v in ("AA83-7", "PMDPI029-1-10", "RV146N2-6", "MRA165-7T", "UL050-_9")]

# %%
for name in ("BM016-5", "UL050-_10", "RG434-_10", "MM445-2-9"):
    label = frame_label(FocalPlane.Fm15, name, 146)
    assert parse_label(label) == (FocalPlane.Fm15, name, 146)
with raises(DataError, match="PLANE_VIDEO_FRAME"): parse_label("F+00-BM016-5")

# %% [markdown]
# ## From intervals to labels
# An annotation file has no header and three columns: phase, first frame, last frame, both ends included. The phase of
# frame $n$ is the one whose interval holds $n$; outside all intervals there is none (-1). A phase may come twice. Where
# two overlap, the one that starts later wins from its start on; overlaps and gaps are reported, never repaired. A line
# that makes no sense spoils the file, because nobody knows what was meant; every such line is told.

# %%
#| export
class AnnotationError(DataError):
    "A table of a video cannot be trusted; the message names file and lines"

class Interval(NamedTuple):
    "Frames of one phase"
    phase: Phase # what is seen
    first: int # RUN number
    last: int # RUN number, included

_PHASE_OF, _INTEGER = {p.value: p for p in Phase}, re.compile("[+-]?[0-9]{1,9}")
_USUAL = re.compile(r"([a-zA-Z0-9+]+),([0-9]{1,9}),([0-9]{1,9})\n") # a line as all published tables have them
_first = operator.itemgetter(1)
_TABLE_BYTES = 2**20 # a table of one video is far smaller

def _interval(row: Sequence[str]) -> Interval:
    if len(row) != 3: raise ValueError(f"{len(row)} fields, phase,first,last are needed")
    if row[0] not in _PHASE_OF: raise ValueError(f"phase {row[0]!r} is not one of {', '.join(PHASES)}")
    numbers = []
    for what, text in zip(("first", "last"), row[1:]):
        if not _INTEGER.fullmatch(text): raise ValueError(f"{what} frame {text!r} is not a number")
        numbers.append(int(text))
    if numbers[0] > numbers[1]: raise ValueError(f"first frame {numbers[0]} comes after last frame {numbers[1]}")
    return Interval(_PHASE_OF[row[0]], *numbers)

def _usual_table(text: str) -> list[Interval] | None:
    "The table if nothing about it is unusual; a data set has hundreds of them"
    text = text.replace("\r\n", "\n") + "\n"*(text[-1:] not in ("", "\n"))
    rows = _USUAL.findall(text)
    if len(rows) != text.count("\n") or sum(len(a) + len(b) + len(c) + 3 for a, b, c in rows) != len(text): return None
    try: found = [Interval(_PHASE_OF[name], int(first), int(last)) for name, first, last in rows]
    except KeyError: return None
    if any(first > last for _, first, last in found): return None
    return sorted(found, key=_first)

def read_phases(
    path: str | os.PathLike, # '<video>_phases.csv'
) -> list[Interval]: # sorted by first frame; empty for an empty file
    "Read the annotated phases of a video"
    found, wrong = [], []
    try: text = _read_text(path, _TABLE_BYTES)
    except FormatError as e: raise AnnotationError(str(e)) from None
    if (usual := _usual_table(text)) is not None: return usual
    for n, line in enumerate(text.splitlines(), 1):
        if not line.strip(): continue
        try: found.append(_interval([c.strip() for c in line.split(",")]))
        except ValueError as e: wrong.append(f"line {n}: {e}")
    if wrong: raise AnnotationError(f"{path}, {'; '.join(wrong[:8])}. Correct the file; none of its lines is used")
    return sorted(found, key=_first)

def label_frames(
    frames: np.ndarray, # (n,) integer, RUN numbers, ascending
    intervals: Sequence[Interval], # of the video
) -> np.ndarray: # (n,) int8, index of the phase, -1 where there is none
    "Phase of every frame"
    out, rows = np.full(len(frames), -1, np.int8), sorted(intervals, key=_first)
    at = np.searchsorted(frames, [n for _, first, last in rows for n in (first, last + 1)]).tolist()
    for (phase, _, _), a, b in zip(rows, at[::2], at[1::2]): out[a:b] = phase._idx
    return out

def interval_problems(
    intervals: Sequence[Interval], # of one video
) -> list[str]: # one line each
    "Overlaps, gaps, repetitions and phases out of order"
    rows, found = sorted(intervals, key=_first), []
    if all(p._idx < q._idx and first == last + 1 for (p, _, last), (q, first, _) in itertools.pairwise(rows)): return []
    for a, b in itertools.pairwise(rows):
        if b.first <= a.last:
            both = f"{b.first}" if min(a.last, b.last) == b.first else f"{b.first}-{min(a.last, b.last)}"
            found.append(f"{a.phase.value} and {b.phase.value} overlap in frames {both}; {b.phase.value} wins")
        elif b.first > a.last + 1: found.append(f"frames {a.last + 1}-{b.first - 1} between {a.phase.value} and "
                                                f"{b.phase.value} have no phase")
        if b.phase._idx < a.phase._idx: found.append(f"{b.phase.value} comes after {a.phase.value}")
    seen = [r.phase._idx for r in rows]
    return found + [f"{PHASES[k]} has several intervals" for k in sorted(set(seen)) if seen.count(k) > 1]

# %% [markdown]
# The published reader finds the first frame of a phase with the wrong side of a bisection. On four intervals over 24
# frames it loses three frames and a whole phase:

# %%
def published(frames, intervals):
    import bisect
    out = {}
    for n in frames:
        k = bisect.bisect_right([i.first for i in intervals], n - (n > intervals[0].first)) - 1
        if 0 <= k < len(intervals) and n <= intervals[k].last: out.setdefault(intervals[k].phase.value, []).append(n)
    return out

rows = [Interval(Phase.tPNf, 5, 9), Interval(Phase.t2, 10, 14), Interval(Phase.t3, 15, 15), Interval(Phase.t4, 16, 20)]
labels = label_frames(np.arange(1, 25), rows)
ours = {p.value: (np.flatnonzero(labels == p.idx()) + 1).tolist() for p in (r.phase for r in rows)}
ours, published(range(1, 25), rows)

# %%
assert ours == {"tPNf": [5, 6, 7, 8, 9], "t2": [10, 11, 12, 13, 14], "t3": [15], "t4": [16, 17, 18, 19, 20]}
assert label_frames(np.array([3, 5, 10, 21]), rows).tolist() == [-1, 2, 3, -1]
nested = [Interval(Phase.t2, 1, 10), Interval(Phase.t3, 4, 6)]
assert label_frames(np.arange(1, 12), nested).tolist() == [3]*3 + [4]*3 + [3]*4 + [-1]
assert interval_problems(nested) == ["t2 and t3 overlap in frames 4-6; t3 wins"] and interval_problems(rows) == []

# %%
with tmpdir() as d:
    (d/"a.csv").write_bytes(b"\xef\xbb\xbftPNf,5,9\r\n\r\nt2,10,14\r\n")
    assert read_phases(d/"a.csv") == rows[:2]
    (d/"b.csv").write_text("tPNf,9,5\nt2,10,x\nt17,1,2\n")
    with raises(AnnotationError, match="line 1: first frame 9.*line 2: last frame 'x'.*line 3: phase 't17'"):
        read_phases(d/"b.csv")

# %% [markdown]
# ## Times and grades
# Times are hours since fertilisation, one line a frame; frame 0 has no picture. Grades of trophectoderm (TE) and inner
# cell mass (ICM) are A, B, C or the word `NA`, which must stay a word.

# %%
#| export
def read_times(
    path: str | os.PathLike, # '<video>_timeElapsed.csv'
) -> tuple[np.ndarray, np.ndarray]: # (n,) int64 frames, ascending, and (n,) float64 hours; frame 0 is left out
    "Read when the frames of a video were taken [h]"
    hours = {}
    try: rows = read_csv(path, ("frame_index", "time"), _TABLE_BYTES)
    except FormatError as e: raise AnnotationError(str(e)) from None
    for n, row in enumerate(rows, 2):
        try: frame, time = int(row["frame_index"]), float(row["time"])
        except ValueError: raise AnnotationError(f"{path}, row {n}: frame and hours are needed, got {row}") from None
        if not np.isfinite(time): raise AnnotationError(f"{path}, row {n}: {row['time']!r} is not a time")
        if frame in hours: raise AnnotationError(f"{path}, row {n}: frame {frame} has a second time")
        hours[frame] = time
    frames = np.array(sorted(f for f in hours if f > 0), np.int64)
    return frames, np.array([hours[f] for f in frames.tolist()], np.float64)

def read_grades(
    path: str | os.PathLike, # 'embryo_dataset_grades.csv'
) -> dict[str, tuple[str, str]]: # video -> (TE, ICM), each 'A', 'B', 'C' or 'NA'
    "Read the grades of all videos"
    out: dict[str, tuple[str, str]] = {}
    for n, row in enumerate(read_csv(path, ("video_name", "TE", "ICM")), 2):
        name, grades = row["video_name"].strip(), (row["TE"].strip(), row["ICM"].strip())
        if name in out: raise AnnotationError(f"{path}, row {n}: video {name!r} comes a second time")
        if not set(grades) <= {"A", "B", "C", "NA"}:
            raise AnnotationError(f"{path}, row {n}: grades must be A, B, C or NA, got {grades}")
        out[name] = grades
    return out

# %% [markdown]
# In some forty videos the tables run on another clock than the pictures: the times are an exact grid of 0.2 h, or the
# annotation ends long after the last picture. There, frame $n$ of the table is not picture $n$, and no reader can tell
# which one it is. `is_on_another_clock` marks them, so that they can be left out.

# %%
#| export
def is_on_another_clock(
    hours: np.ndarray, # (n,) times of the frames [h]; may be empty
    intervals: Sequence[Interval], # annotated phases
    last_image: int, # RUN number of the last picture
) -> bool: # True: table and pictures do not belong together frame by frame
    "Whether the tables of a video look like those of another frame rate"
    if max((i.last for i in intervals), default=0) > last_image + 3: return True
    steps = np.diff(np.asarray(hours, np.float64)) if len(hours) > 1 else np.zeros(0)
    steps = steps[steps > 0]
    return bool(len(steps)) and float(np.mean(np.round(steps, 2) == 0.2)) >= 0.95

# %%
rng = np.linspace(0.21, 0.33, 40)
is_on_another_clock(np.cumsum(rng), rows, 20), is_on_another_clock(0.2*np.arange(40), [], 40)

# %%
assert not is_on_another_clock(np.cumsum(rng), rows, 17) and is_on_another_clock([], rows, 16)
with tmpdir() as d:
    (d/"t.csv").write_text("frame_index,time\n0,0\n1,17.5\n2,17.7\n")
    (d/"g.csv").write_text("video_name,TE,ICM\nAA83-7,A,NA\n")
    assert [a.tolist() for a in read_times(d/"t.csv")] == [[1, 2], [17.5, 17.7]]
    assert read_grades(d/"g.csv") == {"AA83-7": ("A", "NA")}
    (d/"g.csv").write_text("video_name,TE,ICM\nAA83-7,A,nan\n")
    with raises(AnnotationError, match="must be A, B, C or NA"): read_grades(d/"g.csv")

# %% [markdown]
# ## One grammar for prompts
# Six sentences for the same thing are in the published scripts, and a text encoder takes words literally: a model
# trained on one and asked with another has lost its condition. So there is one template, and what a model was trained
# with is stored with it. The clause in square brackets appears if more than one plane is in play.

# %%
#| export
BASE_PROMPT = "a grayscale microscopic image of a human embryo" # of class images, for prior preservation
PROMPT = BASE_PROMPT + " at phase {phase}[ recorded at focal plane {focal_plane}]"
LEGACY_PROMPTS = tuple(f"{base} at phase {{phase}}[ recorded at focal plane {{focal_plane}}]" for base in (
    "a microscopic image of a human embryo", "a microscopic image of human embryo",
    "a grayscale microscopic image of human embryo", "grayscale microscopic image of a human embryo"))

@dataclass(frozen=True)
class PromptTemplate:
    "Sentence with the places {phase} and {focal_plane}, and at most one clause in [square brackets]"
    text: str = PROMPT # the sentence
    plane: str | bool = "auto" # clause in brackets: True, False, or 'auto' if more than one plane is in play

    def __post_init__(self):
        if self.plane not in ("auto", True, False):
            raise ConfigError(f"prompt: plane must be 'auto', True or False, got {self.plane!r}")
        if "\0" in self.text or not self.text.strip(): raise ConfigError(f"prompt: {self.text!r} is not a sentence")
        if wrong := [w for w in re.findall(r"\{[^{}]*\}?|\}", self.text) if w not in ("{phase}", "{focal_plane}")]:
            raise ConfigError(f"prompt {self.text!r}: only {{phase}} and {{focal_plane}} may stand in braces, got "
                              f"{', '.join(wrong)}")
        if not re.fullmatch(r"[^\[\]]*(\[[^\[\]]*\][^\[\]]*)?", self.text):
            raise ConfigError(f"prompt {self.text!r}: at most one clause in [square brackets] is understood")

    def _plain(self, clause: bool) -> str: return re.sub(r"\[(.*?)\]", r"\1" if clause else "", self.text, flags=re.S)

    def format(
        self,
        phase: Phase | str, # what is shown
        plane: FocalPlane | str | None = None, # where it was focused; None: not told
        n_planes: int = 1, # planes in play, for 'auto'
    ) -> str: # the prompt
        "The sentence for one phase and plane"
        wanted = self.plane is True or (self.plane == "auto" and n_planes > 1)
        text = self._plain(wanted)
        if "{focal_plane}" in text and plane is None:
            raise ConfigError(f"prompt {self.text!r}: needs a focal plane, got none")
        focal = "" if plane is None else FocalPlane.parse(plane).pretty
        return text.replace("{focal_plane}", focal).replace("{phase}", Phase.parse(phase).value)

    def parse(
        self,
        prompt: str, # made by `format`
    ) -> tuple[Phase | None, FocalPlane | None] | None: # None: another sentence
        "Phase and plane of a prompt"
        words = {"phase": PHASES, "focal_plane": [p.pretty for p in FocalPlane]}
        for text in (self._plain(True), self._plain(False)):
            pattern, seen = "", set()
            for part in re.split(r"(\{phase\}|\{focal_plane\})", text):
                name = part[1:-1] if part in ("{phase}", "{focal_plane}") else ""
                if name in seen: pattern += f"(?P={name})"
                elif name: pattern += f"(?P<{name}>{'|'.join(map(re.escape, words[name]))})"
                else: pattern += re.escape(part)
                seen |= {name} - {""}
            if m := re.fullmatch(pattern, prompt):
                got = m.groupdict()
                return (Phase(got["phase"]) if got.get("phase") else None,
                        FocalPlane.parse(got["focal_plane"]) if got.get("focal_plane") else None)
        return None

def parse_prompt(
    prompt: str, # a sentence of the grammar, or one of the published ones
) -> tuple[Phase, FocalPlane | None]: # what it asks for
    "Phase and plane of a prompt of the known forms"
    for text in (PROMPT, *LEGACY_PROMPTS):
        if found := PromptTemplate(text).parse(prompt): return found
    raise ConfigError(f"prompt {prompt!r}: is not of the form {PROMPT!r}, nor a published one")

# %%
one = PromptTemplate()
one.format("t9+"), one.format("tM", "F-15", n_planes=7)

# %%
for template in (PROMPT, *LEGACY_PROMPTS):
    for phase in Phase:
        for plane, n in ((None, 1), (FocalPlane.F30, 2)):
            assert parse_prompt(PromptTemplate(template).format(phase, plane, n)) == (phase, plane)
assert PromptTemplate("{phase}, seen in {focal_plane}").parse("t2, seen in F+15") == (Phase.t2, FocalPlane.F15)
assert PromptTemplate(plane=False).format("t2", "F0", 7) == BASE_PROMPT + " at phase t2"

# %%
with raises(ConfigError, match="only {phase}.*{class}"): PromptTemplate("an embryo of {class}")
with raises(ConfigError, match="is not of the form"): parse_prompt("a photograph of an embryo at phase t2")
