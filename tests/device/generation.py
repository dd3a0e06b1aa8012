"""Decoding at batch sizes 1 to 128, prefill, and chat_eval on generated tasks."""

import json

from call import Call

call = Call("generation", __doc__)
results = call.out / "decode.jsonl"
size = (
    ["--depth=2", "--prompt=32", "--new=8", "--batches=1,2", "--vocab_size=512", "--rounds=1"]
    if call.dry
    else ["--rounds=2"]
)
call.python("-m", "scripts.bench", "decode", *size, f"--json={results}", seconds=300)
if results.exists():
    call.note(decode=[json.loads(line) for line in results.read_text().splitlines()])
call.tokenizer()
call.base_run("eval", "--num_iterations=1", f"--device_batch_size={1 if call.dry else 16}")
problems = ["-x", "4", "-m", "8"] if call.dry else ["-x", "256", "-m", "128"]
call.python("-m", "scripts.chat_eval", "-i", "base", "-g", "eval", "-a", "Sums|TwoStep", *problems, seconds=240)
call.note(chat_eval=[record for record in call.log("base", "eval") if record["kind"] == "chat"])
call.end()
