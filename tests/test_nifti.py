"NIfTI files: both ways against nibabel, and whatever can happen to the bytes"
import gzip
import struct
import zlib
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation

from medvol_nb.core import DataError, FormatError, MissingFile, OutputExists, rng_for
from medvol_nb.geometry import Volume, affine_from, to_world
from medvol_nb.nifti import DTYPES, header_notes, parse_nifti_header, read_nifti, read_nifti_header, write_nifti

TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]
PLACE = np.eye(4)
PLACE[:3, :3] = Rotation.from_euler("xyz", (10, -20, 30), degrees=True).as_matrix()*(-1.5, 2, 3.25)
PLACE[:3, 3] = -40, 12, 7


def voxels(shape, dtype, seed=0):
    rng, kind = rng_for(seed, "voxels", str(dtype)), np.dtype(dtype)
    if kind.kind == "f": return rng.normal(0, 1000, shape).astype(kind)
    info = np.iinfo(kind)
    return rng.integers(info.min, info.max, shape, dtype=kind.newbyteorder("="), endpoint=True).astype(kind)


def save(path, data, affine=PLACE, kind=nib.Nifti1Image, order="<", codes=None, slope=None):
    "Write with nibabel; (q-form code, s-form code) and (slope, intercept) go into the bytes, nibabel would adapt them"
    header = kind.header_class(endianness=order)
    header.set_data_dtype(data.dtype)
    img = kind(data, affine, header, dtype=data.dtype)
    if codes is not None: img.set_qform(affine)
    raw = bytearray(img.to_bytes())
    one = kind is nib.Nifti1Image
    if codes is not None: struct.pack_into(order + ("2h" if one else "2i"), raw, 252 if one else 344, *codes)
    if slope is not None: struct.pack_into(order + ("2f" if one else "2d"), raw, 112 if one else 176, *slope)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def agree(path, atol=1e-5, rtol=0):
    "Our reader and nibabel's see the same"
    ours, theirs = read_nifti(path), nib.load(path)
    want = np.asarray(theirs.dataobj)
    want = want.reshape((want.shape + (1, 1))[:3] + tuple(n for n in want.shape[3:] if n != 1))
    got = np.moveaxis(ours.data, 0, -1) if ours.channels else ours.data
    if rtol: assert_allclose(got, want, rtol=rtol)
    else: assert_array_equal(got, want)
    assert_allclose(ours.affine, theirs.affine, atol=atol)
    return ours, theirs


# ---- reading what nibabel wrote

@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_reads_every_number_type_and_byte_order(tmp_path, dtype, order, suffix):
    data = voxels((5, 6, 7), order + dtype)
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        ours, _ = agree(save(tmp_path/f"a.{suffix}", data, kind=kind, order=order))
        assert ours.dtype == np.dtype(dtype) and ours.dtype.isnative and ours.axes == "xyz"
        head = read_nifti_header(tmp_path/f"a.{suffix}")
        assert head.version == (1 if kind is nib.Nifti1Image else 2) and head.dtype == np.dtype(order + dtype)


@pytest.mark.parametrize("shape, axes", [
    ((4, 5), "xyz"), ((7,), "xyz"), ((4, 5, 6), "xyz"), ((4, 5, 6, 3), "cxyz"), ((4, 5, 6, 1), "xyz"),
    ((4, 5, 6, 1, 3), "cxyz"), ((4, 5, 6, 1, 1, 1, 1), "xyz"), ((4, 5, 1), "xyz"), ((1, 1, 1), "xyz"),
    ((4, 5, 1, 1, 2), "cxyz"), ((1, 5, 6, 2), "cxyz")])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_reads_two_to_seven_dimensions(tmp_path, shape, axes, kind):
    ours, _ = agree(save(tmp_path/"a.nii.gz", voxels(shape, "i2"), kind=kind))
    assert ours.axes == axes and ours.shape == (shape + (1, 1))[:3]
    assert ours.channels == (next(n for n in shape[3:] if n > 1) if axes[0] == "c" else None)


def test_a_file_with_time_and_channels_is_refused(tmp_path):
    save(tmp_path/"a.nii", np.zeros((2, 2, 2, 3, 4), np.uint8))
    with pytest.raises(FormatError, match="more than one axis besides x, y, z"): read_nifti(tmp_path/"a.nii")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("slope, inter", [(2, 0), (1, -1024), (.5, 3.25), (-1e-3, 7)])
def test_scaling_is_applied(tmp_path, dtype, slope, inter):
    # stored numbers stay small: float32 holds 24 bits
    data = (rng_for(0, "scaling").integers(0, 120, (4, 5, 6))).astype(dtype)
    ours, _ = agree(save(tmp_path/"a.nii.gz", data, slope=(slope, inter)), rtol=2e-6)
    assert ours.dtype == np.float32


@pytest.mark.parametrize("slope, inter", [(0, 5), (np.nan, np.nan), (1, 0), (np.inf, 0), (np.nan, 3)])
def test_no_scaling_keeps_the_stored_type(tmp_path, slope, inter):
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        path = save(tmp_path/"a.nii", voxels((3, 4, 5), "i2"), kind=kind, slope=(slope, inter))
        assert agree(path)[0].dtype == np.int16


def test_a_slope_with_a_broken_intercept_is_refused(tmp_path):
    for inter in (np.nan, np.inf):
        path = save(tmp_path/"a.nii", voxels((3, 4, 5), "i2"), slope=(2, inter))
        with pytest.raises(FormatError, match="scl_inter is"): read_nifti(path)


# ---- places

@pytest.mark.parametrize("seed", range(20))
def test_a_qform_alone_is_nibabels(tmp_path, seed):
    rng = rng_for(seed, "qform")
    affine = np.eye(4)
    turn = Rotation.from_quat(rng.normal(size=4)).as_matrix()
    if seed < 6: turn = np.diag([(1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, -1), (-1, 1, 1), (1, 1, -1)][seed])
    affine[:3, :3] = turn*rng.uniform(.5, 4, 3)
    if seed % 2: affine[:3, 0] *= -1
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        path = save(tmp_path/"q.nii", voxels((9, 8, 7), "i2"), affine, kind, codes=(1, 0))
        # three float32 numbers give an angle to about 5e-4 near half turns; 9 voxels of 4 mm
        ours, theirs = agree(path, atol=4e-3)
        assert read_nifti_header(path).sform_code == 0
        assert_allclose(ours.affine, affine, atol=4e-3)


def test_an_sform_alone_wins_and_may_be_sheared(tmp_path):
    sheared = PLACE.copy()
    sheared[:3, 1] += .3*PLACE[:3, 0]
    path = save(tmp_path/"s.nii", voxels((4, 5, 6), "i2"), sheared, codes=(0, 2))
    ours, _ = agree(path)
    assert_allclose(ours.affine, sheared, atol=1e-5)
    assert "W206" in dict(ours.meta["notes"])


def test_no_form_at_all_gives_nibabels_centred_grid(tmp_path):
    for shape, sizes in (((4, 5, 6), (2, 3, 4)), ((4, 5, 6, 2), (2, 3, 4)), ((4, 5), (2, 3, 1))):
        path = save(tmp_path/"n.nii", voxels(shape, "i2"), np.diag([*sizes, 1.]), codes=(0, 0))
        ours, _ = agree(path)
        assert "W207" in dict(ours.meta["notes"])
        if len(shape) > 2: assert_allclose(to_world(ours.affine, (np.array(ours.shape) - 1)/2), 0, atol=1e-9)


def test_q_and_s_form_that_disagree_are_reported(tmp_path):
    img = nib.Nifti1Image(voxels((4, 5, 6), "i2"), PLACE)
    moved = PLACE.copy()
    moved[0, 3] += 5
    img.header.set_qform(moved, 1)
    nib.save(img, tmp_path/"a.nii")
    ours, _ = agree(tmp_path/"a.nii")
    assert "5 mm" in dict(ours.meta["notes"])["W205"]
    assert "W205" not in dict(read_nifti(save(tmp_path/"b.nii", voxels((4, 5, 6), "i2"))).meta["notes"])


@pytest.mark.parametrize("unit, factor, noted", [("meter", 1000, False), ("mm", 1, False), ("micron", .001, False),
                                                 ("unknown", 1, True), ("reserved", 1, True)])
@pytest.mark.parametrize("form", ["sform", "qform", "none"])
def test_length_units_become_millimetres(tmp_path, unit, factor, noted, form):
    codes = {"sform": (0, 1), "qform": (1, 0), "none": (0, 0)}[form]
    path = save(tmp_path/"a.nii", voxels((4, 5, 6), "i2"), codes=codes)
    raw = bytearray(path.read_bytes())
    raw[123] = {"meter": 1, "mm": 2, "micron": 3, "unknown": 0, "reserved": 5}[unit] + 8
    path.write_bytes(raw)
    ours = read_nifti(tmp_path/"a.nii")
    assert_allclose(ours.affine[:3], nib.load(tmp_path/"a.nii").affine[:3]*factor, atol=1e-4*factor)
    assert_allclose(ours.spacing, nib.affines.voxel_sizes(PLACE)*factor, rtol=1e-5)
    assert any("no length unit" in text for _, text in ours.meta["notes"]) is noted


def test_affines_that_are_none_are_errors(tmp_path):
    path = save(tmp_path/"a.nii", voxels((4, 5, 6), "i2"))
    raw = bytearray(path.read_bytes())
    for row in (np.zeros(12), np.full(12, np.nan), [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0], np.full(12, np.inf)):
        struct.pack_into("<12f", raw, 280, *row)
        path.write_bytes(raw)
        with pytest.raises(FormatError, match="affine"): read_nifti(path)


def test_notes_name_wasteful_types(tmp_path):
    for dtype, noted in (("i4", True), ("i8", True), ("u4", True), ("i2", False), ("u1", False), ("f4", False)):
        head = read_nifti_header(save(tmp_path/"a.nii", np.ones((3, 3, 3), dtype)))
        assert ("W209" in dict(header_notes(head))) is noted


# ---- what nibabel sees of what we wrote

@pytest.mark.parametrize("dtype", [*TYPES, ">i2", ">f8", "?", "f2"])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_nibabel_reads_what_we_write(tmp_path, dtype, suffix):
    for shape, axes in (((5, 6, 7), "xyz"), ((2, 5, 6, 7), "cxyz"), ((1, 1, 1), "xyz"), ((3, 1, 6, 1), "cxyz")):
        data = voxels(shape, dtype) if dtype not in ("?", "f2") else (voxels(shape, "u1") % 2).astype(dtype)
        path = write_nifti(Volume(data, PLACE, axes), tmp_path/f"a.{suffix}", "overwrite")
        ours, theirs = agree(path)
        assert_array_equal(ours.data, data)
        assert_allclose(theirs.affine, PLACE, atol=1e-5)
        assert_allclose(theirs.get_qform(), PLACE, atol=1e-4)
        assert theirs.header.get_xyzt_units()[0] == "mm" and theirs.header.get_slope_inter() in ((1, 0), (None, None))
        assert ours.axes == axes and ours.meta["notes"] == () or np.dtype(dtype).itemsize >= 4


def test_itk_reads_what_we_write(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    data = voxels((5, 6, 7), "i2")
    for suffix in ("nii", "nii.gz"):
        img = sitk.ReadImage(str(write_nifti(Volume(data, PLACE), tmp_path/f"a.{suffix}")))
        assert_array_equal(sitk.GetArrayFromImage(img).T, data)
        at = np.array(img.TransformIndexToPhysicalPoint((4, 5, 6)))*(-1, -1, 1)
        assert_allclose(at, to_world(PLACE, (4, 5, 6)), atol=1e-3)


def test_wide_integers_are_narrowed_only_when_nothing_is_lost(tmp_path):
    for dtype, top, stored in (("i8", 2**31 - 1, "i4"), ("i8", 2**31, "i8"), ("u8", 7, "i4"), ("u8", 2**63, "u8"),
                               ("i8", -2**31 - 1, "i8")):
        data = np.array([0, top], dtype).reshape(2, 1, 1)
        path = write_nifti(Volume(data, np.eye(4)), tmp_path/"a.nii", "overwrite")
        assert read_nifti(path).dtype == np.dtype(stored), (dtype, top)
        assert_array_equal(read_nifti(path).data, data)


def test_wide_big_endian_integers_are_narrowed_too(tmp_path):
    path = write_nifti(Volume(np.array([0, 5], ">i8").reshape(2, 1, 1), np.eye(4)), tmp_path/"a.nii")
    assert read_nifti(path).dtype == np.int32


def test_number_types_that_do_not_exist_in_nifti_are_refused(tmp_path):
    for dtype in ("c8", "c16", "O", "S3", "M8[s]"):
        with pytest.raises(DataError, match="cannot hold"):
            write_nifti(Volume(np.zeros((2, 2, 2), dtype), np.eye(4)), tmp_path/"a.nii")
    assert not list(tmp_path.iterdir())


def test_a_sheared_affine_has_no_qform(tmp_path):
    sheared = PLACE.copy()
    sheared[:3, 1] += .3*PLACE[:3, 0]
    path = write_nifti(Volume(voxels((3, 4, 5), "u1"), sheared), tmp_path/"a.nii")
    head = nib.load(path).header
    assert int(head["qform_code"]) == 0 and int(head["sform_code"]) == 1
    assert_allclose(nib.load(path).affine, sheared, atol=1e-5)


def test_long_axes_need_version_two(tmp_path):
    for n, version in ((2**15 - 1, 1), (2**15, 2)):
        data = voxels((n, 2, 1), "i2")
        path = write_nifti(Volume(data, PLACE), tmp_path/"a.nii.gz", "overwrite")
        assert read_nifti_header(path).version == version
        assert isinstance(nib.load(path), (nib.Nifti1Image, nib.Nifti2Image)[version - 1])
        assert_array_equal(agree(path)[0].data, data)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_equal_volumes_give_equal_bytes(tmp_path, suffix):
    data = voxels((30, 31, 32), "i2")
    paths = [write_nifti(Volume(d, PLACE), tmp_path/f"{k}.{suffix}") for k, d in enumerate(
        (data, np.asfortranarray(data), data.astype(">i2"), np.pad(data, 1)[1:-1, 1:-1, 1:-1]))]
    assert len({p.read_bytes() for p in paths}) == 1
    assert b"a.nii" not in paths[0].read_bytes()[:100] and (suffix == "nii" or paths[0].read_bytes()[4:8] == bytes(4))


def test_every_level_holds_the_same_voxels(tmp_path):
    data = (voxels((40, 41, 42), "u1")//64).astype(np.int16)
    for level in (0, 1, 6, 9):
        path = write_nifti(Volume(data, PLACE), tmp_path/f"{level}.nii.gz", level=level)
        assert_array_equal(agree(path)[0].data, data)
        assert zlib.decompress(path.read_bytes(), 31)[352:] == data.tobytes("F")
    for level in (-1, 10):
        with pytest.raises((DataError, ValueError)): write_nifti(Volume(data, PLACE), tmp_path/"x.nii.gz", level=level)
    assert not (tmp_path/"x.nii.gz").exists() and len(list(tmp_path.iterdir())) == 4


def test_the_writer_refuses_and_leaves_nothing(tmp_path):
    vol = Volume(voxels((3, 4, 5), "u1"), PLACE)
    with pytest.raises(DataError, match="end in .nii or .nii.gz"): write_nifti(vol, tmp_path/"a.hdr")
    with pytest.raises(DataError, match="to_axes"): write_nifti(replace(vol, axes="zyx"), tmp_path/"a.nii")
    with pytest.raises(MissingFile, match="mkdir"): write_nifti(vol, tmp_path/"no"/"a.nii")
    class Broken:
        shape, dtype = (3, 4, 5), np.dtype(np.uint8)
        def __getitem__(self, key): raise OSError("disk gone")
    write_nifti(vol, tmp_path/"a.nii.gz")
    before = (tmp_path/"a.nii.gz").read_bytes()
    for name in ("a.nii.gz", "b.nii.gz"):
        with pytest.raises(OSError, match="disk gone"): write_nifti(Volume(Broken(), PLACE), tmp_path/name, "overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"] and (tmp_path/"a.nii.gz").read_bytes() == before
    with pytest.raises(OutputExists): write_nifti(vol, tmp_path/"a.nii.gz")
    write_nifti(replace(vol, data=vol.data*0), tmp_path/"a.nii.gz", "skip")
    assert (tmp_path/"a.nii.gz").read_bytes() == before
    write_nifti(replace(vol, data=vol.data*0), tmp_path/"a.nii.gz", "overwrite")
    assert not read_nifti(tmp_path/"a.nii.gz").data.any()


def test_an_empty_volume_is_refused_not_written_unreadably(tmp_path):
    with pytest.raises(DataError): write_nifti(Volume(np.zeros((0, 3, 3)), np.eye(4)), tmp_path/"a.nii")
    assert not list(tmp_path.iterdir())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9))
def test_any_volume_survives_a_round_trip(tmp_path_factory, seed):
    rng = rng_for(seed, "trip")
    shape = tuple(rng.integers(1, 9, 3 + seed % 2))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_quat(rng.normal(size=4)).as_matrix()*rng.uniform(.01, 9, 3)*rng.choice([-1, 1], 3)
    affine[:3, 3] = rng.uniform(-500, 500, 3)
    data = voxels(shape, TYPES[seed % 10], seed)
    path = tmp_path_factory.mktemp("trip")/("a.nii", "a.nii.gz")[seed % 2]
    back = read_nifti(write_nifti(Volume(data, affine, "cxyz" if len(shape) == 4 else "xyz"), path))
    assert_array_equal(np.squeeze(back.data), np.squeeze(data))
    # float32 of up to 500 mm
    ends = np.array(back.shape) - 1
    assert_allclose(to_world(back.affine, ends), to_world(affine, ends), atol=2e-4)


# ---- gzip, as the world writes it

def members(data, *cuts):
    ends = [0, *cuts, len(data)]
    return [gzip.compress(data[a:b]) for a, b in zip(ends, ends[1:])]


@pytest.fixture
def scan(tmp_path):
    "Bytes of an uncompressed NIfTI file and its voxels"
    data = (voxels((20, 21, 22), "u1") % 7).astype(np.int16)
    return save(tmp_path/"scan.nii", data).read_bytes(), data


def test_several_gzip_members_are_one_stream(tmp_path, scan):
    raw, data = scan
    path = tmp_path/"a.nii.gz"
    for cuts in ((352,), (352, 353, 5000), (3000, 10000), (1000, 1000), (348,)):
        path.write_bytes(b"".join(members(raw, *cuts)))
        assert_array_equal(read_nifti(path).data, data)
        broken = members(raw, *cuts)
        bad = bytearray(broken[0])
        bad[-8] ^= 1
        path.write_bytes(b"".join([bytes(bad), *broken[1:]]))
        with pytest.raises(FormatError, match="damaged|CRC|check"): read_nifti(path)




def test_members_cut_inside_the_header(tmp_path, scan):
    raw, data = scan
    for cuts in ((100,), (0,), (10, 20, 30)):
        (tmp_path/"a.nii.gz").write_bytes(b"".join(members(raw, *cuts)))
        assert_array_equal(read_nifti(tmp_path/"a.nii.gz").data, data)


def test_names_comments_and_extra_fields_in_the_gzip_header(tmp_path, scan):
    raw, data = scan
    body = gzip.compress(raw, mtime=0)[10:]
    for flags, fields in ((8, b"scan.nii\0"), (16, b"comment\0"), (4, b"\x04\0AB\0\0"), (2, None)):
        head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(5) + b"\x03"
        fields = struct.pack("<H", zlib.crc32(head) & 0xffff) if fields is None else fields
        (tmp_path/"a.nii.gz").write_bytes(head + fields + body)
        assert_array_equal(read_nifti(tmp_path/"a.nii.gz").data, data)


def test_a_long_gzip_header(tmp_path, scan):
    raw, data = scan
    for flags, fields in ((4, struct.pack("<H", 5000) + bytes(5000)), (8, b"x"*5000 + b"\0")):
        head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(5) + b"\x03"
        (tmp_path/"a.nii.gz").write_bytes(head + fields + gzip.compress(raw, mtime=0)[10:])
        assert_array_equal(read_nifti(tmp_path/"a.nii.gz").data, data)


def test_zero_padding_is_fine_and_garbage_is_not(tmp_path, scan):
    raw, data = scan
    packed, path = gzip.compress(raw), tmp_path/"a.nii.gz"
    for padding in (1, 511, 2**18 + 3):
        path.write_bytes(packed + bytes(padding))
        assert_array_equal(read_nifti(path).data, data)
    for garbage in (b"x", b"\0\0x", b"\x1f", b"\x1f\x8b", packed[:50], bytes(2**18) + b"!", b"<html>"*99):
        path.write_bytes(packed + garbage)
        with pytest.raises(FormatError): read_nifti(path)


def test_bytes_after_the_voxels(tmp_path, scan):
    raw, data = scan
    for extra in (1, 1000):
        (tmp_path/"a.nii.gz").write_bytes(gzip.compress(raw + bytes(extra)))
        (tmp_path/"a.nii").write_bytes(raw + bytes(extra))
        for name in ("a.nii", "a.nii.gz"): assert_array_equal(read_nifti(tmp_path/name).data, data)
    (tmp_path/"a.nii.gz").write_bytes(gzip.compress(raw + bytes(2**17)))
    with pytest.raises(FormatError, match="more than"): read_nifti(tmp_path/"a.nii.gz")


def test_a_header_extension_is_skipped(tmp_path):
    img = nib.Nifti1Image(voxels((4, 5, 6), "i2"), PLACE)
    img.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"scanner notes "*200))
    for name in ("a.nii", "a.nii.gz"):
        nib.save(img, tmp_path/name)
        assert read_nifti_header(tmp_path/name).vox_offset > 2800
        agree(tmp_path/name)


def test_the_name_does_not_decide_whether_it_is_packed(tmp_path, scan):
    raw, data = scan
    (tmp_path/"plain.nii.gz").write_bytes(raw)
    (tmp_path/"packed.nii").write_bytes(gzip.compress(raw))
    for name in ("plain.nii.gz", "packed.nii"): assert_array_equal(read_nifti(tmp_path/name).data, data)


# ---- budgets, damage

def test_the_budget_is_asked_before_memory_is_taken(tmp_path, scan):
    raw, data = scan
    for name, content in (("a.nii", raw), ("a.nii.gz", gzip.compress(raw))):
        (tmp_path/name).write_bytes(content)
        assert_array_equal(read_nifti(tmp_path/name, max_bytes=data.nbytes).data, data)
        with pytest.raises(DataError, match="budget.*max_bytes"): read_nifti(tmp_path/name, max_bytes=data.nbytes - 1)


@pytest.mark.parametrize("dims", [(3, 32767, 32767, 32767), (3, -1, 5, 5), (3, 0, 5, 5), (0, 5, 5, 5), (8, 5, 5, 5),
                                  (-3, 5, 5, 5), (7, 99, 99, 99, 99, 99, 99, 99), (4, 20, 21, 22, 32767),
                                  (5, 20, 21, 22, 2, 2), (3, 21, 21, 22)])
def test_sizes_that_cannot_be_are_refused(tmp_path, scan, dims):
    raw = bytearray(scan[0])
    struct.pack_into(f"<{len(dims)}h", raw, 40, *dims)
    (tmp_path/"a.nii").write_bytes(raw)
    (tmp_path/"a.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises((FormatError, DataError)): read_nifti(tmp_path/name)


@pytest.mark.parametrize("code, bits, word", [(1, 1, "1-bit"), (32, 64, "complex64"), (128, 24, "RGB"),
                                              (1536, 128, "float128"), (2304, 32, "RGBA"), (1792, 128, "complex128"),
                                              (7, 8, "unknown"), (-1, 8, "unknown"), (4, 8, "bitpix"),
                                              (4, 32, "bitpix")])
def test_voxel_types_we_do_not_read_are_named(tmp_path, scan, code, bits, word):
    raw = bytearray(scan[0])
    struct.pack_into("<2h", raw, 70, code, bits)
    (tmp_path/"a.nii").write_bytes(raw)
    with pytest.raises(FormatError, match=word): read_nifti(tmp_path/"a.nii")


@pytest.mark.parametrize("offset", [0, 100, 347, 1e9, 1e30, -352, float("nan"), float("inf"), 352.5, 400])
def test_voxel_offsets_out_of_range(tmp_path, scan, offset):
    raw = bytearray(scan[0])
    struct.pack_into("<f", raw, 108, offset)
    (tmp_path/"a.nii").write_bytes(raw)
    (tmp_path/"a.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises(FormatError): read_nifti(tmp_path/name)


def test_bombs_are_refused_in_little_memory(tmp_path, scan):
    import tracemalloc
    raw = bytearray(scan[0])
    bombs = {"small.nii.gz": bytes(raw) + bytes(2**27)}
    struct.pack_into("<4h", raw, 40, 3, 2000, 2000, 2000)
    bombs["large.nii.gz"] = bytes(raw)
    for name, content in bombs.items(): (tmp_path/name).write_bytes(gzip.compress(content, 1))
    del bombs, content
    tracemalloc.start()
    for name in ("small.nii.gz", "large.nii.gz"):
        with pytest.raises(FormatError): read_nifti(tmp_path/name)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_things_that_are_not_nifti(tmp_path):
    for name, content in (("empty.nii", b""), ("html.nii.gz", b"<html>404"*99), ("short.nii", b"\x5c\x01\0\0"),
                          ("zeros.nii", bytes(5000)), ("zip.nii.gz", b"PK\x03\x04"*500), ("gz.nii.gz", b"\x1f\x8b"),
                          ("packed_html.nii.gz", gzip.compress(b"<html>404"*999)), ("void.nii.gz", gzip.compress(b""))):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(FormatError, match=name): read_nifti(tmp_path/name)
        with pytest.raises(FormatError, match=name): read_nifti_header(tmp_path/name)
    (tmp_path/"folder.nii.gz").mkdir()
    with pytest.raises(FormatError, match="is a folder"): read_nifti(tmp_path/"folder.nii.gz")
    with pytest.raises(MissingFile): read_nifti(tmp_path/"none.nii.gz")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_random_bytes_are_a_format_error_and_never_more(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp()/"random.nii.gz"
    for head in (b"", b"\x1f\x8b\x08\0\0\0\0\0\0\3", b"\x5c\x01\0\0"):
        path.write_bytes(head + content)
        with pytest.raises((FormatError, DataError)): read_nifti(path)
    with pytest.raises((FormatError, DataError)): parse_nifti_header(content[:348].ljust(348, b"\0"))


def test_pairs_and_analyze_are_named(tmp_path, scan):
    for magic, word in ((b"ni1\0", "hdr/.img pair"), (b"\0\0\0\0", "Analyze")):
        raw = bytearray(scan[0])
        raw[344:348] = magic
        (tmp_path/"a.nii").write_bytes(raw)
        with pytest.raises(FormatError, match=word): read_nifti(tmp_path/"a.nii")


def test_a_hundred_truncations_and_a_hundred_flips_are_never_silent(tmp_path, scan):
    raw, data = scan
    packed, path = gzip.compress(raw), tmp_path/"a.nii.gz"
    want = read_nifti(save(tmp_path/"b.nii.gz", data))
    for n in range(100):
        path.write_bytes(packed[:int(rng_for(0, "cut", n).integers(0, len(packed)))])
        with pytest.raises(FormatError): read_nifti(path)
        (tmp_path/"a.nii").write_bytes(raw[:int(rng_for(1, "cut", n).integers(0, len(raw)))])
        with pytest.raises(FormatError): read_nifti(tmp_path/"a.nii")
    noticed = 0
    for n in range(100):
        bad, at = bytearray(packed), int(rng_for(0, "flip", n).integers(0, 8*len(packed)))
        bad[at//8] ^= 1 << at % 8
        path.write_bytes(bad)
        try: got = read_nifti(path)
        except (FormatError, DataError): noticed += 1
        else: # bytes of the gzip header that say nothing: time, level, system
            assert 4 <= at//8 < 10 and np.array_equal(got.data, data) and np.array_equal(got.affine, want.affine)
    assert noticed >= 95


def test_each_byte_of_the_trailer_counts(tmp_path, scan):
    packed = gzip.compress(scan[0])
    for at in range(-8, 0):
        bad = bytearray(packed)
        bad[at] ^= 16
        (tmp_path/"a.nii.gz").write_bytes(bad)
        with pytest.raises(FormatError): read_nifti(tmp_path/"a.nii.gz")


def test_type_table_is_nibabels():
    for code, kind in DTYPES.items(): assert nib.nifti1.data_type_codes.dtype[code] == np.dtype(kind)


def test_reading_needs_no_fast_gzip(tmp_path, scan, monkeypatch):
    from medvol_nb import nifti
    monkeypatch.setattr(nifti, "fastzlib", zlib)
    path = write_nifti(Volume(scan[1], affine_from(1.5)), tmp_path/"a.nii.gz")
    assert_array_equal(read_nifti(path).data, scan[1])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FormatError): read_nifti(path)
