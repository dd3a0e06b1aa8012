"""nanochat in JAX and Flax.

The package is divided into rooms, which are listed here from top to bottom. A room may use only the rooms below it.
The tool `lint-imports` enforces this.

report, dataset         two commands
training                the four training stages
evals                   scoring a model
tasks, serve, hf        problems and conversations; the web server; weights in Hugging Face's layout
engine, checkpoint      text generation; saved models
parallel, data          devices, processes and sharding; pretraining text and batches
conversation, tokenizer, tokenizer_file, model
commandline, environment, run_log, progress, files, config
"""
