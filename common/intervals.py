"""How sure a rate or a mean is."""

from collections.abc import Callable

import numpy as np

N_BOOTSTRAP = 1000
# standard deviations on each side of a mean that hold 95 %
Z_95 = 1.959964


def bootstrap(
    sums: np.ndarray,
    counts: np.ndarray,
    combine: Callable[[np.ndarray, float], float],
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """(low, high): 95 % interval of combine(totals, count) when the clusters are drawn anew.
    sums (clusters, K), counts (clusters,). (None, None) for a single cluster."""
    n = len(counts)
    # of one picture nothing is known
    if n <= 1:
        return None, None
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(N_BOOTSTRAP):
        # how often each cluster is drawn (clusters,)
        weights = np.bincount(rng.integers(n, size=n), minlength=n)
        count = float(weights @ counts)
        values.append(combine(weights @ sums, count))
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


def wilson(k: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """95 % interval of a share k / n (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    centre = k + z * z / 2
    spread = z * (k * (n - k) / n + z * z / 4) ** 0.5
    low = (centre - spread) / (n + z * z)
    high = (centre + spread) / (n + z * z)
    return max(0.0, low), min(1.0, high)
