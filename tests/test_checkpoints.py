"""Devices, seeds, and checkpoints: round trips, damage, kills, foreign weights."""
import json
import logging
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medvol_nb.checkpoints import (
    Converter,
    autocast_for,
    checkpoint_path,
    device_for,
    latest_checkpoint,
    load_checkpoint,
    load_foreign,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
    seeded,
    torch_rng_for,
)
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OutputExists, rng_for

ROOT = Path(__file__).resolve().parents[1]


def same(a, b) -> bool:
    "Equal in values, types of containers, number types and shapes; NaN equals NaN"
    if isinstance(a, torch.Tensor):
        raw = lambda t: t.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else []
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        kinds = [getattr(x, "dtype", np.dtype("O")).newbyteorder("=") for x in (a, b)]
        return kinds[0] == kinds[1] and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if type(a) is not type(b): return False
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def trip(state: dict, folder: Path) -> dict:
    return load_checkpoint(save_checkpoint(folder/"c.safetensors", state))


# ---------------------------------------------------------------- devices and seeds

def test_devices(monkeypatch):
    assert device_for("cpu") == torch.device("cpu") and device_for("auto").type in ("cpu", "cuda")
    for bad in ("gpu", "", "cpu:x"):
        with pytest.raises(ConfigError, match="is not a device"): device_for(bad)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU.*--device cpu"): device_for("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_for("auto") == torch.device("cuda", 1) and device_for("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="cuda:2 was asked for, there are 2"): device_for("cuda:2")


def test_autocast():
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    with autocast_for(cpu): assert (x @ x).dtype == torch.float32
    with autocast_for(cpu, "bf16"): assert (x @ x).dtype == torch.bfloat16
    for bad in ("fp8", None, "fp16"):
        with pytest.raises(ConfigError, match="precision"): autocast_for(cpu, bad)


def test_streams_of_torch():
    draw = lambda *keys: torch.rand(3, generator=torch_rng_for(*keys)).tolist()
    assert draw(0, "noise", 7) == draw(0, "noise", 7) and len({tuple(draw(0, k)) for k in ("a", 1, "1", (1,),
                                                                                           b"1")}) == 5
    assert torch.randint(2**31, (3,), generator=torch_rng_for(0, "case", 1)).tolist() == GOLDEN
    with pytest.raises(DataError): torch_rng_for(-1)


GOLDEN = [1766752026, 1033182786, 1485816495] # Mersenne Twister of torch, seeded with the first two words of the stream


def test_seeded_restores():
    torch.manual_seed(3)
    want, state = torch.rand(1), torch.random.get_rng_state()
    with seeded(0, "init"): a = torch.rand(4)
    torch.rand(9)
    with pytest.raises(ZeroDivisionError), seeded(0, "init"):
        b = torch.rand(4)
        1/0
    torch.manual_seed(3)
    assert torch.equal(a, b) and torch.equal(torch.rand(1), want) and torch.equal(torch.random.get_rng_state(), state)


# ---------------------------------------------------------------- round trips

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool,
          torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5)], ids=str)
def test_tensors(tmp_path, dtype, shape):
    x = torch.from_numpy(rng_for(1, str(shape)).integers(0, 2, shape or (1,)).reshape(shape)).to(dtype)
    assert same(trip({"x": x}, tmp_path), {"x": x})


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i1", "i2", "i8", "u1", "u2", "u4", "u8", "?", "c8", ">f4", ">i2"])
def test_arrays(tmp_path, dtype):
    base = rng_for(2, "array").integers(0, 2, (4, 6)).astype(dtype)
    state = {"a": base, "f": np.asfortranarray(base), "v": base[::-1, ::2], "n": np.array(base[1, 1]), "e": base[:0],
             "b": np.broadcast_to(base[0], (3, 6))}
    assert same(trip(state, tmp_path), state)


def test_trees(tmp_path):
    t = torch.arange(6.)
    state = {"int keys": {0: t, 7: {"x": 1}}, "mixed": {1: "a", "1": "b", None: 3, 2.5: t, (1, ("x", 2)): t + 1},
    "tuple": (1, (t,), []),
             "list": [t, {"y": (t,)}, None, True, -1, 2**80, "ü\u2028", 0.1, float("inf"), float("-inf"), float("nan")],
             "$tensor": "not one", "d": {"$items": [1], "$tuple": t, "$array": {}}, "": {"": t + 2, "x": t + 3},
             "x": t + 4, "a/b": t + 5,
             "a": {"b": t + 6, "b_": t + 7}, "empty": {}, "none": (), "__metadata__": t + 8,
             "tensor list": [{"$tensor": t}]}
    assert same(trip(state, tmp_path), state)


def test_shared_and_viewed_tensors(tmp_path):
    base = torch.arange(24.).reshape(4, 6)
    state = {"a": base, "b": base, "t": base.T, "slice": base[1:3], "strided": base[:, ::2],
    "expanded": base[0].expand(3, 6),
             "overlap": base.flatten()[:20], "parameter": base.clone().requires_grad_(), "again": {"a": base},
             "conj": torch.complex(base, base + 1).conj(), "neg": torch.complex(base, base).conj().imag}
    back = trip(state, tmp_path)
    assert all(torch.equal(back[k], v) for k, v in state.items() if k != "again") and torch.equal(back["again"]["a"],
                                                                                                  base)
    back["a"][0, 0] = 99
    assert back["b"][0, 0] == 0, "what was shared is separate afterwards"
    small = torch.zeros(1_000_000)[:3]
    assert save_checkpoint(tmp_path/"small.safetensors", {"x": small}).stat().st_size < 2000


def test_lossy_but_plain(tmp_path):
    back = trip({"np": np.float32(0.5), "path": Path("a/b"), "set": {2, 1}, "i": np.int64(3)}, tmp_path)
    assert back == {"np": 0.5, "path": "a/b", "set": [1, 2], "i": 3}


@pytest.mark.parametrize("bad, kind", [(object(), TypeError), (b"x", TypeError), (np.array(["x"]), TypeError),
                                       ({"x": lambda: 0}, TypeError),
                                       (torch.zeros(2, dtype=torch.complex128), DataError),
                                       (np.array([None]), TypeError)])
def test_what_cannot_be_stored(tmp_path, bad, kind):
    save_checkpoint(tmp_path/"c.safetensors", {"step": 1})
    with pytest.raises(kind): save_checkpoint(tmp_path/"c.safetensors", {"x": bad})
    assert load_checkpoint(tmp_path/"c.safetensors") == {"step": 1} and os.listdir(tmp_path) == ["c.safetensors"]


def test_training_state(tmp_path):
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.PReLU())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(2):
        model(torch.rand(2, 1, 5, 5, 5)).sum().backward()
        optimizer.step()
        schedule.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.random.get_rng_state()}
    back = trip(state, tmp_path)
    assert same(back["optimizer"], optimizer.state_dict()) and same(dict(state["model"]), back["model"])
    optimizer.load_state_dict(back["optimizer"])
    torch.random.set_rng_state(back["rng"])
    assert load_weights(model, back["model"]).missing == ()


def test_same_state_same_bytes(tmp_path):
    state = {"b": {k: torch.full((5,), float(k)) for k in range(20)}, "a": torch.ones(3), "s": [1, 2, {"x": 0.1}]}
    files = [save_checkpoint(tmp_path/f"{k}", state).read_bytes() for k in range(6)]
    code = ("import sys, torch; from medvol_nb.checkpoints import *; save_checkpoint(sys.argv[1], {'b': {k: "
            "torch.full((5,), float(k)) for k in range(20)}, 'a': torch.ones(3), 's': [1, 2, {'x': 0.1}]})")
    subprocess.run([sys.executable, "-c", code, str(tmp_path/"other")], cwd=ROOT, check=True)
    assert {*files, (tmp_path/"other").read_bytes()} == {files[0]}


def test_on_exists(tmp_path):
    path = save_checkpoint(tmp_path/"c", {"step": 1})
    assert save_checkpoint(path, {"step": 2}, "skip") == path and load_checkpoint(path)["step"] == 1
    with pytest.raises(OutputExists): save_checkpoint(path, {"step": 2}, "error")
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 2


# ---------------------------------------------------------------- damage

STATE = {"step": 7, "model": {"w": torch.arange(20.).reshape(4, 5), "b": torch.ones(4, dtype=torch.float16)},
"lr": 0.125,
         "e": torch.zeros(0, 5), "order": [3, 1, 2], "name": "run"}


def test_every_bit_counts(tmp_path):
    "Each flip is an error: header, tree, number type, shape, names and numbers are all covered by a checksum"
    good = save_checkpoint(tmp_path/"c", STATE).read_bytes()
    places = random.Random(0).sample(range(8*len(good)), 600)
    for at in places:
        bad = bytearray(good)
        bad[at//8] ^= 1 << at % 8
        (tmp_path/"bad").write_bytes(bad)
        with pytest.raises(FormatError, match="bad: "): load_checkpoint(tmp_path/"bad")


@pytest.mark.parametrize("change", [(b'"F32"', b'"I32"'), (b'"F16"', b'"I16"'), (b"[4,5]", b"[5,4]"),
                                    (b"[4,5]", b"[1,20]"),
                                    (b'\\"step\\": 7', b'\\"step\\": 8'), (b"0.125", b"0.126"),
                                    (b"[3, 1, 2]", b"[3, 2, 1]"),
                                    (b'"model/w"', b'"model/v"'), (b'\\"run\\"', b'\\"bun\\"'), (b"[0,5]", b"[0,7]")])
def test_header_edits(tmp_path, change):
    "Valid files that say something else"
    good = save_checkpoint(tmp_path/"c", STATE).read_bytes()
    n = struct.unpack("<Q", good[:8])[0]
    assert change[0] in good[8:8 + n], good[8:8 + n]
    head = good[8:8 + n].replace(*change)
    (tmp_path/"bad").write_bytes(struct.pack("<Q", len(head)) + head + good[8 + n:])
    with pytest.raises(FormatError, match="bad: "): load_checkpoint(tmp_path/"bad")


def test_truncated(tmp_path):
    good = save_checkpoint(tmp_path/"c", STATE).read_bytes()
    for n in sorted({0, 1, 7, 8, 9, len(good) - 1, *range(0, len(good), 37)}):
        (tmp_path/"bad").write_bytes(good[:n])
        with pytest.raises(FormatError, match="not a readable checkpoint"): load_checkpoint(tmp_path/"bad")
    (tmp_path/"bad").write_bytes(good + b"\0")
    with pytest.raises(FormatError): load_checkpoint(tmp_path/"bad")


def test_not_checkpoints(tmp_path):
    (tmp_path/"folder").mkdir()
    (tmp_path/"noise").write_bytes(rng_for(0, "noise").bytes(5000))
    (tmp_path/"bomb").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    head = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path/"large").write_bytes(struct.pack("<Q", len(head)) + head)
    for name in ("folder", "noise", "bomb", "large"):
        with pytest.raises(FormatError, match=f"{name}: not a readable checkpoint"): load_checkpoint(tmp_path/name)
    with pytest.raises(MissingFile, match="does not exist"): load_checkpoint(tmp_path/"absent")
    save_file({"w": torch.ones(1)}, tmp_path/"weights")
    with pytest.raises(FormatError, match="holds weights, not a checkpoint.*load_foreign"):
        load_checkpoint(tmp_path/"weights")


def test_newer_version(tmp_path, monkeypatch):
    from medvol_nb import checkpoints
    monkeypatch.setattr(checkpoints, "CHECKPOINT_VERSION", 5)
    save_checkpoint(tmp_path/"c", STATE)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_VERSION", 1)
    with pytest.raises(FormatError, match=r"newer version \(format 5, this one reads 1\)"):
        load_checkpoint(tmp_path/"c")


# ---------------------------------------------------------------- folders of checkpoints

def test_latest(tmp_path, caplog):
    assert latest_checkpoint(tmp_path/"absent") is None and latest_checkpoint(tmp_path) is None
    for step in (9, 10, 200, 1_000_000): save_checkpoint(checkpoint_path(tmp_path, step), {"step": step})
    for odd in ("step-x.safetensors", "step-00000001.safetensors", "last.safetensors"): (tmp_path/odd).write_text("")
    assert latest_checkpoint(tmp_path)[1]["step"] == 1_000_000
    checkpoint_path(tmp_path, 1_000_000).write_bytes(b"torn")
    (tmp_path/"step-000999999.safetensors").mkdir()
    with caplog.at_level(logging.WARNING, "medvol_nb"): path, state = latest_checkpoint(tmp_path)
    assert path == checkpoint_path(tmp_path, 200) and state["step"] == 200
    assert [r.getMessage().startswith("checkpoint passed over: ") for r in caplog.records] == [True, True]


def test_prune(tmp_path):
    for step in range(1, 6): save_checkpoint(checkpoint_path(tmp_path, step), {"step": step})
    (tmp_path/"best.safetensors").write_text("")
    assert prune_checkpoints(tmp_path, 0) == [] and prune_checkpoints(tmp_path, 9) == []
    assert prune_checkpoints(tmp_path, 2) == [f"step-00000000{k}.safetensors" for k in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors",
                                                          *(f"step-00000000{k}.safetensors" for k in (4, 5))]


SAVE_AND_DIE = """
import os, signal, sys
import torch
from medvol_nb import checkpoints, core
from medvol_nb.checkpoints import save_checkpoint
path, moment = sys.argv[1:]
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(path, {"step": 1, "w": torch.ones(1000)})
if moment == "before writing":
    import safetensors.torch
    safetensors.torch.save_file = die
if moment == "before the rename": core._fsync = die
save_checkpoint(path, {"step": 2, "w": torch.zeros(1000)})
die()
"""


@pytest.mark.parametrize("moment, step", [("before writing", 1), ("before the rename", 1), ("after", 2)])
def test_kill_while_saving(tmp_path, moment, step):
    "The row 18 of the table of faults does this at random times, too"
    run = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(tmp_path/"c"), moment], cwd=ROOT)
    assert run.returncode == -9 and load_checkpoint(tmp_path/"c")["step"] == step
    save_checkpoint(tmp_path/"d", {})
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]


# ---------------------------------------------------------------- weights

def test_load_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    good = {k: torch.full_like(v, 2.0) for k, v in model.state_dict().items()}
    assert load_weights(model, good).loaded == ("0.weight", "0.bias", "1.weight",
                                                "1.bias") and (model[1].bias == 2).all()
    bad = {"0.weight": torch.zeros(3, 5), "0.bias": torch.zeros(3), "2.x": torch.zeros(1), "1.bias": torch.zeros(2)}
    with pytest.raises(DataError, match=r"1 missing: 1.weight; 1 unexpected: 2.x; 1 changed in shape: 0.weight "
                                        r"\(3, 5\) -> \(3, 4\)"): load_weights(model, bad)
    assert (model[0].bias == 2).all(), "nothing was loaded"
    report = load_weights(model, bad, strict=False)
    assert report.loaded == ("0.bias", "1.bias") and (model[0].bias == 0).all() and (model[0].weight == 2).all()
    with pytest.raises(DataError, match="12 unexpected: a0, a1, a2, a3, a4 and 7 more"):
        load_weights(model, {**good, **{f"a{k}": torch.zeros(1) for k in range(12)}})


class Canary:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def malicious(folder: Path) -> dict[str, bytes]:
    "Files that run code in an ordinary reader"
    bird = Canary(folder/"canary")
    torch.save({"w": torch.ones(1), "x": bird}, folder/"zip")
    torch.save({"w": bird}, folder/"old", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder/"hand", "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(bird))
        z.writestr("archive/version", "3")
    out = {n: (folder/n).read_bytes() for n in ("zip", "old", "hand")}
    for n in out: (folder/n).unlink()
    return {**out, "pickle": pickle.dumps(bird), "protocol 0": pickle.dumps({"w": bird}, 0),
            "global": b"cos\nmkdir\n(V" + str(folder/"canary").encode() + b"\ntR.", "eval": pickle.dumps(eval)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_malicious_pickles(tmp_path):
    for name, content in malicious(tmp_path).items():
        for suffix in (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ""):
            (tmp_path/f"x{suffix}").write_bytes(content)
            with pytest.raises(FormatError,
                               match="refused or damaged|not a readable"): load_foreign(tmp_path/f"x{suffix}")
            with pytest.raises(FormatError): load_checkpoint(tmp_path/f"x{suffix}")
        assert not (tmp_path/"canary").exists(), name
    pickle.loads(malicious(tmp_path)["pickle"])
    assert (tmp_path/"canary").exists(), "the canary does sing where it is let"


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w, "epoch": 3},
                                  lambda w: {"model_state_dict": w}, lambda w: {"state_dict": {"model": w}}])
def test_foreign_layouts(tmp_path, wrap):
    weights = {"module.a.weight": torch.ones(2), "module.b": torch.zeros(1)}
    torch.save(wrap(weights), tmp_path/"x.pth")
    back = load_foreign(tmp_path/"x.pth")
    assert list(back) == ["a.weight", "b"] and torch.equal(back["a.weight"], torch.ones(2))


def test_foreign_damage(tmp_path):
    torch.save({"w": torch.arange(1000.)}, tmp_path/"x.pth")
    good = (tmp_path/"x.pth").read_bytes()
    for n in range(0, len(good) - 1, 401):
        (tmp_path/"bad.pth").write_bytes(good[:n])
        with pytest.raises(FormatError, match="refused or damaged"): load_foreign(tmp_path/"bad.pth")
    for content in ([1, 2], {}, {"a": 1}, torch.ones(1), None, {"a": torch.ones(1), "b": "text"}):
        torch.save(content, tmp_path/"y.pth")
        with pytest.raises(FormatError, match="holds no table of tensors"): load_foreign(tmp_path/"y.pth")
    with pytest.raises(MissingFile): load_foreign(tmp_path/"absent.pth")
    with pytest.raises(MissingFile): load_foreign(tmp_path)


def test_converters(tmp_path):
    save_file({"enc.w": torch.ones(2)}, tmp_path/"x.safetensors")
    other = Converter("other", lambda w: "dec.w" in w, dict)
    ours = Converter("ours", lambda w: "enc.w" in w, lambda w: {k.replace("enc", "encoder"): v for k, v in w.items()})
    assert list(load_foreign(tmp_path/"x.safetensors", (other, ours))) == ["encoder.w"]
    with pytest.raises(FormatError, match="layout not recognised. Known: other; first names in the file: enc.w"):
        load_foreign(tmp_path/"x.safetensors", (other,))
