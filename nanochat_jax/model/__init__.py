"""The transformer as pure functions of its parameters.

In: a GPTConfig, parameters (a nested dict of arrays) and token ids [b,t]. Out: hidden states [b,t,d], logits [b,t,v]
or the loss. All of it runs inside `jax.jit`, except the choice of the dtype and of the attention kernel. parallel/
decides how the arrays are sharded, and training/ updates the parameters.
"""
