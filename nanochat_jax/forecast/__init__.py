"""Compiles the project's programs for GPUs that are not there, and computes what they would at best reach."""
