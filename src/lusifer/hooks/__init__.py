"""Private parts of other libraries that we depend on, one file per library; each has a test that names what moved."""
