"""What the intervals and tests do where the truth is known: coverage under dependence and heavy tails, false positives.

    python -m benchmarks.coverage                                   # 10,000 repetitions, about ten minutes on one core
    python -m benchmarks.coverage --repetitions 500 --markdown FILE

Differences are d + sqrt(icc) u_document + sqrt(1 - icc) e with u and e of variance 1, so the true effect size is d;
documents hold 5 to 15 pairs. 95 % intervals, two-sided.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import integrate, stats

from audit.statistics import (
    bonferroni,
    cluster_intervals,
    cluster_t,
    cohen_d,
    exact_interval,
    holm,
    paired_t,
    wilcoxon,
)

LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A population of paired differences; ``freedom`` of the t distribution, infinite for the normal."""

    documents: int
    freedom: float
    icc: float
    d: float = 0.2
    one_pair: bool = False  # a pair per document: independent pairs

    @property
    def name(self) -> str:
        shape = "normal" if math.isinf(self.freedom) else f"t({self.freedom:g})"
        return f"{shape}, {self.documents} documents" + (", one pair each" if self.one_pair else f", icc {self.icc:g}")

    @property
    def _scale(self) -> float:
        return 1.0 if math.isinf(self.freedom) else math.sqrt(1 - 2 / self.freedom)

    def superiority(self) -> float:
        """True P(difference > 0), by integration over the document's part."""
        variable = stats.norm() if math.isinf(self.freedom) else stats.t(self.freedom)
        within, between = math.sqrt(1 - self.icc) * self._scale, math.sqrt(self.icc) * self._scale
        return float(
            integrate.quad(lambda u: variable.pdf(u) * variable.cdf((self.d + between * u) / within), -60, 60)[0]
        )

    def draw(self, generator: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """One sample: differences and the document of each."""
        sizes = np.ones(self.documents, int) if self.one_pair else generator.integers(5, 16, self.documents)
        document_N = np.repeat(np.arange(self.documents), sizes)
        u_G, e_N = self._noise(generator, self.documents), self._noise(generator, len(document_N))
        return self.d + math.sqrt(self.icc) * u_G[document_N] + math.sqrt(1 - self.icc) * e_N, document_N

    def _noise(self, generator: np.random.Generator, size: int) -> NDArray[np.float64]:
        if math.isinf(self.freedom):
            return generator.standard_normal(size)
        return generator.standard_t(self.freedom, size) * self._scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Shares of repetitions in which the 95 % interval held the truth."""

    exact_d: float
    boot_d: float
    boot_superiority: float


def coverage(scenario: Scenario, *, repetitions: int, draws: int, seed: int) -> Coverage:
    """Coverage of the exact interval (which takes pairs as independent) and of the BCa intervals by document."""
    generator = np.random.default_rng(seed)
    truth = scenario.superiority()
    held = np.zeros(3)
    for repetition in range(repetitions):
        diff_N, document_N = scenario.draw(generator)
        boot = cluster_intervals(diff_N, document_N, levels=[LEVEL], draws=draws, seed=repetition)
        low, high = exact_interval(cohen_d(diff_N), len(diff_N), LEVEL)
        d, order = boot["d"][LEVEL], boot["superiority"][LEVEL]
        held += low <= scenario.d <= high, d.low <= scenario.d <= d.high, order.low <= truth <= order.high
    exact_d, boot_d, boot_superiority = (held / repetitions).tolist()
    return Coverage(exact_d=exact_d, boot_d=boot_d, boot_superiority=boot_superiority)


@dataclass(frozen=True, slots=True, kw_only=True)
class FalsePositives:
    """Rates under the null: of single cells at alpha / cells, and of families with at least one (at alpha)."""

    dual: float
    family_bonferroni: float
    family_holm: float
    paired_t: float  # single cells at alpha
    cluster_t: float


def false_positives(scenario: Scenario, *, cells: int, families: int, alpha: float, seed: int) -> FalsePositives:
    """The dual test (p_t and p_wilcoxon below alpha / cells, mean > 0) and the corrections over a family of cells."""
    generator = np.random.default_rng(seed)
    p_t, p_wilcoxon, p_cluster, mean = np.empty((4, families, cells))
    for family in range(families):
        for cell in range(cells):
            diff_N, document_N = scenario.draw(generator)
            p_t[family, cell] = paired_t(diff_N)
            p_wilcoxon[family, cell] = wilcoxon(diff_N)
            p_cluster[family, cell] = cluster_t(diff_N, document_N)
            mean[family, cell] = diff_N.mean()
    dual = (p_t < alpha / cells) & (p_wilcoxon < alpha / cells) & (mean > 0)
    return FalsePositives(
        dual=float(dual.mean()),
        family_bonferroni=float(np.mean([(bonferroni(p) < alpha).any() for p in p_t])),
        family_holm=float(np.mean([(holm(p) < alpha).any() for p in p_t])),
        paired_t=float((p_t < alpha).mean()),
        cluster_t=float((p_cluster < alpha).mean()),
    )


NORMAL = math.inf
INDEPENDENT = [Scenario(documents=n, freedom=NORMAL, icc=0.0, one_pair=True) for n in (30, 200, 1000)]
PROMISED = [Scenario(documents=100, freedom=freedom, icc=icc) for freedom in (NORMAL, 5) for icc in (0.0, 0.1)]
REACHED = [
    *(Scenario(documents=100, freedom=3, icc=icc) for icc in (0.0, 0.1)),
    *(Scenario(documents=n, freedom=freedom, icc=0.1) for n in (15, 30) for freedom in (NORMAL, 5, 3)),
]
NULLS = [
    *(Scenario(documents=200, freedom=freedom, icc=0.0, d=0.0, one_pair=True) for freedom in (NORMAL, 5, 3)),
    Scenario(documents=100, freedom=NORMAL, icc=0.1, d=0.0),
]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=1_000, help="bootstrap draws per interval")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    start = time.perf_counter()
    rows = []
    for group, scenarios in (("exact", INDEPENDENT), ("promised", PROMISED), ("reached", REACHED)):
        for scenario in scenarios:
            reached = coverage(scenario, repetitions=options.repetitions, draws=options.draws, seed=0)
            shares = (reached.exact_d, reached.boot_d, reached.boot_superiority)
            rows.append([scenario.name, group, *(f"{share:.1%}" for share in shares)])
            print(rows[-1], flush=True)
    families, cells, alpha = max(options.repetitions // 10, 1), 20, 0.05
    nulls = []
    for scenario in NULLS:
        rate = false_positives(scenario, cells=cells, families=families, alpha=alpha, seed=0)
        values = (rate.dual, rate.family_bonferroni, rate.family_holm, rate.paired_t, rate.cluster_t)
        nulls.append([scenario.name, *(f"{value:.2%}" for value in values)])
        print(nulls[-1], flush=True)
    se = math.sqrt(LEVEL * (1 - LEVEL) / options.repetitions)
    text = "\n\n".join(
        [
            f"# Coverage of 95 % intervals, false positives\n\n`python -m benchmarks.coverage --repetitions "
            f"{options.repetitions} --draws {options.draws}`: {time.perf_counter() - start:.0f} s; numpy "
            f"{np.__version__}, scipy {scipy.__version__}, Python {platform.python_version()}",
            f"True d 0.2. Monte-Carlo standard error of a coverage of 95 %: {se:.2%}. `exact` takes pairs as "
            "independent; BCa resamples documents.",
            table(["population", "group", "exact, d", "BCa, d", "BCa, superiority"], rows),
            f"True d 0; families of {cells} cells, {families} of them. The dual test at {alpha}/{cells} = "
            f"{alpha / cells:.2%} (nominal, one side: half of it), families after correction at {alpha:.0%}, single "
            f"tests at {alpha:.0%}.",
            table(["population", "dual test", "Bonferroni", "Holm", "paired t", "cluster-robust t"], nulls),
        ]
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
