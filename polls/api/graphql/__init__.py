"""The GraphQL API: the same polls, votes, rules and refusals as in REST, in one document."""
