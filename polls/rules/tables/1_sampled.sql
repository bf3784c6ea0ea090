-- The votes that tell where to look. Voter keys are hashes: an eighth of them is a fair sample, and always of the same voters.
SELECT poll_id, subnet_key, signature_key, selection, counts, stands, one_in
FROM casts JOIN looked_at USING (poll_id) WHERE one_in = 1
UNION ALL
SELECT poll_id, subnet_key, signature_key, selection, counts, stands, one_in
FROM casts JOIN looked_at USING (poll_id) WHERE one_in = 8 AND voter_key < '20000000-0000-0000-0000-000000000000'
