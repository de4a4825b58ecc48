"""Which records are timings: all others are the same whenever a unit runs again with its seed."""


def is_timing(metric: str) -> bool:
    """Whether the name of a metric says that it is a time on the clock.

    An experiment marks what is one under another name, such as a ratio of times, itself: ``{..., "timing": True}``.

    >>> [is_timing(name) for name in ("seconds", "metric_seconds", "step/naive/milliseconds", "time/epoch", "lifetime")]
    [True, True, True, True, False]
    """
    last = metric.rpartition("/")[2]
    return metric.startswith("time/") or last.rpartition("_")[2] in ("seconds", "milliseconds")
