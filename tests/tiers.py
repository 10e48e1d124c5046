"""Which of a test's cases belong to the full tier."""

import pytest

GRAPH_IN_FULL = [pytest.param("graph", marks=pytest.mark.full), "pynative"]  # where compiling takes longest
