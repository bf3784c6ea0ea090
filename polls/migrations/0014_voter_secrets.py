from django.db import migrations, models

# Polls that open in an hour or later have no votes yet, and by then no process of the version before takes any.
_NOT_YET_OPEN = "UPDATE polls SET has_keyed_vote_ids = true WHERE published_at IS NULL OR opens_at > now() + interval '1 hour'"


class Migration(migrations.Migration):
    dependencies = [("polls", "0013_pipeline_desk")]

    operations = [
        migrations.CreateModel(
            name="VoterSecret",
            fields=[
                ("fingerprint", models.BinaryField(editable=False, max_length=8, primary_key=True, serialize=False)),
                ("since", models.DateTimeField()),
                ("lost_at", models.DateTimeField(null=True)),
            ],
            options={"db_table": "voter_secrets"},
        ),
        migrations.AddField("networksecret", "voter_secret", models.BinaryField(editable=False, max_length=8, null=True)),
        migrations.AddField("poll", "voter_secret", models.BinaryField(editable=False, max_length=8, null=True)),
        migrations.AddField("poll", "has_keyed_vote_ids", models.BooleanField(db_default=False, default=True, editable=False)),
        migrations.RunSQL(_NOT_YET_OPEN, migrations.RunSQL.noop),
        migrations.AddField("votercode", "sealed_label", models.BinaryField(editable=False, null=True)),
        migrations.RenameField("votercode", "label", "clear_label"),
        migrations.AlterField(
            "votercode",
            "clear_label",
            models.CharField(blank=True, db_column="label", db_default="", default="", editable=False, max_length=100),
        ),
    ]
