# %% [markdown]
# # Columns, and what passes between them
#
# > The parts of the plane that a prediction is made in, the patches that two of them share, and threads for the disk.
#
# A volume that does not fit in memory is predicted in columns ([inference](58a_zarrnet_infer.ipynb)). Two questions
# come with that. What happens to patches that lie in two columns? And how does the model keep working while chunks are
# read and written? The answers know nothing of networks or stores, so they have a page of their own.

# %%
#| default_exp zarrnet.columns

# %%
#| export
import contextlib
import itertools
import math
import os
import shutil
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.core import DiskFull, _full, human_bytes, log
from medvol_nb.grid import Box, Grid

# %%
import matplotlib.pyplot as plt

from medvol_nb.core import raises, rng_for, tmpdir

# %% [markdown]
# ## Columns
# A column is a box of the plane over all rows. Borders lie between chunks of the output, so that every chunk has one
# writer. Finished rows leave a column in pieces of whole chunks, about a million voxels for each row of chunks: enough
# to keep a disk busy, and little beside the sums.

# %%
#| export
@dataclass(frozen=True)
class Column:
    "A part of the plane, from the first to the last row of the volume"
    index: int # in raster order
    box: tuple[tuple[int, int], ...] # (z, y, x) pairs (lo, hi) [voxel]

    @property
    def group(self) -> str: # "c00003"
        "Name of its markers"
        return f"c{self.index:05d}"

def columns_of(
    box: Box, # (z, y, x) pairs (lo, hi) of the whole work [voxel]
    chunks: Sequence[int], # (z, y, x) of the output [voxel]
    size: Sequence[int], # (y, x) of a column [voxel], multiples of the chunk
) -> list[Column]: # in raster order
    "Columns of a box; their borders are borders of chunks"
    cuts = [[(max(a, lo), min(a + t, hi)) for a in range(lo//c*c, hi, t)] for (lo, hi), c, t in
            zip(box[1:], chunks[1:], size)]
    return [Column(k, (tuple(box[0]), *plane)) for k, plane in enumerate(itertools.product(*cuts))]

def piece_of(
    chunks: Sequence[int], # (z, y, x) of the output [voxel]
    shape: Sequence[int], # (z, y, x) of the volume [voxel]
) -> tuple[int, int]: # (y, x) [voxel]
    "Piece of the plane that leaves at once: whole chunks, about a million voxels a row of chunks"
    wide = max(1, 2**20//math.prod(chunks))*chunks[2]
    return chunks[1], min(wide, -(-shape[2]//chunks[2])*chunks[2])

# %%
halves = columns_of(((0, 9), (5, 40), (0, 30)), (4, 8, 16), (24, 32))
fig, ax = plt.subplots(figsize=(4, 2.6))
for c in columns_of(((0, 9), (5, 40), (3, 61)), (4, 8, 8), (16, 24)):
    (y0, y1), (x0, x1) = c.box[1:]
    ax.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fc=f"C{c.index}", alpha=0.5))
    ax.text((x0 + x1)/2, (y0 + y1)/2, c.index, ha="center", va="center")
ax.set(xlim=(0, 64), ylim=(48, 0), xticks=range(0, 65, 8), yticks=range(0, 49, 8), title="columns of a box, on chunks")
ax.grid(lw=0.3)

# %%
assert [c.box[1:] for c in halves] == [((5, 24), (0, 30)), ((24, 40), (0, 30))]
assert piece_of((128,)*3, (4096,)*3) == (128, 128) and piece_of((32,)*3, (100, 100, 100)) == (32, 128)

# %% [markdown]
# ## When the disk is full
# A run of days will meet a full disk. All that writes here turns it into one error, which says what is missing and that
# nothing is lost.

# %%
#| export
@contextlib.contextmanager
def room_in(
    path: str | os.PathLike, # output that grows
    needed: int = 0, # at most this much is still to come [byte]
) -> Iterator[None]:
    "Turn a full disk into one clear error"
    try: yield
    except Exception as e:
        if not (code := _full(e)): raise
        free = shutil.disk_usage(Path(path).parent).free
        raise DiskFull(code, f"no room to go on with {path}: {human_bytes(free)} free, up to {human_bytes(needed)} "
                       f"needed ({os.strerror(code)}). Finished parts are intact; free some space and run the same "
                       "command again") from e

# %%
with raises(DiskFull, match="no room to go on with .*1.0 GiB needed.*run the same command again"):
    with room_in("predictions.zarr", 2**30): raise OSError(28, "No space left on device")

# %% [markdown]
# ## Patches on the border of two columns
# Both columns need their prediction. Predicting them twice costs 40 % in columns of 1024 × 1024 voxels; so within a
# part of the work, the first column that predicts a patch hands on what lies in later ones. The usual way is to hand on
# *sums*. Here it is the predictions themselves, cut to the column that needs them: more bytes on disk, but added one by
# one in the order of the grid, so that the result is the same to the last bit, with or without, and nothing has to be
# redone if the run dies. A record carries a checksum; what is torn or damaged is predicted again.

# %%
#| export
class Strip:
    "Append-only file of predictions that one column needs from earlier ones"
    def __init__(
        self,
        path: Path, # file; created if absent, continued otherwise
        box: Box, # (z, y, x) pairs (lo, hi) of the column [voxel]
        grid: Grid, # positions
        channels: int, # of a prediction
    ):
        self.path, self.box, self.grid, self.channels = path, box, grid, channels
        self.index: dict[tuple, int] = {}
        self.bytes = 0
        path.parent.mkdir(exist_ok=True)
        self.file = open(path, "a+b", buffering=0)
        end = self.file.seek(0, 2)
        at = 0
        while at + 32 <= end:
            self.file.seek(at)
            start = tuple(np.frombuffer(self.file.read(32), np.int64).tolist())[:3]
            part = self.part(start)
            size = 0 if part is None else 4*channels*math.prod(s.stop - s.start for s in part)
            if not size or at + 32 + size > end: break
            self.index[start], at = at, at + 32 + size
        if at < end: self.file.truncate(at)

    def part(
        self,
        start: tuple, # of a patch
    ) -> tuple[slice, ...] | None: # (z, y, x) of the patch
        "The part of a patch that lies in the column; None if there is none"
        lows = [max(0, lo - s) for s, (lo, _) in zip(start, self.box)]
        highs = [min(p, hi - s) for s, p, (_, hi) in zip(start, self.grid.patch_size, self.box)]
        inside = all(a < b for a, b in zip(lows, highs))
        return tuple(slice(a, b) for a, b in zip(lows, highs)) if inside else None

    def add(
        self,
        start: tuple, # of a patch
        pred: np.ndarray, # (c, *patch_size) prediction
    ) -> None:
        "Append what the column needs of a prediction, if it does not have it"
        part = self.part(start)
        if part is None or start in self.index: return
        data = np.ascontiguousarray(pred[(slice(None), *part)], np.float32)
        head = np.array([*start, zlib.crc32(data)], np.int64).tobytes()
        at = self.file.seek(0, 2)
        for piece in (head, data.reshape(-1).view(np.uint8).data):
            piece = memoryview(piece)
            while piece: piece = piece[self.file.write(piece):]
        self.index[start], self.bytes = at, self.bytes + 32 + data.nbytes

    def get(
        self,
        start: tuple, # of a patch
    ) -> np.ndarray | None: # (c, *patch_size) float32
        "A prediction whose values are known inside the column only; None if it has to be made"
        if start not in self.index: return None
        part = self.part(start)
        known = np.empty((self.channels, *(s.stop - s.start for s in part)), np.float32)
        self.file.seek(self.index[start])
        crc = int(np.frombuffer(self.file.read(32), np.int64)[3])
        if self.file.readinto(known.reshape(-1).view(np.uint8).data) != known.nbytes or zlib.crc32(known) != crc:
            log.warning("%s: a damaged record is predicted again", self.path)
            return None
        out = np.empty((self.channels, *self.grid.patch_size), np.float32)
        out[(slice(None), *part)] = known
        return out

class Carry:
    "The memo of a column: what earlier columns left for it, and what it leaves for later ones"
    def __init__(
        self,
        folder: Path, # of the strips
        column: Column, # that is worked on
        later: Sequence[Column], # that will be
        grid: Grid, # positions
        channels: int, # of a prediction
    ):
        self.folder, self.known, self.bytes = folder, 0, 0
        def strip(c: Column) -> Strip: return Strip(folder/c.group, c.box, grid, channels)
        reach = [p - 1 for p in grid.patch_size[1:]]
        near = [c for c in later if all(lo < b + r and a - r < hi for (lo, hi), (a, b), r in
                                        zip(c.box[1:], column.box[1:], reach))]
        with room_in(folder): self.own, self.later = strip(column), [strip(c) for c in near]

    def get(
        self,
        start: tuple, # of a patch
    ) -> np.ndarray | None: # (c, *patch_size) float32
        "What an earlier column predicted"
        pred = self.own.get(start)
        self.known += pred is not None
        return pred

    def __setitem__(self, start: tuple, pred: np.ndarray) -> None:
        with room_in(self.folder, 4*pred.size):
            for s in self.later: s.add(start, pred)

    def close(self) -> None:
        "Close the files"
        self.bytes = sum(s.bytes for s in self.later)
        for s in (self.own, *self.later): s.file.close()

# %%
with tmpdir() as d:
    line = Grid((8, 20, 20), 8, 0.5)
    right = ((0, 8), (0, 20), (10, 20))
    strip = Strip(d/"carry"/"right", right, line, 2)
    preds = {s: rng_for(0, *s).random((2, 8, 8, 8), dtype=np.float32) for s in line}
    for s in line: strip.add(s, preds[s])
    again = Strip(d/"carry"/"right", right, line, 2)
    met = [s for s in line if again.get(s) is not None]
    same = all(np.array_equal(again.get(s)[(..., *again.part(s))], preds[s][(..., *again.part(s))]) for s in met)
    size = strip.path.stat().st_size
    strip.file.truncate(size - 1)
    torn = Strip(d/"carry"/"right", right, line, 2)
    for s in (strip, again, torn): s.file.close()
len(met), len(line), size

# %%
assert same and met == [s for s in line if s[2] + 8 > 10] and len(torn.index) == len(met) - 1

# %% [markdown]
# ## Three things at a time
# While the model works, the next patches are read and cut, and pieces that are finished are encoded, compressed and
# brought to disk. At most one batch and two pieces wait in between, so a slow disk holds up the model instead of
# filling memory. The run reports what the model waited for.

# %%
#| export
def ahead(
    items: Iterator, # made one at a time
    seconds: Counter, # gets "read": time spent waiting
) -> Iterator: # the same items
    "Let a thread make the next item while this one is used"
    with ThreadPoolExecutor(1, "medvol-read") as pool:
        coming = pool.submit(next, items, None)
        while True:
            began = time.perf_counter()
            item = coming.result()
            seconds["read"] += time.perf_counter() - began
            if item is None: return
            coming = pool.submit(next, items, None)
            yield item
            del item

class Writer:
    "Calls functions in a thread, in order; two may wait, and after one that raises no other is called"
    def __init__(
        self,
        seconds: Counter, # gets "write": time spent waiting
    ):
        self.pool, self.waiting, self.seconds = ThreadPoolExecutor(1, "medvol-write"), deque(), seconds
        self.failed = False

    def _call(self, f: Callable, *args: Any) -> None:
        if self.failed: return
        try: f(*args)
        except BaseException:
            self.failed = True
            raise

    def submit(
        self,
        f: Callable, # to be called
        *args: Any, # with these
    ) -> None:
        "Put a call at the end of the queue, waiting while it is full"
        began = time.perf_counter()
        while len(self.waiting) > 1: self.waiting.popleft().result()
        self.seconds["write"] += time.perf_counter() - began
        self.waiting.append(self.pool.submit(self._call, f, *args))

    def __enter__(self) -> "Writer": return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.pool.shutdown()
        while self.waiting and kind is None: self.waiting.popleft().result()

# %%
def slow(k):
    time.sleep(0.02)
    return k

spent, order = Counter(), []
began = time.perf_counter()
with Writer(spent) as writer:
    for k in ahead((slow(k) for k in range(10)), spent):
        slow(k)
        writer.submit(lambda k: order.append(slow(k)), k)
elapsed = time.perf_counter() - began
assert order == list(range(10))
{"one after the other [s]": 0.6, "at a time [s]": round(elapsed, 1)}

# %%
with raises(ZeroDivisionError), Writer(Counter()) as writer:
    writer.submit(lambda: 1/0)
    writer.submit(order.append, "never")
assert "never" not in order
