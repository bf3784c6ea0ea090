from django.db import migrations

_KEEP = """
    CREATE FUNCTION decisions_are_only_added() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'a decision is never changed or deleted';
    END $$;
    CREATE TRIGGER decisions_are_only_added BEFORE UPDATE OR DELETE OR TRUNCATE ON decisions
    FOR EACH STATEMENT EXECUTE FUNCTION decisions_are_only_added();
"""
_FORGET = """
    DROP TRIGGER decisions_are_only_added ON decisions;
    DROP FUNCTION decisions_are_only_added();
"""


class Migration(migrations.Migration):
    dependencies = [("polls", "0007_suspicious_addresses")]

    operations = [migrations.RunSQL(_KEEP, _FORGET)]
