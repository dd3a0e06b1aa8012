"""The transformer as pure functions of its parameters.

In: a GPTConfig, parameters (a nested dict of arrays) and token ids [b,t]. Out: hidden states [b,t,d], logits [b,t,v]
or the loss. Everything here runs inside `jax.jit`; parallel/ decides how arrays are sharded, and training/ updates
them.
"""
