from django.contrib.auth.management import create_permissions
from django.db import migrations
from django.db.models import F

# What each role sees in the admin. Rights in the API are in polls/roles.py.
PERMISSIONS = {
    "owner": [],
    "operator": ["view_deadletterdesk", "view_apiclient"],  # no polls: their pages show results before everybody sees them
    "auditor": ["view_deadletterdesk", "view_poll", "view_tally", "view_apiclient", "view_journalentry"],
    "admin": ["view_deadletterdesk", "view_poll", "change_poll", "view_tally", "view_apiclient", "add_apiclient", "change_apiclient", "view_journalentry"],
}


def make_roles(apps, schema_editor):
    polls = apps.get_app_config("polls")
    polls.models_module = True  # Django makes permissions after all migrations; they are needed now
    create_permissions(polls, apps=apps, verbosity=0)
    Group, Permission = apps.get_model("auth", "Group"), apps.get_model("auth", "Permission")
    for role, codenames in PERMISSIONS.items():
        group, _ = Group.objects.get_or_create(name=role)
        group.permissions.add(*Permission.objects.filter(content_type__app_label="polls", codename__in=codenames))


def keep_what_was_allowed(apps, schema_editor):
    """There were no drafts and no scopes before; and whoever had polls was allowed to."""
    Poll, Group = apps.get_model("polls", "Poll"), apps.get_model("auth", "Group")
    Poll.objects.filter(published_at=None).update(published_at=F("created_at"))
    apps.get_model("polls", "ApiClient").objects.filter(scopes=[]).update(scopes=["votes:cast"])
    owner = Group.objects.get(name="owner")
    owner.user_set.add(*apps.get_model("auth", "User").objects.filter(polls__isnull=False).distinct())


class Migration(migrations.Migration):
    dependencies = [("polls", "0004_stages_codes_limits"), ("auth", "0012_alter_user_first_name_max_length")]

    operations = [
        migrations.RunPython(make_roles, migrations.RunPython.noop),
        migrations.RunPython(keep_what_was_allowed, migrations.RunPython.noop),
    ]
