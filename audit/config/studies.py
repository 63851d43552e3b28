"""The questions an audit answers: which studies are made of its effects, and how."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from audit.config.section import Many, Section

Outcome = Literal["delta_loss", "abs_delta_loss", "kl", "js", "tv", "top1_flip", "logit_drop", "gap_norm"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Metrics = Literal["all"] | Annotated[Many[str], Field(min_length=1)]
_METRICS = "all, or a list of metrics such as [utilization, reap]"


class ImportanceConfig(Section):
    """Does a metric know which of a token's active experts matters more?"""

    metrics: Metrics = Field(default="all", description=_METRICS)
    outcomes: Many[Outcome] = Field(default=OUTCOMES, min_length=1, description=f"a list of {', '.join(OUTCOMES)}")
    confirmatory: Many[Outcome] = Field(
        default=("delta_loss", "kl"), min_length=1, description="a list of outcomes that are also in outcomes"
    )
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="a number above 0 and below 0.5")
    margin: float = Field(
        default=0.1, gt=0, description="a number above 0: the largest |d| that is practically nothing"
    )
    superiority_margin: float = Field(
        default=0.05, gt=0, lt=0.5, description="a number above 0 and below 0.5, around P(high > low) = 0.5"
    )
    random_rankings: int = Field(default=999, ge=1, description="a whole number of at least 1; 999 or more for a test")
    bootstrap_draws: int = Field(default=10_000, ge=100, description="a whole number of at least 100")
    released_code: bool = Field(
        default=False, description="true (the metrics as the published code computed them as well) or false"
    )
    contrasts: bool = Field(default=False, description="true (write every pair to results/contrasts.parquet) or false")

    @model_validator(mode="after")
    def _fits(self) -> ImportanceConfig:
        for outcome in self.confirmatory:
            if outcome not in self.outcomes:
                raise ValueError(f"confirmatory: {outcome!r} is not among the outcomes; add it there or leave it out")
        return self


class ProgressiveConfig(Section):
    """What happens as more and more of a token's active experts are removed, and in which order?"""

    positions: int | None = Field(
        default=500, ge=1, description="null for all audited positions, or a whole number of at least 1"
    )
    layers: Annotated[Many[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None, description="null for all audited layers, or a list of them"
    )
    metrics: Metrics = Field(default="all", description=_METRICS)
    draws: int = Field(default=20, ge=1, description="a whole number of at least 1: random orders per token")
    cliff: float = Field(default=0.1, gt=0, description="a number of nats above 0")


class RedundancyConfig(Section):
    """Are the criteria that experts are pruned by interchangeable?"""

    shares: Annotated[Many[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = Field(
        default=(0.125, 0.25, 0.5), description="a list of shares of the experts, each above 0 and below 1"
    )
    metrics: Metrics = Field(default="all", description=_METRICS)
    draws: int = Field(default=199, ge=1, description="a whole number of at least 1: random prunings to compare with")
    documents: int | None = Field(
        default=40, ge=1, description="null for all audited documents, or a whole number of at least 1"
    )
    margin: float = Field(default=0.1, gt=0, description="a number above 0")
    bootstrap_draws: int = Field(default=2_000, ge=100, description="a whole number of at least 100")


class StudiesConfig(Section):
    """The studies that are made; null, the default, leaves one out."""

    importance: ImportanceConfig | None = None
    progressive: ProgressiveConfig | None = None
    redistribution: bool = Field(default=False, description="true or false")
    redundancy: RedundancyConfig | None = None
