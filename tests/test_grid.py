"Grid, windows, sweep: coverage, exactness, bounded memory"
import functools
import itertools
import math
import tracemalloc

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from medvol_nb.core import ConfigError, DataError, rng_for
from medvol_nb.grid import (
    WINDOW_FLOOR,
    Blend,
    Grid,
    axis_starts,
    centred_start,
    chunks_touched,
    patch_slices,
    random_starts,
    row_chunk,
    sweep,
    sweep_bytes,
    sweep_rows,
    take_patch,
    window,
)

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

sizes, patches, overlaps = st.integers(1, 120), st.integers(1, 50), st.floats(0, 0.97)


def identity(x): return x


@st.composite
def grids(draw, d=(1, 3), size=14, patch=9):
    n = draw(st.integers(*d))
    def one(s): return draw(st.lists(s, min_size=n, max_size=n))
    return Grid(tuple(one(st.integers(1, size))), tuple(one(st.integers(1, patch))), tuple(one(st.floats(0, 0.9))))


# ---- positions

@given(sizes, patches, overlaps)
def test_positions_cover_exactly_once_each_and_end_at_the_edge(size, patch, overlap):
    starts = axis_starts(size, patch, overlap)
    assert starts.dtype == np.int64 and (np.diff(starts) > 0).all()
    if size < patch:
        assert starts.tolist() == [-((patch - size)//2)] and starts[0] + patch >= size
        return
    assert starts[0] == 0 and starts[-1] + patch == size
    step = max(1, math.floor(round(patch*(1 - overlap), 9) + 0.5))
    assert (np.diff(starts)[:-1] == step).all() and (np.diff(starts) <= step).all() and step <= patch


@pytest.mark.parametrize("size, patch, overlap, expected", [
    (10, 10, 0.25, [0]),
    (10, 4, 0, [0, 4, 6]),
    (12, 4, 0, [0, 4, 8]),
    (9, 5, 0.5, [0, 3, 4]),  # 2.5 is rounded half up to 3, Python's round() would give 2
    (12, 10, 0.9, [0, 1, 2]),  # 10*(1 - 0.9) = 0.9999... must be 1
    (6, 10, 0.85, [-2]),
    (12, 10, 0.85, [0, 2]),  # 1.5000000000000002 and 1.5 both give 2
    (5, 3, 0.99, [0, 1, 2]),
    (1, 1, 0, [0]), (1, 2, 0, [0]), (1, 4, 0, [-1]),
])
def test_known_positions(size, patch, overlap, expected): assert axis_starts(size, patch, overlap).tolist() == expected


@pytest.mark.parametrize("args", [(0, 4, 0), (4, 0, 0), (4, 4, 1), (4, 4, -0.1), (4, 4, math.nan), (4.5, 4, 0),
                                  (4, True, 0), (4, "4", 0), (math.inf, 4, 0), (4, 4, None), (-4, 4, 0)])
def test_bad_axis_is_refused(args):
    with pytest.raises(DataError): axis_starts(*args)


def test_numpy_integers_and_whole_floats_are_accepted():
    assert axis_starts(np.int32(9), 5.0, np.float32(0.5)).tolist() == [0, 3, 4]


@given(grids())
def test_grid_is_a_sequence_that_covers_every_voxel(grid):
    everything = list(grid)
    assert everything == sorted(set(everything)) and len(everything) == len(grid)
    assert [grid[i] for i in range(len(grid))] == everything and grid[-1] == everything[-1]
    seen = np.zeros(grid.shape, bool)
    for start in everything:
        source, inside = grid.slices(start)
        seen[source] = True
        for s, p, n, a, b in zip(start, grid.patch_size, grid.shape, source, inside):
            assert a.stop - a.start == b.stop - b.start == min(n, p)
            assert (0 <= s and s + p <= n) if n >= p else a == slice(0, n)
    assert seen.all()


def test_grid_is_a_frozen_value():
    grid = Grid((9, 8), 4)
    assert grid == Grid([9, np.int64(8)], (4, 4), (0.25, 0.25)) and {grid: 1}[Grid((9, 8), 4, 0.25)] == 1
    assert all(type(n) is int for n in grid.shape + grid.patch_size + grid[3]) and grid.ndim == 2
    with pytest.raises(AttributeError): grid.shape = (3, 3)
    for i in (len(grid), -len(grid) - 1):
        with pytest.raises(IndexError): grid[i]


@pytest.mark.parametrize("kwargs", [
    dict(shape=(), patch_size=()), dict(shape=(5, 5), patch_size=(3, 3, 3)),
    dict(shape=(5, 5), patch_size=3, overlap=(0.1,)*3),
    dict(shape=(5, -5), patch_size=3), dict(shape=(5, 5), patch_size=0), dict(shape=(5, 5), patch_size=3, overlap=1.0),
])
def test_bad_grid_is_refused(kwargs):
    with pytest.raises(DataError): Grid(**kwargs)


# ---- patches

@given(st.data(), st.sampled_from(["edge", "reflect", 0, -7.0]))
@settings(max_examples=60)
def test_take_equals_padding_the_whole_volume(data, fill):
    d = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(1, 6)) for _ in range(d))
    patch = tuple(data.draw(st.integers(1, 9)) for _ in range(d))
    start = tuple(data.draw(st.integers(1 - p, n - 1)) for p, n in zip(patch, shape))
    volume = rng_for(0, *shape).random((2, *shape))
    pad = [(0, 0)] + [(9, 9)]*d
    padded = np.pad(volume, pad, mode=fill) if isinstance(fill, str) else np.pad(volume, pad, constant_values=fill)
    expected = padded[(slice(None), *(slice(s + 9, s + 9 + p) for s, p in zip(start, patch)))]
    np.testing.assert_array_equal(take_patch(volume, start, patch, fill), expected)


class Recorder:
    "An array that allows plain slices only and records them"
    def __init__(self, array): self.array, self.reads = array, []
    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)

    def __getitem__(self, key):
        assert isinstance(key, tuple) and len(key) == self.array.ndim and all(isinstance(k, slice) for k in key)
        assert all(k.step is None and (k.start is None or 0 <= k.start < k.stop <= n) for k, n in zip(key, self.shape))
        self.reads.append(key)
        return self.array[key]


@pytest.mark.parametrize("fill", [0, "edge", "reflect"])
def test_take_reads_one_plain_box_and_returns_a_new_array(fill):
    volume = np.arange(60.).reshape(2, 5, 6)
    for start in [(0, 0), (-2, 3), (2, 4)]:
        source = Recorder(volume)
        np.testing.assert_array_equal(take_patch(source, start, (4, 3), fill), take_patch(volume, start, (4, 3), fill))
        assert len(source.reads) == 1
    patch = take_patch(volume, (0, 0), (5, 6), fill)
    patch[:] = -1
    assert volume.min() == 0


@pytest.mark.parametrize("dtype", ["u1", "i2", "f2", "f4", "f8", "?"])
def test_take_keeps_dtype(dtype):
    assert take_patch(np.ones((3, 3), dtype), (-1, -1), (4, 4)).dtype == dtype


def test_take_non_contiguous():
    volume = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(take_patch(volume[::-1, ::2], (-1, 0), (3, 2), 9), [[9, 9], [18, 20], [12, 14]])


def test_take_errors():
    with pytest.raises(ConfigError, match="wrap"): take_patch(np.zeros(4), (0,), (2,), "wrap")
    with pytest.raises(DataError, match="does not touch"): take_patch(np.zeros(4), (-2,), (2,))
    with pytest.raises(DataError, match="does not touch"): patch_slices((9,), (2,), (9,))
    with pytest.raises(DataError, match="the grid's"): Grid((4, 4), 2).take(np.zeros((4, 5)), (0, 0))


# ---- weights

@given(patches, st.floats(0.02, 2))
def test_window_is_symmetric_positive_with_maximum_one(patch, sigma):
    w, = window((patch,), sigma_scale=sigma)
    assert w.dtype == np.float32 and w.max() == 1 and w.min() >= np.float32(WINDOW_FLOOR)
    np.testing.assert_allclose(w, w[::-1], rtol=1e-6)
    half = w[:(patch + 1)//2]
    assert (np.diff(half) >= 0).all()


def test_window_known_values():
    w, = window((8,))  # sigma 1, centres at +-0.5, +-1.5 ...: exp(-(d^2 - 0.25)/2), floored at 1e-3
    np.testing.assert_allclose(w[4:], [1, np.exp(-1), np.exp(-3), 0.0024787522], rtol=1e-6)
    assert window((8,), sigma_scale=0.05)[0][0] == np.float32(WINDOW_FLOOR)
    assert (window((3, 4), "constant")[1] == np.ones(4)).all()
    for bad in (dict(kind="hann"), dict(sigma_scale=0), dict(sigma_scale=math.nan)):
        with pytest.raises(ConfigError): window((4,), **bad)


@given(grids(), st.sampled_from(["gaussian", "constant"]))
@settings(max_examples=60)
def test_weight_sums_equal_brute_force(grid, kind):
    weight = functools.reduce(np.multiply.outer, [w.astype(float) for w in window(grid.patch_size, kind)])
    total = np.zeros(grid.shape)
    for start in grid:
        source, inside = grid.slices(start)
        total[source] += weight[inside]
    product = functools.reduce(np.multiply.outer, grid.axis_weight_sums(kind))
    np.testing.assert_allclose(product, total, rtol=1e-10)
    assert (product > 0).all()


# ---- sweep

@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", ["gaussian", "constant"])
@pytest.mark.parametrize("shape, patch", [
    ((37,), 8), ((5,), 9), ((1,), 1), ((23, 31), (9, 40)), ((31, 17), (7, 7)), ((13, 11, 17), (6, 5, 8)),
    ((1, 9, 10), (4, 4, 4)), ((3, 4, 5), 8),
])
def test_function_of_position_is_reproduced(shape, patch, kind, overlap):
    # at most 10 patches an axis meet at a voxel; float32 sums of n positive terms err by n*6e-8, in practice sqrt(n)
    volume = rng_for(1, *shape).random((2, *shape), dtype=np.float32) + 0.5
    out = sweep(identity, volume, Grid(shape, patch, overlap), kind=kind, batch=3)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, volume, rtol=1e-5)


@given(grids(), st.integers(1, 5), st.integers(1, 7), st.sampled_from(["reflect", "edge", 0.0]))
@settings(max_examples=60)
def test_sweep_reproduces_any_grid_for_any_batch_and_align(grid, batch, align, fill):
    volume = rng_for(2, *grid.shape).random(grid.shape) + 0.5
    rows = list(sweep_rows(identity, volume, grid, batch=batch, align=align, fill=fill, dtype=np.float64))
    ends = [low + block.shape[1] for low, block in rows]
    assert [low for low, _ in rows] == [0, *ends[:-1]] and ends[-1] == grid.shape[0]
    assert all(low % align == 0 for low, _ in rows)
    np.testing.assert_allclose(np.concatenate([b for _, b in rows], axis=1)[0], volume, rtol=1e-12)


@given(grids(), st.data())
@settings(max_examples=50)
def test_region_equals_crop_of_the_full_run_bit_by_bit(grid, data):
    box = []
    for n in grid.shape:
        lo = data.draw(st.integers(0, n - 1))
        box.append((lo, data.draw(st.integers(lo + 1, n))))
    volume = rng_for(3, *grid.shape).random(grid.shape, dtype=np.float32)
    full = sweep(np.sin, volume, grid)
    crop = tuple(slice(lo, hi) for lo, hi in box)
    align = data.draw(st.integers(1, 5))
    np.testing.assert_array_equal(sweep(np.sin, volume, grid, region=box, align=align), full[(slice(None), *crop)])
    whole = np.full((1, *grid.shape), -5, np.float32)
    sweep(np.sin, volume, grid, region=box, out=whole)
    np.testing.assert_array_equal(whole[(slice(None), *crop)], full[(slice(None), *crop)])
    assert (whole == -5).sum() == whole.size - full[(slice(None), *crop)].size


def reference(predict, source, grid, kind="gaussian", skip=lambda start: False):
    "Two arrays of the volume's size, the literal algorithm"
    weight = functools.reduce(np.multiply.outer, window(grid.patch_size, kind))
    sums, counts = np.zeros(1), np.zeros(grid.shape)
    for start in grid:
        if skip(start): continue
        where, inside = grid.slices(start)
        pred = predict(take_patch(source, start, grid.patch_size, "reflect")[None])[0].astype(float)
        if sums.ndim == 1: sums = np.zeros((len(pred), *grid.shape))
        sums[(slice(None), *where)] += (pred*weight)[(slice(None), *inside)]
        counts[where] += weight[inside]
    return sums/np.where(counts > 0, counts, 1)


def patch_dependent(x):
    "Two channels that depend on the place in the patch and on its content"
    place = sum(np.indices(x.shape[2:]))/10
    return np.stack([x[:, 0] + place, x[:, 0]*x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)[:, 0]], axis=1)


@pytest.mark.parametrize("kind", ["gaussian", "constant"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_sweep_equals_two_volume_reference(kind, batch):
    grid = Grid((14, 9, 12), (6, 12, 5), (0.5, 0, 0.3))
    volume = rng_for(4).random((1, *grid.shape), dtype=np.float32)
    expected = reference(patch_dependent, volume, grid, kind)
    np.testing.assert_allclose(sweep(patch_dependent, volume, grid, kind=kind, batch=batch), expected, rtol=1e-5)
    exact = sweep(patch_dependent, volume, grid, kind=kind, batch=batch, dtype=np.float64)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, expected, rtol=1e-7)  # the reference multiplies its window in float32


@given(grids(d=(2, 2)), st.integers(0, 10**6))
@settings(max_examples=40)
def test_skipped_positions_carry_no_weight(grid, seed):
    volume = rng_for(seed).random((1, *grid.shape), dtype=np.float32)
    left_out = {s for s in grid if rng_for(seed, *s).random() < 0.5}
    out = sweep(patch_dependent, volume, grid, channels=2, skip=left_out.__contains__)
    expected = reference(patch_dependent, volume, grid, skip=left_out.__contains__)
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), rtol=1e-5)


def test_everything_skipped():
    grid, volume = Grid((9, 9), 4), np.ones((9, 9))
    assert (sweep(identity, volume, grid, channels=3, skip=lambda s: True) == np.zeros((3, 9, 9))).all()
    with pytest.raises(DataError, match="Pass channels="): sweep(identity, volume, grid, skip=lambda s: True)


def test_predict_sees_batches_in_grid_order_with_a_channel_axis():
    grid, seen = Grid((10, 7), 4, 0), []
    volume = np.arange(70.).reshape(10, 7)
    def predict(x):
        seen.extend(x[:, 0, 0, 0].tolist())
        assert x.shape[1:] == (1, 4, 4) and len(x) <= 4
        return x
    sweep(predict, volume, grid, batch=4)
    assert seen == [volume[s] for s in grid]


def test_finish_may_change_channels_and_dtype():
    grid, volume = Grid((20, 11), 6, 0.5), rng_for(5).normal(size=(3, 20, 11)).astype(np.float32)
    labels = sweep(identity, volume, grid, finish=lambda b: b.argmax(axis=0).astype(np.uint8))
    assert labels.shape == (20, 11) and labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, volume.argmax(axis=0))


def test_rows_handed_out_are_not_touched_later():
    grid, volume = Grid((30, 5), 4, 0.5), rng_for(6).random((30, 5), dtype=np.float32)
    rows = list(sweep_rows(identity, volume, grid))
    np.testing.assert_allclose(np.concatenate([b for _, b in rows], axis=1)[0], volume, rtol=1e-6)
    assert max(b.shape[1] for _, b in rows) <= 4


@pytest.mark.parametrize("bad", [
    lambda x: x[0], lambda x: x[..., :-1], lambda x: x.sum(), lambda x: x[:1],
])
def test_bad_prediction_is_refused(bad):
    with pytest.raises(DataError, match="must return shape"): sweep(bad, np.zeros((9, 9)), Grid((9, 9), 4), batch=2)


def test_channel_count_may_not_change():
    with pytest.raises(DataError, match="must return shape"):
        sweep(identity, np.zeros((9, 9)), Grid((9, 9), 4), channels=2)


@pytest.mark.parametrize("kwargs, match", [
    (dict(out=np.zeros((1, 9, 8))), "out: the last axes"), (dict(out=np.zeros((2, 9, 9))), "out: needs shape"),
    (dict(out=np.zeros((9, 9))), "out: needs shape"), (dict(out=np.zeros((1, 9, 9), int)), "Pass a `finish`"),
    (dict(finish=lambda b: b[:, :-1]), "finish: must keep"), (dict(region=((0, 10), (0, 9))), "region"),
    (dict(region=((3, 3), (0, 9))), "region"), (dict(region=((0, 9),)), "region"),
    (dict(batch=0), "batch"), (dict(align=0), "align"),
])
def test_bad_arguments_are_refused(kwargs, match):
    with pytest.raises(DataError, match=match): sweep(identity, np.zeros((9, 9), np.float32), Grid((9, 9), 4), **kwargs)


def test_source_must_fit_the_grid():
    with pytest.raises(DataError, match="source: the last axes"): sweep(identity, np.zeros((9, 8)), Grid((9, 9), 4))
    with pytest.raises(DataError, match="one channel axis"): sweep(identity, np.zeros((1, 1, 9, 9)), Grid((9, 9), 4))


def test_blend_guards_its_buffer():
    blend = Blend(Grid((40, 4), 8, 0.5), 1)
    blend.add((0, -2), np.ones((1, 8, 8)))
    with pytest.raises(DataError, match=r"call flush\(4\)"): blend.add((4, -2), np.ones((1, 8, 8)))
    assert [low for low, _ in blend.flush(4)] == [0]
    with pytest.raises(DataError, match="already handed out"): blend.add((0, -2), np.ones((1, 8, 8)))


@pytest.mark.parametrize("kind, border, anywhere", [("gaussian", 0.05, 0.4), ("constant", 1, 1)])
@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_alternating_patches_leave_no_step_at_patch_borders(kind, border, anywhere, overlap):
    grid, signs = Grid(64*6, 64, overlap), itertools.cycle([1, -1])
    y = sweep(lambda x: np.full_like(x, next(signs)), np.zeros(grid.shape, np.float32), grid, kind=kind)[0]
    starts = grid.starts[0]
    steps = np.abs(np.diff(y))
    assert steps[np.r_[starts[1:], starts[:-1] + 64] - 1].max() <= border and steps.max() <= anywhere


# ---- stored arrays

def store(shape, chunks, dtype="f4", fill=None, **kwargs):
    array = zarr.create_array(store=zarr.storage.MemoryStore(), shape=shape, chunks=chunks, dtype=dtype, **kwargs)
    if fill is not None: array[:] = fill
    return array


@pytest.mark.parametrize("slab", [True, False])
@pytest.mark.parametrize("region", [None, ((5, 20), (3, 18))])
@pytest.mark.parametrize("shape, patch", [((29, 23), (8, 9)), ((29, 23), (40, 9)), ((29, 23), (8, 30))])
def test_zarr_in_and_out_equals_numpy(shape, patch, region, slab):
    volume = rng_for(7).random((2, *shape), dtype=np.float32)
    grid = Grid(shape, patch, 0.4)
    source, out = store((2, *shape), (1, 6, 7), fill=volume), store((2, *shape), (2, 5, 6))
    expected = np.zeros((2, *shape), np.float32)
    sweep(np.sin, volume, grid, region=region, out=expected)
    assert sweep(np.sin, source, grid, region=region, out=out, slab=slab, batch=2) is out
    np.testing.assert_array_equal(out[:], expected)


class CountedRows(Recorder):
    chunks = (1, 6, 7)


def test_slab_decodes_every_chunk_row_once():
    volume = np.zeros((2, 50, 23), np.float32)
    grid, source = Grid((50, 23), (8, 9), 0.5), CountedRows(volume)
    sweep(identity, source, grid)
    spans = [(k[1].start, k[1].stop) for k in source.reads]
    assert spans[0][0] == 0 and spans[-1][1] == 50 and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert all(hi % 6 == 0 or hi == 50 for _, hi in spans)
    single = CountedRows(volume)
    sweep(identity, single, grid, slab=False)
    assert len(single.reads) == len(grid) and sum(k[1].stop - k[1].start for k in source.reads) == 50


def test_slab_skips_rows_that_nobody_needs():
    source = CountedRows(np.zeros((2, 100, 9), np.float32))
    grid = Grid((100, 9), (8, 9), 0)
    sweep(identity, source, grid, channels=2, skip=lambda s: 8 < s[0] < 80)
    assert sum(k[1].stop - k[1].start for k in source.reads) < 50


def test_out_chunks_are_written_once():
    out, writes = store((1, 50, 20), (1, 8, 20)), []
    class Spy:
        shape, dtype, chunks = out.shape, out.dtype, out.chunks
        def __setitem__(self, key, value): writes.append((key[1].start, key[1].stop)); out[key] = value
    sweep(identity, np.ones((50, 20), np.float32), Grid((50, 20), (12, 9), 0.5), out=Spy())
    assert all(a % 8 == 0 for a, _ in writes) and all(b % 8 == 0 or b == 50 for _, b in writes)
    assert sum(b - a for a, b in writes) == 50
    np.testing.assert_allclose(out[:], 1, rtol=1e-6)


def test_row_chunk_prefers_shards():
    assert row_chunk(np.zeros((4, 4)), 2) == 1
    assert row_chunk(store((3, 16, 16), (1, 4, 8)), 2) == 4
    assert row_chunk(store((16, 16), (4, 8), shards=(8, 16)), 2) == 8


@given(grids(d=(1, 2)), st.integers(1, 7), st.integers(1, 7))
@settings(max_examples=50)
def test_chunk_reads_equal_counting(grid, a, b):
    chunks = (a, b)[:grid.ndim]
    touched = [c for s in grid for c in chunks_touched(s, grid.patch_size, chunks, grid.shape)]
    assert grid.chunk_reads(chunks) == (len(touched), len(set(touched)))
    for s in grid:
        source, _ = grid.slices(s)
        marked = np.zeros(grid.shape, bool)
        marked[source] = True
        brute = {tuple(i//c for i, c in zip(v, chunks)) for v in np.argwhere(marked)}
        assert brute == set(chunks_touched(s, grid.patch_size, chunks, grid.shape))
        break


# ---- memo, pieces, pipe

@given(grids(d=(1, 3)), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=40)
def test_known_predictions_change_no_bit(grid, align, batch, seed):
    volume = rng_for(seed).random((1, *grid.shape), dtype=np.float32)
    calls, memo = [], {}
    def counted(x):
        calls.extend(x)
        return patch_dependent(x)
    wanted = sweep(counted, volume, grid)
    first = sweep(counted, volume, grid, memo=memo, batch=batch)
    assert set(memo) == set(grid) and len(calls) == 2*len(grid)
    for s in list(memo):
        if rng_for(seed, *s).random() < 0.5: memo.pop(s)
    known = len(memo)
    again = sweep(counted, volume, grid, memo=memo, batch=batch)
    assert np.array_equal(first, wanted) and np.array_equal(again, wanted) and len(calls) == 3*len(grid) - known


@given(grids(d=(2, 3)), st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6), st.booleans())
@settings(max_examples=40)
def test_pieces_are_the_rows_cut_at_absolute_multiples(grid, align, tile, seed, holes):
    volume, rng = rng_for(seed).random((1, *grid.shape), dtype=np.float32), rng_for(seed, "region")
    region = [(int(a), int(rng.integers(a, n)) + 1) for n in grid.shape for a in [rng.integers(n)]]
    skip = (lambda s: rng_for(seed, *s).random() < 0.6) if holes else None
    keys = dict(region=region, channels=2, skip=skip, empty=np.nan)
    wanted = sweep(patch_dependent, volume, grid, **keys)
    out = np.full((2, *grid.shape), -1, np.float32)
    for corner, block in sweep_rows(patch_dependent, volume, grid, align=align, tile=tile, **keys):
        where = tuple(slice(a, a + n) for a, n in zip(corner, block.shape[1:]))
        assert (out[(slice(None), *where)] == -1).all()
        assert all(w.start//tile == (w.stop - 1)//tile for w in where[1:]) and block.shape[1] <= align
        out[(slice(None), *where)] = block
    inside = (slice(None), *(slice(lo, hi) for lo, hi in region))
    np.testing.assert_array_equal(out[inside], wanted)
    assert (out == -1).sum() == out.size - wanted.size


def test_dropped_patches_carry_no_weight():
    grid = Grid((30, 9), (6, 9), 0.5)
    volume = np.zeros((1, 30, 9), np.float32)
    volume[:, 12:14] = 1
    out = sweep(lambda x: x*0 + 3, volume, grid, channels=1, drop=lambda p: not p.any(), empty=-1)
    np.testing.assert_allclose(out[0, 9:18], 3, rtol=1e-6)
    assert (out[0, :9] == -1).all() and (out[0, 18:] == -1).all()


def test_rows_that_nothing_reached_are_one_number():
    grid = Grid((400, 9), (6, 9), 0.5)
    keys = dict(channels=2, skip=lambda s: s[0] != 30, empty=np.nan, align=10, tile=4)
    blocks = dict(sweep_rows(lambda x: x.repeat(2, 1), np.ones((400, 9), np.float32), grid, **keys))
    assert {at for at, b in blocks.items() if any(b.strides)} == {(30, x) for x in (0, 4, 8)}
    assert all(np.isnan(b).all() for b in blocks.values() if not any(b.strides))
    assert (blocks[30, 0][:, :6] == 1).all() and np.isnan(blocks[30, 0][:, 6:]).all()


def test_pipe_sees_positions_and_patches_and_sweep_refuses_pieces():
    grid, seen = Grid((10, 7), 4, 0), []
    def pipe(groups):
        for group, patches in groups:
            seen.extend(s for s, _ in group)
            yield group, patches + 1
    out = sweep(identity, np.zeros((10, 7), np.float32), grid, pipe=pipe, batch=4)
    assert seen == list(grid) and (out == 1).all()
    with pytest.raises(ConfigError, match="tile"): sweep(identity, np.zeros((10, 7)), grid, tile=3)


# ---- memory

@pytest.mark.parametrize("align, region", [(1, None), (16, None), (1, ((0, 240), (30, 90), (0, 60)))])
def test_peak_memory_is_what_sweep_bytes_says(align, region):
    grid = Grid((240, 120, 120), (24, 40, 40), 0.5)
    source, pred = np.zeros(grid.shape, np.uint8), np.zeros((1, 3, 24, 40, 40), np.float32)
    out = np.zeros((3, *grid.shape), np.float32)
    stated = sweep_bytes(grid, 3, align=align, region=region)
    tracemalloc.start()
    try:
        sweep(lambda x: pred, source, grid, out=out, align=align, region=region)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    slack = 2*24*40*40 + 2*2**20 + 2**18  # the input patch, one weighted block, small objects
    assert 0.5*stated < peak <= stated + slack
    assert stated < 0.35*(4*out.size*4//3)  # the usual way: sums and counts of the volume's size


def test_sweep_bytes_does_not_grow_with_the_first_axis():
    small, large = (sweep_bytes(Grid((n, 64, 64), 32, 0.5), 4) for n in (64, 6400))
    assert small == large
    blend = Blend(Grid((640, 64, 64), 32, 0.5), 4)
    assert blend.sums.nbytes <= large <= 2*blend.sums.nbytes + blend.weight.nbytes


def test_slab_memory_is_counted():
    source = store((200, 40, 40), (16, 16, 16), dtype="u1", fill=1)
    grid = Grid(source.shape, (24, 20, 20), 0.5)
    tracemalloc.start()
    try:
        for _ in sweep_rows(lambda x: np.zeros(x.shape, np.float32), source, grid): pass
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert sweep_bytes(grid, 1, source=source) > sweep_bytes(grid, 1)
    assert peak < sweep_bytes(grid, 1, source=source) + 2**20


# ---- crops

def test_random_starts_are_uniform_stable_and_inside():
    starts = random_starts((10, 8, 4), (4, 8, 7), 4000, rng_for(0))
    assert starts.shape == (4000, 3) and starts.dtype == np.int64
    assert (starts[:, 1] == 0).all() and (starts[:, 2] == -1).all()
    counts = np.bincount(starts[:, 0], minlength=7)
    assert len(counts) == 7 and abs(counts - 4000/7).max() < 120  # 5 standard deviations of a binomial: 110
    np.testing.assert_array_equal(random_starts((10, 8, 4), (4, 8, 7), 7, rng_for(0)), starts[:7])
    assert len(random_starts((10,), 4, 0, rng_for(0))) == 0


@given(grids(), st.data())
def test_centred_start_holds_the_voxel_and_stays_inside(grid, data):
    centre = tuple(data.draw(st.integers(0, n - 1)) for n in grid.shape)
    start = centred_start(grid.shape, grid.patch_size, centre)
    for s, p, n, c in zip(start, grid.patch_size, grid.shape, centre):
        assert s <= c < s + p
        assert (0 <= s and s + p <= n) if n >= p else s == axis_starts(n, p)[0]
        if n >= p and 0 <= c - p//2 <= n - p: assert c - s == p//2


# ---- a peer

@pytest.mark.slow
@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_agrees_with_monai_sliding_window(overlap):
    torch = pytest.importorskip("torch")
    inferers = pytest.importorskip("monai.inferers")
    volume = rng_for(8).random((1, 1, 20, 24, 22), dtype=np.float32)
    grid = Grid(volume.shape[2:], 8, overlap)  # whole steps, so that MONAI, which rounds them down, agrees
    theirs = inferers.sliding_window_inference(torch.from_numpy(volume), (8,)*3, 1, lambda x: torch.from_numpy(
        patch_dependent(x.numpy())), overlap=overlap, mode="constant").numpy()[0]
    np.testing.assert_allclose(sweep(patch_dependent, volume[0], grid, kind="constant"), theirs, rtol=1e-4)
