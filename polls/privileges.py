"""What the database lets web processes and workers do: no more than they need, so that whoever takes one over gets no further.

Both log in as roles of their own, which own nothing. `manage.py setup`, as the owner of the tables, gives them what stands here.
"""

from django.db import connection, transaction

_LOOK = "SELECT"
_ADD = "SELECT, INSERT"  # an identity's value is read back
_KEEP = "SELECT, INSERT, UPDATE"
_ALL = "SELECT, INSERT, UPDATE, DELETE"

# {table: (what web processes may do, what workers and beat may do)}. A table that is missing here is closed to both.
RIGHTS = {
    # Only drafts are ever deleted, by the function delete_draft. Of a poll that others made, the clock's jobs change their own columns.
    "polls": (
        _KEEP,
        "SELECT, UPDATE (opened_at, closed_at, finalised_at, network_secret_id, network_secret_since, voter_salt, holds_version)",
    ),
    "options": (_ALL, _LOOK),
    # What was done and decided is only ever added to.
    "journal": (_ADD, _ADD),
    "decisions": (_ADD, _ADD),
    # Rulings move votes, in web processes, too. Tallies only change.
    "votes": (_ALL, _ALL),
    "outcomes": (_ALL, _ALL),
    "tallies": (_KEEP, _KEEP),
    "network_counts": (_KEEP, _KEEP),
    "holds": (_KEEP, _KEEP),
    "comparisons": (_ALL, _ALL),
    # Looks are only ever added to. Who counts and who rules says what is shown.
    "looks": (_ADD, _ADD),
    "looked_at_sets": (_ADD, _ADD),
    "shown_results": (_KEEP, _KEEP),
    "suspicious_ips": ("SELECT, UPDATE", _KEEP),
    "blocks": (_ALL, "SELECT, DELETE"),
    "attempts": (_KEEP, "SELECT, DELETE"),
    "network_secrets": (_LOOK, _ALL),
    "voter_secrets": (_LOOK, _LOOK),
    "voter_codes": (_KEEP, "SELECT, UPDATE (sealed_label, label)"),
    "api_clients": (_ALL, _LOOK),
    # A bundle that was answered with 202: who takes it in can't take it out.
    "outbox": (_ADD, "SELECT, UPDATE, DELETE"),
    "moments": (_KEEP, _KEEP),
    "clocks": (_KEEP, _ALL),
    # Accounts. A worker makes the token of the mail about a forgotten password from the account, and ends tokens that have expired.
    "auth_user": (_ALL, _LOOK),
    "auth_user_groups": (_ALL, _LOOK),
    "auth_user_user_permissions": (_ALL, _LOOK),
    "auth_group": (_ALL, _LOOK),
    "auth_group_permissions": (_ALL, _LOOK),
    "auth_permission": (_LOOK, _LOOK),
    "token_blacklist_outstandingtoken": (_ALL, "SELECT, DELETE"),
    "token_blacklist_blacklistedtoken": (_ALL, "SELECT, DELETE"),
    "django_session": (_ALL, ""),
    "django_admin_log": ("SELECT, INSERT, DELETE", ""),  # DELETE: Django deletes an account's entries with it
    "django_content_type": (_LOOK, _LOOK),
    "django_migrations": (_LOOK, _LOOK),
    # The schedule: pages of the admin change it, beat keeps it.
    "django_celery_beat_periodictask": (_ALL, _ALL),
    "django_celery_beat_periodictasks": (_KEEP, _KEEP),
    "django_celery_beat_intervalschedule": (_ALL, _ALL),
    "django_celery_beat_crontabschedule": (_ALL, _ALL),
    "django_celery_beat_solarschedule": (_ALL, _ALL),
    "django_celery_beat_clockedschedule": (_ALL, _ALL),
}


def grant(web: str, worker: str) -> None:
    """Give both roles what stands above, and nothing else in this database; an empty name: nobody has that role.

    One transaction. Repeatable, and needed after each migration. Raises django.db.ProgrammingError where there is no such role.
    """
    quoted = connection.ops.quote_name
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # which PostgreSQL 14 and older had given
        cursor.execute("REVOKE EXECUTE ON FUNCTION delete_draft(uuid) FROM PUBLIC")
        for role, which in ((web, 0), (worker, 1)):
            if not role:
                continue
            cursor.execute(f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {quoted(role)}")
            cursor.execute(f"REVOKE ALL ON FUNCTION delete_draft(uuid) FROM {quoted(role)}")
            for table, rights in RIGHTS.items():
                if rights[which]:
                    cursor.execute(f"GRANT {rights[which]} ON {quoted(table)} TO {quoted(role)}")
        if web:
            cursor.execute(f"GRANT EXECUTE ON FUNCTION delete_draft(uuid) TO {quoted(web)}")
