"""Simulated pruning against models from which the experts were really deleted, run whole by the library's own code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch
from deleted import log_probabilities, loss_and_kl, without
from families import RECURRENT, SWEEP, Float64Throughout, build, ready, texts
from torch import Tensor

from audit.models import prepare
from audit.pruning import PrunedForward, Pruning, model_limits, prune_table
from audit.pruning.plan import RemovalOrders, plan_prunings

NAMED = ["olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss"]
ALL = [f if f in NAMED else pytest.param(f, marks=pytest.mark.full) for f in SWEEP]
# The groups of deepseek_v3 are experts 0 to 3 and 4 to 7: as many of each are removed, as deleting them demands.
REMOVED: list[dict[int, tuple[int, ...]]] = [{2: (1, 6)}, {1: (0, 3, 5, 7), 3: (2, 4)}]


def _ids(lengths: tuple[int, ...]) -> list[Tensor]:
    return [torch.from_numpy(s.token_ids) for s in texts(lengths)]


def _compare(family: str, removed: Mapping[int, tuple[int, ...]]) -> None:
    model, sequences = ready(family), _ids((21, 9, 13))
    with Float64Throughout():
        forward = PrunedForward(model, sequences)
        found = forward.outcomes(removed)
    clean, pruned = build(family), without(build(family), removed)
    exact = [loss_and_kl(log_probabilities(clean, s), log_probabilities(pruned, s), s) for s in sequences]
    loss, kl = (torch.cat(column) for column in zip(*exact, strict=True))
    assert len(forward.rows_M) == 20 + 8 + 12
    torch.testing.assert_close(forward.baseline_loss_M + found.delta_loss, loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.kl, kl, rtol=1e-7, atol=1e-13)
    assert kl.mean() > 1e-4  # the removed experts were used


@pytest.mark.parametrize("removed", REMOVED, ids=["one layer", "two layers"])
@pytest.mark.parametrize("family", ALL)
def test_losses_are_those_of_a_model_without_the_experts(family: str, removed: Mapping[int, tuple[int, ...]]) -> None:
    _compare(family, removed)


@pytest.mark.parametrize(
    "family", [f if f == "lfm2_moe" else pytest.param(f, marks=pytest.mark.full) for f in RECURRENT]
)
def test_models_that_the_sweep_cannot_take_over_run_whole(family: str) -> None:
    assert ready(family).description.engine == "oracle"
    _compare(family, REMOVED[1])


def test_groups_may_lose_unequally() -> None:
    """DeepSeek-V3's rule written out: the best group by its two best scores, the top k in it, weights normalised."""
    model, ids, removed = ready("deepseek_v3"), _ids((24,))[0], (0, 2, 5)
    module = build("deepseek_v3")
    gate, config = module.model.layers[2].mlp.gate, module.config

    def rule(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = [row.reshape(-1) for row in x.reshape(-1, x.shape[-1])]
        chosen, weights = [], []
        for row in rows:
            score = torch.sigmoid(gate.weight @ row)
            choice = score + gate.e_score_correction_bias
            left = [[e for e in group if e not in removed] for group in ((0, 1, 2, 3), (4, 5, 6, 7))]
            best = max(left, key=lambda group: float(choice[group].topk(2).values.sum()))
            two = [best[int(i)] for i in choice[best].topk(2).indices]
            chosen.append(two)
            weights.append((score[two] / score[two].sum() * config.routed_scaling_factor).tolist())
        return torch.empty(0), torch.tensor(weights, dtype=torch.float64), torch.tensor(chosen)

    clean = log_probabilities(build("deepseek_v3"), ids)
    gate.forward = rule
    _, kl = loss_and_kl(clean, log_probabilities(module, ids), ids)
    with Float64Throughout():
        found = PrunedForward(model, [ids]).outcomes({2: removed})
    torch.testing.assert_close(found.kl, kl, rtol=1e-7, atol=1e-13)


def test_removing_nothing_changes_nothing() -> None:
    forward = PrunedForward(ready("olmoe"), _ids((12, 7)))
    for removed in ({}, {1: ()}):
        found = forward.outcomes(removed)
        assert found.kl.abs().max() == 0
        assert found.delta_loss.abs().max() == 0


def test_a_model_that_was_not_validated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be pruned, the model was not validated"):
        PrunedForward(prepare(build("olmoe")), _ids((5,)))


def _metrics(layers: tuple[int, ...], seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        {"layer": layer, "expert": e, "metric": metric, "value": rng.normal(), "orientation": orientation}
        for layer in layers
        for metric, orientation in (("a", 1), ("b", -1))
        for e in range(8)
    ]
    # c orders the experts as a does: what they remove is the same.
    copies = [{**row, "metric": "c", "value": 3 * float(row["value"])} for row in rows if row["metric"] == "a"]
    return pd.DataFrame(rows + copies)


def test_the_table_sums_over_the_sequences_of_a_document() -> None:
    model, metrics = ready("olmoe"), _metrics((0, 1, 2, 3))
    parts = texts((11, 6, 14, 1, 8))
    owners = [5, 5, 2, 9, 2]  # document 9 is one token long: nothing to predict
    sequences = [type(s)(s.index, d, *(getattr(s, n) for n in ("domain", "token_ids", "sentence", "special")))
                 for s, d in zip(parts, owners, strict=True)]  # fmt: skip
    plan = plan_prunings([1, 2, 3], ["a", "b", "c"], shares=(0.25, 0.5), draws=2)
    with Float64Throughout():
        table = prune_table(model, sequences, plan, metrics, seed=4, batch_tokens=20).to_pandas()
        whole = prune_table(model, sequences, plan, metrics, seed=4, batch_tokens=10_000).to_pandas()
    assert len(table) == len(plan) * 3
    assert table.groupby("document")["tokens"].unique().map(lambda t: t.tolist()).to_dict() == {
        2: [20],
        5: [15],
        9: [0],
    }
    np.testing.assert_allclose(table["kl_sum"], whole["kl_sum"], rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(table["loss_sum"], whole["loss_sum"], rtol=1e-10)

    orders = RemovalOrders(metrics, model_limits(model), seed=4)
    clean = build("olmoe")
    for pruning in [p for p in plan if p.where in ("layer 2", "all layers") and p.share == 0.25][::3]:
        pruned = without(build("olmoe"), orders.removed(pruning)) if len(pruning.layers) else clean
        at = (
            (table["criterion"] == pruning.criterion)
            & (table["order"] == pruning.order)
            & (table["where"] == pruning.where)
            & (table["share"] == 0.25)
            & (table["draw"].isna() if pruning.draw is None else table["draw"] == pruning.draw)
        )
        rows = table[at].set_index("document")
        for document in (2, 5):
            ids = [torch.from_numpy(s.token_ids) for s in sequences if s.document == document]
            logs = [(log_probabilities(clean, s), log_probabilities(pruned, s), s) for s in ids]
            exact = [loss_and_kl(*three) for three in logs]
            baseline = sum(float(loss_and_kl(c, c, s)[0].sum()) for c, _, s in logs)
            assert rows.loc[document, "loss_sum"] == pytest.approx(sum(float(e[0].sum()) for e in exact), rel=1e-10)
            assert rows.loc[document, "kl_sum"] == pytest.approx(sum(float(e[1].sum()) for e in exact), rel=1e-8)
            assert rows.loc[document, "baseline_loss_sum"] == pytest.approx(baseline, rel=1e-10)
        assert rows.loc[9, ["loss_sum", "baseline_loss_sum", "kl_sum"]].tolist() == [0, 0, 0]
    same = (
        table[table["criterion"] == "a"]["kl_sum"].to_numpy() == table[table["criterion"] == "c"]["kl_sum"].to_numpy()
    )
    assert same.all()


def test_equal_removals_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    own = PrunedForward.outcomes
    monkeypatch.setattr(PrunedForward, "outcomes", lambda self, removed: (ran.append(removed), own(self, removed))[1])
    plan = [
        Pruning(criterion=m, order="metric", draw=None, share=0.25, where="layer 1", layers=(1,)) for m in ("a", "c")
    ]
    prune_table(ready("olmoe"), texts((6, 6)), plan, _metrics((1,)), seed=0)
    assert len(ran) == 1
