"""How fast training goes: tokens per second and the share of time spent waiting for data."""

from time import perf_counter

from lightning.pytorch.profilers import Profiler


class FetchTimer(Profiler):
    """Adds up the seconds the training loop waits for its next batch.

    Lightning tells only its profiler when it fetches; between the batch hooks lie checkpoints and validations as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._since = perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += perf_counter() - self._since

    def summary(self) -> str:
        return ""  # Lightning would print it after the run


class SpeedMeter:
    """Counts tokens and seconds of training steps; validation, checkpoints and samples are not training time.

    Attributes:
        fetch: the timer of the data, None where another profiler is in use: what was waited is unknown then and counts nowhere.
        tokens: tokens of the steps counted so far.
        waited: seconds that these steps waited for their data.
        seconds: duration of these steps, waiting for data included.
    """

    def __init__(self, fetch: FetchTimer | None) -> None:
        self.fetch = fetch
        self.tokens = 0
        self.waited = 0.0
        self.seconds = 0.0
        self._step_start = perf_counter()
        self._mark = (0, 0.0, 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Mean over all steps counted; 0 before the first."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def begin_step(self) -> None:
        """Start the clock of a step whose batch has arrived; what was waited for it belongs to the step."""
        if self.fetch is not None:
            self.seconds += self.fetch.seconds - self.waited
            self.waited = self.fetch.seconds
        self._step_start = perf_counter()

    def end_step(self, tokens: int) -> None:
        """Stop it, and count the step's tokens."""
        self.seconds += perf_counter() - self._step_start
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        """Return the speeds since the last reading."""
        tokens, seconds, waited = self.tokens - self._mark[0], self.seconds - self._mark[1], self.waited - self._mark[2]
        self._mark = (self.tokens, self.seconds, self.waited)
        duration = max(seconds, 1e-9)
        speeds = {"speed/tokens_per_second": tokens / duration}
        if self.fetch is not None:
            speeds["speed/data_wait_share"] = waited / duration
        return speeds
