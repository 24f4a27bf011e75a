"""What a machine that may not exist would do: prediction, calibration, simulation, search."""
