"Fréchet distance as it is usually computed: covariances and the square root of their product"
import numpy as np
from scipy import linalg


def frechet_by_root(a: np.ndarray, b: np.ndarray) -> float:
    "From features (n, d) and (m, d); singular products get a little on the diagonal, imaginary dust is dropped"
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b)
    if not np.isfinite(root).all():
        dust = 1e-6*np.eye(len(cov_a))
        root = linalg.sqrtm((cov_a + dust) @ (cov_b + dust))
    gap = mean_a - mean_b
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2*np.trace(root.real))
