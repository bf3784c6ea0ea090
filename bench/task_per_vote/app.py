"""Its Celery app and its WSGI application."""

import os

from celery import Celery
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bench.task_per_vote.settings")
app = Celery("task_per_vote")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.set_default()
app.autodiscover_tasks(["bench.task_per_vote"])
application = get_wsgi_application()
