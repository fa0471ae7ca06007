"""Scaling laws of finished runs: collect them, fit, draw, report. No torch."""
