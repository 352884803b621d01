# %% [markdown]
# # Widgets
#
# > Controls over pictures that redraw when a control moves, and stay a picture where nothing can move.
#
# Several pages have something to walk through: slices, supervoxels, predictions, matches, runs. All of them need the
# same few things. A control that changes draws once, also when it moves others along. A picture keeps its physical
# shape, says where it was clicked, and can be turned with the wheel. And a page that is printed, sent by mail or shown
# by a server has no Python behind it: there the same cell has to show the picture. `Panel` is this, and `browse` the
# slice browser that stands on it.
#
# Widgets are those of [ipywidgets](https://ipywidgets.readthedocs.io). Clicks and the wheel need
# [anywidget](https://anywidget.dev), which comes with the `view` extra; without it the controls do the same.

# %%
#| default_exp widgets

# %%
#| export
import base64
import contextlib
import functools
import html
import io
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from medvol_nb.core import DataError
from medvol_nb.slices import Convention, Layer, Paint, Planes, draw, draw_cross, encode_png, label_paint, layer
from medvol_nb.volume import to_world

# %%
from medvol_nb import phantoms
from medvol_nb.core import raises
from medvol_nb.volume import Volume, affine_from, reorient

# %% [markdown]
# ## A picture that can be clicked
# The picture sends what happened to it as a short list: a click with its place, as shares of height and width, so that
# no pixel of the screen has to be known here; a turn of the wheel with the number of notches since the last message.

# %%
#| export
_ESM = """
export default { render({ model, el }) {
  const img = document.createElement("img");
  img.className = "medvol-picture";
  img.draggable = false;
  img.style.cursor = "crosshair";
  img.style.imageRendering = "pixelated";
  img.style.maxWidth = "none";
  let count = 0, turned = 0, timer = null;
  const send = (kind, a, b) => { model.set("event", [kind, a, b, ++count]); model.save_changes(); };
  const paint = () => {
    const url = URL.createObjectURL(new Blob([model.get("value")], { type: "image/png" }));
    img.onload = () => URL.revokeObjectURL(url);
    img.width = Number(model.get("width")); img.height = Number(model.get("height"));
    img.src = url;
  };
  img.addEventListener("click", (e) => {
    const r = img.getBoundingClientRect();
    send("click", (e.clientY - r.top)/r.height, (e.clientX - r.left)/r.width);
  });
  img.addEventListener("wheel", (e) => {
    e.preventDefault();
    turned += Math.sign(e.deltaY);
    timer = timer || setTimeout(() => { timer = null; send("turn", turned, 0); turned = 0; }, 40);
  }, { passive: false });
  model.on("change:value", paint);
  paint();
  el.appendChild(img);
  return () => model.off("change:value", paint);
} };
"""

@functools.cache
def _picture_class() -> type:
    "Picture with clicks; without anywidget, the plain one of ipywidgets, which has the same traits"
    try: import anywidget
    except ImportError:
        import ipywidgets
        return functools.partial(ipywidgets.Image, format="png")
    import traitlets
    class Clickable(anywidget.AnyWidget):
        "PNG that tells what the mouse does to it"
        _esm = _ESM
        value = traitlets.Bytes(b"").tag(sync=True)
        width = traitlets.Unicode("").tag(sync=True)
        height = traitlets.Unicode("").tag(sync=True)
        event = traitlets.List([]).tag(sync=True)
    return Clickable

# %% [markdown]
# ## The panel
# The caller makes the controls, says which pictures there are and in which rows, and gives a function that draws. This
# function gets the panel, reads its controls and calls `show` for each picture. Several changes that belong together
# are wrapped in `together`, and drawing happens once at the end.
#
# A notebook front end shows the live widgets. The snapshot beside them, all pictures in their rows with the line of
# text, is what static pages show.

# %%
#| export
def with_picture(
    widget: Any, # of ipywidgets
    png: bytes, # what static pages show instead
    **kwargs: Any, # of the front end
) -> dict: # MIME type -> content
    "What a notebook gets of a widget: the live one, and a picture of it"
    bundle = widget._repr_mimebundle_(**kwargs)
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    return {**(bundle or {}), "image/png": base64.b64encode(png).decode()}

class Pictured:
    "A widget that stays a picture where there are no widgets"
    def __init__(
        self,
        widget: Any, # of ipywidgets
        still: Callable[[], bytes], # makes the PNG of static pages
        **parts: Any, # further attributes
    ):
        self.__dict__.update(parts)
        self.widget, self.still = widget, still
    def _repr_mimebundle_(self, **kwargs: Any) -> dict: return with_picture(self.widget, self.still(), **kwargs)

Event = tuple[Literal["click", "turn"], float, float] # click: row and column as shares; turn: notches, 0

class Panel:
    "Controls over pictures; a still picture where there are no widgets"
    def __init__(
        self,
        controls: Mapping[str, Any], # name -> ipywidgets control with a `value`
        pictures: Sequence[Sequence[Hashable]], # names of the pictures, row by row
        draw: Callable[["Panel"], None], # shows the pictures; called at every change
        on_event: Callable[["Panel", Hashable, Event], None] | None = None, # a picture was clicked or turned
        *,
        size: int = 512, # longer side of a picture on the screen [pixel]
        **state: Any, # further attributes, for `draw` and `on_event` to keep things in
    ):
        import ipywidgets as w
        self.__dict__.update(state)
        self.controls, self.rows, self.size = dict(controls), [list(r) for r in pictures], size
        self.pictures = {name: _picture_class()() for row in self.rows for name in row}
        self.text, self.told = w.HTML(), "" # told: the plain text below the pictures
        self._draw, self._held, self._late = draw, 0, False
        self._seen: dict[Hashable, tuple[Any, tuple[int, int]]] = {}
        for c in self.controls.values(): c.observe(self._changed, "value")
        for name, picture in self.pictures.items():
            if on_event and picture.has_trait("event"):
                picture.observe(lambda change, name=name: self.event(name, *change["new"][:3]), "event")
        self._on_event = on_event
        flow = w.Layout(flex_flow="row wrap", align_items="center")
        shown = [w.HBox([self.pictures[n] for n in row], layout=flow) for row in self.rows]
        self.box = w.VBox([w.HBox(list(self.controls.values()), layout=flow), *shown, self.text])
        self.redraw()

    def __getattr__(self, name: str) -> Any: # a control or a picture
        for table in (self.__dict__.get("controls", {}), self.__dict__.get("pictures", {})):
            if name in table: return table[name]
        raise AttributeError(f"the panel has no {name!r}; controls: {', '.join(self.__dict__.get('controls', {}))}")

    def _changed(self, _: Any) -> None:
        self._late = True
        if not self._held: self.redraw()

    def redraw(self) -> None:
        "Draw now"
        with self.together(): self._draw(self); self._late = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        "Changes inside count as one: at the end it is drawn once, if anything changed"
        self._held += 1
        try: yield
        finally: self._held -= 1
        if self._late and not self._held: self.redraw()

    def event(
        self,
        name: Hashable, # of the picture
        kind: Literal["click", "turn"], # what happened to it
        a: float, # click: row as a share of the height; turn: notches
        b: float = 0.0, # click: column as a share of the width
    ) -> None:
        "What the mouse does, callable from code"
        if self._on_event is None: return
        with self.together(): self._on_event(self, name, (kind, float(a), float(b)))

    def show(
        self,
        name: Hashable, # of the picture
        pixels: Any, # (row, column) or (row, column, 3) uint8, or the bytes of a PNG file
        extent: Sequence[float] | None = None, # physical height and width; None: square pixels
        longest: float | None = None, # physical length of the panel's `size`; None: longer side of this picture
    ) -> None:
        "Put pixels into a picture, in their physical shape"
        data = pixels if isinstance(pixels, bytes) else encode_png(pixels)
        tall, wide = extent or np.frombuffer(data[16:24], ">u4")[::-1].tolist() # as the PNG's header says
        scale = self.size/(longest or max(tall, wide))
        size = max(1, round(tall*scale)), max(1, round(wide*scale))
        self._seen[name] = data, size
        picture = self.pictures[name]
        picture.height, picture.width = (str(v) for v in size)
        picture.value = data

    def tell(
        self,
        text: str, # one or more lines
    ) -> None:
        "Write below the pictures"
        self.told, self.text.value = text, "<br>".join(html.escape(text).split("\n"))

    def set(
        self,
        name: str, # of a control
        value: Any, # new value; a slider moves it into its range
    ) -> None:
        "Set a control"
        c = self.controls[name]
        c.value = max(c.min, min(c.max, value)) if hasattr(c, "min") and hasattr(c, "max") else value

    def snapshot(self) -> bytes: # a PNG file's content
        "The pictures in their rows with the text below, as one picture"
        from PIL import Image, ImageDraw, ImageFont
        gap, line = 4, 16*len(self.told.split("\n")) + 2 if self.told else 0
        rows = [r for row in self.rows if (r := [self._seen[n] for n in row if n in self._seen])]
        if not rows: raise DataError("the panel shows no picture yet")
        wide = max(sum(size[1] + gap for _, size in r) - gap for r in rows)
        tall = [max(size[0] for _, size in r) + gap for r in rows]
        sheet, y = Image.new("RGB", (wide, sum(tall) - gap + line), "white"), 0
        for r, step in zip(rows, tall):
            x = 0
            for data, size in r:
                part = Image.open(io.BytesIO(data)).convert("RGB").resize(size[::-1], Image.Resampling.NEAREST)
                sheet.paste(part, (x, y))
                x += size[1] + gap
            y += step
        font = ImageFont.load_default(11)
        if line: ImageDraw.Draw(sheet).text((2, sheet.height - line + 2), self.told, "black", font)
        return encode_png(np.asarray(sheet))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict: return with_picture(self.box, self.snapshot(), **kwargs)

# %%
import ipywidgets as w

def wave(panel):
    heights.append(panel.waves.value)
    x, y = np.linspace(0, panel.waves.value*2*np.pi, 300), np.abs(np.linspace(1, -1, panel.height.value))
    panel.show("wave", np.where(y[:, None] < np.abs(np.sin(x)), 60, 220).astype(np.uint8))
    panel.tell(f"{panel.waves.value} waves")

heights = []
panel = Panel({"waves": w.IntSlider(2, 1, 9), "height": w.IntSlider(80, 10, 200)}, [["wave"]], wave, size=400)
panel

# %% [markdown]
# A change draws once; two changes together draw once; a value outside a slider's range goes to its end.

# %%
panel.waves.value = 3
with panel.together():
    panel.set("waves", 40)
    panel.set("height", 60)
assert heights == [2, 3, 9] and panel.told == "9 waves" and panel.wave.value[:4] == b"\x89PNG"
assert (panel.wave.width, panel.wave.height) == ("400", "80")
with raises(AttributeError, match="no 'hight'; controls: waves, height"): panel.hight

# %% [markdown]
# ## The slice browser
# A volume, what lies over it, and the usual controls: which way to cut, which slice, the window of intensities, how
# strong and which layer. The wheel turns slices, a click tells what is there. The place of the last click is kept when
# the view changes, so the other two views go through the same voxel.

# %%
#| export
def open_layers(
    image: Planes, # below
    layers: Any, # None, name -> layer, or one; each a `Layer` or anything `slices.layer` takes
    kind: Literal["auto", "labels", "heat"] | Paint = "auto", # what layers are, see `slices.layer`
) -> dict[str, Layer]: # by name
    "What is laid over a volume, opened"
    given = {} if layers is None else layers if isinstance(layers, Mapping) else {"overlay": layers}
    return {str(n): s if isinstance(s, Layer) else layer(s, image, kind, str(n)) for n, s in given.items()}

def layer_controls(
    image: Planes, # below
    layers: Mapping[str, Layer], # above
    limits: tuple[float, float] | None = None, # black and white to begin with; None: percentiles
    opacity: float = 0.5, # of the layer, [0, 1]
) -> dict[str, Any]: # window, and with layers: layer, opacity, outline
    "The controls of how a slice is drawn"
    import ipywidgets as w
    low, high = image.limits() if limits is None else limits
    seen = image.limits() if isinstance(image.vol.data, np.ndarray) else (low, high) # of a store this would cost a read
    low_end, high_end = min(low, seen[0]) - 0.5*(high - low), max(high, seen[1]) + 0.5*(high - low)
    out = {"window": w.FloatRangeSlider(value=(low, high), min=low_end, max=high_end, step=(high_end - low_end)/400,
                                        description="window", layout=w.Layout(width="24em"),
                                        readout_format=".0f" if image.vol.dtype.kind in "iu" else ".3g")}
    if layers: out |= {
        "layer": w.Dropdown(options=[*layers, "none"], description="shown", layout=w.Layout(width="16em")),
        "opacity": w.FloatSlider(opacity, min=0, max=1, step=0.05, description="opacity")}
    if any(p.paint is label_paint for p in layers.values()):
        out["outline"] = w.Checkbox(False, description="outlines only", indent=False)
    return out

def drawn(
    panel: Panel, # with `layer_controls`, and `layers`
    image: Planes, # below
    view: str, # which way to cut
    k: int, # where [voxel]
) -> np.ndarray: # (row, column, 3) uint8
    "A plane as the controls of a panel want it"
    low, high = panel.window.value
    chosen = list(chosen_layer(panel).values())
    if chosen and chosen[0].paint is label_paint and panel.outline.value:
        chosen = [Layer(chosen[0].planes, functools.partial(label_paint, outline=True))]
    return draw(image, view, k, (low, max(high, np.nextafter(low, np.inf))), chosen,
                panel.opacity.value if panel.layers else 0.0)

def chosen_layer(
    panel: Panel, # with `layer_controls`, and `layers`
) -> dict[str, Layer]: # one by its name, or none
    "The layer that is shown"
    return {n: p for n, p in panel.layers.items() if n == panel.layer.value}

def describe(
    image: Planes, # volume
    index: Sequence[int], # (3) stored index [voxel]
    layers: Mapping[str, Layer], # what is laid over
    names: Mapping[int, str] | None = None, # label id -> name
    view: str | None = None, # plane that was just drawn; None: any
) -> str: # one line
    "What is at a voxel"
    name = view or image.names[0]
    def at(planes: Planes) -> Any:
        plane = planes.plane(name, int(index[planes.screen(name).across]))
        return plane[(..., *(min(n - 1, round(v)) for v, n in zip(planes.pixel_of(name, index), plane.shape[-2:])))]
    where = ", ".join(f"{a} {i}" for a, i in zip(image.vol.spatial_axes, index))
    mm = ", ".join(f"{v:.1f}" for v in to_world(image.vol.affine, index))
    told = [f"{where} ({mm} mm): {at(image):.6g}"]
    for title, part in layers.items():
        value = at(part.planes)
        if np.ndim(value): told.append(f"{title} ({', '.join(f'{v:.3g}' for v in value)})")
        else: told.append(f"{title} {value:.6g}" + (f" {names[int(value)]}" if names and int(value) in names else ""))
    return "; ".join(told)

def sides_text(
    image: Planes, # volume
    view: str, # plane that was drawn
) -> str: # such as 'left R, top A'; empty where shown as stored
    "Which side of the patient is where on the screen"
    sides = image.screen(view).sides
    return f"left {sides[0]}, right {sides[1]}, top {sides[2]}, bottom {sides[3]}" if sides else ""

def pixel_at(
    shape: Sequence[int], # (row, column) of the picture
    a: float, # row as a share of the height
    b: float, # column as a share of the width
) -> tuple[int, int]: # row and column
    "The pixel that was clicked"
    return tuple(min(n - 1, max(0, int(share*n))) for share, n in zip((a, b), shape[-2:]))

def go_to(
    panel: Panel, # from `browse`
    index: Sequence[int], # (3) stored index [voxel]
) -> None:
    "Show a voxel: its slice, a cross, and what is there"
    with panel.together():
        panel.at[:], panel.clicked = [int(v) for v in index], True
        panel.set("slice", panel.at[panel.image.screen(panel.view.value).across])
        panel.redraw()

def browse(
    volume: Any, # `Planes`, or path, volume, array or chunked volume; see `slices.as_volume`
    layers: Any = None, # name -> layer, or one; each a `Layer` or anything `slices.layer` takes
    *,
    kind: Literal["auto", "labels", "heat"] | Paint = "auto", # what layers are; see `slices.layer`
    view: str | None = None, # axial, coronal, sagittal or an axis to begin with; None: the first
    index: int | None = None, # slice to begin with; None: the middle one
    limits: tuple[float, float] | None = None, # shown as black and white; None: percentiles
    opacity: float = 0.5, # of the layer, [0, 1]
    names: Mapping[int, str] | None = None, # label id -> name
    convention: Convention = "auto", # which way up, see `slices.screens`
    channel: int = 0, # of a volume that has several
    most: int = 1024, # rows and columns at most; larger slices are thinned out
    size: int = 512, # longer side of the picture on the screen [pixel]
    cache_bytes: int = 2**28, # decoded chunks that are kept for the next slices, for each volume [byte]
    extra: Mapping[str, Any] | None = None, # further controls that draw when they change
) -> Panel: # controls view, slice, window, opacity, layer, outline; `at` is the voxel of the last click
    "Walk through a volume with what lies over it"
    import ipywidgets as w
    image = volume if isinstance(volume, Planes) else \
        Planes(volume, convention=convention, channel=channel, most=most, cache_bytes=cache_bytes)
    parts, view = open_layers(image, layers, kind), image.names[0] if view is None else view
    at, across = [n//2 for n in image.vol.shape], image.screen(view).across
    if index is not None:
        if not 0 <= index < image.count(view):
            raise DataError(f"{view}: must be 0...{image.count(view) - 1}, got {index}")
        at[across] = index
    buttons = w.ToggleButtonsStyle(button_width="5.5em")
    controls = {"view": w.ToggleButtons(options=image.names, value=view, style=buttons),
                "slice": w.IntSlider(at[across], 0, image.count(view) - 1, description="slice"),
                **layer_controls(image, parts, limits or image.limits(view), opacity)}
    controls |= dict(extra or {})

    def draw_slice(panel: Panel) -> None:
        name = panel.view.value
        across = image.screen(name).across
        if name != panel.drawn_view: # another view has another number of slices, and its own place
            panel.drawn_view = name
            panel.slice.min, panel.slice.max = 0, image.count(name) - 1
            panel.slice.value = panel.at[across]
        panel.at[across] = panel.slice.value
        rgb = drawn(panel, image, name, panel.slice.value)
        if panel.clicked: draw_cross(rgb, *image.pixel_of(name, panel.at))
        panel.show("picture", rgb, image.extent(name))
        panel.tell(describe(image, panel.at, chosen_layer(panel), names, name) if panel.clicked else
                   sides_text(image, name))

    def happened(panel: Panel, _: Hashable, event: Event) -> None:
        kind, a, b = event
        if kind == "turn": return panel.set("slice", panel.slice.value + int(a))
        name = panel.view.value
        pixel = pixel_at(image.plane(name, panel.slice.value).shape, a, b)
        go_to(panel, np.rint(to_world(image.matrix(name, panel.slice.value), [*pixel, 0])))

    return Panel(controls, [["picture"]], draw_slice, happened, size=size,
                 at=at, clicked=False, drawn_view=view, image=image, layers=parts)

# %%
body = phantoms.abdomen()
ct = Volume(body.img, affine_from(body.spacing))
lbl = reorient(Volume(body.lbl, ct.affine), "LAS")
walk = browse(ct, {"organs": lbl}, limits=(-160, 300), names=body.names, size=400)
walk

# %% [markdown]
# Code can do what a hand does. A click, as the browser reports it, then another view through the same voxel:

# %%
walk.event("picture", "click", 0.5, 0.3)
walk.view.value = "coronal"
walk

# %%
before, at = walk.picture.value, list(walk.at)
walk.outline.value = True
assert walk.picture.value != before and walk.slice.value == at[1] and walk.slice.max == ct.shape[1] - 1
assert f"{body.img[tuple(at)]:.6g}; organs {body.lbl[tuple(at)]}" in walk.told
walk.event("picture", "turn", 3)
assert walk.at[1] == at[1] + 3
walk.event("picture", "turn", 10_000)
assert walk.at[1] == ct.shape[1] - 1

# %%
with raises(DataError, match="no plane 'oblique'"): browse(ct, view="oblique")
with raises(DataError, match="axial: must be 0"): browse(ct, index=999)
with raises(DataError, match="Is it of this volume"): browse(ct, np.zeros((3, 3, 3), np.uint8))
