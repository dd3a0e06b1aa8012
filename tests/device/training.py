"""d20 with 16 and with 32 rows at once, and a run that is resumed from its middle."""

import shutil

from call import Call, train_records

call = Call("training", __doc__)
call.tokenizer()
for rows in (16, 32):
    steps = train_records(
        call.base_run(f"rows{rows}", f"--device_batch_size={1 if call.dry else rows}", "--num_iterations=12")
    )
    call.note(**{f"rows_{rows}": steps})

# The same run in two parts must continue where it stopped.
flags = ["--num_iterations=12", "--save_every=6", f"--device_batch_size={1 if call.dry else 32}"]
whole = train_records(call.base_run("whole", *flags))
step = call.base / "base_checkpoints" / "whole" / "step_000012"
if step.exists():
    shutil.rmtree(step)
resumed = [record for record in train_records(call.base_run("whole", *flags)) if record["step"] > 6]
same = [a["loss"] == b["loss"] for a, b in zip(whole[-len(resumed) :], resumed, strict=True)] if resumed else []
call.note(resumed_bit_for_bit=bool(same) and all(same), whole=whole, resumed=resumed)
call.failed = call.failed or not (same and all(same))
call.end()
