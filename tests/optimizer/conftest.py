import pytest

from craft_opt.optimizer import _optimizer


@pytest.fixture(params=["numba", "torch"], autouse=True)
def cpu_backend(request, monkeypatch):
    """Every test of this room runs on both backends that ``auto`` may choose on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(_optimizer, "numba_is_available", lambda: False)
    return request.param
