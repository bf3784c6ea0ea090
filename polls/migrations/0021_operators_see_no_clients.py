from django.db import migrations


def hide_page(apps, schema_editor):
    """The API tells operators nothing of clients; the admin showed them all."""
    operators = apps.get_model("auth", "Group").objects.filter(name="operator").first()
    if operators:
        clients = apps.get_model("auth", "Permission").objects.filter(content_type__app_label="polls", codename="view_apiclient")
        operators.permissions.remove(*clients)


class Migration(migrations.Migration):
    dependencies = [("polls", "0020_journal_is_only_added")]

    operations = [migrations.RunPython(hide_page, migrations.RunPython.noop)]
