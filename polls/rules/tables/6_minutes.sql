-- When the votes of the larger networks came.
SELECT network, date_bin('1 minute', accepted_at, 'epoch') AS minute, count(*) AS votes
FROM network_votes JOIN (SELECT network FROM networks WHERE votes >= %(least_in_minutes)s) AS large USING (network)
GROUP BY 1, 2
