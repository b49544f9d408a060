"""The kernel's checks under Triton's interpreter: test_interpreter.py runs this file in a process of its own.

The interpreter must be chosen before triton is imported, and it cannot be undone: hence no name that pytest collects.
"""

import pytest

from tests.kernels.checks import *  # noqa: F403
from tests.kernels.problems import Form

pytestmark = [
    # The interpreter turns one-element arrays into numbers in a way that numpy deprecates, once per operation.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    # The coefficients of a step that is skipped for NaN or inf are computed with NaN and inf, as on a GPU.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture
def device():
    return "cpu"


# Programs run one after another there, so the barrier of the one-kernel form is met at grid 1 only.
@pytest.fixture(params=[Form(True, 1), Form(False, 1), Form(False, 3)], ids=str)
def form(request):
    return request.param
