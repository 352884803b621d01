"""Fixtures of the rows: the recorder of instances, and the processes that children with a fault are made from."""
import re
from collections.abc import Iterator

import pytest

from .injectors import Zygote
from .rows import Instances


@pytest.fixture
def instances(request, record_property) -> Iterator[Instances]:
    "Recorder of the row that the test is named after"
    row = re.match(r"test_row_(\d\d)_", request.node.name)
    assert row, f"{request.node.name}: tests in this folder are named test_row_NN_short_name"
    out = Instances(int(row[1]), record_property)
    yield out
    assert out.checked or out.problems or not out.data["total"], "the test must end with instances.check(total)"


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    "Children with the heavy packages already imported"
    z = Zygote("torch", "torch._dynamo", "safetensors.torch", "zarr", "zarr.codecs", "zarr.storage", "h5py",
               "isal.isal_zlib", "scipy.spatial.transform", "medvol_nb.volume", "medvol_nb.checkpoints",
               "medvol_nb.parallel", "tests.faults.jobs")
    yield z
    z.close()


@pytest.fixture(scope="session")
def light_zygote() -> Iterator[Zygote]:
    "Children that are made in a millisecond, for many small steps"
    z = Zygote("medvol_nb.parallel", "tests.faults.jobs")
    yield z
    z.close()
