"""Remember by PostgreSQL's clock when a moment was noted: it counts for no later one. And how far from it each program's clock is."""

from django.db import migrations, models
from django.db.models.functions import Now


class Migration(migrations.Migration):
    dependencies = [("polls", "0016_results_step")]

    operations = [
        migrations.AddField("moment", "noted_at", models.DateTimeField(db_default=Now())),
        migrations.CreateModel(
            name="Clock",
            fields=[
                ("place", models.CharField(max_length=150, primary_key=True, serialize=False)),
                ("program", models.CharField(max_length=20)),
                ("host", models.CharField(max_length=100)),
                ("ahead_seconds", models.FloatField()),
                ("noted_at", models.DateTimeField(db_default=Now())),
            ],
            options={"db_table": "clocks"},
        ),
    ]
