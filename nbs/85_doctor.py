# %% [markdown]
# # Doctor
#
# > Is this environment whole? Versions, devices, extras, disk and memory, checked in one command.
#
# Most requests for help with deep-learning software are about environments: a second install that replaced the CPU
# build of torch, a torchvision that does not match it, a network folder that cannot rename. `medvol doctor` looks at
# these and says which need a hand. It ends with exit code 1 if something is broken, so that a cluster script can ask
# it first.

# %%
#| default_exp doctor

# %%
#| export
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medvol_nb.core import atomic, human_bytes
from medvol_nb.parallel import cpu_count

# %%
from medvol_nb.core import tmpdir

# %% [markdown]
# ## What is installed
# Requirements come from the package's own metadata, so the list cannot go stale. An extra is present when all of its
# packages are there in a version it accepts.

# %%
#| export
def _requirements() -> dict[str, list[str]]:
    "Requirement strings by extra; '' holds what is always needed, those for other systems are left out"
    from packaging.markers import Marker
    out: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("medvol_nb") or []:
        requirement, _, marker = line.partition(";")
        found = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", marker)
        extra = found[1] if found else ""
        if marker and not Marker(marker).evaluate({"extra": extra}): continue
        out.setdefault(extra, []).append(requirement.strip())
    return out

def _check(requirement: str) -> tuple[str, str | None, bool]:
    "Name, installed version and whether it is in range"
    from packaging.requirements import Requirement
    r = Requirement(requirement)
    try: version = importlib.metadata.version(r.name)
    except importlib.metadata.PackageNotFoundError: return r.name, None, False
    return r.name, version, r.specifier.contains(version, prereleases=True)

def _memory() -> int: # [byte] this process may use
    import psutil
    total = psutil.virtual_memory().total
    try: limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError: return total
    return total if limit == "max" else min(total, int(limit))

def _can_publish(folder: Path) -> str | None:
    "Try what every writer of this library relies on; returns the problem, if there is one"
    try:
        with tempfile.TemporaryDirectory(prefix=".medvol-doctor-", dir=folder) as d:
            for _ in range(2):
                with atomic(Path(d)/"file") as t: t.write_text("x")
                with atomic(Path(d)/"folder", folder=True) as t: (t/"a").write_text("x")
    except OSError as e: return f"{folder}: files cannot be written and renamed safely here ({e})"
    return None

# %% [markdown]
# ## What is wrong
# Each check either finds nothing or adds one line that names the remedy.

# %%
#| export
def _first_line(e: Exception) -> str: return (str(e) or type(e).__name__).splitlines()[0]

def _torch(problems: list[str]) -> dict[str, Any]:
    "Build and devices of torch; importing it is the test"
    try: import torch
    except Exception as e: # a library that is not found is an OSError
        problems.append(f"torch does not import: {_first_line(e)}. Install it again: pip install 'torch>=2.8,<2.14'")
        return {"version": None}
    cuda = torch.version.cuda
    names = sorted(d.metadata["Name"] or "" for d in importlib.metadata.distributions())
    nvidia = [n for n in names if n.startswith("nvidia-")]
    if nvidia and cuda is None:
        problems.append(f"{len(nvidia)} NVIDIA packages are installed beside a CPU build of torch. They take several "
                        f"GB for nothing: pip uninstall {' '.join(nvidia)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(k) for k in range(count)]
    if cuda is not None and not gpus and shutil.which("nvidia-smi"):
        problems.append("torch is a CUDA build and nvidia-smi exists, but torch sees no GPU: the driver is older than "
                        "the build, or CUDA_VISIBLE_DEVICES hides it")
    return {"version": torch.__version__, "cuda": cuda, "gpus": gpus, "threads": torch.get_num_threads()}

def _torchvision(problems: list[str]) -> str:
    "A torchvision that does not import also breaks transformers"
    if find_spec("torchvision") is None: return "absent, as it should be"
    try: import torchvision
    except Exception as e:
        problems.append(f"torchvision is installed but does not import ({_first_line(e)}); it also breaks the "
                        "Segment-Anything features. This library does not use it: pip uninstall torchvision")
        return "broken"
    return f"{torchvision.__version__} (not used)"

def doctor(
    folder: str | os.PathLike = ".", # where outputs will go; checked for space and safe renaming
) -> dict: # versions, devices, extras, resources and 'problems', a list of lines
    "Look at the environment and list what needs a hand"
    problems: list[str] = []
    packages, extras = {}, {}
    for extra, requirements in sorted(_requirements().items()):
        found = [_check(r) for r in requirements]
        lacking = [n for n, v, ok in found if not ok]
        if extra == "":
            packages = {n: v for n, v, _ in found}
            problems += [f"{n} {v or 'is missing'}: not a version that works. Install again: pip install medvol_nb"
                         for n, v, ok in found if not ok]
        elif extra not in ("all", "dev", "docs"):
            extras[extra] = "present" if not lacking else f"lacks {', '.join(lacking)}"
    torch = _torch(problems)
    vision = _torchvision(problems)
    folder = Path(folder).resolve()
    if not folder.is_dir(): problems.append(f"{folder} is not a folder")
    elif trouble := _can_publish(folder): problems.append(trouble)
    free = shutil.disk_usage(folder if folder.is_dir() else Path.home()).free
    if free < 5*2**30: problems.append(f"only {human_bytes(free)} free in {folder}")
    return {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu_count(),
            "memory": human_bytes(_memory()), "disk_free": human_bytes(free), "torch": torch, "torchvision": vision,
            "extras": extras, "packages": packages, "problems": problems, "ok": not problems}

# %%
with tmpdir() as d: found = doctor(d)
found["torch"], found["extras"], found["problems"]

# %%
assert found["ok"] == (not found["problems"]) and found["packages"]["numpy"] and found["cpu"] >= 1
assert any("is not a folder" in p for p in doctor("no/such/folder")["problems"])
