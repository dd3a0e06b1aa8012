"""A transformer block for NVIDIA GPUs that moves fewer bytes than the block that XLA makes of model/gpt.py.

XLA's kernels between the matmuls of a block only read and write activations. By the roofline of the d20 step on an
H100, they take at least 0.39 times as long as the matmuls (`scripts.doctor --target`, JAX 0.10.2). Here a kernel does
at once what XLA does in two or three passes.

    trial.py   decides whether to use the block
    block.py   a block's forward and backward pass, written out
    rows.py    kernels for rows: sums with RMSNorm, rotary embeddings with RMSNorm, and their gradients
    matmul.py  a matmul kernel with ReLU^2, or its derivative, as epilogue

The kernels are written in Pallas, which compiles them with Triton. Next to each kernel is its reference implementation:
the same function in plain JAX. The tests compare the two, and the reference runs on all devices but NVIDIA GPUs.
"""
