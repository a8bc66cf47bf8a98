"""Reverb on localhost: a writer process with TrajectoryWriter, this process reads a TrajectoryDataset in batches."""

from __future__ import annotations

import multiprocessing
import sys
import time
from typing import Any

from items import BATCH, CAPACITY, STACK, K, frames_of, item_bytes
from measure import arguments, quantile, report

MOST_IN_FLIGHT = 100  # it warns above that
parsed = arguments("kind", "table")


def write(port: int, kind: str, table: str, seconds: Any, told: Any) -> None:
    """Write items until `seconds` holds 0: one frame a step, an item of the stack and its successor."""
    import reverb

    frames, done = frames_of(kind, 2_000), 0
    stack = STACK if kind == "atari" else 1
    client = reverb.Client(f"localhost:{port}")
    with client.trajectory_writer(num_keep_alive_refs=stack + 1) as writer:
        index = 0
        while seconds.value:
            frame = frames[index % len(frames)]
            writer.append({"frame": frame, "action": 0, "reward": 0.0, "discount": 1.0})
            index += 1
            if index > stack:
                columns = writer.history
                writer.create_item(
                    table, 1.0,
                    {
                        "frame": columns["frame"][-stack - 1 :], "action": columns["action"][-1],
                        "reward": columns["reward"][-1], "discount": columns["discount"][-1],
                    },
                )  # fmt: skip
                writer.flush(block_until_num_items=MOST_IN_FLIGHT)
                done += 1
                told.value = done


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    import reverb
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(parsed.threads)
    atari, at_once = parsed.kind == "atari", BATCH[parsed.kind] * K[parsed.kind]
    stack = STACK if atari else 1
    frame = tf.TensorSpec((stack + 1, 84, 84) if atari else (stack + 1, 4), tf.uint8 if atari else tf.float32)
    columns = {
        "frame": frame, "action": tf.TensorSpec((), tf.int64), "reward": tf.TensorSpec((), tf.float64),
        "discount": tf.TensorSpec((), tf.float64),
    }  # fmt: skip
    sampler = reverb.selectors.Prioritized(0.6) if parsed.table == "prioritized" else reverb.selectors.Uniform()
    server = reverb.Server(
        tables=[
            reverb.Table(
                parsed.table, sampler, reverb.selectors.Fifo(), CAPACITY[parsed.kind], reverb.rate_limiters.MinSize(1)
            )
        ]
    )
    going, told = context.Value("i", 1), context.Value("l", 0)
    writer = context.Process(target=write, args=(server.port, parsed.kind, parsed.table, going, told), daemon=True)
    writer.start()
    while told.value < CAPACITY[parsed.kind] // 2:
        if not writer.is_alive():
            sys.exit("the writer is gone")
        time.sleep(0.2)
    dataset = reverb.TrajectoryDataset(
        f"localhost:{server.port}",
        parsed.table,
        dtypes={name: spec.dtype for name, spec in columns.items()},
        shapes={name: spec.shape for name, spec in columns.items()},
        max_in_flight_samples_per_worker=2 * at_once,
    )
    batches = iter(dataset.batch(at_once).prefetch(2))
    end = time.perf_counter() + parsed.warm_up
    while time.perf_counter() < end:
        next(batches)
    begun, first, taken, drawn = time.perf_counter(), told.value, [], 0
    while time.perf_counter() - begun < parsed.seconds:
        at = time.perf_counter()
        next(batches)
        taken.append(time.perf_counter() - at)
        drawn += at_once
    seconds = time.perf_counter() - begun
    inserted, sampled = (told.value - first) / seconds, drawn / seconds
    going.value = 0
    writer.join(10)
    if writer.is_alive():
        writer.kill()
    taken.sort()
    p50, p99 = quantile(taken, 0.5), quantile(taken, 0.99)
    report(
        sampled, item_bytes=item_bytes(parsed.kind), inserted=inserted, sampled=sampled,
        p50_ms=p50 * 1e3, p99_ms=p99 * 1e3, p99_by_p50=p99 / p50,
    )  # fmt: skip
