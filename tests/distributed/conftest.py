"""Prints the table of layouts at the end of a test session that trained under them."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import Row, table

LAYOUT_ROWS = pytest.StashKey[list[Row]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(LAYOUT_ROWS, [])
    if rows:
        terminalreporter.section("layouts against one process, worst relative differences")
        terminalreporter.write_line(table(rows))
