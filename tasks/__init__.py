"""Celery's way in: votes (started by a bundle) and periodic jobs (started by the clock)."""
