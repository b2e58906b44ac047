"""The processes that all tests of this folder share."""

import pytest
from rank_processes import RankProcesses


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    processes = RankProcesses(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.stop()
