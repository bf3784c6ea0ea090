"""Let a poll show its results only every so many ballots."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("polls", "0015_disclosure")]

    operations = [
        migrations.AddField(
            model_name="poll",
            name="results_step",
            field=models.PositiveIntegerField(db_default=1, default=1),
        ),
    ]
