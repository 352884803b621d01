# %% [markdown]
# # Review
#
# > Browse what a project is made of: data lists case by case, training runs with their curves and checkpoints.
#
# A data list of 500 cases and a folder of twenty runs are too much for files and too little for a server. Two browsers
# cover them: one goes through the cases of a list, image under label, the other lays the curves of chosen runs over one
# another and says which checkpoints are whole. `look` opens any of these by its path.

# %%
#| default_exp review

# %%
#| export
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.core import DataError, FormatError, MedvolError, MissingFile, atomic, human_bytes, read_csv
from medvol_nb.datalists import DataList, item_path, read_datalist
from medvol_nb.plot import curves, png_bytes
from medvol_nb.slices import as_volume, encode_png
from medvol_nb.viewer import viewer
from medvol_nb.volume import format_of
from medvol_nb.widgets import Panel, Pictured, browse

# %%
from medvol_nb import phantoms
from medvol_nb.checkpoints import checkpoint_path, save_checkpoint
from medvol_nb.core import raises, rng_for, write_json
from medvol_nb.torchcore import CsvLog
from medvol_nb.volume import Volume, affine_from, write_volume

# %% [markdown]
# ## The log of a run
# Every training of this library writes `log.csv`, a row a step, and may be writing it right now: a last line without
# its end is left for the next time. What is not a number is a gap.

# %%
#| export
def read_log(
    path: str | os.PathLike, # log.csv, or the folder of a run
) -> dict[str, np.ndarray]: # column -> (rows) float64, NaN where there is no number; the column 'step' first
    "Numbers of a run, also of one that is still going"
    path = Path(path)
    if path.is_dir(): path = path/"log.csv"
    if not path.exists(): raise MissingFile(f"{path} does not exist. A run of `fit` writes it into its folder")
    raw = path.read_bytes()
    if raw.endswith(b"\n"): rows = read_csv(path, ["step"])
    elif b"\n" not in raw: return {"step": np.zeros(0)}
    else:
        with tempfile.TemporaryDirectory() as d:
            with atomic(Path(d)/path.name) as t: t.write_bytes(raw[:raw.rfind(b"\n") + 1])
            rows = read_csv(Path(d)/path.name, ["step"])
    def number(text: str) -> float:
        try: return float(text)
        except ValueError: return np.nan
    columns = list(rows[0]) if rows else ["step"]
    found = {c: np.array([number(r[c]) for r in rows]) for c in columns}
    return {"step": found["step"], **{c: v for c, v in found.items() if np.isfinite(v).any() and c != "step"}}

def find_runs(
    root: str | os.PathLike, # folder of a run, or one with runs below it
    depth: int = 4, # folders below `root` that are searched
) -> dict[str, Path]: # name relative to `root` -> folder of the run, sorted
    "Folders that hold a log.csv"
    root = Path(root)
    if not root.is_dir(): raise MissingFile(f"{root} is not a folder")
    found = {}
    for folder, below, files in os.walk(root):
        place = Path(folder).relative_to(root)
        below[:] = sorted(b for b in below if not b.startswith(".") and not b.endswith(".zarr")
                          and b not in ("checkpoints", "tensorboard")) if len(place.parts) < depth else []
        if "log.csv" in files: found["." if not place.parts else place.as_posix()] = Path(folder)
    return dict(sorted(found.items()))

def checkpoint_table(
    run: str | os.PathLike, # folder of a run
    check: bool = False, # read each of them, which tells whether it is whole
) -> list[dict[str, Any]]: # file, bytes and state of each, in order of steps, then the final weights
    "Checkpoints and weights of a run"
    run, rows = Path(run), []
    for path in [*sorted(run.glob("checkpoints/step-*.safetensors")), *sorted(run.glob("*.safetensors"))]:
        state = "not read"
        if check:
            from medvol_nb.checkpoints import load_checkpoint
            try: state = f"whole, step {load_checkpoint(path).get('step', '?')}"
            except MedvolError as e: state = str(e)
        rows.append({"file": path.relative_to(run).as_posix(), "bytes": path.stat().st_size, "state": state})
    return rows

# %%
place = tempfile.TemporaryDirectory()
root = Path(place.name)
for name, rate in (("small", 0.02), ("large", 0.05), ("large/again", 0.06)):
    (root/"runs"/name/"checkpoints").mkdir(parents=True)
    log, rng = CsvLog(root/"runs"/name/"log.csv"), rng_for(0, name)
    for step in range(1, 201):
        row = {"step": step, "loss": float(np.exp(-rate*step) + 0.1 + 0.05*rng.random()), "lr": 1e-3}
        if step % 20 == 0: row["dice"] = 1 - row["loss"]
        log.add(row)
    log.close()
    for step in (100, 200): save_checkpoint(checkpoint_path(root/"runs"/name/"checkpoints", step), {"step": step})
log = read_log(root/"runs"/"small")
find_runs(root/"runs").keys(), {c: int(np.isfinite(v).sum()) for c, v in log.items()}

# %%
assert list(find_runs(root)) == ["runs/large", "runs/large/again", "runs/small"] and len(log["dice"]) == 200
with open(root/"runs"/"small"/"log.csv", "a") as f: f.write("201,0.1")
assert len(read_log(root/"runs"/"small"/"log.csv")["step"]) == 200
bad = checkpoint_path(root/"runs"/"small"/"checkpoints", 200)
bad.write_bytes(bad.read_bytes()[:-20])
states = [r["state"] for r in checkpoint_table(root/"runs"/"small", check=True)]
assert states[0] == "whole, step 100" and "not a readable checkpoint" in states[1]
with raises(MissingFile, match="is not a folder"): find_runs(root/"absent")

# %% [markdown]
# ## Runs
# Curves of one column over the steps, one line a run, smoothed by the mean of the last values. The line below tells the
# last value, the best one, and the checkpoints. *read again* reads the logs again.

# %%
#| export
def _smoothed(y: np.ndarray, n: int) -> np.ndarray:
    "Mean of the last `n` values, of fewer at the beginning"
    total = np.concatenate([[0.0], np.cumsum(y)])
    k = np.arange(1, len(y) + 1)
    return (total[k] - total[np.maximum(k - n, 0)])/np.minimum(k, n)

def run_browser(
    root: str | os.PathLike, # folder of a run, or one with runs below it
    *,
    column: str = "loss", # of the logs, to begin with
    smooth: int = 1, # values a point is the mean of
    size: int = 640, # width of the picture on the screen [pixel]
) -> Panel: # controls runs, column, smooth, logx, logy, again, check; `logs` and `folders` by name
    "Curves and checkpoints of training runs"
    import ipywidgets as w
    folders = find_runs(root)
    if not folders: raise DataError(f"{root}: no run below it, a run has a log.csv")
    logs = {n: read_log(f) for n, f in folders.items()}
    columns = [c for c in dict.fromkeys(c for log in logs.values() for c in log) if c != "step"]
    if not columns: raise DataError(f"{root}: the logs of {', '.join(folders)} hold no numbers yet")
    wide = w.Layout(width="22em")
    controls = {
        "runs": w.SelectMultiple(options=list(folders), value=list(folders)[:6], rows=min(8, len(folders)),
                                 description="runs", layout=wide),
        "column": w.Dropdown(options=columns, value=column if column in columns else columns[0], description="column"),
        "smooth": w.IntSlider(smooth, 1, max(100, smooth), description="smooth"),
        "logx": w.Checkbox(False, description="log steps", indent=False),
        "logy": w.Checkbox(False, description="log values", indent=False),
        "check": w.Checkbox(False, description="read checkpoints", indent=False),
        "again": w.Button(description="read again")}

    def draw_runs(panel: Panel) -> None:
        name, series, told = panel.column.value, {}, []
        for run in panel.runs.value:
            log = panel.logs[run]
            if name not in log: continue
            there = np.isfinite(log[name]) & np.isfinite(log["step"])
            x, y = log["step"][there], log[name][there]
            series[run] = x, _smoothed(y, panel.smooth.value)
            files = checkpoint_table(folders[run], panel.check.value)
            broken = [r["file"] for r in files if panel.check.value and not r["state"].startswith("whole")]
            told.append(f"{run}: {y[-1]:.4g} at step {x[-1]:.0f}, from {y.min():.4g} to {y.max():.4g}, {len(files)} "
                        f"checkpoints ({human_bytes(sum(r['bytes'] for r in files))})"
                        + (f", damaged: {', '.join(broken)}" if broken else ""))
        if series: panel.show("curves", png_bytes(curves(series, xlabel="step", ylabel=name, logx=panel.logx.value,
                                                         logy=panel.logy.value)))
        else: panel.show("curves", np.full((120, 320), 235, np.uint8))
        panel.tell("\n".join(told) or "no run is chosen, or none has this column")

    def read_again(_: Any) -> None:
        panel.logs.update({n: read_log(f) for n, f in folders.items()})
        panel.redraw()

    panel = Panel(controls, [["curves"]], draw_runs, size=size, logs=logs, folders=folders)
    controls["again"].on_click(read_again)
    return panel

# %%
runs = run_browser(root/"runs", smooth=5)
runs

# %%
before = runs.curves.value
runs.runs.value, runs.check.value = ["small"], True
assert "small: 0." in runs.told and "damaged: checkpoints/step-000000200.safetensors" in runs.told
assert runs.curves.value != before
runs.runs.value = []
assert runs.told.startswith("no run is chosen")
with open(root/"runs"/"small"/"log.csv", "a") as f: f.write(",0.001,\n")
runs.again.click()
runs.runs.value = ["small"]
assert "small: 0.1 at step 201" in runs.told
assert np.allclose(_smoothed(np.array([1.0, 3, 5, 7]), 2), [1, 2, 4, 6])
with raises(DataError, match="no run below it"): run_browser(root/"runs"/"small"/"checkpoints")

# %% [markdown]
# ## Cases of a data list
# One case after the other, its label over its image. A file that is missing or damaged is told in its place: the next
# case can still be seen.

# %%
#| export
def case_browser(
    cases: Any, # data list file, `DataList`, or items with 'image' and perhaps 'label'
    root: str | os.PathLike | None = None, # folder of the data set; None: that of the file
    *,
    section: str | None = None, # 'training', 'testing' or another list of the file; None: all
    label_key: str = "label", # field of the label: label, pseudo_label, label_sv
    names: Mapping[int, str] | None = None, # label id -> name; None: the list's own
    size: int = 300, # longer side of a picture on the screen [pixel]
    **options: Any, # of `viewer`, such as limits=
) -> Pictured: # `case` is its slider, `view` the viewer of the case (None if it cannot be read), `text` a line about it
    "Cases of a data list, one at a time, label over image"
    import ipywidgets as w
    if isinstance(cases, (str, Path)): cases, root = read_datalist(cases), Path(cases).parent if root is None else root
    if isinstance(cases, DataList): items, names = cases.items(section), names or cases.label_dict
    else: items = tuple(cases)
    if not items: raise DataError("case_browser: the list holds no cases")
    base = Path("." if root is None else root)
    box = w.VBox()
    case = w.IntSlider(0, 0, len(items) - 1, description="case", continuous_update=False)
    text = w.Label()
    def still() -> bytes: return out.view.snapshot() if out.view else encode_png(np.full((40, 320), 235, np.uint8))
    out = Pictured(box, still, case=case, text=text, view=None, items=items)

    def open_case(_: Any = None) -> None:
        item = items[case.value]
        told = [f"{k} {item[k]}" for k in ("image", label_key, "fold") if k in item]
        try:
            image = item["image"] if isinstance(item["image"], str) else item["image"][0]
            label = {label_key: item_path(base, item[label_key], absolute=True)} if label_key in item else None
            out.view = viewer(item_path(base, image, absolute=True), label, kind="labels", names=names, size=size,
                              **options)
        except MedvolError as e:
            out.view = None
            told.append(f"cannot be shown: {e}")
        text.value = f"case {case.value}: " + ", ".join(told)
        box.children = [w.HBox([case, text]), *([out.view.box] if out.view else [])]

    case.observe(open_case, "value")
    open_case()
    return out

# %%
data = root/"data"
data.mkdir()
for k in range(2):
    body = phantoms.abdomen(seed=k)
    write_volume(Volume(body.img, affine_from(body.spacing)), data/f"ct_{k}.nii.gz")
    write_volume(Volume(body.lbl, affine_from(body.spacing)), data/f"lbl_{k}.nii.gz")
items = [{"image": f"ct_{k}.nii.gz", "label": f"lbl_{k}.nii.gz", "fold": k} for k in range(3)]
write_json(data/"Abdomen_5_folds.json", {"training": items, "label_dict": {str(k): n for k, n in body.names.items()}})
cases = case_browser(data/"Abdomen_5_folds.json", limits=(-160, 300))
cases

# %%
first = cases.view
cases.case.value = 1
assert cases.view is not first and "ct_1.nii.gz, label lbl_1.nii.gz, fold 1" in cases.text.value
cases.case.value = 2
assert cases.view is None and "ct_2.nii.gz does not exist" in cases.text.value
with raises(DataError, match="no cases"): case_browser([])

# %% [markdown]
# ## Anything
# `look` decides by what a path is: a folder with runs, a data list, a volume. A volume that is small enough is shown in
# three planes, a larger one slice by slice.

# %%
#| export
LOOK_BYTES = 2**30 # three planes of more than this would read too much of a store at every click

def look(
    path: str | os.PathLike, # volume, data list, run or folder of runs
    overlay: Any = None, # what lies over a volume
    **options: Any, # of the browser that is chosen
) -> Panel | Pictured: # what `run_browser`, `case_browser`, `viewer` or `browse` returns
    "Open whatever it is"
    place = Path(path)
    if place.name == "log.csv": place = place.parent
    if place.is_dir() and place.suffix != ".zarr" and find_runs(place, 2): return run_browser(place, **options)
    if place.suffix == ".json": return case_browser(place, **options)
    try: format_of(path)
    except FormatError as e: raise FormatError(f"{e}; neither is it a data list or a folder with runs") from None
    vol = as_volume(path)
    size = int(np.prod(vol.data.shape, dtype=object))*vol.dtype.itemsize
    return (viewer if isinstance(vol.data, np.ndarray) or size <= LOOK_BYTES else browse)(vol, overlay, **options)

# %%
seen = look(data/"ct_0.nii.gz", data/"lbl_0.nii.gz", limits=(-160, 300))
assert isinstance(look(root/"runs"), Panel) and look(data/"Abdomen_5_folds.json").case.value == 0
with raises(FormatError, match="neither is it a data list"): look(data/"notes.txt")
seen

# %%
place.cleanup()
