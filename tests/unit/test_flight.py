"""The memory that an engine shares with its front."""

import os
import subprocess
import sys

from tidegate.engine.flight import FlightRecorder, new_memory
from tidegate.engine.messages import Place

A, B, C = Place("r1", 0, 0, 512), Place("r2", 1, 7, 8), Place("r3", 0, 9, 10)


def test_what_was_launched_is_executing_until_it_has_landed() -> None:
    recorder = FlightRecorder()
    assert recorder.executing() == []
    recorder.launched(1, [A, B])
    recorder.launched(2, [C])
    assert sorted(recorder.executing()) == [A, B, C]
    recorder.landed(1)
    assert recorder.executing() == [C]
    recorder.launched(3, [B])
    assert sorted(recorder.executing()) == [B, C]
    recorder.landed(2)
    recorder.landed(3)
    assert recorder.executing() == []


def test_the_largest_step_fits() -> None:
    recorder = FlightRecorder()
    places = [Place(f"r{10**12 + index}", 63, 2**30, 2**30 + 1) for index in range(4096)]
    recorder.launched(1, places)
    recorder.launched(2, places)
    assert recorder.executing() == places * 2


def test_the_other_end_reads_what_a_killed_process_wrote() -> None:
    memory = new_memory()
    reader = FlightRecorder(memory)
    code = f"""
import os, signal
from tidegate.engine.flight import FlightRecorder
from tidegate.engine.messages import Place
recorder = FlightRecorder({memory})
recorder.beat()
recorder.beat()
recorder.launched(5, [Place("r1", 0, 0, 512)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-P", "-c", code], pass_fds=(memory,), check=False)
    os.close(memory)
    assert reader.beats == 2
    assert reader.executing() == [A]
