# %% [markdown]
# # Colour tables
#
# > Names and colours of labels for 3D Slicer, ITK-SNAP and OME-Zarr, written and read.
#
# A label volume holds numbers. Opened in another program, liver and spleen are "segment 1" and "segment 3" in colours
# of that program's choice, until somebody types the names in. The programs have files for this: 3D Slicer a colour
# table `.ctbl`, ITK-SNAP a label description, OME-Zarr an entry in the metadata of the store. All three say the same,
# a name and a colour for each id. This page writes and reads them, with the colours that
# labels have everywhere in this library, so that the liver in Slicer is the liver of the figures.

# %%
#| default_exp colours

# %%
#| export
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import (DataError, FormatError, MissingFile, OnExists, _read_text, check_output, read_json,
                            write_json, write_text)
from medvol_nb.geometry import Volume, reorient, same_grid, to_axes
from medvol_nb.plot import label_colours
from medvol_nb.stores import _split, as_format_error, new_store, open_zarr, write_ome_zarr
from medvol_nb.volume import format_of, stem_of, write_volume

# %%
from medvol_nb import phantoms, plot
from medvol_nb.core import raises, tmpdir
from medvol_nb.geometry import affine_from
from medvol_nb.stores import write_zarr

# %% [markdown]
# ## One colour each
# A colour here is red, green and blue from 0 to 255, as in the files. Without a choice it is that of `label_colours`,
# a function of the id alone.

# %%
#| export
Colour = tuple[int, int, int]

def table_colours(
    ids: Sequence[int], # label ids
    chosen: Mapping[int, Sequence[int]] | None = None, # id -> red, green, blue for those that shall be different
) -> dict[int, Colour]: # id -> red, green, blue, 0...255
    "Colours of labels for a table"
    ids, chosen = [int(i) for i in ids], chosen or {}
    usual = np.round(255*label_colours(np.array(ids, np.int64))).astype(int).tolist()
    out = {i: tuple(chosen.get(i, c)) for i, c in zip(ids, usual)}
    for i, c in out.items():
        if len(c) != 3 or not all(isinstance(v, (int, np.integer)) and 0 <= v <= 255 for v in c):
            raise DataError(f"colour of label {i}: three whole numbers from 0 to 255 are needed, got {c!r}")
    return {i: tuple(int(v) for v in c) for i, c in out.items()}

# %%
organs = {1: "liver", 2: "left kidney", 6: "portal vein & branches"}
table_colours(organs, {6: (0, 0, 255)})

# %%
assert table_colours(organs)[1] == tuple(np.round(255*label_colours([1])[0]).astype(int))
with raises(DataError, match="colour of label 6: three whole numbers from 0 to 255"):
    table_colours(organs, {6: (0, 0, 256)})

# %% [markdown]
# ## What the two programs demand
# Slicer's line is `id name R G B A`, fields divided by blanks; so blanks in names become underscores, and Slicer turns
# all underscores into blanks again. Ids go up to 32768 and a line has at most 1023 bytes. ITK-SNAP's is
# `IDX R G B A VIS MSH "LABEL"`, with opacity from 0 to 1, visibility in slices and in 3D, and a name that cannot hold a
# quotation mark nor be empty; ids are 16 bits wide. In both 0 is the background. A name that would be cut or would
# break the file is refused.

# %%
#| export
_KINDS = {".ctbl": "slicer", ".label": "itksnap", ".txt": "itksnap"} # of the tables that are written
TABLE_IDS = {"slicer": 32768, "itksnap": 65535} # highest id that the program reads
_MAX_TABLE = 2**24 # [byte]
_BLANK = {"background", "clear label", "clear", ""} # usual names of id 0
_SNAP_HEAD = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    IDX:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
"""

def _name_problem(name: Any, kind: str) -> str:
    if not isinstance(name, str) or not name.strip(" _"): return f"a name is needed, got {name!r:.80}"
    if not name.isprintable(): return f"the name {name!r:.80} holds a control character"
    if kind == "itksnap" and '"' in name: return f"the name {name!r:.80} holds a quotation mark, which ends it"
    if kind == "slicer" and name != name.strip("'"): return f"the name {name!r:.80} has a ' at an end, which is lost"
    if kind == "slicer" and len(name.encode()) > 960: return f"the name {name:.20}... is too long for a line"
    return ""

def _checked_names(names: Mapping[int, str], kind: str, where: str) -> dict[int, str]:
    "Names by id, or everything that is wrong with them"
    wrong = [f"id {i!r}: a whole number from 0 to {TABLE_IDS[kind]} is needed" for i in names
             if not isinstance(i, (int, np.integer)) or isinstance(i, bool) or not 0 <= i <= TABLE_IDS[kind]]
    wrong += [f"id {i}: {why}" for i, n in names.items() if (why := _name_problem(n, kind))]
    if wrong: raise DataError(f"{len(wrong)} problems with the colour table {where}: " + "; ".join(wrong[:20]))
    return {int(i): names[i] for i in sorted(names)}

def colour_table(
    names: Mapping[int, str], # id -> class name; 0 may be left out
    kind: Literal["slicer", "itksnap"], # whose form
    colours: Mapping[int, Sequence[int]] | None = None, # id -> red, green, blue; default: `table_colours`
    where: str = "colour table", # file name, for the head of the table and for errors
) -> str: # text of the file
    "Colour table of 3D Slicer or label description of ITK-SNAP"
    named = {0: "background" if kind == "slicer" else "Clear Label"} | _checked_names(names, kind, where)
    rgb = table_colours(named, colours)
    if kind == "slicer":
        lines = [f"# Color table file {' '.join(where.split())}", f"# {max(named) + 1} values"]
        lines += [f"{i} {n.replace(' ', '_')} {' '.join(map(str, rgb[i]))} {255*bool(i)}" for i, n in named.items()]
        return "\n".join(lines) + "\n"
    lines = [f'{i:5d} ' + "".join(f"{v:5d}" for v in rgb[i]) + f'{bool(i):9d}{bool(i):3d}{bool(i):3d}    "{n}"'
             for i, n in named.items()]
    return _SNAP_HEAD + "\n".join(lines) + "\n"

def write_colour_table(
    path: str | os.PathLike, # .ctbl for 3D Slicer, .label or .txt for ITK-SNAP
    names: Mapping[int, str], # id -> class name
    colours: Mapping[int, Sequence[int]] | None = None, # id -> red, green, blue, 0...255; default: `table_colours`
    on_exists: OnExists = "error", # what to do when `path` is there already
) -> Path: # `path`
    "Write names and colours of labels for 3D Slicer or ITK-SNAP"
    path = Path(path)
    if path.suffix not in _KINDS:
        raise FormatError(f"{path}: colour tables end in .ctbl (3D Slicer), .label or .txt (ITK-SNAP)")
    return write_text(path, colour_table(names, _KINDS[path.suffix], colours, path.name), on_exists)

# %%
print(colour_table(organs, "slicer", where="organs.ctbl"))
print(colour_table(organs, "itksnap")[len(_SNAP_HEAD):])

# %%
with tmpdir() as d:
    for bad, why in (({1: 'the "liver"'}, "quotation mark"), ({70000: "liver"}, "0 to 65535"), ({1: "a\nb"}, "control"),
                     ({1: " "}, "a name is needed"), ({-1: "x", 1.5: "y"}, "2 problems")):
        with raises(DataError, match=why): write_colour_table(d/"bad.label", bad)
    with raises(DataError, match="id 40000: a whole number from 0 to 32768"): colour_table({40000: "x"}, "slicer")
    with raises(FormatError, match="end in .ctbl"): write_colour_table(d/"organs.json", organs)
    assert not list(d.iterdir())

# %% [markdown]
# ## Reading
# Tables come from colleagues and from the net, so they are read like any other input: every line is checked, all that
# is wrong is told at once with its line, and nothing is guessed. Two things are taken as they occur: Slicer writes
# fractions of colours and leaves the opacity out in old files. Slicer can call its tables `.txt`, too, so
# for that suffix the first line decides which of the two it is. Opacity and visibility are not kept.

# %%
#| export
def _number(text: str, high: int, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > high:
        raise ValueError(f"{what}: a whole number from 0 to {high} is needed, got {text!r:.40}")
    return int(text)

def _shade(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{0,20})?(e-[0-9]{1,2})?", text) or float(text) > 255:
        raise ValueError(f"colour: a number from 0 to 255 is needed, got {text!r:.40}")
    return round(float(text))

def _slicer_line(line: str) -> tuple[int, str, Colour]:
    fields = line.split()
    if len(fields) not in (5, 6): raise ValueError(f"'id name R G B A' is needed, got {line!r:.80}")
    i, rgb = _number(fields[0], TABLE_IDS["slicer"], "id"), [_shade(f) for f in fields[2:]]
    return i, fields[1].replace("_", " ").strip("'").strip(), tuple(rgb[:3])

def _snap_line(line: str) -> tuple[int, str, Colour]:
    fields = line.split(None, 7)
    quoted = fields[7].rstrip() if len(fields) == 8 else ""
    if len(quoted) < 2 or quoted[0] != '"' or quoted.find('"', 1) != len(quoted) - 1:
        raise ValueError(f"'IDX R G B A VIS MSH \"LABEL\"' is needed, got {line!r:.80}")
    i, rgb = _number(fields[0], TABLE_IDS["itksnap"], "id"), tuple(_number(f, 255, "colour") for f in fields[1:4])
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{0,20})?", fields[4]):
        raise ValueError(f"opacity: a number is needed, got {fields[4]!r:.40}")
    for f in fields[5:7]: _number(f, 1, "visibility")
    return i, quoted[1:-1].strip(), rgb

def _parsed_table(text: str, kind: str, where: str) -> tuple[dict[int, str], dict[int, Colour]]:
    names, colours, wrong, at = {}, {}, [], {}
    for n, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip() or line.lstrip()[0] == "#": continue
        try:
            i, name, rgb = (_slicer_line if kind == "slicer" else _snap_line)(line)
            if i in at: raise ValueError(f"id {i} is also in line {at[i]}")
            at[i] = n
            if i == 0 and name.casefold() in _BLANK: continue
            if why := _name_problem(name, kind): raise ValueError(why)
            names[i], colours[i] = name, rgb
        except ValueError as e: wrong.append(f"line {n}: {e}")
    if not at and not wrong: wrong = ["it holds no label"]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise FormatError(f"{where}: {len(wrong)} problems: " + "; ".join(wrong[:20]) + more)
    return dict(sorted(names.items())), dict(sorted(colours.items()))

def read_colour_table(
    path: str | os.PathLike, # .ctbl, .label or .txt file, or an OME-Zarr label image
) -> tuple[dict[int, str], dict[int, tuple[int, int, int]]]: # id -> name, and id -> red, green, blue; no background
    "Read names and colours of labels that 3D Slicer, ITK-SNAP or an OME-Zarr writer stored"
    path = Path(path)
    if path.suffix not in _KINDS:
        if any(p.suffix == ".zarr" for p in (path, *path.parents)): return _zarr_table(path)
        raise FormatError(f"{path}: colour tables are .ctbl (3D Slicer), .label, .txt (ITK-SNAP), and OME-Zarr labels")
    text, kind = _read_text(path, _MAX_TABLE), _KINDS[path.suffix]
    if path.suffix == ".txt":
        first = next((l for l in text.split("\n") if l.strip() and l.lstrip()[0] != "#"), '"')
        kind = "itksnap" if '"' in first else "slicer"
    return _parsed_table(text, kind, str(path))

# %%
with tmpdir() as d:
    tables = [read_colour_table(write_colour_table(d/n, organs, {1: (9, 8, 7)}))
              for n in ("a.ctbl", "a.label", "a.txt")]
    (d/"bad.ctbl").write_text("0 background 0 0 0 0\n1 liver 300 0 0 255\nspleen 2 1 2 3\n\n0 again 1 1 1 1\n")
    try: read_colour_table(d/"bad.ctbl")
    except FormatError as e: told = str(e).replace(str(d), "")
told

# %%
assert tables == [(organs, table_colours(organs, {1: (9, 8, 7)}))]*3
assert all(t in told for t in ("3 problems: line 2: colour", "line 3: id: a whole", "line 5: id 0 is also in line 1"))

# %% [markdown]
# ## Inside an OME-Zarr store
# OME-NGFF keeps colours and names in the attributes of the label image, under `image-label`. The label image of a scan
# lies in the scan's own store, in the group `labels`, which lists what is there.

# %%
#| export
def label_attributes(
    names: Mapping[int, str], # id -> class name
    colours: Mapping[int, Sequence[int]] | None = None, # id -> red, green, blue; default: `table_colours`
) -> dict: # for `write_ome_zarr(image_label=...)`
    "Names and colours of labels as OME-NGFF has them"
    rgb = table_colours(sorted(names), colours)
    return {"colors": [{"label-value": i, "rgba": [*c, 255*bool(i)]} for i, c in rgb.items()],
            "properties": [{"label-value": int(i), "name": names[i]} for i in sorted(names)]}

def _zarr_table(path: Path) -> tuple[dict[int, str], dict[int, Colour]]:
    import zarr
    store, name = _split(path)
    if not store.is_dir(): raise MissingFile(f"{store} does not exist")
    with as_format_error(str(path), "damaged zarr metadata"):
        attrs = dict(zarr.open_group(str(store), path=name or None, mode="r").attrs)
        about = attrs.get("ome", attrs).get("image-label")
        if about is None: raise FormatError(f"{path}: no 'image-label' in its attributes, so no names and colours")
        names, colours = {}, {}
        for n, entry in enumerate([*about.get("properties", ()), *about.get("colors", ())]):
            i = entry.get("label-value")
            if type(i) is not int or i < 0: raise FormatError(f"{path}: entry {n}: label-value {i!r:.40} is no id")
            if "rgba" in entry:
                if i in colours: raise FormatError(f"{path}: label {i} has two colours")
                colours[i] = tuple(_number(str(v), 255, f"label {i}, colour") for v in entry["rgba"][:3])
            else: names[i] = str(entry.get("name") or names.get(i) or i)
    shown = [i for i in sorted({*names, *colours}) if i or names.get(i, "").casefold() not in _BLANK]
    return {i: names.get(i, str(i)) for i in shown}, table_colours(shown, colours)

# %% [markdown]
# ## A label with its names
# `write_label` writes the volume and what belongs to it: beside a file the tables of both programs, in a store the
# attributes. An id that occurs and has no name is an error: the programs would show it without a colour, or not
# at all.

# %%
#| export
def _add_to_image(path: Path) -> Literal["0.4", "0.5"]:
    "Make room for a label in the store of its image; the version of OME-NGFF to write"
    group, image = path.parent, path.parent.parent
    if group.name != "labels" or image.suffix != ".zarr":
        raise DataError(f"{path}: labels of an OME-Zarr image are written to {_split(path)[0]}/labels/NAME")
    three = (image/"zarr.json").exists()
    if (image/".zmetadata").exists() or three and read_json(image/"zarr.json").get("consolidated_metadata"):
        raise DataError(f"{image}: its metadata is consolidated and would not know the label. Write the store anew")
    if not group.exists():
        with new_store(group, version=3 if three else 2, attributes=_listed([], three)): pass
    return "0.5" if three else "0.4"

def _listed(labels: list[str], three: bool) -> dict:
    return {"ome": {"version": "0.5", "labels": labels}} if three else {"labels": labels}

def _list_label(path: Path, three: bool) -> None:
    "Name the label in the attributes of the group `labels`"
    file = path.parent/("zarr.json" if three else ".zattrs")
    content = read_json(file) if file.exists() else {}
    attrs = content.setdefault("attributes", {}) if three else content
    there = (attrs.get("ome", {}) if three else attrs).get("labels", [])
    if path.name not in there:
        attrs.update(_listed([*there, path.name], three))
        write_json(file, content)

def write_label(
    vol: Volume, # labels: whole numbers, no channels
    path: str | os.PathLike, # volume file or store; 'scan.ome.zarr/labels/NAME' puts it into the store of its image
    names: Mapping[int, str], # id -> class name, for every id that occurs
    colours: Mapping[int, Sequence[int]] | None = None, # id -> red, green, blue, 0...255; default: `table_colours`
    on_exists: OnExists = "error", # what to do with files that are there already
    *,
    tables: Sequence[Literal["slicer", "itksnap"]] = ("slicer", "itksnap"), # written beside a file, not in stores
) -> list[Path]: # what was written: tables <name>.ctbl and <name>.label, then the volume
    "Write a label volume with names and colours that other programs show"
    path = Path(path)
    if vol.dtype.kind not in "iub" or vol.channels is not None:
        raise DataError(f"{path}: labels are whole numbers without channels, got {vol}")
    there = np.unique(np.asarray(vol.data[...])).tolist()
    if lost := [int(i) for i in there if i and i not in names]:
        raise DataError(f"{path}: {len(lost)} ids of the volume have no name: {lost[:10]}. Name them, or set them to 0")
    if vol.dtype == bool: vol = replace(vol, data=np.asarray(vol.data[...]).astype(np.uint8))
    if format_of(path).name == "zarr":
        return _write_label_zarr(vol, path, label_attributes(names, colours), on_exists)
    ends = {"slicer": ".ctbl", "itksnap": ".label"}
    beside = {path.with_name(stem_of(path) + ends[k]): colour_table(names, k, colours, stem_of(path) + ends[k])
              for k in tables}
    todo = [p for p in (*beside, path) if check_output(p, on_exists)]
    for p in todo:
        if p == path: write_volume(vol, path, on_exists)
        else: write_text(p, beside[p], on_exists)
    return todo

def _write_label_zarr(vol: Volume, path: Path, about: Mapping, on_exists: OnExists) -> list[Path]:
    "Label image with its attributes, alone or in the store of its image"
    store, inner = _split(path)
    vol, version = to_axes(reorient(vol, "RAS"), "zyx"), "0.5"
    if inner:
        image = open_zarr(store)
        if not same_grid(image, to_axes(vol, image.spatial_axes)):
            raise DataError(f"{path}: the label lies on another grid than the image of the store. Use resample_to")
        version = _add_to_image(path)
    if go := check_output(path, on_exists):
        more = {"source": {"image": "../../"}} if inner else {}
        write_ome_zarr(vol, path, on_exists, version=version, labels=True, image_label={**about, **more})
    if inner: _list_label(path, version == "0.5") # also when it is there: an earlier run may have ended before this
    return [path] if go else []

# %%
body = phantoms.abdomen((48, 36, 42))
scan, lbl = (Volume(a, affine_from(body.spacing, (-180, -140, 20))) for a in (body.img, body.lbl))
with tmpdir() as d:
    write_ome_zarr(to_axes(scan, "zyx"), d/"scan.ome.zarr")
    written = [*write_label(lbl, d/"organs.nii.gz", body.names),
               *write_label(reorient(lbl, "LPS"), d/"scan.ome.zarr/labels/organs", body.names)]
    again = [read_colour_table(p) for p in written if not p.name.endswith(".gz")]
    stored = open_zarr(d/"scan.ome.zarr/labels/organs").load()
    shown = [p.relative_to(d).as_posix() for p in written]
    with raises(DataError, match=r"2 ids of the volume have no name: \[1, 2\]"):
        write_label(lbl, d/"x.nii.gz", {k: n for k, n in body.names.items() if k > 2})
    with raises(DataError, match="another grid"):
        write_label(Volume(body.lbl, np.eye(4)), d/"scan.ome.zarr/labels/other", body.names)
    write_zarr(scan, d/"plain.zarr")
    with raises(FormatError, match="no 'image-label'"): read_colour_table(d/"plain.zarr")
shown

# %%
assert again == [(body.names, table_colours(body.names))]*3
assert np.array_equal(to_axes(stored, "xyz").data, body.lbl) and same_grid(to_axes(stored, "xyz"), lbl)

# %% [markdown]
# The table as a picture: the colours that Slicer, ITK-SNAP and the figures of this library show.

# %%
plot.bars({n: int((body.lbl == k).sum()*np.prod(body.spacing)/1000) for k, n in body.names.items()}, "mL",
          ids=list(body.names))
