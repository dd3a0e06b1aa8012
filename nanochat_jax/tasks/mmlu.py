"""MMLU (Hendrycks et al., 2020): multiple-choice questions on 57 subjects.

The train split is MMLU's auxiliary_train.
"""

from pathlib import Path

from nanochat_jax.tasks import multiple_choice, task_data
from nanochat_jax.tasks.messages import BadRow

REPO = "cais/mmlu"
LETTERS = "ABCD"


class MMLU(task_data.RowTask):
    name = "MMLU"
    eval_type = "categorical"
    baseline = 0.25

    def __init__(self, split: str, data_dir: str | Path | None = None):
        stored = {"train": "auxiliary_train", "test": "test"}[split]
        if not data_dir:
            self.rows = task_data.hub(REPO, "all", stored)
        elif split == "train" and not task_data.find(Path(data_dir) / "mmlu" / "auxiliary_train.jsonl"):
            # auxiliary_train combines several multiple-choice data sets. The two in mc_train/ can replace it.
            self.rows = task_data.local(data_dir, "mc_train/openbook_qa_train", "mc_train/commonsense_qa_train")
            print(f"MMLU: no mmlu/auxiliary_train.jsonl in {data_dir}, training on mc_train/ instead")
        else:
            self.rows = task_data.local(data_dir, f"mmlu/{stored}")

    @staticmethod
    def conversation(row: dict) -> dict:
        if "answerKey" in row:  # rows of mc_train/ have ARC's format
            choices, letters = row["choices"]["text"], row["choices"]["label"]
            return multiple_choice.conversation(row["question"], choices, letters, row["answerKey"])
        choices, answer = row["choices"], row["answer"]
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices) <= len(LETTERS):
            hidden = ", which hides the right answer" if answer == -1 else ""
            raise BadRow(f"the answer is {answer!r}{hidden}, expected the index of one of the {len(choices)} choices")
        return multiple_choice.conversation(row["question"], choices, LETTERS[: len(choices)], LETTERS[answer])

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return multiple_choice.evaluate(conversation, completion)
