"""How well a demo checkpoint predicts held-out text, and how evenly it uses its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from audit.demo.kneser_ney import KneserNeyBigram
from audit.demo.overlap import SeenText
from audit.demo.text import DOMAINS, SEEN_TEXT, held_out, training_documents


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainResult:
    """Held-out losses of one domain, means in nats per token.

    A document is read up to the model's context; its first token is given, not predicted.
    """

    domain: str
    documents: int
    dropped: int  # held-out documents left out because they share text with the training documents
    tokens: int  # predicted tokens, the same for both models
    model_loss: float
    bigram_loss: float

    @property
    def gain(self) -> float:
        """What the model predicts better than the bigram, in nats per token."""
        return self.bigram_loss - self.model_loss


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results per domain, and shares_LE: the share of a layer's routing slots that each expert fills."""

    domains: list[DomainResult]
    shares_LE: NDArray[np.float64]


def evaluate_checkpoint(folder: Path, documents_per_domain: int | None = None) -> Evaluation:
    """Evaluate the stored weights, computed in float32, on held-out documents.

    The bigram model of a domain is fitted on the training documents of that domain alone: it is told the domain,
    which the model is not, and so is a harder bar than one bigram model of everything.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = held_out(documents_per_domain=documents_per_domain, seen=SeenText.load(folder / SEEN_TEXT))
    training = training_documents()

    counts_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.int64)
    results = []
    for domain in DOMAINS:
        rows = [tokenizer.encode(x.text, truncation=True) for x in text.documents if x.domain == domain]
        learnt = [tokenizer.encode(x.text, verbose=False) for x in training if x.domain == domain]
        bigram = KneserNeyBigram(learnt, len(tokenizer))
        tokens = sum(len(row) - 1 for row in rows)
        results.append(
            DomainResult(
                domain=domain,
                documents=len(rows),
                dropped=text.dropped[domain],
                tokens=tokens,
                model_loss=_total_loss(model, rows, counts_LE) / tokens,
                bigram_loss=sum(float(bigram.losses(row).sum()) for row in rows) / tokens,
            )
        )
    return Evaluation(results, (counts_LE / counts_LE.sum(1, keepdim=True)).double().numpy())


@torch.inference_mode()
def _total_loss(model: PreTrainedModel, rows: Sequence[Sequence[int]], counts_LE: torch.Tensor) -> float:
    """The summed loss over all rows, in nats; adds the routing slots that each expert filled to counts_LE."""
    total = 0.0
    for row in rows:
        ids_T = torch.tensor(row)
        outputs = model(input_ids=ids_T[None], output_router_logits=True, use_cache=False)
        total += cross_entropy(outputs.logits[0, :-1], ids_T[1:], reduction="sum").item()
        for layer, logits_TE in enumerate(outputs.router_logits):
            chosen_TK = logits_TE.topk(model.config.num_experts_per_tok).indices
            counts_LE[layer] += chosen_TK.flatten().bincount(minlength=model.config.num_experts)
    return total
