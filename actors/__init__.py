"""Rollouts: environments, policies, versioned weights, segment builders, rollout workers, and evaluation."""
