"""Training the demo model: its tokenizer, its rows of packed documents, and the optimisation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """Size of the model and length of its training; the defaults make the packaged checkpoint."""

    steps: int = 3_000
    rows_per_step: int = 8
    context: int = 512  # tokens of a row, and the longest sequence the model accepts
    vocabulary: int = 2_048
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    experts: int = 16
    top_k: int = 4
    expert_width: int = 64
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    balance: float = 0.02  # weight of the load-balancing loss, averaged over the layers
    seed: int = 0


def train_tokenizer(texts: Iterable[str], settings: TrainingSettings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts every text with END_OF_TEXT and never joins digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=settings.context,
    )


def build_model(settings: TrainingSettings) -> OlmoeForCausalLM:
    """An OLMoE model with seeded random weights, in float32."""
    torch.manual_seed(settings.seed)
    config = OlmoeConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.expert_width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        max_position_embeddings=settings.context,
        router_aux_loss_coef=settings.balance,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return OlmoeForCausalLM(config)


def packed_rows(documents: Sequence[Sequence[int]], context: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless rows of ``context`` token ids with their positions: epochs of the documents, shuffled anew each time.

    Documents follow each other in a row without padding. Positions count from 0 within each document, which is how
    transformers recognises packed rows and keeps attention from crossing documents.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    positions: list[int] = []
    while True:
        for number in torch.randperm(len(documents), generator=generator).tolist():
            document = documents[number]
            while document:
                room = context - len(ids)
                ids += document[:room]
                positions += range(min(room, len(document)))
                document = document[room:]
                if len(ids) == context:
                    yield ids, positions
                    ids, positions = [], []


def train(
    model: OlmoeForCausalLM,
    documents: Sequence[Sequence[int]],
    settings: TrainingSettings,
    report: Callable[[str], None],
) -> None:
    """Train the model in place on documents of token ids; one line of progress every hundred steps."""
    rows = packed_rows(documents, settings.context, settings.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, settings))
    model.train()
    started = time.monotonic()
    for step in range(1, settings.steps + 1):
        batch = [next(rows) for _ in range(settings.rows_per_step)]
        ids_BT, positions_BT = torch.tensor([ids for ids, _ in batch]), torch.tensor([places for _, places in batch])
        outputs = model(input_ids=ids_BT, position_ids=positions_BT, output_router_logits=True, use_cache=False)
        loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        balance = _balance_loss(outputs.router_logits, settings)
        torch.autograd.backward(loss + settings.balance * balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step in (1, settings.steps):
            report(
                f"step {step}/{settings.steps}  loss {loss.item():.3f}  balance {balance.item():.3f}  "
                f"{time.monotonic() - started:.0f} s"
            )
    model.eval()


def _balance_loss(router_logits: Sequence[Tensor], settings: TrainingSettings) -> Tensor:
    """The load-balancing loss, averaged over the layers; top_k if every expert is used equally.

    Layer by layer, because transformers' own pools the layers: an expert unused in one layer and overused in another
    would cost nothing.
    """
    losses = [load_balancing_loss_func((logits,), settings.experts, settings.top_k) for logits in router_logits]
    return torch.stack(losses).mean()


def _learning_rate_factor(step: int, settings: TrainingSettings) -> float:
    warmup = min(settings.warmup_steps, settings.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))
