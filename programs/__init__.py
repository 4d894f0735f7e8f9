"""What an engine runs on the device: see model_step.py."""
