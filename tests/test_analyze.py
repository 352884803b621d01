"""Class statistics and weights: against brute force, across label schemes, any workers, and the shipped formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest

from medvol_nb import phantoms
from medvol_nb.analyze import analyze, class_weights, dataset_weights, sample_weight
from medvol_nb.core import DataError, OutputExists, read_csv, read_json, write_json
from medvol_nb.datalists import DataList, write_datalist
from medvol_nb.labels import LabelSpace
from medvol_nb.volume import Volume, affine_from, read_volume, reorient, write_volume


def dataset(folder, name, seeds, spacing, shuffle=None, testing=0):
    folder.mkdir()
    items = []
    for k in seeds:
        p = phantoms.abdomen(shape=(30, 26, 28), seed=k, spacing=spacing)
        lbl = p.lbl if shuffle is None else np.array([0, *shuffle], np.uint8)[p.lbl]
        for kind, data in (("img", p.img), ("lbl", lbl)):
            write_volume(Volume(data, affine_from(p.spacing)), folder / f"{kind}{k}.nii.gz")
        items.append({"image": f"img{k}.nii.gz", "label": f"lbl{k}.nii.gz", "fold": k % 2})
    names = p.names if shuffle is None else {shuffle[i - 1]: n for i, n in p.names.items()}
    test = [{k: v for k, v in i.items() if k != "fold"} for i in items[len(items) - testing :]]
    dl = DataList(name, tuple(items[: len(items) - testing]), tuple(test), names, {}, extra={})
    write_datalist(dl, folder / f"{name}.json")
    return folder / f"{name}.json"


def test_counts_and_volumes_equal_brute_force(tmp_path):
    path = dataset(tmp_path / "A", "A", range(4), (13, 11, 12), testing=1)
    result = analyze([path], tmp_path / "out")
    labels = [read_volume(tmp_path / "A" / f"lbl{k}.nii.gz") for k in range(4)]
    ml = 13 * 11 * 12 / 1000
    for row in read_csv(tmp_path / "out" / "classes.csv"):
        n = [int((v.data == int(row["id"])).sum()) for v in labels]
        assert int(row["voxels"]) == sum(n) and int(row["cases"]) == sum(x > 0 for x in n)
        assert float(row["ml_mean"]) == pytest.approx(np.mean([x for x in n if x]) * ml, rel=1e-6)
    cases = read_csv(tmp_path / "out" / "cases.csv")
    assert [c["item"] for c in cases] == ["training/0", "training/1", "training/2", "testing/0"]
    assert result["labelled_ml"] == pytest.approx(sum(float(c["labelled_ml"]) for c in cases), abs=1e-2)
    img, lbl = read_volume(tmp_path / "A" / "img0.nii.gz").data, labels[0].data
    assert float(cases[0]["foreground_mean"]) == pytest.approx(img[lbl > 0].mean(), rel=1e-9)
    assert float(cases[0]["foreground_p99.5"]) == np.percentile(img[lbl > 0], 99.5, method="lower")


def test_D17_nothing_is_resampled_and_orientation_does_not_matter(tmp_path):
    "The reference resamples every label to 1.5 mm before counting, which loses small structures"
    path = dataset(tmp_path / "A", "A", range(2), (13, 11, 12))
    analyze([path], tmp_path / "first")
    lbl = read_volume(tmp_path / "A" / "lbl0.nii.gz")
    one = lbl.data.copy()
    one[3, 3, 3] = 1
    write_volume(reorient(replace(lbl, data=one), "LAS"), tmp_path / "A" / "lbl0.nii.gz", "overwrite")
    analyze([path], tmp_path / "second")
    first, second = (read_csv(tmp_path / n / "classes.csv")[0] for n in ("first", "second"))
    assert int(second["voxels"]) - int(first["voxels"]) == 1 - int(lbl.data[3, 3, 3] == 1)


def test_two_schemes_become_one_class_space(tmp_path):
    shuffle = [8, 7, 6, 5, 4, 3, 2, 1]
    a, b = (
        dataset(tmp_path / "A", "A", range(3), (13, 11, 12)),
        dataset(tmp_path / "B", "B", range(3), (13, 11, 12), shuffle),
    )
    space = LabelSpace.shipped()
    names = phantoms.abdomen().names
    space = space.extended("A", names).extended("B", {shuffle[i - 1]: n for i, n in names.items()})
    space.save(tmp_path / "space.json")
    analyze([a, b], tmp_path / "both", space=tmp_path / "space.json")
    analyze([a], tmp_path / "one", space=tmp_path / "space.json")
    both, one = (read_csv(tmp_path / n / "classes.csv") for n in ("both", "one"))
    assert [r["class"] for r in both] == [r["class"] for r in one] and len(both) == 8
    assert all(
        int(x["voxels"]) == 2 * int(y["voxels"]) and int(x["cases"]) == 2 * int(y["cases"]) for x, y in zip(both, one)
    )


def test_a_name_with_two_ids(tmp_path):
    "As in the published list of Bone-NIH; the bars of one name lie below each other"
    path = dataset(tmp_path / "A", "A", range(1), (13, 11, 12))
    data = read_json(path)
    data["label_dict"] |= {"1": "bone lesion", "2": "bone lesion"}
    write_json(path, data)
    analyze([path], tmp_path / "out")
    rows = read_csv(tmp_path / "out" / "classes.csv")
    assert [r["id"] for r in rows if r["class"] == "bone lesion"] == ["1", "2"]
    assert (tmp_path / "out" / "presence.png").is_file()


def test_two_schemes_without_a_label_space_are_refused(tmp_path):
    a = dataset(tmp_path / "A", "A", range(1), (13, 11, 12))
    b = dataset(tmp_path / "B", "B", range(1), (13, 11, 12), [8, 7, 6, 5, 4, 3, 2, 1])
    with pytest.raises(DataError, match="label 8 is .* in A and 'liver' in B. Make one label space .*--space"):
        analyze([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_is_the_same_for_any_workers_and_with_a_cache(tmp_path):
    path = dataset(tmp_path / "A", "A", range(3), (13, 11, 12))
    seen = set()
    for k, options in enumerate(
        ({}, {"workers": 2}, {"cache": tmp_path / "c"}, {"cache": tmp_path / "c", "workers": 2})
    ):
        analyze([path], tmp_path / f"o{k}", **options)
        seen.add(b"".join(p.read_bytes() for p in sorted((tmp_path / f"o{k}").iterdir())))
    assert len(seen) == 1
    assert {p.name for p in (tmp_path / "o0").iterdir()} == {
        "analysis.json",
        "cases.csv",
        "classes.csv",
        "presence.png",
        "volumes.png",
        "weights.json",
    }


def test_damaged_cases_do_not_end_the_analysis(tmp_path):
    path = dataset(tmp_path / "A", "A", range(3), (13, 11, 12))
    raw = (tmp_path / "A" / "lbl1.nii.gz").read_bytes()
    (tmp_path / "A" / "lbl1.nii.gz").write_bytes(raw[:-30])
    analyze([path], tmp_path / "out")
    cases = read_csv(tmp_path / "out" / "cases.csv")
    assert [int(c["classes"]) > 0 for c in cases] == [True, False, True]


def test_existing_output_is_refused_and_nothing_is_half_written(tmp_path):
    path = dataset(tmp_path / "A", "A", range(2), (13, 11, 12))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists):
        analyze([path], tmp_path / "out")
    assert analyze([path], tmp_path / "out", on_exists="skip")["skipped"]
    analyze([path], tmp_path / "out", on_exists="overwrite")
    with pytest.raises(DataError, match="same name"):
        analyze([path, path], tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------------- formulas


def test_class_weight_formula_of_the_reference():
    counts = {0: 10**8, 1: 10**6, 2: 5 * 10**3, 3: 12, 4: 0}
    total = sum(counts.values())
    want = {k: max(1.0, math.sqrt(0.001 / (n / total))) for k, n in counts.items() if k and n}
    assert class_weights(counts) == pytest.approx(want)


def test_sample_weight_takes_the_largest_of_few_and_the_smallest_of_many():
    weights = {k: float(k) for k in range(1, 30)}
    assert sample_weight(range(1, 11), weights) == 10 and sample_weight(range(1, 12), weights) == 1
    assert sample_weight([], weights) == 1


@pytest.mark.parametrize(
    "name, n, want",
    [
        ("AbdomenCT-1K", 640, 0.15625),
        ("AMOS22", 192, 0.520833),
        ("BTCV-Abdomen", 19, 5.263158),
        ("TotalSegmentatorV2", 784, 0.127551),
        ("VerSe", 239, 0.41841),
        ("AeroPath", 17, 5.882353),
    ],
)
def test_dataset_weights_equal_the_shipped_ones(name, n, want):
    assert dataset_weights({name: n})[name] == pytest.approx(want, abs=1e-4)


def test_empty_dataset_has_no_weight():
    with pytest.raises(DataError, match="B"):
        dataset_weights({"A": 3, "B": 0})


def test_weights_file(tmp_path):
    path = dataset(tmp_path / "A", "A", range(3), (13, 11, 12))
    analyze([path], tmp_path / "out")
    weights, table = read_json(tmp_path / "out" / "weights.json"), read_json(tmp_path / "out" / "analysis.json")
    assert weights["dataset"] == {"A": pytest.approx(100 / 3)}
    assert {int(k): v for k, v in weights["class"].items()} == pytest.approx(
        class_weights({int(k): v for k, v in table["voxels"].items()})
    )
