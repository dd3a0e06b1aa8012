"""Trains one stage of the model.

    python -m scripts.train --stage=base --depth=20
    python -m scripts.train --stage=mid
    python -m scripts.train --stage=sft
    python -m scripts.train --stage=rl

`--stage=NAME --help` shows the settings of a stage.
"""

import sys

from nanochat_jax import commandline, config


def main(cfg: config.Train) -> None:
    if isinstance(cfg, config.Rl):
        from nanochat_jax.training import rl

        rl.train(cfg)
    else:
        assert isinstance(cfg, config.Base | config.Mid | config.Sft)
        from nanochat_jax.training import loop

        loop.train(cfg)


def chosen_stage() -> type[config.Train]:
    """Removes --stage from sys.argv, and returns the settings class of the stage.

    If --stage is repeated, the last one counts.
    """
    stages = ", ".join(config.STAGES)
    value = None
    while (i := next((i for i, arg in enumerate(sys.argv) if arg.partition("=")[0] == "--stage"), None)) is not None:
        _, equals, value = sys.argv[i].partition("=")
        value = value if equals else "".join(sys.argv[i + 1 : i + 2])
        del sys.argv[i : i + (1 if equals else 2)]
    if value in config.TRAINING:
        return config.TRAINING[value]
    if value is not None:
        problem = f"--stage={value}: must be one of {stages}{config.did_you_mean(value, config.STAGES)}"
    elif {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    else:
        problem = f"--stage is missing: must be one of {stages}"
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    commandline.run(main, chosen_stage())
