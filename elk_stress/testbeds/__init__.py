"""Models, their data and the known truth about what a probe should report."""
