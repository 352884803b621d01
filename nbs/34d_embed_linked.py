# %% [markdown]
# # Linked viewers
#
# > Click in one scan, see the match in the other, its score, the way back, and how similar everything else is.
#
# A table of distances says how often matching is right; to see *when* it is wrong one has to point. Two scans side by
# side, three planes each: a click in the left one moves its cross, finds the match, and moves the right one there with
# the map of scores over it. A second bright spot, the other kidney for instance, is seen at once. Between the click and
# the picture lies one search of [the matcher](34c_embed_match.ipynb), a fraction of a second.

# %%
#| default_exp embed.linked

# %%
#| export
import os
from pathlib import Path
from typing import Any

import numpy as np

from medvol_nb.core import DataError, OnExists
from medvol_nb.embed.match import Matcher, Matches
from medvol_nb.geometry import Volume, reorient, resample, to_axes, to_index, to_world
from medvol_nb.plot import save_figure, window_limits
from medvol_nb.slices import Planes, blend, draw_cross, grey_bytes, heat_paint
from medvol_nb.widgets import Panel, pixel_at

# %%
import time

from medvol_nb import phantoms
from medvol_nb.core import raises
from medvol_nb.embed.store import position_embedding
from medvol_nb.geometry import affine_from

# %% [markdown]
# ## A plane with a cross
# For the screen a scan is turned to RAS and brought to one voxel size; a plane is shown with the patient's right on the
# left and the head up. Scores are laid over in one colour, the stronger the nearer they are to the best: only the top
# fifth of the range is seen, since everything in a body is somewhat similar. Planes, colours and the cross are those of
# [page 07b](07b_slices.ipynb), which know the world position of each pixel, so a click is one product with a matrix.

# %%
#| export
AXES = ("axial", "coronal", "sagittal") # planes across z, y, x

def shown(
    vol: Volume, # scan, any orientation
    voxel_mm: float = 2.0, # for the screen [mm]
) -> Volume: # xyz, RAS, equal voxel sizes, float32
    "A scan as the viewers show it"
    return resample(to_axes(reorient(vol, "RAS"), "xyz"), voxel_mm)

def plane_of(
    planes: Planes, # of a scan from `shown`
    at_mm: np.ndarray, # (3,) position the plane goes through, RAS+ [mm]
    axis: str = "axial", # or 'coronal', 'sagittal'
) -> tuple[np.ndarray, np.ndarray]: # (row, column) values, (4, 4) of pixel (row, column, 0) -> RAS+ [mm]
    "One plane through a position, head up, patient's right on the left"
    index = np.rint(to_index(planes.vol.affine, at_mm))[planes.screen(axis).across]
    k = int(np.clip(index, 0, planes.count(axis) - 1))
    return planes.plane(axis, k), planes.vol.affine @ planes.matrix(axis, k)

def painted(
    grey: np.ndarray, # (row, column) intensities
    limits: tuple[float, float], # shown as black and white
    heat: np.ndarray | None = None, # (row, column) scores in [-1, 1]
    top: float = 1.0, # the best score of the whole scan
    cross: tuple[float, float] | None = None, # row and column
    strength: float = 0.7, # of the colour where the score is the best
) -> np.ndarray: # (row, column, 3) uint8
    "A plane with scores over it and a cross"
    base = grey_bytes(grey, limits)
    rgb = np.repeat(base[..., None], 3, -1) if heat is None else \
        blend(base, *heat_paint(heat, (top - 0.2, top)), strength)
    if cross is not None: draw_cross(rgb, *cross)
    return rgb

# %%
body = phantoms.abdomen((48, 36, 42), seed=1)
scan = Volume(body.img, affine_from(body.spacing, origin=(-100.0, 20.0, 5.0)))
seen = shown(scan, 6.0)
middle = to_world(seen.affine, (np.array(seen.shape) - 1)/2)
picture, to_mm = plane_of(Planes(seen), middle, "coronal")
corner = to_world(seen.affine, [seen.shape[0] - 1, 0, seen.shape[2] - 1])
assert np.abs(to_world(to_mm, [0, 0, 0]) - corner)[[0, 2]].max() < 1e-9
assert np.array_equal(picture, seen.data[:, int(np.rint((seen.shape[1] - 1)/2))].T[::-1, ::-1])
with raises(DataError, match="no plane 'oblique'"): plane_of(Planes(seen), middle, "oblique")

# %% [markdown]
# ## Both sides
# `LinkedView` holds the two scans and the matcher, without any widget: `point` moves the cross of the left scan and
# matches, `plane` draws. What it draws is a PNG, so it works where no widgets do.

# %%
#| export
class LinkedView:
    "Two scans, a point in the first, its match in the second"
    def __init__(
        self,
        first: Volume, # scan that is clicked
        second: Volume, # scan that is searched
        matcher: Matcher, # of their embeddings, in this order
        *,
        voxel_mm: float = 2.0, # for the screen [mm]
        at_mm: np.ndarray | None = None, # (3,) first position, RAS+ [mm]; None: the middle
    ):
        self.matcher, self.vols = matcher, (shown(first, voxel_mm), shown(second, voxel_mm))
        self.planes = tuple(Planes(v) for v in self.vols)
        self.limits = tuple(window_limits(v.data) for v in self.vols)
        middle = to_world(self.vols[0].affine, (np.array(self.vols[0].shape) - 1)/2)
        self.strength = 0.7
        self.point(middle if at_mm is None else at_mm)

    def point(
        self,
        at_mm: np.ndarray, # (3,) in the first scan, RAS+ [mm]
    ) -> Matches: # one match, with the second peak and the way back
        "Move the cross and match"
        pts = np.reshape(np.asarray(at_mm, np.float64), (1, 3))
        self.match = self.matcher.match(pts, top_k=2)
        self._heat = self.matcher.similarity_map(pts[0])
        return self.match

    def heat(
        self,
        pixels: np.ndarray, # (4, 4) of pixel (row, column, 0) of a plane of the second scan -> RAS+ [mm]
        shape: tuple[int, int], # (row, column)
    ) -> np.ndarray: # (row, column) scores, -1 outside
        "Map of scores on a plane"
        from scipy.ndimage import map_coordinates
        rc = np.indices(shape).reshape(2, -1)
        at = to_index(self._heat.affine, to_world(pixels, np.stack([*rc, np.zeros(rc.shape[1])], 1))).T
        return map_coordinates(self._heat.data, at, order=1, mode="constant", cval=-1.0).reshape(shape)

    def plane(
        self,
        side: int, # 0: the first scan, 1: the second
        axis: str = "axial", # or 'coronal', 'sagittal'
    ) -> tuple[np.ndarray, np.ndarray]: # (row, column, 3) uint8, (4, 4) of pixel (row, column, 0) -> RAS+ [mm]
        "Picture of one plane through the point or its match"
        at = (self.match.points if side == 0 else self.match.matched)[0]
        grey, to_mm = plane_of(self.planes[side], at, axis)
        heat = self.heat(to_mm, grey.shape) if side else None
        top = float(max(self.match.score[0], self._heat.data.max()))
        cross = to_index(to_mm, at)[:2]
        return painted(grey, self.limits[side], heat, top, tuple(cross), self.strength), to_mm

    def text(self) -> str: # one line
        "What is known about the match"
        m = self.match
        where = ", ".join(f"{v:.1f}" for v in m.matched[0])
        return (f"match ({where}) mm, score {m.score[0]:.3f}, next peak {m.second[0]:.3f}, way back "
                f"{m.cycle_mm[0]:.1f} mm: {m.status[0]}")

    def figure(self) -> Any: # matplotlib figure
        "All six planes"
        from matplotlib.figure import Figure
        fig = Figure(figsize=(7, 4.6), layout="constrained")
        for side, axes in enumerate(fig.subplots(2, 3)):
            for ax, axis in zip(axes, AXES):
                ax.imshow(self.plane(side, axis)[0])
                ax.set(xticks=[], yticks=[], title=f"{('point', 'match')[side]}, {axis}")
                ax.title.set_size(8)
        fig.suptitle(self.text(), size=8)
        return fig

    def save(
        self,
        path: str | os.PathLike, # .png file
        on_exists: OnExists = "error", # what to do when `path` is there already
    ) -> Path: # `path`
        "Write the six planes as a picture"
        return save_figure(self.figure(), path, on_exists)

# %%
def back(p): return (p - [18, -10, 12])/[1.05, 0.95, 1.0]
def there(p): return p*[1.05, 0.95, 1.0] + [18, -10, 12]
matrix = np.diag([1.05, 0.95, 1.0, 1.0])
matrix[:3, 3] = [18, -10, 12]
mirrored = np.diag([-1.0, 1, 1, 1])
mirrored[0, 3] = scan.shape[0] - 1
other = Volume(scan.data[::-1], matrix @ scan.affine @ mirrored)
view = LinkedView(scan, other, Matcher(position_embedding(scan), position_embedding(other, back)), voxel_mm=4.0)
view.figure()

# %%
start = time.perf_counter()
one = view.point(middle + [30, 10, -20])
view.plane(1, "axial")
spent = time.perf_counter() - start
assert np.abs(one.matched[0] - there(middle + [30, 10, -20])).max() < 1.5 and one.status[0] == "ok"
view.text()

# %% [markdown]
# ## The widget
# Three sliders move the cross; with the `view` extra a click into a plane of the first scan does the same, and the
# wheel goes through its planes. `view` of the panel is the `LinkedView`; `event` is what a click calls, so the widget
# can be driven from code.

# %%
#| export
def linked(
    first: Volume, # scan that is clicked
    second: Volume, # scan that is searched
    matcher: Matcher, # of their embeddings, in this order
    *,
    voxel_mm: float = 2.0, # for the screen [mm]
    height: int = 260, # longer side of a picture on the screen [pixel]
) -> Panel: # controls axial, coronal, sagittal, similarity; pictures (side, axis); `view` is the `LinkedView`
    "Linked viewers: point in the first scan, see the match in the second"
    import ipywidgets as w
    view = LinkedView(first, second, matcher, voxel_mm=voxel_mm)
    planes = view.planes[0]
    def place() -> dict[str, int]: # of the point, for each slider
        at = np.rint(to_index(planes.vol.affine, view.match.points[0])).astype(int)
        return {a: int(np.clip(at[planes.screen(a).across], 0, planes.count(a) - 1)) for a in AXES}
    controls = {a: w.IntSlider(k, 0, planes.count(a) - 1, description=a, continuous_update=False)
                for a, k in place().items()}
    controls["similarity"] = w.FloatSlider(0.7, min=0, max=1, step=0.1, description="similarity")
    longest = max(v for p in view.planes for a in AXES for v in p.extent(a))

    def draw(panel: Panel) -> None:
        view.strength = panel.similarity.value
        if {a: panel.controls[a].value for a in AXES} != place():
            index = np.zeros(3)
            for a in AXES: index[planes.screen(a).across] = panel.controls[a].value
            view.point(to_world(planes.vol.affine, index))
        for side, axis in panel.pictures: panel.show((side, axis), view.plane(side, axis)[0],
                                                     view.planes[side].extent(axis), longest)
        panel.tell(view.text())

    def happened(panel: Panel, name: Any, event: tuple) -> None:
        (side, axis), (kind, a, b) = name, event
        if side: return # only the first scan is pointed at
        if kind == "turn": return panel.set(axis, panel.controls[axis].value + int(a))
        grey, to_mm = plane_of(planes, view.match.points[0], axis)
        view.point(to_world(to_mm, [*pixel_at(grey.shape, a, b), 0]))
        for n, k in place().items(): panel.set(n, k)
        panel.redraw()

    rows = [[(side, axis) for axis in AXES] for side in (0, 1)]
    return Panel(controls, rows, draw, happened, size=height, view=view)

# %%
box = linked(scan, other, view.matcher, voxel_mm=4.0)
before = box.pictures[1, "axial"].value
box.event((0, "axial"), "click", 0.6, 0.4)
box

# %%
clicked = box.view.match.points[0]
assert box.pictures[1, "axial"].value != before
assert np.abs(box.view.match.matched[0] - there(clicked)).max() < 1.5
box.sagittal.value = 8
assert abs(to_index(box.view.vols[0].affine, box.view.match.points[0])[0] - 8) < 1e-6

# %% [markdown]
# A click is given as the browser reports it, as shares of the picture's height and width; the right of the patient is
# on the left.

# %%
box.event((0, "coronal"), "click", 0.5, 0.25)
moved = to_index(box.view.vols[0].affine, box.view.match.points[0])
assert abs(moved[0] - 0.75*box.view.vols[0].shape[0]) < 1.5 and abs(moved[2] - box.view.vols[0].shape[2]/2) < 1.5
box.view.text()
