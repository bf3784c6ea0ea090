-- So many votes from one address within so many minutes, all polls together, and not as many in any of them alone.
WITH addresses AS (
    SELECT network_key FROM networks WHERE kind = 'address' AND votes >= %(votes)s AND poll_id = ANY(%(polls)s::uuid[])
    GROUP BY network_key HAVING count(*) > 1 AND sum(votes) >= %(all_votes)s
), address_minutes AS (
    SELECT n.network_key, n.subnet_key, n.poll_id, date_bin('1 minute', accepted_at, 'epoch') AS minute, count(*) AS votes,
           min(accepted_at) AS first_seen, max(accepted_at) AS last_seen
    FROM network_votes JOIN networks n USING (network) JOIN addresses USING (network_key)
    WHERE n.votes >= %(votes)s AND n.poll_id = ANY(%(polls)s::uuid[])
    GROUP BY n.network_key, n.subnet_key, n.poll_id, minute
), windows AS (
    SELECT *, sum(votes) OVER (PARTITION BY network_key ORDER BY minute
                               RANGE BETWEEN (%(minutes)s - 1) * interval '1 minute' PRECEDING AND CURRENT ROW) AS of_all,
           sum(votes) OVER (PARTITION BY network_key, poll_id ORDER BY minute
                            RANGE BETWEEN (%(minutes)s - 1) * interval '1 minute' PRECEDING AND CURRENT ROW) AS of_one
    FROM address_minutes
)
SELECT NULL::uuid AS poll_id, 'address' AS kind, network_key, subnet_key, NULL::bigint AS signature_key,
       sum(votes) AS votes, min(first_seen) AS first_seen, max(last_seen) AS last_seen, max(of_all) / %(all_votes)s AS score,
       jsonb_build_object('votes_in_window', max(of_all), 'minutes', %(minutes)s::int, 'polls', count(DISTINCT poll_id)) AS evidence
FROM windows
GROUP BY network_key, subnet_key
HAVING max(of_all) >= %(all_votes)s AND max(of_one) < %(all_votes)s
