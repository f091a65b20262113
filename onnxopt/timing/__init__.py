"""Statistics of timings, and peak memory."""
