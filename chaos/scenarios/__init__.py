"""The scenarios, a file for each thing that fails."""

from chaos.scenario import ALL

# Each adds its own to ALL.
from chaos.scenarios import broker, clocks, cluster, database, everything, hosts, messages, network, processes, restores, upgrades  # noqa: F401

__all__ = ["ALL", "LONG", "SHORT"]

# What CI runs: under two minutes.
SHORT = ("everything-dies",)
LONG = "long-run"
