"""A pytest plugin for the notebooks: what each costs in time and memory, and a limit on memory.

Loaded with `-p tests.notebook_cost`. A chapter may hold 3 GiB; the cell that takes it beyond fails.
Time is printed, and marked beyond 60 s, but cannot fail: it depends on who else uses the machine.
"""

from pathlib import Path

import psutil
import pytest

MEMORY = 3 * 2**30  # bytes
SECONDS = 60


def peak_memory(pid):
    """The most memory that process has held so far, in bytes, or what it holds now."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process(pid).memory_info().rss


def is_cell(item):
    return type(item).__name__ == "IPyNbCell"


def pytest_itemcollected(item):
    if not is_cell(item):
        return
    # The stored notebooks hold no images, so a new one has nothing to be compared with.
    if "image/svg+xml" not in item.parent.skip_compare:
        item.parent.skip_compare += ("image/svg+xml",)
    # nbval would trace the kernels too, which slows them and delays their first answer; what the
    # notebooks call, the unit tests cover by themselves.
    item.config.option.cov_source = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if is_cell(item) and (peak := peak_memory(item.parent.kernel.km.provisioner.pid)):
        item.user_properties.append(("peak", peak))
        if peak > MEMORY:
            pytest.fail(
                f"the notebook holds {peak / 2**30:.1f} GiB, more than {MEMORY / 2**30:.0f}"
            )
    return result


class Costs:
    """Collects the reports of all workers where the table is printed."""

    def __init__(self):
        self.seconds, self.peak = {}, {}

    def pytest_runtest_logreport(self, report):
        path = report.nodeid.split("::")[0]
        if not path.endswith(".ipynb"):
            return
        self.seconds[path] = self.seconds.get(path, 0) + report.duration
        for name, value in report.user_properties:
            if name == "peak":
                self.peak[path] = max(self.peak.get(path, 0), value)

    def pytest_terminal_summary(self, terminalreporter):
        if not self.seconds:
            return
        terminalreporter.section("time and memory of the chapters")
        terminalreporter.write_line(f"{'chapter':<40} {'seconds':>8} {'MiB':>6}")
        for path, seconds in sorted(self.seconds.items()):
            mark = f"  longer than {SECONDS} s" if seconds > SECONDS else ""
            peak = self.peak.get(path, 0) / 2**20
            terminalreporter.write_line(f"{Path(path).stem:<40} {seconds:8.1f} {peak:6.0f}{mark}")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        config.pluginmanager.register(Costs())
