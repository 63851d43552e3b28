"""``moe-audit plan --model``: what a model takes on every back end, from its configuration alone."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import transformers
from pydantic import ByteSize, Field, TypeAdapter, ValidationError

from audit.config import ConfigError
from audit.engine.cost import Sizes, room_for
from audit.models.catalogue import NamedModel, named_model, names
from audit.models.memory import Backend, Offload, Weights, share_of, weights_of
from audit.models.outline import Outline, configuration_of, outline
from audit.models.shards.choose import choose, gib, label, lack, ranks_needed, why_undivided
from audit.models.shards.machine import Machine
from audit.models.sources import DTYPES, read_configuration
from jobs.console import print_table, say

_DEVICE_MEMORY = 80 * 2**30  # of the commonest data-centre GPU
_UNBOUNDED = 2**62  # a host's memory where none is given: what is needed of it is said
_LENGTH = 512  # tokens of a sequence, as corpus.max_tokens has it
_ROWS: tuple[tuple[Backend, Offload], ...] = (
    ("single", "none"),
    ("accelerate", "cpu"),
    ("accelerate", "nvme"),
    ("deepspeed_tp", "none"),
    ("deepspeed_zero3", "none"),
    ("deepspeed_zero3", "cpu"),
    ("deepspeed_zero3", "nvme"),
)


@dataclass(frozen=True, slots=True)
class _Asked:
    model: Outline
    known: NamedModel | None
    dtype: str
    ranks: int
    machine: Machine


def plan_model(given: argparse.Namespace) -> int:
    """Print sizes, back ends and the choice among them. Raises ConfigError or ModelError, one sentence."""
    transformers.utils.logging.set_verbosity_error()
    asked = _asked(given)
    model = asked.model
    weights = weights_of(model.module, model.layers, model.sites)
    sizes = Sizes(model)
    _say_size(asked, weights, sizes)
    undivided = why_undivided(model.sites)
    rows = [_row(asked, weights, backend, offload, undivided) for backend, offload in _ROWS]
    print_table(
        f"What each rank holds, on devices of {gib(asked.machine.memory)}",
        rows,
        caption="device: its share, what lies outside the layers, and the layer that is visited. host and disk: of all "
        f"ranks together; to read the checkpoint one host needs {gib(weights.total)}, but for accelerate on disk. "
        "deepspeed_tp: experts divided, all else counted whole, though what of attention and dense MLPs can be divided "
        "is. effects: virtual tokens of one sweep that removes every active expert of every token of sequences of "
        f"{_LENGTH}. fits: a sixth of the device is left for a sweep; fits from: so many ranks",
        left=("back end",),
    )
    say(choose(weights, asked.machine, ranks=asked.ranks, disk=bool(given.disk), undivided=undivided).reason)
    return 0


def _asked(given: argparse.Namespace) -> _Asked:
    known = named_model(given.model)
    dtype: str
    if known is not None:
        configuration, dtype = configuration_of(known.fields(), given.model), known.dtype
    else:
        configuration = _configuration(given.model)
        dtype = str(getattr(configuration, "dtype", None) or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        dtype = "bfloat16"  # of a quantised checkpoint: what its weights are computed with
    memory = _bytes("--device-memory", given.device_memory)
    host = _bytes("--host-memory", given.host_memory)
    if given.ranks is not None and given.ranks < 1:
        raise ConfigError(f"--ranks: {given.ranks} is not possible; it takes a whole number of at least 1")
    return _Asked(
        model=outline(configuration, source=given.model, dtype=dtype, device="cuda"),
        known=known,
        dtype=dtype,
        ranks=given.ranks or (1 if known is None else known.ranks),
        machine=Machine(
            "cuda", memory or (_DEVICE_MEMORY if known is None else int(known.device_memory)), host or _UNBOUNDED
        ),
    )


def _configuration(name: str) -> Any:
    if name != "demo" and "/" not in name and not Path(name).expanduser().exists():  # models of the hub have an owner
        raise ConfigError(
            f"--model: {name!r} is unknown; name a folder with a checkpoint, a hub model such as "
            f"allenai/OLMoE-1B-7B-0924, or one of {', '.join(names())}"
        )
    return read_configuration(name)


def _bytes(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(TypeAdapter(Annotated[ByteSize, Field(gt=0)]).validate_python(text))
    except ValidationError as error:
        raise ConfigError(f"{option}: {text!r} is no size; it takes more than 0 bytes, such as 80GiB") from error


def _say_size(asked: _Asked, weights: Weights, sizes: Sizes) -> None:
    found, known = asked.model.description, asked.known
    named = found.source if known is None else known.source
    say(
        f"{named}: {found.family}, {found.layers} layers, {len(found.moe_layers)} of them with {found.experts} "
        f"experts, top-{found.top_k}"
    )
    published = "" if known is None else f"; published: {known.published}"
    say(f"parameters: {found.parameters:,} in this configuration{published}")
    if known is not None and known.note:
        say(f"  note: {known.note}")
    if known is not None and (unverified := known.unverified()):
        say(f"  not verified, read in copies only: {', '.join(unverified)}")
    experts, attention, shared, other = (
        sum(getattr(layer, part) for layer in weights.layers) for part in ("experts", "attention", "shared", "other")
    )
    parts = {
        "embedding": weights.embedding,
        "head": weights.head,
        "attention": attention,
        "routers, norms and dense MLPs": other + weights.other,
        "shared experts": shared,
        f"experts ({experts / weights.total:.0%})": experts,
    }
    said = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    say(f"weights in {asked.dtype}: {gib(weights.total)}: {said}")
    say(
        f"gathered layer: {gib(weights.largest_layer)}, the largest; where layers are elsewhere each is fetched once "
        "per sweep"
    )
    say(
        f"a sweep: {sizes.clean_bytes() / 1024:,.1f} KiB per clean token, {sizes.audited_bytes() / 1024:,.1f} KiB per "
        f"audited one, {sizes.virtual_bytes() / 1024:,.1f} KiB per virtual token, "
        f"{sizes.row_bytes(_LENGTH) / 1024:,.1f} KiB per row of a micro-batch"
    )
    if known is not None:
        several = f", {known.ranks} ranks" if known.ranks > 1 else ""
        say(f"meant for: {label(known.backend, known.offload)}{several}, devices of {gib(int(known.device_memory))}")


def _row(
    asked: _Asked, weights: Weights, backend: Backend, offload: Offload, undivided: str | None
) -> dict[str, object]:
    machine = asked.machine
    needed = ranks_needed(weights, machine, backend, offload)
    ranks = 1 if backend in ("single", "accelerate") else asked.ranks if asked.ranks > 1 else max(2, needed or 2)
    share = share_of(weights, backend, ranks, offload)
    try:
        room = room_for(Sizes(asked.model, share.device), machine.memory, _LENGTH)
        fitting = f"{room.rows:,} of {room.tokens:,} tokens"
    except ValueError:
        fitting = "none"
    possible = not (backend == "deepspeed_tp" and (undivided or ranks > weights.experts))
    fits = possible and lack(weights, machine, backend, ranks, offload) is None
    return {
        "back end": backend if offload == "none" else f"{backend}, {offload}",
        "ranks": ranks,
        "device": gib(share.device),
        "host": gib(share.host * ranks) if share.host else "",
        "disk": gib(share.disk * ranks) if share.disk else "",
        "effects": fitting,
        "fits": "yes" if fits else "no",
        "fits from": "" if needed is None or not possible else needed,
    }
