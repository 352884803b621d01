"""Page 07a: one picture of any volume file, from a store that does not fit as well."""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medvol_nb import view as page
from medvol_nb.core import DataError, FormatError, MissingFile, OutputExists
from medvol_nb.stores import write_ome_zarr
from medvol_nb.view import view
from medvol_nb.volume import Volume, affine_from, reorient, resample, to_axes, write_volume
from tests.memory import PEAK

SHAPE, SPACING = (40, 32, 20), (1.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def img():
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    return Volume((10*x + 3*y + z).astype(np.int16), affine_from(SPACING, (-20, -30, 5)))


@pytest.fixture(scope="module")
def lbl(img):
    data = np.zeros(SHAPE, np.uint8)
    data[5:15, 8:20, 4:12] = 2
    return replace(img, data=data)


def pixels(path):
    from matplotlib.image import imread
    return np.round(imread(path)[..., :3]*255).astype(int)


def is_coloured(path):
    "Share of pixels that are not grey, as overlays are"
    p = pixels(path)
    return float((np.ptp(p, axis=-1) > 20).mean())


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".zarr", ".h5", ".npz", ".npy", ".nrrd", ".mha"])
def test_every_format(tmp_path, img, suffix):
    write_volume(img, tmp_path/f"x{suffix}")
    seen = view(tmp_path/f"x{suffix}", out=tmp_path/"x.png")
    picture = pixels(tmp_path/"x.png")
    assert seen["shape"] == SHAPE and seen["overlay"] == "none" and seen["dtype"] == "int16"
    assert seen["spacing"] == pytest.approx([1, 1, 1] if suffix == ".npy" else SPACING)
    assert 900 < picture.shape[1] <= 1060 and picture.shape[0] > 200 and picture.std() > 30 # 7 inches at 150 dpi
    assert seen["picture"] == tmp_path/"x.png" and {p.name for p in tmp_path.iterdir()} == {f"x{suffix}", "x.png"}


def test_the_same_head_in_any_storage_order_is_the_same_picture(tmp_path, img):
    pictures = []
    for codes in ("RAS", "LPS", "SAR", "PIL"):
        write_volume(reorient(img, codes), tmp_path/"x.nii.gz", "overwrite")
        view(tmp_path/"x.nii.gz", out=tmp_path/"x.png", on_exists="overwrite")
        pictures.append((tmp_path/"x.png").read_bytes())
    assert len(set(pictures)) == 1


def test_levels_of_a_pyramid(tmp_path, img):
    write_ome_zarr(to_axes(img, "zyx"), tmp_path/"p.ome.zarr", levels=3)
    shapes = [view(tmp_path/"p.ome.zarr", out=tmp_path/f"{k}.png", level=k)["shape"] for k in range(3)]
    assert shapes == [(40, 32, 20), (20, 16, 10), (10, 8, 5)]
    with pytest.raises(DataError, match="level 5 was asked for, it has 0 to 2"): view(tmp_path/"p.ome.zarr", level=5)


def test_a_level_of_a_plain_file_is_refused(tmp_path, img):
    write_volume(img, tmp_path/"x.nii.gz")
    with pytest.raises(DataError, match="level 1 was asked for, only OME-Zarr"):
        view(tmp_path/"x.nii.gz", out=tmp_path/"x.png", level=1)
    assert not (tmp_path/"x.png").exists()


def test_the_finest_level_that_fits_is_taken(tmp_path, img, monkeypatch):
    write_ome_zarr(to_axes(img, "zyx"), tmp_path/"p.ome.zarr", levels=3)
    monkeypatch.setattr(page, "LOOK_BYTES", 20*16*10*2)
    assert view(tmp_path/"p.ome.zarr", out=tmp_path/"a.png")["shape"] == (20, 16, 10)


@pytest.mark.parametrize("suffix", [".nii.gz", ".zarr"])
def test_every_nth_voxel_keeps_its_place(tmp_path, img, lbl, monkeypatch, suffix):
    write_volume(img, tmp_path/f"x{suffix}")
    write_volume(lbl, tmp_path/"l.nii.gz")
    monkeypatch.setattr(page, "LOOK_BYTES", img.data.nbytes//20)
    looked = page._look(tmp_path/f"x{suffix}", None, 0)
    assert looked.shape == (14, 11, 7) and np.array_equal(looked.data, img.data[::3, ::3, ::3])
    assert np.allclose(looked.affine @ [1, 1, 1, 1], img.affine @ [3, 3, 3, 1])
    assert "no label falls" not in view(tmp_path/f"x{suffix}", tmp_path/"l.nii.gz", tmp_path/"a.png")["overlay"]


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 40, 64])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_reading_by_rows_of_chunks_is_the_strided_array(tmp_path, img, rows, step):
    write_volume(img, tmp_path/"x.zarr", chunks=(rows, 16, 16))
    lazy = page.read_volume(tmp_path/"x.zarr", lazy=True)
    assert not isinstance(lazy.data, np.ndarray)
    assert np.array_equal(page._every(lazy.data, (), step), img.data[::step, ::step, ::step])


@pytest.mark.parametrize("suffix", [".nii.gz", ".zarr", ".h5", ".npz"])
def test_channels(tmp_path, img, suffix):
    both = Volume(np.stack([img.data, 400 - img.data]), img.affine, "cxyz")
    write_volume(both, tmp_path/f"x{suffix}")
    write_volume(img, tmp_path/"one.nii.gz")
    assert np.array_equal(page._look(tmp_path/f"x{suffix}", None, 1).data, 400 - img.data)
    seen = view(tmp_path/f"x{suffix}", out=tmp_path/"1.png", channel=1)
    view(tmp_path/f"x{suffix}", out=tmp_path/"0.png")
    assert seen["shape"] == SHAPE and not np.array_equal(pixels(tmp_path/"0.png"), pixels(tmp_path/"1.png"))
    for k in (2, -1):
        with pytest.raises(DataError, match=f"channel {k} was asked for, it has 0 to 1"):
            view(tmp_path/f"x{suffix}", out=tmp_path/"2.png", channel=k)


# ---- overlays -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_an_overlay_in_another_orientation_lies_where_it_belongs(tmp_path, img, lbl, codes):
    write_volume(img, tmp_path/"x.nii.gz")
    write_volume(reorient(lbl, codes), tmp_path/"l.nii.gz")
    write_volume(lbl, tmp_path/"straight.nii.gz")
    assert view(tmp_path/"x.nii.gz", tmp_path/"l.nii.gz", tmp_path/"a.png")["overlay"] == "same grid"
    view(tmp_path/"x.nii.gz", tmp_path/"straight.nii.gz", tmp_path/"b.png")
    assert np.array_equal(pixels(tmp_path/"a.png"), pixels(tmp_path/"b.png")) and is_coloured(tmp_path/"a.png") > 0.02


def test_an_overlay_on_another_grid_is_resampled(tmp_path, img, lbl):
    write_volume(img, tmp_path/"x.nii.gz")
    write_volume(resample(lbl, 0.75, order=0), tmp_path/"l.nii.gz")
    write_volume(lbl, tmp_path/"straight.nii.gz")
    assert view(tmp_path/"x.nii.gz", tmp_path/"l.nii.gz", tmp_path/"a.png")["overlay"].startswith("on another grid")
    view(tmp_path/"x.nii.gz", tmp_path/"straight.nii.gz", tmp_path/"b.png")
    assert np.abs(pixels(tmp_path/"a.png") - pixels(tmp_path/"b.png")).mean() < 3


def test_overlays_with_nothing_to_show_say_so(tmp_path, img, lbl):
    write_volume(img, tmp_path/"x.nii.gz")
    far = lbl.affine.copy()
    far[:3, 3] += 500
    write_volume(replace(lbl, affine=far), tmp_path/"far.nii.gz")
    write_volume(replace(lbl, data=lbl.data*0), tmp_path/"empty.nii.gz")
    def note(n): return view(tmp_path/"x.nii.gz", tmp_path/f"{n}.nii.gz", tmp_path/f"{n}.png")["overlay"]
    assert "no label falls inside the image" in note("far") and note("empty") == "same grid, empty"


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_an_overlay_of_fractions_is_refused(tmp_path, img, lbl, value):
    write_volume(img, tmp_path/"x.nii.gz")
    data = lbl.data.astype(np.float32)
    data[0, 0, 0] = value
    write_volume(replace(lbl, data=data), tmp_path/"l.nii.gz")
    with pytest.raises(DataError, match="holds fractions"):
        view(tmp_path/"x.nii.gz", tmp_path/"l.nii.gz", tmp_path/"a.png")
    write_volume(replace(lbl, data=lbl.data.astype(np.float32)), tmp_path/"whole.nii.gz")
    assert view(tmp_path/"x.nii.gz", tmp_path/"whole.nii.gz", tmp_path/"a.png")["overlay"] == "same grid"


# ---- errors and places ----------------------------------------------------------------------------------------------
def test_errors(tmp_path, img):
    with pytest.raises(MissingFile): view(tmp_path/"absent.nii.gz", out=tmp_path/"a.png")
    (tmp_path/"x.txt").write_text("x")
    with pytest.raises(FormatError, match="unknown file type"): view(tmp_path/"x.txt", out=tmp_path/"a.png")
    (tmp_path/"bad.nii.gz").write_bytes(b"<html>")
    with pytest.raises(FormatError): view(tmp_path/"bad.nii.gz", out=tmp_path/"a.png")
    write_volume(img, tmp_path/"x.nii.gz")
    with pytest.raises(DataError, match="must end in .png"): view(tmp_path/"x.nii.gz", out=tmp_path/"a.jpg")
    with pytest.raises(MissingFile): view(tmp_path/"x.nii.gz", tmp_path/"absent.nii.gz", tmp_path/"a.png")
    with pytest.raises(MissingFile, match="mkdir"): view(tmp_path/"x.nii.gz", out=tmp_path/"no"/"a.png")
    for k in (0, 1):
        with pytest.raises(OutputExists, match="never overwritten"):
            view(tmp_path/"x.nii.gz", tmp_path/"x.txt", tmp_path/("x.nii.gz", "x.txt")[k], on_exists="overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.nii.gz", "x.nii.gz", "x.txt"]


def test_existing_pictures(tmp_path, img, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_volume(img, "case_7.nii.gz")
    assert view("case_7.nii.gz")["picture"] == Path("case_7_view.png")
    old = Path("case_7_view.png").read_bytes()
    with pytest.raises(OutputExists, match="--on-exists"): view("case_7.nii.gz")
    assert view("case_7.nii.gz", on_exists="skip") == {"picture": Path("case_7_view.png"), "skipped": True}
    Path("case_7_view.png").write_bytes(b"old")
    view("case_7.nii.gz", on_exists="overwrite")
    assert Path("case_7_view.png").read_bytes() == old


# ---- larger than memory ---------------------------------------------------------------------------------------------
HUGE = PEAK + """
import sys, time
import zarr
store = zarr.open_array(sys.argv[1], mode="w", shape={shape}, chunks={chunks}, dtype="u1", fill_value=7)
store.attrs.update(axes=list("{axes}"), spacing_mm={spacing})
store[{part}] = 200
from medvol_nb.view import view
before, start = peak(), time.monotonic()
seen = view(sys.argv[1], out=sys.argv[2], channel={channel})
print(seen["shape"], peak() - before, time.monotonic() - start)
"""


@pytest.mark.parametrize("channels", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_store_of_64_gib_is_seen_in_bounded_memory_and_time(tmp_path, channels):
    n, lead = 4096, (3,) if channels else ()
    script = HUGE.format(shape=(*lead, n, n, n), chunks=(1, 256, 256, 256)[1 - len(lead):], axes="czyx"[1 - len(lead):],
                         spacing=[0.01]*3, channel=len(lead), part=f"{'1, '*len(lead)}2000:2080, 2000:2080, 2000:2080")
    run = subprocess.run([sys.executable, "-c", script, tmp_path/"huge.zarr", tmp_path/"a.png"], text=True,
                         capture_output=True, timeout=300, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr[-2000:]
    shape, rest = run.stdout.rsplit(")", 1)
    grown, seconds = map(float, rest.split())
    assert max(map(int, shape.strip("(").split(","))) in (512, 586) and grown*1024 < 2**30 and seconds < 60
    assert pixels(tmp_path/"a.png").std() > 5

