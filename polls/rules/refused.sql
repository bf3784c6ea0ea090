-- Most of a network's votes were duplicates or refused for another reason. Not where an address is one voter: there everybody
-- behind it but the first is a duplicate.
SELECT n.poll_id, n.kind, n.network_key, n.subnet_key, NULL::bigint AS signature_key, n.votes, n.first_seen, n.last_seen,
       n.casts / %(votes)s AS score,
       jsonb_build_object('votes', n.casts, 'refused', n.refused, 'share', round(n.refused / n.casts::numeric, 4)) AS evidence
FROM networks n JOIN polls p ON p.id = n.poll_id
WHERE n.poll_id = ANY(%(polls)s::uuid[]) AND p.voter_policy <> 'ip' AND NOT n.is_one_address
  AND n.casts >= %(votes)s AND n.refused >= %(share)s * n.casts
