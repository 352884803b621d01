"Literal coupled convex optimisation with Adam, at the defaults published for convexAdam: slow, for comparison"
import numpy as np
import torch
import torch.nn.functional as F

from medvol_nb.embed.transforms import Field
from medvol_nb.geometry import Volume

OFFSETS = torch.tensor([(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)])
PAIRS = [(i, j) for i in range(6) for j in range(i + 1, 6) if i//2 != j//2]


def box(x: torch.Tensor, radius: int) -> torch.Tensor:
    return F.avg_pool3d(F.pad(x, (radius,)*6, mode="replicate"), 2*radius + 1, stride=1)


def shifted(x: torch.Tensor, d: torch.Tensor, step: int) -> torch.Tensor:
    padded, at = F.pad(x, (step,)*6, mode="replicate"), (step*(1 + d)).tolist()
    return padded[:, :, at[0]:at[0] + x.shape[2], at[1]:at[1] + x.shape[3], at[2]:at[2] + x.shape[4]]


def ssc(img: torch.Tensor, radius: int = 1, step: int = 2) -> torch.Tensor:
    "Real-valued self-similarity context, (1, 12, x, y, z)"
    parts = [box((shifted(img, OFFSETS[i], step) - shifted(img, OFFSETS[j], step))**2, radius) for i, j in PAIRS]
    x = torch.cat(parts, 1)
    x = x - x.min(1, keepdim=True).values
    mean = x.mean(1, keepdim=True)
    return torch.exp(-x/mean.clamp(mean.mean()*1e-3, mean.mean()*1e3))


def identity(shape) -> torch.Tensor: return F.affine_grid(torch.eye(3, 4)[None], (1, 1, *shape), align_corners=False)


def search(fixed: torch.Tensor, moving: torch.Tensor, grid: int, radius: int) -> torch.Tensor:
    "Coupled convex search on features pooled to the grid: displacement in coarse voxels, (3, x, y, z)"
    a, b = (F.avg_pool3d(f, grid, stride=grid) for f in (fixed, moving))
    shape, w = a.shape[2:], 2*radius + 1
    padded, cost = F.pad(b, (radius,)*6, mode="replicate"), torch.empty(w**3, *shape)
    labels = torch.stack(torch.meshgrid(*[torch.arange(-radius, radius + 1.0)]*3, indexing="ij")).reshape(3, -1)
    for n, (x, y, z) in enumerate((labels.T + radius).long().tolist()):
        cost[n] = ((a - padded[:, :, x:x + shape[0], y:y + shape[1], z:z + shape[2]])**2).sum(1)[0]
    cost = box(cost[None], 1)[0]
    u = labels[:, cost.argmin(0)]
    for alpha in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        smooth = box(box(u[None], 1), 1)[0]
        best = torch.full(shape, torch.inf)
        for n in range(w**3):
            total = cost[n] + alpha*((labels[:, n, None, None, None] - smooth)**2).sum(0)
            better = total < best
            best = torch.where(better, total, best)
            u = torch.where(better, labels[:, n, None, None, None], u)
    return box(box(u[None], 1), 1)[0]


def sampled(field: torch.Tensor, at: torch.Tensor, shape) -> torch.Tensor:
    "A (3, x, y, z) field at identity + displacement [voxel of its own grid]"
    move = (at*2/torch.tensor(shape).reshape(3, 1, 1, 1)).flip(0).permute(1, 2, 3, 0)[None]
    return F.grid_sample(field[None], identity(shape) + move, padding_mode="border", align_corners=False)[0]


def coupled_convex_adam(fixed: Volume, moving: Volume, grid: int = 6, radius: int = 4, rounds: int = 15,
                        steps: int = 80, smoothness: float = 1.25, every: int = 2) -> Field:
    "Displacement of two volumes on one grid"
    a, b = (ssc(torch.from_numpy(np.ascontiguousarray(v.data, np.float32))[None, None]) for v in (fixed, moving))
    u, v = search(a, b, grid, radius), search(b, a, grid, radius)
    for _ in range(rounds): u, v = (u - sampled(v, u, u.shape[1:]))/2, (v - sampled(u, v, v.shape[1:]))/2
    shape = fixed.shape
    u = F.interpolate(u[None]*grid, size=shape, mode="trilinear", align_corners=False)
    coarse = [n//every for n in shape]
    fa, fb = (F.avg_pool3d(f, every, stride=every) for f in (a, b))
    x = (F.interpolate(u, size=coarse, mode="trilinear", align_corners=False)[0]/every).requires_grad_()
    adam = torch.optim.Adam([x], lr=1)
    scale = torch.tensor(coarse).reshape(3, 1, 1, 1)
    for _ in range(steps):
        smooth = box(box(box(x[None], 1), 1), 1)[0]
        move = (smooth*2/scale).flip(0).permute(1, 2, 3, 0)[None]
        seen = F.grid_sample(fb, identity(coarse) + move, padding_mode="border", align_corners=False)
        loss = ((seen - fa)**2).mean(1).mean()*12 + smoothness*sum((smooth.diff(dim=d)**2).mean() for d in (1, 2, 3))
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        x = box(box(box(x[None], 1), 1), 1)*every
        d = F.interpolate(x, size=shape, mode="trilinear", align_corners=False)[0].numpy()
    return Field(np.einsum("ij,jxyz->ixyz", fixed.affine[:3, :3].astype(np.float32), d), fixed.affine)
