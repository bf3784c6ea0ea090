from django.db import migrations, models
from django.db.models import Value

# The clock that judges is PostgreSQL's: an edit that waited for something is judged by when it is written, too (editing.py judges by
# when it came in). Options may be added for all that this knows: a poll is made open, and they after it.
# What says that a poll has opened can't be taken back either: else who may write the row would do so, change the terms, and undo it.
# Judged by the row as it was. `opened_at` may still go: the two other moments stay, and say it as well.
# Functions that read a table say in which schema: else a temporary table would be read for it.
_KEEP = """
    CREATE FUNCTION open_polls_keep_their_terms() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        has_opened constant boolean :=
            OLD.opened_at IS NOT NULL OR (OLD.published_at IS NOT NULL AND OLD.opens_at <= clock_timestamp());
    BEGIN
        IF NOT NEW.errata @> OLD.errata
           OR (has_opened
               AND (NEW.published_at IS NULL
                    OR NEW.results_step < OLD.results_step
                    OR (NEW.opens_at, NEW.title, NEW.description, NEW.method, NEW.min_choices, NEW.max_choices,
                        NEW.voter_policy, NEW.allow_change, NEW.allow_withdrawal)
                       IS DISTINCT FROM
                       (OLD.opens_at, OLD.title, OLD.description, OLD.method, OLD.min_choices, OLD.max_choices,
                        OLD.voter_policy, OLD.allow_change, OLD.allow_withdrawal)))
           OR (has_opened AND OLD.results_visibility = 'sealed'
               AND ((OLD.closes_at > clock_timestamp() AND NEW.results_visibility <> 'sealed')
                    OR (OLD.closes_at <= clock_timestamp() AND NEW.closes_at > OLD.closes_at))) THEN
            RAISE EXCEPTION 'a poll that has opened keeps its texts, its rules, its errata, and its seal'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'open_polls_keep_their_terms';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER open_polls_keep_their_terms
    BEFORE UPDATE OF title, description, method, min_choices, max_choices, voter_policy, allow_change, allow_withdrawal,
                     results_visibility, results_step, published_at, opens_at, closes_at, errata ON polls
    FOR EACH ROW EXECUTE FUNCTION open_polls_keep_their_terms();

    CREATE FUNCTION open_polls_keep_their_options() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
    BEGIN
        IF EXISTS (SELECT FROM polls WHERE id = OLD.poll_id
                   AND (opened_at IS NOT NULL OR (published_at IS NOT NULL AND opens_at <= clock_timestamp()))) THEN
            RAISE EXCEPTION 'a poll that has opened keeps its options'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'open_polls_keep_their_terms';
        END IF;
        RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
    END $$;
    CREATE TRIGGER open_polls_keep_their_options BEFORE UPDATE OR DELETE ON options
    FOR EACH ROW EXECUTE FUNCTION open_polls_keep_their_options();
"""
_FORGET = """
    DROP TRIGGER open_polls_keep_their_options ON options;
    DROP FUNCTION open_polls_keep_their_options();
    DROP TRIGGER open_polls_keep_their_terms ON polls;
    DROP FUNCTION open_polls_keep_their_terms();
"""


class Migration(migrations.Migration):
    dependencies = [("polls", "0018_sealed_results")]

    operations = [
        migrations.AddField(
            model_name="poll",
            name="errata",
            field=models.JSONField(db_default=Value([], models.JSONField()), default=list, editable=False),
        ),
        migrations.RunSQL(_KEEP, _FORGET),
    ]
