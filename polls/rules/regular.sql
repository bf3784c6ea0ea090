-- A network's votes come like a clock: the middle half of the pauses between them differ by a fraction of the median. Between people's
-- the fraction is above one, however fast they come; half of them may stop in between, as bots in shifts do.
WITH pauses AS (
    SELECT network, date_part('epoch', accepted_at - lag(accepted_at) OVER (PARTITION BY network ORDER BY accepted_at)) AS seconds
    FROM network_votes
), quartiles AS (
    SELECT network, percentile_disc(ARRAY[0.25, 0.5, 0.75]) WITHIN GROUP (ORDER BY seconds) AS q FROM pauses GROUP BY network
)
SELECT n.poll_id, n.kind, n.network_key, n.subnet_key, NULL::bigint AS signature_key, n.votes, n.first_seen, n.last_seen,
       n.votes / %(votes)s AS score,
       jsonb_build_object('votes', n.votes, 'pause_seconds', round(q[2]::numeric, 3), 'spread', round(((q[3] - q[1]) / q[2])::numeric, 4)) AS evidence
FROM quartiles JOIN networks n USING (network)
WHERE n.poll_id = ANY(%(polls)s::uuid[]) AND NOT n.is_one_address
  AND n.votes >= %(votes)s AND q[2] > 0 AND q[3] - q[1] <= %(spread)s * q[2]
