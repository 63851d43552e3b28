"""The sweep and the suffix engine against whole forwards of the library's model, for every family and intervention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import SWEEP, WITH_SHARED, Float64Throughout, build, ready, texts

from audit.calibration import Calibration
from audit.engine import Engine
from audit.engine.validate import validate
from audit.interventions import Intervention, Target
from audit.models import MoEModel, prepare

FAMILIES = list(SWEEP)
LENGTHS = (13, 6)
# Both ends of both sequences, neighbours, and a position beyond the sliding windows of 8.
POSITIONS = [np.array([0, 4, 5, 11, 12]), np.array([0, 5])]
KL, OTHERS = 1e-6, 1e-5
OUTCOMES = ("kl", "js", "tv", "top1_flip", "delta_loss", "delta_logit")

EACH = [
    Intervention("zero"),
    Intervention("renormalize"),
    Intervention("reroute"),
    Intervention("mean"),
    Intervention("resample", draws=2),
    Intervention("scale", factor=0.5),
]
SETS = [
    Intervention("zero", Target("all")),
    Intervention("scale", Target("listed", experts=(1, 3, 5)), factor=-0.5),
    Intervention("renormalize", Target("highest", count=1)),
    Intervention("renormalize", Target("listed", experts=(0, 2, 4, 6))),
    Intervention("reroute", Target("highest", count=2)),
    Intervention("mean", Target("all")),
    Intervention("resample", Target("lowest", count=2)),
    Intervention("scale", Target("lowest", count=1), factor=2.0),
]
SHARED = [Intervention("zero", Target("shared")), Intervention("scale", Target("shared"), factor=1.7)]


def asked(model: MoEModel) -> list[Intervention]:
    """Every kind of intervention on every kind of target the model has."""
    return [*EACH, *SETS, *(SHARED if model.description.shared_experts else [])]


def worst_distances(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, float]:
    """Largest absolute difference of every outcome, relative for norms; the rows must be the same ones."""
    assert ours.index.tolist() == theirs.index.tolist()
    found = {}
    for name in (*OUTCOMES, "routing_weight", "gap_norm", "contribution_norm"):
        a, b = ours[name].to_numpy(float), theirs[name].to_numpy(float)
        compared = np.full(len(b), True) if name != "contribution_norm" else ~np.isnan(b)
        assert (np.isnan(a) == np.isnan(b))[compared].all(), name
        distance = np.nan_to_num(np.abs(a - b)[compared])
        # Norms are of any size. Tables hold float32: a large outcome is at best known to its own rounding.
        size = np.nan_to_num(np.abs(b)[compared])
        distance = distance / size.clip(1.0) if name.endswith("norm") else distance - 2.0**-23 * size
        found[name] = float(distance.max())
    return found


def compare(
    model: MoEModel,
    scope: str,
    interventions: Sequence[Intervention],
    *,
    lengths: Sequence[int] = LENGTHS,
    positions: Sequence[np.ndarray] = POSITIONS,
    layers: Sequence[int] | None = None,
    all_positions: bool = False,
    micro_batch: int = 37,
    seed: int = 1,
) -> tuple[dict[str, float], pd.DataFrame]:
    """Distances between engine and reference, and the reference's table."""
    vocabulary = model.description.vocabulary
    sequences = texts(lengths, seed, vocabulary)
    layers = list(model.sites)[::2] if layers is None else layers
    engine = Engine(model, memory=2**62, micro_batch=micro_batch, identity_every=3, seed=5)
    calibration, means, drawn = None, None, None
    if any(i.kind in ("mean", "resample") for i in interventions):
        corpus = texts((17, 9), 77, vocabulary, first=100)
        calibration = engine.observe(corpus, stored_outputs=6)
        means = {layer: reference.mean_outputs(model, corpus, layer) for layer in layers}
        drawn = _drawn(calibration, 5)
    options = {"scope": scope, "all_positions": all_positions}
    measured = engine.measure(
        sequences, positions, layers=layers, interventions=interventions, calibration=calibration, **options
    )
    theirs = reference.effects(
        model, sequences, [at.tolist() for at in positions], layers, interventions, means=means, drawn=drawn, **options
    )
    return worst_distances(reference.keyed(measured.effects), theirs), theirs


def _drawn(calibration: Calibration, seed: int):
    def drawn(sequence: int, layer: int, expert: int, position: int, draw: int) -> torch.Tensor:
        one = [torch.tensor([v]) for v in (expert, sequence, position, draw)]
        return calibration.draw(layer, *one, seed)[0]

    return drawn


def within(distances: dict[str, float], kl: float = KL, others: float = OTHERS) -> None:
    assert distances["kl"] <= kl, distances
    assert max(distances.values()) <= others, distances


def large_enough(effects: pd.DataFrame, factor: float = 100.0) -> None:
    """The comparison means something only where the effects are far larger than its tolerance."""
    assert effects["kl"].median() > factor * KL
    assert effects["delta_loss"].abs().median() > 10 * OTHERS


@pytest.mark.parametrize("family", FAMILIES)
def test_token_scope(family: str) -> None:
    model = ready(family, FAMILIES.index(family) % 2)
    assert model.description.engine == "sweep"
    assert model.reroute_refused is None
    assert model.description.shared_experts == (family in WITH_SHARED)
    distances, effects = compare(model, "token", asked(model))
    within(distances)
    large_enough(effects)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_rounding_to_float32_inside_the_norms_is_left(family: str) -> None:
    """Where norms and routers keep float64, nothing is left but the rounding of the table."""
    with Float64Throughout():
        distances, _ = compare(ready(family, FAMILIES.index(family) % 2), "token", [*EACH, *SETS[:3]])
    assert max(distances[name] for name in OUTCOMES) <= 1e-9, distances


@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_scope(family: str) -> None:
    model = ready(family, FAMILIES.index(family) % 2)
    distances, effects = compare(model, "sequence", asked(model))
    within(distances)
    large_enough(effects)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "granitemoeshared"])
def test_sequence_scope_read_where_the_expert_is_not_active(family: str) -> None:
    model = ready(family, 0)
    distances, effects = compare(model, "sequence", asked(model), all_positions=True)
    within(distances)
    elsewhere = effects[(effects["contribution_norm"] == 0.0) & (effects.index.get_level_values("position") > 0)]
    assert (elsewhere["gap_norm"] == 0).all()
    assert elsewhere["kl"].max() > 100 * KL  # through the keys and values of other tokens


# Sizes at which one dimension could be taken for another (T == E, T == K, T == D, E == D), and degenerate ones.
SHAPES = {
    "as many tokens as experts": ({"experts": 8}, (8, 3)),
    "as many tokens as slots": ({"experts": 8, "top_k": 4}, (4, 2)),
    "as many tokens as hidden dimensions": ({"hidden_size": 16, "num_attention_heads": 4, "head_dim": 4}, (16, 1)),
    "as many experts as hidden dimensions": ({"experts": 16, "hidden_size": 16, "head_dim": 4}, (16, 4)),
    "sequences of one token": ({}, (1, 1)),
    "one active expert": ({"top_k": 1}, (9, 2)),
    "tied embeddings": ({"tie_word_embeddings": True}, (9, 2)),
    "dense layers between": ({"mlp_only_layers": [1, 2]}, (9, 2)),
}


def suited(model: MoEModel, interventions: Sequence[Intervention]) -> list[Intervention]:
    """Those that every layer of the model can take."""
    kept = []
    for one in interventions:
        try:
            for site in model.sites.values():
                one.check(site.top_k, site.num_experts, site.shared is not None)
        except ValueError:
            continue
        kept.append(one)
    return kept


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, scope: str) -> None:
    options, lengths = SHAPES[shape]
    family = "qwen3_moe"
    model = validate(prepare(build(family, 3, **options)))
    assert model.description.engine == "sweep"
    positions = [np.arange(n) for n in lengths]
    layers = [0, 3]
    distances, _ = compare(
        model, scope, suited(model, asked(model)), lengths=lengths, positions=positions, layers=layers, seed=4
    )
    within(distances)


def test_layers_without_experts_are_named() -> None:
    model = validate(prepare(build("qwen3_moe", 3, mlp_only_layers=[1, 2])))
    assert model.description.moe_layers == (0, 3)
    with pytest.raises(ValueError, match="layers: 1 is not an MoE layer; those are 0, 3"):
        Engine(model, memory=2**62).measure(texts((4,)), [np.arange(4)], layers=[1], interventions=[EACH[0]])


# ---- the whole grid ----

GRID = {
    "default": {},
    "wide": {"experts": 16, "top_k": 4},
    "one group of heads": {"num_key_value_heads": 1, "num_hidden_layers": 6},
}


@pytest.mark.full
@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", GRID)
@pytest.mark.parametrize("family", FAMILIES)
def test_grid(family: str, size: str, seed: int, scope: str) -> None:
    options = dict(GRID[size])
    if family in ("deepseek_v2", "deepseek_v3"):
        options.pop("num_key_value_heads", None)  # multi-head latent attention has as many key heads as query heads
    if family == "phimoe":
        options.pop("top_k", None)  # its router picks exactly two
    model = validate(prepare(build(family, 10 + seed, **options)))
    assert model.description.engine == "sweep"
    lengths = (21, 1, 9)
    positions = [np.array([0, 1, 9, 10, 19, 20]), np.array([0]), np.array([0, 4, 8])]
    with Float64Throughout():
        distances, effects = compare(
            model,
            scope,
            suited(model, asked(model)),
            lengths=lengths,
            positions=positions,
            layers=list(model.sites),
            all_positions=scope == "sequence" and bool(seed % 2),
            micro_batch=(7, 64, 500, 4096)[seed],
            seed=seed,
        )
    # Norms are relative and stored as float32; outcomes have that rounding taken off already.
    within(distances, 1e-9, 2e-7)
    assert max(distances[name] for name in OUTCOMES) <= 1e-8, distances
    large_enough(effects, 10.0)
