-- The subnets and addresses with so many votes, numbered.
WITH addresses AS MATERIALIZED (
    SELECT poll_id, address_key, subnet_key, count(*) AS casts, count(*) FILTER (WHERE counts) AS votes,
           count(*) FILTER (WHERE stands) AS standing, count(*) FILTER (WHERE is_refused) AS refused,
           min(accepted_at) AS first_seen, max(accepted_at) AS last_seen
    FROM sieved GROUP BY poll_id, address_key, subnet_key
), found AS (
    SELECT poll_id, 'address' AS kind, address_key AS network_key, subnet_key, casts, votes, standing, refused, 1 AS addresses,
           FALSE AS is_one_address, first_seen, last_seen
    FROM addresses WHERE casts >= %(least)s
    UNION ALL
    -- Nine tenths of the votes from one address: whatever is wrong is wrong with the address.
    SELECT poll_id, 'subnet', subnet_key, subnet_key, sum(casts), sum(votes), sum(standing), sum(refused), count(*),
           max(casts) >= 0.9 * sum(casts), min(first_seen), max(last_seen)
    FROM addresses GROUP BY poll_id, subnet_key HAVING sum(casts) >= %(least)s
)
SELECT (row_number() OVER ())::int AS network, found.* FROM found
