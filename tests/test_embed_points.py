"""Point files of five kinds, and the command that matches them."""

import numpy as np
import pytest

from medvol_nb.core import DataError, FormatError, MedvolError, rng_for
from medvol_nb.embed.points import POINT_FILES, match, read_points, write_points
from medvol_nb.embed.store import position_embedding, write_embedding
from medvol_nb.geometry import Volume, affine_from

PTS = np.array([[10.5, -20.25, 300.125], [0, 0, 0], [-1e3, 2, 1e-3]])


@pytest.mark.parametrize("suffix", POINT_FILES)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_round_trip(tmp_path, suffix, n):
    write_points(tmp_path / f"p{suffix}", PTS[:n], extra=[{"score": 0.5}] * n)
    back = read_points(tmp_path / f"p{suffix}")
    assert back.xyz.shape == (n, 3) and np.abs(back.xyz - PTS[:n]).max(initial=0) < 1e-5
    assert back.names == tuple(str(k + 1) for k in range(n))


def test_slicer_axes(tmp_path):
    "LPS and RAS files of the same point, as Slicer 4 and 5 write them"
    (tmp_path / "a.fcsv").write_text(
        "# Markups fiducial file version = 4.10\n# CoordinateSystem = 0\n"
        "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
        "vtkMRMLMarkupsFiducialNode_0,10,20,30,0,0,0,1,1,1,0,F-1,,\n"
    )
    (tmp_path / "b.mrk.json").write_text(
        '{"markups": [{"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": ['
        '{"id": "1", "label": "F-1", "position": [-10, -20, 30], "positionStatus": "defined"},'
        '{"id": "2", "label": "F-2", "position": [0, 0, 0], "positionStatus": "undefined"}]}]}'
    )
    (tmp_path / "c.txt").write_text("point\n1\n-10 -20 30\n")
    for name in ("a.fcsv", "b.mrk.json", "c.txt"):
        assert read_points(tmp_path / name).xyz.tolist() == [[10, 20, 30]]
    assert read_points(tmp_path / "a.fcsv").names == read_points(tmp_path / "b.mrk.json").names == ("F-1",)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.json", '{"space": "IJK", "points": [[1, 2, 3]]}', "coordinates are 'IJK'"),
        ("a.json", '{"points": 3}', "a list of points"),
        ("a.json", '[[1, 2, "x"]]', "three numbers"),
        ("a.csv", "x,y\n1,2\n", "columns"),
        ("a.csv", "x,y,z\n1,2,nan\n", "three numbers"),
        ("a.fcsv", "# CoordinateSystem = LPS\n1,2\n", "columns x, y, z are missing"),
        ("a.txt", "index\n1\n1 2 3\n", "'point' is needed"),
        ("a.txt", "point\n2\n1 2 3\n", "promises 2, found 1"),
        ("a.txt", "", "empty"),
        ("a.mrk.json", '{"markups": []}', "one list of markups"),
        ("a.vtk", "", "unknown kind"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises((DataError, FormatError), match=words):
        read_points(tmp_path / name)


def test_match_from_file_to_file(tmp_path):
    vol = Volume(np.broadcast_to(np.uint8(0), (60, 50, 40)), affine_from((3.0, 3.0, 3.0), (-30, 5, 70)))
    a = position_embedding(vol, c=64)
    write_embedding(a, tmp_path / "a.zarr")
    write_embedding(position_embedding(vol, lambda p: p - [9, -6, 3], c=64), tmp_path / "b.zarr")
    pts = a.fine.to_world(rng_for(0, "p").uniform(0.3, 0.7, (6, 3)) * a.fine.shape)
    write_points(tmp_path / "in.fcsv", pts, list("abcdef"))
    for mode in ("nn", "mutual", "fixed_point"):
        out = match(
            tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "in.fcsv", tmp_path / f"{mode}.mrk.json", mode=mode
        )
        back = read_points(tmp_path / f"{mode}.mrk.json")
        assert out["ok"] == 6 and back.names == tuple("abcdef") and np.abs(back.xyz - pts - [9, -6, 3]).max() < 1
    with pytest.raises(MedvolError, match="exists"):
        match(tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "in.fcsv", tmp_path / "nn.mrk.json")
    with pytest.raises(MedvolError, match="input of this job"):
        match(
            tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "in.fcsv", tmp_path / "in.fcsv", on_exists="overwrite"
        )


@pytest.mark.parametrize("points", ["[3]", '{"a": 1}', "null"])
def test_markups_of_other_shapes_are_refused(tmp_path, points):
    (tmp_path / "a.mrk.json").write_text(f'{{"markups": [{{"controlPoints": {points}}}]}}')
    with pytest.raises(FormatError, match="control points must be a list"):
        read_points(tmp_path / "a.mrk.json")
