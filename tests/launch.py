"""Several processes, as `accelerate launch` starts them."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

ACCELERATE = Path(__file__).parents[1] / "training" / "accelerate"


def launch(setup: str, script: Path | str, options: list[str], processes: int = 2) -> None:
    """Run a script, or "-m" and a module, in processes on the CPU, by the accelerate file of `setup`.

    Gloo's processes were seen to hang after their work was done, once in a hundred runs or so and for no known reason.
    So they get a second chance, without what the first wrote; those of the first print where they stood.
    """
    written = Path(options[options.index("--output_dir") + 1]) if "--output_dir" in options else None
    is_new = written is not None and not written.exists()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ACCELERATE / f"{setup}.yaml"]
    command += ["--mixed_precision", "no", "--num_processes", processes, "--main_process_port", 0, script, *options]
    for is_last in (False, True):
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        process = subprocess.Popen([*map(str, command)], env=environment)
        try:
            assert process.wait(timeout=200) == 0
            return
        except subprocess.TimeoutExpired:
            for each in psutil.Process(process.pid).children(recursive=True) + [process]:
                each.send_signal(signal.SIGABRT)
            process.wait()
            if is_last:
                raise
            if is_new:
                shutil.rmtree(written, ignore_errors=True)
