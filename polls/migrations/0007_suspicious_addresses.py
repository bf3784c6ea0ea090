
import django.contrib.postgres.fields
import django.contrib.postgres.indexes
import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('polls', '0006_network_keys'),
    ]

    operations = [
        migrations.CreateModel(
            name='Attempts',
            fields=[
                ('pk', models.CompositePrimaryKey('poll_id', 'address_key', 'hour', blank=True, editable=False, primary_key=True, serialize=False)),
                ('poll_id', models.UUIDField()),
                ('address_key', models.UUIDField()),
                ('subnet_key', models.UUIDField()),
                ('hour', models.DateTimeField()),
                ('wrong_codes', models.IntegerField(default=0)),
                ('tokens', models.IntegerField(default=0)),
            ],
            options={
                'db_table': 'attempts',
            },
        ),
        migrations.CreateModel(
            name='Block',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('network', models.CharField(max_length=43)),
                ('until', models.DateTimeField()),
                ('made_at', models.DateTimeField()),
                ('actor', models.CharField(max_length=200)),
                ('reason', models.TextField(max_length=500)),
            ],
            options={
                'db_table': 'blocks',
            },
        ),
        migrations.CreateModel(
            name='Comparison',
            fields=[
                ('poll', models.OneToOneField(on_delete=django.db.models.deletion.CASCADE, primary_key=True, related_name='comparison', serialize=False, to='polls.poll')),
                ('as_of', models.DateTimeField()),
                ('cases', models.IntegerField()),
                ('voters', models.IntegerField()),
                ('with_votes', models.JSONField(default=dict)),
                ('without_votes', models.JSONField(default=dict)),
            ],
            options={
                'db_table': 'comparisons',
            },
        ),
        migrations.CreateModel(
            name='Decision',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('at', models.DateTimeField()),
                ('actor', models.CharField(max_length=200)),
                ('ruling', models.CharField(choices=[('quarantine', 'hold the votes out of the tally'), ('release', 'put the votes back'), ('void', 'leave the votes out for good'), ('clear', 'nothing is wrong'), ('block', 'refuse the network'), ('unblock', 'let the network in again')], max_length=10)),
                ('reason', models.TextField(max_length=500)),
                ('poll_id', models.UUIDField(null=True)),
                ('cases', django.contrib.postgres.fields.ArrayField(base_field=models.BigIntegerField(), default=list, size=None)),
                ('votes', models.IntegerField(default=0)),
                ('changes', models.JSONField(default=dict)),
            ],
            options={
                'db_table': 'decisions',
            },
        ),
        migrations.CreateModel(
            name='Hold',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('address_key', models.UUIDField(null=True)),
                ('subnet_key', models.UUIDField(null=True)),
                ('signature_key', models.BigIntegerField(null=True)),
                ('accepted_from', models.DateTimeField(null=True)),
                ('accepted_until', models.DateTimeField(null=True)),
                ('ruling', models.CharField(choices=[('quarantine', 'hold the votes out of the tally'), ('release', 'put the votes back'), ('void', 'leave the votes out for good'), ('clear', 'nothing is wrong'), ('block', 'refuse the network'), ('unblock', 'let the network in again')], max_length=10)),
                ('version', models.PositiveIntegerField()),
                ('is_settled', models.BooleanField(default=False)),
                ('ruled_at', models.DateTimeField()),
                ('actor', models.CharField(max_length=200)),
                ('reason', models.TextField(max_length=500)),
            ],
            options={
                'db_table': 'holds',
            },
        ),
        migrations.CreateModel(
            name='SuspiciousIP',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('rule', models.CharField(max_length=30)),
                ('kind', models.CharField(choices=[('address', 'one address'), ('subnet', 'a /24, of IPv6 a /64')], max_length=7)),
                ('network_key', models.UUIDField()),
                ('subnet_key', models.UUIDField()),
                ('signature_key', models.BigIntegerField(null=True)),
                ('evidence', models.JSONField(default=dict)),
                ('score', models.FloatField()),
                ('votes', models.IntegerField()),
                ('first_seen', models.DateTimeField()),
                ('last_seen', models.DateTimeField()),
                ('found_at', models.DateTimeField()),
                ('state', models.CharField(choices=[('open', 'nobody has decided yet'), ('confirmed', 'the votes were voided'), ('cleared', 'nothing was wrong'), ('expired', 'nobody decided in time')], default='open', max_length=9)),
                ('reviewer', models.CharField(blank=True, max_length=200)),
                ('reviewed_at', models.DateTimeField(null=True)),
                ('note', models.TextField(blank=True, max_length=500)),
            ],
            options={
                'verbose_name': 'suspicious address',
                'verbose_name_plural': 'suspicious addresses',
                'db_table': 'suspicious_ips',
            },
        ),
        migrations.AddField(
            model_name='poll',
            name='auto_quarantine',
            field=models.BooleanField(default=False),
        ),
        migrations.AddField(
            model_name='poll',
            name='holds_version',
            field=models.PositiveIntegerField(default=0, editable=False),
        ),
        migrations.AddField(
            model_name='poll',
            name='rule_parameters',
            field=models.JSONField(blank=True, default=dict),
        ),
        migrations.AlterField(
            model_name='voteaside',
            name='reason',
            field=models.CharField(choices=[('duplicate', "the voter's earlier vote stands"), ('changed', "the voter's later vote stands"), ('withdrawn', 'the voter withdrew it'), ('key_reused', 'an earlier vote with the same Idempotency-Key made another choice'), ('address_limit', 'as many voters as the poll allows had voted from the address'), ('subnet_limit', 'as many voters as the poll allows had voted from the subnet'), ('under_review', 'an operator looks into where it came from'), ('voided', 'an operator left it out for good'), ('poll_unknown', 'the poll was deleted'), ('option_unknown', 'the option was removed before the vote was counted')], max_length=20),
        ),
        migrations.AddIndex(
            model_name='vote',
            index=models.Index(condition=models.Q(('subnet_key__isnull', False)), fields=['subnet_key', 'address_key'], name='votes_of_a_network'),
        ),
        migrations.AddIndex(
            model_name='vote',
            index=django.contrib.postgres.indexes.BrinIndex(fields=['accepted_at'], name='votes_by_time', pages_per_range=32),
        ),
        migrations.AddIndex(
            model_name='voteaside',
            index=models.Index(condition=models.Q(('subnet_key__isnull', False)), fields=['subnet_key', 'address_key'], name='outcomes_of_a_network'),
        ),
        migrations.AddIndex(
            model_name='voteaside',
            index=django.contrib.postgres.indexes.BrinIndex(fields=['accepted_at'], name='outcomes_by_time', pages_per_range=32),
        ),
        migrations.AddIndex(
            model_name='decision',
            index=django.contrib.postgres.indexes.GinIndex(fields=['cases'], name='decisions_of_a_case'),
        ),
        migrations.AddIndex(
            model_name='decision',
            index=models.Index(fields=['poll_id', '-id'], name='decisions_of_a_poll'),
        ),
        migrations.AddField(
            model_name='hold',
            name='poll',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='holds', to='polls.poll'),
        ),
        migrations.AddField(
            model_name='suspiciousip',
            name='network_secret',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to='polls.networksecret'),
        ),
        migrations.AddField(
            model_name='suspiciousip',
            name='poll',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.CASCADE, related_name='cases', to='polls.poll'),
        ),
        migrations.AddField(
            model_name='hold',
            name='case',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.CASCADE, related_name='holds', to='polls.suspiciousip'),
        ),
        migrations.AddField(
            model_name='block',
            name='case',
            field=models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='blocks', to='polls.suspiciousip'),
        ),
        migrations.AddIndex(
            model_name='suspiciousip',
            index=models.Index(fields=['-found_at', '-id'], name='cases_newest_first'),
        ),
        migrations.AddIndex(
            model_name='suspiciousip',
            index=models.Index(fields=['subnet_key'], name='cases_of_a_subnet'),
        ),
        migrations.AddConstraint(
            model_name='suspiciousip',
            constraint=models.UniqueConstraint(fields=('poll', 'rule', 'network_key', 'signature_key'), name='one_case_per_rule_and_network', nulls_distinct=False),
        ),
        migrations.AddIndex(
            model_name='hold',
            index=models.Index(condition=models.Q(('is_settled', False)), fields=['ruled_at'], name='holds_not_settled'),
        ),
        migrations.AddConstraint(
            model_name='hold',
            constraint=models.CheckConstraint(condition=models.Q(('subnet_key__isnull', False), models.Q(('accepted_from__isnull', False), ('accepted_until__isnull', False)), _connector='OR'), name='hold_names_a_network_or_a_time'),
        ),
        migrations.AddConstraint(
            model_name='hold',
            constraint=models.CheckConstraint(condition=models.Q(('address_key', None), ('subnet_key__isnull', False), _connector='OR'), name='hold_knows_the_subnet_of_its_address'),
        ),
        migrations.AddConstraint(
            model_name='hold',
            constraint=models.UniqueConstraint(fields=('poll', 'case', 'address_key', 'subnet_key', 'signature_key', 'accepted_from', 'accepted_until'), name='one_hold_per_selection', nulls_distinct=False),
        ),
        migrations.AddConstraint(
            model_name='block',
            constraint=models.UniqueConstraint(fields=('network',), name='one_block_per_network'),
        ),
    ]
