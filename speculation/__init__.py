"""Guesses at the next tokens, which the model then checks several at a time: see drafts.py."""
