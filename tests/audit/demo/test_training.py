"""Training the demo model: packing, masking between documents, the balance loss, and the same weights every time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from audit.demo.arithmetic import problems
from audit.demo.training import END_OF_TEXT, TrainingSettings, build_model, packed_rows, train, train_tokenizer

TINY = TrainingSettings(
    steps=20,
    rows_per_step=2,
    context=64,
    vocabulary=300,
    hidden=32,
    layers=2,
    heads=2,
    experts=4,
    top_k=2,
    expert_width=16,
    warmup_steps=5,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _train_tiny() -> tuple[dict[str, Tensor], list[str]]:
    texts = [document.text for document in problems(40)]
    tokenizer = train_tokenizer(texts, TINY)
    model = build_model(TINY)
    lines: list[str] = []
    train(model, [tokenizer.encode(text, verbose=False) for text in texts], TINY, lines.append)
    return model.state_dict(), lines


def test_the_same_seed_gives_the_same_weights() -> None:
    first, lines = _train_tiny()
    second, _ = _train_tiny()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    untrained = build_model(TINY).state_dict()
    assert all(not torch.equal(first[name], untrained[name]) for name in first)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0] - 0.5


def test_the_tokenizer_marks_the_start_and_splits_digits() -> None:
    tokenizer = train_tokenizer([document.text for document in problems(40)], TINY)
    ids = tokenizer.encode("Add 1234 and 77.")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == END_OF_TEXT
    assert [token for token in tokens if token.strip("Ġ").isdigit()] == list("123477")
    assert tokenizer.decode(ids[1:]) == "Add 1234 and 77."
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Add 1234 and 77."


def test_packed_rows_hold_every_document_once_per_epoch() -> None:
    documents = [[0, *range(start, start + length)] for start, length in ((100, 5), (200, 17), (300, 2), (400, 8))]
    size = sum(map(len, documents))
    flat_ids: list[int] = []
    flat_positions: list[int] = []
    for ids, positions in islice(packed_rows(documents, context=6, seed=0), 2 * size // 6):
        assert len(ids) == len(positions) == 6
        flat_ids += ids
        flat_positions += positions
        for place in range(6):  # positions count on within a document and start again at a row or a document
            assert positions[place] == (0 if place == 0 or ids[place] == 0 else positions[place - 1] + 1)
    epoch: list[list[int]] = []
    for token in flat_ids[:size]:
        if token == 0:
            epoch.append([])
        epoch[-1].append(token)
    assert sorted(epoch) == sorted(documents)
    assert flat_ids[:size] != flat_ids[size : 2 * size]  # shuffled anew


def test_attention_does_not_cross_packed_documents() -> None:
    model = build_model(TINY).eval()
    first, second = [0, 17, 45, 200, 31], [0, 99, 5, 150]
    with torch.inference_mode():
        packed = model(
            input_ids=torch.tensor([first + second, second + first]),
            position_ids=torch.tensor([[*range(5), *range(4)], [*range(4), *range(5)]]),
            use_cache=False,
        ).logits
        alone = model(input_ids=torch.tensor([second]), use_cache=False).logits
    torch.testing.assert_close(packed[0, 5:], alone[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed[1, :4], alone[0], atol=1e-5, rtol=1e-4)
