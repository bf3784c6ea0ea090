#!/bin/sh
# Makes the logins of web processes and of workers; `manage.py setup` gives them their rights (WEB_DATABASE_ROLE=nexus_web,
# WORKER_DATABASE_ROLE=nexus_worker). In the postgres image: mount it into /docker-entrypoint-initdb.d/, where it runs once, when the
# database is made. Elsewhere, run it as PostgreSQL's administrator. Repeatable: a login that is there gets the password.
#
# The passwords: POSTGRES_WEB_PASSWORD and POSTGRES_WORKER_PASSWORD, or files that ..._FILE name.
set -eu

password() {
    file=$(printenv "$1_FILE" || true)
    if [ -n "$file" ]; then cat "$file"; else printenv "$1" || { echo "Set $1 or $1_FILE." >&2; exit 1; }; fi
}
WEB=$(password POSTGRES_WEB_PASSWORD)
WORKER=$(password POSTGRES_WORKER_PASSWORD)
export WEB WORKER

# By psql's own variables: on its command line others would read them.
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname "${POSTGRES_DB:-postgres}" <<'SQL'
\set web `printenv WEB`
\set worker `printenv WORKER`
SELECT format('CREATE ROLE %I LOGIN', name) FROM unnest(ARRAY['nexus_web', 'nexus_worker']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
ALTER ROLE nexus_web PASSWORD :'web';
ALTER ROLE nexus_worker PASSWORD :'worker';
SQL
