"""PostgreSQL as Django knows it, but for the connection."""

from typing import Any, NoReturn

from django.db import OperationalError
from django.db.backends.postgresql import base, client

from core import installation


class DatabaseClient(client.DatabaseClient):
    @classmethod
    def settings_to_cmd_args_env(cls, *_: Any) -> NoReturn:
        raise OperationalError(installation.NOT_NAMED)


class DatabaseWrapper(base.DatabaseWrapper):
    client_class = DatabaseClient

    def get_new_connection(self, conn_params: dict[str, Any]) -> NoReturn:
        raise OperationalError(installation.NOT_NAMED)
