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

import numpy as np
import torch

from audit.engine.result import Key, Repeats, Request, Result, keys_of
from audit.observations.hashing import hash_words, token_key
from audit.outcomes import Outcomes

Chosen = Mapping[int, Mapping[Key, int]]
"""Effects by layer: what they are, and their places among the outcomes of the result that holds them."""

_REPEATED = 2  # sets the hash apart from those of draws


def choose(result: Result, request: Request) -> Chosen:
    """The effects to be repeated.

    Candidates are the effects of the first intervention on routed experts in every ``identity_every``-th sequence:
    whole sequences, because each needs a clean pass of its own. In token scope a hash of (seed, sequence, position,
    layer) takes one per token. In sequence scope it takes one world per sequence; all that is read of it is repeated.
    """
    first = next((i for i in request.interventions if i.target.selection != "shared"), None)
    rows_N = request.rows_M[request.token_T[0][request.rows_M] % request.identity_every == 0]
    starts = torch.tensor([0, *(len(s) for s in request.sequences)], device=rows_N.device).cumsum(0)
    candidates: dict[int, dict[int, list[tuple[Key, int]]]] = defaultdict(lambda: defaultdict(list))
    place = 0
    for effect in result.effects:
        worlds = effect.worlds
        if not worlds.identity and worlds.intervention == first:
            at_N = torch.nonzero(torch.isin(worlds.parent_P, rows_N)).flatten()
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


def request_again(request: Request, chosen: Chosen) -> tuple[Request, Chosen]:
    """The request that computes just the chosen effects, of their sequences alone; and they as it names them."""
    rows = sorted({key.row for keys in chosen.values() for key in keys})
    starts = np.cumsum([0, *(len(s) for s in request.sequences)])
    kept = np.unique(np.searchsorted(starts, rows, side="right") - 1)
    before = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in kept])  # rows as they were
    after = {int(row): place for place, row in enumerate(before)}
    renamed = {
        layer: {key._replace(row=after[key.row]): place for key, place in keys.items()}
        for layer, keys in chosen.items()
    }
    device = request.rows_M.device
    before_T = torch.from_numpy(before).to(device)
    again = replace(
        request,
        sequences=[request.sequences[number] for number in kept],
        rows_M=torch.tensor([after[row] for row in rows], device=device),
        token_T=(request.token_T[0][before_T], request.token_T[1][before_T]),
        layers=frozenset(chosen),
        interventions=[next(i for i in request.interventions if i.target.selection != "shared")],
        attribution=False,
        redistribution=False,
        only={layer: frozenset(keys) for layer, keys in renamed.items()},
    )
    return again, renamed


def paired(chosen: Chosen, again: Result) -> Repeats:
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
