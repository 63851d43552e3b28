"""Groups on Ray: a placement group and an actor per rank; the driver owns recovery, Ray restarts nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import ray
import ray.cloudpickle
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.driver.group import Group, GroupLostError, Handle, Place, Result, Shape, TaskError
from cluster.groups import resources
from cluster.groups.rank import Rank
from cluster.groups.ray_errors import ends_group, sort_errors, sort_own_errors
from cluster.tasks import Attempt
from cluster.worker import TABLES, Worker

# When one rank has failed: how long the others may take to show why. A node's death is seen after about two seconds.
_GRACE_SECONDS = 5.0
_COUNT_SECONDS = 1.0  # for so long a count of the cluster's resources holds


@dataclass(slots=True, eq=False)
class _Question:
    """One question to every rank of a group; answered when all have, or some time after the first has failed."""

    group: RayGroup
    answers: list[Future[Any]]
    left: int
    then: Callable[[list[Any]], None] | None  # what the answers are for, where the driver is not told of them
    failed: bool = False


class RayGroup:
    """One logical model: a placement group and its ranks."""

    def __init__(self, name: str, fleet: RayFleet) -> None:
        self.name = name
        self.node = ""
        self._fleet = fleet
        self._place = resources.bundles(fleet.shape, name)
        self._ranks: list[Any] = []
        self._running: list[tuple[str, dict[str, Handle]]] = []  # of each task that was asked for: its id, its tables
        self.question: _Question | None = None
        self._ask([self._place.ready()])

    def load(self) -> None:
        shape, fleet = self._fleet.shape, self._fleet
        if not self._ranks:
            self.node = fleet.address_of(placement_group_table(self._place)["bundles_to_node_id"][0])
            self._ranks = [
                fleet.rank.options(
                    name=f"{self.name}/rank-{rank}",
                    namespace=fleet.namespace,
                    num_cpus=shape.cpus,
                    num_gpus=shape.gpus,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._place, rank),
                ).remote(fleet.make_worker)
                for rank in range(shape.ranks)
            ]
        if shape.ranks == 1:
            self._load("")
        else:
            self._ask([self._ranks[0].meet.remote()], then=lambda found: self._load(found[0]))

    def _load(self, address: str) -> None:
        backend = "nccl" if self._fleet.shape.gpus else "gloo"
        places = [Place(rank, len(self._ranks), address) for rank in range(len(self._ranks))]
        seconds = self._fleet.patience
        self._ask(
            [actor.load.remote(place, backend, seconds) for actor, place in zip(self._ranks, places, strict=True)]
        )

    def ping(self) -> None:
        self._ask([rank.ping.remote() for rank in self._ranks])

    def submit(self, attempts: Sequence[Attempt]) -> None:
        refs = []
        for rank, (task, number) in zip(self._ranks, attempts, strict=False):
            receipt, *tables = rank.run.options(num_returns=1 + len(TABLES), name=task.id).remote(task, number)
            self._running.append((task.id, dict(zip(TABLES, tables, strict=True))))
            refs.append(receipt)
        others = self._ranks[len(attempts) :]
        if self._fleet.shape.own_tasks:
            refs += [rank.serve.remote() for rank in others]
        else:
            refs += [rank.follow.options(name=attempts[0].task.id).remote(*attempts[0]) for rank in others]
        self._ask(refs)

    def answer(self) -> Any:
        assert self.question is not None
        answers, running = self.question.answers, self._running
        self.question, self._running = None, []
        errors = {rank: error for rank, a in enumerate(answers) if a.done() and (error := a.exception()) is not None}
        if running and self._fleet.shape.own_tasks:
            raised = sort_own_errors(errors, len(self._ranks))
            if stranger := next((rank for rank in raised if rank >= len(running)), None):
                raise GroupLostError(f"rank {stranger} failed while it served the others: {raised[stranger]}")
            return [raised.get(i) or _result(*one, answers[i].result()) for i, one in enumerate(running)]
        error = sort_errors(errors, len(self._ranks)) if errors else None
        if running and error is None:
            error = _disagreement([answer.result() for answer in answers])
        if isinstance(error, TaskError) and running:
            return [error]
        if error is not None:
            raise error
        return [_result(*running[0], answers[0].result())] if running else None

    def kill(self) -> None:
        self.question = None
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        remove_placement_group(self._place)

    def _ask(self, refs: Sequence[Any], then: Callable[[list[Any]], None] | None = None) -> None:
        answers = [ref.future() for ref in refs]
        self.question = question = _Question(self, answers, len(answers), then)
        for answer in answers:
            answer.add_done_callback(lambda answer: self._fleet.told.put((question, answer)))


def _result(task: str, tables: dict[str, Handle], receipt: dict[str, Any]) -> Result:
    return Result(task, receipt, {name: ref for name, ref in tables.items() if receipt["rows"].get(name)})


def _disagreement(answers: Sequence[Any]) -> TaskError | None:
    """What is wrong where ranks that ran the same task made other rows than the first."""
    receipt, *others = answers
    for rank, rows in enumerate(others, 1):
        if rows != receipt["rows"]:
            return TaskError(f"rank {rank} made other rows, {rows}, than rank 0, {receipt['rows']}", recycle=True)
    return None


class RayFleet:
    """Groups on the connected Ray cluster. Answers come to ``told``, from a thread of Ray's, as they arrive.

    ``patience``: seconds that a rank waits for the others of its group.
    """

    def __init__(self, make_worker: Callable[[Place], Worker], shape: Shape, *, name: str, patience: float) -> None:
        self.shape, self.namespace, self.patience = shape, name, patience
        self.make_worker = ray.put(ray.cloudpickle.dumps(make_worker))
        self.rank = ray.remote(max_restarts=0, max_task_retries=0)(Rank)
        self.told: SimpleQueue[tuple[_Question, Future[Any]]] = SimpleQueue()
        self._failing: deque[tuple[float, _Question]] = deque()
        self._addresses: dict[str, str] = {}
        self._grows = resources.can_grow()
        self._counted = float("-inf"), 0

    @property
    def side_by_side(self) -> int:
        return self.shape.side_by_side

    def launch(self, name: str) -> Group:
        return RayGroup(name, self)

    def wait(self, seconds: float) -> list[Group]:
        end = time.monotonic() + seconds
        while True:
            until = min(end, self._failing[0][0]) if self._failing else end
            found = [group for group in self._arrived(until) if group is not None]
            while self._failing and self._failing[0][0] <= time.monotonic():
                question = self._failing.popleft()[1]
                if question.group.question is question and question.left:
                    question.left = 0
                    found.append(question.group)
            if found or time.monotonic() >= end:
                return found

    def _arrived(self, until: float) -> list[Group | None]:
        """Wait for one answer, then take whatever else is there by now."""
        found: list[Group | None] = []
        try:
            found.append(self._take(*self.told.get(timeout=max(0.0, until - time.monotonic()))))
            while True:
                found.append(self._take(*self.told.get_nowait()))
        except Empty:
            return found

    def _take(self, question: _Question, answer: Future[Any]) -> Group | None:
        """The group whose question is answered by this, if it is."""
        if question.group.question is not question or question.left == 0:
            return None  # it was ended, or given up already
        question.left -= 1
        if self._is_everybodys(answer.exception()) and not question.failed:
            question.failed = True
            self._failing.append((time.monotonic() + _GRACE_SECONDS, question))
        if question.left:
            return None
        if question.then is not None and not question.failed:
            question.then([answer.result() for answer in question.answers])
            return None
        return question.group

    def _is_everybodys(self, error: BaseException | None) -> bool:
        """Whether the others of the group may wait for a rank that failed like this."""
        return error is not None and (not self.shape.own_tasks or ends_group(error))

    def capacity(self) -> int | None:
        if self._grows:
            return None
        if time.monotonic() - self._counted[0] > _COUNT_SECONDS:
            self._counted = time.monotonic(), resources.ranks_fit(resources.nodes(), self.shape) // self.shape.ranks
        return self._counted[1]

    def can_write(self) -> bool:
        return float(ray.available_resources().get("CPU", 0.0)) >= 1

    def wants(self, groups: int) -> str:
        need = "1 group needs" if groups == 1 else f"{groups} groups need"
        return (
            f"{need} {self.shape}{' each' if groups > 1 else ''}; the cluster has {resources.told(resources.nodes())}"
        )

    def address_of(self, node: str) -> str:
        """The IP address of a node, by its id."""
        if node not in self._addresses:
            self._addresses = {found["NodeID"]: found["NodeManagerAddress"] for found in ray.nodes()}
        return self._addresses.get(node, node)
