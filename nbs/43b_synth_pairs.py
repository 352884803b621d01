# %% [markdown]
# # Synthetic pairs
#
# > One sample from its number, and a data set of them without any file.
#
# Sample $i$ is a function of the seed, the bank, the settings and $i$. That is all it takes: samples may be made in any
# order, by any number of processes, on any machine, again if they are lost (next page), or on the fly while a network
# is trained. The reference draws its seeds without a seed, and the pictures of a label map even differ when its seed
# is set by hand.

# %%
#| default_exp synth.pairs

# %%
#| export
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from medvol_nb.config import Config
from medvol_nb.core import DataError
from medvol_nb.synth.labels import EnsembleConfig, draw_plan, render_labels
from medvol_nb.synth.pairfile import Sample
from medvol_nb.synth.templates import TemplateBank
from medvol_nb.synth.views import ViewConfig, draw_view_plan, render_views

# %%
from medvol_nb.config import check_config
from medvol_nb.core import raises
from medvol_nb.plot import montage
from medvol_nb.synth.pairfile import array_digest
from medvol_nb.synth.templates import procedural_bank
from medvol_nb.torchcore import Batches

# %% [markdown]
# ## One sample
# A plan, its label map, two view plans, two pictures. Rendering uses one thread, so that no sum depends on how many
# there are.

# %%
#| export
class SynthConfig(Config):
    "Settings of a synthetic data set"
    ensemble: EnsembleConfig = EnsembleConfig() # label maps
    view: ViewConfig = ViewConfig() # pictures

    @property
    def seg_dtype(self) -> np.dtype: # of the labels of all samples
        c = self.ensemble
        most = max(c.min_templates, c.max_templates - (not c.max_inclusive)) - c.first_hidden + 2
        return np.dtype(np.uint8 if most < 256 else np.uint16)

@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    "Run a block with one thread of torch, so that no sum depends on how many there are"
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(before)

def render_two(
    seg: np.ndarray, # (x, y, z) uint8 or uint16
    seed: int, # of the data set
    index: int, # of the sample
    view: ViewConfig, # settings
    device: str = "cpu", # a GPU draws other noise
) -> tuple[np.ndarray, list[str]]: # (2, x, y, z) uint8, and the digests of both plans
    "The two pictures of a label map"
    plans = [draw_view_plan(seed, index, v, view, int(seg.max()) + 1) for v in (1, 2)]
    lbl = seg if seg.dtype == np.uint8 else seg.astype(np.int32)
    return render_views(np.stack([lbl, lbl]), plans, device=device).cpu().numpy(), [p.digest for p in plans]

def make_pair(
    seed: int, # of the data set
    index: int, # of the sample
    bank: TemplateBank, # shapes
    config: SynthConfig, # settings
    *,
    backend: Literal["auto", "numba", "torch"] = "auto", # of the labels; the result is the same
    device: str = "cpu", # where it is rendered; a GPU draws other noise
) -> Sample: # depends on seed, index, bank and config alone
    "Make one sample"
    plan = draw_plan(seed, index, config.ensemble, len(bank))
    with one_thread():
        on = device if backend == "torch" or device == "cpu" else "cpu"
        seg = render_labels(plan, bank, backend=backend, device=on).astype(config.seg_dtype, copy=False)
        img, digests = render_two(seg, seed, index, config.view, device)
    facts = {"index": index, "kind": plan.kind, "shapes": plan.n_shapes - plan.first_hidden, "plan": plan.digest,
             "view1": digests[0], "view2": digests[1]}
    return Sample(f"{index:06d}", img, seg, facts)

# %%
bank = procedural_bank(12, seed=1, size=(8, 20))
toy = check_config(SynthConfig, {"ensemble": {"shape": 32, "min_templates": 6, "max_templates": 12}})
pairs = [make_pair(0, i, bank, toy) for i in range(3)]
montage([a for p in pairs for a in (*p.img[..., 16], p.seg[..., 16])], titles=["view 1", "view 2", "labels"]*3)

# %%
again = make_pair(0, 2, bank, toy, backend="torch")
assert np.array_equal(again.img, pairs[2].img) and np.array_equal(again.seg, pairs[2].seg)
assert len({array_digest(p.seg) for p in pairs}) == 3 and pairs[0].facts["shapes"] < 12

# %% [markdown]
# ## On the fly
# No files at all: a data set that renders what it is asked for. Every epoch has its own samples. With `draw` (as
# `Batches` calls it) a sample belongs to the random stream it is given; with `dataset[i]` to the epoch that was set
# and to $i$. On a GPU, `batches` renders the next batch in a second stream while the current one is used.

# %%
#| export
class SyntheticPairs:
    "Samples made when they are asked for; `[i]` is {'img': (2, x, y, z) uint8, 'seg': (x, y, z)}"
    def __init__(
        self,
        bank: TemplateBank, # shapes
        n: int, # samples in an epoch
        config: SynthConfig = SynthConfig(), # settings
        *,
        seed: int = 0, # of the data set
        backend: Literal["auto", "numba", "torch"] = "auto", # of the labels
        device: str = "cpu", # where samples are rendered
    ):
        if n < 1: raise DataError(f"SyntheticPairs: needs n >= 1, got {n}")
        self.bank, self.n, self.config, self.seed, self.epoch = bank, int(n), config, seed, 0
        self.backend, self.device = backend, str(device)

    def __len__(self) -> int: return self.n

    def set_epoch(
        self,
        epoch: int, # from 0
    ) -> None:
        "Choose the samples of another epoch; none is in two epochs"
        self.epoch = int(epoch)

    def _arrays(self, index: int) -> dict[str, np.ndarray]:
        s = make_pair(self.seed, index, self.bank, self.config, backend=self.backend, device=self.device)
        return {"img": s.img, "seg": s.seg}

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not -self.n <= i < self.n: raise IndexError(f"sample {i} of {self.n}")
        return self._arrays(self.epoch*self.n + i % self.n)

    def draw(
        self,
        i: int, # position in the epoch; the stream says which sample it is
        rng: np.random.Generator, # of this item of this epoch
    ) -> dict[str, np.ndarray]: # as `[i]`
        "The sample of a random stream"
        return self._arrays(int(rng.integers(2**62)))

    def batches(
        self,
        batch_size: int, # pairs
        steps: int | None = None, # default: all full batches of the epoch
    ) -> Iterator[dict[str, Any]]: # {'img': (b, 2, x, y, z), 'seg': (b, x, y, z)} tensors on the device
        "Batches of the epoch, the next one being rendered while one is used"
        import torch
        device, steps = torch.device(self.device), self.n//batch_size if steps is None else steps
        if batch_size < 1 or steps*batch_size > self.n:
            raise DataError(f"batches: {steps} of {batch_size} do not fit into an epoch of {self.n}")
        def rendered(k: int) -> dict[str, Any]:
            first = self.epoch*self.n + k*batch_size
            plans = [draw_plan(self.seed, first + j, self.config.ensemble, len(self.bank)) for j in range(batch_size)]
            on = self.device if self.backend == "torch" else "cpu"
            segs = [render_labels(p, self.bank, backend=self.backend, device=on) for p in plans]
            most = max(int(s.max()) for s in segs)
            views = [draw_view_plan(self.seed, p.index, v, self.config.view, most + 1) for p in plans for v in (1, 2)]
            wide = np.int32 if self.config.seg_dtype.itemsize > 1 else np.uint8
            seg = torch.from_numpy(np.stack([s.astype(wide) for s in segs])).to(device)
            img = render_views(seg.repeat_interleave(2, 0), views)
            return {"img": img.reshape(batch_size, 2, *seg.shape[1:]), "seg": seg}
        if device.type != "cpu": yield from _ahead(rendered, steps, device)
        else:
            for k in range(steps):
                with one_thread(): batch = rendered(k)
                yield batch # who uses it has all threads

def _ahead(rendered: Callable[[int], dict], steps: int, device: Any) -> Iterator[dict]:
    "Render batch k + 1 in a thread and stream of its own while batch k is used"
    import torch
    from concurrent.futures import ThreadPoolExecutor
    module = torch.get_device_module(device)
    side = module.Stream(device)
    def work(k: int) -> tuple[dict, Any]:
        with module.stream(side): return rendered(k), side.record_event()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(work, 0) if steps else None
        for k in range(steps):
            batch, ready = coming.result()
            coming = pool.submit(work, k + 1) if k + 1 < steps else None
            now = module.current_stream(device)
            now.wait_event(ready)
            for t in batch.values(): t.record_stream(now) # its memory is not given away while it is used here
            yield batch

# %%
flying = SyntheticPairs(bank, 6, toy)
first = [b["img"].numpy().mean(axis=(1, 2, 3, 4)).round(1).tolist() for b in flying.batches(2)]
flying.set_epoch(1)
second = [b["img"].numpy().mean(axis=(1, 2, 3, 4)).round(1).tolist() for b in flying.batches(2)]
loaded = [[b["img"].sum() for _, b in Batches(flying, 3, workers=w).epoch(0)] for w in (0, 2)]
first, second

# %%
assert first[1][0] == round(float(pairs[2].img.mean()), 1) and first != second and loaded[0] == loaded[1]
with raises(DataError, match="do not fit into an epoch"): next(flying.batches(4, steps=2))

