"""The four training stages: base, mid and sft share one loop, rl has its own.

In: the settings of a stage, and the checkpoint of the stage before it. Out: a run's folder with checkpoints,
config.json and log.jsonl.

run.py opens a run (new, resumed or finished). stages.py sets up the data, the number of steps and the learning rate of
each stage. batch_shape.py splits a step into micro-batches. step.py holds the compiled step, and optim.py the
optimizer. loop.py and rl.py (with rollouts.py) are the two loops; run_control.py decides when they save, evaluate and
stop. interruption.py catches stop signals, validation.py holds the evaluations, and wandb_log.py copies the log to
Weights & Biases.
"""
