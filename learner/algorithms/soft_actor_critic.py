"""Soft actor-critic (Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290 and https://arxiv.org/abs/1812.05905).

This is:
- an actor whose Gaussian is squashed into the action box by tanh, trained through its own samples;
- two critics, whose smaller value counts, each with a target network that follows slowly;
- entropy as part of the reward. Its weight, the temperature, is fixed, or is trained to keep the entropy at a target
  (section 5).

Where it departs from the papers and the reference page, and why:
- Actor, critics, and temperature step simultaneously from the same weights, in one optimizer, so that one update is one
  counted step. The paper's sequential updates differ from this only in second order.
- The first `warm_start_size` actions are sampled uniformly from the action box, as in the authors' code.
- Densities, and therefore the entropy target of -1 nat per dimension, refer to actions scaled to [-1, 1].
- The log standard deviation is squashed into [-5, 2] by tanh instead of clipped to [-20, 2]: a clipped value has no
  gradient.
- With `n_steps` > 1 the intermediate steps add no entropy to the target.
- The reference page's version has no temperature. Its `eps_start`, `eps_end`, and `eps_last_frame` have no meaning,
  because the policy itself explores: they are accepted, have no effect, and cause a warning when changed.
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
from learner.algorithms.off_policy import OffPolicyAlgorithm
from learner.batches import TransitionBatch
from learner.hyperparameters import warn_unused
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
        """Create the networks. The defaults are those of the reference page; `eps_*` have no effect.

        Args:
            env: environment id or specification.
            eps_start: no effect.
            eps_end: no effect.
            eps_last_frame: no effect.
            sync_rate: updates between steps of the target networks.
            gamma: discount of one step.
            policy_learning_rate: learning rate of the actor and of the temperature.
            q_learning_rate: learning rate of the critics.
            target_alpha: fraction of the distance that a target network moves toward its critic in one step.
            batch_size: transitions in an update.
            replay_size: capacity of the replay table, in transitions.
            warm_start_size: environment steps before the first update, with random actions.
            avg_reward_len: number of episodes in the reported mean return.
            min_episode_reward: mean return reported before the first episode ends.
            seed: seed of all random numbers.
            batches_per_epoch: updates in a Lightning epoch.
            n_steps: rewards summed in a target before it bootstraps.
            init_alpha: initial temperature.
            learn_alpha: whether the temperature is trained; otherwise it is fixed.
            target_entropy: target of the policy's entropy, in nats; None selects -1 per dimension of the action.
            kwargs: arguments of `OffPolicyAlgorithm` and `Algorithm`.

        Raises:
            ConfigurationError: an invalid value, or an action space that is not a bounded box.
        """
        super().__init__(env, seed=seed, avg_reward_len=avg_reward_len, min_episode_reward=min_episode_reward, **kwargs)
        self.require_action_space(ContinuousActions, "Box")
        warn_unused(self, "the policy explores by itself", "eps_start", "eps_end", "eps_last_frame")
        self._make_networks()
        self.experience_spec()  # raises ConfigurationError if the sizes contradict each other

    def _make_networks(self) -> None:
        hparams, options = self.hparams, self.policy_options()
        alpha, target_entropy = hparams["init_alpha"], hparams["target_entropy"]
        if alpha <= 0:
            raise ConfigurationError(f"init_alpha must be positive, got {alpha}")
        if target_entropy is not None and not math.isfinite(target_entropy):
            raise ConfigurationError(f"target_entropy must be finite, got {target_entropy}")
        self.seed_networks()
        spec = PolicySpec("squashed_gaussian", self.environment, random_steps=hparams["warm_start_size"], **options)
        self.policy = SquashedGaussianPolicy(spec)
        self.policy.begin(spawn_seed(self.seed, "policy"))
        self.critics = Critics(self.environment, self.policy.size, **options)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)), requires_grad=hparams["learn_alpha"])
        self.target_entropy = float(-self.policy.size) if target_entropy is None else target_entropy

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one optimizer of the actor, the critics, and the temperature."""
        actor_rate, critic_rate = self.hparams["policy_learning_rate"], self.hparams["q_learning_rate"]
        return self.make_optimizer(
            (self.policy.parameters(), actor_rate),
            (self.critics.parameters(), critic_rate),
            ([self.log_alpha], actor_rate),
        )

    def separate_losses(self, batch: TransitionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scalar losses of the actor, the critics, and the temperature."""
        alpha = self.log_alpha.exp()
        with torch.no_grad():
            next_unit, next_density = self._sample_action(batch.next_observation)
            q_t = self.target_critics(batch.next_observation, next_unit)
            target = soft_q_target(batch.reward, batch.discount, q_t, next_density, alpha)
        q_tm1 = self.critics(batch.observation, self.policy.to_unit(batch.action))
        unit, density = self._sample_action(batch.observation)
        # The actor's gradient passes through the critics but must not reach their parameters.
        fixed = {name: parameter.detach() for name, parameter in self.critics.named_parameters()}
        q = functional_call(self.critics, fixed, (batch.observation, unit))
        return (
            actor_loss(q, density, alpha),
            critic_loss(q_tm1, target),
            temperature_loss(self.log_alpha, density, self.target_entropy),
        )

    def _sample_action(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Sample an action, scaled to [-1, 1], per observation; return actions and their log-densities `[B]`."""
        output = self.policy(observation)
        return self.policy.draw(output, torch.randn_like(output[:, : self.policy.size]))

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Return the sum of the three losses, and two of its terms, `actor_loss` and `critic_loss`.

        Each of the three losses has gradients for its own parameters only.
        """
        policy_loss, q_loss, alpha_loss = self.separate_losses(batch)
        loss = policy_loss + q_loss
        loss = loss + alpha_loss if self.log_alpha.requires_grad else loss
        return {"loss": loss, "actor_loss": policy_loss, "critic_loss": q_loss}

    def soft_update_target(self, q_net: nn.Module, target_net: nn.Module) -> None:
        """Move the target network toward `q_net`: `w_target = (1 - a) w_target + a w_q`, a = `target_alpha`."""
        polyak_update(list(target_net.parameters()), list(q_net.parameters()), self.hparams["target_alpha"])

    def update(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """See `Algorithm.update`."""
        results = self.minimize_losses(batch)
        if self.trainer.global_step % self.hparams["sync_rate"] == 0:
            self.soft_update_target(self.critics, self.target_critics)
        alpha = self.log_alpha.detach().exp()
        return {"loss": results["critic_loss"], "actor_loss": results["actor_loss"], "alpha": alpha}
