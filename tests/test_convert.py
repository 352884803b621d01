"""Page 11c: pairs, folds and label names survive the way through nnU-Net, the Decathlon and tables (A13)."""
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medvol_nb import convert
from medvol_nb.convert import (
    case_ids,
    folds_of,
    from_csv,
    from_msd,
    from_nnunet,
    kind_of,
    read_any,
    splits_of,
    to_csv,
    to_msd,
    to_nnunet,
)
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OutputExists, read_json, write_json
from medvol_nb.datalists import DataList, read_datalist, write_datalist
from medvol_nb.loading import published_transform

ALL = {"nnunet": (lambda dl, d, r: to_nnunet(dl, d/"Dataset001_X", r), lambda d, r: from_nnunet(d/"Dataset001_X", r)),
       "msd": (lambda dl, d, r: to_msd(dl, r/"dataset.json"), lambda d, r: from_msd(r)),
       "csv": (lambda dl, d, r: to_csv(dl, d/f"{dl.name}.csv"), lambda d, r: from_csv(next(d.glob("*e.csv")))),
       "list": (lambda dl, d, r: write_datalist(dl, d/f"{dl.name}_5_folds.json"),
                lambda d, r: read_datalist(next(d.glob("*_5_folds.json"))))}


def example(**more) -> DataList:
    training = [{"image": f"imagesTr/c{k}.nii.gz", "label": f"labelsTr/c{k}.nii.gz", "fold": k % 3} for k in range(7)]
    training += [{"image": "imagesTr/no fold.nii.gz", "label": "labelsTr/no fold.nii.gz"},
                 {"image": "unlabelled/\u65e5\u672c \u00fc.nii.gz", "pseudo_label": "p/\u65e5.nii.gz",
                  "pseudo_label_reliability": 1, "region": "head/neck"}]
    training[2] |= {"label_sv": "/sv/c2.nii.gz", "pseudo_label_reliability": 0, "age": 63, "site": "007"}
    dl = DataList("Example", tuple(training), ({"image": "imagesTs/t.nii.gz"},
                                               {"image": "imagesTs/u.nii.gz", "label": "labelsTs/u.nii.gz"}),
                  {1: "liver", 2: "bone lesion", 3: "bone lesion", 7: "left kidney"}, {1: "Liver"})
    return replace(dl, **more)


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    for name in ("out", "root"): (tmp_path/name).mkdir()
    return tmp_path/"out", tmp_path/"root"


def touch(dl: DataList, root: Path) -> None:
    "Small files, each with its own name as content"
    for i in dl.items():
        for p in [*([i["image"]] if isinstance(i["image"], str) else i["image"]), i.get("label")]:
            if p is None: continue
            (root/p).parent.mkdir(parents=True, exist_ok=True)
            (root/p).write_text(p)


# --------------------------------------------------------------------------------------------------------- round trip

@pytest.mark.parametrize("kind", ALL)
def test_A13_round_trip(kind, places):
    dl, (write, read) = example(), ALL[kind]
    write(dl, *places)
    assert read(*places) == dl


@pytest.mark.parametrize("kind", ["nnunet", "msd", "list"])
def test_transforms_and_extra_survive(kind, places):
    dl = example(training_transform=published_transform(),
                 validation_transform=[{"_target_": "Identityd", "keys": "x"}],
                 extra={"licence": "CC-BY", "provenance": {"seed": 1}},
                 label_dict={0: "air", 1: "liver"})
    write, read = ALL[kind]
    write(dl, *places)
    assert read(*places) == dl


words = st.text(st.characters(codec="utf-8", categories=("L", "N"), include_characters=" -_.&'\u00e9"), min_size=1,
                max_size=12).map(lambda s: s.strip(" .") or "x").filter(lambda s: "__" not in s and ".." not in s)
characters = st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",))
values = st.one_of(st.text(characters, max_size=8), st.integers(-10**12, 10**12),
                   st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
                   st.none(), st.lists(st.integers(0, 9), max_size=3))


@st.composite
def data_lists(draw) -> DataList:
    n, n_folds, channels = draw(st.integers(1, 8)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
    folder = draw(words)
    names = draw(st.lists(words, min_size=n, max_size=n, unique_by=str.casefold))
    if any(name[-5:].lstrip("_").isdigit() for name in names): names = [f"c{k} {name}z" for k, name in enumerate(names)]
    own = draw(st.dictionaries(words.filter(lambda k: k.isidentifier()).map(lambda k: f"own_{k}"), values, max_size=2))
    items = []
    for k, name in enumerate(names):
        images = [f"{folder}/{name}_{c:04}.nii.gz" for c in range(channels)]
        item = {"image": images if channels > 1 else images[0]}
        if k == 0 or draw(st.booleans()): item["label"] = f"labels/{name}.nii.gz"
        if "label" in item and n_folds and draw(st.booleans()): item["fold"] = draw(st.integers(0, n_folds - 1))
        items.append(item | (own if draw(st.booleans()) else {}))
    cut = draw(st.integers(1, n))
    classes = words.filter(lambda w: w.casefold() != "background")
    labels = draw(st.dictionaries(st.integers(1, 200), classes, max_size=5))
    testing = [{k: v for k, v in i.items() if k != "fold"} for i in items[cut:]]
    return DataList("Some_Name", tuple(items[:cut]), tuple(testing), dict(sorted(labels.items())))


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dl=data_lists())
def test_A13_round_trip_of_any_list(kind, dl, tmp_path_factory):
    base = tmp_path_factory.mktemp("any")
    places = base/"out", base/"root"
    for p in places: p.mkdir()
    write, read = ALL[kind]
    write(dl, *places)
    back = read(*places)
    assert back.items() == dl.items() and back.folds() == dl.folds()
    assert back.label_dict == dl.label_dict and back.name == dl.name


@pytest.mark.parametrize("files", ["copy", "link"])
@pytest.mark.parametrize("version", [1, 2])
def test_A13_nnunet_folders(version, files, places):
    out, root = places
    dl = example()
    touch(dl, root)
    told = to_nnunet(dl, out/"D", root, version, files, channel_names=["CT"])
    back = from_nnunet(out/"D")
    assert told["written"] and back.folds() == dl.folds() and back.label_dict == dl.label_dict
    assert case_ids(back.training) == case_ids(dl.training) and case_ids(back.testing) == case_ids(dl.testing)
    assert [i.get("fold") for i in back.training] == [i.get("fold") for i in dl.training]
    for old, new in zip(dl.items(), back.items(), strict=True):
        for key in ("image", "label"):
            if key in old: assert (out/"D"/new[key]).read_text() == old[key], "the same pair"
        assert {k: v for k, v in old.items() if k not in ("image", "label")} == \
            {k: v for k, v in new.items() if k not in ("image", "label")}


def test_A13_chain_of_all_formats(places):
    out, root = places
    dl = example(original_label_dict={})
    write_datalist(dl, out/"Example_5_folds.json")
    chain = [(out/"Example_5_folds.json", out/"D1", "nnunet"), (out/"D1", out/"t.csv", "csv"),
             (out/"t.csv", root/"dataset.json", "msd"), (root, out/"D2", "nnunet"), (out/"D2", out/"last.json", "list")]
    for source, target, to in chain:
        told = convert.convert(source, target, to=to, root=root)
        assert told["folds"] == dl.folds() and told["n_classes"] == 4 and told["written"]
    last = read_datalist(out/"last.json")
    assert last.items() == dl.items() and last.label_dict == dl.label_dict


# ------------------------------------------------------------------------------------------------- files from elsewhere

def foreign(folder: Path, version: int) -> Path:
    "A data set as nnU-Net users have it"
    for sub in ("imagesTr", "labelsTr", "imagesTs"): (folder/sub).mkdir(parents=True)
    for c in ("liver_001", "liver_002", "liver_010"):
        for k in range(2): (folder/f"imagesTr/{c}_{k:04}.nii.gz").write_text("x")
        (folder/f"labelsTr/{c}.nii.gz").write_text("x")
    for k in range(2): (folder/f"imagesTs/liver_003_{k:04}.nii.gz").write_text("x")
    cases = ["liver_002", "liver_001", "liver_010"]
    if version == 2:
        data = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "liver": 1, "tumour": 2},
                "numTraining": 3, "file_ending": ".nii.gz"}
    else:
        data = {"name": "Liver", "modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "liver",
                                                                               "2": "tumour"},
                "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases],
                "test": ["./imagesTs/liver_003.nii.gz"], "numTraining": 3, "numTest": 1}
    write_json(folder/"dataset.json", data)
    write_json(folder/"splits_final.json", [{"train": [c for c in cases if c != v], "val": [v]} for v in cases])
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_nnunet_as_users_have_it(version, tmp_path):
    folder = foreign(tmp_path/"Dataset003_Liver", version)
    assert kind_of(folder) == "nnunet"
    dl = read_any(folder)
    assert dl.name == ("Liver" if version == 1 else "Dataset003_Liver") and dl.label_dict == {1: "liver", 2: "tumour"}
    by_case = dict(zip(case_ids(dl.training), dl.training))
    assert by_case["liver_010"] == {"image": [f"imagesTr/liver_010_000{k}.nii.gz" for k in range(2)],
                                    "label": "labelsTr/liver_010.nii.gz", "fold": 2}
    assert {c: i["fold"] for c, i in by_case.items()} == {"liver_002": 0, "liver_001": 1, "liver_010": 2}
    assert dl.testing == ({"image": [f"imagesTs/liver_003_000{k}.nii.gz" for k in range(2)]},)
    assert read_any(folder, tmp_path).training[0]["label"].startswith("Dataset003_Liver/labelsTr/")


def test_incomplete_nnunet_folder(tmp_path):
    folder = foreign(tmp_path/"D", 2)
    (folder/"imagesTr/liver_001_0001.nii.gz").unlink()
    (folder/"labelsTr/liver_002.nii.gz").unlink()
    with pytest.raises(DataError, match="2 cases lack a label or one of 2 channels: liver_001, liver_002"):
        from_nnunet(folder)


def test_pickled_splits_are_not_read(tmp_path, caplog):
    folder = foreign(tmp_path/"D", 1)
    (folder/"splits_final.json").unlink()
    (folder/"splits_final.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    assert from_nnunet(folder).folds() == {} and "is a pickle" in caplog.text


def test_splits_that_were_named_must_be_there(tmp_path):
    folder = foreign(tmp_path/"D", 1)
    with pytest.raises(MissingFile, match="splits: .*splits_finale.json does not exist"):
        from_nnunet(folder, splits=folder/"splits_finale.json")


@pytest.mark.parametrize("read", [from_msd, from_nnunet])
def test_a_section_that_is_no_list(read, tmp_path):
    write_json(tmp_path/"dataset.json", {"training": [], "test": 0, "labels": {"0": "background"}})
    with pytest.raises(FormatError, match="/test: a list is needed, got 0"): read(tmp_path)


def test_msd_as_published(tmp_path):
    write_json(tmp_path/"dataset.json", {
        "name": "WORD", "labels": {"0": "background", "1": "liver"}, "modality": {"0": "CT"}, "licence": "GPL",
        "numTraining": 1, "training": [{"image": "./imagesTr/w1.nii.gz", "label": "./labelsTr/w1.nii.gz"}],
        "validation": [{"image": "./imagesVal/v.nii.gz", "label": "./labelsVal/v.nii.gz"}],
        "testing": ["./imagesTs/t.nii.gz"]})
    dl = from_msd(tmp_path)
    assert kind_of(tmp_path) == "msd" and dl.name == "WORD" and dl.label_dict == {1: "liver"}
    assert dl.items("validation") == ({"image": "imagesVal/v.nii.gz", "label": "labelsVal/v.nii.gz"},)
    assert dl.testing == ({"image": "imagesTs/t.nii.gz"},) and dl.extra["licence"] == "GPL"
    to_msd(dl, tmp_path/"again.json")
    assert from_msd(tmp_path/"again.json") == dl


def test_monai_reads_what_we_write(tmp_path):
    load = pytest.importorskip("monai.data").load_decathlon_datalist
    to_msd(example(), tmp_path/"dataset.json")
    items = load(tmp_path/"dataset.json", base_dir=tmp_path)
    assert [i["image"] for i in items] == [str(tmp_path/i["image"]) for i in example().training]
    assert [i.get("fold") for i in items] == [i.get("fold") for i in example().training]


# ----------------------------------------------------------------------------------------------------- folds and names

def test_splits_are_nnunets():
    items = example().labelled("training")
    splits = splits_of(items, case_ids(items))
    assert [sorted(f) for f in splits] == [["train", "val"]]*3 and splits[0]["val"] == ["c0", "c3", "c6"]
    assert all("no fold" in f["train"] for f in splits)
    assert splits_of([{"image": "a"}], ["a"]) == []


@pytest.mark.parametrize("splits, said", [
    ([{"train": ["a"], "val": ["a", "b"]}], "train and validate: a"),
    ([{"train": ["a"], "val": []}], "neither part: b"),
    ([{"train": ["a"], "val": ["b"]}, {"train": ["a"], "val": ["b"]}], "another fold, too: b"),
    ([{"train": ["a", "b"], "val": ["q"]}], "unknown cases: q"),
])
def test_splits_that_a_list_cannot_say(splits, said):
    with pytest.raises(DataError, match=said): folds_of(splits, ["a", "b"])


@pytest.mark.parametrize("splits", [{}, [1], [{"train": ["a"]}], [{"train": "a", "val": "b"}],
                                    [{"train": [1], "val": []}]])
def test_malformed_splits(splits):
    with pytest.raises(FormatError, match="is needed"): folds_of(splits, ["a", "b"])


@pytest.mark.parametrize("images, ids", [
    (["a.nii.gz", "b.nii.gz"], ["a", "b"]),
    (["amos_0004.nii.gz", "amos_0117.nii.gz"], ["amos_0004", "amos_0117"]),
    (["Case_00001_0000.nii.gz", "Case_00002_0000.nii.gz"], ["Case_00001", "Case_00002"]),
    (["s1/ct.nii.gz", "s2/ct.nii.gz"], ["s1_ct", "s2_ct"]),
    (["x/s1/1/ct.nii", "x/s2/1/ct.nii"], ["s1_1_ct", "s2_1_ct"]),
    (["a/ct.nii", "ct.nii"], ["a_ct", "ct"]),
    ([["a_0000.nii", "a_0001.nii"], ["b_0000.nii", "b_0001.nii"]], ["a", "b"]),
])
def test_case_ids(images, ids): assert case_ids([{"image": i} for i in images]) == ids


def test_notes_tell_what_surprises(places):
    told = to_nnunet(example(), *(places[0]/"D", places[1]), dry_run=True)["notes"]
    assert [n.split()[0] for n in told] == ["channel", "label", "1"] and "[1, 2, 3, 7]" in told[1]


def test_regions(places):
    out, root = places
    to_nnunet(example(), out/"D", root)
    data = read_json(out/"D"/"dataset.json")
    assert data["labels"] == {"background": 0, "liver": 1, "bone lesion": [2, 3], "left kidney": 7}
    assert data["regions_class_order"] == [1, 2, 3]
    with pytest.raises(DataError, match="'background', which nnU-Net keeps for 0"):
        to_nnunet(example(label_dict={1: "background"}), out/"E", root)


def test_what_nnunet_cannot_do(places):
    out, root = places
    with pytest.raises(ConfigError, match="choose 'link' or 'copy'"): to_nnunet(example(), out/"D", root, version=1)
    with pytest.raises(ConfigError, match="version"): to_nnunet(example(), out/"D", root, version=3)
    mixed = DataList("M", ({"image": "a.nii", "label": "b.nii.gz"}, {"image": ["a.nii", "c.nii"], "label": "d.nii"}))
    with pytest.raises(DataError, match="one file type and one number of channels"): to_nnunet(mixed, out/"D", root)
    with pytest.raises(DataError, match="0 cases"): to_nnunet(DataList("U", ({"image": "a.nii"},)), out/"D", root)
    with pytest.raises(ConfigError, match="1 channels, got names"):
        to_nnunet(example(), out/"D", root, channel_names=["a", "b"])
    assert list(out.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- safety

@pytest.mark.parametrize("path", ["../x.nii.gz", "/etc/passwd", "imagesTr/../../x.nii.gz", "~/x.nii.gz",
                                  "$HOME/x.nii.gz", "C:/x.nii.gz", "a\\b.nii.gz", "http://h/x.nii.gz", "a\0b", "", 7,
                                  "out/x.nii.gz"])
@pytest.mark.parametrize("kind", ["msd", "v1", "v2"])
def test_path_escapes_are_refused(kind, path, tmp_path):
    (tmp_path/"D").mkdir()
    (tmp_path/"D"/"out").symlink_to(tmp_path)
    if kind == "v2":
        data = {"file_ending": ".nii.gz", "channel_names": {"0": "CT"}, "labels": {},
                "dataset": {"a": {"images": [path], "label": "b.nii.gz"}}}
    else: data = {"labels": {}, "training": [{"image": path, "label": "b.nii.gz"}]}
    write_json(tmp_path/"D"/"dataset.json", data)
    read = from_msd if kind == "msd" else from_nnunet
    with pytest.raises((DataError, FormatError), match="dataset.json.*(path|Path)"): read(tmp_path/"D")


def test_csv_paths_are_checked(tmp_path):
    (tmp_path/"a.csv").write_text("image,label\n../a.nii.gz,b.nii.gz\n")
    with pytest.raises(FormatError, match="/training/0/image: path '../a.nii.gz': holds '..'"):
        from_csv(tmp_path/"a.csv")


@pytest.mark.parametrize("to", ["nnunet", "msd", "csv", "list"])
def test_row_45_outputs(to, places):
    out, root = places
    write_datalist(example(), out/"Example_5_folds.json")
    target = out/{"nnunet": "D", "msd": "m.json", "csv": "t.csv", "list": "l.json"}[to]
    source = out/"Example_5_folds.json"
    dry = convert.convert(source, target, to=to, root=root, dry_run=True)
    assert not target.exists() and not dry["written"] and dry["files"]
    first = convert.convert(source, target, to=to, root=root)
    content = {p: p.read_bytes() for p in map(Path, first["files"])}
    assert first["written"] and list(map(str, content)) == dry["files"]
    with pytest.raises(OutputExists, match="--on-exists"): convert.convert(source, target, to=to, root=root)
    assert not convert.convert(source, target, to=to, root=root, on_exists="skip")["written"]
    assert convert.convert(source, target, to=to, root=root, on_exists="overwrite")["written"]
    assert content == {p: p.read_bytes() for p in content}, "same bytes again"
    assert not [p for p in out.rglob(".mvtmp*")]
    with pytest.raises(MissingFile, match="mkdir"): convert.convert(source, out/"no"/"such"/"x", to=to, root=root)


def test_failed_copy_writes_no_dataset_json(places):
    out, root = places
    touch(example(), root)
    (root/"labelsTr/c3.nii.gz").unlink()
    with pytest.raises(MissingFile, match="c3.nii.gz does not exist"): to_nnunet(example(), out/"D", root, files="copy")
    assert not (out/"D"/"dataset.json").exists() and not list(out.rglob(".mvtmp*"))
    touch(example(), root)
    assert to_nnunet(example(), out/"D", root, files="copy")["written"]


def test_existing_images_are_kept(places):
    out, root = places
    touch(example(), root)
    (out/"D").mkdir()
    (out/"D"/"mine.txt").write_text("mine")
    to_nnunet(example(), out/"D", root, files="link")
    to_nnunet(example(), out/"D", root, files="link", on_exists="overwrite")
    assert (out/"D"/"mine.txt").read_text() == "mine"
    assert os.path.samefile(out/"D/imagesTr/c1_0000.nii.gz", root/"imagesTr/c1.nii.gz")


def test_damaged_sources(tmp_path):
    for text in ("", "[]", '{"a": 1, "a": 2}', '{"file_ending": 3, "labels": []}', '{"labels": {"x": 1.5}}',
                 '{"labels": {}, "training": [7]}', '{"labels": {}, "training": {}}', '{"training": [{"label": "x"}]}'):
        (tmp_path/"dataset.json").write_text(text)
        with pytest.raises((FormatError, DataError)): read_any(tmp_path)
        with pytest.raises((FormatError, DataError)): from_msd(tmp_path)
    with pytest.raises(MissingFile): read_any(tmp_path/"absent")
    with pytest.raises(MissingFile, match="holds no dataset.json"): kind_of(tmp_path.parent)
    with pytest.raises(ConfigError, match="to: list, nnunet"):
        convert.convert(write_json(tmp_path/"l.json", {"training": []}), tmp_path/"x", to="yaml")


def test_block_of_strangers_is_not_trusted(places):
    "The medvol_nb block is an input like any other"
    out, root = places
    to_nnunet(example(), out/"D", root)
    data = read_json(out/"D"/"dataset.json")
    for wrong in ({"unlabelled": 7, "order": "x", "fields": [1], "extra": []}, "x", None, {"fields": {"c0": 3}}):
        write_json(out/"D"/"dataset.json", data | {"medvol_nb": wrong})
        assert from_nnunet(out/"D", root).folds() == example().folds()
    for evil in ({"unlabelled": {"a": {"image": "../x"}}}, {"fields": {"c0": {"fold:": 1}}},
                 {"testing": [{"image": 7}]}):
        write_json(out/"D"/"dataset.json", data | {"medvol_nb": evil})
        with pytest.raises(FormatError): from_nnunet(out/"D", root)


def test_parquet(places):
    out, _ = places
    dl = example()
    if not _has_pyarrow():
        with pytest.raises(ImportError, match="pip install pyarrow"): to_csv(dl, out/"Example.parquet")
        pytest.skip("pyarrow is not installed")
    to_csv(dl, out/"Example.parquet")
    assert from_csv(out/"Example.parquet") == dl


def _has_pyarrow() -> bool:
    import importlib.util
    return importlib.util.find_spec("pyarrow") is not None


def test_csv_from_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"image": ["a.nii", "b.nii"], "fold": [0, np.nan], "age": [63.0, np.nan]})
    frame.to_csv(tmp_path/"t.csv", index=False)
    assert from_csv(tmp_path/"t.csv").training == ({"image": "a.nii", "fold": 0, "age": 63.0}, {"image": "b.nii"})


def test_label_names_of_an_earlier_table_do_not_stay(tmp_path):
    bare = DataList("t", ({"image": "a.nii"},))
    to_csv(replace(bare, label_dict={1: "liver"}), tmp_path/"t.csv")
    to_csv(bare, tmp_path/"t.csv", "overwrite")
    assert from_csv(tmp_path/"t.csv") == bare


def test_names_of_a_json_are_utf8(places):
    to_msd(example(), places[0]/"m.json")
    assert "\u65e5\u672c \u00fc" in (places[0]/"m.json").read_text(encoding="utf-8")
    json.loads((places[0]/"m.json").read_text(encoding="utf-8"))
