"""Remember what was shown of voters' choices, and what results show while they are held back."""

import django.db.models.deletion
from django.db import migrations, models

_KEEP = """
    CREATE FUNCTION looks_are_only_added() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'a look is never changed or deleted';
    END $$;
    CREATE TRIGGER looks_are_only_added BEFORE UPDATE OR DELETE OR TRUNCATE ON looks
    FOR EACH STATEMENT EXECUTE FUNCTION looks_are_only_added();
    CREATE TRIGGER looks_are_only_added BEFORE UPDATE OR DELETE OR TRUNCATE ON looked_at_sets
    FOR EACH STATEMENT EXECUTE FUNCTION looks_are_only_added();
"""
_FORGET = """
    DROP TRIGGER looks_are_only_added ON looks;
    DROP TRIGGER looks_are_only_added ON looked_at_sets;
    DROP FUNCTION looks_are_only_added();
"""


class Migration(migrations.Migration):
    dependencies = [
        ('polls', '0014_voter_secrets'),
    ]

    operations = [
        migrations.CreateModel(
            name='ShownResults',
            fields=[
                ('poll', models.OneToOneField(on_delete=django.db.models.deletion.CASCADE, primary_key=True, related_name='shown_results', serialize=False, to='polls.poll')),
                ('votes', models.JSONField(default=dict)),
                ('revision', models.BigIntegerField(default=0)),
                ('as_of', models.DateTimeField()),
                ('ballots', models.BigIntegerField(default=0)),
                ('step', models.IntegerField()),
            ],
            options={
                'db_table': 'shown_results',
            },
        ),
        migrations.AddField(
            model_name='comparison',
            name='shown_as_of',
            field=models.DateTimeField(null=True),
        ),
        migrations.AddField(
            model_name='decision',
            name='hides_changes',
            field=models.BooleanField(db_default=False, default=False),
        ),
        migrations.AlterField(
            model_name='decision',
            name='ruling',
            field=models.CharField(choices=[('quarantine', 'hold the votes out of the tally'), ('release', 'put the votes back'), ('void', 'leave the votes out for good'), ('clear', 'nothing is wrong'), ('block', 'refuse the network'), ('unblock', 'let the network in again'), ('look', 'look at what a ruling would change')], max_length=10),
        ),
        migrations.AlterField(
            model_name='hold',
            name='ruling',
            field=models.CharField(choices=[('quarantine', 'hold the votes out of the tally'), ('release', 'put the votes back'), ('void', 'leave the votes out for good'), ('clear', 'nothing is wrong'), ('block', 'refuse the network'), ('unblock', 'let the network in again'), ('look', 'look at what a ruling would change')], max_length=10),
        ),
        migrations.CreateModel(
            name='Look',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('poll_id', models.UUIDField()),
                ('at', models.DateTimeField()),
                ('actor', models.CharField(max_length=200)),
                ('reason', models.TextField(blank=True, max_length=500)),
                ('kind', models.CharField(choices=[('dry_run', 'what a ruling would change'), ('ruling', 'what a ruling changed'), ('case', "what a case's voters chose"), ('comparison', 'the results with and without what is under review')], max_length=10)),
                ('selectors', models.JSONField(default=list)),
                ('case_id', models.BigIntegerField(null=True)),
                ('shown', models.JSONField(null=True)),
            ],
            options={
                'db_table': 'looks',
                'indexes': [models.Index(fields=['poll_id', '-id'], name='looks_of_a_poll')],
            },
        ),
        migrations.CreateModel(
            name='LookedAt',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('poll_id', models.UUIDField()),
                ('moves', models.BinaryField()),
                ('look', models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='sets', to='polls.look')),
            ],
            options={
                'db_table': 'looked_at_sets',
                'indexes': [models.Index(fields=['poll_id'], name='looked_at_sets_of_a_poll')],
            },
        ),
        migrations.RunSQL(_KEEP, _FORGET),
    ]
