"""Page 85: a whole environment has no problems, a broken one says which and ends with exit code 1."""
import json
import os
import platform
from pathlib import Path

import pytest
import torch

from medvol_nb import doctor as page
from medvol_nb.core import DiskFull
from medvol_nb.doctor import doctor


def package(folder, name, text):
    (folder/name).mkdir(parents=True)
    (folder/name/"__init__.py").write_text(text)


def metadata(folder, name, version, requires=()):
    info = folder/f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info/"METADATA").write_text("\n".join(lines + [f"Requires-Dist: {r}" for r in requires]) + "\n")


TORCH = """
from types import SimpleNamespace
__version__, version, cuda = "2.13.0", SimpleNamespace(cuda=None), SimpleNamespace(is_available=lambda: False)
def get_num_threads(): return 1
"""


@pytest.fixture
def sick(run_cli, tmp_path):
    "Run `medvol doctor --json` with a folder of fake packages in front, a quick torch among them"
    def run(*words, real=False):
        if not real and not (tmp_path/"fake"/"torch").exists(): package(tmp_path/"fake", "torch", TORCH)
        path = os.pathsep.join([str(tmp_path/"fake"), str(Path(__file__).parents[1])])
        (tmp_path/"here").mkdir()
        done = run_cli("doctor", *words, "--json", cwd=tmp_path/"here", env={"PYTHONPATH": path, "PYTHONSAFEPATH": "1"})
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)
    return run


def test_this_environment_is_whole(sick, tmp_path):
    code, found = sick(real=True)
    assert (code, found["problems"], found["ok"]) == (0, [], True)
    assert found["python"] == platform.python_version() and found["torch"]["version"] == torch.__version__
    assert found["packages"]["numpy"] and found["cpu"] >= 1 and "iB" in found["memory"] and "iB" in found["disk_free"]
    assert all(v == "present" or v.startswith("lacks ") for v in found["extras"].values())
    assert "demo" in found["extras"] and list((tmp_path/"here").iterdir()) == []


def test_a_broken_torchvision(sick, tmp_path):
    "The usual one: built against another torch"
    package(tmp_path/"fake", "torchvision", "raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    code, found = sick()
    assert code == 1 and not found["ok"] and found["torchvision"] == "broken"
    assert "torchvision::nms does not exist)" in found["problems"][0]
    assert "pip uninstall torchvision" in found["problems"][0]


def test_a_torchvision_that_works_is_only_mentioned(sick, tmp_path):
    package(tmp_path/"fake", "torchvision", "__version__ = '0.99'")
    code, found = sick()
    assert (code, found["torchvision"], found["problems"]) == (0, "0.99 (not used)", [])


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "OSError"])
def test_a_torchvision_that_fails_without_a_word(sick, tmp_path, error):
    package(tmp_path/"fake", "torchvision", f"raise {error}")
    code, found = sick()
    assert code == 1 and "pip uninstall torchvision" in found["problems"][0]


@pytest.mark.parametrize("error", ["ImportError('libc10.so: cannot open')", "OSError('libcudart.so: cannot open')"])
def test_a_torch_that_does_not_import(sick, tmp_path, error):
    package(tmp_path/"fake", "torch", f"raise {error}")
    code, found = sick()
    assert code == 1 and found["torch"]["version"] is None
    assert [p for p in found["problems"] if "torch does not import" in p and "cannot open" in p and "pip install" in p]


def test_nvidia_packages_beside_a_cpu_build(sick, tmp_path):
    for name in ("nvidia-cublas-cu12", "nvidia-cudnn-cu12"): metadata(tmp_path/"fake", name, "9.1")
    code, found = sick()
    assert code == 1 and "pip uninstall nvidia-cublas-cu12 nvidia-cudnn-cu12" in found["problems"][0]


def test_versions_that_do_not_work(sick, tmp_path):
    metadata(tmp_path/"fake", "medvol_nb", "9.9", ["numpy<1", "no-such-package>=2", 'other-absent; extra == "gen"',
                                                   "pydantic; extra == 'demo'"])
    code, found = sick()
    assert code == 1 and len(found["problems"]) == 2
    assert any("numpy" in p and "not a version that works" in p for p in found["problems"])
    assert any("no-such-package is missing" in p for p in found["problems"])
    assert found["extras"] == {"demo": "present", "gen": "lacks other-absent"}


def test_a_requirement_for_other_systems_is_no_problem(sick, tmp_path):
    metadata(tmp_path/"fake", "medvol_nb", "9.9", ['no-such-package; sys_platform == "win32"', "numpy"])
    code, found = sick()
    assert (code, found["problems"]) == (0, [])


def test_places(tmp_path, monkeypatch):
    assert any("is not a folder" in p for p in doctor(tmp_path/"absent")["problems"])
    (tmp_path/"file").write_text("")
    assert any("file is not a folder" in p for p in doctor(tmp_path/"file")["problems"])
    def full(*a, **k): raise DiskFull(28, "no room")
    monkeypatch.setattr(page, "atomic", full)
    assert any("cannot be written and renamed safely" in p for p in doctor(tmp_path)["problems"])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_little_room(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 3*2**30})
    monkeypatch.setattr(page.shutil, "disk_usage", lambda p: usage)
    assert any("only 3.0 GiB free" in p for p in doctor(tmp_path)["problems"])


def test_the_list_for_people(run_cli):
    run = run_cli("doctor")
    assert run.returncode in (0, 1) and "torch:\n  version: " in run.stdout and "problems: " in run.stdout
