"""The four training stages: base, mid and sft share one loop, rl has its own.

In: the settings of a stage, and the checkpoint of the stage before it. Out: a run's folder with checkpoints,
config.json and log.jsonl.

run opens a run (new, resumed or finished); stages and batch_shape derive what it trains on; step is the compiled step
and optim the optimizer; loop and rl (with rollouts) are the two loops; run_control decides when they save, evaluate and
stop; interruption catches stop signals; validation holds the evaluations.
"""
