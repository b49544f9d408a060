"""What every test process does first."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported, here and in whatever a test starts: processes side by side share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
