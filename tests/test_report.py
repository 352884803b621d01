"""Page 86: jobs of several steps, what runs again and what does not, and the page that tells of it."""
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from medvol_nb import plot
from medvol_nb.core import ConfigError, DataError, Locked, MedvolError, OutputExists
from medvol_nb.report import Job, Shown, Step, run_job


def writing(name, text=None, **shown):
    "A step's function that writes one file and counts its calls"
    def run(folder, job):
        run.calls += 1
        (folder/"out.txt").write_text(text or name)
        return Shown(f"{name} was written", **shown)
    run.calls = 0
    return run


def chain(out, **changes):
    "Four steps: b and c need a, d needs b; changes replace fields of a step by its name"
    needs = {"a": (), "b": ("a",), "c": ("a",), "d": ("b",)}
    made = {n: {"name": n, "title": f"Step {n}", "run": writing(n), "needs": needs[n]} for n in needs}
    return Job(out, [Step(**{**m, **changes.get(n, {})}) for n, m in made.items()], "Chain")


def tree(folder, without=("times.json", "report.json", "report.html")):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in without}


# ---- order ----------------------------------------------------------------------------------------------------------
def test_steps_run_in_order_into_numbered_folders(tmp_path):
    done = run_job(chain(tmp_path/"out"))
    assert done["ran"] == list("abcd") and list(done["steps"]) == list("abcd")
    assert sorted(os.listdir(tmp_path/"out")) == ["01_a", "02_b", "03_c", "04_d", "ledger.jsonl", "report.html",
                                                  "report.json", "times.json"]
    assert run_job(chain(tmp_path/"out"))["ran"] == []


@pytest.mark.parametrize("steps, said", [
    ([("b", ("a",)), ("a", ())], "step 'b' needs a, which must come before it"),
    ([("a", ("a",))], "step 'a' needs a"), ([("a", ("x", "y"))], "needs x, y"),
    ([("a", ()), ("a", ())], "two steps have the same name")])
def test_a_job_that_cannot_be_ordered_is_refused(tmp_path, steps, said):
    made = [Step(n, n, writing(n), needs) for n, needs in steps]
    with pytest.raises(DataError, match=said): Job(tmp_path/"out", made)


def test_an_unknown_step_has_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"no step 'e', there are \['a', 'b', 'c', 'd'\]"): chain(tmp_path).folder("e")


def test_a_step_reads_the_folders_of_earlier_steps(tmp_path):
    def read(folder, job):
        (folder/"copy.txt").write_text((job.folder("a")/"out.txt").read_text()*2)
        return Shown("copied")
    run_job(Job(tmp_path/"out", [Step("a", "A", writing("a", "xy")), Step("b", "B", read, ("a",))]))
    assert (tmp_path/"out"/"02_b"/"copy.txt").read_text() == "xyxy"


# ---- what runs again ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes, again", [
    ({"a": {"params": 2}}, "abcd"), ({"b": {"params": [1]}}, "bd"), ({"c": {"version": 2}}, "c"),
    ({"d": {"version": 2}}, "d"), ({"b": {"needs": ()}}, "bd"), ({"a": {"title": "New words"}}, ""), ({}, "")])
def test_a_change_reaches_what_builds_on_it_and_nothing_else(tmp_path, changes, again):
    run_job(chain(tmp_path/"out"))
    assert run_job(chain(tmp_path/"out", **changes))["ran"] == list(again)
    assert run_job(chain(tmp_path/"out", **changes))["ran"] == []


@pytest.mark.parametrize("harm", ["remove", "truncate", "add"])
def test_outputs_that_are_not_what_was_recorded_are_made_again(tmp_path, harm):
    run_job(chain(tmp_path/"out"))
    before, file = tree(tmp_path/"out"), tmp_path/"out"/"02_b"/"out.txt"
    if harm == "remove": file.unlink()
    else: file.write_text("" if harm == "truncate" else "bbbb")
    assert run_job(chain(tmp_path/"out"))["ran"] == ["b"] and tree(tmp_path/"out") == before


def test_overwrite_starts_anew_and_leaves_what_it_did_not_make(tmp_path):
    run_job(chain(tmp_path/"out"))
    (tmp_path/"out"/"notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="--on-exists"): run_job(chain(tmp_path/"out"), on_exists="error")
    with pytest.raises(ConfigError, match="on_exists"): run_job(chain(tmp_path/"out"), on_exists="maybe")
    assert run_job(chain(tmp_path/"out"), on_exists="overwrite")["ran"] == list("abcd")
    assert (tmp_path/"out"/"notes.txt").read_text() == "mine"


def test_another_job_is_refused_in_the_same_folder(tmp_path):
    run_job(chain(tmp_path/"out"))
    before = tree(tmp_path/"out", ())
    other = chain(tmp_path/"out")
    other.title = "Another"
    with pytest.raises(DataError, match="other parameters"): run_job(other)
    assert tree(tmp_path/"out", ()) == before


# ---- failing and dying ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_failing_step_leaves_nothing_and_earlier_steps_stay(tmp_path, fault):
    def fail(folder, job):
        (folder/"half.txt").write_text("half")
        raise fault("no")
    first = chain(tmp_path/"out", c={"run": fail})
    with pytest.raises(fault): run_job(first)
    assert sorted(os.listdir(tmp_path/"out")) == ["01_a", "02_b", "ledger.jsonl", "times.json"]
    assert run_job(chain(tmp_path/"out"))["ran"] == ["c", "d"]
    run_job(chain(tmp_path/"straight"))
    assert tree(tmp_path/"out") == tree(tmp_path/"straight")


def test_a_step_that_shows_no_number_fails(tmp_path):
    with pytest.raises(DataError, match="NaN"):
        run_job(chain(tmp_path/"out", b={"run": writing("b", figures={"dice": float("nan")})}))
    assert run_job(chain(tmp_path/"out"))["ran"] == ["b", "c", "d"]


@pytest.mark.parametrize("victim", "abcd")
def test_sigkill_in_a_step_then_the_same_job(tmp_path, victim):
    def die(folder, job):
        (folder/"half.txt").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: run_job(chain(tmp_path/"out", **{victim: {"run": die}})))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and any(".mvtmp-" in p.name for p in (tmp_path/"out").iterdir())
    assert run_job(chain(tmp_path/"out"))["ran"] == list("abcd")["abcd".index(victim):]
    run_job(chain(tmp_path/"straight"))
    assert tree(tmp_path/"out") == tree(tmp_path/"straight") # no temporary file and no lock either


def test_two_processes_cannot_run_the_same_job(tmp_path):
    inside, go = threading.Event(), threading.Event()
    def wait(folder, job):
        inside.set()
        go.wait(20)
        return writing("a")(folder, job)
    results = []
    thread = threading.Thread(target=lambda: results.append(run_job(chain(tmp_path/"out", a={"run": wait}))["ran"]))
    thread.start()
    inside.wait(20)
    try:
        with pytest.raises(Locked, match="in use by another process"): run_job(chain(tmp_path/"out"))
    finally:
        go.set()
        thread.join()
    assert results == [list("abcd")] and run_job(chain(tmp_path/"out"))["ran"] == []


def test_places_that_cannot_be(tmp_path):
    (tmp_path/"file").write_text("mine")
    with pytest.raises(MedvolError, match="is a file"): run_job(chain(tmp_path/"file"))
    with pytest.raises(FileNotFoundError, match="mkdir -p"): run_job(chain(tmp_path/"no"/"out"))
    assert (tmp_path/"file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


# ---- the page -------------------------------------------------------------------------------------------------------
class Reader(HTMLParser):
    "Text, tags and everything that a browser would load"
    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.loads = "", [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "data", "srcset", "action")]
    def handle_data(self, data): self.text += data


def test_the_page_escapes_everything_and_loads_nothing(tmp_path):
    evil = "<script>alert('x & \"y\"')</script>"
    def draw(folder, job):
        plot.save_figure(plot.curves({"x": np.arange(4)}, height=1), folder/"p.png")
        (folder/"<b>.txt").write_text("x")
        return Shown(evil, {evil: evil, "n": 1234567, "r": 0.000123456}, [{evil: evil, "ok": True, "n": 12345}],
                     {evil: "p.png"})
    done = run_job(Job(tmp_path/"out", [Step("draw", evil, draw)], evil))
    page = Reader(done["report"].read_text())
    assert not set(page.tags) & {"script", "link", "iframe", "object"} and page.tags.count("b") == 3
    assert page.text.count(evil) >= 7 and "<b>.txt" in page.text
    assert "1234567" in page.text and "0.0001235" in page.text and "12,345" in page.text
    assert "yes" in page.text and page.loads and all(s.startswith("data:image/png;base64,") for s in page.loads)


def test_the_page_and_the_json_tell_the_same(tmp_path):
    rows = [{"case": f"c{k}", "n": k} for k in range(50)]
    steps = [Step("a", "First", writing("a", figures={"dice": 0.5}, table=rows))]
    run_job(Job(tmp_path/"out", steps, "Title"))
    told = json.loads((tmp_path/"out"/"report.json").read_text())
    assert list(told) == ["title", "steps"] and told["title"] == "Title"
    assert list(told["steps"][0]) == ["name", "title", "folder", "seconds", "text", "figures", "table", "pictures"]
    assert told["steps"][0]["folder"] == "01_a" and len(told["steps"][0]["table"]) == 50
    page = Reader((tmp_path/"out"/"report.html").read_text())
    assert "10 more rows" in page.text and "c39" in page.text and "c40" not in page.text and "0.5dice" in page.text


def test_many_files_are_counted(tmp_path):
    def many(folder, job):
        for k in range(9): (folder/f"{k}.txt").write_text("")
        return Shown("many")
    done = run_job(Job(tmp_path/"out", [Step("m", "M", many)]))
    assert "01_m/5.txt and 3 more" in Reader(done["report"].read_text()).text


def test_times_are_the_only_difference_between_two_runs(tmp_path):
    def slow(folder, job):
        time.sleep(0.05)
        return writing("a")(folder, job)
    run_job(chain(tmp_path/"x"))
    run_job(chain(tmp_path/"y", a={"run": slow}))
    assert tree(tmp_path/"x") == tree(tmp_path/"y")
    assert json.loads((tmp_path/"y"/"times.json").read_text())["a"] >= 0.05
    def told(n): return re.sub(r'"seconds": [\d.]+', "", (tmp_path/n/"report.json").read_text())
    assert told("x") == told("y")
