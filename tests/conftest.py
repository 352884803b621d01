"""Shared fixtures: a quiet environment, the real volumes when they are there, the command line in its own process."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("IN_TEST", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Whoever asks for `data_dir` reads real volumes and carries the marker, before -m selects"
    for item in items:
        if "data_dir" in getattr(item, "fixturenames", ()): item.add_marker(pytest.mark.realdata)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    "Folder of the real volumes: MEDVOL_DATA, or ../shared/data beside the checkout"
    folder = Path(os.environ.get("MEDVOL_DATA", ROOT/"../shared/data"))
    if not folder.is_dir(): pytest.skip(f"no real data: {folder} is not a folder. Set MEDVOL_DATA to run this test")
    return folder.resolve()


@pytest.fixture
def run_cli(tmp_path):
    "Run `medvol ...` as users do, in a fresh process and an empty folder; returns the CompletedProcess"
    def run(*args, cwd=tmp_path, timeout=300, env=None) -> subprocess.CompletedProcess:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run([sys.executable, "-m", "medvol_nb.cli", *map(str, args)], cwd=cwd, timeout=timeout,
                              text=True, capture_output=True, env={**os.environ, "PYTHONPATH": path, **(env or {})})
    return run
