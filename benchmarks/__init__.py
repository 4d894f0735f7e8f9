"""What measures this project against its peers: see bench.py for the commands."""
