"""Programs that decide whether a library has a property, for `benchmarks.comparison`."""
