"""Named places in the code that a test can make fail, die or wait.

``TIDEGATE_FAILPOINTS`` arms them when the process starts, for instance ``step=kill@777;copy=fail/100``: the
process is killed by the first step that computes token 777, and every hundredth copy fails. An action is
``kill``, ``fail`` or ``wait:SECONDS``. Without the variable a place costs one look at ``ARMED``::

    if failpoints.ARMED:
        failpoints.reach("copy")
"""

import os
import re
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass

VARIABLE = "TIDEGATE_FAILPOINTS"
PLACES = ("step", "copy", "output")
"""A step of the model, a copy between the tiers, a request's output on its way through the front."""

_FORM = re.compile(
    r"(?P<place>\w+)=(?P<action>kill|fail|wait:(?P<seconds>[\d.]+))(@(?P<token>\d+))?(/(?P<every>\d+))?"
)


class Failpoint(RuntimeError):
    """What a place raises that is made to fail."""


@dataclass(slots=True)
class Fault:
    action: str
    seconds: float
    """For ``wait``."""
    token: int | None
    """Only where this token is among those that are handled."""
    every: int
    count: int = 0

    def strike(self, place: str, token_ids: Collection[int]) -> None:
        if self.token is not None and self.token not in token_ids:
            return
        self.count += 1
        if self.count % self.every:
            return
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fail":
                raise Failpoint(f"the failpoint {place!r} fails as told")
            case _:
                time.sleep(self.seconds)


def parse(text: str) -> dict[str, Fault]:
    """Raises ``ValueError`` for what is no failpoint."""
    faults = {}
    for item in filter(None, text.split(";")):
        found = _FORM.fullmatch(item)
        if found is None or found["place"] not in PLACES:
            raise ValueError(f"{VARIABLE}: {item!r} is no failpoint; places are {', '.join(PLACES)}")
        faults[found["place"]] = Fault(
            action=found["action"].partition(":")[0],
            seconds=float(found["seconds"] or 0),
            token=None if found["token"] is None else int(found["token"]),
            every=int(found["every"] or 1),
        )
    return faults


ARMED = parse(os.environ.get(VARIABLE, ""))


def reach(place: str, token_ids: Collection[int] = ()) -> None:
    """Do what the place is armed with, if anything."""
    if fault := ARMED.get(place):
        fault.strike(place, token_ids)
