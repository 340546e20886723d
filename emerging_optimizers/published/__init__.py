"""What is published under other paths and is no optimizer: functions of one matrix, helpers, adapters.

Nothing of the library itself needs them. Each published path is a file that re-exports from here.
"""
