from django.db import migrations

# A draft goes with its journal (delete_draft), unless an entry says that it was more than that; nothing else ever leaves it.
_KEEP = """
    CREATE FUNCTION journal_is_only_added() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
    BEGIN
        IF TG_OP = 'DELETE' THEN
            IF coalesce(OLD.changes #>> '{status,1}', 'draft') = 'draft'
               AND EXISTS (SELECT FROM polls WHERE id = OLD.poll_id AND published_at IS NULL AND archived_at IS NULL) THEN
                RETURN OLD;
            END IF;
        END IF;
        RAISE EXCEPTION 'an entry of the journal is never changed or deleted';
    END $$;
    CREATE TRIGGER journal_is_only_added BEFORE UPDATE OR DELETE ON journal
    FOR EACH ROW EXECUTE FUNCTION journal_is_only_added();
    CREATE TRIGGER journal_is_never_emptied BEFORE TRUNCATE ON journal
    FOR EACH STATEMENT EXECUTE FUNCTION journal_is_only_added();
"""
_FORGET = """
    DROP TRIGGER journal_is_never_emptied ON journal;
    DROP TRIGGER journal_is_only_added ON journal;
    DROP FUNCTION journal_is_only_added();
"""


class Migration(migrations.Migration):
    dependencies = [("polls", "0019_frozen_texts_and_errata")]

    operations = [migrations.RunSQL(_KEEP, _FORGET)]
