-- So many wrong codes, or voter tokens handed out, within so many hours, and so many times what the network then voted. Of a subnet, where
-- several of its addresses tried and none of them as often by itself.
WITH tries AS (
    SELECT poll_id, address_key, subnet_key, hour, {column} AS tries FROM attempts
    WHERE poll_id = ANY(%(polls)s::uuid[]) AND hour > %(since)s - interval '1 hour' AND hour <= %(at)s AND {column} > 0
), by_hour AS (
    SELECT poll_id, 'address' AS kind, address_key AS network_key, subnet_key, hour, tries FROM tries
    UNION ALL
    SELECT poll_id, 'subnet', subnet_key, subnet_key, hour, sum(tries) FROM tries GROUP BY poll_id, subnet_key, hour
), windows AS (
    SELECT *, sum(tries) OVER (PARTITION BY poll_id, kind, network_key ORDER BY hour
                               RANGE BETWEEN (%(hours)s - 1) * interval '1 hour' PRECEDING AND CURRENT ROW) AS in_window
    FROM by_hour
), peaks AS (
    SELECT poll_id, kind, network_key, subnet_key, max(in_window) AS tries, min(hour) AS first_seen, max(hour) AS last_seen
    FROM windows GROUP BY poll_id, kind, network_key, subnet_key HAVING max(in_window) >= %(tries)s
), theirs AS (
    SELECT p.*, (SELECT count(*) FROM votes v WHERE v.poll_id = p.poll_id AND v.subnet_key = p.subnet_key
                                                AND (p.kind = 'subnet' OR v.address_key = p.network_key)) AS votes
    FROM peaks p
)
SELECT poll_id, kind, network_key, subnet_key, NULL::bigint AS signature_key, votes, first_seen, last_seen,
       tries / %(tries)s AS score, jsonb_build_object('{column}', tries, 'hours', %(hours)s::int, 'votes', votes) AS evidence
FROM theirs t
WHERE tries >= %(times)s * votes AND NOT (
    kind = 'subnet' AND EXISTS (SELECT FROM theirs a WHERE a.kind = 'address' AND (a.poll_id, a.subnet_key) = (t.poll_id, t.subnet_key))
)
