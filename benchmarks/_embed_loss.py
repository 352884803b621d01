"Embedding: the fine loss of a training crop against its literal form, and the throughput of the network"
import torch
import torch.nn.functional as F

from benchmarks.common import Row, compare, interleaved, median, threads
from benchmarks.reference import embed_loss as reference
from medvol_nb.blocks import conv_flops
from medvol_nb.checkpoints import torch_rng_for
from medvol_nb.embed.loss import LossConfig, Maps, fine_infonce
from medvol_nb.embed.model import build_model, map_shape


def pair(shape: tuple[int, int, int] = (32, 96, 96), emb: int = 128) -> tuple[Maps, Maps]:
    "Random vectors of two overlapping views"
    out = []
    for k, (scale, place) in enumerate(((1.9, (0.0, 0.0, 0.0)), (2.1, (12.0, -9.0, 5.0)))):
        rng = torch_rng_for(0, "benchmark", k)
        maps = [F.normalize(torch.randn(emb, *map_shape(shape, h), generator=rng), dim=0) for h in ("fine", "coarse")]
        out.append(Maps(*[m.requires_grad_() for m in maps], scale*torch.eye(3, dtype=torch.float64).flip(0),
                        torch.tensor(place, dtype=torch.float64)))
    return tuple(out)


def fine_loss(full: bool = False) -> list[Row]:
    "Forward and backward of one pair of 32x96x96, all published numbers, one thread"
    views, cfg = pair(), LossConfig()

    def run(loss) -> None:
        for v in views: v.fine.grad = None
        loss().backward()

    with threads():
        return [compare("embedding.fine_loss", "forward and backward, pair of 32x96x96, 128 channels",
                        lambda: run(lambda: fine_infonce(views, cfg, rng=torch_rng_for(0))),
                        lambda: run(lambda: reference.fine_infonce(views, cfg, torch_rng_for(0))), unit="s",
                        runs=3 if full else 1, bar=30, cpu=True, note="processor time; reference: tables of distances")]


def throughput(full: bool = False) -> list[Row]:
    "Whole forward of the full network; the reference is the speed asked for, 0.13 Mvoxel/s; floor: matrix products"
    shape = (48, 128, 128) if full else (32, 96, 96)
    voxels, net = shape[0]*shape[1]*shape[2]/1e6, build_model().eval()
    work = conv_flops(net, (1, 1, *shape))
    a, b = torch.randn(512, 512), torch.randn(512, 4096)
    x = torch.randn(1, 1, *shape)

    @torch.no_grad()
    def forward() -> None: net(x)

    with threads():
        t = interleaved({"ours": forward, "floor": lambda: a @ b}, 3)
        ours, low = median(t["ours"], 1)/voxels, median(t["floor"], 1)*work/(512*512*4096)/voxels
        row = Row("embedding.throughput", f"full network, {'x'.join(map(str, shape))}", ours, 1/0.13, "s/Mvoxel",
                  1/0.13/ours, low, low/ours, 1.0, "processor time", ours, 1/0.13, 3)
        return [row]


ROWS = {"fine_loss": fine_loss, "throughput": throughput}
