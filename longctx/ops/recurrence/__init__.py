"""Linear recurrences: linear attention and the delta rule, by chunks."""
