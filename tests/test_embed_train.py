"""Pages 33 and 33a: presets, what a batch becomes, exact resume, several processes, does it learn."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from medvol_nb import phantoms
from medvol_nb.checkpoints import load_checkpoint
from medvol_nb.core import ConfigError, DataError, MissingFile, read_csv
from medvol_nb.embed import train as module
from medvol_nb.embed.config import PRESETS, EmbeddingConfig, preset, settings, tiny
from medvol_nb.embed.data import network_volume
from medvol_nb.embed.losses_more import coarse_labels, nearest_prototype, prototypes
from medvol_nb.embed.model import EmbedderConfig, build_model, load_embedder, save_embedder
from medvol_nb.embed.train import Folders, Validation, batch_losses, make_batches, train, train_network
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.torchcore import FitState, NonFiniteLoss
from medvol_nb.volume import write_volume

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["spacing=8", "views.patch=[8,16,16]", "model.width=8", "model.emb=8", "loss.queries=10", "loss.hard=100",
         "loss.negatives=20", "loss.coarse_global=20", "loss.ignore_mm=20", "loss.positive_mm=8",
         "fit.tensorboard=false", "organs_crop=[16,32,32]", "pairs_crop=[16,32,32]", "suffixes=[]", "suffix_odds=[]",
         "fit.checkpoint_every=2", "views.rule=sample"]


def body(seed, shape=(36, 30, 32)): return phantoms.abdomen(shape, seed=seed)


@pytest.fixture(scope="session")
def scans(tmp_path_factory) -> Path:
    "Four phantoms with organs, each as CT and as an MR of the same place"
    root = tmp_path_factory.mktemp("scans")
    (root/"masks").mkdir()
    for k in range(4):
        p = body(k)
        for end, img in (("_0000", p.img), ("_0001", np.where(p.img > -500, 400 - np.abs(p.img - 60), 0))):
            write_volume(Volume(img.astype(np.int16), affine_from(p.spacing)), root/f"p{k}{end}.nii.gz")
            write_volume(Volume(p.lbl.astype(np.uint8), affine_from(p.spacing)), root/"masks"/f"p{k}{end}.nii.gz")
    return root


def quick(scans, out, steps=4, more=(), **how):
    how = {"tiny": True, "device": "cpu", **how}
    return train([scans], out=out, steps=steps, overrides=[*QUICK, *more], **how)


def losses(out): return [r["loss"] for r in read_csv(Path(out)/"log.csv")]


# ---- settings

@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_settings(name):
    cfg = preset(name)
    assert (cfg.fit.steps, cfg.fit.lr, cfg.fit.momentum, cfg.fit.weight_decay) == (20000, 0.02, 0.9, 1e-4)
    assert (cfg.fit.optimizer, cfg.fit.schedule, cfg.fit.warmup_steps) == ("sgd", "constant", 500)
    assert (cfg.fit.clip_norm, cfg.fit.checkpoint_every, cfg.fit.keep) == (None, 1000, 20)
    assert (cfg.loss.queries, cfg.loss.hard, cfg.loss.negatives, cfg.loss.tau) == (100, 2000, 500, 0.5)
    assert (cfg.loss.coarse_positive_mm, cfg.loss.coarse_ignore_mm, cfg.loss.coarse_z_mm) == (25, 5, 6)
    assert (cfg.loss.coarse_hard, cfg.loss.coarse_negatives) == (250, 200)
    base = name == "sam_deeplesion"
    assert (cfg.loss.positive_mm, cfg.loss.ignore_mm) == ((5, 3) if base else (2, 20))
    assert cfg.loss.coarse_global == (300 if base else 1000)
    assert cfg.views.patch == ((48 if name == "ct_mri_infer" else 32), 96, 96) and cfg.spacing == 2.0
    assert not cfg.loss.reference_quirks and cfg.model.width == 64 and cfg.model.emb == 128
    assert EmbeddingConfig.model_validate(json.loads(cfg.model_dump_json())) == cfg
    assert tiny(cfg).kinds == cfg.kinds


def test_D04_every_published_training_exists_by_name():
    assert PRESETS == ("sam_deeplesion", "sam_NIHLN", "samv2_NIHLN", "ct_mri_intra", "ct_mri_inter", "ct_mri_infer")
    with pytest.raises(ConfigError, match="must be one of sam_deeplesion"): preset("samv2_ct_mri")


def test_D07_settings_hold_no_paths_of_somebody_elses_machine():
    for name in PRESETS: assert "/" not in preset(name).model_dump_json()


def test_all_problems_of_a_file_are_told(tmp_path):
    (tmp_path/"a.yaml").write_text("loss: {tua: 0.1}\nviews: {patch: [1, 2]}\n")
    with pytest.raises(ConfigError, match="(?s)did you mean 'tau'.*views.patch|views.patch.*did you mean 'tau'"):
        settings(tmp_path/"a.yaml")


@pytest.mark.parametrize("odds", ["[0,0]", "[1,-1]", "[1]"])
def test_odds_of_images_that_cannot_be_drawn_are_refused(odds):
    with pytest.raises(ConfigError, match="suffix_odds: "): settings(None, "ct_mri_intra", [f"suffix_odds={odds}"])


# ---- what a batch becomes

def test_D01_a_single_dataset_trains(scans, tmp_path):
    done = quick(scans, tmp_path/"run", preset="sam_NIHLN")
    assert done["finished"] and len(losses(tmp_path/"run")) == 4
    net, about = load_embedder(tmp_path/"run", "cpu")
    assert about.name == "AnatSAM" and about.spacing == 8 and net.cfg.width == 8


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_small_on_a_cpu(name, scans, tmp_path):
    save_embedder(tmp_path/"start.safetensors", build_model(tiny(preset(name)).model.model_copy(
        update={"width": 8, "emb": 8})), EmbedderConfig())
    more = ['suffixes=["_0000","_0001"]', "suffix_odds=[0.6,0.4]"] if name.startswith("ct_mri") else []
    done = quick(scans, tmp_path/"run", 2, more, preset=name, organs=[scans], pairs=[scans],
                 start_from=tmp_path/"start.safetensors")
    assert done["steps"] == 2 and np.isfinite(float(done["last"]["loss"]))


def test_D19_nothing_is_defined_twice():
    "The reference has two functions of one name with different signatures; the second wins without a word"
    for path in sorted(Path(module.__file__).parent.glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        scopes = [body, *(node.body for node in body if isinstance(node, ast.ClassDef))]
        for scope in scopes:
            names = Counter(n.name for n in scope if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                            and not any(isinstance(d, ast.Attribute) for d in n.decorator_list)) # x.setter
            assert not [n for n, k in names.items() if k > 1], path.name


def test_D20_the_second_stage_does_not_start_from_nothing(scans, tmp_path):
    with pytest.raises(MissingFile, match="nothing.pth"):
        quick(scans, tmp_path/"run", start_from=tmp_path/"nothing.pth", dry_run=True)
    with pytest.raises(ConfigError, match="this stage continues another one"):
        quick(scans, tmp_path/"run", preset="ct_mri_inter", pairs=[scans], more=['suffixes=["_0000","_0001"]'])


def test_D30_a_batch_loads_only_what_its_branch_uses(scans):
    cfg = settings(None, "samv2_NIHLN", QUICK, small=True)
    batches = make_batches(Folders((str(scans),), (str(scans),)), cfg)
    seen = [b for _, (_, b) in zip(range(12), batches.epoch(0))] + [b for _, b in batches.epoch(1)]
    for b in seen: assert ("images" in b) != ("volumes" in b)
    assert {b["branch"] for b in seen} == {"views", "organs"}
    for kind in ("views", "organs"):
        batch = next(b for b in seen if b["branch"] == kind)
        net = build_model(cfg.model)
        parts = batch_losses(net, batch, cfg)
        assert set(parts) == {"loss", *(("fine", "coarse") if kind == "views" else ("semantic",))}
        parts["loss"].backward()
        idle = ("semantic",) if kind == "views" else ("fine", "coarse")
        for k, p in net.named_parameters():
            assert p.grad is not None
            if k.startswith(tuple(f"heads.{h}" for h in idle)): assert not p.grad.any()


def test_E4_quirks_change_the_loss_and_nothing_else(scans):
    cfg = settings(None, "samv2_NIHLN", [*QUICK, 'slots={"views":2,"organs":1}', "odds=null"], small=True)
    batch = next(iter(make_batches(Folders((str(scans),), (str(scans),)), cfg).epoch(0)))[1]
    odd = cfg.model_copy(update={"loss": cfg.loss.model_copy(update={"reference_quirks": True})})
    with torch.no_grad(): a, b = (batch_losses(build_model(cfg.model), batch, c) for c in (cfg, odd))
    assert a["semantic"] == b["semantic"] and a["coarse"] != b["coarse"]


# ---- exact continuation

@pytest.mark.parametrize("workers", [0, 1, pytest.param(4, marks=pytest.mark.slow)])
def test_R1_an_interrupted_run_is_bit_identical(workers, scans, tmp_path):
    quick(scans, tmp_path/"a", 6)
    for stop in (1, 4, None): quick(scans, tmp_path/"b", 6, stop_at=stop, workers=workers)
    assert (tmp_path/"a/log.csv").read_bytes() == (tmp_path/"b/log.csv").read_bytes()
    assert (tmp_path/"a/model.safetensors").read_bytes() == (tmp_path/"b/model.safetensors").read_bytes()


def test_D22_a_resumed_run_sees_the_same_samples(scans):
    cfg = settings(None, None, [*QUICK, "per_epoch=6"], small=True)
    whole = [b for _, b in make_batches(Folders((str(scans),)), cfg).epoch(0)]
    later = [b for _, b in make_batches(Folders((str(scans),)), cfg).epoch(0, start=4)]
    for a, b in zip(whole[4:], later, strict=True): assert torch.equal(a["images"], b["images"])


def test_other_settings_other_scans_other_start_are_refused(scans, tmp_path):
    quick(scans, tmp_path/"run", 2)
    for more in ({"more": ["loss.tau=0.3"]}, {"seed": 5}, {"start_from": tmp_path/"run"}):
        with pytest.raises(DataError, match="other settings"): quick(scans, tmp_path/"run", 2, **more)
    other = tmp_path/"other"
    other.mkdir()
    write_volume(Volume(body(9).img.astype(np.int16), affine_from(body(9).spacing)), other/"p.nii.gz")
    with pytest.raises(DataError, match="other settings"): quick(other, tmp_path/"run", 2)


def test_R2_an_infinite_loss_names_the_scans(scans, tmp_path, monkeypatch):
    real = module.view_losses
    monkeypatch.setattr(module, "view_losses", lambda *a, **k: {n: v*np.inf for n, v in real(*a, **k).items()})
    with pytest.raises(NonFiniteLoss, match=r"p\d_000\d"): quick(scans, tmp_path/"run", 9)
    rows = read_csv(tmp_path/"run/log.csv")
    assert len(rows) <= 3 and all(r["skipped"] == "1" for r in rows)


SCRIPT = """
import sys
from medvol_nb.embed.train import train
train([sys.argv[1]], out=sys.argv[2], tiny=True, steps=3, device="cpu", overrides=sys.argv[3:])
"""


def launch(folder, words, processes, port):
    (folder/"train.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port", str(port)]
    command = [sys.executable, *(torchrun if processes > 1 else []), folder/"train.py", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_R4_two_processes_equal_one(scans, tmp_path):
    "Group normalisation; coarse negatives come from the pairs of the other process, too"
    common = [*QUICK, "model.norm=gn", "per_epoch=3"]
    for n, slots in ((2, 1), (1, 2)):
        done = launch(tmp_path, [scans, tmp_path/f"run{n}", *common, f'slots={{"views":{slots}}}'], n, 29561)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([[float(r[k]) for k in ("loss", "fine", "coarse")] for r in read_csv(tmp_path/f"run{n}/log.csv")]
                for n in (1, 2))
    assert np.allclose(one, two, atol=1e-5)
    a, b = (load_checkpoint(tmp_path/f"run{n}/model.safetensors")["model"] for n in (1, 2))
    assert all(torch.allclose(v, b[k], atol=1e-5) for k, v in a.items())


def test_syncbn_on_cpus_is_refused_before_anything(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="syncbn needs GPUs"): quick(scans, tmp_path/"run", more=["model.norm=syncbn"])


# ---- does it learn

@pytest.mark.slow
def test_E1_smoke_loss_and_matching_error_fall(tmp_path):
    "Synthetic bodies, half a minute: loss down by 20 % at least, mean error on bodies never seen at most 0.6 of before"
    for folder, seeds in (("scans", range(8)), ("val", (20, 21))):
        (tmp_path/folder).mkdir()
        for k in seeds:
            p = body(k, (96, 72, 84))
            write_volume(Volume(p.img.astype(np.int16), affine_from(p.spacing)), tmp_path/folder/f"p{k}.nii.gz")
    more = ["spacing=4", "views.patch=[16,32,32]", "views.degrees=5", "views.independent=0", "model.emb=32",
            "loss.coarse_global=0", "loss.hard=600", "loss.negatives=150", "loss.ignore_mm=24", "loss.positive_mm=4",
            "fit.lr=3e-3", "fit.validate_every=180", "fit.tensorboard=false"]
    cfg = settings(None, "sam_NIHLN", more, {"fit.steps": 180, "fit.device": "cpu"}, small=True)
    held = make_batches(Folders((str(tmp_path/"val"),)), cfg).sets["views"]
    before = Validation(held, cfg)(build_model(cfg.model).eval(), FitState(None, tmp_path))
    train_network(make_batches(Folders((str(tmp_path/"scans"),)), cfg), cfg, out_dir=tmp_path/"run", held_out=held)
    rows = read_csv(tmp_path/"run/log.csv")
    loss = [float(r["loss"]) for r in rows]
    assert np.mean(loss[-15:]) <= 0.8*np.mean(loss[:5]) and float(rows[-1]["val_loss"]) <= 0.8*before["val_loss"]
    assert float(rows[-1]["val_mm"]) <= 0.6*before["val_mm"], (before, rows[-1])


@pytest.mark.slow
def test_E5_the_semantic_head_learns_organs(scans, tmp_path):
    "Nearest prototype of a body never seen: better than chance, and than the fine head of the same network"
    more = [*QUICK, "fit.lr=3e-3", "views.patch=[16,24,24]", "spacing=6", "fit.checkpoint_every=50"]
    train([scans], organs=[scans], out=tmp_path/"run", preset="samv2_NIHLN", steps=120, tiny=True, device="cpu",
          overrides=more)
    net = load_embedder(tmp_path/"run", "cpu")[0]
    score = {}
    maps, labels = [], []
    for k in (0, 30):
        p = body(k)
        img, grid = network_volume(Volume(p.img.astype(np.int16), affine_from(p.spacing)), 6.0, "ct")
        idx = np.indices(grid.shape).reshape(3, -1).T
        at = np.round(np.linalg.inv(affine_from(p.spacing))[:3] @ np.c_[grid.to_world(idx), np.ones(len(idx))].T)
        at = np.clip(at.T.astype(int), 0, np.array(p.lbl.shape) - 1)
        labels.append(coarse_labels(torch.from_numpy(p.lbl[tuple(at.T)].reshape(grid.shape).astype(np.int64))).flatten())
        with torch.no_grad(): maps.append(net(torch.from_numpy(img)[None, None]))
    for head in ("fine", "semantic"):
        a, b = (m[head][0].flatten(1).T for m in maps)
        found, mean, _ = prototypes(a, labels[0])
        known = torch.isin(labels[1], found)
        score[head] = float((nearest_prototype(b[known], found, mean) == labels[1][known]).float().mean())
    chance = 1/len(found)
    assert score["semantic"] > 2*chance and score["semantic"] > score["fine"], score
