-- The polls that are looked at, and how many votes stand in each. Where there are very many votes, one voter in eight of the larger polls
-- tells where to look.
CREATE TEMPORARY TABLE looked_at AS
SELECT poll_id, votes, CASE WHEN sum(votes) OVER () > %(many_votes)s AND votes > %(large_poll)s THEN 8 ELSE 1 END AS one_in
FROM unnest(%(polls)s::uuid[]) AS asked (poll_id), LATERAL (
    SELECT coalesce(sum(t.votes), 0)::bigint AS votes FROM tallies t JOIN polls p ON p.id = t.poll_id
    WHERE t.poll_id = asked.poll_id AND (p.method = 'single' OR t.selection = '{}')
) AS ballots
