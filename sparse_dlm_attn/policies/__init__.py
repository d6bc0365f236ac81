"""The published methods, one file each: the paper, the rule, the defaults, and every deviation."""
