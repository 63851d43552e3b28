"""The demo model's card: what it is, what it was trained on, and what it has learnt."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import tokenizers
import torch
import transformers

from audit.demo.evaluation import Evaluation
from audit.demo.overlap import ALWAYS_FOUND, RUN
from audit.demo.text import DOMAINS, HELD_OUT_SHARE, MAX_CHARACTERS, MIN_WORDS
from audit.demo.training import TrainingSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRecord:
    """What a training run has used."""

    documents: dict[str, int]  # per domain
    tokens: dict[str, int]  # per domain, one epoch
    text_digest: str  # SHA-256 over the normalised training texts
    parameters: int
    minutes: float
    threads: int


def model_card(settings: TrainingSettings, record: TrainingRecord, evaluation: Evaluation) -> str:
    """The card in Markdown; all losses in nats per token."""
    s = settings
    read = s.steps * s.rows_per_step * s.context
    epochs = read / sum(record.tokens.values())
    versions = ", ".join(
        (
            f"Python {platform.python_version()}",
            f"torch {torch.__version__.split('+')[0]}",
            f"transformers {transformers.__version__}",
            f"tokenizers {tokenizers.__version__}",
        )
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---
# moe-audit demo model

A small Mixture-of-Experts language model, trained so that an audit has something real to find: its experts carry
what it has learnt about three kinds of text, and removing one changes what it predicts. It travels with the package
and can be audited on a laptop. It is good for nothing else: all it has read is the standard library of Python and
school arithmetic.

## Model
`OlmoeForCausalLM`: {s.layers} layers, {s.experts} experts per layer, top-{s.top_k} (routing weights not renormalised,
as in OLMoE), hidden size {s.hidden}, {s.heads} heads, expert width {s.expert_width}, context {s.context} tokens;
{record.parameters:,} parameters, stored in bfloat16. Byte-level BPE tokenizer of {s.vocabulary:,} tokens, trained on
the same documents; digits are never joined. Every text starts with `<|endoftext|>`, the only special token.

## Data
| domain | what | training documents | training tokens | held-out documents | dropped |
|---|---|---|---|---|---|
{_data_rows(record, evaluation)}

The text is read from the Python that runs the program, not copied; the figures are those of the Python named below,
whose standard library is under the PSF licence. SHA-256 of the normalised training texts:
`{record.text_digest}`.
Left out: tests, installed packages, the tables in `encodings`, and texts shorter than {MIN_WORDS} words.

A document is held out ({HELD_OUT_SHARE:.0%}) by a hash of its normalised text (its ASCII words), so that it falls on
the same side under every Python. `seen_text.npy` holds hashes of runs of {RUN} words of everything training read: a
held-out document that shares {ALWAYS_FOUND} consecutive words with it is always dropped, one that shares {RUN} to
{ALWAYS_FOUND - 1} sometimes. The last column counts them. Training read whole documents; held-out documents end at
the last full line within {MAX_CHARACTERS:,} characters.

## Training
`python -m jobs.train_demo_model --out DIR --seed {s.seed} --steps {s.steps} --threads {record.threads}`

{s.steps:,} steps of {s.rows_per_step} rows of {s.context} tokens: {read / 1e6:.1f} million tokens, {epochs:.1f} epochs.
Documents are packed without padding and attention does not cross them. AdamW in float32, peak learning rate
{s.learning_rate:g}, cosine decay, load-balancing loss layer by layer with weight {s.balance:g}. It took
{record.minutes:.0f} minutes; CPU cores used: {record.threads}. The same seed, machine and versions give the same
weights: {versions}.

## What it has learnt
Mean loss on the held-out documents in nats per token, of the stored weights computed in float32. The bar is an
interpolated Kneser-Ney bigram model fitted on the training documents of the one domain (`audit/demo/kneser_ney.py`).

| domain | held-out tokens | model | Kneser-Ney bigram | difference |
|---|---|---|---|---|
{_loss_rows(evaluation)}

Share of a layer's routing slots filled by its least and its most used expert, on the same tokens; equal use would be
{1 / s.experts:.2%}.

| layer | least used | most used |
|---|---|---|
{_share_rows(evaluation)}
"""


_CONTENTS = {
    "code": "top-level functions and classes of the standard library, docstrings cut out",
    "prose": "docstrings of the standard library, sections of the `help()` topics",
    "math": "generated arithmetic problems with worked steps",
}


def _data_rows(record: TrainingRecord, evaluation: Evaluation) -> str:
    results = {result.domain: result for result in evaluation.domains}
    return "\n".join(
        f"| {domain} | {_CONTENTS[domain]} | {record.documents[domain]:,} | {record.tokens[domain]:,} | "
        f"{results[domain].documents:,} | {results[domain].dropped:,} |"
        for domain in DOMAINS
    )


def _loss_rows(evaluation: Evaluation) -> str:
    return "\n".join(
        f"| {x.domain} | {x.tokens:,} | {x.model_loss:.3f} | {x.bigram_loss:.3f} | {x.gain:.3f} |"
        for x in evaluation.domains
    )


def _share_rows(evaluation: Evaluation) -> str:
    return "\n".join(
        f"| {layer} | {least:.2%} | {most:.2%} |"
        for layer, (least, most) in enumerate(
            zip(np.min(evaluation.shares_LE, 1), np.max(evaluation.shares_LE, 1), strict=True)
        )
    )
