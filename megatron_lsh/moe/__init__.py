"""The mixture-of-experts layer: router, dispatchers (rows, compressors, transports, schedules), experts, gauges."""
