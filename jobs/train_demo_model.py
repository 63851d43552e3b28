"""Make the embedded demo checkpoint: ``python -m jobs.train_demo_model --out DIR``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from audit.demo.card import TrainingRecord, model_card
from audit.demo.evaluation import evaluate_checkpoint
from audit.demo.overlap import SeenText
from audit.demo.text import DOMAINS, SEEN_TEXT, digest, training_documents
from audit.demo.training import TrainingSettings, build_model, train, train_tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Train, store, measure what was stored, and write the model card."""
    options = _parse(arguments)
    settings = TrainingSettings(seed=options.seed, steps=options.steps)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    record = make_checkpoint(options.out, settings, options.threads)
    evaluation = evaluate_checkpoint(options.out)
    for result in evaluation.domains:
        _say(f"{result.domain}: model {result.model_loss:.3f}, bigram {result.bigram_loss:.3f} nats per token")
    (options.out / "README.md").write_text(model_card(settings, record, evaluation), encoding="utf-8")
    _say(f"checkpoint written to {options.out} after {record.minutes:.0f} minutes of training")


def make_checkpoint(out: Path, settings: TrainingSettings, threads: int) -> TrainingRecord:
    """Train tokenizer and model on this Python's text and store them in ``out``, with the hashes of what was read."""
    started = time.monotonic()
    documents = training_documents()
    tokenizer = train_tokenizer((document.text for document in documents), settings)
    encoded = [tokenizer.encode(document.text, verbose=False) for document in documents]
    _say(f"{len(documents)} training documents, {sum(map(len, encoded))} tokens")
    model = build_model(settings)
    train(model, encoded, settings, _say)

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    SeenText.of(document.text for document in documents).save(out / SEEN_TEXT)
    lengths = [(document.domain, len(ids)) for document, ids in zip(documents, encoded, strict=True)]
    return TrainingRecord(
        documents={domain: sum(d == domain for d, _ in lengths) for domain in DOMAINS},
        tokens={domain: sum(length for d, length in lengths if d == domain) for domain in DOMAINS},
        text_digest=digest(documents),
        parameters=model.num_parameters(),
        minutes=(time.monotonic() - started) / 60,
        threads=threads,
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    defaults = TrainingSettings()
    parser = argparse.ArgumentParser(prog="python -m jobs.train_demo_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder the checkpoint is written to")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; another number gives other low bits")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
