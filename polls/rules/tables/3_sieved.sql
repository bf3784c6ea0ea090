SELECT poll_id, subnet_key, address_key, signature_key, selection, accepted_at, counts, stands, is_refused
FROM casts JOIN sieve USING (poll_id, subnet_key)
