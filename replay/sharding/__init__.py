"""Sharded replay: one replay divided among several tables, each in its own process, and a router for shared state.

    worker ----reserve--> ReplayRouter <--report-- ReplayShard <---insert---- worker
    learner ---sample---> ReplayRouter             ReplayShard <--sample_at-- learner

The router keeps the rate limiter, the totals, the highest priority, and the random number generator, but no experience.
The reply to a sample call is a plan: positions in the total mass of all shards, in which the shards follow one another
by index. A sample therefore has the distribution of a single table, regardless of the contents of each shard.

A push counts as soon as the shard that inserted it has reported it. Until then, the router reserves the push's steps,
so that workers that are admitted at the same time cannot together insert more than the rate limiter permits. Different
shards may report the pushes of a worker in another order than the worker sent them.

If a shard dies, the router samples from the other shards. The router restarts the rate limiter only if the other shards
contain fewer transitions than the rate limiter assumes. No samples are then due for the lost transitions.
"""
