"""Devices, processes, and how arrays are sharded over them.

In: flags such as --device_type, --coordinator, --mesh and --shard. Out: JAX with its devices chosen and the other
processes joined, the precision and attention kernel they support, a Mesh, and a Layout that says where parameters,
gradients and optimizer state lie.
"""
