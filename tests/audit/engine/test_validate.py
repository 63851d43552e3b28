"""Validation at load: what falls back to whole forwards, what loses reroute, what is refused, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from families import RECURRENT, SWEEP, build, ready, texts
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from audit.engine import Engine
from audit.engine.validate import validate
from audit.interventions import Intervention, Target
from audit.models import ModelError, prepare


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
@pytest.mark.parametrize("family", SWEEP)
def test_every_family_keeps_the_sweep_and_reroute_in_low_precision(family: str, dtype: torch.dtype) -> None:
    model = validate(prepare(build(family, 0, dtype)))
    assert (model.description.engine, model.reroute_refused) == ("sweep", None)


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_families_fall_back(family: str) -> None:
    model = validate(prepare(build(family)))
    assert model.description.engine == "oracle"
    assert "the sweep cannot take over this family" in model.description.engine_reason
    with pytest.raises(ValueError, match=r"engine\.method: 'sweep' is not possible, the sweep cannot take over"):
        Engine(model, memory=2**62, method="sweep")


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("family", RECURRENT)
def test_the_fallback_is_exact(family: str, scope: str) -> None:
    """Against edited routing tables, as the sweep is; but for reroute, whose rules are written for sweep families."""
    model = validate(prepare(build(family, 1)))
    sequences, positions = texts((7, 3), 5), [np.array([0, 4, 6]), np.array([1])]
    layers = [1, 2]
    asked = [Intervention("zero"), Intervention("renormalize"), Intervention("scale", Target("all"), factor=0.5)]
    if model.description.shared_experts:
        asked.append(Intervention("zero", Target("shared")))
    found = Engine(model, memory=2**62).measure(sequences, positions, layers=layers, interventions=asked, scope=scope)
    assert found.method == "oracle"
    ours = reference.keyed(found.effects)
    theirs = reference.effects(model, sequences, [p.tolist() for p in positions], layers, asked, scope)
    assert ours.index.tolist() == theirs.index.tolist()
    for name in ("kl", "js", "tv", "delta_loss", "delta_logit", "gap_norm"):
        np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), rtol=2e-6, atol=2e-6, err_msg=name)
    assert theirs["kl"].max() > 1e-3


# ---- routers that do not choose token by token, or not as the audit can follow ----


class Block(nn.Module):
    """A Mixture-of-Experts block around given experts with a router of the test's choosing."""

    def __init__(self, inner: Any, router: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = router, inner.experts

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.view(-1, hidden.shape[-1])
        _, weights, index = self.gate(rows)
        return self.experts(rows, index, weights).view(hidden.shape)


class Router(nn.Module):
    """Softmax, then the top 2, done with whatever matrix product it is given."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.weight = inner.gate.weight

    def logits(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(rows)
        weights, index = torch.softmax(logits, -1).topk(2, -1)
        return logits, weights, index


class Capacity(Router):
    """Every expert takes so many tokens of a batch, the first come; the others lose it."""

    factor = 1.0

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = super().forward(rows)
        room = max(1, int(self.factor * index.numel() / len(self.weight)))
        place = (F.one_hot(index.flatten(), len(self.weight)).cumsum(0) - 1).gather(1, index.reshape(-1, 1))
        return logits, weights * (place.view(index.shape) < room), index


class SparedCapacity(Capacity):
    """As above, with so much room that only a token or two is lost."""

    factor = 2.2


class ExpertChoice(Router):
    """Every expert takes its favourite quarter of the tokens of a batch."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(rows)
        p = torch.softmax(logits, -1)
        taken = torch.zeros_like(p).scatter(0, p.topk(max(1, len(rows) // 4), 0).indices, 1.0)
        index = torch.arange(len(self.weight)).expand(len(rows), -1)
        return logits, p * taken, index


class ByMatmul(Router):
    """The same numbers as Router, by a product that cannot be intercepted: mass of a struck expert would remain."""

    def logits(self, rows: Tensor) -> Tensor:
        return rows @ self.weight.T


class ByArgmax(Router):
    """Chooses without topk; struck experts vanish with their logits all the same."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(rows)
        index = logits.argsort(-1, descending=True)[:, :2]
        return logits, torch.softmax(logits, -1).gather(1, index), index


class Stubborn(Router):
    """Never lets go of the first expert it thought of."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = (rows @ self.weight.T).argmax(-1, keepdim=True)
        logits = self.logits(rows).scatter(1, first, 100.0)
        weights, index = torch.sort(torch.softmax(logits, -1), descending=True)
        return logits, weights[:, :2], index[:, :2]


def with_router(router: Callable[[Any], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 4) -> Any:
    module = build("olmoe", seed, dtype)
    for layer in module.model.layers:
        layer.mlp = Block(layer.mlp, router(layer.mlp))
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("router", [Capacity, SparedCapacity, ExpertChoice])
def test_routers_that_look_at_other_tokens_fall_back(router: type[Router], dtype: torch.dtype) -> None:
    model = validate(prepare(with_router(router, dtype)))
    assert model.description.engine == "oracle", model.description.engine_reason


@pytest.mark.parametrize("router", [Router, ByArgmax])
def test_routers_of_other_makes_that_choose_token_by_token_are_swept(router: type[Router]) -> None:
    model = validate(prepare(with_router(router)))
    assert (model.description.engine, model.reroute_refused) == ("sweep", None)


@pytest.mark.parametrize(
    ("router", "reason"),
    [(ByMatmul, "the router's linear map was not seen"), (Stubborn, "a struck expert was chosen again")],
)
def test_reroute_is_refused_where_it_cannot_be_verified(router: type[Router], reason: str) -> None:
    model = validate(prepare(with_router(router)))
    assert model.reroute_refused is not None
    assert reason in model.reroute_refused
    assert model.description.engine == "sweep"
    engine = Engine(model, memory=2**62)
    with pytest.raises(ValueError, match=r"intervention\.kind: reroute is refused for this model, in layer 0"):
        engine.measure(texts((3,)), [np.arange(3)], layers=[0], interventions=[Intervention("reroute")])
    assert engine.measure(texts((3,)), [np.arange(3)], layers=[0], interventions=[Intervention("zero")]).effects


class Elsewhere(nn.Module):
    """A block that never calls its experts module."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.gate, self.experts = inner.gate, inner.experts

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 1.5


def test_blocks_that_bypass_their_experts_are_refused() -> None:
    module = build("olmoe")
    module.model.layers[2].mlp = Elsewhere(module.model.layers[2].mlp)
    with pytest.raises(ModelError, match=r"experts modules of layers \[2\] are never called"):
        prepare(module)


def test_families_without_the_seam_are_refused() -> None:
    for family in ("llama4_text", "jetmoe"):
        config = CONFIG_MAPPING[family](
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            kv_channels=8,
            vocab_size=64,
            intermediate_size=16,
            intermediate_size_mlp=16,
            num_local_experts=4,
            num_experts_per_tok=2 if family == "jetmoe" else 1,
            head_dim=8,
            pad_token_id=None,
        )
        with pytest.raises(ModelError, match="has no fused experts module"):
            prepare(AutoModelForCausalLM.from_config(config))


def test_a_dense_model_is_refused() -> None:
    config = CONFIG_MAPPING["llama"](
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, intermediate_size=16
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM has no fused experts module"):
        prepare(AutoModelForCausalLM.from_config(config))


# ---- what is computed must be what the library computes ----


def test_a_loss_that_is_not_the_librarys_falls_back_and_the_oracle_decides() -> None:
    """A library loss that no forward of ours can explain: here the sweep reports it and whole forwards take over."""
    module = build("olmoe", 5)
    own = type(module).forward

    class Tempered(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            output = own(self, *args, **kwargs)
            if labels is not None:
                output.loss = 1.1 * own(self, *args, labels=labels, **kwargs).loss
            return output

    module.__class__ = Tempered
    model = validate(prepare(module))
    assert model.description.engine == "oracle"
    assert "the library's own" in model.description.engine_reason


def test_experts_that_do_nothing_are_refused() -> None:
    module = build("olmoe", 6)
    with torch.no_grad():
        for layer in module.model.layers:
            layer.mlp.experts.down_proj.zero_()
    with pytest.raises(ModelError, match="cannot be audited, removing experts changes nothing"):
        validate(prepare(module))


def test_an_auxiliary_loss_does_not_spoil_the_comparison() -> None:
    model = validate(prepare(build("mixtral", 7, output_router_logits=True, router_aux_loss_coef=0.5)))
    assert model.description.engine == "sweep"
    assert any("output_router_logits was switched off" in note for note in model.description.notes)


def test_validation_leaves_the_model_as_it_was() -> None:
    model = ready("deepseek_v3")
    ids = torch.from_numpy(texts((9,), 8)[0].token_ids)[None]
    fresh = build("deepseek_v3")
    with torch.inference_mode(), model.own_attention():
        torch.testing.assert_close(model.module(input_ids=ids).logits, fresh(input_ids=ids).logits, rtol=0, atol=0)
    assert not any("forward" in m.__dict__ for m in model.module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_a_soft_capped_head_is_read_the_plain_way() -> None:
    module = build("qwen3_moe", 9)
    own = type(module).forward

    class SoftCapped(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            labels = kwargs.pop("labels", None)
            output = own(self, *args, **kwargs)
            output.logits = 3.0 * torch.tanh(output.logits / 3.0)
            if labels is not None:
                output.loss = F.cross_entropy(output.logits[0, :-1], labels[0, 1:])
            return output

    module.__class__ = SoftCapped
    model = validate(prepare(module))
    assert model.description.engine == "sweep"
    assert model.head.linear is False
    sequences, positions, asked = texts((6, 2), 9), [np.arange(6), np.arange(2)], [Intervention("zero")]
    found = Engine(model, memory=2**62).measure(sequences, positions, layers=[1, 2], interventions=asked)
    theirs = reference.effects(model, sequences, [p.tolist() for p in positions], [1, 2], asked, "token")
    ours = reference.keyed(found.effects)
    for name in ("kl", "tv", "delta_loss", "delta_logit"):
        np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), rtol=1e-6, atol=1e-6)
