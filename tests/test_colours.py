"""Page 07d: names and colours of labels for 3D Slicer, ITK-SNAP and OME-Zarr, from outside and back."""
import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from medvol_nb import phantoms
from medvol_nb.colours import (
    TABLE_IDS,
    colour_table,
    label_attributes,
    read_colour_table,
    table_colours,
    write_colour_table,
    write_label,
)
from medvol_nb.core import DataError, FormatError, MissingFile, OutputExists
from medvol_nb.geometry import Volume, affine_from, reorient, same_grid, to_axes
from medvol_nb.labels import LabelSpace, build_label_space
from medvol_nb.plot import label_colours
from medvol_nb.stores import open_zarr, write_ome_zarr, write_zarr
from medvol_nb.volume import read_volume, write_volume

NAMES = {1: "liver", 2: "left kidney", 7: "portal vein & splenic vein (\u00fc)"}

# As 3D Slicer writes one: fractions where colours were chosen on a wheel, names without blanks, unnamed ids left out
SLICER = """\
# Color table file AbdominalAtlasColors.ctbl
# 700 values
0 background 0 0 0 0
1 skin 177.031 122.043 101 255
2 left_renal_artery 216 101 79 255
12 'spleen' 157 108 162 255
699 label_699 7.65e-05 0 255 255
"""

# As ITK-SNAP writes one
SNAP = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#  LABEL:   Label description
################################################
    0     0    0    0        0  0  0    "Clear Label"
    1   255    0    0        1  1  1    "Left ventricle"
    2     0  255    0     0.45  1  0    "CSF, extra-axial"
  200   186  194  212        1  0  1    "Deep_R"
"""


@pytest.fixture(scope="module")
def body():
    "A scan with labels, not in the origin"
    b = phantoms.abdomen((24, 18, 21))
    affine = affine_from(b.spacing, (-180, -140, 20))
    return Volume(b.img, affine), Volume(b.lbl, affine), dict(b.names)


# ---------------------------------------------------------------------------------------- what the programs write

def test_a_table_of_slicer(tmp_path):
    for name in ("a.ctbl", "a.txt"): # Slicer offers both
        (tmp_path/name).write_text(SLICER)
        names, colours = read_colour_table(tmp_path/name)
        assert names == {1: "skin", 2: "left renal artery", 12: "spleen", 699: "label 699"}
        assert colours == {1: (177, 122, 101), 2: (216, 101, 79), 12: (157, 108, 162), 699: (0, 0, 255)}


def test_a_table_of_itk_snap(tmp_path):
    for name in ("a.label", "a.txt"):
        (tmp_path/name).write_text(SNAP)
        names, colours = read_colour_table(tmp_path/name)
        assert names == {1: "Left ventricle", 2: "CSF, extra-axial", 200: "Deep_R"}
        assert colours == {1: (255, 0, 0), 2: (0, 255, 0), 200: (186, 194, 212)}


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, lambda t: t + "\n\n  \n",
                                    lambda t: t.replace(" ", "\t", 40).replace("#\t", "# "), lambda t: t.rstrip("\n")])
@pytest.mark.parametrize("name, text", [("a.ctbl", SLICER), ("a.label", SNAP)])
def test_harmless_differences(name, text, change, tmp_path):
    (tmp_path/name).write_text(text)
    (tmp_path/f"b{name}").write_bytes(change(text).encode())
    assert read_colour_table(tmp_path/f"b{name}") == read_colour_table(tmp_path/name)


def test_old_tables_without_opacity(tmp_path):
    (tmp_path/"a.ctbl").write_text("1 liver 10 20 30\n0 air 1 2 3 255\n")
    assert read_colour_table(tmp_path/"a.ctbl") == ({0: "air", 1: "liver"}, {0: (1, 2, 3), 1: (10, 20, 30)})


# ------------------------------------------------------------------------------------------- what the programs read

def as_slicer_reads(text: str) -> dict:
    "vtkMRMLColorTableStorageNode::ReadCtblFile: lines of at most 1023 bytes, fields from a stream, names unquoted"
    out = {}
    for line in text.encode().split(b"\n"):
        assert len(line) < 1024
        if not line or line[:1] == b"#": continue
        i, name, r, g, b, a = line.decode().split()
        assert 0 <= int(i) <= 32768
        out[int(i)] = name.replace("_", " ").strip("'"), (int(r), int(g), int(b)), int(a)
    return out


def as_snap_reads(text: str) -> dict:
    "ColorLabelTable::LoadFromFile: seven numbers from a stream, then what stands between the next two quotation marks"
    out = {}
    assert text.splitlines()[1] == "# ITK-SnAP Label Description File"
    for line in text.split("\n"):
        if not line or line[0] == "#": continue
        numbers, _, rest = line.partition('"')
        i, r, g, b, _, visible, mesh = numbers.split()
        name = rest.partition('"')[0]
        assert 0 <= int(i) < 2**16 and name, "an empty name is a syntax error there"
        if int(i): out[int(i)] = name, (int(r), int(g), int(b)), (int(visible), int(mesh))
    return out


def test_tables_as_the_programs_read_them():
    rgb = table_colours(NAMES, {2: (1, 2, 3)})
    slicer = as_slicer_reads(colour_table(NAMES, "slicer", {2: (1, 2, 3)}))
    snap = as_snap_reads(colour_table(NAMES, "itksnap", {2: (1, 2, 3)}))
    assert slicer == {0: ("background", (0, 0, 0), 0)} | {i: (n, rgb[i], 255) for i, n in NAMES.items()}
    assert snap == {i: (n, rgb[i], (1, 1)) for i, n in NAMES.items()}


word = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)
usable = st.lists(word, min_size=1, max_size=4).map(" ".join).map(lambda s: s.replace('"', "").replace("_", "-"))
usable = usable.map(lambda s: " ".join(s.strip("' ").split())).filter(lambda s: s.strip(" _'") and s.isprintable())


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(1, 32768), usable, min_size=1, max_size=5), st.data())
def test_round_trip(tmp_path_factory, names, data):
    shade = st.integers(0, 255)
    colours = {i: data.draw(st.tuples(shade, shade, shade)) for i in names}
    folder = tmp_path_factory.mktemp("t")
    for name in ("a.ctbl", "a.label", "a.txt"):
        assert read_colour_table(write_colour_table(folder/name, names, colours)) == (names, colours)
    assert {i: v[0] for i, v in as_snap_reads((folder/"a.label").read_text("utf-8")).items()} == names


def test_colours_are_those_of_the_figures():
    found = table_colours(range(300))
    assert np.array_equal(np.array(list(found.values())), np.round(255*label_colours(300)))


def test_odd_file_names(tmp_path):
    "The name stands in the file, on one line"
    path = write_colour_table(tmp_path/"a\n7 b 1 2 3 4\n;.ctbl", NAMES)
    assert read_colour_table(path)[0] == as_names(as_slicer_reads(path.read_text("utf-8"))) == NAMES


def as_names(table: dict) -> dict: return {i: v[0] for i, v in table.items() if i}


def test_label_space_as_tables(tmp_path):
    space = LabelSpace.shipped()
    (tmp_path/"X_5_folds.json").write_text(json.dumps({"training": [], "label_dict": {"1": "liver", "2": "a new one"}}))
    build_label_space([tmp_path/"X_5_folds.json"], tmp_path/"space")
    for name in ("labels.ctbl", "labels.label"):
        names, colours = read_colour_table(tmp_path/"space"/name)
        assert {n: i for i, n in names.items()} == {**space.to_label_dict(), "a new one": 136}
        assert colours == table_colours(names)


# ------------------------------------------------------------------------------------------------------ hostile input

@pytest.mark.parametrize("line, said", [
    ("liver 1 2 3 4 5", "id: a whole number from 0 to 32768"), ("-1 liver 1 2 3 4", "id"),
    ("32769 liver 1 2 3 4", "id"), ("9"*5000 + " liver 1 2 3 4", "id"), ("1.0 liver 1 2 3 4", "id"),
    ("\u0661 liver 1 2 3 4", "id"), ("1 liver 256 2 3 4", "colour: a number from 0 to 255"),
    ("1 liver -1 2 3 4", "colour"), ("1 liver nan 2 3 4", "colour"), ("1 liver inf 2 3 4", "colour"),
    ("1 liver 1e9 2 3 4", "colour"), ("1 liver 0x10 2 3 4", "colour"), ("1 liver 1 2 3 999", "colour"),
    ("1 left kidney 1 2 3 4", "'id name R G B A' is needed"), ("1 liver 1 2", "'id name R G B A'"), ("1", "'id name"),
    ("1 _ 1 2 3 4", "a name is needed"), ("1 a\x00b 1 2 3 4", "control character"), ("1 a\x1bb 1 2 3 4", "control"),
    ("2 spleen 1 2 3 4\n2 liver 1 2 3 4", "id 2 is also in line 3"),
])
def test_damaged_tables_of_slicer(line, said, tmp_path):
    (tmp_path/"a.ctbl").write_text(f"# Color table\n0 background 0 0 0 0\n{line}\n5 fine 1 2 3 4\n", "utf-8")
    with pytest.raises(FormatError, match=said) as e: read_colour_table(tmp_path/"a.ctbl")
    told = str(e.value)
    assert f"line {3 + line.count(chr(10))}: " in told and "1 problems" in told and len(told) < 400


@pytest.mark.parametrize("line, said", [
    ('65536 1 2 3 1 1 1 "a"', "id: a whole number from 0 to 65535"), ('x 1 2 3 1 1 1 "a"', "id"),
    ('1 256 2 3 1 1 1 "a"', "colour: a whole number"), ('1 1.5 2 3 1 1 1 "a"', "colour"),
    ('1 1 2 3 nan 1 1 "a"', "opacity"), ('1 1 2 3 1 2 1 "a"', "visibility"), ('1 1 2 3 1 1 1 a', "is needed"),
    ('1 1 2 3 1 1 1 "a', "is needed"), ('1 1 2 3 1 1 1 "a" b', "is needed"), ('1 1 2 3 1 1 "a"', "is needed"),
    ('1 1 2 3 1 1 1 "a"b"', "is needed"), ('1 1 2 3 1 1 1 ""', "a name is needed"), ("1 1 2 3 1 1 1", "is needed"),
    ('1 1 2 3 1 1 1 "a\x07"', "control"), ('5 1 2 3 1 1 1 "a"\n5 1 2 3 1 1 1 "b"', "id 5 is also in line 2"),
])
def test_damaged_tables_of_snap(line, said, tmp_path):
    (tmp_path/"a.label").write_text(f"# ITK-SnAP Label Description File\n{line}\n", "utf-8")
    with pytest.raises(FormatError, match=said) as e: read_colour_table(tmp_path/"a.label")
    assert f"line {2 + line.count(chr(10))}: " in str(e.value)


def test_all_problems_at_once_but_not_a_million(tmp_path):
    (tmp_path/"a.ctbl").write_text("x\n"*100_000)
    with pytest.raises(FormatError, match="100000 problems: line 1: .*; line 20: .*; and 99980 more") as e:
        read_colour_table(tmp_path/"a.ctbl")
    assert len(str(e.value)) < 3000


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(MissingFile): read_colour_table(tmp_path/"a.ctbl")
    with pytest.raises(MissingFile): read_colour_table(tmp_path/"a.zarr")
    for name in ("a.csv", "a.json", "a", "labels"):
        with pytest.raises(FormatError, match="colour tables are .ctbl"): read_colour_table(tmp_path/name)
    for name, text in (("a.ctbl", ""), ("a.label", "# only a head\n"), ("a.txt", "\n\n")):
        (tmp_path/name).write_text(text)
        with pytest.raises(FormatError, match="holds no label"): read_colour_table(tmp_path/name)
    (tmp_path/"latin.ctbl").write_bytes("1 a 1 2 3 4\n2 K\u00f6rper 1 2 3 4\n".encode("latin-1"))
    with pytest.raises(FormatError, match="latin.ctbl, line 2: byte 0xf6 is not UTF-8"):
        read_colour_table(tmp_path/"latin.ctbl")
    with open(tmp_path/"huge.ctbl", "wb") as f: f.truncate(2**24 + 1)
    with pytest.raises(FormatError, match="16.0 MiB are allowed"): read_colour_table(tmp_path/"huge.ctbl")
    (tmp_path/"folder.ctbl").mkdir()
    with pytest.raises(FormatError, match="is not a file"): read_colour_table(tmp_path/"folder.ctbl")


@pytest.mark.parametrize("kind, names, said", [
    ("slicer", {32769: "a"}, "0 to 32768"), ("itksnap", {65536: "a"}, "0 to 65535"), ("slicer", {True: "a"}, "0 to"),
    ("slicer", {1: "a\tb"}, "control"), ("itksnap", {1: "a\u2028b"}, "control"), ("itksnap", {1: '"'}, "quotation"),
    ("slicer", {1: "'a'"}, "is lost"), ("slicer", {1: "x"*1000}, "too long"), ("slicer", {1: "  "}, "a name"),
    ("slicer", {1: None}, "a name is needed"), ("itksnap", {"1": "a"}, "a whole number"),
])
def test_names_that_a_table_cannot_hold(kind, names, said, tmp_path):
    path = tmp_path/{"slicer": "a.ctbl", "itksnap": "a.label"}[kind]
    with pytest.raises(DataError, match=f"1 problems with the colour table a\\..*{said}"):
        write_colour_table(path, names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("colour", [(1, 2), (1, 2, 256), (-1, 0, 0), (0.5, 0, 0), (1, 2, 3, 4), "red"])
def test_colours_that_are_none(colour, tmp_path):
    with pytest.raises(DataError, match="colour of label 1"): write_colour_table(tmp_path/"a.ctbl", NAMES, {1: colour})
    assert not list(tmp_path.iterdir())


def test_existing_tables(tmp_path):
    path = write_colour_table(tmp_path/"a.ctbl", NAMES)
    with pytest.raises(OutputExists, match="--on-exists"): write_colour_table(path, {1: "x"})
    write_colour_table(path, {1: "x"}, on_exists="skip")
    assert read_colour_table(path)[0] == NAMES
    write_colour_table(path, {1: "x"}, on_exists="overwrite")
    assert read_colour_table(path)[0] == {1: "x"} and list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------- volumes with tables

@pytest.mark.parametrize("name", ["organs.nii.gz", "organs.nii", "organs.mha", "organs.nrrd", "organs.h5"])
def test_label_files_with_tables(name, body, tmp_path):
    if name.endswith((".mha", ".nrrd")): pytest.importorskip("SimpleITK")
    _, lbl, names = body
    written = write_label(reorient(lbl, "LPS"), tmp_path/name, names, {1: (1, 1, 1)})
    assert [p.name for p in written] == ["organs.ctbl", "organs.label", name]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in written}
    for table in written[:2]: assert read_colour_table(table) == (names, table_colours(names, {1: (1, 1, 1)}))
    back = read_volume(tmp_path/name)
    assert np.array_equal(reorient(to_axes(back, "xyz"), "RAS").data, lbl.data)


def test_what_is_there_decides(body, tmp_path):
    _, lbl, names = body
    write_colour_table(tmp_path/"organs.ctbl", NAMES)
    with pytest.raises(OutputExists): write_label(lbl, tmp_path/"organs.nii.gz", names)
    assert [p.name for p in tmp_path.iterdir()] == ["organs.ctbl"], "nothing is written if anything is in the way"
    kept = write_label(lbl, tmp_path/"organs.nii.gz", names, on_exists="skip")
    assert [p.name for p in kept] == ["organs.label", "organs.nii.gz"]
    assert read_colour_table(tmp_path/"organs.ctbl")[0] == NAMES
    write_label(lbl, tmp_path/"organs.nii.gz", names, on_exists="overwrite", tables=("slicer",))
    assert read_colour_table(tmp_path/"organs.ctbl")[0] == names
    assert [p.name for p in write_label(lbl, tmp_path/"plain.nii.gz", names, tables=())] == ["plain.nii.gz"]


def test_volumes_that_are_no_labels(body, tmp_path):
    scan, lbl, names = body
    for vol in (Volume(lbl.data.astype(np.float32), lbl.affine), Volume(lbl.data[None], lbl.affine, "cxyz")):
        with pytest.raises(DataError, match="whole numbers without channels"):
            write_label(vol, tmp_path/"a.nii.gz", names)
    with pytest.raises(DataError, match="ids of the volume have no name: \\[-"): # a scan in Hounsfield units
        write_label(scan, tmp_path/"a.nii.gz", names)
    mask = Volume(lbl.data == 1, lbl.affine)
    write_label(mask, tmp_path/"mask.nii.gz", {1: "liver"})
    write_label(mask, tmp_path/"mask.zarr", {1: "liver"})
    for name in ("mask.nii.gz", "mask.zarr"): assert read_volume(tmp_path/name).data.sum() == mask.data.sum()
    assert {p.name for p in tmp_path.iterdir()} == {"mask.nii.gz", "mask.ctbl", "mask.label", "mask.zarr"}


# ------------------------------------------------------------------------------------------------------- in OME-Zarr

def attributes(path: Path) -> dict:
    attrs = dict(zarr.open_group(str(path), mode="r").attrs)
    return attrs.get("ome", attrs)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_in_the_store_of_their_image(version, body, tmp_path):
    scan, lbl, names = body
    store = tmp_path/"scan.ome.zarr"
    write_ome_zarr(to_axes(scan, "zyx"), store, version=version)
    write_label(reorient(lbl, "LPS"), store/"labels"/"organs", names, {1: (9, 8, 7)})
    mask = Volume((lbl.data > 0).astype(np.uint8), lbl.affine)
    write_label(mask, store/"labels"/"body", {1: "body"})
    write_label(mask, store/"labels"/"body", {1: "body"}, on_exists="overwrite")
    assert write_label(mask, store/"labels"/"body", {1: "body"}, on_exists="skip") == []
    assert attributes(store/"labels")["labels"] == ["organs", "body"]
    about = attributes(store/"labels"/"organs")
    assert about["image-label"]["source"] == {"image": "../../"} and about["multiscales"][0]["type"] == "nearest"
    assert about["image-label"]["colors"][0] == {"label-value": 1, "rgba": [9, 8, 7, 255]}
    assert {p["label-value"]: p["name"] for p in about["image-label"]["properties"]} == names
    assert read_colour_table(store/"labels"/"organs") == (names, table_colours(names, {1: (9, 8, 7)}))
    back, image = open_zarr(store/"labels"/"organs").load(), open_zarr(store).load()
    assert same_grid(back, image) and np.array_equal(to_axes(back, "xyz").data, lbl.data)
    assert np.array_equal(to_axes(image, "xyz").data, scan.data), "the image is as it was"
    assert not list(store.rglob(".mvtmp*"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_label_that_was_not_listed_yet(version, body, tmp_path):
    "A run that ended between the label and the list of labels goes on where it stopped"
    scan, lbl, names = body
    store = tmp_path/"scan.ome.zarr"
    write_ome_zarr(to_axes(scan, "zyx"), store, version=version)
    write_label(lbl, store/"labels"/"organs", names)
    file = store/"labels"/("zarr.json" if version == "0.5" else ".zattrs")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"organs"', b""))
    assert attributes(store/"labels")["labels"] == []
    assert write_label(lbl, store/"labels"/"organs", names, on_exists="skip") == []
    assert attributes(store/"labels")["labels"] == ["organs"] and file.read_bytes() == whole


def test_labels_in_a_store_of_their_own(body, tmp_path):
    _, lbl, names = body
    assert write_label(lbl, tmp_path/"organs.zarr", names) == [tmp_path/"organs.zarr"]
    assert read_colour_table(tmp_path/"organs.zarr") == (names, table_colours(names))
    assert "source" not in attributes(tmp_path/"organs.zarr")["image-label"]
    assert np.array_equal(to_axes(read_volume(tmp_path/"organs.zarr"), "xyz").data, lbl.data)


def test_places_for_labels(body, tmp_path):
    scan, lbl, names = body
    store = tmp_path/"scan.ome.zarr"
    write_ome_zarr(to_axes(scan, "zyx"), store)
    for inner in ("organs", "masks/organs", "labels/a/b"):
        with pytest.raises(DataError, match="are written to .*scan.ome.zarr/labels/NAME"):
            write_label(lbl, store/inner, names)
    moved = Volume(lbl.data, lbl.affine + np.eye(4, k=3))
    for other in (moved, Volume(lbl.data[1:], lbl.affine)):
        with pytest.raises(DataError, match="lies on another grid"): write_label(other, store/"labels"/"a", names)
    assert not (store/"labels").exists()
    with pytest.raises(MissingFile): write_label(lbl, tmp_path/"no.zarr"/"labels"/"a", names)
    write_ome_zarr(to_axes(scan, "zyx"), tmp_path/"two.zarr", version="0.4")
    for s in (store, tmp_path/"two.zarr"):
        zarr.consolidate_metadata(str(s))
        with pytest.raises(DataError, match="is consolidated"): write_label(lbl, s/"labels"/"a", names)


@pytest.mark.parametrize("wrong, said", [
    ({"colors": [{"label-value": 1, "rgba": [1, 2, 300, 255]}]}, "label 1, colour"),
    ({"colors": [{"label-value": 1, "rgba": [1, 2]}]}, "three whole numbers"),
    ({"colors": [{"label-value": 1.5, "rgba": [1, 2, 3, 255]}]}, "label-value 1.5 is no id"),
    ({"colors": [{"label-value": -1, "rgba": [1, 2, 3, 255]}]}, "is no id"),
    ({"colors": [{"rgba": [1, 2, 3, 255]}]}, "is no id"), ({"colors": [7]}, "damaged"), ({"colors": 7}, "damaged"),
    ({"colors": [{"label-value": 1, "rgba": [0, 0, 0, 0]}]*2}, "two colours"), ("x", "damaged"), (["x"], "damaged"),
])
def test_damaged_attributes(wrong, said, body, tmp_path):
    write_ome_zarr(to_axes(body[1], "zyx"), tmp_path/"a.zarr", labels=True)
    content = json.loads((tmp_path/"a.zarr"/"zarr.json").read_text())
    content["attributes"]["ome"]["image-label"] = wrong
    (tmp_path/"a.zarr"/"zarr.json").write_text(json.dumps(content))
    with pytest.raises((FormatError, DataError), match=f"a.zarr.*{said}|{said}"): read_colour_table(tmp_path/"a.zarr")


def test_attributes_as_others_write_them(body, tmp_path):
    "Only colours, or only names, is allowed"
    for k, (about, names) in enumerate((({"colors": [{"label-value": 5, "rgba": [1, 2, 3, 255]}]}, {5: "5"}),
                                        ({"properties": [{"label-value": 4, "class": "a"}]}, {4: "4"}), ({}, {}))):
        write_ome_zarr(to_axes(body[1], "zyx"), tmp_path/f"{k}.zarr", labels=True, image_label=about, version="0.4")
        assert read_colour_table(tmp_path/f"{k}.zarr")[0] == names
    write_zarr(body[1], tmp_path/"plain.zarr")
    with pytest.raises(FormatError, match="no 'image-label'"): read_colour_table(tmp_path/"plain.zarr")
    with pytest.raises(FormatError, match="damaged zarr metadata"): read_colour_table(tmp_path/"plain.zarr"/"image")


def test_label_attributes_cover_names():
    about = label_attributes(NAMES)
    for key in ("colors", "properties"): assert [e["label-value"] for e in about[key]] == sorted(NAMES)
    assert max(TABLE_IDS.values()) < 2**16


@pytest.mark.realdata
def test_real_label_with_its_names(data_dir, tmp_path):
    folder = data_dir/"datalists_supervoxels"/"totalseg"
    names = {int(k): n for k, n in json.loads((folder/"label_names.json").read_text())["total"].items()}
    lbl = read_volume(folder/"abdomen_3mm_seg.nii.gz")
    scan = read_volume(folder/"abdomen_3mm_ct.nii.gz")
    write_label(lbl, tmp_path/"organs.nii.gz", names)
    assert np.array_equal(read_volume(tmp_path/"organs.nii.gz").data, lbl.data)
    assert len(read_colour_table(tmp_path/"organs.ctbl")[0]) == 117
    write_ome_zarr(to_axes(reorient(scan, "RAS"), "zyx"), tmp_path/"scan.ome.zarr")
    write_label(lbl, tmp_path/"scan.ome.zarr"/"labels"/"organs", names)
    back = open_zarr(tmp_path/"scan.ome.zarr"/"labels"/"organs").load()
    assert np.array_equal(to_axes(back, "xyz").data, reorient(lbl, "RAS").data)
    write_volume(lbl, tmp_path/"again.nii.gz")
    assert same_grid(to_axes(back, "xyz"), reorient(read_volume(tmp_path/"again.nii.gz"), "RAS"))
