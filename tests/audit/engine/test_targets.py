"""Random and ranked sets of a token's active experts: exact against plain loops, nested, fair, whatever the batch."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import RECURRENT, SWEEP, ready, texts
from scipy.stats import chisquare
from test_exactness import OUTCOMES, large_enough, within, worst_distances

from audit.calibration import Calibration
from audit.engine import Engine
from audit.engine.worlds import Criteria, sequence_cases, worlds_of
from audit.interventions import Intervention, Target
from audit.models import MoEModel

LENGTHS = (11, 6)
POSITIONS = [np.array([0, 4, 9, 10]), np.array([0, 5])]
SEED = 5


def values(model: MoEModel) -> dict[str, dict[int, np.ndarray]]:
    """Two metrics: one with ties, negative and infinite values, one that some experts lack."""
    rng = np.random.default_rng(3)
    tied, partial = {}, {}
    for layer, site in model.sites.items():
        tied[layer] = rng.integers(-1, 2, site.num_experts).astype(float)
        tied[layer][rng.integers(site.num_experts)] = -np.inf
        partial[layer] = rng.normal(size=site.num_experts)
        partial[layer][rng.integers(site.num_experts)] = np.nan
    return {"tied": tied, "partial": partial}


def random(count: int, kind: str = "zero", draws: int = 1, **options: float) -> Intervention:
    return Intervention(kind, Target("random", count=count), draws=draws, **options)  # type: ignore[arg-type]


def ranked(count: int, metric: str, kind: str = "zero", **options: float) -> Intervention:
    return Intervention(kind, Target("ranked", count=count, metric=metric), **options)  # type: ignore[arg-type]


FEW = [random(1, draws=3), random(2, draws=2), ranked(1, "tied"), ranked(2, "partial"), random(1, "reroute")]
EVERY_KIND = [
    random(1, draws=2),
    random(1, "renormalize", draws=2),
    random(2, "reroute"),
    random(1, "mean", draws=2),
    random(1, "resample", draws=2),
    random(2, "scale", factor=-0.5),
    ranked(1, "tied", "renormalize"),
    ranked(2, "tied", "reroute"),
    ranked(2, "tied", "mean"),
    ranked(1, "partial", "resample", draws=2),
    ranked(1, "partial", "scale", factor=2.0),
]


def compare(
    model: MoEModel, scope: str, interventions: list[Intervention], method: str = "auto", all_positions: bool = False
) -> tuple[dict[str, float], pd.DataFrame]:
    """Distances between the engine and the plain loops, and the table of the loops."""
    sequences = texts(LENGTHS, 1, model.description.vocabulary)
    layers = list(model.sites)[::2]
    engine = Engine(model, memory=2**62, micro_batch=23, identity_every=3, seed=SEED, method=method)
    calibration, means, drawn = None, None, None
    if any(i.kind in ("mean", "resample") for i in interventions):
        corpus = texts((17, 9), 77, model.description.vocabulary, first=100)
        calibration = engine.observe(corpus, stored_outputs=6)
        means = {layer: reference.mean_outputs(model, corpus, layer) for layer in layers}
        drawn = stored_outputs(calibration)
    measured = engine.measure(
        sequences,
        POSITIONS,
        layers=layers,
        interventions=interventions,
        scope=scope,  # type: ignore[arg-type]
        all_positions=all_positions,
        calibration=calibration,
        rankings=values(model),
    )
    theirs = reference.effects(
        model,
        sequences,
        [at.tolist() for at in POSITIONS],
        layers,
        interventions,
        scope,
        all_positions,
        means,
        drawn,
        SEED,
        values(model),
    )
    return worst_distances(reference.keyed(measured.effects), theirs), theirs


def known(family: str, interventions: list[Intervention]) -> list[Intervention]:
    """Those for which the plain loops know what the family's router would choose."""
    return [i for i in interventions if family in SWEEP or i.kind != "reroute"]


def stored_outputs(calibration: Calibration):
    def drawn(sequence: int, layer: int, expert: int, position: int, draw: int) -> torch.Tensor:
        one = [torch.tensor([v]) for v in (expert, sequence, position, draw)]
        return calibration.draw(layer, *one, SEED)[0]

    return drawn


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe", "phimoe"])
@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_effects_are_those_of_plain_loops(family: str, scope: str) -> None:
    distances, effects = compare(ready(family, 0), scope, FEW)
    within(distances)
    large_enough(effects)
    targets = effects.index.get_level_values("target")
    assert set(targets) == {"random", "ranked:tied", "ranked:partial"}
    assert (effects.index.get_level_values("draw")[targets != "random"] == -1).all()


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_every_kind_of_intervention(scope: str) -> None:
    distances, effects = compare(ready("mixtral", 1), scope, EVERY_KIND)
    within(distances)
    assert set(effects.index.get_level_values("intervention")) == {i.kind for i in EVERY_KIND}


@pytest.mark.parametrize(
    ("family", "scope"), [("olmoe", "token"), ("granitemoeshared", "sequence"), (next(iter(RECURRENT)), "token")]
)
def test_the_oracle(family: str, scope: str) -> None:
    within(compare(ready(family, 0), scope, known(family, FEW), "oracle")[0])


def test_read_where_nobody_was_removed() -> None:
    """A token that cannot be ranked is left as it is, but its keys and values are not the only ones it reads."""
    distances, effects = compare(ready("olmoe", 0), "sequence", FEW, all_positions=True)
    within(distances)
    untouched = effects[effects.index.get_level_values("experts") == ()]
    assert set(untouched.index.get_level_values("target")) == {"ranked:partial"}
    assert untouched["kl"].max() > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("family", [*SWEEP, *RECURRENT])
def test_every_family(family: str, scope: str) -> None:
    within(compare(ready(family, 0), scope, known(family, [*FEW, *EVERY_KIND]))[0])


# ---- what the choices are like ----


def routing(tokens: int, active: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random routing of many tokens, slots by descending weight."""
    generator = torch.Generator().manual_seed(0)
    weights_TE = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    weights_TK, index_TK = weights_TE.topk(active, dim=1)
    return index_TK, weights_TK


def criteria(tokens: int, seed: int = 0, layer: int = 2, **rankings: torch.Tensor) -> Criteria:
    """Tokens in sequences of 100."""
    at = torch.arange(tokens)
    return Criteria(layer, (at // 100, at % 100), seed, rankings)


def members(intervention: Intervention, tokens: int, active: int, seed: int = 0, layer: int = 2) -> np.ndarray:
    """Slots acted upon [T, R, K]."""
    index_TK, weights_TK = routing(tokens, active, 16)
    found = worlds_of(intervention, torch.arange(tokens), index_TK, weights_TK, criteria=criteria(tokens, seed, layer))
    assert found.parent_P.tolist() == np.repeat(np.arange(tokens), intervention.draws).tolist()
    assert found.draw_P.tolist() == np.tile(np.arange(intervention.draws), tokens).tolist()
    return found.members_PK.numpy().reshape(tokens, intervention.draws, active)


def test_a_larger_random_set_holds_the_smaller_one() -> None:
    sets = [members(random(count, draws=4), 500, 6) for count in range(1, 7)]
    for count, smaller, larger in zip(range(1, 6), sets, sets[1:], strict=False):
        assert (smaller.sum(-1) == count).all()
        assert (larger | smaller).tolist() == larger.tolist()
    assert sets[-1].all()


def test_random_sets_are_uniform() -> None:
    """Every set of 2 of 6 slots as often as any other, and every expert first as often, in each draw."""
    chosen = members(random(2, draws=3), 30_000, 6)
    pairs = {pair: number for number, pair in enumerate(combinations(range(6), 2))}
    for draw in range(3):
        seen = [pairs[tuple(np.flatnonzero(row).tolist())] for row in chosen[:, draw]]
        assert chisquare(np.bincount(seen, minlength=15)).pvalue > 1e-3


@pytest.mark.parametrize("other", [{"draw": 1}, {"seed": 1}, {"layer": 3}, {"token": 1}])
def test_draws_seeds_layers_and_tokens_are_independent(other: dict[str, int]) -> None:
    first = members(random(1, draws=2), 20_000, 5).argmax(-1)
    if "token" in other:
        a, b = first[:-1, 0], first[1:, 0]
    elif "draw" in other:
        a, b = first[:, 0], first[:, 1]
    else:
        a, b = first[:, 0], members(random(1), 20_000, 5, **other)[:, 0].argmax(-1)
    assert chisquare(np.bincount(a * 5 + b, minlength=25)).pvalue > 1e-3


def test_random_sets_do_not_depend_on_the_order_of_the_slots() -> None:
    index_TK, weights_TK = routing(300, 5, 16)
    rows = torch.arange(300)
    mixed = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    one = worlds_of(random(2, draws=2), rows, index_TK, weights_TK, criteria=criteria(300))
    two = worlds_of(random(2, draws=2), rows, index_TK[:, mixed], weights_TK[:, mixed], criteria=criteria(300))
    assert one.members_PK[:, mixed].tolist() == two.members_PK.tolist()


def test_a_random_set_is_the_same_in_both_scopes() -> None:
    index_TK, weights_TK = routing(200, 4, 16)
    rows = torch.arange(100, 200)
    token = worlds_of(random(2, draws=3), rows, index_TK, weights_TK, criteria=criteria(200))
    cases, _ = sequence_cases(
        random(2, draws=3), False, (100, 200), rows, index_TK, weights_TK, False, criteria=criteria(200)
    )
    assert [int(case.done.draw_P[0]) for case in cases] == [0, 1, 2]
    for draw, case in enumerate(cases):
        assert case.done.members_PK.tolist() == token.members_PK[draw::3].tolist()


def test_ranked_sets_agree_with_a_plain_loop() -> None:
    index_TK, weights_TK = routing(400, 5, 16)
    value_E = torch.tensor(np.random.default_rng(4).integers(0, 4, 16).astype(float))
    given = criteria(400, tied=value_E)
    for count in (1, 2, 4):
        found = worlds_of(ranked(count, "tied"), torch.arange(400), index_TK, weights_TK, criteria=given)
        for t, chosen in enumerate(found.members_PK):
            order = sorted(index_TK[t].tolist(), key=lambda e: (-float(value_E[e]), e))
            assert sorted(index_TK[t][chosen].tolist()) == sorted(order[:count])


def test_tokens_that_cannot_be_ranked_are_skipped_at_every_count() -> None:
    index_TK, weights_TK = routing(400, 5, 16)
    value_E = torch.arange(16.0)
    value_E[[3, 7]] = torch.nan
    without = [t for t in range(400) if not {3, 7} & set(index_TK[t].tolist())]
    assert 100 < len(without) < 300
    for count in (1, 4):
        given = criteria(400, partial=value_E)
        found = worlds_of(ranked(count, "partial"), torch.arange(400), index_TK, weights_TK, criteria=given)
        assert (found.parent_P.tolist(), found.skipped) == (without, 400 - len(without))


# ---- in the engine ----


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_batching_does_not_change_the_choice(scope: str) -> None:
    """One sequence after the other, few positions at a time, other micro-batches, more draws: the same rows."""
    model = ready("olmoe", 0)
    sequences = texts(LENGTHS, 1)

    def measure(which: list[int], positions: list[np.ndarray], draws: int, micro_batch: int) -> pd.DataFrame:
        engine = Engine(model, memory=2**62, micro_batch=micro_batch, seed=SEED)
        asked = [random(1, draws=draws), ranked(1, "tied")]
        chosen = [sequences[i] for i in which]
        options = {"scope": scope, "rankings": values(model)}
        found = engine.measure(chosen, positions, layers=[0, 2], interventions=asked, **options)  # type: ignore[arg-type]
        return reference.keyed(found.effects)

    whole = measure([0, 1], POSITIONS, 2, 50)
    parts = [
        measure([1], POSITIONS[1:], 3, 7),
        measure([0], [POSITIONS[0][:1]], 3, 7),
        measure([0], [POSITIONS[0][1:]], 3, 7),
    ]
    pieces = pd.concat(parts)
    pieces = pieces[pieces.index.get_level_values("draw") < 2].sort_index()
    assert pieces.index.tolist() == whole.index.tolist()
    for name in OUTCOMES:
        assert pieces[name].to_numpy() == pytest.approx(whole[name].to_numpy(), abs=1e-6, nan_ok=True)


def test_how_many_were_skipped_is_said() -> None:
    model = ready("olmoe", 0)
    engine = Engine(model, memory=2**62, seed=SEED)
    sequences = texts((30,), 2)
    rankings = {"partial": {0: np.where(np.arange(8) == 2, np.nan, 1.0)}}
    found = engine.measure(
        sequences, [np.arange(30)], layers=[0], interventions=[ranked(1, "partial")], rankings=rankings
    )
    routed = reference.clean_run(model, torch.from_numpy(sequences[0].token_ids)).index_TK[0]
    unranked = int((routed == 2).any(1).sum())
    assert 0 < unranked < 30
    assert (found.skipped, (found.effects["unit"].to_pandas() == "set").sum()) == (unranked, 30 - unranked)


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        (None, "rankings: 'mine' is missing, but an intervention ranks by it; give its values per layer"),
        ({"yours": {1: np.ones(8)}}, "rankings: 'mine' is missing"),
        ({"mine": {0: np.ones(8)}}, r"rankings\.mine\.1: no values; one value per expert \(8\) is needed"),
        ({"mine": {1: np.ones(7)}}, r"rankings\.mine\.1: \(7,\); one value per expert \(8\) is needed"),
    ],
)
def test_rankings_that_lack_something(rankings: dict[str, dict[int, np.ndarray]] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(ready("olmoe"), memory=2**62).measure(
            texts((4,)), [np.arange(4)], layers=[1], interventions=[ranked(1, "mine")], rankings=rankings
        )
