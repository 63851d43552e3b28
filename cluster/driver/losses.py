"""A lost group, as a person is told of it: what ran where, what happened, and what is done about it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cluster.driver.pool import Question

_DOING = {
    "place": "before it had the resources it needs",
    "load": "while it loaded the model",
    "ping": "while it was asked whether it still answers",
}


@dataclass(frozen=True, slots=True)
class Loss:
    """``reason``: in plain words. ``suspect``: its task was running at several losses. ``quarantined``: given up."""

    question: Question
    group: str
    node: str
    reason: str
    max_attempts: int
    suspect: bool = False
    quarantined: bool = False

    def paragraph(self) -> str:
        where = f"{self.group} on node {self.node}" if self.node else self.group
        task = self.question.task
        if task is None:
            then = "No task is blamed, and another group takes its place where one is needed."
            return f"{where} was lost {_DOING[self.question.kind]}: {self.reason}. {then} What is committed stays."
        attempt = f"attempt {self.question.attempt} of {self.max_attempts}"
        if self.quarantined:
            then = f"{task.id} is given up, quarantine.jsonl has the error, and the other tasks go on."
        elif self.suspect:
            then = f"{task.id} was running at several losses, so it runs again after all others and alone."
        else:
            then = f"{task.id} runs again on another group."
        return f"{where} was lost while it ran {task.id} ({attempt}): {self.reason}. {then} What is committed stays."

    def record(self) -> dict[str, Any]:
        """The line of losses.jsonl."""
        task = self.question.task
        return {
            "time": time.time(),
            "group": self.group,
            "node": self.node,
            "doing": self.question.kind,
            "task": None if task is None else task.id,
            "attempt": self.question.attempt,
            "quarantined": self.quarantined,
            "reason": self.reason,
        }


def last_line(error: str) -> str:
    """What a traceback says in the end."""
    return error.strip().splitlines()[-1]
