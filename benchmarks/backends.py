"""Effects per second, seconds to load, bytes and gathers of every back end, side by side in one run.

    python -m benchmarks.backends                                       # the OLMoE-shaped model on this machine's CPU
    python -m benchmarks.backends --device cuda --model olmoe_1b_7b     # full size, random weights in bfloat16
    python -m benchmarks.backends --markdown benchmarks/2026-01-01_backends.md

On a CPU every process has one thread, so two ranks are to be compared with two bare processes. Ranks with tasks of
their own measure a sequence each; ranks that share a task measure one together. The second of two sweeps is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from audit.corpus import TokenSequence
from audit.engine import Engine
from audit.engine.cost import Sizes
from audit.engine.validate import validate
from audit.interventions import Intervention
from audit.models.catalogue import named_model
from audit.models.loading import load_model
from audit.models.memory import Backend, Offload
from audit.models.outline import configuration_of
from audit.models.shards.backends import open_shard
from benchmarks.memory import peak_resident
from benchmarks.model import olmoe_shaped
from benchmarks.products import product_rates

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Setup:
    """One line of the table."""

    backend: Backend
    processes: int
    offload: Offload = "none"
    bare: bool = False  # processes that know nothing of each other


SETUPS = (
    Setup("single", 1),
    Setup("single", 2, bare=True),
    Setup("accelerate", 1, "nvme"),
    Setup("deepspeed_zero3", 1),
    Setup("deepspeed_zero3", 2),
    Setup("deepspeed_zero3", 2, "cpu"),
    Setup("deepspeed_tp", 2),
)


@dataclass(frozen=True, slots=True)
class Found:
    """What one process found. ``gathers``: of a layer in one sweep, the most there were."""

    load_seconds: float
    effects: int
    seconds: float
    useful_flops: float
    weight_bytes: int
    gathers: int
    peak_bytes: int


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="a name of configs/models; without it the OLMoE-shaped benchmark model")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence, all of them audited")
    parser.add_argument("--memory", type=float, help="GiB of the engine's budget (default: what it takes by itself)")
    parser.add_argument("--only", action="append", help="a back end; may be repeated")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as folder:
        setups = [s for s in SETUPS if given.only is None or s.backend in given.only]
        if given.device == "cuda":
            setups = [s for s in setups if s.processes <= torch.cuda.device_count()]
        checkpoint = write_checkpoint(given.model, Path(folder) / "checkpoint", given.device)
        rate = product_rate(given.device)
        rows = []
        for setup in setups:
            rows.append(row(setup, run(setup, given, checkpoint, folder), rate))
            print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
    table = pd.DataFrame(rows).T.to_string(header=False)
    name = given.model or "OLMoE-shaped (16 layers, 64 experts, top-8, d 256)"
    text = f"{name}, {given.tokens} tokens a sequence, {given.device}, {rate / 1e9:,.0f} GFLOP/s of matrix products"
    command = f"`python -m benchmarks.backends {' '.join(arguments)}`"
    print(f"\n{text}\n\n{table}")
    if given.markdown:
        given.markdown.write_text(f"# Back ends\n\n{command}\n{text}\n\n```\n{table}\n```\n", encoding="utf-8")
    return 0


def row(setup: Setup, found: list[Found], rate: float) -> dict[str, Any]:
    shared = setup.backend == "deepspeed_tp"
    counted = found[:1] if shared else found
    seconds = max(one.seconds for one in found)
    flops = sum(one.useful_flops for one in counted) / seconds
    where = "" if setup.offload == "none" else f", offload {setup.offload}"
    processes = f"{setup.processes} {'bare processes' if setup.bare else 'ranks' if setup.processes > 1 else 'process'}"
    return {
        "back end": f"{setup.backend}{where}",
        "processes": processes,
        "effects/s": round(sum(one.effects for one in counted) / seconds),
        "share of matrix products": f"{flops / rate:.0%}",
        "seconds to load": round(max(one.load_seconds for one in found), 1),
        "MiB of weights, most on a rank": round(max(one.weight_bytes for one in found) / MIB, 1),
        "gathers per layer and sweep": max(one.gathers for one in found),
        "peak MiB of a process": round(max(one.peak_bytes for one in found) / MIB),
    }


def run(setup: Setup, given: argparse.Namespace, checkpoint: str, folder: str) -> list[Found]:
    """Every process's figures."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    pipes, processes = [], []
    for rank in range(setup.processes):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (setup, rank, store.port, vars(given), checkpoint, folder, theirs)
        process = context.Process(target=_process, args=arguments, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [Found(**pipe.recv()) for pipe in pipes]
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def _process(
    setup: Setup, rank: int, port: int, given: dict[str, Any], checkpoint: str, folder: str, pipe: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    device = torch.device(given["device"], rank) if given["device"] == "cuda" else torch.device("cpu")
    ranks = 1 if setup.bare else setup.processes
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    if ranks > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    start = time.perf_counter()
    shard = open_shard(
        setup.backend, device, rank=0 if setup.bare else rank, ranks=ranks, offload=setup.offload, folder=folder
    )
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    with shard.task():
        model = validate(load_model(checkpoint, dtype=dtype, device=str(device), linear="torch", shard=shard))
    loaded = time.perf_counter() - start
    memory = given["memory"]
    engine = Engine(model, memory=None if memory is None else int(memory * 2**30))
    barrier = _barrier(store, setup.processes)
    own = shard.traits.own_tasks or setup.bare
    sequence = _sequence(given["tokens"], model.description.vocabulary, seed=rank if own else 0)
    for _ in range(2):  # the first one makes kernels and buffers
        before = dict(shard.gathers)
        barrier()
        start = time.perf_counter()
        with shard.task():
            found = engine.measure(
                [sequence], [np.arange(given["tokens"])], layers=model.description.moe_layers, interventions=ZERO
            )
        seconds = time.perf_counter() - start
    effects = found.effects.num_rows
    gathered = max((count - before.get(layer, 0) for layer, count in shard.gathers.items()), default=0)
    peak = peak_resident()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    pipe.send(
        asdict(
            Found(
                loaded,
                effects,
                seconds,
                useful(engine.sizes, given["tokens"]),
                shard.weight_bytes(model.layers, model.module),
                gathered,
                peak,
            )
        )
    )
    barrier()


ZERO = [Intervention("zero")]


def useful(sizes: Sizes, tokens: int) -> float:
    """Multiplications and additions that clean tokens and virtual tokens need, counted once."""
    per_row = [2.0 * active + 2.0 * tokens * sizes.hidden for active in sizes.active]
    flops = tokens * sum(per_row)
    for layer in sorted(sizes.moe_layers):
        flops += tokens * sizes.top_k * (sum(per_row[layer + 1 :]) + 2.0 * sizes.hidden * sizes.vocabulary)
    return flops


def product_rate(device: str, size: int = 2048) -> float:
    """FLOP/s of one large matrix product: one thread in float32 on a CPU, bfloat16 on a GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    side, dtype = (size, torch.float32) if device == "cpu" else (4 * size, torch.bfloat16)
    rates = product_rates(lambda a, b: (a @ b)[0, 0].item(), side, device=device, dtype=dtype)
    torch.set_num_threads(threads)
    return rates.best


def write_checkpoint(name: str | None, folder: Path, device: str) -> str:
    """A checkpoint with random weights: of the benchmark model, or of a named one at full size."""
    if name is None:
        olmoe_shaped(sd=0.08).save_pretrained(folder)
        return str(folder)
    described = named_model(name)
    if described is None:
        raise SystemExit(f"--model: {name!r} is not in configs/models")
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(configuration_of(described.fields(), name), dtype=torch.bfloat16)
    module.save_pretrained(folder)
    del module
    if device == "cuda":
        torch.cuda.empty_cache()  # the processes that are measured need it
    return str(folder)


def _sequence(tokens: int, vocabulary: int, seed: int) -> TokenSequence:
    ids = np.random.default_rng(seed).integers(3, vocabulary, tokens)
    zeros = np.zeros(tokens, np.int32)
    # Number 1 is no sequence of which effects are repeated, so that a measurement is one sweep.
    return TokenSequence(1, 0, "random", ids, zeros, zeros.astype(np.bool_))


def _barrier(store: Any, processes: int) -> Callable[[], None]:
    """Waits until all processes call it; of bare processes too."""
    times = iter(range(1, 10**9))

    def wait() -> None:
        n = next(times)
        store.add(f"at-{n}", 1)
        while store.add(f"at-{n}", 0) < processes:
            time.sleep(0.005)

    return wait


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
