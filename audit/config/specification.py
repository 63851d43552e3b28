"""The typed audit specification: every key, its default and what it takes.

A field's description completes "it takes ...": mistakes are told with it. An empty file is a full specification: it
audits the embedded demo model on its held-out text. Paths are relative to the folder of the configuration file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, PrivateAttr, ValidationError, model_validator

from audit.config.files import assign, read_yaml
from audit.config.mistakes import mistake, shown
from audit.config.section import Many, Section
from audit.config.studies import StudiesConfig
from audit.interventions import KINDS, NEEDS_CALIBRATION, Intervention, Kind, Scope, Target

_DEFAULT_LISTS: dict[str, list[Any]] = {"interventions": [{}], "corpus.sources": [{"kind": "demo"}]}


class ModelConfig(Section):
    """Which checkpoint, and how it is loaded."""

    source: str = Field(
        default="demo", min_length=1, description="demo, the folder or URL of a checkpoint, or the name of a hub model"
    )
    revision: str | None = Field(default=None, description="null, or the branch, tag or commit of a hub model")
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    device: str = Field(default="auto", min_length=1, description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(default=False, description="true or false")
    allow_pickle: bool = Field(default=False, description="true or false")
    backend: Literal["auto", "single", "accelerate", "deepspeed_zero3", "deepspeed_tp", "transformers_tp"] = "auto"
    # Where layers are kept that do not fit the device: in the host's memory or, in a folder, on a local disk.
    offload: Literal["auto", "none", "cpu", "nvme"] = "auto"
    offload_folder: str | None = Field(
        default=None, min_length=1, description="null, or a folder on a local disk of every machine"
    )

    def location(self, folder: Path) -> str:
        """What to load: ``demo``, the absolute path or URL of a checkpoint, or a hub name. Relative to the folder, a
        path is what starts with ``.``, ``/`` or ``~`` and what exists there."""
        if self.source == "demo":
            return self.source
        path = folder / Path(self.source).expanduser()
        return str(path.resolve()) if self.source.startswith((".", "/", "~")) or path.exists() else self.source


class _Source(Section):
    min_characters: int = Field(
        default=0, ge=0, description="a whole number of at least 0: texts of that many characters or fewer are left out"
    )
    first: int | None = Field(
        default=None, ge=1, description="null, or a whole number of at least 1: how many documents are taken"
    )


class DemoSource(_Source):
    """The embedded demo model's held-out text."""

    kind: Literal["demo"] = "demo"
    domains: Many[Literal["code", "prose", "math"]] = Field(
        default=("code", "prose", "math"), min_length=1, description="a list of code, prose and math"
    )
    documents_per_domain: int | None = Field(
        default=40, ge=1, description="null for all, or a whole number of at least 1"
    )
    seed: int = Field(default=0, ge=0, description="a whole number of at least 0")

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains: {shown(list(self.domains))} names a domain twice; name each once")
        return self


class TextSource(_Source):
    """Text files in UTF-8: one file, a folder with all below it, or a pattern."""

    kind: Literal["text"]
    path: str = Field(min_length=1, description="a text file, a folder or a pattern such as texts/*.txt")
    domain: str = Field(min_length=1, description="the name of the texts' domain, such as prose")
    per_line: bool = Field(default=False, description="true (every line is a document) or false")


class _RowSource(_Source):
    text_field: str = Field(default="text", min_length=1, description="the name of the field that holds the text")
    domain: str | None = Field(default=None, min_length=1, description="the name of the texts' domain, such as prose")
    domain_field: str | None = Field(
        default=None, min_length=1, description="the name of the field that holds the domain"
    )

    @model_validator(mode="after")
    def _one_domain(self) -> Self:
        if (self.domain is None) == (self.domain_field is None):
            given = "missing" if self.domain is None else f"{self.domain!r} is given, and domain_field too"
            raise ValueError(f"domain: {given}; give either domain (a name) or domain_field (the field that holds it)")
        return self


class JsonlSource(_RowSource):
    """JSON Lines: a document per line."""

    kind: Literal["jsonl"]
    path: str = Field(min_length=1, description="a JSON Lines file, a folder or a pattern such as texts/*.jsonl")


class ParquetSource(_RowSource):
    """Parquet, Arrow or Feather: a document per row."""

    kind: Literal["parquet"]
    path: str = Field(min_length=1, description="a Parquet, Arrow or Feather file, a folder or a pattern")


class DatasetsSource(_RowSource):
    """A Hugging Face ``datasets`` data set, by hub name or folder: a document per row."""

    kind: Literal["datasets"]
    name: str = Field(min_length=1, description="the name of a data set on the hub, or its folder")
    config: str | None = Field(
        default=None, description="null, or the data set's configuration, such as wikitext-2-raw-v1"
    )
    split: str = Field(min_length=1, description="a split of the data set, such as test")
    revision: str | None = Field(default=None, description="null, or the branch, tag or commit of a hub data set")


Source = Annotated[
    DemoSource | TextSource | JsonlSource | ParquetSource | DatasetsSource,
    Field(discriminator="kind"),
]


class CorpusConfig(Section):
    """The text, and how it becomes token sequences."""

    sources: Many[Source] = Field(
        default=(DemoSource(),),
        min_length=1,
        description="a list of sources, such as [{kind: text, path: texts, domain: prose}]",
    )
    max_tokens: int = Field(default=512, ge=4, description="a whole number of at least 4, in tokens")
    long_documents: Literal["split", "truncate"] = "split"


class CalibrationConfig(Section):
    """The documents set aside for mean outputs, reservoirs and, by default, the metrics."""

    share: float = Field(
        default=0.2, ge=0, lt=1, description="a number from 0 to below 1: the share of the documents set aside"
    )
    documents: int | None = Field(
        default=None, ge=1, description="null (share decides), or a whole number of at least 1"
    )
    metrics_from: Literal["calibration", "audited"] = Field(default="calibration", alias="from")

    @property
    def empty(self) -> bool:
        """Whether no document is set aside."""
        return self.documents is None and self.share == 0


class PositionsConfig(Section):
    """Which positions are audited."""

    sample: int | None = Field(default=None, ge=1, description="null for all, or a whole number of at least 1")
    include_first: bool = Field(default=False, description="true or false")
    include_special: bool = Field(default=False, description="true or false")


class InterventionConfig(Section):
    """One do-operator and its target, as written in the file."""

    kind: Kind = Field(default="zero", description=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}")
    factor: float | None = Field(default=None, description="a number, with scale only")
    draws: int = Field(default=1, description="a whole number of at least 1, with resample or a random target only")
    target: (
        Literal["each", "all", "shared"]
        | Annotated[dict[Literal["highest", "lowest", "random"], int], Field(min_length=1, max_length=1)]
        | Annotated[dict[Literal["ranked", "metric"], int | str], Field(min_length=2, max_length=2)]
        | Annotated[
            dict[Literal["listed", "each"], Annotated[Many[int], Field(min_length=1)]],
            Field(min_length=1, max_length=1),
        ]
    ) = Field(
        default="each",
        description="each, all, shared, {highest: n}, {lowest: n}, {random: n}, {ranked: n, metric: name}, "
        "{listed: [ids]} or {each: [ids]}",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            self.build()
        except ValueError as error:
            raise ValueError(str(error).removeprefix("intervention.")) from error
        return self

    def build(self) -> Intervention:
        """The intervention this describes. Raises ValueError for a kind, target, factor and draws that do not fit."""
        return Intervention(kind=self.kind, target=self._target(), factor=self.factor, draws=self.draws)

    def _target(self) -> Target:
        if isinstance(self.target, str):
            return Target(self.target)
        given: dict[Any, Any] = dict(self.target)
        if "ranked" in given:
            return self._ranked(given["ranked"], given["metric"])
        ((selection, value),) = given.items()
        return Target(selection, count=value) if isinstance(value, int) else Target(selection, experts=value)

    @staticmethod
    def _ranked(count: int | str, metric: int | str) -> Target:
        if not isinstance(count, int) or not isinstance(metric, str):
            raise ValueError(
                f"target: ranked {count!r} with metric {metric!r} cannot be used; ranked takes a whole number, metric "
                "a name"
            )
        from audit.observations.registry import find_metric  # noqa: PLC0415  torch, which specifications else do without

        try:
            return Target("ranked", count=count, metric=find_metric(metric).name)
        except ValueError as error:
            raise ValueError(f"target.{str(error).removeprefix('target.')}") from error


class EngineConfig(Section):
    """How effects are computed."""

    method: Literal["auto", "sweep", "oracle"] = "auto"
    memory: Literal["auto"] | Annotated[ByteSize, Field(gt=0)] = Field(
        default="auto", description="auto, or more than 0 bytes: a number, or a text such as 512MiB or 2GiB"
    )
    micro_batch: int | None = Field(
        default=None, ge=1, description="null for what the memory allows, or a whole number of rows of at least 1"
    )
    threads: int = Field(default=1, ge=1, description="a whole number of at least 1")
    experts: Literal["auto", "module", "sorted"] = "auto"
    linear: Literal["auto", "torch", "onednn"] = "auto"
    identity_every: int = Field(
        default=8,
        ge=1,
        description="a whole number of at least 1: every how many tokens an identity intervention rides along, and "
        "every how many sequences have repeats",
    )


class ClusterConfig(Section):
    """How the work is spread and what is done about failures."""

    min_groups: int = Field(default=1, ge=0, description="a whole number of at least 0")
    max_groups: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="auto, or a whole number of at least 1"
    )
    target_minutes: float | None = Field(default=None, gt=0, description="null, or a number of minutes above 0")
    ranks: int = Field(default=1, ge=1, description="a whole number of at least 1: processes that hold one model")
    task_minutes: float = Field(default=0.25, gt=0, description="a number of minutes above 0")
    max_attempts: int = Field(default=3, ge=1, description="a whole number of at least 1")
    # How long a task, and loading the model, may take until the group is ended and another one tries.
    hang_minutes: float = Field(default=30, gt=0, description="a number of minutes above 0")
    load_minutes: float = Field(default=60, gt=0, description="a number of minutes above 0")
    # A commit begins when this much is gathered, whichever comes first, or after a minute.
    commit_results: int = Field(default=64, ge=1, description="a whole number of tasks of at least 1")
    commit_bytes: Annotated[ByteSize, Field(gt=0)] = Field(
        default=ByteSize(256 * 2**20), description="more than 0 bytes: a number, or a text such as 256MiB or 4GiB"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_groups != "auto" and self.min_groups > self.max_groups:
            raise ValueError(
                f"min_groups: {self.min_groups} is more than max_groups, {self.max_groups}; use at most that many"
            )
        return self


class AuditConfig(Section):
    """A whole audit. Two specifications are equal where their keys and their folders are."""

    name: str = Field(default="audit", min_length=1, description="a name")
    seed: int = Field(default=0, ge=0, description="a whole number of at least 0")
    model: ModelConfig = ModelConfig()
    corpus: CorpusConfig = CorpusConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    positions: PositionsConfig = PositionsConfig()
    layers: Literal["all"] | Annotated[Many[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        default="all", description="all, or a list of MoE layer numbers such as [0, 4, 7]"
    )
    scope: Scope = "token"
    all_positions: bool = Field(default=False, description="true or false")
    interventions: Many[InterventionConfig] = Field(
        default=(InterventionConfig(),), min_length=1, description="a list of interventions, such as [{kind: zero}]"
    )
    attribution: bool = Field(default=False, description="true or false")
    studies: StudiesConfig = StudiesConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> AuditConfig:
        """The specification in a YAML file with ``key=value`` overrides laid over it, the last one winning.

        Raises ConfigError, one sentence, for the first mistake.
        """
        path = Path(path)
        data = read_yaml(path)
        for override in overrides:
            data = assign(data, override, _DEFAULT_LISTS)
        return cls.parse(data, path.resolve().parent)

    @classmethod
    def parse(cls, data: Mapping[str, Any], folder: Path) -> AuditConfig:
        """The specification in a mapping, such as a saved ``resolved()``; relative paths count from the folder."""
        try:
            config = cls.model_validate(dict(data))
        except ValidationError as error:
            raise mistake(error, cls, data) from error
        config._folder = folder
        return config

    @property
    def folder(self) -> Path:
        """The folder of the configuration file, from which relative paths count."""
        return self._folder

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data. Paths stay as written, so a run can go on where folders moved."""
        return self.model_dump(mode="json", by_alias=True)

    def build_interventions(self) -> tuple[Intervention, ...]:
        """The interventions in the order of the file."""
        return tuple(entry.build() for entry in self.interventions)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.layers != "all" and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: {shown(list(self.layers))} names a layer twice; name each once")
        if self.attribution and self.scope == "sequence":
            raise ValueError("attribution: True has no meaning for scope sequence; it estimates effects at one token")
        if self.all_positions and self.scope == "token":
            raise ValueError("all_positions: True has no meaning for scope token; use it with scope: sequence")
        for index, entry in enumerate(self.interventions):
            if entry in self.interventions[:index]:
                first = self.interventions.index(entry)
                raise ValueError(f"interventions.{index}: {entry.kind!r} repeats interventions.{first}; name each once")
            if self.calibration.empty and entry.kind in NEEDS_CALIBRATION:
                raise ValueError(
                    f"calibration.share: 0 leaves no documents, but {entry.kind!r} needs some; use 0.2, say"
                )
        selections = [entry.build().target.selection for entry in self.interventions]
        for study in ("importance", "redistribution"):
            if getattr(self.studies, study) and "each" not in selections:
                raise ValueError(
                    f"studies.{study}: it compares the experts of a token one by one, but no intervention has the "
                    "target each; add {kind: zero} to interventions"
                )
        if self.calibration.empty and self.calibration.metrics_from == "calibration":
            raise ValueError(
                "calibration.share: 0 leaves no documents for the metrics; use more, or calibration.from: audited"
            )
        return self
