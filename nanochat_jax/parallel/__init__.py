"""Devices, processes, and how arrays are sharded over them.

In: flags such as --device_type, --coordinator, --mesh and --shard. Out: JAX running on the chosen devices and connected
to the other processes, the precision and attention kernel that the devices support, a Mesh, and a Layout that says
where parameters, gradients and optimizer state lie.
"""
