# %% [markdown]
# # Embryo archives
#
# > Ten downloads become ten folders: checked before the first byte, safe against crafted members, whole or not at all.
#
# The published script unpacks whatever lies in a folder with `tarfile.extractall`, one process a file. A missing plane
# goes unnoticed; a crafted member is written outside the target; a download with a flipped byte unpacks without a word,
# because `extractall` stops before the checksum; a failure leaves half a tree, which the rule that the target must be
# empty then blocks. Here nothing is written until everything that can be known is right. Then each archive is read once
# as a stream, every member is held against a narrow policy, and the checksum at the very end decides. The tree grows
# under a hidden name beside the target and is renamed when all of it is there.

# %%
#| default_exp embryo.archives

# %%
#| export
import concurrent.futures
import contextlib
import ctypes
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from medvol_nb.core import (ConfigError, DataError, MedvolError, OutputExists, atomic, fingerprint, human_bytes,
                            human_time, lock, log, progress, read_json, remove_tree, write_json)
from medvol_nb.embryo.dataset import is_whole_jpeg
from medvol_nb.embryo.index import build_index
from medvol_nb.embryo.members import (MAX_MEMBER, BadArchive, ExtractionError, GzipStream, UnsafeMember, check_member,
                                      read_members)
from medvol_nb.embryo.phases import ANNOTATIONS, GRADES, TIMES, FocalPlane, archive_names, parse_planes
from medvol_nb.parallel import cpu_count

# %%
import tarfile

from medvol_nb.core import raises, tmpdir
from medvol_nb.embryo.phantom import make_phantom_archives, make_phantom_dataset

# %% [markdown]
# ## What can go wrong, by name

# %%
#| export
class SourceNotFound(ExtractionError):
    "The folder of the archives does not exist"
class SourceContentError(ExtractionError):
    "Archives are missing, or something else lies between them"
class TargetNotDirectory(ExtractionError):
    "The target is a file or a link"
class TargetNotEmpty(ExtractionError):
    "The target holds something already"
class OverlappingPaths(ExtractionError):
    "Archives and target lie within each other"
class NotEnoughSpace(ExtractionError):
    "The disk has too little room or too few files left"
class Cancelled(ExtractionError):
    "Another archive failed, so this one was stopped"

# %% [markdown]
# ## Before the first byte
# Source, names, file types, target and room are checked in this order; all problems of a step are told together. How
# much an archive holds is in its last four bytes, modulo 4 GiB; pictures do not compress, so the smallest size that
# fits is the right one. How many files there are follows from the size of the first members, which are read on the
# way, so that a wrong archive is caught here as well.

# %%
#| export
class ArchivePlan(NamedTuple):
    "What an archive will become"
    name: str # file name
    bytes_in: int # compressed [byte]
    bytes_out: int # inflated, estimated [byte]
    files: int # estimated number

def _check_source(src: Path, wanted: Sequence[str]) -> None:
    if not src.is_dir(): raise SourceNotFound(f"{src} is not a folder. Put the ten downloads there: "
                                              f"{', '.join(archive_names())}")
    there, every = set(os.listdir(src)), set(archive_names())
    missing, unexpected = sorted(set(wanted) - there), sorted(there - every)
    if missing or unexpected:
        raise SourceContentError(f"{src}: missing={missing} unexpected={unexpected}. The folder must hold the "
                                 "downloads and nothing else")
    wrong = []
    for name in wanted:
        path = src/name
        if not path.is_file(): wrong.append(f"{name} is not a file")
        elif not path.stat().st_size: wrong.append(f"{name} is empty (a failed download)")
        else:
            with open(path, "rb") as f: start = f.read(4096)
            if name == GRADES:
                lines = start.decode("utf-8-sig", "replace").splitlines() or [""] # a byte order mark alone is no line
                header = [h.strip() for h in lines[0].split(",")]
                if not {"video_name", "TE", "ICM"} <= set(header):
                    wrong.append(f"{name} does not begin with the header video_name,TE,ICM, but {header[:4]}")
            elif start[:3] != b"\x1f\x8b\x08" or len(start) < 18: # header and trailer of gzip alone are 18 bytes
                page = " It looks like a web page, such as an error message" if start.lstrip()[:1] == b"<" else ""
                wrong.append(f"{name} is not a gzip file.{page}")
    if wrong: raise BadArchive(f"{src}: {'; '.join(wrong)}. Download again")

def _check_target(src: Path, dst: Path) -> None:
    real, there = Path(os.path.realpath(dst)), os.path.realpath(src)
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise TargetNotDirectory(f"{dst} is {'a symbolic link' if dst.is_symlink() else 'not a folder'}. Name another")
    if dst.is_dir() and (found := sorted(os.listdir(dst))):
        hint = ", or empty it and go on where an earlier run stopped with --resume" if _areas(dst.absolute()) else ""
        raise TargetNotEmpty(f"{dst} is not empty, it holds {', '.join(found[:5])}{' ...'*(len(found) > 5)}. Name a "
                             f"new folder{hint}")
    if real == Path(there) or real.is_relative_to(there) or Path(there).is_relative_to(real):
        raise OverlappingPaths(f"{src} and {dst} lie within each other. Name a target outside")
    parent = _existing_parent(dst)
    if not parent.is_dir(): raise TargetNotDirectory(f"{dst}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK): raise OutputExists(f"output {dst}: no permission to write in {parent}")

def _existing_parent(path: Path) -> Path:
    return next(p for p in path.absolute().parents if p.exists() or p.is_symlink())

def _bomb_limit(bytes_in: int) -> int: return 20*bytes_in + 2**26

def _plan(path: Path, most: int) -> ArchivePlan:
    "Size and number of files of an archive, from its end and its first members"
    size = path.stat().st_size
    if path.name == GRADES: return ArchivePlan(path.name, size, size, 1)
    stem = path.name.removesuffix(".tar.gz")
    with open(path, "rb") as f:
        f.seek(-4, os.SEEK_END)
        out = int.from_bytes(f.read(4), "little")
        if out < 0.98*size: out += -(-(int(0.98*size) - out)//2**32)*2**32
        out = min(out, _bomb_limit(size)) # more is not extracted
        f.seek(0)
        stream, seen, files = GzipStream(f, path.name, _bomb_limit(size)), 0, 0
        for member in read_members(stream):
            check_member(member, stem, most)
            stream.take(member.size + -member.size % 512)
            seen, files = seen + 512 + member.size + -member.size % 512, files + 1
            if files == 512: break
    return ArchivePlan(path.name, size, out, max(files, round(out/max(1, seen/files))) if files == 512 else files)

def _check_room(dst: Path, plans: Sequence[ArchivePlan]) -> None:
    at = os.statvfs(_existing_parent(dst))
    files, size = sum(p.files for p in plans), sum(p.bytes_out for p in plans)
    need, free = int(1.02*size + files*at.f_frsize/2), at.f_bavail*at.f_frsize
    if free < need: raise NotEnoughSpace(f"{dst}: needs {human_bytes(need)}, {human_bytes(free)} are free")
    if at.f_files and at.f_favail < files:
        raise NotEnoughSpace(f"{dst}: needs {files} files, the file system has room for {at.f_favail} (inodes)")

# %% [markdown]
# ## One archive
# Files are written as they come by, into a folder that appears under its name when the stream was read to the end and
# its checksum held. A picture without start or end mark is counted, not refused: 52 videos are known to be like that.

# %%
#| export
@dataclass
class ArchiveReport:
    "What came out of one archive"
    name: str # file name
    bytes_in: int = 0 # compressed [byte]
    bytes_out: int = 0 # of the files [byte]
    files: int = 0 # written
    seconds: float = 0.0 # it took [s]
    crc: str = "" # checksum and length from the end of the file, as hexadecimal; '' if they were not verified
    truncated: dict[str, int] = field(default_factory=dict) # video -> pictures without start or end mark
    resumed: bool = False # was complete already

class _Writer:
    "Writes members below a folder; nothing is ever opened that exists"
    def __init__(self, top: Path, name: str):
        self.top, self.name, self.folders = str(top), name, {()}

    def folder(self, parts: tuple[str, ...]) -> None:
        if parts in self.folders: return
        self.folder(parts[:-1])
        self._make(parts)
        self.folders.add(parts)

    def _make(self, parts: tuple[str, ...]) -> None:
        try: os.mkdir("/".join((self.top, *parts)), 0o755)
        except FileExistsError:
            raise UnsafeMember(f"{self.name}: folder {'/'.join(parts)!r} is a file, too, or differs from another "
                               "member in upper and lower case only, as this file system sees names") from None

    def file(self, parts: tuple[str, ...], data: memoryview | bytes) -> None:
        self.folder(parts[:-1])
        try: fd = os.open("/".join((self.top, *parts)), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        except FileExistsError:
            raise UnsafeMember(f"{self.name}: member {'/'.join(parts)!r} comes twice, or differs from another in "
                               "upper and lower case only, which this file system cannot tell apart") from None
        except OSError as e:
            e.add_note(f"while extracting {'/'.join(parts)!r} of {self.name}")
            raise
        try:
            while data: data = data[os.write(fd, data):]
        finally: os.close(fd)

@dataclass(frozen=True)
class _Job:
    "What the extraction of every archive needs to know"
    src: Path
    work: Path # hidden area beside the target; `tree` in it becomes the target
    verify: bool
    skip_f0: bool
    max_member_bytes: int
    stop: threading.Event # set when another archive failed
    read: Counter # archive -> bytes read so far

def _extract_one(plan: ArchivePlan, job: _Job) -> ArchiveReport:
    "Extract one archive into the work area, unless it is there"
    start, path, record = time.monotonic(), job.src/plan.name, job.work/f"{plan.name}.json"
    goal = job.work/"tree"/plan.name.removesuffix(".tar.gz")
    if (done := _completed(record, path, goal)) is not None: return done
    remove_tree(goal)
    if plan.name == GRADES:
        with atomic(goal, sync=False) as t: shutil.copyfile(path, t)
        report = ArchiveReport(plan.name, plan.bytes_in, plan.bytes_in, 1)
    else:
        report = ArchiveReport(plan.name, plan.bytes_in)
        with open(path, "rb") as f, atomic(goal, folder=True, sync=False) as temp: _unpack(f, temp, report, plan, job)
    job.read[plan.name] = plan.bytes_in
    report.seconds = round(time.monotonic() - start, 3)
    write_json(record, {"identity": _identity(path), "tree": _measure(goal), "report": report})
    return report

def _unpack(f: BinaryIO, temp: Path, report: ArchiveReport, plan: ArchivePlan, job: _Job) -> None:
    stem = plan.name.removesuffix(".tar.gz")
    stream, writer, bad = GzipStream(f, plan.name, _bomb_limit(plan.bytes_in)), _Writer(temp, plan.name), Counter()
    for member in read_members(stream):
        if job.stop.is_set(): raise Cancelled(f"{plan.name}: stopped before member {member.name!r}")
        parts = check_member(member, stem, job.max_member_bytes)
        if member.is_folder:
            if not (job.skip_f0 and parts[-1:] == ("F0",)): writer.folder(parts)
            continue
        data = stream.take(member.size)
        if len(data) < member.size: raise BadArchive(f"{plan.name} ends in the middle of {member.name!r}")
        stream.take(-member.size % 512)
        job.read[plan.name] = stream.read
        if job.skip_f0 and len(parts) == 3: continue
        if job.verify and parts[-1].lower().endswith((".jpeg", ".jpg")) and not is_whole_jpeg(data, bytes(data[-32:])):
            bad[parts[0]] += 1
        writer.file(parts, data)
        report.files, report.bytes_out = report.files + 1, report.bytes_out + member.size
    report.truncated = dict(sorted(bad.items()))
    if not job.verify: return
    while rest := stream.take(2**20):
        if bytes(rest).strip(b"\0"): raise BadArchive(f"{plan.name} goes on after the mark of its end")
    f.seek(-8, os.SEEK_END)
    report.crc = f.read(8).hex()

def _identity(path: Path) -> list: return [path.name, (s := path.stat()).st_size, s.st_mtime_ns, _tail(path)]

def _tail(path: Path) -> str:
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - 8))
        return f.read(8).hex()

def _measure(goal: Path) -> list[int]:
    "Number of files and bytes below a folder; or of one file"
    if goal.is_file(): return [1, goal.stat().st_size]
    files = size = 0
    for folder, _, names in os.walk(goal):
        files += len(names)
        size += sum(os.lstat(f"{folder}/{n}").st_size for n in names)
    return [files, size]

def _completed(record: Path, path: Path, goal: Path) -> ArchiveReport | None:
    "Report of an archive that an earlier run finished, if archive and result are still what they were"
    if not record.is_file() or not goal.exists(): return None
    with contextlib.suppress(MedvolError, KeyError, TypeError):
        found = read_json(record)
        if found["identity"] == _identity(path) and found["tree"] == _measure(goal):
            return ArchiveReport(**{**found["report"], "resumed": True})
    return None

def _flush(folder: Path) -> None:
    "Bring the file system of a folder to disk: once, instead of once for each of its files"
    fd = os.open(folder, os.O_RDONLY)
    try:
        syncfs = getattr(ctypes.CDLL(None), "syncfs", None)
        if syncfs is None or syncfs(fd): os.sync()
    finally: os.close(fd)

# %% [markdown]
# ## All of them
# Threads are enough, since inflating and writing leave the interpreter's lock alone; the largest archive starts first.
# The work area is a hidden sibling of the target. If anything fails it is removed, unless it is to be kept for
# `resume=True`; what a killed process left is removed by the next run, or taken up by it. An archive in the area counts
# as done only with a record of its source and of its own size.

# %%
#| export
@dataclass
class ExtractReport:
    "What was extracted, and what is odd about it"
    target: str # folder
    archives: list[ArchiveReport] = field(default_factory=list) # one each
    files: int = 0 # in all
    bytes_out: int = 0 # in all [byte]
    seconds: float = 0.0 # it took [s]
    verified: bool = True # every checksum was compared
    truncated: dict[str, dict[str, int]] = field(default_factory=dict) # archive -> video -> pictures that are cut off
    differences: dict[str, list[str]] = field(default_factory=dict) # video -> frames that only some planes have
    no_annotation: list[str] = field(default_factory=list) # videos
    no_time: list[str] = field(default_factory=list) # videos
    no_grade: list[str] = field(default_factory=list) # videos
    not_compared: str = "" # why planes and tables could not be compared

def _areas(dst: Path) -> list[Path]:
    "Work areas that belong to a target"
    pattern = re.compile(re.escape(f".{dst.name}.partial-") + "[0-9a-f]{8}")
    with contextlib.suppress(OSError):
        return sorted(p for p in dst.parent.iterdir() if pattern.fullmatch(p.name) and p.is_dir())
    return []

@contextlib.contextmanager
def _parents(dst: Path) -> Iterator[None]:
    "Missing parents of the target, taken back if the block fails"
    made = [p for p in dst.absolute().parents if not p.exists()]
    dst.absolute().parent.mkdir(parents=True, exist_ok=True)
    try: yield
    except BaseException:
        for p in made:
            with contextlib.suppress(OSError): p.rmdir()
        raise

def _run(plans: Sequence[ArchivePlan], job: _Job, workers: int) -> list[ArchiveReport]:
    "All archives in threads; the first failure stops the others"
    total, told = sum(p.bytes_in for p in plans) >> 20, 0
    def ticks(running: set) -> Iterator[None]:
        nonlocal told
        while running:
            done, running = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_EXCEPTION)
            if any(f.exception() for f in done): return
            for _ in range(told, told := sum(job.read.values()) >> 20): yield
    largest_first = sorted(plans, key=lambda p: (-p.bytes_in, p.name))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_extract_one, p, job): p.name for p in largest_first}
        try:
            for _ in progress(ticks(set(futures)), "extract", total=total, unit="MiB"): pass
        finally:
            job.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [e for f in futures if not f.cancelled() and (e := f.exception())]
    for e in sorted(errors, key=lambda e: isinstance(e, Cancelled)): raise e
    return [f.result() for f in sorted(futures, key=lambda f: futures[f])]

def _compare(report: ExtractReport, tree: Path) -> None:
    "What differs between planes and tables"
    if not any((tree/p.folder).is_dir() for p in FocalPlane): return
    index = build_index(tree, cache=False)
    for p in index.problems:
        if p.kind == "plane": report.differences.setdefault(p.video, []).append(p.text)
    tables = {f: set(os.listdir(tree/f)) if (tree/f).is_dir() else set() for f in (ANNOTATIONS, TIMES)}
    lines = (tree/GRADES).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    graded = {line.split(",")[0].strip() for line in lines[1:]} # the column's place does not matter for a warning
    report.no_annotation = [v for v in index.names if f"{v}_phases.csv" not in tables[ANNOTATIONS]]
    report.no_time = [v for v in index.names if f"{v}_timeElapsed.csv" not in tables[TIMES]]
    report.no_grade = [v for v in index.names if v not in graded]

def extract_dataset(
    src: str | os.PathLike, # folder with the ten downloads and nothing else; never changed
    dst: str | os.PathLike, # new or empty folder
    *,
    n_proc: int | None = None, # archives at a time; None: one per processor
    planes: Sequence[str | FocalPlane] | None = None, # only these focal planes; None: all ten downloads
    verify: bool = True, # compare checksums and look at the ends of pictures
    resume: bool = False, # take up what an interrupted run finished
    keep_partial: bool = False, # after a failure keep what was finished, for `resume`
    skip_f0: bool = False, # leave out folders F0, which repeat the frames of their video
    max_member_bytes: int = MAX_MEMBER, # larger files are refused [byte]
) -> ExtractReport: # counts, checksums, truncated pictures, differences between planes
    "Unpack the downloads into a complete tree, or leave nothing"
    src, dst, start = Path(src), Path(dst), time.monotonic()
    plans = plan_extraction(src, dst, n_proc=n_proc, planes=planes, max_member_bytes=max_member_bytes)
    identity = [os.path.realpath(src), [p.name for p in plans], verify, skip_f0]
    work = dst.absolute().parent/f".{dst.name}.partial-{fingerprint(identity, 8)}"
    with _parents(dst), lock(dst):
        _check_target(src, dst) # another run may have finished while this one waited for the lock
        for left in _areas(dst.absolute()):
            if resume and left == work: continue
            log.warning("%s: removing what an interrupted extraction left", left)
            remove_tree(left)
        keep = False
        try:
            (work/"tree").mkdir(parents=True, exist_ok=True)
            job = _Job(src, work, verify, skip_f0, max_member_bytes, threading.Event(), Counter())
            done = _run(plans, job, min(n_proc or cpu_count(), len(plans)))
            report = ExtractReport(str(dst), done, sum(a.files for a in done), sum(a.bytes_out for a in done),
                                   verified=verify, truncated={a.name: a.truncated for a in done if a.truncated})
            try: _compare(report, work/"tree")
            except DataError as e: # the files are whole; what is odd in them is for the index to say
                report.not_compared = str(e)
                log.warning("%s: extracted, but planes and tables could not be compared: %s", dst, e)
            _flush(work)
            with atomic(dst, folder=True, sync=False) as t: os.rename(work/"tree", t)
        except BaseException:
            keep = keep_partial
            raise
        finally:
            if work.exists() and not keep: remove_tree(work)
    report.seconds = round(time.monotonic() - start, 3)
    log.info("%s: %d files, %s in %s", dst, report.files, human_bytes(report.bytes_out), human_time(report.seconds))
    return report

def plan_extraction(
    src: str | os.PathLike, # folder with the downloads
    dst: str | os.PathLike, # new or empty folder
    *,
    n_proc: int | None = None, # archives at a time
    planes: Sequence[str | FocalPlane] | None = None, # only these focal planes; None: all ten downloads
    max_member_bytes: int = MAX_MEMBER, # larger files are refused [byte]
) -> list[ArchivePlan]: # in the order of their names
    "Check everything that can be checked before anything is written"
    src, dst = Path(src), Path(dst)
    wanted = sorted(archive_names(None if planes is None else parse_planes(planes)))
    _check_source(src, wanted)
    if not dst.name: raise TargetNotDirectory(f"{dst}: does not name a folder to be made")
    _check_target(src, dst)
    if n_proc is not None and (not isinstance(n_proc, int) or n_proc < 1):
        raise ConfigError(f"n_proc: must be at least 1, got {n_proc!r}")
    plans = [_plan(src/name, max_member_bytes) for name in wanted]
    _check_room(dst, plans)
    return plans

# %%
folder = tmpdir()
d = folder.__enter__()
make_phantom_dataset(d/"tree", 3, 12, size=32, defects=["truncated", "missing_frames", "no_annotation"])
make_phantom_archives(d/"tree", d/"archives")
report = extract_dataset(d/"archives", d/"extracted", n_proc=2)
files = {p.relative_to(d/"tree"): p.read_bytes() for p in (d/"tree").rglob("*") if p.is_file()}
assert files == {p.relative_to(d/"extracted"): p.read_bytes() for p in (d/"extracted").rglob("*") if p.is_file()}
sorted(os.listdir(d/"extracted")), report.truncated, report.differences, report.no_annotation

# %%
assert len(os.listdir(d/"extracted")) == 10 and report.files == len(files) and report.truncated == \
    {"embryo_dataset.tar.gz": {"AA83-7": 12}}
assert report.no_annotation == ["BM016-5"] and list(report.differences) == ["AA83-9"]
assert sorted(p.name for p in d.iterdir()) == ["archives", "extracted", "tree"]

# %% [markdown]
# One flipped bit in the checksum at the end of an archive, which is what a flipped bit in a picture comes to.
# `extractall` unpacks it without a word; here the target does not appear.

# %%
make_phantom_archives(d/"tree", d/"flipped", fault="trailer", archive="embryo_dataset_F15.tar.gz")
with tarfile.open(d/"flipped"/"embryo_dataset_F15.tar.gz") as tar: tar.extractall(d/"by_tarfile", filter="data")
with raises(BadArchive, match="embryo_dataset_F15.tar.gz is damaged.*Incorrect checksum"):
    extract_dataset(d/"flipped", d/"out")
len(list((d/"by_tarfile").rglob("*.jpeg"))), (d/"out").exists()

# %%
assert sorted(p.name for p in d.iterdir()) == ["archives", "by_tarfile", "extracted", "flipped", "tree"]
with raises(TargetNotEmpty, match="holds embryo_dataset"): extract_dataset(d/"archives", d/"extracted")
with raises(OverlappingPaths): extract_dataset(d/"archives", d/"archives"/"out")
with raises(SourceContentError, match=r"missing=\['embryo_dataset.tar.gz'.*unexpected=\['embryo_dataset'"):
    extract_dataset(d/"tree", d/"out")
with raises(ConfigError, match="n_proc"): extract_dataset(d/"archives", d/"out", n_proc=0)
folder.__exit__(None, None, None)

# %% [markdown]
# ## The command
# `medvol embryo extract ARCHIVES TARGET` does the same; `--dry-run` stops after the checks and tells the plan.

# %%
#| export
def extract(
    src: str | os.PathLike, # folder with the ten downloads and nothing else; never changed
    dst: str | os.PathLike, # new or empty folder
    *,
    workers: int = -1, # archives at a time; -1: one per processor
    n_proc: int | None = None, # the same under its older name
    planes: Sequence[str] = (), # only these focal planes, such as F+00; default: all
    verify: bool = True, # compare checksums and look at the ends of pictures
    resume: bool = False, # take up what an interrupted run finished
    keep_partial: bool = False, # after a failure keep what was finished, for --resume
    skip_f0: bool = False, # leave out folders F0, which repeat the frames of their video
    dry_run: bool = False, # check everything, tell the plan, write nothing
    report: str | os.PathLike | None = None, # write the report here as JSON, outside of the target
) -> dict[str, Any]: # the plan, or the report
    "Unpack the downloads of the embryo data set"
    chosen = list(planes) or None
    if workers != -1 and workers < 1: raise ConfigError(f"workers: must be -1 or at least 1, got {workers}")
    n = n_proc if n_proc is not None else (None if workers == -1 else workers)
    if report is not None and Path(os.path.realpath(report)).is_relative_to(os.path.realpath(dst)):
        raise ConfigError(f"report: {report} lies in the target, which holds the data set and nothing else")
    if dry_run:
        plans = plan_extraction(src, dst, n_proc=n, planes=chosen)
        return {"target": str(dst), "bytes_in": sum(p.bytes_in for p in plans), "files": sum(p.files for p in plans),
                "bytes_out": sum(p.bytes_out for p in plans), "archives": [p._asdict() for p in plans]}
    done = extract_dataset(src, dst, n_proc=n, planes=chosen, verify=verify, resume=resume,
                           keep_partial=keep_partial, skip_f0=skip_f0)
    told = {k: getattr(done, k) for k in done.__dataclass_fields__}
    if report is not None: write_json(report, told)
    return told

# %%
with tmpdir() as d:
    make_phantom_dataset(d/"tree", 2, 8, ["F0"], 24)
    make_phantom_archives(d/"tree", d/"archives")
    plan = extract(d/"archives", d/"out", planes=["F0"], dry_run=True)
    told = extract(d/"archives", d/"out", planes=["F0"], report=d/"report.json")
    names = sorted(os.listdir(d/"out"))
plan["files"], told["files"], names

# %%
assert names == ["embryo_dataset", ANNOTATIONS, GRADES, TIMES] and told["verified"]
