"Plots: colours that never change, ranges that survive bad data, orientation and aspect measured in the figure"
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from medvol_nb import phantoms, plot
from medvol_nb.core import DataError, MissingFile, OutputExists, rng_for

DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "int32", "float16", "float32", "float64", ">i2", ">f4"]


def shown(fig, panel): return np.asarray(fig.axes[panel].images[0].get_array())


def pixels(png): return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


# --- colours

def test_colour_depends_on_the_id_only():
    table = plot.label_colours(300)
    assert table.shape == (300, 3) and table.min() >= 0 and table.max() <= 1
    assert (plot.label_colours([250, 3, 250]) == table[[250, 3, 250]]).all()
    assert (plot.label_colours(7) == table[:7]).all()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint16", "bool"])
def test_colour_does_not_depend_on_the_dtype(dtype):
    ids = np.array([[0, 1], [1, 0]], dtype)
    assert (plot.label_colours(ids) == plot.label_colours(2)[ids.astype(int)]).all()


def test_colours_of_few_labels_are_all_distinct():
    table = plot.label_colours(17)[1:]
    gap = np.linalg.norm(table[:, None] - table, axis=-1) + 9*np.eye(16)
    assert gap.min() > 0.25
    assert np.linalg.norm(table, axis=1).min() > 0.5  # none is near the background's black


def test_colours_of_neighbouring_ids_differ_up_to_large_ids():
    for start in (1, 10_000, 10**6):
        table = plot.label_colours(np.arange(start, start + 2000))
        assert np.linalg.norm(np.diff(table, axis=0), axis=1).min() > 0.9


def test_colours_special_ids():
    assert (plot.label_colours(0).shape, plot.label_colours([]).shape) == ((0, 3), (0, 3))
    assert (plot.label_colours(np.array([-1, -100])) == 0.5).all() and (plot.label_colours(1) == 0).all()


@pytest.mark.parametrize("ids", [[0.5], np.zeros(2), ["a"], -1])
def test_colours_refuse_what_is_not_an_id(ids):
    with pytest.raises(DataError, match="label_colours"): plot.label_colours(ids)


# --- display range

@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_rise_for_every_dtype(dtype):
    img = rng_for(0, dtype).integers(0, 2 if dtype == "bool" else 100, (9, 11)).astype(dtype)
    lo, hi = plot.window_limits(img)
    assert img.min() <= lo < hi <= img.max() and isinstance(lo, float)


@pytest.mark.parametrize("img, want", [
    (np.full((3, 3), 7.0), (7, 8)), (np.zeros((2, 2)), (0, 1)), (np.full(4, np.nan), (0, 1)),
    (np.zeros((0, 5)), (0, 1)),
    (np.array([np.inf, -np.inf, np.nan, 2, 4]), None), (np.full(5, -3, np.int16), (-3, -2))])
def test_limits_of_degenerate_images(img, want):
    lo, hi = plot.window_limits(img)
    assert lo < hi and np.isfinite([lo, hi]).all()
    if want: assert (lo, hi) == want
    else: assert 2 <= lo < hi <= 4


def test_limits_of_large_constants_still_rise():
    for c in (1e12, -1e12, 1e20): assert np.subtract(*plot.window_limits(np.full(3, c))[::-1]) > 0


def test_limits_ignore_outliers_but_keep_sparse_signal():
    img = np.linspace(0, 1, 10_001)
    img[5] = 1e9
    assert plot.window_limits(img)[1] < 1.01
    sparse = np.zeros(10_000)
    sparse[3] = 5
    assert plot.window_limits(sparse) == (0, 5)


@pytest.mark.parametrize("percentiles", [(5, 5), (99, 1), (-1, 50), (0, 101)])
def test_limits_refuse_bad_percentiles(percentiles):
    with pytest.raises(DataError, match="percentiles"): plot.window_limits(np.arange(5), percentiles)


def test_limits_refuse_complex_numbers():
    with pytest.raises(DataError, match="numbers"): plot.window_limits(np.zeros(3, complex))


# --- overlay

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 5)])
def test_overlay_values(dtype, shape):
    img = rng_for(0, dtype).integers(0, 2, shape).astype(dtype)
    lbl = np.zeros(shape, np.uint8)
    lbl[0, 0] = 3
    out = plot.overlay(img, lbl, alpha=0.25, limits=(0, 1))
    grey = img.astype(float)[..., None]
    want = np.where(lbl[..., None] > 0, 0.75*grey + 0.25*plot.label_colours([3])[0], grey)
    assert out.shape == (*shape, 3) and np.allclose(out, want)


def test_overlay_draws_nan_black_and_infinities_at_the_ends():
    img = np.array([[np.nan, np.inf, -np.inf, 0.5]])
    assert np.allclose(plot.overlay(img, np.zeros((1, 4), int), limits=(0, 1))[0, :, 0], [0, 1, 0, 0.5])


def test_outline_is_one_pixel_inside_each_region():
    lbl = np.zeros((9, 9), int)
    lbl[2:7, 2:7] = 1
    out = plot.overlay(np.zeros((9, 9)), lbl, outline=True)
    painted = out.any(-1)
    assert painted.sum() == 16 and not painted[3:6, 3:6].any()  # the rim of a 5 x 5 square
    lbl[2:7, 5:7] = 2
    painted = plot.overlay(np.zeros((9, 9)), lbl, outline=True).any(-1)
    assert painted[2:7, 4].all() and painted[2:7, 5].all()  # both sides of a border between two labels


def test_overlay_does_not_change_its_inputs():
    img, lbl = np.ones((4, 4), np.float32), np.eye(4, dtype=np.uint8)
    plot.overlay(img, lbl, outline=True)
    assert (img == 1).all() and (lbl == np.eye(4)).all()


@pytest.mark.parametrize("img, lbl, match", [
    (np.zeros((3, 4)), np.zeros((4, 3), int), "differ"), (np.zeros((2, 3, 4)), np.zeros((2, 3, 4), int), "2-D"),
    (np.zeros((3, 4)), np.zeros((3, 4)), "integers")])
def test_overlay_refuses(img, lbl, match):
    with pytest.raises(DataError, match=match): plot.overlay(img, lbl)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, np.nan])
def test_overlay_refuses_alpha(alpha):
    with pytest.raises(DataError, match="alpha"): plot.overlay(np.zeros((2, 2)), np.zeros((2, 2), int), alpha)


# --- planes: orientation, aspect, laziness

def corner_volume():
    "One bright voxel at the right-anterior-superior corner"
    vol = np.zeros((5, 7, 9), np.float32)
    vol[4, 6, 8] = 1
    return vol


def test_radiological_puts_right_on_the_left_and_front_and_head_on_top():
    fig = plot.planes(corner_volume(), at=(4, 6, 8))
    sagittal, coronal, axial = (shown(fig, d) for d in range(3))
    assert (sagittal.shape, coronal.shape, axial.shape) == ((9, 7), (9, 5), (7, 5))
    for panel in (sagittal, coronal, axial): assert panel[0, 0] == 1 and panel.sum() == 1


def test_neurological_puts_right_on_the_right():
    fig = plot.planes(corner_volume(), at=(4, 6, 8), convention="neurological")
    assert shown(fig, 0)[0, 0] == 1  # sagittal planes face left in both
    assert shown(fig, 1)[0, -1] == 1 and shown(fig, 2)[0, -1] == 1


@pytest.mark.parametrize("convention, across", [("radiological", "RL"), ("neurological", "LR")])
def test_sides_are_lettered(convention, across):
    fig = plot.planes(corner_volume(), convention=convention)
    letters = ["".join(t.get_text() for t in ax.texts) for ax in fig.axes]
    assert letters == ["APSI", across + "SI", across + "AP"]
    assert any(convention in t.get_text() for t in fig.texts)
    bare = plot.planes(corner_volume(), codes=False)
    assert not bare.texts and not any(ax.texts for ax in bare.axes)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 0.5, 4), (3, 1, 2)])
@pytest.mark.parametrize("shape", [(32, 40, 24), (31, 17, 9), (24, 24, 2)])
def test_one_physical_scale(shape, spacing):
    fig = plot.planes(np.zeros(shape), spacing=spacing)
    fig.canvas.draw()
    scales = []
    for ax, (h, v) in zip(fig.axes, ((1, 2), (0, 2), (0, 1))):
        ax.apply_aspect()
        box = ax.get_window_extent()
        scales += [box.width/(shape[h]*spacing[h]), box.height/(shape[v]*spacing[v])]
    assert np.ptp(scales) < 0.03*np.mean(scales)
    assert fig.get_figwidth() <= 7 and fig.get_figheight() < 8


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 1, 40), (64, 64, 1), (1, 50, 3), (300, 2, 2)])
def test_thin_volumes_are_drawn(shape):
    png = plot.png_bytes(plot.planes(rng_for(0).random(shape), np.ones(shape, np.uint8)), 50)
    assert pixels(png).std() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_of_every_dtype(dtype):
    vol = rng_for(0, dtype).integers(0, 2, (6, 7, 8)).astype(dtype)
    panel = shown(plot.planes(vol, at=(3, 3, 3), convention="neurological"), 2)
    assert (panel == vol[:, :, 3].T[::-1].astype(float)).all()


@pytest.mark.parametrize("fill", [np.nan, np.inf, 0, -5])
def test_constant_and_nan_volumes(fill):
    fig = plot.planes(np.full((5, 6, 7), fill))
    assert np.isfinite(shown(fig, 0)).all() and len(plot.png_bytes(fig, 40)) > 500


def test_non_contiguous_and_read_only():
    vol = np.asfortranarray(rng_for(0).random((12, 10, 8)))[::2, ::-1]
    vol.flags.writeable = False
    a, b = plot.planes(vol), plot.planes(np.ascontiguousarray(vol))
    assert plot.png_bytes(a, 40) == plot.png_bytes(b, 40)


def test_planes_go_through_the_largest_sections():
    lbl = np.zeros((20, 21, 22), np.uint8)
    lbl[phantoms.ball((20, 21, 22), 4, (6, 12, 15))] = 2
    titles = [ax.get_title() for ax in plot.planes(lbl*1.0, lbl).axes]
    assert titles == ["sagittal x=6", "coronal y=12", "axial z=15"]
    empty = [ax.get_title() for ax in plot.planes(lbl*1.0, 0*lbl).axes]
    assert empty == ["sagittal x=10", "coronal y=10", "axial z=11"]


def test_label_is_searched_slab_by_slab():
    class Lazy:
        shape, most = (40, 1024, 2048), 0
        def __getitem__(self, key):
            out = np.broadcast_to(np.uint8(0), self.shape)[key].copy()
            Lazy.most = max(Lazy.most, out.size)
            return out
    assert plot._largest_sections(Lazy()) is None and Lazy.most <= 2**24  # of 84 million voxels


def test_only_three_planes_are_read():
    class Lazy:
        shape, dtype, voxels = (1000, 1100, 1200), np.dtype("int16"), 0
        def __getitem__(self, key):
            out = np.zeros([n for n, k in zip(self.shape, key) if isinstance(k, slice)], np.int16)
            Lazy.voxels += out.size
            return out
    plot.planes(Lazy(), Lazy(), at=(1, 2, 3))
    assert Lazy.voxels == 2*(1000*1100 + 1000*1200 + 1100*1200)


def test_memory_maps_and_zarr_arrays(tmp_path):
    import zarr
    vol = rng_for(0).integers(0, 255, (12, 13, 14)).astype(np.int16)
    np.save(tmp_path/"v.npy", vol)
    store = zarr.create_array(str(tmp_path/"v.zarr"), data=vol, chunks=(5, 5, 5))
    want = plot.png_bytes(plot.planes(vol, vol % 3), 40)
    assert plot.png_bytes(plot.planes(np.load(tmp_path/"v.npy", mmap_mode="r"), vol % 3), 40) == want
    lazy_lbl = zarr.create_array(str(tmp_path/"l.zarr"), data=vol % 3, chunks=(5, 5, 5))
    assert plot.png_bytes(plot.planes(store, lazy_lbl), 40) == want


@pytest.mark.parametrize("kwargs, match", [
    (dict(img=np.zeros((4, 4))), "3-D"), (dict(img=np.zeros((1, 4, 4, 4))), "channel"),
    (dict(img=np.zeros((4, 0, 4))), "empty"),
    (dict(lbl=np.zeros((4, 5, 4), int)), "differ in shape"), (dict(lbl=np.zeros((4, 4, 4))), "integers"),
    (dict(spacing=(1, 1)), "spacing"), (dict(spacing=(1, 1, 0)), "spacing"), (dict(spacing=(1, 1, np.nan)), "spacing"),
    (dict(at=(0, 0)), "three indices"), (dict(at=(0, 0, 4)), "three indices"), (dict(at=(-1, 0, 0)), "three indices"),
    (dict(at=(0.5, 0, 0)), "three indices"), (dict(limits=(3, 3)), "limits"), (dict(limits=(0, np.nan)), "limits"),
    (dict(convention="surgical"), "convention")])
def test_planes_refuse(kwargs, match):
    with pytest.raises(DataError, match=match): plot.planes(**{"img": np.zeros((4, 4, 4)), **kwargs})


# --- montage and charts

@pytest.mark.parametrize("n, cols, cells", [(1, None, 1), (5, None, 5), (7, 3, 9), (13, None, 18), (2, 5, 2)])
def test_montage_grid(n, cols, cells):
    fig = plot.montage([np.eye(4)]*n, cols)
    assert len(fig.axes) == cells and sum(bool(ax.images) for ax in fig.axes) == n and fig.get_figwidth() <= 7


def test_montage_draws_as_stored():
    a, rgb = np.arange(6.0).reshape(2, 3), rng_for(0).integers(0, 255, (4, 5, 3)).astype(np.uint8)
    fig = plot.montage([a, rgb, np.full((2, 2), np.nan)], titles=["a", "b", "c"], limits=(0, 5))
    assert np.allclose(shown(fig, 0), a/5) and (shown(fig, 1) == rgb).all() and (shown(fig, 2) == 0).all()
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "c"]


def test_montage_labels():
    lbl = np.array([[0, 2]])
    panel = shown(plot.montage([np.zeros((1, 2))], lbls=[lbl], alpha=1), 0)
    assert np.allclose(panel[0], plot.label_colours([0, 2]))


@pytest.mark.parametrize("args, match", [
    (([],), "no pictures"), (([np.zeros(3)],), "picture 0"), (([np.zeros((2, 2)), np.zeros((2, 2, 4))],), "picture 1"),
    (([np.zeros((2, 2))], 0), "cols"), (([np.zeros((2, 2))], 1, ["a", "b"]), "2 titles"),
    (([np.zeros((0, 2))],), "picture 0")])
def test_montage_refuses(args, match):
    with pytest.raises(DataError, match=match): plot.montage(*args)


def test_montage_refuses_unknown_limits():
    with pytest.raises(DataError, match="shared"): plot.montage([np.eye(2)], limits="common")


def test_curves_axes_and_data():
    fig = plot.curves({"a": [3.0, 1, 2], "b": (np.array([1, 10]), [0.1, 0.01]), "c": [5]}, logx=True, logy=True)
    ax = fig.axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.lines[0].get_xydata().tolist() == [[0, 3], [1, 1], [2, 2]] and ax.lines[1].get_xdata().tolist() == [1, 10]
    assert ax.lines[2].get_marker() == "o"  # a single point would be invisible as a line


def test_curves_pair_of_numbers_is_a_series():
    assert plot.curves({"a": (4, 5)}).axes[0].lines[0].get_xydata().tolist() == [[0, 4], [1, 5]]


@pytest.mark.parametrize("y", [[np.nan]*3, [np.inf, 1, 2], [-1, 0, 1]])
def test_curves_draw_with_holes_on_log_axes(y):
    assert len(plot.png_bytes(plot.curves({"a": y}, logy=True), 40)) > 500


@pytest.mark.parametrize("series", [{}, [1, 2], {"a": np.zeros((2, 2))}, {"a": ([1, 2], [1])}, {"a": 3.0}])
def test_curves_refuse(series):
    with pytest.raises(DataError, match="curves"): plot.curves(series)


def test_bars_values_colours_and_order():
    fig = plot.bars((["liver", "spleen", "none"], [1500, 0.5, np.nan]), "mL", ids=[1, 3, 7])
    ax = fig.axes[0]
    assert [p.get_width() for p in ax.patches[:2]] == [1500, 0.5] and np.isnan(ax.patches[2].get_width())
    assert np.allclose([p.get_facecolor()[:3] for p in ax.patches], plot.label_colours([1, 3, 7])*0.9)
    assert [t.get_text() for t in ax.texts] == ["1,500", "0.5", "n/a"] and ax.get_xlabel() == "mL"
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [{"a": 0}, {"a": np.nan}, {"a": -3, "b": 2}, {str(k): 10.0**k for k in range(40)}])
def test_bars_draw_anything_finite_or_not(values, log):
    assert pixels(plot.png_bytes(plot.bars(values, log=log), 40)).std() > 0


@pytest.mark.parametrize("values, ids", [
    ({}, None), ((["a"], [1, 2]), None), ({"a": 1}, [1, 2]), ((["a"], [[1]]), None)])
def test_bars_refuse(values, ids):
    with pytest.raises(DataError, match="bars"): plot.bars(values, ids=ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_histogram_shares_sum_to_one(dtype):
    data = rng_for(0, dtype).integers(0, 2, (5, 6, 7)).astype(dtype)
    steps = plot.histograms({"a": data, "b": data[:2]}).axes[0].patches
    assert all(abs(s.get_data().values.sum() - 1) < 1e-9 for s in steps)
    assert (steps[0].get_data().edges == steps[2].get_data().edges).all()  # common intervals


@pytest.mark.parametrize("data", [np.full(9, 3.0), np.full(3, np.nan), np.zeros(0), np.array([np.inf, 1])])
def test_histograms_of_degenerate_data(data):
    assert len(plot.png_bytes(plot.histograms({"a": data}, log=True), 40)) > 500


# --- figures as objects and files

def test_same_figure_same_bytes_and_size():
    make = lambda: plot.planes(phantoms.head((20, 24, 20)).img, title="a title")
    fig = make()
    assert plot.png_bytes(fig) == plot.png_bytes(fig) == plot.png_bytes(make()) == fig._repr_png_()
    assert pixels(plot.png_bytes(fig, 100)).shape[1] == 700
    chunks = plot.png_bytes(fig)
    assert not any(kind in chunks for kind in (b"tEXt", b"iTXt", b"zTXt", b"tIME"))


def test_no_pyplot_and_no_changed_settings():
    code = ("import sys, medvol_nb.plot as p; assert 'matplotlib' not in sys.modules\n"
            "import matplotlib, numpy as np; before = dict(matplotlib.rcParams)\n"
            "v = np.zeros((4, 4, 4), int)\n"
            "charts = p.curves({'a': [1, 2]}), p.bars({'a': 1}), p.histograms({'a': v})\n"
            "for f in (p.planes(v, v), p.montage([v[0]]), *charts):\n"
            "    assert p.png_bytes(f, 40).startswith(b'\\x89PNG')\n"
            "assert 'matplotlib.pyplot' not in sys.modules and dict(matplotlib.rcParams) == before")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_figures_are_freed():
    import gc
    import weakref
    fig = plot.curves({"a": [1, 2]})
    plot.png_bytes(fig, 40)
    alive = weakref.ref(fig)
    del fig
    gc.collect()
    assert alive() is None


def test_pyplot_figures_are_closed():
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    fig = pyplot.figure()
    plot.png_bytes(fig, 40)
    assert not pyplot.fignum_exists(fig.number)


def test_threads_draw_the_same():
    vol = phantoms.head((20, 24, 20))
    def draw(_): return plot.png_bytes(plot.planes(vol.img, vol.lbl, vol.spacing, title="t"), 60)
    with ThreadPoolExecutor(4) as pool: assert set(pool.map(draw, range(12))) == {draw(0)}


def test_save_figure(tmp_path):
    fig, path = plot.bars({"a": 1}), tmp_path/"b.png"
    assert plot.save_figure(fig, path, dpi=60) == path and path.read_bytes() == plot.png_bytes(fig, 60)
    with pytest.raises(OutputExists): plot.save_figure(fig, path)
    path.write_bytes(b"old")
    plot.save_figure(fig, path, "skip")
    assert path.read_bytes() == b"old"
    plot.save_figure(fig, str(path), "overwrite", dpi=60)
    assert path.read_bytes() == plot.png_bytes(fig, 60) and [p.name for p in tmp_path.iterdir()] == ["b.png"]
    with pytest.raises(MissingFile): plot.save_figure(fig, tmp_path/"no"/"b.png")
    for name in ("b.jpg", "b", "b.png.tmp"):
        with pytest.raises(DataError, match="png"): plot.save_figure(fig, tmp_path/name)


def test_notebook_displays_one_png():
    from IPython.core.formatters import DisplayFormatter
    data, _ = DisplayFormatter().format(plot.curves({"a": [1, 2]}))
    assert data["image/png"].startswith(b"\x89PNG") and "text/html" not in data
