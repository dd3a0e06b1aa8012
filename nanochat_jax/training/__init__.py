"""The four training stages: base, mid and sft share one loop, rl has its own.

In: the settings of a stage, and the checkpoint of the stage before it. Out: a run's folder with checkpoints,
config.json and log.jsonl.

run opens a run (new, resumed or finished); stages and batch_shape derive its data and the shape of its batches; step
makes the compiled training step, optim the optimizer; loop and rl (with rollouts) are the two loops; run_control
decides when they save, evaluate and stop (interruption: on a signal), and validation lists what they evaluate.
"""
