"""Reports: tables, figures and folders that others can read."""
