# %% [markdown]
# # TorchIO and MONAI
#
# > Cases as TorchIO subjects and MONAI dictionaries, and back, with axes, affine and number type as they were.
#
# TorchIO and MONAI bring transforms, samplers and losses that a project may want to keep. Both hold a case as a
# dictionary of tensors, channels first, with an affine to RAS millimetres. That is nearly what a `Volume` is, and
# "nearly" is where cases get hurt: a volume stored `zyx` arrives transposed, unsigned 16-bit labels meet operations
# that torch lacks for them, a label comes back as floats, interpolated ones if nobody looked, and an affine in LPS is
# taken for RAS. The functions below know these differences and nothing else.

# %%
#| default_exp interchange

# %%
#| export
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medvol_nb.core import DataError, optional
from medvol_nb.datalists import PATH_KEYS
from medvol_nb.geometry import Volume, to_axes
from medvol_nb.loader import MAP_KEYS, read_case
from medvol_nb.volume import read_volume

if TYPE_CHECKING:
    import torch
    import torchio

# %%
import tempfile

import matplotlib.pyplot as plt

from medvol_nb import phantoms
from medvol_nb.core import close, raises
from medvol_nb.geometry import affine_from, reorient, resample, same_grid, to_world
from medvol_nb.plot import overlay
from medvol_nb.volume import write_volume

# %% [markdown]
# ## A case
# A case is a dictionary: `image`, and maps such as `label` on its grid, as `read_case` gives it; or an item of a
# data list with the paths of the files. Here is one that is hard to carry: an oblique scan, stored `zyx`, and a label
# with 16-bit ids.

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
body = phantoms.abdomen((48, 36, 42))
turn = np.array([[.96, -.28, 0, -180], [.28, .96, 0, -140], [0, 0, 1, 20], [0, 0, 0, 1]])
affine = turn @ affine_from(body.spacing)
case = {"image": to_axes(Volume(body.img, affine), "zyx"), "label": Volume(np.uint16(600)*body.lbl, affine)}
item = {"image": str(root/"scan.nii.gz"), "label": str(root/"label.nii.gz"), "fold": 2, "site": "B"}
for key, vol in case.items(): write_volume(reorient(vol, "LPS") if key == "label" else vol, item[key])
case

# %% [markdown]
# ## Out and in
# On the way out the axes become (c, x, y, z), the values are copied, since transforms may work in place, and unsigned
# numbers of 16 bits and more become signed ones of twice the width, for which torch has all operations. Order of axes
# and number type are noted in the entry itself.
#
# On the way in they are restored. A transform may make new entries without the notes, as TorchIO's `Crop` does; then
# the volume comes back as `xyz` with the tensor's number type, at the right place all the same. Maps that became floats
# are made whole numbers again, and refused if they are none: then somebody interpolated a label.

# %%
#| export
_AXES, _DTYPE = "medvol_axes", "medvol_dtype" # notes for the way back
_WIDER = {2: np.int32, 4: np.int64, 8: np.int64} # bytes of an unsigned type -> signed type

def _outgoing(vol: Volume) -> tuple["torch.Tensor", np.ndarray, dict[str, str]]:
    "Tensor (c, x, y, z), affine and notes of a volume"
    import torch
    data = np.asarray(to_axes(vol, "xyz").data[...])
    if data.dtype.kind == "u" and data.itemsize > 1:
        if data.itemsize == 8 and data.size and data.max() > np.iinfo(np.int64).max:
            raise DataError(f"{vol}: holds values above {np.iinfo(np.int64).max}, for which tensors have no room")
        data = data.astype(_WIDER[data.itemsize])
    data = np.array(data, data.dtype.newbyteorder("="), order="C")
    tensor = torch.from_numpy(data if vol.channels is not None else data[None])
    return tensor, np.array(to_axes(vol, "xyz").affine), {_AXES: vol.axes, _DTYPE: vol.dtype.name}

def _whole(data: np.ndarray, is_map: bool, name: str) -> np.ndarray:
    "A map as whole numbers; images as they are"
    if not is_map or data.dtype.kind != "f": return data
    with np.errstate(invalid="ignore"): whole = data.astype(np.int64)
    if not np.array_equal(whole, data):
        raise DataError(f"{name}: a label holds fractions such as {data[whole != data].flat[0]:.4g}. Resample labels "
                        "with nearest neighbours (mode='nearest' in MONAI, LabelMap in TorchIO)")
    return whole

def _incoming(tensor: "torch.Tensor", affine: np.ndarray, notes: Mapping, is_map: bool, name: str) -> Volume:
    "Volume of a tensor (c, x, y, z), in the axes and the number type that the notes tell"
    import torch
    tensor = tensor.detach().cpu().as_subclass(torch.Tensor)
    data = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if data.ndim != 4 or np.shape(affine) != (4, 4):
        raise DataError(f"{name}: one case (c, x, y, z) with its affine is needed, got shape {data.shape} with affine "
                        f"{np.shape(affine)}. Take batches apart first")
    whole = _whole(data, is_map, name)
    wanted = np.dtype(notes.get(_DTYPE, np.int32 if whole is not data else data.dtype))
    if wanted.kind in "iub" and whole.dtype.kind in "iub" and whole.dtype != wanted:
        low, high = (0, 1) if wanted.kind == "b" else (np.iinfo(wanted).min, np.iinfo(wanted).max)
        if not whole.size or (low <= whole.min() and whole.max() <= high): whole = whole.astype(wanted)
    axes = notes.get(_AXES, "xyz")
    if len(whole) == 1 and axes[0] != "c": return to_axes(Volume(whole[0], affine, "xyz"), axes)
    return to_axes(Volume(whole, affine, "cxyz"), axes)

# %% [markdown]
# ## MONAI
# A `MetaTensor` knows its affine. `to_monai` makes them from volumes, or reads the files of an item; it is a plain
# function of a dictionary, so it can stand in a `Compose` where `LoadImaged` would, and it then reads everything this
# library reads, with checksums, and refuses a label on another grid. Entries that are neither volumes nor files of a
# case pass through.

# %%
#| export
def _read_if_paths(case: Mapping[str, Any], maps: Sequence[str]) -> dict[str, Any]:
    "The case with volumes where it names files"
    if isinstance(case.get("image"), Volume) or "image" not in case: return dict(case)
    return {**case, **read_case(case, [k for k in maps if case.get(k)])}

def to_monai(
    case: Mapping[str, Any], # key -> Volume, or an item of a data list with the paths of its files
    maps: Sequence[str] = MAP_KEYS, # entries that are labels
) -> dict[str, Any]: # a MetaTensor (c, x, y, z) in RAS mm for each volume; all else as it was
    "Dictionary for MONAI's transforms"
    import torch
    from monai.data import MetaTensor
    from monai.utils import MetaKeys, SpaceKeys
    out: dict[str, Any] = _read_if_paths(case, maps)
    for key, value in out.items():
        if not isinstance(value, Volume): continue
        tensor, affine, notes = _outgoing(value)
        notes |= {"filename_or_obj": str(value.meta.get("path", "")), MetaKeys.SPACE: SpaceKeys.RAS,
                  MetaKeys.ORIGINAL_CHANNEL_DIM: 0}
        out[key] = MetaTensor(tensor, affine=torch.from_numpy(affine), meta=notes)
    return out

def from_monai(
    data: Mapping[str, Any], # dictionary with MetaTensors (c, x, y, z), as from `to_monai` or MONAI's `LoadImaged`
    maps: Sequence[str] = MAP_KEYS, # entries that are labels
) -> dict[str, Any]: # a Volume for each MetaTensor; all else as it was
    "Take volumes back from MONAI"
    from monai.data import MetaTensor
    out = dict(data)
    for key, value in out.items():
        if not isinstance(value, MetaTensor): continue
        if value.pending_operations:
            raise DataError(f"{key}: {len(value.pending_operations)} lazy transforms are not applied yet. Use "
                            "Compose(..., lazy=False), or monai.transforms.lazy.functional.apply_pending")
        affine = np.asarray(value.affine.cpu(), np.float64)
        if str(value.meta.get("space", "RAS")) == "LPS": affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        out[key] = _incoming(value, affine, value.meta, key in maps, key)
    return out

# %%
from monai.transforms import Compose, Orientationd, Spacingd

tensors = to_monai(case)
{k: (tuple(t.shape), t.dtype, t.affine.dtype) for k, t in tensors.items()}

# %%
back = from_monai(tensors)
for key, vol in case.items():
    assert back[key].axes == vol.axes and back[key].dtype == vol.dtype and np.array_equal(back[key].data, vol.data)
    assert np.array_equal(back[key].affine, vol.affine)

# %% [markdown]
# The same case from its files, through two of MONAI's transforms. A voxel of the result is where it was in the world.

# %%
steps = Compose([to_monai, Orientationd(["image", "label"], "PIR", labels=None),
                 Spacingd(["image", "label"], (10, 10, 10), mode=("bilinear", "nearest"))])
moved = from_monai(steps(item))
moved

# %%
def centre(vol, k):
    vol = to_axes(vol, "xyz")
    return to_world(vol.affine, np.argwhere(vol.data == k)[:, -3:].mean(axis=0))

assert moved["label"].orientation == moved["image"].orientation == "PIR" and moved["site"] == "B"
assert moved["label"].dtype == np.int32 and same_grid(moved["image"], moved["label"])
assert close(centre(moved["label"], 600), centre(case["label"], 600), 2.5)
blurred = Compose([to_monai, Spacingd(["label"], (10, 10, 10), mode="bilinear")])(item)
with raises(DataError, match="label: a label holds fractions"): from_monai(blurred)
with raises(DataError, match="Take batches apart first"): from_monai({"image": tensors["image"][None]})

# %% [markdown]
# ## TorchIO
# A `Subject` holds images that know whether they are intensities or labels, and by default reads a file when it is
# needed. So an item of a data list becomes a subject that has read nothing yet, and when TorchIO asks for the voxels
# this library reads them. The function that does it is plain, so that loaders can send subjects to their workers.

# %%
#| export
def read_for_torchio(
    path: str | os.PathLike, # any volume this library reads
) -> tuple["torch.Tensor", np.ndarray]: # (c, x, y, z) and affine (4, 4) to RAS [mm]
    "Reader for `torchio.Image(reader=...)`"
    tensor, affine, _ = _outgoing(read_volume(path))
    return tensor, affine

def to_subject(
    case: Mapping[str, Any], # key -> Volume, or an item of a data list with the paths of its files
    maps: Sequence[str] = MAP_KEYS, # entries that are labels
) -> "torchio.Subject": # ScalarImage or LabelMap for each volume or file, which is read when needed; all else stays
    "Subject for TorchIO's transforms and samplers (needs the `interop` extra)"
    tio = optional("torchio", extra="interop")
    out = dict(case)
    for key, value in case.items():
        kind = tio.LabelMap if key in maps else tio.ScalarImage
        if isinstance(value, Volume):
            tensor, affine, notes = _outgoing(value)
            out[key] = kind(tensor=tensor, affine=affine, **notes)
        elif key in PATH_KEYS and value: out[key] = kind(value, reader=read_for_torchio, verify_path=False)
    return tio.Subject(out)

def from_subject(
    subject: "torchio.Subject", # as from `to_subject`, or any other
) -> dict[str, Any]: # a Volume for each image; all else as it was
    "Take volumes back from TorchIO (needs the `interop` extra)"
    tio = optional("torchio", extra="interop")
    return {k: _incoming(v.data, v.affine, v, isinstance(v, tio.LabelMap), k) if isinstance(v, tio.Image) else v
            for k, v in subject.items()}

# %%
import torchio as tio

subject = to_subject(case | {"age": 63})
again = from_subject(subject)
subject.label, again["age"]

# %%
for key, vol in case.items():
    assert again[key].axes == vol.axes and again[key].dtype == vol.dtype and np.array_equal(again[key].data, vol.data)
    assert np.array_equal(again[key].affine, vol.affine)

# %% [markdown]
# A subject from an item: nothing is read until a transform asks. TorchIO's `Resample` keeps labels whole, because the
# subject says which image is one.

# %%
lazy = to_subject(item)
assert "data" not in lazy.image and lazy.site == "B"
done = from_subject(tio.Compose([tio.ToCanonical(), tio.Resample(10)])(lazy))
done["image"], done["label"]

# %%
assert set(np.unique(done["label"].data)) <= set(np.unique(case["label"].data)) and done["label"].orientation == "RAS"
assert close(centre(done["label"], 600), centre(case["label"], 600), 2.5)

# %% [markdown]
# ## Three resamplers
# The scan at 10 mm, by this library, MONAI and TorchIO, with the label laid over: the same organs at the same places,
# though each begins its grid a little differently.

# %%
three = {"medvol_nb": {k: reorient(resample(v, 10.0, int(k == "image")), "RAS") for k, v in case.items()},
         "MONAI": {k: reorient(moved[k], "RAS") for k in case}, "TorchIO": {k: done[k] for k in case}}
fig, axs = plt.subplots(1, 3, figsize=(7, 2.6))
for ax, (name, v) in zip(axs, three.items()):
    img, lbl = (to_axes(v[k], "zyx").data.squeeze() for k in ("image", "label"))
    at = len(img)//2
    ax.imshow(overlay(img[at], lbl[at].astype(int), outline=True), origin="lower")
    ax.set(title=name, xticks=[], yticks=[])

# %%
place.cleanup()
