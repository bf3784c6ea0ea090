from django.db import migrations

# With its owner's rights: a web process needs none to delete polls, journals or tallies (privileges.py).
_ADD = """
    CREATE FUNCTION delete_draft(draft uuid) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
        PERFORM FROM polls WHERE id = draft AND published_at IS NULL AND archived_at IS NULL FOR UPDATE;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        DELETE FROM holds WHERE poll_id = draft;
        UPDATE blocks SET case_id = NULL WHERE case_id IN (SELECT id FROM suspicious_ips WHERE poll_id = draft);
        DELETE FROM suspicious_ips WHERE poll_id = draft;
        DELETE FROM comparisons WHERE poll_id = draft;
        DELETE FROM tallies WHERE poll_id = draft;
        DELETE FROM voter_codes WHERE poll_id = draft;
        DELETE FROM api_clients WHERE poll_id = draft;
        DELETE FROM journal WHERE poll_id = draft;
        DELETE FROM options WHERE poll_id = draft;
        DELETE FROM polls WHERE id = draft;
        RETURN true;
    END $$;
"""


class Migration(migrations.Migration):
    dependencies = [("polls", "0011_moments")]

    operations = [migrations.RunSQL(_ADD, "DROP FUNCTION delete_draft(uuid)")]
