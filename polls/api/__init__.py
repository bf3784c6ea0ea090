"""The API that Django serves: polls, sign-in, the schema and its pages."""
