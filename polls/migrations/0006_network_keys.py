import secrets

import django.db.models.deletion
from django.db import migrations, models
from django.utils.timezone import now

import polls.models

# Hashes of before stay as they are in the lower half: votes of one network still group, and none of them meets a key of today.
_TO_UUID = """
    ALTER TABLE votes ALTER address_key TYPE uuid USING lpad(to_hex(address_key), 32, '0')::uuid,
                      ALTER subnet_key TYPE uuid USING lpad(to_hex(subnet_key), 32, '0')::uuid;
    ALTER TABLE outcomes ALTER address_key TYPE uuid USING lpad(to_hex(address_key), 32, '0')::uuid,
                         ALTER subnet_key TYPE uuid USING lpad(to_hex(subnet_key), 32, '0')::uuid;
    ALTER TABLE network_counts ALTER network_key TYPE uuid USING lpad(to_hex(network_key), 32, '0')::uuid;
"""


def give_secret(apps, schema_editor):
    """Polls that exist go on with keys of the new kind."""
    Poll = apps.get_model("polls", "Poll")
    if Poll.objects.filter(network_secret=None).exists():
        secret = apps.get_model("polls", "NetworkSecret").objects.create(secret=secrets.token_bytes(32), made_at=now())
        Poll.objects.filter(network_secret=None).update(network_secret=secret, network_secret_since=now())


class Migration(migrations.Migration):
    """Rewrites votes, outcomes and network_counts, a minute for 10 million rows. Limits per network begin anew in open polls."""

    dependencies = [("polls", "0005_roles_and_what_was_there")]

    operations = [
        migrations.RunSQL(
            _TO_UUID,
            migrations.RunSQL.noop,
            state_operations=[
                migrations.AlterField("vote", "address_key", models.UUIDField(null=True)),
                migrations.AlterField("vote", "subnet_key", models.UUIDField(null=True)),
                migrations.AlterField("voteaside", "address_key", models.UUIDField(null=True)),
                migrations.AlterField("voteaside", "subnet_key", models.UUIDField(null=True)),
                migrations.AlterField("networkcount", "network_key", models.UUIDField()),
            ],
        ),
        migrations.AddField("vote", "signature_key", models.BigIntegerField(null=True)),
        migrations.AddField("voteaside", "signature_key", models.BigIntegerField(null=True)),
        migrations.CreateModel(
            "NetworkSecret",
            [
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("secret", models.BinaryField(max_length=32)),
                ("made_at", models.DateTimeField()),
            ],
            {"db_table": "network_secrets"},
        ),
        migrations.AddField("poll", "network_secret_since", models.DateTimeField(editable=False, null=True)),
        migrations.AddField(
            "poll",
            "network_secret",
            models.ForeignKey(
                editable=False, null=True, on_delete=django.db.models.deletion.SET_NULL, related_name="+", to="polls.networksecret"
            ),
        ),
        # Polls that exist have none: their voter keys were made without.
        migrations.AddField("poll", "voter_salt", models.BinaryField(max_length=16, null=True)),
        migrations.AlterField("poll", "voter_salt", models.BinaryField(default=polls.models.new_voter_salt, max_length=16, null=True)),
        migrations.RunPython(give_secret, migrations.RunPython.noop),
    ]
