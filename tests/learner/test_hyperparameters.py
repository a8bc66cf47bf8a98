"""Tests of hyper-parameters: command line arguments, and values that are refused."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from learner import DQN, SAC, Reinforce
from learner.algorithms import Algorithm
from replay.errors import ConfigurationError
from tests.learner.toys import CARTPOLE, EVERY_ALGORITHM

# Construction from command line arguments.


def test_arguments_come_back_out_of_a_mixed_namespace() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--accelerator", default="cpu")
    assert DQN.add_model_specific_args(parser) is parser
    parser.add_argument("--max_epochs", type=int, default=3)
    arguments = (
        "--env CartPole-v1 --accelerator gpu --gamma 0.5 --batch_size 9 --min_episode_reward -1.5 --optimizer sgd "
        "--max_grad_norm 3.5 --segment_length 7 --hidden_sizes 31 17 --clip_rewards --eps_ladder --seed 0"
    )
    module = DQN.from_args(parser.parse_args(arguments.split()), learning_rate=0.25)
    changed = {
        "gamma": 0.5, "batch_size": 9, "min_episode_reward": -1.5, "optimizer": "sgd", "max_grad_norm": 3.5,
        "segment_length": 7, "hidden_sizes": [31, 17], "clip_rewards": True, "eps_ladder": True, "seed": 0,
        "learning_rate": 0.25,
    }  # fmt: skip
    assert dict(module.hparams) == {**dict(DQN("CartPole-v1").hparams), **changed}


def test_arguments_default_to_the_constructors() -> None:
    parser = DQN.add_model_specific_args(argparse.ArgumentParser())
    assert dict(DQN.from_args(parser.parse_args(["--env", "CartPole-v1"])).hparams) == dict(DQN("CartPole-v1").hparams)
    assert parser.parse_args(["--env", "x", "--no-clip_rewards"]).clip_rewards is False
    with pytest.raises(SystemExit):
        parser.parse_args(["--env", "CartPole-v1", "--batch_size", "many"])
    with pytest.raises(SystemExit):
        parser.parse_args([])


@pytest.mark.parametrize("cls", EVERY_ALGORITHM)
def test_arguments_of_every_algorithm_come_back_out_of_a_mixed_namespace(cls: type[Algorithm]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    assert cls.add_model_specific_args(parser) is parser
    env = "Pendulum-v1" if cls is SAC else "CartPole-v1"
    rate = next(name for name in ("lr", "learning_rate", "q_learning_rate") if name in cls.hyperparameter_types())
    arguments = [
        "--env", env, "--devices", "2", "--gamma", "0.5", f"--{rate}", "0.25", "--seed", "0", "--normalize_rewards",
        "--optimizer_options", '{"eps": 0.001}', "--activation", "tanh", "--no-normalize_observations",
    ]  # fmt: skip
    module = cls.from_args(parser.parse_args(arguments), num_envs=3)
    changed = {
        "gamma": 0.5, rate: 0.25, "seed": 0, "normalize_rewards": True, "optimizer_options": {"eps": 0.001},
        "activation": "tanh", "num_envs": 3,
    }  # fmt: skip
    assert dict(module.hparams) == {**dict(cls(env).hparams), **changed}
    plain = cls.from_args(parser.parse_args(["--env", env]))
    assert dict(plain.hparams) == dict(cls(env).hparams)


# Values that are refused.


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimizer_options": {"epsilon": 1e-3}}, "^optimizer_options of adam: .*'epsilon'"),
        ({"optimizer_options": {"eps": -1.0}}, "^optimizer_options of adam: .*-1.0"),
        ({"optimizer_options": {"eps": "small"}}, "^optimizer_options of adam: "),
        ({"optimizer_options": {"lr": 0.5}}, "^optimizer_options must not contain lr"),
        ({"optimizer": "sgd", "optimizer_options": {"eps": 1e-3}}, "^optimizer_options of sgd: .*'eps'"),
        ({"activation": "gelu"}, "^activation must be one of relu, tanh, got 'gelu'$"),
        ({"learning_rate_schedule": "steps"}, "^learning_rate_schedule must be one of constant, .*, got 'steps'$"),
        ({"learning_rate_schedule": "linear"}, "^a linear learning_rate_schedule needs learning_rate_last_frame$"),
        ({"learning_rate_last_frame": 0}, "^learning_rate_last_frame must be positive, got 0$"),
    ],
)
@pytest.mark.parametrize("cls", [DQN, Reinforce])
def test_common_options_that_cannot_work_are_refused(
    cls: type[Algorithm], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        cls(CARTPOLE, **options)
