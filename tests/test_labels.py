"""Label names, the append-only label space, look-up tables and the transforms built on them."""
import itertools
import json
import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medvol_nb import labels
from medvol_nb.core import ConfigError, DataError, FormatError, OutputExists
from medvol_nb.labels import (
    DatasetSelectTansformd,
    DatasetSelectTransformd,
    LabelClass,
    LabelSpace,
    RelabelLUTd,
    build_label_space,
    canonical_name,
    edit_distance,
    label_dict_problems,
    legacy_label_dict,
    make_lut,
    near_duplicates,
    preferred_name,
    relabel,
)

INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
GAPS = [2, 16, 18, 20, 21, 129, 130, 131]


@pytest.fixture(scope="module")
def shipped() -> LabelSpace: return LabelSpace.shipped()


# ------------------------------------------------------------------------------------------------------------ names

# The pairs that are named in the specification, and those that its tables of data sets contain
D6 = [("heart   ", "heart"), ("left rib 1", "left costa 1"), ("right rib 12", "right costa 12"),
      ("left clavicula", "left clavicle"), ("right clavicula", "right clavicle"), ("liver tumor", "hepatic tumor"),
      ("left adrenal", "left adrenal gland"), ("right adrenal", "right adrenal gland"),
      ("small bowel", "small intestine"), ("left eye", "left eyeball"), ("right eye", "right eyeball"),
      ("costal cartilages", "rib_cartilage"), ("bone", "bones"), ("thyroid", "thyroid gland"),
      ("left lung lower lobe", "left lung lower"), ("left lung upper lobe", "left lung upper"),
      ("right lung middle lobe", "right lung middle"), ("left femoral head", "left head of femur"),
      ("right femoral head", "right head of femur"), ("inferior vena cava", "postcava"),
      ("bladder", "urinary_bladder"), ("gallbladder", "gall-bladder"), ("small bowel", "small-intestine"),
      ("left kidney", "kidney-left"), ("left kidney", "left_kidney"), ("left head of femur", "Head_of_femur_L"),
      ("left lung", "lung_l"), ("left head of femur", "femoral-head-lef"), ("right rib 3", "rib_right_3"),
      ("kidney", "Kidney"), ("lung", "lungs"), ("kidney", "kidneys"), ("left hippocampus", "Hippocampus_L"),
      ("hepatic tumor", "hepatic tumour"), ("esophagus", "oesophagus"), ("vertebrae L5", "vertebrae_L5"),
      ("optic chiasm", "Chiasm"), ("left submandibular", "submandibular gland left"), ("vertebrae L5", "vertebra l 5")]


@pytest.mark.parametrize("a, b", D6)
def test_D6_names_of_one_class_meet(a, b): assert preferred_name(a) == preferred_name(b)


@pytest.mark.parametrize("a, b", [p for p in D6 if LabelSpace.shipped().resolve(p[0])])
def test_D6_names_resolve_to_the_shipped_id(shipped, a, b):
    assert shipped.resolve(a) == shipped.resolve(b) == shipped.resolve(a.upper()) is not None


def test_D6_one_class_not_two():
    space = LabelSpace()
    for n, (a, b) in enumerate(D6): space = space.extended(f"a{n}", {1: a}).extended(f"b{n}", {7: b})
    assert all(space.mapping(f"a{n}")[1] == space.mapping(f"b{n}")[7] for n in range(len(D6)))
    assert len(space.classes) == len({preferred_name(a) for a, _ in D6})
    assert len(legacy_label_dict({1: n} for pair in D6 for n in pair)) > 1.4*len(space.classes)


def test_different_classes_stay_apart(shipped):
    names = list(shipped.to_label_dict())
    assert len({preferred_name(n) for n in names}) == len(names) and near_duplicates(names) == []
    assert len({preferred_name(f"{s} rib {k}") for s in ("left", "right") for k in range(1, 13)}) == 24


def test_aliases_point_to_the_end():
    "A preferred name is preferred itself, and every synonym is written in its canonical form"
    table = labels.aliases()
    assert all(preferred_name(v) == canonical_name(v) == v for v in table["names"].values())
    assert all(canonical_name(k) == k for k in table["names"])
    assert all(v not in table["words"] for v in table["words"].values())


@given(st.text("abl R_-1 ", min_size=1, max_size=20))
def test_names_are_idempotent(name):
    assert canonical_name(canonical_name(name)) == canonical_name(name)
    assert preferred_name(preferred_name(name)) == preferred_name(name)


@pytest.mark.parametrize("name, expected", [
    ("left and right lung", "left and right lung"), ("L", "l"), ("vertebrae L1", "vertebrae l1"),
    ("  Portal_Vein\tand  splenic-vein", "portal vein and splenic vein"), ("rib_left_3", "left rib 3"),
    ("gluteus_maximus_right", "right gluteus maximus")])
def test_canonical_name(name, expected): assert canonical_name(name) == expected


@given(st.text("abcd", max_size=6), st.text("abcd", max_size=6), st.text("abcd", max_size=6))
def test_edit_distance_behaves(a, b, c):
    assert edit_distance(a, a) == 0 and edit_distance(a, b) == edit_distance(b, a)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a + c, b + c) <= edit_distance(a, b)


def test_near_duplicates_are_quick():
    names = [f"structure {chr(97 + k % 26)}{chr(97 + k//26)} of the body" for k in range(300)]
    start = time.process_time()
    near_duplicates(names)
    assert time.process_time() - start < 20


# ------------------------------------------------------------------------------------------------ the shipped files

def test_shipped_files_load_unchanged(shipped):
    raw = json.loads(labels._resource("vista3d_label_dict.json").read_text())
    maps = json.loads(labels._resource("vista3d_label_mappings.json").read_text())
    assert shipped.to_label_dict() == raw and shipped.to_label_mappings() == maps
    assert list(shipped.to_label_dict()) == list(raw) and len(raw) == 124 and max(raw.values()) == 132
    assert sorted(set(range(1, 133)) - set(raw.values())) == GAPS


@pytest.mark.parametrize("name, gid", [
    ("liver", 1), ("spleen", 3), ("left kidney", 14), ("portal vein and splenic vein", 17), ("brain", 22),
    ("hepatic tumor", 26), ("right lung lower lobe", 32), ("vertebrae L5", 33), ("vertebrae L1", 37),
    ("vertebrae T12", 38), ("vertebrae T1", 49), ("vertebrae C7", 50), ("vertebrae C1", 56), ("trachea", 57),
    ("colon", 62), ("left rib 1", 63), ("right rib 12", 86), ("left humerus", 87), ("right hip", 96), ("sacrum", 97),
    ("right iliopsoas", 107), ("right common carotid artery", 113), ("right kidney cyst", 117), ("prostate", 118),
    ("right subclavian artery", 124), ("vertebrae S1", 127), ("bone lesion", 128), ("airway", 132)])
def test_shipped_ids(shipped, name, gid): assert shipped.resolve(name) == gid


@pytest.mark.parametrize("dataset, pairs", [
    ("AbdomenCT-1K", {1: 1, 3: 3, 4: 4}), ("BTCV-Cervix", {1: 15, 2: 118, 4: 19}), ("CT-ORG", {1: 1, 2: 15, 6: 22}),
    ("CRLM-CT", {3: 25, 4: 17, 5: 26}), ("Bone-NIH", {1: 128, 2: 128}), ("AeroPath", {2: 132}),
    ("CTPelvic1K-CLINIC", {1: 97, 2: 95, 3: 96}), ("Autopet23", {1: 133}), ("LIDC-IDRI", {1: 134}),
    ("Task08", {1: 25, 2: 26}), ("VerSe", {k: 57 - k for k in range(1, 25)})])
def test_shipped_mappings(shipped, dataset, pairs): assert shipped.mapping(dataset) == pairs


def test_shipped_mappings_of_large_sets(shipped):
    assert shipped.mapping("AMOS22")[15] == 118 and len(shipped.mapping("TotalSegmentatorV2")) == 117
    assert shipped.mapping("TotalSegmentatorV2")[117] == 127 and shipped.mapping("COLON_ACRIN6664")[4] == 135
    assert len(shipped.mappings) == 24


def test_D3_class_names_with_gaps(shipped):
    names = shipped.class_names()
    assert len(names) == 133 and names[0] == "background" and [k for k, n in enumerate(names) if n is None] == GAPS
    assert all(shipped.to_label_dict()[n] == k for k, n in enumerate(names) if n and k)


def test_hierarchy(shipped):
    assert shipped.children(1) == (25, 26) and shipped.children(4) == (24,) and shipped.children(132) == (57,)
    assert shipped.parents(26) == (1,) and shipped.parents(1) == () and shipped.parents(999) == ()


# -------------------------------------------------------------------------------------------------- D2: collisions

D2 = [("CT-ORG", 3, "lung", "spleen"), ("CT-ORG", 4, "kidney", "pancreas"), ("CT-ORG", 5, "bone", "right kidney"),
      ("AeroPath", 1, "lung", "liver"), ("CTPelvic1K-CLINIC", 4, "lumbar spine", "pancreas"),
      ("VerSe", 25, "vertebrae L6", "hepatic vessel"), ("BTCV-Cervix", 3, "rectum", "spleen")]


@pytest.mark.parametrize("dataset, local, name, becomes", D2)
def test_D2_unmapped_ids_do_not_become_other_organs(shipped, dataset, local, name, becomes):
    lbl = np.full((2, 3), local, np.int16)
    assert shipped.class_names()[local] == becomes and shipped.unmapped(dataset)[local] == name
    assert (relabel(lbl, shipped.lut(dataset)) == 255).all()
    assert (relabel(lbl, shipped.lut(dataset, unmapped="zero")) == 0).all()
    assert (relabel(lbl, shipped.lut(dataset, unmapped="keep")) == local).all()
    with pytest.raises(DataError, match=rf"values \[{local}\] have no global class"):
        relabel(lbl, shipped.lut(dataset, unmapped="error"))
    assert (RelabelLUTd("label", shipped)({"label": lbl, "dataset_name": dataset})["label"] == 255).all()


def test_D2_collisions_are_reported(shipped):
    texts = [t for c, t in shipped.problems() if c == "E405"]
    assert len(texts) == len(D2)
    for dataset, local, name, becomes in D2:
        assert any(f"'{dataset}', local id {local} '{name}'" in t and f"'{becomes}'" in t for t in texts)


def test_problems_name_all_codes():
    space = LabelSpace((LabelClass(1, "liver"), LabelClass(2, "pancreas"), LabelClass(2, "aorta"),
                        LabelClass(3, "pancraes"), LabelClass(4, "LIVER")), {"A": {5: 1}}, {"A": {2: "x", 9: "y"}})
    found = space.problems()
    assert [c for c, _ in found] == ["E405", "E406", "W404", "W404", "W407", "W407"]
    assert found == sorted(found, key=lambda f: f[0]) and LabelSpace((LabelClass(1, "liver"),)).problems() == []


# --------------------------------------------------------------------------------------------------- the label space

def test_D5_ids_do_not_depend_on_what_is_added_later(shipped):
    lists = {"A": {1: "uterus", 2: "liver"}, "B": {1: "cheek_left", 2: "uterus"}, "C": {5: "larynx"}}
    for order in itertools.permutations(lists):
        space = shipped
        for d in order:
            bigger = space.extended(d, lists[d])
            assert bigger.to_label_dict().items() >= space.to_label_dict().items()
            assert all(bigger.mapping(k) == space.mapping(k) for k in space.mappings)
            space = bigger
        assert space.mapping("A")[1] == space.mapping("B")[2] and space.mapping("A")[2] == 1
    assert legacy_label_dict([lists["A"], lists["B"]]) != legacy_label_dict([lists["B"], lists["A"]])


names_of_classes = st.sampled_from(["liver", "Leber", "left rib 1", "rib_left_1", "uterus", "skin", "Skin ", "fat",
                                    "muscle", "left cheek", "cheek_L", "thymus", "larynx", "costa 7", "rib_7"])
steps = st.lists(st.one_of(
    st.tuples(st.just("extend"), st.sampled_from("ABCDE"),
              st.dictionaries(st.integers(1, 9), names_of_classes, max_size=5),
              st.sampled_from(["add", "unmapped"])),
    st.tuples(st.just("retire"), names_of_classes)), max_size=12)


@hypothesis_settings(max_examples=150, deadline=None)
@given(steps, st.booleans())
def test_append_only(todo, start_shipped):
    "Whatever is done, an id means one class for ever, and an id that was given out is not given out again"
    space = LabelSpace.shipped() if start_shipped else LabelSpace()
    meaning: dict[int, str] = {}
    for step in todo:
        before = space
        try: space = space.extended(*step[1:]) if step[0] == "extend" else space.retire(step[1])
        except DataError: continue
        for c in space.classes: assert meaning.setdefault(c.id, c.name) == c.name
        ids = [c.id for c in space.classes]
        assert len(set(ids)) == len(ids) and [c.id for c in space.classes][:len(before.classes)] == \
            [c.id for c in before.classes]
        for d, m in before.mappings.items():
            now = space.mapping(d)
            active = set(space.to_label_dict().values())
            assert all(now[k] == g for k, g in m.items() if g in active)
        assert all(preferred_name(n) == preferred_name(space.class_names()[g]) for d, m in space.mappings.items()
                   for k, g in m.items() if (n := space.local_names.get(d, {}).get(k)) and g < len(space.class_names())
                   and space.class_names()[g])
    text = labels._space_text(space)
    assert space == pickle.loads(pickle.dumps(space)) and json.loads(text)["version"] == 1


def test_retired_ids_are_not_reused(shipped, tmp_path):
    space = shipped.extended("X", {1: "uterus"})
    gid = space.resolve("uterus")
    space = space.retire("Uterus")
    assert space.resolve("uterus") is None and space.unmapped("X") == {1: "uterus"}
    assert "uterus" not in space.to_label_dict() and gid not in space.to_label_dict().values()
    space = LabelSpace.load(space.save(tmp_path/"s.json")).extended("Y", {1: "uterus", 2: "skin"})
    assert min(space.mapping("Y").values()) > gid and space.mapping("X") == {}


def test_retiring_the_last_class_keeps_its_place(shipped):
    space = LabelSpace((LabelClass(1, "liver"), LabelClass(2, "skin"))).retire("skin")
    assert space.class_names() == ["background", "liver"] and space.extended("X", {1: "fat"}).mapping("X") == {1: 3}


def test_extending_with_overrides(shipped):
    local = {1: "liver tumor", 15: "prostate or uterus", 16: "thing"}
    space = shipped.extended("X", local, overrides={15: "prostate", "thing": None})
    assert space.mapping("X") == {1: 26, 15: 118} and space.unmapped("X") == {16: "thing"}
    assert shipped.extended("X", local, overrides={"15": 118, "thing": "liver"}).mapping("X") == {1: 26, 15: 118, 16: 1}
    with pytest.raises(DataError, match="has no such class"): shipped.extended("X", local, overrides={99: "liver"})
    with pytest.raises(DataError, match="no class with id 2"): shipped.extended("X", local, overrides={1: 2})
    with pytest.raises(DataError, match="no class 'protsate', did you mean"):
        shipped.extended("X", local, overrides={15: "protsate"})
    with pytest.raises(ConfigError, match="unknown: must be"): shipped.extended("X", local, unknown="drop")


def test_two_local_ids_of_one_class(shipped):
    assert shipped.extended("X", {1: "bone lesion", 2: "Bone_Lesion"}).mapping("X") == {1: 128, 2: 128}
    assert LabelSpace().extended("X", {1: "lesion", 2: "lesion"}).mapping("X") == {1: 1, 2: 1}


def test_shipped_data_sets_can_be_extended_with_their_own_lists(shipped):
    ct_org = {1: "liver", 2: "bladder", 3: "lung", 4: "kidney", 5: "bone", 6: "brain"}
    more = shipped.extended("CT-ORG", ct_org)
    assert more.mapping("CT-ORG").items() >= shipped.mapping("CT-ORG").items()
    assert sorted(more.mapping("CT-ORG").values())[-3:] == [136, 137, 138] and more.unmapped("CT-ORG") == {}
    assert shipped.extended("CT-ORG", ct_org, unknown="unmapped").mappings == shipped.mappings


@pytest.mark.parametrize("bad, words", [
    ({1.5: "liver"}, "whole number"), ({-1: "liver"}, "whole number"), ({2**31: "liver"}, "whole number"),
    ({"a": "liver"}, "whole number"), ({True: "liver"}, "whole number"), ({1: ""}, "class name"),
    ({1: None}, "class name"), ({0: "liver"}, "id 0 is background")])
def test_bad_local_labels(shipped, bad, words):
    with pytest.raises(DataError, match=words): shipped.extended("X", bad)


def test_background_is_no_class(shipped):
    for name in ("background", "Background", "unlabeled"):
        assert shipped.extended("X", {0: name, 1: "liver"}).mapping("X") == {1: 1}


@pytest.mark.parametrize("bad", [0, -1, 2**31, True, 1.0, "1"])
def test_bad_class_ids(bad):
    with pytest.raises(DataError, match="is not a whole number"): LabelSpace((LabelClass(bad, "liver"),))


def test_all_lacking_names_are_listed(shipped):
    with pytest.raises(DataError) as e: shipped.extended("X", {k: f"thing {k}" for k in range(1, 9)}, unknown="error")
    assert all(f"{k} 'thing {k}'" in str(e.value) for k in range(1, 9)) and "8 classes" in str(e.value)


# ------------------------------------------------------------------------------------------------------------ files

def test_save_and_load(shipped, tmp_path):
    space = LabelSpace((LabelClass(3, "Leber", ("liver",), (), False), LabelClass(7, "Tumor", (), (3,), True)),
                       {"A": {1: 3}, "B": {}}, {"A": {1: "liver", 2: "x"}})
    for s in (shipped, space, LabelSpace()):
        path = s.save(tmp_path/"s.json", on_exists="overwrite")
        first = path.read_bytes()
        assert LabelSpace.load(path) == s and LabelSpace.load(path).save(path, "overwrite").read_bytes() == first
    assert space.resolve("Liver") == 3 and space.resolve("Tumor") is None
    with pytest.raises(OutputExists): shipped.save(tmp_path/"s.json")


def test_load_finds_its_way(shipped, tmp_path):
    (tmp_path/"label_dict.json").write_text(json.dumps(shipped.to_label_dict()))
    (tmp_path/"label_mappings.json").write_text(json.dumps(shipped.to_label_mappings()))
    for p in (tmp_path, tmp_path/"label_dict.json"):
        assert LabelSpace.load(p).mappings == shipped.mappings


def test_gaps_are_fine_and_the_rest_is_refused_by_name(tmp_path):
    "Row 7 of the table of faults"
    path, maps = tmp_path/"label_dict.json", tmp_path/"m.json"
    path.write_text(json.dumps({"liver": 1, "spleen": 132}))
    assert len(LabelSpace.from_files(path).class_names()) == 133
    for bad, words in [({"heart": 1, "heart   ": 2, "Leber": 3}, r"\['heart', 'heart   '\] mean one class"),
                       ({"left clavicle": 1, "left clavicula": 2}, "'left clavicle', 'left clavicula'"),
                       ({"liver": 1, "spleen": 1}, r"id 1 stands for \['liver', 'spleen'\]"),
                       ({"liver": 0}, "/liver: an integer from 1"), ({"liver": True}, "/liver"),
                       ({"liver": 1.0}, "/liver"), ({"a/b": "1"}, "/a~1b"), ({" ": 1}, "integer")]:
        path.write_text(json.dumps(bad))
        with pytest.raises(FormatError, match=words): LabelSpace.from_files(path)
    path.write_text('{"liver": 1, "liver": 2}')
    with pytest.raises(FormatError, match="'liver' appears twice"): LabelSpace.from_files(path)
    path.write_text('{"liver": 1, "Liver": 1}')
    assert [c for c, _ in LabelSpace.from_files(path, strict=False).problems()] == ["E406", "W407"]
    path.write_text('{"liver": 1}')
    for bad, words in [({"A": [[1]]}, "/A/0"), ({"A": [[1, 1], [1, 2]]}, "mapped twice"), ({"A": {"1": 1}}, "/A"),
                       ({"A": [[1, 1.5]]}, "/A/0"), ({"A": [[-1, 1]]}, "/A/0"), ([1], "object of data sets")]:
        maps.write_text(json.dumps(bad))
        with pytest.raises(FormatError, match=words): LabelSpace.from_files(path, maps)


@pytest.mark.parametrize("change, words", [
    ({"version": 2}, "Update medvol_nb"), ({"format": "other"}, "Update medvol_nb"), ({"classes": 3}, "damaged"),
    ({"classes": [{"id": 1}]}, "damaged"), ({"mappings": []}, "damaged"),
    ({"local_names": {"A": {"x": "y"}}}, "damaged")])
def test_damaged_spaces_are_refused(shipped, tmp_path, change, words):
    path = shipped.save(tmp_path/"s.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=words): LabelSpace.load(path)


@pytest.mark.parametrize("key", ["1.5", "-1", "01", "", " 1", "1e3", "٣", str(2**31), "x"])
def test_label_ids_in_files(key):
    assert label_dict_problems({key: "liver"}, "/label_dict")[0].startswith(f"/label_dict/{key}: a label id")


def test_legacy_label_dict():
    lists = [{1: "liver", 2: "kidney", 3: "spleen"}, {1: "heart   ", 2: "liver"}, {1: "heart", 2: "Liver"}]
    assert legacy_label_dict(lists) == {"liver": 1, "kidney": 2, "spleen": 3, "heart   ": 4, "heart": 5, "Liver": 6}


# ---------------------------------------------------------------------------------------------------------- relabel

def pairwise(arr: np.ndarray, pairs: dict[int, int], other) -> np.ndarray:
    "The literal rule, in Python integers"
    return np.array([{0: 0, **pairs}.get(v, v if other == "keep" else other) for v in arr.ravel().tolist()],
                    dtype=object).reshape(arr.shape)


def everything(dtype) -> np.ndarray:
    "Small values, and the ends of the range"
    limits = np.iinfo(dtype)
    low, high = max(-300, limits.min), min(700, limits.max)
    return np.array([*range(low, high + 1), limits.min, limits.min + 1, limits.max - 1, limits.max], dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("dataset", ["CT-ORG", "TotalSegmentatorV2", "VerSe"])
@pytest.mark.parametrize("unmapped, other", [("ignore", 255), ("zero", 0), ("keep", "keep")])
def test_lut_equals_the_pairs(shipped, dtype, dataset, unmapped, other):
    arr = everything(dtype)
    goal = np.int16 if unmapped != "keep" else np.uint64 if dtype == np.uint64 else np.int64
    out = relabel(arr, shipped.lut(dataset, goal, unmapped))
    assert out.dtype == goal and out.tolist() == pairwise(arr, shipped.mapping(dataset), other).tolist()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("unmapped, other", [("ignore", 255), ("zero", 0), ("keep", "keep")])
def test_lut_equals_the_pairs_for_tensors(shipped, dtype, unmapped, other):
    import torch
    arr = everything(dtype)
    lut = shipped.lut("CT-ORG", np.int64, unmapped)
    expected = pairwise(arr, shipped.mapping("CT-ORG"), other).tolist()
    for f in (relabel, labels._take_on_device):
        out = f(torch.from_numpy(arr), lut)
        assert out.dtype == torch.int64 and out.tolist() == expected
    assert labels._take_on_device(torch.from_numpy(arr), shipped.lut("CT-ORG")).dtype == torch.int16


@pytest.mark.gpu
def test_lut_on_cuda(shipped):
    import torch
    if not torch.cuda.is_available(): pytest.skip("no CUDA device")
    for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint8):
        arr = torch.from_numpy(everything(dtype))
        for unmapped in ("ignore", "zero", "keep"):
            lut = shipped.lut("CT-ORG", np.int64, unmapped)
            out = relabel(arr.cuda(), lut)
            assert out.is_cuda and torch.equal(out.cpu(), relabel(arr, lut))
        with pytest.raises(DataError, match="no global class"):
            relabel(arr.cuda(), shipped.lut("CT-ORG", unmapped="error"))


@given(st.dictionaries(st.integers(0, 60), st.integers(0, 60), max_size=20), st.sampled_from(["int8", "uint8", "int16",
       "int32", "int64", "uint16"]), st.lists(st.integers(-100, 100), max_size=30), st.sampled_from(["uint8", "int16"]))
def test_any_mapping(pairs, dtype, values, goal):
    arr = np.array([v for v in values if np.iinfo(dtype).min <= v <= np.iinfo(dtype).max], dtype)
    assert relabel(arr, make_lut(pairs, goal, "ignore", 99)).tolist() == pairwise(arr, pairs, 99).tolist()
    missing = sorted({v for v in arr.tolist() if v not in pairs and v != 0})
    if missing:
        with pytest.raises(DataError, match="have no global class"): relabel(arr, make_lut(pairs, goal, "error"))
    else: assert relabel(arr, make_lut(pairs, goal, "error")).tolist() == pairwise(arr, pairs, 0).tolist()
    fits = [v for v in arr.tolist() if np.iinfo(goal).min <= v <= np.iinfo(goal).max]
    if len(fits) == arr.size: assert relabel(arr, make_lut(pairs, goal, "keep")).tolist() == \
        pairwise(arr, pairs, "keep").tolist()
    else:
        with pytest.raises(DataError, match="do not fit"): relabel(arr, make_lut(pairs, goal, "keep"))


def test_substitution_is_simultaneous():
    swap = make_lut([(1, 2), (2, 1), (3, 3)])
    assert relabel(np.array([1, 2, 3, 0]), swap).tolist() == [2, 1, 3, 0]


def test_zero_may_be_mapped(): assert relabel(np.array([0, 1]), make_lut({0: 5, 1: 1})).tolist() == [5, 1]


@pytest.mark.parametrize("make", [
    lambda a: a, np.asfortranarray, lambda a: a[::2, ::-1], lambda a: a.transpose(2, 0, 1), lambda a: a[:0],
    lambda a: a[0, 0, 0], lambda a: a.astype(a.dtype.newbyteorder(">")), lambda a: np.broadcast_to(a[:1], a.shape),
    lambda a: a.astype(np.float32), lambda a: a.astype(np.float64)])
def test_memory_layouts(make):
    arr = make(np.random.default_rng(0).integers(-2, 9, (5, 6, 7)).astype(np.int16))
    before = arr.copy()
    pairs = {1: 4, 2: 100}
    out = relabel(arr, make_lut(pairs))
    assert out.shape == arr.shape and out.tolist() == pairwise(np.asarray(arr).astype(int), pairs, 255).tolist()
    assert np.array_equal(arr, before)
    if isinstance(arr, np.ndarray) and arr.size: assert not np.shares_memory(out, arr)


def test_large_arrays_are_taken_in_pieces():
    arr = np.random.default_rng(0).integers(0, 118, 2**16*2 + 17).astype(np.int16)
    turn = {k: 117 - k for k in range(118)}
    assert np.array_equal(relabel(arr, make_lut(turn)), 117 - arr)
    arr[-1] = 500
    with pytest.raises(DataError, match=r"values \[500\]"): relabel(arr, make_lut(turn, unmapped="error"))


def test_bool_labels(): assert relabel(np.array([True, False]), make_lut({1: 7})).tolist() == [7, 0]


@pytest.mark.parametrize("bad", [np.array([0.5]), np.array([np.nan]), np.array([np.inf]), np.array([1e300]),
                                 np.array([1j]), np.array(["1"]), [1, 2], None])
def test_labels_are_never_cast_silently(bad):
    with pytest.raises(DataError): relabel(bad, make_lut({1: 1}))


def test_refused_tables(shipped):
    with pytest.raises(ConfigError, match="integer dtype"): make_lut({1: 1}, np.float32)
    with pytest.raises(ConfigError, match="unmapped must be"): make_lut({1: 1}, unmapped="drop")
    with pytest.raises(DataError, match="local ids must be"): make_lut({-1: 1})
    with pytest.raises(DataError, match="local ids must be"): make_lut({2**23: 1})
    with pytest.raises(DataError, match="255.* do not fit int8.*another ignore id"): make_lut({1: 1}, np.int8)
    with pytest.raises(DataError, match="no value to spare"): make_lut({k: k for k in range(256)}, np.uint8, "error")
    with pytest.raises(ConfigError, match="ignore id 26 is the class 'hepatic tumor'"): shipped.lut("CT-ORG", ignore=26)
    assert shipped.lut("CT-ORG", np.int8, ignore=-1)[3] == -1


def test_D16_one_pass_instead_of_many(shipped):
    lbl = np.random.default_rng(0).integers(0, 118, (96, 96, 96)).astype(np.int16)
    pairs, lut = shipped.mapping("TotalSegmentatorV2"), shipped.lut("TotalSegmentatorV2")
    def loop() -> np.ndarray:
        out = lbl.copy()
        for k, g in pairs.items(): out[lbl == k] = g
        return out
    def best(f) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            f()
            times.append(time.process_time() - start)
        return min(times)
    assert np.array_equal(relabel(lbl, lut), loop())
    assert best(loop) > 8*best(lambda: relabel(lbl, lut))


def test_relabel_needs_little_memory(shipped):
    import tracemalloc
    lbl, lut = np.zeros((160, 160, 160), np.int16), shipped.lut("TotalSegmentatorV2")
    tracemalloc.start()
    relabel(lbl, lut)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < lbl.nbytes + 2**21


# ------------------------------------------------------------------------------------------------------- transforms

def test_meta_tensors_keep_what_they_know(shipped):
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Compose, Flipd
    arr = np.random.default_rng(0).integers(0, 8, (1, 4, 5, 6)).astype(np.int16)
    affine = torch.diag(torch.tensor([1.5, 2, 3, 1], dtype=torch.float64))
    item = {"label": MetaTensor(torch.from_numpy(arr), affine=affine, meta={"filename_or_obj": "a.nii.gz"}),
            "dataset_name": "CT-ORG"}
    flip = Flipd("label", 0)
    out = Compose([flip, RelabelLUTd("label", shipped)])(item)["label"]
    assert isinstance(out, MetaTensor) and out.dtype == torch.int16
    assert torch.equal(out.affine, flip(item)["label"].affine) and not torch.equal(out.affine, affine)
    assert out.meta["filename_or_obj"] == "a.nii.gz" and [o["class"] for o in out.applied_operations] == ["Flip"]
    back = flip.inverse({"label": out})["label"]
    assert np.array_equal(back.numpy(), relabel(arr, shipped.lut("CT-ORG")))
    assert torch.equal(item["label"].as_tensor(), torch.from_numpy(arr))


def test_D16_agrees_with_monai(shipped):
    import torch
    from monai.transforms import MapLabelValued
    pairs = shipped.mapping("TotalSegmentatorV2")
    arr = np.random.default_rng(0).integers(0, 118, (1, 20, 21, 22))
    mapped = MapLabelValued("label", orig_labels=list(pairs), target_labels=list(pairs.values()), dtype=np.int16)
    ours = RelabelLUTd("label", shipped)
    for value in (arr.astype(np.int16), torch.from_numpy(arr), torch.from_numpy(arr.astype(np.float32))):
        a, b = (np.asarray(t({"label": value, "dataset_name": "TotalSegmentatorV2"})["label"]) for t in (ours, mapped))
        assert np.array_equal(a, b)


def test_relabel_transform(shipped):
    t = RelabelLUTd(["label", "pseudo"], shipped, allow_missing_keys=True, unmapped="zero", dtype=np.uint8)
    item = {"label": np.array([1, 2, 3]), "dataset_name": "CT-ORG", "image": "kept", ("any", 1): None}
    out = t(item)
    assert out["label"].tolist() == [1, 15, 0] and out["label"].dtype == np.uint8 and list(out) == list(item)
    assert pickle.loads(pickle.dumps(t))(item)["label"].tolist() == [1, 15, 0]
    from_pairs = RelabelLUTd("label", {"CT-ORG": [[1, 7], [3, 9]]}, ignore=77)
    assert from_pairs(item)["label"].tolist() == [7, 77, 9]
    other = {**item, "dataset_name": "LIDC"}
    assert RelabelLUTd("label", shipped, unknown="keep")(other)["label"] is item["label"]
    with pytest.raises(DataError, match="no label mapping for data set 'LIDC', did you mean 'LIDC-IDRI'"): t(other)
    with pytest.raises(ConfigError, match="unknown: must be"): RelabelLUTd("label", shipped, unknown="skip")
    with pytest.raises(KeyError, match="was missing in the data"): RelabelLUTd("mask", shipped)(item)
    with pytest.raises(KeyError, match="'dataset_name'"): t({"label": np.array([1])})
    assert RelabelLUTd("label", shipped, "set")({"label": np.array([2]), "set": "CT-ORG"})["label"].tolist() == [15]


def test_dataset_select_transform():
    from monai.transforms import Compose, RandFlipd, ScaleIntensityd
    chosen = DatasetSelectTransformd("image", {"A": Compose([RandFlipd("image", 1.0, 0)]), "B": None,
                                               "C": ScaleIntensityd("image")})
    image = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    run = Compose([chosen])
    assert np.array_equal(run({"image": image, "dataset_name": "A"})["image"], image[:, ::-1])
    item = {"image": image, "dataset_name": "B"}
    assert chosen(item) is item and float(run({"image": image, "dataset_name": "C"})["image"].max()) == 1
    with pytest.raises(KeyError, match="no transform for data set 'D', there are"): chosen({"dataset_name": "D"})
    with pytest.raises(KeyError, match="dataset_name"): chosen({"image": image})
    assert DatasetSelectTansformd is DatasetSelectTransformd
    assert DatasetSelectTansformd("x", {"A": None}, dataset_key="set")({"set": "A"}) == {"set": "A"}


def test_dataset_select_transform_can_be_seeded():
    from monai.transforms import Compose, RandGaussianNoised
    def draw(seed: int) -> np.ndarray:
        t = DatasetSelectTransformd("image", {d: Compose([RandGaussianNoised("image", 1.0)]) for d in "AB"})
        t.set_random_state(seed)
        empty = np.zeros((1, 4), np.float32)
        return np.stack([np.asarray(t({"image": empty, "dataset_name": d})["image"]) for d in "AB"])
    assert np.array_equal(draw(3), draw(3)) and not np.array_equal(draw(3), draw(4))
    assert not np.array_equal(*draw(3))


# ------------------------------------------------------------------------------------------------------ the command

def write_list(folder, name: str, classes: dict) -> str:
    path = folder/f"{name}_5_folds.json"
    path.write_text(json.dumps({"training": [], "label_dict": classes}))
    return path


def test_build_label_space(shipped, tmp_path):
    lists = [write_list(tmp_path, "WORD", {"1": "liver", "11": "intestine"}),
             write_list(tmp_path, "Pediatric", {"29": "bones", "15": "adrenal-left"})]
    dry = build_label_space(lists, tmp_path/"out", dry_run=True)
    assert not (tmp_path/"out").exists() and dry["written"] == []
    report = build_label_space(lists, tmp_path/"out")
    assert report["written"] == ["label_dict.json", "label_mappings.json", "label_space.json", "labels.ctbl",
                                 "labels.label"]
    assert {**report, "written": []} == dry and report["added"] == {"intestine": 136, "bones": 137}
    space = LabelSpace.load(tmp_path/"out")
    assert space.mapping("Pediatric") == {15: 9, 29: 137}
    files = LabelSpace.from_files(tmp_path/"out"/"label_dict.json", tmp_path/"out"/"label_mappings.json")
    assert files.to_label_dict() == space.to_label_dict() and files.mappings == space.mappings
    with pytest.raises(OutputExists): build_label_space(lists, tmp_path/"out")
    before = [(p.name, p.read_bytes()) for p in sorted((tmp_path/"out").iterdir())]
    build_label_space(lists[::-1], tmp_path/"out", base=tmp_path/"out"/"label_space.json", on_exists="overwrite")
    assert before == [(p.name, p.read_bytes()) for p in sorted((tmp_path/"out").iterdir())]
    assert build_label_space(lists, tmp_path/"out", on_exists="skip")["written"] == []


def test_build_from_nothing(tmp_path):
    lists = [write_list(tmp_path, "A", {"1": "liver", "2": "left costa 1"}),
             write_list(tmp_path, "B", {"5": "rib_left_1"})]
    build_label_space(lists, tmp_path/"out", base="empty")
    assert LabelSpace.load(tmp_path/"out").to_label_mappings() == {"A": [[1, 1], [2, 2]], "B": [[5, 2]]}
    with pytest.raises(DataError, match="2 classes that the label space has not"):
        build_label_space(lists, tmp_path/"other", base="empty", unknown="error")
    bad = write_list(tmp_path, "C", {"1.5": "liver"})
    with pytest.raises(FormatError, match="/label_dict/1.5"): build_label_space([bad], tmp_path/"other")
    (tmp_path/"D.json").write_text('{"training": []}')
    with pytest.raises(FormatError, match="no 'label_dict'"): build_label_space([tmp_path/"D.json"], tmp_path/"other")
    assert not (tmp_path/"other").exists()


@pytest.mark.parametrize("name, kept, lost, said", [
    ('the "old" liver', "labels.ctbl", "labels.label", "holds a quotation mark"),
    ("Cooper's'", "labels.label", "labels.ctbl", "has a ' at an end")])
def test_a_name_that_a_colour_table_cannot_hold(name, kept, lost, said, tmp_path, caplog):
    "The label space is what was asked for: it is written, the table is left out and the name is told"
    lists = [write_list(tmp_path, "A", {"1": name, "2": "spleen"})]
    dry = build_label_space(lists, tmp_path/"out", base="empty", dry_run=True)
    assert lost in dry["left_out"] and not (tmp_path/"out").exists()
    made = build_label_space(lists, tmp_path/"out", base="empty")
    assert made["written"] == ["label_dict.json", "label_mappings.json", "label_space.json", kept]
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == made["written"]
    assert LabelSpace.load(tmp_path/"out").to_label_dict() == {name: 1, "spleen": 2}
    for text in (made["left_out"][lost], caplog.text):
        assert said in text and "id 1" in text and "rename these classes in their data lists or in the base" in text
    with pytest.raises(OutputExists): build_label_space(lists, tmp_path/"out", base="empty")


def test_a_colour_table_of_the_space_before_does_not_stay(tmp_path):
    build_label_space([write_list(tmp_path, "A", {"1": "liver"})], tmp_path/"out", base="empty")
    assert (tmp_path/"out"/"labels.label").is_file()
    lists = [write_list(tmp_path, "A", {"1": 'spleen "2"'})]
    build_label_space(lists, tmp_path/"out", base="empty", on_exists="overwrite")
    assert not (tmp_path/"out"/"labels.label").exists() and (tmp_path/"out"/"labels.ctbl").is_file()


def test_ids_that_are_too_high_for_a_colour_table_are_told(tmp_path):
    LabelSpace((LabelClass(40000, "liver"),)).save(tmp_path/"high.json")
    made = build_label_space([write_list(tmp_path, "A", {"1": "liver"})], tmp_path/"out", base=tmp_path/"high.json")
    assert "40000: a whole number from 0 to 32768" in made["left_out"]["labels.ctbl"]
    assert "rename" not in made["left_out"]["labels.ctbl"] and "labels.label" in made["written"]
