-- The subnets that may have so many votes; all rules about networks want them, and by far the most are too small. A sample leaves room
-- for chance: of the subnets that just have enough it misses one in 40, of those with half as many more one in 2,000.
SELECT poll_id, subnet_key FROM sampled
GROUP BY poll_id, subnet_key, one_in HAVING count(*) * one_in >= %(least)s * CASE WHEN one_in = 1 THEN 1 ELSE 0.5 END
