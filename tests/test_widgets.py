"""Slices, panels and the slice browser: right voxels the right way up, one drawing a change, no chunk too many."""

import base64
import io
import sys

import numpy as np
import pytest
from PIL import Image

from medvol_nb import plot, slices
from medvol_nb.core import DataError, FormatError
from medvol_nb.slices import (
    Layer,
    Planes,
    as_volume,
    blend,
    draw_box,
    draw_cross,
    encode_png,
    grey_bytes,
    heat_paint,
    label_bytes,
    label_paint,
    layer,
    on_grid,
)
from medvol_nb.volume import (
    Volume,
    affine_from,
    reorient,
    resample,
    to_axes,
    to_index,
    to_world,
    write_volume,
)
from medvol_nb.widgets import Panel, browse, go_to
from medvol_nb.zarrnet.io import open_volume

SHAPE = (20, 30, 14)


@pytest.fixture(scope="module")
def vol():
    "Every voxel has a value of its own"
    data = np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE)
    return Volume(data, affine_from((1.0, 2.0, 3.0), (-7, 11, 5)))


@pytest.fixture(scope="module")
def lbl(vol):
    data = np.zeros(SHAPE, np.uint8)
    data[4:12, 8:20, 3:9] = 2
    data[14:, 22:, 9:] = 5
    return Volume(data, vol.affine)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (5, 7), (7, 1, 3), (64, 3, 3), (300, 511, 3)])
def test_png_holds_the_pixels(shape):
    a = (np.arange(np.prod(shape)) * 37 % 251).astype(np.uint8).reshape(shape)
    for view in (a, a[::-1], np.asfortranarray(a)):
        assert np.array_equal(pixels(encode_png(view)), view)


@pytest.mark.parametrize(
    "bad", [np.zeros((0, 3), np.uint8), np.zeros((3, 3, 4), np.uint8), np.zeros((3, 3)), np.zeros(3, np.uint8)]
)
def test_png_refuses_what_is_no_picture(bad):
    with pytest.raises(DataError):
        encode_png(bad)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, bool])
def test_labels_have_the_colours_of_the_figures(dtype):
    ids = (np.arange(24).reshape(4, 6) * 7 % 5).astype(dtype)
    expected = np.round(255 * plot.overlay(np.zeros(ids.shape), ids, 1))
    assert np.array_equal(blend(np.zeros(ids.shape, np.uint8), *label_paint(ids), 1), expected)
    rims = np.round(255 * plot.overlay(np.zeros(ids.shape), ids, outline=True))
    assert np.array_equal(blend(np.zeros(ids.shape, np.uint8), *label_paint(ids, True), 1), rims)


def test_labels_beyond_any_table():
    ids = np.array([[-5, -1, 0], [2**40, 65_535, 65_536]])
    assert np.array_equal(label_bytes(ids), np.round(255 * plot.label_colours(ids)))
    with pytest.raises(DataError, match="integers"):
        label_bytes(np.zeros((2, 2)))


def test_grey_survives_what_is_not_a_number():
    plane = np.array([[np.nan, -np.inf, np.inf, 0, 50, 100, 1e30]], np.float64)
    assert grey_bytes(plane, (0, 100)).tolist() == [[0, 0, 255, 0, 128, 255, 255]]
    for limits in ((1, 1), (2, 1), (0, np.inf), (np.nan, 1)):
        with pytest.raises(DataError, match="finite and rise"):
            grey_bytes(plane, limits)


def test_heat_counts_integers_over_their_type():
    for found in (np.full((2, 2), 0.5, np.float16), np.full((2, 2), 128, np.uint8), np.full((2, 2), 32768, np.uint16)):
        assert np.abs(heat_paint(found)[1] - 0.5).max() < 0.01
    assert not heat_paint(np.full((2, 2), np.nan))[1].any()


def test_marks_stay_inside():
    for at in ((-5, -5), (3, 4), (100, 100), (0, 6)):
        rgb = np.zeros((7, 8, 3), np.uint8)
        draw_cross(rgb, *at)
        assert rgb.any()
    rgb = np.zeros((7, 8, 3), np.uint8)
    draw_box(rgb, (-3, -1), (2, 4))
    assert not rgb.any()
    draw_box(rgb, (4, 1), (6, 2))
    assert rgb.any(-1).sum() == 2 * 5 + 2 * 2


# ---------------------------------------------------------------- planes


@pytest.mark.parametrize("codes", ["RAS", "LPS", "IAR", "PSL", "SRP"])
@pytest.mark.parametrize("axes", ["xyz", "zyx", "yxz"])
@pytest.mark.parametrize("convention", ["radiological", "neurological"])
def test_any_orientation_looks_like_the_figures(vol, codes, axes, convention):
    "The three planes through a voxel are those of `plot.planes`, however the volume is stored"
    at = (3, 21, 9)
    fig = plot.planes(vol.data, spacing=vol.spacing, at=at, convention=convention, limits=(0, vol.data.max()))
    expected = {ax.get_title().split()[0]: ax.images[0].get_array() for ax in fig.axes}
    turned = Planes(to_axes(reorient(vol, codes), axes), convention=convention)
    index = to_index(turned.vol.affine, to_world(vol.affine, at))
    for name in ("axial", "coronal", "sagittal"):
        k = int(round(index[turned.screen(name).across]))
        plane = turned.plane(name, k)
        assert np.allclose(plane / vol.data.max(), expected[name])
        r, c = (round(v) for v in turned.pixel_of(name, index))
        assert plane[r, c] == vol.data[at]
        world = to_world(turned.vol.affine @ turned.matrix(name, k), [r, c, 0])
        assert np.allclose(world, to_world(vol.affine, at))
        sides = turned.screen(name).sides
        assert sides[0] == ("A" if name == "sagittal" else "R" if convention == "radiological" else "L")
        tall, wide = turned.extent(name)
        assert np.allclose(
            (tall / plane.shape[0], wide / plane.shape[1]),
            {"axial": (2, 1), "coronal": (3, 1), "sagittal": (3, 2)}[name],
        )


def test_thinned_planes_know_their_voxels(vol):
    small = Planes(reorient(vol, "LPI"), most=9)
    for name in small.names:
        plane = small.plane(name, 4)
        assert max(plane.shape) <= 9
        for pixel in ((0, 0), (plane.shape[0] - 1, plane.shape[1] - 1)):
            assert (
                plane[pixel] == small.vol.data[tuple(np.rint(to_world(small.matrix(name, 4), [*pixel, 0])).astype(int))]
            )


def test_microscopy_is_shown_as_stored(vol):
    plain = Planes(to_axes(vol, "zyx"))
    assert plain.names == ("z", "y", "x") and np.array_equal(plain.plane("y", 3), vol.data[:, 3].T)
    assert np.array_equal(Planes(vol, convention="stored").plane("y", 3), vol.data[:, 3])


def test_channels(vol):
    both = Volume(np.stack([vol.data, -vol.data]), vol.affine, "cxyz")
    assert np.array_equal(Planes(both, channel=1).plane("axial", 2), -Planes(vol).plane("axial", 2))
    assert Planes(both, channel=None).plane("axial", 2).shape == (2, 30, 20)
    with pytest.raises(DataError, match="channel 2"):
        Planes(both, channel=2)
    chunked = open_volume(np.moveaxis(both.data, 0, -1), channel_axis=3)
    assert np.array_equal(Planes(chunked, channel=1).plane("y", 2), -vol.data[:, 2])
    assert np.array_equal(Planes(chunked, channel=None).plane("x", 2), both.data[..., 2])


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_a_store_is_read_by_rows_of_chunks_once(tmp_path, vol, axis, monkeypatch):
    "Walking decodes every chunk once; a row of chunks that is larger than the cache is read slice by slice"
    write_volume(to_axes(vol, "zyx"), tmp_path / "v.zarr", chunks=8)
    planes, asked = Planes(tmp_path / "v.zarr"), []
    box = Planes._box
    monkeypatch.setattr(Planes, "_box", lambda self, a, low, high: asked.append((low, high)) or box(self, a, low, high))
    d = "zyx".index(axis)
    n = planes.count(axis)
    for k in (*range(n), *reversed(range(n))):
        assert np.array_equal(planes.plane(axis, k), to_axes(vol, "zyx").data.take(k, d))
    assert asked == [(k, min(k + 8, n)) for k in range(0, n, 8)]
    asked.clear()
    tight = Planes(tmp_path / "v.zarr", cache_bytes=100)
    for k in (0, 1):
        tight.plane(axis, k)
    assert asked == [(0, 1), (1, 2)] and not tight._kept


def test_a_bounded_cache(tmp_path, vol):
    write_volume(to_axes(vol, "zyx"), tmp_path / "v.zarr", chunks=4)
    planes = Planes(tmp_path / "v.zarr", cache_bytes=3 * 4 * 30 * 20 * 4)
    for k in range(14):
        planes.plane("z", k)
    assert sum(a.nbytes for a in planes._kept.values()) <= planes.cache_bytes and len(planes._kept) > 1


def test_a_damaged_chunk_is_an_error_with_its_store(tmp_path, vol):
    write_volume(to_axes(vol, "zyx"), tmp_path / "v.zarr", chunks=8)
    for p in (tmp_path / "v.zarr").rglob("c/1/*/*"):
        p.write_bytes(b"damaged")
    planes = Planes(tmp_path / "v.zarr")
    planes.plane("z", 7)
    with pytest.raises(FormatError, match="v.zarr"):
        planes.plane("z", 8)


def test_the_level_that_fits(tmp_path):
    from medvol_nb.stores import write_ome_zarr

    data = np.zeros((8, 64, 48), np.uint8)
    write_ome_zarr(Volume(data, affine_from(1.0, axes="zyx"), "zyx"), tmp_path / "p.zarr", levels=3, chunks=16)
    assert [as_volume(tmp_path / "p.zarr", most=n).shape for n in (64, 40, 16)] == [
        (8, 64, 48),
        (4, 32, 24),
        (2, 16, 12),
    ]
    assert as_volume(tmp_path / "p.zarr", level=1).shape == (4, 32, 24)
    assert not isinstance(as_volume(tmp_path / "p.zarr").data, np.ndarray)


def test_layers_come_to_the_image(vol, lbl):
    image = Planes(vol)
    plain = layer(lbl, image)
    assert plain.paint is label_paint and plain.planes.vol is lbl
    for other in (reorient(lbl, "LPI"), to_axes(lbl, "zyx"), lbl.data):
        found = layer(other, image)
        for name in image.names:
            assert np.array_equal(found.planes.plane(name, 8), plain.planes.plane(name, 8))
    fine = resample(lbl, 1.0, order=0)
    assert layer(fine, image).planes.vol.shape == vol.shape
    assert layer(np.linspace(0, 1, np.prod(SHAPE)).reshape(SHAPE), image).paint is heat_paint
    with pytest.raises(DataError, match="Is it of this volume"):
        layer(lbl.data[1:], image)
    with pytest.raises(DataError, match="budget"):
        on_grid(fine, vol, max_bytes=100)
    with pytest.raises(DataError, match="'labels', 'heat'"):
        layer(lbl, image, "label")


def test_a_score_in_bytes_on_another_grid_keeps_its_strength(vol):
    "Its number type says what is full; as float32 each score above 1 would be full"
    score = Volume(np.full(SHAPE, 51, np.uint8), vol.affine)
    for source in (score, resample(score, 5.0, order=0)):
        found = layer(source, Planes(vol), "heat")
        _, weight = found.paint(found.planes.plane("axial", SHAPE[2] // 2))
        assert np.isclose(weight[weight.shape[0] // 2, weight.shape[1] // 2], 0.2) and weight.max() < 0.21


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 3)), np.zeros((3, 0, 3)), np.zeros((2, 2, 2), complex), np.full((2, 2, 2), "a")]
)
def test_what_is_no_volume_is_refused(bad):
    with pytest.raises(DataError):
        Planes(bad)


# ---------------------------------------------------------------- the panel


def counting_panel(**more):
    import ipywidgets as w

    drawn = []

    def draw(panel):
        drawn.append((panel.a.value, panel.b.value))
        panel.b.max = panel.a.value  # a control that moves another one, as the slices of another view do
        panel.show("p", np.full((4, 8), panel.a.value, np.uint8))
        panel.tell(f"a <{panel.a.value}>")

    return Panel({"a": w.IntSlider(5, 0, 9), "b": w.IntSlider(3, 0, 9)}, [["p"]], draw, size=80, **more), drawn


def test_a_change_draws_once():
    panel, drawn = counting_panel()
    panel.a.value = 4
    panel.a.value = 4
    panel.a.value = 2  # takes b along
    assert drawn == [(5, 3), (4, 3), (2, 3)] and panel.b.value == 2
    with panel.together():
        panel.set("a", 100), panel.set("b", -5)
    assert drawn[3:] == [(9, 0)]


def test_an_error_in_drawing_leaves_the_panel_usable():
    panel, drawn = counting_panel()
    fine, panel._draw = panel._draw, lambda p: 1 / 0
    with pytest.raises(ZeroDivisionError):
        panel.redraw()
    panel._draw = fine
    panel.a.value = 7
    assert drawn[-1] == (7, 3) and panel._held == 0


def test_text_is_no_markup():
    panel, _ = counting_panel()
    assert panel.told == "a <5>" and panel.text.value == "a &lt;5&gt;"


def test_static_pages_get_a_picture():
    panel, _ = counting_panel()
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    sheet = pixels(base64.b64decode(bundle["image/png"]))
    assert sheet.shape[1] == 80 and (sheet[:40] == 5).all() and (sheet[40:] < 128).any()
    panel.tell("")
    assert pixels(panel.snapshot()).shape == (40, 80, 3)


def test_without_anywidget(monkeypatch, vol):
    "The plain picture of ipywidgets takes its place"
    from medvol_nb import widgets

    monkeypatch.setitem(sys.modules, "anywidget", None)
    widgets._picture_class.cache_clear()
    try:
        panel = browse(vol)
        assert type(panel.picture).__name__ == "Image" and panel.picture.value[:4] == b"\x89PNG"
        panel.event("picture", "turn", 1)
        assert panel.slice.value == 8 and "image/png" in panel._repr_mimebundle_()
    finally:
        widgets._picture_class.cache_clear()


# ---------------------------------------------------------------- the slice browser


def test_browser_shows_what_draw_draws(vol, lbl):
    panel = browse(vol, {"organs": lbl}, limits=(0, 8000), index=6)
    image, part = Planes(vol), layer(lbl, Planes(vol))
    assert np.array_equal(pixels(panel.picture.value), slices.draw(image, "axial", 6, (0, 8000), [part], 0.5))
    panel.outline.value, panel.opacity.value = True, 1.0
    rims = Layer(part.planes, lambda p: label_paint(p, True))
    assert np.array_equal(pixels(panel.picture.value), slices.draw(image, "axial", 6, (0, 8000), [rims], 1))
    panel.layer.value = "none"
    assert np.array_equal(pixels(panel.picture.value), slices.draw(image, "axial", 6, (0, 8000)))
    panel.window.value = (4000, 4000)
    assert set(np.unique(pixels(panel.picture.value))) == {0, 255}


def test_views_go_through_the_voxel_that_was_clicked(vol):
    panel = browse(reorient(vol, "LPS"), names={})
    panel.event("picture", "click", 0.99, 0.0)
    at = list(panel.at)
    assert at == [0, 29, 7]  # bottom left: posterior and the patient's right, the ends of L and the start of P reversed
    for name, k in (("coronal", 29), ("sagittal", 0), ("axial", 7)):
        panel.view.value = name
        assert panel.slice.value == k and panel.slice.max == panel.image.count(name) - 1 and panel.at == at
    assert panel.told.startswith("x 0, y 29, z 7") and str(panel.image.vol.data[0, 29, 7]) in panel.told
    go_to(panel, (4, 5, 6))
    assert panel.slice.value == 6 and panel.at == [4, 5, 6]


def test_turning_a_view_draws_once(vol, monkeypatch):
    panel, drawn = browse(vol), []
    grey = slices.grey_bytes
    monkeypatch.setattr(slices, "grey_bytes", lambda *a: drawn.append(1) or grey(*a))
    panel.view.value = "sagittal"
    panel.event("picture", "click", 0.5, 0.5)
    assert len(drawn) == 2


@pytest.mark.parametrize("data", [np.zeros((4, 5, 6)), np.full((4, 5, 6), np.nan), np.zeros((1, 1, 1), bool)])
def test_dull_volumes(data):
    panel = browse(data)
    panel.event("picture", "click", 0, 0)
    assert panel.picture.value[:4] == b"\x89PNG"


def test_vectors_are_described(vol):
    arrows = np.stack([vol.data, vol.data, vol.data]).astype(np.float32)
    panel = browse(vol, {"arrows": arrows}, kind=lambda p: (np.float32([255, 0, 0]), p.any(0)))
    panel.event("picture", "click", 0.5, 0.5)
    assert panel.told.count(f"{vol.data[tuple(panel.at)]:.3g}") >= 3
