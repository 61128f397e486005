"""Submission of a batch script."""

import re
import shutil
import subprocess

from megatron_fipo.errors import UserError

TIMEOUT_S = 300.0
"""sbatch itself tries again for a minute if Slurm's controller does not answer."""
_JOB_ID = re.compile(r"^(\d+)(;.*)?$", re.ASCII | re.MULTILINE)


def submit(script: str) -> str:
    """Give `script` to sbatch and return the job id. Raises UserError with sbatch's reason if it refuses the job."""
    program = shutil.which("sbatch")
    if program is None:
        raise UserError(
            "there is no sbatch on this machine; run this on a login node of a Slurm cluster, or print the script with --dry-run"
        )
    try:
        done = subprocess.run(
            [program, "--parsable"], input=script.encode(), capture_output=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch did not answer within {TIMEOUT_S:g} s and was ended; look for the job with squeue before you submit it again"
        ) from None
    except OSError as error:
        raise UserError(f"cannot run {program}: {error.strerror}; repair Slurm's installation here") from None
    output, errors = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    if done.returncode:
        raise UserError(f"sbatch refused the job: {_reason(errors)}")
    job = _JOB_ID.search(output)
    if job is None:
        raise UserError(
            f"sbatch ended without an error but named no job ({' '.join(output.split())[:200] or 'it printed nothing'}); look for "
            "the job with squeue before you submit it again"
        )
    return job[1]


def _reason(output: str) -> str:
    """sbatch's lines in one, without the program's name."""
    lines = [
        re.sub(r"^(sbatch: )?(error: )?(Batch job submission failed: )?", "", line.strip())
        for line in output.splitlines()
    ]
    return "; ".join(line for line in lines if line) or "it gave no reason"
