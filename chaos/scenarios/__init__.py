"""The scenarios, a file for each thing that fails."""

from chaos.scenario import ALL
from chaos.scenarios import broker, clocks, cluster, database, everything, messages, network, processes

__all__ = ["ALL", "LONG", "SHORT", "broker", "clocks", "cluster", "database", "everything", "messages", "network", "processes"]

# What CI runs: under two minutes.
SHORT = ("everything-dies",)
LONG = "long-run"
