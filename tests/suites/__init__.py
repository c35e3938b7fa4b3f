"""Test suites that others have published, run against flashlayer.

    python -m tests.suites flash_attn
    python -m tests.suites flash_attn --source FOLDER -- -k kvcache -x

A suite is a module here that makes one :class:`~tests.suites.suite.Suite`. Its text is downloaded
and kept in a cache folder; in this repository there are only names of its tests, and reasons.
"""
