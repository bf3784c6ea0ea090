"""The domain: polls, votes, their counting; then the hot routes (intake, publishing) and the API."""
