# %% [markdown]
# # Volumes in and out
#
# > One call reads any supported file with its place in the world, one writes it, one looks at the header only.
#
# The pages before hold the noun and the formats. This page joins them: a registry says which suffix belongs to which
# reader, so that a new format is one line and no function anywhere else asks for suffixes. It adds the formats of the
# ITK family and DICOM series, through the `io` extra.
#
# | format | read | write | lazy | place in the world |
# |---|---|---|---|---|
# | NIfTI `.nii` `.nii.gz` | yes | yes | | affine |
# | zarr, OME-Zarr `.zarr` | yes | yes | yes | our affine, OME scale and translation, voxel size attributes |
# | HDF5 `.h5` `.hdf5` | yes | yes | | our affine, voxel size attributes |
# | NumPy `.npy` `.npz` | yes | yes | | `.npz` only |
# | `.mha` `.nrrd` | yes | yes | | affine |
# | `.mhd` `.nhdr` (header and voxels in two files) | yes | | | affine |
# | DICOM series (a folder) | yes | | | affine |

# %%
#| default_exp volume

# %%
#| export
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from medvol_nb.core import DataError, FormatError, MissingFile, OnExists, atomic, check_output, close, optional
from medvol_nb.geometry import (Volume, # noqa: F401
                                affine_from, corner_displacement, crop, locate_crop, orientation_of, reorient,
                                resample, resample_to, same_grid, to_axes, to_index, to_world)
from medvol_nb.nifti import MAX_BYTES, header_notes, read_nifti, read_nifti_header, write_nifti
from medvol_nb.stores import (as_format_error, check_budget, open_hdf5, open_zarr, read_numpy, write_hdf5, write_numpy,
                              write_zarr)

_all_ = ["Volume", "affine_from", "corner_displacement", "crop", "locate_crop", "orientation_of", "reorient",
         "resample", "resample_to", "same_grid", "to_axes", "to_index", "to_world"]

# %%
from medvol_nb import phantoms
from medvol_nb.parallel import describe
from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## The ITK family
# ITK counts the world in LPS: x to the left, y to posterior. Turning that into RAS flips two signs, here and nowhere
# else.

# %%
#| export
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

def _itk_affine(img: Any) -> np.ndarray:
    "RAS+ affine of a SimpleITK image or reader"
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(img.GetDirection(), (3, 3)) * np.array(img.GetSpacing())
    affine[:3, 3] = img.GetOrigin()
    return _LPS @ affine

def _open_itk(path: str | os.PathLike) -> Any:
    "Image information of a file, without its voxels"
    sitk = optional("SimpleITK", extra="io")
    path = Path(path)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    if not path.is_file(): raise FormatError(f"{path} is a folder, not an image file")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try: reader.ReadImageInformation()
    except RuntimeError as e: raise FormatError(f"{path}: not readable ({str(e).strip().splitlines()[-1]})") from None
    if reader.GetDimension() != 3: raise DataError(f"{path}: {reader.GetDimension()} dimensions, a volume has 3")
    return reader

def read_itk(
    path: str | os.PathLike, # .mha, .mhd, .nrrd or .nhdr file
    *,
    max_bytes: int = MAX_BYTES, # refuse larger arrays [byte]
) -> Volume: # axes xyz or cxyz
    "Read a file of the ITK family (needs the `io` extra)"
    sitk = optional("SimpleITK", extra="io")
    reader = _open_itk(path)
    check_budget((*reader.GetSize(), reader.GetNumberOfComponents()), _itk_type(reader), str(path), max_bytes)
    try: img = reader.Execute()
    except RuntimeError as e: raise FormatError(f"{path}: damaged ({str(e).strip().splitlines()[-1]})") from None
    data = sitk.GetArrayFromImage(img).T
    axes = "cxyz" if data.ndim == 4 else "xyz"
    return Volume(data, _itk_affine(img), axes, MappingProxyType({"path": str(path), "notes": ()}))

def write_itk(
    vol: Volume, # axes xyz or cxyz
    path: str | os.PathLike, # .mha or .nrrd file
    on_exists: OnExists = "error", # what to do when `path` is there already
) -> Path: # `path`
    "Write a compressed file of the ITK family, atomically (needs the `io` extra)"
    sitk = optional("SimpleITK", extra="io")
    path = Path(path)
    if path.suffix not in (".mha", ".nrrd"): raise DataError(f"{path}: single files end in .mha or .nrrd")
    if vol.spatial_axes != "xyz":
        raise DataError(f"{path}: ITK holds xyz volumes, got {vol.axes}. Use to_axes(vol, 'xyz')")
    if not check_output(path, on_exists): return path
    data = np.asarray(vol.data[...])
    kind = {"?": "u1", "e": "f4"}.get(data.dtype.char, data.dtype.str[1:])
    if kind[0] not in "iuf" or int(kind[1:]) > 8: raise DataError(f"{path}: ITK files cannot hold {data.dtype} voxels")
    data = data.astype(kind, copy=False)
    img = sitk.GetImageFromArray(np.ascontiguousarray(data.T), isVector=vol.channels is not None)
    affine, zooms = _LPS @ vol.affine, np.array(vol.spacing)
    img.SetSpacing(zooms.tolist())
    img.SetOrigin(affine[:3, 3].tolist())
    img.SetDirection((affine[:3, :3]/zooms).ravel().tolist())
    with atomic(path) as t: sitk.WriteImage(img, str(t), useCompression=True)
    return path

# %% [markdown]
# ## DICOM series
# A folder of slices is a volume only if the slices belong to one series, are evenly spaced, and run along one
# direction. What scanners and archives make of this is the reason to check: a missing slice, two series in a folder,
# localizers mixed in. Each is refused with what was found.

# %%
#| export
def _slice_places(files: list[str], where: str) -> np.ndarray:
    "Position of each slice along the normal of the first; all must agree in size and orientation and lie upright"
    pydicom = optional("pydicom", extra="io")
    tags = ["ImagePositionPatient", "ImageOrientationPatient", "Rows", "Columns", "PixelSpacing"]
    heads = [pydicom.dcmread(f, stop_before_pixels=True, specific_tags=tags) for f in files]
    for head, file in zip(heads, files):
        lacking = [t for t in tags if t not in head]
        if lacking: raise FormatError(f"{where}: {Path(file).name} has no {', '.join(lacking)}")
    first = heads[0]
    orientation = np.array(first.ImageOrientationPatient, float)
    for head, file in zip(heads, files):
        if (head.Rows, head.Columns) != (first.Rows, first.Columns):
            raise DataError(f"{where}: slices differ in size, {Path(file).name} has {head.Rows} x {head.Columns}")
        if np.abs(np.array(head.ImageOrientationPatient, float) - orientation).max() > 1e-3:
            raise DataError(f"{where}: slices differ in orientation, first at {Path(file).name}")
        if np.abs(np.array(head.PixelSpacing, float) - np.array(first.PixelSpacing, float)).max() > 1e-4:
            raise DataError(f"{where}: slices differ in pixel size, first at {Path(file).name}")
    normal = np.cross(orientation[:3], orientation[3:])
    places = np.array([h.ImagePositionPatient for h in heads], float)
    sideways = (places - places[0]) @ orientation.reshape(2, 3).T
    drift = np.abs(sideways).max()
    if drift > 0.1*min(float(v) for v in first.PixelSpacing):
        raise DataError(f"{where}: slices are shifted sideways by up to {drift:.3g} mm (tilted gantry). Straighten the "
                        f"series first, such as with dcm2niix")
    return places @ normal

def _thickness(file: str) -> float | None:
    "Height of a slice [mm] as its header says; None if it does not"
    tags = ["SpacingBetweenSlices", "SliceThickness"]
    head = optional("pydicom", extra="io").dcmread(file, stop_before_pixels=True, specific_tags=tags)
    found = [float(head.get(t) or 0) for t in tags]
    return next((v for v in found if np.isfinite(v) and v > 0), None)

def read_dicom(
    path: str | os.PathLike, # folder with the slices of one series
    *,
    series: str | None = None, # SeriesInstanceUID, needed when the folder holds several
) -> Volume: # axes xyz, rescaled to real units such as HU
    "Read a DICOM series from a folder (needs the `io` extra)"
    sitk = optional("SimpleITK", extra="io")
    folder, where = Path(path), str(path)
    if not folder.is_dir(): raise MissingFile(f"{where} is not a folder")
    found = list(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
    if not found: raise FormatError(f"{where}: no DICOM series in this folder")
    if series is None and len(found) > 1:
        sizes = [len(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), s)) for s in found]
        listed = ", ".join(f"{s} ({n} files)" for s, n in zip(found[:5], sizes))
        raise DataError(f"{where}: holds {len(found)} series, choose one with series=: {listed}")
    series = found[0] if series is None else series
    if series not in found: raise DataError(f"{where}: no series {series!r}, found {', '.join(found[:5])}")
    files = list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series))
    if len(files) > 1:
        steps = np.diff(np.sort(_slice_places(files, where)))
        usual = float(np.median(steps))
        odd = np.flatnonzero(np.abs(steps - usual) > 0.01*usual + 1e-3)
        if usual <= 1e-6 or len(odd):
            k = int(odd[0]) if len(odd) else 0
            raise DataError(f"{where}: slices are not evenly spaced: {steps[k]:.4g} mm after slice {k + 1} of "
                            f"{len(files)}, usually {usual:.4g} mm. A slice is missing or doubled")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    try: img = reader.Execute()
    except RuntimeError as e:
        raise FormatError(f"{where}: damaged series ({str(e).strip().splitlines()[-1]})") from None
    affine = _itk_affine(img)
    if img.GetSize()[2] == 1: affine[:3, 2] *= (_thickness(files[0]) or 1.0)/img.GetSpacing()[2]
    data = sitk.GetArrayFromImage(img).T
    if data.ndim != 3: raise DataError(f"{where}: holds colour images, only real numbers are supported")
    return Volume(data, affine, "xyz", MappingProxyType({"path": where, "notes": (), "series": series}))

# %% [markdown]
# ## The registry
# Longest suffix first; a folder that is no zarr store is taken for a DICOM series.

# %%
#| export
@dataclass(frozen=True)
class FileFormat:
    "How files of one kind are read and written"
    name: str # shown in messages
    suffixes: tuple[str, ...] # of file names, lower case
    read: Callable[..., Volume] # path -> volume
    write: Callable[..., Path] | None # (volume, path, on_exists) -> path; None if we only read it
    axes: str | None = None # storage order the format demands; None: any

FORMATS = (
    FileFormat("NIfTI", (".nii.gz", ".nii"), read_nifti, write_nifti, "xyz"),
    FileFormat("zarr", (".zarr",), open_zarr, write_zarr),
    FileFormat("HDF5", (".h5", ".hdf5"), open_hdf5, write_hdf5),
    FileFormat("NumPy", (".npy", ".npz"), read_numpy, write_numpy),
    FileFormat("ITK", (".mha", ".mhd", ".nrrd", ".nhdr"), read_itk, write_itk, "xyz"),
    FileFormat("DICOM", (), read_dicom, None, "xyz"),
)

def format_of(
    path: str | os.PathLike, # file, store or folder; need not exist
) -> FileFormat: # its entry in the registry
    "Which format a path belongs to, by its name"
    text = os.fspath(path)
    name = text.split("::")[0].rstrip("/").lower()
    for f in FORMATS:
        if name.endswith(f.suffixes) or (f.name == "zarr" and ".zarr/" in name): return f
    if Path(text).is_dir(): return FORMATS[-1]
    known = " ".join(s for f in FORMATS for s in f.suffixes)
    raise FormatError(f"{text}: unknown file type. Supported: {known}, and folders with a DICOM series")

def stem_of(
    path: str | os.PathLike, # file, store or folder
) -> str: # name without folder and suffix
    "Name of a volume file without its suffix ('case_1.nii.gz' -> 'case_1')"
    name = Path(os.fspath(path).split("::")[0]).name
    for s in sorted((s for f in FORMATS for s in f.suffixes), key=len, reverse=True):
        if name.lower().endswith(s): return name[:-len(s)]
    return name

def read_volume(
    path: str | os.PathLike, # file, zarr store ('store.zarr/array'), HDF5 data set ('file.h5::name') or DICOM folder
    *,
    lazy: bool = False, # True: leave the voxels of a zarr store on disk until they are sliced
    **options: Any, # passed to the format's reader, such as level= for OME-Zarr
) -> Volume: # stored axes and number type
    "Read a volume of any supported format with its place in the world"
    vol = format_of(path).read(path, **options)
    if lazy or isinstance(vol.data, np.ndarray): return vol
    check_budget(vol.data.shape, vol.dtype, str(path))
    with as_format_error(str(path), "damaged data"): return vol.load()

def write_volume(
    vol: Volume, # any axes; brought into the order the format demands
    path: str | os.PathLike, # the suffix decides the format
    on_exists: OnExists = "error", # what to do when `path` is there already
    **options: Any, # passed to the format's writer, such as chunks= for zarr
) -> Path: # `path`
    "Write a volume in any writable format, atomically"
    f = format_of(path)
    if f.write is None: raise DataError(f"{path}: {f.name} is only read. Write .nii.gz or .zarr")
    return f.write(to_axes(vol, f.axes) if f.axes else vol, path, on_exists, **options)

# %%
#| export
def read_header(
    path: str | os.PathLike, # file, zarr store, HDF5 data set or DICOM folder
) -> Volume: # its data is a placeholder without memory, `meta['notes']` lists what is odd
    "Shape, type and place of a volume, without its voxels in NIfTI, zarr and ITK files; the others are read whole"
    f = format_of(path)
    if f.name == "NIfTI":
        head = read_nifti_header(path)
        shape = (*([head.channels] if head.channels else []), *head.shape)
        kind = np.float32 if head.has_scaling else head.dtype
        more, affine = {"notes": tuple(header_notes(head)), "scaled": head.has_scaling}, head.affine
    elif f.name == "ITK":
        reader = _open_itk(path)
        n = reader.GetNumberOfComponents()
        shape, more, affine = (*([n] if n > 1 else []), *reader.GetSize()), {"notes": ()}, _itk_affine(reader)
        kind = _itk_type(reader)
    else:
        vol = f.read(path)
        return Volume(np.broadcast_to(np.zeros((), vol.dtype), vol.data.shape), vol.affine, vol.axes, vol.meta)
    try: return Volume(np.broadcast_to(np.zeros((), kind), shape), affine, "cxyz"[-len(shape):],
                       MappingProxyType({"path": str(path), **more}))
    except DataError as e: raise FormatError(f"{path}: {e}") from None

def _itk_type(reader: Any) -> str:
    "NumPy name of the pixel type, such as 'uint8'"
    text = optional("SimpleITK", extra="io").GetPixelIDValueAsString(reader.GetPixelID())
    if "integer" not in text and "float" not in text or "complex" in text:
        raise DataError(f"{reader.GetFileName()}: holds {text} voxels, only real numbers are supported")
    bits = text.removeprefix("vector of ").split("-")[0]
    return f"{'float' if 'float' in text else 'uint' if 'unsigned' in text else 'int'}{bits}"

# %%
patient = phantoms.abdomen()
ct = Volume(patient.img, affine_from(patient.spacing, (-90, -70, -40)))
with tmpdir() as d:
    seen = {}
    for name in ("ct.nii", "ct.nii.gz", "ct.zarr", "ct.h5", "ct.npz", "ct.mha", "ct.nrrd"):
        write_volume(reorient(ct, "LPS"), d/name)
        back, head = read_volume(d/name), read_header(d/name)
        same = reorient(back, "RAS")
        equal = np.array_equal(same.data, ct.data)
        seen[name] = same_grid(same, ct), equal, head.shape == back.shape, head.dtype == ct.dtype
    ratio = {n: f"{ct.data.nbytes/describe(d/n, content=False)['bytes']:.1f} : 1" for n in seen}
seen, ratio

# %%
assert all(all(v) for v in seen.values())

# %%
with raises(FormatError, match="unknown file type. Supported: .nii.gz"): read_volume("scan.jpg")
with raises(MissingFile, match="does not exist"): read_volume("scan.nii.gz")
assert stem_of("a/case_1.nii.gz") == "case_1" and stem_of("x.ome.zarr") == "x.ome" and stem_of("v.h5::raw") == "v"

# %% [markdown]
# ## What a folder of headers can hide
# A label whose y axis runs the other way than its image is not an error: both know their place, and one `reorient`
# makes them one grid. A crop whose affine was not moved along is one, and no single header shows it. `compare_grids`
# says in words how two volumes lie to each other.

# %%
#| export
def compare_grids(
    a: Volume, # for instance an image
    b: Volume, # for instance its label
    tolerance: float = 1e-3, # largest distance between corner voxels that counts as equal [mm]
) -> str: # 'same', 'reoriented', 'shifted crop' or 'different'
    "How the grids of two volumes relate; 'shifted crop' needs the voxels, the rest only the headers"
    if same_grid(a, b, tolerance): return "same"
    ra, rb = (Volume(np.broadcast_to(np.zeros((), v.dtype), v.shape), v.affine, v.spatial_axes) for v in (a, b))
    ra, rb = reorient(ra, "RAS"), reorient(rb, "RAS")
    if same_grid(to_axes(ra, "xyz"), to_axes(rb, "xyz"), tolerance): return "reoriented"
    if a.axes == b.axes and a.channels is None and isinstance(a.data, np.ndarray) and isinstance(b.data, np.ndarray):
        whole, part = (a, b) if a.data.size >= b.data.size else (b, a)
        start = locate_crop(whole, part) if min(part.data.strides) else None # strides 0: `read_header`, no voxels
        moved = start is not None and not close(to_world(whole.affine, start), part.affine[:3, 3], tolerance)
        if moved: return "shifted crop"
    return "different"

# %%
flipped = reorient(Volume(patient.lbl, ct.affine), "LAS")
forgotten = Volume(np.ascontiguousarray(ct.data[:, :, 10:20]), ct.affine)
[compare_grids(ct, v) for v in (Volume(patient.lbl, ct.affine), flipped, forgotten, resample(ct, 5.0))]

# %%
assert [compare_grids(ct, v) for v in (ct, flipped, forgotten, resample(ct, 5.0))] == [
    "same", "reoriented", "shifted crop", "different"]
