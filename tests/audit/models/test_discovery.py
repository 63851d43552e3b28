"""Which modules of a model are its experts, router, shared experts, and which layers it promises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from families import SWEEP, WITH_SHARED, build
from torch import nn

from audit.models.discovery import ModelError, decoder_layers, find_sites, is_experts, promised_moe_layers

# Where each family keeps its parts, written down from the library's modelling files.
BLOCK = {"granitemoe": "block_sparse_moe", "granitemoeshared": "block_sparse_moe"}
ROUTER = {
    "gpt_oss": "router",
    "phimoe": "router",
    "granitemoe": "router",
    "granitemoeshared": "router",
    "afmoe": "router",
}
SHARED = {"qwen2_moe": "shared_expert", "hunyuan_v1_moe": "shared_mlp"}
FIRST = {"deepseek_v2": 1, "deepseek_v3": 1, "glm4_moe": 1, "ernie4_5_moe": 1, "dots1": 1, "afmoe": 1, "exaone_moe": 1}


@pytest.mark.parametrize("family", SWEEP)
def test_the_parts_of_every_family(family: str) -> None:
    module = build(family)
    layers = decoder_layers(module)
    assert layers is module.model.layers
    sites = find_sites(layers)
    assert list(sites) == list(range(FIRST.get(family, 0), 4))
    for number, site in sites.items():
        block = getattr(layers[number], BLOCK.get(family, "mlp"))
        assert site.layer == number
        assert site.block is block
        assert site.experts is block.experts
        assert site.router is getattr(block, ROUTER.get(family, "gate"))
        assert site.num_experts == 8
        if family == "granitemoeshared":
            assert site.shared is layers[number].shared_mlp
        elif family in WITH_SHARED:
            assert site.shared is getattr(block, SHARED.get(family, "shared_experts"))
        else:
            assert site.shared is None


def test_modules_that_only_look_like_experts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (
                nn.Parameter(nn.init.zeros_(nn.Linear(2, 2).weight)[None].repeat(n, 1, 1)) for n in (3, 4)
            )

        def forward(self, hidden: object, index: object, weights: object) -> None: ...

    class OneInput(Two):
        def forward(self, hidden: object) -> None: ...

    experts = build("olmoe").model.layers[0].mlp.experts
    assert is_experts(experts)
    assert not is_experts(Two())  # differing numbers of experts
    assert not is_experts(OneInput())
    assert not is_experts(nn.Linear(4, 4))
    assert not is_experts(nn.Conv1d(3, 3, 1))  # a three-dimensional weight


def test_two_stacks_and_two_experts_modules_are_refused() -> None:
    a, b = build("olmoe"), build("olmoe")
    with pytest.raises(ModelError, match="has 2 separate stacks of MoE layers"):
        decoder_layers(nn.ModuleDict({"a": a, "b": b}))
    layers = decoder_layers(a)
    layers[1].second = b.model.layers[0].mlp.experts
    with pytest.raises(ModelError, match="layer 1 has 2 experts modules"):
        find_sites(layers)


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        ({}, 4, None),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, 4, {1, 3}),
        ({"first_k_dense_replace": 2}, 5, {2, 3, 4}),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, 6, {2, 4}),
        ({"num_dense_layers": 3}, 5, {3, 4}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, 6, {1, 3, 5}),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]}, 4, {1, 2}),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}, 4, {1, 2, 3}),
        ({"moe_layer_start_index": 0, "moe_layer_end_index": 2, "moe_layer_interval": 2}, 6, {1}),
    ],
)
def test_promised_layers(config: dict[str, object], layers: int, expected: set[int] | None) -> None:
    assert promised_moe_layers(SimpleNamespace(**config), layers) == expected
