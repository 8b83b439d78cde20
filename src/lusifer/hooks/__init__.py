"""Private parts of other libraries, one file per library: each hook says what it touches, a canary test guards it."""
