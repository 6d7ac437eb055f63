"""Measurements, as ratios taken in one process. Run a file with `-m`."""
