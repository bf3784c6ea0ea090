"""Loaded before the settings: gives this test run queues of its own, so that it can share a broker with anything else."""

import os

os.environ["QUEUE_PREFIX"] = f"test-{os.getpid()}."
