"""One thread beside the training that writes copies of checkpoints, in the order in which they were taken."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lightning_multinorm.checkpoints.spread import State
from lightning_multinorm.checkpoints.staging import Staging

_AT_MOST = 2  # a checkpoint and last.ckpt come together; each holds a copy of the weights


class Background:
    """Does one thing after another; after one has failed nothing more, until its error was raised here."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: deque[Future[None]] = deque()
        self._failed = False
        self._staging = Staging()

    def settle(self) -> None:
        """Wait until there is room for one more.

        Raises:
            Exception: of what was done and has failed.
        """
        while self._pending and (self._pending[0].done() or len(self._pending) >= _AT_MOST):
            self._finish_first()

    def submit(self, action: Callable[[], None]) -> None:
        """Do something later, in its turn."""
        self._pending.append(self._thread.submit(self._run, action))

    def write(self, state: State, how: Callable[[State], None]) -> None:
        """Copy all tensors now, and write the copy later."""
        copied, used = self._staging.copy(state)

        def action() -> None:
            try:
                how(copied)
            finally:
                self._staging.release(used)

        self.submit(action)

    def wait(self) -> None:
        """Until everything is done.

        Raises:
            Exception: of what has failed.
        """
        while self._pending:
            self._finish_first()

    def _run(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except BaseException:
            self._failed = True
            raise

    def _finish_first(self) -> None:
        try:
            self._pending[0].result()
        except Exception:
            for later in self._pending:
                later.exception()  # so that none begins once the error is known
            self._pending.clear()
            self._failed = False
            raise
        self._pending.popleft()
