"""Models and their hook names: loading, sites, readout, untrained twins, the bundled learner."""
