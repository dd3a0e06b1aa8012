"""The transformer as pure functions of its parameters.

In: a GPTConfig, parameters (a nested dict of arrays) and token ids [b,t]. Out: hidden states [b,t,d], logits [b,t,v] or
the loss. The model runs inside `jax.jit`. Its compute dtype and its attention kernel are chosen before compilation.
parallel/ decides how the arrays are sharded, and training/ updates the parameters.

    gpt.py         the transformer: its modules, its initialisation and its forward pass
    attention.py   causal attention, over a whole sequence or over cached keys
    fused/         the blocks again, as kernels for H100s that move fewer bytes
    loss.py        the cross-entropy loss
    precision.py   the dtypes of matmuls
"""
