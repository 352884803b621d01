"""Rows 20 and 23: similarities that say nothing, points and vectors that are none; damaged or mixed stores."""

import json
import shutil
from dataclasses import replace

import numpy as np

from medvol_nb.core import DataError, MedvolError
from medvol_nb.embed.match import Matcher
from medvol_nb.embed.store import open_embedding, position_embedding, write_embedding
from medvol_nb.geometry import Volume, affine_from

from .rows import SilentlyWrong

SCAN = Volume(np.broadcast_to(np.uint8(0), (48, 40, 36)), affine_from((3.0, 3.0, 3.0)))


def test_row_20_matches_that_mean_nothing(instances):
    "A finite place inside the other scan, a finite score, and a status that is not 'ok'"
    good = position_embedding(SCAN, c=32)
    middle = good.fine.to_world((np.array(good.fine.shape) - 1) / 2)[None]

    def spoiled(value, where=...):
        maps = {h: m.copy() for h, m in good.maps.items()}
        for m in maps.values():
            m[:, *([where] if where is ... else where)] = value
        return replace(good, maps=maps)

    even = spoiled(np.float32(32**-0.5))
    air = np.ones(good.fine.shape, bool)
    air[tuple(slice(n // 2 - 4, n // 2 + 4) for n in air.shape)] = False
    node = tuple(slice(n // 2 - 3, n // 2 + 4) for n in good.fine.shape)
    near = good.fine.to_world(np.array([n // 2 for n in good.fine.shape]))[None]
    cases = {
        "all similarities equal": (even, even, middle, {"flat"}),
        "all equal, fixed points": (even, even, middle, {"flat", "nn_fallback", "translation"}),
        "point outside the volume": (good, good, middle + [5000, 0, 0], {"outside"}),
        "point just outside": (good, good, middle + [0, 0, 5000], {"outside"}),
        "point outside the body": (replace(good, body=air), good, middle, {"background"}),
        "NaN everywhere in the first": (spoiled(np.nan), good, middle, {"invalid"}),
        "NaN everywhere in the second": (good, spoiled(np.nan), middle, {"flat", "not_mutual", "invalid"}),
        "NaN around the point": (spoiled(np.nan, node), good, near, {"invalid"}),
        "infinite vectors": (spoiled(np.inf), good, middle, {"invalid"}),
        "zero vectors in the first": (spoiled(0), good, middle, {"invalid"}),
        "zero vectors in the second": (good, spoiled(0), middle, {"flat", "not_mutual", "invalid"}),
        "zero vectors, fixed points": (spoiled(0), good, middle, {"invalid"}),
    }
    for name, (a, b, point, wanted) in cases.items():
        with instances(name):
            m = Matcher(a, b).match(point, "fixed_point" if "fixed" in name else "mutual")
            numbers = [m.matched, m.score, *(v for v in (m.cycle_mm, m.residual) if v is not None)]
            if not all(np.isfinite(v).all() for v in numbers) or m.status[0] == "ok":
                raise SilentlyWrong(f"{m.status[0]}: {m.matched}, {m.score}")
            assert b.native.contains(m.matched).all() and -1 <= m.score[0] <= 1 and m.status[0] in wanted, m.status
    instances.check(12)


def test_row_23_damaged_or_mixed_stores(instances, tmp_path):
    "Refused, with the store and the reason"
    good = position_embedding(SCAN, c=16)
    write_embedding(good, tmp_path / "good.zarr")
    pts = good.fine.to_world(np.array([[10, 12, 14]]))

    def use(path):
        return Matcher(tmp_path / "good.zarr", path).match(pts)

    def chunk(path, name):
        return next(p for p in sorted((path / name / "c").rglob("*")) if p.is_file())

    def flip(path):
        file = chunk(path, "fine")
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 8
        file.write_bytes(raw)

    def attributes(path):
        meta = path / "zarr.json"
        tree = json.loads(meta.read_text())
        tree["attributes"]["scales"]["fine"] *= 2
        meta.write_text(json.dumps(tree))

    def model(path):
        shutil.rmtree(path)
        write_embedding(replace(good, model="another network"), path)

    def shape(path):
        meta = path / "fine/zarr.json"
        tree = json.loads(meta.read_text())
        tree["shape"][1] -= 1
        meta.write_text(json.dumps(tree))

    damage = {
        "a flipped bit in a chunk": (flip, "damaged"),
        "a chunk cut short": (
            lambda p: chunk(p, "coarse").write_bytes(chunk(p, "coarse").read_bytes()[:-7]),
            "coarse|damaged",
        ),
        "a chunk lost": (lambda p: chunk(p, "fine").unlink(), "chunks of 'fine' are missing"),
        "a map lost": (lambda p: shutil.rmtree(p / "coarse"), "coarse|not a readable"),
        "attributes altered": (attributes, "attributes were altered"),
        "metadata cut short": (lambda p: (p / "zarr.json").write_bytes((p / "zarr.json").read_bytes()[:90]), "bad"),
        "shape altered": (shape, "has shape|missing"),
        "another network": (model, "cannot be compared"),
    }
    for name, (change, words) in damage.items():
        path = tmp_path / "bad.zarr"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "good.zarr", path)
        assert open_embedding(path).model == good.model
        change(path)
        with instances.refuses(name, DataError if "network" in name else MedvolError, "bad.zarr", words):
            use(path)
    instances.check(8)
