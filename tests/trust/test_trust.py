"""What `build.py fuzz` and `build.py faults` do at length, in short and with fixed seeds."""

import sys

import pytest

from tests.trust.faults import FAULTS, faults
from tests.trust.fuzz import fuzz

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_twenty_thousand_hostile_messages_are_answered_and_hurt_nobody():
    result = fuzz(20_000, seed=7)
    print(result["figures"])
    # how long a healthy client waits beside other tests says nothing: the long run looks at it on a quiet machine
    assert [failure for failure in result["failures"] if "pings took" not in failure] == []
    assert result["figures"]["messages"] >= 20_000 and len(result["figures"]["codes"]) > 10


@linux
def test_twenty_faults_lose_no_job():
    kinds, problems = faults(20, seed=7, stall=3.0)
    assert problems == []
    assert sum(kinds.values()) == 20 and len(kinds) >= len(FAULTS) - 1  # without a disk of its own none can be filled
