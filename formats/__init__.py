"""Files of other projects' models, read as data from strangers, for pretrained.py."""
