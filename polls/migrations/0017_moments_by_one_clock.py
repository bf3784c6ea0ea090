"""Remember by PostgreSQL's clock when a moment was noted: it counts for no later one."""

from django.db import migrations, models
from django.db.models.functions import Now


class Migration(migrations.Migration):
    dependencies = [("polls", "0013_pipeline_desk")]

    operations = [
        migrations.AddField("moment", "noted_at", models.DateTimeField(db_default=Now())),
    ]
