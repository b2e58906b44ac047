"""How good a model is: figures, and the baselines to read them against."""
