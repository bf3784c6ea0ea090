"""Limits per address and subnet, as the API looks at them before it accepts a vote. Counting has the last word."""

from collections.abc import Sequence
from uuid import UUID

from django.db import connection

from polls.models import Reason

# Poll id, voter key, address key, subnet key.
Arrival = tuple[UUID, UUID, UUID, UUID]

# Whoever has been let in may repeat and change their vote.
_REACHED = """
    SELECT q.poll_id, q.voter_key, q.address_key, q.subnet_key,
           CASE WHEN address.voters >= p.address_limit THEN 'address_limit' ELSE 'subnet_limit' END
    FROM unnest(%s::uuid[], %s::uuid[], %s::uuid[], %s::uuid[]) AS q (poll_id, voter_key, address_key, subnet_key)
    JOIN polls p ON p.id = q.poll_id
    LEFT JOIN network_counts address ON (address.poll_id, address.network_key) = (q.poll_id, q.address_key)
    LEFT JOIN network_counts subnet ON (subnet.poll_id, subnet.network_key) = (q.poll_id, q.subnet_key)
    WHERE (address.voters >= p.address_limit OR subnet.voters >= p.subnet_limit)
      AND NOT EXISTS (SELECT FROM votes v WHERE (v.poll_id, v.voter_key) = (q.poll_id, q.voter_key))
      AND NOT EXISTS (SELECT FROM outcomes o WHERE (o.poll_id, o.voter_key) = (q.poll_id, q.voter_key)
                      AND o.reason NOT IN ('address_limit', 'subnet_limit'))
"""


def find_reached(arrivals: Sequence[Arrival]) -> dict[Arrival, Reason]:
    """Return the arrivals that a limit of their poll keeps out, by what has been counted so far."""
    with connection.cursor() as cursor:
        cursor.execute(_REACHED, [list(column) for column in zip(*arrivals, strict=True)])
        return {tuple(arrival): Reason(reason) for *arrival, reason in cursor}  # type: ignore[misc]
