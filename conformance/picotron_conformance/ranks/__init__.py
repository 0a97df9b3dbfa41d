"""Real processes that test a kernel of `comm`: `world` starts and asks them, `rank` is one.

The other files hold the questions: functions of a `Rank`, which every rank of a world runs alike.
Ranks tell each other what happened through a store of the suite's own, never by the kernel.
"""
