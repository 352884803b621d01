# %% [markdown]
# # A quick look
#
# > Three planes of any volume file, with its label on top, as one PNG.
#
# The first question about a file is what is in it, and the answer should not need a program with a window. `medvol
# view scan.nii.gz --overlay label.nii.gz` writes a picture. Both files are brought to RAS first, so left is where the
# letters say it is, and a label that is stored in another orientation still lies where it belongs.

# %%
#| default_exp view

# %%
#| export
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.core import DataError, OnExists, check_output, human_bytes
from medvol_nb.plot import planes, save_figure
from medvol_nb.volume import Volume, format_of, read_volume, reorient, resample_to, same_grid, stem_of, to_axes

# %%
from medvol_nb import phantoms
from medvol_nb.core import raises, tmpdir
from medvol_nb.volume import affine_from, write_volume

# %% [markdown]
# ## Not more than fits
# A store can be larger than memory. Of a pyramid the finest level that fits is taken; of a plain store every *n*-th
# voxel, read one row of chunks at a time.

# %%
#| export
LOOK_BYTES = 2**28 # a picture needs no more than this

def _look(path: str | os.PathLike, level: int | None, channel: int) -> Volume:
    "One channel of a file in memory, RAS and xyz, coarse enough to fit"
    if level is not None and format_of(path).name != "zarr":
        raise DataError(f"{path}: level {level} was asked for, only OME-Zarr images have levels")
    options = {} if level is None else {"level": level}
    vol = read_volume(path, lazy=True, **options)
    while level is None and _nbytes(vol) > LOOK_BYTES and vol.meta.get("levels", 1) > 1:
        options = {"level": options.get("level", 0) + 1}
        if options["level"] >= vol.meta["levels"]: break
        vol = read_volume(path, lazy=True, **options)
    if vol.channels is not None:
        if not 0 <= channel < vol.channels:
            raise DataError(f"{path}: channel {channel} was asked for, it has 0 to {vol.channels - 1}")
    lead = () if vol.channels is None else (channel,)
    step = math.ceil((_nbytes(vol)/(vol.channels or 1)/LOOK_BYTES)**(1/3))
    affine = vol.affine @ np.diag([step, step, step, 1.0])
    return to_axes(reorient(replace(vol, data=_every(vol.data, lead, step), affine=affine, axes=vol.spatial_axes),
                            "RAS"), "xyz")

def _nbytes(vol: Volume) -> int: return int(np.prod(vol.data.shape, dtype=object))*vol.dtype.itemsize

def _every(data: Any, lead: tuple[int, ...], step: int) -> np.ndarray:
    "Every `step`-th voxel of one channel; an array on disk is read by rows of chunks, so each is decoded once"
    if isinstance(data, np.ndarray): return data[lead][::step, ::step, ::step]
    shape = data.shape[-3:]
    rows = step*math.ceil((getattr(data, "shards", None) or data.chunks)[-3]/step)
    out = np.empty([-(-n//step) for n in shape], data.dtype)
    for k in range(0, shape[0], rows):
        part = slice(k, min(k + rows, shape[0]), step)
        out[k//step:(k + rows)//step] = data[(*lead, part, slice(None, None, step), slice(None, None, step))]
    return out

# %%
#| export
def view(
    path: str | os.PathLike, # volume of any supported format
    overlay: str | os.PathLike | None = None, # label map drawn on top, in any orientation
    out: str | os.PathLike | None = None, # PNG to write; default: '<name>_view.png' in the current folder
    *,
    level: int | None = None, # resolution level of an OME-Zarr image; default: the finest that fits
    channel: int = 0, # channel of a volume that has several
    on_exists: OnExists = "error", # what to do when `out` is there already
) -> dict: # path of the picture and what was seen
    "Write a picture of three planes of a volume file"
    out = Path(f"{stem_of(path)}_view.png" if out is None else out)
    if not check_output(out, on_exists, inputs=[p for p in (path, overlay) if p is not None]):
        return {"picture": out, "skipped": True}
    vol = _look(path, level, channel)
    lbl, note = None, "none"
    if overlay is not None:
        lbl = _look(overlay, None, 0)
        if lbl.dtype.kind == "f" and not np.array_equal(lbl.data, np.round(lbl.data)):
            raise DataError(f"{overlay}: holds fractions, a label map holds whole numbers")
        if same_grid(vol, lbl, 0.1*min(vol.spacing)): note = "same grid"
        else:
            lbl, note = resample_to(lbl, vol.affine, vol.shape, order=0), "on another grid, resampled for the picture"
        if not lbl.data.any(): note += ", no label falls inside the image" if "another" in note else ", empty"
    seen = {"shape": vol.shape, "spacing": [round(s, 6) for s in vol.spacing], "dtype": vol.dtype.name,
            "size": human_bytes(_nbytes(vol)), "overlay": note, "notes": [t for _, t in vol.meta.get("notes", ())]}
    sizes = " x ".join(map(str, vol.shape)), " x ".join(f"{s:.3g}" for s in vol.spacing)
    title = f"{Path(str(path)).name}  {sizes[0]}, {sizes[1]} mm"
    fig = planes(vol.data, None if lbl is None else lbl.data.astype(np.int64), vol.spacing, title=title)
    save_figure(fig, out, "overwrite")
    return {"picture": out, **seen}

# %%
from IPython.display import Image

patient = phantoms.abdomen()
ct = Volume(patient.img, affine_from(patient.spacing))
with tmpdir() as d:
    write_volume(ct, d/"ct.nii.gz")
    write_volume(reorient(Volume(patient.lbl, ct.affine), "LAS"), d/"lbl.nrrd")
    seen = view(d/"ct.nii.gz", d/"lbl.nrrd", d/"look.png")
    picture = Image((d/"look.png").read_bytes())
    with raises(DataError, match="holds fractions"):
        write_volume(replace(ct, data=ct.data + 0.5), d/"half.nii.gz")
        view(d/"ct.nii.gz", d/"half.nii.gz", d/"no.png")
    assert not (d/"no.png").exists()
picture

# %%
assert seen["overlay"] == "same grid" and seen["shape"] == ct.shape
seen["overlay"], seen["spacing"]
