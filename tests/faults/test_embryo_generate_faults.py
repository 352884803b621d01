"""Generation under faults: no GPU, a full disk, awkward prompts, death in the middle of ten thousand images."""
import json
import os
import re
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medvol_nb import phantoms
from medvol_nb.core import ConfigError, DiskFull, read_json
from medvol_nb.embryo.diffusion import read_pictures
from medvol_nb.embryo.finetune import finetune
from medvol_nb.embryo.generate import RunSpec, SyntheticRuns, generate, write_run
from medvol_nb.embryo.tiny import make_tiny_sd

from .injectors import forked
from .jobs import content
from .rows import SilentlyWrong

SIDE = 16


def draw(seeds) -> np.ndarray:
    "Cheap images that belong to their seeds; every seventh is black"
    bits = np.array([[s % 7 > 0 and (s + 3)*(k + 7)*2654435761 % 251 for k in range(SIDE*SIDE)] for s in seeds])
    return np.repeat((bits/251).reshape(-1, SIDE, SIDE, 1), 3, -1).astype(np.float32)


def run(folder: Path, n: int, prompt: str = "x", resume: bool = True) -> dict:
    spec = RunSpec("t4", "F+00", prompt, "weights", num_images=n, batch_size=8)
    return write_run(folder, spec, draw, resume=resume)


class Full:
    "From the write with number `at` on, counted below `folder`, no file can grow"
    def __init__(self, folder: Path, at: int):
        self.folder, self.at, self.count = str(folder), at, 0
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if event != "open" or not str(args[0]).startswith(self.folder): return
        if not (isinstance(args[1], str) and re.search("[wax+]", args[1])): return
        self.count += 1
        if self.count == self.at: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(1)[1]))


def full_at(folder: Path, n: int, at: int, said: Path) -> None:
    "A job whose disk is full from its write number `at` on; what was raised goes to `said`, on another disk"
    with open(said, "w") as f, open(f"{said}.pid", "w"):
        Full(folder, at)
        try: run(folder, n)
        except DiskFull as e: told = str(e)
        else: told = "nothing was raised"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(1)[1],)*2)
        f.write(told)


def captions(folder: Path, text: str, layout: str) -> tuple[str, ...]:
    "Captions of a folder whose pictures all have the same text"
    (folder/"images").mkdir(parents=True)
    Image.fromarray(phantoms.embryo_frame(3, 32)).save(folder/"images"/"0.jpeg")
    if layout == "hf":
        (folder/"metadata.jsonl").write_text(json.dumps({"file_name": "images/0.jpeg", "text": text}) + "\n")
    else:
        (folder/"descriptions").mkdir()
        (folder/"descriptions"/"0.txt").write_text(text + "\n")
    return read_pictures(folder).captions


# ---------------------------------------------------------------- 39

@pytest.mark.parametrize("n", [pytest.param(300, id="300_images"),
                               pytest.param(10_000, id="10000_images", marks=pytest.mark.slow)])
def test_row_39_generation(n, instances, tmp_path):
    "No GPU, a full disk, awkward prompts, a kill at 37 %: refused before anything, or the same images and exactly n"
    tiny = make_tiny_sd(tmp_path/"tiny", channels=(32, 32))
    (tmp_path/"none").mkdir()
    no_gpu = "cuda" if not torch.cuda.is_available() else "cuda:99"
    with instances.refuses("training without the GPU", ConfigError, "device|GPU"):
        captions(tmp_path/"f", "at phase t2", "split")
        finetune(model=str(tiny), image_folder=tmp_path/"f", output_dir=tmp_path/"none", run_name="r", device=no_gpu)
    with instances.refuses("drawing without the GPU", ConfigError, "GPU"):
        generate(phase=["t2"], dataset_name="r", synthetic_dataset_parent=tmp_path/"none", model_path=tiny,
                 device=no_gpu)
    assert os.listdir(tmp_path/"none") == []

    few = tmp_path/"few"
    run(few, 40)
    for at in (1, 3, 41, 42): # the first record, an image, one of the second attempts, the last record
        with instances(f"disk full at write {at}"):
            folder = tmp_path/f"full-{at}"
            forked(lambda: full_at(folder, 40, at, tmp_path/f"said-{at}"), folder) # noqa: B023
            said = (tmp_path/f"said-{at}").read_text()
            assert re.search("no room", said), said
            there = content(folder) or {}
            record = json.loads(there.pop("metadata.json", b"{}"))
            assert not record.get("complete") and not [k for k in there if k.startswith(".")]
            if any(v != (few/k).read_bytes() for k, v in there.items()): raise SilentlyWrong("other images")
            run(folder, 40)
            same_run(folder, few, 40)

    for k, text in enumerate(("line one\nline two", 'an "embryo", so called, at \'t4\'', "comma, comma,, and {brace",
                              "µm – 胚 \t tab \\n")):
        with instances(f"prompt {text!r}"):
            folder = tmp_path/f"prompt-{k}"
            about = run(folder, 2, text)
            assert about["prompt"] == read_json(folder/"metadata.json")["prompt"] == text
            assert run(folder, 2, text)["prompt"] == text # resumed
            for layout in ("split", "hf"): assert captions(tmp_path/f"c-{k}-{layout}", text, layout) == (text,)

    with instances(f"{n} images, killed at 37 %"):
        run(tmp_path/"whole", n)
        steps = forked(lambda: run(tmp_path/"count", n), tmp_path/"count")
        assert forked(lambda: run(tmp_path/"cut", n), tmp_path/"cut", int(0.37*steps)) < 0
        done = len([p for p in (tmp_path/"cut").iterdir() if p.suffix == ".jpg"])
        assert 0.3*n < done < 0.45*n
        run(tmp_path/"cut", n)
        same_run(tmp_path/"cut", tmp_path/"whole", n)
    with instances("the same seed again"): same_run(tmp_path/"count", tmp_path/"whole", n)
    instances.check(12)


def same_run(folder: Path, want: Path, n: int) -> None:
    "Exactly n images, the same bytes, the same record but for its time, nothing else left"
    a, b = content(folder), content(want)
    records = [json.loads(c.pop("metadata.json")) | {"datetime": ""} for c in (a, b)]
    assert len(a) == n and len(SyntheticRuns(folder)) == n and records[0] == records[1] and records[0]["complete"]
    if a != b: raise SilentlyWrong(f"{sum(a[k] != b.get(k) for k in a)} of {n} images differ")
    assert not folder.with_name(folder.name + ".lock").exists()
