"""How good an edit is: one file per metric."""
