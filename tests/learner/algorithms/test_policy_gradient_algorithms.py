"""Tests of REINFORCE, VPG, and A2C: the reference page's interface, slow twins of an update, whole episodes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import actors.segments
from learner import AdvantageActorCritic, Reinforce, VanillaPolicyGradient
from learner.algorithms.on_policy import OnPolicyAlgorithm
from learner.batches import TrajectoryBatch
from replay.errors import ConfigurationError, EnvironmentFailed
from replay.types import Trajectory
from tests.learner.toys import (
    CARTPOLE,
    Batches,
    UpdateWatcher,
    clone_parameters,
    make_trajectory,
    quiet_trainer,
    same,
    small,
    toy,
)

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


# One update.


def batch_of(trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
    """Return a batch with garbage in the rows that are not steps."""
    batch = TrajectoryBatch.of(trajectories)
    observation = batch.observation.clone()
    if all(trajectory.episodic for trajectory in trajectories):
        for u, trajectory in enumerate(trajectories):
            observation[u, len(trajectory.action) :] = 1e6
    invalid = ~batch.valid
    garbage = {"action": 1, "reward": -1e6, "discount": 7.0, "log_probability": float("nan")}
    filled = {}
    for name, value in garbage.items():
        filled[name] = getattr(batch, name).clone()
        filled[name][invalid] = value
    return batch._replace(observation=observation, **filled)


EPISODES = [
    make_trajectory(5, seed=0),
    make_trajectory(1, seed=1),
    make_trajectory(3, seed=2, ends="truncated"),
    make_trajectory(8, seed=3),
]


def policy_gradient_twin(
    module: Any, episodes: Sequence[Trajectory], *, baseline: bool, entropy_beta: float
) -> list[Tensor]:
    """Return the gradient of -E[log pi(a|s) (G - b)] - beta H, computed one step at a time."""
    gamma = 0.9
    terms, returns, entropies = [], [], []
    for episode in episodes:
        for t in range(len(episode.reward)):
            future = episode.reward[t:].astype(np.float64)
            returns.append(sum(gamma**k * r for k, r in enumerate(future)))
            logits = module.policy(torch.from_numpy(episode.observation[t : t + 1]))
            distribution = torch.distributions.Categorical(logits=logits[0])
            terms.append(distribution.log_prob(torch.tensor(episode.action[t])))
            entropies.append(distribution.entropy())
    b = np.mean(returns) if baseline else 0.0
    weighted = [term * float(g - b) for term, g in zip(terms, returns, strict=True)]
    loss = -sum(weighted) / len(weighted) - entropy_beta * sum(entropies) / len(entropies)
    return list(torch.autograd.grad(loss, list(module.parameters())))


def sgd_update(module: Any, batch: TrajectoryBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters before and after one update by a Trainer."""
    before = clone_parameters(module)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, Batches([batch]))
    assert trainer.global_step == 1
    return before, clone_parameters(module)


def assert_stepped(before: list[Tensor], gradient: list[Tensor], after: list[Tensor]) -> None:
    assert not same(before, after)
    for theta, grad, moved in zip(before, gradient, after, strict=True):
        torch.testing.assert_close(moved, theta - 0.1 * grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [Reinforce, VanillaPolicyGradient])
def test_an_update_is_theta_minus_lr_times_grad(cls: type[Reinforce]) -> None:
    options: dict[str, Any] = {"entropy_beta": 0.5} if cls is VanillaPolicyGradient else {}
    module = small(cls, CARTPOLE, optimizer="sgd", lr=0.1, gamma=0.9, **options)
    twin = copy.deepcopy(module)
    gradient = policy_gradient_twin(
        twin, EPISODES, baseline=cls is VanillaPolicyGradient, entropy_beta=options.get("entropy_beta", 0.0)
    )
    before, after = sgd_update(module, batch_of(EPISODES))
    assert_stepped(before, gradient, after)


def test_what_stands_in_padding_never_matters() -> None:
    ends = []
    for batch in (TrajectoryBatch.of(EPISODES), batch_of(EPISODES)):
        module = small(Reinforce, CARTPOLE, lr=0.1, seed=0)
        quiet_trainer(max_steps=1).fit(module, Batches([batch]))
        ends.append(clone_parameters(module))
    assert same(*ends)


def test_a_truncated_episode_is_not_bootstrapped() -> None:
    """The kind of an episode's end and the final observation have no effect."""
    ends = []
    for end in ("terminated", "truncated"):
        episode = make_trajectory(3, ends=end)
        last = np.concatenate([episode.observation[:-1], np.full((1, 4), 3.0 if end == "truncated" else 0.0)])
        module = small(Reinforce, CARTPOLE, lr=0.1, seed=0)
        quiet_trainer(max_steps=1).fit(
            module, Batches([TrajectoryBatch.of([replace(episode, observation=last.astype(np.float32))])])
        )
        ends.append(clone_parameters(module))
    assert same(*ends)


def test_the_gradient_is_a_mean_over_steps_in_a_box_too() -> None:
    module = small(Reinforce, toy(box=2), optimizer="sgd", lr=0.1, gamma=0.9)
    episodes = [make_trajectory(4, seed=0, box=2), make_trajectory(2, seed=1, box=2)]
    losses = []
    for episode in episodes:
        for t in range(len(episode.reward)):
            g = sum(0.9**k * r for k, r in enumerate(episode.reward[t:].astype(np.float64)))
            mean = module.policy(torch.from_numpy(episode.observation[t : t + 1]))[0]
            normal = torch.distributions.Normal(mean, module.policy.log_std.exp())  # type: ignore[operator, union-attr]
            # The box is [-2, 2]; the policy's own actions are in [-1, 1].
            losses.append(-float(g) * normal.log_prob(torch.from_numpy(episode.action[t]) / 2).sum())
    gradient = list(torch.autograd.grad(torch.stack(losses).mean(), list(module.parameters())))
    before, after = sgd_update(module, TrajectoryBatch.of(episodes))
    assert_stepped(before, gradient, after)


# Rewards to go, by hand.


@pytest.mark.parametrize("rewards", [[1.0, 2.0, 4.0], torch.tensor([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.0])])
def test_calc_qvals_by_hand(rewards: Any) -> None:
    assert small(Reinforce, CARTPOLE, gamma=0.5).calc_qvals(rewards).tolist() == [3.0, 4.0, 4.0]
    assert small(VanillaPolicyGradient, CARTPOLE, gamma=0.5).compute_returns(rewards).tolist() == [3.0, 4.0, 4.0]


@dataclass
class Experienced:
    """One experience, with the reference page's attribute."""

    reward: float


def test_discount_rewards_by_hand() -> None:
    module = small(Reinforce, CARTPOLE, gamma=0.5)
    assert module.discount_rewards([Experienced(1.0), Experienced(2.0), Experienced(4.0)]) == 3.0
    assert module.discount_rewards(iter([Experienced(7.0)])) == 7.0
    assert module.discount_rewards([]) == 0.0


# Whole episodes.


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("cls", [Reinforce, VanillaPolicyGradient])
def test_a_batch_is_so_many_whole_episodes(cls: type[Reinforce], num_envs: int) -> None:
    module = small(cls, toy(lengths=(1, 2, 5)), num_envs=num_envs, num_batch_episodes=4)
    batches = module.train_batch()
    lengths = set()
    for _ in range(5):
        batch: TrajectoryBatch = next(batches)
        assert len(batch.reward) == 4
        for observation, valid, discount in zip(batch.observation, batch.valid, batch.discount, strict=True):
            length = int(observation[0, 1])
            lengths.add(length)
            assert valid.tolist() == [t < length for t in range(len(valid))]
            assert observation[:length, 0].tolist() == list(range(length)), "from the reset"
            assert observation[length, 0] == length, "to the final observation"
            assert discount[:length].tolist() == pytest.approx([0.99] * (length - 1) + [0.0])
    assert lengths == {1, 2, 5}


@pytest.mark.parametrize(("num_envs", "batches"), [(1, 50), (3, 50), (8, 50)])
def test_short_episodes_are_not_favoured(num_envs: int, batches: int) -> None:
    """200 episodes of 1 or 50 steps, equally likely: the mean length is 25.5 with a standard deviation of 1.7."""
    module = small(Reinforce, toy(lengths=(1, 50)), num_envs=num_envs, num_batch_episodes=4, seed=1)
    generator = module.train_batch()
    lengths = torch.cat([next(generator).valid.sum(1) for _ in range(batches)]).float()
    assert len(lengths) == 4 * batches
    assert lengths.mean().item() == pytest.approx(25.5, abs=6.0)


# VPG is REINFORCE with a baseline and an entropy bonus.


def test_without_entropy_and_with_returns_of_mean_0_it_is_reinforce() -> None:
    """With gamma 0 the returns are the rewards."""
    rewards = np.array([1.0, -3.0, 0.5, 1.5], np.float32)
    centred = batch_of(
        [replace(make_trajectory(4), reward=rewards), replace(make_trajectory(4, seed=1), reward=-rewards)]
    )
    shifted = centred._replace(reward=centred.reward + 2.0)

    def updated(cls: type[Reinforce], batch: TrajectoryBatch, **options: Any) -> list[Tensor]:
        module = small(cls, CARTPOLE, optimizer="sgd", lr=0.1, gamma=0.0, seed=0, **options)
        quiet_trainer(max_steps=1).fit(module, Batches([batch]))
        return clone_parameters(module)

    plain = updated(Reinforce, centred)
    assert same(plain, updated(VanillaPolicyGradient, centred, entropy_beta=0.0))
    assert not same(plain, updated(VanillaPolicyGradient, centred, entropy_beta=0.01))
    assert not same(plain, updated(Reinforce, shifted))
    for theta, other in zip(plain, updated(VanillaPolicyGradient, shifted, entropy_beta=0.0), strict=True):
        torch.testing.assert_close(theta, other, rtol=1e-5, atol=1e-6)


def test_the_baseline_by_hand() -> None:
    """The returns of the two episodes are 3, 4, 4, and 1, with a mean of 3."""
    episodes = [
        replace(make_trajectory(3), reward=np.array([1, 2, 4], np.float32)),
        replace(make_trajectory(1), reward=np.array([1], np.float32)),
    ]
    batch = batch_of(episodes)
    assert small(Reinforce, CARTPOLE, gamma=0.5).returns_of(batch).tolist() == [3.0, 4.0, 4.0, 1.0]
    assert small(VanillaPolicyGradient, CARTPOLE, gamma=0.5).returns_of(batch).tolist() == [0.0, 1.0, 1.0, -2.0]


def test_the_entropy_bonus_is_subtracted_with_its_weight() -> None:
    batch = batch_of(EPISODES)
    returns = torch.linspace(-1, 2, 17)

    def loss(cls: type[Reinforce], beta: float) -> tuple[Tensor, Reinforce]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = small(cls, CARTPOLE, seed=0, entropy_beta=beta)
        return module.loss(batch.visited, batch.action[batch.valid], returns), module

    plain, module = loss(Reinforce, 0.7)
    entropy = torch.distributions.Categorical(logits=module.policy(batch.visited)).entropy().mean()
    for beta in (0.0, 0.7):
        torch.testing.assert_close(loss(VanillaPolicyGradient, beta)[0], plain - beta * entropy)


# A2C.


def unroll(seed: int, ends: dict[int, str], rows: int = 5, gamma: float = 0.9) -> Trajectory:
    """Return a trajectory of fixed length in which the step in row t ends an episode, for each t in `ends`."""
    made = make_trajectory(rows, seed=seed, gamma=gamma)
    discount, valid = np.full(rows, gamma, np.float32), np.ones(rows, np.bool_)
    for row, how in ends.items():
        discount[row] = gamma * (how == "truncated")
        if row + 1 < rows:
            valid[row + 1] = False
            discount[row + 1] = 0.0
    return replace(made, discount=discount, valid=valid, episodic=False)


UNROLLS = [
    unroll(0, {}),
    unroll(1, {2: "truncated"}),
    unroll(2, {1: "terminated", 4: "truncated"}),
    unroll(3, {0: "truncated", 4: "terminated"}),
]


def small_a2c(**options: Any) -> AdvantageActorCritic:
    return small(
        AdvantageActorCritic, CARTPOLE, **{"optimizer": "sgd", "lr": 0.1, "gamma": 0.9, "batch_size": 20,
        "unroll_length": 5, **options},
    )  # fmt: skip


def actor_critic_twin(module: AdvantageActorCritic, trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """Return the gradient of algorithm S3 of Mnih et al. 2016, for trajectories in which episodes end."""
    hparams = module.hparams
    actor, critic, entropy = [], [], []
    for it in trajectories:
        values = [module.critic(module.policy.torso(torch.from_numpy(o[None])))[0, 0] for o in it.observation]
        for t in range(len(it.reward)):
            if not it.valid[t]:
                continue
            # Forwards from t: the rewards up to the end of the episode or trajectory, then the value to bootstrap from.
            target, weight, s = 0.0, 1.0, t
            while True:
                target += weight * float(it.reward[s])
                weight *= float(it.discount[s])
                s += 1
                if s == len(it.reward) or not it.valid[s]:
                    target += weight * values[s].item()
                    break
            logits = module.policy.head(module.policy.torso(torch.from_numpy(it.observation[t : t + 1])))[0]
            distribution = torch.distributions.Categorical(logits=logits)
            advantage = target - values[t].item()
            actor.append(-distribution.log_prob(torch.tensor(it.action[t])) * advantage)
            critic.append((target - values[t]) ** 2)
            entropy.append(distribution.entropy())
    loss = (
        torch.stack(actor).mean()
        + hparams["critic_beta"] * torch.stack(critic).mean()
        - hparams["entropy_beta"] * torch.stack(entropy).mean()
    )
    return list(torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("betas", [(0.01, 0.5), (0.3, 2.0), (0.0, 0.1)])
def test_an_actor_critic_update_is_theta_minus_lr_times_grad(betas: tuple[float, float]) -> None:
    module = small_a2c(entropy_beta=betas[0], critic_beta=betas[1])
    gradient = actor_critic_twin(copy.deepcopy(module), UNROLLS)
    before, after = sgd_update(module, batch_of(UNROLLS))
    assert_stepped(before, gradient, after)


class LossSpy:
    """Records the arguments of an A2C's loss."""

    def __init__(self, module: AdvantageActorCritic) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._loss: Callable[..., Tensor] = module.loss
        module.loss = self  # type: ignore[assignment]

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.calls.append(arguments)  # type: ignore[arg-type]
        return self._loss(*arguments)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        # Every observation has the value 10, gamma is 1/2, the step in row 2 ends the episode, row 3 is a reset.
        ("truncated", [4.0, 6.0, 8.0, 9.0]),
        ("terminated", [2.75, 3.5, 3.0, 9.0]),
    ],
)
def test_returns_bootstrap_at_truncation_inside_an_unroll_and_not_at_termination(
    end: str, expected: list[float]
) -> None:
    module = small_a2c(gamma=0.5)
    with torch.no_grad():
        module.critic.weight.zero_()
        module.critic.bias.fill_(10.0)
    spy = LossSpy(module)
    trajectory = replace(unroll(0, {2: end}, gamma=0.5), reward=np.array([1, 2, 3, 100, 4], np.float32))
    sgd_update(module, TrajectoryBatch.of([trajectory]))
    ((states, actions, returns),) = spy.calls
    assert returns.tolist() == expected
    assert states.shape == (4, 4)
    assert actions.shape == (4,)


def test_compute_returns_by_hand() -> None:
    """The `done` of the second step excludes the last value, 10, from the first two returns."""
    module = small_a2c(gamma=0.5)
    rewards, dones = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0])
    assert module.compute_returns(rewards, dones, torch.tensor(10.0)).tolist() == [2.0, 2.0, 9.0]
    assert module.compute_returns(rewards, torch.zeros(3), torch.tensor(10.0)).tolist() == [4.25, 6.5, 9.0]
    assert module.compute_returns([1, 2, 4], [False, True, True], 10).tolist() == [2.0, 2.0, 4.0]  # type: ignore[arg-type]


def test_values_and_returns_are_flat_and_a_column_is_refused() -> None:
    module = small_a2c()
    batch = batch_of(UNROLLS)
    states, actions = batch.visited, batch.action[batch.valid]
    steps = len(states)
    assert module(states)[1].shape == (steps,)
    assert module(states)[0].shape == (steps, 2)
    torch.testing.assert_close(module(states)[0].exp().sum(1), torch.ones(steps))
    assert module.loss(states, actions, torch.zeros(steps)).shape == ()
    for shape in ((steps, 1), (1, steps), (1,)):
        with pytest.raises(ValueError, match=rf"values and returns must both be \[N\], got \({steps},\), "):
            module.loss(states, actions, torch.zeros(shape))


def head_gradients(**betas: float) -> dict[str, Tensor]:
    module, batch = small_a2c(seed=0, **betas), batch_of(UNROLLS)
    loss = module.loss(batch.visited, batch.action[batch.valid], torch.linspace(-1, 3, int(batch.valid.sum())))
    names = ("policy.head.weight", "critic.weight")
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    return {n: torch.zeros(()) if g is None else g for n, g in zip(names, gradients, strict=True)}


def test_each_beta_does_its_own_part() -> None:
    """The critic's head has gradients of the critic's loss only, the actor's head of all other terms."""
    actor_alone = head_gradients(critic_beta=0.0, entropy_beta=0.0)
    assert not actor_alone["critic.weight"].any(), "the advantage must not train the critic"
    assert actor_alone["policy.head.weight"].any()
    one, three = (head_gradients(critic_beta=beta, entropy_beta=0.0) for beta in (1.0, 3.0))
    torch.testing.assert_close(three["critic.weight"], 3 * one["critic.weight"])
    assert one["critic.weight"].any()
    for gradients in (one, three):
        torch.testing.assert_close(gradients["policy.head.weight"], actor_alone["policy.head.weight"])
    half, whole = (head_gradients(critic_beta=1.0, entropy_beta=beta) for beta in (0.5, 1.0))
    torch.testing.assert_close(half["critic.weight"], one["critic.weight"])
    bonus = whole["policy.head.weight"] - actor_alone["policy.head.weight"]
    torch.testing.assert_close(half["policy.head.weight"] - actor_alone["policy.head.weight"], 0.5 * bonus)
    assert bonus.any()


def test_more_entropy_is_a_smaller_loss() -> None:
    module = small_a2c(critic_beta=0.0, entropy_beta=1.0)
    states, actions = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    value = module(states)[1].detach()  # with an advantage of 0 only the bonus remains
    losses = []
    for scale in (0.0, 30.0):
        with torch.no_grad():
            module.policy.head.weight.mul_(scale or 1.0)
            module.policy.head.bias.mul_(scale or 1.0)
        losses.append(module.loss(states, actions, value).item())
    assert -np.log(2) <= losses[0] < losses[1] <= 0.0


def test_a_batch_is_batch_size_rows() -> None:
    module = small(AdvantageActorCritic, toy(lengths=(2, 7)), num_envs=3, batch_size=40, unroll_length=5)
    assert module.experience_spec().units_per_batch == 8
    batch: TrajectoryBatch = next(module.train_batch())
    assert batch.observation.shape == (8, 6, 4)
    assert batch.reward.shape == (8, 5)
    assert not batch.valid.all()


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


def test_an_update_knows_nothing_of_the_batch_before() -> None:
    """The baseline is the mean of the second batch only."""
    first, second = batch_of(EPISODES[:2]), batch_of(EPISODES[2:])
    module = small(VanillaPolicyGradient, CARTPOLE, optimizer="sgd", lr=0.1, gamma=0.9, seed=0)
    quiet_trainer(max_steps=1).fit(module, Batches([first]))
    gradient = policy_gradient_twin(copy.deepcopy(module), EPISODES[2:], baseline=True, entropy_beta=0.01)
    before = clone_parameters(module)
    quiet_trainer(max_steps=1).fit(module, Batches([second]))
    assert_stepped(before, gradient, clone_parameters(module))


# Regressions.


def test_a_batch_without_a_single_step_is_survived() -> None:
    """All lanes of Pendulum are truncated at step 200, and the next row is not a step in any lane."""
    module = AdvantageActorCritic("Pendulum-v1", unroll_length=1, batch_size=4, num_envs=4, hidden_sizes=[4])
    trainer = quiet_trainer(max_steps=203)
    trainer.fit(module)
    assert trainer.global_step == 203
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_lanes_without_a_share_in_the_batch_are_not_made() -> None:
    module = small(AdvantageActorCritic, toy(), num_envs=16, batch_size=32, unroll_length=8)
    quiet_trainer(max_steps=10).fit(module)
    assert module.env_steps <= 10 * 32


def test_an_episode_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.segments, "LONGEST_EPISODE", 50)
    module = small(Reinforce, toy(lengths=(60,)))
    with pytest.raises(EnvironmentFailed, match="an episode did not end within 50 steps; set a time limit"):
        quiet_trainer(max_steps=1).fit(module)


def test_returns_that_are_all_alike_scale_nothing() -> None:
    module = small(AdvantageActorCritic, toy(lengths=(1,), pays=0.1), num_envs=3, batch_size=24, normalize_rewards=True)
    quiet_trainer(max_steps=30).fit(module)
    assert float(module.return_std) == 1.0
    assert abs(float(module.latest_metrics["train/loss"])) < 10.0
