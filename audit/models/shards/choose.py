"""Which back end holds a model: decided from sizes before anything is loaded, with the reason in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from audit.models.discovery import ModelError, Site, whole_shape
from audit.models.memory import BACKENDS, OFFLOADS, Backend, Offload, Share, Weights, share_of
from audit.models.shards.machine import NO_FOLDER, Machine

ROOM = 1.2  # a device's memory over the weights on it: the rest is for the rows of a sweep
MOST_RANKS = 1024
_CHECK: tuple[Backend, Offload] = ("transformers_tp", "none")  # has no gate of ours: taken where it is named


@dataclass(frozen=True, slots=True)
class Choice:
    """A back end for so many ranks, where it keeps what is not on a device, and the reason, a sentence."""

    backend: Backend
    ranks: int
    offload: Offload
    share: Share
    reason: str


def choose(
    weights: Weights,
    machine: Machine,
    *,
    backend: str = "auto",
    ranks: int = 1,
    offload: str = "auto",
    disk: bool = False,
    undivided: str | None = None,
) -> Choice:
    """The back end that holds these weights in ``ranks`` processes on this machine.

    ``disk``: whether layers may be kept on a local disk. ``undivided``: why the experts of this model cannot be
    divided; None where they can. What is named is taken, what is ``auto`` chosen. Raises ModelError, one sentence,
    where what is named is not possible or the memory too small.
    """
    _require_known(backend, ranks, offload)
    if offload == "nvme" and not disk:
        raise ModelError(NO_FOLDER)
    _require_together(weights, backend, ranks, offload, undivided)
    if offload == "cpu" and machine.device == "cpu":
        raise ModelError(
            "model.offload: 'cpu' is not possible where the device is the CPU, whose memory has the layers anyway; use "
            "auto or none, or nvme with model.offload_folder"
        )
    if backend == "accelerate" and machine.device == "cpu" and not disk:
        raise ModelError(
            "model.backend: accelerate keeps its layers on disk where the device is the CPU, and needs "
            "model.offload_folder, a folder on a local disk; name one, or use single"
        )
    refused: list[str] = []
    if backend == "auto" and ranks > 1 and undivided is not None:
        refused.append(undivided)
    if backend == "auto" and ranks > weights.experts:
        refused.append(f"deepspeed_tp divides {weights.experts} experts")
    candidates = _candidates(weights, machine, backend, ranks, offload, disk, undivided)
    # Where all else fails, a back end that was asked for may fill its device to the brim.
    for room in (ROOM,) if backend == "auto" else (ROOM, 1.0):
        for name, place in candidates:
            lacking = lack(weights, machine, name, ranks, place, room)
            if lacking is None:
                share = share_of(weights, name, ranks, place)
                reason = _reason(name, place, share, machine, refused, backend)
                if ranks > 1 and machine.device == "cuda" and lack(weights, machine, "single", 1, "none") is None:
                    reason += "; one device would hold all, so that cluster.ranks: 1 has more groups, and is faster"
                return Choice(name, ranks, place, share, reason)
            refused.append(f"{label(name, place)} {lacking}")
    refused = refused[-len(candidates) :] if backend != "auto" else refused
    why = f" ({'; '.join(refused)})" if refused else ""
    raise ModelError(
        f"model.backend: {backend} cannot hold {gib(weights.total)} of weights with cluster.ranks: {ranks}{why}; "
        f"{_remedy(weights, machine, backend, ranks, undivided)}"
    )


def lack(
    weights: Weights, machine: Machine, backend: Backend, ranks: int, offload: Offload, room: float = ROOM
) -> str | None:
    """What is too small for this share and its ``room``, completing "it ..."; None where all fits."""
    share = share_of(weights, backend, ranks, offload)
    held = share.beside_rows(machine.device)
    needed = held * room
    if backend == "deepspeed_tp" and ranks > 1:  # every layer comes whole to be divided, the last one beside all shares
        needed = max(needed, held + weights.largest_layer)
    if needed > machine.memory:
        return f"needs {gib(needed)} of a device's {gib(machine.memory)}"
    # One process reads the checkpoint into its host's memory and hands out the layers; only one that keeps them on its
    # disk writes each as it is read.
    reading = 0 if (backend, offload) == ("accelerate", "nvme") else weights.total
    if max(reading, share.host * ranks) > machine.host:
        return f"needs {gib(max(reading, share.host * ranks))} of the host's {gib(machine.host)}"
    return None


def ranks_needed(weights: Weights, machine: Machine, backend: Backend, offload: Offload) -> int | None:
    """The fewest ranks whose shares fit, each on a device of ``machine.memory``; None where none do.

    Under deepspeed_tp among those that have as many experts each.
    """
    most = {"single": 1, "accelerate": 1, "deepspeed_tp": weights.experts}.get(backend, MOST_RANKS)
    numbers = (n for n in range(1, most + 1) if backend != "deepspeed_tp" or weights.experts % n == 0)
    return next((n for n in numbers if lack(weights, machine, backend, n, offload) is None), None)


def why_undivided(sites: Mapping[int, Site]) -> str | None:
    """Why the experts of a model cannot be divided over ranks; None where they can."""
    for layer, site in sites.items():
        for name, parameter in site.experts.named_parameters(recurse=False):
            if whole_shape(parameter)[:1] != (site.num_experts,):
                return (
                    f"{name} in layer {layer} is {list(whole_shape(parameter))}, which are not the weights of "
                    f"{site.num_experts} experts one after the other"
                )
    return None


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def label(backend: Backend, offload: Offload) -> str:
    """A back end for people, with where it keeps its layers."""
    return backend if offload == "none" else f"{backend} with offload {offload}"


def _require_known(backend: str, ranks: int, offload: str) -> None:
    for field, value, known in (("backend", backend, BACKENDS), ("offload", offload, OFFLOADS)):
        if value not in ("auto", *known):
            raise ModelError(f"model.{field}: {value!r} is unknown; known are auto, {', '.join(known)}")
    if ranks < 1:
        raise ModelError(f"cluster.ranks: {ranks} is not possible; it takes a whole number of at least 1")


def _require_together(weights: Weights, backend: str, ranks: int, offload: str, undivided: str | None) -> None:
    if backend in ("single", "accelerate") and ranks > 1:
        raise ModelError(
            f"cluster.ranks: {ranks} is not possible with model.backend: {backend}, which is one process; use 1, or "
            "deepspeed_zero3 or deepspeed_tp"
        )
    if backend in ("single", "deepspeed_tp", "transformers_tp") and offload not in ("auto", "none"):
        raise ModelError(
            f"model.offload: {offload!r} is not possible with model.backend: {backend}, which keeps all it has on its "
            "device; use none, or accelerate or deepspeed_zero3"
        )
    if backend == "accelerate" and offload == "none":
        raise ModelError(
            "model.offload: 'none' is not possible with model.backend: accelerate, which keeps its layers elsewhere; "
            "use cpu or nvme, or single"
        )
    if backend != "deepspeed_tp":
        return
    if undivided is not None:
        raise ModelError(f"model.backend: deepspeed_tp is not possible, {undivided}; use deepspeed_zero3")
    if ranks > weights.experts:
        raise ModelError(
            f"cluster.ranks: {ranks} is more than the {weights.experts} experts of a layer, which deepspeed_tp "
            f"divides; use at most {weights.experts}, or deepspeed_zero3"
        )


def _candidates(
    weights: Weights,
    machine: Machine,
    backend: str,
    ranks: int,
    offload: str,
    disk: bool,
    undivided: str | None,
) -> list[tuple[Backend, Offload]]:
    """What may be tried, the fastest first."""
    elsewhere: list[Offload] = ["cpu"] if machine.device == "cuda" else []  # on a CPU that is where the layers are
    elsewhere += ["nvme"] if disk else []
    one: list[tuple[Backend, Offload]] = [("single", "none"), *(("accelerate", place) for place in elsewhere)]
    several: list[tuple[Backend, Offload]] = [
        ("deepspeed_tp", "none"),
        *(("deepspeed_zero3", place) for place in ("none", *elsewhere)),
    ]
    if undivided is not None or ranks > weights.experts:
        del several[0]
    if backend == "auto":
        possible = one if ranks == 1 else several
    else:
        possible = [pair for pair in [*one, *several, _CHECK] if pair[0] == backend]
    return [(name, place) for name, place in possible if offload in ("auto", place)]


def _reason(name: Backend, place: Offload, share: Share, machine: Machine, refused: list[str], asked: str) -> str:
    where = {"none": "", "cpu": f", {gib(share.host)} in host memory", "nvme": f", {gib(share.disk)} on disk"}[place]
    each = "one process" if name in ("single", "accelerate") else "each rank"
    holds = f"{each} has {gib(share.device)} of weights on its device of {gib(machine.memory)}{where}"
    because = "it was asked for" if asked != "auto" else "; ".join(refused) or "it is the fastest that fits"
    return f"{label(name, place)}, because {because}: {holds}"


def _remedy(weights: Weights, machine: Machine, backend: str, ranks: int, undivided: str | None) -> str:
    """What would hold these weights."""
    if backend == "single":
        return "use model.backend: auto, which may keep layers elsewhere, or devices with more memory"
    smallest = weights.outside + weights.largest_layer
    if smallest > machine.memory:
        return f"use devices with more than {gib(smallest)}: what lies outside the layers, and one of them"
    if weights.total > machine.host:
        return f"use hosts with at least {gib(weights.total)} of memory, or cluster.ranks: 1 and model.offload_folder"
    if machine.device == "cuda":  # on a CPU ranks share one memory
        several: list[tuple[Backend, Offload]] = [("deepspeed_zero3", "none"), ("deepspeed_zero3", "cpu")]
        if undivided is None:
            several.insert(0, ("deepspeed_tp", "none"))
        for name, place in several:
            needed = ranks_needed(weights, machine, name, place)
            if needed is not None and needed > ranks and backend in ("auto", name):
                return f"use cluster.ranks: {needed}, where {label(name, place)} fits"
    return "use devices with more memory, or model.offload_folder, a folder on a local disk"
