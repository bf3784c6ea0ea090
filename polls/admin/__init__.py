"""Django's admin: polls, tallies, API clients, dead letters, suspicious addresses, pipeline. Never who voted what: votes have no page."""

from django.contrib import admin

from polls.admin import blocks, cases, clients, dead_letters, pipeline, polls

__all__ = ["blocks", "cases", "clients", "dead_letters", "pipeline", "polls"]

admin.site.site_header = admin.site.site_title = "Nexus"
admin.site.index_title = "Operator's desk"
