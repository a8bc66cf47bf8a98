"""Fixtures for the tests of acting."""

from __future__ import annotations

import pytest

from actors import policies
from tests.actors.toys import TEST_POLICIES


@pytest.fixture
def toy_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the policies of `tests.actors.toys` available by their kind."""
    for kind, policy in TEST_POLICIES.items():
        monkeypatch.setitem(policies.POLICIES, kind, policy)
