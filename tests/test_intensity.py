"Normalisers: exact arithmetic, round trips, streaming statistics, refusals"
import itertools
import json
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvol_nb.core import ConfigError, DataError, fingerprint, rng_for
from medvol_nb.intensity import Line, Normalizer, Statistics, apply_line, dataset_statistics, window_range

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

SPECS = ["identity", "scale", "ct:-1000,1000", "ct:-1024,3071,-50,205", "window:40,400", "minmax", "minmax:-1,1",
         "minmax:nonzero", "percentile:0.5,99.5", "percentile:2,98,0,255,nonzero", "zscore", "zscore:nonzero",
         "zscore:nonzero,nonfinite=zero", "dataset", "dataset:nonzero"]
FREE = [s for s in SPECS if not s.startswith("dataset")]


def normal(seed=0, shape=(6, 7, 5), scale=300.0): return rng_for(seed, "i").normal(20, scale, shape)


# ---- arithmetic

@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "i8", "f2", "f4", "f8", "?", ">i2", ">f4"])
@pytest.mark.parametrize("spec", FREE)
@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 1, 7), (9,), (), (0, 3), (2, 3, 4, 5)])
def test_any_dtype_and_shape_gives_new_finite_float32(dtype, spec, shape):
    vol = np.asarray(rng_for(1).integers(0, 100, shape)).astype(dtype)
    before = vol.copy()
    out = Normalizer.parse(spec)(vol)
    assert out.dtype == np.float32 and out.shape == shape and np.isfinite(out).all()
    assert not np.shares_memory(out, vol) and np.array_equal(vol, before)


@pytest.mark.parametrize("spec", FREE)
def test_non_contiguous_equals_contiguous(spec):
    vol = normal()[::-1, ::2].transpose(2, 0, 1)
    np.testing.assert_array_equal(Normalizer.parse(spec)(vol), Normalizer.parse(spec)(np.ascontiguousarray(vol)))


@pytest.mark.parametrize("spec", FREE)
def test_rows_are_processed_alike(spec):
    # more than one block of rows: 2**17 elements
    vol = normal(shape=(70, 64, 64)).astype(np.float32)
    norm = Normalizer.parse(spec)
    np.testing.assert_allclose(norm(vol), norm(vol.reshape(1, -1)).reshape(vol.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec, value, expected", [
    ("ct:-1000,1000", [-2000, -1000, 0, 500, 1000, 4000], [0, 0, 0.5, 0.75, 1, 1]),
    ("ct:-1024,3071,-50,205", [-5000, -1024, 3071], [-50, -50, 205]),
    ("window:40,400", [-160, 40, 140, 240, 999], [0, 0.5, 0.75, 1, 1]),
    ("minmax", [3, 4, 7], [0, 0.25, 1]),
    ("minmax:-1,1", [3, 4, 7], [-1, -0.5, 1]),
    ("minmax:nonzero", [0, 3, 4, 7], [0, 0, 0.25, 1]),
    ("zscore", [1, 3], [-1, 1]),
    ("zscore:nonzero", [0, 1, 3, 0], [0, -1, 1, 0]),
    ("percentile:25,75", [0, 1, 2, 3, 4], [0, 0, 0.5, 1, 1]),
    ("identity", [-3.5, 7], [-3.5, 7]),
])
def test_known_answers(spec, value, expected):
    np.testing.assert_allclose(Normalizer.parse(spec)(np.array(value, np.float32)), expected, atol=1e-7)


@pytest.mark.parametrize("dtype, top", [("u1", 255), ("u2", 65535), ("i2", 32767), ("?", 1)])
def test_scale_divides_by_the_dtype_maximum(dtype, top):
    assert Normalizer.parse("scale")(np.array([top, 0], dtype)).tolist() == [1, 0]


@pytest.mark.parametrize("spec", FREE)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e9, 7, 3e38])
def test_constant_volume_is_finite_and_flat(spec, value):
    out = Normalizer.parse(spec)(np.full((4, 4), value))
    assert np.isfinite(out).all() and np.ptp(out) == 0
    if spec.split(":")[0] in ("minmax", "percentile", "zscore") and "-1" not in spec: assert (out == 0).all()


@pytest.mark.parametrize("spec", ["ct:-1,1", "minmax", "percentile:0,100", "window:0,0.1"])
def test_unit_range_is_never_left(spec):
    for k in range(20):
        out = Normalizer.parse(spec)(normal(k, scale=10.0**(k - 10)).astype(np.float32))
        assert out.min() >= 0 and out.max() <= 1


def test_large_offsets_keep_their_small_differences():
    vol = 1e9 + np.arange(4.0)
    np.testing.assert_allclose(Normalizer.parse("minmax")(vol), np.arange(4)/3, atol=1e-7)
    expected = (np.arange(4) - 1.5)/1.25**0.5
    np.testing.assert_allclose(Normalizer.parse("zscore")(vol.astype(np.int64)), expected, rtol=1e-6)


def test_extreme_range_does_not_overflow():
    assert Normalizer.parse("minmax")(np.array([-3e38, 0, 3e38], np.float32)).tolist() == [0, 0.5, 1]


@given(st.floats(-50, 50), st.floats(0.1, 50))
@settings(max_examples=40)
def test_statistics_kinds_do_not_care_about_units(shift, gain):
    vol = normal()
    for spec in ("zscore", "minmax", "percentile:1,99"):
        norm = Normalizer.parse(spec)
        np.testing.assert_allclose(norm(vol*gain + shift), norm(vol), atol=1e-5)


def test_mask_gives_statistics_but_all_voxels_are_mapped():
    vol, mask = normal(), normal(5) > 0
    inside = vol[mask]
    np.testing.assert_allclose(Normalizer.parse("zscore")(vol, mask), (vol - inside.mean())/inside.std(), atol=1e-5)
    z = Normalizer.parse("zscore")
    np.testing.assert_array_equal(z(vol, mask), z(vol, mask.astype(int)*3))
    low, high = np.percentile(inside, [5, 95])
    expected = (np.clip(vol, low, high) - low)/(high - low)
    np.testing.assert_allclose(Normalizer.parse("percentile:5,95")(vol, mask), expected, atol=1e-6)
    np.testing.assert_array_equal(Normalizer.parse("ct:-1,1")(vol, mask), Normalizer.parse("ct:-1,1")(vol))


def test_nonzero_leaves_background_out_and_at_zero():
    vol = np.where(normal(7) > 0, normal(8) + 1000, 0)
    out, fg = Normalizer.parse("zscore:nonzero")(vol), vol != 0
    assert (out[~fg] == 0).all()
    np.testing.assert_allclose([out[fg].mean(), out[fg].std()], [0, 1], atol=1e-5)
    assert (Normalizer.parse("zscore:nonzero")(np.zeros((3, 3))) == 0).all()
    both = Normalizer.parse("zscore:nonzero")(vol, mask=normal(9) > 0)
    chosen = vol[fg & (normal(9) > 0)]
    np.testing.assert_allclose(both[fg], ((vol - chosen.mean())/chosen.std())[fg], atol=1e-5)


def test_apply_line_and_window():
    assert apply_line(np.array(3), Line(1, 2)).tolist() == 1 and window_range(50, 350) == (-125, 225)
    with pytest.raises(ConfigError): window_range(0, float("nan"))


# ---- bad values

@pytest.mark.parametrize("spec", FREE)
def test_nonfinite_is_refused_with_counts_or_zeroed(spec):
    if "nonfinite" in spec: return
    vol = np.array([[np.nan, 1, 5], [np.inf, -np.inf, 0]], np.float32)
    with pytest.raises(DataError, match="1 NaN, 2 infinite and 0 too large values among 6"): Normalizer.parse(spec)(vol)
    norm = Normalizer(Normalizer.parse(spec).kind, Normalizer.parse(spec).params, nonfinite="zero")
    np.testing.assert_array_equal(norm(vol), Normalizer.parse(spec)(np.array([[0, 1, 5], [0, 0, 0]], np.float32)))
    assert np.isnan(vol[0, 0])


def test_values_beyond_float32_are_counted():
    with pytest.raises(DataError, match="0 NaN, 0 infinite and 1 too large"):
        Normalizer.parse("zscore")(np.array([1e39, 0]))


@pytest.mark.parametrize("vol", [[1, 2], "abc", None, np.array([1j]), np.array(["a"]), np.array([None])])
def test_only_real_arrays(vol):
    with pytest.raises(DataError, match="intensity:"): Normalizer.parse("zscore")(vol)


def test_torch_tensor_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(DataError, match="NumPy array is needed, got torch.Tensor"):
        Normalizer.parse("zscore")(torch.zeros(3))


def test_masks_are_checked():
    with pytest.raises(DataError, match="mask has shape"): Normalizer.parse("zscore")(normal(), np.ones((2, 2)))
    with pytest.raises(DataError, match="mask is empty"): Normalizer.parse("zscore")(normal(), normal() > 1e9)


# ---- specs

@pytest.mark.parametrize("spec", SPECS)
def test_text_object_dict_round_trip(spec):
    norm = Normalizer.parse(spec)
    assert str(norm) == spec and Normalizer.parse(str(norm)) == norm
    again = Normalizer.from_dict(json.loads(json.dumps(norm.to_dict())))
    assert again == norm and fingerprint(again) == fingerprint(norm) and pickle.loads(pickle.dumps(norm)) == norm
    assert Normalizer.parse(norm) is norm and Normalizer.parse(norm.to_dict()) == norm


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_numbers_survive_the_text(low, width):
    norm = Normalizer("ct", {"low": low, "high": low + width})
    assert Normalizer.parse(str(norm)) == norm


@pytest.mark.parametrize("spec, same", [
    ("none", "identity"), ("robust", "percentile:1,99"), ("robust:2,98", "percentile:2,98"),
    ("robust:nonzero", "percentile:1,99,nonzero"), ("ct_normalization", "dataset"), ("zscore_patch", "zscore"),
    ("percentile", "percentile:0.5,99.5"), (" window : 40 , 400 ", "window:40,400"), ("ct:-1e3,1e3", "ct:-1000,1000"),
    ("ct:-1000,1000,0,1", "ct:-1000,1000"), ("zscore:nonfinite=error", "zscore"), ("nonzero", "zscore:nonzero"),
])
def test_other_spellings(spec, same): assert Normalizer.parse(spec) == Normalizer.parse(same)


@pytest.mark.parametrize("spec, match", [
    ("zscor", "did you mean 'zscore'"), ("CT:0,1", "Allowed: identity, scale, ct"), ("", "unknown kind ''"),
    ("ct", "takes 2 or 4 numbers"), ("ct:1", "got 1"), ("ct:1,2,3", "got 3"), ("ct:a,b", "'a' is no number"),
    ("ct:nan,1", "finite"), ("ct:0,inf", "finite"), ("ct:1,1", "low must be below high"),
    ("window:40,0", "width must be > 0"), ("window:40,-1", "width must be > 0"),
    ("percentile:99,1", "q_low must be below"), ("percentile:-1,50", "0 to 100"), ("percentile:0,101", "0 to 100"),
    ("zscore:3", "takes 0 numbers"), ("identity:nonzero", "unknown parameters"),
    ("minmax:1,0", "out_low must be below"),
    ("zscore:nonzer", "'nonzer' is no number"), (3, "a text or a dict"), (None, "a text or a dict"),
    ({"kind": "ct"}, "are missing"), ({"params": {}}, "'kind' is missing"), ({"kind": ["ct"]}, "unknown kind"),
    ({"kind": "zscore", "x": 1}, "unknown keys"), ({"kind": "zscore", "params": {"low": 1}}, "unknown parameters"),
    ({"kind": "zscore", "nonfinite": "skip"}, "must be 'error'"),
    ({"kind": "zscore", "stats": {"mean": 1}}, "statistics .* are needed"),
    ({"kind": "ct", "params": {"low": 0, "high": 1}, "stats": {"n": 1}}, "has no statistics"),
    ({"kind": "ct", "params": {"low": True, "high": 2}}, "finite numbers"),
])
def test_bad_specs_are_named(spec, match):
    with pytest.raises(ConfigError, match=match): Normalizer.parse(spec)


def test_normalizer_is_frozen():
    with pytest.raises(AttributeError): Normalizer.parse("zscore").kind = "ct"


# ---- statistics

@pytest.mark.parametrize("make", [
    lambda r: r.integers(-1024, 3072, (20, 30, 10)).astype(np.int16),
    lambda r: r.integers(0, 256, 5000).astype(np.uint8),
    lambda r: r.integers(0, 65536, 5000).astype(np.uint16),
    lambda r: np.rint(r.normal(0, 400, 5000)).astype(np.float32),
])
def test_percentiles_of_whole_numbers_are_exact(make):
    parts = [make(rng_for(k)) for k in range(3)]
    stats = Statistics()
    for p in parts: stats.add(p)
    values = np.concatenate([p.ravel() for p in parts]).astype(float)
    for q in (0, 0.5, 1, 25, 50, 75, 99.5, 99.99, 100):
        np.testing.assert_allclose(stats.percentile(q), np.percentile(values, q), atol=1e-9)
    np.testing.assert_allclose([stats.mean, stats.std], [values.mean(), values.std()], rtol=1e-12)
    assert (stats.n, stats.min, stats.max) == (values.size, values.min(), values.max())


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1, 1e4, 1e9, 1e30])
@pytest.mark.parametrize("shift", [0, 3])
def test_percentiles_of_floats_are_within_one_bin(scale, shift):
    values = (rng_for(2).normal(shift, 1, 20000)*scale).astype(np.float32)
    stats = Statistics().add(values)
    for q in (0, 0.5, 10, 50, 90, 99.5, 100):
        true = np.percentile(values.astype(float), q)
        assert abs(stats.percentile(q) - true) <= 2**-11*abs(true) + 1e-3*scale  # one bin, and the gap to a neighbour


def test_whole_and_broken_numbers_mix():
    values = np.r_[np.arange(-50, 50), np.linspace(-50, 50, 1001) + 0.0005]
    stats = Statistics().add(values)
    for q in (1, 25, 50, 75, 99): assert abs(stats.percentile(q) - np.percentile(values, q)) < 0.05


def test_zero_negative_zero_and_extremes():
    top = np.finfo(np.float32).max
    stats = Statistics().add(np.array([-top, -0.0, 0.0, 1e-40, top]))
    assert (stats.percentile(0), stats.percentile(50), stats.percentile(100)) == (-float(top), 0, float(top))


def test_order_and_partition_do_not_matter():
    parts = [normal(k, (50,), 10.0**k) + 100 for k in range(4)]
    found = []
    for order in itertools.permutations(range(4)):
        stats = Statistics()
        for k in order: stats.add(parts[k])
        found.append((stats.percentile(0.5), stats.percentile(50), stats.percentile(99.5)))
        np.testing.assert_allclose([stats.mean, stats.std], [np.mean(parts), np.std(parts)], rtol=1e-12)
    assert len(set(found)) == 1
    one, two = Statistics().add(parts[0]).add(parts[1]), Statistics().add(parts[2]).add(parts[3])
    one.merge(two).merge(Statistics())
    assert (one.percentile(0.5), one.percentile(50), one.percentile(99.5)) == found[0] and one.n == 200


def test_statistics_errors():
    with pytest.raises(DataError, match="no values"): Statistics().percentile(5)
    with pytest.raises(ConfigError, match="0 to 100"): Statistics().add(np.ones(3)).percentile(101)
    with pytest.raises(DataError, match="histogram=False"): Statistics().add(np.ones(3), histogram=False).percentile(5)
    assert Statistics().std == 0


def test_memory_is_bounded():
    # 40 volumes of 1 MiB; the stream itself holds one at a time
    tracemalloc.start()
    try:
        Normalizer.parse("dataset").fit((normal(k, (64, 64, 64)).astype(np.float32), None) for k in range(40))
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 40*2**20


def test_dataset_statistics():
    vol = normal()
    found = dataset_statistics([(vol, vol > 0), (vol, None)])
    values = np.r_[vol[vol > 0], vol.ravel()]
    assert found["n"] == values.size and list(found) == ["n", "mean", "std", "min", "max", "percentile_00_5", "median",
                                                         "percentile_99_5"]
    np.testing.assert_allclose([found["mean"], found["std"]], [values.mean(), values.std()], rtol=1e-12)
    np.testing.assert_allclose(found["median"], np.median(values), rtol=2e-2)
    assert json.loads(json.dumps(found)) == found


# ---- fit

def test_fit_dataset_is_clip_and_zscore_of_the_foreground():
    vols = [np.rint(normal(k)).astype(np.int16) for k in range(5)]
    norm = Normalizer.parse("dataset").fit((v, v > -100) for v in vols)
    fg = np.concatenate([v[v > -100] for v in vols]).astype(float)
    low, high = np.percentile(fg, [0.5, 99.5])
    np.testing.assert_allclose(norm(vols[0]), (np.clip(vols[0], low, high) - fg.mean())/fg.std(), atol=1e-5)
    assert Normalizer.from_dict(json.loads(json.dumps(norm.to_dict()))) == norm and str(norm) == "dataset"


@pytest.mark.parametrize("spec", [s for s in SPECS if s.split(":")[0] in ("zscore", "minmax", "percentile", "dataset")])
def test_fitted_object_is_new_and_equal_for_every_patch(spec):
    vol = np.rint(normal(3, (8, 8, 8)))
    norm = Normalizer.parse(spec)
    fitted = norm.fit([(vol, None)])
    assert not norm.is_fitted and norm.stats is None and fitted.is_fitted and fitted.kind == norm.kind
    np.testing.assert_array_equal(fitted(vol)[2:5, :, 1:3], fitted(vol[2:5, :, 1:3]))
    if norm.kind != "dataset": np.testing.assert_allclose(fitted(vol), norm(vol), atol=1e-5)


def test_fit_reads_an_iterator_once_and_ignores_empty_masks():
    vol = normal()
    a = Normalizer.parse("zscore").fit(iter([(vol, None), (vol*50, vol > 1e9)]))
    assert a == Normalizer.parse("zscore").fit([(vol, None)])


def test_fit_of_fixed_kinds_reads_nothing():
    def boom():
        raise AssertionError("read")
        yield
    norm = Normalizer.parse("ct:0,1")
    assert norm.fit(boom()) is norm and norm.is_fitted


def test_fit_errors():
    norm = Normalizer.parse("dataset")
    with pytest.raises(DataError, match="call fit"): norm(normal())
    with pytest.raises(DataError, match="no voxel to fit to"): norm.fit([(normal(), normal() > 1e9)])
    with pytest.raises(DataError, match="1 NaN"): norm.fit([(np.array([1, np.nan]), None)])
    zero = Normalizer.parse("dataset:nonfinite=zero").fit([(np.array([1.0, np.nan, 3.0]), None)])
    assert zero.stats["min"] == 0 and zero.stats["n"] == 3


def test_constant_data_set_gives_zeros():
    norm = Normalizer.parse("dataset").fit([(np.full((3, 3), 0.1), None)]*3)
    assert norm.stats["std"] == 0 and (norm(normal()) == 0).all()
