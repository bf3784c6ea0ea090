"""Hosts: whether a request calls the service by one of its names (ALLOWED_HOSTS), as Django's views see it, for the hot routes."""

from django.conf import settings
from django.http.request import split_domain_port, validate_host

# As they were sent, which is what most clients send each time. Chosen: names with and without port and capitals; "*" takes any.
MAX_ACCEPTED = 1000
accepted: set[bytes] = set()


def is_ours(host: bytes) -> bool:
    """Return whether this is a name of ours. One that is gets remembered, for whoever looks into `accepted` first."""
    domain, _ = split_domain_port(host.decode("latin-1"))
    if not (domain and validate_host(domain, settings.ALLOWED_HOSTS)):
        return False
    if len(accepted) < MAX_ACCEPTED and len(host) < 300:  # a longer one is no name
        accepted.add(host)
    return True
