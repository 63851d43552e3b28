"""Whatever dies, hangs or is lost: every row is there once, and the result tables are the same to the last bit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.audit import Audit, Losses
from benchmarks.faults.cases import CASES, UNDISTURBED, Case, Finding, run_case
from benchmarks.faults.nodes import Nodes
from benchmarks.faults.trial import Trial


@pytest.fixture(scope="module")
def nodes(no_ray: None) -> Iterator[Nodes]:
    with Nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Finding:
    finding = run_case(UNDISTURBED, nodes, tmp_path_factory.mktemp("undisturbed"))
    assert (finding.status, finding.losses) == (0, Losses(0, 0, 0, 0)), finding.said
    return finding


def _parameter(case: Case) -> object:
    return pytest.param(case, id=case.name, marks=[pytest.mark.full] if case.full else [])


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES])
def test_nothing_is_lost(case: Case, nodes: Nodes, undisturbed: Finding, tmp_path: Path) -> None:
    finding = run_case(case, nodes, tmp_path)
    said = "\n".join(finding.said)
    assert finding.losses == Losses(0, 0, 0, 0), said
    assert finding.results == undisturbed.results, said
    assert finding.status == case.status, said
    assert re.search(case.told, said), said


def test_too_small_a_cluster_is_one_sentence(nodes: Nodes, tmp_path: Path) -> None:
    trial = Trial(folder=str(tmp_path / "run"), state=str(tmp_path / "state"), cpus=5)
    audit = Audit(trial, nodes.environment()).start()
    assert audit.finish() == 1
    (said,) = audit.said()
    assert "1 group needs 5 CPUs" in said
    assert said.endswith("and nothing that starts more")
    assert not (tmp_path / "run" / "run.json").exists()
