"""gRPC: the protocol (`squall.proto` and the code generated from it), the server, and the services it offers.

`squall.proto` is public: fields and methods are added, never renamed or renumbered. Run `make proto` after a change.
"""
