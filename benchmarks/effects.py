"""Effects per second: one full forward per effect against the sweep, beside the machine's own matrix-product rate.

    python -m benchmarks.effects                        # T = 256 and 512, both initialisations, two threads
    python -m benchmarks.effects --tokens 256 --threads 1 --markdown benchmarks/2026-01-01_effects.md

Everything is measured in one process and one run, in turns, because machines are noisy; the table gives the median of
the turns and their extremes. All layers, all active experts and all positions are audited and every outcome is
computed, identity controls and repeats included. Useful operations are counted by ``useful_flops`` below; work the
sweep does twice (a layer entered again at a birth, repeats under another rounding) is not useful.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor

import audit
from audit.corpus import TokenSequence
from audit.engine import Engine
from audit.models import MoEModel
from audit.models.linear import linear, onednn_agrees
from audit.outcomes import Baseline, outcomes_from_logits
from benchmarks.memory import peak_resident
from benchmarks.model import olmoe_shaped
from benchmarks.products import product_rates

WIDE = 0.08
BACK_ENDS = ("eager", "grouped_mm")


def useful_flops(model: MoEModel, T: int, virtual_rows_by_layer: dict[int, int]) -> float:
    """Multiplications and additions of matrix products that the audit of one sequence of T tokens cannot do without."""
    config = model.module.config
    d, K, width, experts = config.hidden_size, config.num_experts_per_tok, config.intermediate_size, config.num_experts
    layers, head = config.num_hidden_layers, 2.0 * d * config.vocab_size
    # Per row and layer: four projections, router, K experts of three matrices, scores and values over T/2 keys.
    row = 2.0 * (4 * d * d + experts * d + 3 * K * width * d) + 2.0 * 2.0 * d * (T + 1) / 2
    virtual = sum(rows * (layers - 1 - layer) * row + rows * head for layer, rows in virtual_rows_by_layer.items())
    return T * (layers * row + head) + virtual


def forward_per_effect(model: MoEModel, ids: Tensor, backend: str, effects: int, seed: int = 0) -> float:
    """Effects per second of the plain way: hook an expert away, run the whole model, compare the prediction."""
    module = model.module
    module.set_experts_implementation(backend)
    module.set_attn_implementation("sdpa")
    generator = np.random.default_rng(seed)
    T = len(ids)
    with torch.inference_mode():
        clean = module(input_ids=ids[None], use_cache=False).logits[0]
        start = time.perf_counter()
        for _ in range(effects):
            layer, position, slot = (
                int(generator.integers(len(model.layers))),
                int(generator.integers(T)),
                int(generator.integers(8)),
            )

            def remove(
                _: object, args: tuple[Tensor, Tensor, Tensor], position: int = position, slot: int = slot
            ) -> tuple[Tensor, Tensor, Tensor]:
                weights = args[2].clone()
                weights[position, slot] = 0
                return args[0], args[1], weights

            hook = model.sites[layer].experts.register_forward_pre_hook(remove)
            logits = module(input_ids=ids[None], use_cache=False).logits[0, position]
            hook.remove()
            target = ids[position + 1 : position + 2] if position + 1 < T else torch.tensor([-1])
            outcomes_from_logits(
                logits[None], Baseline.of(clean[position : position + 1], target), torch.zeros(1, dtype=torch.long)
            )
        seconds = time.perf_counter() - start
    module.set_attn_implementation("moe_audit")
    module.set_experts_implementation("eager")
    return effects / seconds


def nnsight_per_effect(model: MoEModel, ids: Tensor, effects: int) -> float | None:
    """Effects per second of nnsight, ablations batched in one trace; None where nnsight is not installed."""
    if importlib.util.find_spec("nnsight") is None:
        return None
    nnsight = importlib.import_module("nnsight")

    traced = nnsight.NNsight(model.module)
    batch = ids[None].repeat(effects, 1)
    T = len(ids)
    model.module.set_attn_implementation("sdpa")
    start = time.perf_counter()
    with torch.inference_mode(), traced.trace(input_ids=batch, use_cache=False):
        weights = traced.model.layers[0].mlp.experts.inputs[0][2]
        for number in range(effects):
            weights[number * T + T // 2, number % 8] = 0
        traced.lm_head.output.save()
    seconds = time.perf_counter() - start
    model.module.set_attn_implementation("moe_audit")
    return effects / seconds


def sequence_of(T: int, vocabulary: int, number: int = 0) -> TokenSequence:
    """T random tokens as sequence ``number``."""
    ids = torch.randint(0, vocabulary, (T,), generator=torch.Generator().manual_seed(number)).numpy()
    return TokenSequence(number, number, "random", ids, np.zeros(T, dtype=np.int32), np.zeros(T, dtype=np.bool_))


def compare(T: int, sd: float | None, threads: int, sampled: int, turns: int) -> dict[str, object]:
    """One column of the table. Everything is timed once per turn; ratios are taken within a turn, of which the median
    and the extremes are given.
    """
    torch.set_num_threads(threads)
    module = olmoe_shaped(sd)
    model = audit.prepare(module)
    # Sequence 0 has repeats, 1 has none; one in ``identity_every`` is like the former.
    sequences = [sequence_of(T, module.config.vocab_size, number) for number in (0, 1)]
    ids = torch.from_numpy(sequences[0].token_ids)
    engine = Engine(model, memory=4 * 2**30)
    zero = [audit.Intervention("zero")]
    layers = list(range(len(model.layers)))
    engine.measure(sequences[:1], [np.arange(0, T, 8)], layers=layers, interventions=zero)  # warm up
    products = {"torch": torch.matmul} | ({"oneDNN": linear} if onednn_agrees() else {})
    rounds: list[dict[str, float]] = []  # seconds of the sweeps, rates of everything else
    for turn in range(turns):
        found = {back_end: forward_per_effect(model, ids, back_end, sampled, turn) for back_end in BACK_ENDS}
        for name, product in products.items():
            found[f"{name} sustained"], found[f"{name} best"] = product_rates(product)
        for name, sequence in zip(("repeated", "once"), sequences, strict=True):
            start = time.perf_counter()
            measured = engine.measure([sequence], [np.arange(T)], layers=layers, interventions=zero)
            found[name] = time.perf_counter() - start
        rounds.append(found)
    timed = pd.DataFrame(rounds)
    timed["seconds"] = (timed["repeated"] + (engine.identity_every - 1) * timed["once"]) / engine.identity_every
    effects = measured.effects.to_pandas()
    flops = useful_flops(model, T, effects.groupby("layer").size().to_dict())
    plain, rate = timed[list(BACK_ENDS)].median().idxmax(), flops / timed["seconds"]
    deepest = effects[(effects["layer"] == layers[-1]) & (effects["unit"] == "expert")]
    batched = nnsight_per_effect(model, ids, 16)
    shares = {}
    for product in [f"{name} {kind}" for name in products for kind in ("sustained", "best")]:
        shares[f"{product} GFLOP/s"] = spread(timed[product] / 1e9, ".0f")
        shares[f"share of {product}"] = spread(rate / timed[product], ".0%")
    return {
        "T": T,
        "weights": "default" if sd is None else f"sd {sd}",
        "threads": threads,
        "effects": len(effects),
        "seconds": spread(timed["seconds"], ".2f"),
        "repeats cost": f"{(timed['seconds'] / timed['once']).median() - 1:.1%}",
        "effects/s": spread(len(effects) / timed["seconds"], ",.0f"),
        "one forward each, effects/s": f"{spread(timed[plain], '.1f')} {plain}",
        "ratio": spread(len(effects) / timed["seconds"] / timed[plain], ",.0f"),
        "nnsight effects/s": "not installed" if batched is None else f"{batched:.1f}",
        "useful GFLOP/s": spread(rate / 1e9, ".0f"),
        **shares,
        "linear, experts": f"{model.linear_path}, {model.experts_path}",
        "micro-batch": measured.micro_batch,
        "experts used, deepest layer": int(deepest["expert"].nunique()),
        "median KL": f"{effects.loc[effects['unit'] == 'expert', 'kl'].median():.1e}",
        "floor KL (max)": f"{effects.loc[effects['unit'] == 'identity', 'kl'].max():.1e}",
    }


def spread(values: pd.Series[float], form: str) -> str:
    """The median over the turns, and the extremes."""
    return f"{values.median():{form}} ({values.min():{form}} to {values.max():{form}})"


def peak_memory(T: int, budget: int, threads: int) -> None:
    """Audit four sequences of T tokens in ``budget`` bytes and print the peak resident memory of this process."""
    torch.set_num_threads(threads)
    model = audit.prepare(olmoe_shaped(WIDE))
    engine = Engine(model, memory=budget)
    sequences = [sequence_of(T, 8192, seed) for seed in range(4)]
    start = time.perf_counter()
    measured = engine.measure(
        sequences, [np.arange(T)] * 4, layers=range(16), interventions=[audit.Intervention("zero")]
    )
    seconds = time.perf_counter() - start
    peak = peak_resident()
    print(f"{T},{budget},{peak},{len(measured.effects)},{seconds:.2f},{measured.micro_batch},{measured.halvings}")


def memory_table(threads: int) -> pd.DataFrame:
    """Peak memory and time in fresh processes, over budgets and lengths."""
    rows = []
    for T, budget in ((256, 1.25), (512, 1.25), (512, 1.5), (512, 2.0), (1024, 1.5)):
        command = [
            sys.executable,
            "-m",
            "benchmarks.effects",
            "--peak",
            str(T),
            str(int(budget * 2**30)),
            "--threads",
            str(threads),
        ]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
        T_, budget_, peak, effects, seconds, micro_batch, halvings = (float(x) for x in out.split(","))
        rows.append(
            {
                "T": int(T_),
                "budget MiB": round(budget_ / 2**20),
                "peak MiB": round(peak / 2**20),
                "peak / budget": f"{peak / budget_:.2f}",
                "effects": int(effects),
                "effects/s": round(effects / seconds),
                "micro-batch": int(micro_batch),
                "halvings": int(halvings),
            }
        )
    return pd.DataFrame(rows)


def growth_table(threads: int) -> pd.DataFrame:
    """Time over the number of tokens, in sequences of 128."""
    torch.set_num_threads(threads)
    engine = Engine(audit.prepare(olmoe_shaped(WIDE)), memory=2 * 2**30)
    rows = []
    for number in (1, 2, 4, 8):
        sequences = [sequence_of(128, 8192, seed) for seed in range(number)]
        start = time.perf_counter()
        measured = engine.measure(
            sequences, [np.arange(128)] * number, layers=range(16), interventions=[audit.Intervention("zero")]
        )
        seconds = time.perf_counter() - start
        rows.append(
            {
                "tokens": 128 * number,
                "effects": len(measured.effects),
                "seconds": round(seconds, 2),
                "ms per token": round(1e3 * seconds / 128 / number, 1),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sampled", type=int, default=16, help="full forwards timed per experts back end and turn")
    parser.add_argument("--turns", type=int, default=5, help="how often everything is timed, in turns")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--peak", type=int, nargs=2, metavar=("T", "BYTES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.peak:
        peak_memory(*arguments.peak, arguments.threads)
        return
    rows = [
        compare(T, sd, arguments.threads, arguments.sampled, arguments.turns)
        for T in arguments.tokens
        for sd in (WIDE, None)
    ]
    speed = pd.DataFrame(rows).set_index("T").T
    sections = {"Speed": speed, "Memory": memory_table(arguments.threads), "Growth": growth_table(arguments.threads)}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {arguments.threads} threads, "
    versions += f"Python {platform.python_version()}, {platform.machine()}"
    text = f"`python -m benchmarks.effects {' '.join(sys.argv[1:])}`\n{versions}\n\n"
    text += (
        "\n\n".join(
            f"## {name}\n\n```\n{table.to_string(index=name == 'Speed')}\n```" for name, table in sections.items()
        )
        + "\n"
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
