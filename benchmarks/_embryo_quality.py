"Quality of synthetic images: the Fréchet distance. Joined into benchmarks/embryo.py"
import numpy as np

from benchmarks.common import Row, compare, threads
from benchmarks.reference.embryo_quality import frechet_by_root


def _features(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    "Correlated features of two sets, as networks give them"
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((d, d))*np.geomspace(1, 0.01, d)/np.sqrt(d)
    return rng.standard_normal((n, d)) @ mix, 1.2*rng.standard_normal((n, d)) @ mix + 0.1


def _row(name: str, n: int, d: int, bar: float | None) -> Row:
    from medvol_nb.embryo.quality import frechet_distance
    a, b = _features(n, d)
    with threads():
        ours, theirs = frechet_distance(a, b), frechet_by_root(a, b)
        assert abs(ours - theirs) < 1e-3*max(1.0, theirs), (ours, theirs)
        what = f"{n} and {n} pictures, {d} features, processor time; reference: square root of a matrix"
        return compare(name, what, lambda: frechet_distance(a, b), lambda: frechet_by_root(a, b), unit="s", runs=3,
                       warm_up=0, cpu=True, bar=bar, note=f"values {ours:.7g} and {theirs:.7g}")


def frechet(full: bool = False) -> list[Row]:
    rows = [_row("embryo.frechet", 500, 1024, 10)]
    if full: rows += [_row("embryo.frechet_many", 5000, 1024, None), _row("embryo.frechet_small", 300, 256, None)]
    return rows


ROWS = {"frechet": frechet}
