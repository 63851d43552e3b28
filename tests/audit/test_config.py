"""The specification: defaults, overrides, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from audit.config import AuditConfig, ConfigError, audited_layers, check_against
from audit.interventions import Intervention, Target

CONFIGS = Path(__file__).parents[2] / "configs"

DEFAULTS = {
    "name": "audit",
    "seed": 0,
    "model": {
        "source": "demo",
        "revision": None,
        "dtype": "float32",
        "device": "auto",
        "trust_remote_code": False,
        "allow_pickle": False,
        "backend": "auto",
        "offload": "auto",
        "offload_folder": None,
    },
    "corpus": {
        "sources": [
            {
                "kind": "demo",
                "domains": ["code", "prose", "math"],
                "documents_per_domain": 40,
                "seed": 0,
                "min_characters": 0,
                "first": None,
            }
        ],
        "max_tokens": 512,
        "long_documents": "split",
    },
    "calibration": {"share": 0.2, "documents": None, "from": "calibration"},
    "positions": {"sample": None, "include_first": False, "include_special": False},
    "layers": "all",
    "scope": "token",
    "all_positions": False,
    "interventions": [{"kind": "zero", "factor": None, "draws": 1, "target": "each"}],
    "attribution": False,
    "studies": {"importance": None, "progressive": None, "redistribution": False, "redundancy": None},
    "engine": {
        "method": "auto",
        "memory": "auto",
        "micro_batch": None,
        "threads": 1,
        "experts": "auto",
        "linear": "auto",
        "identity_every": 8,
    },
    "cluster": {
        "min_groups": 1,
        "max_groups": "auto",
        "target_minutes": None,
        "ranks": 1,
        "task_minutes": 0.25,
        "max_attempts": 3,
        "hang_minutes": 30.0,
        "load_minutes": 60.0,
        "commit_results": 64,
        "commit_bytes": 268435456,
    },
}


def load(folder: Path, text: str, *overrides: str) -> AuditConfig:
    path = folder / "audit.yaml"
    path.write_text(text)
    return AuditConfig.load(path, overrides)


def sentence(raised: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(raised.value)
    assert "\n" not in text
    return text


def model(**changes: Any) -> SimpleNamespace:
    described = {
        "source": "tiny",
        "moe_layers": (1, 2, 3, 5),
        "experts": 8,
        "top_k": 2,
        "shared_experts": False,
        "context_limit": 1024,
        "engine": "sweep",
        "engine_reason": "every layer attends through the interface",
    }
    return SimpleNamespace(**(described | changes))


def test_an_empty_file_is_the_audit_of_the_demo(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing\n").resolved() == DEFAULTS


def test_the_resolved_form_is_plain_data_that_reads_back_as_the_same_specification(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "interventions: [{kind: scale, factor: 1e-1}, {target: {highest: 2}}]\n"
        "layers: [4, 1]\n"
        "calibration: {from: audited}\n"
        "corpus: {sources: [{kind: jsonl, path: a.jsonl, domain_field: topic}]}\n",
    )
    saved = yaml.safe_load(yaml.safe_dump(config.resolved()))
    assert saved["interventions"][0]["factor"] == 0.1
    assert saved["interventions"][1]["target"] == {"highest": 2}
    assert saved["calibration"]["from"] == "audited"
    assert AuditConfig.parse(saved, tmp_path) == config


def test_a_specification_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        AuditConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "bytes_"),
    [("512MiB", 512 * 2**20), ("1.5GiB", 3 * 2**29), ("2GB", 2 * 10**9), ("4096", 4096)],
)
def test_memory_is_a_number_of_bytes(tmp_path: Path, written: str, bytes_: int) -> None:
    assert load(tmp_path, f"engine: {{memory: {written}}}").engine.memory == bytes_
    assert load(tmp_path, "engine: {memory: auto}").engine.memory == "auto"


def test_overrides_win_the_last_one_most_and_their_values_are_yaml(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "seed: 1\nmodel: {dtype: float16}\nlayers: [0]\n",
        "seed=2", "seed=3", "layers=[2, 7]", "model.revision=main", "positions.sample=null", "engine.memory=1MiB",
    )  # fmt: skip
    assert (config.seed, config.layers, config.model.revision, config.positions.sample) == (3, (2, 7), "main", None)
    assert (config.model.dtype, config.engine.memory) == ("float16", 2**20)


def test_overrides_reach_into_lists_and_append_to_them(tmp_path: Path) -> None:
    text = "interventions: [{kind: zero}, {kind: mean}]"
    config = load(
        tmp_path, text, "interventions.1.kind=scale", "interventions.1.factor=0.5", "interventions.2={kind: mean}"
    )
    expected = (Intervention("zero"), Intervention("scale", factor=0.5), Intervention("mean"))
    assert config.build_interventions() == expected


def test_overrides_start_from_the_default_list_where_the_file_has_none(tmp_path: Path) -> None:
    config = load(tmp_path, "", "interventions.0.kind=reroute", "corpus.sources.0.documents_per_domain=3")
    assert config.build_interventions() == (Intervention("reroute"),)
    assert config.resolved()["corpus"]["sources"] == [DEFAULTS["corpus"]["sources"][0] | {"documents_per_domain": 3}]  # type: ignore[index]


def test_interventions_are_those_of_the_science(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        interventions:
          - {kind: zero, target: all}
          - {kind: zero, target: shared}
          - {kind: renormalize, target: {lowest: 1}}
          - {kind: zero, target: {listed: [3, 5]}}
          - {kind: reroute, target: {each: [2]}}
          - {kind: resample, draws: 4}
        """,
    )
    assert config.build_interventions() == (
        Intervention("zero", Target("all")),
        Intervention("zero", Target("shared")),
        Intervention("renormalize", Target("lowest", count=1)),
        Intervention("zero", Target("listed", experts=(3, 5))),
        Intervention("reroute", Target("each", experts=(2,))),
        Intervention("resample", draws=4),
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # unknown keys
        ("sed: 1", ["sed", "1", "did you mean seed?"]),
        ("engine: {memroy: 2GiB}", ["engine.memroy", "'2GiB'", "did you mean memory?"]),
        ("dtype: float16", ["dtype", "'float16'", "did you mean model.dtype?"]),
        ("corpus: {sources: [{kind: text, pth: x, domain: a}]}", ["corpus.sources.0.pth", "'x'", "did you mean path?"]),
        ("calibration: {metrics_from: audited}", ["calibration.metrics_from", "'audited'", "from"]),
        ("interventions: [{kind: zero, facto: 1}]", ["interventions.0.facto", "1", "did you mean factor?"]),
        ("3: 4", ["3", "keys are names"]),
        # wrong types
        ("seed: x", ["seed", "'x'", "whole number of at least 0"]),
        ("seed: '3'", ["seed", "'3'", "whole number"]),
        ("seed: true", ["seed", "True", "whole number"]),
        ("engine: 3", ["engine", "3", "a section with the keys method, memory"]),
        ("model:", ["model", "null", "a section with the keys source"]),
        ("layers: [0, x]", ["layers", "[0, 'x']", "all, or a list of MoE layer numbers"]),
        ("layers: []", ["layers", "[]", "all, or a list"]),
        ("layers: [3, 3]", ["layers", "[3, 3]", "name each once"]),
        ("interventions: zero", ["interventions", "'zero'", "[{kind: zero}]"]),
        ("interventions: [zero]", ["interventions.0", "'zero'", "keys kind, factor, draws, target"]),
        ("corpus: {sources: [texts]}", ["corpus.sources", "['texts']", "{kind: text, path: texts, domain: prose}"]),
        ("corpus: {sources: [{kind: demo, domains: [maths]}]}", ["corpus.sources.0.domains", "'maths'", "math"]),
        ("corpus: {sources: [{kind: demo, domains: [code, code]}]}", ["corpus.sources.0.domains", "'code'", "once"]),
        # unknown names
        ("interventions: [{kind: zeros}]", ["interventions.0.kind", "'zeros'", "did you mean zero?"]),
        ("interventions: [{target: lowest}]", ["interventions.0.target", "'lowest'", "{lowest: n}"]),
        ("model: {dtype: float8}", ["model.dtype", "'float8'", "bfloat16"]),
        ("corpus: {sources: [{kind: txt}]}", ["corpus.sources.0.kind", "'txt'", "did you mean text?"]),
        ("corpus: {sources: [{path: x}]}", ["corpus.sources.0.kind", "no value", "demo, text, jsonl, parquet or"]),
        ("scope: tokens", ["scope", "'tokens'", "token or sequence"]),
        # missing and clashing
        ("corpus: {sources: [{kind: text, domain: a}]}", ["corpus.sources.0.path", "missing", "a folder"]),
        ("corpus: {sources: [{kind: jsonl, path: a}]}", ["corpus.sources.0.domain", "missing", "domain_field"]),
        (
            "corpus: {sources: [{kind: jsonl, path: a, domain: b, domain_field: c}]}",
            ["corpus.sources.0.domain", "'b'", "either domain"],
        ),
        ("interventions: [{kind: scale}]", ["interventions.0.factor", "None", "scale needs one"]),
        ("interventions: [{factor: 2}]", ["interventions.0.factor", "2", "scale"]),
        ("interventions: [{kind: zero}, {}]", ["interventions.1", "'zero'", "name each once"]),
        (
            "interventions: [{target: {highest: 1, lowest: 1}}]",
            ["interventions.0.target", "'lowest': 1", "{highest: n}"],
        ),
        ("all_positions: true", ["all_positions", "True", "scope: sequence"]),
        ("calibration: {share: 0}", ["calibration.share", "0", "calibration.from: audited"]),
        (
            "calibration: {share: 0, from: audited}\ninterventions: [{kind: mean}]",
            ["calibration.share", "0", "'mean'", "0.2"],
        ),
        # budgets and counts
        ("engine: {memory: 0GiB}", ["engine.memory", "'0GiB'", "more than 0"]),
        ("engine: {memory: -1}", ["engine.memory", "-1", "more than 0"]),
        ("engine: {memory: much}", ["engine.memory", "'much'", "2GiB"]),
        ("engine: {micro_batch: 0}", ["engine.micro_batch", "0", "at least 1"]),
        ("positions: {sample: 0}", ["positions.sample", "0", "at least 1"]),
        ("cluster: {task_minutes: 0}", ["cluster.task_minutes", "0", "above 0"]),
        ("cluster: {hang_minutes: .nan}", ["cluster.hang_minutes", "nan", "above 0"]),
        ("cluster: {commit_bytes: 0}", ["cluster.commit_bytes", "0", "more than 0 bytes"]),
        ("cluster: {commit_results: 0}", ["cluster.commit_results", "0", "at least 1"]),
        ("cluster: {max_groups: 0}", ["cluster.max_groups", "0", "at least 1"]),
        ("cluster: {min_groups: -1}", ["cluster.min_groups", "-1", "at least 0"]),
        ("cluster: {min_groups: 3, max_groups: 2}", ["cluster.min_groups", "3", "max_groups, 2", "at most"]),
        ("cluster: {target_minutes: 0}", ["cluster.target_minutes", "0", "above 0"]),
        ("cluster: {ranks: 0}", ["cluster.ranks", "0", "at least 1"]),
        ("calibration: {share: 1}", ["calibration.share", "1", "below 1"]),
        ("interventions: [{target: {highest: 0}}]", ["interventions.0.target.highest", "0", "at least 1"]),
        ("interventions: [{kind: resample, draws: 0}]", ["interventions.0.draws", "0", "1 or more"]),
        # the file itself
        ("seed: [1", ["configuration", "audit.yaml", "not YAML"]),
        ("seed: 1\nseed: 2", ["configuration", "line 2", "'seed'", "twice"]),
        ("- seed", ["configuration", "list", "keys"]),
    ],
)
def test_a_mistake_gives_one_sentence_with_field_value_and_what_is_right(
    tmp_path: Path, text: str, told: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    said = sentence(raised)
    assert said.startswith(told[0])
    assert [part for part in told if part not in said] == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", ["--set", "'seed'", "key=value"]),
        ("a..b=1", ["--set", "'a..b=1'", "key=value"]),
        ("seed=[1", ["--set", "'seed=[1'", "not YAML"]),
        ("interventions.2.kind=zero", ["--set", "interventions.2", "0 to 1"]),
        ("interventions.first=zero", ["--set", "interventions.first", "0 to 1"]),
        ("engine.memori=1", ["engine.memori", "1", "did you mean memory?"]),
        ("seed.x=1", ["seed", "{'x': 1}", "whole number"]),
    ],
)
def test_a_mistaken_override_gives_one_sentence(tmp_path: Path, override: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, "", override)
    said = sentence(raised)
    assert said.startswith(told[0])
    assert [part for part in told if part not in said] == []


def test_a_file_that_is_not_there_or_not_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml.* does not exist; name a YAML file"):
        AuditConfig.load(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(.*\); name a YAML file in UTF-8"):
        AuditConfig.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        AuditConfig.load(tmp_path / "latin.yaml")
    sentence(raised)


@pytest.mark.parametrize(
    ("text", "changes", "told"),
    [
        ("layers: [1, 4]", {}, ["layers", "4 is not an MoE layer", "1-3, 5"]),
        ("layers: [0]", {}, ["layers", "0 is not an MoE layer", "1-3, 5"]),
        ("corpus: {max_tokens: 2000}", {}, ["corpus.max_tokens", "2000", "at most 1024"]),
        ("interventions: [{target: {highest: 3}}]", {}, ["interventions.0.target.highest", "3 experts", "2 active"]),
        (
            "interventions: [{}, {kind: renormalize, target: {lowest: 2}}]",
            {},
            ["interventions.1.target.lowest", "all 2", "at most 1"],
        ),
        (
            "interventions: [{kind: reroute, target: {highest: 2}}]",
            {"experts": 3},
            ["interventions.0", "2 of 3", "top 2"],
        ),
        ("interventions: [{target: {listed: [8]}}]", {}, ["interventions.0.target.experts", "8", "0 to 7"]),
        ("interventions: [{target: shared}]", {}, ["interventions.0.target", "shared", "no shared experts"]),
        (
            "engine: {method: sweep}",
            {"engine": "oracle", "engine_reason": "it has recurrent layers"},
            ["engine.method", "'sweep'", "it has recurrent layers", "use auto or oracle"],
        ),
    ],
)
def test_what_a_model_cannot_do_is_told(tmp_path: Path, text: str, changes: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        check_against(load(tmp_path, text), model(**changes))
    said = sentence(raised)
    assert said.startswith(told[0])
    assert [part for part in told if part not in said] == []


def test_what_a_model_can_do_passes(tmp_path: Path) -> None:
    text = "layers: [5, 1]\ncorpus: {max_tokens: 1024}\ninterventions: [{target: {highest: 2}}, {target: shared}]"
    config = load(tmp_path, text)
    check_against(config, model(shared_experts=True))
    check_against(load(tmp_path, "corpus: {max_tokens: 100000}"), model(context_limit=None))
    assert audited_layers(config, model()) == (1, 5)
    assert audited_layers(load(tmp_path, ""), model()) == (1, 2, 3, 5)


def test_checkpoints_are_looked_for_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    located = {
        source: (c := load(tmp_path, f"model: {{source: {source}}}")).model.location(c.folder)
        for source in ("demo", "mine", "./absent", "allenai/OLMoE-1B-7B-0924", "/abs/model")
    }
    assert located == {
        "demo": "demo",
        "mine": str(tmp_path / "mine"),
        "./absent": str(tmp_path / "absent"),
        "allenai/OLMoE-1B-7B-0924": "allenai/OLMoE-1B-7B-0924",
        "/abs/model": "/abs/model",
    }


def test_every_configuration_that_is_shipped_loads() -> None:
    others = ("cluster", "models")  # not specifications of audits
    audits = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in others]
    names = {path.stem: AuditConfig.load(path).name for path in audits}
    assert set(names) >= {"demo", "importance", "custom_text", "olmoe", "qwen1_5_moe", "deepseek_v2_lite"}
