"""Fine-tuning runs (acceptance A9 to A12; defects D4, D18, D19)."""

import os
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medvol_nb.checkpoints import load_checkpoint
from medvol_nb.core import ConfigError, DataError, FormatError, MissingFile, OutputExists, read_csv, read_json, rng_for
from medvol_nb.embryo.diffusion import learned_table
from medvol_nb.embryo.finetune import finetune, read_run
from medvol_nb.embryo.finetuned import latest_run, load_finetuned
from medvol_nb.embryo.phases import BASE_PROMPT, FocalPlane, Phase, PromptTemplate
from medvol_nb.embryo.plan import class_pictures
from medvol_nb.embryo.tiny import load_sd, make_tiny_sd, sample, weights_digest
from tests.faults.injectors import forked
from tests.faults.jobs import content
from tests.test_embryo_diffusion import image_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_sd(tmp_path_factory.mktemp("base") / "tiny", channels=(32, 32))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "few")


def run(tiny, few, out, name="run", settings=(), **more):
    given = {"max_train_steps": 6, "checkpoint_steps": 2, "validation_steps": 3, "num_validation_images": 1}
    extra = ("batch_size=2", "validation_image_steps=2", "lr=1e-3", "class_steps=2", *settings)
    return finetune(
        model=str(tiny), image_folder=few, output_dir=out, run_name=name, device="cpu", overrides=extra, **given | more
    )


def results(folder):
    "What must not depend on interruptions: not the times in run.json, nor which checkpoints before the last are kept"
    out, about = content(folder), read_json(folder / "run.json")
    old = sorted(n for n in out if n.startswith("checkpoints/"))[:-1]
    times = ("started", "finished", "seconds")
    kept = {k: v for k, v in out.items() if k not in ("run.json", *old)}
    return kept, {k: v for k, v in about.items() if k not in times}


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(tiny, few, tmp_path):
    for name, batch in (("one", 2), ("two", 1)):
        options = ["--run-name", name, "--batch-size", batch, "--max-train-steps", 4, "--num-validation-images", 0]
        options += ["--model", tiny, "--image-folder", few, "--output-dir", tmp_path, "--lr", 1e-3, "--device", "cpu"]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29583"]
        command = [sys.executable, *(torchrun if name == "two" else []), "-m", "medvol_nb.cli", "embryo", "finetune"]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
        end = subprocess.run([str(w) for w in [*command, *options]], env=env, capture_output=True, text=True,
                             timeout=400)  # fmt: skip
        assert end.returncode == 0, end.stderr[-3000:]
    losses = [[float(r["loss"]) for r in read_csv(tmp_path / n / "log.csv")] for n in ("one", "two")]
    assert len(losses[0]) == 4 and np.allclose(*losses, rtol=1e-4)
    a, b = (load_checkpoint(tmp_path / n / "model.safetensors")["model"] for n in ("one", "two"))
    assert a.keys() == b.keys() and all(torch.allclose(v, b[k], atol=2e-4) for k, v in a.items())


# ---------------------------------------------------------------- refused


def test_A10_stub_tokenizer_is_refused(tiny, few, tmp_path):
    from transformers import CLIPTokenizer

    shutil.copytree(tiny, tmp_path / "stub")
    for p in (tmp_path / "stub" / "tokenizer").iterdir():
        p.unlink()
    CLIPTokenizer.from_pretrained(tmp_path / "stub" / "tokenizer").save_pretrained(tmp_path / "stub" / "tokenizer")
    with pytest.raises((DataError, FormatError), match="tokenizer|cannot be loaded"):
        run(tmp_path / "stub", few, tmp_path)
    assert not (tmp_path / "run").exists()


def test_D19_one_prompt_for_several_phases_is_refused(tiny, few, tmp_path):
    given = {"instance_prompt": "a grayscale microscopic image of human embryo at phase t2"}
    with pytest.raises(ConfigError, match="holds 2 phases .t2, tM., one prompt for all"):
        run(tiny, few, tmp_path, **given)
    assert os.listdir(tmp_path) == []
    told = run(tiny, few, tmp_path, dry_run=True, allow_mixed_phases=True, **given)
    assert told["mode"] == "prompt" and told["prior_preservation"] and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "more, words",
    [
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"report_to": "wandb"}, "wandb is not installed"),
        ({"low_memory_optimizations": True}, "bitsandbytes is not installed"),
        ({"settings": ("resolution=60",)}, "resolution: must be a multiple of 8"),
        ({"conditioning": "class", "settings": ("prior_preservation=true",)}, "prior_preservation"),
        ({"conditioning": "prompt"}, "instance_prompt"),
        ({"settings": ("lr=-1",)}, "lr"),
        ({"settings": ("learning_rate=1",)}, "learning_rate: unknown key"),
        ({"wandb_run_name": "other"}, "one name for the run"),
        ({"name": "../up"}, "not a folder name"),
        ({"resume_from_checkpoint": "latest"}, "holds no checkpoint"),
        ({"device": "cuda"}, "no GPU"),
    ],
)
def test_A10_refused_before_the_first_step(tiny, few, tmp_path, more, words):
    if words == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if "is not installed" in words and __import__("importlib").util.find_spec(words.split()[0]):
        pytest.skip(f"{words.split()[0]} is installed")
    given = {"name": "run", **more}
    with pytest.raises((ConfigError, MissingFile), match=words):
        if "device" in given:
            finetune(model=str(tiny), image_folder=few, output_dir=tmp_path, run_name="run", device=given["device"])
        run(tiny, few, tmp_path, **given)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- runs


def test_A9_full_training_resumes_saves_loads_and_draws(tiny, few, tmp_path):
    before = weights_digest(tiny)
    given = {"train": "full", "max_train_steps": 20, "checkpoint_steps": 10, "num_validation_images": 0}
    run(tiny, few, tmp_path, "whole", **given)
    half = run(tiny, few, tmp_path, "parts", stop_at=10, **given)
    rest = run(tiny, few, tmp_path, "parts", resume_from_checkpoint="latest", **given)
    assert not half["finished"] and rest["finished"] and results(tmp_path / "whole") == results(tmp_path / "parts")
    losses = [float(r["loss"]) for r in read_csv(tmp_path / "whole" / "log.csv")]
    assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert weights_digest(tiny) == before
    made = tmp_path / "whole" / "pipeline"
    for part in ("vae", "text_encoder"):  # frozen
        assert weights_digest(made / part) == weights_digest(tiny / part)
    assert weights_digest(made / "unet") != weights_digest(tiny / "unet")
    model = load_finetuned(tmp_path / "whole", device="cpu")
    condition, empty, text = model.condition(Phase.t2, FocalPlane.F0)
    images = sample(model.pipe, condition, empty, [0, 1], steps=5)
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all() and text.endswith("at phase t2")


@pytest.mark.parametrize("conditioning", ["caption", "class"])
def test_A9_killed_at_any_step_and_run_again(tiny, few, tmp_path, conditioning):
    given = {"conditioning": conditioning, "max_train_steps": 4, "checkpoint_steps": 1}
    settings = ("ema_decay=0.5", "noise_offset=0.1", "augment=true")
    run(tiny, few, tmp_path, "whole", settings, **given)
    steps = forked(lambda: run(tiny, few, tmp_path, "count", settings, **given), tmp_path / "count")
    assert steps > 40
    for k, at in enumerate(sorted(rng_for(3, conditioning).choice(steps - 1, 2, replace=False) + 1)):
        name = f"k{k}"
        job = partial(run, tiny, few, tmp_path, name, settings, **given)
        assert forked(job, tmp_path / name, int(at)) < 0
        assert job()["steps"] == 4
        assert results(tmp_path / name) == results(tmp_path / "whole")
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".mvtmp")]


def test_A9_stored_latents_change_nothing(tiny, few, tmp_path):
    for name, settings in (("stored", ()), ("each", ("cache=false",))):
        run(tiny, few, tmp_path, name, settings, num_validation_images=0)
    a, b = ([float(r["loss"]) for r in read_csv(tmp_path / n / "log.csv")] for n in ("stored", "each"))
    assert len(a) == 6 and np.allclose(a, b, rtol=1e-3)  # the same draws; sums in another batch differ


def test_random_crops_switch_the_store_off_and_resume(tiny, tmp_path):
    few = image_folder(tmp_path / "wide", size=64)
    for p in (few / "images").iterdir():
        Image.open(p).resize((96, 64)).save(p)
    settings = ("crop=random",)
    run(tiny, few, tmp_path, "whole", settings)
    run(tiny, few, tmp_path, "parts", settings, stop_at=3)
    run(tiny, few, tmp_path, "parts", settings)
    assert results(tmp_path / "whole") == results(tmp_path / "parts")


def test_A11_class_pictures_are_made_once_and_losses_are_logged(tiny, few, tmp_path, caplog):
    t2 = image_folder(tmp_path / "t2", phases=("t2",))
    given = {"instance_prompt": PromptTemplate().format("t2"), "class_data_dir_parent": tmp_path}
    settings = ("num_class_images=3", "snr_gamma=5")
    (tmp_path / "runs").mkdir()
    run(tiny, t2, tmp_path / "runs", "a", settings, **given)
    assert (tmp_path / "a" / "class.json").exists()  # <parent>/<run name>
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("*.png")}
    row = read_csv(tmp_path / "runs" / "a" / "log.csv")[0]
    total = float(row["instance_loss"]) + float(row["prior_loss"])
    assert len(times) == 3 and abs(total - float(row["loss"])) < 1e-6
    assert read_json(tmp_path / "a" / "class.json")["prompt"] == BASE_PROMPT
    shutil.rmtree(tmp_path / "runs" / "a")
    run(tiny, t2, tmp_path / "runs", "a", settings, **given)
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("*.png")}
    shutil.rmtree(tmp_path / "runs" / "a")
    run(tiny, t2, tmp_path / "runs", "a", (*settings, "class_prompt='an embryo'"), **given)
    assert not set(times.values()) & {p.stat().st_mtime_ns for p in (tmp_path / "a").glob("*.png")}
    model = load_finetuned(tmp_path / "runs" / "a", device="cpu")
    assert model.prompt(Phase.t2, FocalPlane.F0) == given["instance_prompt"]
    with pytest.raises(ConfigError, match="trained with the one prompt"):
        model.condition(Phase.t4, FocalPlane.F0)


def test_one_prompt_without_a_phase_draws_the_phases_that_it_was_trained_on_alone(tiny, tmp_path):
    t2 = image_folder(tmp_path / "t2", phases=("t2",))
    given = {"instance_prompt": "a photo of sks embryo", "max_train_steps": 1, "num_validation_images": 0}
    run(tiny, t2, tmp_path, "sks", ("prior_preservation=false",), **given)
    model = load_finetuned(tmp_path / "sks", device="cpu")
    assert model.condition(Phase.t2, FocalPlane.F0)[2] == given["instance_prompt"]
    with pytest.raises(ConfigError, match="never saw tM, it was trained on t2"):
        model.condition(Phase.tM, FocalPlane.F0)


def test_validation_pictures_lack_descriptions_only_if_they_do(tiny, few, tmp_path):
    shutil.copytree(few / "images", tmp_path / "bare" / "images")
    with pytest.raises(ConfigError, match="1 problem before training: validation_folder.*bare has no descriptions"):
        run(tiny, few, tmp_path, dry_run=True, validation_folder=tmp_path / "bare")
    with pytest.raises(ConfigError, match="1 problem before training: conditioning.*bare has no descriptions"):
        run(tiny, tmp_path / "bare", tmp_path, dry_run=True, validation_folder=few)


def test_A11_class_pictures_of_unknown_origin_are_refused(tiny, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "class-00000.png").write_bytes(b"")
    with pytest.raises(DataError, match="nobody knows what made them"):
        class_pictures(load_sd(tiny, device="cpu"), "x", tmp_path / "c", 1)


def test_D18_learned_conditions_are_saved_and_guide(tiny, few, tmp_path):
    settings = ("n_tokens=4",)
    for train in ("lora", "full"):
        run(tiny, few, tmp_path, train, settings, conditioning="class", train=train, max_train_steps=4)
        model = load_finetuned(tmp_path / train, device="cpu")
        assert model.rows == (("", ""), ("t2", "F+00"), ("tM", "F+00")) and model.table.shape == (3, 4, 32)
        kept = load_checkpoint(tmp_path / train / "model.safetensors")["model"]["table"]
        assert torch.equal(kept, model.table.cpu())
        assert not torch.equal(kept, learned_table(3, 4, 32, 10))  # it was trained
        a, empty, name = model.condition(Phase.t2, FocalPlane.F0)
        b, _, _ = model.condition(Phase.tM, FocalPlane.F0)
        draw = [sample(model.pipe, c, empty, [5], steps=3, guidance_scale=g) for c, g in ((a, 1), (a, 5), (b, 5))]
        assert name == "class t2 F+00" and len({d.tobytes() for d in draw}) == 3
        with pytest.raises(ConfigError, match="trained on t2 F.00, tM F.00, not on t4"):
            model.condition(Phase.t4, FocalPlane.F0)
    folder = tmp_path / "full" / "pipeline"  # a folder of diffusers with the table in it
    assert torch.equal(load_finetuned(folder, device="cpu").table, model.table)


def test_checkpoints_can_be_named_loaded_and_gone_back_to(tiny, few, tmp_path):
    run(tiny, few, tmp_path, "whole", num_validation_images=0)
    run(tiny, few, tmp_path, "back", stop_at=5, num_validation_images=0)
    there = sorted(p.name for p in (tmp_path / "back" / "checkpoints").iterdir())
    assert [int(n[5:14]) for n in there] == [2, 4, 5]
    with pytest.raises(MissingFile, match="not a checkpoint of this run. There are: step-000000002"):
        run(tiny, few, tmp_path, "back", resume_from_checkpoint="step-9", num_validation_images=0)
    model = load_finetuned(tmp_path / "back" / "checkpoints" / there[0], device="cpu")
    assert model.condition(Phase.t2, FocalPlane.F0)[2].endswith("t2")
    given = {"resume_from_checkpoint": there[0], "num_validation_images": 0}
    with pytest.raises(DataError, match="other settings"):
        run(tiny, few, tmp_path, "back", settings=("noise_offset=0.2",), **given)
    assert there == sorted(p.name for p in (tmp_path / "back" / "checkpoints").iterdir())
    assert run(tiny, few, tmp_path, "back", **given)["finished"]
    assert results(tmp_path / "back")[0]["model.safetensors"] == results(tmp_path / "whole")[0]["model.safetensors"]
    with pytest.raises(OutputExists, match="never overwritten"):
        run(tiny, few, tmp_path, "back", **given)


def test_other_settings_do_not_continue_a_run(tiny, few, tmp_path):
    run(tiny, few, tmp_path, stop_at=2)
    about = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(DataError, match="other settings"):
        run(tiny, few, tmp_path, settings=("noise_offset=0.2",))
    with pytest.raises(DataError, match="other settings"):
        run(make_tiny_sd(tmp_path / "other", seed=9, channels=(32, 32)), few, tmp_path)
    assert (tmp_path / "run" / "run.json").read_bytes() == about


def test_a_finished_run_is_not_that_of_another_model_or_other_pictures(tiny, few, tmp_path):
    run(tiny, few, tmp_path, max_train_steps=2)
    about = (tmp_path / "run" / "run.json").read_bytes()
    assert run(tiny, few, tmp_path, max_train_steps=2)["note"] == "was finished before"
    other, fewer = make_tiny_sd(tmp_path / "other", seed=9, channels=(32, 32)), tmp_path / "fewer"
    shutil.copytree(few, fewer)
    assert run(tiny, fewer, tmp_path, max_train_steps=2)["note"] == "was finished before"  # a copy of them
    first = sorted((fewer / "images").iterdir())[0]
    first.write_bytes(sorted((fewer / "images").iterdir())[1].read_bytes())
    for base, images, what in ((other, few, "model"), (tiny, fewer, "image_folder")):
        with pytest.raises(OutputExists, match=rf"other settings \({what}\)"):
            run(base, images, tmp_path, max_train_steps=2)
    assert (tmp_path / "run" / "run.json").read_bytes() == about


def test_lora_needs_its_base(tiny, few, tmp_path):
    run(tiny, few, tmp_path, max_train_steps=2)
    other = make_tiny_sd(tmp_path / "other", seed=9, channels=(32, 32))
    with pytest.raises(DataError, match="is not the base that"):
        load_finetuned(tmp_path / "run", base=other, device="cpu")
    assert latest_run(tmp_path) == tmp_path / "run"
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(FormatError, match="does not fit as additions"):
        load_finetuned(tmp_path / "bad.safetensors", base=tiny, device="cpu")


def test_run_record_tells_where_weights_come_from(tiny, few, tmp_path):
    told = run(tiny, few, tmp_path, max_train_steps=3, settings=("caption_dropout=0.5",), mixed_precision="bf16")
    about = read_run(tmp_path / "run")
    assert about["complete"] and about["model"]["digest"] == weights_digest(tiny) and told["finished"]
    assert "CC BY-NC-SA" in about["licences"][0] and "OpenRAIL" in about["licences"][1]
    assert about["pictures"]["phases"] == ["t2", "tM"] and about["settings"]["mixed_precision"] == "bf16"
    assert {"torch", "diffusers"} <= set(about["versions"]) and set(about["loss"]) == {"first", "last", "fixed_loss"}
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == ["step-3"]


def test_validation_loss_is_the_same_at_the_same_weights(tiny, few, tmp_path):
    held = image_folder(tmp_path / "held", phases=("t2", "t4"), each=2)
    settings = ("lr=1e-30", "num_validation_images=0")
    run(tiny, few, tmp_path, validation_folder=held, settings=settings, validation_steps=1)
    values = {r["val_loss"] for r in read_csv(tmp_path / "run" / "log.csv")}
    assert len(values) == 1


def test_wandb_gets_every_step(tiny, few, tmp_path, monkeypatch):
    seen = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = __import__("importlib").machinery.ModuleSpec("wandb", None)
    session = types.SimpleNamespace(log=lambda m, step: seen.append(step), finish=lambda: seen.append("end"))
    fake.init = lambda **k: seen.append(k["project"]) or session
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tiny, few, tmp_path, report_to="wandb", max_train_steps=3, wandb_project_name="p", num_validation_images=0)
    assert seen == ["p", 1, 2, 3, "end"]


def test_D4_no_place_is_built_in(few, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(model=str(tiny), image_folder=few, wandb_run_name="unet-t3", save_model_to=tmp_path / "m", device="cpu",
             max_train_steps=1, num_validation_images=0)  # fmt: skip
    assert os.listdir(tmp_path) == ["m"] and (tmp_path / "m" / "unet-t3" / "run.json").exists()
