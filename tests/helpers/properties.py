"""Settings of hypothesis: the same examples in every run, however slow the machine."""

from functools import partial

from hypothesis import settings

examples = partial(settings, deadline=None, derandomize=True)
