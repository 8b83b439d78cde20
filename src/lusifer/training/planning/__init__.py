"""What a run would cost, before it is paid for: `costs` has the formulas, `cards` what GPUs have, `dry_run` adds up.

Nothing here loads a weight.
"""
