"""python -m nanochat_jax.dataset --tasks gets in advance what the later stages would wait for."""

from nanochat_jax import commandline, config, dataset
from nanochat_jax.config import UserError
from nanochat_jax.evals import bundle
from nanochat_jax.tasks import published, task_data


def test_everything_that_the_later_stages_read_is_asked_for(monkeypatch, capsys, own_base_dir):
    asked, files = [], []

    def refuse(*args):
        asked.append(args)
        raise UserError("the hub refused")

    def find(file):
        files.append(file.name)
        return None, "the server refused"

    monkeypatch.setattr(task_data, "hub", refuse)
    monkeypatch.setattr(published, "find", find)
    monkeypatch.setattr(bundle, "find_bundle", lambda: files.append("CORE"))
    preset = commandline.parse(config.Dataset, ["--config=d20", "--tasks"]).preset_path
    dataset.download_tasks(preset)
    repos = {(repo.split("/")[-1], split) for repo, _, split in asked}
    assert {("smol-smoltalk", "train"), ("smol-smoltalk", "test"), ("gsm8k", "train"), ("gsm8k", "test")} <= repos
    assert {name for name, _ in repos} >= {"smol-smoltalk", "gsm8k", "mmlu", "ai2_arc", "openai_humaneval"}
    assert {"CORE", published.WORDS.name, published.IDENTITY.name} <= set(files)
    # What is refused now costs nothing: the stage tries again.
    err = capsys.readouterr().err
    for name in ("smoltalk (train)", "HumanEval (test)"):
        assert f"warning: {name} could not be downloaded in advance: the hub refused\n" in err
