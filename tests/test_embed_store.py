"""Embeddings on disk: the same vectors back, lazily, and nothing else under their name; slabs are exact."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr

from medvol_nb import phantoms
from medvol_nb.core import DataError, FormatError, MedvolError, MissingFile, fingerprint, rng_for
from medvol_nb.embed import store as page
from medvol_nb.embed.coarse import interpolation_matrix, norm_map
from medvol_nb.embed.data import net_grid
from medvol_nb.embed.model import EmbedderConfig, ModelConfig, build_model, save_embedder
from medvol_nb.embed.store import (
    STRIDES,
    Embedding,
    _differences,
    _Summed,
    embed,
    embed_volume,
    open_embedding,
    position_embedding,
    scan_files,
    write_embedding,
)
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.parallel import BatchError, describe
from medvol_nb.volume import write_volume
from tests.faults.injectors import forked

torch.set_num_threads(1)


def unit(shape, seed=0):
    x = rng_for(seed, "unit").standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=0)


def small_scan(shape=(18, 16, 30), spacing=(6.0, 6.0, 4.0), seed=1):
    return Volume(phantoms.abdomen(shape, seed=seed, spacing=6.0).img, affine_from(spacing))


@pytest.fixture(scope="module")
def net():
    return build_model(ModelConfig(width=8, emb=16), seed=3).eval()


@pytest.mark.parametrize("fine, coarse", [((9, 21, 13), (3, 4, 2)), ((1, 1, 1), (1, 1, 1)), ((5, 8, 3), (1, 2, 1))])
def test_norm_map_is_the_length_of_the_interpolated_vectors(fine, coarse):
    c = unit((12, *coarse))
    slow = F.interpolate(torch.from_numpy(c)[None], size=fine, mode="trilinear")[0].norm(dim=0).numpy()
    np.testing.assert_allclose(norm_map(torch.from_numpy(c), fine, (None,) * 3), slow, atol=2e-6)


def test_coarse_voxels_stay_where_they_are():
    "Rounded up sizes do not move the far end: voxel i of the coarse grid is at fine position 8 i + 3.5"
    w = interpolation_matrix(103, 13, 1 / 8)
    at = (w @ np.arange(13)) * 8 + 3.5
    np.testing.assert_allclose(at[4:96], np.arange(4, 96), atol=1e-4)
    assert np.abs(w.sum(1) - 1).max() < 1e-6


@pytest.mark.parametrize("dtype, limit", [("int8", 0.014), ("float16", 2e-3)])
def test_similarities_survive_storage(tmp_path, dtype, limit):
    "Vectors of 128 numbers: for stored keys and exact queries a largest error of about 0.011 was measured before"
    vol = Volume(np.broadcast_to(np.uint8(0), (60, 50, 40)), affine_from(2.0))
    grid = net_grid(vol)
    maps = {h: unit((128, *grid.feature(STRIDES[h]).shape), k) for k, h in enumerate(("fine", "coarse"))}
    emb = Embedding(maps, grid, grid, "m")
    write_embedding(emb, tmp_path / "e.zarr", dtype=dtype)
    back = open_embedding(tmp_path / "e.zarr")
    a, b = (e.vectors("fine").reshape(128, -1).T for e in (emb, back))
    q = a[::97]
    assert np.abs(q @ a.T - q @ b.T).max() < limit
    assert (q @ b.T).argmax(1).tolist() == (q @ a.T).argmax(1).tolist()
    assert np.abs(back.vectors("coarse") - maps["coarse"]).max() < 1e-3


def test_P5_slabs_are_read_alone(tmp_path, monkeypatch):
    "Opening reads no vectors, a slab reads its chunks only"
    emb = position_embedding(Volume(np.broadcast_to(np.uint8(0), (40, 40, 100)), affine_from(2.0)), c=16)
    write_embedding(emb, tmp_path / "e.zarr")
    opened = open_embedding(tmp_path / "e.zarr")
    far = sorted((tmp_path / "e.zarr/fine/c/0").iterdir())[-1]
    for chunk in [p for p in far.rglob("*") if p.is_file()]:
        chunk.write_bytes(b"damaged")
    assert np.abs(opened.vectors("fine", slice(8, 16)) - emb.maps["fine"][:, 8:16]).max() < 0.01
    with pytest.raises(FormatError, match="e.zarr"):
        opened.vectors("fine", slice(44, 50))


@pytest.mark.parametrize("along", ["x", "xy", "xyz"])
def test_differences_add_up_to_the_same_numbers(along):
    "Any planes of a map, which need not begin or end with a row of chunks; sums wrap around at 8 bits"
    m = np.random.default_rng(0).integers(-127, 128, (5, 21, 9, 7), dtype=np.int8)
    read = _Summed(_differences(m, along), along)
    for planes in (slice(None), slice(3, 5), slice(8, 21), slice(9, 17), slice(0, 20, 3), slice(20, 30), slice(4, 4)):
        np.testing.assert_array_equal(read[:, planes], m[:, planes])
    np.testing.assert_array_equal(read[2:4, 10, 3], m[2:4, 10, 3])
    np.testing.assert_array_equal(np.asarray(read[...]), m)


def test_differences_along_all_axes_are_stored_where_vectors_are_smooth(tmp_path, net):
    emb = embed_volume(net, small_scan(), device="cpu")
    write_embedding(emb, tmp_path / "e.zarr")
    back = open_embedding(tmp_path / "e.zarr")
    assert back.maps["fine"].along == "xyz"
    whole = back.vectors("fine")
    assert np.abs(whole - emb.maps["fine"]).max() <= 0.5 / back.scales["fine"] + 1e-6
    np.testing.assert_array_equal(back.vectors("fine", slice(5, 11)), whole[:, 5:11])
    rough = replace(emb, maps={**emb.maps, "fine": unit(emb.maps["fine"].shape, 4)})
    write_embedding(rough, tmp_path / "r.zarr")
    assert not hasattr(open_embedding(tmp_path / "r.zarr").maps["fine"], "along")


@pytest.mark.parametrize("along", [{"fine": "x" * 9}, {"fine": 3}, ["fine"]])
def test_differences_that_nobody_writes_are_refused(tmp_path, along):
    "Also with a digest that fits"
    write_embedding(position_embedding(small_scan(), c=16), tmp_path / "e.zarr")
    group = zarr.open_group(str(tmp_path / "e.zarr"), mode="r+")
    attrs = {k: v for k, v in group.attrs.items() if k != "digest"} | {"differences": along}
    group.attrs.update({**attrs, "digest": fingerprint(attrs)})
    with pytest.raises(FormatError, match="e.zarr"):
        open_embedding(tmp_path / "e.zarr")


def test_D06_stores_need_no_gpu_no_network_and_run_nothing(tmp_path):
    "Opened and read in a fresh process, where unpickling is forbidden"
    emb = position_embedding(small_scan(), c=16)
    write_embedding(emb, tmp_path / "e.zarr")
    code = """
import pickle, sys
pickle.load = pickle.loads = pickle.Unpickler = None
from medvol_nb.embed.store import open_embedding
e = open_embedding(sys.argv[1])
print(e.vectors("fine").shape)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "e.zarr")], text=True, capture_output=True)
    assert run.stdout.strip() == str(emb.maps["fine"].shape), run.stderr
    names = {p.suffix for p in (tmp_path / "e.zarr").rglob("*") if p.is_file()}
    assert names <= {".json", ""}


@pytest.mark.parametrize("planes", [61, 60, 59])
def test_P3_slabs_have_the_vectors_of_the_whole(net, planes):
    "Halo of 28 network voxels; the last digits may differ, since convolutions choose their own order of sums"
    vol = Volume(rng_for(planes, "v").normal(0, 300, (20, 24, planes * 2)).astype(np.float32), affine_from((4, 4, 1.0)))
    whole, slabs = (embed_volume(net, vol, slab=s, device="cpu", body=None) for s in (None, 12))
    for h in whole.maps:
        assert whole.maps[h].shape == slabs.maps[h].shape
        np.testing.assert_allclose(slabs.maps[h], whole.maps[h], atol=2e-6)


def test_slabs_of_a_deeper_network_have_the_vectors_of_the_whole():
    "Depth 34 sees 52 network voxels up and down"
    net = build_model(ModelConfig(width=8, emb=16, depth=34), seed=3).eval()
    vol = Volume(rng_for(0, "v").normal(0, 300, (20, 24, 240)).astype(np.float32), affine_from((4, 4, 1.0)))
    whole, slabs = (embed_volume(net, vol, slab=s, device="cpu", body=None) for s in (None, 12))
    for h in whole.maps: np.testing.assert_allclose(slabs.maps[h], whole.maps[h], atol=2e-6)


def test_slabs_with_a_smaller_halo_would_differ(net, monkeypatch):
    "So the test above can fail"
    vol = Volume(rng_for(0, "v").normal(0, 300, (20, 24, 120)).astype(np.float32), affine_from((4, 4, 1.0)))
    whole = embed_volume(net, vol, device="cpu", body=None)
    monkeypatch.setattr(page, "HALO", {18: 8})
    slabs = embed_volume(net, vol, slab=12, device="cpu", body=None)
    assert np.abs(slabs.maps["coarse"] - whole.maps["coarse"]).max() > 1e-4


def test_R5_other_networks_are_refused(tmp_path, net):
    scan = small_scan()
    embed_volume(net, scan, tmp_path / "a.zarr", device="cpu")
    other = embed_volume(build_model(ModelConfig(width=8, emb=16), seed=4).eval(), scan, device="cpu")
    assert open_embedding(tmp_path / "a.zarr").model != other.model
    with pytest.raises(DataError, match="cannot be compared"):
        open_embedding(tmp_path / "a.zarr", other.model)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "AIR", "oblique"])
def test_R6_points_round_trip_through_any_header(tmp_path, codes):
    "World to feature index and back, with flips, permutations and oblique axes, to 1e-3 mm; also through a file"
    from medvol_nb.geometry import reorient

    vol = Volume(np.broadcast_to(np.uint8(0), (31, 40, 22)), affine_from((1.3, 0.9, 3.1), (-50, 7, 900)))
    if codes == "oblique":
        t = np.deg2rad(14)
        turn = np.array([[np.cos(t), -np.sin(t), 0, 3], [np.sin(t), np.cos(t), 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
        vol = replace(vol, affine=turn @ vol.affine)
    else:
        vol = reorient(vol, codes)
    emb = position_embedding(vol, c=8)
    write_embedding(emb, tmp_path / "e.zarr")
    back = open_embedding(tmp_path / "e.zarr")
    pts = emb.fine.to_world(rng_for(0, "p").uniform(0, 1, (50, 3)) * emb.fine.shape)
    for grid in ("grid", "fine", "native"):
        g, h = getattr(emb, grid), getattr(back, grid)
        assert np.abs(h.to_world(g.to_index(pts)) - pts).max() < 1e-3
    assert sorted(back.native.shape) == [22, 31, 40]


def test_attributes_are_covered_by_a_digest(tmp_path):
    write_embedding(position_embedding(small_scan(), c=8), tmp_path / "e.zarr")
    meta = tmp_path / "e.zarr/zarr.json"
    tree = json.loads(meta.read_text())
    tree["attributes"]["grid"]["affine"][0][3] += 1
    meta.write_text(json.dumps(tree))
    with pytest.raises(FormatError, match="attributes were altered"):
        open_embedding(tmp_path / "e.zarr")


def test_a_store_is_whole_or_absent(tmp_path):
    "Death at every step of a write: the old store or the new one"
    old, new = (position_embedding(small_scan((8, 8, 8)), c=4, seed=s) for s in (0, 1))
    path = tmp_path / "e.zarr"
    write_embedding(old, path)
    steps = forked(lambda: write_embedding(new, path, "overwrite"), tmp_path)
    write_embedding(old, path, "overwrite")
    for at in range(1, steps + 1, max(1, steps // 12)):
        assert forked(lambda: write_embedding(new, path, "overwrite"), tmp_path, at) == -9
        assert open_embedding(path).model in (old.model, new.model)
        open_embedding(path).vectors("fine")
        write_embedding(old, path, "overwrite")


def test_embed_goes_on_to_the_same_bytes(tmp_path, net):
    save_embedder(tmp_path / "net.safetensors", net, EmbedderConfig(name="t"))
    (tmp_path / "scans").mkdir()
    for k in range(2):
        write_volume(small_scan((10, 10, 12), seed=k), tmp_path / f"scans/c{k}.nii.gz")

    def run(out):
        return embed(tmp_path / "scans", tmp_path / out, tmp_path / "net.safetensors", device="cpu")

    assert run("whole")["scans"] == 2
    steps = forked(lambda: run("counted"), tmp_path / "counted")
    for at in (steps // 3, 2 * steps // 3):
        assert forked(lambda: run("killed"), tmp_path / "killed", at) == -9
    run("killed")
    for k in range(2):
        assert describe(tmp_path / f"whole/c{k}.zarr") == describe(tmp_path / f"killed/c{k}.zarr")


def test_embed_lists_what_failed_and_finishes_the_rest(tmp_path, net):
    save_embedder(tmp_path / "net.safetensors", net, EmbedderConfig())
    (tmp_path / "s").mkdir()
    write_volume(small_scan((10, 10, 12)), tmp_path / "s/good.nii.gz")
    (tmp_path / "s/bad.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(BatchError, match="1 of 2"):
        embed(tmp_path / "s", tmp_path / "o", tmp_path / "net.safetensors", device="cpu")
    assert open_embedding(tmp_path / "o/good.zarr").body is None or open_embedding(tmp_path / "o/good.zarr").body.any()
    assert "bad.nii.gz" in (tmp_path / "o/failed.csv").read_text()


def test_sources_of_scans(tmp_path):
    with pytest.raises(MissingFile):
        scan_files(tmp_path / "none")
    with pytest.raises(DataError, match="holds no scans"):
        scan_files(tmp_path)
    (tmp_path / "l.json").write_text('{"training": [{"image": "a.nii.gz"}], "testing": [{"image": "b.nii.gz"}]}')
    (tmp_path / "l.csv").write_text("name\nc.nii.gz\n")
    assert [p.name for p in scan_files(tmp_path / "l.json")] == ["a.nii.gz", "b.nii.gz"]
    assert [p.name for p in scan_files(tmp_path / "l.csv")] == ["c.nii.gz"]


def test_what_cannot_be_stored_is_refused(tmp_path):
    emb = position_embedding(small_scan(), c=4)
    broken = replace(emb, maps={**emb.maps, "fine": emb.maps["fine"] * np.float32(np.nan)})
    with pytest.raises(DataError, match="NaN"):
        write_embedding(broken, tmp_path / "e.zarr")
    with pytest.raises(DataError, match="ends in .zarr"):
        write_embedding(emb, tmp_path / "e")
    assert not list(tmp_path.iterdir())
    with pytest.raises(MedvolError, match="exists"):
        write_embedding(emb, write_embedding(emb, tmp_path / "e.zarr"))


def test_a_store_of_another_network_is_not_taken_for_this_one(tmp_path):
    nets = [build_model(ModelConfig(width=8, emb=8), seed).eval() for seed in (0, 1)]
    scan = small_scan()
    cfg = EmbedderConfig(spacing=6.0, intensity="ct")
    embed_volume(nets[0], scan, tmp_path / "a.zarr", config=cfg, device="cpu")
    embed_volume(nets[0], scan, tmp_path / "a.zarr", config=cfg, device="cpu", on_exists="skip")
    with pytest.raises(DataError, match="different networks"):
        embed_volume(nets[1], scan, tmp_path / "a.zarr", config=cfg, device="cpu", on_exists="skip")


def test_scans_of_a_prepared_folder_and_names_that_lead_elsewhere(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "index.csv").write_text("name\na.zarr\n")
    assert scan_files(tmp_path / "index.csv") == [tmp_path / "images/a.zarr"]
    (tmp_path / "list.csv").write_text("image\n../secret.nii.gz\n")
    with pytest.raises(DataError):
        scan_files(tmp_path / "list.csv")
    (tmp_path / "series").mkdir()
    (tmp_path / "series/1.dcm").touch()
    assert scan_files(tmp_path / "series") == [tmp_path / "series"]
