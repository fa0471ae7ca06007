"""One SQLite store for all tests of MLflow: its creation takes seconds. Each has an experiment of its own."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
