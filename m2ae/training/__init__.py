"""Training: recipe, schedules, optimizer, loop, log."""
