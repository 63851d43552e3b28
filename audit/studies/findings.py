"""Findings: a table of cells in one paragraph of plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from audit.statistics.cells import CONTROLS, Settings

_TOLD = (
    ("predicts", "predict the effect"),
    ("reversed", "are reversed (experts ranked high matter less)"),
    ("associated", "are associated with the effect, by metrics that claim no direction"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """The metrics, among those labelled ``control``, that must find nothing and those that ought to find something."""

    negative: tuple[str, ...] = ("random_token",)
    positive: tuple[str, ...] = ("routing_weight", "contribution_norm", "attribution", "abs_attribution")


def findings(cells: pd.DataFrame, settings: Settings, controls: Controls | None = None) -> str:
    """What was found, what was not, what could not have been seen, and whether the controls behaved.

    ``cells``: the table of ``audit.statistics.cells.cell_table``. That no metric predicts anywhere is said only if
    every cell but the controls is practically null at ``settings.alpha`` each (intersection-union: rejecting all of
    the single null hypotheses needs no correction) and none predicts.
    """
    controls = controls or Controls()
    tested = cells[~cells["label"].isin(CONTROLS)]
    if not len(tested):
        return f"No cell was tested. {_controls(cells, settings, controls)}"
    sentences = [
        f"{_count(len(tested), 'cell')} tested: {_list(tested['metric'])} against {_list(tested['outcome'])} at "
        f"{_plural(tested['layer'].nunique(), 'layer')} of {_list(tested['model'])}.",
        *_found(tested),
        *_not_found(tested, settings),
        _claim(tested, settings),
        _controls(cells, settings, controls),
    ]
    return " ".join(sentences)


def null_rates(controls: pd.DataFrame) -> str:
    """How often rankings that know nothing look significant, from the table ``controls`` of the importance audit."""
    told = {"random_token": "drawn afresh at every token", "random_ranking": "of the experts, fixed over all tokens"}
    sentences = []
    for name, what in told.items():
        rate = controls.loc[controls["metric"] == name, "rejection_rate"].dropna()
        if len(rate):
            sentences.append(
                f"Random rankings {what} have p_t below 0.05 in {rate.min():.1%} to {rate.max():.1%} of draws per cell."
            )
    if len(sentences) == len(told):
        sentences.append("The excess of the second is what p_permutation guards against.")
    return " ".join(sentences)


def _found(tested: pd.DataFrame) -> list[str]:
    sentences = []
    for word, told in _TOLD:
        found = tested[tested["verdict"] == word]
        if len(found):
            by_metric = found.groupby("metric", sort=True).size()
            metrics = ", ".join(f"{metric} in {count}" for metric, count in by_metric.items())
            largest = found.iloc[int(found["cohen_d"].abs().argmax())]
            sentences.append(
                f"{_share(found, tested)} {told}: {metrics}; the largest d is {largest['cohen_d']:.2f} "
                f"({largest['metric']}, {largest['outcome']}, layer {largest['layer']})."
            )
    if not sentences:
        sentences.append("None predicts the effect, is reversed or is associated with it.")
    return sentences


def _not_found(tested: pd.DataFrame, settings: Settings) -> list[str]:
    sentences = []
    null = tested[tested["verdict"] == "practically null"]
    if len(null):
        sentences.append(
            f"{_share(null, tested)} are practically null: an effect beyond d = ±{settings.margin:g} is excluded."
        )
    undecided = tested[tested["verdict"] == "undecided"]
    if len(undecided):
        needed = undecided["n_to_decide"].dropna()
        told = (
            f"; about {_range(needed.map(_rounded), ',d')} pairs would decide {len(needed)} of them"
            if len(needed)
            else ""
        )
        sentences.append(f"{_share(undecided, tested)} are undecided, which is no evidence of absence{told}.")
    if tested["mde_80"].notna().any():
        sentences.append(
            f"With {_range(tested['n'], ',d')} pairs a cell sees d = {_range(tested['mde_80'].dropna(), '.2f')} with a "
            "power of 80 % at its corrected alpha; smaller effects could not have been relied on to show."
        )
    for word in ("below noise floor", "not estimable"):
        found = tested[tested["verdict"] == word]
        if len(found):
            sentences.append(f"{_share(found, tested)} are {word}; the table says why.")
    return sentences


def _claim(tested: pd.DataFrame, settings: Settings) -> str:
    null = tested["equivalence_uncorrected"].fillna(False).astype(bool)
    directed = tested["verdict"].isin(word for word, _ in _TOLD)
    noise = tested["verdict"] == "below noise floor"
    if null.all() and not directed.any() and not noise.any():
        return f"No metric predicts anywhere: every cell is practically null at {settings.alpha:g}."
    return (
        f"That no metric predicts anywhere cannot be claimed: {int((null & ~noise).sum())} of {len(tested)} cells are "
        f"practically null at {settings.alpha:g}, and it would take all."
    )


def _controls(cells: pd.DataFrame, settings: Settings, controls: Controls) -> str:
    ours = cells[cells["label"] == "control"]
    negative = ours[ours["metric"].isin(controls.negative)]
    positive = ours[ours["metric"].isin(controls.positive)]
    sentences = []
    if len(negative):
        wrong = int(negative["verdict"].isin(["predicts", "reversed"]).sum())
        rejected = int((negative["p_t"] < settings.alpha).sum())
        sentences.append(
            f"Negative controls ({_list(negative['metric'])}) {'behaved' if not wrong else 'did NOT behave'}: "
            f"{wrong} of {len(negative)} cells read predicts or reversed; p_t is below {settings.alpha:g} in "
            f"{rejected}, about {settings.alpha * len(negative):.1f} being expected."
        )
    else:
        sentences.append("No negative control was run.")
    if len(positive):
        right = int((positive["verdict"] == "predicts").sum())
        meaning = "" if right else ": what these cells can find is not shown"
        sentences.append(
            f"Positive controls ({_list(positive['metric'])}) predict in {right} of {len(positive)} cells{meaning}."
        )
    else:
        sentences.append("No positive control was run: that the audit can find something is not shown here.")
    return " ".join(sentences)


def _rounded(n: int) -> int:
    """Two significant digits: what would decide is not known any better."""
    return int(float(f"{n:.2g}"))


def _share(part: pd.DataFrame, whole: pd.DataFrame) -> str:
    return f"{len(part)} of {len(whole)}"


def _count(count: int, noun: str) -> str:
    return f"{_plural(count, noun)} {'was' if count == 1 else 'were'}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _list(values: pd.Series[str]) -> str:
    names: Sequence[str] = sorted(set(values))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _range(values: pd.Series[float], form: str) -> str:
    low, high = format(values.min(), form), format(values.max(), form)
    return low if low == high else f"{low} to {high}"
