"""Rows 24 and 25: matches that determine nothing, lie or are mirrored; file names that a shell would stumble over."""

import os
import stat

import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.core import DataError, read_json, rng_for
from medvol_nb.embed.deform import register_deformable
from medvol_nb.embed.register import register
from medvol_nb.embed.transforms import estimate_transform, read_transform
from medvol_nb.geometry import Volume, affine_from, to_world
from medvol_nb.volume import write_volume

from .rows import SilentlyWrong

NAMES = [
    "two words", " begins and ends ", "it's", 'say "ah"', "a;touch x", "a && touch x", "$(touch x)", "`touch x`",
    "a|touch x", "a>x", "a\nb", "a\tb", "ärzte_Σ_肺", "-rf", "--help", "*?[a]", "a\\b", "%s%n", "~", "n" * 242,
]  # fmt: skip


def pushed(turn: float = 0.0) -> np.ndarray:
    m = np.eye(4)
    m[:2, :2] = np.cos(turn), -np.sin(turn)
    m[1, :2] = np.sin(turn), np.cos(turn)
    m[:3, 3] = 20, -10, 5
    return m


def test_row_24_matches_that_mislead(instances):
    "A status that says so, or the right transform; never a mirror"
    rng = rng_for(0, "row 24")
    q = rng.uniform(-100, 100, (200, 3))
    true = pushed(0.2)
    k = to_world(true, q)
    lies = rng.random(200) < 0.6
    wild, shifted = (np.where(lies[:, None], v, k) for v in (rng.uniform(-150, 150, q.shape), k + (60, 0, 0)))
    bent = to_world(true, np.where(lies[:, None], q[rng.permutation(200)], q))
    few = {"no match": 0, "two matches": 2, "three matches": 3}
    for name, n in few.items():
        with instances(name):
            e = estimate_transform(q[:n], k[:n])
            if e.status != "failed": raise SilentlyWrong(f"{e.status}: {e.matrix}")
            assert e.reason and (e.matrix == np.eye(4)).all()
    line, point = q[:, :1] * (1.0, 0.5, 0.2), np.tile(q[:1], (200, 1))
    thin = {"on one line": line, "one point": point, "one plane": q * (1, 1, 0)}
    for name, p in thin.items():
        with instances(name):
            e = estimate_transform(p, to_world(pushed(), p))
            if e.status == "ok": raise SilentlyWrong(str(e.matrix))
            assert e.reason and np.linalg.det(e.matrix[:3, :3]) > 0
            assert np.abs(to_world(e.matrix, p) - to_world(pushed(), p)).max() < 0.1
    for name, told in {"60 % anywhere": wild, "60 % of other points": bent}.items():
        with instances(name):
            e = estimate_transform(q, told)
            off = np.linalg.norm(to_world(e.matrix, q) - k, axis=1).max()
            if e.status == "ok" and off > 1: raise SilentlyWrong(f"{off:.1f} mm")
            assert e.status == "ok" and not (e.inliers & lies & (np.linalg.norm(told - k, axis=1) > 12)).any()
    for name, p in {"mirrored": q, "mirrored, 30 mm thick": q * (0.15, 1, 1)}.items():
        with instances(name):
            e = estimate_transform(p, p * (-1, 1, 1))
            if np.linalg.det(e.matrix[:3, :3]) <= 0: raise SilentlyWrong(f"{e.status}, mirrored")
            assert e.status == "failed" and "mirror" in e.reason
    assert estimate_transform(q, shifted).status == "ok"  # most of the pairs agree, on the wrong place: not ours to see
    instances.check(10)


@pytest.fixture
def pair():
    head = Volume(phantoms.head((24, 27, 23), spacing=8.0).img, affine_from(8.0))
    return head, Volume(head.data, affine_from(8.0, (6, -6, 0)))


def test_row_25_names_a_shell_would_read(instances, tmp_path, pair):
    "Registered under that very name, and nothing else appears; a name too long for its results is told at once"
    images, out = tmp_path / "a b;touch x" / "$(touch x)'", tmp_path / "out; touch x"
    images.mkdir(parents=True)
    for name in NAMES:
        for end, v in zip(("0000", "0001"), pair):
            write_volume(v, images / f"{name}_{end}.nii.gz")
    register(images, out, deformable=False, spacing=8.0, max_angle=5)
    for name in NAMES:
        with instances(name):
            assert read_json(out / f"{name}_report.json")["status"] != "failed"
            field = read_transform(out / f"{name}_field.nii.gz")
            point = to_world(pair[0].affine, np.array([[12, 13, 11]]))
            assert np.abs(field(point) - point - (6, -6, 0)).max() < 2
    assert not list(tmp_path.rglob("x")) and {p.name for p in tmp_path.iterdir()} == {"a b;touch x", "out; touch x"}
    assert len(list(out.iterdir())) == 5 * len(NAMES) + 2  # and the ledger and the table of failures
    longest = tmp_path / ("n" * 248 + ".nii.gz")
    write_volume(pair[1], longest)
    with pytest.raises(DataError, match="255 bytes.*shorter"):
        register(images / "it's_0000.nii.gz", tmp_path / "none", longest)
    assert not (tmp_path / "none").exists()
    instances.check(20)


def test_row_25_programs_are_called_without_a_shell(tmp_path, pair):
    "An installed deeds in a folder with such a name"
    place = tmp_path / "my tools;touch x"
    place.mkdir()
    tool = place / "deeds BCV"
    tool.write_text("#!/bin/sh\nfor a; do last=$a; done\nprintf '%s\\n' \"$@\" > \"$(dirname \"$0\")/seen\"\nexit 3\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(Exception, match="deeds ended with 3"):
        register_deformable(*pair, spacing=8.0, engine="deeds", deeds=tool)
    assert (place / "seen").read_text().splitlines()[0] == "-F" and os.listdir(tmp_path) == ["my tools;touch x"]
