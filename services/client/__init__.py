"""Clients: what a Python program holds to control runs, ask a policy for actions, or feed experience over gRPC."""

from services.client.run_client import SquallClient

__all__ = ["SquallClient"]
