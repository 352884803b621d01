"The literal algorithms of page 10"
from collections.abc import Mapping

import numpy as np


def relabel_pairs(lbl: np.ndarray, pairs: Mapping[int, int]) -> np.ndarray:
    "Simultaneous substitution, one pass over the volume for each pair; other values stay"
    out = lbl.copy()
    for old, new in pairs.items(): out[lbl == old] = new
    return out
