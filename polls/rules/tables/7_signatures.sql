-- What each browser's votes of a poll were for; about, in a sample.
SELECT poll_id, signature_key, selection, count(*) * one_in AS votes, count(*) FILTER (WHERE stands) * one_in AS standing
FROM sampled WHERE counts AND signature_key IS NOT NULL
GROUP BY poll_id, signature_key, selection, one_in
