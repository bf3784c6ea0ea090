"""Django's entry for the domain."""

from django.apps import AppConfig


class PollsConfig(AppConfig):
    name = "polls"
