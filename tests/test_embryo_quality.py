"""Distances, precision and recall, copies and the table of runs; embryo.quality."""
import csv
import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medvol_nb import phantoms
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, read_csv, rng_for
from medvol_nb.embryo.features import Extractor, LabelledImages, balanced, extract_features, phantom_images
from medvol_nb.embryo.phantom import jpeg_bytes
from medvol_nb.embryo.quality import (
    add_quality,
    correlation,
    distances,
    find_copies,
    frechet_distance,
    kernel_distance,
    precision_recall,
    refuse_copies,
    run_quality,
    typicality,
    wilson,
)

torch.set_num_threads(1)


class Pooled(nn.Module):
    "16 means and 16 spreads of a picture"

    def forward(self, x):
        low = nn.functional.adaptive_avg_pool2d(x, 4)
        return torch.cat([low.flatten(1), (nn.functional.adaptive_avg_pool2d(x * x, 4) - low * low).flatten(1)], 1)


POOLED = Extractor(Pooled(), 64)


def pictures(phase, seeds, size=64, synthetic=False):
    return phantom_images([phase], seeds, size, synthetic)


def gaussian(seed, n, d=12, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) * scale + shift


# ------------------------------------------------------------------------------------------------------- distances


def test_A14_frechet_of_a_set_with_itself_is_zero():
    for n, d in ((40, 100), (300, 20)):
        x = gaussian(0, n, d) @ gaussian(1, d, d)
        assert frechet_distance(x, x) < 1e-6 * x.var(0).sum()
        assert frechet_distance(x, x[::-1]) < 1e-6 * x.var(0).sum()


def test_A14_frechet_agrees_with_the_closed_form_of_gaussians():
    "For diagonal covariances it is the sum of (mean difference)^2 and (difference of standard deviations)^2"
    rng = np.random.default_rng(3)
    mean, spread = rng.standard_normal(8), rng.uniform(0.5, 2, 8)
    a, b = gaussian(4, 60_000, 8), gaussian(5, 60_000, 8) * spread + mean
    expected = (mean**2).sum() + ((1 - spread) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("n, m, d", [(300, 200, 24), (25, 300, 24), (20, 21, 24), (24, 24, 24), (2, 2, 3)])
def test_A14_frechet_equals_matrix_roots(n, m, d):
    "Eigenvalues of the product of covariances are real and >= 0; their roots sum to the trace of the root"
    a, b = gaussian(6, n, d), gaussian(7, m, d, 1.5, 0.3)
    product = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * np.sqrt(product).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_A14_frechet_equals_that_of_monai():
    from monai.metrics import FIDMetric

    a, b = gaussian(8, 200, 16), gaussian(9, 150, 16, 1.3, 0.2)
    theirs = float(FIDMetric()(torch.from_numpy(a), torch.from_numpy(b)))
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-3)


def test_frechet_survives_constant_features_and_refuses_nonsense():
    x = gaussian(0, 20, 4)
    x[:, 1] = 7
    assert frechet_distance(x, x) < 1e-9 and frechet_distance(x, x + 1) == pytest.approx(4)
    for bad, message in (
        (x[:1], "at least 2"),
        (x[0], "must be"),
        (x * np.nan, "NaN"),
        (x[:, :3], "features differ"),
    ):
        with pytest.raises(DataError, match=message):
            frechet_distance(x, bad)


def test_A14_kernel_distance_is_unbiased_and_seeded():
    same = [kernel_distance(gaussian(k, 60), gaussian(k + 100, 60))[0] for k in range(20)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(20) + 1e-3
    a, b = gaussian(1, 50), gaussian(2, 80, shift=1.0)
    mean, sd = kernel_distance(a, b, seed=4)
    assert (mean, sd) == kernel_distance(a, b, seed=4) != kernel_distance(a, b, seed=5) and mean > 5 * sd > 0


def test_kernel_distance_by_hand():
    "One subset that is the whole set: the definition, written out"
    a, b = gaussian(1, 5, 3), gaussian(2, 5, 3, shift=0.5)

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    inner = [sum(k(s[i], s[j]) for i in range(5) for j in range(5) if i != j) / 20 for s in (a, b)]
    cross = sum(k(x, y) for x in a for y in b) / 25
    assert kernel_distance(a, b, subsets=1)[0] == pytest.approx(sum(inner) - 2 * cross)


def test_distances_are_exact_also_for_near_and_equal_points():
    from scipy.spatial.distance import cdist

    a = gaussian(0, 40, 30) + 1e3
    b = np.concatenate([a[:5], a[:5] + 1e-7, gaussian(1, 10, 30) + 1e3])
    np.testing.assert_allclose(distances(a, b), cdist(a, b), rtol=1e-5, atol=1e-12)
    assert (distances(a, a).diagonal() == 0).all()


def test_A14_precision_and_recall_by_definition():
    real, synth, k = gaussian(0, 40, 3), gaussian(1, 30, 3, 0.6, 0.3), 5
    got = precision_recall(real, synth, k)

    def ball(s, i):
        return np.sort([np.linalg.norm(s[i] - t) for j, t in enumerate(s) if j != i])[k - 1]

    inside = np.array([[np.linalg.norm(r - s) <= ball(real, i) for s in synth] for i, r in enumerate(real)])
    other = np.array([[np.linalg.norm(r - s) <= ball(synth, j) for j, s in enumerate(synth)] for r in real])
    assert got["precision"] == inside.any(0).mean() and got["recall"] == other.any(1).mean()
    assert got["coverage"] == inside.any(1).mean() and got["density"] == pytest.approx(inside.sum(0).mean() / k)
    same = precision_recall(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_intervals_are_those_of_wilson_and_count_videos():
    from scipy.stats import binomtest

    for hits, n in ((0, 10), (3, 10), (10, 10), (450, 500)):
        theirs = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    real, synth = gaussian(0, 60, 3), gaussian(1, 60, 3)
    by_frame, by_video = precision_recall(real, synth), precision_recall(real, synth, videos=["a", "b", "c"] * 20)
    assert by_video["recall"] == by_frame["recall"]
    assert by_video["recall_high"] - by_video["recall_low"] > by_frame["recall_high"] - by_frame["recall_low"]
    assert by_video["precision_low"] == by_frame["precision_low"]


def test_typicality_is_uniform_for_real_pictures_and_small_for_strange_ones():
    mix = gaussian(0, 200, 200)
    real, more, far = (gaussian(k, 400, 200) @ mix * s for k, s in ((1, 1), (2, 1), (3, 1.6)))
    p = typicality(real, more)
    assert 0.35 < p.mean() < 0.8 and (p < 0.01).mean() < 0.02 and (typicality(real, far) < 0.01).mean() > 0.9
    with pytest.raises(DataError, match="at least 5 real"):
        typicality(real[:4], more)
    with pytest.raises(DataError, match="same features"):
        typicality(np.ones((10, 3)), np.ones((2, 3)))


# ---------------------------------------------------------------------------------------------------------- features


def test_D24_features_keep_every_picture_of_a_batch():
    images = pictures(3, range(7))
    whole = extract_features(POOLED, images, batch_size=7)
    assert whole.values.shape == (7, 32) and len(np.unique(whole.values, axis=0)) == 7
    for batch in (1, 2, 3):
        np.testing.assert_allclose(extract_features(POOLED, images, batch_size=batch).values, whole.values, atol=1e-6)


def test_D25_phases_do_not_share_statistics(tmp_path):
    sets = {p: pictures(p, range(8)) for p in (3, 11)}
    cached = {p: extract_features(POOLED, s, cache=tmp_path).values for p, s in sets.items()}
    assert len(list(tmp_path.glob("*.npz"))) == 2 and not np.allclose(cached[3], cached[11])
    for p, s in sets.items():
        assert np.array_equal(extract_features(POOLED, s, cache=tmp_path).values, cached[p])
    assert torch.is_grad_enabled()


def test_cache_notices_edited_files_other_networks_and_damage(tmp_path, caplog):
    path = tmp_path / "a.png"
    Image.fromarray(phantoms.embryo_frame(3, 64, 0)).save(path)
    images = LabelledImages.of([path], [3], ["E0"])
    first = extract_features(POOLED, images, cache=tmp_path / "c").values
    entry = next((tmp_path / "c").glob("*.npz"))
    entry.write_bytes(entry.read_bytes()[:100])
    assert np.array_equal(extract_features(POOLED, images, cache=tmp_path / "c").values, first)
    Image.fromarray(phantoms.embryo_frame(11, 64, 0)).save(path)
    edited = extract_features(POOLED, LabelledImages.of([path], [3], ["E0"]), cache=tmp_path / "c").values
    assert not np.allclose(edited, first)
    extract_features(Extractor(Pooled(), 32), LabelledImages.of([path], [3], ["E0"]), cache=tmp_path / "c")
    assert len(list((tmp_path / "c").glob("*.npz"))) == 3


def test_features_of_different_networks_are_never_compared():
    other = Extractor(Pooled(), 64, mean=0.4)
    assert other.digest != POOLED.digest == Extractor(Pooled(), 64).digest
    a, b = extract_features(POOLED, pictures(3, range(8))), extract_features(other, pictures(3, range(8)))
    for call in (lambda: find_copies(a, a, b), lambda: run_quality(a, a, b, 3)):
        with pytest.raises(DataError, match="different networks"):
            call()


def test_extraction_leaves_the_network_as_it_was_and_names_bad_output():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    extract_features(Extractor(net.train(), 8), pictures(3, range(4), 8))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(DataError, match="must give"):
        extract_features(Extractor(nn.Identity(), 8), pictures(3, range(4), 8))
    with pytest.raises(DataError, match="NaN or infinite"):
        extract_features(Extractor(nn.Sequential(nn.Flatten()), 8, std=0.0), pictures(3, range(4), 8))
    with pytest.raises(DataError, match="no pictures"):
        extract_features(POOLED, pictures(3, []))


def test_damaged_and_missing_pictures_are_named(tmp_path):
    data = jpeg_bytes(phantoms.embryo_frame(3, 64, 0))
    (tmp_path / "cut.jpeg").write_bytes(data[: len(data) // 2])
    (tmp_path / "not.png").write_bytes(b"<html>")
    for name, error in (("cut.jpeg", FormatError), ("not.png", FormatError), ("no.jpeg", MissingFile)):
        with pytest.raises(error, match=name):
            LabelledImages.of([tmp_path / name], [3]).load(0, 32)


def test_balanced_choice_takes_videos_in_turn():
    images = LabelledImages.of([np.zeros((4, 4), np.uint8)] * 100, [0] * 100, ["a"] * 90 + ["b"] * 6 + ["c"] * 4)
    for n in (3, 9, 12, 30, 200):
        pick = balanced(images, n, seed=2)
        counts = [(images.videos[pick] == v).sum() for v in "abc"]
        assert len(pick) == min(n, 100) == len(set(pick.tolist())) and np.array_equal(pick, balanced(images, n, 2))
        assert counts[1] >= min(6, n // 3) and counts[2] >= min(4, n // 3)


# ------------------------------------------------------------------------------------------------------------ copies


def test_A14_planted_copies_are_found_and_unseen_embryos_are_not():
    "16 training pictures turned, mirrored, brightened, noisy and compressed, among 64 that are new"
    train, test = pictures(5, range(40), 128), pictures(5, range(1000, 1064), 128)
    rng, planted = rng_for(0, "copies"), []
    for k in range(16):
        frame = np.rot90(train.sources[k][:, ::-1] if k % 2 else train.sources[k], k % 4)
        frame = (frame * rng.uniform(0.9, 1.1) + 3 * rng.standard_normal(frame.shape)).clip(0, 255).astype(np.uint8)
        planted.append(np.asarray(Image.open(io.BytesIO(jpeg_bytes(frame, 85)))))
    new = pictures(5, range(2000, 2064), 128, synthetic=True)
    parts = [extract_features(POOLED, s) for s in (train, test, new + LabelledImages.of(planted, [5] * 16))]
    found = find_copies(*parts)
    assert found.flagged[64:].all() and found.nearest[64:].tolist() == list(range(16))
    assert found.flagged[:64].sum() <= 1
    with pytest.raises(DataError, match="near-copies"):
        refuse_copies(found)
    refuse_copies(find_copies(*parts[:2], parts[2].at(np.arange(64))))
    assert find_copies(parts[0], parts[1], parts[0]).ratio == 0


def test_correlation_ignores_turns_gain_and_flat_pictures():
    a = np.stack([phantoms.embryo_frame(p, 64, 1) for p in (2, 7)])
    turns = [np.rot90(x, k, (1, 2)) for x in (a, a[:, :, ::-1]) for k in range(4)]
    for t in turns:
        assert np.allclose(correlation(t, a).diagonal(), 1, atol=1e-5)
    assert correlation(a, (a * 0.5 + 40).astype(np.float32)).diagonal().min() > 0.999
    assert (correlation(np.zeros((1, 64, 64), np.uint8), a) == 0).all()


# ------------------------------------------------------------------------------------------------------------- rows


def features_of(frames, phase, extractor=POOLED):
    return extract_features(extractor, LabelledImages.of(frames, [phase] * len(frames)))


def test_A14_distance_grows_with_blur_and_with_noise():
    from scipy.ndimage import gaussian_filter

    train, test = (extract_features(POOLED, pictures(11, s)) for s in (range(24), range(100, 124)))
    frames = [phantoms.embryo_frame(11, 64, s).astype(np.float32) for s in range(200, 224)]
    noise = rng_for(0, "noise").standard_normal((24, 64, 64))

    def fid(made):
        return run_quality(train, test, features_of([m.clip(0, 255).astype(np.uint8) for m in made], 11), 11)[0]["fid"]

    blurred = [fid([gaussian_filter(f, s) for f in frames]) for s in (0, 1, 2, 4)]
    noisy = [fid([f + s * n for f, n in zip(frames, noise)]) for s in (0, 15, 30, 60)]
    assert blurred == sorted(blurred) and noisy == sorted(noisy) and blurred[-1] > 3 * blurred[0]


def test_run_quality_scales_features_and_says_nan_for_too_few():
    train = extract_features(POOLED, pictures(3, range(10)) + pictures(4, range(10)))
    test, made = (extract_features(POOLED, pictures(3, s)) for s in (range(50, 58), range(90, 93)))
    row, copies = run_quality(train, test, made, 3)
    assert row["n_train"] == 10 and row["n_test"] == 8 and row["n_synth"] == 3 == row["n_reference"]
    assert np.isfinite(row["fid"]) and np.isnan(row["precision"]) and len(copies.flagged) == 3
    larger = [dataclasses.replace(f, values=f.values * 1000) for f in (train, test, made)]
    assert run_quality(*larger, 3)[0]["fid"] == pytest.approx(row["fid"], rel=1e-4)
    with pytest.raises(DataError, match="no test pictures"):
        run_quality(train, test.at(test.phases == 9), made, 3)


def test_agreement_and_entropy_come_from_the_head():
    head = nn.Linear(32, 16)
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.eye(16)[4] * 50)
    judge = Extractor(Pooled(), 64, head)
    train, test, made = (
        extract_features(judge, pictures(3, s)) for s in (range(8), range(50, 58), range(90, 98))
    )
    row = run_quality(train, test, made, 3)[0]
    assert row["accuracy_synth"] == row["accuracy_orig"] == 0 and row["accuracy_near_synth"] == 1
    assert row["entropy_synth"] == pytest.approx(0, abs=1e-6) and row["predicted"] == "t3:8"


def test_table_keeps_a_row_a_run_and_phase_and_one_network(tmp_path):
    path, names = tmp_path / "out" / "synth_img_metrics.csv", {"model_name": "m", "orig_data": "o"}
    row = {"fid": 1.5, "kid": 0.25, "extractor": "abc"}
    add_quality(path, row, synth_data="a", label="t2", **names)
    add_quality(path, row | {"fid": 2.0}, synth_data="a", label="t4", **names)
    add_quality(path, row | {"fid": 3.0, "extra": 1}, synth_data="a", label="t2", **names)
    rows = read_csv(path)
    assert [(r["label"], r["fid"], r["extra"]) for r in rows] == [("t4", "2", "nan"), ("t2", "3", "1")]
    with open(path, newline="") as f:
        assert next(csv.reader(f))[:9] == [
            "model_name", "orig_data", "synth_data", "label", "entropy_orig", "entropy_synth", "accuracy_orig",
            "accuracy_synth", "fid",
        ]  # fmt: skip
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another network"):
        add_quality(path, row | {"extractor": "other"}, synth_data="b", label="t2", **names)
    assert path.read_bytes() == before
