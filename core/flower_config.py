"""Flower's options: `celery -A core flower --conf=core/flower_config.py`. A name here is an option of Flower's; its command line wins.

The login comes from the environment: FLOWER_BASIC_AUTH=user:password, or the file that FLOWER_BASIC_AUTH_FILE names.
"""

from django.conf import settings
from flower.inspector import Inspector
from flower.views import BaseHandler
from tornado.options import options

from core import logs

if settings.FLOWER_BASIC_AUTH and not options.basic_auth:
    basic_auth = settings.FLOWER_BASIC_AUTH
elif not (options.basic_auth or options.auth):
    raise SystemExit("Flower needs a login: set FLOWER_BASIC_AUTH=user:password.")

# Its log looks like the others', not like tornado's.
logging = "none"
logs.configure(settings.LOGGING)

# A task revoked or terminated here would be votes lost after their 202.
read_only = True

# It asks one node only.
broker_api = settings.BROKER_API_URL.split(";")[0]

# How many tasks it remembers. Chosen: an hour or two of a quiet day, a minute of full load; about 60 MB.
max_tasks = 10_000

tasks_columns = "name,args,state,received,runtime,worker,uuid"

# It shows the queues that some worker consumes, and nobody consumes the dead letters.
BaseHandler.get_active_queue_names = lambda _: [*settings.VOTES_QUEUES, settings.DEAD_LETTER_QUEUE, settings.PERIODIC_QUEUE]

# Nor does it ask the workers for their settings: Celery hides SECRET_KEY in them, but not the broker's password.
Inspector.inspect_methods = tuple(method for method in Inspector.inspect_methods if method != "conf")
