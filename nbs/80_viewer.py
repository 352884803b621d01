# %% [markdown]
# # Viewer
#
# > Look at any volume and at what was made of it: planes, labels, matches, patches.
#
# Figures in a report show the slice that somebody chose. A mistake is usually on another one. The browsers here stand
# on the panel of [page 07c](07c_widgets.ipynb); each answers one question. Where is this point in all three planes?
# Where is label 17, and how large is it? Which of these matched points are wrong? What do the patches look like that a
# network is trained on? All of them take paths, volumes or arrays, read only what they show, and leave a picture where
# widgets do not work.

# %%
#| default_exp viewer

# %%
#| export
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medvol_nb.core import DataError, optional
from medvol_nb.plot import label_colours
from medvol_nb.slices import Convention, Layer, Paint, Planes, draw, draw_box, draw_cross, label_paint, layer, on_grid
from medvol_nb.stores import check_budget
from medvol_nb.volume import Volume, reorient, to_index, to_world, write_volume
from medvol_nb.widgets import (Event, Panel, Pictured, browse, chosen_layer, describe, drawn, go_to, layer_controls,
                               open_layers, pixel_at)

# %%
from medvol_nb import phantoms
from medvol_nb.core import raises
from medvol_nb.volume import affine_from

# %% [markdown]
# ## Three planes through a point
# A click into any plane moves the other two. The line below says what is there: the voxel, its place in the world, its
# value and its label.

# %%
#| export
def viewer(
    volume: Any, # path, volume, array (x, y, z) or chunked volume
    overlay: Any = None, # what lies over it: the same, or name -> such
    *,
    kind: Literal["auto", "labels", "heat"] | Paint = "auto", # what overlays are, see `slices.layer`
    at: Sequence[int] | None = None, # stored index to begin with [voxel]; None: the middle
    limits: tuple[float, float] | None = None, # shown as black and white; None: percentiles
    opacity: float = 0.5, # of the overlay, [0, 1]
    names: Mapping[int, str] | None = None, # label id -> name
    convention: Convention = "auto", # which way up, see `slices.screens`
    channel: int = 0, # of a volume that has several
    most: int = 1024, # rows and columns at most; larger planes are thinned out
    size: int = 320, # longer side of a picture on the screen [pixel]
) -> Panel: # controls named as the planes, window, opacity, layer; `at` is the voxel
    "Three planes of a volume through a point that a click moves"
    import ipywidgets as w
    image = volume if isinstance(volume, Planes) else \
        Planes(volume, convention=convention, channel=channel, most=most)
    parts = open_layers(image, overlay, kind)
    at = [n//2 for n in image.vol.shape] if at is None else [int(v) for v in at]
    if len(at) != 3 or not all(0 <= v < n for v, n in zip(at, image.vol.shape)):
        raise DataError(f"viewer: at must be three indices inside {image.vol.shape}, got {tuple(at)}")
    controls = {n: w.IntSlider(at[image.screen(n).across], 0, image.count(n) - 1, description=n) for n in image.names}
    longest = max(v for n in image.names for v in image.extent(n)) # one scale for all three

    def draw_planes(panel: Panel) -> None:
        for n in image.names: panel.at[image.screen(n).across] = panel.controls[n].value
        for n in image.names:
            rgb = drawn(panel, image, n, panel.at[image.screen(n).across])
            draw_cross(rgb, *image.pixel_of(n, panel.at))
            panel.show(n, rgb, image.extent(n), longest)
        panel.tell(describe(image, panel.at, chosen_layer(panel), names))

    def happened(panel: Panel, name: Hashable, event: Event) -> None:
        what, a, b = event
        if what == "turn": return panel.set(name, panel.controls[name].value + int(a))
        k = panel.at[image.screen(name).across]
        found = to_world(image.matrix(name, k), [*pixel_at(image.plane(name, k).shape, a, b), 0])
        for n in image.names: panel.set(n, int(np.rint(found[image.screen(n).across])))

    controls |= layer_controls(image, parts, limits, opacity)
    return Panel(controls, [image.names], draw_planes, happened, size=size, at=list(at), image=image, layers=parts)

# %%
body = phantoms.abdomen()
ct = Volume(body.img, affine_from(body.spacing))
lbl = reorient(Volume(body.lbl, ct.affine), "LPS")
look = viewer(ct, {"organs": lbl}, limits=(-160, 300), names=body.names)
look

# %% [markdown]
# A click in the sagittal plane moves the other two and leaves its own where it is:

# %%
held = look.sagittal.value
look.event("sagittal", "click", 0.4, 0.3)
assert look.sagittal.value == held == look.at[0]
rows, columns = look.image.plane("sagittal", held).shape
assert look.axial.value == look.at[2] == rows - 1 - int(0.4*rows)
assert look.coronal.value == look.at[1] == columns - 1 - int(0.3*columns)
assert f"organs {body.lbl[tuple(look.at)]}" in look.told
look.told

# %%
with raises(DataError, match="three indices inside"): viewer(ct, at=(1, 2))
with raises(DataError, match="'auto', 'radiological'"): viewer(ct, convention="radiologic")

# %% [markdown]
# ## Which labels are there
# A label map is read once, a row of chunks at a time, and gives for each id its volume and the voxel where its largest
# sections meet. The list jumps there.

# %%
#| export
def label_table(
    vol: Volume, # labels, integers or whole numbers
    names: Mapping[int, str] | None = None, # id -> name
) -> list[dict[str, Any]]: # one row an id, by id: id, name, voxels, ml, at (stored index of its largest sections)
    "What a label map holds; background 0 is left out"
    if vol.channels is not None: raise DataError(f"labels: one value a voxel is needed, got {vol.channels} channels")
    rows = (getattr(vol.data, "chunks", None) or (max(1, 2**24//int(np.prod(vol.shape[1:]))),))[0]
    found: dict[int, list[np.ndarray]] = {}
    for first in range(0, vol.shape[0], rows):
        part = np.asarray(vol.data[first:first + rows])
        where = np.nonzero(part)
        values = part[where]
        if values.dtype.kind == "f":
            if not np.array_equal(values, np.rint(values)):
                raise DataError("labels: these are fractions, a label map holds whole numbers")
            values = values.astype(np.int64)
        ids, inverse = np.unique(values, return_inverse=True)
        for axis, n in enumerate(vol.shape):
            places = where[axis] + (first if axis == 0 else 0)
            counts = np.bincount(inverse*n + places, minlength=len(ids)*n).reshape(len(ids), n)
            for i, c in zip(ids.tolist(), counts):
                found.setdefault(i, [np.zeros(m, np.int64) for m in vol.shape])[axis] += c
    each = float(np.prod(vol.spacing))/1000
    return [{"id": int(i), "name": (names or {}).get(int(i), ""), "voxels": int(c[0].sum()),
             "ml": float(c[0].sum())*each, "at": tuple(int(a.argmax()) for a in c)} for i, c in sorted(found.items())]

def label_browser(
    volume: Any, # image: path, volume, array or chunked volume
    labels: Any, # label map, the same
    names: Mapping[int, str] | None = None, # id -> name
    **options: Any, # of `browse`, such as view= or limits=
) -> Panel: # as of `browse`, with controls label and only; `table` holds the rows
    "List of the labels of a volume; choosing one goes to its largest section"
    import ipywidgets as w
    image = Planes(volume, convention=options.pop("convention", "auto"), channel=options.pop("channel", 0))
    over = on_grid(labels, image.vol, 0, "labels")
    table = label_table(over, names)
    if not table: raise DataError("labels: the label map is empty")
    lines = [(f"{r['id']} {r['name']}".strip() + f", {r['ml']:,.3g} mL", r["id"]) for r in table]
    select = w.Select(options=lines, value=None, rows=min(len(lines), 20), layout=w.Layout(width="18em"))
    only = w.Checkbox(False, description="only this one", indent=False)
    outline = w.Checkbox(False, description="outlines only", indent=False)
    def paint(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        alone = only.value and select.value is not None
        return label_paint(np.where(plane == select.value, plane, 0) if alone else plane, outline.value)
    panel = browse(image, {"labels": Layer(layer(over, image, "labels").planes, paint)}, names=names,
                   extra={"only": only, "outline": outline}, **options)
    panel.table, panel.controls["label"] = table, select
    places = {r["id"]: r["at"] for r in table}
    select.observe(lambda change: change["new"] is not None and go_to(panel, places[change["new"]]), "value")
    panel.box = w.HBox([select, panel.box])
    return panel

# %%
organs = label_browser(ct, lbl, body.names, limits=(-160, 300), size=400)
organs.label.value, organs.only.value = 2, True
organs

# %%
row = organs.table[1]
assert row["id"] == 2 and row["voxels"] == (body.lbl == 2).sum()
assert organs.at[2] == (body.lbl == 2).sum((0, 1)).argmax() and organs.slice.value == organs.at[2]
with raises(DataError, match="is empty"): label_browser(ct, np.zeros(ct.shape, np.uint8))
with raises(DataError, match="these are fractions"): label_table(Volume(np.full((2, 2, 2), 0.5), np.eye(4)))

# %% [markdown]
# ## Which matches are wrong
# Pairs of points in two scans, one pair at a time, three planes on either side. They can be ordered by score, so the
# doubtful ones come first. `Matches` of [page 34c](34c_embed_match.ipynb) can be given as they are.

# %%
#| export
def _turns(control: str) -> Callable:
    "The wheel over any picture moves one control"
    def turned(panel: Panel, _: Hashable, event: Event) -> None:
        if event[0] == "turn": panel.set(control, panel.controls[control].value + int(event[1]))
    return turned

def match_browser(
    first: Any, # scan: path, volume or array
    second: Any, # the other scan
    points: Any, # (n, 3) places in the first, RAS+ [mm]; or an object with `points`, `matched`, `score`, `status`
    matched: Any = None, # (n, 3) places in the second, RAS+ [mm]
    score: Any = None, # (n) the higher the better
    *,
    order: Literal["given", "worst first"] = "given", # which pair comes first
    limits: Sequence[tuple[float, float]] | None = None, # black and white, of either scan; None: percentiles
    size: int = 220, # longer side of a picture on the screen [pixel]
) -> Panel: # control pair; `shown` is the number of the pair, as given
    "Matched points of two scans, a pair at a time"
    import ipywidgets as w
    status = getattr(points, "status", None)
    if matched is None and not hasattr(points, "matched"):
        raise DataError("match_browser: points alone are no pairs. Give `matched`, their places in the second scan, or "
                        "an object that holds both, such as `Matches`")
    if matched is None: points, matched, score = points.points, points.matched, getattr(points, "score", None)
    a, b = (np.asarray(p, np.float64) for p in (points, matched))
    if a.ndim != 2 or a.shape[1:] != (3,) or a.shape != b.shape or not len(a):
        raise DataError(f"match_browser: needs two lists of (n, 3) points [mm], got {a.shape} and {b.shape}")
    given = np.zeros(len(a)) if score is None else np.asarray(score, np.float64)
    if given.shape != (len(a),): raise DataError(f"match_browser: {given.shape} scores for {len(a)} pairs")
    ranks = np.argsort(given, kind="stable") if order == "worst first" else np.arange(len(a))
    sides = [Planes(v, convention="radiological") for v in (first, second)]
    ranges = [s.limits() for s in sides] if limits is None else limits
    longest = max(v for s in sides for n in s.names for v in s.extent(n)) # one scale for all six
    controls = {"pair": w.IntSlider(0, 0, len(a) - 1, description="pair")}

    def draw_pair(panel: Panel) -> None:
        panel.shown = k = int(ranks[panel.pair.value])
        for side, (planes, at, window) in enumerate(zip(sides, (a[k], b[k]), ranges)):
            exact = to_index(planes.vol.affine, at)
            index = [int(np.clip(np.rint(v), 0, n - 1)) for v, n in zip(exact, planes.vol.shape)]
            for n in planes.names:
                rgb = draw(planes, n, index[planes.screen(n).across], window)
                draw_cross(rgb, *planes.pixel_of(n, exact))
                panel.show((side, n), rgb, planes.extent(n), longest)
        told = ["({:.1f}, {:.1f}, {:.1f}) mm to ({:.1f}, {:.1f}, {:.1f}) mm".format(*a[k], *b[k])]
        if score is not None: told.append(f"score {given[k]:.3f}")
        if status is not None: told.append(str(status[k]))
        panel.tell(f"pair {k}: " + ", ".join(told))

    rows = [[(side, n) for n in sides[side].names] for side in (0, 1)]
    return Panel(controls, rows, draw_pair, _turns("pair"), size=size)

# %%
shifted = Volume(body.img[:, ::-1], ct.affine @ np.array([[1, 0, 0, 3], [0, -1, 0, 47], [0, 0, 1, 0], [0, 0, 0, 1]]))
inside = np.argwhere(body.lbl > 0)[::4000]
start = to_world(ct.affine, inside)
shift = np.array([3*body.spacing[0], 0, 0])
pairs = match_browser(ct, shifted, start, start + shift, score=np.linspace(0.9, 0.3, len(start)), order="worst first")
pairs

# %%
assert pairs.shown == len(start) - 1
pairs.pair.value = 1
assert pairs.shown == len(start) - 2 and "score" in pairs.told
with raises(DataError, match="two lists of"): match_browser(ct, ct, start, start[:1])
with raises(DataError, match="points alone are no pairs"): match_browser(ct, ct, start)

# %% [markdown]
# ## What a network is trained on
# Patches by their first voxel: on the left the slice they are from with their frame, on the right the patch itself. The
# wheel goes through its depth.

# %%
#| export
def patch_browser(
    volume: Any, # path, volume, array or chunked volume
    starts: Any, # (n, 3) first voxels, stored order, may lie outside
    patch_size: int | Sequence[int], # [voxel] stored order
    overlay: Any = None, # what lies over it: the same as `volume`, or name -> such
    *,
    kind: Literal["auto", "labels", "heat"] | Paint = "auto", # what overlays are
    titles: Sequence[str] | None = None, # one a patch
    view: str | None = None, # which way to cut; None: the first
    limits: tuple[float, float] | None = None, # shown as black and white; None: percentiles
    opacity: float = 0.5, # of the overlay, [0, 1]
    size: int = 400, # longer side of a picture on the screen [pixel]
) -> Panel: # controls patch, depth, layer, opacity
    "Patches of a volume, one at a time, and where they are from"
    import ipywidgets as w
    image = Planes(volume, most=2**31)
    parts = open_layers(image, overlay, kind)
    first = np.asarray(starts)
    widths = np.broadcast_to(np.asarray(patch_size, int), (3,))
    if first.ndim != 2 or first.shape[1:] != (3,) or not len(first) or first.dtype.kind not in "iu":
        raise DataError(f"patch_browser: needs (n, 3) whole numbers, got {first.shape} {first.dtype}")
    away = ((first + widths <= 0) | (first >= image.vol.shape)).any(1)
    if away.any(): raise DataError(f"patch_browser: patch {int(away.argmax())} at {first[away.argmax()].tolist()} is "
                                   f"outside the volume of shape {image.vol.shape}")
    if titles is not None and len(titles) != len(first):
        raise DataError(f"patch_browser: {len(titles)} titles for {len(first)} patches")
    name = image.names[0] if view is None else view
    across = image.screen(name).across
    controls = {"patch": w.IntSlider(0, 0, len(first) - 1, description="patch"),
                "depth": w.IntSlider(int(widths[across])//2, 0, int(widths[across]) - 1, description="depth"),
                **layer_controls(image, parts, limits, opacity)}

    def draw_patch(panel: Panel) -> None:
        low = first[panel.patch.value]
        k = int(np.clip(low[across] + panel.depth.value, 0, image.count(name) - 1))
        whole = drawn(panel, image, name, k)
        ends = [image.pixel_of(name, v) for v in (low, low + widths - 1)]
        rows, columns = ([int(v) for v in sorted(pair)] for pair in zip(*ends))
        cut = whole[max(rows[0], 0):rows[1] + 1, max(columns[0], 0):columns[1] + 1].copy()
        step = max(1, -(-max(whole.shape[:2])//1024))
        seen = whole[::step, ::step].copy()
        draw_box(seen, [r/step for r in rows], [c/step for c in columns])
        panel.show("volume", seen, image.extent(name))
        s = image.screen(name)
        panel.show("patch", cut, [n*image.vol.spacing[a] for n, a in zip(cut.shape, (s.rows, s.columns))])
        told = f"patch {panel.patch.value} at {tuple(low.tolist())}, {name} {k}"
        panel.tell(told + (f": {titles[panel.patch.value]}" if titles is not None else ""))

    return Panel(controls, [["volume", "patch"]], draw_patch, _turns("depth"), size=size, layers=parts)

# %%
roll = phantoms.sheets((40, 72, 88))
scroll = Volume(roll.img, affine_from(1.0, axes="zyx"), "zyx")
starts = [[0, 0, 0], [10, 20, 30], [24, 50, 60], [-4, -8, 40]]
patches = patch_browser(scroll, starts, (16, 32, 32), {"sheet": roll.mask}, size=300)
patches.patch.value = 1
patches

# %%
patches.layer.value = "none"
patches.patch.value = 3
assert patches.told == "patch 3 at (-4, -8, 40), z 4"
assert (patches.pictures["patch"].height, patches.pictures["patch"].width) == (str(round(300*24/32)), "300")
with raises(DataError, match="patch 1 at .* is outside"): patch_browser(scroll, [[0, 0, 0], [40, 0, 0]], 8)

# %% [markdown]
# ## In the browser itself
# [NiiVue](https://niivue.com) draws with the graphics card of whoever looks: planes at full speed and a rendering that
# can be turned. The whole volume travels there, so it suits a scan and not a store of a terabyte. It comes with the
# `view` extra; on static pages the three planes are shown.

# %%
#| export
def _nifti(vol: Volume) -> bytes:
    "A volume as the bytes of an uncompressed NIfTI file"
    with tempfile.TemporaryDirectory() as d: return write_volume(vol, Path(d)/"volume.nii").read_bytes()

def niivue(
    volume: Any, # path, volume or array
    labels: Any = None, # label map over it, the same
    *,
    limits: tuple[float, float] | None = None, # shown as black and white; None: percentiles
    opacity: float = 0.5, # of the labels, [0, 1]
    height: int = 400, # of the widget [pixel]
    max_bytes: int = 2**29, # refuse to send larger volumes [byte]
) -> Pictured: # `widget` is ipyniivue's
    "Planes and a rendering, drawn by the web browser (needs the `view` extra)"
    ipyniivue = optional("ipyniivue", "view")
    image = Planes(volume)
    if image.vol.channels is not None: raise DataError("niivue: one channel is needed, pick one first")
    check_budget(image.vol.shape, image.vol.dtype, "niivue", max_bytes)
    still = viewer(image, None if labels is None else {"labels": labels}, kind="labels", limits=limits, opacity=opacity)
    low, high = still.window.value
    widget = ipyniivue.NiiVue(height=height, is_radiological_convention=True, sagittal_nose_left=True)
    sent = [ipyniivue.Volume(name="image.nii", data=_nifti(image.vol.load()), cal_min=low, cal_max=high)]
    if labels is not None:
        over = still.layers["labels"].planes.vol.load()
        ids = sorted({0, *np.unique(over.data).astype(int).tolist()})
        if ids[0] < 0 or ids[-1] > 32767:
            raise DataError(f"niivue: ids 0 to 32767 can be shown, got {ids[0]} to {ids[-1]}")
        sent.append(ipyniivue.Volume(name="labels.nii", data=_nifti(replace(over, data=over.data.astype(np.int16))),
                                     opacity=opacity))
        red, green, blue = (np.round(255*label_colours(ids)).astype(int).T).tolist()
        sent[1].set_colormap_label({"R": red, "G": green, "B": blue, "A": [255*(i != 0) for i in ids], "I": ids,
                                    "labels": [str(i) for i in ids]})
    widget.load_volumes(sent)
    return Pictured(widget, still.snapshot)

# %%
import importlib.util

if importlib.util.find_spec("ipyniivue"):
    turning = niivue(ct, lbl, limits=(-160, 300))
    assert [v.name for v in turning.widget.volumes] == ["image.nii", "labels.nii"]
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(turning._repr_mimebundle_())
    with raises(DataError, match="more than the budget"): niivue(ct, max_bytes=1000)
