"The registry, the ITK family and DICOM series"
import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation

from medvol_nb.core import DataError, FormatError, MedvolError, MissingFile, OutputExists, rng_for
from medvol_nb.geometry import Volume, affine_from, reorient, same_grid, to_axes, to_world
from medvol_nb.volume import (
    FORMATS,
    compare_grids,
    format_of,
    read_dicom,
    read_header,
    read_itk,
    read_volume,
    stem_of,
    write_itk,
    write_volume,
)

sitk = pytest.importorskip("SimpleITK")
pydicom = pytest.importorskip("pydicom")

WRITABLE = ["a.nii", "a.nii.gz", "a.zarr", "a.h5", "a.hdf5", "a.npz", "a.mha", "a.nrrd"]
PLACE = np.eye(4)
PLACE[:3, :3] = Rotation.from_euler("xyz", (10, -20, 30), degrees=True).as_matrix()*(-1.5, 2, 3.25)
PLACE[:3, 3] = -40, 12, 7


def voxels(shape=(9, 8, 7), dtype="i2", seed=0):
    data = rng_for(seed, "volume").integers(-100 if np.dtype(dtype).kind != "u" else 0, 120, shape)
    return data.astype(dtype)


# ---- the registry

@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("axes", ["xyz", "zyx", "cxyz", "czyx"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
def test_every_format_keeps_voxels_type_and_place(tmp_path, name, axes, dtype):
    data = voxels((2, 9, 8, 7) if axes[0] == "c" else (9, 8, 7), dtype)
    vol = Volume(data, PLACE, axes)
    assert write_volume(vol, tmp_path/name) == tmp_path/name
    back, head = read_volume(tmp_path/name), read_header(tmp_path/name)
    assert isinstance(back.data, np.ndarray) and back.dtype == np.dtype(dtype) and back.channels == vol.channels
    moved = to_axes(back, axes)
    assert_array_equal(moved.data, data)
    assert same_grid(moved, vol, 1e-4)
    assert head.data.shape == back.data.shape and head.dtype == back.dtype and head.axes == back.axes
    assert_allclose(head.affine, back.affine)
    assert not any(head.data.strides) or head.data.size == 1
    lazy = read_volume(tmp_path/name, lazy=True)
    assert_array_equal(np.asarray(lazy.data[...]), back.data)
    assert isinstance(lazy.data, np.ndarray) is (not name.endswith(".zarr"))


@pytest.mark.parametrize("name", WRITABLE)
def test_every_format_knows_the_word_and_leaves_nothing_behind(tmp_path, name):
    class Broken:
        shape, dtype, ndim = (9, 8, 7), np.dtype(np.int16), 3
        def __getitem__(self, key): raise OSError("disk gone")
    one, two, path = Volume(voxels(), PLACE), Volume(voxels(seed=1), PLACE), tmp_path/name
    with pytest.raises(OSError, match="disk gone"): write_volume(replace(one, data=Broken()), path)
    assert not list(tmp_path.iterdir())
    write_volume(one, path)
    with pytest.raises(OutputExists, match="on_exists"): write_volume(two, path)
    with pytest.raises(OSError, match="disk gone"): write_volume(replace(one, data=Broken()), path, "overwrite")
    write_volume(two, path, "skip")
    assert_array_equal(to_axes(read_volume(path), "xyz").data, one.data)
    write_volume(two, path, "overwrite")
    assert_array_equal(to_axes(read_volume(path), "xyz").data, two.data)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(MissingFile): write_volume(one, tmp_path/"no"/name)


@pytest.mark.parametrize("path, name", [
    ("a.nii", "NIfTI"), ("A.NII.GZ", "NIfTI"), ("x/a.zarr", "zarr"), ("x/a.zarr/", "zarr"), ("x/a.zarr/raw", "zarr"),
    ("x/a.ome.zarr::raw", "zarr"), ("a.h5::x/y", "HDF5"), ("a.HDF5", "HDF5"), ("a.npy", "NumPy"), ("a.npz", "NumPy"),
    ("a.mha", "ITK"), ("a.nhdr", "ITK"), ("a.nrrd", "ITK")])
def test_the_suffix_decides(path, name): assert format_of(path).name == name


def test_unknown_files_are_named_with_what_is_supported(tmp_path):
    for bad in ("scan.jpg", "scan", "a.gz", "a.nii.zst", ".nii", "folder"):
        try: kind = format_of(tmp_path/bad)
        except FormatError as e: assert ".nii.gz" in str(e) and bad in str(e)
        else: assert bad == ".nii" and kind.name == "NIfTI"
    with pytest.raises(DataError, match="only read"): write_volume(Volume(voxels(), PLACE), tmp_path)
    for name in WRITABLE:
        with pytest.raises(MissingFile): read_volume(tmp_path/name)
        with pytest.raises(MissingFile): read_header(tmp_path/name)
    assert len({s for f in FORMATS for s in f.suffixes}) == sum(len(f.suffixes) for f in FORMATS)


@pytest.mark.parametrize("path, stem", [("x/case_1.nii.gz", "case_1"), ("case.1.nii", "case.1"),
                                        ("a.ome.zarr", "a.ome"), ("v.h5::raw/x", "v"), ("A.NII.GZ", "A"),
                                        ("series", "series"), ("a.b.mha", "a.b")])
def test_stems(path, stem): assert stem_of(path) == stem


# ---- ITK family

@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_itk_reads_what_we_write_and_back(tmp_path, suffix, dtype):
    for shape, axes in (((9, 8, 7), "xyz"), ((3, 9, 8, 7), "cxyz"), ((9, 8, 1), "xyz")):
        data = voxels(shape, dtype)
        path = write_itk(Volume(data, PLACE, axes), tmp_path/f"a.{suffix}", "overwrite")
        img = sitk.ReadImage(str(path))
        assert_array_equal(sitk.GetArrayFromImage(img).T, data)
        at = np.array(img.TransformIndexToPhysicalPoint((8, 7, 0)))*(-1, -1, 1)
        assert_allclose(at, to_world(PLACE, (8, 7, 0)), atol=1e-6)
        back = read_itk(path)
        assert back.axes == axes and back.dtype == np.dtype(dtype)
        assert_array_equal(back.data, data)
        assert_allclose(back.affine, PLACE, atol=1e-6)
    for odd, kind in ((data > 5, "u1"), (data.astype("f2"), "f4"), (data.astype(">i4"), "i4")):
        back = read_itk(write_itk(Volume(odd, PLACE), tmp_path/f"b.{suffix}", "overwrite"))
        assert back.dtype == np.dtype(kind)
        assert_array_equal(back.data, odd)


@pytest.mark.parametrize("suffix", ["mha", "mhd", "nrrd", "nhdr"])
def test_files_itk_wrote_itself(tmp_path, suffix):
    img = sitk.GetImageFromArray(voxels().T)
    img.SetSpacing((1.5, 2, 3))
    img.SetOrigin((10, 20, 30))
    img.SetDirection(Rotation.from_euler("z", 30, degrees=True).as_matrix().ravel().tolist())
    sitk.WriteImage(img, str(tmp_path/f"a.{suffix}"))
    vol, head = read_volume(tmp_path/f"a.{suffix}"), read_header(tmp_path/f"a.{suffix}")
    assert_array_equal(vol.data, voxels())
    for ijk in itertools.product((0, 6), (0, 5), (0, 4)):
        assert_allclose(to_world(vol.affine, ijk)*(-1, -1, 1), img.TransformIndexToPhysicalPoint(ijk), atol=1e-9)
    assert_allclose(head.affine, vol.affine)
    assert head.shape == (9, 8, 7)


def test_itk_refuses_in_words(tmp_path):
    vol = Volume(voxels(), PLACE)
    with pytest.raises(DataError, match=".mha or .nrrd"): write_itk(vol, tmp_path/"a.mhd")
    with pytest.raises(DataError, match="to_axes"): write_itk(replace(vol, axes="zyx"), tmp_path/"a.mha")
    for dtype in ("c8", "c16", "f16"):
        bad = Volume(voxels().astype(dtype), PLACE)
        with pytest.raises(DataError, match="cannot hold"): write_itk(bad, tmp_path/"a.mha")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.complex64)), str(tmp_path/"complex.nrrd"))
    for read in (read_itk, read_header):
        with pytest.raises(DataError, match="nrrd: holds complex .* real numbers"): read(tmp_path/"complex.nrrd")
    flat = sitk.GetImageFromArray(np.zeros((4, 5), np.uint8))
    sitk.WriteImage(flat, str(tmp_path/"flat.mha"))
    with pytest.raises(DataError, match="2 dimensions"): read_itk(tmp_path/"flat.mha")
    (tmp_path/"html.nrrd").write_text("<html>404"*99)
    (tmp_path/"empty.mha").write_bytes(b"")
    (tmp_path/"folder.mha").mkdir()
    for name in ("html.nrrd", "empty.mha", "folder.mha"):
        with pytest.raises(FormatError, match=name): read_itk(tmp_path/name)
    write_itk(vol, tmp_path/"a.mha")
    assert read_itk(tmp_path/"a.mha", max_bytes=vol.data.nbytes).shape == vol.shape
    with pytest.raises(DataError, match="budget"): read_itk(tmp_path/"a.mha", max_bytes=vol.data.nbytes - 1)


@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
def test_truncated_itk_files_are_errors(tmp_path, suffix):
    path = write_itk(Volume(voxels((20, 20, 20)), PLACE), tmp_path/f"a.{suffix}")
    good = path.read_bytes()
    for k in range(60):
        path.write_bytes(good[:int(rng_for(k, "cut").integers(0, len(good)))])
        with pytest.raises(MedvolError, match=path.name): read_itk(path)
    sitk.WriteImage(sitk.GetImageFromArray(voxels((20, 20, 20))), str(path), useCompression=False)
    good = path.read_bytes()
    for k in range(60):
        path.write_bytes(good[:int(rng_for(k, "plain").integers(0, len(good)))])
        with pytest.raises(MedvolError, match=path.name): read_itk(path)


# ---- DICOM

def series(folder, data, affine=None, uid="1.2.3.4", slope=1, inter=-1024, names=None, change=None, frame="1.2.9"):
    "Write (x, y, z) values [HU] as one CT slice a file; `change(dataset, k)` damages it"
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
    folder.mkdir(exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ (affine_from((.9, .8, 2.5), (-20, 30, 40)) if affine is None else affine)
    zooms = np.sqrt((lps[:3, :3]**2).sum(axis=0))
    for k in range(data.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, f"{uid}.{k + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        name = folder/(names[k] if names else f"{uid}_{k:04d}.dcm")
        ds = FileDataset(str(name), {}, file_meta=meta, preamble=b"\0"*128)
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, f"{uid}.{k + 1}", "CT"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", uid, frame
        ds.SeriesNumber, ds.InstanceNumber = 1, k + 1
        ds.ImageOrientationPatient = [f"{v:.10f}" for v in (lps[:3, :2]/zooms[:2]).T.ravel()]
        ds.ImagePositionPatient = [f"{v:.10g}" for v in lps[:3, 3] + k*lps[:3, 2]]
        ds.PixelSpacing, ds.SliceThickness = [f"{zooms[1]:.10g}", f"{zooms[0]:.10g}"], f"{zooms[2]:.10g}"
        ds.RescaleSlope, ds.RescaleIntercept = slope, inter
        ds.Columns, ds.Rows = data.shape[:2]
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit = 15
        ds.PixelData = np.round((data[:, :, k].T - inter)/slope).astype("<i2").tobytes()
        if change is not None: change(ds, k)
        ds.save_as(name, enforce_file_format=True)
    return folder


@pytest.mark.parametrize("turn", [(0, 0, 0), (10, 0, 0), (5, -8, 12), (0, 90, 0)])
def test_a_series_is_a_volume_in_its_place(tmp_path, turn):
    affine = affine_from((.9, .8, 2.5), (-20, 30, 40))
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ affine[:3, :3]*(-1, -1, 1)
    data = voxels((12, 10, 6))
    vol = read_volume(series(tmp_path/"s", data, affine))
    assert vol.axes == "xyz" and vol.meta["series"] == "1.2.3.4"
    assert_array_equal(vol.data, data)
    assert_allclose(vol.affine, affine, atol=1e-5)
    head = read_header(tmp_path/"s")
    assert head.shape == vol.shape
    assert_allclose(head.affine, vol.affine, atol=1e-9)


def test_places_count_not_file_names_or_instance_numbers(tmp_path):
    data = voxels((12, 10, 8))
    expected = read_dicom(series(tmp_path/"s", data))
    order = rng_for(0, "names").permutation(8)
    def renumber(ds, k): ds.InstanceNumber = int(order[k]) + 1
    names = [f"IM{int(k):03d}" for k in order]
    vol = read_dicom(series(tmp_path/"t", data, names=names, change=renumber))
    assert_array_equal(vol.data, data)
    assert_allclose(vol.affine, expected.affine)


def test_slices_stored_top_down_give_the_same_volume(tmp_path):
    data = voxels((12, 10, 8))
    down = affine_from((.9, .8, 2.5), (-20, 30, 40)) @ np.diag([1, 1, -1, 1])
    vol = reorient(read_dicom(series(tmp_path/"s", data, down)), "RAS")
    wanted = reorient(Volume(data, down), "RAS")
    assert_array_equal(vol.data, wanted.data)
    assert same_grid(vol, wanted, 1e-4)


def test_rescaling_gives_real_units(tmp_path):
    data = voxels((6, 5, 4)).astype(np.float64)
    twice = read_dicom(series(tmp_path/"a", data, slope=2, inter=-1000))
    assert_array_equal(twice.data, np.round((data + 1000)/2)*2 - 1000)
    half = read_dicom(series(tmp_path/"b", data, slope=.5, inter=.25))
    assert half.dtype.kind == "f"
    assert_allclose(half.data, data, atol=.5)


@pytest.mark.parametrize("lost", [1, 3, 6])
def test_a_missing_slice_is_found(tmp_path, lost):
    folder = series(tmp_path/"s", voxels((6, 5, 8)))
    (folder/f"1.2.3.4_{lost:04d}.dcm").unlink()
    with pytest.raises(DataError, match=f"not evenly spaced: 5 mm after slice {lost} of 7"): read_volume(folder)


def test_a_doubled_slice_is_found(tmp_path):
    folder = series(tmp_path/"s", voxels((6, 5, 8)))
    copy = pydicom.dcmread(folder/"1.2.3.4_0003.dcm")
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.99"
    copy.save_as(folder/"copy.dcm")
    with pytest.raises(DataError, match="missing or doubled"): read_volume(folder)


def test_two_series_in_a_folder_must_be_chosen_from(tmp_path):
    one, two = voxels((6, 5, 4)), voxels((6, 5, 7), seed=1)
    series(tmp_path/"s", one)
    folder = series(tmp_path/"s", two, uid="1.2.3.5")
    with pytest.raises(DataError, match=r"holds 2 series.*series=.*1\.2\.3\.4.* \(4 files\).*1\.2\.3\.5.* \(7 files\)"):
        read_volume(folder)
    assert_array_equal(read_volume(folder, series=next(s for s in ids(folder) if s.startswith("1.2.3.5"))).data, two)
    with pytest.raises(DataError, match="no series '9.9'"): read_volume(folder, series="9.9")


def ids(folder): return sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))


def test_slices_of_unequal_size_orientation_or_pixels(tmp_path):
    def wider(ds, k):
        if k == 2: ds.Columns, ds.PixelData = 7, bytes(2*7*5)
    def turned(ds, k):
        if k == 2: ds.ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
    def finer(ds, k):
        if k == 2: ds.PixelSpacing = [.4, .4]
    for change, word in ((wider, "size"), (turned, "orientation"), (finer, "pixel size")):
        folder = series(tmp_path/change.__name__, voxels((6, 5, 4)), change=change)
        with pytest.raises(DataError, match=f"differ in {word}.*_0002.dcm"): read_volume(folder)


def test_a_tilted_gantry_is_not_silently_straightened(tmp_path):
    def tilt(ds, k): ds.ImagePositionPatient = [v + d*k for v, d in zip(ds.ImagePositionPatient, (0, .9, 0))]
    with pytest.raises(DataError, match="tilt"): read_volume(series(tmp_path/"s", voxels((6, 5, 8)), change=tilt))


def test_slices_without_a_place_are_refused(tmp_path):
    def strip(ds, k): del ds.ImagePositionPatient
    with pytest.raises(MedvolError): read_volume(series(tmp_path/"s", voxels((6, 5, 4)), change=strip))


def test_folders_without_a_series(tmp_path):
    (tmp_path/"empty").mkdir()
    (tmp_path/"other").mkdir()
    (tmp_path/"other"/"notes.txt").write_text("no image")
    for name in ("empty", "other"):
        with pytest.raises(FormatError, match="no DICOM series"): read_volume(tmp_path/name)
    with pytest.raises(MissingFile): read_dicom(tmp_path/"none")


def test_one_slice_is_a_volume_of_one_slice(tmp_path):
    vol = read_dicom(series(tmp_path/"s", voxels((6, 5, 1))))
    assert vol.shape == (6, 5, 1)
    assert_array_equal(vol.data, voxels((6, 5, 1)))
    assert_allclose(vol.spacing, (.9, .8, 2.5), rtol=1e-6)


def test_other_files_beside_the_slices_do_not_matter(tmp_path):
    folder = series(tmp_path/"s", voxels((6, 5, 4)))
    (folder/"readme.txt").write_text("notes")
    (folder/"sub").mkdir()
    shutil.copy(folder/"1.2.3.4_0000.dcm", folder/"sub"/"x.dcm")
    assert_array_equal(read_dicom(folder).data, voxels((6, 5, 4)))


def test_a_truncated_slice_is_an_error(tmp_path):
    folder = series(tmp_path/"s", voxels((6, 5, 4)))
    file = folder/"1.2.3.4_0002.dcm"
    good = file.read_bytes()
    for cut in (len(good) - 1, len(good) - 30, len(good) - 61, 400, 140, 20, 0):
        file.write_bytes(good[:cut])
        with pytest.raises(MedvolError): read_volume(folder)


# ---- how grids lie to each other

def test_grids_are_compared_in_words():
    a = Volume(voxels((12, 11, 10), "i4"), affine_from((1.5, 2, 3), (5, 6, 7)))
    cut = a.data[2:8, 3:9, 4:9].copy()
    right = a.affine.copy()
    right[:3, 3] = to_world(a.affine, (2, 3, 4))
    for b, word in ((replace(a, data=a.data + 1), "same"), (reorient(a, "LPS"), "reoriented"),
                    (to_axes(a, "zyx"), "reoriented"), (to_axes(reorient(a, "PIR"), "yzx"), "reoriented"),
                    (replace(a, data=cut), "shifted crop"),
                    (replace(a, data=cut, affine=right), "different"), (replace(a, data=cut + 1), "different"),
                    (replace(a, affine=a.affine @ np.diag([1.1, 1, 1, 1])), "different"),
                    (replace(a, data=np.stack([a.data]*2), axes="cxyz"), "same"),
                    (replace(a, data=a.data[:-1] + 1), "different")):
        assert compare_grids(a, b) == compare_grids(b, a) == word
    nudged = replace(a, affine=a.affine + np.pad(np.full((3, 1), 5e-4), ((0, 1), (3, 0))))
    assert compare_grids(a, nudged) == "same" and compare_grids(a, nudged, 1e-4) != "same"
    assert compare_grids(replace(a, data=np.broadcast_to(np.int16(0), (12, 11, 10))), replace(a, data=cut)) in (
        "different", "shifted crop")
