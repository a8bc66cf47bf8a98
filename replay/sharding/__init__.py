"""Sharded replay: one replay divided among several tables, each in its own process, and a router for shared state.

    worker ----reserve--> ReplayRouter <--report-- ReplayShard <---insert---- worker
    learner ---sample---> ReplayRouter             ReplayShard <--sample_at-- learner

The router has the rate limiter, the totals, the highest priority, and the random number generator, but no experience.
Its reply to a sample call is a plan: positions in the total mass of all shards, with the shards laid side by side. A
sample therefore has the distribution of a single table, regardless of the contents of each shard.

A push counts once the shard that inserted it has reported it. Until then, the router reserves the push's steps, so that
workers that are admitted at the same time cannot together insert more than the rate limiter permits. The reports of
different shards about pushes of the same worker may arrive in another order than that of the pushes.

If a shard dies, the router samples from the others. Only if they hold fewer transitions than the rate limiter assumes,
the router restarts the rate limiter, and then no samples are due for the lost transitions.
"""
