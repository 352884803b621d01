# %% [markdown]
# # Embryo frames
#
# > Pictures with phase, plane, video, number and time; focal stacks and videos as volumes; checks of the pictures.
#
# A training loop wants `len` and `[i]`; an analyst wants the seven planes of a moment as a volume, or a video. Both
# read the same files, and both must know what to do with a file that is cut off. The published loader tells Pillow,
# for the whole process, to decode cut files without a word, so 52 videos of half pictures train along. Here a cut file
# is an error, unless the caller decides to leave such frames out or to have them padded and marked.

# %%
#| default_exp embryo.dataset

# %%
#| export
import io
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from medvol_nb.core import (ConfigError, DataError, FormatError, MissingFile, OnExists, check_output, log, progress,
                            write_csv)
from medvol_nb.embryo.index import EmbryoIndex, Problem, build_index
from medvol_nb.embryo.phases import FocalPlane, Phase, frame_label, parse_planes

if TYPE_CHECKING: from medvol_nb.geometry import Volume

# %%
import tempfile

from medvol_nb.core import close, raises, tmpdir
from medvol_nb.embryo.phantom import jpeg_bytes, make_phantom_dataset, phantom
from medvol_nb.plot import montage

# %% [markdown]
# ## One picture
# Grey, or colour with equal channels. The end of the file is looked at before anything is decoded: a whole JPEG ends
# with its end mark. Sizes are read from the header and bounded before memory is asked for. Asked for a smaller picture,
# the decoder leaves out the fine frequencies, which nearly halves its time.

# %%
#| export
_MAX_FILE, _MAX_PIXELS = 2**26, 2**24
_PATIENT = threading.Lock() # Pillow's switch for cut files belongs to the whole process

def is_whole_jpeg(
    start: bytes, # first two bytes of a file, or more
    end: bytes, # its last 32 bytes
) -> bool: # starts with the start mark, ends with the end mark
    "Whether a JPEG file was written to its end"
    return start[:2] == b"\xff\xd8" and b"\xff\xd9" in end[-32:]

def _decoded(data: bytes, size: int | None, mode: str, where: str) -> np.ndarray:
    from PIL import Image
    try: img = Image.open(io.BytesIO(data), formats=["JPEG"])
    except Image.DecompressionBombError as e: raise FormatError(f"{where}: {e}") from None
    except (OSError, SyntaxError, ValueError): raise FormatError(f"{where}: is not a JPEG picture") from None
    if img.width*img.height > _MAX_PIXELS:
        raise FormatError(f"{where}: {img.width} x {img.height} pixels, at most {_MAX_PIXELS} are allowed")
    if img.mode not in ("L", "RGB"): raise FormatError(f"{where}: colour mode {img.mode}, grey or RGB is needed")
    try:
        if size is not None: img.draft(mode, (size, size))
        img.load()
    except (OSError, SyntaxError, ValueError) as e: raise FormatError(f"{where}: does not decode: {e}") from None
    img = img.convert(mode)
    if size is not None and img.size != (size, size): img = img.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(img)

def read_frame(
    path: str | os.PathLike, # JPEG file
    size: int | None = None, # width and height wanted; None: as it is [pixel]
    mode: Literal["L", "RGB"] = "L", # grey or three channels
    *,
    pad: bool = False, # decode a file that is cut off, missing rows are grey
) -> np.ndarray: # (row, column) uint8, or (row, column, 3)
    "Read one picture, or say what is wrong with its file"
    path = Path(path)
    try:
        if (n := path.stat().st_size) > _MAX_FILE: raise FormatError(f"{path}: {n} bytes, at most {_MAX_FILE}")
        data = path.read_bytes()
    except FileNotFoundError: raise MissingFile(f"frame {path} does not exist") from None
    if is_whole_jpeg(data, data[-32:]): return _decoded(data, size, mode, str(path))
    if not pad: raise FormatError(f"{path}: is cut off after {len(data)} bytes, or is no JPEG (no end mark)")
    from PIL import ImageFile
    with _PATIENT:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try: return _decoded(data, size, mode, str(path))
        finally: ImageFile.LOAD_TRUNCATED_IMAGES = before

# %%
with tmpdir() as d:
    whole = jpeg_bytes(phantom(Phase.t4, size=96))
    (d/"a.jpeg").write_bytes(whole)
    (d/"cut.jpeg").write_bytes(whole[:len(whole)//2])
    pictures = [read_frame(d/"a.jpeg"), read_frame(d/"a.jpeg", 48), read_frame(d/"cut.jpeg", pad=True)]
    with raises(FormatError, match="cut.jpeg: is cut off after"): read_frame(d/"cut.jpeg")
montage(pictures, titles=["whole", "half size", "cut off, padded"])

# %%
from PIL import ImageFile
assert [p.shape for p in pictures] == [(96, 96), (48, 48), (96, 96)] and not ImageFile.LOAD_TRUNCATED_IMAGES
assert np.array_equal(pictures[0][:30], pictures[2][:30])

# %% [markdown]
# ## What is wrong with the pictures
# `build_index` reads names only. `check_frames` opens the files, by their ends (quick) or by decoding them, and lists
# damage by video.

# %%
#| export
def _ends(path: Path) -> tuple[int, bytes, bytes]:
    "Size, first and last bytes of a file"
    with open(path, "rb") as f:
        size, start = os.fstat(f.fileno()).st_size, f.read(2)
        f.seek(max(0, size - 32))
        return size, start, f.read(32)

def _damage(path: Path, decode: bool) -> tuple[str, str] | None:
    "Kind of damage and its description; None for a sound picture"
    try:
        size, *ends = _ends(path)
        if not size: return "empty_file", "0 bytes"
        if not is_whole_jpeg(*ends): return ("truncated", "no end mark") if ends[0] == b"\xff\xd8" else \
            ("not_jpeg", "is not a JPEG picture")
        if decode: read_frame(path)
    except (FormatError, OSError) as e: return "unreadable", str(e).removeprefix(f"{path}: ")
    return None

def check_frames(
    index: EmbryoIndex, # what to look at
    decode: bool = False, # also decode every picture, which takes milliseconds each
) -> list[Problem]: # one for each video, plane and kind
    "Find empty, truncated and unreadable pictures, video by video"
    found = []
    for plane in index.planes:
        has = index.has(plane)
        for v in progress(index.videos, f"check {plane.pretty}"):
            bad: dict[str, list] = {}
            rows = index.rows(v.name)
            for n in index.frame[rows][has[rows]].tolist():
                what = _damage(index.path(plane, v.name, n), decode)
                if what: bad.setdefault(what[0], []).append((n, what[1]))
            found += [Problem(v.name, kind, f"{plane.pretty}: {len(b)} of {int(has[rows].sum())} frames, first "
                                            f"{b[0][0]}: {b[0][1]}") for kind, b in bad.items()]
    return found

# %%
folder = tempfile.TemporaryDirectory()
root = Path(folder.name)/"tree"
make_phantom_dataset(root, 5, 24, ["F-15", "F+00", "F15"], 32, defects=["truncated", "missing_frames", "repeated"])
index = build_index(root, cache=False)
check_frames(index)

# %%
assert [(p.video, p.kind) for p in check_frames(index, decode=True)] == [("AA83-7", "truncated")]

# %% [markdown]
# ## Frames as a data set
# Items come plane by plane, then in the order of `videos`, then by number. The frames of a plane are those that exist
# in it. An item is the tuple of the published loader with three more fields at the end.

# %%
#| export
class Item(NamedTuple):
    "One picture and what is known about it"
    image: Any # what the transform makes; by default (channel, row, column) float32 [0, 1]
    phase: int # index of the phase, -1 where there is none
    plane: int # index of the focal plane
    video: int # place in the index's videos, -1 for a generated picture
    frame_number: int # RUN number, -1 for a generated picture
    synthetic: bool = False # generated
    padded: bool = False # the file was cut off, the rest is made up
    time_h: float = float("nan") # since fertilisation [h]

def to_float(
    img: np.ndarray, # (row, column) or (row, column, 3) uint8
) -> np.ndarray: # (channel, row, column) float32 [0, 1]
    "Channels first, from 0 to 1"
    img = img[None] if img.ndim == 2 else np.moveaxis(img, 2, 0)
    return np.ascontiguousarray(img, np.float32)/np.float32(255)

Select = Literal["all", "median"] | Callable[[np.ndarray], np.ndarray]

def select_frames(
    frames: np.ndarray, # (n,) frames of one video and phase, ascending
    select: Select = "all", # 'all', 'median' for the middle one, or a function of the frames
) -> np.ndarray: # (m,) some of them, ascending
    "Frames that stand for a phase"
    if isinstance(select, str):
        if select not in ("all", "median"): raise ConfigError(f"select: must be 'all', 'median' or a function, "
                                                              f"got {select!r}")
        return frames if select == "all" else frames[(len(frames) - 1)//2:(len(frames) - 1)//2 + 1]
    chosen = np.unique(np.asarray(select(frames)))
    if not np.isin(chosen, frames).all(): raise DataError(f"select: returned {chosen}, not all among {frames}")
    return chosen

def merged_phases(
    merge: Mapping[str, str] | None, # phase -> phase that it counts as, such as {'tHB': 'tEB'}
) -> np.ndarray: # (17,) int8, new index of every index; the last belongs to -1
    "Table that replaces phase indices"
    table = np.array([*Phase.all_indices(), -1], np.int8)
    for a, b in (merge or {}).items(): table[Phase.parse(a).idx()] = Phase.parse(b).idx()
    return table

class EmptyDataset(DataError):
    "No frame is left of what was asked for"

class EmbryoFrames:
    "Frames of some videos, planes and phases; works as a map-style data set of torch, without needing it"
    def __init__(
        self,
        index: EmbryoIndex, # of the data set
        videos: Sequence[str] | None = None, # names; None: all
        planes: Sequence[str | FocalPlane] | None = None, # focal planes; None: all of the index
        phases: Sequence[str | Phase] | None = None, # phases; None: all
        *,
        select: Select = "all", # frames of each video, plane and phase: 'all', 'median', or a function
        transform: Callable[[np.ndarray], Any] | None = None, # of the (row, column) picture, uint8; None: `to_float`
        size: int | None = None, # width and height [pixel]; None: as they are
        mode: Literal["L", "RGB"] = "L", # grey or three channels
        on_missing: Literal["skip", "raise"] = "skip", # when a plane lacks a frame that another one has
        on_corrupt: Literal["raise", "skip", "pad"] = "raise", # when a file is cut off
        unlabelled: bool = False, # also frames without a phase
        merge: Mapping[str, str] | None = None, # phases that count as another, such as {'tHB': 'tEB'}
        drop_suspects: bool = False, # leave out videos whose tables run on another clock
    ):
        for what, given in (("videos", videos), ("planes", planes), ("phases", phases)):
            if given is not None and not len(given): raise ConfigError(f"{what}: the list is empty")
        if on_missing not in ("skip", "raise"): raise ConfigError(f"on_missing: 'skip' or 'raise', got {on_missing!r}")
        if on_corrupt not in ("raise", "skip", "pad"):
            raise ConfigError(f"on_corrupt: must be 'raise', 'skip' or 'pad', got {on_corrupt!r}")
        if mode not in ("L", "RGB"): raise ConfigError(f"mode: must be 'L' or 'RGB', got {mode!r}")
        self.index, self.size, self.mode, self.on_corrupt = index, size, mode, on_corrupt
        self.transform = to_float if transform is None else transform
        self.planes = parse_planes(planes, index.planes)
        if lack := [p.pretty for p in self.planes if p not in index.planes]:
            raise DataError(f"planes {', '.join(lack)} are not in {index!r}")
        self.videos = list(index.names if videos is None else videos)
        if len(set(self.videos)) < len(self.videos): raise ConfigError("videos: a name comes twice")
        places = [index.place(v) for v in self.videos]
        if drop_suspects:
            keep = ["timeline_suspect" not in index.videos[k].flags for k in places]
            self.videos, places = ([x for x, k in zip(xs, keep) if k] for xs in (self.videos, places))
            log.info("%d videos on another clock are left out", len(keep) - sum(keep))
        self.phase = merged_phases(merge)[index.phase]
        wanted = Phase.all_indices() if phases is None else [Phase.parse(p).idx() for p in phases]
        self._wanted = np.isin(self.phase, [*wanted, -1] if unlabelled else wanted)
        parts = [[self._rows(plane, v, select, on_missing) for v in self.videos] for plane in self.planes]
        self._lengths = np.array([[len(p) for p in row] for row in parts], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._row = np.concatenate([p for row in parts for p in row] or [np.zeros(0, np.int64)])
        if not len(self._row):
            raise EmptyDataset(f"no frame is left: {len(self.videos)} videos, {[p.pretty for p in self.planes]}, "
                               f"phases {'all' if phases is None else list(phases)} of {index!r}")

    def _rows(self, plane: FocalPlane, video: str, select: Select, on_missing: str) -> np.ndarray:
        "Rows of the index that belong to one plane and video"
        at = self.index.rows(video)
        rows = np.arange(at.start, at.stop)[self._wanted[at]]
        has = (self.index.plane_bits[rows] >> plane.idx() & 1).astype(bool)
        if on_missing == "raise" and not has.all():
            frame = int(self.index.frame[rows[~has][0]])
            raise MissingFile(f"frame {frame_label(plane, video, frame)} does not exist, other planes have it")
        rows = rows[has]
        if self.on_corrupt == "skip":
            paths = (self.index.path(plane, video, n) for n in self.index.frame[rows].tolist())
            rows = rows[[_damage(p, decode=False) is None for p in paths]]
        if select == "all": return rows
        kept = []
        for phase in np.unique(self.phase[rows]).tolist():
            own = rows[self.phase[rows] == phase]
            kept.append(own[np.isin(self.index.frame[own], select_frames(self.index.frame[own], select))])
        return np.sort(np.concatenate(kept)) if kept else rows

    def __len__(self) -> int: return len(self._row)

    def flatten_idx(
        self,
        plane_i: int, # place in `planes`
        video_i: int, # place in `videos`
        frame_i: int, # place among the frames of that plane and video
    ) -> int: # number of the item
        "Number of an item from its three places"
        if not (0 <= plane_i < len(self.planes) and 0 <= video_i < len(self.videos)
                and 0 <= frame_i < self._lengths[plane_i, video_i]):
            raise IndexError(f"no item at plane {plane_i}, video {video_i}, frame {frame_i}")
        return int(self._starts[plane_i*len(self.videos) + video_i]) + frame_i

    def unflatten_idx(
        self,
        i: int, # number of an item
    ) -> tuple[int, int, int]: # places in `planes`, `videos`, and among the frames of both
        "The three places of an item"
        if not 0 <= i < len(self): raise IndexError(f"item {i} of {len(self)}")
        block = int(np.searchsorted(self._starts, i, "right")) - 1
        return (*divmod(block, len(self.videos)), i - int(self._starts[block]))

    def _key(self, i: int) -> tuple[FocalPlane, str, int, int]:
        i = i + len(self) if i < 0 else i
        plane, video, _ = self.unflatten_idx(i)
        row = int(self._row[i])
        return self.planes[plane], self.videos[video], int(self.index.frame[row]), row

    def path(
        self,
        i: int, # number of an item
    ) -> Path: # of its picture
        "File of an item"
        return self.index.path(*self._key(i)[:3])

    def label(
        self,
        i: int, # number of an item
    ) -> str: # such as 'F+00_BM016-5_146'
        "Identifier of an item"
        return frame_label(*self._key(i)[:3])

    def __getitem__(self, i: int) -> Item:
        plane, video, frame, row = self._key(i)
        path = self.index.path(plane, video, frame)
        padded = self.on_corrupt == "pad" and _damage(path, decode=False) is not None
        img = read_frame(path, self.size, self.mode, pad=padded)
        return Item(self.transform(img), int(self.phase[row]), plane.idx(), self.index.place(video), frame,
                    False, padded, float(self.index.time_h[row]))

# %% [markdown]
# One embryo over its phases, a row for each plane. It is not the first video, whose pictures are cut off in the central
# plane.

# %%
strip = EmbryoFrames(index, ["BM016-5"], select="median", transform=lambda x: x)
montage([strip[i].image for i in range(len(strip))], len(strip)//3,
        [strip.label(i).split("_")[0] + " " + Phase.from_idx(strip[i].phase).value for i in range(len(strip))])

# %%
frames = EmbryoFrames(index, ["BM016-5", "AA83-9"], ["F+00", "F15"])
for i in range(len(frames)): assert frames.flatten_idx(*frames.unflatten_idx(i)) == i
item = frames[-1]
assert frames[0].video == index.place("BM016-5") and item.plane == FocalPlane.F15.idx()
assert item.image.dtype == np.float32 and item.image.max() <= 1
assert len(frames) == sum(int((index.phase[index.rows(v)] >= 0)[index.has(p)[index.rows(v)]].sum())
                          for p in frames.planes for v in frames.videos)
assert close(EmbryoFrames(index, ["AA83-7"], ["F+00"], on_corrupt="pad")[3].padded, True)
len(frames), item._replace(image=item.image.shape)

# %%
with raises(IndexError): frames[len(frames)]
with raises(FormatError, match="is cut off"): EmbryoFrames(index, ["AA83-7"], ["F+00"])[0]
with raises(MissingFile, match="other planes have it"): EmbryoFrames(index, ["AA83-9"], on_missing="raise")
with raises(EmptyDataset, match="no frame is left"): EmbryoFrames(index, ["AA83-7"], ["F+00"], on_corrupt="skip")
with raises(ConfigError, match="phases: the list is empty"): EmbryoFrames(index, phases=[])

# %% [markdown]
# ## Focal stacks and videos
# Seven planes 15 µm apart are a small volume; so is a video, with time in place of depth. Both go wherever volumes go,
# to a zarr store for instance, one frame a chunk. The size of a pixel is not told by the data set.

# %%
#| export
def focal_stack(
    index: EmbryoIndex, # of the data set
    video: str, # name
    frame: int, # RUN number
    *,
    missing: Literal["nan", "raise"] = "nan", # what a plane without this frame is
    pixel_um: float = 1.0, # width of a pixel [micrometre]; not told by the data set
) -> "Volume": # (z, y, x), planes from low to high 15 micrometres apart; float32 where planes are missing, else uint8
    "All focal planes of a moment"
    from medvol_nb.geometry import Volume, affine_from
    if missing not in ("nan", "raise"): raise ConfigError(f"missing: must be 'nan' or 'raise', got {missing!r}")
    at = index.rows(video)
    row = np.flatnonzero(index.frame[at] == frame)
    if not len(row): raise MissingFile(f"video {video!r} has no frame {frame}")
    have = [p for p in FocalPlane if index.plane_bits[at][row[0]] >> p.idx() & 1]
    if missing == "raise" and len(have) < len(FocalPlane):
        lack = [p.pretty for p in FocalPlane if p not in have]
        raise MissingFile(f"frame {frame} of {video!r}: planes {', '.join(lack)} do not exist")
    planes = {p: read_frame(index.path(p, video, frame)) for p in have}
    shapes = {a.shape for a in planes.values()}
    if len(shapes) > 1: raise DataError(f"frame {frame} of {video!r}: planes differ in size, {sorted(shapes)}")
    empty = np.full(next(iter(shapes)), np.nan, np.float32)
    affine = affine_from((0.015, pixel_um/1000, pixel_um/1000), (0, 0, -0.045), "zyx")
    return Volume(np.stack([planes.get(p, empty) for p in FocalPlane]), affine, "zyx", {"frame": frame, "video": video})

def video_volume(
    index: EmbryoIndex, # of the data set
    video: str, # name
    plane: str | FocalPlane = FocalPlane.F0, # where it was focused
    *,
    pixel_um: float = 1.0, # width of a pixel [micrometre]; not told by the data set
) -> "Volume": # (z, y, x) uint8, z counts the frames; `meta` holds their numbers and hours
    "All frames of a video in one plane"
    from medvol_nb.geometry import Volume, affine_from
    plane, at = FocalPlane.parse(plane), index.rows(video)
    rows = np.arange(at.start, at.stop)[index.has(plane)[at]]
    frames = index.frame[rows].tolist()
    if not frames: raise MissingFile(f"video {video!r} has no frame in plane {plane.pretty}")
    images = [read_frame(index.path(plane, video, n)) for n in frames]
    if len({a.shape for a in images}) > 1: raise DataError(f"video {video!r}: frames differ in size")
    return Volume(np.stack(images), affine_from((1.0, pixel_um/1000, pixel_um/1000), axes="zyx"), "zyx",
                  {"z": "time", "frames": frames, "hours": index.time_h[rows].tolist(), "plane": plane.pretty})

# %%
stack, film = focal_stack(index, "BM016-5", 7), video_volume(index, "BM016-5")
stack, film, [round(float(np.nanstd(p)), 1) for p in stack.data]

# %%
assert np.isnan(stack.data[0]).all() and np.array_equal(stack.data[3], film.data[6]) and film.shape[0] == 24
assert close(stack.spacing, (0.015, 0.001, 0.001), 1e-9) and close(stack.affine[2, 3], -0.045)
with raises(MissingFile, match="planes F-45, F-30, F.30, F.45 do"): focal_stack(index, "BM016-5", 7, missing="raise")

# %% [markdown]
# ## The truth as a table
# Classifiers are scored against one line for each labelled frame. Pictures are not opened.

# %%
#| export
def ground_truth_csv(
    index: EmbryoIndex, # of the data set
    path: str | os.PathLike, # table to write
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    planes: Sequence[str | FocalPlane] | None = None, # focal planes; None: all of the index
    videos: Sequence[str] | None = None, # names; None: all
) -> int: # lines written, header not counted; 0: skipped
    "Write identifier, phase label and phase index of every labelled frame"
    if not check_output(path, on_exists): return 0
    frames, rows = EmbryoFrames(index, videos, planes), []
    for i in range(len(frames)):
        plane, video, number, row = frames._key(i)
        phase = Phase.from_idx(int(frames.phase[row]))
        rows.append({"identifier": frame_label(plane, video, number), "phase-label": phase.value,
                     "phase-index": phase.idx()})
    write_csv(path, rows, on_exists=on_exists)
    return len(rows)

def ground_truth(
    dataset: str | os.PathLike, # extracted data set
    output: str | os.PathLike, # table to write
    *,
    planes: Sequence[str] = ("F+00",), # focal planes, or all
    on_exists: OnExists = "error", # what to do when the table is there already
) -> dict[str, Any]: # table, number of lines, frames of every phase
    "Table of the true phase of every labelled frame"
    if not check_output(output, on_exists): return {"table": str(output), "skipped": True}
    index = build_index(dataset, planes=planes)
    lines = ground_truth_csv(index, output, on_exists)
    return {"table": str(output), "frames": lines, "phases": {k: n for k, n in index.counts().items() if k},
            "unlabelled": index.counts()[""], "problems": len(index.problems)}

# %%
with tmpdir() as d:
    n = ground_truth_csv(index, d/"truth.csv", planes=["F+00"])
    lines = (d/"truth.csv").read_text().splitlines()
n, lines[:3]

# %%
assert n == len(lines) - 1 == sum(v for k, v in index.counts().items() if k) and lines[0] == \
    "identifier,phase-label,phase-index"
folder.cleanup()
