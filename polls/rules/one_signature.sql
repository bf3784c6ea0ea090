-- One browser signature sends almost all votes of a network, and is rare elsewhere in the poll.
WITH network_signatures AS (
    SELECT network, signature_key, count(*) AS votes, min(accepted_at) AS first_seen, max(accepted_at) AS last_seen
    FROM network_votes JOIN (SELECT network FROM networks WHERE votes >= %(votes)s AND NOT is_one_address) AS large USING (network)
    WHERE signature_key IS NOT NULL GROUP BY network, signature_key HAVING count(*) >= %(votes)s
), poll_signatures AS (
    SELECT poll_id, signature_key, sum(votes) AS votes FROM signatures GROUP BY poll_id, signature_key
), shares AS (
    SELECT n.poll_id, n.kind, n.network_key, n.subnet_key, n.addresses, s.*, s.votes / n.votes::float AS share,
           greatest(0, coalesce(o.votes, 0) - s.votes) / (l.votes - n.standing)::float AS elsewhere
    FROM network_signatures s JOIN networks n USING (network) JOIN looked_at l USING (poll_id)
    LEFT JOIN poll_signatures o USING (poll_id, signature_key)
    WHERE n.poll_id = ANY(%(polls)s::uuid[]) AND l.votes - n.standing >= %(votes)s
)
SELECT poll_id, kind, network_key, subnet_key, signature_key, votes, first_seen, last_seen, votes / %(votes)s AS score,
       jsonb_build_object('votes', votes, 'share', round(share::numeric, 4), 'elsewhere', round(elsewhere::numeric, 4),
                          'addresses', addresses) AS evidence
FROM shares WHERE share >= %(share)s AND elsewhere <= %(elsewhere)s
