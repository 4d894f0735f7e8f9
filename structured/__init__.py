"""Structured output: texts that fit a JSON schema, a regular expression, a choice, a grammar."""
