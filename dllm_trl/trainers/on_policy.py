"""What the trainer scores is what the rollout saw: how far apart their log-probabilities may be."""

# Largest difference that is rounding: of any token in float32, on average in half precision.
FULL_PRECISION, HALF_PRECISION = 1e-3, 0.05


def judge_difference(mean: float, maximum: float, full_precision: bool) -> str | None:
    """
    Args:
        mean, maximum (`float`):
            Of the absolute differences of log-probabilities (nats) of the same tokens under the same weights.
        full_precision (`bool`):
            Whether everything was computed in float32.

    Returns:
        `str` or `None`: What is to be said of a difference that may be more than half precision's rounding.

    Raises:
        RuntimeError: float32 differs by more than rounding.
    """
    figures = f"mean |difference| {mean:.3g}, max {maximum:.3g}"
    if full_precision and not maximum <= FULL_PRECISION:
        raise RuntimeError(
            f"Rollout and trainer disagree on log-probabilities under the same weights ({figures}; in float32 at most "
            "1e-3 is rounding): the policy would be trained on contexts it never saw. Were the weights, the attention "
            "implementation or the forward changed between rollout and loss? `on_policy_check='off'` skips this check."
        )
    if not full_precision and not mean <= HALF_PRECISION:
        return (
            f"Rollout and trainer disagree on log-probabilities under the same weights ({figures}; in half precision "
            "a mean of at most 0.05 is rounding). Train in float32 to see whether it is rounding, or set "
            "`on_policy_check='off'` to skip this check."
        )
    return None
