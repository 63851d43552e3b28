"""``moe-audit plan --model``: sizes and back ends without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_olmoe import write_tiny_olmoe

from audit.models.catalogue import names
from jobs.cli import main


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *options])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, " ".join(out.split()), err


def test_a_named_model_is_planned_for_what_it_is_meant_for(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = planned(capsys, "--model", "deepseek_v3")
    assert status == 0
    assert "parameters: 671,026,404,352 in this configuration; published: 671 billion" in out
    assert "note: the multi-token prediction layer" in out
    assert "gathered layer: 21.4 GiB" in out
    assert "meant for: deepspeed_zero3 with offload cpu, 8 ranks, devices of 80.0 GiB" in out
    assert "deepspeed_zero3 with offload cpu, because deepspeed_tp needs" in out
    assert "each rank has 24.9 GiB of weights on its device of 80.0 GiB, 155.8 GiB in host memory" in out
    assert "not verified, read in copies only: model_type" in out


def test_ranks_and_memory_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "mixtral_8x7b", "--device-memory", "40GiB", "--host-memory", "256GiB")
    status, out, _ = planned(capsys, *options, "--ranks", "4")
    assert status == 0
    assert "deepspeed_tp, because it is the fastest that fits: each rank has 24.0 GiB" in out
    assert "accelerate with offload cpu, because single needs" in planned(capsys, *options, "--ranks", "1")[1]
    smaller = (*options[:-1], "64GiB", "--ranks", "1", "--disk")
    assert "accelerate with offload nvme, because single needs" in planned(capsys, *smaller)[1]


def test_too_little_memory_is_one_sentence_after_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = planned(capsys, "--model", "glm_4_5", "--host-memory", "64GiB")
    assert status == 2
    assert "What each rank holds" in out
    assert err.startswith("moe-audit: model.backend: auto cannot hold 657.1 GiB of weights with cluster.ranks: 8")
    assert "use hosts with at least 657.1 GiB of memory" in err
    assert err.count("\n") == 1


def test_a_folder_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_olmoe(tmp_path, layers=2, experts=4, top_k=2)
    (tmp_path / "model.safetensors").unlink()
    status, out, _ = planned(capsys, "--model", str(tmp_path), "--device-memory", "4GiB")
    assert status == 0
    # Embedding, head and last norm; per layer attention, its norms and two more, router, three matrices per expert.
    parameters = 2 * 300 * 16 + 16 + 2 * (4 * 16 * 16 + 2 * 16 + 2 * 16 + 4 * 16 + 4 * 3 * 16 * 8)
    assert f"parameters: {parameters:,} in this configuration" in out
    assert "weights in float32" in out
    assert "published" not in out
    assert "single, because it is the fastest that fits" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "gpt5"), "--model: 'gpt5' is unknown; name a folder with a checkpoint, a hub model such as"),
        (("--model", "./nowhere"), "model.source: './nowhere' holds no config.json"),
        (
            ("--model", "olmoe_1b_7b", "--device-memory", "big"),
            "--device-memory: 'big' is no size; it takes more",
        ),
        (("--model", "olmoe_1b_7b", "--host-memory", "0"), "--host-memory: '0' is no size"),
        (("--model", "olmoe_1b_7b", "--ranks", "0"), "--ranks: 0 is not possible; it takes a whole number of at least"),
        (("--model", "olmoe_1b_7b", "--set", "seed=1"), "--set: 'seed=1' changes an audit's file"),
        (("audit.yaml", "--model", "olmoe_1b_7b"), "plan: both of CONFIG and --model given"),
        ((), "plan: neither of CONFIG and --model given"),
        (("audit.yaml", "--ranks", "2"), "--ranks: 2 goes with --model"),
        (("audit.yaml", "--disk"), "--disk: True goes with --model"),
    ],
)
def test_mistakes_are_one_sentence(options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = planned(capsys, *options)
    assert status == 2
    assert err.startswith(f"moe-audit: {said}")
    assert err.count("\n") == 1


def test_a_field_that_its_class_does_not_take_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe", "hidden_size": "wide"}))
    status, _, err = planned(capsys, "--model", str(tmp_path))
    assert status == 2
    assert "Field 'hidden_size' expected int, got str (value: 'wide')" in err
    assert err.count("\n") == 1


def test_an_unknown_name_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = planned(capsys, "--model", "gpt5")
    assert all(name in err for name in names())
