# %% [markdown]
# # Coarse vectors on the fine grid
#
# > Similarities of two maps of different size are added without ever enlarging the vectors.
#
# A coarse vector stands for 8 x 32 x 32 mm, a fine one for 4 mm cubes. To add their similarities, the coarse vectors
# $C$ of a scan are interpolated at each fine voxel $x$ and brought back to length 1. Literally, that makes a fine map
# of 128 channels from a few hundred numbers a channel, only to multiply it with a query $q$. But interpolation is
# linear, so
# $$\frac{\langle q, \sum_c w_c(x)\,C_c\rangle}{\nu(x)} = \frac{\sum_c w_c(x)\,\langle q, C_c\rangle}{\nu(x)},
# \qquad \nu(x) = \Big\|\sum_c w_c(x)\,C_c\Big\|:$$
# the products come first, on the coarse grid, and one number a voxel is interpolated instead of 128. The losses of
# [page 32](32_embed_loss.ipynb) and the search of [page 34a](34a_embed_search.ipynb) both work like this.

# %%
#| default_exp embed.coarse

# %%
#| export
import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from medvol_nb.embed.model import STRIDES

# %%
from medvol_nb import plot
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.core import close

# %% [markdown]
# ## Interpolation as matrices
# Along one axis interpolation is a matrix with two numbers a row, and along three axes it is one after the other.

# %%
#| export
COARSE_RATIOS = tuple(f/c for f, c in zip(STRIDES["fine"], STRIDES["coarse"])) # (z, y, x)

def interpolation_matrix(
    n_to: int, # samples wanted along the axis
    n_from: int, # samples there are, beginning at the same face
    ratio: float | None = None, # samples there are for each one wanted; None: n_from/n_to, both end at the same face
) -> np.ndarray: # (n_to, n_from) float32, two numbers a row, each row sums to 1
    "Linear interpolation along one axis between grids whose first faces agree (align_corners=False)"
    at = np.clip((np.arange(n_to) + 0.5)*(ratio or n_from/n_to) - 0.5, 0, n_from - 1)
    low = np.minimum(at.astype(int), max(n_from - 2, 0))
    out = np.zeros((n_to, n_from), np.float32)
    out[np.arange(n_to), low] = 1 - (at - low)
    out[np.arange(n_to), np.minimum(low + 1, n_from - 1)] += at - low
    return out

def interpolation_axes(
    coarse: torch.Tensor, # (c, z', y', x') map, whose device and type the matrices get
    shape: Sequence[int], # (z, y, x) of the fine grid
    ratios: Sequence[float | None] = COARSE_RATIOS, # coarse voxels for each fine one; None: stretch to fit
) -> tuple[torch.Tensor, ...]: # three matrices, coarse to fine: (z, z'), (y, y'), (x, x')
    "Interpolation from a coarse map to a fine grid"
    return tuple(torch.from_numpy(interpolation_matrix(n, m, r)).to(coarse)
                 for n, m, r in zip(shape, coarse.shape[1:], ratios))

def interpolated(
    table: torch.Tensor, # (r, z', y', x') float32
    axes: Sequence[torch.Tensor], # (z, z'), (y, y') and (x, x'), from `interpolation_axes`
) -> torch.Tensor: # (r, z, y, x)
    "One axis after the other, x first"
    (r, nz, ny, nx), (z, y, x) = table.shape, map(len, axes)
    out = (table.reshape(-1, nx) @ axes[2].T).reshape(r*nz, ny, x)
    out = torch.bmm(axes[1].expand(r*nz, -1, -1), out).reshape(r, nz, y*x)
    return torch.bmm(axes[0].expand(r, -1, -1), out).reshape(r, z, y, x)

# %%
rng = torch_rng_for(0, "coarse")
coarse = F.normalize(torch.randn(16, 3, 4, 2, generator=rng), dim=0)
literal = F.interpolate(coarse[None], size=(9, 21, 13), mode="trilinear")[0]
assert close(interpolated(coarse, interpolation_axes(coarse, (9, 21, 13), (None,)*3)), literal, 1e-5)

# %% [markdown]
# ## The length of interpolated vectors
# $\nu$ does not depend on the query, so it is computed once for a scan. Not by interpolating 128 channels: $\nu^2 =
# \sum_{c,c'} w_c w_{c'} \langle C_c, C_{c'}\rangle$, and only neighbours have weights that meet, so 14 products of
# the coarse map with its shifted self are all that has to be interpolated.

# %%
#| export
def norm_map(
    coarse: torch.Tensor, # (c, z', y', x') float32 vectors of length 1
    shape: Sequence[int], # (z, y, x) of the fine grid
    ratios: Sequence[float | None] = COARSE_RATIOS, # coarse voxels for each fine one; None: stretch to fit
) -> torch.Tensor: # (z, y, x) float32
    "Length of the coarse vectors after interpolation to the fine grid"
    axes, total = interpolation_axes(coarse, shape, ratios), coarse.new_zeros(tuple(shape))
    for shift in itertools.product((-1, 0, 1), repeat=3):
        if shift < (0, 0, 0) or any(abs(s) >= n for s, n in zip(shift, coarse.shape[1:])): continue
        near = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, coarse.shape[1:]))
        far = tuple(slice(max(0, s), n + min(0, s)) for s, n in zip(shift, coarse.shape[1:]))
        gram = (coarse[(slice(None), *near)]*coarse[(slice(None), *far)]).sum(0, keepdim=True)
        part = interpolated(gram, [w[:, a]*w[:, b] for w, a, b in zip(axes, near, far)])[0]
        total.add_(part, alpha=1 if shift == (0, 0, 0) else 2)
    return total.clamp_(min=0).sqrt_()

# %%
stretched = norm_map(coarse, (9, 21, 13), (None,)*3)
exact = F.interpolate(coarse[None], size=(6, 32, 16), mode="trilinear")[0].norm(dim=0)
assert close(stretched, literal.norm(dim=0), 1e-5)
assert close(norm_map(coarse, (5, 31, 13)), exact[:5, :31, :13], 1e-5)
plot.montage([literal.norm(dim=0)[4], stretched[4]], titles=["all channels interpolated", "from 14 products"], width=4)

# %% [markdown]
# ## Similarity of some voxels with all
# The vectors of a few fine voxels are mixed from the coarse ones; their similarity with all voxels of a scan, their own
# or another one, follows the formula above.

# %%
#| export
def coarse_vectors(
    coarse: torch.Tensor, # (c, z', y', x') float32 vectors of length 1
    shape: Sequence[int], # (z, y, x) of the fine grid, which the coarse one is stretched to
    at: torch.Tensor, # (r,) integer, voxels of the flattened fine grid
) -> torch.Tensor: # (r, c) of length 1
    "Coarse vectors at some fine voxels"
    axes, at = interpolation_axes(coarse, shape, (None,)*3), torch.unravel_index(at, tuple(shape))
    z, y, x = (w[k] for w, k in zip(axes, at))
    weights = z[:, :, None, None]*y[:, None, :, None]*x[:, None, None] # (r, z', y', x')
    return F.normalize(weights.flatten(1) @ coarse.flatten(1).T, dim=1)

def coarse_similarity(
    vectors: torch.Tensor, # (r, c) of length 1
    coarse: torch.Tensor, # (c, z', y', x') float32 vectors of length 1
    shape: Sequence[int], # (z, y, x) of the fine grid, which the coarse one is stretched to
) -> torch.Tensor: # (r, z*y*x)
    "Similarity of vectors with the coarse vectors at each fine voxel"
    products = (vectors @ coarse.flatten(1)).reshape(-1, *coarse.shape[1:])
    axes, norm = interpolation_axes(coarse, shape, (None,)*3), norm_map(coarse, shape, (None,)*3)
    return interpolated(products, axes).flatten(1).div_(norm.flatten().clamp(min=1e-6))

# %%
unit = F.normalize(literal, dim=0).flatten(1) # (c, n)
at = torch.tensor([0, 700, 1500, 2456])
own = coarse_vectors(coarse, (9, 21, 13), at)
similar = coarse_similarity(own, coarse, (9, 21, 13))
assert close(own, unit[:, at].T, 1e-5) and close(similar, unit[:, at].T @ unit, 1e-5)
