"""Kiln's compute backend: a service in its own process that runs recipes. See CONTRIBUTING.md for its rooms."""
