"""URLs of stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from replay.errors import ConfigurationError
from services.store.locate import open_store
from tests.services.store.backends import record


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url, path in (
        (None, tmp_path / "home" / "squall.db"),
        ("sqlite:///runs/here.db", tmp_path / "runs" / "here.db"),
        (f"sqlite:///{tmp_path}/odd ?#%20.db", tmp_path / "odd ?#%20.db"),
    ):
        with open_store(url, tmp_path / "home") as store:
            assert not path.exists()
            store.register(record())
            assert path.exists()
            assert store.get("pong-1").algorithm == "dqn"


@pytest.mark.parametrize(
    "url",
    ["", "squall.db", "sqlite:", "sqlite://x.db", "sqlite:///", "sqlite:///:memory:", "postgres://host:5432/0"],
)
def test_a_url_that_names_no_store_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"a store is sqlite:///relative/file\.db, .*redis.*unix.*, got ") as caught:
        open_store(url, tmp_path)
    assert isinstance(caught.value, ConfigurationError)
    assert repr(url) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["postgres://me:hunter2@host/0", "postgres:me:hun/ter2@host", "hunter2@host"])
def test_a_password_is_not_shown(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\*\*\*@host") as caught:
        open_store(url, tmp_path)
    assert "ter2" not in str(caught.value)
