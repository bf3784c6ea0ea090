"""Loaded before the settings: gives this test run queues of its own, so that it can share a broker with anything else."""

import os

os.environ["METRICS_PORT"] = "0"  # else all processes of the tests would share it
os.environ["QUEUE_PREFIX"] = f"test-{os.getpid()}."
