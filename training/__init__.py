"""What train.py puts together: presets, the start of a run, its log, the pipeline, the dry run."""
