"""The same updates in a bare loop."""

from __future__ import annotations

import copy

from measure import arguments, rate, report

parsed = arguments()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from learner.optimization import clip_gradient, zero_grad  # noqa: E402

B = 64
torch.set_num_threads(parsed.threads)
online = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
target = copy.deepcopy(online)
optimizer = torch.optim.Adam(online.parameters(), 1e-4, fused=True)
observation, following = torch.randn(B, 4), torch.randn(B, 4)
action, reward, discount = torch.randint(0, 2, (B,)), torch.randn(B), torch.full((B,), 0.99)


def update() -> int:
    """Make one update, with the gradient clipped as the other side's is."""
    with torch.no_grad():
        wanted = reward + discount * target(following).max(1).values
    chosen = online(observation).gather(1, action[:, None]).squeeze(1)
    loss = nn.functional.huber_loss(chosen, wanted)
    zero_grad(optimizer)
    loss.backward()
    clip_gradient(online.parameters(), 10.0)
    optimizer.step()
    return 1


found = rate(update, parsed.warm_up, parsed.seconds)
report(found, parameters=sum(p.numel() for p in online.parameters()), batch_size=B)
