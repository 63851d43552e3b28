"""A lost group, as a person is told of it: what ran where, what happened, and what is done about it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from cluster.driver.pool import Question

_DOING = {
    "place": "before it had the resources it needs",
    "load": "while it loaded the model",
    "ping": "while it was asked whether it still answers",
}
Fate = Literal["again", "suspect", "given up"]
_THEN: dict[Fate, str] = {
    "again": "{} runs again on another group.",
    "suspect": "{} was running at several losses, so it runs again after all others and alone.",
    "given up": "{} is given up, quarantine.jsonl has the error, and the other tasks go on.",
}


@dataclass(frozen=True, slots=True)
class Loss:
    """``reason``: in plain words. ``fates``: of each task that was running; a suspect was running at several losses."""

    question: Question
    group: str
    node: str
    reason: str
    max_attempts: int
    fates: tuple[Fate, ...] = ()

    def paragraph(self) -> str:
        where = f"{self.group} on node {self.node}" if self.node else self.group
        attempts = self.question.attempts
        if not attempts:
            then = "No task is blamed, and another group takes its place where one is needed."
            return f"{where} was lost {_DOING[self.question.kind]}: {self.reason}. {then} What is committed stays."
        ran = " and ".join(f"{task.id} (attempt {number} of {self.max_attempts})" for task, number in attempts)
        then = " ".join(_THEN[fate].format(task.id) for (task, _), fate in zip(attempts, self.fates, strict=True))
        return f"{where} was lost while it ran {ran}: {self.reason}. {then} What is committed stays."

    def records(self) -> list[dict[str, Any]]:
        """The lines of losses.jsonl: one per task, and one where there was none."""
        common = {"time": time.time(), "group": self.group, "node": self.node, "doing": self.question.kind}
        if not self.question.attempts:
            nobody = {"task": None, "attempt": 0, "quarantined": False}
            return [{**common, **nobody, "reason": self.reason}]
        return [
            {
                **common,
                "task": task.id,
                "attempt": number,
                "quarantined": fate == "given up",
                "reason": self.reason,
            }
            for (task, number), fate in zip(self.question.attempts, self.fates, strict=True)
        ]


def last_line(error: str) -> str:
    """What a traceback says in the end."""
    return error.strip().splitlines()[-1]
