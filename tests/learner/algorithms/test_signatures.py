"""Tests of constructors' signatures: `inspect.signature` and `help` show every argument with its real default."""

from __future__ import annotations

import ast
import inspect
import pydoc
from pathlib import Path
from typing import Any

import pytest

import squall
from learner import (
    DQN,
    PERDQN,
    SAC,
    AdvantageActorCritic,
    DoubleDQN,
    DuelingDQN,
    NoisyDQN,
    NonDistributionalRainbow,
    NStepDQN,
    Reinforce,
    VanillaPolicyGradient,
)
from learner.algorithms import ALGORITHMS, Algorithm
from tests.learner.toys import CARTPOLE, PENDULUM

EMPTY = inspect.Parameter.empty
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

# The arguments of the reference page, in its order, with the defaults of the page.
_DQN_PAGE: dict[str, Any] = {
    "env": EMPTY, "eps_start": 1.0, "eps_end": 0.02, "eps_last_frame": 150_000, "sync_rate": 1000, "gamma": 0.99,
    "learning_rate": 0.0001, "batch_size": 32, "replay_size": 100_000, "warm_start_size": 10_000,
    "avg_reward_len": 100, "min_episode_reward": -21, "seed": 123, "batches_per_epoch": 1000, "n_steps": 1,
}  # fmt: skip
_REINFORCE_PAGE: dict[str, Any] = {
    "env": EMPTY, "gamma": 0.99, "lr": 0.01, "batch_size": 8, "n_steps": 10, "avg_reward_len": 100,
    "entropy_beta": 0.01, "epoch_len": 1000, "num_batch_episodes": 4,
}  # fmt: skip
PAGES: dict[type[Algorithm], dict[str, Any]] = {
    DQN: _DQN_PAGE,
    DoubleDQN: _DQN_PAGE,
    DuelingDQN: _DQN_PAGE,
    NoisyDQN: _DQN_PAGE,
    NStepDQN: {**_DQN_PAGE, "n_steps": 4},
    PERDQN: _DQN_PAGE,
    NonDistributionalRainbow: {**_DQN_PAGE, "n_steps": 4},
    Reinforce: _REINFORCE_PAGE,
    VanillaPolicyGradient: _REINFORCE_PAGE,
    AdvantageActorCritic: {
        "env": EMPTY, "gamma": 0.99, "lr": 0.001, "batch_size": 32, "avg_reward_len": 100, "entropy_beta": 0.01,
        "critic_beta": 0.5, "epoch_len": 1000,
    },
    SAC: {
        "env": EMPTY, "eps_start": 1.0, "eps_end": 0.02, "eps_last_frame": 150_000, "sync_rate": 1, "gamma": 0.99,
        "policy_learning_rate": 0.0003, "q_learning_rate": 0.0003, "target_alpha": 0.005, "batch_size": 128,
        "replay_size": 1_000_000, "warm_start_size": 10_000, "avg_reward_len": 100, "min_episode_reward": -21,
        "seed": 123, "batches_per_epoch": 10_000, "n_steps": 1,
    },
}  # fmt: skip

# The keyword-only arguments, as far as the page does not have them.
_COMMON: dict[str, Any] = {
    "seed": 123, "avg_reward_len": 100, "min_episode_reward": None, "num_envs": 1, "hidden_sizes": None,
    "activation": "relu", "optimizer": "adam", "optimizer_options": None, "max_grad_norm": None,
    "learning_rate_schedule": "constant", "learning_rate_last_frame": None, "normalize_observations": False,
    "normalize_rewards": False, "clip_rewards": None,
}  # fmt: skip
_OFF_POLICY = {
    **_COMMON, "updates_per_step": 1.0, "updates_per_training_step": 1, "segment_length": None,
    "compile_updates": False,
}  # fmt: skip
_VALUE_BASED = {**_OFF_POLICY, "eps_ladder": False}
_NOISY = {"noise": "factorised"}
_PRIORITIZED = {"priority_exponent": 0.6, "beta_start": 0.4, "beta_last_frame": 100_000}
_ON_POLICY = {**_COMMON, "max_policy_lag": 0}
KEYWORDS: dict[type[Algorithm], dict[str, Any]] = {
    DQN: _VALUE_BASED,
    DoubleDQN: _VALUE_BASED,
    DuelingDQN: _VALUE_BASED,
    NoisyDQN: {**_VALUE_BASED, **_NOISY},
    NStepDQN: _VALUE_BASED,
    PERDQN: {**_VALUE_BASED, **_PRIORITIZED},
    NonDistributionalRainbow: {**_VALUE_BASED, **_NOISY, **_PRIORITIZED},
    Reinforce: _ON_POLICY,
    VanillaPolicyGradient: _ON_POLICY,
    AdvantageActorCritic: {**_ON_POLICY, "unroll_length": 8},
    SAC: {**_OFF_POLICY, "init_alpha": 1.0, "learn_alpha": True, "target_entropy": None},
}


def expected(cls: type[Algorithm]) -> dict[str, Any]:
    """Return all arguments of an algorithm with their defaults."""
    return {**KEYWORDS[cls], **PAGES[cls]}


def environment(cls: type[Algorithm]) -> Any:
    return PENDULUM if cls is SAC else CARTPOLE


def test_every_algorithm_is_tested() -> None:
    assert set(PAGES) == set(KEYWORDS) == set(ALGORITHMS.values())


@pytest.mark.parametrize("cls", PAGES)
def test_the_signature_lists_every_argument_with_its_default(cls: type[Algorithm]) -> None:
    parameters = list(inspect.signature(cls).parameters.values())
    positional = [(p.name, p.default) for p in parameters if p.kind is POSITIONAL]
    assert positional == list(PAGES[cls].items())
    keywords = {p.name: p.default for p in parameters if p.kind is KEYWORD_ONLY}
    assert keywords == {name: default for name, default in KEYWORDS[cls].items() if name not in PAGES[cls]}
    assert {p.kind for p in parameters} == {POSITIONAL, KEYWORD_ONLY}, "neither *args nor **kwargs"
    assert EMPTY not in {p.annotation for p in parameters}


@pytest.mark.parametrize("cls", PAGES)
def test_defaults_are_those_that_the_constructor_uses(cls: type[Algorithm]) -> None:
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name != "env"}
    hparams = dict(cls(environment(cls)).hparams)
    del hparams["env"]
    assert hparams == defaults
    assert {name: p.default for name, p in cls.hyperparameter_types().items()} == defaults


@pytest.mark.filterwarnings("ignore:.* have no effect in")
@pytest.mark.parametrize("cls", PAGES)
def test_positional_arguments_arrive_in_the_order_of_the_signature(cls: type[Algorithm]) -> None:
    defaults = {name: default for name, default in PAGES[cls].items() if name != "env"}
    changed = {name: value / 2 if isinstance(value, float) else value * 2 for name, value in defaults.items()}
    hparams = cls(environment(cls), *changed.values()).hparams
    assert {name: hparams[name] for name in changed} == changed


@pytest.mark.parametrize("cls", PAGES)
def test_help_names_every_argument_with_its_default(cls: type[Algorithm]) -> None:
    text = pydoc.plain(pydoc.render_doc(getattr(squall, cls.__name__)))
    heading = next(line for line in text.splitlines() if line.startswith(f" |  {cls.__name__}("))
    assert "*args" not in heading
    assert "**kwargs" not in heading
    for name, default in expected(cls).items():
        assert f"{name}: " in heading
        if default is not EMPTY:
            assert f" = {default!r}" in heading.partition(f"{name}: ")[2].partition(": ")[0]


@pytest.mark.parametrize("cls", PAGES)
def test_the_source_names_every_argument_of_the_reference_page(cls: type[Algorithm]) -> None:
    """Static readers, such as editors and mypy, cannot compute `__signature__`."""
    constructor = next(vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base))
    tree = ast.parse(Path(inspect.getsourcefile(constructor) or "").read_text(encoding="utf-8"))
    (definition,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    assert [argument.arg for argument in definition.args.args] == ["self", *PAGES[cls]]
    assert definition.args.vararg is None


class Variant(PERDQN):
    """A user's variant, with its own argument and another default."""

    def __init__(self, env: Any, *arguments: Any, momentum: float = 0.5, gamma: float = 0.9, **options: Any) -> None:
        super().__init__(env, *arguments, gamma=gamma, **options)


class Fixed(DQN):
    """A user's variant whose constructor accepts no other arguments."""

    def __init__(self, env: Any, n_steps: int = 3) -> None:
        super().__init__(env, n_steps=n_steps)


def test_a_variants_signature_contains_the_arguments_of_its_base_classes() -> None:
    parameters = inspect.signature(Variant).parameters
    assert list(parameters)[:3] == ["env", "momentum", "gamma"]
    assert {name: p.default for name, p in parameters.items()} == {**expected(PERDQN), "momentum": 0.5, "gamma": 0.9}
    assert [name for name, p in parameters.items() if p.kind is POSITIONAL] == ["env"]
    hparams = Variant(CARTPOLE).hparams
    assert {name: hparams[name] for name in parameters if name != "env"} == {
        name: p.default for name, p in parameters.items() if name != "env"
    }


def test_a_constructor_without_keyword_arguments_accepts_no_others() -> None:
    assert list(inspect.signature(Fixed).parameters) == ["env", "n_steps"]
    assert {name: p.default for name, p in Fixed.hyperparameter_types().items()} == {"n_steps": 3}
    assert Fixed(CARTPOLE).hparams["n_steps"] == 3


def test_an_instances_signature_is_that_of_a_call() -> None:
    module = DQN(CARTPOLE)
    assert not hasattr(module, "__signature__")
    assert list(inspect.signature(module).parameters) == ["args", "kwargs"]
