-- All votes with network keys. `counts`: it stands, or would if no ruling and no limit held it up.
CREATE TEMPORARY VIEW casts AS
SELECT poll_id, voter_key, address_key, subnet_key, signature_key, selection, accepted_at,
       selection <> '{}' AS counts, TRUE AS stands, FALSE AS is_refused
FROM votes
WHERE subnet_key IS NOT NULL AND {which} AND {when}
UNION ALL
SELECT poll_id, voter_key, address_key, subnet_key, signature_key, selection, accepted_at,
       selection <> '{}' AND reason IN ('under_review', 'voided', 'address_limit', 'subnet_limit'), FALSE,
       outcome = 'rejected' AND reason <> 'voided'
FROM outcomes
WHERE subnet_key IS NOT NULL AND {which} AND {when}
