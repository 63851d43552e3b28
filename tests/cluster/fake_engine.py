"""An engine that only knows costs, a corpus of ten short documents, and the plan of a specification on both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from audit.config import AuditConfig
from audit.corpus import Corpus, DocumentInfo, TokenSequence
from audit.engine import Cost
from cluster.planning.planner import Planner
from cluster.tasks import Task

LAYERS = (1, 2, 5)
EXPERTS, TOP_K = 8, 3
LENGTHS = (10, 40, 300, 7, 12, 12, 90, 33, 8, 25)


class FakeEngine:
    """A FLOP per token and a billion per effect: a task of 15 seconds, at 20 GFLOP a second, holds 300 of those."""

    def __init__(self, family: str = "olmoe", reroute_refused: str | None = None) -> None:
        site = SimpleNamespace(num_experts=EXPERTS, top_k=TOP_K, shared=None, router=nn.Linear(4, EXPERTS, bias=False))
        config = SimpleNamespace(model_type=family, get_text_config=SimpleNamespace)
        self.sizes = SimpleNamespace(device="cpu")
        self.model = SimpleNamespace(
            description=SimpleNamespace(moe_layers=LAYERS),
            sites=dict.fromkeys(LAYERS, site),
            layers=[None] * 6,
            module=SimpleNamespace(config=config),
            tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=1),
            reroute_refused=reroute_refused,
        )

    def cost(
        self,
        lengths: list[int],
        positions: list[int],
        layers: Any,
        interventions: Any,
        scope: str = "token",
        attribution: bool = False,
        redistribution: bool = False,
    ) -> Cost:
        rows = sum(positions) * len(layers) * len(interventions)
        return Cost(rows, float(sum(lengths)) + 1e9 * rows, 45 * rows)

    def require_possible(self, layers: Any, interventions: Any, scope: str, all_positions: bool) -> None:
        for intervention in interventions:
            intervention.check(TOP_K, EXPERTS, has_shared=False)

    def require_room(self, length: int, layers: Any, interventions: Any, scope: str, attribution: bool) -> None:
        if length > 10_000:
            raise ValueError(f"engine.memory: too little for a sequence of {length}")


def planned(engine: FakeEngine | None = None, **settings: Any) -> dict[str, list[Task]]:
    config = AuditConfig.parse({"calibration": {"documents": 2}, **settings}, Path("."))
    documents = [DocumentInfo(str(i), "prose", str(i)) for i in range(len(LENGTHS))]
    corpus = Corpus(documents, [_sequence(i, n) for i, n in enumerate(LENGTHS)], "", {})
    return dict(Planner(config, engine or FakeEngine(), corpus).stages())  # type: ignore[arg-type]


def _sequence(index: int, length: int) -> TokenSequence:
    ids = np.arange(length, dtype=np.int64)
    return TokenSequence(index, index, "prose", ids, np.zeros(length, np.int32), np.zeros(length, np.bool_))


def covered(tasks: Sequence[Task]) -> Counter[tuple[int, int, int]]:
    """How often every (sequence, position, layer) is measured."""
    return Counter(
        (s.index, int(t), layer)
        for task in tasks
        for s, at in zip(task.sequences, task.positions, strict=True)
        for t in at
        for layer in task.layers
    )
