"""The models that ``configs/models`` describes: enough to plan for each without its checkpoint."""

from __future__ import annotations

from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError

from audit.config.files import read_yaml
from audit.config.mistakes import mistake
from audit.config.section import Many, Section
from audit.models.memory import Backend, Offload

_FOLDER = resources.files("audit") / "models" / "configs"  # a link to configs/models; in a wheel, a copy


class Fields(Section):
    """Fields of a model's configuration that one source gave."""

    source: str = Field(min_length=1, description="where the fields were read")
    verified: bool = Field(description="true or false")
    fields: dict[str, Any] = Field(min_length=1, description="fields of the configuration class")


class NamedModel(Section):
    """A model, and the machine it is meant to run on."""

    source: str = Field(min_length=1, description="the name of a hub model")
    parameters: float = Field(gt=0, description="a number of parameters, as published")
    published: str = Field(min_length=1, description="the published number in words, with its place")
    note: str | None = Field(default=None, description="null, or what that number or the sizes leave out")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    backend: Backend
    offload: Offload = "none"
    ranks: int = Field(ge=1, description="a whole number of at least 1")
    device_memory: Annotated[ByteSize, Field(gt=0)] = Field(description="bytes of one device, such as 80GiB")
    configuration: Many[Fields] = Field(min_length=1, description="a list of fields with their sources")

    def fields(self) -> dict[str, Any]:
        """The configuration's fields of all sources together."""
        return {key: value for part in self.configuration for key, value in part.fields.items()}

    def unverified(self) -> list[str]:
        """The fields that were read in a copy only."""
        return [key for part in self.configuration if not part.verified for key in part.fields]


def names() -> list[str]:
    """The models described, in alphabetical order."""
    return sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir() if path.name.endswith(".yaml"))


def named_model(name: str) -> NamedModel | None:
    """The model of that name; None where it is not described. Raises ConfigError for a mistake in its file."""
    if name not in names():
        return None
    with resources.as_file(_FOLDER / f"{name}.yaml") as path:
        data = read_yaml(path)
    try:
        return NamedModel.model_validate(data)
    except ValidationError as error:
        raise mistake(error, NamedModel, data) from error
