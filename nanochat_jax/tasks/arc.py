"""ARC (Clark et al., 2018): grade-school science questions, in an easy and a hard collection.

Most questions have four choices, and a few have three or five. Most questions label their choices with
letters, and a few use numbers. The prompt keeps these labels.
"""

from pathlib import Path

from nanochat_jax.tasks import multiple_choice, task_data

REPO = "allenai/ai2_arc"


class ARC(task_data.RowTask):
    eval_type = "categorical"
    baseline = 0.25

    def __init__(self, split: str, data_dir: str | Path | None = None):
        if data_dir:
            self.rows = task_data.local(data_dir, f"arc/{self.name}/{split}")
        else:
            self.rows = task_data.hub(REPO, self.name, split)

    @staticmethod
    def conversation(row: dict) -> dict:
        choices = row["choices"]
        return multiple_choice.conversation(row["question"], choices["text"], choices["label"], row["answerKey"])

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return multiple_choice.evaluate(conversation, completion)


class ARCEasy(ARC):
    name = "ARC-Easy"


class ARCChallenge(ARC):
    name = "ARC-Challenge"
