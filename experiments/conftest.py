"""Makes the modules importable, and runs this folder's tests in a second process.

If a run of pytest selects tests in this folder and elsewhere, and has no options but -q and -v,
those of this folder run in a process of their own, at the same time as the others. The first
process reports their results at the end. This saves nearly half the time on two cores.
"""
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import runtime.testing           # noqa: E402, F401 (one thread, no gradients, Hypothesis's profile)

REPORTS = "LORC_TEST_REPORTS"       # environment variable: the file that reports are written to


class SecondProcess:
    """Started by the first process: runs the tests `ids`, whose results it reports in their turn."""

    def __init__(self, config, ids):
        self.config, self.ids, self.folder = config, ids, tempfile.TemporaryDirectory()
        self.output, self.reports = Path(self.folder.name, "out"), Path(self.folder.name, "reports")
        self.reports.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   f"--rootdir={config.rootpath}", *ids]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                command, cwd=config.rootpath, env=os.environ | {REPORTS: str(self.reports)},
                stdout=output, stderr=subprocess.STDOUT)

    @functools.cached_property
    def results(self):
        """{id of a test: its reports (setup, call, teardown)}, once the process has ended."""
        self.process.wait()
        found = {}
        with open(self.reports, "rb") as file:
            while file.peek(1):
                report = self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=pickle.load(file))
                found.setdefault(report.nodeid, []).append(report)
        return found

    def pytest_runtest_protocol(self, item):
        """Report a test of the second process. A test that it did not finish has failed."""
        if item.nodeid not in self.ids:
            return None                                        # pytest runs it in this process
        reports = self.results.get(item.nodeid, [])
        if not reports or reports[-1].when != "teardown":
            said = "The second process did not finish this test.\n" + self.output.read_text()
            reports = [pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")]
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self):
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


class Recorder:
    """In the second process: writes each report to the file that the first one reads."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(os.environ[REPORTS], "ab") as file:
            pickle.dump(data, file)


def pytest_configure(config):
    if REPORTS in os.environ:
        config.pluginmanager.register(Recorder(config))


def pytest_collection_modifyitems(config, items):
    """Start the second process, unless the command has options that it would have to know."""
    items.sort(key=lambda item: HERE in item.path.parents)                  # this folder's are last
    ids = [item.nodeid for item in items if HERE in item.path.parents]
    options = {arg for arg in map(str, config.invocation_params.args) if arg.startswith("-")}
    if 0 < len(ids) < len(items) and options <= {"-q", "-v"}:
        config.pluginmanager.register(SecondProcess(config, ids))
