"""Effects made up for tests of the importance audit, and its pairs by a plain loop over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

TOKEN = ["sequence", "position"]
SIGNED = {"abs_delta_loss": ("delta_loss", abs), "logit_drop": ("delta_logit", lambda value: -value)}


def made_effects(
    seed: int, *, tokens: int = 120, active: int = 4, experts: int = 12, per_document: int = 6, strength: float = 0.0
) -> pd.DataFrame:
    """Rows of one layer: ``experts`` differ by ``strength`` sd of the noise, the last token of a document has no next.

    Routing weights know nothing, contribution norms and attributions something, of what the effect is.
    """
    rng = np.random.default_rng(seed)
    expert = np.argsort(rng.random((tokens, experts)), axis=1)[:, :active].ravel()
    token = np.repeat(np.arange(tokens), active)
    loss = rng.standard_normal(len(token)) + strength * rng.standard_normal(experts)[expert]
    size = np.abs(loss)
    rows = pd.DataFrame(
        {
            "document": token // per_document + 7,
            "sequence": token // per_document,
            "position": token % per_document + 1,
            "expert": expert,
            "draw": np.nan,
            "routing_weight": rng.random(len(token)),
            "contribution_norm": size + rng.random(len(token)),
            "attribution": loss + 0.3 * rng.standard_normal(len(token)),
            "delta_loss": loss,
            "kl": loss**2,
            "js": loss**2 / (1 + loss**2),
            "tv": size / (1 + size),
            "top1_flip": size > 1.2,
            "delta_logit": -loss + 0.1 * rng.standard_normal(len(token)),
            "gap_norm": size * rng.random(len(token)),
        }
    )
    rows.loc[rows["position"] == per_document, ["attribution", "delta_loss", "delta_logit"]] = np.nan
    return rows


def made_noise(seed: int, rows: int = 60) -> pd.DataFrame:
    """Identity rows of the layer, in which rounding alone shows."""
    rng = np.random.default_rng([seed, 1])
    columns = {name: 1e-7 * rng.standard_normal(rows) for name in ("delta_loss", "delta_logit")}
    columns |= {name: 1e-9 * rng.random(rows) for name in ("kl", "js", "tv")}
    return pd.DataFrame({"document": np.arange(rows) // 3, **columns, "top1_flip": False, "gap_norm": 0.0})


def made_metrics(
    layer: int, values: Mapping[str, Sequence[float]], *, orientation: int = 1, label: str = "extended"
) -> pd.DataFrame:
    """The table of metrics, from a value per expert."""
    return pd.concat(
        pd.DataFrame(
            {"layer": layer, "expert": np.arange(len(value)), "metric": name, "value": np.asarray(value, float)}
        ).assign(orientation=orientation, label=label)
        for name, value in values.items()
    )


def plain_pairs(rows: pd.DataFrame, score: pd.Series, outcome: str) -> tuple[pd.DataFrame, int]:
    """(pairs, ties) of a layer's rows, token by token; ``score``: of every row, nan where the expert is not ranked."""
    column, turn = SIGNED.get(outcome, (outcome, float))
    needs_next = column in ("delta_loss", "delta_logit")
    found, ties = [], 0
    for (sequence, position), token in rows.groupby(TOKEN):
        if needs_next and token[column].isna().all():
            continue
        scored = {int(row["expert"]): float(score[i]) for i, row in token.iterrows() if not np.isnan(score[i])}
        effect = {int(row["expert"]): turn(float(row[column])) for _, row in token.iterrows()}
        if not scored:
            continue
        high = [expert for expert in scored if scored[expert] == max(scored.values())]
        low = [expert for expert in scored if scored[expert] == min(scored.values())]
        if max(scored.values()) == min(scored.values()):
            ties += 1
            continue
        found.append(
            {
                "document": int(token["document"].iloc[0]),
                "sequence": sequence,
                "position": position,
                "effect_high": sum(effect[expert] for expert in high) / len(high),
                "effect_low": sum(effect[expert] for expert in low) / len(low),
                "expert_high": high[0] if len(high) == 1 else -1,
                "expert_low": low[0] if len(low) == 1 else -1,
            }
        )
    return pd.DataFrame(found), ties
