"""Lanes that fail: recreated environments, dropped episodes, and the limit on failures."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from actors.environments import specify
from actors.policies import PolicySpec
from actors.rebuilding import RebuildingEnv
from actors.vector_runner import VectorRunner
from replay.errors import EnvironmentFailed
from tests.actors.toys import RandomPolicy, Script, scripted

SCRIPTED = specify("SquallScripted-v0")


def make_runner(seed: int = 0, lanes: int = 1) -> tuple[VectorRunner, RandomPolicy]:
    policy = RandomPolicy(PolicySpec("random", SCRIPTED))
    policy.begin(np.random.SeedSequence(seed))
    return VectorRunner(SCRIPTED, lanes, np.random.SeedSequence(seed)), policy


def test_a_failing_step_is_reported_and_is_no_environment_step() -> None:
    with scripted({0: Script(raises_at=frozenset({2}))}) as scenario:
        runner, policy = make_runner(lanes=2)
        runner.reset()
        steps = [runner.step(policy, step=0) for _ in range(4)]
        runner.close()
    assert [step.failed.tolist() for step in steps] == [[False] * 2, [True, False], [False] * 2, [False] * 2]
    assert steps[1].failures == ("RuntimeError: instance 0 broke at step 2",)
    assert [step.steps for step in steps] == [2, 1, 1, 2]
    assert steps[1].truncated.tolist() == [True, False]
    assert steps[1].observation[0].tolist() == [2.0, 0.0, 0.0]
    assert steps[3].observation[0].tolist() == [2.0, 1.0, 1.0]
    assert all(step.episodes == () for step in steps)
    assert scenario.closed == [0, 2, 1]


def test_the_return_of_an_episode_that_failed_is_not_reported() -> None:
    with scripted({0: Script(length=9, raises_at=frozenset({3}))}, default=Script(length=2, reward=5.0)):
        runner, policy = make_runner()
        runner.reset()
        results = [result for _ in range(7) for _, result in runner.step(policy, step=0).episodes]
        runner.close()
    assert [(result.episode_return, result.length) for result in results] == [(10.0, 2)]


def test_a_failing_reset_is_tried_again_and_reported() -> None:
    with scripted({0: Script(length=2, resets_that_raise=frozenset({2}))}) as scenario:
        runner, policy = make_runner()
        runner.reset()
        steps = [runner.step(policy, step=0) for _ in range(4)]
        runner.close()
    assert [step.failures for step in steps] == [(), (), ("RuntimeError: instance 0 cannot reset",), ()]
    assert [step.steps for step in steps] == [1, 1, 0, 1]
    assert not any(step.failed.any() for step in steps)
    assert steps[3].observation[0].tolist() == [1.0, 0.0, 1.0]
    assert scenario.made == 2


def test_repeated_failures_are_no_longer_caught() -> None:
    with scripted(default=Script(raises_at=frozenset({1}))) as scenario:
        runner, policy = make_runner()
        runner.reset()
        for _ in range(5):
            assert runner.step(policy, step=0).failed.all()
            assert not runner.step(policy, step=0).failed.any()
        with pytest.raises(EnvironmentFailed) as raised:
            runner.step(policy, step=0)
        runner.close()
    cause = "instance 5 broke at step 1"
    assert str(raised.value) == (f"the environment failed 6 times within 1000 steps, last with RuntimeError: {cause}")
    assert str(raised.value.__cause__) == cause
    assert scenario.made == 6


def test_a_reset_that_always_fails_ends() -> None:
    with scripted(default=Script(resets_that_raise=frozenset({1}))):
        runner, _ = make_runner()
        with pytest.raises(EnvironmentFailed, match="last with RuntimeError: instance 5 cannot reset"):
            runner.reset()
        runner.close()


def test_rare_failures_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RebuildingEnv, "failure_window", 40)
    with scripted(default=Script(raises_at=frozenset({8}))) as scenario:
        runner, policy = make_runner()
        runner.reset()
        failures = [step.failures for step in (runner.step(policy, step=0) for _ in range(300)) if step.failures]
        runner.close()
    assert len(failures) == scenario.made - 1 > 20


def test_an_environment_that_cannot_be_recreated() -> None:
    made = []

    def factory() -> gym.Env[Any, Any]:
        if made:
            raise OSError("the port is taken")
        made.append(True)
        with scripted(default=Script(raises_at=frozenset({1}))):
            return gym.make("SquallScripted-v0", disable_env_checker=True)

    env = RebuildingEnv(factory)
    env.reset(seed=0)
    with pytest.raises(EnvironmentFailed, match="broke at step 1, and cannot be recreated: OSError: the port"):
        env.step(0)


def test_rebuilt_lanes_draw_their_seeds_from_the_run_s() -> None:
    seeds = []
    for seed in (0, 0, 1):
        scripts = {0: Script(length=3, raises_at=frozenset({4})), 1: Script(length=3, resets_that_raise=frozenset({2}))}
        with scripted(scripts) as scenario:
            runner, policy = make_runner(seed, lanes=2)
            runner.reset()
            for _ in range(10):
                runner.step(policy, step=0)
            runner.close()
        seeds.append([seed for seed in scenario.seeds if seed is not None])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == len(seeds[0]) == 4
    assert not set(seeds[0]) & set(seeds[2])
