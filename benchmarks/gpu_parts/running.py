"""Runs parts one after the other, each in its own processes and time, all of them within a budget.

What was measured is in report.json and report.md of the results' folder before and after every part.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts.findings import last_error, write_whole
from gpu_parts.report import as_markdown

OK, FAILED, TIMED_OUT, NOT_STARTED, INTERRUPTED = "ok", "failed", "timed out", "not started", "interrupted"
GRACE_SECONDS = 5.0  # between asking a part to stop and ending it
WORTH_STARTING_SECONDS = 10.0  # with less left a part could only be cut off
LOG_LINES = 25
REHEARSAL_PATIENCE = 10


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    command: arguments of Python; "--out FOLDER" is added, where the part writes NAME.json and NAME.md.
    expected: seconds on an H100. limit: seconds it may take. tiny: more arguments in a rehearsal.
    """

    name: str
    title: str
    command: str
    expected: float
    limit: float
    tiny: str = ""


@dataclass
class Record:
    """What is known of a part: how it ended, in how many seconds, and all that it found."""

    name: str
    title: str
    expected: float
    limit: float
    status: str = NOT_STARTED
    seconds: float = 0.0
    reason: str = ""
    command: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    markdown: str = ""
    log_tail: list[str] = field(default_factory=list)


@dataclass
class Suite:
    """A run of the suite.

    head: what the report says of the whole: device, versions, command. out: the report's folder. work: the
    parts' files and logs. python: the interpreter and the arguments that come before a part's own.
    """

    head: dict[str, Any]
    out: Path
    work: Path
    python: Sequence[str]
    environment: dict[str, str]
    folder: Path
    budget: float
    is_tiny: bool = False
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print
    records: list[Record] = field(default_factory=list)

    def run(
        self,
        parts: Sequence[Part],
        kept: dict[str, Record],
        started: float,
        only: Sequence[str] | None = None,
    ) -> bool:
        """Runs the parts but for those in `kept`; returns whether all that should run or were kept are ok.

        started: the clock's reading from which the budget counts. only: names of those to run, None for all.
        """
        self.records = [kept.get(part.name) or self._record(part) for part in parts]
        self.write()
        for part, record in zip(parts, self.records, strict=True):
            if part.name in kept:
                continue
            left = self.budget - (self.clock() - started)
            if only is not None and part.name not in only:
                record.reason = "left out by --only"
                continue
            if left < WORTH_STARTING_SECONDS:
                record.reason = f"the budget of {self.budget / 60:.3g} minutes was spent; --resume goes on"
            else:
                self.run_part(part, record, min(record.limit, left))
            self.say(f"{part.name}: {record.status} after {record.seconds:.0f} s {record.reason}".rstrip())
            self.write()
        self.write()
        return all(r.status == OK for r in self.records if only is None or r.name in (*only, *kept))

    def run_part(self, part: Part, record: Record, limit: float) -> None:
        """Runs one part to its end or the limit, seconds, and takes what it found into its record."""
        for suffix in (".json", ".md"):
            (self.work / part.name).with_suffix(suffix).unlink(missing_ok=True)  # of an earlier run
        more = part.tiny if self.is_tiny else ""
        arguments = [*part.command.split(), "--out", str(self.work), *more.split()]
        record.command = " ".join(["python", *arguments])
        record.status, record.reason = INTERRUPTED, "the suite was stopped while it ran"
        self.write()
        log = (self.work / part.name).with_suffix(".log")
        began = self.clock()
        try:
            ended = _run([*self.python, *arguments], self.environment, self.folder, limit, log)
        finally:
            record.seconds = self.clock() - began
            self._take_findings(part, record)
            self.write()
        tail = log.read_text(errors="replace").splitlines()
        record.status, record.reason = _verdict(ended, limit, tail, bool(record.result))
        record.log_tail = [] if record.status == OK else tail[-LOG_LINES:]

    def write(self) -> None:
        """The report as it stands."""
        self.out.mkdir(parents=True, exist_ok=True)
        records = [asdict(record) for record in self.records]
        tree = self.head | {"parts": records}
        write_whole(self.out / "report.json", json.dumps(tree, indent=1) + "\n")
        write_whole(self.out / "report.md", as_markdown(self.head, records))

    def _record(self, part: Part) -> Record:
        """Of a part that was not started. A rehearsal has more time: it shows that parts run, on any CPU."""
        limit = part.limit * (REHEARSAL_PATIENCE if self.is_tiny else 1)
        return Record(part.name, part.title, part.expected, limit)

    def _take_findings(self, part: Part, record: Record) -> None:
        stem = self.work / part.name
        if stem.with_suffix(".json").exists():
            record.result = json.loads(stem.with_suffix(".json").read_text())
        if stem.with_suffix(".md").exists():
            record.markdown = stem.with_suffix(".md").read_text()


def load_records(report: Path, identity: dict[str, Any]) -> dict[str, Record]:
    """The parts of an earlier report that were ok, if it is of this device, these versions, this commit."""
    try:
        tree = json.loads(report.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    if tree.get("identity") != identity:
        return {}
    return {record["name"]: Record(**record) for record in tree["parts"] if record["status"] == OK}


def _run(
    command: Sequence[str], environment: dict[str, str], folder: Path, limit: float, log: Path
) -> int | None:
    """The exit status of a command in a process group of its own, None if it did not end within `limit`.

    Nothing of the group outlives the call.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the process to stop, then ends it and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _verdict(ended: int | None, limit: float, tail: Sequence[str], found: bool) -> tuple[str, str]:
    """(status, why) of a part."""
    kept = "; what it found so far is kept" if found else ""
    if ended is None:
        return TIMED_OUT, f"it was not done after {limit:.0f} s{kept}"
    if ended:
        return FAILED, f"exit status {ended}: {last_error(tail)}{kept}"
    if not found:
        return FAILED, "it ended well and wrote no result"
    return OK, ""
