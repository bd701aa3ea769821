"""One view of attention, gradient steps and regression: all weigh demonstrations by a kernel."""
