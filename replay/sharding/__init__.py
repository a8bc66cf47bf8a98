"""A replay in several shards: tables in processes of their own, and a router that keeps totals and the rate limiter."""
