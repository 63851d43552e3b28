"""Seconds of the bootstrap intervals of a whole audit: 60 cells of 1,000 pairs, 10,000 draws each.

    python -m benchmarks.bootstrap

Two rows: one process, and one process per core with the cells shared out.
"""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from audit.statistics import cluster_intervals, pigeonhole_interval

CELLS, PAIRS, DOCUMENTS, EXPERTS, DRAWS = 60, 1000, 200, 64, 10_000


def cell(seed: int) -> tuple[float, float]:
    """Seconds of a cell: BCa intervals of d and superiority at two levels; two-way interval of d."""
    generator = np.random.default_rng(seed)
    diff_N = generator.standard_t(5, PAIRS) + 0.1
    document_N = generator.integers(0, DOCUMENTS, PAIRS)
    high_N = generator.integers(0, EXPERTS, PAIRS)
    low_N = (high_N + generator.integers(1, EXPERTS, PAIRS)) % EXPERTS
    start = time.perf_counter()
    cluster_intervals(diff_N, document_N, levels=(0.9, 0.95), draws=DRAWS, seed=seed)
    middle = time.perf_counter()
    pigeonhole_interval(diff_N, document_N, high_N, low_N, level=0.95, draws=DRAWS, seed=seed)
    return middle - start, time.perf_counter() - middle


def main() -> None:
    print(f"{CELLS} cells of {PAIRS} pairs, {DOCUMENTS} documents, {EXPERTS} experts, {DRAWS} draws")
    print(f"numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    start = time.perf_counter()
    by_document, two_way = np.array([cell(seed) for seed in range(CELLS)]).sum(axis=0)
    seconds = time.perf_counter() - start
    print(f"one process: {seconds:.1f} s (by document {by_document:.1f}, two-way {two_way:.1f})")
    with ProcessPoolExecutor() as pool:
        list(pool.map(cell, range(os.cpu_count() or 1)))  # workers start and import before the clock does
        start = time.perf_counter()
        list(pool.map(cell, range(CELLS)))
        print(f"a process per core: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
