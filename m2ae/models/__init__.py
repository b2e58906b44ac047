"""The model and its parts, one file for each box of its figure."""
