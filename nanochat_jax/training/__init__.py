"""The four training stages. The stages base, mid and sft share one loop; rl has a loop of its own.

The input of a stage is its settings and the checkpoint of the previous stage. The output is the folder of a run, with
checkpoints, config.json and log.jsonl.

run.py opens a run (new, resumed or finished). stages.py sets up the data, the number of steps and the learning rate of
each stage. batch_shape.py splits a step into micro-batches. step.py holds the compiled step. optim.py holds the
optimizer. loop.py is the loop of base, mid and sft. rl.py is the loop of rl, and rollouts.py samples its answers.
run_control.py decides when a loop saves, evaluates and stops. interruption.py catches stop signals. validation.py holds
the evaluations. wandb_log.py copies the log to Weights & Biases.
"""
