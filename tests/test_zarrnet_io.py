"""Volumes in stores: the same voxels from every format, errors that name the place, and servers that stumble."""

import os
import pickle
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from medvol_nb import phantoms, stores
from medvol_nb.core import DataError, FormatError, MissingFile
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.parallel import pmap
from medvol_nb.stores import write_ome_zarr, write_zarr
from medvol_nb.zarrnet import remote
from medvol_nb.zarrnet.io import open_volume
from medvol_nb.zarrnet.remote import Passing, Remote, with_retries

SHAPE = (37, 50, 43)
BOXES = [((0, 0, 0), SHAPE), ((3, 16, 10), (20, 30, 33)), ((-5, 40, 30), (16, 24, 24)), ((30, -9, -9), (20, 80, 80))]


@pytest.fixture(scope="module")
def roll():
    return phantoms.sheets(SHAPE).img


def stored(path, array, chunks=16, version=3, **options):
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    if isinstance(chunks, int):
        chunks = (chunks,) * array.ndim
    group.create_array("image", shape=array.shape, dtype=array.dtype, chunks=chunks, **options)[...] = array
    return path


@pytest.fixture(scope="module")
def copies(tmp_path_factory, roll):
    "One volume in all formats"
    d = tmp_path_factory.mktemp("copies")
    vol = Volume(roll, affine_from(0.01, axes="zyx"), "zyx")
    write_zarr(vol, d / "v2.zarr", chunks=16, version=2)
    write_zarr(vol, d / "v3.zarr", chunks=16)
    write_zarr(vol, d / "sharded.zarr", chunks=8, shards=(16, 24, 16))
    write_ome_zarr(vol, d / "ome04.zarr", version="0.4", chunks=16)
    write_ome_zarr(vol, d / "ome05.zarr", version="0.5", chunks=16)
    group = zarr.create_group(str(d / "xyz.zarr"), attributes={"axes": ["x", "y", "z"]})
    group.create_array("a", shape=SHAPE[::-1], dtype="u1", chunks=(16,) * 3)[...] = roll.transpose()
    five = zarr.create_group(
        str(d / "five.zarr"),
        zarr_format=2,
        attributes={"multiscales": [{"axes": [{"name": n} for n in "tczyx"], "datasets": [{"path": "0"}]}]},
    )
    five.create_array("0", shape=(1, 1, *SHAPE), dtype="u1", chunks=(1, 1, 16, 16, 16))[...] = roll[None, None]
    tifffile.imwrite(d / "plain.tif", roll)
    tifffile.imwrite(d / "packed.tif", roll, compression="zlib")
    tifffile.imwrite(d / "big.tif", roll, byteorder=">", bigtiff=True, compression="zlib", predictor=True)
    (d / "slices").mkdir()
    for k, page in enumerate(roll):
        tifffile.imwrite(d / "slices" / f"s{k + 8}.tiff", page)
    return d


NAMES = [
    "v2.zarr",
    "v3.zarr",
    "sharded.zarr",
    "ome04.zarr",
    "ome05.zarr",
    "xyz.zarr",
    "five.zarr",
    "plain.tif",
    "packed.tif",
    "big.tif",
    "slices",
]


@pytest.mark.parametrize("name", NAMES)
def test_B10_copies_give_identical_samples(copies, roll, name):
    for options in ({}, {"reader": "zarr"}, {"reader": "zarr", "cache_bytes": 20_000}, {"cache_bytes": 10**6}):
        v = open_volume(copies / name, **options)
        assert v.shape == SHAPE and v.dtype == np.uint8 and len(v.chunks) == 3
        for start, size in BOXES:
            patch, valid = v.read(start, size)
            whole = np.pad(roll, [(64, 64)] * 3)[tuple(slice(s + 64, s + 64 + p) for s, p in zip(start, size))]
            inside = np.zeros(size, bool)
            inside[valid] = True
            patch = patch[0] if name == "five.zarr" else patch
            assert patch.shape == tuple(size) and np.array_equal(patch, whole) and patch.flags.writeable
            assert inside.sum() == np.prod([min(s + p, n) - max(s, 0) for s, p, n in zip(start, size, SHAPE)])


@pytest.mark.parametrize("name", ["v2.zarr", "sharded.zarr", "plain.tif", "packed.tif"])
def test_slicing_is_numpys(copies, roll, name):
    v = open_volume(copies / name)
    for index in (
        3,
        -1,
        slice(5),
        (slice(2, 30, 7), 4),
        (..., 5),
        (1, 2, 3),
        (slice(9, 2),),
        (slice(-8, None), ..., 0),
        (slice(None, 900), slice(60, 80)),
        np.int64(3),
        ...,
        (2, ..., slice(3)),
    ):
        assert np.array_equal(v[index], roll[index]), index
    for index in (37, -38, slice(None, None, -1), "a", (0, 0, 0, 0), 1.5, None):
        with pytest.raises(DataError):
            v[index]


def test_read_wholly_outside_is_zero(copies):
    for start in ((-20, 0, 0), (0, 50, 0), (0, 0, 9999)):
        patch, valid = open_volume(copies / "v3.zarr").read(start, (8, 8, 8))
        assert patch.shape == (8, 8, 8) and not patch.any() and patch[valid].size == 0


@pytest.mark.parametrize("dtype", ["|b1", "<i2", ">u2", "<u4", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize("version", [2, 3])
def test_number_types_come_in_native_order(tmp_path, dtype, version):
    data = (np.arange(4 * 5 * 6).reshape(4, 5, 6) % 7).astype(dtype)
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=data.shape, chunks=(2, 3, 4), zarr_format=version, dtype=data.dtype
    )
    array[...] = data
    for reader in ("auto", "zarr"):
        v = open_volume(tmp_path / "a.zarr", reader=reader)
        assert v[...].dtype == v.dtype == data.dtype.newbyteorder("=") and np.array_equal(v[...], data)


# ------------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("order, axis", [("czyx", 0), ("zyxc", 3)])
@pytest.mark.parametrize("told", [False, True])
def test_channels_come_first(tmp_path, order, axis, told):
    data = np.arange(3 * 20 * 21 * 22, dtype=np.uint16).reshape(3, 20, 21, 22)
    raw = data if order == "czyx" else np.moveaxis(data, 0, -1)
    stored(
        tmp_path / "a.zarr",
        raw,
        tuple(3 if a == "c" else 8 for a in order),
        attributes={"axes": list(order)} if told else {},
    )
    v = open_volume(tmp_path / "a.zarr")
    assert (v.shape, v.channels, v.channel_axis, v.chunks) == ((20, 21, 22), 3, axis, (8, 8, 8))
    assert np.array_equal(v[2:9, 3], data[:, 2:9, 3]) and np.array_equal(v[..., 5], data[..., 5])
    assert np.array_equal(v.read((-1, 0, 0), (4, 4, 4))[0][:, 1:], data[:, :3, :4, :4])


def test_channel_axis_is_asked_for_when_both_fit(tmp_path):
    stored(tmp_path / "both.zarr", np.zeros((3, 20, 20, 3), "u1"), 8)
    stored(tmp_path / "none.zarr", np.zeros((20, 3, 20, 20), "u1"), 8)
    with pytest.raises(DataError, match="both .* 3 channels. Set channel_axis"):
        open_volume(tmp_path / "both.zarr", channels=3)
    with pytest.raises(DataError, match="neither .* Set channel_axis"):
        open_volume(tmp_path / "none.zarr", channels=3)
    assert open_volume(tmp_path / "both.zarr", channel_axis=-1, channels=3).shape == (3, 20, 20)
    assert open_volume(tmp_path / "none.zarr", channel_axis=1).channels == 3
    with pytest.raises(DataError, match="no channels .* 3 are expected"):
        open_volume(stored(tmp_path / "flat.zarr", np.zeros((9, 9, 9), "u1"), 8), channels=3)
    with pytest.raises(DataError, match="channel_axis 4 does not exist"):
        open_volume(tmp_path / "both.zarr", channel_axis=4)


def test_tif_channels_and_imagej_spacing(tmp_path):
    data = np.arange(5 * 2 * 6 * 7, dtype=np.uint16).reshape(5, 2, 6, 7)
    tifffile.imwrite(
        tmp_path / "a.tif", data, imagej=True, resolution=(4, 2), metadata={"axes": "ZCYX", "spacing": 3, "unit": "um"}
    )
    tifffile.imwrite(
        tmp_path / "rgb.tif",
        np.arange(4 * 6 * 7 * 3, dtype=np.uint8).reshape(4, 6, 7, 3),
        photometric="rgb",
        compression="zlib",
    )
    v = open_volume(tmp_path / "a.tif")
    assert v.channels == 2 and np.allclose(v.spacing, (0.003, 0.0005, 0.00025))
    assert np.array_equal(v[1:3, 2:], np.moveaxis(data, 1, 0)[:, 1:3, 2:])
    assert open_volume(tmp_path / "rgb.tif")[2:].shape == (3, 2, 6, 7)


def test_more_than_one_time_point_is_refused(tmp_path):
    stored(tmp_path / "t.zarr", np.zeros((2, 8, 8, 8), "u1"), 8, attributes={"axes": ["t", "z", "y", "x"]})
    with pytest.raises(DataError, match="2 time points"):
        open_volume(tmp_path / "t.zarr")


# --------------------------------------------------------------------------------- what is stored, and its identity


@pytest.mark.parametrize(
    "options",
    [
        {"version": 2},
        {"version": 3},
        {"version": 2, "separator": "/"},
        {"version": 3, "separator": "v2"},
        {"version": 3, "shards": (16, 16, 16)},
    ],
)
def test_stored_chunks_are_those_that_were_written(tmp_path, options):
    version, shards = options["version"], options.get("shards")
    encoding = {"separator": "/"} if options.get("separator") == "/" else None
    if options.get("separator") == "v2":
        encoding = {"name": "v2", "separator": "."}
    if encoding is not None:
        encoding = {"name": "v2" if version == 2 else "default", **encoding}
    array = zarr.create_array(
        str(tmp_path / "a.zarr"),
        shape=(40, 30, 20),
        chunks=(8, 8, 8),
        shards=shards,
        dtype="u1",
        zarr_format=version,
        chunk_key_encoding=encoding,
    )
    array[33:34, 0, 0] = array[0, 17, 9] = 1
    v = open_volume(tmp_path / "a.zarr")
    assert v.stored_chunks() == ([(0, 1, 0), (2, 0, 0)] if shards else [(0, 2, 1), (4, 0, 0)])
    assert v.shards == shards and v[...].sum() == 2


def test_missing_chunks_are_the_fill_value(tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(20, 20, 20), chunks=(8, 8, 8), dtype="i2", fill_value=-7)
    for reader in ("auto", "zarr"):
        v = open_volume(tmp_path / "a.zarr", reader=reader)
        assert v.fill_value == -7 and (v[...] == -7).all() and v.stored_chunks() == []
        patch, valid = v.read((-4, 0, 0), (8, 8, 8))
        assert (patch[valid] == -7).all() and not patch[:4].any()


def test_fingerprint_follows_content_and_metadata(tmp_path, roll):
    path = stored(tmp_path / "a.zarr", roll)
    first = open_volume(path).fingerprint()
    assert open_volume(path).fingerprint() == first == open_volume(path, reader="zarr").fingerprint()
    (path / "image" / "notes.txt").write_text("no chunk")
    assert open_volume(path).fingerprint() == first
    zarr.open(str(path))["image"][20, 20, 20] = 255 - roll[20, 20, 20]
    second = open_volume(path).fingerprint()
    assert second["metadata"] == first["metadata"] and second["content"] != first["content"]
    other = open_volume(stored(tmp_path / "b.zarr", roll, 8)).fingerprint()
    assert other["metadata"] != first["metadata"]
    assert (
        open_volume(roll).fingerprint() == open_volume(roll.copy()).fingerprint() != open_volume(roll[1:]).fingerprint()
    )


@pytest.mark.parametrize("name", ["v2.zarr", "v3.zarr", "sharded.zarr"])
@pytest.mark.parametrize("reader", ["auto", "zarr"])
def test_damaged_chunk_is_named(tmp_path, copies, name, reader):
    import shutil

    shutil.copytree(copies / name, tmp_path / name)
    files = [p for p in (tmp_path / name / "image").rglob("*") if p.is_file() and p.name[-1].isdigit()]
    target = next(
        p
        for p in sorted(files)
        if p.relative_to(tmp_path / name / "image").as_posix()[-5:].replace("/", ".") == "1.1.1"
    )
    raw = bytearray(target.read_bytes())
    raw[len(raw) // 2] ^= 8
    target.write_bytes(raw)
    v = open_volume(tmp_path / name, reader=reader)
    with pytest.raises(FormatError, match=rf"{name}, chunk \d.\d.\d of z.y.x"):
        v[...]
    assert v[:8, :8, :8].size


# -------------------------------------------------------------------------------------------------------- refusals


def test_U20_groups_are_not_guessed_at(tmp_path, roll):
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    for name in ("0", "raw"):
        group.create_array(name, shape=roll.shape, dtype="u1")
    with pytest.raises(DataError, match=r"group of 2 arrays \(0, raw\)"):
        open_volume(tmp_path / "g.zarr")
    assert open_volume(tmp_path / "g.zarr" / "raw").shape == SHAPE == open_volume(f"{tmp_path}/g.zarr::raw").shape


def test_refusals_name_the_place(tmp_path, copies):
    (tmp_path / "x.nii").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tif").write_bytes(b"II*\0 not a tif at all")
    zarr.create_array(str(tmp_path / "none.zarr"), shape=(4, 0, 4), dtype="u1")
    zarr.create_array(str(tmp_path / "c.zarr"), shape=(4, 4, 4), dtype="c8")
    zarr.create_array(str(tmp_path / "flat.zarr"), shape=(4, 4), dtype="u1")
    for name, kind, words in (
        ("absent.zarr", MissingFile, "absent"),
        ("x.nii", FormatError, "not a Zarr folder"),
        ("empty", MissingFile, "no zarr array or group"),
        ("bad.tif", FormatError, "bad.tif"),
        ("none.zarr", DataError, "is empty"),
        ("c.zarr", DataError, "complex64"),
        ("flat.zarr", DataError, "2 dimensions"),
    ):
        with pytest.raises(kind, match=words) as e:
            open_volume(tmp_path / name)
        assert name in str(e.value)
    with pytest.raises(DataError, match="level 3 was asked for"):
        open_volume(copies / "ome04.zarr", 3)
    with pytest.raises(DataError, match="no pyramid"):
        open_volume(copies / "v3.zarr", 1)
    with pytest.raises(DataError, match="reader"):
        open_volume(copies / "v3.zarr", reader="fast")
    with pytest.raises(DataError, match="cannot be opened"):
        open_volume("nosuch://x/y.zarr")


@pytest.mark.parametrize(
    "names, words",
    [
        (("a1", "a3"), "slice 2 is missing"),
        (("a1", "b1"), "two slices have the number 1"),
        (("a1", "b"), "b.tif has no number"),
    ],
)
def test_slices_must_be_numbered_without_gaps(tmp_path, names, words):
    for n in names:
        tifffile.imwrite(tmp_path / f"{n}.tif", np.zeros((4, 5), "u1"))
    with pytest.raises(FormatError, match=words):
        open_volume(tmp_path)


def test_a_slice_of_another_size_is_found_when_read(tmp_path):
    for k, size in enumerate(((4, 5), (4, 5), (4, 6))):
        tifffile.imwrite(tmp_path / f"{k:02}.tif", np.zeros(size, "u1"))
    v = open_volume(tmp_path)
    assert v[:2].shape == (2, 4, 5)
    with pytest.raises(FormatError, match="02.tif"):
        v[1:]


def test_truncated_tif_is_an_error(tmp_path, roll):
    for options in ({}, {"compression": "zlib"}):
        tifffile.imwrite(tmp_path / "a.tif", roll, **options)
        raw = (tmp_path / "a.tif").read_bytes()
        for part in (0, 7, 100, len(raw) // 2, len(raw) - 9):
            (tmp_path / "a.tif").write_bytes(raw[:part])
            try:
                found = open_volume(tmp_path / "a.tif")[...]
            except (FormatError, DataError) as e:
                assert "a.tif" in str(e)
            else:
                assert part == len(raw) - 9 and np.array_equal(found, roll)  # the end of a tag that nobody needs


def test_pages_are_decoded_once_within_the_cache(copies, monkeypatch):
    count, asarray = [], tifffile.TiffPage.asarray
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda self, *a, **k: count.append(1) or asarray(self, *a, **k))
    monkeypatch.setattr(tifffile.TiffFrame, "asarray", lambda self, *a, **k: count.append(1) or asarray(self, *a, **k))
    v = open_volume(copies / "packed.tif")
    for _ in range(3):
        v[4:12]
    assert len(count) == 8


# ------------------------------------------------------------------------------------------------------- processes


def total(v, box=slice(5, 30)) -> int:
    return int(v[box].sum())


def test_volumes_travel_to_processes(copies, roll):
    for name in ("v2.zarr", "packed.tif"):
        v = open_volume(copies / name)
        v[:2]
        assert v._handle is not None and pickle.loads(pickle.dumps(v))._handle is None
        assert pmap(partial(total, v), [slice(5, 30), slice(0, 2)], workers=1) == [roll[5:30].sum(), roll[:2].sum()]


@pytest.mark.parametrize("reader", ["auto", "zarr"])
def test_B9_a_forked_child_reads_after_its_parent(copies, roll, reader):
    "Fork after zarr's event loop or tensorstore's threads were used is a known deadlock"
    v = open_volume(copies / "v3.zarr", reader=reader)
    assert total(v) == roll[5:30].sum()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(write, str((total(v), total(open_volume(copies / "v2.zarr", reader=reader)))).encode())
        finally:
            os._exit(0)
    os.close(write)
    deadline = time.monotonic() + 30
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        time.sleep(0.02)
    with open(read) as pipe:
        assert pipe.read() == str((int(roll[5:30].sum()),) * 2)


def test_tensorstore_is_used_where_it_can_and_refused_after_a_fork(copies, monkeypatch):
    pytest.importorskip("tensorstore")
    open_volume(copies / "v3.zarr")[:1]
    assert stores._tensorstore_pid == os.getpid()
    monkeypatch.setattr(stores, "_tensorstore_pid", os.getpid() + 1)
    with pytest.raises(DataError, match="would hang. Start workers with 'spawn'"):
        open_volume(copies / "v3.zarr", reader="tensorstore")[:1]


def test_without_tensorstore_zarr_reads(copies, roll, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    assert total(open_volume(copies / "v3.zarr")) == roll[5:30].sum()
    with pytest.raises(ImportError, match="medvol_nb\\[fast\\]"):
        open_volume(copies / "v3.zarr", reader="tensorstore")[:1]


# --------------------------------------------------------------------------------------------------------- servers


class Handler(SimpleHTTPRequestHandler):
    "Serves files, with ranges; `trouble` lists what happens to the next requests"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        trouble = self.server.trouble.pop(0) if self.server.trouble else None
        if isinstance(trouble, int):
            return self.send_error(trouble)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data, status, span = path.read_bytes(), 200, self.headers.get("Range")
        if span:
            a, b = span.removeprefix("bytes=").split("-")
            data, status = (data[-int(b) :] if not a else data[int(a) : int(b) + 1 if b else None]), 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if trouble == "short" else data)


@pytest.fixture
def served(copies, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=copies))
    server.trouble, server.asked, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["v2.zarr/image", "v3.zarr/image", "sharded.zarr/image", "ome04.zarr", "ome05.zarr"])
def test_U20_a_url_gives_the_same_voxels_as_the_file(served, copies, roll, name):
    v = open_volume(f"{served.url}/{name}")
    assert v.shape == SHAPE and v.stored_chunks() is None
    for start, size in BOXES[1:]:
        assert np.array_equal(v.read(start, size)[0], open_volume(copies / name).read(start, size)[0])


def test_servers_that_stumble_are_asked_again(served, roll):
    v = open_volume(f"{served.url}/v3.zarr/image", reader="zarr")
    for trouble in ([500], [503, "short", 429], ["short"] * 5):
        served.trouble = list(trouble)
        assert np.array_equal(v[:16, :16, :16], roll[:16, :16, :16]) and not served.trouble
    served.trouble = [500] * 99
    before = len(served.asked)
    with pytest.raises(DataError, match=r"chunk 0.0.0 .*HTTP 500 .* 6 times in a row"):
        v[:16, :16, :16]
    assert len(served.asked) - before == 12  # six for the box, six to find the chunk


def test_what_does_not_pass_is_raised_at_once(served):
    v = open_volume(f"{served.url}/v3.zarr/image")
    served.trouble = [403] * 9
    with pytest.raises(DataError, match="HTTP 403"):
        v[:8, :8, :8]
    served.trouble = []
    with pytest.raises(MissingFile):
        open_volume(f"{served.url}/absent.zarr")
    with pytest.raises(DataError, match="is a group of unknown arrays"):
        open_volume(f"{served.url}/v3.zarr")


def test_identity_of_a_served_store_is_its_tags(served, monkeypatch):
    monkeypatch.setattr(
        Handler,
        "do_HEAD",
        lambda self: (
            self.send_response(200),
            self.send_header("ETag", self.server.tag + self.path),
            self.end_headers(),
        ),
    )
    served.tag = "a"
    v = open_volume(f"{served.url}/v3.zarr/image")
    first = v.fingerprint()
    assert v.fingerprint() == first
    served.tag = "b"
    assert v.fingerprint()["content"] != first["content"]


def test_fsspec_stores_are_listed(roll):
    fs = __import__("fsspec").filesystem("memory")
    group = zarr.open_group(zarr.storage.FsspecStore.from_url("memory://here/a.zarr"), mode="w")
    group.create_array("image", shape=(40, 20, 20), dtype="u1", chunks=(16, 16, 16))[:16] = 3
    v = open_volume("memory://here/a.zarr")
    assert (
        v.stored_chunks() == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
        and (v[:20].sum(axis=(1, 2)) == 3 * 400).sum() == 16
    )
    first = v.fingerprint()
    assert first == open_volume("memory://here/a.zarr").fingerprint()
    group["image"][39] = 1
    assert v.fingerprint()["content"] != first["content"]
    fs.rm("here", recursive=True)


def test_a_listing_that_fails_is_repeated(monkeypatch):
    fs, calls = __import__("fsspec").filesystem("memory"), []
    fs.pipe("/shelf/a/0", b"12")
    find, healthy = type(fs).find, 3

    def shaky(self, path, **options):
        calls.append(path)
        if len(calls) < healthy: raise TimeoutError("busy")
        return find(self, path, **options)

    monkeypatch.setattr(remote, "FIRST_PAUSE", 0)
    monkeypatch.setattr(type(fs), "find", shaky)
    assert list(Remote("memory://shelf").listing("a")) == ["0"] and len(calls) == 3
    healthy = 99
    with pytest.raises(DataError, match="shelf/a: TimeoutError: busy, 6 times in a row"):
        Remote("memory://shelf").listing("a")
    healthy = 0
    fs.rm("/shelf", recursive=True)


def test_a_passing_failure_is_repeated_five_times(monkeypatch):
    pauses, calls = [], []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)

    def fail():
        calls.append(1)
        raise Passing("busy")

    with pytest.raises(DataError, match="x: busy, 6 times in a row"):
        with_retries(fail, "x")
    assert len(calls) == 6 and np.allclose(pauses, [0.1, 0.2, 0.4, 0.8, 1.6])
    assert Remote("s3://b/a/").address("0.0.0") == "s3://b/a/0.0.0"


# ------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    "name, shape, spacing",
    [
        ("vnc_a.zarr/raw", (20, 512, 512), (50e-6, 4.6e-6, 4.6e-6)),
        ("ovule.zarr/label", (32, 128, 128), None),
        ("nuclei_1135.zarr/label", (100, 100, 100), (2.837e-4, 1.268e-4, 1.268e-4)),
        ("mni152_axial.ome.zarr", (1, 256, 207), None),
    ],
)
def test_real_stores(data_dir, name, shape, spacing):
    v = open_volume(data_dir / "zarr_multitask" / name)
    assert v.shape == shape and np.array_equal(v[...], open_volume(v.path, reader="zarr")[...])
    if spacing:
        assert np.allclose(v.spacing, spacing, rtol=1e-3)
    assert len(v.stored_chunks()) <= np.prod([-(-n // c) for n, c in zip(v.shape, v.chunks)])
