"""`make bench`: figures with their goals, as ratios within one run where the machine matters."""
