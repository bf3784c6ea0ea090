-- The subnets that may have so many votes; all rules about networks want them, and by far the most are too small. In a very large poll
-- one voter in eight tells, with room for chance: of the subnets that just have enough it finds all but one in 200, of larger ones all.
SELECT poll_id, subnet_key
FROM casts JOIN looked_at USING (poll_id)
WHERE one_in = 1 OR uuid_hash(voter_key) & (one_in - 1) = 0
GROUP BY poll_id, subnet_key, one_in HAVING count(*) * one_in >= %(least)s * CASE WHEN one_in = 1 THEN 1 ELSE 0.4 END
