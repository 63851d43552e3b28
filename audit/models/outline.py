"""A model built from its configuration alone, on torch's meta device: every shape, no weights, no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from audit.models.description import ModelDescription, configured_top_k, description_of, text_config
from audit.models.discovery import ModelError, Site, decoder_layers, find_sites
from audit.models.sources import DTYPES, field_errors, library_errors, read_configuration


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What costs and sizes are computed from before anything is loaded. ``device``: the one it is planned for."""

    module: nn.Module
    layers: nn.ModuleList
    sites: dict[int, Site]
    description: ModelDescription
    device: torch.device


def configuration_of(fields: dict[str, Any], source: str) -> Any:
    """The configuration that has these fields, ``model_type`` among them; the others as its class has them.

    Raises ModelError where the library does not know the ``model_type`` or refuses a field.
    """
    known = dict(fields)
    family = known.pop("model_type", None)
    with library_errors(source, "built", "fields that its configuration class takes"), field_errors():
        return AutoConfig.for_model(family, **known)


def outline(
    configuration: Any,
    *,
    source: str,
    dtype: str = "bfloat16",
    device: str = "cuda",
    trust_remote_code: bool = False,
) -> Outline:
    """The model of a configuration without weights, as if loaded in ``dtype``. Raises ModelError."""
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype: {dtype!r} is unknown; known are {', '.join(DTYPES)}")
    right = "a model that transformers can build from its configuration"
    with library_errors(source, "built", right), field_errors(), torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            configuration, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, attn_implementation="eager"
        )
    text = text_config(configuration)
    layers = decoder_layers(module)
    sites = find_sites(layers)
    description = description_of(
        module,
        text,
        len(layers),
        sites,
        source=source,
        top_k=configured_top_k(text),
        size=sum(p.numel() * p.element_size() for p in module.parameters()),
        engine=("unknown", "decided when the weights are loaded"),
        notes=[f"read from the configuration; bytes are for {dtype}"],
    )
    return Outline(module, layers, sites, description, torch.device(device))


def describe(
    source: str, *, files: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> ModelDescription:
    """What a checkpoint holds, from its configuration alone: no weights are read, no memory is taken.

    ``files``: the folder that the files of a ``source`` which is a URL were fetched to.
    """
    configuration = read_configuration(source, files=files, revision=revision, trust_remote_code=trust_remote_code)
    return outline(configuration, source=source, trust_remote_code=trust_remote_code).description
