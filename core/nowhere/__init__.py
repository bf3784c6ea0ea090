"""The database where none is named: what needs no database works, all else ends with a sentence and never asks a stranger's server."""
