"""The limit end to end: the update of a case in a bare loop, at the precision Squall takes, beside bare stepping.

The update runs in this process and the environments, with batched inference, in another, both at once, because cores
may share what they compute with. Each goes no further than the other allows by the updates per step, so this is what a
learner and a worker reach that send each other nothing. The update is compiled where ours is.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

from measure import arguments, rate, report
from settings import WORK, Work, loss_fell

parsed = arguments("case")

import torch  # noqa: E402

from actors.environments import seeds_for, specify  # noqa: E402
from learner.acceleration import choose_precision, keep_freed_memory  # noqa: E402
from learner.checkpoints import make_algorithm  # noqa: E402
from learner.compilation import compile_backward  # noqa: E402
from learner.optimization import clip_gradient, zero_grad  # noqa: E402
from replay.seeds import spawn_seed  # noqa: E402

keep_freed_memory()
torch.set_num_threads(parsed.threads)


def make_module(work: Work) -> Any:
    """Return the algorithm's module, for its networks and its loss."""
    options: dict[str, Any] = {"env": work.env, "batch_size": work.batch_size}
    if work.hidden:
        options["hidden_sizes"] = list(work.hidden)
    return make_algorithm(work.algorithm, options)


def make_batch(module: Any, work: Work) -> Any:
    """Return a batch of made-up transitions, of the shapes and dtypes of the environment."""
    from learner.batches import TransitionBatch

    environment, size = module.environment, work.batch_size
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


def make_update(module: Any, work: Work, losses: list[float]) -> Any:
    """Return a function that makes one update, and the parameters that it trains."""
    module.train()
    precision = choose_precision("auto", images=module.environment.is_image)
    batch = make_batch(module, work)
    optimizer = module.configure_optimizers()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    backward = compile_backward(module.losses, parameters) if work.compiled else None

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision):
            loss = (backward or module.losses)(batch)["loss"]
        if backward is None:
            zero_grad(optimizer)
            loss.backward()
        if work.algorithm == "dqn":
            clip_gradient(parameters, 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))

    return update, parameters


def step_without_end(case: str, updates: Any, steps: Any) -> None:
    """Step the environments of a case, in a process of its own, as far as there are updates."""
    torch.set_num_threads(1)
    work = WORK[case]
    policy = make_module(work).policy
    environment = specify(work.env)
    env = environment.make(work.envs)
    observation = environment.observe(env.reset(seed=seeds_for(env, spawn_seed(0, "bare")))[0])
    ahead = 2 * work.updates_per_vector_step
    while True:
        if steps.value * work.updates_per_step > updates.value + ahead:
            time.sleep(0.0005)
            continue
        action = policy.act(observation, step=10**9, greedy=False).action
        observation = environment.observe(env.step(environment.to_environment(action))[0])
        steps.value += work.envs


if __name__ == "__main__":
    work, losses = WORK[parsed.case], []
    context = multiprocessing.get_context("spawn")
    updates, steps = context.Value("q", 0), context.Value("q", 0)
    stepping = context.Process(target=step_without_end, args=(parsed.case, updates, steps), daemon=True)
    stepping.start()
    update, parameters = make_update(make_module(work), work, losses)

    def one() -> int:
        """Make an update, once its steps are made."""
        while steps.value * work.updates_per_step < updates.value:
            time.sleep(0.0005)
        update()
        updates.value += 1
        return 1

    while not steps.value:
        time.sleep(0.01)
    found = rate(one, parsed.warm_up, parsed.seconds)
    stepping.kill()
    stepping.join()
    report(
        found / work.updates_per_step,
        parameters=sum(p.numel() for p in parameters),
        batch_size=work.batch_size,
        updates_per_step=updates.value / steps.value,
        loss_fell=loss_fell(losses),
    )
