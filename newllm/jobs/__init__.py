"""Jobs of `train.py -m`: each a command of its own in a fresh process, whatever launcher starts it. Imports no torch."""
