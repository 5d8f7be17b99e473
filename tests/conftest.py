"""Tests draw without a window, and are not timed against the clock of a busy machine."""

import hypothesis
import matplotlib

matplotlib.use("agg")  # not by MPLBACKEND, which the notebooks' kernels would inherit
hypothesis.settings.register_profile("book", deadline=None)
hypothesis.settings.load_profile("book")
