"""tpprof: where a recorded run spent its wall time, adding up exactly. Reads anybody's traces."""
