"""Services: the command line, runs, their supervision, the run store, gRPC, and its clients.

Imports go one way: `cli -> runs -> supervision -> rpc -> store`, and `client -> rpc`.
"""
