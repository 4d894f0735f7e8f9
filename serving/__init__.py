"""HTTP in front of the engine: what server.py puts together."""
