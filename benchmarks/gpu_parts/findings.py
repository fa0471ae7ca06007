"""What a part has measured so far, on disk after every addition: a part that dies keeps what it found."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def part_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every part takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: sizes that a CPU computes")
    parser.add_argument("--out", type=Path, required=True, help="folder of NAME.json and NAME.md")
    return parser


class Findings:
    """Tables, claims and facts of one part, in NAME.json and NAME.md of `folder`."""

    def __init__(self, folder: Path, name: str, title: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stem, self._title = folder / name, title
        self._facts: dict[str, Any] = {}
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self._claims: list[dict[str, Any]] = []
        self._notes: list[str] = []

    def fact(self, **facts: Any) -> None:
        """Values that other programs want to read; not in the Markdown."""
        self._facts |= facts
        self._write()

    def row(self, table: str, **cells: Any) -> None:
        """A line of a table; the first one names the columns."""
        self._tables.setdefault(table, []).append(cells)
        self._write()

    def note(self, text: str) -> None:
        self._notes.append(text)
        self._write()

    def claim(self, what: str, measured: str, target: str, holds: bool) -> bool:
        """A target and whether it is met; returns `holds`."""
        self._claims.append({"what": what, "measured": measured, "target": target, "holds": holds})
        self._write()
        return holds

    def _write(self) -> None:
        tree = {"facts": self._facts, "tables": self._tables, "claims": self._claims, "notes": self._notes}
        lines = [f"# {self._title}", ""]
        for note in self._notes:
            lines += [note, ""]
        for name, rows in self._tables.items():
            lines += [*([f"{name}:", ""] if name else []), *markdown_table(rows), ""]
        write_whole(self._stem.with_suffix(".json"), json.dumps(tree, indent=1) + "\n")
        write_whole(self._stem.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")


def markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a table with the columns of the first row; numbers in four digits, None as nothing."""
    if not rows:
        return []
    columns = list(rows[0])
    body = ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


class ChildError(RuntimeError):
    """A process that a part started failed; the message says which error it printed last."""


def run_child(arguments: Sequence[str], on_line: Callable[[dict[str, Any]], None]) -> None:
    """Runs `python ARGUMENTS`; lines of JSON go to on_line as they come, others to this process's output.

    Raises:
        ChildError: it did not end with 0.
    """
    tail: deque[str] = deque(maxlen=200)
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        for line in child.stdout or ():
            if line.startswith("{"):
                on_line(json.loads(line))
            else:
                tail.append(line)
                print(line, end="", flush=True)
    if child.returncode:
        raise ChildError(f"exit status {child.returncode}: {last_error(tail)}")


def last_error(lines: Sequence[str]) -> str:
    """The last line of a log that names an error, or its last line."""
    filled = [line.strip() for line in lines if line.strip()]
    named = [line for line in filled if "error" in line.lower()]
    return (named or filled or ["it printed nothing"])[-1][:300]


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: a reader may come at any time."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text)
    aside.replace(path)
