"""What the specification names: where a checkpoint lies, on which device and in which precision it is to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from audit.demo import CHECKPOINT
from audit.models.discovery import ModelError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_source(source: str) -> str:
    """The folder or hub name behind ``model.source``. Raises ModelError for a path that is not there."""
    if source == "demo":
        return str(CHECKPOINT)
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).expanduser().exists()
    if looks_like_path:
        folder = Path(source).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.source: {source!r} holds no config.json; name the folder of a checkpoint, a hub model or demo"
            )
        return str(folder)
    return source


def resolve_device(device: str) -> torch.device:
    """The device behind ``model.device``. Raises ModelError where it is absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"model.device: {device!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"model.device: {device!r} was asked for, but this machine has no CUDA device; use cpu or auto"
        )
    return place


def load_tokenizer(path: str, **options: Any) -> Any:
    """The checkpoint's tokenizer, or None where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Where there is none the library may make one up that knows its special tokens and nothing else.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def load_module(source: str, **options: Any) -> Any:
    """The model of a checkpoint by the library's own loader. Raises ModelError, one sentence, where it cannot be."""
    path = resolve_source(source)
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"model.source: {source!r} cannot be loaded ({first_sentence(error)}); name a folder with a "
            "safetensors checkpoint or a hub model"
        ) from error


def first_sentence(error: BaseException) -> str:
    """The first line of an error's text, for a sentence that quotes it."""
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__
