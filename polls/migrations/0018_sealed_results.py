from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("polls", "0017_moments_by_one_clock")]

    operations = [
        migrations.AlterField(
            model_name="poll",
            name="results_visibility",
            field=models.CharField(
                choices=[
                    ("always", "everybody, at any time"),
                    ("after_vote", "who shows the receipt of a vote; everybody once the poll is closed"),
                    ("after_close", "everybody, once the poll is closed"),
                    ("owner", "the owner only"),
                    ("sealed", "nobody before the poll's end, the people behind it included; then everybody"),
                ],
                default="always",
                max_length=11,
            ),
        )
    ]
