"""Repeats: effects computed a second time under another rounding. The distance of both outcomes is what rounding does.

Identity worlds show less: they share nearly all rounding with their clean token, and their KL is quadratic in what is
left, while that of a changed world is linear. A repeat shares nothing: the clean tokens, their keys and values and the
baseline are computed again too, from the first layer to the logits.

Shapes: P effects, N repeats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, replace

import torch

from audit.engine.result import Key, Repeats, Request, Result, keys_of
from audit.observations.hashing import hash_words, token_key
from audit.outcomes import Outcomes

_REPEATED = 2  # sets the hash apart from those of draws


def choose(result: Result, request: Request) -> dict[int, dict[Key, int]]:
    """The effects to be repeated, by layer: what they are, and their places among the outcomes.

    Candidates are the effects of the first intervention on routed experts at every ``identity_every``-th audited token.
    In token scope a hash of (seed, sequence, position, layer) takes one per token. In sequence scope it takes one world
    per sequence; all that is read of it is repeated.
    """
    first = next((i for i in request.interventions if i.target.selection != "shared"), None)
    controls = request.rows_M[:: request.identity_every]
    starts = torch.tensor([0, *(len(s) for s in request.sequences)], device=controls.device).cumsum(0)
    candidates: dict[int, dict[int, list[tuple[Key, int]]]] = defaultdict(lambda: defaultdict(list))
    place = 0
    for effect in result.effects:
        worlds = effect.worlds
        if not worlds.identity and worlds.intervention == first:
            at_N = torch.nonzero(torch.isin(worlds.parent_P, controls)).flatten()
            among = row_N = worlds.parent_P[at_N]
            if request.scope == "sequence":
                among = starts[torch.searchsorted(starts, row_N, right=True) - 1]
            keys = keys_of(worlds[at_N], effect.experts_PK[at_N])
            for one, key, own in zip(among.tolist(), keys, (at_N + place).tolist(), strict=True):
                candidates[effect.layer][one].append((key, own))
        place += len(worlds)
    return {layer: _drawn(request, layer, groups) for layer, groups in candidates.items()}


def _drawn(request: Request, layer: int, groups: Mapping[int, list[tuple[Key, int]]]) -> dict[Key, int]:
    row_N = torch.tensor(list(groups), device=request.rows_M.device)
    token_N = token_key(request.token_T[0][row_N], request.token_T[1][row_N])
    number_N = hash_words(_REPEATED, request.seed, layer, token_N) & torch.iinfo(torch.int64).max
    chosen: dict[Key, int] = {}
    for number, group in zip(number_N.tolist(), groups.values(), strict=True):
        if request.scope == "token":
            worlds = [[candidate] for candidate in sorted(group)]
        else:
            by_world: dict[tuple[int, int], list[tuple[Key, int]]] = defaultdict(list)
            for candidate in sorted(group):
                by_world[candidate[0].expert, candidate[0].draw].append(candidate)
            worlds = list(by_world.values())
        chosen.update(worlds[number % len(worlds)])
    return chosen


def request_again(request: Request, chosen: Mapping[int, Mapping[Key, int]]) -> Request:
    """The request that computes just the chosen effects."""
    rows = sorted({key.row for keys in chosen.values() for key in keys})
    return replace(
        request,
        rows_M=torch.tensor(rows, device=request.rows_M.device),
        layers=frozenset(chosen),
        interventions=[next(i for i in request.interventions if i.target.selection != "shared")],
        attribution=False,
        redistribution=False,
        only={layer: frozenset(keys) for layer, keys in chosen.items()},
    )


def paired(chosen: Mapping[int, Mapping[Key, int]], again: Result) -> Repeats:
    """The outcomes of ``again`` beside the places of the effects they repeat."""
    places, rows, first = list[int](), list[int](), 0
    for effect in again.effects:
        for number, key in enumerate(keys_of(effect.worlds, effect.experts_PK)):
            if key in chosen[effect.layer]:
                places.append(chosen[effect.layer][key])
                rows.append(first + number)
        first += len(effect.worlds)
    return Repeats(
        chosen=[place for keys in chosen.values() for place in keys.values()],
        found=places,
        outcomes=Outcomes(*(getattr(again.outcomes, f.name)[rows] for f in fields(Outcomes))),
    )
