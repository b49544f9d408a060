"""The whole campaign, with its table: ``pytest -m slow tests/faults -s``, the same as ``python -m tests.faults``."""

import pytest

from tests.faults.__main__ import main


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_fault_has_a_silent_outcome():
    assert main([]) == 0
