"""Encoders and decoders, one file for each modality."""
