"""How experience is made: environments, acting modules, versioned weights, rollouts and evaluation."""
