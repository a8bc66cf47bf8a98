"""Tests of DQN's variants: each has its paper's idea, all combine, all learn."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.networks import NoisyLinear, QNetwork
from actors.policies import PolicySpec
from learner import DQN, PERDQN, DoubleDQN, DuelingDQN, NoisyDQN, NonDistributionalRainbow, NStepDQN
from learner.algorithms import ALGORITHMS
from learner.value_learning import double_q_learning, huber, importance_weights, q_learning
from replay.errors import ConfigurationError
from tests.learner.toys import CARTPOLE, Batches, quiet_trainer, random_batch

SMALL: dict[str, Any] = {
    "batch_size": 8, "replay_size": 1_000, "warm_start_size": 16, "hidden_sizes": [8], "segment_length": 4,
}  # fmt: skip
VALUE_BASED = [DQN, DoubleDQN, DuelingDQN, NoisyDQN, NStepDQN, PERDQN, NonDistributionalRainbow]


# Noisy layers.


@pytest.mark.parametrize("noise", ["factorised", "independent"])
def test_noise_is_drawn_anew_in_training_and_absent_in_evaluation(noise: str) -> None:
    torch.manual_seed(0)
    layer, features = NoisyLinear(16, 4, noise), torch.randn(3, 16)
    first, second = layer(features), layer(features)
    assert not torch.equal(first, second)
    # The noise is the same for the whole batch: equal rows give equal outputs.
    alike = layer(torch.ones(2, 16))
    assert torch.equal(alike[0], alike[1])
    layer.eval()
    expected = features @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(features), expected)
    assert torch.equal(layer(features), layer(features))


@pytest.mark.parametrize(("noise", "variance"), [("factorised", (2 / np.pi) * 0.5**2 / 16), ("independent", 0.017**2)])
def test_noise_has_the_spread_of_the_paper(noise: str, variance: float) -> None:
    """The variance is sigma^2 E[f(e)^2]^2 with E|e| = sqrt(2 / pi), or sigma^2 for independent noise."""
    torch.manual_seed(0)
    layer = NoisyLinear(16, 4, noise)
    one = torch.zeros(1, 16)
    one[0, 3] = 1.0
    with torch.no_grad():
        layer.bias_sigma.zero_()
        samples = torch.stack([layer(one)[0] for _ in range(20_000)])
    assert samples.var(0).numpy() == pytest.approx([variance] * 4, rel=0.1)
    bound = 16**-0.5 if noise == "factorised" else (3 / 16) ** 0.5
    assert layer.weight.abs().max() <= bound


def test_noise_is_no_state_and_sigma_learns() -> None:
    layer = NoisyLinear(4, 2)
    assert set(layer.state_dict()) == {"weight", "bias", "weight_sigma", "bias_sigma"}
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.weight_sigma.grad is not None
    assert layer.weight_sigma.grad.abs().sum() > 0


def test_unknown_noise_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="noise must be one of factorised, independent, got 'pink'"):
        NoisyDQN(CARTPOLE, noise="pink", **SMALL)


def test_a_noisy_policy_explores_by_its_noise_and_evaluates_without_it() -> None:
    torch.manual_seed(0)
    policy = NoisyDQN(CARTPOLE, **SMALL).policy
    observation = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32) * 0.1
    exploring = {policy.act(observation, step=0).action.tobytes() for _ in range(20)}
    greedy = {policy.act(observation, step=0, greedy=True).action.tobytes() for _ in range(20)}
    assert len(exploring) > 1
    assert len(greedy) == 1
    assert policy.training
    assert policy.spec.exploration_rate(0) == 0.0


def test_epsilon_does_nothing_in_a_noisy_dqn_and_says_so() -> None:
    with pytest.warns(UserWarning, match="eps_start, eps_end have no effect in NoisyDQN"):
        NoisyDQN(CARTPOLE, eps_start=0.5, eps_end=0.1, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoisyDQN(CARTPOLE, **SMALL)


# Dueling and double.


def test_the_dueling_head_is_value_plus_centred_advantage() -> None:
    network = QNetwork(CARTPOLE, 2, (8,), dueling=True)
    observation = torch.randn(5, 4)
    features = network.torso(observation)
    advantage = network.head(features)
    assert network.state_value is not None
    expected = network.state_value(features) + advantage - advantage.mean(1, keepdim=True)
    torch.testing.assert_close(network(observation), expected)
    torch.testing.assert_close(network(observation).mean(1, keepdim=True), network.state_value(features))
    before = network(observation)
    with torch.no_grad():
        network.head.bias.add_(7.0)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(network(observation), before)


def test_double_dqn_selects_online_and_evaluates_with_the_target() -> None:
    module, batch = DoubleDQN(CARTPOLE, **SMALL), random_batch(32)
    with torch.no_grad():
        for parameter in module.target_network.parameters():
            parameter.add_(torch.randn_like(parameter))
    online, target = module.q_network(batch.next_observation), module.target_network(batch.next_observation)
    rest = (module.q_network(batch.observation), batch.action, batch.reward, batch.discount)
    error = module.td_error(batch)
    torch.testing.assert_close(error, double_q_learning(*rest, target, online))
    assert not torch.allclose(error, q_learning(*rest, target))


# Precomputed target values.


def changed_target(module: DQN) -> DQN:
    with torch.no_grad():
        for parameter in module.target_network.parameters():
            parameter.add_(torch.randn_like(parameter))
    module.trainer = quiet_trainer()  # sets the precision
    return module


@pytest.mark.parametrize("kind", [DQN, DoubleDQN, DuelingDQN, PERDQN, NStepDQN])
def test_precomputed_values_are_those_an_update_would_compute(kind: type[DQN]) -> None:
    module, batch = changed_target(kind(CARTPOLE, **SMALL)), random_batch(3, 16)
    ahead = module.precompute_targets(batch)
    assert ahead.target_values_ahead is not None
    assert not ahead.target_values_ahead.requires_grad
    assert torch.equal(ahead.observation, batch.observation)
    for with_values, without in zip(ahead.split(), batch.split(), strict=True):
        assert with_values.target_values_ahead is not None
        assert torch.equal(with_values.target_values_ahead, module.target_network(without.next_observation))
        assert torch.equal(module.td_error(with_values), module.td_error(without))


def test_values_are_precomputed_in_the_precision_of_the_updates() -> None:
    module, batch = changed_target(DQN(CARTPOLE, **SMALL)), random_batch(2, 16)
    exact = module.precompute_targets(batch).target_values_ahead
    module.trainer = quiet_trainer(precision="bf16-mixed")
    rounded = module.precompute_targets(batch).target_values_ahead
    assert exact is not None
    assert rounded is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded[0], module.target_network(batch.next_observation[0]))
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", [DQN, DoubleDQN])
def test_precomputed_values_are_used_until_the_target_network_is_copied_again(kind: type[DQN]) -> None:
    module = changed_target(kind(CARTPOLE, **SMALL))
    [batch] = module.precompute_targets(random_batch(1, 16)).split()
    truth = module.td_error(batch)
    assert batch.target_values_ahead is not None
    other = batch._replace(target_values_ahead=batch.target_values_ahead + 3.0)
    assert not torch.allclose(module.td_error(other), truth)
    module._target_syncs += 1
    torch.testing.assert_close(module.td_error(other), truth)


def test_a_copy_is_counted_once_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the counter increased first, values computed during the copy would count as values of the new network."""
    module, counts = DQN(CARTPOLE, **{**SMALL, "sync_rate": 2}), []
    load_state_dict = module.target_network.load_state_dict

    def watched(state: Any) -> Any:
        counts.append(module._target_syncs)
        result = load_state_dict(state)
        counts.append(module._target_syncs)
        return result

    monkeypatch.setattr(module.target_network, "load_state_dict", watched)
    quiet_trainer(max_steps=5).fit(module, Batches([random_batch(5, 8)]))
    assert counts == [0, 0, 1, 1]
    assert module._target_syncs == 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (NoisyDQN, {}), (NonDistributionalRainbow, {}), (DQN, {"normalize_observations": True}),
        (DQN, {"sync_rate": 31, "updates_per_training_step": 8}),
    ],
)  # fmt: skip
def test_nothing_is_precomputed_where_the_target_network_would_soon_be_another(
    kind: type[DQN], options: dict[str, Any]
) -> None:
    batch = random_batch(2, 8)
    assert kind(CARTPOLE, **SMALL, **options).precompute_targets(batch) is batch


# Prioritized replay.


class PriorityRecorder:
    """An experience that records the priorities it receives."""

    def __init__(self) -> None:
        self.sent: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def update_priorities(self, ids: Any, priorities: Any) -> None:
        self.sent.append((ids, priorities))


def test_priorities_are_absolute_errors_and_the_loss_is_weighted() -> None:
    module = PERDQN(CARTPOLE, beta_start=0.4, beta_last_frame=100, **SMALL)
    module.env_steps = 50
    assert module.beta == pytest.approx(0.7)
    module.experience = recorder = PriorityRecorder()  # type: ignore[assignment]
    batch = random_batch(16)._replace(ids=torch.arange(16), probability=torch.rand(16) / 100 + 1e-3)
    error = module.td_error(batch).detach()
    loss = module.loss(batch)
    weights = importance_weights(batch.probability, batch.size, 0.7)
    torch.testing.assert_close(loss, (weights * huber(error)).mean())
    quiet_trainer(max_epochs=1).fit(module, Batches([batch]))
    ((ids, priorities),) = recorder.sent
    assert ids.tolist() == list(range(16))
    np.testing.assert_allclose(priorities, error.abs().numpy() + 1e-6, rtol=1e-6)


def test_beta_stays_at_one_after_its_last_frame() -> None:
    module = PERDQN(CARTPOLE, beta_last_frame=10, **SMALL)
    module.env_steps = 1_000
    assert module.beta == 1.0


@pytest.mark.parametrize(("option", "value"), [("beta_start", 1.5), ("beta_last_frame", 0), ("priority_exponent", 1.1)])
def test_prioritized_values_that_cannot_work_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=str(value)):
        PERDQN(CARTPOLE, **{option: value}, **SMALL)


def test_a_prioritized_run_changes_the_tables_priorities() -> None:
    module = PERDQN("SquallChain-v0", **{**SMALL, "updates_per_training_step": 4})
    quiet_trainer(max_steps=40).fit(module)
    table = module.experience._table  # type: ignore[union-attr]
    weights = table._tree.get(np.arange(table.size))
    assert len(set(np.round(weights, 6))) > 4
    assert table.stale_updates == 0


# All variants.


def test_the_registry_names_every_variant() -> None:
    assert {name: cls for name, cls in ALGORITHMS.items() if issubclass(cls, DQN)} == {c.name: c for c in VALUE_BASED}
    assert NStepDQN(CARTPOLE, **SMALL).rollout_spec().n_steps == 4
    assert DQN(CARTPOLE, **SMALL).rollout_spec().n_steps == 1


def test_the_combination_has_all_five_ideas() -> None:
    module = NonDistributionalRainbow(CARTPOLE, noise="independent", beta_start=0.3, **SMALL)
    spec = module.policy_spec
    assert (spec.dueling, spec.noise) == (True, "independent")
    assert module.rollout_spec().n_steps == 4
    assert module.experience_spec().table.priority_exponent == 0.6
    assert type(module).td_error is DoubleDQN.td_error
    assert type(module).prepare_batch is PERDQN.prepare_batch
    assert {"noise", "beta_start", "n_steps", "gamma"} <= set(type(module).hyperparameter_types())
    assert type(module).hyperparameter_types()["n_steps"].default == 4


@pytest.mark.parametrize("cls", VALUE_BASED)
def test_an_unknown_keyword_is_an_error_everywhere(cls: type[DQN]) -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        cls(CARTPOLE, learning_rat=0.1, **SMALL)


@pytest.mark.parametrize("cls", VALUE_BASED)
def test_a_checkpoint_of_every_variant_loads(cls: type[DQN], tmp_path: Path) -> None:
    own: dict[str, Any] = {"noise": "independent"} if issubclass(cls, NoisyDQN) else {}
    module = cls(CARTPOLE, gamma=0.9, **own, **SMALL)
    trainer = quiet_trainer(max_steps=1)
    batch = random_batch(1, 8)
    module.experience = PriorityRecorder()  # type: ignore[assignment]
    trainer.fit(module, Batches([batch]))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    loaded = cls.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert loaded.hparams == module.hparams
    observation = torch.randn(4, 4)
    assert torch.equal(loaded.eval()(observation), module.eval()(observation))


@pytest.mark.parametrize("cls", VALUE_BASED)
def test_workers_build_the_same_network_from_the_spec(cls: type[DQN]) -> None:
    module = cls(CARTPOLE, **SMALL)
    spec = module.policy_spec
    assert isinstance(spec, PolicySpec)
    twin = replace(spec).build()
    twin.load_state_dict(copy.deepcopy(module.policy.state_dict()))
    observation = torch.randn(4, 4)
    assert torch.equal(twin.eval()(observation), module.policy.eval()(observation))


@pytest.mark.parametrize("cls", VALUE_BASED)
def test_every_variant_learns_the_chain(cls: type[DQN]) -> None:
    """The action to the right is optimal in every state. Its value falls by a factor of 0.8 per state from the last."""
    module = cls(
        "SquallChain-v0", gamma=0.8, learning_rate=0.005, sync_rate=20, batch_size=32, seed=0, n_steps=1,
        warm_start_size=500, replay_size=5_000, updates_per_training_step=8, num_envs=4, segment_length=8,
        hidden_sizes=[32],
    )  # fmt: skip
    quiet_trainer(max_steps=800).fit(module)
    values = module.eval()(torch.arange(4)).detach().numpy()
    assert values.argmax(1).tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(values[:, 1], [0.8**3, 0.8**2, 0.8, 1.0], atol=0.15)
