-- Their votes, those of an address a second time for its subnet.
SELECT n.network, v.selection, v.stands, v.signature_key, v.accepted_at
FROM sieved v JOIN networks n ON n.poll_id = v.poll_id AND n.network_key = v.subnet_key AND n.kind = 'subnet'
WHERE v.counts
UNION ALL
SELECT n.network, v.selection, v.stands, v.signature_key, v.accepted_at
FROM sieved v JOIN networks n ON n.poll_id = v.poll_id AND n.network_key = v.address_key AND n.kind = 'address'
WHERE v.counts
