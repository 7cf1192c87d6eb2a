"""A server for other people's clients, and a table at the end that says which of them can do what."""

from collections.abc import Iterator

import pytest
from served import Served, served

_outcomes: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the demo model, on a port of its own beside the socket."""
    with served(tmp_path_factory.mktemp("server"), "demo", "--listen", "127.0.0.1:0") as server:
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.failed:
        client = item.path.stem.removeprefix("test_")
        feature = item.name.partition("[")[2].rstrip("]") or item.name.removeprefix("test_")
        _outcomes.setdefault(client, {})[feature] = report.outcome
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for client, features in _outcomes.items():
        terminalreporter.section(f"client: {client}")
        for feature, outcome in features.items():
            terminalreporter.line(f"{feature:40} {outcome}")
