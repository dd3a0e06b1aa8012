"""What the machine is, what the doctor says, and the tests marked gpu."""

import subprocess

from call import Call

call = Call("facts", __doc__)
for name, command in (("gpus", ["nvidia-smi"]), ("topology", ["nvidia-smi", "topo", "-m"]), ("memory", ["free", "-g"])):
    try:
        call.note(**{name: subprocess.run(command, capture_output=True, text=True, timeout=60).stdout})
    except OSError as error:
        call.note(**{name: str(error)})
small = ["--depth=2", "--total_batch_size=2048", "--device_type=cpu"] if call.dry else ["--config=d20"]
call.note(doctor=call.python("-m", "scripts.doctor", *small))
only = ["--collect-only"] if call.dry else []
call.note(tests=call.python("-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-q", *only, seconds=480)[-8000:])
call.end()
