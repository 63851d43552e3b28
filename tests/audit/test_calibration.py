"""The calibration: mean outputs, and a reservoir that is uniform and depends on the tokens alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from audit.calibration import Calibration
from audit.observations import Observations, Reservoir
from audit.observations.hashing import hash_words, splitmix, token_key

DOMAINS = ("code", "prose")
EXPERTS, SIZE, HIDDEN, TOP_K = 6, 8, 4, 2
Chunk = dict[str, torch.Tensor]


def chunk(tokens: int, seed: int) -> Chunk:
    """Random tokens; expert 5 is never active, expert 4 by the first three tokens alone."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS - 2, generator=generator)[:TOP_K] for _ in range(tokens)])
    index[:3, 0] = 4
    before = torch.randn(tokens, HIDDEN, generator=generator)
    return {
        "domain_N": torch.randint(len(DOMAINS), (tokens,), generator=generator),
        "sequence_N": torch.arange(tokens) // 7,
        "position_N": torch.arange(tokens) % 7,
        "index_NK": index,
        "weight_NK": torch.rand(tokens, TOP_K, generator=generator),
        "output_NKD": torch.randn(tokens, TOP_K, HIDDEN, generator=generator),
        "hidden_before_ND": before,
        "hidden_after_ND": before + 1,
    }


def calibrate(*chunks: Chunk, layers: tuple[int, ...] = (1,), seed: int = 0) -> Calibration:
    calibration = Calibration(Observations(DOMAINS, EXPERTS), Reservoir(EXPERTS, SIZE, seed))
    for one in chunks:
        for layer in layers:
            calibration.add(layer, **one)
    return calibration


def rows_of(one: Chunk, rows: torch.Tensor | slice) -> Chunk:
    return {name: x[rows] for name, x in one.items()}


def test_splitmix_gives_the_published_sequence() -> None:
    """The generator of Steele, Lea and Flood started at 1234567 (reference values of the C implementation)."""
    golden, state, outputs = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(5):
        signed = (state + (1 << 63)) % (1 << 64) - (1 << 63)
        outputs.append(int(splitmix(torch.tensor(signed))) % (1 << 64))
        state = (state + golden) % (1 << 64)
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_hashes_differ_in_every_word_and_between_tokens() -> None:
    base = hash_words(1, 2, torch.arange(5), torch.arange(5), 3)
    for other in (
        hash_words(0, 2, torch.arange(5), torch.arange(5), 3),
        hash_words(1, 2, torch.arange(5), torch.arange(5), 4),
    ):
        assert not (base == other).any()
    keys = token_key(torch.arange(300)[:, None], torch.arange(300)).flatten()
    assert len(hash_words(keys, 17).unique()) == 90_000


def test_the_reservoir_holds_the_smallest_hashes() -> None:
    one = chunk(120, 0)
    output, count = calibrate(one).reservoir(1)
    for expert in range(EXPERTS):
        routed = [(t, k) for t in range(120) for k in range(TOP_K) if one["index_NK"][t, k] == expert]
        assert int(count[expert]) == min(len(routed), SIZE)
        seed = hash_words(0, 1, torch.tensor([expert]))
        priority = {
            (t, k): int(hash_words(token_key(one["sequence_N"][t], one["position_N"][t]).reshape(1), seed))
            for t, k in routed
        }
        chosen = sorted(routed, key=priority.__getitem__)[:SIZE]
        for slot, (t, k) in enumerate(chosen):
            assert torch.equal(output[expert, slot], one["output_NKD"][t, k])
    assert count.tolist()[4:] == [3, 0]
    assert not output[4, 3:].any()


@pytest.mark.parametrize("size", [1, 7, 40, 200])
def test_the_reservoir_depends_on_the_tokens_alone(size: int) -> None:
    one = chunk(200, 0)
    expected, count = calibrate(one).reservoir(1)
    shuffled = rows_of(one, torch.randperm(200, generator=torch.Generator().manual_seed(1)))
    pieces = [rows_of(shuffled, slice(a, a + size)) for a in range(0, 200, size)]
    workers = [calibrate(*pieces[worker::3]) for worker in range(3)]
    for other in (calibrate(*pieces), Calibration.merge(workers), Calibration.merge(workers[::-1])):
        assert torch.equal(other.reservoir(1)[0], expected)
        assert torch.equal(other.reservoir(1)[1], count)


def test_the_reservoir_depends_on_seed_layer_and_expert() -> None:
    one = chunk(200, 0)
    first = calibrate(one, layers=(1, 2))
    assert not torch.equal(first.reservoir(1)[0], first.reservoir(2)[0])
    assert not torch.equal(first.reservoir(1)[0], calibrate(one, seed=1).reservoir(1)[0])
    every = Reservoir(2, 5)
    token = torch.arange(100)
    every.add(
        0,
        index_NK=torch.tensor([[0, 1]]).repeat(100, 1),
        output_NKD=token[:, None, None].float().expand(100, 2, 1),
        sequence_N=token,
        position_N=token,
    )
    output, _ = every.contents(0)
    assert not torch.equal(output[0], output[1])


def test_the_reservoir_is_uniform() -> None:
    """400 seeds draw 10 of 50 tokens each: every token is kept about 80 times (chi-square)."""
    kept = np.zeros(50)
    token = torch.arange(50)
    for seed in range(400):
        reservoir = Reservoir(1, 10, seed)
        reservoir.add(
            0,
            index_NK=torch.zeros(50, 1, dtype=torch.long),
            output_NKD=token[:, None, None].float(),
            sequence_N=token // 5,
            position_N=token % 5,
        )
        chosen = reservoir.contents(0)[0].flatten().int().numpy()
        assert len(set(chosen)) == 10
        kept[chosen] += 1
    # without replacement the counts vary by 1 - 10/50 of the multinomial variance
    statistic = ((kept - 80) ** 2 / 80).sum() / (1 - 10 / 50)
    assert 0.001 < stats.chi2.sf(statistic, df=49) < 0.999


def draw(calibration: Calibration, expert: torch.Tensor, number: torch.Tensor, seed: int = 3) -> torch.Tensor:
    return calibration.draw(1, expert, torch.arange(len(expert)) % 11, torch.arange(len(expert)) // 11, number, seed)


def test_draws_come_from_the_expert_and_do_not_depend_on_the_batch() -> None:
    calibration = calibrate(chunk(200, 0))
    generator = torch.Generator().manual_seed(0)
    expert = torch.randint(5, (150,), generator=generator)
    number = torch.randint(4, (150,), generator=generator)
    drawn = draw(calibration, expert, number)
    output, count = calibration.reservoir(1)
    for row, e in zip(drawn, expert.tolist(), strict=True):
        assert any(torch.equal(row, stored) for stored in output[e, : int(count[e])])
    for rows in (torch.arange(149, -1, -1), torch.tensor([37])):
        again = calibration.draw(1, expert[rows], rows % 11, rows // 11, number[rows], 3)
        assert torch.equal(again, drawn[rows])
    assert not torch.equal(draw(calibration, expert, number, seed=4), drawn)
    assert not torch.equal(draw(calibration, expert, number + 1), drawn)


def test_draws_are_uniform_over_the_stored_outputs() -> None:
    calibration = calibrate(chunk(200, 0))
    output, _ = calibration.reservoir(1)
    for expert, held in ((0, SIZE), (4, 3)):
        drawn = draw(calibration, torch.full((3000,), expert), torch.zeros(3000, dtype=torch.long))
        counts = [int((drawn == output[expert, slot]).all(1).sum()) for slot in range(held)]
        assert sum(counts) == 3000
        assert stats.chisquare(counts).pvalue > 0.001


def test_draws_of_an_expert_without_a_token_are_refused() -> None:
    calibration = calibrate(chunk(50, 0))
    with pytest.raises(ValueError, match=r"layer 1 has no stored output of experts \[5\]"):
        draw(calibration, torch.tensor([0, 5, 1]), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="layer: 9 was not calibrated"):
        calibration.mean(9)
    with pytest.raises(ValueError, match="stored no outputs"):
        Calibration(calibration.observations).reservoir(1)


def test_mean_outputs_by_hand() -> None:
    one = chunk(100, 0)
    calibration = calibrate(one)
    mean = calibration.mean(1)
    for expert in range(5):
        expected = one["output_NKD"][one["index_NK"] == expert].double().mean(0)
        torch.testing.assert_close(mean[expert], expected, rtol=1e-12, atol=1e-14)
    assert mean[5].isnan().all()
    assert calibration.missing(1) == [5]


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_calibration_is_read_back_as_it_was(tmp_path: Path, dtype: torch.dtype, url: bool) -> None:
    one = chunk(100, 0)
    one["output_NKD"] = one["output_NKD"].to(dtype)
    calibration = calibrate(one, layers=(1, 12), seed=5)
    folder = (tmp_path / "calibration").as_uri() if url else tmp_path / "calibration"
    calibration.save(folder)
    assert {path.name for path in (tmp_path / "calibration").iterdir()} == {
        "observations.parquet",
        "reservoir.safetensors",
    }
    loaded = Calibration.load(folder)
    assert loaded.bytes == calibration.bytes
    for layer in (1, 12):
        assert torch.equal(loaded.mean(layer)[:5], calibration.mean(layer)[:5])
        assert loaded.reservoir(layer)[0].dtype == dtype
        assert torch.equal(loaded.reservoir(layer)[0], calibration.reservoir(layer)[0])
        assert torch.equal(loaded.reservoir(layer)[1], calibration.reservoir(layer)[1])
    more = chunk(40, 1)
    more["sequence_N"] += 100
    more["output_NKD"] = more["output_NKD"].to(dtype)
    whole = calibrate(one, more, layers=(1, 12), seed=5)
    merged = Calibration.merge([loaded, calibrate(more, layers=(1, 12), seed=5)])
    assert torch.equal(merged.reservoir(12)[0], whole.reservoir(12)[0])


def test_a_calibration_without_a_reservoir(tmp_path: Path) -> None:
    one = chunk(30, 0)
    plain = Calibration(Observations(DOMAINS, EXPERTS))
    plain.add(1, **one)
    plain.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert loaded.stored is None
    assert torch.equal(loaded.mean(1)[:5], plain.mean(1)[:5])
    with pytest.raises(ValueError, match="1 of 2 parts have a reservoir"):
        Calibration.merge([plain, calibrate(one)])
    with pytest.raises(ValueError, match=r"has no observations\.parquet"):
        Calibration.load(tmp_path / "elsewhere")


def test_reservoirs_of_different_runs_do_not_merge() -> None:
    with pytest.raises(ValueError, match="of the parts are"):
        Reservoir.merge([Reservoir(6, 8, 0), Reservoir(6, 8, 1)])
    with pytest.raises(ValueError, match=r"reservoir\.size: 0"):
        Reservoir(6, 0)


def test_bytes_count_the_stored_outputs() -> None:
    calibration = calibrate(chunk(30, 0), layers=(0, 1))
    assert calibration.bytes - calibration.observations.bytes == 2 * EXPERTS * SIZE * (HIDDEN * 4 + 8)
