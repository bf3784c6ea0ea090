-- So many votes from one network within so many minutes.
WITH windows AS (
    SELECT network, sum(m.votes) OVER (PARTITION BY network ORDER BY minute
                                       RANGE BETWEEN (%(minutes)s - 1) * interval '1 minute' PRECEDING AND CURRENT ROW) AS votes
    FROM minutes m JOIN networks n USING (network)
    WHERE n.kind = %(kind)s AND n.votes >= %(votes)s AND n.poll_id = ANY(%(polls)s::uuid[])
), peaks AS (
    SELECT network, max(votes) AS votes FROM windows GROUP BY network HAVING max(votes) >= %(votes)s
)
SELECT n.poll_id, n.kind, n.network_key, n.subnet_key, NULL::bigint AS signature_key, n.votes, n.first_seen, n.last_seen,
       p.votes / %(votes)s AS score,
       jsonb_build_object('votes_in_window', p.votes, 'minutes', %(minutes)s::int, 'addresses', n.addresses) AS evidence
FROM peaks p JOIN networks n USING (network)
