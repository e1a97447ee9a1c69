"""The exceptions that the command line answers with one sentence."""


class InputError(Exception):
    """Bad input: one sentence that says what is wrong, where, and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


class RunDiverged(InputError):
    """A run that has diverged and shall not, or cannot, go on from an earlier step: why, and what to do."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}: {advice}")
        self.reason = reason


def first_line(error: BaseException) -> str:
    """What a library's error says, for use inside a sentence: one line, no full stop; its kind where it is mute."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


class RunStopped(Exception):
    """A run that something outside of it has stopped, after its state was saved: one sentence, exit code 1."""


RANK_LOST = 3  # exit code of a rank under `--gpus` that ended because another had


class RankLost(RunStopped):
    """Another process of the run has ended; what made it end is said there."""


class Preempted(Exception):
    """A run that SIGTERM has stopped, as a cluster does that needs the computer: one sentence, exit code 0."""


class Diverged(Exception):
    """A run whose weights or losses are spoilt; says how that shows, as the beginning of a sentence."""
