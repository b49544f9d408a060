"""The bridge's small world: two datasets, a teacher, its anchor cache."""

from tests.bridge.conftest import world

__all__ = ["world"]
