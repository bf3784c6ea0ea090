"""Remember when something last happened or was last true."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("polls", "0010_tallies_that_tell_a_change")]

    operations = [
        migrations.CreateModel(
            name="Moment",
            fields=[
                ("name", models.CharField(max_length=200, primary_key=True, serialize=False)),
                ("at", models.DateTimeField()),
            ],
            options={"db_table": "moments"},
        ),
    ]
