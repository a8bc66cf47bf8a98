"""Tests of all on-policy algorithms: the reference page's interface, training, and the probabilities of actions."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from learner import AdvantageActorCritic, Reinforce, VanillaPolicyGradient
from learner.algorithms.on_policy import OnPolicyAlgorithm
from learner.batches import TrajectoryBatch
from replay.errors import ConfigurationError
from tests.learner.toys import CARTPOLE, UpdateWatcher, clone_parameters, quiet_trainer, same, small, toy

ON_POLICY: list[type[OnPolicyAlgorithm]] = [Reinforce, VanillaPolicyGradient, AdvantageActorCritic]

# The reference page's interface.

_EMPTY = inspect.Parameter.empty
SIGNATURES: dict[type, dict[str, Any]] = {
    Reinforce: {
        "env": _EMPTY, "gamma": 0.99, "lr": 0.01, "batch_size": 8, "n_steps": 10, "avg_reward_len": 100,
        "entropy_beta": 0.01, "epoch_len": 1000, "num_batch_episodes": 4,
    },
    VanillaPolicyGradient: {
        "env": _EMPTY, "gamma": 0.99, "lr": 0.01, "batch_size": 8, "n_steps": 10, "avg_reward_len": 100,
        "entropy_beta": 0.01, "epoch_len": 1000,
    },
    AdvantageActorCritic: {
        "env": _EMPTY, "gamma": 0.99, "lr": 0.001, "batch_size": 32, "avg_reward_len": 100, "entropy_beta": 0.01,
        "critic_beta": 0.5, "epoch_len": 1000,
    },
}  # fmt: skip
_METHODS = {
    "add_model_specific_args": ["arg_parser"],
    "forward": ["x"],
    "train_batch": [],
    "train_dataloader": [],
    "training_step": ["batch", "_"],
    "run_n_episodes": ["env", "n_epsiodes", "n_episodes"],
}
METHODS: dict[type[OnPolicyAlgorithm], dict[str, list[str]]] = {
    Reinforce: {**_METHODS, "calc_qvals": ["rewards"], "discount_rewards": ["experiences"]},
    VanillaPolicyGradient: {
        **_METHODS, "compute_returns": ["rewards"], "loss": ["states", "actions", "scaled_rewards"],
    },
    AdvantageActorCritic: {
        **_METHODS, "compute_returns": ["rewards", "dones", "last_value"], "loss": ["states", "actions", "returns"],
    },
}  # fmt: skip


@pytest.mark.parametrize("cls", ON_POLICY)
def test_the_constructor_is_the_reference_pages(cls: type[OnPolicyAlgorithm]) -> None:
    parameters = inspect.signature(cls).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = list(SIGNATURES[cls].items())
    # The page's VPG has no num_batch_episodes; here the argument follows the page's arguments.
    extra = [("num_batch_episodes", 4)] if cls is VanillaPolicyGradient else []
    assert positional == expected + extra


@pytest.mark.parametrize("cls", ON_POLICY)
def test_the_methods_are_the_reference_pages(cls: type[OnPolicyAlgorithm]) -> None:
    module = cls(CARTPOLE)
    actual = {name: list(inspect.signature(getattr(module, name)).parameters) for name in METHODS[cls]}
    assert actual == METHODS[cls]


@pytest.mark.parametrize(
    ("cls", "unused"),
    [
        (Reinforce, {"batch_size": 9, "n_steps": 3, "entropy_beta": 0.5}),
        (VanillaPolicyGradient, {"batch_size": 9, "n_steps": 3}),
        (AdvantageActorCritic, {}),
    ],
)
def test_what_does_nothing_warns_when_it_is_changed_and_only_then(
    cls: type[OnPolicyAlgorithm], unused: dict[str, Any]
) -> None:
    for name, value in unused.items():
        message = f"^{name} have no effect in {cls.__name__}: a batch is whole episodes"
        with pytest.warns(UserWarning, match=message) as warned:
            cls(CARTPOLE, **{name: value})
        assert [warning.filename for warning in warned] == [__file__], "the warning points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(CARTPOLE)
        defaults = {name: SIGNATURES[cls][name] for name in unused}
        others = {name: 8 * value for name, value in SIGNATURES[cls].items() if name not in {"env", "gamma", *unused}}
        cls(CARTPOLE, **{**defaults, **others, "gamma": 0.5})


@pytest.mark.parametrize(
    ("cls", "options", "complaint"),
    [
        (Reinforce, {"lr": 0}, "^lr must be positive, got 0$"),
        (Reinforce, {"epoch_len": 0}, "^epoch_len must be positive, got 0$"),
        (Reinforce, {"num_batch_episodes": 0}, "^num_batch_episodes must be positive, got 0$"),
        (Reinforce, {"max_policy_lag": -1}, "^max_policy_lag must not be negative, got -1$"),
        (VanillaPolicyGradient, {"entropy_beta": -0.1}, "^entropy_beta must not be negative, got -0.1$"),
        (AdvantageActorCritic, {"critic_beta": -0.1}, "^critic_beta must not be negative, got -0.1$"),
        (AdvantageActorCritic, {"unroll_length": 0}, "^unroll_length must be positive, got 0$"),
        (AdvantageActorCritic, {"batch_size": 33}, "^batch_size must be a multiple of unroll_length, got 33 and 8$"),
        (AdvantageActorCritic, {"batch_size": 4}, "^batch_size must be a multiple of unroll_length, got 4 and 8$"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    cls: type[OnPolicyAlgorithm], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        cls(CARTPOLE, **options)


@pytest.mark.parametrize("cls", ON_POLICY)
def test_it_trains_and_tests_with_the_pages_defaults(cls: type[OnPolicyAlgorithm]) -> None:
    module = cls("CartPole-v1")
    trainer = quiet_trainer(max_steps=3)
    trainer.fit(module)
    assert trainer.global_step == 3
    ((name, value),) = quiet_trainer().test(cls("CartPole-v1"), verbose=False)[0].items()
    assert name == "test/mean_reward"
    assert 8 <= value <= 500


@pytest.mark.parametrize("cls", ON_POLICY)
def test_an_epoch_is_epoch_len_updates(cls: type[OnPolicyAlgorithm]) -> None:
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(small(cls, toy(), epoch_len=3))
    assert trainer.global_step == 6


@pytest.mark.parametrize("cls", ON_POLICY)
def test_zero_is_a_seed(cls: type[OnPolicyAlgorithm]) -> None:
    def trained(seed: int) -> list[Tensor]:
        module = small(cls, toy(lengths=(1, 4)), seed=seed, num_envs=2)
        quiet_trainer(max_steps=4).fit(module)
        return clone_parameters(module)

    first = trained(0)
    torch.rand(3)  # other users of the global generator
    assert same(first, trained(0))
    assert not same(first, trained(1))


# The learner's policy and the acting policy.


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("box", [0, 1, 6])
@pytest.mark.parametrize("cls", ON_POLICY)
def test_actions_are_as_probable_to_the_learner_as_they_were_when_taken(
    cls: type[OnPolicyAlgorithm], box: int, normalize: bool
) -> None:
    """Before each update the learner's policy equals the policy that acted."""
    module = small(cls, toy(box=box, lengths=(2, 6)), lr=0.1, num_envs=2, normalize_observations=normalize)
    update, compared = module.update, []

    def compare(batch: TrajectoryBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            output = module.policy(batch.visited)
            now, _ = module.policy.log_probability(output, batch.action[batch.valid])
        torch.testing.assert_close(now, batch.log_probability[batch.valid], rtol=1e-4, atol=1e-4)
        logged = update(batch)
        with torch.no_grad():
            after, _ = module.policy.log_probability(module.policy(batch.visited), batch.action[batch.valid])
        compared.append(float((after - now).abs().max()))
        return logged

    module.update = compare  # type: ignore[method-assign]
    quiet_trainer(max_steps=4).fit(module)
    assert len(compared) == 4
    assert min(compared) > 1e-3, "weights that are one update old give other probabilities"


@pytest.mark.parametrize("cls", ON_POLICY)
def test_every_update_is_counted_and_told(cls: type[OnPolicyAlgorithm]) -> None:
    watcher = UpdateWatcher()
    quiet_trainer(watcher, max_steps=5).fit(small(cls, toy()))
    assert watcher.steps == [1, 2, 3, 4, 5]
