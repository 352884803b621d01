"Extraction, index and image folders against tarfile, directory iteration and re-encoding, on generated data"
import contextlib
import functools
import itertools
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import Row, compare
from benchmarks.reference.embryo import extract_all, extract_in_processes, folder_by_encoding, index_by_iteration
from medvol_nb.core import rng_for
from medvol_nb.embryo.archives import extract_dataset
from medvol_nb.embryo.folders import select_images, write_image_folder
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.phantom import jpeg_bytes, pack
from medvol_nb.embryo.phases import FocalPlane, Phase, PromptTemplate, frame_label
from medvol_nb.phantoms import embryo_frame


@functools.lru_cache(1)
def scratch() -> Path:
    "A folder in memory where there is one"
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.TemporaryDirectory(prefix="medvol-bench-", dir=base)
    scratch.keep = folder
    return Path(folder.name)


@functools.lru_cache(1)
def pictures() -> list[bytes]:
    "Pictures of 500 x 500 and about 25 kB, noisy like the real ones"
    rng = rng_for(0, "bench pictures")
    out = []
    for k in range(16):
        img = np.kron(embryo_frame(k, 125), np.ones((4, 4), np.uint8)).astype(np.int16)
        noisy = np.clip(img + rng.normal(0, 4, img.shape), 0, 255).astype(np.uint8)
        out.append(jpeg_bytes(noisy, 75))
    return out


def make_tree(root: Path, videos: int, frames: int, planes: list[FocalPlane], empty: bool = False) -> None:
    "The files of a data set; `empty` ones where only names count"
    names = [f"AB{k:03}-{k % 9 + 1}" for k in range(videos)]
    notes = root/"embryo_dataset_annotations"
    notes.mkdir(parents=True)
    per = frames//16
    text = "".join(f"{p.value},{k*per + 1},{(k + 1)*per}\n" for k, p in enumerate(Phase))
    for v, name in enumerate(names):
        (notes/f"{name}_phases.csv").write_text(text)
        for plane in planes:
            folder = root/plane.folder/name
            folder.mkdir(parents=True)
            for n in range(1, frames + 1):
                file = folder/f"D2013.01.28_S{v:04}_I132_WELL7_RUN{n}.jpeg"
                if empty: file.touch()
                else: file.write_bytes(pictures()[(n + v) % 16])


def fresh(name: str) -> Path:
    path = scratch()/name
    shutil.rmtree(path, ignore_errors=True)
    return path


@contextlib.contextmanager
def fresh_folders(base: Path) -> Iterator[Callable[[str], Path]]:
    "A new folder for every run, all removed at the end: to remove the last one is not what is timed"
    count = itertools.count()
    try: yield lambda name: base/f"{name}-{next(count)}"
    finally:
        for p in base.iterdir():
            if p.name.rpartition("-")[2].isdigit(): shutil.rmtree(p)


def extraction(full: bool = False) -> list[Row]:
    "One plane of pictures; ours also compares the checksum and looks at the ends of pictures"
    videos, frames, src = (60, 300, scratch()/"archives") if full else (12, 300, scratch()/"archives")
    tree = fresh("packed")
    make_tree(tree, videos, frames, [FocalPlane.F0])
    fresh("archives").mkdir()
    for name in ("embryo_dataset", "embryo_dataset_annotations"):
        files = sorted(p for p in (tree/name).rglob("*") if p.is_file())
        contents = {p.relative_to(tree).as_posix(): p.read_bytes() for p in files}
        (src/f"{name}.tar.gz").write_bytes(pack(contents, level=6))
    shutil.rmtree(tree)
    (src/"embryo_dataset_time_elapsed.tar.gz").write_bytes(pack({}))
    (src/"embryo_dataset_grades.csv").write_text("video_name,TE,ICM\n")
    archives = sorted(src.glob("*.tar.gz"))
    with tarfile.open(src/"embryo_dataset.tar.gz") as tar: contents = [(m.name, m.size) for m in tar if m.isfile()]
    data = {n: bytes(n) for _, n in contents}

    def floor() -> None:
        out = new("floor")
        for name, n in contents:
            path = out/name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as f: f.write(data[n])
    what = f"{len(contents)} pictures of {sum(n for _, n in contents)//len(contents)} bytes, one archive a time"
    with fresh_folders(scratch()) as new:
        return [compare("embryo.extract", f"{what}; reference: tarfile.extractall, no checksum",
                        lambda: extract_dataset(src, new("ours"), n_proc=1, planes=["F+00"]),
                        lambda: extract_all(archives, new("theirs")), floor, unit="s", runs=3, bar=1.25, cpu=True,
                        note="processor seconds; ours with checks, index and report")]


def two_planes(full: bool = False) -> list[Row]:
    "Two planes of equal size on two processors: our threads, one process for each archive, one archive after the other"
    tree, src = fresh("packed"), fresh("archives")
    planes = [FocalPlane.F0, FocalPlane.F15]
    make_tree(tree, 12, 300, planes)
    src.mkdir()
    for name in (*(p.folder for p in planes), "embryo_dataset_annotations"):
        files = sorted(p for p in (tree/name).rglob("*") if p.is_file())
        (src/f"{name}.tar.gz").write_bytes(pack({p.relative_to(tree).as_posix(): p.read_bytes() for p in files}))
    shutil.rmtree(tree)
    (src/"embryo_dataset_time_elapsed.tar.gz").write_bytes(pack({}))
    (src/"embryo_dataset_grades.csv").write_text("video_name,TE,ICM\n")
    archives = sorted(src.glob("*.tar.gz"))
    with fresh_folders(scratch()) as new:
        return [compare("embryo.extract_two",
                        "2 planes of 3600 pictures; reference: one process for each of four archives",
                        lambda: extract_dataset(src, new("ours"), n_proc=2, planes=["F+00", "F+15"]),
                        lambda: extract_in_processes(archives, new("theirs")), unit="s", runs=5, bar=1.25,
                        others={"one after the other": lambda: extract_all(archives, new("third"))},
                        note="wall time on two processors; it means something only if both are free")]


def indexing(full: bool = False) -> list[Row]:
    "Names and tables only"
    videos, frames = 60, 300
    root = fresh("names")
    make_tree(root, videos, frames, [FocalPlane.F0], empty=True)
    rows = [compare("embryo.index", f"{videos*frames} frames; reference: directory iteration, is_file, pandas",
                    lambda: build_index(root, cache=False), lambda: index_by_iteration(root, ["embryo_dataset"]),
                    lambda: [os.listdir(p) for p in (root/"embryo_dataset").iterdir()], unit="ms", runs=7, bar=8)]
    videos, frames, planes = (704, 500, list(FocalPlane)) if full else (704, 50, list(FocalPlane)[2:5])
    many, cache = fresh("many"), fresh("cache")
    make_tree(many, videos, frames, planes, empty=True)
    time.sleep(0.1)
    build_index(many, cache=cache)
    rows.append(compare("embryo.index_cached", f"{videos} videos x {frames} frames x {len(planes)} planes from the "
                        "cache; reference: without", lambda: build_index(many, cache=cache),
                        lambda: build_index(many, cache=False), unit="ms", runs=3))
    shutil.rmtree(many)
    return rows


def folders(full: bool = False) -> list[Row]:
    "The middle frame of every phase of every video, on a real disk, where links and copies cost what they cost"
    base = tempfile.TemporaryDirectory(prefix="medvol-bench-")
    root = Path(base.name)
    make_tree(root/"tree", 60, 16, [FocalPlane.F0])
    index = build_index(root/"tree", cache=False)
    items = select_images(index, index.names, list(Phase))
    template = PromptTemplate()
    literal = [(index.path(*c[:3]), template.format(c.phase), frame_label(*c[:3]), c.phase.value) for c in items]

    with base, fresh_folders(root) as new:
        return [compare("embryo.image_folder",
                        f"{len(items)} pictures of 500 x 500; reference: decode and encode again",
                        lambda: write_image_folder(new("ours"), index, items),
                        lambda: folder_by_encoding(literal, new("theirs")), unit="s", runs=5, bar=5,
                        others={"copies": lambda: write_image_folder(new("copies"), index, items, link="copy")},
                        note="hard links, every picture checked for its end mark")]


ROWS = {"extract": extraction, "extract_two": two_planes, "index": indexing, "image_folder": folders}
