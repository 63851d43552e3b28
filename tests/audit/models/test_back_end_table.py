"""Every family on every back end: verified against the model in one piece, or refused; never a wrong number.

With ``--full`` the whole table is measured and written to the end of docs/models.md.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import RECURRENT, SWEEP, build, config_of, texts
from shard_ranks import Ranks

from audit.engine import Engine
from audit.engine.validate import validate
from audit.interventions import Intervention
from audit.models import ModelError, MoEModel, prepare
from audit.models.memory import Backend
from audit.models.shards.backends import open_shard
from audit.models.shards.division import divide_module, skeleton
from audit.models.shards.library_parallel import load_parallel
from audit.models.shards.offloaded import Offloaded, keep
from audit.models.sources import Reading

DIVIDED: tuple[Backend, ...] = ("deepspeed_zero3", "deepspeed_tp", "transformers_tp")
COLUMNS: tuple[Backend, ...] = ("accelerate", *DIVIDED)
DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"
HEADING = "## Families and back ends\n"
CPU = torch.device("cpu")
ALWAYS = ("mixtral",)
FAMILIES = [pytest.param(f, marks=() if f in ALWAYS else pytest.mark.full) for f in (*SWEEP, *RECURRENT)]


def held(backend: Backend, family: str, rank: int = 0, ranks: int = 1, folder: str = "") -> MoEModel:
    """The family's random model as the back end holds it, validated; transformers_tp reads it from a folder."""
    shard: Any = open_shard(backend, CPU, rank=rank, ranks=ranks)
    if backend == "transformers_tp":
        module = load_parallel(Reading(source=folder, device="cpu"), shard)[0]
    else:
        module = build(family, dtype=torch.float32) if rank == 0 else skeleton(config_of(family), dtype=torch.float32)
    if isinstance(shard, Offloaded):
        keep(module.eval().requires_grad_(False), shard, CPU)
    elif backend in ("deepspeed_zero3", "deepspeed_tp"):
        module = divide_module(module, shard, CPU)
    with shard.task():
        return validate(prepare(module, linear="torch", shard=shard))


def effects(model: MoEModel) -> pd.DataFrame:
    engine = Engine(model, memory=2**31, micro_batch=64)
    asked = {"layers": model.description.moe_layers[:2], "interventions": [Intervention("zero")]}
    with model.shard.task():
        return engine.measure(texts((12,)), [np.array([3, 8])], **asked).effects.to_pandas()


def verdict(rank: int, backend: Backend, family: str, ranks: int, folder: str = "") -> tuple[str, list[str]]:
    """What this rank can say of the family on the back end, and the back end's notes."""
    try:
        model = held(backend, family, rank, ranks, folder)
    except ModelError as error:
        return f"refused: {error}", []
    alone, found = effects(held("single", family)), effects(model)
    assert len(found) == len(alone) > 0
    numbers = [name for name in alone if alone[name].dtype.kind == "f"]
    pd.testing.assert_frame_equal(found.drop(columns=numbers), alone.drop(columns=numbers))
    apart = [np.nanmax(np.abs(found[n] - alone[n])) for n in numbers if alone[n].notna().any()]
    if max(apart) == 0:
        return f"same bits ({model.description.engine})", model.description.notes
    return f"{max(apart):.0e} ({model.description.engine})", model.description.notes


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, str]]]:
    """Family: back end: verdict; written down where all families were asked."""
    found: dict[str, dict[str, str]] = {}
    yield found
    if request.config.getoption("--full") and len(found) == len(FAMILIES):
        before, heading, _ = DOCUMENT.read_text(encoding="utf-8").partition(HEADING)
        assert heading, "docs/models.md has no heading to write below"
        DOCUMENT.write_text(before + HEADING + section(found), encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exact_on_a_back_end_or_refused_by_it(
    pair: Ranks, rows: dict[str, dict[str, str]], family: str, tmp_path: Path
) -> None:
    build(family, dtype=torch.float32).save_pretrained(tmp_path)
    told = {"accelerate": verdict(0, "accelerate", family, 1)[0]}
    for backend in DIVIDED:
        answers = pair.all(verdict, backend, family, 2, str(tmp_path))
        assert len({text.startswith("refused") for text, _ in answers}) == 1
        text, notes = answers[0]
        whole = sorted({note.split(" is whole", 1)[0] for note in notes if " is whole on every rank" in note})
        told[backend] = text + (f"; whole on every rank: {', '.join(whole)}" if whole else "")
    rows[family] = told
    for backend in ("accelerate", "deepspeed_zero3"):
        assert told[backend].startswith("same bits"), (backend, told[backend])
    for backend in ("deepspeed_tp", "transformers_tp"):
        text = told[backend]
        most = 1e-5 if "(sweep)" in text else 3e-5  # whole forwards take differences of logits that rounded apart
        assert text.startswith(("refused: model", "same bits")) or float(text.split()[0]) <= most, (backend, text)


def section(rows: dict[str, dict[str, str]]) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed", "accelerate")
    )
    lines = [
        "Written by `make test-all` (tests/audit/models/test_back_end_table.py). Tiny random models of every family, "
        "float32, on the CPU, two ranks over gloo where a model is divided;",
        f"{versions}. Each cell compares every number of every effect with the model in one piece: `same bits`, or the "
        "largest difference",
        "(nats, or the outcome's own unit), which verifies the back end for the family, with what measured them in "
        "brackets; or why the back end refuses it.",
        "No row was measured on a GPU.",
        "",
        f"| family | {' | '.join(COLUMNS)} |",
        f"|{'---|' * (1 + len(COLUMNS))}",
    ]
    lines += [f"| {family} | {' | '.join(told[backend] for backend in COLUMNS)} |" for family, told in rows.items()]
    return "\n".join(lines) + "\n"
