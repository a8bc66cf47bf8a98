"""The limit end to end: the update of a case in a bare loop, at the precision Squall takes, beside bare stepping.

The update runs in this thread and the environments, with batched inference, in another process; of the two rates, in
environment steps, the lower is the limit: what a learner and workers that waste nothing could reach on two cores.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from measure import arguments, rate, report
from settings import WORK, Work, loss_fell

parsed = arguments("case")

import torch  # noqa: E402

from actors.environments import seeds_for, specify  # noqa: E402
from learner.training import choose_precision, make_algorithm  # noqa: E402
from replay.seeds import spawn_seed  # noqa: E402

torch.set_num_threads(parsed.threads)


def make_module(work: Work) -> Any:
    """Return the algorithm's module, for its networks and its loss."""
    options: dict[str, Any] = {"env": work.env, "batch_size": work.batch_size}
    if work.hidden:
        options["hidden_sizes"] = list(work.hidden)
    return make_algorithm(work.algorithm, options)


def make_batch(module: Any, size: int) -> Any:
    """Return a batch of made-up transitions, of the shapes and dtypes of the environment."""
    from learner.experience import TransitionBatch

    environment = module.environment
    layout = environment.layout(segment_length=8, n_steps=1)
    shape = (size, *layout.observation_shape)

    def observation() -> torch.Tensor:
        if layout.frame_dtype == "uint8":
            return torch.randint(0, 255, shape, dtype=torch.uint8)
        return torch.randn(shape)

    action = (
        torch.randint(0, module.policy.actions, (size,))
        if work.algorithm == "dqn"
        else torch.rand(size, *layout.action_shape) * 2 - 1
    )
    return TransitionBatch(
        observation(), action, torch.randn(size), torch.full((size,), 0.99), observation(),
        torch.zeros(size, dtype=torch.int64), torch.full((size,), 1e-4), 10_000,
    )  # fmt: skip


def updates_per_second(work: Work) -> tuple[float, dict[str, Any]]:
    """Return the rate of bare updates, and the facts."""
    module = make_module(work)
    module.train()
    precision = choose_precision("auto", images=module.environment.is_image)
    batch, losses = make_batch(module, work.batch_size), []
    optimizer = module.configure_optimizers()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def update() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision):
            loss = module.loss(batch) if work.algorithm == "dqn" else torch.stack(module.losses(batch)).sum()
        optimizer.zero_grad()
        loss.backward()
        if work.algorithm == "dqn":
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        return 1

    found = rate(update, parsed.warm_up, parsed.seconds)
    facts = {"parameters": sum(p.numel() for p in parameters), "loss_fell": loss_fell(losses)}
    return found, facts


def steps_per_second(case: str, answer: Any) -> None:
    """Send the rate of bare environment steps with batched inference, in a process of its own."""
    torch.set_num_threads(1)
    work = WORK[case]
    policy = make_module(work).policy
    environment = specify(work.env)
    env = environment.make(work.envs)
    observation, _ = env.reset(seed=seeds_for(env, spawn_seed(0, "bare")))
    state = [environment.observe(observation)]

    def step() -> int:
        action = policy.act(state[0], step=10**9, greedy=False).action
        state[0] = environment.observe(env.step(environment.to_environment(action))[0])
        return work.envs

    answer.send(rate(step, parsed.warm_up, parsed.seconds))


if __name__ == "__main__":
    work = WORK[parsed.case]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    stepping = multiprocessing.get_context("spawn").Process(target=steps_per_second, args=(parsed.case, sender))
    updates, facts = updates_per_second(work)
    stepping.start()
    steps = receiver.recv()
    stepping.join()
    # One update costs 1 / updates of a core, a step 1 / steps of one; the cores are two, and threads of an update
    # are counted in its rate already.
    by_updates = updates / work.updates_per_step
    both = 2.0 / (parsed.threads / by_updates + 1.0 / steps)
    report(
        min(by_updates, steps, both) if parsed.threads > 1 else min(by_updates, steps),
        batch_size=work.batch_size,
        updates_per_step=work.updates_per_step,
        updates_per_second=updates,
        steps_per_second=steps,
        **facts,
    )
