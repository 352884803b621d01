"Two views of a scan with their correspondences: from memory and from a prepared store, against coordinate volumes"
import functools
import tempfile
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks.common import Row, compare, threads
from benchmarks.reference import embed_views as reference
from medvol_nb.core import rng_for
from medvol_nb.embed.data import net_volume
from medvol_nb.embed.intensity import AUGMENTS
from medvol_nb.embed.sampler import Case, ViewSet
from medvol_nb.embed.views import ViewSampler, open_source
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.volume import write_volume


@functools.lru_cache(1)
def scan(n: int) -> Volume:
    "A CT-like volume of 1.6 mm, smooth with structure, 320 x 400 x 400 mm, or 384 x 480 x 480 mm"
    shape = (n, n + n//4, n + n//4)
    small = ndimage.gaussian_filter(rng_for(0, "scan").normal(0, 1, [k//4 for k in shape]), 1.5)
    img = np.clip(ndimage.zoom(small/small.std()*300, 4, order=1), -1000, 1500).astype(np.int16)
    return net_volume(Volume(img, affine_from(1.6, axes="zyx"), "zyx"))


def views(full: bool = False) -> list[Row]:
    "A pair of 96 x 96 x 32 views, at scales of 0.8 to 1.2, as a sample for training"
    vol = scan(240 if full else 200)
    source, sampler = open_source(vol, contrast="ct"), ViewSampler()
    data, spacing, items = np.asarray(vol.data), vol.spacing, 2
    note = f"processor time per pair; CT of {'x'.join(map(str, vol.shape))} at 1.6 mm"

    def ours() -> None:
        for k in range(items): sampler(source, rng_for(0, "pair", k))

    def literal() -> None:
        for k in range(items): reference.pair(data, spacing, k)

    with threads(), tempfile.TemporaryDirectory() as d:
        write_volume(vol, Path(d)/"ct.zarr")
        stored = open_source(Path(d)/"ct.zarr", contrast="ct")
        samples = ViewSet([Case("ct", (vol,))], augment=AUGMENTS["aggressive"])
        source.box, stored.box

        def from_disk() -> None:
            for k in range(items): sampler(stored, rng_for(0, "pair", k))

        def whole_sample() -> None:
            for k in range(items): samples.draw(0, rng_for(0, "pair", k))

        return [compare("embedding.views", "pair of 32x96x96 views with correspondences; reference: coordinate volumes",
                        ours, literal, unit="ms", runs=5, items=items, bar=10, cpu=True, note=note,
                        others={"from zarr": from_disk, "with aggressive contrast": whole_sample})]


ROWS = {"views": views}
