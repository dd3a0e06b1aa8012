"""nanochat in JAX and Flax. The package is divided into rooms, listed here from top to bottom. `lint-imports` enforces
that a room uses only the rooms below it.

report, dataset         two commands
training                the four training stages
evals                   scores of a model
tasks, serve, hf        problems and conversations; the web server; weights in Hugging Face's layout
engine, checkpoint      text generation; saved models
parallel, data          devices, processes and sharding; pretraining text and batches
conversation, tokenizer, tokenizer_file, model
commandline, environment, run_log, progress, files, config
"""
