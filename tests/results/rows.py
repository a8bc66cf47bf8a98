"""The experiments of docs/results.md: each is one algorithm on one environment, over seeds, and one row of a table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

BEST = "eval_return_mean"
LAST_THREE = "last three evaluations"


@dataclass(frozen=True)
class Published:
    """A learning curve that others published.

    Attributes:
        label: name in the legend.
        source: link to the source, and the conditions of the experiment.
        points: `(environment steps, mean return)`.
    """

    label: str
    source: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        id: name of the row; with `-seed<seed>` the name of a run.
        algorithm: name of the algorithm, such as `dqn`.
        environment: Gymnasium id.
        within: environment steps that a run may be given.
        threshold: score that every seed must reach; None shows the row without a verdict.
        metric: the score, `BEST` or `LAST_THREE`: the mean return of the best weights on fresh episodes, or the lowest
            of the last three periodic evaluations.
        seeds: seeds, with one run for each.
        actors: rollout workers.
        steps: `--steps`; None takes the preset's.
        settings: `--set`.
        quick: whether `--quick` runs its first seed.
        plots: names of the plots with its curve, keys of `PLOTS`.
        note: text below the table.
        published: curves of others, drawn in the same plots.
    """

    id: str
    algorithm: str
    environment: str
    within: int
    threshold: float | None = None
    metric: str = BEST
    seeds: tuple[int, ...] = (0, 1, 2)
    actors: int = 2
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    plots: tuple[str, ...] = ()
    note: str = ""
    published: tuple[Published, ...] = ()

    def run(self, seed: int) -> str:
        """Return the name of a seed's run."""
        return f"{self.id}-seed{seed}"

    def arguments(self, seed: int) -> list[str]:
        """Return the arguments of `squall train`."""
        steps = [] if self.steps is None else ["--steps", str(self.steps)]
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.settings.items()}
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        return [self.algorithm, self.environment, "--actors", str(self.actors), *steps, *sets, "--seed", str(seed)]

    def command(self, seed: int) -> str:
        """Return the command line that trains a seed's run."""
        return shlex.join(["squall", "train", *self.arguments(seed)])


PLOTS = {
    "cartpole-dqn": "CartPole-v1: DQN and its variants",
    "cartpole-policy-gradients": "CartPole-v1: policy gradients",
    "cartpole-dqn-actors": "CartPole-v1: DQN with 1, 2 and 8 actors",
    "cartpole-a2c-actors": "CartPole-v1: A2C with 1, 2 and 8 actors",
    "acrobot": "Acrobot-v1",
    "pendulum": "Pendulum-v1",
    "halfcheetah": "HalfCheetah-v5",
    "pong": "PongNoFrameskip-v4",
}

_SAC_OF_OTHERS = (
    Published(
        "Stable-Baselines3, HalfCheetah-v3",
        "[rl-trained-agents](https://github.com/DLR-RM/rl-trained-agents), `sac/HalfCheetah-v3_1/evaluations.npz`: one "
        "seed, 20 greedy episodes a point, 10,000 random steps first",
        tuple(zip(range(10_000, 100_001, 10_000), (
            -1.0, 51.2, 608.0, 1713.1, 3043.8, 3512.6, 3575.5, 4175.8, 4665.7, 4960.8,
        ), strict=True)),
    ),
    Published(
        "tianshou, HalfCheetah-v3",
        "[its benchmark](https://github.com/thu-ml/tianshou/tree/v0.5.0/examples/mujoco), `result.json`: ten seeds; "
        "its 10,000 first random steps, which it does not count, are added here",
        tuple(zip(range(10_000, 100_001, 10_000), (
            -2.0, 865.4, 2641.1, 3525.4, 4326.9, 4747.2, 5316.2, 5586.9, 5929.2, 6212.8,
        ), strict=True)),
    ),
)  # fmt: skip

_VARIANTS = ("double-dqn", "dueling-dqn", "noisy-dqn", "n-step-dqn", "per-dqn", "non-distributional-rainbow")
_ON_CARTPOLE = Experiment("dqn-cartpole", "dqn", "CartPole-v1", 60_000, threshold=475, plots=("cartpole-dqn",))
# Not quick: a test trains it to the end anyway, while its processes are killed.
_DQN = replace(_ON_CARTPOLE, plots=("cartpole-dqn", "cartpole-dqn-actors"))
_A2C = Experiment(
    "a2c-cartpole",
    "a2c",
    "CartPole-v1",
    300_000,
    threshold=475,
    plots=("cartpole-policy-gradients", "cartpole-a2c-actors"),
)
_FAST_PONG = {"updates_per_step": 0.5, "eval_every": 15_000, "stop_at_return": 19.5}

_ON_PONG = Experiment(
    "dqn-pong",
    "dqn",
    "PongNoFrameskip-v4",
    50_000,
    steps=50_000,
    seeds=(0,),
    plots=("pong",),
)


def _with_actors(row: Experiment, actors: int) -> Experiment:
    plot = f"cartpole-{row.algorithm}-actors"
    return replace(row, id=f"{row.id}-actors{actors}", actors=actors, threshold=None, quick=False, plots=(plot,))


ROWS = (
    _DQN,
    *(replace(_ON_CARTPOLE, id=f"{name}-cartpole", algorithm=name) for name in _VARIANTS),
    *(
        Experiment(
            f"{name}-cartpole",
            name,
            "CartPole-v1",
            150_000,
            threshold=475,
            metric=LAST_THREE,
            quick=name == "vpg",
            plots=("cartpole-policy-gradients",),
        )
        for name in ("reinforce", "vpg")
    ),
    _A2C,
    *(_with_actors(row, actors) for row in (_DQN, _A2C) for actors in (1, 8)),
    *(
        Experiment(
            f"{name}-acrobot",
            name,
            "Acrobot-v1",
            within,
            threshold=-100,
            # A policy with a return of -80 fails in a few episodes, for up to 500 steps: 20 episodes are too few to
            # tell how often.
            settings={"final_eval_episodes": 100},
            quick=name == "a2c",
            plots=("acrobot",),
        )
        for name, within in (("dqn", 100_000), ("non-distributional-rainbow", 100_000), ("a2c", 500_000))
    ),
    Experiment(
        "sac-pendulum",
        "sac",
        "Pendulum-v1",
        20_000,
        threshold=-170,
        settings={"final_eval_episodes": 100},
        plots=("pendulum",),
    ),
    Experiment(
        "sac-halfcheetah",
        "sac",
        "HalfCheetah-v5",
        100_000,
        seeds=(0,),
        steps=100_000,
        plots=("halfcheetah",),
        note="needs the extra `mujoco`. CleanRL publishes its curves as Weights & Biases runs; the only number that it "
        "publishes is the return at 1,000,000 steps.",
        published=_SAC_OF_OTHERS,
    ),
    *(
        replace(
            _ON_PONG,
            id=f"{name}-pong",
            algorithm=name,
            within=300_000,
            threshold=18,
            steps=300_000,
            settings={**_FAST_PONG, **more},
            note=note,
        )
        for name, note, more in (
            (
                "n-step-dqn",
                "the run was interrupted at 64,973 steps and resumed with an empty replay.",
                {
                    "warm_start_size": 5_000,
                    "eps_last_frame": 30_000,
                    "learning_rate": 0.00025,
                    "optimizer_options": {"eps": 0.00015},
                    "learning_rate_schedule": "linear",
                    "learning_rate_last_frame": 300_000,
                    "eval_episodes": 20,
                },
            ),
            (
                "non-distributional-rainbow",
                "the machine ran other programs at the same time, so the seconds are not comparable.",
                {"warm_start_size": 5_000, "sync_rate": 500, "learning_rate": 0.0002},
            ),
        )
    ),
    *(
        replace(_ON_PONG, id=f"{name}-pong", algorithm=name)
        for name in ("dqn", "double-dqn", "dueling-dqn", "noisy-dqn", "per-dqn")
    ),
)
