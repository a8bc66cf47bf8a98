"""Services: how Squall runs.

Imports go one way: `cli -> runs -> supervision -> rpc -> store`, and `client -> rpc`.
"""
