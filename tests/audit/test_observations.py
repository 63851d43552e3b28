"""Observations merge to those of one pass, keep their precision, and survive their table."""

from __future__ import annotations

import io
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from audit.observations import OBSERVATIONS, LayerSums, Observations, moments
from audit.observations.histogram import BINS, bin_of, edges
from audit.observations.moments import RowGroups, merge_moments

DOMAINS = ("code", "prose")
Chunk = dict[str, torch.Tensor]


def chunk(tokens: int, seed: int, top_k: int = 3, hidden: int = 5, experts: int = 8, loc: float = 0.3) -> Chunk:
    """Random arguments of ``Observations.add``; the last expert is never active."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(tokens, hidden, generator=generator)
    return {
        "domain_N": torch.randint(len(DOMAINS), (tokens,), generator=generator),
        "index_NK": torch.stack([torch.randperm(experts - 1, generator=generator)[:top_k] for _ in range(tokens)]),
        "weight_NK": torch.rand(tokens, top_k, generator=generator),
        "output_NKD": torch.randn(tokens, top_k, hidden, generator=generator) + loc,
        "hidden_before_ND": before,
        "hidden_after_ND": before + torch.randn(tokens, hidden, generator=generator),
    }


def observe(*chunks: Chunk, layers: tuple[int, ...] = (0,), experts: int = 8) -> Observations:
    observations = Observations(DOMAINS, experts)
    for layer in layers:
        for one in chunks:
            observations.add(layer, **one)
    return observations


def assert_equal(a: Observations, b: Observations, rtol: float) -> None:
    assert (a.domains, a.experts, sorted(a.layers)) == (b.domains, b.experts, sorted(b.layers))
    for layer, sums in a.layers.items():
        for field in fields(LayerSums):
            x, y = getattr(sums, field.name), getattr(b.layers[layer], field.name)
            torch.testing.assert_close(x, y, rtol=rtol if x.is_floating_point() else 0, atol=rtol, msg=field.name)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cuts", [(), (50,), (1, 2, 3), (0, 17, 17, 99, 100), tuple(range(100))])
def test_merged_shards_equal_one_pass(cuts: tuple[int, ...], seed: int) -> None:
    whole = chunk(100, seed)
    bounds = [0, *cuts, 100]
    shards = [{name: x[a:b] for name, x in whole.items()} for a, b in pairwise(bounds)]
    one_pass = observe(whole)
    assert_equal(Observations.merge([observe(shard) for shard in shards]), one_pass, rtol=1e-12)
    assert_equal(observe(*shards), one_pass, rtol=1e-12)
    assert int(one_pass.layers[0].count_EM.sum()) == 300
    assert int(one_pass.layers[0].tokens_M.sum()) == 100


def test_merging_leaves_the_parts_alone_and_repeats_to_the_bit() -> None:
    parts = [observe(chunk(40, seed), layers=(seed, 5)) for seed in range(3)]
    first, again = Observations.merge(parts), Observations.merge(parts)
    assert sorted(first.layers) == [0, 1, 2, 5]
    assert_equal(first, again, rtol=0)
    assert int(parts[0].layers[5].count_EM.sum()) == 120
    assert int(first.layers[5].count_EM.sum()) == 360


def test_merge_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        Observations.merge([])
    with pytest.raises(ValueError, match="must come from one audit"):
        Observations.merge([Observations(DOMAINS, 8), Observations(["code"], 8)])


def test_second_moments_survive_a_large_mean() -> None:
    """Uncentred sums of squares would lose all digits: the mean is 1e6, the spread 1e-3."""
    one = chunk(400, 0)
    one = {name: x.double() if x.is_floating_point() else x for name, x in one.items()}
    one["output_NKD"] = (one["output_NKD"] - 0.3) * 1e-3 + 1e6
    shards = [{name: x[a : a + 100] for name, x in one.items()} for a in range(0, 400, 100)]
    got = Observations.merge([observe(shard) for shard in shards]).pooled(0)
    for expert in range(7):
        rows = one["output_NKD"][one["index_NK"] == expert].numpy()
        centred = rows - rows.mean(0)
        np.testing.assert_allclose(got.m2_EMD[expert, 0].numpy(), (centred**2).sum(0), rtol=1e-5)
        norms = np.sqrt((rows.astype(np.longdouble) ** 2).sum(1))
        np.testing.assert_allclose(
            float(got.scalar_m2_EM2[expert, 0, 1]), float(((norms - norms.mean()) ** 2).sum()), rtol=1e-5
        )


def test_a_long_sum_of_single_precision_is_exact() -> None:
    """2^24 + 1 + 1 + ... stays at 2^24 in float32."""
    output = torch.ones(1001, 1, 1)
    output[0] = 2.0**24
    observations = Observations(DOMAINS, 1)
    observations.add(
        0,
        domain_N=torch.zeros(1001, dtype=torch.long),
        index_NK=torch.zeros(1001, 1, dtype=torch.long),
        weight_NK=torch.ones(1001, 1),
        output_NKD=output,
        hidden_before_ND=torch.ones(1001, 1),
        hidden_after_ND=torch.ones(1001, 1),
    )
    assert float(observations.pooled(0).power(0, 1)) == 2.0**24 + 1000


def test_half_precision_inputs_are_read_exactly() -> None:
    one = {name: x.bfloat16() if x.is_floating_point() else x for name, x in chunk(50, 0).items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in one.items()}
    assert_equal(observe(one), observe(exact), rtol=0)


def test_blocks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = observe(chunk(200, 0))
    for budget in (0, 300, 5000):
        monkeypatch.setattr(moments, "HOST_BLOCK_BYTES", budget)
        assert_equal(observe(chunk(200, 0)), whole, rtol=0)


def test_blocks_cover_every_row_once_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "HOST_BLOCK_BYTES", 80)
    group = torch.tensor([5, 0, 0, 3, 3, 3, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9])
    rows = RowGroups.of(group, 12)
    blocks = list(rows.blocks(bytes_per_row=8))
    assert [(block.count_G.tolist(), inside.start, inside.stop) for _, inside, block in blocks] == [
        ([2, 0, 0, 3, 0, 1, 0, 0, 0], 0, 6),
        ([12], 6, 18),  # a group is never divided
    ]
    assert torch.cat([block.group_R + groups.start for groups, _, block in blocks]).tolist() == sorted(group.tolist())


def test_the_deterministic_sum_of_devices_equals_that_of_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = RowGroups.of(torch.randint(6, (50,), generator=generator) * 2, 12)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    expected = torch.segment_reduce(x, "sum", lengths=rows.count_G, axis=0, unsafe=True)
    torch.testing.assert_close(rows.sum(x), expected, rtol=1e-14, atol=1e-14)


def test_merge_moments_of_an_empty_part_changes_nothing() -> None:
    n, empty = torch.tensor([[3]]), torch.tensor([[0]])
    mean, m2, zero = (
        torch.tensor([[0.1, 7.3]]).double(),
        torch.tensor([[2.7, 0.9]]).double(),
        torch.zeros(1, 2).double(),
    )
    for got in (merge_moments(n, mean, m2, empty, zero, zero), merge_moments(empty, zero, zero, n, mean, m2)):
        assert torch.equal(got[0], mean)
        assert torch.equal(got[1], m2)
    assert torch.equal(torch.stack(merge_moments(empty, zero, zero, empty, zero, zero)), torch.zeros(2, 1, 2).double())


def test_weights_fall_into_the_bin_whose_edges_enclose_them() -> None:
    edge = edges()
    assert len(edge) == BINS + 1
    assert edge[0] == 0
    assert edge[-1] == 256
    below = torch.nextafter(edge[1:], torch.zeros(()).double())
    weight = torch.cat([edge[:-1], below, torch.rand(2000, generator=torch.Generator().manual_seed(0)).double() * 20])
    found = np.searchsorted(edge.numpy(), weight.numpy(), side="right") - 1
    np.testing.assert_array_equal(bin_of(weight).numpy(), found)
    width = (edge[2:] - edge[1:-1]) / edge[1:-1]
    assert float(width.max()) == 1 / 128


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_NKD", np.nan), ("output_NKD", np.inf), ("weight_NK", -0.1), ("weight_NK", 256.0), ("weight_NK", np.nan)],
)
def test_numbers_out_of_range_are_refused_and_nothing_is_added(name: str, value: float) -> None:
    observations = observe(chunk(30, 0))
    bad = chunk(30, 1)
    bad[name].view(-1)[7] = value
    with pytest.raises(ValueError, match="layer 0: an expert's output is not finite, or a routing weight"):
        observations.add(0, **bad)
    assert_equal(observations, observe(chunk(30, 0)), rtol=0)
    with pytest.raises(ValueError, match="layer 4"):
        observations.add(4, **bad)
    assert sorted(observations.layers) == [0]


def test_an_empty_chunk_adds_nothing() -> None:
    assert not observe({name: x[:0] for name, x in chunk(4, 0).items()}).layers


def test_the_table_holds_everything() -> None:
    observations = observe(chunk(60, 0), layers=(2, 7))
    table = observations.to_table()
    assert table.schema.equals(OBSERVATIONS)
    assert len(table) == 2 * 8 * len(DOMAINS)
    assert_equal(Observations.from_table(table), observations, rtol=0)
    file = io.BytesIO()
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), file)
    shuffled = Observations.from_table(pq.read_table(file))
    names = [shuffled.domains.index(name) for name in DOMAINS]
    torch.testing.assert_close(shuffled.layers[7].m2_EMD[:, names], observations.layers[7].m2_EMD, rtol=0, atol=0)


def test_the_table_reads_in_pandas_with_nulls_where_there_was_no_token() -> None:
    one = chunk(60, 0)
    frame = observe(one).to_table().to_pandas().set_index(["expert", "domain"])
    unused = frame.loc[7]
    assert (unused[["n", "sum_g1_e0", "sum_g2_e2", "sum_easy_ep", "m2_e"]] == 0).all(axis=None)
    assert unused[["max_abs", "mean_output"]].isna().all(axis=None)
    here = (one["index_NK"] == 2) & (one["domain_N"] == 1)[:, None]
    row = frame.loc[(2, "prose")]
    np.testing.assert_allclose(row["mean_output"], one["output_NKD"][here].double().mean(0), rtol=1e-12)
    assert row["n"] == int(here.sum())
    assert row["tokens"] == int((one["domain_N"] == 1).sum())
    assert row["histogram"].sum() == row["n"]
    assert row["coactivation"][2] == row["n"]
    assert row["max_abs"] == float(one["output_NKD"][here].abs().max())


def test_an_incomplete_table_is_refused() -> None:
    table = observe(chunk(60, 0)).to_table()
    for part in (table.slice(1), table.slice(0, 0), pa.concat_tables([table, table])):
        with pytest.raises(ValueError, match="must be read whole, one part at a time"):
            Observations.from_table(part)


def test_bytes_are_as_documented() -> None:
    experts, domains, hidden = 8, len(DOMAINS), 5
    expected = 8 * experts * domains * (2 * hidden + 4096 + experts + 14) + 8 * domains
    assert observe(chunk(10, 0)).bytes == expected
