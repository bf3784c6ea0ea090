"""The mails, and how a web process has one sent without waiting long for the broker."""

from typing import Any

from amqp.exceptions import AMQPError
from celery import current_app, shared_task
from kombu.exceptions import KombuError

from polls import accounts, problems

# Seconds; for opening the connection, for each of the broker's answers and for the confirm.
PATIENCE_SECONDS = 2


# Only ids: task arguments are shown by Flower, so a token is made where it is sent.
@shared_task(name="mail.password_reset")
def mail_password_resets(user_ids: list[int]) -> None:
    for user_id in user_ids:
        accounts.mail_password_reset(user_id)


def order_password_resets(user_ids: list[int]) -> None:
    """Have the mails sent; ordered even for nobody, so that neither the time nor a refusal tells whether there is an account.

    Raises Refusal when the broker did not confirm in time; the mails may be sent all the same.
    """
    options = {"confirm_publish": True, "max_retries": 1, "interval_start": 0, "read_timeout": PATIENCE_SECONDS}
    connection = current_app.connection_for_write(connect_timeout=PATIENCE_SECONDS, transport_options=options)
    bounds = {"retry": False, "mandatory": True, "confirm_timeout": PATIENCE_SECONDS, "timeout": PATIENCE_SECONDS}
    how: dict[str, Any] = {"connection": connection, **bounds}  # a dict, since the types of celery know none of these
    try:
        mail_password_resets.apply_async((user_ids,), **how)
    except (AMQPError, KombuError, OSError) as exc:
        raise problems.UNAVAILABLE.says("No mail can be sent right now. Try again.", headers={"Retry-After": "5"}) from exc
    finally:
        connection.collect()  # a polite goodbye would wait for the answer of a broker that is stuck
