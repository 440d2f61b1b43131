"""The tests in this directory need a GPU: they are collected only where HPTOOL_GPU_TESTS says on what to run them."""

import os

#: `cuda`, or `cpu` to try the tests themselves. `make gpu` makes the same checks without pytest.
DEVICE = os.environ.get("HPTOOL_GPU_TESTS")

collect_ignore_glob = [] if DEVICE in ("cuda", "cpu") else ["test_*.py"]
