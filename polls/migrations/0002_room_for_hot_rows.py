"""Leave room in the pages of tallies, whose few rows are updated all the time: the new version then lies beside the old one."""

from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("polls", "0001_first_tables")]
    operations = [
        migrations.RunSQL(
            "ALTER TABLE tallies SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)",
            "ALTER TABLE tallies RESET (fillfactor, autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold)",
        )
    ]
