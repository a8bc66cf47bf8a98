"""Python clients over gRPC: control runs, query a policy for actions, and feed a run with experience."""

from services.client.run_client import SquallClient

__all__ = ["SquallClient"]
