"""What to measure next, given predictions and everything known so far. Pure."""

from collections.abc import Collection

from hptool.predict import Predictions


def propose(predictions: Predictions, tried: Collection[str], limit: int) -> list[int]:
    """Rows of the next layouts to run: the best predicted that were not tried, `limit` tries in all.

    `tried` are the names of layouts that ran, failed or are under way.
    """
    left = limit - len(tried)
    fresh = (int(i) for i in predictions.ranking() if predictions.layouts.row(int(i)).name not in tried)
    return [row for row, _ in zip(fresh, range(left), strict=False)]
