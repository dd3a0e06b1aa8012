"""Devices, processes, and how arrays are sharded over them.

This package implements flags such as --device_type, --coordinator, --mesh and --shard. It starts JAX on the chosen
devices, and connects this process to the other processes of the run. It chooses a precision and an attention kernel
that the devices support. It arranges the devices in a Mesh. A Layout says how parameters, gradients and optimizer state
are sharded over the mesh.

    devices.py     starts JAX, and knows the speed and the memory of devices
    gpu_node.py    asks nvidia-smi about the GPUs: their kind, who uses them, NVLink
    processes.py   lets several processes exchange values and end together
    sharding.py    the mesh and the Layout
"""
