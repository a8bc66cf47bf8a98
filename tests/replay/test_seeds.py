"""Seeds: one run seed gives many independent random streams."""

from __future__ import annotations

from itertools import product

from replay.seeds import integer_seed, spawn_seed


def test_the_same_address_gives_the_same_stream_and_any_other_another() -> None:
    addresses = list(product((0, 1, 2**31), ("worker", "learner", "evaluation", ""), range(3), range(3)))
    first = {address: tuple(spawn_seed(*address).generate_state(4)) for address in addresses}
    again = {address: tuple(spawn_seed(*address).generate_state(4)) for address in addresses}
    assert first == again
    assert len(set(first.values())) == len(addresses)


def test_a_seed_does_not_depend_on_the_process() -> None:
    # Hashes of strings do: this number changes if a seed depends on hash().
    assert spawn_seed(0, "worker", 1, 2).generate_state(1).tolist() == [1665801176]


def test_integer_seeds_are_31_bits_and_differ() -> None:
    seeds = {integer_seed(spawn_seed(0, "worker", index)) for index in range(1000)}
    assert len(seeds) > 990
    assert all(0 <= seed < 2**31 and isinstance(seed, int) for seed in seeds)
    assert max(seeds) > 2**30
