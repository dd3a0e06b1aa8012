"""Two steps of RL, then a server that answers while RL runs beside it."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

from call import REPOSITORY, Call

call = Call("rl_and_chat", __doc__)
call.tokenizer()
call.base_run("rl", "--num_iterations=1", f"--device_batch_size={1 if call.dry else 16}")
small = ["--num_samples=2", "--max_new_tokens=8", "--device_batch_size=2"] if call.dry else ["--num_samples=16"]
command = [
    "-m", "scripts.train", "--stage=rl", "--source=base", "--model_tag=rl", "--mixture=sums=64",
    "--examples_per_step=2",
    "--num_iterations=2", "--eval_every=-1", *small,
]  # fmt: skip
call.python(*command, seconds=240)
call.note(rl=call.log("rl", "rl"))

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
# Two processes share the GPU, so neither may take most of its memory.
env = call.env | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
server = subprocess.Popen(
    [sys.executable, "-m", "scripts.chat_web", "-i", "base", "-g", "rl", f"--port={port}", "-m", "8"],
    cwd=REPOSITORY, env=env,
)  # fmt: skip
call.env = env
beside = subprocess.Popen([sys.executable, *command, "--resume=never"], cwd=REPOSITORY, env=env)
try:
    body = json.dumps({"messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 8}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    times, deadline = [], time.monotonic() + 200
    while len(times) < 5 and time.monotonic() < deadline:
        start = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.loads(response.read())
            times.append(round(time.monotonic() - start, 3))
        except OSError:
            time.sleep(1)
    call.note(answer_seconds=times, answer=answer if times else None, beside=beside.wait(timeout=240))
    call.failed = call.failed or len(times) < 5 or beside.returncode != 0
finally:
    beside.kill()
    server.terminate()
    server.wait(timeout=60)
call.end()
