# %% [markdown]
# # Checking images and labels
#
# > What is wrong with an image and its label, pair by pair: headers of many files at once, every voxel on request.
#
# A label on another grid, a truncated file among ten thousand, a label with fractions in it: each is silent, and each
# costs weeks. Checking must therefore be something one does every time. So it has to be fast, it must not stop at the
# first finding, and it must tell harmless from fatal: a direction cosine that differs in the eighth decimal is not an
# error, half a voxel is. The next page adds what no single pair shows, and makes one table of it.
#
# Three levels, each containing the one before: `exists` asks the file system, `header` reads a few hundred bytes of
# every file, `full` reads every voxel once.

# %%
#| default_exp checks

# %%
#| export
import contextlib
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from medvol_nb.core import MedvolError, MissingFile, fingerprint
from medvol_nb.nifti import DTYPES, fastzlib, read_nifti, read_nifti_header
from medvol_nb.parallel import Ledger, on_cluster, pmap
from medvol_nb.volume import Volume, corner_displacement, read_header, read_volume, reorient, to_axes

# %%
from medvol_nb import phantoms
from medvol_nb.core import tmpdir
from medvol_nb.volume import affine_from, write_volume

# %% [markdown]
# ## Findings and their codes
# A code says what, a severity says how bad, a hint says what to do. `E` stops a training or poisons it, `W` is
# something a person should know.

# %%
#| export
CODES: Mapping[str, tuple[str, str]] = MappingProxyType({
    "E101": ("image missing", "Restore the file or take the item out of the list"),
    "E102": ("label missing", "Restore the file or take the item out of the list"),
    "E103": ("duplicate path in a list", "Keep one of the items"),
    "E104": ("same file used as image and label", "Correct the item"),
    "W105": ("file not referenced by any list", "Add it, or leave it out on purpose"),
    "E106": ("path not allowed", "Use names relative to the dataset's folder"),
    "E201": ("unreadable header", "Restore the file from its source"),
    "E202": ("shape mismatch", "Resample the label to the image"),
    "E203": ("geometry mismatch", "Resample the label to the image, or fix the header"),
    "W204": ("geometry differs within tolerance", "Nothing, or copy the image's header to the label"),
    "W205": ("q-form and s-form disagree", "Write the file again with one affine"),
    "W206": ("affine is not orthogonal", "Resample to a rectangular grid"),
    "W207": ("no unit, or no orientation", "Check the orientation with `medvol view`"),
    "E208": ("wrong dimensionality", "Extract one volume"),
    "W209": ("unusual number type", "Convert labels to integers, CT to int16"),
    "W210": ("label with intensity scaling", "Write the label again without scl_slope"),
    "W211": ("image and label stored in different orientations", "Load both through one orientation, such as RAS"),
    "E301": ("damaged file", "Restore the file from its source"),
    "E302": ("label values are not whole numbers", "Find out which tool interpolated the label"),
    "E303": ("label values outside the label dictionary", "Correct label_dict, or the label"),
    "W304": ("class absent from all cases", "Correct label_dict, or drop the class"),
    "W305": ("empty label", "Take the item out, or mark it as unlabelled"),
    "W306": ("NaN or infinite voxels", "Replace them before training"),
    "W307": ("constant image", "Restore the file from its source"),
    "W308": ("label lies outside the image's foreground", "Look for a flipped label with `medvol view`"),
    "W309": ("crop whose affine was not moved along", "Set the origin to that of the first kept voxel"),
    "E401": ("same content on both sides of a split", "Keep the case in one of them"),
    "E402": ("subject in several folds, or in training and test", "Split by subject"),
    "W403": ("same content under two names", "Keep one, or put both in the same fold"),
    "W404": ("class without a global id", "Map it, or leave it unmapped on purpose"),
    "E405": ("unmapped local id equals another class's global id", "Relabel with unmapped='ignore'"),
    "E406": ("duplicate global id", "Give each class its own id"),
    "W407": ("class names that are nearly the same", "Add an alias"),
})

@dataclass(frozen=True)
class Finding:
    "One thing that is wrong or odd"
    code: str # a key of CODES
    dataset: str # name of the list
    item: str # where in the list, such as 'training/17'; empty for the list as a whole
    path: str # file it is about
    message: str # what was measured, and what was expected

    @property
    def severity(self) -> str: return "error" if self.code[0] == "E" else "warning"
    @property
    def hint(self) -> str: return CODES[self.code][1]
    def row(self) -> dict[str, str]: # column -> text
        "As a row of a table"
        return {"code": self.code, "severity": self.severity, "dataset": self.dataset, "item": self.item,
                "path": self.path, "finding": f"{CODES[self.code][0]}: {self.message}", "hint": self.hint}
    def __str__(self) -> str:
        where = " ".join(x for x in (f"dataset '{self.dataset}'", self.item, self.path) if x)
        return f"{self.code} {CODES[self.code][0]}: {where}: {self.message}. Hint: {self.hint}"

# %% [markdown]
# ## Twenty thousand headers
# Opening a file with a general reader costs more than a millisecond, most of it spent on making objects. Nearly all
# headers have nothing wrong with them, and to establish *that* needs no objects: the first 352 bytes of many files go
# into one array, the fields are columns of that array, and every check is one vectorised comparison. Only what looks
# odd is read again by the careful reader, which words the finding.
#
# A compressed file gives away more: its last eight bytes are the checksum and the length of the content; checksum and
# length together identify it. The length, of an uncompressed file its size, must be what the header promises, or the
# file is cut off.

# %%
#| export
_FIELDS = np.dtype({"names": ["size", "dim", "code", "bitpix", "pixdim", "offset", "slope", "inter", "units", "qcode",
                              "scode", "quatern", "srow", "magic"],
                    "formats": ["<i4", ("<i2", 8), "<i2", "<i2", ("<f4", 8), "<f4", "<f4", "<f4", "u1", "<i2", "<i2",
                                ("<f4", 6), ("<f4", (3, 4)), "S4"],
                    "offsets": [0, 40, 70, 72, 76, 108, 112, 116, 123, 252, 254, 256, 280, 344], "itemsize": 352})
_BITS = np.zeros(1 << 16, np.int16)
for _code, _kind in DTYPES.items(): _BITS[_code] = 8*int(_kind[1])

@dataclass
class _Heads:
    "Headers of many files as columns"
    fields: np.ndarray # (n,) of _FIELDS
    plain: np.ndarray # (n,) bool: a little-endian NIfTI-1 file with nothing unusual in its header
    crc: np.ndarray # (n,) uint32 from the gzip trailer; 0 if there is none
    nbytes: np.ndarray # (n,) int64 content length: from the trailer, or the file's size

def _peek(path: str, row: memoryview) -> tuple[int, int]:
    "Put the first 352 bytes of the content into `row`; returns checksum and length of the content"
    fd = os.open(path, os.O_RDONLY)
    try:
        raw = os.read(fd, 1024)
        end = os.lseek(fd, 0, os.SEEK_END)
        if raw[:2] == b"\x1f\x8b":
            bare = raw[3] == 0 # nothing but ten bytes of gzip header: skip them, and their checksum's set-up
            raw = zlib.decompressobj(-15 if bare else 31).decompress(raw[10:] if bare else raw, 352)
            tail = os.pread(fd, 8, max(end - 8, 0))
            crc, length = int.from_bytes(tail[:4], "little"), int.from_bytes(tail[4:], "little")
        else: crc, length = 0, end
    finally: os.close(fd)
    raw = raw[:352]
    row[:len(raw)] = raw
    return crc, length

def _affines(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "(n, 3, 4) s-form and q-form [mm] of many headers"
    b, c, d = (h["quatern"][:, k].astype(np.float64) for k in range(3))
    rest = 1 - b*b - c*c - d*d
    half = rest < 3.6e-7
    norm = np.where(half, np.maximum(np.sqrt(b*b + c*c + d*d), 1e-30), 1.0)
    b, c, d, a = b/norm, c/norm, d/norm, np.sqrt(np.where(half, 0, np.maximum(rest, 0)))
    r = np.array([[a*a+b*b-c*c-d*d, 2*(b*c-a*d), 2*(b*d+a*c)], [2*(b*c+a*d), a*a+c*c-b*b-d*d, 2*(c*d-a*b)],
                  [2*(b*d-a*c), 2*(c*d+a*b), a*a+d*d-b*b-c*c]]).transpose(2, 0, 1)
    zooms = h["pixdim"][:, 1:4].astype(np.float64)
    zooms[:, 2] *= np.where(h["pixdim"][:, 0] < 0, -1, 1)
    q = np.concatenate([r*zooms[:, None, :], h["quatern"][:, 3:, None].astype(np.float64)], axis=2)
    return h["srow"].astype(np.float64), q

def _displacement(a: np.ndarray, b: np.ndarray, shape: np.ndarray) -> np.ndarray:
    "Largest distance between the corner voxels of pairs of grids: (n, 3, 4), (n, 3, 4), (n, 3) -> (n,) [mm]"
    difference, last = a - b, shape.astype(np.float64) - 1
    worst = np.zeros(len(a))
    for corner in np.ndindex(2, 2, 2):
        at = difference[:, :, :3] @ (last*corner)[:, :, None]
        worst = np.maximum(worst, ((at[:, :, 0] + difference[:, :, 3])**2).sum(axis=1))
    return np.sqrt(worst)

# %%
#| export
def _heads(paths: Sequence[str]) -> _Heads:
    "Headers of many files at once; `plain` tells which of them have nothing odd about them"
    n = len(paths)
    buffer = np.zeros((n, 352), np.uint8)
    view = memoryview(buffer.reshape(-1))
    crc, nbytes, odd = np.zeros(n, np.uint32), np.zeros(n, np.int64), []
    for i, path in enumerate(paths):
        if not path.endswith((".nii.gz", ".nii")): continue
        try: crc[i], nbytes[i] = _peek(path, view[352*i:352*(i + 1)])
        except (OSError, zlib.error): odd.append(i) # the careful reader says what it is
    h = buffer.reshape(-1).view(_FIELDS)
    with np.errstate(all="ignore"):
        s, q = _affines(h)
        dims, shape = h["dim"][:, 1:4], h["dim"][:, 1:4].astype(np.int64)
        bits = _BITS[h["code"].astype(np.uint16)]
        content = shape.prod(axis=1)*(bits//8) + h["offset"].astype(np.int64)
        zooms = np.sqrt((s[:, :, :3]**2).sum(axis=1))
        cosines = s[:, :, :3]/zooms[:, None, :]
        shear = np.abs(cosines.transpose(0, 2, 1) @ cosines - np.eye(3)).max(axis=(1, 2))
        scaled = np.isfinite(h["slope"]) & (h["slope"] != 0) & ((h["slope"] != 1) | (h["inter"] != 0))
        gap = _displacement(s, q, shape)
        plain = ((h["size"] == 348) & (h["magic"] == b"n+1") & (h["dim"][:, 0] == 3) & (dims >= 1).all(axis=1)
                 & (bits > 0) & (bits == h["bitpix"]) & (h["offset"] == 352) & np.isfinite(s).all(axis=(1, 2))
                 & (zooms > 1e-9).all(axis=1) & (shear < 1e-3) & (h["scode"] > 0) & (h["units"] & 7 == 2) & ~scaled
                 & ((h["qcode"] <= 0) | (gap <= 0.1*zooms.min(axis=1))) & (bits < 32)
                 & (np.abs(s[:, :, :3] - np.eye(3)).max(axis=(1, 2)) > 0) & (content % 2**32 == nbytes % 2**32))
    plain[odd] = False
    return _Heads(h, plain, crc, nbytes)

# %% [markdown]
# ## One pair, carefully
# The careful reader opens what the fast one did not pass, in any format. Image and label are compared in one
# orientation: it is no error that a label is stored the other way round, only something that pairing by index would
# get wrong.

# %%
#| export
_Raw = tuple[str, str, str] # code, role ('image', 'label'), message

def _remarks(vol: Volume, role: str) -> list[_Raw]:
    "What is odd about a header that could be read"
    found = [(code, role, text) for code, text in vol.meta.get("notes", ())]
    if role == "label":
        if vol.channels is not None: found.append(("E208", role, f"has {vol.channels} channels, a label has one"))
        if vol.meta.get("scaled"): found.append(("W210", role, "the header scales its values"))
        elif vol.dtype.kind == "f": found.append(("W209", role, f"is stored as {vol.dtype.name}"))
    elif vol.dtype == np.uint16: found.append(("W209", role, "is stored as uint16, CT numbers have lost their sign"))
    return found

def _open(path: str, role: str, found: list[_Raw]) -> Volume | None:
    "Header of one file, with findings for what is odd about it"
    if not os.path.exists(path):
        found.append(("E101" if role == "image" else "E102", role, "does not exist"))
        return None
    try: head = read_header(path)
    except MissingFile as e:
        found.append(("E101" if role == "image" else "E102", role, str(e)))
        return None
    except (MedvolError, OSError) as e:
        text = str(e).removeprefix(f"{path}: ")
        odd_shape = "axis besides" in text or "dimensions, a volume" in text
        found.append(("E208" if odd_shape else "E201", role, text))
        return None
    found += _remarks(head, role)
    return head

def compare_pair(
    image: Volume, # header or volume
    label: Volume, # header or volume
) -> list[tuple[str, str, str]]: # (code, 'label', message) of what does not agree
    "Whether a label lies on its image's grid: the largest distance between corner voxels decides"
    grid = lambda v: Volume(np.broadcast_to(np.uint8(0), v.shape), v.affine, v.spatial_axes)
    a, b = (reorient(grid(v), "RAS") for v in (image, label))
    numbers = lambda v: "(" + ", ".join(f"{x:.4g}" for x in v) + ")"
    found = []
    if image.orientation != label.orientation and image.spatial_axes == label.spatial_axes:
        found.append(("W211", "label", f"image is {image.orientation}, label is {label.orientation}"))
    if a.shape != b.shape:
        return [*found, ("E202", "label", f"shape is {label.shape}, its image has {image.shape}")]
    gap, size = corner_displacement(a, b), min(a.spacing)
    if gap > 0.1*size:
        found.append(("E203", "label", f"grid is displaced by {gap:.3g} mm ({gap/size:.3g} voxels) from the image's; "
                      f"image spacing {numbers(image.spacing)}, label spacing {numbers(label.spacing)}, origins "
                      f"{numbers(image.affine[:3, 3])} and {numbers(label.affine[:3, 3])}"))
    elif gap > 1e-3: found.append(("W204", "label", f"grid differs by {gap:.2g} mm from that of the image"))
    return found

def _check_headers(pairs: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    "Header level for a chunk of pairs: findings by pair, and what identifies each content"
    heads = [_heads([p[k] or "" for p in pairs]) for k in (0, 1)]
    img, lbl = heads
    with np.errstate(all="ignore"):
        si, sl = (h.fields["srow"].astype(np.float64) for h in heads)
        same = (img.fields["dim"][:, 1:4] == lbl.fields["dim"][:, 1:4]).all(axis=1)
        near = _displacement(si, sl, img.fields["dim"][:, 1:4].astype(np.int64)) <= 1e-3
    kinds = lbl.fields["code"]
    whole = ~np.isin(kinds, (16, 64)) # floating point labels are looked at
    clean = img.plain & lbl.plain & same & near & whole & (img.fields["code"] != 512)
    found: dict[str, list] = {}
    for i, (image, label) in enumerate(pairs):
        if clean[i]: continue
        if label is None and img.plain[i] and img.fields["code"][i] != 512: continue
        rows: list[_Raw] = []
        a = _open(image, "image", rows)
        b = _open(label, "label", rows) if label is not None else None
        if a is not None and b is not None: rows += compare_pair(a, b)
        for role, head, k in (("image", a, 0), ("label", b, 1)):
            if head is not None and heads[k].nbytes[i]: rows += _cut_off(pairs[i][k], role, int(heads[k].nbytes[i]))
        if rows: found[str(i)] = rows
    both = lambda h: np.where(h.crc > 0, h.crc.astype(np.uint64) << 32 | h.nbytes.astype(np.uint64), 0)
    return {"found": found, "ids": np.stack([both(h) for h in heads], 1).astype("<u8").tobytes().hex()}

def _cut_off(path: str, role: str, length: int) -> list[_Raw]:
    "If the length of the content is not what the header promises, read it all to know"
    raw = read_nifti_header(path)
    if (raw.vox_offset + raw.nbytes) % 2**32 == length % 2**32: return []
    try: read_nifti(path)
    except (MedvolError, OSError) as e: return [("E301", role, str(e).removeprefix(f"{path}: "))]
    return []

# %% [markdown]
# ## Every voxel, once
# The full level decompresses each file once and takes from that one pass both what verification and what analysis need:
# label counts, intensity statistics, checksums of the voxels. The statistics must not cost more than the
# decompression, so counting skips the background eight voxels at a time.

# %%
#| export
def _flat(a: np.ndarray) -> np.ndarray: # (n,) in storage order, without a copy if that is contiguous
    return np.ascontiguousarray(a.T if a.flags.f_contiguous else a).reshape(-1)

def _labelled(lbl: np.ndarray, img: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    "Labels other than 0, and the intensities below them; the background is skipped eight bytes at a time"
    if img is not None and not (img.flags.f_contiguous and lbl.flags.f_contiguous):
        img, lbl = (np.asfortranarray(a) if img.flags.f_contiguous else np.ascontiguousarray(a) for a in (img, lbl))
    flat, per = _flat(lbl), 8//lbl.dtype.itemsize
    n = len(flat)//per*per
    words = flat[:n].view(np.uint64)
    hit = words != 0
    labels = np.concatenate([words[hit].view(flat.dtype), flat[n:]])
    inside = labels != 0
    if img is None: return labels[inside], None
    values = _flat(img)
    blocks = values[:n].view(np.dtype((np.void, per*values.dtype.itemsize))) # as many intensities as a word has labels
    return labels[inside], np.concatenate([blocks[hit].view(values.dtype), values[n:]])[inside]

def _counts(labels: np.ndarray, total: int) -> dict[int, int]:
    "Voxels of each label, from the labels other than 0 and the number of all voxels"
    if not len(labels): ids, counts = [], []
    elif labels.dtype.itemsize == 1 or (labels.min() >= 0 and labels.max() < 1 << 16):
        counts = np.bincount(labels.view(np.uint8) if labels.dtype.itemsize == 1 else labels.astype(np.int64))
        ids = np.flatnonzero(counts)
        counts = counts[ids]
        if labels.dtype == np.int8: ids = ids.astype(np.uint8).view(np.int8)
    else: ids, counts = np.unique(labels, return_counts=True)
    out = {int(k): int(c) for k, c in zip(ids, counts)}
    if total > len(labels): out[0] = total - len(labels)
    return dict(sorted(out.items()))

def _whole(lbl: np.ndarray) -> np.ndarray:
    "A label map as integers"
    return lbl.view(np.uint8) if lbl.dtype.kind == "b" else lbl.astype(np.int64) if lbl.dtype.kind == "f" else lbl

def count_labels(
    lbl: np.ndarray, # (x, y, z) whole numbers of any type
) -> dict[int, int]: # label id -> voxels, ascending; 0 included
    "Voxels of every label"
    lbl = _whole(lbl)
    return _counts(_labelled(lbl)[0], lbl.size)

# %%
patient = phantoms.abdomen()
count_labels(patient.lbl)

# %%
for kind in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64):
    ids, counts = np.unique(patient.lbl, return_counts=True)
    assert count_labels(patient.lbl.astype(kind)) == dict(zip(ids.tolist(), counts.tolist()))
assert count_labels(np.array([[[-3, 0, 70000]]])) == {-3: 1, 0: 1, 70000: 1}

# %%
#| export
FLIPS = tuple(np.ndindex(2, 2, 2))

def _foreground(img: np.ndarray) -> np.ndarray:
    "Rough foreground of an image: not air in a CT, brighter than the background in anything else"
    return img > (-500 if img.min() <= -500 else 0.05*np.percentile(img, 99))

def _every(img: np.ndarray, lbl: np.ndarray, most: int = 32) -> tuple[np.ndarray, np.ndarray]:
    "A coarse look at both: every n-th voxel"
    pick = tuple(slice(None, None, max(1, n//most)) for n in img.shape)
    return np.nan_to_num(np.asarray(img[pick], np.float32), nan=0, posinf=0, neginf=0), lbl[pick] != 0

def flip_scores(
    img: np.ndarray, # (x, y, z) intensities
    lbl: np.ndarray, # (x, y, z) label on the same grid
) -> dict[tuple[int, int, int], float]: # flipped axes -> share of the label inside the body, [0, 1]
    "How much of a label lies inside the image's foreground, for the label as it is and flipped along its axes"
    img, mask = _every(img, lbl, 48)
    from scipy.ndimage import binary_fill_holes
    body = binary_fill_holes(_foreground(img))
    total = max(1, int(mask.sum()))
    return {f: float((body & mask[tuple(slice(None, None, -1 if k else 1) for k in f)]).sum())/total for f in FLIPS}

def intensity_facts(
    values: np.ndarray, # (n,) intensities, finite
) -> dict[str, float]: # n, mean, std, min, max and percentiles 0.5, 50, 99.5
    "Summary of the intensities of a foreground"
    if not len(values): return {"n": 0}
    low = int(values.min()) if values.dtype.kind in "iu" else 0
    if values.dtype.kind in "iu" and int(values.max()) - low < 1 << 18:
        counts = np.bincount(np.subtract(values, low, dtype=np.int64))
        total, x = int(counts.sum()), np.arange(len(counts), dtype=np.float64) + low
        mean = float((counts*x).sum()/total)
        std, cumulated = float(np.sqrt((counts*(x - mean)**2).sum()/total)), np.cumsum(counts)
        p = [float(x[np.searchsorted(cumulated, q*(total - 1), side="right")]) for q in (0.005, 0.5, 0.995)]
        ends = low, int(x[-1])
    else:
        values = values.astype(np.float64)
        mean, std, ends = float(values.mean()), float(values.std()), (values.min(), values.max())
        p = [float(v) for v in np.percentile(values, (0.5, 50, 99.5), method="lower")]
    return {"n": len(values), "mean": mean, "std": std, "min": float(ends[0]), "max": float(ends[1]), "p0.5": p[0],
            "p50": p[1], "p99.5": p[2]}

# %%
#| export
def _voxels(path: str, role: str, found: list[_Raw]) -> Volume | None:
    "A whole file; findings instead of exceptions"
    if not os.path.exists(path): found.append(("E101" if role == "image" else "E102", role, "does not exist"))
    else:
        try:
            vol = read_volume(path)
            found += _remarks(vol, role)
            return vol
        except (MedvolError, OSError, ValueError) as e: found.append(("E301", role, str(e).removeprefix(f"{path}: ")))
    return None

def measure_pair(
    image: str, # image file
    label: str | None, # label file, None for an unlabelled image
) -> dict[str, Any]: # 'found': [code, role, message], 'facts': for the analysis, 'ids': of the contents
    "Read a pair completely, once: findings and statistics"
    found: list[_Raw] = []
    img = _voxels(image, "image", found)
    lbl = _voxels(label, "label", found) if label is not None else None
    facts: dict[str, Any] = {}
    if img is not None:
        low, high = img.data.min(), img.data.max()
        if not np.isfinite(low + high):
            found.append(("W306", "image", f"{np.count_nonzero(~np.isfinite(img.data))} voxels are NaN or infinite"))
        elif low == high: found.append(("W307", "image", f"every voxel is {low}"))
        facts["image"] = {"shape": list(img.shape), "spacing": [round(s, 6) for s in img.spacing],
                          "dtype": img.dtype.name, "orientation": img.orientation, "channels": img.channels or 1,
                          **{k: float(v) if np.isfinite(v) else None for k, v in (("min", low), ("max", high))}}
    if img is not None and lbl is not None: found += compare_pair(img, lbl)
    if lbl is not None: found += _label_facts(lbl, img, facts, {code for code, *_ in found})
    return {"found": found, "facts": facts, "ids": [0 if v is None else _content(v.data) for v in (img, lbl)]}

def _content(data: np.ndarray) -> int:
    "64 bits that identify voxels and shape, not the header"
    flat = _flat(data)
    return fastzlib.crc32(flat.view(np.uint8)) << 32 | int(fingerprint([list(data.shape), data.dtype.str], 8), 16)

def _label_facts(lbl: Volume, img: Volume | None, facts: dict[str, Any], codes: set[str]) -> list[_Raw]:
    "Counts of the labels, and what lies below them if the image is on the same grid"
    data, found = lbl.data, []
    if data.dtype.kind == "f" and not np.array_equal(data, np.round(data)):
        some = np.unique(data[data != np.round(data)])[:3].tolist()
        return [("E302", "label", f"holds fractions or NaN, such as {some}")]
    whole, image = _whole(data), None
    if img is not None and data.ndim == 3 and not codes & {"E202", "E203"}:
        if img.channels is not None: img = replace(img, data=img.data[0], axes=img.spatial_axes)
        image = img.data
        if img.orientation != lbl.orientation or img.axes != lbl.axes:
            world = to_axes(img, "xyz").orientation
            whole = to_axes(reorient(to_axes(replace(lbl, data=whole), "xyz"), world), img.axes).data
    labels, values = _labelled(whole, image)
    facts["label"] = {"counts": {str(k): n for k, n in _counts(labels, whole.size).items()},
                      "voxel_ml": float(np.prod(lbl.spacing))/1000}
    if not len(labels): return [("W305", "label", "no voxel is labelled")]
    if image is None: return found
    facts["foreground"] = intensity_facts(values[np.isfinite(values)] if values.dtype.kind == "f" else values)
    coarse, mask = _every(image, whole)
    if mask.any() and (_foreground(coarse) & mask).sum() < 0.5*mask.sum(): # a closer look, with cavities filled
        scores = flip_scores(image, whole)
        own, best = scores[0, 0, 0], max(FLIPS, key=lambda f: scores[f])
        if own < 0.5:
            along = ", ".join(a for a, k in zip("xyz", best) if k)
            better = f"; {scores[best]:.0%} when flipped along {along}" if along else ""
            found.append(("W308", "label", f"only {own:.0%} of it lies inside the body{better}"))
    return found

# %%
{k: round(v, 1) for k, v in intensity_facts(patient.img[patient.lbl == 1]).items()}

# %%
liver = intensity_facts(_labelled((patient.lbl == 1).astype(np.uint8), patient.img)[1])
exact = patient.img[patient.lbl == 1]
assert liver["n"] == len(exact) and abs(liver["mean"] - exact.mean()) < 1e-9 and abs(liver["std"] - exact.std()) < 1e-9
assert liver["p50"] == np.percentile(exact, 50, method="lower")
assert max(flip_scores(patient.img, patient.lbl).values()) == flip_scores(patient.img, patient.lbl)[0, 0, 0] > 0.9

# %% [markdown]
# ## Many pairs, and a memory of them
# Pairs are dealt into chunks, chunks go to workers, and the result of each is remembered under the names, sizes and
# times of its files. A second run over unchanged files reads nothing; a killed run loses the chunk it was working on.

# %%
#| export
Level = Literal["exists", "header", "full"]
_VERSION = 1
_CHUNK = 512

def _stamps(pairs: Sequence[tuple[str, str | None]]) -> str:
    "Hash of the names, sizes and times of files, one per line"
    lines = []
    for path in (p for pair in pairs for p in pair):
        if path is None: lines.append("")
        else:
            try: s = os.stat(path)
            except OSError: lines.append(f"{path!r} absent")
            else: lines.append(f"{path!r} {s.st_size} {s.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:24]

def _look(chunk: Sequence[tuple[str, str | None]], level: str) -> dict[str, Any]:
    "Work of one chunk, in a worker"
    if level == "header": return _check_headers(chunk)
    if level == "full":
        done = [measure_pair(*p) for p in chunk]
        found = {str(i): d["found"] for i, d in enumerate(done) if d["found"]}
        ids = np.array([d["ids"] for d in done], "<u8").tobytes().hex()
        return {"found": found, "ids": ids, "facts": [d["facts"] for d in done]}
    gone = {str(i): [(c, r, "does not exist") for c, r, p in (("E101", "image", a), ("E102", "label", b))
                     if p is not None and not os.path.exists(p)] for i, (a, b) in enumerate(chunk)}
    return {"found": {i: rows for i, rows in gone.items() if rows}, "ids": bytes(16*len(chunk)).hex()}

def _bytes(pairs: Sequence[tuple[str, str | None]]) -> int:
    "Size of the files on disk, 0 for those that cannot be asked"
    total = 0
    for path in (p for pair in pairs for p in pair if p is not None):
        with contextlib.suppress(OSError): total += os.stat(path).st_size
    return total

@dataclass(frozen=True, eq=False)
class Checked(Sequence):
    "Results of many pairs; takes memory for those that have something to report, and 16 bytes for the others"
    found: dict[int, list[_Raw]] # pair number -> findings; pairs without are left out
    ids: np.ndarray # (n, 2) uint64 that identify the contents of image and label; 0: unknown
    facts: list[dict[str, Any]] # statistics of each pair at the full level, else empty

    def __len__(self) -> int: return len(self.ids)
    def __getitem__(self, i: Any) -> Any: # dict with 'found', 'ids', 'facts'
        if isinstance(i, slice): return [self[k] for k in range(len(self))[i]]
        k = range(len(self))[i]
        facts = self.facts[k] if self.facts else {}
        return {"found": self.found.get(k, []), "ids": tuple(map(int, self.ids[k])), "facts": facts}
    def __eq__(self, other: Any) -> bool: return list(self) == list(other)

def check_pairs(
    pairs: Sequence[tuple[str, str | None]], # (image, label) files; None: unlabelled
    level: Level = "header", # how deep to look
    *,
    workers: int = 0, # processes; 0: this one, -1: one per processor
    dask: str | None = None, # address of a Dask scheduler whose workers see the same files
    cache: str | os.PathLike | None = None, # folder that remembers what was looked at; None: forget
) -> Checked: # per pair: findings, content and, at the full level, statistics
    "Look at many pairs, skipping those that did not change since the cache saw them"
    size = 1 if level == "full" else _CHUNK
    chunks = [pairs[i:i + size] for i in range(0, len(pairs), size)]
    order = sorted(range(len(chunks)), key=lambda n: -_bytes(chunks[n])) if level == "full" else range(len(chunks))
    chunks = [chunks[n] for n in order] # the largest first, so that no worker is left with one at the end
    def run(ledger: Ledger | None) -> tuple:
        with on_cluster(dask):
            return pmap(lambda c: _look(c, level), chunks, workers, ledger=ledger, desc=f"verifying ({level})",
                        keys=keys, errors="collect")
    keys = [str(n) if cache is None else f"{n}-{_stamps(c)}" for n, c in zip(order, chunks)]
    if cache is None: values, failures = run(None)
    else:
        Path(cache).mkdir(parents=True, exist_ok=True)
        identity = {"level": level, "version": _VERSION}
        with Ledger(Path(cache)/f"{level}.jsonl", identity) as ledger: values, failures = run(ledger)
    lost = {f.index: f.error for f in failures}
    found, ids, facts = {}, np.zeros((len(pairs), 2), np.uint64), [{}]*(len(pairs) if level == "full" else 0)
    for n, chunk, value, place in zip(order, chunks, values, range(len(chunks))):
        first = n*size
        if value is None: # a worker died on this chunk: its pairs are reported, not the run ended
            row = ("E301", "image", f"could not be checked: {lost[place]}")
            rows = {str(i): [row] for i in range(len(chunk))}
            value = {"found": rows, "ids": bytes(16*len(chunk)).hex(), "facts": [{}]*len(chunk)}
        found |= {first + int(i): [tuple(r) for r in rows] for i, rows in value["found"].items()}
        ids[first:first + len(chunk)] = np.frombuffer(bytes.fromhex(value["ids"]), "<u8").reshape(-1, 2)
        if level == "full": facts[first:first + len(chunk)] = value["facts"]
    return Checked(found, ids, facts)

# %%
with tmpdir() as d:
    for k in range(6):
        p = phantoms.abdomen(shape=(32, 24, 28), seed=k)
        write_volume(Volume(p.img, affine_from(p.spacing)), d/f"img{k}.nii.gz")
        write_volume(Volume(p.lbl, affine_from(p.spacing, (0, 0, 5*(k == 3)))), d/f"lbl{k}.nii.gz")
    pairs = [(str(d/f"img{k}.nii.gz"), str(d/f"lbl{k}.nii.gz")) for k in range(6)]
    results = check_pairs(pairs)
    full = check_pairs(pairs, "full", workers=2, cache=d/"cache")
    again = check_pairs(pairs, "full", cache=d/"cache")
[r["found"] for r in results]

# %%
assert [bool(r["found"]) for r in results] == [False]*3 + [True] + [False]*2 and results[3]["found"][0][0] == "E203"
assert again == full and full[0]["facts"]["label"]["counts"] and full[3]["found"] == results[3]["found"]
