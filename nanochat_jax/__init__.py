"""nanochat in JAX and Flax.

The package is divided into rooms. A room is a module or a folder. The rooms are listed here from top to bottom. A room
may use only rooms on the lines below its own. The tool `lint-imports` enforces this rule.

report, dataset                      two commands
lineage                              the runs that belong together in a report
training                             the four training stages
evals                                scoring a model
tasks, serve, hf                     problems and conversations; the web server; weights in Hugging Face's layout
trained_model                        finding and loading a trained model
engine, checkpoint                   text generation; saved models
parallel, data                       devices, processes and sharding; pretraining text and batches
conversation                         prompts
tokenizer                            text to tokens and back
model, tokenizer_file                the transformer; the tokenizer's files
commandline, environment, run_log    flags and presets; the description of the machine; the logs of runs
progress, files, stop_signals        progress bars; writing and locking files; Ctrl-C and SIGTERM
config                               the settings of all commands
"""
