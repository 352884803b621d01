# %% [markdown]
# # Points in files
#
# > `medvol embedding match`: a file of points in, the same points in another scan out, in the format they came in.
#
# Landmarks are clicked in 3D Slicer, exported from a script, or listed in a text file for elastix, and each program has
# its own idea of where left is. Inside this library a point is a world position in mm, right, anterior and superior
# positive (RAS+). This page reads the usual files into that and writes them back. What a file does not say is not
# guessed: coordinates that are voxel numbers are refused.

# %%
#| default_exp embed.points

# %%
#| export
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import (DataError, FormatError, MissingFile, OnExists, check_output, read_csv, read_json, write_csv,
                            write_json, write_text)
from medvol_nb.embed.match import Calibration, Matcher, checked_points
from medvol_nb.embed.model import load_embedder
from medvol_nb.embed.store import Embedding, embed_volume, open_embedding, same_model

# %%
import tempfile

from medvol_nb import phantoms
from medvol_nb.core import close, raises
from medvol_nb.embed.store import position_embedding, write_embedding
from medvol_nb.geometry import Volume, affine_from

# %% [markdown]
# ## Five formats
# | suffix | written by | axes |
# |---|---|---|
# | `.csv` | tables with columns x, y, z, and name if there is one | RAS |
# | `.json` | scripts: `{"points": [{"name": ..., "xyz": [...]}], "space": "RAS"}`, or triples | as it says, else RAS |
# | `.mrk.json` | 3D Slicer | as it says: LPS or RAS |
# | `.fcsv` | 3D Slicer before 5 | as it says, 0 is RAS and 1 is LPS |
# | `.txt`, `.pts` | elastix and transformix: `point`, the number, one row a point | LPS |

# %%
#| export
_LPS = np.array([-1.0, -1.0, 1.0])
_SPACES = {"RAS": np.ones(3), "0": np.ones(3), "LPS": _LPS, "1": _LPS}
POINT_FILES = (".mrk.json", ".json", ".csv", ".fcsv", ".txt", ".pts")

@dataclass(frozen=True, eq=False)
class Points:
    "Named world positions"
    xyz: np.ndarray # (n, 3) float64, RAS+ [mm]
    names: tuple[str, ...] # one a point
    def __len__(self) -> int: return len(self.xyz)

def _suffix(path: str | os.PathLike) -> str:
    found = next((s for s in POINT_FILES if os.fspath(path).lower().endswith(s)), None)
    if found is None: raise FormatError(f"{path}: unknown kind of point file. Supported: {' '.join(POINT_FILES)}")
    return found

def _space(name: Any, where: str) -> np.ndarray:
    sign = _SPACES.get(str(name).strip().upper())
    if sign is None: raise DataError(f"{where}: coordinates are {name!r}; world positions in RAS or LPS are needed")
    return sign

def _triple(values: Any, where: str) -> list[float]:
    try: out = [float(v) for v in values]
    except (TypeError, ValueError): out = []
    if len(out) != 3 or not np.isfinite(out).all():
        raise FormatError(f"{where}: three numbers are needed, got {str(values)[:60]}")
    return out

def _from_json(tree: Any, where: str) -> tuple[list, list, np.ndarray]:
    "Positions, names and signs of the axes, from a plain list or a Slicer markup"
    if isinstance(tree, dict) and "markups" in tree:
        if not isinstance(tree["markups"], list) or len(tree["markups"]) != 1:
            raise DataError(f"{where}: one list of markups is needed, got {len(tree['markups'])}")
        m = tree["markups"][0]
        points = m.get("controlPoints", []) if isinstance(m, dict) else None
        if not isinstance(points, list) or not all(isinstance(c, dict) for c in points):
            raise FormatError(f"{where}: control points must be a list of objects")
        found = [c for c in points if c.get("positionStatus", "defined") == "defined"]
        names = [str(c.get("label") or c.get("id") or k + 1) for k, c in enumerate(found)]
        return [c.get("position") for c in found], names, _space(m.get("coordinateSystem", "LPS"), where)
    space = tree.get("space", "RAS") if isinstance(tree, dict) else "RAS"
    items = tree.get("points") if isinstance(tree, dict) else tree
    if not isinstance(items, list): raise FormatError(f"{where}: a list of points, or an object with it, is needed")
    names = [str(i.get("name", k + 1)) if isinstance(i, dict) else str(k + 1) for k, i in enumerate(items)]
    return [i.get("xyz") if isinstance(i, dict) else i for i in items], names, _space(space, where)

def read_points(
    path: str | os.PathLike, # .csv, .json, .mrk.json, .fcsv, .txt or .pts file
) -> Points: # in the order of the file
    "Read world positions from a file"
    kind, where = _suffix(path), str(path)
    if kind.endswith("json"): rows, names, sign = _from_json(read_json(path), where)
    elif kind == ".csv":
        table = read_csv(path, ("x", "y", "z"))
        rows, sign = [[r[a] for a in "xyz"] for r in table], np.ones(3)
        names = [r.get("name") or str(k + 1) for k, r in enumerate(table)]
    else:
        if not Path(path).exists(): raise MissingFile(f"{path} does not exist")
        try: lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError: raise FormatError(f"{where}: is not UTF-8 text") from None
        rows, names, sign = (_from_fcsv if kind == ".fcsv" else _from_text)(lines, where)
    xyz = np.array([_triple(r, f"{where}, point {k + 1}") for k, r in enumerate(rows)]).reshape(-1, 3)
    return Points(xyz*sign, tuple(names))

def _from_fcsv(lines: Sequence[str], where: str) -> tuple[list, list, np.ndarray]:
    head = " ".join(l for l in lines if l.startswith("#"))
    space = re.search(r"CoordinateSystem\s*=\s*(\w+)", head)
    columns = re.search(r"columns\s*=\s*(\S+)", head)
    names = columns[1].split(",") if columns else ["id", "x", "y", "z"]
    rows = [l.split(",") for l in lines if l.strip() and not l.startswith("#")]
    at = [names.index(a) if a in names else -1 for a in "xyz"]
    if min(at) < 0 or any(len(r) <= max(at) for r in rows): raise FormatError(f"{where}: columns x, y, z are missing")
    label = names.index("label") if "label" in names else 0
    return ([[r[a] for a in at] for r in rows], [r[label] if label < len(r) and r[label] else str(k + 1)
            for k, r in enumerate(rows)], _space(space[1] if space else "RAS", where))

def _from_text(lines: Sequence[str], where: str) -> tuple[list, list, np.ndarray]:
    if not lines or lines[0].strip() != "point":
        raise DataError(f"{where}: first line is {lines[0].strip()[:20]!r}; 'point' is needed, with positions in mm"
                        if lines else f"{where}: empty")
    rows = [l.split() for l in lines[2:] if l.strip()]
    if len(lines) < 2 or not lines[1].strip().isdigit() or int(lines[1]) != len(rows):
        said = lines[1].strip()[:20] if len(lines) > 1 else "nothing"
        raise FormatError(f"{where}: line 2 promises {said}, found {len(rows)} points")
    return rows, [str(k + 1) for k in range(len(rows))], _LPS

# %%
#| export
def write_points(
    path: str | os.PathLike, # the suffix decides the format
    xyz: np.ndarray, # (n, 3) RAS+ [mm]
    names: Sequence[str] = (), # one a point; default: their numbers
    extra: Sequence[Mapping[str, Any]] = (), # more about each point; kept as columns, members or descriptions
    on_exists: OnExists = "error", # what to do when `path` is there already
) -> Path: # `path`
    "Write world positions to a file"
    kind, pts = _suffix(path), checked_points(np.reshape(xyz, (-1, 3)))
    names = [str(n) for n in names] if len(names) else [str(k + 1) for k in range(len(pts))]
    extra = list(extra) or [{}]*len(pts)
    if not len(names) == len(extra) == len(pts): raise DataError(f"{path}: {len(pts)} points, {len(names)} names")
    if kind == ".csv":
        rows = [{"name": n, **dict(zip("xyz", p.tolist())), **e} for n, p, e in zip(names, pts, extra)]
        return write_csv(path, rows, None if rows else ["name", "x", "y", "z"], on_exists=on_exists)
    if kind == ".json":
        items = [{"name": n, "xyz": p.tolist(), **e} for n, p, e in zip(names, pts, extra)]
        return write_json(path, {"space": "RAS", "unit": "mm", "points": items}, on_exists)
    if kind in (".txt", ".pts"):
        lines = ["point", str(len(pts)), *(" ".join(f"{v:.6f}" for v in p*_LPS) for p in pts)]
        return write_text(path, "\n".join(lines) + "\n", on_exists)
    notes = [" ".join(f"{k}={v}" for k, v in e.items()) for e in extra]
    if kind == ".fcsv":
        if bad := next((n for n in names if "," in n or "\n" in n), None):
            raise DataError(f"{path}: the name {bad!r} cannot be stored in .fcsv, use .mrk.json")
        rows = [f"{k + 1},{p[0]:.6f},{p[1]:.6f},{p[2]:.6f},0,0,0,1,1,1,0,{n},{note}," for k, (p, n, note)
                in enumerate(zip(pts, names, notes))]
        head = ["# Markups fiducial file version = 4.11", "# CoordinateSystem = RAS",
                "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"]
        return write_text(path, "\n".join([*head, *rows]) + "\n", on_exists)
    points = [{"id": str(k + 1), "label": n, "description": note, "position": (p*_LPS).tolist(),
               "positionStatus": "defined"} for k, (p, n, note) in enumerate(zip(pts, names, notes))]
    schema = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    return write_json(path, {"@schema": schema + "markups-schema-v1.0.3.json#", "markups": [
        {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": points}]}, on_exists)

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
some = np.array([[10.5, -20.25, 300], [0, 1, -2]])
for suffix in POINT_FILES: write_points(root/f"p{suffix}", some, ["apex", "carina"], [{"score": 0.9}, {"score": 0.8}])
(root/"p.txt").read_text().splitlines()

# %%
for suffix in POINT_FILES:
    again = read_points(root/f"p{suffix}")
    assert close(again.xyz, some, 1e-6) and (suffix in (".txt", ".pts") or again.names == ("apex", "carina"))
with raises(DataError, match="'point' is needed"): read_points(write_text(root/"i.txt", "index\n1\n1 2 3\n"))
with raises(DataError, match="coordinates are 'IJK'"):
    read_points(write_text(root/"i.fcsv", "# CoordinateSystem = IJK\n1,2,3,4\n"))
with raises(FormatError, match="point 2: three numbers"): read_points(write_json(root/"b.json", [[1, 2, 3], [1, 2]]))

# %% [markdown]
# ## One command
# Scans or stores in, points out. A scan is embedded on the fly, a store is opened. The suffix of `out` decides the
# format of the result: the matched positions, with what they say about themselves beside them where it has room.

# %%
#| export
def _embedding(source: str | os.PathLike, model: str | os.PathLike | None, device: str) -> Embedding:
    "A store opened, or a scan embedded"
    is_store = os.fspath(source).rstrip("/").endswith(".zarr") and (Path(source)/"fine").is_dir()
    if is_store:
        emb = open_embedding(source)
        if model is not None: same_model(emb.model, load_embedder(model, "cpu")[1].digest, str(source))
        return emb
    if not Path(source).exists(): raise MissingFile(f"{source} does not exist")
    if model is None: raise DataError(f"{source}: is a scan; to embed it a model is needed (--model)")
    net, cfg = load_embedder(model, device)
    return embed_volume(net, source, config=cfg, device=device)

def match(
    query: str | os.PathLike, # scan the points are in, or its embedding
    key: str | os.PathLike, # scan they are looked for in, or its embedding
    points: str | os.PathLike, # .csv, .json, .mrk.json, .fcsv, .txt or .pts file of positions in the first
    out: str | os.PathLike, # file of positions in the second; the suffix decides the format
    *,
    model: str | os.PathLike | None = None, # run folder or weights, to embed scans
    mode: Literal["nn", "mutual", "fixed_point"] = "mutual", # nearest; with the way back; from points around
    min_score: float | None = None, # mean cosine below which a match is flagged
    cycle_mm: float = 12.0, # longest way back of a mutual match [mm]
    calibration: str | os.PathLike | None = None, # .json file, gives matches a probability
    coarse_weight: float = 1.0, # of the coarse cosine in the mean; others have 1
    body: bool = True, # matches lie in the body, where that is known
    device: str = "auto", # where to compute
    on_exists: OnExists = "error", # what to do when `out` is there already
) -> dict: # numbers of matches by status, and the file
    "Find the points of one scan in another"
    pts = read_points(points)
    _suffix(out)
    if not check_output(out, on_exists, inputs=[query, key, points]): return {"out": Path(out), "skipped": True}
    cal = None if calibration is None else Calibration.load(calibration)
    matcher = Matcher(_embedding(query, model, device), _embedding(key, model, device), coarse_weight=coarse_weight,
                      restrict_to_body=body, calibration=cal, device=device)
    m = matcher.match(pts.xyz, mode, min_score=min_score, cycle_mm=cycle_mm)
    write_points(out, m.matched, pts.names, [_about(r) for r in m.rows()], "overwrite")
    states, counts = np.unique(m.status, return_counts=True)
    return {"points": len(m), **{str(s): int(c) for s, c in zip(states, counts)}, "out": Path(out)}

def _about(row: Mapping[str, Any]) -> dict[str, Any]:
    "Of a row of matches, what is not the place"
    own = {"x": "query_x", "y": "query_y", "z": "query_z"}
    return {own.get(k, k): v for k, v in row.items() if not k.startswith("matched_")}

# %%
body = phantoms.abdomen((32, 24, 28), seed=1)
scan = Volume(body.img, affine_from((5.0, 5.0, 6.0)))
write_embedding(position_embedding(scan), root/"a.zarr")
write_embedding(position_embedding(scan, lambda p: p - [12, 0, 6]), root/"b.zarr")
inner = position_embedding(scan).fine.to_world(np.array([[20, 15, 18], [14, 12, 20], [22, 18, 14]]))
write_points(root/"in.mrk.json", inner, ["a", "b", "c"])
match(root/"a.zarr", root/"b.zarr", root/"in.mrk.json", root/"out.csv", device="cpu")

# %%
moved = read_points(root/"out.csv")
assert np.abs(moved.xyz - inner - [12, 0, 6]).max() < 1 and moved.names == ("a", "b", "c")
with raises(DataError, match="to embed it a model is needed"):
    match(root/"p.csv", root/"b.zarr", root/"in.mrk.json", root/"o2.csv")
place.cleanup()
