# %% [markdown]
# # Moving images that carry vectors
#
# > Cube symmetries, affine and elastic maps that keep image, labels, masks and surface normals one scene.
#
# Turn a picture by 90°, and the numbers in it stay what they are. Turn a map of surface normals, and every number
# changes: where the surface faced right it now faces up, so the vectors must turn with the grid. A network trained on
# vectors that did not turn learns an average of contradictions, and no loss curve says so. The same holds for flips
# (one component changes its sign), for scaling (normals tilt *against* the stretch) and for elastic maps (every voxel
# has its own little matrix).
#
# One law covers all cases. Let $u = \varphi(v)$ say from where, $u$, output voxel $v$ takes its content. A normal is
# the gradient of some function $f$ whose level set is the surface, the moved function is $f\circ\varphi$, and its
# gradient is $J_\varphi^T\,(\nabla f)(\varphi(v))$. So $n' \propto J_\varphi^T\, n(\varphi(v))$, brought back to length
# one. The law is also its own test, and this page runs it for every map: moving a gradient field must give the gradient
# of the moved function. Vectors that come from the winding of a mesh (pseudo-vectors) would need a further sign under
# mirrors; stored normals are taken as gradients.
#
# Arrays are `(c, z, y, x)`. Vector channels are `(x, y, z)`: channel 0 is the x component, as the data are written.

# %%
#| default_exp zarrnet.geometry

# %%
#| export
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np

from medvol_nb.core import ConfigError, DataError

# %%
from medvol_nb import phantoms, plot
from medvol_nb.core import close, raises, rng_for

# %% [markdown]
# ## Normals on disk
# Unit vectors are stored as integers to save room: `uint16` holds $(n+1)\cdot 32767.5$, `uint8` holds $(n+1)\cdot
# 127.5$, `int16` holds $32767\,n$. Background is zero in all channels, in the file and after decoding. That needs a
# rule of its own, since zero would decode to $(-1,-1,-1)$, a vector of length $\sqrt3$ that no "is there a normal?"
# mask catches. Writing rounds; truncation would cost another half step.

# %%
#| export
_STEPS = {"uint8": (127.5, -1.0), "uint16": (32767.5, -1.0), "int16": (32767.0, 0.0)} # q = (n - shift)*scale

def unit_vectors(
    vectors: np.ndarray, # (3, ...) float, NaN where nothing is known
    least: float = 1e-6, # shorter ones become zero
) -> np.ndarray: # (3, ...) float32 of length one or zero
    "Bring vectors to length one; those without a direction become zero"
    vectors = np.asarray(vectors, np.float32)
    length = np.sqrt(np.einsum("i...,i...->...", vectors, vectors))
    with np.errstate(invalid="ignore"): known = length >= least
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=known)

def decode_normals(
    raw: np.ndarray, # (3, ...) as stored: uint8, uint16, int16 or float
) -> np.ndarray: # (3, ...) float32 unit vectors, zero where all channels are zero
    "Unit vectors from stored numbers"
    if raw.ndim < 1 or raw.shape[0] != 3: raise DataError(f"normals: need 3 channels in front, got shape {raw.shape}")
    if raw.dtype.kind == "f": return unit_vectors(np.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0))
    if raw.dtype.name not in _STEPS:
        raise DataError(f"normals: stored as {raw.dtype}, can read float and {', '.join(_STEPS)}")
    scale, shift = _STEPS[raw.dtype.name]
    return unit_vectors((raw/np.float32(scale) + np.float32(shift))*raw.any(0))

def encode_normals(
    normals: np.ndarray, # (3, ...) unit vectors or zero
    dtype: Any = "uint16", # uint8, uint16, int16 or a float type
) -> np.ndarray: # (3, ...) of that type, rounded; zero vectors are zero in all channels
    "Numbers to store for unit vectors"
    dtype = np.dtype(dtype)
    if dtype.kind == "f": return np.asarray(normals, dtype)
    if dtype.name not in _STEPS: raise ConfigError(f"normals: cannot be stored as {dtype}, only float, {list(_STEPS)}")
    scale, shift = _STEPS[dtype.name]
    out = np.rint((np.clip(normals, -1, 1) - shift)*scale).astype(dtype)
    out[:, ~(np.asarray(normals) != 0).any(0)] = 0
    return out

# %% [markdown]
# The error of a direction is measured as an angle. Sheets whose two faces look alike have normals without a sign; their
# angle is *axial*, at most 90°.

# %%
#| export
def angle_between(
    a: np.ndarray, # (3, ...) vectors
    b: np.ndarray, # (3, ...) vectors
    axial: bool = False, # True: opposite vectors are equal
) -> np.ndarray: # (...) [degree], NaN where a vector is zero
    "Angle of vectors, voxel by voxel"
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    dot, cross = (a*b).sum(0), np.cross(a, b, axis=0)
    out = np.degrees(np.arctan2(np.sqrt((cross**2).sum(0)), np.abs(dot) if axial else dot))
    return np.where((a != 0).any(0) & (b != 0).any(0), out, np.nan)

# %%
roll = phantoms.sheets((24, 64, 64))
normals, on = roll.normals[::-1].copy(), roll.mask > 0 # the phantom's components are (z, y, x)
{t: float(np.nanmax(angle_between(decode_normals(encode_normals(normals, t)), normals)).round(4))
 for t in ("float32", "uint16", "int16", "uint8")}

# %% [markdown]
# Degrees lost by storage. Background survives, and a known vector comes back:

# %%
for t, limit in (("float32", 1e-3), ("uint16", 0.002), ("int16", 0.002), ("uint8", 0.4)):
    back = decode_normals(encode_normals(normals, t))
    assert np.nanmax(angle_between(back, normals)) <= limit and np.array_equal((back != 0).any(0), on)
assert close(decode_normals(np.array([[52428], [6554], [32768]], np.uint16))[:, 0], (0.6, -0.8, 0), 1e-4)

# %%
with raises(DataError, match="need 3 channels in front, got shape \\(24, 64, 64\\)"): decode_normals(roll.mask)
with raises(ConfigError, match="cannot be stored as int32"): encode_normals(normals, "int32")

# %% [markdown]
# ## What a sample is
# A dictionary with the `"image"` and one array a target, all `(c, z, y, x)`, and for a target `t` the mask `"t__mask"`
# that says which voxels its loss may look at. What happens to a target under a map depends on its *kind* alone, never
# on its name: `normals` are vectors, everything else (`binary`, `multiclass`, `regression`) is a label that must not be
# mixed with its neighbour. An array that is neither is refused, because it would stay behind while the rest moves.

# %%
#| export
KINDS = ("binary", "multiclass", "regression", "normals")

def check_sample(
    sample: Mapping[str, Any], # "image", targets, "<target>__mask", and whatever is no array
    kinds: Mapping[str, str], # target -> kind
) -> tuple[int, int, int]: # (z, y, x) size of the patch [voxel]
    "Refuse a sample that a map would tear apart"
    if "image" not in sample: raise DataError(f"sample: has no 'image', only {sorted(sample)}")
    shape = tuple(sample["image"].shape[1:])
    known = {"image"} | {k for t in kinds for k in (t, f"{t}__mask")}
    for t, kind in kinds.items():
        if kind not in KINDS: raise ConfigError(f"target {t!r}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for key, value in sample.items():
        if not isinstance(value, np.ndarray): continue
        if key not in known: raise DataError(f"sample: array {key!r} is no target; targets are {sorted(kinds)}")
        if value.ndim != 4 or value.shape[1:] != shape:
            raise DataError(f"sample: {key!r} has shape {value.shape}, the image {sample['image'].shape}; need (c, "
                            "z, y, x) of one size")
        if kinds.get(key) == "normals" and value.shape[0] != 3:
            raise DataError(f"sample: normals {key!r} need 3 channels, got {value.shape[0]}")
    return shape

# %%
KIND = {"sheet": "binary", "normals": "normals"}
sample = {"image": roll.img[None].astype(np.float32), "sheet": roll.mask[None].astype(np.float32), "normals": normals,
          "sheet__mask": np.ones((1, *on.shape), np.uint8), "normals__mask": roll.mask[None]}
check_sample(sample, KIND)

# %%
with raises(DataError, match="array 'weights' is no target"): check_sample(sample | {"weights": on[None]}, KIND)
with raises(DataError, match="normals 'sheet' need 3 channels, got 1"):
    check_sample(sample, {**KIND, "sheet": "normals"})

# %% [markdown]
# ## The 48 symmetries of a cube
# Flips, quarter turns and transpositions, in any combination, are the $3!\cdot 2^3 = 48$ ways to put a cube into its
# box. All are: permute the axes, then reverse some. No voxel is interpolated, so they are exact. The matrix $M$ moves
# content, $v = Mu$ about the middle; it is orthogonal, so normals move by the same matrix. `rot90` has the convention
# of `numpy.rot90`: with $k=1$, $v_a=-u_b$ and $v_b=u_a$.

# %%
#| export
@dataclass(frozen=True)
class Symmetry:
    "A way to put a box into a box: permute the axes, then reverse some"
    order: tuple[int, int, int] = (0, 1, 2) # output axis a shows input axis order[a]; axes are 0 z, 1 y, 2 x
    flipped: tuple[bool, bool, bool] = (False, False, False) # output axes that run backwards

    @property
    def matrix(self) -> np.ndarray: # (3, 3) int, rows and columns (z, y, x); det -1 for mirrors
        "Moves content: v = matrix @ u about the middle"
        out = np.zeros((3, 3), np.int64)
        for a in range(3): out[a, self.order[a]] = -1 if self.flipped[a] else 1
        return out

    def then(
        self,
        other: "Symmetry", # applied to the result
    ) -> "Symmetry": # both in one
        "First this one, then the other"
        return Symmetry(tuple(self.order[a] for a in other.order),
                        tuple(f != self.flipped[a] for f, a in zip(other.flipped, other.order)))

    def inverse(self) -> "Symmetry": # undoes it
        "The way back"
        back = tuple(self.order.index(a) for a in range(3))
        return Symmetry(back, tuple(self.flipped[a] for a in back))

    def keeps(
        self,
        shape: Sequence[int], # (z, y, x) [voxel]
    ) -> bool: # True if only axes of equal length change places
        "Whether a box keeps its shape"
        return all(shape[a] == shape[b] for a, b in enumerate(self.order))

def flip(
    *axes: int, # 0 z, 1 y, 2 x
) -> Symmetry: # reverses those axes
    "Mirror"
    return Symmetry(flipped=tuple(a in axes for a in range(3)))

def swap_axes(
    a: int, # 0 z, 1 y, 2 x
    b: int, # another one
) -> Symmetry: # a transposition
    "Exchange two axes"
    order = [0, 1, 2]
    order[a], order[b] = b, a
    return Symmetry(tuple(order))

def rot90(
    k: int, # quarter turns
    axes: tuple[int, int], # plane, as in `numpy.rot90`; (1, 2) is a turn about z
) -> Symmetry: # a rotation
    "Quarter turns in a plane"
    turn, out = swap_axes(*axes).then(flip(axes[0])), Symmetry()
    for _ in range(k % 4): out = out.then(turn)
    return out

def symmetries(
    shape: Sequence[int] | None = None, # (z, y, x) only those that keep this box; None: all 48
) -> list[Symmetry]: # the identity first
    "All ways to put a box into itself"
    every = [Symmetry(o, f) for o, f in product(permutations(range(3)), product((False, True), repeat=3))]
    return [s for s in every if shape is None or s.keeps(shape)]

# %%
{str(shape): len(symmetries(shape)) for shape in ((64, 64, 64), (64, 192, 192), (32, 48, 64))}

# %%
for s in symmetries():
    assert s.then(s.inverse()) == Symmetry() and abs(np.linalg.det(s.matrix)) == 1
    assert all((t.matrix @ s.matrix == s.then(t).matrix).all() for t in symmetries()[::7])

# %% [markdown]
# Applied to an array: spatial axes are the last three. For vectors the components change places and signs as the axes
# do; channel $2-a$ belongs to axis $a$.

# %%
#| export
def turn(
    array: np.ndarray, # (..., z, y, x); vectors (..., 3, z, y, x)
    symmetry: Symmetry, # what to do
    vectors: bool = False, # True: channels are (x, y, z) components of gradients
) -> np.ndarray: # (..., z, y, x) a new contiguous array
    "Turn an array, exactly"
    n = array.ndim - 3
    out = array.transpose(*range(n), *(n + a for a in symmetry.order))
    out = out[(...,) + tuple(slice(None, None, -1 if f else 1) for f in symmetry.flipped)]
    if not vectors: return np.ascontiguousarray(out)
    if n < 1 or array.shape[n - 1] != 3: raise DataError(f"turn: vectors need (..., 3, z, y, x), got {array.shape}")
    out = np.take(out, [2 - symmetry.order[2 - c] for c in range(3)], axis=n - 1)
    for c in range(3):
        if symmetry.flipped[2 - c]: np.negative(out[(...,) + (c,) + (slice(None),)*3], out=out[..., c, :, :, :])
    return out

def turn_sample(
    sample: Mapping[str, Any], # see `check_sample`
    kinds: Mapping[str, str], # target -> kind
    symmetry: Symmetry, # what to do
) -> dict[str, Any]: # a new sample
    "Turn everything in a sample"
    shape = check_sample(sample, kinds)
    if not symmetry.keeps(shape):
        raise DataError(f"symmetry: would exchange axes of different length in a patch of {shape}. Use equal edges, or "
                        "only the symmetries of that box: symmetries(shape)")
    return {k: turn(v, symmetry, kinds.get(k) == "normals") if isinstance(v, np.ndarray) else v
            for k, v in sample.items()}

# %% [markdown]
# The picture: outward normals of a roll as colours (reddish is +x, greenish +y, bluish -x and -y), through a rotation
# about z. Whatever is turned, a sheet that faces right is reddish and one that faces down greenish, as long as the
# vectors turn too. In the last picture they were left behind: the colours stick to the papyrus, and a network would be
# told that the same sheet, seen from the same side, faces elsewhere.

# %%
#| export
def normals_rgb(
    normals: np.ndarray, # (3, ...) unit vectors or zero
) -> np.ndarray: # (..., 3) float32 in [0, 1]; zero is black
    "Normals as colours: red x, green y, blue z, grey in the middle"
    rgb = np.moveaxis((np.asarray(normals, np.float32) + 1)/2, 0, -1)
    return np.clip(rgb, 0, 1)*np.moveaxis((np.asarray(normals) != 0).any(0, keepdims=True), 0, -1)

# %%
quarter = rot90(1, (1, 2))
shown = [turn_sample(sample, KIND, rot90(k, (1, 2)))["normals"] for k in range(3)]
plot.montage([normals_rgb(n[:, 12]) for n in (*shown, turn(normals, quarter))], cols=4,
             titles=["normals", "turned by 90°", "by 180°", "90°, vectors left behind"])

# %% [markdown]
# The law, on a function that is different along each axis. All 48 symmetries agree, but for rounding. And the table
# that one would otherwise write by hand:

# %%
#| export
def gradient(
    f: np.ndarray, # (z, y, x) samples of a function
) -> np.ndarray: # (3, z, y, x) components (x, y, z), central differences inside
    "Gradient with the channel order of normals"
    return np.stack(np.gradient(f, axis=(2, 1, 0)))

# %%
z, y, x = np.meshgrid(*[np.arange(9.0) - 4]*3, indexing="ij")
f = 0.3*x + 0.1*y*y + np.sin(0.4*z + 0.2*x)
for s in symmetries(): np.testing.assert_allclose(turn(gradient(f), s, vectors=True), gradient(turn(f, s)), atol=1e-12)
v = np.array([1.0, 2, 3]).reshape(3, 1, 1, 1)*np.ones((1, 4, 4, 4)) # x, y, z components are 1, 2, 3
{name: turn(v, s, vectors=True)[:, 0, 0, 0].astype(int).tolist() for name, s in {
    "flip x": flip(2), "about z, k=1": rot90(1, (1, 2)), "about y, k=1": rot90(1, (0, 2)),
    "about x, k=3": rot90(3, (0, 1)), "swap x and z": swap_axes(0, 2)}.items()}

# %%
m = np.arange(24).reshape(2, 3, 4)
assert all((turn(m, rot90(k, a)) == np.rot90(m, k, a)).all() for k in range(4) for a in ((0, 1), (0, 2), (1, 2)))
with raises(DataError, match="exchange axes of different length in a patch of \\(24, 64, 64\\)"):
    turn_sample(sample, KIND, swap_axes(0, 2))

# %% [markdown]
# ## Maps that bend
# Everything else is a `Warp`: for each output voxel the place it comes from, and the Jacobian of that. Content is first
# moved by a matrix $A$ about the middle of the patch, then by an elastic displacement $d$, so $\varphi(v) =
# A^{-1}(v + d(v) - c) + c$ and $J = A^{-1}(I + \partial d)$.
#
# The displacement is a cubic B-spline on a coarse lattice of control points; it has an exact derivative. It must not
# fold. If no component of a control point exceeds 0.403 times the distance of the points, it cannot (Choi and Lee,
# *Injectivity conditions of 2D and 3D uniform cubic B-spline functions*, Graphical Models 2000), and more is refused.

# %%
#| export
FOLD_LIMIT = 0.403 # largest displacement in units of the distance of control points

class Warp(NamedTuple):
    "Where every output voxel comes from"
    coords: np.ndarray # (3, z, y, x) source position, components (z, y, x) [voxel]
    jacobian: np.ndarray # (3, 3) or (3, 3, z, y, x): change of source component i along output axis j

def _spline(n: int, knots: float) -> tuple[np.ndarray, np.ndarray]:
    "Matrices (n, control points) that evaluate a cubic B-spline and its derivative at voxels 0...n-1"
    t = np.arange(n)/knots
    i = np.floor(t).astype(int)
    f = t - i
    value = np.stack([(1 - f)**3, 3*f**3 - 6*f**2 + 4, -3*f**3 + 3*f**2 + 3*f + 1, f**3])/6
    slope = np.stack([-(1 - f)**2, 3*f**2 - 4*f, -3*f**2 + 2*f + 1, f**2])/(2*knots)
    out = np.zeros((2, n, i[-1] + 4))
    for k in range(4): out[:, np.arange(n), i + k] = value[k], slope[k]
    return out[0], out[1]

def control_shape(
    shape: Sequence[int], # (z, y, x) of the patch [voxel]
    knots: Sequence[float], # (z, y, x) distance of control points [voxel]
) -> tuple[int, ...]: # (z, y, x) number of control points
    "Control points that a patch needs"
    return tuple(int((n - 1)//h) + 4 for n, h in zip(shape, knots))

def rotation_matrix(
    degrees: Sequence[float], # about the z, y and x axis, one after the other [degree]
) -> np.ndarray: # (3, 3) for (z, y, x) components
    "Rotation; positive about z turns y towards x"
    out = np.eye(3)
    for plane, angle in zip(((1, 2), (0, 2), (0, 1)), np.deg2rad(degrees)):
        step = np.eye(3)
        step[np.ix_(plane, plane)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        out = step @ out
    return out

def make_warp(
    shape: Sequence[int], # (z, y, x) of the patch [voxel]
    matrix: np.ndarray | None = None, # (3, 3) moves content about the middle, components (z, y, x)
    control: np.ndarray | None = None, # (3, *control_shape) displacements, components (z, y, x) [voxel]
    knots: Sequence[float] = (16, 16, 16), # (z, y, x) distance of control points [voxel]
) -> Warp: # source positions and their Jacobian
    "An affine map, an elastic one, or one after the other"
    back = np.eye(3) if matrix is None else np.asarray(matrix, np.float64)
    if back.shape != (3, 3) or not np.isfinite(back).all() or not np.linalg.det(back) > 1e-6:
        raise DataError(f"warp: matrix must be 3 x 3 with a positive determinant, got {back.tolist()}")
    back = np.linalg.inv(back)
    middle = (np.array(shape, np.float64).reshape(3, 1, 1, 1) - 1)/2
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")) - middle
    if control is None: return Warp(np.einsum("ij,jzyx->izyx", back, place) + middle, back)
    size, control = np.array(knots, np.float64), np.asarray(control, np.float64)
    if (size < 2).any(): raise DataError(f"warp: control points must be at least 2 voxels apart, got {tuple(knots)}")
    if control.shape != (3, *control_shape(shape, knots)):
        raise DataError(f"warp: control points need shape {(3, *control_shape(shape, knots))}, got {control.shape}")
    share = float((np.abs(control)/size.reshape(3, 1, 1, 1)).max())
    if not share <= FOLD_LIMIT + 1e-9:
        raise DataError(f"warp: displacement is {share:.3f} of the distance of control points, more than {FOLD_LIMIT} "
                        "may fold. Use smaller displacements or more distant points")
    value, slope = zip(*(_spline(n, h) for n, h in zip(shape, size)))
    def evaluate(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.einsum("za,yb,xc,iabc->izyx", z, y, x, control, optimize=True)
    bent = np.stack([evaluate(*(slope[b] if a == b else value[b] for b in range(3))) for a in range(3)], axis=1)
    bent += np.eye(3).reshape(3, 3, 1, 1, 1)
    return Warp(np.einsum("ij,jzyx->izyx", back, place + evaluate(*value)) + middle,
                np.einsum("ij,jkzyx->ikzyx", back, bent))

# %% [markdown]
# The image is interpolated linearly and mirrored at the border, labels and masks take the nearest voxel, and outside
# the patch there is no label and the mask is 0. Normals are interpolated linearly among the vectors that exist, moved
# by $J^T$ and brought back to length one. Where the nearest voxel has none there is none afterwards: interpolation must
# not make sheets thicker. Opposite vectors that cancel give way to the nearest one.

# %%
#| export
def _nearest(array: np.ndarray, index: np.ndarray, inside: np.ndarray) -> np.ndarray:
    "Gather voxels by flat index; zero where there is none"
    out = array.reshape(len(array), -1)[:, index.ravel()].reshape(len(array), *index.shape)
    out[:, ~inside] = 0
    return out

def _linear(array: np.ndarray, coords: np.ndarray, mode: str) -> np.ndarray:
    from scipy.ndimage import map_coordinates
    return np.stack([map_coordinates(c, coords, np.float32, order=1, mode=mode) for c in array])

def warp_vectors(
    vectors: np.ndarray, # (3, z, y, x) float, components (x, y, z), zero where there is none
    warp: Warp, # from where and with which Jacobian
) -> np.ndarray: # (3, z, y, x) float32 unit vectors or zero
    "Move gradients through a map"
    index, inside = _indices(warp.coords, vectors.shape[1:])
    near = _nearest(vectors.astype(np.float32), index, inside)
    mixed = _linear(vectors, warp.coords, "nearest")
    lost = (mixed**2).sum(0) < 1e-6
    mixed[:, lost] = near[:, lost]
    jacobian = warp.jacobian.astype(np.float32)
    moved = np.einsum("ij...,i...->j...", jacobian.reshape(3, 3, *jacobian.shape[2:] or (1, 1, 1)), mixed[::-1])[::-1]
    return unit_vectors(np.where((near != 0).any(0), moved, np.float32(0)))

def _indices(coords: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    "Flat index of the nearest voxel, and whether it exists"
    near = [np.floor(c + 0.5).astype(np.int64) for c in coords]
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(near, shape)])
    return np.ravel_multi_index([np.clip(i, 0, n - 1) for i, n in zip(near, shape)], shape), inside

def warp_sample(
    sample: Mapping[str, Any], # see `check_sample`
    kinds: Mapping[str, str], # target -> kind
    warp: Warp, # of the patch's size
) -> dict[str, Any]: # a new sample with a mask for every target
    "Move everything in a sample through a map"
    shape = check_sample(sample, kinds)
    if warp.coords.shape[1:] != shape: raise DataError(f"warp: made for {warp.coords.shape[1:]}, the patch is {shape}")
    index, inside = _indices(warp.coords, shape)
    out = dict(sample) | {"image": _linear(sample["image"], warp.coords, "mirror")}
    for t, kind in kinds.items():
        if t not in sample: continue
        mask = sample.get(f"{t}__mask", np.ones((1, *shape), np.uint8))
        out[f"{t}__mask"] = _nearest(mask, index, inside)
        out[t] = warp_vectors(sample[t], warp) if kind == "normals" else _nearest(sample[t], index, inside)
    return out

# %%
shape = on.shape
control = rng_for(0, "demo").uniform(-4, 4, (3, *control_shape(shape, (12, 12, 12))))
maps = {"rotated by 25°": make_warp(shape, rotation_matrix((25, 0, 0))),
        "stretched along x": make_warp(shape, np.diag([1, 1, 1.5])),
        "elastic": make_warp(shape, None, control, (12, 12, 12))}
moved = {"as it was": sample, **{name: warp_sample(sample, KIND, w) for name, w in maps.items()}}
plot.montage([s["image"][0, 12] for s in moved.values()] + [normals_rgb(s["normals"][:, 12]) for s in moved.values()],
             cols=4, titles=[*moved, *[""]*4])

# %% [markdown]
# The law again, on a sphere: directions from a centre. Away from the border the error is that of interpolation, well
# below a degree. Leaving the Jacobian out costs many degrees in the stretched and the elastic case.

# %%
z, y, x = np.meshgrid(*(np.arange(n) - (n - 1)/2 for n in shape), indexing="ij")
far = np.sqrt((z - 6)**2 + (y + 3)**2 + (x - 2)**2)
ball = {"image": far[None].astype(np.float32), "n": unit_vectors(gradient(far))}
inner = np.zeros(shape, bool)
inner[4:-4, 10:-10, 10:-10] = True
errors = {}
for name, w in maps.items():
    truth = gradient(_linear(far[None], w.coords, "mirror")[0])
    _, there = _indices(w.coords, shape)
    keep = inner & there & (_linear(far[None], w.coords, "mirror")[0] > 8)
    plain = Warp(w.coords, np.eye(3))
    errors[name] = [float(angle_between(warp_vectors(ball["n"], v), truth)[keep].mean().round(2)) for v in (w, plain)]
errors

# %%
assert all(good < 1 and bad > 5*good for good, bad in errors.values())
same = warp_sample(sample, KIND, make_warp(shape))
assert all(close(same[k], sample[k], 1e-6) for k in sample)
assert all(np.array_equal((s["normals"] != 0).any(0), s["sheet"][0] > 0) for s in moved.values())
assert moved["rotated by 25°"]["sheet__mask"][0, 12, 0, 0] == 0

# %%
with raises(DataError, match="may fold"): make_warp(shape, None, 2*control, (12, 12, 12))
with raises(DataError, match="positive determinant"): make_warp(shape, np.diag([1, 1, 0]))

# %% [markdown]
# ## Normals from a label map
# Where two regions meet there is a wall, and it has a normal. Seen from a voxel of label $k$, let $s$ be 1 where the
# label is smaller, $-1$ where it is larger and 0 inside; the normal is the gradient of $s$ smoothed over $\sigma$, with
# the staircase of voxels gone. So **normals point from the larger label to the smaller one**: to the outside if ids
# grow inwards (1 fluid, 2 grey, 3 white), and from cells to background 0. In a thin layer both walls agree instead of
# cancelling. Ids of cells among each other have no order, so their sign is arbitrary: train such walls with
# `signed: false`.

# %%
#| export
def boundary_normals(
    lbl: np.ndarray, # (z, y, x) integer labels
    radius: float = 1.0, # a wall reaches this far to both sides of a border, 1: the touching voxels [voxel]
    sigma: float | Sequence[float] = 1.5, # smoothing of the border's shape, scalar or (z, y, x) [voxel]
    ignore: Sequence[int] = (), # labels that make no walls, such as "unknown"
) -> tuple[np.ndarray, np.ndarray]: # wall (z, y, x) uint8; normals (3, z, y, x) float32, (x, y, z), 0 off the wall
    "Walls between regions and their normals, from the larger to the smaller label"
    from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter
    lbl = np.asarray(lbl)
    if lbl.ndim != 3 or lbl.dtype.kind not in "bui":
        raise DataError(f"boundary_normals: need (z, y, x) integers, got {lbl.dtype} of shape {lbl.shape}")
    sigma = np.broadcast_to(np.asarray(sigma, np.float64), 3)
    if not (radius >= 1 and (sigma > 0).all()):
        raise DataError(f"boundary_normals: need radius >= 1 and sigma > 0, got {radius!r} and {sigma.tolist()}")
    ids, dense = np.unique(lbl, return_inverse=True)
    dense, skip = dense.reshape(lbl.shape), np.isin(ids, list(ignore))
    wall, normals = np.zeros(lbl.shape, np.uint8), np.zeros((3, *lbl.shape), np.float32)
    margin = np.ceil(np.maximum(4*sigma, radius)).astype(int) + 1
    for k, box in enumerate(find_objects(dense + 1)):
        if skip[k]: continue
        at = tuple(slice(max(s.start - m, 0), s.stop + m) for s, m in zip(box, margin))
        part, seen = dense[at], ~skip[dense[at]]
        side = np.where(seen, np.sign(k - part), 0).astype(np.float32) # +1 on the smaller labels, -1 on the larger ones
        if not side.any(): continue
        rim = (part == k) & (distance_transform_edt(side == 0) <= radius)
        slope = np.stack([gaussian_filter(side, sigma, order=np.eye(3, dtype=int)[a], mode="nearest", truncate=4)[rim]
                          for a in (2, 1, 0)])
        normals[(slice(None), *at)][:, rim] = unit_vectors(slope, least=1e-5)
        wall[at][rim] = 1
    return wall*(normals != 0).any(0), normals

# %%
brain = phantoms.head((64, 72, 64)).lbl.transpose(2, 1, 0) # as (z, y, x)
wall, n = boundary_normals(brain)
plot.montage([brain[34][::-1], wall[34][::-1], normals_rgb(n[:, 34])[::-1]], width=5,
             titles=["tissues", "walls", "normals as colours"])

# %% [markdown]
# On a ball the truth is known: away from the centre, if the ball has the larger label.

# %%
solid = phantoms.ball(32, 10).astype(np.int32)
z, y, x = np.meshgrid(*[np.arange(32) - 15.5]*3, indexing="ij")
wall, n = boundary_normals(5*solid)
outward = angle_between(n, np.stack([x, y, z]))
float(np.nanmean(outward).round(2)), float(np.nanmax(outward).round(2)), int(wall.sum())

# %%
assert np.nanmean(outward) < 2 and np.array_equal(~np.isnan(outward), wall > 0)
assert close(boundary_normals(1 - solid)[1], -n, 1e-6)
assert not boundary_normals(solid, ignore=[1])[0].any() and boundary_normals(solid, radius=3)[0].sum() > 2*wall.sum()
for s in symmetries()[::5]: assert close(boundary_normals(turn(5*solid, s))[1], turn(n, s, vectors=True), 1e-5)

# %%
with raises(DataError, match="need \\(z, y, x\\) integers, got float64"): boundary_normals(far)
