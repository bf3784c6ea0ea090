-- A soft limit of the poll holds votes of the network up: somebody has to say whether they count. Says nothing against the network.
SELECT poll_id, kind, network_key, subnet_key, NULL::bigint AS signature_key, count(*) AS votes, min(accepted_at) AS first_seen,
       max(accepted_at) AS last_seen, 0.1 AS score, jsonb_build_object('held_up', count(*)) AS evidence
FROM (
    SELECT poll_id, subnet_key, accepted_at, CASE reason WHEN 'address_limit' THEN 'address' ELSE 'subnet' END AS kind,
           CASE reason WHEN 'address_limit' THEN address_key ELSE subnet_key END AS network_key
    FROM outcomes
    WHERE poll_id = ANY(%(polls)s::uuid[]) AND outcome = 'quarantined' AND reason IN ('address_limit', 'subnet_limit')
      AND accepted_at <= %(at)s
) AS held_up
GROUP BY poll_id, kind, network_key, subnet_key HAVING count(*) >= %(held_up)s
