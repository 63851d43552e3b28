"""What the specification names: where a checkpoint lies, how it is read, on which device and how precisely it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from audit.demo import CHECKPOINT
from audit.models.discovery import ModelError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_source(source: str, files: str | None = None) -> str:
    """The folder or hub name behind ``model.source``; of a URL the folder that its ``files`` were fetched to.

    Raises ModelError for a path that is not there.
    """
    if source == "demo":
        return str(CHECKPOINT)
    source = files or source
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
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ModelError(f"model.device: {device!r} is unknown; use auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"model.device: {device!r} was asked for, but this machine has no CUDA device; use cpu or auto"
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"model.device: {device!r} was asked for, but this machine has {torch.cuda.device_count()} of them; use "
            "cuda, or a number below that"
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


@contextmanager
def library_errors(source: str, done: str, right: str) -> Iterator[None]:
    """Within the block the library's errors are a ModelError: ``source`` cannot be ``done``; name what is ``right``."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        refuse_code(source, error)
        raise ModelError(
            f"model.source: {source!r} cannot be {done} ({first_sentence(error)}); name {right}"
        ) from error


def load_module(source: str, *, files: str | None = None, **options: Any) -> Any:
    """The model of a checkpoint by the library's own loader. Raises ModelError, one sentence, where it cannot be."""
    path = resolve_source(source, files)
    pickled = "pickled weights can run code: model.allow_pickle: true reads them"
    with library_errors(source, "loaded", f"a folder with a safetensors checkpoint or a hub model ({pickled})"):
        module, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    if lacking := sorted(found["missing_keys"]):  # the library fills them at random, and only warns
        raise ModelError(
            f"model.source: {source!r} lacks {len(lacking)} of the model's weights, such as {lacking[0]}; it takes a "
            "checkpoint that is complete and of the model's own code"
        )
    return module


def refuse_code(source: str, error: BaseException) -> None:
    """Raise ModelError where the library refused to run code that comes with a checkpoint."""
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"model.trust_remote_code: false, but {source!r} comes with code of its own, which loading it would run; "
            "read that code, and say true where you trust it"
        ) from error


def first_sentence(error: BaseException) -> str:
    """The first line of an error's text, for a sentence that quotes it."""
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


@contextmanager
def field_errors() -> Iterator[None]:
    """Within the block what a wrong field of a configuration makes the library raise is a ValueError of one line."""
    try:
        yield
    except (TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_configuration(
    source: str, *, files: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The configuration of a checkpoint in a folder, on the hub, or of the embedded one. Raises ModelError."""
    path = resolve_source(source, files)
    with library_errors(source, "read", "a folder with a checkpoint or a hub model"), field_errors():
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A checkpoint and how it is read: the section ``model`` of a specification.

    ``files``: the folder that the files of a ``source`` which is a URL were fetched to. Everything here raises
    ModelError, one sentence, where the checkpoint cannot be read so.
    """

    source: str
    files: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f"model.dtype: {self.dtype!r} is unknown; known are {', '.join(DTYPES)}")

    @property
    def place(self) -> torch.device:
        """The device that will compute."""
        return resolve_device(self.device)

    def module(self, **options: Any) -> Any:
        """The model with its weights, on the CPU."""
        return load_module(
            self.source,
            files=self.files,
            revision=self.revision,
            dtype=DTYPES[self.dtype],
            trust_remote_code=self.trust_remote_code,
            use_safetensors=None if self.allow_pickle else True,
            **self._code(),
            **options,
        )

    def skeleton(self) -> Any:
        """The model without weights."""
        configuration = self.configuration()
        right = "a model that transformers can build"
        with library_errors(self.source, "built", right), field_errors(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                configuration, dtype=DTYPES[self.dtype], trust_remote_code=self.trust_remote_code, **self._code()
            )

    def configuration(self) -> Any:
        return read_configuration(
            self.source, files=self.files, revision=self.revision, trust_remote_code=self.trust_remote_code
        )

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None where it has none."""
        path = resolve_source(self.source, self.files)
        return load_tokenizer(path, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def _code(self) -> dict[str, str]:
        # The library's default experts code refuses float64, and on a CPU its plain loop is the faster of the two.
        plain = self.place.type == "cpu" or self.dtype == "float64"
        return {"attn_implementation": "eager", **({"experts_implementation": "eager"} if plain else {})}
