# %% [markdown]
# # NIfTI files
#
# > Read and write `.nii` and `.nii.gz` so that a damaged file is always an error and never a slightly different image.
#
# Flip one bit in the middle of a `.nii.gz` and most readers return an image with a stripe of wrong voxels and no
# warning. The format does protect itself: every gzip member ends in a checksum of its content. But a reader that
# stops as soon as it has all voxels never gets to that checksum. The reader on this page decompresses whole members
# to the end of the file, always. It also decides *before* it allocates memory whether the size in the header can be
# true.
#
# Format: [NIfTI-1.1 and NIfTI-2](https://nifti.nimh.nih.gov/nifti-2), gzip: RFC 1952.

# %%
#| default_exp nifti

# %%
#| export
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from medvol_nb.core import DataError, FormatError, MissingFile, OnExists, atomic, check_output, human_bytes
from medvol_nb.geometry import Volume, affine_from, corner_displacement

try: from isal import isal_zlib as fastzlib
except ImportError: fastzlib = zlib # the same interface, slower

# %%
from medvol_nb import phantoms
from medvol_nb.core import close, raises, tmpdir

# %% [markdown]
# ## The header
# 348 bytes (540 in version 2) say everything: sizes, number type, voxel size, and up to two affines. All fields are
# read at fixed offsets; nothing is believed before it is checked.

# %%
#| export
DTYPES = MappingProxyType({2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8",
                           1280: "u8"})
_REFUSED = MappingProxyType({1: "1-bit", 32: "complex64", 128: "RGB", 1536: "float128", 1792: "complex128",
                             2048: "complex256", 2304: "RGBA"})
_UNITS = MappingProxyType({0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001})

@dataclass(frozen=True)
class NiftiHeader:
    "What the header of a NIfTI file says, checked"
    version: int # 1 or 2
    dims: tuple[int, ...] # sizes of all stored axes
    dtype: np.dtype # stored number type with its byte order
    pixdim: tuple[float, ...] # eight numbers; pixdim[0] is the handedness of the q-form
    vox_offset: int # first byte of the voxels
    slope: float # stored value * slope + inter = value; 0 or NaN means: none
    inter: float # see slope
    units: int # code of the length unit: 1 metre, 2 millimetre, 3 micrometre, others say nothing
    qform_code: int # > 0 if the quaternion affine counts
    sform_code: int # > 0 if the matrix affine counts
    quatern: tuple[float, ...] # b, c, d and the offset x, y, z
    srow: np.ndarray # (3, 4) matrix affine

    @property
    def nbytes(self) -> int: # [byte] of all voxels
        return int(np.prod(self.dims, dtype=object))*self.dtype.itemsize

    @property
    def shape(self) -> tuple[int, int, int]: # spatial sizes (x, y, z)
        return (*self.dims, 1, 1)[:3]

    @property
    def channels(self) -> int | None: # number of channels, None if the image has a single value per voxel
        extra = [n for n in self.dims[3:] if n != 1]
        return extra[0] if extra else None

    @property
    def has_scaling(self) -> bool: # the stored numbers are not the values
        return bool(np.isfinite(self.slope) and self.slope != 0 and (self.slope, self.inter) != (1, 0))

    @cached_property
    def qform(self) -> np.ndarray: # (4, 4) quaternion affine -> RAS+ [mm]
        b, c, d, *offset = self.quatern
        rest = 1 - b*b - c*c - d*d
        if rest < 3.6e-7: # a half turn, within what three float32 numbers can say
            b, c, d = np.array([b, c, d])/max(np.sqrt(b*b + c*c + d*d), 1e-30)
            rest = 0.0
        a = np.sqrt(rest)
        rotation = np.array([[a*a+b*b-c*c-d*d, 2*(b*c-a*d), 2*(b*d+a*c)],
                             [2*(b*c+a*d), a*a+c*c-b*b-d*d, 2*(c*d-a*b)],
                             [2*(b*d-a*c), 2*(c*d+a*b), a*a+d*d-b*b-c*c]])
        zooms = np.array(self.pixdim[1:4])*(1, 1, -1 if self.pixdim[0] < 0 else 1)
        return self._in_mm(np.column_stack([rotation*zooms, offset]))

    @property
    def sform(self) -> np.ndarray: return self._in_mm(self.srow) # (4, 4) matrix affine -> RAS+ [mm]

    @property
    def affine(self) -> np.ndarray: # (4, 4) s-form if it counts, else q-form, else voxel size alone (as nibabel does)
        if self.sform_code > 0: return self.sform
        if self.qform_code > 0: return self.qform
        zooms = np.array([z if z > 0 else 1.0 for z in self.pixdim[1:4]])*(-1, 1, 1)
        return self._in_mm(np.column_stack([np.diag(zooms), -zooms*(np.array(self.shape) - 1)/2]))

    def _in_mm(self, rows: np.ndarray) -> np.ndarray:
        return np.vstack([rows*_UNITS.get(self.units, 1.0), [0, 0, 0, 1.0]])

# %%
#| export
def _fail(where: str, what: str) -> None: raise FormatError(f"{where}: {what}")

def parse_nifti_header(
    raw: bytes, # at least the first 348 bytes of the file, 540 for version 2
    where: str = "NIfTI", # name used in errors
) -> NiftiHeader: # checked fields
    "Read and check a NIfTI-1 or NIfTI-2 header"
    if len(raw) < 348: _fail(where, f"only {len(raw)} bytes, a NIfTI header has 348; the file is cut off or not NIfTI")
    order = next((o for o in "<>" if struct.unpack_from(f"{o}i", raw)[0] in (348, 540)), None)
    if order is None: _fail(where, f"is not NIfTI (starts with {raw[:8]!r})")
    get = lambda fmt, at: struct.unpack_from(order + fmt, raw, at)
    if get("i", 0)[0] == 348:
        version, magic, dim, (code, bitpix) = 1, raw[344:348], get("8h", 40), get("2h", 70)
        if magic[:3] not in (b"n+1", b"ni1"): _fail(where, f"magic is {magic!r}: Analyze or damaged, not NIfTI")
        pixdim, (offset, slope, inter), units = get("8f", 76), get("3f", 108), raw[123]
        codes, quatern, srow = get("2h", 252), get("6f", 256), get("12f", 280)
    else:
        if len(raw) < 540: _fail(where, f"only {len(raw)} bytes, a NIfTI-2 header has 540; the file is cut off")
        version, magic, (code, bitpix), dim = 2, raw[4:12], get("2h", 12), get("8q", 16)
        if magic[:3] not in (b"n+2", b"ni2"): _fail(where, f"magic is {magic!r}: damaged, not NIfTI-2")
        pixdim, (offset,), (slope, inter), units = get("8d", 104), get("q", 168), get("2d", 176), get("i", 500)[0]
        codes, quatern, srow = get("2i", 344), get("6d", 352), get("12d", 400)
    if magic[:2] == b"ni": _fail(where, "is the header of a .hdr/.img pair. Convert the pair to one .nii.gz file")
    if not 1 <= dim[0] <= 7: _fail(where, f"dim[0] is {dim[0]}, must be 1 to 7")
    dims = tuple(int(n) for n in dim[1:dim[0] + 1])
    if min(dims) < 1: _fail(where, f"sizes {dims} must all be >= 1")
    if code in _REFUSED:
        _fail(where, f"holds {_REFUSED[code]} voxels, only real numbers are supported. Convert the file")
    if code not in DTYPES: _fail(where, f"datatype code {code} is unknown")
    dtype = np.dtype(order + DTYPES[code])
    if bitpix != 8*dtype.itemsize:
        _fail(where, f"bitpix is {bitpix}, but {dtype.name} voxels have {8*dtype.itemsize} bits")
    if not np.isfinite(offset) or offset < (348 if version == 1 else 540) or offset > 2**31 or offset != int(offset):
        _fail(where, f"vox_offset is {offset}, out of range")
    if np.isfinite(slope) and slope != 0 and not np.isfinite(inter):
        _fail(where, f"scl_slope is {slope:g}, but scl_inter is {inter}: the values cannot be known")
    if sum(n != 1 for n in dims[3:]) > 1: _fail(where, f"sizes {dims}: more than one axis besides x, y, z")
    return NiftiHeader(version, dims, dtype, pixdim, int(offset), slope, inter, units & 7, *codes, quatern,
                       np.array(srow, np.float64).reshape(3, 4))

# %% [markdown]
# ## Decompression that gets to the checksum
# `gunzip` walks through all members of a gzip stream. Three limits hold from the start: the stream may not grow past
# the size the header promised, the promise may not exceed what deflate can do (1032 to 1), and the total may not
# exceed the budget. So a bomb of a few kilobytes is refused before memory is taken.

# %%
#| export
MAX_BYTES = int(os.environ.get("MEDVOL_MAX_BYTES", 16*2**30)) # largest array read from one file [byte]
_BLOCK = 1 << 17 # small enough that packed and unpacked block stay in the cache [byte]
_SLACK = 1 << 16 # bytes after the voxels that are tolerated

def _members(f: Any, where: str, max_out: int = 1 << 18) -> Iterator[bytes]:
    "Blocks of the decompressed stream of an open gzip file; ends only after the last checksum was verified"
    raw, member = f.read(_BLOCK), 0
    if not raw: _fail(where, "is empty")
    while raw:
        if member and not raw.strip(b"\0"): # zero padding after the last member is allowed
            raw = f.read(_BLOCK)
            continue
        if raw[:1] != b"\x1f":
            _fail(where, "is not gzip" if not member else "has foreign bytes after the compressed data")
        stream, member = fastzlib.decompressobj(wbits=31), member + 1
        try:
            while not stream.eof:
                if not raw: _fail(where, "ends early: the compressed data is cut off")
                block = stream.decompress(raw, max_out)
                raw = stream.unconsumed_tail if not stream.eof else b""
                if block: yield block
                if not raw and not stream.eof: raw = f.read(_BLOCK)
        except FormatError: raise
        except Exception as e: raise FormatError(f"{where}: damaged compressed data ({e})") from None
        raw = stream.unused_data or f.read(_BLOCK)

def gunzip_into(
    path: str | os.PathLike, # gzip file
    skip: int, # bytes of the stream to leave out at the start
    out: np.ndarray, # (n,) uint8 array to be filled
) -> None:
    "Fill `out` from a gzip stream, verifying every checksum to the end of the file"
    at, where, view = -skip, str(path), memoryview(out)
    with open(path, "rb") as f:
        for block in _members(f, where):
            lo, hi = max(at, 0), min(at + len(block), len(out))
            if hi > lo: view[lo:hi] = memoryview(block)[lo - at:hi - at]
            at += len(block)
            if at > len(out) + _SLACK: _fail(where, f"holds more than the {human_bytes(len(out))} its header announces")
    if at < len(out):
        _fail(where, f"ends early: {human_bytes(max(at, 0))} of {human_bytes(len(out))} voxel data are there")

# %%
#| export
def _open_checked(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists(): raise MissingFile(f"{path} does not exist")
    if not path.is_file(): _fail(str(path), "is a folder, not a NIfTI file")
    if path.stat().st_size == 0: _fail(str(path), "is empty")
    return path

def read_nifti_header(
    path: str | os.PathLike, # .nii or .nii.gz file
) -> NiftiHeader: # checked fields
    "Read only the header; of a compressed file only the first block is decompressed"
    path = _open_checked(path)
    with open(path, "rb") as f:
        raw = f.read(2048)
        if raw[:2] == b"\x1f\x8b":
            try: raw = fastzlib.decompressobj(wbits=31).decompress(raw, 1024)
            except Exception as e: raise FormatError(f"{path}: damaged compressed data ({e})") from None
            if len(raw) < 544: # a long gzip header, or the first of several members
                f.seek(0)
                raw = b""
                for block in _members(f, str(path), 1024):
                    raw += block
                    if len(raw) >= 544: break
    return parse_nifti_header(raw, str(path))

# %% [markdown]
# ## Reading
# The voxels come back as stored (`int16` stays `int16`) unless the header asks for scaling; then they become
# `float32`. Trailing axes of length one are dropped, and a fourth axis becomes channels in front. What is odd but
# usable is kept as `notes` in `Volume.meta`, with the codes of the verification pages.

# %%
#| export
def header_notes(
    head: NiftiHeader, # checked header
) -> list[tuple[str, str]]: # (code, text) of what is odd but usable
    "What a careful person would ask about this header"
    notes = []
    probe = np.broadcast_to(np.uint8(0), head.shape)
    if head.sform_code > 0 and head.qform_code > 0:
        try: gap = corner_displacement(Volume(probe, head.sform), Volume(probe, head.qform))
        except DataError: gap = None
        if gap is None or gap > 0.1*min(np.sqrt((head.sform[:3, :3]**2).sum(axis=0))):
            far = f" by up to {gap:.3g} mm" if gap else ""
            notes.append(("W205", f"q-form and s-form disagree{far}, s-form is used"))
    affine = head.affine
    zooms = np.sqrt((affine[:3, :3]**2).sum(axis=0))
    if zooms.all() and np.isfinite(zooms).all():
        cosines = affine[:3, :3]/zooms
        shear = np.abs(cosines.T @ cosines - np.eye(3)).max()
        if shear > 1e-3:
            off = np.degrees(np.arcsin(min(shear, 1)))
            notes.append(("W206", f"affine is sheared (axes {off:.2g} degrees off square)"))
    if head.qform_code <= 0 and head.sform_code <= 0:
        notes.append(("W207", "no orientation in the header, only voxel sizes"))
    elif np.allclose(affine, np.eye(4)): notes.append(("W207", "affine is the identity, probably a lost header"))
    if head.units not in (1, 2, 3): notes.append(("W207", "no length unit in the header, taken as millimetres"))
    if head.dtype.kind in "iu" and head.dtype.itemsize >= 4 and not head.has_scaling:
        notes.append(("W209", f"voxels are stored as {head.dtype.name}; int16 is enough for CT"))
    return notes

def _budget(head: NiftiHeader, path: Path, packed: bool, max_bytes: int) -> None:
    "Refuse sizes that cannot be true or are too large, before any memory is taken"
    size, where = path.stat().st_size, str(path)
    if head.nbytes > max_bytes:
        size_text = f"{human_bytes(head.nbytes)} ({' x '.join(map(str, head.dims))})"
        raise DataError(f"{where}: its header announces {size_text}, more than the budget of {human_bytes(max_bytes)}. "
                        f"Pass max_bytes, or set MEDVOL_MAX_BYTES")
    if packed and head.nbytes > 1040*size:
        _fail(where, f"{human_bytes(size)} cannot hold the announced {human_bytes(head.nbytes)}")
    if not packed and size < head.vox_offset + head.nbytes:
        _fail(where, f"ends early: {human_bytes(size)} of {human_bytes(head.vox_offset + head.nbytes)} are there")

def read_nifti(
    path: str | os.PathLike, # .nii or .nii.gz file, version 1 or 2, either byte order
    *,
    max_bytes: int = MAX_BYTES, # refuse files that announce more voxel data [byte]
) -> Volume: # axes xyz or cxyz, stored number type, or float32 if the header scales
    "Read a NIfTI file completely, with every checksum verified"
    path = _open_checked(path)
    head = read_nifti_header(path)
    with open(path, "rb") as f: packed = f.read(2) == b"\x1f\x8b"
    _budget(head, path, packed, max_bytes)
    raw = np.empty(head.nbytes, np.uint8)
    if packed: gunzip_into(path, head.vox_offset, raw)
    else:
        with open(path, "rb") as f:
            f.seek(head.vox_offset)
            if f.readinto(memoryview(raw)) != len(raw): _fail(str(path), "ends early while being read")
    data = raw.view(head.dtype).reshape((*head.shape, head.channels or 1), order="F")
    data = data.transpose(3, 0, 1, 2) if head.channels else data[..., 0]
    if not data.dtype.isnative: data = data.astype(data.dtype.newbyteorder("="))
    if head.has_scaling:
        data = data.astype(np.float32)
        data *= np.float32(head.slope)
        data += np.float32(head.inter)
    meta = {"path": str(path), "notes": tuple(header_notes(head)), "scaled": head.has_scaling}
    try: return Volume(data, head.affine, "cxyz" if head.channels else "xyz", MappingProxyType(meta))
    except DataError as e: raise FormatError(f"{path}: {e}") from None

# %% [markdown]
# ## Writing
# The same volume always gives the same bytes: no time stamp goes into the gzip header, and the compressor is zlib,
# since ISA-L was seen to pack equal data into different, though valid, streams in different processes. Both affines
# are written, so that every reader agrees; a sheared affine has no q-form. Types that few tools read are narrowed
# when nothing is lost.

# %%
#| export
def _storable(data: np.ndarray) -> np.dtype:
    "Number type to store: exact, and one that other tools read"
    kind = np.dtype(data.dtype)
    if kind.kind in "iuf": kind = kind.newbyteorder("=")
    if kind.kind == "b": return np.dtype(np.uint8)
    if kind == np.float16: return np.dtype(np.float32)
    if kind in (np.int64, np.uint64):
        lo, hi = (int(data.min()), int(data.max())) if data.size else (0, 0)
        return np.dtype(np.int32) if -2**31 <= lo and hi < 2**31 else kind
    if kind.str[1:] in DTYPES.values(): return kind
    raise DataError(f"NIfTI cannot hold {kind} voxels")

def _pack_header(shape: tuple[int, ...], channels: int | None, dtype: np.dtype, affine: np.ndarray, text: str) -> bytes:
    "348 or 540 bytes of header and the four bytes of 'no extension'"
    dims = [*shape] + ([channels] if channels else [])
    dim = [len(dims), *dims] + [1]*(7 - len(dims))
    code = next(k for k, v in DTYPES.items() if v == dtype.str[1:])
    zooms = np.sqrt((affine[:3, :3]**2).sum(axis=0))
    rotation = affine[:3, :3]/zooms
    qfac = -1.0 if np.linalg.det(rotation) < 0 else 1.0
    square = rotation*(1, 1, qfac)
    quatern, has_q = (0.0, 0.0, 0.0), np.abs(square.T @ square - np.eye(3)).max() < 1e-4
    if has_q:
        from scipy.spatial.transform import Rotation
        x, y, z, w = Rotation.from_matrix(square).as_quat()
        quatern = tuple(float(v)*(-1 if w < 0 else 1) for v in (x, y, z))
    pixdim, codes = [qfac, *zooms] + [1.0]*4, (1 if has_q else 0, 1)
    if max(dims) < 2**15:
        h = bytearray(352)
        struct.pack_into("<i", h, 0, 348)
        struct.pack_into("<8h", h, 40, *dim)
        struct.pack_into("<2h", h, 70, code, 8*dtype.itemsize)
        struct.pack_into("<8f3f", h, 76, *pixdim, 352.0, 1.0, 0.0)
        h[123], h[148:148 + len(text)], h[344:348] = 2, text.encode("ascii"), b"n+1\0"
        struct.pack_into("<2h6f12f", h, 252, *codes, *quatern, *affine[:3, 3], *affine[:3].ravel())
    else:
        h = bytearray(544)
        struct.pack_into("<i8s2h8q", h, 0, 540, b"n+2\0\r\n\x1a\n", code, 8*dtype.itemsize, *dim)
        struct.pack_into("<8dq2d", h, 104, *pixdim, 544, 1.0, 0.0)
        struct.pack_into("<2i6d12d", h, 344, *codes, *quatern, *affine[:3, 3], *affine[:3].ravel())
        h[240:240 + len(text)] = text.encode("ascii")
        struct.pack_into("<i", h, 500, 2)
    return bytes(h)

# %%
#| export
def write_nifti(
    vol: Volume, # axes xyz or cxyz; real numbers or bool
    path: str | os.PathLike, # .nii or .nii.gz file
    on_exists: OnExists = "error", # what to do when `path` is there already
    *,
    level: int = 1, # compression, 0 (none), 1 (fast) to 9 (small); .nii.gz only
) -> Path: # `path`
    "Write a NIfTI file atomically; equal volumes give equal bytes"
    path = Path(path)
    if not 0 <= level <= 9: raise DataError(f"level: must be 0 to 9, got {level}")
    if not path.name.endswith((".nii", ".nii.gz")): raise DataError(f"{path}: NIfTI files end in .nii or .nii.gz")
    if vol.spatial_axes != "xyz":
        raise DataError(f"{path}: NIfTI holds xyz volumes, got {vol.axes}. Use to_axes(vol, 'xyz')")
    if 0 in vol.data.shape: raise DataError(f"{path}: NIfTI cannot hold a volume of shape {tuple(vol.data.shape)}")
    if not check_output(path, on_exists): return path
    lead = vol.channels is not None
    wide = vol.dtype.kind in "iu" and vol.dtype.itemsize == 8
    dtype = _storable(np.asarray(vol.data[...]) if wide else vol.data)
    parts = range(vol.channels) if lead else [None]
    with atomic(path) as t, open(t, "wb") as f:
        packer = zlib.compressobj(level, wbits=31) if path.name.endswith(".gz") else None
        put = f.write if packer is None else lambda b: f.write(packer.compress(b))
        put(_pack_header(vol.shape, vol.channels, dtype, vol.affine, "medvol_nb"))
        rows = max(1, (1 << 22)//max(1, vol.shape[0]*vol.shape[1]*dtype.itemsize))
        for part in parts:
            for k in range(0, vol.shape[2], rows):
                slab = vol.data[..., k:k + rows] if part is None else vol.data[part, ..., k:k + rows]
                put(np.ascontiguousarray(np.asarray(slab, dtype).T).data)
        if packer is not None: f.write(packer.flush())
    return path

# %%
patient = phantoms.head()
turned = affine_from(patient.spacing, (-20, 5, 7))
turned[:2, :2] = np.array([[.96, -.28], [.28, .96]]) @ turned[:2, :2]
with tmpdir() as d:
    write_nifti(Volume(patient.lbl, turned), d/"lbl.nii.gz")
    back, head = read_nifti(d/"lbl.nii.gz"), read_nifti_header(d/"lbl.nii.gz")
    first = (d/"lbl.nii.gz").read_bytes()
    write_nifti(Volume(patient.lbl, turned), d/"lbl.nii.gz", "overwrite")
    second = (d/"lbl.nii.gz").read_bytes()
back, f"{patient.lbl.nbytes/len(first):.0f} : 1"

# %%
assert np.array_equal(back.data, patient.lbl) and first == second
assert close(back.affine, turned, 1e-5) and close(head.qform, head.sform, 1e-5)

# %% [markdown]
# Now the damage. A hundred files with one flipped bit each: either the flip is noticed, or it hit one of the few bytes
# that carry no information (such as the operating system in the gzip header) and the image is unchanged.

# %%
from medvol_nb.core import rng_for

outcome = {"noticed": 0, "harmless": 0, "wrong": 0}
with tmpdir() as d:
    for n in range(100):
        bad, at = bytearray(first), rng_for(0, "flip", n).integers(0, len(first)*8)
        bad[at//8] ^= 1 << at % 8
        (d/"bad.nii.gz").write_bytes(bad)
        try: outcome["harmless" if np.array_equal(read_nifti(d/"bad.nii.gz").data, patient.lbl) else "wrong"] += 1
        except (FormatError, DataError): outcome["noticed"] += 1
    for n in range(100):
        (d/"cut.nii.gz").write_bytes(first[:n*len(first)//100])
        with raises(FormatError): read_nifti(d/"cut.nii.gz")
outcome

# %%
assert outcome["wrong"] == 0 and outcome["noticed"] >= 90

# %% [markdown]
# A header that promises terabytes, and a small file that unpacks to a gigabyte:

# %%
with tmpdir() as d:
    bomb = bytearray(_pack_header((30000, 30000, 30000), None, np.dtype("u1"), np.eye(4), ""))
    (d/"bomb.nii").write_bytes(bomb)
    with raises(DataError, match="announces 24.6 TiB .* more than the budget"): read_nifti(d/"bomb.nii")
    small = _pack_header((64, 64, 64), None, np.dtype("u1"), np.eye(4), "")
    packer = fastzlib.compressobj(1, wbits=31)
    (d/"bomb.nii.gz").write_bytes(packer.compress(small + bytes(2**26)) + packer.flush())
    with raises(FormatError, match="more than the 256.0 KiB its header announces"): read_nifti(d/"bomb.nii.gz")
    (d/"x.nii.gz").write_text("<html>404"*99)
    with raises(FormatError, match="is not NIfTI"): read_nifti(d/"x.nii.gz")
