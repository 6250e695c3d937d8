"""Predicted against measured training steps: ``python -m experiments.validation --data FILE [--json] [-o DIR]``."""
