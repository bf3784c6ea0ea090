"""Prepared statements: what every bundle runs is planned once per connection; to plan it each time takes as long as to run it."""

from collections.abc import Sequence
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from django.db import connection
from django.db.backends.utils import CursorWrapper
from psycopg2 import extensions

# {connection: names of the statements that it knows}. PostgreSQL forgets them with the connection, and so do we.
_known: WeakKeyDictionary[extensions.connection, set[str]] = WeakKeyDictionary()


class Prepared:
    """A statement with a name; each `%s` in it stands for an argument and says of which type: `%s::uuid[]`."""

    def __init__(self, name: str, statement: str) -> None:
        numbers, parts = count(1), statement.split("%s")
        self.name = name
        self.preparation = f"PREPARE {name} AS {parts[0]}" + "".join(f"${next(numbers)}{part}" for part in parts[1:])
        self.execution = f"EXECUTE {name} ({', '.join(['%s'] * (len(parts) - 1))})"


def execute(cursor: CursorWrapper, *steps: tuple[Prepared, Sequence[Any]]) -> None:
    """Run statements with their arguments, one after the other, in one round trip; the rows of the last are the cursor's."""
    known = _known.setdefault(connection.connection, set())
    unknown = [statement for statement, _ in steps if statement.name not in known]
    # Whether they are executed without an error or not: PostgreSQL keeps them even when the transaction is rolled back.
    known.update(statement.name for statement in unknown)
    words = [statement.preparation for statement in unknown] + [statement.execution for statement, _ in steps]
    cursor.execute("; ".join(words), [argument for _, arguments in steps for argument in arguments])
