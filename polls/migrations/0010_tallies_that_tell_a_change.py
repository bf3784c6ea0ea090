"""Let a tally tell when somebody else than counting has changed it."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("polls", "0009_review_desk")]

    operations = [
        # A default of the database's, for workers of before: what they add is taken for changed, and found right by a recount.
        migrations.AddField("tally", "counted", models.BigIntegerField(db_default=0)),
        migrations.RunSQL("UPDATE tallies SET counted = votes", migrations.RunSQL.noop),
    ]
