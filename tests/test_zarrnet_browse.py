"""Walking through a prediction: right voxels, right colours, no chunk too many."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvol_nb import phantoms, slices
from medvol_nb.core import DataError, FormatError, MissingFile
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.slices import Planes
from medvol_nb.stores import write_zarr
from medvol_nb.zarrnet import browse
from medvol_nb.zarrnet.browse import predictions_in, tinted, walk
from medvol_nb.zarrnet.geometry import encode_normals
from medvol_nb.zarrnet.io import open_volume

SHAPE = (20, 36, 44)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("browse")
    roll, affine = phantoms.sheets(SHAPE), affine_from((2.0, 1.0, 1.0), axes="zyx")
    write_zarr(Volume(roll.img, affine, "zyx"), root / "ct.zarr", chunks=8)
    for name, data, axes in (("sheet", roll.mask * np.uint8(200), "zyx"),
                             ("normals", encode_normals(roll.normals[::-1]), "czyx")):
        write_zarr(Volume(data, affine, axes), root / f"{name}.zarr", chunks=8)
    return root, roll


def pixels(box):
    return np.asarray(Image.open(io.BytesIO(box.picture.value)))


@pytest.mark.parametrize("axis, k", [("z", 0), ("y", 1), ("x", 2)])
def test_a_slice_reads_its_own_chunks_only(tmp_path, axis, k):
    "All other chunks are damaged: whoever touches one gets an error"
    data = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
    write_zarr(Volume(data, affine_from(1.0, axes="zyx"), "zyx"), tmp_path / "v.zarr", chunks=8)
    chunks = [p for p in (tmp_path / "v.zarr").rglob("c/*/*/*") if p.is_file()]
    assert len(chunks) == 3 * 5 * 6
    for p in chunks:
        if int(p.parts[-3 + k]) != SHAPE[k] // 16: p.write_bytes(b"damaged")
    vol, at = open_volume(tmp_path / "v.zarr"), SHAPE[k] // 16 * 8 + 1
    assert np.array_equal(Planes(vol).plane(axis, at), data.take(at, k))
    with pytest.raises(FormatError): Planes(vol).plane(axis, 3)
    box = walk(vol, axis=axis, index=at)  # the middle slice, which sets the scale of grey, is among the readable ones
    assert pixels(box).shape == (*data.take(at, k).shape, 3)


def test_slices_that_follow_do_not_decode_again(stores, monkeypatch):
    root, _ = stores
    both = [open_volume(root / f"{n}.zarr", cache_bytes=10**8, reader="zarr") for n in ("ct", "sheet")]
    box, reads = walk(*both, index=8), []
    from medvol_nb.zarrnet import io as page
    chunk = page._Kept._chunk
    def counting(self, key, low):
        reads.append(key in self.held)
        return chunk(self, key, low)
    monkeypatch.setattr(page._Kept, "_chunk", counting)
    box.slice.value = 9
    assert reads == []
    box.slice.value = 17
    assert len(reads) == 2 * 5 * 6 and not any(reads)  # all 60 chunks of the row that was not seen yet, once each


def test_the_picture_shows_image_and_prediction(stores):
    root, roll = stores
    layers = {"sheet": root / "sheet.zarr", "normals": root / "normals.zarr"}
    box = walk(root / "ct.zarr", layers, index=7)
    limits = browse.window_limits(roll.img[10])
    bare = tinted(roll.img[7], None, limits=limits)
    assert np.array_equal(pixels(box), tinted(roll.img[7], 200*roll.mask[7], limits=limits))
    assert np.array_equal((pixels(box) != bare).any(-1), roll.mask[7] > 0)
    box.layer.value = "normals"
    assert (np.abs(pixels(box).astype(int) - tinted(roll.img[7], roll.normals[::-1, 7], limits=limits)) <= 1).all()
    box.layer.value = "none"
    assert np.array_equal(pixels(box), bare)
    box.layer.value, box.opacity.value = "sheet", 0
    assert np.array_equal(pixels(box), bare)


def test_axes_turn_with_size_and_shape(stores):
    root, roll = stores
    box = walk(root / "ct.zarr")
    assert box.slice.max == 19 and box.slice.value == 10 and (box.picture.width, box.picture.height) == ("640", "524")
    before = box.picture.value
    box.view.value = "y"
    assert box.slice.max == 35 and box.slice.value == 18 and box.picture.value != before
    assert pixels(box).shape[:2] == (20, 44) and (box.picture.width, box.picture.height) == ("640", "582")  # z: 2 mm
    box.view.value = "z"
    assert box.picture.value == before


def test_an_axis_is_drawn_once(stores, monkeypatch):
    root, _ = stores
    box, drawn = walk(root / "ct.zarr"), []
    draw = slices.grey_bytes
    monkeypatch.setattr(slices, "grey_bytes", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    box.view.value = "x"
    assert len(drawn) == 1


def test_large_slices_are_thinned_out():
    vol = open_volume(np.zeros((2, 70, 100), np.uint8))
    assert [Planes(vol, most=n).plane("z", 0).shape for n in (50, 99, 100)] == [(35, 50), (35, 50), (70, 100)]
    assert pixels(walk(vol, most=50)).shape == (35, 50, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_vectors_in_every_stored_form_look_the_same(stores, dtype):
    _, roll = stores
    stored, true = (tinted(roll.img[7], v[:, 7], 1) for v in (encode_normals(roll.normals, dtype), roll.normals))
    assert np.abs(stored.astype(int) - true).max() <= 1


def test_probabilities_labels_and_channels():
    grey = np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    half = tinted(grey, np.full((8, 8), 0.5, np.float32), 1)
    assert np.array_equal(half, tinted(grey, np.full((1, 8, 8), 0.5, np.float32), 1))
    assert np.abs(half.astype(int) - tinted(grey, np.full((8, 8), 32768, np.uint16), 1)).max() <= 1
    one = tinted(grey, np.ones((8, 8), np.uint8), 1, labels=True)
    assert len(np.unique(one.reshape(-1, 3), axis=0)) == 1
    image = np.stack([np.zeros((4, 6, 6)), np.ones((4, 6, 6))]).astype(np.float32)
    image[1, :, 0] = 0
    bright = pixels(walk(open_volume(image, channel_axis=0), channel=1))
    assert bright[1:].min() == 255 and not bright[0].any()


def test_what_does_not_fit_is_refused(stores, tmp_path):
    root, _ = stores
    with pytest.raises(DataError, match="Is it of this volume"): walk(root / "ct.zarr", np.zeros((20, 36, 43)))
    with pytest.raises(DataError, match="channel 2 was asked for, the volume has 0 to 1"): walk(
        open_volume(np.zeros((2, 4, 6, 6)), channel_axis=0), channel=2)
    with pytest.raises(DataError, match="no plane 'c', there are z, y, x"): walk(root / "ct.zarr", axis="c")
    with pytest.raises(DataError, match="z: must be 0...19, got -1"): walk(root / "ct.zarr", index=-1)
    with pytest.raises(DataError, match="opacity"): tinted(np.zeros((2, 2)), np.ones((2, 2)), 2)
    with pytest.raises((MissingFile, FormatError)): predictions_in(tmp_path / "absent.zarr")
    import zarr
    zarr.create_group(str(tmp_path / "empty.zarr"))
    with pytest.raises(FormatError, match="holds no predictions"): predictions_in(tmp_path / "empty.zarr")


def test_real_volume(data_dir):
    store = Path(data_dir) / "zarr_multitask" / "vnc_a.zarr"
    box = walk(store / "raw", {"membranes": store / "membranes"}, labels=True, opacity=1)
    assert box.picture.value[:8] == b"\x89PNG\r\n\x1a\n" and len(np.unique(pixels(box).reshape(-1, 3), axis=0)) > 100
