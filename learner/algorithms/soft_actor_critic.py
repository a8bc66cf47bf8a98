"""Soft actor-critic (Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290 and https://arxiv.org/abs/1812.05905).

This is:
- an actor whose Gaussian is squashed into the action box by tanh, trained through its own draws;
- two critics, of which the smaller value counts, each with a target network that follows it slowly;
- entropy as part of the reward, weighted by a temperature that is trained to hold the entropy at a target (section 5),
  or is fixed.

Where it departs from the papers and the reference page, and why:
- Actor, critics and temperature take one step at a time from the same weights, in one optimizer: the paper's
  updates differ from that to second order, and one step is one step to whoever counts.
- The first `warm_start_size` steps are drawn uniformly from the action box, as in the authors' code.
- Densities, and so the entropy target of -1 nat a dimension, are over actions scaled to [-1, 1].
- The log-deviation is squashed into [-5, 2] by tanh rather than clipped to [-20, 2]: a clipped one has no gradient.
- With `n_steps` > 1 the steps between add no entropy to the target.
- The reference page's version has no temperature at all. Its `eps_start`, `eps_end` and `eps_last_frame` have no
  meaning: the policy explores by itself. They are accepted, do nothing, and warn when changed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from actors.environments import ContinuousActions, EnvironmentSpec
from actors.networks import Critics
from actors.policies import PolicySpec, SquashedGaussianPolicy
from learner.algorithms.algorithm import warn_unused
from learner.algorithms.off_policy import OffPolicyAlgorithm
from learner.batches import TransitionBatch
from learner.soft_actor_critic import actor_loss, critic_loss, polyak_update, soft_q_target, temperature_loss
from replay.errors import ConfigurationError
from replay.seeds import spawn_seed


class SAC(OffPolicyAlgorithm):
    """Soft actor-critic for continuous actions.

    Example:
        trainer = Trainer(max_steps=20_000)
        trainer.fit(SAC.from_preset("Pendulum-v1"))
    """

    name: ClassVar[str] = "sac"
    policy: SquashedGaussianPolicy

    def __init__(
        self,
        env: str | EnvironmentSpec | Mapping[str, Any],
        eps_start: float = 1.0,
        eps_end: float = 0.02,
        eps_last_frame: int = 150_000,
        sync_rate: int = 1,
        gamma: float = 0.99,
        policy_learning_rate: float = 3e-4,
        q_learning_rate: float = 3e-4,
        target_alpha: float = 0.005,
        batch_size: int = 128,
        replay_size: int = 1_000_000,
        warm_start_size: int = 10_000,
        avg_reward_len: int = 100,
        min_episode_reward: float = -21,
        seed: int = 123,
        batches_per_epoch: int = 10_000,
        n_steps: int = 1,
        *,
        init_alpha: float = 1.0,
        learn_alpha: bool = True,
        target_entropy: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the networks. The defaults are the reference page's.

        Args:
            env: environment id, or the specification of one.
            eps_start: does nothing, see above.
            eps_end: does nothing.
            eps_last_frame: does nothing.
            sync_rate: updates between steps of the target networks.
            gamma: discount of one step.
            policy_learning_rate: of the actor and of the temperature.
            q_learning_rate: of the critics.
            target_alpha: part of the way that a target network goes in one step.
            batch_size: transitions in an update.
            replay_size: transitions the replay holds.
            warm_start_size: steps before the first update, taken at random.
            avg_reward_len: episodes in the reported mean return.
            min_episode_reward: return reported before the first episode has ended.
            seed: of everything random.
            batches_per_epoch: updates in a Lightning epoch.
            n_steps: steps summed into a target before it bootstraps.
            init_alpha: temperature at first.
            learn_alpha: whether the temperature is trained; if not it stays as it is.
            target_entropy: entropy the policy is held at, in nats; None gives -1 for each dimension of the action.
            kwargs: see `OffPolicyAlgorithm`.

        Raises:
            ConfigurationError: a value that cannot work, or an action space that is no bounded box.
        """
        super().__init__(env, seed=seed, avg_reward_len=avg_reward_len, min_episode_reward=min_episode_reward, **kwargs)
        self.require_action_space(ContinuousActions, "Box")
        warn_unused(self, "the policy explores by itself", "eps_start", "eps_end", "eps_last_frame")
        if init_alpha <= 0:
            raise ConfigurationError(f"init_alpha must be positive, got {init_alpha}")
        if target_entropy is not None and not math.isfinite(target_entropy):
            raise ConfigurationError(f"target_entropy must be finite, got {target_entropy}")
        self.seed_networks()
        options = self.policy_options()
        spec = PolicySpec("squashed_gaussian", self.environment, random_steps=warm_start_size, **options)
        self.policy = SquashedGaussianPolicy(spec)
        self.policy.begin(spawn_seed(seed, "policy"))
        self.critics = Critics(self.environment, self.policy.size, **options)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(init_alpha)), requires_grad=learn_alpha)
        self.target_entropy = float(-self.policy.size) if target_entropy is None else target_entropy
        self.experience_spec()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one optimizer of the actor, the critics and the temperature."""
        actor_rate, critic_rate = self.hparams["policy_learning_rate"], self.hparams["q_learning_rate"]
        return self.make_optimizer(
            (self.policy.parameters(), actor_rate),
            (self.critics.parameters(), critic_rate),
            ([self.log_alpha], actor_rate),
        )

    def separate_losses(self, batch: TransitionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of the actor, the critics and the temperature, scalars."""
        alpha = self.log_alpha.exp()
        with torch.no_grad():
            next_unit, next_density = self._draw(batch.next_observation)
            q_t = self.target_critics(batch.next_observation, next_unit)
            target = soft_q_target(batch.reward, batch.discount, q_t, next_density, alpha)
        q_tm1 = self.critics(batch.observation, self.policy.to_unit(batch.action))
        unit, density = self._draw(batch.observation)
        # The actor learns through the critics, they do not learn from it.
        fixed = {name: parameter.detach() for name, parameter in self.critics.named_parameters()}
        q = functional_call(self.critics, fixed, (batch.observation, unit))
        return (
            actor_loss(q, density, alpha),
            critic_loss(q_tm1, target),
            temperature_loss(self.log_alpha, density, self.target_entropy),
        )

    def _draw(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        output = self.policy(observation)
        return self.policy.draw(output, torch.randn_like(output[:, : self.policy.size]))

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """See `OffPolicyAlgorithm.losses`: the sum of three losses, each of which reaches its own parameters alone.

        It tells the `actor_loss` and the `critic_loss`.
        """
        of_actor, of_critics, of_temperature = self.separate_losses(batch)
        loss = of_actor + of_critics
        loss = loss + of_temperature if self.log_alpha.requires_grad else loss
        return {"loss": loss, "actor_loss": of_actor, "critic_loss": of_critics}

    def soft_update_target(self, q_net: nn.Module, target_net: nn.Module) -> None:
        """Move the target network a part of the way: `w_target = (1 - a) w_target + a w_q`, a = `target_alpha`."""
        polyak_update(list(target_net.parameters()), list(q_net.parameters()), self.hparams["target_alpha"])

    def update(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """See `Algorithm.update`."""
        results = self.minimize_losses(batch)
        if self.trainer.global_step % self.hparams["sync_rate"] == 0:
            self.soft_update_target(self.critics, self.target_critics)
        alpha = self.log_alpha.detach().exp()
        return {"loss": results["critic_loss"], "actor_loss": results["actor_loss"], "alpha": alpha}
