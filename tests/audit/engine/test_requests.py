"""Requests that an engine refuses, each with a sentence that names the field and what would be right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from families import ready, texts

from audit.engine import Engine
from audit.interventions import Intervention, Target
from audit.models import ModelError
from audit.models.seam import replaced

SEQUENCES = texts((6, 3), 1)
POSITIONS = [np.array([0, 5]), np.array([2])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sweeping"}, r"engine\.method: 'sweeping' is unknown; known are auto, sweep, oracle"),
        ({"identity_every": 0}, r"engine\.identity_every: 0 is not possible; it must be at least 1"),
        ({"micro_batch": 0}, r"engine\.micro_batch: 0 is not possible; it must be at least 1"),
        ({"micro_batch": -5}, r"engine\.micro_batch: -5 is not possible"),
    ],
)
def test_engines_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(ready("olmoe"), **{"memory": 2**40, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "document"}, "scope: 'document' is unknown; known are token, sequence"),
        ({"positions": POSITIONS[:1]}, "positions: 2 positions for 2 sequences; every sequence needs its list"),
        ({"positions": [np.array([], int)] * 2}, "positions: 0 positions for 2 sequences; .* must not be empty"),
        ({"positions": [np.array([5, 0]), POSITIONS[1]]}, "those of sequence 0 must be ascending and lie in 0 to 5"),
        ({"positions": [np.array([2, 2]), POSITIONS[1]]}, "those of sequence 0 must be ascending"),
        ({"positions": [POSITIONS[0], np.array([3])]}, "those of sequence 1 must be ascending and lie in 0 to 2"),
        ({"positions": [POSITIONS[0], np.array([-1])]}, "those of sequence 1 must be ascending and lie in 0 to 2"),
        ({"layers": [4]}, "layers: 4 is not an MoE layer; those are 0, 1, 2, 3"),
        ({"interventions": [Intervention("zero", Target("shared"))]}, "this model has no shared experts"),
        ({"interventions": [Intervention("zero", Target("highest", count=3))]}, "a token has 2 active ones"),
        ({"interventions": [Intervention("mean")]}, r"intervention\.kind: mean needs a calibration"),
    ],
)
def test_requests_that_cannot_be(options: dict[str, Any], message: str) -> None:
    request = {"positions": POSITIONS, "layers": [1], "interventions": [Intervention("zero")], **options}
    with pytest.raises(ValueError, match=message):
        Engine(ready("olmoe"), memory=2**40).measure(SEQUENCES, request.pop("positions"), **request)


def test_a_calibration_that_lacks_something() -> None:
    engine = Engine(ready("olmoe"), memory=2**40)
    means_only = engine.observe(texts((20,), 2))
    other = Engine(ready("deepseek_v3"), memory=2**40).observe(texts((20,), 2), stored_outputs=2)
    for calibration, kind, message in (
        (means_only, "resample", "resample needs stored outputs; observe with stored_outputs=256"),
        (other, "mean", r"layer: 0 was not calibrated; calibrated are \[1, 2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.measure(
                SEQUENCES,
                POSITIONS,
                layers=[0],
                interventions=[Intervention(kind)],  # type: ignore[arg-type]
                calibration=calibration,
            )


def test_ranks_that_share_a_sweep_compare_all_that_decides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plans = ready("olmoe"), list[bytes]()
    engine = Engine(model, memory=2**40)

    @contextmanager
    def noted(plan: Callable[[], bytes]) -> Iterator[None]:
        plans.append(plan())
        yield

    monkeypatch.setattr(model.shard, "sweep", noted)
    ranked = Intervention("zero", Target("ranked", count=1, metric="frequency"))
    value_E = np.arange(8.0)
    one, other = (engine.observe(texts((20,), seed), stored_outputs=2) for seed in (2, 3))
    asked: list[dict[str, Any]] = [
        {"interventions": [Intervention("zero")], "calibration": one},
        {"interventions": [Intervention("mean")], "calibration": one},
        {"interventions": [Intervention("mean")], "calibration": other},
        {"interventions": [Intervention("mean")], "calibration": replace(one, stored=None)},
        {"interventions": [ranked], "rankings": {"frequency": {1: value_E}}},
        {"interventions": [ranked], "rankings": {"frequency": {1: 8 - value_E}}},
    ]
    for options in [*asked, *asked]:
        engine.measure(SEQUENCES, POSITIONS, layers=[1], **options)
    assert plans[: len(asked)] == plans[len(asked) :]
    assert len(set(plans)) == len(asked)
    engine.measure(SEQUENCES, POSITIONS, layers=[1], interventions=[Intervention("zero")], calibration=other)
    assert plans[-1] == plans[0]  # which does without


def test_longer_sequences_than_the_model_reads() -> None:
    long = texts((257,), 3)
    with pytest.raises(ValueError, match="sequence 0 has 257 tokens, the model reads at most 256; split it"):
        Engine(ready("olmoe"), memory=2**40).measure(long, [np.array([0])], layers=[0], interventions=[Intervention()])


@pytest.mark.parametrize(("method", "scope"), [("sweep", "token"), ("oracle", "token"), ("sweep", "sequence")])
def test_a_layer_that_does_not_call_its_experts_is_an_error_and_not_an_effect_of_nothing(
    method: str, scope: Any
) -> None:
    model = ready("mixtral", 1)
    engine = Engine(model, memory=2**62, method=method)
    asked: dict[str, Any] = {"layers": [1], "interventions": [Intervention("zero")], "scope": scope}
    bypassed = {model.sites[1].block: lambda hidden, *rest, **options: hidden}
    with replaced(bypassed), pytest.raises(ModelError, match="layer 1 ran without calling its experts"):
        engine.measure(texts((9,), 1), [np.arange(4)], **asked)
