"""The exit codes of `megatron-fipo`, and which of them a scheduler requeues.

    exit code   meaning
    0           done
    1           a bug; the traceback is printed, a rank's as well
    2           an error that the user can fix: settings, files, a full disk, a GPU that is too small; one sentence is printed
    85          SIGTERM, SIGUSR1 or `max_walltime_minutes`: state saved, run the same command again
    86          something of the cluster was lost: a rank, its node, a collective, a checkpoint writer, Ray; run the same command
                again, it resumes from the last checkpoint
    130         Ctrl-C (SIGINT): state saved; or Ctrl-C twice: stopped at once, with the state of the last checkpoint

A scheduler requeues 85 and 86 and no other code: what ends with 1 or 2 happens again in the same place. That is why an
exception of a rank that is not a `LostError` is a bug (1), and too little GPU memory the user's to fix (2): the same batch
needs the same memory. A process that the kernel killed, out of host memory or not, is lost (86): its node may have been
shared, and the command cannot know. So a loss can repeat as well; who requeues stops when no new checkpoint appears.
"""

DONE = 0
BUG = 1
USER_ERROR = 2
SAVED = 85
LOST = 86
INTERRUPTED = 130

REQUEUED = (SAVED, LOST)
"""The same command continues the run."""
