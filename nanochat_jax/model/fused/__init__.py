"""A transformer block for NVIDIA GPUs that moves fewer bytes than the block that XLA makes of model/gpt.py.

On an H100, XLA's kernels between the matmuls of a block take half as long as the matmuls, and all of that time is spent
on reading and writing activations. Here a kernel does at once what XLA does in two or three passes.

    trial.py   decides whether to use the block
    block.py   a block's forward and backward pass, written out
    rows.py    kernels for rows: sums with RMSNorm, rotary embeddings with RMSNorm, and their gradients
    matmul.py  a matmul kernel that ends with ReLU^2 or with its derivative

The kernels are written in Pallas, which compiles them with Triton. Next to each kernel is its plain twin: the same
function in plain JAX, which CPUs run and with which the tests compare the kernel.
"""
