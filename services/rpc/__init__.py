"""gRPC: the protocol (`squall.proto` and the code generated from it), the server, and its services.

`squall.proto` is public: fields and methods may be added but never renamed or renumbered. Run `make proto` after a
change.
"""
