"""The four metrics as the code released with arXiv 2606.10703 computed them: for comparison only.

Under one name that code computed different quantities for different models, and counted padding. ``audit.observations``
has the definitions; these variants exist to tell a difference in the metric from a difference in the measurement. Their
label is ``published_code``, and no other part of the audit reads them.

Shapes: P positions of all texts, padding included where it was counted; K slots, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audit.models.moe_model import MoEModel
from audit.models.seam import replaced

# Those of audit.observations as the released code computed them; their cells stand in the same table.
METRICS = (
    "released_utilization",
    "released_mean_routing_weight",
    "released_activation_norm",
    "released_activation_std",
)
MAX_TOKENS = 512

_QWEN_TEXTS = 30  # read for the two activation metrics
_QWEN_COORDINATES = 32  # of an expert's output, whose spread was its activation_std
_QWEN_SHORTEST = 4  # texts of fewer tokens were left out

Floats = NDArray[np.float64]


# On which side texts were padded to the longest of all; None: they were read one at a time. The code leaves the side to
# the tokenizer. The released positions tell it: DeepSeek's lie at the ends of rows of 512, OLMoE's at the beginnings of
# rows of 430.
_PADDING: dict[str, Literal["left", "right"] | None] = {"olmoe": "right", "deepseek_v2": "left", "qwen2_moe": None}


def released_metrics(
    model: MoEModel, texts: Sequence[str], *, layers: Sequence[int] | None = None, batch: int = 4
) -> pd.DataFrame:
    """The released code's metrics of every expert: ``layer``, ``expert``, ``metric``, ``value``, ``orientation`` (1),
    ``label`` (``published_code``).

    The texts are tokenised by the model's tokenizer, cut to 512 tokens, and padded as that code did (right for OLMoE,
    left for DeepSeek, to the longest of all texts, with the padding token or else the end token; Qwen not at all).
    ``batch`` texts run at once; it changes rounding alone. Sums here are in float64, there in float32.

    Raises ValueError for another family than the three, a model without tokenizer or padding token, and no text.
    """
    pad_id = padding_token(model)
    if not texts:
        raise ValueError("texts: there is none; give the audited texts")
    ids = model.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS, verbose=False)["input_ids"]
    return released_metrics_of_tokens(model, ids, pad_id, layers=layers, batch=batch)


def padding_token(model: MoEModel) -> int | None:
    """The token that fills short texts up: padding, or else the end; None where nothing is padded.

    Raises ValueError for a family without released code, and where there is no tokenizer or no such token.
    """
    family, tokenizer = _family(model), model.tokenizer
    if tokenizer is None:
        raise ValueError("model.source: this checkpoint has no tokenizer; name one that has, as texts are read")
    if _PADDING[family] is None:
        return None
    pad_id: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ValueError("model.source: its tokenizer has neither a padding nor an end token; the texts need padding")
    return pad_id


def released_metrics_of_tokens(
    model: MoEModel,
    token_ids: Sequence[Sequence[int]],
    pad_id: int | None,
    *,
    layers: Sequence[int] | None = None,
    batch: int = 4,
) -> pd.DataFrame:
    """``released_metrics`` of texts that are tokenised already, each of at most 512 tokens; ``pad_id`` fills up.

    Raises ValueError for another family than the three, for a layer that is no MoE layer, for texts that are all too
    short, and where padding gives values that are not finite.
    """
    family = _family(model)
    side = _PADDING[family]
    wanted = sorted(model.sites) if layers is None else list(layers)
    if unknown := [layer for layer in wanted if layer not in model.sites]:
        raise ValueError(f"layers: {unknown[0]} is no MoE layer of this model; they are {sorted(model.sites)}")
    seen = {layer: _Seen() for layer in wanted}
    kept = [(n, text) for n, text in enumerate(token_ids) if side is not None or len(text) >= _QWEN_SHORTEST]
    if not kept:
        raise ValueError(f"texts: all have fewer than {_QWEN_SHORTEST} tokens; the released code left such texts out")
    with model.kernels(), model.own_attention():
        for ids_BT, mask_BT, activations in _batches(kept, side, pad_id, batch):
            with replaced(dict(_watched(model, seen, activations))):
                model.module(
                    input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), use_cache=False
                )
    rows = []
    for layer in wanted:
        site = model.sites[layer]
        seen[layer].check(layer)
        values = _METRICS[family](seen[layer], site.num_experts, site.top_k)
        for metric, value_E in zip(METRICS, values, strict=True):
            rows.append(
                pd.DataFrame(
                    {"layer": layer, "expert": np.arange(site.num_experts), "metric": metric, "value": value_E}
                )
            )
    return pd.concat(rows, ignore_index=True).assign(orientation=1, label="published_code")


@dataclass(slots=True)
class _Seen:
    """What one layer's router and experts did, position by position; activations of the texts read for them only."""

    logits: list[Tensor] = field(default_factory=list)  # [P, E]
    index: list[Tensor] = field(default_factory=list)  # [P, K]
    weight: list[Tensor] = field(default_factory=list)  # [P, K], as multiplied into the outputs
    active: list[Tensor] = field(default_factory=list)  # [P', K], the experts of the activations
    norm: list[Tensor] = field(default_factory=list)  # [P', K], of the un-weighted output
    first: list[Tensor] = field(default_factory=list)  # [P', K, 32], its first coordinates

    def check(self, layer: int) -> None:
        """Raise ValueError where a position is not finite."""
        for parts in (self.logits, self.weight, self.norm):
            if not all(bool(part.isfinite().all()) for part in parts):
                # A padding position on the left sees no token. What attention makes of such a row depends on the
                # precision: a mask of the lowest number overflows in float64 (softmax is float32), and may in float16.
                raise ValueError(
                    f"model.dtype: in this precision layer {layer} is not finite, as padding is read too; "
                    "use float32 or bfloat16"
                )


def _family(model: MoEModel) -> str:
    family = str(model.module.config.model_type)  # type: ignore[union-attr]
    if family not in _PADDING:
        raise ValueError(f"model.source: family {family!r} has no released code; known are {', '.join(_PADDING)}")
    return family


def _batches(
    texts: Sequence[tuple[int, Sequence[int]]], side: Literal["left", "right"] | None, pad_id: int | None, batch: int
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Token ids and attention mask [B, T], and whether activations are read of these texts."""
    if side is None:
        for number, text in texts:
            ids = torch.tensor([list(text)])
            yield ids, torch.ones_like(ids), number < _QWEN_TEXTS
        return
    assert pad_id is not None
    longest = max(len(text) for _, text in texts)
    for start in range(0, len(texts), batch):
        rows = [list(text) for _, text in texts[start : start + batch]]
        ids = torch.full((len(rows), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(rows):
            place = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
            ids[row, place], mask[row, place] = torch.tensor(text), 1
        yield ids, mask, True


def _watched(
    model: MoEModel, seen: dict[int, _Seen], activations: bool
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Forwards that note what passes; both routers and experts see all positions of the batch as rows."""
    for layer, notes in seen.items():
        site = model.sites[layer]
        assert site.router is not None  # all three families have one
        yield site.router, _router(site.router.forward, notes)
        yield site.experts, _experts(model, layer, notes, activations)


def _router(own: Callable[..., Any], notes: _Seen) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        notes.logits.append(output[0].float().cpu())  # all three return (logits, weights, index)
        return output

    return forward


def _experts(model: MoEModel, layer: int, notes: _Seen, activations: bool) -> Callable[..., Tensor]:
    path = model.experts[layer]

    def forward(x_PD: Tensor, index_PK: Tensor, weight_PK: Tensor) -> Tensor:
        output_PKD, mixture_PD = path.both(x_PD, index_PK, weight_PK)
        notes.index.append(index_PK.cpu())
        notes.weight.append(weight_PK.float().cpu())
        if activations:
            notes.active.append(index_PK.cpu())
            notes.norm.append(output_PKD.float().norm(dim=-1).cpu())
            notes.first.append(output_PKD[..., :_QWEN_COORDINATES].float().cpu())
        return mixture_PD

    return forward


def _olmoe(seen: _Seen, experts: int, top_k: int) -> tuple[Floats, ...]:
    logits_PE = _joined(seen.logits)
    # The released threshold: the lowest of all positions' k-th largest logits, not each position's own.
    threshold = np.sort(logits_PE, axis=1)[:, -top_k].min()
    above_PE = logits_PE >= threshold
    total_E, count_E = np.where(above_PE, logits_PE, 0).sum(0), above_PE.sum(0)
    weight_E = np.divide(total_E, count_E, out=np.zeros(experts), where=count_E > 0)
    return logits_PE.mean(0), weight_E, *_norms(seen, experts)


def _deepseek(seen: _Seen, experts: int, top_k: int) -> tuple[Floats, ...]:
    weight_PK, index_PK = _joined(seen.weight), torch.cat(seen.index).numpy()
    count_E = np.bincount(index_PK[weight_PK > 0], minlength=experts)
    total_E = np.bincount(index_PK.ravel(), weight_PK.ravel(), minlength=experts)
    weight_E = np.divide(total_E, count_E, out=np.zeros(experts), where=count_E > 0)
    return count_E / len(weight_PK), weight_E, *_norms(seen, experts)


def _qwen(seen: _Seen, experts: int, top_k: int) -> tuple[Floats, ...]:
    # From the logits, as released: were the model to normalise its weights, these would not be normalised.
    chance_PK, index_PK = torch.softmax(torch.cat(seen.logits), dim=-1).topk(top_k, dim=-1)
    index, chance = index_PK.numpy().ravel(), chance_PK.double().numpy().ravel()
    count_E = np.bincount(index, minlength=experts)
    weight_E = np.divide(
        np.bincount(index, chance, minlength=experts), count_E, out=np.zeros(experts), where=count_E > 0
    )
    norm_E, spread_E = np.zeros(experts), np.zeros(experts)
    if seen.active:
        active, norm = torch.cat(seen.active).numpy().ravel(), _joined(seen.norm).ravel()
        first = torch.cat(seen.first).flatten(0, 1).double().numpy()
        for expert in np.unique(active):
            norm_E[expert] = norm[active == expert].mean()
            spread_E[expert] = first[active == expert].std()
    return count_E / count_E.sum(), weight_E, norm_E, spread_E


def _norms(seen: _Seen, experts: int) -> tuple[Floats, Floats]:
    """Mean and spread (ddof 1) of the output norms over an expert's positions; 0 for none, spread NaN for one."""
    active, norm = torch.cat(seen.active).numpy().ravel(), _joined(seen.norm).ravel()
    mean_E, spread_E = np.zeros(experts), np.zeros(experts)
    for expert in np.unique(active):
        of_expert = norm[active == expert]
        mean_E[expert] = of_expert.mean()
        spread_E[expert] = of_expert.std(ddof=1) if len(of_expert) > 1 else np.nan
    return mean_E, spread_E


def _joined(parts: Sequence[Tensor]) -> Floats:
    joined: Floats = torch.cat(list(parts)).double().numpy()
    return joined


_METRICS = {"olmoe": _olmoe, "deepseek_v2": _deepseek, "qwen2_moe": _qwen}
