"""Benchmarks: registered suites, measured beside their peers in one run, stored as JSON with their provenance."""
