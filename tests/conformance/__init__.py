"""The numbered conformance cases: their table, the tests that prove them, and the report of a run."""
