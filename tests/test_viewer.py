"""Three planes, label lists, matches, patches, runs and cases: each shows what it says, hostile input is told."""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from medvol_nb import phantoms, stores
from medvol_nb.core import DataError, FormatError, MissingFile, write_json
from medvol_nb.review import case_browser, checkpoint_table, find_runs, look, read_log, run_browser
from medvol_nb.slices import Planes
from medvol_nb.viewer import label_browser, label_table, match_browser, niivue, patch_browser, viewer
from medvol_nb.volume import Volume, affine_from, reorient, to_axes, to_world, write_volume
from medvol_nb.widgets import Panel


@pytest.fixture(scope="module")
def body():
    return phantoms.abdomen((24, 20, 16))


@pytest.fixture(scope="module")
def ct(body):
    return Volume(body.img, affine_from(body.spacing))


@pytest.fixture(scope="module")
def lbl(body, ct):
    return Volume(body.lbl, ct.affine)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


# ---------------------------------------------------------------- three planes


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR"])
def test_a_click_moves_the_other_planes(ct, codes):
    panel = viewer(reorient(ct, codes))
    for name in panel.image.names:
        held = panel.controls[name].value
        panel.event(name, "click", 0.3, 0.7)
        assert panel.controls[name].value == held
        shape = panel.image.plane(name, held).shape
        assert [round(v) for v in panel.image.pixel_of(name, panel.at)] == [int(0.3 * shape[0]), int(0.7 * shape[1])]
    assert f"{panel.image.vol.data[tuple(panel.at)]:.6g}" in panel.told


def test_planes_have_one_scale(ct):
    panel = viewer(ct, size=200)
    mm = {n: panel.image.extent(n) for n in panel.image.names}
    longest = max(max(v) for v in mm.values())
    for n, (tall, wide) in mm.items():
        assert (int(panel.pictures[n].height), int(panel.pictures[n].width)) == (
            round(200 * tall / longest),
            round(200 * wide / longest),
        )


@pytest.mark.parametrize("at", [(1, 2), (0, 0, 99), (-1, 0, 0)])
def test_begin_inside(ct, at):
    with pytest.raises(DataError, match="three indices inside"):
        viewer(ct, at=at)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("how", ["array", "zarr", "float", "LPS"])
def test_label_table_counts_every_voxel(tmp_path, body, lbl, how):
    vol = lbl
    if how == "zarr":
        write_volume(to_axes(lbl, "zyx"), tmp_path / "l.zarr", chunks=5)
        vol = Planes(tmp_path / "l.zarr").vol
    elif how == "float":
        vol = Volume(lbl.data.astype(np.float32), lbl.affine)
    elif how == "LPS":
        vol = reorient(lbl, "LPS")
    table = label_table(vol, body.names)
    ids, counts = np.unique(body.lbl[body.lbl > 0], return_counts=True)
    assert [(r["id"], r["voxels"]) for r in table] == list(zip(ids.tolist(), counts.tolist()))
    data = np.asarray(vol.data[...])
    for r in table:
        assert r["name"] == body.names[r["id"]]
        assert np.isclose(r["ml"], r["voxels"] * np.prod(body.spacing) / 1000)
        for axis, k in enumerate(r["at"]):
            sums = (data == r["id"]).sum(tuple({0, 1, 2} - {axis}))
            assert sums[k] == sums.max()


def test_large_and_negative_ids():
    data = np.zeros((3, 4, 5), np.int64)
    data[0, 0, 0], data[2, 3, 4] = -1, 2**40
    assert [(r["id"], r["at"]) for r in label_table(Volume(data, np.eye(4)))] == [(-1, (0, 0, 0)), (2**40, (2, 3, 4))]


def test_a_label_is_gone_to_and_shown_alone(ct, lbl, body):
    panel = label_browser(ct, lbl, body.names, opacity=1.0)
    for r in panel.table:
        panel.label.value = r["id"]
        assert panel.at == list(r["at"]) and panel.slice.value == r["at"][2]
    panel.clicked, panel.label.value = False, None
    panel.only.value = True
    panel.label.value = panel.table[0]["id"]
    panel.clicked = False
    panel.redraw()
    k, one = panel.slice.value, panel.table[0]["id"]
    coloured = np.ptp(pixels(panel.picture.value).astype(int), axis=-1) > 0
    assert np.array_equal(coloured, Planes(lbl).plane("axial", k) == one)


# ---------------------------------------------------------------- matches


def test_pairs_in_order_of_doubt(ct):
    pts = to_world(ct.affine, [[3, 4, 5], [10, 11, 12], [20, 2, 8]])
    found = SimpleNamespace(points=pts, matched=pts + 1, score=np.array([0.5, 0.9, 0.1]), status=["ok", "ok", "lost"])
    panel = match_browser(ct, ct, found, order="worst first")
    seen = []
    for k in range(3):
        panel.pair.value = k
        seen.append(panel.shown)
    assert seen == [2, 0, 1] and panel.told.startswith("pair 1:") and panel.told.endswith("score 0.900, ok")
    panel.event((0, "axial"), "turn", -1)
    assert panel.shown == 0
    assert match_browser(ct, ct, pts, pts + 1e4).shown == 0  # a match far outside is drawn at the border


@pytest.mark.parametrize("a, b", [((3, 3), (2, 3)), ((3, 2), (3, 2)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_points_that_do_not_pair(ct, a, b):
    with pytest.raises(DataError, match="two lists of"):
        match_browser(ct, ct, np.zeros(a), np.zeros(b))


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize("axes", ["xyz", "zyx"])
def test_patches_are_cut_where_they_are(ct, axes):
    vol = to_axes(ct, axes)
    start, size = (2, 3, 4), (6, 7, 5)
    panel = patch_browser(vol, [start, [-3, -3, -3]], size, limits=(-200, 300))
    name = panel.controls["patch"] is not None and Planes(vol).names[0]
    across = Planes(vol).screen(name).across
    from medvol_nb.slices import grey_bytes

    part = vol.data[tuple(slice(s, s + n) for s, n in zip(start, size))].take(size[across] // 2, across)
    cut = pixels(panel.pictures["patch"].value)[..., 0]
    assert sorted(cut.ravel()) == sorted(grey_bytes(part, (-200, 300)).ravel())
    panel.patch.value = 1
    assert pixels(panel.pictures["patch"].value).shape[0] <= 4 and "(-3, -3, -3)" in panel.told


@pytest.mark.parametrize("starts", [[[0, 0, 99]], [[0, 0]], [], [[0.5, 0, 0]], [[-9, 0, 0]]])
def test_patches_outside(ct, starts):
    with pytest.raises(DataError, match="outside|whole numbers"):
        patch_browser(ct, starts, 8)


def test_niivue_gets_volume_and_labels(ct, lbl):
    pytest.importorskip("ipyniivue")
    found = niivue(reorient(ct, "LPS"), lbl)
    assert [v.name for v in found.widget.volumes] == ["image.nii", "labels.nii"]
    assert found._repr_mimebundle_()["image/png"]


def test_niivue_is_optional(ct, monkeypatch):
    import sys

    from medvol_nb.core import MissingExtra

    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    with pytest.raises(MissingExtra, match="view"):
        niivue(ct)


# ---------------------------------------------------------------- runs


def make_run(folder, text):
    folder.mkdir(parents=True)
    (folder / "log.csv").write_text(text)
    return folder


def test_a_log_that_is_being_written(tmp_path):
    run = make_run(tmp_path / "a", "step,loss,note\n1,0.5,x\n2,nan,\n3,0.25,\n4,0.1")
    log = read_log(run)
    assert log["step"].tolist() == [1, 2, 3] and "note" not in log and np.isnan(log["loss"][1])
    assert len(read_log(make_run(tmp_path / "b", ""))["step"]) == 0
    assert len(read_log(make_run(tmp_path / "c", "step,loss\n"))["step"]) == 0
    with pytest.raises(FormatError, match="step"):
        read_log(make_run(tmp_path / "d", "epoch,loss\n1,2\n"))
    with pytest.raises(FormatError):
        read_log(make_run(tmp_path / "e", "step,loss\n1,2,3\n"))
    with pytest.raises(MissingFile):
        read_log(tmp_path / "none")


def test_runs_are_found_but_not_inside_stores(tmp_path):
    for name in ("one", "two/again", "data.zarr/x", ".hidden/x", "one/checkpoints/x", "a/b/c/d/e"):
        make_run(tmp_path / name, "step,loss\n1,2\n")
    assert list(find_runs(tmp_path)) == ["one", "two/again"]
    assert list(find_runs(tmp_path / "one")) == ["."]


def test_runs_side_by_side(tmp_path):
    make_run(tmp_path / "one", "step,loss,dice\n1,2,\n2,1,0.5\n")
    make_run(tmp_path / "two", "step,loss\n1,3\n")
    make_run(tmp_path / "empty", "")
    panel = run_browser(tmp_path)
    assert panel.column.options == ("loss", "dice") and panel.told.count("\n") == 1
    panel.column.value = "dice"
    assert panel.told == "one: 0.5 at step 2, from 0.5 to 0.5, 0 checkpoints (0 B)"
    panel.logy.value = panel.logx.value = True
    with pytest.raises(DataError, match="hold no numbers"):
        run_browser(tmp_path / "empty")


def test_checkpoints_are_read_only_if_asked(tmp_path):
    run = make_run(tmp_path / "run", "step,loss\n1,2\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-000000001.safetensors").write_bytes(b"torn")
    assert [r["state"] for r in checkpoint_table(run)] == ["not read"]
    assert "not a readable checkpoint" in checkpoint_table(run, check=True)[0]["state"]


# ---------------------------------------------------------------- cases, anything


def test_cases_that_cannot_be_read_are_told(tmp_path, ct, lbl):
    write_volume(ct, tmp_path / "a.nii.gz")
    write_volume(lbl, tmp_path / "l.nii.gz")
    (tmp_path / "torn.nii.gz").write_bytes(b"\x1f\x8b torn")
    items = [
        {"image": "a.nii.gz", "label": "l.nii.gz"},
        {"image": "torn.nii.gz"},
        {"image": "../a.nii.gz"},
        {"image": ["a.nii.gz"]},
    ]
    found = case_browser(items, tmp_path)
    assert "label" in found.view.layers
    for k in (1, 2):
        found.case.value = k
        assert found.view is None and "cannot be shown" in found.text.value and found._repr_mimebundle_()["image/png"]
    found.case.value = 3
    assert found.view is not None and not found.view.layers


def test_look_finds_out(tmp_path, ct, lbl):
    write_volume(ct, tmp_path / "a.nii.gz")
    write_volume(to_axes(lbl, "zyx"), tmp_path / "l.zarr", chunks=8)
    write_json(tmp_path / "list.json", {"training": [{"image": "a.nii.gz"}]})
    run = make_run(tmp_path / "runs" / "one", "step,loss\n1,2\n")
    assert look(tmp_path / "a.nii.gz", tmp_path / "l.zarr").controls.keys() > {"axial", "layer"}
    assert look(tmp_path / "list.json").view.image.vol.shape == ct.shape
    for path in (run, run / "log.csv", tmp_path / "runs"):
        assert isinstance(look(path), Panel)
    with pytest.raises(FormatError, match="neither"):
        look(tmp_path / "a.txt")
    with pytest.raises(MissingFile):
        look(tmp_path / "absent.nii.gz")


def test_a_store_is_read_by_tensorstore_where_that_can_be_and_by_zarr_elsewhere(tmp_path, monkeypatch):
    data = np.random.default_rng(0).integers(0, 99, (40, 30, 20)).astype(np.int16)
    for version in (2, 3):
        path = stores.write_zarr(Volume(data, np.eye(4)), tmp_path / f"v{version}.zarr", chunks=16, version=version)
        planes = [Planes(path)]
        with monkeypatch.context() as m:
            m.setattr(stores, "_tensorstore_pid", os.getpid() + 1)  # as after a fork
            planes += [Planes(path)]
        for p in planes:
            assert all(np.array_equal(p.plane(n, 7), planes[-1].plane(n, 7)) for n in p.names)
        k = planes[0].screen("axial").across
        assert np.array_equal(np.sort(planes[0].plane("axial", 7), None), np.sort(data.take(7, k), None))


def test_a_damaged_chunk_is_named_whoever_reads(tmp_path):
    data = np.random.default_rng(0).integers(0, 99, (40, 30, 20)).astype(np.int16)
    path = stores.write_zarr(Volume(data, np.eye(4)), tmp_path / "a.zarr", chunks=16)
    chunk = path / "image/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(FormatError, match="a.zarr"):
        Planes(path).plane("axial", 3)
