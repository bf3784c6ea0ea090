"""From a fresh clone to a running pipeline on one machine, for development, demonstration, tests and benchmarks.

    python -m stack up              everything, in the foreground, with one merged log (`make up`)
    python -m stack down | reset    stop it | stop it and forget its data
    python -m stack run -- CMD      CMD with a PostgreSQL and a RabbitMQ in its environment

The listing, from the bottom up: folder (what a stack keeps on disk) -> program (what a supervised program is) -> postgres,
rabbitmq (the servers), product (web, workers, beat, Flower) -> supervisor (keeps programs running) -> stack -> up, __main__.
It is no part of what runs in production: see compose.yaml for that.
"""

from stack.folder import StackError
from stack.program import Program
from stack.stack import Stack

__all__ = ["Program", "Stack", "StackError"]
