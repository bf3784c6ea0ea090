"""The obvious designs, tuned as their users would: one Celery task per vote, and DRF on PostgreSQL with a counter or COUNT(*)."""
