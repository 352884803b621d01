# %% [markdown]
# # Jobs of several steps, and their report
#
# > A job is a list of steps; each fills one folder, is remembered when done, and adds its picture to one HTML page.
#
# A pipeline of scripts leaves files in many places, and after an interruption nobody knows which of them are whole.
# Here each step gets an empty folder, and that folder appears under its final name only when the step has succeeded.
# A ledger remembers which steps are done, with what parameters and what outputs. So a killed job goes on at the step
# that was interrupted, and leaves the same bytes as one that was not.

# %%
#| default_exp report

# %%
#| export
import base64
import html
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medvol_nb.core import (DataError, MedvolError, OnExists, atomic, check_output, fingerprint, human_time, lock, log,
                            plain, read_json, remove_tree, sweep_temporary, write_json, write_text)
from medvol_nb.parallel import Ledger

# %%
import numpy as np
from IPython.display import HTML

from medvol_nb import plot
from medvol_nb.core import raises, tmpdir

# %% [markdown]
# ## Steps
# A step is a function of its own empty folder and of the job, through which it reaches the folders of earlier steps.
# It returns what the report shows: a sentence, numbers, a table, pictures. It must not depend on anything but its
# parameters and earlier steps, or a resumed job could differ from a straight one. If its `version` or `params`
# change, or those of a step it `needs`, it runs again, and with it all steps that build on it.

# %%
#| export
@dataclass(frozen=True)
class Shown:
    "What a step tells the report"
    text: str # one or two sentences about what was found
    figures: Mapping[str, Any] = field(default_factory=dict) # name -> number, the few that matter
    table: Sequence[Mapping[str, Any]] = () # rows with equal keys
    pictures: Mapping[str, str] = field(default_factory=dict) # caption -> PNG in the step's folder

@dataclass(frozen=True)
class Step:
    "One stage of a job"
    name: str # folder name and key, such as 'verify'
    title: str # headline in the report
    run: Callable[[Path, "Job"], Shown] # (its empty folder, the job) -> what the report shows
    needs: tuple[str, ...] = () # names of the steps whose folders it reads
    params: Any = None # plain values that decide its result
    version: int = 1 # raised when the step's code changes its result

class Job:
    "A list of steps that share an output folder"
    def __init__(
        self,
        out_dir: str | os.PathLike, # folder of the job; created
        steps: Sequence[Step], # in the order they run
        title: str = "Job", # headline of the report
    ):
        self.out_dir, self.steps, self.title = Path(out_dir), list(steps), title
        names = [s.name for s in self.steps]
        for k, s in enumerate(self.steps):
            missing = [n for n in s.needs if n not in names[:k]]
            if missing: raise DataError(f"step {s.name!r} needs {', '.join(missing)}, which must come before it")
        if len(set(names)) < len(names): raise DataError(f"two steps have the same name: {names}")

    def folder(
        self,
        name: str, # of a step
    ) -> Path: # its folder, such as 'out/02_verify'
        "Where a step keeps its files"
        k = next((k for k, s in enumerate(self.steps, 1) if s.name == name), None)
        if k is None: raise DataError(f"there is no step {name!r}, there are {[s.name for s in self.steps]}")
        return self.out_dir/f"{k:02d}_{name}"

    def key(
        self,
        step: Step, # of this job
    ) -> str: # stable hash
        "Fingerprint of everything that decides the result of a step"
        below = [self.key(next(s for s in self.steps if s.name == n)) for n in step.needs]
        return fingerprint([step.name, step.version, step.params, below])

# %% [markdown]
# ## Running
# The times of the steps are the only thing that differs between two runs. They are kept apart, in `times.json`.

# %%
#| export
def run_job(
    job: Job, # steps and output folder
    *,
    on_exists: OnExists = "skip", # "skip": go on where an earlier run stopped, "overwrite": start anew, "error": refuse
) -> dict[str, Any]: # 'report' (path), 'steps' (what each showed), 'ran' (names that ran now)
    "Run the steps that are not done yet, and write report.html and report.json"
    if on_exists != "skip": check_output(job.out_dir, on_exists)
    elif not job.out_dir.exists(): check_output(job.out_dir)
    elif not job.out_dir.is_dir(): raise MedvolError(f"output {job.out_dir} is a file, a folder is needed")
    job.out_dir.mkdir(exist_ok=True)
    with lock(job.out_dir/"job"):
        if on_exists == "overwrite":
            for s in job.steps: remove_tree(job.folder(s.name))
            for n in ("ledger.jsonl", "times.json"): remove_tree(job.out_dir/n)
        sweep_temporary(job.out_dir)
        times = read_json(job.out_dir/"times.json") if (job.out_dir/"times.json").exists() else {}
        shown, ran = {}, []
        with Ledger(job.out_dir/"ledger.jsonl", {"job": job.title}) as ledger:
            for k, step in enumerate(job.steps, 1):
                where = f"[{k}/{len(job.steps)}] {step.title}"
                if ledger.is_done(step.name) and ledger.value(step.name)["key"] == job.key(step):
                    log.info("%s: done before", where)
                else:
                    log.info("%s ...", where)
                    begin = time.monotonic()
                    folder = job.folder(step.name)
                    with atomic(folder, folder=True) as t: result = step.run(t, job)
                    ledger.done(step.name, {"key": job.key(step), "shown": plain(result), "outputs": [folder.name]})
                    times[step.name] = round(time.monotonic() - begin, 2)
                    write_json(job.out_dir/"times.json", times)
                    ran.append(step.name)
                    log.info("%s: %s", where, human_time(times[step.name]))
                shown[step.name] = ledger.value(step.name)["shown"]
        told = [{"name": s.name, "title": s.title, "folder": job.folder(s.name).name, "seconds": times.get(s.name),
                 **shown[s.name]} for s in job.steps]
        write_json(job.out_dir/"report.json", {"title": job.title, "steps": told})
        write_text(job.out_dir/"report.html", to_html(job, shown, times))
    return {"report": job.out_dir/"report.html", "ran": ran, "steps": shown}

# %% [markdown]
# ## One page
# The report has no scripts and loads nothing: pictures are inside, text is escaped, so it can be mailed or archived.

# %%
#| export
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{margin-bottom:.2rem}h2{margin-top:2.5rem;border-bottom:1px solid #ddd}img{max-width:100%}figure{margin:1rem 0}
figcaption,.time{color:#666;font-size:.9rem}table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.2rem .7rem;border-bottom:1px solid #eee;text-align:left}td.n{text-align:right}
.f b{font-size:1.3rem;display:block}.f{display:inline-block;margin:.3rem 1.6rem .3rem 0}
code{background:#f4f4f4;padding:.1rem .3rem}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}h2,td,th{border-color:#333}code{background:#2a2a2a}}"""

def _cell(value: Any) -> str:
    if isinstance(value, bool): return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, (int, float)):
        return f'<td class="n">{value:,.4g}</td>' if isinstance(value, float) else f'<td class="n">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"

def _table(rows: Sequence[Mapping[str, Any]], most: int = 40) -> str:
    head = "".join(f"<th>{html.escape(str(k))}</th>" for k in rows[0])
    body = "".join("<tr>" + "".join(_cell(v) for v in r.values()) + "</tr>" for r in rows[:most])
    more = f"<p class=time>{len(rows) - most} more rows in the step's folder</p>" if len(rows) > most else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"

def _figure(value: Any) -> str: return f"{value:,.4g}" if isinstance(value, float) else html.escape(str(value))

def to_html(
    job: Job, # finished
    shown: Mapping[str, Mapping], # step name -> what it showed, as plain values
    times: Mapping[str, float], # step name -> [s]
) -> str: # a whole document
    "The report of a job as one self-contained page"
    title = html.escape(job.title)
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
             f"<h1>{title}</h1>",
             f"<p class=time>{len(job.steps)} steps, {human_time(sum(times.get(s.name, 0) for s in job.steps))}</p>"]
    for k, s in enumerate(job.steps, 1):
        what, folder = shown[s.name], job.folder(s.name)
        parts.append(f"<h2>{k}. {html.escape(s.title)}</h2><p>{html.escape(what['text'])}</p>")
        if what["figures"]:
            parts.append("<p>" + "".join(f"<span class=f><b>{_figure(v)}</b>{html.escape(n)}</span>"
                                         for n, v in what["figures"].items()) + "</p>")
        for caption, name in what["pictures"].items():
            data = base64.b64encode((folder/name).read_bytes()).decode()
            parts.append(f'<figure><img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
                         f"<figcaption>{html.escape(caption)}</figcaption></figure>")
        if what["table"]: parts.append(_table(what["table"]))
        files = sorted(p.relative_to(job.out_dir).as_posix() for p in folder.rglob("*") if p.is_file())
        listed = ", ".join(f"<code>{html.escape(f)}</code>" for f in files[:6])
        if len(files) > 6: listed += f" and {len(files) - 6} more"
        parts.append(f"<p class=time>{human_time(times.get(s.name, 0))} &middot; {listed}</p>")
    return "\n".join(parts) + "</html>\n"

# %%
def numbers(folder, job):
    np.save(folder/"x.npy", np.arange(5)**2)
    return Shown("Five squares were computed.", {"largest": 16})

def draw(folder, job):
    x = np.load(job.folder("numbers")/"x.npy")
    plot.save_figure(plot.curves({"square": x}, height=1.5), folder/"curve.png")
    rows = [{"n": n, "square": int(v)} for n, v in enumerate(x)]
    return Shown("They were drawn.", table=rows, pictures={"A curve": "curve.png"})

steps = [Step("numbers", "Compute", numbers), Step("draw", "Draw <b>", draw, needs=("numbers",))]

with tmpdir() as d:
    first = run_job(Job(d/"out", steps, "Squares"))
    page, second = first["report"].read_text(), run_job(Job(d/"out", steps, "Squares"))["ran"]
    remove_tree(d/"out"/"02_draw")
    third = run_job(Job(d/"out", steps, "Squares"))["ran"]
    tree = sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file())
HTML(page)

# %%
assert (first["ran"], second, third) == (["numbers", "draw"], [], ["draw"]) and "Draw &lt;b&gt;" in page
with raises(DataError, match="must come before it"): Job("x", [Step("draw", "Draw", draw, needs=("numbers",))])
tree
