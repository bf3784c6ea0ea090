-- So many votes from one network within so many minutes, and so many times what the rest of the poll sends in as long: on average,
-- and at the same time. The latter, because a poll that is shown on television bursts everywhere.
WITH windows AS (
    SELECT network, date_bin(%(minutes)s * interval '1 minute', minute, 'epoch') AS begins_at, sum(m.votes) AS votes
    FROM minutes m JOIN networks n USING (network)
    WHERE n.votes >= %(votes)s AND NOT n.is_one_address AND n.poll_id = ANY(%(polls)s::uuid[])
    GROUP BY 1, 2 HAVING sum(m.votes) >= %(votes)s
), far_above AS (
    SELECT n.*, w.begins_at, w.votes AS in_window,
           (l.votes - n.standing)
           / greatest(1, extract(epoch FROM least(p.closes_at, %(at)s) - p.opens_at) / (60 * %(minutes)s)) AS usual
    FROM windows w JOIN networks n USING (network) JOIN looked_at l USING (poll_id) JOIN polls p ON p.id = n.poll_id
), beside_others AS (
    SELECT f.*, others.votes - f.in_window AS of_others
    FROM far_above f, LATERAL (
        SELECT count(*) AS votes FROM casts c
        WHERE c.counts AND c.poll_id = f.poll_id AND c.accepted_at >= f.begins_at
          AND c.accepted_at < f.begins_at + %(minutes)s * interval '1 minute'
    ) AS others
    WHERE f.in_window >= %(times)s * f.usual
)
SELECT DISTINCT ON (network) poll_id, kind, network_key, subnet_key, NULL::bigint AS signature_key, votes, first_seen, last_seen,
       in_window / %(votes)s AS score,
       jsonb_build_object('votes_in_window', in_window, 'minutes', %(minutes)s::int, 'others_in_window', of_others,
                          'others_usually', round(usual::numeric, 2)) AS evidence
FROM beside_others
WHERE in_window >= %(times)s * of_others
ORDER BY network, in_window DESC
