"Zarr, OME-Zarr, HDF5 and NumPy: against the libraries themselves, other people's layouts, attacks and damage"
import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal

from medvol_nb.core import DataError, FormatError, MedvolError, MissingFile, OutputExists, rng_for
from medvol_nb.geometry import Volume, affine_from, reorient, same_grid, to_world
from medvol_nb.stores import (
    create_array,
    downsample2,
    open_hdf5,
    open_zarr,
    read_numpy,
    write_hdf5,
    write_numpy,
    write_ome_zarr,
    write_zarr,
)
from medvol_nb.volume import read_volume

PLACE = affine_from((2.5, .9, .8), (-30, -40, 5), "zyx")
TURNED = PLACE @ np.array([[.96, -.28, 0, 3], [.28, .96, 0, -7], [0, 0, 1, 11], [0, 0, 0, 1]])
WRITERS = {"zarr": (write_zarr, open_zarr, "a.zarr"), "ome": (write_ome_zarr, open_zarr, "a.ome.zarr"),
           "hdf5": (write_hdf5, open_hdf5, "a.h5"), "npz": (write_numpy, read_numpy, "a.npz"),
           "npy": (write_numpy, read_numpy, "a.npy")}
TYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]


def voxels(shape=(20, 21, 22), dtype="i2", seed=0):
    return (rng_for(seed, "stores").integers(0, 120, shape) % (2 if dtype == "?" else 200)).astype(dtype)


def brain(dtype="i2", affine=PLACE, channels=0):
    if channels: return Volume(voxels((channels, 20, 21, 22), dtype), affine, "czyx")
    return Volume(voxels(dtype=dtype), affine, "zyx")


def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ---- what we write, others read

@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_zarr_itself_reads_what_we_write(tmp_path, version, dtype):
    for vol in (brain(dtype, TURNED), brain(dtype, TURNED, 2)):
        path = write_zarr(vol, tmp_path/"a.zarr", "overwrite", version=version, chunks=(8, 16, 32))
        group = zarr.open_group(str(path), mode="r")
        assert group.metadata.zarr_format == version and group["image"].dtype == np.dtype(dtype)
        assert group["image"].chunks == (1,)*(vol.data.ndim - 3) + (8, 16, 22)
        assert_array_equal(group["image"][...], vol.data)
        assert_allclose(group["image"].attrs["affine"], TURNED)
        back = open_zarr(path)
        assert isinstance(back.data, zarr.Array) and back.axes == vol.axes and back.meta["notes"] == ()
        assert_array_equal(back.data[...], vol.data)
        assert_array_equal(back.affine, vol.affine)


@pytest.mark.parametrize("shards", [(16, 32, 32), (32, 32, 32), (64, 64, 64)])
def test_shards(tmp_path, shards):
    for vol in (brain(), brain(channels=2)):
        path = write_zarr(vol, tmp_path/"a.zarr", "overwrite", chunks=16, shards=shards)
        array = zarr.open_group(str(path), mode="r")["image"]
        assert array.shards[-3:] == shards and array.chunks[-3:] == (16, 16, 16)
        assert_array_equal(array[...], vol.data)
        assert_array_equal(open_zarr(path).load().data, vol.data)


def test_wrong_chunks_and_shards_are_refused_and_leave_nothing(tmp_path):
    for options in ({"chunks": 16, "shards": (20, 16, 16)}, {"chunks": 16, "shards": (16, 16)}, {"chunks": 0},
                    {"chunks": -4}, {"chunks": (16, 16)}, {"version": 2, "shards": (16, 16, 16), "chunks": 16},
                    {"version": 4}):
        with pytest.raises(MedvolError): write_zarr(brain(), tmp_path/"a.zarr", **options)
        assert not list(tmp_path.iterdir()), options
    for options in ({"levels": 0}, {"version": "0.6"}, {"unit": "furlong"}, {"chunks": 0}):
        with pytest.raises(MedvolError): write_ome_zarr(brain(), tmp_path/"a.zarr", **options)
        assert not list(tmp_path.iterdir()), options


@pytest.mark.parametrize("version, zarr_format", [("0.4", 2), ("0.5", 3)])
@pytest.mark.parametrize("unit, factor", [("millimeter", 1), ("micrometer", 1000), ("nanometer", 1e6), ("meter", .001)])
def test_ome_zarr_says_where_it_is_in_standard_words(tmp_path, version, zarr_format, unit, factor):
    vol = brain(channels=2)
    path = write_ome_zarr(vol, tmp_path/"a.ome.zarr", version=version, unit=unit, levels=3)
    group = zarr.open_group(str(path), mode="r")
    attrs = dict(group.attrs)
    image = (attrs if version == "0.4" else attrs["ome"])["multiscales"][0]
    assert group.metadata.zarr_format == zarr_format
    assert (image if version == "0.4" else attrs["ome"])["version"] == version
    assert [a["name"] for a in image["axes"]] == ["c", "z", "y", "x"]
    assert [a.get("unit") for a in image["axes"]] == [None, unit, unit, unit]
    assert [a["type"] for a in image["axes"]] == ["channel", "space", "space", "space"]
    for k, level in enumerate(image["datasets"]):
        scale, shift = level["coordinateTransformations"]
        assert_allclose(scale["scale"], np.array([1, 2.5*2**k*factor, .9*2**k*factor, .8*2**k*factor])/[2**0, 1, 1, 1])
        assert len(shift["translation"]) == 4
        assert group[level["path"]].shape == (2, *(-(-n//2**k) for n in vol.shape))
    assert_array_equal(group["0"][...], vol.data)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_all_levels_show_the_same_place(tmp_path, version):
    vol = Volume(voxels((16, 32, 24), "f4"), PLACE, "zyx")
    path = write_ome_zarr(vol, tmp_path/"a.ome.zarr", version=version, unit="micrometer")
    first = open_zarr(path)
    assert same_grid(first, vol) and first.meta["levels"] == 3 and first.meta["notes"] == ()
    for k in range(3):
        level = open_zarr(path, level=k)
        assert_allclose(level.spacing, np.array(vol.spacing)*2**k, rtol=1e-9)
        middle = [to_world(v.affine, (np.array(v.shape) - 1)/2) for v in (level, vol)]
        assert_allclose(*middle, atol=1e-9)
        assert_allclose(np.asarray(level.data).mean(), vol.data.mean(), rtol=1e-5)


def test_a_label_pyramid_invents_no_label(tmp_path):
    lbl = Volume(rng_for(0, "lbl").choice([0, 3, 200], (17, 18, 19)).astype(np.uint8), PLACE, "zyx")
    path = write_ome_zarr(lbl, tmp_path/"l.ome.zarr", labels=True)
    for k in range(3):
        level = open_zarr(path, level=k)
        assert set(np.unique(level.data[...])) <= {0, 3, 200}
        for ijk in ((0, 0, 0), (1, 2, 3)): # each coarse voxel sits where the fine one was taken from
            assert level.data[ijk] == lbl.data[tuple(i*2**k for i in ijk)]
            assert_allclose(to_world(level.affine, ijk), to_world(lbl.affine, np.array(ijk)*2**k), atol=1e-9)


def test_downsampling_is_the_mean_of_blocks():
    data = rng_for(0, "down").integers(0, 255, (2, 6, 8, 4)).astype(np.uint8)
    mean = data.reshape(2, 3, 2, 4, 2, 2, 2).mean(axis=(2, 4, 6))
    assert_array_equal(downsample2(data), np.round(mean).astype(np.uint8))
    assert downsample2(data[0, :5, :7, :1]).shape == (3, 4, 1)
    for dtype in TYPES:
        full = np.full((3, 3, 3), np.iinfo(dtype).max if dtype[0] in "iu" and dtype[1] < "8" else 1, dtype)
        assert downsample2(full).dtype == np.dtype(dtype)
        if dtype not in ("i8", "u8"): assert (downsample2(full) == full[0, 0, 0]).all() # means are float64 at most
    assert_array_equal(downsample2(np.full((2, 2, 2), -7, np.int16)), [[[-7]]])


def test_ome_zarr_refuses_what_the_format_cannot_say(tmp_path):
    for vol, word in ((Volume(voxels(), TURNED, "zyx"), "no rotations"), (brain(), None),
                      (reorient(brain(), "LPS"), "no rotations"), (Volume(voxels(), np.eye(4)), "to_axes")):
        if word is None: continue
        with pytest.raises(DataError, match=word): write_ome_zarr(vol, tmp_path/"a.ome.zarr")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", TYPES)
def test_h5py_reads_what_we_write(tmp_path, dtype):
    for vol in (brain(dtype, TURNED), brain(dtype, TURNED, 3)):
        path = write_hdf5(vol, tmp_path/"a.h5", "overwrite", chunks=(8, 16, 32), name="raw")
        with h5py.File(path, "r") as f:
            assert f["raw"].fletcher32 and f["raw"].compression == "gzip" and f["raw"].dtype == np.dtype(dtype)
            assert_array_equal(f["raw"][...], vol.data)
            assert_allclose(np.reshape(f["raw"].attrs["affine"], (4, 4)), TURNED)
        back = open_hdf5(path)
        assert back.axes == vol.axes and back.dtype == vol.dtype
        assert_array_equal(back.data, vol.data)
        assert_array_equal(back.affine, vol.affine)


@pytest.mark.parametrize("dtype", TYPES)
def test_numpy_reads_what_we_write(tmp_path, dtype):
    for vol in (brain(dtype, TURNED), brain(dtype, TURNED, 3)):
        write_numpy(vol, tmp_path/"a.npz", "overwrite")
        write_numpy(vol, tmp_path/"a.npy", "overwrite")
        with np.load(tmp_path/"a.npz") as z: assert_array_equal(z["data"], vol.data)
        assert_array_equal(np.load(tmp_path/"a.npy"), vol.data)
        back = read_numpy(tmp_path/"a.npz")
        assert back.axes == vol.axes and back.dtype == vol.dtype and back.meta["notes"] == ()
        assert_array_equal(back.data, vol.data)
        assert_array_equal(back.affine, vol.affine)
        bare = read_numpy(tmp_path/"a.npy")
        assert_array_equal(bare.data, vol.data)
        assert "W207" in dict(bare.meta["notes"])


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
def test_equal_volumes_give_equal_bytes(tmp_path, kind):
    write, _, name = WRITERS[kind]
    for k in "ab":
        (tmp_path/k).mkdir()
        write(brain(), tmp_path/k/name)
    assert files(tmp_path/"a") == files(tmp_path/"b")
    for f in files(tmp_path/"a"): assert (tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes(), f


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_knows_the_word_and_leaves_nothing_behind(tmp_path, kind):
    write, read, name = WRITERS[kind]
    class Broken:
        shape, dtype, ndim = (20, 21, 22), np.dtype(np.int16), 3
        def __getitem__(self, key): raise OSError("disk gone")
    one, two = brain(), replace(brain(), data=voxels(seed=1))
    path = tmp_path/name
    with pytest.raises(OSError, match="disk gone"): write(replace(one, data=Broken()), path)
    assert not list(tmp_path.iterdir())
    assert write(one, path) == path
    with pytest.raises(OutputExists): write(two, path)
    assert write(two, path, "skip") == path
    with pytest.raises(OSError, match="disk gone"): write(replace(one, data=Broken()), path, "overwrite")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert_array_equal(read(path).data[...], one.data)
    write(two, path, "overwrite")
    assert_array_equal(read(path).data[...], two.data)
    with pytest.raises(ValueError, match="on_exists"): write(two, path, "replace")
    with pytest.raises(MissingFile): write(two, tmp_path/"no"/name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


# ---- other people's layouts

def foreign(path, data, attrs=None, group_attrs=None, name="raw", version=3, **options):
    group = zarr.create_group(str(path), zarr_format=version, attributes=group_attrs or {}, overwrite=True)
    array = group.create_array(name, shape=data.shape, dtype=data.dtype, chunks=options.pop("chunks", data.shape),
                               attributes=attrs or {}, **options)
    array[...] = data
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("attrs, spacing", [
    ({"spacing_mm": [3, 2, 1]}, (3, 2, 1)), ({"voxel_size_um": [3, 2, 1]}, (.003, .002, .001)),
    ({"voxel_size_nm": [50, 4.6, 4.6]}, (50e-6, 4.6e-6, 4.6e-6)), ({"resolution_nm": [3, 2, 1]}, (3e-6, 2e-6, 1e-6)),
    ({"element_size_um": [3, 2, 1]}, (.003, .002, .001)), ({"resolution": [3, 2, 1]}, None), ({}, None)])
def test_voxel_sizes_are_read_with_their_unit_or_not_guessed(tmp_path, version, attrs, spacing):
    for on_group in (False, True):
        where = {"group_attrs": attrs} if on_group else {"attrs": attrs}
        path = foreign(tmp_path/"a.zarr", voxels(), version=version, **where)
        for asked in (path, f"{path}/raw", f"{path}::raw"):
            vol = open_zarr(asked)
            assert vol.axes == "zyx"
            assert_allclose(vol.spacing, spacing or (1, 1, 1), rtol=1e-12)
            assert bool(vol.meta["notes"]) is (spacing is None)


@pytest.mark.parametrize("attrs, axes", [({"axes": "xyz"}, "xyz"), ({"axes": ["Z", "Y", "X"]}, "zyx"),
                                         ({"_ARRAY_DIMENSIONS": ["x", "z", "y"]}, "xzy"), ({}, "zyx"),
                                         ({"_ARRAY_DIMENSIONS": ["dim_0", "dim_1", "dim_2"]}, "zyx"),
                                         ({"axes": 7}, "zyx"), ({"axes": None}, "zyx"),
                                         ({"axes": ["depth", "row", "col"]}, "zyx")])
def test_axes_are_read_where_they_are_said(tmp_path, attrs, axes):
    vol = open_zarr(foreign(tmp_path/"a.zarr", voxels(), attrs | {"spacing_mm": [3, 2, 1]}))
    assert vol.axes == axes
    assert_allclose(vol.spacing, (3, 2, 1))


@pytest.mark.parametrize("dims, attrs, axes", [
    (["x", "y", "z"], {}, "xyz"), (["z", "y", "x"], {"axes": "xyz"}, "xyz"), ([None, "y", "x"], {}, "zyx"),
    (["depth", "row", "col"], {}, "zyx")])
def test_names_of_dimensions_are_read(tmp_path, dims, attrs, axes):
    "Version 3 of zarr keeps them beside the attributes; our own `axes` count more"
    group = zarr.create_group(str(tmp_path/"a.zarr"))
    group.create_array("raw", shape=(4, 5, 6), dtype="u1", dimension_names=dims,
                       attributes=attrs | {"spacing_mm": [3, 2, 1]})
    vol = open_zarr(tmp_path/"a.zarr")
    assert vol.axes == axes
    assert_allclose(vol.spacing, (3, 2, 1))


def test_a_level_of_one_array_is_refused(tmp_path):
    path = foreign(tmp_path/"a.zarr", voxels())
    assert open_zarr(path, level=0).shape == voxels().shape
    with pytest.raises(DataError, match="level 1 was asked for, but it is one array"): open_zarr(path, level=1)


@pytest.mark.parametrize("axes", ["abc", "tyx", "xxz", ["t", "y", "x"], "xyc"])
def test_axes_that_are_no_space_are_refused(tmp_path, axes):
    for attrs in ({"axes": axes}, {"axes": axes, "spacing_mm": [1, 1, 1]}):
        with pytest.raises(MedvolError): open_zarr(foreign(tmp_path/"a.zarr", voxels(), attrs))
    with pytest.raises(MedvolError): open_zarr(foreign(tmp_path/"b.zarr", voxels((2, 3, 4, 5)), {"axes": "zyxc"}))


def test_groups_without_one_answer_ask_back(tmp_path):
    group = zarr.create_group(str(tmp_path/"a.zarr"))
    with pytest.raises(DataError, match="0 arrays"): open_zarr(tmp_path/"a.zarr")
    for name in ("raw", "label"): group.create_array(name, shape=(4, 4, 4), dtype="u1")
    with pytest.raises(DataError, match="2 arrays.*label, raw.*Name one"): open_zarr(tmp_path/"a.zarr")
    assert open_zarr(tmp_path/"a.zarr"/"raw").shape == open_zarr(f"{tmp_path}/a.zarr::label").shape == (4, 4, 4)
    for bad in ("none", "raw/none", "../a.zarr/raw", "raw/../raw", "..", "."):
        with pytest.raises((MissingFile, FormatError, DataError)): open_zarr(f"{tmp_path}/a.zarr::{bad}")
    group.create_array("flat", shape=(4, 4), dtype="u1")
    with pytest.raises(DataError, match="2 dimensions"): open_zarr(tmp_path/"a.zarr"/"flat")
    (tmp_path/"file.zarr").write_text("no")
    with pytest.raises(FormatError): open_zarr(tmp_path/"file.zarr")
    (tmp_path/"empty.zarr").mkdir()
    for missing in ("empty.zarr", "none.zarr"):
        with pytest.raises((MissingFile, FormatError)): open_zarr(tmp_path/missing)


def multiscale(tmp_path, change, version="0.4", shape=(1, 1, 8, 9, 10)):
    "An OME-Zarr image with time and channel, as others write it, after `change` of its metadata"
    axes = [{"name": "t", "type": "time", "unit": "second"}, {"name": "c", "type": "channel"}]
    image = {"version": "0.4", "axes": axes + [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"],
             "datasets": [{"path": "s0/image", "coordinateTransformations": [
                 {"type": "scale", "scale": [1, 1, 3, 2, 1]},
                 {"type": "translation", "translation": [0, 0, 30, 20, 10]}]}]}
    image = image if change is None else change(image)
    three = version == "0.5"
    attrs = {"ome": {"version": "0.5", "multiscales": [image]}} if three else {"multiscales": [image]}
    if isinstance(image, dict) and "whole" in image: attrs = image["whole"]
    path = tmp_path/"a.ome.zarr"
    foreign(path, voxels(shape), group_attrs=attrs, name="s0/image", version=3 if three else 2)
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_five_dimensional_ome_zarr_of_others(tmp_path, version):
    vol = open_zarr(multiscale(tmp_path, None, version))
    assert vol.axes == "zyx" and vol.shape == (8, 9, 10)
    assert_allclose(vol.spacing, (.003, .002, .001))
    assert_allclose(to_world(vol.affine, (0, 0, 0)), (.01, .02, .03))
    vol = open_zarr(multiscale(tmp_path, None, version, (1, 3, 8, 9, 10)))
    assert vol.axes == "czyx" and vol.channels == 3
    path = multiscale(tmp_path, None, version, (2, 1, 8, 9, 10))
    with pytest.raises(DataError, match="2 time points"): open_zarr(path)


def test_global_transformations_come_after_those_of_the_level(tmp_path):
    def change(image):
        return image | {"coordinateTransformations": [{"type": "scale", "scale": [1, 1, 2, 2, 2]},
                                                      {"type": "translation", "translation": [0, 0, 1, 1, 1]}]}
    vol = open_zarr(multiscale(tmp_path, change))
    assert_allclose(vol.spacing, (.006, .004, .002))
    assert_allclose(to_world(vol.affine, (0, 0, 0)), (.021, .041, .061))


def test_units_nobody_knows_are_refused_and_missing_ones_noted(tmp_path):
    def unit(u): return lambda i: i | {"axes": i["axes"][:2] + [{k: v for k, v in
                                       (("name", a), ("type", "space"), ("unit", u)) if v} for a in "zyx"]}
    with pytest.raises(FormatError, match="unit 'furlong'"): open_zarr(multiscale(tmp_path, unit("furlong")))
    vol = open_zarr(multiscale(tmp_path, unit(None)))
    assert "W207" in dict(vol.meta["notes"]) and vol.spacing == (3, 2, 1)
    for name, mm in (("angstrom", 1e-7), ("nanometer", 1e-6), ("meter", 1e3), ("millimeter", 1), ("Micrometer", 1e-3)):
        assert_allclose(open_zarr(multiscale(tmp_path, unit(name))).spacing, np.array((3, 2, 1))*mm)


def transforms(*t): return lambda i: i | {"datasets": [{"path": "s0/image", "coordinateTransformations": list(t)}]}
def scale(*s): return transforms({"type": "scale", "scale": list(s)})
def path_is(p): return lambda i: i | {"datasets": [i["datasets"][0] | {"path": p}]}


@pytest.mark.parametrize("change", [
    scale(1, 1, float("nan"), 2, 1), scale(1, 1, float("inf"), 2, 1), scale(1, 1, 0, 2, 1), scale(1, 1, -3, 2, 1),
    scale(3, 2, 1), scale(*[1]*6), scale(), scale(1, 1, "three", 2, 1), scale(1, 1, None, 2, 1), scale(1, 1, [3], 2, 1),
    transforms({"type": "scale", "scale": [[1, 1, 3, 2, 1]]}), transforms({"type": "scale", "scale": {"z": 1}}),
    transforms({"type": "scale"}), transforms({"type": "rotation", "angle": 3}), transforms("scale"), transforms(7),
    transforms({"type": "translation", "translation": [0, 0, float("nan"), 0, 0]}), transforms({"scale": [1]*5}),
    lambda i: i | {"datasets": [{"path": "s0/image", "coordinateTransformations": 7}]},
    lambda i: i | {"datasets": []}, lambda i: i | {"datasets": {"path": "0"}}, lambda i: i | {"datasets": ["0"]},
    lambda i: {k: v for k, v in i.items() if k != "datasets"}, lambda i: i | {"datasets": None},
    lambda i: i | {"axes": 7}, lambda i: i | {"axes": [1, 2, 3, 4, 5]}, lambda i: i | {"axes": ["t", "c", "z", "y"]},
    lambda i: i | {"axes": ["t", "c", "a", "b", "d"]}, lambda i: i | {"axes": ["x"]*5}, lambda i: i | {"axes": [{}]*5},
    lambda i: i | {"axes": ["t", "c", "x", "x", "z"]},
    lambda i: i | {"coordinateTransformations": [{"type": "scale", "scale": [1, 2]}]},
    path_is("../../etc"), path_is("s0/../../x"), path_is("/etc/passwd"), path_is("none"), path_is(7), path_is(None),
    path_is(""), path_is("s0"), path_is("."), path_is("..\\..\\x"), path_is("s0/image\0"), path_is("s0//image/.."),
    lambda i: "image", lambda i: ["image"], lambda i: 7, lambda i: None, lambda i: {"whole": {"multiscales": 7}},
    lambda i: {"whole": {"multiscales": {"0": i}}}, lambda i: {"whole": {"ome": 7}}, lambda i: {"whole": {"ome": None}},
    lambda i: {"whole": {"ome": {"multiscales": "x"}}}, lambda i: {"whole": {"ome": [1]}}])
def test_metadata_attacks_on_ome_are_refused_with_the_path(tmp_path, change):
    with pytest.raises((FormatError, DataError), match="a.ome.zarr"): open_zarr(multiscale(tmp_path, change))


@pytest.mark.parametrize("change, word", [
    ({"shape": [10**6]*3, "chunks": [10**5]*3}, "chunk"), ({"shape": [-1, 4, 4]}, None), ({"shape": "big"}, None),
    ({"chunks": [0, 4, 4]}, None), ({"chunks": [-4, 4, 4]}, None), ({"chunks": [4, 4]}, None), ({"dtype": "|O"}, None),
    ({"dtype": "<U9"}, None), ({"dtype": "<c8"}, None), ({"dtype": "<M8[s]"}, None), ({"dtype": [["a", "<i2"]]}, None),
    ({"dtype": "nonsense"}, None), ({"compressor": {"id": "no_such_codec"}}, None), ({"compressor": "zip"}, None),
    ({"filters": [{"id": "pickle"}]}, None), ({"order": "Q"}, None), ({"zarr_format": 9}, None),
    ({"shape": [4, 4]}, None),
    ({"shape": [2]*6, "chunks": [2]*6}, None)])
def test_metadata_attacks_on_arrays_of_version_2(tmp_path, change, word):
    path = foreign(tmp_path/"a.zarr", voxels((4, 4, 4)), version=2)
    file = path/"raw"/".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for asked in (path, path/"raw"):
        with pytest.raises(MedvolError, match=word): read_volume(asked)


@pytest.mark.parametrize("change", [
    {"shape": [10**6]*3, "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**5]*3}}},
    {"shape": [-1, 4, 4]}, {"data_type": "object"}, {"data_type": "string"}, {"data_type": "complex64"},
    {"data_type": {"name": "evil"}}, {"codecs": [{"name": "no_such"}]}, {"codecs": []}, {"codecs": "x"},
    {"zarr_format": 9},
    {"chunk_grid": {"name": "irregular"}}, {"chunk_grid": 7}, {"node_type": "thing"}, {"attributes": 7},
    {"shape": [4, 4]}, {"codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": -10**9}}]}])
def test_metadata_attacks_on_arrays_of_version_3(tmp_path, change):
    path = foreign(tmp_path/"a.zarr", voxels((4, 4, 4)))
    file = path/"raw"/"zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for asked in (path, path/"raw"):
        try: vol = read_volume(asked)
        except MedvolError: continue
        assert_array_equal(vol.data, voxels((4, 4, 4))) # the change was of no consequence


@pytest.mark.parametrize("attrs", [
    {"affine": [1]*15}, {"affine": [0]*16}, {"affine": "eye"}, {"affine": [float("nan")]*16}, {"affine": None},
    {"affine": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}, {"affine": np.diag([1, 1, 1, 2]).tolist()}, {"spacing_mm": [1, 2]},
    {"spacing_mm": [0, 1, 1]}, {"spacing_mm": [1, -1, 1]}, {"spacing_mm": "x"}, {"spacing_mm": [1, None, 1]},
    {"spacing_mm": [float("nan"), 1, 1]}, {"voxel_size_nm": {"z": 1}}])
def test_places_in_attributes_are_as_strict_as_headers(tmp_path, attrs):
    with pytest.raises((FormatError, DataError), match="a.zarr"): open_zarr(foreign(tmp_path/"a.zarr", voxels(), attrs))


@pytest.mark.parametrize("file", ["zarr.json", "raw/zarr.json"])
def test_metadata_that_is_no_metadata(tmp_path, file):
    path = foreign(tmp_path/"a.zarr", voxels((4, 4, 4)))
    good = (path/file).read_bytes()
    for bad in (b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"zarr_format": 3}', b"["*100_000, good[:len(good)//2]):
        (path/file).write_bytes(bad)
        for asked in (path, path/"raw"):
            try: vol = read_volume(asked)
            except MedvolError: continue
            assert file == "zarr.json" # the array knows enough by itself
            assert_array_equal(vol.data, voxels((4, 4, 4)))


def test_huge_arrays_with_small_chunks_open_lazily_but_are_not_loaded(tmp_path):
    group = zarr.create_group(str(tmp_path/"a.zarr"))
    group.create_array("raw", shape=(10**6,)*3, dtype="u2", chunks=(64,)*3, attributes={"spacing_mm": [1, 1, 1]})
    assert read_volume(tmp_path/"a.zarr", lazy=True).data[5:6, 5:6, 5:6].shape == (1, 1, 1)
    with pytest.raises(DataError, match="budget"): read_volume(tmp_path/"a.zarr")


# ---- damage

def flips(raw, n, seed, where=None):
    for k in range(n):
        bad, at = bytearray(raw), int(rng_for(seed, "flip", k).integers(0, 8*len(raw)))
        bad[at//8] ^= 1 << at % 8
        yield bytes(bad)


@pytest.mark.parametrize("version, shards", [(2, None), (3, None), (3, (32, 32, 32))])
def test_flips_in_chunks_are_never_silent(tmp_path, version, shards):
    vol = brain()
    path = write_zarr(vol, tmp_path/"a.zarr", version=version, chunks=16, shards=shards)
    names = [f for f in files(path) if (path/f).stat().st_size > 50 and "/.z" not in f"/{f}" and "zarr.json" not in f]
    for k in range(100):
        file = path/names[k % len(names)]
        good = file.read_bytes()
        file.write_bytes(next(flips(good, 1, k)))
        try: same = np.array_equal(read_volume(path).data, vol.data)
        except MedvolError: same = True # noticed
        file.write_bytes(good)
        assert same, names[k % len(names)]
    assert_array_equal(read_volume(path).data, vol.data)


def test_truncated_chunks_are_errors(tmp_path):
    for version in (2, 3):
        path = write_zarr(brain(), tmp_path/f"{version}.zarr", version=version, chunks=16)
        file = path/next(f for f in files(path) if (path/f).stat().st_size > 1000)
        good = file.read_bytes()
        for n in (0, 1, 3, 4, 50, len(good)//2, len(good) - 1):
            file.write_bytes(good[:n])
            with pytest.raises(FormatError, match="damaged"): read_volume(path)


def outcomes(path, good, want, read, n):
    count = {"noticed": 0, "harmless": 0}
    for bad in flips(good, n, 0):
        path.write_bytes(bad)
        try: got = read(path)
        except MedvolError: count["noticed"] += 1
        else:
            assert np.array_equal(got.data, want.data) and got.axes == want.axes and got.dtype == want.dtype
            assert np.array_equal(got.affine, want.affine)
            count["harmless"] += 1
    return count


def test_flips_in_hdf5_are_never_silent(tmp_path):
    vol = brain(affine=TURNED)
    path = write_hdf5(vol, tmp_path/"a.h5", chunks=16)
    count = outcomes(path, path.read_bytes(), vol, open_hdf5, 300)
    assert count["noticed"] > 200
    small = Volume(voxels((3, 4, 5)), TURNED, "zyx") # hardly any voxels: nearly all bytes are metadata
    path = write_hdf5(small, tmp_path/"b.h5")
    outcomes(path, path.read_bytes(), small, open_hdf5, 600)


def test_flips_in_npz_are_never_silent(tmp_path):
    for vol in (brain(affine=TURNED), Volume(voxels((3, 4, 5)), TURNED, "zyx")):
        path = write_numpy(vol, tmp_path/"a.npz", "overwrite")
        count = outcomes(path, path.read_bytes(), vol, read_numpy, 200)
        assert count["noticed"] > 100


@pytest.mark.parametrize("kind", ["hdf5", "npz", "npy"])
def test_truncated_files_are_errors(tmp_path, kind):
    write, read, name = WRITERS[kind]
    path = write(brain(), tmp_path/name)
    good = path.read_bytes()
    for k in range(60):
        path.write_bytes(good[:int(rng_for(k, "cut").integers(0, len(good)))])
        with pytest.raises(FormatError, match=name): read(path)


@pytest.mark.parametrize("kind", ["hdf5", "npz", "npy"])
def test_things_that_are_not_what_they_are_called(tmp_path, kind):
    _, read, name = WRITERS[kind]
    for content in (b"", b"<html>404"*99, bytes(9999), b"PK\x03\x04" + bytes(99), b"\x93NUMPY\x01\x00\xff\xff"):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(FormatError, match=name): read(tmp_path/name)
    with pytest.raises(MissingFile): read(tmp_path/f"no_{name}")
    (tmp_path/f"dir_{name}").mkdir()
    with pytest.raises(MedvolError): read(tmp_path/f"dir_{name}")


def test_numpy_files_of_others(tmp_path):
    np.savez(tmp_path/"a.npz", image=voxels())
    with pytest.raises(FormatError, match="no entry 'data'.*image"): read_numpy(tmp_path/"a.npz")
    for data, word in ((np.zeros((3, 3)), "2 dimensions"), (np.zeros((2, 2, 2), complex), "complex"),
                       (np.zeros((2, 2, 2), "U3"), "real numbers"), (np.zeros(()), "dimensions")):
        np.save(tmp_path/"a.npy", data)
        with pytest.raises(DataError, match=word): read_numpy(tmp_path/"a.npy")
    np.savez(tmp_path/"a.npz", data=np.array([{}], object))
    with pytest.raises(FormatError): read_numpy(tmp_path/"a.npz")
    for extra in ({"affine": np.zeros((4, 4))}, {"affine": np.eye(3)}, {"affine": np.full((4, 4), np.nan)},
                  {"axes": "abc"}, {"affine": np.array("x")}):
        np.savez(tmp_path/"a.npz", data=voxels(), **extra)
        with pytest.raises((FormatError, DataError)): read_numpy(tmp_path/"a.npz")
    np.save(tmp_path/"a.npy", voxels((2, 3, 4, 5), ">i4"))
    assert read_numpy(tmp_path/"a.npy").axes == "cxyz"


def test_a_numpy_header_that_promises_terabytes(tmp_path):
    np.save(tmp_path/"a.npy", voxels((4, 4, 4)))
    raw = (tmp_path/"a.npy").read_bytes()
    (tmp_path/"a.npy").write_bytes(raw.replace(b"(4, 4, 4), }              ", b"(40000, 40000, 40000), }  "))
    with pytest.raises(MedvolError): read_numpy(tmp_path/"a.npy")


def test_hdf5_of_others(tmp_path):
    path = tmp_path/"a.h5"
    with h5py.File(path, "w") as f:
        f["volumes/raw"] = voxels()
        f["volumes/raw"].attrs["element_size_um"] = [.235, .15, .15]
        f["table"] = np.arange(9)
    vol = open_hdf5(path)
    assert vol.axes == "zyx"
    assert_allclose(vol.spacing, (.235e-3, .15e-3, .15e-3))
    with h5py.File(path, "a") as f: f["label"] = voxels(dtype="u1")
    with pytest.raises(DataError, match="2 volumes.*label, volumes/raw"): open_hdf5(path)
    assert open_hdf5(f"{path}::label").dtype == np.uint8
    for bad in ("none", "table", "volumes", "../x"):
        with pytest.raises(MissingFile): open_hdf5(f"{path}::{bad}")


@pytest.mark.parametrize("attrs", [{"affine": np.zeros(16)}, {"affine": "x"}, {"affine": np.full(16, np.nan)},
                                   {"axes": "abc"}, {"axes": "xxz"}, {"spacing_mm": [1., 0, 1]},
                                   {"spacing_mm": [1., 2]}])
def test_hdf5_attributes_are_checked(tmp_path, attrs):
    with h5py.File(tmp_path/"a.h5", "w") as f:
        f["raw"] = voxels()
        for k, v in attrs.items(): f["raw"].attrs[k] = v
    with pytest.raises((FormatError, DataError), match="a.h5"): open_hdf5(tmp_path/"a.h5")


def test_hdf5_traps(tmp_path):
    path = tmp_path/"a.h5"
    with h5py.File(path, "w") as f: f.create_dataset("raw", (10**6,)*3, "u2", chunks=(64,)*3)
    with pytest.raises(DataError, match="budget"): open_hdf5(path)
    for dtype in (h5py.string_dtype(), np.dtype([("a", "i2")]), np.complex64):
        with h5py.File(path, "w") as f: f.create_dataset("raw", (2, 2, 2), dtype)
        with pytest.raises(DataError, match="real numbers"): open_hdf5(path)
    with h5py.File(tmp_path/"other.h5", "w") as f: f["raw"] = voxels()
    with h5py.File(path, "w") as f: f["link"] = h5py.ExternalLink("other.h5", "raw")
    with pytest.raises((DataError, MissingFile)): open_hdf5(path)
    with pytest.raises((DataError, MissingFile)): open_hdf5(f"{path}::link")
    with h5py.File(path, "w") as f: f["empty"] = h5py.Empty("f4")
    with pytest.raises((DataError, MissingFile)): open_hdf5(path)


# ---- one array at a time

def test_created_arrays_are_checksummed_in_both_versions(tmp_path):
    for version in (2, 3):
        group = zarr.create_group(str(tmp_path/f"{version}.zarr"), zarr_format=version)
        array = create_array(group, "a", (8, 8, 8), "f4", (4, 4, 4), attributes={"unit": "HU"})
        array[...] = 3
        meta = json.dumps(group["a"].metadata.to_dict(), default=str)
        assert ("crc32c" in meta) if version == 3 else ('"checksum": true' in meta)
        assert group["a"].attrs["unit"] == "HU" and (group["a"][...] == 3).all()


def test_slices_read_only_the_blocks_they_touch(tmp_path):
    path = write_zarr(Volume(voxels((64, 64, 64)), np.eye(4)), tmp_path/"a.zarr", chunks=32)
    keep = {f for f in files(path) if f.endswith(("zarr.json", "c/0/0/0"))}
    for f in files(path):
        if f not in keep: (path/f).write_bytes(b"damaged")
    vol = open_zarr(path)
    assert_array_equal(vol.data[:32, :32, :32], voxels((64, 64, 64))[:32, :32, :32])
    with pytest.raises(ValueError): vol.data[:33, 0, 0]


# ---- the real ones

def test_the_multi_task_stores(data_dir):
    root = data_dir/"zarr_multitask"
    with pytest.raises(DataError, match="5 arrays"): open_zarr(root/"vnc_a.zarr")
    for name in ("raw", "labels", "membranes", "mitochondria", "synapses"):
        vol = open_zarr(root/"vnc_a.zarr"/name)
        assert vol.axes == "zyx" and vol.shape == (20, 512, 512) and vol.dtype == np.uint8 and vol.data.chunks[0] == 20
        assert_allclose(vol.spacing, (50e-6, 4.6e-6, 4.6e-6))
        assert_array_equal(vol.load().data, zarr.open(str(root/"vnc_a.zarr"), mode="r")[name][...])
    for store, size, shape in (("ovule", (.235e-3, .15e-3, .15e-3), (32, 128, 128)),
                               ("nuclei_1135", (.28371836501901143e-3, *(.12678642066720086e-3,)*2), (100,)*3)):
        for name in ("raw", "label"):
            vol = read_volume(root/f"{store}.zarr"/name)
            assert vol.shape == shape and vol.axes == "zyx" and vol.meta["notes"] == ()
            assert_allclose(vol.spacing, size)
            assert_array_equal(vol.data, zarr.open(str(root/f"{store}.zarr"), mode="r")[name][...])


def test_a_pyramid_nobody_here_wrote(data_dir):
    path = data_dir/"zarr_multitask"/"mni152_axial.ome.zarr"
    levels = [open_zarr(path, level=k) for k in range(4)]
    assert [v.shape[0] for v in levels] == [207, 103, 51, 25] and all(v.axes == "xyz" for v in levels)
    assert "W207" in dict(levels[0].meta["notes"]) # it names no unit
    assert_allclose(to_world(levels[0].affine, (0, 0, 0)), (-75.76253509521484, -110.76253509521484, 7.146018385887146))
    assert levels[0].load().data.mean() == pytest.approx(levels[2].load().data.mean(), rel=.05)
    outer = [to_world(v.affine, (-.5, -.5, 0)) for v in levels]
    for o in outer[1:]: assert_allclose(o, outer[0], atol=1e-6)


def test_a_copy_of_a_real_store_with_a_lost_metadata_file(data_dir, tmp_path):
    shutil.copytree(data_dir/"zarr_multitask"/"ovule.zarr", tmp_path/"o.zarr")
    (tmp_path/"o.zarr"/"label"/"zarr.json").unlink()
    with pytest.raises(MissingFile): open_zarr(tmp_path/"o.zarr"/"label")
