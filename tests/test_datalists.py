"""Reading data lists strictly, writing them canonically, and telling what changed."""
import copy
import json
import string
import time

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medvol_nb.core import DataError, FormatError, MissingFile, OutputExists, parse_json, read_json
from medvol_nb.datalists import (
    ITEM_KEYS,
    LIST_KEYS,
    DataList,
    datalist_text,
    dataset_name_of,
    diff_datalists,
    item_path,
    items_problems,
    nearly,
    parse_datalist,
    read_datalist,
    with_provenance,
    write_datalist,
)

TRANSFORM = [{"_target_": "RandZoomd", "keys": ["@image_key", "@label_key"], "min_zoom": 0.8, "prob": 0.2},
             {"_target_": "RandCropByLabelClassesd", "ratios": "$tuple(float(i >= 0) for i in range(133))"}]


def published() -> dict:
    "The shape of a published list: pseudo labels before labels, supervoxels only outside of fold 0"
    def item(k: int) -> dict:
        name = f"FixedData/img/{k:07}-Image.nii.gz"
        out = {"image": name, "pseudo_label": name, "label": f"FixedDataV2/label/{k:07}-Mask.nii.gz", "fold": k % 5,
               "pseudo_label_reliability": k % 2}
        return out | ({"label_sv": f"/infer/sv/X_100/{k:07}-Image/{k:07}-Image_seg.nii.gz"} if k % 5 else {})
    return {"training": [item(k) for k in range(12)], "training_transform": TRANSFORM,
            "label_dict": {"1": "bladder", "2": "prostate or uterus"},
            "original_label_dict": {"1": "bladder", "2": "uterus"},
            "testing": [{"image": f"t{k}.nii.gz", "label": f"l{k}.nii.gz"} for k in range(3)]}


def unlabelled() -> dict:
    return {"training": [{"image": f"i{k}.nii.gz", "pseudo_label": f"i{k}.nii.gz", "dataset": "NLST", "region": "chest"}
                         for k in range(5)], "training_transform": TRANSFORM}


def msd() -> dict:
    return {"name": "WORD", "description": "Whole abdomen", "labels": {"0": "background", "1": "liver"},
            "numTraining": 2, "modality": {"0": "CT"},
            "training": [{"image": f"./imagesTr/w{k}.nii.gz", "label": f"./labelsTr/w{k}.nii.gz"} for k in range(2)],
            "validation": [{"image": "./imagesVal/w9.nii.gz", "label": "./labelsVal/w9.nii.gz"}],
            "testing": [{"image": "./imagesTs/w8.nii.gz", "label": "./labelsTs/w8.nii.gz"}]}


def as_written(data: dict) -> dict: return parse_json(datalist_text(parse_datalist(data, "X")))


# ---------------------------------------------------------------------------------------------------- what is kept

@pytest.mark.parametrize("make", [published, unlabelled, msd])
def test_published_forms_survive(make):
    data = make()
    assert as_written(copy.deepcopy(data)) == data
    assert list(as_written(data))[0] == "training"


def test_A14_fields_of_ones_own_survive():
    items = [{"image": "a.nii.gz", "region": "chest/abdomen", "modality": "CT", "age": 63, "spacing": [1, 1.5, 3],
              "site": {"name": "B"}, "note": None, "ok": True, "image2": "b"}]
    dl = parse_datalist({"training": items}, "X")
    assert list(dl.training) == items and as_written({"training": items})["training"] == items


def test_A14_multi_channel_and_unlabelled_items():
    data = {"training": [{"image": ["t1.nii.gz", "t2.nii.gz"], "label": "l.nii.gz"}, {"image": "c.nii.gz"},
                         {"image": "d.nii.gz", "pseudo_label": "d.nii.gz", "pseudo_label_reliability": 0}]}
    dl = parse_datalist(data, "X")
    assert as_written(data) == data and len(dl.labelled()) == 1 and dl.testing == () and dl.folds() == {}


def test_sections():
    dl = parse_datalist(msd(), "WORD")
    assert dl.extra["numTraining"] == 2 and dl.label_dict == {} and dl.extra["labels"]["1"] == "liver"
    assert [len(dl.items(s)) for s in (None, "training", "testing", "validation")] == [3, 2, 1, 1]
    strings = parse_datalist({"training": [], "testing": ["a.nii.gz"], "test": ["b.nii.gz"]}, "X")
    assert strings.testing == ({"image": "a.nii.gz"},) and strings.items("test") == ({"image": "b.nii.gz"},)
    with pytest.raises(DataError, match="no section 'val', there are"): dl.items("val")


def test_items_are_not_shared():
    data = published()
    dl = parse_datalist(data, "X")
    dl.training[0]["fold"] = 99
    assert data["training"][0]["fold"] == 0


plain = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.text(max_size=8) |
                     st.floats(allow_nan=False, allow_infinity=False),
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x), max_leaves=6)
path = st.text(string.ascii_letters + string.digits + "_-. é€\u00a0", min_size=1, max_size=20).map(
    lambda s: "d/" + s.replace("..", "__"))
own = st.text(string.ascii_lowercase, min_size=9, max_size=14).filter(
    lambda k: nearly(k) is None and nearly(k, LIST_KEYS) is None and k not in (*ITEM_KEYS, *LIST_KEYS, "validation"))
item = st.fixed_dictionaries({"image": path | st.lists(path, min_size=1, max_size=3)}, optional={
    "label": path, "fold": st.integers(0, 9), "pseudo_label": path, "label_sv": path.map(lambda p: "/" + p),
    "pseudo_label_reliability": st.integers(0, 1)})
items = st.lists(st.tuples(item, st.dictionaries(own, plain, max_size=2)).map(lambda t: {**t[1], **t[0]}), max_size=6)
names = st.dictionaries(st.integers(1, 300), st.text("abc ", min_size=1).filter(str.strip), max_size=4)


@hypothesis_settings(max_examples=150, deadline=None)
@given(items, items, names, st.dictionaries(own, plain, max_size=2))
def test_round_trip(training, testing, label_dict, extra):
    dl = DataList("X", tuple(training), tuple(testing) if any("fold" in i for i in training) or testing else (),
                  label_dict, extra=extra)
    text = datalist_text(dl)
    again = parse_datalist(parse_json(text), "X")
    assert again == dl and datalist_text(again) == text


def test_A10_bytes_do_not_depend_on_the_order_of_keys():
    data = published()
    other = {k: data[k] for k in reversed(data)}
    other["training"] = [dict(reversed(i.items())) for i in data["training"]]
    assert datalist_text(parse_datalist(data, "X")) == datalist_text(parse_datalist(other, "X"))


def test_A1_bytes_of_the_reference():
    data = {"training": [{"image": "i/a.nii.gz", "label": "l/a.nii.gz", "fold": 0}], "testing": [],
            "label_dict": {"1": "liver", "2": "Größe"}, "original_label_dict": {"1": "Liver", "2": "x"}}
    assert datalist_text(parse_datalist(data, "X")) == json.dumps(data, indent=4, ensure_ascii=False)
    assert list(as_written(published())["training"][1]) == list(ITEM_KEYS)


# --------------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("bad", ["0", -1, 1.5, True, None, [0], 1.0, {}, "x"])
def test_A3_folds_are_whole_numbers(bad):
    data = {"training": [{"image": "a.nii.gz", "fold": 0}]*12 + [{"image": "b.nii.gz", "fold": bad}]}
    with pytest.raises(FormatError, match="1 problem in f.json: /training/12/fold: an integer from 0 is needed, got"):
        parse_datalist(data, "X", "f.json")


@pytest.mark.parametrize("typo, meant", [
    ("fold:", "fold"), ("fold :", "fold"), ("Fold", "fold"), ("folds", "fold"), ("flod", "fold"), ("fld", "fold"),
    ("imgae", "image"), ("images", "image"), ("IMAGE", "image"), ("lable", "label"), ("labels", "label"),
    ("pseudo_lable", "pseudo_label"), ("pseudolabel", "pseudo_label"), ("psuedo_lable", "pseudo_label"),
    ("label-sv", "label_sv"), ("pseudo_label_reliabilty", "pseudo_label_reliability")])
def test_A3_misspelt_keys_are_errors(typo, meant):
    with pytest.raises(FormatError) as e: parse_datalist({"training": [{"image": "a.nii.gz", typo: 0}]}, "X")
    assert f"/training/0/{typo}: unknown field '{typo}', did you mean '{meant}'?" in str(e.value)


@pytest.mark.parametrize("key", "age site modality region dataset subject image2 label_1 patient weight sex id".split())
def test_other_keys_are_not(key): assert items_problems([{"image": "a.nii.gz", key: 1}]) == []


@pytest.mark.parametrize("bad, pointer", [
    ({"image": 7}, "/training/0/image"), ({"image": None}, "/training/0/image"), ({"image": []}, "/training/0/image"),
    ({"image": ["a", 1]}, "/training/0/image"), ({"image": {"a": 1}}, "/training/0/image"),
    ({"label": "l.nii.gz"}, "/training/0: 'image' is missing"), ("a.nii.gz", "/training/0: an object"),
    ({"image": "a", "label": ["l"]}, "/training/0/label"), ({"image": "a", "label": None}, "/training/0/label"),
    ({"image": "a", "pseudo_label_reliability": 2}, "/training/0/pseudo_label_reliability: 0 or 1"),
    ({"image": "a", "pseudo_label_reliability": True}, "/training/0/pseudo_label_reliability"),
    ({"image": "a", "pseudo_label_reliability": "1"}, "/training/0/pseudo_label_reliability")])
def test_wrong_types(bad, pointer):
    with pytest.raises(FormatError, match=pointer): parse_datalist({"training": [bad]}, "X")


@pytest.mark.parametrize("change, pointer", [
    ({"label_dict": {"1.5": "x"}}, "/label_dict/1.5"), ({"label_dict": {"-1": "x"}}, "/label_dict/-1"),
    ({"label_dict": {str(2**31): "x"}}, "/label_dict/2147483648"), ({"label_dict": {"1": 3}}, "/label_dict/1"),
    ({"label_dict": ["x"]}, "/label_dict: an object"),
    ({"original_label_dict": {"a/b": "x"}}, "/original_label_dict/a~1b"),
    ({"training": {}}, "/training: a list"), ({"testing": "x"}, "/testing: a list"), ({"testing": [1]}, "/testing/0"),
    ({"validation": [{"image": 1}]}, "/validation/0/image"),
    ({"training_transform": {}}, "/training_transform: a list"),
    ({"training_transform": ["x"]}, "/training_transform/0"), ({"label_dcit": {}}, "did you mean 'label_dict'")])
def test_wrong_structure(change, pointer):
    data = published()
    data.pop("label_dict")
    with pytest.raises(FormatError, match=pointer): parse_datalist(data | change, "X")


@pytest.mark.parametrize("data, words", [
    ([], "an object with 'training'"), (None, "an object"), ({}, "/training: is missing"),
    ({"trainning": []}, "'trainning', did you mean 'training'")])
def test_no_list_at_all(data, words):
    with pytest.raises(FormatError, match=words): parse_datalist(data, "X")


def test_all_problems_at_once():
    data = {"training": [{"image": "a", "fold": str(k)} for k in range(30)], "label_dict": {"x": ""}}
    with pytest.raises(FormatError) as e: parse_datalist(data, "X", "f.json")
    text = str(e.value)
    assert text.startswith("32 problems in f.json: /training/0/fold") and text.endswith("; and 12 more")
    assert "/training/19/fold" in text and "/training/20/fold" not in text


BAD_PATHS = ["../x", "a/../x", "a/..", "/etc/passwd", "~", "~/x", "~user/x", "http://host/x", "s3://bucket/x", "file:///x",
             "C:/x", "C:\\x", "a\\b", "\\\\server\\x", "a\0b", "a\nb", "a\x7f", ""]


@pytest.mark.parametrize("name", BAD_PATHS)
@pytest.mark.parametrize("key", ["image", "label", "pseudo_label", "label_sv"])
def test_paths_that_lead_outside(tmp_path, name, key):
    data = {"training": [{"image": "a.nii.gz", key: name}]}
    with pytest.raises(FormatError, match=f"/training/0/{key}: path"): parse_datalist(data, "X", absolute=False)
    with pytest.raises(DataError): item_path(tmp_path, name)
    if not name.startswith("/"):
        with pytest.raises(FormatError, match=f"/training/0/{key}: path"): parse_datalist(data, "X", absolute=True)


def test_absolute_paths_only_where_allowed(tmp_path):
    data = {"training": [{"image": "a.nii.gz", "label_sv": "/sv/a.nii.gz"}]}
    assert parse_datalist(data, "X").training[0]["label_sv"] == "/sv/a.nii.gz"
    with pytest.raises(FormatError, match="is absolute, and absolute names were not allowed"):
        parse_datalist(data, "X", absolute=False)
    assert str(item_path(tmp_path, "/sv/a.nii.gz", absolute=True)) == "/sv/a.nii.gz"
    (tmp_path/"in").mkdir()
    (tmp_path/"in"/"out").symlink_to(tmp_path)
    with pytest.raises(DataError, match="symbolic link"): item_path(tmp_path/"in", "out/x.nii.gz")


@pytest.mark.parametrize("name", ["a b.nii.gz", "ä/ü.nii", "a..b", ".hidden/x", "x/.../y", "日本/1.nii.gz", "12:30/c",
                                  "./a"])
def test_harmless_paths(name): assert items_problems([{"image": name}], absolute=False) == []


# ------------------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize("text, words", [
    ('{"training": [', "line 1"), ('{"training": [], "training": []}', "appears twice"),
    ('{"training": [{"image": "a", "fold": NaN}]}', "NaN"), ("["*100_000, "nested too deeply"), ("", "line 1"),
    ('{"training": [{"image": "a", "image": "b"}]}', "'image' appears twice")])
def test_malformed_files(tmp_path, text, words):
    (tmp_path/"x.json").write_text(text)
    with pytest.raises(FormatError, match=words): read_datalist(tmp_path/"x.json")


def test_other_encodings_and_sizes(tmp_path, monkeypatch):
    (tmp_path/"x.json").write_bytes('{"training": []}'.encode("utf-16"))
    with pytest.raises(FormatError, match="not UTF-8"): read_datalist(tmp_path/"x.json")
    with pytest.raises(MissingFile): read_datalist(tmp_path/"absent.json")
    with open(tmp_path/"big.json", "wb") as f: f.truncate(200*2**20)
    start = time.process_time()
    with pytest.raises(FormatError, match="200.0 MiB, at most 128.0 MiB"): read_datalist(tmp_path/"big.json")
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize("name, expected", [
    ("Task09_5_folds.json", "Task09"), ("a/BTCV-Abdomen_5_folds.json", "BTCV-Abdomen"), ("X_10_folds.json", "X"),
    ("WORD.json", "WORD"), ("my_list.json", "my_list"), ("Task09_Spleen/dataset.json", "Task09_Spleen")])
def test_dataset_name_of(name, expected): assert dataset_name_of(name) == expected


def test_write_and_read(tmp_path):
    dl, file = parse_datalist(published(), "X"), tmp_path/"X_5_folds.json"
    first = write_datalist(dl, file)
    assert first["written"] and len(first["added"]) == 15 and not first["moved"]
    assert read_datalist(file) == dl and read_json(file) == published()
    with pytest.raises(OutputExists, match="--on-exists"): write_datalist(dl, file)
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert not write_datalist(dl, file, "skip")["written"]
    assert not write_datalist(DataList("X"), file, dry_run=True)["written"]
    assert before == (file.read_bytes(), file.stat().st_mtime_ns)
    again = write_datalist(dl, file, "overwrite")
    assert again["written"] and not any(again[k] for k in ("added", "removed", "moved", "changed", "label_dict"))
    assert file.read_bytes() == before[0] and sorted(p.name for p in tmp_path.iterdir()) == [file.name]


def test_a_wrong_list_is_not_written(tmp_path):
    dl = DataList("X", ({"image": "a.nii.gz", "fold": -1},))
    with pytest.raises(FormatError, match="the list to be written as .*: /training/0/fold"):
        write_datalist(dl, tmp_path/"x.json")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_list_can_be_replaced(tmp_path):
    (tmp_path/"x.json").write_text('{"training": [')
    out = write_datalist(parse_datalist(published(), "X"), tmp_path/"x.json", "overwrite")
    assert out["written"] and "line 1" in out["unreadable"] and len(read_datalist(tmp_path/"x.json").training) == 12


def test_what_changed():
    old = parse_datalist(published(), "X")
    data = published()
    data["training"][0]["fold"] = 4
    data["testing"].append(data["training"].pop())
    data["testing"][-1].pop("fold")
    data["training"][1]["pseudo_label_reliability"] = 0
    gone = data["training"].pop(2)["image"]
    data["training"].append({"image": ["new.nii.gz", "new2.nii.gz"]})
    diff = diff_datalists(old, parse_datalist(data | {"label_dict": {"1": "bladder"}}, "X"))
    assert diff["added"] == ["new.nii.gz + new2.nii.gz"] and diff["removed"] == [gone] and diff["label_dict"]
    assert diff["moved"] == {old.training[0]["image"]: ["training, fold 0", "training, fold 4"],
                             old.training[11]["image"]: ["training, fold 1", "testing"]}
    assert diff["changed"] == [old.training[1]["image"]]


def test_provenance_is_kept_apart(tmp_path):
    dl = parse_datalist(published(), "X")
    noted = with_provenance(dl, seed=20230808, method="legacy")
    block = noted.extra["provenance"]
    assert block["n_training"] == 12 and block["n_testing"] == 3 and block["n_labelled"] == 15
    assert block["tool"].startswith("medvol_nb ") and block["seed"] == 20230808
    assert datalist_text(noted).startswith(datalist_text(dl)[:-2]) and as_written(published()) == published()


def test_reading_a_hundred_thousand_items_takes_less_than_two_seconds(tmp_path):
    dl = DataList("X", tuple({"image": f"imagesTr/case_{k:06}_0000.nii.gz", "label": f"labelsTr/case_{k:06}.nii.gz",
                              "fold": k % 5, "pseudo_label": f"imagesTr/case_{k:06}_0000.nii.gz",
                              "pseudo_label_reliability": 1, "label_sv": f"/sv/case_{k:06}/case_{k:06}_seg.nii.gz",
                              "region": "chest"} for k in range(100_000)))
    write_datalist(dl, tmp_path/"X_5_folds.json")
    start = time.process_time()
    again = read_datalist(tmp_path/"X_5_folds.json")
    assert time.process_time() - start < 2 and again.training == dl.training


def test_a_hundred_thousand_problems_take_bounded_time():
    data = {"training": [{"image": "../a", "fold": "0", "lable": "x"}]*100_000}
    start = time.process_time()
    with pytest.raises(FormatError, match="300000 problems.* and 299980 more"): parse_datalist(data, "X")
    assert time.process_time() - start < 15
