"""The tests. A name is a claim; `contract.py` holds the claims that every rung must meet."""
