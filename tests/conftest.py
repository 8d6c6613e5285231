"""``--slow``: which tests with the mark ``slow`` are run, and what is remembered of them."""

import pytest

from tests import slow

LEFT_OUT = pytest.StashKey[int]()
PROPERTY = "rests on"
PASSED: dict[str, str] = {}  # slow test -> what it rested on


def pytest_addoption(parser):
    parser.addoption(
        "--slow",
        choices=("all", "changed", "whole"),
        default="all",
        help="slow tests: all (the default), those that rest on something that has changed since they passed, "
        "or all, to be remembered in tests/passed.txt if every test passes",
    )


def pytest_configure(config):
    config.stash[LEFT_OUT] = 0


def pytest_collection_modifyitems(config, items):
    if config.option.slow == "all":
        return
    known, left_out = slow.passed(), []
    for item in items:
        if item.get_closest_marker("slow"):
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
            digest = slow.digest(item.path, parameters)
            item.user_properties.append((PROPERTY, digest))
            if config.option.slow == "changed" and (digest, item.nodeid) in known:
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    config.stash[LEFT_OUT] = len(left_out)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.outcome == "passed":
        PASSED.update((report.nodeid, digest) for name, digest in report.user_properties if name == PROPERTY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """All workers collect alike, so one of them speaks for all."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("slow left out", 0)


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if hasattr(config, "workerinput"):
        config.workeroutput["slow left out"] = config.stash[LEFT_OUT]
    elif config.option.slow == "whole" and exitstatus == 0:
        slow.remember(PASSED)


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash[LEFT_OUT]
    if count:
        terminalreporter.write_line(f"{count} slow tests left out: nothing they rest on has changed since they passed")


@pytest.fixture(autouse=True, scope="session")
def _lanes_of_this_process(tmp_path_factory):
    """Runs are made in forks of the test's own process, so they are there at once and see what a test has replaced in it; their methods may
    write to the tests' folder. What users get is tested where it is asked for (tests/attacks, and every test that starts the command)."""
    from distillbench.runs import lanes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "START", "fork")
        patch.setenv("DISTILLBENCH_WRITABLE", str(tmp_path_factory.getbasetemp().parent))
        yield
