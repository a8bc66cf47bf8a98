"""Tests of publishing: versions, the weights of each version, and a weight store that is missing or slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

import learner.learner
from actors.weights import Weights
from tests.learner.runs import LearnerRun, loaded
from tests.learner.toys import clone_parameters, same


def test_the_first_weights_are_version_0_and_the_initial_ones(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8)
    initial = clone_parameters(run.module.policy)
    run.fit()
    assert run.weights.versions == [0]
    assert same(loaded(run.weights.published[0]), initial)
    assert not same(loaded(run.weights.published[0]), clone_parameters(run.module.policy))


def test_weights_are_published_every_so_many_updates(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=104, publish_every=25)
    at: list[tuple[int, list[torch.Tensor]]] = []
    later = run.weights.later

    def watched(method: str, weights: Weights) -> Any:
        at.append((run.learner._updates, clone_parameters(run.module.policy)))
        return later(method, weights)

    run.weights.later = watched  # type: ignore[method-assign]
    report = run.fit()
    assert [updates for updates, _ in at] == [0, 25, 50, 75, 100]
    assert run.weights.versions == [0, 1, 2, 3, 4]
    assert report.weights_version == 4
    for weights, (_, parameters) in zip(run.weights.published, at, strict=True):
        assert same(loaded(weights), parameters)


def test_versions_go_on_from_what_the_store_holds(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8, version=41, publish_every=4)
    run.fit()
    assert run.weights.versions == [42, 43, 44]


def test_a_new_store_beside_a_new_learner_gets_versions_that_workers_take_for_newer(tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=8, version=-1, publish_every=4)
    run.learner.fit(None, 270)
    assert run.weights.versions[0] > 270
    assert run.weights.versions == sorted(set(run.weights.versions))


@pytest.mark.parametrize("error", [ValueError("no actor of that name"), ActorDiedError()])
def test_a_store_that_is_gone_stops_nobody(error: Exception, tmp_path: Path) -> None:
    run = LearnerRun(tmp_path, updates=40, publish_every=10)
    run.weights.failure = error
    assert run.fit().updates == 40
    assert run.weights.forgotten == 5
    assert run.weights.versions == []


def test_a_publication_that_failed_on_its_way_is_noticed_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LearnerRun(tmp_path, updates=40, publish_every=10)
    run.weights.reference = "in flight"
    outcomes = iter([ActorDiedError(), None, None, None])

    def get(reference: Any) -> None:
        assert reference == "in flight"
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(learner.learner, "is_ready", lambda reference: True)
    monkeypatch.setattr(learner.learner.ray, "get", get)
    run.fit()
    assert run.weights.forgotten == 1
    assert run.weights.versions == [0, 1, 2, 3, 4], "later versions go to the new store"


def test_a_slow_store_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LearnerRun(tmp_path, updates=8, publish_every=2)
    run.weights.reference = "in flight"
    monkeypatch.setattr(learner.learner, "is_ready", lambda reference: False)
    monkeypatch.setattr(learner.learner.ray, "get", lambda reference: pytest.fail("the learner waited"))
    run.fit()
    assert run.weights.versions == [0, 1, 2, 3, 4]


def test_weights_are_kept_while_there_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.learner, "_PUBLISH_RETRY_SECONDS", 0.0)
    run = LearnerRun(tmp_path, updates=16)
    run.weights.failure = ValueError("no actor of that name")
    serve = run.learner._serve

    def serve_and_recover() -> None:
        serve()
        run.weights.failure = None

    monkeypatch.setattr(run.learner, "_serve", serve_and_recover)
    run.fit()
    # There was no store for the first version, which was sent as soon as there was one.
    assert run.weights.versions[0] == 0
