"""A small random model with texts, one finished run with every study, and the command line called in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import yaml
from shapes import Call, Cluster
from shared_ray import SharedRay
from tiny_olmoe import write_tiny_olmoe

from cluster import session
from jobs.cli import main

STUDIES = {
    "importance": {
        "metrics": ["utilization", "mean_routing_weight", "aimer"],
        "outcomes": ["delta_loss", "kl", "tv"],
        "random_rankings": 49,
        "bootstrap_draws": 200,
        "contrasts": True,
        "released_code": True,
    },
    "progressive": {"positions": 40, "draws": 2, "metrics": ["reap"], "layers": [0, 2]},
    "redistribution": True,
    "redundancy": {"shares": [0.25, 0.5], "draws": 5, "documents": 6, "metrics": ["reap", "aimer"], "margin": 0.2},
}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of three layers of eight experts, twelve texts and ``audit.yaml``."""
    folder = tmp_path_factory.mktemp("studies")
    write_tiny_olmoe(folder / "model", layers=3, experts=8, top_k=3)
    (folder / "texts").mkdir()
    for number in range(12):
        text = f"Document {number} says: the expert that answers is not the expert that was asked."
        (folder / "texts" / f"{number:02d}.txt").write_text(text[: 50 + 2 * number])
    specification = {
        "model": {"source": "./model"},
        "corpus": {"sources": [{"kind": "text", "path": "texts", "domain": "prose"}], "max_tokens": 48},
        "calibration": {"documents": 3},
        "positions": {"sample": 90},
        "attribution": True,
        "studies": STUDIES,
        "cluster": {"max_groups": 1},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(specification))
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit status, standard output and standard error of one command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


@pytest.fixture(scope="session")
def studied(place: Path, shared_ray: SharedRay) -> Path:
    """A finished run with every study."""
    shared_ray.open()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(place / "audit.yaml"), "--out", str(place / "run"), "--display", "none"])
    assert ended.value.code == 0
    return place / "run"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, shared_ray: SharedRay) -> Cluster:
    """``with cluster(4): ...`` runs on a Ray cluster of this machine that declares so many CPUs."""
    shared_ray.close()

    @contextmanager
    def of(cpus: int) -> Iterator[None]:
        monkeypatch.setattr(session, "cores", lambda: 0)
        heard = redirect_stdout(sys.stdout)  # a session silences what is printed in it
        with session.ray_session(cpus - 1), heard:  # and declares one CPU more than asked for
            yield

    return of
