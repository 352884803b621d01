"Literal versions of the published algorithms, as oracles of tests and references of benchmarks"
import csv
import random
import tarfile
from pathlib import Path


def extract_all(archives: list[Path], target: Path) -> None:
    "One archive after the other through tarfile, as published"
    for p in archives:
        with tarfile.open(p) as tar: tar.extractall(target)


def _one(archive: Path, target: Path) -> None: extract_all([archive], target)


def extract_in_processes(archives: list[Path], target: Path) -> None:
    "One process for each archive, whatever the number of processors, as published"
    import multiprocessing
    jobs = [multiprocessing.get_context("fork").Process(target=_one, args=(p, target)) for p in archives]
    for j in jobs: j.start()
    for j in jobs: j.join()


def index_by_iteration(root: Path, planes: list[str]) -> list[tuple]:
    "Directory iteration, a look at every entry, and pandas for every table"
    import pandas as pd
    rows = []
    for plane in planes:
        for video in sorted((root/plane).iterdir()):
            frames = []
            for p in video.iterdir():
                if not p.is_file(): continue
                assert p.suffix == ".jpeg"
                frames.append(int(p.stem.rpartition("RUN")[2]))
            table = pd.read_csv(root/"embryo_dataset_annotations"/f"{video.name}_phases.csv", header=None)
            found = [(str(a), int(b), int(c)) for a, b, c in table.itertuples(index=False)]
            rows.append((plane, video.name, sorted(frames), found))
    return rows


def folder_by_encoding(items: list[tuple[Path, str, str, str]], folder: Path) -> None:
    "Decode each picture, encode it again, write its sentence and the table"
    from PIL import Image
    (folder/"images").mkdir(parents=True)
    (folder/"descriptions").mkdir()
    with open(folder/"metadata.csv", "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["filename", "label", "phase"])
        for i, (source, prompt, label, phase) in enumerate(items):
            Image.open(source).convert("L").save(folder/"images"/f"{i}.jpeg")
            (folder/"descriptions"/f"{i}.txt").write_text(prompt + "\n")
            w.writerow([f"{i}.jpeg", label, phase])


def split_by_rarity(phases: dict[str, list[str]], weights: list[float], seed: int) -> list[list[str]]:
    "The published split, in the words of its description: rarest phase, shuffle, cut, forget, again"
    rng, sets = random.Random(seed), [[] for _ in weights]
    table: dict[str, list[str]] = {}
    for video in phases:
        for p in phases[video]: table[p] = table.get(p, []) + [video]
    while table:
        phase, videos = next(iter(sorted(table.items(), key=lambda kv: len(kv[1]))))
        videos = videos[:]
        rng.shuffle(videos)
        edge, total = 0.0, sum(weights)
        start = 0
        for s, w in zip(sets, weights):
            edge += w/total
            stop = round(edge*len(videos))
            assert stop > start, phase
            s.extend(videos[start:stop])
            start = stop
        for p in list(table):
            table[p] = [v for v in table[p] if v not in videos]
            if not table[p]: del table[p]
    return sets
