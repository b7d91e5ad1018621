"""How sure a rate or a mean is."""

import numpy as np

N_BOOTSTRAP = 1000


def bootstrap(sums, counts, combine, seed=0):
    """(low, high): 95 % interval of combine(totals, count) when the clusters are drawn anew. sums (clusters, K), counts (clusters,)."""
    rng, n, values = np.random.default_rng(seed), len(counts), []
    for _ in range(N_BOOTSTRAP if n > 1 else 0):
        weights = np.bincount(rng.integers(n, size=n), minlength=n)
        values.append(combine(weights @ sums, weights @ counts))
    return (
        tuple(np.quantile(values, (0.025, 0.975)).tolist()) if values else (None, None)
    )  # of one picture nothing is known


def wilson(k, n, z=1.959964):
    """95 % interval of a share k / n (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    centre, spread = k + z * z / 2, z * (k * (n - k) / n + z * z / 4) ** 0.5
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))
