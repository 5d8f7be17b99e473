"""Tests draw without a window, and are not timed against the clock of a busy machine."""

import hypothesis
import matplotlib

matplotlib.use("agg")  # not by MPLBACKEND, which the notebooks' kernels would inherit
hypothesis.settings.register_profile("book", deadline=None)
hypothesis.settings.load_profile("book")

# Programs, not tests: they made the reference data, with packages that the lock does not hold, and
# they measure speed.
collect_ignore = ["data", "bench"]
