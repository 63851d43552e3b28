"""Ranks for tests: processes that meet over gloo and run one function after another together."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

SECONDS = 300.0  # for one function on all ranks, imports of its module included, beside other tests


class Failed(str):
    """What one rank's function raised: its traceback."""


class Ranks:
    """``ranks`` processes that stay, so that their imports are paid once.

    :meth:`each` calls ``function(rank, *args)`` on every rank; the function must be one of a module. Where a rank
    raised, its place in the answer holds a :class:`Failed`. Ranks that do not answer in time are ended, and the call
    raises TimeoutError; the next one starts new ranks.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def each(self, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """The answer of every rank, in order."""
        if not self._processes:
            self._start(seconds)
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._answers(seconds, function.__name__)

    def all(self, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """As :meth:`each`, where no rank may raise."""
        answers = self.each(function, *args, seconds=seconds)
        failed = [f"rank {i}: {answer}" for i, answer in enumerate(answers) if isinstance(answer, Failed)]
        if failed:
            self.end()
            raise AssertionError("\n".join(failed))
        return answers

    def end(self) -> None:
        """End the ranks; they are ours alone."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _start(self, seconds: float) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._store = store  # lives as long as the ranks
        context = multiprocessing.get_context("spawn")
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.ranks, store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._answers(seconds, "start")

    def _answers(self, seconds: float, what: str) -> list[Any]:
        end = time.monotonic() + seconds
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answered = pipe.poll(max(0.0, end - time.monotonic()))
                answers.append(pipe.recv() if answered else None)
            except EOFError:
                answers.append(Failed("the process ended"))
                continue
            if not answered:
                self._kill()
                raise TimeoutError(f"{what}: rank {rank} of {self.ranks} did not answer within {seconds:g} seconds")
        return answers

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self.end()


def _serve(rank: int, ranks: int, port: int, pipe: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS)
    )
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            answer = function(rank, *args)
        except Exception:
            answer = Failed(traceback.format_exc())
        pipe.send(answer)
    torch.distributed.destroy_process_group()
