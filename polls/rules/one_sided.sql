-- Almost all votes of a network are for one option, and everybody else's are not: the odds are so many times theirs.
-- Not the share alone: where nine of ten vote for something, whole families do.
WITH network_options AS (
    SELECT network, option_id, count(*) AS votes, count(*) FILTER (WHERE stands) AS standing
    FROM network_votes, unnest(selection) AS option_id GROUP BY network, option_id
), shares AS (
    SELECT n.*, c.votes AS chosen, l.votes - n.standing AS others, t.votes - c.standing AS others_chosen
    FROM network_options c JOIN networks n USING (network) JOIN looked_at l USING (poll_id)
    JOIN tallies t ON t.poll_id = n.poll_id AND t.selection = ARRAY[c.option_id]
    WHERE n.poll_id = ANY(%(polls)s::uuid[]) AND n.votes >= %(votes)s AND NOT n.is_one_address AND c.votes >= %(share)s * n.votes
), compared AS (
    -- Half a vote more on either side, so that no odds are infinite.
    SELECT *, (chosen + 0.5) / (votes - chosen + 0.5) / ((others_chosen + 0.5) / (others - others_chosen + 0.5)) AS odds
    FROM shares WHERE others >= %(votes)s
)
SELECT poll_id, kind, network_key, subnet_key, NULL::bigint AS signature_key, votes, first_seen, last_seen,
       least(votes / %(votes)s, odds / %(odds)s) AS score,
       jsonb_build_object('votes', votes, 'share', round(chosen / votes::numeric, 4),
                          'share_of_others', round(others_chosen / others::numeric, 4), 'addresses', addresses) AS evidence
FROM compared WHERE odds >= %(odds)s
