"""Tests of DQN: the reference page's interface, invalid values, one update by the formula, and the learned values."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from actors.environments import ContinuousActions, EnvironmentSpec, specify
from learner import DQN
from learner.batches import TransitionBatch
from learner.experience import LocalExperience
from replay.errors import ConfigurationError
from tests.learner.toys import CARTPOLE, Batches, clone_parameters, quiet_trainer, random_batch, same, small_dqn

# As on the reference page, in its order.
REFERENCE = {
    "env": inspect.Parameter.empty,
    "eps_start": 1.0,
    "eps_end": 0.02,
    "eps_last_frame": 150_000,
    "sync_rate": 1000,
    "gamma": 0.99,
    "learning_rate": 0.0001,
    "batch_size": 32,
    "replay_size": 100_000,
    "warm_start_size": 10_000,
    "avg_reward_len": 100,
    "min_episode_reward": -21,
    "seed": 123,
    "batches_per_epoch": 1000,
    "n_steps": 1,
}
METHODS = {
    "add_model_specific_args": ["arg_parser"],
    "forward": ["x"],
    "make_environment": ["env_name", "seed"],
    "run_n_episodes": ["env", "n_epsiodes", "epsilon", "n_episodes"],
    "test_dataloader": [],
    "train_batch": [],
    "train_dataloader": [],
    "training_step": ["batch", "_"],
}


def test_the_constructor_is_the_reference_pages() -> None:
    parameters = inspect.signature(DQN).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(REFERENCE.items())
    assert {p.kind for p in parameters if p.name not in REFERENCE} <= {
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    }


def test_the_methods_are_the_reference_pages() -> None:
    module = small_dqn()
    assert {name: list(inspect.signature(getattr(module, name)).parameters) for name in METHODS} == METHODS
    defaults = inspect.signature(module.run_n_episodes).parameters
    assert (defaults["n_epsiodes"].default, defaults["epsilon"].default) == (1, 1.0)


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        DQN(CARTPOLE, learning_rat=0.1)  # type: ignore[call-arg]


POSITIVE = (
    "sync_rate", "learning_rate", "batch_size", "replay_size", "warm_start_size", "avg_reward_len",
    "batches_per_epoch", "n_steps", "updates_per_step", "updates_per_training_step", "num_envs", "segment_length",
    "max_grad_norm",
)  # fmt: skip


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("name", POSITIVE)
def test_what_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} must be positive, got {value}$"):
        DQN(CARTPOLE, **{name: value})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\], got -0.1"),
        ({"gamma": float("nan")}, r"gamma must lie in \[0, 1\], got nan"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"updates_per_step": float("inf")}, "updates_per_step must be positive, got inf"),
        ({"eps_start": 1.5}, r"eps_start must lie in \[0, 1\], got 1.5"),
        ({"eps_end": -0.1}, r"eps_end must lie in \[0, 1\], got -0.1"),
        ({"eps_last_frame": 0}, "eps_last_frame must be positive, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, rmsprop, sgd, got 'lion'"),
        ({"hidden_sizes": []}, r"hidden_sizes must be one or more positive widths, got \[\]"),
        ({"hidden_sizes": [64, 0]}, r"hidden_sizes must be one or more positive widths, got \[64, 0\]"),
        ({"replay_size": 100, "warm_start_size": 50, "batch_size": 101}, "of 100 .* smaller than a batch of 101"),
        ({"replay_size": 100}, "the first sample waits for 10000 transitions, but the replay holds only 100"),
        ({"replay_size": 100, "warm_start_size": 9, "segment_length": 101}, "replay of 100 .* one segment of 101"),
        ({"replay_size": 100, "warm_start_size": 9, "num_envs": 7}, "replay of 100 .* smaller than one push of 112"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        DQN(CARTPOLE, **options)


def test_continuous_actions_are_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        DQN("Pendulum-v1")
    assert str(error.value) == "DQN needs a Discrete action space; Pendulum-v1 has Box(-2.0, 2.0, (1,), float32)"


def test_continuous_actions_of_an_outside_simulator_are_refused() -> None:
    outside = EnvironmentSpec(None, (3,), "float32", 1, ContinuousActions((1,), (-2.0,), (2.0,)))
    with pytest.raises(ConfigurationError, match=r"Discrete action space; env has ContinuousActions\(shape=\(1,"):
        DQN(outside)


# Seeds and environments.


def trained(updates: int = 40, **options: Any) -> DQN:
    module = small_dqn(learning_rate=0.01, num_envs=2, max_grad_norm=1.0, **options)
    quiet_trainer(max_steps=updates).fit(module)
    return module


def test_one_seed_is_one_initialisation_and_zero_is_a_seed() -> None:
    torch.manual_seed(99)
    first = clone_parameters(small_dqn(seed=0))
    torch.manual_seed(100)
    assert same(first, clone_parameters(small_dqn(seed=0)))
    assert not same(first, clone_parameters(small_dqn(seed=1)))


def test_one_seed_is_one_training() -> None:
    first = trained(seed=0)
    torch.rand(3), np.random.rand(3)  # other users of the global generators
    again = trained(seed=0)
    assert same(clone_parameters(first), clone_parameters(again))
    assert (first.env_steps, list(first.recent_returns)) == (again.env_steps, list(again.recent_returns))
    assert not same(clone_parameters(first), clone_parameters(trained(seed=1)))


@pytest.mark.parametrize("form", ["id", "specification", "plain"])
def test_an_environment_may_be_named_specified_or_plain(form: str) -> None:
    specification = specify("CartPole-v1")
    env = {"id": "CartPole-v1", "specification": specification, "plain": specification.plain()}[form]
    module = small_dqn(env, seed=5)
    assert module.environment == specification
    assert same(clone_parameters(module), clone_parameters(small_dqn("CartPole-v1", seed=5)))
    quiet_trainer(max_steps=2).fit(module)


def test_the_target_network_begins_as_a_copy_that_nobody_trains() -> None:
    module = small_dqn()
    assert same(clone_parameters(module.target_network), clone_parameters(module.q_network))
    assert not any(parameter.requires_grad for parameter in module.target_network.parameters())
    optimized = [p for group in module.configure_optimizers().param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in module.q_network.parameters()}
    assert {id(p) for p in optimized} == {id(p) for p in module.policy.parameters()}


def test_forward_gives_the_value_of_every_action() -> None:
    module = small_dqn()
    x = torch.randn(5, 4)
    assert module(x).shape == (5, 2)
    assert torch.equal(module(x), module.q_network(x))


def test_discrete_observations_train() -> None:
    module = small_dqn("FrozenLake-v1")
    before = clone_parameters(module.q_network)
    quiet_trainer(max_steps=5).fit(module)
    assert not same(before, clone_parameters(module.q_network))


def test_atari_trains() -> None:
    module = small_dqn("PongNoFrameskip-v4", batch_size=4, num_envs=2, updates_per_training_step=2)
    before = clone_parameters(module.q_network)
    seen: list[TransitionBatch] = []
    quiet_trainer(Recorder(seen), max_steps=3).fit(module)
    assert not same(before, clone_parameters(module.q_network))
    assert [batch.observation.shape for batch in seen] == [(2, 4, 4, 84, 84)] * 2
    assert {batch.observation.dtype for batch in seen} == {torch.uint8}
    assert seen[0].observation.any()


class Recorder(pl.Callback):
    """Records the batch of every training step."""

    def __init__(self, seen: list[TransitionBatch]) -> None:
        self.seen = seen

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.seen.append(batch)


@pytest.mark.parametrize(("env", "clip", "clips"), [
    (CARTPOLE, None, False), (CARTPOLE, True, True),
    ("PongNoFrameskip-v4", None, True), ("PongNoFrameskip-v4", False, False),
])  # fmt: skip
def test_rewards_are_clipped_on_atari_unless_told_otherwise(env: Any, clip: bool | None, clips: bool) -> None:
    assert small_dqn(env, clip_rewards=clip).rollout_spec().clip_rewards is clips


def test_hyperparameters_reach_rollout_and_replay() -> None:
    module = DQN(
        CARTPOLE, gamma=0.5, n_steps=3, seed=9, replay_size=2_000, warm_start_size=70, batch_size=6,
        updates_per_step=0.25, updates_per_training_step=7, num_envs=4, segment_length=5,
        eps_start=0.9, eps_end=0.1, eps_last_frame=77, eps_ladder=True, hidden_sizes=[12],
    )  # fmt: skip
    rollout = module.rollout_spec()
    assert (rollout.gamma, rollout.n_steps, rollout.run_seed) == (0.5, 3, 9)
    assert (rollout.num_envs, rollout.segment_length) == (4, 5)
    exploration = rollout.policy.exploration
    assert (exploration.start, exploration.end, exploration.last_frame, exploration.ladder) == (0.9, 0.1, 77, True)
    assert rollout.policy.hidden_sizes == (12,)
    replay = module.experience_spec()
    assert (replay.table.capacity, replay.minimum_size, replay.largest_push) == (2_000, 70, 24)
    assert (replay.batch_size, replay.batches_per_sample, replay.samples_per_insert) == (6, 7, 1.5)


# One update.


def gradients(network: nn.Module, target: nn.Module, batch: TransitionBatch) -> list[Tensor]:
    """Return the gradient of the mean Huber loss of y - Q(s, a), as in algorithm 1 of Mnih et al. 2015."""
    losses = []
    for j in range(len(batch.reward)):
        with torch.no_grad():
            y = batch.reward[j] + batch.discount[j] * target(batch.next_observation[j : j + 1]).max()
        error = y - network(batch.observation[j : j + 1])[0, batch.action[j]]
        losses.append(error.square() / 2 if error.abs() <= 1 else error.abs() - 0.5)
    assert {bool(loss > 0.5) for loss in losses} == {True, False}, "the batch must cover both branches"
    return list(torch.autograd.grad(torch.stack(losses).mean(), list(network.parameters())))


def one_update(batch: TransitionBatch | None, **options: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return parameters before, the gradient, and parameters after one update by a Trainer."""
    module = small_dqn("SquallTally-v0" if batch is None else CARTPOLE, optimizer="sgd", learning_rate=0.1, **options)
    with torch.no_grad():
        # With different networks, a use of the wrong one is detected. The bias gives errors below and above 1.
        for parameter in module.target_network.parameters():
            parameter.mul_(-1.5)
        module.q_network.head.bias.copy_(torch.tensor([4.2, 3.0]))  # type: ignore[union-attr, operator]
    network, target = copy.deepcopy(module.q_network), copy.deepcopy(module.target_network)
    before = clone_parameters(module.q_network)
    seen: list[TransitionBatch] = []
    trainer = quiet_trainer(Recorder(seen), max_steps=1)
    trainer.fit(module, None if batch is None else Batches([batch]))
    assert trainer.global_step == 1
    assert len(seen) == 1
    assert same(clone_parameters(target), clone_parameters(module.target_network))
    return before, gradients(network, target, seen[0].split()[0]), clone_parameters(module.q_network)


def assert_close(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k", [1, 4])
def test_an_update_on_experience_is_theta_minus_lr_times_grad(k: int) -> None:
    before, gradient, after = one_update(None, updates_per_training_step=k)
    assert_close(after, [theta - 0.1 * grad for theta, grad in zip(before, gradient, strict=True)])
    assert not same(before, after)


def test_an_update_on_a_batch_is_theta_minus_lr_times_grad() -> None:
    before, gradient, after = one_update(random_batch(64))
    assert_close(after, [theta - 0.1 * grad for theta, grad in zip(before, gradient, strict=True)])


@pytest.mark.parametrize(("longest", "clips"), [(0.01, True), (1000.0, False)])
def test_a_gradient_longer_than_the_longest_is_scaled(longest: float, clips: bool) -> None:
    before, gradient, after = one_update(random_batch(64), max_grad_norm=longest)
    length = torch.cat([grad.ravel() for grad in gradient]).norm().item()
    assert (length > longest) is clips
    scale = longest / length if clips else 1.0
    assert_close(after, [theta - 0.1 * scale * grad for theta, grad in zip(before, gradient, strict=True)])


def test_the_target_network_makes_the_targets_until_the_next_update() -> None:
    """With a sync after every update, the second update bootstraps from the network after the first update."""
    batches = [random_batch(64, seed=1), random_batch(64, seed=2)]
    module = small_dqn(optimizer="sgd", learning_rate=0.1, sync_rate=1)
    network = copy.deepcopy(module.q_network)
    quiet_trainer(max_steps=2).fit(module, Batches(batches))
    for batch in batches:
        grads = gradients(network, copy.deepcopy(network), batch)
        with torch.no_grad():
            for parameter, grad in zip(network.parameters(), grads, strict=True):
                parameter -= 0.1 * grad
    assert_close(clone_parameters(module.q_network), clone_parameters(network))


# Learned values.


@pytest.fixture
def chain_values() -> dict[str, list[list[float]]]:
    """Return the chain's optimal values for gamma 0.8: v(s) = 0.8^(3-s) v(3), with v(3) = 1 or v(3) = 1 + 0.8 v(0)."""
    ends = {"SquallChain-v0": 1.0, "SquallTruncatedChain-v0": 1.0 / (1.0 - 0.8**4)}
    return {
        name: [[0.8 * 0.8 ** (3 - max(s - 1, 0)) * last, 0.8 ** (3 - s) * last] for s in range(4)]
        for name, last in ends.items()
    }


@pytest.mark.parametrize("env", ["SquallChain-v0", "SquallTruncatedChain-v0"])
def test_it_learns_the_values_of_a_chain(env: str, chain_values: dict[str, list[list[float]]]) -> None:
    """The two chains differ only in the end of an episode: a truncated one bootstraps from its final observation."""
    module = DQN(
        env, gamma=0.8, eps_end=1.0, eps_last_frame=1, learning_rate=0.005, sync_rate=20, batch_size=32, seed=0,
        warm_start_size=500, replay_size=5_000, updates_per_training_step=8, num_envs=4,
        segment_length=8, hidden_sizes=[32],
    )  # fmt: skip
    quiet_trainer(max_steps=800).fit(module)
    values = module(torch.arange(4)).detach().numpy()
    assert values.argmax(1).tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(values, chain_values[env], atol=0.05)


def test_the_two_chains_are_worth_telling_apart(chain_values: dict[str, list[list[float]]]) -> None:
    terminated, truncated = (np.array(values) for values in chain_values.values())
    assert (truncated - terminated).min() > 0.25


def test_n_step_targets_are_used() -> None:
    """If n is the length of an episode, targets are returns, without bootstrapping from the target network."""
    module = DQN(
        "SquallTally-v0", gamma=0.5, n_steps=3, eps_end=1.0, learning_rate=0.01, sync_rate=10_000, batch_size=32,
        warm_start_size=200, replay_size=1_000, updates_per_training_step=8, num_envs=4, segment_length=8,
        hidden_sizes=[16],
    )  # fmt: skip
    experience = module.train_dataloader()
    assert isinstance(experience, LocalExperience)
    batch = experience.next()
    returns = {round(float(reward), 4) for reward in batch.reward.ravel()}
    assert returns == {5.0, 7.5, 8.75}
    assert not batch.discount.any()
