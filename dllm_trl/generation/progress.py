"""The bar of a rollout."""

from tqdm.auto import tqdm


class RolloutBar(tqdm):
    """Rows that are done, with the tokens per second and per forward so far."""

    def __init__(self, rows: int, show: bool):
        # `miniters=0`: the clock alone says when it is drawn
        super().__init__(total=rows, desc="Rollout", unit="row", disable=not show, leave=False, miniters=0)
        self.tokens = self.forwards = 0

    def step(self, tokens: int, forwards: int) -> None:
        """After a step of the decoder: tokens it committed, and rows that it served."""
        if self.disable:
            return
        self.tokens += tokens
        self.forwards += forwards
        seconds = max(self.format_dict["elapsed"], 1e-9)
        self.set_postfix_str(
            f"{self.tokens / seconds:.0f} tokens/s, {self.tokens / self.forwards:.2f} tokens/forward", refresh=False
        )
        self.update(0)
