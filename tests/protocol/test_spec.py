"""SPEC.md says what the code does: limits, messages, error codes."""

import re
from pathlib import Path

from backend.jobs import MOST_QUEUED
from backend.server import Server
from protocol import messages

ROOT = Path(__file__).parents[2]
SPEC = (ROOT / "protocol" / "SPEC.md").read_text(encoding="utf-8")


def test_the_limits_are_those_of_the_code():
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", SPEC, re.MULTILINE))
    assert {name: int(value.replace(",", "")) for name, value in table.items()} == messages.limits()
    assert f"{MOST_QUEUED:,} | queued jobs" in SPEC
    assert f"version {messages.PROTOCOL[0]}.{messages.PROTOCOL[1]}" in SPEC.splitlines()[0]


def test_every_message_is_described():
    described = set(re.findall(r"^    ([\w.]+) +\{", SPEC, re.MULTILINE)) | set(re.findall(r'type: "(\w+)"', SPEC))
    assert set(Server._REQUESTS) | set(Server._UNANSWERED) | {"hello", "event", "error", "reply"} <= described


def test_every_error_code_is_listed():
    listed = set(re.findall(r"`([a-z-]+)`", SPEC))
    for path in [*ROOT.glob("protocol/*.py"), *ROOT.glob("backend/*.py")]:
        if path.name != "cli.py":  # what the command line alone can say
            raised = set(re.findall(r'KilnError\(\s*"([a-z-]+)"', path.read_text(encoding="utf-8")))
            assert raised <= listed, f"{path.name}: {raised - listed}"
