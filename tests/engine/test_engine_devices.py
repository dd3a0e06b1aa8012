"""The engine on eight devices generates the same as on one. The test runs in a process of its own."""

import json
import os
import re
import subprocess
import sys

import tiny

from nanochat_jax.config import REPOSITORY

ON_DEVICES = """
import json
import sys
import jax
import tiny
from nanochat_jax.config import GPTConfig
from nanochat_jax.engine import scheduler
from nanochat_jax.engine.engine import Engine
from nanochat_jax.engine.request import Request
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding
from nanochat_jax.tokenizer import Tokenizer
from scripted_model import scripted
from test_engine import CALL, END, prompt

tokenizer = Tokenizer.train(["12 * 3 = 36, hello there, what is 7 + 5?"] * 3, 280)
model_cfg = GPTConfig(2, 4, 2, 64, tokenizer.vocab_size, 160)
one = jax.device_put(scripted(gpt.init(model_cfg, seed=0), model_cfg, tokenizer, CALL, END), jax.devices()[0])
mesh = sharding.make_mesh()
many = jax.device_put(one, sharding.replicated(mesh))
# More samples than slots, a tool call among them, and prompts whose rows outgrow the first bucket of the cache.
requests = [
    Request([*prompt(9), ord("?")], max_tokens=30, temperature=0),
    Request(prompt(12, 1), max_tokens=20, n=9, seed=1, top_k=50, stop_ids=()),
    Request(prompt(4, 2), max_tokens=12, n=6, seed=2, stop_ids=()),
    Request(prompt(120, 3), max_tokens=24, n=3, seed=3, top_p=0.9, temperature=0.8, stop_ids=()),
]
for params, slots, platform in ((one, 16, "default"), (many, 16, "default"), (many, 6, "default"), (many, 16, "cuda")):
    if platform == "cuda":  # what a GPU would run, on the CPU
        jax.clear_caches()
        jax.lax.platform_dependent = lambda *args, **branches: branches["cuda"](*args)
    engine = Engine(params, model_cfg, tokenizer, slots=slots, chunk=4, asynchronous=params is many)
    run, used = engine._runner._run, set()

    def noted(program, *args):
        used.add(program)
        return run(program, *args)

    engine._runner._run = noted
    if platform == "cuda":
        for program in engine.missing(requests):
            engine.compile(program)
    answers = [[(s.ids, s.mask, s.finish_reason) for s in group] for group in engine.run(requests)]
    # The next turn of the last one continues from its cached tokens, another prompt is prefilled in chunks.
    last = [*requests[3].ids, *answers[3][2][0], *prompt(4, 4)]
    for scheduler.PREFILL_CHUNK, ids in ((512, last), (64, prompt(130, 5))):
        events = list(engine.stream(Request(ids, max_tokens=9, seed=4, stop_ids=())))
        answers.append([events[0].cached_tokens, [token for event in events for token in event.ids]])
    scheduler.PREFILL_CHUNK = 512
    ran = {engine._runner.compiled_for(program) or program for program in used if program.name == "decode"}
    print("\\nused", len(ran), file=sys.stderr)
    cache = engine._runner.cache["k"] + engine._runner.cache["v"]
    spread = all(x.sharding.is_equivalent_to(sharding.batch_sharding(mesh), x.ndim) for x in cache)
    print(json.dumps([answers, spread, sorted({len(shard.data) for x in cache for shard in x.addressable_shards})]))
"""


def test_eight_devices_decode_an_eighth_each_and_say_what_one_says():
    env = os.environ | {"XLA_FLAGS": tiny.xla_flags(8), "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    folders = REPOSITORY, REPOSITORY / "tests" / "support", REPOSITORY / "tests" / "engine"
    env["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, many, undivided, as_on_gpus = map(json.loads, done.stdout.strip().splitlines()[-4:])
    assert one == [one[0], False, [16]]
    assert many == [one[0], True, [2]]  # the cache of 16 slots has two rows on each of 8 devices
    assert as_on_gpus == many
    assert undivided == [one[0], False, [6]]  # 6 slots cannot be divided by 8, so every device decodes them all
    assert [cached_tokens for cached_tokens, _ in one[0][4:]] == [143, 0]
    # A chunk in flight runs the same program as a chunk whose inputs the host has sent.
    used = sum(map(int, re.findall("^used ([0-9]+)$", done.stderr, re.MULTILINE)))
    assert len(re.findall(r"Compiling (?:jit\()?decode\b", done.stderr)) == used > 10
    assert one[0][0][0][1].count(0) == 3  # the call was answered: <|output_start|> 36 <|output_end|>
