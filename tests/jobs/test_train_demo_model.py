"""The program that makes the demo checkpoint, run at a tiny size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from audit.demo import DOMAINS
from audit.demo.evaluation import evaluate_checkpoint
from audit.demo.overlap import SeenText
from audit.demo.text import SEEN_TEXT, training_documents
from audit.demo.training import TrainingSettings
from jobs import train_demo_model

TINY = partial(
    TrainingSettings,
    rows_per_step=2,
    context=64,
    vocabulary=400,
    hidden=32,
    layers=2,
    heads=2,
    experts=4,
    top_k=2,
    expert_width=16,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every fortieth training document, a tiny model, and a sample of the held-out documents."""
    documents = training_documents()[::40]
    monkeypatch.setattr(train_demo_model, "training_documents", lambda: documents)
    monkeypatch.setattr("audit.demo.evaluation.training_documents", lambda: documents)
    monkeypatch.setattr(train_demo_model, "evaluate_checkpoint", partial(evaluate_checkpoint, documents_per_domain=4))
    monkeypatch.setattr(train_demo_model, "TrainingSettings", TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_it_writes_a_checkpoint_with_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    train_demo_model.main(["--out", str(out), "--steps", "3", "--seed", "7"])

    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size == 400
    seen = SeenText.load(out / SEEN_TEXT)
    assert all(seen.contains_part_of(document.text) for document in training_documents()[::40])

    card = (out / "README.md").read_text(encoding="utf-8")
    assert "--seed 7 --steps 3 --threads 1" in card
    evaluation = evaluate_checkpoint(out, documents_per_domain=4)
    for result in evaluation.domains:
        cells = rf"\| {result.domain} \| {result.tokens:,} \| {result.model_loss:.3f} \| {result.bigram_loss:.3f} \|"
        assert re.search(cells, card)
    documents = training_documents()[::40]
    for domain in DOMAINS:
        assert re.search(rf"\| {domain} \| [^|]+ \| {sum(x.domain == domain for x in documents)} \|", card)
    assert "step 3/3" in capsys.readouterr().out


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_demo_model.main(["--out", str(tmp_path / name), "--steps", "20"])
    for file in ("model.safetensors", "tokenizer.json", SEEN_TEXT):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    train_demo_model.main(["--out", str(tmp_path / "c"), "--steps", "20", "--seed", "1"])
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != (tmp_path / "a" / "model.safetensors").read_bytes()
