"""The cases of the benchmarks, as data: each compares one figure of Squall with the peers and the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LIMIT = "limit"
FIGURE = "figure"
BOTH = (1, 2)


@dataclass(frozen=True)
class Side:
    """One measured program.

    Attributes:
        name: name in the tables.
        script: file in `sides/`.
        arguments: arguments of the script.
        peer: key of `PEERS` of the virtual environment that runs the script; "" is this environment.
        threads: numbers of threads, of which the best is chosen.
    """

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    peer: str = ""
    threads: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Case:
    """One figure.

    Attributes:
        row: name of the section in docs/performance.md.
        name: name within the row; "" if the row has one case.
        title: description of the measurement.
        unit: unit of the figure.
        ours: Squall's side.
        others: the peers and the limit, each paired with Squall.
        targets: wanted ratio by side: how many times better Squall is to be.
        higher_is_better: False for times and bytes.
        same: facts that both sides must report, with equal values.
        tolerance: relative difference allowed in these facts.
        quick: whether `--quick` measures the case.
        most: upper bound of Squall's own figure; None sets no bound.
        fact: the reported fact that is the figure; cases with the same sides are measured together.
    """

    row: str
    name: str
    title: str
    unit: str
    ours: Side
    others: tuple[Side, ...]
    targets: dict[str, float] = field(default_factory=dict)
    higher_is_better: bool = True
    same: tuple[str, ...] = ()
    tolerance: float = 0.02
    quick: bool = False
    most: float | None = None
    fact: str = FIGURE

    @property
    def id(self) -> str:
        """Row and name."""
        return f"{self.row}/{self.name}" if self.name else self.row


def _end_to_end(
    row: str, title: str, peers: Sequence[str], targets: dict[str, float], quick: bool = False, tolerance: float = 0.06
) -> Case:
    scripts = {"stable-baselines3": "sb3_train.py", "tianshou": "tianshou_train.py", "rllib": "rllib_train.py"}
    return Case(
        row,
        "",
        title,
        "environment steps/s",
        Side("Squall", "squall_train.py", ("--case", row), threads=BOTH),
        (
            *(Side(peer, scripts[peer], ("--case", row), peer, BOTH) for peer in peers),
            Side(LIMIT, "bare_train.py", ("--case", row), threads=BOTH),
        ),
        targets,
        same=("parameters", "batch_size", "updates_per_step"),
        tolerance=tolerance,
        quick=quick,
    )


def _per(batch: int, inserts: int, quick: bool = False) -> Case:
    name = f"{batch}" + ("+insert" if inserts else "")
    arguments = ("--batch", str(batch), "--inserts", str(inserts))
    return Case(
        "per",
        name,
        f"cycle of a prioritized replay with 2^20 items: draw {batch} items with data and weights, and set their "
        "priorities" + (f", after {inserts} inserts" if inserts else ""),
        "us per cycle",
        Side("Squall", "squall_per.py", arguments),
        (
            Side("cpprb", "cpprb_per.py", arguments, "cpprb"),
            Side("tianshou", "tianshou_per.py", arguments, "tianshou"),
            Side(LIMIT, "bare_per.py", arguments),
        ),
        {} if inserts else {"cpprb": 2.0},
        higher_is_better=False,
        same=("batch_size", "items"),
        quick=quick,
    )


def _replay(kind: str, table: str, sampled: float) -> list[Case]:
    arguments = ("--kind", kind, "--table", table)
    service = f"replay service with one writer and one reader process, {kind} items, {table}"
    reverb = Side("reverb", "reverb_replay.py", arguments, "reverb")
    common: dict[str, Any] = {
        "row": "replay",
        "ours": Side("Squall", "squall_replay.py", arguments),
        "others": (reverb, Side(LIMIT, "bare_replay.py", arguments)),
        "same": ("item_bytes",),
        "tolerance": 0.1,
    }
    return [
        *(
            Case(
                name=f"{kind}-{table}-{what}",
                title=f"{service}: items {what} while the other process {meanwhile}",
                unit="items/s",
                targets={reverb.name: target},
                fact=what,
                **common,
            )
            for what, meanwhile, target in (("inserted", "samples", 5.0), ("sampled", "inserts", sampled))
        ),
        Case(
            name=f"{kind}-{table}-p99",
            title=f"{service}: 99th percentile of the time of a sample call, divided by its median",
            unit="medians",
            higher_is_better=False,
            most=3.0,
            fact="p99_by_p50",
            **common,
        ),
    ]


def _weights(receivers: int) -> list[Case]:
    def side(name: str, way: str) -> Side:
        return Side(name, "weights.py", ("--way", way, "--receivers", str(receivers)))

    return [
        Case(
            "weights",
            f"{what}-{receivers}",
            f"{meaning}; 1.7 million parameters, receivers on one node: {receivers}, median",
            "ms",
            side("Squall", "squall"),
            (side("ray by value", "value"),),
            higher_is_better=False,
            same=("parameters", "receivers"),
            most=5.0 if what == "stall" else None,
            fact=f"{what}_p50_ms",
        )
        for what, meaning in (
            ("stall", "time for which publishing a version stalls the learner"),
            ("applied", "time from publishing a version to the first action with it"),
        )
    ]


CASES: tuple[Case, ...] = (
    _end_to_end(
        "pong",
        "DQN on PongNoFrameskip-v4: Nature CNN, batches of 32, one update per 4 steps, 8 environments",
        ("stable-baselines3", "rllib"),
        {"stable-baselines3": 3.0, LIMIT: 0.85, "rllib": 10.0},
        tolerance=0.1,  # Squall counts steps in pushes of 256, so the count may be off by two pushes
    ),
    _end_to_end(
        "cartpole",
        "DQN on CartPole-v1: layers of 256x256, batches of 64, one update per 2 steps",
        ("stable-baselines3", "tianshou", "rllib"),
        {"stable-baselines3": 2.5, LIMIT: 0.85, "rllib": 25.0},
        quick=True,
    ),
    _end_to_end(
        "pendulum",
        "SAC on Pendulum-v1: two critics of 256x256, batches of 256, one update per step",
        ("stable-baselines3", "tianshou"),
        {"stable-baselines3": 1.5, LIMIT: 0.85},
    ),
    _per(256, 0, quick=True),
    _per(512, 0),
    _per(256, 256),
    *(
        case
        for kind, sampled in (("atari", 2.5), ("vector", 10.0))
        for table in ("uniform", "prioritized")
        for case in _replay(kind, table, sampled)
    ),
    *(
        Case(
            "memory",
            f"n={n}",
            f"resident memory for each Atari transition in a replay of 100,000 transitions, n = {n}",
            "bytes",
            Side("Squall", "squall_memory.py", ("--n-steps", str(n))),
            (
                Side("stable-baselines3", "sb3_memory.py", ("--n-steps", str(n)), "stable-baselines3"),
                Side("cpprb", "cpprb_memory.py", ("--n-steps", str(n)), "cpprb"),
                Side(LIMIT, "bare_memory.py"),
            ),
            {LIMIT: 1 / 1.15},
            higher_is_better=False,
            same=("transitions",),
        )
        for n in (1, 3)
    ),
    *(
        Case(
            "lightning",
            f"k={k}",
            f"DQN updates on batches of CartPole's size through Lightning's Trainer, updates per training step: {k}",
            "updates/s",
            Side("Squall", "squall_lightning.py", ("--k", str(k))),
            (Side(LIMIT, "bare_lightning.py"),),
            {LIMIT: {1: 0.0, 8: 0.85, 32: 0.95}[k]} if k > 1 else {},
            same=("parameters", "batch_size"),
            quick=k == 8,
        )
        for k in (1, 8, 32)
    ),
    *(
        Case(
            "collect",
            name,
            f"one rollout worker, {name}, {lanes} lanes; the limit is the bare vector environment and bare inference",
            "environment steps/s",
            Side("Squall", "squall_collect.py", ("--env", env, "--lanes", str(lanes))),
            (
                Side(LIMIT, "bare_collect.py", ("--env", env, "--lanes", str(lanes))),
                Side("stable-baselines3", "sb3_collect.py", ("--env", env, "--lanes", str(lanes)), "stable-baselines3"),
            ),
            {LIMIT: 0.9},
            same=("lanes",),
            quick=name == "cartpole",
        )
        for name, env, lanes in (("pong", "PongNoFrameskip-v4", 8), ("cartpole", "CartPole-v1", 64))
    ),
    *(case for receivers in (1, 8, 32) for case in _weights(receivers)),
    *(
        Case(
            "scale",
            f"{shards}-shards",
            f"emulated workers that a replay of {shards} shards serves, each sending 400 Atari transitions a second, "
            f"beside {fewer} shard{'s' if fewer > 1 else ''}",
            "workers",
            Side("Squall", "scale.py", ("--shards", str(shards))),
            (Side(f"{fewer} shard{'s' if fewer > 1 else ''}", "scale.py", ("--shards", str(fewer))),),
            {f"{fewer} shard{'s' if fewer > 1 else ''}": 1.0},
            same=("rate",),
        )
        for fewer, shards in ((1, 2), (2, 4))
    ),
)
ROWS = tuple(dict.fromkeys(case.row for case in CASES))
