"""Statistics of paired differences, orders and families of tests: arrays in, numbers out."""

from __future__ import annotations

from audit.statistics.bootstrap import Interval, cluster_intervals, mean_interval, pigeonhole_interval
from audit.statistics.effect_size import cohen_d, detectable_d, equivalence_n, exact_interval, needed_n, power
from audit.statistics.multiple import benjamini_hochberg, bonferroni, holm
from audit.statistics.paired import cluster_t, paired_t, sign_test, superiority, superiority_scores, wilcoxon
from audit.statistics.ranks import kendall_rows, spearman_rows, top1_hits

__all__ = [
    "Interval",
    "benjamini_hochberg",
    "bonferroni",
    "cluster_intervals",
    "cluster_t",
    "cohen_d",
    "detectable_d",
    "equivalence_n",
    "exact_interval",
    "holm",
    "kendall_rows",
    "mean_interval",
    "needed_n",
    "paired_t",
    "pigeonhole_interval",
    "power",
    "sign_test",
    "spearman_rows",
    "superiority",
    "superiority_scores",
    "top1_hits",
    "wilcoxon",
]
