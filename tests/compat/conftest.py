"""A server for other people's clients, and the table of what each of them can do with it."""

from collections.abc import Iterator

import pytest
from compat_table import Table
from served import Served, served

STEP = "step=wait:0.01"
"""A long answer takes twenty seconds: there is time to leave in the middle of it."""

table = Table()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the demo model, on a port of its own beside the socket.

    In float32 an answer does not depend on what else is computed, to the last bit.
    """
    folder = tmp_path_factory.mktemp("server")
    with served(folder, "demo", "--dtype", "float32", "--listen", "127.0.0.1:0", failpoints=STEP) as server:
        yield server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-table",
        action="store_true",
        help="fail unless the table's rows are those that the README promises, and all of them work",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        for client, feature in rows_of(item):
            table.note(client, feature.replace("_", " "), report.outcome)
    return report


def rows_of(item: pytest.Item) -> Iterator[tuple[str, str]]:
    """A test shows its parameter ``feature``, or what its marks say; the client is its module's."""
    client = item.path.stem.removeprefix("test_")
    if isinstance(item, pytest.Function) and "feature" in item.fixturenames:
        yield client, item.callspec.params["feature"]
    for mark in item.iter_markers("feature"):
        yield mark.kwargs.get("client", client), mark.args[0]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--whole-table", default=False):
        table.compare()
        if table.has_faults and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := list(table.lines()):
        terminalreporter.section("what other people's clients can do")
        terminalreporter.write("\n".join(lines) + "\n")
