"""Tests draw without a window, and are not timed against the clock of a busy machine."""

import os

import hypothesis
import matplotlib

matplotlib.use("agg")  # not by MPLBACKEND, which the notebooks' kernels would inherit
hypothesis.settings.register_profile("book", deadline=None)
hypothesis.settings.load_profile("book")

# Where one of these is set, pytest compares what differs line by line before it reports. For two
# lists of some thousand numbers that takes hours, also in a test that expects them to differ.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)

# Programs, not tests: they made the reference data, with packages that the lock does not hold, and
# they measure speed.
collect_ignore = ["data", "bench"]
