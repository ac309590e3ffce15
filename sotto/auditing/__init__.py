"""Attacks on one's own training: lower bounds on epsilon that are proven by success, beside the upper bound.

The package is not called audit, because `sotto.audit` is the function.
"""
