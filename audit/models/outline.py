"""A model built from its configuration alone, on torch's meta device: every shape, no weights, no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from audit.models.description import ModelDescription, configured_top_k, description_of, text_config
from audit.models.discovery import ModelError, Site, decoder_layers, find_sites
from audit.models.sources import DTYPES, library_errors, resolve_source


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What costs and sizes are computed from before anything is loaded. ``device``: the one it is planned for."""

    module: nn.Module
    layers: nn.ModuleList
    sites: dict[int, Site]
    description: ModelDescription
    device: torch.device


def read_configuration(
    source: str, *, files: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The configuration of a checkpoint in a folder, on the hub, or of the embedded one. Raises ModelError."""
    path = resolve_source(source, files)
    with library_errors(source, "read", "a folder with a checkpoint or a hub model"), _field_errors():
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


def configuration_of(fields: dict[str, Any], source: str) -> Any:
    """The configuration that has these fields, ``model_type`` among them; the others as its class has them.

    Raises ModelError where the library does not know the ``model_type`` or refuses a field.
    """
    known = dict(fields)
    family = known.pop("model_type", None)
    with library_errors(source, "built", "fields that its configuration class takes"), _field_errors():
        return AutoConfig.for_model(family, **known)


@contextmanager
def _field_errors() -> Iterator[None]:
    """Within the block what configuration classes raise for a wrong field is a ValueError of one line."""
    try:
        yield
    except (TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(" ".join(str(error).split())) from error


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
    with library_errors(source, "built", right), torch.device("meta"):
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
