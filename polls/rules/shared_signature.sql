-- One browser signature votes almost only for one option, from many subnets, and everybody else does not: bots that hide one by one
-- among people. A case for each address that sent such votes, of these votes alone; one for the subnet where many addresses did.
WITH signature_options AS (
    SELECT poll_id, signature_key, option_id, sum(votes) AS votes
    FROM signatures, unnest(selection) AS option_id GROUP BY poll_id, signature_key, option_id
), likely AS MATERIALIZED (
    -- By a sample they are about so many and about so one-sided.
    SELECT s.poll_id, s.signature_key
    FROM (
        SELECT poll_id, signature_key, sum(votes) AS votes FROM signatures WHERE poll_id = ANY(%(polls)s::uuid[])
        GROUP BY poll_id, signature_key HAVING sum(votes) >= 0.7 * %(signature_votes)s
    ) AS s JOIN signature_options o USING (poll_id, signature_key)
    GROUP BY s.poll_id, s.signature_key, s.votes HAVING max(o.votes) >= (%(share)s - 0.05) * s.votes
), theirs AS MATERIALIZED (
    SELECT poll_id, signature_key, address_key, subnet_key, selection, accepted_at, stands
    FROM casts JOIN likely USING (poll_id, signature_key) WHERE counts
), spread AS (
    SELECT poll_id, signature_key, count(*) AS votes, count(*) FILTER (WHERE stands) AS standing,
           count(DISTINCT subnet_key) AS subnets, count(DISTINCT address_key) AS addresses
    FROM theirs GROUP BY poll_id, signature_key
    HAVING count(*) >= %(signature_votes)s AND count(DISTINCT subnet_key) >= %(subnets)s
), chosen AS (
    SELECT poll_id, signature_key, option_id, count(*) AS chosen, count(*) FILTER (WHERE stands) AS standing
    FROM theirs, unnest(selection) AS option_id GROUP BY poll_id, signature_key, option_id
), shares AS (
    SELECT s.*, c.chosen, l.votes - s.standing AS others, t.votes - c.standing AS others_chosen
    FROM spread s JOIN chosen c USING (poll_id, signature_key) JOIN looked_at l USING (poll_id)
    JOIN tallies t ON t.poll_id = s.poll_id AND t.selection = ARRAY[c.option_id]
    WHERE c.chosen >= %(share)s * s.votes
), compared AS (
    -- Half a vote more on either side, so that no odds are infinite.
    SELECT *, (chosen + 0.5) / (votes - chosen + 0.5) / ((others_chosen + 0.5) / (others - others_chosen + 0.5)) AS odds
    FROM shares WHERE others >= %(signature_votes)s
), places AS (
    SELECT poll_id, signature_key, subnet_key, accepted_at,
           CASE WHEN in_subnet > 4 THEN subnet_key ELSE address_key END AS network_key,
           CASE WHEN in_subnet > 4 THEN 'subnet' ELSE 'address' END AS kind
    FROM theirs JOIN (
        SELECT poll_id, signature_key, subnet_key, count(DISTINCT address_key) AS in_subnet
        FROM theirs GROUP BY poll_id, signature_key, subnet_key
    ) AS subnets USING (poll_id, signature_key, subnet_key)
)
SELECT p.poll_id, p.kind, p.network_key, p.subnet_key, p.signature_key, count(*) AS votes, min(p.accepted_at) AS first_seen,
       max(p.accepted_at) AS last_seen, least(c.votes / %(signature_votes)s, c.odds / %(odds)s) AS score,
       jsonb_build_object('votes', count(*), 'signature_votes', c.votes, 'addresses', c.addresses, 'subnets', c.subnets,
                          'share', round(c.chosen / c.votes::numeric, 4),
                          'share_of_others', round(c.others_chosen / c.others::numeric, 4)) AS evidence
FROM places p JOIN compared c USING (poll_id, signature_key)
WHERE c.odds >= %(odds)s
GROUP BY p.poll_id, p.kind, p.network_key, p.subnet_key, p.signature_key, c.votes, c.odds, c.chosen, c.others_chosen, c.others,
         c.addresses, c.subnets
