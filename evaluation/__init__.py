"""What eval_harness.py asks of a model, arranged so that it is computed once."""
