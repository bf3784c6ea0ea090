from django.contrib.auth.management import create_permissions
from django.db import migrations, models


def show_page(apps, schema_editor):
    polls = apps.get_app_config("polls")
    polls.models_module = True  # Django makes permissions after all migrations; they are needed now
    create_permissions(polls, apps=apps, verbosity=0)
    Group, Permission = apps.get_model("auth", "Group"), apps.get_model("auth", "Permission")
    page = Permission.objects.get(content_type__app_label="polls", codename="view_pipelinedesk")
    for role in ["operator", "auditor", "admin"]:
        Group.objects.get_or_create(name=role)[0].permissions.add(page)


class Migration(migrations.Migration):
    dependencies = [("polls", "0012_only_drafts_are_deleted")]

    operations = [
        migrations.CreateModel(
            name="PipelineDesk",
            fields=[("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID"))],
            options={"verbose_name": "pipeline", "verbose_name_plural": "pipeline", "managed": False, "default_permissions": ("view",)},
        ),
        migrations.RunPython(show_page, migrations.RunPython.noop),
    ]
