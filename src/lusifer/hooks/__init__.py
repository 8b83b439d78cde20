"""Private parts of other libraries that we depend on: one file per library, one function per part.

Each function says what it touches, and `tests/hooks` holds one test for each, which names what an upgrade moved.
"""
