from django.contrib.auth.management import create_permissions
from django.db import migrations

# Who sees the pages of the admin. Who decides there follows from the role itself (polls/roles.py), as in the API.
PAGES = ["view_suspiciousip", "view_block", "view_decision"]
ROLES = ["operator", "auditor", "admin"]


def show_pages(apps, schema_editor):
    polls = apps.get_app_config("polls")
    polls.models_module = True  # Django makes permissions after all migrations; they are needed now
    create_permissions(polls, apps=apps, verbosity=0)
    Group, Permission = apps.get_model("auth", "Group"), apps.get_model("auth", "Permission")
    pages = Permission.objects.filter(content_type__app_label="polls", codename__in=PAGES)
    for role in ROLES:
        Group.objects.get_or_create(name=role)[0].permissions.add(*pages)


class Migration(migrations.Migration):
    dependencies = [("polls", "0008_decisions_are_only_added")]

    operations = [migrations.RunPython(show_pages, migrations.RunPython.noop)]
