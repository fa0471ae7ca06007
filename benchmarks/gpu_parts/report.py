"""The suite's report in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_parts.findings import markdown_table

REHEARSAL = (
    "**This is a rehearsal on a CPU with tiny sizes: it shows that the suite runs. No figure below says "
    "anything about a GPU.**"
)


def as_markdown(head: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """What failed first, then the targets, then all that was measured."""
    lines = [f"# GPU suite: {head['device']}", ""]
    if head["rehearsal"]:
        lines += [REHEARSAL, ""]
    lines += [f"    {head['command']}", "", _verdict(records), ""]
    lines += [f"{head['started']}; " + ", ".join(f"{k} {v}" for k, v in head["identity"].items()), ""]
    lines += markdown_table([_summary(record) for record in records])
    claims = [
        {"part": record["name"], "claim": c["what"], "measured": c["measured"], "target": c["target"]}
        | {"": "met" if c["holds"] else "**missed**"}
        for record in records
        for c in record["result"].get("claims", [])
    ]
    if claims:
        lines += ["", "## Targets", "", *markdown_table(claims)]
    for record in records:
        if record["markdown"] or record["log_tail"]:
            lines += ["", f"## {record['title']}", "", *_section(record)]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(records: Sequence[dict[str, Any]]) -> str:
    wrong = [record for record in records if record["status"] != "ok"]
    if not wrong:
        return f"All {len(records)} parts are ok."
    names = ", ".join(f"{record['name']} ({record['status']})" for record in wrong)
    return f"**{len(records) - len(wrong)} of {len(records)} parts are ok.** Not ok: {names}."


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "part": record["name"],
        "what": record["title"],
        "status": record["status"] if record["status"] == "ok" else f"**{record['status']}**",
        "seconds": f"{record['seconds']:.0f}",
        "expected": f"{record['expected']:.0f}",
        "limit": f"{record['limit']:.0f}",
        "why": record["reason"],
    }


def _section(record: dict[str, Any]) -> list[str]:
    """The part's own Markdown under its title, and the end of its log where it failed."""
    lines = record["markdown"].splitlines()
    if lines and lines[0].startswith("# "):
        lines = lines[1:]
    lines = [f"##{line}" if line.startswith("#") else line for line in lines]
    if record["log_tail"]:
        lines += ["", "The end of its log:", "", "```", *record["log_tail"], "```"]
    return "\n".join(lines).strip("\n").splitlines()
