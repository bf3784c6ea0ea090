"""Faults under load: does every 202 count exactly once? `make chaos` runs it; docs/reliability.md has what came out.

scenarios (what goes wrong, when) -> faults (how) -> stage (the product, running) <- clients (a crowd that notes all it does)
                                                 -> oracle (judges the tables by those notes, and knows nothing of the product)
"""
