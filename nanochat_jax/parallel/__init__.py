"""Devices, processes, and how arrays are sharded over them.

This package reads flags such as --device_type, --coordinator, --mesh and --shard. It starts JAX on the chosen devices,
and connects this process to the other processes. It chooses a precision and an attention kernel that the devices
support. It makes a Mesh, and a Layout, which says where parameters, gradients and optimizer state lie.
"""
