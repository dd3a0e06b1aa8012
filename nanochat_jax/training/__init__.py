"""The four training stages. The stages base, mid and sft share one loop, and rl has its own.

A later stage starts from a checkpoint of an earlier stage. Each run writes checkpoints, config.json and log.jsonl into
its own folder.

`start_plan.py` decides how a run starts, and `run.py` opens the run.
`announce.py` prints what a run will do.
`stages.py` sets up the data, the number of steps and the learning-rate schedule of base, mid and sft.
`passes.py` computes the number of steps, and how often they read the data.
`pins.py` makes a resumed run read what it began with.
`held_out.py` compares validation data with training data.
`batch_shape.py` splits a step into micro-batches.
`batch_trial.py` chooses how many rows a device computes at once.
`step.py` defines the compiled optimizer step.
`optim.py` defines the optimizer.
`loop.py` trains the stages base, mid and sft.
`rl.py` trains the stage rl.
`rollouts.py` samples the answers that rl trains on.
`run_control.py` decides when a loop saves, evaluates and stops.
`interruption.py` catches stop signals.
`garbage.py` holds off Python's garbage collector between steps.
`validation.py` evaluates the model during training.
`wandb_log.py` copies the log to Weights & Biases.
"""
