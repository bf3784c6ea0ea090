"""The Django project: settings, URLs, the ASGI door, Celery's app. Nobody imports it but Django, Celery and uvicorn."""

from core.celery import app as celery

__all__ = ["celery"]
