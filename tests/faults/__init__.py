"""What a run must survive: rows of faults, each tried for real. python -m tests.faults [--long]"""
