"""Page 08a: batches with a position, schedule, average, log, and the training loop that resumes exactly."""
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medvol_nb import torchcore
from medvol_nb.checkpoints import latest_checkpoint, load_checkpoint, seeded
from medvol_nb.core import ConfigError, DataError, Locked, MedvolError, OutputExists, read_csv, rng_for
from medvol_nb.torchcore import Batches, CsvLog, Ema, FitConfig, NonFiniteLoss, fit, lr_at
from tests.faults.injectors import forked

ROOT = Path(__file__).resolve().parents[1]
ITEMS, BATCH = 24, 4 # six steps an epoch


# ---- a task that takes milliseconds ---------------------------------------------------------------------------------
class Points:
    "Points of a plane, a new one at every draw; `bad` items are NaN"
    def __init__(self, n=ITEMS, bad=()):
        self.n, self.bad, self.keys = n, set(bad), [f"scan_{i:02d}" for i in range(n)]
    def __len__(self): return self.n
    def draw(self, index, rng):
        xy = rng.uniform(-1, 1, 2).astype(np.float32)
        y = np.float32(np.hypot(*xy) < 0.7)
        return {"xy": xy*np.float32(np.nan if index in self.bad else 1), "y": y, "index": index}


def network(kind="dropout"):
    "A small network; 'norm' has running statistics"
    layers = {"plain": [], "dropout": [nn.Dropout(0.2)], "norm": [nn.BatchNorm1d(16), nn.Dropout(0.2)]}[kind]
    with seeded(0, "init"):
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), *layers, nn.Linear(16, 1), nn.Flatten(0))


def bce(model, batch): return nn.functional.binary_cross_entropy_with_logits(model(batch["xy"]), batch["y"])


HELD = [next(iter(Batches(Points(), ITEMS, seed=99).epoch(0)))[1]]


def score(model, state): return {"val_loss": float(bce(model, HELD[0]))}


def settings(**changes):
    return FitConfig(**{"epochs": 4, "lr": 0.02, "seed": 3, "device": "cpu", **changes})


def train(folder, stops=(None,), kind="dropout", workers=0, batch=BATCH, dataset=None, loss=bce, validate=score,
          on_exists="skip", own=None, callbacks=(), config=None, **changes):
    "One run in as many parts as there are stops, each with new objects"
    for stop in stops:
        net = network(kind)
        batches = Batches(Points() if dataset is None else dataset, batch, seed=1, workers=workers)
        result = fit(net, batches, loss, settings(**changes), out_dir=folder, validate=validate, stop_at=stop,
                     on_exists=on_exists, optimizer=own, callbacks=callbacks, config=config)
    return net, result


def left(folder):
    "Bytes of everything a run leaves that must not depend on interruptions"
    names = ["model.safetensors", "best.safetensors", "log.csv", "fit.json"]
    out = {n: (Path(folder)/n).read_bytes() for n in names if (Path(folder)/n).exists()}
    return {**out, "last": max((Path(folder)/"checkpoints").glob("step-*")).read_bytes()}


def litter(folder): return [p.name for p in Path(folder).parent.rglob("*") if ".mvtmp-" in p.name or ".lock" in p.name]


def newest(folder): return latest_checkpoint(Path(folder)/"checkpoints")[1]


# ---- batches --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, batch, world", [(24, 4, 1), (24, 4, 2), (25, 3, 3), (7, 2, 2), (100, 1, 4)])
def test_an_epoch_has_no_item_twice_and_ranks_share_the_doubled_batch(n, batch, world):
    whole = Batches(Points(n), batch*world, seed=5)
    parts = Batches(Points(n), batch, seed=5)
    for epoch in (0, 3):
        order = parts.order(epoch, world)
        assert order.shape == (n//(batch*world), batch*world) and len(set(order.ravel())) == order.size
        assert np.array_equal(order, whole.order(epoch)) and set(order.ravel()) <= set(range(n))
        ranks = [[k for k, _ in parts.epoch(epoch, rank=r, world=world)] for r in range(world)]
        assert [sum(row, []) for row in zip(*ranks)] == order.tolist()
    assert not np.array_equal(parts.order(0, world), parts.order(1, world))
    assert not np.array_equal(parts.order(0, world), Batches(Points(n), batch, seed=6).order(0, world))


@pytest.mark.parametrize("n, batch", [(1, 1), (1, 5), (3, 8), (5, 4)])
def test_small_datasets_fill_at_least_one_batch(n, batch):
    order = Batches(Points(n), batch).order(0)
    assert order.shape == (1, batch) and (set(order.ravel()) == set(range(n)) or n > batch)
    assert np.bincount(order.ravel(), minlength=n).max() <= -(-batch//n)


def test_batches_without_shuffling_come_in_order():
    assert [k for k, _ in Batches(Points(7), 2, shuffle=False).epoch(9)] == [[0, 1], [2, 3], [4, 5]]


def test_weights_are_odds():
    odds = [0, 1, 3, 0] + [0]*20
    drawn = np.concatenate([Batches(Points(), 12, weights=odds).order(e).ravel() for e in range(60)])
    counts = np.bincount(drawn, minlength=ITEMS)
    assert set(np.flatnonzero(counts)) == {1, 2} and abs(counts[2]/len(drawn) - 0.75) < 4*math.sqrt(0.19/len(drawn))


@pytest.mark.parametrize("weights", [[1], [-1]*ITEMS, [0]*ITEMS, [1]*(ITEMS + 1)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(DataError, match="one number >= 0 for each of 24"): Batches(Points(), weights=weights)


def test_bad_sizes_are_refused():
    with pytest.raises(DataError, match="dataset is empty"): Batches([], 2)
    with pytest.raises(ConfigError, match="batch_size: must be >= 1, got 0"): Batches(Points(), 0)


def test_workers_change_no_byte():
    def epoch(workers): return list(Batches(Points(), 5, seed=2, workers=workers).epoch(2))
    base = epoch(0)
    for workers in (1, 2):
        for (keys, a), (other, b) in zip(base, epoch(workers), strict=True):
            assert keys == other and all(torch.equal(a[k], b[k]) for k in a)


def test_start_is_the_tail_of_the_epoch():
    whole = list(Batches(Points(), 4).epoch(1))
    for start in range(7):
        tail = list(Batches(Points(), 4).epoch(1, start))
        assert [k for k, _ in tail] == [k for k, _ in whole[start:]]
        assert all(torch.equal(a["xy"], b["xy"]) for (_, a), (_, b) in zip(tail, whole[start:]))


def test_an_item_does_not_depend_on_its_company():
    def items(batch):
        pairs = Batches(Points(), batch, seed=4).epoch(1)
        return {int(i): tuple(xy) for _, b in pairs for i, xy in zip(b["index"], b["xy"].tolist())}
    assert items(1) == items(6) == items(24)
    assert items(1)[3] == tuple(Points().draw(3, rng_for(4, "item", 1, 3))["xy"].tolist())


def test_plain_sequences_and_own_collate():
    got = list(Batches([10, 20, 30, 40], 2, shuffle=False, collate=tuple).epoch(0))
    assert got == [([0, 1], (10, 20)), ([2, 3], (30, 40))]


# ---- schedule, average, log -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule, step, factor", [
    ("constant", 0, 1), ("constant", 99, 1), ("cosine", 0, 1), ("cosine", 50, 0.5), ("cosine", 100, 0),
    ("cosine", 25, (1 + math.sqrt(0.5))/2), ("poly", 0, 1), ("poly", 50, 0.5**0.9), ("poly", 100, 0), ("poly", 200, 0)])
def test_lr_at_known_values(schedule, step, factor):
    assert lr_at(step, 100, FitConfig(lr=0.3, schedule=schedule)) == pytest.approx(0.3*factor, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "poly"])
def test_lr_at_warms_up_and_keeps_its_floor(schedule):
    cfg = FitConfig(lr=1.0, schedule=schedule, warmup_steps=10, min_lr=0.1)
    rates = [lr_at(k, 60, cfg) for k in range(61)]
    assert rates[:10] == pytest.approx([(k + 1)/10 for k in range(10)]) and rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and min(rates[10:]) >= 0.1
    assert rates[-1] == (1.0 if schedule == "constant" else 0.1)
    assert lr_at(60, 60, FitConfig(lr=0.01, min_lr=5.0)) == 0.01 # a floor above the peak is the peak


def test_ema_is_the_written_formula():
    net, expected = network("norm"), None
    ema = Ema(net, 0.8)
    for n in range(1, 30):
        with torch.no_grad():
            for k, p in enumerate(net.parameters()): p.copy_(torch.full_like(p, n + k))
            net[2].running_mean.fill_(n)
        ema.update(net)
        decay = min(0.8, (1 + n)/(10 + n))
        start = network("norm")[0].bias.detach().double() if expected is None else expected
        expected = decay*start + (1 - decay)*(n + 1)
    assert torch.allclose(ema.shadow["0.bias"].double(), expected, atol=1e-5) and ema.updates == 29
    assert torch.equal(ema.shadow["2.running_mean"], net[2].running_mean) # statistics are copied, not averaged


def test_ema_of_shared_weights():
    "A tensor with two names is averaged under both: loading the second used to put the last weights back"
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    ema = Ema(net, 0.9)
    with torch.no_grad(): net[0].weight += 10
    ema.update(net)
    decay = 2/11
    expected = net[0].weight.detach() - decay*10
    with ema.swapped(net): assert torch.allclose(net[0].weight, expected, atol=1e-5)


def test_ema_swap_is_undone_even_after_an_error():
    net = network("norm")
    ema = Ema(net, 0.5)
    with torch.no_grad(): net[0].weight.fill_(7)
    with suppress(ZeroDivisionError), ema.swapped(net):
        assert not (net[0].weight == 7).any()
        1/0
    assert (net[0].weight == 7).all()


def test_csv_log_is_cut_back_and_goes_on(tmp_path):
    log = CsvLog(tmp_path/"log.csv")
    for k in range(1, 7): log.add({"step": k, "loss": k/3, **({"val_loss": 1.0} if k % 3 == 0 else {})})
    log.close()
    straight = (tmp_path/"log.csv").read_bytes()
    assert read_csv(tmp_path/"log.csv")[1] == {"step": "2", "loss": "0.666666667", "val_loss": ""}
    again = CsvLog(tmp_path/"log.csv", upto=4)
    assert [r["step"] for r in again.rows] == list("1234") and "val_loss" not in again.rows[0]
    for k in (5, 6): again.add({"step": k, "loss": k/3, **({"val_loss": 1.0} if k % 3 == 0 else {})})
    again.close()
    assert (tmp_path/"log.csv").read_bytes() == straight


@pytest.mark.parametrize("tail", ["3,0.", "3", "3,0.1,,,", '3,"0.1'])
def test_csv_log_drops_a_torn_line(tmp_path, tail):
    (tmp_path/"log.csv").write_text("step,loss\n1,0.5\n2,0.25\n" + tail)
    log = CsvLog(tmp_path/"log.csv", upto=2)
    log.add({"step": 3, "loss": 0.125})
    log.close()
    assert (tmp_path/"log.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n3,0.125\n"


def test_csv_log_new_columns_fill_older_rows_with_nothing(tmp_path):
    log = CsvLog(tmp_path/"log.csv")
    log.add({"step": 1, "loss": 0.5})
    log.add({"step": 2, "skipped": 1.0})
    log.close()
    assert (tmp_path/"log.csv").read_text() == "step,loss,skipped\n1,0.5,\n2,,1\n"


@pytest.mark.parametrize("content", [b"", b"\n", b"step,los"])
def test_csv_log_survives_an_empty_file(tmp_path, content):
    (tmp_path/"log.csv").write_bytes(content)
    log = CsvLog(tmp_path/"log.csv", upto=5)
    log.add({"step": 6, "loss": 1.0})
    log.close()
    assert (tmp_path/"log.csv").read_text() == "step,loss\n6,1\n"


# ---- interrupted equals uninterrupted -------------------------------------------------------------------------------
EXACT = {"adamw": {}, "adam": {"optimizer": "adam"}, "sgd": {"optimizer": "sgd"}, "ema": {"ema_decay": 0.9},
         "clip": {"clip_norm": 0.1}, "accumulate": {"accumulate": 2}, "norm": {"kind": "norm"},
         "bf16": {"precision": "bf16"}, "poly": {"schedule": "poly", "warmup_steps": 5},
         "all": {"kind": "norm", "ema_decay": 0.9, "clip_norm": 0.1, "accumulate": 2, "precision": "bf16"}}


@pytest.mark.parametrize("name", EXACT)
def test_parts_of_a_run_leave_the_bytes_of_the_whole(tmp_path, name):
    train(tmp_path/"whole", **EXACT[name])
    half = 6 if "accumulate" in EXACT[name] else 12
    train(tmp_path/"halves", [half, None], **EXACT[name])
    train(tmp_path/"shreds", [1, 3, 4, half - 1, half + 2, None], **EXACT[name])
    assert left(tmp_path/"whole") == left(tmp_path/"halves") == left(tmp_path/"shreds")
    rows = read_csv(tmp_path/"whole"/"log.csv")
    assert [int(r["step"]) for r in rows] == list(range(1, 2*half + 1)) and not litter(tmp_path/"whole")


def test_parts_with_loading_processes(tmp_path):
    train(tmp_path/"whole")
    train(tmp_path/"parts", [5, 9, None], workers=2)
    assert left(tmp_path/"whole") == left(tmp_path/"parts")


def test_a_constant_schedule_can_be_prolonged(tmp_path):
    train(tmp_path/"whole", schedule="constant")
    train(tmp_path/"parts", schedule="constant", epochs=2)
    train(tmp_path/"parts", schedule="constant")
    whole, parts = left(tmp_path/"whole"), left(tmp_path/"parts")
    assert all(whole[k] == parts[k] for k in whole.keys() - {"last", "fit.json"}) # settings differ, identities too


def test_a_finished_run_is_not_trained_again(tmp_path):
    train(tmp_path/"run")
    before = left(tmp_path/"run")
    calls = []
    _, result = train(tmp_path/"run", loss=lambda m, b: calls.append(1))
    assert (result.steps, result.finished, calls) == (24, True, []) and left(tmp_path/"run") == before


def test_every_batch_is_seen_once_in_order(tmp_path):
    "The loop used to lose one batch of each step and to repeat others at the end of an epoch"
    for accumulate in (1, 2):
        seen = []
        def loss(model, batch, seen=seen):
            seen.append(batch["index"].tolist())
            return bce(model, batch)
        train(tmp_path/f"run{accumulate}", loss=loss, epochs=3, accumulate=accumulate)
        batches = Batches(Points(), BATCH, seed=1)
        assert seen == [row for e in range(3) for row in batches.order(e).tolist()]


def test_accumulation_equals_the_larger_batch(tmp_path):
    how = {"kind": "plain", "optimizer": "sgd"} # Adam would hide a factor
    a, one = train(tmp_path/"one", batch=8, **how)
    b, two = train(tmp_path/"two", batch=4, accumulate=2, **how)
    assert one.steps == two.steps == 12
    for p, q in zip(a.parameters(), b.parameters()): assert torch.allclose(p, q, atol=1e-6)
    assert np.allclose(*([float(r["loss"]) for r in x.log] for x in (one, two)), atol=1e-6)


def test_batches_that_end_early_are_an_error_not_an_endless_loop(tmp_path):
    class Short(Batches):
        def epoch(self, *args): return iter(list(super().epoch(*args))[:2])
    with pytest.raises(DataError, match="epoch 0 ended after 2 of 6 steps"):
        fit(network(), Short(Points(), BATCH), bce, settings(), out_dir=tmp_path/"run")


# ---- killed and stopped ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(k, marks=pytest.mark.slow) for k in range(2, 8))])
def test_sigkill_at_random_moments_then_the_same_command(tmp_path, seed):
    how, folder = {"kind": "norm", "ema_decay": 0.9, "checkpoint_every": 2}, tmp_path/"killed"/"run"
    steps = forked(lambda: train(tmp_path/"straight"/"run", **how), tmp_path/"straight")
    folder.parent.mkdir()
    draw, died = random.Random(seed), []
    for _ in range(8):
        pause = draw.choice([0, draw.uniform(0, 0.02)])
        died.append(forked(lambda: train(folder, **how), folder.parent, draw.randrange(1, steps//4), pause) < 0)
    train(folder, **how)
    assert sum(died) >= 3 and left(tmp_path/"straight"/"run") == left(folder)
    assert not litter(folder)


def shouting(where, number, times=1):
    "Loss, validation, callbacks and data of a run that sends itself a signal in its seventh step"
    count = dict.fromkeys(("loss", "validate", "callback"), 0)
    def shout(place, at):
        count[place] += 1
        if place == where and count[place] == at:
            for _ in range(times): os.kill(os.getpid(), number)
    def loss(model, batch):
        out = bce(model, batch) # running statistics have moved, the weights have not
        shout("loss", 7)
        return out
    def validate(model, state):
        shout("validate", 1)
        return score(model, state)
    def callback(event, state):
        if event == "step": shout("callback", 7)
    return {"loss": loss, "validate": validate, "callbacks": [callback]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where, saved", [("loss", 7), ("validate", 6), ("callback", 7)])
def test_a_signal_ends_the_run_after_the_step_and_loses_nothing(tmp_path, number, where, saved):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    how = {"kind": "norm", "ema_decay": 0.9, "clip_norm": 0.5}
    train(tmp_path/"whole", **how)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/"run", **how, **shouting(where, number))
    assert newest(tmp_path/"run")["step"] == saved and not litter(tmp_path/"run")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(tmp_path/"run", **how)
    assert left(tmp_path/"whole") == left(tmp_path/"run")


@pytest.mark.parametrize("times", [2, 0])
def test_a_second_signal_acts_at_once_and_saves_no_half_step(tmp_path, times):
    "So does an interruption from inside a step: the run goes on from the last checkpoint, with the same bytes"
    train(tmp_path/"whole", kind="norm")
    shout = shouting("loss", signal.SIGINT, times)
    def loss(model, batch):
        out = shout["loss"](model, batch)
        if times == 0 and model.training and (tmp_path/"run"/"checkpoints"/"step-000000006.safetensors").exists():
            raise KeyboardInterrupt
        return out
    with pytest.raises(KeyboardInterrupt): train(tmp_path/"run", kind="norm", loss=loss)
    assert newest(tmp_path/"run")["step"] == 6
    train(tmp_path/"run", kind="norm")
    assert left(tmp_path/"whole") == left(tmp_path/"run")


def test_fit_works_outside_the_main_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(train(tmp_path/"run", epochs=1)[1].steps))
    thread.start()
    thread.join()
    assert done == [6]


@pytest.mark.parametrize("how", ["bit", "half", "empty", "text"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, how):
    train(tmp_path/"whole", checkpoint_every=3)
    train(tmp_path/"run", [13], checkpoint_every=3)
    path = max((tmp_path/"run"/"checkpoints").iterdir())
    raw = path.read_bytes()
    flipped = raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:]
    path.write_bytes({"bit": flipped, "half": raw[:len(raw)//2], "empty": b"", "text": b"<html>not found</html>"}[how])
    assert newest(tmp_path/"run")["step"] == 12
    train(tmp_path/"run", checkpoint_every=3)
    assert left(tmp_path/"whole") == left(tmp_path/"run")


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_other_settings_are_refused_and_overwrite_starts_anew(tmp_path):
    train(tmp_path/"run", [7], tensorboard=False)
    before = left(tmp_path/"run")
    with pytest.raises(DataError, match="other settings .*--on-exists overwrite"): train(tmp_path/"run", lr=0.5)
    with pytest.raises(DataError, match="other settings"): train(tmp_path/"run", config={"data": "list_b.json"})
    with pytest.raises(DataError, match="4 steps an epoch|6 steps an epoch, now there are 3"):
        train(tmp_path/"run", batch=8)
    with pytest.raises(OutputExists, match="--on-exists"): train(tmp_path/"run", on_exists="error")
    with pytest.raises(ConfigError, match="on_exists: must be"): train(tmp_path/"run", on_exists="clobber")
    said: list[str] = []
    with pytest.raises(DataError, match="other settings"):
        train(tmp_path/"run", lr=0.5, callbacks=[lambda event, state: said.append(event)])
    assert left(tmp_path/"run") == before and not said # what others keep in the folder stays as well
    train(tmp_path/"new", [2], callbacks=[lambda event, state: said.append(event)])
    assert said[:2] == ["start", "step"] and said.count("start") == 1 and said[-1] == "end"
    train(tmp_path/"run", keep=7, checkpoint_every=5) # what does not change the result may change
    (tmp_path/"run"/"notes.txt").write_text("mine")
    (tmp_path/"run"/"tensorboard").mkdir()
    train(tmp_path/"run", lr=0.5, on_exists="overwrite")
    train(tmp_path/"fresh", lr=0.5)
    assert left(tmp_path/"run") == left(tmp_path/"fresh") and (tmp_path/"run"/"notes.txt").exists()
    assert not (tmp_path/"run"/"tensorboard").exists()
    assert len(list((tmp_path/"run"/"checkpoints").iterdir())) == 3 # keep


def test_output_places_that_cannot_be(tmp_path):
    (tmp_path/"file").write_text("mine")
    with pytest.raises(OutputExists, match="is a file"): train(tmp_path/"file")
    assert (tmp_path/"file").read_text() == "mine" and not litter(tmp_path/"file")


def test_two_runs_cannot_share_a_folder(tmp_path):
    def again(event, state):
        with pytest.raises(Locked, match="in use by another process"): train(tmp_path/"run")
    train(tmp_path/"run", epochs=1, callbacks=[again])
    assert not litter(tmp_path/"run")


@pytest.mark.parametrize("bad", [{"lr": 0}, {"epochs": 0}, {"precision": "fp8"}, {"ema_decay": 1}, {"clip_norm": 0},
                                 {"optimizer": "lion"}, {"learning_rate": 1.0}, {"accumulate": 0}, {"patience": 0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): settings(**bad)


def test_nothing_to_train_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no parameters to train"):
        fit(network().requires_grad_(False), Batches(Points(), 4), bce, settings(), out_dir=tmp_path/"run")


# ---- validation -----------------------------------------------------------------------------------------------------
def told(values):
    "Validation that tells these numbers, one after the other"
    numbers = iter(values)
    return lambda model, state: {"val_loss": next(numbers)}


def test_patience_ends_the_run_for_good(tmp_path):
    _, result = train(tmp_path/"run", epochs=9, patience=2, validate=told([3, 2, 2.5, 2.4, 1]))
    assert (result.steps, result.finished, result.best) == (24, True, 2)
    before = left(tmp_path/"run")
    _, again = train(tmp_path/"run", epochs=9, patience=2, validate=told([0]))
    assert (again.steps, again.finished) == (24, True) and left(tmp_path/"run") == before


def test_patience_needs_validations(tmp_path):
    with pytest.raises(ConfigError, match="patience: counts validations"):
        train(tmp_path/"run", epochs=1, patience=2, validate=None)
    assert not (tmp_path/"run").exists()


def test_patience_is_remembered_over_an_interruption(tmp_path):
    train(tmp_path/"run", [18], epochs=9, patience=3, validate=told([1, 2, 3]))
    _, result = train(tmp_path/"run", epochs=9, patience=3, validate=told([4, 0]))
    assert (result.steps, result.finished, result.best) == (24, True, 1)


@pytest.mark.parametrize("mode, values, step", [("min", [3, 1, 2, 1], 12), ("max", [3, 1, 5, 4], 18),
                                                ("min", [math.nan, 2, 3, math.nan], 12), ("max", [math.nan]*4, None)])
def test_best_weights_are_those_of_the_best_validation(tmp_path, mode, values, step):
    states = {}
    def keep(event, state):
        if event == "validate": states[state.step] = {k: v.clone() for k, v in state.model.state_dict().items()}
    _, result = train(tmp_path/"run", mode=mode, validate=told(values), callbacks=[keep])
    if step is None:
        assert result.best is None and not (tmp_path/"run"/"best.safetensors").exists()
        return
    best = load_checkpoint(tmp_path/"run"/"best.safetensors")
    assert best["step"] == step and best["metrics"]["val_loss"] == values[step//6 - 1] == result.best
    assert all(torch.equal(v, states[step][k]) for k, v in best["model"].items())


def test_validation_and_export_use_the_average(tmp_path):
    seen = {}
    def validate(model, state):
        assert not model.training and not torch.is_grad_enabled()
        seen[state.step] = {k: v.clone() for k, v in model.state_dict().items()}
        return score(model, state)
    net, _ = train(tmp_path/"run", ema_decay=0.9, validate=validate)
    final = load_checkpoint(tmp_path/"run"/"model.safetensors")["model"]
    assert net.training and all(torch.equal(v, seen[24][k]) for k, v in final.items())
    assert any(not torch.equal(v, final[k]) for k, v in net.state_dict().items())


def test_a_monitor_that_is_not_told_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"'dice' is not among the validation's numbers \['val_loss'\]"):
        train(tmp_path/"run", monitor="dice")


def test_callbacks_come_in_order(tmp_path):
    events = []
    train(tmp_path/"run", [8, None], epochs=2, validate_every=4, callbacks=[lambda e, s: events.append((e, s.step))])
    expected = [("start", 0)]
    for k in range(1, 13):
        expected += [("validate", k)]*(k % 4 == 0) + [("step", k)] + [("epoch", k)]*(k % 6 == 0)
        if k == 8: expected += [("end", 8), ("start", 8)]
    assert events == [*expected, ("end", 12)]


# ---- losses that are not numbers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_lasting_fault_ends_the_run_with_the_items_and_the_state_before(tmp_path, accumulate):
    data = Points(bad=[5])
    with pytest.raises(NonFiniteLoss, match=r"items .*scan_05.* at step \d+; 2 steps were left out") as caught:
        train(tmp_path/"run", kind="norm", dataset=data, epochs=9, max_skips=2, validate=None, accumulate=accumulate)
    assert len(caught.value.args[0].split("items ")[1].split(" at step")[0].split(", ")) == BATCH*accumulate
    kept = newest(tmp_path/"run")
    steps = Batches(data, BATCH, seed=1)
    third = int(np.argwhere(steps.order(2) == 5)[0, 0])//accumulate + 2*6//accumulate
    assert kept["step"] == third and kept["skips"] == 3
    assert all(torch.isfinite(v).all() for v in kept["model"].values() if v.is_floating_point())
    with pytest.raises(NonFiniteLoss, match="scan_05"): # the same command meets the same fault
        train(tmp_path/"run", kind="norm", dataset=data, epochs=9, max_skips=2, validate=None, accumulate=accumulate)


def test_a_few_faults_are_left_out_and_leave_no_trace(tmp_path):
    net, result = train(tmp_path/"run", kind="norm", dataset=Points(bad=[5]), max_skips=4, ema_decay=0.9)
    steps = Batches(Points(), BATCH, seed=1)
    bad = [1 + 6*e + int(np.argwhere(steps.order(e) == 5)[0, 0]) for e in range(4)]
    assert [int(r["step"]) for r in result.log if r.get("skipped")] == bad and result.finished
    assert all(torch.isfinite(v).all() for v in net.state_dict().values())
    stops = [bad[0], bad[1] - 1, None]
    train(tmp_path/"parts", stops, kind="norm", dataset=Points(bad=[5]), max_skips=4, ema_decay=0.9)
    assert left(tmp_path/"run") == left(tmp_path/"parts")


def test_a_left_out_step_changes_nothing(tmp_path):
    states = []
    def keep(event, state):
        if event == "step": states.append({k: v.clone() for k, v in state.model.state_dict().items()})
    bad = int(Batches(Points(), BATCH, seed=1).order(0)[2, 1])
    train(tmp_path/"run", kind="norm", dataset=Points(bad=[bad]), epochs=1, validate=None, callbacks=[keep])
    assert all(torch.equal(v, states[2][k]) for k, v in states[1].items())
    assert any(not torch.equal(v, states[3][k]) for k, v in states[2].items())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_infinite_gradient_of_a_finite_loss_is_a_fault_too(tmp_path, clip):
    def loss(model, batch): return torch.sqrt((model[0].weight*0).sum()) + bce(model, batch)
    with pytest.raises(NonFiniteLoss): train(tmp_path/"run", loss=loss, validate=None, clip_norm=clip, max_skips=1)
    assert all(torch.isfinite(v).all() for v in newest(tmp_path/"run")["model"].values())


def test_clipping_bounds_the_step(tmp_path):
    weights = []
    def keep(event, state): weights.append(torch.cat([p.detach().ravel().clone() for p in state.model.parameters()]))
    how = {"kind": "plain", "optimizer": "sgd", "momentum": 0, "weight_decay": 0, "schedule": "constant", "epochs": 1}
    _, result = train(tmp_path/"run", clip_norm=0.01, lr=0.5, callbacks=[keep], validate=None, **how)
    assert all(float(r["grad_norm"]) > 0.01 for r in result.log) # the norm before clipping is logged
    steps = [float((b - a).norm()) for a, b in zip(weights[:6], weights[1:6])]
    assert steps == pytest.approx([0.5*0.01]*5, rel=1e-3)


def simulated_scale(monkeypatch, scale):
    "An accelerator that scales losses as with half precision on a GPU, while the arithmetic stays single"
    make = torchcore._accelerator
    def scaled(cfg):
        acc = make(cfg)
        acc.scaler, prepare = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6), acc.prepare
        def prepared(*things):
            out = prepare(*things)
            acc.native_amp, acc.state._mixed_precision = True, "fp16" # not before, or the network would be wrapped
            return out
        acc.prepare, acc.autocast = prepared, nullcontext
        return acc
    monkeypatch.setattr(torchcore, "_accelerator", scaled)


@pytest.mark.parametrize("how", [{"optimizer": "sgd"}, {"optimizer": "adamw"}, {"optimizer": "sgd", "accumulate": 2}])
def test_U08_B20_gradients_are_unscaled_before_they_are_clipped(tmp_path, monkeypatch, how):
    "With a scale of 65536: clipping scaled gradients would make the first step of SGD thousands of times smaller"
    how = {"kind": "plain", "validate": None, "clip_norm": 0.05, "schedule": "constant", "stops": [1], "lr": 1, **how}
    plain, once = train(tmp_path/"plain", **how)
    with monkeypatch.context() as patch:
        simulated_scale(patch, 65536.0)
        scaled, again = train(tmp_path/"scaled", **how)
        assert newest(tmp_path/"scaled")["scaler"]["scale"] == 65536
    start = network("plain")
    for p, q, s in zip(plain.parameters(), scaled.parameters(), start.parameters()):
        assert (p - q).abs().max() <= 1e-5*(p - s).abs().max() and (p - s).abs().max() > 0
    norms = [[float(r["grad_norm"]) for r in x.log] for x in (once, again)]
    assert np.allclose(*norms, rtol=1e-5) and min(norms[0]) > 0.05


def test_U08_a_last_group_is_neither_lost_nor_left_for_the_next_epoch(tmp_path):
    "Five batches in groups of two: every epoch is two whole steps, and no gradient of one epoch is in the next"
    seen = []
    def loss(model, batch):
        seen.append(all(p.grad is None or not p.grad.any() for p in model.parameters()))
        return bce(model, batch)
    _, done = train(tmp_path/"run", dataset=Points(20), accumulate=2, epochs=3, loss=loss, validate=None, kind="plain")
    assert done.steps == 6 and seen == [True, False]*6


# ---- good manners ---------------------------------------------------------------------------------------------------
def test_fit_leaves_the_global_generators_alone(tmp_path):
    def states(): return torch.random.get_rng_state(), np.random.get_state()[1], random.getstate() # noqa: NPY002
    before = states()
    train(tmp_path/"run", epochs=1, workers=1)
    after = states()
    assert torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1]) and before[2] == after[2]


def test_the_global_generator_does_not_change_the_run(tmp_path):
    for seed, name in ((1, "a"), (2, "b")):
        with seeded(seed): train(tmp_path/name, epochs=1)
    assert left(tmp_path/"a") == left(tmp_path/"b")


def test_precision_belongs_to_one_run(tmp_path):
    net, kinds = network("plain"), []
    def loss(model, batch):
        kinds.append(model[0](batch["xy"]).dtype)
        return bce(model, batch)
    for k, precision in enumerate(("bf16", "fp32", "bf16")):
        fit(net, Batches(Points(), 8), loss, settings(epochs=1, precision=precision), out_dir=tmp_path/str(k))
        assert "forward" not in vars(net) and net(torch.zeros(3, 2)).dtype == torch.float32
        assert net[0](torch.zeros(3, 2)).dtype == torch.float32
    assert kinds == [torch.bfloat16]*3 + [torch.float32]*3 + [torch.bfloat16]*3


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"): train(tmp_path/"run", precision="fp16")


def test_frozen_parameters_stay(tmp_path):
    net = network()
    net[0].requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fit(net, Batches(Points(), 4), bce, settings(ema_decay=0.5), out_dir=tmp_path/"run")
    same = {k for k, v in net.state_dict().items() if torch.equal(v, before[k])}
    assert same == {"0.weight", "0.bias"}


def test_weight_decay_leaves_biases_and_norms(tmp_path):
    optimizer = torchcore.make_optimizer(network("norm"), settings(weight_decay=0.1))
    assert [(g["weight_decay"], sorted(p.ndim for p in g["params"])) for g in optimizer.param_groups] == \
        [(0.1, [2, 2]), (0.0, [1, 1, 1, 1])]


def test_own_optimiser_keeps_its_ratio_of_rates(tmp_path):
    made = []
    def rms(model):
        groups = [{"params": model[0].parameters(), "lr": 0.002}, {"params": model[-2].parameters(), "lr": 0.02}]
        made.append(torch.optim.RMSprop(groups))
        return made[-1]
    rates = []
    def keep(event, state): rates.append([g["lr"] for g in made[-1].param_groups])
    train(tmp_path/"whole", own=rms, callbacks=[keep])
    assert rates[0] == pytest.approx([0.002, 0.02])
    assert rates[12] == pytest.approx([0.1*r for r in (rates[12][1], 10*rates[12][1])]) and rates[12][1] < 0.015
    train(tmp_path/"parts", [5, 14, None], own=rms)
    assert left(tmp_path/"whole") == left(tmp_path/"parts")


def test_scalars_beside_the_loss_are_logged(tmp_path):
    def loss(model, batch): return {"loss": bce(model, batch), "norm": model[0].weight.norm(), "two": 2}
    _, result = train(tmp_path/"run", loss=loss, epochs=1, clip_norm=9.0)
    assert list(result.log[0]) == ["step", "epoch", "loss", "norm", "two", "lr", "grad_norm"]
    assert {r["two"] for r in result.log} == {"2"} and read_csv(tmp_path/"run"/"log.csv")[-1]["val_loss"]


def test_stop_at_zero_trains_nothing(tmp_path):
    assert train(tmp_path/"run", [0])[1].steps == 0 and not list((tmp_path/"run"/"checkpoints").iterdir())


def test_tensorboard_is_written_where_somebody_looks(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(tmp_path/"quiet", epochs=1)
    for name in ("IN_TEST", "MEDVOL_QUIET", "PYTEST_CURRENT_TEST"): monkeypatch.delenv(name, raising=False)
    _, result = train(tmp_path/"run", epochs=1)
    train(tmp_path/"off", epochs=1, tensorboard=False)
    assert not (tmp_path/"quiet"/"tensorboard").exists() and not (tmp_path/"off"/"tensorboard").exists()
    events = EventAccumulator(str(tmp_path/"run"/"tensorboard"))
    events.Reload()
    points = events.Scalars("loss")
    assert [p.step for p in points] == list(range(1, 7)) and "val_loss" in events.Tags()["scalars"]
    assert np.allclose([p.value for p in points], [float(r["loss"]) for r in result.log], atol=1e-6)


# ---- several processes ----------------------------------------------------------------------------------------------
def launch(*words, processes=2, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [__file__, *map(str, words)]
    if processes > 1: words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    return subprocess.Popen([sys.executable, *words], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **more)


def test_two_processes_equal_one_and_resume(tmp_path):
    how = {"kind": "plain", "clip_norm": 0.5, "ema_decay": 0.9, "accumulate": 3}
    one, _ = train(tmp_path/"one", batch=2*BATCH, **how)
    run = launch("parts", tmp_path)
    assert run.wait(120) == 0, run.stdout.read()
    losses = [[float(r["loss"]) for r in read_csv(tmp_path/n/"log.csv")] for n in ("one", "whole")]
    assert len(losses[0]) == 4 and np.allclose(*losses, atol=1e-5)
    two = newest(tmp_path/"whole")["model"]
    assert all(torch.allclose(v, two[k], atol=1e-5) for k, v in one.state_dict().items())
    assert left(tmp_path/"whole") == left(tmp_path/"parts") and not litter(tmp_path/"whole")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_and_the_rerun_is_exact(tmp_path, victim):
    straight, run = launch("forever", tmp_path/"straight", 40, 0), launch("forever", tmp_path/"run", 40, 0.1)
    try:
        pids = {}
        for _ in range(600):
            pids = {int(p.suffix[1:]): int(p.read_text()) for p in tmp_path.glob("run.*") if p.suffix[1:].isdigit()}
            if len(pids) == 2 and list((tmp_path/"run").glob("checkpoints/step-*")): break
            time.sleep(0.1)
        os.kill(pids[victim], signal.SIGKILL)
        killed_at = time.monotonic()
        assert run.wait(30) != 0 and time.monotonic() - killed_at < 30
        text = run.stdout.read()
        assert "SIGKILL" in text or "-9" in text
        with pytest.raises(ProcessLookupError): os.kill(pids[1 - victim], 0)
        assert straight.wait(120) == 0
    finally:
        for p in (straight, run): p.kill()
    again = launch("forever", tmp_path/"run", 40, 0)
    assert again.wait(120) == 0, again.stdout.read()
    assert left(tmp_path/"straight") == left(tmp_path/"run")


# ---- accelerators ---------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_parts_on_a_gpu(tmp_path, precision):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    def on_gpu(model, state):
        batch = torchcore.to_device(HELD[0], state.device)
        return {"val_loss": float(bce(model, batch))}
    how = {"precision": precision, "device": "cuda", "validate": on_gpu, "kind": "norm", "ema_decay": 0.9}
    train(tmp_path/"whole", **how)
    net, _ = train(tmp_path/"parts", [5, 13, None], **how)
    assert next(net.parameters()).is_cuda and left(tmp_path/"whole") == left(tmp_path/"parts")


@pytest.mark.gpu
def test_gpu_and_cpu_agree(tmp_path):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    _, cpu = train(tmp_path/"cpu", kind="plain", validate=None)
    _, gpu = train(tmp_path/"gpu", kind="plain", validate=None, device="cuda")
    assert np.allclose(*([float(r["loss"]) for r in x.log] for x in (cpu, gpu)), atol=1e-3)


def test_a_gpu_that_is_not_there_is_an_error(tmp_path):
    if torch.cuda.is_available(): pytest.skip("there is one")
    with pytest.raises(MedvolError, match="--device cpu"): train(tmp_path/"run", device="cuda")


def main(what, folder, *numbers):
    "What torchrun starts"
    if what == "parts":
        how = {"kind": "plain", "clip_norm": 0.5, "ema_decay": 0.9, "accumulate": 3}
        train(Path(folder)/"whole", **how)
        train(Path(folder)/"parts", [1, 2, None], **how)
        return
    steps, pause = int(numbers[0]), float(numbers[1])
    Path(f"{folder}.{os.environ['RANK']}").write_text(str(os.getpid()))
    def loss(model, batch):
        time.sleep(pause)
        return bce(model, batch)
    train(folder, loss=loss, steps=steps, checkpoint_every=3)


if __name__ == "__main__": main(*sys.argv[1:])
