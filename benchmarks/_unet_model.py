"The network: a training step beside nnU-Net's, one decoder or two, and the share of what matrix products could do"
import sys
from importlib import import_module

import numpy as np

from benchmarks.common import Row, compare, threads

WIDTHS = (32, 64, 128, 256)
SHAPE = (1, 1, 64, 64, 64)


def targets(**channels):
    from medvol_nb.zarrnet.config import Target, TrainParams
    return {n: Target(channels=c, kind="regression").resolved(n, TrainParams()) for n, c in channels.items()}


def image():
    import torch
    return torch.from_numpy(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))


def stepper(model, x):
    "One step of training: forward, a cheap loss, backward, AdamW"
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    def step():
        out = model(x)
        optimizer.zero_grad()
        sum(y.square().mean() for y in (out.values() if isinstance(out, dict) else [out])).backward()
        optimizer.step()
    return step


def forward(model, x):
    import torch
    model.eval()
    def run():
        with torch.no_grad(): model(x)
    return run


def products(flop: float):
    "Single-precision matrix products of about as many operations; scaled to be equal to them"
    import torch
    n = 2048
    a, b, times = torch.ones(n, n), torch.ones(n, n), max(1, round(flop/(2*n**3)))
    def run():
        for _ in range(times): torch.mm(a, b)
    return run


def peer():
    "nnU-Net's residual encoder U-Net with the same hyper-parameters; None if it is not installed"
    from torch import nn
    try: ResidualEncoderUNet = import_module("dynamic_network_architectures.architectures.unet").ResidualEncoderUNet
    except ImportError:
        print("unet.step_peer: pip install --no-deps dynamic-network-architectures", file=sys.stderr)
        return None
    return ResidualEncoderUNet(
        1, 4, WIDTHS, nn.Conv3d, 3, (1, 2, 2, 2), (1, 3, 4, 6), 4, 1, conv_bias=False, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=False)


def step_peer(full: bool = False) -> list[Row]:
    from medvol_nb.blocks import conv_flops, count_parameters
    from medvol_nb.zarrnet.config import NetworkConfig
    from medvol_nb.zarrnet.model import build_model
    ours, theirs, x = build_model(NetworkConfig(f_maps=WIDTHS), targets(all=4)), peer(), image()
    if theirs is None: return []
    sizes = [f"{count_parameters(m)/1e6:.2f} M parameters, {2*conv_flops(m, SHAPE)/1e9:.0f} GFLOP"
             for m in (ours, peer())] # another copy: nnU-Net's holds its encoder twice, counting leaves it unusable
    with threads():
        return [compare("unet.step_peer", f"training step of resenc, 1 target of 4 channels, 64^3 ({sizes[0]}), beside "
                        f"nnU-Net's ResidualEncoderUNet ({sizes[1]})", stepper(ours, x), stepper(theirs, x), unit="s",
                        runs=7 if full else 3, bar=1/1.1, cpu=True),
                compare("unet.step_peer_forward", "forward pass of the same two", forward(ours, x), forward(theirs, x),
                        products(2*conv_flops(ours, SHAPE)), unit="s", runs=7 if full else 3, cpu=True)]


def shared_decoder(full: bool = False) -> list[Row]:
    from medvol_nb.blocks import conv_flops
    from medvol_nb.zarrnet.config import NetworkConfig
    from medvol_nb.zarrnet.model import build_model
    nets = {d: build_model(NetworkConfig(f_maps=WIDTHS, blocks_per_level=1, se="cse", decoder=d),
                           targets(sheet=1, normals=3)) for d in ("shared", "separate")}
    gflop, x = {d: 2*conv_flops(m, SHAPE)/1e9 for d, m in nets.items()}, image()
    runs, what = (7 if full else 3), f"{gflop['shared']:.0f} against {gflop['separate']:.0f} GFLOP, 2 targets, 64^3"
    with threads():
        rows = [compare("unet.shared_decoder", f"forward pass with one decoder instead of two ({what})",
                        *(forward(m, x) for m in nets.values()), products(gflop["shared"]*1e9), unit="s", runs=runs,
                        bar=1/0.75, cpu=True, note="floor: matrix products of as many operations")]
        for m in nets.values(): m.train()
        rows.append(compare("unet.shared_decoder_step", f"training step with one decoder instead of two ({what})",
                            *(stepper(m, x) for m in nets.values()), unit="s", runs=runs, bar=1/0.9, cpu=True))
    rows[0].note += f"; {gflop['shared']/rows[0].ours:.0f} GFLOP/s"
    return rows


ROWS = {"step_peer": step_peer, "shared_decoder": shared_decoder}
