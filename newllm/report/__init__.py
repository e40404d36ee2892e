"""Tables and pictures from run folders; imports no torch."""
