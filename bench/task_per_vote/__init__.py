"""The obvious design, tuned as its users would run it: a DRF view that publishes one Celery task per vote."""
