"""The Node.js example: its dynamics are those of Gymnasium, and a run learns from its experience alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from tests.actors.workers import make_spec
from tests.services.rpc.experience_run import CARTPOLE, serve_run
from tests.services.running import Run

EXAMPLE = Path(__file__).parents[3] / "deploy" / "examples" / "node"
PROTO = Path(__file__).parents[3] / "services" / "rpc" / "squall.proto"

COMPARE = """
    import { readFileSync } from "node:fs";
    const { CartPole } = await import(process.argv[2]);
    const environment = new CartPole();
    const play = ({ first, actions }) => {
      environment.reset();
      environment.state = first;
      return actions.map((action) => environment.step(action));
    };
    console.log(JSON.stringify(JSON.parse(readFileSync(0)).map(play)));
"""

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is missing")
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the example with its dependencies installed."""
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    home = {"HOME": str(folder), "npm_config_cache": str(folder / "cache")}
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(
        install, cwd=folder, env={**os.environ, **home}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@needs_node
def test_the_dynamics_are_those_of_gymnasium(tmp_path: Path) -> None:
    env = gym.make("CartPole-v1")
    rng, episodes, expected = np.random.default_rng(0), [], []
    for seed in range(5):
        env.reset(seed=seed)
        actions: list[int] = []
        states = [[float(x) for x in env.unwrapped.state]]  # type: ignore[attr-defined]  # before rounding to float32
        ended = False
        while not ended:
            actions.append(int(rng.integers(2)))
            _, _, terminated, truncated, _ = env.step(actions[-1])
            states.append([float(x) for x in env.unwrapped.state])  # type: ignore[attr-defined]
            ended = terminated or truncated
        episodes.append({"first": states[0], "actions": actions})
        expected.append(states[1:])
    script = tmp_path / "compare.mjs"
    script.write_text(COMPARE)
    done = subprocess.run(
        ["node", str(script), (EXAMPLE / "cartpole.js").as_uri()],
        input=json.dumps(episodes),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for played, states in zip(json.loads(done.stdout), expected, strict=True):
        np.testing.assert_allclose([step["observation"] for step in played], states, rtol=1e-6, atol=1e-9)
        assert [step["terminated"] for step in played] == [False] * (len(states) - 1) + [True]


@pytest.mark.slow
@needs_node
@needs_npm
def test_it_plays_until_the_run_has_its_steps(example: Path) -> None:
    spec = make_spec(CARTPOLE, "epsilon_greedy", lanes=1)
    with serve_run(spec, max_steps=3_000) as run:
        done = subprocess.run(
            ["node", "play.js", "--address", run.address, "--environments", "5", "--proto", str(PROTO)],
            cwd=example, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        run.wait_until_drained()
        assert json.loads(done.stdout) == {"environments": 5, "steps": run.env_steps}
        assert run.env_steps >= 3_000
        assert run.service.opened == 5


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(
        tmp_path / "runs", "outside", "dqn", "CartPole-v1", "--actors", "0", "--serve", "--name", "outside",
        "--steps", "40000", "--stop-at-return", "200", "--set", "eval_every=1500", "--set", "final_eval_episodes=20",
    )  # fmt: skip
    yield run
    run.kill_everything()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@needs_node
@needs_npm
def test_a_run_without_actors_learns_from_it(run: Run, example: Path) -> None:
    status = run.wait_for(lambda s: bool(s.get("endpoints")), 180)
    address = status["endpoints"][0]["address"]
    with (example / "play.err").open("w") as errors:
        player = subprocess.Popen(
            ["node", "play.js", "--address", address, "--run", "outside", "--proto", str(PROTO)],
            cwd=example, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        try:
            seen = run.wait_for(lambda s: s["env_steps"] > 0, 60)
            assert not [process for process in seen["processes"] if process["role"] == "worker"]
            message = next(process["last_word"] for process in seen["processes"] if process["role"] == "endpoint")
            assert "8 sessions" in message
            summary = run.finish(600)
        finally:
            player.kill()
            player.wait(10)
    assert summary["actors"] == 0
    # A random policy reaches 22. The best of a few evaluations overestimates the policy, so the final score is lower.
    assert summary["eval_return_mean"] >= 100, f"{summary}\n{(example / 'play.err').read_text()}"
    assert run.leftovers() == []
