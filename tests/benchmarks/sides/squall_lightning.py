"""Updates a second through Squall's module and Lightning's Trainer, k of them a training step."""

from __future__ import annotations

import time
from typing import Any

from measure import arguments, report

parsed = arguments("k")

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402

from learner import DQN  # noqa: E402
from learner.acceleration import trainer_precision  # noqa: E402
from learner.batches import TransitionBatch  # noqa: E402

K, B = int(parsed.k), 64
torch.set_num_threads(parsed.threads)


class Ready:
    """Batches that are there already."""

    def __init__(self) -> None:
        shape = (K, B) if K > 1 else (B,)
        self.batch = TransitionBatch(
            torch.randn(*shape, 4), torch.randint(0, 2, shape), torch.randn(shape), torch.full(shape, 0.99),
            torch.randn(*shape, 4), torch.zeros(shape, dtype=torch.int64), torch.full(shape, 1e-4), 10_000,
        )  # fmt: skip

    def __len__(self) -> int:
        return 1_000_000

    def __iter__(self) -> Any:
        while True:
            yield self.batch


class Window(pl.Callback):
    """Counts updates in the window, and ends the fit after it."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.updates = 0
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        if self.begun is None:
            if now - self.start >= parsed.warm_up:
                self.begun, self.first = now, trainer.global_step
        elif now - self.begun >= parsed.seconds:
            self.updates, self.ended = trainer.global_step - self.first, now
            trainer.should_stop = True


module = DQN("CartPole-v1", batch_size=B, hidden_sizes=(256, 256), max_grad_norm=10.0)
window = Window()
pl.Trainer(
    max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    accelerator="cpu", devices=1, callbacks=[window], **trainer_precision("auto", module, gpu=False),
).fit(module, Ready())  # fmt: skip
parameters = sum(p.numel() for p in module.policy.parameters())
report(window.updates / (window.ended - window.begun), parameters=parameters, batch_size=B)  # type: ignore[operator]
